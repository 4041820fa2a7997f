package store_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/control/store"
	"github.com/gmgate/gmgate/control/store/storetest"
)

var errDown = errors.New("disk on fire")

// events collects what an observer is told.
type events struct {
	mu     sync.Mutex
	wrote  []string
	failed []string
	at     []time.Duration // of failures, since start
	start  time.Time
}

func (e *events) Wrote(n int, took, lag time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.wrote = append(e.wrote, fmt.Sprintf("%d %v %v", n, took, lag))
}

func (e *events) Failed(err error, pending int, lag time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.failed = append(e.failed, fmt.Sprintf("%v %d %v", err, pending, lag))
	e.at = append(e.at, time.Since(e.start))
}

func put(t *testing.T, w *store.Writer, sets ...store.Set) {
	t.Helper()
	for i := range sets {
		if err := w.PutSet(&sets[i]); err != nil {
			t.Fatal(err)
		}
	}
}

func ids(t *testing.T, s store.Store) (ids []uint64) {
	t.Helper()
	n, err := store.Read(t.Context(), s)
	if err != nil || len(n.Faults) > 0 {
		t.Fatal(err, n)
	}
	for _, s := range n.Sets {
		ids = append(ids, s.ID)
	}
	return ids
}

func stop(t *testing.T, w *store.Writer) {
	t.Helper()
	if err := w.Close(t.Context()); err != nil {
		t.Errorf("close: %v", err)
	}
}

// Changes of 50 ms share a batch; N of them do not wait.
func TestWriterBatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, e := storetest.NewMemory(), &events{}
		w := store.NewWriter(store.WriterConfig{Store: m, Observer: e, MaxBatch: 10})
		put(t, w, storetest.Set(1))
		time.Sleep(30 * time.Millisecond)
		put(t, w, storetest.Set(2), storetest.Set(1))
		if n, lag := w.Pending(); n != 2 || lag != 30*time.Millisecond {
			t.Errorf("pending %d, lag %v", n, lag)
		}
		time.Sleep(19 * time.Millisecond)
		synctest.Wait()
		if got := m.Batches(); len(got) != 0 {
			t.Errorf("written after 49 ms: %v", got)
		}
		time.Sleep(time.Millisecond)
		synctest.Wait()
		if got := m.Batches(); !slices.Equal(got, []int{2}) {
			t.Errorf("written after 50 ms: %v", got)
		}
		for i := range uint64(25) {
			put(t, w, storetest.Set(100+i))
		}
		synctest.Wait()
		if got := m.Batches(); !slices.Equal(got, []int{2, 10, 10}) {
			t.Errorf("of 25 changes at once: %v", got)
		}
		time.Sleep(50 * time.Millisecond)
		synctest.Wait()
		if got := m.Batches(); !slices.Equal(got, []int{2, 10, 10, 5}) {
			t.Errorf("of 25 changes after 50 ms: %v", got)
		}
		if want := []string{"2 0s 50ms", "10 0s 0s", "10 0s 0s", "5 0s 50ms"}; !slices.Equal(e.wrote, want) {
			t.Errorf("observed %q, want %q", e.wrote, want)
		}
		time.Sleep(time.Hour) // nothing runs while nothing changes
		if n, lag := w.Pending(); n != 0 || lag != 0 {
			t.Errorf("pending %d, lag %v", n, lag)
		}
		stop(t, w)
		if got := len(ids(t, m)); got != 27 {
			t.Errorf("%d sets", got)
		}
	})
}

