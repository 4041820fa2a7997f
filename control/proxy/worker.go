package proxy

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/policy"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/control/store"
	"github.com/gmgate/gmgate/control/wheel"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// Config is what the workers of one process share. It is read-only once workers exist.
type Config struct {
	Workers int

	// Gm side.
	Gm            []netip.Addr  // our addresses towards the UEs
	GmPort        uint16        // unprotected port
	UDPLimit      int           // octets; larger requests to a UE go over TCP, RFC 3261 §18.1.1
	DropClear     bool          // drop clear requests other than REGISTER instead of answering 403
	Suites        []ims.Suite   // ordered, ours
	ServerList    bool          // Security-Server lists every suite, not the chosen one only
	StatusSuite   int           // no common algorithm
	StatusVerify  int           // Security-Verify or Security-Client differs
	StatusTaken   int           // address and port belong to another IMPI
	StatusNoSet   int           // no SA set with the UE that a request is for; zero: 480
	Policy        *policy.Rules // nil: IPsec is required of everybody, with Suites
	NoEmergency   bool          // refuse emergency registrations
	RefuseRoute   bool          // answer 400 to a Route that is not the Service-Route, instead of putting it right
	Registrar     registrar.Config
	SetsMax       int           // SA sets over all workers, beyond which nobody new is let in; zero: no limit
	PendingMax    int           // registrations not confirmed yet, over all workers
	PendingSource int           // of one source: an IPv4 address or an IPv6 /64
	LifetimeExtra time.Duration // SA lifetime beyond the registration's expiry, TS 24.229 §5.2.2.2

	// Mw side. Worker k listens on MwPort+k. MwPorts of these ports are ours: more than Workers where workers of earlier runs had
	// some that phones are still reached by; zero stands for Workers.
	Mw              []netip.Addr
	MwPort          uint16
	MwPorts         int
	MwTransport     ims.Transport
	NextHops        []ims.Hop
	Hosts           map[string]netip.Addr // static names, lower case
	Peers           []netip.Prefix        // further destinations that requests of UEs may be routed to
	PathHost        string                // host in Path and Record-Route; empty: the Mw address
	VisitedNetwork  string
	OrigIOI         string
	RegEvent        RegEvent
	ClearIntegrity  string // integrity-protected of a REGISTER in clear; empty: parameter absent
	QuoteIntegrity  bool
	RegisterTimeout time.Duration
	HealthInterval  time.Duration // zero: no OPTIONS to the next hops

	Store   *store.Writer // keeps registrations over a restart; nil: nothing is kept
	Fleet   *Fleet        // joins the workers of the process; nil for a single one
	Witness sa.Witness    // tells operators what came in before the ESP backend saw it; nil: nobody looks
	Moved   map[Name]Name // UE contexts that a change of the number of workers has given another name
	// Home has packets of an address go to a worker from now on, wherever they are read; Fleet.Move calls it on the loop of the
	// worker that has the address. It may be called again to undo that. Nil: addresses stay where they are.
	Home     func(addr netip.Addr, worker int) error
	TokenKey ims.Key
	SPIFirst ims.SPI
	SPILast  ims.SPI
}

// Egress is the event loop that a Worker runs on, seen from here: dataplane/front implements it. All methods but Post
// are called on the loop only. SendUDP and SendTCP copy what they are given.
type Egress interface {
	Index() int
	SendUDP(local, remote netip.AddrPort, msg []byte) error
	SendTCP(c ims.ConnID, msg []byte) error
	Dial(local, remote netip.AddrPort, side ims.Side, hidden bool, tag uint64)
	CloseConn(c ims.ConnID, reset bool)
	Post(f func()) error
	Answer(f func()) error
	Hand(to int, f ims.Flow, msg []byte) error
	Now() time.Time
}

// Implementation constants.
const (
	wheelTick = 10 * time.Millisecond
	// answerGrace is how long the set of a failed registration stays, so that the answer gets out over it and a
	// retransmission of the request still finds it.
	answerGrace = 4 * time.Second
	maxQueued   = 64 // messages waiting for one connection
	maxFwdPeers = 4096
)

