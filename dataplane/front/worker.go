package front

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/panjf2000/gnet/v2"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
)

// Errors of the methods of Worker and Front.
var (
	ErrNoConn     = errors.New("no such connection")
	ErrNoListener = errors.New("no UDP listener has this local address")
	ErrAddress    = errors.New("remote address is invalid or of another family")
	ErrSize       = errors.New("message is empty or too large for a datagram")
	ErrOverflow   = errors.New("peer does not read, connection reset")
	ErrBusy       = errors.New("queue is full")
	ErrClosed     = errors.New("front is closed")
	ErrTooMany    = errors.New("too many connections")
	ErrNoWorker   = errors.New("no such worker")
	ErrSide       = errors.New("unknown side")
)

// Handler gets the messages of one worker. Every method runs on that worker's loop goroutine, never concurrently.
type Handler interface {
	// Boot comes before any traffic.
	Boot(w *Worker)
	// Message brings one complete SIP message. msg is valid during the call only and may be modified in place.
	Message(f ims.Flow, msg []byte)
	// Bad says that framing failed. msg is what was read and may be cut. The connection is closed right after.
	Bad(f ims.Flow, msg []byte, reason string)
	// Closed says that a connection is gone, whoever ended it. It comes once for each connection that was opened.
	Closed(c ims.ConnID, f ims.Flow)
	// Dialed is the result of Dial. Without err, SendTCP(c) may be used at once.
	Dialed(tag uint64, c ims.ConnID, f ims.Flow, err error)
	// Tick comes every Config.Tick, or later when the loop is busy. It returns how long it has nothing to do unless
	// something happens: a worker to which nothing happens rests so long, at most Config.MaxRest. What ends the rest, a
	// message or a posted function say, comes after a Tick with its time.
	Tick(now time.Time) (rest time.Duration)
}

// Implementation constants.
const (
	// panicLogInterval bounds what a peer that has found a way to cause panics can write into the log.
	panicLogInterval = time.Second

	// socketDropsInterval is how often the kernel's drop counters are read.
	socketDropsInterval = time.Second

	// restAfter is the number of ticks without an event after which a worker may rest. It keeps a worker with some
	// traffic from going to rest, and having itself woken up, between any two messages.
	restAfter = 100
)

// udpSocket is a socket as one worker sees it.
type udpSocket struct {
	fd      int
	addr    netip.AddrPort
	side    ims.Side
	steered bool // datagrams belong to the worker that Front.Owner tells
	own     bool // this worker's member; otherwise a duplicate of another worker's, for sending only
	out     *sendQueue
	report  sent
	drops   uint32 // of the kernel, when last read
}

// Worker is the part of a Front that a Handler uses. Its methods may be called on the loop goroutine only, that is
// from within the Handler's methods and posted functions, except Post, Hand and Index.
type Worker struct {
	f   *Front
	idx int
	h   Handler
	log *slog.Logger

	engine gnet.Engine
	inbox  inbox
	watch  int // descriptor of the doorbell in the loop

	sockets []*udpSocket
	byFD    map[int]*udpSocket // own ones
	rx      *receiver
	arena   []byte
	used    int
	dirty   []*udpSocket // those with something to send

	conns     map[ims.ConnID]*conn
	lastID    ims.ConnID
	idle      list      // connections but those of the unprotected side, the longest idle one first
	clearIdle list      // those
	partial   list      // those with an incomplete message, oldest first
	buffered  int       // octets of buffers for incomplete messages
	waiting   list      // connections that had octets waiting to be sent when last looked at
	outbound  int       // sum of those
	counted   time.Time // event in which all of them were looked at
	closed    []*conn   // gone, and the handler not told yet
	free      [][]byte

	quiet   int          // ticks since the last event
	resting bool         // ticks come at restEnd, unless something happens before
	restEnd atomic.Int64 // of the rest, in nanoseconds since Front.started; 0 without one. For the ticker.

	now       time.Time
	depth     int // nesting of gnet's callbacks: some of our calls into gnet call back
	booted    bool
	bootErr   error
	ready     chan struct{} // closed after Boot
	ended     chan struct{} // closed when the engine has returned
	engineErr error

	panicLogged time.Time
	dropsRead   time.Time

	st     Stats // the loop's own
	ledger ledger
}

