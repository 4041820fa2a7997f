package proxy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/control/sa/satest"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// The addresses of the trace in the protocol sheet.
var (
	ueAddr   = netip.MustParseAddr("10.45.0.7")
	gmAddr   = netip.MustParseAddr("10.0.0.5")
	mwAddr   = netip.MustParseAddrPort("10.0.1.5:5060")
	coreAddr = netip.MustParseAddrPort("10.0.1.9:5060")
)

const (
	domain = "ims.mnc001.mcc001.3gppnetwork.org"
	impi   = "001010000000001@" + domain
)

// sent is a message that a worker sent.
type sent struct {
	local, remote netip.AddrPort
	conn          ims.ConnID
	msg           string
}

type dialled struct {
	local, remote netip.AddrPort
	side          ims.Side
	tag           uint64
}

// loop is an event loop in memory: what the worker does is recorded, time is moved by the test.
type loop struct {
	now    time.Time
	mu     sync.Mutex // of posted: look-ups post from goroutines of their own
	posted []func()
	full   bool // nothing more can be posted
	out    []sent
	dials  []dialled
	closed []ims.ConnID
	conns  map[ims.ConnID]bool
	handed []int
}

func (l *loop) Index() int                     { return 0 }
func (l *loop) Now() time.Time                 { return l.now }
func (l *loop) CloseConn(c ims.ConnID, _ bool) { delete(l.conns, c); l.closed = append(l.closed, c) }

func (l *loop) Post(f func()) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.full {
		return errors.New("queue is full")
	}
	l.posted = append(l.posted, f)
	return nil
}

// Answer takes what it is given also when the queue is full.
func (l *loop) Answer(f func()) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.posted = append(l.posted, f)
	return nil
}

func (l *loop) take() []func() {
	l.mu.Lock()
	defer l.mu.Unlock()
	posted := l.posted
	l.posted = nil
	return posted
}

func (l *loop) SendUDP(local, remote netip.AddrPort, msg []byte) error {
	l.out = append(l.out, sent{local, remote, 0, string(msg)})
	return nil
}

func (l *loop) SendTCP(c ims.ConnID, msg []byte) error {
	if !l.conns[c] {
		return io.ErrClosedPipe
	}
	l.out = append(l.out, sent{conn: c, msg: string(msg)})
	return nil
}

func (l *loop) Dial(local, remote netip.AddrPort, side ims.Side, _ bool, tag uint64) {
	l.dials = append(l.dials, dialled{local, remote, side, tag})
}

func (l *loop) Hand(to int, _ ims.Flow, _ []byte) error { l.handed = append(l.handed, to); return nil }

// rig is a worker between a phone and a core that the test plays.
type rig struct {
	t       testing.TB
	w       *Worker
	l       *loop
	backend *satest.Backend
	metrics *observe.Metrics
	cfg     *Config
}

func newRig(t testing.TB, change ...func(*Config)) *rig {
	t.Helper()
	key, err := NewTokenKey()
	if err != nil {
		t.Fatal(err)
	}
	cfg := &Config{
		Workers: 1, Gm: []netip.Addr{gmAddr}, GmPort: 5060, UDPLimit: 1300, Suites: ims.Suites(),
		StatusSuite: 494, StatusVerify: 494, StatusTaken: 403,
		Registrar: registrar.Config{
			ServerPorts: []uint16{6100, 6101}, ClientPorts: []uint16{6110, 6111, 6112, 6113},
			AwaitAuth: 4 * time.Minute, OldSet: 128 * time.Second, MaxSets: 3,
		},
		LifetimeExtra: 30 * time.Second, PendingMax: 100, PendingSource: 4,
		Mw: []netip.Addr{mwAddr.Addr()}, MwPort: mwAddr.Port(), MwTransport: ims.UDP,
		NextHops:       []ims.Hop{{Addr: coreAddr, Transport: ims.UDP}},
		Hosts:          map[string]netip.Addr{"scscf." + domain: netip.MustParseAddr("10.0.1.7")},
		VisitedNetwork: domain, ClearIntegrity: "no", QuoteIntegrity: true, RegisterTimeout: 32 * time.Second,
		TokenKey: key, SPIFirst: 1 << 28, SPILast: 1<<32 - 1,
	}
	for _, c := range change {
		c(cfg)
	}
	r := &rig{t: t, cfg: cfg, backend: new(satest.Backend)}
	r.boot(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), nil)
	return r
}

// boot starts the worker with what is kept of a run before.
func (r *rig) boot(now time.Time, k *Kept) {
	r.t.Helper()
	r.metrics, r.l = observe.New(1), &loop{now: now, conns: make(map[ims.ConnID]bool)}
	var err error
	if r.w, err = New(r.cfg, 0, r.backend, r.metrics, slog.New(slog.DiscardHandler)); err != nil {
		r.t.Fatal(err)
	}
	r.w.Restore(k)
	r.w.Boot(r.l)
	r.settle()
}

// settle lets the backend and the loop do what is waiting.
func (r *rig) settle() {
	for {
		n := r.backend.Answer()
		posted := r.l.take()
		for _, f := range posted {
			f()
		}
		if n == 0 && len(posted) == 0 {
			return
		}
	}
}

func (r *rig) advance(d time.Duration) {
	for end := r.l.now.Add(d); r.l.now.Before(end); {
		r.l.now = r.l.now.Add(min(100*time.Millisecond, end.Sub(r.l.now)))
		r.w.Tick(r.l.now)
		r.settle()
	}
}

// deliver gives the worker a message and returns what it sent.
func (r *rig) deliver(f ims.Flow, msg string) []sent {
	r.l.out = nil
	r.w.Message(f, []byte(msg))
	r.settle()
	return r.l.out
}

// one is deliver for a message that must have exactly one effect.
func (r *rig) one(f ims.Flow, msg string) sent {
	r.t.Helper()
	out := r.deliver(f, msg)
	if len(out) != 1 {
		r.t.Fatalf("%d messages were sent, want 1:\n%v", len(out), out)
	}
	return out[0]
}

func clearFlow() ims.Flow {
	return ims.Flow{
		Local: netip.AddrPortFrom(gmAddr, 5060), Remote: netip.AddrPortFrom(ueAddr, 5060),
		Transport: ims.UDP, Side: ims.GmClear,
	}
}

func coreFlow() ims.Flow {
	return ims.Flow{Local: mwAddr, Remote: coreAddr, Transport: ims.UDP, Side: ims.Mw}
}

// phone is what the test keeps of the UE.
type phone struct {
	addr           netip.Addr
	n              int // of the security agreement
	portC, portS   uint16
	spiC, spiS     uint32
	server         string // Security-Server received
	pc, ps         uint16
	cseq           int
	impi, callID   string
	protectedFlow  ims.Flow
	authorization  string
	securityClient string
}

func newPhone() *phone {
	p := &phone{addr: ueAddr, impi: impi, callID: "reg1@10.45.0.7", portS: 6300}
	p.agree()
	return p
}

// agree chooses the values of the next security agreement.
func (p *phone) agree() {
	p.n++
	p.portC, p.spiC, p.spiS = uint16(6300+p.n), uint32(3963789883+2*p.n), uint32(3963789884+2*p.n)
	p.securityClient = fmt.Sprintf("ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc;prot=esp;mod=trans;spi-c=%d;spi-s=%d;"+
		"port-c=%d;port-s=%d, ipsec-3gpp;alg=hmac-sha-1-96;prot=esp;mod=trans;spi-c=%d;spi-s=%d;port-c=%d;port-s=%d",
		p.spiC, p.spiS, p.portC, p.portS, p.spiC, p.spiS, p.portC, p.portS)
}

func lines(body string, l ...string) string {
	return strings.Join(l, "\r\n") + "\r\nContent-Length: " + strconv.Itoa(len(body)) + "\r\n\r\n" + body
}

