package proxy

import (
	"bytes"
	cryptorand "crypto/rand"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/regevent"
	"github.com/gmgate/gmgate/control/reginfo"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/wheel"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// RegEvent rules the subscriptions to the registration state of the UEs. The zero value makes none.
type RegEvent struct {
	Enabled bool
	Expires time.Duration // least expiry that is asked for
	URI     string        // our SIP URI; empty: made from Config.PathHost or the Mw address
}

const (
	// timerF ends a SUBSCRIBE without an answer, and bounds how old a NOTIFY can be that arrives: 64*T1 (RFC 3261
	// §17.1.2).
	timerF = 64 * coreT1
	// refusedHold is how long nothing is subscribed for after the core has said that it does not know the method or the
	// event package: that is no matter of one UE.
	refusedHold = 10 * time.Minute
	// resubscribePace is the mean time between two SUBSCRIBE of a worker after a restart.
	resubscribePace = 5 * time.Millisecond
)

// subscription is our subscription to the registration state of one UE (TS 24.229 §5.2.3). It exists for as long as the
// UE context, and is kept small, since there is one for every UE: of the four timers of the state machine at most two
// run at a time, the SUBSCRIBE is there only while it is under way, and the view holds nothing but our own contact.
type subscription struct {
	ue     *registrar.UE
	m      regevent.Subscription
	dialog *regevent.Dialog
	view   reginfo.Tracker
	tx     *subscribeTx // the newest SUBSCRIBE, until it is answered

	expiry wheel.Timer
	other  wheel.Timer // refresh, retry or notify

	// What the core says of the UE may be older than the UE's newest registration, see trusted. Turns order what has
	// happened in one tick of the clock.
	registered uint64               // the turn of the newest 200
	since      time.Duration        // its time, on the worker's clock
	known      uint64               // the turn of the newest SUBSCRIBE that the notifier has certainly got
	armed      regevent.Timer       // which of them other is
	doubt      observe.NetworkEvent // zero, or what the core said and was not believed
	asked      bool                 // a new dialog was made because of the doubt, once for each registration
	ended      bool                 // the registration is over
	unseen     bool                 // it was logged that the core does not know our contact
}

// refusedSubscription stands for one that the core has refused for good: nothing else is kept of it.
var refusedSubscription = new(subscription)

// subscribeTx is a SUBSCRIBE on its way: a non-INVITE client transaction (RFC 3261 §17.1.2).
type subscribeTx struct {
	digits   uint64
	turn     uint64
	until    time.Duration // timer F, on the worker's clock
	inDialog bool
	expires  uint32
	msg      []byte // nil until the hop is known
	hop      ims.Hop
	resend   time.Duration
	timer    wheel.Timer
}

// subscriptions are those of one worker.
type subscriptions struct {
	byUE    []*subscription // by UE.Index
	cfg     regevent.Config
	uri     string    // ours
	epoch   time.Time // of the worker's clock
	holdoff time.Time // nothing is subscribed for until then
	turn    uint64    // counts SUBSCRIBEs and registrations; makes Call-IDs and branches unique
	actions []regevent.Action
}

func (w *Worker) startSubscriptions() {
	s := &w.subs
	s.cfg = regevent.DefaultConfig(rand.Float64)
	s.cfg.Expires = w.cfg.RegEvent.Expires
	s.epoch = w.eg.Now()
	// The token key outlives the process: no Call-ID or branch may come a second time.
	var first [8]byte
	_, _ = cryptorand.Read(first[:]) // never fails
	s.turn = binary.BigEndian.Uint64(first[:]) >> 1
	if s.uri = w.cfg.RegEvent.URI; s.uri == "" {
		s.uri = "sip:" + w.ownHost()
	}
}

// ownHost names us in URIs as Path and Record-Route do.
func (w *Worker) ownHost() string {
	if w.cfg.PathHost == "" {
		return w.mwAddr(w.cfg.NextHops[0].Addr.Addr()).String()
	}
	return w.ownName + ":" + strconv.Itoa(int(w.mwPort))
}

// clock is the time since the worker began: shorter than a time.Time.
func (w *Worker) clock() time.Duration { return w.eg.Now().Sub(w.subs.epoch) }

// wantsSubscription reports whether the registration of a UE is one to subscribe for: a UE of which the core has told no
// identity is not (TS 24.229 §5.2.3).
func wantsSubscription(u *registrar.UE) bool {
	return len(u.Identities) > 0 && !u.Emergency && !u.Clear
}

func (w *Worker) subscriptionOf(u *registrar.UE) *subscription {
	if int(u.Index) >= len(w.subs.byUE) {
		return nil
	}
	return w.subs.byUE[u.Index]
}

// watch makes or keeps up the subscription of a UE whose registration was accepted for this time (TS 24.229 §5.2.3).
// initial says that the phone has started over: then it gets a new dialog, so that nothing which was on its way about
// the registration before can touch this one. The notifier learns from a 481 that the old one is gone.
func (w *Worker) watch(u *registrar.UE, expires time.Duration, initial bool) {
	if !w.cfg.RegEvent.Enabled || !wantsSubscription(u) {
		return
	}
	s := w.subscriptionOf(u)
	if s == refusedSubscription && !initial {
		return
	}
	if s == nil || s == refusedSubscription || initial || s.ended {
		w.unsubscribed(u)
		if w.eg.Now().Before(w.subs.holdoff) {
			return
		}
		s = w.newSubscription(u)
	}
	w.subs.turn++
	s.registered, s.since, s.asked = w.subs.turn, w.clock(), false
	w.subscriptionEvent(s, ims.Flow{}, regevent.Event{Kind: regevent.Registered, Expires: seconds32(expires)})
	w.verify(s)
}

func (w *Worker) newSubscription(u *registrar.UE) *subscription {
	s := &subscription{ue: u, m: regevent.New(false)}
	for int(u.Index) >= len(w.subs.byUE) {
		w.subs.byUE = append(w.subs.byUE, nil)
	}
	w.subs.byUE[u.Index] = s
	return s
}

// resubscribe makes new subscriptions for the registrations that have survived a restart: the dialogs have not. They are
// spread over some time, for the sake of the core. Until then a NOTIFY gets 481, and the full state comes afterwards.
func (w *Worker) resubscribe() {
	if !w.cfg.RegEvent.Enabled {
		return
	}
	spread := max(w.subs.cfg.Spread, time.Duration(w.table.UEs())*resubscribePace)
	w.table.Each(func(u *registrar.UE) bool {
		w.resubscribeUE(u, spread)
		return true
	})
}

// resubscribeUE does so for one of them, within some time.
func (w *Worker) resubscribeUE(u *registrar.UE, spread time.Duration) {
	if !w.cfg.RegEvent.Enabled || u.State != registrar.Registered || !wantsSubscription(u) {
		return
	}
	s := w.newSubscription(u)
	w.wheel.Schedule(&s.other, time.Duration(w.subs.cfg.Jitter()*float64(spread)), func() {
		w.watch(u, u.Expires.Sub(w.eg.Now()), false)
	})
}

// unwatch ends a subscription with the registration. silent means that the core has not heard of the end.
func (w *Worker) unwatch(u *registrar.UE, silent bool) {
	s := w.subscriptionOf(u)
	if s == nil || s == refusedSubscription || s.ended {
		return
	}
	s.ended, s.doubt = true, 0
	w.subscriptionEvent(s, ims.Flow{}, regevent.Event{Kind: regevent.Deregistered, Silent: silent})
}

// unsubscribed forgets the subscription of a UE.
func (w *Worker) unsubscribed(u *registrar.UE) {
	s := w.subscriptionOf(u)
	if s == nil {
		return
	}
	w.subs.byUE[u.Index] = nil
	if s == refusedSubscription {
		w.obs.Subscriptions(observe.SubscriptionTerminated, -1)
		return
	}
	w.countSubscription(s, -1)
	w.wheel.Stop(&s.expiry)
	w.wheel.Stop(&s.other)
	if s.tx != nil {
		w.wheel.Stop(&s.tx.timer)
		s.tx = nil
	}
}

// contextGone ends the subscription of a UE whose last SA set is gone. Should it have to be ended at the notifier that is
// tried once: the 481 that its next NOTIFY gets does the same.
func (w *Worker) contextGone(u *registrar.UE) {
	w.unwatch(u, u.State == registrar.Registered)
	w.unsubscribed(u)
}

func (w *Worker) countSubscription(s *subscription, delta int) {
	switch s.m.State() {
	case regevent.Subscribing:
		w.obs.Subscriptions(observe.SubscriptionSubscribing, delta)
	case regevent.Active:
		w.obs.Subscriptions(observe.SubscriptionActive, delta)
	case regevent.Refreshing:
		w.obs.Subscriptions(observe.SubscriptionRefreshing, delta)
	case regevent.Waiting:
		w.obs.Subscriptions(observe.SubscriptionWaiting, delta)
	case regevent.Terminated:
		w.obs.Subscriptions(observe.SubscriptionTerminated, delta)
	default: // regevent.None: not begun
	}
}

// subscriptionEvent gives an event to the state machine and does what it says. f is the flow of a NOTIFY, which is then the
// current message. It reports whether the document of that NOTIFY is to be applied.
func (w *Worker) subscriptionEvent(s *subscription, f ims.Flow, e regevent.Event) (apply bool) {
	w.countSubscription(s, -1)
	from := s.m.State()
	s.m, w.subs.actions = regevent.Next(&w.subs.cfg, s.m, e, w.eg.Now(), w.subs.actions[:0])
	w.countSubscription(s, 1)
	for _, a := range w.subs.actions {
		switch a.Kind {
		case regevent.Subscribe:
			w.subscribe(s, a.InDialog, a.Expires)
		case regevent.Answer:
			w.answerNotify(s, f, a.Status)
		case regevent.Arm:
			w.armSubscription(s, a.Timer, a.After)
		case regevent.Stop:
			w.stopSubscription(s, a.Timer)
		case regevent.Apply:
			apply = true
		case regevent.Report:
			w.subscriptionLost(s, a.Loss, e.Status)
		case regevent.Unexpected:
			w.metrics.UnexpectedEvent("reg_event", from.String(), e.Kind.String())
		}
	}
	return apply
}

func (w *Worker) armSubscription(s *subscription, t regevent.Timer, after time.Duration) {
	if t == regevent.TimerExpiry {
		w.wheel.Schedule(&s.expiry, after, func() { w.subscriptionEvent(s, ims.Flow{}, regevent.TimerExpiry.Event()) })
		return
	}
	s.armed = t
	w.wheel.Schedule(&s.other, after, func() { w.subscriptionEvent(s, ims.Flow{}, s.armed.Event()) })
}

func (w *Worker) stopSubscription(s *subscription, t regevent.Timer) {
	if t == regevent.TimerExpiry {
		w.wheel.Stop(&s.expiry)
		return
	}
	if t == s.armed { // another one may have taken its place by now
		w.wheel.Stop(&s.other)
	}
}

// subscriptionLost notes that the core will not tell us of de-registrations: the SA sets then end by their lifetime.
func (w *Worker) subscriptionLost(s *subscription, l regevent.Loss, status int) {
	w.log.Info("no subscription to the registration state", "impi", s.ue.IMPI, "reason", l.String(), "code", status)
	switch l {
	case regevent.LossRefused:
		w.obs.SubscriptionLost(observe.LossRefused)
	case regevent.LossRejected:
		w.obs.SubscriptionLost(observe.LossRejected)
	case regevent.LossNoResource:
		w.obs.SubscriptionLost(observe.LossNoResource)
	case regevent.LossGivenUp:
		w.obs.SubscriptionLost(observe.LossGivenUp)
	}
}

// subscribe starts a SUBSCRIBE; the one before it, if any, is over.
func (w *Worker) subscribe(s *subscription, inDialog bool, expires uint32) {
	w.endSubscribe(s)
	w.subs.turn++
	tx := &subscribeTx{
		digits: w.seal.mac(&w.sc, []byte("subscribe"), w.hex64(w.subs.turn)), turn: w.subs.turn,
		until: w.clock() + timerF, inDialog: inDialog, expires: expires, resend: coreT1,
	}
	s.tx = tx
	if !inDialog {
		if err := w.newDialog(s); err != nil {
			w.log.Warn("cannot subscribe to the registration state", "impi", s.ue.IMPI, "error", err)
			w.wheel.Schedule(&tx.timer, 0, func() {
				w.subscribeEnded(s, tx, regevent.Event{Kind: regevent.Refused, Status: 400})
			})
			return
		}
	}
	w.routeSubscribe(s, tx)
}

func (w *Worker) newDialog(s *subscription) error {
	tag := string(w.hex64(w.seal.mac(&w.sc, []byte("reg tag"), w.hex64(w.subs.turn))))
	callID := string(w.hex64(w.seal.mac(&w.sc, []byte("reg call"), w.hex64(w.subs.turn)))) // after tag: both use one buffer
	callID += tag
	to := s.ue.Identities[0]
	for _, id := range s.ue.Identities { // TS 24.229 §5.2.3: a SIP URI where there is one
		if strings.HasPrefix(id, "sip") {
			to = id
			break
		}
	}
	d, err := regevent.NewDialog(to, callID, tag, s.ue.Routes())
	if errors.Is(err, regevent.ErrRoute) { // then by the next hop alone, as the REGISTER
		d, err = regevent.NewDialog(to, callID, tag, nil)
	}
	if err != nil {
		return err
	}
	s.dialog, s.known = d, w.subs.turn // whoever sends a NOTIFY in this dialog has got the SUBSCRIBE
	s.view.Restart()
	return nil
}

// routeSubscribe finds the next hop, and sends once it is known: the Service-Route as for initial requests of the UE, the
// REGISTER's next hop without one, the route set within the dialog.
func (w *Worker) routeSubscribe(s *subscription, tx *subscribeTx) {
	if !s.dialog.Established() {
		if tx.hop = s.ue.NextHop; !tx.hop.IsValid() {
			tx.hop = w.registrarHop()
		}
		w.writeSubscribe(s, tx)
		return
	}
	uri, err := sipmsg.ParseURI([]byte(s.dialog.NextHop()))
	state := nameUnknown
	if err == nil {
		tx.hop, state = w.resolve(&uri)
	}
	switch state {
	case nameKnown:
		w.writeSubscribe(s, tx)
	case namePending:
		w.wheel.Schedule(&tx.timer, tx.until-w.clock(), func() { w.subscribeTimer(s, tx) })
		w.whenResolved(string(uri.Host), func() {
			if s.tx == tx {
				w.routeSubscribe(s, tx)
			}
		})
	case nameUnknown:
		w.failSubscribe(s, tx)
	}
}

func (w *Worker) writeSubscribe(s *subscription, tx *subscribeTx) {
	t := token{kind: tokenSubscribe, worker: uint8(w.id), ue: s.ue.Index, gen: s.ue.Gen}
	branch := branchMark + string(w.seal.seal(&w.sc, t)) + string(w.hex64(tx.digits))
	local := w.local(s, tx.hop)
	tx.msg = s.dialog.Subscribe(nil, &local, regevent.Request{Branch: branch, Expires: tx.expires, Charging: w.charging(s)})
	w.sendSubscribe(s, tx)
}

// local is how the core sees us in this dialog. The user part of our Contact brings its requests back to the UE's context.
func (w *Worker) local(s *subscription, h ims.Hop) regevent.Local {
	t := token{kind: tokenNotify, worker: uint8(w.id), ue: s.ue.Index, gen: s.ue.Gen}
	contact := "sip:" + string(w.seal.seal(&w.sc, t)) + "@" + w.ownHost()
	if w.cfg.MwTransport == ims.TCP {
		contact += ";transport=tcp"
	}
	return regevent.Local{URI: w.subs.uri, Contact: contact, SentBy: w.mwAddr(h.Addr.Addr()), Transport: h.Transport}
}

// charging is the value of P-Charging-Vector, see putChargingVector.
func (w *Worker) charging(s *subscription) string {
	v := `icid-value="` + string(w.hex64(w.seal.mac(&w.sc, []byte("icid"), []byte(s.dialog.CallID())))) +
		`";icid-generated-at=`
	if a := w.mwAddr(w.cfg.NextHops[0].Addr.Addr()).Addr(); a.Is6() {
		v += "[" + a.String() + "]"
	} else {
		v += a.String()
	}
	if w.cfg.OrigIOI != "" {
		v += ";orig-ioi=" + w.cfg.OrigIOI
	}
	return v
}

func (w *Worker) sendSubscribe(s *subscription, tx *subscribeTx) {
	next := tx.until - w.clock()
	if tx.hop.Transport == ims.UDP {
		next = min(next, tx.resend)
		tx.resend = min(2*tx.resend, coreT2)
	}
	w.wheel.Schedule(&tx.timer, next, func() { w.subscribeTimer(s, tx) })
	w.sendToCore(tx.hop, tx.msg, sipmsg.MethodSubscribe, func() { w.failSubscribe(s, tx) })
}

func (w *Worker) subscribeTimer(s *subscription, tx *subscribeTx) {
	if w.clock() >= tx.until {
		w.subscribeEnded(s, tx, regevent.Event{Kind: regevent.TimedOut})
		return
	}
	w.sendSubscribe(s, tx)
}

// failSubscribe ends a SUBSCRIBE that cannot be sent. It does so by the timer, since it may be called while the state machine
// is at work.
func (w *Worker) failSubscribe(s *subscription, tx *subscribeTx) {
	if s.tx == tx {
		w.wheel.Schedule(&tx.timer, 0, func() { w.subscribeEnded(s, tx, regevent.Event{Kind: regevent.TimedOut}) })
	}
}

func (w *Worker) endSubscribe(s *subscription) {
	if s.tx != nil {
		w.wheel.Stop(&s.tx.timer)
		s.tx = nil
	}
}

// subscribeAnswer handles an answer to a SUBSCRIBE of ours. Its branch names the UE.
func (w *Worker) subscribeAnswer(t token, digits []byte) {
	m := &w.m
	u := w.table.Lookup(t.ue, t.gen)
	if u == nil {
		w.obs.Drop(observe.ReasonStaleToken)
		return
	}
	s := w.subscriptionOf(u)
	if s == nil || s.tx == nil || m.CSeqMethod() != sipmsg.MethodSubscribe || !bytes.Equal(w.hex64(s.tx.digits), digits) {
		w.obs.Drop(observe.ReasonUnknownResponse) // late, or a retransmission
		return
	}
	tx := s.tx
	e, final := regevent.ReadAnswer(m)
	switch {
	case !final:
		tx.resend = coreT2 // RFC 3261 §17.1.2.2
		return
	case e.Kind == regevent.Accepted:
		if err := s.dialog.Accepted(m); err != nil {
			w.obs.Subscribe(observe.SubscribeForked)
			w.subscribeEnded(s, tx, regevent.Event{Kind: regevent.TimedOut})
			return
		}
		s.known = max(s.known, tx.turn)
	}
	w.subscribeEnded(s, tx, e)
}

// subscribeEnded tells the state machine how a SUBSCRIBE ended.
func (w *Worker) subscribeEnded(s *subscription, tx *subscribeTx, e regevent.Event) {
	if s.tx != tx {
		return
	}
	w.endSubscribe(s)
	switch e.Kind {
	case regevent.Accepted:
		w.obs.Subscribe(observe.SubscribeAccepted)
	case regevent.Refused:
		w.obs.Subscribe(observe.SubscribeRefused)
	default:
		w.obs.Subscribe(observe.SubscribeUnanswered)
	}
	w.subscriptionEvent(s, ims.Flow{}, e)
	if e.Kind == regevent.Refused && !tx.inDialog {
		w.subscriptionRefused(s, e.Status)
	}
	w.verify(s)
}

// subscriptionRefused handles the refusal of a new subscription. One for good leaves nothing behind, and a core that does
// not know reg-event subscriptions is left alone for a while: it must not cost it, or us, anything.
func (w *Worker) subscriptionRefused(s *subscription, status int) {
	switch status {
	case 405, 489, 501:
		w.subs.holdoff = w.eg.Now().Add(refusedHold)
	case 404, 410, 480, 604:
		if s.doubt != 0 { // it has said that the registration is over, and now that it knows none
			w.endedByCore(s, s.doubt)
			return
		}
	}
	if s.m.State() == regevent.Terminated && !s.ended {
		s.ended = true
		w.unsubscribed(s.ue)
		w.subs.byUE[s.ue.Index] = refusedSubscription
		w.obs.Subscriptions(observe.SubscriptionTerminated, 1)
	}
}

// registering reports whether a protected REGISTER of the UE is under way.
func (w *Worker) registering(u *registrar.UE) bool {
	tx := w.newest[u.Key()]
	return tx != nil && tx.final == nil && tx.over != nil && tx.over.UE == u
}

// trusted reports whether what a NOTIFY says now is certainly newer than the registration as we know it: the notifier has
// got a SUBSCRIBE that was made since, or the registration is older than a NOTIFY can be that is still repeated. A phone
// that is told to register again is often faster than the NOTIFY which says so to us; to believe that one would cut off
// the phone. While a REGISTER is under way nobody knows which of the two the registrar has handled first.
func (w *Worker) trusted(s *subscription) bool {
	return !w.registering(s.ue) && (s.known > s.registered || w.clock()-s.since > timerF)
}

// verify has the notifier say again what was not believed.
func (w *Worker) verify(s *subscription) {
	if s.doubt == 0 || s.ended || w.registering(s.ue) {
		return
	}
	switch s.m.State() {
	case regevent.Active:
		w.subscriptionEvent(s, ims.Flow{}, regevent.Event{Kind: regevent.Gap})
	case regevent.Terminated: // with the registration that the notifier knew
		if s.asked {
			return
		}
		s.asked = true
		w.countSubscription(s, -1)
		s.m = regevent.New(false)
		left := s.ue.Expires.Sub(w.eg.Now())
		w.subscriptionEvent(s, ims.Flow{}, regevent.Event{Kind: regevent.Registered, Expires: seconds32(left)})
	default: // it is about to
	}
}

// verifyAfter is verify once a REGISTER has ended without a new registration.
func (w *Worker) verifyAfter(tx *regTx) {
	if tx.over == nil {
		return
	}
	if s := w.subscriptionOf(tx.over.UE); s != nil && s != refusedSubscription && s.ue == tx.over.UE {
		w.verify(s)
	}
}

func seconds32(d time.Duration) uint32 {
	return uint32(min(max(d/time.Second, 0), 1<<32-1))
}
