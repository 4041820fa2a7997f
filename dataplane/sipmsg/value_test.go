package sipmsg_test

import (
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

func elements(v []byte) (out []string) {
	for v != nil {
		var e []byte
		if e, v = sipmsg.Element(v); len(e) > 0 {
			out = append(out, string(e))
		}
	}
	return out
}

func TestElement(t *testing.T) {
	tests := []struct {
		in   string
		want []string
	}{
		{"", nil},
		{" \t\r\n ", nil},
		{"a", []string{"a"}},
		{" a , b ,\r\n c ", []string{"a", "b", "c"}},
		{",,a,,b,,", []string{"a", "b"}},
		{`"x,y" <sip:a,b@c>;p="1,2",d`, []string{`"x,y" <sip:a,b@c>;p="1,2"`, "d"}},
		{`"a\",b",c`, []string{`"a\",b"`, "c"}},
		{`"a\\",c`, []string{`"a\\"`, "c"}},
		{`<a"b>,"c`, []string{`<a"b>`, `"c`}},
		{`"open,a,b`, []string{`"open,a,b`}},
		{`<open,a,b`, []string{`<open,a,b`}},
		{`"open\`, []string{`"open\`}},
	}
	for _, tt := range tests {
		if got := elements([]byte(tt.in)); !slices.Equal(got, tt.want) {
			t.Errorf("Element(%q) = %q, want %q", tt.in, got, tt.want)
		}
	}
	if _, rest := sipmsg.Element([]byte("a, ,")); rest != nil {
		t.Errorf("rest = %q, want nil", rest)
	}
}

func TestParam(t *testing.T) {
	const p = `;tag=1 ; LR;q = 0.5;x="a;b=\"c\"";y= ;empty="";z=<a>;z=2 ; last = end`
	tests := []struct {
		name, want string
		ok         bool
	}{
		{"tag", "1", true},
		{"TAG", "1", true},
		{"lr", "", true},
		{"q", "0.5", true},
		{"x", `a;b=\"c\"`, true},
		{"y", "", true},
		{"empty", "", true},
		{"z", "<a>", true},
		{"last", "end", true},
		{"b", "", false},
		{"ta", "", false},
		{"", "", false},
	}
	for _, tt := range tests {
		if v, ok := sipmsg.Param([]byte(p), tt.name); ok != tt.ok || string(v) != tt.want {
			t.Errorf("Param(%q) = %q, %v, want %q, %v", tt.name, v, ok, tt.want, tt.ok)
		}
	}
	for _, in := range []string{"", ";", " ; ; ", "\r\n"} {
		if n, v, _, ok := sipmsg.NextParam([]byte(in)); ok {
			t.Errorf("NextParam(%q) = %q, %q", in, n, v)
		}
	}
	if v, ok := sipmsg.Param([]byte(`a="unterminated;b=1`), "b"); ok {
		t.Errorf("found %q inside an unterminated string", v)
	}
	const odd = `"a;b=1";x="1"junk;y=2"3;z=4";v=5;"`
	for name, want := range map[string]string{"x": "1", "y": `2"3;z=4"`, "v": "5"} {
		if v, ok := sipmsg.Param([]byte(odd), name); !ok || string(v) != want {
			t.Errorf("Param(%q) of odd text = %q, %v", name, v, ok)
		}
	}
	for _, name := range []string{"b", "z", "a"} {
		if v, ok := sipmsg.Param([]byte(odd), name); ok {
			t.Errorf("Param(%q) = %q, found inside quotes", name, v)
		}
	}
	if v, ok := sipmsg.Param([]byte("lr"), "lr"); !ok || v != nil {
		t.Errorf("flag = %q, %v, want nil, true", v, ok)
	}
}

func TestHasToken(t *testing.T) {
	for _, tt := range []struct {
		list, token string
		want        bool
	}{
		{"path, gruu,\r\n sec-agree", "sec-agree", true},
		{"Path", "path", true},
		{"path", "pat", false},
		{"path", "paths", false},
		{"", "path", false},
		{",", "", false},
		{`"path"`, "path", false},
	} {
		if got := sipmsg.HasToken([]byte(tt.list), tt.token); got != tt.want {
			t.Errorf("HasToken(%q, %q) = %v", tt.list, tt.token, got)
		}
	}
}

func TestEqualFold(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want bool
	}{
		{"", "", true},
		{"a", "A", true},
		{"Z", "z", true},
		{"a-1", "A-1", true},
		{"a", "b", false},
		{"a", "aa", false},
		{"[", "{", false},
		{"@", "`", false},
		{"-", "\r", false},
		{"\x8a", "\xaa", false},
	} {
		if got := sipmsg.EqualFold([]byte(tt.a), tt.b); got != tt.want {
			t.Errorf("EqualFold(%q, %q) = %v", tt.a, tt.b, got)
		}
	}
}

func TestParseUint(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want uint32
		ok   bool
	}{
		{"0", 0, true},
		{"0068", 68, true},
		{"4294967295", 4294967295, true},
		{"4294967296", 0, false},
		{"", 0, false},
		{"-1", 0, false},
		{"+1", 0, false},
		{"1 ", 0, false},
		{"99999999999999999999999999", 0, false},
	} {
		if got, ok := sipmsg.ParseUint([]byte(tt.in)); ok != tt.ok || got != tt.want {
			t.Errorf("ParseUint(%q) = %d, %v", tt.in, got, ok)
		}
	}
}