// Index returns the worker's number.
func (w *Worker) Index() int { return w.idx }

// Now returns the time at which the current event began.
func (w *Worker) Now() time.Time { return w.now }

// SendUDP queues a datagram from the listener at local, which may be that of another worker. It leaves at the end of the
// current event. msg may be reused at once. What the kernel refuses later is counted, not reported.
func (w *Worker) SendUDP(local, remote netip.AddrPort, msg []byte) error {
	s := w.socket(local)
	if s == nil {
		return ErrNoListener
	}
	if remote.Port() == 0 || !remote.Addr().IsValid() || remote.Addr().Is4() != s.addr.Addr().Is4() {
		return ErrAddress
	}
	if len(msg) == 0 || len(msg) > maxDatagram {
		return ErrSize
	}
	if s.out.n == batchSize {
		w.flushSocket(s)
	}
	if w.used+len(msg) > len(w.arena) {
		w.flush()
	}
	if s.out.n == 0 {
		w.dirty = append(w.dirty, s)
	}
	end := w.used + len(msg)
	b := w.arena[w.used:end:end]
	w.used = end
	copy(b, msg)
	s.out.add(remote, b)
	w.st.sides[s.side].MessagesOut++
	return nil
}

// socket finds the socket of a local address. There are a handful, so a scan is faster than a map.
func (w *Worker) socket(local netip.AddrPort) *udpSocket {
	for _, s := range w.sockets {
		if s.addr.Port() == local.Port() && s.addr.Addr() == local.Addr() {
			return s
		}
	}
	return nil
}

// flushSocket sends what one socket has queued. Its place in the arena is given back with that of the others.
func (w *Worker) flushSocket(s *udpSocket) {
	w.st.SendBatches += uint64(s.out.flush(s.fd, s.report)) //nolint:gosec // G115: at most some 64
	for i, d := range w.dirty {
		if d == s {
			w.dirty[i] = w.dirty[len(w.dirty)-1]
			w.dirty = w.dirty[:len(w.dirty)-1]
			break
		}
	}
	if len(w.dirty) == 0 {
		w.used = 0
	}
}

// flush sends everything.
func (w *Worker) flush() {
	for _, s := range w.dirty {
		w.st.SendBatches += uint64(s.out.flush(s.fd, s.report)) //nolint:gosec // G115: at most some 64
	}
	w.dirty = w.dirty[:0]
	w.used = 0
}

// reporter counts what became of the datagrams of a socket.
func (w *Worker) reporter(side ims.Side) sent {
	return func(n int, errno unix.Errno) {
		if errno != 0 {
			w.st.drops[sendDrop(errno)]++
			return
		}
		s := &w.st.sides[side]
		s.DatagramsOut++
		s.BytesOut += uint64(n) //nolint:gosec // G115: a length
	}
}

// Post runs f on the loop, after what the same goroutine has posted or handed before. It may be called from any
// goroutine.
func (w *Worker) Post(f func()) error {
	return w.inbox.push(task{run: f}, false)
}

// Answer is Post for the result of something that was asked for on the loop: it is taken however much is waiting, since what
// waits for it would wait for ever, and also while the loop ends.
func (w *Worker) Answer(f func()) error {
	return w.inbox.push(task{run: f}, true)
}

// Hand gives a copy of a UDP message to another worker's Message. It may be called from any goroutine. Order is kept as by
// Post. A full queue drops the message: ErrBusy.
func (w *Worker) Hand(to int, f ims.Flow, msg []byte) error {
	if to < 0 || to >= len(w.f.workers) {
		return ErrNoWorker
	}
	if int(f.Side) >= numSides {
		return ErrSide
	}
	b := copyToBuffer(msg)
	if err := w.f.workers[to].inbox.push(task{flow: f, msg: b}, false); err != nil {
		b.release()
		return err
	}
	return nil
}

