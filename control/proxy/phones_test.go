package proxy

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// refused delivers a message that must not reach the core and returns the status of its answer, zero for none.
func (r *rig) refused(f ims.Flow, msg string) int {
	r.t.Helper()
	code := 0
	for _, out := range r.deliver(f, msg) {
		if out.local == mwAddr || out.remote == coreAddr {
			r.t.Errorf("reaches the core:\n%s", out.msg)
			continue
		}
		code = status(r.t, out.msg)
	}
	return code
}

// want is refused with the answer that is expected.
func (r *rig) want(code int, f ims.Flow, msg string) {
	r.t.Helper()
	if got := r.refused(f, msg); got != code {
		r.t.Errorf("answered %d, want %d:\n%s", got, code, strings.SplitN(msg, "\r\n", 2)[0])
	}
}

// TestHostilePhones has a phone, registered or not, do what it can against others. It can harm only itself: each case ends
// with the others calling and being called, renewing their registration, and with somebody new who gets in.
func TestHostilePhones(t *testing.T) {
	offer := func(spiC, spiS, portC, portS uint32) string {
		return fmt.Sprintf("Security-Client: ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc;spi-c=%d;spi-s=%d;port-c=%d;port-s=%d",
			spiC, spiS, portC, portS)
	}
	spis := func(r *rig, p *phone) ims.SPIs { return r.w.table.UEOf(p.impi, p.addr).Current.SPIs }
	tests := []struct {
		name   string
		attack func(r *rig, thief, victim *phone)
	}{
		{"Security-Verify with the SPIs of another phone", func(r *rig, thief, victim *phone) {
			thief.agree()
			r.challenge(thief, thief.protectedFlow, 6300)
			r.want(494, thief.protectedFlow, thief.register("forged", 6300, "Security-Verify: "+victim.server))
			fresh := subscriber(700)
			r.challenge(fresh, fresh.clearFlow(), 5060)
			fresh.authorization = strings.Replace(proof, impi, fresh.impi, 1)
			r.want(494, fresh.protectedFlow, fresh.register("forged", 6300, "Security-Verify: "+victim.server))
		}},
		{"the identity of another phone over its own SA", func(r *rig, thief, victim *phone) {
			msg := strings.ReplaceAll(thief.message(), "sip:+15550100001@"+domain, victim.impu())
			out := r.one(thief.protectedFlow, msg)
			if got := get(r.t, out.msg, sipmsg.PAssertedIdentity); strings.Contains(got, victim.impu()) {
				r.t.Errorf("vouches for the victim: %s", got)
			}
			auth := "Authorization: " + strings.Replace(proof, impi, victim.impi, 1)
			r.want(403, thief.protectedFlow, thief.register("as", 6300, "Security-Client:", auth))
			r.want(403, thief.protectedFlow, thief.register("de", 6300, "Security-Client:", auth, "Contact: *", "Expires: 0"))
			// The dialogs of the victim are not the thief's either.
			own := strings.Replace(r.path(victim), "@10.0.1.5:5060", fmt.Sprintf("@10.0.0.5:%d", thief.ps), 1)
			bye := strings.NewReplacer("MESSAGE", "BYE", ">\r\nCall-ID", ">;tag=1\r\nCall-ID").Replace(thief.message())
			at := strings.Index(bye, "Route: ")
			end := at + strings.Index(bye[at:], "\r\n")
			r.want(403, thief.protectedFlow, bye[:at]+"Route: "+own+bye[end:])
			// Nor are its answers.
			mt := r.one(coreFlow(), mtInvite(r.path(victim), ""))
			r.want(0, thief.protectedFlow, answerTo(r.t, mt.msg, "603 Decline"))
		}},
		{"SPIs and ports of another phone", func(r *rig, thief, victim *phone) {
			// At its own address it may use any numbers: SAs are told apart by the address as well.
			s := spis(r, victim)
			twin := subscriber(701)
			twin.portC, twin.portS = victim.portC, victim.portS
			twin.spiC, twin.spiS = uint32(s.UC), uint32(s.US)
			twin.securityClient = strings.TrimPrefix(offer(twin.spiC, twin.spiS, uint32(twin.portC), uint32(twin.portS)), "Security-Client: ")
			r.challenge(twin, twin.clearFlow(), 5060)
			r.prove(twin)
			// Our own SPIs as well, which must not come back as ours.
			twin = subscriber(702)
			twin.spiC, twin.spiS = uint32(s.PC), uint32(s.PS)
			twin.securityClient = strings.TrimPrefix(offer(twin.spiC, twin.spiS, uint32(twin.portC), uint32(twin.portS)), "Security-Client: ")
			r.challenge(twin, twin.clearFlow(), 5060)
			r.prove(twin)
			if o := spis(r, twin); o.PC == o.UC || o.PC == o.US || o.PS == o.UC || o.PS == o.US {
				r.t.Errorf("SPIs of one set are not distinct: %+v", o)
			}
			// At the address of the victim, which is easy to forge in clear, nothing that it uses is free.
			forger := subscriber(703)
			forger.addr = victim.addr
			for n, row := range []string{
				offer(900, 901, uint32(victim.portC), 9001),
				offer(900, 901, 9000, uint32(victim.portS)),
				offer(900, 901, uint32(victim.portS), uint32(victim.portC)),
				offer(uint32(s.UC), 901, 9000, 9001),
				offer(900, uint32(s.US), 9000, 9001),
				offer(uint32(s.US), uint32(s.UC), 9000, 9001),
			} {
				r.want(403, forger.clearFlow(), forger.register(fmt.Sprintf("col%d", n), 5060, row))
			}
			// Nor does a forged REGISTER of the victim itself, which the core challenges, disturb the set in use.
			forger.impi = victim.impi
			r.deliver(coreFlow(), answerTo(r.t, r.one(forger.clearFlow(),
				forger.register("own", 5060, offer(902, 903, 9002, 9003))).msg, "401 Unauthorized", challenge))
			// Offers that collide with themselves.
			for n, row := range []string{offer(900, 900, 9000, 9001), offer(0, 901, 9000, 9001), offer(900, 901, 0, 9001)} {
				r.want(400, thief.clearFlow(), thief.register(fmt.Sprintf("self%d", n), 5060, row))
			}
		}},
		{"messages of another phone played again", func(r *rig, thief, victim *phone) {
			msg := victim.message()
			f := victim.protectedFlow
			f.Remote = netip.AddrPortFrom(thief.addr, victim.portC+1000) // no SA of the thief either
			r.want(0, f, msg)
			r.want(403, victim.clearFlow(), msg)
			out := r.one(thief.protectedFlow, msg)
			if got := get(r.t, out.msg, sipmsg.PAssertedIdentity); strings.Contains(got, victim.impu()) {
				r.t.Errorf("vouches for the victim: %s", got)
			}
			// SM7 and a de-registration of the victim, as they were when it sent them.
			victim.authorization = strings.Replace(proof, impi, victim.impi, 1)
			sm7 := victim.register("again", 6300, "Security-Verify: "+victim.server)
			de := victim.register("de", 6300, "Security-Client:", "Expires: 0")
			r.want(403, thief.protectedFlow, strings.ReplaceAll(sm7, victim.addr.String(), thief.addr.String()))
			r.want(400, thief.protectedFlow, sm7)
			r.want(403, thief.protectedFlow, strings.ReplaceAll(de, victim.addr.String(), thief.addr.String()))
			r.want(421, victim.clearFlow(), de)
		}},
		{"truncated messages", func(r *rig, thief, _ *phone) {
			whole := thief.register("cut", 6300)
			for _, msg := range []string{thief.message(), whole, mtInvite("<sip:x@y>", "")} {
				head := strings.Index(msg, "\r\n\r\n")
				for n := range head + 3 {
					r.refused(thief.protectedFlow, msg[:n])
					r.refused(thief.clearFlow(), msg[:n])
				}
			}
		}},
		{"REGISTER with 500 Security-Client entries", func(r *rig, thief, _ *phone) {
			one := strings.TrimPrefix(offer(900, 901, 9000, 9001), "Security-Client: ")
			inOne := "Security-Client: " + strings.Repeat(one+", ", 499) + one
			msg := thief.register("many", 5060, inOne)
			rows := strings.Replace(msg, inOne, strings.TrimSuffix(strings.Repeat("Security-Client: "+one+"\r\n", 500), "\r\n"), 1)
			for n, m := range []string{msg, rows} {
				r.want(400, thief.clearFlow(), m)
				r.want(400, thief.protectedFlow, strings.Replace(m, "bKmany", fmt.Sprintf("bKmany%d", n), 1))
			}
			r.want(400, thief.clearFlow(), thief.register("params", 5060, "Security-Client: "+one+strings.Repeat(";x=y", 5000)))
		}},
		{"REGISTER with 1,000 contacts", func(r *rig, thief, _ *phone) {
			var b strings.Builder
			for n := range 1000 {
				fmt.Fprintf(&b, ", <sip:c%d@%s:6300>;expires=%d", n, thief.addr, n%2*600)
			}
			for _, f := range []ims.Flow{thief.protectedFlow, thief.clearFlow()} {
				for _, out := range r.deliver(f, thief.register("contacts", 6300, "Contact: "+b.String()[2:])) {
					if out.remote == coreAddr {
						r.deliver(coreFlow(), answerTo(r.t, out.msg, "403 Forbidden"))
					}
				}
			}
		}},
		{"flood of REGISTERs over its own SA", func(r *rig, thief, _ *phone) {
			over := map[int]int{}
			for n := range 5000 {
				out := r.one(thief.protectedFlow, thief.register("c"+strconv.Itoa(n), 6300, "Security-Client:",
					fmt.Sprintf("Contact: <sip:c%d@%s:6300>", n, thief.addr)))
				switch {
				case out.remote != coreAddr:
					over[status(r.t, out.msg)]++
				case n%10 == 0: // the others wait
					r.deliver(coreFlow(), answerTo(r.t, out.msg, "403 Forbidden"))
				}
				if got := r.w.protected.n; got > maxProtected+4 {
					r.t.Fatalf("%d transactions of one phone", got)
				}
			}
			if len(over) != 1 || over[503] == 0 {
				r.t.Errorf("answers beyond the limit: %v", over)
			}
		}},
		{"flood of challenges over its own SA", func(r *rig, thief, _ *phone) {
			for n := range 300 {
				thief.agree()
				thief.portC = uint16(7000 + n)
				row := offer(uint32(5000+2*n), uint32(5001+2*n), uint32(thief.portC), 6300)
				for _, out := range r.deliver(thief.protectedFlow, thief.register("ch"+strconv.Itoa(n), 6300, row)) {
					if out.remote == coreAddr {
						r.deliver(coreFlow(), answerTo(r.t, out.msg, "401 Unauthorized", challenge))
					}
				}
			}
			if got := len(r.w.table.UEOf(thief.impi, thief.addr).Sets); got > 3 {
				r.t.Errorf("%d SA sets of one phone", got)
			}
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, func(c *Config) { c.PendingMax = 1000 })
			thief, victim, bystander := r.enrol(0), r.enrol(1), r.enrol(2)
			tt.attack(r, thief, victim)
			for _, p := range []*phone{victim, bystander} {
				r.calls(p)
				p.agree()
				p.authorization = ""
				r.challenge(p, p.protectedFlow, 6300)
				r.prove(p)
				r.calls(p)
			}
			r.calls(r.enrol(3))

			// Whatever it was, it ends.
			r.advance(floodOver)
			h := r.holdings()
			if h.Txs != 0 || h.Newest != 0 || h.Waiting != 0 || h.Answered != 0 || h.Protected != 0 || h.Sources != 0 || h.Unconfirmed != 0 {
				t.Errorf("left: %+v", h)
			}
			for _, p := range []*phone{victim, bystander} {
				r.calls(p)
			}
		})
	}
}

// TestNewcomerDuringFlood has a phone register while a flood keeps every place for pending registrations taken: as the
// oldest gives way, it has time to answer its challenge.
func TestNewcomerDuringFlood(t *testing.T) {
	r := newRig(t, func(c *Config) { c.PendingMax, c.PendingSource = 500, 8 })
	f := flood{registers: 3000, sources: 400, gap: time.Millisecond}
	f.run(r)
	p := subscriber(1)
	r.challenge(p, p.clearFlow(), 5060)
	f.first, f.registers = 3000, 300
	f.run(r)
	r.prove(p)
	r.calls(p)
}
