package attack

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// Implementation constants.
const (
	batchSize   = 64 // frames per system call
	frameRoom   = 2048
	tick        = time.Millisecond // between two looks at how many packets are due
	burst       = 4 * batchSize    // packets that may be late; what is later lapses
	etherHeader = 14
	etherIPv4   = 0x0800
	etherIPv6   = 0x86dd
	etherLocal  = 0x88b5 // IEEE 802: for experiments, nobody's protocol
)

// Injector writes frames to one link, for one neighbour on it. It is used by one goroutine.
type Injector struct {
	ns     *hostnet.NS
	link   string
	fd     int
	header [12]byte // destination and source
	hdrs   [batchSize]mmsghdr
	vecs   [batchSize]unix.Iovec
	frames [batchSize][frameRoom]byte
}

// mmsghdr is struct mmsghdr, which x/sys does not have.
type mmsghdr struct {
	unix.Msghdr
	n uint32
	_ [4]byte
}

// Open opens a packet socket on a link of a namespace; to is the link layer address of the neighbour, as HardwareAddr
// returns it. CAP_NET_RAW is needed.
func Open(ns *hostnet.NS, link string, to net.HardwareAddr) (*Injector, error) {
	j := &Injector{ns: ns, link: link, fd: -1}
	err := ns.Do(func() error {
		dev, err := net.InterfaceByName(link)
		if err != nil {
			return err
		}
		if len(to) != 6 || len(dev.HardwareAddr) != 6 {
			return fmt.Errorf("%q and %q are not both Ethernet addresses", to, dev.HardwareAddr)
		}
		copy(j.header[:], to)
		copy(j.header[6:], dev.HardwareAddr)
		// Without a protocol the socket receives nothing.
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open packet socket: %w", err)
		}
		if err := unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: dev.Index}); err != nil {
			return errors.Join(fmt.Errorf("bind packet socket: %w", err), unix.Close(fd))
		}
		j.fd = fd
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("open injector on %s: %w", link, err)
	}
	for i := range j.hdrs {
		j.vecs[i].Base = &j.frames[i][0]
		j.hdrs[i].Iov, j.hdrs[i].Iovlen = &j.vecs[i], 1
	}
	return j, nil
}

// HardwareAddr returns the link layer address of a link.
func HardwareAddr(ns *hostnet.NS, link string) (addr net.HardwareAddr, err error) {
	err = ns.Do(func() error {
		dev, err := net.InterfaceByName(link)
		if err != nil {
			return fmt.Errorf("find link %s in %s: %w", link, ns, err)
		}
		addr = dev.HardwareAddr
		return nil
	})
	return addr, err
}

// Close closes the socket. It may be called more than once.
func (j *Injector) Close() error {
	if j.fd < 0 {
		return nil
	}
	fd := j.fd
	j.fd = -1
	if err := unix.Close(fd); err != nil {
		return fmt.Errorf("close injector: %w", err)
	}
	return nil
}

// Wave is what one call of Send does. It has to be bounded: by Count or For, or both.
type Wave struct {
	Rate  int           // packets per second; zero: as fast as the link takes them
	Count int           // packets at most; zero: no bound
	For   time.Duration // zero: no bound
	IPv6  bool          // what the frames say that they carry
	// Next appends packet number n, counted from 0, to b. Beyond 2,000 octets packets are cut off.
	Next func(b []byte, n int) []byte
}

// Result is what became of a wave.
type Result struct {
	Sent    int // taken by the link
	Refused int // not taken by it, for lack of room
	Took    time.Duration
}

// Rate is how many packets were sent per second.
func (r Result) Rate() float64 {
	if r.Took <= 0 {
		return 0
	}
	return float64(r.Sent) / r.Took.Seconds()
}

var errUnbounded = errors.New("the wave has no end")

