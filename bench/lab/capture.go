package lab

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
)

// Implementation constants.
const (
	frameMax      = 1<<16 + 256 // segmentation offload makes frames of up to 64 KiB on a veth
	captureBuffer = 32 << 20    // octets the kernel holds while we are not scheduled
	maxClear      = 100_000     // clear payloads kept
	maxFrames     = 200_000     // ESP frames listed
	settlePoll    = 5 * time.Millisecond
)

// Ancillary fields of classic BPF, from linux/filter.h: offsets below zero.
const (
	skfAdOff     = 0xfffff000
	skfAdPktType = 4
)

// Stats are the counters of a capture.
type Stats struct {
	ESPIn, ESPOut  int // frames from and to the phones, every fragment counted
	ESPBytes       int
	ESPFragments   int
	ClearSIP       int // frames that begin a SIP message in clear
	Clear          int // other UDP and TCP in clear
	Other          int // ARP, ICMP and the like
	KeyLeaks       int // frames with a readable ck or ik parameter
	Lost           int // frames the kernel could not hand over: assertions about absence are void then
	FileErr        error
	FramesUnlisted int // ESP frames beyond the list's bound
}

// ESPFrame is an ESP packet (or fragment) seen on the Gm link.
type ESPFrame struct {
	Time     time.Time
	Src, Dst netip.Addr
	SPI      ims.SPI // zero in later fragments
	Len      int     // of the ESP packet
}

// ClearSIP is a piece of SIP seen in clear on the Gm link.
type ClearSIP struct {
	Time       time.Time
	Src, Dst   netip.AddrPort
	Transport  ims.Transport
	Payload    []byte
	Method     string // of a request
	Status     int    // of a response
	CSeq       uint32
	CSeqMethod string
	CallID     string
	Branch     string
}

// String names the message for error texts, without its content.
func (m ClearSIP) String() string {
	what := m.Method
	if m.Status != 0 {
		what = fmt.Sprintf("%d (%s)", m.Status, m.CSeqMethod)
	}
	return fmt.Sprintf("%s %s %s->%s", what, m.Transport, m.Src, m.Dst)
}

// Capture listens on the Gm link inside the gm namespace, in both directions. It sees what a network tap sees: before
// decryption on the way in, after encryption on the way out.
type Capture struct {
	path string
	sock *os.File
	ues  [2]netip.Prefix
	done chan struct{}

	mu     sync.Mutex
	stats  Stats
	clear  []ClearSIP
	frames []ESPFrame
	bySPI  map[ims.SPI]int
	keep   int      // ESP packets of phones that are kept whole
	kept   [][]byte // a ring, the oldest at next
	next   int
	file   *os.File
	buf    *bufio.Writer
	pcap   *pcapgo.Writer
}

// Capture starts a capture; with a path, frames also go into a pcap file. It has begun when Capture returns and ends
// with Close or with the lab.
func (l *Lab) Capture(path string) (*Capture, error) {
	c := &Capture{
		path: path, done: make(chan struct{}), bySPI: make(map[ims.SPI]int),
		ues: [2]netip.Prefix{plan4.UEs, plan6.UEs},
	}
	if path != "" {
		if err := c.create(path); err != nil {
			return nil, fmt.Errorf("capture: %w", err)
		}
	}
	if err := l.GM.Do(c.listen); err != nil {
		return nil, errors.Join(fmt.Errorf("capture on %s: %w", LinkGm, err), c.closeFile())
	}
	go c.read()
	l.onClose(c.Close)
	return c, nil
}

func (c *Capture) create(path string) error {
	// The file may be decrypted with the table beside it, which an earlier run may have left.
	if err := os.Remove(path + ".esp_sa"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	c.file, c.buf = f, bufio.NewWriterSize(f, 1<<18)
	c.pcap = pcapgo.NewWriterNanos(c.buf)
	if err := c.pcap.WriteFileHeader(frameMax, layers.LinkTypeEthernet); err != nil {
		return errors.Join(err, f.Close())
	}
	return nil
}

// listen opens the packet socket. Bound with the protocol only at the end, it never sees another link.
func (c *Capture) listen() error {
	link, err := net.InterfaceByName(LinkGm)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("open packet socket: %w", err)
	}
	if err := errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, captureBuffer),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: bigEndian(unix.ETH_P_ALL), Ifindex: link.Index}),
	); err != nil {
		_ = unix.Close(fd)
		return fmt.Errorf("bind packet socket: %w", err)
	}
	c.sock = os.NewFile(uintptr(fd), "capture")
	return nil
}

// bigEndian returns v as a field in network order reads on this machine.
func bigEndian(v uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], v)
	return binary.NativeEndian.Uint16(b[:])
}

