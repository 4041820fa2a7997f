package secagree

import (
	"cmp"
	"errors"
	"slices"
	"strconv"
	"strings"

	"github.com/gmgate/gmgate/control/ims"
)

// Specification constants.
const (
	// IPsec is the mechanism name of TS 33.203 Annex H.
	IPsec = "ipsec-3gpp"

	// ProtESP is the only protocol of IMS (TS 33.203 §7.1) and the default of "prot" (TS 33.203 Annex H).
	ProtESP = "esp"

	// ModTrans is transport mode, the default of "mod" (TS 33.203 Annex H).
	ModTrans = "trans"

	// MaxQ is the largest q value, 1, in thousandths (RFC 3261 §25.1, qvalue).
	MaxQ = 1000
)

// Implementation constants: bounds of what Parse reads. Handsets have been seen to send up to twelve combinations of
// ten parameters and 150 bytes each.
const (
	MaxMechanisms = 64
	MaxParams     = 32
	MaxBytes      = 16384
)

// Names of the ipsec-3gpp parameters (TS 33.203 Annex H) and of the media plane marker (TS 24.229 §7.2A.7).
const (
	paramQ        = "q"
	paramAlg      = "alg"
	paramEncAlg   = "ealg"
	paramProt     = "prot"
	paramMod      = "mod"
	paramSPIC     = "spi-c"
	paramSPIS     = "spi-s"
	paramPortC    = "port-c"
	paramPortS    = "port-s"
	paramMediasec = "mediasec"
)

// order is the canonical order of the known parameters.
var order = [...]string{paramQ, paramAlg, paramEncAlg, paramProt, paramMod, paramSPIC, paramSPIS, paramPortC, paramPortS}

// rank returns the place of a parameter in the canonical order; unknown ones come last.
func rank(name string) int {
	for i, n := range order {
		if n == name {
			return i
		}
	}
	return len(order)
}

// Param is one parameter of a mechanism. Name is lower case; Value is without quotes and escapes.
type Param struct {
	Name     string
	Value    string
	HasValue bool // distinguishes "name=" from "name"
}

// compareParams is the canonical order.
func compareParams(a, b Param) int {
	if c := cmp.Compare(rank(a.Name), rank(b.Name)); c != 0 {
		return c
	}
	if c := strings.Compare(a.Name, b.Name); c != 0 {
		return c
	}
	if a.HasValue != b.HasValue {
		if b.HasValue {
			return -1
		}
		return 1
	}
	return strings.Compare(a.Value, b.Value)
}

// Mechanism is one sec-mechanism as Parse read it. For ipsec-3gpp the parameters are interpreted and absent ones have
// their defaults (TS 33.203 Annex H); for every other mechanism only Q and Mediasec are, and the rest is in Params.
type Mechanism struct {
	Name  string // lower case; empty when the entry does not even begin with a token
	Entry int    // 1 for the first mechanism of the header, counted over all rows
	Row   int    // index of the header row it stood in

	Q    uint16 // thousandths; see Preference
	HasQ bool

	Alg         ims.Alg    // zero when the token is unknown
	EncAlg      ims.EncAlg // zero when the token is unknown; EncNull when absent
	AlgToken    string     // as received, lower case
	EncAlgToken string     // as received, lower case; "null" when absent
	Prot        string     // lower case; "esp" when absent
	Mod         string     // lower case; "trans" when absent
	SPIC        ims.SPI
	SPIS        ims.SPI
	PortC       uint16
	PortS       uint16

	Params   []Param // parameters not interpreted above, in order of appearance
	Mediasec bool    // a media plane mechanism (TS 24.229 §7.2A.7): never selected, never compared

	canon []Param // every parameter normalised, with defaults, in canonical order
	raw   string  // the text of an entry whose parameters can not be told apart; canon is empty then
	fault *Error  // why the entry can not be selected
}

// IPsec reports whether this is an ipsec-3gpp entry for signalling, usable or not.
func (m *Mechanism) IPsec() bool { return m.Name == IPsec && !m.Mediasec }

// Usable reports whether the entry is an ipsec-3gpp one that could be selected if its suite is accepted.
func (m *Mechanism) Usable() bool { return m.IPsec() && m.fault == nil }

