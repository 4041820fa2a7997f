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
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
)

// TestTCPFraming sends the same stream cut in many ways.
//
// Peers: C1.10
func TestTCPFraming(t *testing.T) {
	f, events := run(t, Config{Listeners: []Listener{gm(loop4), gm(loop6)}}, recorder{})
	msgs := []string{sip("1", 0), sip("2", 1), sip("3", 300), sip("4", 60000)}
	stream := msgs[0] + "\r\n\r\n" + msgs[1] + "\r\n" + msgs[2] + msgs[3] + "\r\n\r\n" + msgs[0]
	for i, chunk := range []int{1 << 20, 1, 2, 3, 7, 100, 536, 1360, 9000} {
		at := f.Listeners()[i%2].Addr
		c := tcpPeer(t, at)
		go func() {
			s := stream
			if chunk < 50 { // byte by byte is for the small ones
				s = strings.Replace(s, msgs[3], "", 1)
			}
			for len(s) > 0 {
				n := min(chunk, len(s))
				if _, err := io.WriteString(c, s[:n]); err != nil {
					return
				}
				s = s[n:]
			}
		}()
		want := []string{msgs[0], msgs[1], msgs[2], msgs[3], msgs[0]}
		if chunk < 50 {
			want = append(want[:3:3], msgs[0])
		}
		for _, m := range want {
			e := expect(t, events, "message")
			if e.msg != m {
				t.Fatalf("chunks of %d: got message of %d octets, want %d", chunk, len(e.msg), len(m))
			}
			mustEqual(t, "flow", e.flow, ims.Flow{
				Local: at, Remote: addrOf(c.LocalAddr()), Conn: e.conn, Transport: ims.TCP, Side: ims.GmClear,
			})
		}
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		// One for each read that has pings, and what is read at a time is up to the kernel.
		if pongs, err := io.ReadAll(c); err != nil || string(pongs) != "\r\n\r\n" && string(pongs) != "\r\n" {
			t.Errorf("chunks of %d: pongs %q, %v", chunk, pongs, err)
		}
		_ = c.Close()
		expect(t, events, "closed")
	}
	eventually(t, "counters", func() bool {
		s := f.Stats()
		return s.Pings >= 9 && s.Pings <= 18 && s.Connections == 0 && s.Closed == 9
	})
	ask(t, f.Worker(0), func(w *Worker) error {
		if w.buffered != 0 || len(w.conns) != 0 || w.partial.front() != nil || w.idle.front() != nil || w.clearIdle.front() != nil {
			return fmt.Errorf("left behind: %d octets, %d connections", w.buffered, len(w.conns))
		}
		return nil
	})
}

// ask runs f on the loop.
func ask(t *testing.T, w *Worker, f func(*Worker) error) {
	t.Helper()
	res := make(chan error, 1)
	if err := w.Post(func() { res <- f(w) }); err != nil {
		t.Fatal(err)
	}
	if err := <-res; err != nil {
		t.Error(err)
	}
}

func TestTCPEcho(t *testing.T) {
	f, _ := run(t, Config{Listeners: []Listener{gm(loop4)}}, recorder{onMsg: echo})
	c := tcpPeer(t, f.Listeners()[0].Addr)
	r := bufio.NewReader(c)
	for i := range 50 {
		want := sip(fmt.Sprint(i), i*100)
		write(t, c, want)
		if got, err := readSIP(r); err != nil || got != want {
			t.Fatalf("message %d: %v", i, err)
		}
	}
	eventually(t, "counters", func() bool {
		s := f.Stats()
		m := s.Side(ims.GmClear)
		return m.MessagesIn == 50 && m.MessagesOut == 50 && m.BytesIn == m.BytesOut && s.Accepted == 1
	})
}

