package guard

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
)

// benchmarkEntries is how full the map of SPIs is: 200,000 phones.
const benchmarkEntries = 400_000

// benchmarkSPI is the SPI of port-ps of the n-th phone, spread over the numbers as a backend draws them.
func benchmarkSPI(n uint32) uint32 { return 0x10000 + n*0x2000 }

// benchmarkPhone is the address of the n-th phone; every other one has IPv6.
func benchmarkPhone(n uint32) (phone, local netip.Addr) {
	if n%2 == 0 {
		return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 10<<24+n))), local4
	}
	a := netip.MustParseAddr("2001:db8:7::7").As16()
	binary.BigEndian.PutUint32(a[6:], n)
	return netip.AddrFrom16(a), local6
}

// crowd loads a guard whose map is full of phones.
func crowd(b *testing.B) *ward {
	cfg := testConfig()
	cfg.SAs, cfg.UEs = 1<<19, benchmarkEntries/2
	w := newWard(b, cfg)
	sets := make([]sa.Params, benchmarkEntries/2)
	for n := range sets {
		phone, local := benchmarkPhone(uint32(n))                                                       //nolint:gosec // small
		sets[n] = setOf(uint64(n)+1000, uint32(n)+1000, local, phone, ims.SPI(benchmarkSPI(uint32(n)))) //nolint:gosec // small
	}
	if err := w.Sync(sets, nil); err != nil { // as SAs that have been used
		b.Fatal(err)
	}
	return w
}

// timed runs a program on one packet as often as the benchmark wants. What it reports is the kernel's own measure, without
// the system call.
func timed(b *testing.B, p *program, packet []byte, want uint32) {
	b.Helper()
	if !p.raw {
		packet = inFrame(packet)
	}
	verdict, d, err := p.prog.Benchmark(packet, b.N, b.ResetTimer)
	if err != nil {
		b.Fatal(err)
	}
	if verdict != want {
		b.Fatalf("verdict %d, want %d", verdict, want)
	}
	b.ReportMetric(float64(d.Nanoseconds()), "ns/packet")
}

// BenchmarkPacket has the cost of one packet, the map of SPIs being full. Warm is the same packet again and again. Cold is a
// random phone for each packet and one system call for each, which pushes programs and maps out of the nearer caches, and
// the clock is read for each run: the floor beside it is a packet that is none of ours, measured in the same way.
func BenchmarkPacket(b *testing.B) {
	w := crowd(b)
	for _, i := range []int{0, 2} {
		p := &w.programs[i]
		for n := range uint32(2) {
			phone, local := benchmarkPhone(n)
			other, name := other4, "IPv4"
			if local.Is6() {
				other, name = other6, "IPv6"
			}
			for _, c := range []struct {
				name   string
				packet []byte
				want   uint32
			}{
				{"known", ip(phone, local, protoESP, esp(benchmarkSPI(n))), p.pass},
				{"known in UDP", ip(phone, local, protoUDP, udp(4500, 4500, esp(benchmarkSPI(n)))), p.pass},
				{"unknown", ip(phone, local, protoESP, esp(benchmarkSPI(n)+7)), p.drop},
				{"wrong source", ip(stranger4, local4, protoESP, esp(benchmarkSPI(0))), p.drop},
				{"cleartext", ip(phone, local, protoUDP, udp(31000, portPS, []byte(options))), p.drop},
				{"clear port", ip(phone, local, protoUDP, udp(31000, clearPort, []byte(options))), p.pass},
				{"other", ip(phone, other, protoESP, esp(benchmarkSPI(n))), p.pass},
			} {
				b.Run(p.name+"/"+name+"/"+c.name, func(b *testing.B) { timed(b, p, c.packet, c.want) })
			}
		}
		for _, c := range []struct {
			name string
			of   func(n uint32) []byte
			want uint32
		}{
			{"known cold", func(n uint32) []byte {
				phone, local := benchmarkPhone(n)
				return inFrame(ip(phone, local, protoESP, esp(benchmarkSPI(n))))
			}, p.pass},
			{"unknown cold", func(n uint32) []byte {
				phone, local := benchmarkPhone(n)
				return inFrame(ip(phone, local, protoESP, esp(benchmarkSPI(n)+7)))
			}, p.drop},
			{"floor", func(n uint32) []byte {
				phone, local := benchmarkPhone(n)
				return inFrame(ip(local, phone, protoESP, esp(benchmarkSPI(n))))
			}, p.pass},
		} {
			b.Run(p.name+"/"+c.name, func(b *testing.B) {
				var sum time.Duration
				for b.Loop() {
					verdict, d, err := p.prog.Benchmark(c.of(rand.Uint32N(benchmarkEntries/2)), 1, nil)
					if err != nil || verdict != c.want {
						b.Fatal(verdict, err)
					}
					sum += d
				}
				b.ReportMetric(float64(sum.Nanoseconds())/float64(b.N), "ns/packet")
			})
		}
	}
}

// BenchmarkRegister has a source that is within its limit, and one that is beyond.
func BenchmarkRegister(b *testing.B) {
	cfg := testConfig()
	cfg.Rate, cfg.Burst, cfg.Sources = 1, 1, 1<<16
	w := newWard(b, cfg)
	packet := ip(phone4, local4, protoUDP, udp(31000, clearPort, []byte(register)))
	w.exhaust(b, bucketOf(phone4))
	for _, i := range []int{0, 2} {
		p := &w.programs[i]
		b.Run(p.name+"/beyond", func(b *testing.B) { timed(b, p, packet, p.drop) })
		b.Run(p.name+"/SYN beyond", func(b *testing.B) {
			timed(b, p, ip(phone4, local4, protoTCP, tcp(31000, clearPort, flagSYN, nil)), p.drop)
		})
	}
}

// BenchmarkFill adds and removes sets; each has two entries.
func BenchmarkFill(b *testing.B) {
	cfg := testConfig()
	cfg.SAs, cfg.UEs = 1<<19, benchmarkEntries/2
	g := openGuard(b, cfg)
	n := uint32(0)
	start := processorTime(b)
	for b.Loop() {
		phone, local := benchmarkPhone(n)
		s := setOf(uint64(n)+1, n+1, local, phone, ims.SPI(benchmarkSPI(n)))
		if err := g.Add(s); err != nil {
			b.Fatal(err)
		}
		n++
		if n == benchmarkEntries/2 {
			n = 0
			if err := g.Sync(nil, nil); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(float64((processorTime(b)-start).Nanoseconds())/float64(2*b.N), "cpu-ns/entry")
}

// processorTime is what the process has had of the CPUs, which other programs do not change as much as they change the time.
func processorTime(b *testing.B) time.Duration {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// BenchmarkTraffic reads the counters of a UE context, as workers and metrics do.
func BenchmarkTraffic(b *testing.B) {
	w := newWard(b, testConfig())
	if _, err := w.programs[0].prog.Run(&ebpf.RunOptions{Data: inFrame(ip(phone4, local4, protoESP, esp(spi4)))}); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if w.Traffic(label4).Packets != 1 {
			b.Fatal("wrong traffic")
		}
	}
}
