package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// demoWidth is the number of columns that the demo's output keeps to.
const demoWidth = 100

// console prints the story of the demo. It is used by one goroutine.
type console struct {
	w       io.Writer
	tty     bool // a line may be overwritten
	colour  bool
	begin   time.Time
	steps   int
	failed  []string // names of the steps that failed, with the reason
	pending bool     // the cursor stands behind the name of a running step
	blank   bool     // the last line was empty
}

// Colours, as SGR parameters.
const (
	sgrBold   = "1"
	sgrDim    = "2"
	sgrRed    = "31"
	sgrGreen  = "32"
	sgrYellow = "33"
	sgrCyan   = "36"
)

func newConsole(w io.Writer, noColour bool) *console {
	tty := isTerminal(w)
	_, env := os.LookupEnv("NO_COLOR")
	return &console{w: w, tty: tty, colour: tty && !noColour && !env, begin: time.Now()}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS) //nolint:gosec // a descriptor is small
	return err == nil
}

// paint wraps text in a colour.
func (c *console) paint(sgr, text string) string {
	if !c.colour {
		return text
	}
	return "\x1b[" + sgr + "m" + text + "\x1b[0m"
}

// line prints one line. What goes wrong with the output is nobody's business here: there is no other place to say so.
func (c *console) line(format string, args ...any) {
	if c.pending {
		_, _ = io.WriteString(c.w, "\r\x1b[K")
		c.pending = false
	}
	_, _ = fmt.Fprintf(c.w, strings.TrimRight(format, "\n")+"\n", args...)
	c.blank = format == ""
}

// section starts a chapter.
func (c *console) section(title string) {
	if !c.blank {
		c.line("")
	}
	rule := strings.Repeat("─", max(0, demoWidth-utf8.RuneCountInString(title)-4))
	c.line("%s %s %s", c.paint(sgrDim, "──"), c.paint(sgrBold, title), c.paint(sgrDim, rule))
}

// note prints an indented remark.
func (c *console) note(format string, args ...any) {
	for _, l := range wrap(fmt.Sprintf(format, args...), demoWidth-4) {
		c.line("    %s", c.paint(sgrDim, l))
	}
}

// step runs f and prints its name, detail and duration with the outcome.
func (c *console) step(name string, f func() (detail string, err error)) bool {
	if c.tty {
		_, _ = fmt.Fprintf(c.w, "  %s %s", c.paint(sgrYellow, "…"), name)
		c.pending = true
	}
	start := time.Now()
	detail, err := f()
	c.result(name, detail, time.Since(start), err)
	return err == nil
}

// result prints the outcome of a step that has run.
func (c *console) result(name, detail string, took time.Duration, err error) {
	c.steps++
	mark := c.paint(sgrGreen, "✓")
	if err != nil {
		mark = c.paint(sgrRed, "✗")
		c.failed = append(c.failed, fmt.Sprintf("%s: %v", name, err))
	}
	const nameWidth, timeWidth = 34, 9
	room := demoWidth - 4 - nameWidth - timeWidth - 1
	parts := wrap(detail, room)
	c.line("  %s %s%s %s", mark, pad(name, nameWidth), pad(parts[0], room), c.paint(sgrDim, padLeft(millis(took), timeWidth)))
	for _, p := range parts[1:] {
		c.line("    %s%s", pad("", nameWidth), p)
	}
	if err != nil {
		for _, p := range wrap(err.Error(), demoWidth-6) {
			c.line("      %s", c.paint(sgrRed, p))
		}
	}
}

// millis prints a duration with three digits.
func millis(d time.Duration) string {
	ms := float64(d) / float64(time.Millisecond)
	switch {
	case ms < 10:
		return fmt.Sprintf("%.2f ms", ms)
	case ms < 100:
		return fmt.Sprintf("%.1f ms", ms)
	case ms < 10_000:
		return fmt.Sprintf("%.0f ms", ms)
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

func pad(s string, n int) string {
	return s + strings.Repeat(" ", max(0, n-utf8.RuneCountInString(s)))
}

func padLeft(s string, n int) string {
	return strings.Repeat(" ", max(0, n-utf8.RuneCountInString(s))) + s
}

// wrap cuts text into lines of at most n columns, at spaces where there are any. There is always one line.
func wrap(text string, n int) []string {
	var out []string
	for para := range strings.SplitSeq(text, "\n") {
		line := ""
		for word := range strings.FieldsSeq(para) {
			for utf8.RuneCountInString(word) > n {
				r := []rune(word)
				if line != "" {
					out = append(out, line)
					line = ""
				}
				out = append(out, string(r[:n]))
				word = string(r[n:])
			}
			switch {
			case line == "":
				line = word
			case utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) <= n:
				line += " " + word
			default:
				out = append(out, line)
				line = word
			}
		}
		out = append(out, line)
	}
	return out
}

// rung is one message of a ladder.
type rung struct {
	name    string // SM1
	from    string
	arrow   string // what the arrow says: method or status
	to      string
	guarded string // clear, or the SPI
	at      string // since the first rung, empty when it could not be observed
}

// ladder prints messages as arrows. The widths hold an IPv6 address with its port.
func (c *console) ladder(rungs []rung) {
	from, to := 0, 0
	for _, r := range rungs {
		from, to = max(from, utf8.RuneCountInString(r.from)), max(to, utf8.RuneCountInString(r.to))
	}
	const name, guard, when = 8, 15, 8
	arrow := demoWidth - 4 - name - from - to - guard - when - 4
	for _, r := range rungs {
		text := r.arrow
		if room := arrow - 4; utf8.RuneCountInString(text) > room {
			text = string([]rune(text)[:room])
		}
		fill := arrow - 2 - utf8.RuneCountInString(text)
		shaft := strings.Repeat("─", fill/2) + " " + text + " " + strings.Repeat("─", fill-fill/2-1) + "▶"
		guardText := pad(r.guarded, guard)
		switch {
		case r.guarded == "clear":
			guardText = c.paint(sgrYellow, guardText)
		case strings.HasPrefix(r.guarded, "ESP"):
			guardText = c.paint(sgrGreen, guardText)
		default:
			guardText = c.paint(sgrDim, guardText)
		}
		c.line("  %s%s %s %s  %s%s", c.paint(sgrBold, pad(r.name, name)), padLeft(r.from, from), c.paint(sgrCyan, shaft), pad(r.to, to),
			guardText, c.paint(sgrDim, padLeft(r.at, when)))
	}
}

// table prints rows with aligned columns, the first row as heading.
func (c *console) table(rows [][]string) {
	var widths []int
	for _, r := range rows {
		for i, cell := range r {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	for i, r := range rows {
		var b strings.Builder
		for j, cell := range r {
			b.WriteString(pad(cell, widths[j]+2))
		}
		text := strings.TrimRight(b.String(), " ")
		if i == 0 {
			text = c.paint(sgrDim, text)
		}
		c.line("    %s", text)
	}
}
