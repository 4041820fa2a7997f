package guard

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/gmgate/gmgate/bpf"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
)

// TestLayout compares the Go types with those of the object, and the numbers that both have.
func TestLayout(t *testing.T) {
	spec, err := bpf.LoadGuard()
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]any{
		"address": bpf.GuardAddress{}, "sa_key": bpf.GuardSaKey{}, "sa_value": bpf.GuardSaValue{}, "traffic": bpf.GuardTraffic{},
		"tally": bpf.GuardTally{}, "first_use": bpf.GuardFirstUse{}, "dropped": bpf.GuardDropped{},
	} {
		var c *btf.Struct
		if err := spec.Types.TypeByName(name, &c); err != nil {
			t.Errorf("struct %s: %v", name, err)
			continue
		}
		typ := reflect.TypeOf(v)
		if int(c.Size) != int(typ.Size()) || binary.Size(v) != int(typ.Size()) {
			t.Errorf("struct %s has %d octets in C, %d in Go, %d without padding", name, c.Size, typ.Size(), binary.Size(v))
		}
		var want, got []string
		for _, m := range c.Members {
			want = append(want, fmt.Sprintf("%s at %d", strings.ReplaceAll(m.Name, "_", ""), m.Offset.Bytes()))
		}
		for f := range typ.Fields() {
			if f.Name != "_" {
				got = append(got, fmt.Sprintf("%s at %d", strings.ToLower(f.Name), f.Offset))
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("struct %s (-C +Go):\n%s", name, diff)
		}
	}
	if n := spec.Variables[bpf.GuardVarLocal].Size(); n != maxLocal*uint32(unsafe.Sizeof(bpf.GuardAddress{})) {
		t.Errorf("the programs have room for %d octets of Gm addresses, want %d addresses", n, maxLocal)
	}
	if n := spec.Variables[bpf.GuardVarProtectedPorts].Size(); n != 65536/8 {
		t.Errorf("%d octets of protected ports", n)
	}
	for name, want := range map[string][2]uint32{
		bpf.GuardMapSas:      {uint32(unsafe.Sizeof(bpf.GuardSaKey{})), uint32(unsafe.Sizeof(bpf.GuardSaValue{}))},
		bpf.GuardMapTraffics: {4, uint32(unsafe.Sizeof(bpf.GuardTraffic{}))},
		bpf.GuardMapSources:  {uint32(unsafe.Sizeof(bpf.GuardAddress{})), 8},
		bpf.GuardMapTallies:  {4, uint32(unsafe.Sizeof(bpf.GuardTally{}))},
		bpf.GuardMapLosses:   {4, 8},
	} {
		if m := spec.Maps[name]; m.KeySize != want[0] || m.ValueSize != want[1] {
			t.Errorf("map %s has keys of %d and values of %d octets, want %v", name, m.KeySize, m.ValueSize, want)
		}
	}
	if n := spec.Maps[bpf.GuardMapTallies].MaxEntries; n != uint32(reasons) {
		t.Errorf("%d counters for %d reasons", n, reasons)
	}
	if 64%unsafe.Sizeof(bpf.GuardTraffic{}) != 0 {
		t.Error("counters of a UE straddle cache lines")
	}
}

// TestReasons says that each value of the enum has a name of its own, and which are drops.
func TestReasons(t *testing.T) {
	spec, err := bpf.LoadGuard()
	if err != nil {
		t.Fatal(err)
	}
	var enum *btf.Enum
	if err := spec.Types.TypeByName("reason", &enum); err != nil {
		t.Fatal(err)
	}
	seen := make(map[string]string)
	for _, v := range enum.Values {
		r := Reason(v.Value) //nolint:gosec // an enum of C
		if r == reasons {
			continue
		}
		name := r.String()
		if name == "" || strings.ContainsAny(name, " ()") {
			t.Errorf("%s is named %q", v.Name, name)
		}
		if other, ok := seen[name]; ok {
			t.Errorf("%s and %s are both named %s", v.Name, other, name)
		}
		seen[name] = v.Name
		if r.Dropped() != strings.HasPrefix(v.Name, "DROP_") || r.Verdict() != strings.ToLower(v.Name[:4]) {
			t.Errorf("%s: dropped %v, verdict %s", v.Name, r.Dropped(), r.Verdict())
		}
	}
	if len(seen) != int(reasons) || len(Reasons()) != int(reasons) || Reasons()[DropCleartext] != DropCleartext {
		t.Errorf("%d names for %d reasons, %v", len(seen), reasons, Reasons())
	}
	if got := reasons.String(); got != "Reason(18)" {
		t.Errorf("no reason is named %s", got)
	}
}

