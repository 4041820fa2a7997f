package config

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"

	"github.com/gmgate/gmgate/control/ims"
)

// Implementation constants.
const (
	// minClientPorts lets a UE hold an established, an old and a temporary SA set, each with a port-pc of its own, and
	// leaves one to choose from.
	minClientPorts = 4
	// minSPIs is the smallest useful range: an SA set takes two SPIs of ours, and they are drawn at random.
	minSPIs = 4096
	// maxGuarded is how many Gm addresses the guard has room for: MAX_LOCAL of bpf/consts.h.
	maxGuarded = 16
)

// resolve fills in what next hops leave open: the addresses of names and the transport.
func (c *Config) resolve() {
	for i := range c.Mw.NextHops {
		h := &c.Mw.NextHops[i]
		if h.Transport == 0 {
			h.Transport = c.Mw.Transport
		}
		if a, ok := c.Mw.Hosts[h.Host]; ok && !h.Addr.Addr().IsValid() {
			h.Addr = netip.AddrPortFrom(a, h.Addr.Port())
		}
	}
}

// check reports every rule that c breaks. Values that could not be read have their default, and rules between keys are
// left alone when one of them could not be read: they would only confuse.
func (c *Config) check(r *report) {
	walk("", schema(), func(path string, f *field) {
		if f.check != nil {
			f.check(c, r, path)
		}
	})
	c.checkAddresses(r)
	c.checkProtectedPorts(r)
	c.checkMwPorts(r)
	c.checkSecurity(r)
	if c.Gm.UDPLimit > c.Gm.MaxMessage && !r.anyFailed("gm.udp_limit", "gm.max_message") {
		r.addf("gm.udp_limit", "%d is more than gm.max_message, %d", c.Gm.UDPLimit, c.Gm.MaxMessage)
	}
	if need := 2 * c.Limits.SASets; need > c.Guard.MaxSAs && c.Guard.Mode != GuardOff &&
		!r.anyFailed("limits.sa_sets", "guard.max_sas", "guard.mode") {
		r.addf("guard.max_sas", "%d is too few for limits.sa_sets, which need %d", c.Guard.MaxSAs, need)
	}
	if n := len(c.Gm.Addresses); n > maxGuarded && c.Guard.Mode != GuardOff && !r.anyFailed("gm.addresses", "guard.mode") {
		r.add("gm.addresses", fmt.Sprintf("%d addresses, the guard takes at most %d", n, maxGuarded), "set guard.mode: off, or run a second instance")
	}
	if p := c.Store.Path; p != "" && p == c.Store.KeyFile && c.Store.Credential == "" {
		r.add("store.key_file", "is store.path as well", "leave it out to get the default")
	}
	c.checkSources(r)
	c.checkMetrics(r)
}

// checkSources: a next hop whose answers would be dropped is a mistake.
func (c *Config) checkSources(r *report) {
	if len(c.Mw.Sources) == 0 || r.anyFailed("mw.sources", "mw.next_hops", "mw.hosts") {
		return
	}
	for _, h := range c.Mw.NextHops {
		a := h.Addr.Addr()
		if a.IsValid() && !slices.ContainsFunc(c.Mw.Sources, func(p netip.Prefix) bool { return p.Contains(a) }) {
			r.add("mw.sources", fmt.Sprintf("the next hop %s is not among them", a), "add "+netip.PrefixFrom(a, a.BitLen()).String())
		}
	}
}

func (r *report) anyFailed(paths ...string) bool {
	return slices.ContainsFunc(paths, func(p string) bool { return r.failed[p] })
}

func (c *Config) checkAddresses(r *report) {
	required := func(path string, n int, hint string) {
		if n == 0 && !r.failed[path] {
			r.add(path, "required and missing", hint)
		}
	}
	required("gm.addresses", len(c.Gm.Addresses), "the addresses that phones send to, such as [10.0.0.5]")
	required("mw.addresses", len(c.Mw.Addresses), "the addresses that the core sends to, such as [10.0.1.5]")
	required("mw.next_hops", len(c.Mw.NextHops), `the core's entry points, such as ["10.0.1.9:5060"]`)
}

// TS 33.203 §7.1: the protected ports are the P-CSCF's choice, but not the ports of unprotected SIP. Server and client
// ports differ because the selectors of an SA set would otherwise be the same.
func (c *Config) checkProtectedPorts(r *report) {
	for _, list := range []struct {
		path  string
		ports []uint16
	}{{"gm.server_ports", c.Gm.ServerPorts}, {"gm.client_ports", c.Gm.ClientPorts}} {
		for i, port := range list.ports {
			path := r.element(list.path, i)
			switch port {
			case 5060, 5061:
				r.addf(path, "%d is a port of unprotected SIP and cannot be a protected one (TS 33.203 section 7.1)", port)
			case c.Gm.Port:
				r.addf(path, "%d is the unprotected port, gm.port", port)
			}
		}
	}
	for i, port := range c.Gm.ClientPorts {
		if slices.Contains(c.Gm.ServerPorts, port) {
			r.addf(r.element("gm.client_ports", i), "%d is one of gm.server_ports", port)
		}
	}
	if len(c.Gm.ServerPorts) == 0 && !r.failed["gm.server_ports"] {
		r.add("gm.server_ports", "the list is empty", "")
	}
	if n := len(c.Gm.ClientPorts); n < minClientPorts && !r.failed["gm.client_ports"] {
		r.add("gm.client_ports", fmt.Sprintf("%d ports, at least %d are needed", n, minClientPorts),
			"every live SA set of a phone needs another port-pc")
	} else if sets := c.Security.MaxSetsPerUE; sets > n && !r.anyFailed("gm.client_ports", "security.max_sets_per_ue") {
		r.addf("security.max_sets_per_ue", "%d sets need as many gm.client_ports, there are %d", sets, n)
	}
}

