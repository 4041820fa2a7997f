package proxy

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/policy"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// with makes a rig whose policy is one set of settings for everybody.
func with(change ...func(*policy.Settings)) func(*Config) {
	return func(c *Config) {
		s := policy.Settings{IPsec: policy.Require, Suites: c.Suites}
		for _, f := range change {
			f(&s)
		}
		c.Policy = policy.Compile(s)
	}
}

func allow(s *policy.Settings)  { s.IPsec = policy.Allow }
func forbid(s *policy.Settings) { s.IPsec = policy.Forbid }
func giba(s *policy.Settings)   { s.GIBA = true }

// accepted are the rows of the core's 200 to a phone.
func (p *phone) accepted() []string {
	rows := slices.Clone(granted)
	rows[0] = strings.Replace(rows[0], ueAddr.String(), p.addr.String(), 1)
	return rows
}

// plain are the rows that a phone without IPsec does not send.
var plain = []string{"Security-Client:", "Require:", "Proxy-Require:"}

const digestChallenge = `WWW-Authenticate: Digest realm="` + domain + `",nonce="abc",algorithm=MD5,qop="auth"`

const credentials = `Digest username="` + impi + `",realm="` + domain + `",uri="sip:` + domain + `",nonce="abc",` +
	`response="402ab8df9f3a4d63a9f47c2f90e02938",algorithm=MD5,qop=auth,nc=00000001,cnonce="0a4f113b"`

// digest registers a phone in clear and returns what the core got with the credentials.
func (r *rig) digest(p *phone, f ims.Flow, branch string) (atCore sent) {
	r.t.Helper()
	p.authorization = credentials
	atCore = r.one(f, p.register(branch, int(f.Remote.Port()), plain...))
	out := r.one(coreFlow(), answerTo(r.t, atCore.msg, "200 OK", p.accepted()...))
	if status(r.t, out.msg) != 200 {
		r.t.Fatalf("answer:\n%s", out.msg)
	}
	return atCore
}

func (r *rig) association() *registrar.UE {
	return r.w.table.Context(registrar.Key{IMPI: impi, Addr: ueAddr, Clear: true})
}

