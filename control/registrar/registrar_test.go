package registrar

import (
	"errors"
	"flag"
	"fmt"
	"math"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/control/sa/satest"
	"github.com/gmgate/gmgate/control/wheel"
)

const (
	tick  = 10 * time.Millisecond
	await = 4 * time.Minute
	old   = 128 * time.Second
)

var (
	gm  = netip.MustParseAddr("10.0.0.5")
	ue1 = netip.MustParseAddr("10.45.0.7")
	ue2 = netip.MustParseAddr("10.45.0.8")
)

// bench is a table with a fake backend, and time that the test moves.
type bench struct {
	t       testing.TB
	table   *Table
	backend satest.Backend
	wheel   *wheel.Wheel
	now     time.Time
	spis    *sa.SPIPool

	sets    map[sa.Phase]int
	ues     map[State]int
	expired int

	associations int

	gone  []*Set
	ended []*UE
}

func (b *bench) Sets(p sa.Phase, d int) { b.sets[p] += d }
func (b *bench) Associations(d int)     { b.associations += d }
func (b *bench) UEs(s State, d int)     { b.ues[s] += d }
func (b *bench) Unexpected(fsm string, state, event fmt.Stringer) {
	b.t.Errorf("%s: unexpected event %v in state %v", fsm, event, state)
}
func (b *bench) AwaitAuthExpired()      { b.expired++ }
func (b *bench) SetRemoved(s *Set)      { b.gone = append(b.gone, s) }
func (b *bench) Gone(u *UE)             { b.ended = append(b.ended, u) }
func (b *bench) post(f func()) error    { f(); return nil }
func (b *bench) clock() time.Time       { return b.now }
func (b *bench) tuples(s *Set) ims.Flow { return flow(s.Ports.UC, s.Ports.PS) }
func flow(ue, local uint16) ims.Flow    { return flowOf(ue1, ue, local) }
func (b *bench) advance(d time.Duration) {
	for end := b.now.Add(d); b.now.Before(end); {
		b.now = b.now.Add(min(time.Second, end.Sub(b.now)))
		b.wheel.Advance(b.now)
		b.backend.Answer()
	}
}

func flowOf(ue netip.Addr, port, local uint16) ims.Flow {
	return ims.Flow{
		Local: netip.AddrPortFrom(gm, local), Remote: netip.AddrPortFrom(ue, port),
		Transport: ims.UDP, Side: ims.GmProtected,
	}
}

func newBench(t testing.TB) *bench {
	t.Helper()
	b := &bench{
		t: t, now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
		sets: make(map[sa.Phase]int), ues: make(map[State]int),
	}
	b.wheel = wheel.New(tick, b.now)
	var err error
	if b.spis, err = sa.NewSPIPool(1<<28, 1<<29); err != nil {
		t.Fatal(err)
	}
	b.table = New(Config{
		ServerPorts: []uint16{6100, 6101}, ClientPorts: []uint16{6110, 6111, 6112, 6113},
		AwaitAuth: await, OldSet: old, MaxSets: 3,
	}, 0, b.spis, b.wheel, b.clock, &b.backend, b.post, b)
	return b
}

func offer(n int) *Offer {
	return &Offer{
		IMPI: "user1@ims", Local: gm, UE: ue1,
		SPIC: ims.SPI(1000 + 2*n), SPIS: ims.SPI(1001 + 2*n), PortC: uint16(6300 + n), PortS: 6200,
	}
}

// begin starts a set and lets the backend acknowledge it.
func (b *bench) begin(o *Offer) *Set {
	b.t.Helper()
	var got error
	answered := false
	s, err := b.table.Begin(o, ims.ESPKeys{}, func(_ *Set, err error) { got, answered = err, true })
	if err != nil {
		b.t.Fatalf("Begin: %v", err)
	}
	if s.Phase != sa.Reserved || b.table.Find(b.tuples(s)) != nil {
		b.t.Fatalf("before the backend's answer the set is %v", s.Phase)
	}
	b.backend.Answer()
	if !answered || got != nil || s.Phase != sa.Temporary {
		b.t.Fatalf("answered %v, error %v, phase %v", answered, got, s.Phase)
	}
	return s
}

