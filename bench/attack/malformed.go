package attack

import (
	"encoding/binary"
	"net/netip"
)

// Kind is one way in which a packet can be wrong.
type Kind struct {
	Name string
	// Append appends one packet from src to dst; n makes packets of a kind differ.
	Append func(b []byte, src, dst netip.AddrPort, n int) []byte
}

// Specification constants.
const (
	spiReserved   = 255    // the last SPI that is reserved (RFC 4303 §2.1)
	moreFragments = 0x2000 // in the second word of IPv4
	manyHeaders   = 12     // extension headers in a row, more than anybody needs
)

// Malformed lists the kinds of bad packets of a family. dst is the port to attack: a protected one, or the unprotected one.
// None of them may reach SIP.
func Malformed(ipv6 bool) []Kind {
	kinds := []Kind{
		{"header cut off", func(b []byte, src, dst netip.AddrPort, n int) []byte {
			at := len(b)
			b = AppendUDP(b, src, dst, nil)
			return b[:at+1+n%(len(b)-at-udpHeader-1)]
		}},
		{"length beyond the frame", func(b []byte, src, dst netip.AddrPort, n int) []byte {
			at := len(b)
			b = AppendUDP(b, src, dst, []byte("cut off"))
			p := b[at:]
			if p[0]>>4 == 4 {
				binary.BigEndian.PutUint16(p[2:], uint16(len(p)+1+n%1000))
				checkIPv4(p)
			} else {
				binary.BigEndian.PutUint16(p[4:], uint16(len(p)-ipv6Header+1+n%1000))
			}
			return b
		}},
		{"bad version", func(b []byte, src, dst netip.AddrPort, n int) []byte {
			at := len(b)
			b = AppendUDP(b, src, dst, nil)
			b[at] = b[at]&15 | byte(n%4+7)<<4
			return b
		}},
		{"ESP without a sequence number", func(b []byte, src, dst netip.AddrPort, n int) []byte {
			b, at := beginIP(b, src.Addr(), dst.Addr(), protoESP)
			b = append(b, 0x11, 0x22, 0x33, byte(n), 0, 0, 0)[:len(b)+n%espHeader]
			return endIP(b, at)
		}},
		{"SPI zero", func(b []byte, src, dst netip.AddrPort, n int) []byte {
			return AppendESP(b, src.Addr(), dst.Addr(), 0, uint32(n), 64, uint64(n))
		}},
		{"reserved SPI", func(b []byte, src, dst netip.AddrPort, n int) []byte {
			return AppendESP(b, src.Addr(), dst.Addr(), uint32(n%spiReserved)+1, uint32(n), 64, uint64(n))
		}},
		{"from port zero", func(b []byte, src, dst netip.AddrPort, _ int) []byte {
			return AppendUDP(b, netip.AddrPortFrom(src.Addr(), 0), dst, []byte("nobody answers this"))
		}},
		{"to port zero", func(b []byte, src, dst netip.AddrPort, _ int) []byte {
			return AppendUDP(b, src, netip.AddrPortFrom(dst.Addr(), 0), []byte("nobody listens there"))
		}},
		{"UDP shorter than its header", func(b []byte, src, dst netip.AddrPort, n int) []byte {
			b, at := beginIP(b, src.Addr(), dst.Addr(), protoUDP)
			b, start := beginUDP(b, src.Port(), dst.Port())
			b = endUDP(b, start)[:start+n%udpHeader]
			return endIP(b, at)
		}},
		{"UDP length beyond the packet", func(b []byte, src, dst netip.AddrPort, n int) []byte {
			b, at := beginIP(b, src.Addr(), dst.Addr(), protoUDP)
			b, start := beginUDP(b, src.Port(), dst.Port())
			binary.BigEndian.PutUint16(b[start+4:], uint16(udpHeader+1+n%60000))
			return endIP(b, at)
		}},
		{"TCP offset beyond the segment", func(b []byte, src, dst netip.AddrPort, n int) []byte {
			at := len(b)
			b = AppendSYN(b, src, dst, uint32(n), nil)
			b[len(b)-tcpHeader+12] = byte(n%5+6) << 4
			return endIP(b, at)
		}},
	}
	if ipv6 {
		return append(kinds,
			Kind{"many extension headers", func(b []byte, src, dst netip.AddrPort, n int) []byte {
				b, at := beginIP(b, src.Addr(), dst.Addr(), extDestOpts)
				for range manyHeaders {
					b = append(b, extDestOpts, 0, 1, 4, 0, 0, 0, 0) // PadN of six octets
				}
				b = append(b, protoUDP, 0, 1, 4, 0, 0, 0, 0)
				b, start := beginUDP(b, src.Port(), dst.Port())
				b = endUDP(append(b, byte(n)), start)
				checkUDP(b[start:], src.Addr(), dst.Addr())
				return endIP(b, at)
			}},
			Kind{"extension header beyond the packet", func(b []byte, src, dst netip.AddrPort, n int) []byte {
				b, at := beginIP(b, src.Addr(), dst.Addr(), extHopByHop)
				return endIP(append(b, protoUDP, byte(n%200)+1, 1, 4, 0, 0, 0, 0), at)
			}},
			Kind{"lonely fragment", func(b []byte, src, dst netip.AddrPort, n int) []byte {
				b, at := beginIP(b, src.Addr(), dst.Addr(), extFragment)
				b = append(b, protoUDP, 0)
				b = binary.BigEndian.AppendUint16(b, uint16(1+n%1000)<<3|1) // offset, and more to come
				b = binary.BigEndian.AppendUint32(b, uint32(n))
				return endIP(append(b, "middle. "...), at)
			}})
	}
	return append(kinds,
		Kind{"header length below five words", func(b []byte, src, dst netip.AddrPort, n int) []byte {
			at := len(b)
			b = AppendUDP(b, src, dst, nil)
			b[at] = 0x40 | byte(n%5)
			return b
		}},
		Kind{"header length beyond the packet", func(b []byte, src, dst netip.AddrPort, _ int) []byte {
			at := len(b)
			b = AppendUDP(b, src, dst, nil)
			b[at] = 0x4f
			return b
		}},
		Kind{"lonely fragment", func(b []byte, src, dst netip.AddrPort, n int) []byte {
			at := len(b)
			b = AppendUDP(b, src, dst, []byte("middle. "))
			binary.BigEndian.PutUint16(b[at+4:], uint16(n))
			binary.BigEndian.PutUint16(b[at+6:], moreFragments|uint16(1+n%1000))
			checkIPv4(b[at:])
			return b
		}})
}
