package attack

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/gmgate/gmgate/dataplane/hostnet"
)

func TestPace(t *testing.T) {
	start := time.Unix(1000, 0)
	for _, tt := range []struct {
		name  string
		rate  int
		after []time.Duration
		want  []int
	}{
		{"no rate", 0, []time.Duration{0, 0}, []int{64, 64}},
		{"nothing is due at once", 1000, []time.Duration{0, 0}, []int{0, 0}},
		{"one each millisecond", 1000, []time.Duration{time.Millisecond, time.Millisecond, 0}, []int{1, 1, 0}},
		{"parts add up", 400, []time.Duration{time.Millisecond, time.Millisecond, 500 * time.Microsecond}, []int{0, 0, 1}},
		{"what the limit leaves comes later", 80_000, []time.Duration{time.Millisecond, 0, 0}, []int{64, 16, 0}},
		{"what is too late lapses", 1000, []time.Duration{time.Hour, 0, 0, 0, 0}, []int{64, 64, 64, 64, 0}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, now := pace{rate: tt.rate, at: start}, start
			for i, d := range tt.after {
				now = now.Add(d)
				if got := p.take(now, batchSize); got != tt.want[i] {
					t.Errorf("look %d: %d packets, want %d", i, got, tt.want[i])
				}
			}
		})
	}
}

func TestDropped(t *testing.T) {
	for counts, want := range map[string]uint64{
		"  1 2 3 40 5 6 7 8 9 10 11 200 13 14 15 16": 240,
		"0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0":            0,
	} {
		if got, err := dropped(counts); err != nil || got != want {
			t.Errorf("%q: %d, %v, want %d", counts, got, err, want)
		}
	}
	for _, bad := range []string{"", "1 2 3", "1 2 3 x 5 6 7 8 9 10 11 12 13 14 15 16"} {
		if got, err := dropped(bad); err == nil {
			t.Errorf("%q: %d, want an error", bad, got)
		}
	}
}

// link makes two namespaces with a link between them.
func link(t *testing.T) (a, b *hostnet.NS) {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("REQUIRE_KERNEL_TESTS") == "1" {
			t.Fatal("network namespaces need root")
		}
		t.Skip("network namespaces need root")
	}
	for _, n := range []**hostnet.NS{&a, &b} {
		ns, err := hostnet.Create()
		if err != nil {
			t.Fatal(err)
		}
		*n = ns
		t.Cleanup(func() { _ = ns.Close() })
	}
	if err := a.Veth("left", b, "right"); err != nil {
		t.Fatal(err)
	}
	return a, b
}

// TestInjector has UDP datagrams of many sources arrive at an ordinary socket: number, order and content are right, and the
// stack finds nothing wrong with header and checksums.
func TestInjector(t *testing.T) {
	a, b := link(t)
	dst := netip.MustParseAddrPort("192.0.2.1:5060")
	if err := errors.Join(b.AddAddr("right", netip.MustParsePrefix("192.0.2.1/24")), b.Sysctl("ipv4.conf.right.rp_filter", "0"),
		b.Sysctl("ipv4.conf.all.rp_filter", "0")); err != nil {
		t.Fatal(err)
	}
	var c *net.UDPConn
	if err := b.Do(func() (err error) {
		c, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(dst))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer c.Close() //nolint:errcheck // read only
	if err := c.SetReadBuffer(4 << 20); err != nil {
		t.Fatal(err)
	}
	to, err := HardwareAddr(b, "right")
	if err != nil {
		t.Fatal(err)
	}
	j, err := Open(a, "left", to)
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close() //nolint:errcheck // checked below

	const count = 3*batchSize + 7
	source := func(n int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 18, byte(n >> 8), byte(n)}), uint16(1000+n))
	}
	res, err := j.Send(t.Context(), Wave{Count: count, Next: func(b []byte, n int) []byte {
		return AppendUDP(b, source(n), dst, []byte{byte(n), 'x', byte(n)}[:1+n%3])
	}})
	if err != nil || res.Sent != count || res.Refused != 0 {
		t.Fatalf("%+v, %v", res, err)
	}
	buf := make([]byte, 100)
	for n := range count {
		if err := c.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		size, from, err := c.ReadFromUDPAddrPort(buf)
		if err != nil {
			t.Fatalf("datagram %d: %v", n, err)
		}
		if from != source(n) || size != 1+n%3 || buf[0] != byte(n) {
			t.Fatalf("datagram %d: %x from %s", n, buf[:size], from)
		}
	}
	for _, end := range []struct {
		ns   *hostnet.NS
		link string
	}{{a, "left"}, {b, "right"}} {
		if n, err := Lost(end.ns, end.link); err != nil || n != 0 {
			t.Errorf("%d frames lost at %s, %v", n, end.link, err)
		}
	}
	if speed, err := j.Speed(t.Context(), 2*batchSize); err != nil || speed <= 0 {
		t.Errorf("%g packets/s, %v", speed, err)
	}
	if err := errors.Join(j.Close(), j.Close()); err != nil {
		t.Error(err)
	}
	if _, err := j.Send(t.Context(), Wave{Count: 1, Next: func(b []byte, _ int) []byte { return b }}); err == nil {
		t.Error("a closed injector sends")
	}
}

// A wave ends by its time, by its number and with its context, and packets that are too long are cut off.
func TestWaveEnds(t *testing.T) {
	a, b := link(t)
	to, err := HardwareAddr(b, "right")
	if err != nil {
		t.Fatal(err)
	}
	j, err := Open(a, "left", to)
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close() //nolint:errcheck // a test's
	next := func(b []byte, _ int) []byte { return append(b, make([]byte, 64)...) }
	if _, err := j.Send(t.Context(), Wave{Next: next}); !errors.Is(err, errUnbounded) {
		t.Errorf("a wave without an end: %v", err)
	}
	if r, err := j.Send(t.Context(), Wave{Rate: 2000, For: 20 * time.Millisecond, Next: next}); err != nil || r.Sent > 40+burst {
		t.Errorf("by time: %+v, %v", r, err)
	}
	if r, err := j.Send(t.Context(), Wave{Rate: 100_000, Count: 130, For: time.Minute, Next: next}); err != nil || r.Sent+r.Refused != 130 {
		t.Errorf("by number: %+v, %v", r, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	seen := 0
	r, err := j.Send(ctx, Wave{Rate: 10_000, For: time.Minute, Next: func(b []byte, n int) []byte {
		if seen = n + 1; seen == 100 {
			cancel()
		}
		return next(b, n)
	}})
	if !errors.Is(err, context.Canceled) || r.Sent+r.Refused != seen || seen < 100 || seen >= 100+batchSize {
		t.Errorf("with its context: %+v of %d, %v", r, seen, err)
	}
	long := func(b []byte, _ int) []byte { return append(b, make([]byte, 2*frameRoom)...) }
	if r, err := j.Send(t.Context(), Wave{Count: 1, Next: long}); err == nil {
		t.Errorf("a frame beyond the MTU went out: %+v", r)
	}
	if _, err := Lost(a, "nowhere"); err == nil {
		t.Error("a link that is not there has lost nothing")
	}
	if _, err := Open(a, "lo", to); err == nil {
		t.Error("a loopback link has no neighbours")
	}
}
