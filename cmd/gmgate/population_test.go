package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/emiago/sipgo/sip"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/config"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/proxy"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/control/store"
	"github.com/gmgate/gmgate/control/store/bolt"
	"github.com/gmgate/gmgate/control/survive"
	"github.com/gmgate/gmgate/dataplane/front"
	"github.com/gmgate/gmgate/dataplane/front/frontbench"
	"github.com/gmgate/gmgate/dataplane/guard"
	"github.com/gmgate/gmgate/dataplane/hostnet"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
	"github.com/gmgate/gmgate/dataplane/useresp"
)

// population is a proxy worker with any number of phones, which the benchmark plays together with the core, in memory.
type population struct {
	tb    testing.TB
	w     *proxy.Worker
	eg    *memory
	local netip.Addr
	core  ims.Flow
	first int // number of the first phone that has not registered

	// What is kept of the phones beside the worker's own memory; nil where that is not measured.
	db         *bolt.DB
	writer     *store.Writer
	reconciler *survive.Reconciler
	subscribes bool // to the registration state: the core answers, and tells it

	allocs uint64 // of gmgate's part, by batch
}

// memory is the event loop of a population: what is sent is kept in one buffer, and time stands until the benchmark moves
// it. With a front.Worker attached it is that one's loop instead.
type memory struct {
	*front.Worker
	from netip.AddrPort // with a front.Worker: its only socket
	now  time.Time
	sent []byte
	ends []int // of the messages in sent

	mu     sync.Mutex
	posted []func()
	wake   chan struct{}
}

func (m *memory) Index() int                                             { return 0 }
func (m *memory) CloseConn(ims.ConnID, bool)                             {}
func (m *memory) Hand(int, ims.Flow, []byte) error                       { return nil }
func (m *memory) SendTCP(ims.ConnID, []byte) error                       { return nil }
func (m *memory) Dial(_, _ netip.AddrPort, _ ims.Side, _ bool, _ uint64) {}

func (m *memory) Now() time.Time {
	if m.Worker != nil {
		return m.Worker.Now()
	}
	return m.now
}

func (m *memory) SendUDP(_, remote netip.AddrPort, msg []byte) error {
	if m.Worker != nil {
		return m.Worker.SendUDP(m.from, remote, msg)
	}
	m.sent = append(m.sent, msg...)
	m.ends = append(m.ends, len(m.sent))
	return nil
}

func (m *memory) Answer(f func()) error { return m.Post(f) }

func (m *memory) Post(f func()) error {
	m.mu.Lock()
	m.posted = append(m.posted, f)
	m.mu.Unlock()
	select {
	case m.wake <- struct{}{}:
	default:
	}
	return nil
}

// settle runs what the backend posts until it has answered n times.
func (m *memory) settle(n int) {
	for n > 0 {
		<-m.wake
		m.mu.Lock()
		posted := m.posted
		m.posted = nil
		m.mu.Unlock()
		for _, f := range posted {
			f()
		}
		n -= len(posted)
	}
}

// message returns message i of those sent since the last reset.
func (m *memory) message(i int) []byte {
	start := 0
	if i > 0 {
		start = m.ends[i-1]
	}
	return m.sent[start:m.ends[i]]
}

func (m *memory) reset() { m.sent, m.ends = m.sent[:0], m.ends[:0] }

// acker is an ESP backend that agrees to everything and keeps nothing.
type acker struct{ jobs chan func(error) }

func newAcker(tb testing.TB) *acker {
	a := &acker{jobs: make(chan func(error), 4096)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for f := range a.jobs {
			f(nil)
		}
	}()
	tb.Cleanup(func() { close(a.jobs); <-done })
	return a
}

func (a *acker) Install(_ sa.Params, done func(error))                 { a.jobs <- done }
func (a *acker) Remove(_ sa.Params, done func(error))                  { a.jobs <- done }
func (a *acker) Extend(_ sa.Params, _ time.Duration, done func(error)) { a.jobs <- done }
func (a *acker) Count() int                                            { return 0 }
func (a *acker) Close() error                                          { return nil }

