package admin

import (
	"strconv"
	"time"

	"github.com/gmgate/gmgate/control/proxy"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/sa"
)

// Status is what GET /v1/status answers.
type Status struct {
	Version  string    `json:"version"`
	Revision string    `json:"revision"`
	Instance string    `json:"instance"`
	Started  time.Time `json:"started"`
	Backend  string    `json:"backend"`
	Reason   string    `json:"backend_reason"` // why this backend
	UEs      int       `json:"ues"`
	SAs      int       `json:"sas"` // in the backend
	Workers  []Worker  `json:"workers"`
}

// Worker is the load of one worker.
type Worker struct {
	Worker int `json:"worker"`
	UEs    int `json:"ues"`
	SPIs   int `json:"spis"` // given out
}

// Page is what GET /v1/ues answers.
type Page struct {
	UEs   []UE   `json:"ues"`
	After string `json:"after,omitempty"` // ask for the next page with it; empty: this is the last one
}

// UE is one phone: one IMPI at one address.
type UE struct {
	ID           string    `json:"id"` // worker-index-generation
	Worker       int       `json:"worker"`
	Index        uint32    `json:"index"`
	IMPI         string    `json:"impi"`
	Address      string    `json:"address"`
	Local        string    `json:"local"`               // our address that it talks to
	State        string    `json:"state"`               // pending, registered, deregistered
	Emergency    bool      `json:"emergency,omitempty"` // its emergency registration, which stands beside the normal one
	Clear        bool      `json:"clear,omitempty"`     // registered in clear: its sets have no SAs
	Identities   []string  `json:"identities"`
	Contact      string    `json:"contact,omitempty"`
	ServiceRoute []string  `json:"service_route"`
	NextHop      string    `json:"next_hop,omitempty"`
	Expires      time.Time `json:"expires,omitzero"` // of the registration
	Current      string    `json:"current,omitempty"`
	ESP          *ESP      `json:"esp,omitempty"`         // where a guard looks at it
	LastMessage  time.Time `json:"last_message,omitzero"` // its last SIP message since the daemon started, to the second
	LastSeen     time.Time `json:"last_seen,omitzero"`    // the later one of that and its last ESP packet
	Sets         []Set     `json:"sets"`                  // oldest first
}

// ESP is what came in of a phone's ESP packets. The guard counts them before anybody has verified them: they are a sign of
// life, no proof.
type ESP struct {
	Packets uint64    `json:"packets"`
	Bytes   uint64    `json:"bytes"` // of whole IP packets
	Last    time.Time `json:"last,omitzero"`
}

// Roles of a set.
const (
	RoleCurrent   = "current"   // requests to the UE take it
	RoleWaiting   = "waiting"   // not in use yet, or not for requests to the UE
	RoleReceiving = "receiving" // replaced, for what is still on its way
	RoleEnding    = "ending"    // told to go
)

// Set is an SA set. SPIs are unsigned.
type Set struct {
	ID          string      `json:"id"`    // worker-number
	Phase       string      `json:"phase"` // reserved, temporary, established, old
	Role        string      `json:"role"`
	Algorithms  string      `json:"algorithms"` // alg=ealg; none in clear
	SPIs        SPIs        `json:"spis"`
	Ports       Ports       `json:"ports"`
	Deadline    time.Time   `json:"deadline,omitzero"` // when it goes unless something happens
	Over        string      `json:"over,omitempty"`    // the set that its first REGISTER came over; empty: in clear, or that set has gone
	Used        bool        `json:"used"`              // by the UE, since it was confirmed
	TCP         bool        `json:"tcp"`               // the UE prefers TCP
	Connections Connections `json:"connections"`
	FirstESP    time.Time   `json:"first_esp,omitzero"` // where a guard looks at it; before it was verified
	Heard       time.Time   `json:"heard,omitzero"`     // last message that was verified, since the daemon started, to the second
	Diagnosis   string      `json:"diagnosis,omitempty"`
	Hint        string      `json:"hint,omitempty"`      // what the diagnosis may come from
	Sequences   *Sequences  `json:"sequences,omitempty"` // where they were asked for and the backend holds the set
}

// SPIs are the SPIs of a set, each named by the port at which its SA ends (TS 33.203 §7.1).
type SPIs struct {
	UC uint32 `json:"uc"`
	US uint32 `json:"us"`
	PC uint32 `json:"pc"`
	PS uint32 `json:"ps"`
}

// Ports are the protected ports of a set (TS 33.203 §7.1).
type Ports struct {
	UC uint16 `json:"uc"`
	US uint16 `json:"us"`
	PC uint16 `json:"pc"`
	PS uint16 `json:"ps"`
}

// Sequences are the sequence numbers of a set (RFC 4303 §2.2), each named like the SPI of its SA: the highest one received
// of those to pc and ps, the last one sent of those to uc and us.
type Sequences struct {
	UC uint32 `json:"uc"`
	US uint32 `json:"us"`
	PC uint32 `json:"pc"`
	PS uint32 `json:"ps"`
}

