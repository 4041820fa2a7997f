package xfrm

import (
	"context"
	"fmt"

	"github.com/vishvananda/netlink/nl"

	"github.com/gmgate/gmgate/control/sa"
)

// flux notes what changes while a Survey reads the kernel: of these sets and SAs the dump may show either side of the
// change. A nil one notes nothing.
type flux struct {
	sets   map[uint64]struct{}
	states map[stateKey]struct{}
}

// note records a request that is about to be executed. An extension neither adds nor removes anything.
func (f *flux) note(r *request) {
	if f == nil || r.op == opExtend {
		return
	}
	f.sets[r.p.ID] = struct{}{}
	for _, id := range ids(&r.p) {
		f.states[id.key()] = struct{}{}
	}
}

// surveyed is what a dump showed of one set.
type surveyed struct {
	counters sa.Counters
	found    uint8 // one bit for each SA
}

const allFound = 1<<4 - 1

// Survey implements sa.Backend. Sets that are installed or removed while it reads are in none of its results. One whose
// SA has reached the hard limit counts as missing until Remove.
func (b *Backend) Survey(ctx context.Context) (sa.Survey, error) {
	b.extraMu.Lock()
	defer b.extraMu.Unlock()
	c, err := b.openConn(ctx)
	if err != nil {
		return sa.Survey{}, fmt.Errorf("survey SAs: %w", err)
	}
	defer func() { _ = c.sock.close() }()

	b.books.Lock() // no batch is on its way
	b.flux = &flux{sets: map[uint64]struct{}{}, states: map[stateKey]struct{}{}}
	sets := make(map[uint64]surveyed, len(b.sets))
	b.books.Unlock()
	var strangers []stateKey
	err = c.dumpStates(func() {
		clear(sets)
		strangers = strangers[:0]
	}, func(info *nl.XfrmUsersaInfo, attrs []byte) error {
		h := headOf(info)
		if !b.owned(h) {
			return b.interrupted(ctx)
		}
		b.books.Lock()
		o, ok := b.owners[h.id.key()]
		b.books.Unlock()
		if !ok {
			strangers = append(strangers, h.id.key())
			return nil
		}
		s := sets[o.id]
		s.found |= 1 << o.sa
		in, out := sequences(attrs)
		s.counters[o.sa] = in
		if o.sa >= 2 { // the outbound ones
			s.counters[o.sa] = out
		}
		sets[o.id] = s
		return b.interrupted(ctx)
	})

	b.books.Lock()
	defer b.books.Unlock()
	f := b.flux
	b.flux = nil
	if err != nil {
		return sa.Survey{}, fmt.Errorf("survey SAs: %w", err)
	}
	return b.judge(f, sets, strangers), nil
}

// judge compares the books with a dump, as far as neither has changed meanwhile.
func (b *Backend) judge(f *flux, sets map[uint64]surveyed, strangers []stateKey) sa.Survey {
	result := sa.Survey{Sets: make(map[uint64]sa.Counters, len(sets))}
	for id := range b.sets {
		if _, changed := f.sets[id]; changed {
			continue
		}
		if s := sets[id]; s.found == allFound {
			result.Sets[id] = s.counters
		} else {
			result.Missing = append(result.Missing, id)
		}
	}
	for _, k := range strangers {
		if _, changed := f.states[k]; !changed {
			result.Orphans++
		}
	}
	return result
}
