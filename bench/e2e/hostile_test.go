package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gopacket/gopacket/pcapgo"

	"github.com/gmgate/gmgate/bench/core"
	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/bench/lab"
	"github.com/gmgate/gmgate/bench/ue"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// edit returns a Tweak that changes messages of one kind.
func edit(kind string, change func(*sipwire.Message)) func(string, []byte) []byte {
	return func(k string, b []byte) []byte {
		if k != kind {
			return b
		}
		m, err := sipwire.Parse(b)
		if err != nil {
			panic(err) // the phone's own message
		}
		change(m)
		return m.Bytes()
	}
}

// wantRefused expects an operation to be refused with a status, inside an SA or in clear.
func wantRefused(t *testing.T, err error, status int, protected bool) *ue.StatusError {
	t.Helper()
	refused, ok := errors.AsType[*ue.StatusError](err)
	switch {
	case !ok:
		t.Fatalf("got %v, want %d", err, status)
	case refused.Status != status || refused.Protected != protected:
		t.Errorf("answered %d %s (protected %t), want %d (protected %t)", refused.Status, refused.Reason, refused.Protected, status, protected)
	}
	return refused
}

// changeParam replaces the value of a parameter in every row of a header.
func changeParam(m *sipwire.Message, header, param string, change func(string) string) {
	re := regexp.MustCompile(`(` + param + `=)([^;,]+)`)
	rows := m.All(header)
	m.Del(header)
	for _, row := range rows {
		m.Add(header, re.ReplaceAllStringFunc(row, func(s string) string {
			name, value, _ := strings.Cut(s, "=")
			return name + "=" + change(value)
		}))
	}
}

func plusOne(v string) string {
	n, err := strconv.ParseUint(v, 10, 64)
	if err != nil {
		panic(err)
	}
	return strconv.FormatUint(n+1, 10)
}

