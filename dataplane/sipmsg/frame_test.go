package sipmsg_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/gmgate/gmgate/dataplane/sipmsg"
	"github.com/gmgate/gmgate/dataplane/sipmsg/sipmsgtest"
)

const maxMessage = 65535

func TestFrame(t *testing.T) {
	const full = "MESSAGE sip:a@b SIP/2.0\nl: 5\n\nhello"
	head := strings.Replace(full, "\nhello", "\n", 1)
	type want struct {
		kind sipmsg.FrameKind
		n    int // -1: length of the header up to the body, -2: everything
		err  error
	}
	bad := func(n int, err error) want { return want{sipmsg.FrameBad, n, err} }
	none := want{sipmsg.FrameNone, 0, nil}
	tests := []struct {
		name string
		in   string // \n stands for CRLF
		max  int
		want want
	}{
		{"empty", "", maxMessage, none},
		{"message", full, maxMessage, want{sipmsg.FrameMessage, -2, nil}},
		{"two messages", full + full, maxMessage, want{sipmsg.FrameMessage, len(crlf(full)), nil}},
		{"exactly max", full, len(crlf(full)), want{sipmsg.FrameMessage, -2, nil}},
		{"body missing", head + "hell", maxMessage, none},
		{"header incomplete", "MESSAGE sip:a@b SIP/2.0\nl: 5\n", maxMessage, none},
		{"header ends in CR", "MESSAGE sip:a@b SIP/2.0\nl: 5\n\r", maxMessage, none},
		{"start line incomplete", "MESSAGE sip:a@b", maxMessage, none},
		{"method incomplete", "MESS", maxMessage, none},
		{"response", "SIP/2.0 200 OK\nContent-Length : 0\n\n", maxMessage, want{sipmsg.FrameMessage, -2, nil}},
		{"response incomplete", "SIP/2.0", maxMessage, none},
		{"folded length", "MESSAGE sip:a@b SIP/2.0\nContent-Length:\n 5\n\nhello", maxMessage, want{sipmsg.FrameMessage, -2, nil}},
		{"length in a fold", "MESSAGE sip:a@b SIP/2.0\nX: y\n Content-Length: 9\nl: 5\n\nhello", maxMessage, want{sipmsg.FrameMessage, -2, nil}},
		{"two equal lengths", "MESSAGE sip:a@b SIP/2.0\nl: 5\nContent-Length: 5\n\nhello", maxMessage, want{sipmsg.FrameMessage, -2, nil}},
		{"two lengths", "MESSAGE sip:a@b SIP/2.0\nl: 5\nContent-Length: 0\n\nhello", maxMessage, bad(-1, sipmsg.ErrContentLength)},
		{"ping", "\n\n", maxMessage, want{sipmsg.FramePing, 4, nil}},
		{"ping and message", "\n\n" + full, maxMessage, want{sipmsg.FramePing, 4, nil}},
		{"half a ping", "\n", maxMessage, none},
		{"three quarters of a ping", "\n\r", maxMessage, none},
		{"CR", "\r", maxMessage, none},
		{"empty line", "\n" + full, maxMessage, want{sipmsg.FrameBlank, 2, nil}},
		{"CR and something", "\rX", maxMessage, bad(-2, sipmsg.ErrStartLine)},
		{"no length", "MESSAGE sip:a@b SIP/2.0\nX: 1\n\n", maxMessage, bad(-2, sipmsg.ErrNoContentLength)},
		{"negative length", strings.Replace(full, "5", "-5", 1), maxMessage, bad(-1, sipmsg.ErrContentLength)},
		{"empty length", strings.Replace(full, " 5", "", 1), maxMessage, bad(-1, sipmsg.ErrContentLength)},
		{"huge length", strings.Replace(full, "5", "4294967295", 1), maxMessage, bad(-1, sipmsg.ErrTooLarge)},
		{"overflowing length", strings.Replace(full, "5", "18446744073709551621", 1), maxMessage, bad(-1, sipmsg.ErrContentLength)},
		{"longer than max", full, len(crlf(full)) - 1, bad(-1, sipmsg.ErrTooLarge)},
		{"header longer than max", full, 20, bad(-2, sipmsg.ErrTooLarge)},
		{"max 0", full, 0, bad(-2, sipmsg.ErrTooLarge)},
		{"max negative", full, -1, bad(-2, sipmsg.ErrTooLarge)},
		{"TLS", "\x16\x03\x01\x02\x00\x01\x00", maxMessage, bad(-2, sipmsg.ErrStartLine)},
		{"HTTP", "GET / HTTP/1.1\nHost: x\n\n", maxMessage, bad(-2, sipmsg.ErrStartLine)},
		{"one word", "HELLO\n", maxMessage, bad(-2, sipmsg.ErrStartLine)},
		{"endless word", strings.Repeat("A", 65), maxMessage, bad(-2, sipmsg.ErrStartLine)},
		{"long word", strings.Repeat("A", 64), maxMessage, none},
		{"space first", " MESSAGE sip:a@b SIP/2.0\n", maxMessage, bad(-2, sipmsg.ErrStartLine)},
		{"slash in a word", "A/", maxMessage, bad(-2, sipmsg.ErrStartLine)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			in := crlf(tt.in)
			kind, n, err := sipmsg.Frame(in, tt.max)
			switch tt.want.n {
			case -1:
				tt.want.n = bytes.Index(in, []byte("\r\n\r\n")) + 4
			case -2:
				tt.want.n = len(in)
			}
			if kind != tt.want.kind || n != tt.want.n || (err == nil) != (tt.want.err == nil) || (err != nil && !errors.Is(err, tt.want.err)) {
				t.Errorf("Frame = %v, %d, %v; want %v, %d, %v", kind, n, err, tt.want.kind, tt.want.n, tt.want.err)
			}
		})
	}
	if k, n, _ := sipmsg.Frame([]byte("\nMESSAGE"), maxMessage); k != sipmsg.FrameBlank || n != 1 {
		t.Errorf("bare LF: %v, %d", k, n)
	}
	if k, n, _ := sipmsg.Frame([]byte("MESSAGE sip:a@b SIP/2.0\nl: 1\n\nxy"), maxMessage); k != sipmsg.FrameMessage || n != 31 {
		t.Errorf("bare LF in the header: %v, %d", k, n)
	}
}

