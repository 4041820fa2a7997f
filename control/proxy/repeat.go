package proxy

import (
	"encoding/hex"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/wheel"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// A message that comes over TCP and leaves over UDP would be repeated by nobody: its sender counts on its transport
// (RFC 3261 §17.1.1.2, §17.1.2.2, §17.2.1), and one lost datagram would end the call. So these messages, and no others, are
// kept and repeated as the transactions of a stateful proxy would: requests until they are answered, answers to an INVITE but
// 2xx, for which the ends are responsible, until their ACK.

// Implementation constants.
const (
	// Both ways the timers of TS 24.229 §7.7 for the air interface hold: what goes to the core is answered by a UE beyond it as
	// a rule, and with less patience most requests would be sent twice for nothing.
	gmT1 = 2 * time.Second
	gmT2 = 16 * time.Second

	repeatT4 = 5 * time.Second // how long messages stay in the network at most: Timer K

	maxRepeats        = 8192     // messages that a worker keeps
	maxRepeatsUE      = 64       // those that belong to one UE: who gets no answers is repeated eleven times
	maxRepeatOctets   = 16 << 20 // of all of a worker
	maxIdleRepeats    = 256
	maxIdleRepeatSize = 4 << 10
)

// repeatKind tells messages with the same branch apart.
type repeatKind uint8

const (
	repeatInvite repeatKind = iota
	repeatCancel
	repeatOther  // any other request
	repeatAnswer // final answer to an INVITE
)

// repeatKey names a transaction of a UE by the branch that we gave its request.
type repeatKey struct {
	digits uint64
	ue     uint32
	gen    uint16
	toUE   bool // that is where the request goes
	kind   repeatKind
}

// repeat is a message that is sent again until something shows that it has arrived.
type repeat struct {
	key    repeatKey
	timer  wheel.Timer
	fire   func()
	msg    []byte
	method sipmsg.Method
	hop    ims.Hop // of what goes to the core
	serial uint8   // set of what goes to the UE
	how    channel
	gap    time.Duration // until the next time
	limit  time.Duration // of gap
	until  time.Time
	again  bool // it was repeated
	done   bool // it was answered for good: further answers are those to our repetitions
}

// repeats are the messages that a worker keeps.
type repeats struct {
	by     map[repeatKey]*repeat
	octets int
	idle   []*repeat // spent ones, for use again
}

// kindOf is the kind of a request.
func kindOf(m sipmsg.Method) repeatKind {
	switch m {
	case sipmsg.MethodInvite:
		return repeatInvite
	case sipmsg.MethodCancel:
		return repeatCancel
	default:
		return repeatOther
	}
}

func keyOfRepeat(u *registrar.UE, toUE bool, digits uint64, kind repeatKind) repeatKey {
	return repeatKey{digits: digits, ue: u.Index, gen: u.Gen, toUE: toUE, kind: kind}
}

// repeatToCore keeps what was just sent to the core over UDP.
func (w *Worker) repeatToCore(u *registrar.UE, toUE bool, digits uint64, kind repeatKind, method sipmsg.Method, hop ims.Hop) {
	if r := w.keep(u, keyOfRepeat(u, toUE, digits, kind), w.out); r != nil {
		r.method, r.hop = method, hop
		w.arm(r)
	}
}

// repeatToUE keeps what was just sent to a UE over UDP.
func (w *Worker) repeatToUE(s *registrar.Set, toUE bool, digits uint64, kind repeatKind, method sipmsg.Method, how channel) {
	if r := w.keep(s.UE, keyOfRepeat(s.UE, toUE, digits, kind), w.out); r != nil {
		r.method, r.serial, r.how = method, s.Serial, how
		w.arm(r)
	}
}

// keep makes a repeat of a message. It returns nil, and counts, when there are too many.
func (w *Worker) keep(u *registrar.UE, key repeatKey, msg []byte) *repeat {
	if old := w.repeats.by[key]; old != nil { // sent anew in spite of TCP
		w.stopRepeat(old)
	}
	if len(w.repeats.by) >= maxRepeats || u.Repeats >= maxRepeatsUE || w.repeats.octets+len(msg) > maxRepeatOctets {
		w.obs.RepeatRefused()
		return nil
	}
	var r *repeat
	if n := len(w.repeats.idle); n > 0 {
		r, w.repeats.idle = w.repeats.idle[n-1], w.repeats.idle[:n-1]
	} else {
		r = new(repeat)
		r.fire = func() { w.sendAgain(r) }
	}
	r.key, r.msg = key, append(r.msg[:0], msg...)
	r.again, r.done = false, false
	u.Repeats++
	w.repeats.octets += len(msg)
	w.repeats.by[key] = r
	return r
}

func (w *Worker) arm(r *repeat) {
	r.gap, r.limit, r.until = gmT1, gmT2, w.eg.Now().Add(64*gmT1)
	if r.key.kind == repeatInvite {
		r.limit = 64 * gmT1 // Timer A has none
	}
	// The wheel's clock is behind where the loop is: a repetition must not be early.
	w.wheel.Schedule(&r.timer, r.gap+w.eg.Now().Sub(w.wheel.Now()), r.fire)
}

// stopRepeat forgets a message.
func (w *Worker) stopRepeat(r *repeat) {
	w.wheel.Stop(&r.timer)
	delete(w.repeats.by, r.key)
	w.repeats.octets -= len(r.msg)
	if u := w.table.Lookup(r.key.ue, r.key.gen); u != nil && u.Repeats > 0 {
		u.Repeats--
	}
	if len(w.repeats.idle) < maxIdleRepeats && cap(r.msg) <= maxIdleRepeatSize {
		w.repeats.idle = append(w.repeats.idle, r)
	}
}

// sendAgain repeats a message, unless its UE has gone or its sender has given up.
func (w *Worker) sendAgain(r *repeat) {
	u := w.table.Lookup(r.key.ue, r.key.gen)
	left := r.until.Sub(w.eg.Now())
	if u == nil || left <= 0 || r.done {
		w.stopRepeat(r)
		return
	}
	if toUE := r.key.toUE != (r.key.kind == repeatAnswer); toUE {
		s := u.Set(r.serial)
		if s == nil {
			s = u.Current
		}
		if s == nil {
			w.stopRepeat(r)
			return
		}
		w.obs.Repeated(sideOf(s))
		w.sendToUE(s, r.how, r.msg, r.method)
	} else {
		w.obs.Repeated(ims.Mw)
		w.sendToCore(r.hop, r.msg, r.method, nil)
	}
	r.again = true
	r.gap = min(2*r.gap, r.limit)
	w.wheel.Schedule(&r.timer, min(r.gap, left), r.fire)
}

func sideOf(s *registrar.Set) ims.Side {
	if s.Clear {
		return ims.GmClear
	}
	return ims.GmProtected
}

// gotAnswer takes note of an answer, the current message, to a request with our branch. digits are those of it. It reports
// whether the answer goes on: a client over TCP expects one final answer, and repetitions may cause more. (Those to an INVITE are
// left to its ends, which have to acknowledge each of them.)
func (w *Worker) gotAnswer(u *registrar.UE, toUE bool, digits uint64) bool {
	kind := kindOf(w.m.CSeqMethod())
	r := w.repeats.by[keyOfRepeat(u, toUE, digits, kind)]
	switch {
	case r == nil:
	case r.done:
		return false
	case w.m.Status() >= 200 && r.again && kind != repeatInvite:
		r.done = true
		w.wheel.Schedule(&r.timer, repeatT4, r.fire)
	case w.m.Status() >= 200 || kind == repeatInvite:
		w.stopRepeat(r)
	default: // RFC 3261 §17.1.2.2: it has arrived, but the final answer may get lost and has to be asked for
		r.gap = r.limit
		w.wheel.Schedule(&r.timer, r.gap, r.fire)
	}
	return true
}

// gotAck takes note of an ACK, the current message. The ACK of a 2xx is a transaction of its own and matches nothing.
func (w *Worker) gotAck(u *registrar.UE, toUE bool, digits uint64) {
	if r := w.repeats.by[keyOfRepeat(u, toUE, digits, repeatAnswer)]; r != nil {
		w.stopRepeat(r)
	}
}

// refuses reports whether the current message is an answer that its server transaction repeats until the ACK comes
// (RFC 3261 §17.2.1).
func (w *Worker) refuses() bool {
	return w.m.CSeqMethod() == sipmsg.MethodInvite && w.m.Status() >= 300
}

// digitsOf reads the digits of our branch.
func digitsOf(text []byte) (v uint64) {
	var b [8]byte
	if n, err := hex.Decode(b[:], text); err != nil || n != len(b) {
		return 0
	}
	for _, c := range b {
		v = v<<8 | uint64(c)
	}
	return v
}
