package aka

import (
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/gmgate/gmgate/control/ims"
)

// Function codes of the key derivation function for the salts (TS 33.203 Annex I, TS 33.220 Annex B).
const (
	fcGMACSalt = 0x58
	fcGCMSalt  = 0x59
)

// Names that go into the key derivation function as P0.
const (
	gmacSaltName = "AES_GMAC_SALT"
	gcmSaltName  = "AES_GCM_SALT"
)

// sha1KeySize is the key size of HMAC-SHA-1-96 (RFC 2404 §3), to which IK is padded with zeros.
const sha1KeySize = 20

// ErrSuite says that the pair of algorithms is not one of TS 33.203 Annex H.
var ErrSuite = errors.New("illegal algorithm pair")

// Expand makes the ESP keys of a suite from CK and IK (TS 33.203 Annex I). The result shares no memory with ck and ik.
//
// IK is always needed, though aes-gcm only puts it into the salt. CK may be empty with null encryption, except with
// aes-gmac, whose salt depends on it; ErrNoCK says that it was missing, ErrNoIK the same of IK, and ErrBadKey that a key
// has the wrong size.
func Expand(s ims.Suite, ck, ik ims.Key) (ims.ESPKeys, error) {
	if !s.Legal() {
		return ims.ESPKeys{}, fmt.Errorf("expand keys for %s: %w", s, ErrSuite)
	}
	needCK := s.Enc != ims.EncNull || s.Alg == ims.AlgAESGMAC
	switch {
	case len(ik) == 0:
		return ims.ESPKeys{}, fmt.Errorf("expand keys for %s: %w", s, ErrNoIK)
	case len(ik) != KeySize:
		return ims.ESPKeys{}, fmt.Errorf("expand keys for %s: %w: ik is not %d bytes", s, ErrBadKey, KeySize)
	case needCK && len(ck) == 0:
		return ims.ESPKeys{}, fmt.Errorf("expand keys for %s: %w", s, ErrNoCK)
	case needCK && len(ck) != KeySize:
		return ims.ESPKeys{}, fmt.Errorf("expand keys for %s: %w: ck is not %d bytes", s, ErrBadKey, KeySize)
	}

	k := ims.ESPKeys{Suite: s}
	switch s.Alg {
	case ims.AlgHMACMD5:
		k.Auth = ik.Clone()
	case ims.AlgHMACSHA1:
		k.Auth = make(ims.Key, sha1KeySize)
		copy(k.Auth, ik)
	case ims.AlgAESGMAC:
		k.Auth = ik.Clone()
		k.Salt = salt(fcGMACSalt, gmacSaltName, ck, ik)
	case ims.AlgNull:
		// aes-gcm authenticates by itself; Legal lets nothing else through.
	}
	switch s.Enc {
	case ims.EncNull:
	case ims.EncDESEDE3CBC:
		// CK1 || CK2 || CK1 with CK = CK1 || CK2. Parity bits are left alone: every implementation ignores them.
		k.Enc = make(ims.Key, 0, KeySize+KeySize/2)
		k.Enc = append(append(k.Enc, ck...), ck[:KeySize/2]...)
	case ims.EncAESCBC:
		k.Enc = ck.Clone()
	case ims.EncAESGCM:
		k.Enc = ck.Clone()
		k.Salt = salt(fcGCMSalt, gcmSaltName, ck, ik)
	}
	return k, nil
}

// salt returns the 32 least significant bits of the key derivation function.
func salt(fc byte, name string, ck, ik ims.Key) [4]byte {
	out := kdf(fc, name, ck, ik)
	return [4]byte(out[len(out)-4:])
}

// kdf is the generic key derivation function of TS 33.220 §B.2 with one input parameter and the key CK || IK:
// HMAC-SHA-256 over FC || P0 || L0.
func kdf(fc byte, p0 string, ck, ik ims.Key) [sha256.Size]byte {
	var key [2 * KeySize]byte
	copy(key[:], ck)
	copy(key[KeySize:], ik)
	mac := hmac.New(sha256.New, key[:])
	in := append(append([]byte{fc}, p0...), byte(len(p0)>>8), byte(len(p0)))
	mac.Write(in) // never fails
	clear(key[:])
	return [sha256.Size]byte(mac.Sum(nil))
}
