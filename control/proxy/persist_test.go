package proxy

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/control/sa/satest"
	"github.com/gmgate/gmgate/control/store"
	"github.com/gmgate/gmgate/control/store/storetest"
	"github.com/gmgate/gmgate/control/survive"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// keptRig is a rig whose registrations are kept.
type keptRig struct {
	*rig
	store *storetest.Memory
}

func newKeptRig(t *testing.T, change ...func(*Config)) *keptRig {
	k := &keptRig{store: storetest.NewMemory()}
	k.rig = newRig(t, append(change, func(c *Config) { c.Store, c.Fleet = k.writer(t), new(Fleet) })...)
	return k
}

func (k *keptRig) writer(t *testing.T) *store.Writer {
	ids, err := k.store.SetIDs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	w := store.NewWriter(store.WriterConfig{Store: k.store, Stored: ids})
	t.Cleanup(func() { _ = w.Close(context.Background()) })
	return w
}

// snapshot returns what the store has once everything has reached it.
func (k *keptRig) snapshot() *store.Snapshot {
	k.t.Helper()
	k.advance(2 * time.Second) // temporary sets wait a second
	if err := k.cfg.Store.Flush(k.t.Context()); err != nil {
		k.t.Fatal(err)
	}
	snap, err := store.Read(k.t.Context(), k.store)
	if err != nil {
		k.t.Fatal(err)
	}
	return snap
}

// answering answers installations at once.
type answering struct{ *satest.Backend }

func (a answering) Install(p sa.Params, done func(error)) { a.Backend.Install(p, done); a.Answer() }

// restart is a crash and a new process after some time. lost says that the SAs are gone as well.
func (k *keptRig) restart(t *testing.T, after time.Duration, lost bool) *survive.Outcome {
	t.Helper()
	k.snapshot()
	now := k.l.now.Add(after)
	if k.backend = k.backend.Restarted(); lost {
		k.backend = new(satest.Backend)
	}
	k.cfg.Fleet = new(Fleet)
	o, err := survive.Load(t.Context(), survive.Config{
		Store: k.store, Backend: answering{k.backend}, Workers: 1, Owner: func(netip.Addr) int { return 0 }, Fit: k.cfg.Fit,
		Now: func() time.Time { return now }, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	k.cfg.Store = k.writer(t)
	kept := &Kept{Freed: o.Workers[0].Freed, LastID: o.Workers[0].LastID}
	for _, u := range o.Workers[0].UEs {
		kept.UEs = append(kept.UEs, KeptUE(u))
	}
	k.boot(now, kept)
	return o
}

// A phone in the middle of a re-registration, with an old, a current and a temporary set, notices nothing of a crash: MT
// by the old set, the confirmation of the temporary one, MO, and the next re-registration.
func TestRestart(t *testing.T) {
	for _, lost := range []bool{false, true} {
		name := map[bool]string{false: "SAs still there", true: "SAs gone"}[lost]
		t.Run(name, func(t *testing.T) {
			k := newKeptRig(t)
			p := k.registered()
			first := *p
			path := k.path(p)
			p.agree()
			req := k.one(first.protectedFlow, p.register("re1", 6300, "Security-Verify: "+first.server))
			ans := k.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge))
			k.readServer(p, ans.msg)
			k.confirm(p) // set 1 is old and in use, set 2 established
			second := *p
			p.agree()
			req = k.one(second.protectedFlow, p.register("re2", 6300, "Security-Verify: "+second.server))
			ans = k.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge))
			k.readServer(p, ans.msg)
			before := describe(k.w.table.UEOf(impi, ueAddr), k.l.now.Add(12*time.Second))

			o := k.restart(t, 10*time.Second, lost)
			if o.Adopted+o.Reinstalled != 3 || (o.Adopted == 3) == lost || o.Dropped+o.Expired+o.Orphans != 0 {
				t.Fatalf("%+v", o)
			}
			u := k.w.table.UEOf(impi, ueAddr)
			if got := describe(u, k.l.now); got != before {
				t.Errorf("restored:\n%s\nwant\n%s", got, before)
			}
			from := coreFlow()
			from.Remote = netip.MustParseAddrPort("10.0.1.7:6060")
			second.downlink(t, k.one(from, mtInvite(path, ""))) // the phone has used set 2 by its REGISTER
			mo := k.one(second.protectedFlow, p.message())
			if mo.remote != netip.MustParseAddrPort("10.0.1.7:6060") ||
				get(t, mo.msg, sipmsg.PAssertedIdentity) != "<sip:+15550100001@"+domain+">, <tel:+15550100001>" {
				t.Errorf("MO to %v:\n%s", mo.remote, mo.msg)
			}
			_, done := k.confirm(p) // SM7 over the temporary set: what was agreed on before the crash holds
			p.downlink(t, done)
			if u.Current == nil || len(u.Sets) != 2 || k.backend.Count() != 8 {
				t.Errorf("%d sets, %d SAs", len(u.Sets), k.backend.Count())
			}
			k.one(p.protectedFlow, p.message())
			p.downlink(t, k.one(from, mtInvite(path, "")))

			// Set ids and SPIs go on.
			ids := make(map[uint64]bool)
			last := *p
			p.agree()
			req = k.one(last.protectedFlow, p.register("re3", 6300, "Security-Verify: "+last.server))
			k.readServer(p, k.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge)).msg)
			for _, s := range u.Sets {
				if ids[s.ID] {
					t.Errorf("set id %#x twice", s.ID)
				}
				ids[s.ID] = true
			}
		})
	}
}

