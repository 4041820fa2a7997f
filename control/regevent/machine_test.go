package regevent

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

func golden(t *testing.T, path string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

var epoch = time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)

func half() float64 { return 0.5 }

// variants are the events that a kind can come as, as far as they make a difference.
func variants(k EventKind) []Event {
	switch k {
	case Registered:
		return []Event{{Expires: 3600}, {Expires: 600000}, {Expires: 0}, {Expires: 1<<32 - 1}}
	case Deregistered:
		return []Event{{}, {Silent: true}}
	case Accepted:
		return []Event{{}, {HasExpires: true, Expires: 4200}, {HasExpires: true}, {HasExpires: true, Expires: 1}, {HasExpires: true, Expires: 1<<32 - 1}}
	case Refused:
		return []Event{
			{Status: 302},
			{Status: 403},
			{Status: 404},
			{Status: 408},
			{Status: 423, MinExpires: 700000},
			{Status: 423},
			{Status: 480, RetryAfter: 30},
			{Status: 481},
			{Status: 489},
			{Status: 500},
			{Status: 503, RetryAfter: 1<<32 - 1},
			{Status: 603},
		}
	case NotifyActive:
		return []Event{
			{Body: Document, HasExpires: true, Expires: 4200},
			{Body: NoBody},
			{Body: Malformed},
			{Body: Unsupported},
			{Body: Document, HasExpires: true},
			{Body: Document, HasExpires: true, Expires: 7},
		}
	case NotifyPending:
		return []Event{{}, {Body: Document}, {Body: Malformed, HasExpires: true, Expires: 4200}}
	case NotifyTerminated:
		all := []Event{{RetryAfter: 5}, {Body: Malformed}}
		for r := Reason(0); r <= Invariant; r++ {
			all = append(all, Event{Reason: r, Body: Document}, Event{Reason: r, RetryAfter: 90})
		}
		return all
	default:
		return []Event{{}}
	}
}

// check applies what must hold for every transition whatsoever.
func check(t *testing.T, c *Config, s Subscription, e Event, now time.Time) (Subscription, []Action) {
	t.Helper()
	next, actions := Next(c, s, e, now, nil)
	fail := func(format string, args ...any) {
		t.Helper()
		t.Fatalf("%s, %+v, %v: %s", s.State(), e, actions, fmt.Sprintf(format, args...))
	}
	count := func(k ActionKind) (n int) {
		for _, a := range actions {
			if a.Kind == k {
				n++
			}
		}
		return n
	}
	row := cells[s.state][e.Kind]
	if row == nil {
		if next != s || count(Unexpected) != 1 {
			fail("an event that is not in the table does more than count")
		}
	} else if !slices.Contains(row.to, next.state) || count(Unexpected) > 0 {
		fail("leads to %s, the table has %v", next.state, row.to)
	}
	if notify := e.Kind.notify(); notify != (count(Answer) == 1) || notify && actions[0].Kind != Answer {
		fail("a NOTIFY is answered once and before everything else, nothing else is answered")
	}
	if count(Subscribe) > 1 || count(Apply) > 1 || count(Report) > 1 {
		fail("done twice")
	}
	if count(Apply) == 1 && (e.Body != Document || actions[1].Kind != Apply || actions[0].Status != 200) {
		fail("a document is applied right after the answer")
	}
	if e.Body == Document && e.Kind != NotifyPending && row != nil && s.state != Terminated && count(Apply) == 0 {
		fail("document is not applied")
	}
	armed := s.armed
	for timer := TimerRefresh; timer < timerEnd; timer++ {
		if timer.Event().Kind == e.Kind && row != nil {
			armed &^= 1 << timer
		}
	}
	for _, a := range actions {
		switch a.Kind {
		case Arm:
			armed |= 1 << a.Timer
			if a.After < 0 {
				fail("armed for the past")
			}
			if hurry := e.Kind == Gap || e.Body == Malformed || e.Body == Unsupported; a.Timer == TimerRefresh && a.After < c.MinRefresh && !hurry {
				fail("refresh too early")
			}
		case Stop:
			if armed&(1<<a.Timer) == 0 {
				fail("stops what does not run")
			}
			armed &^= 1 << a.Timer
		case Subscribe:
			// TS 24.229 §5.2.3: longer than the registration.
			if wantEnd := next.state == Terminated; wantEnd != (a.Expires == 0) {
				fail("Expires %d", a.Expires)
			}
			if a.Expires > 0 && a.Expires < 1<<32-1 && seconds(a.Expires) <= next.life {
				fail("Expires %d, registration %s", a.Expires, next.life)
			}
			if a.InDialog != (s.state == Active || s.state == Refreshing || next.state == Refreshing) {
				fail("in dialog: %v", a.InDialog)
			}
			if next.emergency {
				fail("an emergency registration is subscribed for")
			}
		case Report:
			if next.state != Terminated {
				fail("loss is reported, but it goes on")
			}
		default:
		}
	}
	if armed != next.armed {
		fail("timers %b, actions make it %b", next.armed, armed)
	}
	if next.armed&^running[next.state] != 0 {
		fail("timers %b run in %s", next.armed, next.state)
	}
	// Without a timer nothing would ever happen again.
	if live := next.state >= Subscribing && next.state <= Waiting; live && next.armed == 0 {
		fail("no timer runs in %s", next.state)
	}
	if again, more := Next(c, s, e, now, nil); again != next || !slices.Equal(more, actions) {
		fail("is not pure")
	}
	return next, actions
}

