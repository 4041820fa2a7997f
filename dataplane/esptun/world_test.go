package esptun

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// world is two namespaces joined by a veth with a tunnel at each end: gm is the P-CSCF, ue a farm of phones.
//
//	gm: 10.0.0.5, 2001:db8::5 ── veth, MTU 1500 ── ue: 10.0.0.9, 2001:db8::9; local 10.45.0.0/16, 2001:db8:45::/64
type world struct {
	gmNS, ueNS *hostnet.NS
	gm, ue     *Tunnel
	frames     int // AF_PACKET socket on gm's end of the veth
}

const (
	portUC, portUS, portPC, portPS = 6301, 6300, 6111, 6100
)

var (
	gm4    = netip.MustParseAddr("10.0.0.5")
	gm6    = netip.MustParseAddr("2001:db8::5")
	farm4  = netip.MustParsePrefix("10.45.0.0/16")
	farm6  = netip.MustParsePrefix("2001:db8:45::/64")
	noKern = "no network namespaces here"
)

func newWorld(t testing.TB) *world {
	t.Helper()
	w := newNamespaces(t)
	t.Cleanup(func() { // before the namespaces go
		if t.Failed() {
			t.Logf("gm: %+v", w.gm.Stats())
			t.Logf("ue: %+v", w.ue.Stats())
		}
		if err := errors.Join(w.gm.Close(), w.ue.Close()); err != nil {
			t.Error(err)
		}
	})
	host := []netip.Prefix{netip.PrefixFrom(gm4, 32), netip.PrefixFrom(gm6, 128), netip.PrefixFrom(gm4, 32)}
	w.gm = openTunnel(t, Config{Outer: w.gmNS, Local: host, OuterAddrs: []netip.Addr{gm4, gm6, gm4}})
	w.ue = openTunnel(t, Config{Outer: w.ueNS, Local: []netip.Prefix{farm4, farm6}})
	return w
}

func openTunnel(t testing.TB, cfg Config) *Tunnel {
	t.Helper()
	cfg.Logger = slog.New(slog.DiscardHandler)
	tun, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return tun
}

// newNamespaces makes the network without tunnels, with strict reverse path filtering.
func newNamespaces(t testing.TB) *world {
	t.Helper()
	gm, err := hostnet.Create()
	if err != nil {
		if os.Getenv("REQUIRE_KERNEL_TESTS") == "1" {
			t.Fatal(err)
		}
		t.Skipf("%s: %v", noKern, err)
	}
	ue, err := hostnet.Create()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{gmNS: gm, ueNS: ue, frames: -1}
	t.Cleanup(func() {
		if err := errors.Join(unix.Close(w.frames), gm.Close(), ue.Close()); err != nil {
			t.Error(err)
		}
	})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, ns := range []*hostnet.NS{gm, ue} {
		must(ns.Sysctl("ipv4.conf.all.rp_filter", "1"))
		must(ns.Sysctl("ipv4.conf.default.rp_filter", "1"))
		must(ns.Sysctl("ipv6.conf.default.accept_dad", "0")) // neighbour discovery needs the link-local address at once
		must(ns.Sysctl("ipv6.conf.default.accept_ra", "0"))
	}
	must(gm.Veth("vgm", ue, "vue"))
	must(gm.AddAddr("vgm", netip.PrefixFrom(gm4, 24)))
	must(gm.AddAddr("vgm", netip.PrefixFrom(gm6, 64)))
	must(ue.AddAddr("vue", netip.MustParsePrefix("10.0.0.9/24")))
	must(ue.AddAddr("vue", netip.MustParsePrefix("2001:db8::9/64")))
	must(ue.AddLocal(farm4))
	must(ue.AddLocal(farm6))
	must(gm.AddRoute("vgm", farm4, netip.MustParseAddr("10.0.0.9")))
	must(gm.AddRoute("vgm", farm6, netip.MustParseAddr("2001:db8::9")))
	must(gm.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		w.frames = fd
		ifi, err := net.InterfaceByName("vgm")
		if err != nil {
			return err
		}
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20)
		all := uint16(unix.ETH_P_ALL)
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all>>8 | all<<8, Ifindex: ifi.Index})
	}))
	return w
}

