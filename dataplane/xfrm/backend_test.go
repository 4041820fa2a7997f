package xfrm

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink/nl"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestConfigRefused(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"no address", func(c *Config) { c.Local = nil }, "all needed"},
		{"no server port", func(c *Config) { c.ServerPorts = nil }, "all needed"},
		{"no client port", func(c *Config) { c.ClientPorts = nil }, "all needed"},
		{"port 0", func(c *Config) { c.ClientPorts = []uint16{0} }, "port 0"},
		{"link-local", func(c *Config) { c.Local = []netip.Addr{netip.MustParseAddr("fe80::1")} }, "fe80::1"},
		{"wildcard", func(c *Config) { c.Local = []netip.Addr{netip.IPv4Unspecified()} }, "0.0.0.0"},
		{"window", func(c *Config) { c.Window = maxWindow + 1 }, "4097"},
		{"reqid", func(c *Config) { c.ReqID = -1 }, "reqid"},
		{"queue", func(c *Config) { c.Queue = -1 }, "queue"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := testConfig()
			tc.change(&cfg)
			k := newFakeKernel()
			k.locked = true // whoever gets that far fails with ErrInUse
			_, err := newBackend(cfg, k)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want something about %q", err, tc.want)
			}
		})
	}
}

func TestInstallRemove(t *testing.T) {
	k := newFakeKernel()
	b := newFake(t, k, testConfig())
	if s, p := k.count(); s != 0 || p != policiesOf {
		t.Fatalf("after New: %d states and %d policies, want 0 and %d", s, p, policiesOf)
	}
	p := testSet(0, false, gcm)
	if err := install(t, b, p); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids(&p) {
		if h, ok := k.states[id]; !ok || h.reqid != DefaultReqID {
			t.Errorf("state %v: %v %v", id, h, ok)
		}
	}
	if err := install(t, b, p); !errors.Is(err, ErrDuplicate) {
		t.Errorf("second install: %v, want ErrDuplicate", err)
	}
	states, err := b.KernelCount()
	if err != nil || states != 4 || b.Count() != 4 {
		t.Errorf("KernelCount %d %v, Count %d, want 4", states, err, b.Count())
	}
	if n, err := b.PolicyCount(); err != nil || n != policiesOf {
		t.Errorf("PolicyCount %d %v, want %d", n, err, policiesOf)
	}
	if err := wait(t, func(done func(error)) { b.Extend(p, time.Minute, done) }); err != nil {
		t.Errorf("Extend: %v", err)
	}
	delete(k.states, ids(&p)[2]) // its limit passed
	if err := wait(t, func(done func(error)) { b.Extend(p, time.Minute, done) }); !errors.Is(err, unix.ESRCH) {
		t.Errorf("Extend with an SA gone: %v, want ESRCH", err)
	}
	for range 2 {
		if err := remove(t, b, p); err != nil {
			t.Errorf("Remove: %v", err)
		}
		if s, _ := k.count(); s != 0 || b.Count() != 0 {
			t.Errorf("after Remove: %d states, Count %d", s, b.Count())
		}
	}
	if err := wait(t, func(done func(error)) { b.Extend(p, time.Minute, done) }); !errors.Is(err, ErrUnknown) {
		t.Errorf("Extend of a removed set: %v, want ErrUnknown", err)
	}
}

// TestRollback: whichever SA the kernel refuses, nothing of the set stays, a foreign SA stays, and done gets the errno.
//
// Peers: B2.08
func TestRollback(t *testing.T) {
	for i := range 4 {
		t.Run(fmt.Sprintf("SA %d", i+1), func(t *testing.T) {
			k := newFakeKernel()
			b := newFake(t, k, testConfig())
			p := testSet(0, false, gcm)
			foreign := ids(&p)[i]
			k.states[foreign] = stateHead{id: foreign, reqid: 7, esp: true}
			err := install(t, b, p)
			var errno syscall.Errno
			if !errors.As(err, &errno) || errno != syscall.EEXIST {
				t.Errorf("got %v, want EEXIST", err)
			}
			if !strings.Contains(err.Error(), foreign.spi.String()) {
				t.Errorf("error %q does not name SPI %s", err, foreign.spi)
			}
			if len(k.states) != 1 || k.states[foreign].reqid != 7 || b.Count() != 0 {
				t.Errorf("states left: %v, Count %d", k.states, b.Count())
			}
			delete(k.states, foreign)
			if err := install(t, b, p); err != nil {
				t.Errorf("install after the obstacle is gone: %v", err)
			}
		})
	}
}

