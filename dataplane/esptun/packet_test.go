package esptun

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/esp"
)

// bench is both ends of a tunnel without any namespace: packets go from the transmitter's buffer to the receiver's.
type bench struct {
	tx  *transmitter
	rx4 *receiver
	rx6 *receiver
}

func newBench(t testing.TB) *bench {
	t.Helper()
	mk := func(local ...netip.Prefix) *Tunnel {
		tun := &Tunnel{cfg: Config{Local: local, Logger: slog.New(slog.DiscardHandler)}, table: newTable(), socks: []*rawSocket{{}, {v6: true}}}
		if err := tun.cfg.complete(); err != nil {
			t.Fatal(err)
		}
		return tun
	}
	ue := mk(farm4, farm6)
	gm := mk(netip.PrefixFrom(gm4, 32), netip.PrefixFrom(gm6, 128))
	w := &world{gm: gm, ue: ue}
	for i, s := range ims.Suites() {
		w.newPhone(1+i, false, s).install(t)
		w.newPhone(1+i, true, s).install(t)
	}
	return &bench{tx: newTransmitter(ue), rx4: newReceiver(gm, gm.socks[0]), rx6: newReceiver(gm, gm.socks[1])}
}

// request is the IP packet that a phone's hidden socket sends uc→ps.
func (b *bench) request(p *phone, body string) []byte {
	return ipPacket(p.addr, p.gm, 17, 0xb8, datagram(p.sas[0].Src, p.sas[0].Dst, body))
}

func ipPacket(src, dst netip.Addr, proto, tos byte, payload []byte) []byte {
	if src.Is6() {
		h := binary.BigEndian.AppendUint32(nil, 6<<28|uint32(tos)<<20|0x12345)
		h = binary.BigEndian.AppendUint16(h, uint16(len(payload)))
		h = append(h, proto, 61)
		return append(append(append(h, src.AsSlice()...), dst.AsSlice()...), payload...)
	}
	h := []byte{0x45, tos}
	h = binary.BigEndian.AppendUint16(h, uint16(20+len(payload)))
	h = append(h, 0x12, 0x34, 0x40, 0, 61, proto, 0, 0)
	h = append(append(h, src.AsSlice()...), dst.AsSlice()...)
	binary.BigEndian.PutUint16(h[10:], headerChecksum(h))
	return append(h, payload...)
}

// transmit seals an IP packet in the transmitter's first buffer.
func (b *bench) transmit(ip []byte) ([]byte, Reason, bool) {
	copy(b.tx.bufs[0][headroom:], ip)
	pkt, _, reason, ok := b.tx.seal(b.tx.bufs[0], len(ip))
	return pkt, reason, ok
}

// receive hands an ESP packet to the receiver the way the raw socket of its family would.
func (b *bench) receive(src, dst netip.Addr, pkt []byte) ([]byte, Reason, bool) {
	if src.Is6() {
		buf := b.rx6.bufs[0]
		n := copy(buf[headroom:], pkt)
		return b.rx6.accept6(buf, n, src.As16(), address6{dst: dst.As16(), class: 0xb8, hopLimit: 60, ok: true})
	}
	buf := b.rx4.bufs[0]
	n := copy(buf[headroom:], ipPacket(src, dst, unix.IPPROTO_ESP, 0xb8, pkt))
	return b.rx4.accept4(buf, n)
}

func TestRebuiltPacket(t *testing.T) {
	b := newBench(t)
	w := &world{}
	families(t, func(t *testing.T, v6 bool) {
		for i, s := range ims.Suites() {
			t.Run(s.String(), func(t *testing.T) {
				for _, n := range []int{0, 1, 2, 3, 100, 700, 8900} {
					p := w.newPhone(1+i, v6, s)
					want := b.request(p, string(bytes.Repeat([]byte{'x'}, n)))
					pkt, reason, ok := b.transmit(want)
					if !ok {
						t.Fatalf("%d octets: not sealed: %s", n, reason)
					}
					got, reason, ok := b.receive(p.addr, p.gm, pkt)
					if !ok {
						t.Fatalf("%d octets: not accepted: %s", n, reason)
					}
					// What the network set: hop limit; what transport mode does not carry: identification, flow label.
					if v6 {
						want[1], want[2], want[3], want[7] = want[1]&0xf0, 0, 0, 60
					} else {
						want[4], want[5], want[8], want[10], want[11] = 0, 0, 61, 0, 0
						binary.BigEndian.PutUint16(want[10:], headerChecksum(want[:20]))
					}
					if !bytes.Equal(got, want) {
						t.Fatalf("%d octets:\n got %x\nwant %x", n, got, want)
					}
				}
			})
		}
	})
}

