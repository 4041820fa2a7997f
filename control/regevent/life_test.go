package regevent

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/gmgate/gmgate/control/wheel"
)

// core is a worker with one subscription: it carries out the actions with real timers, and answers every SUBSCRIBE.
type core struct {
	t      *testing.T
	c      Config
	s      Subscription
	wheel  *wheel.Wheel
	timers [timerEnd]wheel.Timer
	answer func(n int, a Action) []Event // to the nth SUBSCRIBE
	sent   []time.Duration               // when, since the start
	asked  []Action
	losses []Loss
	start  time.Time
}

func newCore(t *testing.T, answer func(int, Action) []Event) *core {
	t.Helper()
	now := time.Now()
	return &core{t: t, c: DefaultConfig(half), s: New(false), wheel: wheel.New(100*time.Millisecond, now), answer: answer, start: now}
}

func (w *core) event(e Event) {
	w.t.Helper()
	var actions []Action
	w.s, actions = check(w.t, &w.c, w.s, e, time.Now())
	var answers []Event
	for _, a := range actions {
		switch a.Kind {
		case Subscribe:
			w.sent, w.asked = append(w.sent, time.Since(w.start)), append(w.asked, a)
			answers = w.answer(len(w.sent), a)
		case Arm:
			w.wheel.Schedule(&w.timers[a.Timer], a.After, func() { w.event(a.Timer.Event()) })
		case Stop:
			w.wheel.Stop(&w.timers[a.Timer])
		case Report:
			w.losses = append(w.losses, a.Loss)
		default:
		}
	}
	for _, e := range answers {
		w.event(e)
	}
}

// pass lets time pass.
func (w *core) pass(d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end); {
		time.Sleep(500 * time.Millisecond)
		w.wheel.Advance(time.Now())
	}
}

func accept(expires uint32) []Event {
	return []Event{
		{Kind: Accepted, HasExpires: true, Expires: expires},
		{Kind: NotifyActive, HasExpires: true, Expires: expires, Body: Document},
	}
}

func wantTimes(t *testing.T, got []time.Duration, want ...time.Duration) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("SUBSCRIBE at %v, want %v", got, want)
	}
	for i := range want {
		if d := got[i] - want[i]; d < -time.Second || d > time.Second {
			t.Errorf("SUBSCRIBE at %v, want %v", got, want)
		}
	}
}

// TestLife: a subscription outlives its registration by refreshes, half way or 600 s before the end, and ends with it.
//
// Peers: B3.15
func TestLife(t *testing.T) {
	for _, tt := range []struct {
		name    string
		expires uint32 // granted
		want    []time.Duration
	}{
		{"short", 1000, []time.Duration{0, 500 * time.Second, 1000 * time.Second, 1500 * time.Second}},
		{"long", 1900, []time.Duration{0, 1300 * time.Second}},
		{"border", 1200, []time.Duration{0, 600 * time.Second, 1200 * time.Second}},
		{"as asked", 4200, []time.Duration{0}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newCore(t, func(int, Action) []Event { return accept(tt.expires) })
				w.event(Event{Kind: Registered, Expires: 3600})
				w.pass(1790 * time.Second)
				wantTimes(t, w.sent, tt.want...)
				for i, a := range w.asked {
					if a.InDialog != (i > 0) || a.Expires != 4200 {
						t.Errorf("%+v", a)
					}
				}
				w.event(Event{Kind: Deregistered})
				if w.wheel.Len() != 0 {
					t.Error("timers are left")
				}
				w.pass(2 * time.Hour)
				wantTimes(t, w.sent, tt.want...)
			})
		})
	}
}

// TestOutage: a core that is silent while a refresh is due. Attempts become rarer, the subscription lapses, is made anew,
// and is finally given up; the next registration brings it back.
func TestOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		down := false
		w := newCore(t, nil)
		w.answer = func(int, Action) []Event {
			if down {
				return []Event{{Kind: TimedOut}}
			}
			return accept(1900)
		}
		w.event(Event{Kind: Registered, Expires: 3600})
		down = true
		w.pass(3 * time.Hour)
		if w.s.State() != Terminated || len(w.losses) != 1 || w.losses[0] != LossGivenUp {
			t.Fatalf("%s, %v", w.s.State(), w.losses)
		}
		// The first was accepted, and that the subscription lapsed counts as a failure.
		if n := len(w.sent); n != w.c.MaxFailures+1 {
			t.Errorf("%d attempts: %v", n, w.sent)
		}
		for i := 3; i < len(w.sent); i++ {
			if gap, before := w.sent[i]-w.sent[i-1], w.sent[i-1]-w.sent[i-2]; gap < before-time.Second && gap < w.c.BackoffMax-time.Second {
				t.Errorf("attempts at %v", w.sent)
			}
		}
		down = false
		w.event(Event{Kind: Registered, Expires: 3600})
		if w.s.State() != Active || w.s.Failures() != 0 {
			t.Error(w.s.State())
		}
	})
}

// TestHostileNotifier: whatever a notifier does, SUBSCRIBE requests do not come in a storm.
func TestHostileNotifier(t *testing.T) {
	for _, tt := range []struct {
		name   string
		events []Event
		most   int // SUBSCRIBE requests in an hour
	}{
		{"ends what it accepts", append(accept(3600), Event{Kind: NotifyTerminated, Reason: Deactivated}), 11},
		{"knows no subscription", []Event{{Kind: Refused, Status: 481}}, 11},
		{"wants ever more", []Event{{Kind: Refused, Status: 423, MinExpires: 1<<32 - 1}}, 11},
		{"grants nothing", []Event{{Kind: Accepted, HasExpires: true}}, 11},
		{"grants a second", accept(1), 11},
		{"never notifies", []Event{{Kind: Accepted, HasExpires: true, Expires: 3600}}, 11},
		{"loses every document", append(accept(3600), Event{Kind: Gap}), 3600/32 + 2},
		{"writes rubbish", []Event{{Kind: Accepted}, {Kind: NotifyActive, Body: Malformed}}, 3600/32 + 2},
		{"grants little each time", accept(10), 3600/5 + 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newCore(t, nil)
				depth := 0
				w.answer = func(int, Action) []Event {
					if depth++; depth > 20000 {
						t.Fatal("storm")
					}
					return tt.events
				}
				w.event(Event{Kind: Registered, Expires: 3600})
				w.pass(time.Hour)
				if len(w.sent) > tt.most || len(w.sent) < 2 {
					t.Errorf("%d SUBSCRIBE requests in an hour: %v", len(w.sent), w.sent)
				}
			})
		})
	}
}
