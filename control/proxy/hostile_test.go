package proxy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// A REGISTER with two credentials is refused: the registrar might look at the ones we have not checked (R5.16).
func TestOneAuthorization(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	p.authorization = `Digest username="` + p.impi + `",realm="x",uri="sip:x",nonce="a",response="b"` + "\r\n" +
		`Authorization: Digest username="victim@` + domain + `",realm="` + domain + `",uri="sip:` + domain + `",nonce="a",response="b"`
	p.agree()
	out := r.one(p.protectedFlow, p.register("a2", 6300))
	if out.remote == coreAddr {
		t.Errorf("vouches for the victim:\n%s", out.msg)
	}
}

// A UE cannot get around its Service-Route with a flow token of its own (R5.35).
func TestInitialRequestByToken(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	own := strings.Replace(r.path(p), "@10.0.1.5:5060", fmt.Sprintf("@10.0.0.5:%d", p.ps), 1)
	msg := p.message()
	at := strings.Index(msg, "Route: ")
	end := at + strings.Index(msg[at:], "\r\n")
	msg = msg[:at] + "Route: " + own + ", <sip:10.0.1.9:5060;lr>" + msg[end:]
	out := r.one(p.protectedFlow, msg)
	if out.remote == coreAddr && !strings.Contains(get(t, out.msg, sipmsg.Route), "orig@scscf") {
		t.Errorf("initial request passes by the Service-Route to %v:\n%s", out.remote, out.msg)
	}
}

// A set that was dropped for a wrong Security-Verify carries no registration any more (R5.21).
func TestDroppedSetStaysDropped(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	r.challenge(p, clearFlow(), 5060)
	p.authorization = proof
	bad := r.one(p.protectedFlow, p.register("bad", 6300, "Security-Verify: "+strings.Replace(p.server, "port-c=6", "port-c=7", 1)))
	if status(t, bad.msg) != 494 {
		t.Fatal(bad.msg)
	}
	for _, out := range r.deliver(p.protectedFlow, p.register("good", 6300, "Security-Verify: "+p.server)) {
		if out.remote != coreAddr {
			continue
		}
		t.Errorf("set dropped for a mismatch carries a registration")
		r.one(coreFlow(), answerTo(t, out.msg, "200 OK", granted...))
		de := r.one(p.protectedFlow, p.register("de", 6300, "Expires: 0", "Security-Client:"))
		r.one(coreFlow(), answerTo(t, de.msg, "200 OK"))
		r.advance(140 * time.Second)
		if r.backend.Count() != 0 {
			t.Errorf("140 s after de-registration: %d SAs", r.backend.Count())
		}
	}
}

// SM7 in a new transaction after the 200 is a refresh (R6.19).
func TestRepeatedSM7(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	out := r.one(p.protectedFlow, p.register("sm7-again", 6300, "Security-Verify: "+p.server))
	if out.remote != coreAddr {
		t.Errorf("R6.19: same offer on the established set is refused:\n%s", out.msg)
	}
}

// A set ends while the core thinks about a REGISTER that came over it: the core's answer ends the transaction all the same.
func TestAnsweredTooLate(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	req := r.one(p.protectedFlow, p.register("rf", 6300, "Security-Client:"))
	r.w.table.Expired(r.context(p).Current.ID)
	if out := r.deliver(coreFlow(), answerTo(t, req.msg, "200 OK", p.ok200()...)); len(out) != 0 {
		t.Errorf("sent: %v", out)
	}
	r.advance(10 * time.Second)
	if len(r.l.out) != 0 {
		t.Errorf("after its answer the core is asked %d times:\n%v", len(r.l.out), r.l.out[0])
	}
	r.empty()
}