// empty checks that nothing is left anywhere.
func (b *bench) empty() {
	b.t.Helper()
	b.backend.Answer()
	if n := b.backend.Count(); n != 0 {
		b.t.Errorf("%d SAs left in the backend", n)
	}
	if n := b.spis.InUse(); n != 0 {
		b.t.Errorf("%d SPIs left in use", n)
	}
	if b.associations != 0 {
		b.t.Errorf("gauge of associations is %d", b.associations)
	}
	if b.table.UEs() != 0 || len(b.table.byTuple) != 0 || len(b.table.byAddr) != 0 || len(b.table.byIMPI) != 0 || b.wheel.Len() != 0 {
		b.t.Errorf("left: %d UE contexts, %d tuples, %d addresses, %d timers",
			b.table.UEs(), len(b.table.byTuple), len(b.table.byAddr), b.wheel.Len())
	}
	if here, all := b.table.Unconfirmed(Source(ue1)); here != 0 || all != 0 {
		b.t.Errorf("%d and %d sets count as unconfirmed", here, all)
	}
	for p, n := range b.sets {
		if n != 0 && p != 0 {
			b.t.Errorf("gauge of %v sets is %d", p, n)
		}
	}
	for s, n := range b.ues {
		if n != 0 {
			b.t.Errorf("gauge of UEs in state %v is %d", s, n)
		}
	}
}

// TS 33.203 §7.2: the set comes into being with the 401, is confirmed by the 200, used at once, and ends with its
// lifetime.
func TestInitialRegistration(t *testing.T) {
	b := newBench(t)
	s := b.begin(offer(0))
	if b.table.Find(flow(6300, 6100)) != s || b.table.Find(flow(6200, s.Ports.PC)) != s {
		t.Fatal("the set is not found by its inbound SAs")
	}
	for _, f := range []ims.Flow{flow(6300, s.Ports.PC), flow(6200, 6100), flow(6301, 6100), flowOf(ue2, 6300, 6100)} {
		if b.table.Find(f) != nil {
			t.Errorf("a set is found for %v", f)
		}
	}
	if here, all := b.table.Unconfirmed(Source(ue1)); here != 1 || all != 1 {
		t.Errorf("%d and %d sets count as unconfirmed, want 1", here, all)
	}
	b.table.Confirm(s, time.Hour)
	if here, all := b.table.Unconfirmed(Source(ue1)); here != 0 || all != 0 {
		t.Errorf("confirmed, and still %d and %d sets count as unconfirmed", here, all)
	}
	if s.Phase != sa.Established || s.UE.Current != s || s.UE.State != Registered {
		t.Fatalf("confirmed: phase %v, current %v, state %v", s.Phase, s.UE.Current == s, s.UE.State)
	}
	u := s.UE
	if b.table.Lookup(u.Index, u.Gen) != u || b.table.Lookup(u.Index, u.Gen+1) != nil || b.table.Lookup(0, 0) != nil {
		t.Error("lookup by index and generation")
	}
	b.advance(time.Hour - time.Second)
	if s.Phase != sa.Established {
		t.Fatalf("a second before its end the set is %v", s.Phase)
	}
	b.advance(2 * time.Second)
	if s.Phase != sa.Dead || b.table.Lookup(u.Index, u.Gen) != nil {
		t.Errorf("after its lifetime the set is %v", s.Phase)
	}
	b.empty()
}

// R6.11: an authentication that never comes leaves nothing behind.
//
// Peers: A3.04a
func TestAwaitAuth(t *testing.T) {
	b := newBench(t)
	s := b.begin(offer(0))
	b.advance(await + time.Second)
	if s.Phase != sa.Dead || b.expired != 1 {
		t.Errorf("phase %v, %d expired", s.Phase, b.expired)
	}
	b.empty()
}

