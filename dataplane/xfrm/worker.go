package xfrm

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/sa"
)

// work executes requests and renews the policies until Close or Detach.
func (b *Backend) work() {
	defer close(b.stopped)
	renewal := time.NewTimer(b.cfg.renewal)
	defer renewal.Stop()
	var batch []request
	for {
		select {
		case _, open := <-b.wake:
			if !open {
				return
			}
			batch = b.serve(batch)
		case <-renewal.C:
			renewal.Reset(b.renew())
		}
	}
}

// serve executes requests until none is waiting. It works in the slice given and returns it.
func (b *Backend) serve(batch []request) []request {
	for {
		var refused []func(error)
		batch, refused = b.take(batch[:0])
		for _, done := range refused {
			done(ErrBusy)
		}
		if len(batch) == 0 {
			return batch
		}
		b.execute(batch)
		for i := range batch {
			batch[i].done(batch[i].err)
		}
		clear(batch)
	}
}

// renew makes the limits of the policies start anew and returns when to do it again.
func (b *Backend) renew() time.Duration {
	if err := place(b.conn, b.policies); err != nil {
		b.log.Error("cannot renew the constant policies", slog.Any("error", err))
		return min(renewalRetry, b.cfg.renewal)
	}
	return b.cfg.renewal
}

// take moves the next requests from the queue into batch. Two requests of one batch never concern the same set or the
// same SA, so that their order inside the batch does not matter and undoing one cannot harm another. After Close it
// answers whatever is waiting; after Detach it still hands out the removals.
func (b *Backend) take(batch []request) ([]request, []func(error)) {
	b.mu.Lock()
	if len(b.pending) == 0 {
		b.pending, b.queue = b.queue, nil
	}
	refused := b.refused
	b.refused = nil
	var late []request
	keep := b.keep
	if b.closed {
		late = slices.Concat(b.pending, b.queue)
		b.pending, b.queue = nil, nil
		if keep {
			b.pending = slices.DeleteFunc(slices.Clone(late), func(r request) bool { return r.op != opRemove })
			late = slices.DeleteFunc(late, func(r request) bool { return r.op == opRemove })
		}
	}
	n := 0
	for n < len(b.pending) && n < maxSets {
		if slices.ContainsFunc(batch, b.pending[n].conflicts) {
			break
		}
		batch = append(batch, b.pending[n])
		n++
	}
	clear(b.pending[:n])
	b.pending = b.pending[n:]
	b.waiting -= n
	b.mu.Unlock()
	for i := range late {
		late[i].cancel(keep)
	}
	return batch, refused
}

// conflicts reports whether two requests concern the same set or share an SA.
func (r *request) conflicts(o request) bool {
	if r.p.ID == o.p.ID {
		return true
	}
	mine, theirs := ids(&r.p), ids(&o.p)
	for _, id := range mine {
		if slices.Contains(theirs[:], id) {
			return true
		}
	}
	return false
}

// ids returns the kernel's keys of the four SAs.
func ids(p *sa.Params) (list [4]stateID) {
	for i, s := range p.SAs() {
		list[i] = stateID{s.Dst.Addr(), s.SPI}
	}
	return list
}

// execute sends the messages of a batch in one system call, undoes what failed, and leaves each request's result in it.
func (b *Backend) execute(batch []request) {
	b.books.Lock()
	defer b.books.Unlock()
	now := time.Now()
	for i := range batch {
		b.flux.note(&batch[i])
	}
	b.conn.reset()
	for i := range batch {
		r := &batch[i]
		r.first = b.conn.count
		mark := len(b.conn.buf)
		if r.err = b.compose(r, now); r.err != nil {
			b.conn.cut(mark, r.first)
		}
		r.count = b.conn.count - r.first
	}
	results := b.conn.run()

	var undo, unknown []stateID
	for i := range batch {
		r := &batch[i]
		if r.err != nil {
			continue
		}
		u, lost := b.settle(r, results[r.first:r.first+r.count], now)
		undo, unknown = append(undo, u...), append(unknown, lost...)
	}
	b.takeBack(undo, unknown)
	for i := range batch {
		batch[i].p.Keys.Zero()
	}
}