// TestAgreementViolations covers what SM7 may not say (TS 33.203 §7.3.2.3, RFC 3329 §2.3.1): it is refused inside the
// temporary set, the core never sees it, the set goes, and the phone can register afterwards (T1, T2).
//
// Peers: A3.01, A4.04a, A4.04b, B4.03
func TestAgreementViolations(t *testing.T) {
	f := start(t, fixtureConfig{clear: strangerRules()})
	tests := []struct {
		name   string
		change func(*sipwire.Message)
		status int
	}{
		{"Security-Verify with another SPI", func(m *sipwire.Message) { changeParam(m, "Security-Verify", "spi-s", plusOne) }, 494},
		{"Security-Verify with another port", func(m *sipwire.Message) { changeParam(m, "Security-Verify", "port-c", plusOne) }, 494},
		{"Security-Verify bidding down", func(m *sipwire.Message) {
			changeParam(m, "Security-Verify", "ealg", func(string) string { return "null" })
		}, 494},
		{"Security-Verify with one entry more", func(m *sipwire.Message) {
			m.Add("Security-Verify", m.Get("Security-Verify"))
		}, 494},
		{"no Security-Verify", func(m *sipwire.Message) { m.Del("Security-Verify") }, 494},
		{"Security-Client with another port-c", func(m *sipwire.Message) { changeParam(m, "Security-Client", "port-c", plusOne) }, 494},
		{"Security-Client with another SPI", func(m *sipwire.Message) { changeParam(m, "Security-Client", "spi-c", plusOne) }, 494},
		{"Security-Client without one offer", func(m *sipwire.Message) {
			rows := m.All("Security-Client")
			m.Del("Security-Client")
			for _, r := range rows[1:] {
				m.Add("Security-Client", r)
			}
		}, 494},
		{"no Security-Client", func(m *sipwire.Message) { m.Del("Security-Client") }, 494},
		{"username of another", func(m *sipwire.Message) {
			m.Set("Authorization", regexp.MustCompile(`username="[^"]*"`).ReplaceAllString(m.Get("Authorization"), `username="`+f.subs[31].IMPI+`"`))
		}, 403},
		{"To of another", func(m *sipwire.Message) { m.Set("To", "<"+f.subs[31].TemporaryIMPU()+">") }, 403},
		{"another Call-ID", func(m *sipwire.Message) { m.Set("Call-ID", "other") }, 400},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ctx := timed(t)
			sub := f.subs[f.next]
			u := f.newUE(t, func(c *ue.Config) {
				c.Offers = f.offers(2)
				c.Quirks.RowPerOffer = true
			})
			u.Tweak = edit("register-auth", tt.change)
			_, err := u.Register(ctx)
			refused := wantRefused(t, err, tt.status, true)
			if tt.status == 494 && !slices.ContainsFunc(refused.Headers("Security-Server"), func(s string) bool { return strings.Contains(s, "spi-s=") }) {
				t.Errorf("494 without Security-Server: %q", refused.Headers("Security-Server"))
			}
			if n := len(f.registersOf(sub.IMPI)); n != 1 {
				t.Errorf("the core got %d REGISTER, want the first one only", n)
			}
			u.Tweak = nil
			f.mustRegister(ctx, t, u)
		})
	}
	t.Run("Security-Client in another order of rows", func(t *testing.T) {
		u := f.newUE(t, func(c *ue.Config) {
			c.Offers = f.offers(3)
			c.Quirks.RowPerOffer = true
		})
		u.Tweak = edit("register-auth", func(m *sipwire.Message) {
			rows := m.All("Security-Client")
			if len(rows) < 3 {
				t.Fatalf("%d rows", len(rows))
			}
			m.Del("Security-Client")
			for _, r := range slices.Backward(rows) {
				m.Add("Security-Client", r)
			}
		})
		f.mustRegister(timed(t), t, u)
	})
	t.Run("wrong RES (T4)", func(t *testing.T) {
		ctx := timed(t)
		u := f.newUE(t, func(c *ue.Config) { c.Offers = f.offers(1) })
		u.Tweak = edit("register-auth", wrongResponse)
		before := f.metric(ctx, t, "sa_sets", `phase="established"`)
		_, err := u.Register(ctx)
		wantRefused(t, err, 403, true)
		if !eventually(ctx, 5*time.Second, func() bool { return f.metric(ctx, t, "sa_sets", `phase="temporary"`) == 0 }) {
			t.Error("the temporary set is still there")
		}
		if got := f.metric(ctx, t, "sa_sets", `phase="established"`); got != before {
			t.Errorf("%g established sets, want %g", got, before)
		}
	})
	t.Run("wrong RES in a re-registration", func(t *testing.T) {
		ctx := timed(t)
		sub := f.subs[f.next]
		u := f.newUE(t, func(c *ue.Config) { c.Offers = f.offers(1) })
		u.Tweak = edit("register-auth", func(m *sipwire.Message) {
			if n, _, _ := m.CSeq(); n > 2 {
				wrongResponse(m)
			}
		})
		f.mustRegister(ctx, t, u)
		f.core.SetBehaviour(core.Behaviour{AlwaysChallenge: true})
		_, err := u.Reregister(ctx)
		f.core.SetBehaviour(core.Behaviour{})
		wantRefused(t, err, 403, true)
		// TS 33.203 §7.3.1: the old set still carries the registration.
		f.mustMessage(ctx, t, u, sub.IMPU[0])
		if status, err := f.core.SendMessage(ctx, sub.IMPU[0], "still there?"); err != nil || status != 200 {
			t.Errorf("MESSAGE of the network: %d, %v", status, err)
		}
	})
	t.Run("anything but REGISTER over a temporary set", func(t *testing.T) {
		ctx := timed(t)
		i := f.next
		u := f.newUE(t, func(c *ue.Config) { c.Offers = f.offers(1) })
		u.Tweak = func(kind string, b []byte) []byte {
			if kind != "register-auth" {
				return b
			}
			s := u.Sets()[0]
			st := &stranger{f: f, addr: netip.AddrPortFrom(f.lab.Plan().UE(i), s.Ports.US)}
			id := f.subs[i].IMPU[0]
			if err := u.SendRaw(true, ims.UDP, s.Ports.UC, s.Ports.PS, []byte(st.message("MESSAGE", id, id, "too-early"))); err != nil {
				t.Error(err)
			}
			return b
		}
		dropped := f.metric(ctx, t, "sip_drops_total", `reason="temporary_non_register"`)
		f.mustRegister(ctx, t, u)
		if n := len(f.atCore(func(s core.Seen) bool { return s.CallID == "too-early" })); n > 0 {
			t.Error("it reached the core")
		}
		if got := f.metric(ctx, t, "sip_drops_total", `reason="temporary_non_register"`); got != dropped+1 {
			t.Errorf("%g drops counted, want 1", got-dropped)
		}
	})
	t.Run("sequence number failure (T18)", func(t *testing.T) {
		ctx := timed(t)
		sub := f.subs[f.next]
		u := f.newUE(t, func(c *ue.Config) { c.Offers = f.offers(1) })
		u.SetSQN(1 << 30)
		res := f.mustRegister(ctx, t, u)
		if res.Resyncs != 1 {
			t.Errorf("%d resynchronisations, want 1", res.Resyncs)
		}
		var values []string
		for _, r := range f.registersOf(sub.IMPI) {
			values = append(values, r.IntegrityProtected)
		}
		if want := []string{"no", "no", "yes"}; !slices.Equal(values, want) {
			t.Errorf("integrity-protected was %v at the core, want %v", values, want)
		}
		f.mustMessage(ctx, t, u, sub.IMPU[0])
	})
	t.Run("challenge that the phone does not believe", func(t *testing.T) {
		ctx := timed(t)
		before := f.metric(ctx, t, "sa_sets", `phase="temporary"`)
		u := f.newUE(t, func(c *ue.Config) { c.Offers, c.Identity.K = f.offers(1), [16]byte{1} })
		_, err := u.Register(ctx)
		wantRefused(t, err, 401, false) // and again, and again: TS 33.203 §7.3.1.2
		if got := f.metric(ctx, t, "sa_sets", `phase="temporary"`); got != before+1 {
			t.Errorf("%g temporary sets more, want that of the last challenge only", got-before)
		}
	})
	t.Run("phone claims integrity-protected (T5)", func(t *testing.T) {
		ctx := timed(t)
		sub := f.subs[f.next]
		u := f.newUE(t, func(c *ue.Config) { c.Offers, c.Quirks.IntegrityProtected = f.offers(1), "yes" })
		f.mustRegister(ctx, t, u)
		if got := f.registersOf(sub.IMPI)[0].IntegrityProtected; got != "no" {
			t.Errorf("integrity-protected of the clear REGISTER is %q at the core, want no", got)
		}
	})
	t.Run("address and port of another phone", func(t *testing.T) {
		ctx := timed(t)
		i := f.next
		u := f.newUE(t, func(c *ue.Config) { c.Offers = f.offers(1) })
		res := f.mustRegister(ctx, t, u)
		s := f.newStranger(t, f.lab.Plan().UE(i), 0)
		thief := f.subs[31]
		s.send(t, lab.PortClear, s.register(thief, "stranger-thief", func(m *sipwire.Message) {
			changeParam(m, "Security-Client", "port-c", func(string) string { return strconv.Itoa(int(res.Ports.UC)) })
		}))
		// Refused at once with 403 (TS 33.203 §7.2), and the phone is not disturbed.
		if m := s.receive(t, time.Second); m == nil || m.Status != 403 {
			t.Errorf("got %v, want 403", m)
		}
		f.mustMessage(ctx, t, u, f.subs[i].IMPU[0])
	})
	t.Run("reboot (T11)", func(t *testing.T) {
		ctx := timed(t)
		sub := f.subs[f.next]
		u := f.newUE(t, func(c *ue.Config) { c.Offers, c.PortUC, c.PortUS = f.offers(1), 31100, 31101 })
		first := f.mustRegister(ctx, t, u)
		u.Reboot()
		second := f.mustRegister(ctx, t, u)
		if first.Ports.UC != second.Ports.UC {
			t.Fatalf("the phone did not reuse its port: %v, %v", first.Ports, second.Ports)
		}
		f.mustMessage(ctx, t, u, sub.IMPU[0])
		if status, err := f.core.SendMessage(ctx, sub.IMPU[0], "back again?"); err != nil || status != 200 {
			t.Errorf("MESSAGE of the network: %d, %v", status, err)
		}
	})
}