func TestTCPBad(t *testing.T) {
	for _, tt := range []struct {
		name, send, reason string
		drop               Drop
	}{
		{"no length", strings.Replace(sip("1", 0), "Content-Length", "X-Length", 1), "no_content_length", DropFraming},
		{"garbage", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "start_line", DropFraming},
		{"long header", "MESSAGE sip:a SIP/2.0\r\nX: " + strings.Repeat("x", 5000), "too_large", DropFraming},
		{"long body", sip("1", 5000)[:400], "too_large", DropFraming},
		{"incomplete", sip("1", 100)[:150], "incomplete", DropPartial},
		{"ping and garbage", "\r\n" + strings.Repeat("\x01", 20), "start_line", DropFraming},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := Config{Listeners: []Listener{gm(loop4)}, MaxMessage: 4096}
			if tt.reason == "incomplete" {
				cfg.PartialTimeout = 20 * time.Millisecond
			}
			f, events := run(t, cfg, recorder{onBad: func(w *Worker, f ims.Flow) { _ = w.SendTCP(f.Conn, []byte("SIP/2.0 400 ")) }})
			c := tcpPeer(t, f.Listeners()[0].Addr)
			write(t, c, tt.send)
			e := expect(t, events, "bad")
			mustEqual(t, "reason", e.reason, tt.reason)
			expect(t, events, "closed")
			buf, err := io.ReadAll(c)
			if err != nil && !errors.Is(err, unix.ECONNRESET) {
				t.Error(err)
			}
			mustEqual(t, "answer", string(buf), "SIP/2.0 400 ")
			eventually(t, "counter", func() bool { s := f.Stats(); return s.Dropped(tt.drop) == 1 && s.Closed == 1 })
		})
	}
}

// TestTCPBuffered has many connections with incomplete messages.
func TestTCPBuffered(t *testing.T) {
	f, events := run(t, Config{Listeners: []Listener{gm(loop4)}, MaxMessage: 32000, MaxBuffered: 65536}, recorder{})
	for range 3 { // each takes a buffer of 32 KiB
		write(t, tcpPeer(t, f.Listeners()[0].Addr), sip("1", 30000)[:20000])
	}
	e := expect(t, events, "bad")
	mustEqual(t, "reason", e.reason, "buffered")
	expect(t, events, "closed")
	eventually(t, "counters", func() bool { s := f.Stats(); return s.Dropped(DropBuffered) == 1 && s.Connections == 2 })
}

// TestTCPPong: a lone CRLF is what a pong looks like, so it may stay for ever.
//
// Peers: B5.03
func TestTCPPong(t *testing.T) {
	ticks := make(chan struct{}, 100)
	f, events := run(t, Config{Listeners: []Listener{gm(loop4)}, PartialTimeout: time.Millisecond, Tick: time.Millisecond},
		recorder{onTick: func(*Worker) {
			select {
			case ticks <- struct{}{}:
			default:
			}
		}})
	c := tcpPeer(t, f.Listeners()[0].Addr)
	write(t, c, "\r\n")
	eventually(t, "pong is there", func() bool { s := f.Stats(); return s.Side(ims.GmClear).BytesIn == 2 })
	for range 50 {
		select {
		case <-ticks:
		default:
		}
		<-ticks
	}
	msg := sip("1", 10)
	write(t, c, msg[:200])
	write(t, c, msg[200:])
	mustEqual(t, "message", expect(t, events, "message").msg, msg)
}

// Peers: B5.07
func TestTCPOutboundCap(t *testing.T) {
	overflow := make(chan error, 1)
	f, events := run(t, Config{Listeners: []Listener{gm(loop4)}, MaxOutbound: 1 << 20}, recorder{
		onMsg: func(w *Worker, f ims.Flow, _ []byte) {
			big := make([]byte, 64<<10)
			for range 1 << 12 { // 256 MiB: no kernel takes that
				if err := w.SendTCP(f.Conn, big); err != nil {
					overflow <- err
					if err := w.SendTCP(f.Conn, big); !errors.Is(err, ErrNoConn) {
						panic(err)
					}
					return
				}
			}
		},
	})
	c := tcpPeer(t, f.Listeners()[0].Addr)
	write(t, c, sip("1", 0))
	expect(t, events, "message")
	if err := <-overflow; !errors.Is(err, ErrOverflow) {
		t.Errorf("got %v", err)
	}
	expect(t, events, "closed")
	if _, err := io.Copy(io.Discard, c); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("peer got %v, want a reset", err)
	}
	s := f.Stats()
	mustEqual(t, "drops", s.Dropped(DropOutbound), 1)
	mustEqual(t, "panics", s.Panics, 0)
}

// Peers: C2.09
func TestTCPIdle(t *testing.T) {
	f, events := run(t, Config{Listeners: []Listener{gm(loop4)}, IdleTimeout: 50 * time.Millisecond}, recorder{onMsg: echo})
	c := tcpPeer(t, f.Listeners()[0].Addr)
	write(t, c, sip("1", 0))
	expect(t, events, "message")
	expect(t, events, "closed")
	if _, err := io.ReadAll(c); err != nil {
		t.Error(err)
	}
	eventually(t, "counter", func() bool { s := f.Stats(); return s.Dropped(DropIdle) == 1 })
}

