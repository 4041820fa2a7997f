package proxy

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/config"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// Cases of the table in peers_test.go: SA sets from the challenge to their end.

// manyPhones registers n phones at addresses of their own.
func manyPhones(r *rig, n int) []*phone {
	r.t.Helper()
	addr := netip.MustParseAddr("10.45.16.1")
	phones := make([]*phone, n)
	for i := range phones {
		phones[i] = r.signUp(phoneAt(addr.String(), i))
		addr = addr.Next()
	}
	return phones
}

func peerCrowdOnFewPorts(t *testing.T) {
	r := newRig(t)
	phones := manyPhones(r, 300)
	seen := make(map[ims.SPI]bool)
	local := make(map[uint16]bool)
	for _, s := range r.backend.Installed {
		for _, spi := range []ims.SPI{s.SPIs.PC, s.SPIs.PS} {
			if seen[spi] {
				t.Errorf("SPI %v was given out twice", spi)
			}
			seen[spi] = true
		}
		local[s.Ports.PC], local[s.Ports.PS] = true, true
	}
	if len(local) > 6 {
		t.Errorf("%d protected ports in use, 6 are configured", len(local))
	}
	for _, p := range phones[:10] {
		r.renew(p) // a phone that registers again holds two sets
	}
	r.served(phones[0])
	r.served(phones[299])
}

// Beyond a limit a phone is told to come back, with nothing that looks like an agreement.
func peerExhaustion(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"SPIs":  func(c *Config) { c.SPIFirst, c.SPILast = 1000, 1007 }, // four sets
		"ports": func(c *Config) { c.Registrar.ServerPorts, c.Registrar.ClientPorts = []uint16{6100}, []uint16{6110} },
	} {
		r := newRig(t, change)
		addr, refused := netip.MustParseAddr("10.45.0.7"), 0
		for n := range 8 {
			p := phoneAt(addr.String(), n)
			if name == "SPIs" {
				addr = addr.Next()
			} else {
				p.impi = impi // the same phone again, with other values and without leaving
				p.callID = fmt.Sprint(n)
			}
			req := r.one(p.clear(), p.register(fmt.Sprintf("x%d", n), 5060))
			if req.remote != coreAddr {
				t.Fatalf("%s: %s", name, req.msg)
			}
			out := r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge))
			switch status(t, out.msg) {
			case 401:
				r.readServer(p, out.msg)
				r.accept(p)
			case 503, 403:
				refused++
				if strings.Contains(out.msg, "WWW-Authenticate") || !strings.Contains(out.msg, "Warning: 399") {
					t.Errorf("%s:\n%s", name, out.msg)
				}
			default:
				t.Errorf("%s:\n%s", name, out.msg)
			}
		}
		if name == "SPIs" && refused == 0 {
			t.Errorf("%s: nobody was refused", name)
		}
	}
}

// Eight SPIs serve any number of phones one after the other.
func peerSPIsComeBack(t *testing.T) {
	r := newRig(t, func(c *Config) { c.SPIFirst, c.SPILast = 1000, 1007 })
	for n := range 40 {
		p := r.signUp(phoneAt("10.45.0.7", n))
		r.served(p)
		r.leave(p)
		r.advance(finalKept + answerGrace)
	}
	r.empty()
}

// The pool holds four values of which the phone uses two: the other two are ours.
func peerSPIRange(t *testing.T) {
	const first, last = 4101, 4104
	for c := uint32(first); c <= last; c++ {
		for s := uint32(first); s <= last; s++ {
			if c == s {
				continue
			}
			r := newRig(t, func(cfg *Config) { cfg.SPIFirst, cfg.SPILast = first, last })
			p := newPhone()
			p.spiC, p.spiS = c, s
			p.securityClient = fmt.Sprintf("ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc;spi-c=%d;spi-s=%d;port-c=%d;port-s=%d", c, s, p.portC, p.portS)
			r.signUp(p)
			got := r.context(p).Current.SPIs
			for _, spi := range []ims.SPI{got.PC, got.PS} {
				if spi < first || spi > last || spi == got.UC || spi == got.US || got.PC == got.PS {
					t.Errorf("SPIs of the set: %v", got)
				}
			}
		}
	}
}

