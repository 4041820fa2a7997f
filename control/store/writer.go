package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Implementation constants of the Writer: defaults of its Config. The interval is what a crash may cost; in a
// batch of 1000 a set costs store/bolt 14 µs, in one of 64 24 µs, alone 270 µs (BenchmarkApply).
const (
	DefaultInterval   = 50 * time.Millisecond
	DefaultMaxBatch   = 1000
	DefaultMinBackoff = 100 * time.Millisecond
	DefaultMaxBackoff = 5 * time.Second
)

// WriterObserver is told what becomes of changes. Its methods run on the Writer's goroutine and must not block.
type WriterObserver interface {
	// Wrote is called after a batch was applied: took is the time of the store, lag the age of its oldest change.
	Wrote(changes int, took, lag time.Duration)

	// Failed is called after a batch was not applied. Its changes stay pending; lag is the age of the oldest.
	Failed(err error, pending int, lag time.Duration)
}

// WriterConfig is what a Writer works with. Zero values of times and sizes mean the defaults.
type WriterConfig struct {
	Store    Store
	Observer WriterObserver // may be nil

	Interval   time.Duration // a change waits this long at most for others to share its batch
	MaxBatch   int           // this many changes do not wait, and no batch has more
	MinBackoff time.Duration // after the first failure; doubles with each further one
	MaxBackoff time.Duration

	// Stored are the ids of the sets which the store holds now, as SetIDs returns them. With them the Writer knows which sets never reached the
	// store and forgets such a set without a trace when it is deleted. Nil means unknown: every delete is written.
	Stored []uint64
}

// Writer writes changes behind. Its methods may be called from any goroutine and never wait for the store: they hold a
// lock for the time of a map access, which the writing goroutine holds only to take or give back one batch.
//
// The last change of a key wins. What is pending is bounded by the number of keys, however long the store is down: one
// change per live set and registration, one mark per set, and one delete per set that the store may hold. Of what is not
// pending it keeps the ids of stored sets only.
type Writer struct {
	cfg    WriterConfig
	ctx    context.Context // of the store's calls; ended by a Close that runs out of time
	cancel context.CancelFunc
	wake   chan struct{} // 1 deep: something changed that run has to look at
	done   chan struct{}

	mu       sync.Mutex
	entries  map[entryKey]*entry // what is pending or in flight
	stored   map[uint64]struct{} // sets that the store may hold; nil: unknown
	head     entry               // ring of what is pending, oldest first
	pending  int
	inFlight int
	changes  uint64 // submitted so far
	waiters  []waiter
	urgent   bool // a Flush came in: do not wait for others, nor for the backoff to end
	retryAt  time.Time
	closed   bool
	lastErr  error // of the last attempt

	flightSince time.Time // when the oldest change in flight came
}

type entryKey struct {
	kind   Kind
	worker uint16
	id     uint64
}

// entry is a key with its change.
type entry struct {
	key        entryKey
	change     any // *Set, deletion, *Registration, Freed or Mark; nil when nothing is pending
	prev, next *entry
	first      uint64    // number of the oldest change in it
	since      time.Time // when that came
}

// deletion is the change that deletes a set.
type deletion struct{}

type waiter struct {
	upTo uint64
	done chan struct{}
}

// flight is a change that is being written.
type flight struct {
	e      *entry
	change any
	first  uint64
	since  time.Time
}

// NewWriter starts a writer. It ends with Close.
func NewWriter(cfg WriterConfig) *Writer {
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&cfg.Interval, DefaultInterval)
	def(&cfg.MinBackoff, DefaultMinBackoff)
	def(&cfg.MaxBackoff, DefaultMaxBackoff)
	if cfg.MaxBatch <= 0 {
		cfg.MaxBatch = DefaultMaxBatch
	}
	w := &Writer{cfg: cfg, wake: make(chan struct{}, 1), done: make(chan struct{}), entries: make(map[entryKey]*entry)}
	w.ctx, w.cancel = context.WithCancel(context.Background())
	w.head.prev, w.head.next = &w.head, &w.head
	if cfg.Stored != nil {
		w.stored = make(map[uint64]struct{}, len(cfg.Stored))
		for _, id := range cfg.Stored {
			w.stored[id] = struct{}{}
		}
		w.cfg.Stored = nil
	}
	go w.run()
	return w
}

// PutSet submits a set, of which it makes a copy. It fails with ErrInvalid or ErrClosed.
func (w *Writer) PutSet(s *Set) error {
	if err := s.Validate(); err != nil {
		return err
	}
	return w.submit(entryKey{kind: KindSet, id: s.ID}, s.Clone())
}

// DeleteSet submits the end of a set and of its marks. It fails with ErrClosed.
func (w *Writer) DeleteSet(id uint64) error {
	return w.submit(entryKey{kind: KindSet, id: id}, deletion{})
}

