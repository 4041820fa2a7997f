package main

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/gmgate/gmgate/dataplane/guard"
)

// bpfCommand runs `gmgate bpf`.
func bpfCommand(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = command(t.Context(), append([]string{"bpf"}, args...), &out, &errs)
	return code, out.String(), errs.String()
}

func TestBPFUsage(t *testing.T) {
	for _, tt := range []struct {
		args []string
		code int
		want string
	}{
		{nil, 2, "usage: gmgate bpf"},
		{[]string{"help"}, 0, "unload"},
		{[]string{"load"}, 2, `no command "load"`},
		{[]string{"show", "-pin", "/sys/fs/bpf/none", "more"}, 2, `unexpected argument "more"`},
		{[]string{"show", "-nosuchflag"}, 2, "nosuchflag"},
		{[]string{"show", "-c", "/nonexistent.yaml"}, 1, "no such file"},
		{[]string{"show", "-pin", "/sys/fs/bpf/none"}, 0, "nothing in /sys/fs/bpf/none"},
		{[]string{"unload", "-pin", "/sys/fs/bpf/none"}, 0, "nothing in /sys/fs/bpf/none"},
	} {
		code, stdout, stderr := bpfCommand(t, tt.args...)
		if code != tt.code || !strings.Contains(stdout+stderr, tt.want) {
			t.Errorf("bpf %v: %d, %q %q; want %d and %q", tt.args, code, stdout, stderr, tt.code, tt.want)
		}
	}
}

// A guard that a process has left is shown and taken away; one that is in use stays.
func TestBPFUnload(t *testing.T) {
	pin := fmt.Sprintf("/sys/fs/bpf/gmgate-test-%d", os.Getpid())
	t.Cleanup(func() { _ = os.RemoveAll(pin) })
	g, err := guard.Open(guard.Config{
		Local: []netip.Addr{netip.MustParseAddr("192.0.2.5")}, ClearPort: 5060, Protected: []uint16{6100},
		SAs: 16, UEs: 16, Sources: 16, Pin: pin, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		if os.Getenv("REQUIRE_KERNEL_TESTS") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	defer g.Detach() //nolint:errcheck // once more is nothing
	if g.Pinned() != pin {
		t.Fatalf("pinned at %q, want %q", g.Pinned(), pin)
	}
	if code, _, stderr := bpfCommand(t, "unload", "-pin", pin); code != 1 || !strings.Contains(stderr, "hint: stop gmgate first") {
		t.Errorf("unload while it is in use: %d, %q", code, stderr)
	}
	if err := g.Detach(); err != nil {
		t.Fatal(err)
	}
	if code, stdout, stderr := bpfCommand(t, "show", "-pin", pin); code != 0 || !strings.Contains(stdout, "sas") {
		t.Errorf("show: %d, %q %q", code, stdout, stderr)
	}
	if code, stdout, stderr := bpfCommand(t, "unload", "-pin", pin); code != 0 || !strings.Contains(stdout, "unloaded "+pin) {
		t.Errorf("unload: %d, %q %q", code, stdout, stderr)
	}
	if left := guard.Pinned(pin); left != nil {
		t.Errorf("left: %q", left)
	}
	if code, stdout, _ := bpfCommand(t, "show", "-pin", pin); code != 0 || !strings.HasPrefix(stdout, "nothing in ") {
		t.Errorf("show afterwards: %d, %q", code, stdout)
	}
}
