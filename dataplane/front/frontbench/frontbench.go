// Package frontbench measures what forwarding a datagram costs: CPU time per message of several designs, taken in turn in
// one run, so that they can be compared on a machine that does other things as well.
//
// A load generator on a thread of its own keeps a window of messages in flight: it sends to the design and receives what
// that forwards. A design's cost is the CPU time of the whole process less that of this thread (getrusage), so it
// includes garbage collection and everything else that the design causes. On loopback the kernel charges the reception at
// the next hop to the sender, the same for every design.
package frontbench

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/front"
)

// Implementation constants.
const (
	rounds    = 5    // of each design, in turn; the median counts
	minRound  = 2000 // messages
	window    = 128  // messages in flight
	lossLimit = 10 * window
	batchSize = 64
	bufSize   = 2048
	bufBytes  = 4 << 20
	patience  = time.Second           // after which what is in flight counts as lost
	stopAfter = 50 * time.Millisecond // how often a bare loop looks whether it shall stop
)

// Design is a way of forwarding. Start makes it forward whatever arrives at the address that it returns to sink, until stop.
type Design struct {
	Name  string
	Start func(tb testing.TB, sink netip.AddrPort) (at netip.AddrPort, stop func())
}

// Compare reports the CPU time per message of each design and its ratio to the first one. Messages are sent in turn, from
// 127.0.0.1. b.N is the number of messages for each design.
func Compare(b *testing.B, messages [][]byte, designs ...Design) {
	b.Helper()
	CompareFrom(b, messages, []netip.Addr{local}, designs...)
}

// CompareFrom is Compare with messages from several IPv4 addresses of loopback, a burst from each in turn.
func CompareFrom(b *testing.B, messages [][]byte, sources []netip.Addr, designs ...Design) {
	b.Helper()
	g := newGenerator(b, messages, sources)
	defer g.close()
	n := max(b.N/rounds, minRound)
	cost := make([][]float64, len(designs))
	lost := make([]int, len(designs))
	b.ResetTimer()
	for range rounds {
		for i, d := range designs {
			at, stop := d.Start(b, g.sinkAddr)
			g.run(b, at, n/10) // warm up
			cost[i] = append(cost[i], g.run(b, at, n))
			stop()
			lost[i] += g.lost
			g.lost = 0
		}
	}
	b.StopTimer()
	b.ReportMetric(0, "ns/op") // of all designs together: means nothing
	median := func(v []float64) float64 {
		slices.Sort(v)
		return v[len(v)/2]
	}
	base := median(cost[0])
	for i, d := range designs {
		m := median(cost[i])
		b.ReportMetric(m, d.Name+"-µs/msg")
		if i > 0 {
			b.ReportMetric(m/base, d.Name+"-ratio")
		}
		if lost[i] > 0 { // or late by more than patience, on a machine that does much else
			b.ReportMetric(float64(lost[i]), d.Name+"-lost")
		}
	}
}

// local is where everything but the sources is.
var local = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// socket opens a UDP socket at an address of loopback. Its reads block for some time.
func socket(tb testing.TB, addr netip.Addr, wait time.Duration) (fd int, at netip.AddrPort) {
	tb.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(os.NewSyscallError("socket", err))
	}
	for _, opt := range []int{unix.SO_RCVBUFFORCE, unix.SO_SNDBUFFORCE} {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, bufBytes) // needs a capability
	}
	timeout := unix.NsecToTimeval(wait.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		tb.Fatal(os.NewSyscallError("setsockopt", err))
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: addr.As4()}); err != nil {
		tb.Fatal(os.NewSyscallError("bind", err))
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		tb.Fatal(os.NewSyscallError("getsockname", err))
	}
	port := uint16(sa.(*unix.SockaddrInet4).Port) //nolint:gosec,forcetypeassert // G115: a port of an IPv4 socket
	return fd, netip.AddrPortFrom(addr, port)
}

