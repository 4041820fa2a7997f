// Package sipmsgtest has golden SIP messages for tests: one registration with IMS AKA and ipsec-3gpp (TS 33.203 §7.2,
// messages SM1 to SM12), traffic over the security associations it makes, and two messages of fixed size for
// benchmarks. The values of all messages belong together: keys, SPIs, ports and digests are those of one run.
//
// Every function returns a fresh copy with the Content-Length that its body has.
package sipmsgtest

import (
	"strconv"
	"strings"
)

// The values that the messages agree on.
const (
	Domain = "ims.mnc001.mcc001.3gppnetwork.org"
	IMPI   = "001010000000001@" + Domain
	// TemporaryIMPU is derived from the IMSI and barred; DefaultIMPU is the first of P-Associated-URI.
	TemporaryIMPU = "sip:001010000000001@" + Domain
	DefaultIMPU   = "sip:+15550100001@" + Domain

	UEAddr     = "10.45.0.7"
	GmAddr     = "10.0.0.5" // P-CSCF towards the UE
	MwAddr     = "10.0.1.5" // P-CSCF towards the core, port 5060
	PathURI    = "sip:f-7c1e@pcscf." + Domain + ":5060;lr"
	RouteURI   = "sip:orig@scscf." + Domain + ":6060;lr" // Service-Route
	Contact    = "<sip:001010000000001@10.45.0.7:6300>" + contactParams
	Visited    = `"` + Domain + `"`
	IK         = "f769bcd751044604127672711c6d3441"
	CK         = "b40ba9a3c58b2a05bbf0d987b21bf8cb"
	Nonce      = "I1U8vpY3qJ0hiuZNrke/NVXzKLQ1d7m5Sp/6w1Tfr7M="
	UEPortC    = 6301
	UEPortS    = 6300
	UESPIC     = 3963789885
	UESPIS     = 3963789886
	PCSCFPortC = 6111
	PCSCFPortS = 6100
	PCSCFSPIC  = 1073741905
	PCSCFSPIS  = 1073741904

	// SecurityClient is what the UE offers in SM1 and SM7.
	SecurityClient = "ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc;prot=esp;mod=trans;spi-c=3963789885;spi-s=3963789886;port-c=6301;port-s=6300, " +
		"ipsec-3gpp;alg=hmac-sha-1-96;prot=esp;mod=trans;spi-c=3963789885;spi-s=3963789886;port-c=6301;port-s=6300"
	// SecurityServer is the answer in SM6, and Security-Verify in everything the UE sends afterwards.
	SecurityServer = "ipsec-3gpp;q=0.9;alg=hmac-sha-1-96;ealg=aes-cbc;prot=esp;mod=trans;spi-c=1073741905;spi-s=1073741904;port-c=6111;port-s=6100, " +
		"ipsec-3gpp;q=0.5;alg=hmac-sha-1-96;ealg=null;prot=esp;mod=trans;spi-c=1073741905;spi-s=1073741904;port-c=6111;port-s=6100"
)

const (
	contactParams = `;+sip.instance="<urn:gsma:imei:35175605-123456-0>";+g.3gpp.smsip;+g.3gpp.icsi-ref="urn%3Aurn-7%3A3gpp-service.ims.icsi.mmtel"`
	pani          = "P-Access-Network-Info: 3GPP-E-UTRAN-FDD;utran-cell-id-3gpp=0010100010019B01"
	viaSM1        = "Via: SIP/2.0/UDP 10.45.0.7:5060;branch=z9hG4bKsm1;received=10.45.0.7;rport=5060"
	viaP          = "Via: SIP/2.0/UDP 10.0.1.5:5060;branch=z9hG4bKp1"
	fromReg       = "From: <" + TemporaryIMPU + ">;tag=u1"
	toReg         = "To: <" + TemporaryIMPU + ">"
	authSM1       = `Authorization: Digest username="` + IMPI + `",realm="` + Domain + `",uri="sip:` + Domain + `",nonce="",response=""`
	authSM7       = `Authorization: Digest username="` + IMPI + `",realm="` + Domain + `",uri="sip:` + Domain + `",nonce="` + Nonce +
		`",response="402ab8df9f3a4d63a9f47c2f90e02938",algorithm=AKAv1-MD5,qop=auth,nc=00000001,cnonce="0a4f113b"`
)

// Build joins the start line and header rows, adds Content-Length and appends the body.
func Build(body string, lines ...string) []byte {
	return []byte(strings.Join(lines, "\r\n") + "\r\nContent-Length: " + strconv.Itoa(len(body)) + "\r\n\r\n" + body)
}

