package observe

import "testing"

func TestRegEvents(t *testing.T) {
	m := New(2)
	r := register(t, m)
	for i := range 2 {
		c := m.Worker(i)
		c.Subscriptions(SubscriptionSubscribing, 1)
		c.Subscriptions(SubscriptionSubscribing, -1)
		c.Subscriptions(SubscriptionActive, 1)
		c.Subscribe(SubscribeAccepted)
		c.Subscribe(subscribeEnd)
		c.Notify(NotifyGap)
		c.Network(NetworkDeactivated)
		c.SubscriptionLost(LossGivenUp)
	}
	for sample, want := range map[string]float64{
		`gmgate_reg_subscriptions{state="subscribing"}`:             0,
		`gmgate_reg_subscriptions{state="active"}`:                  2,
		`gmgate_reg_subscribes_total{result="accepted"}`:            2,
		`gmgate_reg_subscribes_total{result="refused"}`:             0,
		`gmgate_reg_subscribes_total{result="unknown"}`:             2,
		`gmgate_reg_notifies_total{result="gap"}`:                   2,
		`gmgate_network_deregistrations_total{event="deactivated"}`: 2,
		`gmgate_network_deregistrations_total{event="doubted"}`:     0,
		`gmgate_reg_subscriptions_lost_total{reason="given_up"}`:    2,
		`gmgate_reg_subscriptions_lost_total{reason="no_resource"}`: 0,
	} {
		if got := value(t, r, sample); got != want {
			t.Errorf("%s = %v, want %v", sample, got, want)
		}
	}
	for got, want := range map[string]string{
		Subscription(0).String(): "Subscription(0x0)", networkEnd.String(): "NetworkEvent(0x9)",
		NotifyTooLarge.String(): "too_large", LossRejected.String(): "rejected", SubscribeForked.String(): "forked",
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
