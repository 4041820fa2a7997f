package registrar

import (
	"net/netip"
	"slices"
)

// OfIMPI returns the contexts of an IMPI, one for each address, in the order of their index.
func (t *Table) OfIMPI(impi string) []*UE {
	return byIndex(slices.Clone(t.byIMPI[impi]))
}

// Trim ends the oldest contexts at once that an IMPI has beside u, where there are more than n of its kind. Those that have
// never registered do not count: anybody could have begun them.
func (t *Table) Trim(u *UE, n int) {
	kin := slices.DeleteFunc(slices.Clone(t.byIMPI[u.IMPI]), func(o *UE) bool {
		return o == u || o.State == Pending || o.Emergency != u.Emergency || o.Clear != u.Clear
	})
	for _, o := range kin[:max(0, len(kin)+1-n)] {
		for _, s := range slices.Clone(o.Sets) {
			t.remove(s)
		}
	}
}

// AtAddr returns the contexts of the phones at an address, in the order of their index.
func (t *Table) AtAddr(addr netip.Addr) []*UE {
	sets := t.byAddr[addr]
	ues := make([]*UE, len(sets))
	for i, s := range sets {
		ues[i] = s.UE
	}
	return slices.Compact(byIndex(ues))
}

func byIndex(ues []*UE) []*UE {
	slices.SortFunc(ues, func(a, b *UE) int { return int(a.Index) - int(b.Index) })
	return ues
}
