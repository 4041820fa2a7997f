package ue

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/control/ims"
)

// serverTx is a server transaction (RFC 3261 §17.2).
type serverTx struct {
	at     time.Time
	in     *inbound // the request as it came first
	cancel chan struct{}
	prack  chan string // RAck of each new PRACK
	ack    chan struct{}
	tag    string // To tag of our answers

	// Guarded by UE.mu.
	last []byte
	over bool
}

// serveRequest answers a request from the network (TS 24.229 §5.1.2A.2).
func (u *UE) serveRequest(in *inbound) {
	m := in.msg
	v, err := m.TopVia()
	if err != nil {
		u.problem("%s: %v", m.Method, err)
		return
	}
	if again := u.retransmitted(in, v); again {
		return
	}
	for _, p := range u.checkRequest(in, v) {
		u.problem("%s: %s", m.Method, p)
	}
	u.note(&u.received, Incoming{
		At: time.Now(), Method: m.Method, Transport: in.tr, Local: in.local, Remote: in.remote, Set: in.set.gen,
		CallID: m.Get("Call-ID"), Body: string(m.Body), msg: m,
	})
	switch m.Method {
	case "ACK":
		u.serveACK(in, v)
		return
	case "CANCEL":
		u.serveCancel(in, v)
		return
	}
	tx := &serverTx{
		at: time.Now(), in: in, cancel: make(chan struct{}, 1), prack: make(chan string, 8), ack: make(chan struct{}, 1),
		tag: sipwire.Token(),
	}
	u.mu.Lock()
	u.sweep()
	u.served[txKey(v.Branch(), m.Method)] = tx
	d := u.dialogs[dialogKey(m.Get("Call-ID"), m.Tag("To"))]
	u.mu.Unlock()
	if m.Method == "INVITE" {
		u.spawn(func() { u.serveInvite(tx, d) })
		return
	}
	u.reply(tx, u.plainAnswer(tx, d), true)
}

// retransmitted answers a repeated request again.
func (u *UE) retransmitted(in *inbound, v sipwire.Via) bool {
	if in.msg.Method == "ACK" {
		return false
	}
	u.mu.Lock()
	tx := u.served[txKey(v.Branch(), in.msg.Method)]
	var b []byte
	if tx != nil {
		b = tx.last
	}
	u.mu.Unlock()
	if tx == nil {
		return false
	}
	if b != nil {
		u.transmit(in, b)
	}
	return true
}

// plainAnswer makes the answer to everything but INVITE.
func (u *UE) plainAnswer(tx *serverTx, d *dialog) *sipwire.Message {
	m := tx.in.msg
	answer := func(status int) *sipwire.Message { return u.answerTo(tx, status) }
	if d == nil && (m.Method == "BYE" || m.Method == "PRACK" || m.Method == "UPDATE") {
		return answer(481)
	}
	switch m.Method {
	case "BYE":
		u.mu.Lock()
		if !d.over {
			d.over = true
			close(d.done)
		}
		u.mu.Unlock()
		return answer(200)
	case "PRACK":
		return u.servePRACK(tx)
	case "UPDATE":
		if list, err := uris(m.List("Contact")); err == nil && len(list) == 1 {
			u.mu.Lock()
			d.target = list[0]
			u.mu.Unlock()
		}
		r := answer(200)
		u.addContact(r)
		if len(m.Body) > 0 {
			r.Add("Content-Type", "application/sdp")
			r.Body = u.sdp(0)
		}
		return r
	case "MESSAGE", "OPTIONS", "NOTIFY", "INFO":
		return answer(200)
	case "REFER":
		r := answer(202)
		u.addContact(r)
		return r
	case "SUBSCRIBE":
		return answer(489)
	}
	return answer(501)
}

// answerTo builds an answer with what a UE adds (TS 24.229 §5.1.2A.2).
func (u *UE) answerTo(tx *serverTx, status int) *sipwire.Message {
	r := sipwire.Response(tx.in.msg, status, tx.tag)
	if status > 100 {
		r.Add("P-Access-Network-Info", accessNetwork)
	}
	return r
}

