package aka

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	domain = "ims.mnc001.mcc001.3gppnetwork.org"
	impi   = "001010000000001@" + domain
	sm1    = `Digest username="` + impi + `",realm="` + domain + `",uri="sip:` + domain + `",nonce="",response=""`
	sm7    = `Digest username="` + impi + `",realm="` + domain + `",uri="sip:` + domain + `",nonce="` + nonce + `",response="402ab8df9f3a4d63a9f47c2f90e02938",algorithm=AKAv1-MD5,qop=auth,nc=00000001,cnonce="0a4f113b"`
)

func TestParseAuthorization(t *testing.T) {
	tests := []struct {
		name string
		in   string
		want Authorization
	}{
		{"SM1", sm1, Authorization{Username: impi, Realm: domain, URI: "sip:" + domain, HasResponse: true}},
		{"SM7", sm7, Authorization{
			Username: impi, Realm: domain, URI: "sip:" + domain, Nonce: nonce, Response: "402ab8df9f3a4d63a9f47c2f90e02938", Algorithm: "AKAv1-MD5",
			QOP: "auth", NC: "00000001", CNonce: "0a4f113b", HasResponse: true,
		}},
		{"R4.5 SQN failure", sm1 + `, auts="uoU/PBI8z0TpNZbjVcY="`, Authorization{
			Username: impi, Realm: domain, URI: "sip:" + domain, AUTS: "uoU/PBI8z0TpNZbjVcY=", HasAUTS: true, HasResponse: true,
		}},
		{"R8.12 UE sends integrity-protected", sm1 + `,Integrity-Protected=yes`, Authorization{
			Username: impi, Realm: domain, URI: "sip:" + domain, HasResponse: true, IntegrityProtected: "yes", HasIntegrityProtected: true,
		}},
		{"R8.12 more than once", `Digest integrity-protected=no,username="u",integrity-protected="yes"`, Authorization{Username: "u", IntegrityProtected: "no", HasIntegrityProtected: true}},
		{"no quotes, case, spaces, folds", "dIGEST\r\n USERNAME = a@b ,\t uri=sip:b;x=y,\r\n opaque=\"o\" , x=1,,", Authorization{Username: "a@b", URI: "sip:b;x=y", Opaque: "o"}},
		{"escapes", `Digest username="a\"b\\c, d",realm="r"`, Authorization{Username: `a"b\c, d`, Realm: "r"}},
		{"scheme alone", "Digest", Authorization{}},
		{"empty values", `Digest username=,auts=`, Authorization{HasAUTS: true}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseAuthorization(tt.in)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("ParseAuthorization() (-want +got):\n%s", diff)
			}
		})
	}
}

// refused are values which no two parsers need read alike.
var refused = []struct {
	name string
	in   string
	kind error
	text string
}{
	{"nothing", "", ErrScheme, "scheme"},
	{"commas only", " , ", ErrScheme, "scheme"},
	{"Basic", `Basic realm="x"`, ErrScheme, "scheme"},
	{"Bearer", `Bearer abcdef`, ErrScheme, "scheme"},
	{"no scheme", `username="u"`, ErrSyntax, "unknown parameter"},
	{"two credentials", `Digest username="u", Digest realm="r"`, ErrSyntax, "near parameter realm"},
	{"comma after the scheme", `Digest, username="u"`, ErrSyntax, "near parameter username"},
	{"quote without end", `Digest username="u`, ErrSyntax, "near parameter username"},
	{"comma missing", `Digest username="u" integrity-protected="yes"`, ErrSyntax, "near parameter username"},
	{"semicolons", `Digest username="u";integrity-protected="yes"`, ErrSyntax, "near parameter username"},
	{"parameter without value", `Digest username="u",integrity-protected`, ErrSyntax, "near parameter integrity-protected"},
	{"first parameter without value", `Digest username`, ErrSyntax, "near parameter username"},
	{"quote in the middle", `Digest username=u"v",realm="r"`, ErrSyntax, "near parameter username"},
	{"quoted name", `Digest username="u","integrity-protected"=yes`, ErrSyntax, "unknown parameter"},
	{"NUL", "Digest username=\"u\x00\",realm=\"r\"", ErrSyntax, "near parameter username"},
	{"control character in a name", "Digest username=\"u\",integrity-protected\x01=yes", ErrSyntax, "near parameter integrity-protected"},
	{"escaped line break", "Digest username=\"u\\\r\n v\"", ErrSyntax, "near parameter username"},
	{"name hidden by escapes", `Digest username="u\",integrity-protected=yes,x=\""`, ErrSyntax, "near parameter integrity-protected"},
	{"name hidden in a value", `Digest username="u",x="integrity-protected=yes"`, ErrSyntax, "near parameter integrity-protected"},
	{"name hidden in a name", `Digest username="u",xIntegrity-Protected=yes`, ErrSyntax, "near parameter integrity-protected"},
	{"name as scheme", `integrity-protected username="u"`, ErrSyntax, "unknown parameter"},
	{"too many parameters", `Digest a=b` + strings.Repeat(",a=b", MaxParams), ErrSyntax, "more than 64"},
	{"too long", `Digest username="` + strings.Repeat("u", MaxBytes) + `"`, ErrSyntax, "longer than"},
}

