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

	partSize    = 8 << 10 // first size of the buffer for an incomplete message, and the largest that is kept for reuse
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

	part     []byte // incomplete message
	searched int    // part of it known to have no end of header
	header   int    // length of its header once that is complete, or 0
	rescan   int    // octets scanned in vain since

	last  time.Time // of traffic
	since time.Time // part is not empty
	idle  link
	parts link
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

// SendTCP sends a message on a connection. What the kernel does not take at once waits, up to Config.MaxOutbound; a peer
// that lets it grow further is cut off: ErrOverflow. ErrNoConn says that the connection is gone or being closed.
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
		w.st.drops[DropOutbound]++
		w.closeConn(c, true)
		return ErrOverflow
	}
	if _, err := c.gc.Write(b); err != nil { // gnet has closed the connection and called OnClose
		return ErrNoConn
	}
	w.st.sides[c.flow.Side].BytesOut += uint64(len(b))
	w.touch(c)
	return nil
}

// CloseConn closes a connection; Closed follows. With reset the peer gets a RST and what waits to be sent is thrown away.
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
	if !c.busy {
		w.dropPart(c)
	}
	w.st.Closed++
	w.st.Connections--
	w.f.conns.Add(-1)
	w.closed = append(w.closed, c)
}

// dropPart gives the buffer of the incomplete message back.
func (w *Worker) dropPart(c *conn) {
	c.parts.remove()
	w.buffered -= len(c.part)
	if cap(c.part) == partSize && len(w.free) < maxFreeBufs {
		w.free = append(w.free, c.part[:0])
	}
	c.part = nil
	c.searched, c.header, c.rescan = 0, 0, 0
}

// stream handles octets read from a connection. gnet's own buffer for leftovers is not used: it has no limit.
func (w *Worker) stream(c *conn, b []byte) gnet.Action {
	c.busy = true
	w.touch(c)
	w.st.sides[c.flow.Side].BytesIn += uint64(len(b))
	if len(c.part) == 0 {
		w.keep(c, w.frames(c, b))
	} else {
		c.part = append(c.part, b...)
		w.buffered += len(b)
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
			w.st.Pings++
			_ = w.write(c, pong)
		case sipmsg.FrameBlank:
		case sipmsg.FrameBad:
			w.refuse(c, b, err.Reason, DropFraming)
			return nil
		}
		b = b[n:]
	}
	return nil
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
	if n := len(w.free); n > 0 && len(rest) <= partSize {
		c.part = w.free[n-1]
		w.free = w.free[:n-1]
	} else {
		c.part = make([]byte, 0, max(partSize, len(rest)))
	}
	c.part = append(c.part, rest...)
	w.buffered += len(rest)
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
	n := copy(c.part, rest)
	w.buffered -= len(c.part) - n
	c.part = c.part[:n]
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

// expire closes what has been idle, or incomplete, for too long.
func (w *Worker) expire() {
	for c := w.partial.front(); c != nil && w.now.Sub(c.since) >= w.f.cfg.PartialTimeout; c = w.partial.front() {
		c.parts.remove()
		w.refuse(c, c.part, "incomplete", DropPartial)
	}
	for c := w.idle.front(); c != nil && w.now.Sub(c.last) >= w.f.cfg.IdleTimeout; c = w.idle.front() {
		c.idle.remove()
		w.st.drops[DropIdle]++
		w.closeConn(c, false)
	}
}

// addrPortOf converts what the net package gives.
func addrPortOf(a interface{ AddrPort() netip.AddrPort }) netip.AddrPort {
	p := a.AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap().WithZone(""), p.Port())
}
