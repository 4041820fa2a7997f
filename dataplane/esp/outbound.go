package esp

import (
	crand "crypto/rand"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"sync/atomic"

	"github.com/gmgate/gmgate/control/ims"
)

// Outbound is the sending end of an SA.
type Outbound struct {
	transform
	ivBase uint64 // random; IV of packet n of an AEAD SA = ivBase + n
	seq    atomic.Uint32
}

// NewOutbound makes the sending end of an SA. It keeps no reference to the keys.
func NewOutbound(spi ims.SPI, keys ims.ESPKeys) (*Outbound, error) {
	t, err := newTransform(spi, &keys, true)
	if err != nil {
		return nil, fmt.Errorf("make outbound SA %s: %w", spi, err)
	}
	o := &Outbound{transform: t}
	var b [8]byte
	_, _ = crand.Read(b[:]) // never fails
	o.ivBase = binary.BigEndian.Uint64(b[:])
	return o, nil
}

// Seal appends the ESP packet, from SPI to ICV, to dst and returns the extended slice. payload may lie anywhere in
// dst's memory; when it stands HeadLen octets behind dst's end it is not moved. Seal allocates only if dst lacks
// room: see MaxOverhead. The error is ErrSequence.
func (o *Outbound) Seal(dst, payload []byte, nextHeader byte) ([]byte, error) {
	seq := o.seq.Load()
	if seq == math.MaxUint32 {
		// RFC 4303 §3.3.3: the counter must not cycle.
		return dst, ErrSequence
	}
	seq++
	o.seq.Store(seq)
	s := scratches.Get().(*scratch)
	iv := s.iv[:o.ivLen]
	switch {
	case o.aead != nil:
		binary.BigEndian.PutUint64(iv, o.ivBase+uint64(seq))
	case o.cbc != nil:
		_, _ = s.rng.Read(iv) // never fails
	}
	dst = o.seal(s, dst, payload, nextHeader, seq, iv)
	scratches.Put(s)
	return dst, nil
}

// seal is Seal with the sequence number and the IV given, which tests do.
func (o *Outbound) seal(s *scratch, dst, payload []byte, nextHeader byte, seq uint32, iv []byte) []byte {
	head, align := o.HeadLen(), int(o.align)
	pad := (align - (len(payload)+trailerLen)%align) % align
	start, n := len(dst), len(payload)
	plainEnd := start + head + n + pad + trailerLen
	dst = slices.Grow(dst, plainEnd-start+int(o.icv))[:plainEnd+int(o.icv)]

	// The payload first: it may lie where the header goes.
	if body := dst[start+head : plainEnd]; n > 0 && &body[0] != &payload[0] {
		copy(body, payload)
	}
	p := dst[start:]
	binary.BigEndian.PutUint32(p, uint32(o.spi))
	binary.BigEndian.PutUint32(p[4:], seq)
	copy(p[headerLen:head], iv)
	tail := p[head+n : plainEnd-start]
	for i := range pad {
		tail[i] = byte(i + 1) // RFC 4303 §2.4
	}
	tail[pad], tail[pad+1] = byte(pad), nextHeader

	body, icv := p[head:plainEnd-start], plainEnd-start
	switch {
	case o.alg == ims.AlgAESGMAC:
		// RFC 4543 §3.2: header, IV and payload with its trailer are authenticated, nothing is encrypted.
		o.setNonce(s, iv)
		o.aead.Seal(p[:icv], s.nonce[:], nil, p[:icv])
	case o.aead != nil:
		// RFC 4106 §5: the header alone is associated data.
		o.setNonce(s, iv)
		o.aead.Seal(body[:0], s.nonce[:], body, p[:headerLen])
	default:
		if o.cbc != nil {
			o.cbc.SetIV(p[headerLen:head])
			o.cbc.CryptBlocks(body, body)
		}
		copy(p[icv:], o.hmac(s, p[:icv]))
	}
	return dst
}

// Seq returns the sequence number of the last packet sealed, zero if there was none. Any goroutine may call it.
func (o *Outbound) Seq() uint32 { return o.seq.Load() }

// SetSeq makes the next packet carry seq+1, for an SA which another process has used before. It refuses to go back. After
// the highest number there is no next packet: Seal fails.
func (o *Outbound) SetSeq(seq uint32) error {
	if seq < o.seq.Load() {
		return ErrSequence
	}
	o.seq.Store(seq)
	return nil
}
