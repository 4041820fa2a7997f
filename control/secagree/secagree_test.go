package secagree

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/gmgate/gmgate/control/ims"
)

var (
	gcm      = ims.Suite{Alg: ims.AlgNull, Enc: ims.EncAESGCM}
	gmac     = ims.Suite{Alg: ims.AlgAESGMAC, Enc: ims.EncNull}
	sha1AES  = ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC}
	sha1DES  = ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncDESEDE3CBC}
	sha1Null = ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncNull}
	md5AES   = ims.Suite{Alg: ims.AlgHMACMD5, Enc: ims.EncAESCBC}
	md5DES   = ims.Suite{Alg: ims.AlgHMACMD5, Enc: ims.EncDESEDE3CBC}
	md5Null  = ims.Suite{Alg: ims.AlgHMACMD5, Enc: ims.EncNull}
)

// tail is what every entry needs beside its algorithms.
const tail = ";spi-c=3963789885;spi-s=3963789886;port-c=6301;port-s=6300"

func mustParse(t testing.TB, rows ...string) List {
	t.Helper()
	l, err := Parse(rows...)
	if err != nil {
		t.Fatalf("Parse(%q): %v", rows, err)
	}
	return l
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

// Peers: A4.17a
func TestHandsets(t *testing.T) {
	samsung := "ipsec-3gpp;prot=esp;mod=trans;spi-c=0102030405;spi-s=0102030406;port-c=5100;port-s=6100;alg=hmac-md5-96;ealg=null"
	var aosp []string
	for _, alg := range []string{"hmac-md5-96", "hmac-sha-1-96"} {
		for _, ealg := range []string{"null", "des-ede3-cbc", "aes-cbc"} {
			aosp = append(aosp, "ipsec-3gpp; alg="+alg+"; prot=esp; mod=trans; ealg="+ealg+
				"; spi-c=0000004711; spi-s=0000004712; port-c=32770; port-s=32771")
		}
	}
	six := []ims.Suite{md5Null, md5DES, md5AES, sha1Null, sha1DES, sha1AES}
	tests := []struct {
		name    string
		rows    []string
		count   int
		offered []ims.Suite
		want    Offer // Mechanism and Offered are not looked at
		entry   int
	}{
		{
			name: "R8.9 Samsung: all combinations in one row, no q",
			rows: []string{"ipsec-3gpp;prot=esp;mod=trans;spi-c=41234;spi-s=41235;port-c=50010;port-s=6000;alg=hmac-md5-96;ealg=aes-cbc," +
				"ipsec-3gpp;prot=esp;mod=trans;spi-c=41234;spi-s=41235;port-c=50010;port-s=6000;alg=hmac-sha-1-96;ealg=aes-cbc," +
				"ipsec-3gpp;prot=esp;mod=trans;spi-c=41234;spi-s=41235;port-c=50010;port-s=6000;alg=hmac-sha-1-96;ealg=null"},
			count: 3, offered: []ims.Suite{md5AES, sha1AES, sha1Null},
			want:  Offer{Suite: sha1AES, SPIC: 41234, SPIS: 41235, PortC: 50010, PortS: 6000},
			entry: 2,
		},
		{
			name: "R8.30 iOS: q values, rows of two, each entry its own",
			rows: []string{
				"ipsec-3gpp; q=0.5; alg=hmac-sha-1-96; ealg=aes-cbc; mod=trans; prot=esp; port-c=60001; port-s=60002; spi-c=2868903936; spi-s=2868903937, ipsec-3gpp; q=0.4; alg=hmac-sha-1-96; ealg=null; mod=trans; prot=esp; port-c=60001; port-s=60002; spi-c=2868903936; spi-s=2868903937",
				"ipsec-3gpp; q=0.9; alg=null; ealg=aes-gcm; mod=trans; prot=esp; port-c=60003; port-s=60004; spi-c=4000000001; spi-s=4000000002",
			},
			count: 3, offered: []ims.Suite{sha1AES, sha1Null, gcm},
			want:  Offer{Suite: gcm, SPIC: 4000000001, SPIS: 4000000002, PortC: 60003, PortS: 60004},
			entry: 3,
		},
		{
			name: "R2.5 Qualcomm/Xiaomi: six in one row, prot and mod omitted (R8.7)",
			rows: []string{
				"ipsec-3gpp;alg=hmac-md5-96;ealg=des-ede3-cbc;spi-c=3963789885;spi-s=3963789886;port-c=6301;port-s=6300," +
					"ipsec-3gpp;alg=hmac-md5-96;ealg=aes-cbc;spi-c=3963789885;spi-s=3963789886;port-c=6301;port-s=6300," +
					"ipsec-3gpp;alg=hmac-md5-96;ealg=null;spi-c=3963789885;spi-s=3963789886;port-c=6301;port-s=6300," +
					"ipsec-3gpp;alg=hmac-sha-1-96;ealg=des-ede3-cbc;spi-c=3963789885;spi-s=3963789886;port-c=6301;port-s=6300," +
					"ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc;spi-c=3963789885;spi-s=3963789886;port-c=6301;port-s=6300," +
					"ipsec-3gpp;alg=hmac-sha-1-96;ealg=null;spi-c=3963789885;spi-s=3963789886;port-c=6301;port-s=6300",
			},
			count: 6, offered: []ims.Suite{md5DES, md5AES, md5Null, sha1DES, sha1AES, sha1Null},
			want:  Offer{Suite: sha1AES, SPIC: 3963789885, SPIS: 3963789886, PortC: 6301, PortS: 6300},
			entry: 5,
		},
		{
			name:  "R8.10 R8.17 AOSP: one row per offer, zero padded SPIs",
			rows:  aosp,
			count: 6, offered: six,
			want:  Offer{Suite: sha1AES, SPIC: 4711, SPIS: 4712, PortC: 32770, PortS: 32771},
			entry: 6,
		},
		{
			name:  "R8.11 old Samsung: md5 only",
			rows:  []string{samsung},
			count: 1, offered: []ims.Suite{md5Null},
			want:  Offer{Suite: md5Null, SPIC: 102030405, SPIS: 102030406, PortC: 5100, PortS: 6100},
			entry: 1,
		},
		{
			name: "R2.5 merged ealg=aes-cbc,null",
			rows: []string{
				"ipsec-3gpp;alg=hmac-sha-1-96;prot=esp;mod=trans" + tail + ";ealg=aes-cbc,null",
			},
			count: 1, offered: []ims.Suite{sha1AES},
			want:  Offer{Suite: sha1AES, SPIC: 3963789885, SPIS: 3963789886, PortC: 6301, PortS: 6300},
			entry: 1,
		},
		{
			name: "R2.5 merged value in the middle spoils only its own entry",
			rows: []string{
				"ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc,null;prot=esp;mod=trans" + tail,
				"ipsec-3gpp;alg=hmac-sha-1-96;ealg=null;prot=esp;mod=trans" + tail,
			},
			count: 2, offered: []ims.Suite{sha1Null},
			want:  Offer{Suite: sha1Null, SPIC: 3963789885, SPIS: 3963789886, PortC: 6301, PortS: 6300},
			entry: 3,
		},
		{
			name: "TS 33.203 §7.2 sample SM1: second offer without ealg",
			rows: []string{
				"ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc;prot=esp;mod=trans" + tail + ", ipsec-3gpp;alg=hmac-sha-1-96;prot=esp;mod=trans" + tail,
			},
			count: 2, offered: []ims.Suite{sha1AES, sha1Null},
			want:  Offer{Suite: sha1AES, SPIC: 3963789885, SPIS: 3963789886, PortC: 6301, PortS: 6300},
			entry: 1,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := mustParse(t, tt.rows...)
			if got := l.IPsecCount(); got != tt.count {
				t.Errorf("IPsecCount() = %d, want %d", got, tt.count)
			}
			got, err := Select(l, ims.Suites())
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.offered, got.Offered); diff != "" {
				t.Errorf("Offered (-want +got):\n%s", diff)
			}
			if got.Mechanism.Entry != tt.entry {
				t.Errorf("chose entry %d, want %d", got.Mechanism.Entry, tt.entry)
			}
			got.Mechanism, got.Offered = Mechanism{}, nil
			if got.Suite != tt.want.Suite || got.SPIC != tt.want.SPIC || got.SPIS != tt.want.SPIS || got.PortC != tt.want.PortC || got.PortS != tt.want.PortS {
				t.Errorf("Select() = %+v, want %+v", got, tt.want)
			}
			// The canonical text is the same agreement.
			if err := Equal(l, mustParse(t, l.String())); err != nil {
				t.Errorf("Equal(l, Parse(l.String())) = %v", err)
			}
		})
	}
}

