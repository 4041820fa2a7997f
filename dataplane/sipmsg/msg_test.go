package sipmsg_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/gmgate/gmgate/dataplane/sipmsg"
	"github.com/gmgate/gmgate/dataplane/sipmsg/sipmsgtest"
)

// crlf turns the lines of a literal into SIP lines.
func crlf(s string) []byte { return []byte(strings.ReplaceAll(s, "\n", "\r\n")) }

// request is a minimal valid request whose lines a test changes.
const request = `OPTIONS sip:a@example.com SIP/2.0
Via: SIP/2.0/UDP 192.0.2.1:5060;branch=z9hG4bK1
From: <sip:b@example.com>;tag=1
To: <sip:a@example.com>
Call-ID: c1
CSeq: 7 OPTIONS
Max-Forwards: 70
Content-Length: 0

`

func scan(t *testing.T, b []byte) *sipmsg.Msg {
	t.Helper()
	var m sipmsg.Msg
	if err := m.Scan(b); err != nil {
		t.Fatalf("Scan: %v\n%s", err, b)
	}
	return &m
}

func TestScanGolden(t *testing.T) {
	for _, g := range sipmsgtest.All() {
		t.Run(g.Name, func(t *testing.T) {
			m := scan(t, g.Bytes)
			if !bytes.Equal(m.Bytes(), g.Bytes) {
				t.Errorf("Bytes differs from the input")
			}
			// The rows cover the header without gaps, and values are what is between colon and line end.
			at := m.HeadersStart()
			for _, r := range m.Rows() {
				if int(r.Start) != at {
					t.Fatalf("row %v starts at %d, want %d", r, r.Start, at)
				}
				at = int(r.End)
				line := string(g.Bytes[r.Start:r.End])
				name, value, _ := strings.Cut(strings.TrimSuffix(line, "\r\n"), ": ")
				if got := string(m.Name(r)); got != name {
					t.Errorf("Name = %q, want %q", got, name)
				}
				if got := string(m.Value(r)); got != value {
					t.Errorf("Value = %q, want %q", got, value)
				}
				if r.ID == sipmsg.Other || r.ID.String() != name {
					t.Errorf("ID of %q = %v", name, r.ID)
				}
			}
			if at+2 != m.BodyStart() {
				t.Errorf("rows end at %d, body starts at %d", at, m.BodyStart())
			}
		})
	}
}

func TestScanFields(t *testing.T) {
	m := scan(t, sipmsgtest.MOInvite())
	if !m.IsRequest() || m.Method() != sipmsg.MethodInvite || string(m.MethodToken()) != "INVITE" || m.Status() != 0 {
		t.Errorf("method = %v %q, status %d", m.Method(), m.MethodToken(), m.Status())
	}
	if got := string(m.RequestURI()); got != "tel:+15550100002" {
		t.Errorf("RequestURI = %q", got)
	}
	if s, e := m.RequestURIPos(); string(m.Bytes()[s:e]) != "tel:+15550100002" {
		t.Errorf("RequestURIPos = %d, %d", s, e)
	}
	if n, method := m.CSeq(); n != 1 || string(method) != "INVITE" || m.CSeqMethod() != sipmsg.MethodInvite {
		t.Errorf("CSeq = %d %q %v", n, method, m.CSeqMethod())
	}
	if got, want := len(m.Body()), 119; got != want {
		t.Errorf("body has %d bytes, want %d", got, want)
	}

	m = scan(t, sipmsgtest.SM5())
	if m.IsRequest() || m.Status() != 401 || string(m.ReasonPhrase()) != "Unauthorized" || m.Method() != sipmsg.MethodOther {
		t.Errorf("status = %d %q, method %v", m.Status(), m.ReasonPhrase(), m.Method())
	}
	if n, method := m.CSeq(); n != 1 || string(method) != "REGISTER" || m.CSeqMethod() != sipmsg.MethodRegister {
		t.Errorf("CSeq = %d %q %v", n, method, m.CSeqMethod())
	}
	if got := m.Count(sipmsg.Via); got != 2 {
		t.Errorf("Count(Via) = %d, want 2", got)
	}
	first, _ := m.First(sipmsg.Via)
	last, _ := m.Last(sipmsg.Via)
	if !bytes.Contains(m.Value(first), []byte("z9hG4bKp1")) || !bytes.Contains(m.Value(last), []byte("z9hG4bKsm1")) {
		t.Errorf("First = %q, Last = %q", m.Value(first), m.Value(last))
	}
	if got := string(m.Get(sipmsg.CallID)); got != "reg1@10.45.0.7" {
		t.Errorf("Get(Call-ID) = %q", got)
	}
	if m.Has(sipmsg.Route) || m.Count(sipmsg.Route) != 0 || m.Get(sipmsg.Route) != nil {
		t.Error("Route found in a message without one")
	}
	if _, ok := m.First(sipmsg.Route); ok {
		t.Error("First(Route) found one")
	}
	if _, ok := m.Last(sipmsg.Route); ok {
		t.Error("Last(Route) found one")
	}
	if _, ok := m.First(sipmsg.HeaderID(255)); ok {
		t.Error("First of an ID that does not exist found one")
	}
}

