package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/bench/core"
	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/bench/lab"
)

// TestMwFromPhones: what comes on the Mw side is trusted, and a phone that has been in a dialog with another one knows the other's
// flow token by its Record-Route. Hosts accept packets for any address of theirs on any interface, so a phone that can send to the Mw
// address would speak as the core. mw.interface and mw.sources each keep it out; without them the network has to.
func TestMwFromPhones(t *testing.T) {
	for _, c := range []struct {
		name    string
		options lab.DaemonOptions
		reaches bool
	}{
		{"nothing keeps it out", lab.DaemonOptions{}, true},
		{"interface", lab.DaemonOptions{MwInterface: lab.LinkMw}, false},
		{"interface and core over TCP", lab.DaemonOptions{MwInterface: lab.LinkMw, MwTransport: "tcp"}, false},
		{"sources", lab.DaemonOptions{MwSources: []string{"10.0.1.0/24", "2001:db8:1::/64"}}, false},
	} {
		for _, v6 := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s over %s", c.name, family(v6)), func(t *testing.T) {
				f := start(t, fixtureConfig{ipv6: v6, clear: strangerRules(), daemon: c.options})
				ctx := timed(t)
				a, b := f.newUE(t), f.newUE(t)
				f.mustRegister(ctx, t, a)
				f.mustRegister(ctx, t, b)
				aID, bID := f.subs[0].IMPU[0], f.subs[1].IMPU[0]
				plan := f.lab.Plan()
				if err := f.lab.UE.AddRoute(lab.LinkUE, netip.PrefixFrom(plan.Mw, plan.Mw.BitLen()), plan.Gm); err != nil {
					t.Fatal(err)
				}
				path := pathOf(t, f.core, bID)
				u, err := sipwire.ParseURI(path)
				if err != nil {
					t.Fatal(err)
				}
				mw := netip.AddrPortFrom(plan.Mw, u.Port)
				s := f.newStranger(t, plan.UE(0), 0)
				forged := func(id string) string {
					return strings.Replace(s.message("MESSAGE", aID, bID, id), "Max-Forwards", "Route: <"+path+">\r\nMax-Forwards", 1)
				}
				if _, err := s.udp.WriteToUDPAddrPort([]byte(forged("stranger-udp")), mw); err != nil {
					t.Fatal(err)
				}
				dial, cancel := context.WithTimeout(ctx, time.Second)
				defer cancel()
				if conn, err := sipwire.DialTCP(dial, f.lab.UE, netip.AddrPortFrom(s.addr.Addr(), 0), mw); err == nil {
					defer conn.Close()                                                                    // nothing to lose
					_, _ = conn.Write([]byte(strings.Replace(forged("stranger-tcp"), "/UDP", "/TCP", 1))) // it may be reset already
				}
				if c.reaches {
					if _, err := b.WaitReceived(ctx, "MESSAGE", 2); err != nil {
						t.Errorf("this test does not show what it should: %v", err)
					}
					return
				}
				f.mustMessage(ctx, t, a, bID) // the core still gets through, both ways, and after what was forged
				for _, in := range b.Received() {
					if strings.HasPrefix(in.CallID, "stranger") {
						t.Errorf("the phone got %s %s", in.Method, in.CallID)
					}
				}
			})
		}
	}
}

// pathOf returns the URI of the Path that the core has for an identity.
func pathOf(t *testing.T, c *core.Core, impu string) string {
	t.Helper()
	for _, b := range c.Registered() {
		for _, id := range b.IMPU {
			if id == impu && len(b.Path) == 1 {
				return strings.Trim(b.Path[0], "<>")
			}
		}
	}
	t.Fatalf("no Path of %s", impu)
	return ""
}
