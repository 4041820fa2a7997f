package front

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// affinity is a Steering of classic BPF: moved addresses go where they were moved to, all others to their Owner.
type affinity struct {
	t        *testing.T
	attach   error // what Attach and Move return, nothing attached then
	move     error
	override []unix.SockFilter // runs instead

	mu     sync.Mutex
	groups []group
	moved  map[netip.Addr]int
	calls  []string // of Move
}

type group struct {
	local     netip.AddrPort
	transport ims.Transport
	members   int
	fd        int
}

// newAffinity makes one whose descriptors are closed after the test.
func newAffinity(t *testing.T) *affinity {
	t.Helper()
	a := &affinity{t: t, moved: make(map[netip.Addr]int)}
	t.Cleanup(func() {
		for _, g := range a.groups {
			_ = unix.Close(g.fd)
		}
	})
	return a
}

func (a *affinity) Attach(local netip.AddrPort, tr ims.Transport, fds []int) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, fd := range fds {
		at, err := localAddr(fd)
		listens, err2 := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
		if err := errors.Join(err, err2); err != nil || at != local || (listens == 1) != (tr == ims.TCP) {
			a.t.Errorf("socket for %s/%s is at %s, listens: %d: %v", local, tr, at, listens, err)
		}
	}
	if a.attach != nil {
		return a.attach
	}
	fd, err := unix.FcntlInt(uintptr(fds[0]), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	g := group{local: local, transport: tr, members: len(fds), fd: fd}
	a.groups = append(a.groups, g)
	return a.program(g)
}

func (a *affinity) Move(addr netip.Addr, worker int) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.calls = append(a.calls, fmt.Sprintf("%s %d", addr, worker))
	if a.move != nil {
		return a.move
	}
	if a.moved[addr] = worker; worker < 0 {
		delete(a.moved, addr)
	}
	var errs []error
	for _, g := range a.groups {
		errs = append(errs, a.program(g))
	}
	return errors.Join(errs...)
}

// program puts the program for what is moved now into a group.
func (a *affinity) program(g group) error {
	p := a.override
	if p == nil {
		v6 := g.local.Addr().Is6()
		for addr, worker := range a.moved {
			if addr.Is6() == v6 {
				p = append(p, exception(addr, worker)...)
			}
		}
		p = append(p, steeringProgram(v6, g.members)...)
	}
	prog := unix.SockFprog{Len: uint16(len(p)), Filter: &p[0]}
	return os.NewSyscallError("setsockopt", unix.SetsockoptSockFprog(g.fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, &prog))
}

// exception returns the part of a program that sends one address to a worker.
func exception(addr netip.Addr, worker int) []unix.SockFilter {
	offset, b := uint32(sourceOffset4), addr.AsSlice()
	if addr.Is6() {
		offset = sourceOffset6
	}
	var p []unix.SockFilter
	for i := 0; i < len(b); i += 4 {
		word := uint32(b[i])<<24 | uint32(b[i+1])<<16 | uint32(b[i+2])<<8 | uint32(b[i+3])
		left := (len(b) - i) / 4 // words with this one
		p = append(p,
			unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: netOff + offset + uint32(i)},
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: word, Jf: uint8(2*left - 1)})
	}
	return append(p, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: uint32(worker)})
}

// peers are sources of packets of one family, in a namespace of theirs.
type peers struct {
	ns    *hostnet.NS
	at    netip.Addr // of the front
	addrs []netip.Addr
}

// newPeers has addresses of both workers of two, and of all of three.
func newPeers(t *testing.T, v6 bool) *peers {
	t.Helper()
	p := &peers{at: netip.MustParseAddr("10.99.0.1")}
	names := []string{"10.99.0.2", "10.99.0.3", "10.99.0.4", "10.99.1.5"}
	if v6 {
		p.at = netip.MustParseAddr("2001:db8::1")
		names = []string{"2001:db8::2", "2001:db8::3", "2001:db8::4", "2001:db8:0:1::5"}
	}
	local := []string{fmt.Sprintf("%s/%d", p.at, p.at.BitLen())}
	for _, n := range names {
		p.addrs = append(p.addrs, netip.MustParseAddr(n))
		local = append(local, fmt.Sprintf("%s/%d", n, p.at.BitLen()))
	}
	p.ns = namespace(t, local...)
	return p
}

// listener is where they send to.
func (p *peers) listener() Listener {
	l := gm(netip.AddrPortFrom(p.at, 0))
	l.Hidden = true
	return l
}

