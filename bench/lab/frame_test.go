package lab

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
)

// packet builds an Ethernet frame with an IP packet of either family. ext is put between an IPv6 header and body.
func packet(src, dst string, proto byte, fragment uint16, ext, body []byte) []byte {
	s, d := netip.MustParseAddr(src), netip.MustParseAddr(dst)
	b := make([]byte, 12, 200)
	if s.Is4() {
		b = binary.BigEndian.AppendUint16(b, etherIPv4)
		b = append(b, 0x45, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(20+len(body)))
		b = append(b, 0, 1)
		b = binary.BigEndian.AppendUint16(b, fragment)
		b = append(b, 64, proto, 0, 0)
	} else {
		b = binary.BigEndian.AppendUint16(b, etherIPv6)
		b = append(b, 0x60, 0, 0, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(len(ext)+len(body)))
		b = append(b, proto, 64)
	}
	b = append(append(b, s.AsSlice()...), d.AsSlice()...)
	return append(append(b, ext...), body...)
}

func udp(sport, dport uint16, data string) []byte {
	b := binary.BigEndian.AppendUint16(nil, sport)
	b = binary.BigEndian.AppendUint16(b, dport)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(data)))
	return append(append(b, 0, 0), data...)
}

func tcp(sport, dport uint16, data string) []byte {
	b := binary.BigEndian.AppendUint16(nil, sport)
	b = binary.BigEndian.AppendUint16(b, dport)
	b = append(b, make([]byte, 8)...)
	b = append(b, 6<<4, 0x10, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1) // six words: with options
	return append(b, data...)
}

const register = "REGISTER sip:d SIP/2.0\r\nVia: SIP/2.0/UDP 10.45.0.1;branch=z9hG4bK1\r\nCall-ID: c1\r\nCSeq: 1 REGISTER\r\n" +
	"Authorization: Digest username=\"u\",response=\"\"\r\n\r\n"

func TestDissect(t *testing.T) {
	const ue4, gm4, ue6, gm6 = "10.45.0.1", "10.0.0.5", "2001:db8:45::1", "2001:db8::5"
	esp := []byte{0x10, 0, 0, 1, 0, 0, 0, 9, 1, 2, 3, 4}
	fragHead := []byte{protoESP, 0, 0, 1, 0, 0, 0, 7}   // offset 0, more
	fragTail := []byte{protoESP, 0, 0, 185, 0, 0, 0, 7} // offset 184, more
	hop := []byte{protoUDP, 0, 1, 4, 0, 0, 0, 0}
	tests := []struct {
		name     string
		frame    []byte
		class    Class
		spi      ims.SPI
		fragment bool
		src      string
	}{
		{"esp4", packet(ue4, gm4, protoESP, 0, nil, esp), ClassESP, 0x10000001, false, "10.45.0.1:0"},
		{"esp4 first fragment", packet(ue4, gm4, protoESP, moreFragment, nil, esp), ClassESP, 0x10000001, true, "10.45.0.1:0"},
		{"esp4 last fragment", packet(ue4, gm4, protoESP, 185, nil, esp), ClassESP, 0, true, "10.45.0.1:0"},
		{"esp6", packet(ue6, gm6, protoESP, 0, nil, esp), ClassESP, 0x10000001, false, "[2001:db8:45::1]:0"},
		{"esp6 first fragment", packet(ue6, gm6, extFragment, 0, fragHead, esp), ClassESP, 0x10000001, true, "[2001:db8:45::1]:0"},
		{"esp6 fragment", packet(ue6, gm6, extFragment, 0, fragTail, esp), ClassESP, 0, true, "[2001:db8:45::1]:0"},
		{"sip udp4", packet(ue4, gm4, protoUDP, 0, nil, udp(5060, 5060, register)), ClassClearSIP, 0, false, "10.45.0.1:5060"},
		{"sip tcp4", packet(ue4, gm4, protoTCP, 0, nil, tcp(4000, 5060, "\r\nSIP/2.0 200 OK\r\n")), ClassClearSIP, 0, false, "10.45.0.1:4000"},
		{"sip udp6 behind hop-by-hop", packet(ue6, gm6, extHopByHop, 0, hop, udp(1, 2, register)), ClassClearSIP, 0, false, "[2001:db8:45::1]:1"},
		{"tcp handshake", packet(ue4, gm4, protoTCP, 0, nil, tcp(4000, 5060, "")), ClassClear, 0, false, "10.45.0.1:4000"},
		{"udp keep-alive", packet(ue4, gm4, protoUDP, 0, nil, udp(1, 2, "\r\n\r\n")), ClassClear, 0, false, "10.45.0.1:1"},
		{"udp later fragment", packet(ue4, gm4, protoUDP, 100, nil, []byte(register)), ClassClear, 0, true, "10.45.0.1:0"},
		{"icmp", packet(ue4, gm4, 1, 0, nil, make([]byte, 8)), ClassOther, 0, false, "10.45.0.1:0"},
		{"arp", append(make([]byte, 12), 8, 6, 0, 1), ClassOther, 0, false, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := dissect(tt.frame)
			if f.class != tt.class || f.spi != tt.spi || f.fragment != tt.fragment {
				t.Errorf("got %s spi %s fragment %t, want %s %s %t", f.class, f.spi, f.fragment, tt.class, tt.spi, tt.fragment)
			}
			if tt.src != "" && f.src.String() != tt.src {
				t.Errorf("got source %s, want %s", f.src, tt.src)
			}
			for n := range len(tt.frame) { // whatever is cut off, nothing is read beyond the end
				if got := dissect(tt.frame[:n]); n < etherHeader && got.class != ClassOther {
					t.Errorf("%d octets: got %s", n, got.class)
				}
			}
		})
	}
}

