package guard

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// crew is a reuseport group of one socket for each worker, at one address of a namespace in which all of 10.0.0.0/8 and of
// 2001:db8::/32 is local.
type crew struct {
	ns    *hostnet.NS
	local netip.AddrPort
	t     ims.Transport
	fds   []int

	phones []int // connections that nobody has accepted yet
}

var (
	crewLocal4 = netip.MustParseAddrPort("10.255.0.1:5060")
	crewLocal6 = netip.MustParseAddrPort("[2001:db8:ffff::1]:5060")
)

func crewNS(t testing.TB) *hostnet.NS {
	t.Helper()
	mayHook(t)
	ns := newNS(t)
	must(t, ns.AddLocal(netip.MustParsePrefix("10.0.0.0/8")))
	must(t, ns.AddLocal(netip.MustParsePrefix("2001:db8::/32")))
	return ns
}

func newCrew(t testing.TB, ns *hostnet.NS, local netip.AddrPort, tr ims.Transport, workers int) *crew {
	t.Helper()
	c := &crew{ns: ns, local: local, t: tr, fds: make([]int, workers)}
	for k := range c.fds {
		c.fds[k] = -1
		c.reopen(t, k)
	}
	t.Cleanup(func() {
		for k := range c.fds {
			c.close(k)
		}
	})
	return c
}

func (c *crew) close(k int) {
	if c.fds[k] >= 0 {
		_ = unix.Close(c.fds[k])
	}
	c.fds[k] = -1
}

// reopen makes a worker's socket anew.
func (c *crew) reopen(t testing.TB, k int) {
	t.Helper()
	c.close(k)
	must(t, c.ns.Do(func() error {
		kind := unix.SOCK_DGRAM
		if c.t == ims.TCP {
			kind = unix.SOCK_STREAM
		}
		fd, err := unix.Socket(socketFamily(c.local.Addr()), kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		c.fds[k] = fd
		if err := errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1), freebind(fd, c.local.Addr()), unix.Bind(fd, sockaddr(c.local))); err != nil {
			return err
		}
		if c.t == ims.TCP {
			return unix.Listen(fd, 128)
		}
		return nil
	}))
}

// freebind allows an IPv6 address that is local by its route alone.
func freebind(fd int, a netip.Addr) error {
	if a.Is4() {
		return nil
	}
	return unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_FREEBIND, 1)
}

func socketFamily(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// send sends one datagram, or opens one connection, from an address.
func (c *crew) send(t testing.TB, from netip.AddrPort) {
	t.Helper()
	must(t, c.ns.Do(func() error { return c.sendHere(from) }))
}

// sendHere is send for a thread that is in the namespace.
func (c *crew) sendHere(from netip.AddrPort) error {
	kind := unix.SOCK_DGRAM
	if c.t == ims.TCP {
		kind = unix.SOCK_STREAM
	}
	fd, err := unix.Socket(socketFamily(from.Addr()), kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if c.t == ims.TCP {
		c.phones = append(c.phones, fd)
	} else {
		defer unix.Close(fd) //nolint:errcheck // what was sent is sent
	}
	if err := errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), freebind(fd, from.Addr()), unix.Bind(fd, sockaddr(from))); err != nil {
		return err
	}
	if c.t == ims.TCP {
		// Reset at the end, once it was accepted: the ports of the test are to be free again at once.
		if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
			return err
		}
		return unix.Connect(fd, sockaddr(c.local))
	}
	return unix.Sendto(fd, []byte("x"), 0, sockaddr(c.local))
}

// take returns the worker that has got the one packet or connection that is there, -1 if none has.
func (c *crew) take(t testing.TB) int {
	t.Helper()
	got := -1
	b := make([]byte, 16)
	for end := time.Now().Add(patience); got < 0 && time.Now().Before(end); {
		for k, fd := range c.fds {
			if fd < 0 {
				continue
			}
			var err error
			if c.t == ims.TCP {
				var conn int
				if conn, _, err = unix.Accept4(fd, unix.SOCK_CLOEXEC); err == nil {
					err = errors.Join(unix.SetsockoptLinger(conn, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}), unix.Close(conn))
				}
			} else {
				_, _, err = unix.Recvfrom(fd, b, 0)
			}
			switch {
			case err == nil && got >= 0:
				t.Fatalf("workers %d and %d have got it", got, k)
			case err == nil:
				got = k
			case !errors.Is(err, unix.EAGAIN):
				t.Fatal(err)
			}
		}
	}
	for _, fd := range c.phones {
		_ = unix.Close(fd)
	}
	c.phones = nil
	return got
}

