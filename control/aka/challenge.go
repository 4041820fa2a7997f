package aka

import (
	"errors"
	"fmt"
	"strings"

	"github.com/gmgate/gmgate/control/ims"
)

// KeySize is the size of CK and IK in bytes (TS 33.102 §6.3.2).
const KeySize = 16

// What can be wrong with the keys of a challenge.
var (
	// ErrNoIK: no row has an ik parameter, so no security association can be made.
	ErrNoIK = errors.New("no ik in the challenge")

	// ErrNoCK: there is an IK but no CK. That is enough for integrity protection without encryption, except with
	// aes-gmac.
	ErrNoCK = errors.New("no ck in the challenge")

	// ErrBadKey: ck or ik is not 32 hexadecimal digits, or several rows disagree about it.
	ErrBadKey = errors.New("bad key in the challenge")
)

// Challenge is what the P-CSCF needs from the WWW-Authenticate rows of a 401 (TS 24.229 §7.2A.1).
type Challenge struct {
	CK ims.Key // nil if there was none
	IK ims.Key // nil if there was none

	// Realm, Nonce and Algorithm are those of the first row with an ik parameter, else of the first row that has a
	// nonce. They are without quotes.
	Realm     string
	Nonce     string
	Algorithm string
}

// Zero overwrites the keys in place.
func (c *Challenge) Zero() {
	c.CK.Zero()
	c.IK.Zero()
}

// Take takes ck and ik out of all WWW-Authenticate rows of a 401 and returns the rows without them (TS 24.229
// §5.2.2.2, §7.2A.1). The parameters may be anywhere, quoted or not, in any letter case. Rows without them come back
// as they were; in the others everything else stays byte for byte, apart from empty list elements.
//
// The error matches one of
//
//   - ErrSyntax: a row that may hold keys can not be read. Nothing is returned, for the removal can not be
//     guaranteed: the challenge must not be forwarded.
//   - ErrBadKey: the rows are clean, the keys unusable.
//   - ErrNoIK, ErrNoCK: the rows are clean; with ErrNoCK the challenge has the IK. An empty value counts as absent.
func Take(rows []string) (cleaned []string, ch Challenge, err error) {
	var buf [24]element
	cleaned = make([]string, len(rows))
	var keyErr error
	fromIK := false
	for i, row := range rows {
		cleaned[i] = row
		elems, err := split(buf[:0], row)
		if err != nil {
			if !mayHoldKeys(row) {
				continue // some other scheme in some other grammar
			}
			ch.Zero()
			return nil, Challenge{}, fmt.Errorf("read WWW-Authenticate: %w", err)
		}

		found, hasIK := false, false
		for k := range elems {
			e := &elems[k]
			ck, ik := e.is(row, paramCK), e.is(row, paramIK)
			if !ck && !ik {
				continue
			}
			found = true
			text := e.text(row)
			if text == "" {
				continue
			}
			name, dst := paramCK, &ch.CK
			if ik {
				hasIK = true
				name, dst = paramIK, &ch.IK
			}
			if err := takeKey(dst, text); err != nil && keyErr == nil {
				keyErr = fmt.Errorf("%w: %s %w", ErrBadKey, name, err)
			}
		}
		if found {
			cleaned[i] = without(row, elems, func(e *element) bool { return e.is(row, paramCK) || e.is(row, paramIK) })
		}
		if hasIK && !fromIK || ch.Nonce == "" && !fromIK {
			ch.describe(row, elems)
			fromIK = hasIK
		}
	}
	switch {
	case keyErr != nil:
		ch.Zero()
		ch.CK, ch.IK = nil, nil
		return cleaned, ch, keyErr
	case ch.IK == nil:
		ch.CK.Zero()
		ch.CK = nil
		return cleaned, ch, ErrNoIK
	case ch.CK == nil:
		return cleaned, ch, ErrNoCK
	}
	return cleaned, ch, nil
}

// describe takes the other parameters of interest from a row.
func (c *Challenge) describe(row string, elems []element) {
	c.Realm, c.Nonce, c.Algorithm = "", "", ""
	for k := range elems {
		e := &elems[k]
		for _, f := range [...]struct {
			name string
			dst  *string
		}{{paramRealm, &c.Realm}, {paramNonce, &c.Nonce}, {paramAlgorithm, &c.Algorithm}} {
			if *f.dst == "" && e.is(row, f.name) {
				*f.dst = e.text(row)
			}
		}
	}
}

// mayHoldKeys reports whether the letters ck or ik occur at all.
func mayHoldKeys(row string) bool {
	return containsFold(row, paramCK) || containsFold(row, paramIK)
}

// Why a key is bad. The texts must not show any of it.
var (
	errKeyForm     = errors.New("is not 32 hexadecimal digits")
	errKeyConflict = errors.New("differs between challenges")
)

// takeKey reads a key into dst, or compares it with the one that is already there: if two challenges have different
// keys, nobody knows which one the UE answers.
func takeKey(dst *ims.Key, text string) error {
	if len(text) != 2*KeySize {
		return errKeyForm
	}
	key := make(ims.Key, KeySize)
	for i := range key {
		hi, lo := hexDigit(text[2*i]), hexDigit(text[2*i+1])
		if hi > 15 || lo > 15 {
			key.Zero()
			return errKeyForm
		}
		key[i] = hi<<4 | lo
	}
	if *dst == nil {
		*dst = key
		return nil
	}
	same := string(*dst) == string(key)
	key.Zero()
	if !same {
		return errKeyConflict
	}
	return nil
}

// hexDigit returns the value of a hexadecimal digit, or 255.
func hexDigit(c byte) byte {
	switch {
	case c >= '0' && c <= '9':
		return c - '0'
	case c >= 'a' && c <= 'f':
		return c - 'a' + 10
	case c >= 'A' && c <= 'F':
		return c - 'A' + 10
	}
	return 255
}

// containsFold reports whether word, in lower case ASCII, occurs in s in any letter case.
func containsFold(s, word string) bool {
	for i := 0; i+len(word) <= len(s); i++ {
		if s[i]|0x20 == word[0]|0x20 && strings.EqualFold(s[i:i+len(word)], word) {
			return true
		}
	}
	return false
}
