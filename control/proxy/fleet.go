package proxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/control/wheel"
)

// Fleet lets the workers of one process tell each other what concerns a phone that another of them owns, and others ask
// all of them. That is rare, and never on the way of a message. The zero value is ready; it is safe for concurrent use.
type Fleet struct {
	mu      sync.RWMutex
	workers []*Worker // those that have booted
	sets    atomic.Int64
	names   renames // of UE contexts that have moved
	clear   renames // of those in clear that a restart has given to other workers

	departed, arrived atomic.Int64 // moves that have begun to be on their way, and that have ended
}

func (f *Fleet) join(w *Worker) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.workers = append(f.workers, w)
}

// all runs do on the loop of every worker.
func (f *Fleet) all(do func(*Worker)) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	for _, w := range f.workers {
		_ = w.eg.Post(func() { do(w) }) // a loop that has ended has no phones left
	}
}

// walkTurn is how many UE contexts a loop looks at in one go, between messages.
const walkTurn = 256

// walk shows visit every UE context, each on the loop of its worker, one loop at a time.
func (f *Fleet) walk(ctx context.Context, visit func(*Worker, *registrar.UE)) error {
	f.mu.RLock()
	workers := append([]*Worker(nil), f.workers...)
	f.mu.RUnlock()
	for _, w := range workers {
		for next := uint32(1); next != 0; {
			turn := make(chan uint32, 1)
			from := next
			if err := w.eg.Post(func() {
				turn <- w.table.Walk(from, walkTurn, func(u *registrar.UE) { visit(w, u) })
			}); err != nil {
				return fmt.Errorf("ask worker %d: %w", w.id, err)
			}
			select {
			case next = <-turn:
			case <-ctx.Done():
				return fmt.Errorf("ask worker %d: %w", w.id, context.Cause(ctx))
			}
		}
	}
	return nil
}

// Sets returns the ids of the sets which the workers believe the backend to hold, each with whether the store keeps it, and
// those of the address associations, of which the backend knows nothing. It looks again where a UE may have been missed because
// it was on its way from one worker to another.
func (f *Fleet) Sets(ctx context.Context) (sets, clear map[uint64]bool, err error) {
	for range setsTries {
		arrived := f.arrived.Load()
		if sets, clear, err = f.listSets(ctx); err != nil || f.departed.Load() == arrived {
			break
		}
	}
	return sets, clear, err
}

// setsTries is how often Sets looks at most: there may be a move at any time, but not of the same UE.
const setsTries = 3

func (f *Fleet) listSets(ctx context.Context) (sets, clear map[uint64]bool, err error) {
	sets, clear = make(map[uint64]bool), make(map[uint64]bool)
	err = f.walk(ctx, func(_ *Worker, u *registrar.UE) {
		for _, s := range u.Sets {
			switch {
			case s.Clear:
				clear[s.ID] = s.Kept()
			case s.Phase != sa.Reserved:
				sets[s.ID] = s.Kept()
			}
		}
	})
	if err != nil {
		return nil, nil, err // what visit has written so far may still be written to
	}
	return sets, clear, nil
}

// errNotAsked says that a worker cannot be asked: it has not begun, has ended, or has too much to do.
var errNotAsked = errors.New("a worker cannot be asked")

// anyOther asks every other worker on its loop, and passes on the loop of self whether one of them said yes, and an error if
// not all of them could be asked. What self tells the others afterwards reaches them after the question, and what they told
// self before their answer has arrived before it; what they tell self after it may come before the answer of the last one.
func (f *Fleet) anyOther(self *Worker, ask func(*Worker) bool, done func(bool, error)) {
	f.mu.RLock()
	all := len(f.workers) >= self.cfg.Workers
	workers := slices.DeleteFunc(slices.Clone(f.workers), func(o *Worker) bool { return o == self })
	f.mu.RUnlock()
	if !all {
		done(false, errNotAsked)
		return
	}
	left, found := len(workers), false
	if left == 0 {
		done(false, nil)
		return
	}
	var failed error
	answered := func(yes bool, err error) {
		found, failed = found || yes, cmp.Or(failed, err)
		if left--; left == 0 {
			done(found, failed)
		}
	}
	for _, o := range workers {
		if o.eg.Post(func() {
			yes := ask(o)
			_ = self.eg.Post(func() { answered(yes, nil) })
		}) != nil {
			answered(false, errNotAsked)
		}
	}
}

// How often a loop that has too much to do is told again what it must hear of, and when.
const (
	insistTries = 100
	insistRetry = 100 * time.Millisecond
)

// insist runs do on the loop of every other worker. It is for what must not get lost: one that has too much to do hears of it later.
func (f *Fleet) insist(self *Worker, do func(*Worker)) {
	f.mu.RLock()
	workers := slices.Clone(f.workers)
	f.mu.RUnlock()
	for _, o := range workers {
		if o != self {
			self.insistOn(o, do, insistTries)
		}
	}
}

func (w *Worker) insistOn(o *Worker, do func(*Worker), tries int) {
	if o.eg.Post(func() { do(o) }) != nil && tries > 1 {
		w.wheel.Schedule(new(wheel.Timer), insistRetry, func() { w.insistOn(o, do, tries-1) })
	}
}

// moved ends the registrations that a phone has at other addresses: it has registered at a new one, without the outbound
// extension that would keep both (TS 24.229 §5.2.2.2, RFC 5626). What is on its way there still gets out.
func (w *Worker) moved(u *registrar.UE) {
	impi, addr := u.IMPI, u.Addr
	w.leave(impi, addr)
	if w.cfg.Fleet != nil {
		w.cfg.Fleet.insist(w, func(o *Worker) { o.leave(impi, addr) })
	}
}

// leave de-registers a phone wherever it is but at one address.
func (w *Worker) leave(impi string, except netip.Addr) {
	for _, u := range w.table.Elsewhere(impi, except) {
		w.table.Deregister(u, w.cfg.Registrar.OldSet)
		w.unwatch(u, true) // the core may have both contacts
	}
	w.follow(impi, except)
}
