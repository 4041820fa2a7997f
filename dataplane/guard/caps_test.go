package guard

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// nobody is the user that the test runs as, without anything but the capabilities that it is given.
const nobody = 65534

// Environment of the process with few capabilities.
const capsPin = "GMGATE_TEST_CAPS_PIN"

// TestCapabilities finds out which capabilities guard and steering need: what scripts/systemd/gmgate.service gives.
func TestCapabilities(t *testing.T) {
	for _, tc := range []struct {
		name string
		caps []uintptr
		want []string // lines of TestCapableProcess
	}{
		{"none", nil, []string{"guard: unavailable", "steering: unavailable"}},
		{"NET_ADMIN", []uintptr{unix.CAP_NET_ADMIN}, []string{"guard: unavailable", "steering: unavailable"}},
		{"BPF", []uintptr{unix.CAP_BPF}, []string{"guard: unavailable", "steering: ok"}},
		// Without PERFMON the verifier allows no packet offsets that are computed.
		{"NET_ADMIN+BPF", []uintptr{unix.CAP_NET_ADMIN, unix.CAP_BPF}, []string{"guard: unavailable", "steering: ok"}},
		{"NET_ADMIN+BPF+PERFMON", []uintptr{unix.CAP_NET_ADMIN, unix.CAP_BPF, unix.CAP_PERFMON}, capable()},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRoad(t)
			binary, err := os.Open(os.Args[0])
			must(t, err)
			defer binary.Close() //nolint:errcheck // read only
			// By number: nobody may be able to walk to the file.
			cmd := exec.Command("/proc/self/fd/3", "-test.run", "^TestCapableProcess$", "-test.v")
			cmd.ExtraFiles = []*os.File{binary}
			pin := bpffs + "/gmgate/caps"
			cmd.Env = append(os.Environ(), capsPin+"="+pin)
			cmd.Dir = "/"
			cmd.SysProcAttr = &syscall.SysProcAttr{
				Credential: &syscall.Credential{Uid: nobody, Gid: nobody}, AmbientCaps: tc.caps,
			}
			var out []byte
			must(t, r.gate.Do(func() error {
				// The thread, and the process that it starts, have a bpffs of their own, as gmgate.service makes it.
				if err := errors.Join(
					unix.Unshare(unix.CLONE_NEWNS),
					unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
					unix.Mount("bpf", bpffs, "bpf", 0, "mode=0711"),
					os.Mkdir(bpffs+"/gmgate", 0o700),
					os.Chown(bpffs+"/gmgate", nobody, nobody),
				); err != nil {
					return err
				}
				var err error
				out, err = cmd.CombinedOutput()
				return err
			}))
			var got []string
			for line := range strings.Lines(string(out)) {
				if rest, ok := strings.CutPrefix(line, "told "); ok {
					got = append(got, strings.TrimSpace(rest))
				}
			}
			if strings.Join(got, "; ") != strings.Join(tc.want, "; ") {
				t.Errorf("got  %q\nwant %q\n%s", got, tc.want, out)
			}
		})
	}
}

// capable is what the process tells when it may do all.
func capable() []string {
	return []string{
		"guard: ok", "auto: xdp", "generic: xdp-generic", "tc: " + string(bestTC()), "clsact: tc", "closed: ok", "steering: ok",
	}
}

// TestCapableProcess is the process of TestCapabilities.
func TestCapableProcess(t *testing.T) {
	pin := os.Getenv(capsPin)
	if pin == "" {
		return
	}
	tell := func(what string, err error) {
		switch {
		case err == nil:
			fmt.Printf("told %s: ok\n", what)
		case errors.Is(err, ErrUnavailable):
			fmt.Printf("told %s: unavailable\n%v\n", what, err)
		default:
			fmt.Printf("told %s: %v\n", what, err)
		}
	}
	c := (&road{}).bareConfig()
	c.Pin = pin
	g, err := Open(c)
	tell("guard", err)
	if err == nil {
		for _, m := range []struct {
			name  string
			mode  Mode
			hooks []HookKind
		}{{"auto", Auto, nil}, {"generic", Generic, nil}, {"tc", TC, nil}, {"clsact", TC, []HookKind{HookTC}}} {
			if g == nil {
				c.Mode, c.hooks = m.mode, m.hooks
				g, err = Open(c)
				must(t, err)
			}
			must(t, g.Sync(sets(), nil))
			must(t, g.Attach())
			h := hookOf(t, g, "gm0")
			fmt.Printf("told %s: %s\n%s\n", m.name, h.Kind, h.Reason)
			if g.Pinned() != pin {
				t.Errorf("pinned at %q", g.Pinned())
			}
			must(t, g.Detach())
			g = nil
		}
		g, err = Open(c)
		must(t, err)
		tell("closed", g.Close())
	}
	s, err := OpenSteering(2, 2)
	tell("steering", err)
	if err == nil {
		must(t, s.Close())
	}
}
