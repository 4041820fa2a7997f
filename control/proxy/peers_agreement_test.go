package proxy

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/config"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/secagree"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// Cases of the table in peers_test.go: the security agreement, its keys, and who may register.

var (
	gcm     = ims.Suite{Alg: ims.AlgNull, Enc: ims.EncAESGCM}
	gmac    = ims.Suite{Alg: ims.AlgAESGMAC, Enc: ims.EncNull}
	sha1AES = ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC}
)

func peerInitialFromAnyPort(t *testing.T) {
	for _, port := range []uint16{5060, 5063, 6301, 40123} {
		r := newRig(t)
		p := newPhone()
		f := clearFlow()
		f.Remote = netip.AddrPortFrom(ueAddr, port)
		req := r.one(f, p.register("any", int(port)))
		if !strings.Contains(req.msg, `integrity-protected="no"`) {
			t.Errorf("from port %d:\n%s", port, req.msg)
		}
		ans := r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge))
		if ans.remote != f.Remote {
			t.Errorf("401 to %v, REGISTER came from %v", ans.remote, f.Remote)
		}
		r.readServer(p, ans.msg)
		r.confirm(p)
		r.served(p)
	}
}

// A refresh that comes from port 5060 of the phone is in clear, whatever Via says; one over the set is protected although
// its Via names 5060.
func peerStateNotFromPort(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	over := r.one(p.protectedFlow, p.register("via5060", 5060, "Security-Client:"))
	if !strings.Contains(over.msg, `integrity-protected="yes"`) {
		t.Errorf("over the set, Via port 5060:\n%s", over.msg)
	}
	p.agree()
	clear := r.one(clearFlow(), p.register("via6300", 6300))
	if !strings.Contains(clear.msg, `integrity-protected="no"`) {
		t.Errorf("in clear, Via port 6300:\n%s", clear.msg)
	}
}

func peerServerList(t *testing.T) {
	r := newRig(t, func(c *Config) { c.ServerList = true })
	p := newPhone()
	r.challenge(p, clearFlow(), 5060)
	l, err := secagree.Parse(p.server)
	if err != nil || l.IPsecCount() < 2 {
		t.Fatalf("Security-Server %q: %v", p.server, err)
	}
	for i := 1; i < len(l.Mechanisms); i++ {
		if l.Mechanisms[i].Q >= l.Mechanisms[i-1].Q {
			t.Errorf("q does not fall: %s", p.server)
		}
	}
	r.confirm(p)
}

func peerForeignVerify(t *testing.T) {
	r := newRig(t)
	a := r.signUp(phoneAt("10.45.0.7", 1))
	b := r.signUp(phoneAt("10.45.0.8", 2))
	// Refresh and de-registration with the SPIs of the other phone.
	req := r.one(b.protectedFlow, b.register("forged", 6300, "Security-Client:", "Security-Verify: "+a.server))
	r.one(coreFlow(), answerTo(t, req.msg, "200 OK", b.ok200()...))
	r.leave(b, "Security-Verify: "+a.server)
	// And SM7 of a new agreement.
	c := phoneAt("10.45.0.9", 3)
	r.challenge(c, c.clear(), 5060)
	c.authorization = c.proof()
	if out := r.one(c.protectedFlow, c.register("sm7f", 6300, "Security-Verify: "+a.server)); status(t, out.msg) != 494 {
		t.Errorf("SM7 with the Security-Server of another phone:\n%s", out.msg)
	}
	r.advance(200 * time.Second)
	if r.backend.Count() != 4 {
		t.Errorf("%d SAs, want those of the other phone", r.backend.Count())
	}
	for _, s := range r.backend.Removed {
		if s.UE == a.addr {
			t.Error("SAs of the other phone were removed")
		}
	}
	r.served(a)
}

