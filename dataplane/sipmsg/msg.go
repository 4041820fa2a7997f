package sipmsg

import (
	"bytes"
	"slices"
)

// Implementation limits.
const (
	// MaxRows is the number of header rows a Msg holds. A large IMS INVITE has about 40.
	MaxRows = 128
	// MaxMessage is the largest message Scan takes: offsets are 32 bits wide.
	MaxMessage = 1 << 30
)

// Row is one header row: a header field line with its folds. Offsets are into Msg.Bytes.
type Row struct {
	ID               HeaderID
	Start, End       uint32 // the whole row including its CRLF
	ValStart, ValEnd uint32 // the value without surrounding white space
}

// Msg is the index of one scanned message. The zero value is ready for Scan and is meant to be reused.
type Msg struct {
	b          []byte
	body       int // start of the body
	headers    int // start of the header rows
	methodEnd  int
	uriStart   int
	uriEnd     int
	status     int // 0 in requests
	phrase     int // start of the reason phrase
	phraseEnd  int
	response   bool
	method     Method
	cseqMethod Method
	cseq       uint32
	cseqStart  int // CSeq method token
	cseqEnd    int
	n          int
	seen       idSet
	first      [maxHeaderIDs]uint8 // index of the first row of an ID; meaningful where seen has the ID
	rows       [MaxRows]Row
}

// Scan indexes the message b. On a stream b must be exactly one message as cut by Frame; of a datagram, bytes behind
// the body that Content-Length announces are cut off (RFC 3261 §18.3).
//
// Every check that fails is remembered and scanning goes on where it can, so that after an error the rows that were
// found are readable and an answer can be built from them. The first failure is returned.
func (m *Msg) Scan(b []byte) error {
	m.b = slices.Clip(b)
	m.n = 0
	m.seen = idSet{}
	m.headers, m.body = len(b), len(b)
	m.methodEnd, m.uriStart, m.uriEnd, m.status, m.phrase, m.phraseEnd = 0, 0, 0, 0, 0, 0
	m.cseq, m.cseqStart, m.cseqEnd, m.method, m.cseqMethod, m.response = 0, 0, 0, MethodOther, MethodOther, false
	if len(b) > MaxMessage {
		m.b, m.headers, m.body = nil, 0, 0
		return ErrTooLarge
	}
	if err := m.scan(); err != nil {
		return err
	}
	return nil
}

func (m *Msg) scan() *Error {
	b := m.b
	p := bytes.IndexByte(b, '\n') + 1
	if p == 0 {
		return ErrTruncated
	}
	crs := 0 // line ends written CR LF
	e := p - 1
	if e > 0 && b[e-1] == '\r' {
		e--
		crs++
	}
	err := m.startLine(e)
	m.headers = p

	var dup idSet
	for {
		if p >= len(b) {
			return firstOf(err, ErrTruncated)
		}
		if c := b[p]; c == '\n' {
			p++
			break
		} else if c == '\r' && p+1 < len(b) && b[p+1] == '\n' {
			crs++
			p += 2
			break
		}
		start := p
		for { // to the end of the row: a line that starts with white space belongs to the row before it
			i := bytes.IndexByte(b[p:], '\n')
			if i < 0 {
				return firstOf(err, ErrTruncated)
			}
			p += i + 1
			if b[p-2] == '\r' { // p-2 >= start-1 >= 0: there is a start line before the first row
				crs++
			}
			if p == len(b) || (b[p] != ' ' && b[p] != '\t') {
				break
			}
		}
		if m.n == MaxRows {
			return firstOf(err, ErrTooManyRows)
		}
		r := &m.rows[m.n]
		if !scanRow(r, b, start, p) {
			err = firstOf(err, ErrHeader)
			continue
		}
		w, bit := r.ID>>6&1, uint64(1)<<(r.ID&63)
		if m.seen[w]&bit == 0 {
			m.seen[w] |= bit
			m.first[r.ID&(maxHeaderIDs-1)] = uint8(m.n)
		} else {
			dup[w] |= bit
		}
		m.n++
	}
	m.body = p

	if bytes.IndexByte(b[:p], 0) >= 0 || bytes.Count(b[:p], crByte) != crs {
		err = firstOf(err, ErrControl)
	}
	if dup[0]&singleRows[0]|dup[1]&singleRows[1] != 0 {
		err = firstOf(err, ErrDuplicate)
	}
	if e := m.mandatory(); e != nil {
		err = firstOf(err, e)
	}
	if r := m.row(ContentLength); r != nil {
		n, ok := ParseUint(b[r.ValStart:r.ValEnd])
		switch {
		case !ok:
			err = firstOf(err, ErrContentLength)
		case uint64(n) > uint64(len(b)-p):
			err = firstOf(err, ErrShortBody)
		default:
			m.b = b[: p+int(n) : p+int(n)]
		}
	}
	return err
}

var crByte = []byte{'\r'}

func firstOf(a, b *Error) *Error {
	if a != nil {
		return a
	}
	return b
}