func TestHeaderIDs(t *testing.T) {
	seen := map[string]sipmsg.HeaderID{}
	for id := sipmsg.Other + 1; !strings.HasPrefix(id.String(), "HeaderID("); id++ {
		name := id.String()
		if name == "" {
			t.Fatalf("HeaderID %d has no name", id)
		}
		if old, dup := seen[name]; dup {
			t.Errorf("%q names %d and %d", name, old, id)
		}
		seen[name] = id
		for _, n := range []string{name, strings.ToUpper(name), strings.ToLower(name)} {
			if got := sipmsg.ParseHeaderID([]byte(n)); got != id {
				t.Errorf("ParseHeaderID(%q) = %v, want %v", n, got, id)
			}
		}
		// Any other letter, length or an aliasing byte is another name.
		for i := range name {
			b := []byte(strings.ToLower(name))
			b[i] = '_'
			if got := sipmsg.ParseHeaderID(b); got == id {
				t.Errorf("ParseHeaderID(%q) = %v", b, got)
			}
		}
		for _, n := range []string{name + "x", name[:len(name)-1], "x" + name, name + "\x00", name + " "} {
			if got := sipmsg.ParseHeaderID([]byte(n)); got == id && n != "T" {
				t.Errorf("ParseHeaderID(%q) = %v", n, got)
			}
		}
	}
	if len(seen) < 100 {
		t.Errorf("only %d header fields", len(seen))
	}
	if got := sipmsg.HeaderID(250).String(); got != "HeaderID(0xfa)" {
		t.Errorf("String of an unknown ID = %q", got)
	}
}

// TestCompactNames has the whole registry.
func TestCompactNames(t *testing.T) {
	want := map[byte]sipmsg.HeaderID{
		'a': sipmsg.AcceptContact, 'b': sipmsg.ReferredBy, 'c': sipmsg.ContentType, 'd': sipmsg.RequestDisposition,
		'e': sipmsg.ContentEncoding, 'f': sipmsg.From, 'i': sipmsg.CallID, 'j': sipmsg.RejectContact,
		'k': sipmsg.Supported, 'l': sipmsg.ContentLength, 'm': sipmsg.Contact, 'n': sipmsg.IdentityInfo,
		'o': sipmsg.Event, 'r': sipmsg.ReferTo, 's': sipmsg.Subject, 't': sipmsg.To, 'u': sipmsg.AllowEvents,
		'v': sipmsg.Via, 'x': sipmsg.SessionExpires, 'y': sipmsg.Identity,
	}
	for c := range 256 {
		low := byte(c)
		if c >= 'A' && c <= 'Z' {
			low |= 0x20
		}
		if got := sipmsg.ParseHeaderID([]byte{byte(c)}); got != want[low] {
			t.Errorf("%q = %v, want %v", byte(c), got, want[low])
		}
	}
}

