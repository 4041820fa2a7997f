// Package satest has a fake ESP backend for tests of what stands on sa.Installer.
package satest

import (
	"errors"
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

// Backend is an sa.Installer in memory. Answers are queued until Answer is called, so a test decides when the backend
// answers. The zero value is ready. Safe for concurrent use.
type Backend struct {
	// Fail, if set, is asked before each Install; an error refuses the set.
	Fail func(p sa.Params) error
	// FailExtend, if set, is asked before each Extend.
	FailExtend func(p sa.Params) error

	mu      sync.Mutex
	sas     map[key]sa.SA
	pending []func()

	Installed []sa.Params // every Install, in order
	Removed   []sa.Params
	Extended  []sa.Params
}

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
	for _, s := range p.SAs() {
		if _, ok := b.sas[keyOf(s)]; ok {
			return ErrExists
		}
	}
	for _, s := range p.SAs() {
		b.sas[keyOf(s)] = s
	}
	b.Installed = append(b.Installed, p)
	return nil
}

func keyOf(s sa.SA) key { return key{s.Dst.Addr().String(), s.SPI} }

// Remove implements sa.Installer.
func (b *Backend) Remove(p sa.Params, done func(error)) {
	b.later(func() {
		b.mu.Lock()
		for _, s := range p.SAs() {
			delete(b.sas, keyOf(s))
		}
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
