package regevent

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

const identity = "sip:+15550100001@ims.example"

var (
	local4 = Local{
		URI: "sip:pcscf.ims.example", Contact: "sip:f-7c1e@10.0.1.5:5060",
		SentBy: netip.MustParseAddrPort("10.0.1.5:5060"), Transport: ims.UDP,
	}
	local6 = Local{
		URI: "sip:pcscf.ims.example", Contact: "sip:f-7c1e@[2001:db8::5]:5061;transport=tcp",
		SentBy: netip.MustParseAddrPort("[2001:db8::5]:5061"), Transport: ims.TCP,
	}
	scscf = netip.MustParseAddrPort("10.0.1.7:6060")
)

func message(t testing.TB, lines ...string) *sipmsg.Msg {
	t.Helper()
	m := new(sipmsg.Msg)
	if err := m.Scan([]byte(strings.Join(lines, "\r\n") + "\r\n\r\n")); err != nil {
		t.Fatalf("%v in %q", err, lines)
	}
	return m
}

func dialog(t testing.TB, routes ...string) *Dialog {
	t.Helper()
	d, err := NewDialog(identity, "sub1@10.0.1.5", "p1", routes)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// accepted is a 200 to SUBSCRIBE.
func accepted(t testing.TB, extra ...string) *sipmsg.Msg {
	t.Helper()
	return message(t, append([]string{
		"SIP/2.0 200 OK", "Via: SIP/2.0/UDP 10.0.1.5:5060;branch=z9hG4bK1", "From: <sip:pcscf.ims.example>;tag=p1",
		"To: <" + identity + ">;tag=s1", "Call-ID: sub1@10.0.1.5", "CSeq: 1 SUBSCRIBE",
	}, extra...)...)
}

// notify is a NOTIFY; lines that begin like one of its own replace that.
func notify(t testing.TB, extra ...string) *sipmsg.Msg {
	t.Helper()
	lines := []string{
		"NOTIFY sip:f-7c1e@10.0.1.5:5060 SIP/2.0", "Via: SIP/2.0/UDP 10.0.1.7:6060;branch=z9hG4bKn1;rport", "Max-Forwards: 70",
		"From: <" + identity + ">;tag=s1", "To: <sip:pcscf.ims.example>;tag=p1", "Call-ID: sub1@10.0.1.5", "CSeq: 1 NOTIFY",
		"Contact: <sip:scscf.ims.example:6060>", "Event: reg", "Subscription-State: active;expires=4200",
	}
	body := ""
	for _, x := range extra {
		name, _, _ := strings.Cut(x, ":")
		if name == "body" {
			body = strings.TrimPrefix(x, "body:")
			continue
		}
		replaced := false
		for i, l := range lines {
			if strings.HasPrefix(l, name+":") && !strings.HasPrefix(x, "Via") {
				lines[i], replaced = x, true
			}
		}
		if !replaced {
			lines = append(lines, x)
		}
	}
	m := new(sipmsg.Msg)
	if err := m.Scan([]byte(strings.Join(lines, "\r\n") + "\r\n\r\n" + body)); err != nil {
		t.Fatal(err)
	}
	return m
}

// wellFormed scans a message that we built.
func wellFormed(t testing.TB, b []byte) *sipmsg.Msg {
	t.Helper()
	m := new(sipmsg.Msg)
	if err := m.Scan(b); err != nil {
		t.Fatalf("%v in\n%s", err, b)
	}
	if kind, n, err := sipmsg.Frame(b, 1<<16); kind != sipmsg.FrameMessage || n != len(b) {
		t.Fatalf("frame %s, %d of %d, %v in\n%s", kind, n, len(b), err, b)
	}
	return m
}

// TestMessages compares whole messages through the life of a dialog.
func TestMessages(t *testing.T) {
	check := func(name string, b []byte) {
		t.Helper()
		wellFormed(t, b)
		golden(t, "testdata/"+name+".sip", b)
	}
	const charging = `icid-value="5b6e1c0a9d2f";icid-generated-at=10.0.1.5`
	d := dialog(t)
	check("subscribe", d.Subscribe(nil, &local4, Request{Branch: "z9hG4bK1", Expires: 600600, Charging: charging}))
	if err := d.Accepted(accepted(t, "Expires: 600600", "Contact: <sip:scscf.ims.example:6060>",
		"Record-Route: <sip:10.0.1.7;lr>, <sip:10.0.1.9:5070;lr;ftag=p1>;x=y", "Record-Route: <sip:10.0.1.8;lr>")); err != nil {
		t.Fatal(err)
	}
	n := notify(t, "Via: SIP/2.0/UDP 10.0.1.3;branch=z9hG4bKn0", "Record-Route: <sip:10.0.1.8;lr>")
	if v := d.Notify(n); !v.Process() {
		t.Fatalf("%+v", v)
	}
	check("notify_200", d.Answer(nil, &local4, n, scscf, 200))
	check("refresh", d.Subscribe(nil, &local4, Request{Branch: "z9hG4bK2", Expires: 600600}))
	check("unsubscribe", d.Subscribe(nil, &local4, Request{Branch: "z9hG4bK3"}))
	if d.NextHop() != "sip:10.0.1.8;lr" || d.CallID() != "sub1@10.0.1.5" {
		t.Error(d.NextHop(), d.CallID())
	}

	routed := dialog(t, "sip:orig@scscf.ims.example:6060;lr")
	check("subscribe_routed", routed.Subscribe(nil, &local6, Request{Branch: "z9hG4bK4", Expires: 4200}))
	if routed.NextHop() != "sip:orig@scscf.ims.example:6060;lr" || routed.Established() {
		t.Error(routed.NextHop())
	}
	check("notify_489", routed.Answer(nil, &local6, notify(t, "Event: presence"), scscf, 489))
	check("notify_415", routed.Answer(nil, &local6, notify(t, "Content-Type: text/plain", "body:x"), scscf, 415))
	check("notify_481", routed.Answer(nil, &local6, notify(t, "To: <sip:pcscf.ims.example>", "Record-Route: <sip:10.0.1.8;lr>"), scscf, 481))

	// The NOTIFY makes the dialog when it comes first; its route set is in its own order.
	first := dialog(t, "sip:orig@scscf.ims.example:6060;lr")
	first.Subscribe(nil, &local4, Request{Branch: "z9hG4bK5", Expires: 4200})
	if v := first.Notify(notify(t, "Record-Route: <sip:10.0.1.8;lr>, <sip:10.0.1.7;lr>")); !v.Process() || !first.Established() {
		t.Fatalf("%+v", v)
	}
	if err := first.Accepted(accepted(t, "Record-Route: <sip:192.0.2.66;lr>", "Contact: <sip:scscf2.ims.example>")); err != nil {
		t.Fatal(err)
	}
	check("refresh_notify_first", first.Subscribe(nil, &local4, Request{Branch: "z9hG4bK6", Expires: 4200}))
}

func TestNewDialogRefuses(t *testing.T) {
	for _, tt := range []struct {
		identity, callID, tag string
		routes                []string
		want                  error
	}{
		{"", "c", "t", nil, ErrTarget},
		{"mailto:a@b.example", "c", "t", nil, ErrTarget},
		{"sip:a@b.example>\r\nX: y", "c", "t", nil, ErrTarget},
		{identity, "c\r\nX: y", "t", nil, ErrValue},
		{identity, "", "t", nil, ErrValue},
		{identity, "c", "t;x", nil, ErrValue},
		{identity, "c", "t", []string{"sip:a@b.example> , <sip:evil"}, ErrRoute},
		{identity, "c", "t", []string{"tel:+1"}, ErrRoute},
		{identity, "c", "t", make([]string, maxRoutes+1), ErrRoute},
	} {
		if d, err := NewDialog(tt.identity, tt.callID, tt.tag, tt.routes); !errors.Is(err, tt.want) || d != nil {
			t.Errorf("%+v: %v", tt, err)
		}
	}
	if _, err := NewDialog("tel:+15550100001", "c", "t", nil); err != nil {
		t.Error(err)
	}
}

func TestAccepted(t *testing.T) {
	d := dialog(t)
	if err := d.Accepted(accepted(t, "Record-Route: <mailto:a@b>")); !errors.Is(err, ErrRoute) || d.Established() {
		t.Error(err)
	}
	if err := d.Accepted(accepted(t, strings.Repeat("Record-Route: <sip:a>\r\n", maxRoutes)+"Record-Route: <sip:a>")); !errors.Is(err, ErrRoute) {
		t.Error(err)
	}
	for _, to := range []string{"To: <sip:a@b>", "To: <sip:a@b>;tag=", `To: <sip:a@b>;tag="a;b"`} {
		m := message(t, "SIP/2.0 200 OK", "Via: SIP/2.0/UDP 10.0.1.5;branch=z9hG4bK1", "From: <sip:p>;tag=p1", to, "Call-ID: c", "CSeq: 1 SUBSCRIBE")
		if err := d.Accepted(m); !errors.Is(err, ErrForked) || d.Established() {
			t.Errorf("%s: %v", to, err)
		}
	}
	if err := d.Accepted(accepted(t)); err != nil {
		t.Error(err)
	}
	if d.NextHop() != identity { // no Contact: there is nothing better
		t.Error(d.NextHop())
	}
	other := message(t, "SIP/2.0 200 OK", "Via: SIP/2.0/UDP 10.0.1.5;branch=z9hG4bK1", "From: <sip:p>;tag=p1", "To: <sip:a>;tag=s2", "Call-ID: c", "CSeq: 1 SUBSCRIBE")
	if err := d.Accepted(other); !errors.Is(err, ErrForked) {
		t.Error(err)
	}
}

func TestReadAnswer(t *testing.T) {
	for _, tt := range []struct {
		status string
		extra  []string
		want   Event
		final  bool
	}{
		{"100 Trying", nil, Event{}, false},
		{"202 Accepted", []string{"Expires: 60"}, Event{Kind: Accepted, Expires: 60, HasExpires: true}, true},
		{"200 OK", nil, Event{Kind: Accepted}, true},
		{"200 OK", []string{"Expires: soon"}, Event{Kind: Accepted}, true},
		{"302 Moved", nil, Event{Kind: Refused, Status: 302}, true},
		{"423 Interval Too Brief", []string{"Min-Expires: 7200"}, Event{Kind: Refused, Status: 423, MinExpires: 7200}, true},
		{"503 Unavailable", []string{"Retry-After: 120 (maintenance);duration=60"}, Event{Kind: Refused, Status: 503, RetryAfter: 120}, true},
		{"503 Unavailable", []string{"Retry-After: 99999999999"}, Event{Kind: Refused, Status: 503, RetryAfter: 86400}, true},
		{"503 Unavailable", []string{"Retry-After: later"}, Event{Kind: Refused, Status: 503}, true},
	} {
		m := message(t, append([]string{
			"SIP/2.0 " + tt.status, "Via: SIP/2.0/UDP 10.0.1.5;branch=z9hG4bK1", "From: <sip:p>;tag=p1", "To: <sip:a>;tag=s1",
			"Call-ID: c", "CSeq: 1 SUBSCRIBE",
		}, tt.extra...)...)
		if got, final := ReadAnswer(m); got != tt.want || final != tt.final {
			t.Errorf("%s: %+v, %v", tt.status, got, final)
		}
	}
}

func TestNotify(t *testing.T) {
	const doc = "Content-Type: application/reginfo+xml"
	for _, tt := range []struct {
		name  string
		extra []string
		want  Verdict
	}{
		{"active", nil, Verdict{Event: Event{Kind: NotifyActive, Expires: 4200, HasExpires: true}}},
		{"document", []string{doc + ";charset=utf-8", "body:<reginfo/>"}, Verdict{Event: Event{Kind: NotifyActive, Expires: 4200, HasExpires: true, Body: Document}}},
		{"other body", []string{"Content-Type: text/plain", "body:x"}, Verdict{Event: Event{Kind: NotifyActive, Expires: 4200, HasExpires: true, Body: Unsupported}}},
		{"body of no type", []string{"body:x"}, Verdict{Event: Event{Kind: NotifyActive, Expires: 4200, HasExpires: true, Body: Unsupported}}},
		{"compressed", []string{doc, "Content-Encoding: gzip", "body:x"}, Verdict{Event: Event{Kind: NotifyActive, Expires: 4200, HasExpires: true, Body: Unsupported}}},
		{"not compressed", []string{doc, "Content-Encoding: identity", "body:x"}, Verdict{Event: Event{Kind: NotifyActive, Expires: 4200, HasExpires: true, Body: Document}}},
		{"no expiry", []string{"Subscription-State: Active"}, Verdict{Event: Event{Kind: NotifyActive}}},
		{"bad expiry", []string{"Subscription-State: active;expires=-1"}, Verdict{Event: Event{Kind: NotifyActive}}},
		{"pending", []string{"Subscription-State: pending ; expires=5"}, Verdict{Event: Event{Kind: NotifyPending, Expires: 5, HasExpires: true}}},
		{"terminated", []string{"Subscription-State: terminated;reason=Probation;retry-after=60"}, Verdict{Event: Event{Kind: NotifyTerminated, Reason: Probation, RetryAfter: 60}}},
		{"unknown reason", []string{"Subscription-State: terminated;reason=tired"}, Verdict{Event: Event{Kind: NotifyTerminated}}},
		{"unknown state", []string{"Subscription-State: asleep"}, Verdict{Status: 400}},
		{"no state", []string{"Subscription-State: "}, Verdict{Status: 400}},
		{"bad route", []string{"Record-Route: <tel:+1>"}, Verdict{Status: 400}},
		{"event", []string{"Event: presence"}, Verdict{Status: 489}},
		{"event with parameters", []string{"Event: reg;x=y"}, Verdict{Event: Event{Kind: NotifyActive, Expires: 4200, HasExpires: true}}},
		{"Call-ID", []string{"Call-ID: other"}, Verdict{Status: 481}},
		{"our tag", []string{"To: <sip:pcscf.ims.example>;tag=p2"}, Verdict{Status: 481}},
		{"no tag", []string{"From: <sip:a@b>"}, Verdict{Status: 481}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := dialog(t)
			d.Subscribe(nil, &local4, Request{Branch: "z9hG4bK1", Expires: 1})
			if diff := cmp.Diff(tt.want, d.Notify(notify(t, tt.extra...))); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if d.Established() != tt.want.Process() {
				t.Error("a NOTIFY that is refused makes no dialog")
			}
		})
	}
}

