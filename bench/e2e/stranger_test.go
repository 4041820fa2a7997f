package e2e

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/bench/core"
	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/bench/lab"
)

// stranger is a host in the access network without any security association. It speaks SIP in clear by hand.
type stranger struct {
	f    *fixture
	udp  *net.UDPConn
	addr netip.AddrPort
}

// newStranger opens a socket at an address of the access network; port 0 is any.
func (f *fixture) newStranger(t *testing.T, addr netip.Addr, port uint16) *stranger {
	t.Helper()
	c, err := sipwire.ListenUDP(f.lab.UE, netip.AddrPortFrom(addr, port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return &stranger{f: f, udp: c, addr: sipwire.LocalAddrPort(c.LocalAddr())}
}

func (s *stranger) send(t *testing.T, port uint16, msg string) {
	t.Helper()
	if _, err := s.udp.WriteToUDPAddrPort([]byte(msg), netip.AddrPortFrom(s.f.lab.Plan().Gm, port)); err != nil {
		t.Fatal(err)
	}
}

// receive returns the next message, nil when none comes within the limit.
func (s *stranger) receive(t *testing.T, limit time.Duration) *sipwire.Message {
	t.Helper()
	if err := s.udp.SetReadDeadline(time.Now().Add(limit)); err != nil {
		t.Fatal(err)
	}
	b, _, err := sipwire.ReadUDP(s.udp)
	if err != nil {
		return nil
	}
	m, err := sipwire.Parse(b)
	if err != nil {
		t.Fatalf("received %q: %v", b, err)
	}
	return m
}

// sendTCP opens a connection, sends and returns what comes back until the limit. A refused connection is fine: nothing
// can be delivered then.
func (s *stranger) sendTCP(ctx context.Context, t *testing.T, port uint16, msg string, limit time.Duration) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	c, err := sipwire.DialTCP(ctx, s.f.lab.UE, netip.AddrPortFrom(s.addr.Addr(), 0), netip.AddrPortFrom(s.f.lab.Plan().Gm, port))
	if err != nil {
		return ""
	}
	defer c.Close() //nolint:errcheck // nothing to lose
	if _, err := c.Write([]byte(msg)); err != nil {
		return ""
	}
	if err := c.SetReadDeadline(time.Now().Add(limit)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4096)
	n, _ := c.Read(b)
	return string(b[:n])
}

// message builds a request that claims everything a registered phone would.
func (s *stranger) message(method, from, to, callID string) string {
	return strings.Join([]string{
		method + " " + to + " SIP/2.0",
		"Via: SIP/2.0/UDP " + s.addr.String() + ";branch=" + sipwire.Branch() + ";rport",
		"Max-Forwards: 70",
		"From: <" + from + ">;tag=stranger",
		"To: <" + to + ">",
		"Call-ID: " + callID,
		"CSeq: 1 " + method,
		"P-Preferred-Identity: <" + from + ">",
		"P-Asserted-Identity: <" + from + ">",
		"Contact: <sip:stranger@" + s.addr.String() + ">",
		"Content-Type: text/plain",
		"Content-Length: 4", "", "boo!",
	}, "\r\n")
}

// securityClient is what strangers offer.
const securityClient = "ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc;prot=esp;mod=trans;spi-c=4294967294;spi-s=4294967295;port-c=31000;port-s=31001"

// register builds a first REGISTER of a subscriber. change edits it.
func (s *stranger) register(sub core.Subscriber, callID string, change ...func(*sipwire.Message)) string {
	m := &sipwire.Message{Method: "REGISTER", URI: "sip:" + sub.Domain}
	m.Add("Via", "SIP/2.0/UDP "+s.addr.String()+";branch="+sipwire.Branch()+";rport")
	m.Add("Max-Forwards", "70")
	m.Add("From", "<"+sub.TemporaryIMPU()+">;tag=s1")
	m.Add("To", "<"+sub.TemporaryIMPU()+">")
	m.Add("Call-ID", callID)
	m.Add("CSeq", "1 REGISTER")
	m.Add("Contact", "<sip:s@"+s.addr.String()+">")
	m.Add("Expires", "600000")
	m.Add("Supported", "path")
	m.Add("Require", "sec-agree")
	m.Add("Proxy-Require", "sec-agree")
	m.Add("Security-Client", securityClient)
	m.Add("Authorization", fmt.Sprintf(`Digest username="%s",realm="%s",uri="sip:%s",nonce="",response=""`, sub.IMPI, sub.Domain, sub.Domain))
	for _, c := range change {
		c(m)
	}
	return string(m.Bytes())
}

// wantStatus reads an answer and checks its status.
func (s *stranger) wantStatus(t *testing.T, want int) *sipwire.Message {
	t.Helper()
	m := s.receive(t, registerTimeout+3*time.Second)
	switch {
	case m == nil:
		t.Errorf("no answer, want %d", want)
	case m.Status != want:
		t.Errorf("got %d %s (%s), want %d", m.Status, m.Reason, m.Get("Warning"), want)
	}
	return m
}

// strangerRules accepts in clear what strangers send and what they are answered.
func strangerRules(statuses ...int) lab.ClearRules {
	return lab.ClearRules{Statuses: append(statuses, 401), Also: func(m lab.ClearSIP) bool {
		return strings.HasPrefix(m.CallID, "stranger")
	}}
}

// TestStrangerRegister covers the unprotected REGISTER: what is refused, and what a retransmission does.
//
// Peers: A3.06a, C2.12
func TestStrangerRegister(t *testing.T) {
	rules := strangerRules()
	f := start(t, fixtureConfig{clear: rules, subs: 64})
	tests := []struct {
		name   string
		change func(*sipwire.Message)
		status int
		header [2]string // in the answer: name and part of the value
		core   bool      // whether the core may see it
	}{
		{"no Security-Client", func(m *sipwire.Message) { m.Del("Security-Client") }, 421, [2]string{"Require", "sec-agree"}, false},
		{"no sec-agree", func(m *sipwire.Message) { m.Del("Require"); m.Del("Proxy-Require") }, 421, [2]string{"Require", "sec-agree"}, false},
		{"no common algorithm", func(m *sipwire.Message) {
			m.Set("Security-Client", strings.Replace(securityClient, "hmac-sha-1-96", "hmac-sha-256-128", 1))
		}, 494, [2]string{"Security-Server", "ipsec-3gpp"}, false},
		{"every offer unusable", func(m *sipwire.Message) {
			m.Set("Security-Client", strings.Replace(securityClient, "spi-c=4294967294", "spi-c=4294967296", 1))
		}, 400, [2]string{"Warning", "spi-c"}, false},
		{"equal SPIs", func(m *sipwire.Message) {
			m.Set("Security-Client", strings.Replace(securityClient, "spi-c=4294967294", "spi-c=4294967295", 1))
		}, 400, [2]string{"Warning", "spi"}, false},
		{"unknown Proxy-Require", func(m *sipwire.Message) { m.Set("Proxy-Require", "sec-agree, teleport") }, 420, [2]string{"Unsupported", "teleport"}, false},
		{"no hops left", func(m *sipwire.Message) { m.Set("Max-Forwards", "0") }, 483, [2]string{}, false},
		{"two Vias", func(m *sipwire.Message) { m.Add("Via", "SIP/2.0/UDP 192.0.2.1;branch=z9hG4bKx") }, 400, [2]string{"Warning", "Via"}, false},
		{"CSeq of another method", func(m *sipwire.Message) { m.Set("CSeq", "1 INVITE") }, 400, [2]string{}, false},
		{"integrity-protected claimed (T5)", func(m *sipwire.Message) {
			m.Set("Authorization", m.Get("Authorization")+`,integrity-protected="yes"`)
		}, 401, [2]string{"Security-Server", "spi-s="}, true},
		{"claim first and upper case", func(m *sipwire.Message) {
			m.Set("Authorization", strings.Replace(m.Get("Authorization"), "Digest ", "Digest INTEGRITY-PROTECTED=yes, ", 1))
		}, 401, [2]string{"Security-Server", "spi-s="}, true},
	}
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			sub := f.subs[i]
			s := f.newStranger(t, f.lab.Plan().UE(i), 5060)
			callID := fmt.Sprintf("stranger-%d", i)
			s.send(t, lab.PortClear, s.register(sub, callID, tt.change))
			m := s.wantStatus(t, tt.status)
			if m != nil && tt.header[0] != "" && !strings.Contains(m.Get(tt.header[0]), tt.header[1]) {
				t.Errorf("%s of the answer is %q, want %q in it", tt.header[0], m.Get(tt.header[0]), tt.header[1])
			}
			seen := f.registersOf(sub.IMPI)
			if got := len(seen) > 0; got != tt.core {
				t.Errorf("reached the core: %t, want %t", got, tt.core)
			}
			for _, r := range seen {
				if r.IntegrityProtected != "no" {
					t.Errorf("integrity-protected is %q at the core, want no", r.IntegrityProtected)
				}
			}
		})
	}

	t.Run("retransmissions make one set (T17)", func(t *testing.T) {
		ctx := timed(t)
		if !eventually(ctx, drainLimit, func() bool { return f.metric(ctx, t, "sa_sets") == 0 }) {
			t.Fatal("sets of the cases before are still there")
		}
		f.core.SetBehaviour(core.Behaviour{AnswerDelay: 200 * time.Millisecond})
		defer f.core.SetBehaviour(core.Behaviour{})
		n := len(tests)
		s := f.newStranger(t, f.lab.Plan().UE(n), 5060)
		msg := s.register(f.subs[n], "stranger-again")
		expired := f.metric(ctx, t, "reg_await_auth_expired_total")
		s.send(t, lab.PortClear, msg)
		s.send(t, lab.PortClear, msg)
		first := s.wantStatus(t, 401)
		if first == nil {
			t.FailNow()
		}
		for range 2 {
			s.send(t, lab.PortClear, msg)
			if m := s.wantStatus(t, 401); m != nil && (m.Get("Security-Server") != first.Get("Security-Server") ||
				m.Get("WWW-Authenticate") != first.Get("WWW-Authenticate")) {
				t.Errorf("answer to a retransmission differs:\n%s\n%s", first.Bytes(), m.Bytes())
			}
		}
		if got := f.metric(ctx, t, "sa_sets", `phase="temporary"`); got != 1 {
			t.Errorf("%g temporary sets, want 1", got)
		}
		if got := len(f.registersOf(f.subs[n].IMPI)); got != 1 {
			t.Errorf("the core got %d REGISTER, want 1", got)
		}
		f.wantNoSets(ctx, t) // reg-await-auth
		if got := f.metric(ctx, t, "reg_await_auth_expired_total") - expired; got != 1 {
			t.Errorf("reg-await-auth expired %g times, want once", got)
		}
	})
}

