// Package useresp is the ESP backend in user space: sa.Backend over a Tunnel of package esptun, for hosts and containers
// whose kernel has no ESP.
//
// Invariants. A set is installed with all four SAs or none (TS 33.203 §7.2: the P-CSCF stores the set before SM6). A set
// whose hard limit passes is removed even if nobody asks, so that keys do not stay for ever. Every callback is called
// exactly once.
//
// Restarts. The SAs end with the process, and the hidden namespace with them, so that there is nothing to adopt and
// nothing passes a protected port meanwhile. A set survives by being installed again with sa.Params.Counters moved ahead
// of what was last recorded of it (sa.Counters.Ahead); Survey reads what to record.
//
// Concurrency. Methods may be called from any goroutine and never block; Close and those of sa.Backend do. One goroutine
// of the backend does the work in the order of the calls and runs all callbacks; a callback must not call what blocks.
// Survey reads the tunnel on its caller's goroutine, so that installations do not wait for it.
package useresp

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"math"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/esptun"
	"github.com/gmgate/gmgate/dataplane/hostnet"
)

var _ sa.Backend = (*Backend)(nil)

// Errors that callbacks and callers get, beside those of esptun.Tunnel.Add.
var (
	// ErrBusy: too many operations wait.
	ErrBusy = errors.New("user space ESP backend is busy")
	// ErrClosed: the backend was closed.
	ErrClosed = errors.New("user space ESP backend is closed")
	// ErrUnknown: no set with this ID is installed.
	ErrUnknown = errors.New("SA set is not installed")
	// ErrLate: Adopt was called before, or an Install was.
	ErrLate = errors.New("adoption comes once and before the first installation")
)

// maxQueue is how many operations may wait. One takes about 10 µs, so a full queue is 80 ms of work: a registration that
// would wait longer is better refused. Removals are taken in any case, since nobody would try them again; there can be
// no more of them than sets.
const maxQueue = 8192

// Config describes a backend.
type Config struct {
	Local  []netip.Addr // our Gm addresses; they must be addresses of the host
	Outer  *hostnet.NS  // where the host's addresses are; nil for the process's own namespace
	Window int          // replay window in packets, zero for the default
	Held   bool         // let packets wait until Receive is called
	MTU    int          // of the TUN, zero for the default
	Logger *slog.Logger // nil for slog.Default

	// Expired, if not nil, is called once for each set that the backend removed because its hard limit passed, after the
	// removal. It runs on the backend's goroutine and is bound by the same rules as callbacks.
	Expired func(id uint64)
}

// tunnel is what the backend needs of esptun.Tunnel.
type tunnel interface {
	Add(sas ...esptun.SA) error
	Remove(sas ...esptun.SA)
	Seq(s *esptun.SA) (seq uint32, ok bool)
	All() iter.Seq[esptun.SA]
	Count() int
	Close() error
}

// Backend implements sa.Backend.
type Backend struct {
	tun *esptun.Tunnel
	*engine
}

// New opens the tunnel and starts the backend.
func New(cfg Config) (*Backend, error) {
	tc := esptun.Config{
		Outer: cfg.Outer, OuterAddrs: cfg.Local, Held: cfg.Held, MTU: cfg.MTU, Window: cfg.Window, Logger: cfg.Logger,
	}
	for _, a := range cfg.Local {
		tc.Local = append(tc.Local, netip.PrefixFrom(a, a.BitLen()))
	}
	t, err := esptun.Open(tc)
	if err != nil {
		return nil, fmt.Errorf("start user space ESP backend: %w", err)
	}
	return &Backend{tun: t, engine: newEngine(t, cfg.Logger, cfg.Expired)}, nil
}

// Hidden returns the namespace in which sockets are protected: open the listeners on the protected ports there.
func (b *Backend) Hidden() *hostnet.NS { return b.tun.Hidden() }

// Receive begins with the packets that have waited since New, if Config.Held. It must not be called after Close.
func (b *Backend) Receive() { b.tun.Receive() }

