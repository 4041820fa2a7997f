package main

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/proxy"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/guard"
)

// doorBooks are the workers, who decide which sets there are; proxy.Fleet is that.
type doorBooks interface {
	Sets(ctx context.Context) (sets, clear map[uint64]bool, err error)
	UEs(ctx context.Context, q proxy.UEQuery, after proxy.UEID, limit int) (list []proxy.UEInfo, more bool, err error)
}

// door is what an auditor needs of the guard.
type door interface {
	doorman
	Compare(want map[uint64]bool) (guard.Difference, error)
	Evict(set uint64) error
}

// auditor compares the guard with the workers and mends it: a set that the guard does not let pass is a phone cut off, an SPI
// of no set is a hole. What is under way at the moment of one round is no difference, so two rounds in a row have to find it.
type auditor struct {
	books    doorBooks
	door     door
	interval time.Duration
	log      *slog.Logger

	open guard.Difference // found by the round before

	missing, extra, failed atomic.Uint64 // mended, and rounds that could not compare
}

// auditPage is how many UE contexts are asked for at a time.
const auditPage = 1000

// run does a round each interval until ctx ends.
func (a *auditor) run(ctx context.Context) {
	t := time.NewTicker(a.interval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		round, cancel := context.WithTimeout(ctx, a.interval)
		if err := a.round(round); err != nil && ctx.Err() == nil {
			a.failed.Add(1)
			a.log.Error("cannot compare the guard with the SA sets", "error", err)
		}
		cancel()
	}
}

func (a *auditor) round(ctx context.Context) error {
	sets, _, err := a.books.Sets(ctx)
	if err != nil {
		return err
	}
	now, err := a.door.Compare(sets)
	if err != nil {
		return err
	}
	missing, extra := both(a.open.Missing, now.Missing), both(a.open.Extra, now.Extra)
	a.open = now
	for id := range extra {
		a.log.Warn("the guard lets an SA set pass that there is not", "sa_set", id)
		if err := a.door.Evict(id); err != nil {
			return err
		}
		a.extra.Add(1)
	}
	return a.let(ctx, missing)
}

// both returns what is in both lists.
func both(before, now []uint64) map[uint64]bool {
	common := make(map[uint64]bool)
	was := make(map[uint64]bool, len(before))
	for _, id := range before {
		was[id] = true
	}
	for _, id := range now {
		if was[id] {
			common[id] = true
		}
	}
	return common
}

// let makes the guard let sets pass again.
func (a *auditor) let(ctx context.Context, sets map[uint64]bool) error {
	var after proxy.UEID
	for more := len(sets) > 0; more; {
		var list []proxy.UEInfo
		var err error
		if list, more, err = a.books.UEs(ctx, proxy.UEQuery{}, after, auditPage); err != nil {
			return err
		}
		for i := range list {
			u := &list[i]
			after = u.ID
			for _, s := range u.Sets {
				if !sets[s.ID] {
					continue
				}
				a.log.Warn("the guard does not let an SA set pass, it does now", "sa_set", s.ID)
				if err := a.door.Add(sa.Params{ID: s.ID, Label: s.Label, Local: u.Local, UE: u.Addr, Ports: s.Ports, SPIs: s.SPIs}); err != nil {
					return err
				}
				a.missing.Add(1)
			}
		}
	}
	return nil
}

// watch compares the guard with the workers until stop, and exports what it had to mend.
func (f *filter) watch(ctx context.Context, fleet *proxy.Fleet, interval time.Duration, m *observe.Metrics) (stop func()) {
	if f.Guard == nil {
		return func() {}
	}
	a := &auditor{books: fleet, door: f.Guard, interval: interval, log: f.log}
	for kind, n := range map[string]*atomic.Uint64{"missing": &a.missing, "extra": &a.extra} {
		m.AddFunc("guard_mended_total", "SA sets on which guard and workers disagreed twice in a row, put right; should be 0.",
			observe.Counter, map[string]string{"kind": kind}, func() float64 { return float64(n.Load()) })
	}
	m.AddFunc("guard_compare_errors_total", "Comparisons of guard and workers that failed.", observe.Counter, nil,
		func() float64 { return float64(a.failed.Load()) })
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		a.run(ctx)
	}()
	return func() { cancel(); <-done }
}
