// Package registrar keeps the UE contexts of one worker: which phone has which SA sets, which set is in use, and how
// they come and go (TS 33.203 §7.2 and §7.4, TS 24.229 §5.2.2). It knows nothing of SIP syntax; package proxy reads and
// writes the messages and calls it with what they mean.
//
// A Table belongs to one worker: all its methods, and all callbacks it makes, run on that worker's loop. The backend
// answers on goroutines of its own; those answers come back through the Post function.
package registrar

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/control/wheel"
)

// Errors of Check and Begin.
var (
	// ErrAddressConflict: the UE's address and protected client port, or one of its SPIs, belong to a live SA set of
	// another IMPI (TS 33.203 §7.2).
	ErrAddressConflict = errors.New("address and protected port are in use by another registration")
	// ErrTooManySets: six SAs per direction exist already and none of them may be evicted (TS 33.203 §7.2).
	ErrTooManySets = errors.New("too many SA sets for this UE")
	// ErrNoPort: every protected port of ours is in use towards this UE.
	ErrNoPort = errors.New("no protected port left towards this UE")
	// ErrProtected: the identity has confirmed SA sets, so no association in clear may be made for it.
	ErrProtected = errors.New("identity has security associations")
	// ErrAborted: the set was dropped before the backend had installed it.
	ErrAborted = errors.New("SA set dropped while being installed")
)

// indexBits is the size of an index in flow tokens and labels. The upper bits of a label are the worker.
const indexBits = 24

// MaxUEs is how many UE contexts one table can hold.
const MaxUEs = 1<<indexBits - 1

// removeRetry is the time between two attempts to take SAs out of a backend that refuses.
const removeRetry = 2 * time.Second

// hardMargin is how much longer the backend keeps an SA than we do, as a backstop for a crash.
const hardMargin = time.Minute

// resetGrace is how long the SAs of a set outlive its connections: the resets get out, and what the phone had sent before it got
// them comes in, rather than being counted as ESP that nobody knows.
const resetGrace = 500 * time.Millisecond

// queueSlack is how many sets which no longer wait may stay in the queue of unconfirmed ones, beside as many as wait.
const queueSlack = 64

// How often the backend is asked to move a hard limit, and how long after a refusal.
const (
	extendTries = 3
	extendRetry = time.Second
)

// Config is the part of the configuration that rules SA sets. Times are real time.
type Config struct {
	ServerPorts []uint16      // port-ps, in order of preference
	ClientPorts []uint16      // port-pc pool
	AwaitAuth   time.Duration // life of a temporary set: reg-await-auth, TS 24.229 §7.8
	OldSet      time.Duration // 64*T1: an old set after the new one was taken into use, TS 33.203 §7.4
	MaxSets     int           // SA sets per UE context, TS 33.203 §7.2
	// NewServerPort prefers another port-ps at a re-registration, though TS 33.203 §7.1 keeps it.
	NewServerPort bool
}

// Observer is told of changes worth counting. Its methods run on the worker's loop and must not block.
type Observer interface {
	Sets(phase sa.Phase, delta int)
	// Associations counts the sets without SAs, which Sets leaves out.
	Associations(delta int)
	UEs(state State, delta int)
	AwaitAuthExpired()
	// Unexpected is told of an event that the state machine has no transition for. It changed nothing.
	Unexpected(fsm string, state, event fmt.Stringer)
	// SetRemoved is called when a set is dead: its connections must be closed.
	SetRemoved(s *Set)
	// Gone is called when the last set of a UE is dead, and its context with it.
	Gone(u *UE)
}

// UE is the context of one phone: one IMPI at one address. Fields are read by the worker that owns it.
//
// An emergency registration has a context of its own beside the normal one, and nothing that happens to one of the two
// concerns the other (TS 24.229 §5.1.6). A registration in clear has a context of its own as well: a context has either
// sets with SAs or address associations, never both, so that what was protected cannot go on in clear.
type UE struct {
	Index     uint32 // position in the table, never zero
	Gen       uint16 // distinguishes the phones which had this index one after the other
	Emergency bool   // the contact has the parameter sos
	Clear     bool   // its sets are address associations
	State     State
	kept      bool   // by the journal
	restored  bool   // from what a run before has kept
	portTurn  uint16 // rotates through the port-pc pool
	IMPI      string
	Addr      netip.Addr
	Local     netip.Addr

	Sets    []*Set // reserved, temporary, established and old ones, oldest first
	Current *Set   // carries requests to the UE; nil before the first 200

	Bindings   []Binding
	Ended      time.Time     // of the last de-registration
	Identities []string      // of all bindings, default public identity first
	Beside     []uint8       // for each identity one plus the index of the tel URI of the same number; 0: there is none
	Route      *ServiceRoute // nil: none
	NextHop    ims.Hop       // where initial requests go; not valid until resolved
	Contact    string        // Contact URI registered
	Expires    time.Time

	keep   wheel.Timer // shows the UE to the journal
	keepAt int64       // when, in nanoseconds of Unix time

	ofIMPI, atAddr *UE // the next one with the same IMPI, and the next one at the same address

	large *large // nil until there was one

	heard uint32 // the latest of those of sets that are gone

	Repeats uint16 // messages of its transactions that the forwarder keeps to send them again
}

// large are the transactions of the latest INVITEs of a UE that went over TCP because of their size.
type large struct {
	tx   [4]uint64
	turn uint8 // the next one to be overwritten
}

// ServiceRoute is a Service-Route (RFC 3608). UEs share it where theirs are equal: nobody changes it.
type ServiceRoute struct {
	URIs  []string // in order
	Hosts []string // of these URIs
	Row   string   // Route header row that preloads it
}

