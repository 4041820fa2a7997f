package esp

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/des" //nolint:gosec // phones still offer des-ede3-cbc; the operator can switch it off
	"crypto/md5" //nolint:gosec // phones still offer hmac-md5-96; the operator can switch it off
	crand "crypto/rand"
	"crypto/sha1" //nolint:gosec // RFC 2404; an HMAC does not rest on collision resistance
	"encoding"
	"errors"
	"fmt"
	"hash"
	"math/rand/v2"
	"sync"

	"github.com/gmgate/gmgate/control/ims"
)

// Errors of the packet functions. They are values of their own, never wrapped, so that callers may compare them.
var (
	// ErrShort: the packet is too short for its algorithms, or its length is no multiple of the cipher's block.
	ErrShort = errors.New("esp packet too short or not aligned")
	// ErrICV: the integrity check failed.
	ErrICV = errors.New("esp integrity check failed")
	// ErrReplay: the sequence number was seen already, lies before the window, or is zero.
	ErrReplay = errors.New("esp sequence number replayed or too old")
	// ErrPadding: the packet is authentic, but its padding is not that of RFC 4303 §2.4.
	ErrPadding = errors.New("esp padding malformed")
	// ErrSequence: the SA has used up its sequence numbers (RFC 4303 §3.3.3), or SetSeq would move back.
	ErrSequence = errors.New("esp sequence numbers exhausted")
)

// Specification constants.
const (
	headerLen  = 8  // SPI and sequence number, RFC 4303 §2
	trailerLen = 2  // pad length and next header, RFC 4303 §2
	icvHMAC    = 12 // RFC 2403 §1, RFC 2404 §1
	icvAEAD    = 16 // RFC 4106 §6, RFC 4543 §3
	ivAEAD     = 8  // RFC 4106 §3.1, RFC 4543 §3.1
	saltLen    = 4  // RFC 4106 §4
	minAlign   = 4  // RFC 4303 §2.4: the ICV starts on a four-octet boundary
	hmacBlock  = 64 // RFC 2104 §2
)

// MaxOverhead is the most that sealing adds to a payload: header and IV in front (24), padding, trailer and ICV behind.
const MaxOverhead = headerLen + aes.BlockSize + aes.BlockSize - 1 + trailerLen + icvAEAD

// cbcMode is a CBC mode of the standard library, which can be given a new IV per packet.
type cbcMode interface {
	cipher.BlockMode
	SetIV(iv []byte)
}

// transform is what both directions of an SA share: the algorithms with their keys.
type transform struct {
	spi   ims.SPI
	alg   ims.Alg
	ivLen uint8
	icv   uint8
	align uint8 // payload, padding and trailer together are a multiple of this
	salt  [saltLen]byte

	cbc  cbcMode     // one direction of the key schedule only; nil without CBC
	aead cipher.AEAD // aes-gcm and aes-gmac; nil otherwise

	// Chaining values of the HMAC after its inner and outer key blocks; MD5 uses the first 16 octets. They replace
	// the key and save two of the four compressions which a short packet would cost.
	inner, outer [sha1.Size]byte
}

// newTransform checks the keys and prepares the algorithms for one direction.
func newTransform(spi ims.SPI, keys *ims.ESPKeys, outbound bool) (transform, error) {
	t := transform{spi: spi, alg: keys.Suite.Alg, align: minAlign}
	if spi < ims.MinSPI {
		return t, fmt.Errorf("use SPI %s: values below %d are reserved (RFC 4303 §2.1)", spi, uint32(ims.MinSPI))
	}
	if !keys.Suite.Legal() {
		return t, fmt.Errorf("use algorithms %s: not a legal pair of TS 33.203 Annex H", keys.Suite)
	}
	if err := t.setCipher(keys, outbound); err != nil {
		return t, fmt.Errorf("prepare %s: %w", keys.Suite, err)
	}
	if err := t.setIntegrity(keys); err != nil {
		return t, fmt.Errorf("prepare %s: %w", keys.Suite, err)
	}
	return t, nil
}

func (t *transform) setCipher(keys *ims.ESPKeys, outbound bool) error {
	var block cipher.Block
	var err error
	switch keys.Suite.Enc {
	case ims.EncNull:
		return checkKey("encryption", keys.Enc, 0)
	case ims.EncAESGCM:
		return t.setAEAD(keys.Enc, keys.Salt)
	case ims.EncAESCBC:
		if err := checkKey("encryption", keys.Enc, 16); err != nil {
			return err
		}
		block, err = aes.NewCipher(keys.Enc)
	case ims.EncDESEDE3CBC:
		if err := checkKey("encryption", keys.Enc, 24); err != nil {
			return err
		}
		block, err = des.NewTripleDESCipher(keys.Enc) //nolint:gosec // see the import
	}
	if err != nil {
		return err
	}
	var mode cipher.BlockMode
	if iv := make([]byte, block.BlockSize()); outbound {
		mode = cipher.NewCBCEncrypter(block, iv) //nolint:gosec // G407: every packet sets its own IV
	} else {
		mode = cipher.NewCBCDecrypter(block, iv)
	}
	cbc, ok := mode.(cbcMode)
	if !ok {
		return fmt.Errorf("CBC mode %T takes no new IV", mode)
	}
	t.cbc, t.ivLen, t.align = cbc, uint8(block.BlockSize()), uint8(block.BlockSize())
	return nil
}

