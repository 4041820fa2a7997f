package sipmsg_test

import (
	"net"
	"net/netip"
	"strconv"
	"testing"

	"github.com/emiago/sipgo/sip"

	"github.com/gmgate/gmgate/dataplane/sipmsg"
	"github.com/gmgate/gmgate/dataplane/sipmsg/sipmsgtest"
)

// forwarder makes the edits that the proxy makes to a message it forwards: own Via, received and rport, Max-Forwards,
// Path or Record-Route; sec-agree, Security-* and our Route go.
type forwarder struct {
	m     sipmsg.Msg
	e     sipmsg.Edit
	out   []byte
	local netip.AddrPort
	src   netip.AddrPort
}

func newForwarder() *forwarder {
	return &forwarder{
		local: netip.MustParseAddrPort("10.0.1.5:5060"),
		src:   netip.MustParseAddrPort("10.45.0.7:6301"),
	}
}

func (f *forwarder) forward(b []byte) ([]byte, error) {
	m, e := &f.m, &f.e
	if err := m.Scan(b); err != nil {
		return nil, err
	}
	row, _ := m.First(sipmsg.Via)
	via, err := sipmsg.ParseVia(m.Value(row))
	if err != nil {
		return nil, err
	}
	e.Reset(m)
	e.Open(m.HeadersStart(), m.HeadersStart()).Str("Via: SIP/2.0/UDP ").AddrPort(f.local).Str(";branch=z9hG4bK").
		Hex(uint64(len(via.Branch))).Str("\r\n").Close()
	at := int(row.ValStart)
	if via.HasRPort {
		e.Open(at+via.RPortAt.Start, at+via.RPortAt.End).Str("rport=").Uint(uint64(f.src.Port())).
			Str(";received=").BareAddr(f.src.Addr()).Close()
	}
	if r, ok := m.First(sipmsg.MaxForwards); ok {
		n, _ := sipmsg.ParseUint(m.Value(r))
		e.Open(int(r.ValStart), int(r.ValEnd)).Uint(uint64(n - 1)).Close()
	}
	if m.Method() == sipmsg.MethodRegister {
		e.Insert(m.HeadersStart(), "Path: <sip:f-7c1e@10.0.1.5:5060;lr>\r\n")
		e.RemoveTokens(m, sipmsg.Require, "sec-agree", "mediasec")
		e.RemoveTokens(m, sipmsg.ProxyRequire, "sec-agree", "mediasec")
		e.DeleteAll(m, sipmsg.SecurityClient)
		e.DeleteAll(m, sipmsg.SecurityVerify)
	} else {
		e.Insert(m.HeadersStart(), "Record-Route: <sip:f-7c1e@10.0.1.5:5060;lr>\r\n")
		e.PopElement(m, sipmsg.Route)
	}
	f.out, err = e.Append(f.out[:0])
	return f.out, err
}

func benchScan(b *testing.B, msg []byte) {
	var m sipmsg.Msg
	b.SetBytes(int64(len(msg)))
	b.ReportAllocs()
	for b.Loop() {
		if err := m.Scan(msg); err != nil {
			b.Fatal(err)
		}
	}
}

func benchScanEdit(b *testing.B, msg []byte) {
	f := newForwarder()
	b.SetBytes(int64(len(msg)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := f.forward(msg); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkScanRegister941(b *testing.B)     { benchScan(b, sipmsgtest.Register941()) }
func BenchmarkScanRequest709(b *testing.B)      { benchScan(b, sipmsgtest.Update709()) }
func BenchmarkScanEditRegister941(b *testing.B) { benchScanEdit(b, sipmsgtest.Register941()) }
func BenchmarkScanEditRequest709(b *testing.B)  { benchScanEdit(b, sipmsgtest.Update709()) }

func BenchmarkFrame941(b *testing.B) {
	msg := sipmsgtest.Register941()
	b.SetBytes(int64(len(msg)))
	b.ReportAllocs()
	for b.Loop() {
		if k, n, _ := sipmsg.Frame(msg, 65535); k != sipmsg.FrameMessage || n != len(msg) {
			b.Fatal(k, n)
		}
	}
}

func BenchmarkParseVia(b *testing.B) {
	v := []byte("SIP/2.0/UDP 10.45.0.7:5060;branch=z9hG4bKsm1;received=10.45.0.7;rport=5060")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := sipmsg.ParseVia(v); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkParseNameAddrURI(b *testing.B) {
	v := []byte("<sip:001010000000001@ims.mnc001.mcc001.3gppnetwork.org>;tag=4fa3c1b2")
	b.ReportAllocs()
	for b.Loop() {
		a, err := sipmsg.ParseNameAddr(v)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := sipmsg.ParseURI(a.URI); err != nil {
			b.Fatal(err)
		}
	}
}

// The same work by sipgo, for the ratio.

func benchSipgoParse(b *testing.B, msg []byte) {
	p := sip.NewParser()
	b.SetBytes(int64(len(msg)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := p.ParseSIP(msg); err != nil {
			b.Fatal(err)
		}
	}
}

func benchSipgoEdit(b *testing.B, msg []byte) {
	p := sip.NewParser()
	src := &net.UDPAddr{IP: net.IPv4(10, 45, 0, 7), Port: 6301}
	b.SetBytes(int64(len(msg)))
	b.ReportAllocs()
	for b.Loop() {
		parsed, err := p.ParseSIP(msg)
		if err != nil {
			b.Fatal(err)
		}
		r := parsed.(*sip.Request)
		v := r.Via()
		v.Params.Add("rport", strconv.Itoa(src.Port))
		v.Params.Add("received", src.IP.String())
		r.MaxForwards().Dec()
		nv := &sip.ViaHeader{ProtocolName: "SIP", ProtocolVersion: "2.0", Transport: "UDP", Host: "10.0.1.5", Port: 5060}
		nv.Params = sip.NewParams()
		nv.Params.Add("branch", "z9hG4bK0123456789abcdef")
		for _, h := range []string{"Route", "Require", "Proxy-Require", "Security-Client", "Security-Verify"} {
			r.RemoveHeader(h)
		}
		r.PrependHeader(nv, sip.NewHeader("Record-Route", "<sip:f-7c1e@10.0.1.5:5060;lr>"))
		sinkString = r.String()
	}
}

var sinkString string

func BenchmarkSipgoParseRegister941(b *testing.B) { benchSipgoParse(b, sipmsgtest.Register941()) }
func BenchmarkSipgoParseRequest709(b *testing.B)  { benchSipgoParse(b, sipmsgtest.Update709()) }
func BenchmarkSipgoEditRegister941(b *testing.B)  { benchSipgoEdit(b, sipmsgtest.Register941()) }
func BenchmarkSipgoEditRequest709(b *testing.B)   { benchSipgoEdit(b, sipmsgtest.Update709()) }
