package e2e

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/gmgate/gmgate/bench/core"
	"github.com/gmgate/gmgate/bench/ue"
	"github.com/gmgate/gmgate/control/ims"
)

// envRounds says how often each phone of TestReregisterUnderLoad registers again. Slow machines do with fewer.
const envRounds = "GMGATE_E2E_ROUNDS"

// Bounds of the tests with traffic.
const (
	loadTimeout = 3 * time.Minute
	loadPhones  = 8
	loadOldSet  = 20 * time.Second      // longer than any operation of a flow, so that what is lost is lost by a mistake
	loadDelay   = 50 * time.Millisecond // of each answer to a REGISTER: traffic goes on meanwhile
	loadLog     = 200_000               // messages
)

// longer bounds a case with traffic.
func longer(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), loadTimeout)
	t.Cleanup(cancel)
	return ctx
}

// samsung is the habit of R8.1 of the handset notes: REGISTER begins by UDP and goes on by TCP, so do messages, calls
// stay with UDP. apple is the other way round (R8.2).
func samsung(c *ue.Config) {
	c.Transport = ims.UDP
	c.Quirks.Transports = map[string]ims.Transport{"REGISTER": ims.TCP, "MESSAGE": ims.TCP}
}

func apple(c *ue.Config) {
	c.Transport = ims.TCP
	c.Quirks.Transports = map[string]ims.Transport{"MESSAGE": ims.UDP}
}

func byUDP(c *ue.Config) { c.Transport = ims.UDP }
func byTCP(c *ue.Config) { c.Transport = ims.TCP }

// TestReregisterUnderLoad has phones talk to each other without pause while each of them re-authenticates again and
// again, so that old, current and temporary SA sets coexist: every request reaches the other side once and is answered
// once (TS 33.203 §7.4).
func TestReregisterUnderLoad(t *testing.T) {
	rounds, err := strconv.Atoi(setting(envRounds, "5"))
	if err != nil || rounds < 1 {
		t.Fatalf("%s: %q", envRounds, setting(envRounds, ""))
	}
	for _, v6 := range []bool{false, true} {
		for _, mode := range []struct {
			name   string
			habits []func(*ue.Config)
		}{
			{"UDP", []func(*ue.Config){byUDP}},
			{"TCP", []func(*ue.Config){byTCP}},
			{"mixed", []func(*ue.Config){samsung, apple}},
		} {
			t.Run(fmt.Sprintf("%s over %s", mode.name, family(v6)), func(t *testing.T) {
				f := start(t, fixtureConfig{
					ipv6: v6, oldSet: loadOldSet, log: loadLog, register: caseTimeout,
					core: core.Behaviour{AlwaysChallenge: true, AnswerDelay: loadDelay},
				})
				ctx := longer(t)
				var ends []*end
				for i := range loadPhones {
					ends = append(ends, f.phone(ctx, t, mode.habits[i%len(mode.habits)]))
				}
				w := f.flow(ctx, t, ends...)
				w.turn(ctx, t)
				var wg sync.WaitGroup
				for _, e := range ends {
					wg.Go(func() { f.renewOften(ctx, t, w, e, rounds) })
				}
				peak := f.watchSets(ctx, t, &wg)
				if peak > 3*loadPhones {
					t.Errorf("%g SA sets at once, want 3 for each phone at most", peak)
				}
				w.turn(ctx, t)
				w.finish(t, ends...)
				t.Logf("up to %g SA sets at once for %d phones; %d ESP packets", peak, loadPhones, f.capture.Stats().ESPIn+f.capture.Stats().ESPOut)
			})
		}
	}
}

func family(v6 bool) string {
	if v6 {
		return "IPv6"
	}
	return "IPv4"
}

// renewOften re-authenticates a phone several times and checks what TS 33.203 §7.4 says about the new sets.
func (f *fixture) renewOften(ctx context.Context, t *testing.T, w *flow, e *end, rounds int) {
	sets := e.u.Sets()
	old := sets[len(sets)-1]
	for range rounds {
		res, err := e.u.Reregister(ctx)
		if err != nil {
			t.Errorf("%s: %v", e.uri, err)
			return
		}
		checkRenewed(t, old, res)
		old = res.Set
		if err := w.settle(ctx, e); err != nil {
			t.Errorf("%s: %v", e.uri, err)
			return
		}
	}
}

// checkRenewed compares the sets before and after a re-authentication.
func checkRenewed(t *testing.T, old ue.SetInfo, res ue.Result) {
	t.Helper()
	switch {
	case !res.Challenged:
		t.Error("no challenge")
	case res.Ports.US != old.Ports.US || res.Ports.PS != old.Ports.PS:
		t.Errorf("server ports changed: %v to %v", old.Ports, res.Ports)
	case res.Ports.UC == old.Ports.UC || res.Ports.PC == old.Ports.PC:
		t.Errorf("client ports stayed: %v", res.Ports)
	}
	for _, spi := range spisOf(res.SPIs) {
		if slices.Contains(spisOf(old.SPIs), spi) {
			t.Errorf("SPI %s is in the old set too", spi)
		}
	}
}

func spisOf(s ims.SPIs) []ims.SPI { return []ims.SPI{s.UC, s.US, s.PC, s.PS} }

// watchSets looks at the number of SA sets until wg is done, and returns the highest.
func (f *fixture) watchSets(ctx context.Context, t *testing.T, wg *sync.WaitGroup) float64 {
	t.Helper()
	done := make(chan struct{})
	go func() {
		wg.Wait()
		close(done)
	}()
	tick := time.NewTicker(10 * poll)
	defer tick.Stop()
	peak := 0.0
	for {
		peak = max(peak, f.metric(ctx, t, "sa_sets"))
		select {
		case <-done:
			return peak
		case <-tick.C:
		}
	}
}