// TestEveryCell walks from every state that many random walks have reached through every event in every variant, and
// sees that nothing in the table is there for nothing.
func TestEveryCell(t *testing.T) {
	c := DefaultConfig(half)
	c.MaxFailures = 3
	type hop struct {
		from State
		on   EventKind
		to   State
	}
	seen := map[hop]bool{}
	// One sample of everything that makes a difference to a transition.
	type trait struct {
		state     State
		failures  int
		loss      Loss
		emergency bool
		timed     bool
		answered  bool
		gap       bool
	}
	type sample struct {
		s   Subscription
		now time.Time
	}
	samples := map[trait]sample{}
	rng := rand.New(rand.NewPCG(1, 2))
	for walk := range 4000 {
		s, now := New(walk%50 == 0), epoch
		for range 30 {
			samples[trait{
				s.state, s.Failures(), s.loss, s.emergency, s.timed, !s.deadline.IsZero(),
				!s.gap.IsZero() && now.Sub(s.gap.time()) < c.GapInterval/2 && s.refresh.Sub(now) > c.GapInterval,
			}] = sample{s, now}
			var possible []EventKind
			for k := EventKind(1); k < eventEnd; k++ {
				if cells[s.state][k] != nil && (k != Deregistered || rng.IntN(10) == 0) {
					possible = append(possible, k)
				}
			}
			if len(possible) == 0 {
				break
			}
			k := possible[rng.IntN(len(possible))]
			e := variants(k)[rng.IntN(len(variants(k)))]
			e.Kind = k
			now = now.Add(time.Duration(rng.IntN(20)) * time.Second)
			s, _ = check(t, &c, s, e, now)
		}
	}
	var reached [stateEnd]bool
	for _, x := range samples {
		reached[x.s.state] = true
		for k := EventKind(1); k < eventEnd; k++ {
			for _, e := range variants(k) {
				e.Kind = k
				next, _ := check(t, &c, x.s, e, x.now)
				seen[hop{x.s.state, k, next.state}] = true
			}
		}
	}
	for st := None; st < stateEnd; st++ {
		if !reached[st] {
			t.Errorf("%s was not reached", st)
		}
	}
	for _, r := range table {
		for _, to := range r.to {
			if !seen[hop{r.from, r.on, to}] {
				t.Errorf("the table has %s, %s → %s, which does not happen", r.from, r.on, to)
			}
		}
	}
	for h := range seen {
		if r := cells[h.from][h.on]; r == nil && h.to != h.from {
			t.Errorf("%+v is not in the table", h)
		}
	}
	// Values from nowhere do no harm.
	for _, s := range []Subscription{{}, {state: stateEnd}} {
		if next, actions := Next(&c, s, Event{Kind: NotifyActive}, epoch, nil); next != s || len(actions) != 2 {
			t.Errorf("%v", actions)
		}
	}
	if _, actions := Next(&c, New(false), Event{Kind: eventEnd}, epoch, nil); len(actions) != 1 {
		t.Errorf("%v", actions)
	}
}

