package core

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gmgate/gmgate/bench/internal/digestaka"
	"github.com/gmgate/gmgate/bench/internal/sipwire"
)

// Subscriber is a subscription in the core's HSS.
type Subscriber struct {
	IMPI, Domain string
	IMPU         []string // the first is the default one; sip and tel URIs
	K, OPc       [16]byte
	AMF          [2]byte
	SQN          uint64 // the sequence number used last; challenges start above it
	Password     string // registers with SIP digest instead of AKA (TS 33.203 Annex N)
}

// TemporaryIMPU returns the barred public identity that is derived from the private one (TS 23.003 §13.4B).
func (s Subscriber) TemporaryIMPU() string { return "sip:" + s.IMPI }

// Subscribers returns n subscribers of a domain. Identities and secrets depend on the index only.
func Subscribers(n int, domain string) []Subscriber {
	out := make([]Subscriber, n)
	for i := range out {
		k := sha256.Sum256(fmt.Appendf(nil, "test subscriber %d K", i+1))
		opc := sha256.Sum256(fmt.Appendf(nil, "test subscriber %d OPc", i+1))
		number := fmt.Sprintf("+1555%07d", 100001+i)
		out[i] = Subscriber{
			IMPI: fmt.Sprintf("00101%010d@%s", i+1, domain), Domain: domain,
			IMPU: []string{"sip:" + number + "@" + domain, "tel:" + number},
			K:    [16]byte(k[:16]), OPc: [16]byte(opc[:16]), AMF: [2]byte{0x80, 0},
		}
	}
	return out
}

// Binding is a registration.
type Binding struct {
	IMPI    string
	IMPU    []string
	Contact string   // the element as the UE sent it
	Path    []string // elements, topmost first
	Expires time.Time
	Source  netip.AddrPort // where the REGISTER came from
}

// account is the state of one subscriber. Everything but sub and card is guarded by Core.mu.
type account struct {
	sub     Subscriber
	card    digestaka.Card
	sqn     uint64
	pending *challenge // challenge not answered yet
	last    *challenge // challenge of the last successful authentication
	binding *Binding
	ended   *Binding // the last one, if there is none
	left    bool     // was registered and is not any more
	rounds  int      // right responses challenged again so far
	nonce   string   // of the last SIP digest challenge
	watch   []*subscription
}

type challenge struct {
	vector digestaka.Vector
	nonce  string
	at     time.Time
}

// sqnStep leaves the five index bits of TS 33.102 Annex C.1.2 alone.
const sqnStep = 32

// regAwaitAuth bounds how long a challenge may be answered (TS 24.229 table 7.8).
const regAwaitAuth = 4 * time.Minute

// chargingFunctions is what the registrar tells the P-CSCF and what must never reach a UE.
const chargingFunctions = "ccf=192.0.2.9"

// register is the S-CSCF's REGISTER handling, TS 24.229 §5.4.1.2.1 and §5.4.1.2.2.
func (c *Core) register(in *incoming) {
	b := c.Behaviour()
	if b.Silent {
		return
	}
	answer := c.registrar(in, b)
	if b.AnswerDelay == 0 {
		c.answer(in, answer)
		return
	}
	c.spawn(func() {
		select {
		case <-time.After(b.AnswerDelay):
			c.answer(in, answer)
		case <-c.ctx.Done():
		}
	})
}

