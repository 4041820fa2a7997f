package front

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/panjf2000/gnet/v2"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
)

// Back-off of an accept loop that lacks descriptors or memory.
const (
	minBackoff = 5 * time.Millisecond
	maxBackoff = time.Second
)

// accepter is what acceptLoop needs of a listener.
type accepter interface {
	AcceptTCP() (*net.TCPConn, error)
}

// acceptLoop accepts connections until the listener is closed. Running out of descriptors does not end it. member is the
// worker whose socket it is, -1: that of all.
func (f *Front) acceptLoop(ln accepter, l Listener, member int) {
	backoff := time.Duration(0)
	for {
		c, err := ln.AcceptTCP()
		if err == nil {
			backoff = 0
			f.accepted(c, l, member)
			continue
		}
		if errors.Is(err, net.ErrClosed) || f.ctx.Err() != nil {
			return
		}
		f.acceptErrors.Add(1)
		if backoff == 0 {
			f.log.Warn("accept connection", slog.String("listener", l.Addr.String()), errAttr(err))
		}
		backoff = min(max(2*backoff, minBackoff), maxBackoff)
		select {
		case <-time.After(backoff):
		case <-f.ctx.Done():
			return
		}
	}
}

// accepted gives a new connection to its worker. That need not be the one at whose socket it came in: its address may have
// moved since, and the kernel may have chosen without the steering program.
func (f *Front) accepted(c *net.TCPConn, l Listener, member int) {
	remote, ok := c.RemoteAddr().(*net.TCPAddr)
	switch {
	case !ok:
		_ = c.Close()
		return
	case remote.Zone != "":
		// gnet hands the memory of zone names to its buffer pool, but net still uses it: other peers' data would get
		// into it.
		f.drop(c, DropZone)
		return
	}
	peer := addrPortOf(remote)
	if l.Side == ims.Mw && !f.cfg.isCore(peer.Addr()) {
		f.drop(c, DropSource)
		return
	}
	flow := ims.Flow{Local: l.Addr, Remote: peer, Transport: ims.TCP, Side: l.Side}
	if l.labelled() {
		flow.Label = socketMark(c)
	}
	if !f.reserve(flow, f.cfg.MaxConnections) {
		f.drop(c, DropConnectionLimit)
		return
	}
	w := l.Worker
	if w < 0 {
		w = f.Owner(peer.Addr())
		if member >= 0 && member != w {
			f.strays.Add(1)
		}
	}
	k := &conn{w: f.workers[w], flow: flow}
	if err := tuneTCP(c, l.Side); err != nil { // the peer is gone already
		f.release(flow)
		_ = c.Close()
		return
	}
	f.background.Go(func() {
		if err := f.register(c, k); err != nil {
			f.log.Debug("take accepted connection", slog.String("peer", peer.String()), errAttr(err))
		}
	})
}

// drop refuses a connection with a reset, which leaves nothing behind.
func (f *Front) drop(c *net.TCPConn, d Drop) {
	f.drops[d].Add(1)
	_ = c.SetLinger(0)
	_ = c.Close()
}

// reserve counts a connection if there is room for it. release is the reverse.
func (f *Front) reserve(flow ims.Flow, limit int) bool {
	if f.conns.Add(1) > int64(limit) {
		f.conns.Add(-1)
		return false
	}
	if flow.Side == ims.GmClear &&
		!f.clear.add(flow.Remote.Addr(), max(f.cfg.MaxConnections/clearShare, 1), f.cfg.MaxPerSource) {
		f.conns.Add(-1)
		return false
	}
	return true
}

func (f *Front) release(flow ims.Flow) {
	f.conns.Add(-1)
	if flow.Side == ims.GmClear {
		f.clear.remove(flow.Remote.Addr())
	}
}

// sources counts connections by source, which is who can be told apart: an IPv4 address or an IPv6 /64, the least that
// one subscriber has. It has as many entries as there are connections at most.
type sources struct {
	mu    sync.Mutex
	total int
	count map[netip.Prefix]int
}

