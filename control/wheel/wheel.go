// Package wheel is a hierarchical timer wheel: the timers of one worker, several per UE, at the cost of a few pointer
// writes each.
//
// It exists because the runtime's timers run on goroutines of their own, while the state of a UE belongs to one
// worker's loop: here the loop itself calls Advance, and every callback runs within that call.
//
// Invariants: a timer never fires before its deadline by the wheel's clock, which is the time of the last Advance; it
// fires in the first Advance whose time has reached the first tick at or after the deadline. Timers due at the same
// tick fire in the order in which they were scheduled. Schedule, Stop and Advance do not allocate. The work of an
// Advance depends on the timers that it fires or moves to a finer level, at most one move per level and timer, and not
// on how much time has passed: the wheel may stand still for days.
//
// Concurrency: none. A Wheel and its Timers belong to one goroutine.
package wheel

import (
	"math"
	"math/bits"
	"time"
)

// Implementation constants.
const (
	slotBits = 6             // one 64-bit word tells the occupied slots of a level
	slots    = 1 << slotBits // slots per level
	slotMask = slots - 1
	levels   = 11 // 11 levels of 6 bits hold any tick number that a time.Duration can express: nothing overflows
)

// Timer is one timer. It is meant to be a field of the structure that it serves; the zero value is ready for Schedule.
// An armed Timer must not be copied.
type Timer struct {
	w          *Wheel // the wheel in which the timer is armed, or nil
	f          func()
	prev, next *Timer
	when       uint64 // tick at which it fires
	level      uint8
	slot       uint8
}

// Armed reports whether the timer is waiting to fire. During its own callback a timer is no longer armed.
func (t *Timer) Armed() bool { return t.w != nil }

// list is a slot: its timers in the order of Schedule.
type list struct{ head, tail *Timer }

// Wheel is a hierarchical timer wheel. Make one with New.
//
// A timer stands at the level of the highest group of six bits in which its tick differs from the current one. So every
// timer of a level is due before every timer of the next, the occupied slots of a level all lie ahead of the current
// one, and the next thing to do is the lowest occupied slot of the lowest occupied level.
type Wheel struct {
	start     time.Time
	now       time.Time // of the last Advance
	tick      time.Duration
	elapsed   uint64 // every timer due before this tick has fired; at the end of Advance the tick of now
	target    uint64 // the tick of now: nothing scheduled may become due at or before it
	count     int
	advancing bool
	occupied  [levels]uint64
	slot      [levels][slots]list
}

// New returns a wheel whose clock stands at now. It panics when tick is not positive.
func New(tick time.Duration, now time.Time) *Wheel {
	if tick <= 0 {
		panic("wheel: tick is not positive")
	}
	return &Wheel{start: now, now: now, tick: tick}
}

// Len returns the number of armed timers.
func (w *Wheel) Len() int { return w.count }

// Now returns the wheel's clock: the time of the last Advance, also within callbacks.
func (w *Wheel) Now() time.Time { return w.now }

// Next returns how long after Now an Advance may be the first to have something to do, math.MaxInt64 when no timer is
// armed. It may be earlier than the first deadline, since timers that are far away stand in coarse slots.
func (w *Wheel) Next() time.Duration {
	_, _, first := w.first()
	if first > uint64(math.MaxInt64/w.tick) {
		return math.MaxInt64
	}
	return max(0, time.Duration(first)*w.tick-w.now.Sub(w.start))
}

// Schedule arms t to call f once, d after the wheel's Now, and cancels what t was armed for before. A d of zero or less
// means the next tick: a callback never runs within Schedule, nor within the Advance that called Schedule. Give a
// function value that is made once per timer, since a closure made at the call costs an allocation. Schedule panics when
// t is armed in another wheel.
func (w *Wheel) Schedule(t *Timer, d time.Duration, f func()) {
	if t.w != nil {
		if t.w != w {
			panic("wheel: timer is armed in another wheel")
		}
		w.unlink(t)
	}
	t.f = f
	t.when = w.due(d)
	w.link(t)
}

// Stop disarms t and reports whether it was armed. After Stop the callback does not run.
func (w *Wheel) Stop(t *Timer) bool {
	if t.w != w {
		return false
	}
	w.unlink(t)
	t.f = nil
	return true
}

// Advance moves the clock to now and runs what has become due, in order of time. Callbacks may call Schedule and Stop
// for any timer. A now that is not after the clock, and a call from within a callback, do nothing.
func (w *Wheel) Advance(now time.Time) {
	if w.advancing || !now.After(w.now) {
		return
	}
	w.advancing = true
	// A callback that panics must not leave the wheel unusable for a loop that recovers.
	defer w.endAdvance()

	w.now = now
	w.target = uint64(now.Sub(w.start) / w.tick) // not negative: now is after start
	for {
		level, slot, first := w.first()
		if first > w.target {
			break
		}
		w.elapsed = first
		l := &w.slot[level][slot]
		if level == 0 {
			// Everything in a slot of the lowest level is due at the same tick. Callbacks cannot add to this
			// slot, because due returns ticks after target only, but they can take others out of it.
			for t := l.head; t != nil; t = l.head {
				f := t.f
				w.unlink(t)
				t.f = nil
				f()
			}
			continue
		}
		t := l.head
		*l = list{}
		w.occupied[level] &^= 1 << slot
		for t != nil {
			next := t.next
			t.prev, t.next = nil, nil
			w.count--
			w.link(t)
			t = next
		}
	}
	w.elapsed = w.target
}

func (w *Wheel) endAdvance() { w.advancing = false }

// first returns the lowest occupied slot of the lowest occupied level and the tick at which it begins, which is after
// every tick that cannot be reached when there are no timers.
func (w *Wheel) first() (level int, slot, tick uint64) {
	for level, occupied := range w.occupied {
		if occupied == 0 {
			continue
		}
		slot := uint64(bits.TrailingZeros64(occupied))
		shift := uint(level) * slotBits
		return level, slot, (w.elapsed>>shift&^slotMask | slot) << shift
	}
	return 0, 0, math.MaxUint64
}

// due returns the first tick that is not before now+d, and at least the one after the current.
func (w *Wheel) due(d time.Duration) uint64 {
	since := w.now.Sub(w.start)
	if d > math.MaxInt64-since {
		d = math.MaxInt64 - since
	}
	if d > 0 {
		since += d
	}
	tick := uint64(since / w.tick)
	if since%w.tick != 0 {
		tick++
	}
	return max(tick, w.target+1)
}

func (w *Wheel) link(t *Timer) {
	// The lowest bits are set so that a timer of the current tick has level 0 as well.
	level := (bits.Len64((t.when^w.elapsed)|slotMask) - 1) / slotBits
	slot := t.when >> (uint(level) * slotBits) & slotMask
	t.level, t.slot = uint8(level), uint8(slot)
	l := &w.slot[level][slot]
	t.prev, t.next = l.tail, nil
	if l.tail == nil {
		l.head = t
		w.occupied[level] |= 1 << slot
	} else {
		l.tail.next = t
	}
	l.tail = t
	t.w = w
	w.count++
}

func (w *Wheel) unlink(t *Timer) {
	l := &w.slot[t.level][t.slot]
	if t.prev == nil {
		l.head = t.next
	} else {
		t.prev.next = t.next
	}
	if t.next == nil {
		l.tail = t.prev
	} else {
		t.next.prev = t.prev
	}
	if l.head == nil {
		w.occupied[t.level] &^= 1 << t.slot
	}
	t.prev, t.next, t.w = nil, nil, nil
	w.count--
}