func peerVerifyEveryParameter(t *testing.T) {
	for _, list := range []bool{false, true} {
		for _, change := range []string{
			"q=0.9:q=0.8", "alg=null:alg=hmac-md5-96", "ealg=aes-gcm:ealg=aes-cbc", "prot=esp:prot=ah", "mod=trans:mod=tun",
			"spi-c=:spi-c=1", "spi-s=:spi-s=1", "port-c=6:port-c=7", "port-s=6:port-s=7", "port-s=:x=1;port-s=",
			"ipsec-3gpp:tls;q=0.95, ipsec-3gpp",
		} {
			from, to, _ := strings.Cut(change, ":")
			r := newRig(t, func(c *Config) { c.ServerList = list })
			p := newPhone()
			_, p.securityClient, _ = strings.Cut(offer("ipsec-3gpp;alg=null;ealg=aes-gcm"), ": ")
			r.challenge(p, clearFlow(), 5060)
			bad := strings.Replace(p.server, from, to, 1)
			if bad == p.server {
				t.Fatalf("%s is not in %s", from, p.server)
			}
			p.authorization = proof
			if out := r.one(p.protectedFlow, p.register("sm7", 6300, "Security-Verify: "+bad)); status(t, out.msg) != 494 {
				t.Errorf("list %v, %s became %s:\n%s", list, from, to, out.msg)
			}
		}
	}
	r := newRig(t, func(c *Config) { c.ServerList = true })
	p := newPhone()
	r.challenge(p, clearFlow(), 5060)
	p.authorization = proof
	first, _, _ := strings.Cut(p.server, ", ")
	if out := r.one(p.protectedFlow, p.register("sm7", 6300, "Security-Verify: "+first)); status(t, out.msg) != 494 {
		t.Errorf("only the first of the entries:\n%s", out.msg)
	}
}

func peerVerifyLayout(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	r.challenge(p, clearFlow(), 5060)
	p.server = strings.ToUpper(strings.ReplaceAll(p.server, ";", " ; "))
	r.confirm(p)
}

func peerOtherMechanismFirst(t *testing.T) {
	for _, row := range []string{
		"Security-Client: tls;q=0.9, digest;q=0.5;d-alg=md5, ",
		"Security-Client: ipsec-ike;q=0.7, ipsec-man, ",
		"Security-Client: sdes-srtp;mediasec, ",
	} {
		_, entry, _ := strings.Cut(offer("ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc"), ": ")
		if got, _ := chosen(t, row+entry); got != sha1AES {
			t.Errorf("%s: %v", row, got)
		}
	}
}

func peerMissingParameters(t *testing.T) {
	got, server := chosen(t, offer("ipsec-3gpp;alg=hmac-sha-1-96"))
	if want := (ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncNull}); got != want || !strings.Contains(server, "ealg=null") {
		t.Errorf("without ealg: SAs %v, %s", got, server)
	}
	if out := refusal(t, offer("ipsec-3gpp;ealg=aes-cbc")); status(t, out) != 400 || !strings.Contains(out, "alg") {
		t.Errorf("without alg:\n%s", out)
	}
}

func peerSpaces(t *testing.T) {
	row := "Security-Client: ipsec-3gpp ; alg = hmac-sha-1-96;  ealg=aes-cbc ;spi-c=4294967290; spi-s= 4294967291; port-c=6301; port-s=6300"
	if got, _ := chosen(t, row); got != sha1AES {
		t.Errorf("chosen %v", got)
	}
}

