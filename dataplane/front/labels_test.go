package front

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
)

// marked makes a dialer whose packets have a mark, as packets have that the kernel's ESP has verified: on loopback they
// keep it.
func marked(t *testing.T, mark int) *net.Dialer {
	t.Helper()
	return &net.Dialer{Control: func(_, _ string, rc syscall.RawConn) error {
		var err error
		if e := rc.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mark) }); e != nil {
			return e
		}
		return os.NewSyscallError("setsockopt", err)
	}}
}

// TestLabels has marked packets come in on every kind of listener.
func TestLabels(t *testing.T) {
	const n = 100 // more than a batch
	for _, addr := range []string{"10.99.0.1", "2001:db8::1"} {
		at := netip.AddrPortFrom(netip.MustParseAddr(addr), 0)
		ns := namespace(t, fmt.Sprintf("%s/%d", at.Addr(), at.Addr().BitLen()))
		if err := ns.Sysctl("ipv4.tcp_fwmark_accept", "1"); err != nil {
			t.Fatal(err)
		}
		both := func(side ims.Side, hidden bool) Listener {
			return Listener{Addr: at, Side: side, UDP: true, TCP: true, Hidden: hidden, Worker: -1}
		}
		held, hold := make(chan struct{}), make(chan struct{})
		var f *Front
		var events chan event
		if err := ns.Do(func() error {
			f, events = run(t, Config{Hidden: ns, Listeners: []Listener{
				both(ims.GmProtected, false), both(ims.GmProtected, true), both(ims.GmClear, false), both(ims.Mw, false),
			}}, recorder{})
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		// The first one again: the others have used the same buffers without labels meanwhile.
		for _, l := range append(f.Listeners(), f.Listeners()[0]) {
			labelled := l == f.Listeners()[0]
			name := fmt.Sprintf("%s listener %s, hidden: %v", l.Side, l.Addr, l.Hidden)
			if err := f.Worker(0).Post(func() { held <- struct{}{}; <-hold }); err != nil {
				t.Fatal(err)
			}
			<-held
			for k := range n {
				if err := ns.Do(func() error {
					c, err := marked(t, 0x10000+k).Dial("udp", l.Addr.String())
					if err != nil {
						return err
					}
					write(t, c, sip(fmt.Sprint(k), 0))
					return c.Close()
				}); err != nil {
					skipKernel(t, err)
				}
			}
			hold <- struct{}{}
			for k := range n {
				e := expect(t, events, "message")
				want := uint32(0)
				if labelled && k > 0 { // the first one is read by gnet
					want = uint32(0x10000 + k)
				}
				if e.msg != sip(fmt.Sprint(k), 0) || e.flow.Label != want {
					t.Fatalf("%s: datagram %d has label %#x, want %#x", name, k, e.flow.Label, want)
				}
			}
			var c net.Conn
			if err := ns.Do(func() (err error) { c, err = marked(t, 0x7fffffff).Dial("tcp", l.Addr.String()); return err }); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				write(t, c, sip("t", 0))
				e := expect(t, events, "message")
				if want := map[bool]uint32{true: 0x7fffffff}[labelled]; e.flow.Label != want {
					t.Errorf("%s: connection has label %#x, want %#x", name, e.flow.Label, want)
				}
			}
			_ = c.Close()
			expect(t, events, "closed")
		}
		if err := ns.Sysctl("ipv4.tcp_fwmark_accept", "0"); err != nil {
			t.Fatal(err)
		}
		var c net.Conn
		if err := ns.Do(func() (err error) { c, err = marked(t, 5).Dial("tcp", f.Listeners()[0].Addr.String()); return err }); err != nil {
			t.Fatal(err)
		}
		write(t, c, sip("t", 0))
		mustEqual(t, "label where the kernel does not tell", expect(t, events, "message").flow.Label, 0)
		_ = c.Close()
		expect(t, events, "closed")
	}
}

// TestLabelHandedOver: a label goes with its message to the owner.
func TestLabelHandedOver(t *testing.T) {
	p := newPeers(t, false)
	l := p.listener()
	l.Side, l.Hidden = ims.GmProtected, false
	var f *Front
	var events chan event
	if err := p.ns.Do(func() error {
		f, events = run(t, Config{Workers: 2, Listeners: []Listener{l}}, recorder{})
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	from := p.addrs[0] // of worker 0
	held, hold := make(chan struct{}), make(chan struct{})
	if err := f.Worker(0).Post(func() { close(held); <-hold }); err != nil {
		t.Fatal(err)
	}
	<-held
	d := marked(t, 77)
	d.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
	var c net.Conn
	if err := p.ns.Do(func() (err error) { c, err = d.Dial("udp", f.Listeners()[0].Addr.String()); return err }); err != nil {
		skipKernel(t, err)
	}
	defer c.Close() //nolint:errcheck // test
	for range 2 {
		write(t, c, sip("1", 0))
	}
	if err := f.Move(from, 1); err != nil {
		t.Fatal(err)
	}
	close(hold)
	for _, want := range []uint32{0, 77} {
		e := expect(t, events, "message")
		mustEqual(t, "worker", e.worker, 1)
		mustEqual(t, "label", e.flow.Label, want)
	}
}

// TestControl: only a whole mark of a socket is a label.
func TestControl(t *testing.T) {
	c := control{mark: 7}
	c.hdr.Level, c.hdr.Type = unix.SOL_SOCKET, unix.SO_MARK
	c.hdr.SetLen(unix.CmsgLen(4))
	mustEqual(t, "mark", c.label(), 7)
	for name, tamper := range map[string]func(*control){
		"level":  func(c *control) { c.hdr.Level = unix.IPPROTO_IP },
		"type":   func(c *control) { c.hdr.Type = unix.SCM_RIGHTS },
		"length": func(c *control) { c.hdr.SetLen(unix.CmsgLen(0)) },
	} {
		bad := c
		tamper(&bad)
		mustEqual(t, name, bad.label(), 0)
	}
	mustEqual(t, "room", sizeofControl >= unix.CmsgSpace(4), true)
}