func (u *UE) addContact(r *sipwire.Message) {
	if reg, err := u.registered(); err == nil {
		r.Add("Contact", u.contactHeader(reg))
	}
}

// reply sends an answer, keeps it for retransmissions, and closes the transaction if it is the last one.
func (u *UE) reply(tx *serverTx, r *sipwire.Message, last bool) {
	b := r.Bytes()
	if u.Tweak != nil {
		b = u.Tweak("response", b)
	}
	u.mu.Lock()
	tx.last, tx.over = b, last
	u.mu.Unlock()
	if b != nil {
		u.transmit(tx.in, b)
	}
}

// transmit sends an answer by the set of its request: UDP from port-uc to where the topmost Via says, which must be
// port-ps; TCP on the connection of the request (TS 33.203 §7.1, TS 24.229 §5.1.2A.2).
func (u *UE) transmit(in *inbound, b []byte) {
	if in.tr == ims.TCP {
		if in.stream.write(b) == nil {
			return
		}
		u.spawn(func() { // RFC 3261 §18.2.2: the connection is gone
			ctx, cancel := context.WithTimeout(u.ctx, timerFactor*u.farm.cfg.T1)
			defer cancel()
			if s, err := u.ownStream(ctx, in.set); err == nil {
				_ = s.write(b)
			}
		})
		return
	}
	v, err := in.msg.TopVia()
	if err != nil {
		return
	}
	if to, ok := v.SentBy(); ok {
		_, _ = in.set.udp.WriteToUDPAddrPort(b, to)
	}
}

// checkRequest checks what the P-CSCF sent.
func (u *UE) checkRequest(in *inbound, v sipwire.Via) []string {
	f := u.checkCommon(in)
	m := in.msg
	bad := func(ok bool, format string, args ...any) {
		if !ok {
			f = append(f, fmt.Sprintf(format, args...))
		}
	}
	// Via and Record-Route towards the UE carry port-ps (TS 24.229 §5.2.6.4).
	want := netip.AddrPortFrom(u.farm.cfg.PCSCF.Addr(), in.set.ports.PS)
	got, ok := v.SentBy()
	bad(ok && got == want, "top Via is %s, want %s", v, want)
	bad(v.Transport == in.tr.Via(), "top Via says %s, it came by %s", v.Transport, in.tr.Via())
	bad(strings.HasPrefix(v.Branch(), "z9hG4bK"), "branch %q", v.Branch())
	bad(m.Has("Max-Forwards"), "no Max-Forwards")
	bad(!m.Has("Route"), "Route %q left", m.Get("Route"))
	bad(!m.Has("Path"), "Path was sent to the UE")
	bad(!m.Has("Security-Server"), "Security-Server in a request")
	if (m.Method == "INVITE" || m.Method == "SUBSCRIBE" || m.Method == "REFER") && m.Tag("To") == "" {
		rr := m.List("Record-Route")
		bad(len(rr) > 0, "no Record-Route")
		if len(rr) > 0 {
			f = append(f, u.checkOwnRoute("Record-Route", rr[0], in.set)...)
		}
	}
	u.mu.Lock()
	reg, former := u.reg, u.former
	u.mu.Unlock()
	if reg != nil {
		bad(m.URI == reg.contact || m.URI == former, "Request-URI %s, the contact is %s", m.URI, reg.contact)
	}
	if m.HasToken("Privacy", "id") || strings.Contains(strings.ToLower(m.Get("Privacy")), "id") {
		bad(!m.Has("P-Asserted-Identity"), "P-Asserted-Identity in spite of Privacy: id")
	}
	if !u.cfg.Quirks.NoTCPListener {
		bad(in.tr == ims.TCP || in.size <= sipwire.UDPLimit, "%d octets by UDP", in.size)
	}
	return f
}

