package sa

import (
	"errors"
	"net/netip"
	"testing"

	"pgregory.net/rapid"

	"github.com/gmgate/gmgate/control/ims"
)

// The four SAs of the trace in TS 33.203 §7.1 terms: each is named by its receiver.
func TestSAs(t *testing.T) {
	p := Params{
		Local: netip.MustParseAddr("10.0.0.5"), UE: netip.MustParseAddr("10.45.0.7"),
		Ports: ims.Ports{UC: 6301, US: 6300, PC: 6111, PS: 6100},
		SPIs:  ims.SPIs{UC: 0xec42a23d, US: 0xec42a23e, PC: 0x40000051, PS: 0x40000050},
	}
	ap := netip.MustParseAddrPort
	want := [4]SA{
		{In, 0x40000050, ap("10.45.0.7:6301"), ap("10.0.0.5:6100")},
		{In, 0x40000051, ap("10.45.0.7:6300"), ap("10.0.0.5:6111")},
		{Out, 0xec42a23e, ap("10.0.0.5:6111"), ap("10.45.0.7:6300")},
		{Out, 0xec42a23d, ap("10.0.0.5:6100"), ap("10.45.0.7:6301")},
	}
	if got := p.SAs(); got != want {
		t.Errorf("SAs() = %v, want %v", got, want)
	}
}

// Peers: B3.20
func TestCounters(t *testing.T) {
	c := Counters{7, 8, 100, 200}
	if got := c.Max(Counters{9, 1, 101, 1}); got != (Counters{9, 8, 101, 200}) {
		t.Errorf("Max: %v", got)
	}
	if got, err := c.Ahead(1000); err != nil || got != (Counters{7, 8, 1100, 1200}) {
		t.Errorf("Ahead: %v, %v", got, err)
	}
	// The last number is never used: there must be one left to send with.
	for _, full := range []Counters{{2: 1<<32 - 1}, {3: 1<<32 - 1001}} {
		if _, err := full.Ahead(1000); !errors.Is(err, ErrSequence) {
			t.Errorf("Ahead of %v: %v", full, err)
		}
	}
	if got, err := (Counters{0, 0, 1<<32 - 1002, 0}).Ahead(1000); err != nil || got[2] != 1<<32-2 {
		t.Errorf("Ahead up to the last number: %v, %v", got, err)
	}
}

// Every cell of the table: what is not in it changes nothing.
//
// Peers: B1.16
func TestPhases(t *testing.T) {
	legal := map[Phase]map[Event]Phase{
		Reserved:    {Acknowledged: Temporary, Refused: Dead, Removed: Dead},
		Temporary:   {Confirmed: Established, Removed: Dead},
		Established: {Replaced: Old, Removed: Dead},
		Old:         {Removed: Dead},
	}
	for p := Phase(0); p <= Dead+1; p++ {
		for e := Event(0); e <= Removed+1; e++ {
			next, ok := p.On(e)
			want, isLegal := legal[p][e]
			if !isLegal {
				want = p
			}
			if ok != isLegal || next != want {
				t.Errorf("%v on %v: %v, %v", p, e, next, ok)
			}
		}
	}
}

func TestSPIPoolRefusesBadRanges(t *testing.T) {
	for _, r := range [][2]ims.SPI{{0, 100}, {255, 4096}, {5000, 4999}} {
		if _, err := NewSPIPool(r[0], r[1]); err == nil {
			t.Errorf("range %v was accepted", r)
		}
	}
}