func TestCompactMessage(t *testing.T) {
	m := scan(t, crlf("MESSAGE sip:a@b SIP/2.0\nv: SIP/2.0/UDP h;branch=z9hG4bK1\nF: <sip:x@y>;tag=1\nt: <sip:a@b>\n"+
		"i: 1\ncseq: 1 MESSAGE\nm: <sip:x@z>\nk: path\nl: 2\nc: text/plain\no: reg\nX-Foo: 1\nx-foo: 2\n\nhi"))
	for id, want := range map[sipmsg.HeaderID]string{
		sipmsg.Via: "SIP/2.0/UDP h;branch=z9hG4bK1", sipmsg.From: "<sip:x@y>;tag=1", sipmsg.To: "<sip:a@b>",
		sipmsg.CallID: "1", sipmsg.Contact: "<sip:x@z>", sipmsg.Supported: "path", sipmsg.ContentType: "text/plain",
		sipmsg.Event: "reg", sipmsg.ContentLength: "2",
	} {
		if got := string(m.Get(id)); got != want {
			t.Errorf("Get(%v) = %q, want %q", id, got, want)
		}
	}
	for name, want := range map[string]string{"X-FOO": "1", "Via": "SIP/2.0/UDP h;branch=z9hG4bK1", "V": "SIP/2.0/UDP h;branch=z9hG4bK1", "event": "reg"} {
		r, ok := m.HeaderNamed(name)
		if !ok || string(m.Value(r)) != want {
			t.Errorf("HeaderNamed(%q) = %q, %v", name, m.Value(r), ok)
		}
	}
	for _, name := range []string{"", "X-Fo", "Route", "X-Foo-" + strings.Repeat("x", 100)} {
		if r, ok := m.HeaderNamed(name); ok {
			t.Errorf("HeaderNamed(%q) = %q", name, m.Value(r))
		}
	}
}

func TestMethods(t *testing.T) {
	for m := sipmsg.MethodOther + 1; m < sipmsg.MethodCount; m++ {
		if got := sipmsg.ParseMethod([]byte(m.String())); got != m {
			t.Errorf("ParseMethod(%q) = %v", m.String(), got)
		}
		if got := sipmsg.ParseMethod([]byte(strings.ToLower(m.String()))); got != sipmsg.MethodOther {
			t.Errorf("lower case %v = %v: methods are case-sensitive", m, got)
		}
	}
	if got := sipmsg.Method(99).String(); got != "Method(0x63)" {
		t.Errorf("String of an unknown method = %q", got)
	}
}

