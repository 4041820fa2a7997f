package xfrm

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// patience bounds every wait for a packet that has to come.
const patience = 10 * time.Second

// field is two hosts joined by a veth pair: ours with a Backend, and one where all phones live.
//
//	gm (gm0: gm4, gm6) ──── (ue0: ueAddr(0…3)) ue
type field struct {
	gm, ue *hostnet.NS
	b      *Backend
}

func newField(t *testing.T) *field {
	t.Helper()
	needESP(t)
	f := &field{gm: newNS(t, "gm"), ue: newNS(t, "ue")}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(f.gm.Veth("gm0", f.ue, "ue0"))
	must(f.gm.AddAddr("gm0", netip.PrefixFrom(gm4, 16)))
	must(f.gm.AddAddr("gm0", netip.PrefixFrom(gm6, 64)))
	for i := range 4 {
		must(f.ue.AddAddr("ue0", netip.PrefixFrom(ueAddr(i, false), 16)))
		must(f.ue.AddAddr("ue0", netip.PrefixFrom(ueAddr(i, true), 64)))
	}
	f.b = newGuest(t, f.gm)
	return f
}

// unguard ends the backend and leaves SAs and policies as they are: whoever removes a policy now has removed it.
func (f *field) unguard(t *testing.T) {
	t.Helper()
	if err := f.b.Detach(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ipBatch(t, f.gm, "xfrm state flush") })
}

// addUE installs a set on our side and configures the phone's side with iproute2.
func (f *field) addUE(t *testing.T, p sa.Params) {
	t.Helper()
	if err := install(t, f.b, p); err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, s := range p.SAs() {
		reqid := int(p.ID&0xff)*4 + int(s.Dir)
		dir := map[sa.Direction]string{sa.In: "out", sa.Out: "in"}[s.Dir] // seen from the phone
		lines = append(lines, stateLine(s, p.Keys, reqid), policyLine(s, dir, reqid))
	}
	ipBatch(t, f.ue, lines...)
}

func stateLine(s sa.SA, k ims.ESPKeys, reqid int) string {
	text := func(parts ...[]byte) string { return "0x" + hex.EncodeToString(slices.Concat(parts...)) }
	var algs string
	switch {
	case k.Suite.Enc == ims.EncAESGCM:
		algs = "aead rfc4106(gcm(aes)) " + text(k.Enc, k.Salt[:]) + " 128"
	case k.Suite.Alg == ims.AlgAESGMAC:
		algs = "aead rfc4543(gcm(aes)) " + text(k.Auth, k.Salt[:]) + " 128"
	default:
		auth := map[ims.Alg]string{ims.AlgHMACMD5: "hmac(md5)", ims.AlgHMACSHA1: "hmac(sha1)"}[k.Suite.Alg]
		enc := map[ims.EncAlg]string{
			ims.EncNull: "ecb(cipher_null)", ims.EncAESCBC: "cbc(aes)", ims.EncDESEDE3CBC: "cbc(des3_ede)",
		}[k.Suite.Enc]
		key := `""` // for null encryption
		if len(k.Enc) > 0 {
			key = text(k.Enc)
		}
		algs = fmt.Sprintf("auth-trunc %s %s 96 enc %s %s", auth, text(k.Auth), enc, key)
	}
	return fmt.Sprintf("xfrm state add src %s dst %s proto esp spi %#x mode transport reqid %d replay-window 32 %s sel src %s dst %s sport %d dport %d",
		s.Src.Addr(), s.Dst.Addr(), uint32(s.SPI), reqid, algs, s.Src.Addr(), s.Dst.Addr(), s.Src.Port(), s.Dst.Port())
}

func policyLine(s sa.SA, dir string, reqid int) string {
	return fmt.Sprintf("xfrm policy add dir %s src %s dst %s sport %d dport %d tmpl src %s dst %s proto esp mode transport reqid %d",
		dir, s.Src.Addr(), s.Dst.Addr(), s.Src.Port(), s.Dst.Port(), s.Src.Addr(), s.Dst.Addr(), reqid)
}

// control sets options on a socket before it is bound.
type control func(fd int) error

func (c control) config() net.ListenConfig {
	return net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) (err error) {
		if c == nil {
			return nil
		}
		if e := rc.Control(func(fd uintptr) { err = c(int(fd)) }); e != nil {
			return e
		}
		return err
	}}
}

