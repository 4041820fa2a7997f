// Package sa models security associations of the ipsec-3gpp mechanism: the SA set of TS 33.203 §7.1 and its phases, the
// SPI and port pools, and the Installer interface which the ESP backends implement.
package sa

import (
	"net/netip"
	"time"

	"github.com/gmgate/gmgate/control/ims"
)

// Direction is seen from the P-CSCF.
type Direction uint8

// Directions.
const (
	In  Direction = iota + 1 // UE to P-CSCF
	Out                      // P-CSCF to UE
)

// String names the direction as ip-xfrm does.
func (d Direction) String() string {
	if d == In {
		return "in"
	}
	return "out"
}

// Params is everything a backend needs to install one SA set. It is plain data; backends copy what they keep.
type Params struct {
	ID    uint64 // unique among the sets of this process
	Label uint32 // index of the UE context, for backends that can label packets; not zero

	Local netip.Addr // our Gm address
	UE    netip.Addr // source address of the packet that carried SM1 (TS 33.203 §7.1)
	Ports ims.Ports
	SPIs  ims.SPIs
	Keys  ims.ESPKeys

	// Hard is the backstop after which the backend removes the set by itself if nobody else did, so that a crashed
	// process leaves nothing behind for ever. Zero means none.
	Hard time.Duration
}

// SA is one one-way security association with its transport selector: both addresses, both ports, any protocol.
type SA struct {
	Dir Direction
	SPI ims.SPI
	Src netip.AddrPort
	Dst netip.AddrPort
}

// SAs returns the four SAs of the set in the order A, B, C, D: uc→ps and us→pc inbound, pc→us and ps→uc outbound
// (TS 33.203 §7.1). Each selector covers UDP and TCP.
func (p *Params) SAs() [4]SA {
	uc, us := netip.AddrPortFrom(p.UE, p.Ports.UC), netip.AddrPortFrom(p.UE, p.Ports.US)
	pc, ps := netip.AddrPortFrom(p.Local, p.Ports.PC), netip.AddrPortFrom(p.Local, p.Ports.PS)
	return [4]SA{
		{Dir: In, SPI: p.SPIs.PS, Src: uc, Dst: ps},
		{Dir: In, SPI: p.SPIs.PC, Src: us, Dst: pc},
		{Dir: Out, SPI: p.SPIs.US, Src: pc, Dst: us},
		{Dir: Out, SPI: p.SPIs.UC, Src: ps, Dst: uc},
	}
}

// Installer puts SA sets into an ESP backend. Its methods may be called from any goroutine and do not block: the
// worker never waits. Each calls done exactly once, on a goroutine of the backend's own (never before the method has
// returned), with nil only when the backend has acknowledged every SA of the set.
type Installer interface {
	// Install adds the four SAs, or none: on any failure everything already added is taken out again and done gets
	// the error of the backend, which keeps its errno.
	Install(p Params, done func(error))

	// Remove takes the four SAs out. One that is already gone is not an error.
	Remove(p Params, done func(error))

	// Extend moves the hard limit of an installed set to hard from now. Keys, SPIs and sequence numbers stay.
	Extend(p Params, hard time.Duration, done func(error))

	// Count returns the number of SAs installed now.
	Count() int

	// Close removes every SA that this process installed and frees the backend.
	Close() error
}
