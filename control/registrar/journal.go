package registrar

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/gmgate/gmgate/control/sa"
)

// Journal is told what has to survive a restart. Its methods run on the worker's loop and must not block; what they are
// shown may change afterwards, so they copy what they keep.
//
// A UE is kept from its first 200 on, with all its sets: of what nobody has proved to be entitled to, nothing is kept.
type Journal interface {
	KeepUE(u *UE)
	KeepSet(s *Set)
	// DropSet and DropUE end what was kept.
	DropSet(id uint64)
	DropUE(index uint32, gen uint16)
}

// Implementation constants.
const (
	// temporaryKept is how long a temporary set waits to be kept: most are confirmed before, and written only once.
	temporaryKept = time.Second
	// restartGap is how much generations jump over a restart, beyond what was kept of them: contexts which never
	// registered used some up.
	restartGap = 1 << 8
)

// Keep gives the table a journal. Call it before the first Begin.
func (t *Table) Keep(j Journal) { t.journal = j }

// Changed says that something about a UE has changed which has to survive a restart. Changes of one turn are kept
// together.
func (t *Table) Changed(u *UE) { t.keepWithin(u, 0) }

func (t *Table) keepWithin(u *UE, d time.Duration) {
	if t.journal == nil || u.State == Pending {
		return
	}
	due := t.now().Add(d)
	if u.keep.Armed() && due.UnixNano() >= u.keepAt {
		return
	}
	u.keepAt = due.UnixNano()
	t.wheel.Schedule(&u.keep, d, func() { t.keepNow(u) })
}

// keepNow shows the journal a UE with its sets.
func (t *Table) keepNow(u *UE) {
	if len(u.Sets) == 0 {
		return
	}
	t.journal.KeepUE(u)
	u.kept = true
	for _, s := range u.Sets {
		if s.Phase.Live() {
			t.journal.KeepSet(s)
			s.kept = true
		}
	}
}

// forgetSet and forgetUE end what the journal has kept.
func (t *Table) forgetSet(s *Set) {
	if s.kept {
		t.journal.DropSet(s.ID)
	}
}

func (t *Table) forgetUE(u *UE) {
	t.wheel.Stop(&u.keep)
	if u.kept {
		t.journal.DropUE(u.Index, u.Gen)
	}
}

// ErrRestore says that what was kept contradicts itself or what is there already.
var ErrRestore = errors.New("kept UE context cannot be restored")

// Restore puts a UE context back that a Journal kept, with index, generation and sets as they were; the backend holds
// its SAs. Phase, Deadline and Over of the sets must be set, and State and Current of the UE; removing says which sets
// were told to go. Contexts are restored before the first Begin.
func (t *Table) Restore(u *UE, removing func(*Set) bool) error {
	switch {
	case u.Index == 0 || u.Index > MaxUEs || len(u.Sets) == 0:
		return fmt.Errorf("%w: index %d, %d sets", ErrRestore, u.Index, len(u.Sets))
	case t.at(u.Index) != nil || t.Context(u.Key()) != nil:
		return fmt.Errorf("%w: index %d is taken", ErrRestore, u.Index)
	case slices.ContainsFunc(u.Sets, func(s *Set) bool { return s.Params.UE != u.Addr }):
		return fmt.Errorf("%w: index %d: a set is of another address", ErrRestore, u.Index)
	case slices.ContainsFunc(u.Sets, func(s *Set) bool { return s.Clear != u.Clear }):
		return fmt.Errorf("%w: index %d: with SAs and in clear", ErrRestore, u.Index)
	case u.Current != nil && !slices.Contains(u.Sets, u.Current):
		return fmt.Errorf("%w: index %d: current set is of another UE", ErrRestore, u.Index)
	}
	for i, s := range u.Sets {
		_, a := t.byTuple[t.tupleA(s)]
		_, b := t.byTuple[t.tupleB(s)]
		twin := slices.ContainsFunc(u.Sets[:i], func(o *Set) bool {
			return t.tupleA(o) == t.tupleA(s) || t.tupleB(o) == t.tupleB(s) || o.Serial == s.Serial
		})
		if a || b || twin || !s.Phase.Live() {
			return fmt.Errorf("%w: set %#x, %s", ErrRestore, s.ID, s.Phase)
		}
	}
	t.reserve(u.Index)
	t.ues[u.Index], t.gens[u.Index] = u, u.Gen
	t.index(u)
	u.gatherIdentities()
	u.kept, u.restored = true, true
	t.obs.UEs(u.State, 1)
	for _, s := range u.Sets {
		s.UE, s.kept, s.removing = u, true, removing(s)
		t.byTuple[t.tupleA(s)], t.byTuple[t.tupleB(s)] = s, s
		if s.Clear {
			t.obs.Associations(1)
		} else {
			t.spis.Reserve(s.SPIs.PC)
			t.spis.Reserve(s.SPIs.PS)
			t.obs.Sets(s.Phase, 1)
		}
		t.arm(s, s.Deadline.Sub(t.now()))
		t.nextID = max(t.nextID, s.ID&(1<<48-1))
	}
	if c := u.Current; c != nil && c.Phase == sa.Old {
		t.armOld(c)
	}
	return nil
}

