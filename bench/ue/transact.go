package ue

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/control/ims"
)

// clientTx is a client transaction (RFC 3261 §17.1) inside an SA set.
type clientTx struct {
	u        *UE
	set      *saSet
	method   string
	branch   string
	via      sipwire.Via
	tr       ims.Transport
	to       netip.AddrPort
	b        []byte
	msg      *sipwire.Message // as sent
	answers  chan *inbound
	interval time.Duration
	again    *time.Timer
	until    *time.Timer
	early    bool // a provisional answer has arrived

	// Guarded by UE.mu.
	stream *stream
	resent bool   // on another connection, because the first one was lost
	ack    func() // sends the ACK again
	done   time.Time
}

func txKey(branch, method string) string { return branch + "|" + method }

// start sends a request over a set and opens its transaction. m has no Via yet; kind is for Tweak.
func (u *UE) start(ctx context.Context, set *saSet, m *sipwire.Message, kind string) (*clientTx, error) {
	tx := &clientTx{u: u, set: set, method: m.Method, branch: sipwire.Branch(), answers: make(chan *inbound, 64)}
	if err := tx.prepare(ctx, m); err != nil {
		return nil, err
	}
	return tx, tx.launch(kind)
}

// launch registers a prepared transaction and sends its request for the first time.
func (tx *clientTx) launch(kind string) error {
	u := tx.u
	if u.Tweak != nil {
		tx.b = u.Tweak(kind, tx.b)
	}
	u.mu.Lock()
	if u.closed {
		u.mu.Unlock()
		return ErrClosed
	}
	u.txs[txKey(tx.branch, tx.method)] = tx
	if tx.method != "INVITE" {
		u.stats.Requests++
	}
	u.sweep()
	u.mu.Unlock()
	tx.interval = u.farm.cfg.T1
	tx.again = time.NewTimer(tx.interval)
	tx.until = time.NewTimer(timerFactor * u.farm.cfg.T1)
	if tx.tr == ims.TCP {
		tx.again.Stop()
	}
	if err := tx.send(); err != nil {
		tx.end()
		return err
	}
	return nil
}

// sweep forgets transactions that were over long ago. The caller holds mu.
func (u *UE) sweep() {
	if u.starts++; u.starts%128 != 0 {
		return
	}
	old := time.Now().Add(-timerFactor * u.farm.cfg.T1)
	for k, tx := range u.txs {
		if !tx.done.IsZero() && tx.done.Before(old) {
			delete(u.txs, k)
		}
	}
	for k, tx := range u.served {
		if tx.at.Before(old) && tx.over {
			delete(u.served, k)
		}
	}
}

// prepare writes the Via and chooses transport and destination: the topmost Route, which must be the P-CSCF's protected
// server port (TS 24.229 §5.1.2A.1.1).
func (tx *clientTx) prepare(ctx context.Context, m *sipwire.Message) error {
	u := tx.u
	tx.to = netip.AddrPortFrom(u.farm.cfg.PCSCF.Addr(), tx.set.ports.PS)
	if routes := m.List("Route"); len(routes) > 0 {
		a, err := sipwire.ParseAddr(routes[0])
		if err != nil {
			return err
		}
		uri, err := sipwire.ParseURI(a.URI)
		if err != nil {
			return err
		}
		if to, ok := uri.AddrPort(); !ok || to != tx.to {
			return &ProtocolError{Problems: []string{fmt.Sprintf("first route is %s, want the P-CSCF at %s", a.URI, tx.to)}}
		}
	}
	tx.via = sipwire.Via{Transport: "UDP", Host: u.cfg.Addr.String(), Port: tx.set.ports.US}
	tx.via.Params = tx.via.Params.Set("branch", tx.branch)
	if u.cfg.Quirks.RportProtected {
		tx.via.Params = append(tx.via.Params, sipwire.Param{Name: "rport", Flag: true})
	}
	m.Push("Via", tx.via.String())
	tx.msg = m
	tx.b = m.Bytes()
	tx.tr = u.cfg.Transport
	if t := u.cfg.Quirks.SM7Transport; t != 0 {
		tx.tr = t
	}
	if t, ok := u.cfg.Quirks.Transports[m.Method]; ok {
		tx.tr = t
	}
	if len(tx.b) > sipwire.UDPLimit && !u.cfg.Quirks.LargeUDP {
		tx.tr = ims.TCP // RFC 3261 §18.1.1
	}
	if tx.tr != ims.TCP {
		return nil
	}
	tx.via.Transport = "TCP"
	m.Headers[0].Value = tx.via.String()
	if own := u.ownRoute(tx.set, ims.UDP); strings.HasPrefix(m.Get("Route"), own) {
		m.Set("Route", u.ownRoute(tx.set, ims.TCP)+strings.TrimPrefix(m.Get("Route"), own))
	}
	tx.b = m.Bytes()
	var err error
	tx.stream, err = u.ownStream(ctx, tx.set)
	return err
}