// whole has all of gmgate that knows of a phone: subscriptions to the registration state, a store in a file of its own with
// the daemon's writer, and the reconciler, whose backend says that every SA has been used.
func whole(tb testing.TB) func(*population, *proxy.Config) {
	return func(p *population, cfg *proxy.Config) {
		cfg.RegEvent.Enabled, p.subscribes = true, true
		stored(tb)(p, cfg)
		p.reconciler = survive.NewReconciler(survive.ReconcilerConfig{
			Books: books{p}, Backend: used{books: books{p}}, Store: p.db, Writer: p.writer, Log: slog.New(slog.DiscardHandler),
		})
	}
}

// stored has a store alone.
func stored(tb testing.TB) func(*population, *proxy.Config) {
	return func(p *population, cfg *proxy.Config) {
		ctx := tb.Context()
		var err error
		if p.db, err = bolt.Open(ctx, filepath.Join(tb.TempDir(), "store"), bolt.OpenOptions{Key: make(ims.Key, 32)}); err != nil {
			tb.Fatal(err)
		}
		p.writer = store.NewWriter(store.WriterConfig{Store: p.db, Stored: []uint64{}})
		cfg.Store = p.writer
		tb.Cleanup(func() {
			if err := errors.Join(p.writer.Close(context.Background()), p.db.Close()); err != nil {
				tb.Error(err)
			}
		})
	}
}

// books are those of the only worker, whose loop stands while the reconciler asks.
type books struct{ *population }

// Sets implements survive.Books.
func (b books) Sets(context.Context) (sets, clear map[uint64]bool, err error) {
	sets = make(map[uint64]bool)
	b.w.Table().Each(func(u *registrar.UE) bool {
		for _, s := range u.Sets {
			sets[s.ID] = s.Kept()
		}
		return true
	})
	return sets, nil, nil
}

// Mend implements survive.Books: nothing gets lost.
func (b books) Mend(_ context.Context, sets map[uint64]sa.Counters) error {
	b.tb.Errorf("%d sets are missing", len(sets))
	return nil
}

// used is a backend all of whose SAs have carried packets.
type used struct {
	sa.Backend
	books books
}

// Survey implements sa.Backend.
func (u used) Survey(ctx context.Context) (sa.Survey, error) {
	sets, _, err := u.books.Sets(ctx)
	found := sa.Survey{Sets: make(map[uint64]sa.Counters, len(sets))}
	for id := range sets {
		found.Sets[id] = sa.Counters{1, 1, 1, 1}
	}
	return found, err
}

// flush waits until the store has everything, and has the reconciler look at it.
func (p *population) flush() {
	if p.writer == nil {
		return
	}
	if err := p.writer.Flush(p.tb.Context()); err != nil {
		p.tb.Fatal(err)
	}
	if p.reconciler == nil {
		return
	}
	if err := p.reconciler.Round(p.tb.Context()); err != nil {
		p.tb.Fatal(err)
	}
	if found, _, _, _ := p.reconciler.Stats(); found != (survive.Differences{}) {
		p.tb.Fatalf("reconciler: %v", found)
	}
	// Its marks fill a batch, which is reachable until the next one: that is no memory of the UEs.
	p.w.Table().Walk(1, 1, p.w.Table().Changed)
	p.pass(time.Second)
	if err := p.writer.Flush(p.tb.Context()); err != nil {
		p.tb.Fatal(err)
	}
}

