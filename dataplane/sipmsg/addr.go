package sipmsg

import (
	"bytes"
	"net/netip"
)

// ParseAddr reads an IPv4 or IPv6 address without brackets and without a zone. It accepts what netip.ParseAddr
// accepts of these, without converting to string and without allocating an error.
func ParseAddr(b []byte) (netip.Addr, bool) {
	if bytes.IndexByte(b, ':') < 0 {
		a, ok := parse4(b)
		if !ok {
			return netip.Addr{}, false
		}
		return netip.AddrFrom4(a), true
	}
	return parse6(b)
}

func parse4(b []byte) (a [4]byte, ok bool) {
	k, digits, n := 0, 0, 0
	for _, c := range b {
		switch {
		case c >= '0' && c <= '9':
			if digits > 0 && n == 0 { // leading zero: octal for some
				return a, false
			}
			n = n*10 + int(c-'0')
			if digits++; n > 255 {
				return a, false
			}
		case c == '.' && digits > 0 && k < 3:
			a[k] = byte(n)
			k++
			digits, n = 0, 0
		default:
			return a, false
		}
	}
	if k != 3 || digits == 0 {
		return a, false
	}
	a[3] = byte(n)
	return a, true
}

func parse6(b []byte) (netip.Addr, bool) {
	var a [16]byte
	gap := -1 // where "::" stands, in bytes of a
	n := 0
	if len(b) >= 2 && b[0] == ':' {
		if b[1] != ':' {
			return netip.Addr{}, false
		}
		gap = 0
		b = b[2:]
	}
	for len(b) > 0 {
		if n == 16 {
			return netip.Addr{}, false
		}
		v, i := uint32(0), 0
		for ; i < len(b) && classes[b[i]]&ccIP6 != 0 && b[i] != ':' && b[i] != '.'; i++ {
			c := b[i]
			if c > '9' {
				c = c | 0x20 - 'a' + 10
			} else {
				c -= '0'
			}
			if v = v<<4 | uint32(c); i >= 4 {
				return netip.Addr{}, false
			}
		}
		if i == 0 {
			return netip.Addr{}, false
		}
		if i < len(b) && b[i] == '.' { // an IPv4 address as the last 32 bits
			v4, ok := parse4(b)
			if !ok || n > 12 || (gap < 0 && n != 12) {
				return netip.Addr{}, false
			}
			n += copy(a[n:], v4[:])
			break
		}
		a[n], a[n+1] = byte(v>>8), byte(v)
		n += 2
		if b = b[i:]; len(b) == 0 {
			break
		}
		if b[0] != ':' || len(b) == 1 {
			return netip.Addr{}, false
		}
		if b = b[1:]; b[0] == ':' {
			if gap >= 0 {
				return netip.Addr{}, false
			}
			gap = n
			b = b[1:]
		}
	}
	if n < 16 {
		if gap < 0 {
			return netip.Addr{}, false
		}
		k := 16 - n
		copy(a[gap+k:], a[gap:n])
		clear(a[gap : gap+k])
	} else if gap >= 0 {
		return netip.Addr{}, false // "::" stands for at least one group
	}
	return netip.AddrFrom16(a), true
}