// enter begins an event of gnet, leave ends it. They nest, because some calls into gnet call back.
func (w *Worker) enter() {
	w.depth++
	if w.depth > 1 {
		return
	}
	w.now = time.Now()
	if !w.booted {
		w.booted = true
		w.boot()
		close(w.ready)
	}
}

func (w *Worker) leave() {
	if w.depth > 1 {
		w.depth--
		return
	}
	// Still inside the event: telling the handler may close and send more.
	for i := 0; i < len(w.closed); i++ {
		w.tellClosed(w.closed[i])
		w.closed[i] = nil
	}
	w.closed = w.closed[:0]
	w.flush()
	w.depth--
	if w.ledger.asked.Load() {
		w.ledger.publish(&w.st)
	}
}

func (w *Worker) boot() {
	defer func() {
		if r := recover(); r != nil {
			w.bootErr = fmt.Errorf("boot handler of worker %d: panic: %v\n%s", w.idx, r, debug.Stack())
		}
	}()
	w.h.Boot(w)
}

// guard is deferred around every call of the handler.
func (w *Worker) guard() {
	r := recover()
	if r == nil {
		return
	}
	w.st.Panics++
	if w.now.Sub(w.panicLogged) < panicLogInterval {
		return
	}
	w.panicLogged = w.now
	w.log.Error("panic in handler, message dropped", slog.Any("panic", r), slog.String("stack", string(debug.Stack())),
		slog.Uint64("panics", w.st.Panics))
}

func (w *Worker) message(f ims.Flow, msg []byte) {
	panics := w.st.Panics
	w.st.sides[f.Side].MessagesIn++
	if f.Label != 0 {
		w.st.Labelled++
	}
	w.callMessage(f, msg)
	w.st.drops[DropPanic] += w.st.Panics - panics
}

func (w *Worker) callMessage(f ims.Flow, msg []byte) {
	defer w.guard()
	w.h.Message(f, msg)
}

func (w *Worker) bad(f ims.Flow, msg []byte, reason string) {
	defer w.guard()
	w.h.Bad(f, msg, reason)
}

func (w *Worker) tellClosed(c *conn) {
	defer w.guard()
	w.h.Closed(c.id, c.flow)
}

func (w *Worker) dialed(tag uint64, id ims.ConnID, f ims.Flow, err error) {
	defer w.guard()
	w.h.Dialed(tag, id, f, err)
}

// runTasks leaves nothing behind in the slice, which waits for its next use and would hold it.
func (w *Worker) runTasks(tasks []task) {
	for i, t := range tasks {
		tasks[i] = task{}
		w.runTask(t)
	}
}

func (w *Worker) runTask(t task) {
	if t.run == nil {
		w.st.Handovers++
		w.message(t.flow, t.msg.b)
		t.msg.release()
		return
	}
	defer w.guard()
	t.run()
}

// drainUDP handles the datagram that gnet has read, without control messages and so without a label, and then what else is
// queued.
func (w *Worker) drainUDP(s *udpSocket, remote netip.AddrPort, msg []byte) {
	w.st.Wakeups++
	w.datagram(s, remote, msg, 0, false)
	for range maxBatches {
		n, errno := w.rx.read(s.fd)
		if errno != 0 { // EAGAIN, or an ICMP error that the next read will not see
			break
		}
		w.st.ReadBatches++
		for i := range n {
			remote, msg, label, truncated := w.rx.datagram(i)
			w.datagram(s, remote, msg, label, truncated)
		}
		if n < batchSize {
			break
		}
	}
}

func (w *Worker) datagram(s *udpSocket, remote netip.AddrPort, msg []byte, label uint32, truncated bool) {
	side := &w.st.sides[s.side]
	side.DatagramsIn++
	side.BytesIn += uint64(len(msg))
	switch {
	case truncated || len(msg) > w.f.cfg.MaxMessage:
		w.st.drops[DropOversize]++
		return
	case remote.Port() == 0:
		w.st.drops[DropSourcePort]++
		return
	}
	if s.side == ims.Mw && !w.f.cfg.isCore(remote.Addr()) {
		w.st.drops[DropSource]++
		return
	}
	msg, drop := payload(msg)
	if msg == nil {
		w.st.drops[drop]++
		return
	}
	f := ims.Flow{Local: s.addr, Remote: remote, Transport: ims.UDP, Side: s.side, Label: label}
	if s.steered {
		if owner := w.f.Owner(remote.Addr()); owner != w.idx {
			_ = w.Hand(owner, f, msg) // a full queue is counted there
			return
		}
	}
	w.message(f, msg)
}

