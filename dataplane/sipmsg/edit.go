package sipmsg

import (
	"net/netip"
	"slices"
	"strconv"
)

// MaxSplices bounds an edit. Forwarding takes about twenty; what takes a thousand is a message made to cost time, such
// as one with thousands of option tags to be removed one by one.
const MaxSplices = 1024

// Edit is a list of splices over one scanned message, written out by Append. Offsets are always those of the message as
// scanned, in any order. The zero value is ready for Reset and is meant to be reused: its buffers are kept.
//
// A mistake (an offset outside the message, overlapping replacements, an unclosed builder, too many edits) is remembered and returned
// by Append, so that a chain of edits needs one check.
type Edit struct {
	b      []byte
	s      []splice
	text   []byte // replacement texts
	err    *Error
	opened bool
	open   splice
}

// splice replaces b[start:end] by text[off:off+n].
type splice struct{ start, end, off, n uint32 }

// Reset starts the edit of m, which must not be scanned anew before Append. Methods that take a message take this one.
func (e *Edit) Reset(m *Msg) {
	e.b = m.b
	e.s = e.s[:0]
	e.text = e.text[:0]
	e.err = nil
	e.opened = false
}

// Changed reports whether anything has been edited since Reset.
func (e *Edit) Changed() bool { return len(e.s) > 0 }

// Err returns the first mistake so far, nil if there is none.
func (e *Edit) Err() error {
	if e.err != nil {
		return e.err
	}
	return nil
}

func (e *Edit) fail(err *Error) {
	if e.err == nil {
		e.err = err
	}
}

func (e *Edit) valid(start, end int) bool {
	if start < 0 || end < start || end > len(e.b) {
		e.fail(ErrEditRange)
		return false
	}
	if e.opened {
		e.fail(ErrEditOpen)
		return false
	}
	return true
}

// add records a splice whose text is what the arena has got since off.
func (e *Edit) add(start, end uint32, off int) {
	n := uint32(len(e.text) - off)
	if n == 0 && end == start {
		return
	}
	if len(e.s) >= MaxSplices {
		e.fail(ErrEditTooMany)
		return
	}
	e.s = append(e.s, splice{start, end, uint32(off), n})
}

// Insert inserts text before the byte at offset at. Several inserts at one offset keep their order, and stand before a
// replacement that starts there.
func (e *Edit) Insert(at int, parts ...string) {
	if !e.valid(at, at) {
		return
	}
	off := len(e.text)
	for _, p := range parts {
		e.text = append(e.text, p...)
	}
	e.add(uint32(at), uint32(at), off)
}

// InsertBytes is Insert for byte slices, which are copied.
func (e *Edit) InsertBytes(at int, parts ...[]byte) {
	if !e.valid(at, at) {
		return
	}
	off := len(e.text)
	for _, p := range parts {
		e.text = append(e.text, p...)
	}
	e.add(uint32(at), uint32(at), off)
}

// Replace replaces the bytes from start to end; the new ones are copied.
func (e *Edit) Replace(start, end int, with []byte) {
	if e.valid(start, end) {
		off := len(e.text)
		e.text = append(e.text, with...)
		e.add(uint32(start), uint32(end), off)
	}
}

// ReplaceString is Replace for a string.
func (e *Edit) ReplaceString(start, end int, with string) {
	if e.valid(start, end) {
		off := len(e.text)
		e.text = append(e.text, with...)
		e.add(uint32(start), uint32(end), off)
	}
}

// Delete removes the bytes from start to end. What was deleted may be deleted again, wholly or in part.
func (e *Edit) Delete(start, end int) {
	if e.valid(start, end) {
		e.add(uint32(start), uint32(end), len(e.text))
	}
}

// DeleteRow removes a header row.
func (e *Edit) DeleteRow(r Row) { e.Delete(int(r.Start), int(r.End)) }

// DeleteAll removes every row of a header field and reports whether there was one.
func (e *Edit) DeleteAll(m *Msg, id HeaderID) bool {
	rows := m.rowsFrom(id)
	for i := range rows {
		if r := &rows[i]; r.ID == id {
			e.Delete(int(r.Start), int(r.End))
		}
	}
	return len(rows) > 0
}