// Problem says why an ipsec-3gpp entry is not usable; it is nil for usable entries and for other mechanisms. It matches
// ErrMalformed, ErrBadValue or, for what is well-formed but not supported, ErrNoCommonAlgorithm.
func (m *Mechanism) Problem() error {
	if !m.IPsec() || m.fault == nil {
		return nil
	}
	return m.fault
}

// Suite returns the algorithm pair, which is not legal when a token is unknown.
func (m *Mechanism) Suite() ims.Suite { return ims.Suite{Alg: m.Alg, Enc: m.EncAlg} }

// Preference returns q in thousandths, and 1 for an entry without q, so that order of appearance decides among those.
func (m *Mechanism) Preference() uint16 {
	if !m.HasQ {
		return MaxQ
	}
	return m.Q
}

// ReservedSPI reports whether a SPI is in 1..255, which RFC 4303 §2.1 reserves. Such an entry is usable, but worth a
// warning.
func (m *Mechanism) ReservedSPI() bool {
	return m.IPsec() && (m.SPIC != 0 && m.SPIC < ims.MinSPI || m.SPIS != 0 && m.SPIS < ims.MinSPI)
}

// String returns the canonical text: lower case, parameters in a fixed order, defaults spelled out.
func (m *Mechanism) String() string {
	if m.raw != "" {
		return m.raw
	}
	b := append(make([]byte, 0, 160), m.Name...)
	for _, p := range m.canon {
		b = append(b, ';')
		b = append(b, p.Name...)
		if p.HasValue {
			b = appendValue(append(b, '='), p.Value)
		}
	}
	return string(b)
}

// List is every mechanism of one header, over all its rows (RFC 3261 §7.3.1). Lists are made by Parse.
type List struct {
	Mechanisms []Mechanism
}

// IPsecCount returns how many ipsec-3gpp entries for signalling there are, usable or not.
func (l List) IPsecCount() int {
	n := 0
	for i := range l.Mechanisms {
		if l.Mechanisms[i].IPsec() {
			n++
		}
	}
	return n
}

// String returns the canonical text of the header as one row. Parse reads it back to an equal list.
func (l List) String() string {
	var b strings.Builder
	for i := range l.Mechanisms {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(l.Mechanisms[i].String())
	}
	return b.String()
}

// interpret fills the fields of an ipsec-3gpp entry from its parameters and finds out whether it is usable. ps are the
// parameters in order of appearance; their values are normalised in place.
func (m *Mechanism) interpret(ps []Param) {
	m.EncAlg, m.EncAlgToken = ims.EncNull, ims.EncNull.String()
	m.Prot, m.Mod = ProtESP, ModTrans

	var seen [len(order)]bool
	for i := range ps {
		p := &ps[i]
		normalise(p)
		r := rank(p.Name)
		if r == len(order) {
			m.Params = append(m.Params, *p)
			continue
		}
		if seen[r] {
			// Which of the two the peer acts on is unknown.
			m.blame(ErrMalformed, p.Name, "given twice")
			m.Params = append(m.Params, *p)
			continue
		}
		seen[r] = true
		m.set(p)
	}
	for _, name := range [...]string{paramAlg, paramSPIC, paramSPIS, paramPortC, paramPortS} {
		if !seen[rank(name)] {
			m.blame(ErrMalformed, name, "missing")
		}
	}
	m.judge()

	// An omitted parameter and its spelled out default are the same agreement, so the canonical form has them all.
	for _, d := range [...]Param{
		{Name: paramEncAlg, Value: m.EncAlgToken, HasValue: true},
		{Name: paramProt, Value: m.Prot, HasValue: true},
		{Name: paramMod, Value: m.Mod, HasValue: true},
	} {
		if !seen[rank(d.Name)] {
			ps = append(ps, d)
		}
	}
	slices.SortStableFunc(ps, compareParams)
	m.canon = ps
}

// set interprets one known parameter, given for the first time.
func (m *Mechanism) set(p *Param) {
	switch p.Name {
	case paramQ:
		// Selection does not look at q, so a bad one is no reason to turn a handset away: it stays what it is, text.
		if q, ok := parseQ(p.Value); ok {
			m.Q, m.HasQ = q, true
		} else {
			m.Params = append(m.Params, *p)
		}
	case paramAlg:
		m.AlgToken = p.Value
		m.Alg, _ = ims.ParseAlg(p.Value)
		m.blameToken(p)
	case paramEncAlg:
		m.EncAlgToken = p.Value
		m.EncAlg, _ = ims.ParseEncAlg(p.Value)
		m.blameToken(p)
	case paramProt:
		m.Prot = p.Value
		m.blameToken(p)
	case paramMod:
		m.Mod = p.Value
		m.blameToken(p)
	case paramSPIC:
		m.SPIC = ims.SPI(m.number(p, 1<<32-1))
	case paramSPIS:
		m.SPIS = ims.SPI(m.number(p, 1<<32-1))
	case paramPortC:
		m.PortC = uint16(m.number(p, 1<<16-1))
	case paramPortS:
		m.PortS = uint16(m.number(p, 1<<16-1))
	}
}

