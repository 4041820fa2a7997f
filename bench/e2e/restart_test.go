package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gmgate/gmgate/bench/lab"
	"github.com/gmgate/gmgate/bench/ue"
	"github.com/gmgate/gmgate/control/ims"
)

// talkers are the phones that are busy all the time.
const talkers = 6

// restartPhones is how many phones there are when the daemon restarts.
func restartPhones() int {
	if setting(envUE, ue.Userspace) == ue.XFRM {
		return 12 // each of their SA sets costs a process
	}
	return 40
}

// stored is a configuration with a store in a directory of the test.
func stored(t *testing.T, cfg fixtureConfig) fixtureConfig {
	t.Helper()
	cfg.daemon.StorePath = filepath.Join(t.TempDir(), "gmgate.db")
	cfg.log, cfg.register, cfg.await, cfg.oldSet = loadLog, caseTimeout, caseTimeout, oldSet
	return cfg
}

// kernelState is what tells whether a state in the kernel is still the same.
type kernelState struct {
	reqid     string
	seq, oseq uint64
}

var (
	stateHead  = regexp.MustCompile(`proto esp spi (0x[0-9a-f]+)\S* reqid (\d+)`)
	stateCount = regexp.MustCompile(`[ \t](seq|oseq) (0x[0-9a-f]+)`)
)

// states reads the states of the gm namespace by SPI.
func (f *fixture) states(t *testing.T) map[ims.SPI]kernelState {
	t.Helper()
	out, err := exec.Command("ip", "-n", f.lab.GM.Name(), "xfrm", "state", "list").Output() //nolint:gosec // constant
	if err != nil {
		t.Fatalf("list states: %v", err)
	}
	all := map[ims.SPI]kernelState{}
	for _, part := range regexp.MustCompile(`(?m)^src `).Split(string(out), -1)[1:] {
		head := stateHead.FindStringSubmatch(part)
		if head == nil {
			t.Fatal("a state without SPI") // its text has keys
		}
		spi, err := strconv.ParseUint(head[1], 0, 32)
		if err != nil {
			t.Fatal(err)
		}
		s := kernelState{reqid: head[2]}
		for _, c := range stateCount.FindAllStringSubmatch(part, -1) {
			n, err := strconv.ParseUint(c[2], 0, 64)
			if err != nil {
				t.Fatal(err)
			}
			if c[1] == "seq" {
				s.seq = n
			} else {
				s.oseq = n
			}
		}
		all[ims.SPI(spi)] = s
	}
	return all
}

// restart starts the daemon again after end has ended it, and returns when it is ready.
func (f *fixture) restart(ctx context.Context, t *testing.T, end func() error, allowed ...string) time.Time {
	t.Helper()
	// What is written behind is in the store within moments; what comes in the last one is lost with a crash.
	if !eventually(ctx, caseTimeout, func() bool { return f.metric(ctx, t, "store_pending_changes") == 0 }) {
		t.Fatal("the store does not get what has changed")
	}
	if err := end(); err != nil {
		t.Fatal(err)
	}
	checkLog(t, f.daemon, allowed)
	began := time.Now()
	d, err := f.daemon.Restart(ctx)
	if err != nil {
		t.Fatal(err)
	}
	f.daemon = d
	t.Logf("ready %s after the start", time.Since(began).Round(time.Millisecond))
	return time.Now()
}

// restored reads how many SA sets the daemon has taken over.
func (f *fixture) restored(ctx context.Context, t *testing.T, how string) int {
	t.Helper()
	return int(f.metric(ctx, t, "sa_sets_restored", fmt.Sprintf("how=%q", how)))
}

// kept waits until the store has the registrations of so many phones, a set and a registration each at least: it is written
// to a moment after the 200, and a crash within that moment is no case of these tests.
func (f *fixture) kept(ctx context.Context, t *testing.T, phones int) {
	t.Helper()
	if !eventually(ctx, caseTimeout, func() bool {
		return f.metric(ctx, t, "store_changes_total") >= float64(2*phones) && f.metric(ctx, t, "store_pending_changes") == 0
	}) {
		t.Fatalf("%g changes are in the store, %g wait; %d phones have registered",
			f.metric(ctx, t, "store_changes_total"), f.metric(ctx, t, "store_pending_changes"), phones)
	}
}

