package ims

import (
	"fmt"
	"slices"
	"strings"
)

// Alg is an integrity algorithm of the ipsec-3gpp mechanism, named by the "alg" parameter (TS 33.203 Annex H).
type Alg uint8

// Integrity algorithms.
const (
	AlgHMACMD5  Alg = iota + 1 // hmac-md5-96, RFC 2403
	AlgHMACSHA1                // hmac-sha-1-96, RFC 2404
	AlgAESGMAC                 // aes-gmac, RFC 4543
	AlgNull                    // null, legal only with aes-gcm
)

// EncAlg is an encryption algorithm of the ipsec-3gpp mechanism, named by the "ealg" parameter (TS 33.203 Annex H).
type EncAlg uint8

// Encryption algorithms.
const (
	EncNull       EncAlg = iota + 1 // null, RFC 2410; what an absent ealg means
	EncDESEDE3CBC                   // des-ede3-cbc, RFC 2451
	EncAESCBC                       // aes-cbc, RFC 3602
	EncAESGCM                       // aes-gcm, RFC 4106
)

var algNames = [...]string{AlgHMACMD5: "hmac-md5-96", AlgHMACSHA1: "hmac-sha-1-96", AlgAESGMAC: "aes-gmac", AlgNull: "null"}

var encAlgNames = [...]string{EncNull: "null", EncDESEDE3CBC: "des-ede3-cbc", EncAESCBC: "aes-cbc", EncAESGCM: "aes-gcm"}

// String returns the wire token.
func (a Alg) String() string {
	if a == 0 || int(a) >= len(algNames) {
		return fmt.Sprintf("Alg(%#x)", uint8(a))
	}
	return algNames[a]
}

// String returns the wire token.
func (e EncAlg) String() string {
	if e == 0 || int(e) >= len(encAlgNames) {
		return fmt.Sprintf("EncAlg(%#x)", uint8(e))
	}
	return encAlgNames[e]
}

// ParseAlg reads an alg token, case-insensitively (RFC 3329 §2.2).
func ParseAlg(s string) (Alg, error) {
	for i := 1; i < len(algNames); i++ {
		if strings.EqualFold(s, algNames[i]) {
			return Alg(i), nil
		}
	}
	return 0, fmt.Errorf("unknown alg %q", s)
}

// ParseEncAlg reads an ealg token, case-insensitively (RFC 3329 §2.2).
func ParseEncAlg(s string) (EncAlg, error) {
	for i := 1; i < len(encAlgNames); i++ {
		if strings.EqualFold(s, encAlgNames[i]) {
			return EncAlg(i), nil
		}
	}
	return 0, fmt.Errorf("unknown ealg %q", s)
}

// Suite is an (alg, ealg) pair.
type Suite struct {
	Alg Alg
	Enc EncAlg
}

// Suites lists every legal pair, strongest and cheapest first.
func Suites() []Suite {
	return []Suite{
		{AlgNull, EncAESGCM},
		{AlgHMACSHA1, EncAESCBC},
		{AlgHMACMD5, EncAESCBC},
		{AlgHMACSHA1, EncDESEDE3CBC},
		{AlgHMACMD5, EncDESEDE3CBC},
		{AlgAESGMAC, EncNull},
		{AlgHMACSHA1, EncNull},
		{AlgHMACMD5, EncNull},
	}
}

// Legal reports whether the pair may protect anything: every other combination is either no protection at all
// (null with null) or undefined (TS 33.203 Annex H).
func (s Suite) Legal() bool {
	return slices.Contains(Suites(), s)
}

// Deprecated reports whether the pair uses an algorithm which later releases removed from TS 33.203 Annex H.
func (s Suite) Deprecated() bool { return s.Alg == AlgHMACMD5 || s.Enc == EncDESEDE3CBC }

// String returns "alg=ealg", the form used in the configuration.
func (s Suite) String() string { return s.Alg.String() + "=" + s.Enc.String() }

// ParseSuite reads "alg=ealg" and refuses pairs that are not legal.
func ParseSuite(text string) (Suite, error) {
	a, e, ok := strings.Cut(strings.TrimSpace(text), "=")
	if !ok {
		return Suite{}, fmt.Errorf("algorithm pair %q is not of the form alg=ealg", text)
	}
	alg, err := ParseAlg(strings.TrimSpace(a))
	if err != nil {
		return Suite{}, err
	}
	enc, err := ParseEncAlg(strings.TrimSpace(e))
	if err != nil {
		return Suite{}, err
	}
	s := Suite{Alg: alg, Enc: enc}
	if !s.Legal() {
		return Suite{}, fmt.Errorf("algorithm pair %s is not legal in TS 33.203 Annex H", s)
	}
	return s, nil
}
