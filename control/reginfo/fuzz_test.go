package reginfo

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"unicode"
)

// FuzzParse: no panic on anything; the bounds hold; texts are fit for logs; a Tracker makes of whatever was parsed a view
// that agrees with what it reports.
func FuzzParse(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := Parse(b)
		if err != nil {
			if !errors.Is(err, ErrSyntax) && !errors.Is(err, ErrLimit) && !errors.Is(err, ErrTooLarge) || d != nil {
				t.Fatalf("%+v, %v", d, err)
			}
			return
		}
		checkDocument(t, d)
		checkTracker(t, d)
	})
}

func checkDocument(t *testing.T, d *Document) {
	t.Helper()
	clean := func(s string) {
		if strings.ContainsFunc(s, unicode.IsControl) || s != strings.TrimSpace(s) {
			t.Fatalf("text %q", s)
		}
	}
	if d.State != Full && d.State != Partial || len(d.Registrations) > MaxRegistrations {
		t.Fatalf("%s, %d registrations", d.State, len(d.Registrations))
	}
	contacts := 0
	for _, r := range d.Registrations {
		contacts += len(r.Contacts)
		if r.AOR == "" || r.ID == "" || r.State < Init || r.State > Terminated {
			t.Fatalf("%+v", r)
		}
		clean(r.AOR)
		clean(r.ID)
		for i := range r.Contacts {
			c := &r.Contacts[i]
			if c.State != Active && c.State != Terminated || c.Event > Rejected || len(c.UnknownParams) > MaxParams {
				t.Fatalf("%+v", c)
			}
			for _, s := range []string{c.ID, c.URI, c.CallID, c.Q, c.DisplayName, c.PubGRUU, c.TempGRUU, c.Instance(), c.RegID()} {
				if strings.ContainsFunc(s, unicode.IsControl) {
					t.Fatalf("text %q", s)
				}
			}
			for _, p := range c.UnknownParams {
				clean(p.Name)
				clean(p.Value)
			}
		}
	}
	if contacts > MaxContacts {
		t.Fatalf("%d contacts", contacts)
	}
}

func checkTracker(t *testing.T, d *Document) {
	t.Helper()
	apply := func(tr *Tracker, d *Document) {
		changes, err := tr.Apply(d)
		if errors.Is(err, ErrStale) || errors.Is(err, ErrTable) {
			if len(changes) > 0 {
				t.Fatalf("changes in spite of %v", err)
			}
			return
		}
		for i, c := range changes {
			switch c.Kind {
			case ContactTerminated:
				if tr.Bound(c.AOR, c.Contact.URI) || c.Contact.State != Terminated {
					t.Fatalf("%+v is still bound", c)
				}
			case ContactShortened:
				if !c.Contact.Expires.Set {
					t.Fatalf("%+v", c)
				}
			case RegistrationTerminated:
				if slices.ContainsFunc(tr.regs, func(r tracked) bool { return r.aor == c.AOR }) {
					t.Fatalf("%+v is still there", c)
				}
			case AllGone:
				if tr.Active() > 0 || i != len(changes)-1 {
					t.Fatalf("all gone, %d left", tr.Active())
				}
			}
		}
		if tr.Whole() != (d.State == Full) && err != nil {
			t.Fatalf("whole %v after %s, %v", tr.Whole(), d.State, err)
		}
	}
	var tr Tracker
	apply(&tr, d)
	n := tr.Active()
	// The same once more, as the first of another subscription, changes nothing.
	tr.Restart()
	apply(&tr, d)
	if tr.Active() != n {
		t.Fatalf("%d contacts became %d", n, tr.Active())
	}
	// An empty full document ends whatever there was.
	apply(&tr, &Document{State: Full})
	if tr.Active() != 0 || len(tr.regs) != 0 || !tr.Whole() {
		t.Fatal("something is left")
	}
}