// PutRegistration submits a registration, of which it makes a copy. It fails with ErrInvalid or ErrClosed.
func (w *Writer) PutRegistration(r *Registration) error {
	if err := r.Validate(); err != nil {
		return err
	}
	return w.submit(entryKey{kind: KindRegistration, worker: r.Worker, id: uint64(r.Index)}, r.Clone())
}

// Free submits the end of a registration. It fails with ErrInvalid or ErrClosed.
func (w *Writer) Free(f Freed) error {
	if err := f.Validate(); err != nil {
		return err
	}
	return w.submit(entryKey{kind: KindRegistration, worker: f.Worker, id: uint64(f.Index)}, f)
}

// Checkpoint submits the marks of a set. It fails with ErrInvalid or ErrClosed.
func (w *Writer) Checkpoint(m Mark) error {
	if err := m.Validate(); err != nil {
		return err
	}
	return w.submit(entryKey{kind: KindMark, id: m.Set}, m)
}

// Pending returns how many changes the store does not have yet and how old the oldest of them is.
func (w *Writer) Pending() (changes int, lag time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.inFlight > 0:
		lag = time.Since(w.flightSince)
	case w.pending > 0:
		lag = time.Since(w.head.next.since)
	}
	return w.pending + w.inFlight, lag
}

// Flush waits until everything that was submitted before is in the store, or until ctx ends; then the error says why
// the store did not take it, if that is known.
func (w *Writer) Flush(ctx context.Context) error {
	w.mu.Lock()
	if w.pending+w.inFlight == 0 {
		w.mu.Unlock()
		return nil
	}
	f := waiter{w.changes, make(chan struct{})}
	w.waiters = append(w.waiters, f)
	w.urgent = true
	w.mu.Unlock()
	w.poke()
	select {
	case <-f.done:
		return nil
	case <-ctx.Done():
	case <-w.done: // a Close ran out of time
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range w.waiters {
		if w.waiters[i].done == f.done {
			w.waiters = append(w.waiters[:i], w.waiters[i+1:]...)
			return fmt.Errorf("flush store: %d changes are not written: %w", w.pending+w.inFlight,
				errors.Join(context.Cause(ctx), w.lastErr))
		}
	}
	return nil // it came in time after all
}

// Close refuses further changes, writes what is pending until ctx ends, and ends the goroutine. It does not close the
// store. When ctx ends first, the error says how much is lost.
func (w *Writer) Close(ctx context.Context) error {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.poke()
	err := w.Flush(ctx)
	w.cancel()
	select {
	case <-w.done:
	case <-ctx.Done(): // the store hangs: run ends when it lets go
	}
	return err
}

// submit makes change the pending change of a key.
func (w *Writer) submit(k entryKey, change any) error {
	now := time.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		forget(change)
		return ErrClosed
	}
	e := w.entries[k]
	switch c := change.(type) {
	case deletion:
		if m := w.entries[entryKey{kind: KindMark, id: k.id}]; m != nil {
			w.unlink(m)
			w.release(m)
		}
		if _, stored := w.stored[k.id]; w.stored != nil && !stored { // the store never heard of it
			if e != nil {
				w.unlink(e)
				w.release(e)
			}
			return nil
		}
	case Mark:
		if s := w.entries[entryKey{kind: KindSet, id: k.id}]; s != nil && s.change == (deletion{}) {
			return nil
		}
		if e != nil {
			if old, ok := e.change.(Mark); ok {
				c.Counters = c.Counters.Max(old.Counters)
				change = c
			}
		}
	}
	if e == nil {
		e = &entry{key: k}
		w.entries[k] = e
	}
	w.changes++
	if e.change != nil {
		forget(e.change)
		e.change = change
		return nil
	}
	e.change, e.first, e.since = change, w.changes, now
	w.link(e, w.head.prev)
	if w.pending == 1 || w.pending == w.cfg.MaxBatch {
		w.poke()
	}
	return nil
}

// link puts an entry into the ring after at.
func (w *Writer) link(e, at *entry) {
	e.prev, e.next = at, at.next
	at.next.prev, at.next = e, e
	w.pending++
}

// unlink takes an entry out of the ring, if it is there, and forgets its change.
func (w *Writer) unlink(e *entry) {
	if e.change == nil {
		return
	}
	forget(e.change)
	e.prev.next, e.next.prev = e.next, e.prev
	e.prev, e.next, e.change = nil, nil, nil
	w.pending--
}

// release drops an entry that has nothing to tell any more.
func (w *Writer) release(e *entry) {
	if e.change == nil {
		delete(w.entries, e.key)
	}
}

// forget zeroes the keys of a change that is not needed any more.
func forget(change any) {
	if s, ok := change.(*Set); ok {
		s.Keys.Zero()
	}
}