// SM1 is the first REGISTER, in clear over UDP from port 5060 to port 5060.
func SM1() []byte {
	return Build("",
		"REGISTER sip:"+Domain+" SIP/2.0",
		"Via: SIP/2.0/UDP 10.45.0.7:5060;branch=z9hG4bKsm1;rport",
		"Max-Forwards: 70",
		fromReg,
		toReg,
		"Call-ID: reg1@10.45.0.7",
		"CSeq: 1 REGISTER",
		"Contact: <sip:001010000000001@10.45.0.7:5060>"+contactParams,
		"Expires: 600000",
		"Supported: path, gruu",
		"Require: sec-agree",
		"Proxy-Require: sec-agree",
		"Security-Client: "+SecurityClient,
		authSM1)
}

// SM2 is SM1 as it leaves for the core.
func SM2() []byte {
	return Build("",
		"REGISTER sip:"+Domain+" SIP/2.0",
		viaP,
		viaSM1,
		"Max-Forwards: 69",
		fromReg,
		toReg,
		"Call-ID: reg1@10.45.0.7",
		"CSeq: 1 REGISTER",
		"Contact: <sip:001010000000001@10.45.0.7:5060>"+contactParams,
		"Expires: 600000",
		"Supported: path, gruu",
		"Require: path",
		"Path: <"+PathURI+">",
		"P-Visited-Network-ID: "+Visited,
		`P-Charging-Vector: icid-value="5b6e1c0a9d2f";icid-generated-at=10.0.1.5`,
		authSM1+`,integrity-protected="no"`)
}

// SM5 is the 401 of the core, with ck and ik.
func SM5() []byte {
	return Build("",
		"SIP/2.0 401 Unauthorized",
		viaP,
		viaSM1,
		fromReg,
		toReg+";tag=s1",
		"Call-ID: reg1@10.45.0.7",
		"CSeq: 1 REGISTER",
		`WWW-Authenticate: Digest realm="`+Domain+`",nonce="`+Nonce+`",algorithm=AKAv1-MD5,ck="`+CK+`",ik="`+IK+`",qop="auth"`)
}

// SM6 is the 401 to the UE, in clear.
func SM6() []byte {
	return Build("",
		"SIP/2.0 401 Unauthorized",
		viaSM1,
		fromReg,
		toReg+";tag=s1",
		"Call-ID: reg1@10.45.0.7",
		"CSeq: 1 REGISTER",
		`WWW-Authenticate: Digest realm="`+Domain+`",nonce="`+Nonce+`",algorithm=AKAv1-MD5,qop="auth"`,
		"Security-Server: "+SecurityServer)
}

// SM7 is the protected REGISTER, UDP from port 6301 to port 6100.
func SM7() []byte {
	return Build("",
		"REGISTER sip:"+Domain+" SIP/2.0",
		"Via: SIP/2.0/UDP 10.45.0.7:6300;branch=z9hG4bKsm7",
		"Max-Forwards: 70",
		fromReg,
		toReg,
		"Call-ID: reg1@10.45.0.7",
		"CSeq: 2 REGISTER",
		"Contact: "+Contact,
		"Expires: 600000",
		"Supported: path, gruu",
		"Require: sec-agree",
		"Proxy-Require: sec-agree",
		"Security-Client: "+SecurityClient,
		"Security-Verify: "+SecurityServer,
		authSM7,
		pani)
}

// SM8 is SM7 as it leaves for the core.
func SM8() []byte {
	return Build("",
		"REGISTER sip:"+Domain+" SIP/2.0",
		"Via: SIP/2.0/UDP 10.0.1.5:5060;branch=z9hG4bKp2",
		"Via: SIP/2.0/UDP 10.45.0.7:6300;branch=z9hG4bKsm7",
		"Max-Forwards: 69",
		fromReg,
		toReg,
		"Call-ID: reg1@10.45.0.7",
		"CSeq: 2 REGISTER",
		"Contact: "+Contact,
		"Expires: 600000",
		"Supported: path, gruu",
		"Require: path",
		"Path: <"+PathURI+">",
		"P-Visited-Network-ID: "+Visited,
		`P-Charging-Vector: icid-value="5b6e1c0a9d30";icid-generated-at=10.0.1.5`,
		authSM7+`,integrity-protected="yes"`,
		pani)
}

