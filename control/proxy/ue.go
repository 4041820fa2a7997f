package proxy

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// requestFromUE forwards a protected request other than REGISTER to the core (TS 24.229 §5.2.6.3). Who sent it is known
// from the SA it came in on, whatever its headers say.
func (w *Worker) requestFromUE(f ims.Flow, s *registrar.Set) {
	m, u := &w.m, s.UE
	method := m.Method()
	if u.State != registrar.Registered {
		w.refuse(f, s, 403, "Forbidden", "not registered", observe.ReasonNotRegistered)
		return
	}
	via, err := sipmsg.ParseVia(m.Get(sipmsg.Via))
	if err != nil {
		w.refuse(f, s, 400, "Bad Request", "Via: "+err.Error(), observe.ReasonMalformed)
		return
	}
	left, ok := w.forwardsLeft()
	switch {
	case !ok:
		w.refuse(f, s, 400, "Bad Request", "Max-Forwards: not a number up to 255", observe.ReasonMalformed)
		return
	case left == 0:
		w.refuse(f, s, 483, "Too Many Hops", "Max-Forwards: 0", observe.ReasonMaxForwards)
		return
	}
	if method != sipmsg.MethodAck && method != sipmsg.MethodCancel {
		if tag := w.unknownExtension(); tag != nil {
			w.refuseExtension(f, s, tag)
			return
		}
	}
	digits := w.requestDigits(&via)
	if method == sipmsg.MethodAck {
		w.gotAck(u, false, digits)
	}
	r := w.popRoutes()
	if r.token != nil { // an in-dialog request comes by our Record-Route entry, which must be this UE's
		t, ok := w.seal.open(&w.sc, r.token)
		if t = w.cfg.renamed(t); !ok || t.kind != tokenPath || int(t.worker) != w.id || t.ue != u.Index || t.gen != u.Gen {
			w.refuse(f, s, 403, "Forbidden", "Route: flow token is not of this UE", observe.ReasonForgedToken)
			return
		}
	}
	if r.token != nil && !w.inDialog() {
		r.token = nil // only a dialog has a route set of its own
	}
	if r.token == nil && w.cfg.RefuseRoute && !w.preloaded(u, &r) {
		w.refuse(f, s, 400, "Bad Request", "Route: not the Service-Route of the registration", observe.ReasonRouteNotAllowed)
		return
	}
	hop, ok := w.hopFromUE(f, s, &r)
	if !ok {
		return
	}

	w.e.Reset(m)
	w.markReceived(&via, f)
	keep := w.stripFromUE(u)
	at := m.HeadersStart()
	w.e.Open(at, at)
	w.e.Str("Via: SIP/2.0/")
	w.e.Str(hop.Transport.Via())
	w.e.Str(" ")
	w.e.AddrPort(w.mwAddr(hop.Addr.Addr()))
	w.e.Str(";branch=")
	w.putBranch(token{kind: tokenToCore, worker: uint8(w.id), ue: u.Index, gen: u.Gen}, digits)
	w.putHint(s.Serial, uint8(w.channelOf(f, s)))
	w.e.Str("\r\n")
	if r.token == nil && dialogForming(method) {
		w.e.Str("Record-Route: <sip:")
		w.e.Raw(w.seal.seal(&w.sc, w.pathToken(u)))
		w.putSelf(s, false, false)
		w.e.Str(">\r\n")
	}
	if r.token != nil {
		w.putRest(&r)
	} else {
		// TS 24.229 §5.2.6.3: the preloaded route must be the Service-Route; whatever the UE wrote, it becomes that.
		if u.Route != nil {
			w.e.Str(u.Route.Row)
		}
	}
	w.putForwards(left)
	if method != sipmsg.MethodAck && method != sipmsg.MethodCancel {
		if keep < len(u.Identities) {
			w.putAsserted(u, keep)
		}
		w.putChargingVector()
	}
	w.e.Close()
	if !w.finish() {
		return
	}
	w.deliverToCore(f, hop, method)
	if f.Transport == ims.TCP && hop.Transport == ims.UDP && method != sipmsg.MethodAck {
		w.repeatToCore(u, false, digits, kindOf(method), method, hop)
	}
}

