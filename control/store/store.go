package store

import (
	"context"
	"errors"
	"fmt"
)

// Errors of stores. Those of Open come from the implementations.
var (
	// ErrClosed says that the store or the writer was closed.
	ErrClosed = errors.New("store is closed")
	// ErrLocked says that another process has the store open.
	ErrLocked = errors.New("another gmgate uses it")
	// ErrCorrupt says that the store is damaged and cannot be used as it is.
	ErrCorrupt = errors.New("store is damaged")
	// ErrForeign says that what is there is not a store of gmgate.
	ErrForeign = errors.New("not a store of gmgate")
	// ErrVersion says that the store, or a record in it, has a schema which this program does not know.
	ErrVersion = errors.New("unknown schema version")
	// ErrKey says that the store was sealed under another key.
	ErrKey = errors.New("store is sealed under another key")
)

// Batch is a set of changes that are applied as one. Deletes come first, then puts, then marks, each list in order.
// Deleting what is not there is no error.
type Batch struct {
	DeleteSets []uint64 // takes the marks along
	Free       []Freed  // deletes the registration of the context and keeps its generation

	Sets          []Set
	Registrations []Registration // takes a Freed of the same context along

	Marks []Mark // as Store.Checkpoint
}

// Len returns the number of changes.
func (b *Batch) Len() int {
	return len(b.DeleteSets) + len(b.Free) + len(b.Sets) + len(b.Registrations) + len(b.Marks)
}

// Validate returns the first error of its records.
func (b *Batch) Validate() error {
	for i := range b.Free {
		if err := b.Free[i].Validate(); err != nil {
			return err
		}
	}
	for i := range b.Sets {
		if err := b.Sets[i].Validate(); err != nil {
			return err
		}
	}
	for i := range b.Registrations {
		if err := b.Registrations[i].Validate(); err != nil {
			return err
		}
	}
	for i := range b.Marks {
		if err := b.Marks[i].Validate(); err != nil {
			return err
		}
	}
	return nil
}

// Fault is a record that could not be read. Writing or deleting its key mends the store.
type Fault struct {
	Kind    Kind
	Set     uint64  // of a KindSet and a KindMark
	Context Context // of a KindRegistration and a KindFreed
	Err     error
}

// Error describes the fault.
func (f Fault) Error() string {
	if f.Kind == KindSet || f.Kind == KindMark {
		return fmt.Sprintf("read %s %#x: %v", f.Kind, f.Set, f.Err)
	}
	return fmt.Sprintf("read %s %d of worker %d: %v", f.Kind, f.Context.Index, f.Context.Worker, f.Err)
}

// Unwrap returns the cause.
func (f Fault) Unwrap() error { return f.Err }

// Visitor gets the contents of a store. A nil function skips its kind; an error ends Load and is returned by it. The
// functions must not call the store. What they get is theirs.
type Visitor struct {
	Registration func(Registration) error
	Freed        func(Freed) error
	Set          func(Set) error // with the highest marks in Set.Counters
	Fault        func(Fault) error
}

// Store keeps records. All methods are safe for concurrent use and return ErrClosed after Close.
type Store interface {
	// Apply applies the batch as a whole, or not at all when it returns an error. It keeps nothing of the batch. An
	// error that wraps ErrInvalid says that the batch can never be applied; others may pass.
	Apply(ctx context.Context, b Batch) error

	// Checkpoint moves marks. One that is lower than what is stored changes nothing; one of a set that is not stored
	// is ignored, since the set may have gone meanwhile.
	Checkpoint(ctx context.Context, marks []Mark) error

	// Load shows the visitor everything that is stored: registrations, freed contexts and sets, in this order, each
	// kind in ascending order of its key. All of it is of one moment.
	Load(ctx context.Context, v *Visitor) error

	// SetIDs returns the ids of all sets that are stored, in ascending order and of one moment. It opens no record, so
	// those that cannot be read are among them.
	SetIDs(ctx context.Context) ([]uint64, error)

	// Meta returns what is stored once.
	Meta(ctx context.Context) (Meta, error)

	// SetMeta replaces what is stored once. It is applied when it returns.
	SetMeta(ctx context.Context, m Meta) error

	// Close frees the store and zeroes its keys. The second call does nothing.
	Close() error
}

// Snapshot is the contents of a store.
type Snapshot struct {
	Registrations []Registration
	Freed         []Freed
	Sets          []Set
	Faults        []Fault
}

// Read returns the contents of a store in memory. Records that cannot be read are among the Faults.
func Read(ctx context.Context, s Store) (*Snapshot, error) {
	var n Snapshot
	err := s.Load(ctx, &Visitor{
		Registration: func(r Registration) error { n.Registrations = append(n.Registrations, r); return nil },
		Freed:        func(f Freed) error { n.Freed = append(n.Freed, f); return nil },
		Set:          func(s Set) error { n.Sets = append(n.Sets, s); return nil },
		Fault:        func(f Fault) error { n.Faults = append(n.Faults, f); return nil },
	})
	if err != nil {
		return nil, err
	}
	return &n, nil
}
