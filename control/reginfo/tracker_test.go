package reginfo

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
)

func parse(t *testing.T, text string) *Document {
	t.Helper()
	d, err := Parse([]byte(text))
	if err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return d
}

// doc writes a document from a short form: "full 3; a active: 1 active registered sip:a@y 600, 2 terminated expired -".
func doc(t *testing.T, short string) *Document {
	t.Helper()
	head, rest, _ := strings.Cut(short, ";")
	h := strings.Fields(head)
	var b strings.Builder
	version := ""
	if h[1] != "-" {
		version = ` version="` + h[1] + `"`
	}
	fmt.Fprintf(&b, `<reginfo state="%s"%s>`, h[0], version)
	for r := range strings.SplitSeq(rest, ";") {
		name, contacts, _ := strings.Cut(r, ":")
		f := strings.Fields(name)
		if len(f) == 0 {
			continue
		}
		id := f[0]
		if len(f) > 2 {
			id = f[2]
		}
		fmt.Fprintf(&b, `<registration aor="%s" id="%s" state="%s">`, f[0], id, f[1])
		for c := range strings.SplitSeq(contacts, ",") {
			f := strings.Fields(c)
			if len(f) == 0 {
				continue
			}
			expires := ""
			if len(f) > 4 {
				expires = ` expires="` + f[4] + `"`
			}
			fmt.Fprintf(&b, `<contact id="%s" state="%s" event="%s"%s><uri>%s</uri></contact>`, f[0], f[1], f[2], expires,
				strings.TrimPrefix(f[3], "-"))
		}
		b.WriteString("</registration>")
	}
	b.WriteString("</reginfo>")
	return parse(t, b.String())
}

// told writes changes in a short form.
func told(changes []Change) []string {
	out := []string{}
	for _, c := range changes {
		s := c.Kind.String()
		if c.AOR != "" {
			s += " " + c.AOR
		}
		if c.Contact.URI != "" {
			s += " " + c.Contact.URI
		}
		if c.Contact.Event != 0 {
			s += " " + c.Contact.Event.String()
		}
		if c.Kind == ContactShortened {
			s += fmt.Sprint(" ", c.Contact.Expires.Value)
		}
		if c.Implied {
			s += " implied"
		}
		out = append(out, s)
	}
	return out
}