// TestFirstSPI says that programs and vocabulary draw the line at the same SPI, and that the place of nobody lies behind
// every map of counters.
func TestFirstSPI(t *testing.T) {
	w := newWard(t, testConfig())
	set := setOf(90, 9, local4, phone4, ims.MinSPI)
	if err := w.Add(set); err != nil {
		t.Fatal(err)
	}
	w.model.sas[modelSA{local4, ims.MinSPI}] = phone4
	w.expect(t, "first SPI", ip(phone4, local4, protoESP, esp(uint32(ims.MinSPI))), PassESP)
	w.expect(t, "the one before", ip(phone4, local4, protoESP, esp(uint32(ims.MinSPI)-1)), DropSPIReserved)
	before := slices.Clone(w.table.counters)
	w.expect(t, "foreign", ip(phone4, local4, protoESP, esp(spiForeign)), PassUnknownSPI)
	// With the place of nobody an SA of ours passes as well, and counts for nobody.
	k, _ := w.table.local(ims.MinSPI, &set)
	v := bpf.GuardSaValue{Source: guardAddress(phone4), Set: 90, Slot: noSlot}
	if err := w.objs.Sas.Put(k, &v); err != nil {
		t.Fatal(err)
	}
	w.expect(t, "without a place", ip(phone4, local4, protoESP, esp(uint32(ims.MinSPI))), PassESP)
	if !slices.Equal(before, w.table.counters) {
		t.Error("packets without a place were counted for a UE context")
	}
}

// content reads the map of SPIs.
func content(t rapid.TB, g *Guard) map[bpf.GuardSaKey]bpf.GuardSaValue {
	t.Helper()
	all := make(map[bpf.GuardSaKey]bpf.GuardSaValue)
	var k bpf.GuardSaKey
	var v bpf.GuardSaValue
	it := g.objs.Sas.Iterate()
	for it.Next(&k, &v) {
		all[k] = v
	}
	if err := it.Err(); err != nil {
		t.Fatal(err)
	}
	return all
}

func mustAdd(t testing.TB, g *Guard, sets ...sa.Params) {
	t.Helper()
	for _, s := range sets {
		if err := g.Add(s); err != nil {
			t.Fatal(err)
		}
	}
}

func mustRemove(t testing.TB, g *Guard, sets ...sa.Params) {
	t.Helper()
	for _, s := range sets {
		if err := g.Remove(s); err != nil {
			t.Fatal(err)
		}
	}
}

// fill compares how full the table says it is with the map.
func checkFill(t testing.TB, g *Guard, sas, ues int) {
	t.Helper()
	s, err := g.Stats()
	if err != nil || s.SAs != sas || s.UEs != ues || len(content(t, g)) != sas {
		t.Errorf("%d SAs of %d UE contexts, %d in the map, %v; want %d of %d", s.SAs, s.UEs, len(content(t, g)), err, sas, ues)
	}
}

func tableConfig(sas, ues int) Config {
	return Config{Local: []netip.Addr{local4, local6}, SAs: sas, UEs: ues, Sources: 64}
}

