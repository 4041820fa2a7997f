package xfrm

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// testBlock is how long the policies outlive the backends of newGuest.
const testBlock = 2 * time.Second

// newGuest returns a backend on the real kernel in a namespace of its own.
func newGuest(t *testing.T, ns *hostnet.NS) *Backend {
	t.Helper()
	return newGuestWith(t, ns, testConfig())
}

func newGuestWith(t *testing.T, ns *hostnet.NS, cfg Config) *Backend {
	t.Helper()
	cfg.NS, cfg.block = ns, testBlock
	cfg.Logger = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	b, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		c := testConn(t, ns)
		if left, err := c.states(b.owned); err != nil || len(left) != 0 {
			t.Errorf("after Close: states %v, %v", left, err)
		}
	})
	return b
}

// wantStates compares the kernel's count of states.
func wantStates(t *testing.T, b *Backend, want int) {
	t.Helper()
	if n, err := b.KernelCount(); err != nil || n != want {
		t.Errorf("KernelCount %d %v, want %d", n, err, want)
	}
}

// TestGuestSuites installs and removes every pair for both families and looks at what the kernel made of it.
//
// Peers: A1.07, B1.12, B1.14, B2.06
func TestGuestSuites(t *testing.T) {
	needESP(t)
	ns := newNS(t, "suites")
	b := newGuest(t, ns)
	algorithms := map[string][]string{
		"null=aes-gcm":               {"aead rfc4106(gcm(aes))", " 128"},
		"aes-gmac=null":              {"aead rfc4543(gcm(aes))", " 128"},
		"hmac-sha-1-96=aes-cbc":      {"auth-trunc hmac(sha1)", " 96", "enc cbc(aes)"},
		"hmac-md5-96=aes-cbc":        {"auth-trunc hmac(md5)", " 96", "enc cbc(aes)"},
		"hmac-sha-1-96=null":         {"auth-trunc hmac(sha1)", "enc ecb(cipher_null)"},
		"hmac-md5-96=null":           {"auth-trunc hmac(md5)", "enc ecb(cipher_null)"},
		"hmac-sha-1-96=des-ede3-cbc": {"auth-trunc hmac(sha1)", "enc cbc(des3_ede)"},
		"hmac-md5-96=des-ede3-cbc":   {"auth-trunc hmac(md5)", "enc cbc(des3_ede)"},
	}
	for i, suite := range ims.Suites() {
		for _, v6 := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s v6=%v", suite, v6), func(t *testing.T) {
				p := testSet(i, v6, suite)
				p.Hard = 4 * time.Minute
				if err := install(t, b, p); err != nil {
					t.Fatal(err)
				}
				wantStates(t, b, 4)
				shown := ipShow(t, ns, "-s", "xfrm", "state")
				wants := append([]string{
					"reqid 26477", "mode transport", fmt.Sprintf("output-mark 0x%x/0xffffffff", p.Label), "replay_window 256",
					"limit: soft (INF)(bytes), hard (INF)(bytes)", "limit: soft (INF)(packets), hard (INF)(packets)",
					"expire add: soft 239(sec), hard 240(sec)", "expire use: soft 0(sec), hard 0(sec)",
				}, algorithms[suite.String()]...)
				for _, s := range p.SAs() {
					wants = append(wants, fmt.Sprintf("sport %d dport %d", s.Src.Port(), s.Dst.Port()))
				}
				for _, want := range wants {
					if !strings.Contains(shown, want) {
						t.Errorf("ip xfrm state does not show %q", want)
					}
				}
				// Only inbound states have a mark and a window.
				if n := strings.Count(shown, "output-mark"); n != 2 {
					t.Errorf("%d states with mark, want 2", n)
				}
				if err := remove(t, b, p); err != nil {
					t.Error(err)
				}
				wantStates(t, b, 0)
			})
		}
	}
}

