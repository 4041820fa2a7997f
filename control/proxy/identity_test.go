package proxy

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/store"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// Who sends is known from the SA alone. These tests have one phone say that it is another one, which is registered as well,
// over its own SA, in every kind of message.

// pair registers two phones.
func (r *rig) pair() (mallory, victim *phone) {
	r.t.Helper()
	return r.signUp(phoneAt("10.45.0.7", 1)), r.signUp(phoneAt("10.45.0.8", 2))
}

// as writes a request of p that claims to be of another phone wherever a request can.
func (p *phone) as(o *phone, method, to string, extra ...string) string {
	claim := "<sip:" + o.impi + ">"
	rows := append([]string{
		method + " sip:+15550100002@" + domain + " SIP/2.0",
		"Via: SIP/2.0/UDP " + p.host() + ":6300;branch=z9hG4bK" + method, "Max-Forwards: 70",
		"From: " + claim + ";tag=m1", "To: <sip:+15550100002@" + domain + ">" + to, "Call-ID: m1@x", "CSeq: 1 " + method,
		"P-Preferred-Identity: " + claim, "P-Asserted-Identity: " + claim,
	}, extra...)
	return lines("", rows...)
}

// TS 24.229 §5.2.6.3: what is asserted of a request is an identity that is registered over its SA, whatever the phone prefers.
func TestAnothersIdentityInRequests(t *testing.T) {
	for _, method := range []string{"INVITE", "MESSAGE", "SUBSCRIBE", "PUBLISH", "OPTIONS", "REFER", "INFO", "UPDATE", "PRACK", "BYE", "NOTIFY"} {
		for name, inDialog := range map[string]bool{"initial": false, "in a dialog": true} {
			t.Run(method+" "+name, func(t *testing.T) {
				r := newRig(t)
				mallory, victim := r.pair()
				to, route := "", []string(nil)
				if inDialog {
					own := strings.Replace(r.path(mallory), "@10.0.1.5:5060", fmt.Sprintf("@10.0.0.5:%d", mallory.ps), 1)
					to, route = ";tag=2", []string{"Route: " + own + ", <sip:10.0.1.9:5060;lr>"}
				}
				out := r.one(mallory.protectedFlow, mallory.as(victim, method, to, route...))
				if out.local != mwAddr {
					t.Fatalf("not forwarded:\n%s", out.msg)
				}
				m := scan(t, out.msg)
				if got := string(m.Get(sipmsg.PAssertedIdentity)); got != "<sip:"+mallory.impi+">" || m.Count(sipmsg.PAssertedIdentity) != 1 ||
					m.Count(sipmsg.PPreferredIdentity) != 0 {
					t.Errorf("asserted:\n%s", out.msg)
				}
				if n := r.metric("identity_mismatch_total", ""); n != 2 {
					t.Errorf("%v claims are counted, want 2", n)
				}
			})
		}
	}
}

// An ACK and a CANCEL assert nobody; nor does what they claim get through.
func TestAnothersIdentityInAckAndCancel(t *testing.T) {
	for _, method := range []string{"ACK", "CANCEL"} {
		r := newRig(t)
		mallory, victim := r.pair()
		out := r.one(mallory.protectedFlow, mallory.as(victim, method, ""))
		if m := scan(t, out.msg); m.Count(sipmsg.PAssertedIdentity)+m.Count(sipmsg.PPreferredIdentity) != 0 {
			t.Errorf("%s:\n%s", method, out.msg)
		}
		if n := r.metric("identity_mismatch_total", ""); n != 2 {
			t.Errorf("%s: %v claims are counted, want 2", method, n)
		}
	}
}

// A request within the dialog of another phone is refused: its flow token names that one.
func TestAnothersDialog(t *testing.T) {
	r := newRig(t)
	mallory, victim := r.pair()
	theirs := strings.Replace(r.path(victim), "@10.0.1.5:5060", fmt.Sprintf("@10.0.0.5:%d", mallory.ps), 1)
	for _, method := range []string{"BYE", "UPDATE", "INFO", "INVITE"} {
		out := r.one(mallory.protectedFlow, mallory.as(victim, method, ";tag=2", "Route: "+theirs+", <sip:10.0.1.9:5060;lr>"))
		if out.remote.Addr() != mallory.addr || status(t, out.msg) != 403 {
			t.Errorf("%s went to %v:\n%s", method, out.remote, out.msg)
		}
	}
	if n := r.metric("sip_rejected_total", "reason=forged_token"); n != 4 {
		t.Errorf("%v are counted", n)
	}
}

// An answer asserts the identity that was called (TS 24.229 §5.2.6.4), and one to another phone's request goes nowhere.
func TestAnothersIdentityInAnswers(t *testing.T) {
	for _, s := range []string{"180 Ringing", "200 OK", "486 Busy Here"} {
		r := newRig(t)
		mallory, victim := r.pair()
		claims := []string{"P-Preferred-Identity: <sip:" + victim.impi + ">", "P-Asserted-Identity: <sip:" + victim.impi + ">"}
		invite := strings.Replace(mtInvite(r.path(mallory), ""), "P-Called-Party-ID: <tel:+15550100001>", "P-Called-Party-ID: <sip:"+mallory.impi+">", 1)
		out := r.one(mallory.protectedFlow, answerTo(t, r.one(coreFlow(), invite).msg, s, claims...))
		if got := get(t, out.msg, sipmsg.PAssertedIdentity); got != "<sip:"+mallory.impi+">" || scan(t, out.msg).Count(sipmsg.PPreferredIdentity) != 0 {
			t.Errorf("%s:\n%s", s, out.msg)
		}
		if n := r.metric("identity_mismatch_total", ""); n != 2 {
			t.Errorf("%s: %v claims are counted, want 2", s, n)
		}
		theirs := r.one(coreFlow(), mtInvite(r.path(victim), ""))
		if out := r.deliver(mallory.protectedFlow, answerTo(t, theirs.msg, s)); len(out) != 0 {
			t.Errorf("%s for the victim passes: %v", s, out)
		}
		if n := r.metric("sip_drops_total", "reason=not_owner"); n != 1 {
			t.Errorf("%s for the victim: %v are counted", s, n)
		}
	}
}

// A REGISTER bears the private identity of its SA set or is refused: on a temporary set, on an established one, to register
// and to de-register (TS 33.203 §7.2). Whether that one may register a public identity is the core's to say, and it is told
// whose SA it was.
func TestAnothersIdentityInRegister(t *testing.T) {
	r := newRig(t)
	mallory, victim := r.pair()
	theirs := "Authorization: " + victim.proof()
	to := "To: <sip:" + victim.impi + ">"
	for name, extra := range map[string][]string{
		"private identity":                 {theirs},
		"both":                             {theirs, to},
		"public one, without credentials":  {"Authorization:", to},
		"de-registration":                  {theirs, to, "Expires: 0"},
		"everything, without credentials":  {"Authorization:", to, "Contact: *", "Expires: 0"},
		"query":                            {theirs, "Contact:", "Expires:"},
		"emergency registration":           {theirs, "Contact: <sip:x@10.45.0.7:6300;sos>"},
		"private identity, other spelling": {strings.Replace(theirs, domain, strings.ToUpper(domain), 1)},
	} {
		out := r.one(mallory.protectedFlow, mallory.register("x", 6300, append(extra, "Security-Client:")...))
		if out.remote.Addr() != mallory.addr || status(t, out.msg) != 403 {
			t.Errorf("%s: went to %v:\n%s", name, out.remote, out.msg)
		}
	}
	out := r.one(mallory.protectedFlow, mallory.register("pub", 6300, to, "Security-Client:"))
	if got := get(t, out.msg, sipmsg.Authorization); out.remote != coreAddr || !strings.Contains(got, `username="`+mallory.impi+`"`) ||
		strings.Contains(got, victim.impi) || !strings.Contains(out.msg, r.path(mallory)) {
		t.Errorf("public identity of another, to %v:\n%s", out.remote, out.msg)
	}
	r.one(coreFlow(), answerTo(t, out.msg, "403 Forbidden"))

	fresh := phoneAt("10.45.0.9", 3)
	r.challenge(fresh, fresh.clear(), 5060)
	for name, extra := range map[string]string{"private identity": theirs, "public identity": to} {
		fresh.authorization = fresh.proof()
		out := r.one(fresh.protectedFlow, fresh.register("t"+name[:3], 6300, extra, "Security-Verify: "+fresh.server))
		if out.remote.Addr() != fresh.addr || status(t, out.msg) != 403 {
			t.Errorf("temporary set, %s: went to %v:\n%s", name, out.remote, out.msg)
		}
	}
	r.served(mallory)
	r.served(victim)
}

// Of two preferred identities, a sip and a tel URI (RFC 3325 §9.2), one that is registered is asserted; nothing is wrong with
// those that are, in whatever row or order.
func TestPreferredIdentities(t *testing.T) {
	const mine, tel, foreign = "<sip:+15550100001@" + domain + ">", "<tel:+15550100001>", "<sip:+15550199999@" + domain + ">"
	for name, tt := range map[string]struct {
		value, asserted string
		counted         float64
	}{
		"both":            {mine + ", " + tel, mine + ", " + tel, 0},
		"the other order": {tel + ", " + mine, tel, 0},
		"with a name":     {`"Alice, A." ` + tel, tel, 0},
		"one foreign":     {foreign + ", " + tel, tel, 1},
		"foreign":         {foreign, mine + ", " + tel, 1},
		"two foreign":     {foreign + ", " + foreign, mine + ", " + tel, 1},
		"none at all":     {"nobody", mine + ", " + tel, 1},
	} {
		r := newRig(t)
		p := r.registered()
		msg := strings.Replace(p.message(), "P-Preferred-Identity: "+mine, "P-Preferred-Identity: "+tt.value, 1)
		if got := get(t, r.one(p.protectedFlow, msg).msg, sipmsg.PAssertedIdentity); got != tt.asserted {
			t.Errorf("%s: asserted %s, want %s", name, got, tt.asserted)
		}
		if n := r.metric("identity_mismatch_total", ""); n != tt.counted {
			t.Errorf("%s: %v are counted, want %v", name, n, tt.counted)
		}
	}
}

// Where the ESP backend has marked a packet, its mark and its addresses and ports must name the same SA set.
func TestLabelMismatch(t *testing.T) {
	r := newRig(t)
	mallory, victim := r.pair()
	own, theirs := r.context(mallory).Current.Label, r.context(victim).Current.Label
	for name, tt := range map[string]struct {
		label uint32
		pass  bool
	}{
		"own": {own, true}, "not told": {0, true}, "of another phone": {theirs, false}, "of nobody": {own + 100, false},
		"of another worker": {1<<24 | own, false}, "of no index": {1 << 24, false},
	} {
		f := mallory.protectedFlow
		f.Label = tt.label
		before := r.metric("sip_drops_total", "reason=label_mismatch")
		for kind, msg := range map[string]string{
			"request": mallory.says(), "REGISTER": mallory.register("q"+name, 6300, "Security-Client:"),
			"malformed": strings.Replace(mallory.says(), "CSeq: 1 MESSAGE", "CSeq: 1 INVITE", 1),
		} {
			if out := r.deliver(f, msg); len(out) > 0 != tt.pass {
				t.Errorf("%s, %s: %v", name, kind, out)
			}
		}
		want := 3.0
		if tt.pass {
			want = 0
		}
		if n := r.metric("sip_drops_total", "reason=label_mismatch") - before; n != want {
			t.Errorf("%s: %v are counted, want %v", name, n, want)
		}
	}

	// A connection that contradicts itself is reset, and is nobody's.
	f := r.connect(mallory, 9)
	f.Label = theirs
	if out := r.deliver(f, overTCP(mallory.says())); len(out) != 0 || len(r.l.closed) != 1 || r.l.closed[0] != 9 || r.w.conns[9] != nil {
		t.Errorf("sent %v, closed %v", out, r.l.closed)
	}
	f = r.connect(mallory, 10)
	f.Label = own
	if out := r.deliver(f, overTCP(mallory.says())); len(out) != 1 || r.w.conns[10] == nil {
		t.Errorf("own label: sent %v", out)
	}
	r.served(victim)
}

// SAs that outlive the process keep the label that they were installed with, also where another worker owns them now, or
// where the phone's context has another index.
func TestLabelAfterRestart(t *testing.T) {
	for name, label := range map[string]uint32{"the same worker": 0, "another worker": 1<<24 | 77, "another index": 5} {
		k := newKeptRig(t)
		p := k.registered()
		snap := k.snapshot()
		s := snap.Sets[0]
		if label != 0 { // a start with another number of workers has moved the context since
			s.Label = label
			if err := k.store.Apply(t.Context(), store.Batch{Sets: []store.Set{s}}); err != nil {
				t.Fatal(err)
			}
		}
		k.restart(t, 10*time.Second, true)
		if got := k.backend.Installed[len(k.backend.Installed)-1].Label; got != s.Label {
			t.Errorf("%s: installed again with label %#x, want %#x", name, got, s.Label)
		}
		f := p.protectedFlow
		for _, l := range []uint32{s.Label, 0} {
			f.Label = l
			if out := k.one(f, p.message()); out.remote.Addr() == ueAddr {
				t.Errorf("%s: label %#x is refused:\n%s", name, l, out.msg)
			}
		}
		f.Label = s.Label + 1
		if out := k.deliver(f, p.message()); len(out) != 0 {
			t.Errorf("%s: another label passes: %v", name, out)
		}
		if got := k.snapshot().Sets[0].Label; got != s.Label {
			t.Errorf("%s: label %#x is kept, want %#x", name, got, s.Label)
		}
	}
}

// What a label adds to the forwarding path allocates nothing.
func TestLabelDoesNotAllocate(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	req := []byte(p.message())
	quiet := &quietLoop{loop: r.l}
	r.w.eg = quiet
	label := r.context(p).Current.Label
	for name, l := range map[string]uint32{"own": label, "another": label + 1} {
		f := p.protectedFlow
		f.Label = l
		if n := testing.AllocsPerRun(200, func() { r.w.Message(f, req) }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
	if quiet.n != 201 { // those of the own label
		t.Errorf("%d messages were sent", quiet.n)
	}
}
