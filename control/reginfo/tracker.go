package reginfo

import (
	"errors"
	"fmt"
	"slices"
)

// Errors of Tracker.Apply.
var (
	// ErrGap: documents are missing before this one, which was applied as far as it goes. The subscription must be
	// refreshed to get the full state (RFC 3680 §5.1).
	ErrGap = errors.New("reginfo documents are missing")
	// ErrStale: the document is not newer than what was applied already, and was ignored.
	ErrStale = errors.New("reginfo document is not newer than the last")
	// ErrTable: with this document the view would exceed MaxRegistrations or MaxContacts; it was ignored.
	ErrTable = errors.New("too many registrations or contacts in one subscription")
)

// ChangeKind says what has changed.
type ChangeKind uint8

// Changes that concern a P-CSCF (TS 24.229 §5.2.3, §5.2.5.2).
const (
	// ContactTerminated: the contact is no longer bound to the address of record, by the Event of the contact.
	ContactTerminated ChangeKind = iota + 1
	// ContactShortened: the contact expires in Contact.Expires seconds. A later full document says it again.
	ContactShortened
	// RegistrationTerminated: no contact is bound to the address of record any more. The changes of its contacts come
	// before it.
	RegistrationTerminated
	// AllGone: no contact is left in any registration of the subscription. It comes last.
	AllGone
)

var changeNames = [...]string{
	ContactTerminated: "contact_terminated", ContactShortened: "contact_shortened",
	RegistrationTerminated: "registration_terminated", AllGone: "all_gone",
}

// String names the kind as metrics and logs do.
func (k ChangeKind) String() string { return name(changeNames[:], uint8(k), "ChangeKind") }

// Change is one change that a document brought.
type Change struct {
	Kind ChangeKind
	AOR  string // none with AllGone
	// Contact is the contact as the document has it, for the first two kinds.
	Contact Contact
	// Implied: the document does not say so itself. The contact or registration is missing in a full document, or the
	// contact went with its registration. Of the contact only ID and URI are known.
	Implied bool
}

// Tracker is the view that the documents of one subscription add up to: the contacts that are active. The zero value is
// ready for use.
type Tracker struct {
	// AnyFull applies full documents whatever their version, for registrars that do not count: some write version 0 into
	// every document. The order of NOTIFY requests within a dialog then has to do.
	AnyFull bool

	begun   bool // a document was applied since Restart
	whole   bool // a full document was applied and none is missing since
	version uint32

	// Own, if set, limits the view to the contacts for which it returns true. What documents say of others is reported
	// all the same, only they are never missed; AllGone means that none of the own ones is left.
	Own func(aor, uri string) bool

	regs []tracked
}

type tracked struct {
	id, aor  string
	contacts []binding
}

type binding struct{ id, uri string }

// Restart prepares for the documents of a new subscription: versions begin anew, the view stays, so that its first full
// document tells what has changed in between.
func (t *Tracker) Restart() { t.begun, t.whole = false, false }

// Version returns the version of the document applied last.
func (t *Tracker) Version() uint32 { return t.version }

// Whole reports whether the view is known to be complete.
func (t *Tracker) Whole() bool { return t.whole }

// Active returns the number of contacts in the view; one that is bound to several addresses of record counts for each.
func (t *Tracker) Active() int {
	n := 0
	for i := range t.regs {
		n += len(t.regs[i].contacts)
	}
	return n
}

// Bound reports whether the view has a contact with this URI, compared octet by octet, under the address of record.
func (t *Tracker) Bound(aor, uri string) bool { return bound(t.regs, aor, uri) }

func bound(regs []tracked, aor, uri string) bool {
	return slices.ContainsFunc(regs, func(r tracked) bool {
		return r.aor == aor && slices.ContainsFunc(r.contacts, func(b binding) bool { return b.uri == uri })
	})
}

