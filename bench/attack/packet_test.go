package attack

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/gmgate/gmgate/bench/internal/sipwire"
)

var (
	ends4 = [2]netip.AddrPort{netip.MustParseAddrPort("10.45.0.7:31000"), netip.MustParseAddrPort("10.0.0.5:6100")}
	ends6 = [2]netip.AddrPort{netip.MustParseAddrPort("[2001:db8:45::7]:31000"), netip.MustParseAddrPort("[2001:db8::5]:6100")}
)

// decode reads an IP packet with a library that is not ours.
func decode(p []byte) gopacket.Packet {
	first := layers.LayerTypeIPv4
	if p[0]>>4 == 6 {
		first = layers.LayerTypeIPv6
	}
	return gopacket.NewPacket(p, first, gopacket.DecodeOptions{})
}

// again has the library write the packet that it has read, with lengths and checksums of its own.
func again(t *testing.T, p gopacket.Packet) []byte {
	t.Helper()
	var list []gopacket.SerializableLayer
	for _, l := range p.Layers() {
		switch l := l.(type) {
		case *layers.UDP:
			if err := l.SetNetworkLayerForChecksum(p.NetworkLayer()); err != nil {
				t.Fatal(err)
			}
			list = append(list, l)
		case *layers.TCP:
			if err := l.SetNetworkLayerForChecksum(p.NetworkLayer()); err != nil {
				t.Fatal(err)
			}
			list = append(list, l)
		case *layers.IPv4:
			list = append(list, l)
		case *layers.IPv6:
			list = append(list, l)
		}
	}
	if transport := p.TransportLayer(); transport != nil {
		list = append(list, gopacket.Payload(transport.LayerPayload()))
	} else {
		list = append(list, gopacket.Payload(p.NetworkLayer().LayerPayload()))
	}
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, list...); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestPackets(t *testing.T) {
	for _, ends := range [][2]netip.AddrPort{ends4, ends6} {
		src, dst := ends[0], ends[1]
		espWant := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, 0x12345678), 9)
		for _, tt := range []struct {
			name     string
			packet   []byte
			proto    layers.IPProtocol
			from, to string // ports
			inside   []byte // what the payload begins with
			size     int    // of the payload
		}{
			{"ESP", AppendESP(nil, src.Addr(), dst.Addr(), 0x12345678, 9, 50, 1), layers.IPProtocolESP, "", "", espWant, 58},
			{
				"ESP in UDP", AppendESPInUDP(nil, src.Addr(), dst.Addr(), 0x12345678, 9, 51, 1),
				layers.IPProtocolUDP, "4500", "4500", espWant, 59,
			},
			{"UDP", AppendUDP(nil, src, dst, []byte("odd")), layers.IPProtocolUDP, "31000", "6100", []byte("odd"), 3},
			{"UDP, empty", AppendUDP(nil, src, dst, nil), layers.IPProtocolUDP, "31000", "6100", nil, 0},
			{"SYN", AppendSYN(nil, src, dst, 7, nil), layers.IPProtocolTCP, "31000", "6100", nil, 0},
			{"SYN with data", AppendSYN(nil, src, dst, 7, []byte("data.")), layers.IPProtocolTCP, "31000", "6100", []byte("data."), 5},
		} {
			t.Run(fmt.Sprintf("%s from %s", tt.name, src.Addr()), func(t *testing.T) {
				p := decode(tt.packet)
				if f := p.ErrorLayer(); f != nil {
					t.Fatal(f.Error())
				}
				flow := p.NetworkLayer().NetworkFlow()
				if flow.Src().String() != src.Addr().String() || flow.Dst().String() != dst.Addr().String() {
					t.Errorf("goes %s", flow)
				}
				proto, payload := layers.IPProtocol(0), p.NetworkLayer().LayerPayload()
				switch ip := p.NetworkLayer().(type) {
				case *layers.IPv4:
					proto = ip.Protocol
				case *layers.IPv6:
					proto = ip.NextHeader
				}
				if proto != tt.proto {
					t.Errorf("protocol %s, want %s", proto, tt.proto)
				}
				if transport := p.TransportLayer(); transport != nil {
					flow := transport.TransportFlow()
					if flow.Src().String() != tt.from || flow.Dst().String() != tt.to {
						t.Errorf("ports %s, want %s to %s", flow, tt.from, tt.to)
					}
					payload = transport.LayerPayload()
				}
				if len(payload) != tt.size || !bytes.HasPrefix(payload, tt.inside) {
					t.Errorf("payload of %d octets %x…, want %d that begin with %x", len(payload), payload[:min(12, len(payload))], tt.size, tt.inside)
				}
				if tcp, ok := p.TransportLayer().(*layers.TCP); ok && (!tcp.SYN || tcp.ACK || tcp.RST || tcp.Seq != 7) {
					t.Errorf("no SYN: %+v", tcp)
				}
				if udp, ok := p.TransportLayer().(*layers.UDP); ok && udp.DstPort == PortESP && src.Addr().Is4() {
					if udp.Checksum != 0 { // RFC 3948 §2.1
						t.Errorf("checksum %#x, want none", udp.Checksum)
					}
					return
				}
				if want := again(t, p); !bytes.Equal(tt.packet, want) {
					t.Errorf("lengths or checksums are wrong:\n got %x\nwant %x", tt.packet, want)
				}
			})
		}
	}
}