// register writes a REGISTER; extra rows replace the standard ones of the same name, an empty value deletes them.
func (p *phone) register(branch string, viaPort int, extra ...string) string {
	p.cseq++
	auth := p.authorization
	if auth == "" {
		auth = `Digest username="` + p.impi + `",realm="` + domain + `",uri="sip:` + domain + `",nonce="",response=""`
	}
	rows := []string{
		"REGISTER sip:" + domain + " SIP/2.0",
		"Via: SIP/2.0/UDP " + p.addr.String() + ":" + strconv.Itoa(viaPort) + ";branch=z9hG4bK" + branch + ";rport",
		"Max-Forwards: 70",
		"From: <sip:" + p.impi + ">;tag=u1",
		"To: <sip:" + p.impi + ">",
		"Call-ID: " + p.callID,
		"CSeq: " + strconv.Itoa(p.cseq) + " REGISTER",
		"Contact: <sip:001010000000001@" + p.addr.String() + ":6300>;+g.3gpp.smsip",
		"Expires: 600000",
		"Supported: path, gruu",
		"Require: sec-agree",
		"Proxy-Require: sec-agree",
		"Security-Client: " + p.securityClient,
		"Authorization: " + auth,
	}
	for _, x := range extra {
		name, value, _ := strings.Cut(x, ":")
		kept := rows[:0:0]
		for _, row := range rows {
			if n, _, _ := strings.Cut(row, ":"); !strings.EqualFold(n, name) {
				kept = append(kept, row)
			}
		}
		rows = kept
		if strings.TrimSpace(value) != "" {
			rows = append(rows, x)
		}
	}
	return lines("", rows...)
}

const challenge = `WWW-Authenticate: Digest realm="` + domain + `",nonce="I1U8vpY3qJ0hiuZNrke/NVXzKLQ1d7m5Sp/6w1Tfr7M=",` +
	`algorithm=AKAv1-MD5,ck="b40ba9a3c58b2a05bbf0d987b21bf8cb",ik="f769bcd751044604127672711c6d3441",qop="auth"`

// answerTo writes the core's answer to a request as it arrived there.
func answerTo(t testing.TB, req string, status string, extra ...string) string {
	t.Helper()
	var m sipmsg.Msg
	if err := m.Scan([]byte(req)); err != nil {
		t.Fatalf("message does not scan: %v\n%s", err, req)
	}
	rows := []string{"SIP/2.0 " + status}
	for _, r := range m.Rows() {
		switch r.ID {
		case sipmsg.Via, sipmsg.From, sipmsg.CallID, sipmsg.CSeq, sipmsg.RecordRoute:
			rows = append(rows, r.ID.String()+": "+string(m.Value(r)))
		case sipmsg.To:
			to := string(m.Value(r))
			if !strings.Contains(to, "tag=") {
				to += ";tag=s1"
			}
			rows = append(rows, "To: "+to)
		default:
		}
	}
	return lines("", append(rows, extra...)...)
}

func scan(t testing.TB, msg string) *sipmsg.Msg {
	t.Helper()
	m := new(sipmsg.Msg)
	if err := m.Scan([]byte(msg)); err != nil {
		t.Fatalf("message does not scan: %v\n%s", err, msg)
	}
	return m
}

func get(t testing.TB, msg string, id sipmsg.HeaderID) string { return string(scan(t, msg).Get(id)) }

func status(t testing.TB, msg string) int { return scan(t, msg).Status() }

// challenge takes a phone from SM1 to SM6 and reads the Security-Server. over is the flow of SM1.
func (r *rig) challenge(p *phone, over ims.Flow, viaPort int) {
	r.t.Helper()
	req := r.one(over, p.register(fmt.Sprintf("sm1-%d", p.n), viaPort))
	if req.remote != coreAddr || req.local != netip.AddrPortFrom(mwAddr.Addr(), r.w.mwPort) {
		r.t.Fatalf("REGISTER went from %v to %v", req.local, req.remote)
	}
	ans := r.one(coreFlow(), answerTo(r.t, req.msg, "401 Unauthorized", challenge))
	r.readServer(p, ans.msg)
}

func (r *rig) readServer(p *phone, answer string) {
	r.t.Helper()
	if status(r.t, answer) != 401 {
		r.t.Fatalf("answer is not a 401:\n%s", answer)
	}
	p.server = get(r.t, answer, sipmsg.SecurityServer)
	for part := range strings.SplitSeq(p.server, ";") {
		name, value, _ := strings.Cut(part, "=")
		n, _ := strconv.Atoi(value)
		switch name {
		case "port-c":
			p.pc = uint16(n)
		case "port-s":
			p.ps = uint16(n)
		}
	}
	p.protectedFlow = ims.Flow{
		Local: netip.AddrPortFrom(gmAddr, p.ps), Remote: netip.AddrPortFrom(p.addr, p.portC),
		Transport: ims.UDP, Side: ims.GmProtected,
	}
}

const proof = `Digest username="` + impi + `",realm="` + domain + `",uri="sip:` + domain + `",` +
	`nonce="I1U8vpY3qJ0hiuZNrke/NVXzKLQ1d7m5Sp/6w1Tfr7M=",response="402ab8df9f3a4d63a9f47c2f90e02938",` +
	`algorithm=AKAv1-MD5,qop=auth,nc=00000001,cnonce="0a4f113b"`

var granted = []string{
	"Contact: <sip:001010000000001@10.45.0.7:6300>;expires=600000",
	"Service-Route: <sip:orig@scscf." + domain + ":6060;lr>",
	"P-Associated-URI: <sip:+15550100001@" + domain + ">, <tel:+15550100001>",
	"P-Charging-Function-Addresses: ccf=192.0.2.9",
}

// confirm takes a phone from SM7 to SM12 and returns what the core and the phone got.
func (r *rig) confirm(p *phone) (atCore, atUE sent) {
	r.t.Helper()
	p.authorization = proof
	atCore = r.one(p.protectedFlow, p.register(fmt.Sprintf("sm7-%d", p.n), 6300, "Security-Verify: "+p.server))
	atUE = r.one(coreFlow(), answerTo(r.t, atCore.msg, "200 OK", granted...))
	return atCore, atUE
}

func (r *rig) registered() *phone {
	r.t.Helper()
	p := newPhone()
	r.challenge(p, clearFlow(), 5060)
	r.confirm(p)
	return p
}

// downlink checks that a message left from port-pc to port-us.
func (p *phone) downlink(t testing.TB, s sent) {
	t.Helper()
	if want := netip.AddrPortFrom(gmAddr, p.pc); s.local != want {
		t.Errorf("left from %v, want port-pc %v", s.local, want)
	}
	if want := netip.AddrPortFrom(p.addr, p.portS); s.remote != want {
		t.Errorf("went to %v, want port-us %v", s.remote, want)
	}
}

