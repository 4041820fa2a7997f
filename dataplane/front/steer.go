package front

import (
	"encoding/binary"
	"fmt"
	"log/slog"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
)

// Steering puts a program into reuseport groups which chooses the member, that is the worker, by where a packet comes
// from. The front does not depend on its choice: what comes to the wrong worker is given to the right one.
type Steering interface {
	// Attach steers a group: fds[k] is worker k's socket, bound (UDP) or listening (TCP), all of them at local. After it the
	// program chooses by the affinity entries, else by Owner. The descriptors stay the caller's. An error means that
	// nothing was attached.
	Attach(local netip.AddrPort, t ims.Transport, fds []int) error
	// Move makes new packets of a peer's address go to a worker; a negative one undoes that. The address is neither
	// IPv4-mapped nor has it a zone. Calls do not overlap.
	Move(addr netip.Addr, worker int) error
}

// Owner returns the worker to which a peer's address belongs: of IPv4 the address as a big-endian number modulo the
// number of workers, of IPv6 the xor of its four words. It is pure and equals the program of steeringProgram.
func Owner(remote netip.Addr, workers int) int {
	if workers <= 1 || !remote.IsValid() {
		return 0
	}
	return int(addrWord(remote) % uint32(workers)) //nolint:gosec // G115: the number of workers is small
}

func addrWord(a netip.Addr) uint32 {
	if a.Is4() || a.Is4In6() {
		b := a.As4()
		return binary.BigEndian.Uint32(b[:])
	}
	b := a.As16()
	return binary.BigEndian.Uint32(b[:4]) ^ binary.BigEndian.Uint32(b[4:8]) ^
		binary.BigEndian.Uint32(b[8:12]) ^ binary.BigEndian.Uint32(b[12:])
}

// Offsets of the source address in the network header, and SKF_NET_OFF of linux/filter.h: loads from there on are
// relative to the network header, although a reuseport program starts at the payload.
const (
	sourceOffset4 = 12
	sourceOffset6 = 8
	netOff        = 0xfff00000 // SKF_NET_OFF = -0x100000
)

// steeringProgram returns the classic BPF program that computes Owner from the source address of a packet. The result
// is the position of a socket in its reuseport group.
func steeringProgram(v6 bool, workers int) []unix.SockFilter {
	load := func(off uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: netOff + off}
	}
	var p []unix.SockFilter
	if v6 {
		p = append(p, load(sourceOffset6))
		for word := uint32(1); word < 4; word++ {
			p = append(p,
				unix.SockFilter{Code: unix.BPF_MISC | unix.BPF_TAX},
				load(sourceOffset6+4*word),
				unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_XOR | unix.BPF_X},
			)
		}
	} else {
		p = append(p, load(sourceOffset4))
	}
	return append(p,
		unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_MOD | unix.BPF_K, K: uint32(workers)}, //nolint:gosec // G115: small
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_A},
	)
}

// attachSteering puts the program into the reuseport group of the socket.
func attachSteering(fd int, v6 bool, workers int) error {
	p := steeringProgram(v6, workers)
	prog := unix.SockFprog{Len: uint16(len(p)), Filter: &p[0]} //nolint:gosec // G115: a dozen instructions
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, &prog); err != nil {
		return fmt.Errorf("attach steering program: %w", os.NewSyscallError("setsockopt", err))
	}
	return nil
}

// steer has a program choose the members of a listener's group, which are in the order of the workers: that of
// Config.Steering, else the classic one. Neither is needed for correctness.
func (f *Front) steer(l Listener, t ims.Transport, fds []int) {
	if f.cfg.Steering != nil {
		err := f.cfg.Steering.Attach(l.Addr, t, fds)
		if err == nil {
			f.steering = f.cfg.Steering
			return
		}
		f.steeringOff.Do(func() {
			f.log.Warn("steering program cannot be used, the classic one steers by the hash of addresses alone",
				slog.String("listener", l.Addr.String()), slog.String("transport", t.String()), errAttr(err))
		})
	}
	if err := attachSteering(fds[0], l.Addr.Addr().Is6(), len(fds)); err != nil {
		f.log.Warn("steering is off, messages go from worker to worker", errAttr(err))
	}
}

// Owner returns the worker to which a peer's address belongs: the one that the function Owner tells, unless the address
// was moved. It may be called from any goroutine and takes no lock.
func (f *Front) Owner(addr netip.Addr) int { return f.homes.owner(addr, len(f.workers)) }

// Move gives a peer's address to another worker; a negative one undoes that. It may be called from any goroutine. What is
// read after it goes to the new worker: datagrams that wait in the old one's socket are handed over, in their order, and
// those that the new one's socket gets meanwhile may overtake them. Messages that the old worker has begun with, those
// that were handed to it before, and open connections stay there; what is known of the UE is the handler's to move.
//
// ErrAddress and ErrNoWorker leave everything as it was. Any other error is that of Config.Steering: the move holds, at
// the cost of a hand-over for every message.
func (f *Front) Move(addr netip.Addr, worker int) error {
	if !addr.IsValid() {
		return ErrAddress
	}
	if worker >= len(f.workers) {
		return ErrNoWorker
	}
	addr = canonical(addr)
	if worker == Owner(addr, len(f.workers)) {
		worker = -1
	}
	f.homes.mu.Lock()
	defer f.homes.mu.Unlock()
	f.homes.setLocked(addr, worker)
	if f.steering == nil {
		return nil
	}
	if err := f.steering.Move(addr, worker); err != nil {
		return fmt.Errorf("steer %s to worker %d: %w", addr, worker, err)
	}
	return nil
}
