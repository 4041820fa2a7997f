package xfrm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// ErrNoAck is the result of a message whose acknowledgement never came, so that it is unknown whether the kernel did it.
var ErrNoAck = errors.New("no acknowledgement from the kernel")

// KernelError is a refusal by the kernel. errors.As finds the errno in it as syscall.Errno.
type KernelError struct {
	Errno unix.Errno
	Text  string // the kernel's own explanation, often empty
}

// Error implements error.
func (e *KernelError) Error() string {
	if e.Text == "" {
		return e.Errno.Error()
	}
	return e.Errno.Error() + " (" + e.Text + ")"
}

// Unwrap returns the errno.
func (e *KernelError) Unwrap() error { return e.Errno }

// socket is the netlink socket; tests put a kernel of their own behind it.
type socket interface {
	send(b []byte) error
	recv(b []byte) (int, error)
	port() (uint32, error) // what the kernel calls it in notifications of what it did
	close() error
}

// netlinkSocket is a NETLINK_XFRM socket.
type netlinkSocket int

const (
	socketBuffer  = 4 << 20         // far more than the acknowledgements of one batch
	answerTimeout = 2 * time.Second // the kernel answers within send; this only guards against waiting for ever
)

// openSocket opens a NETLINK_XFRM socket in a namespace, nil for the process's.
func openSocket(ns *hostnet.NS) (socket, error) {
	var fd int
	err := inside(ns, func() (err error) {
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_XFRM)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open XFRM netlink socket: %w", err)
	}
	for _, o := range []struct{ level, name, value int }{
		{unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, socketBuffer},
		{unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, socketBuffer},
		// Without it an error message quotes the whole request, keys included.
		{unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1},
		{unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1},
	} {
		// Best effort: larger buffers need a capability whose absence shows at the first message anyway.
		_ = unix.SetsockoptInt(fd, o.level, o.name, o.value)
	}
	tv := unix.NsecToTimeval(int64(answerTimeout))
	err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("set up XFRM netlink socket: %w", err), unix.Close(fd))
	}
	return netlinkSocket(fd), nil
}

// lockSocket holds a lock on a namespace until it is closed, at the latest by the end of the process.
type lockSocket int

func lockName(reqid int) string { return fmt.Sprintf("@gmgate-xfrm-%d", reqid) }

// Locked reports whether a Backend with DefaultReqID has the namespace that a list of Unix sockets is of
// (/proc/thread-self/net/unix).
func Locked(sockets string) bool {
	for line := range strings.Lines(sockets) {
		if f := strings.Fields(line); len(f) > 0 && f[len(f)-1] == lockName(DefaultReqID) {
			return true
		}
	}
	return false
}

// openLock takes the lock of a namespace and reqid. It is an abstract Unix socket name, because these belong to the
// network namespace, and are free again the moment their owner dies.
func openLock(ns *hostnet.NS, reqid int) (io.Closer, error) {
	name := lockName(reqid)
	var fd int
	err := inside(ns, func() (err error) {
		if fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		// A listener, so that tools like ss show it; nobody ever accepts.
		if err = unix.Bind(fd, &unix.SockaddrUnix{Name: name}); err == nil {
			err = unix.Listen(fd, 0)
		}
		if err != nil {
			return errors.Join(err, unix.Close(fd))
		}
		return nil
	})
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("lock %s: %w", name, ErrInUse)
	}
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	return lockSocket(fd), nil
}

// Close releases the lock.
func (s lockSocket) Close() error { return unix.Close(int(s)) }

