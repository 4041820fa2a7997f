package bolt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"

	"github.com/gmgate/gmgate/control/store"
)

// The format of a bbolt file, version 2: pages of one size, of which the first two are meta pages. Everything is in the
// byte order of the machine. A page begins with its id (8), flags (2), count of elements (2) and number of further pages
// that belong to it (4); elements follow, whose keys and values stand behind them at offsets counted from the element.
const (
	boltMagic   = 0xED0CDAED
	boltVersion = 2

	pageHeader  = 16
	elementSize = 16
	metaSize    = 64
	bucketSize  = 16 // root page (8), sequence (8)

	pageBranch   = 0x01
	pageLeaf     = 0x02
	pageFreelist = 0x10

	noFreelist = 1<<64 - 1

	minPage, maxPage = 1 << 10, 1 << 16
	maxDepth         = 64 // of the tree and of buckets in buckets together
)

var order = binary.NativeEndian

// verify walks the whole file and returns an error that wraps ErrCorrupt, or ErrForeign when it is none of bbolt's, if
// any reachable page is not what it should be. bbolt believes what it reads: out of bounds it panics, and while opening
// it does so on a goroutine of its own, where nobody can recover. After this walk it has no reason to.
//
// It is as strict as bbolt's own check (which needs an open database) and says nothing about values: those are sealed.
func verify(f io.ReaderAt, size int64) error {
	m, err := readMeta(f, size)
	if err != nil {
		return err
	}
	w := walker{f: f, meta: m, seen: make([]uint64, m.pages/64+1)}
	w.mark(0)
	w.mark(1)
	if err := w.tree(m.root, nil, nil, 0, nil); err != nil {
		return err
	}
	if m.freelist != noFreelist {
		return w.freelist()
	}
	return nil
}

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s", store.ErrCorrupt, fmt.Sprintf(format, args...))
}

type meta struct {
	pageSize, root, freelist, pages, txid uint64
}

// readMeta returns the newer of the two meta pages that are whole.
func readMeta(f io.ReaderAt, size int64) (meta, error) {
	first, known, ok := readMetaAt(f, 0)
	best, found := first, ok
	// The other one lies a page further on; how far that is nobody knows when the first is broken.
	for ps := int64(minPage); ps <= maxPage; ps *= 2 {
		m, k, ok := readMetaAt(f, ps)
		known = known || k
		if ok && m.pageSize == uint64(ps) && (!found || m.pageSize == first.pageSize && m.txid > first.txid) {
			best, found = m, true
		}
	}
	switch {
	case !known:
		return meta{}, fmt.Errorf("%w: no bbolt file", store.ErrForeign)
	case !found:
		return meta{}, corrupt("both meta pages are broken")
	case best.pageSize < minPage || best.pageSize > maxPage || best.pageSize&(best.pageSize-1) != 0:
		return meta{}, corrupt("page size is %d", best.pageSize)
	case best.pages < 4 || best.pages > uint64(size)/best.pageSize:
		return meta{}, corrupt("file of %d octets is too short for %d pages", size, best.pages)
	}
	return best, nil
}

// readMetaAt reads a meta page. known says that it looks like one of bbolt's, ok that it is whole.
func readMetaAt(f io.ReaderAt, at int64) (m meta, known, ok bool) {
	var b [pageHeader + metaSize]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		return meta{}, false, false
	}
	p := b[pageHeader:]
	if order.Uint32(p) != boltMagic {
		return meta{}, false, false
	}
	sum := fnv.New64a()
	_, _ = sum.Write(p[:metaSize-8])
	m = meta{
		pageSize: uint64(order.Uint32(p[8:])), root: order.Uint64(p[16:]), freelist: order.Uint64(p[32:]),
		pages: order.Uint64(p[40:]), txid: order.Uint64(p[48:]),
	}
	return m, true, order.Uint32(p[4:]) == boltVersion && order.Uint64(p[metaSize-8:]) == sum.Sum64()
}

type walker struct {
	f    io.ReaderAt
	meta meta
	seen []uint64 // a bit per page
	free [][]byte // buffers of one page
}

func (w *walker) has(id uint64) bool { return w.seen[id/64]>>(id%64)&1 != 0 }
func (w *walker) mark(id uint64)     { w.seen[id/64] |= 1 << (id % 64) }

// page reads a page with all that belongs to it and marks it as seen.
func (w *walker) page(id uint64) ([]byte, error) {
	if id < 2 || id >= w.meta.pages {
		return nil, corrupt("page %d of %d is referred to", id, w.meta.pages)
	}
	var b []byte
	if n := len(w.free); n > 0 {
		b, w.free = w.free[n-1], w.free[:n-1]
	} else {
		b = make([]byte, w.meta.pageSize)
	}
	if _, err := w.f.ReadAt(b, int64(id*w.meta.pageSize)); err != nil {
		return nil, readError(id, err)
	}
	if got := order.Uint64(b); got != id {
		return nil, corrupt("page %d says that it is page %d", id, got)
	}
	more := uint64(order.Uint32(b[12:]))
	if more >= w.meta.pages-id {
		return nil, corrupt("page %d has %d further pages", id, more)
	}
	for i := id; i <= id+more; i++ {
		if w.has(i) {
			return nil, corrupt("page %d is referred to twice", i)
		}
		w.mark(i)
	}
	if more == 0 {
		return b, nil
	}
	w.free = append(w.free, b)
	b = make([]byte, (more+1)*w.meta.pageSize)
	if _, err := w.f.ReadAt(b, int64(id*w.meta.pageSize)); err != nil {
		return nil, readError(id, err)
	}
	return b, nil
}

func readError(id uint64, err error) error {
	if errors.Is(err, io.EOF) {
		return corrupt("file ends before page %d", id)
	}
	return fmt.Errorf("read page %d: %w", id, err)
}