// Routes returns the URIs of the Service-Route in order.
func (u *UE) Routes() []string {
	if u.Route == nil {
		return nil
	}
	return u.Route.URIs
}

// WentOverTCP notes that an INVITE to the UE went over TCP because of its size: its CANCEL and the ACK of a non-2xx answer
// must take the same transport (RFC 3261 §9.1 and §17.1.1.3), small as they are. tx identifies the transaction.
func (u *UE) WentOverTCP(tx uint64) {
	if u.IsOverTCP(tx) {
		return
	}
	if u.large == nil {
		u.large = new(large)
	}
	l := u.large
	l.tx[l.turn] = tx
	l.turn = (l.turn + 1) % uint8(len(l.tx))
}

// IsOverTCP reports whether the transaction was noted by WentOverTCP; Forget takes it back.
func (u *UE) IsOverTCP(tx uint64) bool { return u.large != nil && slices.Contains(u.large.tx[:], tx) }

// Forget takes back what WentOverTCP noted, because the INVITE went over UDP after all.
func (u *UE) Forget(tx uint64) {
	if u.large == nil {
		return
	}
	if i := slices.Index(u.large.tx[:], tx); i >= 0 {
		u.large.tx[i] = 0
	}
}

// Binding is one registered public identity of a UE with the implicit set that belongs to it (TS 24.229 §5.2.2.2).
type Binding struct {
	IMPU       string   // To of its REGISTER
	Associated []string // P-Associated-URI
}

// MaxBindings bounds the public identities that a UE has registered, each with its implicit set. A phone that writes one
// identity in ever new ways would otherwise have no end of them.
const MaxBindings = 32

// Bind notes a registered identity, and replaces what was known of it. The oldest one gives way where there are too many.
func (u *UE) Bind(b Binding) {
	if i := slices.IndexFunc(u.Bindings, func(o Binding) bool { return o.IMPU == b.IMPU }); i >= 0 {
		if len(b.Associated) == 0 {
			b.Associated = u.Bindings[i].Associated
		}
		u.Bindings[i] = b
	} else {
		if n := len(u.Bindings) - MaxBindings + 1; n > 0 {
			u.Bindings = slices.Delete(u.Bindings, 0, n)
		}
		u.Bindings = append(u.Bindings, b)
	}
	u.gatherIdentities()
}

// Unbind takes an identity out, with the implicit set that it is of, and reports whether the UE has another one left.
// One that nobody knows ends everything: better a phone that registers again than one that is thought to be reachable.
func (u *UE) Unbind(impu string) (left bool) {
	n := len(u.Bindings)
	u.Bindings = slices.DeleteFunc(u.Bindings, func(b Binding) bool {
		return b.IMPU == impu || slices.Contains(b.Associated, impu)
	})
	if len(u.Bindings) == n {
		u.Bindings = nil
	}
	u.gatherIdentities()
	return len(u.Bindings) > 0
}

// Withdraw takes one identity out of the implicit sets of a UE that stays registered with others of the same set.
func (u *UE) Withdraw(identity string) {
	for i := range u.Bindings {
		b := &u.Bindings[i]
		if len(b.Associated) > 1 { // without any the set would be taken for that of IMPU alone
			b.Associated = slices.DeleteFunc(slices.Clone(b.Associated), func(id string) bool { return id == identity })
		}
	}
	u.gatherIdentities()
}

// repeats reports whether a list has an element twice.
func repeats(l []string) bool {
	for i := range l {
		if slices.Contains(l[:i], l[i]) {
			return true
		}
	}
	return false
}

func (u *UE) gatherIdentities() {
	u.Identities, u.Beside = nil, nil
	if len(u.Bindings) == 1 && !repeats(u.Bindings[0].Associated) { // the list of nearly every UE is the one that came
		u.Identities = slices.Clip(u.Bindings[0].Associated)
	}
	for _, b := range u.Bindings {
		ids := b.Associated
		if len(ids) == 0 {
			ids = []string{b.IMPU}
		}
		for _, id := range ids {
			if !slices.Contains(u.Identities, id) {
				u.Identities = append(u.Identities, id)
			}
		}
	}
	u.Beside = make([]uint8, len(u.Identities))
	for i, id := range u.Identities {
		if user, _, ok := strings.Cut(strings.TrimPrefix(id, "sip:"), "@"); ok {
			if tel := slices.Index(u.Identities, "tel:"+user) + 1; tel < 1<<8 {
				u.Beside[i] = uint8(tel) //nolint:gosec // checked
			}
		}
	}
}

// Set is an SA set with what the SIP side remembers of its agreement. With Clear it is an address association instead
// (TS 24.229 §5.2.2.3): it has no SAs, no SPIs and no keys, the Installer never hears of it, its ports are the phone's source
// port and our unprotected one, and it is Established from its beginning to its end.
type Set struct {
	sa.Params
	UE        *UE
	Agreement *Agreement // how it came about; nil once the set is confirmed
	Over      *Set       // the set which SM1 came over; nil: it came in clear

	Clear   bool
	Phase   sa.Phase
	Serial  uint8 // distinguishes the live sets of one UE in flow tokens
	OverTCP bool  // SM7 came over TCP: so do requests to the UE
	Used    bool  // a message other than SM7 came in on it

	// What the operator's policy says of the traffic; the zero values are the rules of TS 33.203.
	Requests        ims.Transport // of requests to the UE
	OwnConnection   bool          // requests to the UE go on connections that we opened only
	AnswersToSource bool          // UDP answers go from port-ps to port-uc where the request has rport

	initial  bool // SM1 came in clear
	removing bool // told to go, waiting for its grace
	kept     bool // by the journal

	heard uint32 // when the last message came in on it, in seconds of Unix time; zero: none since the process started

	Deadline time.Time
	ConnIn   ims.ConnID // connection opened by the UE, uc to ps
	ConnOut  ims.ConnID // connection opened by us, pc to us

	timer wheel.Timer
	due   atomic.Int32 // answers of the backend that something here waits for
}

