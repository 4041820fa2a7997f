package ue

import (
	"encoding/hex"
	"errors"
	"log/slog"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/gmgate/gmgate/bench/internal/digestaka"
	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/esptun"
)

const domain = "ims.mnc001.mcc001.3gppnetwork.org"

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// s1 is the subscriber of TS 35.208 set 1, with its challenge and keys.
var s1 = struct{ k, opc, nonce, ck, ik string }{
	"465b5ce8b199b49faa5f0a2ee238a6bc", "cd63cb71954a9f4e48a5994e37a02baf", "I1U8vpY3qJ0hiuZNrke/NVXzKLQ1d7m5Sp/6w1Tfr7M=",
	"b40ba9a3c58b2a05bbf0d987b21bf8cb", "f769bcd751044604127672711c6d3441",
}

func unhex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

func identity() Identity {
	return Identity{IMPI: "001010000000001@" + domain, Domain: domain, K: [16]byte(unhex(s1.k)), OPc: [16]byte(unhex(s1.opc))}
}

// phone makes a UE with an established set but without sockets, for message builders.
func phone(t *testing.T, cfg Config) (*UE, *registration) {
	t.Helper()
	f := &Farm{
		cfg: FarmConfig{PCSCF: netip.MustParseAddrPort("10.0.0.5:5060"), T1: defaultT1}, log: discard(), ues: make(map[*UE]struct{}),
		layer: &xfrmLayer{},
	}
	cfg.Identity, cfg.Addr = identity(), netip.MustParseAddr("10.45.0.7")
	u, err := f.NewUE(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = u.Close() })
	set := &saSet{
		gen: 1, suite: ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC},
		spis:   ims.SPIs{UC: 3963789885, US: 3963789886, PC: 1073741905, PS: 1073741904},
		ports:  ims.Ports{UC: 6301, US: 6300, PC: 6111, PS: 6100},
		verify: []string{securityServer},
	}
	return u, &registration{
		impu: u.cfg.Identity.IMPU, contact: "sip:001010000000001@10.45.0.7:6300", set: set,
		serviceRoute: []string{"<sip:orig@scscf." + domain + ":6060;lr>"}, associated: []string{"sip:+15550100001@" + domain, "tel:+15550100001"},
	}
}

const (
	securityServer = "ipsec-3gpp;q=0.9;alg=hmac-sha-1-96;ealg=aes-cbc;prot=esp;mod=trans;spi-c=1073741905;spi-s=1073741904;port-c=6111;port-s=6100, " +
		"ipsec-3gpp;q=0.5;alg=hmac-sha-1-96;ealg=null;prot=esp;mod=trans;spi-c=1073741905;spi-s=1073741904;port-c=6111;port-s=6100"
	securityClientText = "ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc;prot=esp;mod=trans;spi-c=3963789885;spi-s=3963789886;port-c=6301;port-s=6300, " +
		"ipsec-3gpp;alg=hmac-sha-1-96;prot=esp;mod=trans;spi-c=3963789885;spi-s=3963789886;port-c=6301;port-s=6300"
)

var twoOffers = []ims.Suite{{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC}, {Alg: ims.AlgHMACSHA1, Enc: ims.EncNull}}

func sampleOffer() *offer {
	return &offer{spiC: 3963789885, spiS: 3963789886, portC: 6301, portS: 6300}
}

// crlf turns a golden message into what is on the wire.
func crlf(s string) string {
	return strings.ReplaceAll(strings.ReplaceAll(strings.TrimPrefix(s, "\n"), "\n", "\r\n"), "DOMAIN", domain)
}

func wantMessage(t *testing.T, m *sipwire.Message, want string) {
	t.Helper()
	if diff := cmp.Diff(crlf(want), string(m.Bytes())); diff != "" {
		t.Errorf("message differs (-want +got):\n%s", diff)
	}
}

