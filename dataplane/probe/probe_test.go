package probe

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/fstest"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
)

// tree is a file system of short files.
func tree(files map[string]string) fstest.MapFS {
	m := fstest.MapFS{}
	for name, text := range files {
		m[name] = &fstest.MapFile{Data: []byte(text), Mode: 0o644}
	}
	return m
}

// locked is a file system that refuses one file, as the kernel does with some sysctls.
type locked struct {
	fs.FS
	name string
}

func (l locked) Open(name string) (fs.File, error) {
	if name == l.name {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrPermission}
	}
	return l.FS.Open(name)
}

func zipped(t *testing.T, text string) string {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := z.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestReading(t *testing.T) {
	files := tree(map[string]string{
		"proc/sys/net/core/rmem_max": "212992\n", "proc/sys/net/ipv4/conf/eth0.100/rp_filter": "1\n",
		"proc/sys/net/core/bpf_jit_enable": "1\n", "proc/sys/kernel/osrelease": "6.1\n",
	})
	h := &Host{Files: locked{files, "proc/sys/net/core/bpf_jit_enable"}}
	for _, tt := range []struct {
		key             string
		value           string
		n               int64
		missing, denied bool
	}{
		{key: "net.core.rmem_max", value: "212992", n: 212992},
		{key: "net/ipv4/conf/eth0.100/rp_filter", value: "1", n: 1},
		{key: "kernel.osrelease", value: "6.1"},
		{key: "net.core.bpf_jit_enable", denied: true},
		{key: "net.core.absent", missing: true},
	} {
		r := h.Sysctl(tt.key)
		n, ok := r.Number()
		if r.Value != tt.value || n != tt.n || ok != (tt.n != 0) || r.Missing() != tt.missing || r.Denied() != tt.denied {
			t.Errorf("%s: %+v, number %d %t", tt.key, r, n, ok)
		}
	}
	sub, err := h.Sub("/proc/sys/net")
	if err != nil {
		t.Fatal(err)
	}
	if b, err := fs.ReadFile(sub, "core/rmem_max"); err != nil || string(b) != "212992\n" {
		t.Errorf("below /proc/sys/net: %q, %v", b, err)
	}
}

func TestKernel(t *testing.T) {
	for _, tt := range []struct {
		release      string
		major, minor int
		since512     bool
	}{
		{"6.1.0-18-amd64", 6, 1, true},
		{"5.12.0", 5, 12, true},
		{"5.11.22", 5, 11, false},
		{"4.19.0-26-cloud-amd64", 4, 19, false},
		{"mainline", 0, 0, false},
	} {
		h := &Host{Files: tree(map[string]string{"sys/kernel/btf/vmlinux": ""}), Uname: func() (string, string, error) { return tt.release, "x86_64", nil }}
		k, err := h.Kernel()
		want := Kernel{Release: tt.release, Machine: "x86_64", Major: tt.major, Minor: tt.minor, BTF: true}
		if err != nil || k != want || k.AtLeast(5, 12) != tt.since512 {
			t.Errorf("%s: %+v, %v", tt.release, k, err)
		}
	}
	broken := errors.New("no uname")
	h := &Host{Files: tree(nil), Uname: func() (string, string, error) { return "", "", broken }}
	if _, err := h.Kernel(); !errors.Is(err, broken) {
		t.Errorf("error %v", err)
	}
	h.Uname = func() (string, string, error) { return "6.1.0", "aarch64", nil }
	if k, err := h.Kernel(); err != nil || k.BTF {
		t.Errorf("without BTF: %+v, %v", k, err)
	}
}

func TestBPFFS(t *testing.T) {
	for mounts, want := range map[string]bool{
		"sysfs /sys sysfs rw 0 0\nbpf /sys/fs/bpf bpf rw,nosuid,mode=700 0 0\n": true,
		"sysfs /sys sysfs rw 0 0\nbpf /run/bpf bpf rw 0 0\n":                    false,
		"tmpfs /sys/fs/bpf tmpfs rw 0 0\n":                                      false,
	} {
		if got, err := (&Host{Files: tree(map[string]string{"proc/self/mounts": mounts})}).BPFFS(); got != want || err != nil {
			t.Errorf("%q: %t, %v", mounts, got, err)
		}
	}
	if _, err := (&Host{Files: tree(nil)}).BPFFS(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without /proc: %v", err)
	}
}

func TestModule(t *testing.T) {
	k := Kernel{Release: "6.1.0"}
	modules := map[string]string{
		"proc/modules":                       "esp4 28672 4 - Live 0x0000000000000000\nxfrm_algo 16384 1 esp4, Live 0x0\n",
		"lib/modules/6.1.0/modules.builtin":  "kernel/net/xfrm/xfrm_user.ko\n",
		"lib/modules/6.1.0/modules.dep":      "kernel/net/ipv6/esp6.ko.xz: kernel/net/xfrm/xfrm_algo.ko.xz\nkernel/net/ipv4/esp4-offload.ko:\n",
		"lib/modules/6.1.0/modules.softdeps": "kernel/net/tun.ko\n",
	}
	configs := "# CONFIG_INET6_ESP is not set\nCONFIG_INET_ESP=y\nCONFIG_INET_ESP_OFFLOAD=m\nCONFIG_XFRM_USER=y\n"
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  map[string]Module
	}{
		{"modules", modules, map[string]Module{
			"esp4": ModuleLoaded, "esp6": ModuleLoadable, "esp4_offload": ModuleLoadable, "xfrm_user": ModuleBuiltIn, "tun": ModuleAbsent,
		}},
		{"/proc/config.gz", map[string]string{"proc/config.gz": zipped(t, configs)}, map[string]Module{
			"esp4": ModuleBuiltIn, "esp6": ModuleAbsent, "esp4_offload": ModuleUnknown, "xfrm_user": ModuleBuiltIn, "dummy": ModuleUnknown,
		}},
		{"/boot", map[string]string{"boot/config-6.1.0": configs}, map[string]Module{"esp4": ModuleBuiltIn, "esp6": ModuleAbsent}},
		{"damaged configuration", map[string]string{"proc/config.gz": "CONFIG_INET_ESP=y"}, map[string]Module{"esp4": ModuleUnknown}},
		{"torn configuration", map[string]string{"proc/config.gz": zipped(t, configs)[:30]}, map[string]Module{"esp4": ModuleUnknown}},
		{"nothing", nil, map[string]Module{"esp4": ModuleUnknown}},
	} {
		h := &Host{Files: tree(tt.files)}
		for name, want := range tt.want {
			if got := h.Module(k, name); got != want {
				t.Errorf("%s: %s is %s, want %s", tt.name, name, got, want)
			}
		}
	}
	if got := Module(9).String(); got != "Module(0x9)" {
		t.Errorf("got %s", got)
	}
}

