package useresp

import (
	"bytes"
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/esptun"
	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// link is a P-CSCF's namespace and a phone's, joined by a veth, with one address of each family at either end.
type link struct {
	gmNS, ueNS *hostnet.NS
	gm, ue     [2]netip.Addr // IPv4, IPv6
}

func newLink(t *testing.T) *link {
	t.Helper()
	gmNS, err := hostnet.Create()
	if err != nil {
		if os.Getenv("REQUIRE_KERNEL_TESTS") == "1" {
			t.Fatal(err)
		}
		t.Skipf("no network namespaces here: %v", err)
	}
	ueNS, err := hostnet.Create()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(gmNS.Close(), ueNS.Close()); err != nil {
			t.Error(err)
		}
	})
	l := &link{
		gmNS: gmNS, ueNS: ueNS,
		gm: [2]netip.Addr{netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("2001:db8::5")},
		ue: [2]netip.Addr{netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("2001:db8::7")},
	}
	must := mustOf(t)
	must(gmNS.Sysctl("ipv6.conf.default.accept_dad", "0"))
	must(ueNS.Sysctl("ipv6.conf.default.accept_dad", "0"))
	must(gmNS.Veth("vgm", ueNS, "vue"))
	for i, bits := range []int{24, 64} {
		must(gmNS.AddAddr("vgm", netip.PrefixFrom(l.gm[i], bits)))
		must(ueNS.AddAddr("vue", netip.PrefixFrom(l.ue[i], bits)))
	}
	return l
}

func mustOf(t *testing.T) func(error) {
	return func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
}

var discard = slog.New(slog.DiscardHandler)

func (l *link) backend(t *testing.T) *Backend {
	t.Helper()
	b, err := New(Config{Outer: l.gmNS, Local: l.gm[:], Logger: discard})
	mustOf(t)(err)
	return b
}

// phone returns the tunnel of the phone, which ends with the test.
func (l *link) phone(t *testing.T) *esptun.Tunnel {
	t.Helper()
	var local []netip.Prefix
	for _, a := range l.ue {
		local = append(local, netip.PrefixFrom(a, a.BitLen()))
	}
	ue, err := esptun.Open(esptun.Config{Outer: l.ueNS, Local: local, Logger: discard})
	mustOf(t)(err)
	t.Cleanup(func() {
		if err := ue.Close(); err != nil {
			t.Error(err)
		}
	})
	return ue
}

// params returns a set of the phone's address of a family, 0 or 1, with the phone's end of it installed in ue.
func (l *link) params(t *testing.T, ue *esptun.Tunnel, family int) sa.Params {
	t.Helper()
	p := params(uint64(family+1), time.Hour)
	p.Local, p.UE = l.gm[family], l.ue[family]
	p.Keys = ims.ESPKeys{Suite: ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC}, Enc: make(ims.Key, 16), Auth: make(ims.Key, 20)}
	for _, s := range p.SAs() {
		mustOf(t)(ue.Add(esptun.SA{Inbound: s.Dir == sa.Out, SPI: s.SPI, Src: s.Src, Dst: s.Dst, Keys: p.Keys}))
	}
	return p
}