// R5.29f: what the backend refuses leaves nothing behind.
func TestInstallFails(t *testing.T) {
	b := newBench(t)
	refusal := errors.New("no buffer space")
	b.backend.Fail = func(sa.Params) error { return refusal }
	var got error
	if _, err := b.table.Begin(offer(0), ims.ESPKeys{}, func(_ *Set, err error) { got = err }); err != nil {
		t.Fatal(err)
	}
	b.backend.Answer()
	if !errors.Is(got, refusal) {
		t.Errorf("error %v", got)
	}
	b.empty()
}

// A set that is dropped while the backend works on it is taken out when the answer comes.
func TestDroppedWhileInstalling(t *testing.T) {
	b := newBench(t)
	var first error
	if _, err := b.table.Begin(offer(0), ims.ESPKeys{}, func(_ *Set, err error) { first = err }); err != nil {
		t.Fatal(err)
	}
	s := b.begin(offer(1)) // replaces it; the backend answers both
	if !errors.Is(first, ErrAborted) {
		t.Errorf("first: %v", first)
	}
	if b.backend.Count() != 4 || b.spis.InUse() != 2 {
		t.Errorf("%d SAs and %d SPIs", b.backend.Count(), b.spis.InUse())
	}
	b.table.Drop(s, 0)
	b.advance(time.Second)
	b.empty()
}

// R6.3, R6.5: after a re-authentication the old set carries requests until the new one is used, then it has 64*T1 left.
//
// Peers: B3.04
func TestReauthentication(t *testing.T) {
	b := newBench(t)
	s1 := b.begin(offer(0))
	b.table.Confirm(s1, time.Hour)
	o := offer(1)
	o.Over = s1
	s2 := b.begin(o)
	if s2.Ports.PS != s1.Ports.PS || s2.Ports.PC == s1.Ports.PC {
		t.Fatalf("ports of the sets: %+v and %+v", s1.Ports, s2.Ports) // R1.5, R1.6
	}
	b.table.Touch(s1)
	b.table.Confirm(s2, time.Hour)
	u := s1.UE
	if s1.Phase != sa.Old || s2.Phase != sa.Established || u.Current != s1 {
		t.Fatalf("after the 200: %v, %v, current is the old one: %v", s1.Phase, s2.Phase, u.Current == s1)
	}
	b.advance(10 * time.Second)
	b.table.Touch(s2)
	if u.Current != s2 {
		t.Fatal("the new set is not in use after its first message")
	}
	b.table.Touch(s1) // R6.7: nothing changes
	if u.Current != s2 {
		t.Fatal("a message on the old set took it into use again")
	}
	b.advance(old - 2*time.Second)
	if s1.Phase != sa.Old {
		t.Fatalf("before 64*T1 the old set is %v", s1.Phase)
	}
	b.advance(3 * time.Second)
	if s1.Phase != sa.Dead || s2.Phase != sa.Established || b.backend.Count() != 4 {
		t.Fatalf("after 64*T1: %v, %v, %d SAs", s1.Phase, s2.Phase, b.backend.Count())
	}
	b.advance(time.Hour)
	b.empty()
}

// R6.6: an unused new set is taken into use when the old one has less than 64*T1 left.
//
// Peers: A1.25b
func TestHandOverByTime(t *testing.T) {
	b := newBench(t)
	s1 := b.begin(offer(0))
	b.table.Confirm(s1, 10*time.Minute)
	o := offer(1)
	o.Over = s1
	s2 := b.begin(o)
	b.table.Confirm(s2, time.Hour)
	b.advance(10*time.Minute - old - time.Second)
	if s1.UE.Current != s1 {
		t.Fatal("handed over too early")
	}
	b.advance(2 * time.Second)
	if s1.UE.Current != s2 || s1.Phase != sa.Old {
		t.Fatalf("not handed over: old set is %v", s1.Phase)
	}
	b.advance(old)
	if s1.Phase != sa.Dead {
		t.Errorf("old set is %v", s1.Phase)
	}
	// R5.30a: the new set inherits the longer life.
	if left := s2.Deadline.Sub(b.now); left < 45*time.Minute {
		t.Errorf("new set has %v left", left)
	}
}