// The P-CSCF's end is made anew with the numbers it had, moved ahead: the phone's window accepts what comes next, and
// what was captured before is refused.
//
// Peers: B3.20
func TestRestart(t *testing.T) {
	const before, block = 200, 5000
	families(t, func(t *testing.T, v6 bool) {
		for i, s := range ims.Suites() {
			t.Run(s.String(), func(t *testing.T) {
				w := &world{}
				p := w.newPhone(1+i, v6, s)
				b := newBench(t) // phones to P-CSCF
				down := &bench{tx: newTransmitter(b.rx4.t), rx4: newReceiver(b.tx.t, b.tx.t.socks[0]), rx6: newReceiver(b.tx.t, b.tx.t.socks[1])}
				response := ipPacket(p.gm, p.addr, 17, 0, datagram(p.sas[3].Src, p.sas[3].Dst, "response"))
				send := func(b *bench, ip []byte, src, dst netip.Addr) []byte {
					t.Helper()
					pkt, reason, ok := b.transmit(ip)
					if !ok {
						t.Fatalf("not sealed: %s", reason)
					}
					pkt = bytes.Clone(pkt)
					if _, reason, ok := b.receive(src, dst, pkt); !ok {
						t.Fatalf("sequence number %d not accepted: %s", binary.BigEndian.Uint32(pkt[4:]), reason)
					}
					return pkt
				}
				var up [][]byte
				for range before {
					up = append(up, send(b, b.request(p, "request"), p.addr, p.gm))
					send(down, response, p.gm, p.addr)
				}
				late, _, _ := b.transmit(b.request(p, "late")) // captured, and never arrived
				late = bytes.Clone(late)

				// What the store knows is a block old at most.
				var reborn []SA
				for sa := range b.rx4.t.All() {
					if sa.Src.Addr() == p.addr || sa.Dst.Addr() == p.addr {
						var want uint32
						if sa.SPI == p.sas[0].SPI || sa.SPI == p.sas[3].SPI { // the two in use
							want = before
						}
						if sa.Seq != want || len(sa.Keys.Enc)+len(sa.Keys.Auth) > 0 {
							t.Errorf("%s is at %d, want %d", sa, sa.Seq, want)
						}
						sa.Keys = p.keys
						if !sa.Inbound {
							sa.Seq += block
						}
						reborn = append(reborn, sa)
					}
				}
				if len(reborn) != 4 {
					t.Fatalf("%d SAs", len(reborn))
				}
				gm := &Tunnel{cfg: b.rx4.t.cfg, log: b.rx4.t.log, table: newTable(), socks: b.rx4.t.socks}
				if err := gm.Add(reborn...); err != nil {
					t.Fatal(err)
				}
				b.rx4.t, b.rx6.t, down.tx.t = gm, gm, gm
				for _, pkt := range up {
					if _, reason, ok := b.receive(p.addr, p.gm, pkt); ok || reason != Replay {
						t.Fatalf("sequence number %d from before: accepted %t, %s", binary.BigEndian.Uint32(pkt[4:]), ok, reason)
					}
				}
				for range 100 {
					send(b, b.request(p, "request"), p.addr, p.gm)
					send(down, response, p.gm, p.addr)
				}
				if _, reason, ok := b.receive(p.addr, p.gm, late); !ok { // was never received, and is in the window
					t.Errorf("late packet: %s", reason)
				}
				if seq, ok := gm.Seq(&p.sas[3]); !ok || seq != before+block+100 {
					t.Errorf("outbound SA is at %d, %t", seq, ok)
				}
				if seq, ok := gm.Seq(&p.sas[0]); !ok || seq != before+1+100 {
					t.Errorf("inbound SA is at %d, %t", seq, ok)
				}
			})
		}
	})
}

