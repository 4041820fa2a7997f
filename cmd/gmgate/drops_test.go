package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/gmgate/gmgate/control/admin"
)

func guardSample() admin.GuardStatus {
	return admin.GuardStatus{
		Mode: "xdp", Reason: "the driver of eth0 can do it", Pinned: "/sys/fs/bpf/gmgate/edge1",
		Verdicts: []admin.GuardVerdict{
			{Verdict: "pass", Reason: "known_spi", Packets: 1234567, Bytes: 987654321},
			{Verdict: "drop", Reason: "unknown_spi", Packets: 12, Bytes: 1824},
			{Verdict: "drop", Reason: "cleartext", Packets: 1, Bytes: 900},
		},
		Interfaces: []admin.GuardInterface{
			{Name: "eth0", Hook: "xdp", Attached: true}, {Name: "bond0\x1b", Hook: "xdp-generic", Detail: "another program is there"},
		},
		Maps: []admin.GuardMap{{Name: "spis", Entries: 4, Capacity: 65536}, {Name: "ues", Entries: 1, Capacity: 1}, {Name: "none"}},
		Ring: admin.GuardRing{FirstUses: 2, Samples: 13, Lost: 1},
	}
}

func TestFormatGuard(t *testing.T) {
	want := `guard    xdp
reason   the driver of eth0 can do it
pinned   /sys/fs/bpf/gmgate/edge1

VERDICT  REASON       PACKETS  OCTETS
pass     known_spi    1234567  987.7 MB
drop     unknown_spi  12       1.8 kB
drop     cleartext    1        900 B

INTERFACE  HOOK         ATTACHED  DETAIL
eth0       xdp          yes
bond0?     xdp-generic  no        another program is there

MAP   ENTRIES  CAPACITY  FULL
spis  4        65536     0.0%
ues   1        1         100.0%
none  0        0         -

ring     2 first packets of SA sets, 13 sampled drops, 1 lost
`
	g := guardSample()
	if diff := cmp.Diff(want, formatGuard(&g)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	want = "guard    off\n\nring     0 first packets of SA sets, 0 sampled drops, 0 lost\n"
	if diff := cmp.Diff(want, formatGuard(&admin.GuardStatus{Mode: "off"})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func dropSamples() []admin.GuardDrop {
	return []admin.GuardDrop{
		{
			Time: ueNow.Add(123456 * time.Microsecond), Reason: "unknown_spi", Interface: "eth0", Source: "10.45.0.9", Destination: "10.0.0.5",
			Protocol: "esp", SPI: 4294967295, Length: 152,
		},
		{Time: ueNow, Reason: "register_rate", Source: "[2001:db8::1]:5060", Destination: "[2001:db8::5]:5060", Protocol: "udp", Length: 900, Lost: 7},
		{Time: ueNow, Reason: "odd\x1b[2J\nline", Source: "10.45.0.9:1", Destination: "10.0.0.5:6100", Protocol: "tcp", Length: 40},
	}
}

// A line for each drop, whatever is in it: nothing of it drives the operator's terminal.
func TestFormatDrop(t *testing.T) {
	want := `2026-01-01 12:00:00.123  unknown_spi             10.45.0.9 -> 10.0.0.5  esp  SPI 4294967295  152 octets  on eth0
(7 drops are missing here: they were too many)
2026-01-01 12:00:00.000  register_rate           [2001:db8::1]:5060 -> [2001:db8::5]:5060  udp  900 octets
2026-01-01 12:00:00.000  odd?[2J?line            10.45.0.9:1 -> 10.0.0.5:6100  tcp  40 octets
`
	var b strings.Builder
	for _, d := range dropSamples() {
		b.WriteString(formatDrop(&d))
	}
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// wall is an admin.Guard that tells of three drops again and again.
type wall struct{ fail error }

func (w wall) Status() admin.GuardStatus { return guardSample() }

func (w wall) Follow(ctx context.Context, f func(admin.GuardDrop)) error {
	if w.fail != nil {
		return w.fail
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		for _, d := range dropSamples() {
			d.Lost = 0
			f(d)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// guardSocket serves a guard, nil for none, and returns the socket.
func guardSocket(t *testing.T, g admin.Guard) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "edge1.sock")
	l, err := admin.Listen(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(admin.NewServer(admin.Config{Guard: g, Logger: slog.New(slog.DiscardHandler)}).Serve(l))
	return socket
}

func TestDropsCommand(t *testing.T) {
	at, none, broken := guardSocket(t, wall{}), guardSocket(t, nil), guardSocket(t, wall{fail: errors.New("ring is closed")})
	for _, tt := range []struct {
		args string
		code int
		text string // on stdout for 0, else on stderr
	}{
		{"--socket " + at, 0, "drop     unknown_spi  12       1.8 kB"},
		{"--socket " + at + " --reason cleartext,port_zero", 0, "OCTETS\ndrop     cleartext  1        900 B\n\n"},
		{"--socket " + at + " --json", 0, `"reason": "unknown_spi"`},
		{"--socket " + at + " --json --reason port_zero", 0, `"verdicts": []`},
		{"--follow --count 1 --socket " + at, 0, "2026-01-01 12:00:00.123  unknown_spi  "},
		{"--follow --count 2 --reason register_rate --socket " + at, 0, "register_rate           [2001:db8::1]:5060 -> [2001:db8::5]:5060  udp"},
		{"--follow --count 3 --json --socket " + at, 0, `"spi":4294967295,"length":152}` + "\n"},
		{"--socket " + none, 1, "hint: "},
		{"--follow --socket " + none, 1, "without a guard"},
		{"--follow --socket " + broken, 1, "the guard has ended: ring is closed"},
		{"--socket " + at + ".absent", 1, "is gmgate running"},
		{"--follow --socket " + at + ".absent", 1, "is gmgate running"},
		{"-c " + at + ".yaml", 1, "--socket"},
		{"-h", 0, ""},
		{"everything", 2, `unexpected argument "everything"`},
		{"--count 3", 2, "-count is for --follow"},
		{"--follow --count -1", 2, "-count -1"},
		{"--reason cleartext,,malformed", 2, "a reason is empty"},
		{"--follow --reason unnown_spi", 2, `there is no reason "unnown_spi"; they are `},
		{"-x", 2, "-x"},
	} {
		var stdout, stderr bytes.Buffer
		code := command(t.Context(), append([]string{"drops"}, strings.Fields(tt.args)...), &stdout, &stderr)
		text := stdout.String()
		if code != 0 {
			text = stderr.String()
			if stdout.Len() > 0 {
				t.Errorf("%s: printed %q and failed", tt.args, stdout.String())
			}
		}
		if code != tt.code || !strings.Contains(text, tt.text) {
			t.Errorf("%s: %d, %q and %q; want %d, %q", tt.args, code, stdout.String(), stderr.String(), tt.code, tt.text)
		}
		if _, count, ok := strings.Cut(tt.args, "--count "); ok && code == 0 {
			if want := int(count[0] - '0'); strings.Count(text, "\n") != want {
				t.Errorf("%s: %q, want %d lines", tt.args, text, want)
			}
		}
		if strings.Contains(tt.args, "--json") {
			for dec := json.NewDecoder(&stdout); ; {
				var v any
				if err := dec.Decode(&v); errors.Is(err, io.EOF) {
					break
				} else if err != nil {
					t.Errorf("%s: %v", tt.args, err)
					break
				}
			}
		}
	}
}

// interrupted cancels a context at its first write, as an operator does.
type interrupted struct {
	printed bytes.Buffer
	cancel  func()
}

func (i *interrupted) Write(p []byte) (int, error) { i.cancel(); return i.printed.Write(p) }

// An interrupt is the way to end, no failure; a pipe that breaks is one.
func TestDropsInterrupted(t *testing.T) {
	socket := guardSocket(t, wall{})
	ctx, cancel := context.WithCancel(t.Context())
	out := &interrupted{cancel: cancel}
	var stderr bytes.Buffer
	if code := command(ctx, []string{"drops", "--follow", "--socket", socket}, out, &stderr); code != 0 || stderr.Len() > 0 || out.printed.Len() == 0 {
		t.Errorf("%d, %q, printed %q", code, stderr.String(), out.printed.String())
	}
	pipe, w := io.Pipe()
	_ = pipe.Close()
	if code := command(t.Context(), []string{"drops", "--follow", "--socket", socket}, w, &stderr); code != 1 ||
		!strings.Contains(stderr.String(), "closed pipe") {
		t.Errorf("%d, %q", code, stderr.String())
	}
}