// wrongResponse makes the digest of a REGISTER wrong.
func wrongResponse(m *sipwire.Message) {
	m.Set("Authorization", regexp.MustCompile(`response="[0-9a-f]*"`).ReplaceAllString(m.Get("Authorization"),
		`response="00000000000000000000000000000000"`))
}

// TestHostileRequests has registered phones send what they may not.
//
// Peers: A4.01a, B3.11
func TestHostileRequests(t *testing.T) {
	f := start(t, fixtureConfig{})
	ctx := timed(t)
	p := f.newPair(ctx, t, func(c *ue.Config) { c.Offers = f.offers(1) })
	gm := netip.AddrPortFrom(f.lab.Plan().Gm, p.ra.Ports.PS)
	path := func(impi string) string {
		for _, b := range f.core.Registered() {
			if b.IMPI == impi {
				return b.Path[0]
			}
		}
		t.Fatalf("%s is not registered", impi)
		return ""
	}
	user := func(uri string) string {
		_, rest, _ := strings.Cut(uri, "sip:")
		name, _, _ := strings.Cut(rest, "@")
		return name
	}
	othersToken := user(path(f.subs[1].IMPI))
	own := "<sip:" + user(path(f.subs[0].IMPI)) + "@" + gm.String() + ";lr>"
	tests := []struct {
		name    string
		change  func(*sipwire.Message)
		status  int
		reaches bool
	}{
		{"forged Route token", func(m *sipwire.Message) {
			m.Set("Route", "<sip:"+strings.Repeat("A", len(othersToken))+"@"+gm.String()+";lr>, "+routeRest(m))
		}, 403, false},
		{"Route token of another phone", func(m *sipwire.Message) {
			m.Set("Route", "<sip:"+othersToken+"@"+gm.String()+";lr>, "+routeRest(m))
		}, 403, false},
		{"own token in a dialog, Route to somewhere else", func(m *sipwire.Message) {
			m.Set("Route", own+", <sip:10.0.1.77:5060;lr>")
			m.Set("To", m.Get("To")+";tag=made-up")
		}, 403, false},
		{"own token outside of a dialog, Route to somewhere else", func(m *sipwire.Message) { // the Service-Route holds
			m.Set("Route", own+", <sip:10.0.1.77:5060;lr>")
		}, 200, true},
		{"no hops left", func(m *sipwire.Message) { m.Set("Max-Forwards", "0") }, 483, false},
		{"Max-Forwards is no number", func(m *sipwire.Message) { m.Set("Max-Forwards", "many") }, 400, false},
		{"cut off", nil, 400, false},
		{"two From", func(m *sipwire.Message) { m.Add("From", m.Get("From")) }, 0, false},
		{"unknown Proxy-Require", func(m *sipwire.Message) { m.Set("Proxy-Require", "sec-agree, teleport") }, 420, false},
		{"Service-Route replaced by another host", func(m *sipwire.Message) {
			m.Set("Route", "<sip:"+gm.String()+";lr>, <sip:10.0.1.77:5060;lr>")
		}, 200, true},
		{"no Route at all", func(m *sipwire.Message) { m.Del("Route") }, 200, true},
		{"headers of the core's side", func(m *sipwire.Message) {
			for _, h := range [][2]string{
				{"P-Asserted-Identity", "<" + p.bURI + ">"},
				{"P-Served-User", "<" + p.bURI + ">"},
				{"P-Charging-Vector", "icid-value=forged"},
				{"P-Charging-Function-Addresses", "ccf=192.0.2.66"},
				{"P-Asserted-Service", "urn:urn-7:3gpp-service.ims.icsi.mmtel"},
				{"P-Visited-Network-ID", "elsewhere"},
				{"P-Profile-Key", "<sip:forged@example.org>"},
				{"Path", "<sip:forged@192.0.2.66;lr>"},
				{"Security-Client", securityClient},
				{"Security-Server", securityClient},
			} {
				m.Add(h[0], h[1])
			}
		}, 200, true},
	}
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			body := fmt.Sprintf("hostile %d", i)
			p.a.Tweak = edit("message", tt.change)
			if tt.change == nil {
				p.a.Tweak = func(_ string, b []byte) []byte { return b[:len(b)-1] }
			}
			if tt.status == 0 { // no answer can be built, or need not be: only the core matters
				ctx, cancel = context.WithTimeout(ctx, 300*time.Millisecond)
				defer cancel()
			}
			status, err := p.a.Message(ctx, p.bURI, body)
			p.a.Tweak = nil
			if tt.status != 0 && (err != nil || status != tt.status) {
				t.Errorf("answered %d, %v, want %d", status, err, tt.status)
			}
			if got := len(f.atCore(func(s core.Seen) bool { return s.Body == body && s.Status == 0 })) > 0; got != tt.reaches {
				t.Errorf("reached the core: %t, want %t", got, tt.reaches)
			}
		})
	}
	t.Run("identity of another phone (T8)", func(t *testing.T) {
		p.b.Tweak = edit("message", func(m *sipwire.Message) {
			m.Set("From", "<"+p.aURI+">;tag=x")
			m.Set("P-Preferred-Identity", "<"+p.aURI+">")
			m.Set("Contact", "<sip:x@"+p.aIMPI+">")
		})
		status, err := p.b.Message(ctx, p.aURI, "it is me, honestly")
		p.b.Tweak = nil
		if err != nil || status != 200 {
			t.Fatalf("%d, %v", status, err)
		}
		seen := f.atCore(func(s core.Seen) bool { return s.Body == "it is me, honestly" })
		if len(seen) == 0 || len(seen[0].AssertedIdentity) == 0 || seen[0].AssertedIdentity[0] != p.bURI {
			t.Errorf("asserted at the core: %v, want %s", seen[0].AssertedIdentity, p.bURI)
		}
		in := p.a.Received()
		if got := in[len(in)-1].Header("P-Asserted-Identity"); !strings.Contains(got, p.bURI) {
			t.Errorf("asserted at the called phone: %q, want %s", got, p.bURI)
		}
	})
	t.Run("broken messages", func(t *testing.T) {
		s := p.a.Sets()[0]
		for _, junk := range []string{
			"", "\r\n", "\r\n\r\n", "\x00\x01\x02", "REGISTER", "MESSAGE sip:x SIP/2.0\r\n\r\n", "SIP/2.0 999 ?\r\n\r\n",
			"MESSAGE sip:x SIP/2.0\r\nVia: SIP/2.0/UDP\r\nCSeq: x\r\n\r\n", strings.Repeat("a: b\r\n", 2000),
			"INVITE sip:x SIP/3.0\r\nVia: SIP/2.0/UDP 1.2.3.4;branch=z9hG4bKx\r\n\r\n",
		} {
			if err := p.a.SendRaw(true, ims.UDP, s.Ports.UC, s.Ports.PS, []byte(junk)); err != nil {
				t.Error(err)
			}
		}
		f.mustMessage(ctx, t, p.a, p.bURI)
		if got := f.metric(ctx, t, "handler_panics_total"); got != 0 {
			t.Errorf("%g panics", got)
		}
	})
	t.Run("from the core's side", func(t *testing.T) { f.hostileCore(ctx, t, p, othersToken) })
	t.Run("after de-registration", func(t *testing.T) {
		if err := p.a.Deregister(ctx); err != nil {
			t.Fatal(err)
		}
		s := p.a.Sets()
		if len(s) == 0 {
			t.Fatal("the phone has no set any more")
		}
		st := &stranger{f: f, addr: netip.AddrPortFrom(f.lab.Plan().UE(0), s[0].Ports.US)}
		if err := p.a.SendRaw(true, ims.UDP, s[0].Ports.UC, s[0].Ports.PS, []byte(st.message("MESSAGE", p.aURI, p.bURI, "too-late"))); err != nil {
			t.Fatal(err)
		}
		f.mustMessage(ctx, t, p.b, p.bURI)
		if n := len(f.atCore(func(s core.Seen) bool { return s.CallID == "too-late" })); n > 0 {
			t.Error("it reached the core")
		}
	})
}