// The whole of SM1 to SM12 (TS 33.203 §7.2), with what each side sees.
func TestRegistration(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	sm2 := r.one(clearFlow(), p.register("sm1", 5060, `Authorization: Digest username="`+impi+
		`",realm="`+domain+`",uri="sip:`+domain+`",nonce="",response="",integrity-protected="yes"`))
	m := scan(t, sm2.msg)
	for _, id := range []sipmsg.HeaderID{sipmsg.SecurityClient, sipmsg.SecurityVerify, sipmsg.ProxyRequire} {
		if m.Count(id) != 0 {
			t.Errorf("SM2 has %v", id)
		}
	}
	for id, want := range map[sipmsg.HeaderID]string{
		sipmsg.Require: "path", sipmsg.PVisitedNetworkID: `"` + domain + `"`, sipmsg.MaxForwards: "69",
		sipmsg.Authorization: `Digest username="` + impi + `",realm="` + domain + `",uri="sip:` + domain +
			`",nonce="",response="",integrity-protected="no"`,
	} {
		if got := string(m.Get(id)); got != want {
			t.Errorf("SM2 %v: %q, want %q", id, got, want)
		}
	}
	if path := string(m.Get(sipmsg.Path)); !strings.HasSuffix(path, "@10.0.1.5:5060;lr>") {
		t.Errorf("Path: %s", path)
	}
	if m.Count(sipmsg.Via) != 2 || !strings.Contains(sm2.msg, ";rport=5060;received=10.45.0.7") {
		t.Errorf("Via rows of SM2:\n%s", sm2.msg)
	}
	if r.backend.Count() != 0 {
		t.Error("SAs exist before the challenge")
	}

	// The 401 does not leave before the backend has acknowledged.
	r.l.out = nil
	r.w.Message(coreFlow(), []byte(answerTo(t, sm2.msg, "401 Unauthorized", challenge)))
	if len(r.l.out) != 0 {
		t.Fatal("401 left before the SAs were acknowledged")
	}
	r.settle()
	if len(r.l.out) != 1 || r.backend.Count() != 4 {
		t.Fatalf("%d messages, %d SAs", len(r.l.out), r.backend.Count())
	}
	sm6 := r.l.out[0]
	if sm6.local != netip.AddrPortFrom(gmAddr, 5060) || sm6.remote != netip.AddrPortFrom(ueAddr, 5060) {
		t.Errorf("SM6 from %v to %v", sm6.local, sm6.remote)
	}
	if strings.Contains(sm6.msg, "ck=") || strings.Contains(sm6.msg, "ik=") || strings.Contains(sm6.msg, ",,") {
		t.Errorf("SM6 has keys:\n%s", sm6.msg)
	}
	r.readServer(p, sm6.msg)
	keys := r.backend.Installed[0].Keys
	if keys.Suite != (ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC}) || len(keys.Auth) != 20 || len(keys.Enc) != 16 {
		t.Errorf("keys of %v: %d and %d octets", keys.Suite, len(keys.Auth), len(keys.Enc))
	}

	sm8, sm12 := r.confirm(p)
	if !strings.Contains(sm8.msg, `cnonce="0a4f113b",integrity-protected="yes"`) ||
		scan(t, sm8.msg).Count(sipmsg.SecurityVerify) != 0 {
		t.Errorf("SM8:\n%s", sm8.msg)
	}
	p.downlink(t, sm12)
	if status(t, sm12.msg) != 200 || get(t, sm12.msg, sipmsg.PChargingFunctionAddresses) != "" {
		t.Errorf("SM12:\n%s", sm12.msg)
	}
	u := r.w.table.UEOf(impi, ueAddr)
	if u == nil || u.State != registrar.Registered || u.Current.Phase != sa.Established {
		t.Fatalf("UE context %+v", u)
	}
	if want := time.Duration(600030) * time.Second; u.Current.Deadline.Sub(r.l.now) != want {
		t.Errorf("lifetime %v, want %v", u.Current.Deadline.Sub(r.l.now), want)
	}
}

// A retransmission changes nothing and gets the same answer (T17).
func TestRetransmission(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	sm1 := p.register("sm1", 5060)
	sm2 := r.one(clearFlow(), sm1)
	for range 3 {
		if out := r.deliver(clearFlow(), sm1); len(out) != 0 {
			t.Fatalf("retransmission was forwarded: %v", out)
		}
	}
	answer := answerTo(t, sm2.msg, "401 Unauthorized", challenge)
	first := r.one(coreFlow(), answer)
	if out := r.deliver(coreFlow(), answer); len(out) != 0 {
		t.Errorf("a retransmitted 401 had an effect: %v", out)
	}
	again := r.one(clearFlow(), sm1)
	if again != first {
		t.Errorf("other answer:\n%s\nwant\n%s", again.msg, first.msg)
	}
	if r.backend.Count() != 4 || len(r.backend.Installed) != 1 {
		t.Errorf("%d SAs, %d sets installed", r.backend.Count(), len(r.backend.Installed))
	}
}

// Our own retransmissions towards the core, and what the UE gets when it is silent.
func TestCoreSilent(t *testing.T) {
	r := newRig(t)
	r.deliver(clearFlow(), newPhone().register("sm1", 5060))
	r.l.out = nil
	r.advance(31 * time.Second)
	if n := len(r.l.out); n != 9 { // 0.5, 1.5, 3.5, 7.5, then every 4 s
		t.Errorf("%d retransmissions in 31 s", n)
	}
	r.l.out = nil
	r.advance(2 * time.Second)
	if n := len(r.l.out); n != 2 || status(t, r.l.out[1].msg) != 504 {
		t.Fatalf("after 33 s: %v", r.l.out)
	}
}

// What is wrong with a clear REGISTER is answered as the sheet says, and never reaches the core.
func TestClearRegisterRefused(t *testing.T) {
	other := "Security-Client: ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc;"
	for name, c := range map[string]struct {
		extra  []string
		status int
		has    string
	}{
		"E1 no Security-Client": {[]string{"Security-Client:"}, 421, "Require: sec-agree"},
		"E1 no sec-agree":       {[]string{"Require:", "Proxy-Require:"}, 421, "Security-Server: ipsec-3gpp"},
		"E2 malformed":          {[]string{other + "spi-c=1;spi-s=2;port-c=x;port-s=9"}, 400, "port-c"},
		"R1.4 SPI 0":            {[]string{other + "spi-c=0;spi-s=2;port-c=7000;port-s=7001"}, 400, "spi-c"},
		"R1.4 equal SPIs":       {[]string{other + "spi-c=9;spi-s=9;port-c=7000;port-s=7001"}, 400, "spi-s"},
		"E3 no common algorithm": {
			[]string{"Security-Client: ipsec-3gpp;alg=hmac-sha-256;spi-c=1;spi-s=2;port-c=7000;port-s=7001"}, 494, "Security-Server:",
		},
		"E7 unknown extension": {[]string{"Proxy-Require: sec-agree, teleport"}, 420, "Unsupported: teleport"},
		"max forwards":         {[]string{"Max-Forwards: 0"}, 483, "Max-Forwards"},
		"bad max forwards":     {[]string{"Max-Forwards: 256"}, 400, "Max-Forwards"},
		"two Vias": {
			[]string{"Via: SIP/2.0/UDP 10.45.0.7:5060;branch=z9hG4bKa, SIP/2.0/UDP 10.45.0.8;branch=z9hG4bKb"}, 400, "Via",
		},
		"no username": {[]string{`Authorization: Digest realm="r"`}, 400, "username"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			out := r.one(clearFlow(), newPhone().register("x", 5060, c.extra...))
			if out.remote.Addr() != ueAddr || status(t, out.msg) != c.status || !strings.Contains(out.msg, c.has) {
				t.Errorf("want %d with %q, got to %v:\n%s", c.status, c.has, out.remote, out.msg)
			}
			if !strings.Contains(out.msg, "Warning: 399 10.0.0.5:5060 \"") {
				t.Errorf("no Warning:\n%s", out.msg)
			}
			if r.backend.Count() != 0 || len(r.w.txs) != 0 {
				t.Errorf("left: %d SAs, %d transactions", r.backend.Count(), len(r.w.txs))
			}
		})
	}
}

