package xfrm

import (
	"context"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
)

// adoption is one run of Adopt.
type adoption struct {
	b       *Backend
	now     time.Time
	scratch messages // algorithm attributes with keys, for comparisons

	sets  []candidate
	first map[stateKey]int32 // the last candidate's SA with this key: 4·index into sets + index of the SA
	next  []int32            // the one before with the same key, -1 for none

	orphans []stateID // states of ours that belong to no set
	foreign []ims.SPI
	batch   []*candidate // in the books, limits not yet moved
	result  sa.Adoption
}

// candidate is a set that was asked for, and what the kernel has of it.
type candidate struct {
	p     *sa.Params
	added int64 // when the kernel added the oldest SA
	found uint8 // bits: SAs that are there
	stale uint8 // bits: SAs whose limit or label is not as it should be
}

// Adopt implements sa.Backend. Sets that Install would refuse are not adopted, of two entries with the same ID only the
// first is looked at, and of two sets that share an SA only one can be adopted; sets that are installed already are left
// as they are. The replay window of an adopted SA stays what it was. After an error the sets in the result are adopted
// nevertheless, and Adopt may be called again.
//
// A kernel locked down for confidentiality shows no keys: nothing can be adopted then, and all has to be installed anew.
func (b *Backend) Adopt(ctx context.Context, sets []sa.Params) (sa.Adoption, error) {
	b.extraMu.Lock()
	defer b.extraMu.Unlock()
	c, err := b.openConn(ctx)
	if err != nil {
		return sa.Adoption{}, fmt.Errorf("adopt SAs: %w", err)
	}
	defer func() { _ = c.sock.close() }()

	b.books.Lock()
	defer b.books.Unlock()
	a := b.newAdoption(sets)
	defer a.scratch.reset(0)
	err = c.dumpStates(a.reset, func(info *nl.XfrmUsersaInfo, attrs []byte) error {
		a.look(info, attrs)
		return b.interrupted(ctx)
	})
	if err == nil {
		err = a.decide(ctx, c)
	}
	slices.Sort(a.foreign)
	a.result.Foreign = slices.Compact(a.foreign)
	b.log.Info("looked for SAs of an earlier run", slog.Int("sets_wanted", len(sets)),
		slog.Int("sets_adopted", len(a.result.Adopted)), slog.Int("sas_removed", a.result.Removed),
		slog.Int("foreign_spis", len(a.result.Foreign)))
	if err != nil {
		return a.result, fmt.Errorf("adopt SAs: %w", err)
	}
	return a.result, nil
}

// newAdoption indexes the sets by their SAs.
func (b *Backend) newAdoption(sets []sa.Params) *adoption {
	a := &adoption{
		b: b, now: time.Now(),
		sets: make([]candidate, 0, len(sets)), first: make(map[stateKey]int32, 4*len(sets)), next: make([]int32, 0, 4*len(sets)),
	}
	seen := make(map[uint64]struct{}, len(sets))
	refused := 0
	for i := range sets {
		p := &sets[i]
		if _, again := seen[p.ID]; again {
			continue
		}
		seen[p.ID] = struct{}{}
		if _, installed := b.sets[p.ID]; installed {
			a.result.Adopted = append(a.result.Adopted, p.ID)
			continue
		}
		if !b.acceptable(p) {
			refused++
			continue
		}
		a.sets = append(a.sets, candidate{p: p})
		for _, id := range ids(p) {
			before, shared := a.first[id.key()]
			if !shared {
				before = -1
			}
			a.first[id.key()] = int32(len(a.next)) //nolint:gosec // four times the sets
			a.next = append(a.next, before)
		}
	}
	if refused > 0 {
		b.log.Warn("SA sets do not fit the configuration any more", slog.Int("count", refused))
	}
	return a
}

// acceptable reports whether Install would take a set.
func (b *Backend) acceptable(p *sa.Params) bool {
	c, err := cipherOf(p.Keys.Suite)
	return err == nil && c.check(&p.Keys) == nil && b.check(p) == nil
}

// reset forgets an interrupted dump.
func (a *adoption) reset() {
	for i := range a.sets {
		a.sets[i].found, a.sets[i].stale = 0, 0
	}
	a.orphans, a.foreign = a.orphans[:0], a.foreign[:0]
}

// look finds out whose a state of the kernel is.
func (a *adoption) look(info *nl.XfrmUsersaInfo, attrs []byte) {
	h := headOf(info)
	if !h.esp || h.id.spi == 0 { // 0: the kernel still waits for its keys
		return
	}
	if !a.b.owned(h) {
		if slices.Contains(a.b.cfg.Local, h.id.dst) {
			a.foreign = append(a.foreign, h.id.spi)
		}
		return
	}
	if _, installed := a.b.owners[h.id.key()]; installed {
		return
	}
	matched := false
	slot, ok := a.first[h.id.key()]
	for ; ok && slot >= 0; slot = a.next[slot] {
		s, i := &a.sets[slot/4], slot%4
		want := s.p.SAs()[i]
		if !a.matches(s.p, want, info, attrs) {
			continue
		}
		added := int64(info.Curlft.AddTime) //nolint:gosec // seconds
		if s.found == 0 || added < s.added {
			s.added = added
		}
		s.found |= 1 << i
		if !a.current(s.p, want, info, attrs) {
			s.stale |= 1 << i
		}
		matched = true
	}
	if !matched {
		a.orphans = append(a.orphans, h.id)
	}
}

