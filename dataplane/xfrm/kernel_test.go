package xfrm

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// Tests in this file need CAP_NET_ADMIN but no ESP; those of guest_test.go and traffic_test.go need both, and run in
// the virtual machine of scripts/vm, which sets GMGATE_GUEST=1: there a lack is a failure.

// inGuest reports whether this is the virtual machine whose kernel has everything.
func inGuest() bool { return os.Getenv("GMGATE_GUEST") == "1" }

// lacking skips the test, or fails it where the capability is promised.
func lacking(t *testing.T, promised bool, format string, args ...any) {
	t.Helper()
	if promised {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

var namespaces atomic.Int32

// newNS makes a namespace of the test's own. It has a name so that `ip netns` can show it from outside.
func newNS(t *testing.T, role string) *hostnet.NS {
	t.Helper()
	ns, err := hostnet.CreateNamed(fmt.Sprintf("gmxfrm-%d-%d-%s", os.Getpid(), namespaces.Add(1), role))
	if err != nil {
		lacking(t, inGuest() || os.Getenv("REQUIRE_KERNEL_TESTS") == "1", "no network namespaces here: %v", err)
	}
	t.Cleanup(func() {
		if err := ns.Delete(); err != nil {
			t.Errorf("delete namespace: %v", err)
		}
	})
	return ns
}

// needESP skips tests on kernels without ESP.
func needESP(t *testing.T) {
	t.Helper()
	if s := Probe(nil); s.Err() != nil || !s.V4 || !s.V6 {
		lacking(t, inGuest(), "%s", s.Reason)
	}
}

// needIP skips tests where iproute2 is missing.
func needIP(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("ip"); err != nil {
		lacking(t, inGuest() || os.Getenv("REQUIRE_KERNEL_TESTS") == "1", "iproute2: %v", err)
	}
}

// ipBatch runs lines of the ip command in a namespace. Keys travel on standard input only.
func ipBatch(t *testing.T, ns *hostnet.NS, lines ...string) {
	t.Helper()
	needIP(t)
	err := ns.Do(func() error {
		cmd := exec.Command("ip", "-batch", "-")
		cmd.Stdin = strings.NewReader(strings.Join(lines, "\n") + "\n")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("ip -batch: %w: %s", err, out)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// ipShow returns the output of an ip command in a namespace.
func ipShow(t *testing.T, ns *hostnet.NS, args ...string) string {
	t.Helper()
	needIP(t)
	var out []byte
	err := ns.Do(func() (err error) {
		out, err = exec.Command("ip", args...).Output()
		return err
	})
	if err != nil {
		t.Fatalf("ip %v: %v", args, err)
	}
	return string(out)
}

// testConn opens a netlink connection of the test's own.
func testConn(t *testing.T, ns *hostnet.NS) *conn {
	t.Helper()
	s, err := openSocket(ns)
	if err != nil {
		lacking(t, inGuest() || os.Getenv("REQUIRE_KERNEL_TESTS") == "1", "%v", err)
	}
	t.Cleanup(func() { _ = s.close() })
	return newConn(s)
}

// TestProbe: whatever the kernel, the answer is conclusive and nothing stays behind.
//
// Peers: A4.13b, D2.07
func TestProbe(t *testing.T) {
	ns := newNS(t, "probe")
	s := Probe(ns)
	t.Logf("%s", s.Reason)
	if s.Reason == "" || strings.Contains(s.Reason, "\n") {
		t.Errorf("reason %q is not one line", s.Reason)
	}
	if s.Err() == nil {
		if len(s.Suites) == 0 || !s.V4 && !s.V6 {
			t.Errorf("no error and nothing supported: %+v", s)
		}
	} else {
		var k *KernelError
		if len(s.Suites) != 0 || s.V4 || s.V6 || !errors.As(s.Err(), &k) {
			t.Errorf("error %v but %+v", s.Err(), s)
		}
		if !errors.Is(s.Err(), ErrNoESP) && !errors.Is(s.Err(), ErrNoAlgorithm) && !errors.Is(s.Err(), ErrPermission) {
			t.Errorf("error %v has no type", s.Err())
		}
	}
	if inGuest() && (len(s.Missing) != 0 || !s.V4 || !s.V6 || !s.LargeWindow) {
		t.Errorf("guest kernel: %s", s.Reason)
	}
	if n, err := testConn(t, ns).countStates(); err != nil || n != 0 {
		t.Errorf("%d states left, %v", n, err)
	}
}

// TestNewWithoutESP: New fails with a typed error and leaves nothing behind.
//
// Peers: A4.13b
func TestNewWithoutESP(t *testing.T) {
	ns := newNS(t, "noesp")
	if s := Probe(ns); s.Err() == nil {
		t.Skip("this kernel has ESP")
	}
	cfg := testConfig()
	cfg.NS = ns
	_, err := New(cfg)
	if !errors.Is(err, ErrNoESP) && !errors.Is(err, ErrNoAlgorithm) && !errors.Is(err, ErrPermission) {
		t.Errorf("New: %v", err)
	}
	if _, ok := errors.AsType[*KernelError](err); !ok {
		t.Errorf("New: %v has no errno", err)
	}
	c := testConn(t, ns)
	if n, err := c.countPolicies(); err != nil || n != 0 {
		t.Errorf("%d policies left, %v", n, err)
	}
}

// TestLock: one at a time for a namespace and reqid.
func TestLock(t *testing.T) {
	ns, other := newNS(t, "lock"), newNS(t, "other")
	first, err := openLock(ns, DefaultReqID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := openLock(ns, DefaultReqID); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "another gmgate uses this namespace") {
		t.Errorf("second lock: %v, want ErrInUse", err)
	}
	locked := func(ns *hostnet.NS) (yes bool) {
		err := ns.Do(func() error {
			sockets, err := os.ReadFile("/proc/thread-self/net/unix")
			yes = Locked(string(sockets))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return yes
	}
	if !locked(ns) || locked(other) {
		t.Errorf("to be seen from outside: %t and %t, want it in the first namespace alone", locked(ns), locked(other))
	}
	for _, free := range []struct {
		ns    *hostnet.NS
		reqid int
	}{{other, DefaultReqID}, {ns, DefaultReqID + 1}} {
		l, err := openLock(free.ns, free.reqid)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := openLock(ns, DefaultReqID)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
}

// TestPolicies: the constant policies come and go, foreign ones stay, leftovers are taken over.
//
// Peers: A1.08a, B2.10
func TestPolicies(t *testing.T) {
	ns := newNS(t, "policies")
	c := testConn(t, ns)
	foreign := []string{
		// The very selector of one of ours, and one that is looked at first.
		"xfrm policy add dir in src 0.0.0.0/0 dst 10.45.0.5/32 dport 6100 priority 5000 action block",
		"xfrm policy add dir out src 10.45.0.0/16 dst 0.0.0.0/0 priority 10",
	}
	ipBatch(t, ns, foreign...)
	before := ipShow(t, ns, "xfrm", "policy")

	cfg := testConfig()
	ports := []uint16{serverPS, clientPC, otherPC}
	const block = 2 * time.Second
	earlier := constantPolicies(cfg.Local, append(ports, 6999), DefaultReqID)
	if err := protect(c, earlier, DefaultReqID, block, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	if n, err := c.countPolicies(); err != nil || n != policiesOf+6+len(foreign) {
		t.Errorf("%d policies, %v; want %d", n, err, policiesOf+6+len(foreign))
	}
	var text bytes.Buffer
	ps := constantPolicies(cfg.Local, ports, DefaultReqID)
	if err := protect(c, ps, DefaultReqID, block, slog.New(slog.NewTextHandler(&text, nil))); err != nil {
		t.Fatal(err)
	}
	awaitPolicies(t, c, policiesOf+len(foreign)) // the port that is gone blocks for a while
	for _, want := range []string{"count=20", "policies=6 at_most=2s", `foreign="out src 10.45.0.0/16 port any dst 0.0.0.0/0 port any" priority=10`} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("log lacks %s:\n%s", want, &text)
		}
	}
	if n := strings.Count(text.String(), "looked at before ours"); n != 1 {
		t.Errorf("%d warnings of foreign policies, want 1:\n%s", n, &text)
	}
	shown := ipShow(t, ns, "xfrm", "policy")
	for _, want := range []string{"proto esp", "reqid 26477", "mode transport", "dport 6100", "sport 6111", "dir fwd action block", " type 3 code 3", " type 1 code 4"} {
		if !strings.Contains(shown, want) {
			t.Errorf("ip xfrm policy does not show %q", want)
		}
	}
	if err := retire(c, ps, block); err != nil {
		t.Error(err)
	}
	shown = ipShow(t, ns, "xfrm", "policy")
	if n := strings.Count(shown, "action block"); n != policiesOf+1 || strings.Contains(shown, "tmpl") {
		t.Errorf("%d block policies, want %d and no templates:\n%s", n, policiesOf+1, shown)
	}
	// Turned back in time: now they stay.
	if err := protect(c, ps, DefaultReqID, block, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * block)
	if n, err := c.countPolicies(); err != nil || n != policiesOf+len(foreign) {
		t.Errorf("%d policies, %v; want %d: the expiry outlived the update", n, err, policiesOf+len(foreign))
	}
	if err := retire(c, ps, block); err != nil {
		t.Error(err)
	}
	awaitPolicies(t, c, len(foreign))
	if after := ipShow(t, ns, "xfrm", "policy"); after != before {
		t.Errorf("foreign policies changed:\n%s\nbefore:\n%s", after, before)
	}
}

// awaitPolicies waits until the kernel has removed policies by itself and n are left.
func awaitPolicies(t *testing.T, c *conn, n int) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		have, err := c.countPolicies()
		if err != nil {
			t.Fatal(err)
		}
		if have == n {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d policies left, want %d", have, n)
		}
	}
}

// TestKernelErrors: refusals keep their errno, and a batch goes on after one.
//
// Peers: A1.05a, B2.08, C2.03
func TestKernelErrors(t *testing.T) {
	c := testConn(t, newNS(t, "errors"))
	ps := constantPolicies([]netip.Addr{gm4}, []uint16{serverPS}, DefaultReqID)
	c.reset()
	c.deleteState(stateID{gm4, 0x1000})
	c.updatePolicy(&ps[0])
	bad := ps[0]
	bad.sel.Family = 99
	c.updatePolicy(&bad)
	c.updatePolicy(&ps[0])
	results := c.run()
	for i, want := range []error{unix.ESRCH, nil, unix.EINVAL, nil} {
		if !errors.Is(results[i], want) {
			t.Errorf("message %d: %v, want %v", i, results[i], want)
		}
	}
}

// TestNoNamespace: a namespace that cannot be entered is an error, not a crash.
func TestNoNamespace(t *testing.T) {
	ns, err := hostnet.Create()
	if err != nil {
		lacking(t, inGuest(), "no network namespaces here: %v", err)
	}
	if err := ns.Close(); err != nil {
		t.Fatal(err)
	}
	cfg := testConfig()
	cfg.NS = ns
	if _, err := New(cfg); err == nil {
		t.Error("New in a closed namespace succeeded")
	}
	if s := Probe(ns); s.Err() == nil || s.Reason == "" {
		t.Errorf("Probe in a closed namespace: %+v", s)
	}
}
