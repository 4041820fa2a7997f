package main

import (
	"log/slog"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/proxy"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/sa/satest"
	"github.com/gmgate/gmgate/dataplane/front"
	"github.com/gmgate/gmgate/dataplane/front/frontbench"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// BenchmarkForward compares what a protected request of a registered phone costs on its way through a worker, without
// ESP, with what plain echo loops cost: CPU time per message and ratios, taken in turn in one run.
func BenchmarkForward(b *testing.B) {
	frontbench.Compare(b, [][]byte{[]byte(benchMessage())},
		frontbench.RecvFrom(),
		frontbench.Batch(),
		frontbench.Front("gmgate", ims.GmProtected, func(sink netip.AddrPort) front.Handler {
			return &phoneHandler{b: b, sink: sink}
		}),
	)
}

const benchDomain = "ims.mnc001.mcc001.3gppnetwork.org"

var benchUE = netip.MustParseAddr("10.45.0.7")

// benchMessage is a MESSAGE of 709 octets as a phone sends it.
func benchMessage() string {
	head := "MESSAGE sip:+15550100002@" + benchDomain + " SIP/2.0\r\n" +
		"Via: SIP/2.0/UDP 10.45.0.7:6300;branch=z9hG4bKm1\r\nMax-Forwards: 70\r\n" +
		"Route: <sip:127.0.0.1:6100;lr>, <sip:orig@scscf:6060;lr>\r\n" +
		"From: <sip:+15550100001@" + benchDomain + ">;tag=m1\r\nTo: <sip:+15550100002@" + benchDomain + ">\r\n" +
		"Call-ID: m1@10.45.0.7\r\nCSeq: 1 MESSAGE\r\n" +
		"P-Preferred-Identity: <sip:+15550100001@" + benchDomain + ">\r\n" +
		"P-Access-Network-Info: 3GPP-E-UTRAN-FDD;utran-cell-id-3gpp=0010100010019B01\r\n" +
		"Require: sec-agree\r\nProxy-Require: sec-agree\r\nContent-Type: text/plain\r\n"
	const size = 709
	body := size - len(head) - len("Content-Length: 00\r\n\r\n")
	return head + "Content-Length: " + strconv.Itoa(body) + "\r\n\r\n" + strings.Repeat("x", body)
}

// phoneHandler is a proxy worker with one registered phone, which every datagram is taken to come from.
type phoneHandler struct {
	*proxy.Worker
	b       *testing.B
	sink    netip.AddrPort
	backend satest.Backend
	eg      *recorder
	flow    ims.Flow
}

// recorder is the event loop during the registration, which is played in memory, and the real one afterwards.
type recorder struct {
	*front.Worker
	playing bool
	local   netip.AddrPort // the benchmark's only socket, which stands for the Mw side as well
	last    []byte
	posted  []func()
}

func (r *recorder) SendUDP(_, remote netip.AddrPort, msg []byte) error {
	if !r.playing {
		return r.Worker.SendUDP(r.local, remote, msg)
	}
	r.last = append([]byte(nil), msg...)
	return nil
}

func (r *recorder) Answer(f func()) error { return r.Post(f) }

func (r *recorder) Post(f func()) error {
	if !r.playing {
		return r.Worker.Post(f)
	}
	r.posted = append(r.posted, f)
	return nil
}

// Boot makes the worker and registers the phone.
func (h *phoneHandler) Boot(w *front.Worker) {
	key, err := proxy.NewTokenKey()
	if err != nil {
		h.b.Fatal(err)
	}
	local := netip.MustParseAddr("127.0.0.1")
	cfg := &proxy.Config{
		Workers: 1, Gm: []netip.Addr{local}, GmPort: 5060, UDPLimit: 1300, Suites: ims.Suites(),
		Registrar: registrar.Config{
			ServerPorts: []uint16{6100}, ClientPorts: []uint16{6110, 6111, 6112, 6113},
			AwaitAuth: time.Minute, OldSet: time.Minute, MaxSets: 3,
		},
		Mw: []netip.Addr{local}, MwPort: 5060, MwTransport: ims.UDP,
		NextHops:   []ims.Hop{{Addr: h.sink, Transport: ims.UDP}},
		PendingMax: 10, PendingSource: 10, RegisterTimeout: time.Minute, TokenKey: key, SPIFirst: 1 << 28, SPILast: 1<<32 - 1,
	}
	if h.Worker, err = proxy.New(cfg, 0, &h.backend, observe.New(1), slog.New(slog.DiscardHandler)); err != nil {
		h.b.Fatal(err)
	}
	h.eg = &recorder{Worker: w, playing: true}
	h.Worker.Boot(h.eg)
	h.register(local)
	h.eg.playing = false
}

// Message handles a datagram as if it had come from the phone.
func (h *phoneHandler) Message(f ims.Flow, msg []byte) {
	h.eg.local = f.Local
	h.Worker.Message(h.flow, msg)
}

// play gives the worker a message of the registration and lets the backend answer.
func (h *phoneHandler) play(f ims.Flow, msg []byte) {
	h.Worker.Message(f, msg)
	h.backend.Answer()
	posted := h.eg.posted
	h.eg.posted = nil
	for _, p := range posted {
		p()
	}
}

func (h *phoneHandler) register(local netip.Addr) {
	at := func(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }
	clear := ims.Flow{Local: at(local, 5060), Remote: at(benchUE, 5060), Transport: ims.UDP, Side: ims.GmClear}
	core := ims.Flow{Local: at(local, 5060), Remote: h.sink, Transport: ims.UDP, Side: ims.Mw}
	request := func(n int, extra string) []byte {
		return []byte("REGISTER sip:" + benchDomain + " SIP/2.0\r\nVia: SIP/2.0/UDP 10.45.0.7:6300;branch=z9hG4bKr" + strconv.Itoa(n) +
			"\r\nMax-Forwards: 70\r\nFrom: <sip:a@" + benchDomain + ">;tag=1\r\nTo: <sip:a@" + benchDomain + ">\r\nCall-ID: r\r\nCSeq: " +
			strconv.Itoa(n) + " REGISTER\r\nContact: <sip:a@10.45.0.7:6300>\r\nRequire: sec-agree\r\n" +
			"Authorization: Digest username=\"a@b\",response=\"x\"\r\n" +
			"Security-Client: ipsec-3gpp;alg=hmac-sha-1-96;spi-c=300;spi-s=301;port-c=6301;port-s=6300\r\n" + extra +
			"Content-Length: 0\r\n\r\n")
	}
	h.play(clear, request(1, ""))
	h.play(core, h.answer("401 Unauthorized", `WWW-Authenticate: Digest realm="r",nonce="n",`+
		`ck="b40ba9a3c58b2a05bbf0d987b21bf8cb",ik="f769bcd751044604127672711c6d3441"`))
	var m sipmsg.Msg
	if err := m.Scan(h.eg.last); err != nil {
		h.b.Fatal(err)
	}
	verify := "Security-Verify: " + string(m.Get(sipmsg.SecurityServer)) + "\r\n"
	h.flow = ims.Flow{Local: at(local, 6100), Remote: at(benchUE, 6301), Transport: ims.UDP, Side: ims.GmProtected}
	h.play(h.flow, request(2, verify))
	h.play(core, h.answer("200 OK", "Contact: <sip:a@10.45.0.7:6300>;expires=3600\r\nService-Route: <sip:"+h.sink.String()+
		";lr>\r\nP-Associated-URI: <sip:+15550100001@"+benchDomain+">"))
	if u := h.Table().UEOf("a@b", benchUE); u == nil || u.State != registrar.Registered {
		h.b.Fatalf("the phone is not registered: %s", h.eg.last)
	}
}

// answer writes the core's answer to the request that was sent last.
func (h *phoneHandler) answer(status, extra string) []byte {
	var m sipmsg.Msg
	if err := m.Scan(h.eg.last); err != nil {
		h.b.Fatal(err)
	}
	out := "SIP/2.0 " + status + "\r\n"
	for _, r := range m.Rows() {
		switch r.ID {
		case sipmsg.Via, sipmsg.From, sipmsg.To, sipmsg.CallID, sipmsg.CSeq:
			out += r.ID.String() + ": " + string(m.Value(r)) + "\r\n"
		default:
		}
	}
	return []byte(out + extra + "\r\nContent-Length: 0\r\n\r\n")
}
