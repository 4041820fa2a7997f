package guard

import (
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// HookKind is where a program sees packets.
type HookKind string

// Hooks.
const (
	HookNative  HookKind = "xdp"         // in the driver
	HookGeneric HookKind = "xdp-generic" // in the stack
	HookTCX     HookKind = "tcx"
	HookTC      HookKind = "tc" // clsact
	HookNone    HookKind = "none"
)

// Hook tells where the guard stands on an interface.
type Hook struct {
	Interface string
	Kind      HookKind
	Reason    string // why this hook, or why none
	Err       error  // HookNone: what the kernel says
}

// hook is an interface with what is attached there.
type hook struct {
	name   string
	index  int // of the interface to which the program was attached; 0: none
	kind   HookKind
	reason string
	err    error
	link   link.Link       // of all kinds but HookTC
	filter *hostnet.Filter // of HookTC
}

// Names of what is pinned for an interface.
const (
	linkPrefix   = "link_"
	filterPrefix = "tc_"
)

// A bpffs allows no dot in a name, and an interface's name no colon.
func escape(name string) string   { return strings.ReplaceAll(name, ".", ":") }
func unescape(name string) string { return strings.ReplaceAll(name, ":", ".") }

func linkPin(name string, kind HookKind) string {
	return linkPrefix + escape(name) + "_" + string(kind)
}
func filterPin(name string) string { return filterPrefix + escape(name) }

// Attach puts the programs on the interfaces, in place of those of the run before where there are any: from packet to
// packet there is one. Call it when Sync has filled the map of SPIs. Interfaces that come later get theirs as they come.
// With mode Auto an interface without a hook is no error: Hooks tells; with another mode it is.
func (g *Guard) Attach() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return errors.New("attach guard: it is closed")
	}
	g.attached = true
	err := g.update()
	if g.cfg.Mode == Auto {
		err = nil // told by Hooks
	}
	if err != nil {
		g.attached = false
		return fmt.Errorf("attach guard: %w", errors.Join(err, g.detachAll()))
	}
	if g.dir != nil {
		if len(g.hooks) > 0 { // else no interface could be found: what is there stays at work until one is
			g.dropStale()
		}
		if err := g.forgetOldLimit(); err != nil { // now that the program of the run before fills them no more
			g.log.Warn("sources that the limit of an earlier run has emptied stay so", slog.Any("error", err))
		}
	}
	return nil
}

// Hooks returns where the guard stands.
func (g *Guard) Hooks() []Hook {
	g.mu.Lock()
	defer g.mu.Unlock()
	list := make([]Hook, len(g.hooks))
	for i, h := range g.hooks {
		list[i] = Hook{h.name, h.kind, h.reason, h.err}
	}
	return list
}

// Pinned returns the pin directory, empty if there is none.
func (g *Guard) Pinned() string {
	if g.dir == nil {
		return ""
	}
	return g.dir.path
}

// update brings the hooks in line with the interfaces that there are now.
func (g *Guard) update() error { return inside(g.cfg.NS, g.updateIn) }

func (g *Guard) updateIn(ns *hostnet.NS) error {
	links, err := ns.Links()
	if err != nil {
		return err
	}
	for _, h := range g.hooks {
		if h.kind != HookNone && !slices.ContainsFunc(links, func(l hostnet.Link) bool { return l.Index == h.index }) {
			h.reset("the interface has gone", nil)
		}
	}
	names, err := g.interfaces(links)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		i := slices.IndexFunc(g.hooks, func(h *hook) bool { return h.name == name })
		if i < 0 {
			g.hooks = append(g.hooks, &hook{name: name, kind: HookNone})
			i = len(g.hooks) - 1
		}
		h := g.hooks[i]
		at := slices.IndexFunc(links, func(l hostnet.Link) bool { return l.Name == name })
		if at < 0 {
			h.reset("there is no such interface", nil)
			errs = append(errs, fmt.Errorf("interface %s: there is none", name))
			continue
		}
		if h.index == links[at].Index && h.kind != HookNone {
			continue
		}
		before := h.reason
		if err := g.attach(ns, h, links[at]); err != nil {
			errs = append(errs, fmt.Errorf("interface %s: %w", name, err))
		}
		if h.reason != before {
			g.log.Info("guard", slog.String("interface", name), slog.String("hook", string(h.kind)), slog.String("reason", h.reason))
		}
	}
	return errors.Join(errs...)
}

