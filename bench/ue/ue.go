package ue

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gmgate/gmgate/bench/internal/digestaka"
	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/control/ims"
)

// Identity is what the ISIM holds.
type Identity struct {
	IMPI   string
	IMPU   string // identity to register with; empty means the temporary one derived from the IMPI (TS 23.003 §13.4B)
	Domain string
	K, OPc [16]byte
	SQN    uint64 // highest sequence number accepted so far
}

// Config describes a phone.
type Config struct {
	Identity  Identity
	Addr      netip.Addr
	Transport ims.Transport // of SM1, SM7 and requests, default UDP; what exceeds 1300 octets goes by TCP anyway
	Offers    []ims.Suite   // default: all
	PortUC    uint16        // protected client port of the first set; zero chooses
	PortUS    uint16        // protected server port; zero chooses
	ClearPort uint16        // source port of SM1; zero is an ephemeral one
	Expires   time.Duration // registration asked for; default 600000 s
	Ring      time.Duration // how long an incoming call rings before it is answered
	Reliable  bool          // send reliable provisional answers whenever the caller supports them (RFC 3262)
	Quirks    Quirks
}

// Quirks are deviations seen on real phones, and a few of hostile ones.
type Quirks struct {
	RowPerOffer        bool          // one Security-Client row per offer
	ZeroPadSPI         bool          // SPIs with ten digits
	OmitProtMod        bool          // leave prot and mod to their defaults
	OmitNullEalg       bool          // leave ealg=null to its default
	Spaces             bool          // blanks around the separators of Security-Client
	ExtraOffer         string        // another mechanism behind the offers, for example a media plane one
	VerifyPerRow       bool          // Security-Verify with one row per mechanism and q with three decimals
	RportProtected     bool          // rport in protected requests, although the answer must come to port-us
	IntegrityProtected string        // integrity-protected parameter the phone itself puts into Authorization
	AuthInt            bool          // choose qop=auth-int when offered
	NoSecurityClient   bool          // REGISTER without Security-Client
	NoSecAgree         bool          // REGISTER without sec-agree in Require and Proxy-Require
	SM7Transport       ims.Transport // of SM7 and later requests, when it differs from SM1's
	LargeUDP           bool          // never switch to TCP because of the size
	NoTCPListener      bool          // nothing listens on TCP port-us
	ContactPort        uint16        // port in Contact instead of port-us
	ExtraHeaders       [][2]string   // more header rows in every initial request, for example forged identities
	// Transports says by method what goes by another transport than the rest inside an SA.
	Transports    map[string]ims.Transport
	AdjacentSPIs  bool    // spi-s is spi-c plus one
	RegisterStyle *Layout // how a REGISTER is written; default: the phone's own way
}

// Stats counts what a UE sent and received inside its SAs, INVITE and ACK left out: they have rules of their own for
// repetitions.
type Stats struct {
	Requests      int // without repetitions
	Retransmitted int
	Finals        int // final answers, each repetition counted
}

// Incoming is a request that arrived at a UE, or in Stray anything.
type Incoming struct {
	At            time.Time
	Method        string
	Status        int // zero for a request
	Transport     ims.Transport
	Local, Remote netip.AddrPort
	Set           int // Generation of the SA set it came by
	CallID        string
	Body          string
	msg           *sipwire.Message
}

// Header returns the first value of a header, "" if absent.
func (i Incoming) Header(name string) string {
	if i.msg == nil {
		return ""
	}
	return i.msg.Get(name)
}

// Headers returns the values of all rows of a header.
func (i Incoming) Headers(name string) []string {
	if i.msg == nil {
		return nil
	}
	return i.msg.All(name)
}

// ProtocolError says what is wrong with a message that a UE received.
type ProtocolError struct{ Problems []string }

// Error joins the problems.
func (e *ProtocolError) Error() string { return "protocol error: " + strings.Join(e.Problems, "; ") }

// StatusError is a final answer that ends an operation.
type StatusError struct {
	Status    int
	Reason    string
	Protected bool // it came inside an SA
	msg       *sipwire.Message
}

// Error names the status.
func (e *StatusError) Error() string { return fmt.Sprintf("answered %d %s", e.Status, e.Reason) }

// Headers returns the values of all rows of a header of the answer.
func (e *StatusError) Headers(name string) []string { return e.msg.All(name) }

// Errors of operations.
var (
	ErrNotRegistered = errors.New("not registered")
	ErrClosed        = errors.New("UE is closed")
	ErrTimeout       = errors.New("no answer in 64*T1")
)