// TestLostAck: an SA whose acknowledgement got lost is removed if it is ours and left alone if it is not.
//
// Peers: B1.15
func TestLostAck(t *testing.T) {
	k := newFakeKernel()
	b := newFake(t, k, testConfig())
	p := testSet(0, false, gcm)
	lost := ids(&p)[1]
	k.mute = func(typ uint16, id stateID) bool { return typ == nl.XFRM_MSG_NEWSA && id == lost }
	if err := install(t, b, p); !errors.Is(err, ErrNoAck) {
		t.Errorf("got %v, want ErrNoAck", err)
	}
	if s, _ := k.count(); s != 0 {
		t.Errorf("%d states left", s)
	}
	k.states[lost] = stateHead{id: lost, reqid: 7, esp: true}
	if err := install(t, b, p); !errors.Is(err, ErrNoAck) {
		t.Errorf("got %v, want ErrNoAck", err)
	}
	if len(k.states) != 1 || k.states[lost].reqid != 7 {
		t.Errorf("states left: %v", k.states)
	}

	k.mute, k.states = nil, map[stateID]stateHead{}
	if err := install(t, b, p); err != nil {
		t.Fatal(err)
	}
	k.mute = func(typ uint16, id stateID) bool { return typ == nl.XFRM_MSG_DELSA && id == lost }
	if err := remove(t, b, p); !errors.Is(err, ErrNoAck) || b.Count() != 4 {
		t.Errorf("Remove: %v, Count %d; want ErrNoAck and 4", err, b.Count())
	}
	k.mute = nil
	if err := remove(t, b, p); err != nil || b.Count() != 0 || len(k.states) != 0 {
		t.Errorf("Remove again: %v, Count %d, states %v", err, b.Count(), k.states)
	}
}

// TestBatch: waiting requests share a system call, and a failure in the middle concerns its own set only.
//
// Peers: A1.34, B1.15
func TestBatch(t *testing.T) {
	k := newFakeKernel()
	b := newFake(t, k, testConfig())
	const sets = 40
	bad := testSet(7, false, gcm)
	foreign := ids(&bad)[2]
	k.states[foreign] = stateHead{id: foreign, reqid: 7, esp: true}

	before := len(k.sends)
	k.gate = make(chan struct{})
	var wg sync.WaitGroup
	errs := make([]error, sets)
	for i := range sets {
		wg.Add(1)
		b.Install(testSet(i, false, gcm), func(err error) { errs[i] = err; wg.Done() })
	}
	close(k.gate)
	wg.Wait()
	k.gate = nil
	for i, err := range errs {
		if (i == 7) != errors.Is(err, unix.EEXIST) || i != 7 && err != nil {
			t.Errorf("set %d: %v", i, err)
		}
	}
	if len(k.states) != 4*(sets-1)+1 || b.Count() != 4*(sets-1) {
		t.Errorf("%d states, Count %d", len(k.states), b.Count())
	}
	// The first send has what was there when the worker woke up; the others are full. One more undoes the failed set.
	if n := len(k.sends) - before; n > 2+(sets+maxSets-1)/maxSets {
		t.Errorf("%d system calls for %d sets", n, sets)
	}
	for _, types := range k.sends {
		if len(types) > maxBatch {
			t.Errorf("%d messages in one system call", len(types))
		}
	}
}