// TestClearIdle: the unprotected side has a limit of its own, which is never above the common one.
func TestClearIdle(t *testing.T) {
	f, events := run(t, Config{
		Listeners: []Listener{gm(loop4), gmProtected(loop4)}, ClearIdleTimeout: 50 * time.Millisecond,
	}, recorder{onMsg: echo})
	phone, stranger := tcpPeer(t, f.Listeners()[1].Addr), tcpPeer(t, f.Listeners()[0].Addr)
	write(t, phone, sip("1", 0))
	expect(t, events, "message")
	write(t, stranger, sip("2", 0))
	expect(t, events, "message")
	mustEqual(t, "closed side", expect(t, events, "closed").flow.Side, ims.GmClear)
	write(t, phone, sip("3", 0))
	mustEqual(t, "message", expect(t, events, "message").msg, sip("3", 0))
	for _, tt := range []struct{ idle, want time.Duration }{{0, time.Minute}, {time.Second, time.Second}} {
		cfg := Config{IdleTimeout: tt.idle}
		cfg.populate()
		mustEqual(t, "default", cfg.ClearIdleTimeout, tt.want)
	}
}

// TestConnectionLimit refuses what is too many and takes the next one when there is room.
func TestConnectionLimit(t *testing.T) {
	f, events := run(t, Config{Listeners: []Listener{gm(loop4)}, MaxConnections: 8}, recorder{onMsg: echo})
	at := f.Listeners()[0].Addr
	a, b := tcpPeer(t, at), tcpPeer(t, at)
	for _, c := range []net.Conn{a, b} {
		write(t, c, sip("1", 0))
		expect(t, events, "message")
	}
	third, err := net.Dial("tcp", at.String()) // may notice the reset already
	if err == nil {
		_, err = io.ReadAll(third)
		_ = third.Close()
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("third connection: %v", err)
	}
	w := f.Worker(0)
	if err := w.Post(func() { w.Dial(loop4, at, ims.GmClear, false, 9) }); err != nil {
		t.Fatal(err)
	}
	e := expect(t, events, "dialed")
	if !errors.Is(e.err, ErrTooMany) || e.tag != 9 || e.conn != 0 {
		t.Errorf("dial: %+v", e)
	}
	_ = a.Close()
	expect(t, events, "closed")
	write(t, tcpPeer(t, at), sip("2", 0))
	expect(t, events, "message")
	eventually(t, "counters", func() bool { s := f.Stats(); return s.Dropped(DropConnectionLimit) == 1 && s.Accepted == 3 })
}

// gmProtected is a listener of the protected side, without any IPsec.
func gmProtected(addr netip.AddrPort) Listener {
	return Listener{Addr: addr, Side: ims.GmProtected, TCP: true, Worker: -1}
}

// refused tells whether a connection is reset at once. It waits for the one or the other.
func refused(t *testing.T, f *Front, local string, at netip.AddrPort) bool {
	t.Helper()
	before := f.Stats()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(local)}}
	if c, err := d.Dial("tcp", at.String()); err == nil { // otherwise it has noticed the reset already
		t.Cleanup(func() { _ = c.Close() })
	}
	var s Stats
	eventually(t, "connection is taken or refused", func() bool {
		s = f.Stats()
		return s.Accepted+s.Dropped(DropConnectionLimit) == before.Accepted+before.Dropped(DropConnectionLimit)+1
	})
	return s.Accepted == before.Accepted
}

// TestClearShare: strangers take neither the protected side's connections nor those to the core.
func TestClearShare(t *testing.T) {
	f, events := run(t, Config{Listeners: []Listener{gm(loop4), gmProtected(loop4)}, MaxConnections: 8, IdleTimeout: time.Hour}, recorder{})
	stranger, phone := f.Listeners()[0].Addr, f.Listeners()[1].Addr
	for i := range 4 {
		mustEqual(t, "stranger refused", refused(t, f, fmt.Sprintf("127.0.0.%d", i+1), stranger), i >= 2)
	}
	for i := range 8 {
		mustEqual(t, "phone refused", refused(t, f, "127.0.0.1", phone), i >= 6)
	}
	mustEqual(t, "refusals", f.drops[DropConnectionLimit].Load(), 4)
	core := addrOf(listen(t, "127.0.0.1:0").Addr())
	for i, side := range []ims.Side{ims.GmProtected, ims.Mw} {
		w := f.Worker(0)
		if err := w.Post(func() { w.Dial(loop4, core, side, false, uint64(i)) }); err != nil {
			t.Fatal(err)
		}
		want := []error{ErrTooMany, nil}[i]
		if e := expect(t, events, "dialed"); !errors.Is(e.err, want) {
			t.Errorf("dial on side %v: %v, want %v", side, e.err, want)
		}
	}
}

