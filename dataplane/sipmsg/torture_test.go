package sipmsg_test

import (
	"bytes"
	"errors"
	"strconv"
	"strings"
	"testing"

	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// torture is a message in the spirit of RFC 4475, named as there. {CL} in the header stands for the length of the body.
type torture struct {
	name    string
	section string
	text    string // \n stands for CRLF
	scan    error
	// why says for a message that the RFC calls invalid what refuses it later, or why it is tolerated.
	why   string
	check func(t *testing.T, m *sipmsg.Msg)
}

func (x *torture) bytes() []byte {
	head, body, _ := strings.Cut(x.text, "\n\n")
	b := crlf(body)
	head = strings.ReplaceAll(head, "{CL}", strconv.Itoa(len(b)))
	return append(crlf(head+"\n\n"), b...)
}

const tortureSDP = "v=0\no=mhandley 29739 7272939 IN IP4 192.0.2.3\ns=-\nc=IN IP4 192.0.2.4\nt=0 0\nm=audio 49217 RTP/AVP 0 12\n"

// common are the header fields that most of the messages share.
const common = "To: sip:j.user@example.com\nFrom: sip:caller@example.net;tag=134161461246\nMax-Forwards: 7\n" +
	"Call-ID: torture.0ha0isndaksdjasdf3234nas\nVia: SIP/2.0/UDP 192.0.2.2;branch=z9hG4bKkdjuw\n"

func get(t *testing.T, m *sipmsg.Msg, id sipmsg.HeaderID, want string) {
	t.Helper()
	if got := string(m.Get(id)); got != want {
		t.Errorf("%v = %q, want %q", id, got, want)
	}
}

func nameAddr(t *testing.T, m *sipmsg.Msg, id sipmsg.HeaderID, display, uri, params string) {
	t.Helper()
	a, err := sipmsg.ParseNameAddr(m.Get(id))
	if err != nil || string(a.Display) != display || string(a.URI) != uri || string(a.Params) != params {
		t.Errorf("%v = %q %q %q, %v", id, a.Display, a.URI, a.Params, err)
	}
}

func badNameAddr(id sipmsg.HeaderID) func(*testing.T, *sipmsg.Msg) {
	return func(t *testing.T, m *sipmsg.Msg) {
		t.Helper()
		if a, err := sipmsg.ParseNameAddr(m.Get(id)); !errors.Is(err, sipmsg.ErrNameAddr) {
			t.Errorf("%v is read as %q, %v", id, a.URI, err)
		}
	}
}

var tortures = []torture{
	{
		name: "wsinv", section: "3.1.1.1", text: "INVITE sip:vivekg@chair-dnrc.example.com;unknownparam SIP/2.0\n" +
			"TO :\n sip:vivekg@chair-dnrc.example.com ;   tag    = 1918181833n\n" +
			"from   : \"J Rosenberg \\\\\\\"\"       <sip:jdrosen@example.com>\n  ;\n  tag = 98asjd8\n" +
			"MaX-fOrWaRdS: 0068\nCall-ID: wsinv.ndaksdj@192.0.2.1\nContent-Length   : {CL}\ncseq: 0009\n  INVITE\n" +
			"Via  : SIP  /   2.0\n /UDP\n    192.0.2.2;branch=390skdjuw\ns :\nNewFangledHeader:   newfangled value\n" +
			" continued newfangled value\nUnknownHeaderWithUnusualValue: ;;,,;;,;\nContent-Type: application/sdp\n" +
			"Route:\n <sip:services.example.com;lr;unknownwith=value;unknown-no-value>\n" +
			"v:  SIP  / 2.0  / TCP     spindle.example.com   ;\n  branch  =   z9hG4bK9ikj8  ,\n" +
			" SIP  /    2.0   / UDP  192.168.255.111   ; branch=\n z9hG4bK30239\n" +
			"m:\"Quoted string \\\"\\\"\" <sip:jdrosen@example.com> ; newparam =\n      newvalue ;\n  secondparam ; q = 0.33\n\n" + tortureSDP,
		check: func(t *testing.T, m *sipmsg.Msg) {
			nameAddr(t, m, sipmsg.To, "", "sip:vivekg@chair-dnrc.example.com", "tag    = 1918181833n")
			a, err := sipmsg.ParseNameAddr(m.Get(sipmsg.From))
			if tag, _ := sipmsg.Param(a.Params, "tag"); err != nil || string(a.Display) != `J Rosenberg \\\"` || string(tag) != "98asjd8" {
				t.Errorf("From = %q tag %q, %v", a.Display, tag, err)
			}
			if n, method := m.CSeq(); n != 9 || string(method) != "INVITE" {
				t.Errorf("CSeq = %d %q", n, method)
			}
			v, err := sipmsg.ParseVia(m.Get(sipmsg.Via))
			if err != nil || string(v.Transport) != "UDP" || string(v.Host) != "192.0.2.2" || string(v.Branch) != "390skdjuw" {
				t.Errorf("Via = %q %q %q, %v", v.Transport, v.Host, v.Branch, err)
			}
			last, _ := m.Last(sipmsg.Via)
			val := m.Value(last)
			v, err = sipmsg.ParseVia(val)
			if err != nil || string(v.Transport) != "TCP" || string(v.Host) != "spindle.example.com" || string(v.Branch) != "z9hG4bK9ikj8" {
				t.Errorf("second Via = %q %q %q, %v", v.Transport, v.Host, v.Branch, err)
			}
			v, err = sipmsg.ParseVia(val[v.Len+1:])
			if err != nil || string(v.Transport) != "UDP" || string(v.Host) != "192.168.255.111" || string(v.Branch) != "z9hG4bK30239" {
				t.Errorf("third Via = %q %q %q, %v", v.Transport, v.Host, v.Branch, err)
			}
			c, err := sipmsg.ParseNameAddr(m.Get(sipmsg.Contact))
			q, _ := sipmsg.Param(c.Params, "q")
			np, _ := sipmsg.Param(c.Params, "newparam")
			_, second := sipmsg.Param(c.Params, "secondparam")
			if err != nil || string(c.Display) != `Quoted string \"\"` || string(q) != "0.33" || string(np) != "newvalue" || !second {
				t.Errorf("Contact = %q q=%q newparam=%q %v, %v", c.Display, q, np, second, err)
			}
			if r, ok := m.HeaderNamed("newfangledheader"); !ok || string(m.Value(r)) != "newfangled value\r\n continued newfangled value" {
				t.Errorf("NewFangledHeader = %q", m.Value(r))
			}
			if r, ok := m.First(sipmsg.Subject); !ok || len(m.Value(r)) != 0 {
				t.Errorf("Subject = %q, %v", m.Value(r), ok)
			}
		},
	},
	{
		name: "intmeth", section: "3.1.1.2", text: "!interesting-Method0123456789_*+`.%indeed'~ " +
			"sip:1_unusual.URI~(to-be!sure)&isn't+it$/crazy?,/;;*:&it+has=1,weird!*pas$wo~d_too.(doesn't-it)@example.com SIP/2.0\n" +
			"Via: SIP/2.0/TCP host1.example.com;branch=z9hG4bK-.!%66*_+`'~\n" +
			"To: \"BEL:\\\x07 NUL:\\\x01 DEL:\\\x7f\" <sip:1_unusual.URI~(to-be!sure)&isn't+it$/crazy?,/;;*@example.com>\n" +
			"From: token1~` token2'+_ token3*%!.- <sip:mundane@example.com>;fromParam''~+*_!.-%=\"\xd1\x80\xd0\xb0\";tag=_token~1'+`*%!-.\n" +
			"Call-ID: intmeth.word%ZK-!.*_+'@word`~)(><:\\/\"][?}{\n" +
			"CSeq: 139122385 !interesting-Method0123456789_*+`.%indeed'~\nMax-Forwards: 255\n" +
			"extensionHeader-!.%*+_`'~: \xef\xbb\xbf\xe5\xa4\xa7\xe5\x81\x9c\xe9\x9b\xbb\nContent-Length: {CL}\n\n",
		why: "the NUL that the RFC has in a quoted-pair is left out: NUL is refused by house rule",
		check: func(t *testing.T, m *sipmsg.Msg) {
			if m.Method() != sipmsg.MethodOther || m.CSeqMethod() != sipmsg.MethodOther {
				t.Errorf("method = %v", m.Method())
			}
			v, err := sipmsg.ParseVia(m.Get(sipmsg.Via))
			if err != nil || string(v.Branch) != "z9hG4bK-.!%66*_+`'~" {
				t.Errorf("Via = %q, %v", v.Branch, err)
			}
			u, err := sipmsg.ParseURI(m.RequestURI())
			if err != nil || string(u.Host) != "example.com" || string(u.User) != "1_unusual.URI~(to-be!sure)&isn't+it$/crazy?,/;;*" {
				t.Errorf("Request-URI = %q at %q, %v", u.User, u.Host, err)
			}
			f, err := sipmsg.ParseNameAddr(m.Get(sipmsg.From))
			tag, _ := sipmsg.Param(f.Params, "tag")
			if err != nil || string(f.URI) != "sip:mundane@example.com" || string(tag) != "_token~1'+`*%!-." {
				t.Errorf("From = %q tag %q, %v", f.URI, tag, err)
			}
			to, err := sipmsg.ParseNameAddr(m.Get(sipmsg.To))
			if err != nil || !bytes.HasPrefix(to.URI, []byte("sip:1_unusual")) {
				t.Errorf("To = %q, %v", to.URI, err)
			}
		},
	},
	{
		name: "esc01", section: "3.1.1.3", text: "INVITE sip:sips%3Auser%40example.com@example.net SIP/2.0\n" +
			"To: sip:%75se%72@example.com\nFrom: <sip:I%20have%20spaces@example.net>;tag=938\nMax-Forwards: 87\n" +
			"i: esc01.239409asdfakjkn23onasd0-3234\nCSeq: 234234 INVITE\nVia: SIP/2.0/UDP host5.example.net;branch=z9hG4bKkdjuw\n" +
			"C: application/sdp\nContact:\n  <sip:cal%6Cer@host5.example.net;%6C%72;n%61me=v%61lue%25%34%31>\nContent-Length: {CL}\n\n" + tortureSDP,
		check: func(t *testing.T, m *sipmsg.Msg) {
			u, err := sipmsg.ParseURI(m.RequestURI())
			if err != nil || string(u.User) != "sips%3Auser%40example.com" || string(u.Host) != "example.net" {
				t.Errorf("Request-URI = %q at %q, %v", u.User, u.Host, err)
			}
			get(t, m, sipmsg.ContentType, "application/sdp")
		},
	},
	{
		name: "escnull", section: "3.1.1.4", text: "REGISTER sip:example.com SIP/2.0\nTo: sip:null-%00-null@example.com\n" +
			"From: sip:null-%00-null@example.com;tag=839923423\nMax-Forwards: 70\nCall-ID: escnull.39203ndfvkjdasfkq3w4otrq0adsfdfnavd\n" +
			"CSeq: 14398234 REGISTER\nVia: SIP/2.0/UDP host5.example.com;branch=z9hG4bKkdjuw\nContact: <sip:%00@host5.example.com>\n" +
			"Contact: <sip:%00%00@host5.example.com>\nL:0\n\n",
		check: func(t *testing.T, m *sipmsg.Msg) {
			if m.Count(sipmsg.Contact) != 2 {
				t.Errorf("Count(Contact) = %d", m.Count(sipmsg.Contact))
			}
		},
	},
	{
		name: "esc02", section: "3.1.1.5", text: "RE%47IST%45R sip:registrar.example.com SIP/2.0\nTo: \"%Z%45\" <sip:resource@example.com>\n" +
			"From: \"%Z%45\" <sip:resource@example.com>;tag=f232jadfj23\nCall-ID: esc02.asdfnqwo34rq23i34jrjasdcnl23nrlknsdf\n" +
			"Via: SIP/2.0/TCP host.example.com;branch=z9hG4bK209%fzsnel234\nCSeq: 29344 RE%47IST%45R\nMax-Forwards: 70\n" +
			"Contact: <sip:alias1@host1.example.com>\nC%6Fntact: <sip:alias2@host2.example.com>\nContact: <sip:alias3@host3.example.com>\nl: 0\n\n",
		check: func(t *testing.T, m *sipmsg.Msg) {
			if m.Method() != sipmsg.MethodOther || m.Count(sipmsg.Contact) != 2 {
				t.Errorf("escapes were resolved: %v, %d Contact", m.Method(), m.Count(sipmsg.Contact))
			}
		},
	},
	{
		name: "lwsdisp", section: "3.1.1.6", text: "OPTIONS sip:user@example.com SIP/2.0\nTo: sip:user@example.com\n" +
			"From: caller<sip:caller@example.com>;tag=323\nMax-Forwards: 70\nCall-ID: lwsdisp.1234abcd@funky.example.com\n" +
			"CSeq: 60 OPTIONS\nVia: SIP/2.0/UDP funky.example.com;branch=z9hG4bKkdjuw\nl: 0\n\n",
		check: func(t *testing.T, m *sipmsg.Msg) {
			nameAddr(t, m, sipmsg.From, "caller", "sip:caller@example.com", "tag=323")
		},
	},
	{
		name: "longreq", section: "3.1.1.7", text: "INVITE sip:user@example.com SIP/2.0\n" +
			"To: \"I have a user name of " + strings.Repeat("extreme", 10) + " proportion\"<sip:user@example.com:6000;" +
			"unknownparam1=very" + strings.Repeat("long", 20) + "value;longparam" + strings.Repeat("name", 25) + "=shortvalue>\n" +
			"F: sip:" + strings.Repeat("amazinglylongcallername", 5) + "@example.net;tag=12" + strings.Repeat("982", 50) + "424;" +
			strings.Repeat("unknownheaderparamname", 10) + "=unknowheaderparamvalue\nCall-ID: longreq.one" + strings.Repeat("really", 20) + "longcallid\n" +
			"CSeq: 3882340 INVITE\nUnknown-" + strings.Repeat("Long-", 20) + "Name: unknown-" + strings.Repeat("long-", 20) + "value; p = v\n" +
			"Via: SIP/2.0/TCP sip33.example.com\nv: SIP/2.0/TCP sip32.example.com\n" +
			strings.Repeat("V: SIP/2.0/TCP sip31.example.com\n", 30) + "Max-Forwards: 70\nContact: <sip:" +
			strings.Repeat("amazinglylongcallername", 5) + "@host5.example.net>\nContent-Type: application/sdp\nl: {CL}\n\n" + tortureSDP,
		check: func(t *testing.T, m *sipmsg.Msg) {
			if m.Count(sipmsg.Via) != 32 {
				t.Errorf("Count(Via) = %d", m.Count(sipmsg.Via))
			}
		},
	},
	{
		name: "dblreq", section: "3.1.1.8", text: "REGISTER sip:example.com SIP/2.0\nTo: sip:j.user@example.com\n" +
			"From: sip:j.user@example.com;tag=43251j3j324\nMax-Forwards: 8\nI: dblreq.0ha0isndaksdj99sdfafnl3lk233412\n" +
			"Contact: sip:j.user@host.example.com\nCSeq: 8 REGISTER\nVia: SIP/2.0/UDP 192.0.2.125;branch=z9hG4bKkdjuw23492\n" +
			"Content-Length: 0\n\nINVITE sip:joe@example.com SIP/2.0\nt: sip:joe@example.com\n\n",
		check: func(t *testing.T, m *sipmsg.Msg) {
			if len(m.Body()) != 0 || !bytes.HasSuffix(m.Bytes(), []byte("Content-Length: 0\r\n\r\n")) {
				t.Errorf("the second request was not cut off")
			}
		},
	},
	{
		name: "semiuri", section: "3.1.1.9", text: "OPTIONS sip:user;par=u%40example.net@example.com SIP/2.0\n" + common +
			"CSeq: 8 OPTIONS\nl: 0\n\n",
		check: func(t *testing.T, m *sipmsg.Msg) {
			u, err := sipmsg.ParseURI(m.RequestURI())
			if err != nil || string(u.User) != "user;par=u%40example.net" || string(u.Host) != "example.com" || u.Params != nil {
				t.Errorf("Request-URI = %q at %q;%q, %v", u.User, u.Host, u.Params, err)
			}
		},
	},
	{
		name: "transports", section: "3.1.1.10", text: "OPTIONS sip:user@example.com SIP/2.0\n" + common + "CSeq: 60 OPTIONS\n" +
			"Via: SIP/2.0/SCTP t2.example.com;branch=z9hG4bKklasjdhf\nVia: SIP/2.0/TLS t3.example.com;branch=z9hG4bK2980unddj\n" +
			"Via: SIP/2.0/UNKNOWN t4.example.com;branch=z9hG4bKasd0f3en\nVia: SIP/2.0/TCP t5.example.com;branch=z9hG4bK0a9idfnee\nl: 0\n\n",
		check: func(t *testing.T, m *sipmsg.Msg) {
			want := []string{"UDP", "SCTP", "TLS", "UNKNOWN", "TCP"}
			for _, r := range m.Rows() {
				if r.ID != sipmsg.Via {
					continue
				}
				if v, err := sipmsg.ParseVia(m.Value(r)); err != nil || string(v.Transport) != want[0] {
					t.Errorf("transport = %q, want %q, %v", v.Transport, want[0], err)
				}
				want = want[1:]
			}
		},
	},
	{
		name: "mpart01", section: "3.1.1.11", text: "MESSAGE sip:kumiko@example.org SIP/2.0\n" + common + "CSeq: 1 MESSAGE\n" +
			"Content-Type: multipart/mixed;boundary=7a9cbec02ceef655\nContent-Length: {CL}\n\n" +
			"--7a9cbec02ceef655\nContent-Type: application/octet-stream\n\n\x00\x01\x82\xff\r\r\x00\n--7a9cbec02ceef655--\n",
		check: func(t *testing.T, m *sipmsg.Msg) {
			if bytes.IndexByte(m.Body(), 0) < 0 {
				t.Error("body lost its NUL")
			}
		},
	},
	{
		name: "unreason", section: "3.1.1.12", text: "SIP/2.0 200 = 2**3 * 5**2 \xd0\xbd\xd0\xbe \xd1\x81\xd1\x82\xd0\xbe\n" + common + "CSeq: 35 INVITE\nl: 0\n\n",
		check: func(t *testing.T, m *sipmsg.Msg) {
			if m.Status() != 200 || string(m.ReasonPhrase()) != "= 2**3 * 5**2 \xd0\xbd\xd0\xbe \xd1\x81\xd1\x82\xd0\xbe" {
				t.Errorf("status = %d %q", m.Status(), m.ReasonPhrase())
			}
		},
	},
	{
		name: "noreason", section: "3.1.1.13", text: "SIP/2.0 100 \n" + common + "CSeq: 35 INVITE\nl: 0\n\n",
		check: func(t *testing.T, m *sipmsg.Msg) {
			if m.Status() != 100 || len(m.ReasonPhrase()) != 0 {
				t.Errorf("status = %d %q", m.Status(), m.ReasonPhrase())
			}
		},
	},

	{
		name: "badinv01", section: "3.1.2.1", text: "INVITE sip:user@example.com SIP/2.0\nTo: sip:j.user@example.com\n" +
			"From: sip:caller@example.net;tag=134161461246\nMax-Forwards: 7\nCall-ID: badinv01.0ha0isndaksdjasdf3234nas\nCSeq: 8 INVITE\n" +
			"Via: SIP/2.0/UDP 192.0.2.15;;,;,,\nContact: \"Joe\" <sip:joe@example.org>;;;;\nl: 0\n\n",
		why: "the Via is refused when it is parsed: the first via-parm is followed by garbage, the second has no protocol; " +
			"the stray semicolons of Contact are harmless and skipped",
		check: func(t *testing.T, m *sipmsg.Msg) {
			v, err := sipmsg.ParseVia(m.Get(sipmsg.Via))
			if err != nil || string(v.Host) != "192.0.2.15" {
				t.Errorf("first via-parm = %q, %v: empty parameters are skipped", v.Host, err)
			}
			if _, err := sipmsg.ParseVia(m.Get(sipmsg.Via)[v.Len+1:]); !errors.Is(err, sipmsg.ErrVia) {
				t.Errorf("second via-parm: %v", err)
			}
		},
	},
	{
		name: "clerr", section: "3.1.2.2", text: "INVITE sip:user@example.com SIP/2.0\n" + common + "CSeq: 8 INVITE\nContent-Length: 9999\n\n" + tortureSDP,
		scan: sipmsg.ErrShortBody,
	},
	{
		name: "ncl", section: "3.1.2.3", text: "INVITE sip:user@example.com SIP/2.0\n" + common + "CSeq: 8 INVITE\nContent-Length: -999\n\n" + tortureSDP,
		scan: sipmsg.ErrContentLength,
	},
	{name: "scalar02", section: "3.1.2.4", text: "REGISTER sip:example.com SIP/2.0\n" + common + "CSeq: 36893488147419103232 REGISTER\n" +
		"Expires: 1000000000000000000000000000000\nl: 0\n\n", scan: sipmsg.ErrCSeq},
	{name: "scalarlg", section: "3.1.2.5", text: "SIP/2.0 503 Service Unavailable\n" + common + "CSeq: 9292394834772304023312 OPTIONS\n" +
		"Retry-After: 949302838503028349304023988\nWarning: 1812 overture \"In Progress\"\nl: 0\n\n", scan: sipmsg.ErrCSeq},
	{
		name: "quotbal", section: "3.1.2.6", text: "INVITE sip:user@example.com SIP/2.0\nTo: \"Mr. J. User <sip:j.user@example.com>\n" +
			"From: sip:caller@example.net;tag=93334\nMax-Forwards: 10\nCall-ID: quotbal.aksdj\nCSeq: 8 INVITE\n" +
			"Via: SIP/2.0/UDP 192.0.2.59:5050;branch=z9hG4bKkdjuw39234\nl: 0\n\n",
		why: "refused when To is parsed; a P-CSCF that does not look at it forwards it unread", check: badNameAddr(sipmsg.To),
	},
	{name: "ltgtruri", section: "3.1.2.7", text: "INVITE <sip:user@example.com> SIP/2.0\n" + common + "CSeq: 8 INVITE\nl: 0\n\n", scan: sipmsg.ErrRequestURI},
	{name: "lwsruri", section: "3.1.2.8", text: "INVITE sip:user@example.com; lr SIP/2.0\n" + common + "CSeq: 8 INVITE\nl: 0\n\n", scan: sipmsg.ErrRequestURI},
	{name: "lwsstart", section: "3.1.2.9", text: "INVITE  sip:user@example.com  SIP/2.0\n" + common + "CSeq: 8 INVITE\nl: 0\n\n", scan: sipmsg.ErrRequestURI},
	{name: "trws", section: "3.1.2.10", text: "OPTIONS sip:remote-target@example.com SIP/2.0  \n" + common + "CSeq: 8 OPTIONS\nl: 0\n\n", scan: sipmsg.ErrStartLine},
	{
		name: "escruri", section: "3.1.2.11", text: "INVITE sip:user@example.com?Route=%3Csip:example.com%3E SIP/2.0\n" + common + "CSeq: 8 INVITE\nl: 0\n\n",
		why: "RFC 3261 §19.1.1 forbids URI headers in a Request-URI, but nothing is ambiguous: the element that resolves the URI may refuse it",
		check: func(t *testing.T, m *sipmsg.Msg) {
			u, err := sipmsg.ParseURI(m.RequestURI())
			if err != nil || string(u.Headers) != "Route=%3Csip:example.com%3E" {
				t.Errorf("headers = %q, %v", u.Headers, err)
			}
		},
	},
	{
		name: "baddate", section: "3.1.2.12", text: "INVITE sip:user@example.com SIP/2.0\n" + common + "CSeq: 8 INVITE\nDate: Fri, 01 Jan 2010 16:00:00 EST\nl: 0\n\n",
		why: "Date is of no interest to a proxy; RFC 4475 allows to ignore it",
	},
	{
		name: "regbadct", section: "3.1.2.13", text: "REGISTER sip:example.com SIP/2.0\n" + common + "CSeq: 8 REGISTER\n" +
			"Contact: sip:user@example.com?Route=%3Csip:sip.example.com%3E\nl: 0\n\n",
		why: "refused when Contact is parsed: a question mark needs <>", check: badNameAddr(sipmsg.Contact),
	},
	{
		name: "badaspec", section: "3.1.2.14", text: "OPTIONS sip:user@example.org SIP/2.0\nVia: SIP/2.0/UDP host4.example.com:5060;branch=z9hG4bKkdju43234\n" +
			"Max-Forwards: 70\nFrom: \"Bell, Alexander\" <sip:a.g.bell@example.com>;tag=433423\n" +
			"To: \"Watson, Thomas\" < sip:t.watson@example.org >\nCall-ID: badaspec.sdf0234n2nds0a099u23h3hnnw009cdkne3\nCSeq: 3923239 OPTIONS\nl: 0\n\n",
		why: "refused when To is parsed", check: badNameAddr(sipmsg.To),
	},
	{
		name: "baddn", section: "3.1.2.15", text: "OPTIONS sip:t.watson@example.org SIP/2.0\nVia: SIP/2.0/UDP c.example.com:5060;branch=z9hG4bKkdjuw\n" +
			"Max-Forwards: 70\nFrom: Bell, Alexander <sip:a.g.bell@example.com>;tag=43\nTo: Watson, Thomas <sip:t.watson@example.org>\n" +
			"Call-ID: baddn.31415@c.example.com\nCSeq: 3923239 OPTIONS\nl: 0\n\n",
		why: "the comma ends the element, so the address reads Bell, which is no URI",
		check: func(t *testing.T, m *sipmsg.Msg) {
			a, err := sipmsg.ParseNameAddr(m.Get(sipmsg.From))
			if err != nil {
				return
			}
			if u, err := sipmsg.ParseURI(a.URI); err == nil {
				t.Errorf("From = %q", u.Host)
			}
		},
	},
	{
		name: "badvers", section: "3.1.2.16", text: "OPTIONS sip:t.watson@example.org SIP/7.0\nVia: SIP/7.0/UDP c.example.com;branch=z9hG4bKkdjuw\n" +
			"Max-Forwards: 70\nFrom: A. Bell <sip:a.g.bell@example.com>;tag=qweoiqpe\nTo: T. Watson <sip:t.watson@example.org>\n" +
			"Call-ID: badvers.31417@c.example.com\nCSeq: 1 OPTIONS\nl: 0\n\n",
		scan: sipmsg.ErrVersion,
		check: func(t *testing.T, m *sipmsg.Msg) { // a 505 can be built and sent
			v, err := sipmsg.ParseVia(m.Get(sipmsg.Via))
			if !errors.Is(err, sipmsg.ErrViaProtocol) || string(v.Host) != "c.example.com" || string(v.Branch) != "z9hG4bKkdjuw" {
				t.Errorf("Via = %q %q, %v", v.Host, v.Branch, err)
			}
		},
	},
	{name: "mismatch01", section: "3.1.2.17", text: "OPTIONS sip:user@example.com SIP/2.0\n" + common + "CSeq: 8 INVITE\nl: 0\n\n", scan: sipmsg.ErrCSeqMethod},
	{name: "mismatch02", section: "3.1.2.18", text: "NEWMETHOD sip:user@example.com SIP/2.0\n" + common + "CSeq: 8 INVITE\nl: 0\n\n", scan: sipmsg.ErrCSeqMethod},
	{name: "bigcode", section: "3.1.2.19", text: "SIP/2.0 4294967301 better not break the receiver\n" + common + "CSeq: 8 INVITE\nl: 0\n\n", scan: sipmsg.ErrStatusCode},

	{
		name: "badbranch", section: "3.2.1", text: "OPTIONS sip:user@example.com SIP/2.0\nTo: sip:user@example.com\nFrom: sip:caller@example.org;tag=33242\n" +
			"Max-Forwards: 3\nVia: SIP/2.0/UDP 192.0.2.1;branch=z9hG4bK\nCall-ID: badbranch.sadonfo23i420jv0as0derf3j3n\nCSeq: 8 OPTIONS\nl: 0\n\n",
		why: "well-formed; that the branch is not unique is the transaction layer's business",
		check: func(t *testing.T, m *sipmsg.Msg) {
			if v, err := sipmsg.ParseVia(m.Get(sipmsg.Via)); err != nil || string(v.Branch) != "z9hG4bK" {
				t.Errorf("branch = %q, %v", v.Branch, err)
			}
		},
	},

	{name: "insuf", section: "3.3.1", text: "INVITE sip:user@example.com SIP/2.0\nCSeq: 193942 INVITE\n" +
		"Via: SIP/2.0/UDP 192.0.2.95;branch=z9hG4bKkdj.insuf\nContent-Type: application/sdp\nl: {CL}\n\n" + tortureSDP, scan: sipmsg.ErrNoFrom},
	{
		name: "unkscm", section: "3.3.2", text: "OPTIONS nobodyKnowsThisScheme:totallyopaquecontent SIP/2.0\n" + common + "CSeq: 3923423 OPTIONS\nl: 0\n\n",
		check: func(t *testing.T, m *sipmsg.Msg) {
			u, err := sipmsg.ParseURI(m.RequestURI())
			if err != nil || u.IsSIP() || u.IsTel() || string(u.Scheme) != "nobodyKnowsThisScheme" {
				t.Errorf("scheme = %q, %v", u.Scheme, err)
			}
		},
	},
	{name: "novelsc", section: "3.3.3", text: "OPTIONS soap.beep://192.0.2.103:3002 SIP/2.0\n" + common + "CSeq: 8 OPTIONS\nl: 0\n\n"},
	{
		name: "unksm2", section: "3.3.4", text: "REGISTER sip:example.com SIP/2.0\nTo: isbn:2983792873\nFrom: <http://www.example.com>;tag=3234233\n" +
			"Call-ID: unksm2.daksdj@hyphenated-host.example.com\nCSeq: 234902 REGISTER\nMax-Forwards: 70\n" +
			"Via: SIP/2.0/UDP 192.0.2.21:5060;branch=z9hG4bKkdjuw\nContact: <name:John_Smith>\nl: 0\n\n",
		check: func(t *testing.T, m *sipmsg.Msg) {
			nameAddr(t, m, sipmsg.To, "", "isbn:2983792873", "")
			nameAddr(t, m, sipmsg.Contact, "", "name:John_Smith", "")
		},
	},
	{
		name: "bext01", section: "3.3.5", text: "OPTIONS sip:user@example.com SIP/2.0\n" + common + "CSeq: 8 OPTIONS\n" +
			"Require: nothingSupportsThis, nothingSupportsThisEither\nProxy-Require: noProxiesSupportThis, norDoAnyProxiesSupportThis\nl: 0\n\n",
		check: func(t *testing.T, m *sipmsg.Msg) {
			if !sipmsg.HasToken(m.Get(sipmsg.ProxyRequire), "nordoanyproxiessupportthis") {
				t.Error("option tag not found")
			}
		},
	},
	{name: "invut", section: "3.3.6", text: "INVITE sip:user@example.com SIP/2.0\n" + common + "CSeq: 8 INVITE\nContent-Type: application/unknownformat\nContent-Length: {CL}\n\n<audio>\n <pcmu port=\"443\"/>\n</audio>\n"},
	{name: "regaut01", section: "3.3.7", text: "REGISTER sip:example.com SIP/2.0\n" + common + "CSeq: 9338 REGISTER\n" +
		"Authorization: NoOneKnowsThisScheme opaque-data=here\nContent-Length: 0\n\n"},
	{
		name: "multi01", section: "3.3.8", text: "INVITE sip:user@company.com SIP/2.0\nContact: <sip:caller@host25.example.net>\nVia: SIP/2.0/UDP 192.0.2.25;branch=z9hG4bKkdjuw\n" +
			"Max-Forwards: 70\nCSeq: 5 INVITE\nCall-ID: multi01.98asdh@192.0.2.1\nCSeq: 59 INVITE\nCall-ID: multi01.98asdh@192.0.2.2\n" +
			"From: sip:caller@example.com;tag=3413415\nTo: sip:user@example.com\nTo: sip:other@example.net\nFrom: sip:caller@example.net;tag=2923420123\nl: 0\n\n",
		scan: sipmsg.ErrDuplicate,
	},
	{
		name: "mcl01", section: "3.3.9", text: "OPTIONS sip:user@example.com SIP/2.0\n" + common + "CSeq: 8 OPTIONS\nContent-Length: 13\nContent-Length: 5\n\nThere's no way to know",
		scan: sipmsg.ErrDuplicate,
	},
	{
		name: "bcast", section: "3.3.10", text: "SIP/2.0 200 OK\nVia: SIP/2.0/UDP 192.0.2.198;branch=z9hG4bK1324923\nVia: SIP/2.0/UDP 255.255.255.255;branch=z9hG4bK1saber23\n" +
			"Call-ID: bcast.0384840201234ksdfak3j2erwedfsASdf\nCSeq: 35 INVITE\nFrom: sip:user@example.com;tag=11141343\nTo: sip:user@example.edu;tag=2229\nl: 0\n\n",
		why: "well-formed; where a response may be sent is for the proxy to say",
		check: func(t *testing.T, m *sipmsg.Msg) {
			last, _ := m.Last(sipmsg.Via)
			v, err := sipmsg.ParseVia(m.Value(last))
			if a, ok := sipmsg.ParseAddr(v.Host); err != nil || !ok || a.String() != "255.255.255.255" {
				t.Errorf("host = %v, %v", a, err)
			}
		},
	},
	{
		name: "zeromf", section: "3.3.11", text: "OPTIONS sip:user@example.com SIP/2.0\nTo: sip:user@example.com\nFrom: sip:caller@example.net;tag=3ghsd41\n" +
			"Call-ID: zeromf.jfasdlfnm2o2l43r5u0asdfas\nCSeq: 39234321 OPTIONS\nVia: SIP/2.0/UDP host1.example.com;branch=z9hG4bKkdjuw2349i\nMax-Forwards: 0\nl: 0\n\n",
		check: func(t *testing.T, m *sipmsg.Msg) {
			if n, ok := sipmsg.ParseUint(m.Get(sipmsg.MaxForwards)); !ok || n != 0 {
				t.Errorf("Max-Forwards = %d, %v", n, ok)
			}
		},
	},
	{
		name: "cparam01", section: "3.3.12", text: "REGISTER sip:example.com SIP/2.0\n" + common + "CSeq: 8 REGISTER\nContact: sip:+19725552222@gw1.example.net;unknownparam\nl: 0\n\n",
		check: func(t *testing.T, m *sipmsg.Msg) { // the parameter is the header's, not the URI's
			nameAddr(t, m, sipmsg.Contact, "", "sip:+19725552222@gw1.example.net", "unknownparam")
		},
	},
	{
		name: "cparam02", section: "3.3.13", text: "REGISTER sip:example.com SIP/2.0\n" + common + "CSeq: 8 REGISTER\nContact: <sip:+19725552222@gw1.example.net;unknownparam>\nl: 0\n\n",
		check: func(t *testing.T, m *sipmsg.Msg) {
			nameAddr(t, m, sipmsg.Contact, "", "sip:+19725552222@gw1.example.net;unknownparam", "")
		},
	},
	{
		name: "regescrt", section: "3.3.14", text: "REGISTER sip:example.com SIP/2.0\n" + common + "CSeq: 8 REGISTER\nContact: <sip:user@example.com?Route=%3Csip:sip.example.com%3E>\nl: 0\n\n",
		check: func(t *testing.T, m *sipmsg.Msg) {
			nameAddr(t, m, sipmsg.Contact, "", "sip:user@example.com?Route=%3Csip:sip.example.com%3E", "")
		},
	},
	{
		name: "sdp01", section: "3.3.15", text: "INVITE sip:user@example.com SIP/2.0\n" + common + "CSeq: 8 INVITE\nAccept: text/nobodyKnowsThis\nContent-Type: application/sdp\nl: {CL}\n\n" + tortureSDP,
		check: func(t *testing.T, m *sipmsg.Msg) { get(t, m, sipmsg.Accept, "text/nobodyKnowsThis") },
	},
	{
		name: "inv2543", section: "3.4.1", text: "INVITE sip:UserB@example.com SIP/2.0\nVia: SIP/2.0/UDP iftgw.example.com\nFrom: <sip:+13035551111@ift.client.example.net;user=phone>\n" +
			"Record-Route: <sip:UserB@example.com;maddr=ss1.example.com>\nTo: sip:+16505552222@ss1.example.net;user=phone\n" +
			"Call-ID: inv2543.1717@ift.client.example.com\nCSeq: 56 INVITE\nContent-Type: application/sdp\n\n" + tortureSDP,
		check: func(t *testing.T, m *sipmsg.Msg) {
			if v, err := sipmsg.ParseVia(m.Get(sipmsg.Via)); err != nil || v.Branch != nil {
				t.Errorf("branch = %q, %v", v.Branch, err)
			}
			if !bytes.Equal(m.Body(), crlf(tortureSDP)) {
				t.Errorf("body = %q", m.Body())
			}
		},
	},
}

func TestTorture(t *testing.T) {
	for _, x := range tortures {
		t.Run(x.name, func(t *testing.T) {
			var m sipmsg.Msg
			b := x.bytes()
			if err := m.Scan(b); !errors.Is(err, x.scan) {
				t.Fatalf("RFC 4475 §%s: Scan = %v, want %v %s\n%s", x.section, err, x.scan, x.why, b)
			}
			checkIndex(t, &m)
			if x.check != nil {
				x.check(t, &m)
			}
			// On a stream all of them can be cut, but those that do not say where they end.
			kind, n, err := sipmsg.Frame(b, 65535)
			switch x.name {
			case "ncl", "mcl01", "inv2543":
				if kind != sipmsg.FrameBad {
					t.Errorf("Frame = %v", kind)
				}
			case "clerr":
				if kind != sipmsg.FrameNone {
					t.Errorf("Frame = %v", kind)
				}
			default:
				if kind != sipmsg.FrameMessage || n > len(b) {
					t.Errorf("Frame = %v, %d of %d, %v", kind, n, len(b), err)
				}
			}
		})
	}
}
