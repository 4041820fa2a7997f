// Package digestaka computes what the two test ends need for IMS AKA: quintuplets and resynchronisation with Milenage
// (TS 35.206, TS 33.102 §6.3) and HTTP digest with AKA passwords (RFC 3310, RFC 4169, RFC 2617).
//
// Everything is pure; nothing here is used by gmgate itself, which never computes an authentication.
package digestaka

import (
	"crypto/hmac"
	"crypto/md5" //nolint:gosec // RFC 3310 prescribes it
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/wmnsk/milenage"

	"github.com/gmgate/gmgate/control/ims"
)

// SQNMask keeps the 48 bits of a sequence number.
const SQNMask = 1<<48 - 1

// Card is the long-term secret of a subscription, as the USIM and the AuC hold it.
type Card struct {
	K, OPc [16]byte
	AMF    [2]byte
}

// Vector is one authentication quintuplet.
type Vector struct {
	RAND, AUTN [16]byte
	RES        ims.Key
	CK, IK     ims.Key
}

// Nonce returns the digest nonce that carries the challenge (RFC 3310 §3.2).
func (v Vector) Nonce() string {
	return base64.StdEncoding.EncodeToString(append(v.RAND[:len(v.RAND):len(v.RAND)], v.AUTN[:]...))
}

// Generate computes the quintuplet of a challenge (TS 33.102 §6.3.2).
func (c Card) Generate(rnd [16]byte, sqn uint64) (Vector, error) {
	m := milenage.NewWithOPc(c.K[:], c.OPc[:], rnd[:], sqn&SQNMask, uint16(c.AMF[0])<<8|uint16(c.AMF[1]))
	if err := m.ComputeAll(); err != nil {
		return Vector{}, fmt.Errorf("compute Milenage: %w", err)
	}
	autn, err := m.GenerateAUTN()
	if err != nil {
		return Vector{}, fmt.Errorf("compute AUTN: %w", err)
	}
	v := Vector{RAND: rnd, RES: ims.Key(m.RES), CK: ims.Key(m.CK), IK: ims.Key(m.IK)}
	copy(v.AUTN[:], autn)
	return v, nil
}

// Errors of Answer, TS 33.102 §6.3.3.
var (
	ErrMAC  = errors.New("MAC of the challenge is wrong")
	ErrSync = errors.New("sequence number of the challenge is out of range")
)

// Answer is the USIM's side of a challenge. sqn is the highest sequence number accepted so far. With ErrSync the
// returned AUTS is to be sent back; with ErrMAC nothing is. On success newSQN is what the USIM keeps.
func (c Card) Answer(rnd, autn [16]byte, sqn uint64) (v Vector, newSQN uint64, auts []byte, err error) {
	probe := milenage.NewWithOPc(c.K[:], c.OPc[:], rnd[:], 0, 0)
	if _, _, _, _, err := probe.F2345(); err != nil {
		return Vector{}, 0, nil, fmt.Errorf("compute Milenage: %w", err)
	}
	var got uint64
	for i := range 6 {
		got = got<<8 | uint64(autn[i]^probe.AK[i])
	}
	card := c
	copy(card.AMF[:], autn[6:8])
	v, err = card.Generate(rnd, got)
	if err != nil {
		return Vector{}, 0, nil, err
	}
	if subtle.ConstantTimeCompare(v.AUTN[8:], autn[8:]) != 1 {
		return Vector{}, 0, nil, ErrMAC
	}
	if got <= sqn {
		auts, err := c.AUTS(rnd, sqn)
		if err != nil {
			return Vector{}, 0, nil, err
		}
		return Vector{}, 0, auts, ErrSync
	}
	return v, got, nil, nil
}

// AUTS computes the resynchronisation token (TS 33.102 §6.3.3: AMF* is zero).
func (c Card) AUTS(rnd [16]byte, sqn uint64) ([]byte, error) {
	m := milenage.NewWithOPc(c.K[:], c.OPc[:], rnd[:], sqn&SQNMask, 0)
	if err := m.ComputeAll(); err != nil {
		return nil, fmt.Errorf("compute Milenage: %w", err)
	}
	auts, err := m.GenerateAUTS()
	if err != nil {
		return nil, fmt.Errorf("compute AUTS: %w", err)
	}
	return auts, nil
}