// The last change of a key wins, and it is a copy.
func TestWriterCoalesces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := storetest.NewMemory()
		w := store.NewWriter(store.WriterConfig{Store: m, Stored: []uint64{}})
		s, r := storetest.Set(1), storetest.Registration(1)
		want := *s.Clone()
		for _, p := range []sa.Phase{sa.Temporary, sa.Old, sa.Established} {
			s.Phase = p
			put(t, w, s)
		}
		r.Contact = "sip:old"
		if err := w.PutRegistration(&r); err != nil {
			t.Fatal(err)
		}
		if err := w.Free(store.Freed{Context: r.Context, Gen: r.Gen}); err != nil {
			t.Fatal(err)
		}
		r = storetest.Registration(1)
		if err := w.PutRegistration(&r); err != nil {
			t.Fatal(err)
		}
		put(t, w, storetest.Set(2)) // never gets there
		if err := errors.Join(w.Checkpoint(store.Mark{Set: 2}), w.DeleteSet(2), w.DeleteSet(3)); err != nil {
			t.Fatal(err)
		}
		other := store.Freed{Context: store.Context{Index: 2}, Gen: 9} // its tokens are out there even if it was never stored
		if err := w.Free(other); err != nil {
			t.Fatal(err)
		}
		for _, us := range []uint32{2000, 3000, 1000} {
			if err := w.Checkpoint(store.Mark{Set: 1, Counters: sa.Counters{us + 1, 4001 - us, us, 4000 - us}}); err != nil {
				t.Fatal(err)
			}
		}
		if n, _ := w.Pending(); n != 4 {
			t.Errorf("%d changes pending, want 4", n)
		}
		s.Keys.Zero()
		r.Bindings[0].Associated[0] = "changed"
		if err := w.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		n, err := store.Read(t.Context(), m)
		if err != nil {
			t.Fatal(err)
		}
		want.Counters = sa.Counters{3001, 3001, 3000, 3000}
		if !slices.EqualFunc(n.Sets, []store.Set{want}, storetest.Equal) ||
			!slices.EqualFunc(n.Registrations, []store.Registration{storetest.Registration(1)}, storetest.EqualRegistrations) ||
			!slices.Equal(n.Freed, []store.Freed{other}) {
			t.Errorf("got %+v", n)
		}
		if got := m.Batches(); !slices.Equal(got, []int{4}) {
			t.Errorf("batches %v", got)
		}
		// Once it was stored, a delete has to be written.
		if err := errors.Join(w.DeleteSet(1), w.Checkpoint(store.Mark{Set: 1})); err != nil {
			t.Fatal(err)
		}
		stop(t, w)
		if got := ids(t, m); len(got) != 0 {
			t.Errorf("left: %v", got)
		}
	})
}

// Sets that were there before the writer are deleted, whether it was told of them or knows nothing.
func TestWriterKnowsWhatIsStored(t *testing.T) {
	for name, stored := range map[string][]uint64{"unknown": nil, "told": {7}} {
		synctest.Test(t, func(t *testing.T) {
			m := storetest.NewMemory()
			if err := m.Apply(t.Context(), store.Batch{Sets: []store.Set{storetest.Set(7)}}); err != nil {
				t.Fatal(err)
			}
			w := store.NewWriter(store.WriterConfig{Store: m, Stored: stored})
			put(t, w, storetest.Set(7))
			if err := w.DeleteSet(7); err != nil {
				t.Fatal(err)
			}
			stop(t, w)
			if got := ids(t, m); len(got) != 0 {
				t.Errorf("%s: left: %v", name, got)
			}
		})
	}
}

