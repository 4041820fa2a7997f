package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http/httptest"
	"net/netip"
	"os"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/gmgate/gmgate/bench/contention"
	"github.com/gmgate/gmgate/bench/lab"
	"github.com/gmgate/gmgate/control/config"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/proxy"
	"github.com/gmgate/gmgate/dataplane/front"
	"github.com/gmgate/gmgate/dataplane/hostnet"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// busy is a worker of the daemon that counts its messages and may share a lock with others.
type busy struct {
	handler
	lock    *sync.Mutex // nil: as the daemon is
	handled uint64      // the loop's own
	_       [120]byte   // a cache line of its own
}

// Message implements front.Handler.
func (b *busy) Message(f ims.Flow, msg []byte) {
	b.handled++
	if b.lock != nil {
		b.lock.Lock()
		runtime.Gosched()
		b.lock.Unlock()
	}
	b.handler.Message(f, msg)
}

// exchange is the daemon's front with two workers and the steering by eBPF, in a namespace, and phones of both workers that
// exchange messages with a core, each over UDP and TCP and in both directions. The ESP backend does nothing: what comes to a
// protected port is taken to have been verified.
type exchange struct {
	t       *testing.T
	texts   *population // its messages only
	front   *front.Front
	workers [2]*busy
	metrics *observe.Metrics
	core    *net.UDPConn
	phones  []*handset
}

// handset is one of the phones.
type handset struct {
	x      *exchange
	n      int // in the population; odd and even ones belong to different workers
	uc, us *net.UDPConn
	conn   net.Conn // from port-uc to port-ps

	// What the core was told; valid when registered is closed.
	registered chan struct{}
	path       string
	gate       netip.AddrPort // where from

	answers   [2]chan string // to its requests, over UDP and TCP
	delivered [2]chan string // the phone's answers, as the core got them
}

const (
	exchangeWindow = 3 // requests of each kind on their way: all of them together have room in the buffer of the core's socket
	exchangeRounds = 200
	exchangeLimit  = 30 * time.Second
)

// exchangeID is the Call-ID of a REGISTER, or of a request over UDP or TCP, with the number of the phone.
var exchangeID = regexp.MustCompile(`^(reg|u|t)([1-4])@`)

var (
	exchangeGm   = netip.MustParseAddr("10.64.255.5")
	exchangeMw   = netip.MustParseAddr("10.64.255.6")
	exchangeCore = netip.MustParseAddrPort("10.64.255.9:5060")
)

