package sipwire

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Param is one parameter of a value.
type Param struct {
	Name, Value string
	Flag        bool // no "=" at all
	Quoted      bool // the value was or will be a quoted string
}

// Params is an ordered parameter list.
type Params []Param

// Get returns the value of a parameter, "" if absent.
func (p Params) Get(name string) string {
	v, _ := p.Lookup(name)
	return v
}

// Lookup returns the value of a parameter and whether it is there.
func (p Params) Lookup(name string) (string, bool) {
	for _, e := range p {
		if strings.EqualFold(e.Name, name) {
			return e.Value, true
		}
	}
	return "", false
}

// Count returns how often a parameter occurs.
func (p Params) Count(name string) int {
	n := 0
	for _, e := range p {
		if strings.EqualFold(e.Name, name) {
			n++
		}
	}
	return n
}

// scan calls f with every byte that is outside quoted strings and, unless inAngles, outside <>.
func scan(v string, f func(i int, c byte) bool) {
	quoted, angle := false, false
	for i := 0; i < len(v); i++ {
		c := v[i]
		switch {
		case quoted:
			switch c {
			case '\\':
				i++
			case '"':
				quoted = false
			}
		case c == '"':
			quoted = true
		case c == '<':
			angle = true
		case c == '>':
			angle = false
		case !angle:
			if !f(i, c) {
				return
			}
		}
	}
}

func split(v string, sep byte) []string {
	var out []string
	start := 0
	scan(v, func(i int, c byte) bool {
		if c == sep {
			out = append(out, strings.TrimSpace(v[start:i]))
			start = i + 1
		}
		return true
	})
	return append(out, strings.TrimSpace(v[start:]))
}

// SplitList cuts a value at its top-level commas. Empty elements are kept out: RFC 3261 §7.3.1 lists have none, and
// who wants to see stray commas uses SplitRaw.
func SplitList(v string) []string {
	out := split(v, ',')[:0:0]
	for _, e := range split(v, ',') {
		if e != "" {
			out = append(out, e)
		}
	}
	return out
}

// SplitRaw cuts a value at its top-level commas and keeps empty elements.
func SplitRaw(v string) []string { return split(v, ',') }

// ParseParams reads ";"-separated parameters, without a leading ";".
func ParseParams(v string) Params {
	if strings.TrimSpace(v) == "" {
		return nil
	}
	var out Params
	for _, e := range split(v, ';') {
		if e != "" {
			out = append(out, parseParam(e))
		}
	}
	return out
}

func parseParam(e string) Param {
	name, value, ok := strings.Cut(e, "=")
	p := Param{Name: strings.TrimSpace(name), Flag: !ok}
	value = strings.TrimSpace(value)
	if len(value) >= 2 && value[0] == '"' && value[len(value)-1] == '"' {
		p.Quoted = true
		value = unquote(value[1 : len(value)-1])
	}
	p.Value = value
	return p
}

func unquote(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) {
			i++
		}
		b = append(b, s[i])
	}
	return string(b)
}

// ParseAuth reads a challenge or credentials value: the scheme and its parameters (RFC 3261 §25.1). A stray comma is an
// error: phones refuse such a header.
func ParseAuth(v string) (scheme string, p Params, err error) {
	scheme, rest, ok := strings.Cut(strings.TrimSpace(v), " ")
	if !ok {
		return "", nil, fmt.Errorf("%w: no parameters in %q", ErrMalformed, scheme)
	}
	for _, e := range SplitRaw(rest) {
		if e == "" {
			return "", nil, fmt.Errorf("%w: stray comma among the %s parameters", ErrMalformed, scheme)
		}
		q := parseParam(e)
		if q.Flag || !isToken(q.Name) {
			return "", nil, fmt.Errorf("%w: %s parameter %q has no value", ErrMalformed, scheme, q.Name)
		}
		p = append(p, q)
	}
	return scheme, p, nil
}

// Via is one via-parm.
type Via struct {
	Transport string // upper case as received
	Host      string // without brackets
	Port      uint16 // zero when absent
	Params    Params
}