// preloaded reports whether what is left of an initial request's Route is the Service-Route (TS 24.229 §5.2.6.3.2A).
func (w *Worker) preloaded(u *registrar.UE, r *routes) bool {
	n, want := 0, u.Routes()
	if r.more {
		for _, row := range w.m.Rows() {
			if row.ID != sipmsg.Route || int(row.ValEnd) <= r.rest {
				continue
			}
			for v := w.m.Bytes()[max(int(row.ValStart), r.rest):row.ValEnd]; len(v) > 0; n++ {
				var elem []byte
				elem, v = sipmsg.Element(v)
				na, err := sipmsg.ParseNameAddr(elem)
				if err != nil || n >= len(want) || string(na.URI) != want[n] {
					return false
				}
			}
		}
	}
	return n == len(want)
}

// requestDigits tells the transactions of one UE apart by what a retransmission, a CANCEL and a non-2xx ACK repeat: the
// UE's own Via.
func (w *Worker) requestDigits(v *sipmsg.ViaParm) uint64 {
	num, _ := w.m.CSeq()
	w.text = binary.BigEndian.AppendUint32(w.text[:0], num)
	return w.seal.mac(&w.sc, v.Branch, v.Host, w.m.Get(sipmsg.CallID), w.text)
}

// deliverToCore sends the finished request; if the connection fails the UE gets 503 at once.
func (w *Worker) deliverToCore(f ims.Flow, hop ims.Hop, method sipmsg.Method) {
	var fail func()
	if hop.Transport == ims.TCP {
		req := append([]byte(nil), w.m.Bytes()...)
		fail = func() {
			if s := w.setOf(f); s != nil && w.m.Scan(req) == nil { // it may have gone, or moved
				w.refuse(f, s, 503, "Service Unavailable", "no connection to the core", observe.ReasonCoreUnreachable)
			}
		}
	}
	w.sendToCore(hop, w.out, method, fail)
}

// setOf returns the live set that a message of a UE came in on, nil if this worker has it no more.
func (w *Worker) setOf(f ims.Flow) *registrar.Set {
	if f.Side == ims.GmClear {
		return w.table.Holder(f)
	}
	return w.table.Find(f)
}

// hopFromUE finds the next hop of a request of a UE: the Service-Route for initial requests, the route set for those
// within a dialog. A destination that neither names is refused: a UE must not use us as a relay. It reports false when
// the request was answered or waits for a name to be resolved.
func (w *Worker) hopFromUE(f ims.Flow, s *registrar.Set, r *routes) (ims.Hop, bool) {
	u := s.UE
	if r.token == nil {
		h := u.NextHop
		if !h.IsValid() {
			h = w.cfg.NextHops[0]
		}
		if w.down(h.Addr) {
			w.refuse(f, s, 504, "Server Time-out", "core does not answer", observe.ReasonCoreUnreachable)
			return h, false
		}
		return h, true
	}
	target := r.first
	if target == nil {
		target = w.m.RequestURI()
	}
	uri, err := sipmsg.ParseURI(target)
	if err != nil {
		w.refuse(f, s, 400, "Bad Request", "Route: "+err.Error(), observe.ReasonMalformed)
		return ims.Hop{}, false
	}
	if !w.mayResolve(u, &uri) {
		w.refuse(f, s, 403, "Forbidden", "Route: destination not allowed", observe.ReasonRouteNotAllowed)
		return ims.Hop{}, false
	}
	h, state := w.resolve(&uri)
	if state == namePending && w.names.running >= maxLookups {
		state = nameUnknown
	}
	switch state {
	case nameUnknown:
		w.refuse(f, s, 503, "Service Unavailable", "Route: host name does not resolve", observe.ReasonCoreUnreachable)
		return h, false
	case namePending:
		w.await(f, uri.Host)
		return h, false
	case nameKnown:
	}
	if !w.allowed(u, &uri, h.Addr.Addr()) {
		w.refuse(f, s, 403, "Forbidden", "Route: destination not allowed", observe.ReasonRouteNotAllowed)
		return h, false
	}
	return h, true
}

// mayResolve reports whether a host of a UE's Route may be looked up: an address, a name that we know, or any name where
// peers are configured by address.
func (w *Worker) mayResolve(u *registrar.UE, uri *sipmsg.URI) bool {
	if _, literal := sipmsg.ParseAddr(uri.Host); literal || len(w.cfg.Peers) > 0 {
		return true
	}
	if _, state := w.host(uri.Host); state == nameKnown {
		return true
	}
	return onServiceRoute(u, uri)
}