// Worker handles every message of the UEs that one event loop owns. Use it on that loop only.
type Worker struct {
	cfg     *Config
	id      int
	log     *slog.Logger
	eg      Egress
	obs     *observe.Counters
	metrics *observe.Metrics
	seal    sealer
	sc      scratch

	rules *policy.Rules
	began time.Time // of Boot
	wheel *wheel.Wheel
	table *registrar.Table
	kept  *Kept // to be restored by Boot

	former   map[*registrar.UE][]store.Freed // names that contexts have had with other workers, or in runs before
	away     map[string][]departed           // contexts that have gone to other workers, by IMPI
	passages map[netip.Addr]*passage         // addresses that are other workers'
	coming   map[Name]struct{}               // of contexts that have places here and are not there yet

	inst sa.Installer
	spis *sa.SPIPool

	m    sipmsg.Msg
	e    sipmsg.Edit
	out  []byte
	text []byte // scratch for header values
	addr []byte // scratch for an address in text

	mwPort  uint16                  // our own Mw port
	ownName string                  // Config.PathHost as it stands in a URI
	ownIP   netip.Addr              // the same, if it is an address
	route   *registrar.ServiceRoute // the one learnt last

	txs               map[txKey]*regTx
	newest            map[registrar.Key]*regTx // newest REGISTER transaction of a UE
	waiting, answered *pendingQueue            // REGISTER transactions in clear
	protected         *pendingQueue            // and over SA sets
	conns             map[ims.ConnID]*registrar.Set
	inClear           map[uint64]*registrar.UE // contexts of registrations in clear, by the name in their Path
	asking            map[string]*asking       // identities that the other workers are asked about
	dials             map[uint64]*dial
	ueDial            map[*registrar.Set]*dial
	mwConn            map[netip.AddrPort]ims.ConnID // connections we opened or that are reused, by the peer's listening address
	mwPeer            map[ims.ConnID]netip.AddrPort
	mwDial            map[netip.AddrPort]*dial
	answer            map[netip.AddrPort]ims.ConnID // connection that requests of this sent-by came over last
	sentBy            map[ims.ConnID]netip.AddrPort // the other way round
	nextTag           uint64
	names             resolver
	health            []*nextHop
	subs              subscriptions
	repeats           repeats
	retry             retryMode // set while a message is handled again after a failed attempt
}

type retryMode uint8

const retryUDP retryMode = 1 // a connection to the UE failed: use UDP

// New makes a worker. Boot must be called before the first message.
func New(cfg *Config, id int, inst sa.Installer, m *observe.Metrics, log *slog.Logger) (*Worker, error) {
	lo, hi := sa.Split(cfg.SPIFirst, cfg.SPILast, id, cfg.Workers)
	spis, err := sa.NewSPIPool(lo, hi)
	if err != nil {
		return nil, fmt.Errorf("make SPI pool of worker %d: %w", id, err)
	}
	seal, err := newSealer(cfg.TokenKey)
	if err != nil {
		return nil, err
	}
	if len(cfg.NextHops) == 0 {
		return nil, errors.New("make worker: no next hop towards the core")
	}
	w := &Worker{
		cfg: cfg, id: id, log: log, obs: m.Worker(id), metrics: m, seal: seal, inst: inst, spis: spis,
		mwPort: cfg.MwPort + uint16(id), rules: cfg.Policy, inClear: make(map[uint64]*registrar.UE), asking: make(map[string]*asking),
		former: make(map[*registrar.UE][]store.Freed), away: make(map[string][]departed), passages: make(map[netip.Addr]*passage),
		coming: make(map[Name]struct{}),
		txs:    make(map[txKey]*regTx), newest: make(map[registrar.Key]*regTx), waiting: newPendingQueue(), answered: newPendingQueue(),
		protected: newPendingQueue(),
		conns:     make(map[ims.ConnID]*registrar.Set),
		dials:     make(map[uint64]*dial), ueDial: make(map[*registrar.Set]*dial),
		mwConn: make(map[netip.AddrPort]ims.ConnID), mwPeer: make(map[ims.ConnID]netip.AddrPort),
		mwDial: make(map[netip.AddrPort]*dial), answer: make(map[netip.AddrPort]ims.ConnID),
		sentBy:  make(map[ims.ConnID]netip.AddrPort),
		repeats: repeats{by: make(map[repeatKey]*repeat)},
		names:   newResolver(cfg.Hosts),
	}
	w.ownName = cfg.PathHost
	if w.ownIP, _ = netip.ParseAddr(cfg.PathHost); w.ownIP.Is6() { // a name leaves it invalid
		w.ownName = "[" + cfg.PathHost + "]" // RFC 3261 §25.1: IPv6reference
	}
	if w.rules == nil {
		w.rules = policy.Compile(policy.Settings{IPsec: policy.Require, Suites: cfg.Suites})
	}
	return w, nil
}

// Boot binds the worker to its event loop.
func (w *Worker) Boot(eg Egress) {
	w.eg, w.began = eg, eg.Now()
	w.wheel = wheel.New(wheelTick, eg.Now())
	w.table = registrar.New(w.cfg.Registrar, w.id, w.spis, w.wheel, eg.Now, w.inst, eg.Answer, setObserver{w})
	if w.cfg.Fleet != nil {
		w.table.SendSPIs(w.sendSPIs)
	}
	w.startSubscriptions()
	if w.cfg.Store != nil {
		w.table.Keep(journal{w})
	}
	w.restore()
	w.resubscribe()
	w.obs.SPIs(w.spis.InUse(), w.spis.Capacity())
	w.startHealth()
	if w.cfg.Fleet != nil {
		w.cfg.Fleet.join(w)
	}
}