// A query of the bindings that the core challenges changes nothing of the registration either: over the set of the registration
// it brings a new set as any re-authentication, in clear it brings none.
func TestChallengedQuery(t *testing.T) {
	fetch := []string{"Contact:", "Expires:"}
	bindings := "Contact: <sip:001010000000001@10.45.0.7:6300>;expires=500"
	for name, protected := range map[string]bool{"over the set": true, "in clear": false} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			p := r.registered()
			u, before, deadline := r.context(p), *p, r.context(p).Current.Deadline
			from := clearFlow()
			if protected {
				from = p.protectedFlow
			}
			p.agree()
			req := r.one(from, p.register("q1", 5060, append(fetch, "Security-Verify: "+before.server)...))
			r.readServer(p, r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge)).msg)
			p.authorization = proof
			sm7 := r.one(p.protectedFlow, p.register("q2", 6300, append(fetch, "Security-Verify: "+p.server)...))
			ok := r.one(coreFlow(), answerTo(t, sm7.msg, "200 OK", bindings))
			p.downlink(t, ok)
			if status(t, ok.msg) != 200 || u.State != registrar.Registered {
				t.Fatalf("it is %s:\n%s", u.State, ok.msg)
			}
			in := &before
			if protected {
				in = p
				if s := r.w.table.Find(p.protectedFlow); s == nil || s.Phase != sa.Established || !s.Deadline.Equal(deadline) {
					t.Errorf("new set %+v, want it until %v", s, deadline)
				}
				r.one(p.protectedFlow, p.message())
			}
			r.advance(r.cfg.Registrar.OldSet + time.Second)
			r.served(in)
			if len(u.Sets) != 1 || u.Current.Deadline.Before(deadline) {
				t.Errorf("%d sets, until %v", len(u.Sets), u.Current.Deadline)
			}
		})
	}
}

// A query of the bindings changes nothing (RFC 3261 §10.2.3).
func TestFetchBindings(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	req := r.one(p.protectedFlow, p.register("fetch", 6300, "Contact:", "Expires:", "Security-Client:"))
	r.one(coreFlow(), answerTo(t, req.msg, "200 OK", granted...))
	if u := r.w.table.UEOf(impi, ueAddr); u == nil || u.State != registrar.Registered {
		t.Error("a query of the bindings de-registers the phone")
	}
}

// Removing another contact is no de-registration.
func TestContactReplaced(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	req := r.one(p.protectedFlow, p.register("two", 6300, "Security-Client:",
		"Contact: <sip:old@10.45.0.7:6300>;expires=0, <sip:001010000000001@10.45.0.7:6300>"))
	r.one(coreFlow(), answerTo(t, req.msg, "200 OK", granted...))
	if u := r.w.table.UEOf(impi, ueAddr); u == nil || u.State != registrar.Registered {
		t.Error("removing another contact de-registers the phone")
	}
}

// Several public identities over one set: each comes and goes by itself (R6.17, R5.54).
func TestSecondIMPU(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	second := "To: <sip:second@" + domain + ">"
	req := r.one(p.protectedFlow, p.register("i2", 6300, "Security-Client:", second))
	r.one(coreFlow(), answerTo(t, req.msg, "200 OK", granted[0], granted[1], "P-Associated-URI: <sip:second@"+domain+">"))
	if got := get(t, r.one(p.protectedFlow, p.message()).msg, sipmsg.PAssertedIdentity); !strings.HasPrefix(got, "<sip:+15550100001@") {
		t.Errorf("first identity is registered and preferred, asserted is %s", got)
	}
	req = r.one(p.protectedFlow, p.register("i2d", 6300, "Security-Client:", second, "Expires: 0"))
	r.one(coreFlow(), answerTo(t, req.msg, "200 OK"))
	if out := r.one(p.protectedFlow, p.message()); out.remote.Addr() == ueAddr {
		t.Errorf("one of two identities de-registered: %s", out.msg)
	}
}