// TestBackend installs sets of both families and talks to phones over UDP and TCP.
func TestBackend(t *testing.T) {
	l := newLink(t)
	must := mustOf(t)
	b := l.backend(t)
	defer func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}()
	ue := l.phone(t)

	for family := range l.gm {
		p := l.params(t, ue, family)
		must(install(t, b, p))
		sas := p.SAs()
		uc, ps, pc, us := sas[0].Src, sas[0].Dst, sas[1].Dst, sas[1].Src
		datagram(t, ue.Hidden(), b.Hidden(), uc, ps)
		datagram(t, b.Hidden(), ue.Hidden(), pc, us)
		connection(t, ue.Hidden(), b.Hidden(), uc, ps)
		connection(t, b.Hidden(), ue.Hidden(), pc, us)

		must(remove(t, b, p))
		before := b.Stats()
		c := socket(t, b.Hidden(), pc)
		_, err := c.WriteToUDPAddrPort([]byte("after removal"), us)
		must(errors.Join(err, c.Close()))
		for range 1000 {
			if s := b.Stats(); s.Dropped(esptun.NoSAOut) > before.Dropped(esptun.NoSAOut) {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
		// At least: TCP's last segments may be among them.
		if s := b.Stats(); s.Dropped(esptun.NoSAOut) <= before.Dropped(esptun.NoSAOut) {
			t.Error("a datagram after the removal was not dropped")
		}
	}
	if b.Count() != 0 {
		t.Errorf("Count = %d after removal", b.Count())
	}
	// What the tunnel refuses reaches the callback with its reason.
	p := params(9, 0)
	p.Local = netip.MustParseAddr("10.9.9.9")
	if err := install(t, b, p); !errors.Is(err, esptun.ErrNotLocal) {
		t.Errorf("install for a foreign address: err = %v, want ErrNotLocal", err)
	}
	if _, err := New(Config{Outer: l.gmNS, Local: []netip.Addr{netip.MustParseAddr("10.9.9.9")}, Logger: discard}); !errors.Is(err, syscall.EADDRNOTAVAIL) {
		t.Errorf("backend for a foreign address: err = %v, want EADDRNOTAVAIL", err)
	}
}

// TestRestart lets the P-CSCF's process end and another one take over. The phone, which kept its SAs, notices nothing, and
// nobody gains by having recorded its packets.
//
// Peers: B3.20
func TestRestart(t *testing.T) {
	l := newLink(t)
	must := mustOf(t)
	ue := l.phone(t)
	p := l.params(t, ue, 0)
	sas := p.SAs()
	uc, ps, pc, us := sas[0].Src, sas[0].Dst, sas[1].Dst, sas[1].Src

	first := l.backend(t)
	if _, err := first.Adopt(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	must(install(t, first, p))
	tap := l.tap(t)
	const before = 5
	for range before {
		datagram(t, ue.Hidden(), first.Hidden(), uc, ps)
		datagram(t, first.Hidden(), ue.Hidden(), pc, us)
	}
	connection(t, ue.Hidden(), first.Hidden(), us, pc)
	survey := func(b *Backend) sa.Counters {
		t.Helper()
		v, err := b.Survey(t.Context())
		if err != nil || len(v.Sets) != 1 || len(v.Missing) > 0 || v.Orphans != 0 {
			t.Fatalf("survey: %+v, %v", v, err)
		}
		return v.Sets[p.ID]
	}
	known := survey(first)
	if known[0] != before || known[2] <= before || known[1] == 0 || known[3] != 0 {
		t.Errorf("counters %v", known)
	}
	datagram(t, first.Hidden(), ue.Hidden(), pc, us) // after the last mark: its number must not come again
	must(first.Detach())
	recorded := captured(t, tap, p.UE)
	// What came after the last mark, as the end of the connection did, nobody knows to have come.
	recorded = slices.DeleteFunc(recorded, func(pkt []byte) bool {
		of := 0
		if ims.SPI(binary.BigEndian.Uint32(pkt)) == p.SPIs.PC {
			of = 1
		}
		return binary.BigEndian.Uint32(pkt[4:]) > known[of]
	})
	if len(recorded) < before+3 { // and the handshake of the connection with its data
		t.Fatalf("%d packets of the phone recorded", len(recorded))
	}

	second := l.backend(t)
	defer func() { must(second.Close()) }()
	if a, err := second.Adopt(t.Context(), []sa.Params{p}); err != nil || len(a.Adopted)+a.Removed+len(a.Foreign) != 0 {
		t.Fatalf("adopt: %+v, %v", a, err)
	}
	const block = 1000
	again := p
	var err error
	again.Counters, err = known.Ahead(block)
	must(err)
	must(install(t, second, again))
	if got := survey(second); got != again.Counters {
		t.Errorf("counters %v after the restart, want %v", got, again.Counters)
	}
	replays := l.tap(t)
	for _, pkt := range recorded {
		must(l.ueNS.Do(func() error {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ESP)
			if err != nil {
				return err
			}
			defer func() { _ = unix.Close(fd) }()
			return unix.Sendto(fd, pkt, 0, &unix.SockaddrInet4{Addr: p.Local.As4()})
		}))
	}
	for range 2000 {
		if s := second.Stats(); s.Dropped(esptun.Replay) >= uint64(len(recorded)) {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if s := second.Stats(); s.Dropped(esptun.Replay) != uint64(len(recorded)) {
		t.Errorf("of %d recorded packets %d were refused as replays; %d arrived",
			len(recorded), s.Dropped(esptun.Replay), len(captured(t, replays, p.UE)))
	}
	for range before {
		datagram(t, ue.Hidden(), second.Hidden(), uc, ps)
		datagram(t, second.Hidden(), ue.Hidden(), pc, us)
		datagram(t, second.Hidden(), ue.Hidden(), ps, uc)
	}
	connection(t, ue.Hidden(), second.Hidden(), uc, ps) // the other ports may wait for the end of the first one's
	if s := ue.Stats(); s.Dropped(esptun.Replay) != 0 {
		t.Errorf("the phone refused %d packets as replays", s.Dropped(esptun.Replay))
	}
	now := survey(second)
	if now[0] <= known[0]+before || now[2] < known[2]+block+before || now[3] <= known[3]+block+before {
		t.Errorf("counters %v, were %v", now, known)
	}
}

// tap returns a socket that gets a copy of every IPv4 ESP packet towards the P-CSCF.
func (l *link) tap(t *testing.T) int {
	t.Helper()
	fd := -1
	mustOf(t)(l.gmNS.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_ESP)
		return err
	}))
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

// captured reads the ESP packets from an address that a tap holds.
func captured(t *testing.T, fd int, from netip.Addr) (pkts [][]byte) {
	t.Helper()
	buf := make([]byte, 65536)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EAGAIN) {
			return pkts
		}
		if err != nil {
			t.Fatal(err)
		}
		if netip.AddrFrom4([4]byte(buf[12:])) == from {
			pkts = append(pkts, bytes.Clone(buf[int(buf[0]&0x0f)*4:n]))
		}
	}
}

