package front

import (
	"bytes"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/panjf2000/gnet/v2"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// Implementation constants of stream framing.
const (
	// probe is how much of an incomplete header is looked at each time something arrives, so that garbage is noticed
	// early. After that the header has to be complete first.
	probe = 128

	// maxRescan bounds the octets of a header that are scanned again because the body comes in many small segments, as a
	// multiple of Config.MaxMessage. A message of that size, octet by octet, with a header of 1 KiB is just accepted.
	maxRescan = 1024

	partSize    = 8 << 10 // least size of the buffer for an incomplete message, and the largest that is kept for reuse
	maxFreeBufs = 256
)

var pong = []byte("\r\n")

// conn is a TCP connection. All of it belongs to the loop but for opened.
type conn struct {
	id     ims.ConnID
	flow   ims.Flow
	w      *Worker
	gc     gnet.Conn
	tag    uint64
	dialed bool

	opened  atomic.Bool // OnOpen was called
	busy    bool        // inside one of its own callbacks
	closing bool        // to be closed when that returns
	dead    bool        // gnet has closed it

	small    [len("\r\n\r")]byte // what may be half a ping, so many connections may have it for long
	part     []byte              // incomplete message, in small or in a buffer of its own
	searched int                 // part of it known to have no end of header
	header   int                 // length of its header once that is complete, or 0
	rescan   int                 // octets scanned in vain since

	ponged bool // in the current read event
	out    int  // octets waiting to be sent, when last looked at

	last  time.Time // of traffic
	since time.Time // part is not empty
	idle  link
	parts link
	waits link
}

// link and list are an intrusive doubly linked list, ordered by time since new elements go to the end.
type link struct {
	prev, next *link
	c          *conn
}

type list struct{ root link }

func (l *list) front() *conn {
	if l.root.next == nil || l.root.next == &l.root {
		return nil
	}
	return l.root.next.c
}

// toEnd moves or adds an element.
func (l *list) toEnd(n *link, c *conn) {
	if l.root.next == nil {
		l.root.next, l.root.prev = &l.root, &l.root
	}
	n.remove()
	n.c = c
	n.prev, n.next = l.root.prev, &l.root
	n.prev.next, n.next.prev = n, n
}

func (n *link) remove() {
	if n.prev == nil {
		return
	}
	n.prev.next, n.next.prev = n.next, n.prev
	n.prev, n.next = nil, nil
}

// SendTCP sends a message on a connection. What the kernel does not take at once waits, up to Config.MaxOutbound, and
// Config.MaxOutboundTotal for all; a peer that lets it grow further is cut off: ErrOverflow. ErrNoConn says that the connection is gone or being closed.
func (w *Worker) SendTCP(c ims.ConnID, msg []byte) error {
	k := w.conns[c]
	if k == nil || k.closing {
		return ErrNoConn
	}
	if err := w.write(k, msg); err != nil {
		return err
	}
	w.st.sides[k.flow.Side].MessagesOut++
	return nil
}

func (w *Worker) write(c *conn, b []byte) error {
	if c.gc.OutboundBuffered()+len(b) > w.f.cfg.MaxOutbound {
		return w.overflow(c)
	}
	if _, err := c.gc.Write(b); err != nil { // gnet has closed the connection and called OnClose
		return ErrNoConn
	}
	// Only one whose octets have to wait is cut off: those whose peers read go on whatever others do.
	if w.countOut(c); c.out > 0 && w.outbound > w.f.cfg.MaxOutboundTotal && w.recountOut() > w.f.cfg.MaxOutboundTotal {
		return w.overflow(c)
	}
	w.st.sides[c.flow.Side].BytesOut += uint64(len(b))
	w.touch(c)
	return nil
}

func (w *Worker) overflow(c *conn) error {
	w.st.drops[DropOutbound]++
	w.closeConn(c, true)
	return ErrOverflow
}

// countOut takes note of what waits to be sent on a connection.
func (w *Worker) countOut(c *conn) {
	n := c.gc.OutboundBuffered()
	switch {
	case n == 0:
		c.waits.remove()
	case c.out == 0:
		w.waiting.toEnd(&c.waits, c)
	}
	w.outbound += n - c.out
	c.out = n
}

// recountOut looks at all connections that may have something waiting: gnet sends without telling us. During an event
// it does not, so once is enough.
func (w *Worker) recountOut() int {
	if w.counted.Equal(w.now) {
		return w.outbound
	}
	w.counted = w.now
	for n := w.waiting.root.next; n != nil && n != &w.waiting.root; {
		c := n.c
		n = n.next
		w.countOut(c)
	}
	return w.outbound
}

// CloseConn closes a connection; Closed follows. With reset the peer gets a RST and what waits to be sent is thrown away.
// A connection of the protected side always ends like that (see tuneTCP).
func (w *Worker) CloseConn(c ims.ConnID, reset bool) {
	if k := w.conns[c]; k != nil {
		w.closeConn(k, reset)
	}
}

func (w *Worker) closeConn(c *conn, reset bool) {
	if c.dead {
		return
	}
	if reset {
		_ = unix.SetsockoptLinger(c.gc.Fd(), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	}
	if c.busy { // gnet still uses it
		c.closing = true
		return
	}
	if err := c.gc.EventLoop().Close(c.gc); err != nil {
		w.log.Debug("close connection", errAttr(err))
	}
}

func (w *Worker) closeAll() {
	for _, c := range w.conns {
		w.closeConn(c, false)
	}
}

func (w *Worker) touch(c *conn) {
	c.last = w.now
	if c.flow.Side == ims.GmClear {
		w.clearIdle.toEnd(&c.idle, c)
		return
	}
	w.idle.toEnd(&c.idle, c)
}

// nextID returns an identifier that no live connection has. Connections are far fewer than identifiers.
func (w *Worker) nextID() ims.ConnID {
	for {
		w.lastID++
		if w.lastID > ims.MaxConnID {
			w.lastID = 1
		}
		if _, used := w.conns[w.lastID]; !used {
			return w.lastID
		}
	}
}

// open takes a connection that gnet has just added to the loop.
func (w *Worker) open(c *conn, gc gnet.Conn) gnet.Action {
	c.gc = gc
	c.id = w.nextID()
	c.flow.Conn = c.id
	w.conns[c.id] = c
	w.touch(c)
	w.st.Connections++
	c.opened.Store(true)
	if c.dialed {
		w.st.Dialed++
		c.busy = true
		w.dialed(c.tag, c.id, c.flow, nil)
		c.busy = false
	} else {
		w.st.Accepted++
	}
	return c.action()
}

// action is what gnet shall do after a callback.
func (c *conn) action() gnet.Action {
	if c.closing {
		return gnet.Close
	}
	return gnet.None
}

// gone is called by gnet when it closes the connection, possibly from within write.
func (w *Worker) gone(c *conn) {
	c.dead = true
	delete(w.conns, c.id)
	c.idle.remove()
	c.waits.remove()
	w.outbound -= c.out
	c.out = 0
	if !c.busy {
		w.dropPart(c)
	}
	w.st.Closed++
	w.st.Connections--
	w.f.release(c.flow)
	w.closed = append(w.closed, c)
}

// dropPart gives the buffer of the incomplete message back.
func (w *Worker) dropPart(c *conn) {
	c.parts.remove()
	w.setPart(c, nil)
	c.searched, c.header, c.rescan = 0, 0, 0
}

// setPart replaces the buffer of the incomplete message.
func (w *Worker) setPart(c *conn, part []byte) {
	w.buffered += bufferSize(part) - bufferSize(c.part)
	if cap(c.part) == partSize && len(w.free) < maxFreeBufs {
		w.free = append(w.free, c.part[:0])
	}
	c.part = part
}

// bufferSize returns what a connection's incomplete message takes besides the connection itself.
func bufferSize(part []byte) int {
	if cap(part) <= len(conn{}.small) {
		return 0
	}
	return cap(part)
}

// extend appends to the incomplete message.
func (w *Worker) extend(c *conn, b []byte) {
	n := len(c.part) + len(b)
	switch {
	case n <= cap(c.part):
		c.part = append(c.part, b...)
	case n <= len(c.small):
		w.setPart(c, append(append(c.small[:0], c.part...), b...))
	default:
		w.setPart(c, append(append(w.buffer(n), c.part...), b...))
	}
}

// buffer returns an empty buffer for at least n octets. The size is a power of two, so the number of times that a message
// is copied while it grows is small.
func (w *Worker) buffer(n int) []byte {
	size := partSize
	for size < n {
		size *= 2
	}
	if free := len(w.free); free > 0 && size == partSize {
		b := w.free[free-1]
		w.free = w.free[:free-1]
		return b
	}
	return make([]byte, 0, size)
}

// stream handles octets read from a connection. gnet's own buffer for leftovers is not used: it has no limit.
func (w *Worker) stream(c *conn, b []byte) gnet.Action {
	c.busy, c.ponged = true, false
	w.touch(c)
	w.st.sides[c.flow.Side].BytesIn += uint64(len(b))
	if len(c.part) == 0 {
		w.keep(c, w.frames(c, b))
	} else {
		w.extend(c, b)
		if w.worthFraming(c) {
			w.advance(c, w.frames(c, c.part))
		} else if c.parts.prev == nil {
			w.incomplete(c) // it was half a ping, it is a message now
		}
	}
	if len(c.part) > 0 && !c.dead && !c.closing && w.buffered > w.f.cfg.MaxBuffered {
		w.refuse(c, c.part, "buffered", DropBuffered)
	}
	c.busy = false
	if c.dead || c.closing {
		w.dropPart(c)
	}
	return c.action()
}

// frames handles the messages at the start of b and returns the incomplete rest.
func (w *Worker) frames(c *conn, b []byte) []byte {
	for len(b) > 0 && !c.closing && !c.dead {
		kind, n, err := w.frame(b)
		switch kind {
		case sipmsg.FrameNone:
			return b
		case sipmsg.FrameMessage:
			w.message(c.flow, b[:n:n])
		case sipmsg.FramePing: // RFC 5626 §3.5.1
			w.pong(c)
		case sipmsg.FrameBlank:
		case sipmsg.FrameBad:
			w.refuse(c, b, err.Reason, DropFraming)
			return nil
		}
		b = b[n:]
	}
	return nil
}

// pong answers pings: one for all that came together, which is enough to show that we are alive, and none to a peer that
// does not read. Otherwise a stranger has us do a system call for every four octets.
func (w *Worker) pong(c *conn) {
	if c.ponged || c.gc.OutboundBuffered() > 0 {
		return
	}
	c.ponged = true
	w.st.Pings++
	_ = w.write(c, pong)
}

// errPanic is the reason given when framing itself panics.
var errPanic = &sipmsg.Error{Reason: "panic", Text: "internal error"}

// frame finds what is at the start of b. It reads what strangers send, so a panic is taken for a bad stream.
func (w *Worker) frame(b []byte) (kind sipmsg.FrameKind, n int, err *sipmsg.Error) {
	kind, n, err = sipmsg.FrameBad, len(b), errPanic //nolint:wastedassign // what is returned after a panic
	defer w.guard()
	return sipmsg.Frame(b, w.f.cfg.MaxMessage)
}

// refuse gives the stream up.
func (w *Worker) refuse(c *conn, b []byte, reason string, drop Drop) {
	w.st.drops[drop]++
	w.bad(c.flow, b, reason)
	w.closeConn(c, false)
}

// keep stores the beginning of a message.
func (w *Worker) keep(c *conn, rest []byte) {
	if len(rest) == 0 || c.dead || c.closing {
		return
	}
	w.extend(c, rest)
	w.incomplete(c)
}

// advance removes what was framed from the stored octets.
func (w *Worker) advance(c *conn, rest []byte) {
	if len(rest) == 0 {
		w.dropPart(c)
		return
	}
	if len(rest) == len(c.part) {
		c.rescan += c.header
		if c.rescan > maxRescan*w.f.cfg.MaxMessage {
			w.refuse(c, c.part, "fragments", DropPartial)
		}
		if c.parts.prev == nil {
			w.incomplete(c)
		}
		return
	}
	if len(rest) <= len(c.small) {
		w.setPart(c, append(c.small[:0], rest...))
	} else {
		c.part = c.part[:copy(c.part, rest)]
	}
	c.searched, c.header, c.rescan = 0, 0, 0
	w.incomplete(c)
}

// incomplete notes that a message has begun and ends some time. Half a ping may wait for ever (a pong looks like one).
func (w *Worker) incomplete(c *conn) {
	if c.part[0] == '\r' && len(c.part) < len("\r\n\r\n") {
		c.parts.remove()
		return
	}
	c.since = w.now
	w.partial.toEnd(&c.parts, c)
}

// worthFraming tells whether Frame can find anything new in the stored octets. Without it a message of 64 KiB that comes
// octet by octet would be scanned from its start 65,536 times.
func (w *Worker) worthFraming(c *conn) bool {
	if c.header == 0 {
		c.header = c.headerEnd()
	}
	return c.header > 0 || len(c.part) <= probe || len(c.part) >= w.f.cfg.MaxMessage
}

// headerEnd looks for the empty line in what has come since the last call.
func (c *conn) headerEnd() int {
	from := max(c.searched-len("\n\r"), 0)
	c.searched = len(c.part)
	for _, end := range []string{"\n\r\n", "\n\n"} {
		if i := bytes.Index(c.part[from:], []byte(end)); i >= 0 {
			return from + i + len(end)
		}
	}
	return 0
}

// expire closes what has been idle, or incomplete, for too long, and returns how long there is nothing more of that.
func (w *Worker) expire() (next time.Duration) {
	for c := w.partial.front(); c != nil && w.now.Sub(c.since) >= w.f.cfg.PartialTimeout; c = w.partial.front() {
		c.parts.remove()
		w.refuse(c, c.part, "incomplete", DropPartial)
	}
	next = w.f.cfg.PartialTimeout
	if c := w.partial.front(); c != nil {
		next -= w.now.Sub(c.since)
	}
	return min(next, w.expireIdle(&w.idle, w.f.cfg.IdleTimeout), w.expireIdle(&w.clearIdle, w.f.cfg.ClearIdleTimeout))
}

// expireIdle is the same for one of the lists of idle connections.
func (w *Worker) expireIdle(l *list, timeout time.Duration) (next time.Duration) {
	for c := l.front(); c != nil && w.now.Sub(c.last) >= timeout; c = l.front() {
		c.idle.remove()
		w.st.drops[DropIdle]++
		w.closeConn(c, false)
	}
	if c := l.front(); c != nil {
		timeout -= w.now.Sub(c.last)
	}
	return timeout
}

// addrPortOf converts what the net package gives.
func addrPortOf(a interface{ AddrPort() netip.AddrPort }) netip.AddrPort {
	p := a.AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap().WithZone(""), p.Port())
}
