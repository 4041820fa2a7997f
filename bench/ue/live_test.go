package ue

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/bench/internal/digestaka"
	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/control/aka"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/secagree"
	"github.com/gmgate/gmgate/dataplane/esptun"
	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// network is the other end of one phone, driven step by step by the test: no proxy, just sockets and SAs.
type network struct {
	t       *testing.T
	ns      *hostnet.NS
	tunnel  *esptun.Tunnel
	clear   *net.UDPConn
	ps, pc  *net.UDPConn // protected
	sas     []esptun.SA  // of the set in use
	sqn     uint64
	pcPort  uint16
	spi     ims.SPI
	offered secagree.Offer
}

var (
	gm        = netip.MustParseAddr("10.0.0.5")
	phoneAddr = netip.MustParseAddr("10.45.0.7")
)

// live makes two namespaces with a link between them and a farm in one of them.
func live(t *testing.T, t1 time.Duration) (*Farm, *network) {
	t.Helper()
	skip := t.Skipf
	if os.Getenv("REQUIRE_KERNEL_TESTS") == "1" {
		skip = t.Fatalf
	}
	if os.Geteuid() != 0 {
		skip("network namespaces need root")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		skip("userspace ESP needs /dev/net/tun: %v", err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	space := func() *hostnet.NS {
		ns, err := hostnet.Create()
		must(err)
		t.Cleanup(func() { _ = ns.Close() })
		return ns
	}
	phones, n := space(), &network{t: t, ns: space(), pcPort: 6111, spi: 0x40000050}
	must(phones.Veth("ue0", n.ns, "gm0"))
	must(phones.AddAddr("ue0", netip.MustParsePrefix("10.0.0.1/24")))
	must(n.ns.AddAddr("gm0", netip.PrefixFrom(gm, 24)))
	must(n.ns.AddRoute("gm0", netip.MustParsePrefix("10.45.0.0/16"), netip.MustParseAddr("10.0.0.1")))
	must(phones.AddLocal(netip.MustParsePrefix("10.45.0.0/16")))
	var err error
	n.tunnel, err = esptun.Open(esptun.Config{Outer: n.ns, Local: []netip.Prefix{netip.PrefixFrom(gm, 32)}, Logger: discard()})
	must(err)
	t.Cleanup(func() { _ = n.tunnel.Close() })
	n.clear, err = sipwire.ListenUDP(n.ns, netip.AddrPortFrom(gm, 5060))
	must(err)
	t.Cleanup(func() { _ = n.clear.Close() })
	n.ps = n.hidden(6100)
	f, err := NewFarm(FarmConfig{
		NS: phones, Prefixes: []netip.Prefix{netip.MustParsePrefix("10.45.0.0/16")}, PCSCF: netip.AddrPortFrom(gm, 5060),
		T1: t1, OldSetLinger: 50 * time.Millisecond,
	})
	must(err)
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f, n
}

func (n *network) hidden(port uint16) *net.UDPConn {
	n.t.Helper()
	c, err := sipwire.ListenUDP(n.tunnel.Hidden(), netip.AddrPortFrom(gm, port))
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = c.Close() })
	return c
}

func (n *network) read(c *net.UDPConn) (*sipwire.Message, netip.AddrPort) {
	n.t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
	b, from, err := sipwire.ReadUDP(c)
	if err != nil {
		n.t.Fatalf("read from the phone: %v", err)
	}
	m, err := sipwire.Parse(b)
	if err != nil {
		n.t.Fatalf("%v in:\n%s", err, b)
	}
	if err := m.Mark(from); err != nil {
		n.t.Fatal(err)
	}
	return m, from
}

func (n *network) send(c *net.UDPConn, m *sipwire.Message, to netip.AddrPort) {
	n.t.Helper()
	if _, err := c.WriteToUDPAddrPort(m.Bytes(), to); err != nil {
		n.t.Fatal(err)
	}
}

