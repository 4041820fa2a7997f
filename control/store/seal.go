package store

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"

	"github.com/gmgate/gmgate/control/ims"
)

// KeySize is the length of a sealing key in octets.
const KeySize = 32

const (
	nonceSize = 24
	tagSize   = 16
)

// errSeal is deliberately the same for every cause: there is nothing to tell them apart by.
var errSeal = errors.New("sealed value does not open: damaged, moved from another place or sealed under another key")

// sealer is AES-256-GCM with a nonce of 192 random bits: half of it derives the key of the one message, half is GCM's
// own nonce. This is the construction XAES-256-GCM of C2SP. GCM alone has 96 bits, with which one key may seal 2^32
// values at most before random nonces are likely enough to meet (NIST SP 800-38D §8.3): a busy gateway that seals
// every change of a set would be there within months.
//
// What is sealed shares its derived key with sealsPerKey others, each under a random nonce of GCM's: the derivation and the
// key schedule cost more than to seal a record.
//
// Safe for concurrent use.
type sealer struct {
	mu    sync.RWMutex
	key   ims.Key // nil once closed
	block cipher.Block
	k1    [aes.BlockSize]byte // subkey of CMAC, NIST SP 800-38B §6.1

	sealing sync.Mutex
	prefix  [12]byte    // of the nonces that seal writes now
	current cipher.AEAD // for them; nil once closed, and before the first one
	left    int         // how often it may still be used
}

// sealsPerKey is how many values are sealed under one derived key: far below the 2^32 of NIST SP 800-38D §8.3.
const sealsPerKey = 1 << 16

func newSealer(key ims.Key) (*sealer, error) {
	if len(key) != KeySize {
		return nil, fmt.Errorf("make sealer: key has %d octets instead of %d", len(key), KeySize)
	}
	s := &sealer{key: key.Clone()}
	block, err := aes.NewCipher(s.key)
	if err != nil {
		return nil, fmt.Errorf("make sealer: %w", err)
	}
	s.block = block
	block.Encrypt(s.k1[:], s.k1[:])
	var carry byte
	for i := len(s.k1) - 1; i >= 0; i-- {
		s.k1[i], carry = s.k1[i]<<1|carry, s.k1[i]>>7
	}
	s.k1[len(s.k1)-1] ^= carry * 0x87
	return s, nil
}

// aead returns GCM under the key for nonces that begin with these twelve octets.
func (s *sealer) aead(nonce []byte) (cipher.AEAD, error) {
	var in [aes.BlockSize]byte
	var key [KeySize]byte
	defer clear(key[:])
	in[2] = 'X'
	copy(in[4:], nonce[:12])
	s.mu.RLock()
	if s.key == nil {
		s.mu.RUnlock()
		return nil, ErrClosed
	}
	for i := range 2 {
		in[1] = byte(i + 1)
		out := key[i*aes.BlockSize:][:aes.BlockSize]
		for j := range out {
			out[j] = in[j] ^ s.k1[j]
		}
		s.block.Encrypt(out, out)
	}
	s.mu.RUnlock()
	block, err := aes.NewCipher(key[:])
	if err != nil {
		return nil, fmt.Errorf("derive key: %w", err)
	}
	return cipher.NewGCM(block)
}

// seal encrypts b[from:] in place, where the nonceSize octets before from become the nonce, and appends the tag. b must
// have room for the tag, or the clear text would stay behind in the old array.
func (s *sealer) seal(b []byte, from int, ad []byte) ([]byte, error) {
	nonce := b[from-nonceSize : from]
	aead, err := s.next(nonce)
	if err != nil {
		return nil, err
	}
	return aead.Seal(b[:from], nonce[12:], b[from:], ad), nil
}

// next makes the nonce of a new value, and returns GCM under the key for it.
func (s *sealer) next(nonce []byte) (cipher.AEAD, error) {
	if _, err := rand.Read(nonce); err != nil {
		return nil, fmt.Errorf("make nonce: %w", err)
	}
	s.sealing.Lock()
	defer s.sealing.Unlock()
	if s.left == 0 {
		aead, err := s.aead(nonce)
		if err != nil {
			return nil, err
		}
		s.current, s.left = aead, sealsPerKey
		copy(s.prefix[:], nonce)
	}
	if s.current == nil {
		return nil, ErrClosed
	}
	s.left--
	copy(nonce, s.prefix[:])
	return s.current, nil
}

// open returns the clear text of nonce, cipher text and tag in new memory.
func (s *sealer) open(b, ad []byte) ([]byte, error) {
	if len(b) < nonceSize+tagSize {
		return nil, errSeal
	}
	aead, err := s.aead(b[:nonceSize])
	if err != nil {
		return nil, err
	}
	text, err := aead.Open(nil, b[12:nonceSize], b[nonceSize:], ad)
	if err != nil {
		return nil, errSeal
	}
	return text, nil
}

// close zeroes the key and drops the schedule made from it.
func (s *sealer) close() {
	s.sealing.Lock() // before mu, as next does
	defer s.sealing.Unlock()
	s.current = nil
	s.mu.Lock()
	defer s.mu.Unlock()
	s.key.Zero()
	clear(s.k1[:])
	s.key, s.block = nil, nil
}
