package sipwire

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Header is one header row. Name is kept as received, except that compact forms are expanded; Value is trimmed and
// unfolded.
type Header struct{ Name, Value string }

// Message is a SIP request (Method set) or response (Status set).
type Message struct {
	Method  string
	URI     string
	Status  int
	Reason  string
	Headers []Header
	Body    []byte
}

// ErrMalformed is wrapped by every error of Parse.
var ErrMalformed = errors.New("malformed SIP message")

// compact expands the compact header forms of RFC 3261 §7.3.3 and later registrations.
var compact = map[byte]string{
	'a': "Accept-Contact", 'b': "Referred-By", 'c': "Content-Type", 'd': "Request-Disposition", 'e': "Content-Encoding",
	'f': "From", 'i': "Call-ID", 'j': "Reject-Contact", 'k': "Supported", 'l': "Content-Length", 'm': "Contact",
	'n': "Identity-Info", 'o': "Event", 'r': "Refer-To", 's': "Subject", 't': "To", 'u': "Allow-Events", 'v': "Via",
	'x': "Session-Expires", 'y': "Identity",
}

// maxHeaders bounds the rows of one message.
const maxHeaders = 256

// Parse reads one complete message: a whole datagram, or what ReadMessage returned. Content-Length, when present,
// must equal the length of the body.
func Parse(b []byte) (*Message, error) {
	head, body, ok := bytes.Cut(b, []byte("\r\n\r\n"))
	if !ok {
		return nil, fmt.Errorf("%w: no end of headers", ErrMalformed)
	}
	if bytes.IndexByte(head, 0) >= 0 {
		return nil, fmt.Errorf("%w: NUL in the header part", ErrMalformed)
	}
	lines := strings.Split(string(head), "\r\n")
	m := &Message{Headers: make([]Header, 0, len(lines)-1)}
	if err := m.parseStart(lines[0]); err != nil {
		return nil, err
	}
	for _, line := range lines[1:] {
		if err := m.parseRow(line); err != nil {
			return nil, err
		}
	}
	if len(m.Headers) > maxHeaders {
		return nil, fmt.Errorf("%w: %d header rows", ErrMalformed, len(m.Headers))
	}
	if len(body) > 0 {
		m.Body = bytes.Clone(body)
	}
	return m, m.check()
}

func (m *Message) parseStart(line string) error {
	if rest, ok := strings.CutPrefix(line, "SIP/2.0 "); ok {
		code, reason, _ := strings.Cut(rest, " ")
		n, err := strconv.Atoi(code)
		if err != nil || len(code) != 3 || n < 100 || n > 699 {
			return fmt.Errorf("%w: status line %q", ErrMalformed, line)
		}
		m.Status, m.Reason = n, reason
		return nil
	}
	f := strings.Split(line, " ")
	if len(f) != 3 || f[0] == "" || f[1] == "" || f[2] != "SIP/2.0" || !isToken(f[0]) {
		return fmt.Errorf("%w: start line %q", ErrMalformed, line)
	}
	m.Method, m.URI = f[0], f[1]
	return nil
}

func (m *Message) parseRow(line string) error {
	if strings.ContainsAny(line, "\r\n") {
		return fmt.Errorf("%w: bare CR or LF in %q", ErrMalformed, line)
	}
	if line != "" && (line[0] == ' ' || line[0] == '\t') { // folded continuation, RFC 3261 §7.3.1
		if len(m.Headers) == 0 {
			return fmt.Errorf("%w: continuation before the first header", ErrMalformed)
		}
		h := &m.Headers[len(m.Headers)-1]
		h.Value = strings.TrimSpace(h.Value + " " + strings.TrimSpace(line))
		return nil
	}
	name, value, ok := strings.Cut(line, ":")
	name = strings.TrimRight(name, " \t")
	if !ok || !isToken(name) {
		return fmt.Errorf("%w: header row %q", ErrMalformed, line)
	}
	if len(name) == 1 {
		if long, ok := compact[name[0]|0x20]; ok {
			name = long
		}
	}
	m.Headers = append(m.Headers, Header{Name: name, Value: strings.TrimSpace(value)})
	return nil
}