// newExchange builds everything as run does, and registers the phones.
func newExchange(t *testing.T, lock *sync.Mutex) *exchange {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ns, err := hostnet.Create()
	if err != nil {
		if os.Getenv("REQUIRE_KERNEL_TESTS") == "1" {
			t.Fatal(err)
		}
		t.Skipf("network namespaces need root: %v", err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	check(ns.AddLocal(netip.MustParsePrefix("10.64.0.0/16")))

	cfg, log := config.Example(), slog.New(slog.DiscardHandler)
	cfg.Workers = 2
	cfg.Gm.Addresses, cfg.Mw.Addresses = []netip.Addr{exchangeGm}, []netip.Addr{exchangeMw}
	cfg.Gm.ServerPorts = []uint16{6100}
	cfg.Mw.NextHops = []config.NextHop{{Host: exchangeCore.Addr().String(), Addr: exchangeCore, Transport: ims.UDP}}
	cfg.Mw.VisitedNetwork, cfg.Mw.HealthInterval, cfg.Mw.RegEvent.Enabled = benchDomain, 0, false
	x := &exchange{
		t: t, metrics: observe.New(cfg.Workers),
		texts: &population{tb: t, local: exchangeGm, core: ims.Flow{Remote: exchangeCore}},
	}
	back, esp := &backend{hidden: ns}, newAcker(t)
	rules, err := compileRules(cfg, back.suites)
	check(err)
	key, err := proxy.NewTokenKey()
	check(err)
	shared := proxyConfig(cfg, rules, back.suites(cfg.Security.Suites()), new(proxy.Fleet), key)
	handlers := make([]front.Handler, cfg.Workers)
	for i := range handlers {
		w, err := proxy.New(shared, i, esp, x.metrics, log)
		check(err)
		x.workers[i] = &busy{handler: handler{w}, lock: lock}
		handlers[i] = x.workers[i]
	}
	fc := frontConfig(cfg, back, log)
	for i := range fc.Listeners {
		fc.Listeners[i].Hidden = true
	}
	steering, err := openSteering(cfg, len(fc.Listeners), log)
	check(err)
	if steering == nil {
		if os.Getenv("REQUIRE_KERNEL_TESTS") == "1" {
			t.Fatal("no steering by eBPF")
		}
		t.Skip("no steering by eBPF here")
	}
	t.Cleanup(func() {
		if err := steering.Close(); err != nil {
			t.Error(err)
		}
	})
	fc.Steering = steering
	x.front, err = front.New(fc, handlers)
	check(err)
	t.Cleanup(x.close)

	check(ns.Do(func() (err error) {
		x.core, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(exchangeCore))
		return err
	}))
	t.Cleanup(func() { _ = x.core.Close() })
	for n := 1; n <= 4; n++ {
		h := &handset{x: x, n: n, registered: make(chan struct{})}
		for i := range h.answers {
			h.answers[i], h.delivered[i] = make(chan string, 2*exchangeWindow), make(chan string, 2*exchangeWindow)
		}
		x.phones = append(x.phones, h)
	}
	go x.serve()
	for _, h := range x.phones {
		check(ns.Do(h.open))
		h.register()
		check(ns.Do(h.connect))
	}
	x.run(1) // connections are open afterwards, in both directions
	return x
}

func (x *exchange) close() {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	if err := x.front.Close(ctx); err != nil {
		x.t.Error(err)
	}
}

// serve is the core: it registers everybody, and answers what phones ask.
func (x *exchange) serve() {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := x.core.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		b := buf[:n]
		var m sipmsg.Msg
		if err := m.Scan(b); err != nil {
			x.t.Errorf("core: %v: %s", err, b)
			continue
		}
		id := exchangeID.FindStringSubmatch(string(m.Get(sipmsg.CallID)))
		if id == nil {
			x.t.Errorf("core: unexpected: %s", b)
			continue
		}
		phone, _ := strconv.Atoi(id[2])
		h := x.phones[phone-1]
		var answer []byte
		switch {
		case strings.HasPrefix(string(b), "SIP/2.0 "):
			h.delivered[strings.Index("ut", id[1])] <- string(b)
			continue
		case m.Method() != sipmsg.MethodRegister:
			answer = x.texts.answer(b, "200 OK", "")
		case !strings.Contains(string(b), "algorithm=AKAv1-MD5"):
			answer = x.texts.answer(b, "401 Unauthorized", benchChallenge)
		default:
			if h.path == "" { // it may come twice
				h.path, h.gate = string(m.Get(sipmsg.Path)), from
				close(h.registered)
			}
			answer = x.texts.answer(b, "200 OK", x.texts.granted(phone))
		}
		if _, err := x.core.WriteToUDPAddrPort(answer, from); err != nil {
			return
		}
	}
}

// open opens the phone's sockets; what comes to port-us is taken from then on.
func (h *handset) open() (err error) {
	for port, c := range map[uint16]**net.UDPConn{benchUC: &h.uc, benchUS: &h.us} {
		if *c, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(benchAddr(h.n), port))); err != nil {
			return err
		}
		h.x.t.Cleanup(func() { _ = (*c).Close() })
	}
	l, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(benchAddr(h.n), benchUS)))
	if err != nil {
		return err
	}
	h.x.t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go h.stream(c)
		}
	}()
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, err := h.us.Read(buf)
			if err != nil {
				return
			}
			// TS 33.203 §7.1: over UDP the phone sends from port-uc to port-ps, answers as well.
			h.take(0, buf[:n], func(answer []byte) error { return h.send(6100, answer) })
		}
	}()
	return nil
}

// connect opens the phone's connection.
func (h *handset) connect() (err error) {
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(benchAddr(h.n), benchUC))}
	h.conn, err = d.Dial("tcp4", netip.AddrPortFrom(exchangeGm, 6100).String())
	if err == nil {
		go h.stream(h.conn)
	}
	return err
}

// send sends a datagram to a port of the gate, from port-uc.
func (h *handset) send(port uint16, b []byte) error {
	_, err := h.uc.WriteToUDPAddrPort(b, netip.AddrPortFrom(exchangeGm, port))
	return err
}

