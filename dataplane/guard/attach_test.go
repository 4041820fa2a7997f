package guard

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// patience is how long a test waits for what has to come; it is not part of what is tested.
const patience = 20 * time.Second

// eventually waits until something is so.
func soon(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, patience)
		}
	}
}

// mayHook skips a test where the kernel, or what we may do, allows no namespaces or no eBPF.
func mayHook(t testing.TB) {
	t.Helper()
	err := tryHook()
	switch {
	case err == nil:
	case os.Getenv("REQUIRE_KERNEL_TESTS") == "1":
		t.Fatalf("no eBPF here: %v", err)
	default:
		t.Skipf("no eBPF here: %v", err)
	}
}

var tryHook = sync.OnceValue(func() error {
	ns, err := hostnet.Create()
	if err != nil {
		return err
	}
	s, err := OpenSteering(1, 1)
	if err != nil {
		return errors.Join(err, ns.Close())
	}
	return errors.Join(s.Close(), ns.Close())
})

// road leads from a phone to a gate: a pair of veths in two namespaces. What arrives at the gate is counted.
type road struct {
	gate, phone *hostnet.NS

	mu      sync.Mutex
	arrived map[string]int
	way     map[string]net.PacketConn // of the phone, by network and family
}

// Addresses of both ends.
var (
	gate4, gate6           = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	roadPhone4, roadPhone6 = netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8::2")
)

const (
	roadClear, protectedPort, roadOther = 5060, 6001, 7000

	knownSPI   = 0x1000 // the inbound SAs of the set of roadPhone4 are this one and the next; those of roadPhone6 the two after them
	unknownSPI = 0xbad0
)

func newRoad(t *testing.T) *road {
	t.Helper()
	mayHook(t)
	r := &road{arrived: make(map[string]int), way: make(map[string]net.PacketConn)}
	r.gate, r.phone = newNS(t), newNS(t)
	r.pair(t)
	return r
}

func newNS(t testing.TB) *hostnet.NS {
	t.Helper()
	ns, err := hostnet.Create()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	return ns
}

// pair makes the veths gm0 and ue0, with addresses.
func (r *road) pair(t *testing.T) {
	t.Helper()
	must(t, r.gate.Veth("gm0", r.phone, "ue0"))
	r.address(t, "gm0", "ue0")
}

