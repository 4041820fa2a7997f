package front

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
)

func TestConfig(t *testing.T) {
	l := gm(netip.MustParseAddrPort("127.0.0.1:5060"))
	with := func(f func(*Listener)) []Listener { m := l; f(&m); return []Listener{m} }
	for _, tt := range []struct {
		name string
		cfg  Config
		want string
	}{
		{"workers", Config{Workers: -1}, "workers -1"},
		{"message", Config{MaxMessage: 100}, "maximum message size 100"},
		{"message too large", Config{MaxMessage: 70000}, "maximum message size 70000"},
		{"outbound", Config{MaxOutbound: 100}, "maximum outbound"},
		{"buffered", Config{MaxBuffered: 100000}, "maximum buffered"},
		{"outbound in total", Config{MaxOutboundTotal: 100}, "maximum outbound in total"},
		{"per source", Config{MaxPerSource: -1}, "maximum connections per source"},
		{"clear idle", Config{ClearIdleTimeout: -1}, "idle timeout of the unprotected side"},
		{"negative", Config{MaxQueue: -1}, "maximum queue"},
		{"segment", Config{TCPMaxSeg: -1}, "segment"},
		{"tick", Config{Tick: -1}, "tick"},
		{"wildcard", Config{Listeners: with(func(l *Listener) { l.Addr = netip.MustParseAddrPort("0.0.0.0:1") })}, "explicit"},
		{"no address", Config{Listeners: with(func(l *Listener) { l.Addr = netip.AddrPort{} })}, "explicit"},
		{"multicast", Config{Listeners: with(func(l *Listener) { l.Addr = netip.MustParseAddrPort("224.0.1.75:5060") })}, "unicast"},
		{"zone", Config{Listeners: with(func(l *Listener) { l.Addr = netip.MustParseAddrPort("[fe80::1%lo]:5060") })}, "zone"},
		{"mapped", Config{Listeners: with(func(l *Listener) { l.Addr = netip.MustParseAddrPort("[::ffff:1.2.3.4]:5060") })}, "mapped"},
		{"transport", Config{Listeners: with(func(l *Listener) { l.UDP, l.TCP = false, false })}, "neither"},
		{"side", Config{Listeners: with(func(l *Listener) { l.Side = 0 })}, "no side"},
		{"worker", Config{Listeners: with(func(l *Listener) { l.Worker = 1 })}, "no worker 1"},
		{"twice", Config{Listeners: []Listener{l, l}}, "used twice"},
		{"two namespaces", Config{Listeners: []Listener{
			{Addr: l.Addr, Side: ims.Mw, UDP: true, Worker: -1}, {Addr: l.Addr, Side: ims.Mw, TCP: true, Worker: -1, Hidden: true},
		}}, "used twice"},
		{"handlers", Config{Workers: 2}, "1 handlers for 2 workers"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := New(tt.cfg, []Handler{&recorder{}}); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

// TestAddressInUse: SO_REUSEPORT must not make two fronts share an address silently. Nothing may be left behind.
//
// Peers: B1.04
func TestAddressInUse(t *testing.T) {
	for _, l := range []Listener{
		{Addr: loop4, Side: ims.Mw, UDP: true, Worker: -1},
		{Addr: loop4, Side: ims.Mw, TCP: true, Worker: -1},
		{Addr: loop6, Side: ims.Mw, UDP: true, TCP: true, Worker: -1},
	} {
		f, _ := run(t, Config{Listeners: []Listener{l}}, recorder{})
		before := descriptors(t)
		second := Config{Workers: 2, Listeners: []Listener{gm(loop4), f.Listeners()[0]}}
		if _, err := New(second, []Handler{&recorder{}, &recorder{}}); !errors.Is(err, unix.EADDRINUSE) {
			t.Errorf("%+v: got %v", l, err)
		}
		mustEqual(t, "descriptors", descriptors(t), before)
	}
	if _, err := New(Config{Listeners: []Listener{gm(netip.MustParseAddrPort("192.0.2.1:5060"))}}, []Handler{&recorder{}}); !errors.Is(err, unix.EADDRNOTAVAIL) {
		t.Errorf("got %v", err)
	}
	f, _ := run(t, Config{FreeBind: true, Listeners: []Listener{
		gm(netip.MustParseAddrPort("192.0.2.1:5060")), gm(netip.MustParseAddrPort("[2001:db8::77]:5060")),
	}}, recorder{})
	mustEqual(t, "listeners", len(f.Listeners()), 2)
}

// TestMwSources: on the Mw side nobody is heard but the core, on the others everybody.
func TestMwSources(t *testing.T) {
	f, events := run(t, Config{
		Listeners: []Listener{{Addr: loop4, Side: ims.Mw, UDP: true, TCP: true, Worker: 0}, gm(loop4)},
		MwSources: []netip.Prefix{netip.MustParsePrefix("127.0.1.0/24"), netip.MustParsePrefix("2001:db8::/32")},
	}, recorder{})
	mw, clear := f.Listeners()[0].Addr, f.Listeners()[1].Addr
	write(t, udpPeer(t, "127.0.2.1", mw), sip("stranger", 0))
	if c, err := net.DialTimeout("tcp", mw.String(), patience); err == nil { // it may be reset before we know of it
		defer c.Close() //nolint:errcheck // nothing to lose
		_ = c.SetDeadline(time.Now().Add(patience))
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the connection of a stranger is open: %v", err)
		}
	}
	write(t, udpPeer(t, "127.0.1.7", mw), sip("core", 0))
	if e := expect(t, events, "message"); e.flow.Remote.Addr().String() != "127.0.1.7" || e.flow.Side != ims.Mw {
		t.Errorf("%+v", e.flow)
	}
	write(t, udpPeer(t, "127.0.2.1", clear), sip("phone", 0))
	if e := expect(t, events, "message"); e.flow.Side != ims.GmClear {
		t.Errorf("%+v", e.flow)
	}
	eventually(t, "both are counted", func() bool { s := f.Stats(); return s.Dropped(DropSource) == 2 })
}

// TestMwInterface: the sockets of the Mw side are bound to an interface, and no others.
func TestMwInterface(t *testing.T) {
	cfg := Config{Listeners: []Listener{{Addr: loop4, Side: ims.Mw, UDP: true, TCP: true, Worker: 0}, gm(loop4)}}
	cfg.MwInterface = "no-such-link0"
	if _, err := New(cfg, []Handler{&recorder{}}); err == nil || !strings.Contains(err.Error(), cfg.MwInterface) {
		t.Errorf("got %v", err)
	}
	cfg.MwInterface = "lo"
	lo, err := net.InterfaceByName(cfg.MwInterface)
	if err != nil {
		t.Fatal(err)
	}
	f, events := run(t, cfg, recorder{})
	bound := func(c syscall.Conn) (index int) {
		raw, err := c.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(raw.Control(func(fd uintptr) {
			index, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX)
		}), err); err != nil {
			t.Fatal(err)
		}
		return index
	}
	for _, l := range f.tcp {
		want := 0
		if l.Side == ims.Mw {
			want = lo.Index
		}
		if got := bound(l.ln); got != want {
			t.Errorf("listener of side %v is bound to %d, want %d", l.Side, got, want)
		}
	}
	for _, s := range f.Worker(0).sockets {
		got, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX)
		if want := map[bool]int{true: lo.Index}[s.side == ims.Mw]; err != nil || got != want {
			t.Errorf("UDP socket of side %v is bound to %d, %v, want %d", s.side, got, err, want)
		}
	}
	write(t, udpPeer(t, "", f.Listeners()[0].Addr), sip("core", 0))
	expect(t, events, "message")
	ln := listen(t, "127.0.0.1:0")
	w := f.Worker(0)
	if err := w.Post(func() {
		w.Dial(netip.AddrPortFrom(loop4.Addr(), 0), addrOf(ln.Addr()), ims.Mw, false, 1)
	}); err != nil {
		t.Fatal(err)
	}
	if e := expect(t, events, "dialed"); e.err != nil {
		t.Error(e.err)
	}
}

