package registrar

import (
	"fmt"
	"strings"
)

// State is the registration state of a UE context (TS 24.229 §5.2.2). The table of State.On says how it gets on; the
// diagram in docs/states.md is made from it.
type State uint8

// States.
const (
	Pending      State = iota + 1 // never registered so far
	Registered                    // a 200 with a positive expiry was received
	Deregistered                  // only answers and REGISTER until the sets are gone
)

var stateNames = [...]string{Pending: "pending", Registered: "registered", Deregistered: "deregistered"}

// String names the state as metrics and logs do.
func (s State) String() string {
	if s == 0 || int(s) >= len(stateNames) {
		return fmt.Sprintf("State(%d)", uint8(s))
	}
	return stateNames[s]
}

// Event is what happens to the registration of a UE.
type Event uint8

// Events.
const (
	Accepted Event = iota + 1 // 200 with a positive expiry over one of its SA sets
	Ended                     // de-registered, by the UE or by the network
)

var eventNames = [...]string{Accepted: "accepted", Ended: "ended"}

// String names the event as metrics and logs do.
func (e Event) String() string {
	if e == 0 || int(e) >= len(eventNames) {
		return fmt.Sprintf("Event(%d)", uint8(e))
	}
	return eventNames[e]
}

// transitions is the state machine: a pair that is not in it is not legal. A context ends with its last SA set, in any
// state.
var transitions = [...]struct {
	from  State
	event Event
	to    State
}{
	{Pending, Accepted, Registered},
	{Pending, Ended, Deregistered}, // a REGISTER that is its own end: answered 200 without a binding
	{Registered, Accepted, Registered},
	{Registered, Ended, Deregistered},
	{Deregistered, Accepted, Registered}, // registered anew while the old sets run out
	{Deregistered, Ended, Deregistered},
}

// On returns the state that an event leads to. It reports false, and the same state, for an event that is not legal.
func (s State) On(e Event) (State, bool) {
	for i := range transitions {
		if t := &transitions[i]; t.from == s && t.event == e {
			return t.to, true
		}
	}
	return s, false
}

// Diagram draws the state machine as a Mermaid state diagram.
func Diagram() string {
	var b strings.Builder
	b.WriteString("stateDiagram-v2\n    [*] --> pending: first SA set\n")
	for _, t := range transitions {
		_, _ = fmt.Fprintf(&b, "    %s --> %s: %s\n", t.from, t.to, t.event)
	}
	for _, s := range []State{Pending, Registered, Deregistered} {
		_, _ = fmt.Fprintf(&b, "    %s --> [*]: last SA set gone\n", s)
	}
	return b.String()
}