func TestAddRemove(t *testing.T) {
	g := openGuard(t, tableConfig(16, 4))
	a, b := setOf(1, 1, local4, phone4, 0x1000), setOf(2, 1, local6, phone6, 0x1000)
	mustAdd(t, g, a, b)
	want := map[bpf.GuardSaKey]bpf.GuardSaValue{
		{Spi: 0x1000, Local: 0}: {Source: guardAddress(phone4), Set: 1, Flags: 1}, {Spi: 0x1001, Local: 0}: {Source: guardAddress(phone4), Set: 1, Flags: 1},
		{Spi: 0x1000, Local: 1}: {Source: guardAddress(phone6), Set: 2, Flags: 1}, {Spi: 0x1001, Local: 1}: {Source: guardAddress(phone6), Set: 2, Flags: 1},
	}
	same := cmp.Comparer(func(a, b bpf.GuardSaValue) bool { return a == b })
	if diff := cmp.Diff(want, content(t, g), same); diff != "" {
		t.Errorf("two sets (-want +got):\n%s", diff)
	}
	checkFill(t, g, 4, 1)

	// Again: what is there stays, used or not, and is not counted twice.
	used := want[bpf.GuardSaKey{Spi: 0x1000}]
	used.Flags = 0
	if err := g.objs.Sas.Put(bpf.GuardSaKey{Spi: 0x1000}, &used); err != nil {
		t.Fatal(err)
	}
	if err := g.objs.Sas.Delete(bpf.GuardSaKey{Spi: 0x1001}); err != nil { // as if the entry had been lost
		t.Fatal(err)
	}
	g.table.entries--
	mustAdd(t, g, a, a)
	want[bpf.GuardSaKey{Spi: 0x1000}] = used
	if diff := cmp.Diff(want, content(t, g), same); diff != "" {
		t.Errorf("again (-want +got):\n%s", diff)
	}
	checkFill(t, g, 4, 1)

	mustRemove(t, g, a)
	checkFill(t, g, 2, 1)
	mustRemove(t, g, a, a, setOf(77, 3, local4, phone4, 0x7000))
	checkFill(t, g, 2, 1)
	mustRemove(t, g, b)
	checkFill(t, g, 0, 0)

	elsewhere := setOf(9, 9, other4, phone4, 0x1000)
	if err := g.Add(elsewhere); err == nil || !strings.Contains(err.Error(), other4.String()) {
		t.Errorf("a set at an address that is not ours: %v", err)
	}
	mustRemove(t, g, elsewhere)
	checkFill(t, g, 0, 0)
}

func TestFull(t *testing.T) {
	for _, sas := range []int{4, 5} {
		g := openGuard(t, tableConfig(sas, 4))
		a, b, c := setOf(1, 1, local4, phone4, 0x1000), setOf(2, 2, local4, stranger4, 0x2000), setOf(3, 3, local4, phone4, 0x3000)
		mustAdd(t, g, a, b)
		before := content(t, g)
		for range 3 {
			if err := g.Add(c); !errors.Is(err, ErrFull) {
				t.Errorf("third set in %d entries: %v, want %v", sas, err, ErrFull)
			}
		}
		if !maps.Equal(before, content(t, g)) {
			t.Errorf("a set without room has changed the map: %v, before %v", content(t, g), before)
		}
		checkFill(t, g, 4, 2)
		// Half of a set that is there survives when the other half finds no room.
		if err := g.objs.Sas.Delete(bpf.GuardSaKey{Spi: 0x1001}); err != nil {
			t.Fatal(err)
		}
		for i := range sas - 3 {
			if err := g.objs.Sas.Put(bpf.GuardSaKey{Spi: uint32(0x9000 + i)}, &bpf.GuardSaValue{}); err != nil { //nolint:gosec // small
				t.Fatal(err)
			}
		}
		if err := g.Add(a); !errors.Is(err, ErrFull) {
			t.Errorf("half of a set: %v, want %v", err, ErrFull)
		}
		if _, ok := content(t, g)[bpf.GuardSaKey{Spi: 0x1000}]; !ok {
			t.Error("the half that was there has gone")
		}
		if err := g.Sync(nil, nil); err != nil {
			t.Fatal(err)
		}
		checkFill(t, g, 0, 0)
		mustAdd(t, g, c)
		checkFill(t, g, 2, 1)
		if err := g.Sync([]sa.Params{a, b, c}, nil); !errors.Is(err, ErrFull) {
			t.Errorf("synchronize three sets with %d entries: %v, want %v", sas, err, ErrFull)
		}
	}
}

