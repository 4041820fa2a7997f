package front

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
)

func TestUDP(t *testing.T) {
	for _, tt := range []struct {
		name string
		addr netip.AddrPort
	}{{"v4", loop4}, {"v6", loop6}} {
		t.Run(tt.name, func(t *testing.T) {
			f, events := run(t, Config{Listeners: []Listener{gm(tt.addr)}}, recorder{onMsg: echo})
			at := f.Listeners()[0].Addr
			c := udpPeer(t, "", at)
			buf := make([]byte, 65536)
			for i, size := range []int{20, 900, 60000} {
				msg := sip(fmt.Sprint(i), size)
				write(t, c, msg)
				e := expect(t, events, "message")
				want := ims.Flow{Local: at, Remote: addrOf(c.LocalAddr()), Transport: ims.UDP, Side: ims.GmClear}
				mustEqual(t, "flow", e.flow, want)
				n, err := c.Read(buf)
				if err != nil {
					t.Fatal(err)
				}
				if got := string(buf[:n]); got != msg || e.msg != msg {
					t.Errorf("message of %d octets changed", size)
				}
			}
			eventually(t, "counters", func() bool {
				st := f.Stats()
				s := st.Side(ims.GmClear)
				return s.DatagramsIn == 3 && s.DatagramsOut == 3 && s.MessagesIn == 3 && s.MessagesOut == 3 && s.BytesIn == s.BytesOut
			})
		})
	}
}

// TestUDPBatch has a queue of datagrams waiting when the loop looks: all arrive, in order, and leave in few calls.
func TestUDPBatch(t *testing.T) {
	const n = 1000
	hold := make(chan struct{})
	var first atomic.Bool
	f, _ := run(t, Config{Listeners: []Listener{gm(loop4)}}, recorder{onMsg: func(w *Worker, fl ims.Flow, msg []byte) {
		if first.CompareAndSwap(false, true) {
			<-hold
		}
		echo(w, fl, msg)
	}})
	c := udpPeer(t, "", f.Listeners()[0].Addr)
	if err := c.SetReadBuffer(4 << 20); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		write(t, c, fmt.Sprintf("MESSAGE sip:%d SIP/2.0", i))
	}
	close(hold)
	buf := make([]byte, 2048)
	for i := range n {
		k, err := c.Read(buf)
		if err != nil {
			t.Fatalf("datagram %d: %v", i, err)
		}
		if want := fmt.Sprintf("MESSAGE sip:%d SIP/2.0", i); string(buf[:k]) != want {
			t.Fatalf("got %q, want %q", buf[:k], want)
		}
	}
	eventually(t, "counters", func() bool { s := f.Stats(); return s.Side(ims.GmClear).DatagramsOut == n })
	st := f.Stats()
	if st.Wakeups > n/20 || st.SendBatches > n/20 {
		t.Errorf("%d messages took %d wake-ups and %d send calls", n, st.Wakeups, st.SendBatches)
	}
}

func TestUDPIgnored(t *testing.T) {
	stun := "\x00\x01\x00\x00\x21\x12\xa4\x42abcdefghijkl"
	f, events := run(t, Config{Listeners: []Listener{gm(loop4)}, MaxMessage: 2000}, recorder{})
	c := udpPeer(t, "", f.Listeners()[0].Addr)
	for _, s := range []string{
		"", "\r\n", "\r\n\r\n", "\n\n\n", "\x00\x00\x00\x00", stun, // keep-alive
		"hello", "SIP/2.0 200", // runts
		strings.Repeat("x", 2001), "MESSAGE sip:a SIP/2.0" + strings.Repeat(" ", 3000), // oversize
		"\r\n\r\nMESSAGE sip:a SIP/2.0", // a message
	} {
		write(t, c, s)
	}
	e := expect(t, events, "message")
	mustEqual(t, "message", e.msg, "MESSAGE sip:a SIP/2.0")
	eventually(t, "counters", func() bool {
		s := f.Stats()
		return s.Dropped(DropKeepalive) == 6 && s.Dropped(DropRunt) == 2 && s.Dropped(DropOversize) == 2
	})
	st := f.Stats()
	mustEqual(t, "datagrams sent", st.Side(ims.GmClear).DatagramsOut, 0)
}