// UE is one phone.
type UE struct {
	// Tweak, if set, sees every message before it is sent and returns what is sent instead; nil suppresses it. kind is
	// register, register-auth, reregister or deregister, the lower-case method of other requests, cancel, ack, or
	// response. Set it before the UE is used.
	Tweak func(kind string, msg []byte) []byte

	farm   *Farm
	cfg    Config
	log    *slog.Logger
	card   digestaka.Card
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	oper   chan struct{} // held by the registration operation that runs

	mu       sync.Mutex
	closed   bool
	sqn      uint64
	reg      *registration // nil when not registered
	former   string        // contact before the last registration from scratch: requests on their way may still name it
	server   *serverPort
	sets     []*saSet
	gen      int
	timers   map[*time.Timer]struct{}
	txs      map[string]*clientTx
	served   map[string]*serverTx
	starts   int
	dialogs  map[string]*dialog
	received []Incoming
	stray    []Incoming
	changed  chan struct{} // closed and replaced whenever something was received
	problems []string
	raw      map[string]*rawSocket
	stats    Stats
}

// registration is what a UE remembers while it is registered. It is replaced as a whole, never changed in place.
type registration struct {
	callID, tag   string
	cseq          uint32
	impu          string
	contact       string // URI
	serviceRoute  []string
	associated    []string
	expires       time.Duration
	set           *saSet
	authorization credentials
}

// serverPort is port-us, shared by all sets of a registration (TS 33.203 §7.4: it stays).
type serverPort struct {
	port uint16
	udp  *net.UDPConn
	tcp  *net.TCPListener // nil with NoTCPListener
}

func (p *serverPort) close() {
	_ = p.udp.Close()
	if p.tcp != nil {
		_ = p.tcp.Close()
	}
}

// inbound is one message that arrived by a protected port.
type inbound struct {
	msg           *sipwire.Message
	size          int
	tr            ims.Transport
	local, remote netip.AddrPort
	set           *saSet
	stream        *stream // nil for UDP
	problems      []string
}

// stream is a protected TCP connection.
type stream struct {
	conn *net.TCPConn
	set  *saSet
	mine bool // opened by the UE

	wmu  sync.Mutex
	gone chan struct{}
}

// write sends a message on the connection.
func (s *stream) write(b []byte) error {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	if err := s.conn.SetWriteDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	_, err := s.conn.Write(b)
	return err
}

func (s *stream) isGone() bool {
	select {
	case <-s.gone:
		return true
	default:
		return false
	}
}

// NewUE makes a phone. It opens no socket before Register.
func (f *Farm) NewUE(cfg Config) (*UE, error) {
	id := cfg.Identity
	if id.IMPI == "" || id.Domain == "" || !cfg.Addr.IsValid() {
		return nil, errors.New("new UE: IMPI, domain and address are mandatory")
	}
	if cfg.Addr.Is4() != f.cfg.PCSCF.Addr().Is4() {
		return nil, fmt.Errorf("new UE: address family of %s is not that of the P-CSCF %s", cfg.Addr, f.cfg.PCSCF)
	}
	if cfg.Transport == 0 {
		cfg.Transport = ims.UDP
	}
	if style := cfg.Quirks.RegisterStyle; style != nil {
		cfg.Offers = style.Offers()
	}
	if len(cfg.Offers) == 0 {
		cfg.Offers = ims.Suites()
	}
	if cfg.Expires == 0 {
		cfg.Expires = 600000 * time.Second // TS 24.229 §5.1.1.2.1
	}
	if cfg.Identity.IMPU == "" {
		cfg.Identity.IMPU = "sip:" + id.IMPI
	}
	u := &UE{
		farm: f, cfg: cfg, log: f.log.With("impi", id.IMPI), card: digestaka.Card{K: id.K, OPc: id.OPc}, sqn: id.SQN,
		oper: make(chan struct{}, 1), txs: make(map[string]*clientTx), served: make(map[string]*serverTx),
		dialogs: make(map[string]*dialog), changed: make(chan struct{}), raw: make(map[string]*rawSocket),
		timers: make(map[*time.Timer]struct{}),
	}
	u.ctx, u.cancel = context.WithCancel(context.Background())
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, ErrClosed
	}
	f.ues[u] = struct{}{}
	return u, nil
}

// Close ends the phone without telling the network. When it returns, no goroutine, socket or SA is left.
func (u *UE) Close() error {
	u.mu.Lock()
	if u.closed {
		u.mu.Unlock()
		return nil
	}
	u.closed = true
	u.mu.Unlock()
	u.cancel()
	u.dropAll()
	u.mu.Lock()
	for t := range u.timers {
		t.Stop()
	}
	for _, r := range u.raw {
		r.close()
	}
	u.mu.Unlock()
	u.wg.Wait()
	u.farm.mu.Lock()
	delete(u.farm.ues, u)
	u.farm.mu.Unlock()
	return nil
}

