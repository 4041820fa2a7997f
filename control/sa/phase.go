package sa

import (
	"fmt"
	"slices"
)

// Phase is where an SA set stands in its life.
//
//	Reserved ──install acknowledged──► Temporary ──200 to SM7──► Established ──newer set established──► Old
//	    │                                  │                          │                                  │
//	    └──install failed──► Dead ◄────────┴── reg-await-auth, error ─┴── lifetime, de-registration ─────┘
type Phase uint8

// Phases (TS 33.203 §7.4).
const (
	Reserved    Phase = iota + 1 // SPIs and ports taken, the backend has not answered yet
	Temporary                    // installed, 401 sent, waiting for the protected REGISTER
	Established                  // confirmed by a 200
	Old                          // replaced by a newer established set, still receiving
	Dead                         // removed
)

var phaseNames = [...]string{
	Reserved: "reserved", Temporary: "temporary", Established: "established", Old: "old", Dead: "dead",
}

// String names the phase as metrics and logs do.
func (p Phase) String() string {
	if p == 0 || int(p) >= len(phaseNames) {
		return fmt.Sprintf("Phase(%d)", uint8(p))
	}
	return phaseNames[p]
}

var phaseNext = [...][]Phase{
	Reserved:    {Temporary, Dead},
	Temporary:   {Established, Dead},
	Established: {Old, Dead},
	Old:         {Dead},
	Dead:        nil,
}

// CanBecome reports whether a set may go from p to next.
func (p Phase) CanBecome(next Phase) bool {
	if p == 0 || int(p) >= len(phaseNext) {
		return false
	}
	return slices.Contains(phaseNext[p], next)
}

// Live reports whether the backend holds SAs of a set in this phase.
func (p Phase) Live() bool { return p == Temporary || p == Established || p == Old }