func (c *Capture) read() {
	defer close(c.done)
	b := make([]byte, frameMax)
	for {
		n, err := c.sock.Read(b)
		if err != nil {
			if errors.Is(err, unix.ENETDOWN) {
				continue // the link goes down before the namespace does
			}
			return
		}
		c.take(b[:n], time.Now())
	}
}

func (c *Capture) take(b []byte, now time.Time) {
	f := dissect(b)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pcap != nil {
		info := gopacket.CaptureInfo{Timestamp: now, CaptureLength: len(b), Length: len(b)}
		if err := c.pcap.WritePacket(info, b); err != nil && c.stats.FileErr == nil {
			c.stats.FileErr = err
		}
	}
	if keyLeak.Match(f.payload) {
		c.stats.KeyLeaks++
	}
	switch f.class {
	case ClassESP:
		if c.ues[0].Contains(f.src.Addr()) || c.ues[1].Contains(f.src.Addr()) {
			c.stats.ESPIn++
			c.keepESP(b, f)
		} else {
			c.stats.ESPOut++
		}
		c.stats.ESPBytes += len(f.payload)
		if f.fragment {
			c.stats.ESPFragments++
		}
		if f.spi != 0 {
			c.bySPI[f.spi]++
		}
		if len(c.frames) < maxFrames {
			c.frames = append(c.frames,
				ESPFrame{Time: now, Src: f.src.Addr(), Dst: f.dst.Addr(), SPI: f.spi, Len: len(f.payload)})
		} else {
			c.stats.FramesUnlisted++
		}
	case ClassClearSIP:
		c.stats.ClearSIP++
		if len(c.clear) < maxClear {
			m := ClearSIP{Time: now, Src: f.src, Dst: f.dst, Transport: f.transport, Payload: slices.Clone(f.payload)}
			m.describe()
			c.clear = append(c.clear, m)
		}
	case ClassClear:
		c.stats.Clear++
		if f.transport == ims.TCP && len(f.payload) > 0 {
			c.join(f)
		}
	case ClassOther:
		c.stats.Other++
	}
}

// joinable is how many messages back the first segment of one is looked for.
const joinable = 256

// join adds a segment to the message that it continues, the latest one between the same two ends. Segments that come twice or in another order are no matter in a test network.
func (c *Capture) join(f frame) {
	for i := len(c.clear) - 1; i >= max(0, len(c.clear)-joinable); i-- {
		m := &c.clear[i]
		if m.Transport == ims.TCP && m.Src == f.src && m.Dst == f.dst {
			m.Payload = append(slices.Clip(m.Payload), f.payload...) // Clear has given the old one away
			m.describe()
			return
		}
	}
}

// Stats returns the counters.
func (c *Capture) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.countLost()
	return c.stats
}

// countLost asks the kernel, which forgets the figure when it is read.
func (c *Capture) countLost() {
	if c.sock == nil {
		return // a capture that a test feeds by hand
	}
	raw, err := c.sock.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		if st, err := unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
			c.stats.Lost += int(st.Drops)
		}
	})
}

// Clear returns the SIP messages seen in clear so far, in order.
func (c *Capture) Clear() []ClearSIP {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.clear)
}

// Frames returns the ESP frames seen so far, in order.
func (c *Capture) Frames() []ESPFrame {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.frames)
}

// Packets returns how many ESP packets carried the SPI.
func (c *Capture) Packets(spi ims.SPI) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.bySPI[spi]
}

// Keep makes the capture keep the last n ESP packets of phones, for replays. Fragments are left out.
func (c *Capture) Keep(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.keep, c.kept, c.next = n, nil, 0
}

// keepESP keeps the IP packet of a frame.
func (c *Capture) keepESP(b []byte, f frame) {
	if c.keep == 0 || f.fragment {
		return
	}
	// What is behind the packet is padding of the link.
	p := b[etherHeader:]
	if p[0]>>4 == 4 {
		p = p[:binary.BigEndian.Uint16(p[2:])]
	} else {
		p = p[:ipv6Header+int(binary.BigEndian.Uint16(p[4:]))]
	}
	if len(c.kept) < c.keep {
		c.kept = append(c.kept, slices.Clone(p))
		return
	}
	c.kept[c.next] = append(c.kept[c.next][:0], p...)
	c.next = (c.next + 1) % c.keep
}

// Kept returns the IP packets that Keep asked for, oldest first. They may be sent again as they are.
func (c *Capture) Kept() [][]byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([][]byte, 0, len(c.kept))
	for i := range c.kept {
		out = append(out, slices.Clone(c.kept[(c.next+i)%len(c.kept)]))
	}
	return out
}