// serveACK ends the wait for the ACK of a final answer to an INVITE.
func (u *UE) serveACK(in *inbound, v sipwire.Via) {
	seq, _, _ := in.msg.CSeq()
	u.mu.Lock()
	defer u.mu.Unlock()
	if tx := u.served[txKey(v.Branch(), "INVITE")]; tx != nil { // to a non-2xx answer
		select {
		case tx.ack <- struct{}{}:
		default:
		}
		return
	}
	if d := u.dialogs[dialogKey(in.msg.Get("Call-ID"), in.msg.Tag("To"))]; d != nil && d.acks[seq] != nil {
		select {
		case d.acks[seq] <- struct{}{}:
		default:
		}
	}
}

// serveCancel answers a CANCEL and tells the INVITE (RFC 3261 §9.2).
func (u *UE) serveCancel(in *inbound, v sipwire.Via) {
	tx := &serverTx{at: time.Now(), in: in, tag: sipwire.Token()}
	u.mu.Lock()
	u.served[txKey(v.Branch(), "CANCEL")] = tx
	invite := u.served[txKey(v.Branch(), "INVITE")]
	u.mu.Unlock()
	if invite == nil {
		u.reply(tx, u.answerTo(tx, 481), true)
		return
	}
	tx.tag = invite.tag
	u.reply(tx, u.answerTo(tx, 200), true)
	select {
	case invite.cancel <- struct{}{}:
	default:
	}
}