// number reads a decimal parameter, which normalise has freed of leading zeros.
func (m *Mechanism) number(p *Param, limit uint64) uint64 {
	if !isDigits(p.Value) {
		m.blame(ErrMalformed, p.Name, "is not a decimal number")
		return 0
	}
	n, err := strconv.ParseUint(p.Value, 10, 64)
	switch {
	case err != nil || n > limit:
		m.blame(ErrBadValue, p.Name, "is larger than "+strconv.FormatUint(limit, 10))
		return 0
	case n == 0:
		// RFC 4303 §2.1: SPI 0 never appears on the wire; port 0 can not be sent to.
		m.blame(ErrBadValue, p.Name, "is 0")
	}
	return n
}

// judge checks what can only be checked once all parameters are known.
func (m *Mechanism) judge() {
	if m.fault != nil {
		return
	}
	switch {
	case m.SPIC == m.SPIS:
		// TS 33.203 §7.1: the SPIs of a set differ; all SAs share one key, so equal ones would invite reflection.
		m.blame(ErrBadValue, paramSPIS, "is the same as spi-c")
	case m.PortC == m.PortS:
		m.blame(ErrBadValue, paramPortS, "is the same as port-c")
	case m.Prot != ProtESP:
		m.blame(ErrNoCommonAlgorithm, paramProt, showToken(m.Prot)+" is not supported")
	case m.Mod != ModTrans:
		// TS 33.203 Annex M: without NAT traversal only transport mode makes sense.
		m.blame(ErrNoCommonAlgorithm, paramMod, showToken(m.Mod)+" is not supported")
	case m.Alg == 0:
		m.blame(ErrNoCommonAlgorithm, paramAlg, showToken(m.AlgToken)+" is not supported")
	case m.EncAlg == 0:
		m.blame(ErrNoCommonAlgorithm, paramEncAlg, showToken(m.EncAlgToken)+" is not supported")
	case !m.Suite().Legal():
		m.blame(ErrNoCommonAlgorithm, paramAlg, m.AlgToken+" with ealg "+m.EncAlgToken+" is not a legal pair")
	}
}

// blame records the first fault of the entry; an unreadable parameter outweighs an unusable number, whichever came
// first, so that ErrBadValue means that everything else was readable.
func (m *Mechanism) blame(kind error, param, reason string) {
	if m.fault == nil || errors.Is(m.fault.kind, ErrBadValue) && errors.Is(kind, ErrMalformed) {
		m.fault = &Error{Entry: m.Entry, Param: param, Reason: reason, kind: kind}
	}
}

// blameToken checks the value of a parameter that must be a token.
func (m *Mechanism) blameToken(p *Param) {
	if !isToken(p.Value) {
		m.blame(ErrMalformed, p.Name, "is not a token")
	}
}

// normalise brings the value of an ipsec-3gpp parameter into the form in which it is compared: numbers without leading
// zeros, q without trailing ones, tokens in lower case (RFC 3329 §2.2). Other parameters stay text.
func normalise(p *Param) {
	switch p.Name {
	case paramQ:
		normaliseQ(p)
	case paramAlg, paramEncAlg, paramProt, paramMod:
		if isToken(p.Value) {
			p.Value = strings.ToLower(p.Value)
		}
	case paramSPIC, paramSPIS, paramPortC, paramPortS:
		if isDigits(p.Value) {
			// Never octal: a widespread stack prints SPIs with %010u.
			n := 0
			for n < len(p.Value)-1 && p.Value[n] == '0' {
				n++
			}
			p.Value = p.Value[n:]
		}
	}
}

// normaliseQ rewrites a readable q as the shortest decimal.
func normaliseQ(p *Param) {
	if q, ok := parseQ(p.Value); ok {
		p.Value = string(appendQ(nil, q))
	}
}
