package core

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/gmgate/gmgate/bench/internal/digestaka"
	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/control/ims"
)

const domain = "ims.mnc001.mcc001.3gppnetwork.org"

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// proxy stands where gmgate does: it speaks plain SIP with the core from one address, UDP and TCP.
type proxy struct {
	t    *testing.T
	core netip.AddrPort
	udp  *net.UDPConn
	tcp  *net.TCPListener
	addr netip.AddrPort
	n    int
}

func start(t *testing.T, cfg Config) (*Core, *proxy) {
	t.Helper()
	cfg.Addr = netip.MustParseAddrPort("127.0.0.1:0")
	cfg.Domain = domain
	if cfg.Subscribers == nil {
		cfg.Subscribers = Subscribers(3, domain)
	}
	c, err := Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	p := &proxy{t: t, core: c.Addr()}
	if p.udp, err = sipwire.ListenUDP(nil, netip.MustParseAddrPort("127.0.0.2:0")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.udp.Close() })
	p.addr = sipwire.LocalAddrPort(p.udp.LocalAddr())
	if p.tcp, err = sipwire.ListenTCP(nil, p.addr); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.tcp.Close() })
	return c, p
}

// recv reads one message; it fails the test after five seconds.
func (p *proxy) recv() *sipwire.Message {
	p.t.Helper()
	if err := p.udp.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		p.t.Fatal(err)
	}
	b, from, err := sipwire.ReadUDP(p.udp)
	if err != nil {
		p.t.Fatalf("read from the core: %v", err)
	}
	if from != p.core {
		p.t.Fatalf("message from %s, want %s", from, p.core)
	}
	m, err := sipwire.Parse(b)
	if err != nil {
		p.t.Fatalf("%v in:\n%s", err, b)
	}
	return m
}

func (p *proxy) send(m *sipwire.Message) {
	p.t.Helper()
	if _, err := p.udp.WriteToUDPAddrPort(m.Bytes(), p.core); err != nil {
		p.t.Fatal(err)
	}
}

func (p *proxy) ask(m *sipwire.Message) *sipwire.Message {
	p.t.Helper()
	p.send(m)
	return p.recv()
}

// quiet fails if the core sends anything within a moment.
func (p *proxy) quiet() {
	p.t.Helper()
	_ = p.udp.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if b, _, err := sipwire.ReadUDP(p.udp); err == nil {
		p.t.Fatalf("unexpected message:\n%s", b)
	}
}

// via puts the UE's and the proxy's Via on a request.
func (p *proxy) via(m *sipwire.Message) *sipwire.Message {
	p.n++
	m.Push("Via", fmt.Sprintf("SIP/2.0/UDP 10.45.0.7:6300;branch=z9hG4bKu%d", p.n))
	m.Push("Via", fmt.Sprintf("SIP/2.0/UDP %s;branch=z9hG4bKp%d", p.addr, p.n))
	return m
}

func (p *proxy) path(user string) string { return fmt.Sprintf("<sip:%s@%s;lr>", user, p.addr) }

// request builds a request as gmgate would send it for a subscriber.
func (p *proxy) request(method, uri string, s Subscriber) *sipwire.Message {
	m := &sipwire.Message{Method: method, URI: uri}
	m.Add("Max-Forwards", "69")
	m.Add("Route", "<sip:orig@"+p.core.String()+";lr>")
	m.Add("From", "<"+s.IMPU[0]+">;tag="+sipwire.Token())
	m.Add("To", "<"+uri+">")
	m.Add("Call-ID", sipwire.Token())
	m.Add("CSeq", "1 "+method)
	m.Add("P-Asserted-Identity", "<"+s.IMPU[0]+">")
	m.Add("P-Charging-Vector", "icid-value=1")
	switch method {
	case "INVITE", "SUBSCRIBE":
		m.Add("Record-Route", p.path("rr"))
		m.Add("Contact", "<sip:"+strings.TrimPrefix(s.IMPI, "sip:")+">")
	}
	return p.via(m)
}

// registrar is one UE's REGISTER as it comes out of gmgate.
type registrar struct {
	p       *proxy
	s       Subscriber
	callID  string
	cseq    int
	expires int
}

func (r *registrar) build(authorization string) *sipwire.Message {
	r.cseq++
	m := &sipwire.Message{Method: "REGISTER", URI: "sip:" + domain}
	m.Add("Max-Forwards", "69")
	m.Add("Path", r.p.path("flow"+r.s.IMPI[10:15]))
	m.Add("From", "<"+r.s.TemporaryIMPU()+">;tag=u1")
	m.Add("To", "<"+r.s.TemporaryIMPU()+">")
	m.Add("Call-ID", r.callID)
	m.Add("CSeq", fmt.Sprintf("%d REGISTER", r.cseq))
	m.Add("Contact", r.contact()+";+g.3gpp.smsip")
	m.Add("Expires", fmt.Sprint(r.expires))
	m.Add("Require", "path")
	m.Add("P-Visited-Network-ID", `"`+domain+`"`)
	m.Add("P-Charging-Vector", "icid-value=5b6e")
	m.Add("Authorization", authorization)
	return r.p.via(m)
}