// R5.60: SIP digest from the first REGISTER to the last, over the address association.
func TestDigestPassesThrough(t *testing.T) {
	r := newRig(t, with(allow))
	p := newPhone()
	first := r.one(clearFlow(), p.register("d1", 5060, plain...))
	if !strings.Contains(first.msg, `integrity-protected="no"`) {
		t.Errorf("first REGISTER:\n%s", first.msg)
	}
	ans := r.one(coreFlow(), answerTo(t, first.msg, "401 Unauthorized", digestChallenge))
	if status(t, ans.msg) != 401 || get(t, ans.msg, sipmsg.WWWAuthenticate) == "" || get(t, ans.msg, sipmsg.SecurityServer) != "" {
		t.Errorf("challenge:\n%s", ans.msg)
	}
	if r.w.table.UEs() != 0 {
		t.Error("a context exists before anybody is authenticated")
	}
	second := r.digest(p, clearFlow(), "d2")
	if !strings.Contains(second.msg, `integrity-protected="ip-assoc-pending"`) {
		t.Errorf("second REGISTER:\n%s", second.msg)
	}
	u := r.association()
	if u == nil || u.State != registrar.Registered || u.Current == nil || len(r.backend.Installed) != 0 {
		t.Fatalf("context %+v, %d sets installed", u, len(r.backend.Installed))
	}
	if i := r.w.info(u); !i.Clear || i.Emergency {
		t.Errorf("operators see %+v", i)
	}
	if want := 600030 * time.Second; u.Current.Deadline.Sub(r.l.now) != want {
		t.Errorf("life %v", u.Current.Deadline.Sub(r.l.now))
	}

	// A request of the phone and its answer.
	req := r.one(clearFlow(), p.message())
	if req.remote.Addr() != netip.MustParseAddr("10.0.1.7") || get(t, req.msg, sipmsg.PAssertedIdentity) == "" {
		t.Errorf("MESSAGE to %v:\n%s", req.remote, req.msg)
	}
	if out := r.one(coreFlow(), answerTo(t, req.msg, "200 OK")); out.local.Port() != 5060 || out.remote != clearFlow().Remote {
		t.Errorf("answer from %v to %v", out.local, out.remote)
	}
	// A request to the phone by the Path of its registration, however large, and its answer.
	path := get(t, second.msg, sipmsg.Path)
	from := coreFlow()
	from.Remote = netip.MustParseAddrPort("10.0.1.7:6060")
	inv := r.one(from, mtInvite(path, "Subject: "+strings.Repeat("x", 1400)+"\r\n"))
	if inv.local != clearFlow().Local || inv.remote != clearFlow().Remote {
		t.Errorf("INVITE from %v to %v", inv.local, inv.remote)
	}
	if out := r.one(clearFlow(), answerTo(t, inv.msg, "200 OK")); out.remote != from.Remote {
		t.Errorf("answer to %v", out.remote)
	}

	// Whoever else sends in clear is refused as ever: another port, another address, TCP.
	for name, f := range map[string]ims.Flow{
		"port": {Local: clearFlow().Local, Remote: netip.AddrPortFrom(ueAddr, 5061), Transport: ims.UDP, Side: ims.GmClear},
		"address": {
			Local: clearFlow().Local, Remote: netip.MustParseAddrPort("10.45.0.8:5060"), Transport: ims.UDP, Side: ims.GmClear,
		},
	} {
		if out := r.one(f, p.message()); status(t, out.msg) != 403 {
			t.Errorf("other %s:\n%s", name, out.msg)
		}
	}
	tcp := clearFlow()
	tcp.Transport, tcp.Conn = ims.TCP, 3
	r.l.conns[3] = true
	if out := r.one(tcp, p.message()); status(t, out.msg) != 403 {
		t.Errorf("TCP:\n%s", out.msg)
	}

	// Registered again, with the credentials and without.
	again := r.digest(p, clearFlow(), "d3")
	if !strings.Contains(again.msg, `integrity-protected="ip-assoc-yes"`) || get(t, again.msg, sipmsg.Path) != path {
		t.Errorf("re-REGISTER:\n%s", again.msg)
	}
	p.authorization = ""
	bare := r.one(clearFlow(), p.register("d4", 5060, plain...))
	if !strings.Contains(bare.msg, `integrity-protected="no"`) {
		t.Errorf("re-REGISTER without a response:\n%s", bare.msg)
	}
	r.deliver(coreFlow(), answerTo(t, bare.msg, "401 Unauthorized", digestChallenge))

	// Another port of the phone takes the association over, and the Path stays.
	moved := clearFlow()
	moved.Remote = netip.AddrPortFrom(ueAddr, 5070)
	r.digest(p, moved, "d5")
	if inv := r.one(from, mtInvite(path, "")); inv.remote != moved.Remote {
		t.Errorf("INVITE to %v", inv.remote)
	}
	if out := r.one(clearFlow(), p.message()); status(t, out.msg) != 403 {
		t.Errorf("from the old port:\n%s", out.msg)
	}

	// De-registration: the answer goes out, then nothing new, then nothing at all.
	p.authorization = credentials
	end := r.one(moved, p.register("d6", 5070, append([]string{"Expires: 0"}, plain...)...))
	if out := r.one(coreFlow(), answerTo(t, end.msg, "200 OK")); status(t, out.msg) != 200 {
		t.Errorf("answer:\n%s", out.msg)
	}
	if out := r.one(moved, p.message()); status(t, out.msg) != 403 {
		t.Errorf("after de-registration:\n%s", out.msg)
	}
	r.advance(129 * time.Second)
	if r.w.table.UEs() != 0 || len(r.w.inClear) != 0 {
		t.Errorf("%d contexts, %d names left", r.w.table.UEs(), len(r.w.inClear))
	}
}

// Over TCP the connection is the association, and ends with it.
func TestDigestOverTCP(t *testing.T) {
	r := newRig(t, with(allow))
	p := newPhone()
	f := clearFlow()
	f.Transport, f.Conn, f.Remote = ims.TCP, 5, netip.AddrPortFrom(ueAddr, 40000)
	r.l.conns[5], r.l.conns[6] = true, true
	path := get(t, r.digest(p, f, "t1").msg, sipmsg.Path)
	if inv := r.one(coreFlow(), mtInvite(path, "")); inv.conn != 5 || !strings.Contains(inv.msg, "Via: SIP/2.0/TCP") {
		t.Errorf("INVITE by %d:\n%s", inv.conn, inv.msg)
	}
	udp := f
	udp.Transport, udp.Conn = ims.UDP, 0
	if out := r.one(udp, p.message()); status(t, out.msg) != 403 {
		t.Errorf("UDP from the same port:\n%s", out.msg)
	}
	if req := r.one(f, p.message()); req.remote.Addr() != netip.MustParseAddr("10.0.1.7") {
		t.Errorf("MESSAGE to %v", req.remote)
	}
	r.w.Closed(5, f)
	delete(r.l.conns, 5)
	if out := r.one(coreFlow(), strings.Replace(mtInvite(path, ""), "z9hG4bKs9", "z9hG4bKt9", 1)); status(t, out.msg) != 430 || len(r.l.dials) != 0 {
		t.Errorf("%d dials, answer:\n%s", len(r.l.dials), out.msg)
	}
	g := f
	g.Conn, g.Remote = 6, netip.AddrPortFrom(ueAddr, 40001)
	if got := get(t, r.digest(p, g, "t2").msg, sipmsg.Path); got != path {
		t.Errorf("Path changed to %s", got)
	}
	// A connection that closes before the 200 leaves an association which the first request to the phone ends.
	h := f
	h.Conn, h.Remote = 7, netip.AddrPortFrom(ueAddr, 40002)
	r.l.conns[7] = true
	req := r.one(h, p.register("t3", 40002, plain...))
	r.w.Closed(7, h)
	delete(r.l.conns, 7)
	r.deliver(coreFlow(), answerTo(t, req.msg, "200 OK", p.accepted()...))
	if out := r.deliver(coreFlow(), strings.Replace(mtInvite(path, ""), "z9hG4bKs9", "z9hG4bKt3", 1)); len(out) != 0 {
		t.Errorf("sent %v", out)
	}
	if r.association() != nil || len(r.w.conns) != 0 {
		t.Errorf("association %v, %d connections", r.association(), len(r.w.conns))
	}
}

