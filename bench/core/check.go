package core

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/control/ims"
)

// findings collects what is wrong with one message.
type findings []string

func (f *findings) add(ok bool, format string, args ...any) {
	if !ok {
		*f = append(*f, fmt.Sprintf(format, args...))
	}
}

// Headers that must not come out of the access network: TS 24.229 §5.2.6.3 and Annex A, trust boundary.
var (
	securityHeaders = []string{"Security-Client", "Security-Server", "Security-Verify"}
	untrusted       = []string{
		"P-Preferred-Identity", "P-Media-Authorization", "P-User-Database", "P-Profile-Key", "P-Served-User",
		"P-Asserted-Service",
	}
)

// checkSecurity finds remains of the security agreement (RFC 3329 §2.3, TS 24.229 §5.2.2.2).
func (f *findings) checkSecurity(m *sipwire.Message) {
	for _, h := range securityHeaders {
		f.add(!m.Has(h), "%s reached the core", h)
	}
	for _, h := range []string{"Require", "Proxy-Require"} {
		f.add(!m.HasToken(h, "sec-agree"), "sec-agree left in %s", h)
		f.add(!m.HasToken(h, "mediasec"), "mediasec left in %s", h)
		for _, row := range m.All(h) {
			f.add(row != "" && !slices.Contains(sipwire.SplitRaw(row), ""), "empty element in %s: %q", h, row)
		}
	}
}

// checkRequest checks a request that came out of gmgate. Requests with a single Via are gmgate's own (OPTIONS and the
// SUBSCRIBE to the reg event).
func (c *Core) checkRequest(in *incoming) []string {
	var f findings
	m := in.msg
	f.checkSecurity(m)
	for _, h := range untrusted {
		f.add(!m.Has(h), "%s of the UE reached the core", h)
	}
	// The P-CSCF may send back what the registrar gave it, never what a UE claims.
	if pcfa := m.Get("P-Charging-Function-Addresses"); pcfa != "" {
		f.add(pcfa == chargingFunctions, "P-Charging-Function-Addresses of the UE reached the core: %q", pcfa)
	}
	vias := m.List("Via")
	own := len(vias) == 1 && (m.Method == "OPTIONS" || m.Method == "SUBSCRIBE")
	f.add(len(vias) == 2 || own, "%d Via, want the UE's and the P-CSCF's", len(vias))
	f.checkVias(in, vias)
	mf := m.Get("Max-Forwards")
	f.add(mf != "" && (own || mf != "70"), "Max-Forwards %q was not decremented", mf)
	if own {
		if m.Method == "SUBSCRIBE" {
			f.checkSubscribe(c, m)
		}
		return f
	}
	switch m.Method {
	case "REGISTER":
		f.checkRegister(c, in)
	case "ACK", "CANCEL":
	default:
		f.checkChargingVector(m)
		if m.Tag("To") == "" {
			f.checkInitial(c, m)
		}
		f.add(!m.Has("Path"), "Path in a %s", m.Method)
	}
	c.checkAsserted(&f, m)
	return f
}

func (f *findings) checkVias(in *incoming, vias []string) {
	for i, row := range vias {
		v, err := sipwire.ParseVia(row)
		if err != nil {
			f.add(false, "%v", err)
			continue
		}
		f.add(strings.HasPrefix(v.Branch(), "z9hG4bK"), "Via %d has branch %q", i, v.Branch())
		if i == 0 {
			f.add(v.Transport == in.tr.Via(), "top Via says %s, the message came by %s", v.Transport, in.tr.Via())
			if a, ok := v.SentBy(); ok {
				f.add(a.Addr() == in.from.Addr(), "top Via says %s, the message came from %s", a, in.from)
			}
			continue
		}
		// RFC 3261 §18.2.1, RFC 3581 §4: whoever received the request completed its Via.
		if p, ok := v.Params.Lookup("rport"); ok {
			f.add(p != "", "rport of the UE's Via was not filled in")
			f.add(v.Params.Get("received") != "", "Via with rport has no received")
		}
		if _, err := netip.ParseAddr(v.Host); err != nil {
			f.add(v.Params.Get("received") != "", "Via of the UE names %s and has no received", v.Host)
		}
	}
}

