package attack

import (
	"encoding/binary"
	"net/netip"
)

// Numbers of IANA and lengths of headers in octets.
const (
	protoTCP = 6
	protoUDP = 17
	protoESP = 50

	extHopByHop = 0
	extFragment = 44
	extDestOpts = 60

	ipv4Header = 20
	ipv6Header = 40
	udpHeader  = 8
	tcpHeader  = 20
	espHeader  = 8 // SPI and sequence number (RFC 4303 §2)

	// PortESP is the port of ESP in UDP (RFC 3948).
	PortESP = 4500

	hopLimit = 64
	tcpSYN   = 0x02
)

// The builders append one IP packet to b. The family is that of the source; both addresses have to be of it.

// AppendESP appends an ESP packet whose size octets behind SPI and sequence number follow from seed: they look like
// ciphertext, and another seed makes others.
func AppendESP(b []byte, src, dst netip.Addr, spi, seq uint32, size int, seed uint64) []byte {
	b, at := beginIP(b, src, dst, protoESP)
	b = appendESP(b, spi, seq, size, seed)
	return endIP(b, at)
}

// AppendESPInUDP appends the same inside UDP to and from PortESP (RFC 3948 §2.1).
func AppendESPInUDP(b []byte, src, dst netip.Addr, spi, seq uint32, size int, seed uint64) []byte {
	b, at := beginIP(b, src, dst, protoUDP)
	b, start := beginUDP(b, PortESP, PortESP)
	b = appendESP(b, spi, seq, size, seed)
	b = endUDP(b, start)
	// RFC 3948 §2.1: the checksum should be zero. IPv6 does not allow that (RFC 8200 §8.1).
	if !src.Is4() {
		checkUDP(b[start:], src, dst)
	}
	return endIP(b, at)
}

// AppendUDP appends a UDP datagram.
func AppendUDP(b []byte, src, dst netip.AddrPort, payload []byte) []byte {
	b, at := beginIP(b, src.Addr(), dst.Addr(), protoUDP)
	b, start := beginUDP(b, src.Port(), dst.Port())
	b = endUDP(append(b, payload...), start)
	checkUDP(b[start:], src.Addr(), dst.Addr())
	return endIP(b, at)
}

// AppendSYN appends the first segment of a TCP connection; data in it is what TCP Fast Open would carry.
func AppendSYN(b []byte, src, dst netip.AddrPort, seq uint32, data []byte) []byte {
	b, at := beginIP(b, src.Addr(), dst.Addr(), protoTCP)
	start := len(b)
	b = binary.BigEndian.AppendUint16(b, src.Port())
	b = binary.BigEndian.AppendUint16(b, dst.Port())
	b = binary.BigEndian.AppendUint32(b, seq)
	b = append(b, 0, 0, 0, 0, tcpHeader/4<<4, tcpSYN, 0xff, 0xff, 0, 0, 0, 0)
	b = append(b, data...)
	binary.BigEndian.PutUint16(b[start+16:], checksum(b[start:], pseudo(src.Addr(), dst.Addr(), protoTCP, len(b)-start)))
	return endIP(b, at)
}

func appendESP(b []byte, spi, seq uint32, size int, seed uint64) []byte {
	b = binary.BigEndian.AppendUint32(b, spi)
	b = binary.BigEndian.AppendUint32(b, seq)
	for end := len(b) + size; len(b) < end; {
		seed = mix(seed)
		b = append(b, byte(seed))
	}
	return b
}

// mix is the step of SplitMix64: cheap, and without a state that senders would share.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// beginIP appends an IP header without length and checksum, and returns where it starts.
func beginIP(b []byte, src, dst netip.Addr, proto byte) (packet []byte, at int) {
	at = len(b)
	if src.Is4() {
		s, d := src.As4(), dst.As4()
		b = append(b, 0x45, 0, 0, 0, 0, 0, 0x40, 0, hopLimit, proto, 0, 0) // may not be fragmented
		return append(append(b, s[:]...), d[:]...), at
	}
	s, d := src.As16(), dst.As16()
	b = append(b, 0x60, 0, 0, 0, 0, 0, proto, hopLimit)
	return append(append(b, s[:]...), d[:]...), at
}

// endIP fills in what beginIP left open.
func endIP(b []byte, at int) []byte {
	p := b[at:]
	if p[0]>>4 == 4 {
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
		checkIPv4(p)
	} else {
		binary.BigEndian.PutUint16(p[4:], uint16(len(p)-ipv6Header))
	}
	return b
}

// checkIPv4 sets the checksum of an IPv4 header.
func checkIPv4(p []byte) {
	p[10], p[11] = 0, 0
	binary.BigEndian.PutUint16(p[10:], checksum(p[:int(p[0]&15)*4], 0))
}

func beginUDP(b []byte, sport, dport uint16) (packet []byte, start int) {
	start = len(b)
	b = binary.BigEndian.AppendUint16(b, sport)
	b = binary.BigEndian.AppendUint16(b, dport)
	return append(b, 0, 0, 0, 0), start
}

func endUDP(b []byte, start int) []byte {
	binary.BigEndian.PutUint16(b[start+4:], uint16(len(b)-start))
	return b
}

// checkUDP sets the checksum of the UDP datagram p.
func checkUDP(p []byte, src, dst netip.Addr) {
	p[6], p[7] = 0, 0
	sum := checksum(p, pseudo(src, dst, protoUDP, len(p)))
	if sum == 0 {
		sum = 0xffff // zero says that there is none (RFC 768)
	}
	binary.BigEndian.PutUint16(p[6:], sum)
}

// pseudo adds up the pseudo header (RFC 793 §3.1, RFC 8200 §8.1).
func pseudo(src, dst netip.Addr, proto byte, length int) uint64 {
	sum := uint64(proto) + uint64(length)
	for _, a := range []netip.Addr{src, dst} {
		s := a.As16()
		half := s[:]
		if a.Is4() {
			half = s[12:]
		}
		for ; len(half) > 0; half = half[2:] {
			sum += uint64(binary.BigEndian.Uint16(half))
		}
	}
	return sum
}

// checksum is that of RFC 1071, begun with a sum.
func checksum(b []byte, sum uint64) uint16 {
	for ; len(b) > 1; b = b[2:] {
		sum += uint64(binary.BigEndian.Uint16(b))
	}
	if len(b) > 0 {
		sum += uint64(b[0]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// AppendFrom appends a copy of the IP packet p that comes from src: whoever has caught an ESP packet can send it from
// anywhere, since ESP in transport mode does not cover the address (RFC 4303 §3.1.1). It reports false for what is no
// packet of the family of src. Checksums of what is inside are left as they are.
func AppendFrom(b, p []byte, src netip.Addr) (packet []byte, ok bool) {
	switch {
	case len(p) >= ipv4Header && p[0]>>4 == 4 && int(p[0]&15)*4 >= ipv4Header && int(p[0]&15)*4 <= len(p) && src.Is4():
		at := len(b)
		b = append(b, p...)
		s := src.As4()
		copy(b[at+12:], s[:])
		checkIPv4(b[at:])
		return b, true
	case len(p) >= ipv6Header && p[0]>>4 == 6 && src.Is6():
		at := len(b)
		b = append(b, p...)
		s := src.As16()
		copy(b[at+8:], s[:])
		return b, true
	}
	return b, false
}