// Keys of a challenge never reach a phone, with IPsec or without.
func TestKeysNeverPass(t *testing.T) {
	r := newRig(t, with(allow))
	req := r.one(clearFlow(), newPhone().register("k1", 5060, plain...))
	out := r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge))
	if status(t, out.msg) != 401 || strings.Contains(out.msg, "ck=") || strings.Contains(out.msg, "ik=") || !strings.Contains(out.msg, "nonce=") {
		t.Errorf("answer:\n%s", out.msg)
	}
	req = r.one(clearFlow(), newPhone().register("k2", 5060, append([]string{"Call-ID: k2"}, plain...)...))
	out = r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", `WWW-Authenticate: Digest nonce="n",ck="b40b,ik=`))
	if status(t, out.msg) != 500 {
		t.Errorf("unreadable challenge:\n%s", out.msg)
	}
}

// require, allow and forbid with and without an offer.
func TestPolicyModes(t *testing.T) {
	for name, c := range map[string]struct {
		mode   func(*policy.Settings)
		extra  []string
		status int // 0: forwarded
		set    bool
	}{
		"require, offer":        {func(*policy.Settings) {}, nil, 0, true},
		"require, none":         {func(*policy.Settings) {}, plain, 421, false},
		"allow, offer":          {allow, nil, 0, true},
		"allow, none":           {allow, plain, 0, false},
		"allow, no sec-agree":   {allow, plain[1:], 0, false},
		"allow, malformed":      {allow, []string{"Security-Client: ipsec-3gpp;alg=hmac-sha-1-96;spi-c=0"}, 400, false},
		"allow, unreadable":     {allow, []string{`Security-Client: ipsec-3gpp;alg="x`}, 400, false},
		"allow, none in common": {allow, []string{"Security-Client: ipsec-3gpp;alg=foo;spi-c=1;spi-s=2;port-c=7000;port-s=7001"}, 494, false},
		"forbid, offer":         {forbid, nil, 0, false},
		"forbid, none":          {forbid, plain, 0, false},
		"forbid, unreadable":    {forbid, []string{`Security-Client: ipsec-3gpp;alg="x`}, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, with(c.mode))
			out := r.one(clearFlow(), newPhone().register("x", 5060, c.extra...))
			if c.status != 0 {
				if status(t, out.msg) != c.status {
					t.Errorf("answer:\n%s", out.msg)
				}
				return
			}
			for _, row := range []string{"Security-", "sec-agree"} {
				if strings.Contains(out.msg, row) {
					t.Errorf("%s reached the core:\n%s", row, out.msg)
				}
			}
			r.deliver(coreFlow(), answerTo(t, out.msg, "401 Unauthorized", challenge))
			if set := r.backend.Count() == 4; set != c.set || !set && r.backend.Count() != 0 {
				t.Errorf("%d SAs", r.backend.Count())
			}
		})
	}
}

// A 200 without authentication registers nobody, unless GIBA is switched on and no Authorization was there (R5.62).
func TestGIBA(t *testing.T) {
	for name, c := range map[string]struct {
		change []func(*policy.Settings)
		extra  []string
		status int
	}{
		"off":                {[]func(*policy.Settings){allow}, []string{"Authorization:"}, 500},
		"on":                 {[]func(*policy.Settings){allow, giba}, []string{"Authorization:"}, 200},
		"with Authorization": {[]func(*policy.Settings){allow, giba}, nil, 500},
		"de-registration":    {[]func(*policy.Settings){allow}, []string{"Authorization:", "Expires: 0"}, 500},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, with(c.change...))
			p := newPhone()
			req := r.one(clearFlow(), p.register("g1", 5060, append(c.extra, plain...)...))
			out := r.one(coreFlow(), answerTo(t, req.msg, "200 OK", granted...))
			if status(t, out.msg) != c.status || (r.association() != nil) != (c.status == 200) {
				t.Errorf("association %v, answer:\n%s", r.association() != nil, out.msg)
			}
		})
	}
}