func (c *Core) registrar(in *incoming, b Behaviour) *sipwire.Message {
	m := in.msg
	scheme, p, err := sipwire.ParseAuth(m.Get("Authorization"))
	if err != nil || !equalFold(scheme, "Digest") {
		c.problem(in.seen, "REGISTER without usable Authorization")
		return sipwire.Response(m, 403, sipwire.Token())
	}
	c.mu.Lock()
	acc := c.byIMPI[p.Get("username")]
	c.mu.Unlock()
	to, err := sipwire.ParseAddr(m.Get("To"))
	if acc == nil || err != nil || c.owner(to.URI) != acc {
		return sipwire.Response(m, 403, sipwire.Token())
	}
	if acc.sub.Password != "" {
		return c.digestRegistrar(in, acc, p)
	}
	integrity := p.Get("integrity-protected")

	c.mu.Lock()
	pending, last, bound := acc.pending, acc.last, acc.binding != nil && time.Now().Before(acc.binding.Expires)
	c.mu.Unlock()
	if pending != nil && time.Since(pending.at) > regAwaitAuth {
		pending = nil
	}
	response := p.Get("response")
	switch auts := p.Get("auts"); {
	case auts != "":
		if err := c.resync(acc, pending, p.Get("nonce"), auts); err != nil {
			c.problem(in.seen, err.Error())
			return sipwire.Response(m, 403, sipwire.Token())
		}
	case response == "":
		if !bound && integrity == "yes" {
			c.problem(in.seen, "integrity-protected=yes on the first REGISTER of an unregistered UE")
		}
	case pending != nil && p.Get("nonce") == pending.nonce:
		want, err := c.digest(m, p, pending.vector)
		if err != nil || want != response {
			c.drop(acc, pending)
			return sipwire.Response(m, 403, sipwire.Token())
		}
		if integrity != "yes" {
			// TS 24.229 §5.4.1.2.1: whatever is not integrity protected is challenged again.
			c.problem(in.seen, fmt.Sprintf("integrity-protected is %q on the answer to a challenge", integrity))
			break
		}
		c.drop(acc, pending)
		if c.another(acc, b) {
			return c.challenge(in, acc, b)
		}
		if b.RejectAuth != 0 {
			return sipwire.Response(m, b.RejectAuth, sipwire.Token())
		}
		return c.accept200(in, acc, pending)
	case integrity == "yes" && bound && !b.AlwaysChallenge:
		// The answer is not needed, but a damaged Authorization shows here.
		if last == nil || p.Get("nonce") != last.nonce {
			c.problem(in.seen, "re-registration with a nonce that is not the last one")
		} else if want, err := c.digest(m, p, last.vector); err != nil || want != response {
			c.problem(in.seen, "response of a re-registration does not fit the last challenge")
		}
		return c.accept200(in, acc, last)
	}
	return c.challenge(in, acc, b)
}

// digestRegistrar is the S-CSCF's handling of SIP digest without TLS (TS 24.229 §5.4.1.2.1A): every REGISTER needs a response.
func (c *Core) digestRegistrar(in *incoming, acc *account, p sipwire.Params) *sipwire.Message {
	m := in.msg
	c.mu.Lock()
	nonce, bound := acc.nonce, acc.binding != nil && time.Now().Before(acc.binding.Expires)
	if p.Get("response") == "" {
		acc.nonce = sipwire.Token()
		nonce = acc.nonce
	}
	c.mu.Unlock()
	integrity := p.Get("integrity-protected")
	if p.Get("response") == "" {
		if integrity != "no" {
			c.problem(in.seen, fmt.Sprintf("integrity-protected is %q in a REGISTER in clear without a response", integrity))
		}
		r := sipwire.Response(m, 401, sipwire.Token())
		r.Add("WWW-Authenticate", fmt.Sprintf(`Digest realm="%s",nonce="%s",algorithm=MD5,qop="auth"`, c.cfg.Domain, nonce))
		return r
	}
	want, err := c.digest(m, p, digestaka.Vector{RES: []byte(acc.sub.Password)})
	if err != nil || nonce == "" || p.Get("nonce") != nonce || want != p.Get("response") {
		return sipwire.Response(m, 403, sipwire.Token())
	}
	if state := map[bool]string{false: "ip-assoc-pending", true: "ip-assoc-yes"}[bound]; integrity != state {
		c.problem(in.seen, fmt.Sprintf("integrity-protected is %q, want %s", integrity, state))
	}
	return c.accept200(in, acc, nil)
}

// owner returns the account a public identity belongs to.
func (c *Core) owner(uri string) *account {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.byIMPU[sipwire.Key(uri)]
}

func (c *Core) drop(acc *account, ch *challenge) {
	c.mu.Lock()
	if acc.pending == ch {
		acc.pending = nil
	}
	c.mu.Unlock()
}

// another reports whether a right response is to be challenged again.
func (c *Core) another(acc *account, b Behaviour) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if acc.rounds < b.ExtraRounds {
		acc.rounds++
		return true
	}
	acc.rounds = 0
	return false
}

func (c *Core) digest(m *sipwire.Message, p sipwire.Params, v digestaka.Vector) (string, error) {
	return digestaka.Digest{
		Algorithm: p.Get("algorithm"), Username: p.Get("username"), Realm: p.Get("realm"), URI: p.Get("uri"),
		Method: m.Method, Nonce: p.Get("nonce"), QOP: p.Get("qop"), NC: p.Get("nc"), CNonce: p.Get("cnonce"), Body: m.Body,
	}.Response(v)
}

