package ue

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/control/ims"
)

// markHeader tells the called test phone what to do: "ring" rings until the caller cancels, "bye" hangs up by itself. It
// also shows that headers which gmgate does not know pass through it.
const markHeader = "X-Bench-Call"

// registered returns the current registration or ErrNotRegistered.
func (u *UE) registered() (*registration, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return nil, ErrClosed
	}
	if u.reg == nil {
		return nil, ErrNotRegistered
	}
	return u.reg, nil
}

// initial builds an initial request without Via (TS 24.229 §5.1.2A.1.1).
func (u *UE) initial(reg *registration, method, uri string) *sipwire.Message {
	m := &sipwire.Message{Method: method, URI: uri}
	m.Add("Max-Forwards", "70")
	m.Add("Route", strings.Join(append([]string{u.ownRoute(reg.set, ims.UDP)}, reg.serviceRoute...), ", "))
	m.Add("From", "<"+reg.preferred()+">;tag="+sipwire.Token())
	m.Add("To", "<"+uri+">")
	m.Add("Call-ID", sipwire.Token()+"@"+sipwire.Host(u.cfg.Addr))
	m.Add("CSeq", "1 "+method)
	m.Add("P-Preferred-Identity", "<"+reg.preferred()+">")
	u.secure(m, reg.set)
	for _, h := range u.cfg.Quirks.ExtraHeaders {
		m.Add(h[0], h[1])
	}
	return m
}

// secure adds what every request of a UE inside an SA carries, ACK and CANCEL excepted (RFC 3329 §2.3.1, TS 24.229
// §5.1.2A.1.1).
func (u *UE) secure(m *sipwire.Message, set *saSet) {
	m.Add("P-Access-Network-Info", accessNetwork)
	m.Add("Require", "sec-agree")
	m.Add("Proxy-Require", "sec-agree")
	for _, row := range set.verify {
		m.Add("Security-Verify", row)
	}
}

// contactHeader is the Contact of dialog-forming requests and their answers.
func (u *UE) contactHeader(reg *registration) string { return "<" + reg.contact + ">;" + mmtel }

// Message sends a MESSAGE and returns the final status. err is for what is wrong beyond a status.
func (u *UE) Message(ctx context.Context, to, body string) (int, error) {
	reg, err := u.registered()
	if err != nil {
		return 0, err
	}
	m := u.initial(reg, "MESSAGE", to)
	m.Add("Content-Type", "text/plain")
	m.Body = []byte(body)
	in, err := u.transact(ctx, reg.set, m, "message")
	return status(in), err
}

func status(in *inbound) int {
	if in == nil {
		return 0
	}
	return in.msg.Status
}

// SubscribeResult is an answered subscription.
type SubscribeResult struct {
	Status  int
	Expires time.Duration
	Notify  Incoming // the first NOTIFY; only after a 2xx
}

// Subscribe subscribes to an event package of the own default identity, the reg event for example (TS 24.229
// §5.1.1.3), and waits for the first NOTIFY.
func (u *UE) Subscribe(ctx context.Context, event string) (SubscribeResult, error) {
	reg, err := u.registered()
	if err != nil {
		return SubscribeResult{}, err
	}
	m := u.initial(reg, "SUBSCRIBE", reg.preferred())
	m.Add("Contact", u.contactHeader(reg))
	m.Add("Event", event)
	m.Add("Expires", "600000")
	if event == "reg" {
		m.Add("Accept", "application/reginfo+xml")
	}
	in, err := u.transact(ctx, reg.set, m, "subscribe")
	if err != nil {
		return SubscribeResult{Status: status(in)}, err
	}
	res := SubscribeResult{Status: in.msg.Status}
	if res.Status >= 300 {
		return res, nil
	}
	if n, err := strconv.ParseUint(in.msg.Get("Expires"), 10, 31); err == nil {
		res.Expires = time.Duration(n) * time.Second
	}
	id := m.Get("Call-ID")
	got, err := u.wait(ctx, 1, func(i Incoming) bool { return i.Method == "NOTIFY" && i.CallID == id })
	if err != nil {
		return res, fmt.Errorf("subscribe to %s: %w", event, err)
	}
	res.Notify = got[0]
	return res, nil
}

// dialog is one dialog (RFC 3261 §12).
type dialog struct {
	callID        string
	local, remote string // From and To of own requests, tags included
	target        string
	routes        []string
	seq           uint32
	done          chan struct{} // closed by BYE
	over          bool
	acks          map[uint32]chan struct{} // waiting for the ACK to a 2xx, by CSeq
}

