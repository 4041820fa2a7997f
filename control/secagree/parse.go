package secagree

import (
	"slices"
	"strings"
)

// Parse reads all rows of one Security-Client, Security-Server or Security-Verify header, in order. How the mechanisms
// are spread over rows and comma lists does not matter (RFC 3261 §7.3.1). Rows may contain folds.
//
// Entries that can not be used are kept in the list, marked. An error matches ErrMalformed and means that a bound was
// exceeded (MaxBytes, MaxMechanisms, MaxParams) or that the entries can not be told apart.
func Parse(rows ...string) (List, error) {
	total := 0
	for _, row := range rows {
		total += len(row)
	}
	if total > MaxBytes {
		return List{}, &Error{Reason: "header too long", kind: ErrMalformed}
	}
	var l List
	for i, row := range rows {
		for rest := row; rest != ""; {
			entry := len(l.Mechanisms) + 1
			elem, tail, err := cut(rest, ',')
			if err != "" {
				return List{}, &Error{Entry: entry, Reason: err, kind: ErrMalformed}
			}
			rest = tail
			if elem == "" {
				continue // stray commas mean nothing
			}
			if entry > MaxMechanisms {
				return List{}, &Error{Reason: "too many mechanisms", kind: ErrMalformed}
			}
			m := Mechanism{Entry: entry, Row: i}
			if e := m.parse(elem); e != nil {
				return List{}, e
			}
			l.Mechanisms = append(l.Mechanisms, m)
		}
	}
	return l, nil
}

// parse reads one sec-mechanism.
func (m *Mechanism) parse(elem string) *Error {
	name, rest, _ := cut(elem, ';') // the borders are known to be good
	if isToken(name) {
		m.Name = strings.ToLower(name)
	}
	readable := m.Name != ""
	var ps []Param
	for rest != "" {
		var text string
		text, rest, _ = cut(rest, ';')
		if text == "" {
			continue // "a;;b" and a trailing semicolon have been seen
		}
		if len(ps) == MaxParams {
			return &Error{Entry: m.Entry, Reason: "too many parameters", kind: ErrMalformed}
		}
		if ps == nil {
			ps = make([]Param, 0, 12)
		}
		p, ok := parseParam(text)
		if !ok {
			readable = false
		}
		if p.Name == paramMediasec {
			m.Mediasec = true
		}
		ps = append(ps, p)
	}

	switch {
	case !readable:
		// Some text is no parameter. The entry is kept as text, for the comparison only.
		m.raw = unfold(elem)
		m.blame(ErrMalformed, "", "unreadable parameter")
	case m.IPsec():
		m.interpret(ps)
	default:
		for i := range ps {
			p := &ps[i]
			if p.Name == paramQ {
				normaliseQ(p)
				if q, ok := parseQ(p.Value); ok && !m.HasQ {
					m.Q, m.HasQ = q, true
					continue
				}
			}
			if p.Name != paramMediasec {
				m.Params = append(m.Params, *p)
			}
		}
		slices.SortStableFunc(ps, compareParams)
		m.canon = ps
	}
	return nil
}

// parseParam reads "name" or "name=value".
func parseParam(text string) (Param, bool) {
	name, value, has := strings.Cut(text, "=")
	name = trim(name)
	if !isToken(name) {
		return Param{}, false
	}
	p := Param{Name: strings.ToLower(name), HasValue: has}
	if has {
		p.Value = unquote(trim(value))
	}
	return p, true
}

// cut returns the trimmed text before the first sep outside quoted strings, and what follows sep. problem is not empty
// when a quoted string stays open or a control character other than white space occurs.
func cut(s string, sep byte) (head, tail string, problem string) {
	quoted := false
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case isSpace(c):
		case c < ' ' || c == 0x7f:
			return "", "", "control character"
		case quoted && c == '\\':
			if i++; i < len(s) && (s[i] < ' ' || s[i] == 0x7f) {
				return "", "", "control character"
			}
		case c == '"':
			quoted = !quoted
		case c == sep && !quoted:
			return trim(s[:i]), s[i+1:], ""
		}
	}
	if quoted {
		return "", "", "quoted string without end"
	}
	return trim(s), "", ""
}

// unquote removes the quotes and escapes of a quoted string and makes folds single spaces. Text that is not exactly one
// quoted string keeps its quotes.
func unquote(s string) string {
	if len(s) < 2 || s[0] != '"' {
		return unfold(s)
	}
	end, escaped := 1, false
	for end < len(s) && s[end] != '"' {
		if s[end] == '\\' {
			escaped = true
			end++
		}
		end++
	}
	if end != len(s)-1 {
		return unfold(s)
	}
	s = s[1:end]
	if !escaped {
		return unfold(s)
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) {
			i++
		}
		b = append(b, s[i])
	}
	return unfold(string(b))
}

// appendValue appends a parameter value, quoted unless it is a token.
func appendValue(dst []byte, v string) []byte {
	if isToken(v) {
		return append(dst, v...)
	}
	dst = append(dst, '"')
	for i := range len(v) {
		if v[i] == '"' || v[i] == '\\' {
			dst = append(dst, '\\')
		}
		dst = append(dst, v[i])
	}
	return append(dst, '"')
}

// unfold replaces every run of white space that contains a line break by one space (RFC 3261 §7.3.1).
func unfold(s string) string {
	if !strings.ContainsAny(s, "\r\n") {
		return s
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); {
		j := i
		for j < len(s) && isSpace(s[j]) {
			j++
		}
		switch {
		case j == i:
			b = append(b, s[i])
			i++
			continue
		case strings.ContainsAny(s[i:j], "\r\n"):
			b = append(b, ' ')
		default:
			b = append(b, s[i:j]...)
		}
		i = j
	}
	return string(b)
}

// parseQ reads a qvalue in thousandths. Zeros beyond the third decimal are harmless and accepted.
func parseQ(s string) (uint16, bool) {
	whole, frac, _ := strings.Cut(s, ".")
	if whole == "" && frac == "" || whole != "" && !isDigits(whole) || frac != "" && !isDigits(frac) {
		return 0, false
	}
	frac = strings.TrimRight(frac, "0")
	whole = strings.TrimLeft(whole, "0")
	if whole == "1" && frac == "" {
		return MaxQ, true
	}
	if whole != "" || len(frac) > 3 {
		return 0, false
	}
	q := uint16(0)
	for i := range 3 {
		q *= 10
		if i < len(frac) {
			q += uint16(frac[i] - '0')
		}
	}
	return q, true
}

// appendQ appends the shortest qvalue.
func appendQ(dst []byte, q uint16) []byte {
	if q >= MaxQ {
		return append(dst, '1')
	}
	dst = append(dst, '0')
	if q == 0 {
		return dst
	}
	dst = append(dst, '.')
	for unit := uint16(100); q > 0; unit /= 10 {
		dst = append(dst, '0'+byte(q/unit))
		q %= unit
	}
	return dst
}

func isSpace(c byte) bool { return c == ' ' || c == '\t' || c == '\r' || c == '\n' }

func trim(s string) string {
	for s != "" && isSpace(s[0]) {
		s = s[1:]
	}
	for s != "" && isSpace(s[len(s)-1]) {
		s = s[:len(s)-1]
	}
	return s
}

func isDigits(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return s != ""
}

// isToken reports whether s is a token of RFC 3261 §25.1.
func isToken(s string) bool {
	for i := range len(s) {
		if !tokenChars[s[i]] {
			return false
		}
	}
	return s != ""
}

var tokenChars = func() (t [256]bool) {
	for _, c := range []byte("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.!%*_+`'~") {
		t[c] = true
	}
	return t
}()
