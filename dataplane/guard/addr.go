package guard

import (
	"encoding/binary"
	"net/netip"

	"github.com/gmgate/gmgate/bpf"
)

// The programs have addresses in network order, which Go sees as words in the order of the host.

func words(a netip.Addr) (w [4]uint32) {
	b := a.As16()
	for i := range w {
		w[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return w
}

func addrOf(w [4]uint32) netip.Addr {
	var b [16]byte
	for i, v := range w {
		binary.NativeEndian.PutUint32(b[4*i:], v)
	}
	return netip.AddrFrom16(b).Unmap()
}

func guardAddress(a netip.Addr) bpf.GuardAddress { return bpf.GuardAddress{Word: words(a)} }