func TestTableIsSound(t *testing.T) {
	rows := 0
	for s := range cells {
		for e := range cells[s] {
			if cells[s][e] != nil {
				rows++
			}
		}
	}
	if rows != len(table) {
		t.Errorf("%d rows make %d cells: a cell is there twice", len(table), rows)
	}
	for s, list := range timers {
		for _, timer := range list {
			if cells[s][timer.Event().Kind] == nil {
				t.Errorf("timer %s runs in %s and nothing waits for it", timer, State(s))
			}
		}
	}
	for k := EventKind(1); k < eventEnd; k++ {
		for timer := TimerRefresh; timer < timerEnd; timer++ {
			for s := range cells {
				if timer.Event().Kind == k && cells[s][k] != nil && !slices.Contains(timers[s], timer) {
					t.Errorf("%s waits for timer %s, which does not run there", State(s), timer)
				}
			}
		}
	}
}

// render draws the table.
func render() string {
	var b strings.Builder
	b.WriteString("# States of a subscription to the registration state\n\nGenerated from the table in `table.go`: " +
		"`go test ./control/regevent -update`.\n\n```mermaid\nstateDiagram-v2\n    [*] --> none\n")
	type arrow struct{ from, to State }
	labels := map[arrow][]string{}
	var order []arrow
	for _, r := range table {
		for _, to := range r.to {
			if to == r.from {
				continue
			}
			a := arrow{r.from, to}
			if labels[a] == nil {
				order = append(order, a)
			}
			labels[a] = append(labels[a], r.on.String())
		}
	}
	for _, a := range order {
		fmt.Fprintf(&b, "    %s --> %s: %s\n", a.from, a.to, strings.Join(labels[a], ", "))
	}
	b.WriteString("    terminated --> [*]\n```\n\n## Timers\n\n| state | timers that run |\n|---|---|\n")
	for s := None; s < stateEnd; s++ {
		var names []string
		for _, timer := range timers[s] {
			names = append(names, timer.String())
		}
		fmt.Fprintf(&b, "| %s | %s |\n", s, strings.Join(names, ", "))
	}
	b.WriteString("\n## Cells\n\nA dot is an event that changes nothing but a counter; a NOTIFY is answered with 481.\n\n| event |")
	for s := None; s < stateEnd; s++ {
		fmt.Fprintf(&b, " %s |", s)
	}
	b.WriteString("\n|---|" + strings.Repeat("---|", int(stateEnd-None)) + "\n")
	for k := EventKind(1); k < eventEnd; k++ {
		fmt.Fprintf(&b, "| %s |", k)
		for s := None; s < stateEnd; s++ {
			if r := cells[s][k]; r == nil {
				b.WriteString(" · |")
			} else {
				fmt.Fprintf(&b, " %s |", join(r.to))
			}
		}
		b.WriteString("\n")
	}
	b.WriteString("\n## Transitions\n\n| state | event | next | what is done |\n|---|---|---|---|\n")
	for _, r := range table {
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", r.from, r.on, join(r.to), r.note)
	}
	return b.String()
}

func join(states []State) string {
	names := make([]string, len(states))
	for i, s := range states {
		names[i] = s.String()
	}
	return strings.Join(names, ", ")
}

func TestDiagram(t *testing.T) { golden(t, "../../docs/subscription.md", []byte(render())) }

// told writes actions in a short form.
func told(actions []Action) string {
	out := make([]string, 0, len(actions))
	for _, a := range actions {
		switch a.Kind {
		case Subscribe:
			s := fmt.Sprint("subscribe ", a.Expires)
			if a.InDialog {
				s = fmt.Sprint("refresh ", a.Expires)
			}
			out = append(out, s)
		case Answer:
			out = append(out, fmt.Sprint("answer ", a.Status))
		case Arm:
			out = append(out, fmt.Sprint(a.Timer, " in ", a.After))
		case Stop:
			out = append(out, fmt.Sprint("stop ", a.Timer))
		case Report:
			out = append(out, fmt.Sprint("lost ", a.Loss))
		default:
			out = append(out, a.Kind.String())
		}
	}
	return strings.Join(out, ", ")
}