func peerOneRemoval(t *testing.T) {
	r := newRig(t)
	a := r.signUp(phoneAt("10.45.0.7", 1))
	r.leave(a)
	r.leave(a) // a second one while the first is under way
	u := r.context(a)
	r.w.table.Deregister(u, 0) // and the operator at the same time
	r.advance(finalKept + answerGrace)
	b := r.signUp(phoneAt("10.45.0.7", 1)) // the same values again, for a new owner
	r.advance(time.Hour)
	seen := make(map[uint64]int)
	for _, s := range r.backend.Removed {
		if seen[s.ID]++; seen[s.ID] > 1 {
			t.Errorf("set %d was removed %d times", s.ID, seen[s.ID])
		}
	}
	if r.backend.Count() != 4 || r.w.table.SPIsInUse() != 2 {
		t.Errorf("%d SAs, %d SPIs", r.backend.Count(), r.w.table.SPIsInUse())
	}
	r.served(b)
}

// The timer of a set and its owner end it in the same tick.
func peerTimerAndRelease(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	r.challenge(p, clearFlow(), 5060)
	r.advance(4*time.Minute - 100*time.Millisecond)
	p.agree()
	req := r.one(clearFlow(), p.register("again", 5060))
	r.l.now = r.l.now.Add(100 * time.Millisecond)
	r.w.Message(coreFlow(), []byte(answerTo(t, req.msg, "401 Unauthorized", challenge))) // drops the temporary set
	r.w.Tick(r.l.now)                                                                    // which expires now
	r.settle()
	if r.backend.Count() != 4 || r.w.table.SPIsInUse() != 2 {
		t.Errorf("%d SAs, %d SPIs", r.backend.Count(), r.w.table.SPIsInUse())
	}
	r.advance(5 * time.Minute)
	r.empty()
}

func peerNeighboursUntouched(t *testing.T) {
	r := newRig(t)
	phones := manyPhones(r, 20)
	extended := len(r.backend.Extended)
	p := r.signUp(phoneAt("10.45.0.7", 77))
	r.renew(p)
	r.leave(p)
	r.advance(finalKept + answerGrace)
	for _, s := range append(slices.Clone(r.backend.Removed), r.backend.Extended[extended:]...) {
		if s.UE != p.addr {
			t.Errorf("the registration of %v touched the SAs of %v", p.addr, s.UE)
		}
	}
	for _, q := range phones {
		r.served(q)
	}
}

func peerFourSAs(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	s := r.context(p).Current
	type key struct {
		dst netip.Addr
		spi ims.SPI
	}
	seen := make(map[key]bool)
	want := map[string]bool{
		fmt.Sprintf("in %d %d", p.portC, p.ps): true, fmt.Sprintf("in %d %d", p.portS, p.pc): true,
		fmt.Sprintf("out %d %d", p.pc, p.portS): true, fmt.Sprintf("out %d %d", p.ps, p.portC): true,
	}
	for _, x := range s.SAs() {
		seen[key{x.Dst.Addr(), x.SPI}] = true
		if name := fmt.Sprintf("%v %d %d", x.Dir, x.Src.Port(), x.Dst.Port()); !want[name] {
			t.Errorf("SA %s", name)
		}
	}
	if len(seen) != 4 || r.backend.Count() != 4 {
		t.Errorf("%d distinct SAs, %d in the backend", len(seen), r.backend.Count())
	}
	// The receiver names an SA: the phone's SPIs stand for what it receives.
	for _, x := range s.SAs() {
		if own := x.SPI == ims.SPI(p.spiC) || x.SPI == ims.SPI(p.spiS); own != (x.Dir == sa.Out) {
			t.Errorf("SA %v to %v has SPI %v", x.Dir, x.Dst, x.SPI)
		}
	}
}

