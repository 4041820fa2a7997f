package core

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/control/ims"
)

// connParam marks in the core's own Via the connection the request came on, so that a stateless proxy finds it again.
const connParam = "x-conn"

// request routes a request: own Routes come off, then it goes to the next Route, to a service of the core, or to the
// registered contact.
func (c *Core) request(in *incoming) {
	m := in.msg
	if answered := c.retransmission(in); answered {
		return
	}
	if mf, err := strconv.Atoi(m.Get("Max-Forwards")); err == nil && mf <= 0 {
		c.answerTx(in, sipwire.Response(m, 483, sipwire.Token()))
		return
	}
	if m.Method == "REGISTER" {
		c.begin(in)
		c.register(in)
		return
	}
	for {
		routes := m.List("Route")
		if len(routes) == 0 || !c.isOwn(routes[0]) {
			break
		}
		m.Pop("Route")
	}
	if routes := m.List("Route"); len(routes) > 0 {
		a, err := sipwire.ParseAddr(routes[0])
		if err != nil {
			c.answerTx(in, sipwire.Response(m, 400, sipwire.Token()))
			return
		}
		c.forward(in, a.URI)
		return
	}
	if c.local(in) {
		return
	}
	c.terminate(in)
}

// isOwn reports whether a Route element names the core.
func (c *Core) isOwn(route string) bool {
	a, err := sipwire.ParseAddr(route)
	if err != nil {
		return false
	}
	p, _, err := c.resolve(a.URI)
	return err == nil && p == c.cfg.Addr
}

// isOrig reports whether a Route element is the Service-Route the core hands out.
func (c *Core) isOrig(route string) bool {
	a, err := sipwire.ParseAddr(route)
	if err != nil {
		return false
	}
	u, err := sipwire.ParseURI(a.URI)
	return err == nil && u.User == "orig" && c.isOwn(route)
}

// local serves what the core answers itself.
func (c *Core) local(in *incoming) bool {
	m := in.msg
	u, err := sipwire.ParseURI(m.URI)
	if err != nil {
		c.answerTx(in, sipwire.Response(m, 400, sipwire.Token()))
		return true
	}
	addr, isAddr := u.AddrPort()
	self := (isAddr && addr == c.cfg.Addr) || (u.User == "" && equalFold(u.Host, c.cfg.Domain))
	switch {
	case m.Method == "SUBSCRIBE" && eventPackage(m) == "reg" && (self || c.owner(m.URI) != nil):
		c.begin(in)
		c.subscribe(in)
	case !self:
		return false
	case m.Method == "OPTIONS":
		c.answerTx(in, sipwire.Response(m, 200, sipwire.Token()))
	case m.Method == "ACK":
	default:
		c.answerTx(in, sipwire.Response(m, 481, sipwire.Token()))
	}
	return true
}

// terminate is the terminating half: the request goes to the contact of the callee over its Path (RFC 3327 §5.5,
// TS 24.229 §5.4.3.3).
func (c *Core) terminate(in *incoming) {
	m := in.msg
	acc := c.owner(m.URI)
	var b *Binding
	if acc != nil {
		c.mu.Lock()
		b = acc.binding
		c.mu.Unlock()
	}
	if b == nil || time.Now().After(b.Expires) || sipwire.Key(m.URI) == sipwire.Key(acc.sub.TemporaryIMPU()) {
		if m.Method != "ACK" {
			c.answerTx(in, sipwire.Response(m, 404, sipwire.Token()))
		}
		return
	}
	called := m.URI
	if err := retarget(m, b); err != nil {
		c.answerTx(in, sipwire.Response(m, 500, sipwire.Token()))
		return
	}
	if m.Tag("To") == "" && m.Method != "ACK" && m.Method != "CANCEL" {
		m.Set("P-Called-Party-ID", "<"+called+">")
	}
	next, err := sipwire.ParseAddr(m.List("Route")[0])
	if err != nil {
		c.answerTx(in, sipwire.Response(m, 500, sipwire.Token()))
		return
	}
	c.forward(in, next.URI)
}

// retarget aims a request at a binding: Request-URI from the contact, Route from the Path.
func retarget(m *sipwire.Message, b *Binding) error {
	a, err := sipwire.ParseAddr(b.Contact)
	if err != nil {
		return err
	}
	if len(b.Path) == 0 {
		return fmt.Errorf("binding of %s has no Path", b.IMPI)
	}
	m.URI = a.URI
	for _, p := range b.Path {
		m.Add("Route", p)
	}
	return nil
}