// R6.14: a re-authentication that fails leaves the old set in use.
func TestFailedReauthentication(t *testing.T) {
	b := newBench(t)
	s1 := b.begin(offer(0))
	b.table.Confirm(s1, time.Hour)
	o := offer(1)
	o.Over = s1
	s2 := b.begin(o)
	b.table.Drop(s2, 4*time.Second)
	b.advance(5 * time.Second)
	if s2.Phase != sa.Dead || s1.Phase != sa.Established || s1.UE.Current != s1 {
		t.Errorf("phases %v and %v", s1.Phase, s2.Phase)
	}
}

// R6.9: a re-registration without a challenge moves the lifetime only, and never shortens it.
func TestRefresh(t *testing.T) {
	b := newBench(t)
	s := b.begin(offer(0))
	b.table.Confirm(s, time.Hour)
	spis := s.SPIs
	b.advance(30 * time.Minute)
	b.table.Refresh(s, time.Hour)
	b.advance(45 * time.Minute)
	if s.Phase != sa.Established || s.SPIs != spis || b.backend.Count() != 4 {
		t.Fatalf("phase %v", s.Phase)
	}
	b.table.Refresh(s, time.Second)
	b.advance(10 * time.Minute)
	if s.Phase != sa.Established {
		t.Error("a refresh shortened the life")
	}
	if n := len(b.backend.Extended); n != 3 || b.backend.Extended[n-1].Hard <= 0 {
		t.Errorf("backstop moved %d times", n)
	}
}

// A backend that will not move its hard limit is asked again; when it goes on refusing the set goes, because its SAs would
// die while we believe in them.
func TestExtendFails(t *testing.T) {
	for _, c := range []struct {
		refusals int
		survives bool
	}{{extendTries - 1, true}, {extendTries, false}} {
		b := newBench(t)
		left := c.refusals
		b.backend.FailExtend = func(sa.Params) error {
			if left--; left >= 0 {
				return errors.New("queue is full")
			}
			return nil
		}
		s := b.begin(offer(0))
		b.table.Confirm(s, time.Hour)
		b.backend.Answer()
		b.advance(10 * time.Second)
		if survives := s.Phase == sa.Established; survives != c.survives {
			t.Errorf("after %d refusals the set is %v", c.refusals, s.Phase)
		}
	}
}

// R6.4, R6.15: a phone that starts over in clear with the same ports gets a second set beside the first, which goes only
// with the 200.
func TestReboot(t *testing.T) {
	b := newBench(t)
	s1 := b.begin(offer(0))
	b.table.Confirm(s1, time.Hour)
	o := offer(0)
	o.SPIC, o.SPIS = 5000, 5001
	s2 := b.begin(o)
	if s2.Ports.PS == s1.Ports.PS || s2.Ports.PC == s1.Ports.PC || s1.Phase != sa.Established {
		t.Fatalf("ports %+v and %+v, first set %v", s1.Ports, s2.Ports, s1.Phase)
	}
	b.table.Confirm(s2, time.Hour)
	b.backend.Answer()
	if s1.Phase != sa.Dead || s2.UE.Current != s2 || b.backend.Count() != 4 {
		t.Errorf("first set %v, %d SAs", s1.Phase, b.backend.Count())
	}
}

// R6.15 three times in a row: the SAs of the first set wait for the resets of its connections when the third one wants its
// ports and SPIs.
func TestRebootAgain(t *testing.T) {
	b := newBench(t)
	s1 := b.begin(offer(0))
	b.table.Confirm(s1, time.Hour)
	s1.ConnIn = 1
	s2 := b.begin(offer(1))
	b.table.Confirm(s2, time.Hour)
	b.backend.Answer()
	if s1.Phase != sa.Dead || b.backend.Count() != 8 {
		t.Fatalf("first set %v, %d SAs: its resets cannot get out", s1.Phase, b.backend.Count())
	}
	s3 := b.begin(offer(0))
	if s3.Ports.UC != s1.Ports.UC || b.backend.Count() != 8 {
		t.Errorf("ports %+v after %+v, %d SAs", s3.Ports, s1.Ports, b.backend.Count())
	}
	b.table.Confirm(s3, time.Hour)
	b.advance(time.Second)
	if b.backend.Count() != 4 || len(b.table.leaving) != 0 {
		t.Errorf("%d SAs, %d addresses with leaving sets", b.backend.Count(), len(b.table.leaving))
	}
	b.table.Deregister(s3.UE, 0)
	b.advance(time.Second)
	b.empty()
}

