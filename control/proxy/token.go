package proxy

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"fmt"

	"github.com/gmgate/gmgate/control/ims"
)

// tokenKind says where a token stands and so what it allows.
type tokenKind uint8

const (
	tokenPath      tokenKind = iota + 1 // user part of Path and Record-Route: requests of the core to the UE and back
	tokenToCore                         // our Via on a request of a UE
	tokenToUE                           // our Via on a request to a UE
	tokenRegister                       // our Via on a REGISTER
	tokenSubscribe                      // our Via on a SUBSCRIBE of our own
	tokenNotify                         // user part of our Contact in it: a NOTIFY for us about the UE
	tokenClear                          // user part of Path of a REGISTER in clear: 40 bits that name its UE context
)

// token is what a sealed flow token says. In a branch it must be the same for an INVITE, its CANCEL and the ACK of a
// non-2xx answer, whatever set or connection those come by.
type token struct {
	kind   tokenKind
	worker uint8
	ue     uint32 // 24 bits
	gen    uint16
	called bool // tokenPath in Record-Route: the UE is the called side of the dialog
}

// Name is what a flow token calls a UE context.
type Name struct {
	Worker uint8
	UE     uint32
	Gen    uint16
}

// renamed returns the token with the present name of its UE context: a token lives as long as the registration or dialog
// that it stands in, over restarts with another number of workers and moves from worker to worker.
func (c *Config) renamed(t token) token {
	if t.kind == tokenClear {
		if c.Fleet != nil { // the name stays, since it comes from identity and address
			t.worker = c.Fleet.clear.newest(Name{t.worker, t.ue, t.gen}).Worker
		}
		return t
	}
	n := Name{t.worker, t.ue, t.gen}
	if len(c.Moved) > 0 {
		if now, ok := c.Moved[n]; ok {
			n = now
		}
	}
	if c.Fleet != nil {
		n = c.Fleet.names.newest(n)
	}
	t.worker, t.ue, t.gen = n.Worker, n.UE, n.Gen
	return t
}

// channel says how a request of a UE came in, which decides how the answer goes out.
type channel uint8

const (
	byUDP     channel = iota + 1
	byConnIn          // a connection which the UE opened, uc to ps
	byConnOut         // a connection which we opened, pc to us
	bySource          // UDP, and the answer goes back to port-uc from port-ps
)

// tcp reports whether the answer goes on a connection.
func (c channel) tcp() bool { return c == byConnIn || c == byConnOut }

// tokenLen is the length of a sealed token in text: 16 octets in unpadded base64url, whose alphabet is allowed both in
// the user part of a SIP URI and in a branch.
const tokenLen = 22

// tokenZeros is how many octets of the sealed block must come out as zero: a forged token passes with a probability of
// 2^-64 per attempt, and every attempt is a message that is counted.
const tokenZeros = 8

// sealer seals and opens flow tokens: one AES block encryption under a random key makes them confidential, and the
// zero octets in the block make them authentic. Safe for concurrent use.
type sealer struct{ block cipher.Block }

// newSealer makes a sealer under key (16 octets).
func newSealer(key []byte) (sealer, error) {
	b, err := aes.NewCipher(key)
	if err != nil {
		return sealer{}, fmt.Errorf("make token key: %w", err)
	}
	return sealer{b}, nil
}

// NewTokenKey returns a fresh key for flow tokens, which all workers of a process share.
func NewTokenKey() (ims.Key, error) {
	k := make(ims.Key, 16)
	if _, err := rand.Read(k); err != nil {
		return nil, fmt.Errorf("make token key: %w", err)
	}
	return k, nil
}

// scratch is the working memory of a worker for sealing and opening: calls through the cipher.Block interface would
// otherwise move it to the heap.
type scratch struct {
	in, out [aes.BlockSize]byte
	text    [tokenLen]byte
}

// seal returns the text of a token, valid until the next use of s.
func (z sealer) seal(s *scratch, t token) []byte {
	b := &s.in
	b[0] = byte(t.kind)
	b[1] = t.worker
	put24(b[2:], t.ue)
	binary.BigEndian.PutUint16(b[5:], t.gen)
	b[7] = 0
	if t.called {
		b[7] = 1
	}
	clear(b[8:])
	z.block.Encrypt(s.out[:], b[:])
	base64.RawURLEncoding.Encode(s.text[:], s.out[:])
	return s.text[:]
}

// open reads a token. It reports false for one that was not sealed by us.
func (z sealer) open(s *scratch, text []byte) (token, bool) {
	if len(text) != tokenLen {
		return token{}, false
	}
	if n, err := base64.RawURLEncoding.Decode(s.in[:], text); err != nil || n != aes.BlockSize {
		return token{}, false
	}
	z.block.Decrypt(s.out[:], s.in[:])
	b := &s.out
	if [tokenZeros]byte(b[8:]) != [tokenZeros]byte{} {
		return token{}, false
	}
	return token{
		kind: tokenKind(b[0]), worker: b[1], ue: get24(b[2:]), gen: binary.BigEndian.Uint16(b[5:]),
		called: b[7] != 0,
	}, true
}

// mac returns 64 bits that bind the parts to the sealing key: CBC-MAC over a first block that holds the total length,
// which makes the encoding prefix-free, and the parts with a separator after each.
func (z sealer) mac(s *scratch, parts ...[]byte) uint64 {
	total := 0
	for _, p := range parts {
		total += len(p) + 1
	}
	clear(s.in[:])
	s.in[0] = 0xff // no sealed token begins so
	binary.BigEndian.PutUint64(s.in[8:], uint64(total))
	z.block.Encrypt(s.out[:], s.in[:])
	n := 0
	for _, p := range parts {
		for i := 0; i <= len(p); i++ {
			if n == aes.BlockSize {
				s.in = s.out
				z.block.Encrypt(s.out[:], s.in[:])
				n = 0
			}
			if i < len(p) {
				s.out[n] ^= p[i]
			}
			n++
		}
	}
	s.in = s.out
	z.block.Encrypt(s.out[:], s.in[:])
	return binary.BigEndian.Uint64(s.out[:])
}

func put24(b []byte, v uint32) { b[0], b[1], b[2] = byte(v>>16), byte(v>>8), byte(v) }

func get24(b []byte) uint32 { return uint32(b[0])<<16 | uint32(b[1])<<8 | uint32(b[2]) }
