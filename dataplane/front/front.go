package front

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/panjf2000/gnet/v2"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
)

// streamBuffer is what a loop reads from a connection at a time; it must hold a whole datagram, too.
const streamBuffer = 64 << 10

// maxPortAttempts is how often a port is looked for that is free for UDP and TCP.
const maxPortAttempts = 16

// Front is a set of running workers.
type Front struct {
	cfg     Config
	log     *slog.Logger
	workers []*Worker
	engines []*events
	tcp     []tcpListener
	homes   homes
	dials   [2]dialer // to Mw and to Gm: phones that do not answer must not delay dials to the core
	room    int       // connections for which there are descriptors

	steering    Steering  // nil unless it steers a group
	steeringOff sync.Once // said that it cannot

	ctx        context.Context // ends when Close begins
	cancel     context.CancelFunc
	accepting  sync.WaitGroup // accept loops
	background sync.WaitGroup // registrations, dials, the ticker
	started    time.Time
	stir       chan struct{} // a worker has ended its rest
	done       chan struct{} // closed when an engine has ended by itself or everything has
	doneOnce   sync.Once
	closeOnce  sync.Once
	closed     chan struct{} // closed when Close has done its work
	closeErr   error

	conns        atomic.Int64 // connections, and reservations for them
	clear        sources      // those of the unprotected side
	acceptErrors atomic.Uint64
	strays       atomic.Uint64
	dialErrors   atomic.Uint64
	drops        [numDrops]atomic.Uint64 // those that no worker counts
}

// tcpListener is a listening socket.
type tcpListener struct {
	Listener
	ln     *net.TCPListener
	member int // worker whose socket it is, -1: the only one of all workers
}

// New opens the listeners and starts one worker for each handler. When it returns every handler's Boot has been called.
func New(cfg Config, handlers []Handler) (*Front, error) {
	cfg.Listeners = slices.Clone(cfg.Listeners)
	cfg.populate()
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("configure front: %w", err)
	}
	if len(handlers) != cfg.Workers {
		return nil, fmt.Errorf("configure front: %d handlers for %d workers", len(handlers), cfg.Workers)
	}
	if err := cfg.findInterface(); err != nil {
		return nil, fmt.Errorf("configure front: %w", err)
	}
	room := cfg.clampConnections()
	f := &Front{
		cfg: cfg, room: room, log: cfg.Logger,
		started: time.Now(), stir: make(chan struct{}, 1), done: make(chan struct{}), closed: make(chan struct{}),
	}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	if err := f.start(handlers); err != nil {
		f.shutdown()
		return nil, err
	}
	return f, nil
}

func (f *Front) start(handlers []Handler) error {
	for i, h := range handlers {
		if err := f.addWorker(i, h); err != nil {
			return fmt.Errorf("start worker %d: %w", i, err)
		}
	}
	for i := range f.cfg.Listeners {
		l := &f.cfg.Listeners[i]
		err := f.listen(l)
		if l.Optional && errors.Is(err, unix.EADDRINUSE) {
			f.log.Warn("somebody else has the address of a listener, going on without it", errAttr(err))
			continue
		}
		if err != nil {
			return err
		}
	}
	for _, e := range f.engines {
		if err := f.startEngine(e); err != nil {
			return fmt.Errorf("start worker %d: %w", e.w.idx, err)
		}
	}
	for _, t := range f.tcp {
		f.accepting.Go(func() { f.acceptLoop(t.ln, t.Listener, t.member) })
	}
	f.background.Go(f.tickLoop)
	return nil
}

// addWorker makes a worker with its doorbell.
func (f *Front) addWorker(i int, h Handler) error {
	ring, watch, err := newDoorbell()
	if err != nil {
		return err
	}
	w := &Worker{
		f: f, idx: i, h: h, log: f.log.With(slog.Int("worker", i)),
		inbox: inbox{bell: ring, limit: f.cfg.MaxQueue},
		byFD:  make(map[int]*udpSocket),
		rx:    newReceiver(f.cfg.MaxMessage),
		arena: make([]byte, arenaSize),
		conns: make(map[ims.ConnID]*conn),
		ready: make(chan struct{}),
		ended: make(chan struct{}),
	}
	e := &events{w: w, boot: make(chan error, 1)}
	f.workers = append(f.workers, w)
	f.engines = append(f.engines, e)
	return e.addSwap(watch, func(fd int) { w.watch = fd })
}

// addSwap hands a socket over, whatever the result.
func (e *events) addSwap(fd int, place func(fd int)) error {
	s, err := newSwap(fd, place)
	if err != nil {
		_ = unix.Close(fd)
		return err
	}
	e.swaps = append(e.swaps, s)
	return nil
}

// listen opens the sockets of a listener and fills in its port.
func (f *Front) listen(l *Listener) error {
	want := l.Addr
	for attempt := 1; ; attempt++ {
		fds, err := f.openListener(l)
		if err == nil {
			return f.distribute(*l, fds)
		}
		// A port that the kernel chose for UDP may be in use for TCP.
		if want.Port() != 0 || attempt == maxPortAttempts || !errors.Is(err, unix.EADDRINUSE) {
			return err
		}
		l.Addr = want
	}
}

