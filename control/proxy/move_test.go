package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/sa/satest"
	"github.com/gmgate/gmgate/control/store"
	"github.com/gmgate/gmgate/control/store/storetest"
	"github.com/gmgate/gmgate/control/survive"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// partner is the loop of a worker that has others beside it.
type partner struct {
	*loop
	all *crew
}

// Hand implements Egress.
func (p partner) Hand(to int, f ims.Flow, msg []byte) error {
	p.handed = append(p.handed, to)
	o, b := p.all.rigs[to], slices.Clone(msg)
	return o.l.Post(func() { o.w.Message(f, b) })
}

// crew is some workers of one process, with one backend and one store.
type crew struct {
	t     *testing.T
	rigs  []*rig
	cfg   *Config
	store *storetest.Memory
	homes map[netip.Addr]int
	home  error // what Home returns
}

func newCrew(t *testing.T, n int, change ...func(*Config)) *crew {
	t.Helper()
	c := &crew{t: t, store: storetest.NewMemory(), homes: make(map[netip.Addr]int)}
	c.cfg = newRig(t, change...).cfg
	c.cfg.Workers = n
	c.cfg.Home = func(a netip.Addr, worker int) error { c.homes[a] = worker; return c.home }
	c.boot(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), new(satest.Backend), nil)
	return c
}

func (c *crew) boot(now time.Time, backend *satest.Backend, o *survive.Outcome) {
	c.t.Helper()
	ids, err := c.store.SetIDs(c.t.Context())
	if err != nil {
		c.t.Fatal(err)
	}
	w := store.NewWriter(store.WriterConfig{Store: c.store, Stored: ids})
	c.t.Cleanup(func() { _ = w.Close(context.Background()) })
	c.cfg.Store, c.cfg.Fleet = w, new(Fleet)
	metrics := observe.New(c.cfg.Workers)
	c.rigs = nil
	for k := range c.cfg.Workers {
		r := &rig{t: c.t, cfg: c.cfg, backend: backend, metrics: metrics, l: &loop{now: now, conns: make(map[ims.ConnID]bool)}}
		if r.w, err = New(c.cfg, k, backend, metrics, slog.New(slog.DiscardHandler)); err != nil {
			c.t.Fatal(err)
		}
		if o != nil {
			kept := &Kept{Freed: o.Workers[k].Freed, LastID: o.Workers[k].LastID, Labels: o.Labels}
			for _, u := range o.Workers[k].UEs {
				kept.UEs = append(kept.UEs, KeptUE(u))
			}
			for _, spi := range o.SPIs {
				r.w.Reserve(spi)
			}
			r.w.Restore(kept)
		}
		c.rigs = append(c.rigs, r)
	}
	for _, r := range c.rigs {
		r.w.Boot(partner{r.l, c})
	}
	c.settle()
}

func (c *crew) settle() {
	for busy := true; busy; {
		busy = c.rigs[0].backend.Answer() > 0
		for _, r := range c.rigs {
			for _, f := range r.l.take() {
				f()
				busy = true
			}
		}
	}
}

func (c *crew) advance(d time.Duration) {
	for end := c.rigs[0].l.now.Add(d); c.rigs[0].l.now.Before(end); {
		step := min(100*time.Millisecond, end.Sub(c.rigs[0].l.now))
		for _, r := range c.rigs {
			r.l.now = r.l.now.Add(step)
			r.w.Tick(r.l.now)
		}
		c.settle()
	}
}

// deliver gives a worker a message, and returns what all of them sent.
func (c *crew) deliver(worker int, f ims.Flow, msg string) (out []sent) {
	for _, r := range c.rigs {
		r.l.out = nil
	}
	c.rigs[worker].w.Message(f, []byte(msg))
	c.settle()
	return c.sent()
}

func (c *crew) sent() (out []sent) {
	for _, r := range c.rigs {
		out = append(out, r.l.out...)
		r.l.out = nil
	}
	return out
}

func (c *crew) one(worker int, f ims.Flow, msg string) sent {
	c.t.Helper()
	out := c.deliver(worker, f, msg)
	if len(out) != 1 {
		c.t.Fatalf("%d messages were sent, want 1:\n%v", len(out), out)
	}
	return out[0]
}

// start asks for a move; its result comes once the loops have turned.
func (c *crew) start(p *phone, from, to int) <-chan error {
	c.t.Helper()
	u := c.rigs[from].context(p)
	id := idOf(from, u)
	done := make(chan error, 1)
	go func() {
		ues, err := c.cfg.Fleet.Move(c.t.Context(), id, to)
		if err == nil && (len(ues) == 0 || ues[0].ID.Worker != to) {
			err = fmt.Errorf("moved: %+v", ues)
		}
		done <- err
	}()
	for !c.asked(from) { // until it is in the queue
		time.Sleep(time.Millisecond)
	}
	return done
}

func (c *crew) asked(worker int) bool { return c.queued(worker) > 0 }

func (c *crew) queued(worker int) int {
	l := c.rigs[worker].l
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.posted)
}

// step lets a loop do what is in its queue now.
func (c *crew) step(worker int) {
	for _, f := range c.rigs[worker].l.take() {
		f()
	}
}

func (c *crew) move(p *phone, from, to int) error {
	c.t.Helper()
	done := c.start(p, from, to)
	c.settle()
	return <-done
}

func (c *crew) mustMove(p *phone, from, to int) {
	c.t.Helper()
	if err := c.move(p, from, to); err != nil {
		c.t.Fatal(err)
	}
}

