package front_test

import (
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/front"
	"github.com/gmgate/gmgate/dataplane/front/frontbench"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// forward is what a stateless proxy does to a request: Via, received and rport, Max-Forwards, Record-Route, Route.
type forward struct {
	tb   testing.TB
	w    *front.Worker
	sink netip.AddrPort
	m    sipmsg.Msg
	e    sipmsg.Edit
	out  []byte
}

func (h *forward) Boot(w *front.Worker)                       { h.w = w }
func (h *forward) Closed(ims.ConnID, ims.Flow)                {}
func (h *forward) Dialed(uint64, ims.ConnID, ims.Flow, error) {}
func (h *forward) Tick(time.Time) time.Duration               { return 0 }
func (h *forward) Bad(_ ims.Flow, _ []byte, _ string)         {}
func (h *forward) fail(what string, err error)                { h.tb.Errorf("%s: %v", what, err) }
func plain(sink netip.AddrPort) front.Handler                 { return &echoTo{sink: sink} }
func edit(tb testing.TB) func(netip.AddrPort) front.Handler {
	return func(sink netip.AddrPort) front.Handler { return &forward{tb: tb, sink: sink} }
}

func (h *forward) Message(f ims.Flow, msg []byte) {
	if err := h.m.Scan(msg); err != nil {
		h.fail("scan", err)
		return
	}
	e, m := &h.e, &h.m
	e.Reset(m)
	e.Open(m.HeadersStart(), m.HeadersStart()).Str("Via: SIP/2.0/UDP ").AddrPort(f.Local).
		Str(";branch=z9hG4bK").Hex(uint64(len(msg))).Str("\r\nRecord-Route: <sip:token@").AddrPort(f.Local).Str(";lr>\r\n").Close()
	via, _ := m.First(sipmsg.Via)
	v, err := sipmsg.ParseVia(m.Value(via))
	if err != nil {
		h.fail("via", err)
		return
	}
	e.Open(int(via.ValStart)+v.Len, int(via.ValStart)+v.Len).Str(";received=").Addr(f.Remote.Addr()).Close()
	mf, _ := m.First(sipmsg.MaxForwards)
	hops, _ := strconv.Atoi(string(m.Value(mf)))
	e.Open(int(mf.ValStart), int(mf.ValEnd)).Uint(uint64(hops - 1)).Close()
	if route, ok := m.First(sipmsg.Route); ok {
		e.DeleteRow(route)
	}
	if h.out, err = e.Append(h.out[:0]); err != nil {
		h.fail("edit", err)
		return
	}
	if err := h.w.SendUDP(f.Local, h.sink, h.out); err != nil {
		h.fail("send", err)
	}
}

// echoTo sends messages on unchanged.
type echoTo struct {
	forward
	sink netip.AddrPort
}

func (h *echoTo) Message(f ims.Flow, msg []byte) { _ = h.w.SendUDP(f.Local, h.sink, msg) }

// benchMessages are of the sizes of a REGISTER and of an UPDATE.
func benchMessages() [][]byte {
	var msgs [][]byte
	for i, size := range []int{941, 709} {
		m := "UPDATE sip:user@scscf.example.org;lr SIP/2.0\r\n" +
			"Via: SIP/2.0/UDP 10.45.0.7:5061;branch=z9hG4bK" + strconv.Itoa(1000+i) + ";rport\r\n" +
			"Max-Forwards: 70\r\nRoute: <sip:pcscf.example.org:6100;lr>\r\n" +
			"From: <sip:001010000000001@ims.mnc001.mcc001.3gppnetwork.org>;tag=abc\r\n" +
			"To: <sip:001010000000002@ims.mnc001.mcc001.3gppnetwork.org>;tag=def\r\n" +
			"Call-ID: 5b7f1e0c-3a44-4f6e@10.45.0.7\r\nCSeq: 3 UPDATE\r\n" +
			"Contact: <sip:10.45.0.7:5062;transport=udp>;+g.3gpp.icsi-ref=\"urn%3Aurn-7%3A3gpp-service.ims.icsi.mmtel\"\r\n" +
			"P-Access-Network-Info: 3GPP-E-UTRAN-FDD;utran-cell-id-3gpp=0010100010000001\r\n" +
			"Supported: timer, 100rel, precondition\r\nAllow: INVITE, ACK, CANCEL, BYE, PRACK, UPDATE\r\n"
		pad := size - len(m) - len("Content-Length: 0\r\n\r\n") - len("X-Pad: \r\n")
		m += "X-Pad: " + strings.Repeat("p", pad) + "\r\nContent-Length: 0\r\n\r\n"
		msgs = append(msgs, []byte(m))
	}
	return msgs
}

// BenchmarkForwardUDP compares a front whose handler scans and edits each message with one that sends it on as it is, and
// with two bare loops.
func BenchmarkForwardUDP(b *testing.B) {
	frontbench.Compare(b, benchMessages(), frontbench.RecvFrom(), frontbench.Batch(),
		frontbench.Front("front-echo", ims.GmClear, plain), frontbench.Front("front-edit", ims.GmClear, edit(b)))
}

// BenchmarkWorkers compares two workers with one, each message at its owner from the start: what they cost each other. Their
// batches are smaller, since the same window of messages is spread over both.
func BenchmarkWorkers(b *testing.B) {
	var sources []netip.Addr
	for last := range byte(4) {
		sources = append(sources, netip.AddrFrom4([4]byte{127, 0, 0, 2 + last}))
	}
	frontbench.CompareFrom(b, benchMessages(), sources,
		frontbench.Workers("one", 1, ims.GmClear, edit(b)), frontbench.Workers("two", 2, ims.GmClear, edit(b)))
}