func (r *registrar) contact() string {
	user, _, _ := strings.Cut(r.s.IMPI, "@")
	return "<sip:" + user + "@10.45.0.7:6300>"
}

func (r *registrar) empty(integrity string) string {
	return fmt.Sprintf(`Digest username="%s",realm="%s",uri="sip:%s",nonce="",response="",integrity-protected=%s`, r.s.IMPI, domain, domain, integrity)
}

// challenge reads the AKA challenge of a 401.
func challengeOf(t *testing.T, m *sipwire.Message) sipwire.Params {
	t.Helper()
	for _, row := range m.All("WWW-Authenticate") {
		if _, p, err := sipwire.ParseAuth(row); err == nil && strings.HasPrefix(p.Get("algorithm"), "AKA") {
			return p
		}
	}
	t.Fatalf("no AKA challenge in:\n%s", m.Bytes())
	return nil
}

func (r *registrar) card() digestaka.Card {
	return digestaka.Card{K: r.s.K, OPc: r.s.OPc, AMF: r.s.AMF}
}

// answer computes Authorization for a challenge.
func (r *registrar) answer(ch sipwire.Params, integrity string) string {
	t := r.p.t
	t.Helper()
	rnd, autn, err := digestaka.ParseNonce(ch.Get("nonce"))
	if err != nil {
		t.Fatal(err)
	}
	v, _, _, err := r.card().Answer(rnd, autn, 0)
	if err != nil {
		t.Fatal(err)
	}
	if hex.EncodeToString(v.CK) != strings.ToLower(ch.Get("ck")) || hex.EncodeToString(v.IK) != strings.ToLower(ch.Get("ik")) {
		t.Fatalf("ck and ik of the challenge are not the USIM's")
	}
	return r.authorization(ch, v, integrity)
}

func (r *registrar) authorization(ch sipwire.Params, v digestaka.Vector, integrity string) string {
	d := digestaka.Digest{
		Algorithm: ch.Get("algorithm"), Username: r.s.IMPI, Realm: domain, URI: "sip:" + domain, Method: "REGISTER", Nonce: ch.Get("nonce"),
	}
	tail := ""
	if ch.Get("qop") != "" {
		d.QOP, d.NC, d.CNonce = "auth", "00000001", "0a4f113b"
		tail = `,qop=auth,nc=00000001,cnonce="0a4f113b"`
	}
	response, err := d.Response(v)
	if err != nil {
		r.p.t.Fatal(err)
	}
	return fmt.Sprintf(`Digest username="%s",realm="%s",uri="sip:%s",nonce="%s",response="%s",algorithm=%s%s,integrity-protected="%s"`,
		r.s.IMPI, domain, domain, d.Nonce, response, d.Algorithm, tail, integrity)
}

func (p *proxy) subscriber(s Subscriber) *registrar {
	return &registrar{p: p, s: s, callID: sipwire.Token(), expires: 3600}
}

// register runs the whole registration and returns the last Authorization.
func (r *registrar) register() string {
	t := r.p.t
	t.Helper()
	got := r.p.ask(r.build(r.empty("no")))
	if got.Status != 401 {
		t.Fatalf("answer %d, want 401", got.Status)
	}
	auth := r.answer(challengeOf(t, got), "yes")
	if got = r.p.ask(r.build(auth)); got.Status != 200 {
		t.Fatalf("answer %d, want 200", got.Status)
	}
	return auth
}

func wantNoProblems(t *testing.T, c *Core) {
	t.Helper()
	for _, p := range c.Problems() {
		t.Errorf("problem: %s", p)
	}
}