// stream takes what comes on a connection until the other side closes it.
func (h *handset) stream(c net.Conn) {
	defer c.Close() //nolint:errcheck // it is over anyway
	for r := bufio.NewReader(c); ; {
		var msg strings.Builder
		body := 0
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				return
			}
			msg.WriteString(line)
			if v, ok := strings.CutPrefix(line, "Content-Length: "); ok {
				body, _ = strconv.Atoi(strings.TrimSpace(v))
			}
			if line == "\r\n" {
				break
			}
		}
		if _, err := io.CopyN(&msg, r, int64(body)); err != nil {
			return
		}
		h.take(1, []byte(msg.String()), func(answer []byte) error {
			_, err := c.Write(answer)
			return err
		})
	}
}

// take answers a request, and keeps an answer.
func (h *handset) take(way int, b []byte, reply func([]byte) error) {
	if strings.HasPrefix(string(b), "SIP/2.0 ") {
		h.answers[way] <- string(b)
		return
	}
	if err := reply(h.x.texts.answer(b, "200 OK", "")); err != nil {
		h.x.t.Errorf("phone %d cannot answer: %v", h.n, err)
	}
}

// register registers the phone over UDP.
func (h *handset) register() {
	h.x.t.Helper()
	server := ""
	for _, step := range []struct {
		port   uint16
		status string
	}{{5060, "SIP/2.0 401 "}, {6100, "SIP/2.0 200 "}} {
		b := h.x.texts.register(h.n, server)
		var err error
		if step.port == 5060 { // the answer goes to the port in Via, which is port-us
			_, err = h.us.WriteToUDPAddrPort(b, netip.AddrPortFrom(exchangeGm, step.port))
		} else {
			err = h.send(step.port, b)
		}
		if err != nil {
			h.x.t.Fatal(err)
		}
		got := h.x.await(h.answers[0])
		var m sipmsg.Msg
		if err := m.Scan([]byte(got)); err != nil || !strings.HasPrefix(got, step.status) {
			h.x.t.Fatalf("phone %d, REGISTER to port %d: %v: %q", h.n, step.port, err, got)
		}
		server = string(m.Get(sipmsg.SecurityServer))
	}
	<-h.registered
}

// await returns what comes next; nothing if it takes too long.
func (x *exchange) await(c <-chan string) string {
	late := time.NewTimer(exchangeLimit)
	defer late.Stop()
	select {
	case s := <-c:
		return s
	case <-late.C:
		return ""
	}
}

// originating is a request of the phone; way is 0 for UDP and 1 for TCP.
func (h *handset) originating(way int) []byte {
	a, user := benchAddr(h.n).String(), fmt.Sprintf("00101%010d", h.n)
	return []byte("MESSAGE sip:+15550100002@" + benchDomain + " SIP/2.0\r\nVia: SIP/2.0/" + [2]string{"UDP", "TCP"}[way] + " " + a +
		":31001;branch=z9hG4bKo" + user + "\r\nMax-Forwards: 70\r\nRoute: <sip:" + exchangeGm.String() + ":6100;lr>, <sip:orig@" +
		exchangeCore.String() + ";lr>\r\nFrom: <sip:+" + user + "@" + benchDomain + ">;tag=o\r\nTo: <sip:+15550100002@" + benchDomain +
		">\r\nCall-ID: " + "ut"[way:way+1] + strconv.Itoa(h.n) + "@phone\r\nCSeq: 1 MESSAGE\r\nP-Preferred-Identity: <sip:+" + user + "@" + benchDomain +
		">\r\nRequire: sec-agree\r\nProxy-Require: sec-agree\r\nContent-Length: 4\r\n\r\nping")
}

// terminating is a request to the phone: one that has room in a datagram, or one that has not.
func (h *handset) terminating(way int) []byte {
	a, user := benchAddr(h.n).String(), fmt.Sprintf("00101%010d", h.n)
	body := strings.Repeat("x", [2]int{100, 2000}[way])
	return []byte("MESSAGE sip:" + user + "@" + a + ":31001 SIP/2.0\r\nVia: SIP/2.0/UDP " + exchangeCore.String() + ";branch=z9hG4bKt" + user +
		"\r\nMax-Forwards: 70\r\nRoute: " + h.path + "\r\nFrom: <sip:+15550100002@" + benchDomain + ">;tag=t\r\nTo: <sip:+" + user + "@" +
		benchDomain + ">\r\nCall-ID: " + "ut"[way:way+1] + strconv.Itoa(h.n) + "@core\r\nCSeq: 1 MESSAGE\r\nContent-Type: text/plain\r\nContent-Length: " +
		strconv.Itoa(len(body)) + "\r\n\r\n" + body)
}

