package policy

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/gmgate/gmgate/control/ims"
)

func TestGlob(t *testing.T) {
	for _, c := range []struct {
		pattern, text string
		want          bool
	}{
		{"", "", true},
		{"*", "", true},
		{"*", "anything", true},
		{"a", "", false},
		{"?", "", false},
		{"?", "x", true},
		{"00101*@ims", "001010000000001@ims", true},
		{"00101*@ims", "001020000000001@ims", false},
		{"*@ims*", "x@ims.example", true},
		{"*a*b*c", "xxaxxbxxbxxc", true},
		{"*a*b*c", "xxaxxcxxbxx", false},
		{"a?c*", "abc", true},
		{"a?c*", "ac", false},
		{"abc", "abcd", false},
		{"*abc", "ababc", true},
		{"**", "x", true},
	} {
		if got := glob(c.pattern, c.text); got != c.want {
			t.Errorf("glob(%q, %q) = %v", c.pattern, c.text, got)
		}
	}
}

// The first rule that fits wins, and every key of a rule must fit.
func TestMatch(t *testing.T) {
	rule := func(name uint16, m Match) Rule {
		return Rule{m, Settings{IPsec: Require, ServerPorts: []uint16{name}}}
	}
	lab := []netip.Prefix{netip.MustParsePrefix("10.45.0.0/16"), netip.MustParsePrefix("2001:db8::/32")}
	r := Compile(Settings{IPsec: Require, ServerPorts: []uint16{0}},
		rule(1, Match{Realm: "IMS.example", Source: lab}),
		rule(2, Match{IMPI: "00101*@*"}),
		rule(3, Match{UserAgent: "*samsung*"}),
		rule(4, Match{Source: lab}),
	)
	inside, outside := netip.MustParseAddr("10.45.0.7"), netip.MustParseAddr("192.0.2.1")
	for name, c := range map[string]struct {
		q    Request
		want uint16
	}{
		"realm and source":    {Request{Realm: "ims.EXAMPLE", IMPI: "001010@x", Source: inside}, 1},
		"v6 source":           {Request{Realm: "ims.example", Source: netip.MustParseAddr("2001:db8::7")}, 1},
		"mapped source":       {Request{Realm: "ims.example", Source: netip.MustParseAddr("::ffff:10.45.0.7")}, 1},
		"realm alone":         {Request{Realm: "ims.example", IMPI: "001010@x", Source: outside}, 2},
		"user agent":          {Request{UserAgent: "SM-G991B SAMSUNG IMS 6.0", Source: inside}, 3},
		"source":              {Request{IMPI: "00202@x", UserAgent: "iOS", Source: inside}, 4},
		"none":                {Request{IMPI: "00202@x", Source: outside}, 0},
		"long text is cut":    {Request{UserAgent: strings.Repeat("a", 100000) + "samsung", Source: outside}, 0},
		"nothing but a realm": {Request{Realm: "ims.example.org", Source: outside}, 0},
	} {
		if got := r.Match(c.q).ServerPorts[0]; got != c.want {
			t.Errorf("%s: rule %d, want %d", name, got, c.want)
		}
	}
	if r.Clear() {
		t.Error("rules that all require IPsec allow registrations in clear")
	}
	if !Compile(Settings{IPsec: Require}, Rule{Settings: Settings{IPsec: Allow}}).Clear() || !Compile(Settings{IPsec: Forbid}).Clear() {
		t.Error("allow or forbid does not count as clear")
	}
}

func TestMayRegister(t *testing.T) {
	s := Settings{Clear: []ims.Transport{ims.UDP}, Protected: []ims.Transport{ims.TCP}}
	if !s.MayRegister(ims.UDP, false) || s.MayRegister(ims.TCP, false) || s.MayRegister(ims.UDP, true) || !s.MayRegister(ims.TCP, true) {
		t.Error("transports are mixed up")
	}
	if any := new(Settings); !any.MayRegister(ims.UDP, true) || !any.MayRegister(ims.TCP, false) {
		t.Error("no list refuses something")
	}
}

func TestModeString(t *testing.T) {
	for m, want := range map[Mode]string{Require: "require", Allow: "allow", Forbid: "forbid", 9: "Mode(0x9)"} {
		if got := m.String(); got != want {
			t.Errorf("%d: %q", m, got)
		}
	}
}
