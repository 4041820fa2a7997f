package e2e

import (
	"context"
	big "encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/bench/core"
	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/bench/lab"
	"github.com/gmgate/gmgate/bench/ue"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/esp"
	"github.com/gmgate/gmgate/dataplane/esptun"
)

// thief is a registered phone that attacks, with the two phones that it attacks.
type thief struct {
	*ue.UE
	f     *fixture
	index int // of its subscriber
	reg   ue.Result
	pair  *pair
	raw   net.PacketConn // ESP from its address
	file  string         // of the capture
}

// inject sends an ESP packet from the address of the thief, as anybody in the access network could.
func (h *thief) inject(t *testing.T, b []byte) {
	t.Helper()
	if _, err := h.raw.WriteTo(b, &net.IPAddr{IP: h.f.lab.Plan().Gm.AsSlice()}); err != nil {
		t.Fatal(err)
	}
}

// as returns the raw socket of another address.
func (h *thief) as(t *testing.T, addr netip.Addr) *thief {
	t.Helper()
	other := *h
	if err := h.f.lab.UE.Do(func() (err error) {
		other.raw, err = new(net.ListenConfig).ListenPacket(context.Background(), "ip4:50", addr.String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = other.raw.Close() })
	return &other
}

// captured returns the last ESP packet on an SA.
func (h *thief) captured(t *testing.T, spi ims.SPI) []byte {
	t.Helper()
	h.f.capture.Settle(50*time.Millisecond, time.Second)
	if err := h.f.capture.Flush(); err != nil {
		t.Fatal(err)
	}
	return lastESP(t, h.file, spi)
}

// attack sends every kind of bad ESP packet: what another phone sent once more, the same cut off and changed, and packets
// with a good integrity check value of its own SA whose inside is bad.
func (h *thief) attack(t *testing.T) {
	genuine := h.captured(t, h.pair.ra.SPIs.PS)
	victim := h.as(t, h.f.lab.Plan().UE(0))
	for range 3 {
		victim.inject(t, genuine)
		h.inject(t, genuine) // from another address than that of its SA
	}
	for n := range genuine {
		victim.inject(t, genuine[:n])
	}
	for n := range 64 {
		bad := slices.Clone(genuine)
		big.BigEndian.PutUint32(bad[4:], uint32(1000+n)) // sequence numbers ahead must not move the window
		bad[len(bad)-1-n%12] ^= 1
		victim.inject(t, bad)
	}

	own := h.reg.Set.SAs[0]
	i := slices.IndexFunc(h.reg.Set.SAs[:], func(s esptun.SA) bool { return s.SPI == h.reg.SPIs.PS })
	if i >= 0 {
		own = h.reg.Set.SAs[i]
	}
	out, err := esp.NewOutbound(own.SPI, own.Keys)
	if err != nil {
		t.Fatal(err)
	}
	if err := out.SetSeq(1000); err != nil { // ahead of the phone's own
		t.Fatal(err)
	}
	sip := []byte("MESSAGE sip:x@y SIP/2.0\r\nVia: SIP/2.0/UDP x\r\n\r\n")
	udp := func(from, to uint16, length int) []byte {
		b := big.BigEndian.AppendUint16(nil, from)
		b = big.BigEndian.AppendUint16(b, to)
		b = big.BigEndian.AppendUint16(b, uint16(length))
		return append(append(b, 0, 0), sip...)
	}
	whole := udp(h.reg.Ports.UC, h.reg.Ports.PS, 8+len(sip))
	for _, inner := range []struct {
		payload []byte
		proto   byte
	}{
		{nil, 17},
		{whole[:7], 17},
		{udp(h.reg.Ports.UC, h.reg.Ports.PS, 7), 17},
		{udp(h.reg.Ports.UC, h.reg.Ports.PS, 60000), 17},
		{udp(h.pair.ra.Ports.UC, h.reg.Ports.PS, 8+len(sip)), 17}, // from a port that is not its SA's
		{udp(h.reg.Ports.UC, lab.PortMetrics, 8+len(sip)), 17},    // to a port that is not its SA's
		{udp(h.reg.Ports.UC, lab.PortClear, 8+len(sip)), 17},      // not even to the unprotected one
		{whole[:3], 6},        // TCP cut off
		{make([]byte, 20), 6}, // TCP with no offset
		{whole, 1},            // ICMP
		{whole, 4},            // a tunnel
		{whole, 50},           // ESP in ESP
		{whole, 59},           // nothing: a dummy packet (RFC 4303 §2.6)
		{append(udp(h.reg.Ports.UC, h.reg.Ports.PS, 8), sip...), 17}, // an empty datagram
	} {
		b, err := out.Seal(nil, inner.payload, inner.proto)
		if err != nil {
			t.Fatal(err)
		}
		h.inject(t, b)
		h.inject(t, b) // and again
		for n := range b {
			h.inject(t, b[:n])
		}
	}
}

// TestHostilePhones has a phone, registered or not, do over the network what it can against others. It can harm only
// itself: each case ends with the others talking in both directions, and with somebody new who gets in.
func TestHostilePhones(t *testing.T) {
	file := filepath.Join(t.TempDir(), "hostile.pcap")
	f := start(t, fixtureConfig{capture: file, clear: strangerRules(400, 403, 503), subs: 64})
	ctx := timed(t)
	udp := func(c *ue.Config) { c.Offers, c.Quirks.LargeUDP = f.offers(1), true }
	p := f.newPair(ctx, t, udp)

	clear := func(t *testing.T, i int) *stranger { return f.newStranger(t, f.lab.Plan().UE(i), 0) }
	tests := []struct {
		name   string
		attack func(ctx context.Context, t *testing.T, h *thief)
	}{
		{"Security-Verify with the SPIs of another phone", func(ctx context.Context, t *testing.T, _ *thief) {
			u := f.newUE(t, udp)
			u.Tweak = edit("register-auth", func(m *sipwire.Message) {
				changeParam(m, "Security-Verify", "spi-c", func(string) string { return strconv.Itoa(int(p.ra.SPIs.PC)) })
				changeParam(m, "Security-Verify", "spi-s", func(string) string { return strconv.Itoa(int(p.ra.SPIs.PS)) })
			})
			_, err := u.Register(ctx)
			wantRefused(t, err, 494, true)
		}},
		{"the identity of another phone over its own SA", func(ctx context.Context, t *testing.T, h *thief) {
			s := &stranger{f: f, addr: netip.AddrPortFrom(f.lab.Plan().UE(h.index), h.reg.Ports.US)}
			for n, method := range []string{"MESSAGE", "OPTIONS", "BYE"} {
				msg := s.message(method, p.aURI, p.bURI, fmt.Sprintf("stolen-%d", n))
				if err := h.SendRaw(true, ims.UDP, h.reg.Ports.UC, h.reg.Ports.PS, []byte(msg)); err != nil {
					t.Fatal(err)
				}
			}
			reg := s.register(f.subs[0], "stolen-reg", func(m *sipwire.Message) { m.Del("Security-Client"); m.Set("Expires", "0") })
			if err := h.SendRaw(true, ims.UDP, h.reg.Ports.UC, h.reg.Ports.PS, []byte(reg)); err != nil {
				t.Fatal(err)
			}
			f.mustMessage(ctx, t, h.UE, p.bURI) // what was sent before has been handled
			for _, seen := range f.atCore(func(s core.Seen) bool { return strings.HasPrefix(s.CallID, "stolen") }) {
				if slices.Contains(seen.AssertedIdentity, p.aURI) || seen.Method == "REGISTER" {
					t.Errorf("%s of the thief reached the core as %v", seen.Method, seen.AssertedIdentity)
				}
			}
		}},
		{"SPIs and ports of another phone", func(ctx context.Context, t *testing.T, _ *thief) {
			s := clear(t, 0) // at the address of the victim
			for n, set := range []struct {
				param string
				value int
			}{
				{"port-c", int(p.ra.Ports.UC)},
				{"port-s", int(p.ra.Ports.US)},
				{"spi-c", int(p.ra.SPIs.UC)},
				{"spi-s", int(p.ra.SPIs.US)},
			} {
				s.send(t, lab.PortClear, s.register(f.subs[63], fmt.Sprintf("stranger-spi-%d", n), func(m *sipwire.Message) {
					changeParam(m, "Security-Client", set.param, func(string) string { return strconv.Itoa(set.value) })
				}))
				s.wantStatus(t, 403)
			}
			// At its own address a phone may use the same ports as another.
			u := f.newUE(t, udp, func(c *ue.Config) { c.PortUC, c.PortUS = p.ra.Ports.UC, p.ra.Ports.US })
			f.mustRegister(ctx, t, u)
			f.mustMessage(ctx, t, u, p.aURI)
		}},
		{"replayed and truncated ESP", func(_ context.Context, t *testing.T, h *thief) { h.attack(t) }},
		{"replayed and truncated ESP during a call", func(ctx context.Context, t *testing.T, h *thief) {
			invites := func() (n int) {
				for _, in := range p.b.Received() {
					if in.Method == "INVITE" {
						n++
					}
				}
				return n
			}
			before := invites()
			done := make(chan error, 1)
			go func() {
				_, err := p.a.Call(ctx, p.bURI, ue.CallOptions{PRACK: true, ReInvite: true, Hold: 500 * time.Millisecond})
				done <- err
			}()
			if !eventually(ctx, 5*time.Second, func() bool { return invites() > before }) {
				t.Error("the call does not begin")
			}
			h.attack(t)
			if err := <-done; err != nil {
				t.Errorf("call: %v", err)
			}
		}},
		{"REGISTER with 500 Security-Client entries", func(ctx context.Context, t *testing.T, h *thief) {
			s := clear(t, 40)
			many := func(m *sipwire.Message) {
				m.Set("Security-Client", strings.Repeat(securityClient+", ", 499)+securityClient)
			}
			s.send(t, lab.PortClear, s.register(f.subs[62], "stranger-many", many))
			s.wantStatus(t, 400)
			s.send(t, lab.PortClear, s.register(f.subs[62], "stranger-rows", func(m *sipwire.Message) {
				for range 499 {
					m.Add("Security-Client", "ipsec-3gpp;alg=hmac-sha-1-96;spi-c=1000;spi-s=1001;port-c=31000;port-s=31001")
				}
			}))
			s.wantStatus(t, 400)
			own := &stranger{f: f, addr: netip.AddrPortFrom(f.lab.Plan().UE(h.index), h.reg.Ports.US)}
			refused := f.metric(ctx, t, "sip_rejected_total", `reason="bad_security_client"`)
			msg := own.register(f.subs[h.index], "own-many", func(m *sipwire.Message) { // within the MTU of the TUN
				m.Set("Security-Client", strings.Repeat("ipsec-3gpp;q=1, ", 499)+"ipsec-3gpp;q=1")
			})
			if err := h.SendRaw(true, ims.UDP, h.reg.Ports.UC, h.reg.Ports.PS, []byte(msg)); err != nil {
				t.Fatal(err)
			}
			if !eventually(ctx, time.Second, func() bool {
				return f.metric(ctx, t, "sip_rejected_total", `reason="bad_security_client"`) > refused
			}) {
				t.Error("500 entries over an SA are not refused")
			}
		}},
		{"flood of contacts over its own SA", func(ctx context.Context, t *testing.T, h *thief) {
			f.core.SetBehaviour(core.Behaviour{Silent: true})
			defer f.core.SetBehaviour(core.Behaviour{})
			busy := f.metric(ctx, t, "sip_rejected_total", `reason="busy"`)
			own := &stranger{f: f, addr: netip.AddrPortFrom(f.lab.Plan().UE(h.index), h.reg.Ports.US)}
			for n := range 300 {
				msg := own.register(f.subs[h.index], fmt.Sprintf("own-contacts-%d", n), func(m *sipwire.Message) {
					m.Del("Security-Client")
					m.Set("Contact", strings.TrimSuffix(strings.Repeat(fmt.Sprintf("<sip:c%d@%s>, ", n, own.addr), 1+n%50), ", "))
				})
				if err := h.SendRaw(true, ims.UDP, h.reg.Ports.UC, h.reg.Ports.PS, []byte(msg)); err != nil {
					t.Fatal(err)
				}
			}
			if !eventually(ctx, 5*time.Second, func() bool { return f.metric(ctx, t, "sip_rejected_total", `reason="busy"`) > busy }) {
				t.Error("the phone may begin any number of registrations")
			}
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ctx := timed(t)
			h := &thief{f: f, index: f.next, pair: p, file: file}
			h.UE = f.newUE(t, udp)
			h.reg = f.mustRegister(ctx, t, h.UE)
			tt.attack(ctx, t, h.as(t, f.lab.Plan().UE(h.index)))
			f.mustMessage(ctx, t, p.a, p.bURI)
			f.mustMessage(ctx, t, p.b, p.aURI)
			if status, err := f.core.SendMessage(ctx, p.aURI, "still there?"); err != nil || status != 200 {
				t.Errorf("MESSAGE of the network: %d, %v", status, err)
			}
			if res, err := p.b.Call(ctx, p.aURI, ue.CallOptions{PRACK: true}); err != nil || res.Status != 200 {
				t.Errorf("call: %d, %v", res.Status, err)
			}
			u := f.newUE(t, udp)
			f.mustRegister(ctx, t, u)
			f.mustMessage(ctx, t, u, p.aURI)
		})
	}
	checkPhones(t, p.a, p.b)
}