// TestTakeOver has sets that get SPIs which others have left behind.
func TestTakeOver(t *testing.T) {
	g := openGuard(t, tableConfig(16, 4))
	a, b := setOf(1, 1, local4, phone4, 0x1000), setOf(2, 2, local4, stranger4, 0x1000)
	c := setOf(3, 3, local4, stranger4, 0x1001) // its port-ps has the SPI of b's port-pc
	mustAdd(t, g, a, b)
	for k, v := range content(t, g) {
		if v.Set != 2 || v.Source != guardAddress(stranger4) || v.Flags != uint32(bpf.GuardSaFlagSA_UNUSED) {
			t.Errorf("%v is %+v, want one of the later set", k, v)
		}
	}
	checkFill(t, g, 2, 2)
	mustRemove(t, g, a) // late
	checkFill(t, g, 2, 1)
	mustAdd(t, g, c)
	checkFill(t, g, 3, 2)
	mustRemove(t, g, b)
	checkFill(t, g, 2, 1)
	mustRemove(t, g, c)
	checkFill(t, g, 0, 0)

	if err := g.Sync(nil, []ims.SPI{0x5000}); err != nil {
		t.Fatal(err)
	}
	mustRemove(t, g, setOf(4, 4, local4, phone4, 0x5000))
	checkFill(t, g, 2, 0) // an SA of another program at each of our addresses is not ours to take out
}

// TestEvictTakenOver takes a set out of which one SPI has become another set's between the look at the map and the removal.
func TestEvictTakenOver(t *testing.T) {
	g := openGuard(t, tableConfig(16, 4))
	a, b := setOf(1, 1, local4, phone4, 0x1000), setOf(2, 2, local4, stranger4, 0x1001)
	mustAdd(t, g, a)
	keys, err := g.table.keys(&a)
	if err != nil {
		t.Fatal(err)
	}
	mustAdd(t, g, b)
	if err := g.table.evict(a.ID, keys[:]); err != nil {
		t.Fatal(err)
	}
	checkFill(t, g, 2, 1)
	for k, v := range content(t, g) {
		if v.Set != b.ID {
			t.Errorf("%v is %+v, want one of set %d", k, v, b.ID)
		}
	}
}

// mark counts packets of a UE context as the programs do.
func mark(t rapid.TB, g *Guard, label uint32, n uint64) {
	t.Helper()
	p, ok := g.table.slots[label]
	if !ok || p.slot == noSlot {
		t.Fatalf("UE context %d has no counters", label)
	}
	for i := range g.table.lanes {
		atomic.AddUint64(&g.table.counters[int(p.slot)*g.table.lanes+i].Packets, n)
		atomic.AddUint64(&g.table.counters[int(p.slot)*g.table.lanes+i].Bytes, 100*n)
		atomic.StoreUint64(&g.table.counters[int(p.slot)*g.table.lanes+i].Last, 1)
	}
}

func TestSlots(t *testing.T) {
	g := openGuard(t, tableConfig(64, 3))
	lanes := uint64(g.table.lanes) //nolint:gosec // positive
	sets := make([]sa.Params, 6)
	for i := range sets {
		sets[i] = setOf(uint64(i+1), uint32(i+1), local4, phone4, ims.SPI(0x1000+16*i)) //nolint:gosec // small
	}
	mustAdd(t, g, sets[:3]...)
	for i := range 3 {
		mark(t, g, uint32(i+1), uint64(i+1)) //nolint:gosec // small
	}
	for i := range uint64(3) {
		got := g.Traffic(uint32(i + 1)) //nolint:gosec // small
		if want := (i + 1) * lanes; got.Packets != want || got.Bytes != 100*want || got.Last.IsZero() {
			t.Errorf("UE context %d: %+v, want %d packets", i+1, got, want)
		}
	}
	// No counters for the fourth, which passes all the same, and has none when there is room later.
	mustAdd(t, g, sets[3])
	if v := content(t, g)[bpf.GuardSaKey{Spi: uint32(sets[3].SPIs.PS)}]; v.Slot != noSlot {
		t.Errorf("fourth UE context is counted at %d", v.Slot)
	}
	if got := g.Traffic(4); got != (sa.Traffic{}) {
		t.Errorf("fourth UE context: %+v", got)
	}
	mustRemove(t, g, sets[1])
	if got := g.Traffic(2); got != (sa.Traffic{}) {
		t.Errorf("UE context that is gone: %+v", got)
	}
	if got := g.Traffic(4); got != (sa.Traffic{}) {
		t.Errorf("fourth UE context later: %+v", got)
	}
	mustAdd(t, g, sets[4]) // takes the slot of the second one, at zero
	if got := g.Traffic(5); got != (sa.Traffic{}) || g.table.slots[5].slot == noSlot {
		t.Errorf("UE context in a used slot: %+v", got)
	}
	mark(t, g, 5, 50)
	// A second set of a context shares the counters, and the context keeps them until the last one has gone.
	second := setOf(11, 1, local6, phone6, 0x8000)
	mustAdd(t, g, second)
	mustRemove(t, g, sets[0])
	if got := g.Traffic(1); got.Packets != lanes {
		t.Errorf("UE context with one of two sets: %+v", got)
	}
	mustRemove(t, g, second)
	mustAdd(t, g, sets[5])
	if got := g.Traffic(6); got != (sa.Traffic{}) {
		t.Errorf("new UE context: %+v", got)
	}
	if got := g.Traffic(3); got.Packets != 3*lanes {
		t.Errorf("third UE context: %+v", got)
	}
	if got := g.Traffic(5); got.Packets != 50*lanes {
		t.Errorf("fifth UE context: %+v", got)
	}
}