// scanRow splits the row b[start:end] (RFC 3261 §25.1: field-name HCOLON field-value, white space before the colon
// allowed). It is shared with Frame. The row is written in place: returning it by value costs a fifth of a scan.
func scanRow(r *Row, b []byte, start, end int) bool {
	colon := indexColon(b, start, end)
	if colon < 0 {
		return false
	}
	ne := colon
	for ne > start && (b[ne-1] == ' ' || b[ne-1] == '\t') {
		ne--
	}
	id := lookup(b, start, ne-start)
	if id == Other && (ne == start || !all(b[start:ne], ccToken)) {
		return false
	}
	vs, ve := colon+1, end
	for vs < ve && isLWS(b[vs]) {
		vs++
	}
	for ve > vs && isLWS(b[ve-1]) {
		ve--
	}
	r.ID, r.Start, r.End, r.ValStart, r.ValEnd = id, uint32(start), uint32(end), uint32(vs), uint32(ve)
	return true
}

const version = "SIP/2.0"

// startLine reads b[:e], the start line without its line end.
func (m *Msg) startLine(e int) *Error {
	line := m.b[:e]
	if len(line) >= 4 && EqualFold(line[:4], version[:4]) { // '/' cannot stand in a method
		m.response = true
		return m.statusLine(line)
	}
	i := span(line, 0, ccToken)
	m.methodEnd = i
	m.method = ParseMethod(line[:i])
	if i == 0 || i+1 >= len(line) || line[i] != ' ' {
		return ErrStartLine
	}
	// RFC 3261 §7.1: exactly one SP between the elements and none at the end, so the last SP is where the version starts.
	j := len(line) - len(version) - 1
	if j <= i || line[j] != ' ' || !isVersion(line[j+1:]) {
		j = bytes.LastIndexByte(line, ' ')
		if j <= i {
			return ErrStartLine
		}
		m.uriStart, m.uriEnd = i+1, j
		if v := line[j+1:]; len(v) > 4 && EqualFold(v[:4], version[:4]) && classes[v[4]]&ccDigit != 0 {
			return ErrVersion
		}
		return ErrStartLine
	}
	m.uriStart, m.uriEnd = i+1, j
	uri := line[i+1 : j]
	if k := schemeEnd(uri); k <= 0 || k+1 == len(uri) || !all(uri[k+1:], ccURI) {
		return ErrRequestURI
	}
	return nil
}

func isVersion(b []byte) bool {
	return string(b) == version || EqualFold(b, version) // RFC 3261 §7.1: case-insensitive, sent in upper case
}

// schemeEnd returns the index of the colon after the scheme, or -1.
func schemeEnd(b []byte) int {
	for i, c := range b {
		switch {
		case c|0x20 >= 'a' && c|0x20 <= 'z':
		case c == ':':
			return i
		case i > 0 && (c >= '0' && c <= '9' || c == '+' || c == '-' || c == '.'):
		default:
			return -1
		}
	}
	return -1
}

func (m *Msg) statusLine(line []byte) *Error {
	i := bytes.IndexByte(line, ' ')
	if i < 0 {
		return ErrStartLine
	}
	if !isVersion(line[:i]) {
		return ErrVersion
	}
	s := line[i+1:]
	if len(s) < 3 || classes[s[0]]&classes[s[1]]&classes[s[2]]&ccDigit == 0 || (len(s) > 3 && s[3] != ' ') {
		return ErrStatusCode
	}
	m.phrase, m.phraseEnd = min(i+5, len(line)), len(line) // the SP before an empty phrase may be missing
	m.status = int(s[0]-'0')*100 + int(s[1]-'0')*10 + int(s[2]-'0')
	if m.status < 100 || m.status > 699 {
		return ErrStatusCode
	}
	return nil
}

// mandatory checks the header fields of RFC 3261 §8.1.1 that every message carries, and reads CSeq.
func (m *Msg) mandatory() *Error {
	switch {
	case len(m.Get(Via)) == 0:
		return ErrNoVia
	case len(m.Get(From)) == 0:
		return ErrNoFrom
	case len(m.Get(To)) == 0:
		return ErrNoTo
	case len(m.Get(CallID)) == 0:
		return ErrNoCallID
	}
	r := m.row(CSeq)
	if r == nil {
		return ErrNoCSeq
	}
	v := m.b[r.ValStart:r.ValEnd]
	i := span(v, 0, ccDigit)
	// RFC 3261 §8.1.1.5 keeps senders below 2^31; a receiver has no reason to refuse the other half.
	num, ok := ParseUint(v[:i])
	j := span(v, i, ccLWS)
	if !ok || j == i || j == len(v) || !all(v[j:], ccToken) {
		return ErrCSeq
	}
	m.cseq = num
	m.cseqStart, m.cseqEnd = int(r.ValStart)+j, int(r.ValEnd)
	if m.response {
		m.cseqMethod = ParseMethod(v[j:])
		return nil
	}
	if string(v[j:]) != string(m.b[:m.methodEnd]) {
		m.cseqMethod = ParseMethod(v[j:])
		return ErrCSeqMethod
	}
	m.cseqMethod = m.method
	return nil
}

// Bytes returns the message without what followed its body.
func (m *Msg) Bytes() []byte { return m.b }

