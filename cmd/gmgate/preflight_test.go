package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/admin"
	"github.com/gmgate/gmgate/control/config"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/hostnet"
	"github.com/gmgate/gmgate/dataplane/probe"
	"github.com/gmgate/gmgate/dataplane/xfrm"
)

// hostTree is a file system of short files, and folders where the name ends with a slash.
type hostTree map[string]string

func (h hostTree) files() fstest.MapFS {
	m := fstest.MapFS{}
	for name, text := range h {
		if folder, ok := strings.CutSuffix(name, "/"); ok {
			m[folder] = &fstest.MapFile{Mode: fs.ModeDir | 0o755}
			continue
		}
		mode := fs.FileMode(0o644)
		if strings.HasSuffix(name, ".key") {
			mode = 0o600
		}
		m[name] = &fstest.MapFile{Data: []byte(text), Mode: mode}
	}
	return m
}

// goodTree are the files of a host on which all is well.
func goodTree() hostTree {
	t := hostTree{
		"proc/self/status": "CapEff:\t000001ffffffffff\n", "proc/self/mounts": "bpf /sys/fs/bpf bpf rw 0 0\n",
		"proc/modules": "esp4 28672 4 - Live 0x0\n", "lib/modules/6.1.0-18-amd64/modules.builtin": "kernel/net/xfrm/xfrm_user.ko\n",
		"lib/modules/6.1.0-18-amd64/modules.dep": "kernel/net/ipv6/esp6.ko.xz:\n", "sys/kernel/btf/vmlinux": "",
		"run/gmgate/": "", "var/lib/gmgate/gmgate.db": strings.Repeat("x", 32<<10), "var/lib/gmgate/gmgate.db.key": strings.Repeat("k", 32),
	}
	for key, value := range map[string]string{
		"kernel/unprivileged_bpf_disabled": "2", "net/core/bpf_jit_enable": "1", "fs/file-max": "9223372036854775807",
		"net/core/rmem_max": "212992", "net/core/wmem_max": "212992", "net/core/xfrm_larval_drop": "1", "net/core/xfrm_acq_expires": "30",
		"net/ipv4/tcp_fwmark_accept": "1", "net/ipv4/ip_local_port_range": "32768\t60999", "net/ipv4/ip_local_reserved_ports": "",
	} {
		t["proc/sys/"+key] = value + "\n"
	}
	for _, link := range []string{"all", "default", "eth0", "eth1.100", "lo"} {
		for _, key := range []string{"ipv4/conf/%s/rp_filter", "ipv4/conf/%s/disable_policy", "ipv4/conf/%s/disable_xfrm", "ipv6/conf/%s/disable_policy", "ipv6/conf/%s/disable_ipv6"} {
			t["proc/sys/net/"+fmt.Sprintf(key, link)] = "0\n"
		}
	}
	return t
}

var (
	hostAddrs = []string{"10.0.0.5", "2001:db8::5", "10.0.1.5"}
	errAccess = &fs.PathError{Op: "access", Err: unix.EACCES}
)

// goodHost is a preflight on a host on which all is well: a kernel with ESP, addresses on two interfaces, free ports.
func goodHost(file string, tree hostTree) *preflight {
	return &preflight{
		file: file, load: config.Load,
		host: &probe.Host{
			Files: tree.files(), CPUs: 4,
			Uname: func() (string, string, error) { return "6.1.0-18-amd64", "x86_64", nil },
			Limit: func(resource int) (uint64, error) {
				if resource == unix.RLIMIT_NOFILE {
					return 262144, nil
				}
				return probe.Unlimited, nil
			},
			Links: func() ([]probe.Link, error) {
				a := netip.MustParseAddr
				return []probe.Link{
					{Name: "lo", Up: true, Carrier: true, Loopback: true, Addrs: []netip.Addr{a("127.0.0.1"), a("::1")}},
					{Name: "eth0", Up: true, Carrier: true, Ethernet: true, Addrs: []netip.Addr{a("10.0.0.5"), a("2001:db8::5"), a("fe80::1%eth0")}},
					{Name: "eth1.100", Up: true, Carrier: true, Ethernet: true, Addrs: []netip.Addr{a("10.0.1.5")}},
				}, nil
			},
			Bind: func(at netip.AddrPort, _ ims.Transport) error {
				if !slices.Contains(hostAddrs, at.Addr().String()) && !at.Addr().IsLoopback() {
					return os.NewSyscallError("bind", unix.EADDRNOTAVAIL)
				}
				return nil
			},
			Open:   func(string) error { return nil },
			Access: func(string, uint32) error { return nil },
			Clock:  func() (bool, error) { return true, nil },
		},
		esp: func() xfrm.Support {
			return xfrm.Support{V4: true, V6: true, Suites: ims.Suites(), LargeWindow: true, Reason: "kernel ESP for IPv4 and IPv6, 8 of 8 algorithm pairs"}
		},
		namespace: func() error { return nil },
		status: func(_ context.Context, path string) (admin.Status, error) {
			return admin.Status{}, &admin.Error{Text: "there is no socket " + path}
		},
		hooks: func(_ *config.Config, _ bool, interfaces []string) []probe.Hook {
			list := make([]probe.Hook, 0, len(interfaces))
			for _, i := range interfaces {
				list = append(list, probe.Hook{Interface: i, Hook: "xdp", Reason: "the driver runs it before there is a packet buffer"})
			}
			return list
		},
	}
}

// refusing is a file system that refuses one file, as the kernel does with some sysctls.
type refusing struct {
	fs.FS
	name string
}