// A listener that may be missing does not keep the front from starting where its UDP or TCP port is somebody else's, and leaves
// nothing behind; the others work.
func TestOptionalListener(t *testing.T) {
	for _, other := range []Listener{
		{Addr: loop4, Side: ims.Mw, UDP: true, Worker: -1},
		{Addr: loop4, Side: ims.Mw, TCP: true, Worker: -1},
	} {
		first, _ := run(t, Config{Listeners: []Listener{other}}, recorder{})
		taken := first.Listeners()[0].Addr
		f, events := run(t, Config{Workers: 2, Listeners: []Listener{
			{Addr: taken, Side: ims.Mw, UDP: true, TCP: true, Worker: 1, Optional: true}, gm(loop4),
		}}, recorder{})
		for _, s := range f.Worker(0).sockets {
			if s.addr == taken {
				t.Error("a socket at the address of another front")
			}
		}
		write(t, udpPeer(t, "", f.Listeners()[1].Addr), sip("1", 0))
		expect(t, events, "message")
	}
	if _, err := New(Config{Listeners: []Listener{
		{Addr: netip.MustParseAddrPort("192.0.2.1:5060"), Side: ims.Mw, UDP: true, Optional: true},
	}}, []Handler{&recorder{}}); !errors.Is(err, unix.EADDRNOTAVAIL) {
		t.Errorf("another error: %v", err)
	}
}