// Every value is given out once, within the range, never one to avoid; a full pool says so; freed values come back.
//
// Peers: A1.03a, B1.13, B2.21a
func TestSPIPool(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		first := ims.SPI(rapid.Uint32Range(256, 1<<32-1).Draw(t, "first"))
		size := rapid.Uint32Range(1, 3000).Draw(t, "size")
		last := ims.SPI(min(uint64(first)+uint64(size)-1, 1<<32-1))
		p, err := NewSPIPool(first, last)
		if err != nil {
			t.Fatal(err)
		}
		avoid := first + (last-first)/2
		seen := make(map[ims.SPI]bool)
		for range p.Capacity() {
			s, err := p.Take(avoid)
			if errors.Is(err, ErrSPIExhausted) && len(seen) == int(last-first) {
				break // a tiny pool whose only value left is the one to avoid
			}
			if err != nil {
				t.Fatalf("after %d of %d: %v", len(seen), p.Capacity(), err)
			}
			if s < first || s > last || s == avoid || seen[s] {
				t.Fatalf("value %d: range %d..%d, avoid %d, seen %v", s, first, last, avoid, seen[s])
			}
			seen[s] = true
		}
		if p.InUse() == p.Capacity() {
			if _, err := p.Take(); !errors.Is(err, ErrSPIExhausted) {
				t.Fatalf("full pool: %v", err)
			}
		}
		for s := range seen {
			p.Free(s)
			p.Free(s)
		}
		if p.InUse() != 0 {
			t.Fatalf("%d in use after all were freed", p.InUse())
		}
		if _, err := p.Take(); err != nil {
			t.Fatalf("after freeing: %v", err)
		}
	})
}

// A value does not come back before the range was walked through.
func TestSPIPoolReusesLate(t *testing.T) {
	p, err := NewSPIPool(1000, 1999)
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[ims.SPI]bool)
	for range 1000 {
		s, err := p.Take()
		if err != nil {
			t.Fatal(err)
		}
		if seen[s] {
			t.Fatalf("%d came back after %d others", s, len(seen))
		}
		seen[s] = true
		p.Free(s)
	}
}

// Two pools over one range give different orders, and neighbours are no neighbours.
//
// Peers: A1.03b
func TestSPIPoolIsUnpredictable(t *testing.T) {
	a, _ := NewSPIPool(1<<28, 1<<32-1)
	b, _ := NewSPIPool(1<<28, 1<<32-1)
	same, close := 0, 0
	var last ims.SPI
	for range 1000 {
		x, _ := a.Take()
		y, _ := b.Take()
		if x == y {
			same++
		}
		if d := int64(x) - int64(last); d > -1<<20 && d < 1<<20 {
			close++
		}
		last = x
	}
	if same > 2 || close > 20 {
		t.Errorf("of 1000 values %d are the same in both pools and %d lie within 2^20 of the one before", same, close)
	}
}

// What is reserved is not given out until it is freed.
//
// Peers: A1.03e
func TestSPIPoolReserve(t *testing.T) {
	p, err := NewSPIPool(1000, 1015)
	if err != nil {
		t.Fatal(err)
	}
	for _, spi := range []ims.SPI{999, 1016} {
		if p.Reserve(spi) {
			t.Errorf("%d was reserved", spi)
		}
	}
	if !p.Reserve(1007) || p.Reserve(1007) {
		t.Error("1007 was not reserved once")
	}
	for p.InUse() < p.Capacity() {
		if spi, err := p.Take(); err != nil || spi == 1007 {
			t.Fatalf("took %d: %v", spi, err)
		}
	}
	p.Free(1007)
	if spi, err := p.Take(); err != nil {
		t.Errorf("nothing to take after freeing: %d, %v", spi, err)
	}
}

// Take stays O(1) on a pool that is nearly full.
//
// Peers: A1.03c, B2.22
func TestSPIPoolProbes(t *testing.T) {
	p, _ := NewSPIPool(1<<20, 1<<20+1<<16-1)
	total := 0
	for range p.Capacity() {
		if _, err := p.Take(); err != nil {
			t.Fatal(err)
		}
		total += p.probes
	}
	if mean := float64(total) / float64(p.Capacity()); mean > fillDen {
		t.Errorf("%.1f probes on average", mean)
	}
}

// Peers: A1.03d
func TestSplit(t *testing.T) {
	next := uint64(256)
	for k := range 3 {
		lo, hi := Split(256, 1<<32-1, k, 3)
		if uint64(lo) != next || hi < lo {
			t.Fatalf("part %d is %d..%d, want it to start at %d", k, lo, hi, next)
		}
		next = uint64(hi) + 1
	}
	if next != 1<<32 {
		t.Errorf("parts end at %d", next)
	}
}
