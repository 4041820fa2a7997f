package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/gmgate/gmgate/bench/lab"
	"github.com/gmgate/gmgate/bench/ue"
	"github.com/gmgate/gmgate/control/admin"
)

// demoReconcile is how often the daemon of the story of a life notes sequence numbers.
const demoReconcile = time.Second

// The story of a life: every step says what happens and by which clause, then shows the SA sets of the phone as gmgate
// has them, and holds them against what the phone has, what the ESP backend has, and what was there before. Whatever is not
// as told fails the demo.

// lifecycle returns the chapters of the story.
func (d *demo) lifecycle() []func(context.Context) error {
	s := &life{demo: d}
	return []func(context.Context) error{
		d.build, s.register, s.call, s.reregister, s.restart, s.crash, s.callAgain, s.deregister, s.verify,
	}
}

// life is the story of one phone.
type life struct {
	*demo
	before  admin.UE // as last seen
	refused int      // requests of the phone that had to be refused
}

// hero is the phone that it is about; peer the one that it calls.
func (s *life) hero() *phone { return s.phones[0] }
func (s *life) peer() *phone { return s.phones[1] }

// tell runs one step of the story: why names the reason and its clause.
func (s *life) tell(ctx context.Context, name, why string, f func(context.Context) error) bool {
	return s.step(ctx, name, func(ctx context.Context) (string, error) { return why, f(ctx) })
}

// sets prints the SA sets of the phone once check finds them to be as they should be, with everything that must hold at
// any time: gmgate and the phone agree, the backend has four SAs for each set and no other, and nothing was in clear.
func (s *life) sets(ctx context.Context, name string, check func(now admin.UE) error) bool {
	var now admin.UE
	ok := s.step(ctx, name, func(ctx context.Context) (string, error) {
		var err error
		if now, err = s.find(ctx, s.hero()); err != nil {
			return "", err
		}
		if err := errors.Join(check(now), s.agree(now)); err != nil {
			return "", err
		}
		return s.counts(ctx)
	})
	if len(now.Sets) > 0 {
		for l := range strings.Lines(columns(setRows(now.Sets, time.Now()), -1)) {
			s.c.line("    %s", strings.TrimSuffix(l, "\n"))
		}
		s.c.line("")
	}
	s.before = now
	return ok
}

// find asks gmgate for a phone.
func (s *life) find(ctx context.Context, p *phone) (admin.UE, error) {
	list, _, err := s.admin.UEs(ctx, admin.Query{IMPI: p.sub.IMPI}, 2)
	if err != nil {
		return admin.UE{}, err
	}
	if len(list) != 1 {
		return admin.UE{}, fmt.Errorf("gmgate has %d contexts of %s", len(list), p.name)
	}
	return s.admin.UE(ctx, list[0].ID, true)
}

// agree holds what gmgate has against what the phone believes to be its newest set.
func (s *life) agree(now admin.UE) error {
	p := s.hero().last
	newest := now.Sets[len(now.Sets)-1]
	spis := admin.SPIs{UC: uint32(p.SPIs.UC), US: uint32(p.SPIs.US), PC: uint32(p.SPIs.PC), PS: uint32(p.SPIs.PS)}
	switch {
	case newest.SPIs != spis:
		return fmt.Errorf("gmgate has the SPIs %+v, the phone %+v", newest.SPIs, spis)
	case newest.Ports != admin.Ports(p.Ports):
		return fmt.Errorf("gmgate has the ports %+v, the phone %+v", newest.Ports, p.Ports)
	case newest.Algorithms != p.Suite.String():
		return fmt.Errorf("gmgate has %s, the phone %s", newest.Algorithms, p.Suite)
	case newest.Sequences == nil:
		return fmt.Errorf("the backend does not hold set %s", newest.ID)
	}
	return nil
}

// counts says how many SAs the backend has, and whether they are the right ones; and that nothing was in clear.
func (s *life) counts(ctx context.Context) (string, error) {
	list, _, err := s.admin.UEs(ctx, admin.Query{}, demoMaxPhones)
	if err != nil {
		return "", err
	}
	sets := 0
	for _, u := range list {
		sets += len(u.Sets)
	}
	st, err := s.admin.Status(ctx)
	if err != nil {
		return "", err
	}
	if st.SAs != 4*sets {
		return "", fmt.Errorf("the backend has %d SAs for %d sets", st.SAs, sets)
	}
	where := "ESP engine"
	if s.backend == "xfrm" {
		where = "kernel"
		n, err := s.kernelStates(ctx)
		if err != nil {
			return "", err
		}
		if n != 4*sets {
			return "", fmt.Errorf("the kernel has %d SAs for %d sets", n, sets)
		}
	}
	return fmt.Sprintf("%s: %d SAs = 4 × %d sets of %d phones", where, st.SAs, sets, len(list)), s.nothingInClear()
}