// TestChallengeForms covers how a 401 of the core may look (T9): the keys are used and never shown.
//
// Peers: A3.09, B4.02
func TestChallengeForms(t *testing.T) {
	f := start(t, fixtureConfig{clear: strangerRules(500)})
	tests := []struct {
		name string
		b    core.Behaviour
	}{
		{"keys first", core.Behaviour{Keys: core.KeysFirst}},
		{"keys last", core.Behaviour{Keys: core.KeysLast}},
		{"ck first, ik last", core.Behaviour{Keys: core.KeysSplit}},
		{"upper case", core.Behaviour{UpperHex: true}},
		{"no quotes", core.Behaviour{UnquotedKeys: true, Keys: core.KeysLast}},
		{"no qop", core.Behaviour{NoQOP: true, Keys: core.KeysLast}},
		{"several rows", core.Behaviour{ExtraChallenges: true, Keys: core.KeysSplit, UpperHex: true}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ctx := timed(t)
			f.core.SetBehaviour(tt.b)
			defer f.core.SetBehaviour(core.Behaviour{})
			u := f.newUE(t)
			f.mustRegister(ctx, t, u)
		})
	}
	for _, tt := range []struct {
		name string
		b    core.Behaviour
	}{{"no ik", core.Behaviour{NoIK: true}}, {"no ck", core.Behaviour{NoCK: true}}} {
		t.Run(tt.name, func(t *testing.T) {
			f.core.SetBehaviour(tt.b)
			defer f.core.SetBehaviour(core.Behaviour{})
			i := f.take(t)
			s := f.newStranger(t, f.lab.Plan().UE(i), 5060)
			s.send(t, lab.PortClear, s.register(f.subs[i], "stranger-"+tt.name[3:]))
			if m := s.wantStatus(t, 500); m != nil && (m.Has("WWW-Authenticate") || m.Has("Security-Server")) {
				t.Errorf("the answer shows the challenge:\n%s", m.Bytes())
			}
		})
	}
}

