// Package bolt is the default store.Store: one file in the format of bbolt, owned by one process.
//
// Invariants:
//
//   - A batch is one transaction: its pages are written and synced before the meta page that refers to them, so kill -9
//     and power failures leave the state before or after it.
//   - The file is never trusted. Before bbolt, which panics on damaged files, gets to see it, every page that can be
//     reached is checked; what still comes up later (a disk that fails under us) is recovered from and ends as
//     ErrCorrupt. A damaged file is left as it is, or moved aside on request, and never written to.
//   - One process has the file: it is locked (flock) from before it is read until Close or the end of the process. A new
//     file appears under its name only when it is complete.
//   - All values are sealed (see package store). Keys of records are set ids and table indices, which say nothing.
//
// Methods may be called concurrently; changes happen one after the other, each with its sync. Put a store.Writer in
// front where callers cannot wait.
package bolt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/store"
)

// Implementation constants.
const (
	// DefaultLockTimeout bridges a restart where the old process is still closing its file.
	DefaultLockTimeout = 2 * time.Second

	lockRetry = 20 * time.Millisecond

	// mapped is the address space taken at once: growing a mapping has to wait for readers.
	mapped = 256 << 20

	// fill is how full bbolt leaves the pages of sets and registrations when it splits them. Ids grow, so most records
	// come in at the end of a bucket, and pages that were split in half would stay half empty.
	fill = 0.9
)

// Names in the file.
var (
	bucketMeta          = []byte("gmgate")
	bucketSets          = []byte("sets")
	bucketMarks         = []byte("marks")
	bucketRegistrations = []byte("registrations")
	bucketFreed         = []byte("freed")

	keySchema = []byte("schema")
	keyCheck  = []byte("check")
	keyMeta   = []byte("meta")
)

// OpenOptions say how to open a file.
type OpenOptions struct {
	// Key seals the records: 32 octets, of which the store keeps a copy until Close.
	Key ims.Key

	// LockTimeout is how long to wait for another process to let go of the file. Zero means the default.
	LockTimeout time.Duration

	// Quarantine moves a file that is damaged or not ours aside and begins a new one; see DB.Quarantined. A file under
	// another key or of another version is never moved: it is whole, and it is the configuration that is wrong.
	Quarantine bool
}

// DB is an open file.
type DB struct {
	path   string
	codec  *store.Codec
	db     *bbolt.DB
	file   *os.File // of db
	broken atomic.Pointer[error]

	aside string
	cause error

	mu     sync.RWMutex // held for reading during calls, so that Close comes after them
	closed bool
}

var _ store.Store = (*DB)(nil)

// Open opens the file at path, which it makes if there is none; the directory must exist. Errors wrap those of package
// store: ErrLocked, ErrCorrupt, ErrForeign, ErrVersion or ErrKey.
func Open(ctx context.Context, path string, o OpenOptions) (*DB, error) {
	if o.LockTimeout <= 0 {
		o.LockTimeout = DefaultLockTimeout
	}
	codec, err := store.NewCodec(o.Key)
	if err != nil {
		return nil, err
	}
	d, seen, err := open(ctx, path, o.LockTimeout, codec)
	if o.Quarantine && (errors.Is(err, store.ErrCorrupt) || errors.Is(err, store.ErrForeign)) {
		cause := err
		var aside string
		if aside, err = quarantine(ctx, path, o.LockTimeout, seen); err == nil {
			if d, _, err = open(ctx, path, o.LockTimeout, codec); err == nil {
				d.aside, d.cause = aside, cause
			}
		} else {
			err = errors.Join(cause, err)
		}
	}
	if err != nil {
		codec.Close()
		return nil, fmt.Errorf("open store %s: %w", path, err)
	}
	return d, nil
}

// Quarantined returns where Open moved the file that it found, and why. An empty path says that it moved none.
func (d *DB) Quarantined() (path string, cause error) { return d.aside, d.cause }

// Size returns the length of the file in octets.
func (d *DB) Size() (int64, error) {
	info, err := os.Stat(d.path)
	if err != nil {
		return 0, fmt.Errorf("stat store: %w", err)
	}
	return info.Size(), nil
}