func peerKernelLifetimes(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	r.challenge(p, clearFlow(), 5060)
	if got, want := r.backend.Installed[0].Hard, 4*time.Minute; got <= want || got > want+5*time.Minute {
		t.Errorf("hard limit of a temporary set %v", got)
	}
	r.confirm(p)
	hard := func() time.Duration { return r.backend.Extended[len(r.backend.Extended)-1].Hard }
	if left := r.context(p).Current.Deadline.Sub(r.l.now); hard() <= left || hard() > left+5*time.Minute {
		t.Errorf("hard limit %v, the set has %v", hard(), left)
	}
	r.advance(time.Minute)
	n := len(r.backend.Extended)
	r.refresh(p)
	if left := r.context(p).Current.Deadline.Sub(r.l.now); len(r.backend.Extended) != n+1 || hard() <= left {
		t.Errorf("after a refresh: hard limit %v, the set has %v", hard(), left)
	}
}

// join registers a phone whose registration lasts so many seconds.
func (r *rig) join(p *phone, expires int) {
	r.t.Helper()
	r.challenge(p, p.clear(), 5060)
	p.authorization = p.proof()
	req := r.one(p.protectedFlow, p.register("short", 6300, "Security-Verify: "+p.server))
	ok := p.ok200()
	ok[0] = strings.Replace(ok[0], "600000", fmt.Sprint(expires), 1)
	r.one(coreFlow(), answerTo(r.t, req.msg, "200 OK", ok...))
}

func peerExpiry(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	r.join(p, 600)
	r.advance(629 * time.Second)
	r.served(p)
	r.advance(2 * time.Second)
	if r.backend.Count() != 0 {
		t.Errorf("%d SAs 31 s after the registration", r.backend.Count())
	}
	r.empty()
}

func peerRefreshMovesLifetime(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	r.join(p, 600)
	r.advance(500 * time.Second)
	req := r.one(p.protectedFlow, p.register("rf", 6300, "Security-Client:"))
	r.one(coreFlow(), answerTo(t, req.msg, "200 OK", strings.Replace(p.ok200()[0], "600000", "600", 1), granted[1]))
	r.advance(500 * time.Second)
	if len(r.backend.Installed) != 1 {
		t.Errorf("%d sets were made", len(r.backend.Installed))
	}
	r.served(p)
	r.advance(131 * time.Second)
	r.empty()
}

func peerRefreshWithoutOffer(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	for range 3 {
		r.advance(time.Minute)
		r.refresh(p)
	}
	if len(r.backend.Installed) != 1 || len(r.backend.Removed) != 0 {
		t.Errorf("%d sets made, %d removed", len(r.backend.Installed), len(r.backend.Removed))
	}
	r.served(p)
}

// Twenty re-registrations in a row: ports are found each time, the server port stays, and old sets go.
func peerManyRenewals(t *testing.T) {
	for _, clients := range [][]uint16{{6110, 6111, 6112, 6113}, {6110, 6111}} {
		r := newRig(t, func(c *Config) { c.Registrar.ClientPorts = clients })
		p := r.registered()
		first := p.ps
		for range 20 {
			before := p.pc
			r.renew(p)
			if p.ps != first || p.pc == before {
				t.Errorf("port-ps %d became %d, port-pc %d became %d", first, p.ps, before, p.pc)
			}
			r.served(p)
			r.advance(129 * time.Second)
			if n := r.backend.Count(); n != 4 {
				t.Fatalf("%d SAs after 64*T1", n)
			}
		}
		if n := r.w.table.SPIsInUse(); n != 2 {
			t.Errorf("%d SPIs in use", n)
		}
		r.leave(p)
		r.empty()
	}
}

