package lab

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"regexp"
	"strconv"

	"github.com/gmgate/gmgate/control/ims"
)

// Class is what a frame on the Gm link turned out to be.
type Class uint8

// Classes.
const (
	ClassESP      Class = iota + 1 // RFC 4303, fragments of it included
	ClassClearSIP                  // UDP or TCP that starts with a SIP start line, or continues on a TCP port of SIP
	ClassClear                     // other UDP or TCP: handshakes of TCP, keep-alives, garbage
	ClassOther                     // ARP, ICMP, neighbour discovery
)

// String names the class.
func (c Class) String() string {
	switch c {
	case ClassESP:
		return "esp"
	case ClassClearSIP:
		return "clear_sip"
	case ClassClear:
		return "clear"
	case ClassOther:
		return "other"
	}
	return "Class(" + strconv.Itoa(int(c)) + ")"
}

// frame is a dissected Ethernet frame. Slices point into it.
type frame struct {
	class     Class
	src, dst  netip.AddrPort // ports are zero for what has none
	transport ims.Transport
	spi       ims.SPI // zero in later fragments
	fragment  bool
	payload   []byte // of ESP from the SPI on, of UDP and TCP the data
}

// Numbers of IEEE 802.3 and IANA.
const (
	etherHeader  = 14
	etherIPv4    = 0x0800
	etherIPv6    = 0x86dd
	protoTCP     = 6
	protoUDP     = 17
	protoESP     = 50
	extHopByHop  = 0
	extRouting   = 43
	extFragment  = 44
	extDestOpts  = 60
	ipv6Header   = 40
	moreFragment = 0x2000
	offsetMask   = 0x1fff
)

// dissect classifies a frame. Nothing in it is trusted: whatever does not add up is ClassOther.
func dissect(b []byte) frame {
	f := frame{class: ClassOther}
	if len(b) < etherHeader {
		return f
	}
	var proto byte
	var src, dst netip.Addr
	first := true // the part that holds the transport header
	p := b[etherHeader:]
	switch binary.BigEndian.Uint16(b[12:]) {
	case etherIPv4:
		if len(p) < 20 || p[0]>>4 != 4 {
			return f
		}
		header, total := int(p[0]&15)*4, int(binary.BigEndian.Uint16(p[2:]))
		if header < 20 || total < header || total > len(p) {
			return f
		}
		frag := binary.BigEndian.Uint16(p[6:])
		f.fragment, first = frag&(moreFragment|offsetMask) != 0, frag&offsetMask == 0
		proto = p[9]
		src, dst = netip.AddrFrom4([4]byte(p[12:])), netip.AddrFrom4([4]byte(p[16:]))
		p = p[header:total]
	case etherIPv6:
		if len(p) < ipv6Header || p[0]>>4 != 6 {
			return f
		}
		total := ipv6Header + int(binary.BigEndian.Uint16(p[4:]))
		if total > len(p) {
			return f
		}
		proto = p[6]
		src, dst = netip.AddrFrom16([16]byte(p[8:])), netip.AddrFrom16([16]byte(p[24:]))
		p = p[ipv6Header:total]
		for proto == extHopByHop || proto == extRouting || proto == extFragment || proto == extDestOpts {
			if len(p) < 8 {
				return f
			}
			size := 8
			if proto == extFragment {
				f.fragment, first = true, binary.BigEndian.Uint16(p[2:])&^7 == 0
			} else {
				size += int(p[1]) * 8
			}
			if len(p) < size {
				return f
			}
			proto, p = p[0], p[size:]
			if !first {
				break // what follows is the middle of the packet
			}
		}
	default:
		return f
	}
	f.src, f.dst = netip.AddrPortFrom(src, 0), netip.AddrPortFrom(dst, 0)
	switch proto {
	case protoESP:
		f.class, f.payload = ClassESP, p
		if first && len(p) >= 8 {
			f.spi = ims.SPI(binary.BigEndian.Uint32(p))
		}
	case protoUDP, protoTCP:
		f.class = ClassClear
		f.transport = ims.UDP
		if proto == protoTCP {
			f.transport = ims.TCP
		}
		if !first {
			f.payload = p // the first part has said what it is; keys are still looked for
			return f
		}
		size := 8
		if proto == protoTCP {
			if len(p) < 20 {
				return f
			}
			size = int(p[12]>>4) * 4
		}
		if len(p) < size {
			return f
		}
		f.src = netip.AddrPortFrom(src, binary.BigEndian.Uint16(p))
		f.dst = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(p[2:]))
		f.payload = p[size:]
		if isSIP(f.payload) {
			f.class = ClassClearSIP
		}
	}
	return f
}

var sipVersion = []byte("SIP/2.0")

// isSIP reports whether data begins with a SIP start line, empty lines before it ignored (RFC 3261 §7.5).
func isSIP(b []byte) bool {
	b = bytes.TrimLeft(b, "\r\n")
	line, _, _ := bytes.Cut(b, []byte("\n"))
	line = bytes.TrimRight(line, "\r")
	return bytes.HasPrefix(line, sipVersion) || bytes.HasSuffix(line, append([]byte(" "), sipVersion...))
}

// keyLeak finds a ck or ik parameter with something that looks like a key. Random octets do not match it by accident.
var keyLeak = regexp.MustCompile(`(?i)\b[ci]k[ \t]*=[ \t]*"?[0-9a-f]{16,}`)

var (
	reCSeq   = regexp.MustCompile(`(?im)^CSeq[ \t]*:[ \t]*(\d+)[ \t]+(\S+)`)
	reCallID = regexp.MustCompile(`(?im)^(?:Call-ID|i)[ \t]*:[ \t]*(\S+)`)
	reBranch = regexp.MustCompile(`(?im)^(?:Via|v)[ \t]*:.*?;[ \t]*branch=([^;,\s]+)`)
	reSync   = regexp.MustCompile(`(?im)^Authorization[ \t]*:.*\bauts[ \t]*=`)
	reAnswer = regexp.MustCompile(`(?im)^Authorization[ \t]*:.*\bresponse[ \t]*=[ \t]*"[^"]+"`)
)

// describe fills in what a clear SIP message says about itself. The expressions are enough for assertions about the
// few messages that may travel in clear; they are no parser.
func (m *ClearSIP) describe() {
	start, _, _ := bytes.Cut(bytes.TrimLeft(m.Payload, "\r\n"), []byte("\n"))
	fields := bytes.Fields(start)
	if len(fields) >= 2 && bytes.EqualFold(fields[0], sipVersion) {
		m.Status, _ = strconv.Atoi(string(fields[1]))
	} else if len(fields) >= 1 {
		m.Method = string(fields[0])
	}
	if s := reCSeq.FindSubmatch(m.Payload); s != nil {
		n, _ := strconv.ParseUint(string(s[1]), 10, 32)
		m.CSeq, m.CSeqMethod = uint32(n), string(s[2])
	}
	if s := reCallID.FindSubmatch(m.Payload); s != nil {
		m.CallID = string(s[1])
	}
	if s := reBranch.FindSubmatch(m.Payload); s != nil {
		m.Branch = string(s[1])
	}
}