// Answered REGISTERs of one source are kept for their retransmissions only within bounds.
func TestAnsweredAreBounded(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	for n := range 3000 {
		p.impi = fmt.Sprintf("x%d@%s", n, domain)
		req := r.one(clearFlow(), p.register(fmt.Sprintf("f%d", n), 5060))
		if req.remote != coreAddr {
			t.Fatal(n, req.msg)
		}
		r.one(coreFlow(), answerTo(t, req.msg, "403 Forbidden"))
	}
	if n := len(r.w.txs); n > 1000 {
		t.Errorf("one source holds %d transactions", n)
	}
}

// What only the network may say is deleted in any case of letters (R5.12).
func TestNetworkProvided(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	msg := strings.Replace(p.message(), "utran-cell-id-3gpp=0010100010019B01", "utran-cell-id-3gpp=FFFF;Network-Provided", 1)
	if got := get(t, r.one(p.protectedFlow, msg).msg, sipmsg.PAccessNetworkInfo); got != "" {
		t.Errorf("passes: %s", got)
	}
}

// The Route of a UE does not steer its REGISTER.
func TestRouteInRegister(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	out := r.one(p.protectedFlow, p.register("rt", 6300, "Security-Client:", "Route: <sip:192.0.2.1:5060;lr>"))
	if got := get(t, out.msg, sipmsg.Route); out.remote == coreAddr && got != "" {
		t.Errorf("Route of the UE reaches the registrar side: %s", got)
	}
}

// A UE that names ever new hosts has a bounded number of look-ups under way, none without configured peers.
func TestLookups(t *testing.T) {
	for peers, want := range map[bool]int{false: 0, true: maxLookups} {
		r := newRig(t, func(c *Config) {
			if peers {
				c.Peers = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
			}
		})
		p := r.registered()
		own := strings.Replace(r.path(p), "@10.0.1.5:5060", fmt.Sprintf("@10.0.0.5:%d", p.ps), 1)
		for n := range 300 {
			msg := strings.Replace(p.message(), "To: <sip:+15550100002@"+domain+">", "To: <sip:b@c>;tag=2", 1)
			at := strings.Index(msg, "Route: ")
			end := at + strings.Index(msg[at:], "\r\n")
			r.w.Message(p.protectedFlow, []byte(msg[:at]+"Route: "+own+fmt.Sprintf(", <sip:h%d.invalid;lr>", n)+msg[end:]))
		}
		if r.w.names.running != want {
			t.Errorf("peers configured: %v, %d look-ups under way, want %d", peers, r.w.names.running, want)
		}
	}
}

// A core connection with several sent-bys leaves nothing behind.
func TestAnswerMap(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	r.l.conns[3] = true
	f := coreFlow()
	f.Conn, f.Transport = 3, ims.TCP
	for n := range 10 {
		inv := strings.Replace(mtInvite(r.path(p), ""), "SIP/2.0/UDP 10.0.1.7:6060", fmt.Sprintf("SIP/2.0/TCP 10.0.1.9:%d", 7000+n), 1)
		r.deliver(f, inv)
	}
	r.w.Closed(3, f)
	if len(r.w.answer) != 0 {
		t.Errorf("%d left", len(r.w.answer))
	}
}

// R6.16: a phone that registers at a new address leaves the old one.
func TestNewAddress(t *testing.T) {
	r := newRig(t)
	_ = r.registered()
	p := newPhone()
	p.addr, p.callID = netip.MustParseAddr("10.45.0.99"), "reg2@x"
	f := clearFlow()
	f.Remote = netip.AddrPortFrom(p.addr, 5060)
	r.challenge(p, f, 5060)
	p.authorization = proof
	req := r.one(p.protectedFlow, p.register("sm7b", 6300, "Security-Verify: "+p.server))
	r.one(coreFlow(), answerTo(t, req.msg, "200 OK", "Contact: <sip:001010000000001@10.45.0.99:6300>;expires=600000", granted[1], granted[2]))
	r.advance(140 * time.Second)
	if r.backend.Count() != 4 {
		t.Errorf("R6.16: %d SAs after the grace", r.backend.Count())
	}
}