func TestSendErrors(t *testing.T) {
	ns := namespace(t) // where nothing is routed
	f, _ := run(t, Config{Hidden: ns, Listeners: []Listener{
		{Addr: loop4, Side: ims.GmClear, UDP: true, Hidden: true, Worker: -1},
		{Addr: loop6, Side: ims.Mw, UDP: true, Hidden: true, Worker: 0},
	}}, recorder{})
	at := f.Listeners()[0].Addr
	var sink *net.UDPConn
	if err := ns.Do(func() error { sink = udpPeer(t, "", at); return nil }); err != nil {
		t.Fatal(err)
	}
	to := addrOf(sink.LocalAddr())
	w := f.Worker(0)
	result := make(chan []error, 1)
	if err := w.Post(func() {
		big := make([]byte, maxDatagram+1)
		result <- []error{
			w.SendUDP(netip.MustParseAddrPort("127.0.0.9:9"), to, big[:9]),
			w.SendUDP(at, netip.MustParseAddrPort("[::1]:9"), big[:9]),
			w.SendUDP(at, netip.AddrPortFrom(to.Addr(), 0), big[:9]),
			w.SendUDP(at, netip.AddrPort{}, big[:9]),
			w.SendUDP(at, to, nil),
			w.SendUDP(at, to, big),
			w.SendUDP(f.Listeners()[1].Addr, netip.MustParseAddrPort("[2001:db8::9]:9"), big[:9]), // no route: counted
			w.SendUDP(at, netip.MustParseAddrPort("255.255.255.255:9"), big[:9]),                  // EACCES: counted
			w.SendUDP(at, to, []byte("the rest arrives")),
			w.Hand(7, ims.Flow{}, big),
			w.Hand(0, ims.Flow{Side: 9}, big),
			w.SendTCP(1, big),
		}
	}); err != nil {
		t.Fatal(err)
	}
	want := []error{ErrNoListener, ErrAddress, ErrAddress, ErrAddress, ErrSize, ErrSize, nil, nil, nil, ErrNoWorker, ErrSide, ErrNoConn}
	for i, err := range <-result {
		if !errors.Is(err, want[i]) {
			t.Errorf("call %d: got %v, want %v", i, err, want[i])
		}
	}
	buf := make([]byte, 100)
	n, err := sink.Read(buf)
	if err != nil || string(buf[:n]) != "the rest arrives" {
		t.Errorf("got %q, %v", buf[:n], err)
	}
	eventually(t, "counters", func() bool {
		s := f.Stats()
		return s.Dropped(DropUnreachable) == 1 && s.Dropped(DropPermission) == 1
	})
}

// TestFlushErrors looks at a queue whose middle datagrams the kernel refuses.
func TestFlushErrors(t *testing.T) {
	fd, err := openSocket(unix.SOCK_DGRAM, loop4, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd) //nolint:errcheck // test
	to, err := localAddr(fd)
	if err != nil {
		t.Fatal(err)
	}
	q := newSendQueue()
	forbidden := netip.MustParseAddrPort("255.255.255.255:9")
	for _, a := range []netip.AddrPort{forbidden, to, to, forbidden, forbidden, to} {
		q.add(a, []byte("datagram"))
	}
	got := ""
	q.flush(fd, func(_ int, errno unix.Errno) {
		if errno == 0 {
			got += "s"
		} else {
			got += map[Drop]string{DropPermission: "p"}[sendDrop(errno)]
		}
	})
	mustEqual(t, "results", got, "psspps")
	mustEqual(t, "left", q.n, 0)

	// A full buffer: of a socket pair, since loopback delivers at once.
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(p[:])
	for range batchSize {
		q.add(to, make([]byte, 60000))
	}
	for i := range q.hdr {
		q.hdr[i].Hdr.Name, q.hdr[i].Hdr.Namelen = nil, 0
	}
	ok, full := 0, 0
	q.flush(p[0], func(_ int, errno unix.Errno) {
		switch {
		case errno == 0:
			ok++
		case sendDrop(errno) == DropSendBuffer:
			full++
		}
	})
	if ok == 0 || full == 0 || ok+full != batchSize {
		t.Errorf("%d sent and %d dropped of %d", ok, full, batchSize)
	}
	for errno, want := range map[unix.Errno]Drop{
		unix.ECONNREFUSED: DropRefused, unix.EMSGSIZE: DropMessageSize, unix.EIO: DropSendOther, unix.ENOBUFS: DropSendBuffer,
		unix.EHOSTUNREACH: DropUnreachable, unix.EPERM: DropPermission,
	} {
		mustEqual(t, errno.Error(), sendDrop(errno), want)
	}
}

