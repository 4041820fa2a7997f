package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/gopacket/gopacket/pcapgo"

	"github.com/gmgate/gmgate/control/ims"
)

// TestMain lets the test binary stand in for the daemon: `binary run -c FILE`.
func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "run" {
		if err := fakeDaemon(os.Args[3]); err != nil {
			log.Fatal(err)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// fakeDaemon serves metrics until SIGTERM, or does what the first line of the configuration says.
func fakeDaemon(config string) error {
	text, err := os.ReadFile(config) //nolint:gosec // the test's own file
	if err != nil {
		return err
	}
	if strings.HasPrefix(string(text), "# broken") {
		return errors.New("gmgate.yaml:1:1: broken on purpose")
	}
	if strings.HasPrefix(string(text), "# stubborn") {
		signal.Ignore(syscall.SIGTERM)
	}
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", PortMetrics))
	if err != nil {
		return err
	}
	log.Print("fake daemon is up")
	stop := make(chan os.Signal, 1)
	if !strings.HasPrefix(string(text), "# stubborn") {
		signal.Notify(stop, syscall.SIGTERM)
	}
	go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { //nolint:errcheck,gosec // ends with the process
		_, _ = io.WriteString(w, "# TYPE gmgate_x counter\ngmgate_x{a=\"1\"} 7\n")
	}))
	<-stop
	return nil
}

// requireRoot skips a test that needs to make namespaces, or fails it where that is demanded.
func requireRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("REQUIRE_KERNEL_TESTS") == "1" {
		t.Fatal("network namespaces need root")
	}
	t.Skip("network namespaces need root")
}

func newLab(t *testing.T, o Options) *Lab {
	t.Helper()
	requireRoot(t)
	l, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("close lab: %v", err)
		}
	})
	return l
}

func TestPlan(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		p := PlanOf(v6)
		first, last := p.UE(0), p.UE(MaxUEs-1)
		if !p.UEs.Contains(first) || !p.UEs.Contains(last) || first == last || first.Is6() != v6 {
			t.Errorf("ipv6 %t: phones %s to %s", v6, first, last)
		}
	}
	if got := PlanOf(false).UE(299).String(); got != "10.45.1.44" {
		t.Errorf("got %s", got)
	}
	for v6, want := range map[bool]string{false: "198.18.1.44", true: "2001:db8:8000:12c::1"} {
		p := PlanOf(v6)
		if got := p.Stranger(299).String(); got != want {
			t.Errorf("stranger 299 is %s, want %s", got, want)
		}
		if first, last := p.Stranger(0), p.Stranger(MaxUEs-1); !p.Strangers.Contains(first) || !p.Strangers.Contains(last) || p.UEs.Overlaps(p.Strangers) {
			t.Errorf("strangers %s to %s are not within %s, or phones are", first, last, p.Strangers)
		}
	}
}

func TestOwnerPID(t *testing.T) {
	for name, want := range map[string]int{
		"gmgate-123-ue": 123, "gmgate-123.2-core": 123, "gmgate-x-ue": 0, "gmgate-123-other": 0, "other-123-ue": 0, "gmgate-123": 0, "gmgate--5-ue": 0,
		"gmgate-123.4-config-99": 123, "gmgate-123-configuration": 0,
	} {
		if got, ok := ownerPID("gmgate", name); ok != (want > 0) || (ok && got != want) {
			t.Errorf("ownerPID(%q) = %d, %t", name, got, ok)
		}
	}
}