// R6.18: a REGISTER that is superseded while the backend works on its set does not spoil the newer one.
func TestSupersededWhileInstalling(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	req := r.one(clearFlow(), p.register("a", 5060))
	r.w.Message(coreFlow(), []byte(answerTo(t, req.msg, "401 Unauthorized", challenge))) // installing
	r.l.out = nil
	r.w.Message(clearFlow(), []byte(p.register("b", 5060)))
	req2 := r.l.out[0]
	out := r.deliver(coreFlow(), answerTo(t, req2.msg, "401 Unauthorized", challenge))
	for _, o := range out {
		t.Log(status(t, o.msg), branch(t, o.msg))
	}
	if last := out[len(out)-1]; status(t, last.msg) != 401 {
		t.Errorf("newest REGISTER got %d", status(t, last.msg))
	}
}

// What waits for a connection of an old set goes out by the new one.
func TestPendingDialAtConfirm(t *testing.T) {
	r := newRig(t)
	old := r.registered()
	big := mtInvite(r.path(old), "Subject: "+strings.Repeat("x", 1400)+"\r\n")
	r.deliver(coreFlow(), big) // dial pending
	p := newPhone()
	p.agree()
	p.callID = "reboot@x"
	r.challenge(p, clearFlow(), 5060)
	p.authorization = proof
	req := r.one(p.protectedFlow, p.register("sm7r", 6300, "Security-Verify: "+p.server))
	out := r.deliver(coreFlow(), answerTo(t, req.msg, "200 OK", granted...))
	for _, o := range out {
		t.Log(o.local, o.remote, strings.SplitN(o.msg, "\r\n", 2)[0], get(t, o.msg, sipmsg.CallID))
		if strings.HasPrefix(o.msg, "SIP/2.0 480") {
			t.Error("480 to the core though the new set stands")
		}
	}
}

// Without a branch the CSeq number still tells transactions apart.
func TestNoBranch(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	inv := strings.Replace(strings.NewReplacer("MESSAGE", "INVITE").Replace(p.message()), ";branch=z9hG4bKm1", "", 1)
	a := r.one(p.protectedFlow, inv)
	b := r.one(p.protectedFlow, strings.Replace(inv, "CSeq: 1", "CSeq: 2", 1))
	if a.remote.Addr() != ueAddr && branch(t, a.msg) == branch(t, b.msg) {
		t.Error("two transactions, one branch")
	}
}

// CK and IK leave in no answer (R5.30c).
func TestKeysInOtherAnswers(t *testing.T) {
	r := newRig(t)
	req := r.one(clearFlow(), newPhone().register("k", 5060))
	out := r.one(coreFlow(), answerTo(t, req.msg, "403 Forbidden", challenge))
	if strings.Contains(out.msg, "ck=") {
		t.Errorf("keys leave in clear")
	}
}

// The limit over all sources covers challenged registrations.
func TestPendingMaxSets(t *testing.T) {
	r := newRig(t)
	addr := netip.MustParseAddr("10.46.0.1")
	for n := range 500 {
		p := newPhone()
		p.addr, p.impi = addr, fmt.Sprintf("pm%d@%s", n, domain)
		f := clearFlow()
		f.Remote = netip.AddrPortFrom(addr, 5060)
		req := r.one(f, p.register(fmt.Sprintf("pm%d", n), 5060))
		if req.remote != coreAddr {
			break
		}
		r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge))
		addr = addr.Next()
	}
	if _, all := r.w.table.Unconfirmed(registrar.Source(addr)); all > 100 {
		t.Errorf("%d sets wait, limit 100", all)
	}
}

// reg-await-auth does not end a set whose REGISTER the core is still deciding on.
func TestAwaitAuthWhileCoreDecides(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	r.challenge(p, clearFlow(), 5060)
	r.advance(239 * time.Second)
	p.authorization = proof
	req := r.one(p.protectedFlow, p.register("late", 6300, "Security-Verify: "+p.server))
	r.advance(2 * time.Second)
	out := r.deliver(coreFlow(), answerTo(t, req.msg, "200 OK", granted...))
	if len(out) != 1 || status(t, out[0].msg) != 200 {
		t.Errorf("await-auth runs while SM7 is at the core: phone registered there, nothing here: %v", out)
	}
}

