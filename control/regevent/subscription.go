package regevent

import (
	"fmt"
	"time"
)

// State is the state of a subscription.
type State uint8

// States.
const (
	None        State = iota + 1 // the UE has not registered yet
	Subscribing                  // SUBSCRIBE sent, waiting for the first NOTIFY: notify_wait of RFC 6665 §4.1.2
	Active                       // the notifier knows us
	Refreshing                   // the same, with a SUBSCRIBE in the dialog under way
	Waiting                      // there is no subscription; the next attempt is due later
	Terminated                   // for good: de-registered, refused, given up, or never wanted
	stateEnd
)

var stateNames = [...]string{
	None: "none", Subscribing: "subscribing", Active: "active", Refreshing: "refreshing", Waiting: "waiting",
	Terminated: "terminated",
}

// String names the state as metrics and logs do.
func (s State) String() string { return name(stateNames[:], uint8(s), "State") }

// EventKind says what has happened.
type EventKind uint8

// Events.
const (
	Registered       EventKind = iota + 1 // a REGISTER of the UE was answered with 200: Expires
	Deregistered                          // the registration is over: Silent if the core has not heard of it
	Accepted                              // SUBSCRIBE was answered with 2xx: Expires
	Refused                               // SUBSCRIBE was answered with 3xx to 6xx: Status, RetryAfter, MinExpires
	TimedOut                              // SUBSCRIBE was not answered, or could not be sent
	NotifyActive                          // NOTIFY, Subscription-State active: Expires, Body
	NotifyPending                         // NOTIFY, Subscription-State pending: Expires
	NotifyTerminated                      // NOTIFY, Subscription-State terminated: Reason, RetryAfter, Body
	Gap                                   // a document was applied and others are missing before it
	RefreshDue                            // TimerRefresh fired
	ExpiryDue                             // TimerExpiry fired
	RetryDue                              // TimerRetry fired
	NotifyOverdue                         // TimerNotify fired
	eventEnd
)

var eventNames = [...]string{
	Registered: "registered", Deregistered: "deregistered", Accepted: "accepted", Refused: "refused",
	TimedOut: "timed_out", NotifyActive: "notify_active", NotifyPending: "notify_pending",
	NotifyTerminated: "notify_terminated", Gap: "gap", RefreshDue: "refresh_due", ExpiryDue: "expiry_due",
	RetryDue: "retry_due", NotifyOverdue: "notify_overdue",
}

// String names the event as metrics and logs do.
func (k EventKind) String() string { return name(eventNames[:], uint8(k), "EventKind") }

func (k EventKind) notify() bool {
	return k == NotifyActive || k == NotifyPending || k == NotifyTerminated
}

// Reason is why the notifier has ended the subscription (RFC 6665 §4.1.3). Zero is none, or one that is not known.
type Reason uint8

// Reasons.
const (
	Deactivated Reason = iota + 1
	Probation
	Rejected
	Timeout
	GiveUp
	NoResource
	Invariant
)

var reasonNames = [...]string{
	Deactivated: "deactivated", Probation: "probation", Rejected: "rejected", Timeout: "timeout", GiveUp: "giveup",
	NoResource: "noresource", Invariant: "invariant",
}

// String returns the wire token.
func (r Reason) String() string { return name(reasonNames[:], uint8(r), "Reason") }

// Body is what a NOTIFY carries.
type Body uint8

// Bodies. What is not a document is answered with an error, and the state is asked for again.
const (
	NoBody      Body = iota
	Document         // reginfo.Parse has read it
	Malformed        // it has not
	Unsupported      // another media type
)

// Event is what has happened, with what the kind says comes with it.
type Event struct {
	Kind       EventKind
	Expires    uint32 // seconds
	HasExpires bool   // Accepted and NOTIFY: Expires was there
	Silent     bool
	Body       Body
	Reason     Reason
	Status     int
	RetryAfter uint32 // seconds; 0: none
	MinExpires uint32 // seconds, with status 423; 0: none
}

// Timer is one of the timers of a subscription. Each has its own Event.
type Timer uint8

// Timers.
const (
	TimerRefresh Timer = iota + 1 // RefreshDue
	TimerExpiry                   // ExpiryDue
	TimerRetry                    // RetryDue
	TimerNotify                   // NotifyOverdue: Timer N of RFC 6665 §4.1.2
	timerEnd
)

var timerNames = [...]string{TimerRefresh: "refresh", TimerExpiry: "expiry", TimerRetry: "retry", TimerNotify: "notify"}

// String names the timer.
func (t Timer) String() string { return name(timerNames[:], uint8(t), "Timer") }

// Event returns what has happened when the timer fires.
func (t Timer) Event() Event {
	return Event{Kind: [timerEnd]EventKind{
		TimerRefresh: RefreshDue, TimerExpiry: ExpiryDue, TimerRetry: RetryDue, TimerNotify: NotifyOverdue,
	}[t]}
}

// ActionKind says what the caller must do.
type ActionKind uint8

// Actions.
const (
	Subscribe  ActionKind = iota + 1 // send SUBSCRIBE with Expires: InDialog, or the first one of a new dialog
	Answer                           // answer the NOTIFY with Status
	Arm                              // arm Timer, in place of what it was armed for, to fire After
	Stop                             // stop Timer
	Apply                            // apply the document of the NOTIFY
	Report                           // the core will not tell us of de-registrations any more: Loss
	Unexpected                       // count that the event is not in the table for the state
)