// TestTwoWorkers has peers of both workers: the steering program and, with it off, the hand-over bring each message to
// its owner.
//
// Peers: A1.03d
func TestTwoWorkers(t *testing.T) {
	for _, family := range []struct {
		name  string
		addr  netip.AddrPort
		peers []string
	}{
		{"v4", netip.MustParseAddrPort("127.0.0.1:0"), []string{"127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"}},
		{"v6", netip.MustParseAddrPort("[2001:db8::1]:0"), []string{"2001:db8::2", "2001:db8::3", "2001:db8:0:1::4", "2001:db8::5"}},
	} {
		for _, steering := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/steering=%v", family.name, steering), func(t *testing.T) {
				var addrs []string
				if family.addr.Addr().Is6() {
					addrs = []string{"2001:db8::1/128"}
					for _, p := range family.peers {
						addrs = append(addrs, p+"/128")
					}
				}
				ns := namespace(t, addrs...)
				l := gm(family.addr)
				l.Hidden = true
				f, events := run(t, Config{Workers: 2, Listeners: []Listener{l}, Hidden: ns}, recorder{onMsg: echo})
				at := f.Listeners()[0].Addr
				if !steering {
					// All to the first member: every second peer's messages are then on the wrong worker.
					p := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0}}
					prog := unix.SockFprog{Len: 1, Filter: &p[0]}
					if err := unix.SetsockoptSockFprog(f.Worker(0).sockets[0].fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, &prog); err != nil {
						t.Fatal(err)
					}
				}
				const each = 20
				for _, p := range family.peers {
					var c *net.UDPConn
					if err := ns.Do(func() error { c = udpPeer(t, p, at); return nil }); err != nil {
						t.Fatal(err)
					}
					buf := make([]byte, 2048)
					for i := range each {
						write(t, c, sip(fmt.Sprint(i), 10))
						e := expect(t, events, "message")
						mustEqual(t, "worker", e.worker, Owner(netip.MustParseAddr(p), 2))
						mustEqual(t, "remote", e.flow.Remote, addrOf(c.LocalAddr()))
						if n, err := c.Read(buf); err != nil || string(buf[:n]) != e.msg {
							t.Fatalf("answer: %q, %v", buf[:n], err)
						}
					}
				}
				want := uint64(0)
				if !steering {
					for _, p := range family.peers {
						want += uint64(each * Owner(netip.MustParseAddr(p), 2))
					}
				}
				eventually(t, "counters", func() bool { s := f.Stats(); return s.Side(ims.GmClear).MessagesIn == each*4 })
				mustEqual(t, "handovers", f.Stats().Handovers, want)
			})
		}
	}
}

func TestOwner(t *testing.T) {
	for _, tt := range []struct {
		addr    string
		workers int
		want    int
	}{
		{"10.0.0.5", 1, 0},
		{"10.0.0.5", 2, 1},
		{"10.0.0.6", 2, 0},
		{"0.0.1.4", 7, 260 % 7},
		{"::ffff:0.0.1.4", 7, 260 % 7},
		{"255.255.255.255", 10, 5},
		{"2001:db8::1", 1000, (0x20010db8 ^ 1) % 1000},
		{"1:2:3:4:5:6:7:8", 1 << 20, (0x00010002 ^ 0x00030004 ^ 0x00050006 ^ 0x00070008) % (1 << 20)},
		{"fe80::1%eth0", 2, (0xfe800000 ^ 1) % 2},
	} {
		mustEqual(t, tt.addr, Owner(netip.MustParseAddr(tt.addr), tt.workers), tt.want)
	}
	mustEqual(t, "invalid", Owner(netip.Addr{}, 3), 0)
}

