package e2e

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/bench/attack"
	"github.com/gmgate/gmgate/bench/core"
	"github.com/gmgate/gmgate/bench/lab"
	"github.com/gmgate/gmgate/bench/ue"
	"github.com/gmgate/gmgate/control/ims"
)

// BenchmarkFloodCPU measures how much of a core the daemon itself uses while its phones are idle: undisturbed, under a flood
// of ESP with unknown SPIs, under one of REGISTERs from one source beyond the limit, and under one that is for another host:
// it has nothing to do with the daemon, but makes the machine as busy. They are taken in turn, several times; the figures are
// medians, "added" that of the differences to the quiet stretch of the same turn, "beyond-other" that of those to the foreign
// flood. On a machine that is busy anyway an idle daemon uses less than on a quiet one, since its own timers come late. There
// is no tap on the link, which would compete with the generator and the kernel for the cores. What the kernel does with a
// packet on a core that runs the daemon at the moment counts as the daemon's.
//
// "guard" offers 200,000 packets a second. "off" has no guard, and a tenth of them: each one reaches the daemon there.
func BenchmarkFloodCPU(b *testing.B) {
	for _, tt := range []struct {
		name, mode string
		rate       int
	}{{"guard", "auto", 200_000}, {"off", "off", 20_000}} {
		b.Run(tt.name, func(b *testing.B) {
			d := startIdle(b, tt.mode)
			d.measure(b, tt.rate, max(b.N, leastTurns))
		})
	}
}

// How long and how often is measured: a run takes some seconds.
const (
	idlePhones = 8
	leastTurns = 5
	stretch    = 300 * time.Millisecond // of one measurement
	rest       = 50 * time.Millisecond  // between two, for what is still on its way
)

// idle is a network whose phones have registered and are silent.
type idle struct {
	lab      *lab.Lab
	daemon   *lab.Daemon
	injector *attack.Injector
	guard    bool
}

// startIdle builds the network, with the guard's limit as it is by default.
func startIdle(b *testing.B, mode string) *idle {
	b.Helper()
	if os.Geteuid() != 0 {
		skipOrFail(b, "network namespaces need root")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		skipOrFail(b, "userspace ESP needs /dev/net/tun: %v", err)
	}
	bin := binary(b)
	ctx, cancel := context.WithTimeout(b.Context(), caseTimeout)
	defer cancel()
	check := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	closing := func(c io.Closer) {
		b.Cleanup(func() {
			if err := c.Close(); err != nil {
				b.Error(err)
			}
		})
	}
	d := &idle{guard: mode != "off"}
	var err error
	d.lab, err = lab.New(lab.Options{Prefix: "gme2e"})
	check(err)
	closing(d.lab)
	plan, subs, quiet := d.lab.Plan(), core.Subscribers(idlePhones, domain), slog.New(slog.DiscardHandler)
	c, err := core.Start(core.Config{
		NS: d.lab.Core, Addr: netip.AddrPortFrom(plan.Core, lab.PortCore), Domain: domain, Subscribers: subs, Logger: quiet, LogSize: 1000,
	})
	check(err)
	closing(c)
	d.daemon, err = d.lab.StartDaemon(ctx, bin, d.lab.DaemonConfig(lab.DaemonOptions{
		Backend: backend(), HealthInterval: -1, PendingSource: 32, LogLevel: "warn",
		Guard: lab.GuardOptions{Mode: mode, RegisterRate: 10, RegisterBurst: 64},
	}), nil)
	check(err)
	m, err := d.daemon.Metrics(ctx)
	check(err)
	if on := lab.Sum(m, "gmgate_guard_info") > 0; on != d.guard {
		skipOrFail(b, "guard mode %s, but the guard is on: %v\n%s", mode, on, d.daemon.Tail(5))
	}
	farm, err := ue.NewFarm(ue.FarmConfig{
		NS: d.lab.UE, Prefixes: []netip.Prefix{plan.UEs}, PCSCF: netip.AddrPortFrom(plan.Gm, lab.PortClear),
		ESP: setting(envUE, "userspace"), Logger: quiet,
	})
	check(err)
	closing(farm)
	for i, s := range subs {
		u, err := farm.NewUE(ue.Config{
			Identity: ue.Identity{IMPI: s.IMPI, Domain: s.Domain, K: s.K, OPc: s.OPc}, Addr: plan.UE(i), Transport: ims.UDP,
		})
		check(err)
		closing(u)
		_, err = u.Register(ctx)
		check(err)
	}
	to, err := attack.HardwareAddr(d.lab.GM, lab.LinkGm)
	check(err)
	d.injector, err = attack.Open(d.lab.UE, lab.LinkUE, to)
	check(err)
	closing(d.injector)
	return d
}

