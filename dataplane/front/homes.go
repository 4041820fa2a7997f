package front

import (
	"net/netip"
	"sync"
	"sync/atomic"
)

// homeBuckets is the number of parts of the table of moved addresses: a change copies one part.
const homeBuckets = 256

// home is an address that was moved.
type home struct {
	addr   netip.Addr // neither IPv4-mapped nor with a zone
	worker int
}

// homes knows which worker owns an address: the one that Owner tells, except for addresses that were moved. The zero
// value has no exceptions, and then a look-up costs one load more than Owner. Look-ups take no lock and allocate nothing;
// changes are rare and copy. It is as large as the caller of Front.Move lets it become.
type homes struct {
	moved   atomic.Int64 // number of exceptions
	buckets [homeBuckets]atomic.Pointer[[]home]

	mu sync.Mutex // held while something is changed
}

// canonical returns the form of an address in which homes and Steering know it.
func canonical(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

// owner returns the worker to which an address belongs.
func (h *homes) owner(a netip.Addr, workers int) int {
	if h.moved.Load() != 0 && a.IsValid() {
		a = canonical(a)
		if b := h.bucket(a).Load(); b != nil {
			for i := range *b {
				if (*b)[i].addr == a {
					return (*b)[i].worker
				}
			}
		}
	}
	return Owner(a, workers)
}

// setLocked moves an address, or with a negative worker undoes that.
func (h *homes) setLocked(a netip.Addr, worker int) {
	p := h.bucket(a)
	var old, next []home
	if b := p.Load(); b != nil {
		old = *b
	}
	for _, e := range old {
		if e.addr != a {
			next = append(next, e)
		}
	}
	if worker >= 0 {
		next = append(next, home{addr: a, worker: worker})
	}
	if len(next) == 0 {
		p.Store(nil)
	} else {
		p.Store(&next)
	}
	h.moved.Add(int64(len(next) - len(old)))
}

func (h *homes) bucket(a netip.Addr) *atomic.Pointer[[]home] {
	word := addrWord(a)
	word ^= word >> 16 // hosts of a network differ in the last octets, networks in the first ones
	word ^= word >> 8
	return &h.buckets[word%homeBuckets]
}