func peerOwnPreference(t *testing.T) {
	// Null encryption first, as some phones have it, and last; what counts is our list.
	for _, entries := range [][]string{
		{"ipsec-3gpp;alg=hmac-sha-1-96;ealg=null", "ipsec-3gpp;alg=hmac-md5-96;ealg=aes-cbc", "ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc"},
		{"ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc", "ipsec-3gpp;alg=hmac-md5-96;ealg=aes-cbc", "ipsec-3gpp;alg=hmac-sha-1-96;ealg=null"},
		{"ipsec-3gpp;q=1.0;alg=hmac-md5-96;ealg=null", "ipsec-3gpp;q=0.1;alg=hmac-sha-1-96;ealg=aes-cbc"},
	} {
		if got, server := chosen(t, offer(entries...)); got != sha1AES || !strings.Contains(server, "alg=hmac-sha-1-96;ealg=aes-cbc") {
			t.Errorf("of %q: %v, %s", entries, got, server)
		}
	}
	// The operator's order, not a built-in one.
	null := ims.Suite{Alg: ims.AlgHMACMD5, Enc: ims.EncNull}
	got, _ := chosen(t, offer("ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc", "ipsec-3gpp;alg=hmac-md5-96"),
		func(c *Config) { c.Suites = []ims.Suite{null, sha1AES} })
	if got != null {
		t.Errorf("configured first is %v, chosen %v", null, got)
	}
}

func peerNeverMixed(t *testing.T) {
	// hmac-sha-1-96 with aes-cbc would be preferred, but nobody offers that pair.
	offered := []ims.Suite{{Alg: ims.AlgHMACSHA1, Enc: ims.EncNull}, {Alg: ims.AlgHMACMD5, Enc: ims.EncAESCBC}}
	got, _ := chosen(t, offer("ipsec-3gpp;alg=hmac-sha-1-96;ealg=null", "ipsec-3gpp;alg=hmac-md5-96;ealg=aes-cbc"))
	if got != offered[1] {
		t.Errorf("chosen %v of %v", got, offered)
	}
}

func peerUnknownAlgorithm(t *testing.T) {
	for _, entry := range []string{"ipsec-3gpp;alg=hmac-sha-1-96;ealg=chacha20", "ipsec-3gpp;alg=hmac-sha-256;ealg=aes-cbc", "ipsec-3gpp;alg=null;ealg=null"} {
		if out := refusal(t, offer(entry)); status(t, out) != 494 {
			t.Errorf("%s:\n%s", entry, out)
		}
	}
	if got, server := chosen(t, offer("ipsec-3gpp;alg=hmac-sha-1-96;ealg=chacha20", "ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc")); got != sha1AES {
		t.Errorf("beside a good one: %v, %s", got, server)
	}
}

func peerAEAD(t *testing.T) {
	ck, _ := hex.DecodeString("b40ba9a3c58b2a05bbf0d987b21bf8cb")
	ik, _ := hex.DecodeString("f769bcd751044604127672711c6d3441")
	for _, c := range []struct {
		suite     ims.Suite
		enc, auth []byte
	}{{gcm, ck, nil}, {gmac, nil, ik}} {
		r := newRig(t)
		p := newPhone()
		_, p.securityClient, _ = strings.Cut(offer(fmt.Sprintf("ipsec-3gpp;alg=%s;ealg=%s", c.suite.Alg, c.suite.Enc)), ": ")
		r.challenge(p, clearFlow(), 5060)
		k := r.backend.Installed[0].Keys
		if k.Suite != c.suite || !bytes.Equal(k.Enc, c.enc) || !bytes.Equal(k.Auth, c.auth) || k.Salt == [4]byte{} {
			t.Errorf("%v: SAs of %v with %d and %d octets of key", c.suite, k.Suite, len(k.Enc), len(k.Auth))
		}
	}
}

func peerTripleDESKey(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	_, p.securityClient, _ = strings.Cut(offer("ipsec-3gpp;alg=hmac-md5-96;ealg=des-ede3-cbc"), ": ")
	r.challenge(p, clearFlow(), 5060)
	ck, _ := hex.DecodeString("b40ba9a3c58b2a05bbf0d987b21bf8cb")
	if k := r.backend.Installed[0].Keys; !bytes.Equal(k.Enc, append(ck, ck[:8]...)) {
		t.Error("encryption key is not CK1, CK2, CK1")
	}
}

