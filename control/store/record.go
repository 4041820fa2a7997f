package store

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
)

// Implementation constants: bounds of a record. They lie above everything that fits into one SIP message, so they
// exclude nothing that could have been learnt from one; they keep damaged lengths from becoming allocations.
const (
	MaxText = 65535 // octets of one text
	MaxList = 1024  // elements of one list
	MaxKey  = 64    // octets of one ESP key; the longest today is 32
)

// ErrInvalid says that a record cannot be stored: its text names the field.
var ErrInvalid = errors.New("invalid record")

// Mark records how far the four SAs of a set have come.
type Mark struct {
	Set      uint64
	Counters sa.Counters
}

// Set is the record of one SA set (TS 33.203 §7.1), named by ID, or of an association without SAs (see Clear).
type Set struct {
	ID     uint64 // of sa.Params, not zero; not given to another set while the store lives
	Worker uint16 // whose table the set is in
	UE     uint32 // index of the UE context in that table
	Label  uint32 // of sa.Params
	Serial uint8  // distinguishes the live sets of one UE

	IMPI  string
	Addr  netip.Addr // address of the UE
	Local netip.Addr // our Gm address
	Ports ims.Ports
	SPIs  ims.SPIs
	Keys  ims.ESPKeys // with the suite

	Phase    sa.Phase // Reserved to Old: a dead set has no record
	Deadline time.Time
	Hard     time.Time // when the backend removes the set by itself; zero: never
	Counters sa.Counters

	// What SM7 has to repeat. Empty once the set is confirmed.
	ServerText string // Security-Server as sent in SM6
	ClientText string // Security-Client as received in SM1, one header row per line
	CallID     string // of SM1
	IMPU       string // of SM1

	Over      uint64 // id of the set which SM1 came over; zero: it came in clear
	OverTCP   bool   // SM7 came over TCP
	Used      bool   // a message other than SM7 came in on it
	Removing  bool   // told to go, waiting for its deadline
	Emergency bool   // made by an emergency registration (TS 24.229 §5.2.10)
	Clear     bool   // an address association without SAs (TS 24.229 §5.2.2.3): no suite, no keys, no SPIs
}

// Params returns what a backend needs to install the set again, or to adopt it. A hard limit in the past becomes a
// second, since none at all would mean for ever; callers look at Deadline first. Counters is left to the caller: Counters
// of the record is where the set was known to be, and how far ahead of that it has to go on depends on the block in which
// marks are written (sa.Counters.Ahead). A Clear set is nothing for a backend.
func (s *Set) Params(now time.Time) sa.Params {
	p := sa.Params{
		ID: s.ID, Label: s.Label, Local: s.Local, UE: s.Addr, Ports: s.Ports, SPIs: s.SPIs, Keys: s.Keys.Clone(),
	}
	if !s.Hard.IsZero() {
		p.Hard = max(s.Hard.Sub(now), time.Second)
	}
	return p
}

// Clone returns a copy that shares no memory that anybody writes to.
func (s *Set) Clone() *Set {
	c := *s
	c.Keys = s.Keys.Clone()
	return &c
}

// Validate returns an error that wraps ErrInvalid and names the field when the set cannot be stored.
func (s *Set) Validate() error {
	switch {
	case s.ID == 0:
		return invalid("set", "id is zero")
	case s.Phase < sa.Reserved || s.Phase > sa.Old:
		return invalid("set", "phase is %s", s.Phase)
	case s.Clear && (s.Keys.Suite != ims.Suite{} || len(s.Keys.Enc) > 0 || len(s.Keys.Auth) > 0 || s.Keys.Salt != [4]byte{}):
		return invalid("set", "it has keys but no SAs")
	case s.Clear && s.SPIs != ims.SPIs{}:
		return invalid("set", "it has SPIs but no SAs")
	case !s.Clear && !s.Keys.Suite.Legal():
		return invalid("set", "algorithm pair %s is not legal", s.Keys.Suite)
	case len(s.Keys.Enc) > MaxKey || len(s.Keys.Auth) > MaxKey:
		return invalid("set", "a key has more than %d octets", MaxKey)
	}
	return errors.Join(
		checkAddr("set", "address of the UE", s.Addr), checkAddr("set", "local address", s.Local),
		checkTime("set", "deadline", s.Deadline), checkTime("set", "hard limit", s.Hard),
		checkText("set", "IMPI", s.IMPI), checkText("set", "Security-Server", s.ServerText),
		checkText("set", "Security-Client", s.ClientText), checkText("set", "Call-ID", s.CallID),
		checkText("set", "IMPU", s.IMPU),
	)
}

// State is the state of a registration, with the values of the registrar.
type State uint8

// States.
const (
	Pending      State = iota + 1 // never registered so far
	Registered                    // a 200 with a positive expiry was received
	Deregistered                  // only answers until the sets are gone
)

// String names the state as metrics do.
func (s State) String() string {
	switch s {
	case Pending:
		return "pending"
	case Registered:
		return "registered"
	case Deregistered:
		return "deregistered"
	}
	return fmt.Sprintf("State(%#x)", uint8(s))
}

// Context names a UE context: its worker and its index in that worker's table, which is never zero.
type Context struct {
	Worker uint16
	Index  uint32
}