// shortestStartLine is the length of the shortest one, "A a: SIP/2.0".
const shortestStartLine = 12

// payload returns the message in a datagram from its start line on, or nil and the reason why there is none. What keeps
// NAT bindings alive is ignored: CRLFs (RFC 5626 §4.4.1 allows them on streams only, phones send them nevertheless), zeros,
// and STUN, whose first octet is 0 or 1 where SIP has a token (RFC 5626 §8).
func payload(b []byte) ([]byte, Drop) {
	for len(b) > 0 && (b[0] == '\r' || b[0] == '\n') {
		b = b[1:] // RFC 3261 §7.5
	}
	switch {
	case len(b) == 0 || b[0] <= 1:
		return nil, DropKeepalive
	case len(b) < shortestStartLine:
		return nil, DropRunt
	}
	return b, 0
}

// tick checks timeouts, tells the handler, and lets the worker rest when there has been nothing to do for a while.
func (w *Worker) tick() {
	rest := w.expire()
	if w.now.Sub(w.dropsRead) >= socketDropsInterval {
		w.readSocketDrops()
	}
	rest = min(rest, w.callTick(), w.f.cfg.MaxRest)
	w.quiet++
	if len(w.closed) > 0 {
		w.quiet = 0 // the handler is told later in this event, and may set timers then
	}
	if w.quiet <= restAfter || rest <= w.f.cfg.Tick {
		w.resting = false
		w.restEnd.Store(0)
		return
	}
	w.resting = true
	w.restEnd.Store(int64(w.now.Add(rest).Sub(w.f.started)))
}

// callTick returns 0 when the handler panics.
func (w *Worker) callTick() time.Duration {
	defer w.guard()
	return w.h.Tick(w.now)
}

// event comes before everything that happens to a worker but ticks. It ends a rest: with a tick, since time has stood
// still for the handler, whose timers would else be set by an old clock.
func (w *Worker) event() {
	if w.depth > 1 {
		return // part of another, or of a tick
	}
	w.quiet = 0
	if w.resting {
		w.tick()
		w.f.stirTicker()
	}
}

func (w *Worker) readSocketDrops() {
	w.dropsRead = w.now
	for _, s := range w.sockets {
		if !s.own {
			continue
		}
		if n, ok := socketDrops(s.fd); ok {
			w.st.drops[DropSocketQueue] += uint64(n - s.drops)
			s.drops = n
		}
	}
}

// wake does what other goroutines want. It reports whether the loop shall end.
func (w *Worker) wake() (stop bool) {
	tasks, tick, stop := w.inbox.take()
	if len(tasks) > 0 {
		w.event()
	}
	w.runTasks(tasks)
	if !stop {
		if tick {
			w.tick()
		}
		return false
	}
	for len(tasks) > 0 { // the refusals of what those have asked for
		tasks, _, _ = w.inbox.take()
		w.runTasks(tasks)
	}
	w.readSocketDrops()
	w.closeAll()
	return true
}

// ask has the loop publish its counters. The channel is closed when it has.
func (w *Worker) ask() <-chan struct{} {
	published := w.ledger.ask()
	w.inbox.ring()
	return published
}

// stats returns the counters that the loop has published, or when late is closed before those of the time before.
func (w *Worker) stats(published, late <-chan struct{}) (s Stats) {
	select {
	case <-published:
		s = w.ledger.last()
	case <-w.ended:
		s = w.st // nobody else uses it any more
	case <-late:
		s = w.ledger.last()
	}
	s.drops[DropQueueFull] += w.inbox.drops()
	return s
}