// Retire notes that a context is gone which had this index and generation: the next to get the index has a later one.
func (t *Table) Retire(index uint32, gen uint16) {
	if index == 0 || index > MaxUEs || t.at(index) != nil {
		return
	}
	t.reserve(index)
	t.gens[index] = gen + restartGap
}

// Shun keeps the index that a label bears from being given out in this run: SAs have the label whose context has got another
// name, here or at another worker, and one label must not stand for two phones.
func (t *Table) Shun(label uint32) {
	index := label & MaxUEs
	if index == 0 || label>>indexBits != uint32(t.worker) { //nolint:gosec // at most 256 workers
		return
	}
	t.reserve(index)
	if t.shunned == nil {
		t.shunned = make(map[uint32]struct{})
	}
	t.shunned[index] = struct{}{}
}

// Resume ends the restoring: indices in between are free, and set ids go on after the highest one ever seen.
func (t *Table) Resume(lastID uint64) {
	t.nextID = max(t.nextID, lastID&(1<<48-1))
	t.free = t.free[:0] // of those that were restored some may have gone already
	for i := len(t.ues) - 1; i > 0; i-- {
		if _, shunned := t.shunned[uint32(i)]; t.ues[i] == nil && !shunned { //nolint:gosec // at most MaxUEs
			t.free = append(t.free, uint32(i)) //nolint:gosec // at most MaxUEs
		}
	}
	t.shunned = nil // whoever has such an index now gives it back with the label
}

// at returns the UE with this index, nil if there is none.
func (t *Table) at(index uint32) *UE {
	if int(index) < len(t.ues) {
		return t.ues[index]
	}
	return nil
}

// reserve makes room for an index. New ones begin with a random generation: nobody knows which theirs were in the run before,
// when a crash may have kept the record of a registration from reaching the store.
func (t *Table) reserve(index uint32) {
	for len(t.ues) <= int(index) {
		t.ues, t.gens = append(t.ues, nil), append(t.gens, uint16(rand.Uint32())) //nolint:gosec // no secret
	}
}

// Kept reports whether the journal keeps the set.
func (s *Set) Kept() bool { return s.kept }

// Expired is told that the backend has let a set go because its hard limit had passed. It counts as removed.
func (t *Table) Expired(id uint64) bool {
	s := t.byID(id)
	if s == nil || s.Phase == sa.Dead {
		return false
	}
	t.remove(s)
	return true
}

// Mend has the backend install sets again of which it has lost an SA, with these sequence numbers. It returns how many of
// them are here, calls answered for each when the backend has answered, on a goroutine of the backend's, and lets a set go
// where that fails. It looks at every set there is, once.
func (t *Table) Mend(sets map[uint64]sa.Counters, answered func()) (n int) {
	for k, s := range t.byTuple {
		c, ok := sets[s.ID]
		if !ok || s.Clear || !s.Phase.Live() || k != t.tupleA(s) { // each set is there twice
			continue
		}
		n++
		s.Counters = c // a set that is kept only later goes on from here as well
		p := s.Params
		p.Hard = s.Deadline.Sub(t.now()) + hardMargin
		t.installer.Remove(p, func(error) {})
		s.due.Add(1)
		t.installer.Install(p, func(err error) {
			if err != nil {
				t.onLoop(func() { s.due.Add(-1); t.remove(s) })
			} else {
				s.due.Add(-1)
			}
			answered()
		})
	}
	return n
}

// byID finds a set. It is for rare events: it looks at all of them.
func (t *Table) byID(id uint64) *Set {
	for _, s := range t.byTuple {
		if s.ID == id {
			return s
		}
	}
	return nil
}

// walkPlaces bounds how many places of the table one Walk looks at for each context that it may visit: a table that was
// full once has many empty ones.
const walkPlaces = 16

// Walk calls f for the UE contexts from index on in the order of their index, at most n of them, and returns the index to
// go on with; zero means that there are no more. A context that is added meanwhile may be missed. f may end contexts.
func (t *Table) Walk(from uint32, n int, f func(*UE)) (next uint32) {
	i := max(int(from), 1)
	for end := i + n*walkPlaces; i < len(t.ues); i++ {
		if n == 0 || i == end {
			return uint32(i) //nolint:gosec // at most MaxUEs
		}
		if u := t.ues[i]; u != nil {
			f(u)
			n--
		}
	}
	return 0
}