// TestOrder: requests for one SA are executed in the order of the calls even when they wait together.
func TestOrder(t *testing.T) {
	k := newFakeKernel()
	b := newFake(t, k, testConfig())
	old, fresh := testSet(0, false, gcm), testSet(0, false, gcm)
	fresh.ID, fresh.SPIs.PC, fresh.SPIs.PS = 99, 0x777, 0x778 // a phone after a reboot offers its old SPIs again
	if err := install(t, b, old); err != nil {
		t.Fatal(err)
	}
	k.gate = make(chan struct{})
	results := make(chan error, 4)
	b.Install(testSet(1, false, gcm), func(err error) { results <- err }) // keeps the worker busy
	b.Remove(old, func(err error) { results <- err })
	b.Install(fresh, func(err error) { results <- err })
	b.Remove(fresh, func(err error) { results <- err })
	close(k.gate)
	for range 4 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	k.gate = nil
	if len(k.states) != 4 {
		t.Errorf("%d states, want the 4 of the bystander", len(k.states))
	}
}

func TestQueueBound(t *testing.T) {
	k := newFakeKernel()
	cfg := testConfig()
	cfg.Queue = 3
	b := newFake(t, k, cfg)
	k.gate = make(chan struct{})
	results := make(chan error, 20)
	const calls = 10
	for i := range calls {
		b.Install(testSet(i, false, gcm), func(err error) { results <- err })
	}
	removed := make(chan error, 1)
	b.Remove(testSet(0, false, gcm), func(err error) { removed <- err }) // never refused
	close(k.gate)
	busy := 0
	for range calls {
		if err := <-results; errors.Is(err, ErrBusy) {
			busy++
		} else if err != nil {
			t.Error(err)
		}
	}
	// The worker holds one batch of at most three, three more wait.
	if busy < calls-6 || busy > calls-3 {
		t.Errorf("%d of %d calls refused", busy, calls)
	}
	if err := <-removed; err != nil {
		t.Error(err)
	}
}

func TestClose(t *testing.T) {
	k := newFakeKernel()
	foreign := stateID{gm4, 0x999}
	k.states[foreign] = stateHead{id: foreign, reqid: 7, esp: true}
	b, err := newBackend(testConfig(), k)
	if err != nil {
		t.Fatal(err)
	}
	p := testSet(0, false, gcm)
	if err := install(t, b, p); err != nil {
		t.Fatal(err)
	}
	k.gate = make(chan struct{})
	results := make(chan error, 40)
	const calls = 20
	for i := range calls {
		b.Install(testSet(i+1, false, gcm), func(err error) { results <- err })
	}
	removed := make(chan error, 1)
	b.Remove(p, func(err error) { removed <- err })
	closed := make(chan error, 1)
	go func() { closed <- b.Close() }()
	for closing := false; !closing; {
		b.mu.Lock()
		closing = b.closed
		b.mu.Unlock()
	}
	close(k.gate)
	late := 0
	for range calls {
		if err := <-results; errors.Is(err, ErrClosed) {
			late++
		} else if err != nil {
			t.Error(err)
		}
	}
	if late < calls-maxSets {
		t.Errorf("%d of %d requests cancelled", late, calls)
	}
	if err := errors.Join(<-removed, <-closed, b.Close()); err != nil {
		t.Error(err)
	}
	if s, n := k.count(); s != 1 || n != policiesOf || b.Count() != 0 {
		t.Errorf("after Close: %d states, %d policies, Count %d", s, n, b.Count())
	}
	if n := k.retired(); n != policiesOf {
		t.Errorf("after Close: %d policies block and expire, want %d", n, policiesOf)
	}
	// The policies before the states: what is on its way out is blocked rather than looking for its state.
	if last := k.sends[len(k.sends)-1]; last[0] != nl.XFRM_MSG_DELSA {
		t.Errorf("the last messages of Close are of type %d, want the removal of states", last[0])
	}
	if err := install(t, b, p); !errors.Is(err, ErrClosed) {
		t.Errorf("Install after Close: %v", err)
	}
	if err := remove(t, b, p); err != nil {
		t.Errorf("Remove after Close: %v", err)
	}
}

