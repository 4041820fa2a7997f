package guard

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/gmgate/gmgate/bpf"
	"github.com/gmgate/gmgate/control/ims"
)

// SPIs of the phone's sets. Those beside them are unknown.
const (
	spi4       = 0x1000 // port-ps, to the IPv4 address; port-pc has the next one
	spi6       = 0x2000
	spiForeign = 0x3000
	spiUnknown = 0x4000

	label4, label6 = 7, 8
	set4, set6     = 70, 80
)

// ward is a guard whose programs run on packets of a test, and nowhere else.
type ward struct {
	*Guard
	programs []program
	model    *model
	seen     [reasons]Tally
	reasons  []uint32         // keys of the counters
	lane     []bpf.GuardTally // of each CPU
	cpus     int
}

// program is one of the four.
type program struct {
	name       string
	prog       *ebpf.Program
	raw        bool // sees IP packets without a frame
	tc         bool
	pass, drop uint32
}

func testConfig() Config {
	return Config{
		Local: []netip.Addr{netip.MustParseAddr("192.0.2.200"), local4, local6}, ClearPort: clearPort,
		Protected: []uint16{portPS, portPC, 63, 64, 65535},
		SAs:       64, UEs: 8, Sources: 1024,
	}
}

// newWard loads a guard, with two sets of one phone and an SA of another program.
func newWard(t testing.TB, cfg Config) *ward {
	t.Helper()
	g := openGuard(t, cfg)
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		t.Fatal(err)
	}
	w := &ward{Guard: g, model: newModel(&g.cfg), cpus: cpus, reasons: make([]uint32, reasons), lane: make([]bpf.GuardTally, int(reasons)*cpus)}
	w.programs = []program{
		{name: "xdp", prog: g.objs.GuardXdp, pass: 2, drop: 1},
		{name: "xdp raw", prog: g.objs.GuardXdpRaw, raw: true, pass: 2, drop: 1},
		{name: "tc", prog: g.objs.GuardTc, tc: true, pass: math.MaxUint32, drop: 2},
		{name: "tc raw", prog: g.objs.GuardTcRaw, raw: true, tc: true, pass: math.MaxUint32, drop: 2},
	}
	if err := g.Sync(nil, []ims.SPI{spiForeign}); err != nil {
		t.Fatal(err)
	}
	for _, p := range []struct {
		id          uint64
		label       uint32
		local, from netip.Addr
		spi         ims.SPI
	}{{set4, label4, local4, phone4, spi4}, {set6, label6, local6, phone6, spi6}} {
		if err := g.Add(setOf(p.id, p.label, p.local, p.from, p.spi)); err != nil {
			t.Fatal(err)
		}
		w.model.sas[modelSA{p.local, p.spi}], w.model.sas[modelSA{p.local, p.spi + 1}] = p.from, p.from
	}
	for _, a := range cfg.Local {
		w.model.foreign[modelSA{a, spiForeign}] = true
	}
	w.seen = w.tallies(t)
	return w
}

// tallies reads the counters.
func (w *ward) tallies(t rapid.TB) (sum [reasons]Tally) {
	t.Helper()
	var cursor ebpf.MapBatchCursor
	if n, err := w.objs.Tallies.BatchLookup(&cursor, w.reasons, w.lane, nil); n != int(reasons) || err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Fatalf("%d counters: %v", n, err)
	}
	for i, r := range w.reasons {
		for _, v := range w.lane[i*w.cpus : (i+1)*w.cpus] {
			sum[r].Packets += v.Packets
			sum[r].Bytes += v.Bytes
		}
	}
	return sum
}

// skips reports whether the kernel refuses to run a tc program on a packet: of what it takes for IP it wants the header.
func (p *program) skips(data []byte) bool {
	if len(data) < 14 {
		return true
	}
	if !p.tc {
		return false
	}
	switch binary.BigEndian.Uint16(data[12:]) {
	case 0x0800:
		return len(data) < 14+20
	case 0x86dd:
		return len(data) < 14+40
	}
	return false
}

// run gives a program a packet, and returns why it was passed or dropped and the octets that were counted.
func (w *ward) run(t testing.TB, p *program, data []byte) (Reason, int) {
	t.Helper()
	got, err := p.prog.Run(&ebpf.RunOptions{Data: data})
	if err != nil {
		t.Fatalf("%s of %d octets: %v\n%x", p.name, len(data), err, data)
	}
	now, before := w.tallies(t), w.seen
	w.seen = now
	reason, moved := PassOther, 0
	for r := range reasons {
		if now[r] != before[r] {
			reason = r
			moved++
		}
	}
	if moved != 1 || now[reason].Packets != before[reason].Packets+1 {
		t.Fatalf("%s: one packet has moved the counters from %v to %v\n%x", p.name, before, now, data)
	}
	want := p.pass
	if reason.Dropped() {
		want = p.drop
	}
	if got != want {
		t.Errorf("%s: verdict %d for %s, want %d\n%x", p.name, int32(got), reason, int32(want), data) //nolint:gosec // TC_ACT_UNSPEC is -1
	}
	return reason, int(now[reason].Bytes - before[reason].Bytes) //nolint:gosec // of one packet
}

// expect runs all four programs on an IP packet.
func (w *ward) expect(t testing.TB, name string, packet []byte, want Reason) {
	t.Helper()
	frame := inFrame(packet)
	for i := range w.programs {
		p := &w.programs[i]
		data, raw := frame, p.raw
		if raw {
			data = packet
		}
		if p.skips(data) {
			continue
		}
		got, octets := w.run(t, p, data)
		if got != want {
			t.Errorf("%s: %s says %s, want %s\n%x", name, p.name, got, want, data)
		}
		if f := w.model.judge(data, raw); f.reason != want || f.octets != octets {
			t.Errorf("%s: %s counts %d octets, the model says %s and %d\n%x", name, p.name, octets, f.reason, f.octets, data)
		}
	}
}