func TestSync(t *testing.T) {
	g := openGuard(t, tableConfig(16, 4))
	lanes := uint64(g.table.lanes) //nolint:gosec // positive
	a, b, c, d := setOf(1, 1, local4, phone4, 0x1000), setOf(2, 2, local4, phone4, 0x2000), setOf(3, 3, local6, phone6, 0x3000), setOf(4, 4, local6, phone6, 0x4000)
	mustAdd(t, g, a, b, c)
	for label := range uint32(3) {
		mark(t, g, label+1, uint64(label)+1)
	}
	g.table.seen(1, 1000)
	g.table.seen(2, 1000)
	g.table.seen(99, 1000) // of a set that has gone
	foreign := []ims.SPI{0x5000, 0x3000}
	for range 2 {
		if err := g.Sync([]sa.Params{a, c, d}, foreign); err != nil {
			t.Fatal(err)
		}
		got := content(t, g)
		want := map[bpf.GuardSaKey]uint64{
			{Spi: 0x1000, Local: 0}: 1, {Spi: 0x1001, Local: 0}: 1, {Spi: 0x3000, Local: 1}: 3, {Spi: 0x3001, Local: 1}: 3,
			{Spi: 0x4000, Local: 1}: 4, {Spi: 0x4001, Local: 1}: 4, {Spi: 0x5000, Local: 0}: 0, {Spi: 0x5000, Local: 1}: 0, {Spi: 0x3000, Local: 0}: 0,
		}
		for k, set := range want {
			v, ok := got[k]
			foreign := v.Flags&uint32(bpf.GuardSaFlagSA_ANY_SOURCE) != 0
			if !ok || v.Set != set || foreign != (set == 0) || foreign != (v.Slot == noSlot) {
				t.Errorf("%v is %+v (%v), want one of set %d", k, v, ok, set)
			}
		}
		checkFill(t, g, len(want), 3)
		for label, packets := range map[uint32]uint64{1: lanes, 2: 0, 3: 3 * lanes, 4: 0} {
			if got := g.Traffic(label); got.Packets != packets {
				t.Errorf("UE context %d: %+v, want %d packets", label, got, packets)
			}
		}
		if g.First(1).IsZero() || !g.First(2).IsZero() || !g.First(99).IsZero() {
			t.Errorf("first packets at %s, %s, %s; want one of the set that stays only", g.First(1), g.First(2), g.First(99))
		}
	}
	// A map that is full of what is stale has room for what comes instead.
	full := openGuard(t, tableConfig(4, 4))
	mustAdd(t, full, a, b)
	if err := full.Sync([]sa.Params{c, d}, nil); err != nil {
		t.Error(err)
	}
	checkFill(t, full, 4, 2)
	if err := full.Sync([]sa.Params{setOf(9, 9, other4, phone4, 0x1000)}, nil); err == nil {
		t.Error("a set at an address that is not ours was taken")
	}
	checkFill(t, full, 4, 2)
	// Two contexts that claim one place, as after a crash in between: each has its own afterwards.
	for _, k := range []uint32{0x3000, 0x3001, 0x4000, 0x4001} {
		v := content(t, full)[bpf.GuardSaKey{Spi: k, Local: 1}]
		v.Slot = 2
		if err := full.objs.Sas.Put(bpf.GuardSaKey{Spi: k, Local: 1}, &v); err != nil {
			t.Fatal(err)
		}
	}
	if err := full.Sync([]sa.Params{c, d}, nil); err != nil {
		t.Fatal(err)
	}
	if x, y := full.table.slots[3].slot, full.table.slots[4].slot; x == y {
		t.Errorf("two UE contexts are counted at %d", x)
	}
	mustAdd(t, full) // nothing
	if err := full.Sync(nil, nil); err != nil {
		t.Fatal(err)
	}
	checkFill(t, full, 0, 0)
}

