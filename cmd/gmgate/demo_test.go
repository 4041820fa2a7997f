package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/gmgate/gmgate/control/admin"
)

// TestMain lets the test binary be the daemon that the demo starts: `binary run -c FILE`.
func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "run" {
		main()
	}
	os.Exit(m.Run())
}

func TestDemoFlags(t *testing.T) {
	for _, tt := range []struct {
		args string
		code int
		text string // in the message
	}{
		{"-h", 0, "-backend"},
		{"--ues 1", 2, "-ues 1"},
		{"--ues 1001", 2, "-ues 1001"},
		{"--backend ah", 2, `-backend "ah"`},
		{"--ue-esp auto", 2, `-ue-esp "auto"`},
		{"--transport sctp", 2, `-transport "sctp"`},
		{"--ip 5", 2, `-ip "5"`},
		{"--alg null=null", 2, "not legal"},
		{"--workers 0", 2, "-workers 0"},
		{"--story life", 2, `-story "life"`},
		{"--story lifecycle --ues 3", 2, "-ues is for the other stories"},
		{"--story attack --ues 3", 2, "want 4 to 200"},
		{"--story attack --ues 201", 2, "-ues 201"},
		{"--story attack --rate 0", 2, "-rate 0"},
		{"--story attack --rate 200001", 2, "-rate 200001"},
		{"--rate 1000", 2, "the story attack"},
		{"--guard ebpf", 2, `-guard "ebpf"`},
		{"--ipv6=maybe", 2, "-ipv6"},
		{"--colour", 2, "-colour"},
		{"now", 2, `"now"`},
	} {
		var stdout, stderr bytes.Buffer
		if code := demoMain(t.Context(), strings.Fields(tt.args), &stdout, &stderr); code != tt.code {
			t.Errorf("%s: exit status %d, want %d", tt.args, code, tt.code)
		}
		if !strings.Contains(stderr.String(), tt.text) || stdout.Len() > 0 {
			t.Errorf("%s: printed %q, want %q in it", tt.args, stderr.String(), tt.text)
		}
	}
}

// requireDemo skips a test that needs namespaces, or fails it where that is demanded.
func requireDemo(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("REQUIRE_KERNEL_TESTS") == "1" {
		t.Fatal("network namespaces need root")
	}
	t.Skip("network namespaces need root")
}

