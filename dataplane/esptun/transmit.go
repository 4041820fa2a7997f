package esptun

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

// transmitter takes packets from the TUN to the raw sockets.
type transmitter struct {
	counters
	t    *Tunnel
	bufs [][]byte

	// Packets of the last read, filled in by readable, which runs inside the poller's call.
	sizes    [batchSize]int
	n        int
	errno    error
	readable func(fd uintptr) bool

	// Messages to send. Those from..to go through sock; writable runs inside the poller's call.
	batch    *batch
	socks    [batchSize]*rawSocket
	from, to int
	writable func(fd uintptr) bool
}

func newTransmitter(t *Tunnel) *transmitter {
	x := &transmitter{t: t, bufs: newBuffers(t.cfg.MTU), batch: newBatch()}
	x.readable, x.writable = x.readTUN, x.send
	return x
}

// run transmits until the TUN is closed.
func (x *transmitter) run() {
	for failures := 0; ; {
		if err := x.t.tun.conn.Read(x.readable); err != nil {
			return // closed
		}
		if x.errno != nil {
			if failures++; failures >= maxReadErrors {
				x.t.log.Error("TUN is broken, nothing more is sent through it", "error", x.errno)
				return
			}
		} else {
			failures = 0
		}
		queued := 0
		for i := range x.n {
			if x.protect(i, queued) {
				queued++
			}
		}
		if !x.flush(queued) {
			return
		}
	}
}

// readTUN reads packets, one per system call, until there are no more or the batch is full.
func (x *transmitter) readTUN(fd uintptr) bool {
	x.n, x.errno = 0, nil
	for x.n < batchSize {
		buf := x.bufs[x.n]
		n, err := unix.Read(int(fd), buf[headroom:len(buf)-tailroom])
		switch err {
		case nil:
			x.sizes[x.n] = n
			x.n++
		case unix.EINTR:
		case unix.EAGAIN:
			return x.n > 0
		default:
			x.errno = err
			return true
		}
	}
	return true
}

// protect seals the packet in buffer i and makes it message k of the batch. It reports false when it dropped the packet.
func (x *transmitter) protect(i, k int) bool {
	pkt, h, reason, ok := x.seal(x.bufs[i], x.sizes[i])
	if !ok {
		x.drop(reason)
		return false
	}
	m := x.batch.data(k, pkt)
	ctl := control{buf: x.batch.ctl[k][:]}
	if h.v6 {
		a := &x.batch.addr6[k]
		*a = unix.RawSockaddrInet6{Family: unix.AF_INET6, Addr: h.dst}
		m.Name, m.Namelen = (*byte)(unsafe.Pointer(a)), unix.SizeofSockaddrInet6
		copy(ctl.put(unix.IPPROTO_IPV6, unix.IPV6_PKTINFO, unix.SizeofInet6Pktinfo), h.src[:])
		if h.tos != 0 {
			binary.NativeEndian.PutUint32(ctl.put(unix.IPPROTO_IPV6, unix.IPV6_TCLASS, 4), uint32(h.tos))
		}
	} else {
		a := &x.batch.addr4[k]
		*a = unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: [4]byte(h.dst[12:])}
		m.Name, m.Namelen = (*byte)(unsafe.Pointer(a)), unix.SizeofSockaddrInet4
		// struct in_pktinfo: interface, source address, destination.
		copy(ctl.put(unix.IPPROTO_IP, unix.IP_PKTINFO, unix.SizeofInet4Pktinfo)[4:8], h.src[12:])
		if h.tos != 0 {
			binary.NativeEndian.PutUint32(ctl.put(unix.IPPROTO_IP, unix.IP_TOS, 4), uint32(h.tos))
		}
	}
	m.Control = &x.batch.ctl[k][0]
	m.SetControllen(ctl.n)
	x.socks[k] = h.sock
	return true
}

// header is what is kept of an inner packet's IP header.
type header struct {
	src, dst address
	v6       bool
	tos      byte
	sock     *rawSocket
}

// seal turns the IP packet of n octets at buf[headroom:] into an ESP packet in the same buffer.
func (x *transmitter) seal(buf []byte, n int) (pkt []byte, h header, reason Reason, ok bool) {
	off, proto, reason, ok := h.parse(buf[headroom : headroom+n])
	if !ok {
		return nil, h, reason, false
	}
	payload := buf[headroom+off : headroom+n]
	key := tuple{h.src, h.dst, binary.BigEndian.Uint16(payload), binary.BigEndian.Uint16(payload[2:])}
	sa, ok := x.t.table.out.Load(key)
	if !ok {
		return nil, h, NoSAOut, false
	}
	start := headroom + off - sa.HeadLen()
	sealed, err := sa.Seal(buf[:start], payload, proto)
	if err != nil {
		return nil, h, Exhausted, false
	}
	h.sock = sa.sock
	return sealed[start:], h, 0, true
}

// parse reads the IP header and returns where the transport header is.
func (h *header) parse(p []byte) (off int, proto byte, reason Reason, ok bool) {
	if len(p) < ipv4Len {
		return 0, 0, Malformed, false
	}
	switch p[0] >> 4 {
	case 4:
		off, proto = int(p[0]&0x0f)*4, p[9]
		if off < ipv4Len || int(binary.BigEndian.Uint16(p[2:])) != len(p) {
			return 0, 0, Malformed, false
		}
		if binary.BigEndian.Uint16(p[6:])&0x3fff != 0 { // offset or more fragments
			return 0, 0, FragmentOut, false
		}
		h.src, h.dst, h.tos = mapped(p[12:16]), mapped(p[16:20]), p[1]
	case 6:
		if len(p) < ipv6Len || int(binary.BigEndian.Uint16(p[4:]))+ipv6Len != len(p) {
			return 0, 0, Malformed, false
		}
		off, proto = ipv6Len, p[6]
		if proto == unix.IPPROTO_FRAGMENT {
			return 0, 0, FragmentOut, false
		}
		h.src, h.dst, h.v6 = address(p[8:24]), address(p[24:40]), true
		h.tos = byte(binary.BigEndian.Uint16(p) >> 4)
	default:
		return 0, 0, Malformed, false
	}
	if proto != unix.IPPROTO_UDP && proto != unix.IPPROTO_TCP {
		return 0, 0, ProtocolOut, false
	}
	if len(p) < off+udpLen {
		return 0, 0, Malformed, false
	}
	return off, proto, 0, true
}

// flush sends the first n messages, those for one socket together, and reports false when the tunnel was closed.
func (x *transmitter) flush(n int) bool {
	for x.from = 0; x.from < n; {
		s := x.socks[x.from]
		x.to = x.from + 1
		for x.to < n && x.socks[x.to] == s {
			x.to++
		}
		if err := s.conn.Write(x.writable); err != nil {
			return false // closed
		}
	}
	return true
}

// send sends messages from..to; it returns false to be called again when the socket has room.
func (x *transmitter) send(fd uintptr) bool {
	for x.from < x.to {
		n, errno := x.batch.call(unix.SYS_SENDMMSG, fd, x.from, x.to)
		switch {
		case errno == unix.EAGAIN:
			return false
		case errno != 0: // about the first message
			x.drop(SendError)
			x.from++
		default:
			for i := x.from; i < x.from+n; i++ {
				x.packetsOut.Add(1)
				x.bytesOut.Add(uint64(x.batch.hdrs[i].n))
			}
			x.from += n
		}
	}
	return true
}