func TestMaxPerSource(t *testing.T) {
	f, events := run(t, Config{Listeners: []Listener{gm(loop4)}, MaxPerSource: 2}, recorder{})
	at := f.Listeners()[0].Addr
	first := tcpPeer(t, at)
	eventually(t, "first is taken", func() bool { return f.Stats().Accepted == 1 })
	mustEqual(t, "second", refused(t, f, "127.0.0.1", at), false)
	mustEqual(t, "third", refused(t, f, "127.0.0.1", at), true)
	mustEqual(t, "other source", refused(t, f, "127.0.0.2", at), false)
	_ = first.Close()
	expect(t, events, "closed")
	mustEqual(t, "one is gone", refused(t, f, "127.0.0.1", at), false)
}

func TestSources(t *testing.T) {
	var s sources
	for _, tt := range []struct {
		addr string
		want bool
	}{
		{"192.0.2.1", true},
		{"192.0.2.1", true},
		{"192.0.2.1", false},
		{"::ffff:192.0.2.1", false},
		{"192.0.2.2", true},
		{"2001:db8::1", true},
		{"2001:db8::2:0:0:1", true},
		{"2001:db8::3", false},
		{"2001:db8:0:1::1", true},
		{"2001:db8:0:2::1", false}, // too many of all
	} {
		mustEqual(t, tt.addr, s.add(netip.MustParseAddr(tt.addr), 6, 2), tt.want)
	}
	for _, a := range []string{"192.0.2.1", "192.0.2.1", "192.0.2.2", "2001:db8::3", "2001:db8::4", "2001:db8:0:1::9"} {
		s.remove(netip.MustParseAddr(a))
	}
	if s.total != 0 || len(s.count) != 0 {
		t.Errorf("left behind: %+v", &s)
	}
}

// TestClampConnections: there are descriptors beyond the cap.
func TestClampConnections(t *testing.T) {
	cfg := Config{MaxConnections: 1 << 30}
	cfg.populate()
	if room := cfg.clampConnections(); cfg.MaxConnections < 1 || cfg.MaxConnections >= room {
		t.Errorf("limit %d, room %d", cfg.MaxConnections, room)
	}
	cfg.MaxConnections = 1
	cfg.clampConnections()
	mustEqual(t, "small limit", cfg.MaxConnections, 1)

	// Listeners take descriptors as well, with a steering program more of them.
	room := cfg.clampConnections()
	cfg.Workers = 4
	cfg.Listeners = []Listener{gm(loop4), {Addr: loop4, Side: ims.Mw, UDP: true, TCP: true, Worker: 2}}
	mustEqual(t, "descriptors of listeners", room-cfg.clampConnections(), 4+1+4+1)
	cfg.Steering = new(affinity)
	mustEqual(t, "descriptors of steered ones", room-cfg.clampConnections(), 4+4+4+1)
}

