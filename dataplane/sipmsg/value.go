package sipmsg

import "bytes"

// Element cuts a comma-separated value at its first top-level comma, which is one outside of quoted strings and of <>.
// elem is trimmed; empty elements are skipped. rest is nil when nothing follows, so that a row is walked by
//
//	for v := m.Value(r); v != nil; {
//		elem, v = sipmsg.Element(v)
//	}
//
// An unterminated quote or bracket reaches to the end of the value.
func Element(v []byte) (elem, rest []byte) {
	start, end, next := nextElement(v, 0)
	if start == end {
		return nil, nil
	}
	if next < len(v) {
		rest = v[next:]
	}
	return v[start:end], rest
}

// nextElement finds the first non-empty element of v from i: v[start:end], trimmed. start == end says that there is
// none. next is where the one after it starts, or len(v).
func nextElement(v []byte, i int) (start, end, next int) {
	for i < len(v) && (v[i] == ',' || isLWS(v[i])) {
		i++
	}
	if i == len(v) {
		return i, i, i
	}
	start = i
	i, _ = elementEnd(v, i)
	for end = i; isLWS(v[end-1]); end-- { // ends: the element starts with something else
	}
	for i < len(v) && (v[i] == ',' || isLWS(v[i])) {
		i++
	}
	return start, end, i
}

// elementEnd returns the index of the first top-level comma from i, or len(v); ok is false after an unterminated quote
// or bracket.
func elementEnd(v []byte, i int) (end int, ok bool) {
	for i < len(v) {
		switch v[i] {
		case ',':
			return i, true
		case '"':
			if i, ok = quotedEnd(v, i); !ok {
				return i, false
			}
		case '<':
			j := bytes.IndexByte(v[i:], '>')
			if j < 0 {
				return len(v), false
			}
			i += j + 1
		default:
			i++
		}
	}
	return i, true
}

// quotedEnd returns the index behind the quoted string that starts at i (RFC 3261 §25.1 quoted-string).
func quotedEnd(v []byte, i int) (end int, ok bool) {
	for i++; i < len(v); i++ {
		switch v[i] {
		case '"':
			return i + 1, true
		case '\\':
			i++
		}
	}
	return len(v), false
}

// param is one generic-param: offsets into the text it was read from.
type param struct {
	semi               int // the semicolon before it
	nameStart, nameEnd int
	valStart, valEnd   int // without quotes; both 0 for a flag
	end                int // behind the value, quotes included
}

// nextParam reads the parameter that follows at i: LWS ";" LWS name [LWS "=" LWS value]. more is false at the end of
// the parameters, with p.end where reading stopped; ok is false for a malformed one. Empty parameters are skipped. A
// value ends at a semicolon, comma, white space, quote or angle bracket.
func nextParam(v []byte, i int) (p param, more, ok bool) {
	for {
		i = span(v, i, ccLWS)
		if i == len(v) || v[i] != ';' {
			p.end = i
			return p, false, true
		}
		p.semi = i
		i = span(v, i+1, ccLWS)
		if i == len(v) || (v[i] != ';' && v[i] != ',') {
			break
		}
	}
	p.nameStart = i
	p.nameEnd = span(v, i, ccToken)
	p.end = p.nameEnd
	if p.nameEnd == p.nameStart {
		return p, false, i == len(v)
	}
	i = p.nameEnd
	if i < len(v) && v[i] != '=' {
		i = span(v, i, ccLWS)
	}
	if i == len(v) || v[i] != '=' {
		return p, true, true
	}
	i = span(v, i+1, ccLWS)
	if i < len(v) && v[i] == '"' {
		e, ok := quotedEnd(v, i)
		if !ok {
			return p, false, false
		}
		p.valStart, p.valEnd, p.end = i+1, e-1, e
		return p, true, true
	}
	p.valStart = i
	for i < len(v) && v[i] != ';' && v[i] != ',' && classes[v[i]]&ccURI != 0 {
		i++
	}
	p.valEnd, p.end = i, i
	return p, true, true
}

// Param finds a parameter in ";"-separated parameters, with or without a leading semicolon. Names are compared without
// regard to case, white space and folds are skipped, a quoted value is returned without its quotes but with its
// escapes. A flag (no "=") gives nil, true. The first of several equal names counts.
func Param(params []byte, name string) (value []byte, ok bool) {
	for {
		n, v, rest, more := NextParam(params)
		if !more {
			return nil, false
		}
		if EqualFold(n, name) {
			return v, true
		}
		params = rest
	}
}