// Body returns the body, empty if there is none.
func (m *Msg) Body() []byte { return m.b[m.body:] }

// BodyStart returns the offset of the body; after a truncated header it is the length of the message.
func (m *Msg) BodyStart() int { return m.body }

// HeadersStart returns the offset just behind the start line, where a first header row is inserted.
func (m *Msg) HeadersStart() int { return m.headers }

// IsRequest reports whether the message is a request, judged by its first bytes.
func (m *Msg) IsRequest() bool { return !m.response }

// Method returns the method of a request, MethodOther in responses.
func (m *Msg) Method() Method { return m.method }

// MethodToken returns the method of a request as written.
func (m *Msg) MethodToken() []byte { return m.b[:m.methodEnd] }

// RequestURI returns the Request-URI of a request.
func (m *Msg) RequestURI() []byte { return m.b[m.uriStart:m.uriEnd] }

// RequestURIPos returns the offsets of the Request-URI.
func (m *Msg) RequestURIPos() (start, end int) { return m.uriStart, m.uriEnd }

// Status returns the status code of a response, 0 in requests.
func (m *Msg) Status() int { return m.status }

// ReasonPhrase returns the reason phrase of a response, which may be empty.
func (m *Msg) ReasonPhrase() []byte { return m.b[m.phrase:m.phraseEnd] }

// CSeq returns the number and the method of CSeq.
func (m *Msg) CSeq() (num uint32, method []byte) { return m.cseq, m.b[m.cseqStart:m.cseqEnd] }

// CSeqMethod returns the method of CSeq: of a request its own, of a response that of the request it answers.
func (m *Msg) CSeqMethod() Method { return m.cseqMethod }

// Rows returns all header rows in order. The slice belongs to m and is valid until the next Scan.
func (m *Msg) Rows() []Row { return m.rows[:m.n] }

// row returns the first row of a header field, nil if there is none.
func (m *Msg) row(id HeaderID) *Row {
	id &= maxHeaderIDs - 1
	if m.seen[id>>6]&(1<<(id&63)) == 0 {
		return nil
	}
	return &m.rows[m.first[id]&(MaxRows-1)]
}

// rowsFrom returns the rows from the first one of a header field on, none if there is none.
func (m *Msg) rowsFrom(id HeaderID) []Row {
	if !m.Has(id) {
		return nil
	}
	return m.rows[m.first[id&(maxHeaderIDs-1)]:m.n]
}

// First returns the first row of a header field.
func (m *Msg) First(id HeaderID) (Row, bool) {
	if r := m.row(id); r != nil {
		return *r, true
	}
	return Row{}, false
}

// Last returns the last row of a header field.
func (m *Msg) Last(id HeaderID) (Row, bool) {
	rows := m.rowsFrom(id)
	for _, row := range slices.Backward(rows) {
		if row.ID == id {
			return row, true
		}
	}
	return Row{}, false
}

// Has reports whether a header field is present.
func (m *Msg) Has(id HeaderID) bool {
	id &= maxHeaderIDs - 1
	return m.seen[id>>6]&(1<<(id&63)) != 0
}

// Count returns the number of rows of a header field. A row can hold several values.
func (m *Msg) Count(id HeaderID) int {
	n := 0
	rows := m.rowsFrom(id)
	for i := range rows {
		if rows[i].ID == id {
			n++
		}
	}
	return n
}

// Value returns the value of a row without surrounding white space; it can contain folds.
func (m *Msg) Value(r Row) []byte { return m.b[r.ValStart:r.ValEnd] }

// Name returns the header field name of a row as written.
func (m *Msg) Name(r Row) []byte {
	return m.b[r.Start : int(r.Start)+span(m.b[r.Start:r.End], 0, ccToken)]
}

// Get returns the value of the first row of a header field, nil if there is none.
func (m *Msg) Get(id HeaderID) []byte {
	if r := m.row(id); r != nil {
		return m.b[r.ValStart:r.ValEnd]
	}
	return nil
}

// HeaderNamed returns the first row of a header field by name, in any case and long or compact; it is the way to the
// ones without a HeaderID.
func (m *Msg) HeaderNamed(name string) (Row, bool) {
	var buf [maxName]byte
	if len(name) <= maxName {
		if id := ParseHeaderID(buf[:copy(buf[:], name)]); id != Other {
			return m.First(id)
		}
	}
	for i := range m.rows[:m.n] {
		if r := m.rows[i]; r.ID == Other && EqualFold(m.Name(r), name) {
			return r, true
		}
	}
	return Row{}, false
}

// Offset returns the position in the message of a slice that was obtained from it, be it a value, an element of a
// list or a parameter. It reports false for any other slice.
func (m *Msg) Offset(sub []byte) (int, bool) { return offset(m.b, sub) }

// offset finds sub in b. Two-index slices keep the end of their capacity, so the difference of the capacities is the
// distance of the starts; comparing the addresses proves it.
func offset(b, sub []byte) (int, bool) {
	off := cap(b) - cap(sub)
	if len(sub) == 0 || off < 0 || off+len(sub) > len(b) || &b[off] != &sub[0] {
		return 0, false
	}
	return off, true
}
