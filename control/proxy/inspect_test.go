package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/control/sa/satest"
)

// serve runs what is posted to the rig's loop until the test calls the function returned: an operator waits for it on a
// goroutine of its own.
func (r *rig) serve() (stop func()) {
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			r.settle()
			select {
			case <-done:
				return
			case <-tick.C:
			}
		}
	}()
	return sync.OnceFunc(func() { close(done); <-ended })
}

// operate runs an operator's request while the loop turns.
func operate[T any](t *testing.T, r *rig, f func(context.Context) (T, error)) T {
	t.Helper()
	stop := r.serve()
	defer stop()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	v, err := f(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func fleetRig(t *testing.T) *rig {
	t.Helper()
	return newRig(t, func(c *Config) { c.Fleet = new(Fleet) })
}

func (r *rig) list(t *testing.T, q UEQuery) []UEInfo {
	t.Helper()
	return operate(t, r, func(ctx context.Context) ([]UEInfo, error) {
		list, more, err := r.w.cfg.Fleet.UEs(ctx, q, UEID{}, 100)
		if more {
			t.Error("more than one page")
		}
		return list, err
	})
}

// A UE shows what its phone and the core agreed on, and follows it through a re-registration.
func TestInspect(t *testing.T) {
	r := fleetRig(t)
	if got := r.list(t, UEQuery{}); len(got) != 0 {
		t.Fatalf("an empty gate has %v", got)
	}
	p := newPhone()
	r.challenge(p, clearFlow(), 5060)
	pending := r.list(t, UEQuery{})
	if len(pending) != 1 || pending[0].State != registrar.Pending || pending[0].Current != 0 || !pending[0].Expires.IsZero() ||
		len(pending[0].Sets) != 1 || pending[0].Sets[0].Phase != sa.Temporary {
		t.Fatalf("challenged: %+v", pending)
	}
	r.confirm(p)
	got := r.list(t, UEQuery{})
	if len(got) != 1 || len(got[0].Sets) != 1 {
		t.Fatalf("registered: %+v", got)
	}
	u := got[0]
	first := SetInfo{
		ID: u.Sets[0].ID, Label: 1, Phase: sa.Established,
		Ports: ims.Ports{UC: p.portC, US: p.portS, PC: p.pc, PS: p.ps},
		SPIs:  ims.SPIs{UC: ims.SPI(p.spiC), US: ims.SPI(p.spiS), PC: u.Sets[0].SPIs.PC, PS: u.Sets[0].SPIs.PS},
		Suite: ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC}, Deadline: r.l.now.Add(600030 * time.Second),
		Heard: r.l.now.Local(),
	}
	want := UEInfo{
		ID: u.ID, IMPI: impi, Addr: ueAddr, Local: gmAddr, State: registrar.Registered,
		Identities:   []string{"sip:+15550100001@" + domain, "tel:+15550100001"},
		Contact:      "sip:001010000000001@10.45.0.7:6300",
		ServiceRoute: []string{"sip:orig@scscf." + domain + ":6060;lr"},
		NextHop:      ims.Hop{Addr: netip.MustParseAddrPort("10.0.1.7:6060"), Transport: ims.UDP},
		Expires:      r.l.now.Add(600000 * time.Second), Current: first.ID, Sets: []SetInfo{first},
		LastMessage: r.l.now.Local(), LastSeen: r.l.now.Local(),
	}
	if !reflect.DeepEqual(u, want) {
		t.Errorf("registered:\n got %+v\nwant %+v", u, want)
	}
	if !strings.Contains(p.server, "spi-c="+u.Sets[0].SPIs.PC.Decimal()) || !strings.Contains(p.server, "spi-s="+u.Sets[0].SPIs.PS.Decimal()) {
		t.Errorf("SPIs %+v, the phone was told %s", u.Sets[0].SPIs, p.server)
	}

	over := p.protectedFlow
	p.agree()
	req := r.one(over, p.register("re-1", 6300, "Security-Verify: "+p.server))
	r.readServer(p, r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge)).msg)
	r.confirm(p)
	u = r.list(t, UEQuery{ID: u.ID})[0]
	if len(u.Sets) != 2 || u.Sets[0].Phase != sa.Old || u.Sets[1].Phase != sa.Established || u.Current != first.ID ||
		u.Sets[1].Over != first.ID {
		t.Errorf("after a re-registration: %+v", u)
	}
}

