package proxy

import (
	"fmt"
	"hash/crc32"
	"net/netip"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe/observetest"
	"github.com/gmgate/gmgate/control/regevent"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

const (
	sipID   = "sip:+15550100001@" + domain
	telID   = "tel:+15550100001"
	contact = "sip:001010000000001@10.45.0.7:6300"
)

var scscfAddr = netip.MustParseAddrPort("10.0.1.7:6060")

func withRegEvent(c *Config) { c.RegEvent = RegEvent{Enabled: true, Expires: 600000 * time.Second} }

// notifier is the S-CSCF's side of one subscription.
type notifier struct {
	r         *rig
	subscribe string // as it arrived
	cseq      int
	version   int
}

// subscriber registers a phone and returns it with the SUBSCRIBE that this has caused.
func (r *rig) subscriber() (*phone, *notifier) {
	r.t.Helper()
	p := newPhone()
	r.challenge(p, clearFlow(), 5060)
	return p, r.confirmSubscribed(p)
}

func (r *rig) confirmSubscribed(p *phone) *notifier {
	r.t.Helper()
	p.authorization = proof
	atCore := r.one(p.protectedFlow, p.register(fmt.Sprintf("sm7-%d", p.n), 6300, "Security-Verify: "+p.server))
	return r.notifierOf(r.deliver(coreFlow(), answerTo(r.t, atCore.msg, "200 OK", granted...)))
}

// notifierOf finds the answer to a REGISTER and the SUBSCRIBE after it.
func (r *rig) notifierOf(out []sent) *notifier {
	r.t.Helper()
	if len(out) != 2 || status(r.t, out[0].msg) != 200 || !strings.HasPrefix(out[1].msg, "SUBSCRIBE ") {
		r.t.Fatalf("want the phone's 200 and then a SUBSCRIBE:\n%v", out)
	}
	return &notifier{r: r, subscribe: out[1].msg}
}

// accept answers the SUBSCRIBE.
func (n *notifier) accept() []sent {
	return n.r.deliver(coreFlow(), answerTo(n.r.t, n.subscribe, "200 OK", "Contact: <sip:10.0.1.7:6060>", "Expires: 600000"))
}

// state is one registration of a document: an address of record, its state, and contacts as "uri state event [expires]".
type state struct {
	aor, state string
	contacts   []string
}

func (n *notifier) document(full bool, regs ...state) string {
	kind := "partial"
	if full {
		kind = "full"
	}
	b := fmt.Sprintf(`<?xml version="1.0"?><reginfo xmlns="urn:ietf:params:xml:ns:reginfo" version="%d" state="%s">`, n.version, kind)
	n.version++
	for _, g := range regs {
		b += fmt.Sprintf(`<registration aor="%s" id="%08x" state="%s">`, g.aor, crc32.ChecksumIEEE([]byte(g.aor)), g.state)
		for _, c := range g.contacts {
			f := strings.Fields(c)
			expires := ""
			if len(f) > 3 {
				expires = ` expires="` + f[3] + `"`
			}
			b += fmt.Sprintf(`<contact id="%08x" state="%s" event="%s"%s><uri>%s</uri></contact>`,
				crc32.ChecksumIEEE([]byte(f[0])), f[1], f[2], expires, f[0])
		}
		b += `</registration>`
	}
	return b + `</reginfo>`
}

// notify sends a NOTIFY, and returns what was sent because of it.
func (n *notifier) notify(subscriptionState, body string, extra ...string) []sent {
	n.cseq++
	return n.r.deliver(coreFlow(), n.request(subscriptionState, body, extra...))
}

func (n *notifier) request(subscriptionState, body string, extra ...string) string {
	t := n.r.t
	na, err := sipmsg.ParseNameAddr([]byte(get(t, n.subscribe, sipmsg.Contact)))
	if err != nil {
		t.Fatal(err)
	}
	to := get(t, n.subscribe, sipmsg.To)
	if !strings.Contains(to, ";tag=") {
		to += ";tag=s1"
	}
	rows := []string{
		"NOTIFY " + string(na.URI) + " SIP/2.0", "Via: SIP/2.0/UDP 10.0.1.7:6060;branch=z9hG4bKn" + strconv.Itoa(n.cseq),
		"Max-Forwards: 70", "From: " + to, "To: " + get(t, n.subscribe, sipmsg.From),
		"Call-ID: " + get(t, n.subscribe, sipmsg.CallID), "CSeq: " + strconv.Itoa(n.cseq) + " NOTIFY", "Event: reg",
		"Subscription-State: " + subscriptionState, "Contact: <sip:10.0.1.7:6060>",
	}
	if body != "" {
		rows = append(rows, "Content-Type: application/reginfo+xml")
	}
	return lines(body, append(rows, extra...)...)
}

// answered checks that a NOTIFY was answered with this status, and returns what else was sent.
func answered(t testing.TB, out []sent, want int) []sent {
	t.Helper()
	if len(out) == 0 || !strings.HasPrefix(out[0].msg, "SIP/2.0 ") || status(t, out[0].msg) != want {
		t.Fatalf("NOTIFY was not answered %d:\n%v", want, out)
	}
	return out[1:]
}

const active = "active;expires=600000"

// registeredState is the document of a phone that is registered.
func (n *notifier) registeredState() string {
	return n.document(true, state{sipID, "active", []string{contact + " active registered"}},
		state{telID, "active", []string{contact + " active registered"}})
}

// established is a phone whose subscription stands.
func (r *rig) established() (*phone, *notifier) {
	r.t.Helper()
	p, n := r.subscriber()
	if out := n.accept(); len(out) != 0 {
		r.t.Fatalf("sent after the 200: %v", out)
	}
	if out := answered(r.t, n.notify(active, n.registeredState()), 200); len(out) != 0 {
		r.t.Fatalf("sent after the NOTIFY: %v", out)
	}
	return p, n
}

func (r *rig) ue(p *phone) *registrar.UE { return r.w.table.UEOf(p.impi, p.addr) }

func (r *rig) wantState(p *phone, want registrar.State) {
	r.t.Helper()
	u := r.ue(p)
	if u == nil {
		r.t.Fatal("the context is gone")
	}
	if u.State != want {
		r.t.Errorf("the phone is %v, want %v", u.State, want)
	}
}

// metric reads one sample.
func (r *rig) metric(name string, labels string) float64 {
	r.t.Helper()
	return observetest.Value(r.t, r.metrics, name, labels)
}

// R5.50: what the P-CSCF asks for after an initial registration.
func TestSubscribe(t *testing.T) {
	r := newRig(t, withRegEvent)
	p := newPhone()
	r.challenge(p, clearFlow(), 5060)
	p.authorization = proof
	reg := r.one(p.protectedFlow, p.register("sm7", 6300, "Security-Verify: "+p.server))
	out := r.deliver(coreFlow(), answerTo(t, reg.msg, "200 OK", granted...))
	n := r.notifierOf(out)
	if out[1].remote != scscfAddr || out[1].local != mwAddr {
		t.Errorf("went from %v to %v, want the Service-Route", out[1].local, out[1].remote)
	}
	m := scan(t, n.subscribe)
	for id, want := range map[sipmsg.HeaderID]string{
		sipmsg.Route: "<sip:orig@scscf." + domain + ":6060;lr>", sipmsg.To: "<" + sipID + ">",
		sipmsg.Expires: "600600", sipmsg.Event: "reg", sipmsg.PAssertedIdentity: "<sip:10.0.1.5:5060>",
		sipmsg.CSeq: "1 SUBSCRIBE",
	} {
		if got := string(m.Get(id)); got != want {
			t.Errorf("%s: %q, want %q", id, got, want)
		}
	}
	if got := string(m.RequestURI()); got != sipID {
		t.Errorf("Request-URI %q", got)
	}
	for _, part := range []string{"From: <sip:10.0.1.5:5060>;tag=", "Accept: application/reginfo+xml", `P-Charging-Vector: icid-value="`} {
		if !strings.Contains(n.subscribe, part) {
			t.Errorf("no %q in\n%s", part, n.subscribe)
		}
	}
	if got := r.metric("reg_subscriptions", "state=subscribing"); got != 1 {
		t.Errorf("%v subscriptions are subscribing", got)
	}
	n.accept()
	answered(t, n.notify(active, n.registeredState()), 200)
	if got := r.metric("reg_subscriptions", "state=active"); got != 1 {
		t.Errorf("%v subscriptions are active", got)
	}
	// It is refreshed within the dialog, before it ends.
	r.l.out = nil
	r.l.now = r.l.now.Add(599300 * time.Second)
	r.advance(200 * time.Second)
	if len(r.l.out) == 0 {
		t.Fatal("no refresh")
	}
	refresh := r.l.out[0]
	if get(t, refresh.msg, sipmsg.To) != "<"+sipID+">;tag=s1" || get(t, refresh.msg, sipmsg.CSeq) != "2 SUBSCRIBE" ||
		refresh.remote != scscfAddr || !strings.HasPrefix(refresh.msg, "SUBSCRIBE sip:10.0.1.7:6060 SIP/2.0") {
		t.Errorf("refresh to %v:\n%s", refresh.remote, refresh.msg)
	}
}

// Nothing is sent where subscriptions are switched off, for a refresh, or for a phone that leaves.
func TestNoSubscribe(t *testing.T) {
	r := newRig(t)
	r.registered()
	r = newRig(t, withRegEvent)
	p, _ := r.established()
	ref := r.one(p.protectedFlow, p.register("ref", 6300, "Security-Client:"))
	r.one(coreFlow(), answerTo(t, ref.msg, "200 OK", granted...))
	de := r.one(p.protectedFlow, p.register("de", 6300, "Security-Client:", "Expires: 0"))
	r.one(coreFlow(), answerTo(t, de.msg, "200 OK"))
	r.advance(200 * time.Second)
	if got := r.metric("reg_subscriptions", "state=terminated"); got != 0 || r.w.table.UEs() != 0 {
		t.Errorf("%v subscriptions are left", got)
	}
	if n := r.w.wheel.Len(); n > 2 { // of the answered REGISTERs
		t.Errorf("%d timers are left", n)
	}
}

// RFC 3261 §17.1.2: T1, T2 and Timer F of a SUBSCRIBE over UDP, and a later attempt.
func TestSubscribeUnanswered(t *testing.T) {
	r := newRig(t, withRegEvent)
	_, n := r.subscriber()
	r.l.out = nil
	r.advance(31900 * time.Millisecond)
	if len(r.l.out) != 10 {
		t.Errorf("sent %d times more, want 10", len(r.l.out))
	}
	for _, s := range r.l.out {
		if s.msg != n.subscribe {
			t.Fatalf("another request:\n%s", s.msg)
		}
	}
	r.l.out = nil
	r.advance(12 * time.Second)
	if got := r.metric("reg_subscribes_total", "result=unanswered"); got != 1 {
		t.Errorf("counted %v", got)
	}
	if len(r.l.out) == 0 || get(t, r.l.out[0].msg, sipmsg.CallID) == get(t, n.subscribe, sipmsg.CallID) {
		t.Fatalf("no new attempt in a new dialog: %v", r.l.out)
	}
	// A provisional answer slows retransmissions down.
	again := r.l.out[0].msg
	r.deliver(coreFlow(), answerTo(t, again, "100 Trying"))
	r.l.out = nil
	r.advance(7 * time.Second)
	if len(r.l.out) > 3 {
		t.Errorf("%d retransmissions in 7 s after a 100", len(r.l.out))
	}
	// A late answer to the attempt before changes nothing.
	if out := r.deliver(coreFlow(), answerTo(t, n.subscribe, "200 OK")); len(out) != 0 || r.metric("reg_subscribes_total", "result=accepted") != 0 {
		t.Error("answer to an old SUBSCRIBE was taken")
	}
}

// A SUBSCRIBE over TCP waits for its connection and is not repeated; without one it has failed.
func TestSubscribeTCP(t *testing.T) {
	r := newRig(t, withRegEvent, func(c *Config) { c.MwTransport = ims.TCP })
	r.subscriberOverTCP(t)
	if len(r.l.dials) != 1 || r.l.dials[0].remote != scscfAddr {
		t.Fatalf("dialled %v", r.l.dials)
	}
	r.l.out = nil
	r.l.conns[8] = true
	r.w.Dialed(r.l.dials[0].tag, 8, ims.Flow{Remote: scscfAddr, Transport: ims.TCP, Side: ims.Mw, Conn: 8}, nil)
	if len(r.l.out) != 1 || r.l.out[0].conn != 8 || !strings.Contains(r.l.out[0].msg, ";transport=tcp>") {
		t.Fatalf("sent %v", r.l.out)
	}
	r.l.out = nil
	r.advance(20 * time.Second)
	if len(r.l.out) != 0 {
		t.Errorf("repeated over TCP: %v", r.l.out)
	}
	r = newRig(t, withRegEvent, func(c *Config) { c.MwTransport = ims.TCP })
	r.subscriberOverTCP(t)
	r.w.Dialed(r.l.dials[0].tag, 0, ims.Flow{}, fmt.Errorf("refused"))
	r.advance(time.Second)
	if got := r.metric("reg_subscribes_total", "result=unanswered"); got != 1 {
		t.Errorf("no connection: counted %v", got)
	}
}

// subscriberOverTCP registers a phone whose Service-Route is reached over TCP: the SUBSCRIBE waits for the connection.
func (r *rig) subscriberOverTCP(t *testing.T) {
	t.Helper()
	p := newPhone()
	r.challenge(p, clearFlow(), 5060)
	p.authorization = proof
	reg := r.one(p.protectedFlow, p.register("sm7", 6300, "Security-Verify: "+p.server))
	r.one(coreFlow(), answerTo(t, reg.msg, "200 OK", granted...))
}

// A core that refuses SUBSCRIBE costs nothing: nothing is kept, and it is not asked again for this registration.
func TestSubscribeRefused(t *testing.T) {
	for code, hold := range map[string]bool{"403 Forbidden": false, "405 Method Not Allowed": true, "489 Bad Event": true} {
		t.Run(code, func(t *testing.T) {
			r := newRig(t, withRegEvent)
			p, n := r.subscriber()
			if out := r.deliver(coreFlow(), answerTo(t, n.subscribe, code)); len(out) != 0 {
				t.Fatal(out)
			}
			if r.w.subs.byUE[r.ue(p).Index] != refusedSubscription {
				t.Error("something is kept of it")
			}
			for i := range 3 {
				ref := r.one(p.protectedFlow, p.register("ref"+strconv.Itoa(i), 6300, "Security-Client:"))
				r.one(coreFlow(), answerTo(t, ref.msg, "200 OK", granted...))
			}
			if r.metric("reg_subscriptions", "state=terminated") != 1 || r.metric("reg_subscriptions_lost_total", "reason=refused") != 1 {
				t.Error("not counted")
			}
			// The next initial registration asks again, unless the core does not know the package at all.
			q := newPhone()
			q.n = 5
			q.agree()
			r.challenge(q, clearFlow(), 5060)
			q.authorization = proof
			reg := r.one(q.protectedFlow, q.register("sm7-b", 6300, "Security-Verify: "+q.server))
			out := r.deliver(coreFlow(), answerTo(t, reg.msg, "200 OK", granted...))
			if want := map[bool]int{true: 1, false: 2}[hold]; len(out) != want {
				t.Errorf("%d messages after the next initial registration, want %d", len(out), want)
			}
			r.advance(11 * time.Minute)
			ref := r.one(q.protectedFlow, q.register("ref", 6300, "Security-Client:"))
			out = r.deliver(coreFlow(), answerTo(t, ref.msg, "200 OK", granted...))
			if hold && len(out) != 2 {
				t.Errorf("not asked again after the hold-off: %v", out)
			}
		})
	}
}

// R5.52: the core ends the registration. The phone still gets its NOTIFY and can answer, nothing new gets through, and the
// SAs go after 64*T1.
func TestDeregisteredByCore(t *testing.T) {
	for name, regs := range map[string][]state{
		"registration terminated": {{sipID, "terminated", []string{contact + " terminated deactivated"}}, {telID, "terminated", nil}},
		"without its contacts":    {{sipID, "terminated", nil}, {telID, "terminated", nil}},
		"contact terminated": {
			{sipID, "active", []string{contact + " terminated deactivated", "sip:001010000000001@10.45.0.9:6300 active registered"}},
			{telID, "active", []string{contact + " terminated deactivated", "sip:001010000000001@10.45.0.9:6300 active registered"}},
		},
		"contact written differently": {
			{"SIP:+15550100001@" + strings.ToUpper(domain), "active", []string{"sip:001010000000001@10.45.0.7:6300;ob terminated rejected", "sip:x@10.45.0.9 active created"}},
			{telID, "active", []string{"sip:001010000000001@10.45.0.7:6300;ob terminated rejected", "sip:x@10.45.0.9 active created"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, withRegEvent)
			p, n := r.established()
			if out := answered(t, n.notify(active, n.document(true, regs...)), 200); len(out) != 0 {
				t.Errorf("also sent: %v", out)
			}
			r.wantState(p, registrar.Deregistered)
			route := r.path(p)
			if s := r.one(coreFlow(), mtInvite(route, "")); status(t, s.msg) != 480 {
				t.Errorf("INVITE was answered %d", status(t, s.msg))
			}
			own := strings.Replace(strings.ReplaceAll(mtInvite(route, ""), "INVITE", "NOTIFY"), "CSeq: 1", "CSeq: 2", 1)
			s := r.one(coreFlow(), own)
			p.downlink(t, s)
			if back := r.one(p.protectedFlow, answerTo(t, s.msg, "200 OK")); back.remote.Addr() != coreAddr.Addr() {
				t.Errorf("the phone's answer went to %v", back.remote)
			}
			if s := r.one(p.protectedFlow, p.message()); status(t, s.msg) != 403 {
				t.Errorf("MESSAGE of the phone was answered %d", status(t, s.msg))
			}
			r.advance(127 * time.Second)
			if r.backend.Count() != 4 {
				t.Error("SAs went too early")
			}
			r.advance(2 * time.Second)
			if r.backend.Count() != 0 || r.w.table.UEs() != 0 {
				t.Error("something is left")
			}
		})
	}
	r := newRig(t, withRegEvent)
	_, n := r.established()
	n.notify(active, n.document(true, state{sipID, "terminated", []string{contact + " terminated probation"}}))
	if got := r.metric("network_deregistrations_total", "event=probation"); got != 1 {
		t.Errorf("counted %v", got)
	}
}

// What does not end our contact leaves the phone alone.
func TestNotDeregistered(t *testing.T) {
	other := "sip:001010000000001@10.45.0.9:6300 "
	for name, docs := range map[string][][]state{
		"another device leaves":  {{{sipID, "active", []string{contact + " active registered", other + "terminated unregistered"}}}},
		"another user":           {{{"sip:+15550100002@" + domain, "terminated", []string{contact + " terminated deactivated"}}}},
		"its old port":           {{{sipID, "active", []string{"sip:001010000000001@10.45.0.7:6299 terminated expired", contact + " active registered"}}}},
		"never shown":            {{{sipID, "active", []string{other + "active registered"}}}, {{sipID, "active", []string{other + "active registered"}}}},
		"shown without port":     {{{sipID, "active", []string{"sip:001010000000001@10.45.0.7 active registered"}}}, {{sipID, "active", []string{"sip:001010000000001@10.45.0.7:5060;x=y active registered"}}}},
		"both ended and renewed": {{{sipID, "active", []string{contact + ";a terminated expired", contact + " active created"}}}},
		"empty":                  {{}},
		"one identity of the set": {
			{{sipID, "active", []string{contact + " active registered"}}, {telID, "active", []string{contact + " active registered"}}},
			{{telID, "terminated", nil}, {sipID, "active", []string{contact + " active registered"}}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, withRegEvent)
			p, n := r.subscriber()
			n.accept()
			for _, d := range docs {
				if out := answered(t, n.notify(active, n.document(true, d...)), 200); len(out) != 0 {
					t.Errorf("also sent: %v", out)
				}
			}
			r.wantState(p, registrar.Registered)
			if s := r.one(p.protectedFlow, p.message()); s.remote != scscfAddr {
				t.Errorf("MESSAGE went to %v", s.remote)
			}
			if name == "one identity of the set" {
				if got := fmt.Sprint(r.ue(p).Identities); got != "["+sipID+"]" {
					t.Errorf("identities %s", got)
				}
			}
		})
	}
}