// Peers: B3.15
func TestTracker(t *testing.T) {
	type step struct {
		doc    string // "restart" begins a new subscription
		want   []string
		err    error
		active int
		whole  bool
	}
	both := "a active: 1 active registered sip:u@1 600; b active: 1 active created sip:u@1 600"
	for _, tt := range []struct {
		name  string
		any   bool
		steps []step
	}{
		{"the core ends everything", false, []step{
			{"full 0;" + both, nil, nil, 2, true},
			{
				"full 1; a terminated: 1 terminated deactivated sip:u@1; b terminated: 1 terminated deactivated sip:u@1",
				[]string{
					"contact_terminated a sip:u@1 deactivated", "registration_terminated a",
					"contact_terminated b sip:u@1 deactivated", "registration_terminated b", "all_gone",
				},
				nil, 0, true,
			},
		}},
		{"partial documents", false, []step{
			{"full 5;" + both, nil, nil, 2, true},
			{"partial 6; a active: 2 active registered sip:u@2 600", nil, nil, 3, true},
			{"partial 7; a active: 1 terminated rejected sip:u@1", []string{"contact_terminated a sip:u@1 rejected"}, nil, 2, true},
			{"partial 8; b terminated", []string{"contact_terminated b sip:u@1 implied", "registration_terminated b"}, nil, 1, true},
			{"partial 9; a active: 2 terminated expired -", []string{"contact_terminated a sip:u@2 expired", "all_gone"}, nil, 0, true},
		}},
		{"shortened", false, []step{
			{"full 0;" + both, nil, nil, 2, true},
			{"partial 1; a active: 1 active shortened sip:u@1 60", []string{"contact_shortened a sip:u@1 shortened 60"}, nil, 2, true},
			{"full 2; a active: 1 active shortened sip:u@1 50; b active: 1 active created sip:u@1", []string{"contact_shortened a sip:u@1 shortened 50"}, nil, 2, true},
			{"partial 3; b active: 1 active shortened sip:u@1", nil, nil, 2, true}, // to what, it does not say
			{"partial 4; a active: 1 active refreshed sip:u@1 10", nil, nil, 2, true},
		}},
		{"probation", false, []step{
			{"full 0;" + both, nil, nil, 2, true},
			{"partial 1; a terminated: 1 terminated probation sip:u@1", []string{"contact_terminated a sip:u@1 probation", "registration_terminated a"}, nil, 1, true},
		}},
		{"what a full document leaves out is gone", false, []step{
			{"full 0; a active: 1 active registered sip:u@1, 2 active registered sip:u@2; b active: 1 active created sip:u@1", nil, nil, 3, true},
			{
				"full 1; a active: 2 active registered sip:u@2",
				[]string{"contact_terminated a sip:u@1 implied", "contact_terminated b sip:u@1 implied", "registration_terminated b implied"},
				nil, 1, true,
			},
			{"full 2", []string{"contact_terminated a sip:u@2 implied", "registration_terminated a implied", "all_gone"}, nil, 0, true},
			{"full 3", nil, nil, 0, true},
		}},
		{"versions", false, []step{
			{"full 3; a active: 1 active registered sip:u@1", nil, nil, 1, true},
			{"full 3; a terminated", nil, ErrStale, 1, true},
			{"partial 2; a terminated", nil, ErrStale, 1, true},
			{"partial 5; b active: 1 active created sip:u@1", nil, ErrGap, 2, false},
			{"partial 4; a terminated", nil, ErrStale, 2, false},
			{"partial 6; b terminated: 1 terminated expired sip:u@1", []string{"contact_terminated b sip:u@1 expired", "registration_terminated b"}, nil, 1, false},
			// The rest may hold contacts that were never heard of: that all are gone cannot be said.
			{"partial 7; a terminated: 1 terminated expired sip:u@1", []string{"contact_terminated a sip:u@1 expired", "registration_terminated a"}, nil, 0, false},
			{"full 20; a active: 1 active registered sip:u@1", nil, nil, 1, true}, // nothing is missing before a full one
			{"partial 22; a terminated: 1 terminated rejected sip:u@1", []string{"contact_terminated a sip:u@1 rejected", "registration_terminated a"}, ErrGap, 0, false},
		}},
		{"versions wrap", false, []step{
			{"full 4294967295; a active: 1 active registered sip:u@1", nil, nil, 1, true},
			{"partial 0; a active: 2 active registered sip:u@2", nil, nil, 2, true},
			{"partial 1; a active: 2 terminated expired sip:u@2", []string{"contact_terminated a sip:u@2 expired"}, nil, 1, true},
		}},
		{"no versions", false, []step{
			{"full -; a active: 1 active registered sip:u@1", nil, nil, 1, true},
			{"partial -; a active: 2 active registered sip:u@2", nil, ErrGap, 2, false},
			{"full -; a active: 2 active registered sip:u@2", []string{"contact_terminated a sip:u@1 implied"}, nil, 1, true},
		}},
		{"a registrar that does not count", false, []step{
			{"full 0; a active: 1 active registered sip:u@1", nil, nil, 1, true},
			{"full 0; a terminated: 1 terminated expired sip:u@1", nil, ErrStale, 1, true},
		}},
		{"a registrar that does not count, and is trusted", true, []step{
			{"full 0; a active: 1 active registered sip:u@1", nil, nil, 1, true},
			{"partial 0; a terminated", nil, ErrStale, 1, true},
			{"full 0; a terminated: 1 terminated expired sip:u@1", []string{"contact_terminated a sip:u@1 expired", "registration_terminated a", "all_gone"}, nil, 0, true},
		}},
		{"the first document", false, []step{
			{"full 1; a terminated: 1 terminated unregistered sip:u@1", []string{"contact_terminated a sip:u@1 unregistered", "registration_terminated a", "all_gone"}, nil, 0, true},
		}},
		{"the first document is partial", false, []step{
			{"partial 0; a active: 1 active registered sip:u@1", nil, ErrGap, 1, false},
			{"full 1; a active: 1 active registered sip:u@1", nil, nil, 1, true},
		}},
		{"state init", false, []step{
			{"full 0; a init", nil, nil, 0, true},                              // not registered yet
			{"full 1; a init: 1 active registered sip:u@1", nil, nil, 1, true}, // says so, but is
			{"full 2; a init", []string{"contact_terminated a sip:u@1 implied", "registration_terminated a", "all_gone"}, nil, 0, true},
		}},
		{"a registration that is over has no contacts", false, []step{
			{"full 0; a active: 1 active registered sip:u@1", nil, nil, 1, true},
			{"full 1; a terminated: 1 active registered sip:u@1", []string{"contact_terminated a sip:u@1 implied", "registration_terminated a", "all_gone"}, nil, 0, true},
		}},
		{"same contact registered anew", false, []step{
			{"full 0; a active: 1 active registered sip:u@1", nil, nil, 1, true},
			{"full 1; a active: 1 terminated unregistered sip:u@1, 2 active registered sip:u@1", nil, nil, 1, true},
			{"partial 2; a active: 2 terminated unregistered sip:u@1, 3 active registered sip:u@1", nil, nil, 1, true},
			{"full 3; a active: 4 active registered sip:u@1", nil, nil, 1, true},
		}},
		{"other ids after a restart of the registrar", false, []step{
			{"full 0; a active 0xa: 0x1 active registered sip:u@1", nil, nil, 1, true},
			{"restart", nil, nil, 1, false},
			{"full 0; a active 0xb: 0x2 active registered sip:u@1", nil, nil, 1, true},
			{"restart", nil, nil, 1, false},
			{"full 0; a active 0xc: 0x3 active registered sip:u@3", []string{"contact_terminated a sip:u@1 implied"}, nil, 1, true},
		}},
		{"the end while there was no subscription", false, []step{
			{"full 7;" + both, nil, nil, 2, true},
			{"restart", nil, nil, 2, false},
			{"full 0; b active: 1 active created sip:u@1", []string{"contact_terminated a sip:u@1 implied", "registration_terminated a implied"}, nil, 1, true},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tr := Tracker{AnyFull: tt.any}
			for _, s := range tt.steps {
				if s.doc == "restart" {
					tr.Restart()
				} else {
					changes, err := tr.Apply(doc(t, s.doc))
					if !errors.Is(err, s.err) {
						t.Fatalf("%s: %v, want %v", s.doc, err, s.err)
					}
					if diff := cmp.Diff(append([]string{}, s.want...), told(changes)); diff != "" {
						t.Errorf("%s (-want +got):\n%s", s.doc, diff)
					}
				}
				if tr.Active() != s.active || tr.Whole() != s.whole {
					t.Errorf("%s: %d active, whole %v, want %d, %v", s.doc, tr.Active(), tr.Whole(), s.active, s.whole)
				}
			}
		})
	}
}

