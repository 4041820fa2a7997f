package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gmgate/gmgate/bench/core"
	"github.com/gmgate/gmgate/bench/internal/digestaka"
	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/bench/lab"
)

// plainPhone is a phone without IPsec: SIP digest over UDP in clear (TS 33.203 Annex N).
type plainPhone struct {
	*stranger
	sub      core.Subscriber
	cseq, nc int
	nonce    string
	callID   string
	route    string
	answers  chan *sipwire.Message

	mu     sync.Mutex
	bodies []string // of the requests received
}

// newPlainPhone starts a phone of a digest subscriber.
func (f *fixture) newPlainPhone(t *testing.T, sub core.Subscriber, addr netip.AddrPort) *plainPhone {
	t.Helper()
	p := &plainPhone{
		stranger: f.newStranger(t, addr.Addr(), addr.Port()), sub: sub, callID: "plain-" + sipwire.Token(),
		answers: make(chan *sipwire.Message, 16),
	}
	go func() { // until the socket is closed at the end of the test
		for {
			b, from, err := sipwire.ReadUDP(p.udp)
			if err != nil {
				return
			}
			m, err := sipwire.Parse(b)
			if err != nil {
				continue
			}
			if !m.IsRequest() {
				p.answers <- m
				continue
			}
			p.mu.Lock()
			p.bodies = append(p.bodies, string(m.Body))
			p.mu.Unlock()
			_, _ = p.udp.WriteToUDPAddrPort(sipwire.Response(m, 200, sipwire.Token()).Bytes(), from)
		}
	}()
	return p
}

// ask sends a request and returns its final answer, nil if there is none.
func (p *plainPhone) ask(ctx context.Context, t *testing.T, m *sipwire.Message) *sipwire.Message {
	t.Helper()
	p.send(t, lab.PortClear, string(m.Bytes()))
	for {
		select {
		case a := <-p.answers:
			if n, _, err := a.CSeq(); err == nil && n == uint32(p.cseq) && a.Status >= 200 {
				return a
			}
		case <-ctx.Done():
			return nil
		}
	}
}

func (p *plainPhone) request(method, uri, to string) *sipwire.Message {
	p.cseq++
	m := &sipwire.Message{Method: method, URI: uri}
	m.Add("Via", "SIP/2.0/UDP "+p.addr.String()+";branch="+sipwire.Branch()+";rport")
	m.Add("Max-Forwards", "70")
	m.Add("From", "<"+p.sub.IMPU[0]+">;tag=plain")
	m.Add("To", "<"+to+">")
	m.Add("Call-ID", p.callID)
	m.Add("CSeq", fmt.Sprint(p.cseq, " ", method))
	return m
}

// register sends one REGISTER, with the response to the last challenge if there was one.
func (p *plainPhone) register(ctx context.Context, t *testing.T, expires int) *sipwire.Message {
	t.Helper()
	m := p.request("REGISTER", "sip:"+domain, p.sub.IMPU[0])
	m.Add("Contact", "<sip:plain@"+p.addr.String()+">")
	m.Add("Expires", fmt.Sprint(expires))
	auth := fmt.Sprintf(`Digest username="%s",realm="%s",uri="sip:%s",nonce="%s"`, p.sub.IMPI, domain, domain, p.nonce)
	if p.nonce == "" {
		m.Add("Authorization", auth+`,response=""`)
		return p.ask(ctx, t, m)
	}
	p.nc++
	d := digestaka.Digest{
		Algorithm: "MD5", Username: p.sub.IMPI, Realm: domain, URI: "sip:" + domain, Method: "REGISTER", Nonce: p.nonce,
		QOP: "auth", NC: fmt.Sprintf("%08x", p.nc), CNonce: "c0ffee",
	}
	response, err := d.Response(digestaka.Vector{RES: []byte(p.sub.Password)})
	if err != nil {
		t.Fatal(err)
	}
	m.Add("Authorization", fmt.Sprintf(`%s,response="%s",algorithm=MD5,qop=auth,nc=%s,cnonce="%s"`, auth, response, d.NC, d.CNonce))
	return p.ask(ctx, t, m)
}

func (p *plainPhone) message(ctx context.Context, t *testing.T, to, body string) *sipwire.Message {
	t.Helper()
	m := p.request("MESSAGE", to, to)
	if p.route != "" {
		m.Add("Route", p.route)
	}
	m.Add("Content-Type", "text/plain")
	m.Body = []byte(body)
	return p.ask(ctx, t, m)
}

func (p *plainPhone) received() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.bodies...)
}