// A store that is down is tried again with growing pauses; what counts in the end is the newest state, and no more is
// kept than there are keys.
func TestWriterRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, e := storetest.NewMemory(), &events{start: time.Now()}
		w := store.NewWriter(store.WriterConfig{
			Store: m, Observer: e, Stored: []uint64{}, MinBackoff: 100 * time.Millisecond, MaxBackoff: time.Second,
		})
		put(t, w, storetest.Set(1), storetest.Set(2))
		if err := w.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		m.Fail(errDown)
		s := storetest.Set(1)
		e.start = time.Now()
		for i := range uint64(300) { // 3 s of changes; sets come and go
			s.Over = i
			put(t, w, s, storetest.Set(1000+i))
			if err := w.DeleteSet(1000 + i - 5); err != nil {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Millisecond)
			synctest.Wait()
			// Sets that went before the writer tried to store them leave nothing; of the others a delete each.
			if n, _ := w.Pending(); n > 2+6+6*len(e.at) {
				t.Fatalf("%d changes pending after %d attempts", n, len(e.at))
			}
		}
		ms := time.Millisecond
		if want := []time.Duration{50 * ms, 150 * ms, 350 * ms, 750 * ms, 1550 * ms, 2550 * ms}; !slices.Equal(e.at, want) {
			t.Errorf("attempts at %v, want %v", e.at, want)
		}
		if !strings.HasPrefix(e.failed[5], "disk on fire ") || !strings.HasSuffix(e.failed[5], " 2.55s") {
			t.Errorf("observed %q", e.failed[5])
		}
		put(t, w, s)
		if err := w.DeleteSet(2); err != nil {
			t.Fatal(err)
		}
		m.Fail(nil)
		stop(t, w) // does not wait for the next attempt
		if d := time.Since(e.start); d > 3100*ms {
			t.Errorf("close took until %v", d)
		}
		if got, want := ids(t, m), []uint64{1, 1295, 1296, 1297, 1298, 1299}; !slices.Equal(got, want) {
			t.Errorf("got sets %v, want %v", got, want)
		}
		n, err := store.Read(t.Context(), m)
		if err != nil || n.Sets[0].Over != 299 {
			t.Errorf("got %+v, %v", n.Sets[0], err)
		}
	})
}

// Changes that come while a batch is being written, or fails, win over those in it.
func TestWriterWhileWriting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := storetest.NewMemory()
		w := store.NewWriter(store.WriterConfig{Store: m, MaxBatch: 3, Stored: []uint64{}})
		release := m.Hang()
		put(t, w, storetest.Set(1), storetest.Set(2), storetest.Set(3))
		if err := w.Checkpoint(store.Mark{Set: 1, Counters: sa.Counters{2: 50000}}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // three sets are in flight
		newer := storetest.Set(1)
		newer.Over = 77
		put(t, w, newer, storetest.Set(4))
		if err := w.DeleteSet(2); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if n, lag := w.Pending(); n != 3+4 || lag != time.Second {
			t.Errorf("pending %d, lag %v", n, lag)
		}
		m.Fail(errDown)
		release()
		synctest.Wait()
		if n, lag := w.Pending(); n != 5 || lag != time.Second { // 1, 2 (delete), 3, the mark, 4
			t.Errorf("pending %d, lag %v after the failure", n, lag)
		}
		m.Fail(nil)
		stop(t, w)
		n, err := store.Read(t.Context(), m)
		if err != nil {
			t.Fatal(err)
		}
		if got := ids(t, m); !slices.Equal(got, []uint64{1, 3, 4}) || n.Sets[0].Over != 77 || n.Sets[0].Counters[2] != 50000 {
			t.Errorf("got %+v", n.Sets)
		}
		if got := m.Batches(); !slices.Equal(got, []int{3, 2}) {
			t.Errorf("batches %v", got)
		}
	})
}

// A mark that fails is not put in the place of a newer one, nor of its set.
func TestWriterMarksThatFail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := storetest.NewMemory()
		w := store.NewWriter(store.WriterConfig{Store: m})
		put(t, w, storetest.Set(1), storetest.Set(2))
		if err := w.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		release := m.Hang()
		mark := func(set uint64, us, uc uint32) {
			if err := w.Checkpoint(store.Mark{Set: set, Counters: sa.Counters{uc, us, us, uc}}); err != nil {
				t.Fatal(err)
			}
		}
		mark(1, 900, 700)
		mark(2, 900, 900)
		time.Sleep(50 * time.Millisecond)
		synctest.Wait()
		mark(1, 800, 800)
		if err := w.DeleteSet(2); err != nil {
			t.Fatal(err)
		}
		mark(2, 1000, 1000)
		m.Fail(errDown)
		release()
		synctest.Wait()
		if n, _ := w.Pending(); n != 2 {
			t.Errorf("%d pending", n)
		}
		m.Fail(nil)
		stop(t, w)
		n, err := store.Read(t.Context(), m)
		if err != nil || len(n.Sets) != 1 || n.Sets[0].Counters != (sa.Counters{800, 900, 900, 800}) {
			t.Errorf("got %+v, %v", n, err)
		}
	})
}

