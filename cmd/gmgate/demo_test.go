package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
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
