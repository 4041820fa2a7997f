package esptun

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// rawSocket sends and receives ESP packets of one address family in the outer namespace.
type rawSocket struct {
	v6   bool
	addr netip.Addr // bound to; invalid for all addresses of the family
	file *os.File
	conn syscall.RawConn
}

// openRawSockets opens one socket per address in OuterAddrs, or else one per family.
func openRawSockets(cfg *Config) (socks []*rawSocket, err error) {
	outer := cfg.Outer
	if outer == nil {
		if outer, err = hostnet.Current(); err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, outer.Close()) }()
	}
	addrs := cfg.OuterAddrs
	if len(addrs) == 0 {
		v4, v6 := cfg.families()
		if v4 {
			addrs = append(addrs, netip.IPv4Unspecified())
		}
		if v6 {
			addrs = append(addrs, netip.IPv6Unspecified())
		}
	}
	err = outer.Do(func() error {
		for _, a := range addrs {
			s, err := openRawSocket(a, cfg.Local)
			if err != nil {
				return fmt.Errorf("open raw ESP socket for %s: %w", a, err)
			}
			socks = append(socks, s)
		}
		return nil
	})
	return socks, err
}

func openRawSocket(a netip.Addr, local []netip.Prefix) (*rawSocket, error) {
	family := unix.AF_INET
	if a.Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_ESP)
	if err != nil {
		return nil, err
	}
	s := &rawSocket{v6: a.Is6()}
	if err := s.configure(fd, a, local); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	s.file = os.NewFile(uintptr(fd), "raw-esp")
	s.conn, err = s.file.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, s.file.Close())
	}
	return s, nil
}

func (s *rawSocket) configure(fd int, a netip.Addr, local []netip.Prefix) error {
	for _, o := range []struct{ force, limited int }{{unix.SO_RCVBUFFORCE, unix.SO_RCVBUF}, {unix.SO_SNDBUFFORCE, unix.SO_SNDBUF}} {
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, o.force, socketBuffer) != nil {
			// Without CAP_NET_ADMIN over the initial user namespace the kernel's limit applies.
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, o.limited, socketBuffer); err != nil {
				return fmt.Errorf("set socket buffer: %w", err)
			}
		}
	}
	if !s.v6 {
		// No DF: on a path with a smaller MTU whose routers or filters send no ICMP large packets would be lost for ever,
		// and the TCP in the hidden namespace would never learn of it.
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT); err != nil {
			return fmt.Errorf("allow fragments of ESP packets: %w", err)
		}
	}
	if s.v6 {
		// IPv6 raw sockets deliver no IP header, so destination, traffic class and hop limit come as control messages.
		// Free binding lets the source be an address which the host owns by a local route only (AnyIP).
		for _, opt := range []int{unix.IPV6_RECVPKTINFO, unix.IPV6_RECVTCLASS, unix.IPV6_RECVHOPLIMIT, unix.IPV6_FREEBIND} {
			if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, opt, 1); err != nil {
				return fmt.Errorf("set IPv6 socket option %#x: %w", opt, err)
			}
		}
	}
	if a.IsUnspecified() {
		return attachFilter(fd, s.v6, local)
	}
	s.addr = a
	var sa unix.Sockaddr = &unix.SockaddrInet6{Addr: a.As16()}
	if !s.v6 {
		sa = &unix.SockaddrInet4{Addr: a.As4()}
	}
	return unix.Bind(fd, sa)
}

// attachFilter makes the kernel drop ESP for other destinations than the prefixes at an unbound socket: every raw
// socket of a namespace gets a copy of every ESP packet.
func attachFilter(fd int, v6 bool, local []netip.Prefix) error {
	prog := destinationFilter(v6, local)
	if len(prog) > unix.BPF_MAXINSNS {
		return nil // the SA table refuses them as well, only later
	}
	f := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &f); err != nil {
		return fmt.Errorf("attach destination filter: %w", err)
	}
	return nil
}