func dialogKey(callID, tag string) string { return callID + "|" + tag }

// inDialog builds a request inside a dialog, without Via (RFC 3261 §12.2.1.1).
func (u *UE) inDialog(reg *registration, d *dialog, method string) *sipwire.Message {
	m := &sipwire.Message{Method: method, URI: d.target}
	m.Add("Max-Forwards", "70")
	for _, r := range d.routes {
		m.Add("Route", r)
	}
	m.Add("From", d.local)
	m.Add("To", d.remote)
	m.Add("Call-ID", d.callID)
	u.mu.Lock()
	if method != "ACK" {
		d.seq++
	}
	seq := d.seq
	u.mu.Unlock()
	m.Add("CSeq", strconv.FormatUint(uint64(seq), 10)+" "+method)
	if method != "ACK" {
		u.secure(m, reg.set)
	}
	return m
}

// CallOptions say how a call goes.
type CallOptions struct {
	PRACK     bool          // demand reliable provisional answers
	Cancel    bool          // give up while it rings
	ReInvite  bool          // one re-INVITE before the end
	Update    bool          // one UPDATE before the end
	RemoteBye bool          // the called side hangs up
	Hold      time.Duration // between answer and end
	Until     chan struct{} // if set, the call lasts until it is closed
	BodySize  int           // pad the session description to this size; beyond the UDP limit it goes by TCP
}

// CallResult is what happened to a call.
type CallResult struct {
	CallID    string
	Transport ims.Transport // of the INVITE
	Statuses  []int         // of all answers to the INVITE, in order
	Status    int           // the final one
	Ringing   time.Duration // INVITE to the first provisional answer above 100
	Answered  time.Duration // INVITE to the final answer
	RouteSet  []string      // of the dialog
	Bye       int           // status of the BYE; zero when the other side hung up
}

// Call makes a call: INVITE, provisional answers, ACK, what the options say, and BYE. err tells what went wrong; a
// refused call is a StatusError, except that 487 after Cancel is what was asked for.
func (u *UE) Call(ctx context.Context, to string, o CallOptions) (CallResult, error) {
	reg, err := u.registered()
	if err != nil {
		return CallResult{}, err
	}
	c := &caller{u: u, o: o, reg: reg}
	err = c.run(ctx, to)
	if c.d != nil {
		u.forget(c.d)
	}
	if err != nil {
		err = fmt.Errorf("call %s: %w", to, err)
	}
	return c.res, err
}

// caller is one outgoing call.
type caller struct {
	u         *UE
	o         CallOptions
	reg       *registration
	invite    *sipwire.Message
	d         *dialog
	rseq      map[string]bool // reliable answers already acknowledged
	cancelled bool
	res       CallResult
}

func (c *caller) run(ctx context.Context, to string) error {
	u := c.u
	m := u.initial(c.reg, "INVITE", to)
	c.invite, c.rseq = m, make(map[string]bool)
	c.res.CallID = m.Get("Call-ID")
	m.Add("Contact", u.contactHeader(c.reg))
	m.Add("Supported", "100rel, timer")
	m.Add("Allow", "INVITE, ACK, CANCEL, BYE, PRACK, UPDATE, MESSAGE, NOTIFY, OPTIONS")
	if c.o.PRACK {
		m.Set("Require", "sec-agree, 100rel")
	}
	switch {
	case c.o.Cancel:
		m.Add(markHeader, "ring")
	case c.o.RemoteBye:
		m.Add(markHeader, "bye")
	}
	m.Add("Content-Type", "application/sdp")
	m.Body = u.sdp(c.o.BodySize)
	sent := time.Now()
	tx, err := u.start(ctx, c.reg.set, m, "invite")
	if err != nil {
		return err
	}
	defer tx.end()
	c.res.Transport = tx.tr
	for {
		in, err := tx.next(ctx)
		if err != nil {
			return err
		}
		st := in.msg.Status
		c.res.Statuses = append(c.res.Statuses, st)
		switch {
		case st == 100:
		case st < 200:
			if c.res.Ringing == 0 {
				c.res.Ringing = time.Since(sent)
			}
			if err := c.provisional(ctx, tx, in); err != nil {
				return err
			}
		case st < 300:
			c.res.Status, c.res.Answered = st, time.Since(sent)
			return c.talk(ctx, tx, in)
		default:
			c.res.Status, c.res.Answered = st, time.Since(sent)
			if err := c.refused(tx, in); err != nil {
				return err
			}
			if c.cancelled && st == 487 {
				return nil
			}
			return &StatusError{Status: st, Reason: in.msg.Reason, Protected: true, msg: in.msg}
		}
	}
}

