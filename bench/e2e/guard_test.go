package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/bench/attack"
	"github.com/gmgate/gmgate/bench/core"
	"github.com/gmgate/gmgate/bench/lab"
	"github.com/gmgate/gmgate/bench/ue"
	"github.com/gmgate/gmgate/control/ims"
)

// guarded is a network with a guard and an attacker on the Gm link.
type guarded struct {
	*fixture
	injector *attack.Injector
	ctx      context.Context
}

// startGuarded builds a network whose daemon has its guard on, and skips the test where there is none.
func startGuarded(t *testing.T, cfg fixtureConfig) *guarded {
	t.Helper()
	if out, err := exec.Command(binary(t), "example").Output(); err != nil || !strings.Contains(string(out), "\nguard:") { //nolint:gosec // the daemon
		skipOrFail(t, "this gmgate has no guard: %v", err)
	}
	cfg.clear = attackRules()
	ctx, cancel := context.WithTimeout(t.Context(), loadTimeout)
	t.Cleanup(cancel)
	g := &guarded{fixture: start(t, cfg), ctx: ctx}
	if g.metric(g.ctx, t, "guard_info") == 0 {
		skipOrFail(t, "the guard is not on: /metrics has no gmgate_guard_info\n%s", g.daemon.Tail(5))
	}
	to, err := attack.HardwareAddr(g.lab.GM, lab.LinkGm)
	if err != nil {
		t.Fatal(err)
	}
	if g.injector, err = attack.Open(g.lab.UE, lab.LinkUE, to); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = g.injector.Close() })
	return g
}

// attackRules accepts in clear what the attacker sends and what it is answered.
func attackRules() lab.ClearRules {
	return lab.ClearRules{Statuses: []int{401, 403, 503}, Also: func(m lab.ClearSIP) bool {
		return strings.HasPrefix(m.CallID, attack.CallID)
	}}
}

// many is a number of packets: less where the processor is emulated.
func many(n int) int {
	if slowMachine() {
		return n / 10
	}
	return n
}

// sent is what an attack put on the link, and what the link lost of it at most.
type sent struct {
	n    int
	lost int
	took time.Duration
}

// inject sends count packets at many(10,000) per second.
func (g *guarded) inject(t *testing.T, count int, next func(b []byte, n int) []byte) sent {
	t.Helper()
	before := g.linkLost(t)
	r, err := g.injector.Send(g.ctx, attack.Wave{Rate: many(10_000), Count: count, IPv6: g.ipv6, Next: next})
	if err != nil {
		t.Fatal(err)
	}
	return sent{n: r.Sent, lost: int(g.linkLost(t) - before), took: r.Took}
}

func (g *guarded) linkLost(t *testing.T) uint64 {
	t.Helper()
	a, err := attack.Lost(g.lab.UE, lab.LinkUE)
	b, other := attack.Lost(g.lab.GM, lab.LinkGm)
	if err := errors.Join(err, other); err != nil {
		t.Fatal(err)
	}
	return a + b
}

// dropped is what the guard has dropped for a reason, or for any if it is empty.
func (g *guarded) dropped(t *testing.T, reason string) int {
	t.Helper()
	labels := []string{`verdict="drop"`}
	if reason != "" {
		labels = append(labels, fmt.Sprintf("reason=%q", reason))
	}
	return int(g.metric(g.ctx, t, "bpf_packets_total", labels...))
}

// wantDropped expects the guard to drop for a reason exactly what an attack sent.
func (g *guarded) wantDropped(t *testing.T, reason string, before int, s sent) {
	t.Helper()
	got := 0
	if !eventually(g.ctx, 3*time.Second, func() bool { got = g.dropped(t, reason) - before; return got >= s.n-s.lost }) || got > s.n {
		t.Errorf("the guard dropped %d packets as %s, want %d; the link lost %d", got, reason, s.n, s.lost)
	}
	t.Logf("%d packets sent, %d dropped as %s", s.n, got, reason)
}

// behind sums up what those behind the guard found wrong: ESP, sockets and SIP.
func (g *guarded) behind(t *testing.T) (all map[string]float64) {
	t.Helper()
	m, err := g.daemon.Metrics(g.ctx)
	if err != nil {
		t.Fatal(err)
	}
	all = map[string]float64{}
	for k, v := range m {
		for _, name := range []string{"gmgate_esp_drops_total{", "gmgate_xfrm_errors_total{", "gmgate_socket_drops_total{", "gmgate_sip_drops_total{", "gmgate_sip_rejected_total{"} {
			// Phones send keep-alives, and what they send twice on a slow machine is answered twice.
			if strings.HasPrefix(k, name) && !strings.Contains(k, "keepalive") && !strings.Contains(k, "unknown_response") &&
				!strings.Contains(k, "protocol_out") {
				all[k] = v
			}
		}
	}
	return all
}

