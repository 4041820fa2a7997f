package sipmsg_test

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/emiago/sipgo/sip"

	"github.com/gmgate/gmgate/dataplane/sipmsg"
	"github.com/gmgate/gmgate/dataplane/sipmsg/sipmsgtest"
)

func seedMessages(f *testing.F) {
	for _, g := range sipmsgtest.All() {
		f.Add(g.Bytes)
	}
	for _, x := range tortures {
		f.Add(x.bytes())
	}
	f.Add(crlf(request))
}

// vias returns all via-parms; ok is false when one is malformed.
func vias(m *sipmsg.Msg) (out []sipmsg.ViaParm, ok bool) {
	for _, r := range m.Rows() {
		if r.ID != sipmsg.Via {
			continue
		}
		v := m.Value(r)
		for {
			p, err := sipmsg.ParseVia(v)
			if err != nil {
				return nil, false
			}
			out = append(out, p)
			if p.Len == len(v) {
				break
			}
			v = v[p.Len+1:]
		}
	}
	return out, true
}

// FuzzScanAgainstSipgo: what we and sipgo both accept, both understand in the same way.
func FuzzScanAgainstSipgo(f *testing.F) {
	seedMessages(f)
	parser := sip.NewParser()
	f.Fuzz(func(t *testing.T, b []byte) {
		var m sipmsg.Msg
		err := m.Scan(b)
		checkIndex(t, &m)
		if err != nil {
			return
		}
		if reason := incomparable(&m); reason != "" {
			t.Skip(reason)
		}
		msg, err := parser.ParseSIP(b)
		if err != nil || msg == nil {
			return
		}
		switch msg := msg.(type) {
		case *sip.Request:
			if !m.IsRequest() {
				t.Fatal("sipgo reads a request")
			}
			// sipgo turns methods into upper case.
			if got := strings.ToUpper(string(m.MethodToken())); got != string(msg.Method) {
				t.Errorf("method = %q, sipgo %q", got, msg.Method)
			}
			if u, err := sipmsg.ParseURI(m.RequestURI()); err == nil && u.IsSIP() {
				r := msg.Recipient
				if strings.Trim(r.Host, "[]") != string(u.Host) || r.Port != int(u.Port) || r.User != string(u.User) {
					t.Errorf("Request-URI = %q at %q:%d, sipgo %q at %q:%d", u.User, u.Host, u.Port, r.User, r.Host, r.Port)
				}
			}
		case *sip.Response:
			if m.IsRequest() || msg.StatusCode != m.Status() || msg.Reason != string(m.ReasonPhrase()) {
				t.Errorf("status = %d %q, sipgo %d %q", m.Status(), m.ReasonPhrase(), msg.StatusCode, msg.Reason)
			}
		}
		if got, want := string(m.Get(sipmsg.CallID)), msg.CallID(); want != nil && unfold(got) != want.Value() {
			t.Errorf("Call-ID = %q, sipgo %q", got, want.Value())
		}
		if n, method := m.CSeq(); msg.CSeq() != nil && (msg.CSeq().SeqNo != n || !strings.EqualFold(string(msg.CSeq().MethodName), string(method))) {
			t.Errorf("CSeq = %d %q, sipgo %d %q", n, method, msg.CSeq().SeqNo, msg.CSeq().MethodName)
		}
		if !bytes.Equal(m.Body(), msg.Body()) {
			t.Errorf("body = %q, sipgo %q", m.Body(), msg.Body())
		}
		ours, ok := vias(&m)
		if !ok {
			return
		}
		if n := len(msg.GetHeaders("Via")); n != len(ours) {
			t.Errorf("%d Via, sipgo %d", len(ours), n)
		}
		via := msg.Via()
		if via == nil {
			t.Fatal("sipgo found no Via")
		}
		p := ours[0]
		branch, _ := via.Params.Get("branch")
		if via.Host != string(p.Host) || via.Port != int(p.Port) || branch != string(p.Branch) {
			t.Errorf("Via = %q:%d;%q, sipgo %q:%d;%q", p.Host, p.Port, p.Branch, via.Host, via.Port, branch)
		}
	})
}

// unfold is what sipgo makes of a fold.
func unfold(s string) string {
	lines := strings.Split(s, "\r\n")
	for i := range lines {
		lines[i] = strings.Trim(lines[i], " \t")
	}
	return strings.Join(lines, " ")
}

