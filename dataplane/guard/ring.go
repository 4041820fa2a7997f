package guard

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/bpf"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// Drop is a packet that the guard has dropped.
type Drop struct {
	Time        time.Time
	Reason      Reason
	Interface   string
	Source      netip.AddrPort // port 0 where the protocol has none, or none could be read
	Destination netip.AddrPort
	Protocol    uint8   // of what is in the IP packet
	SPI         ims.SPI // 0: none
	Length      int     // octets of the IP packet
}

// ProtocolName names the protocol of a dropped packet.
func (d *Drop) ProtocolName() string {
	switch d.Protocol {
	case unix.IPPROTO_ESP:
		return "esp"
	case unix.IPPROTO_UDP:
		if d.SPI != 0 {
			return "esp-udp"
		}
		return "udp"
	case unix.IPPROTO_TCP:
		return "tcp"
	}
	return "ip-" + strconv.Itoa(int(d.Protocol))
}

// sampleInterval is the least time between two samples of one CPU: a reader at a terminal wants no more, and a flood
// must not cost more than that.
const sampleInterval = 5 * time.Millisecond

// followerQueue is how many samples wait for a slow follower before it misses some.
const followerQueue = 256

// rings are the readers of the ring buffers.
type rings struct {
	first, drops *ringbuf.Reader
	running      sync.WaitGroup

	firstUses, samples atomic.Uint64
}

func (r *rings) open(o *bpf.GuardObjects) (err error) {
	if r.first, err = ringbuf.NewReader(o.FirstUses); err != nil {
		return err
	}
	r.drops, err = ringbuf.NewReader(o.Drops)
	return err
}

func (r *rings) start(g *Guard) {
	r.running.Go(func() { read(r.first, g.firstUse) })
	r.running.Go(func() { read(r.drops, g.sampled) })
}

// close ends the readers.
func (r *rings) close() {
	for _, x := range []*ringbuf.Reader{r.first, r.drops} {
		if x != nil {
			_ = x.Close()
		}
	}
	r.running.Wait()
}

func read(r *ringbuf.Reader, use func([]byte)) {
	var rec ringbuf.Record
	for {
		if err := r.ReadInto(&rec); err != nil {
			if errors.Is(err, ringbuf.ErrClosed) {
				return
			}
			continue // a record that is too short; the next one is not
		}
		use(rec.RawSample)
	}
}

// firstUse takes note of the first packet on a set. It came from the right address; whether the phone has sent it is not
// known.
func (g *Guard) firstUse(b []byte) {
	var e bpf.GuardFirstUse
	if _, err := binary.Decode(b, binary.NativeEndian, &e); err != nil {
		return
	}
	g.rings.firstUses.Add(1)
	g.table.seen(e.Set, e.Time)
}

func (g *Guard) sampled(b []byte) {
	var e bpf.GuardDropped
	if _, err := binary.Decode(b, binary.NativeEndian, &e); err != nil {
		return
	}
	g.rings.samples.Add(1)
	d := Drop{
		Time: wall(e.Time), Reason: Reason(e.Reason), Interface: g.interfaceName(int(e.Interface)),
		Protocol: e.Protocol, SPI: ims.SPI(e.Spi), Length: int(e.Length),
	}
	if src, dst := addrOf(e.Source.Word), addrOf(e.Destination.Word); !dst.IsUnspecified() {
		d.Source, d.Destination = netip.AddrPortFrom(src, e.SourcePort), netip.AddrPortFrom(dst, e.DestinationPort)
	}
	g.followers.tell(&d)
}

// interfaceName finds the name of a hook's interface; others have none of our programs.
func (g *Guard) interfaceName(index int) string {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, h := range g.hooks {
		if h.index == index {
			return h.name
		}
	}
	name := strconv.Itoa(index)
	_ = inside(g.cfg.NS, func(*hostnet.NS) error { // its number has to do
		i, err := net.InterfaceByIndex(index)
		if err == nil {
			name = i.Name
		}
		return err
	})
	return name
}

// followers are those who want to see drops.
type followers struct {
	mu     sync.Mutex
	all    map[chan Drop]struct{}
	closed bool
	missed atomic.Uint64
}

func (f *followers) tell(d *Drop) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for c := range f.all {
		select {
		case c <- *d:
		default:
			f.missed.Add(1)
		}
	}
}

func (f *followers) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	for c := range f.all {
		close(c)
	}
	f.all = nil
}

// Follow calls f for each sampled drop until ctx or the guard ends: at most one each 5 ms and CPU. The error is that of the
// kernel when sampling cannot be switched on.
func (g *Guard) Follow(ctx context.Context, f func(*Drop)) error {
	c := make(chan Drop, followerQueue)
	if err := g.join(c); err != nil {
		return err
	}
	defer g.leave(c)
	for {
		select {
		case <-ctx.Done():
			return nil
		case d, ok := <-c:
			if !ok {
				return nil
			}
			f(&d)
		}
	}
}

// join switches the samples on for the first follower, leave off after the last one.
func (g *Guard) join(c chan Drop) error {
	fs := &g.followers
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if fs.closed {
		return errors.New("guard is closed")
	}
	if len(fs.all) == 0 {
		if err := g.objs.SampleInterval.Set(uint64(sampleInterval)); err != nil {
			return err
		}
		fs.all = make(map[chan Drop]struct{})
	}
	fs.all[c] = struct{}{}
	return nil
}

func (g *Guard) leave(c chan Drop) {
	fs := &g.followers
	fs.mu.Lock()
	defer fs.mu.Unlock()
	delete(fs.all, c)
	if len(fs.all) == 0 && !fs.closed {
		_ = g.objs.SampleInterval.Set(uint64(0)) // the worst is that nobody reads what is sampled
	}
}
