package proxy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/policy"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/control/sa/satest"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// Each phone is treated as the first rule says that fits it.
func TestRulesChoose(t *testing.T) {
	r := newRig(t, func(c *Config) {
		base := policy.Settings{IPsec: policy.Require, Suites: c.Suites}
		old, lab, src := base, base, base
		old.Suites = []ims.Suite{{Alg: ims.AlgHMACSHA1, Enc: ims.EncNull}}
		old.ServerPorts, old.ClientPorts, old.AwaitAuth = []uint16{6101}, []uint16{6113, 6112, 6111}, 30*time.Second
		lab.IPsec = policy.Allow
		src.IPsec, src.Suites = policy.Forbid, nil
		c.Policy = policy.Compile(base,
			policy.Rule{Match: policy.Match{UserAgent: "old*"}, Settings: old},
			policy.Rule{Match: policy.Match{Realm: "lab.example"}, Settings: lab},
			policy.Rule{Match: policy.Match{Source: []netip.Prefix{netip.MustParsePrefix("10.45.9.0/24")}}, Settings: src},
		)
	})
	p := newPhone()
	req := r.one(clearFlow(), p.register("r1", 5060, "User-Agent: OLD-Phone/1"))
	r.readServer(p, r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge)).msg)
	if !strings.Contains(p.server, "ealg=null") || p.ps != 6101 || p.pc != 6113 {
		t.Errorf("Security-Server: %s", p.server)
	}
	r.advance(31 * time.Second)
	if r.backend.Count() != 0 {
		t.Error("temporary_timeout of the rule does not count")
	}
	// By realm, of Authorization or of To, and by source.
	auth := `Authorization: Digest username="u",realm="lab.example",uri="sip:x",nonce="",response=""`
	to := []string{"Authorization:", "To: <sip:001@LAB.example>"}
	here := clearFlow()
	here.Remote = netip.MustParseAddrPort("10.45.9.1:5060")
	for name, c := range map[string]struct {
		flow  ims.Flow
		extra []string
		pass  bool
	}{
		"realm":     {clearFlow(), []string{auth}, true},
		"To domain": {clearFlow(), to, true},
		"source":    {here, nil, true},
		"none":      {clearFlow(), nil, false},
	} {
		out := r.one(c.flow, p.register("x"+strings.ReplaceAll(name, " ", ""), 5060, append(append([]string{"Call-ID: " + name}, c.extra...), plain...)...))
		if pass := out.remote == coreAddr; pass != c.pass || !pass && status(t, out.msg) != 421 {
			t.Errorf("%s: to %v\n%s", name, out.remote, out.msg)
		}
	}
}

// Transports of REGISTER, in clear and protected.
func TestRegisterTransports(t *testing.T) {
	r := newRig(t, with(func(s *policy.Settings) { s.Protected = []ims.Transport{ims.TCP} }))
	p := newPhone()
	r.challenge(p, clearFlow(), 5060)
	p.authorization = proof
	out := r.one(p.protectedFlow, p.register("u", 6300, "Security-Verify: "+p.server))
	p.downlink(t, out)
	if status(t, out.msg) != 403 {
		t.Errorf("protected REGISTER over UDP:\n%s", out.msg)
	}
	r.l.conns[4] = true
	if req := r.one(p.tcpFlow(4), p.register("t", 6300, "Security-Verify: "+p.server)); req.remote != coreAddr {
		t.Errorf("over TCP:\n%s", req.msg)
	}
}

// Transport of requests to the phone, connection of its own, answers by rport.
func TestRequestsByPolicy(t *testing.T) {
	big := "Subject: " + strings.Repeat("x", 1400) + "\r\n"
	t.Run("tcp", func(t *testing.T) {
		r := newRig(t, with(func(s *policy.Settings) { s.Requests = ims.TCP }))
		p := r.registered()
		if out := r.deliver(coreFlow(), mtInvite(r.path(p), "")); len(out) != 0 || len(r.l.dials) != 1 {
			t.Errorf("sent %v, dials %v", out, r.l.dials)
		}
	})
	t.Run("udp", func(t *testing.T) {
		r := newRig(t, with(func(s *policy.Settings) { s.Requests = ims.UDP }))
		p := r.registered()
		p.downlink(t, r.one(coreFlow(), mtInvite(r.path(p), big)))
	})
	t.Run("connection", func(t *testing.T) {
		for _, own := range []bool{false, true} {
			r := newRig(t, with(func(s *policy.Settings) { s.Requests, s.OwnConnection = ims.TCP, own }))
			p := r.registered()
			r.l.conns[7] = true
			r.one(p.tcpFlow(7), strings.Replace(p.message(), "SIP/2.0/UDP", "SIP/2.0/TCP", 1))
			out := r.deliver(coreFlow(), mtInvite(r.path(p), ""))
			if reused := len(out) == 1 && out[0].conn == 7; reused == own || len(r.l.dials) == 1 != own {
				t.Errorf("own connection %v: sent %v, dials %v", own, out, r.l.dials)
			}
		}
	})
	t.Run("rport", func(t *testing.T) {
		for _, by := range []bool{false, true} {
			for _, rport := range []bool{false, true} {
				r := newRig(t, with(func(s *policy.Settings) { s.AnswersToSource = by }))
				p := r.registered()
				msg := p.message()
				via, _, _ := strings.Cut(get(t, msg, sipmsg.Via), ";rport")
				if rport {
					via += ";rport"
				}
				msg = strings.Replace(msg, get(t, msg, sipmsg.Via), via, 1)
				req := r.one(p.protectedFlow, msg)
				ans := r.one(coreFlow(), answerTo(t, req.msg, "200 OK"))
				if !by || !rport {
					p.downlink(t, ans)
					continue
				}
				if ans.local != p.protectedFlow.Local || ans.remote != p.protectedFlow.Remote {
					t.Errorf("answer from %v to %v", ans.local, ans.remote)
				}
				own := r.one(p.protectedFlow, strings.Replace(msg, "Max-Forwards: 70", "Max-Forwards: 0", 1))
				if own.remote != p.protectedFlow.Remote || status(t, own.msg) != 483 {
					t.Errorf("own answer to %v:\n%s", own.remote, own.msg)
				}
			}
		}
	})
}