// TestProtectedReset: whatever ends a connection of the protected side, nothing of it stays in the kernel that would send
// once the SAs are gone. The other sides end in the usual way.
//
// Peers: C2.09
func TestProtectedReset(t *testing.T) {
	for _, tt := range []struct {
		name string
		cfg  Config
		end  func(t *testing.T, f *Front, c *net.TCPConn)
	}{
		{"front closed", Config{}, func(t *testing.T, f *Front, _ *net.TCPConn) { closeFront(t, f) }},
		{"idle", Config{IdleTimeout: 50 * time.Millisecond}, func(*testing.T, *Front, *net.TCPConn) {}},
		{"framing", Config{}, func(t *testing.T, _ *Front, c *net.TCPConn) { write(t, c, strings.Repeat("\x00", 20)) }},
		{"incomplete", Config{PartialTimeout: time.Millisecond}, func(t *testing.T, _ *Front, c *net.TCPConn) { write(t, c, "MESSAGE ") }},
		{"handler", Config{}, func(t *testing.T, f *Front, _ *net.TCPConn) {
			ask(t, f.Worker(0), func(w *Worker) error { w.CloseConn(1, false); return nil })
		}},
		{"peer", Config{}, func(t *testing.T, _ *Front, c *net.TCPConn) {
			if err := c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		for _, side := range []ims.Side{ims.GmClear, ims.GmProtected, ims.Mw} {
			t.Run(fmt.Sprintf("%s/%v", tt.name, side), func(t *testing.T) {
				cfg := tt.cfg
				cfg.Listeners = []Listener{{Addr: loop4, Side: side, TCP: true, Worker: -1}}
				f, events := run(t, cfg, recorder{})
				c := tcpPeer(t, f.Listeners()[0].Addr)
				write(t, c, sip("1", 0))
				expect(t, events, "message")
				tt.end(t, f, c)
				_, err := io.ReadAll(c)
				if protected := side == ims.GmProtected; protected != errors.Is(err, unix.ECONNRESET) || !protected && err != nil {
					t.Errorf("peer got %v", err)
				}
			})
		}
	}
	t.Run("dialed", func(t *testing.T) {
		f, events := run(t, Config{}, recorder{})
		ln := listen(t, "127.0.0.1:0")
		w := f.Worker(0)
		if err := w.Post(func() { w.Dial(loop4, addrOf(ln.Addr()), ims.GmProtected, false, 1) }); err != nil {
			t.Fatal(err)
		}
		c := acceptOne(t, ln)
		expect(t, events, "dialed")
		closeFront(t, f)
		if _, err := io.ReadAll(c); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("peer got %v", err)
		}
	})
}

// TestOutboundTotal: of peers that do not read only so many are kept, and others are served meanwhile.
//
// Peers: B5.07
func TestOutboundTotal(t *testing.T) {
	const fill = 300 << 10
	results := make(chan error, 1)
	f, _ := run(t, Config{Listeners: []Listener{gm(loop4)}, MaxOutbound: 1 << 20, MaxOutboundTotal: 512 << 10}, recorder{
		onMsg: func(w *Worker, f ims.Flow, msg []byte) {
			if strings.Contains(string(msg), "Call-ID: echo") {
				results <- w.SendTCP(f.Conn, msg)
				return
			}
			chunk := make([]byte, 32<<10)
			var err error
			for i := 0; i < 1<<13 && err == nil && w.conns[f.Conn].gc.OutboundBuffered() < fill; i++ {
				err = w.SendTCP(f.Conn, chunk)
			}
			results <- err
		},
	})
	at := f.Listeners()[0].Addr
	send := func(id string) (*net.TCPConn, error) {
		c := tcpPeer(t, at)
		write(t, c, sip(id, 0))
		return c, <-results
	}
	first, err := send("1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := send("2"); !errors.Is(err, ErrOverflow) {
		t.Errorf("second: %v", err)
	}
	if _, err := send("echo"); err != nil {
		t.Errorf("one that reads: %v", err)
	}
	eventually(t, "drop is counted", func() bool { s := f.Stats(); return s.Dropped(DropOutbound) == 1 })
	go func() { _, _ = io.Copy(io.Discard, first) }()
	eventually(t, "the first has read", func() bool {
		waits := make(chan int, 1)
		if err := f.Worker(0).Post(func() {
			n := 0
			for _, c := range f.Worker(0).conns {
				n += c.gc.OutboundBuffered()
			}
			waits <- n
		}); err != nil {
			t.Fatal(err)
		}
		return <-waits == 0
	})
	if _, err := send("3"); err != nil {
		t.Errorf("third: %v", err)
	}
	if _, err := send("4"); !errors.Is(err, ErrOverflow) {
		t.Errorf("fourth: %v", err)
	}
	ask(t, f.Worker(0), func(w *Worker) error {
		w.closeAll()
		if w.outbound != 0 || w.waiting.front() != nil {
			return fmt.Errorf("left behind: %d octets", w.outbound)
		}
		return nil
	})
}

// TestDialQueues: dials to phones that do not answer do not delay one to the core.
//
// Peers: B5.06, C1.10
func TestDialQueues(t *testing.T) {
	f, events := run(t, Config{DialTimeout: time.Hour, MaxDials: 1}, recorder{})
	full := fullBacklog(t)
	core := addrOf(listen(t, "127.0.0.1:0").Addr())
	w := f.Worker(0)
	if err := w.Post(func() {
		for i := range 5 {
			w.Dial(loop4, full, []ims.Side{ims.GmProtected, ims.GmClear}[i%2], false, uint64(i))
		}
		w.Dial(loop4, full, ims.GmProtected, false, 5)
		w.Dial(loop4, core, ims.Mw, false, 9)
	}); err != nil {
		t.Fatal(err)
	}
	got := map[uint64]error{}
	for range 2 {
		e := expect(t, events, "dialed")
		got[e.tag] = e.err
	}
	if err, ok := got[9]; !ok || err != nil || !errors.Is(got[5], ErrBusy) {
		t.Errorf("got %v", got)
	}
}

// TestLoneCR: what may wait for long takes no buffer, and buffers count with their whole size.
//
// Peers: B5.03
func TestLoneCR(t *testing.T) {
	f, events := run(t, Config{Listeners: []Listener{gm(loop4)}}, recorder{})
	at := f.Listeners()[0].Addr
	peers := make([]*net.TCPConn, 20)
	for i := range peers {
		peers[i] = tcpPeer(t, at)
		if i%2 == 0 {
			write(t, peers[i], "\r")
			continue
		}
		write(t, peers[i], sip("1", 0)[:50]) // has a buffer for a while
	}
	eventually(t, "octets are there", func() bool { s := f.Stats(); return s.Side(ims.GmClear).BytesIn == 10+10*50 })
	ask(t, f.Worker(0), func(w *Worker) error {
		if w.buffered != 10*partSize {
			return fmt.Errorf("%d octets are counted", w.buffered)
		}
		return nil
	})
	for i := 1; i < len(peers); i += 2 {
		write(t, peers[i], sip("1", 0)[50:]+"\r\n\r")
		expect(t, events, "message")
	}
	eventually(t, "buffers are given back", func() bool {
		n := make(chan int, 1)
		if err := f.Worker(0).Post(func() { n <- f.Worker(0).buffered }); err != nil {
			t.Fatal(err)
		}
		return <-n == 0
	})
	for i, c := range peers {
		rest := "\n"
		if i%2 == 0 {
			rest = "\n\r\n"
		}
		write(t, c, rest)
		buf := make([]byte, 2)
		if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "\r\n" {
			t.Errorf("pong %q, %v", buf, err)
		}
	}
}

// TestTCPOwner has connections from peers of both workers.
func TestTCPOwner(t *testing.T) {
	f, events := run(t, Config{Workers: 2, Listeners: []Listener{
		gm(loop4), {Addr: loop4, Side: ims.Mw, TCP: true, Worker: 1},
	}}, recorder{})
	for _, peer := range []string{"127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"} {
		for i, l := range f.Listeners() {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(peer)}}
			c, err := d.Dial("tcp", l.Addr.String())
			if err != nil {
				t.Fatal(err)
			}
			write(t, c, sip("1", 0))
			want := Owner(netip.MustParseAddr(peer), 2)
			if i == 1 {
				want = 1
			}
			mustEqual(t, "worker", expect(t, events, "message").worker, want)
			_ = c.Close()
			expect(t, events, "closed")
		}
	}
}

