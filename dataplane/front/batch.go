package front

import (
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Implementation constants. More than 64 datagrams per call gain nothing (measured), and the limit of four calls keeps
// one busy socket from starving the others of its loop.
const (
	batchSize  = 64
	maxBatches = 4

	// arenaSize is what a worker may queue for sending before it flushes: several batches of ordinary messages.
	arenaSize = 512 << 10

	// stagger is added between receive buffers. Buffers exactly 64 KiB apart would share the same few cache sets.
	stagger = 17 * 64

	sizeofName    = unix.SizeofSockaddrInet6
	sizeofControl = int(unsafe.Sizeof(control{}))
)

// control has room for the one control message that our sockets ask for, SO_RCVMARK.
type control struct {
	hdr  unix.Cmsghdr
	mark uint32
	_    uint32 // the kernel rounds up
}

// maxDatagram is the largest UDP payload over IPv4; over IPv6 it is 20 octets more, which nobody will miss.
const maxDatagram = 65507

// receiver reads datagrams in batches. One serves all sockets of a worker.
type receiver struct {
	hdr  [batchSize]unix.Mmsghdr
	iov  [batchSize]unix.Iovec
	name [batchSize]unix.RawSockaddrInet6
	ctl  [batchSize]control
	buf  [batchSize][]byte
}

// newReceiver makes a receiver for datagrams of at most size octets.
func newReceiver(size int) *receiver {
	r := new(receiver)
	stride := (size+63)&^63 + stagger
	mem := make([]byte, batchSize*stride)
	for i := range r.hdr {
		r.buf[i] = mem[i*stride : i*stride+size : i*stride+size]
		r.iov[i].Base = &r.buf[i][0]
		r.iov[i].SetLen(size)
		h := &r.hdr[i].Hdr
		h.Iov = &r.iov[i]
		h.SetIovlen(1)
		h.Name = (*byte)(unsafe.Pointer(&r.name[i]))
		h.Namelen = sizeofName
		h.Control = (*byte)(unsafe.Pointer(&r.ctl[i]))
		h.SetControllen(sizeofControl)
	}
	return r
}

// read takes what is queued at the socket and returns the number of datagrams. It does not block.
func (r *receiver) read(fd int) (int, unix.Errno) {
	// RawSyscall: the call never blocks, and handing the processor over to another thread, which the scheduler may do
	// during a Syscall, costs more than the call.
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&r.hdr[0])), batchSize,
		unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// datagram returns the i-th datagram of the batch and makes its slot ready for the next read. The octets are valid until
// then. label is the packet's mark, 0 if the socket does not tell.
func (r *receiver) datagram(i int) (remote netip.AddrPort, msg []byte, label uint32, truncated bool) {
	h := &r.hdr[i]
	truncated = h.Hdr.Flags&unix.MSG_TRUNC != 0
	remote = addrPort(&r.name[i])
	h.Hdr.Namelen = sizeofName
	if h.Hdr.Controllen > 0 {
		label = r.ctl[i].label()
	}
	h.Hdr.SetControllen(sizeofControl)
	n := h.Len
	return remote, r.buf[i][:n:n], label, truncated
}

// label returns the mark that a control message carries, 0 if it is about something else.
func (c *control) label() uint32 {
	if c.hdr.Level != unix.SOL_SOCKET || c.hdr.Type != unix.SO_MARK || int(c.hdr.Len) != unix.CmsgLen(4) { //nolint:gosec // G115: at most the buffer's
		return 0
	}
	return c.mark
}

// addrPort converts a socket address without allocation. The scope of a link-local address is not kept.
func addrPort(sa *unix.RawSockaddrInet6) netip.AddrPort {
	port := (*[2]byte)(unsafe.Pointer(&sa.Port))
	p := uint16(port[0])<<8 | uint16(port[1])
	switch sa.Family {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(sa)).Addr), p)
	case unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), p)
	}
	return netip.AddrPort{}
}

// setName writes a socket address and returns its length.
func setName(sa *unix.RawSockaddrInet6, a netip.AddrPort) uint32 {
	port := (*[2]byte)(unsafe.Pointer(&sa.Port))
	port[0], port[1] = byte(a.Port()>>8), byte(a.Port())
	if a.Addr().Is4() {
		sa4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(sa))
		sa4.Family = unix.AF_INET
		sa4.Addr = a.Addr().As4()
		sa4.Zero = [8]uint8{}
		return unix.SizeofSockaddrInet4
	}
	sa.Family = unix.AF_INET6
	sa.Flowinfo, sa.Scope_id = 0, 0
	sa.Addr = a.Addr().As16()
	return unix.SizeofSockaddrInet6
}

// sendQueue holds datagrams that wait to be sent from one socket. The octets are in the worker's arena.
type sendQueue struct {
	hdr  [batchSize]unix.Mmsghdr
	iov  [batchSize]unix.Iovec
	name [batchSize]unix.RawSockaddrInet6
	n    int
}

func newSendQueue() *sendQueue {
	q := new(sendQueue)
	for i := range q.hdr {
		h := &q.hdr[i].Hdr
		h.Iov = &q.iov[i]
		h.SetIovlen(1)
		h.Name = (*byte)(unsafe.Pointer(&q.name[i]))
	}
	return q
}

// add appends a datagram. There is room, and msg is not empty.
func (q *sendQueue) add(remote netip.AddrPort, msg []byte) {
	i := q.n
	q.n++
	q.hdr[i].Hdr.Namelen = setName(&q.name[i], remote)
	q.iov[i].Base = &msg[0]
	q.iov[i].SetLen(len(msg))
}

// sent is told of each datagram: errno is 0 if the kernel took it.
type sent func(n int, errno unix.Errno)

// flush sends everything and empties the queue. A datagram that the kernel refuses is skipped; when the send buffer is
// full the rest is dropped, since waiting would stop the loop. It returns the number of calls.
func (q *sendQueue) flush(fd int, report sent) (calls int) {
	for at := 0; at < q.n; {
		r, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&q.hdr[at])),
			uintptr(q.n-at), unix.MSG_DONTWAIT, 0, 0)
		calls++
		switch {
		case errno == unix.EINTR:
		case errno == unix.EAGAIN:
			for ; at < q.n; at++ {
				report(q.length(at), errno)
			}
		case errno != 0: // about the first one; what follows may well go to somebody else
			report(q.length(at), errno)
			at++
		default:
			for end := at + int(r); at < end; at++ {
				report(q.length(at), 0)
			}
		}
	}
	q.n = 0
	return calls
}

func (q *sendQueue) length(i int) int { return int(q.iov[i].Len) } //nolint:gosec // G115: set from an int
