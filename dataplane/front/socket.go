package front

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
)

// Specification and implementation constants of TCP connections.
const (
	// coreKeepAlive finds dead connections towards the core. On Gm keep-alive stays off: it would wake phones.
	coreKeepAlive = time.Minute

	// userTimeout ends a connection dialed by us whose data nobody acknowledges: after 32 s the transactions of
	// RFC 3261 §17 have ended anyway.
	userTimeout = 30 * time.Second
)

func isGm(s ims.Side) bool { return s == ims.GmClear || s == ims.GmProtected }

// inNamespace runs f in the hidden namespace or where we are.
func (c *Config) inNamespace(hidden bool, f func() error) error {
	if hidden && c.Hidden != nil {
		if err := c.Hidden.Do(f); err != nil {
			return fmt.Errorf("in the hidden namespace: %w", err)
		}
		return nil
	}
	return f()
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// localAddr returns the address that a socket is bound to.
func localAddr(fd int) (netip.AddrPort, error) {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return netip.AddrPort{}, os.NewSyscallError("getsockname", err)
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)), nil //nolint:gosec // G115: a port
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port)), nil //nolint:gosec // G115: a port
	}
	return netip.AddrPort{}, errors.New("not an IP socket")
}

// option is a socket option to set before bind.
type option struct {
	level, name, value int
	optional           bool // failure does not matter
}

func setOptions(fd int, opts []option) error {
	for _, o := range opts {
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil && !o.optional {
			return fmt.Errorf("set socket option %d/%d: %w", o.level, o.name, os.NewSyscallError("setsockopt", err))
		}
	}
	return nil
}

// shareOptions let several sockets of ours have one local address.
func shareOptions() []option {
	return []option{
		{level: unix.SOL_SOCKET, name: unix.SO_REUSEADDR, value: 1},
		{level: unix.SOL_SOCKET, name: unix.SO_REUSEPORT, value: 1},
	}
}

func (c *Config) addressOptions(v6 bool, side ims.Side) []option {
	var o []option
	if side == ims.Mw && c.mwIndex != 0 {
		o = append(o, option{level: unix.SOL_SOCKET, name: unix.SO_BINDTOIFINDEX, value: c.mwIndex})
	}
	if v6 {
		o = append(o, option{level: unix.IPPROTO_IPV6, name: unix.IPV6_V6ONLY, value: 1})
	}
	if c.FreeBind {
		if v6 {
			o = append(o, option{level: unix.IPPROTO_IPV6, name: unix.IPV6_FREEBIND, value: 1})
		} else {
			o = append(o, option{level: unix.IPPROTO_IP, name: unix.IP_FREEBIND, value: 1})
		}
	}
	return o
}

func (c *Config) udpOptions(v6 bool, side ims.Side) []option {
	o := c.addressOptions(v6, side)
	// FORCE needs CAP_NET_ADMIN and exceeds net.core.[rw]mem_max; without it we get what the limits allow.
	o = append(o,
		option{level: unix.SOL_SOCKET, name: unix.SO_RCVBUF, value: c.ReadBuffer},
		option{level: unix.SOL_SOCKET, name: unix.SO_SNDBUF, value: c.WriteBuffer},
		option{level: unix.SOL_SOCKET, name: unix.SO_RCVBUFFORCE, value: c.ReadBuffer, optional: true},
		option{level: unix.SOL_SOCKET, name: unix.SO_SNDBUFFORCE, value: c.WriteBuffer, optional: true},
	)
	// No error queue: an ICMP error about one peer must not fail the next send to another one. And no path MTU
	// discovery: the first large datagram after a change of path would be lost with the don't-fragment bit set.
	if v6 {
		return append(o,
			option{level: unix.IPPROTO_IPV6, name: unix.IPV6_RECVERR, value: 0},
			option{level: unix.IPPROTO_IPV6, name: unix.IPV6_MTU_DISCOVER, value: unix.IPV6_PMTUDISC_DONT})
	}
	return append(o,
		option{level: unix.IPPROTO_IP, name: unix.IP_RECVERR, value: 0},
		option{level: unix.IPPROTO_IP, name: unix.IP_MTU_DISCOVER, value: unix.IP_PMTUDISC_DONT})
}