// Agreement is how a security agreement was made, for the comparison with what SM7 says of it (RFC 3329 §2.3.1).
type Agreement struct {
	Server string // Security-Server as sent in SM6
	Client string // Security-Client of SM1, rows joined by a newline
	CallID string // of SM1
	IMPU   string // of SM1

	await time.Duration // reg-await-auth
	began time.Time
}

// Hear notes that a message has come in on the set, which the ESP backend has verified. On an address association it is one
// from the phone's address and port.
func (t *Table) Hear(s *Set) { s.heard = uint32(t.now().Unix()) } //nolint:gosec // until 2106

// Heard returns when the last message came in on the set, to the second; zero: none since the process started.
func (s *Set) Heard() time.Time { return heardAt(s.heard) }

// Heard returns when the last message of the phone came in, on whatever set.
func (u *UE) Heard() time.Time {
	last := u.heard
	for _, s := range u.Sets {
		last = max(last, s.heard)
	}
	return heardAt(last)
}

func heardAt(seconds uint32) time.Time {
	if seconds == 0 {
		return time.Time{}
	}
	return time.Unix(int64(seconds), 0)
}

// Dropped reports whether the set was told to go.
func (s *Set) Dropped() bool { return s.removing }

// HardLimit returns when the backend removes the set by itself, should nobody else have done it.
func (s *Set) HardLimit() time.Time { return s.Deadline.Add(hardMargin) }

// Live reports whether messages may use the set.
func (s *Set) Live() bool { return s.Phase.Live() }

// tuple is a pair of ends: ours and the UE's.
type tuple struct {
	ue            [16]byte
	uePort, lport uint16
	local         uint16 // index in Table.locals, since we have few addresses and there are two tuples for every set
}

func (t *Table) tuple(local, ue netip.AddrPort) tuple {
	i := slices.Index(t.locals, local.Addr())
	if i < 0 {
		i = len(t.locals)
		t.locals = append(t.locals, local.Addr())
	}
	return tuple{ue: ue.Addr().As16(), uePort: ue.Port(), lport: local.Port(), local: uint16(i)} //nolint:gosec // our own addresses
}

// Key names a UE context.
type Key struct {
	IMPI      string
	Addr      netip.Addr
	Emergency bool
	Clear     bool
}

// Key returns the name of the context.
func (u *UE) Key() Key { return Key{u.IMPI, u.Addr, u.Emergency, u.Clear} }

// Table holds the UE contexts of one worker.
type Table struct {
	cfg       Config
	worker    int
	wheel     *wheel.Wheel
	now       func() time.Time
	installer sa.Installer
	post      func(func()) error
	obs       Observer
	journal   Journal // nil: nothing survives

	spis    *sa.SPIPool
	ues     []*UE // by index; nil = free
	gens    []uint16
	free    []uint32
	count   int                // of ues
	byIMPI  map[string]*UE     // the first of those linked by ofIMPI
	byAddr  map[netip.Addr]*UE // the first of those linked by atAddr
	byTuple map[tuple]*Set
	locals  []netip.Addr // of ours, as they were met
	// leaving are dead sets whose SAs are still in the backend for resetGrace.
	leaving map[netip.Addr][]*Set
	// unconfirmed counts the sets of initial registrations that nobody has proved to be entitled to, by source.
	unconfirmed map[netip.Prefix]int
	pending     int    // their sum
	queue       []*Set // in the order of their beginning, some confirmed and dead ones among them
	nextID      uint64

	shunned  map[uint32]struct{} // indices that are not to be given out; until Resume
	retired  map[uint32]uint16   // generations of contexts that other tables have now, by their index here
	sendSPIs func(...ims.SPI)    // frees those of other workers' pools; nil: nobody does
}

// New makes an empty table. worker makes set ids unique in the process, post runs a function on the worker's loop.
func New(cfg Config, worker int, spis *sa.SPIPool, w *wheel.Wheel, now func() time.Time, inst sa.Installer,
	post func(func()) error, obs Observer,
) *Table {
	return &Table{
		cfg: cfg, worker: worker, wheel: w, now: now, installer: inst, post: post, obs: obs, spis: spis,
		ues: make([]*UE, 1), gens: make([]uint16, 1),
		byIMPI: make(map[string]*UE), byAddr: make(map[netip.Addr]*UE), byTuple: make(map[tuple]*Set),
		leaving:     make(map[netip.Addr][]*Set),
		unconfirmed: make(map[netip.Prefix]int),
	}
}

// Source returns what counts as one source of registrations: an IPv4 address, or an IPv6 /64, since a phone may take any
// address in its own.
func Source(a netip.Addr) netip.Prefix {
	bits := 32
	if a.Is6() {
		bits = 64
	}
	p, _ := a.Unmap().Prefix(bits)
	return p
}

// Oldest returns the set that has waited longest for its authentication, and since when; nil when none does.
func (t *Table) Oldest() (*Set, time.Time) {
	for len(t.queue) > 0 {
		if s := t.queue[0]; s.waits() {
			return s, s.Agreement.began
		}
		t.queue[0] = nil
		t.queue = t.queue[1:]
	}
	t.queue = nil
	return nil, time.Time{}
}

// Evict ends a set that waits for its authentication, to make room for another one.
func (t *Table) Evict(s *Set) { t.remove(s) }

// Unconfirmed returns how many SA sets of initial registrations wait for their authentication: those of one source, and
// of all.
func (t *Table) Unconfirmed(source netip.Prefix) (here, all int) {
	return t.unconfirmed[source], t.pending
}

