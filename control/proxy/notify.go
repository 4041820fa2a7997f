package proxy

import (
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/regevent"
	"github.com/gmgate/gmgate/control/reginfo"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// notifyForUs handles a NOTIFY whose Request-URI is the Contact of one of our subscriptions. It reports false for another,
// such as one that names no UE. Those for UEs come with our Path as their Route and are forwarded as they are.
func (w *Worker) notifyForUs(f ims.Flow) bool {
	m := &w.m
	uri, err := sipmsg.ParseURI(m.RequestURI())
	if err != nil || len(uri.User) != tokenLen || !w.ownMw(&uri) {
		return false
	}
	refuse := func(why observe.Reason) bool { // the notifier then forgets the subscription, RFC 6665 §4.2.2
		w.obs.Notify(observe.NotifyRefused)
		w.refuse(f, nil, 481, "Call/Transaction Does Not Exist", "", why)
		return true
	}
	t, ok := w.seal.open(&w.sc, uri.User)
	if !ok || t.kind != tokenNotify {
		return refuse(observe.ReasonForgedToken)
	}
	if int(t.worker) != w.id {
		if int(t.worker) >= w.cfg.Workers || f.Conn != 0 || w.eg.Hand(int(t.worker), f, m.Bytes()) != nil {
			return refuse(observe.ReasonStaleToken)
		}
		return true
	}
	u := w.table.Lookup(t.ue, t.gen)
	if u == nil {
		return refuse(observe.ReasonStaleToken)
	}
	s := w.subscriptionOf(u)
	if s == nil || s.dialog == nil {
		return refuse(observe.ReasonStaleToken)
	}
	w.notified(f, s)
	return true
}

// notified handles a NOTIFY for the subscription of a UE.
func (w *Worker) notified(f ims.Flow, s *subscription) {
	m := &w.m
	v := s.dialog.Notify(m)
	if !v.Process() {
		result := observe.NotifyRefused
		if v.Status == 200 {
			result = observe.NotifyRepeated
		}
		w.obs.Notify(result)
		w.answerNotify(s, f, v.Status)
		return
	}
	var doc *reginfo.Document
	switch v.Event.Body {
	case regevent.Document:
		var err error
		if doc, err = reginfo.Parse(m.Body()); err != nil {
			w.log.Info("reginfo cannot be read", "impi", s.ue.IMPI, "error", err)
			v.Event.Body = regevent.Malformed
			w.obs.Notify(observe.NotifyMalformed)
		}
	case regevent.NoBody:
		w.obs.Notify(observe.NotifyEmpty)
	case regevent.Unsupported:
		w.obs.Notify(observe.NotifyUnsupported)
	case regevent.Malformed:
	}
	apply := w.subscriptionEvent(s, f, v.Event)
	switch {
	case apply:
		if w.applyReginfo(s, doc) {
			w.subscriptionEvent(s, ims.Flow{}, regevent.Event{Kind: regevent.Gap})
		}
	case doc != nil: // of a subscription that is over, or pending
		w.obs.Notify(observe.NotifyStale)
	}
	if s.doubt != 0 && v.Event.Kind == regevent.NotifyTerminated && v.Event.Reason == regevent.NoResource && w.trusted(s) {
		w.endedByCore(s, s.doubt) // asked again, the core knows of no registration at all
	}
	w.verify(s)
}

// answerNotify answers the current message, a NOTIFY.
func (w *Worker) answerNotify(s *subscription, f ims.Flow, status int) {
	local := w.local(s, ims.Hop{Addr: f.Remote})
	w.out = s.dialog.Answer(w.out[:0], &local, &w.m, f.Remote, status)
	w.sendReply(f, nil, w.out)
}

// lost is an identity under which our contact is not registered any more.
type lost struct {
	identity string
	event    observe.NetworkEvent
}

// applyReginfo carries out what the core says of the UE's registrations (TS 24.229 §5.2.3, RFC 3680 §5). It reports whether
// documents are missing before this one.
func (w *Worker) applyReginfo(s *subscription, doc *reginfo.Document) (gap bool) {
	u := s.ue
	unseen := localize(u, doc)
	s.view.Own = func(aor, uri string) bool { return uri == u.Contact && known(u, aor) }
	changes, err := s.view.Apply(doc)
	s.view.Own = nil
	s.view.Share(append(slices.Clone(u.Identities), u.Contact)...)
	switch {
	case errors.Is(err, reginfo.ErrStale):
		w.obs.Notify(observe.NotifyStale)
		return false
	case errors.Is(err, reginfo.ErrTable):
		w.obs.Notify(observe.NotifyTooLarge)
		return false
	case err != nil:
		w.obs.Notify(observe.NotifyGap)
		gap = true
	default:
		w.obs.Notify(observe.NotifyApplied)
	}
	if u.State != registrar.Registered || s.ended {
		return gap
	}
	gone, shortened := ours(s, changes)
	if unseen && !w.anyBound(s) && !s.unseen {
		// Either the phone is registered no more and another device is, or the registrar writes our contact in a way that
		// we do not recognize. Nothing says that it has ended, so it has not: in the first case the lifetime of the SAs
		// ends it, in the second one a phone that works would be cut off.
		s.unseen = true
		w.log.Info("reginfo does not show the contact of a registered phone", "impi", u.IMPI, "contact", u.Contact)
	}
	trusted := w.trusted(s)
	switch {
	case s.doubt != 0 && w.anyBound(s):
		s.doubt = 0 // what was doubted is out of date
	case s.doubt != 0 && s.doubt != observe.NetworkShortened && trusted && doc.State == reginfo.Full:
		w.endedByCore(s, s.doubt)
		return gap
	}
	if !trusted && (len(gone) > 0 || shortened >= 0) {
		s.doubt = observe.NetworkShortened
		if len(gone) > 0 {
			s.doubt = gone[0].event
		}
		w.obs.Network(observe.NetworkDoubted)
		return gap
	}
	if shortened >= 0 {
		w.shorten(u, shortened)
	}
	w.drop(s, gone)
	return gap
}

// localize writes what a document says of our contact and identities as we do, so that from then on both are compared
// octet by octet. What is active counts as ours when user and host are, since registrars write ports and parameters as
// they like and a phone that works must not be cut off for that; what is terminated only when the port is ours as well,
// because the same phone may have been there with another port before. unseen reports that a full document has an
// identity of ours as active and our contact not among its contacts.
func localize(u *registrar.UE, doc *reginfo.Document) (unseen bool) {
	for i := range doc.Registrations {
		r := &doc.Registrations[i]
		id, ok := identify(u, r.AOR)
		if !ok {
			continue
		}
		r.AOR = id
		found := false
		for j := range r.Contacts {
			c := &r.Contacts[j]
			if c.URI == "" {
				continue
			}
			if sameContact(c.URI, u.Contact) || c.State == reginfo.Active && sameContact(portless(c.URI), portless(u.Contact)) {
				c.URI, found = u.Contact, true
			}
		}
		if !found && doc.State == reginfo.Full && r.State == reginfo.Active && len(r.Contacts) > 0 {
			unseen = true
		}
	}
	return unseen
}

// portless returns a contact URI without port and parameters.
func portless(uri string) string {
	p, err := sipmsg.ParseURI([]byte(uri))
	if err != nil {
		return uri
	}
	host := string(p.Host)
	if strings.Contains(host, ":") && host[0] != '[' {
		host = "[" + host + "]"
	}
	return "sip:" + string(p.User) + "@" + host
}

// identify returns an address of record as we have it among the identities of a UE.
func identify(u *registrar.UE, aor string) (string, bool) {
	bare, _, _ := strings.Cut(aor, ";")
	match := func(id string) bool {
		idBare, _, _ := strings.Cut(id, ";")
		return strings.EqualFold(bare, idBare)
	}
	for _, b := range u.Bindings {
		if match(b.IMPU) {
			return b.IMPU, true
		}
		if i := slices.IndexFunc(b.Associated, match); i >= 0 {
			return b.Associated[i], true
		}
	}
	return "", false
}

// known reports whether an identity is of a binding of the UE.
func known(u *registrar.UE, identity string) bool {
	return slices.ContainsFunc(u.Bindings, func(b registrar.Binding) bool { return of(b, identity) })
}

func of(b registrar.Binding, identity string) bool {
	return b.IMPU == identity || slices.Contains(b.Associated, identity)
}

// ours picks from the changes what concerns our contact: the identities under which it has ended, and the seconds that it
// was shortened to, -1 if it was not.
func ours(s *subscription, changes []reginfo.Change) (gone []lost, shortened time.Duration) {
	u := s.ue
	shortened = -1
	event := observe.NetworkUnstated
	for i := range changes {
		c := &changes[i]
		mine := c.Contact.URI == u.Contact
		if !known(u, c.AOR) || s.view.Bound(c.AOR, u.Contact) && c.Kind != reginfo.ContactShortened {
			continue
		}
		switch c.Kind {
		case reginfo.ContactTerminated:
			if mine {
				event = networkEvent(c.Contact.Event)
				gone = append(gone, lost{c.AOR, event})
			}
		case reginfo.ContactShortened:
			if d := time.Duration(c.Contact.Expires.Value) * time.Second; mine && (shortened < 0 || d < shortened) {
				shortened = d
			}
		case reginfo.RegistrationTerminated:
			gone = append(gone, lost{c.AOR, event})
		case reginfo.AllGone: // says nothing that the others do not
		}
	}
	return gone, shortened
}

// networkEvent is the label of an event that ends a contact.
func networkEvent(e reginfo.Event) observe.NetworkEvent {
	switch e {
	case reginfo.Expired:
		return observe.NetworkExpired
	case reginfo.Deactivated:
		return observe.NetworkDeactivated
	case reginfo.Probation:
		return observe.NetworkProbation
	case reginfo.Unregistered:
		return observe.NetworkUnregistered
	case reginfo.Rejected:
		return observe.NetworkRejected
	default:
		return observe.NetworkUnstated
	}
}

// anyBound reports whether the core has our contact registered under any identity of the UE.
func (w *Worker) anyBound(s *subscription) bool {
	return slices.ContainsFunc(s.ue.Bindings, func(b registrar.Binding) bool { return bound(s, b) })
}

// bound reports whether the core has our contact registered under an identity of the binding.
func bound(s *subscription, b registrar.Binding) bool {
	return s.view.Bound(b.IMPU, s.ue.Contact) ||
		slices.ContainsFunc(b.Associated, func(id string) bool { return s.view.Bound(id, s.ue.Contact) })
}

// drop takes identities away from the UE that are registered no more. An implicit set ends as a whole, unless the core
// still has one of its identities with our contact: then the user's profile has changed, and the phone stays.
func (w *Worker) drop(s *subscription, gone []lost) {
	if len(gone) == 0 {
		return
	}
	u := s.ue
	for _, b := range slices.Clone(u.Bindings) {
		i := slices.IndexFunc(gone, func(l lost) bool { return of(b, l.identity) })
		switch {
		case i < 0:
		case bound(s, b):
			for _, l := range gone {
				u.Withdraw(l.identity)
			}
		case len(u.Bindings) == 1:
			w.endedByCore(s, gone[i].event)
			return
		default:
			w.obs.Network(gone[i].event)
			w.log.Info("identity de-registered by the core", "impi", u.IMPI, "impu", b.IMPU, "event", gone[i].event.String())
			u.Unbind(b.IMPU)
		}
	}
	w.table.Changed(u)
}

// endedByCore ends the registration of a UE. Its sets stay for 64*T1 so that the UE still gets its own NOTIFY over them and
// can answer; what is new is refused from now on, but for REGISTER (TS 24.229 §5.2.5.2). A registration that the phone has
// begun meanwhile goes on.
func (w *Worker) endedByCore(s *subscription, event observe.NetworkEvent) {
	u := s.ue
	w.obs.Network(event)
	w.log.Info("de-registered by the core", "impi", u.IMPI, "ue", u.Addr, "event", event.String())
	u.Bindings, u.Identities, u.Beside = nil, nil, nil
	w.table.Dismiss(u, w.cfg.Registrar.OldSet)
	w.unwatch(u, false)
}

// shorten takes over an expiry that the core has shortened. It does so once for each document that says so, since the
// seconds count from then.
func (w *Worker) shorten(u *registrar.UE, expires time.Duration) {
	if !w.eg.Now().Add(expires).Before(u.Expires) {
		return
	}
	w.obs.Network(observe.NetworkShortened)
	w.log.Info("registration shortened by the core", "impi", u.IMPI, "expires", expires)
	u.Expires = w.eg.Now().Add(expires)
	w.table.Shorten(u, expires+w.cfg.LifetimeExtra)
}
