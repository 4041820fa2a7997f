// Package fronttest is an in-memory stand-in for dataplane/front in tests of what sits on top of it: a Worker that
// records what is sent and dialed, and lets the test play the peers. It imports neither front nor gnet.
//
// It keeps front's rules: sends from unknown local addresses and to closed connections fail, posted functions run
// later and in order, a connection's end is told after the call that caused it, time stands still unless the test moves
// it. A Worker belongs to one goroutine, the test's, except Post and Hand.
package fronttest

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/gmgate/gmgate/control/ims"
)

// Errors as front has them; they are other values.
var (
	ErrNoConn     = errors.New("no such connection")
	ErrNoListener = errors.New("no UDP listener has this local address")
	ErrAddress    = errors.New("remote address is invalid or of another family")
	ErrSize       = errors.New("message is empty or too large for a datagram")
	ErrNoWorker   = errors.New("no such worker")
)

// maxDatagram is the largest UDP payload.
const maxDatagram = 65507

// Handler has the methods of front.Handler but Boot, whose parameter is a front type. The test calls its handler's
// equivalent with the Worker.
type Handler interface {
	Message(f ims.Flow, msg []byte)
	Bad(f ims.Flow, msg []byte, reason string)
	Closed(c ims.ConnID, f ims.Flow)
	Dialed(tag uint64, c ims.ConnID, f ims.Flow, err error)
	Tick(now time.Time) (rest time.Duration)
}

// Sent is a message that the handler has sent.
type Sent struct {
	Transport     ims.Transport
	Local, Remote netip.AddrPort
	Conn          ims.ConnID // zero for UDP
	Msg           string
}

// Dial is a connection that the handler has asked for.
type Dial struct {
	Local, Remote netip.AddrPort
	Side          ims.Side
	Hidden        bool
	Tag           uint64
}

// Handed is a message that the handler has given to another worker.
type Handed struct {
	To   int
	Flow ims.Flow
	Msg  string
}

// Close is a connection that the handler has closed.
type Close struct {
	Conn  ims.ConnID
	Reset bool
}

// Worker has the methods of front.Worker.
type Worker struct {
	// SendErr, if set, is asked before each send and may refuse it.
	SendErr func(Sent) error

	index     int
	workers   int
	h         Handler
	listeners []netip.AddrPort
	now       time.Time
	lastID    ims.ConnID
	lastPort  uint16
	conns     map[ims.ConnID]ims.Flow
	running   bool

	sent   []Sent
	dials  []Dial
	handed []Handed
	closes []Close

	mu    sync.Mutex
	posts []func()
}

// Start is where the clock of a new Worker stands.
var Start = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// firstPort is the first of the local ports given to dials that asked for any.
const firstPort = 40000

// New returns a worker with UDP listeners on the given local addresses; without any it sends from everywhere. SetHandler
// comes next.
func New(index, workers int, listeners ...netip.AddrPort) *Worker {
	return &Worker{
		index: index, workers: workers, listeners: listeners, now: Start, lastPort: firstPort - 1,
		conns: make(map[ims.ConnID]ims.Flow),
	}
}

// SetHandler says who gets the messages.
func (w *Worker) SetHandler(h Handler) { w.h = h }

// Index returns the worker's number.
func (w *Worker) Index() int { return w.index }

// Now returns the test's time.
func (w *Worker) Now() time.Time { return w.now }

// SendUDP records a datagram.
func (w *Worker) SendUDP(local, remote netip.AddrPort, msg []byte) error {
	switch {
	case len(w.listeners) > 0 && !slices.Contains(w.listeners, local):
		return ErrNoListener
	case remote.Port() == 0 || !remote.IsValid() || remote.Addr().Is4() != local.Addr().Is4():
		return ErrAddress
	case len(msg) == 0 || len(msg) > maxDatagram:
		return ErrSize
	}
	return w.record(Sent{Transport: ims.UDP, Local: local, Remote: remote, Msg: string(msg)})
}

// SendTCP records a message on a connection.
func (w *Worker) SendTCP(c ims.ConnID, msg []byte) error {
	f, ok := w.conns[c]
	if !ok {
		return ErrNoConn
	}
	return w.record(Sent{Transport: ims.TCP, Local: f.Local, Remote: f.Remote, Conn: c, Msg: string(msg)})
}

func (w *Worker) record(s Sent) error {
	if w.SendErr != nil {
		if err := w.SendErr(s); err != nil {
			return err
		}
	}
	w.sent = append(w.sent, s)
	return nil
}

// Dial records a request. The test answers it by Connect or Refuse.
func (w *Worker) Dial(local, remote netip.AddrPort, side ims.Side, hidden bool, tag uint64) {
	w.dials = append(w.dials, Dial{Local: local, Remote: remote, Side: side, Hidden: hidden, Tag: tag})
}

// CloseConn closes a connection; Closed is called when the current call of the handler has returned.
func (w *Worker) CloseConn(c ims.ConnID, reset bool) {
	if _, ok := w.conns[c]; !ok {
		return
	}
	w.closes = append(w.closes, Close{Conn: c, Reset: reset})
	w.drop(c)
}

