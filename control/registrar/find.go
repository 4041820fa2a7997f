package registrar

import (
	"net/netip"
	"slices"
)

// OfIMPI returns the contexts of an IMPI, one for each address, in the order of their index.
func (t *Table) OfIMPI(impi string) []*UE {
	return byIndex(slices.Clone(t.byIMPI[impi]))
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