// ownRoute is the preloaded first Route: the P-CSCF at its protected server port (TS 24.229 §5.1.2A.1.1).
func (u *UE) ownRoute(set *saSet, tr ims.Transport) string {
	param := ""
	if tr == ims.TCP {
		param = ";transport=tcp"
	}
	return "<sip:" + netip.AddrPortFrom(u.farm.cfg.PCSCF.Addr(), set.ports.PS).String() + param + ";lr>"
}

// companion prepares CANCEL or the ACK to a non-2xx answer: same branch, transport and route as the INVITE (RFC 3261
// §9.1 and §17.1.1.3).
func (tx *clientTx) companion(m *sipwire.Message) *clientTx {
	c := &clientTx{
		u: tx.u, set: tx.set, method: m.Method, branch: tx.branch, via: tx.via, tr: tx.tr, stream: tx.stream, to: tx.to,
		msg: m, answers: make(chan *inbound, 64),
	}
	m.Push("Via", tx.via.String())
	c.b = m.Bytes()
	return c
}

// ownStream returns the UE's own connection of a set, port-uc to port-ps, and opens it if need be (TS 33.203 §7.1).
func (u *UE) ownStream(ctx context.Context, set *saSet) (*stream, error) {
	select {
	case set.dial <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-set.dial }()
	u.mu.Lock()
	for _, s := range set.streams {
		if s.mine && !s.isGone() {
			u.mu.Unlock()
			return s, nil
		}
	}
	dead := set.dead
	u.mu.Unlock()
	if dead {
		return nil, errors.New("open connection: the SA set is gone")
	}
	from := netip.AddrPortFrom(u.cfg.Addr, set.ports.UC)
	to := netip.AddrPortFrom(u.farm.cfg.PCSCF.Addr(), set.ports.PS)
	c, err := sipwire.DialTCP(ctx, u.farm.layer.ns(), from, to)
	if err != nil {
		return nil, err
	}
	return u.adopt(set, c, true), nil
}

func (tx *clientTx) send() error {
	if tx.b == nil {
		return nil // suppressed by Tweak
	}
	if tx.tr == ims.TCP {
		return tx.stream.write(tx.b)
	}
	_, err := tx.set.udp.WriteToUDPAddrPort(tx.b, tx.to)
	return err
}

// next waits for the next answer and sends the request again meanwhile (RFC 3261 §17.1.1 and §17.1.2). Over TCP it does
// so once, on a new connection, when the first one ends before there is an answer: what was on its way then is lost.
func (tx *clientTx) next(ctx context.Context) (*inbound, error) {
	u := tx.u
	var lost <-chan struct{}
	if tx.tr == ims.TCP && !tx.resent && (tx.method != "INVITE" || !tx.early) {
		lost = tx.stream.gone
	}
	for {
		select {
		case <-lost:
			lost = nil
			tx.again.Reset(u.farm.cfg.T1) // the answer may still come, on a connection of the P-CSCF
		case in := <-tx.answers:
			if !tx.early && in.msg.Status < 200 {
				tx.early = true
				if tx.method == "INVITE" {
					tx.again.Stop()
					tx.until.Stop() // Timer C is the proxies' business
				}
			}
			if len(in.problems) > 0 {
				return in, &ProtocolError{Problems: in.problems}
			}
			return in, nil
		case <-tx.again.C:
			if tx.tr == ims.TCP {
				if err := tx.reconnect(ctx); err != nil {
					return nil, fmt.Errorf("%s: %w", tx.method, err)
				}
				continue
			}
			_ = tx.send() // a full socket buffer is a lost packet
			if tx.method != "INVITE" {
				u.mu.Lock()
				u.stats.Retransmitted++
				u.mu.Unlock()
			}
			tx.interval *= 2
			if tx.method != "INVITE" {
				tx.interval = min(tx.interval, t2Factor*u.farm.cfg.T1)
				if tx.early {
					tx.interval = t2Factor * u.farm.cfg.T1
				}
			}
			tx.again.Reset(tx.interval)
		case <-tx.until.C:
			return nil, fmt.Errorf("%s: %w", tx.method, ErrTimeout)
		case <-u.ctx.Done():
			return nil, ErrClosed
		case <-ctx.Done():
			return nil, fmt.Errorf("%s: no answer: %w", tx.method, context.Cause(ctx))
		}
	}
}