// Share has the view use these strings in the place of its own where they are equal: what the caller keeps anyway need
// not be kept twice, by however many subscriptions there are.
func (t *Tracker) Share(known ...string) {
	share := func(s *string) {
		if i := slices.Index(known, *s); i >= 0 {
			*s = known[i]
		}
	}
	for i := range t.regs {
		r := &t.regs[i]
		share(&r.aor)
		for j := range r.contacts {
			share(&r.contacts[j].uri)
		}
	}
}

// Apply brings the view up to date (RFC 3680 §5.1) and returns what has changed. A full document replaces the view, and
// no document can be missed before it; a partial one changes what it names, and must be the next one. With ErrGap the
// changes are valid, only not all of them: what a document says is newer than what was missed.
func (t *Tracker) Apply(d *Document) ([]Change, error) {
	if t.begun && d.Versioned && (!t.AnyFull || d.State != Full) && d.Version <= t.version && d.Version != t.version+1 {
		return nil, fmt.Errorf("%w: version %d after %d", ErrStale, d.Version, t.version)
	}
	w := update{doc: d, old: t.regs, own: t.Own}
	w.run()
	if err := w.check(); err != nil {
		t.whole = false
		return nil, err
	}
	var gap error
	switch {
	case d.State == Full:
		t.whole = true
	case !t.begun:
		t.whole, gap = false, fmt.Errorf("%w: the first one is partial", ErrGap)
	case !d.Versioned:
		t.whole, gap = false, fmt.Errorf("%w: a partial one has no version", ErrGap)
	case d.Version != t.version+1:
		t.whole, gap = false, fmt.Errorf("%w: version %d after %d", ErrGap, d.Version, t.version)
	}
	changes := w.settled()
	if t.Own != nil { // nothing is kept of registrations without a contact of ours
		w.next = slices.Clone(slices.DeleteFunc(w.next, func(r tracked) bool { return len(r.contacts) == 0 }))
	}
	t.regs, t.begun = w.next, true
	if d.Versioned {
		t.version = d.Version
	}
	ended := slices.ContainsFunc(changes, func(c Change) bool { return c.Kind != ContactShortened })
	if ended && t.Active() == 0 && t.whole {
		changes = append(changes, Change{Kind: AllGone})
	}
	return changes, gap
}

// update is the work of one Apply: next is made from the old view and the document; the old view stays as it is.
type update struct {
	doc     *Document
	own     func(aor, uri string) bool
	old     []tracked
	next    []tracked
	changes []Change
}

func (w *update) run() {
	if w.doc.State == Partial {
		for _, r := range w.old {
			r.contacts = slices.Clone(r.contacts)
			w.next = append(w.next, r)
		}
	}
	for i := range w.doc.Registrations {
		r := &w.doc.Registrations[i]
		alive := slices.ContainsFunc(r.Contacts, func(c Contact) bool { return c.State == Active })
		// A registration in state init has no contacts (RFC 3680 §4.7.1); registrars which list some mean active.
		if r.State == Active || r.State == Init && alive {
			w.active(r)
		} else {
			w.over(r)
		}
	}
	if w.doc.State == Full {
		w.missing()
	}
}

// active takes over what the document says of a registration that goes on.
func (w *update) active(r *Registration) {
	n := index(w.next, r.ID)
	if n < 0 {
		n = len(w.next)
		w.next = append(w.next, tracked{id: r.ID, aor: r.AOR})
	}
	reg := &w.next[n]
	reg.aor = r.AOR
	for i := range r.Contacts {
		c := r.Contacts[i]
		c.URI = w.uri(r.ID, &c)
		reg.contacts = slices.DeleteFunc(reg.contacts, func(b binding) bool { return b.id == c.ID })
		if c.State == Terminated {
			w.changes = append(w.changes, Change{Kind: ContactTerminated, AOR: r.AOR, Contact: c})
			continue
		}
		if w.own == nil || w.own(r.AOR, c.URI) {
			reg.contacts = append(reg.contacts, binding{c.ID, c.URI})
		}
		if c.Event == Shortened && c.Expires.Set {
			w.changes = append(w.changes, Change{Kind: ContactShortened, AOR: r.AOR, Contact: c})
		}
	}
}