func socket(t *testing.T, ns *hostnet.NS, at netip.AddrPort) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	if err := ns.Do(func() (err error) {
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return c
}

func datagram(t *testing.T, from, to *hostnet.NS, src, dst netip.AddrPort) {
	t.Helper()
	a, b := socket(t, from, src), socket(t, to, dst)
	defer func() { _ = errors.Join(a.Close(), b.Close()) }()
	if err := b.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := a.WriteToUDPAddrPort([]byte("MESSAGE"), dst); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	n, peer, err := b.ReadFromUDPAddrPort(buf)
	if err != nil || string(buf[:n]) != "MESSAGE" || peer.Port() != src.Port() || peer.Addr().Unmap() != src.Addr() {
		t.Errorf("%s to %s: received %q from %s, %v", src, dst, buf[:n], peer, err)
	}
}

func connection(t *testing.T, from, to *hostnet.NS, src, dst netip.AddrPort) {
	t.Helper()
	var l *net.TCPListener
	var c net.Conn
	err := to.Do(func() (err error) {
		l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(dst))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(src), Timeout: 5 * time.Second, Control: func(_, _ string, rc syscall.RawConn) error {
		return rc.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	}}
	if err := from.Do(func() (err error) { c, err = d.Dial("tcp", dst.String()); return err }); err != nil {
		t.Errorf("connect %s to %s: %v", src, dst, err)
		return
	}
	defer func() { _ = c.Close() }()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	if err := s.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("INVITE")); err != nil {
		t.Error(err)
	}
	buf := make([]byte, 6)
	if n, err := s.Read(buf); err != nil || string(buf[:n]) != "INVITE" {
		t.Errorf("%s to %s: received %q, %v", src, dst, buf[:n], err)
	}
}