// family is what the tables vary.
type family struct {
	name                          string
	local, other, phone, stranger netip.Addr
	spi                           uint32
	set                           uint64
	label                         uint32
	header                        int
	lengthAt                      int
}

func families() []family {
	return []family{
		{"IPv4", local4, other4, phone4, stranger4, spi4, set4, label4, 20, 2},
		{"IPv6", local6, other6, phone6, stranger6, spi6, set6, label6, 40, 4},
	}
}

// packet is a case of a table.
type packet struct {
	name string
	ip   []byte
	want Reason
}

// valid returns a packet of each kind.
func (f *family) valid() []packet {
	to := func(proto uint8, payload []byte) []byte { return ip(f.phone, f.local, proto, payload) }
	return []packet{
		{"ESP to port-ps", to(protoESP, esp(f.spi)), PassESP},
		{"ESP to port-pc", to(protoESP, esp(f.spi+1)), PassESP},
		{"ESP without payload", to(protoESP, esp(f.spi)[:8]), PassESP},
		{"ESP in UDP", to(protoUDP, udp(4500, 4500, esp(f.spi))), PassESPInUDP},
		{"ESP in UDP from a mapped port", to(protoUDP, udp(61234, 4500, esp(f.spi))), PassESPInUDP},
		{"keep-alive", to(protoUDP, udp(4500, 4500, []byte{0xff})), PassKeepalive},
		{"IKE", to(protoUDP, udp(4500, 4500, make([]byte, 32))), PassIKE},
		{"non-ESP marker alone", to(protoUDP, udp(4500, 4500, make([]byte, 4))), PassIKE},
		{"ESP of another program", to(protoESP, esp(spiForeign)), PassUnknownSPI},
		{"ESP of another program from elsewhere", ip(f.stranger, f.local, protoESP, esp(spiForeign)), PassUnknownSPI},
		{"REGISTER", to(protoUDP, udp(31000, clearPort, []byte(register))), PassClearPort},
		{"OPTIONS", to(protoUDP, udp(31000, clearPort, []byte(options))), PassClearPort},
		{"SYN", to(protoTCP, tcp(31000, clearPort, flagSYN, nil)), PassClearPort},
		{"REGISTER over TCP", to(protoTCP, tcp(31000, clearPort, flagPSH|flagACK, []byte(register))), PassClearPort},
		{"UDP to port-ps", to(protoUDP, udp(31000, portPS, []byte(options))), DropCleartext},
		{"UDP to port-pc", to(protoUDP, udp(31001, portPC, []byte(options))), DropCleartext},
		{"empty UDP to port-ps", to(protoUDP, udp(31000, portPS, nil)), DropCleartext},
		{"SYN to port-ps", to(protoTCP, tcp(31000, portPS, flagSYN, nil)), DropCleartext},
		{"RST to port-pc", to(protoTCP, tcp(31001, portPC, flagRST, nil)), DropCleartext},
		{"UDP to port 63", to(protoUDP, udp(31000, 63, nil)), DropCleartext},
		{"UDP to port 64", to(protoUDP, udp(31000, 64, nil)), DropCleartext},
		{"UDP to port 65535", to(protoUDP, udp(31000, 65535, nil)), DropCleartext},
		{"UDP to port 62", to(protoUDP, udp(31000, 62, nil)), PassOther},
		{"UDP to port 65", to(protoUDP, udp(31000, 65, nil)), PassOther},
		{"UDP to another port", to(protoUDP, udp(31000, otherPort, nil)), PassOther},
		{"UDP to port 500", to(protoUDP, udp(500, 500, make([]byte, 28))), PassOther},
		{"TCP to another port", to(protoTCP, tcp(31000, otherPort, flagSYN, nil)), PassOther},
		{"TCP to port 4500", to(protoTCP, tcp(31000, 4500, flagSYN, nil)), PassOther},
		{"ICMP", to(1, make([]byte, 8)), PassOther},
		{"SCTP", to(132, make([]byte, 12)), PassOther},
		{"ESP to another host", ip(f.phone, f.other, protoESP, esp(f.spi)), PassOther},
		{"UDP to port-ps of another host", ip(f.phone, f.other, protoUDP, udp(31000, portPS, nil)), PassOther},
		{"ESP from us", ip(f.local, f.phone, protoESP, esp(f.spi)), PassOther},
	}
}