// empty checks that nothing is left of anybody.
func (c *crew) empty() {
	c.t.Helper()
	c.advance(finalKept + answerGrace)
	for _, r := range c.rigs {
		r.empty()
		if len(r.w.former)+len(r.w.away) != 0 {
			c.t.Errorf("worker %d: %d contexts with former names, %d away", r.w.id, len(r.w.former), len(r.w.away))
		}
	}
	if n := c.cfg.Fleet.names.n.Load(); n != 0 {
		c.t.Errorf("%d names are left", n)
	}
	if n := c.cfg.Fleet.sets.Load(); n != 0 {
		c.t.Errorf("%d sets are counted", n)
	}
	for _, state := range []string{"registered", "deregistered", "pending"} {
		if n := c.rigs[0].metric("ues", "state="+state); n != 0 {
			c.t.Errorf("%v UEs are %s", n, state)
		}
	}
	if s := c.snapshot(); len(s.Sets)+len(s.Registrations) != 0 {
		c.t.Errorf("the store keeps %d sets, %d registrations", len(s.Sets), len(s.Registrations))
	}
}

func (c *crew) snapshot() *store.Snapshot {
	c.t.Helper()
	c.advance(time.Second)
	if err := c.cfg.Store.Flush(c.t.Context()); err != nil {
		c.t.Fatal(err)
	}
	snap, err := store.Read(c.t.Context(), c.store)
	if err != nil {
		c.t.Fatal(err)
	}
	return snap
}