// descriptors counts the process's sockets.
func descriptors(t *testing.T) int {
	t.Helper()
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range dir {
		if l, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.HasPrefix(l, "socket:") {
			n++
		}
	}
	return n
}

// TestHidden has listeners in a namespace that the process is not in, beside one that it is in.
func TestHidden(t *testing.T) {
	ns := namespace(t, "10.99.0.1/32", "10.99.0.2/32", "2001:db8::1/128", "2001:db8::2/128")
	cfg := Config{Workers: 2, Hidden: ns, Listeners: []Listener{gm(loop4)}}
	for _, a := range []string{"10.99.0.1:6100", "10.99.0.1:6101", "[2001:db8::1]:6100"} {
		cfg.Listeners = append(cfg.Listeners, Listener{
			Addr: netip.MustParseAddrPort(a), Side: ims.GmProtected, UDP: true, TCP: true, Hidden: true, Worker: -1,
		})
	}
	f, events := run(t, cfg, recorder{onMsg: echo})
	check := func(c net.Conn, l Listener, tr ims.Transport) {
		t.Helper()
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		msg := sip("1", 10)
		write(t, c, msg)
		e := expect(t, events, "message")
		mustEqual(t, "flow", e.flow, ims.Flow{Local: l.Addr, Remote: addrOf(c.LocalAddr()), Conn: e.conn, Transport: tr, Side: l.Side})
		mustEqual(t, "worker", e.worker, Owner(e.flow.Remote.Addr(), 2))
		if tr == ims.UDP {
			buf := make([]byte, 2048)
			if n, err := c.Read(buf); err != nil || string(buf[:n]) != msg {
				t.Errorf("answer %q, %v", buf[:n], err)
			}
		} else if got, err := readSIP(bufio.NewReader(c)); err != nil || got != msg {
			t.Errorf("answer %q, %v", got, err)
		}
	}
	for i, l := range f.Listeners() {
		for _, network := range []string{"udp", "tcp"} {
			tr := ims.UDP
			if network == "tcp" {
				tr = ims.TCP
			}
			dial := func() (err error) {
				c, err := net.Dial(network, l.Addr.String())
				if err != nil {
					return err
				}
				defer c.Close() //nolint:errcheck // test
				check(c, l, tr)
				if tr == ims.TCP {
					_ = c.Close()
					expect(t, events, "closed")
				}
				return nil
			}
			if i == 0 {
				if err := dial(); err != nil {
					t.Error(err)
				}
				continue
			}
			if err := ns.Do(dial); err != nil {
				t.Error(err)
			}
		}
	}
	// Nothing of it is reachable, nor bound, outside. (The address does not exist there, so ask for the port on loopback.)
	for _, network := range []string{"udp4", "tcp4"} {
		if network == "udp4" {
			c, err := net.ListenPacket(network, "127.0.0.1:6100")
			if err != nil {
				t.Error(err)
			} else {
				_ = c.Close()
			}
		}
	}
	// And dial there, from a port that is listened on.
	var ln net.Listener
	if err := ns.Do(func() (err error) { ln, err = net.Listen("tcp", "10.99.0.2:0"); return err }); err != nil {
		t.Fatal(err)
	}
	defer ln.Close() //nolint:errcheck // test
	from := cfg.Listeners[1].Addr
	w := f.Worker(1)
	if err := w.Post(func() { w.Dial(from, addrOf(ln.Addr()), ims.GmProtected, true, 5) }); err != nil {
		t.Fatal(err)
	}
	e := expect(t, events, "dialed")
	if e.err != nil || e.flow.Local != from || e.worker != 1 {
		t.Fatalf("dial: %+v", e)
	}
	mustEqual(t, "peer sees", addrOf(acceptOne(t, ln).RemoteAddr()), from)
	if err := w.Post(func() { w.Dial(netip.MustParseAddrPort("127.0.0.1:0"), addrOf(ln.Addr()), ims.GmProtected, false, 6) }); err != nil {
		t.Fatal(err)
	}
	if e := expect(t, events, "dialed"); e.err == nil {
		t.Error("the hidden address was reached from outside")
	}
}