// waits reports whether a set counts as unconfirmed.
func (s *Set) waits() bool { return (s.Phase == sa.Reserved || s.Phase == sa.Temporary) && s.initial }

// account notes that a set has begun to wait for its authentication, or has stopped.
func (t *Table) account(s *Set, before bool) {
	after := s.waits()
	if before == after {
		return
	}
	source := Source(s.Params.UE)
	if after {
		t.unconfirmed[source]++
		t.pending++
		t.queue = append(t.queue, s)
		return
	}
	t.pending--
	if t.unconfirmed[source]--; t.unconfirmed[source] == 0 {
		delete(t.unconfirmed, source)
	}
	switch {
	case t.pending == 0:
		t.queue = nil
	case len(t.queue) > 2*t.pending+queueSlack: // as many have gone since the last time as this walks over, about
		t.queue = slices.DeleteFunc(t.queue, func(o *Set) bool { return !o.waits() })
	}
}

// Find returns the live set whose inbound SA matches the flow of a message that came in on a protected port, or nil.
// The backend has authenticated the tuple: the SA's selector binds it to the SA's keys. A label leads to the set without a
// look-up of the tuple; one that does not fit the tuple changes nothing here, and it is for the caller to compare it with
// that of the set.
func (t *Table) Find(f ims.Flow) *Set {
	if s := t.labelled(f); s != nil {
		return s
	}
	s := t.byTuple[t.tuple(f.Local, f.Remote)]
	if s == nil || !s.Phase.Live() {
		return nil
	}
	return s
}

// labelled returns the live set of a flow if its label names the context that has it. It does not where another worker has
// installed the set, which then has gone over to this one with a restart, nor where the context has another index since.
func (t *Table) labelled(f ims.Flow) *Set {
	if f.Label>>indexBits != uint32(t.worker) { //nolint:gosec // at most 256 workers
		return nil
	}
	u := t.at(f.Label & MaxUEs)
	if u == nil { // as is index zero, and so label zero
		return nil
	}
	for _, s := range u.Sets {
		if s.Label == f.Label && s.receives(f) && s.Phase.Live() && !s.Clear {
			return s
		}
	}
	return nil
}

// receives reports whether a flow is that of an inbound SA of the set.
func (s *Set) receives(f ims.Flow) bool {
	ours, theirs := f.Local.Port(), f.Remote.Port()
	return (ours == s.Ports.PS && theirs == s.Ports.UC || ours == s.Ports.PC && theirs == s.Ports.US) &&
		f.Remote.Addr() == s.Params.UE && f.Local.Addr() == s.Local
}

// label is what the SAs of a context are installed with: its name, but for the generation.
func (t *Table) label(u *UE) uint32 { return uint32(t.worker)<<indexBits | u.Index } //nolint:gosec // at most 256 workers

// Lookup returns the UE context with this index and generation, or nil when it is gone.
func (t *Table) Lookup(index uint32, gen uint16) *UE {
	if index == 0 || int(index) >= len(t.ues) || t.gens[index] != gen {
		return nil
	}
	return t.ues[index]
}

// UEOf returns the context of an IMPI's normal, protected registration at an address, or nil.
func (t *Table) UEOf(impi string, addr netip.Addr) *UE { return t.Context(Key{IMPI: impi, Addr: addr}) }

// Context returns the context of that name, or nil.
func (t *Table) Context(k Key) *UE {
	for u := t.byAddr[k.Addr]; u != nil; u = u.atAddr { // one, but for phones behind a NAT
		if u.IMPI == k.IMPI && u.Emergency == k.Emergency && u.Clear == k.Clear {
			return u
		}
	}
	return nil
}

// index makes a UE known by IMPI and address.
func (t *Table) index(u *UE) {
	u.ofIMPI, t.byIMPI[u.IMPI] = t.byIMPI[u.IMPI], u
	u.atAddr, t.byAddr[u.Addr] = t.byAddr[u.Addr], u
	t.count++
}

// unindex takes back what index did.
func (t *Table) unindex(u *UE) {
	unchain(t.byIMPI, u.IMPI, u, func(o *UE) **UE { return &o.ofIMPI })
	unchain(t.byAddr, u.Addr, u, func(o *UE) **UE { return &o.atAddr })
	t.count--
}

// unchain takes a UE out of the chain that begins at a key of a map.
func unchain[K comparable](m map[K]*UE, k K, u *UE, next func(*UE) **UE) {
	switch first, rest := m[k], *next(u); {
	case first != u:
		for o := first; o != nil; o = *next(o) {
			if *next(o) == u {
				*next(o) = rest
				break
			}
		}
	case rest != nil:
		m[k] = rest
	default:
		delete(m, k)
	}
	*next(u) = nil
}

// Elsewhere returns the contexts of an IMPI's normal, protected registrations at other addresses than this.
func (t *Table) Elsewhere(impi string, addr netip.Addr) []*UE {
	return slices.DeleteFunc(t.OfIMPI(impi), func(u *UE) bool {
		return u.Addr == addr || u.Emergency || u.Clear
	})
}

// Protected reports whether an IMPI has a confirmed SA set at any address of this worker.
func (t *Table) Protected(impi string) bool {
	for u := t.byIMPI[impi]; u != nil; u = u.ofIMPI {
		if !u.Clear && slices.ContainsFunc(u.Sets, func(s *Set) bool {
			return s.Phase == sa.Established || s.Phase == sa.Old
		}) {
			return true
		}
	}
	return false
}

// Set returns the live set of the UE with this serial, or nil.
func (u *UE) Set(serial uint8) *Set {
	for _, s := range u.Sets {
		if s.Serial == serial && s.Live() {
			return s
		}
	}
	return nil
}