func peerDeprecatedStayOff(t *testing.T) {
	c := config.Default()
	c.Security.DisableDeprecated = true
	suites := c.Security.Suites()
	if len(suites) == 0 {
		t.Fatal("without the deprecated pairs nothing is left")
	}
	r := newRig(t, func(c *Config) { c.Suites = suites })
	for n := range 3 { // for every phone, not only until the first use
		p := phoneAt("10.45.0.7", n)
		row := offer("ipsec-3gpp;alg=hmac-md5-96;ealg=aes-cbc", "ipsec-3gpp;alg=hmac-sha-1-96;ealg=des-ede3-cbc")
		if out := r.one(p.clear(), p.register("old", 5060, row)); status(t, out.msg) != 494 {
			t.Errorf("phone %d:\n%s", n, out.msg)
		}
	}
	r.signUp(phoneAt("10.45.0.7", 3))
}

func peerKeyLengths(t *testing.T) {
	for _, row := range []string{
		strings.Replace(challenge, `f769bcd751044604127672711c6d3441`, `f769bcd7510446041276`, 1),
		strings.Replace(challenge, `b40ba9a3c58b2a05bbf0d987b21bf8cb`, `b40b`, 1),
		strings.Replace(challenge, `f769bcd751044604127672711c6d3441`, `zz69bcd751044604127672711c6d3441`, 1),
		strings.Replace(challenge, `,ik="f769bcd751044604127672711c6d3441"`, ``, 1),
	} {
		r := newRig(t)
		req := r.one(clearFlow(), newPhone().register("x", 5060))
		out := r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", row))
		if status(t, out.msg) != 500 || !strings.Contains(out.msg, "WWW-Authenticate") || len(r.backend.Installed) != 0 {
			t.Errorf("%s:\n%s", row, out.msg)
		}
	}
}

func peerKeysWiped(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	s := r.context(p).Current
	if bytes.Count(s.Keys.Auth, []byte{0}) == len(s.Keys.Auth) {
		t.Fatal("no keys while the set lives")
	}
	r.leave(p)
	r.empty()
	for _, k := range []ims.Key{s.Keys.Auth, s.Keys.Enc} {
		if bytes.Count(k, []byte{0}) != len(k) {
			t.Error("keys outlive their set")
		}
	}
}

// The parameters of the challenge in every order: what remains is a list without holes.
func peerKeysStripped(t *testing.T) {
	ck, ik := `ck="b40ba9a3c58b2a05bbf0d987b21bf8cb"`, `ik="f769bcd751044604127672711c6d3441"`
	for _, list := range [][]string{
		{`realm="r"`, `nonce="n"`, `algorithm=AKAv1-MD5`, ck, ik, `qop="auth"`},
		{`realm="r"`, `nonce="n"`, `algorithm=AKAv1-MD5`, `qop="auth"`, ck, ik},
		{ck, `realm="r"`, `nonce="n"`, ik, `algorithm=AKAv1-MD5`, `qop="auth"`},
		{ik, ck, `realm="r"`, `nonce="n"`, `algorithm=AKAv1-MD5`, `qop="auth"`},
	} {
		r := newRig(t)
		req := r.one(clearFlow(), newPhone().register("x", 5060))
		out := r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", "WWW-Authenticate: Digest "+strings.Join(list, ", ")))
		got := get(t, out.msg, sipmsg.WWWAuthenticate)
		if want := `Digest realm="r", nonce="n", algorithm=AKAv1-MD5, qop="auth"`; strings.ReplaceAll(got, ",", ", ") != want && got != want {
			t.Errorf("of %q remains %q", list, got)
		}
	}
}

// An answer with keys to a REGISTER that makes no SA set.
func peerKeysStrippedAlways(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	first := r.one(clearFlow(), p.register("a", 5060))
	second := r.one(clearFlow(), p.register("b", 5060)) // replaces the first
	for _, req := range []sent{first, second} {
		for _, out := range r.deliver(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge)) {
			if strings.Contains(out.msg, "b40ba9a3") || strings.Contains(out.msg, "f769bcd7") {
				t.Errorf("keys leave:\n%s", out.msg)
			}
		}
	}
	t.Run("in another answer", TestKeysInOtherAnswers)
}