// Re-registrations that follow one another faster than old sets end.
func peerHastyRenewals(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	for range 12 {
		old := *p
		p.agree()
		req := r.one(old.protectedFlow, p.register(fmt.Sprintf("re%d", p.n), 6300, "Security-Verify: "+old.server))
		if req.remote != coreAddr { // too many sets: the phone keeps what it has
			*p = old
			break
		}
		out := r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge))
		if status(t, out.msg) != 401 {
			*p = old
			break
		}
		r.readServer(p, out.msg)
		r.accept(p)
		if n := r.backend.Count(); n > 12 {
			t.Fatalf("%d SAs of one phone, 12 are allowed", n)
		}
	}
	r.served(p)
	r.advance(finalKept + time.Second)
	if r.backend.Count() != 4 {
		t.Errorf("%d SAs in the end", r.backend.Count())
	}
	r.served(p)
}

// A phone that holds as many sets as it may is refused another one, and keeps what it has.
func peerMaxSets(t *testing.T) {
	t.Run("at most three", peerHastyRenewals)
	r := newRig(t, func(c *Config) { c.Registrar.MaxSets = 2 })
	p := r.registered()
	r.renew(p)
	next := *p
	next.agree()
	out := r.one(p.protectedFlow, next.register("third", 6300, "Security-Verify: "+p.server))
	if status(t, out.msg) != 403 || !strings.Contains(out.msg, "too many SA sets") {
		t.Errorf("a third set:\n%s", out.msg)
	}
	r.served(p)
	p.n, p.cseq = next.n, next.cseq
	r.advance(finalKept + time.Second)
	r.renew(p)
}

// Challenges without end: unprotected ones, then over a set.
func peerRepeatedChallenges(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	for range 500 {
		p.agree()
		if p.n%20000 == 0 {
			t.Fatal("ports used up")
		}
		p.callID = fmt.Sprint("again", p.n)
		r.challenge(p, clearFlow(), 5060)
		if n, spis := r.backend.Count(), r.w.table.SPIsInUse(); n != 4 || spis != 2 {
			t.Fatalf("attempt %d: %d SAs, %d SPIs", p.n, n, spis)
		}
	}
	r.confirm(p)
	r.served(p)
	for range 50 {
		q := *p
		q.agree()
		req := r.one(p.protectedFlow, q.register(fmt.Sprintf("rc%d", p.cseq), 6300, "Security-Verify: "+p.server))
		r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge))
		p.n, p.cseq = q.n, q.cseq
	}
	if n := r.backend.Count(); n != 8 {
		t.Errorf("%d SAs, want the set in use and one temporary", n)
	}
	r.served(p)
	r.leave(p)
	r.advance(5 * time.Minute)
	r.empty()
}

func peerAwaitAuth(t *testing.T) {
	r := newRig(t)
	a, b := phoneAt("10.45.0.7", 1), phoneAt("10.45.0.8", 2)
	r.challenge(a, a.clear(), 5060)
	r.advance(2 * time.Minute)
	r.challenge(b, b.clear(), 5060)
	r.advance(119 * time.Second)
	if r.backend.Count() != 8 {
		t.Errorf("%d SAs before 4 minutes", r.backend.Count())
	}
	r.advance(2 * time.Second)
	if r.backend.Count() != 4 {
		t.Errorf("%d SAs after 4 minutes of the first", r.backend.Count())
	}
	r.accept(b)
	r.advance(5 * time.Minute)
	r.served(b)
}

func peerAwaitAuthConfigured(t *testing.T) {
	if d := config.Default().Timers.RegAwaitAuth; d != 4*time.Minute {
		t.Errorf("default %v", d)
	}
	r := newRig(t, func(c *Config) { c.Registrar.AwaitAuth = 30 * time.Second })
	r.challenge(newPhone(), clearFlow(), 5060)
	r.advance(31 * time.Second)
	r.empty()
}

func peerSetOutlivesTransaction(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	r.advance(finalKept + 2*time.Minute) // every REGISTER transaction is forgotten
	if len(r.w.txs) != 0 || r.backend.Count() != 4 {
		t.Errorf("%d transactions, %d SAs", len(r.w.txs), r.backend.Count())
	}
	r.served(p)
	r.refresh(p)
	r.advance(finalKept + 2*time.Minute)
	r.served(p)
}

func peerSameEightLeaves(t *testing.T) {
	r := newRig(t)
	a := r.signUp(phoneAt("10.45.0.7", 1))
	near := r.signUp(phoneAt("10.45.0.8", 2))
	far := r.signUp(phoneAt("10.200.3.4", 3))
	same := r.signUp(phoneAt("10.45.0.7", 4))
	r.leave(a)
	r.advance(finalKept + answerGrace)
	for _, p := range []*phone{near, far, same} {
		r.served(p)
		r.refresh(p)
	}
	if r.backend.Count() != 12 || r.w.table.UEs() != 3 {
		t.Errorf("%d SAs, %d contexts", r.backend.Count(), r.w.table.UEs())
	}
}

func peerRebootSamePorts(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	old := *p
	p.agree()
	p.portC = old.portC // ports as before, SPIs of its own
	p.securityClient = strings.ReplaceAll(p.securityClient, fmt.Sprintf("port-c=%d", 6300+p.n), fmt.Sprintf("port-c=%d", p.portC))
	p.authorization, p.callID, p.cseq = "", "reboot", 0
	r.challenge(p, clearFlow(), 5060)
	r.served(&old) // until the phone proves itself, the old set works
	r.accept(p)
	r.served(p)
	r.advance(finalKept + answerGrace)
	if r.backend.Count() != 4 || r.w.table.SPIsInUse() != 2 {
		t.Errorf("%d SAs, %d SPIs", r.backend.Count(), r.w.table.SPIsInUse())
	}
	r.served(p)
}

func peerTwiceWithoutVerify(t *testing.T) {
	r := newRig(t)
	good := r.signUp(phoneAt("10.45.0.8", 2))
	p := newPhone()
	r.challenge(p, clearFlow(), 5060)
	p.authorization = proof
	r.deliver(p.protectedFlow, p.register("x", 6300))
	r.deliver(p.protectedFlow, p.register("y", 6300))
	r.advance(10 * time.Minute)
	if r.backend.Count() != 4 || len(r.backend.Removed) != 1 {
		t.Errorf("%d SAs, %d removals", r.backend.Count(), len(r.backend.Removed))
	}
	r.served(good)
	p.authorization = ""
	p.agree()
	r.signUp(p)
	r.served(p)
}

// Two hundred phones come, live and go; what is kept of them afterwards is nothing.
func peerNothingRemains(t *testing.T) {
	r := newRig(t)
	phones := manyPhones(r, 200)
	for i, p := range phones {
		f := r.connect(p, ims.ConnID(i+1))
		r.deliver(f, overTCP(p.says()))
		if i%3 == 0 {
			r.renew(p)
		}
		if i%5 == 0 {
			r.hangUp(f)
		}
		r.leave(p)
	}
	r.advance(5 * time.Minute)
	r.empty()
	if len(r.w.answer) != 0 || len(r.w.sentBy) != 0 || len(r.l.conns) != 0 {
		t.Errorf("left: %d and %d entries of core connections, %d connections", len(r.w.answer), len(r.w.sentBy), len(r.l.conns))
	}
}

// Whatever is done for one phone looks at no other: the contexts of the others are made unusable, so that a walk over them
// would crash.
func peerNobodyWalks(t *testing.T) {
	r := newRig(t)
	manyPhones(r, 50)
	r.w.table.Each(func(u *registrar.UE) bool {
		for _, s := range u.Sets {
			s.UE, s.Over = nil, nil
			s.ClientText, s.ServerText = "", ""
		}
		u.Sets = []*registrar.Set{nil}
		u.Current = nil
		return true
	})
	p := r.signUp(phoneAt("10.45.0.7", 77))
	r.served(p)
	r.refresh(p)
	r.renew(p)
	r.served(p)
	r.advance(3 * time.Second) // idle ticks
	r.leave(p)
	r.advance(finalKept + answerGrace)
	if r.w.table.UEs() != 50 {
		t.Errorf("%d contexts", r.w.table.UEs())
	}
}