func (r *road) address(t *testing.T, gate, phone string) {
	t.Helper()
	for _, bits := range []struct{ gate, phone netip.Prefix }{
		{netip.PrefixFrom(gate4, 24), netip.PrefixFrom(roadPhone4, 24)}, {netip.PrefixFrom(gate6, 64), netip.PrefixFrom(roadPhone6, 64)},
	} {
		must(t, r.gate.AddAddr(gate, bits.gate))
		must(t, r.phone.AddAddr(phone, bits.phone))
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// ip runs iproute2 in a namespace.
func ipCommand(t *testing.T, ns *hostnet.NS, args string) {
	t.Helper()
	must(t, tryIP(ns, args))
}

func tryIP(ns *hostnet.NS, args string) error {
	return ns.Do(func() error {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", args, err, out)
		}
		return nil
	})
}

// listen opens the sockets of both ends. Addresses must be there.
func (r *road) listen(t *testing.T) {
	t.Helper()
	open := func(ns *hostnet.NS, network string, a netip.Addr, port int) net.PacketConn {
		t.Helper()
		var c net.PacketConn
		must(t, ns.Do(func() (err error) {
			at := a.String()
			if strings.HasPrefix(network, "udp") {
				at = netip.AddrPortFrom(a, uint16(port)).String()
			}
			c, err = net.ListenPacket(network, at)
			return err
		}))
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	for _, e := range []struct {
		family      string
		gate, phone netip.Addr
	}{{"4", gate4, roadPhone4}, {"6", gate6, roadPhone6}} {
		r.way["esp"+e.family] = open(r.phone, "ip"+e.family+":50", e.phone, 0)
		r.way["udp"+e.family] = open(r.phone, "udp"+e.family, e.phone, 40000)
		for _, port := range []int{0, roadClear, protectedPort, roadOther} {
			network := "udp"
			if port == 0 {
				network = "esp"
			}
			c := open(r.gate, map[string]string{"esp": "ip" + e.family + ":50", "udp": "udp" + e.family}[network], e.gate, port)
			go r.receive(c, network, e.family, port)
		}
	}
}

// receive counts what comes until the socket is closed.
func (r *road) receive(c net.PacketConn, network, family string, port int) {
	b := make([]byte, 2048)
	for {
		n, _, err := c.ReadFrom(b)
		if err != nil {
			return
		}
		number := uint32(port)
		if network == "esp" && n >= 4 {
			number = binary.BigEndian.Uint32(b)
		}
		r.mu.Lock()
		r.arrived[key(network+family, number)]++
		r.mu.Unlock()
	}
}

func key(network string, number uint32) string { return fmt.Sprintf("%s/%#x", network, number) }

func (r *road) got(network string, number uint32) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.arrived[key(network, number)]
}

// esp sends one ESP packet of a phone.
func (r *road) esp(t *testing.T, family string, spi uint32) {
	t.Helper()
	b := make([]byte, 64)
	binary.BigEndian.PutUint32(b, spi)
	b[7] = 1
	to := gate4
	if family == "6" {
		to = gate6
	}
	if _, err := r.way["esp"+family].WriteTo(b, &net.IPAddr{IP: to.AsSlice()}); err != nil {
		t.Fatal(err)
	}
}

func (r *road) udp(t *testing.T, family string, port int) {
	t.Helper()
	to := gate4
	if family == "6" {
		to = gate6
	}
	if _, err := r.way["udp"+family].WriteTo([]byte("OPTIONS sip:gate SIP/2.0\r\n\r\n"), &net.UDPAddr{IP: to.AsSlice(), Port: port}); err != nil {
		t.Fatal(err)
	}
}

// config is that of a guard at the gate. Pins go when the test ends.
func (r *road) config(t *testing.T) Config {
	t.Helper()
	c := r.bareConfig()
	c.Pin = pinPath(t)
	t.Cleanup(func() { // after the guards of the test
		if _, err := UnloadIn(r.gate, c.Pin, c.Logger); err != nil {
			t.Error(err)
		}
	})
	return c
}

func (r *road) bareConfig() Config {
	return Config{
		Local: []netip.Addr{gate4, gate6}, ClearPort: roadClear, Protected: []uint16{protectedPort}, Interfaces: []string{"gm0"},
		SAs: 64, UEs: 16, Sources: 16, NS: r.gate, Logger: slog.New(slog.DiscardHandler),
	}
}

var pins struct {
	sync.Mutex
	n int
}

// pinPath returns a directory for one guard. Its parent is the process's own.
func pinPath(t testing.TB) string {
	t.Helper()
	pins.Lock()
	pins.n++
	n := pins.n
	pins.Unlock()
	parent := fmt.Sprintf("%s/gmgate-test-%d", bpffs, os.Getpid())
	t.Cleanup(func() { _ = os.Remove(parent) }) // when the last one has gone
	return filepath.Join(parent, fmt.Sprintf("guard%d", n))
}

// sets are those of both phones.
func sets() []sa.Params {
	return []sa.Params{
		{ID: 1, Label: 1, Local: gate4, UE: roadPhone4, SPIs: ims.SPIs{PS: knownSPI, PC: knownSPI + 1}},
		{ID: 2, Label: 2, Local: gate6, UE: roadPhone6, SPIs: ims.SPIs{PS: knownSPI + 2, PC: knownSPI + 3}},
	}
}

func knownTo(family string) uint32 {
	if family == "6" {
		return knownSPI + 2
	}
	return knownSPI
}

// openGuard opens a guard, fills and attaches it.
func stand(t *testing.T, c Config) *Guard {
	t.Helper()
	g := openOnly(t, c)
	must(t, g.Sync(sets(), nil))
	must(t, g.Attach())
	return g
}

func openOnly(t *testing.T, c Config) *Guard {
	t.Helper()
	g, err := Open(c)
	must(t, err)
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	return g
}

func stats(t *testing.T, g *Guard) Stats {
	t.Helper()
	s, err := g.Stats()
	must(t, err)
	return s
}

func tally(t *testing.T, g *Guard, r Reason) uint64 {
	t.Helper()
	s := stats(t, g)
	return s.Tally(r).Packets
}

// onDuty sends good and bad packets, and checks what arrives and what the guard counts.
func (r *road) onDuty(t *testing.T, g *Guard) {
	t.Helper()
	const n = 5
	for _, family := range []string{"4", "6"} {
		var before Stats
		if g != nil {
			before = stats(t, g)
		}
		known := knownTo(family)
		start := map[string]int{}
		for _, k := range []struct {
			network string
			number  uint32
		}{{"esp", known}, {"esp", unknownSPI}, {"udp", roadClear}, {"udp", protectedPort}, {"udp", roadOther}} {
			start[key(k.network, k.number)] = r.got(k.network+family, k.number)
		}
		gained := func(network string, number uint32) int {
			return r.got(network+family, number) - start[key(network, number)]
		}
		for range n {
			r.esp(t, family, unknownSPI)
			r.udp(t, family, protectedPort)
			r.esp(t, family, known)
			r.udp(t, family, roadClear)
			r.udp(t, family, roadOther)
		}
		soon(t, "IPv"+family+": good packets arrive", func() bool {
			return gained("esp", known) == n && gained("udp", roadClear) == n && gained("udp", roadOther) == n
		})
		if g != nil {
			soon(t, "IPv"+family+": bad packets are counted", func() bool {
				s := stats(t, g)
				return s.Tally(DropUnknownSPI).Packets == before.Tally(DropUnknownSPI).Packets+n &&
					s.Tally(DropCleartext).Packets == before.Tally(DropCleartext).Packets+n &&
					s.Tally(PassESP).Packets == before.Tally(PassESP).Packets+n
			})
		}
		if u, c := gained("esp", unknownSPI), gained("udp", protectedPort); u != 0 || c != 0 {
			t.Errorf("IPv%s: %d packets of an unknown SPI and %d clear ones have passed", family, u, c)
		}
	}
}

// unguarded checks that nothing stops bad packets.
func (r *road) unguarded(t *testing.T) {
	t.Helper()
	for _, family := range []string{"4", "6"} {
		esp, udp := r.got("esp"+family, unknownSPI), r.got("udp"+family, protectedPort)
		r.esp(t, family, unknownSPI)
		r.udp(t, family, protectedPort)
		soon(t, "IPv"+family+": nothing is dropped without a guard", func() bool {
			return r.got("esp"+family, unknownSPI) == esp+1 && r.got("udp"+family, protectedPort) == udp+1
		})
	}
}

// attachments counts the programs on an interface, of XDP and tcx.
func attachments(t *testing.T, ns *hostnet.NS, name string) (n int) {
	t.Helper()
	index := linkOf(t, ns, name).Index
	must(t, ns.Do(func() error {
		out, err := exec.Command("ip", "-o", "link", "show", "dev", name).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		if strings.Contains(string(out), "prog/xdp") {
			n++
		}
		if !haveTCX() {
			return nil
		}
		q, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: ebpf.AttachTCXIngress})
		if err == nil {
			n += len(q.Programs)
		}
		return err
	}))
	return n
}

