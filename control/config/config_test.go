package config

import (
	"bytes"
	"errors"
	"flag"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/gmgate/gmgate/control/ims"
)

var update = flag.Bool("update", false, "write the golden files")

var netipByValue = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
}

func golden(t *testing.T, path string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

func files(t *testing.T, pattern string) []string {
	t.Helper()
	list, err := filepath.Glob(pattern)
	if err != nil || len(list) == 0 {
		t.Fatalf("no files %s: %v", pattern, err)
	}
	return list
}

// TestGood compares the effective configuration of each file, and that it reads back as the same.
func TestGood(t *testing.T) {
	for _, path := range files(t, "testdata/good/*.yaml") {
		t.Run(filepath.Base(path), func(t *testing.T) {
			c, err := Load(path)
			if err != nil {
				t.Fatalf("Load:\n%v", err)
			}
			var b bytes.Buffer
			if err := c.Write(&b); err != nil {
				t.Fatal(err)
			}
			golden(t, strings.TrimSuffix(path, ".yaml")+".effective", b.Bytes())
			again, err := Parse(b.Bytes(), "effective")
			if err != nil {
				t.Fatalf("Parse of what Write wrote:\n%v", err)
			}
			if diff := cmp.Diff(c, again, netipByValue); diff != "" {
				t.Errorf("read back (-before +after):\n%s", diff)
			}
			if err := c.Validate(); err != nil {
				t.Errorf("Validate of a parsed configuration:\n%v", err)
			}
		})
	}
}

// Peers: A1.19
func TestBad(t *testing.T) {
	for _, path := range files(t, "testdata/bad/*.yaml") {
		t.Run(filepath.Base(path), func(t *testing.T) {
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			c, err := Parse(text, filepath.Base(path))
			problems, ok := errors.AsType[Errors](err)
			if c != nil || !ok || len(problems) == 0 {
				t.Fatalf("Parse = %v, %v; want Errors", c, err)
			}
			golden(t, strings.TrimSuffix(path, ".yaml")+".errors", []byte(err.Error()+"\n"))
		})
	}
}

// Peers: B1.02, C1.06b, D2.01
func TestExampleIsTheDefault(t *testing.T) {
	var b bytes.Buffer
	if err := WriteExample(&b); err != nil {
		t.Fatal(err)
	}
	got, err := Parse(b.Bytes(), "example")
	if err != nil {
		t.Fatalf("Parse:\n%v", err)
	}
	want := Default()
	want.Gm.Addresses = got.Gm.Addresses
	want.Mw.Addresses = got.Mw.Addresses
	want.Mw.NextHops = got.Mw.NextHops
	if diff := cmp.Diff(want, got, netipByValue); diff != "" {
		t.Errorf("the example is not Default and addresses (-default +example):\n%s", diff)
	}
	if len(got.Gm.Addresses) == 0 || len(got.Mw.Addresses) == 0 || len(got.Mw.NextHops) == 0 {
		t.Error("the example lacks a required address")
	}
	golden(t, "testdata/example.yaml", b.Bytes())

	// Its comments show keys that have no default: with those taken in, the file is good too.
	shown := strings.ReplaceAll(b.String(), "  peers: []\n", "")
	shown = strings.ReplaceAll(shown, "  hosts: {}\n", "")
	shown = strings.ReplaceAll(shown, "  rules: []\n", "")
	for _, key := range []string{"instance", "peers", "hosts", "rules"} {
		shown = strings.Replace(shown, "# "+key+": ", key+": ", 1)
	}
	got, err = Parse([]byte(shown), "example")
	if err != nil {
		t.Fatalf("Parse with the commented keys:\n%v", err)
	}
	if got.Instance != "edge1" || len(got.Mw.Peers) != 1 || len(got.Mw.Hosts) != 1 || len(got.Security.Rules) != 1 {
		t.Errorf("instance %q, peers %v, hosts %v", got.Instance, got.Mw.Peers, got.Mw.Hosts)
	}
}

// Peers: B4.07
func TestSchemaIsDocumentedAndComplete(t *testing.T) {
	n := 0
	walk("", schema(), func(path string, f *field) {
		if f.sub == nil {
			n++
		}
		if f.doc == "" && !strings.HasPrefix(path, "security.spi.") {
			t.Errorf("%s has no documentation", path)
		}
		if (f.sub == nil) == (f.read == nil || f.show == nil) {
			t.Errorf("%s is neither a section nor a value", path)
		}
	})
	if n != 76 {
		t.Errorf("%d keys; a new one belongs into testdata/good/everything.yaml with another value than the default", n)
	}
	walk("", ruleFields(0), func(path string, f *field) {
		if f.doc == "" || (f.sub == nil) == (f.read == nil || f.show == nil) {
			t.Errorf("security.rules: %s has no documentation, or is neither a section nor a value", path)
		}
	})
	// Every key differs from its default in everything.yaml, so that none is read into another's place.
	c, err := Load("testdata/good/everything.yaml")
	if err != nil {
		t.Fatal(err)
	}
	def := Default()
	walk("", schema(), func(path string, f *field) {
		if f.sub == nil && f.show(c) == f.show(def) {
			t.Errorf("everything.yaml leaves %s at its default", path)
		}
	})
	walk("", ruleFields(0), func(path string, f *field) {
		if f.unset != nil && f.unset(c) {
			t.Errorf("the rule in everything.yaml leaves %s out", path)
		}
	})
}

func TestFields(t *testing.T) {
	c, err := Load("testdata/good/everything.yaml")
	if err != nil {
		t.Fatal(err)
	}
	addr := netip.MustParseAddr
	want := &Config{
		Instance: "edge-1.example", Workers: 8,
		Gm: Gm{
			Addresses: []netip.Addr{addr("10.0.0.5"), addr("2001:db8::5")},
			Port:      5070, ServerPorts: []uint16{7100}, ClientPorts: []uint16{7110, 7111, 7112, 7113, 7114},
			MaxMessage: 16384, UDPLimit: 1200, ClearRequests: ClearDrop,
			TCP: TCP{MaxConnections: 100, MaxPerSource: 16, IdleTimeout: 90 * time.Minute, DialTimeout: 1500 * time.Millisecond, MaxSegment: 1200},
		},
		Security: Security{
			IPsec: IPsecAllow, GIBA: true, Emergency: EmergencyForbid, NoSASet: 500,
			Rules: []Rule{{
				Realm: "*.lab.example", IMPI: "00101*@*", UserAgent: "*Samsung ? IMS*",
				Source: []netip.Prefix{netip.MustParsePrefix("10.45.0.0/16"), netip.MustParsePrefix("2001:db8:45::/48")},
				IPsec:  IPsecForbid, GIBA: new(bool),
				Algorithms: []ims.Suite{
					{Alg: ims.AlgHMACSHA1, Enc: ims.EncNull}, {Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC},
				},
				ServerPorts: []uint16{7100}, ClientPorts: []uint16{7114, 7113, 7112, 7111, 7110},
				Transports: Transports{
					Clear: []ims.Transport{ims.UDP}, Protected: []ims.Transport{ims.TCP, ims.UDP}, Requests: RequestsTCP,
				},
				ReuseConnection: new(bool), ReplyByVia: true, TemporaryTimeout: 30 * time.Second,
			}, {}},
			Algorithms: []ims.Suite{
				{Alg: ims.AlgAESGMAC, Enc: ims.EncNull},
				{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC},
				{Alg: ims.AlgHMACMD5, Enc: ims.EncDESEDE3CBC},
			},
			DisableDeprecated: true, SecurityServer: ServerList, NoCommonAlgorithm: 400, VerifyMismatch: 400,
			AddressConflict: 480, SPI: SPIRange{First: 4096, Last: 65535}, MaxSetsPerUE: 5,
		},
		Mw: Mw{
			Addresses: []netip.Addr{addr("10.0.1.5"), addr("2001:db8:1::5")}, Port: 5080, Transport: ims.TCP,
			NextHops: []NextHop{
				{Host: "10.0.1.9", Addr: netip.MustParseAddrPort("10.0.1.9:5060"), Transport: ims.TCP},
				{Host: "scscf.example", Addr: netip.MustParseAddrPort("10.0.1.10:5060"), Transport: ims.UDP},
				{Host: "2001:db8:1::9", Addr: netip.MustParseAddrPort("[2001:db8:1::9]:5062"), Transport: ims.TCP},
			},
			Hosts: map[string]netip.Addr{"scscf.example": addr("10.0.1.10"), "3com.example": addr("2001:db8:1::a")},
			Peers: []netip.Prefix{
				netip.MustParsePrefix("10.0.1.0/24"), netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("2001:db8:1::9/128"),
			},
			Interface: "mw0", Sources: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8:1::/64")},
			VisitedNetwork: "visited.example", PathHost: "pcscf.example", IntegrityProtectedClear: IntegrityAbsent,
			OrigIOI: "home.example", ServiceRoute: ServiceRouteRefuse, RegisterTimeout: 8 * time.Second,
			RegEvent: RegEvent{Expires: 2 * time.Hour, URI: "sip:gm1@pcscf.example:5080"},
		},
		Limits: Limits{PendingRegistrations: 5000, PendingPerSource: 8, SASets: 1000},
		Timers: Timers{RegAwaitAuth: 3 * time.Minute, LifetimeMargin: 10 * time.Second, OldSet: 64 * time.Second},
		Store:  Store{KeyFile: "/etc/gmgate/store.key", Credential: "gmgate-store", Reconcile: 30 * time.Second},
		ESP:    ESP{Backend: BackendUserspace, ReplayWindow: 1024, TunMTU: 1500},
		Guard: Guard{
			Mode: GuardTC, Interfaces: []string{"eth0", "eth1.100"}, RegisterBurst: 8, Sources: 1024, UnknownSPI: UnknownPass,
			MaxSAs: 4096, MaxUEs: 2048, Pin: "/sys/fs/bpf/sip/{instance}",
		},
		Metrics: Metrics{Pprof: true},
		Admin:   Admin{Socket: "/run/sip/{instance}/admin"},
		Log:     Log{Level: slog.LevelDebug, Format: FormatJSON},
	}
	if diff := cmp.Diff(want, c, netipByValue); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestSuites(t *testing.T) {
	s := Default().Security
	if got := s.Suites(); !slices.Equal(got, s.Algorithms) {
		t.Errorf("Suites = %v, want all: %v", got, s.Algorithms)
	}
	s.DisableDeprecated = true
	want := []ims.Suite{
		{Alg: ims.AlgNull, Enc: ims.EncAESGCM},
		{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC},
		{Alg: ims.AlgAESGMAC, Enc: ims.EncNull},
		{Alg: ims.AlgHMACSHA1, Enc: ims.EncNull},
	}
	if got := s.Suites(); !slices.Equal(got, want) {
		t.Errorf("Suites = %v, want %v", got, want)
	}
	if got := len(Default().Security.Algorithms); got != len(ims.Suites()) {
		t.Errorf("%d pairs by default, there are %d legal ones", got, len(ims.Suites()))
	}
}

// TestValidate breaks a good configuration in code, where the reader cannot help.
func TestValidate(t *testing.T) {
	if err := Example().Validate(); err != nil {
		t.Fatalf("example: %v", err)
	}
	tests := []struct {
		want string
		do   func(*Config)
	}{
		{"instance: ", func(c *Config) { c.Instance = "" }},
		{"workers: -1 is out of range, allowed are 0 to 256", func(c *Config) { c.Workers = -1 }},
		{"gm.addresses: required and missing", func(c *Config) { c.Gm.Addresses = nil }},
		{"gm.addresses[0]: no address", func(c *Config) { c.Gm.Addresses = make([]netip.Addr, 1) }},
		{"gm.addresses: 17 addresses, the guard takes at most 16", func(c *Config) { c.Gm.Addresses = manyAddresses(17) }},
		{"gm.port: 0 is out of range", func(c *Config) { c.Gm.Port = 0 }},
		{"gm.server_ports[0]: 5061 is a port of unprotected SIP", func(c *Config) { c.Gm.ServerPorts = []uint16{5061} }},
		{"gm.client_ports: 0 ports, at least 4", func(c *Config) { c.Gm.ClientPorts = nil }},
		{"gm.clear_requests: \"\" is not reject or drop", func(c *Config) { c.Gm.ClearRequests = "" }},
		{"gm.tcp.idle_timeout: must be longer than zero", func(c *Config) { c.Gm.TCP.IdleTimeout = 0 }},
		{"gm.tcp.dial_timeout: 10ms is less than 100ms", func(c *Config) { c.Gm.TCP.DialTimeout = 10 * time.Millisecond }},
		{"timers.reg_await_auth: 4ms is less than 1s", func(c *Config) { c.Timers.RegAwaitAuth = 4 * time.Millisecond }},
		{"mw.health_interval: 5ms is less than 1s", func(c *Config) { c.Mw.HealthInterval = 5 * time.Millisecond }},
		{"security.rules[0].temporary_timeout: 30ms is less than 1s", func(c *Config) {
			c.Security.Rules = []Rule{{TemporaryTimeout: 30 * time.Millisecond}}
		}},
		{`store.path: "/var/lib/gmgate/" is a directory`, func(c *Config) { c.Store.Path = "/var/lib/gmgate/" }},
		{"store.key_file: is store.path as well", func(c *Config) { c.Store.KeyFile = c.Store.Path }},
		{"security.algorithms[0]: null=null is no pair", func(c *Config) {
			c.Security.Algorithms = []ims.Suite{{Alg: ims.AlgNull, Enc: ims.EncNull}}
		}},
		{"security.spi.first: 0 is out of range, allowed are 256", func(c *Config) { c.Security.SPI.First = 0 }},
		{"mw.transport: Transport(0) is not udp or tcp", func(c *Config) { c.Mw.Transport = 0 }},
		{"mw.next_hops[0]: no address", func(c *Config) { c.Mw.NextHops[0] = NextHop{} }},
		{"mw.next_hops[0]: 10.0.1.9:0;transport=udp has no port", func(c *Config) {
			c.Mw.NextHops[0].Addr = netip.AddrPortFrom(c.Mw.NextHops[0].Addr.Addr(), 0)
		}},
		{"mw.next_hops[0]: 10.0.1.9:5060 has no transport", func(c *Config) { c.Mw.NextHops[0].Transport = 0 }},
		{"mw.hosts.Upper.example: ", func(c *Config) {
			c.Mw.Hosts = map[string]netip.Addr{"Upper.example": netip.MustParseAddr("10.0.1.9")}
		}},
		{"mw.peers[0]: no prefix", func(c *Config) { c.Mw.Peers = make([]netip.Prefix, 1) }},
		{"guard.mode: ", func(c *Config) { c.Guard.Mode = "" }},
		{"guard.pin: ", func(c *Config) { c.Guard.Pin = "/sys/fs/bpf/gmgate.d" }},
		{"guard.interfaces[1]: ", func(c *Config) { c.Guard.Interfaces = []string{"eth0", "eth0"} }},
		{"guard.max_sas: 100 is too few for limits.sa_sets, which need 2000", func(c *Config) {
			c.Guard.MaxSAs, c.Limits.SASets = 100, 1000
		}},
		{"metrics.listen: 127.0.0.1:0 cannot be listened on", func(c *Config) { c.Metrics.Listen = netip.MustParseAddrPort("127.0.0.1:0") }},
		{"log.format: ", func(c *Config) { c.Log.Format = "" }},
	}
	for _, tt := range tests {
		c := Example()
		tt.do(c)
		err := c.Validate()
		if err == nil {
			t.Errorf("no error, want %q", tt.want)
			continue
		}
		if lines := strings.Split(err.Error(), "\n"); len(lines) != 1 || !strings.HasPrefix(lines[0], tt.want) {
			t.Errorf("got %q, want one line with %q", lines, tt.want)
		}
	}
}

func manyAddresses(n int) (list []netip.Addr) {
	a := netip.MustParseAddr("10.0.0.5")
	for range n {
		list, a = append(list, a), a.Next()
	}
	return list
}

// The limit on the number of Gm addresses is the guard's alone.
func TestManyAddresses(t *testing.T) {
	c := Example()
	c.Gm.Addresses = manyAddresses(16)
	if err := c.Validate(); err != nil {
		t.Errorf("16 addresses: %v", err)
	}
	c.Gm.Addresses, c.Guard.Mode = manyAddresses(17), GuardOff
	if err := c.Validate(); err != nil {
		t.Errorf("17 addresses without a guard: %v", err)
	}
}

func TestLoadErrors(t *testing.T) {
	if _, err := Load("testdata/none.yaml"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	dir := t.TempDir()
	if _, err := Load(dir); err == nil {
		t.Error("a directory: no error")
	}
	long := filepath.Join(dir, "long.yaml")
	if err := os.WriteFile(long, bytes.Repeat([]byte("# x\n"), maxFile/4+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(long); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("long file: %v", err)
	}
	if _, err := Parse(bytes.Repeat([]byte("[\n"), maxDepth+1), "deep"); err == nil || !strings.Contains(err.Error(), "brackets") {
		t.Errorf("deep file: %v", err)
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

func TestWriteErrors(t *testing.T) {
	if err := WriteExample(brokenWriter{}); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("WriteExample: %v", err)
	}
	if err := Example().Write(brokenWriter{}); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("Write: %v", err)
	}
}

func TestWorkerCount(t *testing.T) {
	if n := (&Config{Workers: 7}).WorkerCount(); n != 7 {
		t.Errorf("WorkerCount = %d, want 7", n)
	}
	if n := (&Config{}).WorkerCount(); n < 1 {
		t.Errorf("WorkerCount = %d, want at least 1", n)
	}
	cpus := runtime.GOMAXPROCS(384)
	defer runtime.GOMAXPROCS(cpus)
	if n := (&Config{}).WorkerCount(); n != maxWorkers {
		t.Errorf("with 384 CPUs: WorkerCount = %d, want %d", n, maxWorkers)
	}
}

func TestShowDuration(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0", time.Second: "1s", 128 * time.Second: "128s", 4 * time.Minute: "4m", time.Hour: "1h", 90 * time.Minute: "1h30m",
		25*time.Hour + time.Second: "25h0m1s", 1500 * time.Millisecond: "1.5s", time.Millisecond: "1ms",
	} {
		got := showDuration(d)
		if got != want {
			t.Errorf("showDuration(%d) = %q, want %q", d, got, want)
		}
		if back, err := time.ParseDuration(got); err != nil || back != d {
			t.Errorf("%q reads back as %v, %v", got, back, err)
		}
	}
}

func TestEditDistance(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{
		{"", "", 0},
		{"port", "port", 0},
		{"prot", "port", 1},
		{"pot", "port", 1},
		{"ports", "port", 1},
		{"adress", "addresses", 3},
		{"abc", "", 3},
		{"", "abc", 3},
		{"kitten", "sitting", 3},
	} {
		if got := editDistance(tt.a, tt.b); got != tt.want {
			t.Errorf("editDistance(%q, %q) = %d, want %d", tt.a, tt.b, got, tt.want)
		}
	}
}

// FuzzParse: a configuration or problems, never both and never a panic; problems have a place in the file and one line
// each; what was accepted is written and read back as the same.
func FuzzParse(f *testing.F) {
	for _, pattern := range []string{"testdata/good/*.yaml", "testdata/bad/*.yaml"} {
		list, err := filepath.Glob(pattern)
		if err != nil {
			f.Fatal(err)
		}
		for _, path := range list {
			text, err := os.ReadFile(path)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(text)
		}
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := Parse(text, "fuzz")
		if err != nil {
			problems, ok := errors.AsType[Errors](err)
			if c != nil || !ok || len(problems) == 0 {
				t.Fatalf("Parse = %v, %v", c, err)
			}
			for i, p := range problems {
				if p.Line < 1 || p.Column < 1 || p.Text == "" || strings.Contains(p.Path, "\n") {
					t.Errorf("problem %+v", p)
				}
				if i > 0 && p.Line < problems[i-1].Line {
					t.Errorf("problem %q comes after %q", p, problems[i-1])
				}
			}
			return
		}
		if err := c.Validate(); err != nil {
			t.Fatalf("Validate of a parsed configuration:\n%v", err)
		}
		var b bytes.Buffer
		if err := c.Write(&b); err != nil {
			t.Fatal(err)
		}
		again, err := Parse(b.Bytes(), "again")
		if err != nil {
			t.Fatalf("Parse of\n%s\n%v", &b, err)
		}
		if diff := cmp.Diff(c, again, netipByValue); diff != "" {
			t.Fatalf("read back (-before +after):\n%s", diff)
		}
	})
}

// The default socket is one for each instance, whatever the order of the keys.
func TestSocketPath(t *testing.T) {
	for text, want := range map[string]string{
		"instance: edge1": "/run/gmgate/edge1.sock",
		"admin: {socket: \"/run/{instance}/a\"}\ninstance: b": "/run/b/a",
		"admin: {socket: /run/x}":                             "/run/x",
		"admin: {socket: \"\"}":                               "",
	} {
		c, err := Parse([]byte(text+"\ngm: {addresses: [10.0.0.5]}\nmw: {addresses: [10.0.1.5], next_hops: [\"10.0.1.9:5060\"]}\n"), "x")
		if err != nil {
			t.Errorf("%s: %v", text, err)
		} else if got := c.SocketPath(); got != want {
			t.Errorf("%s: %q, want %q", text, got, want)
		}
	}
}

func TestSIPURI(t *testing.T) {
	for uri, want := range map[string]bool{
		"sip:pcscf.example": true, "sip:pcscf.example:5060": true, "sip:gm+1@10.0.1.5": true, "sip:10.0.1.5:5062": true,
		"sip:[2001:db8::5]": true, "sip:[2001:db8::5]:5060": true,
		"pcscf.example": false, "sips:pcscf.example": false, "sip:": false, "sip:@pcscf.example": false,
		"sip:a b@pcscf.example": false, "sip:pcscf.example;lr": false, "sip:pcscf.example>": false,
		"sip:pcscf.example:0": false, "sip:pcscf.example:70000": false, "sip:2001:db8::5": false, "sip:[10.0.1.5]": false,
		"sip:0.0.0.0": false, "sip:a@b@c.example": false, "sip:pcscf.example\r\nX: y": false,
	} {
		if got := validSIPURI(uri); got != want {
			t.Errorf("%q: %t", uri, got)
		}
	}
}