// TestGuestRollback: the third SA exists already; nothing of the set stays and the foreign one does.
//
// Peers: A1.05a
func TestGuestRollback(t *testing.T) {
	needESP(t)
	ns := newNS(t, "rollback")
	b := newGuest(t, ns)
	p := testSet(0, false, gcm)
	third := p.SAs()[2]
	ipBatch(t, ns, fmt.Sprintf("xfrm state add src %s dst %s proto esp spi %#x mode transport reqid 7 auth-trunc hmac(sha1) 0x%040x 96 enc ecb(cipher_null) \"\"",
		third.Src.Addr(), third.Dst.Addr(), uint32(third.SPI), 1))
	before := ipShow(t, ns, "xfrm", "state")
	err := install(t, b, p)
	if !errors.Is(err, unix.EEXIST) || !strings.Contains(err.Error(), third.SPI.String()) {
		t.Errorf("got %v, want EEXIST for %s", err, third.SPI)
	}
	wantStates(t, b, 1)
	if b.Count() != 0 {
		t.Errorf("Count %d", b.Count())
	}
	if err := remove(t, b, p); err != nil {
		t.Error(err)
	}
	if after := ipShow(t, ns, "xfrm", "state"); after != before {
		t.Error("the foreign state changed")
	}
	// An error from the crypto layer as well, half way through nothing.
	q := testSet(1, false, gcm)
	q.SPIs.PC = q.SPIs.PS // both inbound at our address: the second is a duplicate
	if err := install(t, b, q); !errors.Is(err, unix.EEXIST) {
		t.Errorf("got %v, want EEXIST", err)
	}
	wantStates(t, b, 1)
}

// TestGuestForeign: states and policies of other programs survive New, Close and the clean-up after a crash.
//
// Peers: A1.06, A1.08a, A1.22b, C2.03
func TestGuestForeign(t *testing.T) {
	needESP(t)
	ns := newNS(t, "foreign")
	ipBatch(t, ns,
		fmt.Sprintf("xfrm state add src 10.45.1.1 dst 10.45.0.5 proto esp spi 0x999 mode transport reqid 7 auth-trunc hmac(sha1) 0x%040x 96 enc ecb(cipher_null) \"\"", 1),
		"xfrm policy add dir in src 0.0.0.0/0 dst 10.45.0.5/32 dport 6100 priority 5000 tmpl proto esp mode transport reqid 7")
	states, policies := ipShow(t, ns, "xfrm", "state"), ipShow(t, ns, "xfrm", "policy")

	cfg := testConfig()
	cfg.NS = ns
	crashed, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		if err := install(t, crashed, testSet(i, i%2 == 0, gcm)); err != nil {
			t.Fatal(err)
		}
	}
	wantStates(t, crashed, 81)
	kill(t, crashed)

	b := newGuest(t, ns)
	wantStates(t, b, 81)
	if a, err := b.Adopt(t.Context(), nil); err != nil || a.Removed != 80 || !slices.Equal(a.Foreign, []ims.SPI{0x999}) {
		t.Errorf("Adopt: %+v, %v; want 80 removed and SPI 0x999 reported", a, err)
	}
	wantStates(t, b, 1)
	if n, err := b.PolicyCount(); err != nil || n != policiesOf+1 {
		t.Errorf("PolicyCount %d %v, want %d", n, err, policiesOf+1)
	}
	if err := install(t, b, testSet(0, false, gcm)); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if after := ipShow(t, ns, "xfrm", "state"); after != states {
		t.Error("the foreign state changed")
	}
	if n, err := testConn(t, ns).countPolicies(); err != nil || n != policiesOf+1 {
		t.Errorf("%d policies right after Close, %v; want %d", n, err, policiesOf+1)
	}
	awaitPolicies(t, testConn(t, ns), 1)
	if after := ipShow(t, ns, "xfrm", "policy"); after != policies {
		t.Errorf("foreign policies changed:\n%s\nbefore:\n%s", after, policies)
	}
}

// TestGuestInUse: a second daemon in the namespace is refused and disturbs nothing, also when the first was killed and
// is back.
//
// Peers: A1.08b
func TestGuestInUse(t *testing.T) {
	f := newField(t)
	p := testSet(0, false, gcm)
	f.addUE(t, p)
	states, policies := ipShow(t, f.gm, "xfrm", "state", "count"), ipShow(t, f.gm, "xfrm", "policy")
	cfg := testConfig()
	cfg.NS = f.gm
	for range 2 {
		if _, err := New(cfg); !errors.Is(err, ErrInUse) {
			t.Fatalf("New beside another: %v, want ErrInUse", err)
		}
	}
	if after := ipShow(t, f.gm, "xfrm", "state", "count"); after != states {
		t.Errorf("states %s, before %s", after, states)
	}
	if after := ipShow(t, f.gm, "xfrm", "policy"); after != policies {
		t.Errorf("policies changed:\n%s\nbefore:\n%s", after, policies)
	}
	f.exchange(t, p, "undisturbed")

	elsewhere := newGuest(t, newNS(t, "elsewhere")) // the lock is the namespace's
	wantStates(t, elsewhere, 0)
	if err := f.b.Close(); err != nil {
		t.Fatal(err)
	}
	kill(t, newGuest(t, f.gm))
	newGuest(t, f.gm)
	if _, err := New(cfg); !errors.Is(err, ErrInUse) {
		t.Errorf("New beside another: %v, want ErrInUse", err)
	}
}