func TestRegisterMessages(t *testing.T) {
	u, reg := phone(t, Config{Offers: twoOffers, Quirks: Quirks{OmitNullEalg: true}})
	r := &attempt{callID: "reg1@10.45.0.7", tag: "u1", expires: u.cfg.Expires, offer: sampleOffer(), creds: credentials{realm: domain}}
	r.offer.rows = securityClient(r.offer, u.cfg.Offers, u.cfg.Quirks)
	const head = `
REGISTER sip:DOMAIN SIP/2.0
Max-Forwards: 70
From: <sip:001010000000001@DOMAIN>;tag=u1
To: <sip:001010000000001@DOMAIN>
Call-ID: reg1@10.45.0.7
`
	const middle = `;+sip.instance="<urn:gsma:imei:00101000-000000-0>";+g.3gpp.smsip;+g.3gpp.icsi-ref="urn%3Aurn-7%3A3gpp-service.ims.icsi.mmtel"
Expires: 600000
Supported: path, gruu
Require: sec-agree
Proxy-Require: sec-agree
Security-Client: ` + securityClientText + "\n"
	wantMessage(t, u.buildRegister(r, u.contact(5060), nil, false), head+
		"CSeq: 1 REGISTER\nContact: <sip:001010000000001@10.45.0.7:5060>"+middle+
		`Authorization: Digest username="001010000000001@DOMAIN",realm="DOMAIN",uri="sip:DOMAIN",nonce="",response=""`+"\nContent-Length: 0\n\n")

	challenge := &sipwire.Message{Status: 401}
	challenge.Add("WWW-Authenticate", `Basic realm="legacy"`)
	challenge.Add("WWW-Authenticate", `Digest realm="`+domain+`",nonce="`+s1.nonce+`",algorithm=AKAv1-MD5`)
	if err := r.creds.take(challenge); err != nil {
		t.Fatal(err)
	}
	if ok, err := u.usim(&r.creds); !ok || err != nil {
		t.Fatalf("USIM refused the challenge: %v", err)
	}
	wantMessage(t, u.buildRegister(r, u.contact(6300), reg.set.verify, true), head+
		"CSeq: 2 REGISTER\nContact: <sip:001010000000001@10.45.0.7:6300>"+middle+"Security-Verify: "+securityServer+"\n"+
		`Authorization: Digest username="001010000000001@DOMAIN",realm="DOMAIN",uri="sip:DOMAIN",nonce="`+s1.nonce+
		`",response="1125a3c2e293453f07e08957ff235efc",algorithm=AKAv1-MD5`+
		"\nP-Access-Network-Info: 3GPP-E-UTRAN-FDD;utran-cell-id-3gpp=0010100010019B01\nContent-Length: 0\n\n")
}

