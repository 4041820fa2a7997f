package regevent

import "time"

// row is one cell of the table: an event that is legal in a state, where it may lead, and what it does.
type row struct {
	from State
	on   EventKind
	to   []State
	do   func(*step) State
	note string // for the diagram
}

// table is the state machine. A pair of state and event that is not here is unexpected.
var table = []row{
	{None, Registered, []State{Subscribing, Terminated}, (*step).begin, "subscribe, unless for an emergency registration"},
	{None, Deregistered, []State{Terminated}, (*step).end, "no subscription was made"},

	{Subscribing, Registered, []State{Subscribing}, (*step).keep, "note the new expiry"},
	{Subscribing, Deregistered, []State{Terminated}, (*step).end, "a NOTIFY still to come gets 481"},
	{Subscribing, Accepted, []State{Subscribing, Waiting, Terminated}, (*step).acceptedFirst, "note the expiry, wait for the NOTIFY; expiry 0 is a failure"},
	{Subscribing, Refused, []State{Subscribing, Waiting, Terminated}, (*step).refusedFirst, "423: ask for longer at once; lasting: report; else retry"},
	{Subscribing, TimedOut, []State{Waiting, Terminated}, (*step).failed, "retry"},
	{Subscribing, NotifyOverdue, []State{Waiting, Terminated}, (*step).failed, "retry"},
	{Subscribing, NotifyActive, []State{Active, Refreshing}, (*step).established, "answer, apply, arm refresh and expiry"},
	{Subscribing, NotifyPending, []State{Active}, (*step).established, "answer, arm refresh and expiry"},
	{Subscribing, NotifyTerminated, []State{Waiting, Terminated}, (*step).ended, "answer, apply; by reason: retry or report"},

	{Active, Registered, []State{Active}, (*step).keep, "note the new expiry: the next refresh asks for longer"},
	{Active, Deregistered, []State{Terminated}, (*step).leave, "SUBSCRIBE with expiry 0 if the core has not heard of it"},
	{Active, Accepted, []State{Active, Waiting, Terminated}, (*step).accepted, "answer that the NOTIFY has overtaken: note the expiry"},
	{Active, TimedOut, []State{Active}, (*step).stay, "the NOTIFY has shown that the SUBSCRIBE arrived"},
	{Active, NotifyActive, []State{Active, Refreshing}, (*step).notified, "answer, apply, note the expiry"},
	{Active, NotifyPending, []State{Active}, (*step).notified, "answer, note the expiry"},
	{Active, NotifyTerminated, []State{Waiting, Terminated}, (*step).ended, "answer, apply; by reason: retry or report"},
	{Active, Gap, []State{Active, Refreshing}, (*step).resync, "refresh to get the full state, not too often"},
	{Active, RefreshDue, []State{Refreshing}, (*step).refreshDue, "refresh"},
	{Active, ExpiryDue, []State{Waiting, Terminated}, (*step).failed, "refreshes have failed: subscribe anew"},

	{Refreshing, Registered, []State{Refreshing}, (*step).keep, "note the new expiry"},
	{Refreshing, Deregistered, []State{Terminated}, (*step).leave, "SUBSCRIBE with expiry 0 if the core has not heard of it"},
	{Refreshing, Accepted, []State{Active, Waiting, Terminated}, (*step).accepted, "arm refresh and expiry; expiry 0 is a failure"},
	{Refreshing, Refused, []State{Active, Refreshing, Waiting, Terminated}, (*step).refusedRefresh, "423: ask for longer at once; 481: subscribe anew; lasting: report; else refresh later"},
	{Refreshing, TimedOut, []State{Active}, (*step).refreshLater, "refresh later, until the expiry"},
	{Refreshing, NotifyActive, []State{Refreshing}, (*step).notified, "answer, apply, note the expiry"},
	{Refreshing, NotifyPending, []State{Refreshing}, (*step).notified, "answer, note the expiry"},
	{Refreshing, NotifyTerminated, []State{Waiting, Terminated}, (*step).ended, "answer, apply; by reason: retry or report"},
	{Refreshing, Gap, []State{Refreshing}, (*step).stay, "the full state is asked for already"},
	{Refreshing, ExpiryDue, []State{Waiting, Terminated}, (*step).failed, "subscribe anew"},

	{Waiting, Registered, []State{Waiting}, (*step).keep, "note the new expiry"},
	{Waiting, Deregistered, []State{Terminated}, (*step).end, "no more attempts"},
	{Waiting, Accepted, []State{Waiting}, (*step).stay, "late answer; its NOTIFY gets 481, which ends it"},
	{Waiting, Refused, []State{Waiting}, (*step).stay, "late answer"},
	{Waiting, TimedOut, []State{Waiting}, (*step).stay, "late answer"},
	{Waiting, Gap, []State{Waiting}, (*step).stay, "the next subscription begins with the full state"},
	{Waiting, RetryDue, []State{Subscribing}, (*step).subscribe, "subscribe"},

	{Terminated, Registered, []State{Terminated, Subscribing}, (*step).revive, "subscribe if attempts were given up: the core is there again"},
	{Terminated, Deregistered, []State{Terminated}, (*step).forget, "no more attempts"},
	{Terminated, Accepted, []State{Terminated}, (*step).stay, "answer to the SUBSCRIBE with expiry 0"},
	{Terminated, Refused, []State{Terminated}, (*step).stay, "answer to the SUBSCRIBE with expiry 0"},
	{Terminated, TimedOut, []State{Terminated}, (*step).stay, "answer to the SUBSCRIBE with expiry 0"},
	{Terminated, NotifyActive, []State{Terminated}, (*step).late, "answer 481: it has crossed the end"},
	{Terminated, NotifyPending, []State{Terminated}, (*step).late, "answer 481: it has crossed the end"},
	{Terminated, NotifyTerminated, []State{Terminated}, (*step).lastNotify, "answer: the end of our SUBSCRIBE with expiry 0"},
	{Terminated, Gap, []State{Terminated}, (*step).stay, "the last document does not matter any more"},
}

