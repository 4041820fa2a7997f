package secagree

import (
	"errors"
	"slices"
	"strconv"

	"github.com/gmgate/gmgate/control/ims"
)

// Offer is what Select chose from a Security-Client header. SPIs and ports are those of the chosen entry, as each entry
// stands alone.
type Offer struct {
	Suite ims.Suite
	SPIC  ims.SPI
	SPIS  ims.SPI
	PortC uint16
	PortS uint16

	Mechanism Mechanism   // the chosen entry
	Offered   []ims.Suite // suites of all usable entries, without repetition, in the order of the UE
}

// Select takes the first of our suites which a usable ipsec-3gpp entry of the client offers; of several such entries the
// first. Our list is authoritative: q values of the client do not matter (RFC 3329 §2.3.1, TS 33.203 §7.2).
//
// The error matches ErrNoIPsec, ErrMalformed (and ErrBadValue), or ErrNoCommonAlgorithm, and names the parameter at
// which the first entry failed.
func Select(client List, suites []ims.Suite) (Offer, error) {
	var malformed, unsupported *Error
	var usable *Mechanism // first usable entry
	found := false
	o := Offer{}
	best := len(suites)
	for i := range client.Mechanisms {
		m := &client.Mechanisms[i]
		switch {
		case !m.IPsec():
			continue
		case m.fault == nil:
			s := m.Suite()
			if usable == nil {
				usable = m
			}
			if !slices.Contains(o.Offered, s) {
				o.Offered = append(o.Offered, s)
			}
			if k := slices.Index(suites, s); k >= 0 && k < best {
				best = k
				o.Mechanism = *m
			}
		case errors.Is(m.fault.kind, ErrNoCommonAlgorithm):
			if unsupported == nil {
				unsupported = m.fault
			}
		default:
			if malformed == nil {
				malformed = m.fault
			}
		}
		found = true
	}
	switch {
	case !found:
		return Offer{}, &Error{kind: ErrNoIPsec}
	case best < len(suites):
		o.Suite = o.Mechanism.Suite()
		o.SPIC, o.SPIS = o.Mechanism.SPIC, o.Mechanism.SPIS
		o.PortC, o.PortS = o.Mechanism.PortC, o.Mechanism.PortS
		return o, nil
	case usable != nil:
		return Offer{}, &Error{
			Entry: usable.Entry, Param: paramAlg, kind: ErrNoCommonAlgorithm,
			Reason: usable.Alg.String() + " with ealg " + usable.EncAlg.String() + " is not accepted",
		}
	case unsupported != nil:
		return Offer{}, unsupported
	}
	return Offer{}, malformed
}

// ServerSuites returns the suites for Security-Server, in order of preference.
//
// Without list that is the chosen one alone, which every handset understands. With list it is our whole list, which the
// UE mirrors under integrity protection so that bidding down shows (RFC 3329 §5). As the UE takes the first entry it
// supports (TS 33.203 §7.2), a pair in front of the chosen one is listed only if the UE did not offer it; an unusable
// entry counts as offered here, since it shows that the UE supports the pair.
func ServerSuites(chosen ims.Suite, ours []ims.Suite, client List, list bool) []ims.Suite {
	if !list {
		return []ims.Suite{chosen}
	}
	out := make([]ims.Suite, 0, len(ours)+1)
	passed := !slices.Contains(ours, chosen) // then it has no place of its own and goes first
	if passed {
		out = append(out, chosen)
	}
	for _, s := range ours {
		if s == chosen {
			passed = true
		}
		if !s.Legal() || slices.Contains(out, s) || !passed && client.mentions(s) {
			continue
		}
		out = append(out, s)
	}
	return out
}

// mentions reports whether any ipsec-3gpp entry names the suite.
func (l List) mentions(s ims.Suite) bool {
	for i := range l.Mechanisms {
		if m := &l.Mechanisms[i]; m.IPsec() && m.Suite() == s {
			return true
		}
	}
	return false
}