// batch is a set of datagrams for recvmmsg and sendmmsg.
type batch struct {
	hdr  [batchSize]unix.Mmsghdr
	iov  [batchSize]unix.Iovec
	name unix.RawSockaddrInet4 // where to, the same for all
	mem  []byte
}

// newBatch has buffers of its own.
func newBatch() *batch {
	b := &batch{mem: make([]byte, batchSize*(bufSize+64))}
	for i := range b.hdr {
		b.iov[i].Base = &b.mem[i*(bufSize+64)]
		b.iov[i].SetLen(bufSize)
		b.hdr[i].Hdr.Iov = &b.iov[i]
		b.hdr[i].Hdr.SetIovlen(1)
	}
	return b
}

// to sets the destination of all.
func (b *batch) to(a netip.AddrPort) {
	b.name = unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: a.Addr().As4()}
	p := (*[2]byte)(unsafe.Pointer(&b.name.Port))
	p[0], p[1] = byte(a.Port()>>8), byte(a.Port())
	for i := range b.hdr {
		b.hdr[i].Hdr.Name = (*byte)(unsafe.Pointer(&b.name))
		b.hdr[i].Hdr.Namelen = unix.SizeofSockaddrInet4
	}
}

func (b *batch) call(trap uintptr, fd, n, flags int) (int, error) {
	r, _, errno := unix.Syscall6(trap, uintptr(fd), uintptr(unsafe.Pointer(&b.hdr[0])), uintptr(n), uintptr(flags), 0, 0) //nolint:gosec // G115: small
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}

// generator is the load.
type generator struct {
	send, sink *batch
	sendFDs    []int // one for each source
	bursts     int   // sent
	sinkFD     int
	sinkAddr   netip.AddrPort
	messages   [][]byte
	next       int
	lost       int
}

func newGenerator(tb testing.TB, messages [][]byte, sources []netip.Addr) *generator {
	tb.Helper()
	g := &generator{send: newBatch(), sink: newBatch(), messages: messages}
	for _, a := range sources {
		fd, _ := socket(tb, a, patience)
		g.sendFDs = append(g.sendFDs, fd)
	}
	g.sinkFD, g.sinkAddr = socket(tb, local, patience)
	return g
}

func (g *generator) close() {
	for _, fd := range g.sendFDs {
		_ = unix.Close(fd)
	}
	_ = unix.Close(g.sinkFD)
}

// run sends n messages and returns the CPU time per message that others used, in µs.
func (g *generator) run(tb testing.TB, at netip.AddrPort, n int) float64 {
	tb.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	g.send.to(at)
	before := others(tb)
	received := 0
	for sent, flying := 0, 0; received < n; {
		for sent < n && flying < window {
			k := min(batchSize, n-sent, window-flying)
			for i := range k {
				m := g.messages[g.next%len(g.messages)]
				g.next++
				g.send.iov[i].Base = &m[0]
				g.send.iov[i].SetLen(len(m))
			}
			r, err := g.send.call(unix.SYS_SENDMMSG, g.sendFDs[g.bursts%len(g.sendFDs)], k, 0)
			g.bursts++
			if err != nil {
				tb.Fatal(os.NewSyscallError("sendmmsg", err))
			}
			sent += r
			flying += r
		}
		k, err := g.sink.call(unix.SYS_RECVMMSG, g.sinkFD, batchSize, unix.MSG_WAITFORONE)
		switch {
		case errors.Is(err, unix.EAGAIN):
			g.lost += flying
			received += flying
			flying = 0
			if g.lost > lossLimit {
				tb.Fatal("nothing is forwarded any more")
			}
		case err != nil && !errors.Is(err, unix.EINTR):
			tb.Fatal(os.NewSyscallError("recvmmsg", err))
		default:
			received += k
			flying = max(flying-k, 0)
		}
	}
	return float64((others(tb) - before).Nanoseconds()) / 1e3 / float64(n)
}

