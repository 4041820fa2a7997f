package esptun

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/esp"
)

var gcm = ims.Suites()[0]

func families(t *testing.T, f func(t *testing.T, v6 bool)) {
	t.Run("IPv4", func(t *testing.T) { f(t, false) })
	t.Run("IPv6", func(t *testing.T) { f(t, true) })
}

// TestUDP sends datagrams up to the MTU, both ways, with each suite and family.
func TestUDP(t *testing.T) {
	w := newWorld(t)
	i := 0
	families(t, func(t *testing.T, v6 bool) {
		for _, s := range ims.Suites() {
			i++
			p := w.newPhone(i, v6, s)
			t.Run(s.String(), func(t *testing.T) { p.exchangeUDP(t, 100, 700, 2500, 8000) })
		}
	})
	for _, tun := range []*Tunnel{w.gm, w.ue} {
		// A packet is counted when its system call has returned, which may be after the other end has read it.
		want := uint64(2 * len(ims.Suites()) * 4)
		var st Stats
		eventually(t, fmt.Sprintf("%d packets counted each way", want), func() bool {
			st = tun.Stats()
			return st.PacketsIn >= want && st.PacketsOut >= want
		})
		if st.PacketsIn != want || st.PacketsOut != want {
			t.Errorf("%d packets in, %d out, want %d", st.PacketsIn, st.PacketsOut, want)
		}
		if st.BytesIn < 2*uint64(len(ims.Suites()))*11300 || st.BytesOut < st.BytesIn-1000 {
			t.Errorf("%d octets in, %d out", st.BytesIn, st.BytesOut)
		}
	}
	fragments := 0
	for _, f := range w.onlyESP(t) {
		if len(f.payload) > 1480 {
			t.Errorf("packet of %d octets on a link with MTU 1500", len(f.payload))
		}
		if f.fragment {
			fragments++
		}
	}
	// 2 fragments of 2500 octets and 6 of 8000, each suite, family and direction.
	if want := len(ims.Suites()) * 2 * 2 * (2 + 6); fragments != want {
		t.Errorf("%d fragments on the wire, want %d", fragments, want)
	}
}

// TestHeld: what comes in before Receive waits, and is opened with the SAs that are there by then.
func TestHeld(t *testing.T) {
	w := newNamespaces(t)
	t.Cleanup(func() {
		if err := errors.Join(w.gm.Close(), w.ue.Close()); err != nil {
			t.Error(err)
		}
	})
	w.gm = openTunnel(t, Config{Outer: w.gmNS, Local: []netip.Prefix{netip.PrefixFrom(gm4, 32), netip.PrefixFrom(gm6, 128)}, Held: true})
	w.ue = openTunnel(t, Config{Outer: w.ueNS, Local: []netip.Prefix{farm4, farm6}})
	var phones []*phone
	var socks []*net.UDPConn
	for i, v6 := range []bool{false, true} {
		p := w.newPhone(i+1, v6, gcm)
		if err := w.ue.Add(p.mirror()...); err != nil {
			t.Fatal(err)
		}
		phones, socks = append(phones, p), append(socks, udp(t, w.gm.Hidden(), p.gm, portPS))
		send(t, udp(t, w.ue.Hidden(), p.addr, portUC), "early", netip.AddrPortFrom(p.gm, portPS))
	}
	eventually(t, "both have sent", func() bool { return w.ue.Stats().PacketsOut == 2 })
	time.Sleep(50 * time.Millisecond) // in which a tunnel that is not held would drop them
	for _, p := range phones {
		if err := w.gm.Add(p.sas[:]...); err != nil {
			t.Fatal(err)
		}
	}
	w.gm.Receive()
	for i, p := range phones {
		expect(t, socks[i], "early", netip.AddrPortFrom(p.addr, portUC))
	}
	if st := w.gm.Stats(); st.Dropped(UnknownSPI) != 0 {
		t.Errorf("%d packets dropped", st.Dropped(UnknownSPI))
	}
}