// servePRACK finds the INVITE a PRACK belongs to (RFC 3262 §3).
func (u *UE) servePRACK(tx *serverTx) *sipwire.Message {
	m := tx.in.msg
	f := strings.Fields(m.Get("RAck"))
	if len(f) != 3 {
		return u.answerTo(tx, 400)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, other := range u.served {
		req := other.in.msg
		if req.Method == "INVITE" && req.Get("Call-ID") == m.Get("Call-ID") && req.Get("CSeq") == f[1]+" "+f[2] && !other.over {
			select {
			case other.prack <- f[0]:
			default:
			}
			return u.answerTo(tx, 200)
		}
	}
	return u.answerTo(tx, 481)
}

// serveInvite answers a call, or a re-INVITE when d is its dialog.
func (u *UE) serveInvite(tx *serverTx, d *dialog) {
	m := tx.in.msg
	if d != nil {
		if list, err := uris(m.List("Contact")); err == nil && len(list) == 1 {
			u.mu.Lock()
			d.target = list[0]
			u.mu.Unlock()
		}
		tx.tag = m.Tag("To")
		u.accept(tx, d)
		return
	}
	if m.Tag("To") != "" {
		u.refuse(tx, 481)
		return
	}
	list, err := uris(m.List("Contact"))
	if err != nil || len(list) != 1 {
		u.problem("INVITE with Contact %q", m.All("Contact"))
		u.refuse(tx, 400)
		return
	}
	d = &dialog{
		callID: m.Get("Call-ID"), local: m.Get("To") + ";tag=" + tx.tag, remote: m.Get("From"), target: list[0],
		routes: m.List("Record-Route"), done: make(chan struct{}), acks: make(map[uint32]chan struct{}),
	}
	u.mu.Lock()
	u.dialogs[dialogKey(d.callID, tx.tag)] = d
	u.mu.Unlock()
	defer u.forget(d)
	u.reply(tx, u.answerTo(tx, 100), false)
	if !u.ring(tx, d) {
		return
	}
	if !u.accept(tx, d) {
		return
	}
	if m.Get(markHeader) == "bye" {
		u.hangUp(d)
		return
	}
	select {
	case <-d.done:
	case <-u.ctx.Done():
	}
}

// ring sends the provisional answer, reliably if wanted, and waits until the call is to be answered. false means that it
// is over.
func (u *UE) ring(tx *serverTx, d *dialog) bool {
	m := tx.in.msg
	r := u.dialogAnswer(tx, 180)
	const rseq = "1"
	reliable := m.HasToken("Require", "100rel") || (u.cfg.Reliable && m.HasToken("Supported", "100rel"))
	if reliable {
		r.Add("Require", "100rel")
		r.Add("RSeq", rseq)
	}
	u.reply(tx, r, false)
	t1 := u.farm.cfg.T1
	interval := t1
	again := time.NewTimer(interval)
	defer again.Stop()
	if !reliable {
		again.Stop()
	}
	limit := time.NewTimer(timerFactor * t1)
	defer limit.Stop()
	var answer <-chan time.Time
	if m.Get(markHeader) != "ring" {
		t := time.NewTimer(u.cfg.Ring)
		defer t.Stop()
		answer = t.C
	}
	ready := false
	for {
		if ready && !reliable {
			return true
		}
		select {
		case <-answer:
			ready, answer = true, nil
		case got := <-tx.prack:
			if got == rseq {
				reliable = false
				again.Stop()
			}
		case <-again.C:
			u.mu.Lock()
			last := tx.last
			u.mu.Unlock()
			u.transmit(tx.in, last)
			interval *= 2
			again.Reset(interval)
		case <-tx.cancel:
			u.refuse(tx, 487)
			return false
		case <-d.done:
			u.refuse(tx, 487)
			return false
		case <-limit.C:
			u.refuse(tx, 480)
			return false
		case <-u.ctx.Done():
			return false
		}
	}
}

// dialogAnswer builds an answer that makes a dialog (RFC 3261 §12.1.1).
func (u *UE) dialogAnswer(tx *serverTx, status int) *sipwire.Message {
	r := u.answerTo(tx, status)
	for _, rr := range tx.in.msg.All("Record-Route") {
		r.Add("Record-Route", rr)
	}
	u.addContact(r)
	return r
}

// accept answers 200 and repeats it until the ACK arrives (RFC 3261 §13.3.1.4).
func (u *UE) accept(tx *serverTx, d *dialog) bool {
	m := tx.in.msg
	seq, _, _ := m.CSeq()
	acked := make(chan struct{}, 1)
	u.mu.Lock()
	d.acks[seq] = acked
	u.mu.Unlock()
	defer func() {
		u.mu.Lock()
		delete(d.acks, seq)
		tx.over = true
		u.mu.Unlock()
	}()
	r := u.dialogAnswer(tx, 200)
	r.Add("Supported", "100rel, timer")
	r.Add("Content-Type", "application/sdp")
	r.Body = u.sdp(0)
	u.reply(tx, r, false)
	return u.repeat(tx, acked, d.done)
}

// refuse sends a final answer other than 2xx and repeats it over UDP until the ACK arrives (RFC 3261 §17.2.1).
func (u *UE) refuse(tx *serverTx, status int) {
	u.reply(tx, u.answerTo(tx, status), true)
	if tx.in.tr == ims.UDP {
		u.repeat(tx, tx.ack, nil)
	}
}

// repeat sends the last answer again until something arrives on one of the channels; false without any.
func (u *UE) repeat(tx *serverTx, acked, done <-chan struct{}) bool {
	t1 := u.farm.cfg.T1
	interval := t1
	again := time.NewTimer(interval)
	defer again.Stop()
	limit := time.NewTimer(timerFactor * t1)
	defer limit.Stop()
	for {
		select {
		case <-acked:
			return true
		case <-done:
			return true
		case <-again.C:
			u.mu.Lock()
			last := tx.last
			u.mu.Unlock()
			u.transmit(tx.in, last)
			interval = min(2*interval, t2Factor*t1)
			again.Reset(interval)
		case <-limit.C:
			u.problem("no ACK to the answer of an INVITE (Call-ID %s, CSeq %s)", tx.in.msg.Get("Call-ID"), tx.in.msg.Get("CSeq"))
			return false
		case <-u.ctx.Done():
			return false
		}
	}
}

// hangUp ends a call that the other side made.
func (u *UE) hangUp(d *dialog) {
	reg, err := u.registered()
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(u.ctx, timerFactor*u.farm.cfg.T1)
	defer cancel()
	in, err := u.transact(ctx, reg.set, u.inDialog(reg, d, "BYE"), "bye")
	switch {
	case err != nil:
		u.problem("BYE of the called side: %v", err)
	case in.msg.Status != 200:
		u.problem("BYE of the called side: %s", strconv.Itoa(in.msg.Status))
	}
}
