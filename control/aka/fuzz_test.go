package aka

import (
	"errors"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var (
	quotedString = regexp.MustCompile(`(?s)"(?:[^"\\]|\\.)*"`)
	aroundEquals = regexp.MustCompile(`\s*=\s*`)
	keyParam     = regexp.MustCompile(`(?i)(?:^|[,\s])(?:ck|ik)(?:=|[,\s]|$)`)
)

// hasKeyParam looks for ck and ik outside quoted strings, independently of the parser.
func hasKeyParam(row string) bool {
	return keyParam.MatchString(aroundEquals.ReplaceAllString(quotedString.ReplaceAllString(row, "Q"), "="))
}

// params lists the parameters of a row with their schemes, without those to be dropped.
func params(t *testing.T, row string, drop ...string) []string {
	t.Helper()
	elems, err := split(nil, row)
	if err != nil {
		t.Fatalf("%q does not parse: %v", row, err)
	}
	var out []string
	for i := range elems {
		e := &elems[i]
		if e.hasScheme() {
			out = append(out, e.scheme.of(row))
		}
		if e.param.start != e.param.end && !slices.ContainsFunc(drop, func(n string) bool { return e.is(row, n) }) {
			out = append(out, e.param.of(row))
		}
	}
	return out
}

// FuzzTake: no panic; in what may be forwarded no ck or ik is left; every other parameter is still there, byte for byte
// and in order; the result parses and taking again changes nothing. Rows are separated by '|'.
func FuzzTake(f *testing.F) {
	f.Fuzz(func(t *testing.T, text string) {
		rows := strings.Split(text, "|")
		cleaned, ch, err := Take(rows)
		safeText(t, err)
		if errors.Is(err, ErrSyntax) {
			if cleaned != nil || ch.CK != nil || ch.IK != nil {
				t.Fatalf("result in spite of %v", err)
			}
			return
		}
		if len(cleaned) != len(rows) {
			t.Fatalf("%d rows became %d", len(rows), len(cleaned))
		}
		if err == nil && (len(ch.CK) != KeySize || len(ch.IK) != KeySize) {
			t.Fatal("no error and no keys")
		}
		for i, row := range cleaned {
			if !mayHoldKeys(rows[i]) {
				if row != rows[i] {
					t.Fatalf("%q became %q", rows[i], row)
				}
				continue
			}
			if hasKeyParam(row) {
				t.Fatalf("%q became %q, which has a key", rows[i], row)
			}
			if want, got := params(t, rows[i], paramCK, paramIK), params(t, row); !slices.Equal(want, got) {
				t.Fatalf("%q became %q: parameters %q, want %q", rows[i], row, got, want)
			}
			if row != rows[i] && strings.TrimRight(row, " \t\r\n,") != row {
				t.Fatalf("%q became %q, with something left at the end", rows[i], row)
			}
		}
		again, _, err := Take(cleaned)
		if !errors.Is(err, ErrNoIK) || !slices.Equal(again, cleaned) {
			t.Fatalf("Take(%q) = %q, %v", cleaned, again, err)
		}
	})
}

// FuzzSetIntegrityProtected: no panic; the result has our parameter and no other one under that name, in whatever way
// one looks for it; every other parameter is still there, byte for byte and in order.
func FuzzSetIntegrityProtected(f *testing.F) {
	f.Fuzz(func(t *testing.T, v string, yes, quoted bool) {
		value := ""
		if yes {
			value = "yes"
		}
		got := SetIntegrityProtected(v, value, quoted)
		if _, err := credentials(nil, v); err != nil {
			if got != "Digest" {
				t.Fatalf("%q became %q", v, got)
			}
			return
		}
		want := 0
		if yes {
			want = 1
			end := "integrity-protected=yes"
			if quoted {
				end = `integrity-protected="yes"`
			}
			if !strings.HasSuffix(got, ","+end) && !strings.HasSuffix(got, " "+end) {
				t.Fatalf("%q became %q", v, got)
			}
		}
		if n := strings.Count(strings.ToLower(got), paramIntegrity); n != want {
			t.Fatalf("%q became %q, with %d parameters", v, got, n)
		}
		if old, now := params(t, v, paramIntegrity), params(t, got, paramIntegrity); !slices.Equal(old, now) {
			t.Fatalf("%q became %q: parameters %q, want %q", v, got, now, old)
		}
		if again := SetIntegrityProtected(got, value, quoted); again != got {
			t.Fatalf("%q became %q and then %q", v, got, again)
		}
		if !yes && !strings.Contains(strings.ToLower(v), paramIntegrity) && got != v {
			t.Fatalf("%q became %q", v, got)
		}
	})
}

// FuzzParseAuthorization: no panic; what is read survives setting integrity-protected, which is then read as set.
func FuzzParseAuthorization(f *testing.F) {
	f.Fuzz(func(t *testing.T, v string) {
		a, err := ParseAuthorization(v)
		safeText(t, err)
		if err != nil {
			if !errors.Is(err, ErrSyntax) && !errors.Is(err, ErrScheme) {
				t.Fatalf("error of no kind: %v", err)
			}
			return
		}
		if a.Response != "" && !a.HasResponse || a.AUTS != "" && !a.HasAUTS || a.IntegrityProtected != "" && !a.HasIntegrityProtected {
			t.Fatalf("inconsistent: %+v", a)
		}
		set := SetIntegrityProtected(v, "no", true)
		b, err := ParseAuthorization(set)
		if err != nil {
			t.Fatalf("%q became %q: %v", v, set, err)
		}
		a.IntegrityProtected, a.HasIntegrityProtected = "no", true
		if a != b {
			t.Fatalf("%q is %+v, %q is %+v", v, a, set, b)
		}
	})
}
