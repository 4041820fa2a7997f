package esp

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/gmgate/gmgate/control/ims"
)

const testSPI ims.SPI = 0x40000050

// pair returns both ends of an SA.
func pair(t testing.TB, s ims.Suite, window int) (*Outbound, *Inbound) {
	t.Helper()
	o, err := NewOutbound(testSPI, set1Keys(t, s))
	if err != nil {
		t.Fatal(err)
	}
	i, err := NewInbound(testSPI, set1Keys(t, s), window)
	if err != nil {
		t.Fatal(err)
	}
	return o, i
}

func eachSuite(t *testing.T, f func(t *testing.T, s ims.Suite)) {
	for _, s := range ims.Suites() {
		t.Run(s.String(), func(t *testing.T) { f(t, s) })
	}
}

func mustSeal(t testing.TB, o *Outbound, dst, payload []byte, next byte) []byte {
	t.Helper()
	pkt, err := o.Seal(dst, payload, next)
	if err != nil {
		t.Fatalf("seal: %v", err)
	}
	return pkt
}

func TestRoundTripEveryLength(t *testing.T) {
	eachSuite(t, func(t *testing.T, s ims.Suite) {
		o, in := pair(t, s, 0)
		payload := make([]byte, 100)
		for i := range payload {
			payload[i] = byte(i * 7)
		}
		for n := range payload {
			pkt := mustSeal(t, o, nil, payload[:n], 6)
			if len(pkt) > n+MaxOverhead {
				t.Errorf("length %d: packet of %d octets exceeds MaxOverhead", n, len(pkt))
			}
			if spi, ok := PacketSPI(pkt); !ok || spi != testSPI {
				t.Errorf("length %d: PacketSPI = %s, %t", n, spi, ok)
			}
			got, next, err := in.Open(pkt)
			if err != nil || next != 6 || !bytes.Equal(got, payload[:n]) {
				t.Fatalf("length %d: open = %x, %d, %v", n, got, next, err)
			}
		}
		if o.Seq() != 100 {
			t.Errorf("Seq = %d, want 100", o.Seq())
		}
	})
}

// TestSealInPlace seals with the payload at every distance from where it has to go.
func TestSealInPlace(t *testing.T) {
	eachSuite(t, func(t *testing.T, s ims.Suite) {
		o, in := pair(t, s, 0)
		want := []byte("REGISTER sip:example SIP/2.0")
		for off := range 64 {
			buf := make([]byte, 256)
			copy(buf[off:], want)
			const start = 16
			out := mustSeal(t, o, buf[:start], buf[off:off+len(want)], 17)
			if &out[0] != &buf[0] {
				t.Fatalf("offset %d: seal moved to another buffer", off)
			}
			got, _, err := in.Open(out[start:])
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("offset %d: open = %q, %v", off, got, err)
			}
		}
	})
}

func TestSealKeepsPrefix(t *testing.T) {
	o, _ := pair(t, ims.Suites()[0], 0)
	got := mustSeal(t, o, []byte("prefix"), []byte("payload"), 17)
	if !bytes.HasPrefix(got, []byte("prefix\x40\x00\x00\x50\x00\x00\x00\x01")) {
		t.Errorf("sealed packet starts with %x", got[:14])
	}
}

func TestEveryBitCounts(t *testing.T) {
	eachSuite(t, func(t *testing.T, s ims.Suite) {
		o, in := pair(t, s, 0)
		pkt := mustSeal(t, o, nil, []byte("0123456789abcdefghij"), 17)
		for bit := range len(pkt) * 8 {
			bad := bytes.Clone(pkt)
			bad[bit/8] ^= 0x80 >> (bit % 8)
			if _, _, err := in.Open(bad); err != ErrICV && err != ErrReplay {
				t.Errorf("bit %d flipped: err = %v", bit, err)
			}
		}
		// None of them may have moved the window, not even those with a high sequence number.
		if _, _, err := in.Open(pkt); err != nil {
			t.Errorf("open the intact packet afterwards: %v", err)
		}
	})
}