// sourceOf returns the source of an address.
func sourceOf(a netip.Addr) netip.Prefix {
	bits := 32
	if a = a.Unmap(); a.Is6() {
		bits = 64
	}
	p, _ := a.Prefix(bits) // no error: the length suits the family
	return p
}

// add counts a connection unless there are as many as the limits allow.
func (s *sources) add(a netip.Addr, total, perSource int) bool {
	p := sourceOf(a)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.total >= total || s.count[p] >= perSource {
		return false
	}
	if s.count == nil {
		s.count = make(map[netip.Prefix]int)
	}
	s.total++
	s.count[p]++
	return true
}

func (s *sources) remove(a netip.Addr) {
	p := sourceOf(a)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total--
	if s.count[p]--; s.count[p] <= 0 {
		delete(s.count, p)
	}
}

// register gives a connection to the worker's event loop and returns after OnOpen. It owns c, and the reservation.
func (f *Front) register(c *net.TCPConn, k *conn) error {
	ctx := gnet.NewNetConnContext(gnet.NewContext(context.Background(), k), c)
	result, err := k.w.engine.Register(ctx)
	if err == nil {
		select {
		case r := <-result:
			err = r.Err
		case <-k.w.ended: // the loop is gone, nobody will answer
			err = ErrClosed
		}
	}
	_ = c.Close() // gnet works on a duplicate
	if k.opened.Load() {
		return nil // gone gives the reservation back
	}
	f.release(k.flow)
	f.drops[DropRegister].Add(1)
	if err == nil {
		err = errors.New("event loop did not take the connection")
	}
	return fmt.Errorf("register connection: %w", err)
}

// dial is one request of Worker.Dial.
type dial struct {
	w      *Worker
	tag    uint64
	flow   ims.Flow
	hidden bool
}

// dialer runs the dials of one kind in a bounded set of goroutines, which end when nothing is left to do.
type dialer struct {
	mu      sync.Mutex
	pending []dial
	running int
}

// Dial connects to remote from local, whose port may be 0 for any and may be one that is listened on. hidden takes a
// socket in Config.Hidden. The result comes through Handler.Dialed.
func (w *Worker) Dial(local, remote netip.AddrPort, side ims.Side, hidden bool, tag uint64) {
	d := dial{
		w: w, tag: tag, hidden: hidden,
		flow: ims.Flow{Local: local, Remote: remote, Transport: ims.TCP, Side: side},
	}
	if err := w.f.startDial(d); err != nil {
		w.f.dialFailed(d, err)
	}
}

// dialer returns the queue for a side.
func (f *Front) dialer(side ims.Side) *dialer {
	if isGm(side) {
		return &f.dials[1]
	}
	return &f.dials[0]
}

func (f *Front) startDial(d dial) error {
	q := f.dialer(d.flow.Side)
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case f.ctx.Err() != nil:
		return ErrClosed
	case int(d.flow.Side) >= numSides:
		return ErrSide
	case q.running < f.cfg.MaxDials:
		q.running++
		f.background.Go(func() { f.runDials(q, d) })
		return nil
	case len(q.pending) >= 4*f.cfg.MaxDials:
		return ErrBusy
	}
	q.pending = append(q.pending, d)
	return nil
}

func (f *Front) runDials(q *dialer, d dial) {
	for more := true; more; d, more = q.next() {
		if err := f.dial(d); err != nil {
			f.dialFailed(d, err)
		}
	}
}

func (q *dialer) next() (d dial, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.pending) == 0 {
		q.pending = nil
		q.running--
		return dial{}, false
	}
	d = q.pending[0]
	q.pending = q.pending[1:]
	return d, true
}

// dialFailed tells the handler. The result is not subject to the limit of posts: there are as many as dials.
func (f *Front) dialFailed(d dial, err error) {
	f.dialErrors.Add(1)
	_ = d.w.inbox.push(task{run: func() { d.w.dialed(d.tag, 0, d.flow, err) }}, true)
}