// wantBehind expects nothing of an attack to have come past the guard.
func (g *guarded) wantBehind(t *testing.T, before map[string]float64) {
	t.Helper()
	for k, v := range g.behind(t) {
		if v != before[k] {
			t.Errorf("%s went from %g to %g", k, before[k], v)
		}
	}
	if got := g.fromAttacker(); len(got) > 0 {
		t.Errorf("%d messages of the attacker reached the core, the first: %s", len(got), got[0])
	}
}

// fromAttacker returns the attacker's messages that reached the core, each once: where the core is slow, gmgate repeats them.
func (g *guarded) fromAttacker() []core.Seen {
	seen := map[string]bool{}
	return g.atCore(func(s core.Seen) bool {
		first := strings.HasPrefix(s.CallID, attack.CallID) && !seen[s.CallID]
		seen[s.CallID] = true
		return first
	})
}

// talking lets the phones of a pair send each other messages while f runs; all of them have to arrive.
func (g *guarded) talking(t *testing.T, p *pair, f func()) {
	t.Helper()
	over, done := make(chan struct{}), make(chan error, 2)
	for _, side := range []struct {
		from *ue.UE
		to   string
	}{{p.a, p.bURI}, {p.b, p.aURI}} {
		go func() {
			for n := 1; ; n++ {
				if status, err := side.from.Message(g.ctx, side.to, "through the attack"); err != nil || status != 200 {
					done <- fmt.Errorf("message %d to %s: %d, %w", n, side.to, status, err)
					return
				}
				select {
				case <-over:
					done <- nil
					return
				default:
				}
			}
		}()
	}
	f()
	close(over)
	if err := errors.Join(<-done, <-done); err != nil {
		t.Error(err)
	}
}

// families runs a test in a network of each address family.
func families(t *testing.T, cfg fixtureConfig, test func(t *testing.T, g *guarded)) {
	t.Helper()
	for _, v6 := range []bool{false, true} {
		name := "IPv4"
		if v6 {
			name = "IPv6"
		}
		t.Run(name, func(t *testing.T) {
			cfg.ipv6 = v6
			test(t, startGuarded(t, cfg))
		})
	}
}

// TestGuardUnknownSPI pours ESP with unknown SPIs in while phones talk: the guard drops and counts every packet, and the ESP
// backend sees none, so that the kernel's XfrmInNoStates stays 0.
func TestGuardUnknownSPI(t *testing.T) {
	families(t, fixtureConfig{}, func(t *testing.T, g *guarded) {
		p := g.newPair(g.ctx, t, func(c *ue.Config) { c.Offers = g.offers(1) })
		plan := g.lab.Plan()
		who := func(n int) netip.Addr {
			if n%2 == 0 {
				return plan.UE(n / 2 % 2) // the phones' own
			}
			return plan.Stranger(n % 1000)
		}
		used := []ims.SPI{p.ra.SPIs.PC, p.ra.SPIs.PS, p.rb.SPIs.PC, p.rb.SPIs.PS}
		spi := func(n int) uint32 {
			s := ims.SPI(0x1000 + n*7919)
			for slices.Contains(used, s) {
				s++
			}
			return uint32(s)
		}
		before, unknown := g.behind(t), g.dropped(t, "unknown_spi")
		var s sent
		g.talking(t, p, func() {
			s = g.inject(t, many(20_000), func(b []byte, n int) []byte {
				if n%4 > 1 {
					return attack.AppendESPInUDP(b, who(n), plan.Gm, spi(n), uint32(n), 100, uint64(n))
				}
				return attack.AppendESP(b, who(n), plan.Gm, spi(n), uint32(n), 100, uint64(n))
			})
		})
		g.wantDropped(t, "unknown_spi", unknown, s)
		g.wantBehind(t, before)
		if backend() == "xfrm" {
			if n := g.metric(g.ctx, t, "xfrm_errors_total", `counter="XfrmInNoStates"`); n != 0 {
				t.Errorf("XfrmInNoStates is %g", n)
			}
		}
		checkPhones(t, p.a, p.b)
	})
}

// TestGuardCleartext sends UDP datagrams and TCP SYNs in clear to every protected port, in the name of phones and of
// strangers: nothing comes past the guard, and nothing is answered.
func TestGuardCleartext(t *testing.T) {
	families(t, fixtureConfig{}, func(t *testing.T, g *guarded) {
		const each = 40
		p := g.newPair(g.ctx, t, func(c *ue.Config) { c.Offers = g.offers(1) })
		plan := g.lab.Plan()
		for _, port := range slices.Concat(lab.ServerPorts, lab.ClientPorts) {
			for _, tr := range []ims.Transport{ims.UDP, ims.TCP} {
				before, clear := g.behind(t), g.dropped(t, "cleartext")
				s := g.inject(t, each, func(b []byte, n int) []byte {
					from := netip.AddrPortFrom(plan.UE(0), p.ra.Ports.UC)
					switch n % 4 {
					case 1:
						from = netip.AddrPortFrom(plan.UE(0), p.ra.Ports.US)
					case 2:
						from = netip.AddrPortFrom(plan.Stranger(n), 5060)
					case 3:
						from = netip.AddrPortFrom(plan.UE(100+n), uint16(1024+n))
					}
					sip := attack.AppendMessage(nil, from, p.aURI, p.bURI, n)
					if tr == ims.TCP {
						return attack.AppendSYN(b, from, netip.AddrPortFrom(plan.Gm, port), uint32(n), sip)
					}
					return attack.AppendUDP(b, from, netip.AddrPortFrom(plan.Gm, port), sip)
				})
				g.wantDropped(t, "cleartext", clear, s)
				g.wantBehind(t, before)
				if t.Failed() {
					t.Fatalf("port %d, %s", port, tr)
				}
			}
		}
		answered := g.capture.Stats().ClearSIP
		g.mustMessage(g.ctx, t, p.a, p.bURI)
		if n := g.capture.Stats().ClearSIP; n != answered {
			t.Errorf("%d pieces of SIP in clear, there were %d", n, answered)
		}
	})
}

// TestGuardHooks has phones talk, by UDP and TCP, through each hook that the guard may sit on, while unknown SPIs and cleartext
// come in. Generic XDP before the kernel's ESP is the one that cannot tell clear packets from decrypted ones, and leaves them to
// the kernel's policies.
func TestGuardHooks(t *testing.T) {
	for mode, hooks := range map[string][]string{"xdp": {"xdp"}, "generic": {"xdp-generic"}, "tc": {"tcx", "tc"}} {
		t.Run(mode, func(t *testing.T) {
			g := startGuarded(t, fixtureConfig{daemon: lab.DaemonOptions{Guard: lab.GuardOptions{Mode: mode}}})
			m, err := g.daemon.Metrics(g.ctx)
			if err != nil {
				t.Fatal(err)
			}
			for hook, n := range lab.By(m, "gmgate_guard_info", "hook", fmt.Sprintf("interface=%q", lab.LinkGm)) {
				if n > 0 && !slices.Contains(hooks, hook) {
					t.Errorf("the guard sits on %s, want %v", hook, hooks)
				}
			}
			p := g.newPair(g.ctx, t, func(c *ue.Config) { c.Offers = g.offers(1) }) // what is large goes by TCP
			gm := netip.AddrPortFrom(g.lab.Plan().Gm, p.ra.Ports.PS)
			before, unknown, clear := g.behind(t), g.dropped(t, "unknown_spi"), g.dropped(t, "cleartext")
			var esp, sip sent
			g.talking(t, p, func() {
				esp = g.inject(t, many(4000), func(b []byte, n int) []byte {
					return attack.AppendESP(b, g.lab.Plan().UE(0), gm.Addr(), 0x100, uint32(n), 100, uint64(n))
				})
				sip = g.inject(t, many(4000), func(b []byte, n int) []byte {
					from := netip.AddrPortFrom(g.lab.Plan().UE(0), p.ra.Ports.UC)
					text := attack.AppendMessage(nil, from, p.aURI, p.bURI, n)
					if n%2 == 0 {
						return attack.AppendUDP(b, from, gm, text)
					}
					return attack.AppendSYN(b, from, gm, uint32(n), text)
				})
			})
			g.wantDropped(t, "unknown_spi", unknown, esp)
			if mode == "generic" && backend() == "xfrm" {
				if n := g.metric(g.ctx, t, "xfrm_errors_total", `counter="XfrmInTmplMismatch"`); n == 0 {
					t.Error("the kernel's policies dropped nothing")
				}
			} else {
				g.wantDropped(t, "cleartext", clear, sip)
				g.wantBehind(t, before)
			}
			if got := g.fromAttacker(); len(got) > 0 {
				t.Errorf("%d messages of the attacker reached the core", len(got))
			}
			if res, err := p.a.Call(g.ctx, p.bURI, ue.CallOptions{PRACK: true, BodySize: 4000}); err != nil || res.Status != 200 {
				t.Errorf("call: %d, %v", res.Status, err)
			}
			checkPhones(t, p.a, p.b)
		})
	}
}

