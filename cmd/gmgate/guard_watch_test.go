package main

import (
	"context"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/proxy"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/guard"
)

// fakeBooks are workers with these sets, one for each UE.
type fakeBooks []uint64

func (b fakeBooks) Sets(context.Context) (sets, clear map[uint64]bool, err error) {
	sets = make(map[uint64]bool)
	for _, id := range b {
		sets[id] = true
	}
	return sets, nil, nil
}

func (b fakeBooks) UEs(_ context.Context, _ proxy.UEQuery, after proxy.UEID, limit int) (list []proxy.UEInfo, more bool, err error) {
	for i, id := range b {
		if uint32(i) < after.Index {
			continue
		}
		if len(list) == limit {
			return list, true, nil
		}
		list = append(list, proxy.UEInfo{
			ID: proxy.UEID{Index: uint32(i) + 1}, Addr: netip.MustParseAddr("10.45.0.1"), Local: netip.MustParseAddr("10.0.0.5"),
			Sets: []proxy.SetInfo{{ID: id, Label: uint32(id) + 100, SPIs: ims.SPIs{PC: ims.SPI(id) + 1000, PS: ims.SPI(id) + 2000}}},
		})
	}
	return list, false, nil
}

// fakeDoor lets these sets pass.
type fakeDoor struct {
	sets  map[uint64]bool
	added []sa.Params
}

func (d *fakeDoor) Add(p sa.Params) error {
	d.sets[p.ID] = true
	d.added = append(d.added, p)
	return nil
}

func (d *fakeDoor) Remove(p sa.Params) error { delete(d.sets, p.ID); return nil }
func (d *fakeDoor) Evict(id uint64) error    { delete(d.sets, id); return nil }

func (d *fakeDoor) Compare(want map[uint64]bool) (x guard.Difference, err error) {
	for id := range want {
		if !d.sets[id] {
			x.Missing = append(x.Missing, id)
		}
	}
	for id := range d.sets {
		if !want[id] {
			x.Extra = append(x.Extra, id)
		}
	}
	return x, nil
}

// What two rounds in a row find is mended, what only one finds is left alone.
func TestAuditor(t *testing.T) {
	books := make(fakeBooks, 0, 2*auditPage+5)
	d := &fakeDoor{sets: map[uint64]bool{}}
	for id := range uint64(cap(books)) {
		books = append(books, id+1)
		d.sets[id+1] = true
	}
	a := &auditor{books: books, door: d, log: slog.New(slog.DiscardHandler)}
	round := func() {
		t.Helper()
		if err := a.round(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	last := books[len(books)-1]
	delete(d.sets, 1)
	delete(d.sets, last)
	d.sets[9999] = true
	round()
	if d.sets[1] || !d.sets[9999] || len(d.added) > 0 {
		t.Fatal("mended at first sight")
	}
	delete(d.sets, 2) // on its way, and there again with the next round
	round()
	d.sets[2] = true
	if !d.sets[1] || !d.sets[last] || d.sets[9999] {
		t.Errorf("set 1 %v, set %d %v, set 9999 %v", d.sets[1], last, d.sets[last], d.sets[9999])
	}
	want := sa.Params{
		ID: 1, Label: 101, Local: netip.MustParseAddr("10.0.0.5"), UE: netip.MustParseAddr("10.45.0.1"), SPIs: ims.SPIs{PC: 1001, PS: 2001},
	}
	if len(d.added) != 2 || d.added[0].ID != want.ID || d.added[0].Label != want.Label || d.added[0].SPIs != want.SPIs ||
		d.added[0].Local != want.Local || d.added[0].UE != want.UE {
		t.Errorf("added %+v", len(d.added))
	}
	round()
	round()
	if got := slices.Sorted(maps.Keys(d.sets)); !slices.Equal(got, books) || a.missing.Load() != 2 || a.extra.Load() != 1 {
		t.Errorf("%d sets for %d, %d missing and %d extra", len(got), len(books), a.missing.Load(), a.extra.Load())
	}
}