// UEs returns the number of UE contexts; Sets the number of sets that are not dead; SPIsInUse the SPIs taken.
func (t *Table) UEs() int { return t.count }

// SPIsInUse returns the number of SPIs taken from the pool.
func (t *Table) SPIsInUse() int { return t.spis.InUse() }

// Offer is what the P-CSCF needs to begin an SA set.
type Offer struct {
	IMPI      string
	Emergency bool
	Local     netip.Addr // our Gm address which SM1 was sent to
	UE        netip.Addr // source address of SM1
	Over      *Set       // the set which SM1 came over; nil: in clear
	SPIC      ims.SPI
	SPIS      ims.SPI
	PortC     uint16
	PortS     uint16

	// What the operator's policy gives this UE instead of the values of Config; zero values: those.
	ServerPorts, ClientPorts []uint16
	AwaitAuth                time.Duration
}

func (o *Offer) key() Key { return Key{IMPI: o.IMPI, Addr: o.UE, Emergency: o.Emergency} }

// Check applies TS 33.203 §7.2 to an offer before it goes to the core: the pair of source address and protected client
// port must not belong to another IMPI, and the UE must not hold too many sets.
func (t *Table) Check(o *Offer) error {
	own := t.Context(o.key())
	for u := t.byAddr[o.UE]; u != nil; u = u.atAddr {
		if u.Clear || u == own {
			continue
		}
		twin := u.IMPI == o.IMPI // its emergency registration, or its normal one
		for _, s := range u.Sets {
			if spiClash(s, o) || !twin && portClash(s, o) {
				return ErrAddressConflict
			}
		}
	}
	if own != nil {
		kept := 0
		for _, s := range own.Sets {
			if s.Phase == sa.Established || s.Phase == sa.Old {
				kept++
				if spiClash(s, o) {
					// The UE's inbound SAs are keyed by its own address and SPI: the backend can hold only one.
					return ErrAddressConflict
				}
			}
		}
		if kept >= t.cfg.MaxSets {
			return ErrTooManySets
		}
	}
	return nil
}

func portClash(s *Set, o *Offer) bool {
	return s.Ports.UC == o.PortC || s.Ports.US == o.PortS || s.Ports.UC == o.PortS || s.Ports.US == o.PortC
}

func spiClash(s *Set, o *Offer) bool {
	return s.SPIs.UC == o.SPIC || s.SPIs.US == o.SPIS || s.SPIs.UC == o.SPIS || s.SPIs.US == o.SPIC
}

// Begin makes a temporary set for an offer that the core has challenged: it drops the temporary sets which this UE
// registration still has (TS 24.229 §5.2.2.2) but for those that outlive it, takes SPIs and ports, and has the backend install the four SAs. done is
// called on the loop once the backend has answered; with a nil error the set is Temporary and its reg-await-auth timer
// runs. Begin itself fails without side effects on conflicts and exhausted pools.
//
// keys are copied by the backend; the set keeps them for the store.
func (t *Table) Begin(o *Offer, keys ims.ESPKeys, done func(*Set, error)) (*Set, error) {
	u := t.Context(o.key())
	if u != nil {
		for _, s := range slices.Clone(u.Sets) {
			if (s.Phase == sa.Temporary || s.Phase == sa.Reserved) && !t.outlives(s, o) {
				t.remove(s)
			}
		}
		u = t.Context(o.key()) // the context goes with its last set
	}
	if err := t.Check(o); err != nil {
		return nil, err
	}
	ps, pc, err := t.pickPorts(u, o)
	if err != nil {
		return nil, err
	}
	spiC, err := t.spis.Take(o.SPIC, o.SPIS)
	if err != nil {
		return nil, err
	}
	spiS, err := t.spis.Take(o.SPIC, o.SPIS)
	if err != nil {
		t.spis.Free(spiC)
		return nil, err
	}
	if u == nil {
		if u = t.add(o.key(), o.Local); u == nil {
			t.spis.Free(spiC)
			t.spis.Free(spiS)
			return nil, ErrTooManySets
		}
	}
	await := o.AwaitAuth
	if await == 0 {
		await = t.cfg.AwaitAuth
	}
	t.nextID++
	s := &Set{
		UE: u, Phase: sa.Reserved, Agreement: &Agreement{await: await, began: t.now()}, initial: o.Over == nil, Serial: u.freeSerial(), Over: o.Over,
		Params: sa.Params{
			ID: uint64(t.worker)<<48 | t.nextID, Label: t.label(u),
			Local: o.Local, UE: o.UE,
			Ports: ims.Ports{UC: o.PortC, US: o.PortS, PC: pc, PS: ps},
			SPIs:  ims.SPIs{UC: o.SPIC, US: o.SPIS, PC: spiC, PS: spiS},
			Keys:  keys, Hard: await + hardMargin,
		},
	}
	t.makeRoom(s)
	u.Sets = append(u.Sets, s)
	t.byTuple[t.tupleA(s)], t.byTuple[t.tupleB(s)] = s, s
	t.obs.Sets(sa.Reserved, 1)
	t.account(s, false)
	t.installer.Install(s.Params, func(err error) {
		t.onLoop(func() { t.installed(s, err, done) })
	})
	return s, nil
}

// outlives reports whether a set that waits for its authentication stays beside the one of an offer: that of a
// re-authentication beside one that began in clear, since whoever sends in clear may not be the phone. The phone's answer to
// either ends the other. A phone that starts over with the same SPIs needs the place.
func (t *Table) outlives(s *Set, o *Offer) bool {
	sets := 2 // these two
	for _, k := range s.UE.Sets {
		if k.Phase == sa.Established || k.Phase == sa.Old {
			sets++
		}
	}
	return o.Over == nil && s.Over != nil && !s.removing && !spiClash(s, o) && sets <= t.cfg.MaxSets
}