// adopt makes or updates the dialog from an answer (RFC 3261 §12.1.2): the route set is Record-Route turned round.
func (c *caller) adopt(m *sipwire.Message) error {
	list, err := uris(m.List("Contact"))
	if err != nil || len(list) != 1 {
		return &ProtocolError{Problems: []string{fmt.Sprintf("%d to INVITE with Contact %q", m.Status, m.All("Contact"))}}
	}
	if c.d == nil || c.d.remote != m.Get("To") {
		if c.d != nil {
			c.u.forget(c.d)
		}
		c.d = &dialog{
			callID: m.Get("Call-ID"), local: m.Get("From"), remote: m.Get("To"), seq: 1, done: make(chan struct{}),
			acks: make(map[uint32]chan struct{}),
		}
		c.u.mu.Lock()
		c.u.dialogs[dialogKey(c.d.callID, m.Tag("From"))] = c.d
		c.u.mu.Unlock()
	}
	c.u.mu.Lock()
	c.d.target, c.d.routes = list[0], reversed(m.List("Record-Route"))
	c.u.mu.Unlock()
	c.res.RouteSet = c.d.routes
	return nil
}

func (u *UE) forget(d *dialog) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for k, e := range u.dialogs {
		if e == d {
			delete(u.dialogs, k)
		}
	}
}

// provisional takes a 180 or 183: PRACK if it is reliable (RFC 3262 §4), CANCEL if the caller gives up.
func (c *caller) provisional(ctx context.Context, tx *clientTx, in *inbound) error {
	u, m := c.u, in.msg
	if m.Tag("To") == "" {
		return &ProtocolError{Problems: []string{fmt.Sprintf("%d without To tag", m.Status)}}
	}
	if err := c.adopt(m); err != nil {
		return err
	}
	if m.HasToken("Require", "100rel") && !c.rseq[m.Get("RSeq")] {
		c.rseq[m.Get("RSeq")] = true
		p := u.inDialog(c.reg, c.d, "PRACK")
		p.Add("RAck", m.Get("RSeq")+" "+m.Get("CSeq"))
		got, err := u.transact(ctx, c.reg.set, p, "prack")
		if err != nil {
			return err
		}
		if got.msg.Status != 200 {
			return &StatusError{Status: got.msg.Status, Reason: got.msg.Reason, Protected: true, msg: got.msg}
		}
	}
	if !c.o.Cancel || c.cancelled {
		return nil
	}
	c.cancelled = true
	m = c.like(tx, "CANCEL", c.invite.Get("To"))
	can := tx.companion(m)
	if err := can.launch("cancel"); err != nil {
		return err
	}
	defer can.end()
	for {
		got, err := can.next(ctx)
		if err != nil {
			return err
		}
		if got.msg.Status >= 200 {
			if got.msg.Status != 200 {
				return &StatusError{Status: got.msg.Status, Reason: got.msg.Reason, Protected: true, msg: got.msg}
			}
			return nil
		}
	}
}

// like builds CANCEL or ACK after the INVITE: same Request-URI, Route, From, Call-ID and CSeq number.
func (c *caller) like(tx *clientTx, method, to string) *sipwire.Message {
	m := &sipwire.Message{Method: method, URI: tx.msg.URI}
	m.Add("Max-Forwards", "70")
	for _, r := range tx.msg.All("Route") {
		m.Add("Route", r)
	}
	m.Add("From", tx.msg.Get("From"))
	m.Add("To", to)
	m.Add("Call-ID", tx.msg.Get("Call-ID"))
	seq, _, _ := tx.msg.CSeq()
	m.Add("CSeq", strconv.FormatUint(uint64(seq), 10)+" "+method)
	return m
}

// refused acknowledges a non-2xx answer, and every repetition of it.
func (c *caller) refused(tx *clientTx, in *inbound) error {
	ack := tx.companion(c.like(tx, "ACK", in.msg.Get("To")))
	return c.u.acknowledge(tx, ack)
}

// acknowledge sends an ACK and arranges that it is sent again when the final answer is.
func (u *UE) acknowledge(tx, ack *clientTx) error {
	if u.Tweak != nil {
		ack.b = u.Tweak("ack", ack.b)
	}
	u.mu.Lock()
	tx.ack = func() { _ = ack.send() }
	u.mu.Unlock()
	return ack.send()
}