// kernelStates counts the SAs that the kernel has for gmgate.
func (s *life) kernelStates(ctx context.Context) (int, error) {
	out, err := exec.CommandContext(ctx, "ip", "-n", s.lab.GM.Name(), "xfrm", "state", "count").CombinedOutput() //nolint:gosec // constant
	if err != nil {
		return 0, fmt.Errorf("ip xfrm state count: %w: %s", err, out)
	}
	var n int
	if _, err := fmt.Sscanf(strings.TrimSpace(string(out)), "SAD count %d", &n); err != nil {
		return 0, fmt.Errorf("ip xfrm state count says %q", out)
	}
	return n, nil
}

// nothingInClear asks the tap: the only SIP in clear is one REGISTER of each phone, and its challenge (TS 33.203 §7.2).
func (s *life) nothingInClear() error {
	s.capture.Settle(20*time.Millisecond, time.Second)
	return s.capture.CheckClear(lab.ClearRules{Registrations: 1})
}

// one says that a phone has a single set, and that this one is in use.
func one(now admin.UE) error {
	if len(now.Sets) != 1 || now.Sets[0].Phase != "established" || now.Sets[0].Role != admin.RoleCurrent || now.State != "registered" {
		return fmt.Errorf("%s with %s, want one set that is established and current", now.State, summary(now.Sets))
	}
	return nil
}

// same says that nothing changed that must not: the sets, their SPIs, ports and algorithms, and their sequence numbers only
// grew.
func (s *life) same(now admin.UE) error {
	if len(now.Sets) != len(s.before.Sets) {
		return fmt.Errorf("%s, there were %s", summary(now.Sets), summary(s.before.Sets))
	}
	for i, n := range now.Sets {
		b := s.before.Sets[i]
		switch {
		case n.ID != b.ID || n.SPIs != b.SPIs || n.Ports != b.Ports || n.Algorithms != b.Algorithms:
			return fmt.Errorf("set %s changed from %+v %+v to %+v %+v", n.ID, b.SPIs, b.Ports, n.SPIs, n.Ports)
		case n.Phase != b.Phase:
			return fmt.Errorf("set %s was %s and is %s", n.ID, b.Phase, n.Phase)
		case n.Sequences == nil || b.Sequences == nil:
			return fmt.Errorf("the backend does not hold set %s", n.ID)
		}
		if q, p := *n.Sequences, *b.Sequences; q.UC < p.UC || q.US < p.US {
			return fmt.Errorf("set %s: gmgate would send sequence numbers twice: to uc %d after %d, to us %d after %d", n.ID, q.UC, p.UC, q.US, p.US)
		}
	}
	return nil
}

func summary(sets []admin.Set) string {
	if len(sets) == 0 {
		return "no set"
	}
	words := make([]string, len(sets))
	for i, s := range sets {
		words[i] = s.Phase + " (" + s.Role + ")"
	}
	return strings.Join(words, ", ")
}

func (s *life) register(ctx context.Context) error {
	s.c.section("Registration (TS 33.203 §7.2)")
	ok := s.tell(ctx, "phone 2 registers", "somebody to call", func(ctx context.Context) error {
		return errors.Join(s.demo.register(ctx, s.peer()), s.noteSAs(s.peer()))
	}) && s.tell(ctx, "phone 1 registers", "SM1 and SM6 in clear, SM7 and SM12 inside its new SAs (TS 33.203 §7.2)",
		func(ctx context.Context) error {
			if err := s.demo.register(ctx, s.hero()); err != nil {
				return err
			}
			return s.noteSAs(s.hero())
		}) && s.sets(ctx, "one set, in use at once", one)
	return stopped(ok)
}

// stopped ends the story after a chapter that failed: what follows builds on it.
func stopped(ok bool) error {
	if !ok {
		return errStopped
	}
	return nil
}

// talk makes the phone call and be called: everything that it does from now on goes over its SAs.
func (s *life) talk(ctx context.Context) bool {
	a, b := s.hero(), s.peer()
	dial := func(from, to *phone, o ue.CallOptions) func(context.Context) error {
		return func(ctx context.Context) error {
			res, err := from.Call(ctx, to.sub.IMPU[0], o)
			switch {
			case err != nil:
				return err
			case res.Status != 200:
				return fmt.Errorf("the INVITE was answered %d", res.Status)
			case !o.RemoteBye && res.Bye != 200:
				return fmt.Errorf("the BYE was answered %d", res.Bye)
			}
			return nil
		}
	}
	hold := 20 * time.Millisecond
	return s.tell(ctx, "network → phone 1", "MESSAGE along the Path (TS 24.229 §5.2.6.4)",
		func(ctx context.Context) error {
			status, err := s.core.SendMessage(ctx, a.sub.IMPU[0], "are you there?")
			if err == nil && status != 200 {
				err = fmt.Errorf("it was answered %d", status)
			}
			return err
		}) &&
		s.tell(ctx, "phone 1 → phone 2", "a call; the SA says whose it is (TS 24.229 §5.2.6.3)",
			dial(a, b, ue.CallOptions{PRACK: true, Hold: hold})) &&
		s.tell(ctx, "phone 2 → phone 1", "and back, to port-us of the set in use", dial(b, a, ue.CallOptions{PRACK: true, Hold: hold}))
}

func (s *life) call(ctx context.Context) error {
	s.c.section("Calls")
	return stopped(s.talk(ctx) && s.sets(ctx, "the same set", func(now admin.UE) error { return errors.Join(one(now), s.same(now)) }))
}

func (s *life) reregister(ctx context.Context) error {
	s.c.section("Re-registration (TS 33.203 §7.4)")
	challenging := s.core.Behaviour()
	normal := challenging
	challenging.AlwaysChallenge = true
	s.core.SetBehaviour(challenging)
	defer s.core.SetBehaviour(normal)
	p := s.hero()
	old := p.last
	ok := s.tell(ctx, "phone 1 re-registers", "challenged over the set in use, answers over a new one (TS 33.203 §7.4)",
		func(ctx context.Context) error {
			res, err := p.Reregister(ctx)
			if err != nil {
				return err
			}
			p.last = res
			switch {
			case !res.Challenged:
				return errors.New("there was no challenge")
			case res.Ports.PS != old.Ports.PS || res.Ports.US != old.Ports.US:
				return fmt.Errorf("the server ports changed: %+v after %+v", res.Ports, old.Ports)
			case res.Ports.PC == old.Ports.PC || res.Ports.UC == old.Ports.UC:
				return fmt.Errorf("a client port stayed: %+v after %+v", res.Ports, old.Ports)
			case res.SPIs.PC == old.SPIs.PC || res.SPIs.PS == old.SPIs.PS || res.SPIs.UC == old.SPIs.UC || res.SPIs.US == old.SPIs.US:
				return errors.New("an SPI stayed")
			}
			return s.noteSAs(p)
		}) &&
		s.sets(ctx, "the new set waits", func(now admin.UE) error {
			if len(now.Sets) != 2 || now.Sets[0].Phase != "old" || now.Sets[0].Role != admin.RoleCurrent ||
				now.Sets[1].Phase != "established" || now.Sets[1].Role != admin.RoleWaiting {
				return fmt.Errorf("%s, want the old one current and the new one waiting", summary(now.Sets))
			}
			if b := s.before.Sets[0]; now.Sets[0].ID != b.ID || now.Sets[0].SPIs != b.SPIs || now.Sets[0].Ports != b.Ports {
				return errors.New("the old set changed")
			}
			if now.Sets[1].Over != now.Sets[0].ID {
				return fmt.Errorf("the new set was made over %q", now.Sets[1].Over)
			}
			return nil
		}) &&
		s.tell(ctx, "phone 1 uses the new set", "it is taken into use by that; the old one goes 64*T1 later, here "+demoLifeOldSet.String()+" (TS 33.203 §7.4)",
			func(ctx context.Context) error {
				status, err := p.Message(ctx, s.peer().sub.IMPU[0], "new keys")
				if err == nil && status != 200 {
					err = fmt.Errorf("its MESSAGE was answered %d", status)
				}
				return err
			}) &&
		s.talk(ctx) &&
		s.tell(ctx, "the old set goes", "what was on its way over it has arrived", func(ctx context.Context) error { return s.waitSets(ctx, len(s.phones)) }) &&
		s.sets(ctx, "one set again", func(now admin.UE) error {
			if now.Sets[0].ID == s.before.Sets[0].ID {
				return errors.New("it is the old one")
			}
			return one(now)
		})
	return stopped(ok)
}

// again starts the daemon once more and checks what it took over.
func (s *life) again(ctx context.Context) bool {
	how := "reinstalled"
	if s.backend == "xfrm" {
		how = "adopted"
	}
	why := map[string]string{
		"adopted":     "the sets of the store are in the kernel: adopted, no sequence number touched (RFC 4303 §3.3.3)",
		"reinstalled": "the sets of the store are installed again, ahead of all sequence numbers used (RFC 4303 §3.3.3)",
	}[how]
	return s.tell(ctx, "gmgate starts", why, func(ctx context.Context) error {
		if _, err := s.startDaemon(ctx); err != nil {
			return err
		}
		m, err := s.daemon.Metrics(ctx)
		if err != nil {
			return err
		}
		if got, all := lab.Sum(m, "gmgate_sa_sets_restored", fmt.Sprintf("how=%q", how)), lab.Sum(m, "gmgate_sa_sets_restored"); int(got) != len(s.phones) || got != all {
			return fmt.Errorf("%g of %g sets were %s, want %d", got, all, how, len(s.phones))
		}
		return nil
	}) && s.sets(ctx, "the same set", func(now admin.UE) error { return errors.Join(one(now), s.same(now)) })
}

func (s *life) restart(ctx context.Context) error {
	s.c.section("Restart of gmgate")
	ok := s.sound(ctx) && s.tell(ctx, "gmgate is stopped", s.absent("in good order: everything is in the store"), func(ctx context.Context) error {
		if err := s.daemon.Stop(); err != nil {
			return err
		}
		return s.left(ctx)
	}) && s.again(ctx) && s.talk(ctx) &&
		s.sets(ctx, "still the same set", func(now admin.UE) error { return errors.Join(one(now), s.same(now)) })
	return stopped(ok)
}

func (s *life) crash(ctx context.Context) error {
	s.c.section("Crash of gmgate")
	ok := s.sound(ctx) && s.tell(ctx, "gmgate is killed", s.absent("kill -9, a moment after the calls"), func(ctx context.Context) error {
		if err := s.daemon.Kill(); err != nil {
			return err
		}
		return s.left(ctx)
	}) && s.again(ctx)
	return stopped(ok)
}

// absent says what is there while gmgate is not.
func (s *life) absent(how string) string {
	if s.backend == "xfrm" {
		return fmt.Sprintf("%s; the kernel keeps %d SAs, and policies that let nothing pass in clear", how, 4*len(s.phones))
	}
	return how
}

// left checks what the kernel has without gmgate.
func (s *life) left(ctx context.Context) error {
	if s.backend != "xfrm" {
		return nil
	}
	n, err := s.kernelStates(ctx)
	if err == nil && n != 4*len(s.phones) {
		err = fmt.Errorf("the kernel has %d SAs, want %d", n, 4*len(s.phones))
	}
	return err
}

// sound checks what a daemon counted before it goes.
func (s *life) sound(ctx context.Context) bool {
	return s.tell(ctx, "gmgate's own metrics", "nothing dropped, all keepers of SAs agree", func(ctx context.Context) error {
		m, err := s.daemon.Metrics(ctx)
		if err != nil {
			return err
		}
		var errs []error
		for name, want := range map[string]int{
			"sa_reconcile_diff": 0, "sa_install_errors_total": 0, "handler_panics_total": 0, "store_errors_total": 0,
		} {
			if got := lab.Sum(m, "gmgate_"+name); int(got) != want {
				errs = append(errs, fmt.Errorf("%s is %g, want %d", name, got, want))
			}
		}
		// The core may still notify a subscription of a run before: 481 tells it that this one is gone (RFC 6665 §4.2.2).
		rejected := lab.Sum(m, "gmgate_sip_rejected_total") - lab.Sum(m, "gmgate_sip_rejected_total", `reason="stale_token"`)
		if int(rejected) != s.refused {
			errs = append(errs, fmt.Errorf("%g messages were refused, want %d", rejected, s.refused))
		}
		for k, v := range m {
			// Keep-alives are dropped, and answers to what was sent twice because the machine is slow.
			normal := strings.Contains(k, "keepalive") || strings.Contains(k, "unknown_response")
			if v > 0 && strings.HasPrefix(k, "gmgate_") && strings.Contains(k, "_drops_total") && !normal {
				errs = append(errs, fmt.Errorf("%s is %g", strings.TrimPrefix(k, "gmgate_"), v))
			}
		}
		return errors.Join(errs...)
	})
}

func (s *life) callAgain(ctx context.Context) error {
	s.c.section("Calls after the crash")
	return stopped(s.talk(ctx) && s.sets(ctx, "still the same set", func(now admin.UE) error { return errors.Join(one(now), s.same(now)) }))
}

func (s *life) deregister(ctx context.Context) error {
	s.c.section("De-registration by the network (TS 24.229 §5.2.5.2)")
	p := s.hero()
	ok := s.tell(ctx, "gmgate watches", "subscribed to the state of both, anew after the crash (TS 24.229 §5.2.3)",
		func(ctx context.Context) error {
			return s.metric(ctx, "reg_subscriptions", len(s.phones), `state="active"`)
		}) &&
		s.tell(ctx, "the core ends it", "NOTIFY to gmgate: contact terminated (RFC 3680 §5.2)",
			func(ctx context.Context) error {
				if err := s.core.Deregister(p.sub.IMPU[0], "rejected"); err != nil {
					return err
				}
				return s.until(ctx, func(u admin.UE) bool { return u.State == "deregistered" })
			}) &&
		s.sets(ctx, "its set is ending", func(now admin.UE) error {
			if len(now.Sets) != 1 || now.Sets[0].Role != admin.RoleEnding {
				return fmt.Errorf("%s, want one that is ending", summary(now.Sets))
			}
			return nil
		}) &&
		s.tell(ctx, "phone 1 is refused", "403, inside its SAs (TS 24.229 §5.2.5.2)", func(ctx context.Context) error {
			status, err := p.Message(ctx, s.peer().sub.IMPU[0], "I am still here")
			s.refused++
			if status != 403 {
				return errors.Join(err, fmt.Errorf("its MESSAGE was answered %d, want 403", status))
			}
			return nil
		}) &&
		s.tell(ctx, "its SAs go", "after the grace, here "+demoLifeOldSet.String(), func(ctx context.Context) error { return s.waitSets(ctx, len(s.phones)-1) }) &&
		s.step(ctx, "gmgate has forgotten it", func(ctx context.Context) (string, error) {
			list, _, err := s.admin.UEs(ctx, admin.Query{IMPI: p.sub.IMPI}, 1)
			if err == nil && len(list) > 0 {
				err = fmt.Errorf("there is a context in state %s", list[0].State)
			}
			if err != nil {
				return "", err
			}
			return s.counts(ctx)
		}) &&
		s.tell(ctx, "phone 2 leaves", "Expires: 0, 200 inside the SA (TS 24.229 §5.2.5.1)", func(ctx context.Context) error {
			if err := s.peer().Deregister(ctx); err != nil {
				return err
			}
			return s.waitSets(ctx, 0)
		})
	return stopped(ok)
}

// metric waits for a metric of gmgate to have a value.
func (s *life) metric(ctx context.Context, name string, want int, labels ...string) error {
	ctx, cancel := context.WithTimeout(ctx, demoDrain)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		m, err := s.daemon.Metrics(ctx)
		if err != nil {
			return err
		}
		got := lab.Sum(m, "gmgate_"+name, labels...)
		if int(got) == want {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s%v is %g after %s, want %d", name, labels, got, demoDrain, want)
		case <-tick.C:
		}
	}
}

// until waits for gmgate to see the phone in a state.
func (s *life) until(ctx context.Context, ok func(admin.UE) bool) error {
	ctx, cancel := context.WithTimeout(ctx, demoDrain)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	last := "unknown"
	for {
		u, err := s.find(ctx, s.hero())
		if err == nil {
			last = u.State
			if ok(u) {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("gmgate has it as %s after %s", last, demoDrain)
		case <-tick.C:
		}
	}
}

func (s *life) verify(ctx context.Context) error {
	s.c.section("Verification")
	s.sound(ctx)
	s.step(ctx, "the tap on the Gm link", func(context.Context) (string, error) {
		err := s.nothingInClear()
		n := s.capture.Stats()
		if n.ESPIn == 0 || n.ESPOut == 0 {
			err = errors.Join(err, errors.New("no ESP at all"))
		}
		return fmt.Sprintf("in clear: the first REGISTER of each phone and its 401; all else was ESP: %d packets in, %d out", n.ESPIn, n.ESPOut), err
	})
	s.step(ctx, "core and phones", func(context.Context) (string, error) {
		problems := slices.Clone(s.core.Problems())
		for _, p := range s.phones {
			for _, text := range p.Problems() {
				problems = append(problems, p.name+": "+text)
			}
		}
		if len(problems) > 0 {
			return "", fmt.Errorf("%d problems: %s", len(problems), strings.Join(problems[:min(5, len(problems))], "; "))
		}
		return "found nothing wrong with what they received", nil
	})
	s.step(ctx, "gmgate stops", func(ctx context.Context) (string, error) {
		if err := s.daemon.Stop(); err != nil {
			return "", err
		}
		if s.backend == "xfrm" {
			if n, err := s.kernelStates(ctx); err != nil || n != 0 {
				return "", errors.Join(err, fmt.Errorf("the kernel still has %d SAs", n))
			}
			return "in good order; no SA is left in the kernel", nil
		}
		return "in good order", nil
	})
	return nil
}
