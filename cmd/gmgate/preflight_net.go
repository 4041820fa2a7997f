package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/config"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/front"
	"github.com/gmgate/gmgate/dataplane/probe"
	"github.com/gmgate/gmgate/dataplane/xfrm"
)

// checkAddresses tells whether the host has the addresses of the configuration, and where.
func (p *preflight) checkAddresses(context.Context) {
	if !p.loaded {
		return
	}
	var err error
	if p.links, err = p.host.Links(); err != nil {
		p.unknown("interfaces", err)
		return
	}
	p.reachable = map[netip.Addr]bool{}
	for _, a := range p.cfg.Gm.Addresses {
		for _, l := range p.entries(p.checkAddress("gm", a)) {
			if !slices.Contains(p.gm, l) {
				p.gm = append(p.gm, l)
			}
		}
	}
	var mw []string
	for _, a := range p.cfg.Mw.Addresses {
		if l := p.checkAddress("mw", a); l != "" && !slices.Contains(mw, l) {
			mw = append(mw, l)
		}
	}
	p.checkMw(mw)
}

// checkMw tells who can reach the Mw addresses, which are on links: a host takes packets for any address of its own on any
// interface, and what comes to the Mw sockets is believed.
func (p *preflight) checkMw(links []string) {
	name := p.cfg.Mw.Interface
	f := finding{Name: "mw access", State: verdictOK, Value: "by " + name}
	switch {
	case name != "" && !slices.ContainsFunc(p.links, func(l probe.Link) bool { return l.Name == name }):
		f.State, f.Value, f.Detail, f.Hint = verdictFail, "absent", "there is no interface "+name, "correct mw.interface"
	case name != "" && slices.Contains(p.gm, name):
		f.State, f.Detail = verdictWarn, "phones come in by it as well, and may speak as the core"
		f.Hint = "set mw.sources, and keep packets of phones in the core's name off in the network"
		if len(p.cfg.Mw.Sources) > 0 {
			f.State, f.Detail = verdictNote, "phones come in by it as well: the network has to keep those off that use the core's addresses"
			f.Hint = ""
		}
	case name != "":
	case len(p.cfg.Mw.Sources) > 0:
		f.Value, f.Detail = "by source", "phones that use the core's addresses have to be kept off elsewhere"
	default:
		f.State, f.Value, f.Detail = verdictWarn, "open", "a phone that can send to the Mw addresses may speak as the core"
		f.Hint = "set mw.sources"
		if len(links) == 1 && !slices.Contains(p.gm, links[0]) {
			f.Hint = "set mw.interface: " + links[0] + ", or mw.sources"
		}
	}
	p.say(f)
}

// entries returns the interfaces that packets for an address of this one come in by, as the guard sees it: for the loopback
// interface every Ethernet interface that is up.
func (p *preflight) entries(link string) (names []string) {
	i := slices.IndexFunc(p.links, func(l probe.Link) bool { return l.Name == link })
	switch {
	case i < 0:
		return nil
	case !p.links[i].Loopback:
		return []string{link}
	}
	for _, l := range p.links {
		if l.Ethernet && l.Up {
			names = append(names, l.Name)
		}
	}
	return names
}