// matches reports whether a state is what Install would have made of an SA, apart from what Extend can change.
func (a *adoption) matches(p *sa.Params, want sa.SA, info *nl.XfrmUsersaInfo, attrs []byte) bool {
	if info.Family != family(want.Dst.Addr()) || info.Saddr != address(want.Src.Addr()) || info.Mode != modeTransport ||
		info.Flags != 0 || info.Sel != hostSelector(want.Src, want.Dst) {
		return false
	}
	for _, typ := range []uint16{nl.XFRMA_MARK, nl.XFRMA_IF_ID, nl.XFRMA_ENCAP, nl.XFRMA_COADDR, nl.XFRMA_OFFLOAD_DEV} {
		if _, ok := findAttr(attrs, typ); ok {
			return false
		}
	}
	c, err := cipherOf(p.Keys.Suite)
	if err != nil { // see acceptable
		return false
	}
	a.scratch.reset(0)
	a.scratch.keys(c, &p.Keys)
	same := 1
	for b := a.scratch.buf; len(b) >= unix.SizeofRtAttr; {
		n := int(binary.NativeEndian.Uint16(b))
		have, _ := findAttr(attrs, binary.NativeEndian.Uint16(b[2:]))
		same &= subtle.ConstantTimeCompare(have, b[unix.SizeofRtAttr:n])
		b = b[min((n+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1), len(b)):]
	}
	return same == 1
}

// limitSlack is how far a limit may be from where it should be: it was computed from the same end of a registration, and
// moving it costs as much as adding the SA.
const limitSlack = 2

// current reports whether limit and label of a state are as they should be.
func (a *adoption) current(p *sa.Params, want sa.SA, info *nl.XfrmUsersaInfo, attrs []byte) bool {
	life := backstop(ageOf(int64(info.Curlft.AddTime), a.now), p.Hard) //nolint:gosec // seconds
	soft, hard := info.Lft.SoftAddExpiresSeconds, info.Lft.HardAddExpiresSeconds
	if soft+1 != hard || max(hard, life.hard)-min(hard, life.hard) > limitSlack {
		return false
	}
	if want.Dir == sa.Out || p.Label == 0 {
		return true
	}
	mark, _ := findAttr(attrs, nl.XFRMA_SET_MARK)
	mask, _ := findAttr(attrs, nl.XFRMA_SET_MARK_MASK)
	return slices.Equal(mark, words(p.Label)) && slices.Equal(mask, words(^uint32(0)))
}

// decide adopts the sets that are there and removes what is left over.
func (a *adoption) decide(ctx context.Context, c *conn) error {
	for i := range a.sets {
		s := &a.sets[i]
		if s.found != allFound || a.claimed(s.p) {
			continue
		}
		a.b.enter(s.p, s.added)
		if a.batch = append(a.batch, s); len(a.batch) == maxSets {
			if err := a.b.interrupted(ctx); err != nil {
				a.abandon()
				return err
			}
			a.update(c)
		}
	}
	a.update(c)
	for i := range a.sets {
		for j, id := range ids(a.sets[i].p) {
			if _, taken := a.b.owners[id.key()]; !taken && a.sets[i].found&(1<<j) != 0 {
				a.orphans = append(a.orphans, id)
			}
		}
	}
	for list := range slices.Chunk(a.orphans, 64*maxBatch) {
		if err := a.b.interrupted(ctx); err != nil {
			return err
		}
		n, err := c.removeStates(list)
		a.result.Removed += n
		if err != nil {
			return err
		}
	}
	return nil
}

// claimed reports whether an SA of a set belongs to another one.
func (a *adoption) claimed(p *sa.Params) bool {
	for _, id := range ids(p) {
		if _, taken := a.b.owners[id.key()]; taken {
			return true
		}
	}
	return false
}

// abandon takes the sets of the batch out of the books again.
func (a *adoption) abandon() {
	for _, s := range a.batch {
		a.b.strike(s.p)
	}
	a.batch = a.batch[:0]
}

// update moves limits and labels of the sets of the batch. One that the kernel refuses, because an SA has expired since
// the dump, is not adopted.
func (a *adoption) update(c *conn) {
	var owners []int // of each message: index into batch
	errs := make([]error, len(a.batch))
	c.reset()
	for i, s := range a.batch {
		p := *s.p
		p.Keys = blankKeys(p.Keys.Suite)
		for j, want := range p.SAs() {
			if s.stale&(1<<j) == 0 {
				continue
			}
			st := a.b.state(want, &p, backstop(ageOf(s.added, a.now), p.Hard))
			mark, count := len(c.buf), c.count
			if err := c.state(nl.XFRM_MSG_UPDSA, &st); err != nil {
				c.cut(mark, count)
				errs[i] = errors.Join(errs[i], err)
				continue
			}
			owners = append(owners, i)
		}
	}
	for m, err := range c.run() {
		errs[owners[m]] = errors.Join(errs[owners[m]], err)
	}
	for i, s := range a.batch {
		if errs[i] == nil {
			a.result.Adopted = append(a.result.Adopted, s.p.ID)
			continue
		}
		a.b.log.Warn("SA set cannot be adopted", slog.Uint64("sa_set", s.p.ID), slog.Any("error", errs[i]))
		a.b.strike(s.p)
	}
	a.batch = a.batch[:0]
}