func linkOf(t *testing.T, ns *hostnet.NS, name string) hostnet.Link {
	t.Helper()
	links, err := ns.Links()
	must(t, err)
	i := slices.IndexFunc(links, func(l hostnet.Link) bool { return l.Name == name })
	if i < 0 {
		t.Fatalf("no link %s", name)
	}
	return links[i]
}

func hookOf(t *testing.T, g *Guard, name string) Hook {
	t.Helper()
	for _, h := range g.Hooks() {
		if h.Interface == name {
			return h
		}
	}
	t.Fatalf("the guard knows no interface %s: %v", name, g.Hooks())
	return Hook{}
}

// haveTCX reports whether the kernel has tcx: from 6.6 on.
var haveTCX = sync.OnceValue(func() bool {
	ns, err := hostnet.Create()
	if err != nil {
		return false
	}
	defer ns.Close() //nolint:errcheck // a handle only
	return ns.Do(func() error {
		_, err := link.QueryPrograms(link.QueryOptions{Target: 1, Attach: ebpf.AttachTCXIngress})
		return err
	}) == nil
})

func bestTC() HookKind {
	if haveTCX() {
		return HookTCX
	}
	return HookTC
}

// TestHooks drops and passes the same at every hook.
func TestHooks(t *testing.T) {
	for _, tc := range []struct {
		name  string
		mode  Mode
		hooks []HookKind
		want  func() HookKind
	}{
		{"auto", Auto, nil, func() HookKind { return HookNative }},
		{"native", Native, nil, func() HookKind { return HookNative }},
		{"generic", Generic, nil, func() HookKind { return HookGeneric }},
		{"tc", TC, nil, bestTC},
		{"clsact", TC, []HookKind{HookTC}, func() HookKind { return HookTC }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRoad(t)
			r.listen(t)
			r.unguarded(t)
			c := r.config(t)
			c.Mode, c.hooks = tc.mode, tc.hooks
			g := stand(t, c)
			if h := hookOf(t, g, "gm0"); h.Kind != tc.want() || h.Err != nil || h.Reason == "" {
				t.Errorf("hook %+v, want %s", h, tc.want())
			}
			r.onDuty(t, g)
			must(t, g.Close())
			r.unguarded(t)
			if n := attachments(t, r.gate, "gm0"); n != 0 {
				t.Errorf("%d programs stay on the interface", n)
			}
			if found, err := filterAt(c.Pin, "gm0").Present(r.gate); found || err != nil {
				t.Errorf("filter present: %v, %v", found, err)
			}
		})
	}
}