// A contact that the core has shown before and leaves out of a full document is gone.
func TestContactLeftOut(t *testing.T) {
	r := newRig(t, withRegEvent)
	p, n := r.established()
	other := []string{"sip:001010000000001@10.45.0.9:6300 active registered"}
	answered(t, n.notify(active, n.document(true, state{sipID, "active", other}, state{telID, "active", other})), 200)
	r.wantState(p, registrar.Deregistered)
}

// R5.53: shortened.
func TestShortenedByCore(t *testing.T) {
	r := newRig(t, withRegEvent)
	p, n := r.established()
	answered(t, n.notify(active, n.document(false, state{sipID, "active", []string{contact + " active shortened 60"}})), 200)
	u := r.ue(p)
	if got := u.Expires.Sub(r.l.now); got != time.Minute {
		t.Errorf("expires in %v", got)
	}
	if got := u.Current.Deadline.Sub(r.l.now); got != 90*time.Second {
		t.Errorf("the set lives for %v", got)
	}
	r.advance(20 * time.Second)
	answered(t, n.notify(active, n.document(false, state{sipID, "active", []string{contact + " active shortened 3600"}})), 200)
	if got := u.Expires.Sub(r.l.now); got != 40*time.Second {
		t.Errorf("prolonged to %v", got)
	}
	r.advance(71 * time.Second)
	if r.w.table.UEs() != 0 {
		t.Error("the registration goes on")
	}
	if last := r.l.out[len(r.l.out)-1]; get(t, last.msg, sipmsg.Expires) != "0" {
		t.Errorf("the subscription was not ended:\n%s", last.msg)
	}
}

