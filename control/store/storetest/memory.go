package storetest

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"sync"

	"github.com/gmgate/gmgate/control/store"
)

// Memory is a store that lives as long as its process. It holds sealed values as an implementation on a disk does, so
// records go through the codec, and it can be made to fail or to hang. The zero value is not ready: see NewMemory.
type Memory struct {
	codec *store.Codec
	disk  *disk

	mu     sync.Mutex
	closed bool
}

// disk outlives the Memory.
type disk struct {
	mu            sync.Mutex
	sets          map[uint64][]byte
	marks         map[uint64][]byte
	registrations map[store.Context][]byte
	freed         map[store.Context][]byte
	meta          []byte
	err           error
	hang          chan struct{}
	batches       []int
	key           []byte
}

var _ store.Store = (*Memory)(nil)

// NewMemory returns an empty store.
func NewMemory() *Memory {
	key, err := store.NewKey()
	if err != nil {
		panic(err) // crypto/rand never fails on the systems we run on
	}
	m := open(&disk{
		sets: map[uint64][]byte{}, marks: map[uint64][]byte{},
		registrations: map[store.Context][]byte{}, freed: map[store.Context][]byte{}, key: key,
	})
	if m.disk.meta, err = m.codec.EncodeMeta(&store.Meta{}); err != nil {
		panic(err) // as above
	}
	return m
}

func open(d *disk) *Memory {
	codec, err := store.NewCodec(d.key)
	if err != nil {
		panic(err) // the key has the right length
	}
	return &Memory{codec: codec, disk: d}
}

// Reopen returns a new store with what m holds, as if another process had opened it. m is useless afterwards.
func (m *Memory) Reopen() *Memory {
	_ = m.Close()
	return open(m.disk)
}

// Fail makes every change fail with err, until it is called with nil.
func (m *Memory) Fail(err error) {
	m.disk.mu.Lock()
	defer m.disk.mu.Unlock()
	m.disk.err = err
}

// Hang makes every change that begins from now on wait until release is called, or its context ends.
func (m *Memory) Hang() (release func()) {
	hang := make(chan struct{})
	m.disk.mu.Lock()
	defer m.disk.mu.Unlock()
	m.disk.hang = hang
	return sync.OnceFunc(func() {
		m.disk.mu.Lock()
		defer m.disk.mu.Unlock()
		if m.disk.hang == hang {
			m.disk.hang = nil
		}
		close(hang)
	})
}

// Batches returns the sizes of the batches that were applied so far.
func (m *Memory) Batches() []int {
	m.disk.mu.Lock()
	defer m.disk.mu.Unlock()
	return slices.Clone(m.disk.batches)
}

// Damage inverts a bit of the stored value of a set, which must be there.
func (m *Memory) Damage(set uint64) {
	m.disk.mu.Lock()
	defer m.disk.mu.Unlock()
	v := slices.Clone(m.disk.sets[set])
	v[len(v)/2] ^= 1
	m.disk.sets[set] = v
}