func TestScanErrors(t *testing.T) {
	line := func(old, new string) string {
		if !strings.Contains(request, old) {
			t.Fatalf("request has no %q", old)
		}
		return strings.Replace(request, old, new, 1)
	}
	const start = "OPTIONS sip:a@example.com SIP/2.0"
	many := strings.Repeat("X: 1\n", sipmsg.MaxRows-7)
	tests := []struct {
		name string
		in   string // \n stands for CRLF
		want error
	}{
		{"valid", request, nil},
		{"empty", "", sipmsg.ErrTruncated},
		{"no line end", "OPTIONS", sipmsg.ErrTruncated},
		{"no end of header", strings.TrimSuffix(request, "\n"), sipmsg.ErrTruncated},
		{"empty line first", "\n" + request, sipmsg.ErrStartLine},
		{"no method", line(start, " sip:a@example.com SIP/2.0"), sipmsg.ErrStartLine},
		{"bad method", line(start, "OPT<IONS sip:a@example.com SIP/2.0"), sipmsg.ErrStartLine},
		{"two spaces", line(start, "OPTIONS  sip:a@example.com SIP/2.0"), sipmsg.ErrRequestURI},
		{"space at the end", line(start, start+" "), sipmsg.ErrStartLine},
		{"no version", line(start, "OPTIONS sip:a@example.com"), sipmsg.ErrStartLine},
		{"method only", line(start, "OPTIONS"), sipmsg.ErrStartLine},
		{"no URI", line(start, "OPTIONS SIP/2.0"), sipmsg.ErrStartLine},
		{"HTTP", line(start, "GET / HTTP/1.1"), sipmsg.ErrStartLine},
		{"version 7.0", line(start, "OPTIONS sip:a@example.com SIP/7.0"), sipmsg.ErrVersion},
		{"lower-case version", line(start, "OPTIONS sip:a@example.com sip/2.0"), nil},
		{"URI without scheme", line(start, "OPTIONS example.com SIP/2.0"), sipmsg.ErrRequestURI},
		{"URI with empty scheme", line(start, "OPTIONS :a SIP/2.0"), sipmsg.ErrRequestURI},
		{"URI of scheme only", line(start, "OPTIONS sip: SIP/2.0"), sipmsg.ErrRequestURI},
		{"URI in brackets", line(start, "OPTIONS <sip:a@b> SIP/2.0"), sipmsg.ErrRequestURI},
		{"URI with a space", line(start, "OPTIONS sip:a@b; lr SIP/2.0"), sipmsg.ErrRequestURI},
		{"URI with a control", line(start, "OPTIONS sip:a\x01b SIP/2.0"), sipmsg.ErrRequestURI},
		{"unknown scheme", line(start, "OPTIONS nobody.knows+it-1:x SIP/2.0"), nil},
		{"response", line(start, "SIP/2.0 200 OK"), nil},
		{"response without phrase", line(start, "SIP/2.0 200 "), nil},
		{"response without phrase and space", line(start, "SIP/2.0 200"), nil},
		{"response of version 3", line(start, "SIP/3.0 200 OK"), sipmsg.ErrVersion},
		{"response without code", line(start, "SIP/2.0"), sipmsg.ErrStartLine},
		{"response with short code", line(start, "SIP/2.0 20"), sipmsg.ErrStatusCode},
		{"response with long code", line(start, "SIP/2.0 2000 OK"), sipmsg.ErrStatusCode},
		{"response with letters", line(start, "SIP/2.0 2x0 OK"), sipmsg.ErrStatusCode},
		{"response 099", line(start, "SIP/2.0 099 OK"), sipmsg.ErrStatusCode},
		{"response 700", line(start, "SIP/2.0 700 OK"), sipmsg.ErrStatusCode},
		{"header without colon", line("Max-Forwards: 70", "Max-Forwards 70"), sipmsg.ErrHeader},
		{"header without name", line("Max-Forwards: 70", ": 70"), sipmsg.ErrHeader},
		{"header name with space", line("Max-Forwards: 70", "Max Forwards: 70"), sipmsg.ErrHeader},
		{"header name in brackets", line("Max-Forwards: 70", "<X>: 70"), sipmsg.ErrHeader},
		{"fold without header", line("Via:", " x: y\nVia:"), sipmsg.ErrHeader},
		{"space before colon", line("Max-Forwards: 70", "Max-Forwards \t : 70"), nil},
		{"NUL", line("Max-Forwards: 70", "X: a\x00b"), sipmsg.ErrControl},
		{"bare CR", line("Max-Forwards: 70", "X: a\rVia: b"), sipmsg.ErrControl},
		{"bare CR in a name", line("Max-Forwards: 70", "Max\rForwards: 70"), sipmsg.ErrControl},
		{"bare CR line", line("Max-Forwards: 70", "\rX: 1"), sipmsg.ErrHeader},
		{"no Via", line("Via", "X-Via"), sipmsg.ErrNoVia},
		{"no From", line("From", "X-From"), sipmsg.ErrNoFrom},
		{"no To", line("To", "X-To"), sipmsg.ErrNoTo},
		{"no Call-ID", line("Call-ID", "X-Call-ID"), sipmsg.ErrNoCallID},
		{"no CSeq", line("CSeq", "X-CSeq"), sipmsg.ErrNoCSeq},
		{"empty Via", line("Via: SIP/2.0/UDP 192.0.2.1:5060;branch=z9hG4bK1", "Via:"), sipmsg.ErrNoVia},
		{"empty Call-ID", line("Call-ID: c1", "Call-ID: "), sipmsg.ErrNoCallID},
		{"two From", line("To:", "f: <sip:x@y>\nTo:"), sipmsg.ErrDuplicate},
		{"two To", line("To:", "t: <sip:x@y>\nTo:"), sipmsg.ErrDuplicate},
		{"two Call-ID", line("To:", "i: c1\nTo:"), sipmsg.ErrDuplicate},
		{"two CSeq", line("To:", "CSeq: 7 OPTIONS\nTo:"), sipmsg.ErrDuplicate},
		{"two Max-Forwards", line("To:", "Max-Forwards: 70\nTo:"), sipmsg.ErrDuplicate},
		{"two equal Content-Length", line("To:", "l: 0\nTo:"), sipmsg.ErrDuplicate},
		{"two Via", line("To:", "Via: SIP/2.0/UDP h\nTo:"), nil},
		{"two Contact", line("To:", "Contact: *\nm: *\nTo:"), nil},
		{"CSeq without method", line("CSeq: 7 OPTIONS", "CSeq: 7"), sipmsg.ErrCSeq},
		{"CSeq without number", line("CSeq: 7 OPTIONS", "CSeq: OPTIONS"), sipmsg.ErrCSeq},
		{"CSeq without space", line("CSeq: 7 OPTIONS", "CSeq: 7OPTIONS"), sipmsg.ErrCSeq},
		{"CSeq with more", line("CSeq: 7 OPTIONS", "CSeq: 7 OPTIONS x"), sipmsg.ErrCSeq},
		{"CSeq negative", line("CSeq: 7 OPTIONS", "CSeq: -7 OPTIONS"), sipmsg.ErrCSeq},
		{"CSeq of 33 bits", line("CSeq: 7 OPTIONS", "CSeq: 4294967296 OPTIONS"), sipmsg.ErrCSeq},
		{"CSeq of 32 bits", line("CSeq: 7 OPTIONS", "CSeq: 4294967295 OPTIONS"), nil},
		{"CSeq of another method", line("CSeq: 7 OPTIONS", "CSeq: 7 INVITE"), sipmsg.ErrCSeqMethod},
		{"CSeq in another case", line("CSeq: 7 OPTIONS", "CSeq: 7 options"), sipmsg.ErrCSeqMethod},
		{"CSeq folded", line("CSeq: 7 OPTIONS", "CSeq: 7\n OPTIONS"), nil},
		{"Content-Length negative", line("Content-Length: 0", "Content-Length: -1"), sipmsg.ErrContentLength},
		{"Content-Length empty", line("Content-Length: 0", "Content-Length:"), sipmsg.ErrContentLength},
		{"Content-Length with text", line("Content-Length: 0", "Content-Length: 0 bytes"), sipmsg.ErrContentLength},
		{"Content-Length of 33 bits", line("Content-Length: 0", "Content-Length: 4294967296"), sipmsg.ErrContentLength},
		{"Content-Length of 65 bits", line("Content-Length: 0", "Content-Length: 18446744073709551616"), sipmsg.ErrContentLength},
		{"body too short", line("Content-Length: 0", "Content-Length: 1"), sipmsg.ErrShortBody},
		{"rows up to the limit", line("Max-Forwards", many+"Max-Forwards"), nil},
		{"rows beyond the limit", line("Max-Forwards", many+"X: 1\nMax-Forwards"), sipmsg.ErrTooManyRows},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var m sipmsg.Msg
			if err := m.Scan(crlf(tt.in)); !errors.Is(err, tt.want) {
				t.Errorf("Scan = %v, want %v", err, tt.want)
			}
		})
	}
}

