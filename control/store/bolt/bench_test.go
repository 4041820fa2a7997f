package bolt

import (
	"context"
	"fmt"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/control/store"
	"github.com/gmgate/gmgate/control/store/storetest"
)

// population is how many UEs a busy host has.
const population = 100_000

// populate stores n UEs, a set and a registration each, in the batches of a Writer.
func populate(b *testing.B, d *DB, n int) {
	b.Helper()
	const width = store.DefaultMaxBatch / 2
	for at := 0; at < n; at += width {
		var batch store.Batch
		for i := at; i < min(at+width, n); i++ {
			s := storetest.Set(uint64(i%4)<<48 | uint64(i+1)) // of four workers
			batch.Sets = append(batch.Sets, s)
			batch.Registrations = append(batch.Registrations, storetest.Registration(uint32(i+1)))
		}
		apply(b, d, batch)
	}
}

// BenchmarkApply replaces records of a store that holds 10,000 UEs: one operation is one batch.
func BenchmarkApply(b *testing.B) {
	d := openOrFail(b, filepath.Join(b.TempDir(), "store"))
	populate(b, d, 10_000)
	for _, size := range []int{1, 64, 1000} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			sets := make([]store.Set, size)
			at := 0
			b.ReportAllocs()
			for b.Loop() {
				for i := range sets {
					at = (at + 7919) % 10_000
					sets[i] = storetest.Set(uint64(at%4)<<48 | uint64(at+1))
				}
				apply(b, d, store.Batch{Sets: sets})
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*size), "µs/set")
		})
	}
	closeOrFail(b, d)
}

// BenchmarkCheckpoint moves the marks of 1000 sets.
func BenchmarkCheckpoint(b *testing.B) {
	d := openOrFail(b, filepath.Join(b.TempDir(), "store"))
	populate(b, d, 10_000)
	marks := make([]store.Mark, 1000)
	seq := uint32(1 << 20)
	for b.Loop() {
		seq++
		for i := range marks {
			n := i * 10
			marks[i] = store.Mark{Set: uint64(n%4)<<48 | uint64(n+1), Counters: sa.Counters{2: seq, 3: seq}}
		}
		if err := d.Checkpoint(context.Background(), marks); err != nil {
			b.Fatal(err)
		}
	}
	closeOrFail(b, d)
}

// BenchmarkPopulation stores, opens and loads 100,000 UEs: run it once, with -benchtime 1x.
func BenchmarkPopulation(b *testing.B) {
	for b.Loop() {
		path := filepath.Join(b.TempDir(), "store")
		start := time.Now()
		d := openOrFail(b, path)
		populate(b, d, population)
		b.ReportMetric(time.Since(start).Seconds(), "s-store")
		size := len(trimmed(b, path))
		b.ReportMetric(float64(size)/population, "B/UE")
		closeOrFail(b, d)
		runtime.GC()

		start = time.Now()
		d = openOrFail(b, path)
		b.ReportMetric(time.Since(start).Seconds(), "s-open")
		start = time.Now()
		sets, registrations := 0, 0
		err := d.Load(context.Background(), &store.Visitor{
			Set:          func(store.Set) error { sets++; return nil },
			Registration: func(store.Registration) error { registrations++; return nil },
			Fault:        func(f store.Fault) error { return f },
		})
		took := time.Since(start)
		if err != nil || sets != population || registrations != population {
			b.Fatalf("%d sets, %d registrations, %v", sets, registrations, err)
		}
		if took > time.Minute { // a bound on what is absurd, not on what is good
			b.Errorf("load took %v", took)
		}
		b.ReportMetric(took.Seconds(), "s-load")
		closeOrFail(b, d)
	}
}
