// Package lab builds the test network of gmgate out of network namespaces: a namespace with the phones, one with the
// daemon and one with the IMS core, joined by veth links.
//
//	namespace ue              namespace gm                     namespace core
//	phones 10.45.0.0/16       daemon                           S-CSCF, registrar, AuC
//	       2001:db8:45::/64
//	ue0 10.0.0.1 ───────────── gm0 10.0.0.5
//	    2001:db8::1                2001:db8::5
//	                          mw0 10.0.1.5 ──────────────────── core0 10.0.1.9
//	                              2001:db8:1::5                       2001:db8:1::9
//
// The phones' addresses are AnyIP routes, so any number of them costs nothing. Behind the same link lie those of strangers,
// whom nobody is: what is sent to them ends in the namespace ue. Nothing is forwarded between the two
// links: what a phone and the core exchange has passed through the daemon. The lab is always dual stack; Options.IPv6
// only says which family its own answers (Plan, DaemonConfig) name.
//
// Everything a lab made disappears on Close, also when New failed half-way; what a killed process left behind is
// removed by the next New with the same prefix. A daemon started by a lab does not outlive the process. All methods
// may be called from any goroutine. Root is needed.
package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// DefaultPrefix starts the names of the namespaces when Options.Prefix is empty.
const DefaultPrefix = "gmgate"

// Names of the links inside their namespaces.
const (
	LinkUE   = "ue0"
	LinkGm   = "gm0"
	LinkMw   = "mw0"
	LinkCore = "core0"
)

// configSuffix marks the folders with configurations of daemons.
const configSuffix = "-config-"

// pinRoot is where labs have their pins.
const pinRoot = "/sys/fs/bpf/gmgate-labs"

// namedDir is where `ip netns` keeps its names.
const namedDir = "/run/netns"

// Plan is the addressing of one address family.
type Plan struct {
	UEGateway netip.Addr // the phones' side of the Gm link
	Gm        netip.Addr
	Mw        netip.Addr
	Core      netip.Addr
	UEs       netip.Prefix // every address in it is a phone's
	Strangers netip.Prefix // every address in it is nobody's
}

var (
	plan4 = Plan{
		UEGateway: netip.MustParseAddr("10.0.0.1"),
		Gm:        netip.MustParseAddr("10.0.0.5"),
		Mw:        netip.MustParseAddr("10.0.1.5"),
		Core:      netip.MustParseAddr("10.0.1.9"),
		UEs:       netip.MustParsePrefix("10.45.0.0/16"),
		Strangers: netip.MustParsePrefix("198.18.0.0/15"), // RFC 2544
	}
	plan6 = Plan{
		UEGateway: netip.MustParseAddr("2001:db8::1"),
		Gm:        netip.MustParseAddr("2001:db8::5"),
		Mw:        netip.MustParseAddr("2001:db8:1::5"),
		Core:      netip.MustParseAddr("2001:db8:1::9"),
		UEs:       netip.MustParsePrefix("2001:db8:45::/64"),
		Strangers: netip.MustParsePrefix("2001:db8:8000::/33"),
	}
)

// PlanOf returns the addressing of a family.
func PlanOf(ipv6 bool) Plan {
	if ipv6 {
		return plan6
	}
	return plan4
}

// MaxUEs is how many phones a plan has addresses for.
const MaxUEs = 1<<16 - 2

// UE returns the address of phone i, counted from 0. It panics beyond MaxUEs, which is a mistake of the caller.
func (p Plan) UE(i int) netip.Addr {
	if i < 0 || i >= MaxUEs {
		panic(fmt.Sprintf("lab: phone %d is outside of the address plan", i))
	}
	b := p.UEs.Addr().AsSlice()
	tail := b[len(b)-2:]
	binary.BigEndian.PutUint16(tail, binary.BigEndian.Uint16(tail)+uint16(i)+1) //nolint:gosec // checked above
	a, _ := netip.AddrFromSlice(b)
	return a
}

// Stranger returns the address of stranger i, counted from 0. Each is a source of its own: in IPv6, of another /64. It
// panics beyond MaxUEs, which is a mistake of the caller.
func (p Plan) Stranger(i int) netip.Addr {
	if i < 0 || i >= MaxUEs {
		panic(fmt.Sprintf("lab: stranger %d is outside of the address plan", i))
	}
	b := p.Strangers.Addr().AsSlice()
	at := 2
	if p.Strangers.Addr().Is6() {
		at, b[15] = 6, 1
	}
	binary.BigEndian.PutUint16(b[at:], uint16(i)+1) //nolint:gosec // checked above
	a, _ := netip.AddrFromSlice(b)
	return a
}

// Options shape a lab.
type Options struct {
	IPv6   bool   // the family that Lab.Plan and DaemonConfig speak of
	Prefix string // of the namespaces' names; default DefaultPrefix
}

// Lab is a running test network.
type Lab struct {
	UE   *hostnet.NS
	GM   *hostnet.NS
	Core *hostnet.NS

	opts Options
	name string

	mu     sync.Mutex
	closed bool
	open   []func() error // what Close undoes, newest last
}

// serial tells the labs of one process apart.
var serial atomic.Uint32

// New builds a lab.
func New(o Options) (*Lab, error) {
	if o.Prefix == "" {
		o.Prefix = DefaultPrefix
	}
	removeStale(o.Prefix)
	l := &Lab{opts: o, name: o.Prefix + "-" + strconv.Itoa(os.Getpid())}
	if n := serial.Add(1); n > 1 {
		l.name += "." + strconv.Itoa(int(n))
	}
	if err := l.build(); err != nil {
		return nil, errors.Join(fmt.Errorf("build test network %s: %w", l.name, err), l.Close())
	}
	return l, nil
}

