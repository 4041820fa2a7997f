package e2e

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/bench/core"
	"github.com/gmgate/gmgate/bench/lab"
	"github.com/gmgate/gmgate/bench/ue"
	"github.com/gmgate/gmgate/control/ims"
)

// ownSubscribes returns the SUBSCRIBE requests of the daemon's own that reached the core, retransmissions left out.
func (f *fixture) ownSubscribes() []core.Seen {
	seen := map[string]bool{}
	return f.atCore(func(s core.Seen) bool {
		via := s.Headers("Via")
		if s.Method != "SUBSCRIBE" || s.Status != 0 || len(via) != 1 || strings.Contains(via[0], ",") || seen[via[0]] {
			return false
		}
		seen[via[0]] = true
		return true
	})
}

// wantSubscribed waits until so many subscriptions of the daemon stand.
func (f *fixture) wantSubscribed(ctx context.Context, t *testing.T, n float64) {
	t.Helper()
	if !eventually(ctx, 5*time.Second, func() bool { return f.metric(ctx, t, "reg_subscriptions", `state="active"`) == n }) {
		t.Fatalf("%g subscriptions stand, want %g", f.metric(ctx, t, "reg_subscriptions", `state="active"`), n)
	}
}

// lone is a registered phone, its identity, and the daemon's subscription to it.
func (f *fixture) lone(ctx context.Context, t *testing.T, change ...func(*ue.Config)) (u *ue.UE, impu string) {
	t.Helper()
	f.mu.Lock()
	impu = f.subs[f.next].IMPU[0]
	f.mu.Unlock()
	u = f.newUE(t, change...)
	before := f.metric(ctx, t, "reg_subscriptions", `state="active"`)
	f.mustRegister(ctx, t, u)
	f.wantSubscribed(ctx, t, before+1)
	return u, impu
}

// mt sends a MESSAGE of the network to a phone, to where it was last where its registration is over.
func (f *fixture) mt(ctx context.Context, t *testing.T, impu string, ended bool) int {
	t.Helper()
	a, err := f.core.Send(ctx, core.Request{IMPU: impu, Body: "from the network", Ended: ended})
	if err != nil {
		t.Fatal(err)
	}
	return a.Status
}

// TestNetworkDeregistration: the core ends a registration (R5.52). The phone gets its NOTIFY over the SA and answers it,
// nothing new gets through in either direction, and the SAs go.
//
// Peers: B3.15
func TestNetworkDeregistration(t *testing.T) {
	for _, tt := range []struct {
		name  string
		tr    ims.Transport
		event string
		cfg   fixtureConfig
	}{
		{"UDP", ims.UDP, "deactivated", fixtureConfig{}},
		{"TCP", ims.TCP, "rejected", fixtureConfig{}},
		{"IPv6", ims.UDP, "expired", fixtureConfig{ipv6: true}},
		{"TCP towards the core", ims.UDP, "unregistered", fixtureConfig{daemon: lab.DaemonOptions{MwTransport: "tcp"}, core: core.Behaviour{TCP: true}}},
		{"NOTIFY before the 200", ims.UDP, "probation", fixtureConfig{core: core.Behaviour{NotifyFirst: true}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := start(t, tt.cfg)
			ctx := timed(t)
			u, impu := f.lone(ctx, t, func(c *ue.Config) { c.Transport = tt.tr })
			sub, err := u.Subscribe(ctx, "reg")
			if err != nil || sub.Status != 200 {
				t.Fatalf("SUBSCRIBE of the phone: %d, %v", sub.Status, err)
			}
			if err := f.core.Deregister(impu, tt.event); err != nil {
				t.Fatal(err)
			}
			if !eventually(ctx, 5*time.Second, func() bool {
				for _, in := range u.Received() {
					if in.Method == "NOTIFY" && in.CallID == sub.Notify.CallID && strings.Contains(in.Body, tt.event) {
						return true
					}
				}
				return false
			}) {
				t.Error("the phone did not get its NOTIFY")
			}
			if !eventually(ctx, 5*time.Second, func() bool {
				return len(f.atCore(func(s core.Seen) bool {
					return s.Method == "NOTIFY" && s.Status == 200 && s.CallID == sub.Notify.CallID && s.CSeq == 2
				})) > 0
			}) {
				t.Error("the phone's answer did not reach the core")
			}
			label := fmt.Sprintf("event=%q", tt.event)
			if !eventually(ctx, 5*time.Second, func() bool { return f.metric(ctx, t, "network_deregistrations_total", label) == 1 }) {
				t.Fatal("the daemon did not take the phone for de-registered")
			}
			if status := f.mt(ctx, t, impu, true); status != 480 && status != 430 {
				t.Errorf("MESSAGE to the phone was answered %d", status)
			}
			if status, err := u.Message(ctx, impu, "am I still there?"); err != nil || status != 403 {
				t.Errorf("MESSAGE of the phone was answered %d, %v", status, err)
			}
			f.wantNoSets(ctx, t)
			checkPhones(t, u)
		})
	}
}

// TestRegistersAgain: a phone that was told to register again, and has, stays.
func TestRegistersAgain(t *testing.T) {
	f := start(t, fixtureConfig{})
	ctx := timed(t)
	u, impu := f.lone(ctx, t)
	other, otherIMPU := f.lone(ctx, t)
	if err := f.core.Deregister(impu, "deactivated"); err != nil {
		t.Fatal(err)
	}
	f.mustRegister(ctx, t, u)
	f.wantSubscribed(ctx, t, 2)
	time.Sleep(oldSet + time.Second) // what was to go has gone
	if status := f.mt(ctx, t, impu, false); status != 200 {
		t.Errorf("MESSAGE to the phone was answered %d", status)
	}
	f.mustMessage(ctx, t, u, otherIMPU)
	checkPhones(t, u, other)
}