// challenge makes the 401 and the set that goes with it; install puts the set in place.
func (n *network) challenge(m *sipwire.Message) (answer *sipwire.Message, install func()) {
	t := n.t
	t.Helper()
	id := identity()
	n.sqn += 32
	v, err := digestaka.Card{K: id.K, OPc: id.OPc}.Generate([16]byte{byte(n.sqn)}, n.sqn)
	if err != nil {
		t.Fatal(err)
	}
	list, err := secagree.Parse(m.All("Security-Client")...)
	if err != nil {
		t.Fatal(err)
	}
	if n.offered, err = secagree.Select(list, twoOffers); err != nil {
		t.Fatal(err)
	}
	keys, err := aka.Expand(n.offered.Suite, v.CK, v.IK)
	if err != nil {
		t.Fatal(err)
	}
	n.pcPort++
	n.spi += 16
	pcPort, spi, o := n.pcPort, n.spi, n.offered
	r := sipwire.Response(m, 401, "s1")
	r.Add("WWW-Authenticate", fmt.Sprintf(`Digest realm="%s",nonce="%s",algorithm=AKAv1-MD5,qop="auth"`, domain, v.Nonce()))
	r.Add("Security-Server", string(secagree.Server{SPIC: spi + 1, SPIS: spi, PortC: pcPort, PortS: 6100, Suites: []ims.Suite{o.Suite}}.Append(nil)))
	return r, func() {
		t.Helper()
		p := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(gm, port) }
		u := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(phoneAddr, port) }
		n.sas = []esptun.SA{
			{Inbound: true, SPI: spi, Src: u(o.PortC), Dst: p(6100), Keys: keys},
			{Inbound: true, SPI: spi + 1, Src: u(o.PortS), Dst: p(pcPort), Keys: keys},
			{SPI: o.SPIS, Src: p(pcPort), Dst: u(o.PortS), Keys: keys},
			{SPI: o.SPIC, Src: p(6100), Dst: u(o.PortC), Keys: keys},
		}
		if err := n.tunnel.Add(n.sas...); err != nil {
			t.Fatal(err)
		}
		n.pc = n.hidden(pcPort)
	}
}

func (n *network) accept(m *sipwire.Message) *sipwire.Message {
	r := sipwire.Response(m, 200, "s2")
	a, err := sipwire.ParseAddr(m.Get("Contact"))
	if err != nil {
		n.t.Fatal(err)
	}
	r.Add("Contact", "<"+a.URI+">;expires="+m.Get("Expires"))
	r.Add("Service-Route", "<sip:orig@10.0.1.9;lr>")
	r.Add("P-Associated-URI", "<sip:+15550100001@"+domain+">")
	return r
}

// us is where everything for the phone goes by UDP.
func (n *network) us() netip.AddrPort { return netip.AddrPortFrom(phoneAddr, n.offered.PortS) }

// begin runs an operation of the phone while the test plays the network.
func begin[T any](f func() (T, error)) func() (T, error) {
	type out struct {
		v   T
		err error
	}
	done := make(chan out, 1)
	go func() {
		v, err := f()
		done <- out{v, err}
	}()
	return func() (T, error) {
		o := <-done
		return o.v, o.err
	}
}

// register answers SM1 to SM12 by the book and returns the phone's result.
func (n *network) register(ctx context.Context, u *UE) Result {
	n.t.Helper()
	wait := begin(func() (Result, error) { return u.Register(ctx) })
	sm1, from := n.read(n.clear)
	r, install := n.challenge(sm1)
	install()
	n.send(n.clear, r, from)
	sm7, from := n.read(n.ps)
	if from.Port() != n.offered.PortC || sm7.Get("Security-Verify") != r.Get("Security-Server") ||
		sm7.Get("Security-Client") != sm1.Get("Security-Client") || sm7.Get("Call-ID") != sm1.Get("Call-ID") {
		n.t.Fatalf("SM7 from %s:\n%s", from, sm7.Bytes())
	}
	if v, _ := sm7.TopVia(); v.Port != n.offered.PortS {
		n.t.Errorf("Via of SM7 is %s, want port-us", v)
	}
	n.send(n.pc, n.accept(sm7), n.us())
	res, err := wait()
	if err != nil {
		n.t.Fatal(err)
	}
	return res
}

func liveUE(t *testing.T, f *Farm, change ...func(*Config)) *UE {
	t.Helper()
	cfg := Config{Identity: identity(), Addr: phoneAddr, Offers: twoOffers[:1], Quirks: Quirks{LargeUDP: true}}
	for _, c := range change {
		c(&cfg)
	}
	u, err := f.NewUE(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = u.Close() })
	return u
}

func wantProblem(t *testing.T, u *UE, part string) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for !strings.Contains(strings.Join(u.Problems(), "\n"), part) {
		if time.Now().After(deadline) {
			t.Fatalf("problems %q, want one with %q", u.Problems(), part)
		}
		time.Sleep(time.Millisecond) // bounded by the deadline
	}
}