// Offsets for the classic BPF program: from the start of the IP header, whatever the socket delivers.
const (
	bpfNetOff = -0x100000 // SKF_NET_OFF
	v4DstAt   = 16
	v6DstAt   = 24
)

// destinationFilter writes a classic BPF program that accepts packets to the prefixes of one family: per prefix, compare
// word by word, go on to the next prefix at the first difference.
func destinationFilter(v6 bool, local []netip.Prefix) []unix.SockFilter {
	var prog []unix.SockFilter
	for _, p := range local {
		if p.Addr().Is6() != v6 {
			continue
		}
		at, b := v4DstAt, p.Masked().Addr().AsSlice()
		if v6 {
			at = v6DstAt
		}
		words := (p.Bits() + 31) / 32
		// Three instructions per word; a difference jumps behind this prefix's final "accept".
		for w := range words {
			mask := ^uint32(0)
			if rest := p.Bits() - 32*w; rest < 32 {
				mask <<= 32 - rest
			}
			skip := uint8(3*(words-1-w) + 1)
			off := bpfNetOff + at + 4*w
			prog = append(prog,
				unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: uint32(off)},
				unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: mask},
				unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: skip, K: binary.BigEndian.Uint32(b[4*w:])})
		}
		prog = append(prog, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: ^uint32(0)})
	}
	return append(prog, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K})
}

// tunName is the TUN's name; it is alone in its namespace.
const tunName = "gmesp0"

// tunDevice is the TUN of the hidden namespace.
type tunDevice struct {
	file *os.File
	conn syscall.RawConn
}

// openTUN makes the TUN and everything that the hidden namespace needs around it.
func openTUN(ns *hostnet.NS, cfg *Config) (*tunDevice, error) {
	_, v6 := cfg.families()
	if v6 {
		// Best effort, it only saves chatter (the kernel's own link-local address, router solicitations), which would be
		// dropped for want of an SA: in some containers /proc/sys is read-only.
		_ = ns.Sysctl("ipv6.conf.default.addr_gen_mode", "1")
		_ = ns.Sysctl("ipv6.conf.default.accept_ra", "0")
	}
	var fd int
	err := ns.Do(func() error {
		var err error
		fd, err = attachTUN()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make TUN: %w", err)
	}
	// Only now may the descriptor meet the poller, which would see an error on an unattached one.
	t := &tunDevice{file: os.NewFile(uintptr(fd), tunName)}
	if t.conn, err = t.file.SyscallConn(); err != nil {
		return nil, errors.Join(err, t.file.Close())
	}
	if err := configureHidden(ns, cfg); err != nil {
		return nil, errors.Join(fmt.Errorf("configure hidden namespace: %w", err), t.file.Close())
	}
	return t, nil
}

func attachTUN() (int, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	req, err := unix.NewIfreq(tunName)
	if err == nil {
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// configureHidden gives the namespace its addresses and the TUN as its only way out.
func configureHidden(ns *hostnet.NS, cfg *Config) error {
	if err := ns.SetMTU(tunName, cfg.MTU); err != nil {
		return err
	}
	if err := ns.SetTxQueueLen(tunName, queueLen); err != nil {
		return err
	}
	if err := ns.Up(tunName); err != nil {
		return err
	}
	for _, p := range cfg.Local {
		if err := addLocal(ns, p); err != nil {
			return err
		}
	}
	v4, v6 := cfg.families()
	for _, f := range []struct{ need, v6 bool }{{v4, false}, {v6, true}} {
		if !f.need {
			continue
		}
		if err := ns.AddDefault(tunName, f.v6, AdvMSS); err != nil {
			return err
		}
	}
	return nil
}

func addLocal(ns *hostnet.NS, p netip.Prefix) error {
	if p.IsSingleIP() {
		return ns.AddAddr(tunName, p)
	}
	if p.Addr().Is6() {
		// IPv4 lets sockets bind to addresses of a local route, IPv6 only with this.
		if err := ns.Sysctl("ipv6.ip_nonlocal_bind", "1"); err != nil {
			return err
		}
	}
	return ns.AddLocal(p)
}
