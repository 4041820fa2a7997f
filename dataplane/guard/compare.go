package guard

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/gmgate/gmgate/bpf"
)

// Difference is what Compare has found, in the order of the ids.
type Difference struct {
	Missing []uint64 // sets of which the map lacks an SPI
	Extra   []uint64 // sets in the map that were not asked for
}

// Compare holds the map of SPIs against the sets that there should be. Sets that come or go meanwhile may be in the result:
// what two comparisons in a row find is a difference.
func (g *Guard) Compare(want map[uint64]bool) (d Difference, err error) {
	found := make(map[uint64]int, len(want))
	err = g.table.each(func(_ bpf.GuardSaKey, v *bpf.GuardSaValue) {
		if v.Flags&uint32(bpf.GuardSaFlagSA_ANY_SOURCE) == 0 {
			found[v.Set]++
		}
	})
	if err != nil {
		return d, fmt.Errorf("compare guard and SA sets: %w", err)
	}
	for id := range want {
		if found[id] < 2 {
			d.Missing = append(d.Missing, id)
		}
	}
	for id := range found {
		if _, ok := want[id]; !ok {
			d.Extra = append(d.Extra, id)
		}
	}
	slices.Sort(d.Missing)
	slices.Sort(d.Extra)
	return d, nil
}

// Evict takes the SPIs of a set out, whatever they are.
func (g *Guard) Evict(set uint64) error {
	var keys []bpf.GuardSaKey
	err := g.table.each(func(k bpf.GuardSaKey, v *bpf.GuardSaValue) {
		if v.Set == set && v.Flags&uint32(bpf.GuardSaFlagSA_ANY_SOURCE) == 0 {
			keys = append(keys, k)
		}
	})
	if err == nil {
		err = g.table.evict(set, keys)
	}
	if err != nil {
		return fmt.Errorf("take SA set %#x from the guard: %w", set, err)
	}
	return nil
}

// each reads the map of SPIs, which may change meanwhile.
func (t *table) each(f func(bpf.GuardSaKey, *bpf.GuardSaValue)) error {
	var cursor ebpf.MapBatchCursor
	keys, values := make([]bpf.GuardSaKey, readBatch), make([]bpf.GuardSaValue, readBatch)
	for {
		n, err := t.sas.BatchLookup(&cursor, keys, values, nil)
		for i := range n {
			f(keys[i], &values[i])
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) { // that was the last batch
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (t *table) evict(set uint64, keys []bpf.GuardSaKey) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, k := range keys {
		var v bpf.GuardSaValue
		err := t.sas.Lookup(k, &v)
		if err == nil {
			if v.Set != set {
				continue // a set that was installed meanwhile has taken it over
			}
			err = t.sas.Delete(k)
		}
		switch {
		case err == nil:
			t.entries--
		case !errors.Is(err, ebpf.ErrKeyNotExist):
			return err
		}
	}
	t.forget(set)
	return nil
}
