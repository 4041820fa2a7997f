package sipmsg

import "bytes"

// FrameKind says what stands at the start of a stream buffer.
type FrameKind uint8

// Frame kinds.
const (
	FrameNone    FrameKind = iota // not complete: read more
	FrameMessage                  // a SIP message
	FramePing                     // CRLF CRLF, to be answered by CRLF (RFC 5626 §4.4.1)
	FrameBlank                    // an empty line, or blank datagram, to be skipped (RFC 3261 §7.5)
	FrameBad                      // the stream cannot be understood any more: close it
)

var frameKindNames = [...]string{"none", "message", "ping", "blank", "bad"}

// String returns a name for logs.
func (k FrameKind) String() string {
	if int(k) < len(frameKindNames) {
		return frameKindNames[k]
	}
	return "unknown"
}

// maxMethod bounds what is taken for a method before the first space has arrived. The longest one of RFC 4475 has 43.
const maxMethod = 64

// Frame looks at the bytes b read from a stream so far and finds what stands at their start. n is the number of bytes
// that this occupies: those of the message, ping or empty line. For FrameNone it is 0. For FrameBad it is the length of
// the header if that is complete, else len(b), and err says why. limit bounds a message including its header.
//
// The result for a stream does not depend on where reads have cut it. A lone CRLF at the end of b is FrameNone, because
// it can be the first half of a ping; a pong therefore stays in the buffer until something follows.
func Frame(b []byte, limit int) (kind FrameKind, n int, err *Error) {
	if len(b) == 0 {
		return FrameNone, 0, nil
	}
	switch b[0] {
	case '\n':
		return FrameBlank, 1, nil
	case '\r':
		switch {
		case len(b) > 1 && b[1] != '\n':
			return FrameBad, len(b), ErrStartLine
		case len(b) < 3 || (b[2] == '\r' && len(b) == 3):
			return FrameNone, 0, nil
		case b[2] == '\r' && b[3] == '\n':
			return FramePing, 4, nil
		}
		return FrameBlank, 2, nil
	}
	if !plausibleStart(b) {
		return FrameBad, len(b), ErrStartLine
	}
	h := b
	if len(h) > limit {
		if limit <= 0 {
			return FrameBad, len(b), ErrTooLarge
		}
		h = h[:limit]
	}
	end, length, have, err := frameHeader(h)
	switch {
	case err != nil:
		if end == 0 {
			end = len(b)
		}
		return FrameBad, end, err
	case end == 0 && len(b) >= limit:
		return FrameBad, len(b), ErrTooLarge
	case end == 0:
		return FrameNone, 0, nil
	case !have:
		return FrameBad, end, ErrNoContentLength
	case uint64(length) > uint64(limit-end):
		return FrameBad, end, ErrTooLarge
	case len(b)-end < int(length):
		return FrameNone, 0, nil
	}
	return FrameMessage, end + int(length), nil
}

// plausibleStart tells a SIP start line from garbage (TLS, HTTP/2, binary) by what has arrived of its first word.
func plausibleStart(b []byte) bool {
	if len(b) > maxMethod+1 {
		b = b[:maxMethod+1]
	}
	i := span(b, 0, ccToken)
	if i == len(b) {
		return i <= maxMethod
	}
	return i > 0 && (b[i] == ' ' || (b[i] == '/' && i == 3 && EqualFold(b[:i], "SIP")))
}

// frameHeader walks over the header at the start of b. end is the offset of the body, 0 while the header is not
// complete; length the value of Content-Length if have is set.
func frameHeader(b []byte) (end int, length uint32, have bool, err *Error) {
	p := bytes.IndexByte(b, '\n') + 1
	if p == 0 {
		return 0, 0, false, nil
	}
	if !isStartLine(b[:p]) {
		return 0, 0, false, ErrStartLine
	}
	var r Row
	for p < len(b) {
		c := b[p]
		if c == '\n' {
			return p + 1, length, have, err
		}
		if c == '\r' {
			if p+1 == len(b) {
				return 0, 0, false, nil
			}
			if b[p+1] == '\n' {
				return p + 2, length, have, err
			}
		}
		start := p
		for {
			i := bytes.IndexByte(b[p:], '\n')
			if i < 0 {
				return 0, 0, false, nil
			}
			p += i + 1
			if p == len(b) {
				return 0, 0, false, nil // it takes one more byte to know whether the row goes on
			}
			if b[p] != ' ' && b[p] != '\t' {
				break
			}
		}
		if c |= 0x20; c != 'c' && c != 'l' {
			continue
		}
		if !scanRow(&r, b, start, p) || r.ID != ContentLength {
			continue
		}
		n, ok := ParseUint(b[r.ValStart:r.ValEnd])
		switch {
		case !ok:
			err = ErrContentLength
		case have && n != length:
			err = ErrContentLength // two lengths: somebody else could cut elsewhere
		}
		length, have = n, true
	}
	return 0, 0, false, nil
}

// isStartLine tells a line that mentions SIP/x from other protocols. Scan judges its grammar, so that a slightly
// malformed request can still be answered.
func isStartLine(line []byte) bool {
	if line[0]|0x20 == 's' && len(line) > 4 && EqualFold(line[:4], "SIP/") {
		return true
	}
	line = trimLWS(line)
	i := bytes.LastIndexByte(line, ' ')
	return i > 0 && len(line)-i > 4 && EqualFold(line[i+1:i+5], "SIP/")
}

// Datagram looks at a whole datagram. A message is returned from its start line on: empty lines before it are skipped
// (RFC 3261 §7.5). CRLF CRLF is a ping; a datagram of nothing but line ends, blanks and NULs, which phones send to keep
// NAT bindings alive, is blank. A message is not examined: Scan does that, Content-Length being optional here.
func Datagram(b []byte) (kind FrameKind, msg []byte) {
	if len(b) > 0 && classes[b[0]]&ccToken != 0 {
		return FrameMessage, b
	}
	if string(b) == "\r\n\r\n" {
		return FramePing, nil
	}
	i := 0
	for i < len(b) && (b[i] == 0 || isLWS(b[i])) {
		i++
	}
	if i == len(b) {
		return FrameBlank, nil
	}
	for i = 0; b[i] == '\r' || b[i] == '\n'; i++ { // ends: a byte is left that is not a line end
	}
	return FrameMessage, b[i:]
}