func TestParseNameAddr(t *testing.T) {
	type want struct{ display, uri, params string }
	tests := []struct {
		in   string
		want want
		len  int // -1: error
	}{
		{"<sip:a@b>", want{"", "sip:a@b", ""}, 9},
		{"<sip:a@b>;tag=1", want{"", "sip:a@b", "tag=1"}, 15},
		{" <sip:a@b> ; tag = 1 , <sip:c@d>", want{"", "sip:a@b", "tag = 1"}, 21},
		{`"A, \"B\"" <sip:a@b;lr>;x="1,2", next`, want{`A, \"B\"`, "sip:a@b;lr", `x="1,2"`}, 31},
		{`"" <sip:a@b>`, want{"", "sip:a@b", ""}, 12},
		{"A B <sip:a@b>", want{"A B", "sip:a@b", ""}, 13},
		{"A<sip:a@b>", want{"A", "sip:a@b", ""}, 10},
		{"sip:a@b;tag=1", want{"", "sip:a@b", "tag=1"}, 13},
		{"sip:a@b , sip:c@d", want{"", "sip:a@b", ""}, 8},
		{"tel:+1;phone-context=x", want{"", "tel:+1", "phone-context=x"}, 22},
		{"*", want{"", "*", ""}, 1},
		{"<sip:a@b>,", want{"", "sip:a@b", ""}, 9},
		{"<sip:a@b>;", want{"", "sip:a@b", ""}, 10},
		{"", want{}, -1},
		{"  ", want{}, -1},
		{",<sip:a@b>", want{}, -1},
		{"<>", want{}, -1},
		{"<sip:a@b", want{}, -1},
		{"<sip:a b>", want{}, -1},
		{"<sip:a\"b>", want{}, -1},
		{"<<sip:a@b>>", want{}, -1},
		{"<sip:a@b>x", want{}, -1},
		{"<sip:a@b> x;tag=1", want{}, -1},
		{`"A <sip:a@b>`, want{}, -1},
		{`"A" sip:a@b`, want{}, -1},
		{`A "B" <sip:a@b>`, want{}, -1},
		{`<sip:a@b>;x="`, want{}, -1},
		{"sip:a@b?x=y", want{}, -1},
		{"sip:a b", want{}, -1},
		{"sip:a@b>", want{}, -1},
		{";tag=1", want{}, -1},
	}
	for _, tt := range tests {
		a, err := sipmsg.ParseNameAddr([]byte(tt.in))
		if tt.len < 0 {
			if !errors.Is(err, sipmsg.ErrNameAddr) {
				t.Errorf("ParseNameAddr(%q) = %q, %v", tt.in, a.URI, err)
			}
			continue
		}
		got := want{string(a.Display), string(a.URI), string(a.Params)}
		if err != nil || got != tt.want || a.Len != tt.len {
			t.Errorf("ParseNameAddr(%q) = %q, Len %d, %v; want %q, Len %d", tt.in, got, a.Len, err, tt.want, tt.len)
		}
	}
}