// lands sends and returns the worker.
func (c *crew) lands(t testing.TB, from netip.AddrPort) int {
	t.Helper()
	c.send(t, from)
	return c.take(t)
}

// owner is front.Owner, written again.
func owner(a netip.Addr, workers int) int {
	b := a.AsSlice()
	var w uint32
	for i := 0; i < len(b); i += 4 {
		w ^= binary.BigEndian.Uint32(b[i:])
	}
	return int(w % uint32(workers))
}

func openSteering(t testing.TB, workers, groups int) *Steering {
	t.Helper()
	s, err := OpenSteering(workers, groups)
	must(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func steerStats(t testing.TB, s *Steering) SteerStats {
	t.Helper()
	st, err := s.Stats()
	must(t, err)
	return st
}

// counted compares a counter. Of TCP, what is sent again or after the end is steered as well.
func (c *crew) counted(got, want uint64) bool { return got == want || c.t == ims.TCP && got > want }

// crews runs a test for UDP and TCP, IPv4 and IPv6.
func crews(t *testing.T, workers int, f func(*testing.T, *Steering, *crew)) {
	for _, local := range []netip.AddrPort{crewLocal4, crewLocal6} {
		for _, tr := range []ims.Transport{ims.UDP, ims.TCP} {
			version := "4"
			if local.Addr().Is6() {
				version = "6"
			}
			t.Run(tr.String()+version, func(t *testing.T) {
				s := openSteering(t, workers, 1)
				c := newCrew(t, crewNS(t), local, tr, workers)
				must(t, s.Attach(c.local, c.t, c.fds))
				f(t, s, c)
			})
		}
	}
}

// phone is the nth phone's address and port.
func (c *crew) phone(n int) netip.AddrPort {
	if c.local.Addr().Is4() {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}), 5062)
	}
	b := netip.MustParseAddr("2001:db8::1").As16()
	binary.BigEndian.PutUint32(b[6:], uint32(n)*2654435761) // all over the address
	binary.BigEndian.PutUint32(b[12:], uint32(n))
	return netip.AddrPortFrom(netip.AddrFrom16(b), 5062)
}

// TestSteerHash compares the worker of thousands of addresses with that of the hash.
func TestSteerHash(t *testing.T) {
	const workers, phones = 3, 1000
	crews(t, workers, func(t *testing.T, s *Steering, c *crew) {
		used := [workers]int{}
		for n := range phones {
			from := c.phone(n*7 + 1)
			k := c.lands(t, from)
			if want := owner(from.Addr(), workers); k != want {
				t.Fatalf("%s came to worker %d, want %d", from, k, want)
			}
			used[k]++
		}
		for k, n := range used {
			if n == 0 {
				t.Errorf("worker %d has got nothing: %v", k, used)
			}
		}
		if st := steerStats(t, s); !c.counted(st.Hash, phones) || st.Affinity+st.Kernel != 0 {
			t.Errorf("counters %+v, want %d by the hash", st, phones)
		}
	})
}

// TestSteerMove moves an address and a flow of it to and fro. The very next packet goes to the new worker.
func TestSteerMove(t *testing.T) {
	const workers, flips = 3, 200
	crews(t, workers, func(t *testing.T, s *Steering, c *crew) {
		a := c.phone(1)
		other := netip.AddrPortFrom(a.Addr(), a.Port()+1) // another port of the same phone
		flow := Flow{Source: a, DestinationPort: c.local.Port()}
		home := owner(a.Addr(), workers)
		for i := range flips {
			byAddress, byFlow := i%workers, (i/workers+i+1)%workers
			must(t, s.Move(a.Addr(), byAddress))
			if k := c.lands(t, a); k != byAddress {
				t.Fatalf("flip %d: worker %d after Move, want %d", i, k, byAddress)
			}
			must(t, s.MoveFlow(flow, byFlow))
			if k := c.lands(t, a); k != byFlow {
				t.Fatalf("flip %d: worker %d after MoveFlow, want %d", i, k, byFlow)
			}
			if k := c.lands(t, other); k != byAddress {
				t.Fatalf("flip %d: another flow came to worker %d, want that of the address, %d", i, k, byAddress)
			}
			must(t, s.MoveFlow(flow, -1))
			if k := c.lands(t, a); k != byAddress {
				t.Fatalf("flip %d: worker %d after the flow's end, want %d", i, k, byAddress)
			}
		}
		if st := steerStats(t, s); st.Exceptions != 1 || !c.counted(st.Affinity, 4*flips) {
			t.Errorf("counters %+v", st)
		}
		must(t, s.Move(a.Addr(), -1))
		must(t, s.Move(a.Addr(), -1)) // nothing to undo
		if k := c.lands(t, a); k != home {
			t.Errorf("worker %d after all, want %d", k, home)
		}
		if st := steerStats(t, s); st.Exceptions != 0 || !c.counted(st.Hash, 1) || st.Capacity != defaultExceptions {
			t.Errorf("counters %+v", st)
		}
	})
}