// routeRest returns the Route entries behind the first one.
func routeRest(m *sipwire.Message) string { return strings.Join(m.List("Route")[1:], ", ") }

// hostileCore sends to the Mw side what no core sends.
func (f *fixture) hostileCore(ctx context.Context, t *testing.T, p *pair, token string) {
	c, err := sipwire.ListenUDP(f.lab.Core, netip.AddrPortFrom(f.lab.Plan().Core, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close() //nolint:errcheck // read only
	from := sipwire.LocalAddrPort(c.LocalAddr())
	mw := netip.AddrPortFrom(f.lab.Plan().Mw, lab.PortMw)
	had := len(p.a.Received()) + len(p.b.Received())
	for _, route := range []string{
		"", "<sip:" + mw.String() + ";lr>", "<sip:" + strings.Repeat("A", len(token)) + "@" + mw.String() + ";lr>",
		"<sip:" + token[1:] + "@" + mw.String() + ";lr>", "<sip:x@" + mw.String() + ";lr>", "<sip:" + flip(token) + "@" + mw.String() + ";lr>",
	} {
		m := &sipwire.Message{Method: "MESSAGE", URI: "sip:001010000000001@" + netip.AddrPortFrom(f.lab.Plan().UE(0), p.ra.Ports.US).String()}
		m.Add("Via", "SIP/2.0/UDP "+from.String()+";branch="+sipwire.Branch())
		if route != "" {
			m.Add("Route", route)
		}
		m.Add("Max-Forwards", "70")
		m.Add("From", "<sip:nobody@"+domain+">;tag=1")
		m.Add("To", "<"+p.aURI+">")
		m.Add("Call-ID", sipwire.Token())
		m.Add("CSeq", "1 MESSAGE")
		if _, err := c.WriteToUDPAddrPort(m.Bytes(), mw); err != nil {
			t.Fatal(err)
		}
		if err := c.SetReadDeadline(time.Now().Add(2 * time.Second)); err != nil {
			t.Fatal(err)
		}
		b, _, err := sipwire.ReadUDP(c)
		if err != nil {
			t.Errorf("Route %q: no answer: %v", route, err)
			continue
		}
		if r, err := sipwire.Parse(b); err != nil || r.Status < 400 {
			t.Errorf("Route %q: answered %s, %v", route, b, err)
		}
	}
	f.mustMessage(ctx, t, p.b, p.aURI) // the one message that may arrive
	if got := len(p.a.Received()) + len(p.b.Received()); got != had+1 {
		t.Errorf("%d requests arrived at the phones, want 1", got-had)
	}
}

// flip changes one character in the middle of a token.
func flip(token string) string {
	b := []byte(token)
	if b[10] == 'B' {
		b[10] = 'C'
	} else {
		b[10] = 'B'
	}
	return string(b)
}

// TestESPAttacks injects ESP packets: unknown SPIs, bad integrity, and a replay of a packet that was fine once. There is no
// guard in front, so that all of them reach the ESP backend; TestGuard has one.
//
// Peers: A4.12, B4.10, C2.14
func TestESPAttacks(t *testing.T) {
	file := filepath.Join(t.TempDir(), "attack.pcap")
	f := start(t, fixtureConfig{capture: file, daemon: lab.DaemonOptions{Guard: lab.GuardOptions{Mode: "off"}}})
	ctx := timed(t)
	p := f.newPair(ctx, t, func(c *ue.Config) { c.Offers, c.Quirks.LargeUDP = f.offers(1), true })
	if status, err := p.a.Message(ctx, p.bURI, "once only"); err != nil || status != 200 {
		t.Fatalf("%d, %v", status, err)
	}
	f.capture.Settle(50*time.Millisecond, time.Second)
	if err := f.capture.Flush(); err != nil {
		t.Fatal(err)
	}
	genuine := lastESP(t, file, p.ra.SPIs.PS)
	var raw net.PacketConn
	if err := f.lab.UE.Do(func() (err error) {
		raw, err = net.ListenPacket("ip4:50", f.lab.Plan().UE(0).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer raw.Close() //nolint:errcheck // write only
	inject := func(b []byte) {
		if _, err := raw.WriteTo(b, &net.IPAddr{IP: f.lab.Plan().Gm.AsSlice()}); err != nil {
			t.Fatal(err)
		}
	}
	total := func() int { return len(f.core.Log()) }
	before := total()
	for range 3 {
		inject(genuine) // replay
	}
	forged := slices.Clone(genuine)
	forged[7] += 5 // a sequence number not used yet, so that the integrity check decides
	inject(forged)
	forged[len(forged)-1] ^= 1
	inject(forged)
	unknown := slices.Clone(genuine)
	unknown[0] ^= 0x5a
	inject(unknown)
	for n := range 24 {
		inject(genuine[:n])
	}
	f.mustMessage(ctx, t, p.a, p.bURI)
	if got := len(f.atCore(func(s core.Seen) bool { return s.Body == "once only" && s.Status == 0 })); got != 1 {
		t.Errorf("the core got the message %d times", got)
	}
	if got := total() - before; got != 2 { // the message after the attack, and the answer of the called phone
		t.Errorf("%d messages reached the core after the attack, want 2", got)
	}
	if backend() == "userspace" {
		for _, reason := range []string{"replay", "icv", "unknown_spi"} {
			if f.metric(ctx, t, "esp_drops_total", fmt.Sprintf("reason=%q", reason)) == 0 {
				t.Errorf("no drop for reason %s was counted", reason)
			}
		}
	}
}

// lastESP reads the last ESP packet with an SPI from a capture of IPv4 traffic.
func lastESP(t *testing.T, file string, spi ims.SPI) []byte {
	t.Helper()
	r, err := os.Open(file) //nolint:gosec // the test's own file
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close() //nolint:errcheck // read only
	in, err := pcapgo.NewReader(r)
	if err != nil {
		t.Fatal(err)
	}
	var last []byte
	for {
		b, _, err := in.ReadPacketData()
		if err != nil {
			break // end of what was flushed
		}
		const header = 14 + 20
		if len(b) > header+8 && b[12] == 8 && b[13] == 0 && b[14+9] == 50 &&
			ims.SPI(uint32(b[header])<<24|uint32(b[header+1])<<16|uint32(b[header+2])<<8|uint32(b[header+3])) == spi {
			last = slices.Clone(b[header:])
		}
	}
	if last == nil {
		t.Fatalf("no ESP packet with SPI %s in the capture", spi)
	}
	return last
}

// protectedNS is the namespace in which the phones' protected sockets live.
func (f *fixture) protectedNS() *hostnet.NS {
	if tun := f.farm.Tunnel(); tun != nil {
		return tun.Hidden()
	}
	return f.lab.UE
}

// TestConnectionGone closes the connection of a request before its answer (T14): the answer comes over a connection
// that the P-CSCF opens from port-pc to port-us, inside the same set.
//
// Peers: A1.31a, A2.03, C1.02, C2.11
func TestConnectionGone(t *testing.T) {
	f := start(t, fixtureConfig{})
	ctx := timed(t)
	p := f.newPair(ctx, t, func(c *ue.Config) { c.Offers, c.Quirks.LargeUDP = f.offers(1), true })
	p.b.Tweak = func(kind string, b []byte) []byte {
		if kind == "response" {
			time.Sleep(300 * time.Millisecond) // the answer comes when the connection is gone
		}
		return b
	}
	set := p.a.Sets()[0]
	from, to := netip.AddrPortFrom(f.lab.Plan().UE(0), set.Ports.UC), netip.AddrPortFrom(f.lab.Plan().Gm, set.Ports.PS)
	p.a.Tweak = func(kind string, b []byte) []byte {
		if kind != "message" {
			return b
		}
		c, err := sipwire.DialTCP(ctx, f.protectedNS(), from, to)
		if err != nil {
			t.Error(err)
			return nil
		}
		defer c.Close() //nolint:errcheck // that is the point
		m, err := sipwire.Parse(b)
		if err != nil {
			t.Error(err)
			return nil
		}
		m.Headers[0].Value = strings.Replace(m.Headers[0].Value, "/UDP ", "/TCP ", 1)
		if _, err := c.Write(m.Bytes()); err != nil {
			t.Error(err)
		}
		if !eventually(ctx, time.Second, func() bool { return len(p.b.Received()) > 0 }) {
			t.Error("the request did not arrive")
		}
		return nil // the phone itself sends nothing and waits for the answer
	}
	status, err := p.a.Message(ctx, p.bURI, "answer me elsewhere")
	if status != 200 {
		t.Fatalf("answered %d, %v", status, err)
	}
	// The phone believes that it asked by UDP, so it finds the answer by TCP strange: that is what is wanted here.
	if err == nil || !strings.Contains(err.Error(), "answer by TCP") {
		t.Errorf("the answer did not come by TCP: %v", err)
	}
	if f.capture.Packets(p.ra.SPIs.PC) == 0 {
		t.Error("no packet on SA B: the daemon opened no connection from port-pc to port-us")
	}
}

// TestCoreGone takes the core away: REGISTER is answered with 504 within register_timeout, in clear and inside an SA.
func TestCoreGone(t *testing.T) {
	f := start(t, fixtureConfig{coreDies: true, clear: lab.ClearRules{Statuses: []int{401, 504}}})
	ctx := timed(t)
	old, fresh := f.newUE(t, func(c *ue.Config) { c.Offers = f.offers(1) }), f.newUE(t, func(c *ue.Config) { c.Offers = f.offers(1) })
	f.mustRegister(ctx, t, old)
	if err := f.core.Close(); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	bounded := func(protected bool, do func() error) {
		wg.Go(func() {
			begin := time.Now()
			err := do()
			took := time.Since(begin)
			refused, ok := errors.AsType[*ue.StatusError](err)
			if !ok || refused.Status != 504 || refused.Protected != protected {
				t.Errorf("got %v after %s, want 504 (protected %t)", err, took, protected)
			}
			if took > registerTimeout+2*time.Second {
				t.Errorf("answered after %s, register_timeout is %s", took, registerTimeout)
			}
		})
	}
	bounded(false, func() error { _, err := fresh.Register(ctx); return err })
	bounded(true, func() error { _, err := old.Reregister(ctx); return err })
	wg.Wait()
}

// TestDaemonCrash kills the daemon and starts it again: phones that register anew are served, whatever the crash left
// behind in the kernel.
func TestDaemonCrash(t *testing.T) {
	f := start(t, fixtureConfig{})
	ctx := timed(t)
	p := f.newPair(ctx, t, func(c *ue.Config) { c.Offers, c.PortUC, c.PortUS = f.offers(1), 31200, 31201 })
	f.mustMessage(ctx, t, p.a, p.bURI)
	if err := f.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	d, err := f.lab.StartDaemon(ctx, binary(t), f.config, nil)
	if err != nil {
		t.Fatal(err)
	}
	f.daemon = d
	for _, u := range []*ue.UE{p.a, p.b} {
		u.Reboot()
		f.mustRegister(ctx, t, u)
	}
	f.mustMessage(ctx, t, p.a, p.bURI)
	f.mustMessage(ctx, t, p.b, p.aURI)
	for _, u := range []*ue.UE{p.a, p.b} {
		if err := u.Deregister(ctx); err != nil {
			t.Error(err)
		}
	}
	f.wantNoSets(ctx, t)
}

// TestManyPhones has many phones register, talk and leave at the same time.
//
// Peers: C2.02
func TestManyPhones(t *testing.T) {
	phones := 48
	if setting(envUE, ue.Userspace) == ue.XFRM {
		phones = 12 // each of their SA sets costs a process
	}
	f := start(t, fixtureConfig{subs: phones, register: caseTimeout})
	ctx := timed(t)
	all := make([]*ue.UE, phones)
	for i := range all {
		all[i] = f.newUE(t, func(c *ue.Config) {
			c.Offers = f.offers(1 + i%3)
			c.Transport = []ims.Transport{ims.UDP, ims.TCP}[i%2]
			c.Quirks.LargeUDP = i%4 == 0
		})
	}
	each := func(do func(i int, u *ue.UE) error) {
		t.Helper()
		errs := make([]error, phones)
		var wg sync.WaitGroup
		for i, u := range all {
			wg.Go(func() { errs[i] = do(i, u) })
		}
		wg.Wait()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	each(func(_ int, u *ue.UE) error { _, err := u.Register(ctx); return err })
	if got := f.metric(ctx, t, "sa_sets", `phase="established"`); int(got) != phones {
		t.Errorf("%g established sets, want %d", got, phones)
	}
	each(func(i int, u *ue.UE) error {
		for n := range 5 {
			to := f.subs[(i+n*7+1)%phones].IMPU[0]
			if status, err := u.Message(ctx, to, strings.Repeat("z", 1+n*500)); err != nil || status != 200 {
				return fmt.Errorf("phone %d to %s: %d, %w", i, to, status, err)
			}
		}
		return nil
	})
	each(func(i int, u *ue.UE) error {
		_, err := u.Call(ctx, f.subs[(i+1)%phones].IMPU[0], ue.CallOptions{PRACK: true, ReInvite: i%3 == 0})
		return err
	})
	each(func(_ int, u *ue.UE) error { return u.Deregister(ctx) })
	checkPhones(t, all...)
	f.wantNoSets(ctx, t)
}