// An identity with SAs neither gets an association nor keeps one, at whatever address and worker.
func TestNoDowngrade(t *testing.T) {
	other := clearFlow()
	other.Remote = netip.MustParseAddrPort("10.45.0.8:5060")

	t.Run("refused", func(t *testing.T) {
		r := newRig(t, with(allow))
		p := r.registered()
		for _, f := range []ims.Flow{clearFlow(), other} {
			out := r.one(f, p.register("n1", 5060, append([]string{"Call-ID: n1"}, plain...)...))
			if status(t, out.msg) != 403 || r.backend.Count() != 4 {
				t.Errorf("%d SAs, answer:\n%s", r.backend.Count(), out.msg)
			}
		}
	})
	t.Run("refused while the core was thinking", func(t *testing.T) {
		r := newRig(t, with(allow))
		q := newPhone()
		q.addr, q.callID, q.authorization = other.Remote.Addr(), "other", credentials
		late := r.one(other, q.register("n2", 5060, plain...))
		r.registered()
		out := r.one(coreFlow(), answerTo(t, late.msg, "200 OK", q.accepted()...))
		if status(t, out.msg) != 403 || r.w.table.Context(registrar.Key{IMPI: impi, Addr: q.addr, Clear: true}) != nil {
			t.Errorf("answer:\n%s", out.msg)
		}
	})
	t.Run("ended", func(t *testing.T) {
		r := newRig(t, with(allow))
		p := newPhone()
		req := r.digest(p, clearFlow(), "n3")
		q := newPhone()
		q.addr = other.Remote.Addr()
		r.digest(q, other, "n4")
		msg := r.one(clearFlow(), p.message()) // on its way while the phone changes over
		p.authorization = ""
		r.challenge(p, clearFlow(), 5060)
		r.confirm(p)
		if r.w.table.UEs() != 1 || len(r.w.inClear) != 0 {
			t.Errorf("%d contexts, %d names", r.w.table.UEs(), len(r.w.inClear))
		}
		for _, f := range []ims.Flow{clearFlow(), other} {
			if out := r.one(f, p.message()); status(t, out.msg) != 403 {
				t.Errorf("in clear after IPsec:\n%s", out.msg)
			}
		}
		if out := r.one(coreFlow(), mtInvite(get(t, req.msg, sipmsg.Path), "")); status(t, out.msg) != 430 {
			t.Errorf("by the old Path:\n%s", out.msg)
		}
		if out := r.deliver(coreFlow(), answerTo(t, msg.msg, "200 OK")); len(out) != 0 {
			t.Errorf("an answer left in clear: %v", out)
		}
	})
	t.Run("other worker", func(t *testing.T) {
		fleet := new(Fleet)
		join := func(c *Config) { c.Fleet = fleet }
		a, b := newRig(t, with(allow), join), newRig(t, with(allow), join)
		both := func() {
			for range 4 {
				a.settle()
				b.settle()
			}
		}
		// b has the SAs: a refuses before the core hears of it.
		p := b.registered()
		both()
		q := newPhone()
		q.addr, q.callID = other.Remote.Addr(), "q"
		a.l.out = nil
		a.w.Message(other, []byte(q.register("w1", 5060, plain...)))
		both()
		if len(a.l.out) != 1 || status(t, a.l.out[0].msg) != 403 {
			t.Fatalf("sent: %v", a.l.out)
		}
		// b loses them, a associates; b gets SAs again, a's association ends.
		b.w.table.Deregister(b.w.table.UEOf(impi, ueAddr), 0)
		b.advance(time.Second)
		q.authorization = credentials
		a.l.out = nil
		a.w.Message(other, []byte(q.register("w2", 5060, plain...)))
		both()
		req := a.l.out[0]
		a.l.out = nil
		a.w.Message(coreFlow(), []byte(answerTo(t, req.msg, "200 OK", q.accepted()...)))
		both()
		if len(a.l.out) != 1 || status(t, a.l.out[0].msg) != 200 || a.w.table.UEs() != 1 {
			t.Fatalf("%d contexts, sent: %v", a.w.table.UEs(), a.l.out)
		}
		p.agree()
		p.authorization, p.callID = "", "p2"
		b.challenge(p, clearFlow(), 5060)
		b.confirm(p)
		both()
		if a.w.table.UEs() != 0 {
			t.Error("the association outlives the SAs of its identity")
		}
	})
}

