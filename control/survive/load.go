package survive

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/control/store"
)

// Block is how far sequence numbers move ahead when they were lost: more packets than can be sent on one SA between two
// checkpoints, and so little of the number space that an SA survives thousands of reboots.
const Block = 1 << 20

// maxFormer is how many names of a context are remembered beside its present one.
const maxFormer = 16

// installWindow is how many sets the backend is asked to install at a time.
const installWindow = 1024

// ErrInstall says that the backend has not installed a set within the time that it had.
var ErrInstall = errors.New("backend does not answer")

var (
	errNoRegistration = errors.New("its registration is lost")
	errProtected      = errors.New("the identity has security associations")
)

// Config is what Load works with.
type Config struct {
	Store   store.Store
	Backend sa.Backend
	Workers int
	Owner   func(ue netip.Addr) int // worker of an address
	Fit     func(*store.Set) error  // nil error: the set can go on under the present configuration
	Now     func() time.Time
	Log     *slog.Logger
}

// UE is a context that goes on, with its sets, the older ones first.
type UE struct {
	store.Registration
	Sets []store.Set
}

// Worker is what goes on in one worker.
type Worker struct {
	UEs    []UE
	Freed  []store.Freed
	LastID uint64 // highest set id with this worker's prefix
}

// Outcome is what Load found and did.
type Outcome struct {
	Workers []Worker
	Moved   map[Name]Name          // former names of contexts, which a change of the number of workers has taken from them
	SPIs    []ims.SPI              // in use: not to be given out
	Foreign []ims.SPI              // those of SPIs that other programs have towards our addresses
	Labels  []uint32               // of the sets that go on, whatever their contexts are called now
	Known   map[uint64]sa.Counters // of the sets that go on: all that the store has now

	Relocated   int // contexts that got another worker now
	Adopted     int // sets whose SAs the backend still held
	Reinstalled int // sets whose SAs were installed again
	Expired     int // sets whose life had ended meanwhile
	Dropped     int // sets that cannot go on, see the log
	Orphans     int // SAs of ours in the backend that belonged to no set
	Faults      int // records that could not be read
}

// Name is what a flow token calls a UE context.
type Name struct {
	store.Context
	Gen uint16
}

// Load brings store and backend together. What cannot go on is taken out of both; only errors of the store or the backend
// as a whole are returned.
func Load(ctx context.Context, c Config) (*Outcome, error) {
	snap, err := store.Read(ctx, c.Store)
	if err != nil {
		return nil, fmt.Errorf("read store: %w", err)
	}
	o := &Outcome{Workers: make([]Worker, c.Workers), Moved: make(map[Name]Name), Known: make(map[uint64]sa.Counters)}
	l := &loader{Config: c, out: o, now: c.Now(), lost: make(map[uint64]bool)}
	l.faults(snap.Faults)
	l.pick(snap)
	if err := l.adopt(ctx); err != nil {
		return nil, err
	}
	l.assemble(snap)
	if l.gone.Len() > 0 {
		if err := c.Store.Apply(ctx, l.gone); err != nil {
			return nil, fmt.Errorf("clean store: %w", err)
		}
	}
	return o, nil
}

type loader struct {
	Config
	out  *Outcome
	now  time.Time
	sets []store.Set       // that may go on
	live map[uint64]int    // their positions; only those that the backend holds, once adopt is done
	lost map[uint64]bool   // sets whose mark cannot be read
	gone store.Batch       // what is to be taken out of the store
	next map[uint16]uint32 // last index given to a context that moved, by worker
}

func (l *loader) faults(faults []store.Fault) {
	for _, f := range faults {
		l.out.Faults++
		l.Log.Error("record of the store is lost", "error", f)
		switch f.Kind {
		case store.KindSet, store.KindMark: // without its mark a set would use sequence numbers again
			l.lost[f.Set] = true
			l.gone.DeleteSets = append(l.gone.DeleteSets, f.Set)
		case store.KindRegistration, store.KindFreed:
			// What is left of it: its generation is unknown, any one that comes next is later than a lost one.
			l.gone.Free = append(l.gone.Free, store.Freed{Context: f.Context, Gen: uint16(rand.Uint32())}) //nolint:gosec // no secret
		case store.KindMeta, store.KindCheck: // the store does not open without them
		}
	}
}