func TestParseURI(t *testing.T) {
	type want struct {
		scheme, user, password, host string
		port                         uint16
		params, headers              string
		ipv6                         bool
	}
	tests := []struct {
		in   string
		want want
		ok   bool
	}{
		{"sip:b", want{scheme: "sip", host: "b"}, true},
		{"SIPS:a@b", want{scheme: "SIPS", user: "a", host: "b"}, true},
		{"sip:a:pw@b:5060;lr;x=1?h=v&i=w", want{"sip", "a", "pw", "b", 5060, "lr;x=1", "h=v&i=w", false}, true},
		{"sip:b?h=v;x", want{scheme: "sip", host: "b", headers: "h=v;x"}, true},
		{"sip:a@[2001:db8::1]:5061;lr", want{"sip", "a", "", "2001:db8::1", 5061, "lr", "", true}, true},
		{"sip:[::ffff:192.0.2.1]", want{scheme: "sip", host: "::ffff:192.0.2.1", ipv6: true}, true},
		{"sip:a;b=c/d?e@h", want{scheme: "sip", user: "a;b=c/d?e", host: "h"}, true},
		{"sip:f-7c1e@pcscf.ims.example:5060;lr", want{"sip", "f-7c1e", "", "pcscf.ims.example", 5060, "lr", "", false}, true},
		{"tel:+15550100001", want{scheme: "tel", user: "+15550100001"}, true},
		{"TEL:911;phone-context=ims.example", want{scheme: "TEL", user: "911", params: "phone-context=ims.example"}, true},
		{"urn:service:sos", want{scheme: "urn"}, true},
		{"", want{}, false},
		{"sip", want{}, false},
		{"sip:", want{}, false},
		{"tel:", want{}, false},
		{"tel:;x", want{}, false},
		{"urn:", want{}, false},
		{":a", want{}, false},
		{"1sip:a", want{}, false},
		{"s_p:a", want{}, false},
		{"sip:@b", want{}, false},
		{"sip::pw@b", want{}, false},
		{"sip:a@", want{}, false},
		{"sip:a@b@c", want{}, false},
		{"sip:b;x=a@b@c", want{}, false},
		{"sip:b:", want{}, false},
		{"sip:b:0", want{}, false},
		{"sip:b:65536", want{}, false},
		{"sip:b:5060x", want{}, false},
		{"sip:b c", want{}, false},
		{"sip:b\r\n", want{}, false},
		{"sip:<b>", want{}, false},
		{"sip:b/c", want{}, false},
		{"sip:[::1", want{}, false},
		{"sip:[]", want{}, false},
		{"sip:[::1%eth0]", want{}, false},
		{"sip:[::1]x", want{}, false},
		{"*", want{}, false},
	}
	for _, tt := range tests {
		u, err := sipmsg.ParseURI([]byte(tt.in))
		if (err == nil) != tt.ok || (err != nil && !errors.Is(err, sipmsg.ErrURI)) {
			t.Errorf("ParseURI(%q): %v", tt.in, err)
		}
		got := want{string(u.Scheme), string(u.User), string(u.Password), string(u.Host), u.Port, string(u.Params), string(u.Headers), u.IPv6}
		if tt.ok && got != tt.want {
			t.Errorf("ParseURI(%q) = %+v, want %+v", tt.in, got, tt.want)
		}
	}
}