// TestScanAfterError: what was found before and after a mistake is there, so that a 400 can be built.
func TestScanAfterError(t *testing.T) {
	for _, bad := range []string{
		strings.Replace(request, "CSeq: 7 OPTIONS", "CSeq: seven OPTIONS", 1),
		strings.Replace(request, "CSeq: 7", "Broken\nCSeq: 7", 1),
		strings.Replace(request, " sip:a@example.com SIP/2.0", "  sip:a@example.com  SIP/2.0", 1),
		strings.Replace(request, "SIP/2.0", "SIP/9.0", 1),
		strings.TrimSuffix(request, "\n"),
		strings.Replace(request, "Content-Length: 0", "Content-Length: 17", 1),
	} {
		var m sipmsg.Msg
		if m.Scan(crlf(bad)) == nil {
			t.Fatalf("no error from\n%s", bad)
		}
		if !m.IsRequest() || m.Method() != sipmsg.MethodOptions {
			t.Errorf("method = %v of\n%s", m.Method(), bad)
		}
		for _, id := range []sipmsg.HeaderID{sipmsg.Via, sipmsg.From, sipmsg.To, sipmsg.CallID, sipmsg.CSeq} {
			if len(m.Get(id)) == 0 {
				t.Errorf("%v is missing after an error in\n%s", id, bad)
			}
		}
	}
}

// TestScanReuse: nothing of a message is left after the next one.
func TestScanReuse(t *testing.T) {
	var m sipmsg.Msg
	if err := m.Scan(sipmsgtest.SM12()); err != nil {
		t.Fatal(err)
	}
	if m.Scan([]byte("x")) == nil {
		t.Fatal("garbage accepted")
	}
	if len(m.Rows()) != 0 || m.Status() != 0 || m.Has(sipmsg.Via) || len(m.RequestURI()) != 0 || len(m.ReasonPhrase()) != 0 {
		t.Error("something is left of the message before")
	}
	if n, method := m.CSeq(); n != 0 || len(method) != 0 {
		t.Errorf("CSeq = %d %q is left", n, method)
	}
}

func TestScanTruncated(t *testing.T) {
	for _, g := range sipmsgtest.All() {
		for n := range len(g.Bytes) {
			var m sipmsg.Msg
			// The capacity is cut as well, so that reading behind the end panics.
			if err := m.Scan(g.Bytes[:n:n]); err == nil {
				t.Fatalf("%s: the first %d of %d bytes are accepted", g.Name, n, len(g.Bytes))
			}
			checkIndex(t, &m)
		}
	}
}

