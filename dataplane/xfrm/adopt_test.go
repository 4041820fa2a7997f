package xfrm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
)

// lifeOf returns the limits of a state.
func (k *fakeKernel) lifeOf(id stateID) lifetime {
	k.mu.Lock()
	defer k.mu.Unlock()
	l := nl.DeserializeXfrmUsersaInfo(k.bodies[id]).Lft
	return lifetime{l.SoftAddExpiresSeconds, l.HardAddExpiresSeconds}
}

// markOfState returns the packet mark of a state.
func (k *fakeKernel) markOfState(id stateID) []byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	v, _ := findAttr(k.bodies[id][nl.SizeofXfrmUsersaInfo:], nl.XFRMA_SET_MARK)
	return slices.Clone(v)
}

// age makes the states of a set older.
func (k *fakeKernel) age(p *sa.Params, by time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, id := range ids(p) {
		nl.DeserializeXfrmUsersaInfo(k.bodies[id]).Curlft.AddTime -= uint64(by / time.Second)
	}
}

// count of messages of a type that were sent.
func (k *fakeKernel) sent(typ uint16) (n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, types := range k.sends {
		for _, x := range types {
			if x == typ {
				n++
			}
		}
	}
	return n
}

// crashed leaves n sets of a backend that is no more in a fake kernel.
func crashed(t *testing.T, k *fakeKernel, n int, change func(p *sa.Params)) []sa.Params {
	t.Helper()
	b, err := newBackend(testConfig(), k)
	if err != nil {
		t.Fatal(err)
	}
	var sets []sa.Params
	for i := range n {
		p := testSet(i, i%2 == 0, ims.Suites()[i%8])
		p.Hard = time.Hour
		if change != nil {
			change(&p)
		}
		if err := install(t, b, p); err != nil {
			t.Fatal(err)
		}
		sets = append(sets, p)
	}
	kill(t, b)
	return sets
}

func adopt(t *testing.T, b *Backend, sets []sa.Params) sa.Adoption {
	t.Helper()
	a, err := b.Adopt(t.Context(), sets)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(a.Adopted)
	return a
}

func idsOf(sets []sa.Params) (list []uint64) {
	for i := range sets {
		list = append(list, sets[i].ID)
	}
	slices.Sort(list)
	return list
}

// TestAdopt: everything is taken over as it was, in every suite and both families, and behaves as if installed here.
func TestAdopt(t *testing.T) {
	k := newFakeKernel()
	sets := crashed(t, k, 40, func(p *sa.Params) { p.Counters = sa.Counters{11, 12, 13, 14} })
	foreign := stateID{gm4, 0x999}
	k.states[foreign] = stateHead{id: foreign, reqid: 7, esp: true}
	elsewhere := stateID{ueAddr(1, false), 0x998}
	k.states[elsewhere] = stateHead{id: elsewhere, reqid: 7, esp: true}
	orphan := stateID{gm6, 0x997}
	k.states[orphan] = stateHead{id: orphan, reqid: DefaultReqID, esp: true}
	before := make(map[stateID][]byte)
	for id, body := range k.bodies {
		before[id] = slices.Clone(body)
	}

	b := newFake(t, k, testConfig())
	updates := k.sent(nl.XFRM_MSG_UPDSA)
	a := adopt(t, b, sets)
	if !slices.Equal(a.Adopted, idsOf(sets)) || a.Removed != 1 || !slices.Equal(a.Foreign, []ims.SPI{0x999}) {
		t.Errorf("adopted %d, removed %d, foreign %v; want 40, 1 and 0x999", len(a.Adopted), a.Removed, a.Foreign)
	}
	if s, _ := k.count(); s != 162 || b.Count() != 160 {
		t.Errorf("%d states, Count %d; want 160 and two foreign ones", s, b.Count())
	}
	if !maps.EqualFunc(before, k.bodies, bytes.Equal) || k.sent(nl.XFRM_MSG_UPDSA) != updates {
		t.Error("states that were as they should be have changed")
	}
	s, err := b.Survey(t.Context())
	if err != nil || len(s.Sets) != 40 || len(s.Missing) != 0 || s.Orphans != 0 {
		t.Errorf("Survey: %d sets, missing %v, %d orphans, %v", len(s.Sets), s.Missing, s.Orphans, err)
	}
	for id, c := range s.Sets {
		if c != (sa.Counters{11, 12, 13, 14}) {
			t.Errorf("set %d: counters %v", id, c)
		}
	}
	if err := install(t, b, sets[0]); !errors.Is(err, ErrDuplicate) {
		t.Errorf("Install of an adopted set: %v, want ErrDuplicate", err)
	}
	if again := adopt(t, b, sets[:3]); len(again.Adopted) != 3 || again.Removed != 0 || b.Count() != 160 {
		t.Errorf("Adopt again: %+v, Count %d", again, b.Count())
	}
	for _, p := range sets {
		if err := remove(t, b, p); err != nil {
			t.Error(err)
		}
	}
	if s, _ := k.count(); s != 2 || b.Count() != 0 {
		t.Errorf("%d states, Count %d after Remove", s, b.Count())
	}
}

