package e2e

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gmgate/gmgate/bench/core"
	"github.com/gmgate/gmgate/bench/lab"
	"github.com/gmgate/gmgate/bench/ue"
	"github.com/gmgate/gmgate/control/ims"
)

// Environment variables, see the package comment.
const (
	envBinary  = "GMGATE_BINARY"
	envBackend = "GMGATE_E2E_BACKEND"
	envUE      = "GMGATE_E2E_UE"
	envRequire = "REQUIRE_KERNEL_TESTS"
	envSlow    = "GMGATE_E2E_SLOW"
)

// Bounds of the tests. All timers of the daemon are shortened, see fixtureConfig.
const (
	domain          = "ims.mnc001.mcc001.3gppnetwork.org"
	caseTimeout     = 20 * time.Second
	oldSet          = 2 * time.Second
	regAwaitAuth    = 5 * time.Second
	registerTimeout = 2 * time.Second
	drainMargin     = 3 * time.Second
	poll            = 20 * time.Millisecond
)

func setting(name, fallback string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return fallback
}

// slowMachine says that the processor is emulated: tests with traffic do with less of it, and timers that real time runs
// against are longer. No case is left out.
func slowMachine() bool { return os.Getenv(envSlow) == "1" }

func backend() string { return setting(envBackend, "userspace") }

// skipOrFail ends a test whose surroundings are missing.
func skipOrFail(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv(envRequire) == "1" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

var built struct {
	once sync.Once
	dir  string
	path string
	err  error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if built.dir != "" {
		_ = os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

// binary returns the daemon, built once if the environment names none.
func binary(t testing.TB) string {
	t.Helper()
	if p := os.Getenv(envBinary); p != "" {
		return p
	}
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "gmgate-e2e-"); built.err != nil {
			return
		}
		built.path = filepath.Join(built.dir, "gmgate")
		cmd := exec.Command("go", "build", "-o", built.path, "github.com/gmgate/gmgate/cmd/gmgate")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			built.err = fmt.Errorf("build the daemon: %w\n%s", err, out)
		}
	})
	if errors.Is(built.err, exec.ErrNotFound) {
		skipOrFail(t, "no Go here: %s must name the daemon", envBinary)
	}
	if built.err != nil {
		t.Fatal(built.err)
	}
	return built.path
}

// fixtureConfig is what a test varies.
type fixtureConfig struct {
	ipv6     bool
	daemon   lab.DaemonOptions // timers and back end are filled in
	core     core.Behaviour
	capture  string         // pcap file
	clear    lab.ClearRules // what may be seen in clear
	problems []string       // findings of the core that this test provokes, as parts of their text
	errors   []string       // what the daemon may complain of at level error, as parts of the lines
	coreDies bool           // the test ends the core itself
	register time.Duration  // mw.register_timeout, default registerTimeout
	coreAddr netip.AddrPort // default: as the lab plans it
	subs     int            // subscribers, default 32
	oldSet   time.Duration  // timers.old_set, default oldSet
	await    time.Duration  // timers.reg_await_auth, default regAwaitAuth
	log      int            // messages that the core keeps, default its own
	digest   int            // the last ones register with SIP digest
}

// fixture is a running network.
type fixture struct {
	policies int // constant XFRM policies of the daemon
	lab      *lab.Lab
	daemon   *lab.Daemon
	core     *core.Core
	farm     *ue.Farm
	capture  *lab.Capture
	subs     []core.Subscriber
	ipv6     bool
	config   string        // of the daemon
	await    time.Duration // timers.reg_await_auth
	drain    time.Duration // until the last SA set must be gone

	mu   sync.Mutex
	next int
}

// testLog sends log records to the test's output.
type testLog struct{ t *testing.T }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Logf("%s", strings.TrimRight(string(p), "\n"))
	return len(p), nil
}