func TestDriver(t *testing.T) {
	files := tree(nil)
	files["sys/class/net/eth0"] = &fstest.MapFile{Mode: fs.ModeSymlink, Data: []byte("../../devices/pci/net/eth0")}
	files["sys/devices/pci/net/eth0/device/driver"] = &fstest.MapFile{Mode: fs.ModeSymlink, Data: []byte("../../../../bus/pci/drivers/ice")}
	h := &Host{Files: files}
	if got := h.Driver("eth0"); got != "ice" {
		t.Errorf("eth0: %q", got)
	}
	if got := h.Driver("veth0"); got != "" {
		t.Errorf("veth0: %q", got)
	}
}

func TestCapabilities(t *testing.T) {
	status := func(text string) *Host { return &Host{Files: tree(map[string]string{"proc/self/status": text})} }
	caps, err := status("Name:\tx\nCapPrm:\tffffffffffffffff\nCapEff:\t0000008000001000\nCapBnd:\t0\n").Capabilities()
	if err != nil || !caps.Has(CapNetAdmin) || !caps.Has(CapBPF) || caps.Has(CapSysAdmin) {
		t.Errorf("%x, %v", caps, err)
	}
	if got := caps.Lacking(CapNetRaw, CapNetAdmin, CapSysAdmin, CapNetBindService); !slices.Equal(got, []Cap{CapNetRaw, CapSysAdmin, CapNetBindService}) {
		t.Errorf("lacking %v", got)
	}
	for _, text := range []string{"Name:\tx\n", "CapEff:\tall\n"} {
		if _, err := status(text).Capabilities(); err == nil {
			t.Errorf("%q: no error", text)
		}
	}
	if _, err := (&Host{Files: tree(nil)}).Capabilities(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without /proc: %v", err)
	}
	if got := Cap(63).String(); got != "Cap(63)" {
		t.Errorf("got %s", got)
	}
}