// NextParam returns the first of ";"-separated parameters and what follows it. Value is nil for a flag; a quoted value
// comes without its quotes. ok is false at the end. Text between the value and the next semicolon is skipped.
func NextParam(params []byte) (name, value, rest []byte, ok bool) {
	i := 0
	for i < len(params) && (params[i] == ';' || isLWS(params[i])) {
		i++
	}
	start := i
	for i < len(params) && params[i] != '=' && params[i] != ';' {
		if params[i] == '"' { // not a name; do not look for separators inside
			i, _ = quotedEnd(params, i)
			continue
		}
		i++
	}
	if start == len(params) {
		return nil, nil, nil, false
	}
	name = trimLWS(params[start:i])
	if i == len(params) || params[i] == ';' {
		return name, nil, params[i:], true
	}
	i = span(params, i+1, ccLWS)
	if i < len(params) && params[i] == '"' {
		e, closed := quotedEnd(params, i)
		value = params[i+1 : e]
		if closed {
			value = params[i+1 : e-1]
		}
		i = e
		for i < len(params) && params[i] != ';' {
			i++
		}
		return name, value, params[i:], true
	}
	start = i
	for i < len(params) && params[i] != ';' {
		if params[i] == '"' {
			i, _ = quotedEnd(params, i)
			continue
		}
		i++
	}
	return name, trimLWS(params[start:i]), params[i:], true
}

// HasToken reports whether a comma-separated list contains a token, compared without regard to case.
func HasToken(list []byte, token string) bool {
	var elem []byte
	for list != nil {
		if elem, list = Element(list); len(elem) > 0 && EqualFold(elem, token) {
			return true
		}
	}
	return false
}

// NameAddr is the first element of a From, To, Contact, Route, Path, P-Asserted-Identity ... value.
type NameAddr struct {
	Display []byte // display name without quotes, escapes not resolved
	URI     []byte // without <>; "*" in Contact: *
	Params  []byte // header parameters, without the leading semicolon
	Len     int    // bytes of the element up to the comma
}

// ParseNameAddr reads the first element of a value as name-addr or addr-spec (RFC 3261 §20.10, §25.1). In the
// addr-spec form parameters belong to the header and a comma or question mark cannot be part of the URI (RFC 3261 §20).
// The URI itself is not checked: see ParseURI.
func ParseNameAddr(v []byte) (NameAddr, error) {
	var a NameAddr
	i := span(v, 0, ccLWS)
	if i == len(v) {
		return a, ErrNameAddr
	}
	var uriEnd int // where the parameters start
	switch {
	case v[i] == '"':
		e, ok := quotedEnd(v, i)
		if !ok {
			return a, ErrNameAddr
		}
		a.Display = v[i+1 : e-1]
		if i = span(v, e, ccLWS); i == len(v) || v[i] != '<' {
			return a, ErrNameAddr
		}
	case v[i] != '<': // display name of tokens, or an addr-spec
		j := i
		for j < len(v) && v[j] != '<' && v[j] != ';' && v[j] != ',' && v[j] != '"' {
			j++
		}
		if j < len(v) && v[j] == '"' {
			return a, ErrNameAddr
		}
		if j == len(v) || v[j] != '<' {
			a.URI = trimLWS(v[i:j])
			if len(a.URI) == 0 || !all(a.URI, ccURI) || bytes.IndexByte(a.URI, '?') >= 0 {
				return NameAddr{}, ErrNameAddr
			}
			uriEnd = j
			break
		}
		// RFC 3261 §25.1 allows tokens only; real phones put UTF-8 and dots here, which is harmless.
		a.Display = trimLWS(v[i:j])
		i = j
	}
	if uriEnd == 0 { // at '<'
		j := bytes.IndexByte(v[i:], '>')
		if j < 0 {
			return NameAddr{}, ErrNameAddr
		}
		a.URI = v[i+1 : i+j]
		uriEnd = i + j + 1
		if len(a.URI) == 0 || !all(a.URI, ccURI) {
			return NameAddr{}, ErrNameAddr
		}
	}
	e, ok := elementEnd(v, uriEnd)
	if !ok {
		return NameAddr{}, ErrNameAddr
	}
	p := trimLWS(v[uriEnd:e])
	if len(p) > 0 {
		if p[0] != ';' {
			return NameAddr{}, ErrNameAddr
		}
		a.Params = trimLWS(p[1:])
	}
	a.Len = e
	return a, nil
}