// invalid returns what of a packet can be wrong beside its IP header.
func (f *family) invalid() []packet {
	to := func(proto uint8, payload []byte) []byte { return ip(f.phone, f.local, proto, payload) }
	from := func(proto uint8, payload []byte) []byte { return ip(f.stranger, f.local, proto, payload) }
	cases := []packet{
		{"unknown SPI", to(protoESP, esp(spiUnknown)), DropUnknownSPI},
		{"SPI after the set's", to(protoESP, esp(f.spi+2)), DropUnknownSPI},
		{"SPI before the set's", to(protoESP, esp(f.spi-1)), DropUnknownSPI},
		{"SPI in the other byte order", to(protoESP, esp(f.spi<<16)), DropUnknownSPI},
		{"SPI of the other address", to(protoESP, esp(spi4^spi6^f.spi)), DropUnknownSPI},
		{"greatest SPI", to(protoESP, esp(math.MaxUint32)), DropUnknownSPI},
		{"SPI 0", to(protoESP, esp(0)), DropSPIReserved},
		{"SPI 1", to(protoESP, esp(1)), DropSPIReserved},
		{"SPI 255", to(protoESP, esp(255)), DropSPIReserved},
		{"SPI 256", to(protoESP, esp(256)), DropUnknownSPI},
		{"SPI 1 in UDP", to(protoUDP, udp(4500, 4500, esp(1))), DropSPIReserved},
		{"SPI 255 in UDP", to(protoUDP, udp(4500, 4500, esp(255))), DropSPIReserved},
		{"unknown SPI in UDP", to(protoUDP, udp(4500, 4500, esp(spiUnknown))), DropUnknownSPI},
		{"another phone's SPI", from(protoESP, esp(f.spi)), DropWrongSource},
		{"another phone's SPI in UDP", from(protoUDP, udp(4500, 4500, esp(f.spi))), DropWrongSource},
		{"own address as the source", ip(f.local, f.local, protoESP, esp(f.spi)), DropWrongSource},
		{"port 4500 of a packet without anything", to(protoUDP, udp(4500, 4500, nil)), DropESPShort},
		{"other octet than a keep-alive", to(protoUDP, udp(4500, 4500, []byte{0xfe})), DropESPShort},
		{"keep-alive with more", to(protoUDP, udp(4500, 4500, []byte{0xff, 0xff})), DropESPShort},
		{"part of a marker", to(protoUDP, udp(4500, 4500, make([]byte, 3))), DropESPShort},
		{"UDP to port 0", to(protoUDP, udp(31000, 0, nil)), DropPortZero},
		{"TCP to port 0", to(protoTCP, tcp(31000, 0, flagSYN, nil)), DropPortZero},
		{"UDP from port 0", to(protoUDP, udp(0, clearPort, []byte(register))), DropPortZero},
		{"UDP from port 0 to port-ps", to(protoUDP, udp(0, portPS, nil)), DropPortZero},
		{"UDP from port 0 to port 4500", to(protoUDP, udp(0, 4500, esp(f.spi))), DropPortZero},
		{"UDP from port 0 to another port", to(protoUDP, udp(0, otherPort, nil)), PassOther},
		{"TCP from port 0", to(protoTCP, tcp(0, clearPort, flagSYN, nil)), DropPortZero},
		{"TCP from port 0 to another port", to(protoTCP, tcp(0, otherPort, flagSYN, nil)), PassOther},
	}
	for _, port := range []uint16{clearPort, portPS, 4500} {
		d := udp(31000, port, make([]byte, 12))
		for _, n := range []uint16{0, 1, 7, 21, 22, 0xffff} {
			cases = append(cases, packet{fmt.Sprintf("UDP length %d of 20 to port %d", n, port), to(protoUDP, put16(d, 4, n)), DropMalformed})
		}
	}
	// The length that counts is UDP's: what lies behind it is nobody's.
	cases = append(cases,
		packet{"keep-alive with octets behind it", to(protoUDP, put16(udp(4500, 4500, []byte("\xff1234567890")), 4, 9)), PassKeepalive},
		packet{"ESP in UDP that is longer than UDP says", to(protoUDP, put16(udp(4500, 4500, esp(f.spi)), 4, 15)), DropESPShort},
		packet{"UDP length 8 to port-ps", to(protoUDP, put16(udp(31000, portPS, make([]byte, 12)), 4, 8)), DropCleartext})
	// Each length of a payload, the IP packet being right.
	for n := range 9 {
		cases = append(cases, packet{fmt.Sprintf("%d octets of ESP", n), to(protoESP, esp(f.spi)[:n]), either(n < 8, DropESPShort, PassESP)},
			packet{fmt.Sprintf("%d octets of UDP", n), to(protoUDP, udp(31000, portPS, nil)[:min(n, 8)]), either(n < 8, DropMalformed, DropCleartext)})
	}
	for n := range 21 {
		cases = append(cases,
			packet{fmt.Sprintf("%d octets of TCP", n), to(protoTCP, tcp(31000, portPS, flagSYN, nil)[:n]), either(n < 20, DropMalformed, DropCleartext)},
			packet{fmt.Sprintf("%d octets of TCP to another port", n), to(protoTCP, tcp(31000, otherPort, flagSYN, nil)[:n]), either(n < 4, DropMalformed, PassOther)})
	}
	return cases
}

func either(c bool, a, b Reason) Reason {
	if c {
		return a
	}
	return b
}