// A connection may carry the association of the normal registration and that of the emergency one. Both end with it: its number
// will be given to another phone's connection.
func TestBothAssociationsEndWithConnection(t *testing.T) {
	both := func(order [2]string, first bool) {
		r := newRig(t, with(allow))
		f := clearFlow()
		f.Transport, f.Conn, f.Remote = ims.TCP, 5, netip.AddrPortFrom(ueAddr, 40000)
		r.l.conns[5] = true
		var paths []string
		for i, kind := range order {
			p := newPhone()
			p.callID, p.authorization = "both"+kind, credentials
			contact := "Contact: <sip:001010000000001@10.45.0.7:6300" + kind + ">"
			req := r.one(f, p.register("b"+string(rune('0'+i)), 40000, append([]string{contact}, plain...)...))
			if out := r.one(coreFlow(), answerTo(t, req.msg, "200 OK", contact+";expires=3600", granted[1])); status(t, out.msg) != 200 {
				t.Fatalf("answer:\n%s", out.msg)
			}
			paths = append(paths, get(t, req.msg, sipmsg.Path))
		}
		if first { // one of them ends before the connection
			k := registrar.Key{IMPI: impi, Addr: ueAddr, Emergency: order[1] != "", Clear: true}
			r.w.table.Dissociate(r.w.table.Context(k).Current)
		}
		r.w.Closed(5, f) // and another phone gets the number
		for i, path := range paths {
			inv := strings.Replace(mtInvite(path, ""), "z9hG4bKs9", "z9hG4bKq"+string(rune('0'+i)), 1)
			if out := r.one(coreFlow(), inv); out.conn == 5 {
				t.Errorf("%q first: a request for %q goes on the connection of another phone", order[0], order[i])
			}
		}
		if r.w.table.UEs() != 0 || len(r.w.conns) != 0 {
			t.Errorf("%q first: %d contexts, %d connections left", order[0], r.w.table.UEs(), len(r.w.conns))
		}
	}
	for _, order := range [][2]string{{"", ";sos"}, {";sos", ""}} {
		both(order, false)
		both(order, true)
	}
}

// Three workers: one answers that it has no SAs of the identity, gets them, and says so, all before the last one has answered.
func TestNoDowngradeWhileAsking(t *testing.T) {
	fleet := new(Fleet)
	join := func(c *Config) { c.Fleet, c.Workers = fleet, 3 }
	a, b, c := newRig(t, with(allow), join), newRig(t, with(allow), join), newRig(t, with(allow), join)
	q := newPhone()
	q.addr, q.callID, q.authorization = netip.MustParseAddr("10.45.0.8"), "q", credentials
	f := clearFlow()
	f.Remote = netip.AddrPortFrom(q.addr, 5060)
	a.w.Message(f, []byte(q.register("ask", 5060, plain...)))
	for _, r := range []*rig{b, c, a} {
		r.settle()
	}
	req := a.l.out[0]
	a.l.out = nil
	a.w.Message(coreFlow(), []byte(answerTo(t, req.msg, "200 OK", q.accepted()...)))
	b.settle()
	b.registered()
	a.settle()
	c.settle()
	a.settle()
	if len(a.l.out) != 1 || status(t, a.l.out[0].msg) != 403 || a.w.table.UEs() != 0 || len(a.w.asking) != 0 {
		t.Errorf("%d associations of a phone with SAs, %d open questions, sent: %v", a.w.table.UEs(), len(a.w.asking), a.l.out)
	}
}

// While a worker has too much to do to say whether it has SAs of an identity, or has not begun, nobody gets an association. One
// that could not be told of new SAs is told later.
func TestNoDowngradeWhileBusy(t *testing.T) {
	fleet := new(Fleet)
	join := func(c *Config) { c.Fleet, c.Workers = fleet, 2 }
	a := newRig(t, with(allow), join)
	q := newPhone()
	q.addr, q.callID, q.authorization = netip.MustParseAddr("10.45.0.8"), "q", credentials
	f := clearFlow()
	f.Remote = netip.AddrPortFrom(q.addr, 5060)
	if out := a.one(f, q.register("alone", 5060, plain...)); status(t, out.msg) != 503 {
		t.Errorf("the other worker has not begun:\n%s", out.msg)
	}
	b := newRig(t, with(allow), join)
	b.l.full = true
	if out := a.one(f, q.register("full", 5060, plain...)); status(t, out.msg) != 503 {
		t.Errorf("the other worker is busy:\n%s", out.msg)
	}
	b.l.full = false
	step := func(f ims.Flow, msg string) string {
		a.l.out = nil
		a.w.Message(f, []byte(msg))
		b.settle()
		a.settle()
		return a.l.out[0].msg
	}
	req := step(f, q.register("free", 5060, plain...))
	if ans := step(coreFlow(), answerTo(t, req, "200 OK", q.accepted()...)); status(t, ans) != 200 {
		t.Fatalf("answer:\n%s", ans)
	}
	a.l.full = true
	b.registered()
	a.l.full = false
	b.advance(time.Second)
	a.settle()
	if a.w.table.UEs() != 0 {
		t.Error("the association outlives the SAs of its identity")
	}
}