// pick keeps the sets whose life goes on.
func (l *loader) pick(snap *store.Snapshot) {
	l.live = make(map[uint64]int, len(snap.Sets))
	for i := range snap.Sets {
		s := &snap.Sets[i]
		if w := int(s.ID >> 48); w < len(l.out.Workers) {
			l.out.Workers[w].LastID = max(l.out.Workers[w].LastID, s.ID)
		}
		switch err := l.Fit(s); {
		case !s.Deadline.After(l.now):
			l.out.Expired++
		case s.Phase == sa.Reserved || l.lost[s.ID]:
			l.out.Dropped++
		case err != nil:
			l.out.Dropped++
			l.Log.Warn("SA set cannot go on", "impi", s.IMPI, "ue", s.Addr, "reason", err)
		default:
			l.live[s.ID] = len(l.sets)
			l.sets = append(l.sets, *s)
			continue
		}
		l.drop(s.ID)
	}
	l.protect()
}

// protect drops the address associations of identities that have confirmed SAs. The worker that had one was told to end it, but
// the crash may have been faster.
func (l *loader) protect() {
	protected := make(map[string]bool)
	for i := range l.sets {
		if s := &l.sets[i]; !s.Clear && (s.Phase == sa.Established || s.Phase == sa.Old) {
			protected[strings.ToLower(s.IMPI)] = true
		}
	}
	for i := range l.sets {
		if s := &l.sets[i]; s.Clear && protected[strings.ToLower(s.IMPI)] {
			l.discard(s, errProtected)
		}
	}
}

func (l *loader) drop(id uint64) {
	delete(l.live, id)
	l.gone.DeleteSets = append(l.gone.DeleteSets, id)
}

// adopt has the backend take over what it holds and install the rest.
func (l *loader) adopt(ctx context.Context) error {
	params := make([]sa.Params, 0, len(l.sets))
	for i := range l.sets {
		if !l.sets[i].Clear { // an address association has no SAs
			params = append(params, l.sets[i].Params(l.now))
		}
	}
	defer func() {
		for i := range params {
			params[i].Keys.Zero()
		}
	}()
	a, err := l.Backend.Adopt(ctx, params)
	if err != nil {
		return fmt.Errorf("adopt SAs: %w", err)
	}
	l.out.Orphans = a.Removed
	l.out.SPIs, l.out.Foreign = append(l.out.SPIs, a.Foreign...), a.Foreign
	held := make(map[uint64]bool, len(a.Adopted))
	for _, id := range a.Adopted {
		held[id] = true
	}
	l.out.Adopted = len(held)

	var again []sa.Params
	var marks []store.Mark
	for i := range params {
		p := &params[i]
		if held[p.ID] {
			continue
		}
		s := &l.sets[l.live[p.ID]]
		if s.Counters, err = s.Counters.Ahead(Block); err != nil {
			l.discard(s, err)
			continue
		}
		p.Counters = s.Counters
		again = append(again, *p)
		marks = append(marks, store.Mark{Set: s.ID, Counters: s.Counters})
	}
	if len(again) == 0 {
		return nil
	}
	// First the marks: should the next moment bring another crash, the numbers from here on are already taken.
	if err := l.Store.Checkpoint(ctx, marks); err != nil {
		return fmt.Errorf("store sequence numbers: %w", err)
	}
	return l.install(ctx, again)
}

// discard gives up a set that the backend does not hold.
func (l *loader) discard(s *store.Set, why error) {
	l.out.Dropped++
	l.Log.Warn("SA set cannot go on", "impi", s.IMPI, "ue", s.Addr, "reason", why)
	l.drop(s.ID)
}