// limits.sa_sets: 503 with Retry-After and never a challenge without Security-Server; who is registered goes on.
func TestSetsMax(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Fleet, c.SetsMax = new(Fleet), 2 })
	p := r.registered()
	second := newPhone()
	second.impi, second.callID = "001012222222222@"+domain, "s2"
	second.n, second.portS = 40, 6500
	second.agree()
	r.challenge(second, clearFlow(), 5060)
	third := newPhone()
	third.impi, third.callID, third.n = "001013333333333@"+domain, "s3", 50
	third.portS = 6501
	third.agree()
	out := r.one(clearFlow(), third.register("x", 5060))
	if status(t, out.msg) != 503 || get(t, out.msg, sipmsg.RetryAfter) == "" {
		t.Errorf("answer:\n%s", out.msg)
	}
	old := *p
	p.agree()
	re := r.one(old.protectedFlow, p.register("re", 6300, "Security-Verify: "+old.server))
	r.readServer(p, r.one(coreFlow(), answerTo(t, re.msg, "401 Unauthorized", challenge)).msg)
	r.confirm(p)
	r.one(p.protectedFlow, p.message()) // takes the new set into use
	r.advance(5 * time.Minute)
	if n := r.w.cfg.Fleet.sets.Load(); n != 1 {
		t.Errorf("%d sets counted, want the one that is left", n)
	}
	// Full only when the challenge arrives: no challenge goes out then either.
	fourth := newPhone()
	fourth.impi, fourth.callID, fourth.n = "001014444444444@"+domain, "s4", 60
	fourth.portS = 6502
	fourth.agree()
	req := r.one(clearFlow(), fourth.register("y", 5060))
	r.w.cfg.Fleet.sets.Add(1)
	out = r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge))
	if status(t, out.msg) != 503 || get(t, out.msg, sipmsg.RetryAfter) == "" || get(t, out.msg, sipmsg.WWWAuthenticate) != "" {
		t.Errorf("answer:\n%s", out.msg)
	}
}

