package proxy

import (
	"context"
	"encoding/hex"
	"errors"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/emiago/sipgo/sip"

	"github.com/gmgate/gmgate/control/aka"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/policy"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/control/secagree"
	"github.com/gmgate/gmgate/control/wheel"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// Timers of a REGISTER transaction (RFC 3261 §17.1.2 towards the core; TS 24.229 §7.7 towards the UE).
const (
	coreT1 = 500 * time.Millisecond
	coreT2 = 4 * time.Second
	// finalKept is how long a final answer is kept for retransmissions of the request: timer J with T1 = 2 s.
	finalKept = 128 * time.Second
	// maxContexts bounds what one IMPI may hold on a worker: addresses with normal registrations, such as flows (RFC 5626)
	// and those that a phone has just left, as many with emergency ones, as many in clear. A phone may take any address of
	// its IPv6 prefix.
	maxContexts = 8
)

type txKey uint64

// regTx is a REGISTER on its way: the server transaction towards the UE and the client transaction towards the core in
// one.
type regTx struct {
	key    txKey
	flow   ims.Flow
	over   *registrar.Set // the set it came in on; nil: in clear
	serial uint8          // of over
	began  time.Time

	impi, impu, callID string
	contact            string // Contact URI offered
	outbound           bool   // Contact has reg-id: one of several flows (RFC 5626)
	dereg              bool   // asks for de-registration
	response           bool   // carried a challenge response
	authorization      bool   // carried Authorization
	realm              string // of Authorization
	emergency          bool   // Contact has sos: the emergency registration, which stands beside the normal one

	policy     *policy.Settings
	clear      bool // passes without a security agreement
	associated bool // and came from the address association of its identity
	foreign    bool // over the set of the emergency registration, or an emergency one over another set

	offer    *secagree.Offer // chosen mechanism; nil without Security-Client
	client   string          // Security-Client as in registrar.Agreement
	replaced bool            // a newer REGISTER of the same UE is under way: its 401 must not make SAs

	req   []byte // as received, to answer it
	fwd   []byte // as sent to the core
	hop   ims.Hop
	final []byte // as answered
	busy  bool   // the backend is installing the set

	resend  time.Duration
	timer   wheel.Timer
	timeout wheel.Timer

	origin origin
	queue  *pendingQueue
	links  [txLists]txLinks
}

// keyOf names the UE context that a REGISTER is for.
func (w *Worker) keyOf(tx *regTx) registrar.Key {
	return registrar.Key{IMPI: tx.impi, Addr: tx.flow.Remote.Addr(), Emergency: tx.emergency, Clear: tx.clear}
}

// register handles a REGISTER: in clear (s is nil) or over a set.
func (w *Worker) register(f ims.Flow, s *registrar.Set) {
	m := &w.m
	via, err := sipmsg.ParseVia(m.Get(sipmsg.Via))
	if err != nil || len(via.Branch) == 0 {
		w.refuse(f, s, 400, "Bad Request", "Via: no branch", observe.ReasonMalformed)
		return
	}
	key := w.registerKey(f, s, &via)
	if tx := w.txs[key]; tx != nil {
		w.repeat(tx)
		return
	}
	if s != nil && s.Phase == sa.Temporary && s.Dropped() {
		w.obs.Drop(observe.ReasonNoSA) // its registration has failed
		return
	}
	if !w.room(f, s) {
		who := "phone"
		if s == nil {
			who = "address"
		}
		w.refuse(f, s, 503, "Service Unavailable", "too many registrations of this "+who+" under way", observe.ReasonBusy,
			retryAfter)
		return
	}
	tx := w.admit(f, s, &via)
	if tx == nil {
		return
	}
	tx.key = key
	if !w.buildRegister(tx, &via) {
		return
	}
	w.txs[key] = tx
	w.enqueuePending(tx)
	nk := w.keyOf(tx)
	old := w.newest[nk]
	if old != nil && old.final != nil {
		old = nil
	}
	if old == nil || s != nil || old.over == nil { // nobody has proved who sends in clear: it replaces nothing that is protected
		if old != nil {
			old.replaced = true
		}
		w.newest[nk] = tx
	}
	w.wheel.Schedule(&tx.timeout, w.cfg.RegisterTimeout, func() { w.registerTimeout(tx) })
	if s != nil { // reg-await-auth has done its part, the phone has answered
		w.table.Hold(s, w.cfg.RegisterTimeout+answerGrace)
	}
	if tx.clear {
		w.unlessProtected(tx, func() { w.sendRegister(tx) })
		return
	}
	w.sendRegister(tx)
}

// registerKey identifies the transaction: retransmissions have the same source, Via, Call-ID and CSeq.
func (w *Worker) registerKey(f ims.Flow, s *registrar.Set, v *sipmsg.ViaParm) txKey {
	num, _ := w.m.CSeq()
	var b [4 + 1 + 16 + 2]byte
	b[0], b[1], b[2], b[3] = byte(num>>24), byte(num>>16), byte(num>>8), byte(num)
	if s != nil {
		b[4] = s.Serial
	}
	a := f.Remote.Addr().As16()
	copy(b[5:], a[:])
	b[21], b[22] = byte(f.Remote.Port()>>8), byte(f.Remote.Port())
	w.text = append(w.text[:0], b[:]...)
	return txKey(w.seal.mac(&w.sc, []byte("reg"), w.text, v.Branch, v.Host, w.m.Get(sipmsg.CallID)))
}

// repeat handles a retransmission: it changes nothing, and gets the same answer again (TS 33.203 §7.2).
func (w *Worker) repeat(tx *regTx) {
	if tx.final != nil {
		w.answerRegister(tx, tx.final)
	}
	// Before the final answer the core is asked again by our own timer.
}

// admit checks a REGISTER as TS 24.229 §5.2.2.1 and §5.2.2.2 ask. It answers and returns nil when it is not to be
// forwarded.
func (w *Worker) admit(f ims.Flow, s *registrar.Set, via *sipmsg.ViaParm) *regTx {
	m := &w.m
	refuse := func(code int, phrase, warning string, why observe.Reason, extra ...string) *regTx {
		w.refuse(f, s, code, phrase, warning, why, extra...)
		return nil
	}
	if n := w.viaCount(); n != 1 {
		return refuse(400, "Bad Request", "Via: "+strconv.Itoa(n)+" entries in a REGISTER of a UE", observe.ReasonMalformed)
	}
	left, ok := w.forwardsLeft()
	switch {
	case !ok:
		return refuse(400, "Bad Request", "Max-Forwards: not a number up to 255", observe.ReasonMalformed)
	case left == 0:
		return refuse(483, "Too Many Hops", "Max-Forwards: 0", observe.ReasonMaxForwards)
	}
	if tag := w.unknownExtension(); tag != nil {
		w.refuseExtension(f, s, tag)
		return nil
	}
	tx := &regTx{
		flow: f, over: s, origin: originOf(f, s), began: w.eg.Now(), callID: string(m.Get(sipmsg.CallID)),
		req: append([]byte(nil), m.Bytes()...), resend: coreT1,
	}
	if s != nil {
		tx.serial = s.Serial
	}
	to, err := sipmsg.ParseNameAddr(m.Get(sipmsg.To))
	if err != nil {
		return refuse(400, "Bad Request", "To: "+err.Error(), observe.ReasonMalformed)
	}
	tx.impu = string(to.URI)
	if m.Count(sipmsg.Authorization) > 1 { // the registrar might look at the other one
		return refuse(400, "Bad Request", "Authorization: more than one", observe.ReasonMalformed)
	}
	if err := w.readAuthorization(tx); err != nil {
		return refuse(400, "Bad Request", "Authorization: "+err.Error(), observe.ReasonMalformed)
	}
	if err := w.readContact(tx); err != nil {
		return refuse(400, "Bad Request", "Contact: "+err.Error(), observe.ReasonMalformed)
	}
	if tx.emergency && w.cfg.NoEmergency {
		return refuse(403, "Forbidden", "Contact: no emergency registrations here", observe.ReasonPolicy)
	}
	tx.policy = w.policyFor(tx)
	if !tx.emergency && !tx.policy.MayRegister(f.Transport, s != nil) {
		return refuse(403, "Forbidden", "Via: no registrations over "+f.Transport.String(), observe.ReasonPolicy)
	}
	if s == nil && tx.policy.IPsec == policy.Forbid {
		if !w.passThrough(tx, refuse) {
			return nil
		}
		return tx
	}
	tx.client = w.agreement(sipmsg.SecurityClient)
	// What SM7 repeats octet by octet is what Parse and Select have accepted.
	known := s != nil && s.Phase == sa.Temporary && tx.client != "" && tx.client == s.Agreement.Client && tx.emergency == s.UE.Emergency
	var client secagree.List
	if !known {
		if client, err = parseAgreement(tx.client); err != nil {
			return refuse(400, "Bad Request", "Security-Client: "+err.Error(), observe.ReasonBadSecurityClient)
		}
	}
	if s != nil {
		if !w.checkProtected(tx, s, via, refuse) {
			return nil
		}
	}
	hasClient := known || client.IPsecCount() > 0
	switch {
	case s == nil && (!hasClient || !w.requires("sec-agree")) && tx.policy.IPsec == policy.Allow:
		if !w.passThrough(tx, refuse) {
			return nil
		}
	case s == nil && (!hasClient || !w.requires("sec-agree")):
		why, warning := observe.ReasonNoSecurityClient, "Security-Client: no ipsec-3gpp mechanism"
		if hasClient {
			why, warning = observe.ReasonNoSecAgree, "Require: sec-agree is missing"
		}
		// RFC 3329 §2.3.1: the client must use the security agreement.
		return refuse(421, "Extension Required", warning, why, "Require: sec-agree\r\n", bareServer(tx.policy.Suites))
	case hasClient && s != nil && (s.Phase == sa.Temporary || !tx.foreign && inForce(s, client, tx.policy.Suites)):
		// SM7, once or again, or a refresh that repeats the agreement in force: nothing new to agree on.
	case hasClient:
		if !w.choose(tx, client, refuse) {
			return nil
		}
	}
	return tx
}

// policyFor matches a REGISTER against the rules.
func (w *Worker) policyFor(tx *regTx) *policy.Settings {
	q := policy.Request{
		Realm: tx.realm, IMPI: tx.impi, UserAgent: string(w.m.Get(sipmsg.UserAgent)), Source: tx.flow.Remote.Addr(),
	}
	if q.Realm == "" {
		q.Realm = domainOf(tx.impu)
	}
	return w.rules.Match(q)
}

// apply notes what the policy says of the traffic of a set.
func (w *Worker) apply(s *registrar.Set, p *policy.Settings) {
	s.Requests, s.OwnConnection, s.AnswersToSource = p.Requests, p.OwnConnection, p.AnswersToSource
}

// full reports whether no further phone may have SA sets. Those that are registered go on renewing theirs, and an emergency
// registration is not kept out.
func (w *Worker) full(tx *regTx) bool {
	return w.cfg.SetsMax > 0 && w.cfg.Fleet != nil && tx.over == nil && !tx.emergency &&
		w.cfg.Fleet.sets.Load() >= int64(w.cfg.SetsMax)
}

// choose selects the mechanism and applies the rules on SPIs and ports (TS 33.203 §7.2).
func (w *Worker) choose(tx *regTx, client secagree.List,
	refuse func(int, string, string, observe.Reason, ...string) *regTx,
) bool {
	o, err := secagree.Select(client, tx.policy.Suites)
	switch {
	case errors.Is(err, secagree.ErrNoCommonAlgorithm):
		refuse(w.cfg.StatusSuite, statusPhrase(w.cfg.StatusSuite), "Security-Client: "+err.Error(),
			observe.ReasonNoCommonAlgorithm, bareServer(tx.policy.Suites))
		return false
	case err != nil:
		refuse(400, "Bad Request", "Security-Client: "+err.Error(), observe.ReasonBadSecurityClient)
		return false
	}
	tx.offer = &o
	if w.full(tx) {
		refuse(503, "Service Unavailable", "no security association left", observe.ReasonTooManySets, retryAfter)
		return false
	}
	err = w.table.Check(w.offerOf(tx))
	switch {
	case errors.Is(err, registrar.ErrTooManySets):
		refuse(w.cfg.StatusTaken, statusPhrase(w.cfg.StatusTaken), "Security-Client: "+err.Error(), observe.ReasonTooManySets)
	case err != nil:
		refuse(w.cfg.StatusTaken, statusPhrase(w.cfg.StatusTaken), "Security-Client: port-c="+
			strconv.Itoa(int(o.PortC))+": "+err.Error(), observe.ReasonAddressConflict)
	}
	return err == nil
}

func (w *Worker) offerOf(tx *regTx) *registrar.Offer {
	o := &registrar.Offer{
		IMPI: tx.impi, Local: tx.flow.Local.Addr(), UE: tx.flow.Remote.Addr(),
		SPIC: tx.offer.SPIC, SPIS: tx.offer.SPIS, PortC: tx.offer.PortC, PortS: tx.offer.PortS,
		Emergency: tx.emergency, ServerPorts: tx.policy.ServerPorts, ClientPorts: tx.policy.ClientPorts,
		AwaitAuth: tx.policy.AwaitAuth,
	}
	if w.overLives(tx) && !tx.foreign {
		o.Over = tx.over
	}
	return o
}

// overLives reports whether the set that the REGISTER came over is still there.
func (w *Worker) overLives(tx *regTx) bool {
	return tx.over != nil && tx.over.Live()
}

// checkProtected applies what a REGISTER over a set must fulfil. On a temporary set it is SM7 (TS 33.203 §7.2); on an
// established one a re-registration, a de-registration or another public identity (TS 24.229 §5.2.2.2).
func (w *Worker) checkProtected(tx *regTx, s *registrar.Set, via *sipmsg.ViaParm,
	refuse func(int, string, string, observe.Reason, ...string) *regTx,
) bool {
	if a, ok := sipmsg.ParseAddr(via.Host); !ok || a != s.Params.UE {
		resolved, state := w.host(via.Host)
		if ok || state != nameKnown || resolved != s.Params.UE {
			refuse(400, "Bad Request", "Via: sent-by is not the address of the security association",
				observe.ReasonViaMismatch)
			return false
		}
	}
	if tx.impi != s.UE.IMPI {
		refuse(403, "Forbidden", "Authorization: username is not the identity of the security association",
			observe.ReasonNotOwner)
		return false
	}
	if s.Phase != sa.Temporary {
		tx.foreign = tx.emergency != s.UE.Emergency
		w.table.Touch(s)
		return true
	}
	tx.emergency = s.UE.Emergency
	code, phrase := w.cfg.StatusVerify, statusPhrase(w.cfg.StatusVerify)
	agreed := s.Agreement
	server := "Security-Server: " + agreed.Server + "\r\n"
	if err := sameAgreement(agreed.Server, w.agreement(sipmsg.SecurityVerify)); err != nil {
		w.obs.VerifyMismatch()
		refuse(code, phrase, "Security-Verify: "+err.Error(), observe.ReasonVerifyMismatch, server)
		w.table.Drop(s, answerGrace)
		return false
	}
	if err := sameAgreement(agreed.Client, tx.client); err != nil {
		refuse(code, phrase, "Security-Client: "+err.Error(), observe.ReasonClientMismatch, server)
		w.table.Drop(s, answerGrace)
		return false
	}
	if tx.callID != agreed.CallID {
		refuse(400, "Bad Request", "Call-ID: not that of the challenged REGISTER", observe.ReasonClientMismatch)
		return false
	}
	if tx.impu != agreed.IMPU {
		refuse(403, "Forbidden", "To: not the identity of the challenged REGISTER", observe.ReasonNotOwner)
		return false
	}
	tx.impu = agreed.IMPU // the string that the UE's IMPI is part of
	return true
}

// viaCount counts Via entries over all rows.
func (w *Worker) viaCount() int {
	n := 0
	for _, row := range w.m.Rows() {
		if row.ID != sipmsg.Via {
			continue
		}
		for v := w.m.Value(row); len(v) > 0; n++ {
			_, v = sipmsg.Element(v)
		}
	}
	return n
}

// values returns the values of every row of a header.
func (w *Worker) values(id sipmsg.HeaderID) []string {
	var v []string
	for _, row := range w.m.Rows() {
		if row.ID == id {
			v = append(v, string(w.m.Value(row)))
		}
	}
	return v
}

// agreement returns the rows of a Security-* header as one text, joined by a newline.
func (w *Worker) agreement(id sipmsg.HeaderID) string {
	text := w.text[:0]
	for _, row := range w.m.Rows() {
		if row.ID != id {
			continue
		}
		if len(text) > 0 {
			text = append(text, '\n')
		}
		for _, c := range w.m.Value(row) {
			if c == '\r' || c == '\n' { // a folded row: one space or several are the same (RFC 3261 §7.3.1)
				c = ' '
			}
			text = append(text, c)
		}
	}
	w.text = text
	return string(text)
}

func parseAgreement(text string) (secagree.List, error) {
	if text == "" {
		return secagree.List{}, nil
	}
	return secagree.Parse(strings.Split(text, "\n")...)
}

// sameAgreement compares a header with the one that it must repeat (RFC 3329 §2.3.1). Nearly every phone repeats it byte
// for byte, so that it need not be parsed.
func sameAgreement(known, repeated string) error {
	if known == repeated {
		return nil
	}
	have, err := parseAgreement(known)
	if err != nil {
		return err
	}
	got, err := parseAgreement(repeated)
	if err != nil {
		return err
	}
	return secagree.Equal(have, got)
}

// inForce reports whether an offer repeats the agreement of an established set: the SPIs and ports that it leads to are
// those of the set, so it asks for no other one.
func inForce(s *registrar.Set, client secagree.List, suites []ims.Suite) bool {
	o, err := secagree.Select(client, suites)
	return err == nil && o.SPIC == s.SPIs.UC && o.SPIS == s.SPIs.US && o.PortC == s.Ports.UC && o.PortS == s.Ports.US
}

// requires reports whether Require or Proxy-Require holds an option tag.
func (w *Worker) requires(tag string) bool {
	for _, row := range w.m.Rows() {
		if (row.ID == sipmsg.Require || row.ID == sipmsg.ProxyRequire) && sipmsg.HasToken(w.m.Value(row), tag) {
			return true
		}
	}
	return false
}

// readAuthorization finds the private identity; a UE that sends no Authorization has the one derived from its public
// identity (TS 24.229 §5.4.1.2.1).
func (w *Worker) readAuthorization(tx *regTx) error {
	if v := w.m.Get(sipmsg.Authorization); v != nil {
		a, err := aka.ParseAuthorization(string(v))
		if err != nil {
			return err
		}
		// Without the header that it stands in; most public identities hold the private one.
		username := canonicalIMPI(a.Username)
		if i := len(tx.impu) - len(username); i >= 0 && tx.impu[i:] == username {
			tx.impi = tx.impu[i:]
		} else {
			tx.impi = strings.Clone(username)
		}
		tx.realm = strings.Clone(a.Realm)
		tx.response, tx.authorization = a.Response != "", true
		if tx.impi == "" {
			return errors.New("username is missing")
		}
		return nil
	}
	var u sip.Uri
	if err := sip.ParseUri(tx.impu, &u); err != nil || u.User == "" {
		return errors.New("missing, and To has no user")
	}
	tx.impi = canonicalIMPI(u.User + "@" + u.Host)
	return nil
}

// canonicalIMPI writes the realm of a private identity in lower case: it is a NAI (TS 23.003 §13.3), whose realm is the same
// in any case (RFC 7542 §2.4). The user part is compared octet by octet.
func canonicalIMPI(impi string) string {
	if at := strings.LastIndexByte(impi, '@'); at >= 0 {
		return impi[:at] + strings.ToLower(impi[at:])
	}
	return impi
}

// readContact notes the contact, and whether the REGISTER asks for de-registration (RFC 3261 §10.2.2).
func (w *Worker) readContact(tx *regTx) error {
	all := true
	n := 0
	def := string(w.m.Get(sipmsg.Expires))
	for _, v := range w.values(sipmsg.Contact) {
		if strings.TrimSpace(v) == "*" {
			tx.dereg = true
			return nil
		}
		for rest := []byte(v); len(rest) > 0; {
			var elem []byte
			elem, rest = sipmsg.Element(rest)
			na, err := sipmsg.ParseNameAddr(elem)
			if err != nil {
				return err
			}
			expires := def
			if e, ok := sipmsg.Param(na.Params, "expires"); ok {
				expires = string(e)
			}
			stays := strings.TrimLeft(expires, "0") != "" || expires == ""
			if n++; n == 1 || stays && all {
				tx.contact, tx.emergency = string(na.URI), sos(na.URI)
				_, tx.outbound = sipmsg.Param(na.Params, "reg-id")
			}
			if stays {
				all = false
			}
		}
	}
	tx.dereg = n > 0 && all
	return nil
}

// buildRegister writes the REGISTER as the core gets it (TS 24.229 §5.2.2.1) into tx.fwd.
func (w *Worker) buildRegister(tx *regTx, via *sipmsg.ViaParm) bool {
	m := &w.m
	tx.hop = w.registrarHop()
	w.e.Reset(m)
	w.markReceived(via, tx.flow)
	for _, row := range m.Rows() {
		switch row.ID {
		case sipmsg.SecurityClient, sipmsg.SecurityVerify, sipmsg.SecurityServer, sipmsg.PAssertedIdentity,
			sipmsg.PAssertedService, sipmsg.PChargingVector, sipmsg.PChargingFunctionAddresses, sipmsg.Path,
			sipmsg.ServiceRoute, sipmsg.PAssociatedURI, sipmsg.PVisitedNetworkID, sipmsg.PServedUser,
			sipmsg.PUserDatabase, sipmsg.PProfileKey, sipmsg.MaxForwards, sipmsg.Route:
			w.e.DeleteRow(row)
		case sipmsg.PAccessNetworkInfo:
			if networkProvided(m.Value(row)) {
				w.stripNetworkProvided(row)
			}
		case sipmsg.Authorization:
			v := aka.SetIntegrityProtected(string(m.Value(row)), w.integrity(tx), w.cfg.QuoteIntegrity)
			w.e.ReplaceString(int(row.ValStart), int(row.ValEnd), v)
		default:
		}
	}
	w.e.RemoveTokens(m, sipmsg.Require, "sec-agree", "mediasec", "path")
	w.e.RemoveTokens(m, sipmsg.ProxyRequire, "sec-agree", "mediasec")
	left, _ := w.forwardsLeft()
	at := m.HeadersStart()
	w.e.Open(at, at)
	w.e.Str("Via: SIP/2.0/")
	w.e.Str(tx.hop.Transport.Via())
	w.e.Str(" ")
	w.e.AddrPort(w.mwAddr(tx.hop.Addr.Addr()))
	w.e.Str(";branch=")
	w.putBranch(token{kind: tokenRegister, worker: uint8(w.id)}, uint64(tx.key))
	w.e.Str("\r\n")
	w.putForwards(left)
	w.e.Str("Require: path\r\nPath: <sip:")
	path := token{kind: tokenPath, worker: uint8(w.id)}
	switch u := w.table.Context(w.keyOf(tx)); {
	case tx.clear:
		path = w.clearToken(w.keyOf(tx))
	case tx.over != nil && !tx.foreign:
		path = w.pathToken(tx.over.UE)
	case u != nil:
		path = w.pathToken(u)
	}
	w.e.Raw(w.seal.seal(&w.sc, path))
	w.putSelf(nil, false, false)
	w.e.Str(">\r\n")
	if w.cfg.VisitedNetwork != "" {
		w.e.Str(`P-Visited-Network-ID: "`)
		w.e.Str(w.cfg.VisitedNetwork)
		w.e.Str("\"\r\n")
	}
	w.putChargingVector()
	w.e.Close()
	if !w.finish() {
		return false
	}
	tx.fwd = append([]byte(nil), w.out...)
	return true
}

// integrity returns the value of integrity-protected (TS 24.229 §7.2A.2): what the UE claims never counts.
func (w *Worker) integrity(tx *regTx) string {
	switch {
	case tx.clear:
		return w.clearIntegrity(tx)
	case tx.over == nil:
		return w.cfg.ClearIntegrity
	case tx.foreign: // to be authenticated anew, with SAs of its own
		return "no"
	case tx.over.Phase == sa.Temporary && !tx.response:
		return "no"
	}
	return "yes"
}

// sendRegister sends the REGISTER to the core, and over UDP again until it is answered (RFC 3261 §17.1.2).
func (w *Worker) sendRegister(tx *regTx) {
	w.sendToCore(tx.hop, tx.fwd, sipmsg.MethodRegister, func() {
		w.registerFailed(tx, 503, "Service Unavailable", "no connection to the core", observe.ReasonCoreUnreachable)
	})
	if tx.hop.Transport == ims.UDP && tx.final == nil {
		w.wheel.Schedule(&tx.timer, tx.resend, func() { w.sendRegister(tx) })
		tx.resend = min(2*tx.resend, coreT2)
	}
}

func (w *Worker) registerTimeout(tx *regTx) {
	if tx.final != nil {
		w.forget(tx)
		return
	}
	w.registerFailed(tx, 504, "Server Time-out", "core does not answer", observe.ReasonCoreTimeout)
}

// registerFailed answers a REGISTER with an error of our own. A temporary set that it came over goes. A phone that came at a
// bad time is told when to come again.
func (w *Worker) registerFailed(tx *regTx, code int, phrase, warning string, why observe.Reason,
	extra ...string,
) {
	if tx.final != nil || w.m.Scan(tx.req) != nil {
		return
	}
	w.obs.Reject(why)
	if code == 503 && len(extra) == 0 {
		extra = append(extra, retryAfter)
	}
	w.finishRegister(tx, w.reply(nil, tx.flow, tx.over, code, phrase, warning, extra...), code)
	w.obs.Registration(tx.kind(), false)
	if tx.over != nil && tx.over.Phase == sa.Temporary {
		w.table.Drop(tx.over, answerGrace)
	}
	w.verifyAfter(tx)
}

// finishRegister keeps the final answer for retransmissions and sends it.
func (w *Worker) finishRegister(tx *regTx, msg []byte, code int) {
	w.wheel.Stop(&tx.timer)
	tx.final, tx.fwd, tx.busy = msg, nil, false
	if tx.over == nil {
		w.answeredPending(tx)
	}
	if nk := w.keyOf(tx); w.newest[nk] == tx {
		delete(w.newest, nk)
	}
	w.wheel.Schedule(&tx.timeout, finalKept, func() { w.forget(tx) })
	if w.log.Enabled(context.Background(), slog.LevelDebug) { // the arguments cost more than the rest of this function
		w.log.Debug("register answered", "code", code, "flow", tx.flow.String(), "call_id", tx.callID)
	}
	w.answerRegister(tx, msg)
	tx.req, tx.offer = nil, nil // a retransmission brings its own Via
}

func (w *Worker) forget(tx *regTx) {
	w.wheel.Stop(&tx.timer)
	w.wheel.Stop(&tx.timeout)
	tx.unqueue()
	delete(w.txs, tx.key)
	if nk := w.keyOf(tx); w.newest[nk] == tx {
		delete(w.newest, nk)
	}
}

// answerRegister sends an answer, the first time or to a retransmission which is the current message then, in the context of its REGISTER: in clear for one that came in clear, over the same set
// for one that came protected (TS 33.203 §7.2).
func (w *Worker) answerRegister(tx *regTx, msg []byte) {
	if tx.req != nil && w.m.Scan(tx.req) != nil {
		return
	}
	if tx.over != nil && !tx.over.Live() && tx.over.UE.Current == nil {
		w.obs.Drop(observe.ReasonUEUnreachable)
		return
	}
	w.sendReply(tx.flow, tx.over, msg)
}

// registerAnswer handles the core's answer to a REGISTER.
func (w *Worker) registerAnswer(digits []byte) {
	var b [8]byte
	if n, err := hex.Decode(b[:], digits); err != nil || n != len(b) {
		w.obs.Drop(observe.ReasonUnknownResponse)
		return
	}
	var key txKey
	for _, c := range b {
		key = key<<8 | txKey(c)
	}
	tx := w.txs[key]
	if tx == nil || tx.fwd == nil || tx.busy {
		w.obs.Drop(observe.ReasonUnknownResponse) // late, or a retransmission of what was answered already
		return
	}
	switch code := w.m.Status(); {
	case code < 200:
		return
	case code == 401:
		w.challenged(tx)
	case code < 300:
		w.registered(tx)
	default:
		w.registrationRefused(tx)
	}
}

// stripRegisterAnswer edits an answer to a REGISTER for the UE: our Via, the charging headers and whatever the core said about a
// security agreement go. A challenge stays only where its keys are taken out of it.
func (w *Worker) stripRegisterAnswer(challenge bool) {
	m := &w.m
	w.e.Reset(m)
	w.e.PopElement(m, sipmsg.Via)
	for _, row := range m.Rows() {
		switch row.ID {
		case sipmsg.PChargingVector, sipmsg.PChargingFunctionAddresses, sipmsg.SecurityServer, sipmsg.SecurityClient,
			sipmsg.SecurityVerify:
			w.e.DeleteRow(row)
		case sipmsg.WWWAuthenticate, sipmsg.ProxyAuthenticate:
			if !challenge || row.ID == sipmsg.ProxyAuthenticate {
				w.e.DeleteRow(row)
			}
		default:
		}
	}
}

// challenged handles the 401: take CK and IK out of it, make the temporary set, and only when the backend has
// acknowledged its four SAs send the 401 on (TS 33.203 §7.2, TS 24.229 §5.2.2.2).
func (w *Worker) challenged(tx *regTx) {
	m := &w.m
	rows := w.values(sipmsg.WWWAuthenticate)
	cleaned, ch, err := aka.Take(rows)
	defer func() { ch.CK.Zero(); ch.IK.Zero() }()
	passes := tx.clear && cleaned != nil // whatever keys were in it are out
	if err != nil && !passes {
		w.registerFailed(tx, 500, "Server Internal Error", "WWW-Authenticate: "+err.Error(),
			observe.ReasonChallengeWithoutKeys)
		return
	}
	w.stripRegisterAnswer(true)
	i := 0
	for _, row := range m.Rows() {
		if row.ID == sipmsg.WWWAuthenticate {
			w.e.ReplaceString(int(row.ValStart), int(row.ValEnd), cleaned[i])
			i++
		}
	}
	if passes {
		if w.finish() {
			w.finishRegister(tx, append([]byte(nil), w.out...), 401)
		}
		return
	}
	if tx.replaced {
		// A newer REGISTER of this UE is under way: the answer goes out, but it makes no SAs.
		if w.finish() {
			w.finishRegister(tx, append([]byte(nil), w.out...), 401)
		}
		return
	}
	switch {
	case tx.over != nil && tx.over.Phase == sa.Temporary:
		// The UE's SPIs are taken by the very set over which this answer has to leave.
		w.registerFailed(tx, 500, "Server Internal Error", "challenged again on a temporary security association",
			observe.ReasonBusy)
		return
	case tx.offer == nil:
		w.registerFailed(tx, 400, "Bad Request", "Security-Client: nothing new to agree on, and the core asks for authentication",
			observe.ReasonNoSecurityClient)
		return
	case tx.over != nil && !tx.over.Live():
		w.registerFailed(tx, 500, "Server Internal Error", "security association is gone", observe.ReasonUEUnreachable)
		return
	}
	if w.full(tx) {
		w.registerFailed(tx, 503, "Service Unavailable", "no security association left", observe.ReasonTooManySets, retryAfter)
		return
	}
	keys, err := aka.Expand(tx.offer.Suite, ch.CK, ch.IK)
	if err != nil {
		w.registerFailed(tx, 500, "Server Internal Error", "WWW-Authenticate: "+err.Error(),
			observe.ReasonChallengeWithoutKeys)
		return
	}
	at := m.HeadersStart()
	s, err := w.table.Begin(w.offerOf(tx), keys, func(s *registrar.Set, err error) { w.installed(tx, s, err) })
	if err != nil {
		why, code, phrase := observe.ReasonAddressConflict, w.cfg.StatusTaken, statusPhrase(w.cfg.StatusTaken)
		switch {
		case errors.Is(err, sa.ErrSPIExhausted):
			why, code, phrase = observe.ReasonSPIExhausted, 503, "Service Unavailable"
		case errors.Is(err, registrar.ErrNoPort):
			why, code, phrase = observe.ReasonPortExhausted, 503, "Service Unavailable"
		case errors.Is(err, registrar.ErrTooManySets):
			why = observe.ReasonTooManySets
		}
		if code == 503 {
			w.registerFailed(tx, code, phrase, err.Error(), why, retryAfter)
			return
		}
		w.registerFailed(tx, code, phrase, err.Error(), why)
		return
	}
	tx.unqueue() // from here on its set counts
	w.boundPending()
	server := secagree.Server{
		SPIC: s.SPIs.PC, SPIS: s.SPIs.PS, PortC: s.Ports.PC, PortS: s.Ports.PS,
		Suites: []ims.Suite{tx.offer.Suite},
	}
	if w.cfg.ServerList {
		client, _ := parseAgreement(tx.client) // parsed when it came
		server.Suites = secagree.ServerSuites(tx.offer.Suite, tx.policy.Suites, client, true)
	}
	w.text = server.Append(w.text[:0])
	a := s.Agreement
	a.Server, a.Client, a.CallID, a.IMPU = string(w.text), tx.client, tx.callID, tx.impu
	w.e.Insert(at, "Security-Server: ", a.Server, "\r\n")
	if !w.finish() {
		w.table.Drop(s, 0)
		return
	}
	w.wheel.Stop(&tx.timer)
	tx.fwd, tx.busy = append([]byte(nil), w.out...), true // from here on the answer, not the request
}

// installed is called when the backend has answered: the SAs stand, so the 401 may leave.
func (w *Worker) installed(tx *regTx, s *registrar.Set, err error) {
	if tx.final != nil {
		return // the transaction has timed out meanwhile; the temporary set goes by its timer
	}
	if errors.Is(err, registrar.ErrAborted) { // it gave way to others while the backend was at work
		w.registerFailed(tx, 503, "Service Unavailable", "too many registrations under way", observe.ReasonBusy)
		return
	}
	if err != nil {
		w.log.Error("SA set not installed", "error", err, "sa_set", s.ID)
		w.registerFailed(tx, 500, "Server Internal Error", "security association could not be installed",
			observe.ReasonInstallFailed, retryAfter)
		return
	}
	w.obs.Suite(tx.offer.Suite)
	w.finishRegister(tx, tx.fwd, 401)
}

// registered handles a 2xx: the set is confirmed, or its life extended, or the UE de-registered.
func (w *Worker) registered(tx *regTx) {
	s := tx.over
	expires := w.grantedExpiry(tx)
	w.stripRegisterAnswer(false)
	if !w.finish() {
		return
	}
	answer := append([]byte(nil), w.out...)
	kind := tx.kind()
	if tx.clear {
		w.registeredClear(tx, answer, expires)
		return
	}
	switch {
	case s == nil: // a 200 to a REGISTER in clear would register a UE that nothing protects
		w.registerFailed(tx, 500, "Server Internal Error", "core accepted a registration without authentication",
			observe.ReasonChallengeWithoutKeys)
		return
	case !s.Live(): // its time has run out meanwhile; there may be another one to say so over
		w.registerFailed(tx, 500, "Server Internal Error", "security association is gone", observe.ReasonUEUnreachable)
		return
	}
	query := tx.contact == "" && !tx.dereg
	late := !s.UE.Ended.IsZero() && !tx.began.After(s.UE.Ended) // the UE has been de-registered since it asked
	if tx.foreign {                                             // accepted without the challenge that its own SAs would come from
		w.finishRegister(tx, answer, 200)
		return
	}
	if (query || late) && s.Phase != sa.Temporary {
		w.finishRegister(tx, answer, 200)
		w.verifyAfter(tx)
		return
	}
	if query {
		w.queried(tx, answer)
		return
	}
	if expires <= 0 {
		w.finishRegister(tx, answer, 200)
		w.obs.Registration(observe.RegDereg, true)
		if s.UE.Unbind(tx.impu) { // another public identity is registered over the same set
			w.table.Changed(s.UE)
			return
		}
		w.table.Deregister(s.UE, w.cfg.Registrar.OldSet)
		w.unwatch(s.UE, false)
		return
	}
	initial := s.Phase == sa.Temporary && s.Over == nil
	if initial { // the phone has started over
		s.UE.Bindings = nil
		if !tx.outbound && !s.UE.Emergency {
			w.moved(s.UE)
		}
	}
	if s.Phase == sa.Temporary && w.rules.Clear() {
		w.endClear(s.UE.IMPI)
	}
	w.learn(s.UE, tx)
	if w.rules.Clear() {
		w.table.DissociateAt(s.UE)
	}
	s.UE.Expires = w.eg.Now().Add(expires)
	s.OverTCP = tx.flow.Conn != 0
	w.apply(s, tx.policy)
	if s.Phase == sa.Temporary {
		w.table.Confirm(s, expires+w.cfg.LifetimeExtra)
	} else {
		w.table.Refresh(s, expires+w.cfg.LifetimeExtra)
	}
	if initial {
		w.table.Trim(s.UE, maxContexts)
	}
	w.obs.Registration(kind, true)
	w.metrics.ObserveRegistration(w.eg.Now().Sub(tx.began))
	w.finishRegister(tx, answer, 200)
	w.watch(s.UE, expires, initial)
}

// queried handles a 2xx over a temporary set to a REGISTER that registers nothing and ends nothing. Where it came over the set of a
// registration it has authenticated that anew; else nobody needs the set.
func (w *Worker) queried(tx *regTx, answer []byte) {
	s := tx.over
	if o := s.Over; s.UE.State == registrar.Registered && o != nil && !o.Dropped() && (o.Phase == sa.Established || o.Phase == sa.Old) {
		s.OverTCP = tx.flow.Conn != 0
		w.apply(s, tx.policy)
		w.table.Confirm(s, 0) // as long as the one before
	} else {
		w.table.Drop(s, answerGrace)
	}
	w.finishRegister(tx, answer, 200)
	w.verifyAfter(tx)
}

// registrationRefused passes any other final answer on; the set of a failed authentication goes, older ones stay
// (TS 33.203 §7.3).
func (w *Worker) registrationRefused(tx *regTx) {
	w.stripRegisterAnswer(false)
	if !w.finish() {
		return
	}
	w.obs.Registration(tx.kind(), false)
	w.finishRegister(tx, append([]byte(nil), w.out...), w.m.Status())
	if tx.over != nil && tx.over.Phase == sa.Temporary {
		w.table.Drop(tx.over, answerGrace)
	}
	w.verifyAfter(tx)
}

// kind says what a REGISTER is for.
func (tx *regTx) kind() observe.RegKind {
	switch {
	case tx.dereg:
		return observe.RegDereg
	case tx.associated:
		return observe.RegRefresh
	case tx.over == nil || tx.over.Phase == sa.Temporary && tx.over.Over == nil:
		return observe.RegInitial
	case tx.over.Phase == sa.Temporary:
		return observe.RegReauth
	}
	return observe.RegRefresh
}

// grantedExpiry reads how long the registration of the UE's contact lasts from a 200: its expires parameter, else the
// Expires header, else what RFC 3261 §10.2.1.1 says; zero when the contact is gone.
func (w *Worker) grantedExpiry(tx *regTx) time.Duration {
	if tx.dereg {
		return 0
	}
	def := time.Hour
	if n, err := strconv.ParseUint(string(w.m.Get(sipmsg.Expires)), 10, 32); err == nil {
		def = time.Duration(n) * time.Second
	}
	found, best := false, time.Duration(0)
	for _, v := range w.values(sipmsg.Contact) {
		for rest := []byte(v); len(rest) > 0; {
			var elem []byte
			elem, rest = sipmsg.Element(rest)
			na, err := sipmsg.ParseNameAddr(elem)
			if err != nil || !sameContact(string(na.URI), tx.contact) {
				continue
			}
			d := def
			if e, ok := sipmsg.Param(na.Params, "expires"); ok {
				if n, err := strconv.ParseUint(string(e), 10, 32); err == nil {
					d = time.Duration(n) * time.Second
				}
			}
			found, best = true, max(best, d)
		}
	}
	switch {
	case found:
		return best
	case w.m.Count(sipmsg.Contact) == 0 && tx.contact != "": // some registrars answer without the contact
		return def
	}
	return 0
}

// sameContact compares contact URIs by user, host and port (RFC 3261 §19.1.4, as far as registrars keep it).
func sameContact(a, b string) bool {
	if a == b {
		return true
	}
	var ua, ub sip.Uri
	if sip.ParseUri(a, &ua) != nil || sip.ParseUri(b, &ub) != nil {
		return false
	}
	if ua.User != ub.User || ua.Port != ub.Port {
		return false
	}
	ha, oka := sipmsg.ParseAddr([]byte(strings.Trim(ua.Host, "[]")))
	hb, okb := sipmsg.ParseAddr([]byte(strings.Trim(ub.Host, "[]")))
	if oka && okb {
		return ha == hb
	}
	return strings.EqualFold(ua.Host, ub.Host)
}

// learn stores what the 200 says about the user (TS 24.229 §5.2.2.2).
func (w *Worker) learn(u *registrar.UE, tx *regTx) {
	u.Contact = tx.contact
	u.Bind(registrar.Binding{IMPU: tx.impu, Associated: w.uris(sipmsg.PAssociatedURI)})
	routes := w.uris(sipmsg.ServiceRoute)
	if slices.Equal(routes, u.Routes()) && (u.NextHop.IsValid() || len(routes) == 0) {
		return
	}
	w.setServiceRoute(u, routes)
}

// setServiceRoute prepares the preloaded route of initial requests (RFC 3608 §6.1).
func (w *Worker) setServiceRoute(u *registrar.UE, routes []string) {
	u.Route, u.NextHop = nil, ims.Hop{}
	if len(routes) == 0 {
		return
	}
	if w.route == nil || !slices.Equal(routes, w.route.URIs) {
		w.route = newServiceRoute(routes) // most UEs of a core have the same, so they share the last one seen
	}
	u.Route = w.route
	w.findNextHop(u.Index, u.Gen)
}

func newServiceRoute(routes []string) *registrar.ServiceRoute {
	r := &registrar.ServiceRoute{URIs: routes, Row: "Route: <" + strings.Join(routes, ">, <") + ">\r\n"}
	for _, s := range routes {
		if uri, err := sipmsg.ParseURI([]byte(s)); err == nil {
			r.Hosts = append(r.Hosts, string(uri.Host))
		}
	}
	return r
}

// findNextHop resolves the first entry of the Service-Route. Until that is known initial requests go where the REGISTER
// went.
func (w *Worker) findNextHop(index uint32, gen uint16) {
	u := w.table.Lookup(index, gen)
	if u == nil || u.Route == nil {
		return
	}
	uri, err := sipmsg.ParseURI([]byte(u.Route.URIs[0]))
	if err != nil {
		return
	}
	h, state := w.resolve(&uri)
	switch state {
	case nameKnown:
		u.NextHop = h
	case namePending:
		w.whenResolved(string(uri.Host), func() { w.findNextHop(index, gen) })
	case nameUnknown:
	}
}

// uris returns the URIs of every element of a header.
func (w *Worker) uris(id sipmsg.HeaderID) []string {
	var out []string
	for _, v := range w.values(id) {
		for rest := []byte(v); len(rest) > 0; {
			var elem []byte
			elem, rest = sipmsg.Element(rest)
			if na, err := sipmsg.ParseNameAddr(elem); err == nil {
				out = append(out, string(na.URI))
			}
		}
	}
	return out
}

// bareServer is the Security-Server row of an answer that has no SA set: our list, without SPIs and ports
// (RFC 3329 §2.3.1).
func bareServer(suites []ims.Suite) string {
	var b strings.Builder
	b.WriteString("Security-Server: ")
	for i, s := range suites {
		if i > 0 {
			b.WriteString(", ")
		}
		q := max(1, 900-100*i)
		b.WriteString("ipsec-3gpp;q=0." + strings.TrimRight(padded(q), "0") + ";alg=" + s.Alg.String() +
			";ealg=" + s.Enc.String() + ";prot=esp;mod=trans")
	}
	return b.String() + "\r\n"
}

func padded(q int) string {
	s := strconv.Itoa(q)
	return strings.Repeat("0", 3-len(s)) + s
}

// statusPhrase returns the reason phrase of a configurable status.
func statusPhrase(code int) string {
	switch code {
	case 400:
		return "Bad Request"
	case 403:
		return "Forbidden"
	case 420:
		return "Bad Extension"
	case 421:
		return "Extension Required"
	case 430:
		return "Flow Failed"
	case 480:
		return "Temporarily Unavailable"
	case 488:
		return "Not Acceptable Here"
	case 494:
		return "Security Agreement Required"
	case 500:
		return "Server Internal Error"
	case 503:
		return "Service Unavailable"
	case 504:
		return "Server Time-out"
	}
	return "Refused"
}
