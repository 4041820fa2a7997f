package front

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// patience is how long a test waits for what has to happen. It is not a measure of anything.
const patience = 20 * time.Second

func TestMain(m *testing.M) {
	// gnet's goroutine pool keeps its idle goroutines for 10 s, and its housekeeping for ever.
	goleak.VerifyTestMain(m, goleak.IgnoreCurrent(),
		goleak.IgnoreAnyFunction("github.com/panjf2000/ants/v2.(*goWorker).run.func1"),
		goleak.IgnoreAnyFunction("github.com/panjf2000/ants/v2.(*goWorkerWithFunc).run.func1"))
}

// skipKernel skips a test that lacks a capability, unless the environment forbids that.
func skipKernel(t *testing.T, err error) {
	t.Helper()
	if os.Getenv("REQUIRE_KERNEL_TESTS") == "1" {
		t.Fatalf("kernel test cannot run: %v", err)
	}
	t.Skipf("kernel test cannot run: %v", err)
}

// event is a call of a handler.
type event struct {
	kind   string // boot, message, bad, closed, dialed
	worker int
	flow   ims.Flow
	conn   ims.ConnID
	msg    string
	reason string
	tag    uint64
	err    error
}

// recorder is a handler that tells a test what it gets, and does what the test says.
type recorder struct {
	w       *Worker
	events  chan event
	onMsg   func(w *Worker, f ims.Flow, msg []byte)
	onDial  func(w *Worker, c ims.ConnID)
	onTick  func(w *Worker)
	onBad   func(w *Worker, f ims.Flow)
	onClose func(w *Worker, c ims.ConnID)
	onBoot  func(w *Worker)
	rest    time.Duration
}

func (r *recorder) put(e event) {
	e.worker = r.w.Index()
	select {
	case r.events <- e:
	default: // nobody looks at so many
	}
}

func (r *recorder) Boot(w *Worker) {
	r.w = w
	r.put(event{kind: "boot"})
	if r.onBoot != nil {
		r.onBoot(w)
	}
}

func (r *recorder) Message(f ims.Flow, msg []byte) {
	r.put(event{kind: "message", flow: f, conn: f.Conn, msg: string(msg)})
	if r.onMsg != nil {
		r.onMsg(r.w, f, msg)
	}
}

func (r *recorder) Bad(f ims.Flow, msg []byte, reason string) {
	r.put(event{kind: "bad", flow: f, conn: f.Conn, msg: string(msg), reason: reason})
	if r.onBad != nil {
		r.onBad(r.w, f)
	}
}

func (r *recorder) Closed(c ims.ConnID, f ims.Flow) {
	r.put(event{kind: "closed", flow: f, conn: c})
	if r.onClose != nil {
		r.onClose(r.w, c)
	}
}

func (r *recorder) Dialed(tag uint64, c ims.ConnID, f ims.Flow, err error) {
	r.put(event{kind: "dialed", flow: f, conn: c, tag: tag, err: err})
	if r.onDial != nil && err == nil {
		r.onDial(r.w, c)
	}
}

func (r *recorder) Tick(time.Time) time.Duration {
	if r.onTick != nil {
		r.onTick(r.w)
	}
	return r.rest
}

// expect waits for the next event and wants it to be of a kind. Boots are passed over.
func expect(t *testing.T, ch <-chan event, kind string) event {
	t.Helper()
	for {
		select {
		case e := <-ch:
			if e.kind == "boot" && kind != "boot" {
				continue
			}
			if e.kind != kind {
				t.Fatalf("got event %+v, want %s", e, kind)
			}
			return e
		case <-time.After(patience):
			t.Fatalf("no event %s", kind)
		}
	}
}

// eventually waits until a condition holds.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("not reached: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// run starts a front whose workers have copies of a handler, and closes it after the test.
func run(t testing.TB, cfg Config, proto recorder) (*Front, chan event) {
	t.Helper()
	if cfg.Workers == 0 {
		cfg.Workers = 1
	}
	if proto.events == nil {
		proto.events = make(chan event, 4096)
	}
	var handlers []Handler
	for range cfg.Workers {
		r := proto
		handlers = append(handlers, &r)
	}
	f, err := New(cfg, handlers)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeFront(t, f) })
	return f, proto.events
}

func closeFront(t testing.TB, f *Front) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := f.Close(ctx); err != nil {
		t.Error(err)
	}
	if err := f.Err(); err != nil {
		t.Error(err)
	}
}