// TestTrackerOnRealDocuments walks through the life of a registration at a Kamailio S-CSCF.
func TestTrackerOnRealDocuments(t *testing.T) {
	const uri = "sip:001010000000001@10.45.0.7:6300;alias=10.45.0.7~6300~1"
	var tr Tracker
	if changes, err := tr.Apply(parse(t, kamailioFull)); err != nil || len(changes) != 0 {
		t.Fatal(changes, err)
	}
	if !tr.Bound("tel:+15550100001", uri) || tr.Bound("tel:+15550100002", uri) || tr.Bound("tel:+15550100001", "sip:x") {
		t.Error("view is wrong")
	}
	changes, err := tr.Apply(parse(t, kamailioGone))
	if err != nil || tr.Version() != 1 {
		t.Fatal(err, tr.Version())
	}
	want := []string{
		"contact_terminated sip:001010000000001@ims.example " + uri + " unregistered",
		"registration_terminated sip:001010000000001@ims.example",
		"contact_terminated tel:+15550100001 " + uri + " unregistered",
		"registration_terminated tel:+15550100001", "all_gone",
	}
	if diff := cmp.Diff(want, told(changes)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestTableIsBounded: partial documents cannot make the view grow without end, and the one that would is not applied.
func TestTableIsBounded(t *testing.T) {
	var tr Tracker
	if _, err := tr.Apply(doc(t, "full 0; a active: 1 active registered sip:u@1")); err != nil {
		t.Fatal(err)
	}
	for v := 1; ; v++ {
		d := &Document{Version: uint32(v), Versioned: true, State: Partial}
		for i := range 100 {
			aor := fmt.Sprint(v, "-", i)
			d.Registrations = append(d.Registrations, Registration{AOR: aor, ID: aor, State: Active})
		}
		before := len(tr.regs)
		_, err := tr.Apply(d)
		if err == nil {
			if len(tr.regs) > MaxRegistrations {
				t.Fatalf("%d registrations", len(tr.regs))
			}
			continue
		}
		if !errors.Is(err, ErrTable) || len(tr.regs) != before || tr.Version() != uint32(v-1) || tr.Whole() {
			t.Errorf("%v, %d registrations, version %d", err, len(tr.regs), tr.Version())
		}
		return
	}
}

// A view that is limited to one contact stays small, whatever else is registered, and tells the same of that contact.
func TestOwn(t *testing.T) {
	tr := Tracker{Own: func(_, uri string) bool { return uri == "sip:u@1" }}
	doc := func(state Completeness, regs ...Registration) *Document {
		return &Document{Version: tr.version + 1, Versioned: true, State: state, Registrations: regs}
	}
	active := func(uris ...string) []Contact {
		var out []Contact
		for _, u := range uris {
			out = append(out, Contact{ID: u, URI: u, State: Active})
		}
		return out
	}
	apply := func(d *Document) string {
		t.Helper()
		changes, err := tr.Apply(d)
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, c := range changes {
			out = append(out, c.Kind.String()+" "+c.AOR+" "+c.Contact.URI)
		}
		return strings.Join(out, "; ")
	}
	both := Registration{AOR: "sip:a", ID: "a", State: Active, Contacts: active("sip:u@2", "sip:u@1")}
	others := Registration{AOR: "sip:b", ID: "b", State: Active, Contacts: active("sip:u@2", "sip:u@3")}
	if got := apply(doc(Full, both, others)); got != "" || len(tr.regs) != 1 || tr.Active() != 1 || !tr.Bound("sip:a", "sip:u@1") {
		t.Errorf("%q, view %+v", got, tr.regs)
	}
	both.Contacts = active("sip:u@1")
	if got := apply(doc(Full, both)); got != "" {
		t.Errorf("others were missed: %s", got)
	}
	both.Contacts = active("sip:u@2")
	if got := apply(doc(Full, both)); got != "contact_terminated sip:a sip:u@1; all_gone  " || len(tr.regs) != 0 {
		t.Errorf("%q, view %+v", got, tr.regs)
	}
	// The registrar has restarted and numbers anew: the address of record is active, if not with our contact.
	old, renewed := both, both
	old.State, old.Contacts, renewed.ID = Terminated, nil, "a2"
	if got := apply(doc(Full, old, renewed)); got != "" {
		t.Errorf("registration taken for terminated: %s", got)
	}
	if got := apply(doc(Partial, old)); got != "registration_terminated sip:a ; all_gone  " {
		t.Errorf("explicit end of a registration: %s", got)
	}
}

// What the caller keeps anyway is not kept twice, and nothing else changes.
func TestShare(t *testing.T) {
	var v Tracker
	if _, err := v.Apply(parse(t, `<reginfo version="0" state="full"><registration aor="sip:a@y" id="r" state="active">`+
		`<contact id="c" state="active" event="registered"><uri>sip:c@z</uri></contact></registration></reginfo>`)); err != nil {
		t.Fatal(err)
	}
	before := v.regs[0]
	contact, aor := strings.Clone(before.contacts[0].uri), strings.Clone(before.aor)
	v.Share("sip:other@y", contact, aor)
	got := v.regs[0]
	if unsafe.StringData(got.aor) != unsafe.StringData(aor) || unsafe.StringData(got.contacts[0].uri) != unsafe.StringData(contact) {
		t.Error("the view has strings of its own still")
	}
	if got.aor != aor || got.id != before.id || got.contacts[0].uri != contact || !v.Bound(aor, contact) {
		t.Errorf("%+v, want %+v", got, before)
	}
}
