package core

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/bench/internal/sipwire"
)

// own builds a SUBSCRIBE of the P-CSCF's own.
func (p *proxy) own(s Subscriber, seq int, toTag string) *sipwire.Message {
	p.n++
	m := &sipwire.Message{Method: "SUBSCRIBE", URI: s.IMPU[0]}
	m.Add("Via", fmt.Sprintf("SIP/2.0/UDP %s;branch=z9hG4bKs%d", p.addr, p.n))
	m.Add("Max-Forwards", "70")
	m.Add("Route", "<sip:orig@"+p.core.String()+";lr>")
	m.Add("From", "<sip:pcscf@"+p.addr.String()+">;tag=p1")
	to := "<" + s.IMPU[0] + ">"
	if toTag != "" {
		to += ";tag=" + toTag
	}
	m.Add("To", to)
	m.Add("Call-ID", "own1")
	m.Add("CSeq", fmt.Sprintf("%d SUBSCRIBE", seq))
	m.Add("Contact", "<sip:flow1@"+p.addr.String()+">")
	m.Add("Event", "reg")
	m.Add("Accept", "application/reginfo+xml")
	m.Add("Expires", "900000")
	m.Add("P-Asserted-Identity", "<sip:pcscf@"+p.addr.String()+">")
	m.Add("P-Charging-Vector", "icid-value=7")
	return m
}

// notified reads a NOTIFY, answers it and returns it.
func (p *proxy) notified() *sipwire.Message {
	p.t.Helper()
	n := p.recv()
	if n.Method != "NOTIFY" {
		p.t.Fatalf("want a NOTIFY:\n%s", n.Bytes())
	}
	p.send(sipwire.Response(n, 200, ""))
	return n
}

// TestOwnSubscription: the P-CSCF's subscription through what the core can tell and how it can misbehave.
func TestOwnSubscription(t *testing.T) {
	c, p := start(t, Config{T1: 50 * time.Millisecond})
	s := Subscribers(1, domain)[0]
	if err := c.Deregister(s.IMPU[0], "deactivated"); !errors.Is(err, ErrNotRegistered) {
		t.Errorf("ended a registration that is not there: %v", err)
	}
	p.subscriber(s).register()
	c.SetBehaviour(Behaviour{RefuseSubscribe: 489})
	if got := p.ask(p.own(s, 1, "")); got.Status != 489 {
		t.Fatalf("answered %d", got.Status)
	}
	c.SetBehaviour(Behaviour{NotifyFirst: true})
	sub := p.own(s, 2, "")
	p.send(sub)
	n := p.notified()
	if n.URI != "sip:flow1@"+p.addr.String() || n.Has("Route") || !strings.Contains(string(n.Body), `version="0" state="full"`) {
		t.Errorf("first NOTIFY:\n%s", n.Bytes())
	}
	ok := p.recv()
	if ok.Status != 200 || ok.Get("To") != n.Get("From") {
		t.Fatalf("answer:\n%s", ok.Bytes())
	}
	c.SetBehaviour(Behaviour{LoseNotify: true})
	if err := c.Tell(s.IMPU[0]); err != nil {
		t.Fatal(err)
	}
	p.quiet()
	c.SetBehaviour(Behaviour{PartialNotify: true})
	if err := c.Shorten(s.IMPU[0], time.Minute); err != nil {
		t.Fatal(err)
	}
	if n = p.notified(); !strings.Contains(string(n.Body), `version="2" state="partial"`) || n.Get("CSeq") != "2 NOTIFY" ||
		!strings.Contains(string(n.Body), `event="shortened" expires="60"`) {
		t.Errorf("NOTIFY after a lost one:\n%s", n.Bytes())
	}
	c.SetBehaviour(Behaviour{MalformedNotify: true})
	if got := p.ask(p.own(s, 3, ok.Tag("To"))); got.Status != 200 {
		t.Fatalf("refresh: %d", got.Status)
	}
	if n = p.notified(); strings.Contains(string(n.Body), "</reginfo>") {
		t.Errorf("NOTIFY is whole:\n%s", n.Bytes())
	}
	c.SetBehaviour(Behaviour{})
	if err := c.Deregister(s.IMPU[0], "rejected"); err != nil {
		t.Fatal(err)
	}
	if n = p.notified(); !strings.Contains(string(n.Body), `state="terminated" event="rejected"><uri>sip:`) ||
		!strings.HasPrefix(n.Get("Subscription-State"), "terminated") {
		t.Errorf("NOTIFY of the end:\n%s", n.Bytes())
	}
	if got := p.ask(p.own(s, 4, ok.Tag("To"))); got.Status != 481 {
		t.Errorf("refresh of what is over: %d", got.Status)
	}
	wantNoProblems(t, c)
}

// TestChecksOwnSubscribe damages a right SUBSCRIBE; each damage must be found.
func TestChecksOwnSubscribe(t *testing.T) {
	for name, tt := range map[string]struct {
		damage func(*sipwire.Message)
		want   string
	}{
		"user as sender":    {func(m *sipwire.Message) { m.Set("From", "<"+Subscribers(1, domain)[0].IMPU[0]+">;tag=p1") }, "want the P-CSCF's SIP URI"},
		"asserted user":     {func(m *sipwire.Message) { m.Set("P-Asserted-Identity", "<sip:x@y>") }, "want the URI of From"},
		"too short":         {func(m *sipwire.Message) { m.Set("Expires", "600") }, "the registration lasts"},
		"no expiry":         {func(m *sipwire.Message) { m.Del("Expires") }, "Expires is"},
		"another package":   {func(m *sipwire.Message) { m.Set("Event", "presence") }, "to \"presence\""},
		"no Accept":         {func(m *sipwire.Message) { m.Del("Accept") }, "Accept is"},
		"no Contact":        {func(m *sipwire.Message) { m.Del("Contact") }, "0 Contact"},
		"unusable Contact":  {func(m *sipwire.Message) { m.Set("Contact", "<sip:x@nowhere.example>") }, "cannot be used"},
		"no route":          {func(m *sipwire.Message) { m.Del("Route") }, "want the Service-Route"},
		"Record-Route":      {func(m *sipwire.Message) { m.Add("Record-Route", "<sip:10.0.1.5;lr>") }, "Record-Route in a request"},
		"no charging":       {func(m *sipwire.Message) { m.Del("P-Charging-Vector") }, "P-Charging-Vector"},
		"temporary":         {func(m *sipwire.Message) { m.Set("To", "<"+Subscribers(1, domain)[0].TemporaryIMPU()+">") }, "temporary identity"},
		"another To":        {func(m *sipwire.Message) { m.Set("To", "<sip:nobody@"+domain+">") }, "who is unknown"},
		"Security-Client":   {func(m *sipwire.Message) { m.Add("Security-Client", "ipsec-3gpp") }, "Security-Client reached"},
		"as if for nothing": {func(m *sipwire.Message) { m.Set("Expires", "0") }, "no length"},
	} {
		t.Run(name, func(t *testing.T) {
			c, p := start(t, Config{Behaviour: Behaviour{NoNotify: true}})
			s := Subscribers(1, domain)[0]
			p.subscriber(s).register()
			m := p.own(s, 1, "")
			tt.damage(m)
			p.ask(m)
			if got := strings.Join(c.Problems(), "\n"); !strings.Contains(got, tt.want) {
				t.Errorf("problems %q, want %q", got, tt.want)
			}
		})
	}
}
