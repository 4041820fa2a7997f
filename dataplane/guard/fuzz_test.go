package guard

import (
	flags "flag"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"pgregory.net/rapid"
)

// compare runs the programs on a packet, with the bucket of its source empty or full, and compares them with the model. All
// four see the octets as they are, so that frames are read as IP packets as well and the other way round.
func (w *ward) compare(t rapid.TB, data []byte, empty bool) {
	t.Helper()
	for i := range w.programs {
		p := &w.programs[i]
		if p.skips(data) {
			continue
		}
		w.model.empty = func(netip.Prefix) bool { return empty }
		want := w.model.judge(data, p.raw)
		if want.destinationPort == clearPort {
			if bucket := bucketOf(want.source); empty {
				w.exhaust(t, bucket)
			} else {
				w.refill(t, bucket)
			}
		}
		verdict, err := p.prog.Run(&ebpf.RunOptions{Data: data})
		if err != nil {
			t.Fatalf("%s of %d octets: %v\n%x", p.name, len(data), err, data)
		}
		expected := w.seen
		expected[want.reason].Packets++
		expected[want.reason].Bytes += uint64(want.octets) //nolint:gosec // not negative
		w.seen = w.tallies(t)
		if w.seen != expected {
			reason := PassOther
			for r := range reasons {
				if expected[r] != w.seen[r] && r != want.reason {
					reason = r
				}
			}
			t.Fatalf("%s says %s (or other octets), the model %s and %d octets\n%x", p.name, reason, want.reason, want.octets, data)
		}
		if pass := !want.reason.Dropped(); pass && verdict != p.pass || !pass && verdict != p.drop {
			t.Fatalf("%s: verdict %d of %s\n%x", p.name, int32(verdict), want.reason, data) //nolint:gosec // TC_ACT_UNSPEC is -1
		}
	}
}

// propertyWard loads a guard with every rule in use.
func propertyWard(t testing.TB) *ward {
	cfg := testConfig()
	cfg.Rate, cfg.Burst = 1, 1
	return newWard(t, cfg)
}

// oneOf draws a value, most of the time one that matters.
func oneOf[V any](any *rapid.Generator[V], these ...V) *rapid.Generator[V] {
	return rapid.OneOf(rapid.SampledFrom(these), rapid.SampledFrom(these), rapid.SampledFrom(these), rapid.SampledFrom(these), any)
}

// seldom is true once in n+1 times or less: small numbers are drawn more often than others.
func seldom(t *rapid.T, n int, label string) bool { return rapid.IntRange(0, n).Draw(t, label) == n }

var (
	anyPort  = oneOf(rapid.Uint16(), 0, 31000, clearPort, portPS, portPC, 63, 64, 65535, 4500, otherPort)
	anyProto = oneOf(rapid.Uint8(), protoESP, protoUDP, protoTCP)
	anySPI   = oneOf(rapid.Uint32(), 0, 255, 256, spi4, spi4+1, spi6, spi6+1, spiForeign, spiUnknown)
	anyText  = rapid.OneOf(rapid.SampledFrom([]string{register, options, "REGISTER", "REGISTE", "\r\n\r\n", "\r\n" + register, "register ", "\xff", "\x00\x00\x00\x00"}),
		rapid.StringN(0, 24, 24))
	addresses4  = []netip.Addr{local4, other4, phone4, stranger4}
	addresses6  = []netip.Addr{local6, other6, phone6, stranger6, netip.MustParseAddr("::ffff:192.0.2.1"), netip.MustParseAddr("::ffff:203.0.113.7")}
	anyTag      = rapid.SampledFrom([]uint16{0x8100, 0x88a8})
	extensions6 = []uint8{protoHopByHop, protoRouting, protoDestOptions, protoMobility, protoHIP, protoShim6, protoAH, protoFragment}
)

// drawPayload draws what an IP packet carries.
func drawPayload(t *rapid.T) (proto uint8, payload []byte) {
	proto = anyProto.Draw(t, "protocol")
	switch proto {
	case protoESP:
		payload = esp(anySPI.Draw(t, "SPI"))
	case protoUDP:
		to := anyPort.Draw(t, "to")
		text := []byte(anyText.Draw(t, "text"))
		if to == 4500 {
			text = rapid.SampledFrom([][]byte{text, esp(anySPI.Draw(t, "SPI")), {0xff}, make([]byte, 4)}).Draw(t, "what")
		}
		payload = udp(anyPort.Draw(t, "from"), to, text)
	case protoTCP:
		payload = tcp(anyPort.Draw(t, "from"), anyPort.Draw(t, "to"), oneOf(rapid.Uint8(), flagSYN, flagSYN|flagACK, flagACK).Draw(t, "flags"), nil)
	default:
		payload = rapid.SliceOfN(rapid.Byte(), 0, 40).Draw(t, "payload")
	}
	if seldom(t, 5, "short") {
		payload = payload[:rapid.IntRange(0, len(payload)).Draw(t, "octets")]
	}
	return proto, payload
}