// onLoop runs what the backend's answer leads to on the worker's loop. A loop that is gone has no state left to keep right.
func (t *Table) onLoop(f func()) { _ = t.post(f) }

func (t *Table) installed(s *Set, err error, done func(*Set, error)) {
	switch {
	case s.Phase == sa.Dead: // dropped meanwhile; remove left the backend's part to us
		done(s, ErrAborted)
	case err != nil:
		t.unlink(s, sa.Refused)
		t.freeSPIs(s)
		done(s, fmt.Errorf("install SA set: %w", err))
	default:
		t.happen(s, sa.Acknowledged)
		t.arm(s, s.Agreement.await)
		t.keepWithin(s.UE, temporaryKept)
		done(s, nil)
	}
}

// pickPorts chooses port-ps and port-pc. Server ports stay through re-registrations (TS 33.203 §7.1); a phone which
// starts over in clear while its old set lives gets another server port, so that both sets have distinct selectors.
// port-pc differs from those of every live set towards that address.
func (t *Table) pickPorts(u *UE, o *Offer) (ps, pc uint16, err error) {
	candidates, clients := o.ServerPorts, o.ClientPorts
	if len(candidates) == 0 {
		candidates = t.cfg.ServerPorts
	}
	if len(clients) == 0 {
		clients = t.cfg.ClientPorts
	}
	if o.Over != nil { // a phone that reuses its client port as well still gets a set, on another server port
		used := o.Over.Ports.PS
		others := slices.DeleteFunc(slices.Clone(candidates), func(p uint16) bool { return p == used })
		if t.cfg.NewServerPort {
			candidates = append(others, used)
		} else {
			candidates = append([]uint16{used}, others...)
		}
	}
	free := func(ue, local uint16) bool {
		_, taken := t.byTuple[t.tuple(netip.AddrPortFrom(o.Local, local), netip.AddrPortFrom(o.UE, ue))]
		return !taken
	}
	for _, p := range candidates {
		if free(o.PortC, p) && free(o.PortS, p) {
			ps = p
			break
		}
	}
	if ps == 0 {
		return 0, 0, ErrNoPort
	}
	turn := 0
	if u != nil {
		turn = int(u.portTurn)
	}
	for i := range clients {
		p := clients[(turn+i)%len(clients)]
		inUse := u != nil && slices.ContainsFunc(u.Sets, func(s *Set) bool { return s.Ports.PC == p })
		if !inUse && free(o.PortS, p) && free(o.PortC, p) {
			if u != nil {
				u.portTurn = uint16((turn + i + 1) % len(clients)) //nolint:gosec // there are no more ports
			}
			return ps, p, nil
		}
	}
	return 0, 0, ErrNoPort
}

func (t *Table) add(k Key, local netip.Addr) *UE {
	index, ok := t.place()
	if !ok {
		return nil
	}
	u := &UE{
		State: Pending, Index: index, Gen: t.gens[index], IMPI: k.IMPI, Addr: k.Addr, Local: local,
		Emergency: k.Emergency, Clear: k.Clear,
	}
	t.ues[index] = u
	t.index(u)
	t.obs.UEs(Pending, 1)
	return u
}

// place takes an index that no context has.
func (t *Table) place() (index uint32, ok bool) {
	switch n := len(t.free); {
	case n > 0:
		index, t.free = t.free[n-1], t.free[:n-1]
	case len(t.ues) <= MaxUEs:
		index = uint32(len(t.ues))
		t.reserve(index)
	default:
		return 0, false
	}
	return index, true
}

// freeSerial returns a serial that no set of the UE bears.
func (u *UE) freeSerial() uint8 {
	var next uint8 = 1
	if n := len(u.Sets); n > 0 {
		next = u.Sets[n-1].Serial + 1
	}
	for slices.ContainsFunc(u.Sets, func(s *Set) bool { return s.Serial == next }) {
		next++
	}
	return next
}

func (t *Table) tupleA(s *Set) tuple {
	return t.tuple(netip.AddrPortFrom(s.Local, s.Ports.PS), netip.AddrPortFrom(s.Params.UE, s.Ports.UC))
}

func (t *Table) tupleB(s *Set) tuple {
	return t.tuple(netip.AddrPortFrom(s.Local, s.Ports.PC), netip.AddrPortFrom(s.Params.UE, s.Ports.US))
}

// Confirm turns a temporary set into the established one after the 200 to SM7 (TS 24.229 §5.2.2.2). When SM1 had come
// over another set, that one becomes old and goes on carrying requests to the UE until the new one is used; every other
// set of the UE goes. When SM1 had come in clear the new set is used at once. life is the registration's expiry plus the
// margin; a longer life of the set before wins. The Agreement has served.
func (t *Table) Confirm(s *Set, life time.Duration) {
	u := s.UE
	t.register(u, Accepted)
	t.Changed(u)
	if s.Phase != sa.Temporary {
		t.Refresh(s, life)
		return
	}
	prev := s.Over
	if prev != nil && (prev.Phase != sa.Established && prev.Phase != sa.Old || prev.removing) {
		prev = nil
	}
	s.removing, s.Agreement = false, nil
	t.happen(s, sa.Confirmed) // first: what waits for an older set finds this one
	for _, o := range slices.Clone(u.Sets) {
		if o != s && o != prev {
			t.remove(o)
		}
	}
	if prev != nil {
		life = max(life, prev.Deadline.Sub(t.now()))
	}
	t.extend(s, life)
	if prev == nil {
		u.Current = s
		return
	}
	if prev.Phase == sa.Established {
		t.happen(prev, sa.Replaced)
	}
	u.Current = prev
	t.armOld(prev)
}