// URI is a parsed URI. Only sip, sips and tel are taken apart; of other schemes only Scheme is set.
type URI struct {
	Scheme   []byte // as written
	User     []byte // user part, or the number of a tel URI; escapes not resolved
	Password []byte
	Host     []byte // without brackets
	Port     uint16 // 0 = none
	Params   []byte // without the leading semicolon
	Headers  []byte // without the leading question mark
	IPv6     bool
}

// IsSIP reports whether the scheme is sip or sips.
func (u *URI) IsSIP() bool { return EqualFold(u.Scheme, "sip") || EqualFold(u.Scheme, "sips") }

// IsTel reports whether the scheme is tel.
func (u *URI) IsTel() bool { return EqualFold(u.Scheme, "tel") }

// ParseURI reads an absolute URI (RFC 3261 §19.1.1, RFC 3966 §3). White space, control characters, quotes and angle
// brackets are refused, and so is a second '@': implementations disagree on which one ends the user part.
func ParseURI(b []byte) (URI, error) {
	var u URI
	i := schemeEnd(b)
	if i <= 0 || !all(b[i+1:], ccURI) {
		return u, ErrURI
	}
	u.Scheme = b[:i]
	rest := b[i+1:]
	switch {
	case u.IsTel():
		i := bytes.IndexByte(rest, ';')
		if i < 0 {
			i = len(rest)
		} else {
			u.Params = rest[i+1:]
		}
		u.User = rest[:i]
		if i == 0 {
			return URI{}, ErrURI
		}
		return u, nil
	case !u.IsSIP():
		if len(rest) == 0 {
			return URI{}, ErrURI
		}
		return u, nil
	}
	if at := bytes.IndexByte(rest, '@'); at >= 0 {
		u.User, rest = rest[:at], rest[at+1:]
		if at == 0 || bytes.IndexByte(rest, '@') >= 0 {
			return URI{}, ErrURI
		}
		if c := bytes.IndexByte(u.User, ':'); c >= 0 {
			u.User, u.Password = u.User[:c], u.User[c+1:]
			if c == 0 {
				return URI{}, ErrURI
			}
		}
	}
	var ok bool
	if u.Host, u.IPv6, i, ok = parseHost(rest, 0); !ok {
		return URI{}, ErrURI
	}
	if i < len(rest) && rest[i] == ':' {
		j := span(rest, i+1, ccDigit)
		if u.Port, ok = parsePort(rest[i+1 : j]); !ok {
			return URI{}, ErrURI
		}
		i = j
	}
	rest = rest[i:]
	if len(rest) > 0 && rest[0] == ';' {
		q := bytes.IndexByte(rest, '?')
		if q < 0 {
			q = len(rest)
		}
		u.Params, rest = rest[1:q], rest[q:]
	}
	if len(rest) > 0 {
		if rest[0] != '?' {
			return URI{}, ErrURI
		}
		u.Headers = rest[1:]
	}
	return u, nil
}

// parseHost reads a host name, an IPv4 address or an IPv6 reference in brackets at b[i].
func parseHost(b []byte, i int) (host []byte, ip6 bool, end int, ok bool) {
	if i < len(b) && b[i] == '[' {
		e := span(b, i+1, ccIP6)
		if e == i+1 || e == len(b) || b[e] != ']' {
			return nil, false, i, false
		}
		return b[i+1 : e], true, e + 1, true
	}
	e := span(b, i, ccHost)
	return b[i:e], false, e, e > i
}

// Span is the place of a parameter inside the value it was parsed from. The zero value means that there is none.
type Span struct {
	Semi       int // the semicolon before the parameter: delete from here
	Start, End int // the name, and behind the value: replace this
}

// ViaParm is one via-parm (RFC 3261 §20.42; the name Via is taken by the HeaderID). Offsets are relative to the value
// given to ParseVia.
type ViaParm struct {
	Transport  []byte // as written: UDP, TCP ...
	Host       []byte // sent-by without brackets
	Port       uint16 // 0 = none
	Host6      bool   // Host is an IPv6 reference
	HasRPort   bool   // RFC 3581: rport present, with or without a value
	Keep       bool   // RFC 6223: keep present
	RPort      uint16 // 0 = no value
	Branch     []byte
	Received   []byte // without brackets, which some stacks add to IPv6 addresses
	MAddr      []byte // without brackets
	HostStart  int    // sent-by including brackets
	HostEnd    int
	RPortAt    Span
	ReceivedAt Span
	KeepAt     Span
	ParamsAt   int // where the parameters start: the first semicolon, or the end of the via-parm
	Len        int // length of the via-parm without the comma that follows
}