// TestLostNotify: documents are missing, so the daemon asks for the full state (R5.51), and the phone stays.
func TestLostNotify(t *testing.T) {
	f := start(t, fixtureConfig{core: core.Behaviour{PartialNotify: true}})
	ctx := timed(t)
	_, impu := f.lone(ctx, t)
	f.core.SetBehaviour(core.Behaviour{PartialNotify: true, LoseNotify: true})
	if err := f.core.Tell(impu); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond) // it is lost in its own time
	f.core.SetBehaviour(core.Behaviour{PartialNotify: true})
	if err := f.core.Tell(impu); err != nil {
		t.Fatal(err)
	}
	if !eventually(ctx, 5*time.Second, func() bool { return len(f.ownSubscribes()) == 2 }) {
		t.Fatalf("%d SUBSCRIBE of the daemon, want the first one and a refresh", len(f.ownSubscribes()))
	}
	if subs := f.ownSubscribes(); subs[0].CallID != subs[1].CallID || subs[1].CSeq != 2 {
		t.Errorf("not a refresh: %s", subs[1])
	}
	f.wantSubscribed(ctx, t, 1)
	if got := f.metric(ctx, t, "reg_notifies_total", `result="gap"`); got != 1 {
		t.Errorf("%g gaps", got)
	}
	if status := f.mt(ctx, t, impu, false); status != 200 {
		t.Errorf("MESSAGE to the phone was answered %d", status)
	}
	// What comes after the full state is understood again.
	if err := f.core.Deregister(impu, "expired"); err != nil {
		t.Fatal(err)
	}
	f.wantNoSets(ctx, t)
}

// TestShortened: the core shortens a registration, and the SAs end with it (R5.53).
func TestShortened(t *testing.T) {
	f := start(t, fixtureConfig{daemon: lab.DaemonOptions{LifetimeMargin: time.Second}})
	ctx := timed(t)
	_, impu := f.lone(ctx, t)
	if err := f.core.Shorten(impu, time.Second); err != nil {
		t.Fatal(err)
	}
	if !eventually(ctx, 5*time.Second, func() bool {
		return f.metric(ctx, t, "network_deregistrations_total", `event="shortened"`) == 1
	}) {
		t.Fatal("not taken over")
	}
	f.wantNoSets(ctx, t)
}

// TestCoreWithoutRegEvent: a core that refuses subscriptions, or sends what nobody can read, harms no phone.
func TestCoreWithoutRegEvent(t *testing.T) {
	for _, tt := range []struct {
		name      string
		behaviour core.Behaviour
		metric    string
		label     string
	}{
		{"489", core.Behaviour{RefuseSubscribe: 489}, "reg_subscriptions_lost_total", `reason="refused"`},
		{"403", core.Behaviour{RefuseSubscribe: 403}, "reg_subscriptions_lost_total", `reason="refused"`},
		{"garbage", core.Behaviour{MalformedNotify: true}, "reg_notifies_total", `result="malformed"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := start(t, fixtureConfig{core: tt.behaviour, daemon: lab.DaemonOptions{Workers: 1}})
			ctx := timed(t)
			first := f.newUE(t)
			f.mustRegister(ctx, t, first)
			if !eventually(ctx, 5*time.Second, func() bool { return f.metric(ctx, t, tt.metric, tt.label) > 0 }) {
				t.Fatal("not counted")
			}
			f.life(t, f.newPair(ctx, t))
			if n := len(f.ownSubscribes()); tt.name == "489" && n != 1 {
				t.Errorf("%d SUBSCRIBE to a core that does not know the event package", n)
			}
		})
	}
}

// TestDeregistrationAfterCrash: the subscriptions of a daemon that was killed are gone, the registrations are not. The core
// ends one right after the start, when nobody has subscribed again yet, and one later.
func TestDeregistrationAfterCrash(t *testing.T) {
	f := start(t, fixtureConfig{daemon: lab.DaemonOptions{StorePath: filepath.Join(t.TempDir(), "store.db")}})
	ctx := timed(t)
	_, early := f.lone(ctx, t)
	_, late := f.lone(ctx, t)
	f.kept(ctx, t, 2)
	if err := f.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	d, err := f.lab.StartDaemon(ctx, binary(t), f.config, nil)
	if err != nil {
		t.Fatal(err)
	}
	f.daemon = d
	if got := f.metric(ctx, t, "ues", `state="registered"`); got != 2 {
		t.Fatalf("%g registrations have survived", got)
	}
	if err := f.core.Deregister(early, "deactivated"); err != nil {
		t.Fatal(err)
	}
	f.wantSubscribed(ctx, t, 1)
	deregistered := func(n float64) {
		t.Helper()
		if !eventually(ctx, 6*time.Second, func() bool {
			return f.metric(ctx, t, "network_deregistrations_total") == n
		}) {
			f.logMetrics(t)
			t.Fatalf("%g registrations ended by the core, want %g", f.metric(ctx, t, "network_deregistrations_total"), n)
		}
	}
	deregistered(1)
	if err := f.core.Deregister(late, "deactivated"); err != nil {
		t.Fatal(err)
	}
	deregistered(2)
	f.wantNoSets(ctx, t)
}
