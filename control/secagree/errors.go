package secagree

import (
	"errors"
	"strconv"
	"strings"
)

// What can be wrong with a security agreement. Every error of this package is an *Error that matches one or more of
// these with errors.Is.
var (
	// ErrNoIPsec: the client offers no ipsec-3gpp mechanism at all. RFC 3329 §2.3.1 answers that with 421.
	ErrNoIPsec = errors.New("no ipsec-3gpp mechanism offered")

	// ErrMalformed: the header can not be read, or every ipsec-3gpp entry in it is malformed.
	ErrMalformed = errors.New("malformed security mechanism")

	// ErrBadValue is the kind of ErrMalformed where the entry is well-formed but a SPI or port has a value which
	// nobody may use: zero, out of range, or client and server the same (RFC 4303 §2.1, TS 33.203 §7.1). Errors
	// matching it match ErrMalformed as well.
	ErrBadValue = errors.New("unusable spi or port")

	// ErrNoCommonAlgorithm: there are well-formed ipsec-3gpp entries, but none with algorithms, protocol and mode
	// that are accepted here (TS 33.203 §7.3.2.1).
	ErrNoCommonAlgorithm = errors.New("no common algorithm")

	// ErrMismatch: two headers that must carry the same agreement differ (TS 33.203 §7.3.2.3, RFC 3329 §2.3.1).
	ErrMismatch = errors.New("security agreement differs")
)

// Error is what every function of this package returns. Its text is fit for a SIP Warning header.
type Error struct {
	Entry  int    // 1 for the first mechanism of the header, counted over all rows; 0 when no single entry is meant
	Param  string // the offending parameter, lower case; empty when no single parameter is meant
	Reason string // what is wrong with it

	kind error
}

// Error returns "kind: entry N: parameter reason".
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.kind.Error())
	sep := ": "
	if e.Entry > 0 {
		b.WriteString(": entry ")
		b.WriteString(strconv.Itoa(e.Entry))
	}
	if e.Param != "" {
		b.WriteString(sep)
		b.WriteString(e.Param)
		sep = " "
	}
	if e.Reason != "" {
		b.WriteString(sep)
		b.WriteString(e.Reason)
	}
	return b.String()
}

// Unwrap makes the error match its kind, and ErrMalformed for ErrBadValue.
func (e *Error) Unwrap() []error {
	if errors.Is(e.kind, ErrBadValue) {
		return []error{ErrBadValue, ErrMalformed}
	}
	return []error{e.kind}
}

// showToken returns text of the peer in a form that can stand in an error text: a short token as it is, anything else
// as a stand-in.
func showToken(s string) string {
	const longest = 32
	if len(s) > longest || !isToken(s) {
		return "(unprintable)"
	}
	return s
}