// crash ends the process and begins a new one.
func (c *crew) crash() *survive.Outcome {
	c.t.Helper()
	backend := c.rigs[0].backend.Restarted()
	now := c.rigs[0].l.now.Add(time.Second)
	o, err := survive.Load(c.t.Context(), survive.Config{
		Store: c.store, Backend: answering{backend}, Workers: c.cfg.Workers, Owner: func(netip.Addr) int { return 0 }, Fit: c.cfg.Fit,
		Now: func() time.Time { return now }, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		c.t.Fatal(err)
	}
	c.cfg.Moved = make(map[Name]Name)
	for from, to := range o.Moved {
		c.cfg.MwPorts = max(c.cfg.MwPorts, int(from.Worker)+1)
		c.cfg.Moved[Name{uint8(from.Worker), from.Index, from.Gen}] = Name{uint8(to.Worker), to.Index, to.Gen}
	}
	c.boot(now, backend, o)
	return o
}

func scscf() ims.Flow {
	f := coreFlow()
	f.Remote = netip.MustParseAddrPort("10.0.1.7:6060")
	return f
}

// A phone is moved there and back, with calls both ways, what was under way with the core before, and its next registrations; at
// the end nothing is left anywhere.
func TestMove(t *testing.T) {
	c := newCrew(t, 2)
	a, b := c.rigs[0], c.rigs[1]
	p := a.registered()
	c.settle()
	path := a.path(p)
	other := a.signUp(phoneAt("10.45.0.8", 77))

	// What is under way: a dialog of the phone, a request of the phone without its answer, one of the core without its answer.
	invite := a.one(p.protectedFlow, strings.NewReplacer("MESSAGE", "INVITE").Replace(p.message()))
	ours := get(t, a.one(coreFlow(), answerTo(t, invite.msg, "200 OK", "Record-Route: <sip:10.0.1.7:6060;lr>")).msg, sipmsg.RecordRoute)
	asked := a.one(p.protectedFlow, p.message())
	called := a.one(scscf(), mtInvite(path, ""))

	set := a.context(p).Current
	before, phase, serial, deadline := set.Params, set.Phase, set.Serial, set.Deadline
	installs := len(a.backend.Installed)
	c.mustMove(p, 0, 1)
	u := b.context(p)
	if a.w.table.UEOf(p.impi, p.addr) != nil || a.w.table.UEs() != 1 || b.w.table.UEs() != 1 || c.homes[p.addr] != 1 {
		t.Fatalf("%d UEs at the old worker, %d at the new one, home %d", a.w.table.UEs(), b.w.table.UEs(), c.homes[p.addr])
	}
	s := u.Current
	if s.ID != before.ID || s.Label != before.Label || s.SPIs != before.SPIs || s.Ports != before.Ports || s.Serial != serial ||
		s.Phase != phase || !s.Deadline.Equal(deadline) || len(u.Identities) != 2 || u.Route == nil || !u.NextHop.IsValid() {
		t.Errorf("moved: set %#x, %s, until %v", s.ID, s.Phase, s.Deadline)
	}
	if len(a.backend.Installed) != installs || a.backend.Count() != 8 {
		t.Errorf("the backend has been asked: %d SAs", a.backend.Count())
	}
	if a.w.table.SPIsInUse() != 4 || b.w.table.SPIsInUse() != 0 {
		t.Errorf("SPIs: %d and %d", a.w.table.SPIsInUse(), b.w.table.SPIsInUse())
	}
	marked := p.protectedFlow
	marked.Label = before.Label // the backend still marks with that
	if b.w.table.Find(marked) != s {
		t.Error("not found by its label")
	}

	// The core's answer, to the port of the old worker; the phone's answer, by its new one.
	p.downlink(t, c.one(0, coreFlow(), answerTo(t, asked.msg, "200 OK")))
	ans := c.one(1, p.protectedFlow, answerTo(t, called.msg, "200 OK", "Contact: <sip:10.45.0.7:6300>"))
	if ans.remote != scscf().Remote || !strings.Contains(ans.msg, "@10.0.1.5:5061;lr>") {
		t.Errorf("to %v:\n%s", ans.remote, ans.msg)
	}
	// Requests of the core by the Path of before, and in the dialog of before, both ways.
	p.downlink(t, c.one(0, scscf(), strings.Replace(mtInvite(path, ""), "z9hG4bKs9", "z9hG4bKs10", 1)))
	bye := lines("", "BYE sip:10.0.1.8 SIP/2.0", "Via: SIP/2.0/UDP 10.45.0.7:6300;branch=z9hG4bKb1", "Max-Forwards: 70",
		"Route: "+ours, "Route: <sip:10.0.1.7:6060;lr>", "From: <sip:a@b>;tag=1", "To: <sip:c@d>;tag=2", "Call-ID: m1@10.45.0.7", "CSeq: 2 BYE")
	if out := c.one(1, p.protectedFlow, bye); out.remote != scscf().Remote || out.local.Port() != mwAddr.Port()+1 {
		t.Errorf("BYE from %v to %v:\n%s", out.local, out.remote, out.msg)
	}
	if out := c.one(0, other.protectedFlow, strings.ReplaceAll(bye, "10.45.0.7", "10.45.0.8")); status(t, out.msg) != 403 {
		t.Errorf("a dialog of another phone:\n%s", out.msg)
	}

	// What old sockets and workers still bring comes to the new worker, once.
	if out := c.one(0, p.protectedFlow, p.message()); out.local.Port() != mwAddr.Port()+1 || !slices.Contains(a.l.handed, 1) {
		t.Errorf("from %v:\n%s", out.local, out.msg)
	}

	// Re-registration without and with a challenge; then its SAs have SPIs of both pools.
	b.refresh(p)
	c.settle()
	b.one(p.protectedFlow, p.message())
	b.renew(p)
	c.settle()
	b.one(p.protectedFlow, p.message())
	if a.w.table.SPIsInUse() != 4 || b.w.table.SPIsInUse() != 2 {
		t.Errorf("SPIs after the renewal: %d and %d", a.w.table.SPIsInUse(), b.w.table.SPIsInUse())
	}
	c.advance(c.cfg.Registrar.OldSet + time.Second)
	if a.w.table.SPIsInUse() != 2 || b.w.table.SPIsInUse() != 2 || a.backend.Count() != 8 {
		t.Errorf("SPIs after the old set's end: %d and %d, %d SAs", a.w.table.SPIsInUse(), b.w.table.SPIsInUse(), a.backend.Count())
	}

	// And back: the names of before lead there.
	c.mustMove(p, 1, 0)
	if len(a.w.passages) != 0 || b.w.passages[p.addr] == nil || len(a.w.former[a.context(p)]) != 2 {
		t.Errorf("passages %v and %v, former %v", a.w.passages, b.w.passages, a.w.former)
	}
	for worker := range c.rigs {
		p.downlink(t, c.one(worker, scscf(), strings.Replace(mtInvite(path, ""), "z9hG4bKs9", fmt.Sprintf("z9hG4bKt%d", worker), 1)))
	}
	a.one(p.protectedFlow, p.message())

	a.leave(p)
	a.leave(other)
	c.settle()
	c.empty()
	if out := c.one(1, scscf(), mtInvite(path, "")); status(t, out.msg) != 430 {
		t.Errorf("by a name that has ended:\n%s", out.msg)
	}
}

// Whatever is under way at the address keeps a UE where it is, and nothing of it changes.
func TestMoveBusy(t *testing.T) {
	for name, tt := range map[string]struct {
		prepare func(c *crew, p *phone)
		want    string
	}{
		"REGISTER in clear": {func(c *crew, p *phone) {
			q := phoneAt(p.addr.String(), 9)
			c.rigs[0].one(q.clear(), q.register("other", 5060))
		}, "REGISTER"},
		"REGISTER": {func(c *crew, p *phone) {
			c.rigs[0].one(p.protectedFlow, p.register("re", 6300, "Security-Client:"))
		}, "REGISTER"},
		"challenged": {func(c *crew, p *phone) {
			old := *p
			p.agree()
			req := c.rigs[0].one(old.protectedFlow, p.register("re", 6300, "Security-Verify: "+old.server))
			c.rigs[0].one(coreFlow(), answerTo(c.t, req.msg, "401 Unauthorized", challenge))
		}, "temporary"},
		"another phone there": {func(c *crew, p *phone) {
			q := phoneAt(p.addr.String(), 9)
			c.rigs[0].challenge(q, q.clear(), 5060)
		}, "pending"},
		"de-registered": {func(c *crew, p *phone) { c.rigs[0].leave(p) }, "deregistered"},
		"connection": {func(c *crew, p *phone) {
			c.rigs[0].w.dialUE(c.rigs[0].context(p).Current, []byte("x"), func() {})
		}, "connection"},
		"question": {func(c *crew, p *phone) { c.rigs[0].w.asking[p.impi] = new(asking) }, "asked"},
		"backend": {func(c *crew, p *phone) {
			r := c.rigs[0]
			req := r.one(p.protectedFlow, p.register("rf", 6300, "Security-Client:"))
			r.w.Message(coreFlow(), []byte(answerTo(c.t, req.msg, "200 OK", p.ok200()...))) // Extend is not answered yet
		}, "backend"},
		"the same address at the other worker": {func(c *crew, p *phone) {
			s, err := c.rigs[1].w.table.Begin(&registrar.Offer{
				IMPI: "other", Local: gmAddr, UE: p.addr, SPIC: 5000, SPIS: 5001, PortC: 7000, PortS: 7001,
			}, ims.ESPKeys{Suite: ims.Suites()[0]}, func(*registrar.Set, error) {})
			if err != nil {
				c.t.Fatal(err)
			}
			c.settle()
			c.rigs[1].w.table.Confirm(s, time.Hour)
			c.settle()
		}, "as well"},
		"a REGISTER at the other worker": {func(c *crew, p *phone) {
			q := phoneAt(p.addr.String(), 9)
			c.rigs[1].one(q.clear(), q.register("other", 5060))
		}, "REGISTER"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCrew(t, 2)
			p := c.rigs[0].registered()
			first := p.protectedFlow
			c.settle()
			tt.prepare(c, p)
			u, ues := c.rigs[0].context(p), c.rigs[1].w.table.UEs()
			gen := u.Gen
			done := c.start(p, 0, 1)
			c.step(0)
			c.step(1)
			c.settle()
			if err := <-done; !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v, want one of %s", err, tt.want)
			}
			if got := c.rigs[0].context(p); got != u || got.Gen != gen || c.rigs[1].w.table.UEs() != ues || len(c.homes) != 0 ||
				c.rigs[0].w.table.Find(first) == nil {
				t.Error("something has changed")
			}
			for _, r := range c.rigs {
				if len(r.w.passages) != 0 {
					t.Error("messages are held up")
				}
			}
		})
	}
}

