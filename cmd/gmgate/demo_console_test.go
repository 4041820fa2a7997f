package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestConsoleKeepsTheWidth(t *testing.T) {
	var out bytes.Buffer
	c := newConsole(&out, false)
	c.section("A chapter")
	c.note("a remark\nin two lines")
	c.result("a step", strings.Repeat("detail ", 30), 1500*time.Millisecond, nil)
	c.result("a failing step", "", time.Millisecond, errors.New(strings.Repeat("reason ", 40)+strings.Repeat("x", 300)))
	c.ladder([]rung{
		{"SM1", "[2001:db8:45::ffff]:65535", "REGISTER", "[2001:db8::5]:5060", "clear", "0 ms"},
		{"SM12", "[2001:db8::5]:6110", "200 OK", "[2001:db8:45::ffff]:65535", "ESP 0xffffffff", "12345 ms"},
	})
	c.table([][]string{{"a", "b"}, {"long", "x"}})
	for l := range strings.Lines(out.String()) {
		l = strings.TrimSuffix(l, "\n")
		if n := utf8.RuneCountInString(l); n > demoWidth {
			t.Errorf("%d columns: %s", n, l)
		}
		if strings.ContainsAny(l, "\x1b\r") {
			t.Errorf("control characters without a terminal: %q", l)
		}
	}
	if c.steps != 2 || len(c.failed) != 1 || !strings.HasPrefix(c.failed[0], "a failing step: reason") {
		t.Errorf("got %d steps, failed %q", c.steps, c.failed)
	}
}

func TestWrap(t *testing.T) {
	for _, tt := range []struct {
		in   string
		n    int
		want string
	}{{"", 5, ""}, {"ab cd ef", 5, "ab cd|ef"}, {"abcdefg h", 3, "abc|def|g h"}, {"a\nb", 5, "a|b"}, {"x abcdef", 3, "x|abc|def"}} {
		if got := strings.Join(wrap(tt.in, tt.n), "|"); got != tt.want {
			t.Errorf("wrap(%q, %d) = %q, want %q", tt.in, tt.n, got, tt.want)
		}
	}
}

func TestColour(t *testing.T) {
	c := &console{colour: true}
	if got := c.paint(sgrRed, "x"); got != "\x1b[31mx\x1b[0m" {
		t.Errorf("got %q", got)
	}
	if got := millis(12345 * time.Millisecond); got != "12.3 s" {
		t.Errorf("got %s", got)
	}
}