func peerOddChallenges(t *testing.T) {
	for _, algorithm := range []string{"AKAv1-MD5", "AKAv2-MD5", "AKAv1-SHA-256", "AKAv2-SHA-256", "AKAv1-MD5-sess", "AKAv1-SHA-512-256"} {
		r := newRig(t)
		p := newPhone()
		req := r.one(clearFlow(), p.register("x", 5060))
		row := strings.Replace(challenge, "AKAv1-MD5", algorithm, 1)
		ans := r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", row))
		if !strings.Contains(ans.msg, "algorithm="+algorithm) {
			t.Fatalf("%s:\n%s", algorithm, ans.msg)
		}
		r.readServer(p, ans.msg)
		r.confirm(p)
	}
}

func peerRegisterWithoutAuthorization(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	req := r.one(clearFlow(), p.register("na", 5060, "Authorization:"))
	r.readServer(p, r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge)).msg)
	r.confirm(p)
	r.served(p)
	if out := refusal(t, "Authorization:", "To: <sip:"+domain+">"); status(t, out) != 400 {
		t.Errorf("neither Authorization nor a user in To:\n%s", out)
	}
}

func peerIMPIUnlikeIMPU(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	p.impi = "private@" + domain
	to := "To: <sip:+15550100001@" + domain + ">"
	req := r.one(clearFlow(), p.register("x", 5060, to))
	r.readServer(p, r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge)).msg)
	p.authorization = p.proof()
	req = r.one(p.protectedFlow, p.register("y", 6300, to, "Security-Verify: "+p.server))
	if ans := r.one(coreFlow(), answerTo(t, req.msg, "200 OK", granted...)); status(t, ans.msg) != 200 {
		t.Errorf("answer:\n%s", ans.msg)
	}
	r.served(p)
}

func peerOffersWithoutIPsec(t *testing.T) {
	for _, row := range []string{"Security-Client: tls;q=0.5", "Security-Client: digest;d-alg=md5, tls"} {
		out := refusal(t, row)
		if status(t, out) != 421 || !strings.Contains(get(t, out, sipmsg.SecurityServer), "ipsec-3gpp") {
			t.Errorf("%s:\n%s", row, out)
		}
	}
}

func peerTunnelModes(t *testing.T) {
	for param, warning := range map[string]string{
		"prot=ah": "prot", "mod=tun": "mod", "mod=UDP-enc-tun": "mod", "prot=esp;mod=udp-enc-tun": "mod",
	} {
		out := refusal(t, offer("ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc;"+param))
		if status(t, out) != 494 || !strings.Contains(out, "Security-Client: "+warning) && !strings.Contains(out, warning+" ") {
			t.Errorf("%s:\n%s", param, out)
		}
	}
}

// A phone behind a NAT is told apart by its Via: the core sees both addresses, and its SAs are for the one that packets
// come from.
func peerBehindNAT(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	req := r.one(clearFlow(), p.register("nat", 5060, "Via: SIP/2.0/UDP 192.168.1.2:5060;branch=z9hG4bKnat;rport"))
	if !strings.Contains(req.msg, "192.168.1.2:5060") || !strings.Contains(req.msg, "received="+ueAddr.String()) {
		t.Errorf("REGISTER at the core:\n%s", req.msg)
	}
	r.readServer(p, r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge)).msg)
	if s := r.backend.Installed[0]; s.UE != ueAddr {
		t.Errorf("SAs for %v", s.UE)
	}
	p.authorization = proof
	out := r.one(p.protectedFlow, p.register("nat7", 6300, "Security-Verify: "+p.server, "Via: SIP/2.0/UDP 192.168.1.2:6300;branch=z9hG4bKnat7"))
	if status(t, out.msg) != 400 || !strings.Contains(out.msg, "Via: sent-by is not the address") {
		t.Errorf("protected, Via of the inside:\n%s", out.msg)
	}
}

