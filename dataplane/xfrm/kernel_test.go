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
	if inGuest() && (len(s.Missing) != 0 || !s.V4 || !s.V6 || !s.largeWindow) {
		t.Errorf("guest kernel: %s", s.Reason)
	}
	if n, err := testConn(t, ns).countStates(); err != nil || n != 0 {
		t.Errorf("%d states left, %v", n, err)
	}
}

// TestNewWithoutESP: New fails with a typed error and leaves nothing behind.
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

// TestPolicies: the constant policies come and go, foreign ones stay, leftovers are taken over.
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
	if err := protect(c, constantPolicies(cfg.Local, append(ports, 6999), DefaultReqID), DefaultReqID, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	if n, err := c.countPolicies(); err != nil || n != policiesOf+6+len(foreign) {
		t.Errorf("%d policies, %v; want %d", n, err, policiesOf+6+len(foreign))
	}
	var text bytes.Buffer
	ps := constantPolicies(cfg.Local, ports, DefaultReqID)
	if err := protect(c, ps, DefaultReqID, slog.New(slog.NewTextHandler(&text, nil))); err != nil {
		t.Fatal(err)
	}
	if n, err := c.countPolicies(); err != nil || n != policiesOf+len(foreign) {
		t.Errorf("%d policies, %v; want %d", n, err, policiesOf+len(foreign))
	}
	for _, want := range []string{"adopted=18 removed=6", `foreign="out src 10.45.0.0/16 port any dst 0.0.0.0/0 port any" priority=10`} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("log lacks %s:\n%s", want, &text)
		}
	}
	if n := strings.Count(text.String(), "looked at before ours"); n != 1 {
		t.Errorf("%d warnings of foreign policies, want 1:\n%s", n, &text)
	}
	shown := ipShow(t, ns, "xfrm", "policy")
	for _, want := range []string{"proto esp", "reqid 26477", "mode transport", "dport 6100", "sport 6111", "dir fwd action block"} {
		if !strings.Contains(shown, want) {
			t.Errorf("ip xfrm policy does not show %q", want)
		}
	}
	var ids []policyID
	for i := range ps {
		ids = append(ids, ps[i].policyID)
	}
	for range 2 { // the second time they are gone already
		if err := unprotect(c, ids); err != nil {
			t.Error(err)
		}
	}
	if after := ipShow(t, ns, "xfrm", "policy"); after != before {
		t.Errorf("foreign policies changed:\n%s\nbefore:\n%s", after, before)
	}
}

// TestKernelErrors: refusals keep their errno, and a batch goes on after one.
func TestKernelErrors(t *testing.T) {
	c := testConn(t, newNS(t, "errors"))
	ps := constantPolicies([]netip.Addr{gm4}, []uint16{serverPS}, DefaultReqID)
	c.reset()
	c.deletePolicy(ps[0].policyID)
	c.updatePolicy(&ps[0])
	c.deleteState(stateID{gm4, 0x1000})
	c.deletePolicy(ps[0].policyID)
	results := c.run()
	for i, want := range []error{unix.ENOENT, nil, unix.ESRCH, nil} {
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