// SM11 is the 200 of the core to SM8.
func SM11() []byte {
	return ok200("Via: SIP/2.0/UDP 10.0.1.5:5060;branch=z9hG4bKp2", "P-Charging-Function-Addresses: ccf=192.0.2.9")
}

// SM12 is the 200 to the UE, UDP from port 6111 to port 6300.
func SM12() []byte { return ok200("", "") }

func ok200(via, pcfa string) []byte {
	lines := []string{"SIP/2.0 200 OK"}
	if via != "" {
		lines = append(lines, via)
	}
	lines = append(lines,
		"Via: SIP/2.0/UDP 10.45.0.7:6300;branch=z9hG4bKsm7",
		fromReg,
		toReg+";tag=s2",
		"Call-ID: reg1@10.45.0.7",
		"CSeq: 2 REGISTER",
		"Contact: <sip:001010000000001@10.45.0.7:6300>;expires=600000"+contactParams,
		"Path: <"+PathURI+">",
		"Service-Route: <"+RouteURI+">",
		"P-Associated-URI: <"+DefaultIMPU+">, <tel:+15550100001>")
	if pcfa != "" {
		lines = append(lines, pcfa)
	}
	return Build("", lines...)
}

// MOMessage is a MESSAGE from the UE, UDP from port 6301 to port 6100.
func MOMessage() []byte {
	return Build("hello",
		"MESSAGE sip:+15550100002@"+Domain+" SIP/2.0",
		"Via: SIP/2.0/UDP 10.45.0.7:6300;branch=z9hG4bKm1",
		"Max-Forwards: 70",
		"Route: <sip:10.0.0.5:6100;lr>, <"+RouteURI+">",
		"From: <"+DefaultIMPU+">;tag=m1",
		"To: <sip:+15550100002@"+Domain+">",
		"Call-ID: m1@10.45.0.7",
		"CSeq: 1 MESSAGE",
		"P-Preferred-Identity: <"+DefaultIMPU+">",
		pani,
		"Require: sec-agree",
		"Proxy-Require: sec-agree",
		"Security-Verify: "+SecurityServer,
		"Content-Type: text/plain")
}

// MTMessage is a MESSAGE to the UE as it leaves the P-CSCF, UDP from port 6111 to port 6300.
func MTMessage() []byte {
	return Build("hi",
		"MESSAGE sip:001010000000001@10.45.0.7:6300 SIP/2.0",
		"Via: SIP/2.0/UDP 10.0.0.5:6100;branch=z9hG4bKq1",
		"Via: SIP/2.0/UDP 10.0.1.7:6060;branch=z9hG4bKs9",
		"Max-Forwards: 67",
		"From: <sip:+15550100002@"+Domain+">;tag=r1",
		"To: <"+DefaultIMPU+">",
		"Call-ID: m2@scscf",
		"CSeq: 1 MESSAGE",
		"P-Asserted-Identity: <sip:+15550100002@"+Domain+">",
		"P-Called-Party-ID: <"+DefaultIMPU+">",
		"Content-Type: text/plain")
}

// SDP returns a session description with lines ending CRLF.
func SDP(addr string) string {
	return "v=0\r\no=- 1 1 IN IP4 " + addr + "\r\ns=-\r\nc=IN IP4 " + addr + "\r\nt=0 0\r\n" +
		"m=audio 50000 RTP/AVP 104\r\na=rtpmap:104 AMR-WB/16000/1\r\n"
}

// MOInvite is an INVITE from the UE, TCP from port 6301 to port 6100.
func MOInvite() []byte {
	return Build(SDP(UEAddr),
		"INVITE tel:+15550100002 SIP/2.0",
		"Via: SIP/2.0/TCP 10.45.0.7:6300;branch=z9hG4bKi1",
		"Max-Forwards: 70",
		"Route: <sip:10.0.0.5:6100;transport=tcp;lr>, <"+RouteURI+">",
		"From: <"+DefaultIMPU+">;tag=i1",
		"To: <tel:+15550100002>",
		"Call-ID: i1@10.45.0.7",
		"CSeq: 1 INVITE",
		`Contact: <sip:001010000000001@10.45.0.7:6300>;+g.3gpp.icsi-ref="urn%3Aurn-7%3A3gpp-service.ims.icsi.mmtel"`,
		"P-Preferred-Identity: <"+DefaultIMPU+">",
		"Security-Verify: "+SecurityServer,
		"Require: sec-agree",
		"Proxy-Require: sec-agree",
		"Supported: 100rel, timer, precondition",
		"Content-Type: application/sdp")
}