// TestSteerClosedSocket leaves packets of a worker without a socket to the kernel, and takes the new socket when there is one.
func TestSteerClosedSocket(t *testing.T) {
	const workers = 3
	crews(t, workers, func(t *testing.T, s *Steering, c *crew) {
		a := c.phone(1)
		k := owner(a.Addr(), workers)
		c.close(k)
		if got := c.lands(t, a); got < 0 || got == k {
			t.Errorf("worker %d has got it without a socket", got)
		}
		if st := steerStats(t, s); st.Kernel != 1 || st.Hash != 0 {
			t.Errorf("counters %+v, want one left to the kernel", st)
		}
		c.reopen(t, k)
		must(t, s.Attach(c.local, c.t, c.fds))
		if got := c.lands(t, a); got != k {
			t.Errorf("worker %d, want %d with its new socket", got, k)
		}
		for k := range workers { // all of them anew, as after a restart of the listener
			c.reopen(t, k)
		}
		must(t, s.Attach(c.local, c.t, c.fds))
		for n := range 50 {
			if got, want := c.lands(t, c.phone(n)), owner(c.phone(n).Addr(), workers); got != want {
				t.Fatalf("worker %d, want %d", got, want)
			}
		}
	})
}

// TestSteerNamespaces steers groups of several namespaces, which need not be that of the process, apart by their ends.
func TestSteerNamespaces(t *testing.T) {
	const workers = 2
	s := openSteering(t, workers, 4)
	all := []*crew{
		newCrew(t, crewNS(t), crewLocal4, ims.UDP, workers), newCrew(t, crewNS(t), crewLocal6, ims.UDP, workers),
		newCrew(t, crewNS(t), netip.MustParseAddrPort("10.255.0.1:6001"), ims.UDP, workers),
		newCrew(t, crewNS(t), netip.MustParseAddrPort("10.255.0.1:5060"), ims.TCP, workers),
	}
	for _, c := range all {
		must(t, s.Attach(c.local, c.t, c.fds))
	}
	for n := range 50 {
		for _, c := range all {
			a := c.phone(n)
			must(t, s.MoveFlow(Flow{a, 6001}, 1-owner(a.Addr(), workers)))
			want := owner(a.Addr(), workers)
			if c.local.Port() == 6001 {
				want = 1 - want
			}
			if k := c.lands(t, a); k != want {
				t.Fatalf("%s/%s: worker %d, want %d", c.local, c.t, k, want)
			}
		}
	}
}

// TestSteerErrors refuses what it has no room or no sense for.
func TestSteerErrors(t *testing.T) {
	mayHook(t)
	const workers = 2
	s := openSteering(t, workers, 1)
	ns := crewNS(t)
	c := newCrew(t, ns, crewLocal4, ims.UDP, workers)
	more := newCrew(t, ns, crewLocal6, ims.UDP, workers)
	must(t, s.Attach(c.local, c.t, c.fds))
	must(t, s.Attach(c.local, c.t, c.fds))
	if err := s.Attach(more.local, more.t, more.fds); err == nil || !strings.Contains(err.Error(), "1 groups already") {
		t.Errorf("error %v for one group too many", err)
	}
	if err := s.Attach(c.local, c.t, c.fds[:1]); err == nil {
		t.Error("no error for too few sockets")
	}
	for _, err := range []error{
		s.Move(netip.MustParseAddr("10.0.0.1"), workers), s.Move(netip.Addr{}, 0), s.MoveFlow(Flow{}, 0),
	} {
		if err == nil {
			t.Error("no error")
		}
	}
	if k := c.lands(t, c.phone(1)); k != owner(c.phone(1).Addr(), workers) {
		t.Errorf("worker %d after the errors", k)
	}
	for _, n := range [][2]int{{0, 1}, {1, 0}} {
		if _, err := OpenSteering(n[0], n[1]); err == nil {
			t.Errorf("no error for %d workers and %d groups", n[0], n[1])
		}
	}
}