// crowd registers many phones at once, half of them by UDP and half by TCP; the first ones by UDP.
func (f *fixture) crowd(ctx context.Context, t *testing.T, n int, change ...func(*ue.Config)) []*end {
	t.Helper()
	ends := make([]*end, n)
	for i := range ends {
		k := f.take(t)
		cfg := f.configOf(k)
		cfg.Offers, cfg.Ring = f.offers(1+i%3), callRing
		if i >= talkers && i%2 == 1 {
			byTCP(&cfg)
		}
		for _, c := range change {
			c(&cfg)
		}
		ends[i] = f.endOf(t, k, cfg)
	}
	each(t, ends, func(e *end) error { _, err := e.u.Register(ctx); return err })
	return ends
}

// each does something with all phones at once.
func each(t *testing.T, ends []*end, do func(e *end) error) {
	t.Helper()
	errs := make([]error, len(ends))
	var wg sync.WaitGroup
	for i, e := range ends {
		wg.Go(func() {
			if err := do(e); err != nil {
				errs[i] = fmt.Errorf("%s: %w", e.uri, err)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// fromNetwork sends every phone a MESSAGE and returns how long the slowest answer took since a moment.
func (f *fixture) fromNetwork(ctx context.Context, t *testing.T, ends []*end, since time.Time) time.Duration {
	t.Helper()
	var mu sync.Mutex
	var slowest time.Duration
	each(t, ends, func(e *end) error {
		status, err := f.core.SendMessage(ctx, e.uri, "after the restart")
		if err != nil || status != 200 {
			return fmt.Errorf("MESSAGE of the network: %d, %w", status, err)
		}
		mu.Lock()
		slowest = max(slowest, time.Since(since))
		mu.Unlock()
		return nil
	})
	return slowest
}

// toNetwork has every phone send a MESSAGE to another one. One whose connection was lost opens it again.
func (f *fixture) toNetwork(ctx context.Context, t *testing.T, ends []*end) {
	t.Helper()
	each(t, ends, func(e *end) error {
		to := ends[(slices.Index(ends, e)+1)%len(ends)]
		if status, err := e.u.Message(ctx, to.uri, "here I am"); err != nil || status != 200 {
			return fmt.Errorf("MESSAGE: %d, %w", status, err)
		}
		return nil
	})
}

// TestRestart ends the daemon while phones talk, in three ways, and starts it again: their registrations go on without a
// word from them, in both directions, and what the busiest of them had under way is answered once.
//
// Peers: A1.22a, A4.04c, B1.23
func TestRestart(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		for _, how := range []struct {
			name  string
			end   func(*fixture) error
			flush bool // the kernel's SAs are gone as well
			clean bool
		}{
			{"killed", (*fixture).kill, false, false},
			{"rebooted", (*fixture).kill, true, false},
			{"stopped", func(f *fixture) error { return f.daemon.Stop() }, false, true},
		} {
			if v6 && slowMachine() && !how.flush { // what is installed again depends on the family, what stays does not
				continue
			}
			t.Run(how.name+" over "+family(v6), func(t *testing.T) {
				f := start(t, stored(t, fixtureConfig{ipv6: v6, subs: restartPhones()}))
				ctx := longer(t)
				ends := f.crowd(ctx, t, restartPhones())
				f.toNetwork(ctx, t, ends)
				w := f.smallFlow(ctx, t, ends[:talkers]...)
				w.turn(ctx, t)
				hangUp := f.calls(ctx, t, ends)
				kernel := backend() == "xfrm"
				var before map[ims.SPI]kernelState
				f.kept(ctx, t, restartPhones())
				ready := f.restart(ctx, t, func() error {
					if err := how.end(f); err != nil || !kernel {
						return err
					}
					before = f.states(t)
					if how.flush {
						return f.flush()
					}
					return nil
				})
				slowest := f.fromNetwork(ctx, t, ends, ready)
				t.Logf("all %d phones have answered %s after that", len(ends), slowest.Round(time.Millisecond))
				f.toNetwork(ctx, t, ends)
				w.turn(ctx, t)
				hangUp()
				if kernel {
					compareStates(t, before, f.states(t), how.flush)
				}
				want := map[string]int{"adopted": 0, "reinstalled": restartPhones(), "expired": 0, "dropped": 0}
				if kernel && !how.flush {
					want["adopted"], want["reinstalled"] = restartPhones(), 0
				}
				for k, n := range want {
					if got := f.restored(ctx, t, k); got != n {
						t.Errorf("%d SA sets %s, want %d", got, k, n)
					}
				}
				if n := f.metric(ctx, t, "orphan_sas_removed"); n != 0 {
					t.Errorf("%g SAs were removed as orphans", n)
				}
				if said := strings.Contains(f.daemon.Log(), "stopped_cleanly=true"); said != how.clean {
					t.Errorf("the daemon says that it was stopped cleanly: %t, want %t", said, how.clean)
				}
				w.finish(t, ends[:talkers]...)

				// Life goes on: re-authentication, use of the new sets, and the end.
				f.behave(challenging, func() {
					each(t, ends, func(e *end) error {
						res, err := e.u.Reregister(ctx)
						if err == nil && !res.Challenged {
							err = errors.New("not challenged")
						}
						return err
					})
				})
				f.toNetwork(ctx, t, ends)
				f.fromNetwork(ctx, t, ends, time.Now())
				each(t, ends, func(e *end) error { return e.u.Deregister(ctx) })
				for _, e := range ends {
					checkPhones(t, e.u)
				}
				f.wantNoSets(ctx, t)
			})
		}
	}
}

// TestRestartWorkers starts the daemon again with fewer workers, and with more: the core reaches every phone by the Path of before,
// though the Mw port in it may be that of a worker that there is no more, and calls of before are ended by their Record-Routes.
func TestRestartWorkers(t *testing.T) {
	const phones = 8 // two for each of the workers at the beginning
	f := start(t, stored(t, fixtureConfig{daemon: lab.DaemonOptions{Workers: 4}}))
	ctx := longer(t)
	ends := f.crowd(ctx, t, phones)
	hangUp := f.calls(ctx, t, ends)
	f.kept(ctx, t, phones)
	for _, workers := range []string{"1", "3"} {
		f.daemon.Configure(strings.Replace(f.config, "workers: 4", "workers: "+workers, 1))
		ready := f.restart(ctx, t, func() error { return f.daemon.Stop() })
		f.fromNetwork(ctx, t, ends, ready)
		f.toNetwork(ctx, t, ends)
	}
	hangUp()
	if n := f.metric(ctx, t, "sip_drops_total", `reason="label_mismatch"`); n != 0 {
		t.Errorf("%g messages had the label of another UE context", n)
	}
	f.behave(challenging, func() {
		each(t, ends, func(e *end) error { _, err := e.u.Reregister(ctx); return err })
	})
	f.fromNetwork(ctx, t, ends, time.Now())
	each(t, ends, func(e *end) error { return e.u.Deregister(ctx) })
	f.wantNoSets(ctx, t)
}

// calls sets up calls between every two phones, and returns when they stand. Ending them takes a re-INVITE, an UPDATE and a
// BYE in each.
func (f *fixture) calls(ctx context.Context, t *testing.T, ends []*end) (hangUp func()) {
	t.Helper()
	until := make(chan struct{})
	done := make(chan error, len(ends)/2)
	for i := 0; i+1 < len(ends); i += 2 {
		from, to := ends[i], ends[i+1]
		go func() {
			_, err := from.u.Call(ctx, to.uri, ue.CallOptions{PRACK: true, ReInvite: i%4 == 0, Update: true, Until: until})
			done <- err
		}()
	}
	for i := 1; i < len(ends); i += 2 {
		if _, err := ends[i].u.WaitReceived(ctx, "ACK", 1); err != nil {
			t.Fatal(err)
		}
	}
	return func() {
		t.Helper()
		close(until)
		for range len(ends) / 2 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
}

func (f *fixture) kill() error { return f.daemon.Kill() }

// flush takes every state out of the kernel, as a reboot does.
func (f *fixture) flush() error { return f.ip("xfrm", "state", "flush") }

// ip runs ip(8) in the gm namespace.
func (f *fixture) ip(args ...string) error {
	var stderr bytes.Buffer
	cmd := exec.Command("ip", append([]string{"-n", f.lab.GM.Name()}, args...)...) //nolint:gosec // the tests' own arguments
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", args[0], err, strings.TrimSpace(stderr.String()))
	}
	return nil
}

// compareStates expects the same states before and after a restart. Those that were there all along go on with their
// sequence numbers; those that were installed again are far beyond them in the outbound direction.
func compareStates(t *testing.T, before, after map[ims.SPI]kernelState, again bool) {
	t.Helper()
	t.Logf("%d states before, %d after", len(before), len(after))
	if len(before) != 4*restartPhones() {
		t.Errorf("%d states before, want %d", len(before), 4*restartPhones())
	}
	if !slices.Equal(slices.Sorted(maps.Keys(before)), slices.Sorted(maps.Keys(after))) {
		t.Errorf("the states after the restart have other SPIs than those before")
	}
	moved := 0
	for spi, b := range before {
		a := after[spi]
		if a.oseq < b.oseq || !again && a.seq < b.seq {
			t.Errorf("SA %s went back from seq %d, oseq %d to seq %d, oseq %d", spi, b.seq, b.oseq, a.seq, a.oseq)
		}
		if a.oseq > b.oseq {
			moved++
		}
		if again && b.oseq > 0 && a.oseq < b.oseq+1<<16 {
			t.Errorf("SA %s was installed again with oseq %d, it had %d", spi, a.oseq, b.oseq)
		}
	}
	if moved < restartPhones() {
		t.Errorf("%d states have sent anything since, want %d at least", moved, restartPhones())
	}
}

// TestRestartExpired: registrations that end while the daemon is away are gone when it comes back, and their SAs; others
// are not.
func TestRestartExpired(t *testing.T) {
	life := life()
	f := start(t, func() fixtureConfig {
		cfg := stored(t, fixtureConfig{})
		cfg.daemon.LifetimeMargin = lifetimeMargin
		return cfg
	}())
	ctx := longer(t)
	const long, short = 4, 3
	stay := f.crowd(ctx, t, long)
	leave := f.crowd(ctx, t, short, func(c *ue.Config) { c.Expires = life })
	f.kept(ctx, t, long+short)
	f.restart(ctx, t, func() error {
		if err := f.kill(); err != nil {
			return err
		}
		wait(ctx, t, life+lifetimeMargin)
		return nil
	})
	f.fromNetwork(ctx, t, stay, time.Now())
	if n := f.metric(ctx, t, "ues"); n != long {
		t.Errorf("%g UE contexts, want %d", n, long)
	}
	if n := f.restored(ctx, t, "expired"); n != short {
		t.Errorf("%d SA sets expired, want %d", n, short)
	}
	if n := f.metric(ctx, t, "esp_sas"); n != 4*long {
		t.Errorf("%g SAs, want %d", n, 4*long)
	}
	if backend() == "xfrm" {
		if n := f.xfrm(t, "state"); n != 4*long {
			t.Errorf("%d states in the kernel, want %d", n, 4*long)
		}
	}
	for _, e := range leave {
		f.mustRegister(ctx, t, e.u)
	}
	f.toNetwork(ctx, t, slices.Concat(stay, leave))
}

// TestRestartOrphans: what is ours in the kernel and belongs to no registration goes at the start; what is of others is
// not touched, at the start or at the end.
//
// Peers: A1.22b, D1.03
func TestRestartOrphans(t *testing.T) {
	f := start(t, stored(t, fixtureConfig{}))
	ctx := longer(t)
	const foreignID, foreignSPI, orphanSPI = "4242", 0x10001001, 0x10002001
	add := func(src, dst string, spi int, reqid string) error {
		return f.ip("xfrm", "state", "add", "src", src, "dst", dst, "proto", "esp", "spi", fmt.Sprintf("%#x", spi), "reqid", reqid,
			"mode", "transport", "auth-trunc", "hmac(sha1)", "0x0102030405060708090a0b0c0d0e0f1011121314", "96",
			"enc", "cbc(aes)", "0x0102030405060708090a0b0c0d0e0f10")
	}
	gm := f.lab.Plan().Gm.String()
	if err := add("198.51.100.1", gm, foreignSPI, foreignID); err != nil {
		if backend() == "xfrm" {
			t.Fatal(err)
		}
		t.Skipf("the kernel has no ESP, that of make test-vm has: %v", err) // it runs there
	}
	if err := errors.Join(
		add("198.51.100.1", "198.51.100.2", foreignSPI+1, foreignID),
		f.ip("xfrm", "policy", "add", "src", gm+"/32", "dst", "198.51.100.0/24", "dir", "out", "priority", "500", "tmpl", "src", gm,
			"dst", "198.51.100.1", "proto", "esp", "reqid", foreignID, "mode", "tunnel"),
	); err != nil {
		t.Fatal(err)
	}
	policies := f.xfrm(t, "policy")
	foreign := func() (n int) {
		for spi, s := range f.states(t) {
			if s.reqid == foreignID && (spi == foreignSPI || spi == foreignSPI+1) {
				n++
			}
		}
		return n
	}
	ends := f.crowd(ctx, t, 2)
	f.kept(ctx, t, len(ends))
	ours := 0
	if backend() == "xfrm" {
		ours = 4 * len(ends)
	}
	f.restart(ctx, t, func() error {
		err := f.kill()
		for _, s := range f.states(t) {
			if s.reqid != foreignID {
				return errors.Join(err, add("10.45.0.99", gm, orphanSPI, s.reqid))
			}
		}
		return err
	})
	after := f.states(t)
	if _, ok := after[orphanSPI]; ok {
		t.Error("an SA that belongs to nobody is still there")
	}
	if want := min(ours, 1); f.metric(ctx, t, "orphan_sas_removed") != float64(want) {
		t.Errorf("%g orphans removed, want %d", f.metric(ctx, t, "orphan_sas_removed"), want)
	}
	if foreign() != 2 || len(after) != 2+ours || f.xfrm(t, "policy") != policies {
		t.Errorf("after the restart %d foreign states of 2, %d in all, %d policies; want %d and %d", foreign(), len(after),
			f.xfrm(t, "policy"), 2+ours, policies)
	}
	f.fromNetwork(ctx, t, ends, time.Now())
	each(t, ends, func(e *end) error { return e.u.Deregister(ctx) })
	if !eventually(ctx, f.drain, func() bool { return f.metric(ctx, t, "esp_sas") == 0 && len(f.states(t)) == 2 }) {
		t.Errorf("%d states are left, want the two foreign ones", len(f.states(t)))
	}
	if err := f.daemon.Stop(); err != nil {
		t.Error(err)
	}
	if foreign() != 2 {
		t.Errorf("%d foreign states after the end, want 2", foreign())
	}
}

// TestRestartWithoutStore: nothing survives that could not, and phones register anew; so they do when the store is damaged
// or its key lost, which the daemon says.
//
// Peers: D1.03
func TestRestartWithoutStore(t *testing.T) {
	for _, tt := range []struct {
		name string
		harm func(path string) error
		says string
	}{
		{"no store", nil, ""},
		{"damaged store", func(path string) error { return os.WriteFile(path, []byte("nothing of use"), 0o600) }, "the store was unusable"},
		{"key lost", func(path string) error { return os.Remove(path + ".key") }, "the key file of the store is missing"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := stored(t, fixtureConfig{})
			path := cfg.daemon.StorePath
			if tt.harm == nil {
				cfg.daemon.StorePath = ""
			} else {
				cfg.errors = []string{tt.says}
			}
			f := start(t, cfg)
			ctx := longer(t)
			ends := f.crowd(ctx, t, 4)
			f.restart(ctx, t, func() error {
				if err := f.kill(); err != nil || tt.harm == nil {
					return err
				}
				return tt.harm(path)
			})
			if tt.says != "" && !strings.Contains(f.daemon.Log(), tt.says) {
				t.Errorf("the daemon does not say %q", tt.says)
			}
			if n := f.metric(ctx, t, "ues"); n != 0 {
				t.Errorf("%g UE contexts, want none", n)
			}
			if backend() == "xfrm" {
				if n := f.xfrm(t, "state"); n != 0 {
					t.Errorf("%d states in the kernel, want none", n)
				}
			}
			each(t, ends, func(e *end) error {
				e.u.Reboot()
				_, err := e.u.Register(ctx)
				return err
			})
			f.toNetwork(ctx, t, ends)
			f.fromNetwork(ctx, t, ends, time.Now())
			each(t, ends, func(e *end) error { return e.u.Deregister(ctx) })
			f.wantNoSets(ctx, t)
		})
	}
}

// TestRestartOtherBackend: the operator moves a busy daemon from the kernel's ESP to that in user space. The kernel's SAs go,
// so that it does not open and answer the phones' packets beside the daemon, and the registrations go on.
func TestRestartOtherBackend(t *testing.T) {
	if backend() != "xfrm" {
		t.Skip("it begins with the kernel's ESP")
	}
	f := start(t, stored(t, fixtureConfig{}))
	ctx := longer(t)
	ends := f.crowd(ctx, t, 4)
	f.toNetwork(ctx, t, ends)
	if !eventually(ctx, caseTimeout, func() bool { return f.metric(ctx, t, "store_pending_changes") == 0 }) {
		t.Fatal("the store does not get what has changed")
	}
	if err := f.daemon.Stop(); err != nil {
		t.Fatal(err)
	}
	if n := f.xfrm(t, "state"); n != 4*len(ends) {
		t.Fatalf("%d states are left to the next run, want %d", n, 4*len(ends))
	}
	d, err := f.lab.StartDaemon(ctx, binary(t), strings.Replace(f.config, "backend: xfrm", "backend: userspace", 1), nil)
	if err != nil {
		t.Fatal(err)
	}
	f.daemon = d
	if n := f.xfrm(t, "state"); n != 0 {
		t.Errorf("%d states are in the kernel beside those in user space", n)
	}
	f.fromNetwork(ctx, t, ends, time.Now())
	f.toNetwork(ctx, t, ends)
	if n := f.restored(ctx, t, "reinstalled"); n != len(ends) {
		t.Errorf("%d SA sets reinstalled, want %d", n, len(ends))
	}
}
