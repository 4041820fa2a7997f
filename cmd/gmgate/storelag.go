package main

import (
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/gmgate/gmgate/control/store"
)

// storeLag counts what the store's writer does.
type storeLag struct {
	log                      *slog.Logger
	changes, batches, failed atomic.Uint64
	took                     atomic.Int64 // nanoseconds
	down                     bool         // the last batch was not taken; of the writer's goroutine
}

var _ store.WriterObserver = (*storeLag)(nil)

// Wrote implements store.WriterObserver.
func (l *storeLag) Wrote(changes int, took, _ time.Duration) {
	l.changes.Add(uint64(changes)) //nolint:gosec // never negative
	l.batches.Add(1)
	l.took.Add(int64(took))
	if l.down {
		l.down = false
		l.log.Info("store takes changes again")
	}
}

// Failed implements store.WriterObserver.
func (l *storeLag) Failed(err error, pending int, lag time.Duration) {
	l.failed.Add(1)
	if !l.down {
		l.down = true
		l.log.Error("store does not take changes", "error", err, "pending", pending, "lag", lag)
	}
}
