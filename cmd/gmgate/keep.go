package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/gmgate/gmgate/control/config"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/proxy"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/control/store"
	"github.com/gmgate/gmgate/control/store/bolt"
	"github.com/gmgate/gmgate/control/survive"
	"github.com/gmgate/gmgate/dataplane/front"
)

// Limits on how long the store may hold up a start and a stop.
const (
	loadTimeout  = time.Minute
	flushTimeout = 5 * time.Second
)

// keeper is what of a daemon survives it. Without a store it still sees to it that nothing of an earlier run is left in
// the ESP backend.
type keeper struct {
	db      *bolt.DB // nil: nothing is kept
	meta    store.Meta
	writer  *store.Writer
	outcome *survive.Outcome
	lag     storeLag
	log     *slog.Logger
}

// openKeeper opens the store, if there is one.
func openKeeper(ctx context.Context, cfg *config.Config, log *slog.Logger) (*keeper, error) {
	k := &keeper{log: log, lag: storeLag{log: log}}
	if cfg.Store.Path == "" {
		return k, nil
	}
	if err := os.MkdirAll(filepath.Dir(cfg.Store.Path), 0o700); err != nil { // wherever the key comes from
		return nil, fmt.Errorf("make directory of the store: %w", err)
	}
	key, err := sealingKey(cfg, log)
	if err != nil {
		return nil, err
	}
	defer key.Zero()
	k.db, err = bolt.Open(ctx, cfg.Store.Path, bolt.OpenOptions{Key: key, Quarantine: true})
	if err != nil {
		return nil, err
	}
	if aside, cause := k.db.Quarantined(); aside != "" {
		log.Error("the store was unusable, a new one begins: phones will register anew", "moved_to", aside, "error", cause)
	}
	if k.meta, err = k.db.Meta(ctx); err != nil {
		return nil, errors.Join(err, k.db.Close())
	}
	return k, nil
}

// sealingKey returns the key of the store. A store whose key file is gone can never be read again: it makes way for a
// new one.
func sealingKey(cfg *config.Config, log *slog.Logger) (ims.Key, error) {
	if cfg.Store.Credential != "" {
		return store.CredentialKey(cfg.Store.Credential)
	}
	file := cfg.Store.KeyFile
	if file == "" {
		file = cfg.Store.Path + ".key"
	}
	_, keyErr := os.Lstat(file)
	_, dbErr := os.Lstat(cfg.Store.Path)
	if errors.Is(keyErr, fs.ErrNotExist) && dbErr == nil {
		aside := cfg.Store.Path + ".lost-key-" + strconv.FormatInt(time.Now().Unix(), 10)
		if err := os.Rename(cfg.Store.Path, aside); err != nil {
			return nil, fmt.Errorf("move store aside: %w", err)
		}
		log.Error("the key file of the store is missing, a new store begins: phones will register anew",
			"key_file", file, "moved_to", aside)
	}
	return store.KeyFile(file)
}

// tokenKey returns the key of flow tokens: that of the run before, or a new one.
func (k *keeper) tokenKey() (ims.Key, error) {
	if len(k.meta.TokenKey) > 0 {
		return k.meta.TokenKey, nil
	}
	key, err := proxy.NewTokenKey()
	if err != nil {
		return nil, err
	}
	k.meta.TokenKey, k.meta.TokenEpoch = key, k.meta.TokenEpoch+1
	return key, nil
}

// load brings store and ESP backend together before there are workers. The store is this run's from now on.
func (k *keeper) load(ctx context.Context, cfg *config.Config, shared *proxy.Config, back sa.Backend) error {
	ctx, cancel := context.WithTimeout(ctx, loadTimeout)
	defer cancel()
	if k.db == nil {
		a, err := back.Adopt(ctx, nil)
		k.outcome = &survive.Outcome{Workers: make([]survive.Worker, shared.Workers), SPIs: a.Foreign, Foreign: a.Foreign, Orphans: a.Removed}
		return err
	}
	clean := k.meta.Clean
	began := time.Now()
	var err error
	k.outcome, err = survive.Load(ctx, survive.Config{
		Store: k.db, Backend: back, Workers: shared.Workers, Fit: shared.Fit, Now: time.Now, Log: k.log,
		Owner: func(ue netip.Addr) int { return front.Owner(ue, shared.Workers) },
	})
	if err != nil {
		return err
	}
	k.meta.Instance, k.meta.Workers, k.meta.Clean = cfg.Instance, uint16(shared.Workers), false //nolint:gosec // at most 256
	if err := k.db.SetMeta(ctx, k.meta); err != nil {
		return err
	}
	stored := make([]uint64, 0, len(k.outcome.Known))
	for id := range k.outcome.Known {
		stored = append(stored, id)
	}
	k.writer = store.NewWriter(store.WriterConfig{Store: k.db, Observer: &k.lag, Stored: stored})
	shared.Store = k.writer
	shared.Moved = make(map[proxy.Name]proxy.Name, len(k.outcome.Moved))
	for from, to := range k.outcome.Moved {
		shared.Moved[tokenName(from)] = tokenName(to)
		shared.MwPorts = max(shared.MwPorts, int(from.Worker)+1)
	}
	o := k.outcome
	ues := 0
	for i := range o.Workers {
		ues += len(o.Workers[i].UEs)
	}
	k.log.Info("took over registrations", "ues", ues, "sa_sets_adopted", o.Adopted, "sa_sets_reinstalled", o.Reinstalled,
		"sa_sets_expired", o.Expired, "sa_sets_dropped", o.Dropped, "orphan_sas_removed", o.Orphans,
		"moved_to_other_workers", o.Relocated, "records_lost", o.Faults, "stopped_cleanly", clean,
		"took", time.Since(began).Round(time.Millisecond))
	return nil
}