// TestAdoptMoves: hard limit and label become what the set asks for, counted from when the kernel added the state.
func TestAdoptMoves(t *testing.T) {
	k := newFakeKernel()
	sets := crashed(t, k, 1, nil)
	p := &sets[0]
	k.age(p, 1000*time.Second)
	nl.DeserializeXfrmUsersaInfo(k.bodies[ids(p)[2]]).Curlft.AddTime++ // added as the second went by
	p.Hard, p.Label = 2*time.Hour, 77
	b := newFake(t, k, testConfig())
	adopt(t, b, sets)
	near := func(id stateID, want uint64) {
		t.Helper()
		// The clock may step to the next seconds during the test.
		if l := k.lifeOf(id); l.hard < want || l.hard > want+60 || l.soft != l.hard-1 {
			t.Errorf("limits %+v, want about %d", l, want)
		}
	}
	for i, id := range ids(p) {
		near(id, 1000+7200)
		if i < 2 && !bytes.Equal(k.markOfState(id), words(77)) {
			t.Errorf("SA %d: mark %v", i, k.markOfState(id))
		}
	}
	if err := wait(t, func(done func(error)) { b.Extend(*p, time.Minute, done) }); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids(p) {
		near(id, 1000+60)
	}
}

// TestAdoptDiffers: a state that is not exactly what was asked for goes, with the rest of its set, and everything can be
// installed anew.
func TestAdoptDiffers(t *testing.T) {
	for _, tc := range []struct {
		name    string
		suite   ims.Suite
		change  func(p *sa.Params)
		kernel  func(k *fakeKernel, p *sa.Params)
		removed int // 4 if not given
	}{
		{name: "UE address", change: func(p *sa.Params) { p.UE = ueAddr(9, false) }},
		{name: "port", change: func(p *sa.Params) { p.Ports.UC++ }},
		{name: "SPI", change: func(p *sa.Params) { p.SPIs.UC += 0x100 }},
		{name: "encryption key", change: func(p *sa.Params) { p.Keys.Enc[15] ^= 1 }},
		{name: "salt", change: func(p *sa.Params) { p.Keys.Salt[3] ^= 1 }},
		{name: "integrity key", suite: ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC}, change: func(p *sa.Params) { p.Keys.Auth[19] ^= 1 }},
		{name: "cipher", suite: ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC}, change: func(p *sa.Params) {
			p.Keys = testKeys(ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncNull}, 0)
		}},
		{name: "AEAD", change: func(p *sa.Params) { p.Keys = testKeys(ims.Suite{Alg: ims.AlgAESGMAC, Enc: ims.EncNull}, 0) }},
		{name: "not configured", change: func(p *sa.Params) { p.Ports.PC = 7000 }},
		{name: "keys missing", change: func(p *sa.Params) { p.Keys.Enc = nil }},
		{name: "an SA is gone", removed: 3, kernel: func(k *fakeKernel, p *sa.Params) { delete(k.states, ids(p)[3]) }},
		{name: "tunnel", kernel: func(k *fakeKernel, p *sa.Params) { nl.DeserializeXfrmUsersaInfo(k.bodies[ids(p)[1]]).Mode = 1 }},
		{name: "extended sequence numbers", kernel: func(k *fakeKernel, p *sa.Params) {
			nl.DeserializeXfrmUsersaInfo(k.bodies[ids(p)[1]]).Flags = 128
		}},
		{name: "selector", kernel: func(k *fakeKernel, p *sa.Params) { nl.DeserializeXfrmUsersaInfo(k.bodies[ids(p)[1]]).Sel.Proto = 17 }},
		{name: "encapsulated", kernel: func(k *fakeKernel, p *sa.Params) {
			id := ids(p)[1]
			k.bodies[id] = append(k.bodies[id], attrBytes(nl.XFRMA_ENCAP, make([]byte, 24))...)
		}},
		{name: "expires before it is updated", removed: 3, kernel: func(k *fakeKernel, p *sa.Params) {
			k.age(p, time.Minute)
			gone := ids(p)[0]
			k.refuse = func(typ uint16, id stateID) unix.Errno {
				if typ == nl.XFRM_MSG_UPDSA && id == gone {
					delete(k.states, id)
				}
				return 0
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			k := newFakeKernel()
			suite := tc.suite
			if suite == (ims.Suite{}) {
				suite = gcm
			}
			old := func(i int) sa.Params {
				p := testSet(i, false, suite)
				p.Hard = time.Hour
				return p
			}
			crashed(t, k, 2, func(p *sa.Params) { *p = old(int(p.ID&0xff) - 1) })
			want, bystander := old(0), old(1)
			if tc.kernel != nil {
				tc.kernel(k, &want)
			}
			if tc.change != nil {
				tc.change(&want)
			}
			if tc.removed == 0 {
				tc.removed = 4
			}
			b := newFake(t, k, testConfig())
			a := adopt(t, b, []sa.Params{want, bystander})
			if !slices.Equal(a.Adopted, []uint64{bystander.ID}) || a.Removed != tc.removed || b.Count() != 4 {
				t.Errorf("%+v, Count %d; want only %d adopted and %d removed", a, b.Count(), bystander.ID, tc.removed)
			}
			if s, _ := k.count(); s != 4 {
				t.Errorf("%d states, want the 4 of the other set", s)
			}
			k.refuse = nil
			if b.acceptable(&want) {
				if err := install(t, b, want); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestAdoptDuplicates: whatever is asked for twice is adopted once, and the one that is there wins over one that only
// shares its SPIs.
func TestAdoptDuplicates(t *testing.T) {
	k := newFakeKernel()
	sets := crashed(t, k, 3, func(p *sa.Params) {
		p.UE, p.Local, p.Keys = ueAddr(int(p.ID&0xff), false), gm4, testKeys(gcm, int(p.ID&0xff))
	})
	sameID := sets[1]
	sameID.ID = sets[0].ID
	twin := sets[0]
	twin.ID = 500
	stale := sets[2]
	stale.ID, stale.Keys = 501, testKeys(gcm, 99)
	crossed := sets[1] // shares two SAs with set 1 to the last octet, the others are not there
	crossed.ID, crossed.SPIs.PC, crossed.SPIs.US = 502, 0x7777, 0x7778

	b := newFake(t, k, testConfig())
	a := adopt(t, b, []sa.Params{stale, crossed, sets[0], sameID, sets[0], twin, sets[1], sets[2], sets[2]})
	if !slices.Equal(a.Adopted, idsOf(sets)) || a.Removed != 0 || b.Count() != 12 {
		t.Errorf("%+v, Count %d; want all three sets once", a, b.Count())
	}
	if s, _ := k.count(); s != 12 {
		t.Errorf("%d states", s)
	}
}

// TestAdoptInterrupted: a dump that another program disturbed is repeated, not believed.
func TestAdoptInterrupted(t *testing.T) {
	k := newFakeKernel()
	sets := crashed(t, k, 5, nil)
	foreign := stateID{gm4, 0x999}
	k.states[foreign] = stateHead{id: foreign, reqid: 7, esp: true}
	b := newFake(t, k, testConfig())

	k.broken = dumpTries
	if a, err := b.Adopt(t.Context(), sets); !errors.Is(err, errDumpInterrupted) || len(a.Adopted)+a.Removed != 0 || b.Count() != 0 {
		t.Errorf("%+v, %v, Count %d", a, err, b.Count())
	}
	if s, _ := k.count(); s != 21 {
		t.Errorf("%d states, want all", s)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := b.Adopt(cancelled, sets); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	k.dumped = func(n int) {
		if n == 7 {
			cancel()
		}
	}
	if a, err := b.Adopt(ctx, sets); !errors.Is(err, context.Canceled) || len(a.Adopted)+a.Removed != 0 {
		t.Errorf("%+v, %v", a, err)
	}
	k.dumped = nil
	k.broken = dumpTries - 1
	if a := adopt(t, b, sets); len(a.Adopted) != 5 || a.Removed != 0 || len(a.Foreign) != 1 || b.Count() != 20 {
		t.Errorf("%+v, Count %d", a, b.Count())
	}
}

// TestEndDuringAdopt: Detach and Close wait for a dump that is under way, and later ones do not begin.
func TestEndDuringAdopt(t *testing.T) {
	k := newFakeKernel()
	sets := crashed(t, k, 5, nil)
	b := newFake(t, k, testConfig())
	ended := make(chan error, 1)
	k.dumped = func(n int) {
		if n == 1 {
			go func() { ended <- b.Detach() }()
			<-b.closing
		}
	}
	if _, err := b.Adopt(t.Context(), sets); !errors.Is(err, ErrClosed) {
		t.Errorf("Adopt: %v, want ErrClosed", err)
	}
	k.dumped = nil
	if err := <-ended; err != nil {
		t.Error(err)
	}
	_, errAdopt := b.Adopt(t.Context(), sets)
	_, errSurvey := b.Survey(t.Context())
	if !errors.Is(errAdopt, ErrClosed) || !errors.Is(errSurvey, ErrClosed) {
		t.Errorf("afterwards %v and %v", errAdopt, errSurvey)
	}
	if s, _ := k.count(); s != 20 {
		t.Errorf("%d states, want all", s)
	}
}

// TestDetach: removals that wait are carried out, the rest stays for the next process.
//
// Peers: A1.22c
func TestDetach(t *testing.T) {
	k := newFakeKernel()
	b, err := newBackend(testConfig(), k)
	if err != nil {
		t.Fatal(err)
	}
	var sets []sa.Params
	for i := range 5 {
		p := testSet(i, false, gcm)
		sets = append(sets, p)
		if err := install(t, b, p); err != nil {
			t.Fatal(err)
		}
	}
	k.gate = make(chan struct{})
	results, removed, detached := make(chan error, 100), make(chan error, 1), make(chan error, 1)
	const calls = 2 * maxSets
	for i := range calls {
		b.Install(testSet(i+10, false, gcm), func(err error) { results <- err })
	}
	b.Remove(sets[0], func(err error) { removed <- err })
	go func() { detached <- b.Detach() }()
	<-b.closing
	close(k.gate)
	installed := 0
	for range calls {
		if err := <-results; err == nil {
			installed++
		} else if !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
	}
	if err := errors.Join(<-removed, <-detached, b.Detach(), b.Close()); err != nil {
		t.Error(err)
	}
	if s, p := k.count(); s != 4*(4+installed) || p != policiesOf || installed == calls {
		t.Errorf("%d states, %d policies, %d of %d installed", s, p, installed, calls)
	}
	if n := k.retired(); n != 0 {
		t.Errorf("%d policies retired", n)
	}
	if err := remove(t, b, sets[1]); !errors.Is(err, ErrClosed) {
		t.Errorf("Remove after Detach: %v, want ErrClosed", err)
	}
	next := newFake(t, k, testConfig())
	if a := adopt(t, next, sets); len(a.Adopted) != 4 || a.Removed != 4*installed {
		t.Errorf("%+v; want 4 sets adopted and %d SAs removed", a, 4*installed)
	}
}

// TestSurvey finds what is missing and what is too much, and does not take for either what changes meanwhile.
func TestSurvey(t *testing.T) {
	k := newFakeKernel()
	b := newFake(t, k, testConfig())
	var sets []sa.Params
	for i := range 6 {
		p := testSet(i, false, gcm)
		p.Counters = sa.Counters{1, 2, 3, uint32(i) + 4}
		sets = append(sets, p)
		if i < 5 {
			if err := install(t, b, p); err != nil {
				t.Fatal(err)
			}
		}
	}
	foreign, orphan := stateID{gm4, 0x999}, stateID{gm4, 0x998}
	k.states[foreign] = stateHead{id: foreign, reqid: 7, esp: true}
	k.states[orphan] = stateHead{id: orphan, reqid: DefaultReqID, esp: true}
	delete(k.states, ids(&sets[1])[2])
	k.broken = 1
	check := func(want ...int) {
		t.Helper()
		s, err := b.Survey(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(s.Sets) != len(want) || !slices.Equal(s.Missing, []uint64{sets[1].ID}) || s.Orphans != 1 {
			t.Errorf("%+v; want sets %v, %d missing and one orphan", s, want, sets[1].ID)
		}
		for _, i := range want {
			if got := s.Sets[sets[i].ID]; got != sets[i].Counters {
				t.Errorf("set %d: counters %v, want %v", i, got, sets[i].Counters)
			}
		}
	}
	check(0, 2, 3, 4)

	// Set 0 goes, set 2 goes and comes back, set 5 comes, another comes and goes, the kernel refuses one more.
	k.dumped = func(n int) {
		if n != 3 {
			return
		}
		k.dumped = nil
		fleeting, refused := testSet(20, false, gcm), testSet(21, false, gcm)
		k.states[ids(&refused)[3]] = stateHead{id: ids(&refused)[3], reqid: 7, esp: true}
		if err := errors.Join(remove(t, b, sets[0]), remove(t, b, sets[2]), install(t, b, sets[2]), install(t, b, sets[5]),
			install(t, b, fleeting), remove(t, b, fleeting),
			wait(t, func(done func(error)) { b.Extend(sets[3], time.Minute, done) })); err != nil {
			t.Error(err)
		}
		if err := install(t, b, refused); !errors.Is(err, unix.EEXIST) {
			t.Error(err)
		}
	}
	check(3, 4)
	check(2, 3, 4, 5)
}

// TestSurveyFails: a survey that could not read everything judges nothing.
func TestSurveyFails(t *testing.T) {
	k := newFakeKernel()
	b := newFake(t, k, testConfig())
	p := testSet(0, false, gcm)
	if err := install(t, b, p); err != nil {
		t.Fatal(err)
	}
	k.broken = dumpTries
	if s, err := b.Survey(t.Context()); !errors.Is(err, errDumpInterrupted) || s.Sets != nil || s.Missing != nil {
		t.Errorf("%+v, %v", s, err)
	}
	k.most = 4
	if _, err := b.Survey(t.Context()); !errors.Is(err, unix.EMFILE) {
		t.Errorf("got %v", err)
	}
	k.most = 5
	if s, err := b.Survey(t.Context()); err != nil || len(s.Sets) != 1 {
		t.Errorf("%+v, %v", s, err)
	}
}

// TestExpired: the owner of a set hears once that the kernel has ended it, and of nothing else.
func TestExpired(t *testing.T) {
	k := newFakeKernel()
	told := make(chan uint64, 100)
	var text bytes.Buffer
	cfg := testConfig()
	cfg.Expired = func(id uint64) { told <- id }
	cfg.Logger = testLogger(&text)
	b, err := newBackend(cfg, k)
	if err != nil {
		t.Fatal(err)
	}
	var sets []sa.Params
	for i := range 4 {
		p := testSet(i, false, gcm)
		p.UE = ueAddr(1, false)
		p.SPIs.UC, p.SPIs.US = ims.SPI(0x2000+2*i), ims.SPI(0x2001+2*i)
		sets = append(sets, p)
		if err := install(t, b, p); err != nil {
			t.Fatal(err)
		}
	}
	foreign := stateID{gm4, 0x999}
	k.states[foreign] = stateHead{id: foreign, reqid: 7, esp: true}
	k.expire(foreign)
	soft := k.bodies[ids(&sets[1])[0]][:nl.SizeofXfrmUsersaInfo]
	k.events.event(nl.XFRM_MSG_EXPIRE, soft, false)
	k.events.event(nl.XFRM_MSG_EXPIRE, soft, true) // of an earlier state with this SPI: the present one is there
	k.events.event(nl.XFRM_MSG_EXPIRE, soft[:100], true)
	k.events.queue <- []byte{1, 2, 3} // not even a header
	k.events.queue <- nil             // overrun
	k.expire(ids(&sets[0])[3])
	k.expire(ids(&sets[0])[0])
	k.expire(ids(&sets[2])[1])
	if first, second := <-told, <-told; first != sets[0].ID || second != sets[2].ID {
		t.Errorf("told of %d and %d, want %d and %d", first, second, sets[0].ID, sets[2].ID)
	}
	if b.Count() != 16 || b.Overruns() != 1 {
		t.Errorf("Count %d, %d overruns; want 16 until Remove, and 1", b.Count(), b.Overruns())
	}

	// The phone offers its SPIs again before the old set is removed: Remove leaves the new set alone, and so does Extend.
	reuse := sets[0]
	reuse.ID, reuse.SPIs.UC, reuse.SPIs.PC, reuse.SPIs.PS = 50, 0x4000, 0x5000, 0x5001
	delete(k.states, ids(&sets[0])[2])
	if err := install(t, b, reuse); err != nil {
		t.Fatal(err)
	}
	if err := wait(t, func(done func(error)) { b.Extend(sets[0], time.Hour, done) }); !errors.Is(err, unix.ESRCH) {
		t.Errorf("Extend of an expired set: %v, want ESRCH", err)
	}
	if err := errors.Join(remove(t, b, sets[0]), remove(t, b, sets[2])); err != nil {
		t.Error(err)
	}
	if s, _ := k.count(); s != 12 || b.Count() != 12 {
		t.Errorf("%d states, Count %d; want 12", s, b.Count())
	}
	for _, id := range ids(&reuse) {
		if _, ok := k.states[id]; !ok {
			t.Errorf("state %v of the new set is gone", id)
		}
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if len(told) != 0 || !strings.Contains(text.String(), "events of the kernel were lost") {
		t.Errorf("%d calls too many, log:\n%s", len(told), &text)
	}
}

// TestPolicyRenewal: the policies end ten days after the last renewal, and are put back should they end before.
func TestPolicyRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newFakeKernel()
		b := newFake(t, k, testConfig())
		placed := k.sent(nl.XFRM_MSG_UPDPOLICY)
		if placed != policiesOf {
			t.Errorf("%d policies placed, want %d", placed, policiesOf)
		}
		for _, p := range k.policies {
			if p.Lft.HardAddExpiresSeconds != 864000 {
				t.Errorf("limit %d, want ten days", p.Lft.HardAddExpiresSeconds)
			}
		}
		expect := func(times int) {
			t.Helper()
			synctest.Wait()
			if n := k.sent(nl.XFRM_MSG_UPDPOLICY) - placed; n != times*policiesOf {
				t.Errorf("%d policies placed again, want %d", n, times*policiesOf)
			}
		}
		time.Sleep(policyRenewal - time.Second)
		expect(0)
		time.Sleep(2 * time.Second)
		expect(1)
		k.mu.Lock()
		k.refuse = func(uint16, stateID) unix.Errno { return unix.ENOMEM }
		k.mu.Unlock()
		time.Sleep(policyRenewal)
		synctest.Wait()
		k.mu.Lock()
		k.refuse = nil
		k.mu.Unlock()
		placed = k.sent(nl.XFRM_MSG_UPDPOLICY) - policiesOf
		time.Sleep(renewalRetry)
		expect(2)

		mine, other := k.policies[b.policies[0].policyID], k.policies[b.policies[0].policyID]
		other.Sel.User++
		k.events.event(nl.XFRM_MSG_POLEXPIRE, other.Serialize(), true)
		k.events.event(nl.XFRM_MSG_POLEXPIRE, mine.Serialize(), false)
		expect(2)
		k.mu.Lock()
		delete(k.policies, b.policies[0].policyID)
		k.mu.Unlock()
		k.events.event(nl.XFRM_MSG_POLEXPIRE, mine.Serialize(), true)
		expect(2)
		if !k.whole(b.policies) || b.PoliciesRestored() != 1 {
			t.Errorf("%d policies restored, want the one that expired", b.PoliciesRestored())
		}
	})
}

// TestBackstop: no state outlives the policies of a process that died right after it was made.
func TestBackstop(t *testing.T) {
	const longestRegistration = 600_030 * time.Second // TS 24.229 §5.1.1.2, TS 33.203 §7.4
	if longestLife < longestRegistration || longestLife+policyRenewal >= policyLife {
		t.Errorf("longest life of a state is %v", longestLife)
	}
	for _, tc := range []struct {
		age, hard time.Duration
		want      uint64
	}{
		{0, time.Minute, 60},
		{0, 0, uint64(longestLife / time.Second)},
		{0, math.MaxInt64, uint64(longestLife / time.Second)},
		{time.Hour, 2 * longestLife, uint64((longestLife + time.Hour) / time.Second)},
	} {
		if got := backstop(tc.age, tc.hard); got.hard != tc.want || got.soft != tc.want-1 {
			t.Errorf("backstop(%v, %v) = %+v, want %d", tc.age, tc.hard, got, tc.want)
		}
	}
}

// TestCountersRefused: an SA without a number left is not installed.
func TestCountersRefused(t *testing.T) {
	k := newFakeKernel()
	b := newFake(t, k, testConfig())
	for i := range 4 {
		p := testSet(0, false, gcm)
		p.Counters[i] = math.MaxUint32
		if err := install(t, b, p); !errors.Is(err, sa.ErrSequence) || !errors.Is(err, ErrParams) {
			t.Errorf("counter %d: %v", i, err)
		}
	}
}

// TestReplayGolden: where sequence numbers go on, for every kind of window.
func TestReplayGolden(t *testing.T) {
	littleEndian(t)
	for _, tc := range []struct {
		window int
		seq    uint32
		want   string
	}{
		{0, 0, ""},
		{32, 0, ""},
		{0, 7, "1000 0a00 07000000 00000000 00000000"},
		{32, 7, "1000 0a00 00000000 07000000 ffffffff"},
		{40, 0, "2400 1700 02000000 00000000 00000000 00000000 00000000 28000000 0000000000000000"},
		{40, 7, "2400 1700 02000000 00000000 07000000 00000000 00000000 28000000 ffffffffffffffff"},
	} {
		var m messages
		m.replay(&state{window: tc.window, seq: tc.seq})
		golden(t, m.buf, tc.want)
		in, out := sequences(m.buf)
		if tc.window == 0 && (in != 0 || out != tc.seq) || tc.window != 0 && (in != tc.seq || out != 0) {
			t.Errorf("window %d, sequence number %d: read back %d and %d", tc.window, tc.seq, in, out)
		}
	}
	for n := range 36 { // cut anywhere: nothing or something, but no crash
		var m messages
		m.replay(&state{window: 40, seq: 7})
		if in, out := sequences(m.buf[:n]); in != 0 || out != 0 {
			t.Errorf("cut at %d: %d and %d", n, in, out)
		}
	}
}

// FuzzEvents: whatever arrives on the monitor, it is taken apart within its bounds.
func FuzzEvents(f *testing.F) {
	f.Add(netlinkMessage(nl.XFRM_MSG_EXPIRE, 0, 0, make([]byte, nl.SizeofXfrmUsersaInfo+8)))
	f.Add(netlinkMessage(nl.XFRM_MSG_POLEXPIRE, 0, 0, make([]byte, nl.SizeofXfrmUserpolicyInfo+8)))
	f.Add(netlinkMessage(nl.XFRM_MSG_FLUSHPOLICY, 0, 0, attrBytes(nl.XFRMA_POLICY_TYPE, make([]byte, 4))))
	b := &Backend{
		log: slog.New(slog.DiscardHandler), reqid: DefaultReqID, suspicion: make(chan struct{}, 1), owners: map[stateKey]owner{},
		policies: constantPolicies([]netip.Addr{gm4}, []uint16{serverPS}, DefaultReqID),
	}
	ours, other := b.policies[0], b.policies[1]
	other.sel.User++
	for _, p := range []policy{ours, other} {
		for _, byIndex := range []bool{false, true} {
			f.Add(netlinkMessage(nl.XFRM_MSG_DELPOLICY, 0, 0, deletion(p.policyID, byIndex)))
		}
		for _, action := range []uint8{actionAllow, actionBlock} {
			var m messages
			p.action = action
			m.updatePolicy(&p)
			m.addPolicy(&p)
			f.Add(m.buf)
		}
	}
	f.Fuzz(func(t *testing.T, d []byte) {
		before := bytes.Clone(d)
		b.events(d)
		if !bytes.Equal(before, d) {
			t.Error("the event was changed")
		}
		select {
		case <-b.suspicion:
		default:
			// Nothing that removes all policies may go unnoticed when it is the only message.
			if len(d) >= unix.SizeofNlMsghdr && binary.NativeEndian.Uint32(d) == uint32(len(d)) &&
				binary.NativeEndian.Uint16(d[4:]) == nl.XFRM_MSG_FLUSHPOLICY {
				t.Error("a flush was passed over")
			}
		}
	})
}

// BenchmarkAdopt measures Adopt for each set, the kernel's part not included.
func BenchmarkAdopt(b *testing.B) {
	const sets = 1000
	be := &Backend{
		cfg: testConfig(), reqid: DefaultReqID, window: DefaultWindow,
		sets: map[uint64]set{}, owners: map[stateKey]owner{},
	}
	var list []sa.Params
	var bodies [][]byte
	for i := range sets {
		p := testSet(i, false, gcm)
		p.Hard = time.Hour
		list = append(list, p)
		for _, s := range p.SAs() {
			var m messages
			st := be.state(s, &p, backstop(0, p.Hard))
			if err := m.state(nl.XFRM_MSG_NEWSA, &st); err != nil {
				b.Fatal(err)
			}
			body := m.buf[unix.SizeofNlMsghdr:]
			nl.DeserializeXfrmUsersaInfo(body).Curlft.AddTime = uint64(time.Now().Unix())
			bodies = append(bodies, body)
		}
	}
	b.ReportAllocs()
	for b.Loop() {
		a := be.newAdoption(list)
		for _, body := range bodies {
			a.look(nl.DeserializeXfrmUsersaInfo(body), body[nl.SizeofXfrmUsersaInfo:])
		}
		if len(a.orphans) != 0 || a.sets[sets-1].found != allFound || a.sets[sets-1].stale != 0 {
			b.Fatal("not all sets were found")
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/sets, "ns/set")
}