// Tick advances the timers.
func (w *Worker) Tick(now time.Time) (rest time.Duration) {
	w.wheel.Advance(now)
	w.obs.SPIs(w.spis.InUse(), w.spis.Capacity())
	return w.wheel.Next()
}

// Table gives tests and the admin side the UE contexts; use it on the loop only.
func (w *Worker) Table() *registrar.Table { return w.table }

// Message handles one complete SIP message. b may be modified; it is not kept.
func (w *Worker) Message(f ims.Flow, b []byte) {
	if len(w.passages) > 0 && f.Side != ims.Mw && w.passes(f, b) {
		return
	}
	m := &w.m
	if err := m.Scan(b); err != nil {
		w.malformed(f, err)
		return
	}
	class := uint8(0)
	method := m.CSeqMethod()
	if !m.IsRequest() {
		class = uint8(m.Status() / 100)
	}
	w.obs.Message(observe.In, f.Side, f.Transport, method, class)
	switch f.Side {
	case ims.GmClear:
		w.fromClear(f)
	case ims.GmProtected:
		w.fromProtected(f)
	case ims.Mw:
		w.fromCore(f)
	}
}

// Bad is told of bytes that are no SIP message.
func (w *Worker) Bad(_ ims.Flow, _ []byte, _ string) { w.obs.Drop(observe.ReasonFraming) }

// Closed is told that a connection is gone. For a UE this is no de-registration: phones close connections when the
// radio goes idle.
func (w *Worker) Closed(c ims.ConnID, f ims.Flow) {
	if s := w.conns[c]; s != nil {
		delete(w.conns, c)
		switch {
		case s.Clear:
		case s.ConnIn == c:
			s.ConnIn = 0
		case s.ConnOut == c:
			s.ConnOut = 0
		}
	}
	if f.Side == ims.GmClear {
		w.table.Disconnected(f.Remote.Addr(), c)
	}
	if peer, ok := w.mwPeer[c]; ok {
		delete(w.mwPeer, c)
		if w.mwConn[peer] == c {
			delete(w.mwConn, peer)
		}
	}
	w.unremember(c)
}

// fromClear handles what arrives on the unprotected port: REGISTER, and nothing else (TS 33.203 §7.1) but from a phone that
// the policy has let register in clear, by the address association of that registration (TS 24.229 §5.2.2.3).
func (w *Worker) fromClear(f ims.Flow) {
	m := &w.m
	if m.IsRequest() && m.Method() == sipmsg.MethodRegister {
		w.register(f, nil)
		return
	}
	if s := w.table.Holder(f); s != nil {
		w.table.Hear(s)
		if m.IsRequest() {
			w.requestFromUE(f, s)
		} else {
			w.answerFromUE(f, s)
		}
		return
	}
	switch {
	case !m.IsRequest():
		w.obs.Drop(observe.ReasonUnprotectedResponse)
	case m.Method() == sipmsg.MethodAck || w.cfg.DropClear:
		w.obs.Drop(observe.ReasonUnprotectedRequest)
	default:
		w.refuse(f, nil, 403, "Forbidden", "request other than REGISTER without a security association",
			observe.ReasonUnprotectedRequest)
	}
}

// protectedSet returns the set that a flow on a protected port belongs to. The ESP backend has authenticated the addresses
// and ports, which name the SA and so the UE; where it has marked the packet as well, the mark must say the same. What has no
// set, or contradicts itself, is counted, its connection reset, and nil returned.
func (w *Worker) protectedSet(f ims.Flow) *registrar.Set {
	s := w.table.Find(f)
	switch {
	case s == nil:
		w.obs.Drop(observe.ReasonNoSA)
	case f.Label != 0 && f.Label != s.Label:
		w.obs.Drop(observe.ReasonLabelMismatch)
	default:
		w.table.Hear(s)
		return s
	}
	if f.Conn != 0 {
		w.eg.CloseConn(f.Conn, true)
	}
	return nil
}

// fromProtected handles what arrives on a protected port.
func (w *Worker) fromProtected(f ims.Flow) {
	s := w.protectedSet(f)
	if s == nil {
		return
	}
	if f.Conn != 0 {
		w.adopt(f, s)
	}
	m := &w.m
	register := m.IsRequest() && m.Method() == sipmsg.MethodRegister
	if s.Phase == sa.Temporary && !register {
		w.obs.Drop(observe.ReasonTemporaryNonRegister)
		return
	}
	switch {
	case register:
		w.register(f, s)
	case m.IsRequest():
		w.table.Touch(s)
		w.requestFromUE(f, s)
	default:
		w.table.Touch(s)
		w.answerFromUE(f, s)
	}
}