func TestRegister(t *testing.T) {
	c, p := start(t, Config{})
	s := Subscribers(3, domain)[0]
	r := p.subscriber(s)
	got := p.ask(r.build(r.empty("no")))
	if got.Status != 401 || len(got.List("Via")) != 2 {
		t.Fatalf("answer:\n%s", got.Bytes())
	}
	got = p.ask(r.build(r.answer(challengeOf(t, got), "yes")))
	if got.Status != 200 {
		t.Fatalf("answer:\n%s", got.Bytes())
	}
	want := map[string]string{
		"Service-Route":                 "<sip:orig@" + p.core.String() + ";lr>",
		"P-Associated-URI":              "<" + s.IMPU[0] + ">, <" + s.IMPU[1] + ">",
		"Path":                          p.path("flow00001"),
		"Contact":                       r.contact() + ";+g.3gpp.smsip;expires=3600",
		"P-Charging-Function-Addresses": chargingFunctions,
	}
	for h, v := range want {
		if got.Get(h) != v {
			t.Errorf("%s: %q, want %q", h, got.Get(h), v)
		}
	}
	bound := c.Registered()
	if len(bound) != 1 || bound[0].IMPI != s.IMPI || !slices.Equal(bound[0].IMPU, s.IMPU) || !slices.Equal(bound[0].Path, []string{p.path("flow00001")}) {
		t.Errorf("bindings: %+v", bound)
	}
	log := c.Log()
	if len(log) != 2 || log[0].IntegrityProtected != "no" || log[1].IntegrityProtected != "yes" || log[1].IMPI != s.IMPI {
		t.Errorf("log: %+v", log)
	}
	wantNoProblems(t, c)
}

func TestChallengeForms(t *testing.T) {
	v := digestaka.Vector{CK: ims.Key{0xab, 0xcd}, IK: ims.Key{0x12, 0xef}}
	n := v.Nonce()
	for _, tc := range []struct {
		name string
		b    Behaviour
		want string
	}{
		{"middle", Behaviour{}, `realm="d",nonce="` + n + `",algorithm=AKAv1-MD5,ck="abcd",ik="12ef",qop="auth"`},
		{"first", Behaviour{Keys: KeysFirst}, `ck="abcd",ik="12ef",realm="d",nonce="` + n + `",algorithm=AKAv1-MD5,qop="auth"`},
		{"last, upper case", Behaviour{Keys: KeysLast, UpperHex: true}, `realm="d",nonce="` + n + `",algorithm=AKAv1-MD5,qop="auth",ck="ABCD",ik="12EF"`},
		{"split, bare, no qop", Behaviour{Keys: KeysSplit, UnquotedKeys: true, NoQOP: true}, `ck=abcd,realm="d",nonce="` + n + `",algorithm=AKAv1-MD5,ik=12ef`},
		{"no ik", Behaviour{NoIK: true, QOP: "auth,auth-int"}, `realm="d",nonce="` + n + `",algorithm=AKAv1-MD5,ck="abcd",qop="auth,auth-int"`},
		{"no ck", Behaviour{NoCK: true}, `realm="d",nonce="` + n + `",algorithm=AKAv1-MD5,ik="12ef",qop="auth"`},
	} {
		if got := wwwAuthenticate("d", v, tc.b); got != "Digest "+tc.want {
			t.Errorf("%s:\n got %s\nwant Digest %s", tc.name, got, tc.want)
		}
	}
	c, p := start(t, Config{Behaviour: Behaviour{ExtraChallenges: true}})
	r := p.subscriber(Subscribers(1, domain)[0])
	if got := p.ask(r.build(r.empty("no"))); len(got.All("WWW-Authenticate")) != 3 {
		t.Errorf("%d challenges, want 3", len(got.All("WWW-Authenticate")))
	}
	r.register()
	wantNoProblems(t, c)
}

func TestIntegrityProtected(t *testing.T) {
	c, p := start(t, Config{})
	r := p.subscriber(Subscribers(1, domain)[0])
	got := p.ask(r.build(r.empty("no")))
	// TS 24.229 §5.4.1.2.1: the right answer outside of an SA is worth nothing.
	got = p.ask(r.build(r.answer(challengeOf(t, got), "no")))
	if got.Status != 401 || len(c.Problems()) == 0 {
		t.Fatalf("unprotected answer to a challenge: %d, problems %q", got.Status, c.Problems())
	}
	c.ClearLog()
	got = p.ask(r.build(r.empty("yes")))
	if got.Status != 401 || len(c.Problems()) == 0 {
		t.Errorf("first REGISTER claiming protection: %d, problems %q", got.Status, c.Problems())
	}
}

func TestWrongResponseAndReject(t *testing.T) {
	c, p := start(t, Config{})
	r := p.subscriber(Subscribers(1, domain)[0])
	got := p.ask(r.build(r.empty("no")))
	auth := r.answer(challengeOf(t, got), "yes")
	if got := p.ask(r.build(strings.Replace(auth, `cnonce="0a`, `cnonce="1a`, 1))); got.Status != 403 {
		t.Errorf("wrong response: %d, want 403", got.Status)
	}
	c.SetBehaviour(Behaviour{RejectAuth: 503})
	got = p.ask(r.build(r.empty("no")))
	if got := p.ask(r.build(r.answer(challengeOf(t, got), "yes"))); got.Status != 503 {
		t.Errorf("RejectAuth: %d, want 503", got.Status)
	}
	if len(c.Registered()) != 0 {
		t.Error("bound in spite of both")
	}
	c.SetBehaviour(Behaviour{ExtraRounds: 1})
	auth = r.empty("no")
	for _, want := range []int{401, 401, 200} {
		if got = p.ask(r.build(auth)); got.Status != want {
			t.Fatalf("ExtraRounds: %d, want %d", got.Status, want)
		}
		if want == 401 {
			auth = r.answer(challengeOf(t, got), "yes")
		}
	}
}