// fragments returns first, later and last fragments.
func (f *family) fragments() []packet {
	var cases []packet
	add := func(name string, proto uint8, payload []byte, offset uint16, more bool, want Reason) {
		p := ip4(f.phone, f.local, proto, nil, payload)
		if f.phone.Is6() {
			p = ip6(f.phone, f.local, protoFragment, fragment6(proto, offset, more, payload))
		} else {
			p = fragment4(p, offset, more)
		}
		cases = append(cases, packet{name, p, want})
	}
	long := func(port uint16, payload []byte) []byte { return put16(udp(31000, port, payload), 4, 1400) }
	add("first of ESP", protoESP, esp(f.spi), 0, true, PassESP)
	add("first of ESP with an unknown SPI", protoESP, esp(spiUnknown), 0, true, DropUnknownSPI)
	add("first of ESP that hides the SPI", protoESP, nil, 0, true, DropESPShort)
	add("first of ESP in UDP", protoUDP, long(4500, esp(f.spi)), 0, true, PassESPInUDP)
	add("first of ESP in UDP that hides the SPI", protoUDP, long(4500, nil), 0, true, DropESPShort)
	add("first of UDP to port-ps", protoUDP, long(portPS, nil), 0, true, DropCleartext)
	add("first of UDP to the unprotected port", protoUDP, long(clearPort, []byte(register)), 0, true, PassClearPort)
	add("first of UDP to another port", protoUDP, long(otherPort, nil), 0, true, PassOther)
	add("first of UDP with a length below the header", protoUDP, put16(udp(31000, clearPort, nil), 4, 7), 0, true, DropMalformed)
	add("first of TCP to port-ps", protoTCP, tcp(31000, portPS, flagSYN, nil), 0, true, DropCleartext)
	add("tiny first of TCP to port-ps", protoTCP, tcp(31000, portPS, flagSYN, nil)[:8], 0, true, DropMalformed)
	add("tiny first of TCP to the unprotected port", protoTCP, tcp(31000, clearPort, flagSYN, nil)[:16], 0, true, DropMalformed)
	add("tiny first of TCP to another port", protoTCP, tcp(31000, otherPort, flagSYN, nil)[:8], 0, true, PassOther)
	for _, offset := range []uint16{1, 2, 0xfff, 0x1fff} {
		for _, more := range []bool{false, true} {
			add(fmt.Sprintf("one at %d, more %v", offset, more), protoUDP, udp(31000, portPS, nil), offset, more, PassFragment)
			add(fmt.Sprintf("one of ESP at %d, more %v", offset, more), protoESP, esp(spiUnknown), offset, more, PassFragment)
			add(fmt.Sprintf("one without anything at %d, more %v", offset, more), protoTCP, nil, offset, more, PassFragment)
		}
	}
	return cases
}

func TestPackets(t *testing.T) {
	w := newWard(t, testConfig())
	for _, f := range families() {
		for name, table := range map[string][]packet{"valid": f.valid(), "invalid": f.invalid(), "fragments": f.fragments()} {
			t.Run(f.name+" "+name, func(t *testing.T) {
				for _, c := range table {
					w.expect(t, c.name, c.ip, c.want)
					w.expect(t, c.name+" and padding", append(slices.Clone(c.ip), make([]byte, 46)...), c.want)
				}
			})
		}
	}
}

// TestTruncated cuts each valid packet at each length, and makes its IP header claim more and less than there is.
func TestTruncated(t *testing.T) {
	w := newWard(t, testConfig())
	for _, f := range families() {
		for _, c := range f.valid() {
			local := f.local == netip.MustParseAddr(destinationOf(c.ip).String())
			step := 1
			if inGuest() {
				step = 3
			}
			for n := 0; n < len(c.ip); n += step {
				want := DropMalformed
				if n < f.header || !local {
					want = PassOther
				}
				if n > 0 {
					w.expect(t, fmt.Sprintf("%s %s, %d of %d octets", f.name, c.name, n, len(c.ip)), c.ip[:n], want)
				}
			}
			if !local {
				continue
			}
			claimed := binary.BigEndian.Uint16(c.ip[f.lengthAt:])
			for _, more := range []uint16{1, 2, 100, math.MaxUint16 - claimed} {
				w.expect(t, fmt.Sprintf("%s %s, %d octets too few", f.name, c.name, more), put16(c.ip, f.lengthAt, claimed+more), DropMalformed)
			}
		}
		// Total lengths below the header are malformed, others cut the payload.
		p := ip(f.phone, f.local, protoESP, esp(f.spi))
		least := f.header - 40*int(flag(f.phone.Is6()))
		for n := range least {
			w.expect(t, fmt.Sprintf("%s total length %d", f.name, n), put16(p, f.lengthAt, uint16(n)), DropMalformed) //nolint:gosec // small
		}
		for n := range 9 {
			w.expect(t, fmt.Sprintf("%s with %d octets of payload", f.name, n), put16(p, f.lengthAt, uint16(least+n)), either(n < 8, DropESPShort, PassESP)) //nolint:gosec // small
		}
	}
}

func destinationOf(packet []byte) netip.Addr {
	if packet[0]>>4 == 6 {
		return netip.AddrFrom16([16]byte(packet[24:40]))
	}
	return netip.AddrFrom4([4]byte(packet[16:20]))
}