func TestNext(t *testing.T) {
	type step struct {
		after time.Duration
		e     Event
		want  string
		state State
	}
	registered := step{0, Event{Kind: Registered, Expires: 3600}, "subscribe 4200, notify in 32s", Subscribing}
	accepted := step{0, Event{Kind: Accepted, HasExpires: true, Expires: 4200}, "", Subscribing}
	first := step{0, Event{Kind: NotifyActive, HasExpires: true, Expires: 4200, Body: Document}, "answer 200, apply, refresh in 1h0m0s, expiry in 1h10m0s, stop notify", Active}
	ended := func(r Reason, after uint32) Event {
		return Event{Kind: NotifyTerminated, Reason: r, RetryAfter: after, Body: Document}
	}
	for _, tt := range []struct {
		name  string
		steps []step
	}{
		{"subscribed, refreshed, de-registered", []step{
			registered, accepted, first,
			{time.Minute, Event{Kind: NotifyActive, Body: Document, HasExpires: true, Expires: 4140}, "answer 200, apply, refresh in 59m0s, expiry in 1h9m0s", Active},
			{0, Event{Kind: Registered, Expires: 7200}, "", Active},
			{59 * time.Minute, Event{Kind: RefreshDue}, "refresh 7800", Refreshing},
			{0, Event{Kind: NotifyActive, Body: Document}, "answer 200, apply, expiry in 10m0s", Refreshing},
			{0, Event{Kind: Accepted, HasExpires: true, Expires: 7800}, "refresh in 2h0m0s, expiry in 2h10m0s", Active},
			{0, Event{Kind: Deregistered}, "stop refresh, stop expiry", Terminated},
			{0, ended(Timeout, 0), "answer 200", Terminated},
			{0, Event{Kind: NotifyActive, Body: Document}, "answer 481", Terminated},
			{0, Event{Kind: Registered, Expires: 3600}, "", Terminated},
		}},
		{"the NOTIFY overtakes the answer", []step{
			registered, first,
			{0, Event{Kind: Accepted, HasExpires: true, Expires: 1200}, "refresh in 10m0s, expiry in 20m0s", Active},
			{0, Event{Kind: TimedOut}, "", Active},
		}},
		{"an expiry of zero beside active", []step{
			registered,
			{0, Event{Kind: NotifyActive, HasExpires: true}, "answer 200, refresh in 1h0m0s, expiry in 1h10m0s, stop notify", Active},
		}},
		{"half of a short expiry", []step{
			registered,
			{0, Event{Kind: Accepted, HasExpires: true, Expires: 1000}, "", Subscribing},
			{time.Second, Event{Kind: NotifyActive}, "answer 200, refresh in 8m19s, expiry in 16m39s, stop notify", Active},
		}},
		{"the notifier shortens", []step{
			registered, accepted, first,
			{time.Minute, Event{Kind: NotifyActive, HasExpires: true, Expires: 60}, "answer 200, refresh in 30s, expiry in 1m0s", Active},
			{0, Event{Kind: NotifyActive, HasExpires: true, Expires: 2}, "answer 200, refresh in 5s, expiry in 2s", Active},
			{2 * time.Second, Event{Kind: ExpiryDue}, "retry in 5s, stop refresh", Waiting},
		}},
		{"pending tells nothing", []step{
			registered,
			{0, Event{Kind: NotifyPending, HasExpires: true, Expires: 600, Body: Document}, "answer 200, refresh in 5m0s, expiry in 10m0s, stop notify", Active},
		}},
		{"no NOTIFY comes", []step{
			registered, accepted,
			{32 * time.Second, Event{Kind: NotifyOverdue}, "retry in 5s", Waiting},
			{0, Event{Kind: NotifyActive}, "answer 481, unexpected", Waiting},
			{5 * time.Second, Event{Kind: RetryDue}, "subscribe 4200, notify in 32s", Subscribing},
		}},
		{"backoff doubles and is given up", []step{
			registered,
			{0, Event{Kind: TimedOut}, "retry in 5s, stop notify", Waiting},
			{0, Event{Kind: RetryDue}, "subscribe 4200, notify in 32s", Subscribing},
			{0, Event{Kind: Refused, Status: 500}, "retry in 10s, stop notify", Waiting},
			{0, Event{Kind: RetryDue}, "subscribe 4200, notify in 32s", Subscribing},
			{0, Event{Kind: Refused, Status: 503, RetryAfter: 100}, "retry in 1m50s, stop notify", Waiting},
			{0, Event{Kind: RetryDue}, "subscribe 4200, notify in 32s", Subscribing},
			{0, Event{Kind: Accepted, HasExpires: true}, "lost given_up, stop notify", Terminated},
			// A re-registration shows that the core is there.
			{time.Hour, Event{Kind: Registered, Expires: 60}, "subscribe 660, notify in 32s", Subscribing},
			{0, Event{Kind: TimedOut}, "retry in 5s, stop notify", Waiting},
		}},
		{"given up, then de-registered", []step{
			registered,
			{0, Event{Kind: TimedOut}, "retry in 5s, stop notify", Waiting},
			{0, Event{Kind: RetryDue}, "subscribe 4200, notify in 32s", Subscribing},
			{0, Event{Kind: TimedOut}, "retry in 10s, stop notify", Waiting},
			{0, Event{Kind: RetryDue}, "subscribe 4200, notify in 32s", Subscribing},
			{0, Event{Kind: TimedOut}, "retry in 20s, stop notify", Waiting},
			{0, Event{Kind: RetryDue}, "subscribe 4200, notify in 32s", Subscribing},
			{0, Event{Kind: TimedOut}, "lost given_up, stop notify", Terminated},
			{0, Event{Kind: Deregistered}, "", Terminated},
			{0, Event{Kind: Registered, Expires: 60}, "", Terminated},
		}},
		{"refused for good", []step{
			registered,
			{0, Event{Kind: Refused, Status: 489}, "lost refused, stop notify", Terminated},
			{0, Event{Kind: Registered, Expires: 3600}, "", Terminated},
		}},
		{"interval too brief", []step{
			registered,
			{0, Event{Kind: Refused, Status: 423, MinExpires: 7200}, "subscribe 7200, notify in 32s", Subscribing},
			{0, Event{Kind: Refused, Status: 423, MinExpires: 7200}, "retry in 10s, stop notify", Waiting},
			{0, Event{Kind: Registered, Expires: 7200}, "", Waiting},
			{0, Event{Kind: RetryDue}, "subscribe 7800, notify in 32s", Subscribing},
			{0, Event{Kind: NotifyActive}, "answer 200, refresh in 2h0m0s, expiry in 2h10m0s, stop notify", Active},
			{0, Event{Kind: RefreshDue}, "refresh 7800", Refreshing},
			{0, Event{Kind: Refused, Status: 423, MinExpires: 9000}, "refresh 9000", Refreshing},
		}},
		{"the subscription is gone", []step{
			registered, first,
			{time.Hour, Event{Kind: RefreshDue}, "refresh 4200", Refreshing},
			{0, Event{Kind: Refused, Status: 481}, "retry in 1s, stop expiry", Waiting},
			{time.Second, Event{Kind: RetryDue}, "subscribe 4200, notify in 32s", Subscribing},
			// The next time it does not go so fast.
			first,
			{0, Event{Kind: RefreshDue}, "refresh 4200", Refreshing},
			{0, Event{Kind: Refused, Status: 481}, "retry in 10s, stop expiry", Waiting},
		}},
		{"refreshes fail until the end", []step{
			registered, first,
			{time.Hour, Event{Kind: RefreshDue}, "refresh 4200", Refreshing},
			{32 * time.Second, Event{Kind: TimedOut}, "refresh in 5s", Active},
			{5 * time.Second, Event{Kind: RefreshDue}, "refresh 4200", Refreshing},
			{0, Event{Kind: Refused, Status: 503, RetryAfter: 600}, "refresh in 10m5s", Active},
			{563 * time.Second, Event{Kind: ExpiryDue}, "retry in 20s, stop refresh", Waiting},
		}},
		{"a refresh that is late but works", []step{
			registered, first,
			{time.Hour, Event{Kind: RefreshDue}, "refresh 4200", Refreshing},
			{0, Event{Kind: TimedOut}, "refresh in 5s", Active},
			{5 * time.Second, Event{Kind: RefreshDue}, "refresh 4200", Refreshing},
			{0, Event{Kind: Accepted}, "refresh in 1h0m0s, expiry in 1h10m0s", Active},
			{0, ended(Deactivated, 0), "answer 200, apply, retry in 1s, stop refresh, stop expiry", Waiting},
		}},
		{"the end comes while refreshing", []step{
			registered, first,
			{time.Hour, Event{Kind: RefreshDue}, "refresh 4200", Refreshing},
			{10 * time.Minute, Event{Kind: ExpiryDue}, "retry in 5s", Waiting},
			{0, Event{Kind: Accepted}, "", Waiting},
			{0, Event{Kind: Deregistered}, "stop retry", Terminated},
		}},
		{"a user that is not there any more", []step{
			registered, first,
			{time.Hour, Event{Kind: RefreshDue}, "refresh 4200", Refreshing},
			{0, Event{Kind: Refused, Status: 404}, "retry in 5s, stop expiry", Waiting},
		}},
		{"terminated: deactivated", []step{
			registered, first,
			{0, ended(Deactivated, 1000), "answer 200, apply, retry in 1s, stop refresh, stop expiry", Waiting},
			{0, Event{Kind: RetryDue}, "subscribe 4200, notify in 32s", Subscribing},
			{0, ended(Deactivated, 0), "answer 200, apply, retry in 10s, stop notify", Waiting},
		}},
		{"terminated: probation", []step{registered, first, {0, ended(Probation, 120), "answer 200, apply, retry in 2m2.5s, stop refresh, stop expiry", Waiting}}},
		{"terminated: giveup", []step{registered, first, {0, ended(GiveUp, 0), "answer 200, apply, retry in 5s, stop refresh, stop expiry", Waiting}}},
		{"terminated: rejected", []step{registered, first, {0, ended(Rejected, 0), "answer 200, apply, lost rejected, stop refresh, stop expiry", Terminated}}},
		{"terminated: noresource", []step{registered, first, {0, ended(NoResource, 0), "answer 200, apply, lost no_resource, stop refresh, stop expiry", Terminated}}},
		{"terminated: invariant", []step{registered, first, {0, ended(Invariant, 0), "answer 200, apply, lost no_resource, stop refresh, stop expiry", Terminated}}},
		{"terminated: anything else", []step{registered, first, {0, ended(0, 60), "answer 200, apply, retry in 1m2.5s, stop refresh, stop expiry", Waiting}}},
		{"missing documents", []step{
			registered, first,
			{0, Event{Kind: Gap}, "refresh 4200, stop refresh", Refreshing},
			{0, Event{Kind: Gap}, "", Refreshing},
			{0, Event{Kind: Accepted}, "refresh in 1h0m0s, expiry in 1h10m0s", Active},
			{2 * time.Second, Event{Kind: Gap}, "refresh in 30s", Active}, // not that often
			{time.Second, Event{Kind: Gap}, "", Active},
			{29 * time.Second, Event{Kind: RefreshDue}, "refresh 4200", Refreshing},
			{0, Event{Kind: Accepted}, "refresh in 1h0m0s, expiry in 1h10m0s", Active},
			{time.Second, Event{Kind: Gap}, "refresh in 31s", Active},
			{32 * time.Second, Event{Kind: Gap}, "refresh 4200, stop refresh", Refreshing},
		}},
		{"a document that cannot be read", []step{
			registered,
			{0, Event{Kind: NotifyActive, Body: Malformed}, "answer 400, expiry in 1h10m0s, refresh 4200, stop notify", Refreshing},
			{0, Event{Kind: Accepted}, "refresh in 1h0m0s, expiry in 1h10m0s", Active},
			{40 * time.Second, Event{Kind: NotifyActive, Body: Unsupported}, "answer 415, refresh in 59m20s, expiry in 1h9m20s, refresh 4200, stop refresh", Refreshing},
		}},
		{"the registration ends here only", []step{
			registered, first,
			{0, Event{Kind: Deregistered, Silent: true}, "refresh 0, stop refresh, stop expiry", Terminated},
			{0, Event{Kind: Accepted, HasExpires: true}, "", Terminated},
			{0, ended(Timeout, 0), "answer 200", Terminated},
		}},
		{"nothing is there yet", []step{
			{0, Event{Kind: NotifyActive, Body: Document}, "answer 481, unexpected", None},
			{0, Event{Kind: Gap}, "unexpected", None},
			{0, Event{Kind: Deregistered, Silent: true}, "", Terminated},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := DefaultConfig(half)
			c.MaxFailures = 3
			s, now := New(false), epoch
			for i, st := range tt.steps {
				now = now.Add(st.after)
				var actions []Action
				s, actions = check(t, &c, s, st.e, now)
				if got := told(actions); got != st.want || s.State() != st.state {
					t.Fatalf("step %d, %s: %s, %q, want %s, %q", i, st.e.Kind, s.State(), got, st.state, st.want)
				}
			}
		})
	}
}