func TestReregister(t *testing.T) {
	c, p := start(t, Config{})
	r := p.subscriber(Subscribers(1, domain)[0])
	auth := r.register()
	if got := p.ask(r.build(auth)); got.Status != 200 {
		t.Errorf("integrity protected re-registration: %d, want 200", got.Status)
	}
	c.SetBehaviour(Behaviour{AlwaysChallenge: true})
	got := p.ask(r.build(auth))
	if got.Status != 401 {
		t.Fatalf("AlwaysChallenge: %d, want 401", got.Status)
	}
	auth = r.answer(challengeOf(t, got), "yes")
	if got := p.ask(r.build(auth)); got.Status != 200 {
		t.Errorf("answer to the second challenge: %d, want 200", got.Status)
	}
	wantNoProblems(t, c)
	c.SetBehaviour(Behaviour{})
	if p.ask(r.build(strings.Replace(auth, "yes", "no", 1))).Status != 401 {
		t.Error("clear REGISTER of a registered UE was not challenged")
	}
	// A damaged Authorization must be noticed even where it decides nothing.
	p.ask(r.build(strings.Replace(auth, `nc=00000001`, `nc=00000002`, 1)))
	if len(c.Problems()) == 0 {
		t.Error("response that does not fit its nonce was not noticed")
	}
}

func TestResync(t *testing.T) {
	c, p := start(t, Config{})
	r := p.subscriber(Subscribers(1, domain)[0])
	got := p.ask(r.build(r.empty("no")))
	ch := challengeOf(t, got)
	rnd, _, err := digestaka.ParseNonce(ch.Get("nonce"))
	if err != nil {
		t.Fatal(err)
	}
	const usim = 0x123456789abc
	auts, err := r.card().AUTS(rnd, usim)
	if err != nil {
		t.Fatal(err)
	}
	text := r.authorization(ch, digestaka.Vector{}, "no") + `,auts="` + base64.StdEncoding.EncodeToString(auts) + `"`
	got = p.ask(r.build(text))
	if got.Status != 401 {
		t.Fatalf("auts: %d, want 401", got.Status)
	}
	rnd, autn, err := digestaka.ParseNonce(challengeOf(t, got).Get("nonce"))
	if err != nil {
		t.Fatal(err)
	}
	if _, sqn, _, err := r.card().Answer(rnd, autn, usim); err != nil || sqn != usim+sqnStep {
		t.Errorf("challenge after resynchronisation: SQN %#x, %v", sqn, err)
	}
	auts[0] ^= 1
	text = r.authorization(challengeOf(t, got), digestaka.Vector{}, "no") + `,auts="` + base64.StdEncoding.EncodeToString(auts) + `"`
	if got = p.ask(r.build(text)); got.Status != 403 {
		t.Errorf("forged auts: %d, want 403", got.Status)
	}
	if err := c.SetSQN("nobody", 1); err == nil {
		t.Error("SetSQN of an unknown subscriber succeeded")
	}
}

func TestRetransmittedRegister(t *testing.T) {
	c, p := start(t, Config{Behaviour: Behaviour{AnswerDelay: 100 * time.Millisecond}})
	r := p.subscriber(Subscribers(1, domain)[0])
	m := r.build(r.empty("no"))
	p.send(m)
	p.send(m)
	got := p.recv()
	again := p.ask(m)
	if got.Status != 401 || string(got.Bytes()) != string(again.Bytes()) {
		t.Errorf("answers differ:\n%s\n%s", got.Bytes(), again.Bytes())
	}
	p.quiet()
	c.SetBehaviour(Behaviour{Silent: true})
	p.send(r.build(r.empty("no")))
	p.quiet()
}

