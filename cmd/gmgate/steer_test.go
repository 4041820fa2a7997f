package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/front"
	"github.com/gmgate/gmgate/dataplane/guard"
	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// arrival is a message at a worker.
type arrival struct {
	worker int
	from   netip.Addr
	text   string
}

// arrivals is a handler that reports messages.
type arrivals struct {
	worker int
	to     chan<- arrival
}

func (a *arrivals) Boot(*front.Worker) {}
func (a *arrivals) Message(f ims.Flow, msg []byte) {
	a.to <- arrival{a.worker, f.Remote.Addr(), string(msg)}
}
func (a *arrivals) Bad(ims.Flow, []byte, string)               {}
func (a *arrivals) Closed(ims.ConnID, ims.Flow)                {}
func (a *arrivals) Dialed(uint64, ims.ConnID, ims.Flow, error) {}
func (a *arrivals) Tick(time.Time) time.Duration               { return 0 }

// steered is a front whose listeners are steered by eBPF, in a namespace with many addresses.
type steered struct {
	*front.Front
	ns       *hostnet.NS
	steering *guard.Steering
	arrivals chan arrival
}

const steerPatience = 20 * time.Second

func newSteered(t *testing.T, workers int) *steered {
	t.Helper()
	requireDemo(t)
	s := &steered{arrivals: make(chan arrival, 1024)}
	var err error
	if s.ns, err = hostnet.Create(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.ns.Close() })
	for _, p := range []string{"10.0.0.0/8", "2001:db8::/32"} {
		if err := s.ns.AddLocal(netip.MustParsePrefix(p)); err != nil {
			t.Fatal(err)
		}
	}
	if s.steering, err = guard.OpenSteering(workers, 4); err != nil {
		if os.Getenv("REQUIRE_KERNEL_TESTS") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	t.Cleanup(func() { _ = s.steering.Close() })
	c := front.Config{Workers: workers, Hidden: s.ns, Steering: s.steering, FreeBind: true}
	for _, a := range []string{"10.255.0.1:5060", "[2001:db8:ffff::1]:5060"} {
		c.Listeners = append(c.Listeners, front.Listener{
			Addr: netip.MustParseAddrPort(a), Side: ims.GmClear, UDP: true, TCP: true, Hidden: true, Worker: -1,
		})
	}
	handlers := make([]front.Handler, workers)
	for k := range handlers {
		handlers[k] = &arrivals{k, s.arrivals}
	}
	if s.Front, err = front.New(c, handlers); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), steerPatience)
		defer cancel()
		if err := s.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	return s
}

// dial connects from an address to the listener of its family.
func (s *steered) dial(t *testing.T, network string, from netip.Addr) net.Conn {
	t.Helper()
	to := s.Listeners()[0].Addr
	if from.Is6() {
		to = s.Listeners()[1].Addr
	}
	d := net.Dialer{Timeout: steerPatience, ControlContext: func(_ context.Context, _, _ string, c syscall.RawConn) error {
		var err error
		if from.Is6() { // local by a route alone
			e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_FREEBIND, 1) })
			if err == nil {
				err = e
			}
		}
		return err
	}}
	if network == "udp" {
		d.LocalAddr = &net.UDPAddr{IP: from.AsSlice()}
	} else {
		d.LocalAddr = &net.TCPAddr{IP: from.AsSlice()}
	}
	var c net.Conn
	if err := s.ns.Do(func() (err error) {
		c, err = d.Dial(network, to.String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return c
}

func (s *steered) expect(t *testing.T) arrival {
	t.Helper()
	select {
	case a := <-s.arrivals:
		return a
	case <-time.After(steerPatience):
		t.Fatal("no message")
		return arrival{}
	}
}

func steerMessage(n int) string {
	return fmt.Sprintf("MESSAGE sip:%d SIP/2.0\r\nContent-Length: 0\r\n\r\n", n)
}

func steerPhone(n int, v6 bool) netip.Addr {
	if !v6 {
		return netip.AddrFrom4([4]byte{10, byte(n * 31), byte(n >> 8), byte(n)})
	}
	return netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 5: byte(n * 13), 7: byte(n * 7), 10: byte(n * 3), 14: byte(n >> 8), 15: byte(n)})
}

