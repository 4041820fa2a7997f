package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/gmgate/gmgate/bench/core"
	"github.com/gmgate/gmgate/bench/lab"
	"github.com/gmgate/gmgate/bench/ue"
	"github.com/gmgate/gmgate/control/ims"
)

// largeBody does not fit into a datagram that RFC 3261 §18.1.1 allows.
const largeBody = 4000

// mustRegister registers a phone and checks the result.
func (f *fixture) mustRegister(ctx context.Context, t *testing.T, u *ue.UE) ue.Result {
	t.Helper()
	res, err := u.Register(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if !res.Challenged || len(res.AssociatedURI) == 0 {
		t.Fatalf("registered without challenge or identities: %+v", res)
	}
	return res
}

// mustMessage sends a MESSAGE and expects 200.
func (f *fixture) mustMessage(ctx context.Context, t *testing.T, u *ue.UE, to string) {
	t.Helper()
	if status, err := u.Message(ctx, to, "hello"); err != nil || status != 200 {
		t.Errorf("MESSAGE to %s: %d, %v", to, status, err)
	}
}

// pair is two registered phones.
type pair struct {
	a, b       *ue.UE
	ra, rb     ue.Result
	aURI, bURI string
	aIMPI      string
}

func (f *fixture) newPair(ctx context.Context, t *testing.T, change ...func(*ue.Config)) *pair {
	t.Helper()
	p := &pair{}
	f.mu.Lock()
	first := f.next
	f.mu.Unlock()
	p.a, p.b = f.newUE(t, change...), f.newUE(t, change...)
	p.ra, p.rb = f.mustRegister(ctx, t, p.a), f.mustRegister(ctx, t, p.b)
	p.aURI, p.bURI, p.aIMPI = f.subs[first].IMPU[0], f.subs[first+1].IMPU[0], f.subs[first].IMPI
	return p
}

// checkPhones fails the test for whatever the phones found wrong.
func checkPhones(t *testing.T, phones ...*ue.UE) {
	t.Helper()
	for i, u := range phones {
		for _, p := range u.Problems() {
			t.Errorf("phone %d: %s", i+1, p)
		}
	}
}

// life is the whole life of two phones: everything a phone does, in both directions.
func (f *fixture) life(t *testing.T, p *pair) {
	run := func(name string, do func(ctx context.Context, t *testing.T)) {
		t.Run(name, func(t *testing.T) { do(timed(t), t) })
	}
	body := func(u *ue.UE) string {
		in := u.Received()
		if len(in) == 0 {
			return ""
		}
		return in[len(in)-1].Body
	}
	run("message", func(ctx context.Context, t *testing.T) {
		for _, d := range []struct {
			from, to *ue.UE
			uri      string
			text     string
		}{{p.a, p.b, p.bURI, "one"}, {p.b, p.a, p.aURI, "two"}, {p.a, p.b, p.bURI, strings.Repeat("x", largeBody)}} {
			if status, err := d.from.Message(ctx, d.uri, d.text); err != nil || status != 200 {
				t.Errorf("MESSAGE to %s: %d, %v", d.uri, status, err)
			} else if got := body(d.to); got != d.text {
				t.Errorf("%s got %d octets, want %d", d.uri, len(got), len(d.text))
			}
		}
		if status, err := f.core.SendMessage(ctx, p.aURI, "from the network"); err != nil || status != 200 {
			t.Errorf("MESSAGE of the network: %d, %v", status, err)
		}
		if got := body(p.a); got != "from the network" {
			t.Errorf("got %q", got)
		}
	})
	call := func(name string, from *ue.UE, to string, o ue.CallOptions, want int) {
		run(name, func(ctx context.Context, t *testing.T) {
			res, err := from.Call(ctx, to, o)
			if refused, ok := errors.AsType[*ue.StatusError](err); err != nil && (!ok || refused.Status != want) {
				t.Fatal(err)
			}
			if res.Status != want {
				t.Errorf("answered %v, want %d", res.Statuses, want)
			}
			if want == 200 && !o.RemoteBye && res.Bye != 200 {
				t.Errorf("BYE was answered %d", res.Bye)
			}
			if o.BodySize > 0 && res.Transport != ims.TCP {
				t.Errorf("an INVITE with a body of %d went by %s", o.BodySize, res.Transport)
			}
		})
	}
	call("call", p.a, p.bURI, ue.CallOptions{PRACK: true}, 200)
	call("call back", p.b, p.aURI, ue.CallOptions{PRACK: true, RemoteBye: true}, 200)
	call("call without PRACK", p.a, p.bURI, ue.CallOptions{Update: true}, 200)
	call("re-INVITE", p.b, p.aURI, ue.CallOptions{PRACK: true, ReInvite: true}, 200)
	call("cancel", p.a, p.bURI, ue.CallOptions{Cancel: true}, 487)
	call("to nobody", p.a, "sip:+15550999999@"+domain, ue.CallOptions{}, 404)
	run("large call", func(ctx context.Context, t *testing.T) {
		res, err := p.a.Call(ctx, p.bURI, ue.CallOptions{PRACK: true, BodySize: largeBody})
		if err != nil || res.Status != 200 {
			t.Fatalf("%d, %v", res.Status, err)
		}
	})
	run("subscribe", func(ctx context.Context, t *testing.T) {
		res, err := p.a.Subscribe(ctx, "reg")
		if err != nil || res.Status != 200 {
			t.Fatalf("%d, %v", res.Status, err)
		}
		if !strings.Contains(res.Notify.Body, p.aURI) {
			t.Errorf("NOTIFY without the identity:\n%s", res.Notify.Body)
		}
	})
	run("refresh", func(ctx context.Context, t *testing.T) {
		res, err := p.a.Reregister(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if res.Challenged || res.SPIs != p.ra.SPIs || res.Ports != p.ra.Ports {
			t.Errorf("got %+v, want the set of %+v", res, p.ra)
		}
		f.mustMessage(ctx, t, p.b, p.aURI)
	})
	run("re-register", func(ctx context.Context, t *testing.T) { f.renew(ctx, t, p) })
	run("de-register", func(ctx context.Context, t *testing.T) {
		for _, u := range []*ue.UE{p.a, p.b} {
			if err := u.Deregister(ctx); err != nil {
				t.Error(err)
			}
		}
		if status, err := f.core.SendMessage(ctx, p.aURI, "anybody there?"); err == nil {
			t.Errorf("a MESSAGE to a phone that has left was answered %d", status)
		}
	})
	checkPhones(t, p.a, p.b)
}

// renew re-authenticates a phone and checks TS 33.203 §7.4: new SPIs and client ports, the server ports stay; requests
// to the phone take the old set until it has used the new one (T10); the old one goes after its time.
func (f *fixture) renew(ctx context.Context, t *testing.T, p *pair) {
	t.Helper()
	normal := f.core.Behaviour()
	defer f.core.SetBehaviour(normal)
	challenging := normal
	challenging.AlwaysChallenge = true
	f.core.SetBehaviour(challenging)
	before := p.a.Sets()
	res, err := p.a.Reregister(ctx)
	if err != nil {
		t.Fatal(err)
	}
	old := p.ra
	switch {
	case !res.Challenged:
		t.Fatal("no challenge")
	case res.Ports.US != old.Ports.US || res.Ports.PS != old.Ports.PS:
		t.Errorf("server ports changed: %v to %v", old.Ports, res.Ports)
	case res.Ports.UC == old.Ports.UC || res.Ports.PC == old.Ports.PC:
		t.Errorf("client ports stayed: %v", res.Ports)
	}
	for _, spi := range []ims.SPI{res.SPIs.UC, res.SPIs.US, res.SPIs.PC, res.SPIs.PS} {
		if slices.Contains([]ims.SPI{old.SPIs.UC, old.SPIs.US, old.SPIs.PC, old.SPIs.PS}, spi) {
			t.Errorf("SPI %s is in the old set too", spi)
		}
	}
	set := func(i ue.Incoming, err error) int {
		if err != nil {
			t.Fatal(err)
		}
		return i.Set
	}
	network := func(text string) (ue.Incoming, error) {
		if status, err := f.core.SendMessage(ctx, p.aURI, text); err != nil || status != 200 {
			return ue.Incoming{}, fmt.Errorf("MESSAGE of the network: %d, %w", status, err)
		}
		in := p.a.Received()
		return in[len(in)-1], nil
	}
	oldGen, newGen := before[len(before)-1].Generation, res.Set.Generation
	if got := set(network("before")); got != oldGen {
		t.Errorf("before the phone used the new set, the network's request came by set %d, want %d", got, oldGen)
	}
	f.mustMessage(ctx, t, p.a, p.bURI)
	if got := set(network("after")); got != newGen {
		t.Errorf("after the phone used the new set, the network's request came by set %d, want %d", got, newGen)
	}
	p.ra = res
}

// TestLife runs the life of two phones over every combination of transport and address family.
//
// Peers: A1.32, A2.01, B1.25, B2.03, C1.08, C2.04
func TestLife(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		f := start(t, fixtureConfig{ipv6: v6})
		for _, tr := range []ims.Transport{ims.UDP, ims.TCP} {
			name := fmt.Sprintf("%s over IPv4", tr)
			if v6 {
				name = fmt.Sprintf("%s over IPv6", tr)
			}
			t.Run(name, func(t *testing.T) {
				p := f.newPair(timed(t), t, func(c *ue.Config) { c.Transport, c.Offers = tr, f.offers(1) })
				f.life(t, p)
			})
		}
		t.Run("no SA left", func(t *testing.T) { f.wantNoSets(timed(t), t) })
	}
}

// TestConfigurations lives through settings of the daemon that change what is on the wire.
func TestConfigurations(t *testing.T) {
	core4 := netip.AddrPortFrom(lab.PlanOf(false).Core, lab.PortCore)
	for _, tt := range []struct {
		name string
		cfg  fixtureConfig
	}{
		{"Security-Server with the whole list", fixtureConfig{daemon: lab.DaemonOptions{SecurityServer: "list"}}},
		{"TCP towards the core", fixtureConfig{daemon: lab.DaemonOptions{MwTransport: "tcp"}}},
		{"TCP from the core", fixtureConfig{core: core.Behaviour{TCP: true}}},
		{"one worker", fixtureConfig{daemon: lab.DaemonOptions{Workers: 1}}},
		{"five workers", fixtureConfig{daemon: lab.DaemonOptions{Workers: 5}}},
		{"IPv6 phones, IPv4 core", fixtureConfig{ipv6: true, coreAddr: core4, daemon: lab.DaemonOptions{NextHops: []string{core4.String()}}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := start(t, tt.cfg)
			f.life(t, f.newPair(timed(t), t, func(c *ue.Config) { c.Offers = f.offers(3) }))
		})
	}
}

// TestLargeDatagrams has phones that send everything by UDP, whatever its size: ESP packets are fragmented.
//
// Peers: D1.10
func TestLargeDatagrams(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		f := start(t, fixtureConfig{ipv6: v6})
		t.Run(fmt.Sprintf("ipv6 %t", v6), func(t *testing.T) {
			p := f.newPair(timed(t), t, func(c *ue.Config) {
				c.Offers, c.Quirks = f.offers(2), ue.Quirks{LargeUDP: true}
			})
			f.life(t, p)
			if s := f.capture.Stats(); s.ESPFragments == 0 {
				t.Error("no ESP packet was fragmented")
			}
		})
		t.Run("no SA left", func(t *testing.T) { f.wantNoSets(timed(t), t) })
	}
}