func (l *loader) install(ctx context.Context, sets []sa.Params) error {
	type result struct {
		id  uint64
		err error
	}
	for len(sets) > 0 {
		turn := sets[:min(len(sets), installWindow)]
		sets = sets[len(turn):]
		results := make(chan result, len(turn))
		for _, p := range turn {
			l.Backend.Install(p, func(err error) { results <- result{p.ID, err} })
		}
		for range turn {
			select {
			case r := <-results:
				if r.err == nil {
					l.out.Reinstalled++
					continue
				}
				l.discard(&l.sets[l.live[r.id]], r.err)
			case <-ctx.Done():
				return fmt.Errorf("install SA sets again: %w: %w", ErrInstall, context.Cause(ctx))
			}
		}
	}
	return nil
}

// assemble gives every registration its sets and its worker.
func (l *loader) assemble(snap *store.Snapshot) {
	byUE := make(map[store.Context][]store.Set)
	for i := range l.sets {
		s := &l.sets[i]
		if _, ok := l.live[s.ID]; ok {
			c := store.Context{Worker: s.Worker, Index: s.UE}
			byUE[c] = append(byUE[c], *s)
		}
	}
	l.next = make(map[uint16]uint32)
	for i := range snap.Registrations {
		l.next[snap.Registrations[i].Worker] = max(l.next[snap.Registrations[i].Worker], snap.Registrations[i].Index)
	}
	for _, f := range snap.Freed {
		l.next[f.Worker] = max(l.next[f.Worker], f.Index)
		if int(f.Worker) < len(l.out.Workers) {
			w := &l.out.Workers[f.Worker]
			w.Freed = append(w.Freed, f)
		}
	}
	l.gather(snap, byUE)
	for i := range snap.Registrations {
		r := &snap.Registrations[i]
		sets := byUE[r.Context]
		delete(byUE, r.Context)
		if len(sets) == 0 {
			l.retire(Name{r.Context, r.Gen})
			continue
		}
		// By their ids, and where a phone has come from another worker, whose sets bear its number: the phases tell.
		slices.SortStableFunc(sets, func(a, b store.Set) int { return cmp.Compare(b.Phase, a.Phase) })
		u := UE{Registration: *r, Sets: sets}
		if _, ok := l.live[u.Current]; !ok {
			u.Current = newest(sets)
		}
		l.place(u)
	}
	for _, sets := range byUE { // sets without a registration: nobody knows whose they are
		for i := range sets {
			if !sets[i].Clear {
				l.Backend.Remove(sets[i].Params(l.now), func(error) {})
			}
			l.discard(&sets[i], errNoRegistration)
		}
	}
}

// phone is what a context of SA sets is of.
type phone struct {
	impi      string
	addr      netip.Addr
	emergency bool
}

// gather brings the sets of a context together that was moved from worker to worker while the last run lived: its record from
// before stays until it ends, and the crash may have come before every set was written with its new name. The context is the one
// whose former names hold those of the others.
func (l *loader) gather(snap *store.Snapshot, byUE map[store.Context][]store.Set) {
	if !slices.ContainsFunc(snap.Registrations, func(r store.Registration) bool { return len(r.Former) > 0 }) {
		l.gatherNameless(snap, byUE, nil)
		return
	}
	byName := make(map[Name]*store.Registration, len(snap.Registrations))
	for i := range snap.Registrations {
		byName[Name{snap.Registrations[i].Context, snap.Registrations[i].Gen}] = &snap.Registrations[i]
	}
	last := make(map[store.Context]*store.Registration) // the latest record of a context that has several, by the place of the others
	for i := range snap.Registrations {
		r := &snap.Registrations[i]
		for _, f := range r.Former {
			o := byName[Name(f)]
			if o == nil || o.IMPI != r.IMPI || o.Addr != r.Addr || o.Emergency != r.Emergency {
				continue
			}
			if have := last[o.Context]; have == nil || len(have.Former) < len(r.Former) {
				last[o.Context] = r
			}
		}
	}
	for from, r := range last {
		for next := r; next != nil; next = last[next.Context] { // of many names the latest may not remember the oldest
			r = next
		}
		if sets := byUE[from]; len(sets) > 0 {
			byUE[r.Context] = l.rename(append(byUE[r.Context], sets...), r)
			delete(byUE, from)
		}
	}
	l.gatherNameless(snap, byUE, last)
}

