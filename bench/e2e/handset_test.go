package e2e

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gmgate/gmgate/bench/core"
	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/bench/ue"
	"github.com/gmgate/gmgate/control/ims"
)

// TestHandsets registers phones with one habit of real ones each, and has them talk in both directions.
//
// Peers: A4.07, A4.17e, C2.11
func TestHandsets(t *testing.T) {
	f := start(t, fixtureConfig{core: handsetCore})
	null := []ims.Suite{{Alg: ims.AlgHMACSHA1, Enc: ims.EncNull}, {Alg: ims.AlgHMACMD5, Enc: ims.EncNull}}
	tests := []struct {
		name   string
		change func(*ue.Config)
	}{
		{"one row per offer, zero-padded SPIs", func(c *ue.Config) { c.Quirks.RowPerOffer, c.Quirks.ZeroPadSPI = true, true }},
		{"no prot, no mod", func(c *ue.Config) { c.Quirks.OmitProtMod = true }},
		{"ealg left out for null", func(c *ue.Config) { c.Offers, c.Quirks.OmitNullEalg = null, true }},
		{"blanks everywhere", func(c *ue.Config) { c.Quirks.Spaces = true }},
		{"media plane security", func(c *ue.Config) { c.Quirks.ExtraOffer = "sdes-srtp;mediasec" }},
		{"merged ealg value", func(c *ue.Config) { c.Quirks.ExtraOffer = "null" }},
		{"Security-Verify printed anew", func(c *ue.Config) { c.Quirks.VerifyPerRow = true }},
		{"rport in protected requests (T13)", func(c *ue.Config) { c.Quirks.RportProtected, c.Quirks.LargeUDP = true, true }},
		{"auth-int", func(c *ue.Config) { c.Quirks.AuthInt = true }},
		{"SM1 by UDP, the rest by TCP", func(c *ue.Config) { c.Quirks.SM7Transport = ims.TCP }},
		{"SM1 by TCP, the rest by UDP", func(c *ue.Config) { c.Transport, c.Quirks.SM7Transport, c.Quirks.LargeUDP = ims.TCP, ims.UDP, true }},
		{"no TCP listener", func(c *ue.Config) { c.Quirks.NoTCPListener, c.Quirks.LargeUDP = true, true }},
		{"odd Contact port", func(c *ue.Config) { c.Quirks.ContactPort, c.Quirks.LargeUDP = 5070, true }},
		{"all eight offers", func(c *ue.Config) { c.Offers = ims.Suites() }},
		{"only hmac-md5-96 with null", func(c *ue.Config) { c.Offers = null[1:] }},
		{"SM1 from port 5060", func(c *ue.Config) { c.ClearPort = 5060 }},
	}
	peer := f.newUE(t, func(c *ue.Config) { c.Offers = f.offers(1) })
	peerURI := f.subs[0].IMPU[0]
	f.mustRegister(timed(t), t, peer)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ctx := timed(t)
			uri := f.subs[f.next].IMPU[0]
			u := f.newUE(t, func(c *ue.Config) { c.Offers = f.offers(2); tt.change(c) })
			f.mustRegister(ctx, t, u)
			f.habits(ctx, t, &end{u: u, uri: uri}, &end{u: peer, uri: peerURI})
		})
	}
	t.Run("no SA left", func(t *testing.T) {
		ctx := timed(t)
		if err := peer.Deregister(ctx); err != nil {
			t.Error(err)
		}
		f.wantNoSets(ctx, t)
	})
}

// handsetCore offers auth-int beside auth, which some phones take, and challenges with several rows.
var handsetCore = core.Behaviour{QOP: "auth,auth-int", ExtraChallenges: true}

// habits has a registered phone do all that its manner of writing may matter for, and de-registers it.
func (f *fixture) habits(ctx context.Context, t *testing.T, e, peer *end) {
	t.Helper()
	f.mustMessage(ctx, t, e.u, peer.uri)
	f.mustMessage(ctx, t, peer.u, e.uri)
	if status, err := f.core.SendMessage(ctx, e.uri, strings.Repeat("y", largeBody)); err != nil || status != 200 {
		t.Errorf("large MESSAGE of the network: %d, %v", status, err)
	}
	for _, c := range []struct{ from, to *end }{{e, peer}, {peer, e}} {
		if res, err := c.from.u.Call(ctx, c.to.uri, ue.CallOptions{PRACK: true}); err != nil || res.Status != 200 {
			t.Errorf("call %s: %v, %v", c.to.uri, res.Statuses, err)
		}
	}
	// A phone that gets no NOTIFY leaves the network again after a while (R8.25 of the handset notes).
	if res, err := e.u.Subscribe(ctx, "reg"); err != nil || !strings.Contains(res.Notify.Body, e.uri) {
		t.Errorf("reg event: %d, %v", res.Status, err)
	}
	again := f.core.Behaviour()
	again.AlwaysChallenge = true
	f.behave(again, func() {
		if _, err := e.u.Reregister(ctx); err != nil {
			t.Error(err)
		}
	})
	f.mustMessage(ctx, t, e.u, peer.uri)
	f.mustMessage(ctx, t, peer.u, e.uri)
	if err := e.u.Deregister(ctx); err != nil {
		t.Error(err)
	}
	checkPhones(t, e.u, peer.u)
}

