package guard

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// bucketKey is the key of the bucket that the model says a source has.
func bucketKey(p netip.Prefix) [4]uint32 { return words(p.Addr()) }

// exhaust makes a bucket empty for an hour.
func (w *ward) exhaust(t rapid.TB, p netip.Prefix) {
	t.Helper()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		t.Fatal(err)
	}
	if err := w.objs.Sources.Put(bucketKey(p), uint64(now.Nano())+uint64(time.Hour)); err != nil { //nolint:gosec // not negative
		t.Fatal(err)
	}
}

// refill forgets a bucket, and reports whether there was one.
func (w *ward) refill(t rapid.TB, p netip.Prefix) bool {
	t.Helper()
	err := w.objs.Sources.Delete(bucketKey(p))
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Fatal(err)
	}
	return err == nil
}

// TestWhatCounts says which packets take a token: those that pass with a bucket and without leaving a trace in it do not.
func TestWhatCounts(t *testing.T) {
	type text struct {
		name    string
		payload string
		counts  bool
	}
	texts := []text{
		{"REGISTER", register, true},
		{"REGISTER and no more", "REGISTER", true},
		{"CRLF before", "\r\n" + register, true},
		{"LF before", "\n" + register, true},
		{"keep-alive of RFC 5626", "\r\n\r\n", false}, // less than 8 octets hold no REGISTER
		{"eight octets of CRLF", "\r\n\r\n\r\n\r\n", true},
		{"lower case", "register sip:ims.example SIP/2.0\r\n", false},
		{"mixed case", "Register sip:ims.example SIP/2.0\r\n", false},
		{"REGISTER cut off", "REGISTE", false},
		{"REGISTRY", "REGISTRY sip:a SIP/2.0\r\n", false},
		{"REGISTER with a tail", "REGISTERS sip:a SIP/2.0\r\n", true}, // the parser knows better
		{"blank before", " REGISTER sip:a SIP/2.0\r\n", false},
		{"OPTIONS", options, false},
		{"answer", "SIP/2.0 200 OK\r\n\r\n", false},
		{"nothing", "", false},
		{"zeros", "\x00\x00\x00\x00\x00\x00\x00\x00", false},
	}
	for _, all := range []bool{false, true} {
		cfg := testConfig()
		cfg.Rate, cfg.Burst, cfg.LimitAll = 1, 1, all
		w := newWard(t, cfg)
		w.model.empty = func(netip.Prefix) bool { return true }
		for _, f := range families() {
			bucket := bucketOf(f.phone)
			check := func(name string, packet []byte, counts bool) {
				t.Helper()
				name = fmt.Sprintf("%s %s, all %v", f.name, name, all)
				w.exhaust(t, bucket)
				w.expect(t, name, packet, either(counts, DropRegisterRate, PassClearPort))
				w.refill(t, bucket)
				for i := range w.programs {
					p, data := &w.programs[i], packet
					if !p.raw {
						data = inFrame(packet)
					}
					if got, _ := w.run(t, p, data); got != PassClearPort {
						t.Errorf("%s: %s says %s with a full bucket", name, p.name, got)
					}
					if took := w.refill(t, bucket); took != counts {
						t.Errorf("%s: %s has taken a token: %v, want %v", name, p.name, took, counts)
					}
				}
			}
			for _, c := range texts {
				check(c.name, ip(f.phone, f.local, protoUDP, udp(31000, clearPort, []byte(c.payload))), all || c.counts)
			}
			for _, c := range []struct {
				flags  uint8
				counts bool
			}{
				{flagSYN, true},
				{flagSYN | flagACK, false},
				{flagACK, false},
				{flagPSH | flagACK, false},
				{flagFIN | flagACK, false},
				{flagRST, false},
				{0, false},
				{flagSYN | flagFIN, true},
				{flagSYN | 0xc0, true},
				{flagSYN | flagRST, true},
				{math.MaxUint8, false},
			} {
				check(fmt.Sprintf("TCP flags %#x", c.flags), ip(f.phone, f.local, protoTCP, tcp(31000, clearPort, c.flags, nil)), c.counts)
			}
			// What the first fragment has of a datagram decides; where that is too little, it may be a REGISTER.
			for _, c := range []text{{"OPTIONS", options, false}, {"REGISTER", register, true}, {"seven octets", "OPTIONS", true}, {"nothing", "", true}} {
				d := udp(31000, clearPort, []byte(c.payload))
				binary.BigEndian.PutUint16(d[4:], 1400)
				packet := fragment4(ip4(phone4, local4, protoUDP, nil, d), 0, true)
				if f.phone.Is6() {
					packet = ip6(phone6, local6, protoFragment, fragment6(protoUDP, 0, true, d))
					nested := ip6(phone6, local6, protoFragment, fragment6(protoFragment, 0, true, fragment6(protoUDP, 0, false, d)))
					check("nested fragment with "+c.name, nested, all || c.counts)
				}
				check("fragment with "+c.name, packet, all || c.counts)
			}
			// Other ports have no limit.
			w.exhaust(t, bucket)
			w.expect(t, f.name+" other port", ip(f.phone, f.local, protoUDP, udp(31000, otherPort, []byte(register))), PassOther)
			w.expect(t, f.name+" port-ps", ip(f.phone, f.local, protoTCP, tcp(31000, portPS, flagSYN, nil)), DropCleartext)
			w.expect(t, f.name+" other host", ip(f.phone, f.other, protoUDP, udp(31000, clearPort, []byte(register))), PassOther)
			w.expect(t, f.name+" ESP", ip(f.phone, f.local, protoESP, esp(f.spi)), PassESP)
		}
	}
}