// While the backend is slow or the core silent about one phone, the others go on.
func peerNobodyWaits(t *testing.T) {
	r := newRig(t)
	good := r.registered()
	p := phoneAt("10.45.0.8", 2)
	r.l.out = nil
	r.w.Message(p.clear(), []byte(p.register("slow", 5060)))
	toCore := r.l.out[0] // the core thinks about it
	r.l.out = nil
	r.w.Message(good.protectedFlow, []byte(good.says()))
	if len(r.l.out) != 1 {
		t.Fatal("a phone waits for the core's answer to another")
	}
	r.w.Message(coreFlow(), []byte(answerTo(t, toCore.msg, "401 Unauthorized", challenge))) // the backend thinks about it
	r.l.out = nil
	r.w.Message(good.protectedFlow, []byte(good.says()))
	r.w.Message(coreFlow(), []byte(r.request(good, "OPTIONS", "x")))
	if len(r.l.out) != 2 {
		t.Errorf("%d messages went out while the backend was busy, want 2", len(r.l.out))
	}
	r.settle()
	if r.backend.Count() != 8 {
		t.Errorf("%d SAs", r.backend.Count())
	}
}

func peerAnswerWithoutTransaction(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	req := r.one(clearFlow(), p.register("x", 5060))
	stray := strings.Replace(answerTo(t, req.msg, "200 OK", granted...), "branch=z9hG4bK", "branch=z9hG4bKx", 1)
	if out := r.deliver(coreFlow(), stray); len(out) != 0 {
		t.Errorf("sent %v", out)
	}
	r.advance(time.Minute)
	if out := r.deliver(coreFlow(), answerTo(t, req.msg, "200 OK", granted...)); len(out) != 0 { // too late
		t.Errorf("sent %v", out)
	}
	if r.w.table.UEs() != 0 || r.backend.Count() != 0 {
		t.Error("somebody is registered")
	}
	t.Run("in clear", TestUnchallenged)
}

// Each address of record over one set comes and goes; the set goes with the last, after its answer.
func peerSeveralAoRs(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	for _, user := range []string{"work", "home"} {
		to := "To: <sip:" + user + "@" + domain + ">"
		req := r.one(p.protectedFlow, p.register(user, 6300, "Security-Client:", to))
		r.one(coreFlow(), answerTo(t, req.msg, "200 OK", granted[0], granted[1], "P-Associated-URI: <sip:"+user+"@"+domain+">"))
	}
	for _, user := range []string{"home", "work"} {
		out := r.leave(p, "To: <sip:"+user+"@"+domain+">")
		p.downlink(t, out)
		if status(t, out.msg) != 200 {
			t.Errorf("de-REGISTER of %s:\n%s", user, out.msg)
		}
		r.advance(3 * time.Minute)
		if r.backend.Count() != 4 {
			t.Fatalf("%d SAs while an identity is registered", r.backend.Count())
		}
		r.served(p)
	}
	out := r.leave(p)
	p.downlink(t, out)
	if status(t, out.msg) != 200 {
		t.Errorf("last de-REGISTER:\n%s", out.msg)
	}
	r.empty()
	if len(r.backend.Removed) != 1 {
		t.Errorf("the set was removed %d times", len(r.backend.Removed))
	}
}

