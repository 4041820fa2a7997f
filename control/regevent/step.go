package regevent

import "time"

// step is one transition at work. Its methods are the cells of the table: each returns the state that follows.
type step struct {
	c   *Config
	s   Subscription
	e   Event
	now time.Time
	out []Action
}

func (t *step) act(a Action) { t.out = append(t.out, a) }

func (t *step) arm(timer Timer, after time.Duration) {
	t.s.armed |= 1 << timer
	t.act(Action{Kind: Arm, Timer: timer, After: max(after, 0)})
}

// unexpected answers and counts what the table does not have.
func (t *step) unexpected() {
	if t.e.Kind.notify() {
		// RFC 6665 §4.1.3: a NOTIFY that matches no subscription; the notifier then forgets it.
		t.act(Action{Kind: Answer, Status: 481})
	}
	t.act(Action{Kind: Unexpected})
}

func (t *step) stay() State { return t.s.state }

func (t *step) keep() State {
	t.s.life = seconds(t.e.Expires)
	return t.s.state
}

func (t *step) begin() State {
	t.keep()
	if t.s.emergency {
		return Terminated
	}
	return t.subscribe()
}

func (t *step) end() State { return Terminated }

// leave ends a subscription together with the registration. When the core has ended the registration, or the UE has
// through us, the notifier ends the subscription as well.
func (t *step) leave() State {
	if t.e.Silent {
		t.act(Action{Kind: Subscribe, InDialog: true, Expires: 0})
	}
	return Terminated
}

// late refuses a NOTIFY that has crossed the end: the notifier then forgets the subscription (RFC 6665 §4.1.3).
func (t *step) late() State {
	t.act(Action{Kind: Answer, Status: 481})
	return Terminated
}

func (t *step) lastNotify() State {
	t.act(Action{Kind: Answer, Status: 200})
	return Terminated
}

// ask returns the expiry to ask for: more than the registration's (TS 24.229 §5.2.3), and as much as the notifier wants.
func (t *step) ask() uint32 {
	t.s.asked = max(t.s.life+t.c.Margin, t.c.Expires, t.s.floor).Truncate(time.Second)
	return uint32(min(t.s.asked/time.Second, 1<<32-1))
}

// subscribe starts a subscription.
func (t *step) subscribe() State {
	t.s.term, t.s.deadline, t.s.gap, t.s.timed = 0, 0, 0, false
	t.act(Action{Kind: Subscribe, Expires: t.ask()})
	t.arm(TimerNotify, t.c.NotifyWait)
	return Subscribing
}

func (t *step) update() State {
	t.act(Action{Kind: Subscribe, InDialog: true, Expires: t.ask()})
	return Refreshing
}

func (t *step) refreshDue() State {
	t.s.timed = true
	t.s.gap = at(t.now) // a refresh brings the full state, whatever it is for
	return t.update()
}

// resync asks for the full state.
func (t *step) resync() State {
	next := t.s.gap.Add(t.c.GapInterval)
	if t.s.gap.IsZero() || next.Sub(t.now) <= 0 {
		t.s.gap, t.s.timed = at(t.now), false
		return t.update()
	}
	if next < t.s.refresh {
		t.refreshAt(next.time())
	}
	return Active
}

func (t *step) refreshAt(when time.Time) {
	t.s.refresh = at(when)
	t.arm(TimerRefresh, when.Sub(t.now))
}

// backoff returns the delay before the next attempt and counts the failure.
func (t *step) backoff(retryAfter uint32) time.Duration {
	d := t.c.Backoff << min(t.s.failures, 20)
	if d <= 0 || d > t.c.BackoffMax {
		d = t.c.BackoffMax
	}
	t.s.failures++
	roll := t.c.Jitter()
	if ra := seconds(retryAfter); ra > 0 {
		// RFC 3261 §20.33: not before. What many UEs were told at once is spread as well.
		return ra + time.Duration(roll*float64(min(d, ra)))
	}
	return d*3/4 + time.Duration(roll*float64(d)/2)
}

// again makes the next attempt to subscribe later, if there may be one.
func (t *step) again(retryAfter uint32) State {
	if t.s.Failures() >= t.c.MaxFailures {
		return t.lose(LossGivenUp)
	}
	t.arm(TimerRetry, t.backoff(retryAfter))
	return Waiting
}

// soon makes the next attempt almost at once, if it is the first after a subscription that has lasted.
func (t *step) soon() State {
	if t.s.failures > 0 {
		return t.again(0)
	}
	t.s.failures++
	t.arm(TimerRetry, time.Duration(t.c.Jitter()*float64(t.c.Spread)))
	return Waiting
}

func (t *step) lose(l Loss) State {
	t.s.loss = l
	t.act(Action{Kind: Report, Loss: l})
	return Terminated
}

// revive starts over when attempts were given up and a REGISTER shows that the core is there again.
func (t *step) revive() State {
	if t.s.loss != LossGivenUp {
		return Terminated
	}
	t.keep()
	t.s.loss, t.s.failures = 0, 0
	return t.subscribe()
}

// forget makes sure that a registration which is over is not subscribed for again.
func (t *step) forget() State {
	t.s.loss = 0
	return Terminated
}

func (t *step) failed() State { return t.again(0) }

// acceptedFirst notes the expiry of the 200. Only the NOTIFY makes the subscription (RFC 6665 §4.1.2.4).
func (t *step) acceptedFirst() State {
	if t.e.HasExpires && t.e.Expires == 0 {
		return t.again(0)
	}
	t.grant()
	return Subscribing
}