// checkAddress looks for an address, and returns the interface that has it.
func (p *preflight) checkAddress(side string, a netip.Addr) (link string) {
	f := finding{Name: side + " " + a.String(), State: verdictOK}
	i := slices.IndexFunc(p.links, func(l probe.Link) bool {
		return slices.ContainsFunc(l.Addrs, func(b netip.Addr) bool { return b.WithZone("") == a })
	})
	// An address may also be the host's by a route of type local, without being on an interface.
	bound := p.host.Bind(netip.AddrPortFrom(a, 0), ims.UDP) == nil
	p.reachable[a] = bound
	switch {
	case i < 0 && bound:
		f.State, f.Value, f.Detail = verdictNote, "local", "by a route, on no interface"
	case i < 0:
		f.State, f.Value, f.Detail = verdictFail, "absent", "this host has no such address"
		f.Hint = fmt.Sprintf("ip address add %s dev INTERFACE, or correct %s.addresses", netip.PrefixFrom(a, a.BitLen()), side)
	case !p.links[i].Up:
		f.State, f.Value, f.Detail = verdictFail, p.links[i].Name, "the interface is down"
		f.Hint = "ip link set " + p.links[i].Name + " up"
	case !p.links[i].Carrier:
		f.State, f.Value, f.Detail = verdictWarn, p.links[i].Name, "the link has no carrier: nothing comes in or goes out"
		f.Hint = "look at the cable or the other end: ip link show dev " + p.links[i].Name
	case !bound:
		f.State, f.Value, f.Detail = verdictFail, p.links[i].Name, "no socket can be bound to it: is it a duplicate, or still tentative?"
		f.Hint = "ip address show dev " + p.links[i].Name
	default:
		f.Value = p.links[i].Name
		if d := p.host.Driver(f.Value); d != "" {
			f.Detail = "driver " + d
		}
	}
	p.say(f)
	if i < 0 {
		return ""
	}
	return p.links[i].Name
}

// checkGuard tells where the guard would be attached on the Gm interfaces.
func (p *preflight) checkGuard(context.Context) {
	if p.cfg.Guard.Mode == config.GuardOff {
		p.say(finding{Name: "mode", State: verdictNote, Value: "off", Detail: "ESP and policies do without it"})
		return
	}
	required := verdictWarn
	if p.cfg.Guard.Mode != config.GuardAuto {
		required = verdictFail
	}
	if len(p.gm) == 0 && len(p.cfg.Guard.Interfaces) == 0 {
		if slices.ContainsFunc(p.cfg.Gm.Addresses, func(a netip.Addr) bool { return p.reachable[a] }) {
			p.say(finding{
				Name: "interfaces", State: required, Value: "none", Detail: "no interface has the Gm addresses, so the guard is on none",
				Hint: "name those that phones come in by in guard.interfaces",
			})
		}
		return
	}
	// There can be no second guard beside that of a gmgate which has nothing pinned, so that it would be told as in somebody's way.
	if pin := p.cfg.PinPath(); p.running && (pin == "" || p.host.Place(pin).Info == nil) {
		p.say(finding{Name: "running", State: verdictNote, Value: "not looked at", Detail: "the running gmgate has nothing pinned", Hint: "see gmgate drops"})
		return
	}
	for _, h := range p.hooks(p.cfg, p.backend == config.BackendXFRM, p.gm) {
		f := finding{Name: h.Interface, State: verdictOK, Value: h.Hook, Detail: h.Reason}
		if h.Err != nil && f.Detail == "" {
			f.Detail = h.Err.Error()
		}
		switch h.Hook {
		case "xdp":
		case "none":
			f.State = required
			f.Hint = "Linux 5.18 or later has what the guard needs; with guard.mode: auto gmgate does without it"
			switch {
			case p.links != nil && !slices.ContainsFunc(p.links, func(l probe.Link) bool { return l.Name == h.Interface }):
				f.Hint = "make the interface, or correct guard.interfaces"
			case denied(h.Err) && p.plain:
				f.State, f.Value, f.Detail, f.Hint = verdictNote, "unknown", "needs root", ""
			case denied(h.Err):
				f.Hint = "give the process CAP_BPF and CAP_NET_ADMIN"
			case errors.Is(h.Err, unix.EBUSY), errors.Is(h.Err, unix.EEXIST):
				f.Hint = "another program is attached there; if it may go: ip link set dev " + h.Interface + " xdp off"
			}
		default: // later in the path of a packet, and so dearer
			f.State = verdictNote
		}
		p.say(f)
	}
}

// socket is one that gmgate binds.
type socket struct {
	at     netip.AddrPort
	t      ims.Transport
	hidden bool // in the namespace of the userspace backend, where nobody else is
}