// TestPlaceholders checks that every socket is where it belongs, with its options, and no placeholder is left.
//
// Peers: A1.01, B1.04
func TestPlaceholders(t *testing.T) {
	ns := namespace(t, "10.99.0.1/32", "2001:db8::1/128")
	cfg := Config{Workers: 3, Hidden: ns}
	for i := range 8 {
		a := netip.AddrPortFrom(netip.MustParseAddr("10.99.0.1"), uint16(6100+i))
		if i >= 4 {
			a = netip.AddrPortFrom(netip.MustParseAddr("2001:db8::1"), uint16(6100+i))
		}
		cfg.Listeners = append(cfg.Listeners, Listener{Addr: a, Side: ims.GmProtected, UDP: true, Hidden: true, Worker: -1})
	}
	before := descriptors(t)
	f, _ := run(t, cfg, recorder{})
	mustEqual(t, "sockets", descriptors(t)-before, 3*8+3*2)
	for _, w := range f.workers {
		ask(t, w, func(w *Worker) error {
			if len(w.byFD) != 8 {
				return fmt.Errorf("%d sockets", len(w.byFD))
			}
			for fd, s := range w.byFD {
				at, err := localAddr(fd)
				if err != nil || at != s.addr || fd != s.fd {
					return fmt.Errorf("descriptor %d is %s, want %s: %w", fd, at, s.addr, err)
				}
				cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
				if err != nil {
					return err
				}
				own, err := unix.GetsockoptUint64(w.inbox.bell, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
				if err != nil || own == cookie {
					return fmt.Errorf("%s is not in the hidden namespace: %w", s.addr, err)
				}
			}
			return nil
		})
	}
}

// TestOriginal: a descriptor that is not unique, or has no twin, is an error.
func TestOriginal(t *testing.T) {
	fd, err := openSocket(unix.SOCK_DGRAM, loop4, nil)
	if err != nil {
		t.Fatal(err)
	}
	fds := []int{fd}
	defer func() { closeAll(fds) }()
	if _, err := original(fd); err == nil || !strings.Contains(err.Error(), "no descriptor") {
		t.Errorf("alone: %v", err)
	}
	for i := range 2 {
		d, err := unix.Dup(fd)
		if err != nil {
			t.Fatal(err)
		}
		fds = append(fds, d)
		got, err := original(fd)
		if i == 0 && (err != nil || got != d) {
			t.Errorf("one twin: %d, %v", got, err)
		}
		if i == 1 && (err == nil || !strings.Contains(err.Error(), "both")) {
			t.Errorf("two twins: %v", err)
		}
	}
	r, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close() //nolint:errcheck // test
	if _, err := original(int(r.Fd())); err == nil {
		t.Error("a file was taken for a socket")
	}
}

// TestPanics: no method of a handler can end the loop.
func TestPanics(t *testing.T) {
	var log logBuffer
	boom := func() { panic("boom in a handler") }
	armed := atomic.Bool{}
	armed.Store(true)
	f, events := run(t, Config{Listeners: []Listener{gm(loop4)}, Logger: log.logger()}, recorder{
		onMsg: func(w *Worker, fl ims.Flow, msg []byte) {
			if strings.Contains(string(msg), "Call-ID: bad") {
				boom()
			}
			echo(w, fl, msg)
		},
		onBad:   func(*Worker, ims.Flow) { boom() },
		onClose: func(*Worker, ims.ConnID) { boom() },
		onDial:  func(*Worker, ims.ConnID) { boom() },
		onTick: func(*Worker) {
			if armed.Swap(false) {
				boom()
			}
		},
	})
	at := f.Listeners()[0].Addr
	u, c := udpPeer(t, "", at), tcpPeer(t, at)
	for _, conn := range []net.Conn{u, c} {
		if conn == c {
			write(t, conn, sip("bad", 5)+sip("good", 5))
		} else {
			write(t, conn, sip("bad", 5))
			write(t, conn, sip("good", 5))
		}
		expect(t, events, "message")
		expect(t, events, "message")
		buf := make([]byte, 2048)
		if n, err := conn.Read(buf); err != nil || string(buf[:n]) != sip("good", 5) {
			t.Errorf("answer %q, %v", buf[:n], err)
		}
	}
	write(t, c, "\x01\x02")
	expect(t, events, "bad")
	expect(t, events, "closed")
	ln := listen(t, "127.0.0.1:0")
	w := f.Worker(0)
	if err := w.Post(boom); err != nil {
		t.Fatal(err)
	}
	if err := w.Post(func() { w.Dial(at, addrOf(ln.Addr()), ims.Mw, false, 1) }); err != nil {
		t.Fatal(err)
	}
	expect(t, events, "dialed")
	eventually(t, "counters", func() bool { s := f.Stats(); return s.Panics == 7 && s.Dropped(DropPanic) == 2 })
	if s := log.String(); !strings.Contains(s, "boom in a handler") || !strings.Contains(s, "front_test.go") {
		t.Errorf("the stack was not logged: %s", s)
	}
}

func TestBootPanic(t *testing.T) {
	before := descriptors(t)
	_, err := New(Config{Workers: 2, Listeners: []Listener{gm(loop4)}}, []Handler{
		&recorder{}, &recorder{onBoot: func(*Worker) { panic("no boot") }},
	})
	if err == nil || !strings.Contains(err.Error(), "no boot") {
		t.Errorf("got %v", err)
	}
	mustEqual(t, "descriptors", descriptors(t), before)
}

// TestAnswer: results are taken where further functions are refused.
func TestAnswer(t *testing.T) {
	f, _ := run(t, Config{}, recorder{})
	w := f.Worker(0)
	hold, held := make(chan struct{}), make(chan struct{})
	if err := w.Post(func() { close(held); <-hold }); err != nil {
		t.Fatal(err)
	}
	<-held
	for range maxPosts {
		if err := w.Post(func() {}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Post(func() {}); !errors.Is(err, ErrBusy) {
		t.Errorf("one too many: %v", err)
	}
	answered := make(chan struct{})
	if err := w.Answer(func() { close(answered) }); err != nil {
		t.Fatal(err)
	}
	close(hold)
	<-answered
}

// TestPostOrder has several producers; each one's functions and messages run in its order, ticks in between.
func TestPostOrder(t *testing.T) {
	const producers, each = 4, 3000
	var mu sync.Mutex
	got := make([][]int, producers)
	record := func(p, i int) {
		mu.Lock()
		defer mu.Unlock()
		got[p] = append(got[p], i)
	}
	f, _ := run(t, Config{Workers: 2, Tick: time.Millisecond, Listeners: []Listener{gm(loop4)}, MaxQueue: producers * each}, recorder{
		onMsg: func(_ *Worker, _ ims.Flow, msg []byte) {
			var p, i int
			if _, err := fmt.Sscan(string(msg), &p, &i); err == nil {
				record(p, i)
			}
		},
	})
	w := f.Worker(1)
	var wg sync.WaitGroup
	for p := range producers {
		wg.Go(func() {
			for i := range each {
				var err error
				if i%3 == 0 {
					err = f.Worker(0).Hand(1, ims.Flow{Side: ims.Mw}, fmt.Append(nil, p, i))
				} else {
					err = w.Post(func() { record(p, i) })
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	eventually(t, "all have run", func() bool {
		mu.Lock()
		defer mu.Unlock()
		n := 0
		for _, g := range got {
			n += len(g)
		}
		return n == producers*each
	})
	for p, g := range got {
		for i, v := range g {
			if i != v {
				t.Fatalf("producer %d: number %d came as %d", p, v, i)
			}
		}
	}
	eventually(t, "counters", func() bool { return f.Stats().Handovers == producers*each/3 })
}

// TestQueueLimits fills the queue of a loop that does not move.
func TestQueueLimits(t *testing.T) {
	f, events := run(t, Config{Workers: 2, MaxQueue: 10, Listeners: []Listener{gm(loop4)}}, recorder{})
	hold, held := make(chan struct{}), make(chan struct{})
	w := f.Worker(1)
	if err := w.Post(func() { close(held); <-hold }); err != nil {
		t.Fatal(err)
	}
	<-held
	for i := range 15 {
		err := f.Worker(0).Hand(1, ims.Flow{Side: ims.Mw}, []byte("m"))
		if want := map[bool]error{true: ErrBusy}[i >= 10]; !errors.Is(err, want) {
			t.Errorf("message %d: %v", i, err)
		}
	}
	var err error
	n := 0
	for ; err == nil && n <= maxPosts; n++ {
		err = w.Post(func() {})
	}
	if !errors.Is(err, ErrBusy) || n != maxPosts+1 {
		t.Errorf("post %d: %v", n, err)
	}
	close(hold)
	for range 10 {
		mustEqual(t, "worker", expect(t, events, "message").worker, 1)
	}
	eventually(t, "counters", func() bool { s := f.Stats(); return s.Dropped(DropQueueFull) == 5 })
}

// TestBell: a ring that fails is made good for by the next push, or by a tick even if one is due already.
func TestBell(t *testing.T) {
	for _, tt := range []struct {
		name string
		ring func(q *inbox) error
	}{
		{"push", func(q *inbox) error { return q.push(task{run: func() {}}, false) }},
		{"tick", func(q *inbox) error { q.markTick(); return nil }},
		{"finish", func(q *inbox) error { q.finish(); return nil }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bell, watch, err := newDoorbell()
			if err != nil {
				t.Fatal(err)
			}
			defer closeAll([]int{bell, watch})
			rings := func() (n int) {
				for b := make([]byte, 1); n < 10; n++ {
					if _, err := unix.Read(watch, b); err != nil {
						break
					}
				}
				return n
			}
			q := inbox{limit: 10, bell: -1} // every write fails, as it does for lack of memory
			if err := q.push(task{run: func() {}}, false); err != nil {
				t.Fatal(err)
			}
			q.markTick()
			q.bell = bell
			for range 2 {
				if err := tt.ring(&q); err != nil {
					t.Fatal(err)
				}
			}
			mustEqual(t, "rings", rings(), 1)
			tasks, tick, _ := q.take()
			if len(tasks) == 0 || !tick {
				t.Errorf("%d tasks, tick %v", len(tasks), tick)
			}
			for err == nil { // until the socket buffer is full, which means that somebody has rung
				_, err = unix.Write(bell, []byte{0})
			}
			mustEqual(t, "error", err, error(unix.EAGAIN))
			q.ring()
			mustEqual(t, "rung", q.rung.Load(), true)
		})
	}
}

// TestClose ends everything, in the middle of traffic, and refuses what comes later.
func TestClose(t *testing.T) {
	full := fullBacklog(t)
	before := descriptors(t)
	events := make(chan event, 65536)
	f, _ := run(t, Config{Workers: 2, Listeners: []Listener{gm(loop4), {Addr: loop6, Side: ims.Mw, UDP: true, Worker: 1}}}, recorder{
		events: events, onMsg: echo,
		onClose: func(w *Worker, _ ims.ConnID) {
			_ = w.SendUDP(w.f.cfg.Listeners[0].Addr, netip.MustParseAddrPort("127.0.0.1:9"), []byte("x"))
		},
	})
	at := f.Listeners()[0].Addr
	u, c := udpPeer(t, "", at), tcpPeer(t, at)
	write(t, c, sip("1", 0)+sip("2", 100)[:200])
	expect(t, events, "message")
	w := f.Worker(0)
	for i := range 20 {
		if err := w.Post(func() { w.Dial(loop4, full, ims.Mw, false, uint64(i)) }); err != nil {
			t.Fatal(err)
		}
	}
	for range 100 {
		write(t, u, sip("u", 0))
	}
	if got := f.Err(); got != nil {
		t.Errorf("error while it runs: %v", got)
	}
	ran := false
	if err := w.Post(func() { ran = true }); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() { closeFront(t, f) })
	}
	wg.Wait()
	<-f.Done()
	if !ran {
		t.Error("what was posted before has not run")
	}
	if err := w.Post(func() {}); !errors.Is(err, ErrClosed) {
		t.Errorf("post: %v", err)
	}
	if err := w.Hand(1, ims.Flow{}, []byte("x")); !errors.Is(err, ErrClosed) {
		t.Errorf("hand: %v", err)
	}
	w.Dial(loop4, full, ims.Mw, false, 99)
	kinds := map[string]int{}
	for len(events) > 0 {
		e := <-events
		kinds[e.kind]++
		if e.kind == "dialed" && !errors.Is(e.err, ErrClosed) {
			t.Errorf("dial: %v", e.err)
		}
	}
	mustEqual(t, "closed", kinds["closed"], 1)
	mustEqual(t, "dialed", kinds["dialed"], 20)
	if rest, err := io.ReadAll(c); err != nil && !errors.Is(err, unix.ECONNRESET) || !strings.HasPrefix(string(rest), sip("1", 0)) {
		t.Errorf("peer got %q, %v", rest, err)
	}
	_ = u.Close()
	_ = c.Close()
	mustEqual(t, "descriptors", descriptors(t), before)
	s := f.Stats()
	mustEqual(t, "connections", s.Connections, 0)
}

// TestCloseTimeout: a handler that is stuck does not keep Close from returning.
func TestCloseTimeout(t *testing.T) {
	f, _ := run(t, Config{Listeners: []Listener{gm(loop4)}}, recorder{})
	hold := make(chan struct{})
	if err := f.Worker(0).Post(func() { <-hold }); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if err := f.Close(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	close(hold)
}

// TestNoListeners: workers run without any, for what is posted and dialed.
func TestNoListeners(t *testing.T) {
	f, events := run(t, Config{Workers: 2, Tick: time.Millisecond}, recorder{})
	ln := listen(t, "127.0.0.1:0")
	w := f.Worker(1)
	if err := w.Post(func() { w.Dial(loop4, addrOf(ln.Addr()), ims.Mw, false, 3) }); err != nil {
		t.Fatal(err)
	}
	if e := expect(t, events, "dialed"); e.err != nil || e.worker != 1 {
		t.Errorf("got %+v", e)
	}
}

// TestTick: ticks come, never more than one is outstanding, and Now is their time.
func TestTick(t *testing.T) {
	ticks := make(chan time.Time, 1000)
	f, _ := run(t, Config{Tick: time.Millisecond}, recorder{onTick: func(w *Worker) { ticks <- w.Now() }})
	a, b := <-ticks, <-ticks
	if !b.After(a) {
		t.Errorf("%s does not come after %s", b, a)
	}
	hold, held := make(chan struct{}), make(chan struct{})
	if err := f.Worker(0).Post(func() { close(held); <-hold }); err != nil {
		t.Fatal(err)
	}
	<-held
	for len(ticks) > 0 {
		<-ticks
	}
	time.Sleep(20 * time.Millisecond)
	counted := make(chan int, 1)
	if err := f.Worker(0).Post(func() { counted <- len(ticks) }); err != nil {
		t.Fatal(err)
	}
	close(hold)
	if n := <-counted; n > 1 {
		t.Errorf("%d ticks were outstanding", n)
	}
}

// TestRest: a worker to which nothing happens and whose handler has nothing to do gets no ticks; what happens ends that,
// after a tick which tells the handler the time.
func TestRest(t *testing.T) {
	const never = 24 * time.Hour
	for _, c := range []struct {
		name string
		stir func(t *testing.T, f *Front, seen func())
	}{
		{"posted function", func(t *testing.T, f *Front, seen func()) {
			if err := f.Worker(0).Post(seen); err != nil {
				t.Error(err)
			}
		}},
		{"datagram", func(t *testing.T, f *Front, _ func()) {
			write(t, udpPeer(t, "", f.Listeners()[0].Addr), sip("rest", 1))
		}},
		{"connection", func(t *testing.T, f *Front, _ func()) { tcpPeer(t, f.Listeners()[0].Addr) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			ticks := make(chan time.Time, 10*restAfter)
			cfg := Config{Listeners: []Listener{gm(loop4)}, Tick: time.Millisecond, MaxRest: never}
			// Other timeouts end a rest as well, so they must not come.
			cfg.IdleTimeout, cfg.ClearIdleTimeout, cfg.PartialTimeout = never, never, never
			var w *Worker
			var ticked time.Time
			seen := func() {
				if now := w.Now(); !now.Equal(ticked) {
					t.Errorf("the clock is %s behind when the rest ends", now.Sub(ticked))
				}
			}
			f, _ := run(t, cfg, recorder{
				rest: never,
				onTick: func(w *Worker) {
					ticked = w.Now()
					select {
					case ticks <- ticked:
					default:
					}
				},
				onMsg: func(*Worker, ims.Flow, []byte) { seen() },
			})
			w = f.Worker(0)
			eventually(t, "rest", func() bool { return w.restEnd.Load() > 0 })
			time.Sleep(20 * time.Millisecond) // a tick that was under way
			for len(ticks) > 0 {
				<-ticks
			}
			time.Sleep(50 * time.Millisecond)
			if n := len(ticks); n > 0 {
				t.Fatalf("%d ticks in a rest", n)
			}
			if f.Stats(); w.restEnd.Load() == 0 || len(ticks) > 0 {
				t.Error("reading the counters ends a rest")
			}
			stirred := time.Now()
			c.stir(t, f, seen)
			for i := range 10 {
				select {
				case now := <-ticks:
					if now.Before(stirred) {
						t.Errorf("tick of %s before", stirred.Sub(now))
					}
				case <-time.After(patience):
					t.Fatalf("%d ticks after the rest", i)
				}
			}
		})
	}
}

// TestRestEnds: a rest is no longer than the handler wants, nor than the front's own timeouts allow.
func TestRestEnds(t *testing.T) {
	const never = 24 * time.Hour
	for _, c := range []struct {
		name    string
		maxRest time.Duration
		rest    time.Duration
	}{
		{"wanted by the handler", never, 20 * time.Millisecond},
		{"longest rest", 20 * time.Millisecond, never},
		{"shorter than a tick", never, time.Microsecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			ticks := make(chan struct{}, 1)
			run(t, Config{Tick: time.Millisecond, MaxRest: c.maxRest}, recorder{rest: c.rest, onTick: func(*Worker) { ticks <- struct{}{} }})
			for i := range restAfter + 5 {
				select {
				case <-ticks:
				case <-time.After(patience):
					t.Fatalf("no tick after %d", i)
				}
			}
		})
	}
}

// TestRestIdleConnection: the end of a connection's idle time is not slept through.
func TestRestIdleConnection(t *testing.T) {
	const never = 24 * time.Hour
	f, events := run(t, Config{
		Listeners: []Listener{gm(loop4)}, Tick: time.Millisecond, MaxRest: never, IdleTimeout: time.Second,
	}, recorder{rest: never})
	write(t, tcpPeer(t, f.Listeners()[0].Addr), sip("idle", 1))
	expect(t, events, "message")
	expect(t, events, "closed")
}

// TestLog: gnet's messages come through our logger, none of them louder than they deserve.
func TestLog(t *testing.T) {
	var log logBuffer
	f, _ := run(t, Config{Listeners: []Listener{gm(loop4)}, MaxConnections: 100, Logger: log.logger()}, recorder{})
	closeFront(t, f)
	s := log.String()
	if !strings.Contains(s, "msg=gnet") || !strings.Contains(s, "Launching gnet") {
		t.Errorf("gnet's messages are missing: %s", s)
	}
	if strings.Contains(s, "level=ERROR") || strings.Contains(s, "level=WARN") || strings.Contains(s, "level=INFO") {
		t.Errorf("an orderly life is no news: %s", s)
	}
	l := gnetLogger{log.logger()}
	l.Warnf("w%d", 1)
	l.Errorf("e%d", 2)
	l.Fatalf("f%d", 3)
	for _, want := range []string{"level=INFO msg=gnet text=w1", "level=WARN msg=gnet text=e2", "level=ERROR msg=gnet text=f3"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("%q is missing", want)
		}
	}
}

// Peers: B5.11
func TestStatsNames(t *testing.T) {
	seen := map[string]bool{}
	for _, d := range Drops() {
		if d.String() == "" || seen[d.String()] {
			t.Errorf("name of drop %d: %q", d, d)
		}
		seen[d.String()] = true
	}
	mustEqual(t, "unknown", numDrops.String(), fmt.Sprintf("Drop(%d)", uint8(numDrops)))
	var s Stats
	mustEqual(t, "unknown", s.Dropped(numDrops), 0)
	mustEqual(t, "unknown", s.Side(200), SideStats{})
}

// TestAdoptFails: a socket that cannot be put in place is an error at start, and leaves nothing behind.
func TestAdoptFails(t *testing.T) {
	before := descriptors(t)
	for name, tamper := range map[string]func(*events){
		"socket is gone":  func(e *events) { _ = unix.Close(e.swaps[1].fd); e.swaps[1].fd = -1 },
		"two of one name": func(e *events) { e.swaps[1].at = e.swaps[0].at },
	} {
		cfg := Config{}
		cfg.populate()
		f := &Front{cfg: cfg, log: cfg.Logger, done: make(chan struct{}), closed: make(chan struct{})}
		f.ctx, f.cancel = context.WithCancel(context.Background())
		if err := f.addWorker(0, &recorder{events: make(chan event, 1)}); err != nil {
			t.Fatal(err)
		}
		if err := f.listen(&Listener{Addr: loop4, Side: ims.Mw, UDP: true, Worker: -1}); err != nil {
			t.Fatal(err)
		}
		e := f.engines[0]
		tamper(e)
		err := f.startEngine(e)
		if err == nil || !strings.Contains(err.Error(), "put socket over placeholder ") {
			t.Errorf("%s: got %v", name, err)
		}
		f.shutdown()
	}
	mustEqual(t, "descriptors", descriptors(t), before)
}