func TestTruncation(t *testing.T) {
	eachSuite(t, func(t *testing.T, s ims.Suite) {
		o, in := pair(t, s, 0)
		pkt := mustSeal(t, o, nil, []byte("0123456789abcdefghij"), 17)
		for n := range pkt {
			if _, _, err := in.Open(bytes.Clone(pkt[:n])); err != ErrShort && err != ErrICV {
				t.Errorf("cut to %d: err = %v", n, err)
			}
		}
		if _, _, err := in.Open(append(bytes.Clone(pkt), make([]byte, 16)...)); err != ErrICV {
			t.Errorf("16 octets longer: err = %v, want ErrICV", err)
		}
		if _, _, err := in.Open(pkt); err != nil {
			t.Errorf("open the intact packet afterwards: %v", err)
		}
	})
}

func TestWrongAlgorithm(t *testing.T) {
	payload := bytes.Repeat([]byte{'x'}, 66) // long enough and aligned for all of them
	for _, a := range ims.Suites() {
		for _, b := range ims.Suites() {
			if a == b {
				continue
			}
			o, _ := pair(t, a, 0)
			_, in := pair(t, b, 0)
			// With a fixed IV, since pairs which differ in the cipher only are told apart by their padding alone.
			pkt := sealWith(o, nil, payload, 17, 1, make([]byte, o.ivLen))
			_, _, err := in.Open(pkt)
			if sameICV := a.Alg == b.Alg && a.Alg != ims.AlgAESGMAC; err != ErrICV && err != ErrShort && (!sameICV || err != ErrPadding) {
				t.Errorf("%s packet on %s SA: err = %v", a, b, err)
			}
		}
	}
}

func TestWrongKeys(t *testing.T) {
	eachSuite(t, func(t *testing.T, s ims.Suite) {
		o, _ := pair(t, s, 0)
		change := func(name string, f func(*ims.ESPKeys)) {
			keys := set1Keys(t, s).Clone()
			f(&keys)
			in, err := NewInbound(testSPI, keys, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := in.Open(mustSeal(t, o, nil, []byte("payload"), 17)); err != ErrICV {
				t.Errorf("%s changed: err = %v, want ErrICV", name, err)
			}
		}
		if s.Alg != ims.AlgNull {
			change("integrity key", func(k *ims.ESPKeys) { k.Auth[0] ^= 2 })
		}
		if s.Enc == ims.EncAESGCM {
			change("encryption key", func(k *ims.ESPKeys) { k.Enc[0] ^= 2 })
		}
		if s.Enc == ims.EncAESGCM || s.Alg == ims.AlgAESGMAC {
			change("salt", func(k *ims.ESPKeys) { k.Salt[3] ^= 1 })
		}
	})
}

// TestForeignSPI: an engine opens packets of its own SPI only, even if another SA of the set has the same keys.
func TestForeignSPI(t *testing.T) {
	eachSuite(t, func(t *testing.T, s ims.Suite) {
		o, err := NewOutbound(testSPI+1, set1Keys(t, s))
		if err != nil {
			t.Fatal(err)
		}
		_, in := pair(t, s, 0)
		if _, _, err := in.Open(mustSeal(t, o, nil, []byte("payload"), 17)); err != ErrICV {
			t.Errorf("err = %v, want ErrICV", err)
		}
	})
}

func TestNewRefuses(t *testing.T) {
	gcm := ims.Suite{Alg: ims.AlgNull, Enc: ims.EncAESGCM}
	sha := ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncNull}
	for _, c := range []struct {
		name   string
		spi    ims.SPI
		window int
		keys   ims.ESPKeys
		want   string
	}{
		{"reserved SPI", 255, 0, set1Keys(t, gcm), "reserved"},
		{"null with null", testSPI, 0, ims.ESPKeys{Suite: ims.Suite{Alg: ims.AlgNull, Enc: ims.EncNull}}, "not a legal pair"},
		{"zero suite", testSPI, 0, ims.ESPKeys{}, "not a legal pair"},
		{"short AES key", testSPI, 0, ims.ESPKeys{Suite: gcm, Enc: make(ims.Key, 15)}, "15 octets, want 16"},
		{"AES-256 key", testSPI, 0, ims.ESPKeys{Suite: gcm, Enc: make(ims.Key, 32)}, "32 octets, want 16"},
		{"integrity key with aes-gcm", testSPI, 0, ims.ESPKeys{Suite: gcm, Enc: make(ims.Key, 16), Auth: make(ims.Key, 16)}, "16 octets, want 0"},
		{"unexpanded SHA-1 key", testSPI, 0, ims.ESPKeys{Suite: sha, Auth: make(ims.Key, 16)}, "16 octets, want 20"},
		{"key with null encryption", testSPI, 0, ims.ESPKeys{Suite: sha, Auth: make(ims.Key, 20), Enc: make(ims.Key, 16)}, "16 octets, want 0"},
		{"window too small", testSPI, 63, set1Keys(t, gcm), "outside 64 to 4096"},
		{"window too large", testSPI, 4097, set1Keys(t, gcm), "outside 64 to 4096"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := NewInbound(c.spi, c.keys, c.window); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("inbound: err = %v, want %q", err, c.want)
			}
			if c.window != 0 {
				return
			}
			if _, err := NewOutbound(c.spi, c.keys); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("outbound: err = %v, want %q", err, c.want)
			}
		})
	}
}

