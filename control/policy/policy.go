// Package policy decides what a phone may do and what it is offered when it registers: which rule of the operator fits its
// REGISTER, and with it whether the security agreement is required, allowed or forbidden (TS 33.203 Annex P,
// TS 24.229 §5.2.2.1), which algorithms and protected ports it gets, and over which transports.
//
// Rules are compiled once and tried in order; the first that fits wins, and where none does the default settings hold.
// Realm, private identity and User-Agent are what the phone says of itself: nobody has proved them when a REGISTER in
// clear is looked at, so a rule that lowers the protection of some phones should name their source as well.
//
// Concurrency: Rules are read-only and safe for concurrent use. Match is called for a REGISTER only, never for another
// message.
package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/gmgate/gmgate/control/ims"
)

// Mode says what becomes of the security agreement with ipsec-3gpp.
type Mode uint8

// Modes.
const (
	Require Mode = iota + 1 // a REGISTER without it is answered 421 (RFC 3329 §2.3.1)
	Allow                   // taken if offered; without it the REGISTER passes in clear
	Forbid                  // an offer is ignored, every REGISTER passes in clear
)

// String names the mode as the configuration does.
func (m Mode) String() string {
	switch m {
	case Require:
		return "require"
	case Allow:
		return "allow"
	case Forbid:
		return "forbid"
	}
	return fmt.Sprintf("Mode(%#x)", uint8(m))
}

// Settings are what a rule decides.
type Settings struct {
	IPsec Mode
	GIBA  bool // a REGISTER without Authorization may be accepted without a challenge (TS 33.203 Annex T)

	Suites      []ims.Suite   // in the order of preference
	ServerPorts []uint16      // port-ps, in the order of preference
	ClientPorts []uint16      // port-pc
	AwaitAuth   time.Duration // life of a temporary SA set

	Clear     []ims.Transport // of a REGISTER in clear; empty: any
	Protected []ims.Transport // of a REGISTER over a security association; empty: any

	Requests        ims.Transport // of requests to the phone; zero: by the rules of TS 33.203 and RFC 3261 §18.1.1
	OwnConnection   bool          // requests to the phone go on connections that we opened only
	AnswersToSource bool          // UDP answers follow rport: from port-ps to port-uc
}

// MayRegister reports whether a REGISTER may come over a transport.
func (s *Settings) MayRegister(t ims.Transport, protected bool) bool {
	list := s.Clear
	if protected {
		list = s.Protected
	}
	return len(list) == 0 || slices.Contains(list, t)
}

// Match says which REGISTER requests a rule is for. Empty fields fit all. Realm, IMPI and UserAgent are patterns in which
// * stands for any text and ? for any one octet; case does not matter.
type Match struct {
	Realm, IMPI, UserAgent string
	Source                 []netip.Prefix
}

// Rule is a match and its settings.
type Rule struct {
	Match
	Settings
}

// Request is what rules look at.
type Request struct {
	Realm     string // of Authorization, else the domain of To
	IMPI      string
	UserAgent string
	Source    netip.Addr
}

// longest is how much of a text is compared: what is longer was written to be slow to compare.
const longest = 512

// Rules are compiled rules.
type Rules struct {
	rules    []Rule
	fallback Settings
	clear    bool
}

// Compile prepares rules. fallback holds where none fits.
func Compile(fallback Settings, rules ...Rule) *Rules {
	r := &Rules{fallback: fallback, clear: fallback.IPsec != Require}
	for _, rule := range rules {
		rule.Realm, rule.IMPI, rule.UserAgent = lower(rule.Realm), lower(rule.IMPI), lower(rule.UserAgent)
		r.rules = append(r.rules, rule)
		r.clear = r.clear || rule.IPsec != Require
	}
	return r
}

// Match returns the settings for a REGISTER.
func (r *Rules) Match(q Request) *Settings {
	if len(r.rules) == 0 {
		return &r.fallback
	}
	realm, impi, agent := lower(q.Realm), lower(q.IMPI), lower(q.UserAgent)
	source := q.Source.Unmap()
	for i := range r.rules {
		m := &r.rules[i].Match
		if !fits(m.Realm, realm) || !fits(m.IMPI, impi) || !fits(m.UserAgent, agent) {
			continue
		}
		if len(m.Source) > 0 && !slices.ContainsFunc(m.Source, func(p netip.Prefix) bool { return p.Contains(source) }) {
			continue
		}
		return &r.rules[i].Settings
	}
	return &r.fallback
}

// Clear reports whether any phone at all may register in clear.
func (r *Rules) Clear() bool { return r.clear }

// Offers reports whether any phone at all may get an algorithm pair.
func (r *Rules) Offers(s ims.Suite) bool {
	return slices.Contains(r.fallback.Suites, s) || slices.ContainsFunc(r.rules, func(rule Rule) bool {
		return slices.Contains(rule.Suites, s)
	})
}

func lower(s string) string { return strings.ToLower(s[:min(len(s), longest)]) }

func fits(pattern, text string) bool { return pattern == "" || glob(pattern, text) }

// glob matches a pattern. A star that was too short is made longer, the last one only: that finds a match if there is one.
func glob(pattern, text string) bool {
	p, t := 0, 0
	star, from := -1, 0
	for t < len(text) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, from = p, t
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == text[t]):
			p, t = p+1, t+1
		case star >= 0:
			from++
			p, t = star+1, from
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}