// TestGuestMany installs and removes many sets that wait together.
func TestGuestMany(t *testing.T) {
	needESP(t)
	b := newGuest(t, newNS(t, "many"))
	const sets = 1000
	all := func(f func(p sa.Params, done func(error))) {
		t.Helper()
		var wg sync.WaitGroup
		for i := range sets {
			wg.Add(1)
			f(testSet(i, i%2 == 0, ims.Suites()[i%8]), func(err error) {
				if err != nil {
					t.Errorf("set %d: %v", i, err)
				}
				wg.Done()
			})
		}
		wg.Wait()
	}
	start := time.Now()
	all(b.Install)
	t.Logf("installed %d SAs in %v", b.Count(), time.Since(start).Round(time.Millisecond))
	wantStates(t, b, 4*sets)
	if b.Count() != 4*sets {
		t.Errorf("Count %d", b.Count())
	}
	all(b.Remove)
	wantStates(t, b, 0)
	if b.Count() != 0 {
		t.Errorf("Count %d", b.Count())
	}
}

// within waits until the kernel has n states, at most until the deadline.
func within(t *testing.T, b *Backend, n int, deadline time.Duration) time.Duration {
	t.Helper()
	start := time.Now()
	for {
		have, err := b.KernelCount()
		if err != nil {
			t.Fatal(err)
		}
		if have == n {
			return time.Since(start)
		}
		if time.Since(start) > deadline {
			t.Fatalf("%d states after %v, want %d", have, deadline, n)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// TestGuestExpiry: the kernel removes a set by itself when its hard limit passes, and Remove then is no error.
//
// Peers: A1.09a
func TestGuestExpiry(t *testing.T) {
	needESP(t)
	t.Parallel()
	b := newGuest(t, newNS(t, "expiry"))
	p, stays := testSet(0, false, gcm), testSet(1, true, gcm)
	p.Hard = 2 * time.Second
	if err := errors.Join(install(t, b, p), install(t, b, stays)); err != nil {
		t.Fatal(err)
	}
	wantStates(t, b, 8)
	t.Logf("gone after %v", within(t, b, 4, 20*time.Second).Round(100*time.Millisecond))
	if b.Count() != 8 {
		t.Errorf("Count %d, want 8 until Remove", b.Count())
	}
	if err := wait(t, func(done func(error)) { b.Extend(p, time.Minute, done) }); !errors.Is(err, unix.ESRCH) {
		t.Errorf("Extend of an expired set: %v, want ESRCH", err)
	}
	if err := errors.Join(remove(t, b, p), remove(t, b, stays)); err != nil {
		t.Error(err)
	}
	if b.Count() != 0 {
		t.Errorf("Count %d", b.Count())
	}
}

// TestGuestExtend moves hard limits in every direction. All limits differ by seconds, so that a slow machine does not
// turn one case into the other.
//
// Peers: A1.09a, B3.02
func TestGuestExtend(t *testing.T) {
	needESP(t)
	t.Parallel()
	for _, tc := range []struct {
		name        string
		first       time.Duration
		wait        time.Duration
		then        time.Duration
		stays, gone time.Duration // after Extend: still there at stays, gone at gone (0: never)
	}{
		{"longer", 5 * time.Second, 0, 15 * time.Second, 8 * time.Second, 30 * time.Second},
		{"longer after the soft limit", 6 * time.Second, 5100 * time.Millisecond, 10 * time.Second, 6 * time.Second, 25 * time.Second},
		{"shorter", 4 * time.Minute, 0, 3 * time.Second, time.Second, 15 * time.Second},
		{"a limit for a set without", 0, 0, 4 * time.Second, time.Second, 15 * time.Second},
		{"no limit any more", 4 * time.Second, time.Second, 0, 10 * time.Second, 0},
		{"short to long to short", 4 * time.Second, time.Second, 5 * time.Second, 3 * time.Second, 15 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			b := newGuest(t, newNS(t, "extend"))
			p := testSet(0, false, gcm)
			p.Hard = tc.first
			if err := install(t, b, p); err != nil {
				t.Fatal(err)
			}
			time.Sleep(tc.wait)
			p.Keys = ims.ESPKeys{} // not needed
			if err := wait(t, func(done func(error)) { b.Extend(p, tc.then, done) }); err != nil {
				t.Fatal(err)
			}
			time.Sleep(tc.stays)
			wantStates(t, b, 4)
			if tc.gone > 0 {
				t.Logf("gone after %v", (tc.stays + within(t, b, 0, tc.gone-tc.stays)).Round(100*time.Millisecond))
			}
		})
	}
}
