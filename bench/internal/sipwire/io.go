package sipwire

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// MaxMessage bounds what a test end reads as one message.
const MaxMessage = 65535

// UDPLimit is the largest request that may go by UDP when the path MTU is unknown (RFC 3261 §18.1.1).
const UDPLimit = 1300

// ReadMessage reads the next message of a stream (RFC 3261 §18.3). ping is true, and the message empty, when a
// keepalive CRLFCRLF was read instead (RFC 5626 §4.4.1); pong when a single CRLF was.
func ReadMessage(r *bufio.Reader) (msg []byte, ping, pong bool, err error) {
	var buf []byte
	length := -1
	for {
		line, err := r.ReadSlice('\n')
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			if len(buf) > 0 && errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, false, false, err
		}
		full := err == nil
		start := len(buf) == 0
		if start && string(line) == "\r\n" {
			if r.Buffered() >= 2 {
				if b, err := r.Peek(2); err == nil && string(b) == "\r\n" {
					_, _ = r.Discard(2)
					return nil, true, false, nil
				}
			}
			return nil, false, true, nil
		}
		buf = append(buf, line...)
		if len(buf) > MaxMessage {
			return nil, false, false, fmt.Errorf("%w: headers over %d bytes", ErrMalformed, MaxMessage)
		}
		if !full {
			continue
		}
		if string(line) == "\r\n" && bytes.HasSuffix(buf, []byte("\r\n\r\n")) {
			break
		}
		row := buf[bytes.LastIndexByte(buf[:len(buf)-1], '\n')+1:]
		if name, value, ok := strings.Cut(string(row), ":"); ok {
			name = strings.TrimSpace(name)
			if strings.EqualFold(name, "Content-Length") || strings.EqualFold(name, "l") {
				n, err := strconv.ParseUint(strings.TrimSpace(value), 10, 31)
				if err != nil || n > MaxMessage {
					return nil, false, false, fmt.Errorf("%w: Content-Length %q", ErrMalformed, value)
				}
				length = int(n)
			}
		}
	}
	if length < 0 {
		return nil, false, false, fmt.Errorf("%w: no Content-Length on a stream", ErrMalformed)
	}
	head := len(buf)
	buf = append(buf, make([]byte, length)...)
	if _, err := io.ReadFull(r, buf[head:]); err != nil {
		return nil, false, false, err
	}
	return buf, false, false, nil
}

// in runs f inside the namespace; nil means the process's own.
func in(ns *hostnet.NS, f func() error) error {
	if ns == nil {
		return f()
	}
	return ns.Do(f)
}

func reuse(_, _ string, c syscall.RawConn) error {
	var err error
	if e := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}); e != nil {
		return e
	}
	return err
}

// ListenUDP opens a UDP socket inside a namespace (nil: the process's own). Port zero lets the kernel choose.
func ListenUDP(ns *hostnet.NS, a netip.AddrPort) (*net.UDPConn, error) {
	var c *net.UDPConn
	err := in(ns, func() error {
		var err error
		c, err = net.ListenUDP(network("udp", a.Addr()), net.UDPAddrFromAddrPort(a))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open UDP socket %s: %w", a, err)
	}
	return c, nil
}

// Deepen gives a socket buffers of so many octets, beyond the host's limit where the process may: bursts of a load generator
// shall not be lost in the harness.
func Deepen(c *net.UDPConn, octets int) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return fmt.Errorf("set socket buffers: %w", err)
	}
	var errs []error
	err = raw.Control(func(fd uintptr) {
		for _, o := range []struct{ force, limited int }{
			{unix.SO_RCVBUFFORCE, unix.SO_RCVBUF}, {unix.SO_SNDBUFFORCE, unix.SO_SNDBUF},
		} {
			if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, o.force, octets) != nil {
				errs = append(errs, os.NewSyscallError("setsockopt", unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, o.limited, octets)))
			}
		}
	})
	if err = errors.Join(append(errs, err)...); err != nil {
		return fmt.Errorf("set socket buffers: %w", err)
	}
	return nil
}

// ListenTCP opens a TCP listener inside a namespace. Multipath TCP is off, as on every SIP socket of the project.
func ListenTCP(ns *hostnet.NS, a netip.AddrPort) (*net.TCPListener, error) {
	var l net.Listener
	err := in(ns, func() error {
		lc := net.ListenConfig{Control: reuse}
		lc.SetMultipathTCP(false)
		var err error
		l, err = lc.Listen(context.Background(), network("tcp", a.Addr()), a.String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen on TCP %s: %w", a, err)
	}
	return l.(*net.TCPListener), nil
}

// DialTCP connects from one address and port to another inside a namespace. The connection is closed with a reset,
// so that the same pair of ports can be used again at once (a protected connection has a fixed 4-tuple).
func DialTCP(ctx context.Context, ns *hostnet.NS, from, to netip.AddrPort) (*net.TCPConn, error) {
	var c net.Conn
	err := in(ns, func() error {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(from), Control: reuse, KeepAlive: -1}
		d.SetMultipathTCP(false)
		var err error
		c, err = d.DialContext(ctx, network("tcp", to.Addr()), to.String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("connect TCP %s to %s: %w", from, to, err)
	}
	t := c.(*net.TCPConn)
	if err := t.SetLinger(0); err != nil {
		return nil, errors.Join(fmt.Errorf("set linger: %w", err), t.Close())
	}
	return t, nil
}

func network(proto string, a netip.Addr) string {
	if a.Is6() {
		return proto + "6"
	}
	return proto + "4"
}

var datagrams = sync.Pool{New: func() any { b := make([]byte, MaxMessage); return &b }}

// ReadUDP waits for one datagram and returns a copy of it. A waiting socket holds no buffer, so thousands of them cost
// nothing but their goroutine.
func ReadUDP(c *net.UDPConn) ([]byte, netip.AddrPort, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, netip.AddrPort{}, err
	}
	var (
		out  []byte
		from netip.AddrPort
		oops error
	)
	err = raw.Read(func(fd uintptr) bool {
		b := datagrams.Get().(*[]byte)
		defer datagrams.Put(b)
		n, sa, err := unix.Recvfrom(int(fd), *b, unix.MSG_DONTWAIT)
		for errors.Is(err, unix.EINTR) {
			n, sa, err = unix.Recvfrom(int(fd), *b, unix.MSG_DONTWAIT)
		}
		switch {
		case errors.Is(err, unix.EAGAIN):
			return false
		case err != nil:
			oops = err
			return true
		}
		out = bytes.Clone((*b)[:n])
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			from = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
		case *unix.SockaddrInet6:
			from = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
		}
		return true
	})
	if err == nil {
		err = oops
	}
	return out, from, err
}

// Temporary reports whether a read error of a UDP socket is only an ICMP error about an earlier packet.
func Temporary(err error) bool {
	return errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.ENETUNREACH) ||
		errors.Is(err, unix.EMSGSIZE)
}

// LocalAddrPort returns the address a socket is bound to.
func LocalAddrPort(a net.Addr) netip.AddrPort {
	switch a := a.(type) {
	case *net.UDPAddr:
		p := a.AddrPort()
		return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
	case *net.TCPAddr:
		p := a.AddrPort()
		return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
	}
	return netip.AddrPort{}
}