// openListener opens the UDP sockets, as many as there are workers that receive, and starts to listen for connections.
func (f *Front) openListener(l *Listener) (fds []int, err error) {
	if l.UDP {
		members := 1
		if l.Worker < 0 {
			members = len(f.workers)
		}
		err := f.cfg.inNamespace(l.Hidden, func() (err error) {
			fds, l.Addr, err = f.cfg.openGroup(*l, members)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("listen on %s/udp: %w", l.Addr, err)
		}
	}
	if l.TCP {
		if err := f.openStreams(l); err != nil {
			closeAll(fds)
			return nil, fmt.Errorf("listen on %s/tcp: %w", l.Addr, err)
		}
	}
	return fds, nil
}

// openStreams starts to listen for connections. With a steering program each worker has a socket of its own, so that a
// connection is accepted where it belongs; all of them exist before the first one is accepted.
func (f *Front) openStreams(l *Listener) error {
	members := f.cfg.members(*l)
	lns, err := f.cfg.listenTCP(*l, members)
	if err != nil {
		return err
	}
	l.Addr = addrPortOf(lns[0].Addr().(*net.TCPAddr)) //nolint:forcetypeassert // a TCP listener's
	first := len(f.tcp)
	for k, ln := range lns {
		f.tcp = append(f.tcp, tcpListener{Listener: *l, ln: ln, member: k})
	}
	if members == 1 {
		f.tcp[first].member = -1
		return nil
	}
	fds, err := duplicates(lns)
	defer closeAll(fds)
	if err != nil {
		return err
	}
	f.steer(*l, ims.TCP, fds)
	return nil
}

// distribute gives each worker the socket that it receives from, or for a listener of another worker a duplicate to send
// from.
func (f *Front) distribute(l Listener, fds []int) error {
	if len(fds) == 0 {
		return nil
	}
	shared := l.Worker < 0
	members := len(fds)
	steered := shared && members > 1 && isGm(l.Side)
	if steered {
		f.steer(l, ims.UDP, fds)
	}
	newSocket := func(w *Worker, fd int) *udpSocket {
		s := &udpSocket{fd: fd, addr: l.Addr, side: l.Side, steered: steered, out: newSendQueue(), report: w.reporter(l.Side)}
		w.sockets = append(w.sockets, s)
		return s
	}
	if !shared {
		for i, w := range f.workers {
			if i == l.Worker {
				continue
			}
			fd, err := unix.FcntlInt(uintptr(fds[0]), unix.F_DUPFD_CLOEXEC, 0) //nolint:gosec // G115: a descriptor
			if err != nil {
				closeAll(fds)
				return fmt.Errorf("duplicate socket for worker %d: %w", i, err)
			}
			newSocket(w, fd)
		}
	}
	for i, fd := range fds {
		e := f.engines[i]
		if !shared {
			e = f.engines[l.Worker]
		}
		s := newSocket(e.w, -1)
		s.own = true
		err := e.addSwap(fd, func(fd int) {
			s.fd = fd
			e.w.byFD[fd] = s
		})
		if err != nil {
			closeAll(fds[i+1:])
			return err
		}
	}
	return nil
}

// startEngine starts a worker's engine and waits until its handler has booted.
func (f *Front) startEngine(e *events) error {
	urls := make([]string, 0, len(e.swaps))
	for i := range e.swaps {
		urls = append(urls, e.swaps[i].url())
	}
	w := e.w
	started := make(chan struct{})
	go func() {
		w.engineErr = gnet.Rotate(e, urls,
			gnet.WithNumEventLoop(1), gnet.WithReusePort(true), gnet.WithReuseAddr(true),
			gnet.WithLockOSThread(true),                   // without it gnet's Gosched costs 1 µs per message on a busy machine
			gnet.WithLoadBalancing(gnet.LeastConnections), // the default one is not safe for Register
			gnet.WithReadBufferCap(streamBuffer), gnet.WithLogger(gnetLogger{w.log}))
		close(w.ended)
		<-started
		f.engineEnded()
	}()
	defer close(started)
	select {
	case err := <-e.boot:
		if err != nil {
			<-w.ended
			return err
		}
	case <-w.ended:
		select {
		case err := <-e.boot: // it has come as far as that
			return errors.Join(err, w.failure())
		default:
			return w.failure()
		}
	}
	for i := range e.swaps {
		e.swaps[i].release()
	}
	// The first event boots the handler; this one, if no datagram comes before.
	if err := w.Post(func() {}); err != nil {
		return err
	}
	select {
	case <-w.ready:
		return w.bootErr
	case <-w.ended:
		return w.failure()
	}
}

// failure tells of an engine that has ended by itself. gnet logs why, and returns it only sometimes.
func (w *Worker) failure() error {
	return fmt.Errorf("event engine of worker %d has ended: %w", w.idx, errors.Join(w.engineErr, errEngine))
}

var errEngine = errors.New("see the log for the cause")

// awaitEnd waits for the end of a loop that has been told to end, and tells it again: the ticker, which makes good for a
// ring that has failed, is gone by now.
func (w *Worker) awaitEnd() {
	t := time.NewTicker(w.f.cfg.Tick)
	defer t.Stop()
	for {
		select {
		case <-w.ended:
			return
		case <-t.C:
			w.inbox.finish()
		}
	}
}

func (f *Front) engineEnded() { f.doneOnce.Do(func() { close(f.done) }) }

// tickLoop makes ticks due. A loop that is behind gets one, not many. It sleeps as long as all workers rest: a tick costs
// little, but each one keeps the scheduler's monitor busy for a while, which adds up to a tenth of a core.
func (f *Front) tickLoop() {
	t := time.NewTimer(f.cfg.Tick)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-f.stir:
		case <-f.ctx.Done():
			return
		}
		now := time.Since(f.started)
		pause := f.cfg.MaxRest
		for _, w := range f.workers {
			if left := time.Duration(w.restEnd.Load()) - now; left > 0 {
				pause = min(pause, left)
				continue
			}
			pause = f.cfg.Tick
			w.inbox.markTick()
		}
		t.Reset(pause)
	}
}