// TestHeaders gives the version and the length of the IP header each value.
func TestHeaders(t *testing.T) {
	w := newWard(t, testConfig())
	frame, raw := []int{0, 2}, []int{1, 3}
	run := func(name string, which []int, data []byte, want Reason) {
		t.Helper()
		for _, i := range which {
			if p := &w.programs[i]; !p.skips(data) {
				if got, _ := w.run(t, p, data); got != want {
					t.Errorf("%s: %s says %s, want %s\n%x", name, p.name, got, want, data)
				}
			}
		}
	}
	for _, f := range families() {
		good := ip(f.phone, f.local, protoESP, append(esp(f.spi), make([]byte, 40)...))
		for v := range 16 {
			name := fmt.Sprintf("%s version %d", f.name, v)
			p := put8(good, 0, uint8(v)<<4|good[0]&15) //nolint:gosec // four bits
			etherType := uint16(0x0800)
			if f.phone.Is6() {
				etherType = 0x86dd
			}
			if v == int(good[0]>>4) {
				w.expect(t, name, p, PassESP)
				continue
			}
			run(name, frame, ethernetOf(etherType, p), DropMalformed)
			run(name, raw, p, PassOther) // read as the other version it is for nobody
		}
	}
	for n := range 16 {
		p := put8(ip(phone4, local4, protoESP, make([]byte, 60)), 0, uint8(0x40+n)) //nolint:gosec // four bits
		binary.BigEndian.PutUint32(p[max(20, 4*n):], spi4)
		w.expect(t, fmt.Sprintf("%d words of header", n), p, either(n < 5, DropMalformed, PassESP))
		p = put16(p, 2, uint16(4*n+7)) //nolint:gosec // small
		w.expect(t, fmt.Sprintf("%d words of header and 7 octets", n), p, either(n < 5, DropMalformed, DropESPShort))
		if n > 5 {
			w.expect(t, fmt.Sprintf("%d words of header in a shorter packet", n), put16(p, 2, uint16(4*n-1)), DropMalformed) //nolint:gosec // small
		}
	}
	for n := 0; n <= 40; n += 4 {
		for _, c := range []packet{
			{"ESP", ip4(phone4, local4, protoESP, make([]byte, n), esp(spi4)), PassESP},
			{"unknown SPI", ip4(phone4, local4, protoESP, make([]byte, n), esp(spiUnknown)), DropUnknownSPI},
			{"cleartext", ip4(phone4, local4, protoUDP, make([]byte, n), udp(31000, portPS, nil)), DropCleartext},
			{"SYN in clear", ip4(phone4, local4, protoTCP, make([]byte, n), tcp(31000, portPS, flagSYN, nil)), DropCleartext},
		} {
			w.expect(t, fmt.Sprintf("%s behind %d octets of options", c.name, n), c.ip, c.want)
		}
	}
}

// TestLinks gives frames tags, and types that are not IP.
func TestLinks(t *testing.T) {
	w := newWard(t, testConfig())
	const vlan, qinq = 0x8100, 0x88a8
	run := func(name string, data []byte, want Reason, octets int) {
		t.Helper()
		for _, i := range []int{0, 2} {
			p := &w.programs[i]
			if p.skips(data) {
				continue
			}
			got, n := w.run(t, p, data)
			if f := w.model.judge(data, false); got != want || n != octets || f.reason != got || f.octets != n {
				t.Errorf("%s: %s says %s and %d octets, the model %s and %d, want %s and %d\n%x", name, p.name, got, n, f.reason, f.octets, want, octets, data)
			}
		}
	}
	for _, f := range families() {
		for _, c := range []packet{
			{"ESP", ip(f.phone, f.local, protoESP, esp(f.spi)), PassESP},
			{"unknown SPI", ip(f.phone, f.local, protoESP, esp(spiUnknown)), DropUnknownSPI},
			{"cleartext", ip(f.phone, f.local, protoUDP, udp(31000, portPS, nil)), DropCleartext},
		} {
			name := f.name + " " + c.name
			for _, tags := range [][]uint16{{}, {vlan}, {qinq}, {qinq, vlan}, {vlan, vlan}, {vlan, qinq}} {
				run(fmt.Sprintf("%s behind tags %x", name, tags), inFrame(c.ip, tags...), c.want, len(c.ip))
			}
			three := inFrame(c.ip, qinq, vlan, vlan)
			run(name+" behind three tags", three, PassOther, len(three))
			for _, other := range []uint16{0, 0x0806, 0x8847, 0x8863, 0x8864, 0x88cc, 0x9100, 0xffff, 0x05dc} {
				frame := ethernetOf(other, c.ip)
				run(fmt.Sprintf("%s in frames of type %#x", name, other), frame, PassOther, len(frame))
			}
		}
		frame := inFrame(ip(f.phone, f.local, protoESP, esp(f.spi)), qinq, vlan)
		for n := 14; n < 22+f.header; n++ {
			run(fmt.Sprintf("%s with two tags, cut at %d", f.name, n), frame[:n], PassOther, n)
		}
	}
}