// R5.51: documents are missing, so the full state is asked for, and not at every NOTIFY.
func TestVersionGap(t *testing.T) {
	r := newRig(t, withRegEvent)
	p, n := r.established()
	n.version += 3
	partial := func() string {
		return n.document(false, state{sipID, "active", []string{contact + " active refreshed"}})
	}
	out := answered(t, n.notify(active, partial()), 200)
	if len(out) != 1 || get(t, out[0].msg, sipmsg.CSeq) != "2 SUBSCRIBE" {
		t.Fatalf("no refresh: %v", out)
	}
	n.subscribe = out[0].msg
	n.accept()
	answered(t, n.notify(active, n.registeredState()), 200)
	n.version += 3
	if out := answered(t, n.notify(active, partial()), 200); len(out) != 0 {
		t.Errorf("at once again: %v", out)
	}
	r.wantState(p, registrar.Registered)
	if got := r.metric("reg_notifies_total", "result=gap"); got != 2 {
		t.Errorf("%v gaps", got)
	}
}

// NOTIFY requests that are not what they should be.
func TestBadNotify(t *testing.T) {
	r := newRig(t, withRegEvent)
	p, n := r.established()
	gone := n.document(true, state{sipID, "terminated", nil})
	for name, tt := range map[string]struct {
		change func(string) string
		want   int
	}{
		"another dialog":  {func(m string) string { return strings.Replace(m, "Call-ID: ", "Call-ID: x", 1) }, 481},
		"another package": {func(m string) string { return strings.Replace(m, "Event: reg", "Event: presence", 1) }, 489},
		"no XML":          {func(m string) string { return strings.Replace(m, "<reginfo", "<reginfX", 1) }, 400},
		"another type":    {func(m string) string { return strings.Replace(m, "reginfo+xml", "pidf+xml", 1) }, 415},
		"old":             {func(m string) string { return strings.Replace(m, "CSeq: ", "CSeq: 0", 1) }, 0},
		"forged token": {func(m string) string {
			at := strings.Index(m, "sip:") + 4
			return m[:at] + strings.Repeat("A", tokenLen) + m[at+tokenLen:]
		}, 481},
		"token of a Path": {func(m string) string {
			at := strings.Index(m, "sip:") + 4
			return m[:at] + string(r.w.seal.seal(&r.w.sc, r.w.pathToken(r.ue(p)))) + m[at+tokenLen:]
		}, 481},
		"no token": {func(m string) string {
			at := strings.Index(m, "sip:") + 4
			return m[:at] + m[at+tokenLen+1:]
		}, 404},
	} {
		t.Run(name, func(t *testing.T) {
			if tt.want == 0 { // a NOTIFY from before
				n.cseq--
				answered(t, n.r.deliver(coreFlow(), n.request(active, gone)), 500)
				n.cseq++
				return
			}
			n.cseq++
			answered(t, r.deliver(coreFlow(), tt.change(n.request(active, gone))), tt.want)
		})
		r.wantState(p, registrar.Registered)
	}
	n.cseq++
	msg := n.request(active, n.registeredState())
	first := r.deliver(coreFlow(), msg)[0]
	if again := r.deliver(coreFlow(), msg)[0]; again.msg != first.msg {
		t.Errorf("a retransmission was answered differently:\n%s", again.msg)
	}
}