// sockets lists what gmgate binds, in the order of the configuration.
func (p *preflight) sockets() (list []socket) {
	f := frontConfig(p.cfg, &backend{}, nil)
	for _, l := range f.Listeners {
		hidden := p.backend == config.BackendUserspace && l.Side == ims.GmProtected
		if l.UDP {
			list = append(list, socket{l.Addr, ims.UDP, hidden})
		}
		if l.TCP {
			list = append(list, socket{l.Addr, ims.TCP, hidden})
		}
	}
	return list
}

// checkPorts tries to bind every port, as gmgate does at its start.
func (p *preflight) checkPorts(context.Context) {
	if !p.loaded || p.reachable == nil {
		return
	}
	// What is wrong with several ports of an address in the same way is said once.
	type place struct {
		addr  netip.Addr
		t     ims.Transport // zero: what is free
		fault finding
	}
	var order []place
	ports := map[place][]uint16{}
	add := func(at place, port uint16) {
		if _, ok := ports[at]; !ok {
			order = append(order, at)
		}
		if !slices.Contains(ports[at], port) {
			ports[at] = append(ports[at], port)
		}
	}
	taken := map[netip.AddrPort]bool{}
	list := p.sockets()
	for _, s := range list {
		if !p.reachable[s.at.Addr()] {
			continue // said above
		}
		if fault, ok := p.tryPort(s); !ok {
			taken[s.at] = true
			add(place{s.at.Addr(), s.t, fault}, s.at.Port())
		}
	}
	for _, s := range list {
		if p.reachable[s.at.Addr()] && !taken[s.at] {
			add(place{addr: s.at.Addr()}, s.at.Port())
		}
	}
	for _, at := range order {
		if at.t == 0 {
			p.say(finding{Name: at.addr.String(), State: verdictOK, Value: "free", Detail: portList(ports[at])})
			continue
		}
		f := at.fault
		f.Name, f.Detail = fmt.Sprintf("%s %s", at.addr, at.t), portList(ports[at])+", "+f.Detail
		f.Hint = strings.ReplaceAll(f.Hint, "PORT", fmt.Sprint(ports[at][0]))
		p.say(f)
	}
	if m := p.cfg.Metrics.Listen; m.IsValid() {
		f, ok := p.tryPort(socket{at: m, t: ims.TCP})
		if ok {
			f = finding{State: verdictOK, Value: "free"}
		}
		f.Name, f.Hint = "metrics "+m.String(), strings.ReplaceAll(f.Hint, "PORT", fmt.Sprint(m.Port()))
		p.say(f)
	}
}

// tryPort says why a port cannot be bound. PORT stands for it in the hint.
func (p *preflight) tryPort(s socket) (f finding, ok bool) {
	err := p.host.Bind(s.at, s.t)
	if err == nil {
		return f, true
	}
	f = finding{State: verdictFail, Value: "in use"}
	list := "-lunp"
	if s.t == ims.TCP {
		list = "-ltnp"
	}
	switch {
	case errors.Is(err, unix.EADDRINUSE) && p.running:
		f.State, f.Detail = verdictNote, "by the running gmgate, it seems"
	case errors.Is(err, unix.EADDRINUSE) && s.hidden:
		f.State, f.Detail = verdictNote, "by a program that gets what comes in clear; gmgate's own socket is in another namespace"
	case errors.Is(err, unix.EADDRINUSE):
		f.Detail = "by another program"
		f.Hint = "see whose it is: ss " + list + " 'sport = :PORT'; stop it, or choose another port"
	case errors.Is(err, unix.EACCES):
		f.State, f.Value, f.Detail = p.grave(), "refused", "below net.ipv4.ip_unprivileged_port_start, needs CAP_NET_BIND_SERVICE"
		f.Hint = "run as root, or add to AmbientCapabilities= and CapabilityBoundingSet= of the unit: CAP_NET_BIND_SERVICE"
	default:
		f.Value, f.Detail, f.Hint = "refused", err.Error(), "correct address and port in the configuration"
	}
	return f, false
}

