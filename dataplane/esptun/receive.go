package esptun

import (
	"encoding/binary"
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/dataplane/esp"
)

// Lengths of headers.
const (
	ipv4Len = 20
	ipv6Len = 40
	udpLen  = 8
	tcpLen  = 20
)

// maxReadErrors is how many times in a row a socket may report an error of its own before its goroutine gives up. Errors
// that the kernel notes at a socket are gone once read, so more than a few mean that it is broken.
const maxReadErrors = 64

// receiver takes ESP packets from one raw socket to the TUN.
type receiver struct {
	counters
	t     *Tunnel
	sock  *rawSocket
	batch *batch
	bufs  [][]byte

	// Result of the last read, filled in by readable, which runs inside the poller's call.
	n        int
	errno    unix.Errno
	readable func(fd uintptr) bool
}

func newReceiver(t *Tunnel, s *rawSocket) *receiver {
	r := &receiver{t: t, sock: s, batch: newBatch(), bufs: newBuffers(t.cfg.MTU)}
	r.readable = func(fd uintptr) bool {
		r.n, r.errno = r.batch.call(unix.SYS_RECVMMSG, fd, 0, batchSize)
		return r.errno != unix.EAGAIN
	}
	for i := range batchSize {
		r.reset(i)
	}
	return r
}

// newBuffers allocates a batch's buffers, each large enough for an IP packet of the MTU with ESP around it.
func newBuffers(mtu int) [][]byte {
	size := headroom + mtu + tailroom
	slab := make([]byte, batchSize*size)
	bufs := make([][]byte, batchSize)
	for i := range bufs {
		bufs[i] = slab[i*size : (i+1)*size : (i+1)*size]
	}
	return bufs
}

// reset prepares message i for recvmmsg, which overwrites lengths.
func (r *receiver) reset(i int) {
	h := r.batch.data(i, r.bufs[i][headroom:])
	h.Flags = 0
	if r.sock.v6 {
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(&r.batch.addr6[i])), unix.SizeofSockaddrInet6
		h.Control = &r.batch.ctl[i][0]
		h.SetControllen(controlLen)
	}
}

// run receives until the socket is closed.
func (r *receiver) run() {
	for failures := 0; ; {
		if err := r.sock.conn.Read(r.readable); err != nil {
			return // closed
		}
		if r.errno != 0 {
			if failures++; failures >= maxReadErrors {
				r.t.log.Error("raw ESP socket is broken, nothing more is received on it", "error", r.errno)
				return
			}
			continue
		}
		failures = 0
		for i := range r.n {
			if !r.deliver(i) {
				return
			}
			r.reset(i)
		}
	}
}

// deliver handles message i and reports false when the tunnel was closed.
func (r *receiver) deliver(i int) bool {
	m := &r.batch.hdrs[i]
	if m.hdr.Flags&unix.MSG_TRUNC != 0 {
		r.drop(TooLong)
		return true
	}
	buf := r.bufs[i]
	var inner []byte
	var reason Reason
	var ok bool
	if r.sock.v6 {
		a := readControl6(r.batch.ctl[i][:m.hdr.Controllen])
		inner, reason, ok = r.accept6(buf, int(m.n), address(r.batch.addr6[i].Addr), a)
	} else {
		inner, reason, ok = r.accept4(buf, int(m.n))
	}
	if !ok {
		r.drop(reason)
		return true
	}
	if _, err := r.t.tun.file.Write(inner); err != nil {
		if errors.Is(err, os.ErrClosed) {
			return false
		}
		r.drop(TUNWrite)
		return true
	}
	r.packetsIn.Add(1)
	r.bytesIn.Add(uint64(m.n))
	return true
}