// describe writes down what has to survive.
func describe(u *registrar.UE, now time.Time) string {
	var b strings.Builder
	line := func(parts ...string) { b.WriteString(strings.Join(parts, " ") + "\n") }
	if u == nil {
		return "no UE"
	}
	line(u.IMPI, u.Addr.String(), u.Local.String(), u.State.String(), u.Contact, strings.Join(u.Identities, ","),
		fmt.Sprintf("%v", u.Beside), fmt.Sprint(u.Route), u.NextHop.Addr.String(),
		u.Expires.Sub(now).Round(time.Second).String())
	for _, s := range u.Sets {
		over, current := "", ""
		if s.Over != nil {
			over = "over " + s.Over.SPIs.PS.String()
		}
		if u.Current == s {
			current = "current"
		}
		var agreed registrar.Agreement
		if s.Agreement != nil {
			agreed = *s.Agreement
		}
		line(s.Phase.String(), s.SPIs.PS.String(), s.SPIs.PC.String(), s.SPIs.UC.String(), s.SPIs.US.String(), agreed.Server, agreed.Client,
			agreed.CallID, agreed.IMPU, over, current, s.Deadline.Sub(now).Round(time.Second).String(), s.Keys.Suite.String())
	}
	return b.String()
}

// Nothing of a registration that nobody has proved to be entitled to is kept; a registration is, until it ends.
func TestWhatIsKept(t *testing.T) {
	k := newKeptRig(t)
	p := newPhone()
	k.challenge(p, clearFlow(), 5060)
	if s := k.snapshot(); len(s.Sets)+len(s.Registrations)+len(s.Freed) != 0 {
		t.Errorf("of a challenged phone %d sets and %d registrations are kept", len(s.Sets), len(s.Registrations))
	}
	k.confirm(p)
	s := k.snapshot()
	if len(s.Sets) != 1 || len(s.Registrations) != 1 || s.Registrations[0].Current != s.Sets[0].ID {
		t.Fatalf("%d sets, %d registrations", len(s.Sets), len(s.Registrations))
	}
	if got := s.Sets[0]; got.ClientText+got.ServerText+got.CallID+got.IMPU != "" || got.Keys.Suite.String() != "hmac-sha-1-96=aes-cbc" ||
		got.Hard.Sub(got.Deadline) != time.Minute || got.Used {
		t.Errorf("of a confirmed set %q, %q are kept, %s", got.ServerText, got.ClientText, got.Keys.Suite)
	}
	k.one(p.protectedFlow, p.message())
	if s = k.snapshot(); !s.Sets[0].Used {
		t.Error("first use is not kept")
	}
	dereg := k.one(p.protectedFlow, p.register("de", 6300, "Expires: 0", "Security-Verify: "+p.server))
	k.one(coreFlow(), answerTo(t, dereg.msg, "200 OK"))
	if s = k.snapshot(); len(s.Sets) != 1 || !s.Sets[0].Removing || s.Registrations[0].State != store.Deregistered {
		t.Errorf("de-registered: %+v", s.Registrations)
	}
	gen := s.Registrations[0].Gen
	k.advance(130 * time.Second)
	if s = k.snapshot(); len(s.Sets)+len(s.Registrations) != 0 || len(s.Freed) != 1 || s.Freed[0].Gen != gen {
		t.Errorf("at the end: %d sets, %d registrations, freed %+v", len(s.Sets), len(s.Registrations), s.Freed)
	}
}

