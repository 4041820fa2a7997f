package ue

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gmgate/gmgate/bench/internal/digestaka"
	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/control/ims"
)

// maxRounds bounds how often one registration operation is challenged.
const maxRounds = 4

// accessNetwork is what the phone says about its cell (TS 24.229 §7.2A.4).
const accessNetwork = "3GPP-E-UTRAN-FDD;utran-cell-id-3gpp=0010100010019B01"

// Result is a successful registration.
type Result struct {
	Challenged    bool // a new SA set was made
	Suite         ims.Suite
	SPIs          ims.SPIs
	Ports         ims.Ports
	Expires       time.Duration
	ServiceRoute  []string // URIs
	AssociatedURI []string // URIs, the default public identity first
	Resyncs       int      // sequence number failures on the way
	Timings       Timings
	Set           SetInfo
}

// Timings is how long a registration took.
type Timings struct {
	Challenge    time.Duration // first REGISTER to the last 401 (SM1 to SM6)
	Authenticate time.Duration // REGISTER with the response to its answer (SM7 to SM12); zero without challenge
	Total        time.Duration
}

// credentials is what goes into Authorization.
type credentials struct {
	realm, nonce, algorithm, qop, opaque string
	nc                                   uint32
	vector                               digestaka.Vector
	auts                                 []byte
	empty                                bool // response="" although there is a nonce: the challenge was not authentic
}

// attempt is one registration operation.
type attempt struct {
	callID, tag string
	cseq        uint32
	expires     time.Duration
	kind        string // for Tweak
	via         *saSet // existing set; nil for an initial registration
	clear       *clearPort
	creds       credentials
	offer       *offer
	contact     string
}

