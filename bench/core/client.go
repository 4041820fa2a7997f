package core

import (
	"context"
	"errors"
	"fmt"
	"html"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/control/ims"
)

// Request is a request that the network sends to a registered UE.
type Request struct {
	Method      string // default MESSAGE; INVITE is not supported: calls come from UEs
	IMPU        string // whom it is for
	From        string // asserted calling identity; default an identity of the home network
	ContentType string // default text/plain when there is a body
	Body        string
	Headers     [][2]string // more header rows
	Transport   ims.Transport
	Ended       bool // to the binding that has been ended last, as if the core's edge had not heard of it yet
}

// Answer is the final answer to a Request.
type Answer struct {
	Status int
	Reason string
	msg    *sipwire.Message
}

// Header returns the first value of a header of the answer.
func (a Answer) Header(name string) string { return a.msg.Get(name) }

// ErrNotRegistered is returned for requests to an identity without binding.
var ErrNotRegistered = errors.New("not registered")

// SendMessage sends a MESSAGE to a registered identity over its Path and waits for the final answer.
func (c *Core) SendMessage(ctx context.Context, impu, body string) (int, error) {
	a, err := c.Send(ctx, Request{IMPU: impu, Body: body})
	return a.Status, err
}

// Send sends a request to a registered identity over its Path and waits for the final answer. Over UDP it is sent again
// as RFC 3261 §17.1.2 says, until ctx ends or Timer F fires.
func (c *Core) Send(ctx context.Context, r Request) (Answer, error) {
	acc := c.owner(r.IMPU)
	if acc == nil {
		return Answer{}, fmt.Errorf("send to %s: %w", r.IMPU, ErrNotRegistered)
	}
	c.mu.Lock()
	b := acc.binding
	if r.Ended {
		b = acc.ended
	}
	c.mu.Unlock()
	if b == nil {
		return Answer{}, fmt.Errorf("send to %s: %w", r.IMPU, ErrNotRegistered)
	}
	if r.Method == "" {
		r.Method = "MESSAGE"
	}
	if r.From == "" {
		r.From = "sip:+15559999999@" + c.cfg.Domain
	}
	m := &sipwire.Message{Method: r.Method, Body: []byte(r.Body)}
	if err := retarget(m, b); err != nil {
		return Answer{}, fmt.Errorf("send to %s: %w", r.IMPU, err)
	}
	m.Add("Max-Forwards", "67")
	m.Add("From", "<"+r.From+">;tag="+sipwire.Token())
	m.Add("To", "<"+r.IMPU+">")
	m.Add("Call-ID", sipwire.Token()+"@"+c.cfg.Addr.Addr().String())
	m.Add("CSeq", "1 "+r.Method)
	m.Add("P-Asserted-Identity", "<"+r.From+">")
	m.Add("P-Called-Party-ID", "<"+r.IMPU+">")
	m.Add("P-Charging-Vector", "icid-value="+sipwire.Token()+`;orig-ioi="`+c.cfg.Domain+`"`)
	m.Add("P-Charging-Function-Addresses", chargingFunctions)
	if r.Body != "" {
		if r.ContentType == "" {
			r.ContentType = "text/plain"
		}
		m.Add("Content-Type", r.ContentType)
	}
	for _, h := range r.Headers {
		m.Add(h[0], h[1])
	}
	answer, err := c.transact(ctx, m, r.Transport)
	if err != nil {
		return Answer{}, fmt.Errorf("send %s to %s: %w", r.Method, r.IMPU, err)
	}
	return Answer{Status: answer.Status, Reason: answer.Reason, msg: answer}, nil
}

func clientKey(branch, method string) string { return branch + "|" + method }

