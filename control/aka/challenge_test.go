package aka

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/gmgate/gmgate/control/ims"
)

const (
	ckHex = "b40ba9a3c58b2a05bbf0d987b21bf8cb"
	ikHex = "f769bcd751044604127672711c6d3441"
	nonce = "I1U8vpY3qJ0hiuZNrke/NVXzKLQ1d7m5Sp/6w1Tfr7M="
)

func unhex(t testing.TB, s string) ims.Key {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// noSecrets fails if a text shows a key or a part of it, in any letter case.
func noSecrets(t testing.TB, what, text string) {
	t.Helper()
	low := strings.ToLower(text)
	for _, k := range []string{ckHex, ikHex} {
		for i := 0; i+8 <= len(k); i += 4 {
			if strings.Contains(low, k[i:i+8]) {
				t.Errorf("%s shows key material: %s", what, text)
				return
			}
		}
	}
}

// safeText fails if an error text could not stand in a Warning header.
func safeText(t testing.TB, err error) {
	t.Helper()
	if err == nil {
		return
	}
	for _, c := range []byte(err.Error()) {
		if c < ' ' || c > '~' || c == '"' || c == '\\' {
			t.Fatalf("error text %q has byte %#x", err, c)
		}
	}
}

// Peers: A1.05d, B2.19a
func TestTake(t *testing.T) {
	const (
		d  = "ims.mnc001.mcc001.3gppnetwork.org"
		ck = `ck="` + ckHex + `"`
		ik = `ik="` + ikHex + `"`
	)
	rows := func(r ...string) []string { return r }
	tests := []struct {
		name string
		in   []string
		want []string
	}{
		{
			"SM5 to SM6",
			rows(`Digest realm="` + d + `",nonce="` + nonce + `",algorithm=AKAv1-MD5,` + ck + `,` + ik + `,qop="auth"`),
			rows(`Digest realm="` + d + `",nonce="` + nonce + `",algorithm=AKAv1-MD5,qop="auth"`),
		},
		{"R4.7 ck first", rows(`Digest ` + ck + `, realm="r", nonce="n", ` + ik + `, qop="auth"`), rows(`Digest realm="r", nonce="n", qop="auth"`)},
		{"R4.7 ik first, ck last", rows(`Digest ` + ik + `,realm="r",nonce="n",` + ck), rows(`Digest realm="r",nonce="n"`)},
		{"R4.7 both first", rows(`Digest  ` + ik + ` , ` + ck + ` , realm="r" , nonce="n"`), rows(`Digest  realm="r" , nonce="n"`)},
		{"R4.7 both last", rows(`Digest realm="r", nonce="n" , ` + ck + ` , ` + ik + ` `), rows(`Digest realm="r", nonce="n"`)},
		{"R4.7 upper case, no quotes", rows(`DIGEST REALM="r",CK=` + strings.ToUpper(ckHex) + `,IK = ` + strings.ToUpper(ikHex) + `,NONCE="n"`), rows(`DIGEST REALM="r",NONCE="n"`)},
		{"R4.7 mixed case hex", rows(`Digest Ck="` + strings.ToUpper(ckHex[:9]) + ckHex[9:] + `",iK="` + ikHex[:3] + strings.ToUpper(ikHex[3:]) + `",nonce="n"`), rows(`Digest nonce="n"`)},
		{"R4.8 nothing but keys", rows(`Digest ` + ck + `,` + ik), rows(`Digest`)},
		{"R4.8 stray commas next to keys", rows(`Digest realm="r",,` + ck + `,, ,` + ik + `,nonce="n",`), rows(`Digest realm="r",nonce="n"`)},
		{"R4.8 folds", rows("Digest realm=\"r\",\r\n " + ck + ",\r\n\t" + ik + ",\r\n nonce=\"n\""), rows("Digest realm=\"r\",\r\n nonce=\"n\"")},
		{"R4.8 fold before the last comma", rows("Digest realm=\"r\"\r\n ," + ck + "\r\n ," + ik + "\r\n "), rows("Digest realm=\"r\"")},
		{"R4.8 fold after the scheme", rows("Digest\r\n " + ck + ",\r\n " + ik + ",\r\n nonce=\"n\""), rows("Digest\r\n nonce=\"n\"")},
		{"R4.8 keys in the second row only", rows(`Digest realm="r",nonce="x",algorithm=MD5`, `Digest realm="r",nonce="n",`+ck+`,`+ik), rows(`Digest realm="r",nonce="x",algorithm=MD5`, `Digest realm="r",nonce="n"`)},
		{"R4.8 keys in every row", rows(`Digest nonce="n",`+ck+`,`+ik, `Digest `+ik+`,nonce="o",`+ck, `Digest `+ck+`,`+ik), rows(`Digest nonce="n"`, `Digest nonce="o"`, `Digest`)},
		{"R4.8 keys twice in a row", rows(`Digest ` + ck + `,nonce="n",` + ik + `,` + ck), rows(`Digest nonce="n"`)},
		{"R4.8 two challenges in a row", rows(`Digest ` + ck + `,nonce="n",` + ik + `, Digest ` + ik + `,nonce="m"`), rows(`Digest nonce="n", Digest nonce="m"`)},
		{"R4.8 challenge of keys before another", rows(`Digest ` + ck + `,` + ik + `, Basic realm="b"`), rows(`Digest, Basic realm="b"`)},
		{"commas and names in quotes stay", rows(`Digest realm="a, ck=1, \"ik=2\"",` + ck + `,opaque=",ik=x",` + ik + `,nonce="n"`), rows(`Digest realm="a, ck=1, \"ik=2\"",opaque=",ik=x",nonce="n"`)},
		{"names that only look alike stay", rows(`Digest ckx=1,xik=2,ick=3,` + ck + `,` + ik + `,nonce=ck`), rows(`Digest ckx=1,xik=2,ick=3,nonce=ck`)},
		{"odd spacing stays", rows("Digest   realm = \"r\" ,\tnonce=\"n\"  ,  " + ck + "," + ik + ",  qop = \"auth\""), rows("Digest   realm = \"r\" ,\tnonce=\"n\"  ,  qop = \"auth\"")},
		{"key without value besides good ones", rows(`Digest ck,nonce="n",ik=,` + ck + `,` + ik), rows(`Digest nonce="n"`)},
		{"unreadable row of another scheme", rows(`Negotiate "`, `Digest nonce="n",`+ck+`,`+ik), rows(`Negotiate "`, `Digest nonce="n"`)},
		{"token68 row", rows(`Negotiate YWJj==`, `Digest nonce="n",`+ck+`,`+ik), rows(`Negotiate YWJj==`, `Digest nonce="n"`)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			in := slices.Clone(tt.in)
			got, ch, err := Take(tt.in)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("rows (-want +got):\n%s", diff)
			}
			if !slices.Equal(in, tt.in) {
				t.Error("Take changed its argument")
			}
			if string(ch.CK) != string(unhex(t, ckHex)) || string(ch.IK) != string(unhex(t, ikHex)) {
				t.Error("keys differ")
			}
			// Nothing is left to take, and nothing more is changed.
			again, _, err := Take(got)
			if !errors.Is(err, ErrNoIK) || !slices.Equal(again, got) {
				t.Errorf("second Take() = %q, %v", again, err)
			}
		})
	}
}

