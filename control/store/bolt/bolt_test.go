package bolt

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	"go.uber.org/goleak"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/control/store"
	"github.com/gmgate/gmgate/control/store/storetest"
)

func TestMain(m *testing.M) {
	if path := os.Getenv(childEnv); path != "" {
		os.Exit(child(path))
	}
	goleak.VerifyTestMain(m)
}

var key = storetest.Key(store.KeySize, 'k')

func openOrFail(t testing.TB, path string) *DB {
	t.Helper()
	d, err := Open(context.Background(), path, OpenOptions{Key: key})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func apply(t testing.TB, d *DB, b store.Batch) {
	t.Helper()
	if err := d.Apply(context.Background(), b); err != nil {
		t.Fatal(err)
	}
}

func closeOrFail(t testing.TB, d *DB) {
	t.Helper()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestConformance(t *testing.T) {
	storetest.Run(t, storetest.Implementation{
		New: func(t *testing.T) store.Store { return openOrFail(t, filepath.Join(t.TempDir(), "store")) },
		Reopen: func(t *testing.T, s store.Store) store.Store {
			closeOrFail(t, s.(*DB))
			return openOrFail(t, s.(*DB).path)
		},
	})
}

// The file is private, alone in its directory, and has nothing in clear.
func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	old := syscall.Umask(0)
	d := openOrFail(t, path)
	syscall.Umask(old)
	s, r := storetest.Set(1), storetest.Registration(1)
	s.Keys.Enc, s.Keys.Auth = ims.Key("confidentiality!"), ims.Key("integrity-integrity!")
	apply(t, d, store.Batch{Sets: []store.Set{s}, Registrations: []store.Registration{r}})
	if err := d.SetMeta(t.Context(), store.Meta{TokenKey: ims.Key("token-key-of-16!"), Instance: "edge1"}); err != nil {
		t.Fatal(err)
	}
	if aside, cause := d.Quarantined(); aside != "" || cause != nil {
		t.Errorf("quarantined %s: %v", aside, cause)
	}
	if n, err := d.Size(); err != nil || n < 16384 {
		t.Errorf("size %d, %v", n, err)
	}
	closeOrFail(t, d)
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
		t.Errorf("directory holds %v, %v", entries, err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, leak := range []string{"confidentiality!", "integrity-i", "token-key", "edge1", s.IMPI, s.IMPU, s.CallID, "ipsec-3gpp", "10.0.0.1", r.Contact} {
		if bytes.Contains(text, []byte(leak)) {
			t.Errorf("%q stands in the file", leak)
		}
	}
	// A mode that somebody loosened is tightened again.
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	closeOrFail(t, openOrFail(t, path))
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	d := openOrFail(t, path)
	_, err := Open(t.Context(), path, OpenOptions{Key: key, LockTimeout: 50 * time.Millisecond, Quarantine: true})
	if !errors.Is(err, store.ErrLocked) || !strings.Contains(err.Error(), "another gmgate uses it") || !strings.Contains(err.Error(), path) {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Open(ctx, path, OpenOptions{Key: key, LockTimeout: time.Hour}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	// Who waits gets it.
	opened := make(chan error)
	go func() {
		d, err := Open(context.Background(), path, OpenOptions{Key: key, LockTimeout: time.Minute})
		if err == nil {
			err = d.Close()
		}
		opened <- err
	}()
	closeOrFail(t, d)
	if err := <-opened; err != nil {
		t.Errorf("after the other has closed it: %v", err)
	}
}

// Those who make a new store at the same time do not take it from each other.
func TestLockWhileCreating(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	var wg sync.WaitGroup
	for i := range uint64(6) {
		wg.Go(func() {
			d, err := Open(context.Background(), path, OpenOptions{Key: key, LockTimeout: time.Minute})
			if err != nil {
				t.Error(err)
				return
			}
			err = d.Apply(context.Background(), store.Batch{Sets: []store.Set{storetest.Set(i + 1)}})
			if err := errors.Join(err, d.Close()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	d := openOrFail(t, path)
	defer closeOrFail(t, d)
	if n, err := store.Read(t.Context(), d); err != nil || len(n.Sets) != 6 {
		t.Errorf("got %+v, %v", n, err)
	}
}

// filled makes a file with enough records for a tree of several levels and returns its contents.
func filled(t testing.TB) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "store")
	d := openOrFail(t, path)
	for round := range 3 {
		var b store.Batch
		for i := range uint32(300) {
			n := i*3 + uint32(round) + 1
			b.Sets = append(b.Sets, storetest.Set(uint64(n)))
			b.Registrations = append(b.Registrations, storetest.Registration(n))
			b.Marks = append(b.Marks, store.Mark{Set: uint64(n), Counters: sa.Counters{2: n << 8}})
		}
		b.Free = []store.Freed{{Context: store.Context{Index: 9999}, Gen: uint16(round)}}
		big := storetest.Set(5000 + uint64(round))
		big.ClientText = strings.Repeat("x", 20000) // pages that overflow
		b.Sets = append(b.Sets, big)
		apply(t, d, b)
	}
	apply(t, d, store.Batch{DeleteSets: []uint64{10, 11, 12, 13, 14, 15, 16, 17}})
	closeOrFail(t, d)
	return trimmed(t, path)
}

// trimmed returns a file without what lies behind its last page in use.
func trimmed(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	m, err := readMeta(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	return b[:m.pages*m.pageSize]
}

// use opens a file of these contents, reads and changes it, and returns the error of Open. It fails the test when
// anything panics; what bbolt did on other goroutines would end the process.
func use(t *testing.T, contents []byte) (openErr error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "store")
	if err := os.WriteFile(path, contents, 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := Open(t.Context(), path, OpenOptions{Key: key})
	if err != nil {
		if !errors.Is(err, store.ErrCorrupt) && !errors.Is(err, store.ErrForeign) && !errors.Is(err, store.ErrVersion) {
			t.Errorf("open: %v", err)
		}
		now, readErr := os.ReadFile(path)
		if readErr != nil || !bytes.Equal(now, contents) {
			t.Errorf("a file that is refused (%v) was changed", err)
		}
		return err
	}
	if n, err := store.Read(t.Context(), d); err == nil {
		// Faults can be mended.
		var b store.Batch
		for _, f := range n.Faults {
			if f.Kind == store.KindSet {
				b.DeleteSets = append(b.DeleteSets, f.Set)
			} else {
				b.Free = append(b.Free, store.Freed{Context: f.Context})
			}
		}
		b.Sets = []store.Set{storetest.Set(1), storetest.Set(1e6)}
		if err := d.Apply(t.Context(), b); err != nil {
			t.Errorf("mend: %v", err)
		}
		if n, err = store.Read(t.Context(), d); err != nil || len(n.Faults) > 0 {
			t.Errorf("after mending: %v, %v", n.Faults, err)
		}
	} else if !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("load: %v", err)
	}
	closeOrFail(t, d)
	return nil
}

func TestUndamaged(t *testing.T) {
	if err := use(t, filled(t)); err != nil {
		t.Errorf("open: %v", err)
	}
}

func TestDamage(t *testing.T) {
	good := filled(t)
	const ps = 4096
	pages := len(good) / ps
	type damage struct {
		name string
		f    func(b []byte) []byte
	}
	var cases []damage
	for _, n := range []int{1, 15, 100, 1024, ps, ps + 100, 2 * ps, 3 * ps, 4 * ps, len(good) / 2, len(good) - ps, len(good) - 1} {
		cases = append(cases, damage{fmt.Sprintf("cut to %d", n), func(b []byte) []byte { return b[:n] }})
	}
	rng := rand.New(rand.NewPCG(1, 2))
	for range 40 {
		p := rng.IntN(pages)
		cases = append(cases, damage{fmt.Sprintf("page %d zero", p), func(b []byte) []byte { clear(b[p*ps:][:ps]); return b }})
		q := rng.IntN(pages)
		cases = append(cases, damage{fmt.Sprintf("page %d in place of %d", p, q), func(b []byte) []byte { copy(b[q*ps:][:ps], bytes.Clone(b[p*ps:][:ps])); return b }})
		cases = append(cases, damage{fmt.Sprintf("page %d noise", p), func(b []byte) []byte {
			for i := range ps {
				b[p*ps+i] = byte(rng.Uint32())
			}
			return b
		}})
		// Headers and elements are where it hurts.
		at, v := p*ps+rng.IntN(200), byte(rng.Uint32())
		cases = append(cases, damage{fmt.Sprintf("octet %d becomes %#x", at, v), func(b []byte) []byte { b[at] = v; return b }})
		w, bit := rng.IntN(len(good)), rng.IntN(8)
		cases = append(cases, damage{fmt.Sprintf("bit %d of octet %d", bit, w), func(b []byte) []byte { b[w] ^= 1 << bit; return b }})
	}
	refused := 0
	for _, tt := range cases {
		t.Run(tt.name, func(t *testing.T) {
			if err := use(t, tt.f(bytes.Clone(good))); err != nil {
				refused++
			}
		})
	}
	if refused < len(cases)/4 {
		t.Errorf("%d of %d damaged files refused", refused, len(cases))
	}
}

// One meta page may be broken: a power failure hits the newer one, and the state before it is whole.
func TestOneMetaPageBroken(t *testing.T) {
	for _, at := range []int{16, 20, 4096 + 16, 4096 + 60} {
		b := filled(t)
		b[at] ^= 0xff
		if err := use(t, b); err != nil {
			t.Errorf("octet %d: %v", at, err)
		}
	}
	b := filled(t)
	b[30] ^= 0xff
	b[4096+30] ^= 0xff
	if err := use(t, b); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("both broken: %v", err)
	}
}

func FuzzDamage(f *testing.F) {
	good := filled(f)
	f.Add(uint32(4096*3), []byte{1, 2, 3})
	f.Fuzz(func(t *testing.T, at uint32, patch []byte) {
		b := bytes.Clone(good)
		copy(b[int(at)%len(b):], patch)
		_ = use(t, b)
	})
}

// boltFile makes a bbolt file that is not one of ours.
func boltFile(t *testing.T, path string, f func(*bbolt.Tx) error) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(db.Update(f), db.Close()); err != nil {
		t.Fatal(err)
	}
}

func TestForeign(t *testing.T) {
	dir := t.TempDir()
	other := filepath.Join(dir, "other")
	boltFile(t, other, func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucket([]byte("key"))
		if err != nil {
			return err
		}
		for i := range 1000 {
			if err := b.Put(binary.BigEndian.AppendUint32(nil, uint32(i)), make([]byte, 100)); err != nil {
				return err
			}
		}
		return nil
	})
	contents, err := os.ReadFile(other)
	if err != nil {
		t.Fatal(err)
	}
	for name, contents := range map[string][]byte{
		"bbolt": contents, "text": []byte("instance: edge1\n"), "long text": bytes.Repeat([]byte("gm:\n"), 10000), "zeroes": make([]byte, 1<<20),
	} {
		if err := use(t, contents); !errors.Is(err, store.ErrForeign) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Open(t.Context(), dir, OpenOptions{Key: key, Quarantine: true}); err == nil {
		t.Error("a directory opens")
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), fifo, OpenOptions{Key: key, Quarantine: true}); !errors.Is(err, store.ErrForeign) {
		t.Errorf("a FIFO: %v", err)
	}
	if _, err := Open(t.Context(), filepath.Join(dir, "no", "store"), OpenOptions{Key: key}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing directory: %v", err)
	}
}

// A file that a process left empty when it was killed while making it is made again.
func TestEmptyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	for _, name := range []string{path, path + ".new"} {
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(path+".new", []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	closeOrFail(t, openOrFail(t, path))
}

func TestQuarantine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	var moved []string
	for i, contents := range [][]byte{[]byte("something else"), filled(t)[:20000], []byte("and again")} {
		if err := os.WriteFile(path, contents, 0o600); err != nil {
			t.Fatal(err)
		}
		d, err := Open(t.Context(), path, OpenOptions{Key: key, Quarantine: true})
		if err != nil {
			t.Fatal(err)
		}
		aside, cause := d.Quarantined()
		if want := []error{store.ErrForeign, store.ErrCorrupt, store.ErrForeign}[i]; !errors.Is(cause, want) {
			t.Errorf("cause %v, want %v", cause, want)
		}
		if now, err := os.ReadFile(aside); err != nil || !bytes.Equal(now, contents) || !strings.HasPrefix(aside, path+".bad-") {
			t.Errorf("%s does not hold what was there (%v)", aside, err)
		}
		moved = append(moved, aside)
		apply(t, d, store.Batch{Sets: []store.Set{storetest.Set(1)}})
		closeOrFail(t, d)
	}
	for _, name := range moved {
		if _, err := os.Stat(name); err != nil {
			t.Errorf("overwritten: %v", err)
		}
	}
}

// What is whole is not moved: another key, a newer version.
func TestKeyAndVersion(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	d := openOrFail(t, path)
	apply(t, d, store.Batch{Sets: []store.Set{storetest.Set(1)}})
	closeOrFail(t, d)
	if _, err := Open(t.Context(), path, OpenOptions{Key: storetest.Key(store.KeySize, 'x'), Quarantine: true}); !errors.Is(err, store.ErrKey) {
		t.Errorf("another key: %v", err)
	}
	if _, err := Open(t.Context(), path, OpenOptions{Quarantine: true}); err == nil {
		t.Error("opens without a key")
	}
	d = openOrFail(t, path)
	if n, err := store.Read(t.Context(), d); err != nil || len(n.Sets) != 1 {
		t.Errorf("got %+v, %v", n, err)
	}
	closeOrFail(t, d)
	boltFile(t, path, func(tx *bbolt.Tx) error { return tx.Bucket(bucketMeta).Put(keySchema, []byte{store.Schema + 1}) })
	_, err := Open(t.Context(), path, OpenOptions{Key: key, Quarantine: true})
	if !errors.Is(err, store.ErrVersion) || !strings.Contains(err.Error(), "unknown schema version 2; this program knows version 1") {
		t.Errorf("another version: %v", err)
	}
	boltFile(t, path, func(tx *bbolt.Tx) error {
		return errors.Join(tx.Bucket(bucketMeta).Put(keySchema, []byte{store.Schema}), tx.DeleteBucket(bucketMarks))
	})
	if _, err := Open(t.Context(), path, OpenOptions{Key: key}); !errors.Is(err, store.ErrCorrupt) || !strings.Contains(err.Error(), "marks") {
		t.Errorf("a bucket is missing: %v", err)
	}
}

// Records that somebody moved, changed or took from another kind are faults, and only they.
func TestTampering(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	d := openOrFail(t, path)
	apply(t, d, store.Batch{
		Sets:          []store.Set{storetest.Set(1), storetest.Set(2), storetest.Set(3), storetest.Set(4)},
		Marks:         []store.Mark{{Set: 3}, {Set: 4, Counters: sa.Counters{2: 1e6}}},
		Registrations: []store.Registration{storetest.Registration(4), storetest.Registration(8)},
	})
	closeOrFail(t, d)
	// The other writes a list of free pages, as bbolt's own tools do.
	boltFile(t, path, func(tx *bbolt.Tx) error {
		s, r, m := tx.Bucket(bucketSets), tx.Bucket(bucketRegistrations), tx.Bucket(bucketMarks)
		first, second := bytes.Clone(s.Get(store.SetKey(1))), bytes.Clone(s.Get(store.SetKey(2)))
		at, other := store.ContextKey(storetest.Registration(4).Context), store.ContextKey(storetest.Registration(8).Context)
		return errors.Join(
			s.Put(store.SetKey(1), second), s.Put(store.SetKey(2), first),
			m.Put(store.SetKey(3), bytes.Clone(m.Get(store.SetKey(4)))), r.Put(at, bytes.Clone(r.Get(other))),
		)
	})
	d = openOrFail(t, path)
	n, err := store.Read(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	if len(n.Sets) != 1 || n.Sets[0].ID != 4 || n.Sets[0].Counters[2] != 1e6 || len(n.Registrations) != 1 || n.Registrations[0].Index != 8 {
		t.Errorf("got %+v", n)
	}
	var faults []string
	for _, f := range n.Faults {
		faults = append(faults, fmt.Sprintf("%s %d %d", f.Kind, f.Set, f.Context.Index))
	}
	if got, want := fmt.Sprint(faults), fmt.Sprint([]string{"registration 0 4", "set 1 0", "set 2 0", "set 3 0"}); got != want {
		t.Errorf("got faults %s, want %s", got, want)
	}
	if ids, err := d.SetIDs(t.Context()); err != nil || fmt.Sprint(ids) != "[1 2 3 4]" {
		t.Errorf("got ids %v, %v", ids, err)
	}
	if err := d.Checkpoint(t.Context(), []store.Mark{{Set: 3, Counters: sa.Counters{3: 77}}}); err != nil {
		t.Fatal(err)
	}
	if n, err = store.Read(t.Context(), d); err != nil || len(n.Sets) != 2 || n.Sets[0].ID != 3 || n.Sets[0].Counters[3] != 77 {
		t.Errorf("after the marks were replaced: %+v, %v", n.Sets, err)
	}
	closeOrFail(t, d)
	boltFile(t, path, func(tx *bbolt.Tx) error { return tx.Bucket(bucketSets).Put([]byte("long key of nothing"), []byte("x")) })
	d = openOrFail(t, path)
	if _, err := store.Read(t.Context(), d); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("a key of nothing: %v", err)
	}
	if _, err := d.SetIDs(t.Context()); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("ids with a key of nothing: %v", err)
	}
	closeOrFail(t, d)
}

// A file that is cut while it is open does not take the process with it.
func TestCutWhileOpen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	if err := os.WriteFile(path, filled(t), 0o600); err != nil {
		t.Fatal(err)
	}
	d := openOrFail(t, path)
	if err := os.Truncate(path, 4096); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := store.Read(t.Context(), d); !errors.Is(err, store.ErrCorrupt) {
			t.Errorf("read: %v", err)
		}
		if err := d.Apply(t.Context(), store.Batch{Sets: []store.Set{storetest.Set(1)}}); !errors.Is(err, store.ErrCorrupt) {
			t.Errorf("apply: %v", err)
		}
		if _, err := d.Meta(t.Context()); !errors.Is(err, store.ErrCorrupt) {
			t.Errorf("meta: %v", err)
		}
		if _, err := d.SetIDs(t.Context()); !errors.Is(err, store.ErrCorrupt) {
			t.Errorf("ids: %v", err)
		}
	}
	closeOrFail(t, d)
	closeOrFail(t, d)
	d, err := Open(t.Context(), path, OpenOptions{Key: key, Quarantine: true})
	if err != nil {
		t.Fatal(err)
	}
	closeOrFail(t, d)
}

// A visitor's own panic is not a damaged file.
func TestVisitorPanics(t *testing.T) {
	d := openOrFail(t, filepath.Join(t.TempDir(), "store"))
	apply(t, d, store.Batch{Sets: []store.Set{storetest.Set(1)}})
	func() {
		defer func() {
			if r := recover(); r != "mine" {
				t.Errorf("recovered %v", r)
			}
		}()
		_ = d.Load(t.Context(), &store.Visitor{Set: func(store.Set) error { panic("mine") }})
	}()
	apply(t, d, store.Batch{Sets: []store.Set{storetest.Set(2)}})
	closeOrFail(t, d)
}