// reconnect sends a request again over a new connection.
func (tx *clientTx) reconnect(ctx context.Context) error {
	s, err := tx.u.ownStream(ctx, tx.set)
	if err != nil {
		return err
	}
	tx.u.mu.Lock()
	tx.stream, tx.resent = s, true
	if tx.method != "INVITE" {
		tx.u.stats.Retransmitted++
	}
	tx.u.mu.Unlock()
	return tx.send()
}

// end closes the transaction; with keepACK its ACK is repeated for late answers.
func (tx *clientTx) end() {
	tx.again.Stop()
	tx.until.Stop()
	tx.u.mu.Lock()
	if tx.ack == nil {
		delete(tx.u.txs, txKey(tx.branch, tx.method))
	} else {
		tx.done = time.Now()
	}
	tx.u.mu.Unlock()
}

// transact sends a request other than INVITE over a set and waits for the final answer.
func (u *UE) transact(ctx context.Context, set *saSet, m *sipwire.Message, kind string) (*inbound, error) {
	tx, err := u.start(ctx, set, m, kind)
	if err != nil {
		return nil, err
	}
	defer tx.end()
	for {
		in, err := tx.next(ctx)
		if err != nil || in.msg.Status >= 200 {
			return in, err
		}
	}
}

// response hands an answer to its transaction.
func (u *UE) response(in *inbound) {
	v, err := in.msg.TopVia()
	if err != nil {
		u.problem("answer: %v", err)
		return
	}
	u.mu.Lock()
	tx := u.txs[txKey(v.Branch(), in.msg.CSeqMethod())]
	if in.msg.Status >= 200 && in.msg.CSeqMethod() != "INVITE" {
		u.stats.Finals++
	}
	var again func()
	if tx != nil && in.msg.Status >= 200 {
		again = tx.ack
	}
	u.mu.Unlock()
	if tx == nil {
		return // late
	}
	in.problems = u.checkAnswer(in, tx)
	for _, p := range in.problems {
		u.problem("%d to %s: %s", in.msg.Status, tx.method, p)
	}
	if again != nil {
		again()
		return
	}
	select {
	case tx.answers <- in:
	default:
	}
}

// inner lists headers that must not leave the trust domain towards a UE (TS 24.229 §5.2.2.2, §5.2.6.4).
var inner = []string{
	"P-Charging-Vector", "P-Charging-Function-Addresses", "P-Profile-Key", "P-Served-User", "P-User-Database",
	"P-Visited-Network-ID",
}

// checkCommon checks what holds for requests and answers alike.
func (u *UE) checkCommon(in *inbound) []string {
	var f []string
	for _, h := range inner {
		if in.msg.Has(h) {
			f = append(f, h+" was sent to the UE")
		}
	}
	for _, h := range []string{"Security-Client", "Security-Verify"} {
		if in.msg.Has(h) {
			f = append(f, h+" came back from the network")
		}
	}
	if in.tr == ims.UDP && in.remote.Port() != in.set.ports.PC {
		f = append(f, fmt.Sprintf("UDP from port %d, want port-pc %d", in.remote.Port(), in.set.ports.PC))
	}
	return f
}