// Seq knows the SAs that Remove would take, and All shows each once.
func TestSequenceNumbers(t *testing.T) {
	b := newBench(t)
	gm := b.rx4.t
	p := (&world{}).newPhone(1, false, gcm)
	if n := len(slices.Collect(gm.All())); n != gm.Count() || n != 2*4*len(ims.Suites()) {
		t.Errorf("All shows %d SAs of %d", n, gm.Count())
	}
	for sa := range gm.All() { // ends when told
		if n, ok := gm.Seq(&sa); !ok || n != 0 {
			t.Errorf("%s is at %d, %t", sa, n, ok)
		}
		break
	}
	for i, s := range p.sas {
		other := s
		other.Src = netip.AddrPortFrom(s.Src.Addr(), s.Src.Port()+1)
		if _, ok := gm.Seq(&other); ok {
			t.Errorf("SA %d is found with another port", i)
		}
		other = s
		other.SPI++
		if s.Inbound {
			other.SPI += 100
		}
		if _, ok := gm.Seq(&other); ok {
			t.Errorf("SA %d is found with another SPI", i)
		}
		s.ID = 7
		gm.Remove(s)
		if _, ok := gm.Seq(&s); ok {
			t.Errorf("SA %d is found after its removal", i)
		}
		s.Seq = 1<<32 - 1
		if err := gm.Add(s); !errors.Is(err, esp.ErrSequence) {
			t.Errorf("SA %d added without a number left: %v", i, err)
		}
		s.Seq--
		if err := gm.Add(s); err != nil {
			t.Error(err)
		}
		if n, ok := gm.Seq(&s); !ok || n != 1<<32-2 {
			t.Errorf("SA %d is at %d, %t", i, n, ok)
		}
	}
	var ids []uint64
	for sa := range gm.All() {
		if sa.ID != 0 {
			ids = append(ids, sa.ID)
		}
	}
	if !slices.Equal(ids, []uint64{7, 7, 7, 7}) {
		t.Errorf("ids %v", ids)
	}
	pkt, _, ok := b.transmit(b.request(p, "last"))
	if !ok {
		t.Fatal("not sealed")
	}
	if _, reason, ok := b.receive(p.addr, p.gm, pkt); ok || reason != Replay {
		t.Errorf("packet 1: accepted %t, %s", ok, reason)
	}
}

func TestIPv4Options(t *testing.T) {
	b := newBench(t)
	p := (&world{}).newPhone(1, false, gcm)
	want := b.request(p, "with options")
	pkt, _, ok := b.transmit(want)
	if !ok {
		t.Fatal("not sealed")
	}
	ip := ipPacket(p.addr, p.gm, unix.IPPROTO_ESP, 0xb8, pkt)
	ip = append(append(bytes.Clone(ip[:20]), 1, 1, 1, 0), ip[20:]...)
	ip[0] = 0x46
	buf := b.rx4.bufs[0]
	got, reason, ok := b.rx4.accept4(buf, copy(buf[headroom:], ip))
	if !ok || !bytes.Equal(got[20:], want[20:]) || got[0] != 0x45 {
		t.Errorf("accept4 = %x, %s, %t", got, reason, ok)
	}
}

