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
		pongs := make([]byte, 4)
		if _, err := io.ReadFull(c, pongs); err != nil || string(pongs) != "\r\n\r\n" {
			t.Errorf("chunks of %d: pongs %q, %v", chunk, pongs, err)
		}
		_ = c.Close()
		expect(t, events, "closed")
	}
	eventually(t, "counters", func() bool { s := f.Stats(); return s.Pings == 18 && s.Connections == 0 && s.Closed == 9 })
	ask(t, f.Worker(0), func(w *Worker) error {
		if w.buffered != 0 || len(w.conns) != 0 || w.partial.front() != nil || w.idle.front() != nil {
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
	f, events := run(t, Config{Listeners: []Listener{gm(loop4)}, MaxBuffered: 65536}, recorder{})
	for range 3 {
		write(t, tcpPeer(t, f.Listeners()[0].Addr), sip("1", 60000)[:30000])
	}
	e := expect(t, events, "bad")
	mustEqual(t, "reason", e.reason, "buffered")
	expect(t, events, "closed")
	eventually(t, "counters", func() bool { s := f.Stats(); return s.Dropped(DropBuffered) == 1 && s.Connections == 2 })
}

// TestTCPPong: a lone CRLF is what a pong looks like, so it may stay for ever.
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

// TestConnectionLimit refuses what is too many and takes the next one when there is room.
func TestConnectionLimit(t *testing.T) {
	f, events := run(t, Config{Listeners: []Listener{gm(loop4)}, MaxConnections: 2}, recorder{onMsg: echo})
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
	if err := w.Post(func() { w.Dial(loop4, at, ims.Mw, false, 9) }); err != nil {
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
	f.acceptLoop(l, Listener{Addr: loop4})
	mustEqual(t, "calls", l.n, 4)
	mustEqual(t, "errors", f.acceptErrors.Load(), 3)
	// Ends while it backs off.
	l = &failing{errs: []error{unix.EMFILE}}
	time.AfterFunc(time.Millisecond, f.cancel)
	f.acceptLoop(l, Listener{Addr: loop4})
}