// dotted writes a sysctl as sysctl(8) does, with slashes where a name in it has dots of its own.
func dotted(file string) string {
	if strings.Contains(file, ".") {
		return file
	}
	return strings.ReplaceAll(file, "/", ".")
}

// checkSysctls looks at the settings of the network.
func (p *preflight) checkSysctls(context.Context) {
	p.checkReversePath()
	p.checkBuffers()
	p.checkXFRMSettings()
	if p.backend != config.BackendUserspace {
		p.checkKernelBackendSettings()
	}
	if p.loaded && slices.ContainsFunc(p.cfg.Gm.Addresses, netip.Addr.Is6) {
		p.checkIPv6()
	}
	if r := p.host.Sysctl("fs.file-max"); r.Err == nil {
		f := finding{Name: "fs.file-max", State: verdictOK, Value: r.Value}
		want := front.Descriptors(p.cfg.Gm.TCP.MaxConnections)
		if n, ok := r.Number(); ok && n < int64(want) {
			f.State, f.Detail = verdictWarn, fmt.Sprintf("%d connections want %d", p.cfg.Gm.TCP.MaxConnections, want)
			f.Hint = fmt.Sprintf("sysctl -w fs.file-max=%d", max(want, 1<<20))
		}
		p.say(f)
	}
}

// checkReversePath looks at the filter of sources on the Gm interfaces. The stricter one of the interface and all holds.
func (p *preflight) checkReversePath() {
	all, _ := p.host.Sysctl("net.ipv4.conf.all.rp_filter").Number()
	for _, l := range p.gm {
		file := "net/ipv4/conf/" + l + "/rp_filter"
		r := p.host.Sysctl(file)
		own, ok := r.Number()
		if !ok {
			continue // no IPv4
		}
		f := finding{Name: dotted(file), State: verdictOK, Value: fmt.Sprint(max(own, all))}
		if max(own, all) == 1 {
			f.State, f.Detail = verdictNote, "strict: packets of phones to which the route is another interface are dropped"
			f.Hint = "if routes to phones are asymmetric: sysctl -w " + dotted(file) + "=2"
		}
		p.say(f)
	}
}

// checkBuffers compares the limits of socket buffers with what the sockets ask for.
func (p *preflight) checkBuffers() {
	for _, key := range []string{"net.core.rmem_max", "net.core.wmem_max"} {
		r := p.host.Sysctl(key)
		n, ok := r.Number()
		if !ok {
			continue // not shown in this namespace
		}
		f := finding{Name: key, State: verdictOK, Value: r.Value}
		switch {
		case n >= front.SocketBuffer:
		case p.caps.Has(probe.CapNetAdmin):
			f.Detail = fmt.Sprintf("CAP_NET_ADMIN goes beyond it, to %d", front.SocketBuffer)
		case p.plain:
			f.State, f.Detail = verdictNote, "needs root: CAP_NET_ADMIN goes beyond it"
		default:
			f.State, f.Detail = verdictWarn, fmt.Sprintf("bursts beyond it are lost; sockets ask for %d", front.SocketBuffer)
			f.Hint = fmt.Sprintf("sysctl -w %s=%d", key, front.SocketBuffer)
		}
		p.say(f)
	}
}

