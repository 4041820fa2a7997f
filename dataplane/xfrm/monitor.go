package xfrm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// monitor delivers what the kernel announces to one group of listeners: limits that have passed, or changes of policies.
// Tests put a kernel of their own behind it.
type monitor interface {
	// read waits for the next datagram. ENOBUFS says that some were lost.
	read(b []byte) (int, error)
	// close ends a read that is waiting.
	close() error
}

// netlinkMonitor is a NETLINK_XFRM socket that only listens. It is non-blocking and in Go's poller, so that close ends a
// read.
type netlinkMonitor struct {
	file *os.File
	raw  syscall.RawConn
}

// eventCapacity: an event has some 250 octets, one of a policy with a security label up to 5 kB.
const eventCapacity = 8 << 10

// openMonitor opens a socket for the events of a group in a namespace, nil for the process's.
func openMonitor(ns *hostnet.NS, group int) (monitor, error) {
	var fd int
	err := inside(ns, func() (err error) {
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_XFRM)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open XFRM event monitor: %w", err)
	}
	// Best effort, as with the other sockets.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, socketBuffer)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (group - 1)}); err != nil {
		return nil, errors.Join(fmt.Errorf("join XFRM events: %w", err), unix.Close(fd))
	}
	m := netlinkMonitor{file: os.NewFile(uintptr(fd), "xfrm-monitor")}
	if m.raw, err = m.file.SyscallConn(); err != nil {
		return nil, errors.Join(fmt.Errorf("open XFRM event monitor: %w", err), m.file.Close())
	}
	return m, nil
}

func (m netlinkMonitor) read(b []byte) (n int, err error) {
	e := m.raw.Read(func(fd uintptr) (done bool) {
		for {
			var from unix.Sockaddr
			n, from, err = unix.Recvfrom(int(fd), b, unix.MSG_DONTWAIT) //nolint:gosec // a descriptor
			if errors.Is(err, unix.EAGAIN) {
				return false
			}
			if a, ok := from.(*unix.SockaddrNetlink); err == nil && (!ok || a.Pid != 0) || errors.Is(err, unix.EINTR) {
				continue // not from the kernel
			}
			return true
		}
	})
	if e != nil {
		return 0, e
	}
	return n, err
}

func (m netlinkMonitor) close() error { return m.file.Close() }

// watch reads events until Close or Detach.
func (b *Backend) watch(m monitor) {
	buf := make([]byte, eventCapacity)
	for {
		n, err := m.read(buf)
		switch {
		case err == nil:
			b.events(buf[:n])
		case errors.Is(err, unix.ENOBUFS):
			b.log.Warn("events of the kernel were lost", slog.Uint64("times", b.overruns.Add(1)))
			b.suspect() // perhaps of policies
		default:
			if b.interrupted(context.Background()) == nil {
				b.log.Error("events of the kernel cannot be read any more", slog.Any("error", err))
			}
			return
		}
	}
}

// events takes one datagram apart.
func (b *Backend) events(d []byte) {
	for len(d) >= unix.SizeofNlMsghdr {
		n := int(binary.NativeEndian.Uint32(d))
		if n < unix.SizeofNlMsghdr || n > len(d) {
			return
		}
		typ, port, body := binary.NativeEndian.Uint16(d[4:]), binary.NativeEndian.Uint32(d[12:]), d[unix.SizeofNlMsghdr:n]
		d = d[min((n+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1), len(d)):]
		// The events of a limit carry what has expired and then whether the limit was the hard one.
		switch typ {
		case nl.XFRM_MSG_EXPIRE:
			if h, err := parseState(body); err == nil && hardEvent(body, nl.SizeofXfrmUsersaInfo) && b.owned(h) {
				b.stateExpired(h.id)
			}
		case nl.XFRM_MSG_POLEXPIRE:
			p, err := parsePolicy(body)
			if err == nil && hardEvent(body, nl.SizeofXfrmUserpolicyInfo) && b.constant(policyID{p.Sel, p.Dir}) != nil {
				// Before its time if the clock is set forward in the very second of a renewal; later the kernel's timer
				// does not look at it.
				b.log.Warn("a constant policy expired and is put back; was the clock set?",
					slog.String("policy", policyID{p.Sel, p.Dir}.String()))
				b.suspect()
			}
		case nl.XFRM_MSG_NEWPOLICY, nl.XFRM_MSG_UPDPOLICY, nl.XFRM_MSG_DELPOLICY, nl.XFRM_MSG_FLUSHPOLICY:
			if !slices.Contains(b.ports, port) && b.changed(typ, body) {
				b.suspect()
			}
		}
	}
}

func hardEvent(body []byte, at int) bool { return len(body) > at && body[at] != 0 }

// constant returns the policy that has to be there under a key, or nil.
func (b *Backend) constant(id policyID) *policy {
	for i := range b.policies {
		if b.policies[i].policyID == id {
			return &b.policies[i]
		}
	}
	return nil
}

// stateExpired tells of the set whose SA has reached its hard limit, unless it was told before.
func (b *Backend) stateExpired(id stateID) {
	set, news := b.markExpired(id)
	if !news {
		return
	}
	b.log.Warn("kernel removed an SA whose hard limit had passed", slog.Uint64("sa_set", set), slog.String("spi", id.spi.String()))
	if b.cfg.Expired != nil {
		b.cfg.Expired(set)
	}
}

// markExpired returns the set of an SA that the kernel has removed, and false if nobody needs to hear of it. The event may
// have waited while the set was removed and a new one got the same SPI: what counts is that the SA is not there now.
func (b *Backend) markExpired(id stateID) (uint64, bool) {
	b.books.Lock()
	defer b.books.Unlock()
	o, ok := b.owners[id.key()]
	s := b.sets[o.id]
	if !ok || s.expired {
		return 0, false
	}
	b.queryMu.Lock()
	defer b.queryMu.Unlock()
	b.query.reset()
	b.query.getState(id)
	if !errors.Is(b.query.run()[0], unix.ESRCH) {
		return 0, false
	}
	s.expired = true
	b.sets[o.id] = s
	return o.id, true
}

// Overruns returns how often events were lost because the kernel had more of them than its buffer takes. Sets whose
// expiry was lost show as missing in Survey; policies are looked after at once.
func (b *Backend) Overruns() uint64 { return b.overruns.Load() }
