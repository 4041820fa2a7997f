package secagree

import (
	"strings"
	"testing"

	"github.com/gmgate/gmgate/control/ims"
)

// FuzzParse: no panic on anything; the bounds hold; the canonical text means the same; whatever is selected is within
// what TS 33.203 allows; error texts are fit for a Warning header. Rows are separated by '|'.
func FuzzParse(f *testing.F) {
	f.Fuzz(func(t *testing.T, text string) {
		l, err := Parse(strings.Split(text, "|")...)
		if err != nil {
			safeText(t, err)
			return
		}
		if len(l.Mechanisms) > MaxMechanisms || l.IPsecCount() > len(l.Mechanisms) {
			t.Fatalf("%d mechanisms, %d of them ipsec-3gpp", len(l.Mechanisms), l.IPsecCount())
		}
		if err := Equal(l, l); err != nil {
			t.Fatalf("not reflexive: %v", err)
		}
		for i := range l.Mechanisms {
			safeText(t, l.Mechanisms[i].Problem())
		}
		o, err := Select(l, ims.Suites())
		safeText(t, err)
		if err == nil {
			if !o.Suite.Legal() || o.SPIC == 0 || o.SPIS == 0 || o.SPIC == o.SPIS || o.PortC == 0 || o.PortS == 0 || o.PortC == o.PortS {
				t.Fatalf("selected %+v", o)
			}
			if s := ServerSuites(o.Suite, ims.Suites(), l, true); len(s) == 0 {
				t.Fatal("no suites")
			}
		}

		canonical := l.String()
		if strings.ContainsAny(canonical, "\r\n\x00") {
			t.Fatalf("canonical text %q could break a message", canonical)
		}
		again, err := Parse(canonical)
		if err != nil {
			for i := range l.Mechanisms {
				if len(l.Mechanisms[i].canon) > MaxParams {
					return
				}
			}
			if len(canonical) > MaxBytes {
				return
			}
			t.Fatalf("Parse(%q): %v", canonical, err)
		}
		if err := Equal(l, again); err != nil && len(l.Mechanisms) == len(again.Mechanisms) {
			t.Fatalf("%q became %q: %v", text, again, err)
		}
		if again.String() != canonical {
			t.Fatalf("canonical text %q is not stable: %q", canonical, again)
		}
	})
}