// incomparable names what sipgo is known to read in its own way, so that a comparison says nothing.
func incomparable(m *sipmsg.Msg) string {
	head := m.Bytes()[:m.BodyStart()]
	if bytes.Count(head, []byte("\n")) != bytes.Count(head, []byte("\r\n")) {
		return "sipgo knows no bare LF"
	}
	for _, c := range head {
		if c >= 0x80 || (c < ' ' && c != '\r' && c != '\n') {
			return "sipgo trims control characters and Unicode spaces"
		}
	}
	for _, r := range m.Rows() {
		switch r.ID {
		case sipmsg.Via:
			for _, c := range m.Value(r) {
				switch c {
				case '"':
					return "sipgo cuts Via at commas and semicolons inside quoted strings"
				case '\n':
					return "sipgo joins the folds of Via before it looks for the transport"
				}
			}
		case sipmsg.ContentLength, sipmsg.CallID:
			if bytes.Contains(m.Bytes()[r.Start:r.ValStart], []byte("\n")) {
				return "sipgo keeps the space of a fold before a value"
			}
		}
	}
	return ""
}

// FuzzFrame: the frames of a stream do not depend on where it is cut, and Scan agrees with Frame on the length.
func FuzzFrame(f *testing.F) {
	for _, g := range sipmsgtest.All() {
		f.Add(append([]byte("\r\n\r\n"), g.Bytes...), uint16(7), uint16(300))
	}
	for _, x := range tortures {
		f.Add(x.bytes(), uint16(100), uint16(5))
	}
	f.Fuzz(func(t *testing.T, b []byte, x, y uint16) {
		const limit = 2048
		want := frames(t, limit, b)
		i, j := int(x)%(len(b)+1), int(y)%(len(b)+1)
		i, j = min(i, j), max(i, j)
		if got := frames(t, limit, b[:i], b[i:j], b[j:]); !slices.Equal(got, want) {
			t.Fatalf("cut at %d and %d:\n%q\nwant\n%q", i, j, got, want)
		}
		if kind, n, _ := sipmsg.Frame(b, limit); kind == sipmsg.FrameMessage {
			var m sipmsg.Msg
			err := m.Scan(b[:n:n])
			if err == nil && len(m.Bytes()) != n {
				t.Fatalf("Frame says %d bytes, Scan %d", n, len(m.Bytes()))
			}
			for _, e := range []error{sipmsg.ErrTruncated, sipmsg.ErrShortBody, sipmsg.ErrContentLength} {
				if errors.Is(err, e) {
					t.Fatalf("Frame accepts what Scan finds %v", err)
				}
			}
			checkIndex(t, &m)
		}
		if kind, msg := sipmsg.Datagram(b); kind == sipmsg.FrameMessage && len(msg) == 0 {
			t.Fatal("empty message in a datagram")
		}
	})
}