// timers are those that may run in a state; the others are stopped on entry.
var timers = [stateEnd][]Timer{
	Subscribing: {TimerNotify},
	Active:      {TimerRefresh, TimerExpiry},
	Refreshing:  {TimerExpiry},
	Waiting:     {TimerRetry},
}

// cells is the table by state and event.
var cells = func() (c [stateEnd][eventEnd]*row) {
	for i := range table {
		c[table[i].from][table[i].on] = &table[i]
	}
	return c
}()

// running is the set of timers that may run in a state.
var running = func() (set [stateEnd]uint8) {
	for s, list := range timers {
		for _, t := range list {
			set[s] |= 1 << t
		}
	}
	return set
}()

// Next returns the subscription that follows from an event at the time now, and appends what is to be done, in this
// order, to actions. It depends on nothing else but c.Jitter.
func Next(c *Config, s Subscription, e Event, now time.Time, actions []Action) (Subscription, []Action) {
	t := step{c: c, s: s, e: e, now: now, out: actions}
	if s.state <= 0 || s.state >= stateEnd || e.Kind <= 0 || e.Kind >= eventEnd || cells[s.state][e.Kind] == nil {
		t.unexpected()
		return s, t.out
	}
	for timer := TimerRefresh; timer < timerEnd; timer++ {
		if timer.Event().Kind == e.Kind {
			t.s.armed &^= 1 << timer // it has fired
		}
	}
	t.s.state = cells[s.state][e.Kind].do(&t)
	for timer := TimerRefresh; timer < timerEnd; timer++ {
		if t.s.Armed(timer) && running[t.s.state]&(1<<timer) == 0 {
			t.s.armed &^= 1 << timer
			t.out = append(t.out, Action{Kind: Stop, Timer: timer})
		}
	}
	if t.s.state == Waiting || t.s.state == Terminated {
		t.s.deadline = 0
	}
	return t.s, t.out
}
