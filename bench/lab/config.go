package lab

import (
	"cmp"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/gmgate/gmgate/control/ims"
)

// Ports of the daemon in every lab.
const (
	PortClear   = 5060
	PortMw      = 5060
	PortCore    = 5060
	PortMetrics = 9464
)

// Protected ports of the daemon in every lab.
var (
	ServerPorts = []uint16{6100, 6101}
	ClientPorts = []uint16{6110, 6111, 6112, 6113}
)

// DaemonOptions are the values of the configuration that tests vary. A zero value leaves the daemon's default.
type DaemonOptions struct {
	Backend         string      // auto, userspace, xfrm
	Workers         int         // default 2, so that hand-over between workers is exercised
	Suites          []ims.Suite // security.algorithms, in order
	SecurityServer  string      // security.security_server: chosen, list
	IPsec           string      // security.ipsec: require, allow, forbid
	ClearRequests   string      // gm.clear_requests: reject, drop
	MwTransport     string      // mw.transport: udp, tcp
	NextHops        []string    // default: the lab's core
	MwInterface     string      // mw.interface
	MwSources       []string    // mw.sources
	RegAwaitAuth    time.Duration
	LifetimeMargin  time.Duration
	OldSet          time.Duration
	RegisterTimeout time.Duration
	HealthInterval  time.Duration // negative: switched off
	StorePath       string        // store.path; empty: nothing is kept
	Reconcile       time.Duration // store.reconcile_interval
	LogLevel        string        // default info
	Pending         int           // limits.pending_registrations
	PendingSource   int           // limits.pending_per_source; default 4096: all IPv6 phones of a lab share one /64
	Guard           GuardOptions
}

// GuardOptions are the values of the section guard.
type GuardOptions struct {
	Mode          string // auto, xdp, generic, tc, off
	RegisterRate  int    // REGISTERs per second from one source; default: more than tests send
	RegisterBurst int
}

// DaemonConfig returns a configuration of the daemon for this lab.
func (l *Lab) DaemonConfig(o DaemonOptions) string {
	var b strings.Builder
	p, q := PlanOf(false), PlanOf(true)
	workers := o.Workers
	if workers == 0 {
		workers = 2
	}
	var hops []string
	for _, h := range o.NextHops {
		hops = append(hops, strconv.Quote(h))
	}
	if len(hops) == 0 {
		hops = []string{strconv.Quote(netip.AddrPortFrom(l.Plan().Core, PortCore).String())}
	}
	// The preferred family comes first: what the daemon writes about itself towards the core follows this order.
	gm, mw := []string{p.Gm.String(), quoted(q.Gm)}, []string{p.Mw.String(), quoted(q.Mw)}
	if l.opts.IPv6 {
		gm[0], gm[1], mw[0], mw[1] = gm[1], gm[0], mw[1], mw[0]
	}
	fmt.Fprintf(&b, "instance: lab\nworkers: %d\n", workers)
	fmt.Fprintf(&b, "gm:\n  addresses: %s\n  port: %d\n  server_ports: %s\n  client_ports: %s\n",
		list(gm), PortClear, ports(ServerPorts), ports(ClientPorts))
	option(&b, "  clear_requests", o.ClearRequests)
	if len(o.Suites) > 0 || o.SecurityServer != "" || o.IPsec != "" {
		b.WriteString("security:\n")
		if len(o.Suites) > 0 {
			names := make([]string, len(o.Suites))
			for i, s := range o.Suites {
				names[i] = s.String()
			}
			fmt.Fprintf(&b, "  algorithms: %s\n", list(names))
		}
		option(&b, "  security_server", o.SecurityServer)
		option(&b, "  ipsec", o.IPsec)
	}
	fmt.Fprintf(&b, "mw:\n  addresses: %s\n  port: %d\n  next_hops: %s\n  visited_network: ims.mnc001.mcc001.3gppnetwork.org\n",
		list(mw), PortMw, list(hops))
	option(&b, "  transport", o.MwTransport)
	option(&b, "  interface", o.MwInterface)
	if len(o.MwSources) > 0 {
		quoted := make([]string, len(o.MwSources))
		for i, s := range o.MwSources {
			quoted[i] = strconv.Quote(s)
		}
		fmt.Fprintf(&b, "  sources: %s\n", list(quoted))
	}
	duration(&b, "  register_timeout", o.RegisterTimeout)
	duration(&b, "  health_interval", o.HealthInterval)
	fmt.Fprintf(&b, "limits:\n  pending_per_source: %d\n", cmp.Or(o.PendingSource, 4096))
	if o.Pending != 0 {
		fmt.Fprintf(&b, "  pending_registrations: %d\n", o.Pending)
	}
	if o.RegAwaitAuth != 0 || o.LifetimeMargin != 0 || o.OldSet != 0 {
		b.WriteString("timers:\n")
		duration(&b, "  reg_await_auth", o.RegAwaitAuth)
		duration(&b, "  lifetime_margin", o.LifetimeMargin)
		duration(&b, "  old_set", o.OldSet)
	}
	fmt.Fprintf(&b, "store:\n  path: %q\n", o.StorePath)
	duration(&b, "  reconcile_interval", o.Reconcile)
	if o.Backend != "" {
		fmt.Fprintf(&b, "esp:\n  backend: %s\n", o.Backend)
	}
	// Small maps, because many daemons start in tests; and a limit that leaves hundreds of phones of one /64 alone.
	fmt.Fprintf(&b, "guard:\n  pin: %s\n  max_sas: 16384\n  max_ues: 4096\n  sources: 16384\n", strconv.Quote(l.PinPath()))
	option(&b, "  mode", o.Guard.Mode)
	number(&b, "  register_rate", cmp.Or(o.Guard.RegisterRate, 100000))
	number(&b, "  register_burst", cmp.Or(o.Guard.RegisterBurst, 100000))
	fmt.Fprintf(&b, "metrics:\n  listen: \"127.0.0.1:%d\"\n", PortMetrics)
	fmt.Fprintf(&b, "admin:\n  socket: %s\n", strconv.Quote(l.AdminSocket()))
	if o.LogLevel != "" {
		fmt.Fprintf(&b, "log:\n  level: %s\n", o.LogLevel)
	}
	return b.String()
}

// quoted keeps YAML from reading the colons of an IPv6 address as a mapping.
func quoted(a netip.Addr) string { return strconv.Quote(a.String()) }

func list(items []string) string { return "[" + strings.Join(items, ", ") + "]" }

func ports(p []uint16) string {
	s := make([]string, len(p))
	for i, v := range p {
		s[i] = strconv.Itoa(int(v))
	}
	return list(s)
}

func option(b *strings.Builder, key, value string) {
	if value != "" {
		fmt.Fprintf(b, "%s: %s\n", key, value)
	}
}

func number(b *strings.Builder, key string, n int) {
	if n != 0 {
		fmt.Fprintf(b, "%s: %d\n", key, n)
	}
}

func duration(b *strings.Builder, key string, d time.Duration) {
	if d != 0 {
		fmt.Fprintf(b, "%s: %s\n", key, max(d, 0))
	}
}
