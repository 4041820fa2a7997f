package observetest

import (
	"testing"

	"github.com/gmgate/gmgate/control/observe"
)

func TestValue(t *testing.T) {
	m := observe.New(1)
	m.Worker(0).Notify(observe.NotifyGap)
	m.Worker(0).Subscriptions(observe.SubscriptionActive, 3)
	if got := Value(t, m, "reg_notifies_total", "result=gap"); got != 1 {
		t.Errorf("counter %v", got)
	}
	if got := Value(t, m, "reg_subscriptions", "state=active"); got != 3 {
		t.Errorf("gauge %v", got)
	}
	if got := Value(t, m, "registrations_total", "kind=dereg,result=success"); got != 0 {
		t.Errorf("counter that nobody touched %v", got)
	}
}