// start builds the network, and checks at the end of the test what must hold after any test.
func start(t *testing.T, cfg fixtureConfig) *fixture {
	t.Helper()
	if os.Geteuid() != 0 {
		skipOrFail(t, "network namespaces need root")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		skipOrFail(t, "userspace ESP needs /dev/net/tun: %v", err)
	}
	bin := binary(t)
	limit := caseTimeout
	if slowMachine() { // the kernel takes its time to verify the guard
		limit = loadTimeout
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	f := &fixture{ipv6: cfg.ipv6}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	f.lab, err = lab.New(lab.Options{IPv6: cfg.ipv6, Prefix: "gme2e"})
	check(err)
	t.Cleanup(func() {
		if err := f.lab.Close(); err != nil {
			t.Errorf("close lab: %v", err)
		}
	})
	if cfg.subs == 0 {
		cfg.subs = 32
	}
	f.subs = core.Subscribers(cfg.subs, domain)
	for i := range cfg.digest {
		f.subs[cfg.subs-1-i].Password = "secret"
	}
	logger := slog.New(slog.NewTextHandler(testLog{t}, &slog.HandlerOptions{Level: slog.LevelWarn}))
	plan := f.lab.Plan()
	if !cfg.coreAddr.IsValid() {
		cfg.coreAddr = netip.AddrPortFrom(plan.Core, lab.PortCore)
	}
	f.core, err = core.Start(core.Config{
		NS: f.lab.Core, Addr: cfg.coreAddr, Domain: domain, Subscribers: f.subs,
		Behaviour: cfg.core, Logger: logger, LogSize: cfg.log,
	})
	check(err)
	t.Cleanup(func() {
		if err := f.core.Close(); err != nil && !cfg.coreDies {
			t.Errorf("close core: %v", err)
		}
	})
	f.capture, err = f.lab.Capture(cfg.capture)
	check(err)
	d := cfg.daemon
	if cfg.oldSet == 0 {
		cfg.oldSet = oldSet
	}
	if cfg.await == 0 {
		cfg.await = regAwaitAuth
	}
	d.Backend, d.OldSet, d.RegAwaitAuth = backend(), cfg.oldSet, cfg.await
	f.await, f.drain = cfg.await, cfg.oldSet+cfg.await+drainMargin
	if cfg.register == 0 {
		cfg.register = registerTimeout
	}
	d.RegisterTimeout, d.HealthInterval = cfg.register, -1
	f.config = f.lab.DaemonConfig(d)
	f.daemon, err = f.lab.StartDaemon(ctx, bin, f.config, nil)
	check(err)
	t.Cleanup(func() { f.finish(t, cfg) })
	if backend() == "xfrm" {
		f.policies = f.xfrm(t, "policy")
		t.Logf("kernel before: %d states, %d policies", f.xfrm(t, "state"), f.policies)
	}
	linger := time.Duration(0)
	if slowMachine() { // a phone keeps its old set while the P-CSCF may still use it, which goes with the lifetimes
		linger = loadTimeout
	}
	f.farm, err = ue.NewFarm(ue.FarmConfig{
		OldSetLinger: linger,
		NS:           f.lab.UE, Prefixes: []netip.Prefix{lab.PlanOf(false).UEs, lab.PlanOf(true).UEs},
		PCSCF: netip.AddrPortFrom(plan.Gm, lab.PortClear), ESP: setting(envUE, "userspace"), Logger: logger,
	})
	check(err)
	return f
}

// crash finds in a log what must never be there.
var crash = regexp.MustCompile(`(?m)^(panic:|fatal error:|goroutine \d+ |WARNING: DATA RACE)|level=ERROR|\b[ci]k="?[0-9a-fA-F]{16}`)

// finish closes the network in order and checks it.
func (f *fixture) finish(t *testing.T, cfg fixtureConfig) {
	if f.farm != nil {
		// Sets of phones that went without a word end by timer.
		if err := f.farm.Close(); err != nil {
			t.Errorf("close farm: %v", err)
		}
	}
	f.capture.Settle(50*time.Millisecond, time.Second)
	if err := f.capture.CheckClear(cfg.clear); err != nil {
		t.Errorf("tap on the Gm link: %v", err)
	}
problems:
	for _, p := range f.core.Problems() {
		for _, expected := range cfg.problems {
			if strings.Contains(p, expected) {
				continue problems
			}
		}
		t.Errorf("core: %s", p)
	}
	if t.Failed() {
		f.logMetrics(t)
	}
	left := 0 // with a store, SA sets wait for the next start
	if backend() == "xfrm" && cfg.daemon.StorePath != "" {
		left = f.xfrm(t, "state")
	}
	if err := f.daemon.Stop(); err != nil {
		t.Error(err)
	}
	checkLog(t, f.daemon, cfg.errors)
	if backend() == "xfrm" {
		if n := f.xfrm(t, "state"); n > left {
			t.Errorf("%d states are left in the kernel after the daemon ended, want %d", n, left)
		}
	}
	if t.Failed() {
		t.Logf("end of the daemon's log:\n%s", f.daemon.Tail(60))
	}
}

// checkLog fails the test for what must never be in the log of a daemon.
func checkLog(t *testing.T, d *lab.Daemon, allowed []string) {
	t.Helper()
lines:
	for line := range strings.Lines(d.Log()) {
		for _, a := range allowed {
			if strings.Contains(line, a) {
				continue lines
			}
		}
		if m := crash.FindString(line); m != "" {
			t.Errorf("the daemon's log has %q: %s", m, line)
		}
	}
}

// logMetrics prints what the daemon counted, for the reader of a failure.
func (f *fixture) logMetrics(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	m, err := f.daemon.Metrics(ctx)
	if err != nil {
		t.Logf("no metrics: %v", err)
		return
	}
	var lines []string
	for k, v := range m {
		if v != 0 && strings.HasPrefix(k, "gmgate_") && !strings.Contains(k, "_bucket") {
			lines = append(lines, fmt.Sprintf("%s %g", k, v))
		}
	}
	slices.Sort(lines)
	t.Logf("the daemon's metrics:\n%s", strings.Join(lines, "\n"))
}

// xfrm counts states or policies in the gm namespace.
func (f *fixture) xfrm(t *testing.T, what string) int {
	t.Helper()
	out, err := exec.Command("ip", "-n", f.lab.GM.Name(), "xfrm", what, "count").CombinedOutput() //nolint:gosec // constant
	if err != nil {
		t.Fatalf("count xfrm %s: %v: %s", what, err, out)
	}
	total, seen := 0, false
	for _, m := range regexp.MustCompile(`(?:SAD count|IN|OUT|FWD) +(\d+)`).FindAllStringSubmatch(string(out), -1) {
		n := 0
		_, _ = fmt.Sscan(m[1], &n)
		total, seen = total+n, true
	}
	if !seen {
		t.Fatalf("count xfrm %s: cannot read %q", what, out)
	}
	return total
}

// newUE returns a phone that nobody has used in this network yet.
func (f *fixture) newUE(t *testing.T, change ...func(*ue.Config)) *ue.UE {
	t.Helper()
	cfg := f.ueConfig(t)
	for _, c := range change {
		c(&cfg)
	}
	u, err := f.farm.NewUE(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = u.Close() })
	return u
}