// open opens the file. seen is what it found under the name, for quarantine to move no other file.
func open(ctx context.Context, path string, timeout time.Duration, codec *store.Codec) (d *DB, seen fs.FileInfo, err error) {
	f, seen, err := lock(ctx, path, timeout, codec)
	if err != nil {
		return nil, seen, err
	}
	d = &DB{path: path, codec: codec, file: f}
	ours := f // until bbolt has it
	opts := options()
	opts.OpenFile = func(string, int, os.FileMode) (*os.File, error) {
		f := ours
		ours = nil
		return f, nil
	}
	// bbolt locks the file again, which succeeds: the lock belongs to the open file.
	err = d.guard(func() (err error) {
		d.db, err = bbolt.Open(path, 0o600, opts)
		return err
	})
	if err == nil {
		err = d.guard(func() error { return d.db.View(d.check) })
	}
	if err == nil {
		return d, seen, nil
	}
	if d.db != nil {
		_ = d.release()
	} else {
		_ = letGo(f) // bbolt has closed it, or lost it in a panic
	}
	switch {
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrVersionMismatch), errors.Is(err, berrors.ErrChecksum):
		err = fmt.Errorf("%w: %w", store.ErrCorrupt, err)
	case errors.Is(err, berrors.ErrTimeout):
		err = fmt.Errorf("%w (%w)", store.ErrLocked, err)
	}
	return nil, seen, err
}

func options() *bbolt.Options {
	return &bbolt.Options{
		Timeout: time.Second,
		// The list of free pages is found anew at start, in the walk that bbolt makes anyway; written with every
		// transaction it would cost more than the batches.
		NoFreelistSync:  true,
		FreelistType:    bbolt.FreelistMapType,
		InitialMmapSize: mapped,
		NoStatistics:    true,
	}
}

// lock returns the file at path, locked, whole, and still the one under that name. A new file is made where there is
// none or an empty one.
func lock(ctx context.Context, path string, timeout time.Duration, codec *store.Codec) (*os.File, fs.FileInfo, error) {
	for {
		f, info, err := lockFile(ctx, path, timeout)
		if err != nil {
			return nil, info, err
		}
		if info.Size() > 0 {
			err = verify(f, info.Size())
			if err == nil && info.Mode().Perm()&0o077 != 0 {
				err = f.Chmod(0o600)
			}
			if err != nil {
				_ = f.Close()
				return nil, info, err
			}
			return f, info, nil
		}
		err = create(path, codec) // takes the name from the file that we hold; the next round locks the new one
		_ = f.Close()
		if err != nil {
			return nil, info, fmt.Errorf("create file: %w", err)
		}
	}
}

// lockFile opens and locks what is at path.
func lockFile(ctx context.Context, path string, timeout time.Duration) (*os.File, fs.FileInfo, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, store.ErrLocked)
	defer cancel()
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NONBLOCK, 0o600)
		if err != nil {
			return nil, nil, err
		}
		info, err := f.Stat()
		if err == nil && !info.Mode().IsRegular() {
			err = fmt.Errorf("%w: not a regular file", store.ErrForeign)
		}
		if err == nil {
			err = flock(ctx, f)
		}
		if err != nil {
			return nil, info, errors.Join(err, f.Close())
		}
		// Whoever had the lock may have moved the file or filled it.
		now, err := os.Stat(path)
		if err == nil && os.SameFile(info, now) {
			return f, now, nil
		}
		if err := f.Close(); err != nil {
			return nil, nil, err
		}
		if ctx.Err() != nil {
			return nil, nil, context.Cause(ctx)
		}
	}
}

func flock(ctx context.Context, f *os.File) error {
	retry := time.NewTicker(lockRetry)
	defer retry.Stop()
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil || !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			return err
		}
		select {
		case <-retry.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// create makes an empty store beside path and gives it the name. The caller holds the lock.
func create(path string, codec *store.Codec) error {
	temporary := path + ".new"
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	check, err := codec.EncodeCheck()
	if err != nil {
		return err
	}
	meta, err := codec.EncodeMeta(&store.Meta{})
	if err != nil {
		return err
	}
	opts := options()
	opts.OpenFile = func(name string, flag int, mode os.FileMode) (*os.File, error) {
		return os.OpenFile(name, flag|os.O_EXCL, mode)
	}
	db, err := bbolt.Open(temporary, 0o600, opts)
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{bucketSets, bucketMarks, bucketRegistrations, bucketFreed} {
			if _, err := tx.CreateBucket(name); err != nil {
				return err
			}
		}
		b, err := tx.CreateBucket(bucketMeta)
		if err != nil {
			return err
		}
		return errors.Join(b.Put(keySchema, []byte{store.Schema}), b.Put(keyCheck, check), b.Put(keyMeta, meta))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		return err
	}
	if err := os.Rename(temporary, path); err != nil {
		return err
	}
	return store.SyncDir(filepath.Dir(path))
}

// quarantine moves the file that was seen at path aside.
func quarantine(ctx context.Context, path string, timeout time.Duration, seen fs.FileInfo) (aside string, err error) {
	if seen == nil || !seen.Mode().IsRegular() {
		return "", errors.New("only files are moved aside")
	}
	f, info, err := lockFile(ctx, path, timeout)
	if err != nil {
		return "", fmt.Errorf("move it aside: %w", err)
	}
	defer func() { _ = f.Close() }()
	if !os.SameFile(info, seen) {
		return "", errors.New("move it aside: it was replaced meanwhile")
	}
	base := path + ".bad-" + time.Now().UTC().Format("20060102T150405Z")
	aside = base
	for i := 2; ; i++ {
		if _, err := os.Lstat(aside); errors.Is(err, fs.ErrNotExist) {
			break
		}
		aside = fmt.Sprintf("%s-%d", base, i)
	}
	if err := os.Rename(path, aside); err != nil {
		return "", fmt.Errorf("move it aside: %w", err)
	}
	return aside, store.SyncDir(filepath.Dir(path))
}

// check finds out whether the file is ours, readable, and sealed under our key.
func (d *DB) check(tx *bbolt.Tx) error {
	b := tx.Bucket(bucketMeta)
	if b == nil {
		return fmt.Errorf("%w: a bbolt file of another program", store.ErrForeign)
	}
	schema := b.Get(keySchema)
	if len(schema) != 1 {
		return corrupt("it has no schema version")
	}
	if schema[0] != store.Schema {
		return fmt.Errorf("%w %d; this program knows version %d", store.ErrVersion, schema[0], store.Schema)
	}
	for _, name := range [][]byte{bucketSets, bucketMarks, bucketRegistrations, bucketFreed} {
		if tx.Bucket(name) == nil {
			return corrupt("bucket %s is missing", name)
		}
	}
	if err := d.codec.Check(b.Get(keyCheck)); err != nil {
		if errors.Is(err, store.ErrKey) {
			return err
		}
		return fmt.Errorf("%w: %w", store.ErrCorrupt, err)
	}
	m, err := d.codec.DecodeMeta(b.Get(keyMeta))
	if err != nil {
		return fmt.Errorf("%w: %w", store.ErrCorrupt, err)
	}
	m.TokenKey.Zero()
	return nil
}

// guard runs f and turns panics into ErrCorrupt: those of bbolt, and faults in the mapped file, which a disk error or a
// file that was cut causes. What is left of bbolt after that is not to be used any more.
func (d *DB) guard(f func() error) (err error) {
	if broken := d.broken.Load(); broken != nil {
		return *broken
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = corrupt("%v", r)
			d.broken.Store(&err)
		}
	}()
	return f()
}

