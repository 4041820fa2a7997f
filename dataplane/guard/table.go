package guard

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/bpf"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
)

// noSlot is the place of an SA without counters of its own: NO_SLOT of bpf/consts.h.
const noSlot = ^uint32(0)

// table keeps the maps of SPIs and of traffic.
type table struct {
	local func(ims.SPI, *sa.Params) (bpf.GuardSaKey, bool)
	sas   *ebpf.Map
	cap   int
	lanes int

	memory   []byte             // the mapping of the map of traffic
	counters []bpf.GuardTraffic // in it; written by the programs

	mu      sync.RWMutex
	entries int
	slots   map[uint32]place    // by label
	sets    map[uint64]standing // by set
	free    []uint32            // slots that were used before
	next    uint32              // the first one that never was
}

// place is where a UE context is counted.
type place struct {
	slot uint32
	sets uint32 // that use it
}

// standing is what is kept of a set. There are as many as phones: it holds no pointers, and there is one map of them.
type standing struct {
	first uint64 // CLOCK_MONOTONIC of its first packet; 0: none was seen
	label uint32
}

func (t *table) open(g *Guard) error {
	info, err := g.objs.Traffics.Info()
	if err != nil {
		return err
	}
	n := int(info.MaxEntries)
	t.lanes = n / g.cfg.UEs
	t.memory, err = unix.Mmap(g.objs.Traffics.FD(), 0, n*int(unsafe.Sizeof(bpf.GuardTraffic{})), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map the counters: %w", err)
	}
	t.counters = unsafe.Slice((*bpf.GuardTraffic)(unsafe.Pointer(&t.memory[0])), n)
	t.sas, t.cap = g.objs.Sas, g.cfg.SAs
	t.slots, t.sets = make(map[uint32]place), make(map[uint64]standing)
	t.local = func(spi ims.SPI, p *sa.Params) (bpf.GuardSaKey, bool) {
		i, ok := g.cfg.local(p.Local)
		return bpf.GuardSaKey{Spi: uint32(spi), Local: i}, ok
	}
	return nil
}

func (t *table) close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.memory == nil {
		return nil
	}
	m := t.memory
	t.memory, t.counters = nil, nil
	return os.NewSyscallError("munmap", unix.Munmap(m))
}

// keys are the inbound SAs of a set.
func (t *table) keys(p *sa.Params) (keys [2]bpf.GuardSaKey, err error) {
	for i, spi := range [2]ims.SPI{p.SPIs.PS, p.SPIs.PC} {
		k, ok := t.local(spi, p)
		if !ok {
			return keys, fmt.Errorf("%s is no Gm address of the guard", p.Local)
		}
		keys[i] = k
	}
	return keys, nil
}

// add puts the inbound SAs of a set in, both or none. What is there already of the set stays as it is.
func (t *table) add(p *sa.Params, flags uint32) error {
	keys, err := t.keys(p)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	s, again := t.sets[p.ID]
	if !again {
		s.label = p.Label
		t.take(s.label)
	}
	v := bpf.GuardSaValue{Source: guardAddress(p.UE), Set: p.ID, Slot: t.slots[s.label].slot, Flags: flags}
	var written [len(keys)]bool
	for i := range keys {
		var err error
		if written[i], err = t.put(&keys[i], &v); err != nil { //nolint:gosec // G602: as many as there are keys
			for j := range i {
				if written[j] && t.sas.Delete(&keys[j]) == nil {
					t.entries--
				}
			}
			if !again {
				t.give(s.label)
			}
			return t.full(err)
		}
	}
	t.sets[p.ID] = s
	return nil
}

// put writes the entry of an SA. One that is there of the same set, which was installed again, stays; one of another set
// was left behind. Of pointers the library makes no copies.
func (t *table) put(k *bpf.GuardSaKey, v *bpf.GuardSaValue) (wrote bool, err error) {
	err = t.sas.Update(k, v, ebpf.UpdateNoExist)
	if err == nil {
		t.entries++
		return true, nil
	}
	if !errors.Is(err, ebpf.ErrKeyExist) {
		return false, err
	}
	var old bpf.GuardSaValue
	if err := t.sas.Lookup(k, &old); err != nil {
		return false, err
	}
	if old.Set == v.Set {
		return false, nil
	}
	return true, t.sas.Put(k, v)
}

// full tells that the map has no room from other errors.
func (t *table) full(err error) error {
	if errors.Is(err, unix.E2BIG) || errors.Is(err, unix.ENOMEM) {
		return fmt.Errorf("%w: %d of %d entries: %w", ErrFull, t.entries, t.cap, err)
	}
	return err
}