// others is the CPU time of the process without that of the calling thread.
func others(tb testing.TB) time.Duration {
	tb.Helper()
	var self, thread unix.Rusage
	if err := errors.Join(unix.Getrusage(unix.RUSAGE_SELF, &self), unix.Getrusage(unix.RUSAGE_THREAD, &thread)); err != nil {
		tb.Fatal(os.NewSyscallError("getrusage", err))
	}
	cpu := func(r *unix.Rusage) time.Duration {
		return time.Duration(unix.TimevalToNsec(r.Utime) + unix.TimevalToNsec(r.Stime))
	}
	return cpu(&self) - cpu(&thread)
}

// loop runs f on a thread of its own until stop: f does one wake-up's work and returns an error when its socket is shut
// down.
func loop(f func() error) (stop func()) {
	quit, ended := make(chan struct{}), make(chan struct{})
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(ended)
		for {
			_ = f() // a timeout
			select {
			case <-quit:
				return
			default:
			}
		}
	}()
	return func() {
		close(quit)
		<-ended
	}
}

// RecvFrom is the plain loop: one recvfrom and one sendto for each datagram, nothing else.
func RecvFrom() Design {
	return Design{Name: "recvfrom", Start: func(tb testing.TB, sink netip.AddrPort) (netip.AddrPort, func()) {
		tb.Helper()
		fd, at := socket(tb, local, stopAfter)
		b := newBatch()
		b.to(sink)
		buf := b.mem[:bufSize]
		stop := loop(func() error {
			n, _, errno := unix.Syscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), bufSize, 0, 0, 0)
			if errno != 0 {
				return errno
			}
			_, _, errno = unix.Syscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), n, 0,
				uintptr(unsafe.Pointer(&b.name)), unix.SizeofSockaddrInet4)
			if errno != 0 {
				return errno
			}
			return nil
		})
		return at, func() { stop(); _ = unix.Close(fd) }
	}}
}

// Batch is the loop of recvmmsg and sendmmsg, nothing else: the floor.
func Batch() Design {
	return Design{Name: "mmsg", Start: func(tb testing.TB, sink netip.AddrPort) (netip.AddrPort, func()) {
		tb.Helper()
		fd, at := socket(tb, local, stopAfter)
		b := newBatch()
		stop := loop(func() error {
			for i := range b.hdr {
				b.hdr[i].Hdr.Name, b.hdr[i].Hdr.Namelen = nil, 0
				b.iov[i].SetLen(bufSize)
			}
			n, err := b.call(unix.SYS_RECVMMSG, fd, batchSize, unix.MSG_WAITFORONE)
			if err != nil {
				return err
			}
			b.to(sink)
			for i := range n {
				b.iov[i].SetLen(int(b.hdr[i].Len))
			}
			_, err = b.call(unix.SYS_SENDMMSG, fd, n, 0)
			return err
		})
		return at, func() { stop(); _ = unix.Close(fd) }
	}}
}

// Front is a front.Front with one worker and one UDP listener, and a handler that sends what it gets to sink.
func Front(name string, side ims.Side, newHandler func(sink netip.AddrPort) front.Handler) Design {
	return Workers(name, 1, side, newHandler)
}

// Workers is Front with several workers that share the listener. The kernel steers: a message that is handed over is an
// error.
func Workers(name string, n int, side ims.Side, newHandler func(sink netip.AddrPort) front.Handler) Design {
	return Design{Name: name, Start: func(tb testing.TB, sink netip.AddrPort) (netip.AddrPort, func()) {
		tb.Helper()
		handlers := make([]front.Handler, 0, n)
		for range n {
			handlers = append(handlers, newHandler(sink))
		}
		f, err := front.New(front.Config{Workers: n, Listeners: []front.Listener{{
			Addr: netip.AddrPortFrom(local, 0), Side: side, UDP: true, Worker: -1,
		}}}, handlers)
		if err != nil {
			tb.Fatal(err)
		}
		return f.Listeners()[0].Addr, func() {
			if s := f.Stats(); s.Handovers > 0 {
				tb.Errorf("%s: %d messages were handed over", name, s.Handovers)
			}
			if err := f.Close(context.Background()); err != nil {
				tb.Error(err)
			}
		}
	}}
}