// TestNotifySequence: requests in order, out of order, again, and of another dialog.
func TestNotifySequence(t *testing.T) {
	d := dialog(t)
	for _, tt := range []struct {
		extra []string
		want  int // 0: to be processed
	}{
		{[]string{"CSeq: 10 NOTIFY"}, 0},
		{[]string{"CSeq: 10 NOTIFY"}, 200},
		{[]string{"CSeq: 9 NOTIFY"}, 500},
		{[]string{"CSeq: 12 NOTIFY", "From: <sip:a@b>;tag=s2"}, 481},
		{[]string{"CSeq: 12 NOTIFY", "Contact: <sip:scscf2.ims.example>"}, 0},
		{[]string{"CSeq: 11 NOTIFY"}, 500},
	} {
		if v := d.Notify(notify(t, tt.extra...)); v.Status != tt.want {
			t.Errorf("%v: %d", tt.extra, v.Status)
		}
	}
	if d.NextHop() != "sip:scscf2.ims.example" {
		t.Error(d.NextHop())
	}
	// A retransmission gets the answer that the request got.
	bad := notify(t, "CSeq: 13 NOTIFY")
	if v := d.Notify(bad); !v.Process() {
		t.Fatal(v.Status)
	}
	d.Answer(nil, &local4, bad, scscf, 400)
	if v := d.Notify(bad); v.Status != 400 {
		t.Error(v.Status)
	}
}