// TestLeftovers: a new start takes over or retires the policies of an earlier run; its states stay until Adopt removes
// those that nobody asks for, or until Close.
func TestLeftovers(t *testing.T) {
	k := newFakeKernel()
	foreign := stateID{gm4, 0x999}
	k.states[foreign] = stateHead{id: foreign, reqid: 7, esp: true}
	plain := constantPolicies([]netip.Addr{gm4}, []uint16{serverPS}, DefaultReqID)[0]
	plain.sel.User = 0
	k.policies[plain.policyID] = nl.XfrmUserpolicyInfo{Sel: plain.sel, Dir: plain.dir, Priority: 5000}

	cfg := testConfig()
	cfg.ServerPorts = []uint16{serverPS, 6999} // the earlier run had one more
	crashed, err := newBackend(cfg, k)
	if err != nil {
		t.Fatal(err)
	}
	if err := install(t, crashed, testSet(0, false, gcm)); err != nil {
		t.Fatal(err)
	}
	kill(t, crashed)

	var text strings.Builder
	cfg = testConfig()
	cfg.Logger = slog.New(slog.NewTextHandler(&text, nil))
	b := newFake(t, k, cfg)
	if s, _ := k.count(); s != 5 {
		t.Errorf("%d states after New, want all 5", s)
	}
	if a, err := b.Adopt(t.Context(), nil); err != nil || a.Removed != 4 {
		t.Errorf("Adopt: %+v, %v; want 4 removed", a, err)
	}
	verify := func() {
		t.Helper()
		if s, p := k.count(); s != 1 || p != policiesOf+6+1 {
			t.Errorf("%d states and %d policies, want 1 and %d", s, p, policiesOf+6+1)
		}
		if n := k.retired(); n != 6 {
			t.Errorf("%d policies block and expire, want those of the port that is no longer configured", n)
		}
	}
	verify()
	for _, want := range []string{
		"sas_removed=4 foreign_spis=1", fmt.Sprintf(`"took over policies of an earlier run" count=%d`, policiesOf),
		"stay blocked for a while\" policies=6 at_most=3m20s",
	} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("log lacks %q:\n%s", want, &text)
		}
	}

	// After a proper stop all block, and those that are still configured demand ESP again.
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if n := k.retired(); n != policiesOf+6 {
		t.Errorf("after Close %d policies block and expire, want %d", n, policiesOf+6)
	}
	b = newFake(t, k, cfg)
	verify()

	// Without Adopt the leftovers go with Close.
	if err := install(t, b, testSet(0, false, gcm)); err != nil {
		t.Fatal(err)
	}
	kill(t, b)
	b = newFake(t, k, cfg)
	if s, _ := k.count(); s != 5 || b.Count() != 0 {
		t.Errorf("%d states and Count %d, want 5 and 0", s, b.Count())
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if s, _ := k.count(); s != 1 {
		t.Errorf("%d states after Close, want the foreign one", s)
	}
}