// acceptOne returns a listener's next connection.
func acceptOne(t *testing.T, ln net.Listener) *net.TCPConn {
	t.Helper()
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

func listen(t *testing.T, addr string) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln
}

// TestDial connects from the port of a listener to two peers, and from any port.
//
// Peers: C1.02, C1.03
func TestDial(t *testing.T) {
	for _, addr := range []netip.AddrPort{loop4, loop6} {
		f, events := run(t, Config{Listeners: []Listener{gm(addr)}, TCPMaxSeg: 1000}, recorder{onDial: func(w *Worker, c ims.ConnID) {
			if err := w.SendTCP(c, []byte("at once")); err != nil {
				panic(err)
			}
		}})
		at := f.Listeners()[0].Addr
		w := f.Worker(0)
		for i, local := range []netip.AddrPort{at, at, addr} {
			ln := listen(t, addr.String())
			to := addrOf(ln.Addr())
			if err := w.Post(func() { w.Dial(local, to, ims.GmProtected, false, uint64(i)) }); err != nil {
				t.Fatal(err)
			}
			c := acceptOne(t, ln)
			e := expect(t, events, "dialed")
			if e.err != nil || e.tag != uint64(i) || e.conn == 0 {
				t.Fatalf("dial from %s: %+v", local, e)
			}
			mustEqual(t, "flow", e.flow, ims.Flow{
				Local: addrOf(c.RemoteAddr()), Remote: to, Conn: e.conn, Transport: ims.TCP, Side: ims.GmProtected,
			})
			if local.Port() != 0 {
				mustEqual(t, "local", e.flow.Local, at)
			}
			buf := make([]byte, 7)
			if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "at once" {
				t.Fatalf("got %q, %v", buf, err)
			}
			ask(t, w, func(w *Worker) error {
				fd := w.conns[e.conn].gc.Fd()
				var errs []error
				for _, o := range []struct {
					name       string
					level, opt int
					want       int
				}{
					{"TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
					{"TCP_USER_TIMEOUT", unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 30000},
					{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 0},
					{"SO_PROTOCOL", unix.SOL_SOCKET, unix.SO_PROTOCOL, unix.IPPROTO_TCP},
				} {
					if got, err := unix.GetsockoptInt(fd, o.level, o.opt); err != nil || got != o.want {
						errs = append(errs, fmt.Errorf("%s is %d, %v", o.name, got, err))
					}
				}
				if mss, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_MAXSEG); err != nil || mss > 1000 {
					errs = append(errs, fmt.Errorf("TCP_MAXSEG is %d, %v", mss, err))
				}
				return errors.Join(errs...)
			})
			// The peer talks SIP to us on it.
			write(t, c, sip("1", 3))
			mustEqual(t, "connection", expect(t, events, "message").conn, e.conn)
			_ = c.Close()
			expect(t, events, "closed")
		}
	}
}