func TestTransmitDrops(t *testing.T) {
	b := newBench(t)
	w := &world{}
	p4, p6 := w.newPhone(1, false, gcm), w.newPhone(1, true, gcm)
	edit := func(p []byte, f func([]byte) []byte) []byte { return f(bytes.Clone(p)) }
	v4, v6 := b.request(p4, "message"), b.request(p6, "message")
	set := func(at int, v byte) func([]byte) []byte {
		return func(p []byte) []byte { p[at] = v; return p }
	}
	for _, c := range []struct {
		name string
		ip   []byte
		want Reason
	}{
		{"empty", nil, Malformed},
		{"version 0", edit(v4, set(0, 0x05)), Malformed},
		{"cut IPv4", v4[:30], Malformed},
		{"IPv4 header length 4", edit(v4, set(0, 0x41)), Malformed},
		{"IPv4 header only", edit(v4[:20], set(3, 20)), Malformed},
		{"IPv4 total length", edit(v4, set(3, 9)), Malformed},
		{"IPv4 options behind the end", edit(v4[:28], func(p []byte) []byte { p[0], p[3] = 0x4f, 28; return p }), Malformed},
		{"IPv4 first fragment", edit(v4, set(6, 0x20)), FragmentOut},
		{"IPv4 later fragment", edit(v4, set(7, 1)), FragmentOut},
		{"ICMP", edit(v4, set(9, 1)), ProtocolOut},
		{"ESP in ESP", edit(v4, set(9, 50)), ProtocolOut},
		{"other source", edit(v4, set(15, 99)), NoSAOut},
		{"other destination", edit(v4, set(19, 99)), NoSAOut},
		{"other source port", edit(v4, set(21, 99)), NoSAOut},
		{"other destination port", edit(v4, set(23, 99)), NoSAOut},
		{"cut IPv6", v6[:39], Malformed},
		{"IPv6 payload length", edit(v6, set(5, 9)), Malformed},
		{"IPv6 header only", edit(v6[:40], set(5, 0)), Malformed},
		{"IPv6 fragment", edit(v6, set(6, 44)), FragmentOut},
		{"IPv6 hop-by-hop", edit(v6, set(6, 0)), ProtocolOut},
		{"ICMPv6", edit(v6, set(6, 58)), ProtocolOut},
		{"IPv6 other source port", edit(v6, set(41, 99)), NoSAOut},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, reason, ok := b.transmit(c.ip); ok || reason != c.want {
				t.Errorf("sealed %t, reason %s, want %s", ok, reason, c.want)
			}
		})
	}
	t.Run("sequence numbers used up", func(t *testing.T) {
		sa, ok := b.tx.t.table.out.Load(tupleOf(&p4.sas[0]))
		if !ok {
			t.Fatal("no SA")
		}
		if err := sa.SetSeq(1<<32 - 1); err != nil {
			t.Fatal(err)
		}
		if _, reason, ok := b.transmit(v4); ok || reason != Exhausted {
			t.Errorf("sealed %t, reason %s, want %s", ok, reason, Exhausted)
		}
	})
}

func TestReceiveMalformed(t *testing.T) {
	b := newBench(t)
	p := (&world{}).newPhone(1, false, gcm)
	pkt, _, ok := b.transmit(b.request(p, "message"))
	if !ok {
		t.Fatal("not sealed")
	}
	ip := ipPacket(p.addr, p.gm, unix.IPPROTO_ESP, 0, pkt)
	try := func(ip []byte) (Reason, bool) {
		buf := b.rx4.bufs[0]
		_, reason, ok := b.rx4.accept4(buf, copy(buf[headroom:], ip))
		return reason, ok
	}
	for n := range ip {
		if reason, ok := try(ip[:n]); ok || reason != Short && reason != ICV {
			t.Errorf("cut to %d: accepted %t, reason %s", n, ok, reason)
		}
	}
	for _, first := range []byte{0x40, 0x44, 0x4f} {
		bad := bytes.Clone(ip)
		bad[0] = first
		if _, ok := try(bad); ok {
			t.Errorf("header length %d accepted", first&15)
		}
	}
	if reason, ok := try(ip); !ok {
		t.Errorf("intact packet: %s", reason)
	}
	if _, _, ok := b.rx6.accept6(b.rx6.bufs[0], 100, address{}, address6{}); ok {
		t.Error("IPv6 packet without destination accepted")
	}
}

func TestPacketsDoNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes pools drop objects")
	}
	b := newBench(t)
	families(t, func(t *testing.T, v6 bool) {
		for i, s := range ims.Suites() {
			p := (&world{}).newPhone(1+i, v6, s)
			ip := b.request(p, string(make([]byte, 700)))
			src, dst := p.addr.As16(), p.gm.As16()
			outer := ipPacket(p.addr, p.gm, unix.IPPROTO_ESP, 0, nil)
			if n := testing.AllocsPerRun(100, func() {
				copy(b.tx.bufs[0][headroom:], ip)
				b.tx.sizes[0] = len(ip)
				if !b.tx.protect(0, 0) {
					t.Fatal("not sealed")
				}
				iov := &b.tx.batch.iovs[0]
				pkt := unsafe.Slice(iov.Base, int(iov.Len))
				var ok bool
				var reason Reason
				if v6 {
					buf := b.rx6.bufs[0]
					_, reason, ok = b.rx6.accept6(buf, copy(buf[headroom:], pkt), src, address6{dst: dst, ok: true})
				} else {
					buf := b.rx4.bufs[0]
					copy(buf[headroom:], outer)
					_, reason, ok = b.rx4.accept4(buf, len(outer)+copy(buf[headroom+len(outer):], pkt))
				}
				if !ok {
					t.Fatal(reason)
				}
			}); n != 0 {
				t.Errorf("%s: %v allocations per packet", s, n)
			}
		}
	})
}