func (r refusing) Open(name string) (fs.File, error) {
	if name == r.name {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrPermission}
	}
	return r.FS.Open(name)
}

// refuse returns a change after which a file may not be read.
func refuse(name string) func(*preflight, fstest.MapFS) {
	return func(p *preflight, files fstest.MapFS) { p.host.Files = refusing{files, name} }
}

// configure returns a change of the configuration.
func configure(change func(c *config.Config)) func(*preflight, fstest.MapFS) {
	return func(p *preflight, _ fstest.MapFS) {
		p.load = func(file string) (*config.Config, error) {
			c, err := config.Load(file)
			if err == nil {
				change(c)
			}
			return c, err
		}
	}
}

// noFile returns a change after which no file is named, and the default one cannot be read.
func noFile(err error) func(*preflight, fstest.MapFS) {
	return func(p *preflight, _ fstest.MapFS) {
		p.file, p.load = "", func(string) (*config.Config, error) { return nil, err }
	}
}

// inUse makes ports belong to somebody else.
func inUse(p *preflight, t ims.Transport, ports ...uint16) {
	bind := p.host.Bind
	p.host.Bind = func(at netip.AddrPort, with ims.Transport) error {
		switch {
		case with == t && slices.Contains(ports, at.Port()):
			return os.NewSyscallError("bind", unix.EADDRINUSE)
		case at.Port() > 0 && at.Port() < 1024 && !strings.Contains(p.host.Read("/proc/self/status").Value, "ffff"):
			return os.NewSyscallError("bind", unix.EACCES)
		}
		return bind(at, with)
	}
}

// badHost is one on which everything is wrong that can be with the kernel's ESP.
func badHost(file string) *preflight {
	tree := goodTree()
	maps.Copy(tree, hostTree{
		"proc/self/status": "CapEff:\t0000000000002000\n", "proc/self/mounts": "", "proc/modules": "esp4 1 0\nesp4_offload 1 0\n",
		"lib/modules/5.10.0-28-amd64/modules.builtin": "", "lib/modules/5.10.0-28-amd64/modules.dep": "kernel/net/xfrm/xfrm_user.ko\n",
		"proc/sys/kernel/unprivileged_bpf_disabled": "0", "proc/sys/net/core/bpf_jit_enable": "0", "proc/sys/fs/file-max": "65536",
		"proc/sys/net/core/xfrm_larval_drop": "0", "proc/sys/net/core/xfrm_acq_expires": "300", "proc/sys/net/ipv4/tcp_fwmark_accept": "0",
		"proc/sys/net/ipv4/ip_local_reserved_ports": "9000,40000", "proc/sys/net/ipv4/conf/all/rp_filter": "1",
		"proc/sys/net/ipv4/conf/eth0/disable_xfrm": "1", "proc/sys/net/ipv4/conf/eth1.100/disable_policy": "1",
		"proc/sys/net/ipv6/conf/eth0/disable_ipv6": "1", "run/gmgate/lab.sock": "no socket", "srv/gmgate/gmgate.db": "x", "srv/keys/": "",
	})
	delete(tree, "sys/kernel/btf/vmlinux")
	p := goodHost(file, tree)
	p.host.Uname = func() (string, string, error) { return "5.10.0-28-amd64", "aarch64", nil }
	p.host.Limit = func(int) (uint64, error) { return 1024, nil }
	p.host.Clock = func() (bool, error) { return false, nil }
	links := p.host.Links
	p.host.Links = func() ([]probe.Link, error) {
		list, err := links()
		list[2].Up = false
		return list, err
	}
	inUse(p, ims.UDP, 40001)
	p.esp = func() xfrm.Support {
		s := xfrm.Support{V4: true, V6: true, Reason: "kernel ESP for IPv4 and IPv6, 5 of 8 algorithm pairs, replay window 32"}
		for _, suite := range ims.Suites() {
			if suite.Alg == ims.AlgHMACMD5 {
				s.Missing = append(s.Missing, xfrm.Missing{Suite: suite, Err: fmt.Errorf("%w: %w", xfrm.ErrNoAlgorithm, unix.ENOSYS)})
			} else {
				s.Suites = append(s.Suites, suite)
			}
		}
		return s
	}
	p.hooks = func(_ *config.Config, _ bool, interfaces []string) []probe.Hook {
		return []probe.Hook{{Interface: interfaces[0], Hook: "none", Err: fmt.Errorf("attach to %s: %w", interfaces[0], unix.EBUSY)}}
	}
	return p
}

// lookingOn is an ordinary user on a good host without ESP.
func lookingOn(file string) *preflight {
	tree := goodTree()
	tree["proc/self/status"] = "CapEff:\t0000000000000000\n"
	p := goodHost(file, tree)
	p.host.UID = 1000
	p.host.Open = func(string) error { return &fs.PathError{Op: "open", Err: unix.EACCES} }
	p.host.Access = func(string, uint32) error { return errAccess }
	p.esp = func() xfrm.Support { return xfrm.Unsupported(fmt.Errorf("%w: %w", xfrm.ErrPermission, unix.EPERM)) }
	p.namespace = func() error { panic("not without CAP_SYS_ADMIN") }
	p.hooks = func(_ *config.Config, _ bool, interfaces []string) []probe.Hook {
		return []probe.Hook{{Interface: interfaces[0], Hook: "none", Err: unix.EPERM}}
	}
	inUse(p, ims.TCP, 6100)
	return p
}

