package front

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"

	"github.com/panjf2000/gnet/v2"
	"golang.org/x/sys/unix"
)

// swap is a socket that takes the place of one of gnet's UDP listeners, the placeholder.
type swap struct {
	reserved int            // socket that keeps the placeholder's port for us
	at       netip.AddrPort // address of the placeholder
	fd       int            // our socket; -1 once it is in place
	place    func(fd int)   // is told the descriptor in which the loop finds it
}

// newSwap reserves a loopback port for a placeholder. While the reservation lasts nobody else gets the port, so the
// address names one listener of one engine. gnet may bind to it as well, since both share the port.
func newSwap(fd int, place func(fd int)) (swap, error) {
	r, err := openAlone(unix.SOCK_DGRAM, netip.MustParseAddrPort("127.0.0.1:0"), nil)
	if err != nil {
		return swap{}, fmt.Errorf("reserve a placeholder on loopback: %w", err)
	}
	at, err := localAddr(r)
	if err != nil {
		_ = unix.Close(r)
		return swap{}, fmt.Errorf("reserve a placeholder on loopback: %w", err)
	}
	return swap{reserved: r, at: at, fd: fd, place: place}, nil
}

// url is the placeholder's address for gnet.
func (s *swap) url() string { return "udp://" + s.at.String() }

// release gives up what has not been handed to gnet.
func (s *swap) release() {
	if s.reserved >= 0 {
		_ = unix.Close(s.reserved)
		s.reserved = -1
	}
	if s.fd >= 0 {
		_ = unix.Close(s.fd)
		s.fd = -1
	}
}

// adopt puts all sockets of a worker in place.
func (e *events) adopt(engine gnet.Engine) error {
	names := make(map[netip.AddrPort]bool)
	for i := range e.swaps {
		err := errors.New("another one has this name")
		if at := e.swaps[i].at; !names[at] {
			names[at] = true
			err = e.swaps[i].apply(engine)
		}
		if err != nil {
			return fmt.Errorf("put socket over placeholder %s: %w", e.swaps[i].at, err)
		}
	}
	return nil
}

// apply puts the socket over the placeholder's descriptor. The engine owns it from then on.
func (s *swap) apply(engine gnet.Engine) error {
	dup, err := engine.DupListener("udp", s.at.String())
	if err != nil {
		return fmt.Errorf("find gnet's listener: %w", err)
	}
	at, err := original(dup)
	if err := errors.Join(err, os.NewSyscallError("close", unix.Close(dup))); err != nil {
		return err
	}
	want, err := identify(s.fd)
	if err != nil {
		return err
	}
	if err := unix.Dup3(s.fd, at, unix.O_CLOEXEC); err != nil {
		return os.NewSyscallError("dup3", err)
	}
	got, err := identify(at)
	if err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("descriptor %d is not the socket that was put there", at)
	}
	_ = unix.Close(s.fd)
	s.fd = -1
	s.place(at)
	return nil
}

// socketID identifies a socket whatever descriptor refers to it.
type socketID struct{ dev, ino uint64 }

func identify(fd int) (socketID, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return socketID{}, os.NewSyscallError("fstat", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return socketID{}, fmt.Errorf("descriptor %d is no socket", fd)
	}
	return socketID{dev: st.Dev, ino: st.Ino}, nil //nolint:unconvert // the types differ between architectures
}

// original finds the descriptor of which dup is a duplicate. It is an error if there is not exactly one.
func original(dup int) (int, error) {
	want, err := identify(dup)
	if err != nil {
		return -1, err
	}
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return -1, fmt.Errorf("list descriptors: %w", err)
	}
	found := -1
	for _, e := range dir {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd == dup {
			continue
		}
		if id, err := identify(fd); err != nil || id != want {
			continue // no socket, another one, or closed meanwhile
		}
		if found >= 0 {
			return -1, fmt.Errorf("descriptors %d and %d are both duplicates of %d", found, fd, dup)
		}
		found = fd
	}
	if found < 0 {
		return -1, fmt.Errorf("no descriptor but %d has its socket", dup)
	}
	return found, nil
}
