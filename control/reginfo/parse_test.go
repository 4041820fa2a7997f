package reginfo

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	const kamailioURI = "sip:001010000000001@10.45.0.7:6300;alias=10.45.0.7~6300~1"
	kamailio := func(params ...Param) []Contact {
		return []Contact{{
			ID: "0x7f8844b9e9e0", State: Active, Event: Registered, Expires: Number{599999, true}, Q: "0.500",
			CallID: "reg1@10.45.0.7", URI: kamailioURI, UnknownParams: params,
		}}
	}
	gone := func(event Event) []Contact {
		return []Contact{{ID: "0x7f8844b9e9e0", State: Terminated, Event: event, Expires: Number{0, true}, URI: kamailioURI}}
	}
	alice := func(event Event, params ...Param) []Contact {
		return []Contact{{
			ID: "0xb4d2f3a0", State: Active, Event: event, Expires: Number{3600, true},
			URI: "sip:alice@192.0.2.7:6300;transport=udp", UnknownParams: params,
		}}
	}
	for _, tt := range []struct {
		name, text string
		want       Document
	}{
		{"kamailio", kamailioFull, Document{Versioned: true, State: Full, Registrations: []Registration{
			{"sip:001010000000001@ims.example", "0x7f8844b8f5a8", Active, kamailio(
				Param{"+sip.instance", `"<urn:gsma:imei:35175605-123456-0>"`}, Param{"reg-id", `"1"`},
				Param{"+g.3gpp.smsip", ""})},
			{"tel:+15550100001", "0x7f8844b8f6b0", Active, kamailio()},
		}}},
		{"kamailio, terminated by the HSS", kamailioGone, Document{Version: 1, Versioned: true, State: Full, Registrations: []Registration{
			{"sip:001010000000001@ims.example", "0x7f8844b8f5a8", Terminated, gone(Unregistered)},
			{"tel:+15550100001", "0x7f8844b8f6b0", Terminated, gone(Unregistered)},
		}}},
		{"OpenIMSCore", openIMS, Document{Version: 7, Versioned: true, State: Full, Registrations: []Registration{
			{"sip:alice@open-ims.test", "0xb4d2f0c8", Active, alice(Registered, Param{"+g.3gpp.cs-voice", ""})},
			{"sip:alice.work@open-ims.test", "0xb4d2f1d0", Active, alice(Created)},
			{"tel:+49301234567", "0xb4d2f2d8", Active, alice(Created)},
		}}},
		{"GRUUs and extensions", gruu, Document{Versioned: true, State: Full, Registrations: []Registration{
			{"sip:bob@home1.example", "a7", Active, []Contact{{
				ID: "76", State: Active, Event: Registered, DurationRegistered: Number{7322, true},
				Expires: Number{3278, true}, Q: "0.8", CallID: "c1@[2001:db8::7]", CSeq: Number{54301, true},
				URI: "sip:[2001:db8::7]:6300;comp=sigcomp", DisplayName: `Bob & "Co"`,
				UnknownParams: []Param{
					{"+sip.instance", `"<urn:uuid:f81d4fae-7dec-11d0-a765-00a0c91e6bf6>"`}, {"reg-id", "2"},
				},
				PubGRUU:  "sip:bob@home1.example;gr=urn:uuid:f81d4fae-7dec-11d0-a765-00a0c91e6bf6",
				TempGRUU: "sip:tgruu.7hs@home1.example;gr", FirstCSeq: Number{54301, true},
			}}},
		}}},
		{"prefixes", prefixed, Document{Version: 2, Versioned: true, State: Partial, Registrations: []Registration{
			{"sip:bob@home1.example", "a7", Active, []Contact{{
				ID: "76", State: Active, Event: Shortened, Expires: Number{60, true}, URI: "sip:bob@192.0.2.9",
			}}},
		}}},
		{"required parts left out", bare, Document{State: Full, Registrations: []Registration{
			{"sip:a@x.example", "sip:a@x.example", Active, []Contact{{ID: "sip:a@192.0.2.1", State: Active, URI: "sip:a@192.0.2.1"}}},
		}}},
		{
			"nothing registered", `<reginfo xmlns="urn:ietf:params:xml:ns:reginfo" version="4294967295" state="full"/>`,
			Document{Version: 1<<32 - 1, Versioned: true, State: Full},
		},
		{
			"unknown event, huge number, control characters",
			`<reginfo version="1" state="partial"><registration aor="sip:a@x&#10;X: y" id="1" state="terminated">` +
				`<contact id="2" state="terminated" event="vanished" expires="99999999999999999999"><uri>sip:a&#x85;@x</uri></contact>` +
				`</registration></reginfo>`,
			Document{Version: 1, Versioned: true, State: Partial, Registrations: []Registration{
				{"sip:a@x X: y", "1", Terminated, []Contact{{
					ID: "2", State: Terminated, Expires: Number{1<<32 - 1, true}, URI: "sip:a @x",
				}}},
			}},
		},
		{
			"another encoding",
			"<?xml version=\"1.0\" encoding=\"ISO-8859-1\"?><reginfo version=\"1\" state=\"full\">" +
				"<registration aor=\"sip:a@x\" id=\"1\" state=\"active\"><contact id=\"2\" state=\"active\"><uri>sip:a@y</uri>" +
				"<display-name>Ren\xe9</display-name></contact></registration></reginfo>",
			Document{Version: 1, Versioned: true, State: Full, Registrations: []Registration{
				{"sip:a@x", "1", Active, []Contact{{ID: "2", State: Active, URI: "sip:a@y", DisplayName: "René"}}},
			}},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Parse([]byte(tt.text))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(&tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestParams(t *testing.T) {
	for _, tt := range []struct{ text, instance, regID string }{
		{kamailioFull, "urn:gsma:imei:35175605-123456-0", "1"},
		{gruu, "urn:uuid:f81d4fae-7dec-11d0-a765-00a0c91e6bf6", "2"},
		{openIMS, "", ""},
	} {
		d, err := Parse([]byte(tt.text))
		if err != nil {
			t.Fatal(err)
		}
		c := &d.Registrations[0].Contacts[0]
		if c.Instance() != tt.instance || c.RegID() != tt.regID {
			t.Errorf("instance %q, reg-id %q, want %q and %q", c.Instance(), c.RegID(), tt.instance, tt.regID)
		}
	}
	c := Contact{UnknownParams: []Param{{"+G.3GPP.SMSIP", ""}}}
	if _, ok := c.Param("+g.3gpp.smsip"); !ok {
		t.Error("names are case-sensitive")
	}
}

// root and the others wrap a part in what must be around it.
func root(inner string) string { return `<reginfo version="0" state="full">` + inner + `</reginfo>` }

func registration(inner string) string {
	return root(`<registration aor="sip:a@x" id="1" state="active">` + inner + `</registration>`)
}

func contact(inner string) string {
	return registration(`<contact id="2" state="active" event="registered"><uri>sip:a@y</uri>` + inner + `</contact>`)
}

func TestParseRefuses(t *testing.T) {
	billion := `<?xml version="1.0"?><!DOCTYPE r [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>`
	for _, tt := range []struct {
		name, text string
		want       error
		says       string
	}{
		{"nothing", "", ErrSyntax, "no reginfo"},
		{"no XML", "SIP/2.0 200 OK", ErrSyntax, "text outside"},
		{"another document", `<presence xmlns="urn:ietf:params:xml:ns:pidf"/>`, ErrSyntax, `"presence"`},
		{"another namespace", `<reginfo xmlns="urn:example:other" version="0" state="full"/>`, ErrSyntax, "root element"},
		{"unclosed", `<reginfo version="0" state="full">`, ErrSyntax, "EOF"},
		{"two roots", root("") + root(""), ErrSyntax, "more than one root"},
		{"text behind", root("") + "x", ErrSyntax, "text outside"},
		{"entities", billion + contact("&b;"), ErrSyntax, "document type"},
		{"external entity", `<!DOCTYPE r SYSTEM "file:///etc/passwd">` + root(""), ErrSyntax, "document type"},
		{"undefined entity", contact("<unknown-param name=\"a\">&nbsp;</unknown-param>"), ErrSyntax, "nbsp"},
		{"encoding", `<?xml version="1.0" encoding="EBCDIC"?>` + root(""), ErrSyntax, "EBCDIC"},
		{"not UTF-8", contact("\xff"), ErrSyntax, "UTF-8"},
		{"NUL", root("\x00"), ErrSyntax, "character"},
		{"no document state", `<reginfo version="0"/>`, ErrSyntax, "document state"},
		{"document state", `<reginfo version="0" state="FULL"/>`, ErrSyntax, `"FULL"`},
		{"version", `<reginfo version="-1" state="full"/>`, ErrSyntax, `"-1"`},
		{"version too large", `<reginfo version="4294967296" state="full"/>`, ErrSyntax, "version"},
		{"version twice", `<reginfo version="1" version="2" state="full"/>`, ErrSyntax, "repeated"},
		{"registration without aor", root(`<registration id="1" state="active"/>`), ErrSyntax, "aor"},
		{"registration without state", root(`<registration aor="sip:a@x" id="1"/>`), ErrSyntax, "registration state"},
		{"registration state twice", root(`<registration aor="a" state="active" state="terminated"/>`), ErrSyntax, "repeated"},
		{"contact without state", registration(`<contact id="2"/>`), ErrSyntax, "contact state"},
		{"contact in init", registration(`<contact id="2" state="init"/>`), ErrSyntax, "contact state"},
		{"contact twice", registration(`<contact id="2" state="active" id="3"/>`), ErrSyntax, "repeated"},
		{"expires", registration(`<contact id="2" state="active" expires="soon"/>`), ErrSyntax, "expires"},
		{"cseq", registration(`<contact id="2" state="active" cseq=""/>`), ErrSyntax, "cseq"},
		{"parameter name twice", contact(`<unknown-param name="a" name="b"/>`), ErrSyntax, "repeated"},
		{"first-cseq", strings.Replace(gruu, `first-cseq="54301"`, `first-cseq="x"`, 1), ErrSyntax, "first-cseq"},
		{"GRUU twice", strings.Replace(gruu, `<gr:pub-gruu uri`, `<gr:pub-gruu uri="" uri`, 1), ErrSyntax, "repeated"},
		{"octets", root(strings.Repeat(" ", MaxBytes)), ErrTooLarge, "octets"},
		{"depth", root(strings.Repeat("<a>", MaxDepth) + strings.Repeat("</a>", MaxDepth)), ErrLimit, "nested"},
		{"registrations", root(strings.Repeat(`<registration aor="a" state="active"/>`, MaxRegistrations+1)), ErrLimit, "registrations"},
		{"contacts", registration(strings.Repeat(`<contact id="2" state="active"/>`, MaxContacts+1)), ErrLimit, "contacts"},
		{"parameters", contact(strings.Repeat(`<unknown-param name="a"/>`, MaxParams+1)), ErrLimit, "parameters"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, err := Parse([]byte(tt.text))
			if !errors.Is(err, tt.want) || d != nil {
				t.Fatalf("%+v, %v, want %v", d, err, tt.want)
			}
			if !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%q does not say %q", err, tt.says)
			}
			if len(err.Error()) > 200 {
				t.Errorf("error text of %d octets", len(err.Error()))
			}
		})
	}
}

// TestBoundsAreInclusive: what is exactly at a bound still passes.
func TestBoundsAreInclusive(t *testing.T) {
	text := root(strings.Repeat(`<registration aor="a" state="active"/>`, MaxRegistrations))
	for _, text := range []string{
		text + strings.Repeat(" ", MaxBytes-len(text)),
		root(strings.Repeat("<a>", MaxDepth-1) + strings.Repeat("</a>", MaxDepth-1)),
		registration(strings.Repeat(`<contact id="2" state="active"/>`, MaxContacts)),
		contact(strings.Repeat(`<unknown-param name="a"/>`, MaxParams)),
	} {
		if _, err := Parse([]byte(text)); err != nil {
			t.Errorf("%.60s...: %v", text, err)
		}
	}
}

func TestStrings(t *testing.T) {
	for _, tt := range []struct{ got, want string }{
		{Full.String(), "full"},
		{Completeness(9).String(), "Completeness(9)"},
		{Terminated.String(), "terminated"},
		{State(0).String(), "State(0)"},
		{Shortened.String(), "shortened"},
		{Event(0).String(), "Event(0)"},
		{AllGone.String(), "all_gone"},
		{ChangeKind(99).String(), "ChangeKind(99)"},
	} {
		if tt.got != tt.want {
			t.Errorf("%q, want %q", tt.got, tt.want)
		}
	}
}