// Peers: A1.27c
func TestParseForms(t *testing.T) {
	const plain = "ipsec-3gpp;alg=hmac-sha-1-96;ealg=null;prot=esp;mod=trans;spi-c=5000;spi-s=5001;port-c=6301;port-s=6300"
	const two = plain + ", ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc;prot=esp;mod=trans;spi-c=5000;spi-s=5001;port-c=6301;port-s=6300"
	tests := []struct {
		name string
		rows []string
		want string // canonical text
	}{
		{"R2.1 one row", []string{two}, two},
		{"R2.1 two rows", strings.Split(two, ", "), two},
		{"R2.1 mixed", []string{plain + "," + plain, plain}, plain + ", " + plain + ", " + plain},
		{"R2.1 empty elements", []string{" ,, " + plain + " , ", "", ","}, plain},
		{"R2.2 upper case", []string{strings.ToUpper(plain)}, plain},
		{
			"R2.2 mixed case mode",
			[]string{"ipsec-3gpp;alg=hmac-sha-1-96;mod=UDP-enc-tun;spi-c=5000;spi-s=5001;port-c=6301;port-s=6300"},
			"ipsec-3gpp;alg=hmac-sha-1-96;ealg=null;prot=esp;mod=udp-enc-tun;spi-c=5000;spi-s=5001;port-c=6301;port-s=6300",
		},
		{"R2.3 defaults", []string{"ipsec-3gpp;alg=hmac-sha-1-96;spi-c=5000;spi-s=5001;port-c=6301;port-s=6300"}, plain},
		{"R2.4 leading zeros are not octal", []string{"ipsec-3gpp;alg=hmac-sha-1-96;spi-c=0000005000;spi-s=00000000000000000005001;port-c=06301;port-s=0006300"}, plain},
		{"R2.5 spaces, trailing semicolon, folds", []string{"  ipsec-3gpp ;\r\n alg = hmac-sha-1-96 ;\tealg\r\n\t= null; prot =esp;; mod= trans ; spi-c=5000;spi-s=5001;port-c=6301;port-s=6300 ; \r\n "}, plain},
		{"R2.5 bare line feed fold", []string{"ipsec-3gpp;alg=hmac-sha-1-96;\n spi-c=5000;spi-s=5001;port-c=6301;port-s=6300"}, plain},
		{"R2.5 quoted values", []string{`ipsec-3gpp;alg="hmac-sha-1-96";ealg="nu\ll";prot="esp";spi-c="5000";spi-s="5001";port-c="6301";port-s="6300"`}, plain},
		{"R2.5 any order", []string{"ipsec-3gpp;port-s=6300;port-c=6301;spi-s=5001;mod=trans;spi-c=5000;alg=hmac-sha-1-96"}, plain},
		{
			"R2.5 unknown parameters kept",
			[]string{`ipsec-3gpp;Vendor="a, b; c";flag;empty=;alg=hmac-sha-1-96;spi-c=5000;spi-s=5001;port-c=6301;port-s=6300`},
			plain + `;empty="";flag;vendor="a, b; c"`,
		},
		{"R2.5 unknown value with a fold", []string{"x;a=\"b\r\n\t c\""}, `x;a="b c"`},
		{
			"q is first and short",
			[]string{"ipsec-3gpp;alg=hmac-sha-1-96;q=0.100;spi-c=5000;spi-s=5001;port-c=6301;port-s=6300"},
			"ipsec-3gpp;q=0.1;" + strings.TrimPrefix(plain, "ipsec-3gpp;"),
		},
		{"other mechanisms", []string{`tls;q=0.50, digest;d-qop=AUTH;D-Alg=md5, ipsec-ike;q=1.000`}, `tls;q=0.5, digest;d-alg=md5;d-qop=AUTH, ipsec-ike;q=1`},
		{"unreadable entry is kept as text", []string{"ipsec-3gpp;bad name=1;alg=x, tls"}, "ipsec-3gpp;bad name=1;alg=x, tls"},
		{"value that is not one quoted string", []string{`x;a="b"c;d=e"f;g"`}, `x;a="\"b\"c";d="e\"f;g\""`},
		{"escapes", []string{`x;a="q\"b\\"`}, `x;a="q\"b\\"`},
		{"nothing", nil, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := mustParse(t, tt.rows...)
			if got := l.String(); got != tt.want {
				t.Errorf("String()\n got %s\nwant %s", got, tt.want)
			}
			if got := mustParse(t, tt.want).String(); got != tt.want {
				t.Errorf("canonical text is not stable: %s", got)
			}
		})
	}
}