func (l *Lab) build() error {
	dir := filepath.Dir(l.AdminSocket())
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	l.onClose(func() error { return errors.Join(os.RemoveAll(dir), os.RemoveAll(l.PinPath())) })
	for _, n := range []struct {
		suffix string
		ns     **hostnet.NS
	}{{"ue", &l.UE}, {"gm", &l.GM}, {"core", &l.Core}} {
		ns, err := hostnet.CreateNamed(l.name + "-" + n.suffix)
		if err != nil {
			return err
		}
		*n.ns = ns
		l.onClose(ns.Delete)
		for _, s := range [][2]string{
			{"ipv6.conf.default.accept_dad", "0"},
			{"ipv6.conf.default.accept_ra", "0"},
			{"ipv4.conf.all.rp_filter", "0"},
			{"ipv4.conf.default.rp_filter", "0"},
			{"ipv4.ip_forward", "0"},
		} {
			if err := ns.Sysctl(s[0], s[1]); err != nil {
				return err
			}
		}
	}
	// Connections take the label of the SA that they came in on. Kernels that cannot leave it out.
	_ = l.GM.Sysctl("ipv4.tcp_fwmark_accept", "1")
	if err := l.UE.Veth(LinkUE, l.GM, LinkGm); err != nil {
		return err
	}
	if err := l.GM.Veth(LinkMw, l.Core, LinkCore); err != nil {
		return err
	}
	// An AnyIP address can be bound in IPv4 as it is, in IPv6 only with this.
	if err := l.UE.Sysctl("ipv6.ip_nonlocal_bind", "1"); err != nil {
		return err
	}
	for _, p := range []Plan{plan4, plan6} {
		bits := 24
		if p.Gm.Is6() {
			bits = 64
		}
		for _, a := range []struct {
			ns   *hostnet.NS
			link string
			addr netip.Addr
		}{{l.UE, LinkUE, p.UEGateway}, {l.GM, LinkGm, p.Gm}, {l.GM, LinkMw, p.Mw}, {l.Core, LinkCore, p.Core}} {
			if err := a.ns.AddAddr(a.link, netip.PrefixFrom(a.addr, bits)); err != nil {
				return err
			}
		}
		for _, behind := range []netip.Prefix{p.UEs, p.Strangers} {
			if err := l.GM.AddRoute(LinkGm, behind, p.UEGateway); err != nil {
				return err
			}
		}
		if err := l.UE.AddLocal(p.UEs); err != nil {
			return err
		}
	}
	return nil
}

// Plan returns the addressing of the family that Options.IPv6 chose.
func (l *Lab) Plan() Plan { return PlanOf(l.opts.IPv6) }

// Name is what the names of the namespaces start with.
func (l *Lab) Name() string { return l.name }

// AdminSocket is where the daemon's admin socket lies: outside of the namespaces, which have nothing to do with files.
// One daemon of a lab can have it at a time; it stays the same over its restarts.
func (l *Lab) AdminSocket() string {
	return filepath.Join(os.TempDir(), l.name+configSuffix+"admin", "gmgate.sock")
}

// PinPath is where the daemon's eBPF programs and maps are pinned. A bpffs allows no dots in names.
func (l *Lab) PinPath() string {
	return filepath.Join(pinRoot, strings.ReplaceAll(l.name, ".", ":")+"-gm")
}

// onClose puts f on the list of things that Close undoes. After Close f runs at once.
func (l *Lab) onClose(f func() error) {
	l.mu.Lock()
	if !l.closed {
		l.open = append(l.open, f)
		l.mu.Unlock()
		return
	}
	l.mu.Unlock()
	_ = f()
}

// Close stops daemons and captures and removes the namespaces. It may be called more than once.
func (l *Lab) Close() error {
	l.mu.Lock()
	open := l.open
	l.open, l.closed = nil, true
	l.mu.Unlock()
	var errs []error
	for _, o := range slices.Backward(open) {
		errs = append(errs, o())
	}
	return errors.Join(errs...)
}

// removeStale deletes the namespaces and configuration folders of labs with this prefix whose process has gone. The kernel has ended their
// daemons already. Trouble is not reported: at worst an unused name stays.
func removeStale(prefix string) {
	names, err := filepath.Glob(filepath.Join(namedDir, prefix+"-*"))
	if err != nil {
		return
	}
	for _, path := range names {
		pid, ok := ownerPID(prefix, filepath.Base(path))
		if !ok || !errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			continue
		}
		_ = unix.Unmount(path, unix.MNT_DETACH)
		_ = os.Remove(path)
	}
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), prefix+"-*"+configSuffix+"*"))
	if err != nil {
		return
	}
	pins, err := filepath.Glob(filepath.Join(pinRoot, prefix+"-*-gm"))
	if err != nil {
		return
	}
	for _, path := range append(dirs, pins...) {
		name := strings.ReplaceAll(filepath.Base(path), ":", ".")
		if pid, ok := ownerPID(prefix, name); ok && errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			_ = os.RemoveAll(path)
		}
	}
}

// ownerPID takes the process id out of a name that a lab made: prefix-PID[.serial]-what, where what is ue, gm or core for
// a namespace and begins with config for a folder.
func ownerPID(prefix, name string) (int, bool) {
	rest, ok := strings.CutPrefix(name, prefix+"-")
	if !ok {
		return 0, false
	}
	number, what, ok := strings.Cut(rest, "-")
	if !ok || (what != "ue" && what != "gm" && what != "core" && !strings.HasPrefix("-"+what, configSuffix)) {
		return 0, false
	}
	number, _, _ = strings.Cut(number, ".")
	pid, err := strconv.Atoi(number)
	return pid, err == nil && pid > 0
}