// newPopulation makes the worker. change, which may be nil, is the hook for what else is to be measured: it sees the
// configuration before the worker is made.
func newPopulation(tb testing.TB, inst sa.Installer, sink netip.AddrPort, change func(*population, *proxy.Config)) *population {
	tb.Helper()
	key, err := proxy.NewTokenKey()
	if err != nil {
		tb.Fatal(err)
	}
	local := netip.MustParseAddr("127.0.0.1")
	cfg := &proxy.Config{
		Workers: 1, Gm: []netip.Addr{local}, GmPort: 5060, UDPLimit: 1300, Suites: ims.Suites(),
		Registrar: registrar.Config{
			ServerPorts: []uint16{6100}, ClientPorts: []uint16{6110, 6111, 6112, 6113},
			AwaitAuth: 4 * time.Minute, OldSet: 128 * time.Second, MaxSets: 3,
		},
		LifetimeExtra: 30 * time.Second, VisitedNetwork: benchDomain, ClearIntegrity: "no",
		Mw: []netip.Addr{local}, MwPort: 5060, MwTransport: ims.UDP, NextHops: []ims.Hop{{Addr: sink, Transport: ims.UDP}},
		PendingMax: 20000, PendingSource: 32, RegisterTimeout: 32 * time.Second, TokenKey: key, SPIFirst: 1 << 28, SPILast: 1<<32 - 1,
	}
	p := &population{
		tb: tb, local: local, eg: &memory{now: time.Unix(1.8e9, 0), wake: make(chan struct{}, 1)},
		core: ims.Flow{Local: netip.AddrPortFrom(local, 5060), Remote: sink, Transport: ims.UDP, Side: ims.Mw},
	}
	if change != nil {
		change(p, cfg)
	}
	if p.w, err = proxy.New(cfg, 0, inst, observe.New(1), slog.New(slog.DiscardHandler)); err != nil {
		tb.Fatal(err)
	}
	p.w.Boot(p.eg)
	return p
}

// Every phone has an address of its own and the same ports.
const benchUC, benchUS = 31000, 31001

func benchAddr(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 64 + byte(n>>16), byte(n >> 8), byte(n)})
}

func (p *population) flow(n int, side ims.Side) ims.Flow {
	f := ims.Flow{Local: netip.AddrPortFrom(p.local, 5060), Remote: netip.AddrPortFrom(benchAddr(n), 5060), Transport: ims.UDP, Side: side}
	if side == ims.GmProtected {
		f.Local, f.Remote = netip.AddrPortFrom(p.local, 6100), netip.AddrPortFrom(benchAddr(n), benchUC)
	}
	return f
}

// register writes SM1, or SM7 when it is given the Security-Server of the challenge: 1.4 kB with four combinations of
// algorithms, as phones send it.
func (p *population) register(n int, server string) []byte {
	a := benchAddr(n).String()
	impi := fmt.Sprintf("00101%010d@%s", n, benchDomain)
	combination := func(alg string) string {
		return fmt.Sprintf("ipsec-3gpp;alg=%s;prot=esp;mod=trans;spi-c=%d;spi-s=%d;port-c=%d;port-s=%d",
			alg, 100000+2*n, 100001+2*n, benchUC, benchUS)
	}
	seq, auth, verify := "1", `nonce="",response=""`, ""
	if server != "" {
		seq, verify = "2", "Security-Verify: "+server+"\r\n"
		auth = `nonce="I1U8vpY3qJ0hiuZNrke/NVXzKLQ1d7m5Sp/6w1Tfr7M=",response="402ab8df9f3a4d63a9f47c2f90e02938",` +
			`algorithm=AKAv1-MD5,qop=auth,nc=00000001,cnonce="0a4f113b"`
	}
	return []byte("REGISTER sip:" + benchDomain + " SIP/2.0\r\n" +
		"Via: SIP/2.0/UDP " + a + ":" + strconv.Itoa(benchUS) + ";branch=z9hG4bK" + seq + "-" + strconv.Itoa(n) + "\r\nMax-Forwards: 70\r\n" +
		"From: <sip:" + impi + ">;tag=u" + strconv.Itoa(n) + "\r\nTo: <sip:" + impi + ">\r\n" +
		"Call-ID: reg" + strconv.Itoa(n) + "@" + a + "\r\nCSeq: " + seq + " REGISTER\r\n" +
		"Contact: <sip:" + impi[:15] + "@" + a + ":31001>;+g.3gpp.icsi-ref=\"urn%3Aurn-7%3A3gpp-service.ims.icsi.mmtel\";" +
		"+g.3gpp.smsip;+sip.instance=\"<urn:gsma:imei:35824005-694481-0>\"\r\n" +
		"Expires: 600000\r\nSupported: path, sec-agree, gruu\r\nAllow: INVITE, ACK, OPTIONS, CANCEL, BYE, UPDATE, INFO, REFER, NOTIFY, MESSAGE, PRACK\r\n" +
		"Require: sec-agree\r\nProxy-Require: sec-agree\r\n" +
		"P-Access-Network-Info: 3GPP-E-UTRAN-FDD;utran-cell-id-3gpp=0010100010019B01\r\nUser-Agent: bench/1.0\r\n" +
		"Security-Client: " + combination("hmac-md5-96;ealg=aes-cbc") + ", " + combination("hmac-sha-1-96;ealg=aes-cbc") + ", " +
		combination("hmac-md5-96;ealg=null") + ", " + combination("hmac-sha-1-96;ealg=null") + "\r\n" + verify +
		"Authorization: Digest username=\"" + impi + "\",realm=\"" + benchDomain + "\",uri=\"sip:" + benchDomain + "\"," + auth +
		"\r\nContent-Length: 0\r\n\r\n")
}