// openSocket opens a non-blocking socket in the calling thread's namespace, sets options and binds it.
func openSocket(typ int, addr netip.AddrPort, opts []option) (fd int, err error) {
	fd, err = unix.Socket(family(addr.Addr()), typ|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	defer func() {
		if err != nil {
			_ = unix.Close(fd)
			fd = -1
		}
	}()
	if err := setOptions(fd, opts); err != nil {
		return fd, err
	}
	if err := unix.Bind(fd, sockaddr(addr)); err != nil {
		return fd, os.NewSyscallError("bind", err)
	}
	return fd, nil
}

// openAlone opens a socket at an address that nobody else uses and lets sockets of ours join it there afterwards. With
// SO_REUSEPORT set before bind a second process of the same user would share the address silently, and take part of the
// traffic; and the kernel may choose a port that another such socket has.
func openAlone(typ int, addr netip.AddrPort, opts []option) (int, error) {
	fd, err := openSocket(typ, addr, opts)
	if err != nil {
		return -1, err
	}
	if err := setOptions(fd, shareOptions()); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// claimTCP fails if somebody else listens on the address, and chooses a port if it has none. See openAlone;
// net.ListenConfig cannot work like that.
func (c *Config) claimTCP(l Listener) (netip.AddrPort, error) {
	addr := l.Addr
	opts := c.addressOptions(addr.Addr().Is6(), l.Side)
	if addr.Port() != 0 {
		// Connections of a predecessor in TIME_WAIT do not count, listening sockets still do.
		opts = append(opts, option{level: unix.SOL_SOCKET, name: unix.SO_REUSEADDR, value: 1})
	}
	fd, err := openSocket(unix.SOCK_STREAM, addr, opts)
	if err != nil {
		return addr, err
	}
	addr, err = localAddr(fd)
	return addr, errors.Join(err, os.NewSyscallError("close", unix.Close(fd)))
}

// openGroup opens the UDP sockets of a listener, one for each of n workers, in order. The address it returns has the port
// that the kernel chose if that of the listener has none.
func (c *Config) openGroup(l Listener, n int) (fds []int, bound netip.AddrPort, err error) {
	addr := l.Addr
	defer func() {
		if err != nil {
			closeAll(fds)
			fds = nil
		}
	}()
	opts := c.udpOptions(addr.Addr().Is6(), l.Side)
	if l.labelled() { // an older kernel does without
		opts = append(opts, option{level: unix.SOL_SOCKET, name: unix.SO_RCVMARK, value: 1, optional: true})
	}
	first, err := openAlone(unix.SOCK_DGRAM, addr, opts)
	if err != nil {
		return nil, addr, err
	}
	fds = append(fds, first)
	if addr, err = localAddr(first); err != nil {
		return fds, addr, err
	}
	opts = append(opts, shareOptions()...)
	for len(fds) < n {
		fd, err := openSocket(unix.SOCK_DGRAM, addr, opts)
		if err != nil {
			return fds, addr, err
		}
		fds = append(fds, fd)
	}
	return fds, addr, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}

// listenTCP opens the listening sockets of a listener, n of them at the same address, in order.
func (c *Config) listenTCP(l Listener, n int) (lns []*net.TCPListener, err error) {
	defer func() {
		if err != nil {
			for _, ln := range lns {
				_ = ln.Close()
			}
			lns = nil
		}
	}()
	v6 := l.Addr.Addr().Is6()
	opts := append(shareOptions(), c.addressOptions(v6, l.Side)...)
	opts = append(opts, c.segmentOptions(l.Side)...) // accepted connections inherit it
	lc := net.ListenConfig{
		KeepAlive: -1,
		Control: func(_, _ string, rc syscall.RawConn) error {
			var err error
			return errors.Join(rc.Control(func(fd uintptr) { err = setOptions(int(fd), opts) }), err)
		},
	}
	lc.SetMultipathTCP(false) // Go's default, but it refuses socket options and sharing of ports
	network := "tcp4"
	if v6 {
		network = "tcp6"
	}
	err = c.inNamespace(l.Hidden, func() error {
		addr, err := c.claimTCP(l)
		if err != nil {
			return err
		}
		for len(lns) < n {
			ln, err := lc.Listen(context.Background(), network, addr.String())
			if err != nil {
				return err
			}
			lns = append(lns, ln.(*net.TCPListener)) //nolint:forcetypeassert // what the network gives
		}
		return nil
	})
	return lns, err
}

// duplicates returns descriptors of listening sockets, the caller's to close also with an error.
func duplicates(lns []*net.TCPListener) (fds []int, err error) {
	for _, ln := range lns {
		rc, err := ln.SyscallConn()
		if err != nil {
			return fds, err
		}
		var fd int
		var dup error
		err = rc.Control(func(s uintptr) { fd, dup = unix.FcntlInt(s, unix.F_DUPFD_CLOEXEC, 0) })
		if err := errors.Join(err, os.NewSyscallError("fcntl", dup)); err != nil {
			return fds, err
		}
		fds = append(fds, fd)
	}
	return fds, nil
}

// socketMark returns the mark of an accepted connection: with net.ipv4.tcp_fwmark_accept that of the packet which opened
// it, else 0.
func socketMark(c *net.TCPConn) (mark uint32) {
	rc, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	_ = rc.Control(func(fd uintptr) {
		if n, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK); err == nil {
			mark = uint32(n) //nolint:gosec // G115: 32 bits of the kernel
		}
	})
	return mark
}

func (c *Config) segmentOptions(side ims.Side) []option {
	if c.TCPMaxSeg == 0 || !isGm(side) {
		return nil
	}
	return []option{{level: unix.IPPROTO_TCP, name: unix.TCP_MAXSEG, value: c.TCPMaxSeg}}
}

// tuneTCP sets what concerns an established connection.
func tuneTCP(c *net.TCPConn, side ims.Side) error {
	ka := net.KeepAliveConfig{Enable: false}
	if !isGm(side) {
		ka = net.KeepAliveConfig{Enable: true, Idle: coreKeepAlive, Interval: coreKeepAlive / 4, Count: 4}
	}
	err := errors.Join(c.SetNoDelay(true), c.SetKeepAliveConfig(ka))
	if side == ims.GmProtected {
		// However it ends, even with the process: a closed socket must not go on sending what is not acknowledged, since
		// that would leave in clear once the SAs and their policies are gone (TS 33.203 §7).
		err = errors.Join(err, c.SetLinger(0))
	}
	if err != nil {
		return fmt.Errorf("set options of connection: %w", err)
	}
	return nil
}

// socketDrops returns how many datagrams the kernel has dropped at a socket.
func socketDrops(fd int) (uint32, bool) {
	var mem [unix.SK_MEMINFO_VARS]uint32
	n := uint32(unsafe.Sizeof(mem))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&mem)), uintptr(unsafe.Pointer(&n)), 0)
	return mem[unix.SK_MEMINFO_DROPS], errno == 0
}