// Equal compares two headers that must carry the same agreement: Security-Verify with the Security-Server it mirrors,
// or the Security-Client of SM7 with that of SM1 (RFC 3329 §2.3.1, TS 33.203 §7.3.2.3). It returns nil, or an error that
// matches ErrMismatch and names the first differing entry, counted without media plane entries, and parameter.
//
// The same number of entries must be there, each with the same parameters: names and tokens compared without case,
// numbers and q as numbers, omitted prot, mod and ealg as their defaults, unknown parameters as text. Order counts
// within a header row but not between rows, and how entries are spread over rows does not matter: two entries may swap
// places if at least one side has them in different rows. Media plane entries are ignored. Of several identical entries
// the first ones are taken to correspond.
func Equal(a, b List) error {
	ma, mb := a.signalling(), b.signalling()
	if len(ma) != len(mb) {
		return &Error{
			Reason: strconv.Itoa(len(mb)) + " entries instead of " + strconv.Itoa(len(ma)),
			kind:   ErrMismatch,
		}
	}
	first := -1 // first place where the two differ
	for i := range ma {
		if !same(ma[i], mb[i]) {
			first = i
			break
		}
	}
	if first < 0 {
		return nil
	}

	// Not the same sequence, but perhaps the same entries with rows in another order. Both lists are short.
	place := make([]int, len(ma)) // where in b the entry of a is
	taken := make([]bool, len(mb))
	for i := range ma {
		place[i] = -1
		for j := range mb {
			if !taken[j] && same(ma[i], mb[j]) {
				place[i], taken[j] = j, true
				break
			}
		}
		if place[i] < 0 {
			param, reason := difference(ma[first], mb[first])
			return &Error{Entry: first + 1, Param: param, Reason: reason, kind: ErrMismatch}
		}
	}
	for i := range ma {
		for k := i + 1; k < len(ma); k++ {
			if ma[i].Row == ma[k].Row && mb[place[i]].Row == mb[place[k]].Row && place[i] > place[k] {
				return &Error{Entry: i + 1, Reason: "is in another order", kind: ErrMismatch}
			}
		}
	}
	return nil
}

// signalling returns the entries that take part in a comparison.
func (l List) signalling() []*Mechanism {
	out := make([]*Mechanism, 0, len(l.Mechanisms))
	for i := range l.Mechanisms {
		if !l.Mechanisms[i].Mediasec {
			out = append(out, &l.Mechanisms[i])
		}
	}
	return out
}

// same compares normalised entries.
func same(a, b *Mechanism) bool {
	return a.Name == b.Name && a.raw == b.raw && slices.Equal(a.canon, b.canon)
}

// difference names the first parameter, in canonical order, in which two unequal entries differ.
func difference(a, b *Mechanism) (param, reason string) {
	if a.Name != b.Name {
		return "", "is another mechanism"
	}
	if a.raw != b.raw {
		return "", "is another text"
	}
	for i := 0; i < len(a.canon) || i < len(b.canon); i++ {
		switch {
		case i == len(a.canon):
			return showToken(b.canon[i].Name), "added"
		case i == len(b.canon):
			return showToken(a.canon[i].Name), "missing"
		case a.canon[i] == b.canon[i]:
			continue
		case a.canon[i].Name == b.canon[i].Name:
			return showToken(a.canon[i].Name), "differs"
		case compareParams(a.canon[i], b.canon[i]) < 0:
			return showToken(a.canon[i].Name), "missing"
		default:
			return showToken(b.canon[i].Name), "added"
		}
	}
	return "", "differs"
}

// Server is what the P-CSCF answers: its SPIs and ports, the same in every entry, and its suites in order of preference
// (TS 33.203 §7.2).
type Server struct {
	SPIC   ims.SPI
	SPIS   ims.SPI
	PortC  uint16
	PortS  uint16
	Suites []ims.Suite
}

// Append appends the value of the Security-Server header to dst: one comma list with q strictly decreasing and every
// parameter spelled out, since handsets differ in the defaults they assume.
func (s Server) Append(dst []byte) []byte {
	// There are eight legal suites, so steps of 0.1 from 0.9 normally do.
	const top, wide = 900, 100
	step := wide
	if n := len(s.Suites); n > top/wide {
		step = max(top/n, 1)
	}
	for i, suite := range s.Suites {
		if i > 0 {
			dst = append(dst, ", "...)
		}
		dst = append(dst, IPsec+";q="...)
		dst = appendQ(dst, uint16(max(top-i*step, 0)))
		dst = append(dst, ";alg="...)
		dst = append(dst, suite.Alg.String()...)
		dst = append(dst, ";ealg="...)
		dst = append(dst, suite.Enc.String()...)
		dst = append(dst, ";prot="+ProtESP+";mod="+ModTrans+";spi-c="...)
		dst = strconv.AppendUint(dst, uint64(s.SPIC), 10)
		dst = append(dst, ";spi-s="...)
		dst = strconv.AppendUint(dst, uint64(s.SPIS), 10)
		dst = append(dst, ";port-c="...)
		dst = strconv.AppendUint(dst, uint64(s.PortC), 10)
		dst = append(dst, ";port-s="...)
		dst = strconv.AppendUint(dst, uint64(s.PortS), 10)
	}
	return dst
}
