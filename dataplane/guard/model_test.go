package guard

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/gmgate/gmgate/control/ims"
)

// model is what the guard is meant to do, written from the RFCs and bpf/structs.h and not from the programs: it slices
// where they compute offsets, and holds what it knows in sets where they have maps and bits. It sees the whole packet.
type model struct {
	local     []netip.Addr
	clear     uint16
	protected map[uint16]bool
	sas       map[modelSA]netip.Addr // the phone
	foreign   map[modelSA]bool

	limitAll, passUnknown, passClear bool
	empty                            func(bucket netip.Prefix) bool // nil: never
}

type modelSA struct {
	local netip.Addr
	spi   ims.SPI
}

// newModel makes the model of a guard without SAs.
func newModel(c *Config) *model {
	m := &model{
		local: c.Local, clear: c.ClearPort, protected: make(map[uint16]bool), sas: make(map[modelSA]netip.Addr), foreign: make(map[modelSA]bool),
		limitAll: c.LimitAll, passUnknown: c.PassUnknown, passClear: c.Mode == Generic && c.KernelESP,
	}
	for _, p := range c.Protected {
		m.protected[p] = true
	}
	return m
}

// finding is what the model says about a frame.
type finding struct {
	reason Reason
	octets int // that are counted

	source, destination         netip.Addr // invalid: none could be read
	sourcePort, destinationPort uint16
	protocol                    uint8
	spi                         ims.SPI
	set                         modelSA // of packets that pass by an SA
}

// judge classifies a frame, or an IP packet where the link has no header.
func (m *model) judge(frame []byte, raw bool) finding {
	f := finding{octets: len(frame)}
	packet, version := frame, int(frame[0]>>4)
	if !raw {
		packet, version = ethernet(frame)
	}
	switch version {
	case 4:
		f.reason = m.ipv4(&f, packet)
	case 6:
		f.reason = m.ipv6(&f, packet, len(frame))
	}
	if f.reason == DropCleartext && m.passClear {
		f.reason = PassOther
	}
	if f.octets == 0 {
		f.octets = len(frame)
	}
	return f
}

// ethernet takes the header with at most two tags off (IEEE 802.1Q, 802.1ad).
func ethernet(frame []byte) (packet []byte, version int) {
	rest := frame[12:]
	for tags := 0; len(rest) >= 2 && tags <= 2; tags++ {
		switch binary.BigEndian.Uint16(rest) {
		case 0x0800:
			return rest[2:], 4
		case 0x86dd:
			return rest[2:], 6
		case 0x8100, 0x88a8:
			rest = rest[min(4, len(rest)):]
		default:
			return nil, 0
		}
	}
	return nil, 0
}

func (m *model) isLocal(a netip.Addr) bool { return slices.Contains(m.local, a) }

// ipv4 follows RFC 791 section 3.1.
func (m *model) ipv4(f *finding, packet []byte) Reason {
	if len(packet) < 20 {
		return PassOther
	}
	src, dst := netip.AddrFrom4([4]byte(packet[12:16])), netip.AddrFrom4([4]byte(packet[16:20]))
	if !m.isLocal(dst) {
		return PassOther
	}
	f.source, f.destination, f.protocol = src, dst, packet[9]
	total, header := int(binary.BigEndian.Uint16(packet[2:])), int(packet[0]&0xf)*4
	f.octets = total
	if packet[0]>>4 != 4 || header < 20 || header > total || total > len(packet) {
		return DropMalformed
	}
	flags := binary.BigEndian.Uint16(packet[6:])
	if flags&0x1fff > 0 {
		return PassFragment
	}
	return m.payload(f, packet[header:total], flags&0x2000 != 0)
}

// ipv6 follows RFC 8200 sections 3 and 4.
func (m *model) ipv6(f *finding, packet []byte, frame int) Reason {
	if len(packet) < 40 {
		return PassOther
	}
	src, dst := netip.AddrFrom16([16]byte(packet[8:24])), netip.AddrFrom16([16]byte(packet[24:40]))
	if !m.isLocal(dst) {
		return PassOther
	}
	f.source, f.destination, f.protocol = src, dst, packet[6]
	total := 40 + int(binary.BigEndian.Uint16(packet[4:]))
	f.octets = total
	if packet[0]>>4 != 6 || total > len(packet) {
		return DropMalformed
	}
	link := frame - len(packet)
	rest, first := packet[40:total], false
	for n := 0; ; n++ {
		length := 8
		switch f.protocol {
		case 0, 43, 60, 135, 139, 140: // of the general form of RFC 6564
			if len(rest) > 1 {
				length = 8 + 8*int(rest[1])
			}
		case 51: // RFC 4302 section 2.2: in words of four octets
			if len(rest) > 1 {
				length = 8 + 4*int(rest[1])
			}
		case 44:
		default:
			return m.payload(f, rest, first)
		}
		if at := link + total - len(rest); n == 6 || at > 4096 {
			return DropExtHeaders
		}
		if len(rest) < 8 {
			return DropMalformed
		}
		if f.protocol == 44 {
			word := binary.BigEndian.Uint16(rest[2:])
			if word>>3 != 0 {
				f.protocol = rest[0]
				return PassFragment
			}
			first = first || word&1 == 1
		}
		if length > len(rest) {
			return DropMalformed
		}
		f.protocol, rest = rest[0], rest[length:]
	}
}