// armOld lets an old set which is still in use hand over to the new one when less than 64*T1 of its life is left.
func (t *Table) armOld(s *Set) {
	if left := s.Deadline.Sub(t.now()) - t.cfg.OldSet; left > 0 {
		t.wheel.Schedule(&s.timer, left, func() { t.handOver(s.UE) })
		return
	}
	t.handOver(s.UE)
}

// handOver takes the newest established set into use; older ones live for 64*T1 at most from now.
func (t *Table) handOver(u *UE) {
	t.Changed(u)
	for _, s := range slices.Backward(u.Sets) {
		if s.Phase == sa.Established {
			u.Current = s
			break
		}
	}
	for _, s := range u.Sets {
		if s.Phase == sa.Old && s != u.Current {
			t.arm(s, min(s.Deadline.Sub(t.now()), t.cfg.OldSet))
		}
	}
	if s := u.Current; s != nil && s.Phase == sa.Old { // nothing to hand over to: it lives its life out
		t.arm(s, s.Deadline.Sub(t.now()))
	}
}

// Touch notes that an authenticated message other than SM7 came in on the set: a newly established set is taken into
// use by it (TS 33.203 §7.4).
func (t *Table) Touch(s *Set) {
	if s.Used {
		return
	}
	s.Used = true
	t.Changed(s.UE)
	if s.Phase == sa.Established && s.UE.Current != s {
		t.handOver(s.UE)
	}
}

// Refresh moves the lifetime of an established set after a re-registration that was not challenged. It never shortens. One
// that came over an old set moves the life of the set in use, which carries the registration on, while the old set ends as it
// would have (TS 33.203 §7.4).
func (t *Table) Refresh(s *Set, life time.Duration) {
	t.register(s.UE, Accepted)
	t.Changed(s.UE)
	if s.Phase != sa.Established && s.Phase != sa.Old {
		return
	}
	switch c := s.UE.Current; {
	case c == nil: // the set that had replaced it has gone before it
		s.UE.Current = s
	case s.Phase == sa.Old:
		s = c
	}
	s.removing = false
	t.extend(s, max(life, s.Deadline.Sub(t.now())))
	if s.Phase == sa.Old {
		t.armOld(s)
	}
}

// Shorten lets the sets of a UE live no longer than this from now: the registrar has shortened the registration
// (TS 24.229 §5.2.3). It never prolongs, and leaves sets alone that wait for their authentication or were told to go.
func (t *Table) Shorten(u *UE, life time.Duration) {
	life = max(life, 0)
	for _, s := range slices.Clone(u.Sets) {
		if s.Phase != sa.Established && s.Phase != sa.Old || s.removing || s.Deadline.Sub(t.now()) <= life {
			continue
		}
		t.arm(s, life)
		s.Hard = life + hardMargin
		// A backend that refuses keeps the longer limit: no harm, since we end the set ourselves.
		t.installer.Extend(s.Params, s.Hard, func(error) {})
		if s.Phase == sa.Old && u.Current == s {
			t.armOld(s)
		}
	}
	t.Changed(u)
}

// extend sets the life of a set here and the backstop in the backend.
func (t *Table) extend(s *Set, life time.Duration) {
	t.arm(s, life)
	if !s.Clear {
		t.backstop(s, extendTries)
	}
}

// backstop moves the hard limit of a set in the backend beyond our own. A backend that is busy is asked again; one that
// goes on refusing would let the SAs die while we believe in them, so the set goes.
func (t *Table) backstop(s *Set, tries int) {
	s.Hard = s.Deadline.Sub(t.now()) + hardMargin
	s.due.Add(1)
	t.installer.Extend(s.Params, s.Hard, func(err error) {
		if err == nil {
			s.due.Add(-1)
			return
		}
		t.onLoop(func() {
			switch {
			case s.Phase == sa.Dead:
				s.due.Add(-1)
			case tries <= 1:
				s.due.Add(-1)
				t.remove(s)
			default:
				t.wheel.Schedule(new(wheel.Timer), extendRetry, func() {
					s.due.Add(-1)
					if s.Phase != sa.Dead {
						t.backstop(s, tries-1)
					}
				})
			}
		})
	})
}

func (t *Table) arm(s *Set, life time.Duration) {
	life = max(life, 0)
	s.Deadline = t.now().Add(life)
	t.wheel.Schedule(&s.timer, life, func() { t.expire(s) })
}

func (t *Table) expire(s *Set) {
	if s.Phase == sa.Temporary && !s.removing {
		t.obs.AwaitAuthExpired()
	}
	t.remove(s)
}

// Drop lets a set go after a grace, so that an answer which is on its way still gets out over it. The set gets no new
// requests meanwhile.
func (t *Table) Drop(s *Set, grace time.Duration) {
	if s.Phase == sa.Dead || s.removing {
		return
	}
	s.removing = true
	t.arm(s, grace)
	t.Changed(s.UE)
}

// Hold lets a temporary set live for at least d more, while the core decides about its REGISTER.
func (t *Table) Hold(s *Set, d time.Duration) {
	if s.Phase == sa.Temporary && !s.removing && s.Deadline.Sub(t.now()) < d {
		t.arm(s, d)
	}
}

// Deregister ends the registration: the sets stay for the grace so that answers and NOTIFY requests still reach the UE
// (TS 24.229 §5.2.5.1), then they go.
func (t *Table) Deregister(u *UE, grace time.Duration) { t.deregister(u, grace, sa.Reserved) }

// Dismiss is Deregister on the word of the core. It leaves a temporary set alone: a phone that was told to register again
// may have begun before we hear of it.
func (t *Table) Dismiss(u *UE, grace time.Duration) {
	t.deregister(u, grace, sa.Reserved, sa.Temporary)
}