// SM7 must repeat the agreement and come from its own phone (TS 33.203 §7.2, E4, E5).
func TestProtectedRegisterRefused(t *testing.T) {
	for name, c := range map[string]struct {
		change func(p *phone) []string
		status int
		dead   bool
	}{
		"T1 other spi in Security-Verify": {func(p *phone) []string {
			return []string{"Security-Verify: " + strings.Replace(p.server, "spi-s=", "spi-s=1", 1)}
		}, 494, true},
		"no Security-Verify": {func(*phone) []string { return nil }, 494, true},
		"T2 other port-c": {func(p *phone) []string {
			return []string{"Security-Verify: " + p.server, "Security-Client: " +
				strings.ReplaceAll(p.securityClient, "port-c=6301", "port-c=6401")}
		}, 494, true},
		"no Security-Client": {func(p *phone) []string {
			return []string{"Security-Verify: " + p.server, "Security-Client:"}
		}, 494, true},
		"other IMPI": {func(p *phone) []string {
			return []string{"Security-Verify: " + p.server, "Authorization: " + strings.Replace(proof, "001010", "001019", 1)}
		}, 403, false},
		"other IMPU": {func(p *phone) []string {
			return []string{"Security-Verify: " + p.server, "To: <sip:other@" + domain + ">"}
		}, 403, false},
		"other address in Via": {func(p *phone) []string {
			return []string{"Security-Verify: " + p.server, "Via: SIP/2.0/UDP 10.45.0.9:6300;branch=z9hG4bKv"}
		}, 400, false},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			p := newPhone()
			r.challenge(p, clearFlow(), 5060)
			p.authorization = proof
			out := r.one(p.protectedFlow, p.register("sm7", 6300, c.change(p)...))
			p.downlink(t, out)
			if status(t, out.msg) != c.status {
				t.Errorf("want %d:\n%s", c.status, out.msg)
			}
			r.advance(answerGrace + time.Second)
			if dead := r.backend.Count() == 0; dead != c.dead {
				t.Errorf("%d SAs left", r.backend.Count())
			}
		})
	}
	t.Run("T2 other layout is the same", func(t *testing.T) {
		r := newRig(t)
		p := newPhone()
		r.challenge(p, clearFlow(), 5060)
		p.securityClient = strings.ReplaceAll(strings.ReplaceAll(p.securityClient, ";", " ; "), "prot=esp ; mod=trans ; ", "")
		if atCore, _ := r.confirm(p); atCore.remote != coreAddr {
			t.Error("not forwarded")
		}
	})
}

// The 401 of the core in every shape (R4.7, R4.8, E11), and what it leaves behind.
func TestChallengeWithoutKeys(t *testing.T) {
	for name, row := range map[string]string{
		"no ik": `WWW-Authenticate: Digest realm="r",nonce="n",ck="b40ba9a3c58b2a05bbf0d987b21bf8cb"`,
		"no ck": `WWW-Authenticate: Digest realm="r",nonce="n",ik="b40ba9a3c58b2a05bbf0d987b21bf8cb"`,
		"short": `WWW-Authenticate: Digest realm="r",nonce="n",ck="b40b",ik="b40ba9a3c58b2a05bbf0d987b21bf8cb"`,
		"none":  `Date: Thu, 01 Jan 2026 00:00:00 GMT`,
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			req := r.one(clearFlow(), newPhone().register("x", 5060))
			out := r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", row))
			if status(t, out.msg) != 500 || strings.Contains(out.msg, "b40b") {
				t.Errorf("answer:\n%s", out.msg)
			}
			if r.backend.Count() != 0 || r.w.table.SPIsInUse() != 0 || r.w.table.UEs() != 0 {
				t.Error("something is left")
			}
		})
	}
}

// E12, T19: what the backend refuses is answered with 500, and nothing is left.
func TestBackendRefuses(t *testing.T) {
	r := newRig(t)
	r.backend.Fail = func(sa.Params) error { return fmt.Errorf("add state 3: %w", satest.ErrExists) }
	req := r.one(clearFlow(), newPhone().register("x", 5060))
	out := r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge))
	if status(t, out.msg) != 500 || strings.Contains(out.msg, "Security-Server") {
		t.Errorf("answer:\n%s", out.msg)
	}
	if r.backend.Count() != 0 || r.w.table.SPIsInUse() != 0 || r.w.table.UEs() != 0 {
		t.Error("something is left")
	}
}

func (p *phone) message(extra ...string) string {
	rows := []string{
		"MESSAGE sip:+15550100002@" + domain + " SIP/2.0",
		"Via: SIP/2.0/UDP 10.45.0.7:6300;branch=z9hG4bKm1",
		"Max-Forwards: 70",
		"Route: <sip:10.0.0.5:" + strconv.Itoa(int(p.ps)) + ";lr>, <sip:orig@scscf." + domain + ":6060;lr>",
		"From: <sip:+15550100001@" + domain + ">;tag=m1",
		"To: <sip:+15550100002@" + domain + ">",
		"Call-ID: m1@10.45.0.7",
		"CSeq: 1 MESSAGE",
		"P-Preferred-Identity: <sip:+15550100001@" + domain + ">",
		"P-Access-Network-Info: 3GPP-E-UTRAN-FDD;utran-cell-id-3gpp=0010100010019B01",
		"Require: sec-agree",
		"Proxy-Require: sec-agree",
		"Security-Verify: " + p.server,
		"Content-Type: text/plain",
	}
	return lines("hello", append(rows, extra...)...)
}

// MO: trace 9.7 of the sheet, both ways.
func TestRequestFromUE(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	req := r.one(p.protectedFlow, p.message("P-Asserted-Identity: <sip:victim@"+domain+">", "P-Charging-Vector: icid-value=x"))
	if want := netip.MustParseAddrPort("10.0.1.7:6060"); req.remote != want || req.local != mwAddr {
		t.Errorf("went from %v to %v, want the Service-Route %v", req.local, req.remote, want)
	}
	m := scan(t, req.msg)
	for id, want := range map[sipmsg.HeaderID]string{
		sipmsg.Route:             "<sip:orig@scscf." + domain + ":6060;lr>",
		sipmsg.PAssertedIdentity: "<sip:+15550100001@" + domain + ">, <tel:+15550100001>",
		sipmsg.MaxForwards:       "69", sipmsg.PPreferredIdentity: "", sipmsg.SecurityVerify: "", sipmsg.Require: "",
		sipmsg.ProxyRequire: "", sipmsg.RecordRoute: "",
		sipmsg.PAccessNetworkInfo: "3GPP-E-UTRAN-FDD;utran-cell-id-3gpp=0010100010019B01",
	} {
		if got := string(m.Get(id)); got != want {
			t.Errorf("%v: %q, want %q", id, got, want)
		}
		if n := m.Count(id); n > 1 {
			t.Errorf("%d rows of %v", n, id)
		}
	}
	if pcv := string(m.Get(sipmsg.PChargingVector)); !strings.HasPrefix(pcv, `icid-value="`) || m.Count(sipmsg.PChargingVector) != 1 {
		t.Errorf("P-Charging-Vector: %s", pcv)
	}
	if string(m.Body()) != "hello" {
		t.Errorf("body %q", m.Body())
	}
	again := r.one(p.protectedFlow, p.message())
	if get(t, again.msg, sipmsg.Via) != get(t, req.msg, sipmsg.Via) {
		t.Error("a retransmission gets another branch")
	}
	ans := r.one(coreFlow(), answerTo(t, req.msg, "202 Accepted"))
	p.downlink(t, ans)
	if v := scan(t, ans.msg); v.Count(sipmsg.Via) != 1 || !strings.Contains(ans.msg, "branch=z9hG4bKm1") {
		t.Errorf("answer:\n%s", ans.msg)
	}
}

func TestRequestFromUERefused(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	forged := "Route: <sip:AAAAAAAAAAAAAAAAAAAAAA@10.0.0.5:6100;lr>"
	for name, c := range map[string]struct {
		from, to string
		status   int
	}{
		"max forwards":      {"Max-Forwards: 70", "Max-Forwards: 0", 483},
		"unknown extension": {"Proxy-Require: sec-agree", "Proxy-Require: teleport", 420},
		"forged flow token": {"Max-Forwards: 70", "Max-Forwards: 70\r\n" + forged, 403},
		"CSeq of another":   {"CSeq: 1 MESSAGE", "CSeq: 1 INVITE", 400},
	} {
		t.Run(name, func(t *testing.T) {
			msg := strings.Replace(p.message(), c.from, c.to, 1)
			out := r.one(p.protectedFlow, msg)
			if out.remote.Addr() != ueAddr {
				t.Fatalf("went to %v:\n%s", out.remote, out.msg)
			}
			if !strings.HasPrefix(out.msg, "SIP/2.0 "+strconv.Itoa(c.status)+" ") {
				t.Errorf("want %d:\n%s", c.status, out.msg)
			}
		})
	}
}