// answer writes the core's answer to a request.
func (p *population) answer(req []byte, status, extra string) []byte {
	var m sipmsg.Msg
	if err := m.Scan(req); err != nil {
		p.tb.Fatalf("%v\n%s", err, req)
	}
	out := "SIP/2.0 " + status + "\r\n"
	for _, r := range m.Rows() {
		switch r.ID {
		case sipmsg.Via, sipmsg.From, sipmsg.To, sipmsg.CallID, sipmsg.CSeq:
			out += r.ID.String() + ": " + string(m.Value(r)) + "\r\n"
		default:
		}
	}
	return []byte(out + extra + "Content-Length: 0\r\n\r\n")
}

const benchChallenge = `WWW-Authenticate: Digest realm="` + benchDomain + `",nonce="I1U8vpY3qJ0hiuZNrke/NVXzKLQ1d7m5Sp/6w1Tfr7M=",` +
	`algorithm=AKAv1-MD5,qop="auth",ck="b40ba9a3c58b2a05bbf0d987b21bf8cb",ik="f769bcd751044604127672711c6d3441"` + "\r\n"

func (p *population) granted(n int) string {
	a, user := benchAddr(n).String(), fmt.Sprintf("00101%010d", n)
	return "Contact: <sip:" + user + "@" + a + ":31001>;expires=600000\r\n" +
		"Service-Route: <sip:orig@" + p.core.Remote.String() + ";lr>\r\n" +
		"P-Associated-URI: <sip:+" + user + "@" + benchDomain + ">, <tel:+" + user + ">\r\n"
}

// batch takes k more phones from nothing to registered, step by step, and returns the CPU time of gmgate's part. each
// wraps every step.
func (p *population) batch(k int) (cpu time.Duration) {
	p.tb.Helper()
	from := p.first
	p.first += k
	in, out := make([][]byte, k), make([][]byte, k)
	each := 1 // messages that a step makes for each phone
	step := func(posts int, flow func(n int) ims.Flow) {
		p.eg.reset()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		began := cpuTime(p.tb)
		for i, b := range in {
			p.w.Message(flow(from+i), b)
		}
		p.eg.settle(posts)
		cpu += cpuTime(p.tb) - began
		runtime.ReadMemStats(&after)
		p.allocs += after.Mallocs - before.Mallocs
		if len(p.eg.ends) != k*each {
			p.tb.Fatalf("%d messages for %d phones: %s", len(p.eg.ends), k, p.eg.sent)
		}
		for i := range out {
			out[i] = p.eg.message(i * each)
		}
	}
	core := func(int) ims.Flow { return p.core }
	clear := func(n int) ims.Flow { return p.flow(n, ims.GmClear) }
	protected := func(n int) ims.Flow { return p.flow(n, ims.GmProtected) }

	for i := range in {
		in[i] = p.register(from+i, "")
	}
	step(0, clear)
	for i := range in {
		in[i] = p.answer(out[i], "401 Unauthorized", benchChallenge)
	}
	step(k, core) // Install
	var m sipmsg.Msg
	for i := range in {
		if err := m.Scan(out[i]); err != nil || m.Status() != 401 {
			p.tb.Fatalf("%v: %s", err, out[i])
		}
		in[i] = p.register(from+i, string(m.Get(sipmsg.SecurityServer)))
	}
	step(0, protected)
	for i := range in {
		in[i] = p.answer(out[i], "200 OK", p.granted(from+i))
	}
	if p.subscribes {
		each = 2
	}
	step(0, core)
	for _, b := range out {
		if !bytes.HasPrefix(b, []byte("SIP/2.0 200 ")) {
			p.tb.Fatalf("%s", b)
		}
	}
	if p.subscribes {
		subscribes := make([][]byte, k)
		for i := range subscribes {
			subscribes[i] = bytes.Clone(p.eg.message(2*i + 1))
		}
		p.notify(from, subscribes)
	}
	return cpu
}

