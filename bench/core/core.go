// Package core is a small IMS core for tests and benchmarks: registrar, authentication centre, S-CSCF and the
// terminating side behind gmgate's Mw interface.
//
// It is the independent other end that checks gmgate: every message that arrives is recorded, and what TS 24.229 §5.2
// and RFC 3329 demand of a P-CSCF is checked on it (see Seen.Problems). It authenticates with IMS AKA (TS 33.203 §6.1,
// RFC 3310) including resynchronisation, answers with Service-Route and P-Associated-URI (TS 24.229 §5.4.1.2.2), and
// forwards every other request as a stateless loose-routing proxy (RFC 3261 §16.11) to the registered contact over its
// Path (RFC 3327). Subscriptions to the reg event are answered and notified (RFC 3680).
//
// One goroutine reads the UDP socket; each TCP connection has one reader and one writer. All state is behind one mutex
// that is never held while something blocks. Close ends every goroutine and socket.
package core

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/gmgate/gmgate/bench/internal/digestaka"
	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// Specification constants.
const (
	defaultT1  = 500 * time.Millisecond // RFC 3261 §17.1.1.1
	timerCount = 64                     // Timers B, F, H and J are 64*T1
	maxExpires = 600000                 // seconds, what an IMS UE asks for (TS 24.229 §5.1.1.2.1)
)

// Implementation constants.
const (
	defaultLogSize = 20000 // messages kept for Log
	connQueue      = 1024  // messages waiting for one TCP connection
	dialTimeout    = 5 * time.Second
	txSweep        = 1024 // server transactions between two sweeps
)

// KeyPlace says where ck and ik stand in a challenge.
type KeyPlace uint8

// Places of ck and ik.
const (
	KeysMiddle KeyPlace = iota // between algorithm and qop
	KeysFirst                  // in front of everything
	KeysLast                   // behind everything
	KeysSplit                  // ck first, ik last
)

// Behaviour bends the core for tests. The zero value is a correct core.
type Behaviour struct {
	Keys            KeyPlace
	UpperHex        bool          // ck and ik in upper-case hex
	UnquotedKeys    bool          // ck and ik as bare tokens
	ExtraChallenges bool          // more WWW-Authenticate rows, in front of and behind the AKA one
	NoIK, NoCK      bool          // leave the key out of the challenge
	NoQOP           bool          // challenge without qop
	QOP             string        // default "auth"
	Algorithm       string        // default AKAv1-MD5
	AnswerDelay     time.Duration // before every answer to a REGISTER
	Silent          bool          // never answer a REGISTER
	RejectAuth      int           // answer a REGISTER with a right response with this status instead of 200
	ExtraRounds     int           // challenge a right response again this many times
	AlwaysChallenge bool          // challenge re-registrations too, although integrity-protected=yes allows to skip it
	TCP             bool          // send every request by TCP
	NoNotify        bool          // no NOTIFY to subscribers of the reg event

	// What follows concerns the P-CSCF's subscriptions to the reg event only.
	RefuseSubscribe int  // answer SUBSCRIBE with this status
	NotifyFirst     bool // the first NOTIFY before the 200
	PartialNotify   bool // tell changes in partial documents
	LoseNotify      bool // tell of no change: documents are missing
	MalformedNotify bool // documents that cannot be read
}

// Config describes a core.
type Config struct {
	NS          *hostnet.NS    // where the sockets live; nil is the process's namespace
	Addr        netip.AddrPort // UDP and TCP
	Domain      string         // home network domain and realm
	Subscribers []Subscriber
	Expires     time.Duration // longest registration granted; default 600000 s
	Behaviour   Behaviour
	Hosts       map[string]netip.Addr // names in Path and Route, for example the P-CSCF's
	T1          time.Duration         // default 500 ms
	Rand        io.Reader             // source of RAND; default crypto/rand
	LogSize     int                   // messages kept for Log, default 20000
	Logger      *slog.Logger          // default: none
	// Watch, if not nil, is called with each message that arrives, before it is answered: for more of them than Log keeps.
	// Several goroutines call it, and it must not call the core.
	Watch func(Seen)
}

// Core is a running core. Its methods may be called from any goroutine.
type Core struct {
	cfg    Config
	log    *slog.Logger
	udp    *net.UDPConn
	tcp    *net.TCPListener
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu        sync.Mutex
	behaviour Behaviour
	byIMPI    map[string]*account
	byIMPU    map[string]*account // by URI key, temporary identities included
	seen      []*Seen
	served    map[string]*serverTx
	sinceSwep int
	clients   map[string]chan *sipwire.Message
	conns     map[uint64]*conn
	byRemote  map[netip.AddrPort]*conn
	nextConn  uint64
	closed    bool
}

// serverTx is an answer kept for retransmissions of the request (RFC 3261 §17.2.2).
type serverTx struct {
	answer []byte // nil until answered
	until  time.Time
}