// Identities: the SA says who it is (T8).
func TestAssertedIdentity(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	msg := strings.Replace(p.message(), "P-Preferred-Identity: <sip:+15550100001@", "P-Preferred-Identity: <sip:+15550199999@", 1)
	if got := get(t, r.one(p.protectedFlow, msg).msg, sipmsg.PAssertedIdentity); !strings.HasPrefix(got, "<sip:+15550100001@") {
		t.Errorf("P-Asserted-Identity: %s", got)
	}
	msg = strings.Replace(p.message(), "P-Preferred-Identity: <sip:+15550100001@"+domain+">", "P-Preferred-Identity: <tel:+15550100001>", 1)
	if got := get(t, r.one(p.protectedFlow, msg).msg, sipmsg.PAssertedIdentity); got != "<tel:+15550100001>" {
		t.Errorf("P-Asserted-Identity: %s", got)
	}
}

// Nothing but a REGISTER is taken in clear, nothing without an SA on a protected port, nothing but a REGISTER on a
// temporary set (R5.31, E8, R5.24).
func TestUnprotected(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	out := r.one(clearFlow(), p.message())
	if status(t, out.msg) != 403 || out.remote.Addr() != ueAddr {
		t.Errorf("clear MESSAGE: %v\n%s", out.remote, out.msg)
	}
	f := p.protectedFlow
	f.Remote = netip.AddrPortFrom(ueAddr, 7777)
	if out := r.deliver(f, p.message()); len(out) != 0 {
		t.Errorf("message without an SA: %v", out)
	}
	f.Remote = netip.AddrPortFrom(netip.MustParseAddr("10.45.0.8"), p.portC)
	if out := r.deliver(f, p.message()); len(out) != 0 {
		t.Errorf("message from another address: %v", out)
	}
	q := newPhone()
	q.agree()
	r.challenge(q, clearFlow(), 5060)
	if out := r.deliver(q.protectedFlow, p.message()); len(out) != 0 {
		t.Errorf("MESSAGE on a temporary set: %v", out)
	}
}

func (r *rig) path(p *phone) string {
	r.t.Helper()
	u := r.w.table.UEOf(p.impi, p.addr)
	if u == nil {
		u = r.w.table.Context(registrar.Key{IMPI: p.impi, Addr: p.addr, Emergency: true})
	}
	return "<sip:" + string(r.w.seal.seal(&r.w.sc, r.w.pathToken(u))) + "@10.0.1.5:5060;lr>"
}

func mtInvite(route, extra string) string {
	return lines("v=0\r\n", "INVITE sip:001010000000001@10.45.0.7:6300 SIP/2.0",
		"Via: SIP/2.0/UDP 10.0.1.7:6060;branch=z9hG4bKs9", "Route: "+route,
		"Record-Route: <sip:10.0.1.7:6060;lr>", "Max-Forwards: 67", "From: <sip:+15550100002@"+domain+">;tag=r1",
		"To: <sip:+15550100001@"+domain+">", "Call-ID: m2@scscf", "CSeq: 1 INVITE",
		"P-Asserted-Identity: <sip:+15550100002@"+domain+">", "P-Called-Party-ID: <tel:+15550100001>",
		"P-Charging-Vector: icid-value=secret", "Contact: <sip:10.0.1.8>", extra+"Content-Type: application/sdp")
}

// MT: R1.20, R1.21, R5.40 to R5.44.
func TestRequestToUE(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	from := coreFlow()
	from.Remote = netip.MustParseAddrPort("10.0.1.7:6060")
	req := r.one(from, mtInvite(r.path(p), ""))
	p.downlink(t, req)
	m := scan(t, req.msg)
	via, err := sipmsg.ParseVia(m.Get(sipmsg.Via))
	if err != nil || string(via.Host) != "10.0.0.5" || via.Port != p.ps {
		t.Errorf("Via: %s", m.Get(sipmsg.Via))
	}
	if rr := string(m.Get(sipmsg.RecordRoute)); !strings.HasSuffix(rr, fmt.Sprintf("@10.0.0.5:%d;lr>", p.ps)) || m.Count(sipmsg.RecordRoute) != 2 {
		t.Errorf("Record-Route: %s", rr)
	}
	if m.Count(sipmsg.Route) != 0 || m.Count(sipmsg.PChargingVector) != 0 || m.Count(sipmsg.PAssertedIdentity) != 1 {
		t.Errorf("request:\n%s", req.msg)
	}
	// The phone answers from port-uc to port-ps.
	ans := r.one(p.protectedFlow, answerTo(t, req.msg, "200 OK", "P-Asserted-Identity: <sip:x@y>", "Contact: <sip:10.45.0.7:6300>"))
	if ans.remote != from.Remote || ans.local != mwAddr {
		t.Errorf("answer from %v to %v", ans.local, ans.remote)
	}
	if rr := get(t, ans.msg, sipmsg.RecordRoute); !strings.HasSuffix(rr, "@10.0.1.5:5060;lr>") {
		t.Errorf("Record-Route towards the core: %s", rr)
	}
	if pai := get(t, ans.msg, sipmsg.PAssertedIdentity); pai != "<tel:+15550100001>" {
		t.Errorf("P-Asserted-Identity: %s", pai)
	}
	if scan(t, ans.msg).Count(sipmsg.Via) != 1 {
		t.Errorf("answer:\n%s", ans.msg)
	}
	if out := r.one(from, mtInvite(r.path(p), "Privacy: id\r\n")); get(t, out.msg, sipmsg.PAssertedIdentity) != "" {
		t.Error("P-Asserted-Identity in spite of Privacy: id")
	}
}

// An address as mw.path_host stands in brackets where it is IPv6, and is known again in whatever form the core writes it.
func TestPathHostAddress(t *testing.T) {
	for host, ways := range map[string][]string{
		"pcscf." + domain:  {"pcscf." + domain, "PCSCF." + domain},
		"192.0.2.5":        {"192.0.2.5"},
		"2001:db8:9::5":    {"[2001:db8:9::5]", "[2001:DB8:9:0:0:0:0:5]"},
		"2001:DB8:9::0005": {"[2001:db8:9::5]"},
	} {
		r := newRig(t, func(c *Config) { c.PathHost = host })
		req := r.one(clearFlow(), newPhone().register("path", 5060))
		path := get(t, req.msg, sipmsg.Path)
		na, err := sipmsg.ParseNameAddr([]byte(path))
		if err != nil {
			t.Fatalf("Path %q: %v", path, err)
		}
		u, err := sipmsg.ParseURI(na.URI)
		if err != nil || !strings.EqualFold(string(u.Host), host) || u.Port != 5060 {
			t.Errorf("Path %q: host %q, port %d, %v", path, u.Host, u.Port, err)
		}
		if u, err := sipmsg.ParseURI([]byte(r.w.subs.uri)); err != nil || !strings.EqualFold(string(u.Host), host) {
			t.Errorf("own URI %q: %v", r.w.subs.uri, err)
		}
		r = newRig(t, func(c *Config) { c.PathHost = host })
		p := r.registered()
		from := coreFlow()
		from.Remote = netip.MustParseAddrPort("10.0.1.7:6060")
		for i, way := range ways {
			invite := strings.Replace(r.request(p, "INVITE", fmt.Sprintf("ph%d", i)), "10.0.1.5:5060;lr", way+":5060;lr", 1)
			out := r.one(from, invite)
			p.downlink(t, out)
		}
	}
}