// outsiders lets ordinary sockets of the phones' outer namespace use the phones' IPv6 addresses. The tunnel must do
// without.
func (w *world) outsiders(t *testing.T) {
	t.Helper()
	if err := w.ueNS.Sysctl("ipv6.ip_nonlocal_bind", "1"); err != nil {
		t.Fatal(err)
	}
}

// frame is an IP packet seen on the veth.
type frame struct {
	src, dst netip.Addr
	proto    byte
	tos      byte
	fragment bool
	payload  []byte // of the IP packet
}

// captured returns the IP packets since the last call, without neighbour discovery and multicast.
func (w *world) captured(t *testing.T) []frame {
	t.Helper()
	var fs []frame
	buf := make([]byte, 65536)
	for {
		n, from, err := unix.Recvfrom(w.frames, buf, 0)
		if err == unix.EAGAIN {
			return fs
		}
		if err != nil {
			t.Fatal(err)
		}
		ll, _ := from.(*unix.SockaddrLinklayer)
		p := buf[:n]
		switch ll.Protocol>>8 | ll.Protocol<<8 {
		case unix.ETH_P_IP:
			f := frame{
				src: netip.AddrFrom4([4]byte(p[12:])), dst: netip.AddrFrom4([4]byte(p[16:])), proto: p[9], tos: p[1],
				fragment: binary.BigEndian.Uint16(p[6:])&0x3fff != 0, payload: append([]byte(nil), p[20:]...),
			}
			fs = append(fs, f)
		case unix.ETH_P_IPV6:
			f := frame{
				src: netip.AddrFrom16([16]byte(p[8:])), dst: netip.AddrFrom16([16]byte(p[24:])), proto: p[6],
				tos: byte(binary.BigEndian.Uint16(p) >> 4), payload: append([]byte(nil), p[40:]...),
			}
			if f.proto == unix.IPPROTO_FRAGMENT {
				f.proto, f.fragment, f.payload = f.payload[0], true, f.payload[8:]
			}
			if f.proto == unix.IPPROTO_ICMPV6 && f.payload[0] >= 133 && f.payload[0] <= 143 || f.dst.IsMulticast() {
				continue
			}
			fs = append(fs, f)
		}
	}
}

// onlyESP checks that everything on the wire was ESP, and returns it.
func (w *world) onlyESP(t *testing.T) []frame {
	t.Helper()
	fs := w.captured(t)
	for _, f := range fs {
		if f.proto != unix.IPPROTO_ESP {
			t.Errorf("protocol %d from %s to %s on the wire", f.proto, f.src, f.dst)
		}
	}
	return fs
}

// phone is UE number i with its four SAs.
type phone struct {
	w        *world
	i        int
	addr, gm netip.Addr
	keys     ims.ESPKeys
	sas      [4]SA // as the P-CSCF has them: uc→ps, us→pc inbound, pc→us, ps→uc outbound
}

// newPhone makes UE number i, from 1 on, without installing its SAs.
func (w *world) newPhone(i int, v6 bool, s ims.Suite) *phone {
	p := &phone{w: w, i: i, keys: testKeys(s, byte(i))}
	p.gm = gm4
	a := farm4.Addr().AsSlice()
	if v6 {
		p.gm = gm6
		a = farm6.Addr().AsSlice()
	}
	a[len(a)-2], a[len(a)-1] = byte(i>>8), byte(i)
	p.addr, _ = netip.AddrFromSlice(a)
	at := netip.AddrPortFrom
	p.sas = [4]SA{
		{Inbound: true, SPI: ims.SPI(0x40000000 + 4*i), Src: at(p.addr, portUC), Dst: at(p.gm, portPS)},
		{Inbound: true, SPI: ims.SPI(0x40000001 + 4*i), Src: at(p.addr, portUS), Dst: at(p.gm, portPC)},
		{SPI: 0x1001, Src: at(p.gm, portPC), Dst: at(p.addr, portUS)}, // all phones choose the same
		{SPI: 0x1002, Src: at(p.gm, portPS), Dst: at(p.addr, portUC)},
	}
	for k := range p.sas {
		p.sas[k].Keys = p.keys
	}
	return p
}