// call runs f unless the store is closed.
func (d *DB) call(ctx context.Context, what string, f func() error) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.closed {
		return store.ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := d.guard(f); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// Apply implements store.Store.
func (d *DB) Apply(ctx context.Context, b store.Batch) error {
	return d.call(ctx, "apply batch", func() error { return d.apply(ctx, &b) })
}

// Checkpoint implements store.Store.
func (d *DB) Checkpoint(ctx context.Context, marks []store.Mark) error {
	return d.call(ctx, "checkpoint", func() error { return d.apply(ctx, &store.Batch{Marks: marks}) })
}

func (d *DB) apply(ctx context.Context, b *store.Batch) error {
	if err := b.Validate(); err != nil {
		return err
	}
	if b.Len() == 0 {
		return nil
	}
	return d.db.Update(func(tx *bbolt.Tx) error {
		sets, marks := tx.Bucket(bucketSets), tx.Bucket(bucketMarks)
		registrations, freed := tx.Bucket(bucketRegistrations), tx.Bucket(bucketFreed)
		sets.FillPercent, registrations.FillPercent = fill, fill
		for _, id := range b.DeleteSets {
			key := store.SetKey(id)
			if err := errors.Join(sets.Delete(key), marks.Delete(key)); err != nil {
				return err
			}
		}
		for _, f := range b.Free {
			key := store.ContextKey(f.Context)
			value, err := d.codec.EncodeFreed(f)
			if err := errors.Join(err, registrations.Delete(key)); err != nil {
				return err
			}
			if err := freed.Put(key, value); err != nil {
				return err
			}
		}
		for i := range b.Sets {
			value, err := d.codec.EncodeSet(&b.Sets[i])
			if err != nil {
				return err
			}
			if err := sets.Put(store.SetKey(b.Sets[i].ID), value); err != nil {
				return err
			}
		}
		for i := range b.Registrations {
			key := store.ContextKey(b.Registrations[i].Context)
			value, err := d.codec.EncodeRegistration(&b.Registrations[i])
			if err := errors.Join(err, freed.Delete(key)); err != nil {
				return err
			}
			if err := registrations.Put(key, value); err != nil {
				return err
			}
		}
		for _, m := range b.Marks {
			if err := d.mark(sets, marks, m); err != nil {
				return err
			}
		}
		return ctx.Err() // the last moment to go back
	})
}

// mark moves the marks of a set.
func (d *DB) mark(sets, marks *bbolt.Bucket, m store.Mark) error {
	key := store.SetKey(m.Set)
	if sets.Get(key) == nil {
		return nil
	}
	if value := marks.Get(key); value != nil {
		old, err := d.codec.DecodeMark(key, value)
		if err == nil { // a damaged one is replaced
			higher := m.Counters.Max(old.Counters)
			if higher == old.Counters {
				return nil
			}
			m.Counters = higher
		}
	}
	value, err := d.codec.EncodeMark(m)
	if err != nil {
		return err
	}
	return marks.Put(key, value)
}

// Load implements store.Store. The visitor is called outside of the guard: its panics are its own.
func (d *DB) Load(ctx context.Context, v *store.Visitor) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.closed {
		return store.ErrClosed
	}
	var tx *bbolt.Tx
	err := d.guard(func() (err error) {
		tx, err = d.db.Begin(false)
		return err
	})
	if err != nil {
		return fmt.Errorf("load: %w", err)
	}
	defer func() { _ = d.guard(tx.Rollback) }()

	if err := load(ctx, d, tx.Bucket(bucketRegistrations), v.Registration, func(key, value []byte) (store.Registration, store.Fault, error) {
		c, err := store.ParseContextKey(key)
		if err != nil {
			return store.Registration{}, store.Fault{}, err
		}
		r, err := d.codec.DecodeRegistration(key, value)
		return r, store.Fault{Kind: store.KindRegistration, Context: c, Err: err}, nil
	}, v.Fault); err != nil {
		return err
	}
	if err := load(ctx, d, tx.Bucket(bucketFreed), v.Freed, func(key, value []byte) (store.Freed, store.Fault, error) {
		c, err := store.ParseContextKey(key)
		if err != nil {
			return store.Freed{}, store.Fault{}, err
		}
		f, err := d.codec.DecodeFreed(key, value)
		return f, store.Fault{Kind: store.KindFreed, Context: c, Err: err}, nil
	}, v.Fault); err != nil {
		return err
	}
	marks := tx.Bucket(bucketMarks)
	return load(ctx, d, tx.Bucket(bucketSets), v.Set, func(key, value []byte) (store.Set, store.Fault, error) {
		id, err := store.ParseSetKey(key)
		if err != nil {
			return store.Set{}, store.Fault{}, err
		}
		s, err := d.codec.DecodeSet(key, value)
		if mark := marks.Get(key); err == nil && mark != nil {
			var m store.Mark
			if m, err = d.codec.DecodeMark(key, mark); err != nil {
				s.Keys.Zero() // without its marks the set is of no use: sequence numbers could repeat
			}
			s.Counters = s.Counters.Max(m.Counters)
		}
		return s, store.Fault{Kind: store.KindSet, Set: id, Err: err}, nil
	}, v.Fault)
}

