package storetest

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/store"
)

func TestMemory(t *testing.T) {
	Run(t, Implementation{
		New:    func(*testing.T) store.Store { return NewMemory() },
		Reopen: func(_ *testing.T, s store.Store) store.Store { return s.(*Memory).Reopen() },
	})
}

// A damaged record costs itself only.
func TestMemoryFault(t *testing.T) {
	m := NewMemory()
	if err := m.Apply(t.Context(), store.Batch{Sets: []store.Set{Set(1), Set(2)}}); err != nil {
		t.Fatal(err)
	}
	m.Damage(1)
	n, err := store.Read(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	if len(n.Sets) != 1 || n.Sets[0].ID != 2 || len(n.Faults) != 1 || n.Faults[0].Set != 1 || n.Faults[0].Kind != store.KindSet {
		t.Errorf("got %+v", n)
	}
	if ids, err := m.SetIDs(t.Context()); err != nil || len(ids) != 2 {
		t.Errorf("got ids %v, %v", ids, err)
	}
}

func TestMemoryFailsAndHangs(t *testing.T) {
	m := NewMemory()
	down := errors.New("down")
	m.Fail(down)
	if err := m.Apply(t.Context(), store.Batch{}); !errors.Is(err, down) {
		t.Errorf("got %v, want %v", err, down)
	}
	m.Fail(nil)
	release := m.Hang()
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := m.Apply(ctx, store.Batch{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want a timeout", err)
	}
	release()
	if err := m.Apply(t.Context(), store.Batch{}); err != nil {
		t.Error(err)
	}
	if got := m.Batches(); len(got) != 1 {
		t.Errorf("batches %v", got)
	}
}