// A UE cannot have its answers sent anywhere but to the sender of the request.
func TestAnswerFromUEIsBound(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	from := coreFlow()
	from.Remote = netip.MustParseAddrPort("10.0.1.7:6060")
	req := r.one(from, mtInvite(r.path(p), ""))
	good := answerTo(t, req.msg, "200 OK")
	for name, bad := range map[string]string{
		"other target":       strings.Replace(good, "10.0.1.7:6060;branch", "192.0.2.1:6060;branch", 1),
		"other port":         strings.Replace(good, "10.0.1.7:6060;branch", "10.0.1.7:22;branch", 1),
		"received":           strings.Replace(good, "branch=z9hG4bKs9", "branch=z9hG4bKs9;received=192.0.2.1", 1),
		"no second Via":      strings.Replace(good, "Via: SIP/2.0/UDP 10.0.1.7:6060;branch=z9hG4bKs9\r\n", "", 1),
		"our branch changed": strings.Replace(good, "z9hG4bKg", "z9hG4bKgA", 1),
	} {
		if bad == good {
			t.Fatalf("%s: nothing replaced in\n%s", name, good)
		}
		if out := r.deliver(p.protectedFlow, bad); len(out) != 0 {
			t.Errorf("%s: sent %v", name, out)
		}
	}
	if out := r.deliver(p.protectedFlow, good); len(out) != 1 {
		t.Error("the right one was not sent")
	}
}

// Without a live set the core gets an error, never is anything sent in clear (R5.45, DESIGN §7).
func TestRequestToUENotPossible(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	route := r.path(p)
	if out := r.one(coreFlow(), mtInvite(strings.Replace(route, "sip:", "sip:x", 1), "")); status(t, out.msg) != 403 {
		t.Errorf("forged token:\n%s", out.msg)
	}
	if out := r.one(coreFlow(), mtInvite("<sip:10.0.1.5:5060;lr>", "")); status(t, out.msg) != 404 {
		t.Errorf("no token:\n%s", out.msg)
	}
	r.w.table.Deregister(r.w.table.UEOf(impi, ueAddr), time.Minute)
	if out := r.one(coreFlow(), mtInvite(route, "")); status(t, out.msg) != 480 {
		t.Errorf("while de-registering:\n%s", out.msg)
	}
	r.advance(2 * time.Minute)
	out := r.one(coreFlow(), mtInvite(route, ""))
	if status(t, out.msg) != 430 || out.remote != netip.MustParseAddrPort("10.0.1.9:6060") {
		t.Errorf("afterwards to %v:\n%s", out.remote, out.msg)
	}
	if r.backend.Count() != 0 {
		t.Errorf("%d SAs left", r.backend.Count())
	}
}

// MO INVITE with the Record-Route of R1.21, and the in-dialog request that follows it.
func TestDialogFromUE(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	invite := strings.NewReplacer("MESSAGE", "INVITE").Replace(p.message())
	req := r.one(p.protectedFlow, invite)
	rr := get(t, req.msg, sipmsg.RecordRoute)
	if !strings.HasSuffix(rr, "@10.0.1.5:5060;lr>") {
		t.Fatalf("Record-Route towards the core: %s", rr)
	}
	ans := r.one(coreFlow(), answerTo(t, req.msg, "200 OK", "Record-Route: <sip:10.0.1.7:6060;lr>"))
	ours := get(t, ans.msg, sipmsg.RecordRoute)
	if !strings.HasSuffix(ours, fmt.Sprintf("@10.0.0.5:%d;lr>", p.ps)) {
		t.Fatalf("Record-Route towards the UE: %s", ours)
	}
	bye := lines("", "BYE sip:10.0.1.8 SIP/2.0", "Via: SIP/2.0/UDP 10.45.0.7:6300;branch=z9hG4bKb1", "Max-Forwards: 70",
		"Route: "+ours, "Route: <sip:10.0.1.7:6060;lr>", "From: <sip:a@b>;tag=1", "To: <sip:c@d>;tag=2", "Call-ID: m1@10.45.0.7", "CSeq: 2 BYE")
	out := r.one(p.protectedFlow, bye)
	if out.remote != netip.MustParseAddrPort("10.0.1.7:6060") || get(t, out.msg, sipmsg.Route) != "<sip:10.0.1.7:6060;lr>" ||
		get(t, out.msg, sipmsg.RecordRoute) != "" {
		t.Errorf("BYE to %v:\n%s", out.remote, out.msg)
	}
	relay := strings.Replace(bye, "10.0.1.7:6060;lr", "192.0.2.1:5060;lr", 1)
	if out := r.one(p.protectedFlow, relay); status(t, out.msg) != 403 {
		t.Errorf("request for a strange destination:\n%s", out.msg)
	}
	// CANCEL and the ACK of a non-2xx go the way of the INVITE, with its branch.
	for _, method := range []string{"CANCEL", "ACK"} {
		r.l.conns[5] = true // also when they come another way
		same := r.one(p.tcpFlow(5), strings.NewReplacer("MESSAGE", method).Replace(p.message()))
		if branch(t, same.msg) != branch(t, req.msg) || same.remote != req.remote {
			t.Errorf("%s goes to %v with %s", method, same.remote, get(t, same.msg, sipmsg.Via))
		}
	}
}

func branch(t testing.TB, msg string) string {
	t.Helper()
	v, err := sipmsg.ParseVia([]byte(get(t, msg, sipmsg.Via)))
	if err != nil {
		t.Fatal(err)
	}
	return string(v.Branch)
}

// A dialog between two phones of one gate has two entries of ours in Record-Route: each side sees its own changed.
func TestDialogWithin(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	toCore := r.one(p.protectedFlow, strings.NewReplacer("MESSAGE", "INVITE").Replace(p.message()))
	mo := get(t, toCore.msg, sipmsg.RecordRoute)
	from := coreFlow()
	from.Remote = netip.MustParseAddrPort("10.0.1.7:6060")
	toUE := r.one(from, strings.Replace(mtInvite(r.path(p), ""), "Record-Route: <sip:10.0.1.7:6060;lr>",
		"Record-Route: <sip:10.0.1.7:6060;lr>, "+mo, 1))
	back := r.one(p.protectedFlow, answerTo(t, toUE.msg, "200 OK"))
	var got []string
	for _, row := range scan(t, back.msg).Rows() {
		if row.ID == sipmsg.RecordRoute {
			got = append(got, string(scan(t, back.msg).Value(row)))
		}
	}
	if len(got) != 2 || !strings.HasSuffix(got[0], "@10.0.1.5:5060;lr>") || !strings.HasSuffix(got[1], mo) {
		t.Errorf("towards the core: %q, the caller's entry was %s", got, mo)
	}
	last := r.one(coreFlow(), strings.Replace(answerTo(t, toCore.msg, "200 OK"), "Record-Route: ", "Record-Route: "+got[0]+", ", 1))
	ours := get(t, last.msg, sipmsg.RecordRoute)
	if !strings.Contains(ours, got[0]) || !strings.HasSuffix(ours, fmt.Sprintf("@10.0.0.5:%d;lr>", p.ps)) {
		t.Errorf("towards the caller: %s", ours)
	}
}

// CANCEL reaches the UE with the branch of its INVITE, although it has no P-Called-Party-ID.
func TestCancelToUE(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	invite := r.one(coreFlow(), mtInvite(r.path(p), ""))
	cancel := strings.NewReplacer("INVITE sip", "CANCEL sip", "CSeq: 1 INVITE", "CSeq: 1 CANCEL",
		"P-Called-Party-ID: <tel:+15550100001>\r\n", "").Replace(mtInvite(r.path(p), ""))
	if got := r.one(coreFlow(), cancel); branch(t, got.msg) != branch(t, invite.msg) {
		t.Errorf("branches %s and %s", branch(t, got.msg), branch(t, invite.msg))
	}
}

