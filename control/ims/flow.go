package ims

import (
	"fmt"
	"log/slog"
	"net/netip"
	"strconv"
)

// SPI is a security parameter index, named by the receiver of the SA.
type SPI uint32

// MinSPI is the first SPI that is not reserved (RFC 4303 §2.1).
const MinSPI SPI = 256

// String prints the SPI the way ip-xfrm does.
func (s SPI) String() string { return fmt.Sprintf("%#08x", uint32(s)) }

// LogValue implements slog.LogValuer.
func (s SPI) LogValue() slog.Value { return slog.StringValue(s.String()) }

// Decimal prints the SPI as the Security-* headers carry it: unsigned decimal.
func (s SPI) Decimal() string { return strconv.FormatUint(uint64(s), 10) }

// Ports are the four protected ports of an SA set (TS 33.203 §7.1): UE client and server, P-CSCF client and server.
type Ports struct{ UC, US, PC, PS uint16 }

// SPIs are the four SPIs of an SA set (TS 33.203 §7.1). Each names the SA that is inbound at that port.
type SPIs struct{ UC, US, PC, PS SPI }

// Transport is a SIP transport.
type Transport uint8

// Transports.
const (
	UDP Transport = iota + 1
	TCP
)

// String returns the token in a URI parameter.
func (t Transport) String() string {
	switch t {
	case UDP:
		return "udp"
	case TCP:
		return "tcp"
	}
	return fmt.Sprintf("Transport(%d)", uint8(t))
}

// Via returns the token in a Via header.
func (t Transport) Via() string {
	switch t {
	case UDP:
		return "UDP"
	case TCP:
		return "TCP"
	}
	return "UNKNOWN"
}

// Side says which kind of socket a message came in on.
type Side uint8

// Sides.
const (
	GmClear     Side = iota + 1 // the unprotected port towards the UEs
	GmProtected                 // a protected port: port-ps or port-pc
	Mw                          // towards the IMS core
)

// String names the side as metrics and logs do.
func (s Side) String() string {
	switch s {
	case GmClear:
		return "gm_clear"
	case GmProtected:
		return "gm_protected"
	case Mw:
		return "mw"
	}
	return fmt.Sprintf("Side(%d)", uint8(s))
}

// ConnID names a TCP connection within one worker. Zero means none; values are not reused while the worker lives
// until the 24-bit counter wraps.
type ConnID uint32

// MaxConnID is the largest ConnID: flow tokens carry 24 bits.
const MaxConnID ConnID = 1<<24 - 1

// Flow is where a message came from: the socket, the peer, and for TCP the connection.
type Flow struct {
	Local     netip.AddrPort
	Remote    netip.AddrPort
	Conn      ConnID // zero for UDP
	Transport Transport
	Side      Side

	// Label is what the ESP backend has marked the packet with after it verified it: sa.Params.Label of the SA that the
	// packet came in on. Zero means that nobody has told, not that there was no SA.
	Label uint32
}

// String prints the flow for logs.
func (f Flow) String() string {
	return fmt.Sprintf("%s %s->%s", f.Transport, f.Remote, f.Local)
}

// Hop is a next hop: where a message goes and how.
type Hop struct {
	Addr      netip.AddrPort
	Transport Transport
}

// IsValid reports whether the hop names a destination.
func (h Hop) IsValid() bool { return h.Addr.IsValid() && h.Transport != 0 }

// String prints the hop for logs.
func (h Hop) String() string { return h.Addr.String() + ";transport=" + h.Transport.String() }