// What preflight says of made-up hosts: text, JSON and exit status.
func TestPreflight(t *testing.T) {
	const dir = "testdata/preflight/"
	for name, host := range map[string]func() *preflight{
		"good":  func() *preflight { return goodHost(dir+"dual.yaml", goodTree()) },
		"bad":   func() *preflight { return badHost(dir + "lab.yaml") },
		"plain": func() *preflight { return lookingOn(dir + "plain.yaml") },
	} {
		t.Run(name, func(t *testing.T) {
			var text, asJSON, stderr bytes.Buffer
			code := host().report(t.Context(), false, newConsole(&text, false), &stderr)
			if again := host().report(t.Context(), true, newConsole(&asJSON, false), &stderr); again != code || stderr.Len() > 0 {
				t.Errorf("exit status %d and %d, errors %q", code, again, stderr.String())
			}
			if strings.Contains(text.String(), "\x1b") {
				t.Error("colours without a terminal")
			}
			for l := range strings.Lines(text.String()) {
				if n := utf8.RuneCountInString(strings.TrimSuffix(l, "\n")); n > demoWidth {
					t.Errorf("%d columns: %s", n, l)
				}
			}
			golden(t, dir+name+".golden", fmt.Sprintf("%sexit status %d\n", &text, code))
			golden(t, dir+name+".json", asJSON.String())
		})
	}
}

// golden compares with a file, or writes it with -update.
func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}

// find returns what was said under a name.
func (r *findings) find(name string) (finding, bool) {
	i := slices.IndexFunc(r.Checks, func(f finding) bool { return f.Group+"/"+f.Name == name })
	if i < 0 {
		return finding{}, false
	}
	return r.Checks[i], true
}