// TestEmergency: there is no subscription for an emergency registration, whatever happens.
func TestEmergency(t *testing.T) {
	c := DefaultConfig(half)
	for k := EventKind(1); k < eventEnd; k++ {
		for _, e := range variants(k) {
			e.Kind = k
			s, _ := check(t, &c, New(true), Event{Kind: Registered, Expires: 3600}, epoch)
			if s.State() != Terminated {
				t.Fatal(s.State())
			}
			s, actions := check(t, &c, s, e, epoch)
			for _, a := range actions {
				if a.Kind == Subscribe || a.Kind == Arm || s.State() != Terminated {
					t.Errorf("%s: %v", k, actions)
				}
			}
		}
	}
}

// TestJitter: delays spread around the backoff and never fall below Retry-After.
func TestJitter(t *testing.T) {
	for _, tt := range []struct {
		roll       float64
		retryAfter uint32
		want       time.Duration
	}{
		{0, 0, 3750 * time.Millisecond},
		{0.999999999, 0, 6250 * time.Millisecond},
		{0, 100, 100 * time.Second},
		{0.999999999, 100, 105 * time.Second},
		{0.999999999, 2, 4 * time.Second},
	} {
		c := DefaultConfig(func() float64 { return tt.roll })
		s, _ := Next(&c, New(false), Event{Kind: Registered, Expires: 60}, epoch, nil)
		_, actions := Next(&c, s, Event{Kind: Refused, Status: 503, RetryAfter: tt.retryAfter}, epoch, nil)
		if got := actions[0].After.Round(time.Millisecond); got != tt.want {
			t.Errorf("%+v: %s", tt, got)
		}
	}
	// However many failures: no overflow, no more than the maximum.
	c := DefaultConfig(half)
	for _, n := range []uint16{7, 20, 63, 1<<16 - 1} {
		st := step{c: &c, s: Subscription{failures: n}}
		if d := st.backoff(0); d != c.BackoffMax {
			t.Errorf("%d failures: %s", n, d)
		}
	}
}