func TestAuthorization(t *testing.T) {
	card := digestaka.Card{K: [16]byte(unhex(s1.k)), OPc: [16]byte(unhex(s1.opc))}
	rnd, autn, err := digestaka.ParseNonce(s1.nonce)
	if err != nil {
		t.Fatal(err)
	}
	v, sqn, _, err := card.Answer(rnd, autn, 0)
	if err != nil {
		t.Fatal(err)
	}
	auts, err := card.AUTS(rnd, sqn)
	if err != nil {
		t.Fatal(err)
	}
	base := credentials{realm: domain, nonce: s1.nonce, algorithm: "AKAv1-MD5", vector: v}
	for _, tc := range []struct {
		name   string
		change func(*credentials, *Quirks)
		vector digestaka.Vector
		want   string // regular expression for what follows the nonce
	}{
		{"no qop", func(*credentials, *Quirks) {}, v, `response="1125a3c2e293453f07e08957ff235efc",algorithm=AKAv1-MD5`},
		{
			"auth", func(c *credentials, _ *Quirks) { c.qop = "auth,auth-int" }, v,
			`response="[0-9a-f]{32}",algorithm=AKAv1-MD5,qop=auth,nc=00000001,cnonce="[0-9a-f]{16}"`,
		},
		{
			"auth-int", func(c *credentials, q *Quirks) { c.qop, q.AuthInt = "auth,auth-int", true }, v,
			`response="[0-9a-f]{32}",algorithm=AKAv1-MD5,qop=auth-int,nc=00000001,cnonce="[0-9a-f]{16}"`,
		},
		{
			"auts", func(c *credentials, _ *Quirks) { c.auts = auts },
			digestaka.Vector{},
			`response="6821238d21754c12bf172c668144dbb6",algorithm=AKAv1-MD5,auts="uoU/PBI8z0TpNZbjVcY="`,
		},
		{"not authentic", func(c *credentials, _ *Quirks) { c.empty = true }, v, `response="",algorithm=AKAv1-MD5`},
		{
			"forged integrity", func(c *credentials, q *Quirks) { q.IntegrityProtected, c.opaque = "yes", "o" }, v,
			`response="1125a3c2e293453f07e08957ff235efc",algorithm=AKAv1-MD5,opaque="o",integrity-protected="yes"`,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, q := base, Quirks{}
			tc.change(&c, &q)
			got := c.authorization(identity(), q)
			head := `Digest username="001010000000001@` + domain + `",realm="` + domain + `",uri="sip:` + domain + `",nonce="` + s1.nonce + `",`
			rest, ok := strings.CutPrefix(got, head)
			if !ok || !regexp.MustCompile("^"+tc.want+"$").MatchString(rest) {
				t.Errorf("got  %s\nwant %s%s", got, head, tc.want)
			}
			_, p, err := sipwire.ParseAuth(got)
			if err != nil {
				t.Fatal(err)
			}
			if c.empty {
				return
			}
			want, err := digestaka.Digest{
				Algorithm: p.Get("algorithm"), Username: p.Get("username"), Realm: p.Get("realm"), URI: p.Get("uri"), Method: "REGISTER",
				Nonce: p.Get("nonce"), QOP: p.Get("qop"), NC: p.Get("nc"), CNonce: p.Get("cnonce"),
			}.Response(tc.vector)
			if err != nil || want != p.Get("response") {
				t.Errorf("response %s, want %s (%v)", p.Get("response"), want, err)
			}
		})
	}
	c := base
	c.qop = "auth"
	c.authorization(identity(), Quirks{})
	if got := c.authorization(identity(), Quirks{}); !strings.Contains(got, "nc=00000002") {
		t.Errorf("second use of a nonce: %s", got)
	}
}

func TestUSIM(t *testing.T) {
	u, _ := phone(t, Config{})
	u.SetSQN(0xff9bb4d0b607) // the SQN of the challenge is not fresh any more
	c := credentials{nonce: s1.nonce}
	if ok, err := u.usim(&c); ok || err != nil || hex.EncodeToString(c.auts) != "ba853f3c123ccf44e93596e355c6" {
		t.Errorf("old SQN: %v, %v, auts %x", ok, err, c.auts)
	}
	u.SetSQN(0)
	c = credentials{nonce: strings.Replace(s1.nonce, "r7M=", "r7Q=", 1)}
	if ok, err := u.usim(&c); ok || err != nil || c.auts != nil || !c.empty {
		t.Errorf("forged AUTN: %v, %v, %+v", ok, err, c.auts)
	}
	c = credentials{nonce: "AAAA"}
	if _, err := u.usim(&c); err == nil {
		t.Error("short nonce accepted")
	}
}