// The failure answers of the protocol sheet, row by row. E9 is the backend's: what fails there never becomes a message.
func TestFailureAnswers(t *testing.T) {
	status401 := func(r *rig, req sent, rows ...string) sent {
		return r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", rows...))
	}
	first := func(extra ...string) func(*rig) []sent {
		return func(r *rig) []sent { return r.deliver(clearFlow(), newPhone().register("e", 5060, extra...)) }
	}
	sm7 := func(extra ...string) func(*rig) []sent {
		return func(r *rig) []sent {
			p := newPhone()
			r.challenge(p, clearFlow(), 5060)
			p.authorization = proof
			return r.deliver(p.protectedFlow, p.register("e", 6300, extra...))
		}
	}
	status488 := func(c *Config) { c.StatusSuite, c.StatusVerify, c.StatusTaken, c.StatusNoSet = 488, 400, 480, 500 }
	unknown := "Security-Client: ipsec-3gpp;alg=hmac-sha-256;spi-c=1;spi-s=2;port-c=7000;port-s=7001"
	other := func(r *rig) []sent {
		r.registered()
		q := newPhone()
		q.impi, q.callID = "001019999999999@"+domain, "q"
		return r.deliver(clearFlow(), q.register("e", 5060))
	}
	gone := func(r *rig) []sent {
		p := r.registered()
		path := r.path(p)
		r.w.table.Deregister(r.w.table.UEOf(impi, ueAddr), time.Minute)
		return r.deliver(coreFlow(), mtInvite(path, ""))
	}
	route := func(r *rig) []sent {
		p := r.registered()
		return r.deliver(p.protectedFlow, p.message("Route: <sip:10.0.0.5:6100;lr>, <sip:elsewhere@192.0.2.1;lr>"))
	}
	for name, c := range map[string]struct {
		change func(*Config)
		do     func(*rig) []sent
		status int // 0: nothing is sent
		has    string
	}{
		"E1 no offer":                   {nil, first("Security-Client:"), 421, "Require: sec-agree"},
		"E1 no sec-agree":               {nil, first("Require:", "Proxy-Require:"), 421, "Security-Server: ipsec-3gpp"},
		"E2 malformed":                  {nil, first("Security-Client: ipsec-3gpp;alg=hmac-sha-1-96;spi-c=0;spi-s=2;port-c=7000;port-s=7001"), 400, "spi-c"},
		"E3 no common algorithm":        {nil, first(unknown), 494, "Security-Server: ipsec-3gpp"},
		"E3 configured":                 {status488, first(unknown), 488, "Security-Server: ipsec-3gpp"},
		"E4 no Security-Verify":         {nil, sm7(), 494, "Security-Server: ipsec-3gpp"},
		"E4 other Security-Verify":      {nil, sm7("Security-Verify: ipsec-3gpp;alg=hmac-md5-96"), 494, "Security-Verify"},
		"E4 configured":                 {status488, sm7(), 400, "Security-Server"},
		"E5 other IMPI":                 {nil, sm7("Authorization: " + strings.Replace(proof, "001010", "001019", 1)), 403, "username"},
		"E6 address of another IMPI":    {nil, other, 403, "port-c"},
		"E6 configured":                 {status488, other, 480, "port-c"},
		"E7 unknown extension":          {nil, first("Proxy-Require: sec-agree, teleport"), 420, "Unsupported: teleport"},
		"E8 protected port, no SA":      {nil, func(r *rig) []sent { return r.deliver(protectedFrom(7777), newPhone().message()) }, 0, ""},
		"E8 temporary set, no REGISTER": {nil, temporaryMessage, 0, ""},
		"E10 clear request":             {nil, func(r *rig) []sent { return r.deliver(clearFlow(), newPhone().message()) }, 403, "without a security association"},
		"E10 dropped":                   {func(c *Config) { c.DropClear = true }, func(r *rig) []sent { return r.deliver(clearFlow(), newPhone().message()) }, 0, ""},
		"E11 no ik":                     {nil, func(r *rig) []sent { return []sent{status401(r, first()(r)[0], digestChallenge)} }, 500, "no ik"},
		"E12 backend refuses":           {nil, refusing(status401, first()), 500, "Retry-After"},
		"E13 Route is repaired":         {nil, route, 0, "Route: <sip:orig@scscf." + domain + ":6060;lr>"},
		"E13 Route is refused":          {func(c *Config) { c.RefuseRoute = true }, route, 400, "Service-Route"},
		"E13 Route is right": {func(c *Config) { c.RefuseRoute = true }, func(r *rig) []sent {
			p := r.registered()
			return r.deliver(p.protectedFlow, p.message())
		}, 0, "Route: <sip:orig@scscf." + domain + ":6060;lr>"},
		"E14 short Expires is the core's":  {nil, first("Expires: 1"), 0, "Expires: 1\r\n"},
		"E15 malformed on a protected set": {nil, malformedProtected("CSeq: x REGISTER"), 400, "CSeq"},
		"E15 without a Via":                {nil, malformedProtected("Via:"), 0, ""},
		"R5.45 no SA set":                  {nil, gone, 480, ""},
		"R5.45 configured":                 {status488, gone, 500, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var change []func(*Config)
			if c.change != nil {
				change = append(change, c.change)
			}
			r := newRig(t, change...)
			out := c.do(r)
			if c.status == 0 && c.has == "" {
				if len(out) != 0 {
					t.Errorf("sent %v", out)
				}
				return
			}
			if len(out) != 1 || !strings.Contains(out[0].msg, c.has) {
				t.Fatalf("no %q in %v", c.has, out)
			}
			answer := strings.HasPrefix(out[0].msg, "SIP/2.0 ")
			if want := fmt.Sprintf("SIP/2.0 %d ", c.status); answer != (c.status != 0) || answer && !strings.HasPrefix(out[0].msg, want) {
				t.Errorf("want %d:\n%s", c.status, out[0].msg)
			}
		})
	}
}

func protectedFrom(port uint16) ims.Flow {
	return ims.Flow{
		Local: netip.AddrPortFrom(gmAddr, 6100), Remote: netip.AddrPortFrom(ueAddr, port), Transport: ims.UDP, Side: ims.GmProtected,
	}
}

func temporaryMessage(r *rig) []sent {
	p := newPhone()
	r.challenge(p, clearFlow(), 5060)
	return r.deliver(p.protectedFlow, p.message())
}

func refusing(challenge401 func(*rig, sent, ...string) sent, first func(*rig) []sent) func(*rig) []sent {
	return func(r *rig) []sent {
		r.backend.Fail = func(sa.Params) error { return fmt.Errorf("add state 1: %w", satest.ErrExists) }
		return []sent{challenge401(r, first(r)[0], challenge)}
	}
}

func malformedProtected(row string) func(*rig) []sent {
	return func(r *rig) []sent {
		p := newPhone()
		r.challenge(p, clearFlow(), 5060)
		return r.deliver(p.protectedFlow, p.register("m", 6300, row))
	}
}
