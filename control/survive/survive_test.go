package survive

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/control/sa/satest"
	"github.com/gmgate/gmgate/control/store"
	"github.com/gmgate/gmgate/control/store/storetest"
)

const workers = 4

// world is a store and a backend which an earlier run has left.
type world struct {
	t       *testing.T
	store   *storetest.Memory
	backend *satest.Backend
	now     time.Time
	sets    []store.Set
	regs    []store.Registration
}

// newWorld makes n UEs, each with one set. Every UE is with the worker that owner says.
func newWorld(t *testing.T, n uint32) *world {
	w := &world{t: t, store: storetest.NewMemory(), backend: new(satest.Backend), now: storetest.Epoch}
	for i := uint32(1); i <= n; i++ {
		r, s := storetest.Registration(i), storetest.Set(uint64(i))
		r.Worker, s.Worker = uint16(owner(r.Addr)), uint16(owner(r.Addr))
		s.ID |= uint64(s.Worker) << 48
		r.Current = s.ID
		w.regs, w.sets = append(w.regs, r), append(w.sets, s)
	}
	w.apply(store.Batch{Sets: w.sets, Registrations: w.regs})
	return w
}

func owner(a netip.Addr) int { b := a.As4(); return int(b[3]) % workers }

func (w *world) apply(b store.Batch) {
	w.t.Helper()
	if err := w.store.Apply(w.t.Context(), b); err != nil {
		w.t.Fatal(err)
	}
}

// install puts sets into the backend of the earlier run.
func (w *world) install(sets ...store.Set) {
	for i := range sets {
		w.backend.Install(sets[i].Params(w.now), func(err error) {
			if err != nil {
				w.t.Error(err)
			}
		})
	}
	w.backend.Answer()
}

// answering lets a backend answer at once.
type answering struct{ *satest.Backend }

func (a answering) Install(p sa.Params, done func(error)) { a.Backend.Install(p, done); a.Answer() }

func (w *world) config() Config {
	return Config{
		Store: w.store, Backend: answering{w.backend}, Workers: workers, Owner: owner,
		Fit: func(*store.Set) error { return nil }, Now: func() time.Time { return w.now },
		Log: slog.New(slog.DiscardHandler),
	}
}

// restart is what the next process sees: the SAs, and nothing that the process had in memory.
func (w *world) restart(change func(*Config)) *Outcome {
	w.t.Helper()
	w.backend = w.backend.Restarted()
	c := w.config()
	if change != nil {
		change(&c)
	}
	o, err := Load(w.t.Context(), c)
	if err != nil {
		w.t.Fatal(err)
	}
	return o
}