// A move that cannot be done at all.
func TestMoveRefused(t *testing.T) {
	c := newCrew(t, 2)
	p := c.rigs[0].registered()
	c.settle()
	id := idOf(0, c.rigs[0].context(p))
	ask := func(id UEID, to int) error {
		done := make(chan error, 1)
		go func() { _, err := c.cfg.Fleet.Move(t.Context(), id, to); done <- err }()
		for {
			select {
			case err := <-done:
				return err
			default:
				c.settle()
			}
		}
	}
	for _, tt := range []struct {
		id   UEID
		to   int
		want error
	}{
		{id, 2, ErrNoWorker},
		{id, -1, ErrNoWorker},
		{UEID{}, 1, ErrNoUE},
		{UEID{Worker: 0, Index: 9}, 1, ErrNoUE},
		{UEID{Worker: 5, Index: 1}, 1, ErrNoUE},
		{id, 0, nil}, // it is there
	} {
		if err := ask(tt.id, tt.to); !errors.Is(err, tt.want) {
			t.Errorf("%v to %d: %v, want %v", tt.id, tt.to, err, tt.want)
		}
	}
	c.home = errors.New("table is full")
	if err := ask(id, 1); !errors.Is(err, ErrFixed) || c.homes[p.addr] != 0 {
		t.Errorf("not steered: %v, home %d", err, c.homes[p.addr])
	}
	c.rigs[0].served(p)
	home := c.cfg.Home
	c.cfg.Home = nil
	if err := ask(id, 1); !errors.Is(err, ErrFixed) {
		t.Errorf("without Home: %v", err)
	}
	c.cfg.Home, c.cfg.MwTransport, c.home = home, ims.TCP, nil
	if err := ask(id, 1); !errors.Is(err, ErrFixed) {
		t.Errorf("core over TCP: %v", err)
	}
	c.cfg.MwTransport = ims.UDP
	c.rigs[0].leave(p)
	c.settle()
	c.empty()
}

// The new loop does not take the contexts: they go on where they were, with their connection, and what waited comes back.
func TestMoveTakenBack(t *testing.T) {
	c := newCrew(t, 2, withRegEvent)
	a, b := c.rigs[0], c.rigs[1]
	p, n := a.established()
	c.settle()
	conn := a.connect(p, 7)
	before := a.one(conn, overTCP(p.message()))
	a.one(coreFlow(), answerTo(t, before.msg, "200 OK")) // or else it would be repeated
	done := c.start(p, 0, 1)
	c.step(0) // begin
	c.step(1) // prepare
	b.w.Message(p.protectedFlow, []byte(p.message()))
	if len(b.l.out) != 0 || len(b.w.passages[p.addr].parked) != 1 {
		t.Fatalf("sent %v", b.l.out)
	}
	b.l.full = true
	c.step(0) // depart
	b.l.full = false
	c.sent()
	c.advance(time.Second)
	if err := <-done; !errors.Is(err, ErrWorkerGone) {
		t.Fatalf("moved: %v", err)
	}
	if c.homes[p.addr] != 0 || len(b.w.passages)+len(a.w.passages) != 0 || b.w.table.UEs() != 0 || a.context(p).Current.ConnIn != 7 {
		t.Errorf("home %d, passages %v %v, %d UEs", c.homes[p.addr], a.w.passages, b.w.passages, b.w.table.UEs())
	}
	up := 0
	for _, s := range c.sent() {
		if strings.HasPrefix(s.msg, "MESSAGE") && s.local.Port() == mwAddr.Port() {
			up++
		}
	}
	if up != 1 {
		t.Errorf("%d of the message that waited", up)
	}
	n.cseq++
	if out := a.deliver(coreFlow(), n.request(active, "")); len(out) == 0 || status(t, out[0].msg) != 481 {
		t.Errorf("NOTIFY of the subscription of before: %v", out)
	}
	c.advance(5 * time.Second)
	c.mustMove(p, 0, 1) // and now it does
	c.advance(5 * time.Second)
	found := false
	for _, s := range c.sent() {
		found = found || strings.HasPrefix(s.msg, "SUBSCRIBE ") && s.local.Port() == mwAddr.Port()+1
	}
	if !found || !slices.Contains(a.l.closed, 7) || len(a.w.conns) != 0 || b.context(p).Current.ConnIn != 0 {
		t.Errorf("subscribed %v, closed %v", found, a.l.closed)
	}
}