// udp opens a UDP socket in a namespace.
func udp(t *testing.T, ns *hostnet.NS, local netip.AddrPort, c control) *net.UDPConn {
	t.Helper()
	var pc net.PacketConn
	err := ns.Do(func() (err error) {
		lc := c.config()
		pc, err = lc.ListenPacket(context.Background(), "udp", local.String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = pc.Close() })
	return pc.(*net.UDPConn)
}

func send(t *testing.T, c *net.UDPConn, to netip.AddrPort, text string) {
	t.Helper()
	if _, err := c.WriteToUDPAddrPort([]byte(text), to); err != nil {
		t.Fatalf("send to %s: %v", to, err)
	}
}

// receive reads one datagram and compares all of it.
func receive(t *testing.T, c *net.UDPConn, from netip.AddrPort, want string) (oob []byte) {
	t.Helper()
	b, control := make([]byte, 3000), make([]byte, 200)
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	n, on, _, src, err := c.ReadMsgUDPAddrPort(b, control)
	if err != nil {
		t.Fatalf("waiting for %q: %v", want, err)
	}
	if got := string(b[:n]); got != want || netip.AddrPortFrom(src.Addr().Unmap(), src.Port()) != from {
		t.Fatalf("received %q from %s, want %q from %s", got, src, want, from)
	}
	return control[:on]
}

// silent verifies that a socket has nothing to read, after everything sent before has surely arrived.
func silent(t *testing.T, c *net.UDPConn) {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 3000)
	if n, from, err := c.ReadFromUDPAddrPort(b); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("received %q from %s, %v; want nothing", b[:max(n, 0)], from, err)
	}
}

// counter runs f and verifies that one of the kernel's XFRM counters of our side rises by n or more.
func (f *field) counter(t *testing.T, name string, n uint64, run func()) {
	t.Helper()
	before, err := f.b.Statistics()
	if err != nil {
		t.Fatal(err)
	}
	run()
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		after, err := f.b.Statistics()
		if err != nil {
			t.Fatal(err)
		}
		if after[name] >= before[name]+n {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s rose by %d, want %d; counters %v", name, after[name]-before[name], n, after)
		}
	}
}

// capture counts the packets on our link.
type capture struct {
	fd   int
	done chan struct{}

	mu   sync.Mutex
	seen map[string]int // "in esp", "out clear", …
}

// newCapture starts to capture in the gm namespace. Clear means UDP or TCP of a protected port outside ESP, secret any
// packet that shows the secret.
func newCapture(t *testing.T, f *field) *capture {
	t.Helper()
	c := &capture{done: make(chan struct{}), seen: map[string]int{}}
	err := f.gm.Do(func() error {
		link, err := net.InterfaceByName("gm0")
		if err != nil {
			return err
		}
		proto := nl.Swap16(unix.ETH_P_ALL)
		if c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(proto)); err != nil {
			return err
		}
		tv := unix.NsecToTimeval(int64(100 * time.Millisecond))
		return errors.Join(unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
			unix.Bind(c.fd, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: link.Index}))
	})
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	t.Cleanup(func() { close(stop); <-c.done; _ = unix.Close(c.fd) })
	go func() {
		defer close(c.done)
		b := make([]byte, 70000)
		for {
			n, from, err := unix.Recvfrom(c.fd, b, 0)
			if err == nil {
				dir := "in"
				if l, ok := from.(*unix.SockaddrLinklayer); ok && l.Pkttype == unix.PACKET_OUTGOING {
					dir = "out"
				}
				c.mu.Lock()
				c.seen[dir+" "+kindOf(b[:n])]++
				c.mu.Unlock()
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	}()
	return c
}

// secret is what must not leave in clear, in whatever packet.
const secret = "SIP in confidence"

func kindOf(b []byte) string {
	if strings.Contains(string(b), secret) {
		return "secret"
	}
	var proto byte
	var payload []byte
	switch {
	case len(b) >= 40 && b[0]>>4 == 6:
		proto, payload = b[6], b[40:]
	case len(b) >= 20 && b[0]>>4 == 4:
		proto, payload = b[9], b[min(int(b[0]&15)*4, len(b)):]
	}
	switch {
	case proto == unix.IPPROTO_ESP:
		return "esp"
	case (proto == unix.IPPROTO_UDP || proto == unix.IPPROTO_TCP) && len(payload) >= 4:
		protected := []uint16{serverPS, clientPC, otherPC}
		if slices.Contains(protected, binary.BigEndian.Uint16(payload)) || slices.Contains(protected, binary.BigEndian.Uint16(payload[2:])) {
			return "clear"
		}
		return "unprotected"
	}
	return "other"
}

func (c *capture) count(kind string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.seen[kind]
}

// await waits until the capture has seen something n times.
func (c *capture) await(t *testing.T, kind string, n int) {
	t.Helper()
	for deadline := time.Now().Add(patience); c.count(kind) < n; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("captured %d packets %q, want %d", c.count(kind), kind, n)
		}
	}
}