func peerViaNames(t *testing.T) {
	r := newRig(t, func(c *Config) {
		c.Hosts["phone.example"], c.Hosts["other.example"] = ueAddr, netip.MustParseAddr("10.45.0.9")
	})
	p := r.registered()
	for host, want := range map[string]bool{"phone.example": true, "other.example": false, "unknown.example": false, "10.45.0.9": false} {
		out := r.one(p.protectedFlow, p.register("v"+host, 6300, "Security-Client:", "Via: SIP/2.0/UDP "+host+":6300;branch=z9hG4bK"+host))
		if got := out.remote == coreAddr; got != want {
			t.Errorf("sent-by %s: forwarded %v, want %v", host, got, want)
		}
	}
	if out := r.one(p.protectedFlow, p.register("v2", 6300, "Security-Client:",
		"Via: SIP/2.0/UDP 10.45.0.7:6300;branch=z9hG4bKv2, SIP/2.0/UDP 10.45.0.8;branch=z9hG4bKv3")); status(t, out.msg) != 400 {
		t.Errorf("two Via entries:\n%s", out.msg)
	}
}

func peerSanity(t *testing.T) {
	e := "Security-Client: ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc;"
	for values, want := range map[string]int{
		"spi-c=4000;spi-s=4001;port-c=6300;port-s=6300":                  400,
		"spi-c=4000;spi-s=4000;port-c=6301;port-s=6300":                  400,
		"spi-c=0;spi-s=4001;port-c=6301;port-s=6300":                     400,
		"spi-c=4294967296;spi-s=4001;port-c=6301;port-s=6300":            400,
		"spi-c=18446744073709551617;spi-s=4001;port-c=6301;port-s=6300":  400,
		"spi-c=-1;spi-s=4001;port-c=6301;port-s=6300":                    400,
		"spi-c=4000;spi-s=4001;port-c=71837;port-s=6300":                 400,
		"spi-c=4000;spi-s=4001;port-c=0;port-s=6300":                     400,
		"spi-c=4000;spi-s=4001;port-c=0x189d;port-s=6300":                400,
		"spi-c=4000;spi-s=4001;port-c=6301":                              400,
		"spi-c=4000;spi-c=4002;spi-s=4001;port-c=6301;port-s=6300":       400,
		"spi-c=4000;spi-s=4001;port-c=6301;port-s=6300;alg=hmac-md5-96 ": 400,
	} {
		if out := refusal(t, e+values); status(t, out) != want {
			t.Errorf("%s: want %d\n%s", values, want, out)
		}
	}
}

func peerIntegrityClaim(t *testing.T) {
	for _, quoted := range []bool{true, false} {
		r := newRig(t, func(c *Config) { c.QuoteIntegrity = quoted })
		value := func(v string) string {
			if quoted {
				return `integrity-protected="` + v + `"`
			}
			return `integrity-protected=` + v
		}
		p := newPhone()
		claim := `Digest username="` + p.impi + `",realm="` + domain + `",uri="sip:` + domain + `",nonce="",response="",integrity-protected="yes"`
		p.authorization = claim
		req := r.one(clearFlow(), p.register("a", 5060))
		if got := get(t, req.msg, sipmsg.Authorization); !strings.HasSuffix(got, value("no")) || strings.Count(got, "integrity-protected") != 1 {
			t.Errorf("in clear: %s", got)
		}
		r.readServer(p, r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge)).msg)
		sm8, _ := r.confirm(p)
		if got := get(t, sm8.msg, sipmsg.Authorization); !strings.HasSuffix(got, value("yes")) {
			t.Errorf("protected: %s", got)
		}
	}
}

func peerAgreementStaysHere(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	sm2 := r.one(clearFlow(), p.register("a", 5060))
	r.readServer(p, r.one(coreFlow(), answerTo(t, sm2.msg, "401 Unauthorized", challenge)).msg)
	sm8, _ := r.confirm(p)
	up := r.one(p.protectedFlow, p.says("Security-Client: "+p.securityClient))
	for what, s := range map[string]sent{"first REGISTER": sm2, "protected REGISTER": sm8, "MESSAGE": up} {
		m := scan(t, s.msg)
		for _, id := range agreementHeaders {
			if m.Count(id) != 0 {
				t.Errorf("%s at the core has %v", what, id)
			}
		}
		if strings.Contains(s.msg, "sec-agree") {
			t.Errorf("%s at the core requires sec-agree:\n%s", what, s.msg)
		}
	}
}