// A de-registration that was under way is brought to its end; a set whose life ended meanwhile is gone, its flow token
// reaches nobody, and the index of its context comes back with another generation.
func TestRestartTooLate(t *testing.T) {
	k := newKeptRig(t)
	p := k.registered()
	path, gen := k.path(p), k.w.table.UEOf(impi, ueAddr).Gen
	dereg := k.one(p.protectedFlow, p.register("de", 6300, "Expires: 0", "Security-Verify: "+p.server))
	k.one(coreFlow(), answerTo(t, dereg.msg, "200 OK"))
	k.restart(t, time.Minute, false)
	u := k.w.table.UEOf(impi, ueAddr)
	if u == nil || u.State != registrar.Deregistered || k.backend.Count() != 4 {
		t.Fatalf("during the grace: %+v, %d SAs", u, k.backend.Count())
	}
	if out := k.one(p.protectedFlow, p.message()); status(t, out.msg) != 403 {
		t.Errorf("request of a de-registered phone:\n%s", out.msg)
	}
	if o := k.restart(t, time.Hour, false); o.Expired != 1 || o.Orphans != 4 || k.backend.Count() != 0 || k.w.table.UEs() != 0 {
		t.Errorf("%+v, %d SAs, %d UEs", o, k.backend.Count(), k.w.table.UEs())
	}
	if out := k.one(coreFlow(), mtInvite(path, "")); status(t, out.msg) != 430 {
		t.Errorf("MT by a stale token:\n%s", out.msg)
	}
	q := k.registered()
	if u := k.w.table.UEOf(impi, ueAddr); u.Gen == gen || k.path(q) == path {
		t.Errorf("generation %d again", gen)
	}
}

// What the configuration no longer allows cannot go on, and leaves no SA behind.
func TestRestartUnfit(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"address":     func(c *Config) { c.Gm = []netip.Addr{netip.MustParseAddr("10.0.0.6")} },
		"server port": func(c *Config) { c.Registrar.ServerPorts = []uint16{7100} },
		"client port": func(c *Config) { c.Registrar.ClientPorts = []uint16{7110, 7111, 7112, 7113} },
		"algorithm":   func(c *Config) { c.Suites = slices.Clone(c.Suites[:1]) },
	} {
		t.Run(name, func(t *testing.T) {
			k := newKeptRig(t)
			k.registered()
			change(k.cfg)
			o := k.restart(t, time.Second, false)
			if o.Dropped != 1 || k.backend.Count() != 0 || k.w.table.UEs() != 0 || len(k.snapshot().Sets) != 0 {
				t.Errorf("%+v, %d SAs, %d UEs", o, k.backend.Count(), k.w.table.UEs())
			}
		})
	}
}

