package ue

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const layoutText = `# a comment
REGISTER sip:{domain} SIP/2.0
To: <{impu}>
From: <tel:{user}>;tag={tag}
Call-ID: {call-id}
CSeq: {cseq} REGISTER
Contact: <sip:{user}@{addr}:{port-s}>;expires={expires}
-X-Clear: {contact-port}
+X-Protected: {contact-port}
Security-Client: ipsec-3gpp;alg=hmac-sha-1-96;spi-c={0spi-c};spi-s={0spi-s};port-c={port-c};port-s={port-s}
security-client: ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc;spi-c={spi-c2};spi-s={spi-s2};port-c={port-c2};port-s={port-s2}
Security-Verify: {security-verify}
Authorization: Digest nonce="{nonce}",username="{impi}",response="{response}"{digest}
`

func TestLayout(t *testing.T) {
	l, err := ParseLayout(layoutText)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"hmac-sha-1-96=null", "hmac-sha-1-96=aes-cbc"}, []string{l.Offers()[0].String(), l.Offers()[1].String()}); diff != "" {
		t.Errorf("offers (-want +got):\n%s", diff)
	}
	u, _ := phone(t, Config{Quirks: Quirks{RegisterStyle: l}})
	o := sampleOffer()
	o.spiC = 300
	r := &attempt{
		callID: "reg1@10.45.0.7", tag: "u1", expires: u.cfg.Expires, offer: o,
		creds: credentials{realm: domain, nonce: s1.nonce, algorithm: "AKAv1-MD5", empty: true},
	}
	const head = `
REGISTER sip:DOMAIN SIP/2.0
To: <sip:001010000000001@DOMAIN>
From: <tel:001010000000001>;tag=u1
Call-ID: reg1@10.45.0.7
`
	const contact = "Contact: <sip:001010000000001@10.45.0.7:6300>;expires=600000\n"
	const client = `Security-Client: ipsec-3gpp;alg=hmac-sha-1-96;spi-c=0000000300;spi-s=3963789886;port-c=6301;port-s=6300
security-client: ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc;spi-c=2147549484;spi-s=1816371774;port-c=2205;port-s=2204
`
	const auth = `Authorization: Digest nonce="` + "NONCE" + `",username="001010000000001@DOMAIN",response="",algorithm=AKAv1-MD5` + "\nContent-Length: 0\n\n"
	wantMessage(t, u.buildRegister(r, u.contact(5060), nil, false),
		strings.ReplaceAll(head+"CSeq: 1 REGISTER\n"+contact+"X-Clear: 5060\n"+client+auth, "NONCE", s1.nonce))
	wantMessage(t, u.buildRegister(r, u.contact(6300), []string{"one", "two"}, true),
		strings.ReplaceAll(head+"CSeq: 2 REGISTER\n"+contact+"X-Protected: 6300\n"+client+"Security-Verify: one\nSecurity-Verify: two\n"+auth, "NONCE", s1.nonce))
	if want := []string{"To", "From", "Call-ID", "CSeq", "Contact", "X-Clear", "Security-Client", "security-client", "Authorization"}; !cmp.Equal(want, l.Names()) {
		t.Errorf("names %v, want %v", l.Names(), want)
	}
	if uri, err := contactOf(u.buildRegister(r, "", nil, true)); err != nil || uri != "sip:001010000000001@10.45.0.7:6300" {
		t.Errorf("contact %q, %v", uri, err)
	}
}

func TestLayoutErrors(t *testing.T) {
	for name, text := range map[string]string{
		"another method":   strings.Replace(layoutText, "REGISTER sip:{domain}", "INVITE sip:{domain}", 1),
		"unknown name":     strings.Replace(layoutText, "{tag}", "{tagg}", 1),
		"open brace":       strings.Replace(layoutText, "{tag}", "{tag", 1),
		"no colon":         strings.Replace(layoutText, "Call-ID: ", "Call-ID ", 1),
		"nothing offered":  strings.ReplaceAll(strings.ReplaceAll(layoutText, "Security-Client:", "X:"), "security-client:", "X:"),
		"nothing usable":   strings.ReplaceAll(layoutText, "hmac-sha-1-96", "hmac-sha-256-128"),
		"nothing whatever": "",
	} {
		if _, err := ParseLayout(text); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
