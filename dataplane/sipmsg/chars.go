package sipmsg

import (
	"encoding/binary"
	"math/bits"
)

// Character classes of RFC 3261 §25.1, one bit each.
const (
	ccToken = 1 << iota // token
	ccLWS               // SP HTAB CR LF; Scan has made sure that CR LF only stand in folds
	ccURI               // anything that may stand in a URI on the wire, UTF-8 tolerated
	ccHost              // hostname or IPv4 address, '_' tolerated
	ccIP6               // IPv6 reference without brackets
	ccDigit
)

var classes = func() (t [256]uint8) {
	for c := range 256 {
		b := byte(c)
		alpha := b|0x20 >= 'a' && b|0x20 <= 'z'
		digit := b >= '0' && b <= '9'
		if alpha || digit {
			t[c] |= ccToken | ccHost
		}
		if digit {
			t[c] |= ccDigit
		}
		if digit || (b|0x20 >= 'a' && b|0x20 <= 'f') {
			t[c] |= ccIP6
		}
		if c > ' ' && c != 0x7f {
			t[c] |= ccURI
		}
	}
	for _, c := range []byte("-.!%*_+`'~") {
		t[c] |= ccToken
	}
	for _, c := range []byte("-._") {
		t[c] |= ccHost
	}
	for _, c := range []byte(":.") {
		t[c] |= ccIP6
	}
	for _, c := range []byte(" \t\r\n") {
		t[c] |= ccLWS
	}
	for _, c := range []byte("<>\"") {
		t[c] &^= ccURI
	}
	return t
}()

func isLWS(c byte) bool { return classes[c]&ccLWS != 0 }

// span returns the first index from i whose byte is not of the class.
func span(b []byte, i int, class uint8) int {
	for i < len(b) && classes[b[i]]&class != 0 {
		i++
	}
	return i
}

func all(b []byte, class uint8) bool { return span(b, 0, class) == len(b) }

func trimLWS(b []byte) []byte {
	for len(b) > 0 && isLWS(b[0]) {
		b = b[1:]
	}
	for len(b) > 0 && isLWS(b[len(b)-1]) {
		b = b[:len(b)-1]
	}
	return b
}

// indexColon returns the first ':' in b[s:e], or -1. Eight bytes at a time: a call into the assembly of bytes.IndexByte
// costs more than the one or two words a header name takes.
func indexColon(b []byte, s, e int) int {
	const ones, highs, colons = 0x0101010101010101, 0x8080808080808080, 0x3a3a3a3a3a3a3a3a
	for ; s+8 <= len(b) && s < e; s += 8 {
		x := binary.LittleEndian.Uint64(b[s:]) ^ colons
		if t := (x - ones) &^ x & highs; t != 0 {
			if s += bits.TrailingZeros64(t) >> 3; s < e {
				return s
			}
			return -1
		}
	}
	for ; s < e; s++ {
		if b[s] == ':' {
			return s
		}
	}
	return -1
}

// EqualFold reports whether b and s are equal, ASCII letters compared without regard to case.
func EqualFold(b []byte, s string) bool {
	if len(b) != len(s) {
		return false
	}
	for i := range b {
		if c, d := b[i], s[i]; c != d && (c|0x20 != d|0x20 || c|0x20 < 'a' || c|0x20 > 'z') {
			return false
		}
	}
	return true
}

// ParseUint reads a decimal number that fills b and fits in 32 bits.
func ParseUint(b []byte) (uint32, bool) {
	if len(b) == 0 {
		return 0, false
	}
	var n uint64
	for _, c := range b {
		if c -= '0'; c > 9 {
			return 0, false
		} else if n = n*10 + uint64(c); n > 1<<32-1 {
			return 0, false
		}
	}
	return uint32(n), true
}

// parsePort reads a port number 1..65535.
func parsePort(b []byte) (uint16, bool) {
	n, ok := ParseUint(b)
	return uint16(n), ok && n > 0 && n < 1<<16
}