// notify has the core answer the SUBSCRIBEs for phones from first on, and tell the state of their registrations.
func (p *population) notify(first int, subscribes [][]byte) {
	p.tb.Helper()
	var m sipmsg.Msg
	for i, b := range subscribes {
		if err := m.Scan(b); err != nil || m.Method() != sipmsg.MethodSubscribe {
			p.tb.Fatalf("%v: %s", err, b)
		}
		core := "<sip:" + p.core.Remote.String() + ">"
		from, to := string(m.Get(sipmsg.From)), string(m.Get(sipmsg.To))
		target, err := sipmsg.ParseNameAddr(m.Get(sipmsg.Contact))
		if err != nil {
			p.tb.Fatal(err)
		}
		accepted := bytes.Replace(p.answer(b, "200 OK", "Contact: "+core+"\r\nExpires: 600600\r\n"),
			[]byte("To: "+to), []byte("To: "+to+";tag=as1c2e3f70"), 1)
		a, user := benchAddr(first+i).String(), fmt.Sprintf("00101%010d", first+i)
		body := `<?xml version="1.0"?><reginfo xmlns="urn:ietf:params:xml:ns:reginfo" version="0" state="full">`
		for j, aor := range []string{"sip:+" + user + "@" + benchDomain, "tel:+" + user} {
			body += fmt.Sprintf(`<registration aor="%s" id="r%08x" state="active"><contact id="c%08x" state="active" event="registered">`+
				`<uri>sip:%s@%s:31001</uri></contact></registration>`, aor, 2*i+j, 2*i+j, user, a)
		}
		body += `</reginfo>`
		told := "NOTIFY " + string(target.URI) + " SIP/2.0\r\nVia: SIP/2.0/UDP " + p.core.Remote.String() + ";branch=z9hG4bKn" + user +
			"\r\nMax-Forwards: 70\r\nFrom: " + to + ";tag=as1c2e3f70\r\nTo: " + from + "\r\nCall-ID: " + string(m.Get(sipmsg.CallID)) +
			"\r\nCSeq: 1 NOTIFY\r\nContact: " + core + "\r\nEvent: reg\r\nSubscription-State: active;expires=600600\r\n" +
			"Content-Type: application/reginfo+xml\r\nContent-Length: " + strconv.Itoa(len(body)) + "\r\n\r\n" + body
		p.eg.reset()
		p.w.Message(p.core, accepted)
		p.w.Message(p.core, []byte(told))
		if len(p.eg.ends) != 1 || !bytes.HasPrefix(p.eg.sent, []byte("SIP/2.0 200 ")) {
			p.tb.Fatalf("NOTIFY was not taken: %s", p.eg.sent)
		}
	}
}

// grow registers phones until there are n, and lets pass the time for which answers are kept, unless fresh.
func (p *population) grow(n int, fresh bool) {
	for p.first < n {
		p.batch(min(1000, n-p.first))
		p.pass(time.Second) // or too many would be pending
	}
	if !fresh {
		p.pass(3 * time.Minute)
	}
	p.eg.sent, p.eg.ends = nil, nil
}