// MTInvite is an INVITE to the UE as it leaves the P-CSCF, TCP from port 6111 to port 6300.
func MTInvite() []byte {
	return Build(SDP("10.0.9.9"),
		"INVITE sip:001010000000001@10.45.0.7:6300 SIP/2.0",
		"Via: SIP/2.0/TCP 10.0.0.5:6100;branch=z9hG4bKq2",
		"Via: SIP/2.0/UDP 10.0.1.7:6060;branch=z9hG4bKs10",
		"Record-Route: <sip:f-7c1e@10.0.0.5:6100;transport=tcp;lr>",
		"Record-Route: <sip:10.0.1.7:6060;lr>",
		"Max-Forwards: 67",
		"From: <sip:+15550100002@"+Domain+">;tag=r2",
		"To: <"+DefaultIMPU+">",
		"Call-ID: i2@scscf",
		"CSeq: 1 INVITE",
		"Contact: <sip:+15550100002@10.45.0.9:6300>",
		"P-Asserted-Identity: <sip:+15550100002@"+Domain+">",
		"P-Called-Party-ID: <"+DefaultIMPU+">",
		"Supported: 100rel, timer, precondition",
		"Content-Type: application/sdp")
}

// Register941 is an unprotected REGISTER of exactly 941 bytes, the one that all figures of the project refer to.
func Register941() []byte {
	return Build("",
		"REGISTER sip:"+Domain+" SIP/2.0",
		"Via: SIP/2.0/UDP 127.0.0.1:6000;branch=z9hG4bK0123456789abcdef;rport",
		"Max-Forwards: 70",
		"From: <"+TemporaryIMPU+">;tag=4fa3c1b2",
		"To: <"+TemporaryIMPU+">",
		"Call-ID: 0123456789abcdef-a84b4c76e66710@127.0.0.1",
		"CSeq: 314 REGISTER",
		`Contact: <sip:001010000000001@127.0.0.1:6000>;+sip.instance="<urn:gsma:imei:35622410-483840-0>";+g.3gpp.smsip`,
		`Authorization: Digest username="`+IMPI+`",realm="`+Domain+`",nonce="",uri="sip:`+Domain+`",response=""`,
		"Expires: 600000",
		"Require: sec-agree",
		"Proxy-Require: sec-agree",
		"Supported: path,gruu",
		"Security-Client: ipsec-3gpp;alg=hmac-sha-1-96;ealg=null;spi-c=4096;spi-s=4097;port-c=6000;port-s=6001",
		"P-Access-Network-Info: 3GPP-E-UTRAN-FDD;utran-cell-id-3gpp=0010100010019b01")
}

// Update709 is an in-dialog request of exactly 709 bytes.
func Update709() []byte {
	return Build("",
		"UPDATE sip:001010000000002@10.45.0.3:5100;alias=10.45.0.3~5100~1 SIP/2.0",
		"Via: SIP/2.0/UDP 127.0.0.1:6000;branch=z9hG4bK0123456789abcdef;rport",
		"Max-Forwards: 70",
		"Route: <sip:127.0.0.1:5060;lr>",
		"From: <"+TemporaryIMPU+">;tag=4fa3c1b2",
		"To: <sip:001010000000002@"+Domain+">;tag=9b2fd411",
		"Call-ID: 0123456789abcdef-a84b4c76e66710@127.0.0.1",
		"CSeq: 2 UPDATE",
		`Contact: <sip:001010000000001@127.0.0.1:6000>;+g.3gpp.icsi-ref="urn%3Aurn-7%3A3gpp-service.ims.icsi.mmtel"`,
		"Session-Expires: 1800;refresher=uac",
		"Min-SE: 90",
		"Supported: timer",
		"P-Access-Network-Info: 3GPP-E-UTRAN-FDD;utran-cell-id-3gpp=0010100010019b01",
		"User-Agent: IMS-UE/1.0")
}

// Message is a golden message with its name.
type Message struct {
	Name  string
	Bytes []byte
}

// All returns all of them.
func All() []Message {
	return []Message{
		{"SM1", SM1()},
		{"SM2", SM2()},
		{"SM5", SM5()},
		{"SM6", SM6()},
		{"SM7", SM7()},
		{"SM8", SM8()},
		{"SM11", SM11()},
		{"SM12", SM12()},
		{"MOMessage", MOMessage()},
		{"MTMessage", MTMessage()},
		{"MOInvite", MOInvite()},
		{"MTInvite", MTInvite()},
		{"Register941", Register941()},
		{"Update709", Update709()},
	}
}