// ParseVia reads the first via-parm of a value. Of a via-parm of another protocol than SIP/2.0 everything is filled in
// besides ErrViaProtocol. Repeated branch, received, rport and maddr parameters are refused.
func ParseVia(v []byte) (ViaParm, error) {
	var p ViaParm
	err := p.parse(v)
	if err == nil {
		return p, nil
	}
	return p, err
}

func (p *ViaParm) parse(v []byte) *Error {
	var proto *Error
	var i int
	if len(v) > 8 && string(v[:8]) == "SIP/2.0/" {
		i = 8
	} else {
		i = span(v, 0, ccLWS)
		name := i
		i = span(v, i, ccToken)
		nameEnd := i
		i = span(v, i, ccLWS)
		if nameEnd == name || i == len(v) || v[i] != '/' {
			return ErrVia
		}
		i = span(v, i+1, ccLWS)
		ver := i
		i = span(v, i, ccToken)
		if !EqualFold(v[name:nameEnd], "SIP") || string(v[ver:i]) != "2.0" {
			proto = ErrViaProtocol
		}
		if i == ver {
			return ErrVia
		}
		i = span(v, i, ccLWS)
		if i == len(v) || v[i] != '/' {
			return ErrVia
		}
		i = span(v, i+1, ccLWS)
	}
	t := i
	i = span(v, i, ccToken)
	p.Transport = v[t:i]
	h := span(v, i, ccLWS)
	if i == t || h == i {
		return ErrVia
	}
	var ok bool
	if p.Host, p.Host6, i, ok = parseHost(v, h); !ok {
		return ErrVia
	}
	p.HostStart, p.HostEnd = h, i
	j := i
	if j < len(v) && isLWS(v[j]) {
		j = span(v, j, ccLWS)
	}
	if j < len(v) && v[j] == ':' {
		j = span(v, j+1, ccLWS)
		i = span(v, j, ccDigit)
		if p.Port, ok = parsePort(v[j:i]); !ok {
			return ErrVia
		}
	}
	p.ParamsAt = i
	for {
		a, more, ok := nextParam(v, i)
		if !ok {
			return ErrVia
		}
		if !more {
			i = a.end
			break
		}
		if i == p.ParamsAt {
			p.ParamsAt = a.semi
		}
		i = a.end
		if !p.param(v, &a) {
			return ErrVia
		}
	}
	if i < len(v) && v[i] != ',' {
		return ErrVia
	}
	p.Len = i
	return proto
}

// param takes over one parameter; false refuses it.
func (p *ViaParm) param(v []byte, a *param) bool {
	val := v[a.valStart:a.valEnd]
	name := v[a.nameStart:a.nameEnd]
	switch len(name) {
	case 4:
		if EqualFold(name, "keep") {
			p.Keep = true
			p.KeepAt = Span{a.semi, a.nameStart, a.end}
		}
	case 5:
		if EqualFold(name, "rport") {
			if p.HasRPort {
				return false
			}
			p.HasRPort = true
			p.RPortAt = Span{a.semi, a.nameStart, a.end}
			// A request has no business with a value here and it is overwritten (RFC 3581 §4): a bad one reads as none.
			if n, ok := parsePort(val); ok {
				p.RPort = n
			}
		} else if EqualFold(name, "maddr") {
			if p.MAddr != nil || len(val) == 0 {
				return false
			}
			p.MAddr = unbracket(val)
		}
	case 6:
		if EqualFold(name, "branch") {
			if p.Branch != nil || len(val) == 0 {
				return false
			}
			p.Branch = val
		}
	case 8:
		if EqualFold(name, "received") {
			if p.Received != nil || len(val) == 0 {
				return false
			}
			p.Received = unbracket(val)
			p.ReceivedAt = Span{a.semi, a.nameStart, a.end}
		}
	}
	return true
}

func unbracket(b []byte) []byte {
	if len(b) > 2 && b[0] == '[' && b[len(b)-1] == ']' {
		return b[1 : len(b)-1]
	}
	return b
}