func TestParseVia(t *testing.T) {
	type want struct {
		transport, host string
		port            uint16
		branch          string
		received        string
		rport           uint16
		hasRPort        bool
		host6           bool
		len             int
	}
	tests := []struct {
		in   string
		want want
		ok   bool
	}{
		{"SIP/2.0/UDP h", want{transport: "UDP", host: "h", len: 13}, true},
		{"SIP/2.0/UDP 10.45.0.7:5060;branch=z9hG4bKsm1;rport", want{transport: "UDP", host: "10.45.0.7", port: 5060, branch: "z9hG4bKsm1", hasRPort: true, len: 50}, true},
		{"SIP/2.0/TCP h;RPORT=5;Received=1.2.3.4;BRANCH=x , SIP/2.0/UDP i", want{transport: "TCP", host: "h", branch: "x", received: "1.2.3.4", rport: 5, hasRPort: true, len: 48}, true},
		{"SIP/2.0/TCP [2001:db8::1]:5060;received=2001:db8::2", want{transport: "TCP", host: "2001:db8::1", port: 5060, host6: true, received: "2001:db8::2", len: 51}, true},
		{"SIP/2.0/TCP [::1];received=[::2]", want{transport: "TCP", host: "::1", host6: true, received: "::2", len: 32}, true},
		{"SIP/2.0/UDP h;rport=0", want{transport: "UDP", host: "h", hasRPort: true, len: 21}, true},
		{"SIP/2.0/UDP h;rport=", want{transport: "UDP", host: "h", hasRPort: true, len: 20}, true},
		{"SIP/2.0/UDP h;;x=\"a,;b\";branch=b;", want{transport: "UDP", host: "h", branch: "b", len: 33}, true},
		{"SIP/2.0/UDP h : 5060 ;branch = b", want{transport: "UDP", host: "h", port: 5060, branch: "b", len: 32}, true},
		{"sip / 2.0 / UDP\r\n h", want{transport: "UDP", host: "h", len: 19}, true},
		{"SIP/2.0/UDP h;branch=b,", want{transport: "UDP", host: "h", branch: "b", len: 22}, true},
		{"", want{}, false},
		{"SIP", want{}, false},
		{"SIP/2.0", want{}, false},
		{"SIP/2.0/", want{}, false},
		{"SIP/2.0/UDP", want{}, false},
		{"SIP/2.0/UDP ", want{}, false},
		{"SIP/2.0/UDPh", want{}, false},
		{"SIP/2.0 UDP h", want{}, false},
		{"/2.0/UDP h", want{}, false},
		{"SIP//UDP h", want{}, false},
		{"SIP/2.0/ h", want{}, false},
		{"SIP/2.0/UDP :5060", want{}, false},
		{"SIP/2.0/UDP h:", want{}, false},
		{"SIP/2.0/UDP h:0", want{}, false},
		{"SIP/2.0/UDP h:65536", want{}, false},
		{"SIP/2.0/UDP h:5060x", want{}, false},
		{"SIP/2.0/UDP h x", want{}, false},
		{"SIP/2.0/UDP [::1", want{}, false},
		{"SIP/2.0/UDP []", want{}, false},
		{"SIP/2.0/UDP h;branch=", want{}, false},
		{"SIP/2.0/UDP h;branch", want{}, false},
		{"SIP/2.0/UDP h;branch=a;branch=b", want{}, false},
		{"SIP/2.0/UDP h;rport;rport", want{}, false},
		{"SIP/2.0/UDP h;received=1.1.1.1;received=2.2.2.2", want{}, false},
		{"SIP/2.0/UDP h;maddr=1.1.1.1;maddr=2.2.2.2", want{}, false},
		{"SIP/2.0/UDP h;=x", want{}, false},
		{"SIP/2.0/UDP h;x=\"a", want{}, false},
		{"SIP/2.0/UDP h;x=a\"b\"", want{}, false},
		{"SIP/2.0/UDP h;x=<a,b>", want{}, false},
	}
	for _, tt := range tests {
		v, err := sipmsg.ParseVia([]byte(tt.in))
		if (err == nil) != tt.ok || (err != nil && !errors.Is(err, sipmsg.ErrVia)) {
			t.Errorf("ParseVia(%q): %v", tt.in, err)
		}
		got := want{string(v.Transport), string(v.Host), v.Port, string(v.Branch), string(v.Received), v.RPort, v.HasRPort, v.Host6, v.Len}
		if tt.ok && got != tt.want {
			t.Errorf("ParseVia(%q) = %+v, want %+v", tt.in, got, tt.want)
		}
	}
	if v, err := sipmsg.ParseVia([]byte("SIP/3.0/UDP h;branch=b")); !errors.Is(err, sipmsg.ErrViaProtocol) || string(v.Branch) != "b" || v.Len != 22 {
		t.Errorf("SIP/3.0: %q, Len %d, %v", v.Branch, v.Len, err)
	}
}