// A NOTIFY that comes before the 200 makes the dialog; the registration that it ends is over.
func TestNotifyFirst(t *testing.T) {
	r := newRig(t, withRegEvent)
	p, n := r.subscriber()
	answered(t, n.notify(active, n.registeredState()), 200)
	n.accept()
	if got := r.metric("reg_subscriptions", "state=active"); got != 1 {
		t.Errorf("%v are active", got)
	}
	answered(t, n.notify("terminated;reason=noresource", n.document(true, state{sipID, "terminated", nil}, state{telID, "terminated", nil})), 200)
	r.wantState(p, registrar.Deregistered)
}

// A phone that was told to register again is faster than the NOTIFY that says so to us.
func TestRegisteredSince(t *testing.T) {
	ended := func(n *notifier) string {
		return n.document(true, state{sipID, "terminated", []string{contact + " terminated deactivated"}}, state{telID, "terminated", nil})
	}
	refresh := func(r *rig, p *phone) {
		r.t.Helper()
		ref := r.one(p.protectedFlow, p.register("ref", 6300, "Security-Client:"))
		if s := r.deliver(coreFlow(), answerTo(r.t, ref.msg, "200 OK", granted...)); status(r.t, s[0].msg) != 200 {
			r.t.Fatal(s)
		}
	}
	t.Run("by a new registration", func(t *testing.T) {
		r := newRig(t, withRegEvent)
		_, n := r.established()
		q := newPhone()
		q.n = 5
		q.agree()
		r.challenge(q, clearFlow(), 5060)
		r.confirmSubscribed(q)
		answered(t, n.notify(active, ended(n)), 481) // of the dialog before
		r.wantState(q, registrar.Registered)
	})
	t.Run("by a refresh, the core has it", func(t *testing.T) {
		r := newRig(t, withRegEvent)
		p, n := r.established()
		r.advance(time.Minute)
		refresh(r, p)
		out := answered(t, n.notify(active, ended(n)), 200)
		r.wantState(p, registrar.Registered)
		if len(out) != 1 || !strings.HasPrefix(out[0].msg, "SUBSCRIBE ") {
			t.Fatalf("the core was not asked: %v", out)
		}
		n.subscribe = out[0].msg
		n.accept()
		answered(t, n.notify(active, n.registeredState()), 200)
		r.advance(2 * time.Minute)
		r.wantState(p, registrar.Registered)
		if got := r.metric("network_deregistrations_total", "event=doubted"); got != 1 {
			t.Errorf("counted %v", got)
		}
	})
	t.Run("by a refresh, the core insists", func(t *testing.T) {
		r := newRig(t, withRegEvent)
		p, n := r.established()
		refresh(r, p)
		out := answered(t, n.notify(active, ended(n)), 200)
		n.subscribe = out[0].msg
		n.accept()
		answered(t, n.notify(active, n.document(true)), 200) // it does not even mention the identities any more
		r.wantState(p, registrar.Deregistered)
	})
	t.Run("the subscription went with it", func(t *testing.T) {
		r := newRig(t, withRegEvent)
		p, n := r.established()
		refresh(r, p)
		out := answered(t, n.notify("terminated;reason=noresource", ended(n)), 200)
		if len(out) != 1 || get(t, out[0].msg, sipmsg.CallID) == get(t, n.subscribe, sipmsg.CallID) {
			t.Fatalf("no new subscription: %v", out)
		}
		second := &notifier{r: r, subscribe: out[0].msg}
		second.accept()
		if out := answered(t, second.notify("terminated;reason=rejected", ""), 200); len(out) != 0 {
			t.Errorf("asked again: %v", out)
		}
		r.wantState(p, registrar.Registered)
		refresh(r, p) // what a later registration brings is not doubted before
		r.wantState(p, registrar.Registered)
	})
	t.Run("the core knows it no more", func(t *testing.T) {
		r := newRig(t, withRegEvent)
		p, n := r.established()
		refresh(r, p)
		out := answered(t, n.notify("terminated;reason=noresource", ended(n)), 200)
		r.deliver(coreFlow(), answerTo(t, out[0].msg, "404 Not Found"))
		r.wantState(p, registrar.Deregistered)
	})
	t.Run("while a REGISTER is under way", func(t *testing.T) {
		for code, want := range map[string]registrar.State{"200 OK": registrar.Registered, "403 Forbidden": registrar.Registered} {
			r := newRig(t, withRegEvent)
			p, n := r.established()
			ref := r.one(p.protectedFlow, p.register("ref", 6300, "Security-Client:"))
			if out := answered(t, n.notify(active, ended(n)), 200); len(out) != 0 {
				t.Errorf("sent %v", out)
			}
			r.wantState(p, want)
			out := r.deliver(coreFlow(), answerTo(t, ref.msg, code, granted...))
			if len(out) != 2 || !strings.HasPrefix(out[1].msg, "SUBSCRIBE ") {
				t.Fatalf("%s: the core was not asked: %v", code, out)
			}
			n.subscribe = out[1].msg
			n.accept()
			answered(t, n.notify(active, ended(n)), 200)
			r.wantState(p, registrar.Deregistered)
		}
	})
	t.Run("while it begins anew", func(t *testing.T) {
		for name, protected := range map[string]bool{"in clear": false, "over its set": true} {
			r := newRig(t, withRegEvent)
			p, n := r.established()
			q, over, port := newPhone(), clearFlow(), 5060
			q.n = 5
			q.agree()
			if protected {
				over, port = p.protectedFlow, 6300
			}
			r.challenge(q, over, port)
			answered(t, n.notify(active, ended(n)), 200)
			r.wantState(q, registrar.Deregistered)
			r.confirmSubscribed(q)
			r.wantState(q, registrar.Registered)
			r.advance(200 * time.Second)
			if s := r.one(q.protectedFlow, q.message()); s.remote != scscfAddr || r.backend.Count() != 4 {
				t.Errorf("%s: MESSAGE went to %v, %d SAs", name, s.remote, r.backend.Count())
			}
		}
	})
	t.Run("long ago", func(t *testing.T) {
		r := newRig(t, withRegEvent)
		p, n := r.established()
		refresh(r, p)
		r.advance(33 * time.Second)
		answered(t, n.notify(active, ended(n)), 200)
		r.wantState(p, registrar.Deregistered)
	})
	t.Run("shortened", func(t *testing.T) {
		r := newRig(t, withRegEvent)
		p, n := r.established()
		refresh(r, p)
		short := func() string {
			return n.document(true, state{sipID, "active", []string{contact + " active shortened 60"}})
		}
		out := answered(t, n.notify(active, short()), 200)
		if got := r.ue(p).Expires.Sub(r.l.now); got < time.Hour || len(out) != 1 {
			t.Fatalf("believed at once: %v, %v", got, out)
		}
		n.subscribe = out[0].msg
		n.accept()
		answered(t, n.notify(active, short()), 200)
		if got := r.ue(p).Expires.Sub(r.l.now); got != time.Minute {
			t.Errorf("expires in %v", got)
		}
	})
}