// TestPaddingIsChecked forges packets with the right ICV and bad padding.
func TestPaddingIsChecked(t *testing.T) {
	o, in := pair(t, ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncNull}, 0)
	for i, c := range []struct {
		tail string
		want error
	}{
		{"010202ff", nil},
		{"000002ff", ErrPadding}, // zeros instead of 1, 2
		{"020102ff", ErrPadding},
		{"01020aff", ErrPadding}, // more padding than octets
		{"0102ffff", ErrPadding},
		{"414100ff", nil}, // no padding: all payload
	} {
		pkt := binary.BigEndian.AppendUint32(nil, uint32(testSPI))
		pkt = binary.BigEndian.AppendUint32(pkt, uint32(i+1))
		pkt = append(pkt, unhex(t, "41424344"+c.tail)...)
		s := scratches.Get().(*scratch)
		pkt = append(pkt, o.hmac(s, pkt)...)
		scratches.Put(s)
		if _, _, err := in.Open(bytes.Clone(pkt)); err != c.want {
			t.Errorf("%s: err = %v, want %v", c.tail, err, c.want)
		}
		// An authentic packet uses up its number even if it is malformed.
		if _, _, err := in.Open(pkt); err != ErrReplay {
			t.Errorf("%s again: err = %v, want ErrReplay", c.tail, err)
		}
	}
}

func TestSequenceExhaustion(t *testing.T) {
	eachSuite(t, func(t *testing.T, s ims.Suite) {
		o, in := pair(t, s, 0)
		if err := o.SetSeq(math.MaxUint32 - 1); err != nil {
			t.Fatal(err)
		}
		pkt := mustSeal(t, o, nil, []byte("last"), 17)
		if got := binary.BigEndian.Uint32(pkt[4:]); got != math.MaxUint32 {
			t.Errorf("sequence number = %d, want 2^32-1", got)
		}
		if _, _, err := in.Open(bytes.Clone(pkt)); err != nil {
			t.Errorf("open the last packet: %v", err)
		}
		if _, _, err := in.Open(pkt); err != ErrReplay {
			t.Errorf("open the last packet again: err = %v, want ErrReplay", err)
		}
		for range 2 {
			got, err := o.Seal([]byte("dst"), []byte("one more"), 17)
			if err != ErrSequence || string(got) != "dst" {
				t.Errorf("seal after the last = %q, %v, want dst, ErrSequence", got, err)
			}
		}
		if err := o.SetSeq(5); err != ErrSequence {
			t.Errorf("SetSeq backwards: err = %v, want ErrSequence", err)
		}
	})
}

