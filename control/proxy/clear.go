package proxy

import (
	"errors"
	"net/netip"
	"strings"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// Registrations in clear: SIP digest without TLS (TS 24.229 §5.2.2.3) and GIBA (§5.2.2.6, TS 33.203 Annex T), where the policy
// allows them. The core authenticates them, so a source address says as much as digest does: who can send from the phone's
// address and port after its REGISTER can send in its name. What IPsec gives is not touched by that: an identity that has SAs
// gets no association, and loses those it has when it gets SAs; and where a phone is reached is decided by nothing but a
// REGISTER that the core has authenticated.

// Values of integrity-protected for SIP digest without TLS (TS 24.229 §7.2A.2).
const (
	assocPending = "ip-assoc-pending"
	assocYes     = "ip-assoc-yes"
)

// clearBits are the bits of a token that name a context of a registration in clear.
const clearBits = 40

// clearName names the UE context of a registration in clear in Path. Unlike an index it is known before there is a context, so
// that a REGISTER which nobody has authenticated takes none.
func (w *Worker) clearName(k registrar.Key) uint64 {
	a := k.Addr.As16()
	kind := []byte("clear")
	if k.Emergency {
		kind = []byte("sos")
	}
	return w.seal.mac(&w.sc, kind, []byte(k.IMPI), a[:]) >> (64 - clearBits)
}

// clearToken is the token of such a context in Path.
func (w *Worker) clearToken(k registrar.Key) token {
	n := w.clearName(k)
	return token{kind: tokenClear, worker: uint8(w.id), ue: uint32(n >> 16), gen: uint16(n)}
}

// renameClear has the tokens lead here which contexts in clear have got from the workers that they were with in earlier runs.
func (w *Worker) renameClear(k *Kept) {
	names := make(map[Name]Name)
	for i := range k.UEs {
		u := &k.UEs[i]
		if len(u.Former) == 0 || len(u.Sets) == 0 || !u.Sets[0].Clear {
			continue
		}
		t := w.clearToken(registrar.Key{IMPI: canonicalIMPI(u.IMPI), Addr: u.Addr, Emergency: u.Emergency, Clear: true})
		for _, f := range u.Former {
			if int(f.Worker) != w.id {
				names[Name{uint8(f.Worker), t.ue, t.gen}] = Name{t.worker, t.ue, t.gen} //nolint:gosec // at most 256 workers
			}
		}
	}
	w.cfg.Fleet.clear.setAll(names)
}

// ueOf returns the context that a token of Path or Record-Route names, or nil.
func (w *Worker) ueOf(t token) *registrar.UE {
	if t.kind == tokenClear {
		return w.inClear[uint64(t.ue)<<16|uint64(t.gen)]
	}
	return w.table.Lookup(t.ue, t.gen)
}

// noteClear makes a context in clear known by the name in its Path. It reports false where another one has the name.
func (w *Worker) noteClear(u *registrar.UE) bool {
	n := w.clearName(u.Key())
	if o := w.inClear[n]; o != nil && o != u {
		return false
	}
	w.inClear[n] = u
	if w.cfg.Fleet != nil { // its address has been moved here since
		t := w.clearToken(u.Key())
		if own := (Name{t.worker, t.ue, t.gen}); w.cfg.Fleet.clear.newest(own) != own {
			w.cfg.Fleet.clear.remove(own)
		}
	}
	return true
}

func (w *Worker) forgetClear(u *registrar.UE) {
	if n := w.clearName(u.Key()); w.inClear[n] == u {
		delete(w.inClear, n)
	}
}

// passThrough prepares a REGISTER that is to pass in clear.
func (w *Worker) passThrough(tx *regTx, refuse func(int, string, string, observe.Reason, ...string) *regTx) bool {
	tx.clear = true
	if w.table.Protected(tx.impi) {
		refuse(403, "Forbidden", "Security-Client: missing, and the identity has security associations", observe.ReasonDowngrade)
		return false
	}
	switch s := w.table.Holder(tx.flow); {
	case s == nil || s.Dropped():
	case s.UE.IMPI == tx.impi:
		tx.associated = true
	case tx.response: // without one the identity is but guessed from To
		refuse(w.cfg.StatusTaken, statusPhrase(w.cfg.StatusTaken),
			"Authorization: address and port belong to another registration", observe.ReasonAddressConflict)
		return false
	}
	return true
}

// clearIntegrity returns integrity-protected of a REGISTER that passes in clear. An association alone is not enough for
// ip-assoc-yes: a core may take that for an authentication, and UDP sources can be forged. The phone's own credentials have to
// be there as well, as they are in every re-registration that repeats the last ones (TS 24.229 §5.1.1.4.3).
func (w *Worker) clearIntegrity(tx *regTx) string {
	switch {
	case !tx.response:
		return w.cfg.ClearIntegrity
	case tx.associated:
		return assocYes
	}
	return assocPending
}

// unlessProtected goes on with a REGISTER in clear if no other worker has SAs of its identity either.
func (w *Worker) unlessProtected(tx *regTx, then func()) {
	check := func(elsewhere bool, err error) {
		switch {
		case w.txs[tx.key] != tx || tx.final != nil: // given up meanwhile
		case err != nil:
			w.registerFailed(tx, 503, "Service Unavailable", err.Error(), observe.ReasonBusy, retryAfter)
		case elsewhere || w.table.Protected(tx.impi):
			w.registerFailed(tx, 403, "Forbidden", "Security-Client: missing, and the identity has security associations",
				observe.ReasonDowngrade)
		default:
			then()
		}
	}
	if w.cfg.Fleet == nil {
		check(false, nil)
		return
	}
	q := w.asking[tx.impi]
	if q == nil {
		q = new(asking)
		w.asking[tx.impi] = q
	}
	q.open++
	w.cfg.Fleet.anyOther(w, func(o *Worker) bool { return o.protects(tx.impi) }, func(elsewhere bool, err error) {
		if q.open--; q.open == 0 {
			delete(w.asking, tx.impi)
		}
		check(elsewhere || q.protected, err)
	})
}

// asking is what a worker has to know of an identity while it asks the others about it.
type asking struct {
	open      int  // questions
	protected bool // one of them has told us of SAs, which may be after its answer
}

// registeredClear handles a 2xx to a REGISTER that passed in clear. answer is what the phone gets.
func (w *Worker) registeredClear(tx *regTx, answer []byte, expires time.Duration) {
	if !tx.response && (tx.authorization || !tx.policy.GIBA) {
		w.registerFailed(tx, 500, "Server Internal Error", "core accepted a registration without authentication",
			observe.ReasonChallengeWithoutKeys)
		return
	}
	key := w.keyOf(tx)
	switch u := w.table.Context(key); {
	case tx.contact == "" && !tx.dereg: // asks what is registered
		w.finishRegister(tx, answer, 200)
		return
	case expires <= 0:
		w.finishRegister(tx, answer, 200)
		w.obs.Registration(observe.RegDereg, true)
		if u == nil {
			return
		}
		if u.Unbind(tx.impu) {
			return
		}
		w.table.Deregister(u, w.cfg.Registrar.OldSet)
		return
	}
	// The other workers are asked once more: the identity may have got its SAs while the core was thinking.
	tx.busy = true
	core := append([]byte(nil), w.m.Bytes()...)
	w.unlessProtected(tx, func() { w.associate(tx, core, answer, expires) })
}

// associate makes the association and answers. core is the 200.
func (w *Worker) associate(tx *regTx, core, answer []byte, expires time.Duration) {
	public := []string{tx.impu}
	if w.m.Scan(core) == nil {
		public = append(public, w.uris(sipmsg.PAssociatedURI)...)
	}
	s, err := w.table.Associate(&registrar.Association{
		IMPI: tx.impi, Public: public, Emergency: tx.emergency, Local: tx.flow.Local, UE: tx.flow.Remote, Conn: tx.flow.Conn,
	}, expires+w.cfg.LifetimeExtra)
	if errors.Is(err, registrar.ErrProtected) {
		w.registerFailed(tx, 403, "Forbidden", "Security-Client: missing, and the identity has security associations",
			observe.ReasonDowngrade)
		return
	}
	if err != nil {
		w.registerFailed(tx, w.cfg.StatusTaken, statusPhrase(w.cfg.StatusTaken), err.Error(), observe.ReasonAddressConflict)
		return
	}
	if !w.noteClear(s.UE) {
		w.table.Dissociate(s)
		w.registerFailed(tx, 503, "Service Unavailable", "the flow cannot be named", observe.ReasonBusy, retryAfter)
		return
	}
	w.table.Hear(s)
	if s.ConnIn != 0 {
		w.conns[s.ConnIn] = s
	}
	if w.m.Scan(core) == nil {
		w.learn(s.UE, tx)
	}
	w.table.Trim(s.UE, maxContexts)
	s.UE.Expires = w.eg.Now().Add(expires)
	w.obs.Registration(tx.kind(), true)
	w.metrics.ObserveRegistration(w.eg.Now().Sub(tx.began))
	w.finishRegister(tx, answer, 200)
}

// endClear ends the associations of an identity wherever they are: it has SAs now.
func (w *Worker) endClear(impi string) {
	w.table.DissociateAll(impi)
	if w.cfg.Fleet != nil {
		w.cfg.Fleet.insist(w, func(o *Worker) {
			o.table.DissociateAll(impi)
			if q := o.asking[impi]; q != nil {
				q.protected = true
			}
		})
	}
}

// sendClear sends a message to a phone that has registered in clear: on the connection of its REGISTER, or to the address and
// port that it came from.
func (w *Worker) sendClear(s *registrar.Set, msg []byte, method sipmsg.Method) {
	if !s.OverTCP {
		w.countOut(ims.GmClear, ims.UDP, method, msg)
		w.count(w.eg.SendUDP(
			netip.AddrPortFrom(s.Local, s.Ports.PC), netip.AddrPortFrom(s.Params.UE, s.Ports.US), msg))
		return
	}
	w.countOut(ims.GmClear, ims.TCP, method, msg)
	if s.ConnIn == 0 || w.eg.SendTCP(s.ConnIn, msg) != nil { // it may have closed before the core's 200 came
		w.obs.Drop(observe.ReasonUEUnreachable)
		w.table.Dissociate(s)
	}
}

// domainOf returns the host of a SIP URI, nothing of another one.
func domainOf(uri string) string {
	u, err := sipmsg.ParseURI([]byte(uri))
	if err != nil {
		return ""
	}
	return strings.ToLower(string(u.Host))
}

// sos reports whether a contact is that of an emergency registration (TS 24.229 §7.2A.13).
func sos(contact []byte) bool {
	u, err := sipmsg.ParseURI(contact)
	if err != nil {
		return false
	}
	_, ok := sipmsg.Param(u.Params, "sos")
	return ok
}