func TestParseAuthorizationErrors(t *testing.T) {
	tests := append(slices.Clip(refused), []struct {
		name string
		in   string
		kind error
		text string
	}{
		{"R5.25 username twice", `Digest username="u",realm="r",Username="v"`, ErrSyntax, "parameter username given twice"},
		{"response twice", `Digest response="",response="1"`, ErrSyntax, "parameter response given twice"},
		{"auts twice", `Digest auts="",auts=""`, ErrSyntax, "parameter auts given twice"},
		{"nonce twice", `Digest nonce="n",nonce="n"`, ErrSyntax, "parameter nonce given twice"},
	}...)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a, err := ParseAuthorization(tt.in)
			if !errors.Is(err, tt.kind) || a != (Authorization{}) {
				t.Fatalf("ParseAuthorization() = %+v, %v, want %v", a, err, tt.kind)
			}
			if !strings.Contains(err.Error(), tt.text) {
				t.Errorf("error %q does not contain %q", err, tt.text)
			}
			safeText(t, err)
		})
	}
}

// Peers: A3.05d
func TestSetIntegrityProtected(t *testing.T) {
	tests := []struct {
		name   string
		in     string
		value  string
		quoted bool
		want   string
	}{
		{"SM2", sm1, "no", true, sm1 + `,integrity-protected="no"`},
		{"SM8", sm7, "yes", true, sm7 + `,integrity-protected="yes"`},
		{"R5.15 bare", sm7, "yes", false, sm7 + `,integrity-protected=yes`},
		{"R5.15 absent", sm1, "", true, sm1},
		{"T5 UE claims yes", sm1 + `,integrity-protected="yes"`, "no", true, sm1 + `,integrity-protected="no"`},
		{"T5 UE claims yes, absent wanted", sm1 + `, integrity-protected=yes `, "", true, sm1},
		{"R5.11 first", `Digest integrity-protected=yes, username="u"`, "no", false, `Digest username="u",integrity-protected=no`},
		{"R5.11 middle", `Digest username="u" , integrity-protected = "yes" , realm="r"`, "", false, `Digest username="u" , realm="r"`},
		{"R5.11 several, any case", `Digest Integrity-Protected="yes",username="u",INTEGRITY-PROTECTED=yes,integrity-protected=,realm="r", integrity-protected="tls-yes"`, "no", true, `Digest username="u",realm="r",integrity-protected="no"`},
		{"R5.11 alone", `Digest integrity-protected="yes"`, "no", true, `Digest integrity-protected="no"`},
		{"R5.11 alone, absent wanted", `Digest  integrity-protected="yes"`, "", true, `Digest`},
		{"R5.11 folded", "Digest username=\"u\",\r\n integrity-protected=\r\n yes,\r\n realm=\"r\"", "", true, "Digest username=\"u\",\r\n realm=\"r\""},
		{"R5.11 fold before it", "Digest username=\"u\"\r\n ,integrity-protected=yes", "no", true, "Digest username=\"u\",integrity-protected=\"no\""},
		{"scheme alone", "Digest", "no", true, `Digest integrity-protected="no"`},
		{"scheme alone, absent wanted", "digest ", "", true, "digest "},
		{"R4.4 quoting and spacing stay", "digest  USERNAME = a@b ,\turi=sip:b;x=\xc3\xa9 ,x=\"a\\\"b,,c\"", "yes", true, "digest  USERNAME = a@b ,\turi=sip:b;x=\xc3\xa9 ,x=\"a\\\"b,,c\",integrity-protected=\"yes\""},
		{"stray commas", `Digest username="u",, realm="r",`, "no", true, `Digest username="u", realm="r",integrity-protected="no"`},
		{"stray commas stay if nothing is done", `Digest username="u",, realm="r",`, "", true, `Digest username="u",, realm="r",`},
		{"white space at the end", "Digest username=\"u\" \r\n ", "no", true, `Digest username="u",integrity-protected="no"`},
		{"value that is no token", `Digest username="u",integrity-protected=yes`, `no",x="`, true, `Digest username="u"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := SetIntegrityProtected(tt.in, tt.value, tt.quoted); got != tt.want {
				t.Errorf("SetIntegrityProtected()\n got %s\nwant %s", got, tt.want)
			}
		})
	}
	for _, tt := range refused {
		t.Run("R5.16 unreadable: "+tt.name, func(t *testing.T) {
			for _, value := range []string{"", "no", "yes"} {
				if got := SetIntegrityProtected(tt.in, value, true); got != "Digest" {
					t.Errorf("SetIntegrityProtected(%q) = %s, want the bare scheme", value, got)
				}
			}
		})
	}
}