// Both ends of an SA go on after a restart of one of them: the numbers that were used are neither sent nor accepted again.
func TestRestart(t *testing.T) {
	eachSuite(t, func(t *testing.T, s ims.Suite) {
		o, in := pair(t, s, 64)
		var old [][]byte
		for range 300 {
			pkt := mustSeal(t, o, nil, []byte("before"), 17)
			old = append(old, bytes.Clone(pkt))
			if len(old)%3 == 0 { // the others were lost, or are late
				if _, _, err := in.Open(pkt); err != nil {
					t.Fatal(err)
				}
			}
		}
		if o.Seq() != 300 || in.Seq() != 300 {
			t.Fatalf("numbers %d and %d, want 300", o.Seq(), in.Seq())
		}
		o2, in2 := pair(t, s, 64)
		if err := in2.SetSeq(in.Seq()); err != nil {
			t.Fatal(err)
		}
		for i, pkt := range old {
			if _, _, err := in2.Open(bytes.Clone(pkt)); err != ErrReplay {
				t.Fatalf("packet %d from before the restart: err = %v, want ErrReplay", i+1, err)
			}
		}
		const block = 1000
		if err := o2.SetSeq(o.Seq() + block); err != nil {
			t.Fatal(err)
		}
		for i := range uint32(100) {
			pkt := mustSeal(t, o2, nil, []byte("after"), 17)
			if got := binary.BigEndian.Uint32(pkt[4:]); got != 300+block+1+i {
				t.Fatalf("sequence number %d after the restart, want %d", got, 300+block+1+i)
			}
			for k, end := range []*Inbound{in, in2} { // the peer of the sender that began anew, and the receiver that did
				if _, _, err := end.Open(bytes.Clone(pkt)); err != nil {
					t.Fatalf("packet %d at end %d: %v", i, k, err)
				}
			}
		}
		if in2.Seq() != o2.Seq() {
			t.Errorf("numbers %d and %d", in2.Seq(), o2.Seq())
		}
		if err := in2.SetSeq(in2.Seq() - 1); err != ErrSequence {
			t.Errorf("SetSeq backwards: err = %v, want ErrSequence", err)
		}
	})
}

// An SA that begins at the end of the number space is of no use any more, but does not wrap.
func TestRestartAtTheEnd(t *testing.T) {
	o, in := pair(t, ims.Suites()[0], 64)
	if err := errors.Join(o.SetSeq(math.MaxUint32-1), in.SetSeq(math.MaxUint32-1)); err != nil {
		t.Fatal(err)
	}
	last := mustSeal(t, o, nil, []byte("last"), 17)
	if _, _, err := in.Open(bytes.Clone(last)); err != nil || in.Seq() != math.MaxUint32 {
		t.Errorf("the last packet: %v, number %d", err, in.Seq())
	}
	o, in = pair(t, ims.Suites()[0], 64)
	if err := errors.Join(o.SetSeq(math.MaxUint32), in.SetSeq(math.MaxUint32)); err != nil {
		t.Fatal(err)
	}
	if _, err := o.Seal(nil, []byte("one more"), 17); err != ErrSequence {
		t.Errorf("seal: err = %v, want ErrSequence", err)
	}
	if _, _, err := in.Open(last); err != ErrReplay {
		t.Errorf("open: err = %v, want ErrReplay", err)
	}
	early, _ := pair(t, ims.Suites()[0], 64)
	if _, _, err := in.Open(mustSeal(t, early, nil, []byte("first"), 17)); err != ErrReplay {
		t.Errorf("open packet 1: err = %v, want ErrReplay", err)
	}
}