// Suites of the handsets.
var (
	sha1AES = ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC}
	md5Null = ims.Suite{Alg: ims.AlgHMACMD5, Enc: ims.EncNull}
	gcm     = ims.Suite{Alg: ims.AlgNull, Enc: ims.EncAESGCM}
)

// handsets are the phones whose REGISTER stands in testdata/handsets, with what a text cannot say: which transport they
// take for what, and what is agreed on with them.
var handsets = map[string]struct {
	want   ims.Suite
	change func(*ue.Config)
	idle   bool // closes its connections whenever it is idle
}{
	"samsung": {sha1AES, func(c *ue.Config) {
		samsung(c)
		c.Quirks.AuthInt = true
	}, false},
	"samsung-old": {md5Null, byUDP, false},
	"apple": {gcm, func(c *ue.Config) {
		apple(c)
		c.Quirks.VerifyPerRow = true
	}, true},
	"pixel": {sha1AES, func(c *ue.Config) {
		c.Quirks.AdjacentSPIs, c.Quirks.RportProtected = true, true
	}, false},
	"xiaomi": {sha1AES, byTCP, true},
	"mediatek": {sha1AES, func(c *ue.Config) {
		c.PortUC, c.PortUS, c.ClearPort = 31500, 31501, 5072
		if setting(envUE, ue.Userspace) == ue.Userspace { // one socket per port where both sides are one namespace
			c.ClearPort = c.PortUS
		}
	}, false},
	"aosp": {sha1AES, func(c *ue.Config) { c.Quirks.AdjacentSPIs, c.PortUC, c.PortUS = true, 31400, 31401 }, false},
}

// TestHandsetGoldens registers each make of phone with its own REGISTER, word for word, and lives through what it does
// afterwards; then it is switched off without a word, and comes back.
func TestHandsetGoldens(t *testing.T) {
	files, err := filepath.Glob(filepath.Join("testdata", "handsets", "*.sip"))
	if err != nil || len(files) != len(handsets) {
		t.Fatalf("%d files for %d handsets: %v", len(files), len(handsets), err)
	}
	for _, v6 := range []bool{false, true} {
		f := start(t, fixtureConfig{ipv6: v6, core: handsetCore})
		peer := f.phone(timed(t), t)
		for _, file := range files {
			name := strings.TrimSuffix(filepath.Base(file), ".sip")
			h, ok := handsets[name]
			if !ok {
				t.Fatalf("nothing is known of %s", file)
			}
			t.Run(name+" over "+family(v6), func(t *testing.T) {
				ctx := timed(t)
				text, err := os.ReadFile(file) //nolint:gosec // the test's own data
				if err != nil {
					t.Fatal(err)
				}
				style, err := ue.ParseLayout(string(text))
				if err != nil {
					t.Fatal(err)
				}
				i := f.take(t)
				cfg := f.configOf(i)
				cfg.Quirks.RegisterStyle = style
				h.change(&cfg)
				e := f.endOf(t, i, cfg)
				idle := func() {
					if h.idle {
						e.u.CloseConnections()
					}
				}
				for range 2 {
					seen := len(f.capture.Clear())
					if res := f.mustRegister(ctx, t, e.u); res.Suite != h.want {
						t.Errorf("agreed on %s, want %s", res.Suite, h.want)
					}
					f.wantLayout(ctx, t, seen, style)
					idle()
					f.mustMessage(ctx, t, peer.u, e.uri)
					idle()
					f.mustMessage(ctx, t, e.u, peer.uri)
					e.u.Reboot()
				}
				f.mustRegister(ctx, t, e.u)
				f.habits(ctx, t, e, peer)
			})
		}
		t.Run("no SA left over "+family(v6), func(t *testing.T) {
			ctx := timed(t)
			if err := peer.u.Deregister(ctx); err != nil {
				t.Error(err)
			}
			f.wantNoSets(ctx, t)
		})
	}
}

// wantLayout compares the REGISTER in clear that was captured after the first so many messages with the layout of the
// phone: the same headers, written the same way, in the same order.
func (f *fixture) wantLayout(ctx context.Context, t *testing.T, seen int, style *ue.Layout) {
	t.Helper()
	var register []byte
	if !eventually(ctx, caseTimeout, func() bool {
		for _, c := range f.capture.Clear()[seen:] {
			if c.Method == "REGISTER" {
				register = c.Payload
			}
		}
		return register != nil
	}) {
		t.Fatal("no REGISTER was captured")
	}
	m, err := sipwire.Parse(register)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, h := range m.Headers {
		if h.Name != "Via" && h.Name != "Content-Length" {
			names = append(names, h.Name)
		}
	}
	if want := style.Names(); !slices.Equal(names, want) {
		t.Errorf("REGISTER with %v, want %v", names, want)
	}
}
