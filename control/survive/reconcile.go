package survive

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/control/store"
)

// DefaultInterval is the time between two rounds of the reconciler.
const DefaultInterval = time.Minute

// Books are the workers, who decide which sets there are.
type Books interface {
	// Sets returns the ids of the sets which the workers believe the backend to hold, each with whether the store
	// keeps it, and in the same way those without SAs, which concern the store alone.
	Sets(ctx context.Context) (sets, clear map[uint64]bool, err error)
	// Mend has sets installed again, with these sequence numbers, and returns once the backend has answered.
	Mend(ctx context.Context, sets map[uint64]sa.Counters) error
}

// ReconcilerConfig is what a Reconciler works with.
type ReconcilerConfig struct {
	Books    Books
	Backend  sa.Backend
	Store    store.Store            // nil: nothing is kept
	Writer   *store.Writer          // of Store
	Known    map[uint64]sa.Counters // sequence numbers that the store has of the sets at the start; taken over
	Interval time.Duration          // zero means the default
	Log      *slog.Logger
}

// Kind is a kind of difference.
type Kind uint8

// Kinds of differences.
const (
	BackendMissing Kind = iota // workers have it, the backend not
	BackendExtra               // the backend has it, the workers not
	StoreMissing               // workers keep it, the store does not have it
	StoreExtra                 // the store has it, the workers not
	Kinds
)

var kindNames = [Kinds][2]string{{"backend", "missing"}, {"backend", "extra"}, {"store", "missing"}, {"store", "extra"}}

// Labels returns who disagrees with the workers, and how.
func (k Kind) Labels() (keeper, kind string) { return kindNames[k][0], kindNames[k][1] }

// String names the kind in logs.
func (k Kind) String() string { return kindNames[k][0] + " " + kindNames[k][1] }

// Differences are what two rounds in a row have found: what is under way at the moment of one round is no difference.
type Differences [Kinds]int

// Reconciler compares workers, backend and store. Make it with NewReconciler and have one goroutine call Run.
type Reconciler struct {
	cfg  ReconcilerConfig
	last map[uint64]sa.Counters // checkpointed
	open [Kinds]map[uint64]bool // found by the round before

	mu      sync.Mutex
	found   Differences
	rounds  uint64
	mended  uint64
	faulted uint64
}

// NewReconciler makes a reconciler.
func NewReconciler(cfg ReconcilerConfig) *Reconciler {
	if cfg.Interval <= 0 {
		cfg.Interval = DefaultInterval
	}
	if cfg.Known == nil {
		cfg.Known = make(map[uint64]sa.Counters)
	}
	return &Reconciler{cfg: cfg, last: cfg.Known}
}

// Run does a round each interval until ctx ends.
func (r *Reconciler) Run(ctx context.Context) {
	t := time.NewTicker(r.cfg.Interval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		round, cancel := context.WithTimeout(ctx, r.cfg.Interval)
		if err := r.Round(round); err != nil && ctx.Err() == nil {
			r.count(func() { r.faulted++ })
			r.cfg.Log.Error("reconciler could not compare", "error", err)
		}
		cancel()
	}
}

// Stats returns what the last round found, how many rounds there were, how many sets were mended so far, and how many
// rounds could not compare.
func (r *Reconciler) Stats() (found Differences, rounds, mended, faulted uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.found, r.rounds, r.mended, r.faulted
}

func (r *Reconciler) count(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
}