// TestStrangerTraffic sends requests in clear to every port of the daemon: none reaches the core (T6, T7).
//
// Peers: A3.05a, B2.14
func TestStrangerTraffic(t *testing.T) {
	for _, rule := range []string{"reject", "drop"} {
		t.Run(rule, func(t *testing.T) {
			f := start(t, fixtureConfig{clear: strangerRules(), daemon: lab.DaemonOptions{ClearRequests: rule}})
			ctx := timed(t)
			a, b := f.newUE(t), f.newUE(t)
			f.mustRegister(ctx, t, a)
			f.mustRegister(ctx, t, b)
			aID, bID := f.subs[0].IMPU[0], f.subs[1].IMPU[0]

			// From the address of a registered phone, and from one that nobody has.
			strangers := []*stranger{f.newStranger(t, f.lab.Plan().UE(0), 0), f.newStranger(t, f.lab.Plan().UE(500), 0)}
			all := append(append([]uint16{lab.PortClear}, lab.ServerPorts...), lab.ClientPorts...)
			for i, s := range strangers {
				for _, method := range []string{"MESSAGE", "INVITE", "OPTIONS"} {
					id := fmt.Sprintf("stranger-%s-%d", method, i)
					s.send(t, lab.PortClear, s.message(method, aID, bID, id))
					if rule == "reject" {
						s.wantStatus(t, 403)
					} else if m := s.receive(t, 100*time.Millisecond); m != nil {
						t.Errorf("%s in clear was answered with %d", method, m.Status)
					}
				}
				s.send(t, lab.PortClear, "SIP/2.0 200 OK\r\nVia: SIP/2.0/UDP x;branch=z9hG4bKx\r\nFrom: <sip:a@b>;tag=1\r\n"+
					"To: <sip:a@b>;tag=2\r\nCall-ID: stranger-answer\r\nCSeq: 1 MESSAGE\r\nContent-Length: 0\r\n\r\n")
				for _, port := range all[1:] {
					s.send(t, port, s.message("MESSAGE", aID, bID, fmt.Sprintf("stranger-udp-%d-%d", port, i)))
				}
				for _, port := range all {
					msg := strings.Replace(s.message("MESSAGE", aID, bID, fmt.Sprintf("stranger-tcp-%d-%d", port, i)), "/UDP", "/TCP", 1)
					got := s.sendTCP(ctx, t, port, msg, 200*time.Millisecond)
					if want := port == lab.PortClear && rule == "reject"; want != strings.HasPrefix(got, "SIP/2.0 403") || (!want && got != "") {
						t.Errorf("TCP to port %d was answered with %q", port, got)
					}
				}
				if m := s.receive(t, 100*time.Millisecond); m != nil {
					t.Errorf("a protected port answered in clear: %d", m.Status)
				}
			}
			// What comes after by the right way shows that nothing before is still on its way.
			f.mustMessage(ctx, t, a, bID)
			for _, s := range f.core.Log() {
				if strings.HasPrefix(s.CallID, "stranger") {
					t.Errorf("reached the core: %s with Call-ID %s", s.Method, s.CallID)
				}
			}
		})
	}
}