func TestRequestMessages(t *testing.T) {
	u, reg := phone(t, Config{})
	m := u.initial(reg, "MESSAGE", "sip:+15550100002@"+domain)
	m.Body = []byte("hello")
	m.Set("Call-ID", "m1@10.45.0.7")
	m.Set("From", strings.Split(m.Get("From"), ";tag=")[0]+";tag=m1")
	wantMessage(t, m, `
MESSAGE sip:+15550100002@DOMAIN SIP/2.0
Max-Forwards: 70
Route: <sip:10.0.0.5:6100;lr>, <sip:orig@scscf.DOMAIN:6060;lr>
From: <sip:+15550100001@DOMAIN>;tag=m1
To: <sip:+15550100002@DOMAIN>
Call-ID: m1@10.45.0.7
CSeq: 1 MESSAGE
P-Preferred-Identity: <sip:+15550100001@DOMAIN>
P-Access-Network-Info: 3GPP-E-UTRAN-FDD;utran-cell-id-3gpp=0010100010019B01
Require: sec-agree
Proxy-Require: sec-agree
Security-Verify: `+securityServer+`
Content-Length: 5

hello`)
	d := &dialog{
		callID: "c1", local: "<sip:a@b>;tag=1", remote: "<sip:c@d>;tag=2", target: "sip:x@10.45.0.8:6300", seq: 1,
		routes: []string{"<sip:f-7c1e@10.0.0.5:6100;lr>", "<sip:10.0.1.9:5060;lr>"},
	}
	wantMessage(t, u.inDialog(reg, d, "BYE"), `
BYE sip:x@10.45.0.8:6300 SIP/2.0
Max-Forwards: 70
Route: <sip:f-7c1e@10.0.0.5:6100;lr>
Route: <sip:10.0.1.9:5060;lr>
From: <sip:a@b>;tag=1
To: <sip:c@d>;tag=2
Call-ID: c1
CSeq: 2 BYE
P-Access-Network-Info: 3GPP-E-UTRAN-FDD;utran-cell-id-3gpp=0010100010019B01
Require: sec-agree
Proxy-Require: sec-agree
Security-Verify: `+securityServer+`
Content-Length: 0

`)
	for _, size := range []int{0, 119, 500, 1500, 4000} {
		if got := len(u.sdp(size)); size > 200 && (got > size || got < size-10) {
			t.Errorf("sdp(%d) has %d octets", size, got)
		}
	}
}

func TestSecurityClient(t *testing.T) {
	for _, tc := range []struct {
		name   string
		offers []ims.Suite
		q      Quirks
		want   []string
	}{
		{"plain", twoOffers[:1], Quirks{}, []string{"ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc;prot=esp;mod=trans;spi-c=3963789885;spi-s=3963789886;port-c=6301;port-s=6300"}},
		{"defaults left out", twoOffers, Quirks{OmitNullEalg: true, OmitProtMod: true, RowPerOffer: true}, []string{
			"ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc;spi-c=3963789885;spi-s=3963789886;port-c=6301;port-s=6300",
			"ipsec-3gpp;alg=hmac-sha-1-96;spi-c=3963789885;spi-s=3963789886;port-c=6301;port-s=6300",
		}},
		{"padded and spaced, with a media plane entry", twoOffers[:1], Quirks{ZeroPadSPI: true, Spaces: true, ExtraOffer: "sdes-srtp;mediasec"}, []string{
			"ipsec-3gpp ; alg = hmac-sha-1-96 ; ealg = aes-cbc ; prot = esp ; mod = trans ; spi-c = 0000000300 ; spi-s = 3963789886 ; port-c = 6301 ; port-s = 6300, sdes-srtp;mediasec",
		}},
	} {
		o := sampleOffer()
		if tc.q.ZeroPadSPI {
			o.spiC = 300
		}
		if diff := cmp.Diff(tc.want, securityClient(o, tc.offers, tc.q)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tc.name, diff)
		}
	}
	got := securityVerify([]string{securityServer}, Quirks{VerifyPerRow: true})
	if len(got) != 2 || !strings.HasPrefix(got[0], "ipsec-3gpp;q=0.900;alg=hmac-sha-1-96;") || !strings.Contains(got[1], "q=0.500") {
		t.Errorf("securityVerify per row: %q", got)
	}
	if got := securityVerify([]string{securityServer}, Quirks{}); len(got) != 1 || got[0] != securityServer {
		t.Errorf("securityVerify: %q", got)
	}
}

