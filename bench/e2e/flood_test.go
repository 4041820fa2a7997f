package e2e

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/gmgate/gmgate/bench/core"
	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/bench/lab"
	"github.com/gmgate/gmgate/bench/ue"
)

// TestFloodEndToEnd floods the daemon with 20,000 unprotected REGISTERs from 100 addresses through real sockets, while ten
// phones talk to each other. Every one of their messages is answered, the limits hold at every look, and in the end SAs and
// SPIs are those of the phones alone. Of the heap, 32 MiB are left to the answers that are kept for retransmissions, to the
// room of maps and to what the collector has not looked at yet; the flood kept whole would take three times as much.
func TestFloodEndToEnd(t *testing.T) {
	const (
		sources, phones    = 100, 10
		pending, perSource = 200, 8
		pace, burst        = 20 * time.Millisecond, 100 // about 5,000 a second
		heapLimit          = 32 << 20
		limit              = 90 * time.Second
	)
	registers := 20_000
	if backend() == "xfrm" {
		registers = 2_000 // the machine with ESP in its kernel is an emulated one
	}
	f := start(t, fixtureConfig{
		subs: phones + sources + 1, clear: strangerRules(403, 503),
		daemon: lab.DaemonOptions{Pending: pending, PendingSource: perSource},
	})
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	all := make([]*ue.UE, phones)
	for i := range all {
		all[i] = f.newUE(t, func(c *ue.Config) { c.Offers, c.Quirks.LargeUDP = f.offers(1), i%2 == 0 })
		f.mustRegister(ctx, t, all[i])
	}
	type state struct{ sas, sets, spis, ues float64 }
	look := func() (s state, heap float64) {
		m, err := f.daemon.Metrics(ctx)
		if err != nil {
			t.Fatal(err)
		}
		sum := func(name string) float64 { return lab.Sum(m, name) }
		return state{
			sas: sum("gmgate_esp_sas"), sets: sum("gmgate_sa_sets"), spis: sum("gmgate_spi_pool_in_use"), ues: sum("gmgate_ues"),
		}, sum("go_memstats_heap_alloc_bytes")
	}
	settled := state{sas: 4 * phones, sets: phones, spis: 2 * phones, ues: phones}
	var before state
	var heapBefore float64
	if !eventually(ctx, time.Second, func() bool { before, heapBefore = look(); return before == settled }) {
		t.Fatalf("before the flood: %+v, want %+v", before, settled)
	}

	// One phone after the other in its own loop, until the flood is over.
	over := make(chan struct{})
	errs := make([]error, phones)
	sent := make([]int, phones)
	var wg sync.WaitGroup
	for i, u := range all {
		wg.Go(func() {
			for {
				select {
				case <-over:
					return
				default:
				}
				to := f.subs[(i+1)%phones].IMPU[0]
				if status, err := u.Message(ctx, to, "through the flood"); err != nil || status != 200 {
					errs[i] = fmt.Errorf("message %d of phone %d: %d, %w", sent[i], i, status, err)
					return
				}
				sent[i]++
			}
		})
	}

	strangers := make([]*stranger, sources)
	for i := range strangers {
		strangers[i] = f.newStranger(t, f.lab.Plan().UE(phones+i), 0)
	}
	var peak state
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for n := range registers {
		// Half of them name subscribers, another one each time from the same address, and the core challenges them; it
		// refuses the others.
		sub := f.subs[phones+(n+n/sources)%sources]
		if n%(2*sources) >= sources {
			sub = core.Subscriber{IMPI: fmt.Sprintf("nobody%d@%s", n, domain), Domain: domain}
		}
		s := strangers[n%sources]
		if n%2 == 1 { // and half of them come from a tenth of the addresses
			s = strangers[n/2%(sources/10)]
		}
		s.send(t, lab.PortClear, s.register(sub, fmt.Sprintf("stranger-flood-%d", n), func(m *sipwire.Message) {
			m.Set("Security-Client", fmt.Sprintf("ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc;spi-c=%d;spi-s=%d;port-c=%d;port-s=%d",
				1000+2*n, 1001+2*n, 10000+n, 32000+n))
		}))
		if n%burst == burst-1 {
			<-tick.C
		}
		if n%(registers/20) == 0 {
			s, _ := look()
			peak = state{max(peak.sas, s.sas), max(peak.sets, s.sets), max(peak.spis, s.spis), max(peak.ues, s.ues)}
			if s.sets > phones+pending || s.sas > 4*(phones+pending) || s.spis > 2*(phones+pending)+2*pending {
				t.Errorf("during the flood: %+v", s)
			}
		}
	}
	close(over)
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Error(err)
	}
	busy := f.metric(ctx, t, "sip_rejected_total", `reason="busy"`)
	t.Logf("at most %+v, %g times 503, messages of the phones meanwhile: %v", peak, busy, sent)
	if peak.sets <= phones || busy == 0 {
		t.Errorf("the flood did not reach the limits: at most %+v, %g times 503", peak, busy)
	}

	var after state
	var heap float64
	if !eventually(ctx, drainLimit, func() bool { after, heap = look(); return after == settled }) {
		t.Errorf("after the flood: %+v, want %+v", after, settled)
	}
	t.Logf("heap: %.1f MiB before, %.1f MiB after", heapBefore/(1<<20), heap/(1<<20))
	if heap-heapBefore > heapLimit {
		t.Errorf("the flood leaves %.0f octets of heap", heap-heapBefore)
	}
	for i, u := range all {
		f.mustMessage(ctx, t, u, f.subs[(i+1)%phones].IMPU[0])
	}
	// A newcomer gets in.
	f.mustRegister(ctx, t, f.newUE(t))
	checkPhones(t, all...)
}
