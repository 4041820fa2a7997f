package sa

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"

	"github.com/gmgate/gmgate/control/ims"
)

// ErrSPIExhausted says that the SPI pool has no value left to give.
var ErrSPIExhausted = errors.New("SPI pool exhausted")

// Implementation constants.
const (
	// A pool hands out at most fillNum/fillDen of its range: the expected number of probes for a free value stays
	// below fillDen, which makes Take O(1).
	fillNum, fillDen = 15, 16
	feistelRounds    = 4
)

// SPIPool gives out the SPIs which the P-CSCF chooses. Values are unpredictable (the order is a keyed permutation of
// the range), unique among those in use, and a freed value comes back only after the whole range was walked through, so
// a packet in flight for a dead SA cannot meet a new one. Not safe for concurrent use: each worker owns a pool over its
// own part of the range (see Split).
type SPIPool struct {
	first  uint64
	size   uint64
	half   uint // bits of one Feistel half
	keys   [feistelRounds]uint64
	next   uint64
	inUse  map[ims.SPI]struct{}
	limit  int
	probes int // of the last Take, for the test of the O(1) claim
}

// Split returns part k of n equal parts of the range first..last.
func Split(first, last ims.SPI, k, n int) (lo, hi ims.SPI) {
	size := (uint64(last) - uint64(first) + 1) / uint64(n)
	start := uint64(first) + size*uint64(k)
	end := start + size - 1
	if k == n-1 {
		end = uint64(last)
	}
	return ims.SPI(start), ims.SPI(end)
}

// NewSPIPool makes a pool over first..last, both included. It refuses reserved values (RFC 4303 §2.1) and empty ranges.
func NewSPIPool(first, last ims.SPI) (*SPIPool, error) {
	if first < ims.MinSPI {
		return nil, fmt.Errorf("SPI range starts at %d: values below %d are reserved", first, ims.MinSPI)
	}
	if last < first {
		return nil, fmt.Errorf("SPI range %d..%d is empty", first, last)
	}
	p := &SPIPool{
		first: uint64(first), size: uint64(last) - uint64(first) + 1,
		inUse: make(map[ims.SPI]struct{}),
	}
	p.limit = int(p.size)
	if p.size >= fillDen {
		p.limit = int(p.size / fillDen * fillNum)
	}
	p.half = max(1, uint(bits.Len64(p.size-1)+1)/2)
	var seed [8 * (feistelRounds + 1)]byte
	if _, err := rand.Read(seed[:]); err != nil {
		return nil, fmt.Errorf("seed SPI pool: %w", err)
	}
	for i := range p.keys {
		p.keys[i] = binary.LittleEndian.Uint64(seed[8*i:])
	}
	p.next = binary.LittleEndian.Uint64(seed[8*feistelRounds:]) % p.size
	return p, nil
}

// Take reserves a value that is not in use and not among avoid (the UE's own SPIs of the same offer: all four SAs share
// one key pair, so equal SPIs would allow reflection; TS 33.203 §7.1). It returns ErrSPIExhausted when the pool is full.
func (p *SPIPool) Take(avoid ...ims.SPI) (ims.SPI, error) {
	if len(p.inUse) >= p.limit {
		return 0, ErrSPIExhausted
	}
	p.probes = 0
probe:
	for range p.size {
		p.probes++
		spi := ims.SPI(p.first + p.permute(p.next))
		if p.next++; p.next == p.size {
			p.next = 0
		}
		if _, taken := p.inUse[spi]; taken {
			continue
		}
		for _, a := range avoid {
			if spi == a {
				continue probe
			}
		}
		p.inUse[spi] = struct{}{}
		return spi, nil
	}
	return 0, ErrSPIExhausted
}

// Reserve takes a certain value: one that was given out before a restart, or that somebody else uses. It reports false for
// one that lies outside the range or is taken.
func (p *SPIPool) Reserve(spi ims.SPI) bool {
	if !p.Covers(spi) {
		return false
	}
	if _, taken := p.inUse[spi]; taken {
		return false
	}
	p.inUse[spi] = struct{}{}
	return true
}

// Free gives a value back. One that is not in use is ignored, so a double release cannot put a value into the pool twice.
func (p *SPIPool) Free(spi ims.SPI) { delete(p.inUse, spi) }

// Covers reports whether a value is of the pool's range.
func (p *SPIPool) Covers(spi ims.SPI) bool {
	return uint64(spi) >= p.first && uint64(spi) < p.first+p.size
}

// InUse returns how many values are taken; Capacity how many can be.
func (p *SPIPool) InUse() int { return len(p.inUse) }

// Capacity returns how many values the pool gives out at most.
func (p *SPIPool) Capacity() int { return p.limit }

// permute maps 0..size-1 onto itself: a balanced Feistel network over the next even number of bits, walked until it
// lands in the range again (at most about four steps on average).
func (p *SPIPool) permute(x uint64) uint64 {
	mask := uint64(1)<<p.half - 1
	for {
		l, r := x>>p.half, x&mask
		for _, k := range p.keys {
			l, r = r, l^(mix(r^k)&mask)
		}
		x = l<<p.half | r
		if x < p.size {
			return x
		}
	}
}

// mix is the finalizer of splitmix64.
func mix(z uint64) uint64 {
	z += 0x9e3779b97f4a7c15
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}