// take makes a UE context have a place, for one more set.
func (t *table) take(label uint32) {
	p, ok := t.slots[label]
	if !ok {
		p.slot = t.newSlot()
	}
	p.sets++
	t.slots[label] = p
}

// newSlot returns an unused slot with counters at zero, or noSlot.
func (t *table) newSlot() uint32 {
	var slot uint32
	switch n := len(t.free); {
	case n > 0:
		slot, t.free = t.free[n-1], t.free[:n-1]
	case int(t.next) < len(t.counters)/t.lanes:
		slot = t.next
		t.next++
	default:
		return noSlot
	}
	t.zero(slot)
	return slot
}

// zero clears the counters of a slot. The SAs of whoever had it are gone.
func (t *table) zero(slot uint32) {
	for i := range t.lanes {
		c := &t.counters[int(slot)*t.lanes+i]
		atomic.StoreUint64(&c.Packets, 0)
		atomic.StoreUint64(&c.Bytes, 0)
		atomic.StoreUint64(&c.Last, 0)
	}
}

// give takes back what take has done.
func (t *table) give(label uint32) {
	p := t.slots[label]
	if p.sets--; p.sets > 0 {
		t.slots[label] = p
		return
	}
	delete(t.slots, label)
	if p.slot != noSlot {
		t.free = append(t.free, p.slot)
	}
}

// forget ends what is kept of a set. One that is not there is no error.
func (t *table) forget(set uint64) {
	if s, ok := t.sets[set]; ok {
		delete(t.sets, set)
		t.give(s.label)
	}
}

// remove takes the inbound SAs of a set out. One that is not there is no error, and one that another set has taken over
// stays.
func (t *table) remove(p *sa.Params) error {
	keys, err := t.keys(p)
	if err != nil {
		return nil // it was never there
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	var v bpf.GuardSaValue
	for i := range keys {
		k := &keys[i]
		err := t.sas.Lookup(k, &v)
		if err == nil && v.Set == p.ID {
			if err = t.sas.Delete(k); err == nil {
				t.entries--
			}
		}
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, err)
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...) // what is left is counted where it was
	}
	t.forget(p.ID)
	return nil
}

// sync makes the map hold the SAs of these sets, those of other programs, and nothing else. Counters of UE contexts that
// were there stay.
func (t *table) sync(sets []sa.Params, foreign []bpf.GuardSaKey) error {
	wanted := make(map[bpf.GuardSaKey]*sa.Params, 2*len(sets)+len(foreign)) // nil: foreign
	for _, k := range foreign {
		wanted[k] = nil
	}
	for i := range sets {
		keys, err := t.keys(&sets[i])
		if err != nil {
			return err
		}
		wanted[keys[0]], wanted[keys[1]] = &sets[i], &sets[i]
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.next, t.free = 0, nil
	clear(t.slots)
	var stale []bpf.GuardSaKey
	used := make(map[uint32]uint32) // slots, by label
	var k bpf.GuardSaKey
	var v bpf.GuardSaValue
	it := t.sas.Iterate()
	there := 0
	for it.Next(&k, &v) {
		there++
		p, ok := wanted[k]
		if !ok {
			stale = append(stale, k)
			continue
		}
		if p != nil && v.Source == guardAddress(p.UE) && int(v.Slot) < len(t.counters)/t.lanes {
			used[p.Label] = v.Slot
		}
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read the map of SPIs: %w", err)
	}
	t.entries = there
	t.reuse(used)
	before := t.sets
	t.sets = make(map[uint64]standing, len(sets))
	for i := range sets {
		if p := &sets[i]; !t.has(p.ID) {
			t.take(p.Label)
			t.sets[p.ID] = standing{first: before[p.ID].first, label: p.Label}
		}
	}
	// These first: there may be no room for both.
	for _, k := range stale {
		switch err := t.sas.Delete(k); {
		case err == nil:
			t.entries--
		case !errors.Is(err, ebpf.ErrKeyNotExist):
			return fmt.Errorf("clear the map of SPIs: %w", err)
		}
	}
	for k, p := range wanted {
		v := bpf.GuardSaValue{Slot: noSlot, Flags: uint32(bpf.GuardSaFlagSA_ANY_SOURCE)}
		if p != nil {
			v = bpf.GuardSaValue{Source: guardAddress(p.UE), Set: p.ID, Slot: t.slots[t.sets[p.ID].label].slot}
		}
		if err := t.sas.Put(&k, &v); err != nil {
			return fmt.Errorf("fill the map of SPIs: %w", t.full(err))
		}
	}
	t.entries = len(wanted)
	return nil
}

func (t *table) has(set uint64) bool {
	_, ok := t.sets[set]
	return ok
}

// reuse gives UE contexts the slots that they had. One that two of them claim goes to the first, whichever that is.
func (t *table) reuse(used map[uint32]uint32) {
	taken := make([]uint32, 0, len(used))
	owner := make(map[uint32]bool, len(used))
	for label, slot := range used {
		if !owner[slot] {
			owner[slot] = true
			t.slots[label] = place{slot: slot}
			taken = append(taken, slot)
		}
	}
	if len(taken) == 0 {
		return
	}
	slices.Sort(taken)
	t.next = taken[len(taken)-1] + 1
	for slot, i := uint32(0), 0; slot < t.next; slot++ {
		if taken[i] == slot {
			i++
			continue
		}
		t.free = append(t.free, slot)
	}
}

// traffic adds the lanes of a UE context up.
func (t *table) traffic(label uint32) sa.Traffic {
	t.mu.RLock()
	defer t.mu.RUnlock()
	var s sa.Traffic
	p, ok := t.slots[label]
	if !ok || p.slot == noSlot || t.counters == nil {
		return s
	}
	var last uint64
	for i := range t.lanes {
		c := &t.counters[int(p.slot)*t.lanes+i]
		s.Packets += atomic.LoadUint64(&c.Packets)
		s.Bytes += atomic.LoadUint64(&c.Bytes)
		last = max(last, atomic.LoadUint64(&c.Last))
	}
	if last != 0 {
		s.Last = wall(last)
	}
	return s
}

// seen notes the first packet of a set; what is told of one that has gone since is of no use to anybody.
func (t *table) seen(set, at uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s, ok := t.sets[set]; ok && s.first == 0 {
		s.first = at
		t.sets[set] = s
	}
}

func (t *table) firstOf(set uint64) time.Time {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if at := t.sets[set].first; at != 0 {
		return wall(at)
	}
	return time.Time{}
}

// fill returns how many entries the map of SPIs has, and how many UE contexts are counted.
func (t *table) fill() (sas, ues int) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.entries, len(t.slots)
}