// offers returns the n strongest suites.
func (f *fixture) offers(n int) []ims.Suite { return ims.Suites()[:n] }

// TestSuites lives through each algorithm pair over both transports and address families, and has the capture decrypted
// by an independent program.
//
// Peers: A1.29a, A4.08, C1.07b, C2.15
func TestSuites(t *testing.T) {
	both := []ims.Transport{ims.UDP, ims.TCP}
	for k, family := range []struct {
		name string
		v6   bool
	}{{"IPv4", false}, {"IPv6", true}} {
		transports := both
		if slowMachine() {
			transports = both[k : k+1] // each once
		}
		file := filepath.Join(t.TempDir(), "suites.pcap")
		f := start(t, fixtureConfig{ipv6: family.v6, capture: file, subs: 2 * len(ims.Suites()) * len(transports)})
		spis := map[ims.Suite][]ims.SPI{}
		for _, s := range ims.Suites() {
			for i, tr := range transports {
				t.Run(fmt.Sprintf("%s over %s and %s", s, tr, family.name), func(t *testing.T) {
					ctx := timed(t)
					p := f.newPair(ctx, t, func(c *ue.Config) { c.Offers, c.Transport = []ims.Suite{s}, tr })
					for _, r := range []ue.Result{p.ra, p.rb} {
						if r.Suite != s {
							t.Errorf("agreed on %s", r.Suite)
						}
						f.noteSAs(t, r)
						spis[s] = append(spis[s], r.SPIs.UC, r.SPIs.US, r.SPIs.PC, r.SPIs.PS)
					}
					if status, err := p.a.Message(ctx, p.bURI, "suite "+s.String()); err != nil || status != 200 {
						t.Errorf("MESSAGE: %d, %v", status, err)
					}
					f.life(t, p)
					// Two registrations and one re-authentication in each life.
					want := float64(3 * (i + 1))
					if got := f.metric(ctx, t, "secagree_selected_total", fmt.Sprintf("alg=%q", s.Alg), fmt.Sprintf("ealg=%q", s.Enc)); got != want {
						t.Errorf("the daemon counts %g agreements, want %g", got, want)
					}
				})
			}
		}
		t.Run("no SA left over "+family.name, func(t *testing.T) { f.wantNoSets(timed(t), t) })
		t.Run("tshark over "+family.name, func(t *testing.T) { f.decrypt(t, file, spis) })
	}
}