// Of two registered identities the core ends one; the phone stays with the other.
func TestOneIdentityEnded(t *testing.T) {
	r := newRig(t, withRegEvent)
	p, n := r.established()
	const second = "sip:second@" + domain
	reg := r.one(p.protectedFlow, p.register("id2", 6300, "Security-Client:", "To: <"+second+">"))
	r.deliver(coreFlow(), answerTo(t, reg.msg, "200 OK", granted[0], granted[1], "P-Associated-URI: <"+second+">"))
	r.advance(time.Minute)
	answered(t, n.notify(active, n.document(false, state{second, "terminated", []string{contact + " terminated unregistered"}})), 200)
	r.wantState(p, registrar.Registered)
	if got := fmt.Sprint(r.ue(p).Identities); strings.Contains(got, second) || !strings.Contains(got, sipID) {
		t.Errorf("identities %s", got)
	}
	answered(t, n.notify(active, n.document(false, state{sipID, "terminated", nil}, state{telID, "terminated", nil})), 200)
	r.wantState(p, registrar.Deregistered)
}

// The phone's own de-registration may come to us by NOTIFY before its 200 does.
func TestNotifyBeforeDeregistrationAnswer(t *testing.T) {
	r := newRig(t, withRegEvent)
	p, n := r.established()
	de := r.one(p.protectedFlow, p.register("de", 6300, "Security-Client:", "Expires: 0"))
	answered(t, n.notify("terminated;reason=noresource", n.document(true, state{sipID, "terminated", nil}, state{telID, "terminated", nil})), 200)
	r.wantState(p, registrar.Registered)
	r.one(coreFlow(), answerTo(t, de.msg, "200 OK"))
	r.wantState(p, registrar.Deregistered)
	if got := r.metric("registrations_total", "kind=dereg,result=success"); got != 1 {
		t.Errorf("%v de-registrations", got)
	}
}

// A NOTIFY that another worker's phone is meant by is handed over, whole.
func TestNotifyHandedOver(t *testing.T) {
	r := newRig(t, withRegEvent, func(c *Config) { c.Workers = 2 })
	_, n := r.established()
	n.cseq++
	at := token{kind: tokenNotify, worker: 1, ue: 1}
	msg := n.request(active, "")
	start := strings.Index(msg, "sip:") + 4
	msg = msg[:start] + string(r.w.seal.seal(&r.w.sc, at)) + msg[start+tokenLen:]
	if out := r.deliver(coreFlow(), msg); len(out) != 0 || len(r.l.handed) != 1 || r.l.handed[0] != 1 {
		t.Errorf("sent %v, handed to %v", out, r.l.handed)
	}
	f := coreFlow()
	f.Transport, f.Conn = ims.TCP, 9
	r.l.conns[9] = true
	answered(t, r.deliver(f, msg), 481) // its answer could not go back on the connection
}

// A phone that has moved, or gone without a word, leaves no subscription and no timer.
func TestSubscriptionEnds(t *testing.T) {
	r := newRig(t, withRegEvent)
	p, _ := r.established()
	u := r.ue(p)
	r.l.out = nil
	r.w.leave(p.impi, netip.MustParseAddr("10.45.0.99"))
	if len(r.l.out) != 1 || get(t, r.l.out[0].msg, sipmsg.Expires) != "0" {
		t.Fatalf("not unsubscribed: %v", r.l.out)
	}
	r.advance(200 * time.Second)
	if r.w.subs.byUE[u.Index] != nil || r.metric("reg_subscriptions", "state=terminated") != 0 {
		t.Error("the subscription is left")
	}
	if got := r.w.table.SPIsInUse(); got != 0 {
		t.Errorf("%d SPIs", got)
	}
}

// A restart ends the dialogs, not the registrations: those are subscribed for again, a little later.
func TestSubscribeAfterRestart(t *testing.T) {
	k := newKeptRig(t)
	p := k.registered()
	k.cfg.RegEvent = RegEvent{Enabled: true}
	k.restart(t, 10*time.Second, false)
	k.l.out = nil
	k.advance(3 * time.Second)
	before := k.l.out[0].msg
	k.restart(t, 10*time.Second, false)
	k.l.out = nil
	k.advance(3 * time.Second)
	if len(k.l.out) == 0 || !strings.HasPrefix(k.l.out[0].msg, "SUBSCRIBE "+sipID) {
		t.Fatalf("sent %v", k.l.out)
	}
	n := &notifier{r: k.rig, subscribe: k.l.out[0].msg}
	if branch(t, n.subscribe) == branch(t, before) || get(t, n.subscribe, sipmsg.CallID) == get(t, before, sipmsg.CallID) {
		t.Error("taken for a retransmission of a SUBSCRIBE before the restart")
	}
	if got, _ := strconv.Atoi(get(t, n.subscribe, sipmsg.Expires)); got < 600000 || got > 600600 {
		t.Errorf("subscribed for %d s", got)
	}
	n.accept()
	answered(t, n.notify(active, n.registeredState()), 200)
	answered(t, n.notify(active, n.document(true, state{sipID, "terminated", nil})), 200)
	k.wantState(p, registrar.Deregistered)
	k.restart(t, 10*time.Second, false)
	k.l.out = nil
	k.advance(3 * time.Second)
	if len(k.l.out) != 0 {
		t.Errorf("sent for a phone that has left: %v", k.l.out)
	}
}