var actionNames = [...]string{
	Subscribe: "subscribe", Answer: "answer", Arm: "arm", Stop: "stop", Apply: "apply", Report: "report",
	Unexpected: "unexpected",
}

// String names the action.
func (k ActionKind) String() string { return name(actionNames[:], uint8(k), "ActionKind") }

// Loss is why there will be no subscription for a registration that goes on.
type Loss uint8

// Losses.
const (
	LossRefused    Loss = iota + 1 // by a status that will not change
	LossRejected                   // reason=rejected
	LossNoResource                 // reason=noresource or invariant: the core knows no such user
	LossGivenUp                    // too many failures in a row
)

var lossNames = [...]string{
	LossRefused: "refused", LossRejected: "rejected", LossNoResource: "no_resource", LossGivenUp: "given_up",
}

// String names the loss as metrics and logs do.
func (l Loss) String() string { return name(lossNames[:], uint8(l), "Loss") }

// Action is what the caller must do, with what the kind says comes with it.
type Action struct {
	Kind     ActionKind
	Timer    Timer
	Loss     Loss
	InDialog bool
	Expires  uint32 // seconds
	Status   int
	After    time.Duration
}

func name(names []string, v uint8, kind string) string {
	if v == 0 || int(v) >= len(names) {
		return fmt.Sprintf("%s(%d)", kind, v)
	}
	return names[v]
}

// Config rules all subscriptions. Use DefaultConfig.
type Config struct {
	// Margin is how much longer than the registration a subscription is asked for (TS 24.229 §5.2.3).
	Margin time.Duration
	// Expires is the least expiry that is asked for, so that a subscription outlives many short registrations.
	Expires time.Duration
	// NotifyWait is how long the first NOTIFY may take: 64*T1 (RFC 6665 §4.1.2, Timer N).
	NotifyWait time.Duration
	// Backoff is the delay after the first failure. It doubles with every further one, up to BackoffMax.
	Backoff, BackoffMax time.Duration
	// MaxFailures is how many attempts in a row may fail.
	MaxFailures int
	// Spread is the span over which attempts are spread that could be made at once: an S-CSCF which goes out of service
	// ends all its subscriptions in one moment.
	Spread time.Duration
	// MinRefresh is the least time between an answer and the refresh.
	MinRefresh time.Duration
	// GapInterval is the least time between two refreshes because of missing documents.
	GapInterval time.Duration
	// Jitter returns a random number from 0 up to, not including, 1.
	Jitter func() float64
}

// DefaultConfig returns the usual times with this source of randomness.
func DefaultConfig(jitter func() float64) Config {
	return Config{
		Margin: 10 * time.Minute, NotifyWait: 32 * time.Second, Backoff: 5 * time.Second, BackoffMax: 10 * time.Minute,
		MaxFailures: 10, Spread: 2 * time.Second, MinRefresh: 5 * time.Second, GapInterval: 32 * time.Second, Jitter: jitter,
	}
}

// Specification constants, TS 24.229 §5.2.3: a subscription is refreshed this long before its end, or after half of its
// time when it was granted for twice as long or less.
const (
	refreshLead = 600 * time.Second
	refreshHalf = 1200 * time.Second
)

// Subscription is the state of one subscription. It is a value: Next returns the one that follows. Make it with New at
// the initial registration; after Terminated the next initial registration gets a new one.
type Subscription struct {
	state     State
	emergency bool
	loss      Loss          // why it is terminated; 0: not by a failure
	timed     bool          // the refresh under way was due; one because of a gap says nothing about stability
	armed     uint8         // timers that run, one bit each
	failures  uint16        // attempts in a row that did not lead to a subscription which lasted
	life      time.Duration // the registration's expiry as granted last
	floor     time.Duration // least expiry that the notifier takes (423)
	asked     time.Duration // expiry of the newest SUBSCRIBE
	term      time.Duration // expiry as granted last
	deadline  moment        // end of the subscription
	refresh   moment        // what TimerRefresh is armed for
	gap       moment        // last refresh: a gap causes the next one no earlier than Config.GapInterval later
}

// New returns the subscription of a UE that is about to be registered.
func New(emergency bool) Subscription { return Subscription{state: None, emergency: emergency} }

// State returns the state.
func (s *Subscription) State() State { return s.state }

// Failures returns the number of attempts in a row that have failed.
func (s *Subscription) Failures() int { return int(s.failures) }

// Deadline returns when the subscription ends unless it is refreshed, zero while there is none.
func (s *Subscription) Deadline() time.Time { return s.deadline.time() }

// Armed reports whether a timer runs.
func (s *Subscription) Armed(t Timer) bool { return s.armed&(1<<t) != 0 }

// moment is a time in a third of the space of a time.Time, since there is a Subscription for every UE: nanoseconds of
// Unix time, zero for none.
type moment int64

func at(t time.Time) moment { return moment(t.UnixNano()) }

// IsZero reports whether there is no time.
func (m moment) IsZero() bool { return m == 0 }

// Sub returns how much later it is than t.
func (m moment) Sub(t time.Time) time.Duration { return m.time().Sub(t) }

// Add returns the time after d.
func (m moment) Add(d time.Duration) moment { return m + moment(d) }

func (m moment) time() time.Time {
	if m == 0 {
		return time.Time{}
	}
	return time.Unix(0, int64(m))
}