// payload judges what an IP packet carries, or what its first fragment has of it.
func (m *model) payload(f *finding, data []byte, fragment bool) Reason {
	switch f.protocol {
	case 50:
		return m.esp(f, data, PassESP)
	case 17:
		return m.udp(f, data, fragment)
	case 6:
		return m.tcp(f, data)
	}
	return PassOther
}

// esp follows RFC 4303 section 2.
func (m *model) esp(f *finding, data []byte, known Reason) Reason {
	if len(data) < 8 {
		return DropESPShort
	}
	f.spi = ims.SPI(binary.BigEndian.Uint32(data))
	if f.spi <= 255 {
		return DropSPIReserved
	}
	key := modelSA{f.destination, f.spi}
	phone, ours := m.sas[key]
	switch {
	case m.foreign[key]:
		return PassUnknownSPI
	case !ours && m.passUnknown:
		return PassUnknownSPI
	case !ours:
		return DropUnknownSPI
	case phone != f.source:
		return DropWrongSource
	}
	f.set = key
	return known
}

// udp follows RFC 768.
func (m *model) udp(f *finding, data []byte, fragment bool) Reason {
	if len(data) < 8 {
		return DropMalformed
	}
	f.sourcePort, f.destinationPort = binary.BigEndian.Uint16(data), binary.BigEndian.Uint16(data[2:])
	to := f.destinationPort
	if to == 0 {
		return DropPortZero
	}
	if to != 4500 && to != m.clear && !m.protected[to] {
		return PassOther
	}
	if f.sourcePort == 0 {
		return DropPortZero
	}
	length := int(binary.BigEndian.Uint16(data[4:]))
	if length < 8 || length > len(data) && !fragment {
		return DropMalformed
	}
	data = data[8:min(length, len(data))]
	if m.protected[to] {
		return DropCleartext
	}
	if to == 4500 { // RFC 3948 section 2
		switch {
		case string(data) == "\xff":
			return PassKeepalive
		case len(data) >= 4 && [4]byte(data) == [4]byte{}:
			return PassIKE
		}
		return m.esp(f, data, PassESPInUDP)
	}
	if m.limitAll || isRegister(data, fragment) {
		return m.limited(f)
	}
	return PassClearPort
}

// isRegister reports whether a datagram has to count as a REGISTER.
func isRegister(data []byte, fragment bool) bool {
	if len(data) < 8 {
		return fragment // who knows what follows
	}
	return string(data[:8]) == "REGISTER" || data[0] == '\r' || data[0] == '\n'
}

// tcp follows RFC 9293 section 3.1.
func (m *model) tcp(f *finding, data []byte) Reason {
	if len(data) < 4 {
		return DropMalformed
	}
	f.sourcePort, f.destinationPort = binary.BigEndian.Uint16(data), binary.BigEndian.Uint16(data[2:])
	to := f.destinationPort
	switch {
	case to == 0:
		return DropPortZero
	case to != m.clear && !m.protected[to]:
		return PassOther
	case f.sourcePort == 0:
		return DropPortZero
	case len(data) < 20:
		return DropMalformed
	case m.protected[to]:
		return DropCleartext
	}
	const syn, ack = 0x02, 0x10
	if data[13]&syn != 0 && data[13]&ack == 0 {
		return m.limited(f)
	}
	return PassClearPort
}

// limited asks the bucket of a packet's source.
func (m *model) limited(f *finding) Reason {
	if m.empty != nil && m.empty(bucketOf(f.source)) {
		return DropRegisterRate
	}
	return PassClearPort
}

// bucketOf returns who shares a bucket: an IPv4 address has one of its own, also one that comes as an IPv6 address.
func bucketOf(source netip.Addr) netip.Prefix {
	if source.Is4() || source.Is4In6() {
		return netip.PrefixFrom(source, source.BitLen())
	}
	return netip.PrefixFrom(source, 64).Masked()
}