// moment is one on both clocks.
type moment struct {
	at   time.Time
	mono int64 // ns
}

// origin is any moment. Go's monotonic clock is CLOCK_MONOTONIC, but only differences can be had of it; with
// them a time is found without the system call that package unix makes for each.
var origin = sync.OnceValue(func() (o moment) {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) == nil { // there is no Linux without
		o.at, o.mono = time.Now(), ts.Nano()
	}
	return o
})

// wall turns a time of CLOCK_MONOTONIC into one of the wall clock.
func wall(mono uint64) time.Time {
	o, now := origin(), time.Now()
	return now.Add(time.Duration(int64(mono)-o.mono) - now.Sub(o.at)) //nolint:gosec // the clock counts from the boot
}

// Add lets packets pass on the inbound SAs of a set that has just been installed. The error matches ErrFull when there is
// no room: then the set is of no use.
func (g *Guard) Add(p sa.Params) error {
	if err := g.table.add(&p, uint32(bpf.GuardSaFlagSA_UNUSED)); err != nil {
		return fmt.Errorf("let SA set %#x pass the guard: %w", p.ID, err)
	}
	return nil
}

// Remove stops packets on the inbound SAs of a set. One that is not there is no error.
func (g *Guard) Remove(p sa.Params) error {
	if err := g.table.remove(&p); err != nil {
		return fmt.Errorf("take SA set %#x from the guard: %w", p.ID, err)
	}
	return nil
}

// Sync makes the guard let exactly these sets pass, and the SPIs of other programs towards our addresses. Counters of UE
// contexts that it knew stay. It is for the start, before Attach, and for repairs while no set comes or goes.
func (g *Guard) Sync(sets []sa.Params, foreign []ims.SPI) error {
	keys := make([]bpf.GuardSaKey, 0, len(foreign)*len(g.cfg.Local))
	for _, spi := range foreign {
		for i := range g.cfg.Local {
			keys = append(keys, bpf.GuardSaKey{Spi: uint32(spi), Local: uint32(i)}) //nolint:gosec // at most 16
		}
	}
	if err := g.table.sync(sets, keys); err != nil {
		return fmt.Errorf("bring guard and SA sets together: %w", err)
	}
	return nil
}

var _ sa.Witness = (*Guard)(nil)

// Traffic implements sa.Witness.
func (g *Guard) Traffic(label uint32) sa.Traffic { return g.table.traffic(label) }

// First implements sa.Witness.
func (g *Guard) First(set uint64) time.Time { return g.table.firstOf(set) }