func TestReadServer(t *testing.T) {
	entry := func(changes ...string) string {
		s := "ipsec-3gpp;q=0.9;alg=hmac-sha-1-96;ealg=aes-cbc;prot=esp;mod=trans;spi-c=1073741905;spi-s=1073741904;port-c=6111;port-s=6100"
		for i := 0; i+1 < len(changes); i += 2 {
			s = strings.Replace(s, changes[i], changes[i+1], 1)
		}
		return s
	}
	live := &saSet{spis: ims.SPIs{PC: 500, PS: 501}, ports: ims.Ports{PC: 6110, PS: 6100}}
	for _, tc := range []struct {
		name   string
		rows   []string
		offers []ims.Suite
		busy   inUse
		want   string // part of the error; empty means success
	}{
		{"trace", []string{securityServer}, twoOffers, inUse{}, ""},
		{"first entry not offered", []string{entry("aes-cbc", "des-ede3-cbc") + ", " + entry("0.9", "0.5")}, twoOffers, inUse{}, ""},
		{"beside a live set", []string{entry()}, twoOffers, inUse{sets: []*saSet{live}, server: 6100}, ""},
		{"nothing", nil, twoOffers, inUse{}, "no Security-Server"},
		{"not offered", []string{entry()}, twoOffers[1:], inUse{}, "no entry that the UE offered"},
		{"q does not fall", []string{entry() + ", " + entry("aes-cbc", "null")}, twoOffers, inUse{}, "does not fall"},
		{"q rises", []string{entry("0.9", "0.1") + ", " + entry("aes-cbc", "null")}, twoOffers, inUse{}, "does not fall"},
		{"no q", []string{entry("q=0.9;", "")}, twoOffers, inUse{}, "has q 0 times"},
		{"no ealg", []string{entry("ealg=aes-cbc;", "")}, twoOffers, inUse{}, "has ealg 0 times"},
		{"two alg", []string{entry() + ";alg=null"}, twoOffers, inUse{}, "has alg 2 times"},
		{"tunnel", []string{entry("trans", "tun")}, twoOffers, inUse{}, "not ESP in transport mode"},
		{"stray comma", []string{entry() + ","}, twoOffers, inUse{}, "empty element"},
		{"equal SPIs", []string{entry("1073741905", "1073741904")}, twoOffers, inUse{}, "SPIs"},
		{"reserved SPI", []string{entry("1073741905", "255")}, twoOffers, inUse{}, "SPIs"},
		{"SPI of the UE", []string{entry("1073741905", "3963789886")}, twoOffers, inUse{}, "is the UE's own"},
		{"equal ports", []string{entry("6111", "6100")}, twoOffers, inUse{}, "ports"},
		{"unprotected port", []string{entry("6100", "5060")}, twoOffers, inUse{}, "unprotected"},
		{"other ports per entry", []string{entry() + ", " + entry("0.9", "0.5", "6111", "6112", "aes-cbc", "null")}, twoOffers, inUse{}, "other SPIs or ports"},
		{"port-c of a live set", []string{entry("6111", "6110")}, twoOffers, inUse{sets: []*saSet{live}}, "is that of a live set"},
		{"SPI of a live set", []string{entry("1073741904", "500")}, twoOffers, inUse{sets: []*saSet{live}}, "is that of a live set"},
		{"port-s moved", []string{entry("6100", "6101")}, twoOffers, inUse{server: 6100}, "port-s changed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a, err := readServer(tc.rows, sampleOffer(), tc.offers, tc.busy)
			if tc.want != "" {
				if err == nil || !strings.Contains(err.Error(), tc.want) {
					t.Fatalf("error %v, want one with %q", err, tc.want)
				}
				return
			}
			want := agreement{suite: twoOffers[0], spiC: 1073741905, spiS: 1073741904, portC: 6111, portS: 6100}
			if err != nil || a != want {
				t.Errorf("got %+v, %v; want %+v", a, err, want)
			}
		})
	}
}

func sampleSAs(k ims.ESPKeys) [4]esptun.SA {
	a := netip.MustParseAddrPort
	return [4]esptun.SA{
		{SPI: 0x40000050, Src: a("10.45.0.7:6301"), Dst: a("10.0.0.5:6100"), Keys: k},
		{SPI: 0x40000051, Src: a("10.45.0.7:6300"), Dst: a("10.0.0.5:6111"), Keys: k},
		{Inbound: true, SPI: 0xec42a23e, Src: a("10.0.0.5:6111"), Dst: a("10.45.0.7:6300"), Keys: k},
		{Inbound: true, SPI: 0xec42a23d, Src: a("10.0.0.5:6100"), Dst: a("10.45.0.7:6301"), Keys: k},
	}
}