// Peers: A1.30a
func TestTakeErrors(t *testing.T) {
	const ck, ik = `ck="` + ckHex + `"`, `ik="` + ikHex + `"`
	tests := []struct {
		name string
		in   []string
		want []string // nil: nothing may be forwarded
		kind error
		text string // part of the error
	}{
		{"R4.9 no keys", []string{`Digest realm="nik", nonce="n",`}, []string{`Digest realm="nik", nonce="n",`}, ErrNoIK, "no ik"},
		{"R4.9 no rows", nil, []string{}, ErrNoIK, "no ik"},
		{"R4.9 ck only", []string{`Digest nonce="n",` + ck}, []string{`Digest nonce="n"`}, ErrNoIK, "no ik"},
		{"R4.9 ik only", []string{`Digest nonce="n",` + ik}, []string{`Digest nonce="n"`}, ErrNoCK, "no ck"},
		{"R4.9 ck is empty", []string{`Digest ck="",nonce="n",` + ik}, []string{`Digest nonce="n"`}, ErrNoCK, "no ck"},
		{"R4.9 ik is empty", []string{`Digest ik=,nonce="n",` + ck}, []string{`Digest nonce="n"`}, ErrNoIK, "no ik"},
		{"R4.9 ik without value", []string{`Digest nonce="n",ik,` + ck}, []string{`Digest nonce="n"`}, ErrNoIK, "no ik"},
		{"short ck", []string{`Digest nonce="n",` + ik + `,ck="` + ckHex[:31] + `"`}, []string{`Digest nonce="n"`}, ErrBadKey, "ck is not 32"},
		{"long ik", []string{`Digest nonce="n",` + ck + `,ik="` + ikHex + `00"`}, []string{`Digest nonce="n"`}, ErrBadKey, "ik is not 32"},
		{"ik is no hex", []string{`Digest nonce="n",` + ck + `,ik="` + ikHex[:31] + `g"`}, []string{`Digest nonce="n"`}, ErrBadKey, "ik is not 32"},
		{"ck with a space", []string{`Digest nonce="n",` + ik + `,ck=" ` + ckHex[:31] + `"`}, []string{`Digest nonce="n"`}, ErrBadKey, "ck is not 32"},
		{"keys differ between rows", []string{`Digest nonce="n",` + ck + `,` + ik, `Digest nonce="m",` + ck + `,ik="` + ckHex + `"`}, []string{`Digest nonce="n"`, `Digest nonce="m"`}, ErrBadKey, "ik differs"},
		{"keys differ within a row", []string{`Digest nonce="n",` + ck + `,` + ik + `,ck="` + ikHex + `"`}, []string{`Digest nonce="n"`}, ErrBadKey, "ck differs"},
		{"R4.8 quote without end", []string{`Digest nonce="n",` + ck + `,ik="` + ikHex}, nil, ErrSyntax, "near parameter ik"},
		{"R4.8 comma missing", []string{`Digest nonce="n" ` + ck + `,` + ik}, nil, ErrSyntax, "near parameter nonce"},
		{"R4.8 comma missing after a key", []string{`Digest nonce="n",` + ck + ` ` + ik}, nil, ErrSyntax, "near parameter ck"},
		{"R4.8 comma missing without quotes", []string{`Digest nonce="n",ck=` + ckHex + ` ik=` + ikHex}, nil, ErrSyntax, "near parameter ck"},
		{"R4.8 no scheme", []string{ck + `,` + ik}, nil, ErrSyntax, "unknown parameter"},
		{"R4.8 key as scheme", []string{`Digest nonce="n",ck ` + ik}, nil, ErrSyntax, "unknown parameter"},
		{"R4.8 key as only word", []string{`ck`}, nil, ErrSyntax, "unknown parameter"},
		{"R4.8 key in the place of a name", []string{`Digest nonce="n",` + ikHex + `"ik"`}, nil, ErrSyntax, "unknown parameter"},
		{"R4.8 quote inside a value", []string{`Digest nonce=a"b,` + ck + `,` + ik + `,c="`}, nil, ErrSyntax, "near parameter nonce"},
		{"R4.8 one bad row spoils all", []string{`Digest nonce="n",` + ck + `,` + ik, `Digest ` + ik + `;nonce="n"`}, nil, ErrSyntax, "near parameter ik"},
		{"R4.8 control character", []string{"Digest nonce=\"n\x00\"," + ck + "," + ik}, nil, ErrSyntax, "near parameter nonce"},
		{"too many parameters", []string{`Digest ` + strings.Repeat("a=b,", MaxParams) + ik}, nil, ErrSyntax, "more than 64"},
		{"too long", []string{`Digest nonce="` + strings.Repeat("x", MaxBytes) + `",` + ik}, nil, ErrSyntax, "longer than"},
	}
	kinds := []error{ErrNoIK, ErrNoCK, ErrBadKey, ErrSyntax}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, ch, err := Take(tt.in)
			for _, k := range kinds {
				if errors.Is(err, k) != (k == tt.kind) {
					t.Errorf("errors.Is(%v, %v) = %v", err, k, k != tt.kind)
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("rows (-want +got):\n%s", diff)
			}
			if err == nil {
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), tt.text) {
				t.Errorf("error %q does not contain %q", err, tt.text)
			}
			safeText(t, err)
			noSecrets(t, "error", err.Error())
			wantIK := tt.kind == ErrNoCK
			if (ch.IK != nil) != wantIK || ch.CK != nil {
				t.Errorf("CK present: %v, IK present: %v", ch.CK != nil, ch.IK != nil)
			}
			if wantIK && string(ch.IK) != string(unhex(t, ikHex)) {
				t.Error("IK differs")
			}
		})
	}
}