// Without Authorization the private identity is derived from the public one, and need not be that of the SAs: the phone
// that has SAs under a public identity gets no association under it all the same, and loses the one that it has.
func TestNoDowngradeByPublicIdentity(t *testing.T) {
	const number = "+15550100001@" + domain // of P-Associated-URI
	port := clearFlow()
	port.Remote = netip.AddrPortFrom(ueAddr, 5062)
	alias := func(r *rig, branch, to string) (path string, code int) {
		q := newPhone()
		q.callID = branch
		req := r.one(port, q.register(branch, 5062, append([]string{"Authorization:", "To: <sip:" + to + ">"}, plain...)...))
		out := r.one(coreFlow(), answerTo(t, req.msg, "200 OK", granted...))
		return get(t, req.msg, sipmsg.Path), status(t, out.msg)
	}
	t.Run("refused", func(t *testing.T) {
		for _, to := range []string{number, "someone@" + domain} {
			r := newRig(t, with(allow, giba))
			p := r.registered()
			path, code := alias(r, "a1", to)
			if code != 403 || r.w.table.UEs() != 1 {
				t.Errorf("%s: answered %d, %d contexts", to, code, r.w.table.UEs())
			}
			if inv := r.one(coreFlow(), mtInvite(path, "")); status(t, inv.msg) != 430 {
				t.Errorf("%s: an INVITE went to %v", to, inv.remote)
			}
			r.served(p)
		}
	})
	t.Run("ended", func(t *testing.T) {
		r := newRig(t, with(allow, giba))
		path, code := alias(r, "a2", number)
		if code != 200 {
			t.Fatalf("answered %d", code)
		}
		p := r.registered()
		if inv := r.one(coreFlow(), mtInvite(path, "")); status(t, inv.msg) != 430 {
			t.Errorf("an INVITE went to %v", inv.remote)
		}
		r.served(p)
	})
	t.Run("others at the address", func(t *testing.T) {
		r := newRig(t, with(allow, giba))
		r.registered()
		q := newPhone()
		q.callID = "q"
		req := r.one(port, q.register("a3", 5062, append([]string{"Authorization:", "To: <sip:other@" + domain + ">"}, plain...)...))
		out := r.one(coreFlow(), answerTo(t, req.msg, "200 OK", granted[0], granted[1]))
		if status(t, out.msg) != 200 {
			t.Errorf("answer:\n%s", out.msg)
		}
	})
}

// The realm of a private identity may be written in any case (RFC 7542 §2.4): it stays the same identity.
func TestNoDowngradeByCase(t *testing.T) {
	r := newRig(t, with(allow))
	r.registered()
	q := newPhone()
	q.callID = "q"
	q.authorization = strings.Replace(credentials, impi, strings.ToUpper(impi), 1)
	other := clearFlow()
	other.Remote = netip.MustParseAddrPort("10.45.0.8:5060")
	for i, f := range []ims.Flow{clearFlow(), other} {
		if out := r.one(f, q.register("u"+string(rune('1'+i)), 5060, plain...)); status(t, out.msg) != 403 {
			t.Errorf("%v: passed:\n%s", f.Remote, out.msg)
		}
	}
}

// The address and port of one phone cannot be taken by another identity, as E6 has it for SAs.
func TestAssociationConflict(t *testing.T) {
	r := newRig(t, with(allow))
	p := newPhone()
	path := get(t, r.digest(p, clearFlow(), "c1").msg, sipmsg.Path)
	q := newPhone()
	q.impi, q.callID = "001019999999999@"+domain, "q"
	q.authorization = strings.Replace(credentials, impi, q.impi, 1)
	if out := r.one(clearFlow(), q.register("c2", 5060, plain...)); status(t, out.msg) != 403 {
		t.Errorf("answer:\n%s", out.msg)
	}
	if inv := r.one(coreFlow(), mtInvite(path, "")); inv.remote != clearFlow().Remote {
		t.Errorf("INVITE to %v", inv.remote)
	}
	// Once the first one has gone the port is free.
	end := r.one(clearFlow(), p.register("c3", 5060, append([]string{"Expires: 0"}, plain...)...))
	r.one(coreFlow(), answerTo(t, end.msg, "200 OK"))
	req := r.one(clearFlow(), q.register("c4", 5060, plain...))
	if out := r.one(coreFlow(), answerTo(t, req.msg, "200 OK", granted...)); status(t, out.msg) != 200 {
		t.Errorf("answer:\n%s", out.msg)
	}
	if out := r.one(coreFlow(), strings.Replace(mtInvite(path, ""), "z9hG4bKs9", "z9hG4bKc9", 1)); status(t, out.msg) != 430 {
		t.Errorf("by the first one's Path:\n%s", out.msg)
	}
}