// A UDP checksum that comes out as zero is sent as all ones: zero would say that there is none.
func TestChecksumNeverZero(t *testing.T) {
	for n := range 1 << 16 {
		payload := binary.BigEndian.AppendUint16(nil, uint16(n))
		p := AppendUDP(nil, ends6[0], ends6[1], payload)
		sum := binary.BigEndian.Uint16(p[ipv6Header+6:])
		if sum == 0 {
			t.Fatalf("payload %#04x has the checksum 0", n)
		}
		if sum == 0xffff {
			return
		}
	}
	t.Error("no payload has the checksum 0xffff")
}

// Packets of different seeds differ, and appending leaves what was there before.
func TestESPDiffers(t *testing.T) {
	a := AppendESP([]byte("before"), ends4[0].Addr(), ends4[1].Addr(), 300, 1, 64, 1)
	b := AppendESP(nil, ends4[0].Addr(), ends4[1].Addr(), 300, 1, 64, 2)
	same := AppendESP(nil, ends4[0].Addr(), ends4[1].Addr(), 300, 1, 64, 1)
	if !bytes.HasPrefix(a, []byte("before")) || !bytes.Equal(a[6:], same) || bytes.Equal(same, b) {
		t.Errorf("got\n%x\n%x\n%x", a, b, same)
	}
}

func TestAppendFrom(t *testing.T) {
	p4 := AppendESP(nil, ends4[0].Addr(), ends4[1].Addr(), 300, 1, 64, 1)
	p6 := AppendESP(nil, ends6[0].Addr(), ends6[1].Addr(), 300, 1, 64, 1)
	other4, other6 := netip.MustParseAddr("10.45.9.9"), netip.MustParseAddr("2001:db8:45::99")
	for _, tt := range []struct {
		name   string
		packet []byte
		src    netip.Addr
		want   []byte // nil: refused
	}{
		{"IPv4", p4, other4, AppendESP(nil, other4, ends4[1].Addr(), 300, 1, 64, 1)},
		{"IPv6", p6, other6, AppendESP(nil, other6, ends6[1].Addr(), 300, 1, 64, 1)},
		{"itself", p4, ends4[0].Addr(), p4},
		{"IPv4 from IPv6", p4, other6, nil},
		{"IPv6 from IPv4", p6, other4, nil},
		{"cut off", p4[:19], other4, nil},
		{"cut off IPv6", p6[:39], other6, nil},
		{"empty", nil, other4, nil},
		{"header beyond the packet", append([]byte{0x4f}, p4[1:40]...), other4, nil},
		{"another version", append([]byte{0x55}, p4[1:]...), other4, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, ok := AppendFrom([]byte("x"), tt.packet, tt.src)
			if ok != (tt.want != nil) || !bytes.Equal(got, append([]byte("x"), tt.want...)) {
				t.Errorf("got %t, %x, want %x", ok, got[1:], tt.want)
			}
		})
	}
}

// FuzzAppendFrom feeds it with anything: a copy differs from the packet in the source only, and an IPv4 header is whole.
func FuzzAppendFrom(f *testing.F) {
	f.Add(AppendESP(nil, ends4[0].Addr(), ends4[1].Addr(), 300, 1, 8, 1), false)
	f.Add(AppendESP(nil, ends6[0].Addr(), ends6[1].Addr(), 300, 1, 8, 1), true)
	f.Add(slices.Concat([]byte{0x46}, make([]byte, 23)), false)
	f.Fuzz(func(t *testing.T, p []byte, six bool) {
		src := netip.MustParseAddr("192.0.2.1")
		if six {
			src = netip.MustParseAddr("2001:db8::1")
		}
		before := slices.Clone(p)
		got, ok := AppendFrom(nil, p, src)
		if !bytes.Equal(p, before) {
			t.Fatal("the packet itself was changed")
		}
		if !ok {
			if len(got) > 0 {
				t.Fatalf("refused, but there are %d octets", len(got))
			}
			return
		}
		from, till := 8, 24
		if !six {
			from, till = 12, 16
			if sum := checksum(got[:int(got[0]&15)*4], 0); sum != 0 {
				t.Fatalf("the checksum is off by %#x", sum)
			}
			got[10], got[11] = p[10], p[11]
		}
		if a, _ := netip.AddrFromSlice(got[from:till]); a != src {
			t.Fatalf("it comes from %s", a)
		}
		copy(got[from:till], p[from:till])
		if !bytes.Equal(got, p) {
			t.Fatalf("more than the source was changed:\n%x\n%x", got, p)
		}
	})
}