// bypass lets a socket of the phone's side send in clear although its host has policies for the tuple.
func bypass(fd int) error {
	fam, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return err
	}
	for _, dir := range []uint8{dirIn, dirOut} {
		p := nl.XfrmUserpolicyInfo{Sel: nl.XfrmSelector{Family: uint16(fam)}, Dir: dir, Action: actionAllow}
		p.Lft.SoftByteLimit, p.Lft.HardByteLimit = nl.XFRM_INF, nl.XFRM_INF
		p.Lft.SoftPacketLimit, p.Lft.HardPacketLimit = nl.XFRM_INF, nl.XFRM_INF
		level, name := unix.IPPROTO_IP, unix.IP_XFRM_POLICY
		if fam == unix.AF_INET6 {
			level, name = unix.IPPROTO_IPV6, unix.IPV6_XFRM_POLICY
		}
		if err := unix.SetsockoptString(fd, level, name, string(p.Serialize())); err != nil {
			return err
		}
	}
	return nil
}

func reuse(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) }

// tuple holds the four protected ends of a set.
type tuple struct{ uc, us, pc, ps netip.AddrPort }

func tupleOf(p sa.Params) tuple {
	s := p.SAs()
	return tuple{uc: s[0].Src, us: s[1].Src, pc: s[1].Dst, ps: s[0].Dst}
}

// exchange sends one datagram each way over a set (TS 33.203 §7.1: client port to server port).
func (f *field) exchange(t *testing.T, p sa.Params, text string) {
	t.Helper()
	e := tupleOf(p)
	ps := udp(t, f.gm, e.ps, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVMARK, 1) })
	pc := udp(t, f.gm, e.pc, nil)
	uc, us := udp(t, f.ue, e.uc, nil), udp(t, f.ue, e.us, nil)
	defer func() { _ = errors.Join(ps.Close(), pc.Close(), uc.Close(), us.Close()) }()
	send(t, uc, e.ps, text+" up")
	oob := receive(t, ps, e.uc, text+" up")
	if got := markOf(t, oob); got != p.Label {
		t.Errorf("mark of the decrypted packet is %d, want %d", got, p.Label)
	}
	send(t, pc, e.us, text+" down")
	receive(t, us, e.pc, text+" down")
}

func markOf(t *testing.T, oob []byte) uint32 {
	t.Helper()
	list, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range list {
		if m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SO_MARK {
			return binary.NativeEndian.Uint32(m.Data)
		}
	}
	return 0
}

func families(t *testing.T, f func(t *testing.T, v6 bool)) {
	t.Helper()
	t.Run("IPv4", func(t *testing.T) { f(t, false) })
	t.Run("IPv6", func(t *testing.T) { f(t, true) })
}

// TestTrafficSuites carries UDP both ways through every pair and sees nothing but ESP on the wire.
//
// Peers: A1.29a, A4.08
func TestTrafficSuites(t *testing.T) {
	f := newField(t)
	c := newCapture(t, f)
	families(t, func(t *testing.T, v6 bool) {
		for i, suite := range ims.Suites() {
			t.Run(suite.String(), func(t *testing.T) {
				p := testSet(1, v6, suite)
				p.ID += uint64(i) << 40
				p.SPIs.PC, p.SPIs.PS = ims.SPI(0x30000+2*i), ims.SPI(0x30001+2*i)
				f.addUE(t, p)
				in, out := c.count("in esp"), c.count("out esp")
				f.exchange(t, p, suite.String())
				c.await(t, "in esp", in+1)
				c.await(t, "out esp", out+1)
				if err := remove(t, f.b, p); err != nil {
					t.Error(err)
				}
				ipBatch(t, f.ue, "xfrm state flush", "xfrm policy flush")
			})
		}
	})
	if c.count("in clear")+c.count("out clear") != 0 {
		t.Errorf("clear packets of protected ports on the wire: %v", c.seen)
	}
}

