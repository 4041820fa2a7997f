package sipwire

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const sample = "INVITE sip:a@b SIP/2.0\r\nv: SIP/2.0/UDP 10.0.0.5:6100;branch=z9hG4bKq1, SIP/2.0/TCP [2001:db8::1];branch=z9hG4bKx\r\n" +
	"Max-Forwards : 70\r\nf: \"A, B\" <sip:a@b;x=1>;tag=1\r\nTo: sip:c@d;tag=2\r\nCall-ID: x\r\nCSeq: 7 INVITE\r\n" +
	"Subject: first\r\n second\r\nl: 2\r\n\r\nhi"

func parse(t *testing.T, s string) *Message {
	t.Helper()
	m, err := Parse([]byte(s))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestParse(t *testing.T) {
	m := parse(t, sample)
	if m.Method != "INVITE" || m.URI != "sip:a@b" || string(m.Body) != "hi" || m.Get("Subject") != "first second" {
		t.Errorf("parsed %+v", m)
	}
	if got := m.List("Via"); len(got) != 2 || m.Tag("From") != "1" || m.Tag("To") != "2" {
		t.Errorf("Via %q, tags %q %q", got, m.Tag("From"), m.Tag("To"))
	}
	again := parse(t, string(m.Bytes()))
	if diff := cmp.Diff(m.Headers[:7], again.Headers[:7]); diff != "" || string(again.Body) != "hi" {
		t.Errorf("printed and parsed (-want +got):\n%s", diff)
	}
	r := Response(m, 200, "t")
	if r.Get("To") != "sip:c@d;tag=2" || r.Reason != "OK" || len(r.List("Via")) != 2 || r.CSeqMethod() != "INVITE" {
		t.Errorf("response %+v", r)
	}
}

func TestParseErrors(t *testing.T) {
	for name, change := range map[string][2]string{
		"no end":             {"\r\n\r\nhi", "\r\n"},
		"bare LF":            {"Call-ID: x\r\n", "Call-ID: x\n"},
		"start line":         {"INVITE sip:a@b SIP/2.0", "INVITE sip:a@b SIP/3.0"},
		"blank in the URI":   {"sip:a@b SIP", "sip:a@b x SIP"},
		"status":             {"INVITE sip:a@b SIP/2.0", "SIP/2.0 99 x"},
		"no colon":           {"Max-Forwards : 70", "Max-Forwards 70"},
		"two From":           {"To:", "From: sip:x@y;tag=9\r\nTo:"},
		"no Via":             {"v:", "X-V:"},
		"CSeq":               {"7 INVITE", "x INVITE"},
		"CSeq over 32 bits":  {"7 INVITE", "4294967296 INVITE"},
		"CSeq method":        {"7 INVITE", "7 BYE"},
		"Content-Length":     {"l: 2", "l: 3"},
		"two Content-Length": {"l: 2", "l: 2\r\nContent-Length: 2"},
		"NUL":                {"first", "fi\x00rst"},
	} {
		s := strings.Replace(sample, change[0], change[1], 1)
		if s == sample {
			t.Fatalf("%s: nothing was changed", name)
		}
		if _, err := Parse([]byte(s)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v, want ErrMalformed", name, err)
		}
	}
}

func TestEdit(t *testing.T) {
	m := parse(t, sample)
	if first, ok := m.Pop("Via"); !ok || !strings.HasPrefix(first, "SIP/2.0/UDP") {
		t.Errorf("Pop = %q", first)
	}
	if got := m.All("Via"); len(got) != 1 || !strings.HasPrefix(got[0], "SIP/2.0/TCP") {
		t.Errorf("Via left: %q", got)
	}
	m.Pop("Via")
	if _, ok := m.Pop("Via"); ok || m.Has("Via") {
		t.Error("the last Via is still there")
	}
	m.Add("Route", "<sip:a>")
	m.Add("Route", "<sip:b>")
	m.Set("Route", "<sip:c>")
	m.Push("Route", "<sip:d>")
	if diff := cmp.Diff([]string{"<sip:d>", "<sip:c>"}, m.List("Route")); diff != "" {
		t.Errorf("Route (-want +got):\n%s", diff)
	}
	m.Del("route")
	if m.Has("Route") {
		t.Error("Route survived")
	}
}

func TestMark(t *testing.T) {
	from := netip.MustParseAddrPort("10.45.0.7:5062")
	for in, want := range map[string]string{
		"SIP/2.0/UDP 10.45.0.7:5060;branch=z9hG4bK1":       "SIP/2.0/UDP 10.45.0.7:5060;branch=z9hG4bK1",
		"SIP/2.0/UDP 10.45.0.7:5060;branch=z9hG4bK1;rport": "SIP/2.0/UDP 10.45.0.7:5060;branch=z9hG4bK1;rport=5062;received=10.45.0.7",
		"SIP/2.0/UDP ue.example;branch=z9hG4bK1":           "SIP/2.0/UDP ue.example;branch=z9hG4bK1;received=10.45.0.7",
	} {
		m := &Message{}
		m.Add("Via", in+", SIP/2.0/UDP x")
		if err := m.Mark(from); err != nil {
			t.Fatal(err)
		}
		if got := m.List("Via"); got[0] != want || got[1] != "SIP/2.0/UDP x" {
			t.Errorf("%s became %q, want %s", in, got, want)
		}
	}
	v, err := ParseVia("SIP/2.0/UDP ue.example:5060;received=2001:db8::7;rport=5070")
	if err != nil {
		t.Fatal(err)
	}
	if to, ok := v.ReplyTo(); !ok || to != netip.MustParseAddrPort("[2001:db8::7]:5070") {
		t.Errorf("ReplyTo = %v, %v", to, ok)
	}
}

func TestValues(t *testing.T) {
	if diff := cmp.Diff([]string{`"a,b" <sip:x,y@z>;p="1,2"`, "c"}, SplitList(`"a,b" <sip:x,y@z>;p="1,2" ,, c`)); diff != "" {
		t.Errorf("SplitList (-want +got):\n%s", diff)
	}
	if got := SplitRaw("a,,b"); len(got) != 3 {
		t.Errorf("SplitRaw = %q", got)
	}
	a, err := ParseAddr(`"x <y>" <sip:u;p=1@[2001:db8::1]:5061;lr;transport=tcp?h=1>;tag=9;q`)
	if err != nil || a.Params.Get("tag") != "9" {
		t.Fatalf("ParseAddr: %+v, %v", a, err)
	}
	u, err := ParseURI(a.URI)
	if err != nil || u.User != "u;p=1" || u.Host != "2001:db8::1" || u.Port != 5061 || u.Params.Get("transport") != "tcp" {
		t.Errorf("ParseURI: %+v, %v", u, err)
	}
	for in, want := range map[string]string{
		"tel:+1-555.(01)00": "tel:+15550100", "SIP:A@Example.ORG:5060;user=phone": "sip:A@example.org", "garbage": "garbage",
	} {
		if got := Key(in); got != want {
			t.Errorf("Key(%s) = %s, want %s", in, got, want)
		}
	}
	scheme, p, err := ParseAuth(`Digest realm="a, \"b\"",nonce=x , qop="auth"`)
	if err != nil || scheme != "Digest" || p.Get("realm") != `a, "b"` || p.Get("qop") != "auth" {
		t.Errorf("ParseAuth: %s %+v, %v", scheme, p, err)
	}
	for _, bad := range []string{"Digest", "Digest a=1,,b=2", "Digest ,a=1", "Digest a=1,", "Digest a"} {
		if _, _, err := ParseAuth(bad); err == nil {
			t.Errorf("ParseAuth(%q) succeeded", bad)
		}
	}
	for _, bad := range []string{"", "SIP/2.0/UDP", "SIP/2.0/UDP :5060", "SIP/2.0/UDP a:b", "SIP/2.0/UDP a:0", "SIP/2.0/UDP [::1", "SIP/2.0/UDP a;;b", "SIP/1.0/UDP a"} {
		if _, err := ParseVia(bad); err == nil {
			t.Errorf("ParseVia(%q) succeeded", bad)
		}
	}
	for _, bad := range []string{"", "<sip:a", "<>", "<sip:a>x", "a b"} {
		if _, err := ParseAddr(bad); err == nil {
			t.Errorf("ParseAddr(%q) succeeded", bad)
		}
	}
	for _, bad := range []string{"", "x", "sip:", "sip:a@", "tel:", "sip:a@b:70000"} {
		if _, err := ParseURI(bad); err == nil {
			t.Errorf("ParseURI(%q) succeeded", bad)
		}
	}
}

func TestReadMessage(t *testing.T) {
	long := strings.Replace(sample, "first", strings.Repeat("y", 9000), 1)
	r := bufio.NewReader(strings.NewReader("\r\n\r\n" + sample + "\r\n" + long + sample[:len(sample)-1]))
	_, ping, _, err := ReadMessage(r)
	if !ping || err != nil {
		t.Fatalf("keepalive: %v, %v", ping, err)
	}
	for i, want := range []string{sample, "", long} {
		b, _, pong, err := ReadMessage(r)
		if err != nil || string(b) != want || pong != (want == "") {
			t.Fatalf("message %d: %d octets, %v, %v", i, len(b), pong, err)
		}
	}
	if _, _, _, err := ReadMessage(r); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("cut message: %v", err)
	}
	for name, s := range map[string]string{
		"no Content-Length":  strings.Replace(sample, "l: 2", "X: 2", 1),
		"bad Content-Length": strings.Replace(sample, "l: 2", "l: -2", 1),
		"endless headers":    "INVITE " + strings.Repeat("x", 70000),
	} {
		if _, _, _, err := ReadMessage(bufio.NewReader(strings.NewReader(s))); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v, want ErrMalformed", name, err)
		}
	}
}

// FuzzParse checks that whatever is accepted prints to something that is accepted again, with the same content.
func FuzzParse(f *testing.F) {
	f.Add([]byte(sample))
	f.Add([]byte("SIP/2.0 200 OK\r\nVia: SIP/2.0/UDP a\r\nFrom: a:b\r\nTo: a:b\r\nCall-ID: 1\r\nCSeq: 1 BYE\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := Parse(b)
		if err != nil {
			return
		}
		m.Del("Content-Length")
		printed := m.Bytes()
		again, err := Parse(printed)
		if err != nil {
			t.Fatalf("%v in:\n%q", err, printed)
		}
		if !bytes.Equal(again.Bytes(), printed) {
			t.Fatalf("printed twice:\n%q\n%q", printed, again.Bytes())
		}
		for _, v := range m.List("Via") {
			if v, err := ParseVia(v); err == nil {
				if w, err := ParseVia(v.String()); err != nil || w.String() != v.String() {
					t.Fatalf("Via %q: %v", v.String(), err)
				}
			}
		}
	})
}
