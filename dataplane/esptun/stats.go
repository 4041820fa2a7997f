package esptun

import (
	"fmt"
	"sync/atomic"
)

// Reason says why a packet was dropped.
type Reason uint8

// Reasons. The first group concerns packets from the network, the second one those from the hidden namespace.
const (
	UnknownSPI Reason = iota // no SA for this destination and SPI
	Short                    // shorter than its algorithms or its transport header need
	Replay                   // sequence number seen before or too old
	ICV                      // not authentic
	Padding                  // authentic, but malformed
	Selector                 // addresses or ports are not the SA's
	NextHeader               // neither UDP nor TCP inside
	TooLong                  // longer than the MTU allows
	TUNWrite                 // the hidden namespace refused it

	NoSAOut     // no SA for these addresses and ports
	FragmentOut // an IP fragment, which transport mode cannot protect
	ProtocolOut // neither UDP nor TCP: ICMP, neighbour and multicast chatter
	Malformed   // not an IP packet
	Exhausted   // the SA has used up its sequence numbers
	SendError   // the outer namespace refused it

	numReasons
)

var reasonNames = [numReasons]string{
	UnknownSPI: "unknown_spi", Short: "short", Replay: "replay", ICV: "icv", Padding: "padding", Selector: "selector",
	NextHeader: "next_header", TooLong: "too_long", TUNWrite: "tun_write", NoSAOut: "no_sa_out",
	FragmentOut: "fragment_out", ProtocolOut: "protocol_out", Malformed: "malformed_out", Exhausted: "exhausted_out",
	SendError: "send_error",
}

// String returns the name used as a metric label.
func (r Reason) String() string {
	if r >= numReasons {
		return fmt.Sprintf("Reason(%d)", uint8(r))
	}
	return reasonNames[r]
}

// Reasons lists all reasons.
func Reasons() []Reason {
	all := make([]Reason, numReasons)
	for i := range all {
		all[i] = Reason(i)
	}
	return all
}

// Stats counts packets since the tunnel was opened. Octets are those of the ESP packets, without IP headers.
type Stats struct {
	PacketsIn, BytesIn   uint64 // opened and handed to the hidden namespace
	PacketsOut, BytesOut uint64 // sealed and sent
	Drops                [numReasons]uint64
}

// Dropped returns how many packets were dropped for a reason.
func (s *Stats) Dropped(r Reason) uint64 {
	if r >= numReasons {
		return 0
	}
	return s.Drops[r]
}

// counters are the counters of one goroutine, which alone writes them.
type counters struct {
	packetsIn, bytesIn, packetsOut, bytesOut atomic.Uint64
	drops                                    [numReasons]atomic.Uint64
}

func (c *counters) drop(r Reason) { c.drops[r].Add(1) }

func (c *counters) addTo(s *Stats) {
	s.PacketsIn += c.packetsIn.Load()
	s.BytesIn += c.bytesIn.Load()
	s.PacketsOut += c.packetsOut.Load()
	s.BytesOut += c.bytesOut.Load()
	for i := range c.drops {
		s.Drops[i] += c.drops[i].Load()
	}
}