func TestTakeDescribes(t *testing.T) {
	const keys = `,ck="` + ckHex + `",ik="` + ikHex + `"`
	tests := []struct {
		name                    string
		in                      []string
		realm, nonce, algorithm string
	}{
		{"one row", []string{`Digest realm="r \"q\"",nonce="` + nonce + `",algorithm=AKAv1-MD5` + keys}, `r "q"`, nonce, "AKAv1-MD5"},
		{"row with keys wins", []string{`Digest realm="a",nonce="a",algorithm=MD5`, `Digest realm="b",nonce="b",algorithm="AKAv1-MD5"` + keys}, "b", "b", "AKAv1-MD5"},
		{"first row with keys wins", []string{`Digest realm="b",nonce="b"` + keys, `Digest realm="c",nonce="c",algorithm=X` + keys}, "b", "b", ""},
		{"no keys: first with a nonce", []string{`Basic realm="a"`, `Digest realm="b",nonce="b"`, `Digest nonce="c"`}, "b", "b", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, ch, _ := Take(tt.in)
			if ch.Realm != tt.realm || ch.Nonce != tt.nonce || ch.Algorithm != tt.algorithm {
				t.Errorf("realm %q nonce %q algorithm %q", ch.Realm, ch.Nonce, ch.Algorithm)
			}
		})
	}
}