// Outgoing lets the capture see only what the daemon sends from now on: a flood towards it would be more than the capture
// can read, and frames that are lost void what CheckClear says.
func (c *Capture) Outgoing() error {
	raw, err := c.sock.SyscallConn()
	if err != nil {
		return fmt.Errorf("filter capture: %w", err)
	}
	// Load the packet's type, an ancillary field of the kernel's; take all of the packet if it is outgoing, else nothing.
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: skfAdOff + skfAdPktType},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: unix.PACKET_OUTGOING},
		{Code: unix.BPF_RET | unix.BPF_K, K: frameMax},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		failed = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
			&unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
	})
	if err = errors.Join(err, failed); err != nil {
		return fmt.Errorf("filter capture: %w", err)
	}
	return nil
}

// Settle waits until no frame has arrived for the given time, at most for max: what was sent before has been counted
// then.
func (c *Capture) Settle(quiet, limit time.Duration) {
	poll := time.NewTicker(settlePoll)
	defer poll.Stop()
	end := time.Now().Add(limit)
	last, since := -1, time.Now()
	for now := time.Now(); now.Before(end); now = time.Now() {
		c.mu.Lock()
		s := c.stats
		c.mu.Unlock()
		if n := s.ESPIn + s.ESPOut + s.ClearSIP + s.Clear; n != last {
			last, since = n, now
		} else if now.Sub(since) >= quiet {
			return
		}
		<-poll.C
	}
}

// ClearRules says what CheckClear accepts.
type ClearRules struct {
	Statuses []int // answers in clear; default: 401 only
	// Registrations bounds the distinct REGISTER requests in clear per phone, retransmissions not counted; 0 is no
	// bound.
	Registrations int
	// Also accepts further messages, for tests that send some.
	Also func(ClearSIP) bool
}

// CheckClear verifies what TS 33.203 §7.2 demands of the network tap: the only SIP in clear is each phone's REGISTER
// without a challenge response (one that reports a synchronisation failure has one, TS 33.203 §7.3.1.3) and the answer to
// it, and no message shows CK or IK.
func (c *Capture) CheckClear(r ClearRules) error {
	statuses := r.Statuses
	if statuses == nil {
		statuses = []int{401}
	}
	var problems []string
	seen := map[netip.Addr]map[string]bool{}
	for _, m := range c.Clear() {
		switch {
		case r.Also != nil && r.Also(m):
		case m.Status != 0 && m.CSeqMethod == "REGISTER" && slices.Contains(statuses, m.Status):
		case m.Method == "REGISTER" && reAnswer.Match(m.Payload) && !reSync.Match(m.Payload):
			problems = append(problems, "challenge response in clear: "+m.String())
		case m.Method == "REGISTER":
			ue := m.Src.Addr()
			if seen[ue] == nil {
				seen[ue] = map[string]bool{}
			}
			seen[ue][fmt.Sprint(m.CallID, m.CSeq, m.Branch)] = true
		default:
			problems = append(problems, "in clear: "+m.String())
		}
	}
	if r.Registrations > 0 {
		for ue, ids := range seen {
			if len(ids) > r.Registrations {
				problems = append(problems, fmt.Sprintf("%d REGISTER in clear from %s, expected %d", len(ids), ue, r.Registrations))
			}
		}
	}
	s := c.Stats()
	if s.KeyLeaks > 0 {
		problems = append(problems, fmt.Sprintf("%d frames with a readable ck or ik parameter", s.KeyLeaks))
	}
	if s.Lost > 0 {
		problems = append(problems, fmt.Sprintf("%d frames lost by the capture", s.Lost))
	}
	if s.FileErr != nil {
		problems = append(problems, "capture file: "+s.FileErr.Error())
	}
	if len(problems) > 0 {
		slices.Sort(problems)
		return errors.New(strings.Join(slices.Compact(problems), "; "))
	}
	return nil
}

// Flush writes what the file lacks, so that it can be read while the capture goes on.
func (c *Capture) Flush() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.buf == nil {
		return nil
	}
	if err := c.buf.Flush(); err != nil {
		return fmt.Errorf("write capture: %w", err)
	}
	return nil
}

// Close ends the capture and completes its file. Counters and lists stay readable. It may be called more than once.
func (c *Capture) Close() error {
	c.mu.Lock()
	c.countLost()
	c.mu.Unlock()
	_ = c.sock.Close() // already closed the second time
	<-c.done
	return c.closeFile()
}

func (c *Capture) closeFile() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.file == nil {
		return nil
	}
	err := errors.Join(c.buf.Flush(), c.file.Close())
	c.file, c.buf, c.pcap = nil, nil, nil
	if err != nil {
		return fmt.Errorf("write capture: %w", err)
	}
	return nil
}