// TestReceived: the top Via of an answer says where the request came from.
func TestReceived(t *testing.T) {
	for _, tt := range []struct{ via, want string }{
		{"SIP/2.0/UDP 10.0.1.7:6060;branch=z9hG4bKa", "SIP/2.0/UDP 10.0.1.7:6060;branch=z9hG4bKa"},
		{"SIP/2.0/UDP scscf:6060;branch=z9hG4bKa", "SIP/2.0/UDP scscf:6060;branch=z9hG4bKa;received=10.0.1.7"},
		{"SIP/2.0/UDP 10.0.1.7;rport;branch=z9hG4bKa", "SIP/2.0/UDP 10.0.1.7;rport=6060;branch=z9hG4bKa;received=10.0.1.7"},
		{"SIP/2.0/UDP 10.9.9.9;received=1.2.3.4;branch=z9hG4bKa;rport", "SIP/2.0/UDP 10.9.9.9;received=10.0.1.7;branch=z9hG4bKa;rport=6060"},
		{"SIP/2.0/UDP 10.9.9.9;branch=z9hG4bKa, SIP/2.0/UDP b;branch=z9hG4bKb", "SIP/2.0/UDP 10.9.9.9;branch=z9hG4bKa;received=10.0.1.7, SIP/2.0/UDP b;branch=z9hG4bKb"},
		{"rubbish", "rubbish"},
	} {
		if got := string(received(nil, []byte(tt.via), scscf)); got != tt.want {
			t.Errorf("%q, want %q", got, tt.want)
		}
	}
}