// Peers: A1.30b
func TestKeysAreNeverPrinted(t *testing.T) {
	_, ch, err := Take([]string{`Digest nonce="n",ck="` + ckHex + `",ik="` + ikHex + `"`})
	if err != nil {
		t.Fatal(err)
	}
	check := func(what string, v any) {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d"} {
			text := fmt.Sprintf(verb, v)
			noSecrets(t, what+" with "+verb, text)
			noSecrets(t, what+" with "+verb, strings.ReplaceAll(strings.ReplaceAll(text, "0x", ""), ", ", ""))
			// Decimal bytes, as %v prints a plain slice.
			if strings.Contains(text, "180 11 169") || strings.Contains(text, "247 105 188") {
				t.Errorf("%s with %s shows key bytes: %s", what, verb, text)
			}
		}
		j, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		noSecrets(t, what+" as JSON", string(j))
		if strings.Contains(string(j), "tAupo8WLKgW78NmHshv4yw") || strings.Contains(string(j), "92m811EERgQSdnJxHG00QQ") {
			t.Errorf("%s as JSON shows keys in base64", what)
		}
		var b strings.Builder
		slog.New(slog.NewTextHandler(&b, nil)).Info("x", "v", v)
		noSecrets(t, what+" in a log", b.String())
	}
	check("Challenge", ch)
	check("*Challenge", &ch)
	for _, s := range ims.Suites() {
		k, err := Expand(s, ch.CK, ch.IK)
		if err != nil {
			t.Fatal(err)
		}
		check("ESPKeys", k)
	}
	for _, err := range []error{
		func() error { _, err := Expand(ims.Suite{}, ch.CK, ch.IK); return err }(),
		func() error { _, err := Expand(ims.Suites()[0], ch.CK[:15], ch.IK); return err }(),
		func() error { _, err := Expand(ims.Suites()[0], ch.CK, ch.IK[:15]); return err }(),
		func() error { _, err := ParseAuthorization(`Digest ck="` + ckHex + `",` + ikHex + `"`); return err }(),
	} {
		if err == nil {
			t.Fatal("no error")
		}
		noSecrets(t, "error", err.Error())
	}
	ch.Zero()
	for _, k := range []ims.Key{ch.CK, ch.IK} {
		if slices.ContainsFunc(k, func(b byte) bool { return b != 0 }) {
			t.Error("Zero leaves key bytes")
		}
	}
}