// spawn runs f in a goroutine that Close waits for. It reports false, and runs nothing, once the UE is closed.
func (u *UE) spawn(f func()) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return false
	}
	u.wg.Go(func() {
		f()
	})
	return true
}

// after runs f later unless the UE is closed before.
func (u *UE) after(d time.Duration, f func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return
	}
	var t *time.Timer
	t = time.AfterFunc(d, func() {
		u.mu.Lock()
		delete(u.timers, t)
		u.mu.Unlock()
		u.spawn(f)
	})
	u.timers[t] = struct{}{}
}

// dropAll closes every set and the server port at once, as a reboot would.
func (u *UE) dropAll() {
	u.mu.Lock()
	sets, server := u.sets, u.server
	if u.reg != nil {
		u.former = u.reg.contact
	}
	u.sets, u.server, u.reg = nil, nil, nil
	u.mu.Unlock()
	for _, s := range sets {
		s.close(u)
	}
	if server != nil {
		server.close()
	}
}

// Reboot forgets the registration without telling the network; the next Register starts over in clear.
func (u *UE) Reboot() { u.dropAll() }

// Calls returns the number of calls that are under way. A call lasts until this phone has the answer to its BYE, which may be
// after the other side thinks it over.
func (u *UE) Calls() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.dialogs)
}

// CloseConnections ends every protected TCP connection, as phones do when the radio goes idle. The SA sets stay.
func (u *UE) CloseConnections() {
	u.mu.Lock()
	var open []*stream
	for _, s := range u.sets {
		open = append(open, s.streams...)
	}
	u.mu.Unlock()
	for _, s := range open {
		_ = s.conn.Close()
		<-s.gone
	}
}

// Problems returns what was wrong with everything received so far, including what made operations fail.
func (u *UE) Problems() []string {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.Clone(u.problems)
}

func (u *UE) problem(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	u.mu.Lock()
	u.problems = append(u.problems, text)
	u.mu.Unlock()
	u.log.Warn("problem", "cause", text)
}

// Received returns the requests that arrived, oldest first. Retransmissions are not counted.
func (u *UE) Received() []Incoming {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.Clone(u.received)
}

// Stray returns what arrived on sockets of SendRaw.
func (u *UE) Stray() []Incoming {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.Clone(u.stray)
}

// Stats returns the counters.
func (u *UE) Stats() Stats {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.stats
}

// WaitReceived waits until n requests of a method have arrived and returns them.
func (u *UE) WaitReceived(ctx context.Context, method string, n int) ([]Incoming, error) {
	return u.wait(ctx, n, func(i Incoming) bool { return i.Method == method })
}

func (u *UE) wait(ctx context.Context, n int, match func(Incoming) bool) ([]Incoming, error) {
	for {
		u.mu.Lock()
		var out []Incoming
		for _, i := range u.received {
			if match(i) {
				out = append(out, i)
			}
		}
		changed := u.changed
		u.mu.Unlock()
		if len(out) >= n {
			return out, nil
		}
		select {
		case <-changed:
		case <-u.ctx.Done():
			return out, ErrClosed
		case <-ctx.Done():
			return out, fmt.Errorf("wait for a request: %w", context.Cause(ctx))
		}
	}
}

// Registered returns the default public identity and whether the UE is registered.
func (u *UE) Registered() (impu string, ok bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.reg == nil {
		return "", false
	}
	return u.reg.preferred(), true
}

// preferred is the default public identity: the first of P-Associated-URI (TS 24.229 §5.1.1.4).
func (r *registration) preferred() string {
	if len(r.associated) > 0 {
		return r.associated[0]
	}
	return r.impu
}

// listen opens port-us in the protected namespace, UDP and TCP.
func (u *UE) listen() (*serverPort, error) {
	var last error
	for range 16 {
		p := &serverPort{port: u.cfg.PortUS}
		var err error
		if p.udp, err = sipwire.ListenUDP(u.farm.layer.ns(), netip.AddrPortFrom(u.cfg.Addr, p.port)); err != nil {
			return nil, err
		}
		p.port = sipwire.LocalAddrPort(p.udp.LocalAddr()).Port()
		if !u.cfg.Quirks.NoTCPListener {
			if p.tcp, err = sipwire.ListenTCP(u.farm.layer.ns(), netip.AddrPortFrom(u.cfg.Addr, p.port)); err != nil {
				_ = p.udp.Close()
				last = err
				if u.cfg.PortUS != 0 {
					return nil, err
				}
				continue
			}
		}
		return p, nil
	}
	return nil, last
}