// Peers: A4.17f, C2.18
func TestLiveRegister(t *testing.T) {
	f, n := live(t, 2*time.Second)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	u := liveUE(t, f, func(c *Config) { c.PortUC, c.PortUS, c.ClearPort = 6301, 6300, 5060 })
	res := n.register(ctx, u)
	if res.Suite != twoOffers[0] || res.Ports != (ims.Ports{UC: 6301, US: 6300, PC: 6112, PS: 6100}) || !res.Challenged {
		t.Fatalf("result %+v", res)
	}

	// A message both ways. The phone's answer comes from port-uc to port-ps, where the Via points.
	mt := &sipwire.Message{Method: "MESSAGE", URI: u.reg.contact, Body: []byte("hi")}
	mt.Add("Via", "SIP/2.0/UDP 10.0.0.5:6100;branch=z9hG4bKq1")
	mt.Add("From", "<sip:x@y>;tag=1")
	mt.Add("To", "<sip:z@y>")
	mt.Add("Call-ID", "m2")
	mt.Add("CSeq", "1 MESSAGE")
	mt.Add("Max-Forwards", "66")
	n.send(n.pc, mt, n.us())
	n.send(n.pc, mt, n.us()) // a retransmission is answered again, but received once
	for range 2 {
		if got, from := n.read(n.ps); got.Status != 200 || from.Port() != 6301 {
			t.Errorf("answer from %s:\n%s", from, got.Bytes())
		}
	}
	if in, err := u.WaitReceived(ctx, "MESSAGE", 1); err != nil || len(in) != 1 || in[0].Body != "hi" || in[0].Remote.Port() != 6112 {
		t.Errorf("received %+v, %v", in, err)
	}
	send := begin(func() (int, error) { return u.Message(ctx, "sip:x@y", "hello") })
	mo, _ := n.read(n.ps)
	if mo.List("Route")[0] != "<sip:10.0.0.5:6100;lr>" || mo.List("Route")[1] != "<sip:orig@10.0.1.9;lr>" || !mo.Has("Security-Verify") {
		t.Errorf("request:\n%s", mo.Bytes())
	}
	n.send(n.pc, sipwire.Response(mo, 202, "a"), n.us())
	if st, err := send(); st != 202 || err != nil {
		t.Errorf("Message = %d, %v", st, err)
	}
	if p := u.Problems(); len(p) != 0 {
		t.Errorf("problems %q", p)
	}

	// TS 33.203 §7.1: an answer from port-ps to port-uc takes an SA that exists, and is still wrong.
	short, stop := context.WithTimeout(ctx, 300*time.Millisecond)
	defer stop()
	send = begin(func() (int, error) { return u.Message(short, "sip:x@y", "hello") })
	mo, from := n.read(n.ps)
	n.send(n.ps, sipwire.Response(mo, 200, "a"), from)
	if _, err := send(); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("answer to port-uc was taken: %v", err)
	}
	wantProblem(t, u, "arrived at port-uc")

	// An answer with something that belongs into the core fails the operation.
	send = begin(func() (int, error) { return u.Message(ctx, "sip:x@y", "hello") })
	mo, _ = n.read(n.ps)
	bad := sipwire.Response(mo, 200, "a")
	bad.Add("P-Charging-Vector", "icid-value=1")
	n.send(n.pc, bad, n.us())
	var wrong *ProtocolError
	if _, err := send(); !errors.As(err, &wrong) {
		t.Errorf("P-Charging-Vector was accepted: %v", err)
	}
}

// TestLiveChallengedAgain answers SM7 with another 401: the set is replaced by one from the same Security-Client, with
// the same SPIs and ports of the phone.
func TestLiveChallengedAgain(t *testing.T) {
	f, n := live(t, 200*time.Millisecond)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	u := liveUE(t, f)
	wait := begin(func() (Result, error) { return u.Register(ctx) })
	sm1, from := n.read(n.clear)
	r, install := n.challenge(sm1)
	install()
	n.send(n.clear, r, from)
	sm7, _ := n.read(n.ps)
	first, firstPC := n.sas, n.pc
	r, install = n.challenge(sm7)
	n.send(firstPC, r, n.us())
	// Our second set cannot stand while the first one has the same addresses and ports, which the 401 needs. The phone's
	// retransmission carries its next REGISTER over the gap.
	for deadline := time.Now().Add(5 * time.Second); ; {
		if sets := u.Sets(); len(sets) == 1 && sets[0].Generation == 2 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the phone has no second set: %+v, problems %q", u.Sets(), u.Problems())
		}
		time.Sleep(time.Millisecond) // bounded by the deadline
	}
	n.tunnel.Remove(first...)
	install()
	again, _ := n.read(n.ps)
	for again.Get("CSeq") == sm7.Get("CSeq") { // retransmissions from before
		again, _ = n.read(n.ps)
	}
	if again.Get("Security-Client") != sm1.Get("Security-Client") || again.Get("Security-Verify") != r.Get("Security-Server") {
		t.Fatalf("second answer:\n%s", again.Bytes())
	}
	n.send(n.pc, n.accept(again), n.us())
	res, err := wait()
	if err != nil {
		t.Fatal(err)
	}
	if sets := u.Sets(); len(sets) != 1 || sets[0].Generation != 2 || !sets[0].Current || res.SPIs.PS != n.spi {
		t.Errorf("sets %+v, result %+v", sets, res)
	}
	if p := u.Problems(); len(p) != 0 {
		t.Errorf("problems %q", p)
	}
}