// Peers: C2.14
func TestParseMetrics(t *testing.T) {
	m, err := ParseMetrics(strings.NewReader("# HELP a b\n\na 1\nb{x=\"p q\",y=\"2\"} 2.5\nb{x=\"r\",y=\"2\"} 1e3\nc NaN\n"))
	if err != nil {
		t.Fatal(err)
	}
	if m["a"] != 1 || m[`b{x="p q",y="2"}`] != 2.5 || !math.IsNaN(m["c"]) {
		t.Errorf("got %v", m)
	}
	for _, tt := range []struct {
		labels []string
		want   float64
	}{{nil, 1002.5}, {[]string{`y="2"`}, 1002.5}, {[]string{`x="r"`, `y="2"`}, 1000}, {[]string{`x="p"`}, 0}} {
		if got := Sum(m, "b", tt.labels...); got != tt.want {
			t.Errorf("Sum(b, %v) = %g, want %g", tt.labels, got, tt.want)
		}
	}
	for _, tt := range []struct {
		label  string
		labels []string
		want   map[string]float64
	}{
		{"x", nil, map[string]float64{"p q": 2.5, "r": 1000}},
		{"y", nil, map[string]float64{"2": 1002.5}},
		{"x", []string{`x="r"`}, map[string]float64{"r": 1000}},
		{"z", nil, map[string]float64{}},
	} {
		if diff := cmp.Diff(tt.want, By(m, "b", tt.label, tt.labels...)); diff != "" {
			t.Errorf("By(b, %s, %v): %s", tt.label, tt.labels, diff)
		}
	}
	for _, bad := range []string{"a\n", "a x\n"} {
		if _, err := ParseMetrics(strings.NewReader(bad)); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestDaemonConfig(t *testing.T) {
	t.Setenv("TMPDIR", "/run")
	l := &Lab{opts: Options{IPv6: true}, name: "x-1"}
	got := l.DaemonConfig(DaemonOptions{
		Backend: "userspace", Workers: 1, Suites: ims.Suites()[:2], SecurityServer: "list", ClearRequests: "drop",
		OldSet: 2 * time.Second, RegisterTimeout: 1500 * time.Millisecond, HealthInterval: -1, LogLevel: "debug",
		Guard: GuardOptions{Mode: "generic", RegisterBurst: 8},
	})
	want := `instance: lab
workers: 1
gm:
  addresses: ["2001:db8::5", 10.0.0.5]
  port: 5060
  server_ports: [6100, 6101]
  client_ports: [6110, 6111, 6112, 6113]
  clear_requests: drop
security:
  algorithms: [null=aes-gcm, hmac-sha-1-96=aes-cbc]
  security_server: list
mw:
  addresses: ["2001:db8:1::5", 10.0.1.5]
  port: 5060
  next_hops: ["[2001:db8:1::9]:5060"]
  visited_network: ims.mnc001.mcc001.3gppnetwork.org
  register_timeout: 1.5s
  health_interval: 0s
limits:
  pending_per_source: 4096
timers:
  old_set: 2s
store:
  path: ""
esp:
  backend: userspace
guard:
  pin: "/sys/fs/bpf/gmgate-labs/x-1-gm"
  max_sas: 16384
  max_ues: 4096
  sources: 16384
  mode: generic
  register_rate: 100000
  register_burst: 8
metrics:
  listen: "127.0.0.1:9464"
admin:
  socket: "/run/x-1-config-admin/gmgate.sock"
log:
  level: debug
`
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestAppendEspSA(t *testing.T) {
	sa := SA{Src: netip.MustParseAddr("10.45.0.1"), Dst: netip.MustParseAddr("10.0.0.5"), SPI: 0x51}
	six := SA{Src: netip.MustParseAddr("2001:db8:45::1"), Dst: netip.MustParseAddr("2001:db8::5"), SPI: 0xec42a23d}
	key := func(n int) ims.Key { return bytes.Repeat([]byte{0xab}, n) }
	tests := []struct {
		sa   SA
		keys ims.ESPKeys
		want string
	}{
		{
			sa,
			ims.ESPKeys{Suite: ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC}, Enc: key(2), Auth: key(3)},
			`"IPv4","10.45.0.1","10.0.0.5","0x00000051","AES-CBC [RFC3602]","0xabab","HMAC-SHA-1-96 [RFC2404]","0xababab"`,
		},
		{
			six,
			ims.ESPKeys{Suite: ims.Suite{Alg: ims.AlgHMACMD5, Enc: ims.EncNull}, Auth: key(1)},
			`"IPv6","2001:db8:45::1","2001:db8::5","0xec42a23d","NULL","0x","HMAC-MD5-96 [RFC2403]","0xab"`,
		},
		{
			sa,
			ims.ESPKeys{Suite: ims.Suite{Alg: ims.AlgNull, Enc: ims.EncAESGCM}, Enc: key(1), Salt: [4]byte{1, 2, 3, 4}},
			`"IPv4","10.45.0.1","10.0.0.5","0x00000051","AES-GCM with 16 octet ICV [RFC4106]","0xab01020304","NULL","0x"`,
		},
	}
	for _, tt := range tests {
		tt.sa.Keys = tt.keys
		got, err := AppendEspSA(nil, tt.sa)
		if err != nil || string(got) != tt.want+"\n" {
			t.Errorf("%s: got %s, %v", tt.keys.Suite, got, err)
		}
	}
	for _, s := range ims.Suites() {
		sa.Keys = ims.ESPKeys{Suite: s}
		if _, err := AppendEspSA(nil, sa); err != nil {
			t.Errorf("%s: %v", s, err)
		}
	}
	sa.Keys = ims.ESPKeys{}
	if _, err := AppendEspSA(nil, sa); err == nil {
		t.Error("no suite: no error")
	}
}

func namespaces(t *testing.T, pattern string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(namedDir, pattern))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestLabTrafficAndCapture(t *testing.T) {
	l := newLab(t, Options{Prefix: "gmlab"})
	path := filepath.Join(t.TempDir(), "gm.pcap")
	c, err := l.Capture(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, v6 := range []bool{false, true} {
		p := PlanOf(v6)
		var srv, cli net.PacketConn
		listen := func(to *net.PacketConn, a netip.Addr) func() error {
			return func() (err error) {
				*to, err = net.ListenPacket("udp", netip.AddrPortFrom(a, 5060).String())
				return err
			}
		}
		if err := errors.Join(l.GM.Do(listen(&srv, p.Gm)), l.UE.Do(listen(&cli, p.UE(6)))); err != nil {
			t.Fatal(err)
		}
		defer srv.Close()
		defer cli.Close()
		if _, err := cli.WriteTo([]byte(register), net.UDPAddrFromAddrPort(netip.AddrPortFrom(p.Gm, 5060))); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 2000)
		for _, step := range []struct{ at, back net.PacketConn }{{srv, cli}, {cli, nil}} {
			if err := step.at.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
				t.Fatal(err)
			}
			_, from, err := step.at.ReadFrom(b)
			if err != nil {
				t.Fatalf("ipv6 %t: %v", v6, err)
			}
			if step.back != nil {
				if _, err := srv.WriteTo([]byte(answer("401")), from); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	c.Settle(50*time.Millisecond, 2*time.Second)
	if s := c.Stats(); s.ClearSIP != 4 || s.ESPIn+s.ESPOut != 0 || s.Lost != 0 || s.Other == 0 {
		t.Errorf("got %+v", s)
	}
	if err := c.CheckClear(ClearRules{Registrations: 1}); err != nil {
		t.Error(err)
	}
	keys := ims.ESPKeys{Suite: ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncNull}, Auth: ims.Key{1}}
	if err := c.EspSA(SA{Src: plan4.UE(0), Dst: plan4.Gm, SPI: 7, Keys: keys}); err != nil {
		t.Error(err)
	}
	if err := errors.Join(c.Close(), c.Close()); err != nil {
		t.Error(err)
	}
	if got := len(c.Clear()); got != 4 {
		t.Errorf("after Close: %d messages", got)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := pcapgo.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	sip := 0
	for {
		b, _, err := r.ReadPacketData()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if dissect(b).class == ClassClearSIP {
			sip++
		}
	}
	if sip != 4 {
		t.Errorf("the file holds %d SIP messages, want 4", sip)
	}
	if table, err := os.ReadFile(path + ".esp_sa"); err != nil || !strings.HasPrefix(string(table), `"IPv4","10.45.0.1"`) {
		t.Errorf("esp_sa: %q, %v", table, err)
	}
}

func TestDaemon(t *testing.T) {
	l := newLab(t, Options{Prefix: "gmlab"})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	start := func(config string) (*Daemon, error) { return l.StartDaemon(ctx, os.Args[0], config, nil) }

	if _, err := start("# broken"); err == nil || !strings.Contains(err.Error(), "broken on purpose") {
		t.Errorf("broken configuration: got %v", err)
	}
	if _, err := l.StartDaemon(ctx, filepath.Join(t.TempDir(), "absent"), "", nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent binary: got %v", err)
	}
	d, err := start("# fine")
	if err != nil {
		t.Fatal(err)
	}
	m, err := d.Metrics(ctx)
	if err != nil || Sum(m, "gmgate_x", `a="1"`) != 7 {
		t.Errorf("got %v, %v", m, err)
	}
	if !strings.Contains(d.Tail(3), "fake daemon is up") {
		t.Errorf("log: %q", d.Log())
	}
	if out, err := exec.Command("ip", "netns", "pids", l.GM.Name()).Output(); err == nil && !strings.Contains(string(out), fmt.Sprint(d.PID())) {
		t.Errorf("process %d is not in namespace %s, which has %q", d.PID(), l.GM.Name(), out)
	}
	if err := errors.Join(d.Stop(), d.Stop()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(d.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("configuration folder is still there: %v", err)
	}
	d, err = start("# stubborn")
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Kill(); err != nil {
		t.Error(err)
	}
	if d.Err() == nil {
		t.Error("a killed process ended with status 0")
	}
	again, err := d.Restart(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if again.PID() == d.PID() || !strings.Contains(again.Log(), "fake daemon is up") {
		t.Errorf("process %d after %d, log: %q", again.PID(), d.PID(), again.Log())
	}
	if _, err := again.Restart(canceled(ctx)); !errors.Is(err, context.Canceled) {
		t.Errorf("restart of a daemon that runs: got %v", err)
	}
	if err := again.Kill(); err != nil {
		t.Error(err)
	}
}

func canceled(ctx context.Context) context.Context {
	ctx, cancel := context.WithCancel(ctx)
	cancel()
	return ctx
}

// TestCrash kills a process that has a lab and a daemon: the daemon must go with it, and the next New must remove the
// namespaces.
func TestCrash(t *testing.T) {
	if os.Getenv("GMGATE_LAB_CRASH") == "1" {
		l, err := New(Options{Prefix: "gmcrash"})
		if err != nil {
			t.Fatal(err)
		}
		d, err := l.StartDaemon(t.Context(), os.Args[0], "# stubborn", nil)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("daemon %d\n", d.PID())
		select {} // until killed
	}
	requireRoot(t)
	cmd := exec.Command(os.Args[0], "-test.run", "^TestCrash$") //nolint:gosec // this test
	cmd.Env = append(os.Environ(), "GMGATE_LAB_CRASH=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Fscanf(out, "daemon %d\n", &pid); err != nil {
		t.Errorf("child: %v", err)
	}
	if got := len(namespaces(t, fmt.Sprintf("gmcrash-%d-*", cmd.Process.Pid))); got != 3 {
		t.Errorf("child made %d namespaces, want 3", got)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	for end := time.Now().Add(5 * time.Second); pid > 0 && syscall.Kill(pid, 0) == nil; time.Sleep(10 * time.Millisecond) {
		if state, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err != nil || strings.Contains(string(state), ") Z ") {
			break // dead, and nobody of ours reaps it
		}
		if time.Now().After(end) {
			t.Fatalf("daemon %d outlived the process that started it", pid)
		}
	}
	l := newLab(t, Options{Prefix: "gmcrash"})
	for _, n := range namespaces(t, "gmcrash-*") {
		if !strings.HasPrefix(filepath.Base(n), l.Name()+"-") {
			t.Errorf("leftover %s", n)
		}
	}
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), "gmcrash-*"))
	own := func(dir string) bool { return strings.HasPrefix(filepath.Base(dir), l.Name()+"-") }
	if dirs = slices.DeleteFunc(dirs, own); err != nil || len(dirs) > 0 {
		t.Errorf("leftover %v, %v", dirs, err)
	}
}

func TestCloseRemovesEverything(t *testing.T) {
	requireRoot(t)
	l, err := New(Options{Prefix: "gmlab"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Capture(""); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(l.Close(), l.Close()); err != nil {
		t.Error(err)
	}
	if left := namespaces(t, l.Name()+"-*"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	// A lab that cannot be finished takes its first half away again.
	l = &Lab{name: fmt.Sprintf("gmlab-%d.half", os.Getpid())}
	other := &Lab{name: l.name}
	if err := l.build(); err != nil {
		t.Fatal(err)
	}
	if err := other.build(); err == nil {
		t.Error("the same names twice: no error")
	}
	if err := errors.Join(other.Close(), l.Close()); err != nil {
		t.Error(err)
	}
	if left := namespaces(t, l.name+"-*"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestCaptureOutgoing narrows a capture down to what the daemon's side sends. That has a way to strangers too.
func TestCaptureOutgoing(t *testing.T) {
	l := newLab(t, Options{Prefix: "gmlab"})
	c, err := l.Capture("")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Outgoing(); err != nil {
		t.Fatal(err)
	}
	for _, p := range []Plan{plan4, plan6} {
		var gm, phone *net.UDPConn
		listen := func(to **net.UDPConn, a netip.Addr) func() error {
			return func() (err error) {
				*to, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, 5060)))
				return err
			}
		}
		if err := errors.Join(l.GM.Do(listen(&gm, p.Gm)), l.UE.Do(listen(&phone, p.UE(0)))); err != nil {
			t.Fatal(err)
		}
		defer gm.Close()
		defer phone.Close()
		for range 3 {
			if _, err := phone.WriteToUDPAddrPort([]byte(register), netip.AddrPortFrom(p.Gm, 5060)); err != nil {
				t.Fatal(err)
			}
		}
		for _, to := range []netip.Addr{p.UE(0), p.Stranger(0), p.Stranger(MaxUEs - 1)} {
			if _, err := gm.WriteToUDPAddrPort([]byte(answer("401")), netip.AddrPortFrom(to, 5060)); err != nil {
				t.Errorf("to %s: %v", to, err)
			}
		}
	}
	c.Settle(50*time.Millisecond, 2*time.Second)
	got := map[string]int{}
	for _, m := range c.Clear() {
		got[m.String()]++
	}
	want := map[string]int{}
	for _, p := range []Plan{plan4, plan6} {
		for _, to := range []netip.Addr{p.UE(0), p.Stranger(0), p.Stranger(MaxUEs - 1)} {
			want[fmt.Sprintf("401 (REGISTER) udp %s->%s", netip.AddrPortFrom(p.Gm, 5060), netip.AddrPortFrom(to, 5060))] = 1
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("seen: %s", diff)
	}
}