// udp opens a socket of one of them.
func (p *peers) udp(t *testing.T, from netip.Addr, to netip.AddrPort) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	if err := p.ns.Do(func() error { c = udpPeer(t, from.String(), to); return nil }); err != nil {
		t.Fatal(err)
	}
	return c
}

// tcp opens a connection of one of them.
func (p *peers) tcp(t *testing.T, from netip.Addr, to netip.AddrPort) net.Conn {
	t.Helper()
	var c net.Conn
	if err := p.ns.Do(func() (err error) {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
		c, err = d.Dial("tcp", to.String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// other returns a worker that an address does not belong to.
func other(f *Front, a netip.Addr) int { return (Owner(a, f.Workers()) + 1) % f.Workers() }

// TestSteering: with a steering program datagrams and connections come in where they belong, before an address is moved,
// afterwards, and when that is undone; nothing is handed over.
func TestSteering(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		t.Run(map[bool]string{false: "v4", true: "v6"}[v6], func(t *testing.T) {
			p := newPeers(t, v6)
			a := newAffinity(t)
			own, core := p.listener(), p.listener() // these two are nobody's to steer
			own.Worker, core.Side = 1, ims.Mw
			f, events := run(t, Config{
				Workers: 3, Hidden: p.ns, Steering: a, Listeners: []Listener{p.listener(), own, core},
			}, recorder{})
			at := f.Listeners()[0].Addr
			var got []group
			for _, g := range a.groups {
				g.fd = 0
				got = append(got, g)
			}
			if want := []group{{local: at, transport: ims.TCP, members: 3}, {local: at, transport: ims.UDP, members: 3}}; !slices.Equal(got, want) {
				t.Fatalf("steered groups %+v, want %+v", got, want)
			}
			datagrams := 0
			check := func(from netip.Addr, want int) {
				t.Helper()
				mustEqual(t, "owner", f.Owner(from), want)
				write(t, p.udp(t, from, at), sip("u", 0))
				mustEqual(t, "worker of datagram", expect(t, events, "message").worker, want)
				c := p.tcp(t, from, at)
				write(t, c, sip("t", 0))
				mustEqual(t, "worker of connection", expect(t, events, "message").worker, want)
				_ = c.Close()
				expect(t, events, "closed")
				datagrams++
			}
			for _, from := range p.addrs {
				check(from, Owner(from, 3))
				before := p.tcp(t, from, at)
				write(t, before, sip("1", 0))
				expect(t, events, "message")
				if err := f.Move(from, other(f, from)); err != nil {
					t.Fatal(err)
				}
				check(from, other(f, from))
				write(t, before, sip("2", 0))
				mustEqual(t, "worker of the connection before", expect(t, events, "message").worker, Owner(from, 3))
				_ = before.Close()
				expect(t, events, "closed")
			}
			for _, from := range p.addrs {
				check(from, other(f, from))
			}
			for _, from := range p.addrs {
				if err := f.Move(from, -1); err != nil {
					t.Fatal(err)
				}
				check(from, Owner(from, 3))
			}
			s := f.Stats()
			mustEqual(t, "datagrams", s.Side(ims.GmClear).DatagramsIn, uint64(datagrams))
			mustEqual(t, "handovers", s.Handovers, 0)
			mustEqual(t, "strays", s.Strays, 0)
		})
	}
}

// TestSteeringRefused: without the program the classic one steers, which is said once; and it is not told of moves.
func TestSteeringRefused(t *testing.T) {
	p := newPeers(t, false)
	a := newAffinity(t)
	a.attach = unix.EPERM
	var log logBuffer
	f, events := run(t, Config{
		Workers: 2, Hidden: p.ns, Steering: a, Logger: log.logger(), Listeners: []Listener{p.listener(), p.listener()},
	}, recorder{})
	for _, l := range f.Listeners() {
		for _, from := range p.addrs {
			write(t, p.udp(t, from, l.Addr), sip("u", 0))
			mustEqual(t, "worker of datagram", expect(t, events, "message").worker, Owner(from, 2))
			write(t, p.tcp(t, from, l.Addr), sip("t", 0))
			mustEqual(t, "worker of connection", expect(t, events, "message").worker, Owner(from, 2))
		}
	}
	if err := f.Move(p.addrs[0], other(f, p.addrs[0])); err != nil {
		t.Error(err)
	}
	s := f.Stats()
	mustEqual(t, "handovers", s.Handovers, 0)
	mustEqual(t, "strays", s.Strays, 0)
	mustEqual(t, "moves", len(a.calls), 0)
	mustEqual(t, "warnings", strings.Count(log.String(), "steering program cannot be used"), 1)
}

// TestStrays: a connection that comes in at the wrong worker's socket goes to its owner.
func TestStrays(t *testing.T) {
	p := newPeers(t, false)
	a := newAffinity(t)
	a.override = []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 1}}
	f, events := run(t, Config{Workers: 2, Hidden: p.ns, Steering: a, Listeners: []Listener{p.listener()}}, recorder{})
	strays := uint64(0)
	for _, from := range p.addrs {
		write(t, p.tcp(t, from, f.Listeners()[0].Addr), sip("t", 0))
		mustEqual(t, "worker", expect(t, events, "message").worker, Owner(from, 2))
		if Owner(from, 2) != 1 {
			strays++
		}
	}
	mustEqual(t, "strays", f.Stats().Strays, strays)
}

// TestSteeredClose: nothing is left of the sockets of a steered listener, and the address can be had again.
func TestSteeredClose(t *testing.T) {
	before := descriptors(t)
	a := newAffinity(t)
	a.attach = unix.EPERM // else it has duplicates
	f, events := run(t, Config{Workers: 3, Steering: a, Listeners: []Listener{gm(loop4)}}, recorder{})
	at := f.Listeners()[0].Addr
	write(t, tcpPeer(t, at), sip("t", 0))
	expect(t, events, "message")
	if _, err := New(Config{Workers: 3, Steering: a, Listeners: []Listener{gm(at)}}, []Handler{
		&recorder{}, &recorder{}, &recorder{},
	}); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("a second front at %s: %v", at, err)
	}
	closeFront(t, f)
	again, _ := run(t, Config{Workers: 3, Steering: a, Listeners: []Listener{gm(at)}}, recorder{})
	closeFront(t, again)
	mustEqual(t, "descriptors beside the peer's", descriptors(t)-before, 1)
}

