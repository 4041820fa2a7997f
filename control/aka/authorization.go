package aka

import (
	"errors"
	"fmt"
	"strings"
)

// digestScheme is the only scheme of IMS AKA (RFC 3310 §3).
const digestScheme = "Digest"

// ErrScheme says that the credentials are of another scheme than Digest.
var ErrScheme = errors.New("scheme is not digest")

// Authorization is an Authorization header of the UE, values without quotes and escapes. Absent parameters are empty.
type Authorization struct {
	Username  string // the IMPI
	Realm     string
	Nonce     string
	URI       string
	Response  string
	Algorithm string
	QOP       string
	NC        string
	CNonce    string
	Opaque    string
	AUTS      string

	HasResponse bool // a response parameter is present, empty or not
	HasAUTS     bool // synchronisation failure (RFC 3310 §3.4)

	IntegrityProtected    string // as the UE sent it, which means nothing (TS 24.229 §7.2A.2)
	HasIntegrityProtected bool
}

// ParseAuthorization reads the value of an Authorization header. The error matches ErrSyntax, or ErrScheme for another
// scheme; it names the parameter and shows none of the header's text.
//
// A parameter that matters and is given twice is refused: the registrar might look at the other one and so at another
// identity than the one that was checked against the security association.
func ParseAuthorization(v string) (Authorization, error) {
	var buf [24]element
	elems, err := credentials(buf[:0], v)
	if err != nil {
		return Authorization{}, fmt.Errorf("read Authorization: %w", err)
	}
	var a Authorization
	var seen [11]bool
	for i := range elems {
		e := &elems[i]
		if e.is(v, paramIntegrity) {
			if !a.HasIntegrityProtected {
				a.IntegrityProtected, a.HasIntegrityProtected = e.text(v), true
			}
			continue
		}
		for k, f := range [len(seen)]struct {
			name string
			dst  *string
		}{
			{paramUsername, &a.Username},
			{paramRealm, &a.Realm},
			{paramNonce, &a.Nonce},
			{paramURI, &a.URI},
			{paramResponse, &a.Response},
			{paramAlgorithm, &a.Algorithm},
			{paramQOP, &a.QOP},
			{paramNC, &a.NC},
			{paramCNonce, &a.CNonce},
			{paramOpaque, &a.Opaque},
			{paramAUTS, &a.AUTS},
		} {
			if !e.is(v, f.name) {
				continue
			}
			if seen[k] {
				return Authorization{}, fmt.Errorf("read Authorization: %w: parameter %s given twice", ErrSyntax, f.name)
			}
			seen[k] = true
			*f.dst = e.text(v)
			switch f.name {
			case paramResponse:
				a.HasResponse = true
			case paramAUTS:
				a.HasAUTS = true
			}
			break
		}
	}
	return a, nil
}

// SetIntegrityProtected takes every integrity-protected parameter out of an Authorization value and, unless value is
// empty, puts one with our value at the end (TS 24.229 §7.2A.2). Everything else stays byte for byte, apart from empty
// list elements and white space at the end.
//
// A value v which ParseAuthorization refuses with ErrSyntax or ErrScheme for its grammar becomes the bare scheme, with no
// parameters at all: what can not be read must not reach the registrar with a claim of protection in it, neither the
// UE's nor ours. Callers answer such a request with 400 and never get here. The same goes for a value that is not a
// token, which no caller has: nothing is put in.
func SetIntegrityProtected(v string, value string, quoted bool) string {
	var buf [24]element
	elems, err := credentials(buf[:0], v)
	if err != nil {
		return digestScheme
	}
	mine := func(e *element) bool { return e.is(v, paramIntegrity) }
	found, params, empties := 0, 0, 0
	for i := range elems {
		switch e := &elems[i]; {
		case mine(e):
			found++
		case e.empty():
			empties++
		case e.param.start != e.param.end:
			params++
		}
	}
	value = token(value)
	switch {
	case found > 0 || value != "" && empties > 0:
		v = without(v, elems, mine)
	case value == "":
		return v
	default:
		v = v[:len(strings.TrimRight(v, " \t\r\n"))]
	}
	if value == "" {
		return v
	}
	sep := ","
	if params == 0 {
		sep = " "
	}
	quote := ""
	if quoted {
		quote = `"`
	}
	return v + sep + paramIntegrity + "=" + quote + value + quote
}

// token returns s if it is a token, else nothing.
func token(s string) string {
	if skipToken(s, 0) != len(s) {
		return ""
	}
	return s
}

// credentials splits the value of an Authorization header: one Digest scheme and parameters with values.
func credentials(dst []element, v string) ([]element, error) {
	elems, err := split(dst, v)
	if err != nil {
		return nil, err
	}
	started, bare := false, false
	for i := range elems {
		e := &elems[i]
		switch {
		case e.empty():
			continue
		case !started:
			if !strings.EqualFold(e.scheme.of(v), digestScheme) {
				return nil, ErrScheme
			}
			started = true
			bare = e.param.start == e.param.end
		case e.hasScheme() || bare:
			return nil, syntaxError(e.name.of(v))
		}
		if !bare && !e.equals {
			return nil, syntaxError(e.name.of(v))
		}
		// No handset has a reason to write the name of this parameter anywhere but in front of its own value. Inside
		// another name or value it aims at parsers that search instead of parse, or know no escapes.
		if !e.is(v, paramIntegrity) && containsFold(e.all.of(v), paramIntegrity) {
			return nil, syntaxError(paramIntegrity)
		}
	}
	if !started {
		return nil, ErrScheme
	}
	return elems, nil
}
