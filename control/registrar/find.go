package registrar

import (
	"net/netip"
	"slices"
)

// OfIMPI returns the contexts of an IMPI, one for each address, in the order of their index.
func (t *Table) OfIMPI(impi string) []*UE {
	var ues []*UE
	for u := t.byIMPI[impi]; u != nil; u = u.ofIMPI {
		ues = append(ues, u)
	}
	return byIndex(ues)
}

// Trim ends the oldest contexts at once that an IMPI has beside u, where there are more than n of its kind. Those that have
// never registered do not count: anybody could have begun them.
func (t *Table) Trim(u *UE, n int) {
	var kin []*UE
	for o := t.byIMPI[u.IMPI]; o != nil; o = o.ofIMPI { // the chain begins with the newest
		if o != u && o.State != Pending && o.Emergency == u.Emergency && o.Clear == u.Clear {
			kin = append(kin, o)
		}
	}
	slices.Reverse(kin)
	for _, o := range kin[:max(0, len(kin)+1-n)] {
		for _, s := range slices.Clone(o.Sets) {
			t.remove(s)
		}
	}
}

// AtAddr returns the contexts of the phones at an address, in the order of their index.
func (t *Table) AtAddr(addr netip.Addr) []*UE {
	var ues []*UE
	for u := t.byAddr[addr]; u != nil; u = u.atAddr {
		ues = append(ues, u)
	}
	return byIndex(ues)
}

// setsAt returns the sets of all phones at an address.
func (t *Table) setsAt(addr netip.Addr) []*Set {
	var sets []*Set
	for u := t.byAddr[addr]; u != nil; u = u.atAddr {
		sets = append(sets, u.Sets...)
	}
	return sets
}

func byIndex(ues []*UE) []*UE {
	slices.SortFunc(ues, func(a, b *UE) int { return int(a.Index) - int(b.Index) })
	return ues
}