// load shows the records of a bucket. decode returns a fault whose Err is nil, or an error when the file is damaged.
func load[R any](ctx context.Context, d *DB, b *bbolt.Bucket, visit func(R) error,
	decode func(key, value []byte) (R, store.Fault, error), fault func(store.Fault) error,
) error {
	if visit == nil {
		return nil
	}
	c := b.Cursor()
	step := c.First
	for {
		var key []byte
		var r R
		var f store.Fault
		err := ctx.Err()
		if err == nil {
			err = d.guard(func() (err error) {
				var value []byte
				if key, value = step(); key == nil {
					return nil
				}
				if value == nil {
					return corrupt("a bucket stands among the records")
				}
				if r, f, err = decode(key, value); err != nil {
					return fmt.Errorf("%w: %w", store.ErrCorrupt, err)
				}
				return nil
			})
		}
		switch {
		case err != nil:
			return fmt.Errorf("load: %w", err)
		case key == nil:
			return nil
		case f.Err == nil:
			err = visit(r)
		case fault != nil:
			err = fault(f)
		}
		if err != nil {
			return err
		}
		step = c.Next
	}
}

// SetIDs implements store.Store.
func (d *DB) SetIDs(ctx context.Context) (ids []uint64, err error) {
	err = d.call(ctx, "list sets", func() error {
		return d.db.View(func(tx *bbolt.Tx) error {
			c := tx.Bucket(bucketSets).Cursor()
			for key, value := c.First(); key != nil; key, value = c.Next() {
				id, err := store.ParseSetKey(key)
				if err == nil && value == nil {
					err = errors.New("a bucket stands among the records")
				}
				if err != nil {
					return fmt.Errorf("%w: %w", store.ErrCorrupt, err)
				}
				if len(ids)%1024 == 0 && ctx.Err() != nil {
					return ctx.Err()
				}
				ids = append(ids, id)
			}
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	return ids, nil
}

// Meta implements store.Store.
func (d *DB) Meta(ctx context.Context) (m store.Meta, err error) {
	err = d.call(ctx, "read meta", func() error {
		return d.db.View(func(tx *bbolt.Tx) (err error) {
			m, err = d.codec.DecodeMeta(tx.Bucket(bucketMeta).Get(keyMeta))
			return err
		})
	})
	return m, err
}

// SetMeta implements store.Store.
func (d *DB) SetMeta(ctx context.Context, m store.Meta) error {
	return d.call(ctx, "write meta", func() error {
		value, err := d.codec.EncodeMeta(&m)
		if err != nil {
			return err
		}
		return d.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucketMeta).Put(keyMeta, value) })
	})
}

// Close waits for calls that are under way, closes the file and zeroes the key.
func (d *DB) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	d.closed = true
	d.codec.Close()
	if err := d.release(); err != nil {
		return fmt.Errorf("close store: %w", err)
	}
	return nil
}

// release closes the file. After a panic bbolt may have kept one of its mutexes for ever, so only the file is closed
// then; the mapping stays.
func (d *DB) release() error {
	if d.broken.Load() != nil {
		return letGo(d.file)
	}
	err := d.guard(d.db.Close)
	if d.broken.Load() != nil {
		return errors.Join(err, letGo(d.file))
	}
	return err
}

// letGo unlocks and closes a file, if it is open. Closing alone would not unlock one that is still mapped.
func letGo(f *os.File) error {
	conn, err := f.SyscallConn()
	if err == nil {
		_ = conn.Control(func(fd uintptr) { err = syscall.Flock(int(fd), syscall.LOCK_UN) })
	}
	if closeErr := f.Close(); !errors.Is(closeErr, fs.ErrClosed) {
		return errors.Join(err, closeErr)
	}
	return nil
}