// noteSAs writes the SAs of a registration into the table beside the capture.
func (f *fixture) noteSAs(t *testing.T, r ue.Result) {
	t.Helper()
	for _, s := range r.Set.SAs {
		if err := f.capture.EspSA(lab.SA{Src: s.Src.Addr(), Dst: s.Dst.Addr(), SPI: s.SPI, Keys: s.Keys}); err != nil {
			t.Fatal(err)
		}
	}
}

// decrypt has tshark read the capture with the SAs it belongs to, and expects SIP inside the packets of every suite. It
// is required only where both ends are in user space: the virtual machine with kernel ESP has no tshark.
func (f *fixture) decrypt(t *testing.T, file string, spis map[ims.Suite][]ims.SPI) {
	shark, err := exec.LookPath("tshark")
	switch {
	case err != nil && (backend() == "xfrm" || setting(envUE, ue.Userspace) == ue.XFRM):
		t.Skipf("no tshark here: %v", err)
	case err != nil:
		skipOrFail(t, "no tshark here: %v", err)
	}
	if err := f.capture.Flush(); err != nil {
		t.Fatal(err)
	}
	table, err := os.ReadFile(file + ".esp_sa") //nolint:gosec // the test's own file
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"-r", file, "-o", "esp.enable_encryption_decode:TRUE", "-o", "esp.enable_authentication_check:TRUE"}
	for row := range strings.Lines(string(table)) {
		args = append(args, "-o", "uat:esp_sa:"+strings.TrimSpace(row))
	}
	for _, p := range slices.Concat(lab.ServerPorts, lab.ClientPorts) {
		args = append(args, "-d", fmt.Sprintf("tcp.port==%d,sip", p), "-d", fmt.Sprintf("udp.port==%d,sip", p))
	}
	args = append(args, "-Y", "esp && sip", "-T", "fields", "-e", "esp.spi", "-e", "esp.icv_good", "-e", "sip.CSeq")
	cmd := exec.CommandContext(timed(t), shark, args...) //nolint:gosec // found in PATH
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("tshark: %v: %s", err, stderr.String())
	}
	found := map[ims.SPI]int{}
	for line := range strings.Lines(string(out)) {
		fields := strings.Split(strings.TrimRight(line, "\n"), "\t")
		spi, err := strconv.ParseUint(strings.TrimPrefix(fields[0], "0x"), 16, 32)
		if err != nil || len(fields) < 3 {
			t.Fatalf("tshark printed %q", line)
		}
		// Wireshark does not know AES-GMAC: it takes the IV for the beginning of the payload, and may find anything there.
		gmac := slices.Contains(spis[ims.Suite{Alg: ims.AlgAESGMAC, Enc: ims.EncNull}], ims.SPI(spi))
		if !gmac && fields[1] != "1" && fields[1] != "True" {
			t.Errorf("SPI %#x: the ICV is not good: %q", spi, line)
		}
		found[ims.SPI(spi)]++
	}
	for suite, list := range spis {
		n := 0
		for _, spi := range list {
			n += found[spi]
		}
		t.Logf("%s: SIP in %d packets", suite, n)
		if suite.Alg != ims.AlgAESGMAC && n == 0 {
			t.Errorf("%s: no SIP in any packet", suite)
		}
	}
}