// check enforces what RFC 3261 §8.1.1 and §20.14 demand of every message.
func (m *Message) check() error {
	for _, name := range []string{"From", "To", "Call-ID", "CSeq"} {
		if n := len(m.All(name)); n != 1 {
			return fmt.Errorf("%w: %d rows of %s", ErrMalformed, n, name)
		}
	}
	if len(m.All("Via")) == 0 {
		return fmt.Errorf("%w: no Via", ErrMalformed)
	}
	if _, method, err := m.CSeq(); err != nil {
		return err
	} else if m.IsRequest() && method != m.Method {
		return fmt.Errorf("%w: CSeq names %s, the request is %s", ErrMalformed, method, m.Method)
	}
	rows := m.All("Content-Length")
	if len(rows) > 1 {
		return fmt.Errorf("%w: %d rows of Content-Length", ErrMalformed, len(rows))
	}
	if len(rows) == 1 {
		n, err := strconv.ParseUint(rows[0], 10, 31)
		if err != nil || int(n) != len(m.Body) {
			return fmt.Errorf("%w: Content-Length %q with a body of %d", ErrMalformed, rows[0], len(m.Body))
		}
	}
	return nil
}

// Bytes prints the message. Content-Length is always the last header row and always right.
func (m *Message) Bytes() []byte {
	n := len(m.Method) + len(m.URI) + len(m.Reason) + 48 + len(m.Body)
	for _, h := range m.Headers {
		n += len(h.Name) + len(h.Value) + 4
	}
	b := make([]byte, 0, n)
	if m.IsRequest() {
		b = append(append(append(append(b, m.Method...), ' '), m.URI...), " SIP/2.0\r\n"...)
	} else {
		b = strconv.AppendInt(append(b, "SIP/2.0 "...), int64(m.Status), 10)
		b = append(append(append(b, ' '), m.Reason...), '\r', '\n')
	}
	for _, h := range m.Headers {
		if strings.EqualFold(h.Name, "Content-Length") {
			continue
		}
		b = append(append(append(append(b, h.Name...), ": "...), h.Value...), '\r', '\n')
	}
	b = strconv.AppendInt(append(b, "Content-Length: "...), int64(len(m.Body)), 10)
	return append(append(b, "\r\n\r\n"...), m.Body...)
}

// IsRequest reports whether the message is a request.
func (m *Message) IsRequest() bool { return m.Method != "" }

// Clone returns a copy which shares nothing that is ever changed in place.
func (m *Message) Clone() *Message {
	c := *m
	c.Headers = append([]Header(nil), m.Headers...)
	return &c
}

// Get returns the value of the first row of a header, or "".
func (m *Message) Get(name string) string {
	for _, h := range m.Headers {
		if strings.EqualFold(h.Name, name) {
			return h.Value
		}
	}
	return ""
}

// Has reports whether the header is present at all.
func (m *Message) Has(name string) bool {
	for _, h := range m.Headers {
		if strings.EqualFold(h.Name, name) {
			return true
		}
	}
	return false
}

// All returns the values of all rows of a header in order.
func (m *Message) All(name string) []string {
	var out []string
	for _, h := range m.Headers {
		if strings.EqualFold(h.Name, name) {
			out = append(out, h.Value)
		}
	}
	return out
}

// List returns the comma-separated elements of all rows of a header in order.
func (m *Message) List(name string) []string {
	var out []string
	for _, row := range m.All(name) {
		out = append(out, SplitList(row)...)
	}
	return out
}

// HasToken reports whether a header of comma-separated tokens holds one, case-insensitively.
func (m *Message) HasToken(name, token string) bool {
	for _, e := range m.List(name) {
		if strings.EqualFold(e, token) {
			return true
		}
	}
	return false
}

// Add appends a row.
func (m *Message) Add(name, value string) { m.Headers = append(m.Headers, Header{name, value}) }

// Push puts a row in front of all others.
func (m *Message) Push(name, value string) {
	m.Headers = append([]Header{{name, value}}, m.Headers...)
}

// Del removes every row of a header.
func (m *Message) Del(name string) {
	out := m.Headers[:0:0]
	for _, h := range m.Headers {
		if !strings.EqualFold(h.Name, name) {
			out = append(out, h)
		}
	}
	m.Headers = out
}