// TestExtensions chains IPv6 extension headers: each kind, up to the limit and beyond, cut, and with lengths that reach
// beyond the packet.
func TestExtensions(t *testing.T) {
	w := newWard(t, testConfig())
	kinds := []uint8{protoHopByHop, protoRouting, protoDestOptions, protoMobility, protoHIP, protoShim6, protoAH, protoFragment}
	endings := []packet{
		{"ESP", esp(spi6), PassESP},
		{"unknown SPI", esp(spiUnknown), DropUnknownSPI},
		{"UDP to port-ps", udp(31000, portPS, nil), DropCleartext},
		{"SYN to port-ps", tcp(31000, portPS, flagSYN, nil), DropCleartext},
		{"nothing more", nil, PassOther},
	}
	protos := []uint8{protoESP, protoESP, protoUDP, protoTCP, 59}
	packet6 := func(proto uint8, payload []byte, kinds ...uint8) []byte {
		first, rest := chain(proto, payload, kinds...)
		return ip6(phone6, local6, first, rest)
	}
	for i, e := range endings {
		for _, kind := range kinds {
			w.expect(t, fmt.Sprintf("%s behind %d", e.name, kind), packet6(protos[i], e.ip, kind), e.want)
			for _, second := range kinds {
				w.expect(t, fmt.Sprintf("%s behind %d and %d", e.name, kind, second), packet6(protos[i], e.ip, kind, second), e.want)
			}
			for n := range 10 {
				name := fmt.Sprintf("%s behind %d of %d", e.name, n, kind)
				w.expect(t, name, packet6(protos[i], e.ip, slices.Repeat([]uint8{kind}, n)...), either(n > 6, DropExtHeaders, e.want))
			}
			// Cut, with a payload length that says so.
			whole := packet6(protos[i], e.ip, kind, kind)
			for n := range 16 {
				cut := put16(whole[:40+n], 4, uint16(n)) //nolint:gosec // small
				w.expect(t, fmt.Sprintf("%d octets of two headers %d", n, kind), cut, DropMalformed)
			}
			if kind == protoFragment {
				continue
			}
			for _, n := range []int{16, 24, 64, 248} {
				p := ip6(phone6, local6, kind, extension(kind, protos[i], n, e.ip))
				w.expect(t, fmt.Sprintf("%s behind %d octets of %d", e.name, n, kind), p, e.want)
				w.expect(t, fmt.Sprintf("header %d of %d octets that says more", kind, n), put8(p, 41, 255), DropMalformed)
			}
			w.expect(t, fmt.Sprintf("header %d that says 8 octets more", kind), put8(packet6(59, nil, kind), 41, 3), DropMalformed)
		}
		w.expect(t, e.name+" behind different ones", packet6(protos[i], e.ip, kinds[:6]...), e.want)
		w.expect(t, e.name+" behind too many different ones", packet6(protos[i], e.ip, kinds[:7]...), DropExtHeaders)
	}
	// As far in as can be, and farther.
	far := func(lengths ...int) []byte {
		rest, next := esp(spi6), uint8(protoESP)
		for _, n := range slices.Backward(lengths) {
			rest, next = extension(protoDestOptions, next, n, rest), protoDestOptions
		}
		return ip6(phone6, local6, next, rest)
	}
	w.expect(t, "ESP behind 2048 octets", far(2048), PassESP)
	w.expect(t, "ESP behind 3200 octets", far(2048, 1152), PassESP)
	if got, _ := w.run(t, &w.programs[0], inFrame(far(2048, 2048, 8))); got != DropExtHeaders {
		t.Errorf("ESP behind 4104 octets: %s, want %s", got, DropExtHeaders)
	}

	// A fragment stays one whatever comes behind its header.
	short := put16(udp(31000, clearPort, nil), 4, 1400)
	inner := fragment6(protoUDP, 0, false, short)
	w.expect(t, "fragment in a fragment", ip6(phone6, local6, protoFragment, fragment6(protoFragment, 0, true, inner)), PassClearPort)
	w.expect(t, "later fragment in a fragment", ip6(phone6, local6, protoFragment, fragment6(protoFragment, 0, true, fragment6(protoUDP, 1, false, short))), PassFragment)
	w.expect(t, "length beyond no fragment", ip6(phone6, local6, protoFragment, fragment6(protoUDP, 0, false, short)), DropMalformed)
	// IPv6 with an IPv4 address of ours in it goes nowhere.
	mapped := netip.AddrFrom16(local4.As16())
	w.expect(t, "mapped address", ip6(netip.AddrFrom16(phone4.As16()), mapped, protoESP, esp(spi4)), PassOther)
}

// TestMutations sets each octet of each packet to values that it should not have: programs and model agree.
func TestMutations(t *testing.T) {
	w := newWard(t, testConfig())
	values := func(b uint8) []uint8 { return []uint8{0, 1, 0x7f, 0x80, 0xff, b ^ 0xff, b + 1, b - 1} }
	if inGuest() {
		values = func(b uint8) []uint8 { return []uint8{0, 0xff, b + 1} }
	}
	tries := 0
	for _, f := range families() {
		for _, c := range slices.Concat(f.valid(), f.fragments()) {
			if len(c.ip) > f.header+60 && testing.Short() {
				continue
			}
			packet := c.ip
			for at := range min(len(packet), f.header+28) {
				for _, v := range values(packet[at]) {
					if v != packet[at] {
						w.agree(t, &w.programs[tries%len(w.programs)], packet, v, at)
						tries++
					}
				}
			}
		}
	}
	t.Logf("%d packets", tries)
}

// agree changes one octet of an IP packet and compares a program with the model.
func (w *ward) agree(t testing.TB, p *program, packet []byte, v uint8, at int) {
	t.Helper()
	data := put8(packet, at, v)
	if !p.raw {
		data = put8(inFrame(packet), 14+at, v)
	}
	if p.skips(data) {
		return
	}
	got, octets := w.run(t, p, data)
	if f := w.model.judge(data, p.raw); f.reason != got || f.octets != octets {
		t.Errorf("%s: %s and %d octets, the model says %s and %d\n%x", p.name, got, octets, f.reason, f.octets, data)
	}
}

// TestChoices has the settings that change verdicts.
func TestChoices(t *testing.T) {
	cfg := testConfig()
	cfg.PassUnknown = true
	w := newWard(t, cfg)
	for _, f := range families() {
		w.expect(t, "unknown SPI that may pass", ip(f.phone, f.local, protoESP, esp(spiUnknown)), PassUnknownSPI)
		w.expect(t, "reserved SPI", ip(f.phone, f.local, protoESP, esp(255)), DropSPIReserved)
		w.expect(t, "wrong source", ip(f.stranger, f.local, protoESP, esp(f.spi)), DropWrongSource)
		w.expect(t, "cleartext", ip(f.phone, f.local, protoUDP, udp(31000, portPS, nil)), DropCleartext)
	}
	cfg = testConfig()
	cfg.Mode, cfg.KernelESP = Generic, true
	w = newWard(t, cfg)
	for _, f := range families() {
		w.expect(t, "what the kernel may have decrypted", ip(f.phone, f.local, protoUDP, udp(31000, portPS, nil)), PassOther)
		w.expect(t, "unknown SPI", ip(f.phone, f.local, protoESP, esp(spiUnknown)), DropUnknownSPI)
		w.expect(t, "port 0", ip(f.phone, f.local, protoTCP, tcp(0, portPS, flagSYN, nil)), DropPortZero)
	}
}

