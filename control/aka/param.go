package aka

import (
	"errors"
	"fmt"
	"strings"
)

// Implementation constants: bounds of one header row. Real ones have up to 15 parameters and about 700 bytes.
const (
	MaxBytes  = 16384
	MaxParams = 64
)

// Parameters of the Digest scheme (RFC 3261 §25.1, RFC 3310 §3, TS 24.229 §7.2A.1 and §7.2A.2), lower case.
const (
	paramCK        = "ck"
	paramIK        = "ik"
	paramIntegrity = "integrity-protected"
	paramUsername  = "username"
	paramRealm     = "realm"
	paramNonce     = "nonce"
	paramURI       = "uri"
	paramResponse  = "response"
	paramAlgorithm = "algorithm"
	paramQOP       = "qop"
	paramNC        = "nc"
	paramCNonce    = "cnonce"
	paramOpaque    = "opaque"
	paramAUTS      = "auts"
	paramDomain    = "domain"
	paramStale     = "stale"
)

// knownParams are the names that may appear in error texts. Unknown ones may not: in a garbled header they could be
// anything, a key included.
var knownParams = [...]string{
	paramCK, paramIK, paramIntegrity, paramUsername, paramRealm, paramNonce, paramURI, paramResponse, paramAlgorithm,
	paramQOP, paramNC, paramCNonce, paramOpaque, paramAUTS, paramDomain, paramStale,
}

// ErrSyntax says that the header does not obey the grammar of RFC 3261 §25.1 closely enough to be sure about its parameters.
var ErrSyntax = errors.New("malformed digest header")

// syntaxError names the parameter in whose neighbourhood the grammar is left.
func syntaxError(name string) error {
	for _, k := range knownParams {
		if strings.EqualFold(name, k) {
			return fmt.Errorf("%w: near parameter %s", ErrSyntax, k)
		}
	}
	return fmt.Errorf("%w: near an unknown parameter", ErrSyntax)
}

// span is a piece of the header row.
type span struct{ start, end int }

func (s span) of(row string) string { return row[s.start:s.end] }

// element is what stands between two commas. All offsets are into the row.
type element struct {
	all    span // from after the comma before to the comma after
	scheme span // empty unless a challenge begins here
	param  span // the parameter from its name to the end of its value; empty for a bare scheme
	name   span
	value  span // with quotes
	quoted bool
	equals bool // distinguishes "name=" from "name"
}

func (e *element) empty() bool { return e.scheme.start == e.scheme.end && e.param.start == e.param.end }

func (e *element) hasScheme() bool { return e.scheme.start != e.scheme.end }

// is reports whether the element is a parameter of that name, which must be in lower case.
func (e *element) is(row, name string) bool {
	return e.param.start != e.param.end && strings.EqualFold(e.name.of(row), name)
}