// prepared returns the Next of a wave that sends copies of some packets, which costs the generator least.
func prepared(packet func(n int) []byte) func(b []byte, n int) []byte {
	packets := make([][]byte, 256)
	for i := range packets {
		packets[i] = packet(i)
	}
	return func(b []byte, n int) []byte { return append(b, packets[n%len(packets)]...) }
}

// flood is what came of one kind of attack.
type flood struct {
	name, reason string // of drops; empty: it is not for the daemon's host
	next         func(b []byte, n int) []byte

	core    []float64 // per cent, by turn
	sent    int
	took    time.Duration
	dropped float64
}

// measure takes turns and reports the medians.
func (d *idle) measure(b *testing.B, rate, turns int) {
	b.Helper()
	gm, source := d.lab.Plan().Gm, netip.AddrPortFrom(d.lab.Plan().Stranger(0), 5060)
	other := &flood{name: "other", next: prepared(func(n int) []byte {
		return attack.AppendESP(nil, d.lab.Plan().UE(n%idlePhones), gm.Prev(), uint32(0x100+n), 1, 700, uint64(n)) //nolint:gosec // small
	})}
	floods := []*flood{
		other,
		{name: "esp", reason: "unknown_spi", next: prepared(func(n int) []byte {
			return attack.AppendESP(nil, d.lab.Plan().UE(n%idlePhones), gm, uint32(0x100+n), 1, 700, uint64(n)) //nolint:gosec // small
		})},
		{name: "register", reason: "register_rate", next: prepared(func(n int) []byte {
			return attack.AppendUDP(nil, source, netip.AddrPortFrom(gm, lab.PortClear),
				attack.AppendRegister(nil, source, domain, fmt.Sprintf("nobody%d@%s", n, domain), n))
		})},
	}
	wave := func(f *flood, length time.Duration) attack.Result {
		r, err := d.injector.Send(b.Context(), attack.Wave{Rate: rate, For: length, Next: f.next})
		if err != nil {
			b.Fatal(err)
		}
		return r
	}
	for _, f := range floods { // what the source may send at once is spent afterwards, and caches are warm
		wave(f, stretch)
		f.dropped = -d.dropped(b, f.reason)
		time.Sleep(10 * rest)
	}
	share := func(f func()) float64 { // of a core, in per cent
		time.Sleep(rest)
		began, used := time.Now(), cpuTimeOf(b, d.daemon.PID())
		f()
		used = cpuTimeOf(b, d.daemon.PID()) - used
		return 100 * used.Seconds() / time.Since(began).Seconds()
	}
	var quiet []float64
	b.ResetTimer()
	for range turns {
		quiet = append(quiet, share(func() { time.Sleep(stretch) }))
		for _, f := range floods {
			loaded := share(func() {
				r := wave(f, stretch)
				f.sent, f.took = f.sent+r.Sent, f.took+r.Took
			})
			f.core = append(f.core, loaded)
		}
		slices.Reverse(floods)
	}
	b.StopTimer()
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(middle(quiet), "%core-quiet")
	for _, f := range floods {
		b.ReportMetric(middle(f.core), "%core-"+f.name)
		b.ReportMetric(float64(f.sent)/f.took.Seconds(), f.name+"/s")
		if f == other {
			continue
		}
		b.ReportMetric(middle(differences(f.core, quiet)), "%core-"+f.name+"-added")
		b.ReportMetric(middle(differences(f.core, other.core)), "%core-"+f.name+"-beyond-other")
		if d.guard {
			f.dropped += d.dropped(b, f.reason)
			b.ReportMetric(100*f.dropped/float64(f.sent), "%dropped-"+f.name)
		}
	}
}

// dropped is what the guard has dropped for a reason; 0 without a guard or a reason.
func (d *idle) dropped(b *testing.B, reason string) float64 {
	b.Helper()
	if reason == "" {
		return 0
	}
	time.Sleep(2 * rest) // older counters might be answered than those of this moment
	m, err := d.daemon.Metrics(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	return lab.Sum(m, "gmgate_bpf_packets_total", `verdict="drop"`, fmt.Sprintf("reason=%q", reason))
}

// cpuTimeOf is what a process has used since it began, in all its threads, those that have ended included.
func cpuTimeOf(b *testing.B, pid int) time.Duration {
	b.Helper()
	const sched = 2 // CPUCLOCK_SCHED of linux/posix-timers.h: what clock_getcpuclockid(3) makes of a process
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|sched), &ts); err != nil { //nolint:gosec // as the kernel has it
		b.Fatalf("CPU time of the daemon: %v", err)
	}
	return time.Duration(ts.Nano())
}

// middle returns the median.
func middle(v []float64) float64 { return slices.Sorted(slices.Values(v))[len(v)/2] }

// differences subtracts turn by turn.
func differences(v, from []float64) []float64 {
	d := slices.Clone(v)
	for i := range d {
		d[i] -= from[i]
	}
	return d
}