// exchangeUDP installs the phone and sends a request uc→ps and an answer pc→us of each size.
func (p *phone) exchangeUDP(t *testing.T, sizes ...int) {
	t.Helper()
	p.install(t)
	ps, pc := udp(t, p.w.gm.Hidden(), p.gm, portPS), udp(t, p.w.gm.Hidden(), p.gm, portPC)
	uc, us := udp(t, p.w.ue.Hidden(), p.addr, portUC), udp(t, p.w.ue.Hidden(), p.addr, portUS)
	defer func() { _ = errors.Join(ps.Close(), pc.Close(), uc.Close(), us.Close()) }()
	for _, n := range sizes {
		msg := strings.Repeat(fmt.Sprintf("%d.", p.i), n)[:n]
		send(t, uc, msg, netip.AddrPortFrom(p.gm, portPS))
		expect(t, ps, msg, netip.AddrPortFrom(p.addr, portUC))
		send(t, pc, msg, netip.AddrPortFrom(p.addr, portUS))
		expect(t, us, msg, netip.AddrPortFrom(p.gm, portPC))
	}
}

// TestTCP opens connections from both ends and sends a megabyte each way on each.
func TestTCP(t *testing.T) {
	w := newWorld(t)
	i := 0
	families(t, func(t *testing.T, v6 bool) {
		for _, s := range ims.Suites() {
			if v6 && s.Enc == ims.EncDESEDE3CBC {
				continue // 25 µs per packet and nothing in it depends on the family
			}
			i++
			p := w.newPhone(i, v6, s)
			t.Run(s.String(), func(t *testing.T) {
				p.install(t)
				at := netip.AddrPortFrom
				p.exchangeTCP(t, w.ue, w.gm, at(p.addr, portUC), at(p.gm, portPS))
				if s == gcm {
					p.exchangeTCP(t, w.gm, w.ue, at(p.gm, portPC), at(p.addr, portUS))
				}
			})
		}
	})
	for _, f := range w.onlyESP(t) {
		if f.fragment {
			t.Fatal("a TCP segment was fragmented: the announced segment size is too large")
		}
	}
}

func (p *phone) exchangeTCP(t *testing.T, client, server *Tunnel, from, to netip.AddrPort) {
	t.Helper()
	l := listen(t, server.Hidden(), to.Addr(), to.Port())
	defer func() { _ = l.Close() }()
	c, err := dial(t, client.Hidden(), from, to)
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	deadline(t, s)
	if got, want := s.RemoteAddr().String(), from.String(); got != want {
		t.Errorf("accepted from %s, want %s", got, want)
	}
	size := 1 << 20
	if raceEnabled && p.keys.Suite.Enc == ims.EncDESEDE3CBC {
		size >>= 4 // the race detector makes it slower still
	}
	up, down := make([]byte, size), make([]byte, size)
	rng := rand.NewChaCha8([32]byte{byte(p.i)})
	_, _ = rng.Read(up)
	_, _ = rng.Read(down)
	var wg sync.WaitGroup
	transfer := func(from io.Writer, to io.Reader, data []byte) {
		wg.Go(func() {
			if _, err := from.Write(data); err != nil {
				t.Errorf("write: %v", err)
			}
		})
		wg.Go(func() {
			got := make([]byte, len(data))
			if _, err := io.ReadFull(to, got); err != nil {
				t.Errorf("read: %v", err)
			} else if !bytes.Equal(got, data) {
				t.Error("data changed on the way")
			}
		})
	}
	transfer(c, s, up)
	transfer(s, c, down)
	wg.Wait()
	_ = c.SetLinger(0)
}

// TestFarm has many phones on one raw socket, with the same ports and SPIs, each with its own socket.
func TestFarm(t *testing.T) {
	w := newWorld(t)
	const phones = 40
	families(t, func(t *testing.T, v6 bool) {
		gm := gm4
		if v6 {
			gm = gm6
		}
		ps, pc := udp(t, w.gm.Hidden(), gm, portPS), udp(t, w.gm.Hidden(), gm, portPC)
		var socks []*net.UDPConn
		for i := 1; i <= phones; i++ {
			p := w.newPhone(i*200, v6, ims.Suites()[i%len(ims.Suites())])
			p.install(t)
			uc, us := udp(t, w.ue.Hidden(), p.addr, portUC), udp(t, w.ue.Hidden(), p.addr, portUS)
			socks = append(socks, us)
			send(t, uc, fmt.Sprint("phone ", i), netip.AddrPortFrom(gm, portPS))
		}
		buf := make([]byte, 2048)
		for range phones {
			n, from, err := ps.ReadFromUDPAddrPort(buf)
			if err != nil {
				t.Fatal(err)
			}
			send(t, pc, string(buf[:n]), netip.AddrPortFrom(from.Addr(), portUS))
		}
		for i, s := range socks {
			expect(t, s, fmt.Sprint("phone ", i+1), netip.AddrPortFrom(gm, portPC))
		}
	})
	if got := w.gm.Count(); got != 2*4*phones {
		t.Errorf("Count = %d, want %d", got, 2*4*phones)
	}
	w.onlyESP(t)
}