// cut drops the messages of a request that turned out to be unusable half way.
func (m *messages) cut(length, count int) {
	clear(m.buf[length:])
	m.buf, m.count = m.buf[:length], count
}

// compose writes the messages of a request.
func (b *Backend) compose(r *request, now time.Time) error {
	have, installed := b.sets[r.p.ID]
	switch r.op {
	case opInstall:
		if installed {
			return fmt.Errorf("install SA set %d: %w", r.p.ID, ErrDuplicate)
		}
		if err := b.check(&r.p); err != nil {
			return fmt.Errorf("install SA set %d: %w", r.p.ID, err)
		}
		for i, s := range r.p.SAs() {
			st := b.state(s, &r.p, backstop(0, r.p.Hard))
			st.seq = r.p.Counters[i]
			if err := b.conn.state(nl.XFRM_MSG_NEWSA, &st); err != nil {
				return fmt.Errorf("install SA set %d: %w: %w", r.p.ID, ErrParams, err)
			}
		}
	case opRemove:
		if !installed {
			return nil // SAs with these SPIs would be somebody else's
		}
		for i, id := range ids(&r.p) {
			if b.owns(r.p.ID, id) {
				r.sas = append(r.sas, uint8(i)) //nolint:gosec // at most 3
				b.conn.deleteState(id)
			}
		}
	case opExtend:
		if !installed {
			return fmt.Errorf("extend SA set %d: %w", r.p.ID, ErrUnknown)
		}
		// The limit counts from the day the state was added. An update must name algorithms, but only its limits and
		// mark are taken over: keys, sequence numbers and replay window stay.
		r.p.Keys = blankKeys(have.suite)
		for _, s := range r.p.SAs() {
			if !b.owns(r.p.ID, stateID{s.Dst.Addr(), s.SPI}) { // expired, and its SPI is another set's now
				return fmt.Errorf("extend SA set %d: %w", r.p.ID, &KernelError{Errno: unix.ESRCH})
			}
			st := b.state(s, &r.p, backstop(ageOf(have.added, now), r.hard))
			if err := b.conn.state(nl.XFRM_MSG_UPDSA, &st); err != nil {
				return fmt.Errorf("extend SA set %d: %w", r.p.ID, err)
			}
		}
	}
	return nil
}

// owns reports whether a state is an SA of a set.
func (b *Backend) owns(set uint64, id stateID) bool {
	o, ok := b.owners[id.key()]
	return ok && o.id == set
}

// enter puts a set into the books.
func (b *Backend) enter(p *sa.Params, added int64) {
	b.sets[p.ID] = set{added: added, suite: p.Keys.Suite}
	for i, id := range ids(p) {
		b.owners[id.key()] = owner{p.ID, uint8(i)} //nolint:gosec // at most 3
	}
	b.installed.Add(4)
}

// strike takes a set out of the books.
func (b *Backend) strike(p *sa.Params) {
	for _, id := range ids(p) {
		if b.owns(p.ID, id) {
			delete(b.owners, id.key())
		}
	}
	delete(b.sets, p.ID)
	b.installed.Add(-4)
}

// ageOf returns how long ago a state was added by the kernel's reckoning.
func ageOf(added int64, now time.Time) time.Duration {
	return time.Duration(max(now.Unix()-added, 0)) * time.Second
}

// backstop is the limit of a state of ours: there always is one, see longestLife.
func backstop(age, hard time.Duration) lifetime {
	if hard <= 0 || hard > longestLife {
		hard = longestLife
	}
	return lifetimeOf(age, hard)
}

