package observe

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// Subscription is the state of a subscription to the registration state of a UE (TS 24.229 §5.2.3).
type Subscription uint8

// States of subscriptions.
const (
	SubscriptionSubscribing Subscription = iota + 1 // SUBSCRIBE sent, no NOTIFY yet
	SubscriptionActive                              // the core tells us of changes
	SubscriptionRefreshing                          // the same, with a SUBSCRIBE under way
	SubscriptionWaiting                             // there is none, the next attempt is due later
	SubscriptionTerminated                          // there is none, and will be none in this registration

	subscriptionEnd
)

var subscriptionNames = [subscriptionEnd]string{
	SubscriptionSubscribing: "subscribing", SubscriptionActive: "active", SubscriptionRefreshing: "refreshing",
	SubscriptionWaiting: "waiting", SubscriptionTerminated: "terminated",
}

// String returns the label value.
func (s Subscription) String() string { return label(subscriptionNames[:], s, "Subscription") }

// SubscribeResult is how a SUBSCRIBE of ours ended.
type SubscribeResult uint8

// Results of SUBSCRIBE.
const (
	SubscribeAccepted   SubscribeResult = iota + 1 // 2xx
	SubscribeRefused                               // 3xx to 6xx
	SubscribeUnanswered                            // Timer F, or no connection to the core
	SubscribeForked                                // 2xx of another dialog than the first (RFC 3680 §4.9)

	subscribeEnd
)

var subscribeNames = [subscribeEnd]string{
	SubscribeAccepted: "accepted", SubscribeRefused: "refused", SubscribeUnanswered: "unanswered", SubscribeForked: "forked",
}

// String returns the label value.
func (r SubscribeResult) String() string { return label(subscribeNames[:], r, "SubscribeResult") }

// NotifyResult is what became of a NOTIFY for us.
type NotifyResult uint8

// Results of NOTIFY.
const (
	NotifyApplied     NotifyResult = iota + 1 // its document was applied
	NotifyEmpty                               // without a document
	NotifyGap                                 // applied, but others are missing before it
	NotifyStale                               // its document is not newer than the last
	NotifyTooLarge                            // its document would exceed the bounds of a view
	NotifyMalformed                           // its document cannot be read
	NotifyUnsupported                         // another media type
	NotifyRepeated                            // a retransmission
	NotifyRefused                             // not of the subscription, out of order, or not understood

	notifyEnd
)

var notifyNames = [notifyEnd]string{
	NotifyApplied: "applied", NotifyEmpty: "empty", NotifyGap: "gap", NotifyStale: "stale", NotifyTooLarge: "too_large",
	NotifyMalformed: "malformed", NotifyUnsupported: "unsupported", NotifyRepeated: "repeated", NotifyRefused: "refused",
}

// String returns the label value.
func (r NotifyResult) String() string { return label(notifyNames[:], r, "NotifyResult") }

// NetworkEvent is why the core has ended or shortened a registration (RFC 3680 §4.7.1).
type NetworkEvent uint8

// Events.
const (
	NetworkShortened NetworkEvent = iota + 1
	NetworkExpired
	NetworkDeactivated
	NetworkProbation
	NetworkUnregistered
	NetworkRejected
	NetworkUnstated // the document does not say why
	NetworkDoubted  // not carried out: the phone may have registered again since

	networkEnd
)

var networkNames = [networkEnd]string{
	NetworkShortened: "shortened", NetworkExpired: "expired", NetworkDeactivated: "deactivated",
	NetworkProbation: "probation", NetworkUnregistered: "unregistered", NetworkRejected: "rejected",
	NetworkUnstated: "unstated", NetworkDoubted: "doubted",
}

// String returns the label value.
func (e NetworkEvent) String() string { return label(networkNames[:], e, "NetworkEvent") }

// Loss is why there is no subscription for a registration that goes on.
type Loss uint8

// Losses.
const (
	LossRefused    Loss = iota + 1 // by a status that will not change
	LossRejected                   // ended with reason=rejected
	LossNoResource                 // the core knows no such user
	LossGivenUp                    // too many failures in a row

	lossEnd
)

var lossNames = [lossEnd]string{
	LossRefused: "refused", LossRejected: "rejected", LossNoResource: "no_resource", LossGivenUp: "given_up",
}

// String returns the label value.
func (l Loss) String() string { return label(lossNames[:], l, "Loss") }

func label[T ~uint8](names []string, v T, kind string) string {
	if v == 0 || int(v) >= len(names) {
		return fmt.Sprintf("%s(%#x)", kind, uint8(v))
	}
	return names[v]
}

// regEvents counts what the subscriptions to registration states see.
type regEvents struct {
	subscriptions [subscriptionEnd]level
	subscribes    [subscribeEnd]count
	notifies      [notifyEnd]count
	network       [networkEnd]count
	losses        [lossEnd]count
}

// Subscriptions changes the number of subscriptions in a state.
func (c *Counters) Subscriptions(s Subscription, delta int) {
	c.reg.subscriptions[within(s, int(subscriptionEnd))].add(delta)
}

// Subscribe counts the end of one SUBSCRIBE of ours.
func (c *Counters) Subscribe(r SubscribeResult) { c.reg.subscribes[within(r, int(subscribeEnd))].inc() }

// Notify counts one NOTIFY for us.
func (c *Counters) Notify(r NotifyResult) { c.reg.notifies[within(r, int(notifyEnd))].inc() }

// Network counts one registration that the core has ended or shortened.
func (c *Counters) Network(e NetworkEvent) { c.reg.network[within(e, int(networkEnd))].inc() }

// SubscriptionLost counts one registration that goes on without a subscription.
func (c *Counters) SubscriptionLost(l Loss) { c.reg.losses[within(l, int(lossEnd))].inc() }

var (
	subscriptionsDesc = desc("reg_subscriptions", "Own subscriptions to the registration state of UEs by state.", "state")
	subscribesDesc    = desc("reg_subscribes_total", "SUBSCRIBE requests of gmgate that ended.", "result")
	notifiesDesc      = desc("reg_notifies_total", "NOTIFY requests for gmgate itself.", "result")
	networkDesc       = desc("network_deregistrations_total", "Registrations that the core has ended or shortened.", "event")
	lossesDesc        = desc("reg_subscriptions_lost_total", "Registrations that go on without a subscription.", "reason")
)

// collectRegEvents is the part of Collect for subscriptions.
func (w *workerCollector) collectRegEvents(
	counter func(*prometheus.Desc, uint64, ...string), gauge func(*prometheus.Desc, int64, ...string),
) {
	for s := range subscriptionEnd {
		if n := w.sumLevel(func(c *Counters) *level { return &c.reg.subscriptions[s] }); s != 0 || n != 0 {
			gauge(subscriptionsDesc, n, name(s))
		}
	}
	for r := range subscribeEnd {
		if n := w.sum(func(c *Counters) *count { return &c.reg.subscribes[r] }); r != 0 || n != 0 {
			counter(subscribesDesc, n, name(r))
		}
	}
	for r := range notifyEnd {
		if n := w.sum(func(c *Counters) *count { return &c.reg.notifies[r] }); r != 0 || n != 0 {
			counter(notifiesDesc, n, name(r))
		}
	}
	for e := range networkEnd {
		if n := w.sum(func(c *Counters) *count { return &c.reg.network[e] }); e != 0 || n != 0 {
			counter(networkDesc, n, name(e))
		}
	}
	for l := range lossEnd {
		if n := w.sum(func(c *Counters) *count { return &c.reg.losses[l] }); l != 0 || n != 0 {
			counter(lossesDesc, n, name(l))
		}
	}
}