// checkChargingVector: TS 24.229 §5.2.2.1 and §5.2.6.3, RFC 7315 §4.6.
func (f *findings) checkChargingVector(m *sipwire.Message) {
	rows := m.All("P-Charging-Vector")
	if len(rows) != 1 {
		f.add(false, "%d rows of P-Charging-Vector, want one", len(rows))
		return
	}
	p := sipwire.ParseParams(rows[0])
	f.add(p.Count("icid-value") == 1 && p.Get("icid-value") != "", "P-Charging-Vector without icid-value: %q", rows[0])
}

// checkRegister: TS 24.229 §5.2.2.1 and §5.2.2.2.
func (f *findings) checkRegister(c *Core, in *incoming) {
	m := in.msg
	f.checkChargingVector(m)
	f.add(m.HasToken("Require", "path"), "REGISTER without Require: path")
	paths := m.List("Path")
	f.add(len(paths) == 1, "%d Path, want one", len(paths))
	for _, row := range paths {
		a, err := sipwire.ParseAddr(row)
		if err != nil {
			f.add(false, "%v", err)
			continue
		}
		_, u, err := c.resolve(a.URI)
		if err != nil {
			f.add(false, "Path: %v", err)
			continue
		}
		_, lr := u.Params.Lookup("lr")
		f.add(lr, "Path %s has no lr", a.URI)
		f.add(u.User != "", "Path %s names no flow", a.URI)
	}
	f.add(len(m.All("P-Visited-Network-ID")) == 1, "%d P-Visited-Network-ID, want one", len(m.All("P-Visited-Network-ID")))
	f.add(!m.Has("P-Asserted-Identity"), "P-Asserted-Identity in a REGISTER")
	f.add(!m.Has("P-Associated-URI"), "P-Associated-URI in a REGISTER")
	f.add(!m.Has("Service-Route"), "Service-Route in a REGISTER")
	f.add(!m.Has("Route"), "Route left in a REGISTER")
	for _, pani := range m.List("P-Access-Network-Info") {
		_, np := sipwire.ParseParams(pani).Lookup("network-provided")
		f.add(!np, "P-Access-Network-Info of the UE claims network-provided")
	}
	for _, row := range m.All("Authorization") {
		_, p, err := sipwire.ParseAuth(row)
		if err != nil {
			f.add(false, "Authorization: %v", err)
			continue
		}
		f.add(p.Count("integrity-protected") <= 1, "integrity-protected more than once")
		if v, ok := p.Lookup("integrity-protected"); ok {
			c.mu.Lock()
			acc := c.byIMPI[p.Get("username")]
			c.mu.Unlock()
			assoc := acc != nil && acc.sub.Password != "" && (v == "ip-assoc-pending" || v == "ip-assoc-yes")
			f.add(v == "yes" || v == "no" || assoc, "integrity-protected is %q", v)
		}
	}
}

// checkInitial: TS 24.229 §5.2.6.3, initial requests of a registered UE.
func (f *findings) checkInitial(c *Core, m *sipwire.Message) {
	routes := m.List("Route")
	f.add(len(routes) == 1, "%d Route left in an initial request, want the Service-Route", len(routes))
	if len(routes) > 0 {
		f.add(c.isOrig(routes[0]), "top Route is %s, want the Service-Route", routes[0])
	}
	f.add(len(m.List("P-Asserted-Identity")) > 0, "initial request without P-Asserted-Identity")
	if m.Method == "INVITE" || m.Method == "SUBSCRIBE" || m.Method == "REFER" {
		rr := m.List("Record-Route")
		f.add(len(rr) == 1, "%d Record-Route in an initial %s, want the P-CSCF's", len(rr), m.Method)
		for _, row := range rr {
			a, err := sipwire.ParseAddr(row)
			if err != nil {
				f.add(false, "%v", err)
				continue
			}
			_, u, err := c.resolve(a.URI)
			_, lr := u.Params.Lookup("lr")
			f.add(err == nil && lr, "Record-Route %s cannot be used", row)
		}
	}
}

