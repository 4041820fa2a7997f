package registrar

import (
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
)

// Whoever gets an index of which nothing was kept gets a generation that nobody can foresee: a phone of the run before,
// whose registration a crash kept from reaching the store, may have been called 0.
func TestGenerationsAfterCrash(t *testing.T) {
	seen := make(map[uint16]bool)
	for range 8 {
		b := newBench(t)
		seen[b.begin(offer(0)).UE.Gen] = true
	}
	if len(seen) < 2 {
		t.Errorf("eight runs begin with the same generation: %v", seen)
	}
}

// forgetful is a Journal that keeps nothing.
type forgetful struct{}

func (forgetful) KeepUE(*UE)            {}
func (forgetful) KeepSet(*Set)          {}
func (forgetful) DropSet(uint64)        {}
func (forgetful) DropUE(uint32, uint16) {}

// restored puts one UE back as a store that was cut off would have it.
func restored(b *bench, index uint32, gen uint16) *UE {
	b.t.Helper()
	b.table.Keep(forgetful{})
	s := &Set{Phase: sa.Established, Serial: 1, Deadline: b.now.Add(time.Hour)}
	o := offer(40)
	s.Params = sa.Params{
		ID: 40, Local: o.Local, UE: o.UE, Ports: ims.Ports{UC: o.PortC, US: o.PortS, PC: 6110, PS: 6100},
		SPIs: ims.SPIs{UC: o.SPIC, US: o.SPIS, PC: 1 << 28, PS: 1<<28 + 1},
	}
	u := &UE{Index: index, Gen: gen, IMPI: o.IMPI, Addr: o.UE, Local: o.Local, State: Registered, Sets: []*Set{s}, Current: s}
	if err := b.table.Restore(u, func(*Set) bool { return false }); err != nil {
		b.t.Fatal(err)
	}
	return u
}

// The phones that had a restored context's index after it in the run before may have been lost in the crash: its
// successor's generation leaves room for them.
func TestGenerationsAfterRestore(t *testing.T) {
	b := newBench(t)
	u := restored(b, 3, 7)
	b.table.Resume(40)
	b.table.Drop(u.Sets[0], 0)
	b.advance(time.Second)
	for n := range 3 {
		o := offer(n)
		o.IMPI, o.PortS = "user2@ims", o.PortS+uint16(n)
		o.UE = o.UE.Next()
		for range n {
			o.UE = o.UE.Next()
		}
		if next := b.begin(o).UE; next.Index == 3 && next.Gen != 7+restartGap {
			t.Errorf("generation %d follows 7", next.Gen)
		}
	}
	if b.table.Lookup(3, 7) != nil || b.table.at(3) == nil {
		t.Error("index 3 was not given out again")
	}
}

// A context that ends between its restoration and Resume leaves one free index, not two.
func TestResumeOnce(t *testing.T) {
	b := newBench(t)
	u := restored(b, 1, 7)
	b.table.Evict(u.Sets[0])
	b.table.Resume(40)
	first := b.begin(offer(0)).UE
	o := offer(1)
	o.IMPI, o.UE = "user2@ims", ue2
	if second := b.begin(o).UE; second.Index == first.Index {
		t.Errorf("two UE contexts have index %d", first.Index)
	}
}
