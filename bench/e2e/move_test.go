package e2e

import (
	"context"
	"strconv"
	"strings"
	"testing"

	"github.com/gmgate/gmgate/bench/ue"
)

// moveTries is how often a phone is moved that has something under way.
const moveTries = 200

// move gives a phone to the other one of two workers.
func (f *fixture) move(ctx context.Context, t *testing.T, e *end) {
	t.Helper()
	impi := f.subs[e.index].IMPI
	var last error
	for range moveTries {
		before, err := f.operate(ctx, t, "show", impi)
		if err != nil || len(before) != 1 {
			t.Fatalf("show %s: %+v, %v", impi, before, err)
		}
		worker, _, _ := strings.Cut(before[0].ID, "-")
		n, err := strconv.Atoi(worker)
		if err != nil {
			t.Fatal(err)
		}
		to := strconv.Itoa(1 - n)
		after, err := f.operate(ctx, t, "move", before[0].ID, to)
		if err == nil {
			if len(after) != 1 || !strings.HasPrefix(after[0].ID, to+"-") || after[0].IMPI != impi || len(after[0].Sets) != len(before[0].Sets) {
				t.Fatalf("move of %+v to worker %s: %+v", before[0], to, after)
			}
			for i, s := range after[0].Sets {
				if b := before[0].Sets[i]; s.ID != b.ID || s.SPIs != b.SPIs || s.Ports != b.Ports {
					t.Errorf("set %+v became %+v", b, s)
				}
			}
			return
		}
		if last = err; !strings.Contains(err.Error(), "busy") {
			break
		}
	}
	t.Fatalf("move %s: %v", impi, last)
}

// TestMove moves registered phones from worker to worker while they send and get messages: none is lost, their SAs stay, and so does what they can do afterwards. From then on the affinity map steers their packets.
func TestMove(t *testing.T) {
	rounds := 4
	if slowMachine() {
		rounds = 1
	}
	for _, v6 := range []bool{false, true} {
		t.Run(family(v6), func(t *testing.T) {
			f := start(t, fixtureConfig{ipv6: v6, log: loadLog, register: caseTimeout, await: caseTimeout})
			ctx := longer(t)
			var ends []*end
			for range 4 {
				ends = append(ends, f.phone(ctx, t, byUDP))
			}
			w := f.smallFlow(ctx, t, ends...)
			w.again = true // the branch of what we forward names worker and context
			w.turn(ctx, t)
			for range rounds {
				for _, e := range ends {
					f.move(ctx, t, e)
				}
				w.turn(ctx, t)
			}
			w.finish(t, ends...)

			f.move(ctx, t, ends[0]) // an odd number of moves: it is where the hash does not lead to
			for i, e := range ends {
				next := ends[(i+1)%len(ends)]
				if res, err := e.u.Call(ctx, next.uri, ue.CallOptions{PRACK: true}); err != nil || res.Status != 200 || res.Bye != 200 {
					t.Errorf("call from %s to %s: %+v, %v", e.uri, next.uri, res, err)
				}
				if status, err := f.core.SendMessage(ctx, e.uri, "still there?"); err != nil || status != 200 {
					t.Errorf("message to %s: %d, %v", e.uri, status, err)
				}
			}
			old := ends[0].u.Sets()
			f.behave(challenging, func() {
				res, err := ends[0].u.Reregister(ctx)
				if err != nil {
					t.Fatal(err)
				}
				checkRenewed(t, old[len(old)-1], res)
			})
			f.mustMessage(ctx, t, ends[0].u, ends[1].uri)
			if f.metric(ctx, t, "guard_info") > 0 && f.metric(ctx, t, "steered_packets_total", `by="affinity"`) == 0 {
				t.Error("nothing was steered by the affinity map")
			}
			if n := f.metric(ctx, t, "sip_drops_total", `reason="label_mismatch"`); n != 0 {
				t.Errorf("%g messages had the label of another UE context", n)
			}
			if backend() == "xfrm" && f.metric(ctx, t, "labelled_messages_total") == 0 {
				t.Error("the kernel's ESP has labelled nothing")
			}
			for _, e := range ends {
				if err := e.u.Deregister(ctx); err != nil {
					t.Errorf("%s: %v", e.uri, err)
				}
			}
			f.wantNoSets(ctx, t)
		})
	}
}
