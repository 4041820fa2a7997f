package probe

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
)

// Host is where facts come from. All fields are set by Local.
type Host struct {
	Files fs.FS // from the root directory on
	UID   int   // effective
	CPUs  int   // that the process may use

	Uname  func() (release, machine string, err error)
	Limit  func(resource int) (soft uint64, err error) // an RLIMIT_ constant; Unlimited
	Links  func() ([]Link, error)
	Bind   func(addr netip.AddrPort, t ims.Transport) error // whether a socket can be bound; an errno
	Open   func(path string) error                          // whether a device can be opened for reading and writing
	Access func(path string, mode uint32) error             // with the effective ids, as access(2)
	Clock  func() (synchronised bool, err error)
}

// Unlimited is a resource limit that is none.
const Unlimited = ^uint64(0)

// Local is the host that the process runs on.
func Local() *Host {
	return &Host{
		Files: os.DirFS("/"), UID: os.Geteuid(), CPUs: runtime.GOMAXPROCS(0),
		Uname: uname, Limit: limit, Links: links, Bind: bind, Open: openDevice, Access: access, Clock: clock,
	}
}

// Reading is what a file of the kernel says, or why it does not.
type Reading struct {
	Value string
	Err   error
}

// Missing reports whether this kernel has no such thing.
func (r Reading) Missing() bool { return errors.Is(r.Err, fs.ErrNotExist) }

// Denied reports whether the process may not read it.
func (r Reading) Denied() bool { return errors.Is(r.Err, fs.ErrPermission) }

// Number returns the value as a number; ok is false if there is none.
func (r Reading) Number() (n int64, ok bool) {
	n, err := strconv.ParseInt(r.Value, 10, 64)
	return n, r.Err == nil && err == nil
}

// Read reads a short file, without the white space around it. The path is absolute.
func (h *Host) Read(path string) Reading {
	b, err := fs.ReadFile(h.Files, strings.TrimPrefix(path, "/"))
	return Reading{Value: strings.TrimSpace(string(b)), Err: err}
}

// Sysctl reads a setting; a part of the key that has dots itself, such as the name of a VLAN, is written with slashes around
// it: "net/ipv4/conf/eth0.100/rp_filter".
func (h *Host) Sysctl(key string) Reading {
	if !strings.Contains(key, "/") {
		key = strings.ReplaceAll(key, ".", "/")
	}
	return h.Read("/proc/sys/" + key)
}

// Sub returns the part of the file system below an absolute path.
func (h *Host) Sub(path string) (fs.FS, error) {
	sub, err := fs.Sub(h.Files, strings.TrimPrefix(path, "/"))
	if err != nil {
		return nil, fmt.Errorf("look below %s: %w", path, err)
	}
	return sub, nil
}

// Link is a network interface.
type Link struct {
	Name     string
	Up       bool // by the operator's will
	Carrier  bool
	Loopback bool
	Ethernet bool // or what looks like it
	Addrs    []netip.Addr
}

func links() ([]Link, error) {
	found, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list network interfaces: %w", err)
	}
	list := make([]Link, 0, len(found))
	for i := range found {
		l := Link{
			Name: found[i].Name, Up: found[i].Flags&net.FlagUp != 0, Carrier: found[i].Flags&net.FlagRunning != 0,
			Loopback: found[i].Flags&net.FlagLoopback != 0, Ethernet: len(found[i].HardwareAddr) == 6 && found[i].Flags&net.FlagLoopback == 0,
		}
		addrs, err := found[i].Addrs()
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s: %w", l.Name, err)
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil {
				l.Addrs = append(l.Addrs, p.Addr())
			}
		}
		list = append(list, l)
	}
	return list, nil
}

// bind tries to bind a socket in the way that fails if anybody has the port already. Connections that ended a moment ago are
// no obstacle, as they are none to gmgate.
func bind(addr netip.AddrPort, t ims.Transport) (err error) {
	var sa unix.Sockaddr
	family, typ := unix.AF_INET, unix.SOCK_DGRAM
	if addr.Addr().Is4() {
		sa = &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
	} else {
		sa, family = &unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()}, unix.AF_INET6
	}
	if t == ims.TCP {
		typ = unix.SOCK_STREAM
	}
	fd, err := unix.Socket(family, typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer func() { _ = unix.Close(fd) }()
	if t == ims.TCP {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	if family == unix.AF_INET6 {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	if err := unix.Bind(fd, sa); err != nil {
		return os.NewSyscallError("bind", err)
	}
	return nil
}

func openDevice(path string) error {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return unix.Close(fd)
}

func access(path string, mode uint32) error {
	if err := unix.Faccessat(unix.AT_FDCWD, path, mode, unix.AT_EACCESS); err != nil {
		return &fs.PathError{Op: "access", Path: path, Err: err}
	}
	return nil
}

func uname() (release, machine string, err error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", "", os.NewSyscallError("uname", err)
	}
	return unix.ByteSliceToString(u.Release[:]), unix.ByteSliceToString(u.Machine[:]), nil
}

func limit(resource int) (uint64, error) {
	var r unix.Rlimit
	if err := unix.Getrlimit(resource, &r); err != nil {
		return 0, os.NewSyscallError("getrlimit", err)
	}
	return r.Cur, nil
}

// clock asks the kernel whether something keeps its clock at the right time.
func clock() (bool, error) {
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	if err != nil {
		return false, os.NewSyscallError("adjtimex", err)
	}
	return state != unix.TIME_ERROR && t.Status&unix.STA_UNSYNC == 0, nil
}
