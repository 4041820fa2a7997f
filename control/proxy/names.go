package proxy

import (
	"context"
	"maps"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/wheel"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// Implementation constants of name resolution.
const (
	nameTTL      = time.Minute
	nameRetry    = 5 * time.Second // after a failure
	nameTimeout  = 3 * time.Second
	maxNames     = 1024
	maxNameWaits = 256 // messages waiting for one name
	maxLookups   = 64  // under way at a time
)

type nameState uint8

const (
	nameKnown nameState = iota + 1
	namePending
	nameUnknown
)

// resolver caches host names. The lookups themselves run outside of the loop.
type resolver struct {
	hosts   map[string]netip.Addr
	cache   map[string]*name
	running int // lookups under way
}

type name struct {
	addr    netip.Addr // invalid: the last lookup failed
	expires time.Time
	pending bool
	waiting []func()
}

func newResolver(hosts map[string]netip.Addr) resolver {
	return resolver{hosts: hosts, cache: make(map[string]*name)}
}

// resolve finds the hop that a URI names: address literal, static host, or cached name.
func (w *Worker) resolve(u *sipmsg.URI) (ims.Hop, nameState) {
	h := ims.Hop{Transport: w.cfg.MwTransport}
	if t, ok := sipmsg.Param(u.Params, "transport"); ok {
		switch {
		case sipmsg.EqualFold(t, "tcp"):
			h.Transport = ims.TCP
		case sipmsg.EqualFold(t, "udp"):
			h.Transport = ims.UDP
		}
	}
	port := u.Port
	if port == 0 {
		port = defaultPort
	}
	if a, ok := sipmsg.ParseAddr(u.Host); ok {
		h.Addr = netip.AddrPortFrom(a, port)
		return h, nameKnown
	}
	a, state := w.host(u.Host)
	h.Addr = netip.AddrPortFrom(a, port)
	return h, state
}

func (w *Worker) host(host []byte) (netip.Addr, nameState) {
	if a, ok := w.names.hosts[string(host)]; ok {
		return a, nameKnown
	}
	n := w.names.cache[string(host)]
	switch {
	case n != nil && !n.pending && !w.eg.Now().After(n.expires):
		if !n.addr.IsValid() {
			return netip.Addr{}, nameUnknown
		}
		return n.addr, nameKnown
	case n == nil: // static names are kept in lower case
		if a, ok := w.names.hosts[strings.ToLower(string(host))]; ok {
			return a, nameKnown
		}
	}
	return netip.Addr{}, namePending
}

// await handles the current message again once the name is resolved.
func (w *Worker) await(f ims.Flow, host []byte) {
	msg := append([]byte(nil), w.m.Bytes()...)
	w.whenResolved(string(host), func() { w.Message(f, msg) })
}

// whenResolved runs f on the loop after a lookup of the name has ended, well or not.
func (w *Worker) whenResolved(host string, f func()) {
	n := w.names.cache[host]
	if (n == nil || !n.pending) && w.names.running >= maxLookups {
		w.obs.Drop(observe.ReasonBusy)
		return
	}
	if n == nil {
		if len(w.names.cache) >= maxNames {
			maps.DeleteFunc(w.names.cache, func(_ string, n *name) bool { return !n.pending })
		}
		n = &name{}
		w.names.cache[host] = n
	}
	if len(n.waiting) >= maxNameWaits {
		w.obs.Drop(observe.ReasonBusy)
		return
	}
	n.waiting = append(n.waiting, f)
	if n.pending {
		return
	}
	n.pending = true
	w.names.running++
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), nameTimeout)
		defer cancel()
		addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		_ = w.eg.Post(func() { w.resolved(host, n, addrs, err) })
	}()
}

func (w *Worker) resolved(host string, n *name, addrs []netip.Addr, err error) {
	w.names.running--
	n.pending, n.addr = false, netip.Addr{}
	ttl := nameRetry
	for _, a := range addrs {
		a = a.Unmap()
		if err == nil && w.reachable(a) {
			n.addr, ttl = a, nameTTL
			break
		}
	}
	n.expires = w.eg.Now().Add(ttl)
	w.names.cache[host] = n
	waiting := n.waiting
	n.waiting = nil
	for _, f := range waiting {
		f()
	}
}

// reachable reports whether we have an Mw address of the family.
func (w *Worker) reachable(a netip.Addr) bool {
	for _, m := range w.cfg.Mw {
		if m.Is4() == a.Is4() {
			return true
		}
	}
	return false
}

// nextHop is the state of a next hop towards the core.
type nextHop struct {
	hop    ims.Hop
	missed int
	sent   uint64
	timer  wheel.Timer
}

// missesToFail is how many OPTIONS in a row may go unanswered.
const missesToFail = 2

// startHealth begins to ask the next hops whether they live.
func (w *Worker) startHealth() {
	for _, h := range w.cfg.NextHops {
		n := &nextHop{hop: h}
		w.health = append(w.health, n)
		if w.cfg.HealthInterval > 0 {
			w.wheel.Schedule(&n.timer, w.cfg.HealthInterval, func() { w.ping(n) })
		}
	}
}

// ping sends OPTIONS to a next hop. Any message from its address counts as an answer.
func (w *Worker) ping(n *nextHop) {
	w.wheel.Schedule(&n.timer, w.cfg.HealthInterval, func() { w.ping(n) })
	n.missed++
	n.sent++
	if n.missed == missesToFail+1 {
		w.log.Warn("next hop does not answer", "next_hop", n.hop.String())
	}
	own := w.mwAddr(n.hop.Addr.Addr()).String()
	id := w.seal.mac(&w.sc, []byte("health"), []byte(own), w.hex64(n.sent))
	b := append([]byte(nil), w.hex64(id)...)
	to := n.hop.Addr.String()
	msg := "OPTIONS sip:" + to + " SIP/2.0\r\n" +
		"Via: SIP/2.0/" + n.hop.Transport.Via() + " " + own + ";branch=" + healthMark + string(b) + "\r\n" +
		"Max-Forwards: 1\r\nFrom: <sip:" + own + ">;tag=" + string(b[:8]) + "\r\nTo: <sip:" + to + ">\r\n" +
		"Call-ID: " + string(b) + "@" + own + "\r\nCSeq: 1 OPTIONS\r\nContent-Length: 0\r\n\r\n"
	w.sendToCore(n.hop, []byte(msg), sipmsg.MethodOptions, nil)
}

// alive notes a sign of life of a next hop.
func (w *Worker) alive(from netip.AddrPort) {
	for _, n := range w.health {
		if n.missed > 0 && n.hop.Addr.Addr() == from.Addr() {
			if n.missed > missesToFail {
				w.log.Info("next hop answers again", "next_hop", n.hop.String())
			}
			n.missed = 0
		}
	}
}

// down reports whether a hop is a next hop that has stopped answering.
func (w *Worker) down(a netip.AddrPort) bool {
	for _, n := range w.health {
		if n.hop.Addr == a {
			return n.missed > missesToFail
		}
	}
	return false
}

// registrarHop returns the next hop for a REGISTER: the first that answers, else the first.
func (w *Worker) registrarHop() ims.Hop {
	for _, n := range w.health {
		if n.missed <= missesToFail {
			return n.hop
		}
	}
	return w.cfg.NextHops[0]
}