// TestBuckets says who shares a bucket.
func TestBuckets(t *testing.T) {
	cfg := testConfig()
	cfg.Rate, cfg.Burst = 1, 1
	w := newWard(t, cfg)
	cases := []struct {
		one, two string
		shared   bool
	}{
		{"203.0.113.7", "203.0.113.7", true},
		{"203.0.113.7", "203.0.113.6", false},
		{"203.0.113.7", "203.0.112.7", false},
		{"203.0.113.7", "202.0.113.7", false},
		{"2001:db8:7:7::7", "2001:db8:7:7::8", true},
		{"2001:db8:7:7::7", "2001:db8:7:7:ffff:ffff:ffff:ffff", true},
		{"2001:db8:7:7::7", "2001:db8:7:7::", true},
		{"2001:db8:7:7::7", "2001:db8:7:8::7", false},
		{"2001:db8:7:7::7", "2001:db8:7:6:ffff:ffff:ffff:ffff", false},
		{"2001:db8:7:7::7", "2001:db9:7:7::7", false},
		{"2001:db8:7:7::7", "2001:db8:6:7::7", false},
		{"::1:0:203.0.113.7", "::1:0:203.0.113.8", true}, // no mapped address
		{"::203.0.113.7", "::203.0.113.8", true},
		{"::203.0.113.7", "203.0.113.7", false},
	}
	for _, c := range cases {
		one, two := netip.MustParseAddr(c.one), netip.MustParseAddr(c.two)
		w.exhaust(t, bucketOf(one))
		local := local4
		if two.Is6() {
			local = local6
		}
		packet := ip(two, local, protoUDP, udp(31000, clearPort, []byte(register)))
		for i := range w.programs {
			p, data := &w.programs[i], packet
			if !p.raw {
				data = inFrame(packet)
			}
			if got, _ := w.run(t, p, data); got != either(c.shared, DropRegisterRate, PassClearPort) {
				t.Errorf("%s: %s from %s while the bucket of %s is empty", p.name, got, two, one)
			}
			if !c.shared && !w.refill(t, bucketOf(two)) {
				t.Errorf("%s: %s has no bucket of its own", p.name, two)
			}
		}
		w.refill(t, bucketOf(one))
	}
}

// clockStep is more than the kernel's coarse clock goes on at once.
const clockStep = 50 * time.Millisecond

// TestBurst counts what passes at once: what time there was may bring back, and nobody else's.
func TestBurst(t *testing.T) {
	cfg := testConfig()
	cfg.Rate, cfg.Burst = 1, 5
	w := newWard(t, cfg)
	for _, f := range families() {
		for i := range w.programs {
			p, data := &w.programs[i], ip(f.phone, f.local, protoUDP, udp(31000, clearPort, []byte(register)))
			if !p.raw {
				data = inFrame(data)
			}
			w.refill(t, bucketOf(f.phone))
			start, passed := time.Now(), 0
			for range 30 {
				if got, _ := w.run(t, p, data); got == PassClearPort {
					passed++
				} else if got != DropRegisterRate {
					t.Fatalf("%s: %s", p.name, got)
				}
			}
			if most := 5 + int((time.Since(start)+clockStep)/cfg.interval()); passed < 5 || passed > most {
				t.Errorf("%s: %d REGISTERs at once of %s, want 5 to %d", p.name, passed, f.phone, most)
			}
		}
	}
	// A token comes back, and a bucket does not fill beyond its burst.
	cfg.Rate, cfg.Burst = 100, 2
	w = newWard(t, cfg)
	p, data := &w.programs[0], inFrame(ip(phone4, local4, protoTCP, tcp(31000, clearPort, flagSYN, nil)))
	for range 3 {
		eventually(t, "a full bucket", func() bool { got, _ := w.run(t, p, data); return got == DropRegisterRate })
		eventually(t, "a token", func() bool { got, _ := w.run(t, p, data); return got == PassClearPort })
	}
	if err := w.objs.Sources.Put(bucketKey(bucketOf(phone4)), uint64(1)); err != nil { // full since the boot
		t.Fatal(err)
	}
	start, passed := time.Now(), 0
	for range 30 {
		if got, _ := w.run(t, p, data); got == PassClearPort {
			passed++
		}
	}
	if most := 2 + int((time.Since(start)+clockStep)/cfg.interval()); passed < 2 || passed > most {
		t.Errorf("%d REGISTERs at once after a long time, want 2 to %d", passed, most)
	}
}