// TestTrafficTCP opens connections from both ends over one set and carries data both ways.
//
// Peers: A1.07, A4.02, C2.16
func TestTrafficTCP(t *testing.T) {
	f := newField(t)
	c := newCapture(t, f)
	families(t, func(t *testing.T, v6 bool) {
		p := testSet(0, v6, ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC})
		f.addUE(t, p)
		e := tupleOf(p)
		f.echo(t, f.ue, e.uc, f.gm, e.ps)
		f.echo(t, f.gm, e.pc, f.ue, e.us)
		f.exchange(t, p, "UDP beside TCP")
	})
	c.await(t, "in esp", 10)
	if c.count("in clear")+c.count("out clear") != 0 {
		t.Errorf("clear packets of protected ports on the wire: %v", c.seen)
	}
}

// echo connects from one end to the other and sends 100 kB there and back.
func (f *field) echo(t *testing.T, fromNS *hostnet.NS, from netip.AddrPort, toNS *hostnet.NS, to netip.AddrPort) {
	t.Helper()
	l := listen(t, toNS, to)
	defer func() { _ = l.Close() }()
	served := make(chan error, 1)
	go func() {
		s, err := l.Accept()
		if err == nil {
			_, err = io.Copy(s, s)
			err = errors.Join(err, s.Close())
		}
		served <- err
	}()
	conn, err := dial(fromNS, from, to, patience, reuse)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(3 * patience)); err != nil {
		t.Fatal(err)
	}
	data := strings.Repeat("0123456789abcdef", 6400)
	written := make(chan error, 1)
	go func() {
		_, err := io.WriteString(conn, data)
		written <- errors.Join(err, conn.(*net.TCPConn).CloseWrite())
	}()
	back, err := io.ReadAll(conn)
	if err = errors.Join(err, <-written, <-served); err != nil || string(back) != data {
		t.Errorf("%s to %s: %d of %d octets came back, %v", from, to, len(back), len(data), err)
	}
}