// Every key of a query finds the phone that it names, and only that one.
func TestInspectQueries(t *testing.T) {
	r := fleetRig(t)
	p := r.registered()
	other := newPhone()
	other.addr, other.impi, other.callID = netip.MustParseAddr("10.45.0.8"), "001010000000002@"+domain, "reg2@10.45.0.8"
	flow := clearFlow()
	flow.Remote = netip.AddrPortFrom(other.addr, 5060)
	r.challenge(other, flow, 5060)
	all := r.list(t, UEQuery{})
	if len(all) != 2 {
		t.Fatalf("%d UEs", len(all))
	}
	for name, tt := range map[string]struct {
		q    UEQuery
		want []string
	}{
		"impi":                 {UEQuery{IMPI: impi}, []string{impi}},
		"impi of nobody":       {UEQuery{IMPI: "nobody"}, nil},
		"address":              {UEQuery{Addr: ueAddr}, []string{impi}},
		"address of nobody":    {UEQuery{Addr: gmAddr}, nil},
		"sip identity":         {UEQuery{IMPU: "SIP:+15550100001@" + domain}, []string{impi}},
		"tel identity":         {UEQuery{IMPU: "tel:+15550100001"}, []string{impi}},
		"without its scheme":   {UEQuery{IMPU: "+15550100001"}, []string{impi}},
		"part of an identity":  {UEQuery{IMPU: "+1555010000"}, nil},
		"contact":              {UEQuery{Contact: netip.AddrPortFrom(ueAddr, 6300)}, []string{impi}},
		"protected port":       {UEQuery{Contact: netip.AddrPortFrom(ueAddr, p.portC)}, []string{impi}},
		"port of nobody":       {UEQuery{Contact: netip.AddrPortFrom(ueAddr, 5060)}, nil},
		"id":                   {UEQuery{ID: all[1].ID}, []string{other.impi}},
		"id of another time":   {UEQuery{ID: UEID{Index: all[1].ID.Index, Gen: all[1].ID.Gen + 1}}, nil},
		"id of another worker": {UEQuery{ID: UEID{Worker: 1, Index: all[1].ID.Index}}, nil},
		"both":                 {UEQuery{IMPI: impi, Addr: ueAddr}, []string{impi}},
		"contradiction":        {UEQuery{IMPI: impi, Addr: other.addr}, nil},
	} {
		var got []string
		for _, u := range r.list(t, tt.q) {
			got = append(got, u.IMPI)
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: %v, want %v", name, got, tt.want)
		}
	}
}

func TestUEID(t *testing.T) {
	id := UEID{Worker: 3, Index: registrar.MaxUEs, Gen: 65535}
	if got, err := ParseUEID(id.String()); err != nil || got != id {
		t.Errorf("%s reads as %v, %v", id, got, err)
	}
	for _, s := range []string{"", "1", "1-2", "0-0-0", "1-2-3-4", "256-1-0", "0-16777216-0", "0-1-65536", "10.45.0.7", "-1-1-1"} {
		if id, err := ParseUEID(s); err == nil {
			t.Errorf("%q reads as %v", s, id)
		}
	}
}

// An operator's de-registration is that of the network: nothing of the phone's is accepted any more, the SAs stay for
// what is on its way, and then everything is gone.
func TestOperatorDeregisters(t *testing.T) {
	r := fleetRig(t)
	p := r.registered()
	end := func(q UEQuery) []UEInfo {
		return operate(t, r, func(ctx context.Context) ([]UEInfo, error) { return r.w.cfg.Fleet.Deregister(ctx, q) })
	}
	if got := end(UEQuery{IMPI: "nobody"}); len(got) != 0 {
		t.Errorf("nobody: ended %v", got)
	}
	got := end(UEQuery{IMPU: "tel:+15550100001"})
	if len(got) != 1 || got[0].IMPI != impi || got[0].State != registrar.Deregistered || !got[0].Sets[0].Ending {
		t.Fatalf("ended %+v", got)
	}
	if again := end(UEQuery{IMPI: impi}); len(again) != 0 {
		t.Errorf("ended again: %+v", again)
	}
	refused := r.one(p.protectedFlow, p.message())
	if status(t, refused.msg) != 403 {
		t.Errorf("a request afterwards:\n%s", refused.msg)
	}
	p.downlink(t, refused)
	r.advance(127 * time.Second)
	if r.backend.Count() != 4 {
		t.Errorf("%d SAs before the grace is over", r.backend.Count())
	}
	r.advance(2 * time.Second)
	if r.backend.Count() != 0 || r.w.table.UEs() != 0 || r.w.table.SPIsInUse() != 0 {
		t.Error("something is left")
	}
	if _, err := r.w.cfg.Fleet.Deregister(t.Context(), UEQuery{}); err == nil {
		t.Error("an empty query ends everything")
	}
}

// crowd fills the tables of two workers, without the SIP.
type crowd struct {
	fleet   *Fleet
	workers [2]*rig
}

func newCrowd(t testing.TB, perWorker int) *crowd {
	t.Helper()
	c := &crowd{fleet: new(Fleet)}
	for k := range c.workers {
		r := &rig{
			t: t, metrics: observe.New(2), backend: new(satest.Backend),
			l: &loop{now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), conns: make(map[ims.ConnID]bool)},
		}
		cfg := newRig(t).w.cfg
		cfg.Workers, cfg.Fleet = 2, c.fleet
		var err error
		if r.w, err = New(cfg, k, r.backend, r.metrics, slog.New(slog.DiscardHandler)); err != nil {
			t.Fatal(err)
		}
		c.workers[k] = r
	}
	for _, r := range []*rig{c.workers[1], c.workers[0]} { // the order of booting is not that of the numbers
		r.w.Boot(r.l)
		for i := range perWorker {
			_, err := r.w.table.Begin(&registrar.Offer{
				IMPI: fmt.Sprintf("w%d-%d", r.w.id, i), Local: gmAddr,
				UE:   netip.AddrFrom4([4]byte{10, byte(100 + r.w.id), byte(i >> 8), byte(i)}),
				SPIC: 5000, SPIS: 5001, PortC: 7000, PortS: 7001,
			}, ims.ESPKeys{Suite: ims.Suites()[1]}, func(*registrar.Set, error) {})
			if err != nil {
				t.Fatal(err)
			}
		}
		r.settle()
	}
	return c
}