// TestMessage sends a MESSAGE from one binding to another, through the originating and the terminating half.
func TestMessage(t *testing.T) {
	c, p := start(t, Config{})
	subs := Subscribers(2, domain)
	a, b := p.subscriber(subs[0]), p.subscriber(subs[1])
	a.register()
	b.register()
	for _, uri := range []string{subs[1].IMPU[0], subs[1].IMPU[1], subs[1].IMPU[0] + ";user=phone"} {
		m := p.request("MESSAGE", uri, subs[0])
		m.Body = []byte("hello")
		mt := p.ask(m)
		if mt.Method != "MESSAGE" || mt.URI != strings.Trim(b.contact(), "<>") {
			t.Fatalf("terminating request:\n%s", mt.Bytes())
		}
		want := map[string]string{
			"Route": p.path("flow00002"), "P-Called-Party-ID": "<" + uri + ">", "Max-Forwards": "68",
			"P-Asserted-Identity": "<" + subs[0].IMPU[0] + ">",
		}
		for h, v := range want {
			if mt.Get(h) != v {
				t.Errorf("%s: %q, want %q", h, mt.Get(h), v)
			}
		}
		if len(mt.List("Via")) != 3 || string(mt.Body) != "hello" {
			t.Errorf("terminating request:\n%s", mt.Bytes())
		}
		answer := sipwire.Response(mt, 200, "x")
		back := p.ask(answer)
		if back.Status != 200 || len(back.List("Via")) != 2 {
			t.Errorf("answer:\n%s", back.Bytes())
		}
	}
	if got := p.ask(p.request("MESSAGE", "sip:nobody@"+domain, subs[0])); got.Status != 404 {
		t.Errorf("unknown callee: %d, want 404", got.Status)
	}
	if got := p.ask(p.request("OPTIONS", "sip:"+domain, subs[0])); got.Status != 200 {
		t.Errorf("OPTIONS: %d, want 200", got.Status)
	}
	m := p.request("MESSAGE", subs[1].IMPU[0], subs[0])
	m.Set("Max-Forwards", "0")
	if got := p.ask(m); got.Status != 483 {
		t.Errorf("Max-Forwards 0: %d, want 483", got.Status)
	}
	wantNoProblems(t, c)
}

// TestCall checks what a stateless proxy owes to INVITE, CANCEL, ACK and requests inside the dialog.
func TestCall(t *testing.T) {
	c, p := start(t, Config{})
	subs := Subscribers(2, domain)
	p.subscriber(subs[0]).register()
	p.subscriber(subs[1]).register()
	inv := p.request("INVITE", subs[1].IMPU[0], subs[0])
	mt := p.ask(inv)
	again := p.ask(inv)
	branch := func(m *sipwire.Message) string {
		v, err := m.TopVia()
		if err != nil {
			t.Fatal(err)
		}
		return v.Branch()
	}
	if branch(mt) != branch(again) {
		t.Error("a retransmitted INVITE got another branch")
	}
	own := "<sip:" + p.core.String() + ";lr>"
	if got := mt.List("Record-Route"); !slices.Equal(got, []string{own, p.path("rr")}) {
		t.Errorf("Record-Route %q", got)
	}
	ringing := sipwire.Response(mt, 180, "callee")
	if got := p.ask(ringing); got.Status != 180 || got.Get("To") != ringing.Get("To") {
		t.Errorf("180:\n%s", got.Bytes())
	}
	companion := func(method, to string) *sipwire.Message {
		m := inv.Clone()
		m.Method = method
		m.Set("CSeq", "1 "+method)
		m.Set("To", to)
		m.Set("Max-Forwards", "69")
		m.Del("Record-Route")
		return m
	}
	can := p.ask(companion("CANCEL", inv.Get("To")))
	if can.Method != "CANCEL" || branch(can) != branch(mt) || can.URI != mt.URI || can.Get("Route") != mt.Get("Route") || can.Has("Record-Route") {
		t.Errorf("CANCEL does not follow the INVITE:\n%s", can.Bytes())
	}
	if got := p.ask(sipwire.Response(can, 200, "callee")); got.Status != 200 || got.CSeqMethod() != "CANCEL" {
		t.Errorf("answer to CANCEL:\n%s", got.Bytes())
	}
	terminated := sipwire.Response(mt, 487, "callee")
	if got := p.ask(terminated); got.Status != 487 {
		t.Errorf("487:\n%s", got.Bytes())
	}
	ack := p.ask(companion("ACK", terminated.Get("To")))
	if ack.Method != "ACK" || branch(ack) != branch(mt) {
		t.Errorf("ACK does not follow the INVITE:\n%s", ack.Bytes())
	}

	// Inside a dialog: own Route off, the rest decides.
	bye := p.request("BYE", strings.Trim("<sip:x@10.45.0.8:6300>", "<>"), subs[0])
	bye.Set("To", "<"+subs[1].IMPU[0]+">;tag=callee")
	bye.Set("Route", own+", "+p.path("b"))
	got := p.ask(bye)
	if got.URI != "sip:x@10.45.0.8:6300" || got.Get("Route") != p.path("b") || got.Has("P-Called-Party-ID") || got.Has("Record-Route") {
		t.Errorf("BYE:\n%s", got.Bytes())
	}
	wantNoProblems(t, c)
}