// TestIVs checks R3.3 of the protocol notes: one key and salt serve four SAs, so counters must not start alike; and
// that CBC IVs do not repeat.
func TestIVs(t *testing.T) {
	eachSuite(t, func(t *testing.T, s ims.Suite) {
		o, _ := pair(t, s, 0)
		o2, _ := pair(t, s, 0)
		n := int(o.ivLen)
		if n == 0 {
			t.Skip("no IV")
		}
		seen := make(map[string]bool)
		var last uint64
		for i := range 500 {
			for _, x := range []*Outbound{o2, o} {
				iv := mustSeal(t, x, nil, []byte("payload"), 17)[8 : 8+n]
				if seen[string(iv)] {
					t.Fatalf("IV %x used twice", iv)
				}
				seen[string(iv)] = true
				if x != o {
					continue
				}
				v := binary.BigEndian.Uint64(iv)
				if step := v - last; i > 0 && (step == 1) != (o.aead != nil) {
					t.Fatalf("IV step %d", step)
				}
				last = v
			}
		}
	})
}

func TestWindowTable(t *testing.T) {
	type step struct {
		seq  uint32
		want bool
	}
	for _, c := range []struct {
		name  string
		size  int
		steps []step
	}{
		{"zero is never valid", 64, []step{{0, false}, {1, true}, {0, false}}},
		{"duplicates", 64, []step{{1, true}, {1, false}, {2, true}, {2, false}, {1, false}}},
		{"out of order", 64, []step{{5, true}, {3, true}, {4, true}, {3, false}, {1, true}, {2, true}, {5, false}}},
		{"edge of 64", 64, []step{{64, true}, {1, true}, {65, true}, {1, false}, {2, true}, {66, true}, {2, false}, {3, true}}},
		{"edge of 256", 256, []step{{1000, true}, {744, false}, {745, true}, {745, false}, {999, true}}},
		{"size is rounded up to words", 100, []step{{1000, true}, {873, true}, {872, false}}},
		{"edge of 4096", 4096, []step{{10000, true}, {5905, true}, {5904, false}, {5905, false}}},
		{"jump of one word", 64, []step{{63, true}, {64, true}, {127, true}, {65, true}, {64, false}, {63, false}, {126, true}}},
		{"jump beyond the ring", 64, []step{{10, true}, {10000, true}, {10, false}, {9999, true}, {9937, true}, {9936, false}}},
		{"jump of a whole ring", 64, []step{{1, true}, {129, true}, {66, true}, {66, false}, {65, false}, {128, true}}},
		{"end of the number space", 64, []step{
			{math.MaxUint32 - 1, true}, {math.MaxUint32, true}, {math.MaxUint32, false}, {math.MaxUint32 - 63, true}, {math.MaxUint32 - 64, false}, {1, false}, {0, false},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, err := newWindow(c.size)
			if err != nil {
				t.Fatal(err)
			}
			for i, s := range c.steps {
				got := w.fresh(s.seq)
				if got != s.want {
					t.Fatalf("step %d: fresh(%d) = %t, want %t", i, s.seq, got, s.want)
				}
				if got {
					w.mark(s.seq)
				}
			}
		})
	}
}

// TestWindowAgainstModel compares the ring with a plain set, also when it begins in the middle of the numbers.
func TestWindowAgainstModel(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for _, size := range []int{64, 128, 256, 1024, 4096} {
		for _, begin := range []uint32{0, 1, 62, 63, 64, 65, 127, 128, 1000, 1<<31 - 1, 1 << 31} {
			t.Run(fmt.Sprint(size, " from ", begin), func(t *testing.T) {
				againstModel(t, rng, size, begin)
			})
		}
	}
}