func listen(t *testing.T, ns *hostnet.NS, at netip.AddrPort) net.Listener {
	t.Helper()
	var l net.Listener
	err := ns.Do(func() (err error) {
		lc := control(nil).config()
		lc.SetMultipathTCP(false)
		l, err = lc.Listen(context.Background(), "tcp", at.String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func dial(ns *hostnet.NS, from, to netip.AddrPort, timeout time.Duration, c control) (conn net.Conn, err error) {
	e := ns.Do(func() error {
		d := net.Dialer{Timeout: timeout, LocalAddr: net.TCPAddrFromAddrPort(from), Control: c.config().Control}
		d.SetMultipathTCP(false)
		conn, err = d.Dial("tcp", to.String())
		return nil
	})
	return conn, errors.Join(e, err)
}

// TestTrafficClear: clear packets to protected ports die, from strangers and from the very tuple of an SA, over UDP and
// TCP, to every protected port; the SA beside them keeps working.
//
// Peers: A1.08c, B2.14
func TestTrafficClear(t *testing.T) {
	f := newField(t)
	c := newCapture(t, f)
	families(t, func(t *testing.T, v6 bool) {
		p := testSet(0, v6, gcm)
		f.addUE(t, p)
		e := tupleOf(p)
		stranger := netip.AddrPortFrom(ueAddr(3, v6), 7777)
		open := netip.AddrPortFrom(p.Local, 5060)

		// The unprotected port next to it is open: the path works and the policies do not reach too far.
		clear5060, phone := udp(t, f.gm, open, nil), udp(t, f.ue, stranger, nil)
		send(t, phone, open, "REGISTER")
		receive(t, clear5060, stranger, "REGISTER")
		send(t, clear5060, stranger, "401")
		receive(t, phone, open, "401")

		for _, port := range []uint16{serverPS, clientPC, otherPC} {
			to := netip.AddrPortFrom(p.Local, port)
			victim := udp(t, f.gm, to, nil)
			for _, from := range []netip.AddrPort{stranger, e.uc, e.us, netip.AddrPortFrom(p.UE, 5060)} {
				sender := phone
				if from != stranger {
					sender = udp(t, f.ue, from, bypass)
				}
				in := c.count("in clear")
				f.counter(t, "XfrmInTmplMismatch", 1, func() { send(t, sender, to, "clear") })
				c.await(t, "in clear", in+1) // it really was on the wire
				if sender != phone {
					_ = sender.Close()
				}
			}
			silent(t, victim)
			_ = victim.Close()
		}

		l := listen(t, f.gm, e.ps)
		defer func() { _ = l.Close() }()
		for _, from := range []netip.AddrPort{netip.AddrPortFrom(stranger.Addr(), 0), e.uc} {
			var netErr net.Error
			conn, err := dial(f.ue, from, e.ps, 1500*time.Millisecond, func(fd int) error { return errors.Join(reuse(fd), bypass(fd)) })
			if err == nil {
				_ = conn.Close()
				t.Errorf("clear connection from %s accepted", from)
			} else if !errors.As(err, &netErr) || !netErr.Timeout() {
				t.Errorf("clear connection from %s: %v, want a timeout", from, err)
			}
		}
		f.exchange(t, p, "after all that")
	})
	if c.count("out clear") != 0 {
		t.Errorf("clear packets left from protected ports: %v", c.seen)
	}
	if c.count("out unprotected") == 0 {
		t.Error("the capture does not see what leaves")
	}
}

// TestTrafficForeignSource: a phone cannot use its SA with the address or port of another (TS 33.203 §7.1).
func TestTrafficForeignSource(t *testing.T) {
	f := newField(t)
	families(t, func(t *testing.T, v6 bool) {
		p0, p1 := testSet(0, v6, gcm), testSet(1, v6, gcm)
		if err := errors.Join(install(t, f.b, p0), install(t, f.b, p1)); err != nil {
			t.Fatal(err)
		}
		e0, e1 := tupleOf(p0), tupleOf(p1)
		ps := udp(t, f.gm, e0.ps, nil)
		otherPort := netip.AddrPortFrom(p0.UE, 7777)
		for i, from := range []netip.AddrPort{e1.uc, otherPort} {
			// Each attempt goes on with the sequence numbers of the one before: this is not about replay.
			ipBatch(t, f.ue, "xfrm state flush", "xfrm policy flush",
				stateLine(sa.SA{SPI: p0.SPIs.PS, Src: from, Dst: e0.ps}, p0.Keys, 66)+fmt.Sprintf(" replay-oseq %d", 10*i),
				policyLine(sa.SA{Src: from, Dst: e0.ps}, "out", 66))
			sender := udp(t, f.ue, from, nil)
			f.counter(t, "XfrmInStateMismatch", 1, func() { send(t, sender, e0.ps, "I am somebody else") })
			_ = sender.Close()
		}
		silent(t, ps)
		_ = ps.Close()

		// The same keys and SPI from the right address work: it was the selector.
		ipBatch(t, f.ue, "xfrm state flush", "xfrm policy flush")
		var lines []string
		for _, s := range p0.SAs() {
			dir := map[sa.Direction]string{sa.In: "out", sa.Out: "in"}[s.Dir]
			line := stateLine(s, p0.Keys, 70+int(s.Dir))
			if s.Dir == sa.In {
				line += " replay-oseq 20"
			}
			lines = append(lines, line, policyLine(s, dir, 70+int(s.Dir)))
		}
		ipBatch(t, f.ue, lines...)
		f.exchange(t, p0, "myself")
		ipBatch(t, f.ue, "xfrm state flush", "xfrm policy flush")
	})
}

// TestTrafficNoSA: without SA nothing leaves a protected port, neither before Install nor after Remove, and ESP for
// removed SAs is not delivered.
//
// Peers: B2.15
func TestTrafficNoSA(t *testing.T) {
	f := newField(t)
	c := newCapture(t, f)
	families(t, func(t *testing.T, v6 bool) {
		p := testSet(0, v6, gcm)
		e := tupleOf(p)
		nothing := func() {
			t.Helper()
			for _, from := range []netip.AddrPort{e.pc, e.ps, netip.AddrPortFrom(p.Local, otherPC)} {
				s := udp(t, f.gm, from, nil)
				for _, to := range []netip.AddrPort{e.us, e.uc, netip.AddrPortFrom(p.UE, 5060)} {
					f.counter(t, "XfrmOutNoStates", 1, func() {
						// Success or not depends on the kernel; that nothing leaves does not.
						_, _ = s.WriteToUDPAddrPort([]byte("nobody can read this"), to)
					})
				}
				_ = s.Close()
				if conn, err := dial(f.gm, from, e.us, 500*time.Millisecond, reuse); err == nil {
					_ = conn.Close()
					t.Errorf("connection from %s without SA", from)
				}
			}
		}
		nothing()
		f.addUE(t, p)
		f.exchange(t, p, "now")
		if err := remove(t, f.b, p); err != nil {
			t.Fatal(err)
		}
		ps, uc := udp(t, f.gm, e.ps, nil), udp(t, f.ue, e.uc, nil)
		f.counter(t, "XfrmInNoStates", 1, func() { send(t, uc, e.ps, "too late") })
		silent(t, ps)
		_ = errors.Join(ps.Close(), uc.Close())
		nothing()
		wantStates(t, f.b, 0)
	})
	if c.count("out clear") != 0 || c.count("out esp") == 0 {
		t.Errorf("captured %v, want ESP and nothing in clear", c.seen)
	}
}

// TestTrafficExtend: extending a set changes neither keys nor sequence numbers.
func TestTrafficExtend(t *testing.T) {
	f := newField(t)
	families(t, func(t *testing.T, v6 bool) {
		for i, suite := range []ims.Suite{gcm, {Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC}} {
			p := testSet(i, v6, suite)
			p.Hard = 3 * time.Second
			f.addUE(t, p)
			f.exchange(t, p, "before")
			if err := wait(t, func(done func(error)) { f.b.Extend(p, 4*time.Minute, done) }); err != nil {
				t.Fatal(err)
			}
			time.Sleep(4 * time.Second)
			f.exchange(t, p, "after the first limit")
		}
	})
	if s, err := f.b.Statistics(); err != nil || s["XfrmInStateSeqError"]+s["XfrmInStateProtoError"] != 0 {
		t.Errorf("counters %v, %v", s, err)
	}
}

// TestTrafficUnreachable: a decrypted datagram for which no socket is there, as after a crash, is not sent back in clear
// inside an ICMP error.
func TestTrafficUnreachable(t *testing.T) {
	families(t, func(t *testing.T, v6 bool) {
		f := newField(t)
		p := testSet(0, v6, ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC})
		f.addUE(t, p)
		c := newCapture(t, f)
		e := tupleOf(p)
		uc := udp(t, f.ue, e.uc, nil)
		for range 2 {
			f.counter(t, "XfrmOutPolBlock", 1, func() { send(t, uc, e.ps, secret) })
			time.Sleep(1200 * time.Millisecond) // the kernel sends one ICMP error per second and peer
		}
		if c.count("in esp") < 2 || c.count("out secret") != 0 {
			t.Errorf("captured %v, want ESP in and no secret out", c.seen)
		}
		_ = uc.Close()
		f.exchange(t, p, "the ports with sockets work")
		uc = udp(t, f.ue, e.uc, nil)

		// Without the policies it happens: the test is worth something.
		time.Sleep(1200 * time.Millisecond)
		f.unguard(t)
		ipBatch(t, f.gm, "xfrm policy deleteall dir out")
		send(t, uc, e.ps, secret)
		c.await(t, "out secret", 1)
	})
}

// TestTrafficOrphan: data of a TCP connection that the kernel still has to deliver when its process is gone does not
// leave in clear, neither after Close nor when the daemon is back.
func TestTrafficOrphan(t *testing.T) {
	families(t, func(t *testing.T, v6 bool) {
		f := newField(t)
		f.b.cfg.block = time.Minute
		p := testSet(0, v6, ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC})
		f.addUE(t, p)
		c := newCapture(t, f)
		e := tupleOf(p)
		l := listen(t, f.gm, e.ps)
		defer func() { _ = l.Close() }()
		conn, err := dial(f.ue, e.uc, e.ps, patience, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		ipBatch(t, f.ue, "xfrm state deleteall") // the phone is out of reach
		if _, err := io.WriteString(s, secret); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(s.Close(), l.Close()); err != nil {
			t.Fatal(err)
		}
		f.counter(t, "XfrmOutPolBlock", 2, func() {
			if err := f.b.Close(); err != nil {
				t.Fatal(err)
			}
		})
		var b *Backend
		f.counter(t, "XfrmOutNoStates", 1, func() { b = newGuest(t, f.gm) })
		if c.count("out secret") != 0 {
			t.Errorf("captured %v, want no secret out", c.seen)
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}

		// Without the policies the connection is still at it: the test is worth something.
		ipBatch(t, f.gm, "xfrm policy flush")
		c.await(t, "out secret", 1)
	})
}

// TestTrafficRestart: what Close leaves drops everything and ends by itself, unless a new start makes it permanent.
func TestTrafficRestart(t *testing.T) {
	f := newField(t)
	c := newCapture(t, f)
	whole := t // the backend of one subtest serves the next
	families(t, func(t *testing.T, v6 bool) {
		p := testSet(0, v6, gcm)
		f.addUE(t, p)
		f.exchange(t, p, "before")
		if err := f.b.Close(); err != nil {
			t.Fatal(err)
		}
		k := testConn(t, f.gm)
		if n, err := k.countPolicies(); err != nil || n != policiesOf {
			t.Errorf("%d policies after Close, %v; want %d", n, err, policiesOf)
		}
		shown := ipShow(t, f.gm, "-s", "xfrm", "policy")
		if strings.Contains(shown, "tmpl") || strings.Count(shown, "expire add: soft 0(sec), hard 2(sec)") != policiesOf {
			t.Errorf("after Close want %d expiring policies without template:\n%s", policiesOf, shown)
		}
		f.b = newGuest(whole, f.gm)
		time.Sleep(2 * testBlock)
		if n, err := k.countPolicies(); err != nil || n != policiesOf {
			t.Errorf("%d policies after the restart, %v; want %d", n, err, policiesOf)
		}
		shown = ipShow(t, f.gm, "-s", "xfrm", "policy")
		if n := strings.Count(shown, "expire add: soft 0(sec), hard 864000(sec)"); n != policiesOf {
			t.Errorf("%d of %d policies last ten days after the restart:\n%s", n, policiesOf, shown)
		}
		ipBatch(t, f.ue, "xfrm state flush", "xfrm policy flush")
		f.addUE(t, p)
		f.exchange(t, p, "after")
	})

	// And a stop for good: both directions are dead, then everything is gone.
	f.b.cfg.block = 4 * time.Second
	victim := udp(t, f.gm, netip.AddrPortFrom(gm4, serverPS), nil)
	phone := udp(t, f.ue, netip.AddrPortFrom(ueAddr(3, false), 7777), nil)
	if err := f.b.Close(); err != nil {
		t.Fatal(err)
	}
	f.counter(t, "XfrmInPolBlock", 1, func() { send(t, phone, netip.AddrPortFrom(gm4, serverPS), "clear") })
	f.counter(t, "XfrmOutPolBlock", 1, func() {
		_, _ = victim.WriteToUDPAddrPort([]byte("clear"), netip.AddrPortFrom(ueAddr(3, false), 7777))
	})
	if c.count("out clear") != 0 {
		t.Errorf("captured %v, want nothing out in clear", c.seen)
	}
	awaitPolicies(t, testConn(t, f.gm), 0)
}

// TestTrafficForward: packets which the host only forwards cannot use a phone's SA by bearing our address as source.
func TestTrafficForward(t *testing.T) {
	f := newField(t)
	core := newNS(t, "core")
	p := testSet(0, true, gcm)
	f.addUE(t, p)
	e := tupleOf(p)
	gmCore, coreGM := netip.MustParsePrefix("2001:db8:1::5/64"), netip.MustParsePrefix("2001:db8:1::9/64")
	err := errors.Join(
		f.gm.Veth("core0", core, "gm1"), f.gm.AddAddr("core0", gmCore), core.AddAddr("gm1", coreGM),
		core.AddRoute("gm1", netip.PrefixFrom(gm6, 64).Masked(), gmCore.Addr()),
		f.gm.Sysctl("ipv6.conf.all.forwarding", "1"), core.Sysctl("ipv6.ip_nonlocal_bind", "1"))
	if err != nil {
		t.Fatal(err)
	}
	us := udp(t, f.ue, e.us, nil)
	spoofer := udp(t, core, e.pc, nil) // our address, on a neighbour's host

	f.counter(t, "XfrmInPolBlock", 1, func() { send(t, spoofer, e.us, "blocked") })
	silent(t, us)

	// Without the policy the attack works: the test is worth something.
	f.unguard(t)
	ipBatch(t, f.gm, "xfrm policy deleteall dir fwd")
	send(t, spoofer, e.us, "through the phone's SA")
	receive(t, us, e.pc, "through the phone's SA")
}