// Pages fit together while phones come and go: whoever stays is on exactly one of them.
func TestInspectPages(t *testing.T) {
	const each = 700 // more than one turn
	c := newCrowd(t, each)
	for _, r := range c.workers {
		defer r.serve()()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var got []string
	var after UEID
	for page := 0; ; page++ {
		list, more, err := c.fleet.UEs(ctx, UEQuery{}, after, 333)
		if err != nil {
			t.Fatal(err)
		}
		for _, u := range list {
			got = append(got, u.IMPI)
		}
		if !more {
			break
		}
		after = list[len(list)-1].ID
		if page == 0 { // the last one that was seen goes, as does one that was not
			for k, gone := range []string{list[len(list)-1].IMPI, "w1-699"} {
				w := c.workers[k].w
				if _, err := ask(ctx, w, func() bool {
					w.table.Drop(w.table.OfIMPI(gone)[0].Sets[0], 0)
					w.Tick(w.eg.Now().Add(time.Second))
					return true
				}); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	want := 2*each - 1
	if len(got) != want || !slices.Contains(got, "w0-0") || !slices.Contains(got, "w1-698") {
		t.Errorf("%d UEs on all pages, want %d", len(got), want)
	}
	if u := slices.Clone(got); len(slices.Compact(sorted(u))) != len(got) {
		t.Error("a UE is on two pages")
	}
	if slices.Contains(got, "w1-699") {
		t.Error("a UE that had gone is on a page")
	}
	loads, err := c.fleet.Loads(ctx)
	for i := range loads {
		loads[i].SPIs = 0 // they come free a moment later
	}
	if want := []Load{{Worker: 0, UEs: each - 1}, {Worker: 1, UEs: each - 1}}; err != nil || !slices.Equal(loads, want) {
		t.Errorf("loads %v, %v, want %v", loads, err, want)
	}
}

func sorted(s []string) []string { slices.Sort(s); return s }

// One turn on a loop looks at a bounded number of contexts, whatever is asked: that is what keeps messages flowing.
func TestInspectTurnsAreBounded(t *testing.T) {
	c := newCrowd(t, 3*walkTurn)
	r := c.workers[0]
	visited, turns := 0, 0
	for from := uint32(1); from != 0; turns++ {
		before := visited
		got := r.w.look(&UEQuery{}, from, 1<<20, func(*registrar.UE) bool { visited++; return true })
		if n := visited - before; n > walkTurn {
			t.Errorf("a turn looked at %d contexts", n)
		}
		from = got.next
	}
	if visited != 3*walkTurn || turns < 3 {
		t.Errorf("%d contexts in %d turns", visited, turns)
	}
	// A table that was full once: its empty places are bounded as well.
	for _, s := range r.backend.Installed {
		if u := r.w.table.AtAddr(s.UE); len(u) == 1 && u[0].Index != 3*walkTurn {
			r.w.table.Drop(u[0].Sets[0], 0)
		}
	}
	r.advance(time.Second)
	if r.w.table.UEs() != 1 {
		t.Fatalf("%d left", r.w.table.UEs())
	}
	var last []UEInfo
	for from := uint32(1); from != 0; {
		got := r.w.look(&UEQuery{}, from, 10, func(*registrar.UE) bool { return true })
		last = append(last, got.found...)
		from = got.next
	}
	if len(last) != 1 || last[0].ID.Index != 3*walkTurn {
		t.Errorf("found %+v", last)
	}
}

// A loop that does not turn holds its operator up only as long as that one wants to wait, and does nothing late.
func TestInspectStalledLoop(t *testing.T) {
	r := fleetRig(t)
	r.registered()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for name, f := range map[string]func() error{
		"list":        func() error { _, _, err := r.w.cfg.Fleet.UEs(ctx, UEQuery{}, UEID{}, 10); return err },
		"de-register": func() error { _, err := r.w.cfg.Fleet.Deregister(ctx, UEQuery{IMPI: impi}); return err },
		"load":        func() error { _, err := r.w.cfg.Fleet.Loads(ctx); return err },
	} {
		if err := f(); !errors.Is(err, ErrWorkerGone) || !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", name, err)
		}
	}
	r.settle()
	if u := r.w.table.OfIMPI(impi); len(u) != 1 || u[0].State != registrar.Registered {
		t.Error("what nobody waits for any more was done")
	}
}

func BenchmarkInspectTurn(b *testing.B) {
	c := newCrowd(b, walkTurn)
	w := c.workers[0].w
	b.ReportAllocs()
	for b.Loop() {
		w.look(&UEQuery{}, 1, walkTurn, func(*registrar.UE) bool { return true })
	}
}