// Stats returns the packet counters.
func (b *Backend) Stats() esptun.Stats { return b.tun.Stats() }

// engine is the backend without its network, so that tests can give it another tunnel and a clock.
type engine struct {
	tun     tunnel
	log     *slog.Logger
	expired func(id uint64) // may be nil
	wake    chan struct{}   // capacity one: there is something in the queue, or closed was set
	done    chan struct{}   // closed when run has returned

	mu     sync.Mutex
	queue  []op
	begun  bool // Install or Adopt was called
	closed bool

	// The rest belongs to run.
	sets      map[uint64]*set
	deadlines deadlines

	closing  sync.Once
	closeErr error
}

type opKind uint8

const (
	opInstall opKind = iota + 1
	opRemove
	opExtend
	opRead   // only reads the books
	opRefuse // only the callback is left to be done
)

type op struct {
	kind opKind
	p    sa.Params
	read func()
	err  error
	done func(error)
}

// set is an installed SA set. Its id and SAs never change.
type set struct {
	id       uint64
	sas      [4]esptun.SA // without keys; Seq is where each began
	deadline time.Time    // zero for none
	index    int          // in the heap, -1 when not there
}

func newEngine(t tunnel, log *slog.Logger, expired func(id uint64)) *engine {
	if log == nil {
		log = slog.Default()
	}
	e := &engine{
		tun: t, log: log, expired: expired, wake: make(chan struct{}, 1), done: make(chan struct{}),
		sets: make(map[uint64]*set),
	}
	go e.run()
	return e
}

// Install implements sa.Installer. Errors are ErrBusy, ErrClosed, sa.ErrSequence and those of esptun.Tunnel.Add.
func (e *engine) Install(p sa.Params, done func(error)) {
	p.Keys = p.Keys.Clone()
	e.enqueue(op{kind: opInstall, p: p, done: done})
}

// Remove implements sa.Installer. The set is found by p.ID.
func (e *engine) Remove(p sa.Params, done func(error)) {
	e.enqueue(op{kind: opRemove, p: sa.Params{ID: p.ID}, done: done})
}

// Extend implements sa.Installer. The set is found by p.ID; zero lifts the limit. Errors are ErrUnknown, ErrBusy and
// ErrClosed.
func (e *engine) Extend(p sa.Params, hard time.Duration, done func(error)) {
	e.enqueue(op{kind: opExtend, p: sa.Params{ID: p.ID, Hard: hard}, done: done})
}

func (e *engine) enqueue(o op) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		go o.done(ErrClosed) // run may be gone
		return
	}
	e.begun = e.begun || o.kind == opInstall
	if len(e.queue) >= maxQueue && o.kind != opRemove && o.kind != opRead {
		o.p.Keys.Zero()
		o = op{kind: opRefuse, err: ErrBusy, done: o.done}
	}
	e.queue = append(e.queue, o)
	e.wakeUp()
}

func (e *engine) wakeUp() {
	select {
	case e.wake <- struct{}{}:
	default: // it will look anyway
	}
}

// Count implements sa.Installer.
func (e *engine) Count() int { return e.tun.Count() }

// Close implements sa.Installer: operations that wait are refused, except removals, which are vacuous now.
func (e *engine) Close() error {
	e.closing.Do(func() {
		e.mu.Lock()
		e.closed = true
		e.mu.Unlock()
		e.wakeUp()
		<-e.done
		e.closeErr = e.tun.Close()
	})
	return e.closeErr
}