func TestIsSIP(t *testing.T) {
	for in, want := range map[string]bool{
		"MESSAGE sip:a SIP/2.0\r\n": true, "SIP/2.0 401 Unauthorized": true, "\r\n\r\nSIP/2.0 200": true,
		"\r\n\r\n": false, "": false, "GET / HTTP/1.1\r\n": false, "x\r\nSIP/2.0": false, "aSIP/2.0\r\n": false,
	} {
		if got := isSIP([]byte(in)); got != want {
			t.Errorf("isSIP(%q) = %t, want %t", in, got, want)
		}
	}
}

func testCapture(payloads ...[]byte) *Capture {
	c := &Capture{bySPI: map[ims.SPI]int{}, ues: [2]netip.Prefix{plan4.UEs, plan6.UEs}}
	for _, p := range payloads {
		c.take(p, time.Unix(1, 0))
	}
	return c
}

func up(data string) []byte {
	return packet("10.45.0.1", "10.0.0.5", protoUDP, 0, nil, udp(5060, 5060, data))
}

func down(data string) []byte {
	return packet("10.0.0.5", "10.45.0.1", protoUDP, 0, nil, udp(5060, 5060, data))
}

func answer(status string) string {
	return "SIP/2.0 " + status + " X\r\nCall-ID: c1\r\nCSeq: 1 REGISTER\r\nWWW-Authenticate: Digest nonce=\"n\"\r\n\r\n"
}

func TestCheckClear(t *testing.T) {
	esp := func(spi byte, data string) []byte {
		return packet("10.0.0.5", "10.45.0.1", protoESP, 0, nil, append([]byte{0x10, 0, 0, spi, 0, 0, 0, 1}, data...))
	}
	second := strings.Replace(register, "branch=z9hG4bK1", "branch=z9hG4bK2", 1)
	leak := strings.Replace(answer("401"), "nonce=\"n\"", "nonce=\"n\",IK=\"00112233445566778899aabbccddeeff\"", 1)
	tests := []struct {
		name   string
		frames [][]byte
		rules  ClearRules
		want   string // part of the error, empty for none
	}{
		{"registration", [][]byte{up(register), up(register), down(answer("401")), esp(1, "x")}, ClearRules{Registrations: 1}, ""},
		{"two registrations", [][]byte{up(register), up(second)}, ClearRules{Registrations: 1}, "2 REGISTER in clear"},
		{"two allowed", [][]byte{up(register), up(second)}, ClearRules{Registrations: 2}, ""},
		{"challenge response", [][]byte{up(strings.Replace(register, `response=""`, `response="ab"`, 1))}, ClearRules{}, "challenge response"},
		{"synchronisation failure", [][]byte{up(strings.Replace(register, `response=""`, `response="ab",auts="x"`, 1))}, ClearRules{}, ""},
		{"other request", [][]byte{up("MESSAGE sip:a SIP/2.0\r\n\r\n")}, ClearRules{}, "in clear: MESSAGE udp 10.45.0.1:5060->10.0.0.5:5060"},
		{
			"allowed by the test",
			[][]byte{up("MESSAGE sip:a SIP/2.0\r\n\r\n")},
			ClearRules{Also: func(m ClearSIP) bool { return m.Method == "MESSAGE" }},
			"",
		},
		{"200 in clear", [][]byte{down(answer("200"))}, ClearRules{}, "in clear: 200 (REGISTER)"},
		{"504 allowed", [][]byte{down(answer("504"))}, ClearRules{Statuses: []int{401, 504}}, ""},
		{"key in the 401", [][]byte{down(leak)}, ClearRules{}, "readable ck or ik"},
		{"key under null encryption", [][]byte{esp(1, leak)}, ClearRules{}, "readable ck or ik"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := testCapture(tt.frames...)
			err := c.CheckClear(tt.rules)
			switch {
			case tt.want == "" && err != nil:
				t.Errorf("got %v", err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("got %v, want %q in it", err, tt.want)
			}
		})
	}
}