// over ends a registration with all its contacts, named or not.
func (w *update) over(r *Registration) {
	var known *tracked
	if n := index(w.old, r.ID); n >= 0 {
		known = &w.old[n]
	}
	w.next = slices.DeleteFunc(w.next, func(n tracked) bool { return n.id == r.ID })
	for i := range r.Contacts {
		c := r.Contacts[i]
		c.URI = w.uri(r.ID, &c)
		change := Change{Kind: ContactTerminated, AOR: r.AOR, Contact: c}
		if c.State == Active { // it cannot be: its event does not tell why it ended
			change.Contact.State, change.Contact.Event, change.Implied = Terminated, 0, true
		}
		w.changes = append(w.changes, change)
	}
	if known != nil {
		for _, b := range known.contacts {
			if !slices.ContainsFunc(r.Contacts, func(c Contact) bool { return c.ID == b.id }) {
				w.implied(r.AOR, b)
			}
		}
	}
	// One which was never heard of and is in state init has not begun.
	if r.State == Terminated || known != nil {
		w.changes = append(w.changes, Change{Kind: RegistrationTerminated, AOR: r.AOR})
	}
}

// missing ends what a full document does not mention.
func (w *update) missing() {
	for _, o := range w.old {
		n := slices.IndexFunc(w.doc.Registrations, func(r Registration) bool { return r.ID == o.id })
		if n < 0 {
			for _, b := range o.contacts {
				w.implied(o.aor, b)
			}
			w.changes = append(w.changes, Change{Kind: RegistrationTerminated, AOR: o.aor, Implied: true})
			continue
		}
		for _, b := range o.contacts {
			if index(w.next, o.id) >= 0 && !w.names(o.id, b.id) {
				w.implied(o.aor, b)
			}
		}
	}
}

func (w *update) implied(aor string, b binding) {
	w.changes = append(w.changes, Change{
		Kind: ContactTerminated, AOR: aor, Contact: Contact{ID: b.id, URI: b.uri, State: Terminated}, Implied: true,
	})
}

// names reports whether the document has this contact under this registration.
func (w *update) names(reg, contact string) bool {
	return slices.ContainsFunc(w.doc.Registrations, func(r Registration) bool {
		return r.ID == reg && slices.ContainsFunc(r.Contacts, func(c Contact) bool { return c.ID == contact })
	})
}

// uri returns the URI of a contact, from the view where the document leaves it out.
func (w *update) uri(reg string, c *Contact) string {
	if n := index(w.old, reg); c.URI == "" && n >= 0 {
		for _, b := range w.old[n].contacts {
			if b.id == c.ID {
				return b.uri
			}
		}
	}
	return c.URI
}

// check keeps the view within the bounds of a document: partial ones could make it grow without end.
func (w *update) check() error {
	contacts := 0
	for i := range w.next {
		contacts += len(w.next[i].contacts)
	}
	if len(w.next) > MaxRegistrations || contacts > MaxContacts {
		return fmt.Errorf("%w: %d registrations, %d contacts", ErrTable, len(w.next), contacts)
	}
	return nil
}

// settled returns the changes that the whole document leaves standing. Registrars make ids from memory addresses: a
// contact that was registered anew, or a registrar that has restarted, shows as one id that ended and another that is
// active, with the same URI. To take that as the end would cut off a phone that is registered.
func (w *update) settled() []Change {
	return slices.DeleteFunc(w.changes, func(c Change) bool {
		switch c.Kind {
		case ContactTerminated:
			return bound(w.next, c.AOR, c.Contact.URI)
		case RegistrationTerminated:
			return slices.ContainsFunc(w.next, func(r tracked) bool { return r.aor == c.AOR })
		default:
			return false
		}
	})
}

func index(regs []tracked, id string) int {
	return slices.IndexFunc(regs, func(r tracked) bool { return r.id == id })
}
