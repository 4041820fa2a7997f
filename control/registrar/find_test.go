package registrar

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
)

// A label leads to the set without the map of tuples; one that does not fit the tuple leads nowhere, and the tuple decides.
func TestFindByLabel(t *testing.T) {
	b := newBench(t)
	first := b.begin(offer(0))
	b.table.Confirm(first, time.Hour)
	over := offer(1)
	over.Over = first
	second := b.begin(over)
	neighbour := offer(2)
	neighbour.IMPI, neighbour.UE = "user2@ims", ue2
	other := b.begin(neighbour)
	if first.Label != second.Label || first.Label == other.Label || first.Label != first.UE.Index {
		t.Fatalf("labels %#x, %#x and %#x", first.Label, second.Label, other.Label)
	}
	label := func(f ims.Flow, l uint32) ims.Flow { f.Label = l; return f }
	client, server := flow(first.Ports.UC, first.Ports.PS), flow(first.Ports.US, first.Ports.PC)
	for name, tt := range map[string]struct {
		flow        ims.Flow
		byLabel, is *Set
	}{
		"none":                   {client, nil, first},
		"client pair":            {label(client, first.Label), first, first},
		"server pair":            {label(server, first.Label), first, first},
		"second set":             {label(flow(second.Ports.UC, second.Ports.PS), second.Label), second, second},
		"another phone":          {label(client, other.Label), nil, first},
		"another worker":         {label(client, 1<<indexBits|first.Label), nil, first},
		"nobody":                 {label(client, 99), nil, first},
		"last worker, last UE":   {label(client, 1<<32-1), nil, first},
		"no such port":           {label(flow(first.Ports.UC+50, first.Ports.PS), first.Label), nil, nil},
		"ports of two pairs":     {label(flow(first.Ports.UC, first.Ports.PC), first.Label), nil, nil},
		"another phone's source": {label(flowOf(ue2, first.Ports.UC, first.Ports.PS), first.Label), nil, nil},
	} {
		if got := b.table.labelled(tt.flow); got != tt.byLabel {
			t.Errorf("%s: by label %v, want %v", name, got, tt.byLabel)
		}
		if got := b.table.Find(tt.flow); got != tt.is {
			t.Errorf("%s: %v, want %v", name, got, tt.is)
		}
	}
	local := label(client, first.Label)
	local.Local = netip.AddrPortFrom(netip.MustParseAddr("10.0.0.6"), first.Ports.PS)
	if got := b.table.Find(local); got != nil {
		t.Errorf("another address of ours: %v", got)
	}

	b.table.Deregister(other.UE, 0)
	b.advance(time.Second)
	if got := b.table.Find(label(b.tuples(other), other.Label)); got != nil {
		t.Errorf("a context that is gone: %v", got)
	}
	// Whoever gets the index next has the label, but not the tuple.
	neighbour.IMPI, neighbour.UE = "user3@ims", ue2.Next()
	next := b.begin(neighbour)
	if next.Label != other.Label {
		t.Fatalf("label %#x, want that of the phone before, %#x", next.Label, other.Label)
	}
	if got := b.table.Find(label(flowOf(ue2, other.Ports.UC, other.Ports.PS), other.Label)); got != nil {
		t.Errorf("the label of a context that is gone leads to %v", got)
	}
	reserved, err := b.table.Begin(&Offer{IMPI: "user4@ims", Local: gm, UE: ue2, SPIC: 4000, SPIS: 4001, PortC: 6500, PortS: 6501},
		ims.ESPKeys{}, func(*Set, error) {})
	if err != nil {
		t.Fatal(err)
	}
	if got := b.table.Find(label(flowOf(ue2, 6500, reserved.Ports.PS), reserved.Label)); got != nil {
		t.Errorf("a set that the backend has not acknowledged: %v", got)
	}
}

// A restored set has the label that it was installed with, be it that of another worker or of another phone's index.
func TestFindRestoredByLabel(t *testing.T) {
	for _, installed := range []uint32{3, 1<<indexBits | 5, 4, 0} {
		b := newBench(t)
		u := restored(b, 3, 7)
		b.table.Resume(40)
		s := u.Sets[0]
		s.Label = installed
		for n := range 4 { // one of them gets index 4
			o := offer(n)
			o.IMPI, o.UE = fmt.Sprintf("other%d@ims", n), netip.AddrFrom4([4]byte{10, 46, 0, byte(n)})
			b.begin(o)
		}
		f := b.tuples(s)
		f.Label = installed
		if got := b.table.Find(f); got != s {
			t.Errorf("label %#x: %v", installed, got)
		}
		if want := installed == 3; (b.table.labelled(f) == s) != want {
			t.Errorf("label %#x: found by it is %v", installed, !want)
		}
	}
}

// many fills a table with phones of one set each, and returns the flow of every phone's requests.
func many(tb testing.TB, n int) (*Table, []ims.Flow) {
	b := newBench(tb)
	flows := make([]ims.Flow, n)
	for i := range flows {
		s, err := b.table.Begin(&Offer{
			IMPI: fmt.Sprintf("user%d@ims", i), Local: gm, UE: netip.AddrFrom4([4]byte{10, 64 + byte(i>>16), byte(i >> 8), byte(i)}),
			SPIC: 5000, SPIS: 5001, PortC: 31000, PortS: 31001,
		}, ims.ESPKeys{}, func(*Set, error) {})
		if err != nil {
			tb.Fatal(err)
		}
		b.backend.Answer()
		if s.Phase != sa.Temporary {
			tb.Fatalf("set %d is %v", i, s.Phase)
		}
		flows[i] = flowOf(s.Params.UE, s.Ports.UC, s.Ports.PS)
		flows[i].Label = s.Label
	}
	return b.table, flows
}

func TestFindDoesNotAllocate(t *testing.T) {
	table, flows := many(t, 100)
	i := 0
	for name, label := range map[string]uint32{"label": 1<<32 - 1, "tuple": 0} {
		if n := testing.AllocsPerRun(1000, func() {
			f := flows[i%len(flows)]
			f.Label &= label
			if table.Find(f) == nil {
				t.Fatalf("%s: phone %d is unknown", name, i)
			}
			i++
		}); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// What finding the set by label costs against finding it by tuple, with what every message reads of the set and its context
// afterwards: the ratio is what counts, not the times.
func BenchmarkFind(b *testing.B) {
	table, flows := many(b, 100_000)
	const stride = 7919 // a prime: neighbours in the table do not come one after the other
	for name, label := range map[string]uint32{"label": 1<<32 - 1, "tuple": 0} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i = (i + stride) % len(flows) {
				f := flows[i]
				f.Label &= label
				if s := table.Find(f); s == nil || s.UE.State != Pending || s.UE.Current != nil || len(s.UE.Sets) != 1 || s.Ports.US != 31001 {
					b.Fatal("a phone is unknown")
				}
			}
		})
	}
}