// TestVLAN puts the guard on an interface with a dot in its name, which a bpffs does not take: on a VLAN where the kernel
// has them.
func TestVLAN(t *testing.T) {
	for _, hooks := range [][]HookKind{nil, {HookTC}} {
		t.Run(fmt.Sprint(hooks), func(t *testing.T) {
			mayHook(t)
			r := &road{arrived: make(map[string]int), way: make(map[string]net.PacketConn), gate: newNS(t), phone: newNS(t)}
			must(t, r.gate.Veth("eth0", r.phone, "eth0"))
			want := bestTC()
			if err := tryIP(r.gate, "link add link eth0 name eth0.100 type vlan id 100"); err == nil {
				ipCommand(t, r.phone, "link add link eth0 name eth0.100 type vlan id 100")
				must(t, r.gate.Up("eth0.100"))
				must(t, r.phone.Up("eth0.100"))
			} else {
				t.Logf("a veth stands in for a VLAN: %v", err)
				must(t, r.gate.Veth("eth0.100", r.phone, "eth0.100"))
				want = HookNative
			}
			r.address(t, "eth0.100", "eth0.100")
			r.listen(t)
			c := r.config(t)
			c.Interfaces, c.hooks = nil, hooks // found by their addresses
			g := stand(t, c)
			if hooks != nil {
				want = hooks[0]
			}
			if h := hookOf(t, g, "eth0.100"); h.Kind != want || len(g.Hooks()) != 1 {
				t.Errorf("hooks %+v, want %s on eth0.100 alone", g.Hooks(), want)
			}
			r.onDuty(t, g)
			must(t, g.Detach())
			r.onDuty(t, nil)
			hooksNow, err := Choose(c)
			if err != nil || len(hooksNow) != 1 || hooksNow[0].Interface != "eth0.100" || hooksNow[0].Kind != want {
				t.Errorf("Choose tells %+v, %v", hooksNow, err)
			}
			if found, err := UnloadIn(r.gate, c.Pin, c.Logger); !found || err != nil {
				t.Errorf("unload: %v, %v", found, err)
			}
			r.unguarded(t)
		})
	}
}

// tun is a link without link headers, and its other end.
func tun(t *testing.T, ns *hostnet.NS, name string) *os.File {
	t.Helper()
	var f *os.File
	must(t, ns.Do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		f = os.NewFile(uintptr(fd), "tun")
		req, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETIFF, uintptr(unsafe.Pointer(req))); e != 0 {
			return e
		}
		return nil
	}))
	t.Cleanup(func() { _ = f.Close() })
	must(t, ns.Up(name))
	return f
}