// Messages at each moment of a move: nothing is lost, nothing handled twice, and connections of before are reset.
func TestMoveMeanwhile(t *testing.T) {
	c := newCrew(t, 3)
	a, b := c.rigs[0], c.rigs[1]
	p := a.registered()
	c.settle()
	path := a.path(p)
	count := 0
	say := func(worker int) {
		count++
		c.rigs[worker].w.Message(p.protectedFlow, []byte(strings.Replace(p.message(), "Call-ID: m1", fmt.Sprintf("Call-ID: m%d", count), 1)))
	}
	call := func(worker int) {
		count++
		c.rigs[worker].w.Message(scscf(), []byte(strings.NewReplacer("INVITE", "OPTIONS", "z9hG4bKs9", fmt.Sprintf("z9hG4bKx%d", count),
			"Call-ID: m2", fmt.Sprintf("Call-ID: m%d", count)).Replace(mtInvite(path, ""))))
	}
	all := func() {
		for worker := range c.rigs {
			call(worker)
		}
	}
	c.sent()
	say(0)
	done := c.start(p, 0, 1)
	c.step(0)
	say(0)
	all()
	c.step(1)
	say(0)
	all()
	c.step(0)
	say(0)
	say(1)
	all()
	c.step(0) // what the third one has handed to the old one
	say(1)
	c.settle()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	say(0)
	say(1)
	all()
	c.settle()
	seen := make(map[string]int)
	for _, s := range c.sent() {
		if strings.HasPrefix(s.msg, "MESSAGE") || strings.HasPrefix(s.msg, "OPTIONS") {
			seen[get(t, s.msg, sipmsg.CallID)]++
		}
	}
	for _, r := range c.rigs {
		if len(r.w.coming) != 0 {
			t.Errorf("worker %d still waits", r.w.id)
		}
	}
	if len(seen) != count || slices.Max(slices.Collect(maps.Values(seen))) != 1 {
		t.Errorf("%d messages, passed on: %v", count, seen)
	}
	f := p.tcpFlow(9)
	a.l.conns[9] = true
	if out := c.deliver(0, f, overTCP(p.message())); len(out) != 0 || a.l.conns[9] {
		t.Errorf("on a connection of before: %v", out)
	}
	if b.w.table.UEs() != 1 {
		t.Error("not there")
	}
}

// The network ends the registration, and the phone registers from a new address, while the phone is at its new worker; or its
// time runs out there.
func TestMoveThenEnds(t *testing.T) {
	for name, end := range map[string]func(c *crew, p *phone){
		"operator": func(c *crew, p *phone) {
			done := make(chan error, 1)
			go func() { _, err := c.cfg.Fleet.Deregister(c.t.Context(), UEQuery{IMPI: p.impi}); done <- err }()
			for len(done) == 0 {
				c.settle()
			}
		},
		"expiry":  func(c *crew, p *phone) { c.advance(620 * time.Second) },
		"backend": func(c *crew, p *phone) { c.cfg.Fleet.Expired(c.rigs[1].context(p).Current.ID); c.settle() },
		"new address": func(c *crew, p *phone) {
			q := *p
			q.addr, q.authorization, q.callID = netip.MustParseAddr("10.45.0.9"), "", "new"
			c.rigs[0].signUp(&q)
			c.settle()
			if u := c.rigs[1].w.table.UEOf(p.impi, p.addr); u != nil && u.State != registrar.Deregistered {
				t.Error("still registered at the address of before")
			}
			c.advance(c.cfg.Registrar.OldSet)
			c.rigs[0].leave(&q)
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCrew(t, 2)
			p := newPhone()
			c.rigs[0].challenge(p, p.clear(), 5060)
			c.rigs[0].join(p, 600)
			c.settle()
			c.mustMove(p, 0, 1)
			end(c, p)
			c.empty()
		})
	}
}