// transact sends a non-INVITE request of the core along its top Route, or to its Request-URI, and waits for the final
// answer. tr zero means by size.
func (c *Core) transact(ctx context.Context, m *sipwire.Message, tr ims.Transport) (*sipwire.Message, error) {
	next := m.URI
	if routes := m.List("Route"); len(routes) > 0 {
		a, err := sipwire.ParseAddr(routes[0])
		if err != nil {
			return nil, err
		}
		next = a.URI
	}
	to, u, err := c.resolve(next)
	if err != nil {
		return nil, err
	}
	branch := sipwire.Branch()
	via := "SIP/2.0/UDP " + c.cfg.Addr.String() + ";branch=" + branch
	m.Push("Via", via)
	b := m.Bytes()
	if tr == 0 {
		tr = c.transport(b, u)
	}
	if tr == ims.TCP {
		m.Headers[0].Value = strings.Replace(via, "/UDP ", "/TCP ", 1)
		b = m.Bytes()
	}
	answers := make(chan *sipwire.Message, 16)
	key := clientKey(branch, m.Method)
	c.mu.Lock()
	c.clients[key] = answers
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.clients, key)
		c.mu.Unlock()
	}()
	failed := make(chan struct{}, 1)
	c.sendTo(b, tr, to, func() {
		select {
		case failed <- struct{}{}:
		default:
		}
	})
	interval := c.cfg.T1
	again := time.NewTimer(interval)
	defer again.Stop()
	if tr == ims.TCP {
		again.Stop()
	}
	timerF := time.NewTimer(timerCount * c.cfg.T1)
	defer timerF.Stop()
	for {
		select {
		case a := <-answers:
			if a.Status >= 200 {
				return a, nil
			}
			interval = 8 * c.cfg.T1 // RFC 3261 §17.1.2.2: T2 while proceeding
		case <-again.C:
			c.sendTo(b, tr, to, nil)
			interval = min(2*interval, 8*c.cfg.T1)
			again.Reset(interval)
		case <-failed:
			return nil, fmt.Errorf("send by %s to %s: not possible", tr, to)
		case <-timerF.C:
			return nil, errors.New("no answer (Timer F)")
		case <-ctx.Done():
			return nil, fmt.Errorf("no answer: %w", context.Cause(ctx))
		case <-c.ctx.Done():
			return nil, errors.New("the core was closed")
		}
	}
}

// subscription is a dialog of the reg event package. Guarded by Core.mu.
type subscription struct {
	callID, local, remote string // local and remote: From and To as the core writes them
	target                string
	routes                []string
	cseq, version         uint32
	until                 time.Time
	pcscf                 bool // the P-CSCF's own
}

func eventPackage(m *sipwire.Message) string {
	p, _, _ := strings.Cut(m.Get("Event"), ";")
	return strings.ToLower(strings.TrimSpace(p))
}

// own reports whether a request comes from the P-CSCF itself: no Via is beneath its own.
func own(m *sipwire.Message) bool { return len(m.List("Via")) == 1 }

// subscribe answers a SUBSCRIBE to the reg event and sends the first NOTIFY (RFC 3680, RFC 6665 §4.2).
func (c *Core) subscribe(in *incoming) {
	m := in.msg
	to, err := sipwire.ParseAddr(m.Get("To"))
	contacts := m.List("Contact")
	if err != nil || len(contacts) != 1 {
		c.answer(in, sipwire.Response(m, 400, sipwire.Token()))
		return
	}
	contact, err := sipwire.ParseAddr(contacts[0])
	acc := c.owner(to.URI)
	if err != nil || acc == nil {
		c.answer(in, sipwire.Response(m, 404, sipwire.Token()))
		return
	}
	b := c.Behaviour()
	if own(m) && b.RefuseSubscribe != 0 {
		c.answer(in, sipwire.Response(m, b.RefuseSubscribe, sipwire.Token()))
		return
	}
	expires, err := strconv.ParseUint(m.Get("Expires"), 10, 31)
	if err != nil {
		expires = maxExpires
	}
	r := sipwire.Response(m, 200, sipwire.Token())
	for _, rr := range m.All("Record-Route") {
		r.Add("Record-Route", rr)
	}
	r.Add("Contact", "<sip:"+c.cfg.Addr.String()+">")
	r.Add("Expires", strconv.FormatUint(expires, 10))

	c.mu.Lock()
	var s *subscription
	for _, w := range acc.watch {
		if w.callID == m.Get("Call-ID") && m.Tag("To") != "" {
			s = w
		}
	}
	if s == nil && m.Tag("To") != "" {
		c.mu.Unlock()
		c.answer(in, sipwire.Response(m, 481, ""))
		return
	}
	if s == nil {
		s = &subscription{
			callID: m.Get("Call-ID"), local: r.Get("To"), remote: m.Get("From"), routes: m.List("Record-Route"), pcscf: own(m),
		}
		acc.watch = append(acc.watch, s)
	}
	s.target, s.until = contact.URI, time.Now().Add(time.Duration(expires)*time.Second)
	c.mu.Unlock()
	now := change{initial: true, terminate: expires == 0}
	if s.pcscf && b.NotifyFirst {
		c.spawn(func() { c.notify(acc, s, now); c.answer(in, r) })
		return
	}
	c.answer(in, r)
	c.spawn(func() { c.notify(acc, s, now) })
}