// checkAnswer checks an answer against the request it belongs to.
func (u *UE) checkAnswer(in *inbound, tx *clientTx) []string {
	f := u.checkCommon(in)
	m := in.msg
	f = append(f, checkKeys(m)...)
	vias := m.List("Via")
	if len(vias) != 1 {
		f = append(f, fmt.Sprintf("%d Via in an answer to the UE", len(vias)))
	}
	if v, err := m.TopVia(); err == nil && (v.Host != tx.via.Host || v.Port != tx.via.Port || v.Transport != tx.via.Transport) {
		f = append(f, fmt.Sprintf("Via came back as %s", v))
	}
	u.mu.Lock()
	stream, resent := tx.stream, tx.resent
	u.mu.Unlock()
	// TS 33.203 §7.1: UDP to port-us from port-pc, TCP on the connection of the request.
	switch {
	case tx.tr == ims.TCP && in.tr == ims.UDP && !stream.isGone():
		f = append(f, "answer by UDP to a request by TCP")
	case tx.tr == ims.TCP && in.tr == ims.TCP && in.stream != stream && !stream.isGone() && !resent:
		f = append(f, "answer on another connection than the request's")
	case tx.tr == ims.UDP && in.tr == ims.TCP:
		f = append(f, "answer by TCP to a request by UDP")
	}
	if tx.method == "REGISTER" && in.set != tx.set {
		f = append(f, fmt.Sprintf("answer by set %d to a REGISTER by set %d", in.set.gen, tx.set.gen))
	}
	if (tx.method == "INVITE" || tx.method == "SUBSCRIBE") && tx.msg.Tag("To") == "" && m.Status > 100 && m.Status < 300 {
		rr := m.List("Record-Route")
		if len(rr) == 0 {
			f = append(f, "no Record-Route")
		} else {
			f = append(f, u.checkOwnRoute("Record-Route", rr[len(rr)-1], in.set)...)
		}
	}
	return f
}

// checkKeys: CK and IK never leave the network (TS 33.203 §6.1.1).
func checkKeys(m *sipwire.Message) []string {
	var f []string
	for _, row := range m.All("WWW-Authenticate") {
		_, p, err := sipwire.ParseAuth(row)
		if err != nil {
			f = append(f, err.Error())
		}
		if p.Count("ck") > 0 || p.Count("ik") > 0 {
			f = append(f, "ck or ik was sent to the UE")
		}
	}
	return f
}

// checkOwnRoute: the P-CSCF's entry towards the UE carries port-ps (TS 24.229 §5.2.6.4, TS 24.228).
func (u *UE) checkOwnRoute(header, elem string, set *saSet) []string {
	want := netip.AddrPortFrom(u.farm.cfg.PCSCF.Addr(), set.ports.PS)
	a, err := sipwire.ParseAddr(elem)
	if err != nil {
		return []string{err.Error()}
	}
	uri, err := sipwire.ParseURI(a.URI)
	if err != nil {
		return []string{err.Error()}
	}
	var f []string
	if got, ok := uri.AddrPort(); !ok || got != want {
		f = append(f, fmt.Sprintf("%s of the P-CSCF is %s, want %s", header, a.URI, want))
	}
	if _, ok := uri.Params.Lookup("lr"); !ok {
		f = append(f, fmt.Sprintf("%s %s without lr", header, a.URI))
	}
	return f
}

// exchangeClear sends a request from outside every SA and waits for the final answer. Only REGISTER is sent so.
func (u *UE) exchangeClear(ctx context.Context, m *sipwire.Message, c *clearPort, kind string) (*sipwire.Message, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, timerFactor*u.farm.cfg.T1, ErrTimeout)
	defer cancel()
	stop := context.AfterFunc(u.ctx, cancel)
	defer stop()
	branch := sipwire.Branch()
	via := sipwire.Via{Transport: c.tr.Via(), Host: u.cfg.Addr.String(), Port: c.local.Port()}
	via.Params = via.Params.Set("branch", branch)
	if c.tr == ims.UDP {
		via.Params = append(via.Params, sipwire.Param{Name: "rport", Flag: true})
	}
	m.Push("Via", via.String())
	b := m.Bytes()
	if u.Tweak != nil {
		b = u.Tweak(kind, b)
	}
	got, err := c.exchange(ctx, u, b, branch)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		if u.ctx.Err() != nil {
			err = ErrClosed
		}
		return nil, fmt.Errorf("%s in clear: no answer: %w", m.Method, err)
	}
	var f []string
	f = append(f, checkKeys(got)...)
	for _, h := range inner {
		if got.Has(h) {
			f = append(f, h+" was sent to the UE")
		}
	}
	if n := len(got.List("Via")); n != 1 {
		f = append(f, fmt.Sprintf("%d Via in an answer to the UE", n))
	}
	if v, err := got.TopVia(); err == nil && c.tr == ims.UDP {
		// RFC 3581 §4: the UE asked for both.
		if v.Params.Get("rport") != fmt.Sprint(c.local.Port()) || v.Params.Get("received") != u.cfg.Addr.String() {
			f = append(f, fmt.Sprintf("rport and received of the Via are not filled in: %s", v))
		}
	}
	for _, p := range f {
		u.problem("%d to %s in clear: %s", got.Status, m.Method, p)
	}
	if len(f) > 0 {
		return got, &ProtocolError{Problems: f}
	}
	return got, nil
}