// R1.7, E6: what another phone has is not taken.
//
// Peers: B3.01b
func TestConflicts(t *testing.T) {
	b := newBench(t)
	s := b.begin(offer(0))
	b.table.Confirm(s, time.Hour)
	for name, change := range map[string]func(*Offer){
		"port-c":               func(o *Offer) {},
		"port-c is its port-s": func(o *Offer) { o.PortC, o.PortS = 6200, 6999 },
		"spi":                  func(o *Offer) { o.PortC, o.PortS, o.SPIS = 7000, 7001, 1000 },
	} {
		o := offer(0)
		o.IMPI, o.SPIC, o.SPIS = "other@ims", 9000, 9001
		change(o)
		if err := b.table.Check(o); !errors.Is(err, ErrAddressConflict) {
			t.Errorf("%s: %v", name, err)
		}
	}
	o := offer(9)
	o.IMPI, o.PortS = "other@ims", 6201
	if err := b.table.Check(o); err != nil { // two phones behind one address
		t.Errorf("other ports: %v", err)
	}
	o = offer(0)
	o.IMPI, o.UE = "other@ims", ue2
	if err := b.table.Check(o); err != nil {
		t.Errorf("other address: %v", err)
	}
	o = offer(0) // the same phone with an SPI of its live set
	if err := b.table.Check(o); !errors.Is(err, ErrAddressConflict) {
		t.Errorf("SPI of its own live set: %v", err)
	}
}

// R6.12: after a de-registration the sets stay for answers, then everything goes.
func TestDeregister(t *testing.T) {
	b := newBench(t)
	s := b.begin(offer(0))
	b.table.Confirm(s, time.Hour)
	b.table.Deregister(s.UE, old)
	if !s.Live() || s.UE.State != Deregistered {
		t.Fatalf("set %v, state %v", s.Phase, s.UE.State)
	}
	b.advance(old + time.Second)
	if s.Phase != sa.Dead || len(b.gone) != 1 {
		t.Errorf("set %v", s.Phase)
	}
	b.empty()
}

// A generation later the index of a UE context means another phone.
func TestGenerations(t *testing.T) {
	b := newBench(t)
	s1 := b.begin(offer(0))
	index, gen := s1.UE.Index, s1.UE.Gen
	b.table.Drop(s1, 0)
	b.advance(time.Second)
	o := offer(0)
	o.IMPI = "user2@ims"
	s2 := b.begin(o)
	if s2.UE.Index != index || b.table.Lookup(index, gen) != nil || b.table.Lookup(index, s2.UE.Gen) != s2.UE {
		t.Error("an old token reaches the new phone")
	}
}

// Every cell of the registration's table: what is not in it changes nothing.
//
// Peers: B1.03, B1.16
func TestStates(t *testing.T) {
	want := map[State][3]State{ // by event
		Pending: {0, Registered, Deregistered}, Registered: {0, Registered, Deregistered},
		Deregistered: {0, Registered, Deregistered},
	}
	for s := State(0); s <= Deregistered+1; s++ {
		for e := Event(0); e <= Ended+1; e++ {
			next, ok := s.On(e)
			legal := want[s] != [3]State{} && e >= Accepted && e <= Ended
			if ok != legal || legal && next != want[s][e] || !legal && next != s {
				t.Errorf("%v on %v: %v, %v", s, e, next, ok)
			}
		}
	}
}