func TestControl(t *testing.T) {
	var buf [controlLen]byte
	c := control{buf: buf[:]}
	addr := gm6.As16()
	copy(c.put(unix.IPPROTO_IPV6, unix.IPV6_PKTINFO, unix.SizeofInet6Pktinfo), addr[:])
	binary.NativeEndian.PutUint32(c.put(unix.IPPROTO_IPV6, unix.IPV6_TCLASS, 4), 0xb8)
	binary.NativeEndian.PutUint32(c.put(unix.IPPROTO_IPV6, unix.IPV6_HOPLIMIT, 4), 7)
	if want := (address6{dst: addr, class: 0xb8, hopLimit: 7, ok: true}); readControl6(buf[:c.n]) != want {
		t.Errorf("readControl6 = %+v, want %+v", readControl6(buf[:c.n]), want)
	}
	ms, err := unix.ParseSocketControlMessage(buf[:c.n])
	if err != nil || len(ms) != 3 || !bytes.Equal(ms[0].Data[:16], addr[:]) {
		t.Errorf("package unix reads %+v, %v", ms, err)
	}
	for n := range c.n { // cut anywhere
		if a := readControl6(buf[:n]); a.ok && n < unix.CmsgLen(unix.SizeofInet6Pktinfo) {
			t.Errorf("cut to %d: destination known", n)
		}
	}
	binary.NativeEndian.PutUint64(buf[:], 3) // a length below the header's
	if a := readControl6(buf[:c.n]); a.ok {
		t.Errorf("nonsense length: %+v", a)
	}
}

// runFilter interprets the few instructions that destinationFilter uses on an IP header.
func runFilter(t *testing.T, prog []unix.SockFilter, ip []byte) bool {
	t.Helper()
	var acc uint32
	for pc := 0; ; pc++ {
		if pc >= len(prog) {
			t.Fatal("program runs off its end")
		}
		switch i := prog[pc]; i.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			acc = binary.BigEndian.Uint32(ip[int(int32(i.K))-bpfNetOff:])
		case unix.BPF_ALU | unix.BPF_AND | unix.BPF_K:
			acc &= i.K
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			if acc == i.K {
				pc += int(i.Jt)
			} else {
				pc += int(i.Jf)
			}
		case unix.BPF_RET | unix.BPF_K:
			return i.K != 0
		default:
			t.Fatalf("instruction %d has code %#x", pc, i.Code)
		}
	}
}

func TestDestinationFilter(t *testing.T) {
	prefixes := []netip.Prefix{
		netip.MustParsePrefix("10.45.0.0/16"), netip.MustParsePrefix("2001:db8:45::/64"), netip.MustParsePrefix("10.0.0.5/32"),
		netip.MustParsePrefix("2001:db8::5/128"), netip.MustParsePrefix("192.0.2.128/25"), netip.MustParsePrefix("2001:db8:7700::/40"),
	}
	for _, s := range []string{
		"10.45.0.0", "10.45.255.255", "10.46.0.1", "10.44.255.255", "10.0.0.5", "10.0.0.4", "192.0.2.128", "192.0.2.127", "0.0.0.0",
		"2001:db8:45::", "2001:db8:45:0:ffff::1", "2001:db8:45:1::", "2001:db8::5", "2001:db8::1:5", "2001:db8::", "2001:db8:77ff::1",
		"2001:db8:7800::", "2001:db8:45:0:1:2:3:4", "::",
	} {
		a := netip.MustParseAddr(s)
		want := false
		for _, p := range prefixes {
			want = want || p.Contains(a)
		}
		src := gm4
		if a.Is6() {
			src = gm6
		}
		if got := runFilter(t, destinationFilter(a.Is6(), prefixes), ipPacket(src, a, 50, 0, nil)); got != want {
			t.Errorf("%s: filter says %t, want %t", a, got, want)
		}
	}
	everything := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}
	if !runFilter(t, destinationFilter(false, everything), ipPacket(gm4, gm4, 50, 0, nil)) {
		t.Error("0.0.0.0/0 does not accept")
	}
	if runFilter(t, destinationFilter(true, everything), ipPacket(gm6, gm6, 50, 0, nil)) {
		t.Error("a filter without prefixes accepts")
	}
}