// ack2xx acknowledges a 2xx: a request of its own along the route set (RFC 3261 §13.2.2.4).
func (u *UE) ack2xx(ctx context.Context, reg *registration, d *dialog, tx *clientTx) error {
	m := u.inDialog(reg, d, "ACK")
	seq, _, _ := tx.msg.CSeq()
	m.Set("CSeq", strconv.FormatUint(uint64(seq), 10)+" ACK")
	ack := &clientTx{u: u, set: reg.set, method: "ACK", branch: sipwire.Branch()}
	if err := ack.prepare(ctx, m); err != nil {
		return err
	}
	return u.acknowledge(tx, ack)
}

// talk is the call from its answer to its end.
func (c *caller) talk(ctx context.Context, tx *clientTx, in *inbound) error {
	u := c.u
	if err := c.adopt(in.msg); err != nil {
		return err
	}
	if err := u.ack2xx(ctx, c.reg, c.d, tx); err != nil {
		return err
	}
	if err := u.pause(ctx, c.o.Hold, c.d.done); err != nil {
		return err
	}
	if c.o.Until != nil {
		select {
		case <-c.o.Until:
		case <-c.d.done:
		case <-u.ctx.Done():
			return ErrClosed
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	reg, err := u.registered() // a re-registration may have changed the set meanwhile
	if err != nil {
		return err
	}
	if c.o.ReInvite {
		if err := c.reinvite(ctx, reg); err != nil {
			return err
		}
	}
	if c.o.Update {
		m := u.inDialog(reg, c.d, "UPDATE")
		m.Add("Contact", u.contactHeader(reg))
		if err := c.expect200(ctx, reg, m, "update"); err != nil {
			return err
		}
	}
	if c.o.RemoteBye && !c.cancelled {
		select {
		case <-c.d.done:
			return nil
		case <-u.ctx.Done():
			return ErrClosed
		case <-ctx.Done():
			return fmt.Errorf("wait for BYE: %w", context.Cause(ctx))
		}
	}
	m := u.inDialog(reg, c.d, "BYE")
	got, err := u.transact(ctx, reg.set, m, "bye")
	c.res.Bye = status(got)
	if err != nil {
		return err
	}
	if c.res.Bye != 200 {
		return &StatusError{Status: got.msg.Status, Reason: got.msg.Reason, Protected: true, msg: got.msg}
	}
	return nil
}

func (c *caller) expect200(ctx context.Context, reg *registration, m *sipwire.Message, kind string) error {
	got, err := c.u.transact(ctx, reg.set, m, kind)
	if err != nil {
		return err
	}
	if got.msg.Status != 200 {
		return &StatusError{Status: got.msg.Status, Reason: got.msg.Reason, Protected: true, msg: got.msg}
	}
	return nil
}

func (c *caller) reinvite(ctx context.Context, reg *registration) error {
	u := c.u
	m := u.inDialog(reg, c.d, "INVITE")
	m.Add("Contact", u.contactHeader(reg))
	m.Add("Supported", "timer")
	m.Add("Content-Type", "application/sdp")
	m.Body = u.sdp(c.o.BodySize)
	tx, err := u.start(ctx, reg.set, m, "invite")
	if err != nil {
		return err
	}
	defer tx.end()
	for {
		in, err := tx.next(ctx)
		if err != nil {
			return err
		}
		switch st := in.msg.Status; {
		case st < 200:
		case st < 300:
			return u.ack2xx(ctx, reg, c.d, tx)
		default:
			if err := c.refused(tx, in); err != nil {
				return err
			}
			return &StatusError{Status: st, Reason: in.msg.Reason, Protected: true, msg: in.msg}
		}
	}
}

// pause waits, but not longer than ctx or until done is closed.
func (u *UE) pause(ctx context.Context, d time.Duration, done <-chan struct{}) error {
	if d <= 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-done:
	case <-u.ctx.Done():
		return ErrClosed
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return nil
}

// sdp prints a session description, padded to a size.
func (u *UE) sdp(size int) []byte {
	family := "IP4"
	if u.cfg.Addr.Is6() {
		family = "IP6"
	}
	a := u.cfg.Addr.String()
	b := fmt.Appendf(nil, "v=0\r\no=- 1 1 IN %s %s\r\ns=-\r\nc=IN %s %s\r\nt=0 0\r\nm=audio 50000 RTP/AVP 104\r\na=rtpmap:104 AMR-WB/16000/1\r\n",
		family, a, family, a)
	const line = "a=x-pad:\r\n"
	for len(b)+len(line) <= size {
		n := min(64, size-len(b)-len(line))
		b = append(b, "a=x-pad:"...)
		b = append(b, slices.Repeat([]byte{'x'}, n)...)
		b = append(b, '\r', '\n')
	}
	return b
}