// Every kind of bad packet is bad: the library of the test finds fault with it, or it has the one property that is meant.
func TestMalformed(t *testing.T) {
	inside := func(p []byte) []byte { return decode(p).NetworkLayer().LayerPayload() }
	means := map[string]func(p []byte) bool{
		"ESP without a sequence number":      func(p []byte) bool { return len(inside(p)) < espHeader },
		"UDP shorter than its header":        func(p []byte) bool { return len(inside(p)) < udpHeader },
		"SPI zero":                           func(p []byte) bool { return binary.BigEndian.Uint32(inside(p)) == 0 },
		"reserved SPI":                       func(p []byte) bool { s := binary.BigEndian.Uint32(inside(p)); return s > 0 && s <= spiReserved },
		"from port zero":                     func(p []byte) bool { return decode(p).TransportLayer().(*layers.UDP).SrcPort == 0 },
		"to port zero":                       func(p []byte) bool { return decode(p).TransportLayer().(*layers.UDP).DstPort == 0 },
		"bad version":                        func(p []byte) bool { return p[0]>>4 != 4 && p[0]>>4 != 6 },
		"header cut off":                     func(p []byte) bool { return len(p) < ipv4Header || p[0]>>4 == 6 && len(p) < ipv6Header },
		"header length below five words":     func(p []byte) bool { return p[0]&15 < 5 },
		"many extension headers":             func(p []byte) bool { return bytes.Count(p, []byte{extDestOpts, 0, 1, 4, 0, 0, 0, 0}) == manyHeaders },
		"extension header beyond the packet": func(p []byte) bool { return len(p) < ipv6Header+8+int(p[ipv6Header+1])*8 },
		"lonely fragment": func(p []byte) bool {
			if p[0]>>4 == 6 {
				return p[6] == extFragment && binary.BigEndian.Uint16(p[ipv6Header+2:])>>3 > 0
			}
			f := binary.BigEndian.Uint16(p[6:])
			return f&moreFragments != 0 && f&0x1fff > 0
		},
	}
	for _, ends := range [][2]netip.AddrPort{ends4, ends6} {
		seen := map[string]bool{}
		for _, k := range Malformed(ends[0].Addr().Is6()) {
			t.Run(fmt.Sprintf("%s from %s", k.Name, ends[0].Addr()), func(t *testing.T) {
				if seen[k.Name] {
					t.Error("there are two of this name")
				}
				seen[k.Name] = true
				for n := range 300 {
					p := k.Append([]byte("before"), ends[0], ends[1], n)
					if !bytes.HasPrefix(p, []byte("before")) || len(p) == 6 {
						t.Fatalf("packet %d: %x", n, p)
					}
					p = p[6:]
					bad := func() bool { d := decode(p); return d.ErrorLayer() != nil || d.Metadata().Truncated }
					if means[k.Name] != nil {
						bad = func() bool { return means[k.Name](p) }
					}
					if !bad() {
						t.Fatalf("packet %d is fine: %x", n, p)
					}
				}
			})
		}
	}
}

func TestMessages(t *testing.T) {
	src := netip.MustParseAddrPort("[2001:db8:45::7]:5070")
	seen := map[string]bool{}
	for n := range 3 {
		reg, err := sipwire.Parse(AppendRegister(nil, src, "home.example", "001@home.example", n))
		if err != nil {
			t.Fatal(err)
		}
		msg, err := sipwire.Parse(AppendMessage(nil, src, "sip:a@home.example", "sip:b@home.example", n))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range []*sipwire.Message{reg, msg} {
			via := m.Get("Via")
			if !strings.HasPrefix(m.Get("Call-ID"), CallID) || !strings.HasPrefix(via, "SIP/2.0/UDP "+src.String()+";branch=z9hG4bK") {
				t.Errorf("Call-ID %q, Via %q", m.Get("Call-ID"), via)
			}
			if seen[m.Get("Call-ID")] || seen[via+m.Method] {
				t.Errorf("message %d is not new", n)
			}
			seen[m.Get("Call-ID")], seen[via+m.Method] = true, true
		}
		if reg.Method != "REGISTER" || !strings.Contains(reg.Get("Authorization"), `username="001@home.example"`) ||
			!strings.Contains(reg.Get("Security-Client"), "spi-c=") {
			t.Errorf("got %s", reg.Bytes())
		}
		if msg.Method != "MESSAGE" || msg.URI != "sip:b@home.example" || string(msg.Body) != "boo!" {
			t.Errorf("got %s", msg.Bytes())
		}
	}
}
