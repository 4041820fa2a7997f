package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/gmgate/gmgate/bench/attack"
	"github.com/gmgate/gmgate/bench/lab"
	"github.com/gmgate/gmgate/control/admin"
	"github.com/gmgate/gmgate/control/config"
)

// TestDemoAttack lets the story of an attack be told, and looks for its skeleton.
func TestDemoAttack(t *testing.T) {
	requireDemo(t)
	backend := cmp.Or(os.Getenv("GMGATE_E2E_BACKEND"), "userspace") // the guest has the kernel's
	for _, args := range []string{"--ues 6", "--ues 4 --ip 6 --transport tcp --workers 1"} {
		t.Run(args, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
			defer cancel()
			var stdout, stderr bytes.Buffer
			code := demoMain(ctx, append(strings.Fields(args), "--story", "attack", "--backend", backend), &stdout, &stderr)
			out := stdout.String()
			if code != 0 || !strings.Contains(out, "all good") || strings.Contains(out, "✗") {
				t.Fatalf("exit status %d:\n%s%s", code, out, stderr.String())
			}
			rest := out
			for _, step := range []string{
				"The attacker", "✓ The guard", "✓ Its strength", "Registration", "phones register", "✓ SAs in place",
				"A quiet time", "✓ everybody calls", "✓ the attacker has listened",
				"Unknown SPIs", "✓ ESP, unknown SPI", "✓ ESP in UDP, unknown SPI",
				"Cleartext on protected ports", "✓ clear UDP in the name of phones", "✓ clear UDP of strangers", "✓ clear TCP SYN",
				"REGISTER floods", "✓ REGISTERs of one source", "registered through the flood", "✓ REGISTERs of 4000 sources",
				"Replay", "✓ ESP replayed", "✓ ESP replayed from elsewhere", "Malformed packets", "✓ malformed, 14 kinds",
				"After the attacks", "✓ everybody can be called", "✓ what the floods began is gone", "✓ gmgate's memory",
				"Verification", "✓ the tap on the Gm link", "✓ core and phones", "✓ gmgate stops",
				"What was dropped where", "attack ", "at the core", "ESP, unknown SPI", "malformed", "messages sent, 0 lost",
			} {
				_, after, found := strings.Cut(rest, step)
				if !found {
					t.Fatalf("there is no %q, or it is not where it belongs:\n%s", step, out)
				}
				rest = after
			}
			for l := range strings.Lines(out) {
				if n := utf8.RuneCountInString(strings.TrimSuffix(l, "\n")); n > demoWidth {
					t.Errorf("%d columns: %s", n, l)
				}
			}
			if left := leftovers(t); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

// The story tells on itself: what the guard did not count, what reached the core, what ESP let through.
func TestAttackChecks(t *testing.T) {
	drops := func(reason string, n float64) map[string]float64 { return map[string]float64{reason: n} }
	sent := attack.Result{Sent: 1000}
	bad := func(*strike) error { return errors.New("bad") }
	clear := exactly("cleartext")
	for name, tt := range map[string]struct {
		strike strike
		with   string // in the error where there is a guard; empty: none
		alone  string // and where there is none
	}{
		"all":                   {strike{sent: sent, proof: clear, guard: drops("cleartext", 1000)}, "", ""},
		"all but what was lost": {strike{sent: sent, proof: clear, guard: drops("cleartext", 990), lost: 10}, "", ""},
		"others lost something": {strike{sent: sent, proof: clear, guard: drops("cleartext", 1000), lost: 10}, "", ""},
		"one too few":           {strike{sent: sent, proof: clear, guard: drops("cleartext", 999)}, "counts 999 packets as cleartext; 1000 were sent", ""},
		"too few with the lost": {strike{sent: sent, proof: clear, guard: drops("cleartext", 989), lost: 10}, "the link has lost 10", ""},
		"one too many":          {strike{sent: sent, proof: clear, guard: drops("cleartext", 1001)}, "counts 1001", ""},
		"for another reason":    {strike{sent: sent, proof: clear, guard: drops("malformed", 1000)}, "counts 0", ""},
		"nothing was sent":      {strike{}, "nothing was sent", "nothing was sent"},
		"reached the core":      {strike{sent: sent, arrived: 2}, "2 messages of the attacker", "2 messages of the attacker"},
		"may reach the core":    {strike{sent: sent, arrived: 2, lets: true}, "", ""},
		"always":                {strike{sent: sent, always: bad}, "bad", "bad"},
	} {
		for guarded, want := range map[bool]string{true: tt.with, false: tt.alone} {
			if err := tt.strike.check(guarded); want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
				t.Errorf("%s, guarded %t: %v, want %q", name, guarded, err, want)
			}
		}
	}
}

// What was counted between two looks goes to its place, and what was there before does not.
func TestStrikeTake(t *testing.T) {
	a := sight{got: 3, lost: 1, metrics: map[string]float64{
		`gmgate_bpf_packets_total{reason="unknown_spi",verdict="drop"}`: 5,
		`gmgate_esp_drops_total{reason="replay"}`:                       7,
	}}
	b := sight{got: 4, lost: 3, metrics: map[string]float64{
		`gmgate_bpf_packets_total{reason="unknown_spi",verdict="drop"}`: 105,
		`gmgate_bpf_packets_total{reason="cleartext",verdict="drop"}`:   2,
		`gmgate_bpf_packets_total{reason="esp",verdict="pass"}`:         1000,
		`gmgate_esp_drops_total{reason="replay"}`:                       7,
		`gmgate_xfrm_errors_total{counter="XfrmInNoStates"}`:            6,
		`gmgate_socket_drops_total{reason="runt"}`:                      8,
		`gmgate_sip_drops_total{reason="malformed"}`:                    1,
		`gmgate_sip_rejected_total{reason="malformed"}`:                 2,
		`gmgate_sip_rejected_total{reason="busy"}`:                      4,
	}}
	var r strike
	r.take(a, b)
	for name, tt := range map[string]struct{ got, want map[string]float64 }{
		"guard":  {r.guard, map[string]float64{"unknown_spi": 100, "cleartext": 2}},
		"ESP":    {r.esp, map[string]float64{"XfrmInNoStates": 6}},
		"socket": {r.socket, map[string]float64{"runt": 8}},
		"SIP":    {r.sip, map[string]float64{"malformed": 3, "busy": 4}},
	} {
		if diff := gocmp.Diff(tt.want, tt.got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	if r.arrived != 1 || r.lost != 2 {
		t.Errorf("%d arrived, %d lost, want 1 and 2", r.arrived, r.lost)
	}
	r.name, r.sent = "all of it", attack.Result{Sent: 120}
	want := []string{"all of it", "120", "102", "6", "8", "7", "1"}
	if got := dropTable([]strike{r}); len(got) != 2 || gocmp.Diff(want, got[1]) != "" || len(got[0]) != len(want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// A call that ends because the demo does is neither made nor lost.
func TestTrafficNote(t *testing.T) {
	var tr traffic
	ctx, cancel := context.WithCancel(t.Context())
	count := func(l *load) { l.calls++ }
	tr.note(ctx, "a", nil, count)
	before := tr.now()
	for range attackProblems + 2 {
		tr.note(ctx, "phone 1, call 2", errors.New("INVITE answered 503"), count)
	}
	tr.note(ctx, "b", nil, count)
	cancel()
	tr.note(ctx, "c", context.Canceled, count)
	tr.note(ctx, "d", nil, count)
	if got, want := tr.now().since(before), (load{calls: 1, lost: attackProblems + 2}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if err := tr.losses(); err == nil || strings.Count(err.Error(), "phone 1, call 2: INVITE answered 503") != attackProblems {
		t.Errorf("got %v", err)
	}
}

func TestParseStat(t *testing.T) {
	const tail = " S 1 2 3 4 5 6 7 8 9 10 150 50 13 14 15 16 17 18 19 20 300 22"
	for _, name := range []string{"(gmgate)", "(a) b)", "()"} {
		cpu, resident, err := parseStat([]byte("4711 " + name + tail + "\n"))
		if err != nil || cpu != 2*time.Second || resident != int64(300*os.Getpagesize()) {
			t.Errorf("%s: %s, %d, %v", name, cpu, resident, err)
		}
	}
	for _, bad := range []string{"", "4711 (gmgate) S 1 2", "4711 (x)" + strings.Replace(tail, " 150 ", " x ", 1)} {
		if _, _, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
	cpu, resident, err := processUse(os.Getpid())
	if err != nil || cpu < 0 || resident < 1<<20 {
		t.Errorf("this process: %s, %d octets, %v", cpu, resident, err)
	}
}

// The IPv6 phones of the demo are one source to the guard. What the story believes of its limits is what the configuration
// says.
func TestAttackOptions(t *testing.T) {
	for _, tt := range []struct {
		o    demoFlags
		want lab.GuardOptions
	}{
		{demoFlags{ip: "4", ues: demoAttackMost}, lab.GuardOptions{RegisterRate: guardRegisterRate, RegisterBurst: guardRegisterBurst}},
		{demoFlags{ip: "6", ues: demoAttackLeast}, lab.GuardOptions{RegisterRate: guardRegisterRate, RegisterBurst: guardRegisterBurst}},
		{demoFlags{ip: "6", ues: demoAttackMost}, lab.GuardOptions{RegisterRate: guardRegisterRate, RegisterBurst: 4 * demoAttackMost}},
	} {
		var d lab.DaemonOptions
		if attackOptions(&d, tt.o); d.Guard != tt.want || d.LogLevel != "info" {
			t.Errorf("%+v: %+v", tt.o, d)
		}
	}
	if g := config.Default().Guard; g.RegisterRate != guardRegisterRate || g.RegisterBurst != guardRegisterBurst {
		t.Errorf("the default is %d REGISTERs a second and %d at once, the story believes %d and %d",
			g.RegisterRate, g.RegisterBurst, guardRegisterRate, guardRegisterBurst)
	}
}

func TestGuardReport(t *testing.T) {
	m := map[string]float64{
		`gmgate_guard_info{hook="xdp",interface="gm0"}`:                 1,
		`gmgate_guard_info{hook="tcx",interface="gm0"}`:                 0,
		`gmgate_guard_info{hook="none",interface="gm1"}`:                1,
		`gmgate_bpf_packets_total{reason="unknown_spi",verdict="drop"}`: 5,
		`gmgate_bpf_packets_total{reason="cleartext",verdict="drop"}`:   70,
		`gmgate_bpf_packets_total{reason="malformed",verdict="drop"}`:   0,
		`gmgate_bpf_packets_total{reason="esp",verdict="pass"}`:         1000,
	}
	for name, tt := range map[string]struct {
		metrics map[string]float64
		want    string
	}{
		"with a guard": {m, "guard (xdp): 1000 packets passed, dropped: cleartext 70, unknown_spi 5\n"},
		"without":      {nil, "no guard: ESP backend, policies and SIP drop"},
		"quiet":        {map[string]float64{`gmgate_guard_info{hook="xdp-generic",interface="gm0"}`: 1}, "guard (xdp-generic): 0 packets passed, dropped: nothing\n"},
	} {
		var b bytes.Buffer
		d := &demo{c: newConsole(&b, true), talks: [][]string{{"1", "10.45.0.1", "12", "14"}}}
		d.guardSummary(tt.metrics)
		if out := b.String(); !strings.Contains(out, tt.want) || !strings.Contains(out, "ESP packets by UE") || !strings.Contains(out, "10.45.0.1") {
			t.Errorf("%s: printed %q, want %q in it", name, out, tt.want)
		}
	}
}

func TestESPPackets(t *testing.T) {
	in, out := espPackets(admin.UE{Sets: []admin.Set{
		{Sequences: &admin.Sequences{UC: 1, US: 20, PC: 300, PS: 4000}}, {}, {Sequences: &admin.Sequences{UC: 2, PS: 5}},
	}})
	if in != 4305 || out != 23 {
		t.Errorf("%d from it, %d to it", in, out)
	}
}