// TestGuardRegisterFlood lets one source send REGISTERs without end: it gets through what the burst and the rate allow, a
// phone of another source registers meanwhile, and later the source itself may register again.
func TestGuardRegisterFlood(t *testing.T) {
	const rate, burst = 5, 20
	cfg := fixtureConfig{daemon: lab.DaemonOptions{Guard: lab.GuardOptions{RegisterRate: rate, RegisterBurst: burst}}}
	families(t, cfg, func(t *testing.T, g *guarded) {
		plan := g.lab.Plan()
		clearPort := netip.AddrPortFrom(plan.Gm, lab.PortClear)
		src := netip.AddrPortFrom(plan.Stranger(0), 5060)
		serial := 0
		next := func(b []byte, _ int) []byte {
			serial++
			return attack.AppendUDP(b, src, clearPort, attack.AppendRegister(nil, src, domain, fmt.Sprintf("nobody%d@%s", serial, domain), serial))
		}
		newcomer := g.newUE(t)
		registered := make(chan error, 1)
		limited := g.dropped(t, "register_rate")
		begin := time.Now()
		go func() {
			_, err := newcomer.Register(g.ctx)
			registered <- err
		}()
		s := g.inject(t, many(20_000), next)
		if err := <-registered; err != nil {
			t.Errorf("a phone of another source: %v", err)
		}
		// The bucket fills while the flood lasts; the end of the flood lies before this moment.
		most := burst + int(rate*time.Since(begin).Seconds()) + 1
		got := 0
		if !eventually(g.ctx, 3*time.Second, func() bool {
			got = g.dropped(t, "register_rate") - limited
			return got >= s.n-s.lost-most
		}) || got > s.n-burst {
			t.Errorf("%d of %d REGISTERs were dropped, want all but %d to %d; the link lost %d", got, s.n, burst, most, s.lost)
		}
		at := len(g.fromAttacker())
		if at == 0 || at > most {
			t.Errorf("%d of them reached the core, want 1 to %d", at, most)
		}
		t.Logf("%d REGISTERs sent in %s, %d dropped, %d reached the core", s.n, s.took, got, at)
		if !eventually(g.ctx, 10*time.Second, func() bool {
			g.inject(t, 1, next)
			return len(g.fromAttacker()) > at
		}) {
			t.Error("the source may never register again")
		}
	})
}