// Whoever compares the sets of all workers with what others hold does not miss those that slip from one that is still to be asked
// to one that was.
func TestMoveWhileListed(t *testing.T) {
	c := newCrew(t, 2)
	p := c.rigs[0].registered()
	c.settle()
	c.mustMove(p, 0, 1)
	id := c.rigs[1].context(p).Current.ID
	done := c.start(p, 1, 0)
	c.step(1)
	c.step(0)
	got := make(chan map[uint64]bool, 1)
	go func() {
		sets, _, err := c.cfg.Fleet.Sets(t.Context())
		if err != nil {
			t.Error(err)
		}
		got <- sets
	}()
	for !c.asked(0) {
		time.Sleep(time.Millisecond)
	}
	c.step(0)              // it is not here yet
	for c.queued(1) != 2 { // the move goes on, then comes the question
		time.Sleep(time.Millisecond)
	}
	c.step(1)
	for {
		select {
		case sets := <-got:
			if _, ok := sets[id]; !ok || len(sets) != 1 {
				t.Errorf("sets %v, want %#x", sets, id)
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
			return
		default:
			c.settle()
		}
	}
}

// A phone leaves its address while its context is between two workers, or goes on to a third one: whoever tells of it reaches it.
func TestMoveLeave(t *testing.T) {
	c := newCrew(t, 3)
	p := c.rigs[0].registered()
	c.settle()
	c.mustMove(p, 0, 1)
	done := c.start(p, 1, 2)
	c.step(1)
	c.step(2)
	c.step(1) // on its way
	elsewhere := netip.MustParseAddr("10.45.0.9")
	c.rigs[2].w.leave(p.impi, elsewhere) // too early
	c.rigs[1].w.leave(p.impi, elsewhere) // too late
	c.rigs[0].w.leave(p.impi, elsewhere)
	c.settle()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if u := c.rigs[2].context(p); u.State != registrar.Deregistered {
		t.Errorf("it is %s", u.State)
	}
	c.empty()
}

// A registration in clear of an identity that has its SAs on their way from one worker to another is refused at every moment.
func TestMoveNoDowngrade(t *testing.T) {
	for step := range 5 {
		c := newCrew(t, 3, with(allow))
		p := c.rigs[0].registered()
		c.settle()
		done := c.start(p, 0, 1)
		q := newPhone()
		q.addr, q.callID, q.authorization = netip.MustParseAddr("10.45.0.8"), "q", credentials
		f := clearFlow()
		f.Remote = netip.AddrPortFrom(q.addr, 5060)
		for i, worker := range []int{0, 1, 0, 1} {
			if i == step {
				break
			}
			c.step(worker)
		}
		c.sent()
		c.rigs[2].w.Message(f, []byte(q.register("clear", 5060, plain...)))
		c.settle()
		out := slices.DeleteFunc(c.sent(), func(s sent) bool { return s.remote.Addr() != q.addr })
		if len(out) != 1 || status(t, out[0].msg) != 403 {
			t.Errorf("after %d steps: %v", step, out)
		}
		if err := <-done; err != nil && !errors.Is(err, ErrBusy) {
			t.Error(err)
		}
	}
}

// The store after a move, and a restart from it at any moment of the writing: the phone goes on, and the names of before with it.
func TestMoveRestart(t *testing.T) {
	old, current := 0, 1 // which of the two sets has its new name in the store
	for name, tt := range map[string]struct {
		record bool
		sets   []int
	}{
		"all written":     {true, []int{old, current}},
		"record only":     {true, nil},
		"one set":         {true, []int{current}},
		"sets, no record": {false, []int{old, current}},
		"set, no record":  {false, []int{old}},
		"nothing was":     {false, nil},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCrew(t, 2)
			a := c.rigs[0]
			p := a.registered()
			c.settle()
			path := a.path(p)
			first := *p
			a.renew(p)
			c.settle()
			before := c.snapshot()
			c.mustMove(p, 0, 1)
			b := c.rigs[1]
			moved := b.path(p)
			after := c.snapshot()
			if len(after.Registrations) != 2 || len(after.Sets) != 2 {
				t.Fatalf("%d registrations, %d sets", len(after.Registrations), len(after.Sets))
			}
			// The crash.
			var back store.Batch
			record := after.Registrations[slices.IndexFunc(after.Registrations, func(r store.Registration) bool { return r.Worker == 1 })]
			if len(record.Former) != 1 || record.Former[0].Worker != 0 {
				t.Fatalf("former names %+v", record.Former)
			}
			if !tt.record {
				back.Free = append(back.Free, store.Freed{Context: record.Context, Gen: record.Gen})
			}
			for i, s := range before.Sets {
				if !slices.Contains(tt.sets, i) {
					back.Sets = append(back.Sets, s)
				}
			}
			if back.Len() > 0 {
				if err := c.store.Apply(t.Context(), back); err != nil {
					t.Fatal(err)
				}
			}
			o := c.crash()
			if o.Adopted != 2 || o.Dropped != 0 || len(o.Workers[0].UEs) != 1 || len(o.Workers[1].UEs) != 0 {
				t.Fatalf("%+v", o)
			}
			a = c.rigs[0]
			u := a.context(p)
			if len(u.Sets) != 2 || a.backend.Count() != 8 {
				t.Fatalf("%d sets, %d SAs", len(u.Sets), a.backend.Count())
			}
			if out := a.one(first.protectedFlow, first.message()); out.remote != scscf().Remote {
				t.Errorf("MO by the old set to %v", out.remote)
			}
			if out := a.one(p.protectedFlow, p.message()); out.remote != scscf().Remote {
				t.Errorf("MO to %v", out.remote)
			}
			names := []string{path}
			if tt.record {
				names = append(names, moved)
			}
			for i, route := range names {
				p.downlink(t, c.one(0, scscf(), strings.Replace(mtInvite(route, ""), "z9hG4bKs9", fmt.Sprintf("z9hG4bKr%d", i), 1)))
			}
			c.mustMove(p, 0, 1) // and once more
			p.downlink(t, c.one(0, scscf(), strings.Replace(mtInvite(path, ""), "z9hG4bKs9", "z9hG4bKr9", 1)))
			c.rigs[1].leave(p)
			c.settle()
			c.empty()
		})
	}
}

// A retransmission of an answered REGISTER gets its answer from the new worker, and the oldest of many names gives way.
func TestMoveOften(t *testing.T) {
	c := newCrew(t, 2)
	p := newPhone()
	c.rigs[0].challenge(p, clearFlow(), 5060)
	p.authorization = proof
	sm7 := p.register("sm7", 6300, "Security-Verify: "+p.server)
	req := c.rigs[0].one(p.protectedFlow, sm7)
	ok := c.rigs[0].one(coreFlow(), answerTo(t, req.msg, "200 OK", granted...))
	c.settle()
	c.mustMove(p, 0, 1)
	if again := c.one(1, p.protectedFlow, sm7); again.msg != ok.msg || again.remote != ok.remote {
		t.Errorf("answered with:\n%s", again.msg)
	}
	first := c.rigs[1].path(p)
	for i := range maxFormer + 3 {
		c.mustMove(p, 1-i%2, i%2)
	}
	at := (maxFormer + 2) % 2
	u := c.rigs[at].context(p)
	if n := c.cfg.Fleet.names.n.Load(); n != maxFormer || len(c.rigs[at].w.former[u]) != maxFormer {
		t.Errorf("%d names, %d with the context", n, len(c.rigs[at].w.former[u]))
	}
	if out := c.one(at, scscf(), mtInvite(first, "")); status(t, out.msg) != 430 {
		t.Errorf("by a name of long ago:\n%s", out.msg)
	}
	c.rigs[at].leave(p)
	c.settle()
	c.empty()
}

