package useresp

import (
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/esptun"
	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// TestBackend installs sets of both families and talks to phones over UDP and TCP.
func TestBackend(t *testing.T) {
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
	type pair struct{ gm, ue netip.Addr }
	pairs := []pair{
		{netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("10.0.0.7")},
		{netip.MustParseAddr("2001:db8::5"), netip.MustParseAddr("2001:db8::7")},
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(gmNS.Sysctl("ipv6.conf.default.accept_dad", "0"))
	must(ueNS.Sysctl("ipv6.conf.default.accept_dad", "0"))
	must(gmNS.Veth("vgm", ueNS, "vue"))
	var local, phones []netip.Addr
	for _, p := range pairs {
		bits := 24
		if p.gm.Is6() {
			bits = 64
		}
		must(gmNS.AddAddr("vgm", netip.PrefixFrom(p.gm, bits)))
		must(ueNS.AddAddr("vue", netip.PrefixFrom(p.ue, bits)))
		local, phones = append(local, p.gm), append(phones, p.ue)
	}
	log := slog.New(slog.DiscardHandler)
	b, err := New(Config{Outer: gmNS, Local: local, Logger: log})
	must(err)
	defer func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}()
	var uePrefixes []netip.Prefix
	for _, a := range phones {
		uePrefixes = append(uePrefixes, netip.PrefixFrom(a, a.BitLen()))
	}
	ue, err := esptun.Open(esptun.Config{Outer: ueNS, Local: uePrefixes, Logger: log})
	must(err)
	defer func() { must(ue.Close()) }()

	for i, pr := range pairs {
		p := params(uint64(i+1), time.Hour)
		p.Local, p.UE = pr.gm, pr.ue
		p.Keys = ims.ESPKeys{Suite: ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC}, Enc: make(ims.Key, 16), Auth: make(ims.Key, 20)}
		must(install(t, b, p))
		sas := p.SAs()
		for _, s := range sas {
			must(ue.Add(esptun.SA{Inbound: s.Dir == sa.Out, SPI: s.SPI, Src: s.Src, Dst: s.Dst, Keys: p.Keys}))
		}
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
	if _, err := New(Config{Outer: gmNS, Local: []netip.Addr{netip.MustParseAddr("10.9.9.9")}, Logger: log}); !errors.Is(err, syscall.EADDRNOTAVAIL) {
		t.Errorf("backend for a foreign address: err = %v, want EADDRNOTAVAIL", err)
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