// TestTCP sends a large request: it leaves by TCP, and each answer goes back on the connection of its request.
func TestTCP(t *testing.T) {
	c, p := start(t, Config{})
	subs := Subscribers(2, domain)
	p.subscriber(subs[0]).register()
	p.subscriber(subs[1]).register()
	up, err := net.DialTCP("tcp4", &net.TCPAddr{IP: p.addr.Addr().AsSlice()}, net.TCPAddrFromAddrPort(p.core))
	if err != nil {
		t.Fatal(err)
	}
	defer up.Close()
	m := p.request("MESSAGE", subs[1].IMPU[0], subs[0])
	m.Set("Via", "SIP/2.0/TCP "+p.addr.String()+";branch=z9hG4bKt1")
	m.Push("Via", "SIP/2.0/TCP "+p.addr.String()+";branch=z9hG4bKt2")
	m.Body = []byte(strings.Repeat("x", 2000))
	if _, err := up.Write(append(m.Bytes(), "\r\n\r\n"...)); err != nil {
		t.Fatal(err)
	}
	down, err := p.tcp.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	defer down.Close()
	read := func(c *net.TCPConn, r *bufio.Reader) *sipwire.Message {
		t.Helper()
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		for {
			b, ping, pong, err := sipwire.ReadMessage(r)
			if err != nil {
				t.Fatal(err)
			}
			if ping || pong {
				continue
			}
			m, err := sipwire.Parse(b)
			if err != nil {
				t.Fatal(err)
			}
			return m
		}
	}
	mt := read(down, bufio.NewReader(down))
	if v, _ := mt.TopVia(); v.Transport != "TCP" || len(mt.Body) != 2000 {
		t.Fatalf("terminating request:\n%s", mt.Bytes())
	}
	if _, err := down.Write(sipwire.Response(mt, 200, "x").Bytes()); err != nil {
		t.Fatal(err)
	}
	if got := read(up, bufio.NewReader(up)); got.Status != 200 || len(got.List("Via")) != 2 {
		t.Errorf("answer:\n%s", got.Bytes())
	}
	wantNoProblems(t, c)
}

func TestSendMessage(t *testing.T) {
	c, p := start(t, Config{T1: 20 * time.Millisecond})
	s := Subscribers(1, domain)[0]
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := c.SendMessage(ctx, s.IMPU[0], "hi"); err == nil {
		t.Error("message to an unregistered identity was sent")
	}
	r := p.subscriber(s)
	r.register()
	type result struct {
		status int
		err    error
	}
	done := make(chan result, 1)
	go func() {
		st, err := c.SendMessage(ctx, s.IMPU[0], "hi")
		done <- result{st, err}
	}()
	first := p.recv()
	second := p.recv() // no answer yet: it must come again
	if string(first.Bytes()) != string(second.Bytes()) || first.Get("Route") != p.path("flow00001") || string(first.Body) != "hi" {
		t.Errorf("requests:\n%s\n%s", first.Bytes(), second.Bytes())
	}
	p.send(sipwire.Response(first, 202, "x"))
	if got := <-done; got.status != 202 || got.err != nil {
		t.Errorf("SendMessage = %d, %v", got.status, got.err)
	}
	short, stop := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer stop()
	if _, err := c.SendMessage(short, s.IMPU[0], "hi"); err == nil {
		t.Error("SendMessage without answer succeeded")
	}
}

func TestRegEvent(t *testing.T) {
	c, p := start(t, Config{})
	s := Subscribers(1, domain)[0]
	r := p.subscriber(s)
	auth := r.register()
	sub := p.request("SUBSCRIBE", s.IMPU[0], s)
	sub.Add("Event", "reg")
	sub.Add("Expires", "600")
	got := p.ask(sub)
	if got.Status != 200 || got.Get("Record-Route") != p.path("rr") || got.Get("Expires") != "600" {
		t.Fatalf("answer:\n%s", got.Bytes())
	}
	n := p.recv()
	if n.Method != "NOTIFY" || n.Get("Route") != p.path("rr") || n.Get("To") != sub.Get("From") || n.Get("From") != got.Get("To") ||
		!strings.Contains(string(n.Body), `state="active"`) {
		t.Fatalf("NOTIFY:\n%s", n.Bytes())
	}
	p.send(sipwire.Response(n, 200, ""))
	r.expires = 0
	p.send(r.build(auth))
	status, terminated := 0, ""
	for range 2 { // the 200 and the NOTIFY race
		if m := p.recv(); m.IsRequest() {
			terminated = m.Get("Subscription-State")
			p.send(sipwire.Response(m, 200, ""))
		} else {
			status = m.Status
		}
	}
	if status != 200 || !strings.HasPrefix(terminated, "terminated") || len(c.Registered()) != 0 {
		t.Errorf("deregistration: %d, Subscription-State %q, bindings %v", status, terminated, c.Registered())
	}
	wantNoProblems(t, c)
}