// TestClearIsRefused sends clear packets to ports that are open in the hidden namespace.
func TestClearIsRefused(t *testing.T) {
	w := newWorld(t)
	w.outsiders(t)
	families(t, func(t *testing.T, v6 bool) {
		p := w.newPhone(1, v6, gcm)
		p.install(t)
		ps := udp(t, w.gm.Hidden(), p.gm, portPS)
		listen(t, w.gm.Hidden(), p.gm, portPS)
		to := netip.AddrPortFrom(p.gm, portPS)

		// From the phone's address and port, outside the tunnel.
		var clear *net.UDPConn
		if err := w.ueNS.Do(func() (err error) {
			clear, err = net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(p.addr, portUC)), net.UDPAddrFromAddrPort(to))
			return err
		}); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = clear.Close() }()
		deadline(t, clear)
		if _, err := clear.Write([]byte("REGISTER in clear")); err != nil {
			t.Fatal(err)
		}
		if _, err := clear.Read(make([]byte, 100)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("clear datagram: err = %v, want ECONNREFUSED", err)
		}
		if _, err := dial(t, w.ueNS, netip.AddrPortFrom(p.addr, portUC), to); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("clear connection: err = %v, want ECONNREFUSED", err)
		}

		// The first thing the socket sees is the protected one.
		uc := udp(t, w.ue.Hidden(), p.addr, portUC)
		send(t, uc, "protected", to)
		expect(t, ps, "protected", netip.AddrPortFrom(p.addr, portUC))
	})
}

// forger sends ESP packets of our choice from the phones' outer namespace.
type forger struct {
	t *testing.T
	w *world
}

func (f *forger) send(src, dst netip.Addr, pkt []byte) {
	f.t.Helper()
	network := "ip4:50"
	if src.Is6() {
		network = "ip6:50"
	}
	err := f.w.ueNS.Do(func() error {
		c, err := net.DialIP(network, &net.IPAddr{IP: src.AsSlice()}, &net.IPAddr{IP: dst.AsSlice()})
		if err != nil {
			return err
		}
		_, err = c.Write(pkt)
		return errors.Join(err, c.Close())
	})
	if err != nil {
		f.t.Fatal(err)
	}
}

// datagram builds a UDP datagram with a right checksum.
func datagram(src, dst netip.AddrPort, body string) []byte {
	b := binary.BigEndian.AppendUint16(nil, src.Port())
	b = binary.BigEndian.AppendUint16(b, dst.Port())
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(body)))
	b = append(append(b, 0, 0), body...)
	pseudo := append(append(src.Addr().AsSlice(), dst.Addr().AsSlice()...), 0, 17, b[4], b[5])
	sum := headerChecksum(append(append(pseudo, b...), make([]byte, len(b)%2)...))
	binary.BigEndian.PutUint16(b[6:], sum)
	return b
}