func peerNewVectorNewSet(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	old := *p
	before := r.backend.Installed[0].Keys.Auth.Clone()
	p.agree()
	req := r.one(old.protectedFlow, p.register("re", 6300, "Security-Verify: "+old.server))
	row := strings.NewReplacer("b40ba9a3", "00112233", "f769bcd7", "44556677", "I1U8vpY3", "AAAAvpY3").Replace(challenge)
	r.readServer(p, r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", row)).msg)
	r.accept(p)
	if len(r.backend.Installed) != 2 {
		t.Fatalf("%d sets made", len(r.backend.Installed))
	}
	a, b := r.backend.Installed[0], r.backend.Installed[1]
	if string(a.Keys.Auth) != string(before) || string(b.Keys.Auth) == string(before) || a.SPIs.PC == b.SPIs.PC || a.SPIs.PS == b.SPIs.PS {
		t.Error("the new set shares keys or SPIs with the old one")
	}
	// The very same keys again make a set of their own as well.
	r.served(p)
	r.renew(p)
	r.served(p)
}

func peerDeregistrationAfterRenewal(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	r.renew(p)
	out := r.leave(p)
	p.downlink(t, out)
	if status(t, out.msg) != 200 || r.backend.Count() != 8 {
		t.Errorf("%d SAs when the answer leaves:\n%s", r.backend.Count(), out.msg)
	}
	r.empty()
}

func peerAddressTaken(t *testing.T) {
	r := newRig(t)
	a := r.signUp(phoneAt("10.45.0.7", 1))
	for name, change := range map[string]func(p *phone){
		"port-c": func(p *phone) { p.portC = a.portC },
		"port-s": func(p *phone) { p.portS = a.portS },
		"spi-c":  func(p *phone) { p.spiC = a.spiC },
		"spi-s":  func(p *phone) { p.spiS = a.spiS },
	} {
		b := phoneAt("10.45.0.7", 2)
		change(b)
		b.securityClient = fmt.Sprintf("ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc;spi-c=%d;spi-s=%d;port-c=%d;port-s=%d", b.spiC, b.spiS, b.portC, b.portS)
		if out := r.one(b.clear(), b.register(name, 5060)); status(t, out.msg) != 403 {
			t.Errorf("%s of another phone:\n%s", name, out.msg)
		}
	}
	r.served(a)
	r.served(r.signUp(phoneAt("10.45.0.7", 3)))
	r.served(a)
}

func peerOldSetUntilNewIsUsed(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	old := *p
	r.renew(p)
	r.advance(10 * time.Minute) // as long as the phone likes
	old.downlink(t, r.one(coreFlow(), r.request(p, "OPTIONS", "a")))
	r.one(p.protectedFlow, p.says())
	p.downlink(t, r.one(coreFlow(), r.request(p, "OPTIONS", "b")))
	if up := r.one(old.protectedFlow, old.says()); up.remote.Addr() == ueAddr {
		t.Errorf("a straggler over the old set is refused:\n%s", up.msg)
	}
	r.advance(127 * time.Second)
	if r.backend.Count() != 8 {
		t.Error("the old set goes too early")
	}
	r.advance(2 * time.Second)
	if r.backend.Count() != 4 {
		t.Error("the old set stays")
	}
}

func peerFailedRenewals(t *testing.T) {
	for name, end := range map[string]func(r *rig, old, p *phone){
		"wrong response": func(r *rig, _, p *phone) {
			p.authorization = proof
			req := r.one(p.protectedFlow, p.register("sm7", 6300, "Security-Verify: "+p.server))
			r.one(coreFlow(), answerTo(t, req.msg, "403 Forbidden"))
		},
		"no answer of the phone": func(*rig, *phone, *phone) {},
		"no answer of the core": func(r *rig, _, p *phone) {
			p.authorization = proof
			r.deliver(p.protectedFlow, p.register("sm7", 6300, "Security-Verify: "+p.server))
		},
		"other Security-Verify": func(r *rig, old, p *phone) {
			p.authorization = proof
			r.one(p.protectedFlow, p.register("sm7", 6300, "Security-Verify: "+old.server))
		},
	} {
		r := newRig(t)
		p := r.registered()
		old := *p
		p.agree()
		req := r.one(old.protectedFlow, p.register("re", 6300, "Security-Verify: "+old.server))
		r.readServer(p, r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge)).msg)
		end(r, &old, p)
		r.served(&old)
		r.advance(5 * time.Minute)
		if r.backend.Count() != 4 {
			t.Errorf("%s: %d SAs", name, r.backend.Count())
		}
		r.served(&old)
	}
}