// FuzzNotify: no panic on anything that the scanner takes; answers are well-formed and have no header field more than
// they should; the SUBSCRIBE that follows holds nothing but what may be repeated.
func FuzzNotify(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		m := new(sipmsg.Msg)
		if m.Scan(b) != nil {
			return
		}
		d := dialog(t)
		d.Subscribe(nil, &local4, Request{Branch: "z9hG4bK1", Expires: 1})
		ReadAnswer(m)
		if !m.IsRequest() {
			if d.Accepted(m) != nil && d.Established() {
				t.Fatal("a dialog in spite of the error")
			}
		} else {
			v := d.Notify(m)
			if v.Process() != d.Established() {
				t.Fatalf("%+v", v)
			}
			for _, status := range []int{200, v.Status, 489, 415, 999} {
				if status == 0 {
					continue
				}
				out := d.Answer(nil, &local4, m, scscf, status)
				if a := new(sipmsg.Msg); a.Scan(out) == nil && (a.Status() != status || a.Count(sipmsg.Via) != m.Count(sipmsg.Via) ||
					a.Count(sipmsg.ContentLength) != 1 || len(a.Body()) > 0 || a.Count(sipmsg.Contact) > 1) {
					t.Fatalf("answer\n%s", out)
				}
			}
		}
		s := wellFormed(t, d.Subscribe(nil, &local4, Request{Branch: "z9hG4bK2", Expires: 1}))
		if n := len(s.Rows()); n != 12+s.Count(sipmsg.Route) || s.Count(sipmsg.Route) > maxRoutes {
			t.Fatalf("%d rows in\n%s", n, s.Bytes())
		}
	})
}