// pass lets time go by.
func (p *population) pass(d time.Duration) {
	for end := p.eg.now.Add(d); p.eg.now.Before(end); {
		p.eg.now = p.eg.now.Add(100 * time.Millisecond)
		p.w.Tick(p.eg.now)
		p.eg.mu.Lock()
		posted := p.eg.posted
		p.eg.posted = nil
		p.eg.mu.Unlock()
		for _, f := range posted {
			f()
		}
	}
}

// cpuTime is what the process has used, the goroutines of the backend and the garbage collector included.
func cpuTime(tb testing.TB) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// userspaceBackend is the real backend on a namespace of its own.
func userspaceBackend(b *testing.B) sa.Installer {
	ns, err := hostnet.Create()
	if err != nil {
		b.Skipf("the userspace backend needs root: %v", err)
	}
	b.Cleanup(func() { _ = ns.Close() })
	if err := ns.Up("lo"); err != nil {
		b.Fatal(err)
	}
	back, err := useresp.New(useresp.Config{
		Local: []netip.Addr{netip.MustParseAddr("127.0.0.1")}, Outer: ns, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		b.Skipf("no userspace backend here: %v", err)
	}
	b.Cleanup(func() { _ = back.Close() })
	return back
}

var benchCore = netip.MustParseAddrPort("127.0.0.1:5070")

// BenchmarkRegistration measures the CPU time of a whole registration in gmgate: SM1 and its 401, SM7 and its 200, four SAs,
// without the sockets. It is taken in turn with what a full parse and print of the same four messages costs, which is the
// ratio. "worker" has a backend that keeps nothing; "userspace" the real one with its SA table and key schedules; "+store" adds
// what it costs to keep the registration, in batches of 1000 changes: as many as the daemon writes at once when it is busy.
func BenchmarkRegistration(b *testing.B) {
	for _, tt := range []struct {
		name    string
		backend func(*testing.B) sa.Installer
		stored  bool
	}{
		{"worker", func(b *testing.B) sa.Installer { return newAcker(b) }, false},
		{"userspace", userspaceBackend, false},
		{"userspace+store", userspaceBackend, true},
	} {
		b.Run(tt.name, func(b *testing.B) {
			const rounds, size = 5, 500
			var change func(*population, *proxy.Config)
			if tt.stored {
				change = stored(b)
			}
			p := newPopulation(b, tt.backend(b), benchCore, change)
			p.batch(size) // warm up
			p.pass(time.Second)
			p.flush()
			messages := p.conversation()
			n := max(b.N/rounds, size)
			var ours, kept, reference []float64
			b.ResetTimer()
			for range rounds {
				var cpu, keeping time.Duration
				done := 0
				for ; done < n; done += size {
					cpu += p.batch(size)
					began := cpuTime(b)
					p.pass(time.Second)
					p.flush()
					if tt.stored {
						keeping += cpuTime(b) - began
					}
				}
				cpu += keeping
				kept = append(kept, float64(keeping.Nanoseconds())/float64(done)/1e3)
				ours = append(ours, float64(cpu.Nanoseconds())/float64(done)/1e3)
				began := cpuTime(b)
				for range size {
					parseAndPrint(b, messages)
				}
				reference = append(reference, float64((cpuTime(b)-began).Nanoseconds())/size/1e3)
			}
			b.StopTimer()
			if tt.stored {
				if ids, err := p.db.SetIDs(b.Context()); err != nil || len(ids) != p.first {
					b.Fatalf("%d sets are stored of %d: %v", len(ids), p.first, err)
				}
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(median(ours), "CPU-µs/registration")
			if tt.stored {
				b.ReportMetric(median(kept), "store-µs")
			}
			b.ReportMetric(median(reference), "parse-and-print-µs")
			b.ReportMetric(median(ours)/median(reference), "ratio")
		})
	}
}

// withGuard puts a guard behind a backend, as the daemon does, and has the worker ask it what it has seen. It fails where
// there is no eBPF.
func withGuard(tb testing.TB, inst sa.Installer) (sa.Installer, func(*proxy.Config), error) {
	tb.Helper()
	cfg := config.Example()
	cfg.Gm.Addresses = []netip.Addr{netip.MustParseAddr("127.0.0.1")}
	gc := guardConfig(cfg, false, false, slog.New(slog.DiscardHandler))
	gc.Pin = ""
	g, err := guard.Open(gc)
	if err != nil {
		return nil, nil, err
	}
	f := &filter{Guard: g, mode: config.GuardAuto, log: gc.Logger}
	tb.Cleanup(func() {
		if err := f.release(false); err != nil {
			tb.Error(err)
		}
	})
	return f.behind(inst), func(c *proxy.Config) { c.Witness = f.witness() }, nil
}

// BenchmarkRegistrationGuard measures what the guard adds to the CPU time and the allocations of a whole registration: the
// same with and without, taken in turn.
func BenchmarkRegistrationGuard(b *testing.B) {
	for _, tt := range []struct {
		name    string
		backend func(*testing.B) sa.Installer
	}{
		{"worker", func(b *testing.B) sa.Installer { return newAcker(b) }},
		{"userspace", userspaceBackend},
	} {
		b.Run(tt.name, func(b *testing.B) {
			const rounds, size = 25, 200
			plain := newPopulation(b, tt.backend(b), benchCore, nil)
			inst, witnessed, err := withGuard(b, tt.backend(b))
			if err != nil {
				b.Skipf("no guard here: %v", err)
			}
			guarded := newPopulation(b, inst, benchCore, func(_ *population, c *proxy.Config) { witnessed(c) })
			both := [2]*population{plain, guarded}
			for _, p := range both {
				p.batch(size) // warm up
				p.pass(time.Second)
				p.allocs = 0
			}
			n := max(b.N/rounds, size)
			var cost [2][]float64
			var done [2]int
			b.ResetTimer()
			for range rounds {
				for i, p := range both {
					var cpu time.Duration
					began := done[i]
					for done[i]-began < n {
						cpu += p.batch(size)
						p.pass(time.Second)
						done[i] += size
					}
					cost[i] = append(cost[i], float64(cpu.Nanoseconds())/float64(done[i]-began))
				}
			}
			b.StopTimer()
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(median(cost[0]), "CPU-ns-without")
			b.ReportMetric(median(cost[1]), "CPU-ns-with")
			b.ReportMetric(median(cost[1])/median(cost[0]), "ratio")
			b.ReportMetric(float64(plain.allocs)/float64(done[0]), "allocs-without")
			b.ReportMetric(float64(guarded.allocs)/float64(done[1]), "allocs-with")
		})
	}
}

// conversation returns the four messages of one registration as gmgate receives them.
func (p *population) conversation() []string {
	sm1 := p.register(0, "")
	sm7 := p.register(0, "ipsec-3gpp;q=0.9;alg=hmac-sha-1-96;ealg=aes-cbc;prot=esp;mod=trans;spi-c=1;spi-s=2;port-c=6110;port-s=6100")
	return []string{
		string(sm1), string(p.answer(sm1, "401 Unauthorized", benchChallenge)),
		string(sm7), string(p.answer(sm7, "200 OK", p.granted(0))),
	}
}

func parseAndPrint(b *testing.B, messages []string) {
	for _, m := range messages {
		msg, err := sip.ParseMessage([]byte(m))
		if err != nil {
			b.Fatal(err)
		}
		if len(msg.String()) == 0 {
			b.Fatal("nothing printed")
		}
	}
}

// BenchmarkHeapPerUE measures the Go heap of a registered UE in the worker: at once, while the transactions are kept for
// retransmissions, and after their time, when they have registered at the pace of one a second. "whole" counts what else
// is kept of it: its subscription to the registration state, and what store and reconciler note. "guarded" is that with what
// the guard keeps beside its maps in the kernel.
func BenchmarkHeapPerUE(b *testing.B) {
	const phones = 5000
	heap := func() float64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc)
	}
	measure := func(unit string, inst sa.Installer, change func(*population, *proxy.Config), register func(*population)) {
		p := newPopulation(b, inst, benchCore, change)
		p.batch(1) // what the first one makes for all
		p.pass(time.Second)
		p.flush()
		p.eg.sent, p.eg.ends = nil, nil
		before := heap()
		register(p)
		p.flush()
		p.eg.sent, p.eg.ends = nil, nil
		b.ReportMetric((heap()-before)/phones, unit)
		if n := p.w.Table().UEs(); n != phones+1 {
			b.Fatalf("%d phones are registered", n)
		}
	}
	slowly := func(p *population) {
		for range phones / 100 { // one a second or so
			p.batch(100)
			p.pass(2 * time.Minute)
		}
		p.pass(time.Minute)
	}
	for b.Loop() {
		measure("B/UE-at-once", newAcker(b), nil, func(p *population) { p.grow(phones+1, true) })
		measure("B/UE", newAcker(b), nil, slowly)
		measure("B/UE-whole", newAcker(b), whole(b), slowly)
		if inst, witnessed, err := withGuard(b, newAcker(b)); err != nil {
			b.Logf("no guard here: %v", err)
		} else {
			measure("B/UE-guarded", inst, func(p *population, c *proxy.Config) { whole(b)(p, c); witnessed(c) }, slowly)
		}
	}
	b.ReportMetric(0, "ns/op")
}