// merged is what a tc program is told of a frame that the stack has merged: struct __sk_buff as far as the kernel takes it.
func merged(segments, size uint32) []byte {
	b := make([]byte, 192)
	binary.NativeEndian.PutUint32(b[164:], segments) // gso_segs
	binary.NativeEndian.PutUint32(b[176:], size)     // gso_size
	return b
}

// runMerged gives a tc program a frame that the stack has merged, and reports whether it lets it pass.
func (w *ward) runMerged(t testing.TB, p *program, packet []byte, segments, size uint32) bool {
	t.Helper()
	if !p.raw {
		packet = inFrame(packet)
	}
	got, err := p.prog.Run(&ebpf.RunOptions{Data: packet, Context: merged(segments, size)})
	if err != nil {
		t.Fatal(err)
	}
	return got == p.pass
}

// TestMerged has packets that the stack has made greater than the length of IP can say (BIG TCP): with the length zero, and for
// IPv6 up to Linux 6.19 with a jumbo payload option (RFC 2675).
func TestMerged(t *testing.T) {
	w := newWard(t, testConfig())
	text := make([]byte, 200)
	jumbo := func(port uint16) []byte {
		return put16(ip6(phone6, local6, protoHopByHop, extension(protoHopByHop, protoTCP, 8, tcp(31000, port, flagACK, text))), 4, 0)
	}
	for _, c := range []struct {
		name   string
		packet func(port uint16) []byte
	}{
		{"IPv4", func(port uint16) []byte {
			return put16(ip(phone4, local4, protoTCP, tcp(31000, port, flagACK, text)), 2, 0)
		}},
		{"IPv6", func(port uint16) []byte {
			return put16(ip(phone6, local6, protoTCP, tcp(31000, port, flagACK, text)), 4, 0)
		}},
		{"IPv6 with its option", jumbo},
	} {
		for i := range w.programs {
			p := &w.programs[i]
			if !p.tc {
				continue
			}
			for _, segments := range []uint32{2, 0} { // the latter where a virtual machine's neighbour has sent it
				if !w.runMerged(t, p, c.packet(otherPort), segments, 100) || !w.runMerged(t, p, c.packet(clearPort), segments, 100) {
					t.Errorf("%s: %s drops what was merged", c.name, p.name)
				}
				if w.runMerged(t, p, c.packet(portPS), segments, 100) {
					t.Errorf("%s: %s lets merged packets pass in clear", c.name, p.name)
				}
			}
			if w.runMerged(t, p, c.packet(otherPort), 1, 0) && c.name != "IPv6" { // there a length of zero hides the ports only
				t.Errorf("%s: %s lets a length of zero pass of what was not merged", c.name, p.name)
			}
		}
	}
}

// eventually waits for what a ring's reader does.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !f(); {
		if time.Now().After(end) {
			t.Fatalf("%s has not happened", what)
		}
		time.Sleep(time.Millisecond) // of a goroutine beside us
	}
}

func TestTraffic(t *testing.T) {
	for i := range 4 {
		w := newWard(t, testConfig())
		p := &w.programs[i]
		start := time.Now()
		send := func(packet []byte) {
			t.Helper()
			if !p.raw {
				packet = inFrame(packet)
			}
			w.run(t, p, packet)
		}
		var octets uint64
		for _, f := range families() {
			// None of these is the phone's.
			send(ip(f.stranger, f.local, protoESP, esp(f.spi)))
			send(ip(f.phone, f.local, protoESP, esp(spiUnknown)))
			send(ip(f.phone, f.local, protoESP, esp(f.spi)[:7]))
			send(ip(f.phone, f.other, protoESP, esp(f.spi)))
			send(ip(f.phone, f.local, protoUDP, udp(31000, portPS, esp(f.spi))))
			if got := w.Traffic(f.label); got.Packets != 0 || got.Bytes != 0 || !got.Last.IsZero() || !w.First(f.set).IsZero() {
				t.Errorf("%s: traffic %+v and a first packet at %s before there was any", p.name, got, w.First(f.set))
			}
		}
		for n, f := range families() {
			a, b := ip(f.phone, f.local, protoESP, esp(f.spi)), ip(f.phone, f.local, protoUDP, udp(4500, 4500, esp(f.spi+1)))
			octets = 0
			for range 10 {
				send(a)
				send(append(slices.Clone(b), 1, 2, 3)) // padding of the link is nobody's
				octets += uint64(len(a) + len(b))
			}
			got := w.Traffic(f.label)
			if got.Packets != 20 || got.Bytes != octets {
				t.Errorf("%s, %s: traffic of %d packets and %d octets, want 20 and %d", p.name, f.name, got.Packets, got.Bytes, octets)
			}
			// The kernel's coarse clock lags by a tick, and the conversion to wall time by what a test waits for its CPU.
			if got.Last.Before(start.Add(-time.Second)) || got.Last.After(time.Now().Add(time.Second)) {
				t.Errorf("%s: last packet at %s, between %s and now", p.name, got.Last, start)
			}
			// Both SAs of the set have reported their first packet; the ring keeps the order.
			eventually(t, "first use of "+f.name, func() bool { return w.rings.firstUses.Load() >= uint64(2*n+2) }) //nolint:gosec // small
			if first := w.First(f.set); first.IsZero() || first.After(time.Now().Add(time.Second)) {
				t.Errorf("%s: first packet at %s", p.name, first)
			}
		}
		s, err := w.Stats()
		if err != nil || s.FirstUses != 4 || s.LostUses != 0 || s.SAs != 4+3 || s.UEs != 2 {
			t.Errorf("%s: stats %+v and %v, want 4 first uses, 7 SAs and 2 UE contexts", p.name, s, err)
		}
		if other := w.Traffic(12345); other.Packets != 0 {
			t.Errorf("traffic %+v of a UE context that is not there", other)
		}
	}
}