// allowed reports whether requests of this UE may be routed to a host: a next hop, a host of its Service-Route, or a
// configured peer.
func (w *Worker) allowed(u *registrar.UE, uri *sipmsg.URI, a netip.Addr) bool {
	for _, h := range w.cfg.NextHops {
		if h.Addr.Addr() == a {
			return true
		}
	}
	for _, p := range w.cfg.Peers {
		if p.Contains(a) {
			return true
		}
	}
	if u.NextHop.IsValid() && u.NextHop.Addr.Addr() == a {
		return true
	}
	return onServiceRoute(u, uri)
}

// onServiceRoute reports whether a URI has a host of the UE's Service-Route.
func onServiceRoute(u *registrar.UE, uri *sipmsg.URI) bool {
	return u.Route != nil && slices.ContainsFunc(u.Route.Hosts, func(h string) bool { return sipmsg.EqualFold(uri.Host, h) })
}

// stripFromUE deletes what a UE may not say (trust boundary, TS 24.229 §5.2.6.3), the traces of the security agreement
// (RFC 3329 §2.3), and the rows that are written anew. It returns the index of the identity to assert: the one which
// P-Preferred-Identity names if it is registered over this SA, else the default public identity. What From says is no part of
// that. An identity that the UE claims and does not have is counted.
func (w *Worker) stripFromUE(u *registrar.UE) (identity int) {
	m := &w.m
	for _, row := range m.Rows() {
		switch row.ID {
		case sipmsg.PPreferredIdentity:
			if i := w.claimed(u, m.Value(row)); i > 0 {
				identity = i
			}
			w.e.DeleteRow(row)
		case sipmsg.PAssertedIdentity: // only the network asserts
			w.claimed(u, m.Value(row))
			w.e.DeleteRow(row)
		case sipmsg.SecurityClient, sipmsg.SecurityServer, sipmsg.SecurityVerify,
			sipmsg.PAssertedService, sipmsg.PChargingVector, sipmsg.PChargingFunctionAddresses,
			sipmsg.PMediaAuthorization, sipmsg.PUserDatabase, sipmsg.PProfileKey, sipmsg.PServedUser,
			sipmsg.PAssociatedURI, sipmsg.ServiceRoute, sipmsg.Path, sipmsg.PVisitedNetworkID, sipmsg.PCalledPartyID,
			sipmsg.MaxForwards, sipmsg.Route:
			w.e.DeleteRow(row)
		case sipmsg.PEarlyMedia:
			if !sipmsg.EqualFold(m.Value(row), "supported") { // RFC 5009 §6: only the network authorizes early media
				w.e.DeleteRow(row)
			}
		case sipmsg.PAccessNetworkInfo:
			if networkProvided(m.Value(row)) {
				w.stripNetworkProvided(row)
			}
		default:
		}
	}
	w.e.RemoveTokens(m, sipmsg.Require, "sec-agree", "mediasec")
	w.e.RemoveTokens(m, sipmsg.ProxyRequire, "sec-agree", "mediasec")
	return identity
}

// networkProvided reports whether a value of P-Access-Network-Info holds the parameter that only the network may set.
func networkProvided(v []byte) bool {
	const param = "network-provided"
	for i := 0; i+len(param) <= len(v); i++ {
		if sipmsg.EqualFold(v[i:i+len(param)], param) {
			return true
		}
	}
	return false
}

// stripNetworkProvided deletes those values of P-Access-Network-Info which only the network may insert (RFC 7315 §4.4).
func (w *Worker) stripNetworkProvided(row sipmsg.Row) {
	v := w.m.Value(row)
	keep := make([]byte, 0, len(v))
	for len(v) > 0 {
		elem, rest := sipmsg.Element(v)
		v = rest
		if networkProvided(elem) {
			continue
		}
		if len(keep) > 0 {
			keep = append(keep, ", "...)
		}
		keep = append(keep, elem...)
	}
	if len(keep) == 0 {
		w.e.DeleteRow(row)
		return
	}
	w.e.Replace(int(row.ValStart), int(row.ValEnd), keep)
}

// claimed returns the index of the first identity that a row of P-Preferred-Identity names and that is registered over this SA,
// or -1. There may be two, a sip and a tel URI (RFC 3325 §9.2). It counts a row with one that is not registered.
func (w *Worker) claimed(u *registrar.UE, value []byte) int {
	first, foreign := -1, false
	for len(value) > 0 {
		var elem []byte
		elem, value = sipmsg.Element(value)
		switch i := w.identityOf(u, elem); {
		case i < 0:
			foreign = true
		case first < 0:
			first = i
		}
	}
	if foreign {
		w.obs.IdentityMismatch()
	}
	return first
}