// Flush covers what came before it, however many batches that takes, and reports why it could not.
func TestWriterFlush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := storetest.NewMemory()
		w := store.NewWriter(store.WriterConfig{Store: m, MaxBatch: 4, Interval: time.Hour})
		if err := w.Flush(t.Context()); err != nil {
			t.Errorf("flush of nothing: %v", err)
		}
		for i := range uint64(11) {
			put(t, w, storetest.Set(i+1))
		}
		start := time.Now()
		if err := w.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n := len(ids(t, m)); n != 11 || !time.Now().Equal(start) {
			t.Errorf("%d sets after %v", n, time.Since(start))
		}
		m.Fail(errDown)
		put(t, w, storetest.Set(20))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := w.Flush(ctx)
		if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, errDown) || !strings.Contains(err.Error(), "1 changes") {
			t.Errorf("got %v", err)
		}
		m.Fail(nil)
		var wg sync.WaitGroup
		for i := range uint64(5) {
			wg.Go(func() {
				s := storetest.Set(30 + i)
				if err := errors.Join(w.PutSet(&s), w.Flush(t.Context())); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if n, _ := w.Pending(); n != 0 || len(ids(t, m)) != 17 {
			t.Errorf("%d pending, %d stored", n, len(ids(t, m)))
		}
		stop(t, w)
	})
}

func TestWriterClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := storetest.NewMemory()
		w := store.NewWriter(store.WriterConfig{Store: m})
		s, r := storetest.Set(1), storetest.Registration(1)
		bad := s
		bad.ID = 0
		if err := w.PutSet(&bad); !errors.Is(err, store.ErrInvalid) {
			t.Errorf("invalid set: %v", err)
		}
		stop(t, w)
		stop(t, w)
		for name, err := range map[string]error{
			"put set": w.PutSet(&s), "delete set": w.DeleteSet(1), "put registration": w.PutRegistration(&r),
			"free": w.Free(store.Freed{Context: r.Context}), "checkpoint": w.Checkpoint(store.Mark{Set: 1}),
		} {
			if !errors.Is(err, store.ErrClosed) {
				t.Errorf("%s: %v", name, err)
			}
		}
		// One that hangs does not hold the daemon up for longer than it grants.
		w = store.NewWriter(store.WriterConfig{Store: m})
		release := m.Hang()
		defer release()
		put(t, w, s, storetest.Set(2))
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		start := time.Now()
		if err := w.Close(ctx); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "2 changes") {
			t.Errorf("got %v", err)
		}
		if d := time.Since(start); d != 3*time.Second {
			t.Errorf("close took %v", d)
		}
		synctest.Wait()
		if err := w.Flush(t.Context()); err == nil {
			t.Error("flush after a close that lost something succeeds")
		}
	})
}