// The populations that BenchmarkManyUEs compares.
const few, many = 1_000, 100_000

// BenchmarkManyUEs compares what a protected request of a random phone costs with 100,000 registered phones in the process
// and with 1,000: in the worker alone, and with the sockets. Taken in turn in one run.
func BenchmarkManyUEs(b *testing.B) {
	back := newAcker(b)
	small, large := newPopulation(b, back, benchCore, nil), newPopulation(b, back, benchCore, nil)
	small.grow(few, false)
	large.grow(many, false)
	b.Run("worker", func(b *testing.B) {
		const rounds, least = 9, 20_000
		msg := []byte(benchMessage())
		n := max(b.N/rounds, least)
		var cost [2][]float64
		b.ResetTimer()
		for range rounds {
			for i, p := range []*population{small, large} {
				rnd := uint32(1)
				began := cpuTime(b)
				for range n {
					rnd = rnd*1664525 + 1013904223
					p.eg.reset()
					p.w.Message(p.flow(int(uint64(rnd)*uint64(p.first)>>32), ims.GmProtected), msg)
				}
				cost[i] = append(cost[i], float64((cpuTime(b)-began).Nanoseconds())/float64(n))
				if len(p.eg.ends) != 1 {
					b.Fatalf("the message was not forwarded: %s", p.eg.sent)
				}
			}
		}
		b.StopTimer()
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(median(cost[0]), "CPU-ns/msg-1k")
		b.ReportMetric(median(cost[1]), "CPU-ns/msg-100k")
		b.ReportMetric(median(cost[1])/median(cost[0]), "ratio")
	})
	b.Run("sockets", func(b *testing.B) {
		design := func(name string, p *population) frontbench.Design {
			return frontbench.Front(name, ims.GmProtected, func(sink netip.AddrPort) front.Handler {
				return &crowd{population: p, sink: sink}
			})
		}
		frontbench.Compare(b, [][]byte{[]byte(benchMessage())}, design("1k", small), design("100k", large))
	})
}

// crowd is a population on a real event loop: every datagram is taken to come from a random phone.
type crowd struct {
	*population
	*proxy.Worker
	sink netip.AddrPort
	rnd  uint32
}

// Boot puts the population on the loop; its requests go to the sink from now on.
func (c *crowd) Boot(w *front.Worker) {
	c.Worker = c.w
	c.eg.Worker = w
	c.w.Table().Each(func(u *registrar.UE) bool {
		u.NextHop = ims.Hop{Addr: c.sink, Transport: ims.UDP}
		return true
	})
}

// Tick is not passed on: the clock of the population stands.
func (c *crowd) Tick(time.Time) time.Duration { return 0 }

// Message handles a datagram as if it had come from one of the phones.
func (c *crowd) Message(f ims.Flow, msg []byte) {
	c.eg.from = f.Local
	c.rnd = c.rnd*1664525 + 1013904223
	c.w.Message(c.flow(int(uint64(c.rnd)*uint64(c.first)>>32), ims.GmProtected), msg)
}