// TestRawIP puts the guard on a link whose packets begin with the IP header, such as the tunnel of a userspace stack.
func TestRawIP(t *testing.T) {
	for _, hooks := range [][]HookKind{nil, {HookTC}, {HookGeneric}} {
		t.Run(fmt.Sprint(hooks), func(t *testing.T) {
			mayHook(t)
			r := &road{gate: newNS(t)}
			f := tun(t, r.gate, "tun0")
			must(t, r.gate.AddAddr("tun0", netip.PrefixFrom(gate4, 24)))
			must(t, r.gate.AddAddr("tun0", netip.PrefixFrom(gate6, 64)))
			c := r.config(t)
			c.Interfaces, c.hooks = []string{"tun0"}, hooks
			g := stand(t, c)
			want := bestTC()
			if hooks != nil {
				want = hooks[0]
			}
			if h := hookOf(t, g, "tun0"); h.Kind != want {
				t.Errorf("hook %+v, want %s", h, want)
			}
			for _, p := range [][]byte{
				espPacket(roadPhone4, gate4, knownSPI), espPacket(roadPhone4, gate4, unknownSPI),
				espPacket(roadPhone6, gate6, knownSPI+2), espPacket(roadPhone6, gate6, unknownSPI),
			} {
				if _, err := f.Write(p); err != nil {
					t.Fatal(err)
				}
			}
			soon(t, "packets are judged", func() bool {
				s := stats(t, g)
				return s.Tally(PassESP).Packets == 2 && s.Tally(DropUnknownSPI).Packets == 2
			})
		})
	}
}

// espPacket is an IP packet with an ESP packet of 32 octets.
func espPacket(src, dst netip.Addr, spi uint32) []byte {
	var b []byte
	if src.Is4() {
		b = []byte{0x45, 0, 0, 52, 0, 0, 0, 0, 64, unix.IPPROTO_ESP, 0, 0}
	} else {
		b = []byte{0x60, 0, 0, 0, 0, 32, unix.IPPROTO_ESP, 64}
	}
	b = append(append(b, src.AsSlice()...), dst.AsSlice()...)
	if src.Is4() {
		sum := uint32(0)
		for i := 0; i < 20; i += 2 {
			sum += uint32(binary.BigEndian.Uint16(b[i:]))
		}
		binary.BigEndian.PutUint16(b[10:], ^uint16(sum>>16+sum&0xffff))
	}
	return append(binary.BigEndian.AppendUint32(b, spi), make([]byte, 28)...)
}

// TestNativeTaken finds the place of XDP taken by another instance: both stand guard, one of them at tc.
func TestNativeTaken(t *testing.T) {
	r := newRoad(t)
	r.listen(t)
	first := r.config(t)
	first.Mode = Native
	other := stand(t, first)

	c := r.config(t)
	c.Mode = Native
	strict := openOnly(t, c)
	must(t, strict.Sync(sets(), nil))
	if err := strict.Attach(); !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "gm0") {
		t.Errorf("error %v, want EBUSY with the interface's name", err)
	}
	if n := attachments(t, r.gate, "gm0"); n != 1 {
		t.Errorf("%d programs on the interface, want the other's", n)
	}
	if names := Pinned(c.Pin); slices.ContainsFunc(names, func(n string) bool { return strings.HasPrefix(n, linkPrefix) }) {
		t.Errorf("pins %v are left", names)
	}
	must(t, strict.Close())

	c.Mode = Auto
	g := stand(t, c)
	h := hookOf(t, g, "gm0")
	if h.Kind != bestTC() || !strings.Contains(h.Reason, "xdp: ") || !strings.Contains(h.Reason, unix.EBUSY.Error()) {
		t.Errorf("hook %+v, want %s and why it is not xdp", h, bestTC())
	}
	r.onDuty(t, other)
	if s := stats(t, g); s.Tally(PassESP).Packets != 10 || s.Tally(DropUnknownSPI).Packets != 0 {
		t.Errorf("the second one has counted %+v, want the packets that the first one let pass", s.Tallies)
	}
	must(t, other.Close())
	r.onDuty(t, g)
}

// TestBehindNobody has a program of somebody else at the hook that accepts every packet, which ends the chain there.
func TestBehindNobody(t *testing.T) {
	r := newRoad(t)
	if !haveTCX() {
		t.Skip("no tcx before Linux 6.6")
	}
	r.listen(t)
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()}, License: "Apache-2.0"})
	must(t, err)
	defer p.Close() //nolint:errcheck // a handle only
	must(t, r.gate.Do(func() error {
		other, err := link.AttachTCX(link.TCXOptions{Program: p, Interface: linkOf(t, r.gate, "gm0").Index, Attach: ebpf.AttachTCXIngress})
		if err == nil {
			t.Cleanup(func() { _ = other.Close() })
		}
		return err
	}))
	c := r.config(t)
	c.hooks = []HookKind{HookTCX}
	r.onDuty(t, stand(t, c))
}

