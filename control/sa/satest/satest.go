// Package satest has a fake ESP backend for tests of what stands on sa.Installer.
package satest

import (
	"context"
	"errors"
	"maps"
	"sync"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
)

// ErrExists is what the fake answers when an SA is installed twice, as kernels do.
var ErrExists = errors.New("file exists")

type key struct {
	dst string
	spi ims.SPI
}

// Backend is an sa.Backend in memory. Answers are queued until Answer is called, so a test decides when the backend
// answers. The zero value is ready. Safe for concurrent use.
type Backend struct {
	// Fail, if set, is asked before each Install; an error refuses the set.
	Fail func(p sa.Params) error
	// FailExtend, if set, is asked before each Extend.
	FailExtend func(p sa.Params) error
	// FailRemove, if set, is asked before each Remove.
	FailRemove func(p sa.Params) error

	// Foreign is what Adopt tells of the SPIs of others.
	Foreign []ims.SPI

	mu      sync.Mutex
	sas     map[key]sa.SA
	sets    map[uint64]sa.Params
	pending []func()

	Installed []sa.Params // every Install, in order
	Removed   []sa.Params
	Extended  []sa.Params
}

var _ sa.Backend = (*Backend)(nil)

// Install implements sa.Installer.
func (b *Backend) Install(p sa.Params, done func(error)) {
	p.Keys = p.Keys.Clone()
	b.later(func() { done(b.install(p)) })
}

func (b *Backend) install(p sa.Params) error {
	if b.Fail != nil {
		if err := b.Fail(p); err != nil {
			return err
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.sas == nil {
		b.sas = make(map[key]sa.SA)
	}
	if b.sets == nil {
		b.sets = make(map[uint64]sa.Params)
	}
	for _, s := range p.SAs() {
		if _, ok := b.sas[keyOf(s)]; ok {
			return ErrExists
		}
	}
	for _, s := range p.SAs() {
		b.sas[keyOf(s)] = s
	}
	b.sets[p.ID] = p
	b.Installed = append(b.Installed, p)
	return nil
}

func keyOf(s sa.SA) key { return key{s.Dst.Addr().String(), s.SPI} }

// Remove implements sa.Installer.
func (b *Backend) Remove(p sa.Params, done func(error)) {
	b.later(func() {
		if b.FailRemove != nil {
			if err := b.FailRemove(p); err != nil {
				done(err)
				return
			}
		}
		b.mu.Lock()
		for _, s := range p.SAs() {
			delete(b.sas, keyOf(s))
		}
		delete(b.sets, p.ID)
		b.Removed = append(b.Removed, p)
		b.mu.Unlock()
		done(nil)
	})
}

// Extend implements sa.Installer.
func (b *Backend) Extend(p sa.Params, hard time.Duration, done func(error)) {
	b.later(func() {
		if b.FailExtend != nil {
			if err := b.FailExtend(p); err != nil {
				done(err)
				return
			}
		}
		p.Hard = hard
		b.mu.Lock()
		b.Extended = append(b.Extended, p)
		b.mu.Unlock()
		done(nil)
	})
}

// Count implements sa.Installer.
func (b *Backend) Count() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.sas)
}

// Close implements sa.Installer.
func (b *Backend) Close() error { return nil }

func (b *Backend) later(f func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pending = append(b.pending, f)
}

// Answer lets the backend answer everything that was asked of it, in order, and what that leads to. It returns how many
// requests it answered.
func (b *Backend) Answer() int {
	n := 0
	for {
		b.mu.Lock()
		todo := b.pending
		b.pending = nil
		b.mu.Unlock()
		if len(todo) == 0 {
			return n
		}
		for _, f := range todo {
			f()
			n++
		}
	}
}

// Adopt implements sa.Backend: sets of which all four SAs are there are adopted, every other SA goes.
func (b *Backend) Adopt(_ context.Context, sets []sa.Params) (sa.Adoption, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	a := sa.Adoption{Foreign: b.Foreign}
	kept := make(map[key]sa.SA)
	b.sets = make(map[uint64]sa.Params)
	for _, p := range sets {
		whole := true
		for _, s := range p.SAs() {
			whole = whole && b.sas[keyOf(s)] == s
		}
		if !whole {
			continue
		}
		a.Adopted = append(a.Adopted, p.ID)
		p.Keys = p.Keys.Clone()
		b.sets[p.ID] = p
		for _, s := range p.SAs() {
			kept[keyOf(s)] = s
		}
	}
	a.Removed = len(b.sas) - len(kept)
	b.sas = kept
	return a, nil
}

// Survey implements sa.Backend. Counters are those that the set was installed with, or what Sent has made of them.
func (b *Backend) Survey(context.Context) (sa.Survey, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	v := sa.Survey{Sets: make(map[uint64]sa.Counters)}
	known := 0
	for id, p := range b.sets {
		n := 0
		for _, s := range p.SAs() {
			if b.sas[keyOf(s)] == s {
				n++
			}
		}
		known += n
		if n < 4 {
			v.Missing = append(v.Missing, id)
			continue
		}
		v.Sets[id] = p.Counters
	}
	v.Orphans = len(b.sas) - known
	return v, nil
}

// Detach implements sa.Backend.
func (b *Backend) Detach() error { return nil }

// Sent says how far the SAs of an installed set have come.
func (b *Backend) Sent(id uint64, c sa.Counters) {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.sets[id]
	p.Counters = c
	b.sets[id] = p
}

// Lose takes an SA of a set away, as an operator with ip-xfrm would.
func (b *Backend) Lose(s sa.SA) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.sas, keyOf(s))
}

// Restarted returns a backend that holds the SAs of b and knows nothing of sets, as the kernel after a restart of the
// process.
func (b *Backend) Restarted() *Backend {
	b.mu.Lock()
	defer b.mu.Unlock()
	return &Backend{sas: maps.Clone(b.sas)}
}