// forward sends a request on as a stateless proxy (RFC 3261 §16.6 and §16.11): the branch depends on the request only,
// so retransmissions, CANCEL and the ACK to a non-2xx answer take the same one.
func (c *Core) forward(in *incoming, next string) {
	to, u, err := c.resolve(next)
	if err != nil {
		c.problem(in.seen, err.Error())
		c.answerTx(in, sipwire.Response(in.msg, 503, sipwire.Token()))
		return
	}
	m := in.msg.Clone()
	mf, err := strconv.Atoi(m.Get("Max-Forwards"))
	if err != nil {
		mf = 70
	}
	m.Set("Max-Forwards", strconv.Itoa(mf-1))
	if m.Tag("To") == "" && (m.Method == "INVITE" || m.Method == "SUBSCRIBE" || m.Method == "REFER") {
		m.Push("Record-Route", "<sip:"+c.cfg.Addr.String()+";lr>")
	}
	via := sipwire.Via{Transport: "UDP", Host: c.cfg.Addr.Addr().String(), Port: c.cfg.Addr.Port()}
	via.Params = via.Params.Set("branch", statelessBranch(in.msg))
	if in.conn != nil {
		via.Params = via.Params.Set(connParam, strconv.FormatUint(in.conn.id, 10))
	}
	m.Push("Via", via.String())
	b := m.Bytes()
	tr := c.transport(b, u)
	if tr == ims.TCP {
		via.Transport = "TCP"
		m.Headers[0].Value = via.String()
		b = m.Bytes()
	}
	c.sendTo(b, tr, to, func() {
		if m.Method != "ACK" {
			c.answerTx(in, sipwire.Response(in.msg, 503, sipwire.Token()))
		}
	})
}

func statelessBranch(m *sipwire.Message) string {
	v, _ := m.TopVia()
	seq, _, _ := m.CSeq()
	h := sha256.Sum256(fmt.Appendf(nil, "%s|%s|%d|%s|%s|%d", v.Branch(), v.Host, v.Port, m.Get("Call-ID"), m.Tag("From"), seq))
	return "z9hG4bK" + hex.EncodeToString(h[:10])
}

// response hands an answer to the core's own request or sends it on towards the next Via (RFC 3261 §16.11).
func (c *Core) response(in *incoming) {
	m := in.msg
	v, err := m.TopVia()
	if err != nil {
		return
	}
	c.mu.Lock()
	ch := c.clients[clientKey(v.Branch(), m.CSeqMethod())]
	c.mu.Unlock()
	if ch != nil {
		select {
		case ch <- m:
		default:
		}
		return
	}
	if a, ok := v.SentBy(); !ok || a != c.cfg.Addr {
		return
	}
	m.Pop("Via")
	next, err := m.TopVia()
	if err != nil {
		return // an answer to a request of our own that nobody waits for any more
	}
	id, _ := strconv.ParseUint(v.Params.Get(connParam), 10, 64)
	c.reply(m.Bytes(), next, id)
}

// reply sends an answer where a Via says: on the connection of the request while it is there.
func (c *Core) reply(b []byte, v sipwire.Via, id uint64) {
	to, ok := v.ReplyTo()
	if !ok {
		c.log.Warn("reply", "cause", "Via cannot be resolved", "via", v.String())
		return
	}
	if v.Transport != "TCP" {
		c.sendTo(b, ims.UDP, to, nil)
		return
	}
	c.mu.Lock()
	k := c.conns[id]
	c.mu.Unlock()
	if k != nil {
		c.push(k, outgoing{b: b})
		return
	}
	if a, ok := v.SentBy(); ok {
		to = netip.AddrPortFrom(to.Addr(), a.Port()) // a new connection goes to the listening port
	}
	c.sendTo(b, ims.TCP, to, nil)
}

// answer sends an answer of the core itself and keeps it for retransmissions.
func (c *Core) answer(in *incoming, r *sipwire.Message) {
	b := r.Bytes()
	v, err := r.TopVia()
	if err != nil {
		return
	}
	if r.Status >= 200 {
		c.mu.Lock()
		if tx := c.served[txKey(in.msg)]; tx != nil {
			tx.answer = b
		}
		c.mu.Unlock()
	}
	var id uint64
	if in.conn != nil {
		id = in.conn.id
	}
	c.reply(b, v, id)
}

// answerTx is begin and answer in one.
func (c *Core) answerTx(in *incoming, r *sipwire.Message) {
	c.begin(in)
	c.answer(in, r)
}

func txKey(m *sipwire.Message) string {
	v, _ := m.TopVia()
	method := m.Method
	if method == "ACK" {
		method = "INVITE"
	}
	return v.Branch() + "|" + v.Host + "|" + strconv.Itoa(int(v.Port)) + "|" + method
}

// begin opens a server transaction for a request that the core answers itself.
func (c *Core) begin(in *incoming) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.served[txKey(in.msg)] = &serverTx{until: now.Add(timerCount * c.cfg.T1)}
	if c.sinceSwep++; c.sinceSwep >= txSweep {
		c.sinceSwep = 0
		for k, tx := range c.served {
			if now.After(tx.until) {
				delete(c.served, k)
			}
		}
	}
}

// retransmission answers a request that was answered before, and swallows the ACK to such an answer.
func (c *Core) retransmission(in *incoming) bool {
	c.mu.Lock()
	tx := c.served[txKey(in.msg)]
	var b []byte
	if tx != nil && time.Now().Before(tx.until) {
		b = tx.answer
	} else {
		tx = nil
	}
	c.mu.Unlock()
	if tx == nil {
		return false
	}
	if in.msg.Method == "ACK" {
		return true
	}
	if b != nil {
		if v, err := in.msg.TopVia(); err == nil {
			var id uint64
			if in.conn != nil {
				id = in.conn.id
			}
			c.reply(b, v, id)
		}
	}
	return true
}