// TestInboundDrops forges packets with the keys of phone 1 and looks at what the P-CSCF makes of them.
//
// Peers: A4.12
func TestInboundDrops(t *testing.T) {
	w := newWorld(t)
	w.outsiders(t)
	forge := forger{t, w}
	families(t, func(t *testing.T, v6 bool) {
		p, other := w.newPhone(1, v6, gcm), w.newPhone(2, v6, gcm)
		for _, x := range []*phone{p, other} {
			if err := w.gm.Add(x.sas[:]...); err != nil {
				t.Fatal(err)
			}
		}
		uc, ps := p.sas[0].Src, p.sas[0].Dst
		at := netip.AddrPortFrom
		out, err := esp.NewOutbound(p.sas[0].SPI, p.keys)
		if err != nil {
			t.Fatal(err)
		}
		seal := func(payload []byte, next byte) []byte {
			pkt, err := out.Seal(nil, payload, next)
			if err != nil {
				t.Fatal(err)
			}
			return pkt
		}
		good := seal(datagram(uc, ps, "first"), 17)
		// Sockets on every port that a forged packet might reach.
		socks := []*net.UDPConn{udp(t, w.gm.Hidden(), p.gm, portPS), udp(t, w.gm.Hidden(), p.gm, portPC)}
		forge.send(p.addr, p.gm, good)
		expect(t, socks[0], "first", uc)

		changed := append([]byte(nil), seal(datagram(uc, ps, "changed"), 17)...)
		changed[20] ^= 4
		unknown := append([]byte(nil), good...)
		unknown[3] ^= 0x55
		for _, c := range []struct {
			name string
			src  netip.Addr
			pkt  []byte
			want Reason
		}{
			{"replayed", p.addr, good, Replay},
			{"changed", p.addr, changed, ICV},
			{"unknown SPI", p.addr, unknown, UnknownSPI},
			{"cut to the ESP header", p.addr, good[:8], Short},
			{"cut to less", p.addr, good[:7], Short},
			{"from another phone's address", other.addr, seal(datagram(at(other.addr, portUC), ps, "forged"), 17), Selector},
			{"own address, other source port", p.addr, seal(datagram(at(p.addr, portUC+1), ps, "forged"), 17), Selector},
			{"other protected pair of the set", p.addr, seal(datagram(at(p.addr, portUS), at(p.gm, portPC), "forged"), 17), Selector},
			{"other destination port", p.addr, seal(datagram(uc, at(p.gm, portPC), "forged"), 17), Selector},
			{"TCP with wrong ports", p.addr, seal(append(datagram(uc, at(p.gm, 5060), ""), make([]byte, 12)...), 6), Selector},
			{"TCP shorter than its header", p.addr, seal(datagram(uc, ps, "0123456789a"), 6), Short},
			{"UDP shorter than its header", p.addr, seal(datagram(uc, ps, "")[:7], 17), Short},
			{"empty", p.addr, seal(nil, 17), Short},
			{"ICMP", p.addr, seal(datagram(uc, ps, "forged"), 1), NextHeader},
			{"ICMPv6", p.addr, seal(datagram(uc, ps, "forged"), 58), NextHeader},
			{"dummy", p.addr, seal(datagram(uc, ps, "forged"), 59), NextHeader},
			{"IPv6 fragment", p.addr, seal(datagram(uc, ps, "forged"), 44), NextHeader},
			{"tunnel mode", p.addr, seal(datagram(uc, ps, "forged"), 4), NextHeader},
		} {
			st := w.gm.Stats()
			before := st.Dropped(c.want)
			forge.send(c.src, p.gm, c.pkt)
			if t.Run(c.name, func(t *testing.T) { dropped(t, w.gm, c.want, before+1) }); t.Failed() {
				return
			}
		}
		forge.send(p.addr, p.gm, seal(datagram(uc, ps, "last"), 17))
		expect(t, socks[0], "last", uc)
		forge.send(p.addr, p.gm, func() []byte {
			o, err := esp.NewOutbound(p.sas[1].SPI, p.keys)
			if err != nil {
				t.Fatal(err)
			}
			pkt, _ := o.Seal(nil, datagram(p.sas[1].Src, p.sas[1].Dst, "last"), 17)
			return pkt
		}())
		expect(t, socks[1], "last", p.sas[1].Src)
	})
}