// TestGuardReplay sends again what phones have sent. From other addresses the guard drops it; from the phone's own it passes,
// since it is genuine, and ESP finds out; and when the phone has gone, so have its SPIs.
func TestGuardReplay(t *testing.T) {
	families(t, fixtureConfig{}, func(t *testing.T, g *guarded) {
		const kept, rounds = 16, 20
		p := g.newPair(g.ctx, t, func(c *ue.Config) { c.Offers, c.Quirks.LargeUDP = g.offers(1), true })
		plan := g.lab.Plan()
		g.capture.Keep(kept)
		for range kept { // the other phone answers, but has asked for nothing
			g.mustMessage(g.ctx, t, p.a, p.bURI)
		}
		g.capture.Settle(50*time.Millisecond, time.Second)
		packets := g.capture.Kept()
		own := plan.UE(0)
		var ofA [][]byte
		for _, b := range packets {
			if copied, ok := attack.AppendFrom(nil, b, own); ok && string(copied) == string(b) {
				ofA = append(ofA, b)
			}
		}
		if len(ofA) == 0 {
			t.Fatalf("none of %d packets is of the phone", len(packets))
		}
		count := rounds * len(ofA)
		verbatim := func(b []byte, n int) []byte { return append(b, ofA[n%len(ofA)]...) }

		before, wrong := g.behind(t), g.dropped(t, "wrong_source")
		s := g.inject(t, count, func(b []byte, n int) []byte {
			from := plan.UE(1) // the other phone's
			if n%2 == 0 {
				from = plan.Stranger(n)
			}
			b, _ = attack.AppendFrom(b, ofA[n%len(ofA)], from)
			return b
		})
		g.wantDropped(t, "wrong_source", wrong, s)
		g.wantBehind(t, before)

		all := g.dropped(t, "")
		s = g.inject(t, count, verbatim)
		replayed := func() int {
			if backend() == "xfrm" {
				return int(g.metric(g.ctx, t, "xfrm_errors_total", `counter="XfrmInStateSeqError"`))
			}
			return int(g.metric(g.ctx, t, "esp_drops_total", `reason="replay"`))
		}
		if !eventually(g.ctx, 3*time.Second, func() bool { return replayed() >= s.n-s.lost }) || replayed() > s.n {
			t.Errorf("ESP refused %d replays, want %d; the link lost %d", replayed(), s.n, s.lost)
		}
		g.mustMessage(g.ctx, t, p.a, p.bURI)
		g.mustMessage(g.ctx, t, p.b, p.aURI)

		if err := p.a.Deregister(g.ctx); err != nil {
			t.Fatal(err)
		}
		if !eventually(g.ctx, g.drain, func() bool { return g.metric(g.ctx, t, "esp_sas") == 4 }) {
			t.Fatalf("%g SAs are left, want those of one phone", g.metric(g.ctx, t, "esp_sas"))
		}
		if now := g.dropped(t, ""); now != all {
			t.Errorf("the guard dropped %d of the replays, it cannot know", now-all)
		}
		before, unknown := g.behind(t), g.dropped(t, "unknown_spi")
		g.wantDropped(t, "unknown_spi", unknown, g.inject(t, count, verbatim))
		g.wantBehind(t, before)
	})
}

// TestGuardMalformed sends every kind of bad packet to a protected port and to the unprotected one. Where the guard has a
// reason of its own for a kind, it drops all of them for that; none of any kind reaches SIP.
func TestGuardMalformed(t *testing.T) {
	reasons := map[string]string{
		"ESP without a sequence number": "esp_short",
		"SPI zero":                      "spi_reserved",
		"reserved SPI":                  "spi_reserved",
		"from port zero":                "port_zero",
		"to port zero":                  "port_zero",
		"many extension headers":        "ext_headers",
	}
	families(t, fixtureConfig{}, func(t *testing.T, g *guarded) {
		const each = 50
		p := g.newPair(g.ctx, t, func(c *ue.Config) { c.Offers = g.offers(1) })
		plan := g.lab.Plan()
		// The phones are silent meanwhile; the core may still tell gmgate of their registrations.
		handled := func() (n float64) {
			m, err := g.daemon.Metrics(g.ctx)
			if err != nil {
				t.Fatal(err)
			}
			for _, side := range []ims.Side{ims.GmClear, ims.GmProtected} {
				n += lab.Sum(m, "gmgate_sip_messages_total", `dir="in"`, fmt.Sprintf("side=%q", side))
			}
			return n + lab.Sum(m, "gmgate_sip_drops_total") + lab.Sum(m, "gmgate_sip_rejected_total")
		}
		quiet := handled()
		for _, k := range attack.Malformed(g.ipv6) {
			for _, port := range []uint16{lab.PortClear, p.ra.Ports.PS} {
				reason, sip := reasons[k.Name], handled()
				before := g.dropped(t, reason)
				s := g.inject(t, each, func(b []byte, n int) []byte {
					from := plan.UE(0)
					if n%2 == 0 {
						from = plan.Stranger(n)
					}
					return k.Append(b, netip.AddrPortFrom(from, 5060), netip.AddrPortFrom(plan.Gm, port), n)
				})
				if reason != "" {
					g.wantDropped(t, reason, before, s)
				}
				if now := handled(); now != sip {
					t.Errorf("SIP has seen %g messages", now-sip)
				}
				if t.Failed() {
					t.Fatalf("%s, to port %d", k.Name, port)
				}
			}
		}
		g.capture.Settle(50*time.Millisecond, time.Second)
		if now := handled(); now != quiet { // what came late
			t.Errorf("SIP has seen %g messages", now-quiet)
		}
		g.mustMessage(g.ctx, t, p.a, p.bURI)
		g.mustMessage(g.ctx, t, p.b, p.aURI)
		checkPhones(t, p.a, p.b)
	})
}
