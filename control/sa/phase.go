package sa

import (
	"fmt"
	"strings"
)

// Phase is where an SA set stands in its life (TS 33.203 §7.4). The table of Phase.On says how it gets on; the diagram in
// docs/states.md is made from it.
type Phase uint8

// Phases.
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

// Live reports whether the backend holds SAs of a set in this phase.
func (p Phase) Live() bool { return p == Temporary || p == Established || p == Old }

// Event is what happens to an SA set.
type Event uint8

// Events.
const (
	Acknowledged Event = iota + 1 // the backend holds all four SAs
	Refused                       // the backend holds none of them
	Confirmed                     // 200 to the REGISTER that came over the set (SM7)
	Replaced                      // a newer set of the UE was confirmed
	Removed                       // reg-await-auth, lifetime, failure, de-registration, or superseded
)

var eventNames = [...]string{
	Acknowledged: "acknowledged", Refused: "refused", Confirmed: "confirmed", Replaced: "replaced", Removed: "removed",
}

// String names the event as metrics and logs do.
func (e Event) String() string {
	if e == 0 || int(e) >= len(eventNames) {
		return fmt.Sprintf("Event(%d)", uint8(e))
	}
	return eventNames[e]
}

// transitions is the state machine: a pair that is not in it is not legal.
var transitions = [...]struct {
	from  Phase
	event Event
	to    Phase
	timer string // what runs in the phase that is entered
}{
	{Reserved, Acknowledged, Temporary, "reg-await-auth"},
	{Reserved, Refused, Dead, ""},
	{Reserved, Removed, Dead, ""},
	{Temporary, Confirmed, Established, "registration + margin"},
	{Temporary, Removed, Dead, ""},
	{Established, Replaced, Old, "64*T1 once the new set is used"},
	{Established, Removed, Dead, ""},
	{Old, Removed, Dead, ""},
}

// On returns the phase that an event leads to. It reports false, and the same phase, for an event that is not legal.
func (p Phase) On(e Event) (Phase, bool) {
	for i := range transitions {
		if t := &transitions[i]; t.from == p && t.event == e {
			return t.to, true
		}
	}
	return p, false
}

// Diagram draws the state machine as a Mermaid state diagram.
func Diagram() string {
	var b strings.Builder
	b.WriteString("stateDiagram-v2\n    [*] --> reserved: offer challenged\n" +
		"    [*] --> established: address association, without SAs\n")
	for _, t := range transitions {
		_, _ = fmt.Fprintf(&b, "    %s --> %s: %s\n", t.from, t.to, t.event)
	}
	for _, t := range transitions {
		if t.timer != "" {
			_, _ = fmt.Fprintf(&b, "    note right of %s: timer %s\n", t.to, t.timer)
		}
	}
	b.WriteString("    dead --> [*]\n")
	return b.String()
}