func TestDialErrors(t *testing.T) {
	f, events := run(t, Config{Listeners: []Listener{gm(loop4)}, DialTimeout: 50 * time.Millisecond, MaxDials: 1}, recorder{})
	at := f.Listeners()[0].Addr
	w := f.Worker(0)
	ln := listen(t, "127.0.0.1:0")
	dead := addrOf(ln.Addr())
	_ = ln.Close()
	full := fullBacklog(t)
	for i, tt := range []struct {
		local, remote netip.AddrPort
		want          error
	}{
		{at, dead, unix.ECONNREFUSED},
		{at, netip.AddrPort{}, ErrAddress},
		{at, netip.MustParseAddrPort("[::1]:9"), ErrAddress},
		{netip.MustParseAddrPort("[::1]:0"), netip.MustParseAddrPort("[fe80::1%lo]:9"), ErrAddress},
		{netip.MustParseAddrPort("192.0.2.1:0"), dead, unix.EADDRNOTAVAIL},
		{loop4, full, unix.ETIMEDOUT},
	} {
		if err := w.Post(func() { w.Dial(tt.local, tt.remote, ims.Mw, false, uint64(i)) }); err != nil {
			t.Fatal(err)
		}
		e := expect(t, events, "dialed")
		if !errors.Is(e.err, tt.want) || e.tag != uint64(i) || e.flow.Remote != tt.remote {
			t.Errorf("dial %d: %+v, want %v", i, e, tt.want)
		}
	}
	eventually(t, "the last dial is over", func() bool { // its result comes a moment before
		f.dials[0].mu.Lock()
		defer f.dials[0].mu.Unlock()
		return f.dials[0].running == 0
	})
	// One at a time and four waiting: the sixth is refused at once, all the same through Dialed.
	if err := w.Post(func() {
		for i := range 6 {
			w.Dial(loop4, full, ims.Mw, false, uint64(100+i))
		}
	}); err != nil {
		t.Fatal(err)
	}
	e := expect(t, events, "dialed")
	if !errors.Is(e.err, ErrBusy) || e.tag != 105 {
		t.Errorf("got %+v", e)
	}
	for range 5 {
		if e := expect(t, events, "dialed"); !errors.Is(e.err, unix.ETIMEDOUT) {
			t.Errorf("got %+v", e)
		}
	}
	eventually(t, "counters", func() bool { return f.Stats().DialErrors == 12 && f.conns.Load() == 0 })
}

// fullBacklog returns the address of a listener that answers no SYN any more.
func fullBacklog(t *testing.T) netip.AddrPort {
	t.Helper()
	fd, err := openSocket(unix.SOCK_STREAM, loop4, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	at, err := localAddr(fd)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		d := net.Dialer{Timeout: 100 * time.Millisecond}
		if c, err := d.Dial("tcp", at.String()); err == nil {
			t.Cleanup(func() { _ = c.Close() })
		}
	}
	return at
}

