package observe

import (
	"fmt"
	"sync/atomic"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// Dir is the direction of a message, seen from gmgate.
type Dir uint8

// Directions.
const (
	In Dir = iota + 1
	Out

	dirEnd
)

// String returns the label value.
func (d Dir) String() string {
	switch d {
	case In:
		return "in"
	case Out:
		return "out"
	}
	return fmt.Sprintf("Dir(%#x)", uint8(d))
}

// RegKind is a kind of registration.
type RegKind uint8

// Kinds of registration.
const (
	RegInitial RegKind = iota + 1 // REGISTER in clear
	RegReauth                     // protected REGISTER that the core challenged: a new SA set
	RegRefresh                    // protected REGISTER accepted as it is
	RegDereg                      // Expires: 0

	regEnd
)

// String returns the label value.
func (k RegKind) String() string {
	switch k {
	case RegInitial:
		return "initial"
	case RegReauth:
		return "reauth"
	case RegRefresh:
		return "refresh"
	case RegDereg:
		return "dereg"
	}
	return fmt.Sprintf("RegKind(%#x)", uint8(k))
}

// Phase is a phase in the life of an SA set that metrics count.
type Phase uint8

// Phases.
const (
	PhaseReserved    Phase = iota + 1 // SPIs and ports taken, nothing installed
	PhaseTemporary                    // installed, the 401 is out
	PhaseEstablished                  // the protected registration succeeded
	PhaseOld                          // replaced, kept for what is still on its way

	phaseEnd
)

// String returns the label value.
func (p Phase) String() string {
	switch p {
	case PhaseReserved:
		return "reserved"
	case PhaseTemporary:
		return "temporary"
	case PhaseEstablished:
		return "established"
	case PhaseOld:
		return "old"
	}
	return fmt.Sprintf("Phase(%#x)", uint8(p))
}

// UEState is the registration state of a UE context.
type UEState uint8

// UE states.
const (
	UEPending      UEState = iota + 1 // registration pending, never registered so far
	UERegistered                      // registered
	UEDeregistered                    // deregistered, its sets are running out

	ueEnd
)

// String returns the label value.
func (s UEState) String() string {
	switch s {
	case UEPending:
		return "pending"
	case UERegistered:
		return "registered"
	case UEDeregistered:
		return "deregistered"
	}
	return fmt.Sprintf("UEState(%#x)", uint8(s))
}

// Implementation constants: the sizes of the tables.
const (
	sides      = int(ims.Mw) + 1
	transports = int(ims.TCP) + 1
	methods    = int(sipmsg.MethodCount)
	classes    = 7 // 0 = request, 1 to 6
	algs       = int(ims.AlgNull) + 1
	encAlgs    = int(ims.EncAESGCM) + 1

	// cacheLines keeps neighbours on the heap off the lines of a worker's counters: two lines of 64 bytes, since the
	// adjacent-line prefetcher of current processors works on pairs.
	cacheLines = 128
)

// count is a number with a single writer. Load and Store instead of Add: nobody else writes, and readers only need to
// see whole values.
type count struct{ v atomic.Uint64 }

func (c *count) inc()         { c.v.Store(c.v.Load() + 1) }
func (c *count) load() uint64 { return c.v.Load() }

// level is a number that goes up and down, with a single writer.
type level struct{ v atomic.Int64 }

func (l *level) add(n int)   { l.v.Store(l.v.Load() + int64(n)) }
func (l *level) set(n int)   { l.v.Store(int64(n)) }
func (l *level) load() int64 { return l.v.Load() }

// Counters are the counters of one worker. Its methods are called by that worker's loop only and do not allocate. A
// value outside an enumeration is counted under zero of it, where a scrape shows it as "unknown", rather than lost.
type Counters struct {
	_ [cacheLines]byte

	messages      [dirEnd][sides][transports][methods][classes]count
	rejected      [reasonEnd]count
	dropped       [reasonEnd]count
	registrations [regEnd][2]count // 0 = failure, 1 = success
	suites        [algs][encAlgs]count
	verify        count
	identity      count
	awaitAuth     count
	repeated      [sides]count
	unrepeated    count
	sets          [phaseEnd]level
	ues           [ueEnd]level
	associations  level
	reg           regEvents
	spisInUse     level
	spiCapacity   level

	_ [cacheLines]byte
}

// within returns i if it indexes a table of n entries, otherwise zero.
func within[T ~uint8](i T, n int) int {
	if int(i) < n {
		return int(i)
	}
	return 0
}

// Message counts one SIP message: class is zero for a request, otherwise the first digit of the status code. m is the
// request's method, for a response the one in CSeq.
func (c *Counters) Message(d Dir, side ims.Side, tr ims.Transport, m sipmsg.Method, class uint8) {
	if int(class) >= classes {
		return // no message has such a status: the scanner refuses it
	}
	c.messages[within(d, int(dirEnd))][within(side, sides)][within(tr, transports)][within(m, methods)][class].inc()
}

// Reject counts one message that was answered with an error.
func (c *Counters) Reject(r Reason) { c.rejected[within(r, int(reasonEnd))].inc() }

// Drop counts one message that was thrown away.
func (c *Counters) Drop(r Reason) { c.dropped[within(r, int(reasonEnd))].inc() }

// Registration counts the end of one registration.
func (c *Counters) Registration(kind RegKind, ok bool) {
	result := 0
	if ok {
		result = 1
	}
	c.registrations[within(kind, int(regEnd))][result].inc()
}

// Suite counts one agreement on s.
func (c *Counters) Suite(s ims.Suite) { c.suites[within(s.Alg, algs)][within(s.Enc, encAlgs)].inc() }

// VerifyMismatch counts one Security-Verify that differs from our Security-Server (RFC 3329 §2.3.1).
func (c *Counters) VerifyMismatch() { c.verify.inc() }

// IdentityMismatch counts one public identity that a phone claimed and has not registered over the SA that it claimed it on
// (TS 24.229 §5.2.6.3).
func (c *Counters) IdentityMismatch() { c.identity.inc() }

// Repeated counts one message that was sent again on a side, because its sender does not repeat what it sends over TCP.
func (c *Counters) Repeated(side ims.Side) { c.repeated[within(side, sides)].inc() }

// RepeatRefused counts one message that is sent only once because too many are kept for being sent again.
func (c *Counters) RepeatRefused() { c.unrepeated.inc() }

// AwaitAuthExpired counts one expiry of the reg-await-auth timer (TS 24.229 §5.2.2).
func (c *Counters) AwaitAuthExpired() { c.awaitAuth.inc() }

// Sets changes the number of SA sets in a phase.
func (c *Counters) Sets(p Phase, delta int) { c.sets[within(p, int(phaseEnd))].add(delta) }

// Associations changes the number of address associations of phones that are registered in clear.
func (c *Counters) Associations(delta int) { c.associations.add(delta) }

// UEs changes the number of UE contexts in a state.
func (c *Counters) UEs(delta int, s UEState) { c.ues[within(s, int(ueEnd))].add(delta) }

// SPIs tells how many SPIs of this worker's pool are taken, and how many it can give out at most.
func (c *Counters) SPIs(inUse, capacity int) {
	c.spisInUse.set(inUse)
	c.spiCapacity.set(capacity)
}