// Resync is the AuC's side of AUTS: it checks MAC-S against the challenge that failed and returns the USIM's SQN
// (TS 33.102 §6.3.5).
func (c Card) Resync(rnd [16]byte, auts []byte) (uint64, error) {
	if len(auts) != 14 {
		return 0, fmt.Errorf("auts has %d octets, want 14", len(auts))
	}
	m := milenage.NewWithOPc(c.K[:], c.OPc[:], rnd[:], 0, 0)
	aks, err := m.F5Star()
	if err != nil {
		return 0, fmt.Errorf("compute AK-S: %w", err)
	}
	var sqn uint64
	for i := range 6 {
		sqn = sqn<<8 | uint64(auts[i]^aks[i])
	}
	want, err := c.AUTS(rnd, sqn)
	if err != nil {
		return 0, err
	}
	if subtle.ConstantTimeCompare(want[6:], auts[6:]) != 1 {
		return 0, ErrMAC
	}
	return sqn, nil
}

// ParseNonce takes RAND and AUTN out of a digest nonce; server data behind them is ignored (RFC 3310 §3.2).
func ParseNonce(nonce string) (rnd, autn [16]byte, err error) {
	b, err := base64.StdEncoding.DecodeString(nonce)
	if err != nil {
		return rnd, autn, fmt.Errorf("decode nonce: %w", err)
	}
	if len(b) < 32 {
		return rnd, autn, fmt.Errorf("nonce carries %d octets, want 32", len(b))
	}
	copy(rnd[:], b)
	copy(autn[:], b[16:])
	return rnd, autn, nil
}

// Digest is the input of one digest computation, every field as it stands unquoted in the header.
type Digest struct {
	Algorithm                                string // AKAv1-MD5, AKAv1-MD5-sess or AKAv2-MD5, empty means AKAv1-MD5; MD5 for a password
	Username, Realm, URI, Method             string
	Nonce, QOP /* "" for none */, NC, CNonce string
	Body                                     []byte
}

// Response computes the response parameter. The password is RES itself for AKAv1 (RFC 3310 §3.3) and a MAC under
// RES, IK and CK for AKAv2 (RFC 4169 §3); for SIP digest it stands in RES (RFC 2617 §3.2.2). A zero Vector gives the empty password of the AUTS case.
func (d Digest) Response(v Vector) (string, error) {
	password := []byte(v.RES)
	sess := false
	switch strings.ToLower(d.Algorithm) {
	case "", "akav1-md5", "md5":
	case "akav1-md5-sess":
		sess = true
	case "akav2-md5":
		key := append(append(append([]byte(nil), v.RES...), v.IK...), v.CK...)
		mac := hmac.New(md5.New, key)
		mac.Write([]byte("http-digest-akav2-password"))
		password = []byte(base64.StdEncoding.EncodeToString(mac.Sum(nil)))
	default:
		return "", fmt.Errorf("unknown digest algorithm %q", d.Algorithm)
	}
	ha1 := hash([]byte(d.Username+":"+d.Realm+":"), password)
	if sess {
		ha1 = hash([]byte(ha1 + ":" + d.Nonce + ":" + d.CNonce))
	}
	a2 := d.Method + ":" + d.URI
	switch strings.ToLower(d.QOP) {
	case "":
		return hash([]byte(ha1 + ":" + d.Nonce + ":" + hash([]byte(a2)))), nil
	case "auth":
	case "auth-int":
		a2 += ":" + hash(d.Body)
	default:
		return "", fmt.Errorf("unknown qop %q", d.QOP)
	}
	return hash([]byte(strings.Join([]string{ha1, d.Nonce, d.NC, d.CNonce, d.QOP, hash([]byte(a2))}, ":"))), nil
}

func hash(parts ...[]byte) string {
	h := md5.New() //nolint:gosec // see the import
	for _, p := range parts {
		h.Write(p)
	}
	return hex.EncodeToString(h.Sum(nil))
}