// checkSubscribe: the P-CSCF's own subscription to the reg event, TS 24.229 §5.2.3, RFC 3680 §4.
func (f *findings) checkSubscribe(c *Core, m *sipwire.Message) {
	f.checkChargingVector(m)
	f.add(eventPackage(m) == "reg", "SUBSCRIBE of the P-CSCF to %q", m.Get("Event"))
	f.add(m.HasToken("Accept", "application/reginfo+xml"), "Accept is %q", m.Get("Accept"))
	to, err := sipwire.ParseAddr(m.Get("To"))
	if err != nil {
		f.add(false, "%v", err)
		return
	}
	acc := c.owner(to.URI)
	f.add(acc != nil, "SUBSCRIBE of the P-CSCF for %s, who is unknown", to.URI)
	expires, err := strconv.ParseUint(m.Get("Expires"), 10, 32)
	f.add(err == nil, "Expires is %q", m.Get("Expires"))
	if acc != nil {
		c.mu.Lock()
		left := time.Duration(0)
		if acc.binding != nil {
			left = time.Until(acc.binding.Expires)
		}
		c.mu.Unlock()
		f.add(sipwire.Key(to.URI) != sipwire.Key(acc.sub.TemporaryIMPU()), "SUBSCRIBE for the temporary identity %s", to.URI)
		f.add(expires == 0 || time.Duration(expires)*time.Second > left, "subscribed for %d s, the registration lasts %s", expires, left)
	}
	if m.Tag("To") == "" {
		f.add(sipwire.Key(m.URI) == sipwire.Key(to.URI), "Request-URI is %s, To %s", m.URI, to.URI)
		routes := m.List("Route")
		f.add(len(routes) == 1 && c.isOrig(routes[0]), "Route is %q, want the Service-Route", routes)
		f.add(expires > 0, "a new subscription of no length")
	}
	from, err := sipwire.ParseAddr(m.Get("From"))
	asserted := m.List("P-Asserted-Identity")
	f.add(err == nil && strings.HasPrefix(from.URI, "sip:") && c.owner(from.URI) == nil, "From is %q, want the P-CSCF's SIP URI", m.Get("From"))
	f.add(len(asserted) == 1 && strings.Contains(asserted[0], from.URI), "P-Asserted-Identity is %q, want the URI of From", asserted)
	contacts := m.List("Contact")
	f.add(len(contacts) == 1, "%d Contact in a SUBSCRIBE of the P-CSCF", len(contacts))
	for _, row := range contacts {
		a, err := sipwire.ParseAddr(row)
		if err == nil {
			_, _, err = c.resolve(a.URI)
		}
		f.add(err == nil, "Contact %s cannot be used", row)
	}
	f.add(!m.Has("Record-Route"), "Record-Route in a request of the P-CSCF's own")
}

// checkAsserted: every asserted identity belongs to one registered subscriber and is none of the temporary ones
// (TS 24.229 §5.2.6.3, RFC 3325 §5).
func (c *Core) checkAsserted(f *findings, m *sipwire.Message) {
	rows := m.List("P-Asserted-Identity")
	f.add(len(rows) <= 2, "%d P-Asserted-Identity", len(rows))
	var owner string
	for _, row := range rows {
		a, err := sipwire.ParseAddr(row)
		if err != nil {
			f.add(false, "%v", err)
			continue
		}
		c.mu.Lock()
		acc := c.byIMPU[sipwire.Key(a.URI)]
		impi, registered, temporary := "", false, false
		if acc != nil {
			impi, registered = acc.sub.IMPI, acc.binding != nil || acc.left
			temporary = sipwire.Key(a.URI) == sipwire.Key(acc.sub.TemporaryIMPU())
		}
		c.mu.Unlock()
		f.add(acc != nil, "asserted identity %s is unknown", a.URI)
		f.add(acc == nil || registered, "asserted identity %s is not registered", a.URI)
		f.add(!temporary, "temporary identity %s was asserted", a.URI)
		f.add(owner == "" || owner == impi, "asserted identities of two subscribers")
		owner = impi
	}
}

// checkResponse checks what came back from a UE.
func (c *Core) checkResponse(in *incoming) []string {
	var f findings
	m := in.msg
	f.checkSecurity(m)
	f.add(!m.Has("P-Preferred-Identity"), "P-Preferred-Identity of the UE reached the core")
	f.add(!m.Has("P-Charging-Function-Addresses"), "P-Charging-Function-Addresses of the UE reached the core")
	v, err := m.TopVia()
	if err != nil {
		f.add(false, "%v", err)
		return f
	}
	a, ok := v.SentBy()
	f.add(ok && a == c.cfg.Addr, "top Via of the response is %s, want the core's", v)
	if in.tr == ims.TCP {
		f.add(v.Transport == "TCP", "answer by TCP to a request sent by %s", v.Transport)
	}
	c.checkAsserted(&f, m)
	return f
}