// TestInUse: a second backend touches nothing, and gets its turn when the first has ended.
func TestInUse(t *testing.T) {
	k := newFakeKernel()
	b := newFake(t, k, testConfig())
	if err := install(t, b, testSet(0, false, gcm)); err != nil {
		t.Fatal(err)
	}
	sends := len(k.sends)
	if _, err := newBackend(testConfig(), k); !errors.Is(err, ErrInUse) {
		t.Errorf("second backend: %v, want ErrInUse", err)
	}
	if len(k.sends) != sends || len(k.states) != 4 {
		t.Errorf("the second backend sent %v", k.sends[sends:])
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	newFake(t, k, testConfig())
}

// TestNewUnlocks: whatever makes New fail, the lock is free afterwards, and released last.
func TestNewUnlocks(t *testing.T) {
	for _, tc := range []struct {
		name  string
		spoil func(*fakeKernel)
		want  error
	}{
		{"no socket", func(k *fakeKernel) { k.most = 0 }, unix.EMFILE},
		{"no second socket", func(k *fakeKernel) { k.most = 1 }, unix.EMFILE},
		{"no monitor of limits", func(k *fakeKernel) { k.most = 2 }, unix.EMFILE},
		{"no monitor of policies", func(k *fakeKernel) { k.most = 3 }, unix.EMFILE},
		{"no ESP", func(k *fakeKernel) {
			k.refuse = func(uint16, stateID) unix.Errno { return unix.EPROTONOSUPPORT }
		}, ErrNoESP},
	} {
		t.Run(tc.name, func(t *testing.T) {
			k := newFakeKernel()
			tc.spoil(k)
			_, err := newBackend(testConfig(), k)
			if !errors.Is(err, tc.want) || strings.Contains(err.Error(), "released") {
				t.Errorf("got %v, want %v", err, tc.want)
			}
			if k.locked || k.sockets != 0 || len(k.policies) != 0 {
				t.Errorf("locked %v, %d sockets, %d policies", k.locked, k.sockets, len(k.policies))
			}
		})
	}
}

// TestNewCleansUp: after a failure half way through the policies nothing stays that does not end by itself, and nothing
// is opened that an earlier run may have left blocked.
func TestNewCleansUp(t *testing.T) {
	k := newFakeKernel()
	n := 0
	k.refuse = func(typ uint16, _ stateID) unix.Errno {
		if typ == nl.XFRM_MSG_UPDPOLICY {
			if n++; n == 5 {
				return unix.ENOMEM
			}
		}
		return 0
	}
	_, err := newBackend(testConfig(), k)
	if !errors.Is(err, unix.ENOMEM) || !strings.Contains(err.Error(), "add policy") {
		t.Errorf("got %v, want ENOMEM", err)
	}
	if s, p := k.count(); s != 0 || p != k.retired() || k.locked {
		t.Errorf("%d states and %d policies left of which %d expire, locked %v", s, p, k.retired(), k.locked)
	}
}

func TestParamsRefused(t *testing.T) {
	k := newFakeKernel()
	b := newFake(t, k, testConfig())
	for _, tc := range []struct {
		name   string
		change func(*sa.Params)
	}{
		{"address not ours", func(p *sa.Params) { p.Local = ueAddr(9, false) }},
		{"port-ps not protected", func(p *sa.Params) { p.Ports.PS = 5060 }},
		{"port-pc not protected", func(p *sa.Params) { p.Ports.PC = serverPS }},
		{"mixed families", func(p *sa.Params) { p.UE = ueAddr(0, true) }},
		{"link-local phone", func(p *sa.Params) { p.UE = netip.MustParseAddr("169.254.0.9") }},
		{"no phone", func(p *sa.Params) { p.UE = netip.Addr{} }},
		{"port-uc 0", func(p *sa.Params) { p.Ports.UC = 0 }},
		{"SPI 0", func(p *sa.Params) { p.SPIs.US = 0 }},
		{"short key", func(p *sa.Params) { p.Keys.Enc = p.Keys.Enc[:8] }},
		{"key too many", func(p *sa.Params) { p.Keys.Auth = make(ims.Key, 20) }},
		{"null with null", func(p *sa.Params) { p.Keys.Suite = ims.Suite{Alg: ims.AlgNull, Enc: ims.EncNull} }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := len(k.sends)
			p := testSet(0, false, gcm)
			tc.change(&p)
			if err := install(t, b, p); !errors.Is(err, ErrParams) {
				t.Errorf("got %v, want ErrParams", err)
			}
			if len(k.sends) != before || b.Count() != 0 {
				t.Errorf("%d messages reached the kernel, Count %d", len(k.sends)-before, b.Count())
			}
		})
	}
}

// TestKeysCopied: the caller may overwrite its keys as soon as Install has returned.
func TestKeysCopied(t *testing.T) {
	k := newFakeKernel()
	b := newFake(t, k, testConfig())
	k.gate = make(chan struct{})
	done := make(chan error, 1)
	p := testSet(0, false, gcm)
	b.Install(p, func(err error) { done <- err })
	p.Keys.Zero()
	p.Keys.Suite = ims.Suite{}
	close(k.gate)
	if err := <-done; err != nil {
		t.Error(err)
	}
	for _, buf := range [][]byte{b.conn.buf[:cap(b.conn.buf)], b.conn.rbuf} {
		for i, c := range buf {
			if c != 0 {
				t.Fatalf("octet %d of a buffer is %#x: keys may have stayed behind", i, c)
			}
		}
	}
}