func (w *Writer) poke() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// run writes batches until the Writer is closed and has nothing left, or until its context ends.
func (w *Writer) run() {
	defer close(w.done)
	defer w.drop()
	timer := time.NewTimer(0)
	defer timer.Stop()
	backoff := w.cfg.MinBackoff
	for {
		wait, due, end := w.due(time.Now())
		if end || w.ctx.Err() != nil {
			return
		}
		if !due {
			var expired <-chan time.Time
			if wait > 0 {
				timer.Reset(wait)
				expired = timer.C
			}
			select {
			case <-expired:
			case <-w.wake:
			case <-w.ctx.Done():
			}
			continue
		}
		if w.write(backoff) {
			backoff = w.cfg.MinBackoff
		} else {
			backoff = min(2*backoff, w.cfg.MaxBackoff)
		}
	}
}

// due says whether to write now, else how long to wait: zero means for the next change.
func (w *Writer) due(now time.Time) (wait time.Duration, due, end bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.pending == 0 {
		w.urgent = false
		return 0, false, w.closed
	}
	if w.urgent {
		return 0, true, false
	}
	if wait := w.retryAt.Sub(now); wait > 0 {
		return wait, false, false
	}
	if w.pending >= w.cfg.MaxBatch || w.closed || len(w.waiters) > 0 || !w.retryAt.IsZero() {
		return 0, true, false
	}
	wait = w.head.next.since.Add(w.cfg.Interval).Sub(now)
	return wait, wait <= 0, false
}

// write applies the oldest changes as one batch. When the store does not take it they become pending again, except
// where a newer change has come.
func (w *Writer) write(backoff time.Duration) bool {
	batch, flights := w.take()
	start := time.Now()
	err := w.cfg.Store.Apply(w.ctx, batch)
	now := time.Now()
	oldest := now.Sub(flights[0].since)
	if err == nil {
		w.finish(flights)
		if w.cfg.Observer != nil {
			w.cfg.Observer.Wrote(len(flights), now.Sub(start), oldest)
		}
		return true
	}
	pending := w.giveBack(flights, err, now.Add(backoff))
	if w.cfg.Observer != nil {
		w.cfg.Observer.Failed(err, pending, oldest)
	}
	return false
}

func (w *Writer) take() (b Batch, flights []flight) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.urgent = false
	flights = make([]flight, 0, min(w.pending, w.cfg.MaxBatch))
	for len(flights) < cap(flights) {
		e := w.head.next
		flights = append(flights, flight{e, e.change, e.first, e.since})
		switch c := e.change.(type) {
		case *Set:
			b.Sets = append(b.Sets, *c)
			if w.stored != nil {
				w.stored[e.key.id] = struct{}{} // perhaps even if the store reports an error
			}
		case deletion:
			b.DeleteSets = append(b.DeleteSets, e.key.id)
		case *Registration:
			b.Registrations = append(b.Registrations, *c)
		case Freed:
			b.Free = append(b.Free, c)
		case Mark:
			b.Marks = append(b.Marks, c)
		}
		e.prev.next, e.next.prev = e.next, e.prev
		e.prev, e.next, e.change = nil, nil, nil
		w.pending--
	}
	w.inFlight, w.flightSince = len(flights), flights[0].since
	return b, flights
}

// finish forgets what was applied.
func (w *Writer) finish(flights []flight) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range flights {
		forget(f.change)
		if f.change == (deletion{}) {
			delete(w.stored, f.e.key.id)
		}
		// The entry may have been released and made anew meanwhile; then this one is nobody's.
		if w.entries[f.e.key] == f.e {
			w.release(f.e)
		}
	}
	if len(w.entries) == 0 {
		w.entries = make(map[entryKey]*entry) // a map never shrinks, and this one may have been large
	}
	w.inFlight, w.retryAt, w.lastErr = 0, time.Time{}, nil
	rest := w.waiters[:0]
	for _, x := range w.waiters {
		if w.pending > 0 && w.head.next.first <= x.upTo {
			rest = append(rest, x)
			continue
		}
		close(x.done)
	}
	w.waiters = rest
}

// giveBack makes changes pending again, at the front and in their order.
func (w *Writer) giveBack(flights []flight, err error, retryAt time.Time) (pending int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range slices.Backward(flights) {

		e, change := f.e, f.change
		if now := w.entries[e.key]; now != e {
			// A mark whose set was deleted meanwhile, or one that came after it.
			forget(change)
			continue
		}
		if e.change != nil { // a newer change takes the place, so that it waits no longer than the older would have
			newer := e.change
			if m, ok := newer.(Mark); ok {
				m.Counters = m.Counters.Max(change.(Mark).Counters)
				newer = m
			}
			forget(change)
			e.change = deletion{} // nothing that unlink could zero
			w.unlink(e)
			change = newer
		}
		e.change, e.first, e.since = change, f.first, f.since
		w.link(e, &w.head)
	}
	w.inFlight, w.retryAt, w.lastErr = 0, retryAt, err
	return w.pending
}

// drop zeroes what will never be written.
func (w *Writer) drop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for e := w.head.next; e != &w.head; e = e.next {
		forget(e.change)
	}
}