// serve reads port-us until it is closed.
func (u *UE) serve(p *serverPort) {
	local := netip.AddrPortFrom(u.cfg.Addr, p.port)
	u.spawn(func() {
		for {
			b, from, err := sipwire.ReadUDP(p.udp)
			if err != nil {
				if u.ctx.Err() != nil || !sipwire.Temporary(err) {
					return
				}
				continue
			}
			u.datagram(b, local, from)
		}
	})
	if p.tcp == nil {
		return
	}
	u.spawn(func() {
		for {
			c, err := p.tcp.AcceptTCP()
			if err != nil {
				return
			}
			remote := sipwire.LocalAddrPort(c.RemoteAddr())
			set := u.setByPC(remote)
			if set == nil {
				u.problem("TCP connection from %s to port-us belongs to no SA set", remote)
				_ = c.Close()
				continue
			}
			_ = c.SetLinger(0)
			u.adopt(set, c, false)
		}
	})
}

// datagram takes one UDP packet that arrived on port-us.
func (u *UE) datagram(b []byte, local, from netip.AddrPort) {
	set := u.setByPC(from)
	if set == nil {
		// TS 33.203 §7.1: by UDP everything comes from port-pc.
		u.problem("UDP from %s to port-us %d belongs to no SA set", from, local.Port())
		return
	}
	if strings.Trim(string(b), "\r\n") == "" {
		return // keepalive
	}
	msg, err := sipwire.Parse(b)
	if err != nil {
		u.problem("UDP from %s: %v", from, err)
		return
	}
	u.process(&inbound{msg: msg, size: len(b), tr: ims.UDP, local: local, remote: from, set: set})
}

// setByPC finds the set whose port-pc a packet came from.
func (u *UE) setByPC(from netip.AddrPort) *saSet {
	u.mu.Lock()
	defer u.mu.Unlock()
	if from.Addr() != u.farm.cfg.PCSCF.Addr() {
		return nil
	}
	for _, s := range slices.Backward(u.sets) {
		if s.ports.PC == from.Port() {
			return s
		}
	}
	return nil
}

// adopt starts reading a protected connection.
func (u *UE) adopt(set *saSet, c *net.TCPConn, mine bool) *stream {
	s := &stream{conn: c, set: set, mine: mine, gone: make(chan struct{})}
	u.mu.Lock()
	if set.dead {
		u.mu.Unlock()
		_ = c.Close()
		close(s.gone)
		return s
	}
	set.streams = append(set.streams, s)
	u.mu.Unlock()
	if !u.spawn(func() { u.readStream(s) }) {
		_ = c.Close()
		close(s.gone)
	}
	return s
}

func (u *UE) readStream(s *stream) {
	defer func() {
		_ = s.conn.Close()
		close(s.gone)
		u.mu.Lock()
		s.set.streams = slices.DeleteFunc(s.set.streams, func(o *stream) bool { return o == s })
		u.mu.Unlock()
	}()
	local, remote := sipwire.LocalAddrPort(s.conn.LocalAddr()), sipwire.LocalAddrPort(s.conn.RemoteAddr())
	r := bufio.NewReader(s.conn)
	for {
		b, ping, pong, err := sipwire.ReadMessage(r)
		switch {
		case errors.Is(err, sipwire.ErrMalformed):
			u.problem("TCP from %s: %v", remote, err)
			return
		case err != nil:
			return
		case ping:
			_ = s.write([]byte("\r\n"))
			continue
		case pong:
			u.note(&u.stray, Incoming{At: time.Now(), Method: "PONG", Transport: ims.TCP, Local: local, Remote: remote, Set: s.set.gen})
			continue
		}
		msg, err := sipwire.Parse(b)
		if err != nil {
			u.problem("TCP from %s: %v", remote, err)
			return
		}
		u.process(&inbound{msg: msg, size: len(b), tr: ims.TCP, local: local, remote: remote, set: s.set, stream: s})
	}
}

// note records something received and wakes waiters.
func (u *UE) note(list *[]Incoming, i Incoming) {
	u.mu.Lock()
	if len(*list) >= maxNoted {
		*list = slices.Clone((*list)[maxNoted/2:])
	}
	*list = append(*list, i)
	close(u.changed)
	u.changed = make(chan struct{})
	u.mu.Unlock()
}

// maxNoted bounds what Received and Stray keep.
const maxNoted = 8192

// process takes one message from the network.
func (u *UE) process(in *inbound) {
	if in.msg.IsRequest() {
		u.serveRequest(in)
		return
	}
	u.response(in)
}