// TestNothingLeavesInClear sends from the hidden namespace what no SA covers.
//
// Peers: B2.15
func TestNothingLeavesInClear(t *testing.T) {
	w := newWorld(t)
	families(t, func(t *testing.T, v6 bool) {
		p := w.newPhone(1, v6, gcm)
		p.install(t)
		at := netip.AddrPortFrom
		count := func(r Reason) uint64 {
			st := w.gm.Stats()
			return st.Dropped(r)
		}
		pc := udp(t, w.gm.Hidden(), p.gm, portPC)
		stranger := w.newPhone(2, v6, gcm)

		no := count(NoSAOut)
		send(t, pc, "no SA for this phone", at(stranger.addr, portUS))
		send(t, pc, "no SA for this port", at(p.addr, portUC))
		send(t, udp(t, w.gm.Hidden(), p.gm, 5060), "no SA from this port", at(p.addr, portUS))
		dropped(t, w.gm, NoSAOut, no+3)

		frag := count(FragmentOut)
		send(t, pc, strings.Repeat("too large for the TUN ", 1000), at(p.addr, portUS))
		dropped(t, w.gm, FragmentOut, frag+3)

		// Nothing listens at port-ps: the hidden kernel answers with ICMP, which is no traffic for an SA.
		icmp := count(ProtocolOut)
		uc := udp(t, w.ue.Hidden(), p.addr, portUC)
		send(t, uc, "anybody there?", at(p.gm, portPS))
		eventually(t, "ICMP error dropped", func() bool { return count(ProtocolOut) > icmp })

		// A removed SA protects nothing and opens nothing.
		us := udp(t, w.ue.Hidden(), p.addr, portUS)
		send(t, pc, "before", at(p.addr, portUS))
		expect(t, us, "before", at(p.gm, portPC))
		w.gm.Remove(p.sas[:]...)
		send(t, pc, "after", at(p.addr, portUS))
		dropped(t, w.gm, NoSAOut, no+4)
		unknown := count(UnknownSPI)
		send(t, uc, "after", at(p.gm, portPS))
		dropped(t, w.gm, UnknownSPI, unknown+1)

		for _, f := range w.onlyESP(t) {
			if f.dst == stranger.addr {
				t.Error("a packet without SA left")
			}
		}
		if err := w.gm.Add(p.sas[:]...); err != nil {
			t.Errorf("add again after removal: %v", err)
		}
		w.gm.Remove(p.sas[:]...)
		w.ue.Remove(p.mirror()...)
	})
	if n, m := w.gm.Count(), w.ue.Count(); n != 0 || m != 0 {
		t.Errorf("Count = %d and %d after removal", n, m)
	}
}

// TestTrafficClass follows DSCP and ECN through both ends.
func TestTrafficClass(t *testing.T) {
	w := newWorld(t)
	families(t, func(t *testing.T, v6 bool) {
		p := w.newPhone(1, v6, gcm)
		p.install(t)
		ps := udp(t, w.gm.Hidden(), p.gm, portPS)
		uc := udp(t, w.ue.Hidden(), p.addr, portUC)
		level, set, receive := unix.IPPROTO_IP, unix.IP_TOS, unix.IP_RECVTOS
		if v6 {
			level, set, receive = unix.IPPROTO_IPV6, unix.IPV6_TCLASS, unix.IPV6_RECVTCLASS
		}
		option := func(c *net.UDPConn, opt, value int) {
			rc, err := c.SyscallConn()
			if err == nil {
				err = errors.Join(rc.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, opt, value) }), err)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		const tos = 0xb9 // expedited forwarding, ETC(1)
		option(uc, set, tos)
		option(ps, receive, 1)
		w.captured(t)
		send(t, uc, "with a class", p.sas[0].Dst)
		oob := make([]byte, 100)
		_, oobn, _, _, err := ps.ReadMsgUDPAddrPort(make([]byte, 100), oob)
		if err != nil {
			t.Fatal(err)
		}
		ms, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil || len(ms) != 1 || ms[0].Data[0] != tos {
			t.Errorf("control messages = %+v, %v, want class %#x", ms, err, tos)
		}
		if fs := w.onlyESP(t); len(fs) != 1 || fs[0].tos != tos {
			t.Errorf("on the wire: %+v, want one packet with class %#x", fs, tos)
		}
	})
}

