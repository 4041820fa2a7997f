package registrar

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
)

// The two SPIs of a set may be of different pools, since the number of workers has changed: each goes back to its own.
func TestFreeAcrossPools(t *testing.T) {
	b := newBench(t)
	var sent []ims.SPI
	b.table.SendSPIs(func(spis ...ims.SPI) { sent = append(sent, spis...) })
	s := b.begin(offer(0))
	b.table.Confirm(s, time.Hour)
	b.backend.Answer()
	b.spis.Free(s.SPIs.PS)
	s.SPIs.PS = 1<<30 + 7
	b.table.Deregister(s.UE, 0)
	b.advance(time.Second)
	if b.spis.InUse() != 0 || !slices.Equal(sent, []ims.SPI{1<<30 + 7}) {
		t.Errorf("%d SPIs in use, sent %v", b.spis.InUse(), sent)
	}
}

// A context goes to another table and ends there: its index, its SPIs and its SAs are free afterwards, and not before.
func TestDetach(t *testing.T) {
	a, b := newBench(t), newBench(t)
	var err error
	if b.spis, err = sa.NewSPIPool(1<<29+1, 1<<30); err != nil {
		t.Fatal(err)
	}
	b.table = New(a.table.cfg, 1, b.spis, b.wheel, b.clock, &a.backend, b.post, b)
	var sent []ims.SPI
	b.table.SendSPIs(func(spis ...ims.SPI) { sent = append(sent, spis...) })

	s := a.begin(offer(0))
	unsettled := func(want string) {
		t.Helper()
		if err := a.table.Settled(ue1); !errors.Is(err, ErrUnsettled) || !strings.Contains(err.Error(), want) {
			t.Errorf("settled: %v, want one of %s", err, want)
		}
	}
	unsettled("pending")
	a.table.Confirm(s, time.Hour)
	unsettled("backend") // it has not moved the hard limit yet
	a.backend.Answer()
	if err := a.table.Settled(ue1); err != nil {
		t.Fatal(err)
	}
	o := offer(1)
	o.Over = s
	second := a.begin(o)
	unsettled("temporary")
	a.table.Confirm(second, time.Hour)
	a.backend.Answer()
	if err := a.table.Settled(ue1); err != nil || s.Phase != sa.Old {
		t.Fatal(err, s.Phase)
	}

	u, index, gen := s.UE, s.UE.Index, s.UE.Gen
	label, deadline := s.Label, second.Deadline
	there, thereGen, ok := b.table.Claim()
	if !ok {
		t.Fatal("no place")
	}
	a.table.Detach(u)
	if a.table.UEs() != 0 || a.table.Find(a.tuples(s)) != nil || a.table.Lookup(index, gen) != nil || a.sets[sa.Old]+a.sets[sa.Established] != 0 ||
		a.ues[Registered] != 0 || a.wheel.Len() != 0 || len(a.gone)+len(a.ended) != 0 {
		t.Errorf("left behind: %d UEs, sets %v, UEs %v, %d timers", a.table.UEs(), a.sets, a.ues, a.wheel.Len())
	}
	b.now = a.now
	b.table.Attach(u, there, thereGen)
	if b.table.Lookup(there, thereGen) != u || b.table.UEOf(u.IMPI, ue1) != u || b.sets[sa.Old] != 1 || b.sets[sa.Established] != 1 ||
		b.ues[Registered] != 1 || u.Current != s || s.Label != label || !second.Deadline.Equal(deadline) || a.backend.Count() != 8 {
		t.Errorf("arrived: sets %v, UEs %v", b.sets, b.ues)
	}
	f := a.tuples(second)
	f.Label = label
	if b.table.Find(f) != second {
		t.Error("not found by its label")
	}
	// The next one at the old table gets another index, so that the label and the name mean one phone.
	x := offer(7)
	x.IMPI, x.UE = "user2@ims", ue2
	if next := a.begin(x); next.UE.Index == index || next.Label == label {
		t.Errorf("index %d given out again", index)
	}
	b.table.Touch(second)
	for end := b.now.Add(2 * time.Hour); b.now.Before(end); b.wheel.Advance(b.now) {
		b.now = b.now.Add(time.Second)
		a.backend.Answer()
	}
	if want := []ims.SPI{s.SPIs.PC, s.SPIs.PS, second.SPIs.PC, second.SPIs.PS}; !slices.Equal(sent, want) || b.table.UEs() != 0 ||
		b.spis.InUse() != 0 || a.backend.Count() != 4 || b.ues[Registered] != 0 {
		t.Errorf("at the end: SPIs sent %v, want %v, %d UEs, %d SAs", sent, want, b.table.UEs(), a.backend.Count())
	}
	if a.table.Release(index, gen+1) || a.table.Release(index+5, gen) || !a.table.Release(index, gen) || a.table.Release(index, gen) {
		t.Error("released what it should not, or not what it should")
	}
	if n := a.spis.InUse(); n != 6 {
		t.Errorf("%d SPIs in use before they come back", n)
	}
	a.table.Free(sent...)
	if n := a.spis.InUse(); n != 2 {
		t.Errorf("%d SPIs in use", n)
	}
	again, g, _ := a.table.Claim()
	if again != index || g == gen {
		t.Errorf("place %d, generation %d", again, g)
	}
	a.table.Unclaim(again)
}
