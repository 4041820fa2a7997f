package proxy

import (
	"cmp"
	"net/netip"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// requestFromCore forwards a request of the core to the UE that its Route names: our entry is the Path of the
// registration or the Record-Route of the dialog, and its token the UE context (TS 24.229 §5.2.6.4).
func (w *Worker) requestFromCore(f ims.Flow) {
	m := &w.m
	method := m.Method()
	via, err := sipmsg.ParseVia(m.Get(sipmsg.Via))
	if err != nil {
		w.obs.Drop(observe.ReasonMalformed)
		return
	}
	r := w.popRoutes()
	if r.token == nil {
		w.requestForUs(f)
		return
	}
	t, ok := w.seal.open(&w.sc, r.token)
	if !ok || t.kind != tokenPath && t.kind != tokenClear {
		w.refuse(f, nil, 403, "Forbidden", "Route: flow token is not ours", observe.ReasonForgedToken)
		return
	}
	t = w.cfg.renamed(t)
	if int(t.worker) != w.id {
		// The connection stays here. What the other worker answers goes on one that it opens (RFC 3261 §18.2.2).
		there := f
		there.Conn = 0
		if int(t.worker) >= w.cfg.Workers || w.eg.Hand(int(t.worker), there, m.Bytes()) != nil {
			w.refuse(f, nil, 430, "Flow Failed", "Route: no such flow", observe.ReasonStaleToken)
		}
		return
	}
	u := w.ueOf(t)
	if u == nil && w.awaits(t, f) {
		return
	}
	if u == nil {
		w.refuse(f, nil, 430, "Flow Failed", "Route: the registration is gone", observe.ReasonStaleToken)
		return
	}
	s := u.Current
	if s == nil || !s.Live() || u.State != registrar.Registered && starts(method) {
		code := cmp.Or(w.cfg.StatusNoSet, 480)
		w.refuse(f, nil, code, statusPhrase(code), "no security association with the UE", observe.ReasonUEUnreachable)
		return
	}
	left, ok := w.forwardsLeft()
	switch {
	case !ok:
		w.refuse(f, nil, 400, "Bad Request", "Max-Forwards: not a number up to 255", observe.ReasonMalformed)
		return
	case left == 0:
		w.refuse(f, nil, 483, "Too Many Hops", "Max-Forwards: 0", observe.ReasonMaxForwards)
		return
	}
	// The answer will be sent by the Via as we forward it, so received and rport count as filled in.
	below := via
	if via.Received != nil || needsReceived(&via, f.Remote.Addr()) {
		w.addr = f.Remote.Addr().AppendTo(w.addr[:0])
		below.Received = w.addr
	}
	if below.HasRPort && below.RPort == 0 {
		below.RPort = f.Remote.Port()
	}
	back, ok := answerTarget(&below)
	if !ok {
		w.refuse(f, nil, 400, "Bad Request", "Via: no address to answer to", observe.ReasonMalformed)
		return
	}
	if f.Conn != 0 {
		w.remember(f.Conn, back.Addr)
	}
	digits := w.answerDigits(&below, back)
	if method == sipmsg.MethodAck {
		w.gotAck(u, true, digits)
	}
	tcp := w.overTCP(s, method, digits)
	transport := ims.UDP
	if tcp {
		transport = ims.TCP
	}

	w.e.Reset(m)
	w.markReceived(&via, f)
	called := w.stripFromCore(u)
	at := m.HeadersStart()
	w.e.Open(at, at)
	w.e.Str("Via: SIP/2.0/")
	w.e.Str(transport.Via())
	w.e.Str(" ")
	w.e.AddrPort(netip.AddrPortFrom(s.Local, s.Ports.PS))
	w.e.Str(";branch=")
	w.putBranch(token{kind: tokenToUE, worker: uint8(w.id), ue: u.Index, gen: u.Gen}, digits)
	w.putAnswerHint(uint8(min(max(called, 0), 255)), back.Transport, digits)
	w.e.Str("\r\n")
	if dialogForming(method) && !w.inDialog() {
		w.e.Str("Record-Route: <sip:")
		self := w.pathToken(u)
		self.called = true
		w.e.Raw(w.seal.seal(&w.sc, self))
		w.putSelf(s, true, tcp)
		w.e.Str(">\r\n")
	}
	w.putRest(&r)
	w.putForwards(left)
	w.e.Close()
	if !w.finish() {
		return
	}
	if !tcp || s.Clear {
		w.sendToUE(s, byUDP, w.out, method)
		if f.Transport == ims.TCP && !tcp && method != sipmsg.MethodAck {
			w.repeatToUE(s, true, digits, kindOf(method), method, byUDP)
		}
		return
	}
	w.requestOverTCP(f, s, method)
}

// starts reports whether a request begins something new, which a UE that is being de-registered no longer gets.
func starts(m sipmsg.Method) bool {
	switch m {
	case sipmsg.MethodAck, sipmsg.MethodBye, sipmsg.MethodCancel, sipmsg.MethodNotify, sipmsg.MethodPrack,
		sipmsg.MethodUpdate:
		return false
	default:
		return true
	}
}

// overTCP decides the transport of a request to a UE: TCP for phones that registered over it and for what is too large
// for one datagram (RFC 3261 §18.1.1), UDP else. What belongs to an INVITE goes the way that one went.
func (w *Worker) overTCP(s *registrar.Set, method sipmsg.Method, tx uint64) bool {
	const grows = 250 // Via and Record-Route that we add
	u := s.UE
	switch {
	case s.Clear: // the phone is where its REGISTER came from, and nowhere else
		return s.OverTCP
	case w.retry == retryUDP:
		u.Forget(tx)
		return false
	case s.Requests != 0:
		return s.Requests == ims.TCP
	case s.OverTCP:
		return true
	case method == sipmsg.MethodCancel, method == sipmsg.MethodAck && u.IsOverTCP(tx):
		return u.IsOverTCP(tx)
	case len(w.m.Bytes())+grows <= w.cfg.UDPLimit:
		return false
	case method == sipmsg.MethodInvite:
		u.WentOverTCP(tx)
	}
	return true
}

// requestOverTCP sends the finished request on a connection of the set, or opens one. If the UE accepts none the request
// goes over UDP in the same set after all: some phones do not listen on port-us for TCP.
func (w *Worker) requestOverTCP(f ims.Flow, s *registrar.Set, method sipmsg.Method) {
	w.countOut(ims.GmProtected, ims.TCP, method, w.out)
	theirs := s.ConnIn
	if s.OwnConnection {
		theirs = 0
	}
	for _, c := range []ims.ConnID{s.ConnOut, theirs} {
		if c != 0 && w.eg.SendTCP(c, w.out) == nil {
			return
		}
	}
	req := append([]byte(nil), w.m.Bytes()...)
	w.dialUE(s, w.out, func() {
		w.retry = retryUDP
		defer func() { w.retry = 0 }()
		if w.m.Scan(req) == nil {
			w.requestFromCore(f)
		}
	})
}

// remember notes which connection the requests of a peer come over, so that their answers go back on it.
func (w *Worker) remember(c ims.ConnID, sentBy netip.AddrPort) {
	old, known := w.answer[sentBy]
	if old == c && known || !known && len(w.answer) >= maxFwdPeers {
		return
	}
	w.unremember(c)
	if known {
		delete(w.sentBy, old)
	}
	w.answer[sentBy], w.sentBy[c] = c, sentBy
}

// unremember forgets which peer a connection answers.
func (w *Worker) unremember(c ims.ConnID) {
	if sentBy, ok := w.sentBy[c]; ok {
		delete(w.sentBy, c)
		if w.answer[sentBy] == c {
			delete(w.answer, sentBy)
		}
	}
}

// requestForUs answers requests of the core that name no UE.
func (w *Worker) requestForUs(f ims.Flow) {
	if w.m.Method() == sipmsg.MethodNotify && w.notifyForUs(f) {
		return
	}
	if w.m.Method() == sipmsg.MethodOptions {
		w.out = w.reply(w.out[:0], f, nil, 200, "OK", "", "Accept: application/sdp\r\n")
		w.sendReply(f, nil, w.out)
		return
	}
	w.refuse(f, nil, 404, "Not Found", "Route: names no registration", observe.ReasonUnknownRequest)
}

// stripFromCore deletes what stays inside the trust domain (RFC 3325 §5, TS 24.229 §5.2.6.4) and the rows that are
// written anew. It returns the index of the identity that was called, or -1.
func (w *Worker) stripFromCore(u *registrar.UE) (called int) {
	m := &w.m
	called = -1
	private := sipmsg.HasToken(m.Get(sipmsg.Privacy), "id") || privacyID(m.Get(sipmsg.Privacy))
	for _, row := range m.Rows() {
		switch row.ID {
		case sipmsg.PCalledPartyID:
			called = w.identityOf(u, m.Value(row))
		case sipmsg.PChargingVector, sipmsg.PChargingFunctionAddresses, sipmsg.PUserDatabase, sipmsg.PProfileKey,
			sipmsg.PServedUser:
			w.e.DeleteRow(row)
		case sipmsg.PAssertedIdentity:
			if private {
				w.e.DeleteRow(row)
			}
		case sipmsg.MaxForwards, sipmsg.Route:
			if m.IsRequest() {
				w.e.DeleteRow(row)
			}
		default:
		}
	}
	return called
}

// privacyID reports whether a Privacy value, whose items are separated by semicolons, holds "id" (RFC 3325 §9.3).
func privacyID(v []byte) bool {
	_, ok := sipmsg.Param(v, "id")
	return ok
}

// answerFromCore forwards an answer of the core to the UE whose request it answers.
func (w *Worker) answerFromCore(f ims.Flow) {
	m := &w.m
	via, err := sipmsg.ParseVia(m.Get(sipmsg.Via))
	if err != nil {
		w.obs.Drop(observe.ReasonMalformed)
		return
	}
	if len(via.Branch) >= len(healthMark) && string(via.Branch[:len(healthMark)]) == healthMark {
		return // any answer shows that the next hop lives, and that is noted already
	}
	t, digits, ok := w.readBranch(via.Branch)
	if !ok {
		w.obs.Drop(observe.ReasonUnknownResponse)
		return
	}
	if int(t.worker) != w.id {
		if int(t.worker) >= w.cfg.Workers || w.eg.Hand(int(t.worker), f, m.Bytes()) != nil {
			w.obs.Drop(observe.ReasonUnknownResponse)
		}
		return
	}
	switch t.kind {
	case tokenRegister:
		w.registerAnswer(digits)
		return
	case tokenSubscribe:
		w.subscribeAnswer(t, digits)
		return
	case tokenToCore:
	default:
		w.obs.Drop(observe.ReasonUnknownResponse)
		return
	}
	u := w.table.Lookup(t.ue, t.gen)
	if u == nil && w.awaits(t, f) {
		return
	}
	if u == nil {
		w.obs.Drop(observe.ReasonStaleToken)
		return
	}
	tx := digitsOf(digits)
	if !w.gotAnswer(u, false, tx) {
		return
	}
	// The answer goes over the set of the request while that lives, else over the one in use.
	hint, _ := w.readHint(&via, 2)
	serial, how := hint[0], channel(hint[1])
	if how == 0 {
		how = byUDP
	}
	s := u.Set(serial)
	if s == nil {
		s = u.Current
	}
	if s == nil {
		w.obs.Drop(observe.ReasonUEUnreachable)
		return
	}
	w.e.Reset(m)
	w.e.PopElement(m, sipmsg.Via)
	w.stripFromCore(u)
	if dialogForming(m.CSeqMethod()) {
		w.rewriteRecordRoute(s, true, how.tcp())
	}
	if m.Status() == 503 {
		// RFC 3261 §16.7: a 503 speaks of the core, and phones would take it as a reason to leave this P-CSCF.
		const status = len("SIP/2.0 ")
		w.e.ReplaceString(status, status+3, "500")
		if row, ok := m.First(sipmsg.RetryAfter); ok {
			w.e.DeleteRow(row)
		}
	}
	if !w.finish() {
		return
	}
	w.sendToUE(s, how, w.out, sipmsg.MethodOther)
	if f.Transport == ims.TCP && w.refuses() && !overConnection(s, how) {
		w.repeatToUE(s, false, tx, repeatAnswer, sipmsg.MethodInvite, how)
	}
}

// overConnection reports whether an answer to a UE goes over TCP.
func overConnection(s *registrar.Set, how channel) bool {
	if s.Clear {
		return s.OverTCP
	}
	return how.tcp()
}