func (t *Table) deregister(u *UE, grace time.Duration, spared ...sa.Phase) {
	t.register(u, Ended)
	u.Ended = t.now()
	t.Changed(u)
	for _, s := range u.Sets {
		if !slices.Contains(spared, s.Phase) {
			t.Drop(s, min(grace, max(0, s.Deadline.Sub(t.now()))))
		}
	}
}

// remove ends a set now.
func (t *Table) remove(s *Set) {
	if s.Phase == sa.Dead {
		return
	}
	phase, connected := s.Phase, s.ConnIn != 0 || s.ConnOut != 0
	t.unlink(s, sa.Removed)
	switch {
	case s.Clear: // the backend has nothing of it
	case phase != sa.Temporary && connected:
		// The resets of its connections still have to get out over it. Temporary sets do not wait, since the UE may
		// offer the same SPIs again at once.
		t.leaving[s.Params.UE] = append(t.leaving[s.Params.UE], s)
		t.wheel.Schedule(&s.timer, resetGrace, func() { t.left(s) })
	default:
		t.uninstall(s)
	}
}

// left takes the SAs of a set that was leaving out of the backend.
func (t *Table) left(s *Set) {
	t.wheel.Stop(&s.timer)
	if rest := slices.DeleteFunc(t.leaving[s.Params.UE], func(o *Set) bool { return o == s }); len(rest) > 0 {
		t.leaving[s.Params.UE] = rest
	} else {
		delete(t.leaving, s.Params.UE)
	}
	t.uninstall(s)
}

// makeRoom has those leaving sets leave at once whose SPIs or selectors a new set takes over: the backend can hold them
// only once. A UE that starts over soon after its last registration may well offer the same ports and SPIs again.
func (t *Table) makeRoom(s *Set) {
	for _, o := range slices.Clone(t.leaving[s.Params.UE]) {
		spis := o.SPIs.UC == s.SPIs.UC || o.SPIs.US == s.SPIs.US || o.SPIs.UC == s.SPIs.US || o.SPIs.US == s.SPIs.UC
		a, b := t.tupleA(o), t.tupleB(o)
		if spis || a == t.tupleA(s) || a == t.tupleB(s) || b == t.tupleA(s) || b == t.tupleB(s) {
			t.left(o)
		}
	}
}

// uninstall takes the SAs out of the backend; the SPIs come free only afterwards. A backend that refuses, for want of memory
// say, is asked again until the hard limit of the SAs, which ends them in any case.
func (t *Table) uninstall(s *Set) {
	t.installer.Remove(s.Params, func(err error) {
		t.onLoop(func() {
			if err != nil && t.now().Before(s.HardLimit()) {
				t.wheel.Schedule(&s.timer, removeRetry, func() { t.uninstall(s) })
				return
			}
			t.freeSPIs(s)
		})
	})
}

// freeSPIs gives the SPIs of a set back to the pools that they are of: two where the number of workers has changed since.
func (t *Table) freeSPIs(s *Set) {
	var others []ims.SPI
	for _, spi := range [...]ims.SPI{s.SPIs.PC, s.SPIs.PS} {
		if t.spis.Covers(spi) {
			t.spis.Free(spi)
		} else {
			others = append(others, spi)
		}
	}
	if len(others) > 0 && t.sendSPIs != nil {
		t.sendSPIs(others...)
	}
	s.Keys.Zero()
}

// unlink takes a set out of every index and the UE with its last set.
func (t *Table) unlink(s *Set, e sa.Event) {
	t.wheel.Stop(&s.timer)
	t.happen(s, e)
	for _, k := range []tuple{t.tupleA(s), t.tupleB(s)} {
		if t.byTuple[k] == s { // an association may have been taken over
			delete(t.byTuple, k)
		}
	}
	u := s.UE
	u.Sets = slices.DeleteFunc(u.Sets, func(o *Set) bool { return o == s })
	u.heard = max(u.heard, s.heard)
	for _, o := range u.Sets { // no dangling references to a dead set
		if o.Over == s {
			o.Over = nil
		}
	}
	if u.Current == s {
		u.Current = nil
		t.handOver(u)
	}
	t.forgetSet(s)
	t.obs.SetRemoved(s)
	if len(u.Sets) == 0 {
		t.forgetUE(u)
		t.unindex(u)
		t.ues[u.Index] = nil
		gap := uint16(1)
		if u.restored { // phones after this one may have had the index before a crash took their records
			gap = restartGap
		}
		t.gens[u.Index] += gap
		t.free = append(t.free, u.Index)
		t.obs.UEs(u.State, -1)
		t.obs.Gone(u)
	}
}

// register moves the registration state of a UE on.
func (t *Table) register(u *UE, e Event) {
	next, ok := u.State.On(e)
	if !ok {
		t.obs.Unexpected("registration", u.State, e)
		return
	}
	t.obs.UEs(u.State, -1)
	t.obs.UEs(next, 1)
	u.State = next
}

// happen moves the phase of a set on.
func (t *Table) happen(s *Set, e sa.Event) {
	next, ok := s.Phase.On(e)
	if !ok {
		t.obs.Unexpected("sa_set", s.Phase, e)
		return
	}
	if s.Clear {
		if next == sa.Dead {
			t.obs.Associations(-1)
		}
		s.Phase = next
		return
	}
	waited := s.waits()
	t.obs.Sets(s.Phase, -1)
	if next != sa.Dead {
		t.obs.Sets(next, 1)
	}
	s.Phase = next
	t.account(s, waited)
}

// Each calls f for every UE context, in the order of their index, until it returns false.
func (t *Table) Each(f func(*UE) bool) {
	for _, u := range t.ues {
		if u != nil && !f(u) {
			return
		}
	}
}