// FuzzEdit: the result of edits that leave the mandatory header fields alone scans again and has what it should have.
func FuzzEdit(f *testing.F) {
	for i, g := range sipmsgtest.All() {
		f.Add(g.Bytes, []byte{byte(i), 1, 2, 3, 4, 5, 6, 7, 8, 9})
	}
	for _, x := range tortures {
		f.Add(x.bytes(), []byte{3, 3, 2, 0, 2, 2, 4, 9})
	}
	mandatory := []sipmsg.HeaderID{sipmsg.Via, sipmsg.From, sipmsg.To, sipmsg.CallID, sipmsg.CSeq, sipmsg.ContentLength}
	lists := []sipmsg.HeaderID{sipmsg.Route, sipmsg.Supported, sipmsg.Require, sipmsg.Contact, sipmsg.SecurityClient, sipmsg.PAssociatedURI}
	f.Fuzz(func(t *testing.T, b, ops []byte) {
		var m, again sipmsg.Msg
		if m.Scan(b) != nil || len(m.Rows()) > sipmsg.MaxRows-20 {
			return
		}
		var e sipmsg.Edit
		e.Reset(&m)
		inserted := 0
		want := map[sipmsg.HeaderID][]string{} // elements that stay
		for _, id := range lists {
			want[id] = listElements(&m, id)
		}
		for i := 0; i+1 < len(ops) && i < 20; i += 2 {
			r := m.Rows()[int(ops[i+1])%len(m.Rows())]
			id := lists[int(ops[i+1])%len(lists)]
			switch ops[i] % 5 {
			case 0:
				e.Insert(m.HeadersStart(), "X-Fuzz: 1\r\n")
				inserted++
			case 1:
				e.Open(m.BodyStart()-blank(&m), m.BodyStart()-blank(&m)).Str("X-Fuzz: ").Uint(uint64(ops[i+1])).Str("\r\n").Close()
				inserted++
			case 2:
				if !slices.Contains(mandatory, r.ID) && want[r.ID] == nil {
					e.DeleteRow(r)
				}
			case 3:
				if e.PopElement(&m, id) != (len(want[id]) > 0) {
					t.Fatalf("PopElement(%v) disagrees about %q", id, want[id])
				}
				if len(want[id]) > 0 {
					want[id] = want[id][1:]
				}
			case 4:
				if len(want[id]) == 0 {
					continue
				}
				token := want[id][int(ops[i])%len(want[id])]
				e.RemoveTokens(&m, id, token)
				want[id] = slices.DeleteFunc(want[id], func(s string) bool { return sipmsg.EqualFold([]byte(s), token) })
			}
		}
		out, err := e.Append(nil)
		if errors.Is(err, sipmsg.ErrEditTooMany) {
			return
		}
		if err != nil {
			t.Fatalf("Append: %v", err)
		}
		if err := again.Scan(out); err != nil {
			t.Fatalf("%v after the edit of\n%q\ninto\n%q", err, b, out)
		}
		if !bytes.Equal(again.Body(), m.Body()) {
			t.Fatalf("body became %q", again.Body())
		}
		for _, id := range lists {
			if got := listElements(&again, id); !slices.Equal(got, want[id]) {
				t.Fatalf("%v = %q, want %q", id, got, want[id])
			}
		}
		for _, id := range mandatory {
			if !bytes.Equal(again.Get(id), m.Get(id)) {
				t.Fatalf("%v = %q, was %q", id, again.Get(id), m.Get(id))
			}
		}
		n := 0
		for _, r := range again.Rows() {
			if r.ID == sipmsg.Other && string(again.Name(r)) == "X-Fuzz" {
				n++
			}
		}
		for _, r := range m.Rows() {
			if r.ID == sipmsg.Other && string(m.Name(r)) == "X-Fuzz" {
				return // its own ones may have been deleted
			}
		}
		if n != inserted {
			t.Fatalf("%d rows inserted, %d found", inserted, n)
		}
	})
}

// blank is the length of the line that ends the header.
func blank(m *sipmsg.Msg) int {
	if b := m.Bytes(); m.BodyStart() >= 2 && b[m.BodyStart()-2] == '\r' {
		return 2
	}
	return 1
}

func listElements(m *sipmsg.Msg, id sipmsg.HeaderID) (out []string) {
	for _, r := range m.Rows() {
		if r.ID == id {
			out = append(out, elements(m.Value(r))...)
		}
	}
	return out
}