func TestXFRMBatch(t *testing.T) {
	k := ims.ESPKeys{Suite: twoOffers[0], Enc: unhex(s1.ck), Auth: unhex(s1.ik + "00000000")}
	const keys = "auth-trunc hmac(sha1) 0xf769bcd751044604127672711c6d344100000000 96 enc cbc(aes) 0xb40ba9a3c58b2a05bbf0d987b21bf8cb"
	got, err := xfrmAdd(sampleSAs(k), 101)
	if err != nil {
		t.Fatal(err)
	}
	want := strings.ReplaceAll(`xfrm state add src 10.45.0.7 dst 10.0.0.5 proto esp spi 0x40000050 reqid 101 mode transport replay-window 32 KEYS sel src 10.45.0.7/32 dst 10.0.0.5/32 sport 6301 dport 6100
xfrm state add src 10.45.0.7 dst 10.0.0.5 proto esp spi 0x40000051 reqid 102 mode transport replay-window 32 KEYS sel src 10.45.0.7/32 dst 10.0.0.5/32 sport 6300 dport 6111
xfrm state add src 10.0.0.5 dst 10.45.0.7 proto esp spi 0xec42a23e reqid 103 mode transport replay-window 32 KEYS sel src 10.0.0.5/32 dst 10.45.0.7/32 sport 6111 dport 6300
xfrm state add src 10.0.0.5 dst 10.45.0.7 proto esp spi 0xec42a23d reqid 104 mode transport replay-window 32 KEYS sel src 10.0.0.5/32 dst 10.45.0.7/32 sport 6100 dport 6301
xfrm policy add src 10.45.0.7/32 dst 10.0.0.5/32 sport 6301 dport 6100 dir out priority 1000 tmpl src 10.45.0.7 dst 10.0.0.5 proto esp reqid 101 mode transport
xfrm policy add src 10.45.0.7/32 dst 10.0.0.5/32 sport 6300 dport 6111 dir out priority 1000 tmpl src 10.45.0.7 dst 10.0.0.5 proto esp reqid 102 mode transport
xfrm policy add src 10.0.0.5/32 dst 10.45.0.7/32 sport 6111 dport 6300 dir in priority 1000 tmpl src 10.0.0.5 dst 10.45.0.7 proto esp reqid 103 mode transport
xfrm policy add src 10.0.0.5/32 dst 10.45.0.7/32 sport 6100 dport 6301 dir in priority 1000 tmpl src 10.0.0.5 dst 10.45.0.7 proto esp reqid 104 mode transport
`, "KEYS", keys)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("xfrmAdd (-want +got):\n%s", diff)
	}
	del := strings.Join(xfrmDelete(sampleSAs(ims.ESPKeys{})), "")
	if strings.Count(del, "xfrm policy delete ") != 4 || strings.Count(del, "xfrm state delete ") != 4 || strings.Contains(del, "auth") {
		t.Errorf("xfrmDelete:\n%s", del)
	}
	salt := [4]byte{0xdb, 0xc2, 0xb1, 0xc2}
	for suite, want := range map[string]string{
		"null=aes-gcm":               "aead rfc4106(gcm(aes)) 0xb40bdbc2b1c2 128",
		"aes-gmac=null":              "aead rfc4543(gcm(aes)) 0xf769dbc2b1c2 128",
		"hmac-md5-96=null":           `auth-trunc hmac(md5) 0xf769 96 enc ecb(cipher_null) ""`,
		"hmac-sha-1-96=des-ede3-cbc": "auth-trunc hmac(sha1) 0xf769 96 enc cbc(des3_ede) 0xb40b",
	} {
		s, err := ims.ParseSuite(suite)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := xfrmAlgorithms(ims.ESPKeys{Suite: s, Enc: ims.Key{0xb4, 0x0b}, Auth: ims.Key{0xf7, 0x69}, Salt: salt}); err != nil || got != want {
			t.Errorf("%s: %s, %v; want %s", suite, got, err, want)
		}
	}
	if _, err := xfrmAlgorithms(ims.ESPKeys{}); err == nil {
		t.Error("no suite was accepted")
	}
}