// FuzzNotify: no NOTIFY makes a worker crash, end another phone's registration, or send without bound.
func FuzzNotify(f *testing.F) {
	f.Add("active;expires=60", `<reginfo xmlns="urn:ietf:params:xml:ns:reginfo" version="1" state="full"><registration aor="`+sipID+
		`" id="a" state="terminated"><contact id="c" state="terminated" event="rejected"><uri>`+contact+`</uri></contact></registration></reginfo>`, "")
	f.Add("terminated;reason=deactivated;retry-after=1", "", "Record-Route: <sip:x@10.0.1.9;lr>\r\n")
	f.Add("pending", "<reginfo/>", "Contact: <sip:[::1]>\r\n")
	f.Fuzz(func(t *testing.T, subscriptionState, body, rows string) {
		r := newRig(t, withRegEvent)
		p, n := r.subscriber()
		n.accept()
		for range 2 {
			n.cseq++
			msg := strings.Replace(n.request(subscriptionState, body), "Event: reg\r\n", "Event: reg\r\n"+rows, 1)
			if out := r.deliver(coreFlow(), msg); len(out) > 3 {
				t.Fatalf("%d messages because of one NOTIFY", len(out))
			}
		}
		if u := r.ue(p); u == nil || r.backend.Count() != 4 {
			t.Fatal("the SAs went at once")
		}
		r.l.out = nil
		r.advance(10 * time.Second)
		if len(r.l.out) > 20 {
			t.Fatalf("%d messages in 10 s", len(r.l.out))
		}
	})
}

// TestSubscriptionSize bounds the heap of a subscription that stands: there is one for every phone.
func TestSubscriptionSize(t *testing.T) {
	const most = 1000
	got := subscriptionBytes(t, 500)
	t.Logf("%d bytes for each subscription", got)
	if got > most {
		t.Errorf("%d bytes for each subscription, want at most %d", got, most)
	}
}

func BenchmarkSubscriptionBytes(b *testing.B) {
	for b.Loop() {
		b.ReportMetric(float64(subscriptionBytes(b, 500)), "B/subscription")
	}
}

// subscriptionBytes measures the heap that n subscriptions of one worker take, for UEs of three identities.
func subscriptionBytes(t testing.TB, n int) int {
	r := newRig(t, withRegEvent)
	quiet := &quietLoop{loop: r.l}
	r.w.eg = quiet
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	route := newServiceRoute([]string{"sip:orig@scscf." + domain + ":6060;lr"})
	empty := heap()
	ues := make([]*registrar.UE, n)
	for i := range ues {
		o := &registrar.Offer{
			IMPI: fmt.Sprintf("%015d@%s", i, domain), Local: gmAddr, UE: netip.AddrFrom4([4]byte{10, 46, byte(i >> 8), byte(i)}),
			SPIC: ims.SPI(2*i + 300), SPIS: ims.SPI(2*i + 301), PortC: 6000, PortS: 6001,
		}
		s, err := r.w.table.Begin(o, ims.ESPKeys{}, func(*registrar.Set, error) {})
		if err != nil {
			t.Fatal(err)
		}
		r.settle()
		r.w.table.Confirm(s, 600000*time.Second)
		if s.Phase != sa.Established {
			t.Fatal(s.Phase)
		}
		u := s.UE
		user := fmt.Sprintf("+1555%07d", i)
		u.Bind(registrar.Binding{IMPU: "sip:" + o.IMPI, Associated: []string{"sip:" + user + "@" + domain, "tel:" + user, "sip:u" + user + "@" + domain}})
		u.Contact = "sip:" + o.IMPI[:15] + "@" + o.UE.String() + ":6001"
		u.Route = route
		u.NextHop = ims.Hop{Addr: scscfAddr, Transport: ims.UDP}
		ues[i] = u
	}
	before := heap()
	t.Logf("%d bytes for each UE without subscription", int(before-empty)/n)
	for _, u := range ues {
		r.l.out = nil
		r.w.watch(u, 600000*time.Second, true)
		s := r.w.subscriptionOf(u)
		recorded := &loop{now: r.l.now, conns: r.l.conns}
		r.w.eg = recorded
		no := &notifier{r: &rig{t: t, w: r.w, l: recorded, backend: r.backend}, subscribe: string(s.tx.msg)}
		no.accept()
		var regs []state
		for _, id := range u.Identities {
			regs = append(regs, state{id, "active", []string{u.Contact + " active registered"}})
		}
		no.notify(active, no.document(true, regs...))
		if s.m.State() != regevent.Active || s.view.Active() != 3 {
			t.Fatalf("%v, %d contacts", s.m.State(), s.view.Active())
		}
		r.w.eg = quiet
	}
	after := heap()
	runtime.KeepAlive(ues)
	runtime.KeepAlive(r)
	return int(after-before) / n
}

// Runs that share the key of flow tokens, and the workers of one process, name their dialogs and transactions apart: a core
// would take a SUBSCRIBE with a branch that it knows for a repetition, and send no NOTIFY.
func TestSubscribeIsUnique(t *testing.T) {
	seen := map[string]bool{}
	var key ims.Key
	for range 4 {
		r := newRig(t, withRegEvent, func(c *Config) {
			if key == nil {
				key = c.TokenKey
			}
			c.TokenKey = key
		})
		_, n := r.subscriber()
		via, err := sipmsg.ParseVia([]byte(get(t, n.subscribe, sipmsg.Via)))
		if err != nil {
			t.Fatal(err)
		}
		callID := get(t, n.subscribe, sipmsg.CallID)
		_, tag, _ := strings.Cut(get(t, n.subscribe, sipmsg.From), "tag=")
		half := len(callID) / 2
		for _, id := range []string{string(via.Branch), callID[:half], callID[half:]} {
			if seen[id] {
				t.Errorf("%s was used before", id)
			}
			seen[id] = true
		}
		if tag == "" || callID[half:] != tag {
			t.Errorf("Call-ID %s, tag %s", callID, tag)
		}
	}
}