// Adopt implements sa.Backend: nothing outlives the process, so there is nothing to adopt and nothing of others. Errors
// are ErrLate and ErrClosed.
func (e *engine) Adopt(ctx context.Context, _ []sa.Params) (sa.Adoption, error) {
	if err := ctx.Err(); err != nil {
		return sa.Adoption{}, fmt.Errorf("adopt SA sets: %w", err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.closed:
		return sa.Adoption{}, fmt.Errorf("adopt SA sets: %w", ErrClosed)
	case e.begun:
		return sa.Adoption{}, fmt.Errorf("adopt SA sets: %w", ErrLate)
	}
	e.begun = true
	return sa.Adoption{}, nil
}

// Detach implements sa.Backend. It is the same as Close: the SAs cannot do without the process.
func (e *engine) Detach() error { return e.Close() }

// Survey implements sa.Backend: it compares the backend's books with the tunnel's table. A difference is a fault of this
// program. Sets that come or go meanwhile may be in it or not. It must not be called from a callback.
func (e *engine) Survey(ctx context.Context) (sa.Survey, error) {
	books, err := readBooks(ctx, e, func() map[uint64]*set { return maps.Clone(e.sets) })
	if err != nil {
		return sa.Survey{}, fmt.Errorf("survey SA sets: %w", err)
	}
	v := sa.Survey{Sets: make(map[uint64]sa.Counters, len(books))}
	var torn []*set        // sets of which an SA is gone, or which were removed meanwhile
	var strays []esptun.SA // SAs of no set, or of one that was installed or removed meanwhile
	for _, s := range books {
		if c, ok := e.counters(s); ok {
			v.Sets[s.id] = c
		} else {
			torn = append(torn, s)
		}
	}
	for a := range e.tun.All() {
		if s := books[a.ID]; s == nil || !s.has(&a) {
			strays = append(strays, a)
		}
	}
	if len(torn)+len(strays) == 0 {
		return v, nil
	}
	// Nothing comes or goes while the books are read, so what differs now does differ.
	type difference struct {
		missing []uint64
		orphans int
	}
	d, err := readBooks(ctx, e, func() (d difference) {
		for _, s := range torn {
			if _, ok := e.counters(s); !ok && e.sets[s.id] == s {
				d.missing = append(d.missing, s.id)
			}
		}
		for i := range strays {
			a := &strays[i]
			if _, ok := e.tun.Seq(a); !ok {
				continue
			}
			if s := e.sets[a.ID]; s == nil || !s.has(a) {
				d.orphans++
			}
		}
		return d
	})
	if err != nil {
		return sa.Survey{}, fmt.Errorf("survey SA sets: %w", err)
	}
	slices.Sort(d.missing)
	v.Missing, v.Orphans = d.missing, d.orphans
	return v, nil
}

// readBooks runs f between two operations and returns its result.
func readBooks[T any](ctx context.Context, e *engine, f func() T) (T, error) {
	var result T
	done := make(chan error, 1)
	e.enqueue(op{kind: opRead, read: func() { result = f() }, done: func(err error) { done <- err }})
	select {
	case err := <-done:
		return result, err
	case <-ctx.Done():
		var none T // f may be at work on result
		return none, ctx.Err()
	}
}

// counters reads the sequence numbers of a set. It reports false if an SA is gone.
func (e *engine) counters(s *set) (c sa.Counters, ok bool) {
	for i := range s.sas {
		if c[i], ok = e.tun.Seq(&s.sas[i]); !ok {
			return c, false
		}
	}
	return c, true
}

// has reports whether a is one of the set's SAs.
func (s *set) has(a *esptun.SA) bool {
	return slices.ContainsFunc(s.sas[:], func(o esptun.SA) bool {
		return a.Inbound == o.Inbound && a.SPI == o.SPI && a.Src == o.Src && a.Dst == o.Dst
	})
}

// run does the operations and watches the deadlines.
func (e *engine) run() {
	defer close(e.done)
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	var ops []op
	for {
		select {
		case <-e.wake:
		case <-timer.C:
		}
		e.mu.Lock()
		ops, e.queue = e.queue, ops[:0]
		closed := e.closed
		e.mu.Unlock()
		for i := range ops {
			err := e.do(&ops[i], closed)
			ops[i].p.Keys.Zero()
			ops[i].done(err)
		}
		clear(ops) // callbacks hold UE contexts
		if closed {
			return
		}
		timer.Reset(e.expire(time.Now()))
	}
}

func (e *engine) do(o *op, closed bool) error {
	switch {
	case o.kind == opRefuse:
		return o.err
	case o.kind == opRemove:
		if s := e.sets[o.p.ID]; s != nil {
			e.drop(s)
		}
		return nil
	case closed:
		return ErrClosed
	case o.kind == opRead:
		o.read()
		return nil
	case o.kind == opExtend:
		s := e.sets[o.p.ID]
		if s == nil {
			return fmt.Errorf("extend SA set %d: %w", o.p.ID, ErrUnknown)
		}
		e.limit(s, o.p.Hard)
		return nil
	}
	return e.install(&o.p)
}

func (e *engine) install(p *sa.Params) error {
	if e.sets[p.ID] != nil {
		return fmt.Errorf("install SA set %d: %w", p.ID, esptun.ErrExists)
	}
	if slices.Contains(p.Counters[:], math.MaxUint32) {
		return fmt.Errorf("install SA set %d: %w", p.ID, sa.ErrSequence)
	}
	s := &set{id: p.ID, index: -1}
	for i, a := range p.SAs() {
		s.sas[i] = esptun.SA{
			Inbound: a.Dir == sa.In, SPI: a.SPI, Src: a.Src, Dst: a.Dst, Keys: p.Keys, Seq: p.Counters[i], ID: p.ID,
		}
	}
	if err := e.tun.Add(s.sas[:]...); err != nil {
		return fmt.Errorf("install SA set %d: %w", p.ID, err)
	}
	for i := range s.sas {
		s.sas[i].Keys.Enc, s.sas[i].Keys.Auth, s.sas[i].Keys.Salt = nil, nil, [4]byte{}
	}
	e.sets[p.ID] = s
	e.limit(s, p.Hard)
	return nil
}

// limit sets the hard limit of a set, counted from now.
func (e *engine) limit(s *set, hard time.Duration) {
	if hard <= 0 {
		if s.index >= 0 {
			heap.Remove(&e.deadlines, s.index)
		}
		return
	}
	s.deadline = time.Now().Add(hard)
	if s.index >= 0 {
		heap.Fix(&e.deadlines, s.index)
		return
	}
	heap.Push(&e.deadlines, s)
}

func (e *engine) drop(s *set) {
	e.tun.Remove(s.sas[:]...)
	delete(e.sets, s.id)
	if s.index >= 0 {
		heap.Remove(&e.deadlines, s.index)
	}
}

// expire removes the sets whose hard limit has passed and returns how long to wait for the next one.
func (e *engine) expire(now time.Time) time.Duration {
	for len(e.deadlines) > 0 {
		s := e.deadlines[0]
		if wait := s.deadline.Sub(now); wait > 0 {
			return wait
		}
		// TS 33.203 §7.4 leaves lifetimes to the SIP layer; that this happens is a fault there.
		e.log.Warn("SA set outlived its hard limit and was removed", "sa_set", s.id, "spi", s.sas[0].SPI)
		e.drop(s)
		if e.expired != nil {
			e.expired(s.id)
		}
	}
	return time.Hour
}

// deadlines is a heap of sets by deadline.
type deadlines []*set

// Len implements heap.Interface.
func (d deadlines) Len() int { return len(d) }

// Less implements heap.Interface.
func (d deadlines) Less(i, j int) bool { return d[i].deadline.Before(d[j].deadline) }

// Swap implements heap.Interface.
func (d deadlines) Swap(i, j int) {
	d[i], d[j] = d[j], d[i]
	d[i].index, d[j].index = i, j
}

// Push implements heap.Interface.
func (d *deadlines) Push(x any) {
	s, _ := x.(*set)
	s.index = len(*d)
	*d = append(*d, s)
}

// Pop implements heap.Interface.
func (d *deadlines) Pop() any {
	last := len(*d) - 1
	s := (*d)[last]
	(*d)[last] = nil
	*d = (*d)[:last]
	s.index = -1
	return s
}