// Round compares once, checkpoints sequence numbers, and has mended what was missing in the backend twice in a row.
func (r *Reconciler) Round(ctx context.Context) error {
	books, clear, err := r.cfg.Books.Sets(ctx)
	if err != nil {
		return fmt.Errorf("ask workers: %w", err)
	}
	survey, err := r.cfg.Backend.Survey(ctx)
	if err != nil {
		return fmt.Errorf("survey backend: %w", err)
	}
	var now [Kinds]map[uint64]bool
	for k := range now {
		now[k] = make(map[uint64]bool)
	}
	for id := range books {
		if _, ok := survey.Sets[id]; !ok {
			now[BackendMissing][id] = true
		}
	}
	for id := range survey.Sets {
		if _, ok := books[id]; !ok {
			now[BackendExtra][id] = true
		}
	}
	maps.Copy(books, clear)
	if err := r.compareStore(ctx, books, &now); err != nil {
		return err
	}
	var found Differences
	for k := range now {
		for id := range now[k] {
			if r.open[k][id] {
				found[k]++
				r.cfg.Log.Warn("SA set differs", "sa_set", id, "kind", Kind(k).String()) //nolint:gosec // a small enumeration
			}
		}
	}
	found[BackendExtra] += survey.Orphans
	var lost []uint64
	for id := range now[BackendMissing] {
		if r.open[BackendMissing][id] {
			lost = append(lost, id)
		}
	}
	err = r.mend(ctx, lost)
	r.open = now
	r.count(func() { r.found, r.rounds = found, r.rounds+1 })
	return errors.Join(err, r.checkpoint(survey.Sets))
}

// compareStore compares the workers with the store, once everything that they have said has reached it.
func (r *Reconciler) compareStore(ctx context.Context, books map[uint64]bool, now *[Kinds]map[uint64]bool) error {
	if r.cfg.Store == nil {
		return nil
	}
	if err := r.cfg.Writer.Flush(ctx); err != nil {
		return err
	}
	ids, err := r.cfg.Store.SetIDs(ctx)
	if err != nil {
		return fmt.Errorf("list store: %w", err)
	}
	stored := make(map[uint64]bool, len(ids))
	for _, id := range ids {
		stored[id] = true
		if _, ok := books[id]; !ok {
			now[StoreExtra][id] = true
		}
	}
	for id, kept := range books {
		if kept && !stored[id] {
			now[StoreMissing][id] = true
		}
	}
	return nil
}

// mend has sets installed again, no more at a time than the backend lets wait.
func (r *Reconciler) mend(ctx context.Context, ids []uint64) error {
	var errs []error
	for turn := range slices.Chunk(ids, installWindow) {
		if err := r.mendTurn(ctx, turn); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// mendTurn mends some sets. Their numbers move on from the last checkpoint, as after a reboot, and the new marks are in the
// store before the first of them is used.
func (r *Reconciler) mendTurn(ctx context.Context, ids []uint64) error {
	var errs []error
	ready := make(map[uint64]sa.Counters, len(ids))
	for _, id := range ids {
		c, err := r.last[id].Ahead(Block)
		if err == nil && r.cfg.Writer != nil {
			err = r.cfg.Writer.Checkpoint(store.Mark{Set: id, Counters: c})
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("mend SA set %#x: %w", id, err))
			continue
		}
		r.last[id], ready[id] = c, c
	}
	if r.cfg.Writer != nil && len(ready) > 0 {
		if err := r.cfg.Writer.Flush(ctx); err != nil {
			return errors.Join(append(errs, err)...)
		}
	}
	if err := r.cfg.Books.Mend(ctx, ready); err != nil {
		return errors.Join(append(errs, err)...)
	}
	r.count(func() { r.mended += uint64(len(ready)) })
	return errors.Join(errs...)
}

// checkpoint keeps the sequence numbers that have moved.
func (r *Reconciler) checkpoint(sets map[uint64]sa.Counters) error {
	for id := range r.last {
		if _, ok := sets[id]; !ok && !r.open[BackendMissing][id] {
			delete(r.last, id)
		}
	}
	for id, c := range sets {
		if c = c.Max(r.last[id]); c == r.last[id] {
			continue
		}
		r.last[id] = c
		if r.cfg.Writer == nil {
			continue
		}
		if err := r.cfg.Writer.Checkpoint(store.Mark{Set: id, Counters: c}); err != nil {
			return fmt.Errorf("checkpoint sequence numbers: %w", err)
		}
	}
	return nil
}

// Checkpoint keeps the sequence numbers as they are now: at a clean end.
func (r *Reconciler) Checkpoint(ctx context.Context) error {
	if r.cfg.Writer == nil {
		return nil
	}
	survey, err := r.cfg.Backend.Survey(ctx)
	if err != nil {
		return fmt.Errorf("survey backend: %w", err)
	}
	return r.checkpoint(survey.Sets)
}
