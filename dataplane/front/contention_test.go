package front

import (
	"bufio"
	"io"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gmgate/gmgate/bench/contention"
	"github.com/gmgate/gmgate/control/ims"
)

// pump has UEs of both workers send messages, each over UDP and TCP, and get them back.
type pump struct {
	t       *testing.T
	udp     []*net.UDPConn
	tcp     []net.Conn
	readers []*bufio.Reader
}

const (
	pumpWindow = 8
	pumpRounds = 200
)

func newPump(t *testing.T, at netip.AddrPort, from ...netip.Addr) *pump {
	t.Helper()
	p := &pump{t: t}
	for _, a := range from {
		p.udp = append(p.udp, udpPeer(t, a.String(), at))
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(a, 0))}
		c, err := d.Dial("tcp", at.String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		if err := c.SetDeadline(time.Now().Add(2 * patience)); err != nil {
			t.Fatal(err)
		}
		p.tcp = append(p.tcp, c)
		p.readers = append(p.readers, bufio.NewReader(c))
	}
	p.run(1) // connections are open afterwards
	return p
}

// run returns the number of messages that were sent.
func (p *pump) run(rounds int) uint64 {
	p.t.Helper()
	msg := sip("p", 100)
	each := func(out io.Writer, burst string, writes int, read func() (string, error)) {
		for range rounds {
			for range writes {
				if _, err := io.WriteString(out, burst); err != nil {
					p.t.Error(err)
					return
				}
			}
			for range pumpWindow {
				if got, err := read(); err != nil || got != msg {
					p.t.Errorf("got %q, %v", got, err)
					return
				}
			}
		}
	}
	var wg sync.WaitGroup
	for i := range p.udp {
		wg.Go(func() {
			buf := make([]byte, 2048)
			each(p.udp[i], msg, pumpWindow, func() (string, error) {
				n, err := p.udp[i].Read(buf)
				return string(buf[:n]), err
			})
		})
		wg.Go(func() {
			each(p.tcp[i], strings.Repeat(msg, pumpWindow), 1, func() (string, error) { return readSIP(p.readers[i]) })
		})
	}
	wg.Wait()
	return uint64(rounds * pumpWindow * 2 * len(p.udp))
}

// TestContention: two workers whose UEs send all the time wait neither for one another nor for anybody else.
func TestContention(t *testing.T) {
	from := []netip.Addr{
		netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("127.0.0.3"), // of workers 0 and 1
		netip.MustParseAddr("127.0.0.4"), netip.MustParseAddr("127.0.0.5"), // as well, but change places
	}
	start := func(t *testing.T, onMsg func(*Worker, ims.Flow, []byte)) (*Front, *pump) {
		l := gmProtected(loop4)
		l.UDP = true
		f, _ := run(t, Config{Workers: 2, Listeners: []Listener{l}, Steering: newAffinity(t)}, recorder{
			events: make(chan event), onMsg: onMsg, // nobody gets events, so that the test does not synchronise the workers
		})
		for i, a := range from[2:] {
			if err := f.Move(a, 1-i); err != nil {
				t.Fatal(err)
			}
		}
		return f, newPump(t, f.Listeners()[0].Addr, from...)
	}
	t.Run("none", func(t *testing.T) {
		type counter struct {
			n uint64
			_ [120]byte // a cache line of its own
		}
		var handled [2]counter
		f, p := start(t, func(w *Worker, fl ims.Flow, msg []byte) {
			handled[w.Index()].n++
			echo(w, fl, msg)
		})
		var sent uint64
		locks, waits := contention.Watch(func() { sent = p.run(pumpRounds) })
		for _, s := range locks {
			t.Errorf("a lock was waited for:\n%s", s)
		}
		for _, s := range waits {
			t.Errorf("a loop has waited:\n%s", s)
		}
		s := f.Stats()
		if got := s.Side(ims.GmProtected).MessagesIn; got < sent {
			t.Errorf("%d of %d messages", got, sent)
		}
		mustEqual(t, "handovers", s.Handovers, 0)
		mustEqual(t, "strays", s.Strays, 0)
		closeFront(t, f)
		for i := range handled {
			if handled[i].n < sent/2 {
				t.Errorf("worker %d: %d of %d messages", i, handled[i].n, sent)
			}
		}
	})
	// What is looked for would be found.
	t.Run("deliberate", func(t *testing.T) {
		var mu sync.Mutex
		_, p := start(t, func(w *Worker, fl ims.Flow, msg []byte) {
			mu.Lock()
			runtime.Gosched()
			mu.Unlock()
			echo(w, fl, msg)
		})
		all := [2]map[string]bool{{}, {}}
		eventually(t, "contention is found", func() bool {
			locks, waits := contention.Watch(func() { p.run(10) })
			for i, stacks := range [][]string{locks, waits} {
				for _, s := range stacks {
					all[i][s] = true
				}
			}
			return len(all[0]) > 0 && len(all[1]) > 0
		})
		for stack := range all[0] {
			if !strings.Contains(stack, "callMessage") {
				t.Errorf("unexpected:\n%s", stack)
			}
		}
	})
}