// ParseVia reads one via-parm.
func ParseVia(v string) (Via, error) {
	parts := split(v, ';')
	f := strings.Fields(parts[0])
	if len(f) != 2 {
		return Via{}, fmt.Errorf("%w: Via %q", ErrMalformed, v)
	}
	proto := strings.Split(f[0], "/")
	if len(proto) != 3 || proto[0] != "SIP" || proto[1] != "2.0" {
		return Via{}, fmt.Errorf("%w: Via protocol %q", ErrMalformed, f[0])
	}
	host, port, err := splitHostPort(f[1])
	if err != nil {
		return Via{}, err
	}
	out := Via{Transport: proto[2], Host: host, Port: port}
	for _, e := range parts[1:] {
		if e == "" {
			return Via{}, fmt.Errorf("%w: empty parameter in Via %q", ErrMalformed, v)
		}
		out.Params = append(out.Params, parseParam(e))
	}
	return out, nil
}

// Branch returns the branch parameter.
func (v Via) Branch() string { return v.Params.Get("branch") }

// SentBy returns host and port with the default port filled in; ok is false when the host is not an address.
func (v Via) SentBy() (netip.AddrPort, bool) {
	a, err := netip.ParseAddr(v.Host)
	if err != nil {
		return netip.AddrPort{}, false
	}
	port := v.Port
	if port == 0 {
		port = 5060
	}
	return netip.AddrPortFrom(a, port), true
}

// String prints the via-parm.
func (v Via) String() string {
	var b strings.Builder
	b.WriteString("SIP/2.0/" + v.Transport + " ")
	if strings.Contains(v.Host, ":") {
		b.WriteString("[" + v.Host + "]")
	} else {
		b.WriteString(v.Host)
	}
	if v.Port != 0 {
		b.WriteString(":" + strconv.Itoa(int(v.Port)))
	}
	b.WriteString(v.Params.String())
	return b.String()
}

// String prints the parameters, each behind a semicolon.
func (p Params) String() string {
	var b strings.Builder
	for _, e := range p {
		b.WriteString(";" + e.Name)
		switch {
		case e.Flag:
		case e.Quoted:
			b.WriteString(`="` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(e.Value) + `"`)
		default:
			b.WriteString("=" + e.Value)
		}
	}
	return b.String()
}

// Set returns the parameters with one set to a value, in place of the old one or at the end.
func (p Params) Set(name, value string) Params {
	out := append(Params(nil), p...)
	for i := range out {
		if strings.EqualFold(out[i].Name, name) {
			out[i].Value, out[i].Flag = value, false
			return out
		}
	}
	return append(out, Param{Name: name, Value: value})
}

// Mark writes what a server adds to the topmost Via of a request it received: received when the source address is not
// the one in sent-by, and the source port where rport asks for it (RFC 3261 §18.2.1, RFC 3581 §4).
func (m *Message) Mark(from netip.AddrPort) error {
	v, err := m.TopVia()
	if err != nil {
		return err
	}
	changed := false
	if p, ok := v.Params.Lookup("rport"); ok && p == "" {
		v.Params = v.Params.Set("rport", strconv.Itoa(int(from.Port()))).Set("received", from.Addr().String())
		changed = true
	} else if a, err := netip.ParseAddr(v.Host); err != nil || a != from.Addr() {
		v.Params = v.Params.Set("received", from.Addr().String())
		changed = true
	}
	if changed {
		m.Pop("Via")
		m.Push("Via", v.String())
	}
	return nil
}

// ReplyTo returns where an answer goes by UDP: received and rport if they are there, else sent-by (RFC 3261 §18.2.2,
// RFC 3581 §4).
func (v Via) ReplyTo() (netip.AddrPort, bool) {
	host, port := v.Host, v.Port
	if r := v.Params.Get("received"); r != "" {
		host = strings.Trim(r, "[]")
	}
	if r, err := strconv.ParseUint(v.Params.Get("rport"), 10, 16); err == nil && r != 0 {
		port = uint16(r)
	}
	return Via{Host: host, Port: port}.SentBy()
}

func splitHostPort(s string) (string, uint16, error) {
	host, port := s, ""
	switch {
	case strings.HasPrefix(s, "["):
		h, rest, ok := strings.Cut(s[1:], "]")
		if !ok || (rest != "" && rest[0] != ':') {
			return "", 0, fmt.Errorf("%w: host %q", ErrMalformed, s)
		}
		host, port = h, strings.TrimPrefix(rest, ":")
	case strings.Contains(s, ":"):
		host, port, _ = strings.Cut(s, ":")
		if port == "" {
			return "", 0, fmt.Errorf("%w: host %q", ErrMalformed, s)
		}
	}
	if host == "" {
		return "", 0, fmt.Errorf("%w: empty host in %q", ErrMalformed, s)
	}
	if port == "" {
		return host, 0, nil
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return "", 0, fmt.Errorf("%w: port in %q", ErrMalformed, s)
	}
	return host, uint16(n), nil
}