// interfaces returns the names of the interfaces to guard: the configured ones, else those that have our addresses.
func (g *Guard) interfaces(links []hostnet.Link) ([]string, error) {
	if len(g.cfg.Interfaces) > 0 {
		return g.cfg.Interfaces, nil
	}
	names, err := owners(g.cfg.Local, links)
	return lowest(names, links), err
}

// lowest leaves out the interfaces of which others in the list see all packets before: two programs would count each packet
// twice, and take two tokens for a REGISTER.
func lowest(names []string, links []hostnet.Link) []string {
	listed := func(l hostnet.Link) bool { return slices.Contains(names, l.Name) }
	var seen func(l hostnet.Link, depth int) bool
	seen = func(l hostnet.Link, depth int) bool {
		below, all := 0, true
		for _, o := range links {
			stacked := o.Index == l.Lower && (l.Kind == "vlan" || l.Kind == "macvlan" || l.Kind == "macvtap" || l.Kind == "ipvlan")
			if stacked || o.Master == l.Index && o.Up {
				below++
				all = all && (listed(o) || depth > 0 && seen(o, depth-1))
			}
		}
		return below > 0 && all
	}
	return slices.DeleteFunc(slices.Clone(names), func(name string) bool {
		i := slices.IndexFunc(links, func(l hostnet.Link) bool { return l.Name == name })
		return i >= 0 && seen(links[i], maxStacked)
	})
}

// maxStacked is how many links stand on each other at most: MAX_NEST_DEV of the kernel.
const maxStacked = 8