// identityOf returns the index of the registered identity that a header value names, or -1.
func (w *Worker) identityOf(u *registrar.UE, value []byte) int {
	na, err := sipmsg.ParseNameAddr(value)
	if err != nil {
		return -1
	}
	return slices.IndexFunc(u.Identities, func(id string) bool { return sipmsg.EqualFold(na.URI, id) })
}

// putAsserted writes the P-Asserted-Identity row of an identity into the open splice: with the tel URI of the same number
// beside a sip URI, where both are registered (RFC 3325 §9.1).
func (w *Worker) putAsserted(u *registrar.UE, i int) {
	w.e.Str("P-Asserted-Identity: <")
	w.e.Str(u.Identities[i])
	if tel := int(u.Beside[i]); tel > 0 {
		w.e.Str(">, <")
		w.e.Str(u.Identities[tel-1])
	}
	w.e.Str(">\r\n")
}

// putChargingVector writes P-Charging-Vector (RFC 7315 §4.6) into the open splice. The icid comes from the Call-ID under
// our key: unique, the same for all requests of a dialog and for retransmissions, and without state.
func (w *Worker) putChargingVector() {
	m := &w.m
	w.e.Str(`P-Charging-Vector: icid-value="`)
	w.e.Raw(w.hex64(w.seal.mac(&w.sc, []byte("icid"), m.Get(sipmsg.CallID))))
	w.e.Str(`";icid-generated-at=`)
	w.e.BareAddr(w.mwAddr(w.cfg.NextHops[0].Addr.Addr()).Addr())
	if w.cfg.OrigIOI != "" {
		w.e.Str(`;orig-ioi=`)
		w.e.Str(w.cfg.OrigIOI)
	}
	w.e.Str("\r\n")
}

// answerFromUE forwards a protected answer to the core (TS 24.229 §5.2.6.4). It belongs to a request that we sent to
// this very UE: the branch is sealed and names it.
func (w *Worker) answerFromUE(f ims.Flow, s *registrar.Set) {
	m, u := &w.m, s.UE
	via, err := sipmsg.ParseVia(m.Get(sipmsg.Via))
	if err != nil {
		w.obs.Drop(observe.ReasonMalformed)
		return
	}
	t, digits, ok := w.readBranch(via.Branch)
	if !ok {
		w.obs.Drop(observe.ReasonForgedToken)
		return
	}
	if t.kind != tokenToUE || int(t.worker) != w.id || t.ue != u.Index || t.gen != u.Gen {
		w.obs.Drop(observe.ReasonNotOwner)
		return
	}
	below, ok := w.viaBeneath()
	if !ok {
		w.obs.Drop(observe.ReasonViaMismatch)
		return
	}
	hop, ok := answerTarget(&below)
	want := w.answerDigits(&below, hop)
	if !ok || !bytes.Equal(w.hex64(want), digits) {
		w.obs.Drop(observe.ReasonViaMismatch)
		return
	}
	called, transport, ok := w.readAnswerHint(&via, want)
	if !ok {
		w.obs.Drop(observe.ReasonViaMismatch)
		return
	}
	hop.Transport = transport // whatever the UE has made of the Via beneath
	if !w.gotAnswer(u, true, want) {
		return
	}

	w.e.Reset(m)
	w.e.PopElement(m, sipmsg.Via)
	w.stripFromUE(u)
	if dialogForming(m.CSeqMethod()) {
		w.rewriteRecordRoute(s, false, false)
	}
	if int(called) < len(u.Identities) && m.Status() != 100 {
		w.e.Open(m.HeadersStart(), m.HeadersStart())
		w.putAsserted(u, int(called))
		w.e.Close()
	}
	if !w.finish() {
		return
	}
	if hop.Transport == ims.TCP {
		if c := w.answer[hop.Addr]; c != 0 && w.eg.SendTCP(c, w.out) == nil {
			w.countOut(ims.Mw, ims.TCP, sipmsg.MethodOther, w.out)
			return
		}
	}
	w.sendToCore(hop, w.out, sipmsg.MethodOther, nil)
	if f.Transport == ims.TCP && hop.Transport == ims.UDP && w.refuses() {
		w.repeatToCore(u, true, want, repeatAnswer, sipmsg.MethodInvite, hop)
	}
}