// Post queues a function until the current call has returned, or Run. It may be called from any goroutine.
func (w *Worker) Post(f func()) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.posts = append(w.posts, f)
	return nil
}

// Answer is Post.
func (w *Worker) Answer(f func()) error { return w.Post(f) }

// Hand records a message for another worker. It may be called from any goroutine.
func (w *Worker) Hand(to int, f ims.Flow, msg []byte) error {
	if to < 0 || to >= w.workers {
		return ErrNoWorker
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.handed = append(w.handed, Handed{To: to, Flow: f, Msg: string(msg)})
	return nil
}

// Receive gives the handler a datagram's message.
func (w *Worker) Receive(side ims.Side, local, remote netip.AddrPort, msg string) {
	f := ims.Flow{Local: local, Remote: remote, Transport: ims.UDP, Side: side}
	w.call(func() { w.h.Message(f, []byte(msg)) })
}

// Deliver gives the handler a message as it is, for flows that Receive cannot make and messages handed over.
func (w *Worker) Deliver(f ims.Flow, msg string) {
	w.call(func() { w.h.Message(f, []byte(msg)) })
}

// Accept opens a connection from a peer.
func (w *Worker) Accept(side ims.Side, local, remote netip.AddrPort) ims.ConnID {
	return w.open(ims.Flow{Local: local, Remote: remote, Transport: ims.TCP, Side: side}).Conn
}

// ReceiveTCP gives the handler a message from a connection. An unknown one is ignored, as nothing can come from it.
func (w *Worker) ReceiveTCP(c ims.ConnID, msg string) {
	if f, ok := w.conns[c]; ok {
		w.call(func() { w.h.Message(f, []byte(msg)) })
	}
}

// Break tells the handler of a framing error on a connection, and closes it.
func (w *Worker) Break(c ims.ConnID, msg, reason string) {
	f, ok := w.conns[c]
	if !ok {
		return
	}
	w.call(func() {
		w.h.Bad(f, []byte(msg), reason)
		w.drop(c)
	})
}

// Hangup closes a connection from the peer's end.
func (w *Worker) Hangup(c ims.ConnID) {
	w.call(func() { w.drop(c) })
}

// Connect answers a dial with success.
func (w *Worker) Connect(d Dial) ims.ConnID {
	local := d.Local
	if local.Port() == 0 {
		w.lastPort++
		local = netip.AddrPortFrom(local.Addr(), w.lastPort)
	}
	f := w.open(ims.Flow{Local: local, Remote: d.Remote, Transport: ims.TCP, Side: d.Side})
	w.call(func() { w.h.Dialed(d.Tag, f.Conn, f, nil) })
	return f.Conn
}

// Refuse answers a dial with an error.
func (w *Worker) Refuse(d Dial, err error) {
	f := ims.Flow{Local: d.Local, Remote: d.Remote, Transport: ims.TCP, Side: d.Side}
	w.call(func() { w.h.Dialed(d.Tag, 0, f, err) })
}

// Advance moves the time and calls Tick.
func (w *Worker) Advance(d time.Duration) {
	w.now = w.now.Add(d)
	w.call(func() { w.h.Tick(w.now) })
}

// Run runs what was posted outside of a call, by another goroutine for example.
func (w *Worker) Run() { w.call(func() {}) }

// Conns returns the open connections.
func (w *Worker) Conns() map[ims.ConnID]ims.Flow {
	m := make(map[ims.ConnID]ims.Flow, len(w.conns))
	maps.Copy(m, w.conns)
	return m
}

// TakeSent returns what was sent since the last call.
func (w *Worker) TakeSent() []Sent { return take(&w.sent) }

// TakeDials returns the dials since the last call.
func (w *Worker) TakeDials() []Dial { return take(&w.dials) }

// TakeCloses returns what the handler has closed since the last call.
func (w *Worker) TakeCloses() []Close { return take(&w.closes) }

// TakeHanded returns what was handed over since the last call.
func (w *Worker) TakeHanded() []Handed {
	w.mu.Lock()
	defer w.mu.Unlock()
	return take(&w.handed)
}

func take[T any](s *[]T) []T {
	t := *s
	*s = nil
	return t
}

func (w *Worker) open(f ims.Flow) ims.Flow {
	w.lastID++
	f.Conn = w.lastID
	w.conns[f.Conn] = f
	return f
}

// drop ends a connection. The handler is told when the current call has returned.
func (w *Worker) drop(c ims.ConnID) {
	f, ok := w.conns[c]
	if !ok {
		return
	}
	delete(w.conns, c)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.posts = append(w.posts, func() { w.h.Closed(c, f) })
}

// call runs f as one event and then everything that it has posted.
func (w *Worker) call(f func()) {
	if w.running {
		panic("fronttest: the handler must not play its own peer")
	}
	w.running = true
	defer func() { w.running = false }()
	f()
	for {
		w.mu.Lock()
		posts := take(&w.posts)
		w.mu.Unlock()
		if len(posts) == 0 {
			return
		}
		for _, p := range posts {
			p()
		}
	}
}