// clearPort is an unprotected socket or connection.
type clearPort struct {
	tr    ims.Transport
	local netip.AddrPort
	udp   *net.UDPConn
	tcp   *net.TCPConn
	r     *bufio.Reader
}

// exchange sends b and reads until the final answer with the branch arrives. Over UDP it sends again.
func (c *clearPort) exchange(ctx context.Context, u *UE, b []byte, branch string) (*sipwire.Message, error) {
	match := func(raw []byte) *sipwire.Message {
		m, err := sipwire.Parse(raw)
		if err != nil {
			u.problem("in clear: %v", err)
			return nil
		}
		if m.IsRequest() {
			u.problem("%s arrived in clear", m.Method)
			return nil
		}
		if v, err := m.TopVia(); err != nil || v.Branch() != branch || m.Status < 200 {
			return nil
		}
		return m
	}
	if c.tr == ims.TCP {
		stop := context.AfterFunc(ctx, func() { _ = c.tcp.SetDeadline(time.Unix(1, 0)) })
		defer stop()
		if b != nil {
			if _, err := c.tcp.Write(b); err != nil {
				return nil, err
			}
		}
		for {
			raw, ping, pong, err := sipwire.ReadMessage(c.r)
			if err != nil {
				return nil, err
			}
			if ping || pong {
				continue
			}
			if m := match(raw); m != nil {
				return m, nil
			}
		}
	}
	interval := u.farm.cfg.T1
	for {
		if b != nil {
			if _, err := c.udp.WriteToUDPAddrPort(b, u.farm.cfg.PCSCF); err != nil {
				return nil, err
			}
		}
		if err := c.udp.SetReadDeadline(time.Now().Add(interval)); err != nil {
			return nil, err
		}
		stop := context.AfterFunc(ctx, func() { _ = c.udp.SetReadDeadline(time.Unix(1, 0)) })
		m, err := c.readUntil(u, match)
		stop()
		if m != nil {
			return m, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err != nil {
			return nil, err
		}
		interval = min(2*interval, t2Factor*u.farm.cfg.T1)
	}
}

// readUntil reads datagrams until one matches or the deadline passes, which gives nil and no error.
func (c *clearPort) readUntil(u *UE, match func([]byte) *sipwire.Message) (*sipwire.Message, error) {
	for {
		raw, from, err := sipwire.ReadUDP(c.udp)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil, nil
		case err != nil && sipwire.Temporary(err):
			continue
		case err != nil:
			return nil, err
		}
		if from != u.farm.cfg.PCSCF {
			u.problem("clear UDP from %s, want %s", from, u.farm.cfg.PCSCF)
			continue
		}
		if strings.Trim(string(raw), "\r\n") == "" {
			continue
		}
		if m := match(raw); m != nil {
			return m, nil
		}
	}
}

// openClear opens the socket for a clear REGISTER of a size.
func (u *UE) openClear(ctx context.Context, tr ims.Transport) (*clearPort, error) {
	from := netip.AddrPortFrom(u.cfg.Addr, u.cfg.ClearPort)
	if tr == ims.TCP {
		t, err := sipwire.DialTCP(ctx, u.farm.cfg.NS, from, u.farm.cfg.PCSCF)
		if err != nil {
			return nil, err
		}
		return &clearPort{tr: tr, local: sipwire.LocalAddrPort(t.LocalAddr()), tcp: t, r: bufio.NewReader(t)}, nil
	}
	c, err := sipwire.ListenUDP(u.farm.cfg.NS, from)
	if err != nil {
		return nil, err
	}
	return &clearPort{tr: tr, local: sipwire.LocalAddrPort(c.LocalAddr()), udp: c}, nil
}

func (c *clearPort) close() {
	if c.tr == ims.TCP {
		_ = c.tcp.Close()
	} else {
		_ = c.udp.Close()
	}
}

// suits reports whether the port is of a transport.
func (c *clearPort) suits(tr ims.Transport) bool { return c != nil && c.tr == tr }

func reversed(list []string) []string {
	out := slices.Clone(list)
	slices.Reverse(out)
	return out
}