// Finding the newest name costs a message no memory.
func TestNewestName(t *testing.T) {
	var r renames
	for i := range uint32(600) {
		r.set(Name{0, i, 1}, Name{1, i, 2})
		r.set(Name{1, i, 2}, Name{2, i + 1, 3})
	}
	cfg := &Config{Fleet: new(Fleet)}
	cfg.Fleet.names.set(Name{0, 7, 1}, Name{1, 7, 2})
	var got token
	if n := testing.AllocsPerRun(100, func() { got = cfg.renamed(token{kind: tokenPath, ue: 7, gen: 1, called: true}) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if got != (token{kind: tokenPath, worker: 1, ue: 7, gen: 2, called: true}) {
		t.Errorf("%+v", got)
	}
	if got := r.newest(Name{0, 599, 1}); got != (Name{2, 600, 3}) {
		t.Errorf("%+v", got)
	}
	if got := r.newest(Name{0, 599, 2}); got != (Name{0, 599, 2}) {
		t.Errorf("another generation leads to %+v", got)
	}
	for i := range uint32(600) {
		r.remove(Name{1, i, 2})
		r.remove(Name{0, i, 1})
		r.remove(Name{0, i, 1})
	}
	if n := r.n.Load(); n != 0 {
		t.Errorf("%d names are left", n)
	}
}

// Phones talk and are called while they are moved about by several operators at once: every message passes exactly once, and in the
// end every phone is with one worker, the one that packets are steered to.
func TestMoveConcurrently(t *testing.T) {
	const phones, rounds = 6, 40
	c := newCrew(t, 3)
	var homes sync.Map
	c.cfg.Home = func(a netip.Addr, worker int) error { homes.Store(a, worker); return nil }
	var all []*phone
	var paths []string
	for i := range phones {
		p := c.rigs[0].signUp(phoneAt(netip.AddrFrom4([4]byte{10, 45, 1, byte(i)}).String(), i+1))
		homes.Store(p.addr, 0)
		all, paths = append(all, p), append(paths, c.rigs[0].path(p))
	}
	c.settle()
	c.sent()

	stop := make(chan struct{})
	var loops, others sync.WaitGroup
	for k, r := range c.rigs {
		loops.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				c.step(k)
				r.l.now = r.l.now.Add(time.Millisecond)
				r.w.Tick(r.l.now)
				runtime.Gosched()
			}
		})
	}
	loops.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				c.rigs[0].backend.Answer()
				runtime.Gosched()
			}
		}
	})
	post := func(worker int, f func(*Worker)) {
		r := c.rigs[worker]
		if err := r.l.Post(func() { f(r.w) }); err != nil {
			t.Error(err)
		}
	}
	for i, p := range all {
		others.Go(func() { // the phone, whose packets come to any worker's socket
			text := p.says()
			for n := range rounds {
				msg := strings.Replace(text, "Call-ID: m1", fmt.Sprintf("Call-ID: up%d-%d", i, n), 1)
				post(n%3, func(w *Worker) {
					if home, _ := homes.Load(p.addr); home.(int) != w.id {
						_ = w.eg.Hand(home.(int), p.protectedFlow, []byte(msg))
						return
					}
					w.Message(p.protectedFlow, []byte(msg))
				})
				runtime.Gosched()
			}
		})
		others.Go(func() { // the core
			for n := range rounds {
				msg := strings.NewReplacer("INVITE", "OPTIONS", "z9hG4bKs9", fmt.Sprintf("z9hG4bKd%d-%d", i, n),
					"Call-ID: m2", fmt.Sprintf("Call-ID: down%d-%d", i, n)).Replace(mtInvite(paths[i], ""))
				post(n%3, func(w *Worker) { w.Message(scscf(), []byte(msg)) })
				runtime.Gosched()
			}
		})
	}
	var moves atomic.Int64
	for i, p := range all {
		for range 2 { // two operators at the same phone
			others.Go(func() {
				for n := range rounds / 4 {
					ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
					ues, _, err := c.cfg.Fleet.UEs(ctx, UEQuery{Addr: p.addr}, UEID{}, 9)
					if err == nil && len(ues) > 0 { // none while it is between two workers
						_, err = c.cfg.Fleet.Move(ctx, ues[0].ID, (i+n)%3)
					}
					cancel()
					switch {
					case err == nil:
						moves.Add(1)
					case !errors.Is(err, ErrBusy) && !errors.Is(err, ErrNoUE):
						t.Error(err)
					}
				}
			})
		}
	}
	others.Wait()
	close(stop)
	loops.Wait()
	c.settle()
	seen := make(map[string]int)
	for _, s := range c.sent() {
		if !strings.HasPrefix(s.msg, "SIP/2.0") {
			seen[get(t, s.msg, sipmsg.CallID)]++
		}
	}
	if len(seen) != 2*phones*rounds || slices.Max(slices.Collect(maps.Values(seen))) != 1 {
		t.Errorf("%d of %d messages passed, one of them %d times", len(seen), 2*phones*rounds, slices.Max(slices.Collect(maps.Values(seen))))
	}
	if moves.Load() == 0 {
		t.Error("nobody has moved")
	}
	latest := c.rigs[0].l.now // each loop had a clock of its own
	for _, r := range c.rigs {
		if r.l.now.After(latest) {
			latest = r.l.now
		}
	}
	for _, r := range c.rigs {
		r.l.now = latest
	}
	for _, p := range all {
		home, _ := homes.Load(p.addr)
		r := c.rigs[home.(int)]
		if r.w.table.UEOf(p.impi, p.addr) == nil {
			t.Fatalf("%s is not with worker %v", p.addr, home)
		}
		r.leave(p)
		c.settle()
	}
	c.empty()
}