// Two records that contradict each other: the second phone registers anew, its SAs and record go.
func TestRestartContradiction(t *testing.T) {
	k := newKeptRig(t)
	k.registered()
	snap := k.snapshot()
	s, r := snap.Sets[0], snap.Registrations[0]
	s.ID, s.UE, r.Index, r.IMPI, s.IMPI, r.Current = s.ID+7, 9, 9, "other@"+domain, "other@"+domain, s.ID+7
	s.SPIs.PC, s.SPIs.PS, s.SPIs.UC, s.SPIs.US = s.SPIs.PC+1, s.SPIs.PS+1, s.SPIs.UC+100, s.SPIs.US+100
	if err := k.store.Apply(t.Context(), store.Batch{Sets: []store.Set{s}, Registrations: []store.Registration{r}}); err != nil {
		t.Fatal(err)
	}
	k.restart(t, time.Second, false)
	if k.w.table.UEs() != 1 || k.backend.Count() != 4 || k.w.table.UEOf(impi, ueAddr) == nil {
		t.Errorf("%d UEs, %d SAs", k.w.table.UEs(), k.backend.Count())
	}
	if snap := k.snapshot(); len(snap.Sets) != 1 || len(snap.Registrations) != 1 {
		t.Errorf("%d sets and %d registrations are kept", len(snap.Sets), len(snap.Registrations))
	}
	// Nobody else is taken for the second phone by its flow tokens.
	for i := range uint8(8) {
		s, err := k.w.table.Begin(&registrar.Offer{
			IMPI: "third@" + domain, Local: gmAddr, UE: netip.AddrFrom4([4]byte{10, 46, 0, i}), SPIC: 1000, SPIS: 1001, PortC: 6300, PortS: 6301,
		}, ims.ESPKeys{}, func(*registrar.Set, error) {})
		if err != nil {
			t.Fatal(err)
		}
		if s.UE.Index == r.Index && s.UE.Gen != r.Gen+1<<8 {
			t.Errorf("generation %d follows %d", s.UE.Gen, r.Gen)
		}
	}
	if u := k.w.table.Lookup(r.Index, r.Gen+1<<8); u == nil {
		t.Error("index 9 was not given out again")
	}
}

// The names that a context had with other workers stay with its record, whatever changes, until it ends.
func TestFormerNames(t *testing.T) {
	k := newKeptRig(t)
	p := k.registered()
	r := k.snapshot().Registrations[0]
	r.Former = []store.Freed{{Context: store.Context{Worker: 3, Index: 7}, Gen: 9}}
	if err := k.store.Apply(t.Context(), store.Batch{Registrations: []store.Registration{r}}); err != nil {
		t.Fatal(err)
	}
	o := k.restart(t, time.Second, false)
	if now := o.Moved[survive.Name(r.Former[0])]; now != (survive.Name{Context: r.Context, Gen: r.Gen}) {
		t.Errorf("the former name leads to %+v", now)
	}
	k.one(p.protectedFlow, p.message())
	if snap := k.snapshot(); !snap.Sets[0].Used || !slices.Equal(snap.Registrations[0].Former, r.Former) {
		t.Errorf("former names after a change: %+v", snap.Registrations[0].Former)
	}
	k.cfg.Fleet.Expired(k.w.table.UEOf(impi, ueAddr).Current.ID)
	k.settle()
	if k.w.table.UEs() != 0 || len(k.w.former) != 0 {
		t.Errorf("%d contexts, %d with former names", k.w.table.UEs(), len(k.w.former))
	}
}

// The backend says that a set has expired: it is gone here as well, and its phone with it.
func TestBackendExpires(t *testing.T) {
	k := newKeptRig(t)
	k.registered()
	id := k.w.table.UEOf(impi, ueAddr).Current.ID
	k.cfg.Fleet.Expired(id + 1)
	k.settle()
	if k.w.table.UEs() != 1 {
		t.Fatal("another set's end was taken for this one's")
	}
	k.cfg.Fleet.Expired(id)
	k.cfg.Fleet.Expired(id)
	k.settle()
	if k.w.table.UEs() != 0 || k.backend.Count() != 0 || k.w.table.SPIsInUse() != 0 || len(k.snapshot().Sets) != 0 {
		t.Errorf("%d UEs, %d SAs, %d SPIs", k.w.table.UEs(), k.backend.Count(), k.w.table.SPIsInUse())
	}
}

// mend asks for sets to be mended, and lets loop and backend do it.
func (k *keptRig) mend(sets map[uint64]sa.Counters) {
	k.t.Helper()
	done := make(chan error, 1)
	go func() { done <- k.cfg.Fleet.Mend(k.t.Context(), sets) }()
	for {
		select {
		case err := <-done:
			if err != nil {
				k.t.Error(err)
			}
			return
		default:
			k.settle()
		}
	}
}

