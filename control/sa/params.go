// Package sa models security associations of the ipsec-3gpp mechanism: the SA set of TS 33.203 §7.1 and its phases, the
// SPI and port pools, and the Installer interface which the ESP backends implement.
package sa

import (
	"context"
	"errors"
	"math"
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

	// Counters is where the sequence numbers go on, for a set that was installed before and lost. Zero for a new one.
	Counters Counters

	// Hard is the backstop after which the backend removes the set by itself if nobody else did, so that a crashed
	// process leaves nothing behind for ever. Zero means none.
	Hard time.Duration
}

// Counters are the sequence numbers of the four SAs of a set, in the order of Params.SAs: on an inbound SA the highest one
// received, on an outbound one the last one sent (RFC 4303 §2.2). Zero means none so far.
type Counters [4]uint32

// ErrSequence says that an SA has no room left for a jump: sequence numbers never wrap (RFC 4303 §3.3.3).
var ErrSequence = errors.New("sequence numbers of the SA are exhausted")

// Max returns the higher number of each SA.
func (c Counters) Max(o Counters) Counters {
	for i := range c {
		c[i] = max(c[i], o[i])
	}
	return c
}

// Ahead returns where the set has to go on when its counters were lost: at most block packets can have been sent on each
// outbound SA since these numbers were recorded, and the UE must not see one of their numbers again. What came in up to
// the recorded numbers must not come in again. It returns ErrSequence when that leaves no number to use; the set is then
// useless and the UE has to register anew.
func (c Counters) Ahead(block uint32) (Counters, error) {
	for i := 2; i < len(c); i++ {
		if uint64(c[i])+uint64(block) >= math.MaxUint32 {
			return Counters{}, ErrSequence
		}
		c[i] += block
	}
	return c, nil
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

// Backend is an Installer with what the survival of SA sets over a restart needs. Its own methods block; they are for the
// start, the end and the reconciler, not for a worker.
type Backend interface {
	Installer

	// Adopt takes over what an earlier process left. A set counts as adopted when the backend holds all four of its SAs
	// with the same addresses, ports, SPIs, algorithms and keys; from then on it is as if Install had put it there, and
	// its sequence numbers were not touched. Its hard limit is moved to Params.Hard. Every other SA of ours is removed,
	// those of others are never touched. It is called once, before the first Install.
	Adopt(ctx context.Context, sets []Params) (Adoption, error)

	// Survey reads what the backend really holds.
	Survey(ctx context.Context) (Survey, error)

	// Detach frees the backend and leaves the SAs where they are, if the backend can keep them without the process, for
	// the next one to adopt. Nothing passes a protected port in clear meanwhile.
	Detach() error
}

// Adoption is what Adopt did.
type Adoption struct {
	Adopted []uint64  // ids of sets
	Removed int       // SAs of ours that belonged to no set
	Foreign []ims.SPI // SPIs of others towards our addresses: not to be given out
}

// Survey is what a backend holds at one moment.
type Survey struct {
	Sets    map[uint64]Counters // installed sets with all four SAs there
	Missing []uint64            // installed sets of which an SA is gone
	Orphans int                 // SAs of ours that belong to no installed set
}