// checkIndex reads everything there is.
func checkIndex(t *testing.T, m *sipmsg.Msg) {
	t.Helper()
	b := m.Bytes()
	end := uint32(m.HeadersStart())
	for i, r := range m.Rows() {
		if r.Start < end || r.ValStart < r.Start || r.ValEnd < r.ValStart || r.End < r.ValEnd || int(r.End) > len(b) {
			t.Fatalf("row %d is out of order: %+v after %d of %d", i, r, end, len(b))
		}
		end = r.End
		if v := m.Value(r); len(v) > 0 && !bytes.Equal(v, bytes.Trim(v, " \t\r\n")) {
			t.Fatalf("value %q is not trimmed", v)
		}
		if m.Count(r.ID) < 1 || len(m.Name(r)) == 0 {
			t.Fatalf("row %d: Count = %d, Name = %q", i, m.Count(r.ID), m.Name(r))
		}
		if first, ok := m.First(r.ID); !ok || first.Start > r.Start {
			t.Fatalf("First(%v) = %+v, %v", r.ID, first, ok)
		}
		if last, ok := m.Last(r.ID); !ok || last.Start < r.Start {
			t.Fatalf("Last(%v) = %+v, %v", r.ID, last, ok)
		}
	}
	if m.BodyStart() < m.HeadersStart() || m.BodyStart() > len(b) {
		t.Fatalf("body at %d, header at %d of %d", m.BodyStart(), m.HeadersStart(), len(b))
	}
	if s, e := m.RequestURIPos(); s > e || e > len(b) {
		t.Fatalf("Request-URI at %d to %d", s, e)
	}
	_ = fmt.Sprintf("%q%q%q%q", m.MethodToken(), m.RequestURI(), m.ReasonPhrase(), m.Body())
}

func TestScanDatagramTail(t *testing.T) {
	in := append(sipmsgtest.MOMessage(), "garbage behind the body"...)
	m := scan(t, in)
	if got := string(m.Body()); got != "hello" {
		t.Errorf("body = %q", got)
	}
	if !bytes.Equal(m.Bytes(), sipmsgtest.MOMessage()) {
		t.Error("Bytes has the tail")
	}
	// What is appended to Bytes must not overwrite the tail, which can be the next message.
	_ = append(m.Bytes(), "OVERWRITE"...)
	if !bytes.HasSuffix(in, []byte("garbage behind the body")) {
		t.Error("append to Bytes wrote into the buffer")
	}
}

func TestScanBareLF(t *testing.T) {
	m := scan(t, []byte(strings.Replace(request, "Call-ID: c1", "Call-ID:\n c1", 1)))
	if got := string(m.Get(sipmsg.CallID)); got != "c1" {
		t.Errorf("Call-ID = %q", got)
	}
	if len(m.Rows()) != 7 || m.BodyStart() != len(m.Bytes()) {
		t.Errorf("%d rows, body at %d", len(m.Rows()), m.BodyStart())
	}
}

func TestOffset(t *testing.T) {
	m := scan(t, sipmsgtest.MOMessage())
	row, _ := m.First(sipmsg.Route)
	elem, rest := sipmsg.Element(m.Value(row))
	if off, ok := m.Offset(elem); !ok || off != int(row.ValStart) {
		t.Errorf("Offset(first) = %d, %v", off, ok)
	}
	a, err := sipmsg.ParseNameAddr(rest)
	if err != nil {
		t.Fatal(err)
	}
	if off, ok := m.Offset(a.URI); !ok || !bytes.HasPrefix(m.Bytes()[off:], []byte(sipmsgtest.RouteURI)) {
		t.Errorf("Offset(URI) = %d, %v", off, ok)
	}
	for _, foreign := range [][]byte{nil, {}, []byte("Route"), bytes.Clone(m.Bytes()), bytes.Clone(m.Bytes())[5:9]} {
		if off, ok := m.Offset(foreign); ok {
			t.Errorf("Offset of a foreign slice = %d", off)
		}
	}
}

func TestBenchmarkSizes(t *testing.T) {
	if n := len(sipmsgtest.Register941()); n != 941 {
		t.Errorf("Register941 has %d bytes", n)
	}
	if n := len(sipmsgtest.Update709()); n != 709 {
		t.Errorf("Update709 has %d bytes", n)
	}
}