// A REGISTER in clear, which anybody can send who has the address, does not spoil the re-registration that the phone has under
// way over its SA.
func TestClearRegisterDuringReauthentication(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	old := *p
	p.agree()
	req := r.one(old.protectedFlow, p.register("re", 6300, "Security-Verify: "+old.server))
	x := newPhone()
	x.n = 50
	x.callID = "x"
	x.agree()
	r.one(clearFlow(), x.register("x", 5060))
	ans := r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge))
	if get(t, ans.msg, sipmsg.SecurityServer) == "" || r.backend.Count() != 8 {
		t.Fatalf("%d SAs, answer:\n%s", r.backend.Count(), ans.msg)
	}
	old.downlink(t, ans)
	r.readServer(p, ans.msg)
	// Nor does the challenge that a second one gets, and each of its kind ends the one before.
	for _, branch := range []string{"y", "z"} {
		x.agree()
		req = r.one(clearFlow(), x.register(branch, 5060))
		if out := r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge)); status(t, out.msg) != 401 || r.backend.Count() != 12 {
			t.Fatalf("%d SAs, answer:\n%s", r.backend.Count(), out.msg)
		}
	}
	if _, ok := r.confirm(p); status(t, ok.msg) != 200 {
		t.Errorf("answer:\n%s", ok.msg)
	}
	if r.backend.Count() != 8 {
		t.Errorf("%d SAs, want those of the old set and the new one", r.backend.Count())
	}
	r.served(p)
}

// A phone that registers from one address of its prefix after the other, as a further flow (RFC 5626), for emergencies or in
// clear, holds only so many contexts, and takes nothing away from others.
func TestAddressFlood(t *testing.T) {
	for name, extra := range map[string]string{
		"outbound":  `Contact: <sip:001010000000001@10.45.1.%d:6300>;reg-id=1;+sip.instance="<urn:x>"`,
		"emergency": "Contact: <sip:001010000000001@10.45.1.%d:6300;sos>",
		"moving":    "Contact: <sip:001010000000001@10.45.1.%d:6300>",
		"clear":     "Contact: <sip:001010000000001@10.45.1.%d:6300>",
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, with(allow))
			other := r.signUp(phoneAt("10.45.0.77", 3))
			var last *phone
			var end sent
			for i := 1; i <= 60; i++ {
				p := newPhone()
				p.addr, p.callID = netip.AddrFrom4([4]byte{10, 45, 1, byte(i)}), fmt.Sprintf("flood%d", i)
				contact := fmt.Sprintf(extra, i)
				ok := []string{contact + ";expires=600000", granted[1], granted[2]}
				if name == "clear" {
					p.authorization = credentials
					end = r.one(p.clear(), p.register("c", 5060, append([]string{contact}, plain...)...))
				} else {
					req := r.one(p.clear(), p.register("a", 5060, contact))
					r.readServer(p, r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge)).msg)
					p.authorization = proof
					end = r.one(p.protectedFlow, p.register("b", 6300, contact, "Security-Verify: "+p.server))
				}
				if out := r.one(coreFlow(), answerTo(t, end.msg, "200 OK", ok...)); status(t, out.msg) != 200 {
					t.Fatalf("phone %d:\n%s", i, out.msg)
				}
				last = p
			}
			if n := r.w.table.UEs(); n > maxContexts+1 {
				t.Errorf("%d contexts", n)
			}
			if n := r.w.table.SPIsInUse(); n > 2*(maxContexts+1) {
				t.Errorf("%d SPIs", n)
			}
			if inv := r.one(coreFlow(), mtInvite(get(t, end.msg, sipmsg.Path), "")); inv.remote.Addr() != last.addr {
				t.Errorf("the newest is not reached:\n%s", inv.msg)
			}
			r.served(other)
		})
	}
}