// adopt notes which set a connection belongs to. Its 4-tuple is that of one SA, so there is one connection per
// direction and set; a newer one replaces it.
func (w *Worker) adopt(f ims.Flow, s *registrar.Set) {
	slot := &s.ConnOut
	if f.Local.Port() == s.Ports.PS {
		slot = &s.ConnIn
	}
	if *slot == f.Conn {
		return
	}
	if *slot != 0 {
		delete(w.conns, *slot)
	}
	*slot = f.Conn
	w.conns[f.Conn] = s
}

// fromCore handles what arrives on the Mw port.
func (w *Worker) fromCore(f ims.Flow) {
	w.alive(f.Remote)
	if w.m.IsRequest() {
		w.requestFromCore(f)
		return
	}
	w.answerFromCore(f)
}

// channelOf says how a request of a UE came in. rport counts where the policy says so: in the set, the answer otherwise goes
// from port-pc to port-us.
func (w *Worker) channelOf(f ims.Flow, s *registrar.Set) channel {
	switch {
	case f.Conn == 0 && s.AnswersToSource && f.Local.Port() == s.Ports.PS:
		if v, err := sipmsg.ParseVia(w.m.Get(sipmsg.Via)); err == nil && v.HasRPort {
			return bySource
		}
		return byUDP
	case f.Conn == 0:
		return byUDP
	case f.Local.Port() == s.Ports.PS:
		return byConnIn
	}
	return byConnOut
}

// mwAddr returns our Mw address of the family of the peer.
func (w *Worker) mwAddr(peer netip.Addr) netip.AddrPort {
	for _, a := range w.cfg.Mw {
		if a.Is4() == peer.Is4() {
			return netip.AddrPortFrom(a, w.mwPort)
		}
	}
	return netip.AddrPortFrom(w.cfg.Mw[0], w.mwPort)
}

// setObserver passes what happens to SA sets on to the metrics.
type setObserver struct{ w *Worker }

func (o setObserver) Sets(p sa.Phase, delta int) {
	if o.w.cfg.Fleet != nil {
		o.w.cfg.Fleet.sets.Add(int64(delta))
	}
	switch p {
	case sa.Reserved:
		o.w.obs.Sets(observe.PhaseReserved, delta)
	case sa.Temporary:
		o.w.obs.Sets(observe.PhaseTemporary, delta)
	case sa.Established:
		o.w.obs.Sets(observe.PhaseEstablished, delta)
	case sa.Old:
		o.w.obs.Sets(observe.PhaseOld, delta)
	case sa.Dead:
	}
}

func (o setObserver) Associations(delta int) { o.w.obs.Associations(delta) }

func (o setObserver) UEs(s registrar.State, delta int) {
	switch s {
	case registrar.Pending:
		o.w.obs.UEs(delta, observe.UEPending)
	case registrar.Registered:
		o.w.obs.UEs(delta, observe.UERegistered)
	case registrar.Deregistered:
		o.w.obs.UEs(delta, observe.UEDeregistered)
	}
}

func (o setObserver) Unexpected(fsm string, state, event fmt.Stringer) {
	o.w.metrics.UnexpectedEvent(fsm, state.String(), event.String())
}

func (o setObserver) AwaitAuthExpired() { o.w.obs.AwaitAuthExpired() }

func (o setObserver) Gone(u *registrar.UE) {
	o.w.releaseNames(u.IMPI, o.w.former[u])
	delete(o.w.former, u)
	if u.Clear {
		o.w.forgetClear(u)
	}
	o.w.log.Debug("UE context ended", "impi", u.IMPI, "ue", u.Addr, "state", u.State.String())
	o.w.contextGone(u)
}

func (o setObserver) SetRemoved(s *registrar.Set) {
	if s.Clear { // its connection is the phone's own, nothing keeps it from closing in order
		if o.w.conns[s.ConnIn] == s {
			delete(o.w.conns, s.ConnIn)
		}
		return
	}
	for _, c := range []ims.ConnID{s.ConnIn, s.ConnOut} {
		if c != 0 {
			delete(o.w.conns, c)
			// Reset: the fixed ports would otherwise stay in TIME-WAIT, and a FIN could not leave without its SA.
			o.w.eg.CloseConn(c, true)
		}
	}
	s.ConnIn, s.ConnOut = 0, 0
	if d := o.w.ueDial[s]; d != nil {
		o.w.dialDone(d, 0, errNoSA)
	}
}