func (w *world) stored() []uint64 {
	w.t.Helper()
	ids, err := w.store.SetIDs(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return ids
}

func count(o *Outcome) (ues, sets int) {
	for _, w := range o.Workers {
		ues += len(w.UEs)
		for _, u := range w.UEs {
			sets += len(u.Sets)
		}
	}
	return ues, sets
}

// After a crash the backend still holds everything: all is adopted and nothing touched.
//
// Peers: A1.22a
func TestAdopted(t *testing.T) {
	w := newWorld(t, 40)
	w.install(w.sets...)
	o := w.restart(nil)
	if o.Adopted != 40 || o.Reinstalled != 0 || o.Dropped != 0 || o.Orphans != 0 || o.Expired != 0 {
		t.Errorf("%+v", o)
	}
	if ues, sets := count(o); ues != 40 || sets != 40 {
		t.Errorf("%d UEs with %d sets", ues, sets)
	}
	if w.backend.Count() != 160 || len(w.backend.Installed) != 0 || len(w.backend.Removed) != 0 {
		t.Errorf("%d SAs, %d installed, %d removed", w.backend.Count(), len(w.backend.Installed), len(w.backend.Removed))
	}
	if len(o.SPIs) != 80 {
		t.Errorf("%d SPIs in use", len(o.SPIs))
	}
	for k, x := range o.Workers {
		for _, u := range x.UEs {
			if owner(u.Addr) != k || u.Index == 0 || len(u.Sets) != 1 || u.Current != u.Sets[0].ID {
				t.Errorf("worker %d has %+v", k, u.Registration)
			}
			if x.LastID < u.Sets[0].ID {
				t.Errorf("worker %d would give out set id %#x again", k, u.Sets[0].ID)
			}
		}
	}
}

// After a reboot the backend is empty: everything is installed again, its outbound numbers past all that can have been
// used, its inbound ones where they were. The mark is in the store first.
//
// Peers: A4.04c, B3.20
func TestReinstalled(t *testing.T) {
	w := newWorld(t, 40)
	if err := w.store.Checkpoint(t.Context(), []store.Mark{{Set: w.sets[0].ID, Counters: sa.Counters{70, 80, 900, 1000}}}); err != nil {
		t.Fatal(err)
	}
	o := w.restart(func(c *Config) {
		w.backend.Fail = func(p sa.Params) error {
			snap, err := store.Read(t.Context(), w.store)
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range snap.Sets {
				if s.ID == p.ID && s.Counters != p.Counters {
					t.Errorf("set %#x begins at %v, the store has %v", p.ID, p.Counters, s.Counters)
				}
			}
			return nil
		}
	})
	if o.Adopted != 0 || o.Reinstalled != 40 || o.Dropped != 0 || w.backend.Count() != 160 {
		t.Errorf("%+v, %d SAs", o, w.backend.Count())
	}
	for _, p := range w.backend.Installed {
		if p.ID == w.sets[0].ID && p.Counters != (sa.Counters{70, 80, 900 + Block, 1000 + Block}) {
			t.Errorf("first set begins at %v", p.Counters)
		}
	}
	if o.Known[w.sets[0].ID] != (sa.Counters{70, 80, 900 + Block, 1000 + Block}) {
		t.Errorf("known: %v", o.Known[w.sets[0].ID])
	}
	// And once more: the numbers go on from there.
	w.backend = new(satest.Backend)
	if o = w.restart(nil); o.Reinstalled != 40 || o.Known[w.sets[0].ID] != (sa.Counters{70, 80, 900 + 2*Block, 1000 + 2*Block}) {
		t.Errorf("second reboot: %+v", o.Known[w.sets[0].ID])
	}
}

// Each set for itself: some SAs are gone, some are left over, some sets have ended or cannot go on.
//
// Peers: A1.22b, B1.23
func TestMixed(t *testing.T) {
	w := newWorld(t, 8)
	over, orphan := w.sets[2], storetest.Set(99)
	w.install(w.sets[0], w.sets[1], w.sets[2], orphan)
	p := w.sets[1].Params(w.now)
	w.backend.Lose(p.SAs()[3]) // one of four: the other three are worth nothing
	over.Deadline = w.now
	exhausted := w.sets[3]
	exhausted.Counters = sa.Counters{0, 0, 1<<32 - 5, 0}
	reserved := w.sets[4]
	reserved.Phase = sa.Reserved
	unfit := w.sets[5].ID
	refused := w.sets[6].ID
	stray := storetest.Set(50) // its registration is lost
	stray.Worker = 1
	w.apply(store.Batch{Sets: []store.Set{over, exhausted, reserved, stray}})
	o := w.restart(func(c *Config) {
		c.Fit = func(s *store.Set) error {
			if s.ID == unfit {
				return errors.New("port is not ours any more")
			}
			return nil
		}
		w.backend.Fail = func(p sa.Params) error {
			if p.ID == refused {
				return errors.New("no memory")
			}
			return nil
		}
		w.backend.Foreign = []ims.SPI{4711}
	})
	// Left: 0 adopted; 1 and 7 installed again, and the stray one, which goes again.
	if o.Adopted != 1 || o.Reinstalled != 3 || o.Expired != 1 || o.Dropped != 5 || o.Orphans != 4+4+3 {
		t.Errorf("%+v", o)
	}
	w.backend.Answer() // removal of the stray one
	if ues, _ := count(o); ues != 3 || w.backend.Count() != 12 {
		t.Errorf("%d UEs, %d SAs", ues, w.backend.Count())
	}
	want := []uint64{w.sets[0].ID, w.sets[1].ID, w.sets[7].ID}
	slices.Sort(want)
	if got := w.stored(); !slices.Equal(got, want) {
		t.Errorf("store has %#x, want %#x", got, want)
	}
	if !slices.Contains(o.SPIs, 4711) {
		t.Error("an SPI of somebody else may be given out")
	}
	// The contexts of the others are retired, so that their flow tokens reach nobody.
	freed := 0
	for _, x := range o.Workers {
		freed += len(x.Freed)
	}
	if freed != 5 {
		t.Errorf("%d contexts retired, want 5", freed)
	}
}

// A record that cannot be read costs its own UE, and no other.
func TestFaults(t *testing.T) {
	w := newWorld(t, 4)
	w.install(w.sets...)
	w.store.Damage(w.sets[1].ID)
	o := w.restart(nil)
	if o.Faults != 1 || o.Adopted != 3 || o.Orphans != 4 {
		t.Errorf("%+v", o)
	}
	if ues, _ := count(o); ues != 3 || w.backend.Count() != 12 || len(w.stored()) != 3 {
		t.Errorf("%d UEs, %d SAs, %d sets stored", ues, w.backend.Count(), len(w.stored()))
	}
}

// With another number of workers every UE goes to the worker that owns its address now, under a name that no other has;
// the old name leads there. Labels stay, since the SAs bear them.
func TestMoved(t *testing.T) {
	w := newWorld(t, 40)
	w.install(w.sets...)
	o := w.restart(func(c *Config) {
		c.Workers = 2
		c.Owner = func(a netip.Addr) int { return owner(a) % 2 }
	})
	if ues, _ := count(o); ues != 40 || o.Adopted != 40 || len(o.Moved) != 20 || o.Relocated != 20 {
		t.Errorf("%d UEs, %d moved, %+v", ues, len(o.Moved), o.Adopted)
	}
	labels := make(map[uint64]uint32)
	for i := range w.sets {
		labels[w.sets[i].ID] = w.sets[i].Label
	}
	names := make(map[Name]netip.Addr)
	for k, x := range o.Workers {
		for _, u := range x.UEs {
			n := Name{u.Context, u.Gen}
			if int(u.Worker) != k || owner(u.Addr)%2 != k || names[n].IsValid() {
				t.Errorf("worker %d has %+v", k, u.Registration)
			}
			names[n] = u.Addr
			for _, s := range u.Sets {
				if s.Worker != u.Worker || s.UE != u.Index || s.Label != labels[s.ID] {
					t.Errorf("set %#x is of worker %d, UE %d, label %#x", s.ID, s.Worker, s.UE, s.Label)
				}
			}
		}
	}
	for i, r := range w.regs {
		old := Name{r.Context, r.Gen}
		now, moved := o.Moved[old]
		if !moved {
			now = old
		}
		if names[now] != r.Addr {
			t.Errorf("UE %d at %s: its token now leads to %s", i, r.Addr, names[now])
		}
		if _, taken := names[old]; moved && taken {
			t.Errorf("%+v is the name of another UE now", old)
		}
	}
	// The store says the same: the next start finds everybody in place.
	again := w.restart(func(c *Config) {
		c.Workers = 2
		c.Owner = func(a netip.Addr) int { return owner(a) % 2 }
	})
	if again.Relocated != 0 || again.Adopted != 40 || !maps.Equal(again.Moved, o.Moved) {
		t.Errorf("second start: %d moved, %d adopted, %d former names", again.Relocated, again.Adopted, len(again.Moved))
	}
	// Back with four: the names of both earlier runs lead to those of now, however often the number changes.
	for i := range 2 * maxFormer {
		n := 4 - 2*(i%2)
		o = w.restart(func(c *Config) {
			c.Workers = n
			c.Owner = func(a netip.Addr) int { return owner(a) % n }
		})
		names := make(map[Name]netip.Addr)
		for _, x := range o.Workers {
			for _, u := range x.UEs {
				names[Name{u.Context, u.Gen}] = u.Addr
			}
		}
		if o.Relocated != 20 || len(o.Moved) != 20*min(i+2, maxFormer) {
			t.Errorf("restart %d: %d moved, %d former names", i, o.Relocated, len(o.Moved))
		}
		for _, r := range w.regs {
			if now, moved := o.Moved[Name{r.Context, r.Gen}]; moved && names[now] != r.Addr {
				t.Errorf("restart %d: token of %s leads to %s", i, r.Addr, names[now])
			}
		}
	}
}

// A phone that has come from a worker with a higher number has newer sets with lower ids: what is older stands first all the
// same.
func TestOlderFirst(t *testing.T) {
	w := newWorld(t, 1)
	older, newer := w.sets[0], w.sets[0].Clone()
	w.apply(store.Batch{DeleteSets: []uint64{older.ID}})
	older.ID, older.Phase = 3<<48|9, sa.Old
	newer.ID, newer.Over, newer.Ports.UC, newer.Ports.PC = 1<<48|12, older.ID, newer.Ports.UC+2, newer.Ports.PC+1
	newer.SPIs = ims.SPIs{UC: 7000, US: 7001, PC: 1<<28 + 100, PS: 1<<28 + 101}
	w.regs[0].Current = older.ID
	w.apply(store.Batch{Sets: []store.Set{older, *newer}, Registrations: w.regs})
	w.install(older, *newer)
	o := w.restart(nil)
	for _, x := range o.Workers {
		for _, u := range x.UEs {
			if len(u.Sets) != 2 || u.Sets[0].ID != older.ID || u.Current != older.ID {
				t.Errorf("%d sets, %#x first, %#x current", len(u.Sets), u.Sets[0].ID, u.Current)
			}
		}
	}
	if ues, sets := count(o); ues != 1 || sets != 2 {
		t.Errorf("%d UEs, %d sets", ues, sets)
	}
}

// An address association has no SAs to adopt or install.
func TestClearSet(t *testing.T) {
	w := newWorld(t, 1)
	s := w.sets[0]
	s.Clear, s.Keys, s.SPIs = true, ims.ESPKeys{}, ims.SPIs{}
	w.apply(store.Batch{Sets: []store.Set{s}})
	o := w.restart(nil)
	if ues, _ := count(o); ues != 1 || o.Adopted+o.Reinstalled+o.Dropped != 0 || w.backend.Count() != 0 {
		t.Errorf("%d UEs, %+v", ues, o)
	}
}

// A store or backend that fails as a whole stops the start, and takes nothing out of the backend.
func TestLoadFails(t *testing.T) {
	w := newWorld(t, 2)
	w.install(w.sets...)
	c := w.config()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Load(ctx, c); err == nil {
		t.Error("read from a store with an ended context")
	}
	if w.backend.Count() != 8 {
		t.Errorf("%d SAs left", w.backend.Count())
	}
	// A backend that does not answer.
	w.backend = new(satest.Backend)
	c = w.config()
	c.Backend = w.backend
	ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Load(ctx, c); !errors.Is(err, ErrInstall) {
		t.Errorf("error is %v", err)
	}
}

// books are workers that say what they are told to.
type books struct {
	sets   map[uint64]bool
	clear  map[uint64]bool
	mended map[uint64]sa.Counters
	fails  int // so many times
	turns  int // of mending
}

func (b *books) Sets(context.Context) (sets, clear map[uint64]bool, err error) {
	if b.fails--; b.fails >= 0 {
		return nil, nil, errors.New("loop is gone")
	}
	return maps.Clone(b.sets), b.clear, nil
}

func (b *books) Mend(_ context.Context, sets map[uint64]sa.Counters) error {
	b.turns++
	maps.Copy(b.mended, sets)
	return nil
}

func (w *world) reconciler(b *books) (*Reconciler, *store.Writer) {
	var stored []uint64
	known := make(map[uint64]sa.Counters)
	for i := range w.sets {
		stored = append(stored, w.sets[i].ID)
		known[w.sets[i].ID] = w.sets[i].Counters
	}
	writer := store.NewWriter(store.WriterConfig{Store: w.store, Stored: stored})
	w.t.Cleanup(func() { _ = writer.Close(context.Background()) })
	return NewReconciler(ReconcilerConfig{
		Books: b, Backend: w.backend, Store: w.store, Writer: writer, Known: known, Log: slog.New(slog.DiscardHandler),
	}), writer
}

// What agrees differs in nothing; what was under way during one round is no difference; what stays is.
func TestRounds(t *testing.T) {
	w := newWorld(t, 4)
	w.install(w.sets...)
	b := &books{sets: make(map[uint64]bool), mended: make(map[uint64]sa.Counters)}
	for i := range w.sets {
		b.sets[w.sets[i].ID] = true
	}
	r, writer := w.reconciler(b)
	round := func(want Differences) {
		t.Helper()
		if err := r.Round(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got, _, _, _ := r.Stats(); got != want {
			t.Errorf("differences %v, want %v", got, want)
		}
	}
	round(Differences{})
	round(Differences{})

	// One in each direction and place.
	extra, unkept := storetest.Set(77), storetest.Set(78)
	w.install(extra, unkept)
	b.sets[unkept.ID] = false // not to be kept: no difference
	p := w.sets[0].Params(w.now)
	w.backend.Lose(p.SAs()[0])
	strayID := storetest.Set(79)
	w.apply(store.Batch{Sets: []store.Set{strayID}, DeleteSets: []uint64{w.sets[1].ID}})
	w.backend.Sent(w.sets[2].ID, sa.Counters{5, 6, 7, 8})
	round(Differences{})
	if len(b.mended) != 0 {
		t.Error("mended at first sight")
	}
	round(Differences{BackendMissing: 1, BackendExtra: 1, StoreMissing: 1, StoreExtra: 1})
	c, ok := b.mended[w.sets[0].ID]
	if !ok || len(b.mended) != 1 {
		t.Fatalf("mended: %v", b.mended)
	}
	want, err := w.sets[0].Counters.Ahead(Block)
	if err != nil || c != want {
		t.Errorf("mended at %v, want %v", c, want)
	}
	if err := writer.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	snap, err := store.Read(t.Context(), w.store)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range snap.Sets {
		if s.ID == w.sets[0].ID && s.Counters != c {
			t.Errorf("mark of the mended set is %v", s.Counters)
		}
		if s.ID == w.sets[2].ID && s.Counters != w.sets[2].Counters.Max(sa.Counters{5, 6, 7, 8}) {
			t.Errorf("numbers of the third set are kept as %v", s.Counters)
		}
	}
	// Mended: all is well again.
	w.backend.Remove(p, func(error) {})
	p.Counters = c
	w.backend.Install(p, func(error) {})
	w.backend.Answer()
	delete(b.sets, w.sets[1].ID)
	w.apply(store.Batch{DeleteSets: []uint64{strayID.ID}})
	p1 := w.sets[1].Params(w.now)
	for _, s := range []sa.Params{p1, extra.Params(w.now)} {
		w.backend.Remove(s, func(error) {})
	}
	w.backend.Answer()
	round(Differences{})
	if _, rounds, mended, faulted := r.Stats(); rounds != 5 || mended != 1 || faulted != 0 {
		t.Errorf("%d rounds, %d mended, %d faulted", rounds, mended, faulted)
	}
}

// When the backend loses everything, it is not asked for more at a time than it lets wait: what it refuses would be lost.
func TestMendMany(t *testing.T) {
	w := newWorld(t, 2*installWindow+1)
	w.install(w.sets...)
	b := &books{sets: make(map[uint64]bool), mended: make(map[uint64]sa.Counters)}
	for i := range w.sets {
		b.sets[w.sets[i].ID] = true
	}
	r, _ := w.reconciler(b)
	for i := range w.sets {
		p := w.sets[i].Params(w.now)
		w.backend.Lose(p.SAs()[0])
	}
	for range 2 {
		if err := r.Round(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, mended, _ := r.Stats(); len(b.mended) != len(w.sets) || b.turns != 3 || mended != uint64(len(w.sets)) {
		t.Errorf("%d of %d sets mended in %d turns, %d counted", len(b.mended), len(w.sets), b.turns, mended)
	}
}

// A round that cannot compare says so, and the reconciler goes on; a clean end keeps the numbers as they are.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		w.install(w.sets...)
		b := &books{sets: map[uint64]bool{w.sets[0].ID: true}, mended: make(map[uint64]sa.Counters), fails: 2}
		r, writer := w.reconciler(b)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); r.Run(ctx) }()
		time.Sleep(5*DefaultInterval + time.Second)
		synctest.Wait()
		if _, rounds, _, faulted := r.Stats(); rounds != 3 || faulted != 2 {
			t.Errorf("%d rounds, %d faulted", rounds, faulted)
		}
		cancel()
		<-done
		w.backend.Sent(w.sets[0].ID, sa.Counters{11, 12, 13, 14})
		if err := r.Checkpoint(t.Context()); err != nil {
			t.Error(err)
		}
		if err := writer.Close(t.Context()); err != nil {
			t.Error(err)
		}
		snap, err := store.Read(t.Context(), w.store)
		if err != nil || snap.Sets[0].Counters != (sa.Counters{11, 12, 13, 14}) {
			t.Errorf("%v, %v", snap.Sets[0].Counters, err)
		}
	})
}

// A crash may come between an identity's SAs and the end of its address association, which another worker writes: the SAs go
// on, and nothing of the identity in clear.
func TestClearSetOfProtected(t *testing.T) {
	w := newWorld(t, 2)
	w.install(w.sets[0])
	s, r := w.sets[1], w.regs[1]
	s.Clear, s.Keys, s.SPIs = true, ims.ESPKeys{}, ims.SPIs{}
	s.IMPI, r.IMPI = w.sets[0].IMPI, w.regs[0].IMPI
	w.apply(store.Batch{Sets: []store.Set{s}, Registrations: []store.Registration{r}})
	o := w.restart(nil)
	if ues, sets := count(o); ues != 1 || sets != 1 || o.Adopted != 1 || o.Dropped != 1 {
		t.Errorf("%d UEs with %d sets go on: %+v", ues, sets, o)
	}
	if ids := w.stored(); !slices.Equal(ids, []uint64{w.sets[0].ID}) {
		t.Errorf("stored: %x", ids)
	}
}