func FuzzVia(f *testing.F) {
	f.Add([]byte("SIP/2.0/UDP 10.45.0.7:5060;branch=z9hG4bKsm1;rport"))
	f.Add([]byte("SIP  / 2.0\r\n / TCP  [2001:db8::1]:5060 ; received=[::1] ;keep ;rport = 5, SIP/2.0/UDP h"))
	f.Add([]byte("SIP/2.0/UDP h;x=\"a,;\\\"b\";;maddr=1.2.3.4;branch=b,"))
	f.Fuzz(func(t *testing.T, v []byte) {
		p, err := sipmsg.ParseVia(v)
		if p.Len < 0 || p.Len > len(v) {
			t.Fatalf("Len = %d of %d", p.Len, len(v))
		}
		for _, s := range []sipmsg.Span{p.RPortAt, p.ReceivedAt, p.KeepAt} {
			if s.Semi < 0 || s.Start < s.Semi || s.End < s.Start || s.End > len(v) {
				t.Fatalf("span %+v of %d", s, len(v))
			}
		}
		if err != nil {
			return
		}
		if p.Len < len(v) && v[p.Len] != ',' {
			t.Fatalf("ends at %q", v[p.Len])
		}
		if len(p.Host) == 0 || len(p.Transport) == 0 || p.HostStart >= p.HostEnd || p.HostEnd > p.ParamsAt || p.ParamsAt > p.Len {
			t.Fatalf("%+v", p)
		}
		// Element cuts where ParseVia does.
		if elem, _ := sipmsg.Element(v); !bytes.Equal(elem, bytes.Trim(v[:p.Len], " \t\r\n")) {
			t.Fatalf("Element = %q, ParseVia %q", elem, v[:p.Len])
		}
		if !p.HasRPort {
			return
		}
		w := bytes.Join([][]byte{v[:p.RPortAt.Start], v[p.RPortAt.End:p.Len]}, []byte("rport=4711"))
		q, err := sipmsg.ParseVia(w)
		if err != nil || q.RPort != 4711 || !bytes.Equal(q.Branch, p.Branch) || !bytes.Equal(q.Host, p.Host) {
			t.Fatalf("with rport %q: %+v, %v", w, q, err)
		}
		w = append(slices.Clone(v[:p.RPortAt.Semi]), v[p.RPortAt.End:p.Len]...)
		if q, err = sipmsg.ParseVia(w); err != nil || q.HasRPort || !bytes.Equal(q.Branch, p.Branch) {
			t.Fatalf("without rport %q: %+v, %v", w, q, err)
		}
	})
}

func FuzzURI(f *testing.F) {
	for _, s := range []string{"sip:a:p@b:5060;lr?x=y", "sips:[2001:db8::1]:5061", "tel:+1;phone-context=x", "urn:service:sos", "sip:a;b@c"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		u, err := sipmsg.ParseURI(b)
		if err != nil {
			return
		}
		// Put together again it is the same but for leading zeros of the port.
		s := string(u.Scheme) + ":"
		switch {
		case u.IsTel():
			s += string(u.User)
			if u.Params != nil {
				s += ";" + string(u.Params)
			}
		case u.IsSIP():
			if u.User != nil {
				s += string(u.User)
				if u.Password != nil {
					s += ":" + string(u.Password)
				}
				s += "@"
			}
			if u.IPv6 {
				s += "[" + string(u.Host) + "]"
			} else {
				s += string(u.Host)
			}
			if u.Port != 0 {
				s += ":" + fmt.Sprint(u.Port)
			}
			if u.Params != nil {
				s += ";" + string(u.Params)
			}
			if u.Headers != nil {
				s += "?" + string(u.Headers)
			}
		default:
			return
		}
		if u.Port != 0 && len(s) < len(b) {
			return // leading zeros
		}
		if s != string(b) {
			t.Fatalf("%q became %q", b, s)
		}
	})
}

func FuzzNameAddr(f *testing.F) {
	for _, s := range []string{`"A, \"B\"" <sip:a@b;lr>;x="1,2", next`, "sip:a@b;tag=1", "<tel:+1>", "A B <sip:a@b>\r\n ;tag=1", "*"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, v []byte) {
		a, err := sipmsg.ParseNameAddr(v)
		if err != nil {
			return
		}
		if a.Len > len(v) || (a.Len < len(v) && v[a.Len] != ',') || len(a.URI) == 0 || bytes.ContainsAny(a.URI, "<>\" \r\n") {
			t.Fatalf("%+v", a)
		}
		elem, rest := sipmsg.Element(v)
		if !bytes.Equal(elem, bytes.Trim(v[:a.Len], " \t\r\n")) {
			t.Fatalf("Element = %q, ParseNameAddr %q", elem, v[:a.Len])
		}
		if len(elem)+len(rest) > len(v) {
			t.Fatal("Element grew")
		}
		for p, n := a.Params, 0; ; n++ {
			name, value, next, ok := sipmsg.NextParam(p)
			if !ok {
				break
			}
			if len(next) >= len(p) || n > len(v) {
				t.Fatalf("NextParam does not advance in %q", p)
			}
			if len(name)+len(value) > len(p) {
				t.Fatal("NextParam grew")
			}
			p = next
		}
	})
}

func FuzzAddr(f *testing.F) {
	for _, s := range addrs {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		checkAddr(t, s)
		if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
			checkAddr(t, a.String())
		}
	})
}