func leftovers(t *testing.T) []string {
	t.Helper()
	names, err := filepath.Glob("/run/netns/gmdemo-" + strconv.Itoa(os.Getpid()) + "*")
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// Peers: C1.06b, C2.18
func TestDemo(t *testing.T) {
	requireDemo(t)
	file := filepath.Join(t.TempDir(), "gm.pcap")
	for _, args := range []string{"--ues 3 --capture " + file, "--ues 10 --ip 6 --transport tcp --alg hmac-sha-1-96=des-ede3-cbc --workers 1"} {
		t.Run(args, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			var stdout, stderr bytes.Buffer
			code := demoMain(ctx, append(strings.Fields(args), "--backend", "userspace"), &stdout, &stderr)
			out := stdout.String()
			if code != 0 || !strings.Contains(out, "all good") || strings.Contains(out, "✗") {
				t.Errorf("exit status %d:\n%s%s", code, out, stderr.String())
			}
			for _, sm := range []string{"SM1 ", "SM2/3 ", "SM4/5 ", "SM6 ", "SM7 ", "SM8/9 ", "SM10/11 ", "SM12 "} {
				if strings.Count(out, "\n  "+sm) != 1 {
					t.Errorf("the ladder has no %s", sm)
				}
			}
			if !strings.Contains(out, "\n    guard (") && !strings.Contains(out, "\n    no guard:") {
				t.Errorf("says nothing about the guard:\n%s", out)
			}
			for l := range strings.Lines(out) {
				if n := utf8.RuneCountInString(strings.TrimSuffix(l, "\n")); n > demoWidth && !strings.Contains(l, file) {
					t.Errorf("%d columns: %s", n, l)
				}
			}
			if left := leftovers(t); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
	for name, least := range map[string]int64{file: 10_000, file + ".esp_sa": 1000} {
		if info, err := os.Stat(name); err != nil || info.Size() < least {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
}

func TestDemoInterrupted(t *testing.T) {
	requireDemo(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second) // in the middle, as Ctrl-C
	defer cancel()
	var stdout, stderr bytes.Buffer
	if code := demoMain(ctx, []string{"--ues", "2", "--backend", "userspace"}, &stdout, &stderr); code != 1 {
		t.Errorf("exit status %d, want 1", code)
	}
	if !strings.Contains(stdout.String(), "interrupted") {
		t.Errorf("printed:\n%s", stdout.String())
	}
	if left := leftovers(t); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestDemoLifecycle lets the story of a life be told, and looks for its skeleton: every step in order, and the SA sets after
// each of them.
func TestDemoLifecycle(t *testing.T) {
	requireDemo(t)
	backend := cmp.Or(os.Getenv("GMGATE_E2E_BACKEND"), "userspace") // the guest has the kernel's
	for _, args := range []string{"", "--ipv6 --transport tcp --alg hmac-sha-1-96=aes-cbc"} {
		t.Run(args, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
			defer cancel()
			var stdout, stderr bytes.Buffer
			code := demoMain(ctx, append(strings.Fields(args), "--story", "lifecycle", "--backend", backend), &stdout, &stderr)
			out := stdout.String()
			if code != 0 || !strings.Contains(out, "all good") || strings.Contains(out, "✗") {
				t.Fatalf("exit status %d:\n%s%s", code, out, stderr.String())
			}
			rest := out
			for _, step := range []string{
				"Registration", "✓ phone 1 registers", "✓ one set, in use at once", "established  current",
				"Calls", "✓ phone 1 → phone 2", "✓ phone 2 → phone 1", "✓ the same set", "established  current",
				"Re-registration", "✓ the new set waits", "old          current", "established  waiting", "made over set",
				"✓ phone 1 uses the new set", "✓ the old set goes", "✓ one set again", "established  current",
				"Restart of gmgate", "✓ gmgate is stopped", "✓ gmgate starts", "✓ the same set", "established  current", "✓ phone 1 → phone 2",
				"Crash of gmgate", "✓ gmgate is killed", "✓ gmgate starts", "✓ the same set", "established  current",
				"Calls after the crash", "✓ network → phone 1", "✓ still the same set", "established  current",
				"De-registration by the network", "✓ the core ends it", "✓ its set is ending", "established  ending",
				"✓ phone 1 is refused", "✓ its SAs go", "✓ gmgate has forgotten it", "✓ phone 2 leaves",
				"Verification", "✓ the tap on the Gm link", "✓ gmgate stops",
			} {
				_, after, found := strings.Cut(rest, step)
				if !found {
					t.Fatalf("there is no %q, or it is not where it belongs:\n%s", step, out)
				}
				rest = after
			}
			for _, clause := range []string{"TS 33.203 §7.2", "TS 33.203 §7.4", "RFC 4303 §3.3.3", "TS 24.229 §5.2.5.2", "RFC 3680"} {
				if !strings.Contains(out, clause) {
					t.Errorf("nothing is by %s", clause)
				}
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

// The story tells on itself: what is not as told ends it with status 1 and a line that says what.
func TestStoryChecks(t *testing.T) {
	set := func(phase, role string, seq uint32) admin.Set {
		return admin.Set{
			ID: "0-1", Phase: phase, Role: role, Algorithms: "null=aes-gcm", SPIs: admin.SPIs{UC: 1, US: 2, PC: 3, PS: 4},
			Ports: admin.Ports{UC: 5, US: 6, PC: 7, PS: 8}, Sequences: &admin.Sequences{UC: seq, US: seq, PC: seq, PS: seq},
		}
	}
	ueWith := func(change func(*admin.Set)) admin.UE {
		s := set("established", admin.RoleCurrent, 10)
		if change != nil {
			change(&s)
		}
		return admin.UE{State: "registered", Sets: []admin.Set{s}}
	}
	story := &life{before: ueWith(nil)}
	for name, tt := range map[string]struct {
		now  admin.UE
		text string // in the error; empty: none
	}{
		"as before":       {ueWith(nil), ""},
		"went on":         {ueWith(func(s *admin.Set) { s.Sequences = &admin.Sequences{UC: 11, US: 10} }), ""},
		"another SPI":     {ueWith(func(s *admin.Set) { s.SPIs.PC++ }), "changed from"},
		"another port":    {ueWith(func(s *admin.Set) { s.Ports.UC++ }), "changed from"},
		"another set":     {ueWith(func(s *admin.Set) { s.ID = "0-2" }), "changed from"},
		"old":             {ueWith(func(s *admin.Set) { s.Phase = "old" }), "was established and is old"},
		"not installed":   {ueWith(func(s *admin.Set) { s.Sequences = nil }), "does not hold"},
		"numbers again":   {ueWith(func(s *admin.Set) { s.Sequences = &admin.Sequences{UC: 10, US: 9} }), "twice"},
		"no set":          {admin.UE{State: "registered"}, "no set, there were established (current)"},
		"two sets":        {admin.UE{Sets: []admin.Set{set("old", "x", 1), set("established", "y", 1)}}, "old (x), established (y)"},
		"not registered":  {admin.UE{State: "deregistered", Sets: ueWith(nil).Sets}, "deregistered with"},
		"waiting":         {ueWith(func(s *admin.Set) { s.Role = admin.RoleWaiting }), "want one set"},
		"a temporary one": {ueWith(func(s *admin.Set) { s.Phase = "temporary" }), "want one set"},
	} {
		err := errors.Join(one(tt.now), story.same(tt.now))
		if tt.text == "" && err != nil || tt.text != "" && (err == nil || !strings.Contains(err.Error(), tt.text)) {
			t.Errorf("%s: %v, want %q", name, err, tt.text)
		}
	}
}