// Open starts a replacement of the bytes from start to end whose text is built piece by piece until Close; start == end
// inserts. The methods return e, so that they chain:
//
//	e.Open(at, at).Str("Via: SIP/2.0/UDP ").AddrPort(local).Str(";branch=z9hG4bK").Hex(branch).Str("\r\n").Close()
func (e *Edit) Open(start, end int) *Edit {
	if e.valid(start, end) {
		e.open = splice{start: uint32(start), end: uint32(end), off: uint32(len(e.text))}
		e.opened = true
	}
	return e
}

// Str appends a string to the open text.
func (e *Edit) Str(s string) *Edit {
	e.text = append(e.text, s...)
	return e
}

// Raw appends bytes to the open text.
func (e *Edit) Raw(b []byte) *Edit {
	e.text = append(e.text, b...)
	return e
}

// Byte appends one byte to the open text.
func (e *Edit) Byte(c byte) *Edit {
	e.text = append(e.text, c)
	return e
}

// Uint appends a number in decimal.
func (e *Edit) Uint(n uint64) *Edit {
	e.text = strconv.AppendUint(e.text, n, 10)
	return e
}

// Hex appends a number as 16 lower-case hexadecimal digits.
func (e *Edit) Hex(n uint64) *Edit {
	const digits = "0123456789abcdef"
	var t [16]byte
	for i := range t {
		t[i] = digits[n>>(60-4*i)&15]
	}
	e.text = append(e.text, t[:]...)
	return e
}

// AddrPort appends host:port as in Via and URIs: IPv6 in brackets, no zone, IPv4-mapped addresses as IPv4.
func (e *Edit) AddrPort(a netip.AddrPort) *Edit {
	e.Addr(a.Addr())
	e.text = append(e.text, ':')
	e.text = strconv.AppendUint(e.text, uint64(a.Port()), 10)
	return e
}

// Addr appends an address as in Via and URIs: IPv6 in brackets, no zone, IPv4-mapped addresses as IPv4.
func (e *Edit) Addr(a netip.Addr) *Edit {
	if a.Is4() || a.Is4In6() {
		return e.BareAddr(a)
	}
	e.text = append(e.text, '[')
	e.BareAddr(a)
	e.text = append(e.text, ']')
	return e
}

// BareAddr appends an address without brackets, as the received parameter wants it (RFC 3261 §25.1 via-received).
func (e *Edit) BareAddr(a netip.Addr) *Edit {
	if a = a.Unmap(); a.Is4() {
		ip := a.As4()
		e.text = strconv.AppendUint(e.text, uint64(ip[0]), 10)
		for _, c := range ip[1:] {
			e.text = append(e.text, '.')
			e.text = strconv.AppendUint(e.text, uint64(c), 10)
		}
		return e
	}
	e.text = a.WithZone("").AppendTo(e.text)
	return e
}

// Close ends what Open has started.
func (e *Edit) Close() {
	if !e.opened {
		e.fail(ErrEditOpen)
		return
	}
	e.opened = false
	e.add(e.open.start, e.open.end, int(e.open.off))
}

// deleted reports whether one of the first n splices deletes all of b[start:end].
func (e *Edit) deleted(n int, start, end int) bool {
	for i := range e.s[:n] {
		if s := &e.s[i]; s.n == 0 && int(s.start) <= start && int(s.end) >= end {
			return true
		}
	}
	return false
}

// touched reports whether anything was deleted from a row: it spares a long row the search for every element.
func (e *Edit) touched(r *Row) bool {
	for i := range e.s {
		if s := &e.s[i]; s.n == 0 && s.start < r.End && s.end > r.Start {
			return true
		}
	}
	return false
}

// removeElements deletes the element that starts at offset target (0: none) and those equal to one of tokens from a
// row, with the commas that become superfluous, and the whole row when no element is left. Elements that were deleted
// before count as gone. It returns the number of elements removed now.
func (e *Edit) removeElements(r *Row, target int, tokens []string) int {
	keptEnd, runStart := 0, 0 // end of the last element that stays; start of the current run of gone ones; 0 = none
	removed, before := 0, len(e.s)
	touched := e.touched(r)
	v := e.b[:r.ValEnd]
	for start, end, next := nextElement(v, int(r.ValStart)); start < end; start, end, next = nextElement(v, next) {
		gone := touched && e.deleted(before, start, end)
		if !gone && (start == target || isOneOf(v[start:end], tokens)) {
			gone = true
			removed++
		}
		switch {
		case gone && runStart == 0:
			runStart = start
		case !gone:
			if runStart != 0 {
				e.Delete(runStart, start)
			}
			keptEnd, runStart = end, 0
		}
	}
	switch {
	case removed == 0:
		e.s = e.s[:before]
	case keptEnd == 0:
		e.DeleteRow(*r)
	case runStart != 0:
		e.Delete(keptEnd, int(r.ValEnd))
	}
	return removed
}