// TestSteeringIsOwner: the program's hash is front.Owner. What it gets wrong is handed over, so nothing may be.
func TestSteeringIsOwner(t *testing.T) {
	const workers, phones, conns = 3, 1000, 100
	s := newSteered(t, workers)
	steered := 0
	for n := range phones {
		for _, v6 := range []bool{false, true} {
			from := steerPhone(n+1, v6)
			for _, network := range []string{"udp", "tcp"} {
				if network == "tcp" && n >= conns {
					continue
				}
				c := s.dial(t, network, from)
				if _, err := c.Write([]byte(steerMessage(n))); err != nil {
					t.Fatal(err)
				}
				if a := s.expect(t); a.worker != front.Owner(from, workers) || a.from != from {
					t.Fatalf("%s: message of %s at worker %d, want %d", from, a.from, a.worker, front.Owner(from, workers))
				}
				_ = c.Close()
				steered++
			}
		}
	}
	if st := s.Stats(); st.Handovers != 0 || st.Strays != 0 {
		t.Errorf("%d messages and %d connections were at the wrong worker", st.Handovers, st.Strays)
	}
	if st, err := s.steering.Stats(); err != nil || st.Hash != uint64(steered) || st.Affinity+st.Kernel != 0 {
		t.Errorf("counters %+v, %v, want %d by the hash", st, err, steered)
	}
}

// TestSteeringMoves: after Move the very next message is at the new worker, and nothing is handed over.
func TestSteeringMoves(t *testing.T) {
	const workers, flips = 3, 200
	s := newSteered(t, workers)
	for _, v6 := range []bool{false, true} {
		from := steerPhone(1, v6)
		c := s.dial(t, "udp", from)
		defer c.Close() //nolint:errcheck // of UDP
		for i := range flips {
			want := i % workers
			if err := s.Move(from, want); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Write([]byte(steerMessage(i))); err != nil {
				t.Fatal(err)
			}
			if a := s.expect(t); a.worker != want || a.text != steerMessage(i) {
				t.Fatalf("flip %d: %q at worker %d, want %d", i, a.text, a.worker, want)
			}
			if i%10 == 0 {
				tcp := s.dial(t, "tcp", from)
				if _, err := tcp.Write([]byte(steerMessage(i))); err != nil {
					t.Fatal(err)
				}
				if a := s.expect(t); a.worker != want {
					t.Fatalf("flip %d: connection at worker %d, want %d", i, a.worker, want)
				}
				_ = tcp.Close()
			}
		}
		if err := s.Move(from, -1); err != nil {
			t.Fatal(err)
		}
	}
	if st := s.Stats(); st.Handovers != 0 || st.Strays != 0 {
		t.Errorf("%d messages and %d connections were at the wrong worker", st.Handovers, st.Strays)
	}
	if st, err := s.steering.Stats(); err != nil || st.Exceptions != 0 || st.Affinity == 0 || st.Kernel != 0 {
		t.Errorf("counters %+v, %v", st, err)
	}
}

// TestSteeringQueued: what waits in the old worker's socket when an address is moved is handed over, in its order.
func TestSteeringQueued(t *testing.T) {
	const n = 100
	s := newSteered(t, 2)
	from := steerPhone(2, false)
	old := s.Owner(from)
	hold, held := make(chan struct{}), make(chan struct{})
	if err := s.Worker(old).Post(func() { close(held); <-hold }); err != nil {
		t.Fatal(err)
	}
	<-held
	c := s.dial(t, "udp", from)
	defer c.Close() //nolint:errcheck // of UDP
	for i := range n {
		if _, err := c.Write([]byte(steerMessage(i))); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Move(from, 1-old); err != nil {
		t.Fatal(err)
	}
	close(hold)
	for i := range n {
		if a := s.expect(t); a.worker != 1-old || a.text != steerMessage(i) {
			t.Fatalf("message %d: %q at worker %d", i, a.text, a.worker)
		}
	}
	if got := s.Stats().Handovers; got != n {
		t.Errorf("%d messages were handed over, want %d", got, n)
	}
	for i := range n {
		if _, err := c.Write([]byte(steerMessage(i))); err != nil {
			t.Fatal(err)
		}
		if a := s.expect(t); a.worker != 1-old {
			t.Fatalf("message %d after the move at worker %d", i, a.worker)
		}
	}
	if got := s.Stats().Handovers; got != n {
		t.Errorf("%d messages were handed over after the move", got-n)
	}
}