// drawIP draws an IP packet.
func drawIP(t *rapid.T) []byte {
	proto, payload := drawPayload(t)
	offset := oneOf(rapid.Uint16Range(0, 0x1fff), 0, 0, 1).Draw(t, "offset")
	more := rapid.Bool().Draw(t, "more")
	fragmented := seldom(t, 3, "fragment")
	if rapid.Bool().Draw(t, "IPv4") {
		source, destination := oneOf(rapid.SampledFrom(addresses4), phone4).Draw(t, "source"), oneOf(rapid.SampledFrom(addresses4), local4).Draw(t, "destination")
		p := ip4(source, destination, proto, make([]byte, 4*oneOf(rapid.IntRange(0, 10), 0).Draw(t, "options")), payload)
		if fragmented {
			p = fragment4(p, offset, more)
		}
		return p
	}
	if fragmented {
		proto, payload = protoFragment, fragment6(proto, offset, more, payload)
	}
	for _, kind := range rapid.SliceOfN(rapid.SampledFrom(extensions6), 0, oneOf(rapid.IntRange(0, 8), 0, 1).Draw(t, "most")).Draw(t, "extensions") {
		length := 8
		if kind != protoFragment {
			length *= rapid.IntRange(1, 3).Draw(t, "eights")
		}
		payload = extension(kind, proto, length, payload)
		proto = kind
	}
	source, destination := oneOf(rapid.SampledFrom(addresses6), phone6).Draw(t, "source"), oneOf(rapid.SampledFrom(addresses6), local6).Draw(t, "destination")
	return ip6(source, destination, proto, payload)
}

// drawPacket draws a frame or an IP packet that is built of layers and then broken.
func drawPacket(t *rapid.T) []byte {
	if seldom(t, 9, "unstructured") {
		return rapid.SliceOfN(rapid.Byte(), 14, 120).Draw(t, "octets")
	}
	data := drawIP(t)
	if !seldom(t, 2, "raw") {
		data = inFrame(data, rapid.SliceOfN(anyTag, 0, oneOf(rapid.IntRange(0, 3), 0).Draw(t, "most tags")).Draw(t, "tags")...)
	}
	for range oneOf(rapid.IntRange(0, 3), 0).Draw(t, "mutations") {
		at := rapid.IntRange(0, min(len(data)-1, 90)).Draw(t, "at")
		data = put8(data, at, oneOf(rapid.Byte(), 0, 1, 0x7f, 0x80, 0xff, data[at]+1, data[at]-1).Draw(t, "octet"))
	}
	if seldom(t, 5, "cut") {
		data = data[:rapid.IntRange(0, len(data)).Draw(t, "to length")]
	}
	if len(data) < 14 {
		data = append(data, make([]byte, 14-len(data))...)
	}
	return data
}

// packetsInCheck is how many packets one check of a property draws.
const packetsInCheck = 50

// TestAgreement draws packets: programs and model agree on every one of them.
func TestAgreement(t *testing.T) {
	w := propertyWard(t)
	if f := flags.Lookup("rapid.checks"); f.Value.String() == f.DefValue {
		checks := "400"
		if inGuest() {
			checks = "20"
		}
		if err := f.Value.Set(checks); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Value.Set(f.DefValue) }() // it was right before
	}
	judged := make(map[Reason]int)
	rapid.Check(t, func(t *rapid.T) {
		w.seen = w.tallies(t)
		for range packetsInCheck {
			data := drawPacket(t)
			w.compare(t, data, rapid.Bool().Draw(t, "empty"))
			reason := w.model.judge(data, false).reason
			if reason == PassOther {
				reason = w.model.judge(data, true).reason
			}
			judged[reason]++
		}
	})
	t.Logf("as frames or packets they are %v", judged)
}

// FuzzGuard gives octets to all programs: the kernel runs them, and they agree with the model.
func FuzzGuard(f *testing.F) {
	w := propertyWard(f)
	for _, fam := range families() {
		for _, c := range slices.Concat(fam.valid(), fam.invalid(), fam.fragments()) {
			f.Add(inFrame(c.ip), false)
			f.Add(inFrame(c.ip, 0x88a8, 0x8100), true)
			f.Add(c.ip, true)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte, empty bool) {
		if len(data) > 3000 { // the kernel wants it linear
			data = data[:3000]
		}
		w.seen = w.tallies(t)
		w.compare(t, data, empty)
	})
}
