package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/gmgate/gmgate/bench/core"
	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/bench/lab"
	"github.com/gmgate/gmgate/bench/ue"
	"github.com/gmgate/gmgate/control/ims"
)

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
	limit := loadTimeout
	if slowMachine() {
		limit *= 2
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
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
//
// Peers: A1.12
func TestReregisterUnderLoad(t *testing.T) {
	rounds := 5
	modes := []struct {
		name   string
		habits []func(*ue.Config)
	}{
		{"mixed", []func(*ue.Config){samsung, apple}},
		{"UDP", []func(*ue.Config){byUDP}},
		{"TCP", []func(*ue.Config){byTCP}},
	}
	if slowMachine() {
		rounds, modes = 2, modes[:1] // which has all that the others have
	}
	for _, v6 := range []bool{false, true} {
		for _, mode := range modes {
			t.Run(fmt.Sprintf("%s over %s", mode.name, family(v6)), func(t *testing.T) {
				f := start(t, fixtureConfig{
					ipv6: v6, oldSet: loadOldSet, log: loadLog, register: caseTimeout, await: caseTimeout,
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

// scene is a network with traffic among three phones: a is the one that something happens to.
type scene struct {
	*fixture
	ctx     context.Context
	a, b, c *end
	w       *flow
	habit   func(*ue.Config) // of a
}

// TestReregistration covers the rules of TS 33.203 §7.4 and TS 24.229 §5.2.2 about re-registrations one by one, each with
// traffic before, during and after: what happens to one phone costs none of them a single request.
//
// Peers: B3.03
func TestReregistration(t *testing.T) {
	ways := []struct {
		name  string
		habit func(*ue.Config)
		v6    bool
	}{{"UDP over IPv4", byUDP, false}, {"TCP over IPv6", byTCP, true}, {"TCP over IPv4", byTCP, false}, {"UDP over IPv6", byUDP, true}}
	cfg := fixtureConfig{oldSet: loadOldSet, log: loadLog, subs: 128, clear: strangerRules()}
	if slowMachine() {
		ways = ways[:2]
		cfg.register = 4 * registerTimeout
	}
	for way, tr := range ways {
		t.Run(tr.name, func(t *testing.T) {
			t.Parallel() // most of the time goes by in waiting for timers
			run := func(expire bool, await time.Duration) {
				cfg := cfg
				cfg.ipv6, cfg.await = tr.v6, await
				f := start(t, cfg)
				for i, tt := range scenes {
					if tt.expire != expire || slowMachine() && i%len(ways) != way { // there every one is played once
						continue
					}
					t.Run(tt.name, func(t *testing.T) {
						s := f.scene(t, tr.habit)
						tt.do(t, s)
						s.close(t)
					})
				}
			}
			run(false, loadTimeout)
			run(true, regAwaitAuth)
		})
	}
}

// scenes are the cases of TestReregistration.
var scenes = []struct {
	name   string
	do     func(*testing.T, *scene)
	expire bool // waits for reg-await-auth
}{
	{"requests to the phone take the old set until it has used the new one", firstUse, false},
	{"calls go on through re-registrations", callThrough, false},
	{"a call is set up across a re-registration", callAcross, false},
	{"wrong RES", wrongRES, false},
	{"sequence number failure", resynchronised, false},
	{"refused by the core", refusedByCore, false},
	{"core does not answer", coreSilent, false},
	{"phone does not answer the challenge", phoneSilent, true},
	{"two registrations at once", newestWins, false},
	{"unprotected REGISTER of another", strangerRegisters, true},
	{"unprotected REGISTER of the phone itself", startsOver, false},
	{"reboot with the same ports", rebootSamePorts, false},
	{"reboot with new ports", rebootNewPorts, false},
	{"another address", newAddress, false},
	{"two phones at one address", twoAtOneAddress, false},
}

// scene registers three phones and starts traffic among them.
func (f *fixture) scene(t *testing.T, habit func(*ue.Config)) *scene {
	t.Helper()
	s := &scene{fixture: f, ctx: longer(t), habit: habit}
	s.a, s.b, s.c = f.phone(s.ctx, t, habit), f.phone(s.ctx, t, byUDP), f.phone(s.ctx, t, byTCP)
	s.w = f.flow(s.ctx, t, s.a, s.b, s.c)
	s.w.turn(s.ctx, t)
	return s
}

// close ends the traffic, checks it and de-registers the phones.
func (s *scene) close(t *testing.T) {
	t.Helper()
	s.w.turn(s.ctx, t)
	s.w.finish(t, s.a, s.b, s.c)
	for _, e := range []*end{s.a, s.b, s.c} {
		if err := e.u.Deregister(s.ctx); err != nil {
			t.Error(err)
		}
	}
}

// behave changes the core for the length of do.
func (f *fixture) behave(b core.Behaviour, do func()) {
	normal := f.core.Behaviour()
	f.core.SetBehaviour(b)
	defer f.core.SetBehaviour(normal)
	do()
}

// challenging is a core that challenges re-registrations, and takes its time.
var challenging = core.Behaviour{AlwaysChallenge: true, AnswerDelay: loadDelay}

// current returns the set that a phone uses itself.
func (e *end) current(t *testing.T) ue.SetInfo {
	t.Helper()
	for _, s := range e.u.Sets() {
		if s.Current {
			return s
		}
	}
	t.Fatal("the phone has no set")
	return ue.SetInfo{}
}

// renewed re-authenticates a phone.
func (s *scene) renewed(t *testing.T, e *end) ue.Result {
	t.Helper()
	old := e.current(t)
	var res ue.Result
	s.behave(challenging, func() {
		var err error
		if res, err = e.u.Reregister(s.ctx); err != nil {
			t.Fatal(err)
		}
	})
	checkRenewed(t, old, res)
	return res
}

// setsOf returns by which sets the requests came to a phone in operations which began after since, BYE and ACK of the
// calls included.
func (s *scene) setsOf(e *end, since time.Time) map[int]int {
	s.w.mu.Lock()
	ids := map[string]bool{}
	for _, o := range s.w.ops {
		if o.began.After(since) && o.to == e {
			ids[o.body+o.callID] = true
		}
	}
	s.w.mu.Unlock()
	sets := map[int]int{}
	for _, i := range e.u.Received() {
		if i.At.After(since) && (ids[i.Body] || ids[i.CallID]) {
			sets[i.Set]++
		}
	}
	return sets
}

// wantSet expects the requests of setsOf to have come by one set only.
func (s *scene) wantSet(t *testing.T, e *end, since time.Time, want int) {
	t.Helper()
	if got := s.setsOf(e, since); len(got) != 1 || got[want] == 0 {
		t.Errorf("requests to the phone by set: %v, want set %d only", got, want)
	}
}

// firstUse: T10, rules R6.3 and R6.5 of TS 33.203 §7.4. Registering counts as no use, answering over the old set neither.
func firstUse(t *testing.T, s *scene) {
	s.w.hush(s.ctx, t, s.a)
	old := s.a.current(t)
	res := s.renewed(t, s.a)
	s.wantSet(t, s.a, s.w.turn(s.ctx, t), old.Generation)
	s.w.speak(s.a)
	if o := s.w.message(s.a, s.b); o.err != nil {
		t.Fatal(o.err)
	}
	s.wantSet(t, s.a, s.w.turn(s.ctx, t), res.Set.Generation)
}

// callThrough has one call live through three re-registrations of both its sides, with requests within it in between.
func callThrough(t *testing.T, s *scene) {
	calls := make(chan error, 2)
	until := make(chan struct{})
	for _, d := range []struct{ from, to *end }{{s.a, s.b}, {s.b, s.a}} {
		before := len(d.to.u.Received())
		go func() {
			_, err := d.from.u.Call(s.ctx, d.to.uri, ue.CallOptions{PRACK: true, ReInvite: true, Update: true, Until: until})
			calls <- err
		}()
		if !eventually(s.ctx, loadTimeout, func() bool { return len(d.to.u.Received()) > before }) {
			t.Fatal("the call does not arrive")
		}
	}
	for range 3 {
		for _, e := range []*end{s.a, s.b} {
			s.renewed(t, e)
			if err := s.w.settle(s.ctx, e); err != nil {
				t.Fatal(err)
			}
		}
	}
	close(until)
	for range 2 {
		if err := <-calls; err != nil {
			t.Error(err)
		}
	}
}

// callAcross re-registers the caller, and has it use the new set, while the called phone rings: PRACK and ACK go by the
// old set, where the INVITE went, and the BYE by the new one.
func callAcross(t *testing.T, s *scene) {
	i := s.take(t)
	cfg := s.configOf(i)
	cfg.Offers = s.offers(1)
	d := s.endOf(t, i, cfg)
	rung, answer := make(chan struct{}), make(chan struct{})
	var once sync.Once
	d.u.Tweak = func(kind string, b []byte) []byte {
		if kind == "response" {
			once.Do(func() { close(rung) })
			<-answer
		}
		return b
	}
	s.mustRegister(s.ctx, t, d.u)
	done := make(chan error, 1)
	go func() {
		_, err := s.a.u.Call(s.ctx, d.uri, ue.CallOptions{PRACK: true})
		done <- err
	}()
	select {
	case <-rung:
	case <-s.ctx.Done():
		t.Fatal("the call does not arrive")
	}
	s.renewed(t, s.a)
	if o := s.w.message(s.a, s.b); o.err != nil {
		t.Error(o.err)
	}
	close(answer)
	if err := <-done; err != nil {
		t.Error(err)
	}
	checkPhones(t, d.u)
	if err := d.u.Deregister(s.ctx); err != nil {
		t.Error(err)
	}
}

// stillThere checks that a re-registration which failed has changed nothing, and that the next one is fine.
func (s *scene) stillThere(t *testing.T, old ue.SetInfo) {
	t.Helper()
	if now := s.a.current(t); now.Generation != old.Generation {
		t.Errorf("the phone uses set %d, want %d", now.Generation, old.Generation)
	}
	s.wantSet(t, s.a, s.w.turn(s.ctx, t), old.Generation)
	if !eventually(s.ctx, s.await+5*time.Second, func() bool { return s.metric(s.ctx, t, "sa_sets", `phase="temporary"`) == 0 }) {
		t.Error("the temporary set is still there")
	}
	res := s.renewed(t, s.a)
	if err := s.w.settle(s.ctx, s.a); err != nil {
		t.Fatal(err)
	}
	s.wantSet(t, s.a, s.w.turn(s.ctx, t), res.Set.Generation)
}

// failing re-registers the first phone, which must fail.
func (s *scene) failing(t *testing.T, b core.Behaviour) error {
	t.Helper()
	var err error
	s.behave(b, func() { _, err = s.a.u.Reregister(s.ctx) })
	if err == nil {
		t.Fatal("the re-registration succeeded")
	}
	return err
}

// wrongRES: TS 33.203 §7.3.1.1. The core refuses the response, the old set stays.
func wrongRES(t *testing.T, s *scene) {
	old := s.a.current(t)
	s.a.wrong.Store(true)
	wantRefused(t, s.failing(t, challenging), 403, true)
	s.a.wrong.Store(false)
	s.stillThere(t, old)
}

// resynchronised: TS 33.203 §7.3.1.3. The REGISTER with AUTS goes over the old set, and leads to a new challenge.
func resynchronised(t *testing.T, s *scene) {
	s.a.u.SetSQN(1 << 40)
	sub := s.subs[s.a.index]
	before := len(s.registersOf(sub.IMPI))
	if res := s.renewed(t, s.a); res.Resyncs != 1 {
		t.Errorf("%d resynchronisations, want 1", res.Resyncs)
	}
	for _, r := range s.registersOf(sub.IMPI)[before:] {
		if r.IntegrityProtected != "yes" { // all three came inside an SA
			t.Errorf("integrity-protected is %q at the core, want yes", r.IntegrityProtected)
		}
	}
}

// refusedByCore: the response was right, and the core refuses all the same.
func refusedByCore(t *testing.T, s *scene) {
	old := s.a.current(t)
	b := challenging
	b.RejectAuth = 403
	wantRefused(t, s.failing(t, b), 403, true)
	s.stillThere(t, old)
}

// coreSilent: a REGISTER that the core does not answer gets 504 inside the SA.
func coreSilent(t *testing.T, s *scene) {
	old := s.a.current(t)
	wantRefused(t, s.failing(t, core.Behaviour{Silent: true}), 504, true)
	s.stillThere(t, old)
}

// phoneSilent: TS 33.203 §7.3.1.4. The phone leaves two challenges unanswered: there is one temporary set, the newest, and
// reg-await-auth ends it.
func phoneSilent(t *testing.T, s *scene) {
	old := s.a.current(t)
	expired := s.metric(s.ctx, t, "reg_await_auth_expired_total")
	for range 2 {
		s.behave(challenging, func() {
			s.a.mute.Store(true)
			defer s.a.mute.Store(false)
			ctx, cancel := context.WithCancel(s.ctx)
			defer cancel()
			go func() {
				select {
				case <-s.a.muted:
					cancel()
				case <-ctx.Done():
				}
			}()
			if _, err := s.a.u.Reregister(ctx); err == nil {
				t.Error("the re-registration succeeded")
			}
		})
		if n := s.metric(s.ctx, t, "sa_sets", `phase="temporary"`); n != 1 {
			t.Errorf("%g temporary sets, want 1", n)
		}
	}
	s.stillThere(t, old)
	if n := s.metric(s.ctx, t, "reg_await_auth_expired_total") - expired; n != 1 {
		t.Errorf("reg-await-auth expired %g times, want once", n)
	}
}

// slow answers REGISTER so late that the test can do something meanwhile.
func slow() core.Behaviour {
	b := core.Behaviour{AlwaysChallenge: true, AnswerDelay: 300 * time.Millisecond}
	if slowMachine() {
		b.AnswerDelay *= 4
	}
	return b
}

// newestWins: of two registrations at once the newest makes the SAs, the other one's 401 is passed on and makes none.
func newestWins(t *testing.T, s *scene) {
	// Over the current set: a REGISTER by hand, and before it is answered the phone's own.
	set, sub := s.a.current(t), s.subs[s.a.index]
	by := &stranger{f: s.fixture, addr: netip.AddrPortFrom(s.lab.Plan().UE(s.a.index), set.Ports.US)}
	first := by.register(sub, "by-hand", func(m *sipwire.Message) {
		m.Add("Security-Verify", "ipsec-3gpp;alg=hmac-sha-1-96;spi-c=1;spi-s=2;port-c=3;port-s=4")
	})
	registers := func() int { return len(s.registersOf(sub.IMPI)) }
	before := registers()
	s.a.byHand.Add(1)
	var res ue.Result
	s.behave(slow(), func() {
		if err := s.a.u.SendRaw(true, ims.UDP, set.Ports.UC, set.Ports.PS, []byte(first)); err != nil {
			t.Fatal(err)
		}
		if !eventually(s.ctx, caseTimeout, func() bool { return registers() > before }) {
			t.Fatal("the first REGISTER does not reach the core")
		}
		var err error
		if res, err = s.a.u.Reregister(s.ctx); err != nil {
			t.Fatal(err)
		}
	})
	checkRenewed(t, set, res)
	if err := s.w.settle(s.ctx, s.a); err != nil {
		t.Fatal(err)
	}
	s.wantSet(t, s.a, s.w.turn(s.ctx, t), res.Set.Generation)
	if n := s.metric(s.ctx, t, "sa_sets", `phase="temporary"`); n != 0 {
		t.Errorf("%g temporary sets, want none", n)
	}

	// In clear: one phone that begins anew before its first attempt is answered.
	i := s.take(t)
	cfg := s.configOf(i)
	s.habit(&cfg)
	older, newer := s.endOf(t, i, cfg), s.endOf(t, i, cfg)
	failed := make(chan error, 1)
	s.behave(slow(), func() {
		go func() { _, err := older.u.Register(s.ctx); failed <- err }()
		if !eventually(s.ctx, caseTimeout, func() bool { return len(s.registersOf(s.subs[i].IMPI)) > 0 }) {
			t.Fatal("the first REGISTER does not reach the core")
		}
		s.mustRegister(s.ctx, t, newer.u)
	})
	if err := <-failed; err == nil {
		t.Error("the older registration succeeded as well")
	}
	if status, err := s.core.SendMessage(s.ctx, newer.uri, "who is it?"); err != nil || status != 200 {
		t.Errorf("MESSAGE of the network: %d, %v", status, err)
	}
	checkPhones(t, newer.u)
	if err := newer.u.Deregister(s.ctx); err != nil {
		t.Error(err)
	}
}

// strangerRegisters: somebody sends the REGISTER of a registered phone in clear, from its address and from another one,
// and cannot answer the challenge. The registration does not notice.
func strangerRegisters(t *testing.T, s *scene) {
	old, sub := s.a.current(t), s.subs[s.a.index]
	for n, i := range []int{s.a.index, s.take(t)} {
		st := s.newStranger(t, s.lab.Plan().UE(i), 0)
		st.send(t, lab.PortClear, st.register(sub, fmt.Sprintf("stranger-%d-%d", s.a.index, n)))
		if m := st.wantStatus(t, 401); m == nil || !m.Has("Security-Server") {
			t.Fatal("no offer of the P-CSCF")
		}
		s.wantSet(t, s.a, s.w.turn(s.ctx, t), old.Generation)
	}
	if n := s.metric(s.ctx, t, "sa_sets", `phase="temporary"`); n > 2 {
		t.Errorf("%g temporary sets, want 2 at most", n)
	}
	s.stillThere(t, old)
}

// another returns a phone with traffic of its own, and a second appearance of it: the same subscriber, at an address.
func (s *scene) another(t *testing.T, change ...func(*ue.Config)) (d, again *end, w *flow, proceed chan struct{}) {
	t.Helper()
	d = s.phone(s.ctx, t, s.habit)
	cfg := s.configOf(d.index)
	cfg.Offers, cfg.Ring = s.offers(1), callRing
	for _, c := range append(change, s.habit) {
		c(&cfg)
	}
	again = s.endOf(t, d.index, cfg)
	proceed = make(chan struct{})
	again.u.Tweak = func(kind string, b []byte) []byte {
		if kind == "register-auth" { // SM7 waits
			<-proceed
		}
		return b
	}
	return d, again, s.flow(s.ctx, t, d, s.b), proceed
}

// takesOver registers the second appearance of a phone. Until it is confirmed the first one works, with traffic in both
// directions; afterwards requests reach the second one.
func (s *scene) takesOver(t *testing.T, d, again *end, w *flow, proceed chan struct{}) {
	t.Helper()
	w.turn(s.ctx, t)
	registered := make(chan error, 1)
	go func() { _, err := again.u.Register(s.ctx); registered <- err }()
	if !eventually(s.ctx, caseTimeout, func() bool { return len(again.u.Sets()) > 0 }) {
		t.Fatal("no challenge")
	}
	w.turn(s.ctx, t)
	w.finish(t, d, s.b)
	close(proceed)
	if err := <-registered; err != nil {
		t.Fatal(err)
	}
	before := len(d.u.Received())
	w = s.flow(s.ctx, t, again, s.b)
	w.turn(s.ctx, t)
	w.finish(t, again, s.b)
	if n := len(d.u.Received()) - before; n > 0 {
		t.Errorf("%d requests still reached the phone's first appearance", n)
	}
	if err := errors.Join(d.u.Close(), again.u.Deregister(s.ctx)); err != nil {
		t.Error(err)
	}
}

// startsOver: a phone that is registered begins anew in clear, with other ports. The live registration works until the
// new one is confirmed.
func startsOver(t *testing.T, s *scene) {
	d, again, w, proceed := s.another(t)
	s.takesOver(t, d, again, w, proceed)
}

// newAddress: the same phone from another address (R6.16).
func newAddress(t *testing.T, s *scene) {
	at := s.lab.Plan().UE(s.take(t))
	d, again, w, proceed := s.another(t, func(c *ue.Config) { c.Addr = at })
	s.takesOver(t, d, again, w, proceed)
}

// rebootSamePorts: a phone that was switched off without a word comes back with the ports of before (R6.15, T11); what
// was sent to it meanwhile arrives then.
func rebootSamePorts(t *testing.T, s *scene) {
	s.reboot(t, func(c *ue.Config) { c.PortUC, c.PortUS = 31300, 31301 })
}

// rebootNewPorts is the same with ports chosen anew.
func rebootNewPorts(t *testing.T, s *scene) { s.reboot(t, func(*ue.Config) {}) }

func (s *scene) reboot(t *testing.T, change func(*ue.Config)) {
	t.Helper()
	d := s.phone(s.ctx, t, s.habit, change)
	w := s.flow(s.ctx, t, d, s.b)
	w.turn(s.ctx, t)
	w.finish(t, d, s.b)
	// The flow is over when the callers are done: a phone that has hung up may still wait for the answer to its BYE.
	if !eventually(s.ctx, caseTimeout, func() bool { return d.u.Calls() == 0 }) {
		t.Fatal("a call does not end")
	}
	old := d.current(t)
	sent := s.capture.Packets(old.SPIs.US) + s.capture.Packets(old.SPIs.UC)
	d.u.Reboot()
	type result struct {
		status int
		err    error
	}
	results := make(chan result, 2)
	go func() {
		status, err := s.core.SendMessage(s.ctx, d.uri, "meanwhile 1")
		results <- result{status, err}
	}()
	go func() {
		a, err := s.core.Send(s.ctx, core.Request{IMPU: d.uri, Method: "OPTIONS"})
		results <- result{a.Status, err}
	}()
	if !eventually(s.ctx, caseTimeout, func() bool { return s.capture.Packets(old.SPIs.US)+s.capture.Packets(old.SPIs.UC) > sent }) {
		t.Error("nothing was sent to the phone by the old set")
	}
	res := s.mustRegister(s.ctx, t, d.u)
	if res.Ports.UC == old.Ports.UC && res.Ports.PS == old.Ports.PS {
		t.Errorf("the new set has the selectors of the old one: %v", res.Ports)
	}
	for range 2 {
		if r := <-results; r.err != nil || r.status != 200 {
			t.Errorf("a request sent while the phone was away: %d, %v", r.status, r.err)
		}
	}
	got := 0
	for _, i := range d.u.Received() {
		if i.Body == "meanwhile 1" || i.Method == "OPTIONS" {
			got++
		}
	}
	if got != 2 {
		t.Errorf("%d of the 2 requests sent while the phone was away have arrived", got)
	}
	w = s.flow(s.ctx, t, d, s.b)
	w.turn(s.ctx, t)
	w.finish(t, d, s.b)
	if err := d.u.Deregister(s.ctx); err != nil {
		t.Error(err)
	}
}

// twoAtOneAddress: two phones with one address (a hotspot), other identities and ports. What one does is nothing to the
// other.
func twoAtOneAddress(t *testing.T, s *scene) {
	d := s.phone(s.ctx, t, func(c *ue.Config) { c.Addr = s.lab.Plan().UE(s.a.index) })
	w := s.flow(s.ctx, t, d, s.b)
	w.turn(s.ctx, t)
	res := s.renewed(t, d)
	if err := w.settle(s.ctx, d); err != nil {
		t.Fatal(err)
	}
	s.renewed(t, s.a)
	if err := s.w.settle(s.ctx, s.a); err != nil {
		t.Fatal(err)
	}
	w.turn(s.ctx, t)
	w.finish(t, d, s.b)
	if got := d.current(t); got.Generation != res.Set.Generation {
		t.Errorf("set %d of the second phone, want %d", got.Generation, res.Set.Generation)
	}
	if err := d.u.Deregister(s.ctx); err != nil {
		t.Error(err)
	}
	s.w.turn(s.ctx, t)
}

// TestOldSetLeaves: the old set goes 64*T1 after the new one was taken into use, from the daemon and from its backend, and
// nothing is sent by it any more (R6.5).
func TestOldSetLeaves(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		t.Run(family(v6), func(t *testing.T) {
			f := start(t, fixtureConfig{ipv6: v6, log: loadLog, register: caseTimeout})
			s := f.scene(t, apple)
			old := s.a.current(t)
			sas := s.metric(s.ctx, t, "esp_sas")
			s.renewed(t, s.a)
			if n := s.metric(s.ctx, t, "esp_sas"); n != sas+4 {
				t.Errorf("%g SAs while both sets are there, want %g", n, sas+4)
			}
			if err := s.w.settle(s.ctx, s.a); err != nil {
				t.Fatal(err)
			}
			if !eventually(s.ctx, f.drain, func() bool { return s.metric(s.ctx, t, "esp_sas") == sas }) {
				t.Errorf("%g SAs, want %g again", s.metric(s.ctx, t, "esp_sas"), sas)
			}
			if n := s.metric(s.ctx, t, "sa_sets", `phase="old"`); n != 0 {
				t.Errorf("%g old sets are left", n)
			}
			f.capture.Settle(poll, time.Second)
			sent := f.packets(old.SPIs)
			s.w.turn(s.ctx, t)
			if n := f.packets(old.SPIs) - sent; n != 0 {
				t.Errorf("%d packets by the old set after its end", n)
			}
			s.close(t)
			f.wantNoSets(s.ctx, t)
		})
	}
}

// packets counts the ESP packets of a set.
func (f *fixture) packets(spis ims.SPIs) int {
	n := 0
	for _, spi := range spisOf(spis) {
		n += f.capture.Packets(spi)
	}
	return n
}

// Lives of the registrations in TestLifetimes.
const (
	lifetimeMargin = 2 * time.Second // timers.lifetime_margin
	shortLife      = 6 * time.Second // granted
)

// life is how long a short registration lasts.
func life() time.Duration {
	if slowMachine() {
		return 5 * shortLife
	}
	return shortLife
}

// TestLifetimes: a refresh without challenge keeps SPIs and ports and moves the lifetime (R6.9); a phone that never uses
// its new set gets its requests by it once the old one has less than 64*T1 left (R6.6); a registration that is not
// refreshed ends with its sets (R6.8).
func TestLifetimes(t *testing.T) {
	for _, tr := range []struct {
		name  string
		habit func(*ue.Config)
		v6    bool
	}{{"UDP over IPv4", byUDP, false}, {"TCP over IPv6", byTCP, true}} {
		t.Run(tr.name, func(t *testing.T) {
			t.Parallel()
			f := start(t, fixtureConfig{
				ipv6: tr.v6, log: loadLog, register: caseTimeout, oldSet: life() * 2 / 3, daemon: lab.DaemonOptions{LifetimeMargin: lifetimeMargin},
			})
			life := life()
			short := func(c *ue.Config) { c.Expires = life }
			s := f.scene(t, tr.habit)
			ctx := s.ctx
			d := f.phone(ctx, t, tr.habit, short)
			begin := time.Now()
			w := f.flow(ctx, t, d, s.b)
			first := d.current(t)
			for time.Since(begin) < life+lifetimeMargin { // the end of what was granted first
				wait(ctx, t, life/4)
				res, err := d.u.Reregister(ctx)
				if err != nil {
					t.Fatal(err)
				}
				if res.Challenged || res.SPIs != first.SPIs || res.Ports != first.Ports {
					t.Errorf("got %+v, want the set of %+v", res, first)
				}
			}
			w.turn(ctx, t)

			// A new set that is never used: requests to the phone move over to it all the same.
			w.hush(ctx, t, d)
			var res ue.Result
			s.behave(challenging, func() {
				var err error
				if res, err = d.u.Reregister(ctx); err != nil {
					t.Fatal(err)
				}
			})
			checkRenewed(t, first, res)
			if !eventually(ctx, life+lifetimeMargin+drainMargin, func() bool {
				in := d.u.Received()
				return in[len(in)-1].Set == res.Set.Generation
			}) {
				t.Error("requests to the phone still come by the old set")
			}
			w.finish(t, d, s.b)

			// Nothing more is heard of the phone.
			ues := s.metric(ctx, t, "ues")
			if !eventually(ctx, life+lifetimeMargin+drainMargin, func() bool { return s.metric(ctx, t, "ues") == ues-1 }) {
				t.Error("the registration that was not refreshed is still there")
			}
			s.close(t)
			f.wantNoSets(ctx, t)
		})
	}
}

// wait lets time pass.
func wait(ctx context.Context, t *testing.T, d time.Duration) {
	t.Helper()
	select {
	case <-time.After(d):
	case <-ctx.Done():
		t.Fatal(ctx.Err())
	}
}