func peerRefusalCodes(t *testing.T) {
	for want, rows := range map[int][]string{
		421: {"Security-Client:"},
		494: {offer("ipsec-3gpp;alg=hmac-sha-256;ealg=aes-cbc")},
		420: {"Proxy-Require: sec-agree, teleport"},
		400: {"Security-Client: ipsec-3gpp;alg=hmac-sha-1-96"},
	} {
		out := refusal(t, rows...)
		if status(t, out) != want || !strings.Contains(out, "Warning: 399 ") {
			t.Errorf("want %d and why:\n%s", want, out)
		}
		if server := get(t, out, sipmsg.SecurityServer); (want == 421 || want == 494) && strings.Count(server, "ipsec-3gpp;q=0.") != len(ims.Suites()) {
			t.Errorf("%d without all our mechanisms: %s", want, server)
		}
	}
}

func peerSeveralMechanismsOfSamsung(t *testing.T) {
	var entries []string
	for _, alg := range []string{"hmac-md5-96", "hmac-sha-1-96"} {
		for _, ealg := range []string{"des-ede3-cbc", "aes-cbc", "null"} {
			entries = append(entries, "ipsec-3gpp;prot=esp;mod=trans;alg="+alg+";ealg="+ealg)
		}
	}
	if got, _ := chosen(t, offer(entries...)); got != sha1AES {
		t.Errorf("chosen %v", got)
	}
}

func peerXiaomi(t *testing.T) {
	row := "Security-Client: ipsec-3gpp; alg=hmac-sha-1-96; ealg=aes-cbc; spi-c=4208752645; spi-s=3956287410; port-c=31112; port-s=31111"
	r := newRig(t)
	p := newPhone()
	_, p.securityClient, _ = strings.Cut(row, ": ")
	p.portC, p.portS = 31112, 31111
	r.challenge(p, clearFlow(), 5060)
	r.confirm(p)
	s := r.backend.Installed[0]
	if s.SPIs.UC != 4208752645 || s.SPIs.US != 3956287410 {
		t.Errorf("SPIs %v", s.SPIs)
	}
	for part := range strings.SplitSeq(p.server, ";") {
		if name, value, _ := strings.Cut(part, "="); strings.HasPrefix(name, "spi-") && strings.HasPrefix(value, "-") {
			t.Errorf("negative SPI in %s", p.server)
		}
	}
	r.served(p)
}

func peerPortOrder(t *testing.T) {
	for _, ports := range [][2]uint16{{6600, 6700}, {6700, 6600}, {65535, 1024}} {
		r := newRig(t)
		p := newPhone()
		p.portC, p.portS = ports[0], ports[1]
		p.securityClient = fmt.Sprintf("ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc;spi-c=%d;spi-s=%d;port-c=%d;port-s=%d", p.spiC, p.spiS, p.portC, p.portS)
		r.challenge(p, clearFlow(), 5060)
		r.confirm(p)
		r.served(p)
	}
}