func isOneOf(b []byte, tokens []string) bool {
	for _, t := range tokens {
		if EqualFold(b, t) {
			return true
		}
	}
	return false
}

// DeleteElement removes one element from a comma-separated row, with its comma, or the whole row when nothing else is
// left in it. elem is a non-empty slice of the row's value that lies in the element, such as Element, NameAddr.URI or
// ViaParm.Branch give.
func (e *Edit) DeleteElement(m *Msg, r Row, elem []byte) {
	if off, ok := m.Offset(elem); ok && off >= int(r.ValStart) && off+len(elem) <= int(r.ValEnd) {
		v := e.b[:r.ValEnd]
		for start, end, next := nextElement(v, int(r.ValStart)); start < end; start, end, next = nextElement(v, next) {
			if start <= off && off+len(elem) <= end {
				e.removeElements(&r, start, nil)
				return
			}
		}
	}
	e.fail(ErrEditRange)
}

// RemoveTokens removes option tags from all rows of a header field, compared without regard to case, and the rows that
// are left empty. It returns the number of elements removed.
func (e *Edit) RemoveTokens(m *Msg, id HeaderID, tokens ...string) int {
	n := 0
	rows := m.rowsFrom(id)
	for i := range rows {
		if r := &rows[i]; r.ID == id {
			n += e.removeElements(r, 0, tokens)
		}
	}
	return n
}

// PopElement removes the first element of a header field that is still there: of Via or Route, the topmost one. Called
// again it removes the next. It reports whether there was one.
func (e *Edit) PopElement(m *Msg, id HeaderID) bool {
	rows := m.rowsFrom(id)
	for i := range rows {
		r := &rows[i]
		if r.ID != id {
			continue
		}
		v := e.b[:r.ValEnd]
		for start, end, next := nextElement(v, int(r.ValStart)); start < end; start, end, next = nextElement(v, next) {
			if !e.deleted(len(e.s), start, end) {
				e.removeElements(r, start, nil)
				return true
			}
		}
	}
	return false
}

// Append appends the edited message to dst, which must not share memory with the scanned message. Deletions may
// overlap each other; a replacement may not overlap anything, and nothing can be inserted inside what is deleted or
// replaced. On an error dst is returned as it came.
func (e *Edit) Append(dst []byte) ([]byte, error) {
	if e.opened {
		e.fail(ErrEditOpen)
	}
	if e.err != nil {
		return dst, e.err
	}
	e.sort()
	had := len(dst)
	dst = slices.Grow(dst, len(e.b)+len(e.text))
	pos := uint32(0)     // what is before it is done
	textEnd := uint32(0) // end of the last replacement by text: nothing may start before it
	for i := range e.s {
		s := &e.s[i]
		if s.start < pos && (s.n > 0 || s.start < textEnd) {
			e.fail(ErrEditOverlap)
			return dst[:had], e.err
		}
		if s.start > pos {
			dst = append(dst, e.b[pos:s.start]...)
		}
		if s.n > 0 {
			dst = append(dst, e.text[s.off:s.off+s.n]...)
			textEnd = s.end
		}
		pos = max(pos, s.end)
	}
	return append(dst, e.b[pos:]...), nil
}

// sort orders the splices by start, inserts before replacements, else as they were called. Insertion sort: it is stable
// and the list is short and nearly in order.
func (e *Edit) sort() {
	s := e.s
	for i := 1; i < len(s); i++ {
		x := s[i]
		j := i
		for j > 0 && (s[j-1].start > x.start || (s[j-1].start == x.start && x.end == x.start && s[j-1].end > x.start)) {
			s[j] = s[j-1]
			j--
		}
		s[j] = x
	}
}