// accept4 handles an IPv4 packet, which the raw socket delivers with its header, at buf[headroom:]. It returns the inner
// packet.
func (r *receiver) accept4(buf []byte, n int) (inner []byte, reason Reason, ok bool) {
	p := buf[headroom : headroom+n]
	if n < ipv4Len {
		return nil, Short, false
	}
	ihl := int(p[0]&0x0f) * 4
	if ihl < ipv4Len || ihl > n {
		return nil, Short, false
	}
	tos, ttl := p[1], p[8]
	src, dst := mapped(p[12:16]), mapped(p[16:20])
	payload, next, reason, ok := r.open(p[ihl:], src, dst)
	if !ok {
		return nil, reason, false
	}
	// The payload stands at least an ESP header behind an IPv4 header, so there is room for the new one.
	end := headroom + ihl + espOffset(p[ihl:], payload) + len(payload)
	start := end - len(payload) - ipv4Len
	h := buf[start : start+ipv4Len]
	h[0], h[1] = 0x45, tos
	binary.BigEndian.PutUint16(h[2:], uint16(end-start))
	binary.BigEndian.PutUint32(h[4:], 0x4000) // no identification, don't fragment
	h[8], h[9] = ttl, next
	h[10], h[11] = 0, 0
	copy(h[12:16], src[12:])
	copy(h[16:20], dst[12:])
	binary.BigEndian.PutUint16(h[10:], headerChecksum(h))
	return buf[start:end], 0, true
}

// accept6 handles an IPv6 packet, which the raw socket delivers without its header.
func (r *receiver) accept6(buf []byte, n int, src address, a address6) (inner []byte, reason Reason, ok bool) {
	if !a.ok {
		return nil, Short, false
	}
	p := buf[headroom : headroom+n]
	payload, next, reason, ok := r.open(p, src, a.dst)
	if !ok {
		return nil, reason, false
	}
	end := headroom + espOffset(p, payload) + len(payload)
	start := end - len(payload) - ipv6Len
	h := buf[start : start+ipv6Len]
	binary.BigEndian.PutUint32(h, 6<<28|uint32(a.class)<<20)
	binary.BigEndian.PutUint16(h[4:], uint16(len(payload)))
	h[6], h[7] = next, a.hopLimit
	copy(h[8:24], src[:])
	copy(h[24:40], a.dst[:])
	return buf[start:end], 0, true
}

// espOffset returns where in the ESP packet its payload starts.
func espOffset(pkt, payload []byte) int { return cap(pkt) - cap(payload) }

// open finds the SA, opens the packet and checks the selector.
func (r *receiver) open(pkt []byte, src, dst address) (payload []byte, next byte, reason Reason, ok bool) {
	spi, ok := esp.PacketSPI(pkt)
	if !ok {
		return nil, 0, Short, false
	}
	sa, ok := r.t.table.in.Load(inboundKey{dst, spi})
	if !ok {
		return nil, 0, UnknownSPI, false
	}
	payload, next, err := sa.Open(pkt)
	if err != nil {
		return nil, 0, openReason(err), false
	}
	least := udpLen
	switch next {
	case unix.IPPROTO_UDP:
	case unix.IPPROTO_TCP:
		least = tcpLen
	default: // also dummy packets, next header 59 (RFC 4303 §2.6), and an IPv6 fragment header
		return nil, 0, NextHeader, false
	}
	if len(payload) < least {
		return nil, 0, Short, false
	}
	// RFC 4303 §3.4.4: the packet must match the SA's selector. Transport mode carries no inner header, so there are no
	// inner fragments, and the outer ones have been put together by the kernel.
	got := tuple{src, dst, binary.BigEndian.Uint16(payload), binary.BigEndian.Uint16(payload[2:])}
	if got != sa.selector {
		return nil, 0, Selector, false
	}
	return payload, next, 0, true
}

func openReason(err error) Reason {
	switch {
	case errors.Is(err, esp.ErrReplay):
		return Replay
	case errors.Is(err, esp.ErrICV):
		return ICV
	case errors.Is(err, esp.ErrPadding):
		return Padding
	}
	return Short
}

// mapped returns an IPv4 address as an address.
func mapped(b []byte) address {
	return address{10: 0xff, 11: 0xff, 12: b[0], 13: b[1], 14: b[2], 15: b[3]}
}

// headerChecksum is the checksum of an IPv4 header whose checksum field is zero (RFC 791 §3.1).
func headerChecksum(h []byte) uint16 {
	var sum uint32
	for i := 0; i < len(h); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(h[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