// TestSteerForeignGroup leaves a group that it does not know to the kernel: the program may be on sockets whose entry is gone.
func TestSteerForeignGroup(t *testing.T) {
	const workers = 2
	s := openSteering(t, workers, 1)
	ns := crewNS(t)
	c := newCrew(t, ns, crewLocal4, ims.UDP, workers)
	other := newCrew(t, ns, netip.MustParseAddrPort("10.255.0.1:6001"), ims.UDP, workers)
	must(t, s.Attach(c.local, c.t, c.fds))
	must(t, unix.SetsockoptInt(other.fds[0], unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_EBPF, s.objs.Steer.FD()))
	if k := other.lands(t, other.phone(1)); k < 0 {
		t.Error("nobody has got it")
	}
	if st := steerStats(t, s); st.Kernel != 1 {
		t.Errorf("counters %+v", st)
	}
}

// BenchmarkSteer measures the programs themselves, by the statistics that the kernel keeps of programs: no exceptions, a
// full affinity map which the phones are not in, and one which they are in. The classic filter has no such statistics:
// its figure is the time of a datagram from sender to receiver, as that of the others.
func BenchmarkSteer(b *testing.B) {
	const workers, phones = 2, 64
	for _, exceptions := range []int{-1, 0, 1, 100_000} {
		for _, local := range []netip.AddrPort{crewLocal4, crewLocal6} {
			for _, hit := range []bool{false, true} {
				if hit && exceptions <= 1 {
					continue
				}
				name := fmt.Sprintf("v%d/exceptions=%d/hit=%v", map[bool]int{true: 4, false: 6}[local.Addr().Is4()], exceptions, hit)
				if exceptions < 0 {
					name = strings.Replace(name, "exceptions=-1/hit=false", "classic", 1)
				}
				b.Run(name, func(b *testing.B) { benchmarkSteer(b, local, workers, phones, exceptions, hit) })
			}
		}
	}
}

func benchmarkSteer(b *testing.B, local netip.AddrPort, workers, phones, exceptions int, hit bool) {
	c := newCrew(b, crewNS(b), local, ims.UDP, workers)
	var s *Steering
	if exceptions < 0 {
		attachClassic(b, c.fds[0], local.Addr().Is6(), workers)
	} else {
		s = openSteering(b, workers, 1)
		must(b, s.Attach(c.local, c.t, c.fds))
		for n := range exceptions {
			if !hit {
				n += phones
			}
			a := c.phone(n)
			if err := s.Move(a.Addr(), owner(a.Addr(), workers)); err != nil {
				b.Fatal(err)
			}
		}
	}
	out := make([]int, phones)
	must(b, c.ns.Do(func() (err error) {
		for n := range out {
			if out[n], err = unix.Socket(socketFamily(local.Addr()), unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
				return err
			}
			if err := errors.Join(freebind(out[n], local.Addr()), unix.Bind(out[n], sockaddr(c.phone(n)))); err != nil {
				return err
			}
		}
		return nil
	}))
	to := sockaddr(local)
	if s != nil {
		stop, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
		must(b, err)
		defer stop.Close() //nolint:errcheck // a handle only
	}
	payload, buf, i := []byte("x"), make([]byte, 16), 0
	b.ReportAllocs()
	for b.Loop() {
		if err := unix.Sendto(out[i%phones], payload, 0, to); err != nil {
			b.Fatal(err)
		}
		if _, _, err := unix.Recvfrom(c.fds[owner(c.phone(i%phones).Addr(), workers)], buf, 0); err != nil {
			b.Fatalf("packet %d: %v", i, err)
		}
		i++
	}
	b.StopTimer()
	if s != nil {
		st, err := s.objs.Steer.Stats()
		must(b, err)
		b.ReportMetric(float64(st.Runtime.Nanoseconds())/float64(st.RunCount), "ns/program")
	}
	for _, fd := range out {
		_ = unix.Close(fd)
	}
}

// attachClassic attaches the filter that the front has without eBPF.
func attachClassic(b *testing.B, fd int, v6 bool, workers int) {
	b.Helper()
	const network = 0xfff00000 // SKF_NET_OFF
	load := func(at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: network + at}
	}
	p := []unix.SockFilter{load(12)}
	if v6 {
		p = []unix.SockFilter{load(8)}
		for at := uint32(12); at < 24; at += 4 {
			p = append(p, unix.SockFilter{Code: unix.BPF_MISC | unix.BPF_TAX}, load(at), unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_XOR | unix.BPF_X})
		}
	}
	p = append(p, unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_MOD | unix.BPF_K, K: uint32(workers)}, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_A})
	prog := unix.SockFprog{Len: uint16(len(p)), Filter: &p[0]}
	must(b, unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, &prog))
}