// run has every phone send and get requests, over UDP and TCP at once, and returns how many requests and answers the gate
// has forwarded.
func (x *exchange) run(rounds int) uint64 {
	x.t.Helper()
	var wg sync.WaitGroup
	each := func(name string, answers <-chan string, send func() error) {
		wg.Go(func() {
			for range rounds {
				for range exchangeWindow {
					if err := send(); err != nil {
						x.t.Errorf("%s: %v", name, err)
						return
					}
				}
				for range exchangeWindow {
					if got := x.await(answers); !strings.HasPrefix(got, "SIP/2.0 200 ") {
						x.t.Errorf("%s: answer %q", name, got)
						return
					}
				}
			}
		})
	}
	for _, h := range x.phones {
		for way, transport := range []string{"UDP", "TCP"} {
			out, in := h.originating(way), h.terminating(way)
			each(fmt.Sprintf("phone %d over %s", h.n, transport), h.answers[way], func() error {
				if way == 0 {
					return h.send(6100, out)
				}
				_, err := h.conn.Write(out)
				return err
			})
			each(fmt.Sprintf("to phone %d over %s", h.n, transport), h.delivered[way], func() error {
				_, err := x.core.WriteToUDPAddrPort(in, h.gate)
				return err
			})
		}
	}
	wg.Wait()
	return uint64(rounds * exchangeWindow * len(x.phones) * 2 * 2 * 2) //nolint:gosec // small
}

// mishaps are all counters of drops and refusals that are not zero.
func (x *exchange) mishaps() map[string]float64 {
	x.t.Helper()
	reg := prometheus.NewRegistry()
	if err := x.metrics.Register(reg); err != nil {
		x.t.Fatal(err)
	}
	w := httptest.NewRecorder()
	observe.Handler(reg).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	m, err := lab.ParseMetrics(w.Body)
	if err != nil {
		x.t.Fatal(err)
	}
	found := make(map[string]float64)
	for k, v := range m {
		if v != 0 && (strings.HasPrefix(k, "gmgate_sip_drops_total") || strings.HasPrefix(k, "gmgate_sip_rejected_total")) {
			found[k] = v
		}
	}
	s := x.front.Stats()
	for _, d := range front.Drops() {
		if n := s.Dropped(d); n != 0 {
			found[d.String()] = float64(n)
		}
	}
	for name, n := range map[string]uint64{"handovers": s.Handovers, "strays": s.Strays, "panics": s.Panics} {
		if n != 0 {
			found[name] = float64(n)
		}
	}
	return found
}

// TestContention: two workers of the daemon whose phones send and get requests all the time, over UDP and TCP, wait neither for
// one another nor for anybody else, and no message takes a way round.
func TestContention(t *testing.T) {
	t.Run("none", func(t *testing.T) {
		x := newExchange(t, nil)
		var sent uint64
		locks, waits := contention.Watch(func() { sent = x.run(exchangeRounds) })
		for _, s := range locks {
			t.Errorf("a lock was waited for:\n%s", s)
		}
		for _, s := range waits {
			t.Errorf("a loop has waited:\n%s", s)
		}
		if found := x.mishaps(); len(found) > 0 {
			t.Errorf("not every message went straight through: %v", found)
		}
		s := x.front.Stats()
		for _, side := range []ims.Side{ims.GmProtected, ims.Mw} { // half of the messages come in on each
			if got := s.Side(side).MessagesIn; got < sent/2 {
				t.Errorf("%s: %d messages came in, want at least %d", side, got, sent/2)
			}
		}
		x.close()
		for i, w := range x.workers {
			if w.handled < sent/2 {
				t.Errorf("worker %d handled %d of %d messages", i, w.handled, sent)
			}
		}
	})
	// What is looked for would be found.
	t.Run("deliberate", func(t *testing.T) {
		x := newExchange(t, new(sync.Mutex))
		found := [2]bool{}
		for deadline := time.Now().Add(exchangeLimit); time.Now().Before(deadline) && found != [2]bool{true, true}; {
			locks, waits := contention.Watch(func() { x.run(10) })
			for i, stacks := range [][]string{locks, waits} {
				for _, s := range stacks {
					found[i] = true
					if !strings.Contains(s, "(*busy).Message") {
						t.Errorf("unexpected:\n%s", s)
					}
				}
			}
		}
		if found != [2]bool{true, true} {
			t.Errorf("found a lock: %v, a loop that waits: %v", found[0], found[1])
		}
	})
}
