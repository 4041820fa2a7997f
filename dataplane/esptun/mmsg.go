package esptun

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mmsghdr is struct mmsghdr of recvmmsg(2) and sendmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

// batch is a vector of messages, each with one buffer, one address and room for control messages. Everything in it is
// allocated once; the kernel finds it by pointers, so a batch must not be copied.
type batch struct {
	hdrs  []mmsghdr
	iovs  []unix.Iovec
	addr4 []unix.RawSockaddrInet4
	addr6 []unix.RawSockaddrInet6
	ctl   [][controlLen]byte
}

// controlLen is room for the control messages of one packet: packet information, traffic class, hop limit. It is a
// multiple of eight, so that each element of an array of them is aligned.
const controlLen = 96

func newBatch() *batch {
	return &batch{
		hdrs: make([]mmsghdr, batchSize), iovs: make([]unix.Iovec, batchSize),
		addr4: make([]unix.RawSockaddrInet4, batchSize), addr6: make([]unix.RawSockaddrInet6, batchSize),
		ctl: make([][controlLen]byte, batchSize),
	}
}

// data sets the octets of message i.
func (b *batch) data(i int, p []byte) *unix.Msghdr {
	b.iovs[i].Base = &p[0]
	b.iovs[i].SetLen(len(p))
	h := &b.hdrs[i].hdr
	h.Iov = &b.iovs[i]
	h.SetIovlen(1)
	return h
}

// call makes a recvmmsg or sendmmsg of messages from to to.
func (b *batch) call(trap, fd uintptr, from, to int) (int, unix.Errno) {
	for {
		n, _, errno := unix.Syscall6(trap, fd, uintptr(unsafe.Pointer(&b.hdrs[from])), uintptr(to-from), unix.MSG_DONTWAIT, 0, 0)
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

// control is a writer of control messages.
type control struct {
	buf []byte
	n   int
}

// put appends a control message and returns its data, zeroed.
func (c *control) put(level, typ int32, size int) []byte {
	p := c.buf[c.n : c.n+unix.CmsgSpace(size)]
	clear(p)
	h := (*unix.Cmsghdr)(unsafe.Pointer(&p[0]))
	h.Level, h.Type = level, typ
	h.SetLen(unix.CmsgLen(size))
	c.n += len(p)
	return p[unix.CmsgLen(0):unix.CmsgLen(size)]
}

// address6 is what the control messages of a received IPv6 packet tell.
type address6 struct {
	dst      address
	class    byte
	hopLimit byte
	ok       bool // destination known
}

// readControl6 reads the control messages of a received IPv6 packet. It does not allocate, which the parser of package
// unix does.
func readControl6(oob []byte) (a address6) {
	a.hopLimit = 64
	for len(oob) >= unix.SizeofCmsghdr {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&oob[0]))
		end := int(h.Len)
		if end < unix.CmsgLen(0) || end > len(oob) {
			return a
		}
		data := oob[unix.CmsgLen(0):end]
		if h.Level == unix.IPPROTO_IPV6 {
			switch {
			case h.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
				a.dst, a.ok = address(data[:16]), true
			case h.Type == unix.IPV6_TCLASS && len(data) >= 4:
				a.class = byte(binary.NativeEndian.Uint32(data))
			case h.Type == unix.IPV6_HOPLIMIT && len(data) >= 4:
				a.hopLimit = byte(binary.NativeEndian.Uint32(data))
			}
		}
		oob = oob[min(unix.CmsgSpace(len(data)), len(oob)):]
	}
	return a
}