// URI is a SIP or tel URI.
type URI struct {
	Scheme string // lower case
	User   string // user part, or the number of a tel URI
	Host   string // without brackets; empty for tel
	Port   uint16 // zero when absent
	Params Params
}

// ParseURI reads a URI without angle brackets.
func ParseURI(s string) (URI, error) {
	scheme, rest, ok := strings.Cut(s, ":")
	if !ok || !isToken(scheme) {
		return URI{}, fmt.Errorf("%w: URI %q", ErrMalformed, s)
	}
	u := URI{Scheme: strings.ToLower(scheme)}
	rest, _, _ = strings.Cut(rest, "?")
	if u.Scheme == "tel" {
		num, params, _ := strings.Cut(rest, ";")
		u.User, u.Params = num, ParseParams(params)
		if num == "" {
			return URI{}, fmt.Errorf("%w: URI %q", ErrMalformed, s)
		}
		return u, nil
	}
	if i := strings.LastIndexByte(rest, '@'); i >= 0 {
		u.User, rest = rest[:i], rest[i+1:]
	}
	hostport, params, _ := strings.Cut(rest, ";")
	var err error
	if u.Host, u.Port, err = splitHostPort(hostport); err != nil {
		return URI{}, err
	}
	u.Params = ParseParams(params)
	return u, nil
}

// AddrPort returns host and port with the default port filled in; ok is false when the host is not an address.
func (u URI) AddrPort() (netip.AddrPort, bool) { return Via{Host: u.Host, Port: u.Port}.SentBy() }

// Key returns the part of the URI that identifies a user, for comparison: scheme, user and host, folded where case or
// visual separators do not matter (RFC 3261 §19.1.4, RFC 3966 §4).
func (u URI) Key() string {
	if u.Scheme == "tel" {
		return "tel:" + strings.NewReplacer("-", "", ".", "", "(", "", ")", "").Replace(strings.ToLower(u.User))
	}
	return u.Scheme + ":" + u.User + "@" + strings.ToLower(u.Host)
}

// Key returns URI.Key of a textual URI, or the text itself if it cannot be read.
func Key(uri string) string {
	u, err := ParseURI(uri)
	if err != nil {
		return uri
	}
	return u.Key()
}

// Addr is a name-addr or addr-spec with its header parameters.
type Addr struct {
	Display string
	URI     string
	Params  Params
}

// ParseAddr reads one element of From, To, Contact, Route and the like.
func ParseAddr(v string) (Addr, error) {
	v = strings.TrimSpace(v)
	open := -1
	quoted := false
	for i := 0; i < len(v) && open < 0; i++ {
		switch c := v[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case c == '<' && !quoted:
			open = i
		}
	}
	if open < 0 {
		uri, params, _ := strings.Cut(v, ";")
		if uri == "" || strings.ContainsAny(uri, " \"<>") {
			return Addr{}, fmt.Errorf("%w: address %q", ErrMalformed, v)
		}
		return Addr{URI: strings.TrimSpace(uri), Params: ParseParams(params)}, nil
	}
	uri, rest, ok := strings.Cut(v[open+1:], ">")
	rest = strings.TrimSpace(rest)
	if !ok || uri == "" || (rest != "" && rest[0] != ';') {
		return Addr{}, fmt.Errorf("%w: address %q", ErrMalformed, v)
	}
	return Addr{
		Display: strings.Trim(strings.TrimSpace(v[:open]), `"`), URI: uri,
		Params: ParseParams(strings.TrimPrefix(rest, ";")),
	}, nil
}

// Host prints an address as SIP does, IPv6 in brackets.
func Host(a netip.Addr) string {
	if a.Is6() {
		return "[" + a.String() + "]"
	}
	return a.String()
}

// Token returns 64 random bits in hex, for tags, branches and Call-IDs.
func Token() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	return hex.EncodeToString(b[:])
}

// Branch returns a fresh branch with the magic cookie of RFC 3261 §8.1.1.7.
func Branch() string { return "z9hG4bK" + Token() }