// Binding is one registered public identity of a UE with the implicit set that it belongs to (TS 24.229 §5.2.2.2).
type Binding struct {
	IMPU       string   // To of its REGISTER
	Associated []string // P-Associated-URI, default public identity first
}

// Registration is the record of one UE context, named by Context. Flow tokens hold worker, index and generation, so
// these stay what they are over a restart.
type Registration struct {
	Context
	Gen   uint16
	IMPI  string
	Addr  netip.Addr // address of the UE
	Local netip.Addr // our Gm address
	State State

	Current      uint64    // id of the set that carries requests to the UE; zero: none
	Bindings     []Binding // in the order in which they came
	ServiceRoute []string  // URIs in order
	Contact      string
	Expires      time.Time
	Ended        time.Time // of the last de-registration; zero: there was none
	Emergency    bool      // an emergency registration (TS 24.229 §5.2.10)

	// Former are the names that the context had with other workers, the latest last: flow tokens may still bear them. The
	// contexts of these names are freed ones.
	Former []Freed
}

// Clone returns a copy that shares no memory that anybody writes to.
func (r *Registration) Clone() *Registration {
	c := *r
	c.Bindings, c.ServiceRoute, c.Former = slices.Clone(r.Bindings), slices.Clone(r.ServiceRoute), slices.Clone(r.Former)
	for i := range c.Bindings {
		c.Bindings[i].Associated = slices.Clone(c.Bindings[i].Associated)
	}
	return &c
}

// Validate returns an error that wraps ErrInvalid and names the field when the registration cannot be stored.
func (r *Registration) Validate() error {
	switch {
	case r.Index == 0:
		return invalid("registration", "index is zero")
	case r.State < Pending || r.State > Deregistered:
		return invalid("registration", "state is %s", r.State)
	case len(r.Bindings) > MaxList || len(r.ServiceRoute) > MaxList || len(r.Former) > MaxList:
		return invalid("registration", "a list has more than %d elements", MaxList)
	}
	texts := append([]string{r.IMPI, r.Contact}, r.ServiceRoute...)
	for _, f := range r.Former {
		if f.Index == 0 {
			return invalid("registration", "index of a former name is zero")
		}
	}
	associated := 0
	for _, b := range r.Bindings {
		if associated += len(b.Associated); associated > MaxList {
			return invalid("registration", "the bindings have a list of more than %d associated identities in all", MaxList)
		}
		texts = append(append(texts, b.IMPU), b.Associated...)
	}
	for _, t := range texts {
		if err := checkText("registration", "a text", t); err != nil {
			return err
		}
	}
	return errors.Join(
		checkAddr("registration", "address of the UE", r.Addr), checkAddr("registration", "local address", r.Local),
		checkTime("registration", "expiry", r.Expires), checkTime("registration", "end", r.Ended),
	)
}

// Freed is what stays of a UE context that is gone: its generation. The next phone to get the index must have a higher
// one, or flow tokens of the phone before would reach it.
type Freed struct {
	Context
	Gen uint16 // of the context that went
}

// Validate returns an error that wraps ErrInvalid when the record cannot be stored.
func (f Freed) Validate() error {
	if f.Index == 0 {
		return invalid("freed context", "index is zero")
	}
	return nil
}

// Validate returns an error that wraps ErrInvalid when the mark cannot be stored.
func (m Mark) Validate() error {
	if m.Set == 0 {
		return invalid("mark", "set id is zero")
	}
	return nil
}

// Meta is what a store holds once. A new store has the zero value with its Schema.
type Meta struct {
	Schema     uint8   // version of the schema of the store; SetMeta ignores it
	TokenKey   ims.Key // of flow tokens
	TokenEpoch uint32  // counts the keys which flow tokens had
	Instance   string  // name of the gmgate that owns the store
	Workers    uint16  // number of workers over which its contexts are spread; zero: not said
	Clean      bool    // the last owner wrote everything and ended; cleared by SetMeta at start
}

// Validate returns an error that wraps ErrInvalid and names the field when the values cannot be stored.
func (m *Meta) Validate() error {
	if len(m.TokenKey) > MaxKey {
		return invalid("meta", "the token key has more than %d octets", MaxKey)
	}
	return checkText("meta", "instance name", m.Instance)
}

func invalid(record, format string, args ...any) error {
	return fmt.Errorf("%w: %s: %s", ErrInvalid, record, fmt.Sprintf(format, args...))
}

func checkText(record, field, text string) error {
	if len(text) > MaxText {
		return invalid(record, "%s has %d octets, more than %d", field, len(text), MaxText)
	}
	return nil
}

func checkAddr(record, field string, a netip.Addr) error {
	switch {
	case !a.IsValid():
		return invalid(record, "%s is missing", field)
	case a.Zone() != "":
		return invalid(record, "%s %s has a zone, which means nothing after a restart", field, a)
	}
	return nil
}

// maxMilli is the last millisecond of the year 9999.
const maxMilli = 253402300799999

func checkTime(record, field string, t time.Time) error {
	if ms := t.UnixMilli(); !t.IsZero() && (ms <= 0 || ms > maxMilli) {
		return invalid(record, "%s %s is out of range", field, t)
	}
	return nil
}