func TestCaptureCounts(t *testing.T) {
	out := packet("10.0.0.5", "10.45.0.1", protoESP, 0, nil, []byte{0, 0, 1, 0, 0, 0, 0, 1})
	in := packet("10.45.0.1", "10.0.0.5", protoESP, 0, nil, []byte{0, 0, 2, 0, 0, 0, 0, 1})
	c := testCapture(out, out, in, up(register), up("\r\n"), packet("10.45.0.1", "10.0.0.5", 1, 0, nil, nil))
	s := c.Stats()
	want := Stats{ESPIn: 1, ESPOut: 2, ESPBytes: 24, ClearSIP: 1, Clear: 1, Other: 1}
	if s != want {
		t.Errorf("got %+v, want %+v", s, want)
	}
	if c.Packets(0x100) != 2 || c.Packets(0x200) != 1 || len(c.Frames()) != 3 {
		t.Errorf("got %d, %d packets and %d frames", c.Packets(0x100), c.Packets(0x200), len(c.Frames()))
	}
	m := c.Clear()[0]
	if m.Method != "REGISTER" || m.CSeq != 1 || m.CSeqMethod != "REGISTER" || m.CallID != "c1" || m.Branch != "z9hG4bK1" {
		t.Errorf("got %+v", m)
	}
}

// What a connection carries in several segments is one message: what a later one says counts as well.
func TestCaptureJoinsSegments(t *testing.T) {
	segment := func(src, dst string, sport, dport uint16, data string) []byte {
		return packet(src, dst, protoTCP, 0, nil, tcp(sport, dport, data))
	}
	const ue, gm = "10.45.0.1", "10.0.0.5"
	answered := strings.Replace(register, `response=""`, `response="0123456789abcdef"`, 1)
	cut := strings.Index(answered, "Call-ID")
	c := testCapture(
		segment(ue, gm, 4000, 5060, answered[:cut]),
		segment(ue, gm, 4001, 5060, "of another connection"),
		segment(gm, ue, 5060, 4000, ""),
		segment(ue, gm, 4000, 5060, answered[cut:]),
	)
	m := c.Clear()
	if len(m) != 1 || string(m[0].Payload) != answered || m[0].CSeq != 1 || m[0].CallID != "c1" {
		t.Fatalf("got %d messages, %+v", len(m), m)
	}
	if err := c.CheckClear(ClearRules{}); err == nil || !strings.Contains(err.Error(), "challenge response in clear") {
		t.Errorf("the second segment was not looked at: %v", err)
	}
}

// The last packets of phones are kept as they were, and can be sent again.
func TestCaptureKeeps(t *testing.T) {
	esp := func(src, dst string, fragment uint16, n byte) []byte {
		return packet(src, dst, protoESP, fragment, nil, []byte{0, 0, 1, 0, 0, 0, 0, n, n, n, n, n})
	}
	up4 := func(n byte) []byte { return esp("10.45.0.1", "10.0.0.5", 0, n) }
	c := testCapture(up4(0)) // before anybody asked
	c.Keep(3)
	for _, f := range [][]byte{
		up4(1), esp("10.0.0.5", "10.45.0.1", 0, 9), up4(2), esp("10.45.0.1", "10.0.0.5", moreFragment, 9), up(register),
	} {
		c.take(f, time.Unix(1, 0))
	}
	v6 := esp("2001:db8:45::1", "2001:db8::5", 0, 4)
	kept := func(want ...[]byte) {
		t.Helper()
		got := c.Kept()
		if len(got) != len(want) {
			t.Fatalf("%d packets, want %d", len(got), len(want))
		}
		for i := range got {
			if string(got[i]) != string(want[i][etherHeader:]) {
				t.Errorf("packet %d: %x, want %x", i, got[i], want[i][etherHeader:])
			}
		}
	}
	kept(up4(1), up4(2))
	c.take(append(up4(3), make([]byte, 6)...), time.Unix(1, 0)) // padding of the link
	c.take(v6, time.Unix(1, 0))
	kept(up4(2), up4(3), v6)
	c.take(up4(5), time.Unix(1, 0))
	kept(up4(3), v6, up4(5))
	c.Keep(0)
	c.take(up4(6), time.Unix(1, 0))
	kept()
}