// mirror returns the SAs as the phone has them.
func (p *phone) mirror() []SA {
	var m []SA
	for _, s := range p.sas {
		s.Inbound = !s.Inbound
		m = append(m, s)
	}
	return m
}

func (p *phone) install(t testing.TB) {
	t.Helper()
	if err := errors.Join(p.w.gm.Add(p.sas[:]...), p.w.ue.Add(p.mirror()...)); err != nil {
		t.Fatal(err)
	}
}

func testKeys(s ims.Suite, seed byte) ims.ESPKeys {
	fill := func(n int, x byte) ims.Key {
		k := make(ims.Key, n)
		for i := range k {
			k[i] = byte(i)*5 + seed ^ x
		}
		return k
	}
	k := ims.ESPKeys{Suite: s}
	switch s.Enc {
	case ims.EncAESCBC:
		k.Enc = fill(16, 0)
	case ims.EncDESEDE3CBC:
		k.Enc = fill(24, 0)
	case ims.EncAESGCM:
		k.Enc, k.Salt = fill(16, 0), [4]byte{seed, 2, 3, 4}
	case ims.EncNull:
	}
	switch s.Alg {
	case ims.AlgHMACMD5:
		k.Auth = fill(16, 0x80)
	case ims.AlgHMACSHA1:
		k.Auth = fill(20, 0x80)
	case ims.AlgAESGMAC:
		k.Auth, k.Salt = fill(16, 0x80), [4]byte{seed, 3, 4, 5}
	case ims.AlgNull:
	}
	return k
}

// udp opens a UDP socket in a namespace.
func udp(t testing.TB, ns *hostnet.NS, a netip.Addr, port uint16) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	err := ns.Do(func() (err error) {
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, port)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	deadline(t, c)
	return c
}

// deadline bounds everything that waits for a packet.
func deadline(t testing.TB, c net.Conn) {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
}

// listen opens a TCP listener in a namespace.
func listen(t testing.TB, ns *hostnet.NS, a netip.Addr, port uint16) net.Listener {
	t.Helper()
	var l net.Listener
	err := ns.Do(func() (err error) {
		l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(a, port)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// dial connects from one protected port to another.
func dial(t testing.TB, ns *hostnet.NS, from, to netip.AddrPort) (*net.TCPConn, error) {
	t.Helper()
	var c net.Conn
	d := net.Dialer{Timeout: 5 * time.Second, LocalAddr: net.TCPAddrFromAddrPort(from), Control: func(_, _ string, rc syscall.RawConn) error {
		return rc.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	}}
	err := ns.Do(func() (err error) {
		c, err = d.Dial("tcp", to.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { _ = c.Close() })
	deadline(t, c)
	tc, ok := c.(*net.TCPConn)
	if !ok {
		return nil, fmt.Errorf("dial made a %T", c)
	}
	return tc, nil
}

// eventually waits, for ten seconds at most, until f returns true.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for range 2000 {
		if f() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("timed out: %s", what)
}

// dropped waits until a tunnel has dropped n packets for a reason.
func dropped(t testing.TB, tun *Tunnel, r Reason, n uint64) {
	t.Helper()
	var s Stats
	eventually(t, fmt.Sprintf("%d packets dropped as %s", n, r), func() bool {
		s = tun.Stats()
		return s.Dropped(r) >= n
	})
	if got := s.Dropped(r); got != n {
		t.Errorf("%d packets dropped as %s, want %d", got, r, n)
	}
}

// expect reads one datagram and checks it.
func expect(t testing.TB, c *net.UDPConn, want string, from netip.AddrPort) {
	t.Helper()
	buf := make([]byte, 65536)
	n, src, err := c.ReadFromUDPAddrPort(buf)
	if err != nil {
		t.Fatalf("read: %v", err)
	}
	src = netip.AddrPortFrom(src.Addr().Unmap(), src.Port())
	if got := string(buf[:n]); got != want || src != from {
		t.Fatalf("received %d octets from %s, want %d from %s", n, src, len(want), from)
	}
}

func send(t testing.TB, c *net.UDPConn, msg string, to netip.AddrPort) {
	t.Helper()
	if _, err := c.WriteToUDPAddrPort([]byte(msg), to); err != nil {
		t.Fatalf("write: %v", err)
	}
}

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