// TestCloseConn closes connections from within their own message and from outside, with and without reset.
func TestCloseConn(t *testing.T) {
	for _, reset := range []bool{false, true} {
		for _, inside := range []bool{false, true} {
			t.Run(fmt.Sprintf("reset=%v/inside=%v", reset, inside), func(t *testing.T) {
				f, events := run(t, Config{Listeners: []Listener{gm(loop4)}}, recorder{onMsg: func(w *Worker, f ims.Flow, _ []byte) {
					if inside {
						w.CloseConn(f.Conn, reset)
						w.CloseConn(f.Conn, reset)
					} else {
						_ = w.Post(func() { w.CloseConn(f.Conn, reset); w.CloseConn(f.Conn, reset) })
					}
				}})
				c := tcpPeer(t, f.Listeners()[0].Addr)
				write(t, c, sip("1", 0)+sip("2", 0))
				m := expect(t, events, "message")
				if !inside {
					expect(t, events, "message")
				}
				mustEqual(t, "closed", expect(t, events, "closed").conn, m.conn)
				_, err := io.ReadAll(c)
				if reset != errors.Is(err, unix.ECONNRESET) || !reset && err != nil {
					t.Errorf("peer got %v", err)
				}
				eventually(t, "counters", func() bool { s := f.Stats(); return s.Closed == 1 && s.Connections == 0 && f.conns.Load() == 0 })
			})
		}
	}
}

// TestConnIDs wraps the counter around a live connection.
func TestConnIDs(t *testing.T) {
	f, events := run(t, Config{Listeners: []Listener{gm(loop4)}}, recorder{})
	at := f.Listeners()[0].Addr
	id := func() ims.ConnID {
		write(t, tcpPeer(t, at), sip("1", 0))
		return expect(t, events, "message").conn
	}
	first := id()
	mustEqual(t, "first", first, 1)
	ask(t, f.Worker(0), func(w *Worker) error { w.lastID = ims.MaxConnID - 1; return nil })
	mustEqual(t, "last", id(), ims.MaxConnID)
	mustEqual(t, "after the wrap", id(), 2)
}

// TestAcceptWithoutDescriptors lets the process run out of descriptors for a while: accepting goes on afterwards, and UDP
// meanwhile.
//
// Peers: C1.10
func TestAcceptWithoutDescriptors(t *testing.T) {
	f, events := run(t, Config{Listeners: []Listener{gm(loop4)}}, recorder{onMsg: echo})
	at := f.Listeners()[0].Addr
	u := udpPeer(t, "", at)
	c, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	highest := 0
	for _, e := range dir {
		var n int
		if _, err := fmt.Sscan(e.Name(), &n); err == nil {
			highest = max(highest, n)
		}
	}
	var fill []int
	for { // no gaps
		fd, err := unix.Dup(c)
		if err != nil {
			t.Fatal(err)
		}
		fill = append(fill, fd)
		if fd > highest {
			highest = fd
			break
		}
	}
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	var restore sync.Once
	back := func() { restore.Do(func() { _ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &old) }) }
	defer back()
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: uint64(highest + 1), Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(c, sockaddr(at)); err != nil { // the kernel's part needs no descriptor
		t.Fatal(err)
	}
	eventually(t, "accept fails", func() bool { return f.Stats().AcceptErrors > 1 })
	write(t, u, sip("udp", 0))
	mustEqual(t, "transport", expect(t, events, "message").flow.Transport, ims.UDP)
	back()
	closeAll(fill)
	msg := sip("tcp", 0)
	if _, err := unix.Write(c, []byte(msg)); err != nil {
		t.Fatal(err)
	}
	mustEqual(t, "message", expect(t, events, "message").msg, msg)
	_ = unix.Close(c)
}

// failing is a listener that returns errors.
type failing struct {
	errs []error
	n    int
}

func (l *failing) AcceptTCP() (*net.TCPConn, error) {
	err := l.errs[min(l.n, len(l.errs)-1)]
	l.n++
	return nil, err
}

func TestAcceptLoopErrors(t *testing.T) {
	f := &Front{log: (&logBuffer{}).logger()}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	defer f.cancel()
	l := &failing{errs: []error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, net.ErrClosed}}
	f.acceptLoop(l, Listener{Addr: loop4}, -1)
	mustEqual(t, "calls", l.n, 4)
	mustEqual(t, "errors", f.acceptErrors.Load(), 3)
	// Ends while it backs off.
	l = &failing{errs: []error{unix.EMFILE}}
	time.AfterFunc(time.Millisecond, f.cancel)
	f.acceptLoop(l, Listener{Addr: loop4}, -1)
}