func TestJudge(t *testing.T) {
	suites := ims.Suites()
	no := func(e unix.Errno) error { return &KernelError{Errno: e} }
	fill := func(v4, v6 error) []error {
		var rs []error
		for range len(suites) + 1 {
			rs = append(rs, v4)
		}
		for range len(suites) + 1 {
			rs = append(rs, v6)
		}
		return rs
	}
	noGCM := fill(nil, nil)
	noGCM[0], noGCM[len(suites)+1] = no(unix.ENOSYS), no(unix.ENOSYS)
	oldWindow := fill(nil, nil)
	oldWindow[len(suites)] = no(unix.EINVAL)
	mixed := fill(no(unix.EPROTONOSUPPORT), no(unix.EPROTONOSUPPORT))
	mixed[0] = no(unix.ENOSYS)
	for _, tc := range []struct {
		name    string
		results []error
		want    error
		reason  string
		suites  int
		window  bool
	}{
		{"all", fill(nil, nil), nil, "kernel ESP for IPv4 and IPv6, 8 of 8 algorithm pairs", 8, true},
		{"IPv4", fill(nil, no(unix.EPROTONOSUPPORT)), nil, "kernel ESP for IPv4 only, 8 of 8 algorithm pairs", 8, true},
		{"IPv6", fill(no(unix.EPROTONOSUPPORT), nil), nil, "kernel ESP for IPv6 only, 8 of 8 algorithm pairs", 8, true},
		{"no GCM", noGCM, nil, "kernel ESP for IPv4 and IPv6, 7 of 8 algorithm pairs, missing: null=aes-gcm", 7, true},
		{"old window", oldWindow, nil, "kernel ESP for IPv4 and IPv6, 8 of 8 algorithm pairs, replay window 32", 8, false},
		{"no ESP", mixed, ErrNoESP, "kernel has no ESP: protocol not supported", 0, false},
		{"no crypto", fill(no(unix.ENOSYS), no(unix.ENOSYS)), ErrNoAlgorithm, "kernel lacks the algorithm: " + unix.ENOSYS.Error(), 0, false},
		{"no right", fill(no(unix.EPERM), no(unix.EPERM)), ErrPermission, "CAP_NET_ADMIN is missing: operation not permitted", 0, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := judge(suites, tc.results)
			if !errors.Is(s.Err(), tc.want) || s.Reason != tc.reason || len(s.Suites) != tc.suites || s.LargeWindow != tc.window {
				t.Errorf("got %v, %q, %d suites, window %v", s.Err(), s.Reason, len(s.Suites), s.LargeWindow)
			}
			if len(s.Missing) != len(suites)-tc.suites {
				t.Errorf("%d missing", len(s.Missing))
			}
		})
	}
}

// TestWindowFallback: a kernel that refuses the large window gets 32 and the operator a log line.
//
// Peers: B1.14
func TestWindowFallback(t *testing.T) {
	k := newFakeKernel()
	added := 0
	k.refuse = func(typ uint16, _ stateID) unix.Errno {
		if typ == nl.XFRM_MSG_NEWSA {
			// The probe's ninth state of each family has the large window.
			if added++; added%9 == 0 {
				return unix.EINVAL
			}
		}
		return 0
	}
	var text strings.Builder
	cfg := testConfig()
	cfg.Logger = slog.New(slog.NewTextHandler(&text, nil))
	b := newFake(t, k, cfg)
	k.refuse = nil
	if b.window != legacyWindow || !strings.Contains(text.String(), "wanted=256 used=32") {
		t.Errorf("window %d, log:\n%s", b.window, &text)
	}
}