func TestPlace(t *testing.T) {
	files := tree(map[string]string{"var/lib/gmgate/gmgate.db": "12345", "var/lib/file": ""})
	var asked []string
	refused := &fs.PathError{Op: "access", Err: unix.EROFS}
	h := &Host{Files: locked{files, "var/lib/gmgate/secret"}, Access: func(path string, mode uint32) error {
		asked = append(asked, path)
		if mode != unix.W_OK|unix.X_OK {
			t.Errorf("%s: mode %o", path, mode)
		}
		return refused
	}}
	for _, tt := range []struct {
		path, folder string
		size         int64 // negative: nothing there
	}{
		{"/var/lib/gmgate/gmgate.db", "/var/lib/gmgate", 5},
		{"/var/lib/gmgate/absent", "/var/lib/gmgate", -1},
		{"/var/lib/a/b/absent", "/var/lib", -1},
		{"/var/lib/file/absent", "/var/lib", -1},
		{"/absent", "/", -1},
	} {
		asked = nil
		p := h.Place(tt.path)
		size := int64(-1)
		if p.Info != nil {
			size = p.Info.Size()
		}
		if p.Folder != tt.folder || size != tt.size || (p.Err == nil) != (tt.size >= 0) || !slices.Equal(asked, []string{tt.folder}) {
			t.Errorf("%s: %+v, asked for %v", tt.path, p, asked)
		}
		if !errors.Is(p.Writable, unix.EROFS) {
			t.Errorf("%s: writable: %v", tt.path, p.Writable)
		}
	}
	if p := h.Place("/var/lib/gmgate/secret"); !errors.Is(p.Err, fs.ErrPermission) {
		t.Errorf("error %v", p.Err)
	}
}

// The host that the test runs on answers as it should.
func TestLocal(t *testing.T) {
	h := Local()
	if k, err := h.Kernel(); err != nil || k.Major < 3 || k.Machine == "" {
		t.Errorf("kernel %+v, %v", k, err)
	}
	if _, err := h.Capabilities(); err != nil {
		t.Error(err)
	}
	if n, err := h.Limit(unix.RLIMIT_NOFILE); err != nil || n < 3 {
		t.Errorf("limit %d, %v", n, err)
	}
	if _, err := h.Limit(-1); !errors.Is(err, unix.EINVAL) {
		t.Errorf("no such limit: %v", err)
	}
	if _, err := h.Clock(); err != nil {
		t.Error(err)
	}
	if h.CPUs < 1 {
		t.Errorf("%d CPUs", h.CPUs)
	}
	list, err := h.Links()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(list, func(l Link) bool {
		return l.Up && l.Carrier && slices.Contains(l.Addrs, netip.MustParseAddr("127.0.0.1"))
	}) {
		t.Errorf("no loopback: %+v", list)
	}
	if r := h.Sysctl("net.core.somaxconn"); r.Err != nil {
		t.Error(r.Err)
	}
}

func TestFiles(t *testing.T) {
	h, dir := Local(), t.TempDir()
	if err := h.Open("/dev/null"); err != nil {
		t.Error(err)
	}
	if err := h.Open(filepath.Join(dir, "absent")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("open: %v", err)
	}
	if err := h.Access(dir, unix.W_OK|unix.X_OK); err != nil {
		t.Error(err)
	}
	if err := h.Access("/proc/self/status", unix.X_OK); !errors.Is(err, fs.ErrPermission) { // for root as well
		t.Errorf("access: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if p := h.Place(filepath.Join(dir, "file")); p.Err != nil || p.Info.Mode() != 0o600 || p.Folder != dir || p.Writable != nil {
		t.Errorf("%+v", p)
	}
}

func TestBind(t *testing.T) {
	h := Local()
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		u, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(at)))
		if errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAFNOSUPPORT) {
			t.Logf("no IPv6: %v", err)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		udp, tcp := u.LocalAddr().(*net.UDPAddr).AddrPort(), l.Addr().(*net.TCPAddr).AddrPort()
		if err := h.Bind(udp, ims.UDP); !errors.Is(err, unix.EADDRINUSE) {
			t.Errorf("UDP %s: %v", udp, err)
		}
		if err := h.Bind(tcp, ims.TCP); !errors.Is(err, unix.EADDRINUSE) {
			t.Errorf("TCP %s: %v", tcp, err)
		}
		// A connection that the listener's side has closed keeps the port for a minute.
		c, err := net.Dial("tcp", tcp.String())
		if err != nil {
			t.Fatal(err)
		}
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(s.Close(), c.Close(), l.Close(), u.Close()); err != nil {
			t.Fatal(err)
		}
		if err := h.Bind(tcp, ims.TCP); err != nil {
			t.Errorf("TCP %s after its end: %v", tcp, err)
		}
		if err := h.Bind(udp, ims.UDP); err != nil {
			t.Errorf("UDP %s after its end: %v", udp, err)
		}
	}
	for _, tr := range []ims.Transport{ims.UDP, ims.TCP} {
		if err := h.Bind(netip.MustParseAddrPort("192.0.2.1:0"), tr); !errors.Is(err, unix.EADDRNOTAVAIL) {
			t.Errorf("an address of nobody: %v", err)
		}
	}
}