// An old set that is still in use ends with its lifetime when the new one is lost.
func TestOldSetWithoutTimer(t *testing.T) {
	b := newBench(t)
	x := b.begin(offer(0))
	b.table.Confirm(x, time.Hour)
	b.backend.Answer()
	o := offer(1)
	o.Over = x
	y := b.begin(o)
	b.table.Confirm(y, time.Hour)
	b.backend.Answer()
	b.table.remove(y) // what extend does when the backend has lost the set
	b.backend.Answer()
	b.advance(3 * time.Hour)
	if len(b.ended) != 1 || b.ended[0] != x.UE {
		t.Errorf("told of %d UE contexts that have ended", len(b.ended))
	}
	if b.table.UEs() != 0 {
		t.Errorf("old set never ends: phase %v, deadline %v ago, armed %v", x.Phase, b.now.Sub(x.Deadline), x.timer.Armed())
	}
}

var update = flag.Bool("update", false, "rewrite the diagrams in docs")

// The diagrams in docs are those of the tables.
func TestDiagrams(t *testing.T) {
	const file = "../../docs/states.md"
	text := "# State machines\n\nMade from the tables in the code; `go test ./control/registrar -update` writes this file.\n\n" +
		"## Registration of a UE (control/registrar)\n\n```mermaid\n" + Diagram() + "```\n\n" +
		"## SA set (control/sa)\n\n```mermaid\n" + sa.Diagram() + "```\n"
	if *update {
		if err := os.MkdirAll("../../docs", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(file)
	if err != nil || string(got) != text {
		t.Errorf("%s is not what the tables say (%v): run with -update", file, err)
	}
}

// A backend that does not let go of SAs is asked again: their SPIs are not given out before, at the latest after the hard limit.
func TestRemoveRefused(t *testing.T) {
	for name, refusals := range map[string]int{"twice": 2, "always": math.MaxInt} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			s := b.begin(offer(1))
			b.table.Confirm(s, time.Hour)
			b.backend.Answer()
			asked := 0
			b.backend.FailRemove = func(sa.Params) error {
				if asked++; asked > refusals {
					return nil
				}
				return errors.New("no buffer space")
			}
			b.table.Drop(s, 0)
			b.advance(tick)
			b.backend.Answer()
			if n := b.spis.InUse(); n != 2 || asked != 1 {
				t.Fatalf("%d SPIs in use after %d attempts", n, asked)
			}
			for range 3 {
				b.advance(removeRetry)
				b.backend.Answer()
			}
			if refusals == 2 {
				if n := b.spis.InUse(); n != 0 || asked != 3 {
					t.Fatalf("%d SPIs in use after %d attempts", n, asked)
				}
				b.empty()
				return
			}
			if n := b.spis.InUse(); n != 2 {
				t.Fatalf("%d SPIs in use while the kernel has the SAs", n)
			}
			for b.now.Before(s.HardLimit().Add(removeRetry)) {
				b.advance(removeRetry)
				b.backend.Answer()
			}
			if n := b.spis.InUse(); n != 0 || b.wheel.Len() != 0 {
				t.Errorf("%d SPIs in use and %d timers after the hard limit", n, b.wheel.Len())
			}
		})
	}
}

// R5.53: a registration that the registrar has shortened takes its sets with it, and never lives longer for it.
func TestShorten(t *testing.T) {
	b := newBench(t)
	first := b.begin(offer(1))
	b.table.Confirm(first, time.Hour)
	u := first.UE
	b.table.Shorten(u, 2*time.Hour)
	if got := first.Deadline.Sub(b.now); got != time.Hour {
		t.Errorf("prolonged to %v", got)
	}
	second := offer(2)
	second.Over = first
	s := b.begin(second)
	await := s.Deadline
	b.table.Shorten(u, 10*time.Second)
	if got := first.Deadline.Sub(b.now); got != 10*time.Second || first.Hard != 10*time.Second+hardMargin {
		t.Errorf("set lives for %v, in the backend for %v", got, first.Hard)
	}
	if s.Deadline != await {
		t.Error("a set that waits for its authentication was shortened")
	}
	b.advance(11 * time.Second)
	if first.Phase != sa.Dead {
		t.Errorf("shortened set is %v after its time", first.Phase)
	}
}