// Each case changes one thing of the good host and looks at what is said of it.
func TestPreflightFindings(t *testing.T) {
	const dual, plain = "testdata/preflight/dual.yaml", "testdata/preflight/plain.yaml"
	failed := errors.New("refused by a test")
	for _, tt := range []struct {
		name   string
		change func(p *preflight, files fstest.MapFS)
		file   string // default dual
		want   string // group/name
		state  verdict
		text   string // in value, detail or hint
	}{
		{name: "no configuration", file: "testdata/absent.yaml", want: "configuration/file", state: verdictFail, text: "no such file"},
		{name: "wrong configuration", file: "testdata/preflight/wrong.yaml", want: "configuration/file", state: verdictFail, text: "gmgate check -c testdata/preflight/wrong.yaml"},
		{name: "no default configuration", change: noFile(fs.ErrNotExist), want: "configuration/file", state: verdictNote, text: "the host alone is checked"},
		{name: "secret default configuration", change: noFile(errAccess), want: "configuration/file", state: verdictNote, text: "needs root"},
		{name: "backend without a configuration", change: noFile(fs.ErrNotExist), want: "esp/backend", state: verdictOK, text: "xfrm"},
		{name: "ports without a configuration", change: noFile(fs.ErrNotExist), want: "sysctl/net.ipv4.ip_local_reserved_ports", state: verdictOK, text: "32768 to 60999"},
		{
			name: "running",
			change: func(p *preflight, _ fstest.MapFS) {
				p.status = func(_ context.Context, path string) (admin.Status, error) {
					if path != "/run/gmgate/edge1.sock" {
						return admin.Status{}, failed
					}
					return admin.Status{Version: "v1", Instance: "edge1", Backend: "xfrm", UEs: 7}, nil
				}
			},
			want: "configuration/running", state: verdictNote, text: "instance edge1",
		},
		{
			name: "ports of the running one",
			change: func(p *preflight, _ fstest.MapFS) {
				p.status = func(context.Context, string) (admin.Status, error) { return admin.Status{}, nil }
				inUse(p, ims.UDP, 6113)
			},
			want: "ports/10.0.0.5 udp", state: verdictNote, text: "by the running gmgate",
		},
		{
			name: "guard of the running one",
			change: func(p *preflight, _ fstest.MapFS) {
				p.status = func(context.Context, string) (admin.Status, error) { return admin.Status{}, nil }
				p.hooks = func(*config.Config, bool, []string) []probe.Hook { panic("a second guard beside it") }
			},
			want: "guard/running", state: verdictNote, text: "gmgate drops",
		},
		{
			name: "pinned guard of the running one",
			change: func(p *preflight, files fstest.MapFS) {
				p.status = func(context.Context, string) (admin.Status, error) { return admin.Status{}, nil }
				files["sys/fs/bpf/gmgate/edge1"] = &fstest.MapFile{Mode: fs.ModeDir | 0o700}
			},
			want: "guard/eth0", state: verdictOK, text: "xdp",
		},
		{
			name: "foreign socket",
			change: func(p *preflight, _ fstest.MapFS) {
				p.status = func(context.Context, string) (admin.Status, error) { return admin.Status{}, errAccess }
			},
			want: "configuration/running", state: verdictNote, text: "needs root",
		},
		{
			name: "no uname",
			change: func(p *preflight, _ fstest.MapFS) {
				p.host.Uname = func() (string, string, error) { return "", "", failed }
			},
			want: "kernel/release", state: verdictNote, text: "refused by a test",
		},
		{
			name: "kernel without what the guard's programs call",
			change: func(p *preflight, _ fstest.MapFS) {
				p.host.Uname = func() (string, string, error) { return "5.15.0-91-generic", "x86_64", nil }
			},
			want: "kernel/release", state: verdictWarn, text: "5.18 or later",
		},
		{
			name: "oldest kernel with it",
			change: func(p *preflight, _ fstest.MapFS) {
				p.host.Uname = func() (string, string, error) { return "5.18.0", "x86_64", nil }
			},
			want: "kernel/release", state: verdictOK, text: "5.18.0",
		},
		{
			name:   "no eBPF",
			change: func(_ *preflight, files fstest.MapFS) { delete(files, "proc/sys/kernel/unprivileged_bpf_disabled") },
			want:   "ebpf/bpf", state: verdictWarn, text: "CONFIG_BPF_SYSCALL",
		},
		{name: "secret eBPF", change: refuse("proc/sys/kernel/unprivileged_bpf_disabled"), want: "ebpf/kernel.unprivileged_bpf_disabled", state: verdictNote, text: "needs root"},
		{name: "secret JIT", change: refuse("proc/sys/net/core/bpf_jit_enable"), want: "ebpf/net.core.bpf_jit_enable", state: verdictNote, text: "needs root"},
		{
			name:   "no JIT",
			change: func(_ *preflight, files fstest.MapFS) { delete(files, "proc/sys/net/core/bpf_jit_enable") },
			want:   "ebpf/net.core.bpf_jit_enable", state: verdictWarn, text: "CONFIG_BPF_JIT",
		},
		{
			name: "JIT that tells",
			change: func(_ *preflight, files fstest.MapFS) {
				files["proc/sys/net/core/bpf_jit_enable"] = &fstest.MapFile{Data: []byte("2")}
			},
			want: "ebpf/net.core.bpf_jit_enable", state: verdictWarn, text: "kernel's log",
		},
		{
			name:   "no mounts",
			change: func(_ *preflight, files fstest.MapFS) { delete(files, "proc/self/mounts") },
			want:   "ebpf/bpffs", state: verdictNote, text: "unknown",
		},
		{
			name: "auto on a kernel without ESP",
			change: func(p *preflight, _ fstest.MapFS) {
				p.esp = func() xfrm.Support { return xfrm.Unsupported(xfrm.ErrNoESP) }
			},
			want: "esp/backend", state: verdictOK, text: "auto: kernel has no ESP",
		},
		{
			name: "xfrm on a kernel without ESP",
			change: func(p *preflight, files fstest.MapFS) {
				configure(func(c *config.Config) { c.ESP.Backend = config.BackendXFRM })(p, files)
				p.esp = func() xfrm.Support { return xfrm.Unsupported(xfrm.ErrNoESP) }
			},
			want: "esp/backend", state: verdictFail, text: "modprobe -a esp4 esp6 xfrm_user",
		},
		{
			name: "auto without privileges",
			change: func(p *preflight, _ fstest.MapFS) {
				p.esp = func() xfrm.Support { return xfrm.Unsupported(xfrm.ErrPermission) }
			},
			want: "esp/backend", state: verdictNote, text: "needs root",
		},
		{
			name: "auto with half a kernel",
			change: func(p *preflight, _ fstest.MapFS) {
				p.esp = func() xfrm.Support {
					return xfrm.Support{V4: true, Suites: ims.Suites(), LargeWindow: true, Reason: "kernel ESP for IPv4 only"}
				}
			},
			want: "esp/backend", state: verdictOK, text: "kernel cannot do ESP for 2001:db8::5",
		},
		{
			name: "no TUN", file: plain,
			change: func(p *preflight, _ fstest.MapFS) { p.host.Open = func(string) error { return fs.ErrNotExist } },
			want:   "privileges//dev/net/tun", state: verdictFail, text: "modprobe tun",
		},
		{
			name: "TUN not for us", file: plain,
			change: func(p *preflight, _ fstest.MapFS) { p.host.Open = func(string) error { return errAccess } },
			want:   "privileges//dev/net/tun", state: verdictFail, text: "DeviceAllow",
		},
		{
			name: "no namespaces", file: plain,
			change: func(p *preflight, _ fstest.MapFS) { p.namespace = func() error { return failed } },
			want:   "privileges/namespace", state: verdictFail, text: "refused by a test",
		},
		{
			name: "half the capabilities", file: plain,
			change: func(_ *preflight, files fstest.MapFS) {
				files["proc/self/status"] = &fstest.MapFile{Data: []byte("CapEff:\t1000\n")}
			},
			want: "privileges/capabilities", state: verdictFail, text: "CAP_NET_RAW CAP_SYS_ADMIN for backend userspace",
		},
		{
			name:   "no links",
			change: func(p *preflight, _ fstest.MapFS) { p.host.Links = func() ([]probe.Link, error) { return nil, failed } },
			want:   "addresses/interfaces", state: verdictNote, text: "refused by a test",
		},
		{
			name:   "local by a route",
			change: func(p *preflight, _ fstest.MapFS) { p.host.Links = func() ([]probe.Link, error) { return nil, nil } },
			want:   "addresses/gm 2001:db8::5", state: verdictNote, text: "by a route",
		},
		{
			name: "no carrier",
			change: func(p *preflight, _ fstest.MapFS) {
				links := p.host.Links
				p.host.Links = func() ([]probe.Link, error) {
					list, err := links()
					list[1].Carrier = false
					return list, err
				}
			},
			want: "addresses/gm 10.0.0.5", state: verdictWarn, text: "no carrier",
		},
		{
			name: "tentative",
			change: func(p *preflight, _ fstest.MapFS) {
				bind := p.host.Bind
				p.host.Bind = func(at netip.AddrPort, t ims.Transport) error {
					if at.Addr().Is6() {
						return unix.EADDRNOTAVAIL
					}
					return bind(at, t)
				}
			},
			want: "addresses/gm 2001:db8::5", state: verdictFail, text: "tentative",
		},
		{
			name: "protected port of another in clear", file: plain,
			change: func(p *preflight, _ fstest.MapFS) { inUse(p, ims.UDP, 6110) },
			want:   "ports/10.0.0.5 udp", state: verdictNote, text: "another namespace",
		},
		{
			name:   "metrics",
			change: func(p *preflight, _ fstest.MapFS) { inUse(p, ims.TCP, 9464) },
			want:   "ports/metrics 127.0.0.1:9464", state: verdictFail, text: "ss -ltnp 'sport = :9464'",
		},
		{
			name: "a port that cannot be",
			change: func(p *preflight, _ fstest.MapFS) {
				bind := p.host.Bind
				p.host.Bind = func(at netip.AddrPort, t ims.Transport) error {
					if at.Port() == 6101 {
						return failed
					}
					return bind(at, t)
				}
			},
			want: "ports/10.0.0.5 tcp", state: verdictFail, text: "refused by a test",
		},
		{
			name: "guard without privileges",
			change: func(p *preflight, _ fstest.MapFS) {
				p.hooks = func(*config.Config, bool, []string) []probe.Hook {
					return []probe.Hook{{Interface: "eth0", Hook: "none", Err: unix.EPERM}}
				}
			},
			want: "guard/eth0", state: verdictWarn, text: "CAP_BPF",
		},
		{
			name: "guard for an address of the loopback interface",
			change: func(p *preflight, _ fstest.MapFS) {
				links := p.host.Links
				p.host.Links = func() ([]probe.Link, error) {
					list, err := links()
					list[0].Addrs, list[1].Addrs = append(list[0].Addrs, list[1].Addrs...), nil
					return list, err
				}
			},
			want: "guard/eth1.100", state: verdictOK, text: "xdp",
		},
		{
			name: "policies off where phones come in for an address of the loopback interface",
			change: func(p *preflight, files fstest.MapFS) {
				files["proc/sys/net/ipv4/conf/eth0/disable_policy"] = &fstest.MapFile{Data: []byte("1")}
				links := p.host.Links
				p.host.Links = func() ([]probe.Link, error) {
					list, err := links()
					list[0].Addrs, list[1].Addrs = append(list[0].Addrs, list[1].Addrs...), nil
					return list, err
				}
			},
			want: "sysctl/net.ipv4.conf.eth0.disable_policy", state: verdictFail, text: "disable_policy=0",
		},
		{
			name: "guard without an interface",
			change: func(p *preflight, _ fstest.MapFS) {
				p.host.Links = func() ([]probe.Link, error) { return []probe.Link{}, nil }
			},
			want: "guard/interfaces", state: verdictWarn, text: "guard.interfaces",
		},
		{
			name: "guard that has to be, without an interface",
			change: func(p *preflight, files fstest.MapFS) {
				configure(func(c *config.Config) { c.Guard.Mode = config.GuardXDP })(p, files)
				p.host.Links = func() ([]probe.Link, error) { return []probe.Link{}, nil }
			},
			want: "guard/interfaces", state: verdictFail, text: "guard.interfaces",
		},
		{
			name: "guard on an interface that there is not",
			change: func(p *preflight, files fstest.MapFS) {
				configure(func(c *config.Config) { c.Guard.Interfaces = []string{"eth9"} })(p, files)
				p.hooks = func(*config.Config, bool, []string) []probe.Hook {
					return []probe.Hook{{Interface: "eth9", Hook: "none", Reason: "there is no such interface"}}
				}
			},
			want: "guard/eth9", state: verdictWarn, text: "correct guard.interfaces",
		},
		{
			name: "guard at a later hook",
			change: func(p *preflight, _ fstest.MapFS) {
				p.hooks = func(*config.Config, bool, []string) []probe.Hook {
					return []probe.Hook{{Interface: "eth0", Hook: "tcx", Reason: "no XDP on this driver", Err: failed}}
				}
			},
			want: "guard/eth0", state: verdictNote, text: "no XDP on this driver",
		},
		{
			name: "policies off where the userspace backend does not mind", file: plain,
			change: func(_ *preflight, files fstest.MapFS) {
				files["proc/sys/net/ipv4/conf/eth0/disable_policy"] = &fstest.MapFile{Data: []byte("1")}
			},
			want: "sysctl/net.ipv4.conf.eth0.disable_policy", state: verdictNote, text: "does not matter",
		},
		{
			name: "policies off everywhere",
			change: func(_ *preflight, files fstest.MapFS) {
				files["proc/sys/net/ipv4/conf/all/disable_policy"] = &fstest.MapFile{Data: []byte("1")}
			},
			want: "sysctl/net.ipv4.conf.all.disable_policy", state: verdictFail, text: "sysctl -w net.ipv4.conf.all.disable_policy=0",
		},
		{
			name: "ports given to others where the userspace backend does not mind", file: plain,
			change: func(_ *preflight, files fstest.MapFS) {
				files["proc/sys/net/ipv4/ip_local_port_range"] = &fstest.MapFile{Data: []byte("6100\t60999\n")}
			},
			want: "sysctl/net.ipv4.ip_local_reserved_ports", state: verdictOK, text: "6100 to 60999",
		},
		{
			name: "ports given to others",
			change: func(_ *preflight, files fstest.MapFS) {
				files["proc/sys/net/ipv4/ip_local_port_range"] = &fstest.MapFile{Data: []byte("5061\t60999\n")}
			},
			want: "sysctl/net.ipv4.ip_local_reserved_ports", state: verdictWarn, text: "=5061-5063,6100-6101,6110-6113",
		},
		{
			name: "no IPv6",
			change: func(_ *preflight, files fstest.MapFS) {
				for name := range files {
					if strings.HasPrefix(name, "proc/sys/net/ipv6/") {
						delete(files, name)
					}
				}
			},
			want: "sysctl/net.ipv6.conf.all.disable_ipv6", state: verdictFail, text: "ipv6.disable=1",
		},
		{
			name:   "interface without IPv6",
			change: func(_ *preflight, files fstest.MapFS) { delete(files, "proc/sys/net/ipv6/conf/eth0/disable_ipv6") },
			want:   "sysctl/net.ipv6.conf.all.disable_ipv6", state: verdictOK, text: "0",
		},
		{
			name: "IPv6 switched off and on again where it is needed",
			change: func(_ *preflight, files fstest.MapFS) {
				files["proc/sys/net/ipv6/conf/all/disable_ipv6"] = &fstest.MapFile{Data: []byte("1")}
			},
			want: "sysctl/net.ipv6.conf.all.disable_ipv6", state: verdictNote, text: "holds for it",
		},
		{
			name: "secret IPv6", change: refuse("proc/sys/net/ipv6/conf/eth0/disable_ipv6"),
			want: "sysctl/net.ipv6.conf.eth0.disable_ipv6", state: verdictNote, text: "needs root",
		},
		{
			name: "settings of another namespace",
			change: func(_ *preflight, files fstest.MapFS) {
				delete(files, "proc/sys/net/core/rmem_max")
				delete(files, "proc/sys/net/ipv4/conf/eth0/rp_filter")
			},
			want: "sysctl/net.core.wmem_max", state: verdictOK, text: "CAP_NET_ADMIN goes beyond it",
		},
		{
			name: "small buffers",
			change: func(_ *preflight, files fstest.MapFS) {
				files["proc/self/status"] = &fstest.MapFile{Data: []byte("CapEff:\t0000000000002000\n")}
			},
			want: "sysctl/net.core.rmem_max", state: verdictWarn, text: "sysctl -w net.core.rmem_max=4194304",
		},
		{
			name:   "no limits",
			change: func(p *preflight, _ fstest.MapFS) { p.host.Limit = func(int) (uint64, error) { return 0, failed } },
			want:   "limits/open files", state: verdictNote, text: "refused by a test",
		},
		{
			name: "a new store",
			change: func(_ *preflight, files fstest.MapFS) {
				delete(files, "var/lib/gmgate/gmgate.db")
				delete(files, "var/lib/gmgate/gmgate.db.key")
			},
			want: "files/key", state: verdictOK, text: "will be made",
		},
		{
			name:   "lost key",
			change: func(_ *preflight, files fstest.MapFS) { delete(files, "var/lib/gmgate/gmgate.db.key") },
			want:   "files/key", state: verdictWarn, text: "phones register anew",
		},
		{
			name:   "open key",
			change: func(_ *preflight, files fstest.MapFS) { files["var/lib/gmgate/gmgate.db.key"].Mode = 0o640 },
			want:   "files/key", state: verdictFail, text: "chmod 0600 /var/lib/gmgate/gmgate.db.key",
		},
		{
			name:   "half a key",
			change: func(_ *preflight, files fstest.MapFS) { files["var/lib/gmgate/gmgate.db.key"].Data = []byte("half") },
			want:   "files/key", state: verdictFail, text: "not a file of 32 octets",
		},
		{
			name: "store of another user",
			change: func(p *preflight, _ fstest.MapFS) {
				p.host.Access = func(path string, _ uint32) error {
					if path == "/var/lib/gmgate/gmgate.db" {
						return errAccess
					}
					return nil
				}
			},
			want: "files/store", state: verdictFail, text: "chown gmgate /var/lib/gmgate/gmgate.db",
		},
		{
			name: "store that a user cannot see to",
			change: func(p *preflight, files fstest.MapFS) {
				files["proc/self/status"] = &fstest.MapFile{Data: []byte("CapEff:\t0\n")}
				p.host.UID, p.host.Access = 1000, func(string, uint32) error { return errAccess }
			},
			want: "files/store", state: verdictNote, text: "this user may not write to /var/lib/gmgate",
		},
		{
			name: "pins of another user",
			change: func(p *preflight, files fstest.MapFS) {
				files["sys/fs/bpf/gmgate/edge1"] = &fstest.MapFile{Mode: fs.ModeDir | 0o700}
				p.host.Access = func(path string, _ uint32) error {
					if path == "/sys/fs/bpf/gmgate/edge1" {
						return errAccess
					}
					return nil
				}
			},
			want: "files/pin", state: verdictFail, text: "gmgate bpf unload -pin /sys/fs/bpf/gmgate/edge1",
		},
		{
			name: "no pins for this user",
			change: func(p *preflight, files fstest.MapFS) {
				files["sys/fs/bpf"] = &fstest.MapFile{Mode: fs.ModeDir | 0o700}
				p.host.Access = func(path string, _ uint32) error {
					if path == "/sys/fs/bpf" {
						return errAccess
					}
					return nil
				}
			},
			want: "files/pin", state: verdictWarn, text: "install -d -m 0700 -o gmgate /sys/fs/bpf/gmgate",
		},
		{
			name: "another gmgate in the namespace",
			change: func(_ *preflight, files fstest.MapFS) {
				files["proc/thread-self/net/unix"] = &fstest.MapFile{Data: []byte(
					"Num       RefCount Protocol Flags    Type St Inode Path\n" +
						"ffff8880: 00000002 00000000 00010000 0001 01 21873 @gmgate-xfrm-26477\n")}
			},
			want: "esp/owner", state: verdictFail, text: "esp.backend: userspace",
		},
		{
			name: "no store but a folder",
			change: func(_ *preflight, files fstest.MapFS) {
				files["var/lib/gmgate/gmgate.db"] = &fstest.MapFile{Mode: fs.ModeDir | 0o755}
			},
			want: "files/store", state: verdictFail, text: "not a regular file",
		},
		{
			name: "credential", change: configure(func(c *config.Config) { c.Store.Credential = "seal" }),
			want: "files/key", state: verdictNote, text: "credential seal",
		},
		{name: "secret key", change: refuse("var/lib/gmgate/gmgate.db.key"), want: "files/key", state: verdictNote, text: "needs root"},
		{
			name: "key elsewhere, not to be made",
			change: func(p *preflight, files fstest.MapFS) {
				configure(func(c *config.Config) { c.Store.KeyFile = "/etc/keys/gmgate.key" })(p, files)
				delete(files, "var/lib/gmgate/gmgate.db")
			},
			want: "files/key", state: verdictFail, text: "/etc/keys does not exist",
		},
		{
			name: "key elsewhere, of another user",
			change: func(p *preflight, files fstest.MapFS) {
				configure(func(c *config.Config) { c.Store.KeyFile = "/etc/keys/gmgate.key" })(p, files)
				delete(files, "var/lib/gmgate/gmgate.db")
				p.host.Access = func(path string, _ uint32) error {
					if path == "/" {
						return errAccess
					}
					return nil
				}
			},
			want: "files/key", state: verdictFail, text: "install -d -m 0700 -o gmgate /etc/keys",
		},
		{
			name: "read-only",
			change: func(p *preflight, _ fstest.MapFS) {
				p.host.Access = func(string, uint32) error { return &fs.PathError{Op: "access", Err: unix.EROFS} }
			},
			want: "files/store", state: verdictFail, text: "read-only",
		},
		{
			name:   "no folder of the socket",
			change: func(_ *preflight, files fstest.MapFS) { delete(files, "run/gmgate") },
			want:   "files/admin socket", state: verdictFail, text: "mkdir -p /run/gmgate",
		},
		{
			name: "folder of the socket to be made",
			change: func(_ *preflight, files fstest.MapFS) {
				delete(files, "run/gmgate")
				files["run"] = &fstest.MapFile{Mode: fs.ModeDir | 0o755}
			},
			want: "files/admin socket", state: verdictOK, text: "will be made",
		},
		{
			name:   "no clock",
			change: func(p *preflight, _ fstest.MapFS) { p.host.Clock = func() (bool, error) { return false, failed } },
			want:   "clock/synchronised", state: verdictNote, text: "refused by a test",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := dual
			if tt.file != "" {
				file = tt.file
			}
			p := goodHost(file, goodTree())
			if tt.change != nil {
				tt.change(p, p.host.Files.(fstest.MapFS))
			}
			p.run(t.Context())
			f, ok := p.results.find(tt.want)
			if !ok {
				t.Fatalf("nothing is said of %s: %+v", tt.want, p.results.Checks)
			}
			if f.State != tt.state || !strings.Contains(f.Value+"\n"+f.Detail+"\n"+f.Hint, tt.text) {
				t.Errorf("%+v, want %s and %q", f, tt.state, tt.text)
			}
			if (f.State == verdictWarn || f.State == verdictFail) && f.Hint == "" {
				t.Errorf("%+v: what is to be done?", f)
			}
		})
	}
}

// Who can speak to the Mw sockets, and how to keep phones from it.
func TestPreflightMwAccess(t *testing.T) {
	sources := []netip.Prefix{netip.MustParsePrefix("10.0.1.0/24")}
	for _, tt := range []struct {
		name, link string
		sources    []netip.Prefix
		moved      bool // the Mw address is on the interface of the phones
		state      verdict
		text       string
	}{
		{"own interface", "eth1.100", nil, false, verdictOK, "by eth1.100"},
		{"no such interface", "eth7", sources, false, verdictFail, "no interface eth7"},
		{"open", "", nil, false, verdictWarn, "mw.interface: eth1.100"},
		{"open, one interface", "", nil, true, verdictWarn, "mw.sources"},
		{"sources", "", sources, false, verdictOK, "by source"},
		{"interface of the phones", "eth0", nil, true, verdictWarn, "mw.sources"},
		{"interface of the phones and sources", "eth0", sources, true, verdictNote, "the network"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := goodHost("testdata/preflight/dual.yaml", goodTree())
			p.run(t.Context())
			if tt.moved {
				links := p.host.Links
				p.host.Links = func() ([]probe.Link, error) {
					list, err := links()
					list[1].Addrs, list[2].Addrs = append(list[1].Addrs, list[2].Addrs...), nil
					return list, err
				}
			}
			p.cfg.Mw.Interface, p.cfg.Mw.Sources = tt.link, tt.sources
			p.results.Checks, p.gm = nil, nil
			p.checkAddresses(t.Context())
			i := slices.IndexFunc(p.results.Checks, func(f finding) bool { return f.Name == "mw access" })
			if i < 0 {
				t.Fatalf("nothing is said: %+v", p.results.Checks)
			}
			f := p.results.Checks[i]
			if f.State != tt.state || !strings.Contains(f.Value+"\n"+f.Detail+"\n"+f.Hint, tt.text) {
				t.Errorf("%+v, want %s and %q", f, tt.state, tt.text)
			}
			if only := "mw.interface: "; tt.moved && strings.Contains(f.Hint, only) {
				t.Errorf("%+v: that does not help", f)
			}
		})
	}
}