// A REGISTER in clear that names a registered phone, or comes from it, takes nothing away from it.
func peerClearRegisterOfRegistered(t *testing.T) {
	r := newRig(t)
	p := r.signUp(phoneAt("10.45.0.7", 1))
	forger := phoneAt("10.45.0.66", 2)
	forger.impi = p.impi
	r.challenge(forger, forger.clear(), 5060) // SAs that nobody has the keys of
	own := *p
	own.agree()
	own.authorization = ""
	own.callID = "reboot"
	r.challenge(&own, own.clear(), 5060)
	r.served(p)
	de := phoneAt("10.45.0.66", 3)
	de.impi = p.impi
	req := r.one(de.clear(), de.register("de", 5060, "Expires: 0"))
	if !strings.Contains(req.msg, `integrity-protected="no"`) {
		t.Errorf("de-REGISTER in clear:\n%s", req.msg)
	}
	if out := r.one(coreFlow(), answerTo(t, req.msg, "200 OK")); status(t, out.msg) != 500 {
		t.Errorf("answer:\n%s", out.msg)
	}
	r.advance(5 * time.Minute)
	if u := r.context(p); u.State != registrar.Registered || r.backend.Count() != 4 {
		t.Errorf("%v, %d SAs", u.State, r.backend.Count())
	}
	r.served(p)
}

func peerOtherIdentityOverSet(t *testing.T) {
	r := newRig(t)
	a := r.signUp(phoneAt("10.45.0.7", 1))
	b := r.signUp(phoneAt("10.45.0.8", 2))
	b.authorization = a.proof()
	if out := r.one(b.protectedFlow, b.register("steal", 6300, "Security-Client:")); status(t, out.msg) != 403 {
		t.Errorf("the IMPI of another phone:\n%s", out.msg)
	}
	up := r.one(b.protectedFlow, strings.Replace(b.says(), "P-Preferred-Identity: <sip:+15550100001@"+domain, "P-Preferred-Identity: <sip:"+a.impi, 1))
	if got := get(t, up.msg, sipmsg.PAssertedIdentity); got != "<sip:"+b.impi+">" {
		t.Errorf("asserted identity %s", got)
	}
}

func peerEndlessChallenges(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	r.challenge(p, clearFlow(), 5060)
	p.authorization = proof
	req := r.one(p.protectedFlow, p.register("sm7", 6300, "Security-Verify: "+p.server))
	out := r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge))
	p.downlink(t, out)
	if status(t, out.msg) != 500 || !strings.Contains(out.msg, "Warning: 399") || strings.Contains(out.msg, "ck=") {
		t.Errorf("challenged again:\n%s", out.msg)
	}
	p.authorization = ""
	r.empty()
	r.signUp(phoneAt("10.45.0.7", 7))
}

func peerResync(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	r.challenge(p, clearFlow(), 5060)
	first := p.server
	p.authorization = strings.Replace(proof, `response="402ab8df9f3a4d63a9f47c2f90e02938"`, `response="",auts="5PYxMuX2NOT2NeQ="`, 1)
	p.agree()
	req := r.one(clearFlow(), p.register("auts", 5060))
	if !strings.Contains(req.msg, `auts="5PYxMuX2NOT2NeQ="`) || !strings.Contains(req.msg, `integrity-protected="no"`) {
		t.Errorf("REGISTER at the core:\n%s", req.msg)
	}
	r.readServer(p, r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge)).msg)
	if p.server == first || r.backend.Count() != 4 {
		t.Errorf("%d SAs after the second challenge", r.backend.Count())
	}
	r.confirm(p)
	r.served(p)
}

// An emergency registration is one like any other: authenticated, inside SAs, and the core sees what it is.
func peerEmergency(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	sos := "Contact: <sip:001010000000001@10.45.0.7:6300;sos>"
	req := r.one(clearFlow(), p.register("sos", 5060, sos))
	if !strings.Contains(get(t, req.msg, sipmsg.Contact), ";sos>") {
		t.Errorf("REGISTER at the core:\n%s", req.msg)
	}
	r.readServer(p, r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge)).msg)
	p.authorization = proof
	req = r.one(p.protectedFlow, p.register("sos7", 6300, sos, "Security-Verify: "+p.server))
	ok := r.one(coreFlow(), answerTo(t, req.msg, "200 OK", sos+";expires=3600", granted[1], granted[2]))
	p.downlink(t, ok)
	if status(t, ok.msg) != 200 || !strings.Contains(req.msg, `integrity-protected="yes"`) {
		t.Errorf("answer:\n%s", ok.msg)
	}
	r.served(p)
}