// TestMoveQueued moves an address while datagrams from it wait in the socket of its worker.
func TestMoveQueued(t *testing.T) {
	const n = 100
	p := newPeers(t, false)
	from := p.addrs[0] // of worker 0
	a := newAffinity(t)
	f, events := run(t, Config{Workers: 2, Hidden: p.ns, Steering: a, Listeners: []Listener{p.listener()}}, recorder{})
	mustEqual(t, "owner", f.Owner(from), 0)
	hold, held := make(chan struct{}), make(chan struct{})
	if err := f.Worker(0).Post(func() { close(held); <-hold }); err != nil {
		t.Fatal(err)
	}
	<-held
	c := p.udp(t, from, f.Listeners()[0].Addr)
	for i := range n {
		write(t, c, sip(fmt.Sprint(i), 0))
	}
	if err := f.Move(from, 1); err != nil {
		t.Fatal(err)
	}
	close(hold)
	for i := range n {
		e := expect(t, events, "message")
		if e.worker != 1 || e.msg != sip(fmt.Sprint(i), 0) {
			t.Fatalf("message %d: %+v", i, e)
		}
	}
	mustEqual(t, "handovers", f.Stats().Handovers, n)
	for range n {
		write(t, c, sip("new", 0))
		mustEqual(t, "worker", expect(t, events, "message").worker, 1)
	}
	mustEqual(t, "handovers", f.Stats().Handovers, n)
}

func TestMoveErrors(t *testing.T) {
	p := newPeers(t, false)
	a := newAffinity(t)
	f, _ := run(t, Config{Workers: 2, Hidden: p.ns, Steering: a, Listeners: []Listener{p.listener()}}, recorder{})
	addr := p.addrs[0] // of worker 0
	if err := f.Move(netip.Addr{}, 1); !errors.Is(err, ErrAddress) {
		t.Errorf("no address: %v", err)
	}
	if err := f.Move(addr, 2); !errors.Is(err, ErrNoWorker) {
		t.Errorf("no such worker: %v", err)
	}
	mustEqual(t, "owner", f.Owner(addr), 0)
	a.move = unix.ENOSPC
	if err := f.Move(netip.AddrFrom16(addr.As16()), 1); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("steering fails: %v", err)
	}
	mustEqual(t, "owner after all", f.Owner(addr), 1)
	a.move = nil
	if err := f.Move(addr, 0); err != nil { // where it belongs anyway
		t.Error(err)
	}
	mustEqual(t, "owner", f.Owner(addr), 0)
	mustEqual(t, "exceptions", f.homes.moved.Load(), 0)
	mustEqual(t, "calls", fmt.Sprint(a.calls), fmt.Sprintf("[%s 1 %s -1]", addr, addr))
}