// change is what a NOTIFY tells of the registration of an account: without binding that it has ended.
type change struct {
	initial   bool          // the whole state, because of a SUBSCRIBE
	terminate bool          // ends the subscription
	event     string        // of the contact, default registered
	expires   time.Duration // with event shortened
}

// notifyAll tells every subscriber of an account about a change.
func (c *Core) notifyAll(acc *account, ch change) {
	c.mu.Lock()
	watch := append([]*subscription(nil), acc.watch...)
	ch.terminate = acc.binding == nil
	c.mu.Unlock()
	for _, s := range watch {
		c.spawn(func() { c.notify(acc, s, ch) })
	}
}

// notify sends one NOTIFY (RFC 3680 §5).
func (c *Core) notify(acc *account, s *subscription, ch change) {
	b := c.Behaviour()
	if b.NoNotify {
		return
	}
	c.mu.Lock()
	version := s.version
	s.version++
	if s.pcscf && b.LoseNotify && !ch.initial {
		c.mu.Unlock()
		return
	}
	s.cseq++
	if ch.terminate || time.Now().After(s.until) {
		acc.watch = slices.DeleteFunc(slices.Clone(acc.watch), func(w *subscription) bool { return w == s })
	}
	m := &sipwire.Message{Method: "NOTIFY", URI: s.target}
	m.Add("Max-Forwards", "70")
	for _, r := range s.routes {
		m.Add("Route", r)
	}
	m.Add("From", s.local)
	m.Add("To", s.remote)
	m.Add("Call-ID", s.callID)
	m.Add("CSeq", strconv.FormatUint(uint64(s.cseq), 10)+" NOTIFY")
	m.Add("Event", "reg")
	if ch.terminate {
		m.Add("Subscription-State", "terminated;reason=noresource")
	} else {
		m.Add("Subscription-State", "active;expires="+strconv.Itoa(int(time.Until(s.until)/time.Second)))
	}
	m.Add("Contact", "<sip:"+c.cfg.Addr.String()+">")
	m.Add("Content-Type", "application/reginfo+xml")
	m.Body = reginfo(acc, version, ch, s.pcscf && b.PartialNotify && !ch.initial)
	if s.pcscf && b.MalformedNotify {
		m.Body = m.Body[:len(m.Body)/2]
	}
	c.mu.Unlock()
	answer, err := c.transact(c.ctx, m, 0)
	switch {
	case err != nil:
		c.log.Info("notify", "impi", acc.sub.IMPI, "cause", err)
	case answer.Status == 481: // RFC 6665 §4.2.2
		c.mu.Lock()
		acc.watch = slices.DeleteFunc(slices.Clone(acc.watch), func(w *subscription) bool { return w == s })
		c.mu.Unlock()
	}
}

// reginfo prints the registration state of an account (RFC 3680 §5.1).
func reginfo(acc *account, version uint32, ch change, partial bool) []byte {
	var b strings.Builder
	state, contactState, event, kind := "active", "active", ch.event, "full"
	if event == "" {
		event = "registered"
	}
	binding, expires := acc.binding, ""
	if binding == nil {
		state, contactState, binding = "terminated", "terminated", acc.ended
	}
	if ch.event == "shortened" {
		expires = fmt.Sprintf(` expires="%d"`, ch.expires/time.Second)
	}
	if partial {
		kind = "partial"
	}
	fmt.Fprintf(&b, "<?xml version=\"1.0\"?>\n<reginfo xmlns=\"urn:ietf:params:xml:ns:reginfo\" version=\"%d\" state=\"%s\">\n",
		version, kind)
	for i, u := range acc.sub.IMPU {
		fmt.Fprintf(&b, "<registration aor=\"%s\" id=\"r%d\" state=\"%s\">", u, i, state)
		if binding != nil {
			if a, err := sipwire.ParseAddr(binding.Contact); err == nil {
				fmt.Fprintf(&b, "<contact id=\"c%d\" state=\"%s\" event=\"%s\"%s><uri>%s</uri></contact>",
					i, contactState, event, expires, html.EscapeString(a.URI))
			}
		}
		b.WriteString("</registration>\n")
	}
	b.WriteString("</reginfo>\n")
	return []byte(b.String())
}