// state describes one SA of a set to the kernel.
func (b *Backend) state(s sa.SA, p *sa.Params, life lifetime) state {
	st := state{sa: s, keys: &p.Keys, reqid: b.reqid, life: life}
	if s.Dir == sa.In {
		st.window, st.mark = b.window, p.Label
	}
	return st
}

// check refuses sets that the constant policies do not cover: their packets would travel in clear.
func (b *Backend) check(p *sa.Params) error {
	switch {
	case !slices.Contains(b.cfg.Local, p.Local):
		return fmt.Errorf("%w: %s is not a Gm address", ErrParams, p.Local)
	case !slices.Contains(b.cfg.ServerPorts, p.Ports.PS):
		return fmt.Errorf("%w: port-ps %d", ErrParams, p.Ports.PS)
	case !slices.Contains(b.cfg.ClientPorts, p.Ports.PC):
		return fmt.Errorf("%w: port-pc %d", ErrParams, p.Ports.PC)
	case !usable(p.UE) || p.UE.Is4() != p.Local.Is4():
		return fmt.Errorf("%w: UE address %s", ErrParams, p.UE)
	case p.Ports.UC == 0 || p.Ports.US == 0:
		return fmt.Errorf("%w: UE port 0", ErrParams)
	case p.SPIs.UC == 0 || p.SPIs.US == 0 || p.SPIs.PC == 0 || p.SPIs.PS == 0:
		return fmt.Errorf("%w: SPI 0", ErrParams) // RFC 4303 §2.1
	case slices.Contains(p.Counters[:], math.MaxUint32):
		return fmt.Errorf("%w: %w", ErrParams, sa.ErrSequence)
	}
	return nil
}

// settle turns the acknowledgements of a request into its result and the books. It returns the SAs that have to be
// taken out again and those of which it is unknown whether they are there.
func (b *Backend) settle(r *request, results []error, now time.Time) (undo, unknown []stateID) {
	sas := r.p.SAs()
	errs := make([]error, 0, len(results))
	for i, err := range results {
		if r.op == opRemove {
			i = int(r.sas[i])
		}
		id := stateID{sas[i].Dst.Addr(), sas[i].SPI}
		switch {
		case err == nil:
			undo = append(undo, id)
			continue
		case r.op == opRemove && errors.Is(err, unix.ESRCH):
			continue
		case errors.Is(err, ErrNoAck):
			if o, taken := b.owners[id.key()]; !taken || o.id == r.p.ID { // another set's is known to be there
				unknown = append(unknown, id)
			}
		}
		errs = append(errs, fmt.Errorf("%s SA %s %s from %s to %s: %w",
			r.op, sas[i].Dir, sas[i].SPI, sas[i].Src, sas[i].Dst, err))
	}
	r.err = errors.Join(errs...)

	switch r.op {
	case opInstall:
		if r.err != nil {
			return undo, unknown
		}
		b.enter(&r.p, now.Unix())
	case opRemove:
		if _, installed := b.sets[r.p.ID]; installed && r.err == nil {
			b.strike(&r.p)
		}
		return nil, unknown
	case opExtend:
	}
	return nil, nil
}

// takeBack removes what failed requests left. An SA that nobody acknowledged is only removed if it carries our reqid:
// the answer that got lost may have been that it belongs to somebody else.
func (b *Backend) takeBack(undo, unknown []stateID) {
	_, err := b.conn.removeStates(undo)
	if len(unknown) > 0 {
		e := b.conn.sweep(func(h stateHead) bool { return b.owned(h) && slices.Contains(unknown, h.id) })
		err = errors.Join(err, e)
	}
	if err != nil {
		b.log.Error("SAs of a failed request are still in the kernel until their limit passes", slog.Any("error", err))
	}
}

// String names the operation for error texts.
func (o op) String() string {
	switch o {
	case opInstall:
		return "install"
	case opRemove:
		return "remove"
	case opExtend:
		return "extend"
	}
	return fmt.Sprintf("op(%d)", uint8(o))
}