// owners returns the interfaces that have addresses. An address of the loopback interface, which is reached over others,
// stands for every Ethernet interface that is up.
func owners(addrs []netip.Addr, links []hostnet.Link) (names []string, err error) {
	add := func(name string) {
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	for _, l := range links {
		i, err := net.InterfaceByIndex(l.Index)
		if err != nil {
			continue // gone meanwhile
		}
		list, err := i.Addrs()
		if err != nil {
			return nil, fmt.Errorf("read addresses of %s: %w", l.Name, err)
		}
		if !slices.ContainsFunc(list, func(a net.Addr) bool {
			n, ok := a.(*net.IPNet)
			ip, _ := netip.AddrFromSlice(n.IP)
			return ok && slices.Contains(addrs, ip.Unmap())
		}) {
			continue
		}
		if !l.Loopback {
			add(l.Name)
			continue
		}
		for _, o := range links {
			if o.Ethernet && !o.Loopback && o.Up {
				add(o.Name)
			}
		}
	}
	if len(names) == 0 {
		return nil, errors.New("no interface has the Gm addresses; name them in the configuration")
	}
	return names, nil
}

// attach finds the best hook of an interface. What was attached to an interface of that name before goes.
func (g *Guard) attach(ns *hostnet.NS, h *hook, l hostnet.Link) error {
	h.reset("", nil)
	if g.reuse(h, l) {
		return nil
	}
	var tried []string
	var errs []error
	for _, kind := range g.candidates() {
		err := g.attachAs(ns, h, l, kind)
		if err == nil {
			h.index, h.kind, h.err = l.Index, kind, nil
			h.reason = reasonOf(g.cfg.Mode, kind, tried)
			return nil
		}
		tried = append(tried, fmt.Sprintf("%s: %s", kind, brief(err)))
		errs = append(errs, err)
	}
	h.reset(strings.Join(tried, "; "), errors.Join(errs...))
	return h.err
}

// candidates are the hooks that the mode allows, the best one first. Generic XDP cannot do all where the kernel's ESP may have
// decrypted before it, and every kernel that has it has tc as well.
func (g *Guard) candidates() []HookKind {
	if g.cfg.hooks != nil {
		return g.cfg.hooks
	}
	switch g.cfg.Mode {
	case Native:
		return []HookKind{HookNative}
	case Generic:
		return []HookKind{HookGeneric}
	case TC:
		return []HookKind{HookTCX, HookTC}
	case Auto:
	}
	if g.cfg.KernelESP {
		return []HookKind{HookNative, HookTCX, HookTC}
	}
	return []HookKind{HookNative, HookTCX, HookTC, HookGeneric}
}

func reasonOf(m Mode, kind HookKind, tried []string) string {
	switch {
	case len(tried) > 0:
		return string(m) + ": " + strings.Join(tried, "; ")
	case m != Auto:
		return "configured"
	case kind == HookNative:
		return "auto: the driver has XDP"
	}
	return "auto"
}

// brief is the innermost cause of an error.
func brief(err error) string {
	for {
		next := errors.Unwrap(err)
		if next == nil {
			return err.Error()
		}
		err = next
	}
}

// program returns the program for a hook.
func (g *Guard) program(kind HookKind, ethernet bool) *ebpf.Program {
	tc := kind == HookTCX || kind == HookTC
	switch {
	case tc && ethernet:
		return g.objs.GuardTc
	case tc:
		return g.objs.GuardTcRaw
	case ethernet:
		return g.objs.GuardXdp
	}
	return g.objs.GuardXdpRaw
}

func (g *Guard) attachAs(ns *hostnet.NS, h *hook, l hostnet.Link, kind HookKind) (err error) {
	p := g.program(kind, l.Ethernet)
	switch kind {
	case HookNative:
		g.yield(l.Name, HookGeneric)
		h.link, err = link.AttachXDP(link.XDPOptions{Program: p, Interface: l.Index, Flags: link.XDPDriverMode})
	case HookGeneric:
		g.yield(l.Name, HookNative)
		h.link, err = link.AttachXDP(link.XDPOptions{Program: p, Interface: l.Index, Flags: link.XDPGenericMode})
	case HookTCX:
		// In front of others: one that accepts a packet ends the chain. Ours hands on what it does not drop.
		h.link, err = link.AttachTCX(link.TCXOptions{Program: p, Interface: l.Index, Attach: ebpf.AttachTCXIngress, Anchor: link.Head()})
	case HookTC:
		f := g.filterOf(l.Name)
		if err := f.Attach(ns, p.FD()); err != nil {
			return err
		}
		h.filter = &f
		return g.pinFilter(p, l.Name)
	case HookNone:
	}
	if err != nil {
		h.link = nil
		return err
	}
	if g.dir == nil {
		return nil
	}
	file := g.dir.file(linkPin(l.Name, kind))
	_ = os.Remove(file) // no link of ours, or reuse had taken it
	if err := h.link.Pin(file); err != nil {
		e := h.link.Close()
		h.link = nil
		return errors.Join(err, e)
	}
	return nil
}

// reuse puts the program in place of that of the run before, if its link is on this very interface and of a kind that may
// still be.
func (g *Guard) reuse(h *hook, l hostnet.Link) bool {
	if g.dir == nil {
		return false
	}
	for _, kind := range g.candidates() {
		if kind == HookTC {
			continue // replaced by attachAs, in one step as well
		}
		file := g.dir.file(linkPin(l.Name, kind))
		k, err := link.LoadPinnedLink(file, nil)
		if err != nil {
			continue
		}
		if linkIndex(k) == l.Index && k.Update(g.program(kind, l.Ethernet)) == nil {
			h.link, h.index, h.kind, h.err, h.reason = k, l.Index, kind, nil, "in place of the run before"
			return true
		}
		_ = errors.Join(k.Detach(), k.Unpin(), k.Close()) // of an interface that is gone
	}
	return false
}

// yield takes the XDP program off that a run with another configuration has left in the other form: an interface takes one
// form at a time. There is no guard until the new one is attached.
func (g *Guard) yield(name string, other HookKind) {
	if g.dir != nil {
		_ = g.dir.remove(linkPin(name, other)) // where there is one
	}
}

// linkIndex returns the interface that a link is attached to; 0 when that is gone.
func linkIndex(k link.Link) int {
	info, err := k.Info()
	if err != nil {
		return 0
	}
	if x := info.XDP(); x != nil {
		return int(x.Ifindex)
	}
	if x := info.TCX(); x != nil {
		return int(x.Ifindex)
	}
	return 0
}

// pinFilter notes for Unload that there is a filter. bpffs holds programs, not notes, so it is the program.
func (g *Guard) pinFilter(p *ebpf.Program, name string) error {
	if g.dir == nil {
		return nil
	}
	file := g.dir.file(filterPin(name))
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	c, err := p.Clone() // p itself is not to be unpinned with it
	if err != nil {
		return err
	}
	return errors.Join(c.Pin(file), c.Close())
}

// dropStale removes links and filters of the run before that this one does not use: of other hooks, and of interfaces that
// are not guarded any more.
func (g *Guard) dropStale() {
	names, err := g.dir.names()
	if err != nil {
		return
	}
	var filters []string
	for _, n := range names {
		i := slices.IndexFunc(g.hooks, func(h *hook) bool {
			return n == linkPin(h.name, h.kind) || n == filterPin(h.name) && h.kind == HookTC
		})
		switch {
		case i >= 0:
		case strings.HasPrefix(n, linkPrefix):
			_ = g.dir.remove(n)
		case strings.HasPrefix(n, filterPrefix):
			filters = append(filters, n)
			_ = os.Remove(g.dir.file(n))
		}
	}
	if err := removeFilters(g.cfg.NS, g.dir.path, filters); err != nil {
		g.log.Warn("filters of an earlier run are left", slog.Any("error", err))
	}
}

// filterOf is our filter on an interface. Instances differ in name and priority.
func (g *Guard) filterOf(name string) hostnet.Filter {
	if g.cfg.trial {
		return filterAt("trial", name)
	}
	return filterAt(g.cfg.Pin, name)
}

func filterAt(pin, name string) hostnet.Filter {
	h := fnv.New32a()
	_, _ = h.Write([]byte(pin)) // never fails
	return hostnet.Filter{
		Link: name, Name: "gmgate-" + filepath.Base(pin), Priority: uint16(0x4000 + h.Sum32()%0x4000), //nolint:gosec // bounded
	}
}

// removeFilters takes the filters off that these pins stand for.
func removeFilters(ns *hostnet.NS, pin string, names []string) error {
	return inside(ns, func(ns *hostnet.NS) error {
		var errs []error
		for _, n := range names {
			if name, ok := strings.CutPrefix(n, filterPrefix); ok {
				errs = append(errs, filterAt(pin, unescape(name)).Remove(ns))
			}
		}
		return errors.Join(errs...)
	})
}

// detachAll takes everything off the interfaces.
func (g *Guard) detachAll() error {
	errs := make([]error, 0, len(g.hooks))
	for _, h := range g.hooks {
		errs = append(errs, h.detach(g.cfg.NS))
		h.reset("detached", nil)
	}
	return errors.Join(errs...)
}

// detach takes the program off the interface, and the pin with it.
func (h *hook) detach(ns *hostnet.NS) error {
	var errs []error
	if h.link != nil {
		_ = h.link.Detach() // at once; of an interface that has gone it fails
		if err := h.link.Unpin(); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if h.filter != nil {
		errs = append(errs, inside(ns, h.filter.Remove))
	}
	return errors.Join(errs...)
}

// reset forgets what was attached. A pinned link, or a filter, stays where it is.
func (h *hook) reset(reason string, err error) {
	_ = h.release()
	h.index, h.kind, h.reason, h.err, h.filter = 0, HookNone, reason, err, nil
}

func (h *hook) release() error {
	if h.link == nil {
		return nil
	}
	k := h.link
	h.link = nil
	return k.Close()
}

// Choose finds out which hook each interface would get, by attaching the guard for a moment without anything pinned. Where
// a guard with the pin directory of the configuration is attached already, it tells that one's hooks and touches nothing.
func Choose(cfg Config) ([]Hook, error) {
	if hooks := Attached(cfg.Pin); len(hooks) > 0 {
		return hooks, nil
	}
	cfg = cfg.tried()
	g, err := Open(cfg)
	if err != nil {
		return nil, err
	}
	err = g.Attach()
	return g.Hooks(), errors.Join(err, g.Close())
}

// tried is the configuration of the guard that Choose attaches.
func (c Config) tried() Config { //nolint:gocritic // a copy is what is wanted
	c.Pin, c.trial = "", true
	c.SAs, c.UEs, c.Sources = 2, 1, 1
	return c
}

// Attached returns the hooks of a guard that is pinned, whether a process owns it or not.
func Attached(pin string) []Hook { return pinnedHooks(Pinned(pin)) }

// pinnedHooks reads the hooks of a guard out of the names of its pins.
func pinnedHooks(names []string) (hooks []Hook) {
	for _, n := range names {
		if rest, ok := strings.CutPrefix(n, linkPrefix); ok {
			if i := strings.LastIndexByte(rest, '_'); i > 0 {
				hooks = append(hooks, Hook{Interface: unescape(rest[:i]), Kind: HookKind(rest[i+1:]), Reason: "attached now"})
			}
		} else if name, ok := strings.CutPrefix(n, filterPrefix); ok {
			hooks = append(hooks, Hook{Interface: unescape(name), Kind: HookTC, Reason: "attached now"})
		}
	}
	return hooks
}