// TestFirstAgain says that a set which was removed and comes again reports anew, and one that was synchronized does not.
func TestFirstAgain(t *testing.T) {
	w := newWard(t, testConfig())
	p := &w.programs[0]
	packet := inFrame(ip(phone4, local4, protoESP, esp(spi4)))
	w.run(t, p, packet)
	eventually(t, "first use", func() bool { return !w.First(set4).IsZero() })
	set := setOf(set4, label4, local4, phone4, spi4)
	if err := w.Remove(set); err != nil {
		t.Fatal(err)
	}
	if !w.First(set4).IsZero() {
		t.Error("a set that is gone has a first packet")
	}
	if got, _ := w.run(t, p, packet); got != DropUnknownSPI {
		t.Errorf("removed SPI: %s", got)
	}
	if err := w.Add(set); err != nil {
		t.Fatal(err)
	}
	w.run(t, p, packet)
	eventually(t, "first use", func() bool { return !w.First(set4).IsZero() })
	if n := w.rings.firstUses.Load(); n != 2 {
		t.Errorf("%d first uses, want 2", n)
	}
}

// TestSamples says that each drop can be seen, and that a flood of them wakes nobody up for each one.
func TestSamples(t *testing.T) {
	w := newWard(t, testConfig())
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		t.Fatal(err)
	}
	for cpu := range 1024 {
		if before.IsSet(cpu) {
			one.Set(cpu)
			break
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil { // the interval is one for each CPU
		t.Fatal(err)
	}
	defer func() { _ = unix.SchedSetaffinity(0, &before) }() // the thread is given back

	bad := inFrame(ip(phone4, local4, protoESP, esp(spiUnknown)))
	for range 10 {
		w.run(t, &w.programs[0], bad) // nobody follows
	}
	got := make(chan Drop, 16)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Follow(ctx, func(d *Drop) { got <- *d }) }()
	interval := func() (v uint64) {
		if err := w.objs.SampleInterval.Get(&v); err != nil {
			t.Fatal(err)
		}
		return v
	}
	eventually(t, "switching samples on", func() bool { return interval() == uint64(sampleInterval) })
	if err := w.objs.SampleInterval.Set(uint64(time.Hour)); err != nil {
		t.Fatal(err)
	}
	// again lets this CPU sample once more.
	again := func() {
		t.Helper()
		if err := w.objs.Sampled.Put(uint32(0), make([]uint64, w.cpus)); err != nil {
			t.Fatal(err)
		}
	}
	lo, err := loopbackName()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families() {
		cases := f.invalid()
		cases = append(cases, packet{"unknown SPI in UDP", ip(f.stranger, f.local, protoUDP, udp(4444, 4500, esp(spiUnknown))), DropUnknownSPI},
			packet{"SYN to port-pc", ip(f.stranger, f.local, protoTCP, tcp(33333, portPC, flagSYN, nil)), DropCleartext},
			packet{"broken header", put8(ip(f.phone, f.local, protoUDP, udp(1, 2, nil)), 0, 0x10), DropMalformed})
		for n, c := range cases {
			if !c.want.Dropped() {
				continue
			}
			p := &w.programs[2*(n%2)]
			data := ethernetOf(0x0800, c.ip)
			if f.phone.Is6() {
				data = ethernetOf(0x86dd, c.ip)
			}
			again()
			if reason, _ := w.run(t, p, data); reason != c.want {
				t.Errorf("%s: %s, want %s", c.name, reason, c.want)
			}
			for range 3 { // beyond the rate
				w.run(t, p, bad)
			}
			m := w.model.judge(data, false)
			want := Drop{
				Reason: c.want, Interface: lo, Source: netip.AddrPortFrom(m.source, m.sourcePort), Destination: netip.AddrPortFrom(m.destination, m.destinationPort),
				Protocol: m.protocol, SPI: m.spi, Length: m.octets,
			}
			var d Drop
			select {
			case d = <-got:
			case <-time.After(10 * time.Second):
				t.Fatalf("%s %s: no sample", f.name, c.name)
			}
			if age := time.Since(d.Time); age < -time.Second || age > time.Minute {
				t.Errorf("%s: sampled %s ago", c.name, age)
			}
			d.Time = time.Time{}
			if m.octets == len(data) && m.octets != len(c.ip) { // no length could be read
				want.Length = 0
			}
			if diff := cmp.Diff(want, d, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
				t.Errorf("%s %s: sample is not what was sent (-want +got):\n%s", f.name, c.name, diff)
			}
		}
	}
	again()
	pass := w.rings.samples.Load()
	w.run(t, &w.programs[0], inFrame(ip(phone4, local4, protoESP, esp(spi4)))) // passes
	w.run(t, &w.programs[0], bad)
	if d := <-got; d.Reason != DropUnknownSPI || w.rings.samples.Load() != pass+1 {
		t.Errorf("sample of %s, %d in all, want one of %s", d.Reason, w.rings.samples.Load()-pass, DropUnknownSPI)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if v := interval(); v != 0 {
		t.Errorf("samples are taken each %d ns while nobody follows", v)
	}
}

func loopbackName() (string, error) {
	var g Guard
	return g.interfaceName(1), nil
}