// TestOtherWorkersListener sends from a listener that only another worker receives on.
func TestOtherWorkersListener(t *testing.T) {
	cfg := Config{Workers: 2}
	for k := range 2 {
		cfg.Listeners = append(cfg.Listeners, Listener{Addr: loop4, Side: ims.Mw, UDP: true, Worker: k})
	}
	f, events := run(t, cfg, recorder{})
	for k := range 2 {
		at := f.Listeners()[k].Addr
		c := udpPeer(t, "127.0.0.2", at)
		write(t, c, sip("1", 0))
		mustEqual(t, "worker", expect(t, events, "message").worker, k)
		for sender := range 2 {
			w := f.Worker(sender)
			if err := w.Post(func() { _ = w.SendUDP(at, addrOf(c.LocalAddr()), []byte{byte(sender)}) }); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 9)
			if n, err := c.Read(buf); err != nil || n != 1 || int(buf[0]) != sender {
				t.Fatalf("from worker %d: %v, %v", sender, buf[:n], err)
			}
		}
	}
}

// TestFlood fills a small receive buffer: the kernel's drops are counted and the loop lives.
func TestFlood(t *testing.T) {
	hold := make(chan struct{})
	var first atomic.Bool
	f, _ := run(t, Config{Listeners: []Listener{gm(loop4)}, ReadBuffer: 4096, WriteBuffer: 4096}, recorder{
		onMsg: func(w *Worker, fl ims.Flow, msg []byte) {
			if first.CompareAndSwap(false, true) {
				<-hold
			}
			echo(w, fl, msg)
		},
	})
	c := udpPeer(t, "", f.Listeners()[0].Addr)
	for range 5000 {
		write(t, c, sip("flood", 500))
	}
	close(hold)
	eventually(t, "drops of the kernel", func() bool { s := f.Stats(); return s.Dropped(DropSocketQueue) > 4000 })
	s := f.Stats()
	mustEqual(t, "all accounted for", s.Dropped(DropSocketQueue)+s.Side(ims.GmClear).DatagramsIn, 5000)
}

// TestDrainAllocs drives the machinery of a wake-up without gnet: nothing may be allocated.
func TestDrainAllocs(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	for _, a := range []netip.AddrPort{loop4, loop6} {
		f := &Front{cfg: Config{MaxMessage: defaultMaxMessage}}
		f.homes.setLocked(netip.MustParseAddr("192.0.2.1"), 0)
		w := &Worker{f: f, rx: newReceiver(defaultMaxMessage), arena: make([]byte, arenaSize), booted: true}
		f.workers = []*Worker{w}
		h := &forwarder{w: w}
		w.h = h
		fd, err := openSocket(unix.SOCK_DGRAM, a, []option{
			{level: unix.SOL_SOCKET, name: unix.SO_RCVMARK, value: 1, optional: true},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd) //nolint:errcheck // test
		at, err := localAddr(fd)
		if err != nil {
			t.Fatal(err)
		}
		h.to = at // to itself: the next run receives what this one sends
		s := &udpSocket{fd: fd, addr: at, side: ims.GmClear, out: newSendQueue(), report: w.reporter(ims.GmClear), own: true, steered: true}
		w.sockets = []*udpSocket{s}
		msg := []byte(sip("1", 500))
		event := func() {
			w.enter()
			w.drainUDP(s, at, msg)
			w.leave()
		}
		for range 100 {
			event()
		}
		before := h.n
		if n := testing.AllocsPerRun(200, event); n != 0 {
			t.Errorf("%s: %v allocations per event", a.Addr(), n)
		}
		if h.n-before < 2*200 || w.st.ReadBatches == 0 || w.st.SendBatches == 0 || w.st.Side(ims.GmClear).DatagramsOut == 0 {
			t.Errorf("%s: %d messages, %+v: not driven", a.Addr(), h.n-before, w.st)
		}
	}
}

// forwarder sends every message on.
type forwarder struct {
	recorder
	w  *Worker
	to netip.AddrPort
	n  int
}

func (h *forwarder) Message(f ims.Flow, msg []byte) {
	h.n++
	if h.n%70 == 69 {
		return // else there would be one more each time
	}
	_ = h.w.SendUDP(f.Local, h.to, msg)
}