// TestLateInterface attaches to an interface that does not exist yet, and again after it was made anew.
func TestLateInterface(t *testing.T) {
	for _, hooks := range [][]HookKind{nil, {HookTC}} {
		t.Run(fmt.Sprint(hooks), func(t *testing.T) {
			mayHook(t)
			r := &road{gate: newNS(t), phone: newNS(t)}
			c := r.config(t)
			c.hooks = hooks
			g := stand(t, c)
			if h := hookOf(t, g, "gm0"); h.Kind != HookNone || h.Reason == "" {
				t.Errorf("hook %+v before there is an interface", h)
			}
			for range 2 {
				r.arrived, r.way = make(map[string]int), make(map[string]net.PacketConn)
				r.pair(t)
				soon(t, "the guard attaches", func() bool { return hookOf(t, g, "gm0").Kind != HookNone })
				t.Run("on duty", func(t *testing.T) {
					r.listen(t)
					r.onDuty(t, g)
				})
				ipCommand(t, r.gate, "link del gm0")
				soon(t, "the interface is missed", func() bool { return hookOf(t, g, "gm0").Kind == HookNone })
			}
		})
	}
}

// TestGoneByAddress is the same for interfaces that are found by their addresses.
func TestGoneByAddress(t *testing.T) {
	r := newRoad(t)
	c := r.config(t)
	c.Interfaces = nil
	g := stand(t, c)
	if h := hookOf(t, g, "gm0"); h.Kind != HookNative {
		t.Errorf("hook %+v", h)
	}
	ipCommand(t, r.gate, "link del gm0")
	soon(t, "the interface is missed", func() bool { return hookOf(t, g, "gm0").Kind == HookNone })
	r.pair(t)
	soon(t, "the guard attaches again", func() bool { return hookOf(t, g, "gm0").Kind == HookNative })
}

// TestLoopbackAddress guards every Ethernet interface when the Gm address is one of lo.
func TestLoopbackAddress(t *testing.T) {
	r := newRoad(t)
	must(t, r.gate.Veth("gm1", r.phone, "ue1"))
	must(t, r.gate.Veth("gm2", r.phone, "ue2"))
	ipCommand(t, r.gate, "link set gm2 down")
	service := netip.MustParseAddr("198.51.100.1")
	must(t, r.gate.AddAddr("lo", netip.PrefixFrom(service, 32)))
	c := r.config(t)
	c.Local, c.Interfaces = []netip.Addr{service}, nil
	g := openOnly(t, c)
	must(t, g.Attach())
	var names []string
	for _, h := range g.Hooks() {
		if h.Kind != HookNative {
			t.Errorf("hook %+v", h)
		}
		names = append(names, h.Interface)
	}
	slices.Sort(names)
	if want := []string{"gm0", "gm1"}; !slices.Equal(names, want) {
		t.Errorf("interfaces %v, want %v", names, want)
	}
}

// TestLowest says which of the interfaces that packets pass get a guard.
func TestLowest(t *testing.T) {
	links := []hostnet.Link{
		{Name: "eth0", Index: 2, Up: true},
		{Name: "eth0.7", Index: 3, Up: true, Kind: "vlan", Lower: 2},
		{Name: "mac0", Index: 4, Up: true, Kind: "macvlan", Lower: 3},
		{Name: "bond0", Index: 5, Up: true, Kind: "bond"},
		{Name: "eth1", Index: 6, Up: true, Master: 5},
		{Name: "eth2", Index: 7, Up: true, Master: 5},
		{Name: "eth3", Index: 8, Master: 5},
		{Name: "bond0.7", Index: 9, Up: true, Kind: "vlan", Lower: 5},
		{Name: "va", Index: 10, Up: true, Kind: "veth", Lower: 11},
		{Name: "vb", Index: 11, Up: true, Kind: "veth", Lower: 10},
		{Name: "br0", Index: 12, Up: true, Kind: "bridge"},
	}
	for _, c := range []struct{ names, want string }{
		{"eth0", "eth0"},
		{"eth0.7", "eth0.7"},
		{"bond0", "bond0"},
		{"br0", "br0"},
		{"eth0 eth0.7", "eth0"},
		{"eth0 mac0", "eth0"},
		{"eth0.7 mac0", "eth0.7"},
		{"eth1 bond0", "eth1 bond0"}, // eth2 has none
		{"eth1 eth2 bond0", "eth1 eth2"},
		{"eth1 eth2 bond0.7", "eth1 eth2"},
		{"bond0 bond0.7", "bond0"},
		{"va vb", "va vb"},
		{"gone eth0", "gone eth0"},
	} {
		if got := strings.Join(lowest(strings.Fields(c.names), links), " "); got != c.want {
			t.Errorf("of %s: %s, want %s", c.names, got, c.want)
		}
	}
}