// TestChecks damages correct requests one by one; each damage must be found.
func TestChecks(t *testing.T) {
	c, p := start(t, Config{})
	subs := Subscribers(2, domain)
	r := p.subscriber(subs[0])
	r.register()
	register := func() *sipwire.Message { return r.build(r.empty("no")) }
	message := func() *sipwire.Message { return p.request("MESSAGE", "sip:nobody@"+domain, subs[0]) }
	invite := func() *sipwire.Message { return p.request("INVITE", "sip:nobody@"+domain, subs[0]) }
	for _, tc := range []struct {
		name   string
		build  func() *sipwire.Message
		damage func(*sipwire.Message)
		want   string
	}{
		{"Security-Client", register, func(m *sipwire.Message) { m.Add("Security-Client", "ipsec-3gpp") }, "Security-Client reached"},
		{"Security-Verify", message, func(m *sipwire.Message) { m.Add("Security-Verify", "ipsec-3gpp") }, "Security-Verify reached"},
		{"sec-agree", message, func(m *sipwire.Message) { m.Add("Require", "sec-agree") }, "sec-agree left in Require"},
		{"Proxy-Require", message, func(m *sipwire.Message) { m.Add("Proxy-Require", "x, Sec-Agree") }, "sec-agree left in Proxy-Require"},
		{"empty Require", message, func(m *sipwire.Message) { m.Add("Require", "") }, "empty element in Require"},
		{"stray comma", message, func(m *sipwire.Message) { m.Add("Require", ", 100rel") }, "empty element in Require"},
		{"no path", register, func(m *sipwire.Message) { m.Del("Path") }, "0 Path"},
		{"two paths", register, func(m *sipwire.Message) { m.Add("Path", "<sip:evil@10.9.9.9;lr>") }, "2 Path"},
		{"path without lr", register, func(m *sipwire.Message) { m.Set("Path", "<sip:x@127.0.0.2>") }, "has no lr"},
		{"path without user", register, func(m *sipwire.Message) { m.Set("Path", "<sip:127.0.0.2;lr>") }, "names no flow"},
		{"no Require: path", register, func(m *sipwire.Message) { m.Del("Require") }, "without Require: path"},
		{"no visited network", register, func(m *sipwire.Message) { m.Del("P-Visited-Network-ID") }, "P-Visited-Network-ID"},
		{"no charging vector", register, func(m *sipwire.Message) { m.Del("P-Charging-Vector") }, "P-Charging-Vector"},
		{"UE's charging vector", message, func(m *sipwire.Message) { m.Add("P-Charging-Vector", "icid-value=2") }, "2 rows of P-Charging-Vector"},
		{"empty icid", message, func(m *sipwire.Message) { m.Set("P-Charging-Vector", "orig-ioi=x") }, "without icid-value"},
		{"asserted identity in REGISTER", register, func(m *sipwire.Message) { m.Add("P-Asserted-Identity", "<"+subs[0].IMPU[0]+">") }, "P-Asserted-Identity in a REGISTER"},
		{"no asserted identity", message, func(m *sipwire.Message) { m.Del("P-Asserted-Identity") }, "without P-Asserted-Identity"},
		{"identity of an unregistered UE", message, func(m *sipwire.Message) { m.Set("P-Asserted-Identity", "<"+subs[1].IMPU[0]+">") }, "is not registered"},
		{"unknown identity", message, func(m *sipwire.Message) { m.Set("P-Asserted-Identity", "<sip:boss@x>") }, "is unknown"},
		{"temporary identity", message, func(m *sipwire.Message) { m.Set("P-Asserted-Identity", "<"+subs[0].TemporaryIMPU()+">") }, "temporary identity"},
		{"preferred identity", message, func(m *sipwire.Message) { m.Add("P-Preferred-Identity", "<sip:x@y>") }, "P-Preferred-Identity"},
		{"charging functions", message, func(m *sipwire.Message) { m.Add("P-Charging-Function-Addresses", "ccf=6.6.6.6") }, "P-Charging-Function-Addresses"},
		{"one Via", message, func(m *sipwire.Message) {
			m.Pop("Via")
			m.Pop("Via")
			m.Push("Via", "SIP/2.0/UDP "+p.addr.String()+";branch=z9hG4bKone")
		}, "1 Via"},
		{"three Via", message, func(m *sipwire.Message) { m.Push("Via", "SIP/2.0/UDP "+p.addr.String()+";branch=z9hG4bKx") }, "3 Via"},
		{"empty rport", message, func(m *sipwire.Message) { m.Add("Via", "SIP/2.0/UDP 10.0.0.1;rport;branch=z9hG4bKr") }, "rport of the UE's Via"},
		{"name in Via", message, func(m *sipwire.Message) { m.Add("Via", "SIP/2.0/UDP ue.example;branch=z9hG4bKr") }, "has no received"},
		{"no branch", message, func(m *sipwire.Message) { m.Add("Via", "SIP/2.0/UDP 10.0.0.1;branch=1") }, "has branch"},
		{"Max-Forwards", message, func(m *sipwire.Message) { m.Set("Max-Forwards", "70") }, "was not decremented"},
		{"two routes", message, func(m *sipwire.Message) { m.Set("Route", "<sip:10.0.0.5:6100;lr>, <sip:orig@"+p.core.String()+";lr>") }, "2 Route"},
		{"not the Service-Route", message, func(m *sipwire.Message) { m.Set("Route", "<sip:"+p.core.String()+";lr>") }, "want the Service-Route"},
		{"no Record-Route", invite, func(m *sipwire.Message) { m.Del("Record-Route") }, "0 Record-Route"},
		{"Record-Route without lr", invite, func(m *sipwire.Message) { m.Set("Record-Route", "<sip:127.0.0.2>") }, "cannot be used"},
		{"integrity-protected twice", register, func(m *sipwire.Message) { m.Set("Authorization", r.empty("no")+",integrity-protected=yes") }, "more than once"},
		{"integrity-protected value", register, func(m *sipwire.Message) { m.Set("Authorization", r.empty("maybe")) }, `is "maybe"`},
		{"stray comma in Authorization", register, func(m *sipwire.Message) { m.Set("Authorization", r.empty("no")+",") }, "stray comma"},
		{"network-provided", register, func(m *sipwire.Message) { m.Add("P-Access-Network-Info", "3GPP;network-provided") }, "network-provided"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			good := tc.build()
			c.ClearLog()
			p.t = t
			if _, ok := p.exchange(good); !ok {
				t.Fatal("no answer to the undamaged request")
			}
			wantNoProblems(t, c)
			bad := tc.build()
			tc.damage(bad)
			c.ClearLog()
			p.exchange(bad)
			if got := strings.Join(c.Problems(), "\n"); !strings.Contains(got, tc.want) {
				t.Errorf("problems %q, want one with %q", got, tc.want)
			}
		})
	}
	for _, b := range []string{
		"INVITE\r\n\r\n", "SIP/2.0 200 OK\r\n\r\n", "\x00\x01\x02\x03",
		strings.Replace(string(message().Bytes()), "Content-Length: 0", "Content-Length: 7", 1),
	} {
		c.ClearLog()
		if _, err := p.udp.WriteToUDPAddrPort([]byte(b), p.core); err != nil {
			t.Fatal(err)
		}
		deadline := time.Now().Add(5 * time.Second)
		for len(c.Problems()) == 0 {
			if time.Now().After(deadline) {
				t.Fatalf("%q was not noticed", b)
			}
			time.Sleep(time.Millisecond) // bounded by the deadline
		}
	}
}

