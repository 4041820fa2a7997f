package registrar

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
)

// Association is what the P-CSCF needs to make an address association: where the REGISTER came from that the core has
// accepted in clear.
type Association struct {
	IMPI      string
	Public    []string // its public identities, as far as the core has told them
	Emergency bool
	Local     netip.AddrPort // our unprotected address
	UE        netip.AddrPort // source of the REGISTER
	Conn      ims.ConnID     // its connection; zero: UDP
}

// Key returns the name of the UE context.
func (a *Association) Key() Key {
	return Key{IMPI: a.IMPI, Addr: a.UE.Addr(), Emergency: a.Emergency, Clear: true}
}

// Holder returns the address association of a flow on the unprotected port: over UDP the one of its source address and
// port, over TCP the one of its connection. It returns nil where there is none.
func (t *Table) Holder(f ims.Flow) *Set {
	s := t.byTuple[t.tuple(f.Local, f.Remote)] // no ESP packet comes in here, so there is no label
	if s == nil || !s.Clear || s.ConnIn != f.Conn || s.OverTCP != (f.Conn != 0) {
		return nil
	}
	return s
}

// Associate makes an address association after the 200 to a REGISTER in clear, or moves the life of the one that is
// there (TS 24.229 §5.2.2.3). Another one of the same UE ends: the phone has changed its port, or its connection. An identity
// with SAs gets none (ErrProtected), nor does a phone at an address where one of its public identities has SAs, nor does one whose address and port belong to another identity (ErrAddressConflict).
//
// A phone that makes an emergency registration from the port of its normal one has both contexts; what comes from the
// port counts as of the normal one.
func (t *Table) Associate(a *Association, life time.Duration) (*Set, error) {
	if t.Protected(a.IMPI) || t.protectedAt(a.UE.Addr(), a.Public) {
		return nil, ErrProtected
	}
	k := t.tuple(a.Local, a.UE)
	held := t.byTuple[k]
	if held != nil && held.UE.IMPI != a.IMPI {
		if !held.removing {
			return nil, ErrAddressConflict
		}
		t.remove(held) // de-registered, and somebody else is there now
		held = nil
	}
	u := t.Context(a.Key())
	if u == nil {
		if u = t.add(a.Key(), a.Local.Addr()); u == nil {
			return nil, ErrTooManySets
		}
	}
	if i := slices.IndexFunc(u.Sets, func(s *Set) bool { return s.is(a) }); i >= 0 {
		t.Refresh(u.Sets[i], life)
		return u.Sets[i], nil
	}
	t.nextID++
	s := &Set{
		UE: u, Clear: true, Phase: sa.Established, Serial: u.freeSerial(), OverTCP: a.Conn != 0, ConnIn: a.Conn, Used: true,
		Params: sa.Params{
			ID: uint64(t.worker)<<48 | t.nextID, Label: t.label(u),
			Local: a.Local.Addr(), UE: a.UE.Addr(),
			Ports: ims.Ports{UC: a.UE.Port(), US: a.UE.Port(), PC: a.Local.Port(), PS: a.Local.Port()},
		},
	}
	before := slices.Clone(u.Sets)
	u.Sets, u.Current = append(u.Sets, s), s
	if held == nil || held.UE.Emergency || held.UE == u {
		t.byTuple[k] = s
	}
	t.obs.Associations(1)
	for _, o := range before {
		t.remove(o)
	}
	t.register(u, Accepted)
	t.arm(s, life)
	t.Changed(u)
	return s, nil
}

// is reports whether an association is the one that is asked for.
func (s *Set) is(a *Association) bool {
	return s.Local == a.Local.Addr() && s.Ports.PS == a.Local.Port() && s.Ports.UC == a.UE.Port() && s.ConnIn == a.Conn &&
		s.OverTCP == (a.Conn != 0)
}

// Dissociate ends an address association at once: its connection is gone, and with it the way to the phone.
func (t *Table) Dissociate(s *Set) {
	if s.Clear {
		t.remove(s)
	}
}

// Disconnected ends every address association of a connection at once that is gone: that of a normal registration, and that of
// an emergency one.
func (t *Table) Disconnected(addr netip.Addr, c ims.ConnID) {
	for _, s := range t.setsAt(addr) {
		if s.Clear && s.OverTCP && s.ConnIn == c {
			t.remove(s)
		}
	}
}

// DissociateAll ends every address association of an IMPI at once: it has security associations now, and must not be
// reached in clear any more.
func (t *Table) DissociateAll(impi string) {
	for _, u := range t.OfIMPI(impi) {
		if !u.Clear {
			continue
		}
		t.register(u, Ended)
		for _, s := range slices.Clone(u.Sets) {
			t.remove(s)
		}
	}
}

// protectedAt reports whether a phone at an address has confirmed SA sets under one of these public identities. It is the
// same phone then, whatever it calls itself in private: without Authorization its IMPI is but derived from what it
// registers (TS 33.203 Annex T). Elsewhere it may be another device of the same user.
func (t *Table) protectedAt(addr netip.Addr, public []string) bool {
	return slices.ContainsFunc(t.setsAt(addr), func(s *Set) bool {
		return !s.Clear && (s.Phase == sa.Established || s.Phase == sa.Old) && s.UE.shares(public)
	})
}

// shares reports whether one of the public identities belongs to the UE.
func (u *UE) shares(public []string) bool {
	is := func(id string) bool {
		return slices.ContainsFunc(public, func(p string) bool { return strings.EqualFold(p, id) })
	}
	return slices.ContainsFunc(u.Bindings, func(b Binding) bool { return is(b.IMPU) || slices.ContainsFunc(b.Associated, is) })
}

// DissociateAt ends every address association at the address of a UE that shares a public identity with it: the phone has
// security associations now.
func (t *Table) DissociateAt(u *UE) {
	var public []string
	for _, b := range u.Bindings {
		public = append(append(public, b.IMPU), b.Associated...)
	}
	for _, s := range t.setsAt(u.Addr) {
		if s.Clear && s.UE.shares(public) {
			t.remove(s)
		}
	}
}
