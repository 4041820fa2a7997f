package guard

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/bpf"
)

// Tally counts packets and octets of one reason.
type Tally struct{ Packets, Bytes uint64 }

// Stats are the guard's counters, since the first run with this pin directory.
type Stats struct {
	Tallies [reasons]Tally // by Reason

	SAs, SACapacity int // inbound SAs, those of other programs included
	UEs, UECapacity int // UE contexts with counters
	SourceCapacity  int // of the limit; CountSources tells how many there are

	FirstUses   uint64 // reported by the ring
	Samples     uint64 // of drops
	LostUses    uint64 // first uses that did not fit into the ring; harmless, the packets were let pass
	LostSamples uint64
	Missed      uint64 // samples that a follower was too slow for
}

// Tally returns the counter of a reason.
func (s *Stats) Tally(r Reason) Tally {
	if r < reasons {
		return s.Tallies[r]
	}
	return Tally{}
}

// Stats reads the counters, which takes some twenty system calls.
func (g *Guard) Stats() (Stats, error) {
	s := Stats{SACapacity: g.cfg.SAs, UECapacity: g.cfg.UEs, SourceCapacity: g.cfg.Sources}
	s.SAs, s.UEs = g.table.fill()
	s.FirstUses, s.Samples, s.Missed = g.rings.firstUses.Load(), g.rings.samples.Load(), g.followers.missed.Load()
	var errs []error
	var lane []bpf.GuardTally
	for r := range reasons {
		if err := g.objs.Tallies.Lookup(uint32(r), &lane); err != nil {
			errs = append(errs, err)
			continue
		}
		for _, t := range lane {
			s.Tallies[r].Packets += t.Packets
			s.Tallies[r].Bytes += t.Bytes
		}
	}
	for ring, n := range map[bpf.GuardRingKind]*uint64{
		bpf.GuardRingKindRING_FIRST_USE: &s.LostUses, bpf.GuardRingKindRING_DROP: &s.LostSamples,
	} {
		var lost []uint64
		if err := g.objs.Losses.Lookup(uint32(ring), &lost); err != nil {
			errs = append(errs, err)
			continue
		}
		for _, v := range lost {
			*n += v
		}
	}
	return s, errors.Join(errs...)
}

// readBatch is how many entries of a map are read at once.
const readBatch = 4096

// CountSources returns how many sources the limit remembers. It reads all of them, which takes milliseconds.
func (g *Guard) CountSources() (n int, err error) {
	if err = g.eachSource(func(bpf.GuardAddress, uint64) { n++ }); err != nil {
		err = fmt.Errorf("count sources: %w", err)
	}
	return n, err
}

// eachSource reads the buckets of the limit, each as the time at which it is full.
func (g *Guard) eachSource(f func(bpf.GuardAddress, uint64)) error {
	var cursor ebpf.MapBatchCursor
	keys, values := make([]bpf.GuardAddress, readBatch), make([]uint64, readBatch)
	for {
		n, err := g.objs.Sources.BatchLookup(&cursor, keys, values, nil)
		for i := range n {
			f(keys[i], values[i])
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) { // that was the last batch
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// forgetOldLimit empties the buckets that the limit of the run before has left and this one cannot have made. They hold times:
// what a slow limit with a great burst has lent would keep a source out for days under another one.
func (g *Guard) forgetOldLimit() error {
	if g.cfg.Rate == 0 {
		return nil
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return os.NewSyscallError("clock_gettime", err)
	}
	last := uint64(now.Nano() + int64(g.cfg.interval())*int64(g.cfg.Burst+maxSegments)) //nolint:gosec // the clock counts from the boot
	var old []bpf.GuardAddress
	err := g.eachSource(func(k bpf.GuardAddress, full uint64) {
		if full > last {
			old = append(old, k)
		}
	})
	for _, k := range old {
		if e := g.objs.Sources.Delete(k); e != nil && !errors.Is(e, ebpf.ErrKeyNotExist) {
			err = errors.Join(err, e)
		}
	}
	return err
}