// Send sends a wave. It ends early with ctx, whose error it returns then, and with an error of the socket other than lack
// of room. The result is right in any case.
func (j *Injector) Send(ctx context.Context, w Wave) (r Result, err error) {
	if w.Count <= 0 && w.For <= 0 {
		return r, fmt.Errorf("inject into %s: %w", j.link, errUnbounded)
	}
	etherType := uint16(etherIPv4)
	if w.IPv6 {
		etherType = etherIPv6
	}
	begin := time.Now()
	defer func() { r.Took = time.Since(begin) }()
	clock := time.NewTicker(tick)
	defer clock.Stop()
	due := pace{rate: w.Rate, at: begin}
	for n := 0; ; {
		now := time.Now()
		if w.For > 0 && now.Sub(begin) >= w.For || w.Count > 0 && n >= w.Count {
			return r, nil
		}
		k := due.take(now, batchSize)
		if w.Count > 0 {
			k = min(k, w.Count-n)
		}
		if k == 0 {
			select {
			case <-ctx.Done():
				return r, fmt.Errorf("inject into %s: %w", j.link, context.Cause(ctx))
			case <-clock.C:
			}
			continue
		}
		for i := range k {
			j.set(i, etherType, w.Next(j.frames[i][:etherHeader], n+i))
		}
		if err := j.flush(k, &r); err != nil {
			return r, fmt.Errorf("inject into %s: %w", j.link, err)
		}
		if n += k; ctx.Err() != nil {
			return r, fmt.Errorf("inject into %s: %w", j.link, context.Cause(ctx))
		}
	}
}

// set makes frame i of the batch out of what a Next returned.
func (j *Injector) set(i int, etherType uint16, frame []byte) {
	f := &j.frames[i]
	n := len(frame)
	if n > frameRoom || n > 0 && &frame[0] != &f[0] {
		n = copy(f[:], frame) // it has grown out of its room
	}
	copy(f[:], j.header[:])
	binary.BigEndian.PutUint16(f[12:], etherType)
	j.vecs[i].SetLen(max(n, etherHeader))
}

// flush sends the first k frames.
func (j *Injector) flush(k int, r *Result) error {
	for at := 0; at < k; {
		n, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(j.fd), uintptr(unsafe.Pointer(&j.hdrs[at])), uintptr(k-at), 0, 0, 0) //nolint:gosec // G103: headers are laid out by hand
		switch errno {
		case 0:
			r.Sent, at = r.Sent+int(n), at+int(n)
		case unix.EINTR:
		case unix.ENOBUFS, unix.EAGAIN: // about the first frame
			r.Refused, at = r.Refused+1, at+1
		default:
			return errno
		}
	}
	return nil
}

// pace says how many packets are due.
type pace struct {
	rate int // per second; zero: any number
	at   time.Time
	have float64 // packets due that were not taken, up to burst
}

// take returns how many packets may be sent now, up to limit.
func (p *pace) take(now time.Time, limit int) int {
	if p.rate <= 0 {
		return limit
	}
	p.have = min(p.have+now.Sub(p.at).Seconds()*float64(p.rate), burst)
	p.at = now
	n := min(int(p.have), limit)
	p.have -= float64(n)
	return n
}

// Speed measures how many packets per second this machine can put on the link, with frames that no protocol takes: what a
// rate may be chosen by.
func (j *Injector) Speed(ctx context.Context, count int) (float64, error) {
	var r Result
	begin := time.Now()
	for r.Sent+r.Refused < count && ctx.Err() == nil {
		for i := range batchSize {
			j.set(i, etherLocal, j.frames[i][:etherHeader+64])
		}
		if err := j.flush(batchSize, &r); err != nil {
			return 0, fmt.Errorf("measure %s: %w", j.link, err)
		}
	}
	r.Took = time.Since(begin)
	return r.Rate(), ctx.Err()
}

// Lost returns how many frames a link of a namespace has dropped so far, on their way in and out. On a veth, frames are
// also lost for lack of room between its two ends, which count them.
func Lost(ns *hostnet.NS, link string) (n uint64, err error) {
	err = ns.Do(func() error {
		f, err := os.Open("/proc/thread-self/net/dev")
		if err != nil {
			return err
		}
		defer f.Close() //nolint:errcheck // read only
		for s := bufio.NewScanner(f); s.Scan(); {
			if name, counts, ok := strings.Cut(s.Text(), ":"); ok && strings.TrimSpace(name) == link {
				n, err = dropped(counts)
				return err
			}
		}
		return errors.New("no such link")
	})
	if err != nil {
		return 0, fmt.Errorf("read drops of %s: %w", link, err)
	}
	return n, nil
}

// dropped adds up the columns of /proc/net/dev that count dropped frames.
func dropped(counts string) (sum uint64, err error) {
	const in, out, columns = 3, 11, 16
	fields := strings.Fields(counts)
	if len(fields) < columns {
		return 0, fmt.Errorf("%d columns", len(fields))
	}
	for _, i := range []int{in, out} {
		n, err := strconv.ParseUint(fields[i], 10, 64)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}