// A request that the core sends to the old worker over TCP goes to the phone as well. The connection stays where it is, so the
// answers, our own among them, go on one to the sent-by (RFC 3261 §18.2.2).
func TestMoveRequestOverTCP(t *testing.T) {
	c := newCrew(t, 2)
	p := c.rigs[0].registered()
	c.settle()
	path := c.rigs[0].path(p)
	c.mustMove(p, 0, 1)
	b := c.rigs[1]
	f := scscf()
	f.Transport, f.Conn, f.Remote = ims.TCP, 9, netip.MustParseAddrPort("10.0.1.7:40000")
	invite := strings.Replace(mtInvite(path, ""), "SIP/2.0/UDP 10.0.1.7", "SIP/2.0/TCP 10.0.1.7", 1)
	req := c.one(0, f, invite)
	p.downlink(t, req)
	wantDial := func(what string, out []sent) {
		t.Helper()
		if len(out) != 0 || len(b.l.dials) != 1 || b.l.dials[0].remote != scscf().Remote || len(c.rigs[0].l.dials) != 0 {
			t.Errorf("%s: sent %v, dials %v and %v", what, out, c.rigs[0].l.dials, b.l.dials)
		}
	}
	wantDial("answer of the phone", c.deliver(1, p.protectedFlow, answerTo(t, req.msg, "180 Ringing")))
	b.l.dials = nil
	clear(b.w.mwDial)
	wantDial("our own", c.deliver(0, f, strings.Replace(invite, "Max-Forwards: 67", "Max-Forwards: 0", 1)))
}

// A restart leaves fewer workers than the core knows Mw ports of: a phone is called, answers and goes on with its dialogs by the port
// of a worker that there is no more, which another one has now.
func TestFewerWorkers(t *testing.T) {
	c := newCrew(t, 2)
	p := c.rigs[1].registered()
	c.settle()
	u := c.rigs[1].context(p)
	path := "<sip:" + string(c.rigs[1].w.seal.seal(&c.rigs[1].w.sc, c.rigs[1].w.pathToken(u))) + "@10.0.1.5:5061;lr>"
	asked := c.one(1, p.protectedFlow, p.message())
	called := c.one(1, scscf(), mtInvite(path, ""))
	c.snapshot()
	c.cfg.Workers = 1
	if o := c.crash(); o.Relocated != 1 || c.cfg.MwPorts != 2 {
		t.Fatalf("%d relocated, %d ports", o.Relocated, c.cfg.MwPorts)
	}
	former := scscf()
	former.Local = netip.AddrPortFrom(mwAddr.Addr(), mwAddr.Port()+1)
	p.downlink(t, c.one(0, former, strings.Replace(mtInvite(path, ""), "z9hG4bKs9", "z9hG4bKs10", 1)))
	p.downlink(t, c.one(0, former, answerTo(t, asked.msg, "200 OK")))
	if out := c.one(0, p.protectedFlow, answerTo(t, called.msg, "200 OK", "Contact: <sip:10.45.0.7:6300>")); out.remote != scscf().Remote {
		t.Errorf("answer of the phone to %v", out.remote)
	}
	c.rigs[0].leave(p)
	c.settle()
	c.empty()
}

// A restart gives a phone to another worker, and its SAs keep the label of the old one: no phone that comes there gets the same.
func TestLabelsAfterRestart(t *testing.T) {
	c := newCrew(t, 2)
	p := c.rigs[1].registered()
	c.settle()
	label := c.rigs[1].context(p).Current.Label
	c.snapshot()
	c.crash()
	if s := c.rigs[0].context(p).Current; s.Label != label {
		t.Fatalf("label %#x, was %#x", s.Label, label)
	}
	labels := map[uint32]bool{label: true}
	for i := range 3 {
		q := c.rigs[1].signUp(phoneAt(fmt.Sprintf("10.45.0.%d", 20+i), 20+i))
		c.settle()
		if s := c.rigs[1].context(q).Current; labels[s.Label] {
			t.Errorf("label %#x twice", s.Label)
		} else {
			labels[s.Label] = true
		}
		f := p.protectedFlow // what the new one sends in the name of the old one contradicts itself
		f.Label = c.rigs[1].context(q).Current.Label
		if out := c.deliver(0, f, p.message()); len(out) != 0 {
			t.Errorf("with the label of another phone: %v", out)
		}
	}
}

// A phone registers from a new address while the worker of the one before has too much to do to hear of it: it hears later.
func TestNewAddressMeanwhile(t *testing.T) {
	c := newCrew(t, 2)
	p := c.rigs[0].registered()
	c.settle()
	q := *p
	q.addr, q.authorization, q.callID = netip.MustParseAddr("10.45.0.9"), "", "new"
	c.rigs[1].challenge(&q, q.clear(), 5060)
	c.rigs[0].l.full = true
	c.rigs[1].accept(&q)
	c.rigs[0].l.full = false
	c.advance(time.Second)
	if u := c.rigs[0].context(p); u.State != registrar.Deregistered {
		t.Errorf("at the address of before it is %s", u.State)
	}
}
