package guard

import (
	"encoding/binary"
	"net/netip"
	"slices"
)

// The network of the tests.
var (
	local4, local6       = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	other4, other6       = netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("2001:db8::9")
	phone4, phone6       = netip.MustParseAddr("203.0.113.7"), netip.MustParseAddr("2001:db8:7:7::7")
	stranger4, stranger6 = netip.MustParseAddr("203.0.113.8"), netip.MustParseAddr("2001:db8:7:7::8")
)

const (
	clearPort = 5060
	portPS    = 5100
	portPC    = 5101
	otherPort = 5102 // next to the protected ones

	protoHopByHop, protoTCP, protoUDP, protoRouting, protoFragment = 0, 6, 17, 43, 44
	protoESP, protoAH, protoICMP6, protoDestOptions                = 50, 51, 58, 60
	protoMobility, protoHIP, protoShim6                            = 135, 139, 140

	flagFIN, flagSYN, flagRST, flagPSH, flagACK = 1, 2, 4, 8, 16
)

// Builders of layers. Checksums stay zero: they are not the guard's.

func ethernetOf(etherType uint16, payload []byte, tags ...uint16) []byte {
	b := []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2}
	for i, t := range tags {
		b = binary.BigEndian.AppendUint16(b, t)
		b = binary.BigEndian.AppendUint16(b, uint16(100+i)) //nolint:gosec // a few
	}
	return append(binary.BigEndian.AppendUint16(b, etherType), payload...)
}

// inFrame puts an IP packet into a frame.
func inFrame(packet []byte, tags ...uint16) []byte {
	if packet[0]>>4 == 6 {
		return ethernetOf(0x86dd, packet, tags...)
	}
	return ethernetOf(0x0800, packet, tags...)
}

// ip makes a packet of the version of its addresses.
func ip(src, dst netip.Addr, proto uint8, payload []byte) []byte {
	if src.Is4() {
		return ip4(src, dst, proto, nil, payload)
	}
	return ip6(src, dst, proto, payload)
}

func ip4(src, dst netip.Addr, proto uint8, options, payload []byte) []byte {
	b := make([]byte, 20, 20+len(options)+len(payload))
	b[0] = uint8(0x45 + len(options)/4)                                     //nolint:gosec // at most 40
	binary.BigEndian.PutUint16(b[2:], uint16(20+len(options)+len(payload))) //nolint:gosec // of a test
	b[8], b[9] = 64, proto
	copy(b[12:], src.AsSlice())
	copy(b[16:], dst.AsSlice())
	return append(append(b, options...), payload...)
}

func ip6(src, dst netip.Addr, next uint8, payload []byte) []byte {
	b := make([]byte, 40, 40+len(payload))
	b[0] = 0x60
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload))) //nolint:gosec // of a test
	b[6], b[7] = next, 64
	copy(b[8:], src.AsSlice())
	copy(b[24:], dst.AsSlice())
	return append(b, payload...)
}

func udp(src, dst uint16, payload []byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, src)
	b = binary.BigEndian.AppendUint16(b, dst)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(payload))) //nolint:gosec // of a test
	return append(append(b, 0, 0), payload...)
}

func tcp(src, dst uint16, flags uint8, payload []byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, src)
	b = binary.BigEndian.AppendUint16(b, dst)
	b = append(b, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0)
	return append(b, payload...)
}

func esp(spi uint32) []byte {
	b := binary.BigEndian.AppendUint32(nil, spi)
	b = binary.BigEndian.AppendUint32(b, 1)
	return append(b, make([]byte, 36)...)
}

// extension is an IPv6 extension header of n octets, a multiple of 8.
func extension(kind, next uint8, n int, rest []byte) []byte {
	b := make([]byte, n, n+len(rest))
	b[0] = next
	switch kind {
	case protoFragment:
	case protoAH:
		b[1] = uint8(n/4 - 2) //nolint:gosec // of a test
	default:
		b[1] = uint8(n/8 - 1) //nolint:gosec // of a test
	}
	return append(b, rest...)
}

// chain puts extension headers before a payload, and returns the kind of the first one.
func chain(proto uint8, payload []byte, kinds ...uint8) (uint8, []byte) {
	for _, kind := range slices.Backward(kinds) {
		payload = extension(kind, proto, 8, payload)
		proto = kind
	}
	return proto, payload
}

// fragment6 is the header of an IPv6 fragment at an offset in units of eight octets.
func fragment6(next uint8, offset uint16, more bool, rest []byte) []byte {
	b := extension(protoFragment, next, 8, rest)
	binary.BigEndian.PutUint16(b[2:], offset<<3|uint16(flag(more)))
	return b
}

// fragment4 makes an IPv4 packet a fragment.
func fragment4(packet []byte, offset uint16, more bool) []byte {
	b := slices.Clone(packet)
	binary.BigEndian.PutUint16(b[6:], offset|uint16(flag(more))<<13)
	return b
}

// put16 changes a field.
func put16(packet []byte, at int, v uint16) []byte {
	b := slices.Clone(packet)
	binary.BigEndian.PutUint16(b[at:], v)
	return b
}

// put8 changes an octet.
func put8(packet []byte, at int, v uint8) []byte {
	b := slices.Clone(packet)
	b[at] = v
	return b
}

const (
	register = "REGISTER sip:ims.example SIP/2.0\r\nVia: SIP/2.0/UDP 203.0.113.7:31000;branch=z9hG4bK1\r\n\r\n"
	options  = "OPTIONS sip:ims.example SIP/2.0\r\nVia: SIP/2.0/UDP 203.0.113.7:31000;branch=z9hG4bK1\r\n\r\n"
)