// checkXFRMSettings looks at what the SAs and policies of the kernel, and our ports, depend on.
func (p *preflight) checkXFRMSettings() {
	root, err := p.host.Sub("/proc/sys/net")
	if err != nil {
		p.unknown("net", err)
		return
	}
	var ports []uint16
	if p.loaded {
		for _, s := range p.sockets() {
			if !s.hidden && !slices.Contains(ports, s.at.Port()) {
				ports = append(ports, s.at.Port())
			}
		}
	}
	suits := map[string]int{} // per kind of setting that each interface has
	for _, s := range xfrm.Settings(root, ports) {
		file := "net/" + s.Path
		f := finding{Name: dotted(file), State: verdictOK, Value: s.Value, Detail: s.Consequence}
		if s.Path == "ipv4/ip_local_reserved_ports" {
			if f.Value == "" {
				f.Value = "none"
			}
			if low, high, ok := strings.Cut(p.host.Sysctl("net.ipv4.ip_local_port_range").Value, "\t"); ok && f.Detail == "" {
				f.Detail = fmt.Sprintf("the kernel gives out %s to %s", low, high)
				if p.loaded {
					f.Detail += ", none of gmgate's among them"
				}
			}
		}
		perLink := strings.Contains(s.Path, "/conf/")
		switch {
		case s.Consequence == "" && perLink:
			suits[path.Base(s.Path)]++
			continue
		case s.Consequence == "":
		case !strings.HasPrefix(path.Base(s.Path), "ip_") && p.backend == config.BackendUserspace:
			f.State, f.Detail = verdictNote, s.Consequence+"; this does not matter to backend userspace"
		default:
			f.State, f.Hint = verdictWarn, fmt.Sprintf("sysctl -w %s=%s", dotted(file), s.Wanted)
			// Nothing of a registered phone may leave or come in clear.
			if link := path.Base(path.Dir(s.Path)); perLink && p.backend == config.BackendXFRM && (link == "all" || slices.Contains(p.gm, link)) {
				f.State = verdictFail
			}
		}
		p.say(f)
	}
	for _, kind := range []string{"disable_policy", "disable_xfrm"} {
		if n := suits[kind]; n > 0 {
			p.say(finding{Name: kind, State: verdictOK, Value: "0", Detail: fmt.Sprintf("in %d of the settings of interfaces", n)})
		}
	}
}

// acquireSeconds is how long the kernel holds a request for an SA by default.
const acquireSeconds = 30

// checkKernelBackendSettings looks at what only the kernel's ESP makes use of.
func (p *preflight) checkKernelBackendSettings() {
	const accept, acquire = "net.ipv4.tcp_fwmark_accept", "net.core.xfrm_acq_expires"
	if r := p.host.Sysctl(accept); r.Err == nil {
		f := finding{Name: accept, State: verdictOK, Value: r.Value}
		if r.Value == "0" {
			f.State, f.Detail = verdictNote, "TCP connections do not show the mark of the SA that they came in on: they are told apart by address and port alone"
			f.Hint = "sysctl -w " + accept + "=1"
		}
		p.say(f)
	}
	if r := p.host.Sysctl(acquire); r.Err == nil {
		f := finding{Name: acquire, State: verdictOK, Value: r.Value}
		if n, ok := r.Number(); ok && n > acquireSeconds {
			f.State, f.Detail = verdictNote, "if another program listens for key requests, the kernel holds one for each packet without SA so many seconds"
			f.Hint = fmt.Sprintf("sysctl -w %s=%d", acquire, acquireSeconds)
		}
		p.say(f)
	}
}

// checkIPv6 tells whether the host has IPv6 at all where phones use it.
func (p *preflight) checkIPv6() {
	for _, link := range append([]string{"all"}, p.gm...) {
		file := "net/ipv6/conf/" + link + "/disable_ipv6"
		f := finding{Name: dotted(file), State: verdictOK}
		switch r := p.host.Sysctl(file); {
		case r.Missing() && link == "all":
			f.State, f.Value, f.Detail = verdictFail, "absent", "this kernel runs without IPv6, and gm.addresses has such addresses"
			f.Hint = "take ipv6.disable=1 off the kernel's command line"
			p.say(f)
			return
		case r.Missing():
			continue
		case r.Err != nil:
			p.unknown(f.Name, r.Err)
			continue
		case r.Value != "0" && link == "all" && len(p.gm) > 0:
			f.State, f.Value, f.Detail = verdictNote, r.Value, "what was set last for an interface holds for it"
		case r.Value != "0":
			f.State, f.Value, f.Detail = verdictFail, r.Value, "IPv6 is off, and gm.addresses has such addresses"
			f.Hint = "sysctl -w " + f.Name + "=0"
		default:
			f.Value = r.Value
		}
		p.say(f)
	}
}