func TestAdd(t *testing.T) {
	w := newWorld(t)
	p := w.newPhone(1, false, gcm)
	if err := w.gm.Add(p.sas[:]...); err != nil {
		t.Fatal(err)
	}
	change := func(k int, f func(*SA)) []SA {
		// A second phone whose SA k is changed, so that all four have to be refused.
		sas := w.newPhone(2, false, gcm).sas
		f(&sas[k])
		return sas[:]
	}
	at := netip.AddrPortFrom
	for _, c := range []struct {
		name string
		sas  []SA
		want error // nil: any
	}{
		{"the same again", p.sas[:], ErrExists},
		{"inbound SPI taken", change(1, func(s *SA) { s.SPI = p.sas[0].SPI }), ErrExists},
		{"outbound ports taken", change(3, func(s *SA) { s.Src, s.Dst = p.sas[2].Src, p.sas[2].Dst }), ErrExists},
		{"twice in one call", change(1, func(s *SA) { *s = w.newPhone(2, false, gcm).sas[0] }), ErrExists},
		{"not our address", change(2, func(s *SA) { s.Src = at(netip.MustParseAddr("10.0.0.6"), 1) }), ErrNotLocal},
		{"inbound to another", change(0, func(s *SA) { s.Dst = s.Src }), ErrNotLocal},
		{"mixed families", change(3, func(s *SA) { s.Dst = at(gm6, 1) }), nil},
		{"no port", change(3, func(s *SA) { s.Dst = at(s.Dst.Addr(), 0) }), nil},
		{"mapped address", change(3, func(s *SA) { s.Dst = at(netip.AddrFrom16(s.Dst.Addr().As16()), 1) }), nil},
		{"zone", change(3, func(s *SA) { s.Src, s.Dst = at(gm6, 1), netip.MustParseAddrPort("[fe80::1%eth0]:1") }), nil},
		{"zero", change(3, func(s *SA) { *s = SA{} }), nil},
		{"short key inbound", change(1, func(s *SA) { s.Keys.Enc = s.Keys.Enc[:8] }), nil},
		{"short key outbound", change(3, func(s *SA) { s.Keys.Enc = s.Keys.Enc[:8] }), nil},
		{"reserved SPI", change(3, func(s *SA) { s.SPI = 1 }), nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := w.gm.Add(c.sas...)
			if err == nil || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("err = %v, want %v", err, c.want)
			}
			if n := w.gm.Count(); n != 4 {
				t.Errorf("Count = %d, want 4", n)
			}
		})
	}

	// Removal goes by the whole selector, so a stale one hurts nobody.
	stale := p.sas
	stale[0].Src, stale[2].SPI = at(p.addr, 9), 0x9999
	w.gm.Remove(stale[0], stale[2])
	w.gm.Remove(w.newPhone(3, true, gcm).sas[:]...)
	if n := w.gm.Count(); n != 4 {
		t.Errorf("Count after stale removals = %d, want 4", n)
	}
	if text := fmt.Sprintf("%v %+v", p.sas[0], p.sas); strings.Contains(text, fmt.Sprintf("%x", []byte(p.keys.Enc))) || !strings.Contains(text, "inbound SA") {
		t.Errorf("SA prints as %s", text)
	}
}

// TestChurn adds and removes SAs while packets flow; the race detector watches.
func TestChurn(t *testing.T) {
	w := newWorld(t)
	const phones, messages = 4, 150
	var wg sync.WaitGroup
	for i := 1; i <= phones; i++ {
		p := w.newPhone(i, false, gcm)
		p.install(t)
		uc := udp(t, w.ue.Hidden(), p.addr, portUC)
		wg.Go(func() {
			for range messages {
				_, _ = uc.WriteToUDPAddrPort([]byte("message"), p.sas[0].Dst)
			}
		})
		other := w.newPhone(100+i, i%2 == 0, gcm)
		wg.Go(func() {
			for range messages {
				if err := w.gm.Add(other.sas[:]...); err != nil {
					t.Error(err)
				}
				_ = w.gm.Stats()
				for sa := range w.gm.All() {
					_, _ = w.gm.Seq(&sa)
				}
				w.gm.Remove(other.sas[:]...)
			}
		})
	}
	wg.Wait()
	// Counted in the tunnel: nobody reads, and a socket's buffer may be too small for them all.
	eventually(t, "all packets through the tunnel", func() bool { return w.gm.Stats().PacketsIn == phones*messages })
}

func TestOpenRefuses(t *testing.T) {
	w := newNamespaces(t)
	local := []netip.Prefix{netip.PrefixFrom(gm4, 32)}
	for _, c := range []struct {
		name string
		cfg  Config
		want string
	}{
		{"nothing local", Config{}, "no local address"},
		{"invalid prefix", Config{Local: []netip.Prefix{{}}}, "not usable"},
		{"MTU too small", Config{Local: local, MTU: 576}, "outside 1280 to 65000"},
		{"MTU too large", Config{Local: local, MTU: 65535}, "outside 1280 to 65000"},
		{"window", Config{Local: local, Window: 32}, "outside 64 to 4096"},
		{"outer address not local", Config{Local: local, OuterAddrs: []netip.Addr{gm6}}, "does not belong"},
		{"address of another host", Config{
			Local: []netip.Prefix{netip.MustParsePrefix("10.0.0.77/32")}, OuterAddrs: []netip.Addr{netip.MustParseAddr("10.0.0.77")},
		}, "cannot assign requested address"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.cfg.Outer = w.gmNS
			tun, err := Open(c.cfg)
			if err == nil {
				_ = tun.Close()
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("err = %v, want %q", err, c.want)
			}
		})
	}
}