func againstModel(t *testing.T, rng *rand.Rand, size int, begin uint32) {
	w, err := newWindow(size)
	if err != nil {
		t.Fatal(err)
	}
	if begin > 0 {
		w.mark(begin) // what a begin leaves nothing of
		w.begin(begin)
	}
	seen := make(map[uint32]bool)
	top := begin
	for i := range 10000 {
		seq := top + uint32(rng.IntN(size/8)) + 1
		switch rng.IntN(10) {
		case 0, 1, 2, 3, 4: // around the window's lower edge and within
			seq = top - min(top, uint32(rng.IntN(size+4)))
		case 5:
			if rng.IntN(50) == 0 {
				seq = top + uint32(rng.IntN(4*size))
			}
		}
		want := seq > begin && !seen[seq] && (seq > top || top-seq < uint32(size))
		if got := w.fresh(seq); got != want {
			t.Fatalf("packet %d: fresh(%d) with top %d = %t, want %t", i, seq, top, got, want)
		}
		if want {
			w.mark(seq)
			seen[seq] = true
			top = max(top, seq)
		}
	}
}

// TestReplay goes through the engine.
//
// Peers: B4.10
func TestReplay(t *testing.T) {
	o, in := pair(t, ims.Suites()[0], 64)
	pkts := make([][]byte, 201)
	for i := 1; i < len(pkts); i++ {
		pkts[i] = mustSeal(t, o, nil, []byte("payload"), 17)
	}
	for i, c := range []struct {
		seq  int
		want error
	}{{3, nil}, {1, nil}, {3, ErrReplay}, {2, nil}, {200, nil}, {136, ErrReplay}, {137, nil}, {137, ErrReplay}, {200, ErrReplay}, {199, nil}} {
		if _, _, err := in.Open(bytes.Clone(pkts[c.seq])); err != c.want {
			t.Errorf("step %d: packet %d: err = %v, want %v", i, c.seq, err, c.want)
		}
	}
}

func TestNoAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes pools drop objects")
	}
	eachSuite(t, func(t *testing.T, s ims.Suite) {
		o, in := pair(t, s, 0)
		buf := make([]byte, 1024)
		payload := make([]byte, 700)
		if n := testing.AllocsPerRun(200, func() {
			if _, err := o.Seal(buf[:0], payload, 17); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("Seal allocates %v times", n)
		}
		if n := testing.AllocsPerRun(200, func() {
			pkt, _ := o.Seal(buf[:0], payload, 17)
			if _, _, err := in.Open(pkt); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("Seal and Open allocate %v times", n)
		}
		pkt, _ := o.Seal(buf[:0], payload, 17)
		pkt[len(pkt)-1] ^= 1
		if n := testing.AllocsPerRun(200, func() {
			if _, _, err := in.Open(pkt); err != ErrICV {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("a failing Open allocates %v times", n)
		}
	})
}

func BenchmarkSeal(b *testing.B) {
	for _, s := range ims.Suites() {
		b.Run(s.String(), func(b *testing.B) {
			o, _ := pair(b, s, 0)
			buf, payload := make([]byte, 1024), make([]byte, 700)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := o.Seal(buf[:0], payload, 17); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkOpen(b *testing.B) {
	for _, s := range ims.Suites() {
		b.Run(s.String(), func(b *testing.B) {
			o, in := pair(b, s, 0)
			sealed, err := o.Seal(nil, make([]byte, 700), 17)
			if err != nil {
				b.Fatal(err)
			}
			pkt := make([]byte, len(sealed))
			b.ReportAllocs()
			for b.Loop() {
				copy(pkt, sealed)
				clear(in.window.words) // the same packet is new again
				in.window.top.Store(0)
				if _, _, err := in.Open(pkt); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkNew shows the memory and time of one SA.
func BenchmarkNew(b *testing.B) {
	for _, s := range ims.Suites() {
		keys := set1Keys(b, s)
		b.Run(s.String()+"/out", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := NewOutbound(testSPI, keys); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(s.String()+"/in", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := NewInbound(testSPI, keys, 0); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