// R5.66: the emergency registration has a context and SAs of its own, and neither registration touches the other.
func TestEmergencyRegistration(t *testing.T) {
	const contact = "Contact: <sip:001010000000001@10.45.0.7:6300;sos>"
	r := newRig(t)
	p := r.registered()
	normal := *p
	sos := newPhone()
	sos.n, sos.callID, sos.portS = 20, "sos", 6400
	sos.agree()
	emergency := func() *registrar.UE {
		return r.w.table.Context(registrar.Key{IMPI: impi, Addr: ueAddr, Emergency: true})
	}
	// Both have a temporary set at once.
	p.agree()
	re := r.one(normal.protectedFlow, p.register("e1", 6300, "Security-Verify: "+normal.server))
	r.readServer(p, r.one(coreFlow(), answerTo(t, re.msg, "401 Unauthorized", challenge)).msg)
	req := r.one(clearFlow(), sos.register("e2", 5060, contact))
	r.readServer(sos, r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge)).msg)
	if r.backend.Count() != 12 || emergency() == nil {
		t.Fatalf("%d SAs", r.backend.Count())
	}
	sos.authorization = proof
	sm8 := r.one(sos.protectedFlow, sos.register("e3", 6400, contact, "Security-Verify: "+sos.server))
	out := r.one(coreFlow(), answerTo(t, sm8.msg, "200 OK", contact+";expires=3600"))
	sos.downlink(t, out)
	if get(t, sm8.msg, sipmsg.Path) == r.path(p) {
		t.Error("both registrations have one Path")
	}
	r.confirm(p)
	if u := emergency(); u.State != registrar.Registered || len(u.Sets) != 1 || u.Current.Phase != sa.Established {
		t.Errorf("emergency context %+v", u)
	}
	if inv := r.one(coreFlow(), mtInvite(get(t, sm8.msg, sipmsg.Path), "")); inv.remote.Port() != sos.portS {
		t.Errorf("INVITE to %v", inv.remote)
	}
	// The normal one ends, or moves to another address: the emergency one stays.
	r.w.leave(impi, netip.MustParseAddr("10.45.0.99"))
	r.advance(129 * time.Second)
	if r.w.table.UEOf(impi, ueAddr) != nil || emergency() == nil || r.backend.Count() != 4 {
		t.Errorf("%d SAs are left", r.backend.Count())
	}
	// A de-registration is the core's to refuse (TS 24.229 §5.1.6, §5.4.8).
	end := r.one(sos.protectedFlow, sos.register("e4", 6400, contact+";expires=0"))
	if out := r.one(coreFlow(), answerTo(t, end.msg, "501 Not Implemented")); status(t, out.msg) != 501 || emergency().State != registrar.Registered {
		t.Errorf("answer:\n%s", out.msg)
	}
	// One over the SAs of the other registration gets a challenge and SAs of its own.
	n := newPhone()
	n.n, n.callID = 30, sos.callID
	n.agree()
	n.authorization = proof
	over := r.one(sos.protectedFlow, n.register("e5", 6400))
	if !strings.Contains(over.msg, `integrity-protected="no"`) || get(t, over.msg, sipmsg.Path) == get(t, sm8.msg, sipmsg.Path) {
		t.Errorf("normal REGISTER over the emergency SAs:\n%s", over.msg)
	}
	r.readServer(n, r.one(coreFlow(), answerTo(t, over.msg, "401 Unauthorized", challenge)).msg)
	r.confirm(n)
	if u := r.w.table.UEOf(impi, ueAddr); u == nil || u.State != registrar.Registered || emergency().Current.Phase != sa.Established {
		t.Error("the two registrations are mixed up")
	}

	t.Run("forbidden", func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.NoEmergency = true })
		if out := r.one(clearFlow(), newPhone().register("f", 5060, contact)); status(t, out.msg) != 403 {
			t.Errorf("answer:\n%s", out.msg)
		}
	})
	t.Run("not for a policy of normal ones", func(t *testing.T) {
		r := newRig(t, with(func(s *policy.Settings) { s.Clear = []ims.Transport{ims.TCP} }), func(c *Config) {
			c.Fleet, c.SetsMax = new(Fleet), 1
			c.Fleet.sets.Add(1)
		})
		if out := r.one(clearFlow(), newPhone().register("f1", 5060)); status(t, out.msg) != 403 {
			t.Errorf("answer:\n%s", out.msg)
		}
		req := r.one(clearFlow(), newPhone().register("f2", 5060, contact))
		if out := r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge)); status(t, out.msg) != 401 {
			t.Errorf("answer:\n%s", out.msg)
		}
	})
}