// lockOperation waits until no other registration operation of the UE runs.
func (u *UE) lockOperation(ctx context.Context) error {
	select {
	case u.oper <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if u.ctx.Err() != nil {
		<-u.oper
		return ErrClosed
	}
	return nil
}

// Register registers from scratch, in clear at first (TS 33.203 §7.2, TS 24.229 §5.1.1.2). A registration that was still
// there is forgotten without a word, as when a phone reboots.
func (u *UE) Register(ctx context.Context) (Result, error) {
	if err := u.lockOperation(ctx); err != nil {
		return Result{}, fmt.Errorf("register %s: %w", u.cfg.Identity.IMPI, err)
	}
	defer func() { <-u.oper }()
	u.dropAll()
	res, err := u.register(ctx)
	if err != nil {
		u.dropAll()
		return res, fmt.Errorf("register %s: %w", u.cfg.Identity.IMPI, err)
	}
	return res, nil
}

func (u *UE) register(ctx context.Context) (Result, error) {
	p, err := u.listen()
	if err != nil {
		return Result{}, err
	}
	u.mu.Lock()
	if u.closed {
		u.mu.Unlock()
		p.close()
		return Result{}, ErrClosed
	}
	u.server = p
	u.mu.Unlock()
	u.serve(p)
	r := &attempt{
		callID: sipwire.Token() + "@" + sipwire.Host(u.cfg.Addr), tag: sipwire.Token(), expires: u.cfg.Expires, kind: "register",
		creds: credentials{realm: u.cfg.Identity.Domain},
	}
	return u.authenticate(ctx, r)
}

// Reregister refreshes the registration over the current set, offering a new one (TS 33.203 §7.4, TS 24.229
// §5.1.1.4.2). Without a challenge the set stays; with one the old set keeps receiving for OldSetLinger.
func (u *UE) Reregister(ctx context.Context) (Result, error) {
	return u.again(ctx, "reregister", u.cfg.Expires)
}

// Deregister ends the registration over the current set (TS 24.229 §5.1.1.6). The sets keep receiving for
// OldSetLinger, so that the last NOTIFY arrives.
func (u *UE) Deregister(ctx context.Context) error {
	_, err := u.again(ctx, "deregister", 0)
	return err
}

func (u *UE) again(ctx context.Context, kind string, expires time.Duration) (Result, error) {
	if err := u.lockOperation(ctx); err != nil {
		return Result{}, fmt.Errorf("%s %s: %w", kind, u.cfg.Identity.IMPI, err)
	}
	defer func() { <-u.oper }()
	u.mu.Lock()
	reg := u.reg
	u.mu.Unlock()
	if reg == nil {
		return Result{}, fmt.Errorf("%s %s: %w", kind, u.cfg.Identity.IMPI, ErrNotRegistered)
	}
	r := &attempt{
		callID: reg.callID, tag: reg.tag, cseq: reg.cseq, expires: expires, kind: kind, via: reg.set,
		creds: reg.authorization, contact: reg.contact,
	}
	res, err := u.authenticate(ctx, r)
	if err != nil {
		u.mu.Lock()
		if u.reg != nil { // the next attempt must not repeat a CSeq (RFC 3261 §10.2)
			next := *u.reg
			next.cseq = r.cseq
			u.reg = &next
		}
		u.mu.Unlock()
		return res, fmt.Errorf("%s %s: %w", kind, u.cfg.Identity.IMPI, err)
	}
	return res, nil
}

// answer is the final answer to a REGISTER and the set it came by.
type answer struct {
	msg *sipwire.Message
	set *saSet // nil in clear
}

// authenticate runs SM1 to SM12 (TS 33.203 §7.2).
func (u *UE) authenticate(ctx context.Context, r *attempt) (Result, error) {
	defer func() {
		r.offer.release()
		if r.clear != nil {
			r.clear.close()
		}
	}()
	var res Result
	var temp *saSet
	keep := false
	defer func() {
		if temp != nil && !keep {
			u.dropSet(temp)
		}
	}()
	begin := time.Now()
	a, err := u.offerAndSend(ctx, r)
	for round := 0; ; round++ {
		if err != nil {
			return res, err
		}
		switch {
		case a.msg.Status == 200:
			if a.set == nil {
				return res, &ProtocolError{Problems: []string{"a REGISTER in clear was accepted"}}
			}
			keep = true
			res.Timings.Total = time.Since(begin)
			return u.accepted(r, a, res)
		case a.msg.Status != 401 || round == maxRounds:
			return res, &StatusError{Status: a.msg.Status, Reason: a.msg.Reason, Protected: a.set != nil, msg: a.msg}
		}
		res.Timings.Challenge = time.Since(begin)
		if temp != nil { // challenged again: that set is useless (TS 33.203 §7.3.1)
			u.replace(temp, r.offer)
			temp = nil
		}
		if err := r.creds.take(a.msg); err != nil {
			return res, err
		}
		ok, err2 := u.usim(&r.creds)
		if err2 != nil {
			return res, err2
		}
		if !ok {
			// TS 33.203 §7.3.1.2 and §7.3.1.3: a new REGISTER with a new offer, over an existing set or in clear.
			if r.creds.auts != nil {
				res.Resyncs++
			}
			a, err = u.offerAndSend(ctx, r)
			continue
		}
		u.mu.Lock()
		busy := inUse{sets: slices.Clone(u.sets)}
		u.mu.Unlock()
		if r.via != nil {
			busy.server = r.via.ports.PS
		}
		rows := a.msg.All("Security-Server")
		ag, err2 := readServer(rows, r.offer, u.cfg.Offers, busy)
		if err2 != nil {
			u.problem("%v", err2)
			return res, err2
		}
		if temp, err = u.newSet(r.offer, ag, r.creds.vector, securityVerify(rows, u.cfg.Quirks)); err != nil {
			return res, err
		}
		res.Challenged = true
		sent := time.Now()
		a, err = u.overSet(ctx, r, temp, "register-auth", temp.verify)
		res.Timings.Authenticate = time.Since(sent)
	}
}

// offerAndSend sends a REGISTER with a fresh offer: SM1, or the REGISTER after a challenge the USIM refused.
func (u *UE) offerAndSend(ctx context.Context, r *attempt) (answer, error) {
	o, err := u.newOffer()
	if err != nil {
		return answer{}, err
	}
	r.offer.release()
	r.offer = o
	if r.via != nil {
		// TS 24.229 §5.1.1.4.2: Security-Verify of the last successful authentication.
		return u.overSet(ctx, r, r.via, r.kind, r.via.verify)
	}
	port := u.cfg.ClearPort
	if port == 0 {
		port = 5060
	}
	tr := u.cfg.Transport
	m := u.buildRegister(r, u.contact(port), nil, false)
	if len(m.Bytes())+viaRoom > sipwire.UDPLimit && !u.cfg.Quirks.LargeUDP {
		tr = ims.TCP // RFC 3261 §18.1.1
	}
	if !r.clear.suits(tr) {
		if r.clear != nil {
			r.clear.close()
		}
		if r.clear, err = u.openClear(ctx, tr); err != nil {
			return answer{}, err
		}
	}
	r.contact = u.contact(r.clear.local.Port())
	if u.cfg.Quirks.RegisterStyle != nil {
		r.cseq--
		m = u.buildRegister(r, r.contact, nil, false)
		if r.contact, err = contactOf(m); err != nil {
			return answer{}, err
		}
	} else {
		m.Set("Contact", contactValue(r.contact, u.instance()))
	}
	got, err := u.exchangeClear(ctx, m, r.clear, r.kind)
	return answer{msg: got}, err
}

// viaRoom is what the Via of a REGISTER takes at most.
const viaRoom = 120

func (u *UE) overSet(ctx context.Context, r *attempt, set *saSet, kind string, verify []string) (answer, error) {
	port := set.ports.US
	if u.cfg.Quirks.ContactPort != 0 {
		port = u.cfg.Quirks.ContactPort
	}
	r.contact = u.contact(port)
	m := u.buildRegister(r, r.contact, verify, true)
	var err error
	if r.contact, err = contactOf(m); err != nil {
		return answer{}, err
	}
	in, err := u.transact(ctx, set, m, kind)
	if err != nil {
		return answer{}, err
	}
	return answer{msg: in.msg, set: in.set}, nil
}

func (u *UE) contact(port uint16) string {
	user, _, _ := strings.Cut(u.cfg.Identity.IMPI, "@")
	return "sip:" + user + "@" + sipwire.Host(u.cfg.Addr) + ":" + strconv.Itoa(int(port))
}

// contactOf returns the URI in the Contact of a REGISTER.
func contactOf(m *sipwire.Message) (string, error) {
	a, err := sipwire.ParseAddr(m.Get("Contact"))
	if err != nil {
		return "", fmt.Errorf("read own Contact: %w", err)
	}
	return a.URI, nil
}

// instance is the phone's IMEI as a URN, made from the digits of the IMPI.
func (u *UE) instance() string {
	user, _, _ := strings.Cut(u.cfg.Identity.IMPI, "@")
	digits := make([]byte, 0, 14)
	for i := 0; i < len(user) && len(digits) < 14; i++ {
		if user[i] >= '0' && user[i] <= '9' {
			digits = append(digits, user[i])
		}
	}
	for len(digits) < 14 {
		digits = append(digits, '0')
	}
	return "urn:gsma:imei:" + string(digits[:8]) + "-" + string(digits[8:]) + "-0"
}

func contactValue(uri, instance string) string {
	return "<" + uri + `>;+sip.instance="<` + instance + `>";+g.3gpp.smsip;` + mmtel
}

// mmtel is the feature tag of voice over IMS.
const mmtel = `+g.3gpp.icsi-ref="urn%3Aurn-7%3A3gpp-service.ims.icsi.mmtel"`

// buildRegister prints a REGISTER without Via (TS 24.229 §5.1.1.2.2).
func (u *UE) buildRegister(r *attempt, contact string, verify []string, protected bool) *sipwire.Message {
	q := u.cfg.Quirks
	r.cseq++
	id := u.cfg.Identity
	if q.RegisterStyle != nil {
		return u.styledRegister(r, contact, verify, protected)
	}
	m := &sipwire.Message{Method: "REGISTER", URI: "sip:" + id.Domain}
	m.Add("Max-Forwards", "70")
	m.Add("From", "<"+id.IMPU+">;tag="+r.tag)
	m.Add("To", "<"+id.IMPU+">")
	m.Add("Call-ID", r.callID)
	m.Add("CSeq", strconv.FormatUint(uint64(r.cseq), 10)+" REGISTER")
	m.Add("Contact", contactValue(contact, u.instance()))
	m.Add("Expires", strconv.Itoa(int(r.expires/time.Second)))
	m.Add("Supported", "path, gruu")
	if !q.NoSecAgree {
		m.Add("Require", "sec-agree")
		m.Add("Proxy-Require", "sec-agree")
	}
	if !q.NoSecurityClient {
		for _, row := range r.offer.rows {
			m.Add("Security-Client", row)
		}
	}
	for _, row := range verify {
		m.Add("Security-Verify", row)
	}
	m.Add("Authorization", r.creds.authorization(id, q))
	if protected {
		m.Add("P-Access-Network-Info", accessNetwork)
	}
	for _, h := range q.ExtraHeaders {
		m.Add(h[0], h[1])
	}
	return m
}

// styledRegister prints a REGISTER in the layout of another make of phone.
func (u *UE) styledRegister(r *attempt, contact string, verify []string, protected bool) *sipwire.Message {
	v := layoutValues{
		id: u.cfg.Identity, offer: r.offer, callID: r.callID, tag: r.tag, addr: sipwire.Host(u.cfg.Addr), cseq: r.cseq,
		expires: r.expires, nonce: r.creds.nonce,
	}
	if uri, err := sipwire.ParseURI(contact); err == nil {
		v.contactPort = uri.Port
	}
	// What follows the response is the same for every phone: its values are given by the challenge.
	_, rest, _ := strings.Cut(r.creds.authorization(v.id, u.cfg.Quirks), `response="`)
	v.response, v.extra, _ = strings.Cut(rest, `"`)
	return u.cfg.Quirks.RegisterStyle.dress(&v, verify, protected)
}

// take reads the AKA challenge of a 401 (RFC 3310 §3.2).
func (c *credentials) take(m *sipwire.Message) error {
	for _, row := range m.All("WWW-Authenticate") {
		scheme, p, err := sipwire.ParseAuth(row)
		if err != nil {
			return fmt.Errorf("read WWW-Authenticate: %w", err)
		}
		if !strings.EqualFold(scheme, "Digest") || !strings.HasPrefix(strings.ToLower(p.Get("algorithm")), "akav") {
			continue
		}
		*c = credentials{
			realm: p.Get("realm"), nonce: p.Get("nonce"), algorithm: p.Get("algorithm"), qop: p.Get("qop"), opaque: p.Get("opaque"),
		}
		return nil
	}
	return errors.New("401 without AKA challenge")
}

// usim asks the USIM about the challenge in c. false means that there is none to answer: a synchronisation failure, which
// leaves AUTS in c, or a challenge that is not authentic (TS 33.102 §6.3.3).
func (u *UE) usim(c *credentials) (bool, error) {
	rnd, autn, err := digestaka.ParseNonce(c.nonce)
	if err != nil {
		return false, fmt.Errorf("read challenge: %w", err)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	v, sqn, auts, err := u.card.Answer(rnd, autn, u.sqn)
	switch {
	case errors.Is(err, digestaka.ErrSync):
		c.auts = auts
		return false, nil
	case errors.Is(err, digestaka.ErrMAC):
		c.empty = true
		return false, nil
	case err != nil:
		return false, err
	}
	u.sqn = sqn
	c.vector = v
	return true, nil
}

// SetSQN sets the USIM's sequence number. Above the network's it provokes a synchronisation failure.
func (u *UE) SetSQN(sqn uint64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.sqn = sqn & digestaka.SQNMask
}

// authorization prints the credentials of a REGISTER and counts the nonce's use (RFC 3310 §3.3 and §3.4).
func (c *credentials) authorization(id Identity, q Quirks) string {
	uri := "sip:" + id.Domain
	d := digestaka.Digest{
		Algorithm: c.algorithm, Username: id.IMPI, Realm: c.realm, URI: uri, Method: "REGISTER", Nonce: c.nonce,
		QOP: chooseQOP(c.qop, q.AuthInt),
	}
	response := ""
	if c.nonce != "" && !c.empty {
		c.nc++
		if d.QOP != "" {
			d.NC, d.CNonce = fmt.Sprintf("%08x", c.nc), sipwire.Token()
		}
		var v digestaka.Vector // the empty password of the AUTS case
		if c.auts == nil {
			v = c.vector
		}
		var err error
		if response, err = d.Response(v); err != nil {
			response = "" // an unknown algorithm: the network will refuse
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, `Digest username="%s",realm="%s",uri="%s",nonce="%s",response="%s"`, id.IMPI, c.realm, uri, c.nonce, response)
	if c.nonce != "" {
		b.WriteString(",algorithm=" + c.algorithm)
	}
	if d.NC != "" {
		fmt.Fprintf(&b, `,qop=%s,nc=%s,cnonce="%s"`, d.QOP, d.NC, d.CNonce)
	}
	if c.opaque != "" {
		fmt.Fprintf(&b, `,opaque="%s"`, c.opaque)
	}
	if c.auts != nil {
		fmt.Fprintf(&b, `,auts="%s"`, base64.StdEncoding.EncodeToString(c.auts))
	}
	if q.IntegrityProtected != "" {
		fmt.Fprintf(&b, `,integrity-protected="%s"`, q.IntegrityProtected)
	}
	return b.String()
}

// chooseQOP picks one of the offered values.
func chooseQOP(offered string, preferInt bool) string {
	list := sipwire.SplitList(offered)
	switch {
	case preferInt && slices.Contains(list, "auth-int"):
		return "auth-int"
	case slices.Contains(list, "auth") || len(list) == 0:
		if len(list) == 0 {
			return ""
		}
		return "auth"
	}
	return list[0]
}

// accepted takes the 200 (TS 24.229 §5.1.1.2.1, §5.1.1.4.1).
func (u *UE) accepted(r *attempt, a answer, res Result) (Result, error) {
	set := a.set
	res.Suite, res.SPIs, res.Ports = set.suite, set.spis, set.ports
	reg := &registration{
		callID: r.callID, tag: r.tag, cseq: r.cseq, impu: u.cfg.Identity.IMPU, contact: r.contact, set: set, authorization: r.creds,
	}
	if r.expires == 0 {
		u.mu.Lock()
		u.reg = nil
		server := u.server
		u.mu.Unlock()
		u.after(u.farm.cfg.OldSetLinger, func() {
			u.mu.Lock()
			same := u.server == server
			u.mu.Unlock()
			if same {
				u.dropAll()
			}
		})
		return res, nil
	}
	var f []string
	if res.Expires, f = ownExpiry(a.msg, r.contact); res.Expires > r.expires {
		f = append(f, fmt.Sprintf("%s granted, %s asked for", res.Expires, r.expires))
	}
	var err error
	if res.ServiceRoute, err = uris(a.msg.List("Service-Route")); err != nil || len(res.ServiceRoute) == 0 {
		f = append(f, fmt.Sprintf("Service-Route in the 200: %q", a.msg.All("Service-Route")))
	}
	if res.AssociatedURI, err = uris(a.msg.List("P-Associated-URI")); err != nil || len(res.AssociatedURI) == 0 {
		f = append(f, fmt.Sprintf("P-Associated-URI in the 200: %q", a.msg.All("P-Associated-URI")))
	}
	reg.serviceRoute, reg.associated, reg.expires = a.msg.List("Service-Route"), res.AssociatedURI, res.Expires
	u.mu.Lock()
	previous := u.reg
	u.reg = reg
	u.mu.Unlock()
	if previous != nil && previous.set != set {
		// TS 33.203 §7.4: the set before stays for a while, whatever is older goes at once.
		old := previous.set
		u.dropBut(old, set)
		u.after(u.farm.cfg.OldSetLinger, func() { u.dropSet(old) })
	}
	for _, s := range u.Sets() {
		if s.Generation == set.gen {
			res.Set = s
		}
	}
	for _, p := range f {
		u.problem("200 to REGISTER: %s", p)
	}
	if len(f) > 0 {
		return res, &ProtocolError{Problems: f}
	}
	return res, nil
}

// ownExpiry finds the UE's contact in a 200 and what was granted to it (RFC 3261 §10.2.4).
func ownExpiry(m *sipwire.Message, contact string) (time.Duration, []string) {
	text := m.Get("Expires")
	found := false
	for _, e := range m.List("Contact") {
		a, err := sipwire.ParseAddr(e)
		if err == nil && a.URI == contact {
			found = true
			if v, ok := a.Params.Lookup("expires"); ok {
				text = v
			}
		}
	}
	if !found {
		return 0, []string{fmt.Sprintf("Contact %s is not in %q", contact, m.All("Contact"))}
	}
	n, err := strconv.ParseUint(text, 10, 31)
	if err != nil || n == 0 {
		return 0, []string{fmt.Sprintf("expires %q", text)}
	}
	return time.Duration(n) * time.Second, nil
}

func uris(elems []string) ([]string, error) {
	var out []string
	for _, e := range elems {
		a, err := sipwire.ParseAddr(e)
		if err != nil {
			return nil, err
		}
		out = append(out, a.URI)
	}
	return out, nil
}