// Peers: A1.27b
func TestParseFields(t *testing.T) {
	l := mustParse(t, "tls;q=0.2;x=1", `IPsec-3GPP;Q=.75;alg=HMAC-MD5-96;ealg=new-cipher;foo;spi-c=255;spi-s=4294967295;port-c=1;port-s=65535, sdes-srtp;mediasec`)
	if len(l.Mechanisms) != 3 {
		t.Fatalf("%d mechanisms, want 3", len(l.Mechanisms))
	}
	tls, m, media := &l.Mechanisms[0], &l.Mechanisms[1], &l.Mechanisms[2]
	if tls.Name != "tls" || tls.IPsec() || tls.Usable() || tls.Problem() != nil || tls.Q != 200 || tls.Row != 0 || tls.Entry != 1 {
		t.Errorf("tls entry: %+v", tls)
	}
	if diff := cmp.Diff([]Param{{"x", "1", true}}, tls.Params); diff != "" {
		t.Errorf("tls.Params: %s", diff)
	}
	if m.Name != IPsec || m.Row != 1 || m.Entry != 2 || !m.HasQ || m.Q != 750 || m.Preference() != 750 || m.Alg != ims.AlgHMACMD5 || m.AlgToken != "hmac-md5-96" ||
		m.EncAlg != 0 || m.EncAlgToken != "new-cipher" || m.Prot != ProtESP || m.Mod != ModTrans ||
		m.SPIC != 255 || m.SPIS != 4294967295 || m.PortC != 1 || m.PortS != 65535 || m.Usable() || !m.ReservedSPI() {
		t.Errorf("ipsec-3gpp entry: %+v", m)
	}
	if diff := cmp.Diff([]Param{{"foo", "", false}}, m.Params); diff != "" {
		t.Errorf("Params: %s", diff)
	}
	if !media.Mediasec || media.IPsec() || media.Usable() || media.Row != 1 || media.Preference() != MaxQ || media.ReservedSPI() {
		t.Errorf("mediasec entry: %+v", media)
	}
}