// TestMergedDatagrams takes a token for each of the datagrams that the stack has merged, whatever the first one is.
func TestMergedDatagrams(t *testing.T) {
	cfg := testConfig()
	cfg.Rate, cfg.Burst = 1, 100
	w := newWard(t, cfg)
	for _, f := range families() {
		for i := range w.programs {
			p := &w.programs[i]
			if !p.tc {
				continue
			}
			for _, c := range []struct {
				segments, size uint32
				passes         int
			}{{0, 0, 100}, {10, 50, 10}, {64, 50, 2}, {0, 50, 10}, {1 << 15, 1, 1}} {
				for _, text := range []string{register, options} {
					packet := ip(f.phone, f.local, protoUDP, udp(31000, clearPort, append([]byte(text), make([]byte, 470-len(text))...)))
					w.refill(t, bucketOf(f.phone))
					start, passed := time.Now(), 0
					for range 150 {
						if !w.runMerged(t, p, packet, c.segments, c.size) {
							break
						}
						passed++
					}
					want := c.passes
					if c.size == 0 && text == options {
						want = 150 // no REGISTER
					}
					if most := want + int((time.Since(start)+clockStep)/cfg.interval()); passed < want || passed > most {
						t.Errorf("%s, %s: %d times %d segments of %d octets pass, want %d to %d", f.name, p.name, passed, c.segments, c.size, want, most)
					}
					var full uint64
					if err := w.objs.Sources.Lookup(bucketKey(bucketOf(f.phone)), &full); err == nil {
						if lent := time.Until(wall(full)); lent > time.Duration(cfg.Burst+maxSegments)*time.Second {
							t.Errorf("%s, %s: the bucket is full in %v only", f.name, p.name, lent)
						}
					}
				}
			}
		}
	}
}

// TestNoLimit has neither a rate nor buckets.
func TestNoLimit(t *testing.T) {
	cfg := testConfig()
	cfg.LimitAll = true
	w := newWard(t, cfg)
	for range 50 {
		for _, f := range families() {
			w.expect(t, f.name, ip(f.phone, f.local, protoUDP, udp(31000, clearPort, []byte(register))), PassClearPort)
		}
	}
	if n, err := w.CountSources(); n != 0 || err != nil {
		t.Errorf("%d sources and %v, want none", n, err)
	}
}

// TestManySources says that those who come from everywhere push each other out, and the map does not grow.
func TestManySources(t *testing.T) {
	cfg := testConfig()
	cfg.Rate, cfg.Burst, cfg.Sources = 1, 1, 256
	w := newWard(t, cfg)
	if n, err := w.CountSources(); n != 0 || err != nil {
		t.Errorf("%d sources and %v, want none", n, err)
	}
	run := func(first, last uint32) {
		t.Helper()
		for i := first; i < last; i++ {
			src := netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 0xcb007100+i)))
			data := inFrame(ip(src, local4, protoUDP, udp(31000, clearPort, []byte(register))))
			if got, _ := w.run(t, &w.programs[0], data); got != PassClearPort {
				t.Fatalf("first REGISTER of %s: %s", src, got)
			}
		}
	}
	run(0, 50)
	if n, err := w.CountSources(); n != 50 || err != nil {
		t.Errorf("%d sources and %v, want 50", n, err)
	}
	run(50, 3000)
	n, err := w.CountSources()
	if n > cfg.Sources || n < 1 || err != nil {
		t.Errorf("%d sources and %v, want at most %d", n, err, cfg.Sources)
	}
}