// The CANCEL of an INVITE that went over TCP because of its size goes over TCP as well (RFC 3261 §9.1), and over UDP when
// the INVITE had to.
func TestCancelFollowsInvite(t *testing.T) {
	for _, accepts := range []bool{true, false} {
		r := newRig(t)
		p := r.registered()
		invite := mtInvite(r.path(p), "Subject: "+strings.Repeat("x", 1400)+"\r\n")
		r.deliver(coreFlow(), invite)
		if len(r.l.dials) != 1 {
			t.Fatalf("dials: %v", r.l.dials)
		}
		f := p.tcpFlow(9)
		f.Local, f.Remote = r.l.dials[0].local, r.l.dials[0].remote
		want := ims.ConnID(0)
		if accepts {
			want = 9
			r.l.conns[9] = true
			r.w.Dialed(r.l.dials[0].tag, 9, f, nil)
		} else {
			r.w.Dialed(r.l.dials[0].tag, 0, f, io.ErrClosedPipe)
		}
		for _, method := range []string{"CANCEL", "ACK"} {
			small := strings.NewReplacer("INVITE sip", method+" sip", "1 INVITE", "1 "+method).Replace(mtInvite(r.path(p), ""))
			if got := r.one(coreFlow(), small); got.conn != want {
				t.Errorf("phone accepts TCP: %v, %s goes by connection %d, want %d", accepts, method, got.conn, want)
			}
		}
		if got := r.one(coreFlow(), strings.Replace(mtInvite(r.path(p), ""), "z9hG4bKs9", "z9hG4bKother", 1)); got.conn != 0 {
			t.Error("another INVITE goes over TCP")
		}
	}
}

func (p *phone) tcpFlow(c ims.ConnID) ims.Flow {
	f := p.protectedFlow
	f.Transport, f.Conn = ims.TCP, c
	return f
}

// TCP answers go on the connection of the request, then on one from port-pc to port-us, never elsewhere (R1.23, T14).
func TestAnswerOverTCP(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	r.l.conns[7] = true
	msg := strings.Replace(p.message(), "SIP/2.0/UDP", "SIP/2.0/TCP", 1)
	req := r.one(p.tcpFlow(7), msg)
	if ans := r.one(coreFlow(), answerTo(t, req.msg, "200 OK")); ans.conn != 7 {
		t.Errorf("answer on connection %d", ans.conn)
	}
	delete(r.l.conns, 7)
	r.w.Closed(7, p.tcpFlow(7))
	if out := r.deliver(coreFlow(), answerTo(t, req.msg, "200 OK")); len(out) != 0 {
		t.Errorf("answer sent: %v", out)
	}
	if len(r.l.dials) != 1 || r.l.dials[0].local != netip.AddrPortFrom(gmAddr, p.pc) || r.l.dials[0].remote != netip.AddrPortFrom(ueAddr, p.portS) {
		t.Fatalf("dials: %v", r.l.dials)
	}
	r.l.conns[8] = true
	f := p.tcpFlow(8)
	f.Local, f.Remote = r.l.dials[0].local, r.l.dials[0].remote
	r.w.Dialed(r.l.dials[0].tag, 8, f, nil)
	if len(r.l.out) != 1 || r.l.out[0].conn != 8 {
		t.Errorf("after connecting: %v", r.l.out)
	}
}

// A large request to a UE goes over TCP, and over UDP when the phone does not listen (R1.28, R1.29).
func TestLargeRequestToUE(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	big := mtInvite(r.path(p), "Subject: "+strings.Repeat("x", 1400)+"\r\n")
	if out := r.deliver(coreFlow(), big); len(out) != 0 || len(r.l.dials) != 1 {
		t.Fatalf("sent %v, dials %v", out, r.l.dials)
	}
	r.w.Dialed(r.l.dials[0].tag, 0, ims.Flow{}, io.ErrClosedPipe)
	if len(r.l.out) != 1 || !strings.Contains(r.l.out[0].msg, "Via: SIP/2.0/UDP 10.0.0.5:") {
		t.Fatalf("after the refusal: %v", r.l.out)
	}
	p.downlink(t, r.l.out[0])
	r.deliver(coreFlow(), big)
	r.l.conns[9] = true
	f := p.tcpFlow(9)
	f.Local, f.Remote = r.l.dials[1].local, r.l.dials[1].remote
	r.w.Dialed(r.l.dials[1].tag, 9, f, nil)
	if len(r.l.out) != 1 || r.l.out[0].conn != 9 || !strings.Contains(r.l.out[0].msg, ";transport=tcp;lr>") {
		t.Fatalf("over TCP: %v", r.l.out)
	}
}

// R5.46: a 503 of the core is not ours.
func Test503BecomesA500(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	req := r.one(p.protectedFlow, p.message())
	ans := r.one(coreFlow(), answerTo(t, req.msg, "503 Service Unavailable", "Retry-After: 600"))
	if status(t, ans.msg) != 500 || strings.Contains(ans.msg, "Retry-After") {
		t.Errorf("answer:\n%s", ans.msg)
	}
}

// §9.8 of the sheet: re-registration with a challenge over the old set.
func TestReregistration(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	old := *p
	p.agree()
	req := r.one(old.protectedFlow, p.register("re1", 6300, "Security-Verify: "+old.server))
	if !strings.Contains(req.msg, `integrity-protected="yes"`) {
		t.Errorf("re-REGISTER:\n%s", req.msg)
	}
	ans := r.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge))
	old.downlink(t, ans) // the 401 leaves over the old set
	r.readServer(p, ans.msg)
	if p.ps != old.ps || p.pc == old.pc {
		t.Errorf("ports: old pc %d ps %d, new pc %d ps %d", old.pc, old.ps, p.pc, p.ps)
	}
	_, done := r.confirm(p)
	p.downlink(t, done) // the 200 goes over the new one
	u := r.w.table.UEOf(impi, ueAddr)
	if len(u.Sets) != 2 || u.Current != u.Sets[0] || r.backend.Count() != 8 {
		t.Fatalf("%d sets, %d SAs", len(u.Sets), r.backend.Count())
	}
	from := coreFlow()
	from.Remote = netip.MustParseAddrPort("10.0.1.7:6060")
	old.downlink(t, r.one(from, mtInvite(r.path(p), ""))) // T10
	r.one(p.protectedFlow, p.message())
	p.downlink(t, r.one(from, mtInvite(r.path(p), "")))
	r.advance(129 * time.Second)
	if len(u.Sets) != 1 || r.backend.Count() != 4 {
		t.Errorf("after 64*T1: %d sets, %d SAs", len(u.Sets), r.backend.Count())
	}
}

// T4: a wrong response is refused by the core; the phone gets to know, and the old set stays.
func TestAuthenticationFails(t *testing.T) {
	r := newRig(t)
	p := newPhone()
	r.challenge(p, clearFlow(), 5060)
	p.authorization = proof
	req := r.one(p.protectedFlow, p.register("sm7", 6300, "Security-Verify: "+p.server))
	ans := r.one(coreFlow(), answerTo(t, req.msg, "403 Forbidden"))
	p.downlink(t, ans)
	if status(t, ans.msg) != 403 {
		t.Errorf("answer:\n%s", ans.msg)
	}
	r.advance(answerGrace + time.Second)
	if r.backend.Count() != 0 || r.w.table.SPIsInUse() != 0 || r.w.table.UEs() != 0 {
		t.Error("something is left")
	}
}

// T15, R5.54: the answer to a de-registration leaves over the set, which goes afterwards.
func TestDeregistration(t *testing.T) {
	for name, contact := range map[string]string{
		"expires 0": "Contact: <sip:001010000000001@10.45.0.7:6300>;expires=0",
		"star":      "Contact: *",
		"header":    "Expires: 0",
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			p := r.registered()
			req := r.one(p.protectedFlow, p.register("de", 6300, contact, "Security-Client:"))
			ans := r.one(coreFlow(), answerTo(t, req.msg, "200 OK"))
			p.downlink(t, ans)
			r.advance(time.Second)
			if r.backend.Count() != 4 {
				t.Fatal("the SAs went before the answer can have arrived")
			}
			r.advance(128 * time.Second)
			if r.backend.Count() != 0 || r.w.table.SPIsInUse() != 0 || r.w.table.UEs() != 0 {
				t.Error("something is left")
			}
		})
	}
}