func tokenName(n survive.Name) proxy.Name {
	return proxy.Name{Worker: uint8(n.Worker), UE: n.Index, Gen: n.Gen} //nolint:gosec // at most 256 workers
}

// hand gives a worker what it goes on with.
func (k *keeper) hand(i int, w *proxy.Worker) {
	for _, spi := range k.outcome.SPIs {
		w.Reserve(spi)
	}
	from := &k.outcome.Workers[i]
	kept := &proxy.Kept{Freed: from.Freed, LastID: from.LastID, Labels: k.outcome.Labels, UEs: make([]proxy.KeptUE, len(from.UEs))}
	for j, u := range from.UEs {
		kept.UEs[j] = proxy.KeptUE(u)
	}
	from.UEs = nil
	w.Restore(kept)
}

// watch starts the reconciler; stop ends it with a last checkpoint. The workers have to have ended before stop.
func (k *keeper) watch(ctx context.Context, cfg *config.Config, shared *proxy.Config, back sa.Backend, m *observe.Metrics) (stop func() error) {
	rc := survive.ReconcilerConfig{
		Books: shared.Fleet, Backend: back, Writer: k.writer, Known: k.outcome.Known, Interval: cfg.Store.Reconcile, Log: k.log,
	}
	if k.db != nil {
		rc.Store = k.db
	}
	r := survive.NewReconciler(rc)
	k.observe(m, r)
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.Run(ctx)
	}()
	return func() error {
		cancel()
		<-done
		last, cancel := context.WithTimeout(context.Background(), flushTimeout)
		defer cancel()
		return r.Checkpoint(last)
	}
}

// close writes what is left, and notes a clean end.
func (k *keeper) close() error {
	if k.db == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), flushTimeout)
	defer cancel()
	var err error
	if k.writer != nil {
		if err = k.writer.Close(ctx); err == nil {
			k.meta.Clean = true
			err = k.db.SetMeta(ctx, k.meta)
		}
	}
	return errors.Join(err, k.db.Close())
}

// release ends the use of the ESP backend: with a store the SAs stay for the next run.
func (k *keeper) release(back sa.Backend) error {
	if k.db != nil {
		return back.Detach()
	}
	return back.Close()
}

// observe exports what was taken over, what the reconciler finds, and how the store does.
func (k *keeper) observe(m *observe.Metrics, r *survive.Reconciler) {
	o := k.outcome
	for _, x := range []struct {
		how string
		n   int
	}{
		{"adopted", o.Adopted}, {"reinstalled", o.Reinstalled}, {"expired", o.Expired}, {"dropped", o.Dropped},
	} {
		m.AddFunc("sa_sets_restored", "SA sets found in the store at the start, by what became of them.", observe.Gauge,
			map[string]string{"how": x.how}, func() float64 { return float64(x.n) })
	}
	m.AddFunc("orphan_sas_removed", "SAs of ours that the ESP backend held at the start and that belonged to no set.", observe.Gauge,
		nil, func() float64 { return float64(o.Orphans) })
	for kind := range survive.Kinds {
		where, what := kind.Labels()
		m.AddFunc("sa_reconcile_diff", "SA sets on which workers and another keeper disagreed twice in a row; should be 0.", observe.Gauge,
			map[string]string{"keeper": where, "kind": what}, func() float64 {
				found, _, _, _ := r.Stats()
				return float64(found[kind])
			})
	}
	stat := func(f func(rounds, mended, faulted uint64) uint64) func() float64 {
		return func() float64 {
			_, rounds, mended, faulted := r.Stats()
			return float64(f(rounds, mended, faulted))
		}
	}
	m.AddFunc("sa_reconcile_rounds_total", "Comparisons of workers, ESP backend and store.", observe.Counter, nil,
		stat(func(rounds, _, _ uint64) uint64 { return rounds }))
	m.AddFunc("sa_sets_mended_total", "SA sets installed again because the ESP backend had lost an SA of them.", observe.Counter, nil,
		stat(func(_, mended, _ uint64) uint64 { return mended }))
	m.AddFunc("sa_reconcile_errors_total", "Comparisons that failed.", observe.Counter, nil,
		stat(func(_, _, faulted uint64) uint64 { return faulted }))
	if k.writer == nil {
		return
	}
	m.AddFunc("store_pending_changes", "Changes that the store does not have yet.", observe.Gauge, nil,
		func() float64 { n, _ := k.writer.Pending(); return float64(n) })
	m.AddFunc("store_lag_seconds", "Age of the oldest change that the store does not have yet.", observe.Gauge, nil,
		func() float64 { _, lag := k.writer.Pending(); return lag.Seconds() })
	m.AddFunc("store_changes_total", "Changes written to the store.", observe.Counter, nil,
		func() float64 { return float64(k.lag.changes.Load()) })
	m.AddFunc("store_batches_total", "Batches written to the store.", observe.Counter, nil,
		func() float64 { return float64(k.lag.batches.Load()) })
	m.AddFunc("store_write_seconds_total", "Time that the store took to write.", observe.Counter, nil,
		func() float64 { return time.Duration(k.lag.took.Load()).Seconds() })
	m.AddFunc("store_errors_total", "Batches that the store did not take; their changes are tried again.", observe.Counter, nil,
		func() float64 { return float64(k.lag.failed.Load()) })
	m.AddFunc("store_size_bytes", "Length of the database file.", observe.Gauge, nil, func() float64 {
		n, err := k.db.Size()
		if err != nil {
			return 0
		}
		return float64(n)
	})
}