func wantStatus(t *testing.T, what string, m *sipwire.Message, status int) {
	t.Helper()
	switch {
	case m == nil:
		t.Fatalf("%s: no answer, want %d", what, status)
	case m.Status != status:
		t.Fatalf("%s: %d %s (%s), want %d", what, m.Status, m.Reason, m.Get("Warning"), status)
	}
}

// TestPassThrough: a phone with SIP digest lives beside one with IPsec, both in the same network, and neither gets the other's
// treatment.
//
// Peers: C1.04, C2.08
func TestPassThrough(t *testing.T) {
	f := start(t, fixtureConfig{
		digest: 1, daemon: lab.DaemonOptions{IPsec: "allow"},
		clear: lab.ClearRules{Also: func(m lab.ClearSIP) bool {
			// What the phone without IPsec sends and gets: nothing else may be in clear.
			return m.Src.Port() == 5070 || m.Dst.Port() == 5070 || strings.HasPrefix(m.CallID, "stranger")
		}},
	})
	ctx := timed(t)
	secure := f.newUE(t)
	secureIMPU := f.subs[0].IMPU[0]
	f.mustRegister(ctx, t, secure)

	sub := f.subs[len(f.subs)-1]
	p := f.newPlainPhone(t, sub, netip.AddrPortFrom(f.lab.Plan().UE(len(f.subs)-1), 5070))
	wantStatus(t, "MESSAGE before the registration", p.message(ctx, t, secureIMPU, "too early"), 403)
	challenge := p.register(ctx, t, 3600)
	wantStatus(t, "first REGISTER", challenge, 401)
	if challenge.Has("Security-Server") {
		t.Error("Security-Server in the challenge of a phone without IPsec")
	}
	_, params, err := sipwire.ParseAuth(challenge.Get("WWW-Authenticate"))
	if err != nil {
		t.Fatal(err)
	}
	p.nonce = params.Get("nonce")
	done := p.register(ctx, t, 3600)
	wantStatus(t, "second REGISTER", done, 200)
	p.route = "<sip:" + netip.AddrPortFrom(f.lab.Plan().Gm, lab.PortClear).String() + ";lr>, " + done.Get("Service-Route")
	if n := f.metric(ctx, t, "address_associations"); n != 1 {
		t.Errorf("%g associations", n)
	}

	// Both ways between the two phones, and from the network.
	wantStatus(t, "MESSAGE to the secure phone", p.message(ctx, t, secureIMPU, "from the plain one"), 200)
	if in := secure.Received(); len(in) == 0 || in[len(in)-1].Body != "from the plain one" {
		t.Errorf("the secure phone got %v", in)
	}
	f.mustMessage(ctx, t, secure, sub.IMPU[0])
	if status, err := f.core.SendMessage(ctx, sub.IMPU[0], "from the network"); err != nil || status != 200 {
		t.Errorf("MESSAGE of the network: %d, %v", status, err)
	}
	if got := p.received(); len(got) != 2 || got[0] != "hello" || got[1] != "from the network" {
		t.Errorf("the plain phone got %q", got)
	}
	wantStatus(t, "registered again", p.register(ctx, t, 3600), 200)

	// Nobody else gets in by it: not from another port, not as a phone that has SAs.
	s := f.newStranger(t, p.addr.Addr(), 5071)
	s.send(t, lab.PortClear, s.message("MESSAGE", sub.IMPU[0], secureIMPU, "stranger-1"))
	s.wantStatus(t, 403)
	before := len(f.registersOf(f.subs[0].IMPI))
	s.send(t, lab.PortClear, s.register(f.subs[0], "stranger-2", func(m *sipwire.Message) {
		m.Del("Security-Client")
		m.Del("Require")
		m.Del("Proxy-Require")
	}))
	s.wantStatus(t, 403)
	if n := len(f.registersOf(f.subs[0].IMPI)); n != before {
		t.Error("a registration in clear of a phone with SAs reached the core")
	}

	wantStatus(t, "de-REGISTER", p.register(ctx, t, 0), 200)
	wantStatus(t, "MESSAGE afterwards", p.message(ctx, t, secureIMPU, "too late"), 403)
	if !eventually(ctx, oldSet+3*time.Second, func() bool { return f.metric(ctx, t, "address_associations") == 0 }) {
		t.Error("the association outlives its registration")
	}
	f.mustMessage(ctx, t, secure, secureIMPU)
	if err := secure.Deregister(ctx); err != nil {
		t.Error(err)
	}
	checkPhones(t, secure)
}