// TestMoveRace moves addresses to and fro under traffic: every message is handled, once.
func TestMoveRace(t *testing.T) {
	const n = 3000
	p := newPeers(t, false)
	a := newAffinity(t)
	var handled [n]atomic.Int32
	var total atomic.Int64
	f, _ := run(t, Config{Workers: 2, Hidden: p.ns, Steering: a, Listeners: []Listener{p.listener()}}, recorder{
		onMsg: func(_ *Worker, _ ims.Flow, msg []byte) {
			var i int
			if _, err := fmt.Sscanf(string(msg), "MESSAGE sip:%d SIP/2.0", &i); err != nil {
				panic(err)
			}
			handled[i].Add(1)
			total.Add(1)
		},
	})
	at := f.Listeners()[0].Addr
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for _, from := range p.addrs[:2] {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				if err := f.Move(from, i%3-1); err != nil {
					t.Error(err)
				}
			}
		})
	}
	var conns []*net.UDPConn
	for _, from := range p.addrs {
		conns = append(conns, p.udp(t, from, at))
	}
	for i := range n {
		write(t, conns[i%len(conns)], fmt.Sprintf("MESSAGE sip:%d SIP/2.0", i))
		if i%100 == 99 { // the queues have limits
			eventually(t, "messages are handled", func() bool { return total.Load() == int64(i+1) })
		}
	}
	close(stop)
	wg.Wait()
	for i := range handled {
		if got := handled[i].Load(); got != 1 {
			t.Errorf("message %d was handled %d times", i, got)
		}
	}
}

func TestHomes(t *testing.T) {
	const workers = 4
	var h homes
	addr := func(i int) netip.Addr {
		if i%2 == 0 {
			return netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
		}
		return netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 13: byte(i >> 16), 14: byte(i >> 8), 15: byte(i)})
	}
	const n = 5000
	for i := range n {
		h.setLocked(addr(i), i%workers)
	}
	for i := range n { // again, changed
		h.setLocked(addr(i), (i+1)%workers)
	}
	mustEqual(t, "exceptions", h.moved.Load(), n)
	for i := range n {
		if got, want := h.owner(addr(i), workers), (i+1)%workers; got != want {
			t.Fatalf("%s: worker %d, want %d", addr(i), got, want)
		}
		if a := addr(i + n); h.owner(a, workers) != Owner(a, workers) {
			t.Fatalf("%s was not moved", a)
		}
	}
	mustEqual(t, "mapped", h.owner(netip.AddrFrom16(addr(2).As16()), workers), 3)
	mustEqual(t, "zone", h.owner(addr(3).WithZone("lo"), workers), 0)
	mustEqual(t, "invalid", h.owner(netip.Addr{}, workers), 0)
	longest := 0
	for i := range h.buckets {
		longest = max(longest, len(*h.buckets[i].Load()))
	}
	if longest > 4*n/homeBuckets {
		t.Errorf("one bucket of %d has %d of %d exceptions", homeBuckets, longest, n)
	}
	if got := testing.AllocsPerRun(100, func() { h.owner(addr(7), workers); h.owner(addr(n+8), workers) }); got != 0 && !raceEnabled {
		t.Errorf("a look-up allocates %v times", got)
	}
	for i := range n {
		h.setLocked(addr(i), -1)
		h.setLocked(addr(i), -1) // nothing to undo
	}
	mustEqual(t, "exceptions", h.moved.Load(), 0)
	for i := range h.buckets {
		if h.buckets[i].Load() != nil {
			t.Fatal("a bucket is left")
		}
	}
	for i := range n {
		mustEqual(t, "owner", h.owner(addr(i), workers), Owner(addr(i), workers))
	}
}

// BenchmarkOwner compares the hash with a look-up where nothing was moved, and where something was.
func BenchmarkOwner(b *testing.B) {
	a := netip.MustParseAddr("10.45.0.7")
	sum := 0
	b.Run("hash", func(b *testing.B) {
		for b.Loop() {
			sum += Owner(a, 4)
		}
	})
	h := new(homes)
	b.Run("homes", func(b *testing.B) {
		for b.Loop() {
			sum += h.owner(a, 4)
		}
	})
	for i := range 1000 {
		h.setLocked(netip.AddrFrom4([4]byte{10, 45, byte(i >> 8), byte(i)}), i%4)
	}
	b.Run("homes with 1000 moved", func(b *testing.B) {
		for b.Loop() {
			sum += h.owner(a, 4)
		}
	})
	if sum < 0 {
		b.Fatal(sum)
	}
}