// stirTicker has the ticker look at the workers' rests again. It does not block.
func (f *Front) stirTicker() {
	select {
	case f.stir <- struct{}{}:
	default: // it has not looked since the last time
	}
}

// Workers returns the number of workers.
func (f *Front) Workers() int { return len(f.workers) }

// Worker returns a worker, whose Post and Hand may be used from any goroutine.
func (f *Front) Worker(i int) *Worker { return f.workers[i] }

// Listeners returns the listeners with the ports that they have got, in the order of Config.Listeners.
func (f *Front) Listeners() []Listener { return slices.Clone(f.cfg.Listeners) }

// Done is closed when an event engine has ended, by Close or because it failed: then Err tells why, and the process
// should end.
func (f *Front) Done() <-chan struct{} { return f.done }

// Err returns why engines have ended, nil if that was Close's doing or none has.
func (f *Front) Err() error {
	var errs []error
	for _, w := range f.workers {
		select {
		case <-w.ended:
			if w.engineErr != nil || f.ctx.Err() == nil {
				errs = append(errs, w.failure())
			}
		default:
		}
	}
	return errors.Join(errs...)
}

// Stats returns the counters, those of all events that have ended before the call among them. It may be called from any
// goroutine but a worker's own, wakes the workers up and waits for them. What a worker that is stuck has counted since the
// last call is missing.
func (f *Front) Stats() Stats {
	var s Stats
	late, cancel := context.WithTimeout(context.Background(), statsWait)
	defer cancel()
	published := make([]<-chan struct{}, len(f.workers))
	for i, w := range f.workers {
		published[i] = w.ask()
	}
	for i, w := range f.workers {
		ws := w.stats(published[i], late.Done())
		s.add(&ws)
	}
	for i := range f.drops {
		s.drops[i] += f.drops[i].Load()
	}
	s.AcceptErrors += f.acceptErrors.Load()
	s.Strays += f.strays.Load()
	s.DialErrors += f.dialErrors.Load()
	return s
}

// Close stops accepting, lets the workers finish what is queued, closes all connections and ends the engines. It may be
// called from any goroutine but a worker's own, and more than once. If ctx ends first the rest goes on in the background.
func (f *Front) Close(ctx context.Context) error {
	f.closeOnce.Do(func() { go f.shutdown() })
	select {
	case <-f.closed:
		return f.closeErr
	case <-ctx.Done():
		return fmt.Errorf("close front: %w", ctx.Err())
	}
}

// shutdown undoes start, however far that came.
func (f *Front) shutdown() {
	f.closeOnce.Do(func() {}) // start has failed: nobody else calls this
	f.cancel()
	for i := range f.dials {
		f.dials[i].mu.Lock()   // a dial that came before is in background by now, a later one is refused
		f.dials[i].mu.Unlock() //nolint:staticcheck // SA2001: a barrier
	}
	for _, t := range f.tcp {
		_ = t.ln.Close()
	}
	f.accepting.Wait()
	// Registrations are answered by the loops, so they have to be over before the loops end.
	f.background.Wait()
	for _, e := range f.engines {
		e.w.inbox.finish()
	}
	for _, e := range f.engines {
		if e.w.engine != (gnet.Engine{}) {
			e.w.awaitEnd()
			f.closeErr = errors.Join(f.closeErr, e.w.engineErr)
		}
		for i := range e.swaps {
			e.swaps[i].release()
		}
		for _, s := range e.w.sockets {
			if !s.own {
				_ = unix.Close(s.fd)
			}
		}
	}
	// Only now: until here workers could ring one another.
	for _, w := range f.workers {
		w.inbox.close()
	}
	f.engineEnded()
	close(f.closed)
}
