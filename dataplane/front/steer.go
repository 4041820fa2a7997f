package front

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

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
