package sipmsg_test

import (
	"testing"

	"github.com/gmgate/gmgate/dataplane/sipmsg"
	"github.com/gmgate/gmgate/dataplane/sipmsg/sipmsgtest"
)

// Values that the compiler must not optimise away.
var (
	sinkErr   error
	sinkBytes []byte
	sinkBool  bool
)

func TestZeroAlloc(t *testing.T) {
	golden := sipmsgtest.All()
	broken := [][]byte{nil, []byte("x"), golden[0].Bytes[:300], []byte("GET / HTTP/1.1\r\n\r\n")}
	var m sipmsg.Msg
	f := newForwarder()
	var e sipmsg.Edit
	mo := sipmsgtest.MOMessage()
	out := make([]byte, 0, 4096)
	via := []byte("SIP/2.0/UDP [2001:db8::1]:5060;branch=z9hG4bKsm1;received=10.45.0.7;rport=5060")
	addr := []byte(`"A" <sip:+15550100001@ims.example:5060;lr?x=y>;tag=1`)
	tests := []struct {
		name string
		f    func()
	}{
		{"Scan", func() {
			for i := range golden {
				sinkErr = m.Scan(golden[i].Bytes)
			}
		}},
		{"Scan refusing", func() {
			for _, b := range broken {
				sinkErr = m.Scan(b)
			}
		}},
		{"access", func() {
			sinkErr = m.Scan(mo)
			r, _ := m.First(sipmsg.Via)
			_, _ = m.Last(sipmsg.Via)
			_, sinkBool = m.HeaderNamed("X-Not-There")
			_, sinkBool = m.HeaderNamed("Call-ID")
			_, sinkBool = m.Offset(m.Value(r))
			_, sinkBytes = m.CSeq()
			sinkBool = m.Count(sipmsg.Route) == len(m.Rows())
		}},
		{"ParseVia", func() { v, err := sipmsg.ParseVia(via); sinkErr, sinkBytes = err, v.Branch }},
		{"ParseVia refusing", func() { _, sinkErr = sipmsg.ParseVia(via[:20]) }},
		{"ParseNameAddr and ParseURI", func() {
			a, err := sipmsg.ParseNameAddr(addr)
			sinkErr = err
			u, err := sipmsg.ParseURI(a.URI)
			sinkErr, sinkBytes = err, u.Host
			sinkBytes, sinkBool = sipmsg.Param(a.Params, "tag")
			_, sinkErr = sipmsg.ParseNameAddr(addr[:10])
			_, sinkErr = sipmsg.ParseURI(addr)
		}},
		{"Element, HasToken, ParseUint, ParseAddr", func() {
			sinkBytes, _ = sipmsg.Element(addr)
			sinkBool = sipmsg.HasToken([]byte("path, sec-agree"), "sec-agree")
			_, sinkBool = sipmsg.ParseUint([]byte("70"))
			_, sinkBool = sipmsg.ParseAddr([]byte("2001:db8::1"))
			_, sinkBool = sipmsg.ParseAddr([]byte("not an address"))
		}},
		{"Scan and Edit", func() {
			for i := range golden {
				if golden[i].Bytes[0] != 'S' {
					sinkBytes, sinkErr = f.forward(golden[i].Bytes)
				}
			}
		}},
		{"Edit", func() {
			sinkErr = m.Scan(mo)
			e.Reset(&m)
			r, _ := m.First(sipmsg.Route)
			elem, _ := sipmsg.Element(m.Value(r))
			e.DeleteElement(&m, r, elem)
			e.DeleteAll(&m, sipmsg.SecurityVerify)
			e.Insert(m.HeadersStart(), "X: ", "1", "\r\n")
			e.InsertBytes(m.HeadersStart(), via, via)
			e.ReplaceString(0, 7, "INVITE")
			s, end := m.RequestURIPos()
			e.Replace(s, end, addr)
			e.Open(len(mo), len(mo)).Uint(7).Hex(7).AddrPort(f.local).AddrPort(f.src).Raw(via).Byte(' ').Close()
			out, sinkErr = e.Append(out[:0])
		}},
		{"Edit refusing", func() {
			sinkErr = m.Scan(mo)
			e.Reset(&m)
			e.Delete(-1, 5)
			_, sinkErr = e.Append(out[:0])
		}},
		{"Frame", func() {
			for i := range golden {
				k, _, err := sipmsg.Frame(golden[i].Bytes, maxMessage)
				sinkBool = k == sipmsg.FrameMessage && err == nil
			}
			for _, b := range broken {
				k, _, err := sipmsg.Frame(b, maxMessage)
				sinkBool = k == sipmsg.FrameMessage && err == nil
			}
		}},
		{"Datagram", func() { _, sinkBytes = sipmsg.Datagram(mo) }},
	}
	for _, tt := range tests {
		tt.f() // buffers grow
		if n := testing.AllocsPerRun(100, tt.f); n != 0 {
			t.Errorf("%s: %v allocations", tt.name, n)
		}
	}
}
