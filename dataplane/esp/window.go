package esp

import (
	"fmt"
	"math"
	"sync/atomic"
)

// Sizes of a replay window in packets. RFC 4303 §3.4.3 wants at least 32 and recommends 64. A phone sends UDP and TCP
// over one SA and radio schedulers reorder in bursts, hence 256 by default.
const (
	MinWindow     = 64
	DefaultWindow = 256
	MaxWindow     = 4096
)

const wordBits = 64

// window is the replay window of RFC 6479: a ring of words with one word more than the window needs, so that moving
// the window clears whole words instead of shifting bits. Sequence numbers of 32 bits never wrap within an SA.
type window struct {
	top   atomic.Uint32 // highest sequence number marked; others may read it
	size  uint32
	words []uint64
}

// newWindow makes a window of at least size packets: whole words.
func newWindow(size int) (window, error) {
	if size == 0 {
		size = DefaultWindow
	}
	if size < MinWindow || size > MaxWindow {
		return window{}, fmt.Errorf("replay window of %d packets is outside %d to %d", size, MinWindow, MaxWindow)
	}
	n := (size + wordBits - 1) / wordBits
	return window{size: uint32(n * wordBits), words: make([]uint64, n+1)}, nil
}

// fresh reports whether seq may be accepted: ahead of the window, or inside it and not seen. Zero is never sent
// (RFC 4303 §3.3.3).
func (w *window) fresh(seq uint32) bool {
	top := w.top.Load()
	if seq > top {
		return true
	}
	if seq == 0 || top-seq >= w.size {
		return false
	}
	return w.words[w.slot(seq)]&(1<<(seq%wordBits)) == 0
}

// mark notes that seq was received. It must be fresh.
func (w *window) mark(seq uint32) {
	if top := w.top.Load(); seq > top {
		// Words between the old top's and the new top's hold numbers that left the window.
		steps := min(seq/wordBits-top/wordBits, uint32(len(w.words)))
		for i := range steps {
			w.words[w.slot(seq-i*wordBits)] = 0
		}
		w.top.Store(seq)
	}
	w.words[w.slot(seq)] |= 1 << (seq % wordBits)
}

// begin marks everything up to seq, which must not be below top.
func (w *window) begin(seq uint32) {
	for i := range w.words {
		w.words[i] = math.MaxUint64
	}
	// The numbers behind seq in its own word are still to come. Whole words are cleared by mark when it gets there.
	w.words[w.slot(seq)] = 2<<(seq%wordBits) - 1
	w.top.Store(seq)
}

func (w *window) slot(seq uint32) uint32 { return seq / wordBits % uint32(len(w.words)) }