// frames reads a stream of which pieces arrive one after the other, and describes what it finds.
func frames(t testing.TB, limit int, pieces ...[]byte) (out []string) {
	var buf []byte
	for _, p := range pieces {
		buf = append(buf, p...)
		for {
			kind, n, err := sipmsg.Frame(buf, limit)
			if n < 0 || n > len(buf) {
				t.Fatalf("Frame of %d bytes occupies %d", len(buf), n)
			}
			if kind == sipmsg.FrameNone {
				if n != 0 || err != nil {
					t.Fatalf("Frame = none, %d, %v", n, err)
				}
				break
			}
			if (err != nil) != (kind == sipmsg.FrameBad) || (n == 0 && kind != sipmsg.FrameBad) {
				t.Fatalf("Frame = %v, %d, %v", kind, n, err)
			}
			if kind == sipmsg.FrameBad {
				return append(out, fmt.Sprint("bad ", err))
			}
			out = append(out, fmt.Sprintf("%v %q", kind, buf[:n]))
			buf = buf[n:]
		}
	}
	return append(out, fmt.Sprintf("rest %q", buf))
}

// TestFrameCuts: wherever a read cuts the stream, the messages are the same.
func TestFrameCuts(t *testing.T) {
	stream := bytes.Join([][]byte{sipmsgtest.MOMessage(), []byte("\r\n\r\n"), sipmsgtest.MOInvite(), []byte("\r\n"), sipmsgtest.SM12()}, nil)
	want := frames(t, maxMessage, stream)
	if len(want) != 6 || want[5] != `rest ""` {
		t.Fatalf("%d frames", len(want))
	}
	for i := range stream {
		if got := frames(t, maxMessage, stream[:i], stream[i:]); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("cut at %d: %q", i, got)
		}
	}
	var bytewise [][]byte
	for i := range stream {
		bytewise = append(bytewise, stream[i:i+1])
	}
	if got := frames(t, maxMessage, bytewise...); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("byte by byte: %q", got)
	}
}

func TestDatagram(t *testing.T) {
	const msg = "MESSAGE sip:a@b SIP/2.0\r\n\r\n"
	for _, tt := range []struct {
		in   string
		kind sipmsg.FrameKind
		msg  string
	}{
		{"", sipmsg.FrameBlank, ""},
		{"\r\n\r\n", sipmsg.FramePing, ""},
		{"\r\n", sipmsg.FrameBlank, ""},
		{"\x00\x00\x00\x00", sipmsg.FrameBlank, ""},
		{" ", sipmsg.FrameBlank, ""},
		{"\r\n\r\n\r\n", sipmsg.FrameBlank, ""},
		{msg, sipmsg.FrameMessage, msg},
		{"\r\n\r\n" + msg, sipmsg.FrameMessage, msg},
		{" " + msg, sipmsg.FrameMessage, " " + msg},
		{"\x00x", sipmsg.FrameMessage, "\x00x"},
	} {
		if kind, got := sipmsg.Datagram([]byte(tt.in)); kind != tt.kind || string(got) != tt.msg {
			t.Errorf("Datagram(%q) = %v, %q", tt.in, kind, got)
		}
	}
	if got := sipmsg.FramePing.String() + sipmsg.FrameKind(9).String(); got != "pingunknown" {
		t.Errorf("String = %q", got)
	}
}