// incoming is one message with where it came from.
type incoming struct {
	msg  *sipwire.Message
	tr   ims.Transport
	from netip.AddrPort
	conn *conn // nil for UDP
	seen *Seen
}

// conn is a TCP connection, perhaps still being opened.
type conn struct {
	id     uint64
	remote netip.AddrPort
	out    chan outgoing
	gone   chan struct{} // closed when the connection ended
}

type outgoing struct {
	b    []byte
	fail func()
}

// Start opens the sockets and runs the core until Close.
func Start(cfg Config) (*Core, error) {
	if cfg.Domain == "" {
		return nil, errors.New("start core: no domain")
	}
	if cfg.Expires == 0 {
		cfg.Expires = maxExpires * time.Second
	}
	if cfg.T1 == 0 {
		cfg.T1 = defaultT1
	}
	if cfg.LogSize == 0 {
		cfg.LogSize = defaultLogSize
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	c := &Core{
		cfg: cfg, log: cfg.Logger, behaviour: cfg.Behaviour,
		byIMPI: make(map[string]*account), byIMPU: make(map[string]*account), served: make(map[string]*serverTx),
		clients: make(map[string]chan *sipwire.Message), conns: make(map[uint64]*conn),
		byRemote: make(map[netip.AddrPort]*conn),
	}
	for _, s := range cfg.Subscribers {
		if err := c.addSubscriber(s); err != nil {
			return nil, err
		}
	}
	var err error
	if c.udp, err = sipwire.ListenUDP(cfg.NS, cfg.Addr); err != nil {
		return nil, fmt.Errorf("start core: %w", err)
	}
	c.cfg.Addr = sipwire.LocalAddrPort(c.udp.LocalAddr())
	if c.tcp, err = sipwire.ListenTCP(cfg.NS, c.cfg.Addr); err != nil {
		return nil, errors.Join(fmt.Errorf("start core: %w", err), c.udp.Close())
	}
	if err = sipwire.Deepen(c.udp, 4<<20); err != nil {
		return nil, errors.Join(fmt.Errorf("start core: %w", err), c.tcp.Close(), c.udp.Close())
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.wg.Add(2)
	go c.readUDP()
	go c.accept()
	return c, nil
}

func (c *Core) addSubscriber(s Subscriber) error {
	if s.IMPI == "" || len(s.IMPU) == 0 {
		return errors.New("add subscriber: IMPI and one IMPU are mandatory")
	}
	if c.byIMPI[s.IMPI] != nil {
		return fmt.Errorf("add subscriber %s: already there", s.IMPI)
	}
	a := &account{sub: s, card: digestaka.Card{K: s.K, OPc: s.OPc, AMF: s.AMF}, sqn: s.SQN}
	c.byIMPI[s.IMPI] = a
	for _, u := range append([]string{s.TemporaryIMPU()}, s.IMPU...) {
		if other := c.byIMPU[sipwire.Key(u)]; other != nil && other != a {
			return fmt.Errorf("add subscriber %s: %s belongs to %s", s.IMPI, u, other.sub.IMPI)
		}
		c.byIMPU[sipwire.Key(u)] = a
	}
	return nil
}

// Addr returns the address the core listens on.
func (c *Core) Addr() netip.AddrPort { return c.cfg.Addr }

// SetBehaviour changes the behaviour for what arrives from now on.
func (c *Core) SetBehaviour(b Behaviour) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.behaviour = b
}

// Behaviour returns the current behaviour.
func (c *Core) Behaviour() Behaviour {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.behaviour
}

// Close ends the core: when it returns, no goroutine and no socket is left.
func (c *Core) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	err := errors.Join(c.udp.Close(), c.tcp.Close())
	c.wg.Wait()
	if err != nil {
		return fmt.Errorf("close core: %w", err)
	}
	return nil
}

// spawn runs f in a goroutine that Close waits for; f must end when c.ctx does.
func (c *Core) spawn(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	c.wg.Go(func() {
		f()
	})
}

func (c *Core) readUDP() {
	defer c.wg.Done()
	for {
		b, from, err := sipwire.ReadUDP(c.udp)
		if err != nil {
			if c.ctx.Err() != nil || !sipwire.Temporary(err) {
				return
			}
			continue
		}
		c.receive(b, ims.UDP, from, nil)
	}
}

func (c *Core) accept() {
	defer c.wg.Done()
	for {
		t, err := c.tcp.AcceptTCP()
		if err != nil {
			return
		}
		k := c.addConn(sipwire.LocalAddrPort(t.RemoteAddr()))
		c.spawn(func() { c.run(k, t) })
	}
}

// addConn registers a connection.
func (c *Core) addConn(remote netip.AddrPort) *conn {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nextConn++
	k := &conn{id: c.nextConn, remote: remote, out: make(chan outgoing, connQueue), gone: make(chan struct{})}
	c.conns[k.id] = k
	return k
}