// Nothing but the change of TestPreflightFindings is wrong with the good host.
func TestPreflightGoodHost(t *testing.T) {
	p := goodHost("testdata/preflight/dual.yaml", goodTree())
	p.run(t.Context())
	for _, f := range p.results.Checks {
		if f.State != verdictOK {
			t.Errorf("%+v", f)
		}
	}
}

func TestPreflightColours(t *testing.T) {
	var b bytes.Buffer
	c := &console{w: &b, colour: true}
	c.findings(&findings{Failed: 1, Checks: []finding{{Group: "a", Name: "b", State: verdictFail, Value: "c\x1b[2J", Hint: "d"}, {Group: "a", Name: "longer", State: verdictOK}}})
	want := "\x1b[1ma\x1b[0m\n  \x1b[31mfail\x1b[0m  b       c?[2J\n        \x1b[36m→ d\x1b[0m\n  \x1b[32mok  \x1b[0m  longer\n\n" +
		"\x1b[31m1 failure and 0 warnings: mend what failed before gmgate is started\x1b[0m\n"
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestPreflightFlags(t *testing.T) {
	for _, tt := range []struct {
		args string
		code int
		text string
	}{
		{"-h", 0, "-json"},
		{"--quiet", 2, "-quiet"},
		{"now", 2, `unexpected argument "now"`},
	} {
		var stdout, stderr bytes.Buffer
		if code := command(t.Context(), append([]string{"preflight"}, strings.Fields(tt.args)...), &stdout, &stderr); code != tt.code {
			t.Errorf("%s: exit status %d, want %d", tt.args, code, tt.code)
		}
		if !strings.Contains(stderr.String(), tt.text) || stdout.Len() > 0 {
			t.Errorf("%s: printed %q and %q, want %q", tt.args, stdout.String(), stderr.String(), tt.text)
		}
	}
}

// The command on this host, in a network namespace with the addresses of the configuration.
func TestPreflightHere(t *testing.T) {
	requireDemo(t)
	ns, err := hostnet.Create()
	if err != nil {
		t.Fatal(err)
	}
	peer, err := hostnet.Create()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = errors.Join(ns.Close(), peer.Close()) })
	if err := errors.Join(ns.Veth("gm0", peer, "ue0"), ns.AddAddr("gm0", netip.MustParsePrefix("10.0.0.5/24")),
		ns.AddAddr("lo", netip.MustParsePrefix("10.0.1.5/32"))); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "gmgate.yaml")
	text := "instance: edge1\nworkers: 1\ngm: {addresses: [10.0.0.5], tcp: {max_connections: 100}}\n" +
		"mw: {addresses: [10.0.1.5], next_hops: [\"10.0.1.9:5060\"]}\n" +
		"store: {path: " + dir + "/gmgate.db}\nadmin: {socket: " + dir + "/edge1.sock}\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	look := func() (code int, r findings) {
		t.Helper()
		var stdout, stderr bytes.Buffer
		err := ns.Do(func() error {
			code = command(t.Context(), []string{"preflight", "--json", "-c", file}, &stdout, &stderr)
			return nil
		})
		if err := errors.Join(err, json.Unmarshal(stdout.Bytes(), &r)); err != nil || stderr.Len() > 0 {
			t.Fatalf("%v: %s%s", err, &stdout, &stderr)
		}
		return code, r
	}
	expect := func(r findings, name string, state verdict, value string) {
		t.Helper()
		if f, _ := r.find(name); f.State != state || !strings.Contains(f.Value, value) {
			t.Errorf("%s: %+v, want %s and %q", name, f, state, value)
		}
	}

	code, r := look()
	if code != 0 || r.Failed != 0 {
		for _, f := range r.Checks {
			if f.State == verdictFail {
				t.Errorf("%+v", f)
			}
		}
	}
	expect(r, "configuration/file", verdictOK, file)
	expect(r, "addresses/gm 10.0.0.5", verdictOK, "gm0")
	expect(r, "addresses/mw 10.0.1.5", verdictOK, "lo")
	expect(r, "ports/10.0.0.5", verdictOK, "free")
	expect(r, "files/store", verdictOK, "gmgate.db")
	want := "userspace"
	if support := xfrm.Probe(nil); support.Err() == nil {
		want = "xfrm"
	}
	expect(r, "esp/backend", verdictOK, want)

	var other *net.UDPConn
	if err := ns.Do(func() (err error) {
		other, err = net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(10, 0, 0, 5), Port: 5060})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Close() }()
	code, r = look()
	if code != 1 || r.Failed != 1 {
		t.Errorf("with a port in use: exit status %d, %d failures", code, r.Failed)
	}
	expect(r, "ports/10.0.0.5 udp", verdictFail, "in use")

	l, err := admin.Listen(t.Context(), filepath.Join(dir, "edge1.sock"))
	if err != nil {
		t.Fatal(err)
	}
	stop := admin.NewServer(admin.Config{
		Source: gate{}, Logger: slog.New(slog.DiscardHandler), SAs: func() int { return 0 },
		Status: admin.Status{Version: "v9", Instance: "edge1", Started: time.Now()},
	}).Serve(l)
	code, r = look()
	stop()
	if code != 0 {
		t.Errorf("with a running gmgate: exit status %d, %+v", code, r)
	}
	expect(r, "configuration/running", verdictNote, "v9")
	expect(r, "ports/10.0.0.5 udp", verdictNote, "in use")

	if _, err := os.Stat(filepath.Join(dir, "gmgate.db.key")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("something was made: %v", err)
	}
}