func (t *transform) setIntegrity(keys *ims.ESPKeys) error {
	switch keys.Suite.Alg {
	case ims.AlgNull: // aes-gcm: the cipher authenticates
		return checkKey("integrity", keys.Auth, 0)
	case ims.AlgAESGMAC:
		return t.setAEAD(keys.Auth, keys.Salt)
	case ims.AlgHMACMD5:
		if err := checkKey("integrity", keys.Auth, 16); err != nil {
			return err
		}
		t.setHMAC(md5.New, keys.Auth) //nolint:gosec // see the import
	case ims.AlgHMACSHA1:
		if err := checkKey("integrity", keys.Auth, 20); err != nil {
			return err
		}
		t.setHMAC(sha1.New, keys.Auth) //nolint:gosec // see the import
	}
	return nil
}

func (t *transform) setAEAD(key ims.Key, salt [saltLen]byte) error {
	if err := checkKey("AES", key, 16); err != nil {
		return err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return err
	}
	t.aead, err = cipher.NewGCM(block)
	t.salt, t.ivLen, t.icv = salt, ivAEAD, icvAEAD
	return err
}

// setHMAC computes the chaining values after the two key blocks of RFC 2104 §2.
func (t *transform) setHMAC(newHash func() hash.Hash, key ims.Key) {
	var pad [hmacBlock]byte
	for _, x := range []struct {
		mask  byte
		state *[sha1.Size]byte
	}{{0x36, &t.inner}, {0x5c, &t.outer}} {
		clear(pad[:])
		copy(pad[:], key)
		for i := range pad {
			pad[i] ^= x.mask
		}
		h := newHash()
		_, _ = h.Write(pad[:]) // a hash never fails
		saved, _ := h.(encoding.BinaryMarshaler).MarshalBinary()
		copy(x.state[:h.Size()], saved[stateAt:])
	}
	clear(pad[:])
	t.icv = icvHMAC
}

func checkKey(what string, k ims.Key, want int) error {
	if len(k) != want {
		return fmt.Errorf("%s key has %d octets, want %d", what, len(k), want)
	}
	return nil
}

// stateAt is where the chaining value stands in the marshalled form of sha1 and md5: after a magic of four octets. That
// form is covered by Go's compatibility promise; the tests compare the result with crypto/hmac.
const stateAt = 4

// hasher is a hash with the saved form it can be set back to: magic, chaining value, empty block, length 64. Only the
// chaining value differs between SAs.
type hasher struct {
	hash.Hash
	restore encoding.BinaryUnmarshaler
	form    []byte
	size    int
}

func newHasher(h hash.Hash) hasher {
	_, _ = h.Write(make([]byte, hmacBlock))
	form, _ := h.(encoding.BinaryMarshaler).MarshalBinary()
	return hasher{Hash: h, restore: h.(encoding.BinaryUnmarshaler), form: form, size: h.Size()}
}

// resume continues after the key block whose chaining value is given.
func (h *hasher) resume(state *[sha1.Size]byte) {
	copy(h.form[stateAt:stateAt+h.size], state[:])
	_ = h.restore.UnmarshalBinary(h.form) // the form is our own
}

// scratch is working memory for one packet. What is handed to an interface escapes to the heap, so it lives here.
type scratch struct {
	sha, md5 hasher
	rng      *rand.ChaCha8 // cryptographically strong, seeded from the system
	sum      [sha1.Size]byte
	nonce    [saltLen + ivAEAD]byte
	iv       [aes.BlockSize]byte
}

var scratches = sync.Pool{New: func() any {
	var seed [32]byte
	_, _ = crand.Read(seed[:])                                                                         // never fails
	return &scratch{sha: newHasher(sha1.New()), md5: newHasher(md5.New()), rng: rand.NewChaCha8(seed)} //nolint:gosec // see the imports
}}

// hmac returns the truncated HMAC of data; it is valid until the scratch is used again.
func (t *transform) hmac(s *scratch, data []byte) []byte {
	h := &s.sha
	if t.alg == ims.AlgHMACMD5 {
		h = &s.md5
	}
	h.resume(&t.inner)
	_, _ = h.Write(data)
	inner := h.Sum(s.sum[:0])
	h.resume(&t.outer)
	_, _ = h.Write(inner)
	return h.Sum(s.sum[:0])[:icvHMAC]
}

// setNonce builds the nonce of RFC 4106 §4: salt and IV.
func (t *transform) setNonce(s *scratch, iv []byte) {
	copy(s.nonce[:saltLen], t.salt[:])
	copy(s.nonce[saltLen:], iv)
}

// HeadLen is the number of octets in front of the payload: ESP header and IV.
func (t *transform) HeadLen() int { return headerLen + int(t.ivLen) }

// SPI returns the SPI of the SA.
func (t *transform) SPI() ims.SPI { return t.spi }