// run serves a connection until it ends or the core does. t is nil when it must be opened first.
func (c *Core) run(k *conn, t *net.TCPConn) {
	defer func() {
		c.mu.Lock()
		delete(c.conns, k.id)
		if c.byRemote[k.remote] == k {
			delete(c.byRemote, k.remote)
		}
		c.mu.Unlock()
		close(k.gone)
		for {
			select {
			case o := <-k.out:
				if o.fail != nil {
					o.fail()
				}
			default:
				return
			}
		}
	}()
	if t == nil {
		ctx, cancel := context.WithTimeout(c.ctx, dialTimeout)
		defer cancel()
		var err error
		if t, err = sipwire.DialTCP(ctx, c.cfg.NS, netip.AddrPortFrom(c.cfg.Addr.Addr(), 0), k.remote); err != nil {
			c.log.Warn("connect", "remote", k.remote, "cause", err)
			return
		}
	}
	stop := context.AfterFunc(c.ctx, func() { _ = t.Close() })
	defer stop()
	var writer sync.WaitGroup
	done := make(chan struct{})
	writer.Go(func() {
		for {
			select {
			case o := <-k.out:
				if _, err := t.Write(o.b); err != nil {
					if o.fail != nil {
						o.fail()
					}
					_ = t.Close()
					return
				}
			case <-done:
				return
			}
		}
	})
	r := bufio.NewReader(t)
	for {
		b, ping, pong, err := sipwire.ReadMessage(r)
		if err != nil {
			if errors.Is(err, sipwire.ErrMalformed) {
				c.record(&incoming{tr: ims.TCP, from: k.remote}, err.Error())
			}
			break
		}
		switch {
		case ping:
			c.push(k, outgoing{b: []byte("\r\n")})
		case pong:
		default:
			c.receive(b, ims.TCP, k.remote, k)
		}
	}
	_ = t.Close()
	close(done)
	writer.Wait()
}

func (c *Core) push(k *conn, o outgoing) {
	select {
	case <-k.gone:
	case k.out <- o:
		return
	default:
	}
	if o.fail != nil {
		o.fail()
	}
}

// sendTo sends a message to an address; fail is called when a connection could not be opened or written.
func (c *Core) sendTo(b []byte, tr ims.Transport, to netip.AddrPort, fail func()) {
	if tr == ims.UDP {
		if _, err := c.udp.WriteToUDPAddrPort(b, to); err != nil && fail != nil {
			fail()
		}
		return
	}
	c.mu.Lock()
	k := c.byRemote[to]
	c.mu.Unlock()
	if k == nil {
		k = c.addConn(to)
		c.mu.Lock()
		if other := c.byRemote[to]; other != nil { // lost a race: the new one is dropped unused
			delete(c.conns, k.id)
			k = other
			c.mu.Unlock()
		} else {
			c.byRemote[to] = k
			c.mu.Unlock()
			c.spawn(func() { c.run(k, nil) })
		}
	}
	c.push(k, outgoing{b: b, fail: fail})
}

// transport chooses the transport of a request (RFC 3261 §18.1.1).
func (c *Core) transport(b []byte, uri sipwire.URI) ims.Transport {
	if c.Behaviour().TCP || len(b) > sipwire.UDPLimit || equalFold(uri.Params.Get("transport"), "tcp") {
		return ims.TCP
	}
	return ims.UDP
}

// resolve returns the address a Route or Path URI names.
func (c *Core) resolve(uri string) (netip.AddrPort, sipwire.URI, error) {
	u, err := sipwire.ParseURI(uri)
	if err != nil {
		return netip.AddrPort{}, u, err
	}
	if a, ok := u.AddrPort(); ok {
		return a, u, nil
	}
	if a, ok := c.cfg.Hosts[u.Host]; ok {
		u.Host = a.String()
		p, _ := u.AddrPort()
		return p, u, nil
	}
	return netip.AddrPort{}, u, fmt.Errorf("resolve %s: unknown host", uri)
}

// receive takes every message that arrives.
func (c *Core) receive(b []byte, tr ims.Transport, from netip.AddrPort, k *conn) {
	if tr == ims.UDP && len(trimCRLF(b)) == 0 {
		return // keepalive
	}
	in := &incoming{tr: tr, from: from, conn: k}
	msg, err := sipwire.Parse(b)
	in.msg = msg
	if err != nil {
		c.record(in, err.Error())
		return
	}
	if !msg.IsRequest() {
		c.record(in, c.checkResponse(in)...)
		c.response(in)
		return
	}
	c.record(in, c.checkRequest(in)...)
	if err := msg.Mark(from); err != nil {
		c.problem(in.seen, err.Error())
		return
	}
	c.request(in)
}

func trimCRLF(b []byte) []byte {
	for len(b) > 0 && (b[0] == '\r' || b[0] == '\n') {
		b = b[1:]
	}
	return b
}