// accepted notes the expiry of a subscription that stands.
//
// DEVIATION: RFC 6665 §4.1.2 has Timer N for refreshes too. A notifier that omits the NOTIFY then has told nothing new,
// and to end the subscription for it would lose more.
func (t *step) accepted() State {
	if t.e.HasExpires && t.e.Expires == 0 {
		return t.again(0)
	}
	if t.s.state == Refreshing && t.s.timed {
		t.s.failures = 0 // it has lasted
	}
	t.s.timed = false
	t.grant()
	t.schedule()
	return Active
}

// grant takes over the expiry of a 2xx, which may be shorter than what was asked for but not longer (RFC 6665 §4.2.1.1).
func (t *step) grant() {
	t.s.term = t.s.asked
	if t.e.HasExpires {
		t.s.term = min(t.s.term, seconds(t.e.Expires))
	}
	t.s.deadline = at(t.now).Add(t.s.term)
}

// schedule arms the timers of a subscription that stands.
func (t *step) schedule() {
	left := t.s.deadline.Sub(t.now)
	lead := refreshLead
	if t.s.term <= refreshHalf {
		lead = t.s.term / 2
	}
	delay := left - lead
	if delay <= 0 {
		delay = left / 2
	}
	t.refreshAt(t.now.Add(max(delay, t.c.MinRefresh)))
	t.arm(TimerExpiry, left)
}

// refusedFirst handles the refusal of a SUBSCRIBE that was to start the subscription.
func (t *step) refusedFirst() State {
	switch {
	case t.tooBrief():
		return t.subscribe()
	case lasting(t.e.Status):
		return t.lose(LossRefused)
	}
	return t.again(t.e.RetryAfter)
}

// refusedRefresh handles the refusal of a refresh. Some mean that the subscription is gone, the others that it goes on to
// its expiry (RFC 6665 §4.1.2.2, RFC 5057 §5.1).
func (t *step) refusedRefresh() State {
	switch s := t.e.Status; {
	case t.tooBrief():
		return t.update()
	case s == 481:
		return t.soon()
	case lasting(s):
		return t.lose(LossRefused)
	case s == 404 || s == 410 || s == 480 || s >= 482 && s <= 485:
		return t.again(t.e.RetryAfter)
	}
	return t.refreshLater()
}

// refreshLater waits before the next refresh. When the subscription ends earlier, TimerExpiry fires.
func (t *step) refreshLater() State {
	t.refreshAt(t.now.Add(t.backoff(t.e.RetryAfter)))
	return Active
}

// tooBrief takes over what the notifier demands with 423 (RFC 6665 §4.2.1.1). It reports false for a demand which was met.
func (t *step) tooBrief() bool {
	least := seconds(t.e.MinExpires)
	if t.e.Status != 423 || least <= t.s.asked || t.s.Failures() >= t.c.MaxFailures {
		return false
	}
	t.s.failures++
	t.s.floor = least
	return true
}

// lasting reports whether the same request would be refused for ever with this status.
func lasting(status int) bool {
	switch status {
	case 404, 408, 410, 423, 430, 480, 481, 482, 483, 484, 485, 486, 487, 491, 500, 502, 503, 504, 580:
		return false
	}
	return status >= 400 // a redirection is not followed, but may be gone the next time
}

// answer answers a NOTIFY and applies its document.
func (t *step) answer() {
	status := 200
	switch t.e.Body {
	case Malformed:
		status = 400
	case Unsupported:
		status = 415
	case NoBody, Document:
	}
	t.act(Action{Kind: Answer, Status: status})
	if t.e.Body == Document && t.e.Kind != NotifyPending { // RFC 6665 §4.1.3: pending tells nothing
		t.act(Action{Kind: Apply})
	}
}

// unreadable reports whether a NOTIFY told something that could not be understood. The error it was answered with may
// have ended the subscription (RFC 6665 §4.2.2), which a refresh shows.
func (t *step) unreadable() bool {
	return t.e.Kind == NotifyActive && (t.e.Body == Malformed || t.e.Body == Unsupported)
}

// established is the first NOTIFY, which may come before the answer to the SUBSCRIBE.
func (t *step) established() State {
	t.answer()
	if t.s.deadline.IsZero() { // no answer so far
		t.e.HasExpires = t.e.HasExpires && t.e.Expires > 0
		t.grant()
	} else {
		t.noteExpiry()
	}
	if t.unreadable() {
		t.arm(TimerExpiry, t.s.deadline.Sub(t.now))
		return t.resync()
	}
	t.schedule()
	return Active
}

func (t *step) notified() State {
	t.answer()
	t.noteExpiry()
	switch {
	case t.s.state == Refreshing:
		t.arm(TimerExpiry, t.s.deadline.Sub(t.now))
		return Refreshing
	case t.unreadable():
		t.schedule()
		return t.resync()
	}
	t.schedule()
	return Active
}

// noteExpiry takes over the expiry of a NOTIFY: the notifier may shorten it at any time (RFC 6665 §4.1.3). Zero would
// contradict the state beside it; some notifiers write it.
func (t *step) noteExpiry() {
	if t.e.HasExpires && t.e.Expires > 0 {
		t.s.deadline = at(t.now).Add(min(seconds(t.e.Expires), t.s.asked))
	}
}

// ended is the notifier's end of the subscription (RFC 6665 §4.1.3).
func (t *step) ended() State {
	t.answer()
	switch t.e.Reason {
	case Rejected:
		return t.lose(LossRejected)
	case NoResource, Invariant:
		return t.lose(LossNoResource)
	case Probation, GiveUp:
		return t.again(t.e.RetryAfter)
	case Deactivated, Timeout:
		return t.soon() // retry-after has no meaning here
	}
	if t.e.RetryAfter > 0 {
		return t.again(t.e.RetryAfter)
	}
	return t.soon()
}

func seconds(n uint32) time.Duration { return time.Duration(n) * time.Second }