func TestLasting(t *testing.T) {
	for status := 300; status < 700; status++ {
		want := status >= 600 || status >= 400 && status < 500
		switch status {
		case 404, 408, 410, 423, 430, 480, 481, 482, 483, 484, 485, 486, 487, 491:
			want = false
		}
		if status >= 500 && status < 600 {
			want = !slices.Contains([]int{500, 502, 503, 504, 580}, status)
		}
		if lasting(status) != want {
			t.Errorf("%d: %v", status, !want)
		}
	}
}

func TestStrings(t *testing.T) {
	for _, tt := range []struct{ got, want string }{
		{Refreshing.String(), "refreshing"},
		{State(0).String(), "State(0)"},
		{NotifyOverdue.String(), "notify_overdue"},
		{EventKind(99).String(), "EventKind(99)"},
		{GiveUp.String(), "giveup"},
		{Reason(0).String(), "Reason(0)"},
		{TimerNotify.String(), "notify"},
		{Timer(9).String(), "Timer(9)"},
		{Unexpected.String(), "unexpected"},
		{ActionKind(0).String(), "ActionKind(0)"},
		{LossGivenUp.String(), "given_up"},
		{Loss(0).String(), "Loss(0)"},
	} {
		if tt.got != tt.want {
			t.Errorf("%q, want %q", tt.got, tt.want)
		}
	}
}

// TestLeastExpiry: short registrations are subscribed for as long as configured, long ones for longer than they last.
func TestLeastExpiry(t *testing.T) {
	c := DefaultConfig(half)
	c.Expires = 600000 * time.Second
	for life, want := range map[uint32]uint32{3600: 600000, 600000: 600600} {
		_, actions := Next(&c, New(false), Event{Kind: Registered, Expires: life}, epoch, nil)
		if got := actions[0].Expires; got != want {
			t.Errorf("a registration of %d s is subscribed for %d s, want %d s", life, got, want)
		}
	}
}