// TestStackedOnce has the address on the loopback interface and a link that stands on another: each packet is judged once.
func TestStackedOnce(t *testing.T) {
	r := newRoad(t)
	service := netip.MustParseAddr("198.51.100.1")
	must(t, r.gate.AddAddr("lo", netip.PrefixFrom(service, 32)))
	if err := errors.Join(tryIP(r.gate, "link add br0 type bridge"), tryIP(r.gate, "link set gm0 master br0"), tryIP(r.gate, "link set br0 up")); err != nil {
		t.Skip(err) // of this kernel
	}
	c := r.config(t)
	c.Local, c.Interfaces = []netip.Addr{service}, nil
	g := openOnly(t, c)
	must(t, g.Attach())
	if h := g.Hooks(); len(h) != 1 || h[0].Interface != "gm0" {
		t.Errorf("hooks %+v, want one on gm0", h)
	}
}

// TestNoAddress has no interface with the address, which is an error only where a hook was asked for.
func TestNoAddress(t *testing.T) {
	r := newRoad(t)
	c := r.config(t)
	c.Local, c.Interfaces = []netip.Addr{netip.MustParseAddr("198.51.100.9")}, nil
	must(t, openOnly(t, c).Attach())
	c = r.config(t)
	c.Local, c.Interfaces, c.Mode = []netip.Addr{netip.MustParseAddr("198.51.100.9")}, nil, Native
	if err := openOnly(t, c).Attach(); err == nil {
		t.Error("no error without an interface")
	}
}

// TestChoose tells what Attach would do and leaves nothing behind, or what has been done and touches nothing.
func TestChoose(t *testing.T) {
	for _, tc := range []struct {
		name  string
		mode  Mode
		hooks []HookKind
	}{{"auto", Auto, nil}, {"generic", Generic, nil}, {"tc", TC, nil}, {"clsact", TC, []HookKind{HookTC}}} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRoad(t)
			r.listen(t)
			c := r.config(t)
			c.Mode, c.hooks = tc.mode, tc.hooks
			told, err := Choose(c)
			must(t, err)
			if n := attachments(t, r.gate, "gm0"); n != 0 {
				t.Errorf("%d programs stay on the interface", n)
			}
			if found, err := filterAt("trial", "gm0").Present(r.gate); found || err != nil {
				t.Errorf("filter present: %v, %v", found, err)
			}
			if names := Pinned(c.Pin); len(names) != 0 {
				t.Errorf("pins %v", names)
			}
			r.unguarded(t)
			g := stand(t, c)
			if !slices.Equal(told, g.Hooks()) {
				t.Errorf("Choose told %+v, Attach did %+v", told, g.Hooks())
			}
			now, err := Choose(c)
			if err != nil || len(now) != 1 || now[0].Kind != told[0].Kind || now[0].Interface != "gm0" {
				t.Errorf("Choose beside a guard tells %+v, %v", now, err)
			}
			r.onDuty(t, g)
		})
	}
}

// TestChooseBesideUnpinned leaves a guard alone of which nothing is pinned.
func TestChooseBesideUnpinned(t *testing.T) {
	r := newRoad(t)
	r.listen(t)
	c := r.config(t)
	c.Pin, c.hooks = "", []HookKind{HookTC}
	g := stand(t, c)
	if _, err := Choose(c); err != nil {
		t.Error(err)
	}
	r.onDuty(t, g)
}