var (
	loop4 = netip.MustParseAddrPort("127.0.0.1:0")
	loop6 = netip.MustParseAddrPort("[::1]:0")
)

func gm(addr netip.AddrPort) Listener {
	return Listener{Addr: addr, Side: ims.GmClear, UDP: true, TCP: true, Worker: -1}
}

// udpPeer opens a socket that is connected to a listener.
func udpPeer(t testing.TB, local string, to netip.AddrPort) *net.UDPConn {
	t.Helper()
	var la *net.UDPAddr
	if local != "" {
		la = net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(local), 0))
	}
	c, err := net.DialUDP("udp", la, net.UDPAddrFromAddrPort(to))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return c
}

func tcpPeer(t testing.TB, to netip.AddrPort) *net.TCPConn {
	t.Helper()
	c, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(to))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return c
}

func write(t testing.TB, w io.Writer, s string) {
	t.Helper()
	if _, err := io.WriteString(w, s); err != nil {
		t.Fatal(err)
	}
}

func addrOf(a net.Addr) netip.AddrPort {
	switch a := a.(type) {
	case *net.UDPAddr:
		return addrPortOf(a)
	case *net.TCPAddr:
		return addrPortOf(a)
	}
	return netip.AddrPort{}
}

// sip returns a request with a body of n octets.
func sip(id string, n int) string {
	return "MESSAGE sip:a@example.org SIP/2.0\r\nVia: SIP/2.0/TCP host;branch=z9hG4bK" + id +
		"\r\nFrom: <sip:b@example.org>;tag=1\r\nTo: <sip:a@example.org>\r\nCall-ID: " + id +
		"\r\nCSeq: 1 MESSAGE\r\nMax-Forwards: 70\r\nContent-Length: " + strconv.Itoa(n) + "\r\n\r\n" + strings.Repeat("x", n)
}

// readSIP reads one message whose body is given by Content-Length.
func readSIP(r *bufio.Reader) (string, error) {
	var b strings.Builder
	n := 0
	for {
		line, err := r.ReadString('\n')
		b.WriteString(line)
		if err != nil {
			return b.String(), err
		}
		if v, ok := strings.CutPrefix(line, "Content-Length: "); ok {
			if n, err = strconv.Atoi(strings.TrimSpace(v)); err != nil {
				return b.String(), err
			}
		}
		if line == "\r\n" {
			break
		}
	}
	body := make([]byte, n)
	_, err := io.ReadFull(r, body)
	return b.String() + string(body), err
}

// echo answers a message with itself on the same flow.
func echo(w *Worker, f ims.Flow, msg []byte) {
	if f.Transport == ims.TCP {
		_ = w.SendTCP(f.Conn, msg)
		return
	}
	_ = w.SendUDP(f.Local, f.Remote, msg)
}

// namespace makes a network namespace with addresses on lo.
func namespace(t *testing.T, prefixes ...string) *hostnet.NS {
	t.Helper()
	ns, err := hostnet.Create()
	if err != nil {
		skipKernel(t, err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	for _, p := range prefixes {
		if err := ns.AddAddr("lo", netip.MustParsePrefix(p)); err != nil {
			t.Fatal(err)
		}
	}
	// The kernel makes an IPv6 address usable some time later, from a work queue; until then packets find no route, and a
	// socket that is connected keeps that for good.
	for _, from := range prefixes {
		for _, to := range prefixes {
			a, b := netip.MustParsePrefix(from).Addr(), netip.MustParsePrefix(to).Addr()
			if a.Is6() && b.Is6() {
				eventually(t, "addresses are usable", func() bool { return ns.Do(func() error { return tryRoute(a, b) }) == nil })
			}
		}
	}
	return ns
}

// tryRoute sends a datagram from one address to another.
func tryRoute(from, to netip.Addr) error {
	dst, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, 0)))
	if err != nil {
		return err
	}
	defer dst.Close() //nolint:errcheck // test
	at, ok := dst.LocalAddr().(*net.UDPAddr)
	if !ok {
		return net.ErrClosed
	}
	src, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), at)
	if err != nil {
		return err
	}
	defer src.Close() //nolint:errcheck // test
	if _, err := src.Write([]byte("probe")); err != nil {
		return err
	}
	if err := dst.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
		return err
	}
	_, err = dst.Read(make([]byte, 10))
	return err
}

// logBuffer collects log lines.
type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *logBuffer) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func mustEqual[T comparable](t testing.TB, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %v, want %v", what, fmt.Sprint(got), fmt.Sprint(want))
	}
}