// TestTableConcurrently is for the race detector; at the end nothing is left.
func TestTableConcurrently(t *testing.T) {
	w := newWard(t, testConfig())
	if err := w.Sync(nil, nil); err != nil {
		t.Fatal(err)
	}
	rounds := 200
	if inGuest() {
		rounds = 40
	}
	var wg sync.WaitGroup
	for n := range 4 {
		wg.Go(func() {
			for i := range rounds {
				s := setOf(uint64(100*n+i%7+1), uint32(n%2+1), local4, phone4, ims.SPI(0x1000+256*n+2*(i%7))) //nolint:gosec // small
				if err := w.Add(s); err != nil {
					t.Error(err)
					return
				}
				if w.Traffic(s.Label).Packets > 1<<40 {
					t.Error("traffic of nobody")
				}
				w.First(s.ID)
				if err := w.Remove(s); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Go(func() {
		for range rounds {
			if _, err := w.Stats(); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Go(func() {
		for range rounds {
			for i := range uint32(4) {
				data := inFrame(ip(phone4, local4, protoESP, esp(0x1000+256*i)))
				if _, err := w.programs[0].prog.Run(&ebpf.RunOptions{Data: data}); err != nil {
					t.Error(err)
				}
			}
		}
	})
	wg.Wait()
	checkFill(t, w.Guard, 0, 0)
	w.table.mu.Lock()
	defer w.table.mu.Unlock()
	slices.Sort(w.table.free)
	if n := len(w.table.free); n != int(w.table.next) || len(slices.Compact(w.table.free)) != n || len(w.table.sets) != 0 {
		t.Errorf("slots %v of %d are free, %d sets are left", w.table.free, w.table.next, len(w.table.sets))
	}
}

// naive is the table as one would write it down: entries by key, and who is counted.
type naive struct {
	entries map[bpf.GuardSaKey]uint64     // the set; 0: another program's
	sets    map[uint64]uint32             // labels
	counted map[uint32]uint64             // what was counted, by label; absent: not counted
	sources map[bpf.GuardSaKey]netip.Addr // of entries of ours
}

const (
	naiveSAs = 10
	naiveUEs = 3
)

// TestTableModel compares table and map with the naive one over random operations.
func TestTableModel(t *testing.T) {
	g := openGuard(t, tableConfig(naiveSAs, naiveUEs))
	rapid.Check(t, func(t *rapid.T) {
		if err := g.Sync(nil, nil); err != nil {
			t.Fatal(err)
		}
		n := &naive{entries: make(map[bpf.GuardSaKey]uint64), sets: make(map[uint64]uint32), counted: make(map[uint32]uint64), sources: make(map[bpf.GuardSaKey]netip.Addr)}
		marks := uint64(0)
		set := func(id uint64) sa.Params { // neighbours share SPIs: one that was left behind
			local, ue := local4, phone4
			switch {
			case id%3 == 0:
				local, ue = local6, phone6
			case id%2 == 0:
				ue = stranger4
			}
			return setOf(id, uint32(id%5)+1, local, ue, ims.SPI(0x1000+id)) //nolint:gosec // small
		}
		check := func(t *rapid.T) {
			for id, label := range n.sets {
				if s, ok := g.table.sets[id]; !ok || s.label != label {
					t.Fatalf("set %d of UE context %d is kept as %+v", id, label, s)
				}
			}
			got := content(t, g)
			if len(got) != len(n.entries) || g.table.entries != len(got) || len(g.table.sets) != len(n.sets) {
				t.Fatalf("map %v, %d entries, %d sets; want %v, %d sets", got, g.table.entries, len(g.table.sets), n.entries, len(n.sets))
			}
			for k, set := range n.entries {
				v, ok := got[k]
				if !ok || v.Set != set || set != 0 && v.Source != guardAddress(n.sources[k]) {
					t.Fatalf("%v is %+v (%v), want one of set %d", k, v, ok, set)
				}
				if label, ok := n.sets[set]; ok && v.Slot != g.table.slots[label].slot {
					t.Fatalf("%v is counted at %d, its UE context at %d", k, v.Slot, g.table.slots[label].slot)
				}
			}
			slots := make(map[uint32]bool)
			for _, slot := range g.table.free {
				slots[slot] = true
			}
			if len(slots) != len(g.table.free) || len(slots)+len(n.counted) != int(g.table.next) {
				t.Fatalf("slots %v of %d are free, and %d are in use", g.table.free, g.table.next, len(n.counted))
			}
			users := make(map[uint32]uint32)
			for _, label := range n.sets {
				users[label]++
			}
			if len(users) != len(g.table.slots) {
				t.Fatalf("%d UE contexts have a place, want %d", len(g.table.slots), len(users))
			}
			for label, p := range g.table.slots {
				if p.sets != users[label] {
					t.Fatalf("%d sets share the place of UE context %d, want %d", p.sets, label, users[label])
				}
				_, counted := n.counted[label]
				if counted != (p.slot != noSlot) || p.slot != noSlot && slots[p.slot] {
					t.Fatalf("UE context %d is counted at %d, want counted %v and alone", label, p.slot, counted)
				}
				slots[p.slot] = true
				if got, want := g.Traffic(label).Packets, n.counted[label]*uint64(g.table.lanes); got != want { //nolint:gosec // positive
					t.Fatalf("UE context %d has %d packets, want %d", label, got, want)
				}
			}
		}
		// enter counts one more set.
		enter := func(p *sa.Params) {
			if !slices.Contains(slices.Collect(maps.Values(n.sets)), p.Label) && len(n.counted) < naiveUEs {
				n.counted[p.Label] = 0
			}
			n.sets[p.ID] = p.Label
		}
		leave := func(id uint64) {
			label := n.sets[id]
			delete(n.sets, id)
			if !slices.Contains(slices.Collect(maps.Values(n.sets)), label) {
				delete(n.counted, label)
			}
		}
		ids := rapid.Uint64Range(1, 9)
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				p := set(ids.Draw(t, "set"))
				keys, _ := g.table.keys(&p)
				err := g.Add(p)
				var written []bpf.GuardSaKey
				full := false
				for _, k := range keys {
					if owner, ok := n.entries[k]; ok && owner == p.ID {
						continue
					} else if !ok && len(n.entries) == naiveSAs {
						full = true
						break
					}
					n.entries[k], n.sources[k] = p.ID, p.UE
					written = append(written, k)
				}
				if full {
					for _, k := range written {
						delete(n.entries, k)
					}
				} else if _, ok := n.sets[p.ID]; !ok {
					enter(&p)
				}
				if full != errors.Is(err, ErrFull) || !full && err != nil {
					t.Fatalf("add set %d: %v, want full %v", p.ID, err, full)
				}
			},
			"remove": func(t *rapid.T) {
				p := set(ids.Draw(t, "set"))
				keys, _ := g.table.keys(&p)
				if err := g.Remove(p); err != nil {
					t.Fatal(err)
				}
				for _, k := range keys {
					if owner, ok := n.entries[k]; ok && owner == p.ID {
						delete(n.entries, k)
					}
				}
				if _, ok := n.sets[p.ID]; ok {
					leave(p.ID)
				}
			},
			"packets": func(t *rapid.T) {
				for _, label := range slices.Sorted(maps.Keys(n.counted)) {
					marks++
					mark(t, g, label, marks)
					n.counted[label] += marks
				}
			},
			"sync": func(t *rapid.T) {
				var sets []sa.Params
				keys := make(map[bpf.GuardSaKey]bool)
				for _, id := range rapid.SliceOfNDistinct(ids, 0, 4, rapid.ID).Draw(t, "sets") {
					p := set(id)
					k, _ := g.table.keys(&p)
					if keys[k[0]] || keys[k[1]] {
						continue // no two live SAs share one
					}
					keys[k[0]], keys[k[1]] = true, true
					sets = append(sets, p)
				}
				foreign := rapid.SliceOfN(rapid.Map(rapid.Uint32Range(0x2000, 0x2002), func(v uint32) ims.SPI { return ims.SPI(v) }), 0, 1).Draw(t, "foreign")
				// Counters stay where SPI and phone did.
				kept := make(map[uint32][]uint32)
				slotOf := make(map[uint32]uint64)
				for label, p := range g.table.slots {
					if p.slot != noSlot {
						slotOf[p.slot] = n.counted[label]
					}
				}
				before := content(t, g)
				for _, p := range sets {
					k, _ := g.table.keys(&p)
					for _, k := range k {
						if v, ok := before[k]; ok && v.Slot != noSlot && v.Source == guardAddress(p.UE) {
							kept[p.Label] = append(kept[p.Label], v.Slot)
						}
					}
				}
				if err := g.Sync(sets, foreign); err != nil {
					t.Fatal(err)
				}
				n.entries, n.sets = make(map[bpf.GuardSaKey]uint64), make(map[uint64]uint32)
				n.counted = make(map[uint32]uint64)
				for _, spi := range foreign {
					n.entries[bpf.GuardSaKey{Spi: uint32(spi)}], n.entries[bpf.GuardSaKey{Spi: uint32(spi), Local: 1}] = 0, 0
				}
				for _, p := range sets {
					k, _ := g.table.keys(&p)
					n.sets[p.ID] = p.Label
					for _, k := range k {
						n.entries[k], n.sources[k] = p.ID, p.UE
					}
				}
				labels := make(map[uint32]bool)
				for _, label := range n.sets {
					labels[label] = true
				}
				counted := 0
				for label := range labels {
					slot := g.table.slots[label].slot
					if slot == noSlot {
						continue
					}
					counted++
					n.counted[label] = 0
					if slices.Contains(kept[label], slot) {
						n.counted[label] = slotOf[slot]
					}
				}
				if counted != min(len(labels), naiveUEs) {
					t.Fatalf("%d of %d UE contexts are counted, there is room for %d", counted, len(labels), naiveUEs)
				}
			},
			"": check,
		})
	})
}

// TestWall compares the conversion of times with the clocks.
func TestWall(t *testing.T) {
	for range 3 {
		var ts unix.Timespec
		before := time.Now()
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
			t.Fatal(err)
		}
		after := time.Now()
		// What the test waited for its CPU between two clocks is all that can be wrong, here and at the first call.
		const slack = 5 * time.Second
		if got := wall(uint64(ts.Nano())); got.Before(before.Add(-slack)) || got.After(after.Add(slack)) { //nolint:gosec // not negative
			t.Errorf("%d is %s, want %s to %s", ts.Nano(), got, before, after)
		}
	}
	if d := wall(uint64(time.Hour)).Sub(wall(uint64(time.Minute))); d < 59*time.Minute-5*time.Second || d > 59*time.Minute+5*time.Second {
		t.Errorf("an hour and a minute after the boot are %s apart", d)
	}
}

// TestWitnessAllocatesNothing holds Traffic and First to what they promise to the workers that ask.
func TestWitnessAllocatesNothing(t *testing.T) {
	g := openGuard(t, tableConfig(16, 4))
	mustAdd(t, g, setOf(1, 1, local4, phone4, 0x1000))
	mark(t, g, 1, 1)
	g.table.seen(1, 1000)
	if n := testing.AllocsPerRun(100, func() {
		if g.Traffic(1).Packets == 0 || g.First(1).IsZero() {
			t.Error("nothing was seen")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