// Peers: A3.08
func TestParseErrors(t *testing.T) {
	entry := "ipsec-3gpp;alg=hmac-sha-1-96" + tail
	tests := []struct {
		name string
		rows []string
		text string
	}{
		{"quoted string without end", []string{entry, `ipsec-3gpp;alg="hmac`}, "malformed security mechanism: entry 2: quoted string without end"},
		{"escape at the end", []string{`x;a="b\`}, "malformed security mechanism: entry 1: quoted string without end"},
		{"NUL", []string{"ipsec-3gpp;alg=\x00"}, "malformed security mechanism: entry 1: control character"},
		{"escaped control character", []string{"x;a=\"\\\x01\""}, "malformed security mechanism: entry 1: control character"},
		{"500 mechanisms in one row", []string{strings.Repeat("ipsec-3gpp,", 500)}, "malformed security mechanism: too many mechanisms"},
		{"500 rows", slices.Repeat([]string{"a;b"}, 500), "malformed security mechanism: too many mechanisms"},
		{"500 full mechanisms", []string{strings.Repeat(entry+",", 500)}, "malformed security mechanism: header too long"},
		{"65 mechanisms", slices.Repeat([]string{"tls"}, MaxMechanisms+1), "malformed security mechanism: too many mechanisms"},
		{"33 parameters", []string{"x" + strings.Repeat(";a", MaxParams+1)}, "malformed security mechanism: entry 1: too many parameters"},
		{"too long", []string{strings.Repeat("x", MaxBytes), "y"}, "malformed security mechanism: header too long"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l, err := Parse(tt.rows...)
			if !errors.Is(err, ErrMalformed) || len(l.Mechanisms) != 0 {
				t.Fatalf("Parse() = %v, %v, want ErrMalformed", l, err)
			}
			if err.Error() != tt.text {
				t.Errorf("error %q, want %q", err, tt.text)
			}
			safeText(t, err)
		})
	}
	// The bounds themselves are inside.
	mustParse(t, slices.Repeat([]string{"tls"}, MaxMechanisms)...)
	mustParse(t, "x"+strings.Repeat(";a", MaxParams))
	mustParse(t, strings.Repeat("x", MaxBytes))
}

// TestParseRefusesQuickly bounds the work for hostile headers by what is allocated, since time can not be asserted.
func TestParseRefusesQuickly(t *testing.T) {
	long := strings.Repeat("ipsec-3gpp;alg=hmac-sha-1-96"+tail+",", 500)
	if n := testing.AllocsPerRun(10, func() { _, _ = Parse(long) }); n > 2 {
		t.Errorf("%v allocations for an oversized header, want at most 2", n)
	}
	many := strings.Repeat("x,", 500)
	if n := testing.AllocsPerRun(10, func() { _, _ = Parse(many) }); n > 20 {
		t.Errorf("%v allocations for 500 mechanisms, want at most 20", n)
	}
}

func TestSelectErrors(t *testing.T) {
	with := func(old, new string) string { // one good entry with a change
		good := "ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc;prot=esp;mod=trans" + tail
		if !strings.Contains(good, old) {
			t.Fatalf("no %q in %q", old, good)
		}
		return strings.Replace(good, old, new, 1)
	}
	tests := []struct {
		name  string
		rows  []string
		kind  error
		param string
		entry int
	}{
		{"E1 no header", nil, ErrNoIPsec, "", 0},
		{"E1 other mechanisms only", []string{"tls;q=0.2, digest"}, ErrNoIPsec, "", 0},
		{"E1 R2.6 media plane entries only", []string{"sdes-srtp;mediasec", with("ipsec-3gpp", "ipsec-3gpp;mediasec")}, ErrNoIPsec, "", 0},
		{"E1 unreadable name", []string{"ipsec-3gpp alg=hmac-sha-1-96" + tail}, ErrNoIPsec, "", 0},
		{"E2 R2.3 no alg", []string{with(";alg=hmac-sha-1-96", "")}, ErrMalformed, "alg", 1},
		{"E2 R2.3 no spi-c", []string{with(";spi-c=3963789885", "")}, ErrMalformed, "spi-c", 1},
		{"E2 R2.3 no spi-s", []string{with(";spi-s=3963789886", "")}, ErrMalformed, "spi-s", 1},
		{"E2 R2.3 no port-c", []string{with(";port-c=6301", "")}, ErrMalformed, "port-c", 1},
		{"E2 R2.3 no port-s", []string{with(";port-s=6300", "")}, ErrMalformed, "port-s", 1},
		{"E2 R2.4 negative SPI", []string{with("spi-c=3963789885", "spi-c=-331177411")}, ErrMalformed, "spi-c", 1},
		{"E2 R2.4 hexadecimal SPI", []string{with("spi-s=3963789886", "spi-s=0xec42a23e")}, ErrMalformed, "spi-s", 1},
		{"E2 empty port", []string{with("port-c=6301", "port-c=")}, ErrMalformed, "port-c", 1},
		{"E2 port without value", []string{with("port-c=6301", "port-c")}, ErrMalformed, "port-c", 1},
		{"E2 space inside a number", []string{with("port-c=6301", "port-c=63 01")}, ErrMalformed, "port-c", 1},
		{"E2 alg is no token", []string{with("alg=hmac-sha-1-96", "alg=hmac sha")}, ErrMalformed, "alg", 1},
		{"E2 ealg is empty", []string{with("ealg=aes-cbc", "ealg=")}, ErrMalformed, "ealg", 1},
		{"E2 prot is empty", []string{with("prot=esp", "prot")}, ErrMalformed, "prot", 1},
		{"E2 mod is no token", []string{with("mod=trans", `mod="tr ans"`)}, ErrMalformed, "mod", 1},
		{"E2 alg twice", []string{with("alg=hmac-sha-1-96", "alg=hmac-sha-1-96;alg=hmac-md5-96")}, ErrMalformed, "alg", 1},
		{"E2 port twice, same value", []string{with("port-c=6301", "port-c=6301;PORT-C=6301")}, ErrMalformed, "port-c", 1},
		{"E2 unreadable parameter", []string{with(";prot=esp", ";pr ot=esp")}, ErrMalformed, "", 1},
		{"E2 names the first of several", []string{"tls", with("port-c=6301", "port-c=x"), with("alg=hmac-sha-1-96", "alg=")}, ErrMalformed, "port-c", 2},
		{"E2 unreadable outweighs bad value", []string{with("spi-c=3963789885;spi-s=3963789886", "spi-c=0;spi-s=x")}, ErrMalformed, "spi-s", 1},
		{"R1.4 R2.4 SPI overflow", []string{with("spi-c=3963789885", "spi-c=4294967296")}, ErrBadValue, "spi-c", 1},
		{"R1.4 SPI beyond 64 bits", []string{with("spi-c=3963789885", "spi-c=99999999999999999999999")}, ErrBadValue, "spi-c", 1},
		{"R1.4 SPI 0", []string{with("spi-s=3963789886", "spi-s=0000000000")}, ErrBadValue, "spi-s", 1},
		{"R1.4 SPIs the same", []string{with("spi-s=3963789886", "spi-s=03963789885")}, ErrBadValue, "spi-s", 1},
		{"R1.4 port 0", []string{with("port-c=6301", "port-c=0")}, ErrBadValue, "port-c", 1},
		{"R1.4 port 65536", []string{with("port-s=6300", "port-s=65536")}, ErrBadValue, "port-s", 1},
		{"R1.4 port 71837 is not 6301", []string{with("port-c=6301", "port-c=71837")}, ErrBadValue, "port-c", 1},
		{"R1.4 ports the same", []string{with("port-s=6300", "port-s=6301")}, ErrBadValue, "port-s", 1},
		{"E3 R2.7 sha-2", []string{with("alg=hmac-sha-1-96", "alg=hmac-sha-256-128")}, ErrNoCommonAlgorithm, "alg", 1},
		{"E3 unknown ealg", []string{with("ealg=aes-cbc", "ealg=chacha20")}, ErrNoCommonAlgorithm, "ealg", 1},
		{"E3 R2.8 null with null", []string{with("alg=hmac-sha-1-96;ealg=aes-cbc", "alg=null;ealg=null")}, ErrNoCommonAlgorithm, "alg", 1},
		{"E3 R2.8 null with default ealg", []string{with("alg=hmac-sha-1-96;ealg=aes-cbc", "alg=null")}, ErrNoCommonAlgorithm, "alg", 1},
		{"E3 R2.8 hmac with gcm", []string{with("ealg=aes-cbc", "ealg=aes-gcm")}, ErrNoCommonAlgorithm, "alg", 1},
		{"E3 R2.8 gmac with cbc", []string{with("alg=hmac-sha-1-96", "alg=aes-gmac")}, ErrNoCommonAlgorithm, "alg", 1},
		{"E3 R2.9 tunnel", []string{with("mod=trans", "mod=tun")}, ErrNoCommonAlgorithm, "mod", 1},
		{"E3 R2.9 UDP-enc-tun", []string{with("mod=trans", "mod=UDP-enc-tun")}, ErrNoCommonAlgorithm, "mod", 1},
		{"E3 R2.9 ah", []string{with("prot=esp", "prot=ah")}, ErrNoCommonAlgorithm, "prot", 1},
		{"E3 R2.11 not on our list", []string{"tls," + with("alg=hmac-sha-1-96;ealg=aes-cbc", "alg=hmac-md5-96")}, ErrNoCommonAlgorithm, "alg", 2},
		{"E3 outweighs E2", []string{with("port-c=6301", "port-c=x"), with("alg=hmac-sha-1-96", "alg=sm3")}, ErrNoCommonAlgorithm, "alg", 2},
		{"E3 token too long to show", []string{with("alg=hmac-sha-1-96", "alg="+strings.Repeat("a", 33))}, ErrNoCommonAlgorithm, "alg", 1},
	}
	ours := []ims.Suite{gcm, sha1AES, gmac, sha1Null}
	kinds := []error{ErrNoIPsec, ErrMalformed, ErrBadValue, ErrNoCommonAlgorithm, ErrMismatch}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o, err := Select(mustParse(t, tt.rows...), ours)
			var e *Error
			if !errors.As(err, &e) {
				t.Fatalf("Select() = %+v, %v, want an *Error", o, err)
			}
			for _, k := range kinds {
				want := k == tt.kind || k == ErrMalformed && tt.kind == ErrBadValue
				if errors.Is(err, k) != want {
					t.Errorf("errors.Is(%q, %q) = %v", err, k, !want)
				}
			}
			if e.Param != tt.param || e.Entry != tt.entry {
				t.Errorf("error %q names %q of entry %d, want %q of %d", err, e.Param, e.Entry, tt.param, tt.entry)
			}
			if tt.param != "" && !strings.Contains(err.Error(), tt.param+" ") {
				t.Errorf("error %q does not name %s", err, tt.param)
			}
			safeText(t, err)
		})
	}
}

// Peers: A1.28a
func TestSelect(t *testing.T) {
	e := func(s ims.Suite, q, rest string) string {
		return fmt.Sprintf("ipsec-3gpp;alg=%s;ealg=%s%s%s", s.Alg, s.Enc, q, rest)
	}
	tests := []struct {
		name  string
		rows  []string
		ours  []ims.Suite
		want  ims.Suite
		entry int
	}{
		{"R2.10 our order", []string{e(md5Null, "", tail), e(sha1Null, "", tail), e(sha1AES, "", tail)}, []ims.Suite{sha1AES, sha1Null, md5Null}, sha1AES, 3},
		{"R2.10 our order, other way", []string{e(md5Null, "", tail), e(sha1Null, "", tail), e(sha1AES, "", tail)}, []ims.Suite{sha1Null, sha1AES, md5Null}, sha1Null, 2},
		{"R2.10 q of the UE does not matter", []string{e(md5Null, ";q=1", tail), e(sha1AES, ";q=0.001", tail)}, []ims.Suite{sha1AES, md5Null}, sha1AES, 2},
		{"R2.3 broken entries are skipped", []string{e(sha1AES, "", ";spi-c=1"), e(sha1AES, "", tail)}, []ims.Suite{sha1AES}, sha1AES, 2},
		{"R2.4 SPI overflow is skipped", []string{e(sha1AES, "", ";spi-c=4294967296;spi-s=1;port-c=1;port-s=2"), e(sha1Null, "", tail)}, []ims.Suite{sha1AES, sha1Null}, sha1Null, 2},
		{"R2.6 media plane entry is skipped", []string{e(sha1AES, ";mediasec", tail) + ", " + e(sha1AES, "", tail)}, []ims.Suite{sha1AES}, sha1AES, 2},
		{"R2.9 UDP-enc-tun is skipped", []string{e(sha1AES, ";mod=UDP-enc-tun", tail), e(sha1AES, ";mod=TRANS", tail)}, []ims.Suite{sha1AES}, sha1AES, 2},
		{"R2.9 ah is skipped", []string{e(sha1AES, ";prot=ah", tail), e(sha1AES, ";prot=ESP", tail)}, []ims.Suite{sha1AES}, sha1AES, 2},
		{"R2.8 gcm", []string{e(gcm, "", tail)}, ims.Suites(), gcm, 1},
		{"R2.8 gmac", []string{e(gmac, "", tail)}, ims.Suites(), gmac, 1},
		{"R2.8 md5 3des", []string{e(md5DES, "", tail)}, ims.Suites(), md5DES, 1},
		{"R2.8 sha1 3des", []string{e(sha1DES, "", tail)}, ims.Suites(), sha1DES, 1},
		{"R2.11 no encryption offered", []string{e(sha1Null, "", tail)}, ims.Suites(), sha1Null, 1},
		{"R8.30 first usable of a suite", []string{e(sha1AES, "", ";spi-c=7;spi-s=8;port-c=9;port-s=10"), e(sha1AES, "", tail)}, ims.Suites(), sha1AES, 1},
		{"bad q is no reason to refuse", []string{e(sha1AES, ";q=7", tail)}, ims.Suites(), sha1AES, 1},
		{"R1.4 reserved SPI is accepted", []string{e(sha1AES, "", ";spi-c=1;spi-s=255;port-c=9;port-s=10")}, ims.Suites(), sha1AES, 1},
		{"T16 SPI limits", []string{e(sha1AES, "", ";spi-c=256;spi-s=4294967295;port-c=9;port-s=10")}, ims.Suites(), sha1AES, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := mustParse(t, tt.rows...)
			o, err := Select(l, tt.ours)
			if err != nil {
				t.Fatal(err)
			}
			if o.Suite != tt.want || o.Mechanism.Entry != tt.entry {
				t.Errorf("Select() chose %s of entry %d, want %s of %d", o.Suite, o.Mechanism.Entry, tt.want, tt.entry)
			}
			// R8.30: SPIs and ports of the chosen entry itself.
			m := &l.Mechanisms[tt.entry-1]
			if o.SPIC != m.SPIC || o.SPIS != m.SPIS || o.PortC != m.PortC || o.PortS != m.PortS || o.SPIC == 0 {
				t.Errorf("Select() = %+v, want the values of %s", o, m)
			}
		})
	}
}

// Peers: B1.18
func TestEqual(t *testing.T) {
	const (
		a = "ipsec-3gpp;q=0.9;alg=hmac-sha-1-96;ealg=aes-cbc;prot=esp;mod=trans;spi-c=1073741905;spi-s=1073741904;port-c=6111;port-s=6100"
		b = "ipsec-3gpp;q=0.5;alg=hmac-sha-1-96;ealg=null;prot=esp;mod=trans;spi-c=1073741905;spi-s=1073741904;port-c=6111;port-s=6100"
		c = "ipsec-3gpp;q=0.1;alg=hmac-md5-96;ealg=null;prot=esp;mod=trans;spi-c=1073741905;spi-s=1073741904;port-c=6111;port-s=6100"
	)
	cut := func(s, old, new string) string {
		t.Helper()
		if !strings.Contains(s, old) {
			t.Fatalf("no %q in %q", old, s)
		}
		return strings.Replace(s, old, new, 1)
	}
	rows := func(r ...string) []string { return r }
	tests := []struct {
		name  string
		a, b  []string
		entry int    // of the difference
		text  string // empty: equal
	}{
		{"R2.16 same", rows(a + ", " + b), rows(a + ", " + b), 0, ""},
		{"R8.8 other rows", rows(a + ", " + b + ", " + c), rows(a, b+","+c), 0, ""},
		{"T2 rows in another order", rows(a, b, c), rows(c, a, b), 0, ""},
		{"R2.16 rows split and in another order", rows(a + ", " + b), rows(b, a), 0, ""},
		{"R2.16 rows of several entries in another order", rows(a+","+b, c), rows(c, a+", "+b), 0, ""},
		{"R2.16 order in a row", rows(a + ", " + b), rows(b + ", " + a), 1, "is in another order"},
		{"R2.16 order in a row among rows", rows(c, a+", "+b), rows(b+", "+a, c), 2, "is in another order"},
		{"R8.8 spacing and case", rows(a), rows(" IPSEC-3gpp ;Q = 0.9; ALG= HMAC-SHA-1-96;ealg=AES-cbc;prot=ESP;mod=TRANS;\r\n spi-c=1073741905;spi-s=1073741904;port-c=6111;port-s=6100;"), 0, ""},
		{"R2.16 parameter order", rows(a), rows("ipsec-3gpp;port-s=6100;port-c=6111;spi-s=1073741904;spi-c=1073741905;mod=trans;prot=esp;ealg=aes-cbc;alg=hmac-sha-1-96;q=0.9"), 0, ""},
		{"R2.16 quoted", rows(a), rows(cut(a, "alg=hmac-sha-1-96", `alg="hmac-sha-1-96"`)), 0, ""},
		{"R2.16 q as decimal", rows(a), rows(cut(a, "q=0.9", "q=0.90")), 0, ""},
		{"R2.16 SPI as number", rows(a), rows(cut(a, "spi-c=", "spi-c=00")), 0, ""},
		{"R2.16 port as number", rows(a), rows(cut(a, "port-s=6100", "port-s=06100")), 0, ""},
		{"R2.16 defaults omitted", rows(b), rows(cut(cut(cut(b, ";ealg=null", ""), ";prot=esp", ""), ";mod=trans", "")), 0, ""},
		{"R2.16 unknown parameter", rows(a + ";x=Y"), rows(cut(a, "ipsec-3gpp;", `ipsec-3gpp;X="Y";`)), 0, ""},
		{"R2.6 media plane entries ignored", rows(a + ", sdes-srtp;mediasec"), rows("msrp-tls;mediasec", a), 0, ""},
		{"R2.5 merged junk is mirrored", rows(a + ",null"), rows(a + " , null"), 0, ""},
		{"both empty", nil, rows(" , "), 0, ""},

		{"R2.16 entry missing", rows(a + ", " + b), rows(a), 0, "1 entries instead of 2"},
		{"R2.16 entry added", rows(a), rows(a, b), 0, "2 entries instead of 1"},
		{"R2.16 non-ipsec entry counts", rows(a), rows(a, "tls"), 0, "2 entries instead of 1"},
		{"T1 spi-s off by one", rows(a + ", " + b), rows(a + ", " + cut(b, "spi-s=1073741904", "spi-s=1073741905")), 2, "spi-s differs"},
		{"R2.18 port-c", rows(a), rows(cut(a, "port-c=6111", "port-c=6112")), 1, "port-c differs"},
		{"R2.18 port-s", rows(a), rows(cut(a, "port-s=6100", "port-s=6101")), 1, "port-s differs"},
		{"R2.18 spi-c", rows(a), rows(cut(a, "spi-c=1073741905", "spi-c=1073741906")), 1, "spi-c differs"},
		{"R2.12 bidding down alg", rows(a + ", " + c), rows(cut(a, "hmac-sha-1-96", "hmac-md5-96") + ", " + c), 1, "alg differs"},
		{"R2.12 bidding down ealg", rows(a), rows(cut(a, ";ealg=aes-cbc", "")), 1, "ealg differs"},
		{"R2.16 mod", rows(a), rows(cut(a, "mod=trans", "mod=tun")), 1, "mod differs"},
		{"R2.16 prot", rows(a), rows(cut(a, "prot=esp", "prot=ah")), 1, "prot differs"},
		{"R2.16 q", rows(a), rows(cut(a, "q=0.9", "q=0.91")), 1, "q differs"},
		{"R2.16 q omitted", rows(a), rows(cut(a, "q=0.9;", "")), 1, "q missing"},
		{"R2.16 unknown parameter added", rows(a), rows(a + ";x"), 1, "x added"},
		{"R2.16 unknown parameter missing", rows(a + ";x=1"), rows(a), 1, "x missing"},
		{"R2.16 unknown parameter differs", rows(a + ";x=y"), rows(a + ";x=Y"), 1, "x differs"},
		{"R2.16 flag is not an empty value", rows(a + ";x"), rows(a + ";x="), 1, "x differs"},
		{"R2.16 parameter twice", rows(a), rows(a + ";spi-s=1073741904"), 1, "spi-s added"},
		{"R2.16 other mechanism", rows(a), rows(cut(a, "ipsec-3gpp", "ipsec-man")), 1, "is another mechanism"},
		{"R2.16 overflowing numbers are compared", rows(cut(a, "spi-c=1073741905", "spi-c=4294967296")), rows(cut(a, "spi-c=1073741905", "spi-c=8589934592")), 1, "spi-c differs"},
		{"R2.16 unreadable entries are compared", rows("x;a b=1"), rows("x;a b=2"), 1, "is another text"},
		{"R2.16 one entry twice", rows(a, b), rows(a, a), 2, "q differs"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			la, lb := mustParse(t, tt.a...), mustParse(t, tt.b...)
			err := Equal(la, lb)
			if tt.text == "" {
				if err != nil {
					t.Errorf("Equal() = %v", err)
				}
				if err := Equal(lb, la); err != nil {
					t.Errorf("Equal() the other way = %v", err)
				}
				return
			}
			var e *Error
			if !errors.Is(err, ErrMismatch) || !errors.As(err, &e) {
				t.Fatalf("Equal() = %v, want ErrMismatch", err)
			}
			if e.Entry != tt.entry || !strings.HasSuffix(err.Error(), ": "+tt.text) {
				t.Errorf("Equal() = %q (entry %d), want entry %d: %s", err, e.Entry, tt.entry, tt.text)
			}
			if Equal(lb, la) == nil {
				t.Error("Equal() the other way = nil")
			}
			safeText(t, err)
		})
	}
}

// Peers: A1.05e
func TestServerSuites(t *testing.T) {
	ours := []ims.Suite{gcm, sha1AES, gmac, sha1Null, md5Null}
	offer := func(s ...ims.Suite) List {
		var rows []string
		for _, s := range s {
			rows = append(rows, "ipsec-3gpp;alg="+s.Alg.String()+";ealg="+s.Enc.String()+tail)
		}
		return mustParse(t, rows...)
	}
	broken := mustParse(t, "ipsec-3gpp;alg=null;ealg=aes-gcm;mod=UDP-enc-tun"+tail, "ipsec-3gpp;alg=aes-gmac;spi-c=1", "ipsec-3gpp;alg=hmac-sha-1-96"+tail)
	tests := []struct {
		name   string
		chosen ims.Suite
		ours   []ims.Suite
		client List
		list   bool
		want   []ims.Suite
	}{
		{"R2.14 chosen only", sha1AES, ours, offer(sha1AES, md5Null), false, []ims.Suite{sha1AES}},
		{"R2.12 whole list", sha1AES, ours, offer(sha1AES, md5Null), true, ours},
		{"R2.12 first is chosen", gcm, ours, offer(gcm, sha1AES), true, ours},
		{"R2.13 unusable offers before the chosen one are left out", sha1Null, ours, broken, true, []ims.Suite{sha1AES, sha1Null, md5Null}},
		{"chosen not in our list any more", sha1DES, ours, offer(sha1DES, md5Null), true, append([]ims.Suite{sha1DES}, ours...)},
		{"repetitions and illegal pairs left out", sha1AES, []ims.Suite{{Alg: ims.AlgNull, Enc: ims.EncNull}, gcm, gcm, sha1AES, sha1AES, gcm}, offer(sha1AES), true, []ims.Suite{gcm, sha1AES}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := ServerSuites(tt.chosen, tt.ours, tt.client, tt.list)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("ServerSuites() (-want +got):\n%s", diff)
			}
		})
	}
}

func TestServerAppend(t *testing.T) {
	s := Server{SPIC: 1073741905, SPIS: 4294967295, PortC: 6111, PortS: 6100, Suites: []ims.Suite{sha1AES}}
	const one = "ipsec-3gpp;q=0.9;alg=hmac-sha-1-96;ealg=aes-cbc;prot=esp;mod=trans;spi-c=1073741905;spi-s=4294967295;port-c=6111;port-s=6100"
	if got := string(s.Append([]byte("x"))); got != "x"+one {
		t.Errorf("R2.14 Append()\n got %s\nwant %s", got, one)
	}
	s.Suites = []ims.Suite{sha1AES, sha1Null}
	const two = one + ", ipsec-3gpp;q=0.8;alg=hmac-sha-1-96;ealg=null;prot=esp;mod=trans;spi-c=1073741905;spi-s=4294967295;port-c=6111;port-s=6100"
	if got := string(s.Append(nil)); got != two {
		t.Errorf("R2.12 Append()\n got %s\nwant %s", got, two)
	}
	s.Suites = nil
	if got := s.Append(nil); len(got) != 0 {
		t.Errorf("Append() without suites = %q", got)
	}
	buf := make([]byte, 0, 2048)
	s.Suites = ims.Suites()
	if n := testing.AllocsPerRun(100, func() { buf = s.Append(buf[:0]) }); n != 0 {
		t.Errorf("Append() allocates %v times", n)
	}
}

// Peers: B1.11b
func TestQ(t *testing.T) {
	good := map[string]uint16{
		"0": 0, "1": 1000, "0.": 0, "1.": 1000, "0.0": 0, "1.000": 1000, "0.9": 900, "0.10": 100, "0.100": 100, "0.1000": 100,
		"0.001": 1, "0.999": 999, ".5": 500, "00.25": 250, "01": 1000,
	}
	for s, want := range good {
		if got, ok := parseQ(s); !ok || got != want {
			t.Errorf("parseQ(%q) = %d, %v, want %d", s, got, ok, want)
		}
	}
	for _, s := range []string{"", ".", "2", "1.1", "1.001", "0.1234", "-0.1", "+1", "0,5", "0.5 ", "0.5.5", "1e-1", "10"} {
		if got, ok := parseQ(s); ok {
			t.Errorf("parseQ(%q) = %d, want a refusal", s, got)
		}
	}
	for q := uint16(0); q <= MaxQ; q++ {
		text := string(appendQ(nil, q))
		if got, ok := parseQ(text); !ok || got != q {
			t.Fatalf("parseQ(appendQ(%d)) = %d, %v", q, got, ok)
		}
	}
	// q is text to the comparison when it is no qvalue.
	if err := Equal(mustParse(t, "ipsec-3gpp;q=7"), mustParse(t, "ipsec-3gpp;q=8")); err == nil {
		t.Error("unreadable q values compare equal")
	}
}