// Peers: C2.14
func TestReasons(t *testing.T) {
	seen := make(map[string]bool)
	for _, r := range Reasons() {
		if s := r.String(); s == "" || seen[s] {
			t.Errorf("reason %d is named %q", r, s)
		}
		seen[r.String()] = true
	}
	if len(seen) != int(numReasons) {
		t.Errorf("%d names for %d reasons", len(seen), numReasons)
	}
	if got := numReasons.String(); got != fmt.Sprintf("Reason(%d)", numReasons) {
		t.Errorf("unknown reason is named %q", got)
	}
	if s := (&Stats{}); s.Dropped(numReasons) != 0 {
		t.Error("unknown reason counted")
	}
}

// FuzzTransmit hands arbitrary packets of the hidden kernel to the transmitter: it never fails, and never lets one out
// that does not come back the same at the other end.
func FuzzTransmit(f *testing.F) {
	b := newBench(f)
	w := &world{}
	f.Add(b.request(w.newPhone(1, false, gcm), "message"))
	f.Add(b.request(w.newPhone(2, true, gcm), "message"))
	f.Fuzz(func(t *testing.T, ip []byte) {
		if len(ip) > DefaultMTU {
			return
		}
		pkt, _, ok := b.transmit(ip)
		if !ok {
			return
		}
		var src, dst netip.Addr
		off := 40
		if ip[0]>>4 == 4 {
			src, dst, off = netip.AddrFrom4([4]byte(ip[12:])), netip.AddrFrom4([4]byte(ip[16:])), int(ip[0]&15)*4
		} else {
			src, dst = netip.AddrFrom16([16]byte(ip[8:])), netip.AddrFrom16([16]byte(ip[24:]))
		}
		got, reason, ok := b.receive(src, dst, pkt)
		if !ok {
			if reason == Short || dst != gm4 && dst != gm6 { // TCP without a header; an answer of the P-CSCF's
				return
			}
			t.Fatalf("sealed but not accepted: %s", reason)
		}
		if !bytes.Equal(got[len(got)-len(ip)+off:], ip[off:]) {
			t.Fatalf("got %x, want %x", got, ip)
		}
	})
}

// FuzzReceive hands arbitrary packets of the network to the receiver. None can be authentic.
func FuzzReceive(f *testing.F) {
	b := newBench(f)
	f.Add([]byte{0x40, 0, 0, 4, 0, 0, 0, 1}, false)
	f.Add(bytes.Repeat([]byte{0x40, 0, 0, 4}, 20), true)
	p4, p6 := (&world{}).newPhone(1, false, gcm), (&world{}).newPhone(1, true, gcm)
	f.Fuzz(func(t *testing.T, pkt []byte, v6 bool) {
		if len(pkt) > DefaultMTU {
			return
		}
		p := p4
		if v6 {
			p = p6
		}
		if inner, _, ok := b.receive(p.addr, p.gm, pkt); ok {
			t.Fatalf("%x accepted as %x", pkt, inner)
		}
		if !v6 { // as a whole IP packet
			buf := b.rx4.bufs[0]
			if inner, _, ok := b.rx4.accept4(buf, copy(buf[headroom:], pkt)); ok {
				t.Fatalf("%x accepted as %x", pkt, inner)
			}
		}
	})
}

func BenchmarkPacket(b *testing.B) {
	bn := newBench(b)
	p := (&world{}).newPhone(1, false, gcm)
	ip := bn.request(p, string(make([]byte, 700)))
	b.ReportAllocs()
	for b.Loop() {
		pkt, _, _ := bn.transmit(ip)
		buf := bn.rx4.bufs[0]
		copy(buf[headroom:], ip[:20])
		if _, reason, ok := bn.rx4.accept4(buf, 20+copy(buf[headroom+20:], pkt)); !ok {
			b.Fatal(reason)
		}
	}
}