// done gives the buffer of a page back.
func (w *walker) done(b []byte) {
	if uint64(len(b)) == w.meta.pageSize {
		w.free = append(w.free, b)
	}
}

// tree checks the pages from id on. All keys have to be at least low and below high; nil sets no bound. It puts a copy
// of the highest key into last, if that is not nil.
func (w *walker) tree(id uint64, low, high []byte, depth int, last *[]byte) error {
	if depth > maxDepth {
		return corrupt("page %d lies %d levels deep", id, depth)
	}
	b, err := w.page(id)
	if err != nil {
		return err
	}
	defer w.done(b)
	switch flags := order.Uint16(b[8:]); flags {
	case pageLeaf:
		return w.leaf(b, id, low, high, depth, last)
	case pageBranch:
		return w.branch(b, id, low, high, depth, last)
	default:
		return corrupt("page %d has flags %#x", id, flags)
	}
}

// element returns what stands at an offset from an element.
func element(b []byte, i int, pos uint32, lengths ...uint32) ([]byte, bool) {
	at := uint64(pageHeader+i*elementSize) + uint64(pos)
	end := at
	for _, l := range lengths {
		end += uint64(l)
	}
	if pos < elementSize || end > uint64(len(b)) {
		return nil, false
	}
	return b[at:end], true
}

func (w *walker) branch(b []byte, id uint64, low, high []byte, depth int, last *[]byte) error {
	count := int(order.Uint16(b[10:]))
	if count == 0 || pageHeader+count*elementSize > len(b) {
		return corrupt("branch page %d has %d elements", id, count)
	}
	key := func(i int) ([]byte, uint64, error) {
		e := b[pageHeader+i*elementSize:]
		k, ok := element(b, i, order.Uint32(e), order.Uint32(e[4:]))
		if !ok {
			return nil, 0, corrupt("element %d of page %d is out of bounds", i, id)
		}
		return k, order.Uint64(e[8:]), nil
	}
	before := low
	for i := range count {
		k, child, err := key(i)
		if err != nil {
			return err
		}
		if err := inOrder(k, before, high, i > 0, id); err != nil {
			return err
		}
		below := high
		if i+1 < count {
			if below, _, err = key(i + 1); err != nil {
				return err
			}
		}
		top := bytes.Clone(k)
		if err := w.tree(child, k, below, depth+1, &top); err != nil {
			return err
		}
		before = top
	}
	if last != nil {
		*last = before
	}
	return nil
}

func (w *walker) leaf(b []byte, id uint64, low, high []byte, depth int, last *[]byte) error {
	count := int(order.Uint16(b[10:]))
	if pageHeader+count*elementSize > len(b) {
		return corrupt("leaf page %d has %d elements", id, count)
	}
	before := low
	for i := range count {
		e := b[pageHeader+i*elementSize:]
		flags, ksize, vsize := order.Uint32(e), order.Uint32(e[8:]), order.Uint32(e[12:])
		kv, ok := element(b, i, order.Uint32(e[4:]), ksize, vsize)
		if !ok {
			return corrupt("element %d of page %d is out of bounds", i, id)
		}
		k, v := kv[:ksize], kv[ksize:]
		if err := inOrder(k, before, high, i > 0, id); err != nil {
			return err
		}
		switch flags {
		case 0:
		case 1:
			if err := w.bucket(v, id, depth); err != nil {
				return err
			}
		default:
			return corrupt("element %d of page %d has flags %#x", i, id, flags)
		}
		before = k
	}
	if last != nil && count > 0 {
		*last = bytes.Clone(before)
	}
	return nil
}

// bucket checks a bucket: its own tree, or the page within the value if it is small. id is -1 within a value.
func (w *walker) bucket(v []byte, id uint64, depth int) error {
	if id == inline || len(v) < bucketSize {
		return corrupt("a bucket in page %d is cut short", id)
	}
	if root := order.Uint64(v); root != 0 {
		return w.tree(root, nil, nil, depth+1, nil)
	}
	v = v[bucketSize:]
	if len(v) < pageHeader || order.Uint16(v[8:]) != pageLeaf {
		return corrupt("a bucket in page %d has no page", id)
	}
	return w.leaf(v, inline, nil, nil, depth+1, nil)
}

// inline stands for the id of a page within a value.
const inline = 1<<64 - 1

// inOrder checks a key against the one before it, which may be equal only if it stands in the parent page.
func inOrder(k, before, high []byte, strict bool, id uint64) error {
	if c := bytes.Compare(before, k); before != nil && (c > 0 || strict && c == 0) {
		return corrupt("keys of page %d are out of order", id)
	}
	if high != nil && bytes.Compare(k, high) >= 0 {
		return corrupt("keys of page %d belong to another page", id)
	}
	return nil
}

// freelist checks the list of free pages. We do not write one, but other programs (bbolt compact) do.
func (w *walker) freelist() error {
	id := w.meta.freelist
	b, err := w.page(id)
	if err != nil {
		return err
	}
	if flags := order.Uint16(b[8:]); flags != pageFreelist {
		return corrupt("free list page %d has flags %#x", id, flags)
	}
	count, rest := uint64(order.Uint16(b[10:])), b[pageHeader:]
	if count == 0xFFFF {
		count, rest = order.Uint64(rest), rest[8:]
	}
	if count > uint64(len(rest)/8) {
		return corrupt("free list has %d elements", count)
	}
	for i := range count {
		p := order.Uint64(rest[8*i:])
		if p < 2 || p >= w.meta.pages || w.has(p) {
			return corrupt("page %d is in the free list", p)
		}
		w.mark(p)
	}
	return nil
}