func (c *Config) checkMwPorts(r *report) {
	if r.anyFailed("mw.port", "workers") {
		return
	}
	workers := c.WorkerCount()
	last := int(c.Mw.Port) + workers - 1
	if last > math.MaxUint16 {
		r.addf("mw.port", "worker %d would listen on port %d: with %d workers the port is at most %d",
			workers-1, last, workers, math.MaxUint16-workers+1)
		return
	}
	clash := func(path string, port uint16) {
		if port >= c.Mw.Port && int(port) <= last {
			r.addf(path, "%d is also an Mw port (%d to %d) on the same address", port, c.Mw.Port, last)
		}
	}
	if !slices.ContainsFunc(c.Gm.Addresses, func(a netip.Addr) bool { return slices.Contains(c.Mw.Addresses, a) }) {
		return
	}
	if !r.failed["gm.port"] {
		clash("gm.port", c.Gm.Port)
	}
	for i, port := range c.Gm.ServerPorts {
		clash(r.element("gm.server_ports", i), port)
	}
	for i, port := range c.Gm.ClientPorts {
		clash(r.element("gm.client_ports", i), port)
	}
}

func (c *Config) checkNextHops(r *report, path string) {
	type target struct {
		addr      netip.AddrPort
		transport ims.Transport
	}
	seen := map[target]bool{}
	for i, h := range c.Mw.NextHops {
		sub := r.element(path, i)
		a := h.Addr.Addr()
		switch {
		case !a.IsValid():
			if h.Host == "" {
				r.add(sub, "no address", "")
			} else if !r.failed["mw.hosts"] {
				r.add(sub, fmt.Sprintf("the name %s is not in mw.hosts", h.Host), "add it there or write the address")
			}
			continue
		case h.Addr.Port() == 0:
			r.addf(sub, "%s has no port", h)
			continue
		case addressFault(a) != "":
			// The address of a name is reported where the name is.
			if _, ok := c.Mw.Hosts[h.Host]; !ok {
				r.add(sub, addressFault(a), "")
			}
			continue
		case h.Transport != ims.UDP && h.Transport != ims.TCP:
			r.addf(sub, "%s has no transport", h)
			continue
		}
		if t := (target{h.Addr, h.Transport}); seen[t] {
			r.addf(sub, "%s is in the list already", h)
		} else {
			seen[t] = true
		}
		family := func(b netip.Addr) bool { return a.Is4() == b.Is4() }
		if len(c.Mw.Addresses) > 0 && !r.failed["mw.addresses"] && !slices.ContainsFunc(c.Mw.Addresses, family) {
			r.addf(sub, "%s cannot be reached: mw.addresses has no %s address", a, familyName(a))
		}
		first, port := int(c.Mw.Port), int(h.Addr.Port())
		if slices.Contains(c.Mw.Addresses, a) && port >= first && port < first+c.WorkerCount() {
			r.addf(sub, "%s is gmgate itself", h.Addr)
		}
	}
}

func familyName(a netip.Addr) string {
	if a.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

func (c *Config) checkSecurity(r *report) {
	s := &c.Security
	switch {
	case r.failed["security.algorithms"]:
	case len(s.Algorithms) == 0:
		r.add("security.algorithms", "the list is empty", "")
	case len(s.Suites()) == 0:
		r.add("security.algorithms", "security.disable_deprecated leaves none of the pairs", "")
	}
	if s.GIBA && s.IPsec == IPsecRequire && !r.failed["security.ipsec"] {
		r.add("security.giba", "has no effect where IPsec is required", "set security.ipsec to allow or forbid")
	}
	if r.anyFailed("security.spi.first", "security.spi.last") {
		return
	}
	switch first, last := s.SPI.First, s.SPI.Last; {
	case first > last:
		r.addf("security.spi", "first, %s, is greater than last, %s", first.Decimal(), last.Decimal())
	case uint64(last)-uint64(first)+1 < minSPIs:
		r.addf("security.spi", "a range of %d SPIs is too small, at least %d are needed", uint64(last)-uint64(first)+1, minSPIs)
	}
}

// checkMetrics: a SIP listener and the HTTP listener on one address and TCP port would fail at start, or worse, share it.
func (c *Config) checkMetrics(r *report) {
	listen := c.Metrics.Listen
	if !listen.IsValid() || r.anyFailed("metrics.listen", "workers") {
		return
	}
	on := func(addrs []netip.Addr) bool {
		return slices.ContainsFunc(addrs, func(a netip.Addr) bool {
			return a == listen.Addr() || listen.Addr().IsUnspecified() && (a.Is4() || listen.Addr().Is6())
		})
	}
	port := listen.Port()
	gm := append(append([]uint16{c.Gm.Port}, c.Gm.ServerPorts...), c.Gm.ClientPorts...)
	var used []string
	if on(c.Gm.Addresses) && slices.Contains(gm, port) {
		used = append(used, "Gm")
	}
	if on(c.Mw.Addresses) && port >= c.Mw.Port && int(port) < int(c.Mw.Port)+c.WorkerCount() {
		used = append(used, "Mw")
	}
	if len(used) > 0 {
		r.addf("metrics.listen", "%s is used by SIP on %s", listen, strings.Join(used, " and "))
	}
}