func peerIdlePhoneStays(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	f := r.connect(p, 5)
	r.deliver(f, overTCP(p.says()))
	r.hangUp(f) // the radio goes idle
	r.advance(time.Hour)
	if u := r.context(p); u.State != registrar.Registered || r.backend.Count() != 4 {
		t.Errorf("after an idle hour: %v, %d SAs", u.State, r.backend.Count())
	}
	r.served(p)
}

func peerFamilies(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Gm = append(c.Gm, netip.MustParseAddr("2001:db8::5")) })
	r.registered()
	for _, s := range r.backend.Installed {
		if s.Local.Is4() != s.UE.Is4() {
			t.Errorf("set between %v and %v", s.Local, s.UE)
		}
	}
	t.Run("IPv6", TestIPv6)
}

func peerSettings(t *testing.T) {
	c := config.Default()
	c.Gm.Addresses, c.Mw.Addresses = []netip.Addr{gmAddr}, []netip.Addr{mwAddr.Addr()}
	c.Mw.NextHops = []config.NextHop{{Host: coreAddr.Addr().String(), Addr: coreAddr, Transport: ims.UDP}}
	c.Mw.VisitedNetwork = domain
	if err := c.Validate(); err != nil {
		t.Fatalf("a minimal configuration: %v", err)
	}
	for what, ok := range map[string]bool{
		"server and client ports": len(c.Gm.ServerPorts) > 0 && len(c.Gm.ClientPorts) >= 4,
		"SPI range":               c.Security.SPI.First >= 256 && c.Security.SPI.Last > c.Security.SPI.First+1<<20,
		"algorithms":              len(c.Security.Suites()) > 0,
		"timers":                  c.Timers.RegAwaitAuth > 0 && c.Timers.OldSet > 0 && c.Timers.LifetimeMargin > 0,
		"quotas":                  c.Limits.PendingRegistrations > 0 && c.Limits.PendingPerSource > 0 && c.Security.MaxSetsPerUE > 1,
	} {
		if !ok {
			t.Errorf("%s have no usable default", what)
		}
	}
	c.Gm.ServerPorts, c.Security.SPI.First, c.Security.MaxSetsPerUE = []uint16{5060}, 1, 100
	var problems config.Errors
	if err := c.Validate(); !errors.As(err, &problems) || len(problems) < 3 {
		t.Errorf("three mistakes, reported: %v", err)
	}
}

func peerPathAndNetwork(t *testing.T) {
	r := newRig(t)
	sm2 := r.one(clearFlow(), newPhone().register("x", 5060, "Path: <sip:evil.example;lr>", `P-Visited-Network-ID: "evil"`, "P-Charging-Vector: icid-value=evil"))
	m := scan(t, sm2.msg)
	if p := string(m.Get(sipmsg.Path)); m.Count(sipmsg.Path) != 1 || !strings.HasSuffix(p, "@10.0.1.5:5060;lr>") || !strings.Contains(sm2.msg, "Require: path") {
		t.Errorf("Path: %q", p)
	}
	if v := string(m.Get(sipmsg.PVisitedNetworkID)); v != `"`+domain+`"` || m.Count(sipmsg.PVisitedNetworkID) != 1 {
		t.Errorf("P-Visited-Network-ID: %q", v)
	}
	if strings.Contains(sm2.msg, "evil") {
		t.Errorf("what only the network may say:\n%s", sm2.msg)
	}
}