// text returns the value without quotes and escapes.
func (e *element) text(row string) string {
	v := e.value.of(row)
	if !e.quoted {
		return v
	}
	v = v[1 : len(v)-1]
	if !strings.Contains(v, `\`) {
		return v
	}
	b := make([]byte, 0, len(v))
	for i := 0; i < len(v); i++ {
		if v[i] == '\\' {
			i++
		}
		b = append(b, v[i])
	}
	return string(b)
}

// split appends the elements of a row to dst. The first element that is not empty carries a scheme; later ones may,
// which is how a list of challenges would look.
func split(dst []element, row string) ([]element, error) {
	if len(row) > MaxBytes {
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrSyntax, MaxBytes)
	}
	first := true
	for at := 0; at <= len(row); {
		if len(dst) == MaxParams {
			return nil, fmt.Errorf("%w: more than %d parameters", ErrSyntax, MaxParams)
		}
		e, ok := scan(row, at, first)
		if !ok {
			return nil, syntaxError(e.name.of(row))
		}
		if !e.empty() {
			first = false
		}
		dst = append(dst, e)
		at = e.all.end + 1
	}
	return dst, nil
}

// scan reads the element that begins at offset at: [scheme LWS] name [LWS] "=" [LWS] value. Only the first element of a
// row may be a scheme without parameters.
func scan(row string, at int, first bool) (element, bool) {
	e := element{all: span{at, at}}
	i := skipSpace(row, at)
	word := span{i, skipToken(row, i)}
	i = skipSpace(row, word.end)
	if word.start == word.end {
		e.all.end = i
		return e, i == len(row) || row[i] == ','
	}

	// A second word makes the first one a scheme.
	if next := skipToken(row, i); next > i {
		e.scheme, word = word, span{i, next}
		i = skipSpace(row, next)
	}
	atEnd := i == len(row) || row[i] == ','
	if first && e.scheme.start == e.scheme.end {
		if !atEnd {
			return e, false
		}
		e.scheme = word
		e.all.end = i
		return e, !reserved(word.of(row))
	}
	if e.hasScheme() && reserved(e.scheme.of(row)) {
		return e, false
	}
	e.name, e.param = word, word
	if atEnd {
		e.all.end = i
		return e, true
	}
	if row[i] != '=' {
		return e, false
	}
	e.equals = true
	e.param.end = i + 1
	i = skipSpace(row, i+1)
	e.value.start = i
	if i < len(row) && row[i] == '"' {
		e.quoted = true
		i = skipQuoted(row, i)
		if i < 0 {
			return e, false
		}
	} else {
		for i < len(row) && plain(row[i]) {
			i++
		}
	}
	e.value.end = i
	if e.value.end > e.value.start {
		e.param.end = i
	}
	i = skipSpace(row, i)
	e.all.end = i
	return e, i == len(row) || row[i] == ','
}

// reserved reports whether a word can not be a scheme, because it would hide a parameter we look for.
func reserved(word string) bool {
	return strings.EqualFold(word, paramCK) || strings.EqualFold(word, paramIK) || strings.EqualFold(word, paramIntegrity)
}

// plain reports whether c may stand in a value without quotes. That is more than a token: base64, URIs.
func plain(c byte) bool {
	return c > ' ' && c != 0x7f && c != '"' && c != ',' && c != '\\'
}

// skipQuoted returns the offset after the quoted string that begins at i, or -1.
func skipQuoted(s string, i int) int {
	for i++; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"':
			return i + 1
		case c == '\\':
			i++
			if i == len(s) || s[i] < ' ' || s[i] == 0x7f {
				return -1
			}
		case isSpace(c):
		case c < ' ' || c == 0x7f:
			return -1
		}
	}
	return -1
}

func skipSpace(s string, i int) int {
	for i < len(s) && isSpace(s[i]) {
		i++
	}
	return i
}

func skipToken(s string, i int) int {
	for i < len(s) && tokenChars[s[i]] {
		i++
	}
	return i
}

func isSpace(c byte) bool { return c == ' ' || c == '\t' || c == '\r' || c == '\n' }

// tokenChars is token of RFC 3261 §25.1.
var tokenChars = func() (t [256]bool) {
	for _, c := range []byte("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.!%*_+`'~") {
		t[c] = true
	}
	return t
}()

// without returns the row without the elements which drop names, and without empty ones, so that no comma is left over.
// White space at the end goes as well: what followed it may be gone, and a fold with nothing behind it would end the
// header section for some parsers.
func without(row string, elems []element, drop func(e *element) bool) string {
	b := make([]byte, 0, len(row))
	begun, open := false, false // open: a scheme lost its first parameter and waits for another one
	for i := range elems {
		e := &elems[i]
		if e.empty() {
			continue
		}
		dropped := drop(e)
		if dropped && !e.hasScheme() {
			continue
		}
		if e.hasScheme() || !open {
			b = trimEnd(b, open)
			if begun {
				b = append(b, ',')
			}
			begun = true
			if !dropped {
				b = append(b, row[e.all.start:e.all.end]...)
				open = false
				continue
			}
			b = append(b, row[e.all.start:e.param.start]...)
			open = true
			continue
		}
		b = append(b, row[e.param.start:e.all.end]...)
		open = false
	}
	return string(trimEnd(b, true))
}

// trimEnd removes white space at the end if wanted.
func trimEnd(b []byte, wanted bool) []byte {
	for wanted && len(b) > 0 && isSpace(b[len(b)-1]) {
		b = b[:len(b)-1]
	}
	return b
}