// exchange sends a request and waits a second at most for the answer, which goes to wherever its Via says.
func (p *proxy) exchange(m *sipwire.Message) (*sipwire.Message, bool) {
	p.t.Helper()
	p.send(m)
	_ = p.udp.SetReadDeadline(time.Now().Add(time.Second))
	b, _, err := sipwire.ReadUDP(p.udp)
	if err != nil {
		return nil, false
	}
	got, err := sipwire.Parse(b)
	return got, err == nil
}

func TestConfigErrors(t *testing.T) {
	s := Subscribers(1, domain)[0]
	addr := netip.MustParseAddrPort("127.0.0.1:0")
	for name, cfg := range map[string]Config{
		"no domain":     {Addr: addr},
		"no IMPU":       {Addr: addr, Domain: domain, Subscribers: []Subscriber{{IMPI: "x"}}},
		"same IMPI":     {Addr: addr, Domain: domain, Subscribers: []Subscriber{s, s}},
		"shared IMPU":   {Addr: addr, Domain: domain, Subscribers: []Subscriber{s, {IMPI: "x", IMPU: s.IMPU}}},
		"wrong address": {Addr: netip.MustParseAddrPort("192.0.2.77:5060"), Domain: domain},
	} {
		if c, err := Start(cfg); err == nil {
			t.Errorf("%s: started", name)
			_ = c.Close()
		}
	}
}