// take returns the index of a subscriber, and so of an address, that nobody has used yet.
func (f *fixture) take(t *testing.T) int {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	i := f.next
	f.next++
	if i >= len(f.subs) {
		t.Fatalf("the network has %d subscribers only", len(f.subs))
	}
	return i
}

func (f *fixture) ueConfig(t *testing.T) ue.Config {
	t.Helper()
	return f.configOf(f.take(t))
}

// configOf describes the phone of subscriber i.
func (f *fixture) configOf(i int) ue.Config {
	s := f.subs[i]
	return ue.Config{
		Identity:  ue.Identity{IMPI: s.IMPI, Domain: s.Domain, K: s.K, OPc: s.OPc},
		Addr:      f.lab.Plan().UE(i),
		Transport: ims.UDP,
	}
}

// timed bounds one case.
func timed(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), caseTimeout)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits until ok returns true; it returns false at the limit.
func eventually(ctx context.Context, limit time.Duration, ok func() bool) bool {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(poll)
	if slowMachine() {
		tick.Reset(10 * poll) // a look at the metrics costs more than that
	}
	defer tick.Stop()
	for {
		if ok() {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
	}
}

// metric sums up series of a metric of the daemon; the prefix is added.
func (f *fixture) metric(ctx context.Context, t *testing.T, name string, labels ...string) float64 {
	t.Helper()
	m, err := f.daemon.Metrics(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return lab.Sum(m, "gmgate_"+name, labels...)
}

// wantNoSets waits until the daemon has no SA set any more, and its backend no SA.
func (f *fixture) wantNoSets(ctx context.Context, t *testing.T) {
	t.Helper()
	var sets, sas float64
	states := 0
	if !eventually(ctx, f.drain, func() bool {
		sets, sas = f.metric(ctx, t, "sa_sets"), f.metric(ctx, t, "esp_sas")
		if backend() == "xfrm" {
			states = f.xfrm(t, "state")
		}
		return sets == 0 && sas == 0 && states == 0
	}) {
		t.Errorf("left: %g SA sets, %g SAs in the backend, %d states in the kernel", sets, sas, states)
	}
	if backend() == "xfrm" {
		policies := f.xfrm(t, "policy")
		t.Logf("kernel after: %d states, %d policies", states, policies)
		if policies != f.policies {
			t.Errorf("%d policies in the kernel, want the %d constant ones", policies, f.policies)
		}
	}
}

// atCore returns the messages that reached the core and for which match holds.
func (f *fixture) atCore(match func(core.Seen) bool) []core.Seen {
	var out []core.Seen
	for _, s := range f.core.Log() {
		if match(s) {
			out = append(out, s)
		}
	}
	return out
}

// registersOf returns the REGISTER requests with the IMPI that reached the core.
func (f *fixture) registersOf(impi string) []core.Seen {
	return f.atCore(func(s core.Seen) bool { return s.Method == "REGISTER" && s.Status == 0 && s.IMPI == impi })
}