// A set that was mended before it was worth keeping is kept with the numbers that it has gone on from: after the next
// restart none of them is used again.
func TestMendUnkept(t *testing.T) {
	k := newKeptRig(t)
	p := newPhone()
	k.challenge(p, clearFlow(), 5060)
	s := k.w.table.UEOf(impi, ueAddr).Sets[0]
	k.backend.Lose(s.SAs()[0])
	k.mend(map[uint64]sa.Counters{s.ID: {1, 2, 3, 4}})
	k.confirm(p)
	if snap := k.snapshot(); len(snap.Sets) != 1 || snap.Sets[0].Counters != (sa.Counters{1, 2, 3, 4}) {
		t.Errorf("%d sets are kept, numbers %v", len(snap.Sets), snap.Sets[0].Counters)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := k.cfg.Fleet.Mend(ctx, map[uint64]sa.Counters{s.ID: {}}); err == nil {
		t.Error("mended without anybody to do it")
	}
}

// What the backend has lost is installed again with the numbers asked for; where that fails the set goes.
func TestMend(t *testing.T) {
	k := newKeptRig(t)
	p := k.registered()
	s := k.w.table.UEOf(impi, ueAddr).Current
	sas := s.SAs()
	k.backend.Lose(sas[0])
	k.backend.Lose(sas[2])
	k.mend(map[uint64]sa.Counters{s.ID: {1, 2, 3, 4}, s.ID + 1: {}})
	last := k.backend.Installed[len(k.backend.Installed)-1]
	if k.backend.Count() != 4 || last.Counters != (sa.Counters{1, 2, 3, 4}) || last.Hard <= 0 || len(last.Keys.Auth) != 20 {
		t.Errorf("%d SAs, counters %v, hard limit %v", k.backend.Count(), last.Counters, last.Hard)
	}
	k.one(p.protectedFlow, p.message())
	k.backend.Lose(sas[1])
	k.backend.Fail = func(sa.Params) error { return satest.ErrExists }
	k.mend(map[uint64]sa.Counters{s.ID: {}})
	k.settle()
	if k.w.table.UEs() != 0 || k.backend.Count() != 0 {
		t.Errorf("%d UEs, %d SAs", k.w.table.UEs(), k.backend.Count())
	}
}

// The reconciler asks the workers for their sets.
func TestFleetSets(t *testing.T) {
	k := newKeptRig(t, with(allow))
	k.registered()
	plainOne := newPhone()
	plainOne.addr, plainOne.impi = netip.MustParseAddr("10.45.0.9"), "plain@"+domain
	there := clearFlow()
	there.Remote = netip.AddrPortFrom(plainOne.addr, 5060)
	plainOne.authorization = strings.Replace(credentials, impi, plainOne.impi, 1)
	req := k.one(there, plainOne.register("fs", 5060, append([]string{"Call-ID: fs"}, plain...)...))
	k.one(coreFlow(), answerTo(t, req.msg, "200 OK", plainOne.accepted()...))
	q := newPhone()
	q.addr, q.impi = netip.MustParseAddr("10.45.0.8"), "other@"+domain
	over := clearFlow()
	over.Remote = netip.AddrPortFrom(q.addr, 5060)
	k.challenge(q, over, 5060)
	k.snapshot()
	got := make(chan map[uint64]bool, 1)
	go func() {
		sets, inClear, err := k.cfg.Fleet.Sets(t.Context())
		if err != nil || len(inClear) != 1 {
			t.Errorf("%d associations: %v", len(inClear), err)
		}
		got <- sets
	}()
	var sets map[uint64]bool
	for sets == nil {
		select {
		case sets = <-got:
		default:
			k.settle()
		}
	}
	kept := 0
	for _, b := range sets {
		if b {
			kept++
		}
	}
	if len(sets) != 2 || kept != 1 {
		t.Errorf("%v", sets)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := k.cfg.Fleet.Sets(ctx); err == nil {
		t.Error("an answer without anybody to ask")
	}
}
