package proxy

import (
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// Cases of the table in peers_test.go: requests and answers inside the SAs, over UDP and TCP.

// The answers to requests without Contact leave inside the SA.
func peerAnswersWithoutContact(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	for _, method := range []string{"MESSAGE", "BYE", "OPTIONS", "CANCEL", "UPDATE"} {
		req := r.one(p.protectedFlow, strings.ReplaceAll(p.says(), "MESSAGE", method))
		p.downlink(t, r.one(coreFlow(), answerTo(t, req.msg, "200 OK")))
	}
}

// Where a message goes is decided by the SA: neither Request-URI nor alias nor Contact changes it.
func peerTargetFromSA(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	for _, uri := range []string{
		"sip:001010000000001@192.0.2.1:5060", "sip:001010000000001@10.45.0.7:5060;alias=192.0.2.1~5060~1",
		"sip:x@10.45.0.99:6300;transport=tls", "tel:+15550100001", "sip:001010000000001@10.45.0.7;transport=tcp",
	} {
		out := r.one(coreFlow(), strings.Replace(r.request(p, "OPTIONS", "u"), "sip:001010000000001@10.45.0.7:6300", uri, 1))
		p.downlink(t, out)
		if !strings.HasPrefix(out.msg, "OPTIONS "+uri+" ") {
			t.Errorf("Request-URI changed:\n%s", out.msg)
		}
	}
}

// The ports of TS 33.203 §7.1 for every direction and transport, without any setting.
func peerPorts(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	// To the phone: pc to us.
	p.downlink(t, r.one(coreFlow(), r.request(p, "OPTIONS", "a")))
	// Its answer, from uc to ps or from us to pc.
	for _, f := range []ims.Flow{p.protectedFlow, p.fromServerPort()} {
		req := r.one(coreFlow(), r.request(p, "OPTIONS", "b"+f.Local.String()[9:]))
		if out := r.one(f, answerTo(t, req.msg, "200 OK")); out.remote.Addr() == ueAddr {
			t.Errorf("answer that came from %v to %v went to %v", f.Remote, f.Local, out.remote)
		}
	}
	// From the phone: the answer to uc's request by UDP goes pc to us.
	req := r.one(p.protectedFlow, p.says())
	p.downlink(t, r.one(coreFlow(), answerTo(t, req.msg, "200 OK")))
	// By TCP on the connection of the request.
	f := r.connect(p, 3)
	req = r.one(f, overTCP(p.says()))
	if out := r.one(coreFlow(), answerTo(t, req.msg, "200 OK")); out.conn != 3 {
		t.Errorf("answer over connection %d", out.conn)
	}
}

// fromServerPort is the flow of a phone that sends from port-us to port-pc.
func (p *phone) fromServerPort() ims.Flow {
	f := p.protectedFlow
	f.Local, f.Remote = netip.AddrPortFrom(gmAddr, p.pc), netip.AddrPortFrom(p.addr, p.portS)
	return f
}

// registeredOverTCP registers a phone whose protected REGISTER goes over TCP.
func (r *rig) registeredOverTCP(c ims.ConnID) (*phone, ims.Flow) {
	r.t.Helper()
	p := newPhone()
	r.challenge(p, clearFlow(), 5060)
	p.authorization = proof
	f := r.connect(p, c)
	req := r.one(f, overTCP(p.register("sm7", 6300, "Security-Verify: "+p.server)))
	ok := r.one(coreFlow(), answerTo(r.t, req.msg, "200 OK", granted...))
	if ok.conn != c || status(r.t, ok.msg) != 200 {
		r.t.Errorf("200 over connection %d:\n%s", ok.conn, ok.msg)
	}
	return p, f
}

func peerRegisterOverTCP(t *testing.T) {
	r := newRig(t)
	_, f := r.registeredOverTCP(4)
	if out := r.one(coreFlow(), r.request(newPhone(), "MESSAGE", "mt")); out.conn != 4 || !strings.Contains(out.msg, "Via: SIP/2.0/TCP 10.0.0.5:") {
		t.Errorf("MESSAGE over connection %d:\n%s", out.conn, out.msg)
	}
	r.hangUp(f)
}

// A phone that registered over TCP and closed its connection is called over one from port-pc.
func peerConnectsFromPC(t *testing.T) {
	for _, method := range []string{"MESSAGE", "NOTIFY", "INVITE", "OPTIONS"} {
		r := newRig(t)
		p, f := r.registeredOverTCP(4)
		r.hangUp(f)
		if out := r.deliver(coreFlow(), r.request(p, method, "mt")); len(out) != 0 || len(r.l.dials) != 1 {
			t.Fatalf("%s: sent %v, dials %v", method, out, r.l.dials)
		}
		d := r.l.dials[0]
		if d.local != netip.AddrPortFrom(gmAddr, p.pc) || d.remote != netip.AddrPortFrom(ueAddr, p.portS) || d.side != ims.GmProtected {
			t.Errorf("%s: connects from %v to %v on side %v", method, d.local, d.remote, d.side)
		}
		back := p.tcpFlow(9)
		back.Local, back.Remote = d.local, d.remote
		r.l.conns[9] = true
		r.w.Dialed(d.tag, 9, back, nil)
		r.inSA(p, r.l.out, 9)
		if len(r.l.out) != 1 || !strings.HasPrefix(r.l.out[0].msg, method) {
			t.Errorf("%s: after connecting %v", method, r.l.out)
		}
	}
}

// A phone that takes no connection gets the request over UDP, in the same SA and with a Via that says so.
func peerFallsBackToUDP(t *testing.T) {
	r := newRig(t)
	p, f := r.registeredOverTCP(4)
	r.hangUp(f)
	r.deliver(coreFlow(), r.request(p, "OPTIONS", "mt"))
	if len(r.l.dials) != 1 {
		t.Fatalf("dials %v", r.l.dials)
	}
	r.l.out = nil
	r.w.Dialed(r.l.dials[0].tag, 0, ims.Flow{}, io.ErrClosedPipe)
	if len(r.l.out) != 1 || !strings.Contains(r.l.out[0].msg, "Via: SIP/2.0/UDP 10.0.0.5:") {
		t.Fatalf("sent %v", r.l.out)
	}
	p.downlink(t, r.l.out[0])
}

// A connection lost within a dialog: what comes next travels in the SA or not at all.
func peerConnectionLostInDialog(t *testing.T) {
	r := newRig(t)
	p, f := r.registeredOverTCP(4)
	invite := r.one(f, overTCP(strings.ReplaceAll(p.says(), "MESSAGE", "INVITE")))
	r.hangUp(f)
	out := r.deliver(coreFlow(), answerTo(t, invite.msg, "180 Ringing"))
	out = append(out, r.deliver(coreFlow(), r.request(p, "BYE", "bye"))...)
	r.inSA(p, out)
	if len(r.l.dials) != 1 || r.l.dials[0].local != netip.AddrPortFrom(gmAddr, p.pc) || r.l.dials[0].remote != netip.AddrPortFrom(ueAddr, p.portS) {
		t.Fatalf("sent %v, dials %v", out, r.l.dials)
	}
	back := p.tcpFlow(9)
	back.Local, back.Remote = r.l.dials[0].local, r.l.dials[0].remote
	r.l.conns[9] = true
	r.l.out = nil
	r.w.Dialed(r.l.dials[0].tag, 9, back, nil)
	if len(r.l.out) != 2 || r.l.out[0].conn != 9 || r.l.out[1].conn != 9 {
		t.Errorf("after connecting: %v", r.l.out)
	}
}

// Once its SAs are gone nothing goes to a phone by any way, least of all in clear.
func peerNeverInClear(t *testing.T) {
	r := newRig(t)
	p, f := r.registeredOverTCP(4)
	route := r.path(p)
	pending := r.one(f, overTCP(p.says()))
	mt := strings.NewReplacer("INVITE", "OPTIONS").Replace(mtInvite(route, ""))
	r.w.table.Deregister(r.context(p), 0)
	r.advance(time.Minute)
	r.l.dials = nil
	var out []sent
	out = append(out, r.deliver(coreFlow(), mt)...)
	out = append(out, r.deliver(coreFlow(), answerTo(t, pending.msg, "200 OK"))...)
	for _, s := range out {
		if s.remote.Addr() == ueAddr || s.conn != 0 {
			t.Errorf("left to the phone from %v:\n%s", s.local, s.msg)
		}
	}
	if len(r.l.dials) != 0 || r.l.conns[4] {
		t.Errorf("dials %v, connections %v", r.l.dials, r.l.conns)
	}
	t.Run("what the core is told", TestRequestToUENotPossible)
}

// Two subscribers at one address: each gets its own.
func peerTwoAtOneAddress(t *testing.T) {
	r := newRig(t)
	a, b := r.signUp(phoneAt("10.45.0.7", 1)), r.signUp(phoneAt("10.45.0.7", 2))
	for _, p := range []*phone{a, b, a} {
		p.downlink(t, r.one(coreFlow(), r.request(p, "MESSAGE", "x")))
		up := r.one(p.protectedFlow, p.says())
		if got := get(t, up.msg, sipmsg.PAssertedIdentity); got != "<sip:"+p.impi+">" {
			t.Errorf("%s is taken for %s", p.impi, got)
		}
		p.downlink(t, r.one(coreFlow(), answerTo(t, up.msg, "200 OK")))
	}
	// An answer of one to a request for the other goes nowhere.
	req := r.one(coreFlow(), r.request(a, "MESSAGE", "y"))
	if out := r.deliver(b.protectedFlow, answerTo(t, req.msg, "200 OK")); len(out) != 0 {
		t.Errorf("the other phone's answer: %v", out)
	}
	r.leave(b)
	r.advance(finalKept + answerGrace)
	r.served(a)
}

// The connection of one SA set is used for no other.
func peerConnectionsAreBound(t *testing.T) {
	r := newRig(t)
	a, b := r.signUp(phoneAt("10.45.0.7", 1)), r.signUp(phoneAt("10.45.0.7", 2))
	f := r.connect(a, 4)
	r.one(f, overTCP(a.says()))
	big := strings.Replace(r.request(b, "INVITE", "big"), "Content-Type", "Subject: "+strings.Repeat("x", 1400)+"\r\nContent-Type", 1)
	if out := r.deliver(coreFlow(), big); len(out) != 0 || len(r.l.dials) != 1 || r.l.dials[0].remote.Port() != b.portS {
		t.Errorf("for the other phone: sent %v, dials %v", out, r.l.dials)
	}
	req := r.one(b.protectedFlow, b.says())
	b.downlink(t, r.one(coreFlow(), answerTo(t, req.msg, "200 OK")))
}

// The answer goes over the set of its request, also when another is in use by then.
func peerAnswerOnSetOfRequest(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	old := *p
	req := r.one(old.protectedFlow, old.says())
	r.renew(p)
	r.one(p.protectedFlow, strings.Replace(p.says(), "z9hG4bKm1", "z9hG4bKm2", 1)) // takes the new set into use
	old.downlink(t, r.one(coreFlow(), answerTo(t, req.msg, "200 OK")))
}

// A call in both directions with everything that belongs to it, over each transport.
func peerCalls(t *testing.T) {
	for _, tcp := range []bool{false, true} {
		r := newRig(t)
		p := r.registered()
		flow, via := p.protectedFlow, func(s string) string { return s }
		if tcp {
			flow, via = r.connect(p, 4), overTCP
		}
		up := func(method string) sent {
			t.Helper()
			out := r.one(flow, via(strings.NewReplacer("MESSAGE", method, "z9hG4bKm1", "z9hG4bK"+method).Replace(p.says())))
			if out.remote.Addr() == ueAddr || out.conn != 0 {
				t.Errorf("%s of the phone went to %v", method, out.remote)
			}
			return out
		}
		toPhone := func(s sent) {
			t.Helper()
			if tcp && s.conn == 4 {
				return
			}
			p.downlink(t, s)
		}
		invite := up("INVITE")
		for _, st := range []string{"100 Trying", "183 Session Progress", "180 Ringing"} {
			toPhone(r.one(coreFlow(), answerTo(t, invite.msg, st)))
		}
		for _, method := range []string{"PRACK", "UPDATE"} {
			toPhone(r.one(coreFlow(), answerTo(t, up(method).msg, "200 OK")))
		}
		toPhone(r.one(coreFlow(), answerTo(t, invite.msg, "200 OK")))
		up("ACK")
		toPhone(r.one(coreFlow(), answerTo(t, up("BYE").msg, "200 OK")))

		for _, method := range []string{"INVITE", "PRACK", "UPDATE", "ACK", "BYE"} {
			req := r.one(coreFlow(), r.request(p, method, method))
			p.downlink(t, req)
			if method == "ACK" {
				continue
			}
			for _, st := range []string{"180 Ringing", "200 OK"} {
				if out := r.one(p.protectedFlow, answerTo(t, req.msg, st)); out.remote.Addr() == ueAddr {
					t.Errorf("%s of the phone to %s went to %v", st, method, out.remote)
				}
			}
		}
	}
}

// One set carries UDP and TCP side by side.
func peerBothTransports(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	f := r.connect(p, 4)
	udp := r.one(p.protectedFlow, p.says())
	tcp := r.one(f, overTCP(strings.Replace(p.says(), "z9hG4bKm1", "z9hG4bKm2", 1)))
	if out := r.one(coreFlow(), answerTo(t, tcp.msg, "200 OK")); out.conn != 4 {
		t.Errorf("answer to TCP over connection %d", out.conn)
	}
	p.downlink(t, r.one(coreFlow(), answerTo(t, udp.msg, "200 OK")))
	if r.backend.Count() != 4 {
		t.Errorf("%d SAs", r.backend.Count())
	}
	t.Run("when the connection has gone", TestAnswerOverTCP)
}

// A source address alone proves nothing: only the exact tuple of an SA does.
func peerTupleNotAddress(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	for _, f := range []ims.Flow{
		{Local: p.protectedFlow.Local, Remote: netip.AddrPortFrom(ueAddr, 5060)},
		{Local: p.protectedFlow.Local, Remote: netip.AddrPortFrom(ueAddr, p.portS)},
		{Local: netip.AddrPortFrom(gmAddr, p.pc), Remote: netip.AddrPortFrom(ueAddr, p.portC)},
		{Local: netip.AddrPortFrom(gmAddr, 6101), Remote: p.protectedFlow.Remote},
	} {
		f.Transport, f.Side = ims.UDP, ims.GmProtected
		for _, msg := range []string{p.says(), p.register("x"+f.Remote.String(), 6300, "Security-Client:")} {
			if out := r.deliver(f, msg); len(out) != 0 {
				t.Errorf("from %v to %v, sent: %v", f.Remote, f.Local, out)
			}
		}
	}
	f := clearFlow()
	f.Remote = p.protectedFlow.Remote // in clear, from the protected port of the phone
	if out := r.one(f, p.says()); !strings.HasPrefix(out.msg, "SIP/2.0 403") {
		t.Errorf("in clear:\n%s", out.msg)
	}
}

func peerServiceRoute(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	for _, route := range []string{"<sip:192.0.2.1;lr>", "<sip:other@scscf." + domain + ":6060;lr>", ""} {
		msg := p.says()
		at := strings.Index(msg, "Route: ")
		end := at + strings.Index(msg[at:], "\r\n") + 2
		if route != "" {
			route = "Route: " + route + "\r\n"
		}
		out := r.one(p.protectedFlow, msg[:at]+route+msg[end:])
		if out.remote.Addr() != ueAddr && (out.remote != netip.MustParseAddrPort("10.0.1.7:6060") || get(t, out.msg, sipmsg.Route) != "<sip:orig@scscf."+domain+":6060;lr>") {
			t.Errorf("with %q: to %v by %s", route, out.remote, get(t, out.msg, sipmsg.Route))
		}
	}
	t.Run("by its own flow token", TestInitialRequestByToken)
}

// The answer to a request that came in clear leaves from the socket it came to, and what is protected from port-pc: each
// carries the address of its own side.
func peerOwnAddresses(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	out := r.one(clearFlow(), p.says())
	if out.local != netip.AddrPortFrom(gmAddr, 5060) {
		t.Errorf("403 in clear from %v", out.local)
	}
	mt := r.one(coreFlow(), r.request(p, "INVITE", "i"))
	for _, id := range []sipmsg.HeaderID{sipmsg.Via, sipmsg.RecordRoute} {
		if v := get(t, mt.msg, id); !strings.Contains(v, netip.AddrPortFrom(gmAddr, p.ps).String()) {
			t.Errorf("%v towards the phone: %s, want port-ps %d", id, v, p.ps)
		}
	}
	up := r.one(p.protectedFlow, p.says())
	if v := get(t, up.msg, sipmsg.Via); !strings.Contains(v, mwAddr.String()) {
		t.Errorf("Via towards the core: %s", v)
	}
}

// Both sides hang up at once: each BYE reaches the other.
func peerGlare(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	up := r.one(p.protectedFlow, strings.ReplaceAll(p.says(), "MESSAGE", "BYE"))
	down := r.one(coreFlow(), r.request(p, "BYE", "bye"))
	p.downlink(t, down)
	p.downlink(t, r.one(coreFlow(), answerTo(t, up.msg, "481 Call/Transaction Does Not Exist")))
	if out := r.one(p.protectedFlow, answerTo(t, down.msg, "481 Call/Transaction Does Not Exist")); status(t, out.msg) != 481 || out.remote.Addr() == ueAddr {
		t.Errorf("481 of the phone to %v:\n%s", out.remote, out.msg)
	}
}

// A request that is repeated because a datagram was lost is forwarded again, to the same place and as the same transaction.
func peerLostDatagram(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	for range 3 {
		p.downlink(t, r.one(coreFlow(), r.request(p, "INVITE", "again")))
	}
	first := r.one(coreFlow(), r.request(p, "INVITE", "again"))
	again := r.one(coreFlow(), r.request(p, "INVITE", "again"))
	if branch(t, first.msg) != branch(t, again.msg) {
		t.Error("a retransmission gets another branch")
	}
}

// Garbage of every kind, from every side, and the phones go on.
func peerGarbage(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	good := []string{p.register("g", 6300), p.says(), mtInvite(r.path(p), ""), answerTo(t, p.says(), "200 OK")}
	for _, msg := range good {
		for _, bad := range []string{
			"", "\r\n\r\n", msg[:len(msg)/2], strings.Replace(msg, "SIP/2.0", "SIP/9.9", 1), strings.Replace(msg, "Via: ", "Via: ,,,", 1),
			strings.Replace(msg, "CSeq: ", "CSeq: 99999999999", 1), strings.ReplaceAll(msg, "Call-ID", "X-Call-ID"),
			strings.Replace(msg, "To: <", "To: <<<", 1), strings.Replace(msg, "From: ", "From: \x00\xff", 1),
			strings.Replace(msg, "Content-Length: ", "Content-Length: -", 1),
			strings.Replace(msg, "Content-Length", "Security-Client: "+strings.Repeat("ipsec-3gpp;alg=a,", 500)+"\r\nContent-Length", 1),
			strings.Replace(msg, "Content-Length", "Contact: "+strings.Repeat("<sip:a@b>,", 500)+"<sip:a@b>\r\nContent-Length", 1),
			strings.Replace(msg, "Authorization: Digest", "Authorization: ,\x01=", 1),
		} {
			for _, f := range []ims.Flow{clearFlow(), p.protectedFlow, p.fromServerPort(), coreFlow()} {
				r.deliver(f, bad)
			}
		}
	}
	r.advance(time.Minute)
	r.served(p)
}

// Whatever comes in clear is answered to where it came from, and changes no way of a registered phone.
func peerViaForCore(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	f := clearFlow()
	f.Remote = netip.MustParseAddrPort("10.45.0.7:40000")
	req := r.one(f, p.register("x", 5060))
	if !strings.Contains(req.msg, "10.45.0.7:5060;branch=z9hG4bKx;rport=40000;received=10.45.0.7") {
		t.Errorf("the phone's Via at the core:\n%s", req.msg)
	}
	q := r.signUp(phoneAt("10.45.0.8", 2))
	up := r.one(q.protectedFlow, q.says())
	vias := 0
	for _, row := range scan(t, up.msg).Rows() {
		if row.ID == sipmsg.Via {
			vias++
		}
	}
	if vias != 2 || !strings.Contains(up.msg, "Via: SIP/2.0/UDP 10.45.0.8:6300;branch=z9hG4bKm1") {
		t.Errorf("the phone's Via at the core:\n%s", up.msg)
	}
}