func (f *Front) dial(d dial) error {
	local, remote := d.flow.Local, d.flow.Remote
	if !remote.IsValid() || !local.IsValid() || local.Addr().Is4() != remote.Addr().Is4() ||
		local.Addr().Zone() != "" || remote.Addr().Zone() != "" { // for the zone see accepted
		return fmt.Errorf("connect to %s from %s: %w", remote, local, ErrAddress)
	}
	if f.ctx.Err() != nil {
		return ErrClosed
	}
	limit := f.cfg.MaxConnections
	if d.flow.Side == ims.Mw {
		limit = f.room // whoever connects to us must not keep us from the core
	}
	if !f.reserve(d.flow, limit) {
		return fmt.Errorf("connect to %s: %w", remote, ErrTooMany)
	}
	c, err := f.connect(d)
	if err != nil {
		f.release(d.flow)
		return fmt.Errorf("connect to %s: %w", remote, err)
	}
	k := &conn{w: d.w, flow: d.flow, dialed: true, tag: d.tag}
	if a, ok := c.LocalAddr().(*net.TCPAddr); ok {
		k.flow.Local = addrPortOf(a)
	}
	return f.register(c, k)
}

// connect opens a connection. It does what net.Dialer does, but only the socket call has to run in the hidden namespace,
// so an attempt in progress does not hold an OS thread there. The socket is plain TCP, not MPTCP.
func (f *Front) connect(d dial) (*net.TCPConn, error) {
	v6 := d.flow.Local.Addr().Is6()
	opts := append(shareOptions(), f.cfg.addressOptions(v6, d.flow.Side)...)
	opts = append(opts, f.cfg.segmentOptions(d.flow.Side)...)
	opts = append(opts, option{
		level: unix.IPPROTO_TCP, name: unix.TCP_USER_TIMEOUT, value: int(userTimeout / time.Millisecond),
	})
	if d.flow.Local.Port() == 0 {
		// The port is chosen when the whole 4-tuple is known, so the range is not used up by other peers' connections.
		opts = append(opts, option{level: unix.IPPROTO_IP, name: unix.IP_BIND_ADDRESS_NO_PORT, value: 1, optional: true})
	}
	var fd int
	err := f.cfg.inNamespace(d.hidden, func() (err error) {
		fd, err = openSocket(unix.SOCK_STREAM, d.flow.Local, opts)
		return err
	})
	if err != nil {
		return nil, err
	}
	switch err := unix.Connect(fd, sockaddr(d.flow.Remote)); err { //nolint:errorlint // an errno, never wrapped
	case nil, unix.EINPROGRESS, unix.EINTR:
	default:
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("connect", err)
	}
	file := os.NewFile(uintptr(fd), "tcp") //nolint:gosec // G115: a descriptor
	defer file.Close()                     //nolint:errcheck // only a duplicate is used afterwards
	if err := f.awaitConnect(file); err != nil {
		return nil, err
	}
	c, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	tc, ok := c.(*net.TCPConn)
	if !ok || tc.RemoteAddr() == nil { // reset meanwhile
		_ = c.Close()
		return nil, os.NewSyscallError("connect", unix.ECONNRESET)
	}
	if err := tuneTCP(tc, d.flow.Side); err != nil {
		_ = tc.Close()
		return nil, err
	}
	return tc, nil
}

// awaitConnect waits for the end of a connection attempt on Go's poller.
func (f *Front) awaitConnect(file *os.File) error {
	if err := file.SetWriteDeadline(time.Now().Add(f.cfg.DialTimeout)); err != nil {
		return err
	}
	stop := context.AfterFunc(f.ctx, func() { _ = file.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	rc, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = rc.Write(func(fd uintptr) bool {
		errno, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		switch {
		case err != nil:
			failed = os.NewSyscallError("getsockopt", err)
			return true
		case errno != 0:
			failed = os.NewSyscallError("connect", unix.Errno(errno)) //nolint:gosec // G115: an errno
			return true
		}
		_, err = unix.Getpeername(int(fd))
		return err == nil // otherwise a spurious wake-up
	})
	switch {
	case failed != nil:
		return failed
	case f.ctx.Err() != nil:
		return ErrClosed
	case errors.Is(err, os.ErrDeadlineExceeded):
		return os.NewSyscallError("connect", unix.ETIMEDOUT)
	}
	return err
}