// TestTrialJudgesNothing has the guard of Choose on the interface: phones of a guard beside it, or of none, notice nothing.
func TestTrialJudgesNothing(t *testing.T) {
	for _, hook := range []HookKind{HookNative, bestTC(), HookTC} {
		t.Run(string(hook), func(t *testing.T) {
			r := newRoad(t)
			r.listen(t)
			c := r.bareConfig()
			c.hooks = []HookKind{hook}
			g := openOnly(t, c.tried())
			must(t, g.Attach())
			if h := hookOf(t, g, "gm0"); h.Kind != hook {
				t.Fatalf("hook %+v", h)
			}
			for _, family := range []string{"4", "6"} {
				r.esp(t, family, knownTo(family))
				soon(t, "ESP of IPv"+family+" passes a trial", func() bool { return r.got("esp"+family, knownTo(family)) == 1 })
			}
		})
	}
}

// TestBigTCP lets connections through that the stack merges beyond what the length of IP can say.
func TestBigTCP(t *testing.T) {
	r := newRoad(t)
	c := r.config(t)
	c.Mode = TC
	g := stand(t, c)
	if err := tryIP(r.phone, "link set ue0 gso_max_size 185000"); err != nil {
		t.Skip(err) // of this kernel, or of this version of iproute2
	}
	const octets = 16 << 20
	var l net.Listener
	must(t, r.gate.Do(func() (err error) {
		l, err = net.Listen("tcp6", netip.AddrPortFrom(gate6, roadOther).String())
		return err
	}))
	defer l.Close() //nolint:errcheck // of a test
	received := make(chan int64, 1)
	go func() {
		k, err := l.Accept()
		if err != nil {
			received <- -1
			return
		}
		defer k.Close() //nolint:errcheck // of a test
		_ = k.SetReadDeadline(time.Now().Add(patience))
		n, _ := io.Copy(io.Discard, k)
		received <- n
	}()
	var k net.Conn
	must(t, r.phone.Do(func() (err error) {
		k, err = net.Dial("tcp6", l.Addr().String())
		return err
	}))
	must(t, k.SetWriteDeadline(time.Now().Add(patience)))
	_, err := k.Write(make([]byte, octets))
	must(t, errors.Join(err, k.Close()))
	if n := <-received; n != octets {
		t.Errorf("%d octets arrive, want %d", n, octets)
	}
	s := stats(t, g)
	if n := s.Tally(DropMalformed).Packets; n != 0 {
		t.Errorf("%d packets are malformed", n)
	}
	if n := s.Tally(PassOther); n.Packets > 0 {
		t.Logf("%d octets a packet", n.Bytes/n.Packets)
	}
}

// TestMergedByStack sends datagrams that the stack hands on as one. Each of them takes a token.
func TestMergedByStack(t *testing.T) {
	const datagrams, size = 8, 100
	r := newRoad(t)
	r.listen(t)
	c := r.config(t)
	c.Mode, c.Rate, c.Burst = TC, 1, 100
	g := stand(t, c)
	raw, err := r.way["udp4"].(*net.UDPConn).SyscallConn()
	must(t, err)
	must(t, errors.Join(raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, size)
	}), err))
	b := make([]byte, 0, datagrams*size)
	for range datagrams {
		b = append(append(b, "REGISTER "...), make([]byte, size-9)...)
	}
	start := time.Now()
	_, err = r.way["udp4"].WriteTo(b, &net.UDPAddr{IP: gate4.AsSlice(), Port: roadClear})
	must(t, err)
	soon(t, "the datagrams arrive", func() bool { return r.got("udp4", roadClear) == datagrams })
	var full uint64
	must(t, g.objs.Sources.Lookup(words(roadPhone4), &full))
	if lent := wall(full).Sub(start); lent < (datagrams-1)*time.Second {
		t.Errorf("%d datagrams have taken tokens of %v", datagrams, lent)
	}
}

// TestDropsNameInterfaces follows drops from another namespace's interface.
func TestDropsNameInterfaces(t *testing.T) {
	r := newRoad(t)
	r.listen(t)
	g := stand(t, r.config(t))
	if got, want := g.interfaceName(linkOf(t, r.gate, "gm0").Index), "gm0"; got != want {
		t.Errorf("name %q, want %q", got, want)
	}
	if got, want := g.interfaceName(linkOf(t, r.gate, "lo").Index), "lo"; got != want {
		t.Errorf("name %q of an interface without a hook, want %q", got, want)
	}
	if got, want := g.interfaceName(4711), "4711"; got != want {
		t.Errorf("name %q of no interface, want %q", got, want)
	}
}