func (s netlinkSocket) send(b []byte) error {
	for {
		err := unix.Sendto(int(s), b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func (s netlinkSocket) recv(b []byte) (int, error) {
	for {
		n, from, err := unix.Recvfrom(int(s), b, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if a, ok := from.(*unix.SockaddrNetlink); err == nil && (!ok || a.Pid != 0) {
			continue // not from the kernel
		}
		return n, err
	}
}

func (s netlinkSocket) port() (uint32, error) {
	a, err := unix.Getsockname(int(s))
	if err != nil {
		return 0, fmt.Errorf("look up XFRM netlink port: %w", err)
	}
	n, ok := a.(*unix.SockaddrNetlink)
	if !ok {
		return 0, fmt.Errorf("look up XFRM netlink port: %w", unix.EAFNOSUPPORT)
	}
	return n.Pid, nil
}

func (s netlinkSocket) close() error { return unix.Close(int(s)) }

// conn exchanges messages with the kernel. It is not safe for concurrent use.
//
//	c.reset(); c.state(…); c.deleteState(…); for i, err := range c.run() { … }
type conn struct {
	messages
	sock    socket
	rbuf    []byte
	results []error
	replies func(typ uint16, body []byte) // receives everything that is not an acknowledgement, or nil
	broken  bool                          // a dump was interrupted by a change
}

const (
	sendCapacity = 128 << 10 // a full batch with the largest window fits: the buffer with keys is never reallocated
	recvCapacity = 64 << 10  // larger than any datagram the kernel makes for a dump
)

func newConn(s socket) *conn {
	return &conn{messages: messages{buf: make([]byte, 0, sendCapacity), seq: 1}, sock: s, rbuf: make([]byte, recvCapacity)}
}

// reset forgets the messages so far and starts a new batch.
func (c *conn) reset() {
	c.messages.reset(c.seq + uint32(c.count)) //nolint:gosec // wraps
}

// run sends the messages in one system call and reads one acknowledgement for each. The result of message i is at
// index i: nil, a *KernelError, or an error wrapping ErrNoAck. The slice is valid until the next run.
func (c *conn) run() []error {
	c.results = c.results[:0]
	for range c.count {
		c.results = append(c.results, ErrNoAck)
	}
	if c.count == 0 {
		return nil
	}
	err := c.sock.send(c.buf)
	clear(c.buf) // keys
	for left := c.count; left > 0 && err == nil; {
		var n int
		if n, err = c.sock.recv(c.rbuf); err == nil {
			left -= c.read(c.rbuf[:n])
			clear(c.rbuf[:n]) // dumps carry keys
		} else if errors.Is(err, unix.ENOBUFS) {
			err, c.broken = nil, true // acknowledgements were lost; those that were not are still to come
		}
	}
	if err != nil {
		for i, r := range c.results {
			if errors.Is(r, ErrNoAck) {
				c.results[i] = fmt.Errorf("%w: %w", ErrNoAck, err)
			}
		}
	}
	return c.results
}

// read takes one datagram apart and returns how many messages it settled.
func (c *conn) read(b []byte) (settled int) {
	for len(b) >= unix.SizeofNlMsghdr {
		n := int(binary.NativeEndian.Uint32(b))
		if n < unix.SizeofNlMsghdr || n > len(b) {
			return settled
		}
		typ, flags := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint16(b[6:])
		i := binary.NativeEndian.Uint32(b[8:]) - c.seq
		body := b[unix.SizeofNlMsghdr:n]
		b = b[min((n+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1), len(b)):]
		if uint64(i) >= uint64(len(c.results)) {
			continue // answer to an earlier batch
		}
		c.broken = c.broken || flags&unix.NLM_F_DUMP_INTR != 0
		switch {
		case typ == unix.NLMSG_ERROR, typ == unix.NLMSG_DONE:
			if errors.Is(c.results[i], ErrNoAck) {
				settled++
			}
			c.results[i] = answer(body, flags)
		case c.replies != nil:
			c.replies(typ, body)
		}
	}
	return settled
}

// answer reads the body of NLMSG_ERROR or NLMSG_DONE.
func answer(b []byte, flags uint16) error {
	if len(b) < 4 {
		return errShortMessage
	}
	code := int32(binary.NativeEndian.Uint32(b)) //nolint:gosec // the kernel's signed errno
	if code >= 0 {
		return nil
	}
	e := &KernelError{Errno: unix.Errno(-code)}
	// An error quotes the header of the request, with NETLINK_CAP_ACK no more, then come explaining attributes.
	const quoted = 4 + unix.SizeofNlMsghdr
	if flags&unix.NLM_F_ACK_TLVS != 0 && len(b) > quoted {
		if t, ok := findAttr(b[quoted:], unix.NLMSGERR_ATTR_MSG); ok {
			e.Text = string(trimZero(t))
		}
	}
	return e
}

func trimZero(b []byte) []byte {
	for len(b) > 0 && b[len(b)-1] == 0 {
		b = b[:len(b)-1]
	}
	return b
}

// ask runs a single request and hands its replies to f.
func (c *conn) ask(typ, flags uint16, n int, f func(typ uint16, body []byte)) error {
	c.reset()
	c.query(typ, flags, n)
	c.replies, c.broken = f, false
	err := c.run()[0]
	c.replies = nil
	return err
}

// dumpTries bounds the repetitions of a dump that changes of other programs interrupt.
const dumpTries = 5

var errDumpInterrupted = errors.New("dump interrupted by changes")

// states returns the states of which keep says yes.
func (c *conn) states(keep func(stateHead) bool) (ids []stateID, err error) {
	err = c.dumpStates(func() { ids = ids[:0] }, func(info *nl.XfrmUsersaInfo, _ []byte) error {
		if h := headOf(info); keep(h) {
			ids = append(ids, h.id)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return ids, nil
}

// dumpStates shows every state of the namespace with its attributes to each, one at a time: they carry keys and are
// overwritten afterwards. It calls reset before each attempt. After an error of each, it sees no more.
func (c *conn) dumpStates(reset func(), each func(info *nl.XfrmUsersaInfo, attrs []byte) error) error {
	var err error
	for range dumpTries {
		reset()
		var bad error
		err = c.ask(nl.XFRM_MSG_GETSA, unix.NLM_F_DUMP, 0, func(typ uint16, body []byte) {
			switch {
			case bad != nil || typ != nl.XFRM_MSG_NEWSA:
			case len(body) < nl.SizeofXfrmUsersaInfo:
				bad = errShortMessage
			default:
				bad = each(nl.DeserializeXfrmUsersaInfo(body), body[nl.SizeofXfrmUsersaInfo:])
			}
		})
		if err = errors.Join(err, bad); err == nil && c.broken {
			err = errDumpInterrupted
			continue
		}
		break
	}
	if err != nil {
		return fmt.Errorf("list states: %w", err)
	}
	return nil
}

// policies returns all policies of the namespace.
func (c *conn) policies() (list []nl.XfrmUserpolicyInfo, err error) {
	for range dumpTries {
		list = list[:0]
		var bad error
		err = c.ask(nl.XFRM_MSG_GETPOLICY, unix.NLM_F_DUMP, 0, func(typ uint16, body []byte) {
			if typ != nl.XFRM_MSG_NEWPOLICY {
				return
			}
			p, err := parsePolicy(body)
			if err != nil {
				bad = err
				return
			}
			list = append(list, p)
		})
		if err = errors.Join(err, bad); err == nil && c.broken {
			err = errDumpInterrupted
			continue
		}
		break
	}
	if err != nil {
		return nil, fmt.Errorf("list policies: %w", err)
	}
	return list, nil
}

// removeStates deletes states and returns how many; ones that are gone already do not count, neither as errors.
func (c *conn) removeStates(ids []stateID) (int, error) {
	removed := len(ids)
	err := c.inBatches(len(ids), func(i int) { c.deleteState(ids[i]) }, func(i int, err error) error {
		removed--
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		return fmt.Errorf("remove SA %s of %s: %w", ids[i].spi, ids[i].dst, err)
	})
	return removed, err
}

// sweep deletes every state of which keep says yes.
func (c *conn) sweep(keep func(stateHead) bool) error {
	ids, err := c.states(keep)
	if err == nil {
		_, err = c.removeStates(ids)
	}
	return err
}

// inBatches sends n messages, as many at once as a batch takes. failed sees each error and returns what is left of it.
func (c *conn) inBatches(n int, add func(i int), failed func(i int, err error) error) error {
	var errs []error
	for from := 0; from < n; from += maxBatch {
		c.reset()
		for i := from; i < min(from+maxBatch, n); i++ {
			add(i)
		}
		for i, err := range c.run() {
			if err != nil {
				if err = failed(from+i, err); err != nil {
					errs = append(errs, err)
				}
			}
		}
		if len(errs) > maxErrors {
			break
		}
	}
	return errors.Join(errs...)
}

const (
	maxBatch  = 64 // messages in one system call: measured 1.5 (add) to 3 times (delete) cheaper than one by one
	maxErrors = 8  // errors kept of one bulk operation
)

// countStates returns the number of states in the namespace, foreign ones included.
func (c *conn) countStates() (int, error) {
	count := -1
	err := c.ask(nl.XFRM_MSG_GETSADINFO, 0, 4, func(typ uint16, body []byte) {
		if typ == nl.XFRM_MSG_NEWSADINFO && len(body) >= 4 {
			if v, ok := findAttr(body[4:], attrSADCount); ok && len(v) >= 4 {
				count = int(binary.NativeEndian.Uint32(v))
			}
		}
	})
	if err == nil && count < 0 {
		err = errShortMessage
	}
	if err != nil {
		return 0, fmt.Errorf("count states: %w", err)
	}
	return count, nil
}

// countPolicies returns the number of policies in the namespace, foreign ones included, socket policies not.
func (c *conn) countPolicies() (int, error) {
	count := -1
	err := c.ask(nl.XFRM_MSG_GETSPDINFO, 0, 4, func(typ uint16, body []byte) {
		if typ != nl.XFRM_MSG_NEWSPDINFO || len(body) < 4 {
			return
		}
		if v, ok := findAttr(body[4:], attrSPDInfo); ok && len(v) >= 12 {
			count = 0
			for dir := range 3 {
				count += int(binary.NativeEndian.Uint32(v[4*dir:]))
			}
		}
	})
	if err == nil && count < 0 {
		err = errShortMessage
	}
	if err != nil {
		return 0, fmt.Errorf("count policies: %w", err)
	}
	return count, nil
}