// A phone that registers one public identity over its SA again and again, each time with another parameter in To, which the
// core takes for the same identity, does not make us remember all of them.
func TestIdentityFlood(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	for i := range 300 {
		to := fmt.Sprintf("To: <sip:%s;x=%d>", impi, i)
		req := r.one(p.protectedFlow, p.register(fmt.Sprintf("if%d", i), 6300, "Security-Client:", to))
		out := r.one(coreFlow(), answerTo(t, req.msg, "200 OK", granted...))
		if code := status(t, out.msg); code != 200 {
			t.Fatalf("REGISTER %d:\n%s", i, out.msg)
		}
	}
	u := r.w.table.UEOf(impi, ueAddr)
	if len(u.Bindings) > registrar.MaxBindings {
		t.Errorf("%d bindings", len(u.Bindings))
	}
	r.served(p)
	if out := r.leave(p); status(t, out.msg) != 200 {
		t.Errorf("answer:\n%s", out.msg)
	}
}

// A UE cannot change the transport of its answer in the Via beneath.
func TestFlipTransport(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	req := r.one(coreFlow(), mtInvite(r.path(p), ""))
	ans := strings.Replace(answerTo(t, req.msg, "200 OK"), "SIP/2.0/UDP 10.0.1.7:6060", "SIP/2.0/TCP 10.0.1.7:6060", 1)
	r.deliver(p.protectedFlow, ans)
	if len(r.l.dials) != 0 {
		t.Errorf("the phone makes us dial %v", r.l.dials)
	}
}

// A whole registration and a request over IPv6, with addresses spelled differently (R5.67, T21).
func TestIPv6(t *testing.T) {
	gm6, ue6 := netip.MustParseAddr("2001:db8::5"), netip.MustParseAddr("2001:db8:1::7")
	r := newRig(t, func(c *Config) { c.Gm = append(c.Gm, gm6) })
	p := newPhone()
	p.addr = ue6
	fix := func(s string) string { return strings.ReplaceAll(s, "2001:db8:1::7:", "[2001:DB8:1:0::7]:") }
	f := ims.Flow{Local: netip.AddrPortFrom(gm6, 5060), Remote: netip.AddrPortFrom(ue6, 5060), Transport: ims.UDP, Side: ims.GmClear}
	req := r.one(f, fix(p.register("v6", 5060)))
	ans := r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge))
	r.readServer(p, ans.msg)
	p.protectedFlow.Local = netip.AddrPortFrom(gm6, p.ps)
	p.authorization = proof
	req = r.one(p.protectedFlow, fix(p.register("v6b", 6300, "Security-Verify: "+p.server)))
	ans = r.one(coreFlow(), answerTo(t, req.msg, "200 OK", "Contact: <sip:001010000000001@[2001:db8:1::7]:6300>;expires=600000", granted[1], granted[2]))
	if status(t, ans.msg) != 200 || ans.local != netip.AddrPortFrom(gm6, p.pc) {
		t.Error(ans)
	}
	out := r.one(coreFlow(), mtInvite(r.path(p), ""))
	t.Log(out.local, out.remote, out.msg)
}

// A late answer to an older REGISTER does not undo a de-registration.
func TestLateAnswerAfterDeregistration(t *testing.T) {
	r := newRig(t)
	good := r.registered()
	// dereg answer, then a late 200 of a refresh
	ref := r.one(good.protectedFlow, good.register("ref", 6300, "Security-Client:"))
	de := r.one(good.protectedFlow, good.register("de", 6300, "Security-Client:", "Expires: 0"))
	r.one(coreFlow(), answerTo(t, de.msg, "200 OK"))
	r.one(coreFlow(), answerTo(t, ref.msg, "200 OK", granted...))
	if u := r.w.table.UEOf(impi, ueAddr); u != nil && u.State == registrar.Registered {
		t.Error("late 200 of an older REGISTER undoes the de-registration")
	}
}