// TestViaSpans: the offsets are those that edits need.
func TestViaSpans(t *testing.T) {
	const in = "SIP/2.0/UDP [2001:db8::1]:5060 ;branch=b ; rport = 7 ;received=1.2.3.4;keep;maddr=[::2];ttl=1"
	v, err := sipmsg.ParseVia([]byte(in))
	if err != nil {
		t.Fatal(err)
	}
	if got := in[v.HostStart:v.HostEnd]; got != "[2001:db8::1]" {
		t.Errorf("host = %q", got)
	}
	if got := in[v.ParamsAt:][:8]; got != ";branch=" {
		t.Errorf("parameters start with %q", got)
	}
	for _, s := range []struct {
		name      string
		at        sipmsg.Span
		param, to string // from the name, from the semicolon
	}{
		{"rport", v.RPortAt, "rport = 7", "; rport = 7"},
		{"received", v.ReceivedAt, "received=1.2.3.4", ";received=1.2.3.4"},
		{"keep", v.KeepAt, "keep", ";keep"},
	} {
		if in[s.at.Start:s.at.End] != s.param || in[s.at.Semi:s.at.End] != s.to {
			t.Errorf("%s = %q, from the semicolon %q", s.name, in[s.at.Start:s.at.End], in[s.at.Semi:s.at.End])
		}
	}
	if !v.Keep || string(v.MAddr) != "::2" || v.RPort != 7 {
		t.Errorf("keep %v, maddr %q, rport %d", v.Keep, v.MAddr, v.RPort)
	}
}

var addrs = []string{
	"", ".", ":", "::", ":::", "1.2.3.4", "255.255.255.255", "256.1.1.1", "1.2.3", "1.2.3.4.5", "01.2.3.4", "0.0.0.0", "1..2.3",
	"1.2.3.", ".1.2.3", "1.2.3.4 ", "a.b.c.d", "2001:db8::1", "2001:DB8:0:0:0:0:0:1", "1:2:3:4:5:6:7:8", "1:2:3:4:5:6:7", "1:2:3:4:5:6:7:8:9",
	"::1", "1::", "1::8", "1:2:3:4:5:6:7::", "::2:3:4:5:6:7:8", "1:2:3:4::5:6:7:8", "1::2::3", "::ffff:1.2.3.4", "1:2:3:4:5:6:1.2.3.4",
	"1:2:3:4:5:1.2.3.4", "1:2:3:4:5:6:7:1.2.3.4", "::1.2.3.4", "::1.2.3", "::1.2.3.4:5", "12345::", "g::", "1:", ":1", "1:2:", "::1%eth0", "fe80::1%1",
}

func TestParseAddr(t *testing.T) {
	for _, in := range addrs {
		checkAddr(t, in)
	}
}

// checkAddr compares with netip, which knows zones besides.
func checkAddr(t *testing.T, in string) {
	t.Helper()
	got, ok := sipmsg.ParseAddr([]byte(in))
	want, err := netip.ParseAddr(in)
	if wantOK := err == nil && want.Zone() == ""; ok != wantOK || (ok && got != want) {
		t.Errorf("ParseAddr(%q) = %v, %v; netip says %v, %v", in, got, ok, want, err)
	}
}
