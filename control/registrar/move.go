package registrar

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
)

// A context goes from one table to another in three steps, each on the loop of its table: Claim takes a place at the new one,
// Detach takes the context out of the old one, and Attach puts it in. The ESP backend and the journal hear of none of them: SAs
// and set ids stay what they are. Between Detach and Attach nobody but who carries it may touch the context.

// ErrUnsettled says that a context cannot go to another table now.
var ErrUnsettled = errors.New("UE context is not settled")

// Settled reports by an error that wraps ErrUnsettled what the contexts at an address still wait for. Those that wait for
// nothing have confirmed SA sets only, none of which is ending, and no answer of the backend about them is due.
func (t *Table) Settled(addr netip.Addr) error {
	unsettled := func(why string) error { return fmt.Errorf("%w: %s", ErrUnsettled, why) }
	if len(t.leaving[addr]) > 0 {
		return unsettled("an SA set is being removed")
	}
	for u := t.byAddr[addr]; u != nil; u = u.atAddr {
		switch {
		case u.Clear:
			return unsettled("registered in clear")
		case u.State != Registered:
			return unsettled(u.State.String())
		}
		for _, s := range u.Sets {
			switch {
			case s.Phase != sa.Established && s.Phase != sa.Old:
				return unsettled("an SA set is " + s.Phase.String())
			case s.removing:
				return unsettled("an SA set is being removed")
			case s.due.Load() != 0:
				return unsettled("the ESP backend has not answered")
			}
		}
	}
	return nil
}

// Claim takes a place for a context that will come. It reports false when there is none. Unclaim gives a place back.
func (t *Table) Claim() (index uint32, gen uint16, ok bool) {
	if index, ok = t.place(); !ok {
		return 0, 0, false
	}
	return index, t.gens[index], true
}

// Unclaim gives back what Claim took.
func (t *Table) Unclaim(index uint32) { t.free = append(t.free, index) }

// Detach takes a settled context out. Its index is not given out again before Release: the labels of its SAs bear it, and flow
// tokens its name. The SPIs of its sets stay taken in the pool that they are of.
func (t *Table) Detach(u *UE) {
	t.wheel.Stop(&u.keep)
	for _, s := range u.Sets {
		t.wheel.Stop(&s.timer)
		for _, k := range []tuple{t.tupleA(s), t.tupleB(s)} {
			if t.byTuple[k] == s {
				delete(t.byTuple, k)
			}
		}
		t.obs.Sets(s.Phase, -1)
	}
	t.queue = slices.DeleteFunc(t.queue, func(s *Set) bool { return slices.Contains(u.Sets, s) })
	t.unindex(u)
	t.ues[u.Index] = nil
	if t.retired == nil {
		t.retired = make(map[uint32]uint16)
	}
	t.retired[u.Index] = u.Gen
	t.obs.UEs(u.State, -1)
}

// Attach puts a context in that was detached: at a place that Claim took, or where it was. No other context may be at its address
// but those that came with it.
func (t *Table) Attach(u *UE, index uint32, gen uint16) {
	delete(t.retired, index)
	u.Index, u.Gen, u.restored = index, gen, false
	t.ues[index] = u
	t.index(u)
	t.obs.UEs(u.State, 1)
	for _, s := range u.Sets {
		t.byTuple[t.tupleA(s)], t.byTuple[t.tupleB(s)] = s, s
		t.obs.Sets(s.Phase, 1)
		t.arm(s, s.Deadline.Sub(t.now()))
	}
	if c := u.Current; c != nil && c.Phase == sa.Old {
		t.armOld(c)
	}
	t.Changed(u)
}

// Release gives out the index of a detached context again, which has ended elsewhere. It reports false for a name that is none.
func (t *Table) Release(index uint32, gen uint16) bool {
	if g, ok := t.retired[index]; !ok || g != gen {
		return false
	}
	delete(t.retired, index)
	t.gens[index] += restartGap
	t.free = append(t.free, index)
	return true
}

// SendSPIs says who frees the SPIs that are not of this table's pool: those of sets that have come from another worker.
func (t *Table) SendSPIs(free func(...ims.SPI)) { t.sendSPIs = free }

// Free gives SPIs back to the pool: of a set that had gone to another table.
func (t *Table) Free(spis ...ims.SPI) {
	for _, spi := range spis {
		t.spis.Free(spi)
	}
}
