package reginfo

import (
	"fmt"
	"strings"
)

// Completeness says whether a document tells everything or only what changed (RFC 3680 §5.1).
type Completeness uint8

// Kinds of documents.
const (
	Full Completeness = iota + 1
	Partial
)

var completenessNames = [...]string{Full: "full", Partial: "partial"}

// String returns the wire token.
func (c Completeness) String() string { return name(completenessNames[:], uint8(c), "Completeness") }

// State is the state of a registration or of a contact (RFC 3680 §4.7). Contacts are never Init.
type State uint8

// States.
const (
	Init State = iota + 1
	Active
	Terminated
)

var stateNames = [...]string{Init: "init", Active: "active", Terminated: "terminated"}

// String returns the wire token.
func (s State) String() string { return name(stateNames[:], uint8(s), "State") }

// Event is what brought a contact into its state (RFC 3680 §4.7.1). Zero is an event that RFC 3680 does not know, or none.
type Event uint8

// Events.
const (
	Registered Event = iota + 1
	Created
	Refreshed
	Shortened
	Expired
	Deactivated
	Probation
	Unregistered
	Rejected
)

var eventNames = [...]string{
	Registered: "registered", Created: "created", Refreshed: "refreshed", Shortened: "shortened", Expired: "expired",
	Deactivated: "deactivated", Probation: "probation", Unregistered: "unregistered", Rejected: "rejected",
}

// String returns the wire token.
func (e Event) String() string { return name(eventNames[:], uint8(e), "Event") }

func name(names []string, v uint8, kind string) string {
	if v == 0 || int(v) >= len(names) {
		return fmt.Sprintf("%s(%d)", kind, v)
	}
	return names[v]
}

// token returns the index of a wire token in names, 0 if it is none of them.
func token(names []string, text string) uint8 {
	for i := 1; i < len(names); i++ {
		if names[i] == text {
			return uint8(i)
		}
	}
	return 0
}

// Number is an optional number: seconds, or a CSeq. Larger ones than fit are the largest that does.
type Number struct {
	Value uint32
	Set   bool
}

// Document is one reginfo document.
type Document struct {
	Version       uint32
	Versioned     bool // the version attribute was there; RFC 3680 §5.1 demands it
	State         Completeness
	Registrations []Registration
}

// Registration is what a document says of one address of record.
type Registration struct {
	AOR      string
	ID       string // identifies the registration within a subscription; the AOR where the document has none
	State    State
	Contacts []Contact
}

// Contact is what a document says of one contact of a registration.
type Contact struct {
	ID                 string // identifies the contact within its registration; the URI where the document has none
	State              State
	Event              Event
	DurationRegistered Number // seconds
	Expires            Number // seconds left
	RetryAfter         Number // seconds, with Probation
	Q                  string
	CallID             string
	CSeq               Number
	URI                string
	DisplayName        string
	UnknownParams      []Param // parameters of the Contact header field beyond those above
	PubGRUU            string  // RFC 5628 §5
	TempGRUU           string
	FirstCSeq          Number // of TempGRUU
}

// Param is a parameter of a Contact header field, its value as the document has it: quoted strings with their quotes.
type Param struct{ Name, Value string }

// Param returns the value of a parameter, compared without regard to case, and whether it is there.
func (c *Contact) Param(name string) (string, bool) {
	for _, p := range c.UnknownParams {
		if strings.EqualFold(p.Name, name) {
			return p.Value, true
		}
	}
	return "", false
}

// Instance returns the +sip.instance without quotes and angle brackets (RFC 5626 §4.1), empty if there is none.
func (c *Contact) Instance() string {
	v, _ := c.Param("+sip.instance")
	return enclosed(enclosed(v, '"', '"'), '<', '>')
}

// RegID returns the reg-id (RFC 5626 §4.2), empty if there is none.
func (c *Contact) RegID() string {
	v, _ := c.Param("reg-id")
	return enclosed(v, '"', '"') // some registrars quote every value
}

func enclosed(s string, first, last byte) string {
	if n := len(s); n >= 2 && s[0] == first && s[n-1] == last {
		return s[1 : n-1]
	}
	return s
}