// gatherNameless is gather the other way round: a set may bear a name whose record was not written. superseded are the places of
// records that are not the latest of their context.
func (l *loader) gatherNameless(snap *store.Snapshot, byUE map[store.Context][]store.Set, superseded map[store.Context]*store.Registration) {
	named := 0
	for i := range snap.Registrations {
		if len(byUE[snap.Registrations[i].Context]) > 0 {
			named++
		}
	}
	if named == len(byUE) {
		return
	}
	byPhone := make(map[phone]*store.Registration, len(snap.Registrations))
	for i := range snap.Registrations {
		r := &snap.Registrations[i]
		if sets := byUE[r.Context]; superseded[r.Context] == nil && (len(sets) == 0 || !sets[0].Clear) {
			byPhone[phone{r.IMPI, r.Addr, r.Emergency}] = r
		}
	}
	known := make(map[store.Context]bool, len(snap.Registrations))
	for i := range snap.Registrations {
		known[snap.Registrations[i].Context] = true
	}
	for c, sets := range byUE {
		s := &sets[0]
		if r := byPhone[phone{s.IMPI, s.Addr, s.Emergency}]; r != nil && !known[c] && !s.Clear && r.Worker != c.Worker {
			byUE[r.Context] = l.rename(append(byUE[r.Context], sets...), r)
			delete(byUE, c)
		}
	}
}

// rename has sets belong to the context of a record, here and in the store.
func (l *loader) rename(sets []store.Set, r *store.Registration) []store.Set {
	slices.SortFunc(sets, func(a, b store.Set) int { return cmp.Compare(a.ID, b.ID) })
	for i := range sets {
		if s := &sets[i]; s.Worker != r.Worker || s.UE != r.Index {
			s.Worker, s.UE = r.Worker, r.Index
			l.gone.Sets = append(l.gone.Sets, *s)
		}
	}
	return sets
}

// newest returns the id of the last established set, zero if there is none.
func newest(sets []store.Set) (id uint64) {
	for i := range sets {
		if sets[i].Phase == sa.Established || id == 0 && sets[i].Phase == sa.Old {
			id = sets[i].ID
		}
	}
	return id
}

// retire frees a context, so that flow tokens with its name reach nobody else.
func (l *loader) retire(n Name) {
	l.gone.Free = append(l.gone.Free, store.Freed(n))
	if int(n.Worker) < len(l.out.Workers) {
		w := &l.out.Workers[n.Worker]
		w.Freed = append(w.Freed, store.Freed(n))
	}
}

// place hands a UE to the worker that owns its address. That is the one it was with, unless the number of workers has
// changed: then it gets a new name there, and Moved leads from the old ones to it, in the runs to come as well.
func (l *loader) place(u UE) {
	owner := uint16(l.Owner(u.Addr)) //nolint:gosec // at most 256 workers
	if owner != u.Worker {
		old := Name{u.Context, u.Gen}
		l.retire(old)
		l.next[owner]++
		u.Former = append(u.Former[max(0, len(u.Former)-maxFormer+1):], store.Freed(old))
		u.Worker, u.Index, u.Gen = owner, l.next[owner], uint16(rand.Uint32()) //nolint:gosec // no secret
		for i := range u.Sets {
			u.Sets[i].Worker, u.Sets[i].UE = u.Worker, u.Index
		}
		l.out.Relocated++
		l.gone.Sets = append(l.gone.Sets, u.Sets...)
		l.gone.Registrations = append(l.gone.Registrations, u.Registration)
	}
	for _, f := range u.Former {
		l.out.Moved[Name(f)] = Name{u.Context, u.Gen}
	}
	for i := range u.Sets {
		l.out.Known[u.Sets[i].ID] = u.Sets[i].Counters
		l.out.SPIs = append(l.out.SPIs, u.Sets[i].SPIs.PC, u.Sets[i].SPIs.PS)
		if !u.Sets[i].Clear {
			l.out.Labels = append(l.out.Labels, u.Sets[i].Label)
		}
	}
	w := &l.out.Workers[owner]
	w.UEs = append(w.UEs, u)
}