// Connections are the TCP connections of a set by their number in the worker; zero: none.
type Connections struct {
	In  uint32 `json:"in"`  // opened by the UE, uc to ps
	Out uint32 `json:"out"` // opened by gmgate, pc to us
}

// Target chooses the registrations that POST /v1/deregister ends. Exactly one field is set. A UE is ended with all its
// identities, whichever of them was named.
type Target struct {
	ID      string `json:"id,omitempty"`
	IMPI    string `json:"impi,omitempty"`
	IMPU    string `json:"impu,omitempty"`
	Contact string `json:"contact,omitempty"` // host:port
}

// Ended is what POST /v1/deregister answers: the UE contexts as they are afterwards. Their SA sets stay for a while for
// what is on its way.
type Ended struct {
	UEs []UE `json:"ended"`
}

// Move is what POST /v1/move asks for: the UE contexts at the address of a UE go to another worker.
type Move struct {
	ID     string `json:"id"`
	Worker *int   `json:"worker"`
}

// Moved is what POST /v1/move answers: the UE contexts as they are at their new worker, where they have other ids.
type Moved struct {
	UEs []UE `json:"moved"`
}

// Problem is the answer to a request that failed.
type Problem struct {
	Text string `json:"error"`
	Hint string `json:"hint,omitempty"`
}

func ueOf(u *proxy.UEInfo) UE {
	v := UE{
		ID: u.ID.String(), Worker: u.ID.Worker, Index: u.ID.Index, IMPI: u.IMPI, Address: u.Addr.String(),
		Local: u.Local.String(), State: u.State.String(), Emergency: u.Emergency, Clear: u.Clear, Identities: list(u.Identities), Contact: u.Contact,
		ServiceRoute: list(u.ServiceRoute), Expires: u.Expires, Current: setID(u.Current), Sets: make([]Set, len(u.Sets)),
		LastMessage: utc(u.LastMessage), LastSeen: utc(u.LastSeen),
	}
	if u.Witnessed {
		v.ESP = &ESP{Packets: u.ESP.Packets, Bytes: u.ESP.Bytes, Last: utc(u.ESP.Last)}
	}
	if u.NextHop.IsValid() {
		v.NextHop = u.NextHop.String()
	}
	for i := range u.Sets {
		v.Sets[i] = setOf(&u.Sets[i], u)
	}
	return v
}

func uesOf(infos []proxy.UEInfo) []UE {
	ues := make([]UE, len(infos))
	for i := range infos {
		ues[i] = ueOf(&infos[i])
	}
	return ues
}

func setOf(s *proxy.SetInfo, u *proxy.UEInfo) Set {
	algorithms := s.Suite.String()
	if u.Clear {
		algorithms = "none"
	}
	return Set{
		ID: setID(s.ID), Phase: s.Phase.String(), Role: role(s, u), Algorithms: algorithms, Deadline: s.Deadline,
		SPIs:  SPIs{UC: uint32(s.SPIs.UC), US: uint32(s.SPIs.US), PC: uint32(s.SPIs.PC), PS: uint32(s.SPIs.PS)},
		Ports: Ports(s.Ports), Over: setID(s.Over), Used: s.Used, TCP: s.TCP,
		Connections: Connections{In: uint32(s.ConnIn), Out: uint32(s.ConnOut)},
		FirstESP:    utc(s.FirstESP), Heard: utc(s.Heard), Diagnosis: s.Diagnosis.String(), Hint: hint(s.Diagnosis),
	}
}

// hint says what a diagnosis may come from.
func hint(d proxy.Diagnosis) string {
	switch d {
	case proxy.DiagnosisNoESP:
		return "the phone has not answered the challenge, or its packets are lost on the way"
	case proxy.DiagnosisNotAccepted:
		return "wrong keys, algorithms or SIM (TS 33.203 §7.2)"
	}
	return ""
}

// utc keeps the zero time zero.
func utc(t time.Time) time.Time {
	if t.IsZero() {
		return time.Time{}
	}
	return t.UTC()
}

// addSequences notes the sequence numbers of those sets that the backend holds.
func (u *UE) addSequences(info *proxy.UEInfo, held map[uint64]sa.Counters) {
	for i := range info.Sets {
		if c, ok := held[info.Sets[i].ID]; ok { // in the order of sa.Params.SAs: ps, pc, us, uc
			u.Sets[i].Sequences = &Sequences{PS: c[0], PC: c[1], US: c[2], UC: c[3]}
		}
	}
}

func role(s *proxy.SetInfo, u *proxy.UEInfo) string {
	switch {
	case s.Ending || u.State == registrar.Deregistered:
		return RoleEnding
	case s.ID == u.Current:
		return RoleCurrent
	case s.Phase == sa.Old:
		return RoleReceiving
	}
	return RoleWaiting
}

// setID prints the id of a set: the worker is in its upper bits. As a number it would be too large for JSON.
func setID(id uint64) string {
	if id == 0 {
		return ""
	}
	return strconv.FormatUint(id>>48, 10) + "-" + strconv.FormatUint(id&(1<<48-1), 10)
}

// list keeps an empty list from being null.
func list(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}