// resync takes over the USIM's sequence number (TS 33.102 §6.3.5). AUTS answers the challenge in nonce.
func (c *Core) resync(acc *account, pending *challenge, nonce, auts string) error {
	if pending == nil || pending.nonce != nonce {
		return errors.New("auts does not answer the pending challenge")
	}
	b, err := base64.StdEncoding.DecodeString(auts)
	if err != nil {
		return fmt.Errorf("decode auts: %w", err)
	}
	sqn, err := acc.card.Resync(pending.vector.RAND, b)
	if err != nil {
		return fmt.Errorf("resynchronise: %w", err)
	}
	c.mu.Lock()
	acc.sqn = sqn
	c.mu.Unlock()
	return nil
}

// challenge builds the 401 (TS 24.229 §5.4.1.2.1, §7.2A.1).
func (c *Core) challenge(in *incoming, acc *account, b Behaviour) *sipwire.Message {
	var rnd [16]byte
	src := c.cfg.Rand
	if src == nil {
		src = rand.Reader
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, err := io.ReadFull(src, rnd[:]); err != nil {
		return sipwire.Response(in.msg, 500, sipwire.Token())
	}
	acc.sqn = (acc.sqn + sqnStep) & digestaka.SQNMask
	v, err := acc.card.Generate(rnd, acc.sqn)
	if err != nil {
		return sipwire.Response(in.msg, 500, sipwire.Token())
	}
	acc.pending = &challenge{vector: v, nonce: v.Nonce(), at: time.Now()}
	r := sipwire.Response(in.msg, 401, sipwire.Token())
	if b.ExtraChallenges {
		r.Add("WWW-Authenticate", fmt.Sprintf(`Digest realm="%s",nonce="00",algorithm=MD5,qop="auth"`, c.cfg.Domain))
	}
	r.Add("WWW-Authenticate", wwwAuthenticate(c.cfg.Domain, v, b))
	if b.ExtraChallenges {
		r.Add("WWW-Authenticate", `Basic realm="legacy"`)
	}
	return r
}

// wwwAuthenticate prints the AKA challenge with the keys for the P-CSCF.
func wwwAuthenticate(realm string, v digestaka.Vector, b Behaviour) string {
	quote := `"`
	if b.UnquotedKeys {
		quote = ""
	}
	key := func(name string, k []byte) string {
		h := hex.EncodeToString(k)
		if b.UpperHex {
			h = strings.ToUpper(h)
		}
		return name + "=" + quote + h + quote
	}
	var ck, ik []string
	if !b.NoCK {
		ck = []string{key("ck", v.CK)}
	}
	if !b.NoIK {
		ik = []string{key("ik", v.IK)}
	}
	alg := b.Algorithm
	if alg == "" {
		alg = "AKAv1-MD5"
	}
	head := []string{`realm="` + realm + `"`, `nonce="` + v.Nonce() + `"`, "algorithm=" + alg}
	var qop []string
	if !b.NoQOP {
		q := b.QOP
		if q == "" {
			q = "auth"
		}
		qop = []string{`qop="` + q + `"`}
	}
	var all []string
	switch b.Keys {
	case KeysFirst:
		all = slices.Concat(ck, ik, head, qop)
	case KeysLast:
		all = slices.Concat(head, qop, ck, ik)
	case KeysSplit:
		all = slices.Concat(ck, head, qop, ik)
	default:
		all = slices.Concat(head, ck, ik, qop)
	}
	return "Digest " + strings.Join(all, ",")
}

// accept200 binds or unbinds and builds the 200 (TS 24.229 §5.4.1.2.2).
func (c *Core) accept200(in *incoming, acc *account, used *challenge) *sipwire.Message {
	m := in.msg
	expires, contact, err := c.expiry(m)
	if err != nil {
		return sipwire.Response(m, 400, sipwire.Token())
	}
	r := sipwire.Response(m, 200, sipwire.Token())
	c.mu.Lock()
	acc.last = used
	if expires == 0 {
		acc.unbind()
	} else {
		acc.left = false
		acc.binding = &Binding{
			IMPI: acc.sub.IMPI, IMPU: slices.Clone(acc.sub.IMPU), Contact: contact, Path: m.List("Path"),
			Expires: time.Now().Add(time.Duration(expires) * time.Second), Source: in.from,
		}
	}
	c.mu.Unlock()
	if expires > 0 {
		a, err := sipwire.ParseAddr(contact)
		if err != nil {
			return sipwire.Response(m, 400, sipwire.Token())
		}
		r.Add("Contact", "<"+a.URI+">"+a.Params.Set("expires", strconv.Itoa(expires)).String())
		for _, p := range m.All("Path") {
			r.Add("Path", p)
		}
		r.Add("Service-Route", "<sip:orig@"+c.cfg.Addr.String()+";lr>")
		r.Add("P-Associated-URI", "<"+strings.Join(acc.sub.IMPU, ">, <")+">")
	}
	if pcv := m.Get("P-Charging-Vector"); pcv != "" {
		r.Add("P-Charging-Vector", pcv+`;term-ioi="`+c.cfg.Domain+`"`)
	}
	r.Add("P-Charging-Function-Addresses", chargingFunctions)
	if expires == 0 {
		c.spawn(func() { c.notifyAll(acc, change{event: "unregistered"}) })
	}
	return r
}

// expiry returns the seconds granted and the contact element.
func (c *Core) expiry(m *sipwire.Message) (int, string, error) {
	contacts := m.List("Contact")
	if len(contacts) != 1 {
		return 0, "", fmt.Errorf("%d contacts in a REGISTER", len(contacts))
	}
	text := m.Get("Expires")
	if contacts[0] != "*" {
		a, err := sipwire.ParseAddr(contacts[0])
		if err != nil {
			return 0, "", err
		}
		if e, ok := a.Params.Lookup("expires"); ok {
			text = e
		}
	}
	most := int(c.cfg.Expires / time.Second)
	if text == "" {
		return most, contacts[0], nil
	}
	n, err := strconv.ParseUint(text, 10, 31)
	if err != nil {
		return 0, "", fmt.Errorf("expires %q", text)
	}
	if contacts[0] == "*" && n != 0 {
		return 0, "", errors.New("contact * with expires other than zero")
	}
	return min(int(n), most), contacts[0], nil
}

// Registered returns the current bindings, ordered by private identity.
func (c *Core) Registered() []Binding {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []Binding
	for _, a := range c.byIMPI {
		if a.binding != nil && time.Now().Before(a.binding.Expires) {
			out = append(out, *a.binding)
		}
	}
	slices.SortFunc(out, func(a, b Binding) int { return strings.Compare(a.IMPI, b.IMPI) })
	return out
}

// SetSQN sets the AuC's sequence number of a subscriber. Set it below the USIM's to provoke a resynchronisation.
func (c *Core) SetSQN(impi string, sqn uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.byIMPI[impi]
	if a == nil {
		return fmt.Errorf("set SQN: unknown subscriber %s", impi)
	}
	a.sqn = sqn & digestaka.SQNMask
	return nil
}

// unbind ends the registration. Core.mu is held.
func (a *account) unbind() {
	if a.binding != nil {
		a.ended = a.binding
	}
	a.binding, a.left = nil, true
}

// registered returns the account of a public identity that is registered.
func (c *Core) registered(impu string) (*account, error) {
	a := c.owner(impu)
	if a == nil {
		return nil, fmt.Errorf("%s: unknown identity", impu)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if a.binding == nil {
		return nil, fmt.Errorf("%s: %w", impu, ErrNotRegistered)
	}
	return a, nil
}

// Deregister ends a registration from the network's side, by an event of RFC 3680 §4.7.1 such as deactivated: the binding
// goes, and subscribers of the reg event get a NOTIFY (TS 24.229 §5.4.1.5).
func (c *Core) Deregister(impu, event string) error {
	a, err := c.registered(impu)
	if err != nil {
		return fmt.Errorf("deregister: %w", err)
	}
	c.mu.Lock()
	a.unbind()
	c.mu.Unlock()
	c.notifyAll(a, change{event: event})
	return nil
}

// Shorten lets a registration end after this time, and tells subscribers of the reg event (TS 24.229 §5.4.1.6).
func (c *Core) Shorten(impu string, expires time.Duration) error {
	a, err := c.registered(impu)
	if err != nil {
		return fmt.Errorf("shorten: %w", err)
	}
	c.mu.Lock()
	a.binding.Expires = time.Now().Add(expires)
	c.mu.Unlock()
	c.notifyAll(a, change{event: "shortened", expires: expires})
	return nil
}

// Tell sends subscribers of the reg event a NOTIFY of a registration that was refreshed.
func (c *Core) Tell(impu string) error {
	a, err := c.registered(impu)
	if err != nil {
		return fmt.Errorf("tell subscribers: %w", err)
	}
	c.notifyAll(a, change{event: "refreshed"})
	return nil
}