// An old set that is still in use hands over in time when both are shortened.
func TestShortenOld(t *testing.T) {
	b := newBench(t)
	first := b.begin(offer(1))
	b.table.Confirm(first, time.Hour)
	second := offer(2)
	second.Over = first
	s := b.begin(second)
	b.table.Confirm(s, time.Hour)
	u := s.UE
	if u.Current != first {
		t.Fatal("the new set is in use already")
	}
	b.table.Shorten(u, old+10*time.Second)
	b.advance(5 * time.Second)
	if u.Current != first {
		t.Error("handed over too early")
	}
	b.advance(6 * time.Second)
	if u.Current != s {
		t.Error("not handed over when 64*T1 were left")
	}
	b.table.Deregister(u, time.Minute)
	b.table.Shorten(u, time.Second)
	if got := s.Deadline.Sub(b.now); got != time.Minute {
		t.Errorf("a set that was told to go in a minute goes in %v", got)
	}
	b.advance(old)
	b.empty()
}

func TestWithdraw(t *testing.T) {
	u := &UE{}
	u.Bind(Binding{IMPU: "sip:temp", Associated: []string{"sip:a", "sip:b", "tel:a"}})
	u.Bind(Binding{IMPU: "sip:c"})
	u.Withdraw("sip:a")
	if got := fmt.Sprint(u.Identities); got != "[sip:b tel:a sip:c]" {
		t.Errorf("left: %s", got)
	}
	u.Withdraw("sip:c")
	u.Withdraw("sip:b")
	u.Withdraw("tel:a")
	if got := fmt.Sprint(u.Identities); got != "[tel:a sip:c]" {
		t.Errorf("the last identity of a set went: %s", got)
	}
}

// A registration that the core has ended goes with its sets, but not one that the phone has begun meanwhile.
func TestDismiss(t *testing.T) {
	b := newBench(t)
	first := b.begin(offer(1))
	b.table.Confirm(first, time.Hour)
	s := b.begin(offer(2)) // in clear, as if the phone had been told already
	u := s.UE
	b.table.Dismiss(u, time.Minute)
	if u.State != Deregistered || !first.Dropped() || s.Dropped() {
		t.Fatalf("%v, first set dropped: %t, temporary one: %t", u.State, first.Dropped(), s.Dropped())
	}
	b.table.Confirm(s, time.Hour)
	b.advance(2 * time.Minute)
	if u.State != Registered || u.Current != s || first.Phase != sa.Dead {
		t.Errorf("%v, first set %v", u.State, first.Phase)
	}
	b.table.Dismiss(u, time.Second)
	b.begin(offer(3))
	b.advance(await + time.Second)
	b.empty()
}

// A refresh that comes over an old set prolongs the registration, and so the set that carries it on: the phone would
// otherwise be registered at the core and have no SA.
func TestRefreshOverOldSet(t *testing.T) {
	b := newBench(t)
	first := b.begin(offer(1))
	b.table.Confirm(first, time.Hour)
	o := offer(2)
	o.Over = first
	second := b.begin(o)
	b.table.Confirm(second, time.Hour)
	b.table.Touch(second) // taken into use, the old one has 64*T1 left
	b.advance(time.Minute)
	b.table.Refresh(first, 3*time.Hour)
	if left := second.Deadline.Sub(b.now); left != 3*time.Hour {
		t.Errorf("the set in use lives for %v", left)
	}
	for range 5 {
		b.advance(20 * time.Second)
		if first.Phase.Live() {
			b.table.Refresh(first, 3*time.Hour)
		}
	}
	if first.Phase.Live() {
		t.Error("refreshes keep an old set alive beyond 64*T1")
	}

	// Without the set in use the old one is all that the phone has.
	o = offer(3)
	o.Over = second
	third := b.begin(o)
	b.table.Confirm(third, time.Hour)
	b.table.Touch(third)
	b.table.Expired(third.ID)
	b.table.Refresh(second, time.Hour)
	if u := second.UE; u.Current != second || second.Deadline.Sub(b.now) < time.Hour {
		t.Errorf("the last set is in use: %v, for %v", u.Current == second, second.Deadline.Sub(b.now))
	}
	b.advance(4 * time.Hour)
	b.empty()
}
