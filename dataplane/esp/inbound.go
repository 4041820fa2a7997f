package esp

import (
	"crypto/subtle"
	"encoding/binary"
	"fmt"

	"github.com/gmgate/gmgate/control/ims"
)

// Inbound is the receiving end of an SA.
type Inbound struct {
	transform
	window window
}

// NewInbound makes the receiving end of an SA with a replay window of the given size: MinWindow to MaxWindow packets,
// zero for DefaultWindow. It keeps no reference to the keys.
func NewInbound(spi ims.SPI, keys ims.ESPKeys, window int) (*Inbound, error) {
	t, err := newTransform(spi, &keys, false)
	if err != nil {
		return nil, fmt.Errorf("make inbound SA %s: %w", spi, err)
	}
	i := &Inbound{transform: t}
	if i.window, err = newWindow(window); err != nil {
		return nil, fmt.Errorf("make inbound SA %s: %w", spi, err)
	}
	return i, nil
}

// Seq returns the highest sequence number received, zero if there was none. Any goroutine may call it.
func (i *Inbound) Seq() uint32 { return i.window.top.Load() }

// SetSeq takes every packet up to seq as received, for an SA which another process has used before: those that were
// captured then are replays now (RFC 4303 §3.4.3). It refuses to go back.
func (i *Inbound) SetSeq(seq uint32) error {
	if seq < i.window.top.Load() {
		return ErrSequence
	}
	i.window.begin(seq)
	return nil
}

// PacketSPI returns the SPI of an ESP packet, false if there is none.
func PacketSPI(pkt []byte) (ims.SPI, bool) {
	if len(pkt) < headerLen {
		return 0, false
	}
	return ims.SPI(binary.BigEndian.Uint32(pkt)), true
}

// Open checks and decrypts an ESP packet, from SPI to ICV, in place and returns the payload, which is part of pkt, with
// its next header. After an error the contents of pkt are undefined. Errors are ErrShort, ErrReplay, ErrICV and
// ErrPadding; the last one comes after the packet was found authentic, so its sequence number is used up.
func (i *Inbound) Open(pkt []byte) (payload []byte, nextHeader byte, err error) {
	head, icv := i.HeadLen(), len(pkt)-int(i.icv)
	if icv < head+trailerLen || (icv-head)%int(i.align) != 0 {
		return nil, 0, ErrShort
	}
	seq := binary.BigEndian.Uint32(pkt[4:])
	// RFC 4303 §3.4.3: the window is looked at first, which is cheap, and moved only after the ICV was verified.
	if !i.window.fresh(seq) {
		return nil, 0, ErrReplay
	}
	body := pkt[head:icv]
	s := scratches.Get().(*scratch)
	// The SAs of a set share their keys, so the ICV alone does not tell one from another.
	ok := binary.BigEndian.Uint32(pkt) == uint32(i.spi) && i.open(s, pkt, body, icv)
	scratches.Put(s)
	if !ok {
		return nil, 0, ErrICV
	}
	i.window.mark(seq)

	// RFC 4303 §2.4: the receiver should inspect the padding. The ICV has been verified, so this is no oracle.
	nextHeader = body[len(body)-1]
	pad := int(body[len(body)-2])
	n := len(body) - trailerLen - pad
	if n < 0 {
		return nil, 0, ErrPadding
	}
	for k, b := range body[n : n+pad] {
		if int(b) != k+1 {
			return nil, 0, ErrPadding
		}
	}
	return body[:n], nextHeader, nil
}

// open verifies the ICV, in constant time, and decrypts body.
func (i *Inbound) open(s *scratch, pkt, body []byte, icv int) bool {
	iv := pkt[headerLen:i.HeadLen()]
	switch {
	case i.alg == ims.AlgAESGMAC:
		i.setNonce(s, iv)
		_, err := i.aead.Open(nil, s.nonce[:], pkt[icv:], pkt[:icv])
		return err == nil
	case i.aead != nil:
		i.setNonce(s, iv)
		_, err := i.aead.Open(body[:0], s.nonce[:], pkt[i.HeadLen():], pkt[:headerLen])
		return err == nil
	}
	if subtle.ConstantTimeCompare(i.hmac(s, pkt[:icv]), pkt[icv:]) != 1 {
		return false
	}
	if i.cbc != nil {
		i.cbc.SetIV(iv)
		i.cbc.CryptBlocks(body, body)
	}
	return true
}