// Whatever is submitted, in whatever order and however often the store fails: after Close it holds what a map would.
func TestWriterAgainstModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		known := rapid.Bool().Draw(rt, "known")
		steps := rapid.SliceOfN(rapid.IntRange(0, 1<<20), 1, 120).Draw(rt, "steps")
		synctest.Test(t, func(t *testing.T) {
			m := storetest.NewMemory()
			sets, contexts := map[uint64]store.Set{}, map[uint32]any{}
			var stored []uint64
			for id := range uint64(3) {
				s := storetest.Set(id + 1)
				sets[s.ID] = s
				if err := m.Apply(t.Context(), store.Batch{Sets: []store.Set{s}}); err != nil {
					t.Fatal(err)
				}
				stored = append(stored, s.ID)
			}
			cfg := store.WriterConfig{Store: m, MaxBatch: 3}
			if known {
				cfg.Stored = stored
			}
			live := slices.Clone(stored)
			w := store.NewWriter(cfg)
			for i, step := range steps {
				n, at := uint64(step>>4%6)+1, step>>4%len(live)
				var err error
				switch step % 8 {
				case 0: // ids are not used again
					s := storetest.Set(100 + uint64(i))
					sets[s.ID], live = s, append(live, s.ID)
					err = w.PutSet(&s)
				case 1:
					s := sets[live[at]]
					if s.ID == 0 { // gone
						break
					}
					s.Over = uint64(i)
					sets[s.ID] = s
					err = w.PutSet(&s)
				case 2:
					delete(sets, live[at])
					err = w.DeleteSet(live[at])
				case 3:
					r := storetest.Registration(uint32(n))
					r.Gen = uint16(i)
					contexts[uint32(n)] = r
					err = w.PutRegistration(&r)
				case 4:
					f := store.Freed{Context: storetest.Registration(uint32(n)).Context, Gen: uint16(i)}
					contexts[uint32(n)] = f
					err = w.Free(f)
				case 5:
					k := store.Mark{Set: live[at], Counters: sa.Counters{uint32(i), 1: uint32(step), 3: uint32(i)}}
					if s, ok := sets[k.Set]; ok {
						s.Counters = s.Counters.Max(k.Counters)
						sets[k.Set] = s
					}
					err = w.Checkpoint(k)
				case 6:
					time.Sleep(time.Duration(step>>4%100) * time.Millisecond)
				case 7:
					if step>>4%2 == 0 {
						m.Fail(errDown)
					} else {
						m.Fail(nil)
					}
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			m.Fail(nil)
			stop(t, w)
			got, err := store.Read(t.Context(), m)
			if err != nil {
				t.Fatal(err)
			}
			if len(got.Sets) != len(sets) || len(got.Registrations)+len(got.Freed) != len(contexts) {
				rt.Fatalf("got %d sets, want %d; %d contexts, want %d", len(got.Sets), len(sets), len(got.Registrations)+len(got.Freed), len(contexts))
			}
			for _, s := range got.Sets {
				if !storetest.Equal(s, sets[s.ID]) {
					rt.Fatalf("got %+v, want %+v", s, sets[s.ID])
				}
			}
			for _, r := range got.Registrations {
				if want, ok := contexts[r.Index].(store.Registration); !ok || !storetest.EqualRegistrations(r, want) {
					rt.Fatalf("got %+v, want %+v", r, contexts[r.Index])
				}
			}
			for _, f := range got.Freed {
				if f != contexts[f.Index] {
					rt.Fatalf("got %+v, want %+v", f, contexts[f.Index])
				}
			}
		})
	})
}

// Many workers at once, for the race detector.
func TestWriterConcurrent(t *testing.T) {
	m := storetest.NewMemory()
	w := store.NewWriter(store.WriterConfig{Store: m, MaxBatch: 50, Interval: time.Millisecond, Stored: []uint64{}})
	const workers, rounds = 4, 300
	var wg sync.WaitGroup
	for k := range uint64(workers) {
		wg.Go(func() {
			for i := range uint64(rounds) {
				s := storetest.Set(k<<48 | (i%20 + 1))
				s.Over = i
				err := w.PutSet(&s)
				if i%20 == 7 {
					err = errors.Join(err, w.DeleteSet(s.ID))
				}
				if err = errors.Join(err, w.Checkpoint(store.Mark{Set: s.ID, Counters: sa.Counters{2: uint32(i)}})); err != nil {
					t.Error(err)
				}
				if i == rounds/2 {
					if err := w.Flush(t.Context()); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	stop(t, w)
	if got := len(ids(t, m)); got != workers*19 {
		t.Errorf("%d sets, want %d", got, workers*19)
	}
}

// What a change costs the worker that submits it.
func BenchmarkWriterPutSet(b *testing.B) {
	w := store.NewWriter(store.WriterConfig{Store: storetest.NewMemory(), Interval: time.Hour, MaxBatch: 1 << 30})
	sets := make([]store.Set, 1000)
	for i := range sets {
		sets[i] = storetest.Set(uint64(i) + 1)
	}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		if err := w.PutSet(&sets[i%len(sets)]); err != nil {
			b.Fatal(err)
		}
		i++
	}
	if err := w.Close(b.Context()); err != nil {
		b.Fatal(err)
	}
}