// TestXFRMErrorHidesKeys runs ip with a line it cannot parse: nothing of it may show.
func TestXFRMErrorHidesKeys(t *testing.T) {
	_, err := (&xfrmLayer{}).ip("xfrm state add enc cbc(aes) 0x" + s1.ck + " garbage\n")
	if err == nil {
		t.Fatal("ip accepted garbage")
	}
	if strings.Contains(err.Error(), s1.ck[:8]) {
		t.Errorf("the error shows a key")
	}
}

func TestCheckAnswer(t *testing.T) {
	u, reg := phone(t, Config{})
	pc, us := netip.MustParseAddrPort("10.0.0.5:6111"), netip.MustParseAddrPort("10.45.0.7:6300")
	via := sipwire.Via{Transport: "UDP", Host: "10.45.0.7", Port: 6300, Params: sipwire.Params{{Name: "branch", Value: "z9hG4bKi1"}}}
	invite := u.initial(reg, "INVITE", "tel:+15550100002")
	tx := &clientTx{u: u, set: reg.set, method: "INVITE", via: via, tr: ims.UDP, msg: invite}
	good := func() *inbound {
		m := &sipwire.Message{Status: 200, Reason: "OK"}
		m.Add("Via", via.String())
		m.Add("Record-Route", "<sip:x@10.0.9.9;lr>, <sip:f-7c1e@10.0.0.5:6100;lr>")
		return &inbound{msg: m, tr: ims.UDP, local: us, remote: pc, set: reg.set}
	}
	gone := make(chan struct{})
	for _, tc := range []struct {
		name   string
		change func(*inbound)
		want   string
	}{
		{"good", func(*inbound) {}, ""},
		{"port-pc in Record-Route", func(i *inbound) { i.msg.Set("Record-Route", "<sip:f@10.0.0.5:6111;lr>") }, "want 10.0.0.5:6100"},
		{"core side in Record-Route", func(i *inbound) { i.msg.Set("Record-Route", "<sip:f@10.0.1.5:5060;lr>") }, "want 10.0.0.5:6100"},
		{"Record-Route without lr", func(i *inbound) { i.msg.Set("Record-Route", "<sip:f@10.0.0.5:6100>") }, "without lr"},
		{"no Record-Route", func(i *inbound) { i.msg.Del("Record-Route") }, "no Record-Route"},
		{"from port-ps", func(i *inbound) { i.remote = netip.MustParseAddrPort("10.0.0.5:6100") }, "want port-pc"},
		{"by TCP", func(i *inbound) { i.tr, i.stream = ims.TCP, &stream{gone: gone} }, "by TCP to a request by UDP"},
		{"two Via", func(i *inbound) { i.msg.Add("Via", via.String()) }, "2 Via"},
		{"other Via", func(i *inbound) { i.msg.Set("Via", strings.Replace(via.String(), "6300", "6301", 1)) }, "Via came back"},
		{"ck", func(i *inbound) { i.msg.Add("WWW-Authenticate", `Digest realm="x",ck="00"`) }, "ck or ik"},
		{"stray comma", func(i *inbound) { i.msg.Add("WWW-Authenticate", `Digest realm="x",,nonce="00"`) }, "stray comma"},
		{"charging vector", func(i *inbound) { i.msg.Add("P-Charging-Vector", "icid-value=1") }, "P-Charging-Vector was sent"},
		{"charging functions", func(i *inbound) { i.msg.Add("P-Charging-Function-Addresses", "ccf=1") }, "P-Charging-Function-Addresses was sent"},
		{"Security-Verify", func(i *inbound) { i.msg.Add("Security-Verify", "x") }, "came back"},
	} {
		in := good()
		tc.change(in)
		got := strings.Join(u.checkAnswer(in, tx), "\n")
		if (tc.want == "") != (got == "") || !strings.Contains(got, tc.want) {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
	// By TCP the connection counts; once it is gone any is right.
	tcp := &clientTx{u: u, set: reg.set, method: "MESSAGE", via: via, tr: ims.TCP, msg: invite, stream: &stream{gone: make(chan struct{})}}
	in := good()
	in.tr, in.stream = ims.TCP, &stream{gone: gone}
	if got := u.checkAnswer(in, tcp); len(got) != 1 || !strings.Contains(got[0], "another connection") {
		t.Errorf("other connection: %q", got)
	}
	close(tcp.stream.gone)
	if got := u.checkAnswer(in, tcp); len(got) != 0 {
		t.Errorf("connection gone: %q", got)
	}
}

func TestCheckRequest(t *testing.T) {
	u, reg := phone(t, Config{})
	u.reg = reg
	good := func() *inbound {
		m := &sipwire.Message{Method: "INVITE", URI: reg.contact}
		m.Add("Via", "SIP/2.0/UDP 10.0.0.5:6100;branch=z9hG4bKq1")
		m.Add("Record-Route", "<sip:f-7c1e@10.0.0.5:6100;lr>, <sip:x@10.0.9.9;lr>")
		m.Add("To", "<sip:a@b>")
		m.Add("Max-Forwards", "67")
		m.Add("P-Asserted-Identity", "<sip:x@y>")
		return &inbound{msg: m, size: 700, tr: ims.UDP, remote: netip.MustParseAddrPort("10.0.0.5:6111"), set: reg.set}
	}
	for _, tc := range []struct {
		name   string
		change func(*inbound)
		want   string
	}{
		{"good", func(*inbound) {}, ""},
		{"port-pc in Via", func(i *inbound) { i.msg.Set("Via", "SIP/2.0/UDP 10.0.0.5:6111;branch=z9hG4bKq1") }, "top Via"},
		{"transport of Via", func(i *inbound) { i.msg.Set("Via", "SIP/2.0/TCP 10.0.0.5:6100;branch=z9hG4bKq1") }, "came by UDP"},
		{"port-pc in Record-Route", func(i *inbound) { i.msg.Set("Record-Route", "<sip:f@10.0.0.5:6111;lr>") }, "want 10.0.0.5:6100"},
		{"Route left", func(i *inbound) { i.msg.Add("Route", "<sip:f@10.0.1.5;lr>") }, "Route"},
		{"other Request-URI", func(i *inbound) { i.msg.URI = "sip:+15550100001@" + domain }, "Request-URI"},
		{"privacy", func(i *inbound) { i.msg.Add("Privacy", "header;id") }, "in spite of Privacy"},
		{"served user", func(i *inbound) { i.msg.Add("P-Served-User", "<sip:x@y>") }, "P-Served-User was sent"},
		{"too large", func(i *inbound) { i.size = 1301 }, "by UDP"},
	} {
		in := good()
		tc.change(in)
		v, err := in.msg.TopVia()
		if err != nil {
			t.Fatal(err)
		}
		got := strings.Join(u.checkRequest(in, v), "\n")
		if (tc.want == "") != (got == "") || !strings.Contains(got, tc.want) {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
	u.reg = nil
}

func TestExpiry(t *testing.T) {
	m := &sipwire.Message{Status: 200}
	m.Add("Contact", "<sip:other@x>;expires=5, <sip:me@10.45.0.7:6300>;+g.3gpp.smsip;expires=1800")
	m.Add("Expires", "60")
	if d, bad := ownExpiry(m, "sip:me@10.45.0.7:6300"); d != 1800*time.Second || bad != nil {
		t.Errorf("ownExpiry = %s, %v", d, bad)
	}
	if _, bad := ownExpiry(m, "sip:me@10.45.0.7:6301"); bad == nil {
		t.Error("a foreign Contact was accepted")
	}
}

func TestNewUEErrors(t *testing.T) {
	u, _ := phone(t, Config{})
	for name, cfg := range map[string]Config{
		"no IMPI":      {Addr: u.cfg.Addr, Identity: Identity{Domain: domain}},
		"no address":   {Identity: identity()},
		"other family": {Addr: netip.MustParseAddr("2001:db8::1"), Identity: identity()},
	} {
		if _, err := u.farm.NewUE(cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := u.Message(t.Context(), "sip:x@y", ""); !errors.Is(err, ErrNotRegistered) {
		t.Errorf("Message before registration: %v", err)
	}
	if err := u.Deregister(t.Context()); !errors.Is(err, ErrNotRegistered) {
		t.Errorf("Deregister before registration: %v", err)
	}
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }
