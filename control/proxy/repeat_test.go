package proxy

import (
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
)

// repeated advances the time and returns what was sent meanwhile, all of which must be the same as first.
func (r *rig) repeated(first sent, d time.Duration) int {
	r.t.Helper()
	r.l.out = nil
	r.advance(d)
	for _, s := range r.l.out {
		if s != first {
			r.t.Fatalf("sent from %v to %v:\n%s\nwant from %v to %v:\n%s", s.local, s.remote, s.msg, first.local, first.remote, first.msg)
		}
	}
	return len(r.l.out)
}

func (r *rig) wantRepeats(what string, first sent, d time.Duration, want int) {
	r.t.Helper()
	if n := r.repeated(first, d); n != want {
		r.t.Errorf("%s: repeated %d times in %s, want %d", what, n, d, want)
	}
}

// wantDone checks that nothing is left to be repeated.
func (r *rig) wantDone(p *phone) {
	r.t.Helper()
	u := r.context(p)
	if n := len(r.w.repeats.by); n != 0 || r.w.repeats.octets != 0 || u.Repeats != 0 {
		r.t.Errorf("left to be repeated: %d messages, %d octets, %d of the phone", n, r.w.repeats.octets, u.Repeats)
	}
}

// coreByTCP is a flow on a connection of the core.
func (r *rig) coreByTCP(c ims.ConnID) ims.Flow {
	r.l.conns[c] = true
	f := coreFlow()
	f.Transport, f.Conn = ims.TCP, c
	return f
}

func (p *phone) calls() string { return strings.ReplaceAll(p.message(), "MESSAGE", "INVITE") }

// A request that came over TCP and left over UDP is sent again until it is answered.
func TestRepeatRequestToCore(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	f := r.connect(p, 3)
	for name, c := range map[string]struct {
		msg     string
		repeats int // unanswered
		slow    int // in 120 s after a provisional answer
	}{
		"non-INVITE": {p.message(), 10, 7}, // 2, 6, 14 s and then every 16 s
		"INVITE":     {p.calls(), 6, 0},    // 2, 6, 14, 30, 62, 126 s
		"CANCEL":     {strings.ReplaceAll(p.message(), "MESSAGE", "CANCEL"), 10, 7},
	} {
		t.Run(name, func(t *testing.T) {
			r.t = t
			msg := overTCP(c.msg)
			req := r.one(f, msg)
			r.wantRepeats("silent core", req, 129*time.Second, c.repeats)
			r.wantDone(p)
			r.wantRepeats("given up", req, 3*time.Minute, 0)

			req = r.one(f, msg)
			r.wantRepeats("silent core", req, 3*time.Second, 1)
			if out := r.one(coreFlow(), answerTo(t, req.msg, "100 Trying")); out.conn != 3 {
				t.Errorf("100 over connection %d", out.conn)
			}
			r.wantRepeats("provisional answer", req, 120*time.Second, c.slow)
			r.one(coreFlow(), answerTo(t, req.msg, "200 OK"))
			if name != "INVITE" { // the core has answered the repetitions as well, and the phone expects one final answer
				for _, status := range []string{"100 Trying", "200 OK", "503 Service Unavailable"} {
					if out := r.deliver(coreFlow(), answerTo(t, req.msg, status)); len(out) != 0 {
						t.Errorf("%s after the final answer: %v", status, out)
					}
				}
			}
			r.wantRepeats("final answer", req, time.Minute, 0)
			r.wantDone(p)
			r.one(coreFlow(), answerTo(t, req.msg, "200 OK")) // which then is no business of ours
		})
	}
}

// The answers of CANCEL and INVITE, which have the same branch, are told apart.
func TestRepeatCancel(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	f := r.connect(p, 3)
	invite := r.one(f, overTCP(p.calls()))
	r.one(coreFlow(), answerTo(t, invite.msg, "180 Ringing"))
	cancel := r.one(f, overTCP(strings.ReplaceAll(p.message(), "MESSAGE", "CANCEL")))
	r.wantRepeats("CANCEL", cancel, 3*time.Second, 1)
	r.one(coreFlow(), answerTo(t, invite.msg, "487 Request Terminated"))
	r.wantRepeats("CANCEL after the end of the INVITE", cancel, 4*time.Second, 1)
	r.one(coreFlow(), answerTo(t, cancel.msg, "200 OK"))
	r.wantRepeats("answered CANCEL", cancel, time.Minute, 0)
	r.wantDone(p)
}

// What did not come over TCP is repeated by its sender, what leaves over TCP need not be, and nobody answers an ACK.
func TestRepeatNothing(t *testing.T) {
	t.Run("over UDP", func(t *testing.T) {
		r := newRig(t)
		p := r.registered()
		for _, msg := range []string{p.message(), p.calls()} {
			r.wantRepeats("request of the phone", r.one(p.protectedFlow, msg), time.Minute, 0)
		}
		r.wantRepeats("request of the core", r.one(coreFlow(), r.request(p, "OPTIONS", "o1")), time.Minute, 0)
		invite := r.one(coreFlow(), r.request(p, "INVITE", "i1"))
		r.wantRepeats("answer", r.one(p.protectedFlow, answerTo(t, invite.msg, "486 Busy Here")), time.Minute, 0)
		r.wantDone(p)
	})
	t.Run("ACK", func(t *testing.T) {
		r := newRig(t)
		p := r.registered()
		ack := strings.ReplaceAll(p.message(), "MESSAGE", "ACK")
		r.wantRepeats("of the phone", r.one(r.connect(p, 3), overTCP(ack)), time.Minute, 0)
		r.wantRepeats("of the core", r.one(r.coreByTCP(4), r.request(p, "ACK", "a1")), time.Minute, 0)
		r.wantDone(p)
	})
	t.Run("2xx to INVITE", func(t *testing.T) {
		r := newRig(t)
		p := r.registered()
		f := r.connect(p, 3)
		invite := r.one(coreFlow(), r.request(p, "INVITE", "i2"))
		r.wantRepeats("of the phone", r.one(f, answerTo(t, invite.msg, "200 OK")), time.Minute, 0)
		invite = r.one(p.protectedFlow, p.calls())
		r.wantRepeats("of the core", r.one(r.coreByTCP(4), answerTo(t, invite.msg, "200 OK")), time.Minute, 0)
		r.wantDone(p)
	})
	t.Run("core over TCP", func(t *testing.T) {
		r := newRig(t)
		p := r.registered()
		hop := ims.Hop{Addr: coreAddr, Transport: ims.TCP}
		r.context(p).NextHop, r.w.mwConn[hop.Addr], r.l.conns[8] = hop, 8, true
		req := r.one(r.connect(p, 3), overTCP(p.message()))
		if req.conn != 8 {
			t.Fatalf("went over connection %d", req.conn)
		}
		r.wantRepeats("request", req, time.Minute, 0)
		r.wantDone(p)
	})
}

// A request of the core that came over TCP goes to a phone over UDP, inside its SA, until the phone answers.
func TestRepeatRequestToUE(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	f := r.coreByTCP(5)
	msg := overTCP(r.request(p, "MESSAGE", "mt1"))
	req := r.one(f, msg)
	p.downlink(t, req)
	r.wantRepeats("silent phone", req, 129*time.Second, 10) // 2, 6, 14 s and then every 16 s
	r.wantDone(p)

	req = r.one(f, msg)
	r.wantRepeats("silent phone", req, 3*time.Second, 1)
	if ans := r.one(p.protectedFlow, answerTo(t, req.msg, "200 OK")); ans.conn != 5 {
		t.Errorf("answer over connection %d", ans.conn)
	}
	if out := r.deliver(p.protectedFlow, answerTo(t, req.msg, "200 OK")); len(out) != 0 {
		t.Errorf("second answer: %v", out)
	}
	r.wantRepeats("answered", req, 2*time.Minute, 0)
	r.wantDone(p)

	// A phone that goes gets nothing more.
	r.one(f, overTCP(r.request(p, "MESSAGE", "mt2")))
	r.leave(p)
	r.l.out = nil
	r.advance(10 * time.Minute)
	for _, s := range r.l.out {
		p.downlink(t, s)
	}
	if n := len(r.w.repeats.by); n != 0 {
		t.Errorf("%d messages are kept of a phone that has gone", n)
	}
}

// A refusal of an INVITE that came over TCP is sent again over UDP until its ACK comes, both ways.
func TestRepeatAnswer(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	phone := r.connect(p, 3)
	invite := r.one(coreFlow(), r.request(p, "INVITE", "i1"))
	busy := r.one(phone, answerTo(t, invite.msg, "486 Busy Here"))
	r.wantRepeats("without ACK", busy, 129*time.Second, 10)
	r.wantDone(p)
	busy = r.one(phone, answerTo(t, invite.msg, "486 Busy Here"))
	r.wantRepeats("without ACK", busy, 7*time.Second, 2)
	r.deliver(coreFlow(), r.request(p, "ACK", "i2"))
	r.wantRepeats("ACK of another", busy, 8*time.Second, 1)
	r.deliver(coreFlow(), r.request(p, "ACK", "i1"))
	r.wantRepeats("acknowledged", busy, time.Minute, 0)
	r.wantDone(p)

	core := r.coreByTCP(5)
	invite = r.one(p.protectedFlow, p.calls())
	busy = r.one(core, answerTo(t, invite.msg, "486 Busy Here"))
	p.downlink(t, busy)
	r.wantRepeats("without ACK", busy, 7*time.Second, 2)
	r.deliver(p.protectedFlow, strings.ReplaceAll(p.message(), "MESSAGE", "ACK"))
	r.wantRepeats("acknowledged", busy, 3*time.Minute, 0)
	r.wantDone(p)
}

// One phone cannot have more than its share repeated; what is beyond goes once and is counted.
func TestRepeatLimits(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	f := r.connect(p, 3)
	const more = 7
	var first sent
	for i := range maxRepeatsUE + more {
		msg := strings.Replace(overTCP(p.message()), "z9hG4bKm1", "z9hG4bKm1"+strings.Repeat("x", i), 1)
		out := r.one(f, msg)
		if i == 0 {
			first = out
		}
	}
	if n, u := len(r.w.repeats.by), r.context(p); n != maxRepeatsUE || int(u.Repeats) != n {
		t.Errorf("%d messages kept, %d of the phone, want %d", n, u.Repeats, maxRepeatsUE)
	}
	if n := r.metric("sip_repeats_refused_total", ""); n != more {
		t.Errorf("%v refusals counted, want %d", n, more)
	}
	r.l.out = nil
	r.advance(3 * time.Second)
	if n := len(r.l.out); n != maxRepeatsUE {
		t.Errorf("%d messages repeated, want %d", n, maxRepeatsUE)
	}
	if n := r.metric("sip_repeats_total", "side=mw"); n != maxRepeatsUE {
		t.Errorf("%v repeats counted, want %d", n, maxRepeatsUE)
	}
	r.one(coreFlow(), answerTo(t, first.msg, "200 OK")) // makes room for one
	r.one(f, overTCP(p.message()))
	if n := r.metric("sip_repeats_refused_total", ""); n != more {
		t.Errorf("%v refusals counted, want %d", n, more)
	}
	r.advance(3 * time.Minute)
	r.wantDone(p)
	if n := len(r.w.repeats.idle); n > maxIdleRepeats {
		t.Errorf("%d spent ones kept", n)
	}
}

// Keeping a message, and forgetting it when its answer comes, allocates nothing.
func TestRepeatDoesNotAllocate(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	f := r.connect(p, 3)
	req := []byte(overTCP(p.message()))
	ans := []byte(answerTo(t, r.one(f, string(req)).msg, "200 OK"))
	quiet := &quietLoop{loop: r.l}
	r.w.eg = quiet
	both := func() {
		r.w.Message(f, req)
		if len(r.w.repeats.by) != 1 {
			t.Fatal("not kept")
		}
		r.w.Message(coreFlow(), ans)
	}
	both()
	if n := testing.AllocsPerRun(200, both); n != 0 {
		t.Errorf("%v allocations", n)
	}
	r.wantDone(p)
}