// A phone with an association over UDP notices nothing of a restart, one over TCP has lost its connection anyway, and a
// policy that has become stricter ends both. What the policy says of the traffic of other phones holds on.
func TestRestartInClear(t *testing.T) {
	for _, strict := range []bool{false, true} {
		k := newKeptRig(t, with(allow, func(s *policy.Settings) { s.AnswersToSource = true }))
		p := newPhone()
		path := get(t, k.digest(p, clearFlow(), "r1").msg, sipmsg.Path)
		q := newPhone()
		q.addr, q.impi, q.callID = netip.MustParseAddr("10.45.0.8"), "tcp@"+domain, "q"
		q.authorization = strings.Replace(credentials, impi, q.impi, 1)
		f := clearFlow()
		f.Transport, f.Conn, f.Remote = ims.TCP, 5, netip.AddrPortFrom(q.addr, 40000)
		k.l.conns[5] = true
		req := k.one(f, q.register("r2", 40000, plain...))
		k.one(coreFlow(), answerTo(t, req.msg, "200 OK", q.accepted()...))
		e := newPhone()
		e.addr, e.impi, e.callID = netip.MustParseAddr("10.45.0.9"), "sos@"+domain, "e"
		at := clearFlow()
		at.Remote = netip.AddrPortFrom(e.addr, 5060)
		contact := "Contact: <sip:001010000000001@10.45.0.9:6300;sos>"
		sm2 := k.one(at, e.register("r3", 5060, contact))
		k.readServer(e, k.one(coreFlow(), answerTo(t, sm2.msg, "401 Unauthorized", challenge)).msg)
		e.authorization = strings.Replace(proof, impi, e.impi, 1)
		sm8 := k.one(e.protectedFlow, e.register("r4", 6300, contact, "Security-Verify: "+e.server))
		k.one(coreFlow(), answerTo(t, sm8.msg, "200 OK", contact+";expires=3600"))

		if strict {
			k.cfg.Policy = nil
		}
		o := k.restart(t, 10*time.Second, false)
		if want := map[bool]int{false: 1, true: 2}[strict]; o.Dropped != want || o.Adopted != 1 {
			t.Errorf("strict %v: %+v", strict, o)
		}
		u := k.w.table.Context(registrar.Key{IMPI: e.impi, Addr: e.addr, Emergency: true})
		if u == nil || u.Current == nil || u.Current.AnswersToSource == strict {
			t.Errorf("strict %v: emergency context %+v", strict, u)
		}
		if (k.association() != nil) == strict || k.w.table.Context(registrar.Key{IMPI: q.impi, Addr: q.addr, Clear: true}) != nil {
			t.Errorf("strict %v: association %v", strict, k.association())
		}
		inv := k.one(coreFlow(), mtInvite(path, ""))
		if strict {
			if status(t, inv.msg) != 430 {
				t.Errorf("answer:\n%s", inv.msg)
			}
			continue
		}
		if inv.remote != clearFlow().Remote {
			t.Errorf("INVITE to %v", inv.remote)
		}
		if req := k.one(clearFlow(), p.message()); req.remote.Addr() != netip.MustParseAddr("10.0.1.7") {
			t.Errorf("MESSAGE to %v", req.remote)
		}
	}
}

// A restart with another number of workers gives a registration in clear to another worker: the core's requests by the Path of
// before reach the phone there, and what it registers afterwards wherever that is.
func TestClearRelocated(t *testing.T) {
	c := newCrew(t, 2, with(allow))
	b := c.rigs[1]
	p := newPhone()
	p.authorization = credentials
	req := c.one(1, clearFlow(), p.register("d1", 5060, plain...))
	c.one(1, coreFlow(), answerTo(t, req.msg, "200 OK", p.accepted()...))
	if b.association() == nil {
		t.Fatal("not registered")
	}
	path := get(t, req.msg, sipmsg.Path)
	c.snapshot()
	if o := c.crash(); o.Relocated != 1 {
		t.Fatalf("%d relocated", o.Relocated)
	}
	a := c.rigs[0]
	for worker := range c.rigs {
		out := c.one(worker, scscf(), strings.Replace(mtInvite(path, ""), "z9hG4bKs9", "z9hG4bKr"+string(rune('0'+worker)), 1))
		if out.local != clearFlow().Local || out.remote != clearFlow().Remote {
			t.Errorf("INVITE at worker %d: from %v to %v:\n%s", worker, out.local, out.remote, out.msg)
		}
	}
	// Its time runs out, and it registers anew where its address has been moved to meanwhile.
	a.w.table.DissociateAll(impi)
	req = c.one(1, clearFlow(), p.register("d2", 5060, plain...))
	c.one(1, coreFlow(), answerTo(t, req.msg, "200 OK", p.accepted()...))
	path = get(t, req.msg, sipmsg.Path)
	for worker := range c.rigs {
		out := c.one(worker, scscf(), strings.Replace(mtInvite(path, ""), "z9hG4bKs9", "z9hG4bKq"+string(rune('0'+worker)), 1))
		if out.remote != clearFlow().Remote {
			t.Errorf("INVITE at worker %d to %v:\n%s", worker, out.remote, out.msg)
		}
	}
}