// A flood of REGISTERs in clear takes no more than its share, and leaves nothing.
func TestFloodOfSources(t *testing.T) {
	r := newRig(t)
	good := r.registered()
	send := func(addr netip.Addr, n int) int {
		p := newPhone()
		p.addr, p.impi = addr, fmt.Sprintf("flood%d@%s", n, domain)
		f := clearFlow()
		f.Remote = netip.AddrPortFrom(addr, 5060)
		out := r.one(f, p.register(fmt.Sprintf("fl%d", n), 5060))
		if out.remote == coreAddr {
			return 0
		}
		if !strings.Contains(out.msg, "Retry-After: ") {
			t.Errorf("refused without Retry-After:\n%s", out.msg)
		}
		return status(t, out.msg)
	}
	source := netip.MustParseAddr("10.45.1.1")
	for n := range 20 {
		want := 0
		if n >= 4 {
			want = 503
		}
		if got := send(source, n); got != want {
			t.Errorf("REGISTER %d of one source: %d, want %d", n, got, want)
		}
	}
	addr := netip.MustParseAddr("10.46.0.1")
	for n := range 2000 {
		if got := send(addr, 1000+n); got != 0 {
			t.Fatalf("REGISTER of source %v: %d", addr, got)
		}
		addr = addr.Next()
	}
	if r.w.waiting.n != 100 || len(r.w.txs) > 100+2 {
		t.Errorf("%d wait, %d transactions", r.w.waiting.n, len(r.w.txs))
	}
	if out := r.deliver(good.protectedFlow, good.message()); len(out) != 1 || out[0].remote.Addr() == ueAddr {
		t.Errorf("the registered phone is disturbed: %v", out)
	}
	r.advance(200 * time.Second)
	if len(r.w.txs) != 0 || len(r.w.newest) != 0 || r.w.waiting.n != 0 || len(r.w.waiting.bySource) != 0 {
		t.Errorf("left: %d transactions, %d newest, %d waiting, %d sources",
			len(r.w.txs), len(r.w.newest), r.w.waiting.n, len(r.w.waiting.bySource))
	}
	if r.backend.Count() != 4 || r.w.table.SPIsInUse() != 2 {
		t.Errorf("%d SAs, %d SPIs", r.backend.Count(), r.w.table.SPIsInUse())
	}
}

// Sets that wait for their authentication count as well: challenges answered by the core do not free the share.
func TestFloodOfChallenges(t *testing.T) {
	r := newRig(t)
	for n := range 6 {
		p := newPhone()
		p.impi = fmt.Sprintf("flood%d@%s", n, domain)
		p.portS = uint16(8000 + 2*n)
		p.securityClient = fmt.Sprintf("ipsec-3gpp;alg=hmac-sha-1-96;spi-c=%d;spi-s=%d;port-c=%d;port-s=%d",
			5000+2*n, 5001+2*n, 8001+2*n, 8000+2*n)
		out := r.one(clearFlow(), p.register(fmt.Sprintf("c%d", n), 5060))
		if n >= 4 {
			if out.remote.Addr() != ueAddr || status(t, out.msg) != 503 {
				t.Errorf("REGISTER %d: %v", n, out.msg)
			}
			continue
		}
		r.one(coreFlow(), answerTo(t, out.msg, "401 Unauthorized", challenge))
	}
	r.advance(5 * time.Minute)
	if r.backend.Count() != 0 || r.w.table.SPIsInUse() != 0 || r.w.table.UEs() != 0 {
		t.Error("something is left")
	}
	if out := r.one(clearFlow(), newPhone().register("again", 5060)); out.remote != coreAddr {
		t.Errorf("the share does not come free:\n%s", out.msg)
	}
}

// A core that accepts a REGISTER in clear without a challenge registers nobody here.
func TestUnchallenged(t *testing.T) {
	r := newRig(t)
	req := r.one(clearFlow(), newPhone().register("x", 5060))
	if out := r.one(coreFlow(), answerTo(t, req.msg, "200 OK", granted...)); status(t, out.msg) != 500 {
		t.Errorf("answer:\n%s", out.msg)
	}
}

// R1.4, R10: a phone registers with every legal pair, and the keys fit.
func TestEverySuite(t *testing.T) {
	for _, s := range ims.Suites() {
		t.Run(s.String(), func(t *testing.T) {
			r := newRig(t)
			p := newPhone()
			p.securityClient = fmt.Sprintf("ipsec-3gpp;alg=%s;ealg=%s;spi-c=300;spi-s=301;port-c=6301;port-s=6300", s.Alg, s.Enc)
			r.challenge(p, clearFlow(), 5060)
			r.confirm(p)
			if got := r.backend.Installed[0].Keys.Suite; got != s {
				t.Errorf("installed %v", got)
			}
		})
	}
}

// No garbage makes a worker crash, answer a non-request or leak.
func FuzzMessage(f *testing.F) {
	p := newPhone()
	f.Add(p.register("a", 5060), uint8(0))
	p.ps, p.server = 6100, "x"
	f.Add(p.message(), uint8(1))
	f.Add(mtInvite("<sip:x@10.0.1.5;lr>", ""), uint8(2))
	f.Add("SIP/2.0 200 OK\r\n\r\n", uint8(2))
	f.Fuzz(func(t *testing.T, msg string, side uint8) {
		r := newRig(t)
		p := r.registered()
		flow := clearFlow()
		switch side % 3 {
		case 1:
			flow = p.protectedFlow
		case 2:
			flow = coreFlow()
		}
		for _, s := range r.deliver(flow, msg) {
			if s.msg == "" {
				t.Error("empty message sent")
			}
			if flow.Side == ims.GmClear && s.remote.Addr() != coreAddr.Addr() && s.remote.Addr() != ueAddr {
				t.Errorf("sent to %v", s.remote)
			}
		}
		if r.backend.Count() != 4 {
			t.Errorf("%d SAs", r.backend.Count())
		}
	})
}

func TestTokens(t *testing.T) {
	key, _ := NewTokenKey()
	z, err := newSealer(key)
	if err != nil {
		t.Fatal(err)
	}
	var s scratch
	want := token{kind: tokenToUE, worker: 3, ue: 0xabcdef, gen: 0x1234, called: true}
	text := bytes.Clone(z.seal(&s, want))
	got, ok := z.open(&s, text)
	if !ok || got != want {
		t.Errorf("opened %+v, %v", got, ok)
	}
	for i := range text {
		for _, c := range []byte("A_9") {
			bad := bytes.Clone(text)
			if bad[i] == c {
				continue
			}
			bad[i] = c
			if tok, ok := z.open(&s, bad); ok && tok != want { // the last digit has two unused bits
				t.Errorf("forged token %s opens as %+v", bad, tok)
			}
		}
	}
	if z.mac(&s, []byte("ab"), []byte("c")) == z.mac(&s, []byte("a"), []byte("bc")) {
		t.Error("parts are not told apart")
	}
}

// The forwarding path does not allocate: DESIGN §3.
func TestForwardingDoesNotAllocate(t *testing.T) {
	r := newRig(t)
	p := r.registered()
	req := []byte(p.message())
	ans := []byte(answerTo(t, r.one(p.protectedFlow, string(req)).msg, "200 OK"))
	quiet := &quietLoop{loop: r.l}
	r.w.eg = quiet
	up, down := p.protectedFlow, coreFlow()
	for name, f := range map[string]func(){
		"request": func() { r.w.Message(up, req) },
		"answer":  func() { r.w.Message(down, ans) },
	} {
		f()
		if n := testing.AllocsPerRun(200, f); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
	if quiet.n == 0 {
		t.Error("nothing was sent")
	}
}

// quietLoop counts what is sent instead of keeping it.
type quietLoop struct {
	*loop
	n int
}

func (l *quietLoop) SendUDP(netip.AddrPort, netip.AddrPort, []byte) error { l.n++; return nil }
func (l *quietLoop) SendTCP(ims.ConnID, []byte) error                     { l.n++; return nil }

func BenchmarkForward(b *testing.B) {
	r := newRig(b)
	p := r.registered()
	req := []byte(p.message())
	quiet := &quietLoop{loop: r.l}
	r.w.eg = quiet
	b.SetBytes(int64(len(req)))
	b.ReportAllocs()
	for b.Loop() {
		r.w.Message(p.protectedFlow, req)
	}
}