// TestLiveRefused checks what a failed registration leaves behind.
func TestLiveRefused(t *testing.T) {
	f, n := live(t, 2*time.Second)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	u := liveUE(t, f)
	for _, tc := range []struct {
		name  string
		play  func()
		check func(error) bool
	}{
		{"403 in clear", func() {
			m, from := n.read(n.clear)
			n.send(n.clear, sipwire.Response(m, 403, "x"), from)
		}, func(err error) bool {
			e, ok := errors.AsType[*StatusError](err)
			return ok && e.Status == 403 && !e.Protected
		}},
		{"200 in clear", func() {
			m, from := n.read(n.clear)
			n.send(n.clear, n.accept(m), from)
		}, func(err error) bool {
			_, ok := errors.AsType[*ProtocolError](err)
			return ok
		}},
		{"ck in the 401", func() {
			m, from := n.read(n.clear)
			r, _ := n.challenge(m)
			r.Set("WWW-Authenticate", r.Get("WWW-Authenticate")+`,ck="00"`)
			n.send(n.clear, r, from)
		}, func(err error) bool {
			e, ok := errors.AsType[*ProtocolError](err)
			return ok && strings.Contains(e.Error(), "ck or ik")
		}},
		{"403 to SM7", func() {
			m, from := n.read(n.clear)
			r, install := n.challenge(m)
			install()
			n.send(n.clear, r, from)
			m, _ = n.read(n.ps)
			n.send(n.pc, sipwire.Response(m, 403, "x"), n.us())
		}, func(err error) bool {
			e, ok := errors.AsType[*StatusError](err)
			return ok && e.Status == 403 && e.Protected
		}},
	} {
		wait := begin(func() (Result, error) { return u.Register(ctx) })
		n.t = t
		tc.play()
		if _, err := wait(); err == nil || !tc.check(err) {
			t.Errorf("%s: %v", tc.name, err)
		}
		if len(u.Sets()) != 0 || f.Tunnel().Count() != 0 {
			t.Errorf("%s: %d sets and %d SAs are left", tc.name, len(u.Sets()), f.Tunnel().Count())
		}
		n.tunnel.Remove(n.sas...)
	}
}

// TestXFRMLayer installs and removes a set with every algorithm pair in the kernel.
func TestXFRMLayer(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("REQUIRE_KERNEL_TESTS") == "1" {
			t.Fatal("network namespaces need root")
		}
		t.Skip("network namespaces need root")
	}
	ns, err := hostnet.Create()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ns.Close() }()
	l := &xfrmLayer{net: ns}
	count := func() string {
		var out []byte
		err := ns.Do(func() error {
			for _, what := range []string{"state", "policy"} {
				b, err := exec.Command("ip", "xfrm", what, "count").CombinedOutput()
				out = append(out, b...)
				if err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatalf("count: %v: %s", err, out)
		}
		return strings.Join(strings.Fields(string(out)), " ")
	}
	for _, s := range ims.Suites() {
		keys, err := aka.Expand(s, unhex(s1.ck), unhex(s1.ik))
		if err != nil {
			t.Fatal(err)
		}
		sas := sampleSAs(keys)
		if err := l.add(sas); err != nil {
			if strings.Contains(err.Error(), "not supported") || strings.Contains(err.Error(), "not found") {
				t.Skipf("this kernel has no ESP or not %s: %v", s, err)
			}
			t.Fatalf("%s: %v", s, err)
		}
		if got := count(); !strings.Contains(got, "SAD count 4") || !strings.Contains(got, "IN 2 OUT 2") {
			t.Errorf("%s: installed: %s", s, got)
		}
		if err := l.add(sas); err == nil {
			t.Errorf("%s: the same set was installed twice", s)
		}
		if got := count(); !strings.Contains(got, "SAD count 4") || !strings.Contains(got, "IN 2 OUT 2") {
			t.Errorf("%s: after the refused second time: %s", s, got)
		}
		l.remove(sas)
		if got := count(); !strings.Contains(got, "SAD count 0") || !strings.Contains(got, "IN 0 OUT 0") {
			t.Errorf("%s: removed: %s", s, got)
		}
	}
}