// begin waits while the store hangs and reports why a call cannot go on. With a nil error the disk is locked.
func (m *Memory) begin(ctx context.Context, change bool) error {
	m.disk.mu.Lock()
	hang := m.disk.hang
	m.disk.mu.Unlock()
	if change && hang != nil {
		select {
		case <-hang:
		case <-ctx.Done():
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	closed := m.closed
	m.mu.Unlock()
	if closed {
		return store.ErrClosed
	}
	m.disk.mu.Lock()
	if change && m.disk.err != nil {
		defer m.disk.mu.Unlock()
		return m.disk.err
	}
	return nil
}

// Apply implements store.Store.
func (m *Memory) Apply(ctx context.Context, b store.Batch) error {
	if err := b.Validate(); err != nil {
		return err
	}
	if err := m.begin(ctx, true); err != nil {
		return err
	}
	d := m.disk
	defer d.mu.Unlock()
	sets, marks := maps.Clone(d.sets), maps.Clone(d.marks)
	registrations, freed := maps.Clone(d.registrations), maps.Clone(d.freed)
	var err error
	for _, id := range b.DeleteSets {
		delete(sets, id)
		delete(marks, id)
	}
	for _, f := range b.Free {
		delete(registrations, f.Context)
		if freed[f.Context], err = m.codec.EncodeFreed(f); err != nil {
			return err
		}
	}
	for i := range b.Sets {
		if sets[b.Sets[i].ID], err = m.codec.EncodeSet(&b.Sets[i]); err != nil {
			return err
		}
	}
	for i := range b.Registrations {
		r := &b.Registrations[i]
		delete(freed, r.Context)
		if registrations[r.Context], err = m.codec.EncodeRegistration(r); err != nil {
			return err
		}
	}
	for _, k := range b.Marks {
		if _, ok := sets[k.Set]; !ok {
			continue
		}
		if v, ok := marks[k.Set]; ok {
			old, err := m.codec.DecodeMark(store.SetKey(k.Set), v)
			if err != nil {
				return err
			}
			k.Counters = k.Counters.Max(old.Counters)
		}
		if marks[k.Set], err = m.codec.EncodeMark(k); err != nil {
			return err
		}
	}
	d.sets, d.marks, d.registrations, d.freed = sets, marks, registrations, freed
	d.batches = append(d.batches, b.Len())
	return nil
}

// Checkpoint implements store.Store.
func (m *Memory) Checkpoint(ctx context.Context, marks []store.Mark) error {
	return m.Apply(ctx, store.Batch{Marks: marks})
}

// Load implements store.Store.
func (m *Memory) Load(ctx context.Context, v *store.Visitor) error {
	if err := m.begin(ctx, false); err != nil {
		return err
	}
	d := m.disk
	sets, marks := maps.Clone(d.sets), maps.Clone(d.marks)
	registrations, freed := maps.Clone(d.registrations), maps.Clone(d.freed)
	d.mu.Unlock()
	fault := func(f store.Fault) error {
		if v.Fault == nil {
			return nil
		}
		return v.Fault(f)
	}
	if err := contexts(registrations, m.codec.DecodeRegistration, v.Registration, store.KindRegistration, fault); err != nil {
		return err
	}
	if err := contexts(freed, m.codec.DecodeFreed, v.Freed, store.KindFreed, fault); err != nil {
		return err
	}
	if v.Set == nil {
		return nil
	}
	for _, id := range slices.Sorted(maps.Keys(sets)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		s, err := m.codec.DecodeSet(store.SetKey(id), sets[id])
		if err == nil && marks[id] != nil {
			var k store.Mark
			k, err = m.codec.DecodeMark(store.SetKey(id), marks[id])
			s.Counters = s.Counters.Max(k.Counters)
		}
		if err != nil {
			err = fault(store.Fault{Kind: store.KindSet, Set: id, Err: err})
		} else {
			err = v.Set(s)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func contexts[R any](values map[store.Context][]byte, decode func(key, value []byte) (R, error), visit func(R) error,
	kind store.Kind, fault func(store.Fault) error,
) error {
	if visit == nil {
		return nil
	}
	byKey := func(a, b store.Context) int {
		return cmp.Or(cmp.Compare(a.Worker, b.Worker), cmp.Compare(a.Index, b.Index))
	}
	for _, c := range slices.SortedFunc(maps.Keys(values), byKey) {
		r, err := decode(store.ContextKey(c), values[c])
		if err != nil {
			err = fault(store.Fault{Kind: kind, Context: c, Err: err})
		} else {
			err = visit(r)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// SetIDs implements store.Store.
func (m *Memory) SetIDs(ctx context.Context) ([]uint64, error) {
	if err := m.begin(ctx, false); err != nil {
		return nil, err
	}
	defer m.disk.mu.Unlock()
	return slices.Sorted(maps.Keys(m.disk.sets)), nil
}

// Meta implements store.Store.
func (m *Memory) Meta(ctx context.Context) (store.Meta, error) {
	if err := m.begin(ctx, false); err != nil {
		return store.Meta{}, err
	}
	defer m.disk.mu.Unlock()
	return m.codec.DecodeMeta(m.disk.meta)
}

// SetMeta implements store.Store.
func (m *Memory) SetMeta(ctx context.Context, meta store.Meta) error {
	if err := m.begin(ctx, true); err != nil {
		return err
	}
	defer m.disk.mu.Unlock()
	v, err := m.codec.EncodeMeta(&meta)
	if err != nil {
		return err
	}
	m.disk.meta = v
	return nil
}

// Close implements store.Store.
func (m *Memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.closed {
		m.closed = true
		m.codec.Close()
	}
	return nil
}