// Set replaces the first row of a header in place and removes the others, or appends a row.
func (m *Message) Set(name, value string) {
	out := make([]Header, 0, len(m.Headers)+1)
	done := false
	for _, h := range m.Headers {
		if strings.EqualFold(h.Name, name) {
			if done {
				continue
			}
			h.Value, done = value, true
		}
		out = append(out, h)
	}
	if !done {
		out = append(out, Header{name, value})
	}
	m.Headers = out
}

// Pop removes the first element of a list header and returns it; an emptied row disappears.
func (m *Message) Pop(name string) (string, bool) {
	for i, h := range m.Headers {
		if !strings.EqualFold(h.Name, name) {
			continue
		}
		elems := SplitList(h.Value)
		rows := append([]Header(nil), m.Headers[:i]...)
		if len(elems) > 1 {
			rows = append(rows, Header{h.Name, strings.Join(elems[1:], ", ")})
		}
		m.Headers = append(rows, m.Headers[i+1:]...)
		if len(elems) == 0 {
			return "", false
		}
		return elems[0], true
	}
	return "", false
}

// CSeq returns the sequence number and method.
func (m *Message) CSeq() (uint32, string, error) {
	f := strings.Fields(m.Get("CSeq"))
	if len(f) != 2 {
		return 0, "", fmt.Errorf("%w: CSeq %q", ErrMalformed, m.Get("CSeq"))
	}
	n, err := strconv.ParseUint(f[0], 10, 32)
	if err != nil || !isToken(f[1]) {
		return 0, "", fmt.Errorf("%w: CSeq %q", ErrMalformed, m.Get("CSeq"))
	}
	return uint32(n), f[1], nil
}

// CSeqMethod returns the method of the CSeq, "" if it cannot be read.
func (m *Message) CSeqMethod() string {
	_, method, _ := m.CSeq()
	return method
}

// TopVia returns the first Via element.
func (m *Message) TopVia() (Via, error) {
	rows := m.List("Via")
	if len(rows) == 0 {
		return Via{}, fmt.Errorf("%w: no Via", ErrMalformed)
	}
	return ParseVia(rows[0])
}

// Tag returns the tag of From or To.
func (m *Message) Tag(name string) string {
	a, err := ParseAddr(m.Get(name))
	if err != nil {
		return ""
	}
	return a.Params.Get("tag")
}

// Response builds an answer to a request with the headers that RFC 3261 §8.2.6 copies. toTag is added to To when the
// request has none and status is above 100.
func Response(req *Message, status int, toTag string) *Message {
	r := &Message{Status: status, Reason: Reason(status)}
	for _, v := range req.All("Via") {
		r.Add("Via", v)
	}
	r.Add("From", req.Get("From"))
	to := req.Get("To")
	if status > 100 && toTag != "" && req.Tag("To") == "" {
		to += ";tag=" + toTag
	}
	r.Add("To", to)
	r.Add("Call-ID", req.Get("Call-ID"))
	r.Add("CSeq", req.Get("CSeq"))
	return r
}

var reasons = map[int]string{
	100: "Trying", 180: "Ringing", 183: "Session Progress", 200: "OK", 202: "Accepted", 400: "Bad Request",
	401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout",
	420: "Bad Extension", 421: "Extension Required", 423: "Interval Too Brief", 430: "Flow Failed",
	480: "Temporarily Unavailable", 481: "Call/Transaction Does Not Exist", 482: "Loop Detected", 483: "Too Many Hops",
	486: "Busy Here", 487: "Request Terminated", 488: "Not Acceptable Here", 489: "Bad Event",
	494: "Security Agreement Required", 500: "Server Internal Error", 501: "Not Implemented", 503: "Service Unavailable",
	504: "Server Time-out", 603: "Decline",
}

// Reason returns the usual reason phrase of a status.
func Reason(status int) string {
	if r, ok := reasons[status]; ok {
		return r
	}
	return "Status " + strconv.Itoa(status)
}

func isToken(s string) bool {
	if s == "" {
		return false
	}
	for i := range len(s) {
		c := s[i]
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case strings.IndexByte("-.!%*_+`'~", c) >= 0:
		default:
			return false
		}
	}
	return true
}