// references returns how many descriptors and threads of this process refer to a network namespace.
func references(t *testing.T, inode uint64) int {
	t.Helper()
	n := 0
	for _, pattern := range []string{"/proc/self/fd/*", "/proc/self/task/*/ns/net"} {
		names, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			var st unix.Stat_t
			if unix.Stat(name, &st) == nil && st.Ino == inode {
				n++
			}
		}
	}
	return n
}

// rawSockets counts the raw sockets of a namespace.
func rawSockets(t *testing.T, w *world) int {
	t.Helper()
	n := 0
	err := w.gmNS.Do(func() error {
		for _, name := range []string{"raw", "raw6"} {
			b, err := os.ReadFile(fmt.Sprintf("/proc/thread-self/net/%s", name))
			if err != nil {
				return err
			}
			n += bytes.Count(b, []byte("\n")) - 1
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestClose closes tunnels that are idle, that carry traffic, and twice, and looks for anything left over.
func TestClose(t *testing.T) {
	w := newNamespaces(t)
	before := goleak.IgnoreCurrent()
	for _, busy := range []bool{false, true} {
		t.Run(fmt.Sprintf("busy=%t", busy), func(t *testing.T) {
			tun := openTunnel(t, Config{Outer: w.gmNS, Local: []netip.Prefix{netip.PrefixFrom(gm4, 32), netip.PrefixFrom(gm6, 128)}})
			w.gm = tun
			var inode uint64
			if err := tun.Hidden().Do(func() error {
				var st unix.Stat_t
				err := unix.Stat("/proc/thread-self/ns/net", &st)
				inode = st.Ino
				return err
			}); err != nil {
				t.Fatal(err)
			}
			if n := rawSockets(t, w); n != 2 {
				t.Fatalf("%d raw sockets, want 2", n)
			}
			if n := references(t, inode); n == 0 {
				t.Fatal("the hidden namespace was not found by its inode")
			}
			stop := make(chan struct{})
			var wg sync.WaitGroup
			if busy {
				p := w.newPhone(1, false, gcm)
				if err := tun.Add(p.sas[:]...); err != nil {
					t.Fatal(err)
				}
				pc := udp(t, tun.Hidden(), gm4, portPC)
				f := forger{t, w}
				wg.Go(func() {
					for {
						select {
						case <-stop:
							_ = pc.Close()
							return
						default:
							_, _ = pc.WriteToUDPAddrPort([]byte("x"), p.sas[2].Dst)
						}
					}
				})
				wg.Go(func() {
					for range 20 {
						f.send(p.addr, gm4, make([]byte, 100))
					}
				})
				eventually(t, "traffic", func() bool { s := tun.Stats(); return s.PacketsOut > 100 && s.Dropped(UnknownSPI) > 0 })
			}
			closed := make(chan error, 1)
			go func() { closed <- errors.Join(tun.Close(), tun.Close()) }()
			select {
			case err := <-closed:
				if err != nil {
					t.Error(err)
				}
			case <-time.After(10 * time.Second):
				t.Fatal("Close hangs")
			}
			close(stop)
			wg.Wait()
			if err := tun.Add(w.newPhone(2, false, gcm).sas[:]...); !errors.Is(err, ErrClosed) {
				t.Errorf("Add after Close: err = %v, want ErrClosed", err)
			}
			tun.Remove(SA{})
			if n := tun.Count(); n != 0 {
				t.Errorf("Count after Close = %d", n)
			}
			if n := rawSockets(t, w); n != 0 {
				t.Errorf("%d raw sockets left", n)
			}
			eventually(t, "hidden namespace released", func() bool { return references(t, inode) == 0 })
			if err := goleak.Find(before); err != nil {
				t.Error(err)
			}
		})
	}
	var names []string
	if err := w.gmNS.Do(func() error {
		ifs, err := net.Interfaces()
		for _, i := range ifs {
			names = append(names, i.Name)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if n == tunName {
			t.Errorf("link %s left in the outer namespace", n)
		}
	}
}
