package config

import (
	"bytes"
	"fmt"
	"io"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/gmgate/gmgate/control/ims"
)

// maxLine is where a list goes on lines of its own.
const maxLine = 100

// Example returns the configuration that WriteExample writes: Default and made-up addresses for the keys that have none.
func Example() *Config {
	c := Default()
	c.Gm.Addresses = []netip.Addr{netip.MustParseAddr("10.0.0.5")}
	c.Mw.Addresses = []netip.Addr{netip.MustParseAddr("10.0.1.5")}
	hop := netip.MustParseAddrPort("10.0.1.9:5060")
	c.Mw.NextHops = []NextHop{{Host: hop.Addr().String(), Addr: hop, Transport: ims.UDP}}
	return c
}

// WriteExample writes a configuration file with every key, its default and what it means.
func WriteExample(w io.Writer) error {
	var b bytes.Buffer
	b.WriteString("# gmgate configuration. Every key but the addresses may be left out: the values are the defaults.\n")
	b.WriteString("# Check a file with: gmgate check -c FILE\n")
	write(&b, Example(), schema(), 0, true)
	if _, err := w.Write(b.Bytes()); err != nil {
		return fmt.Errorf("write example configuration: %w", err)
	}
	return nil
}

// Write writes c as a configuration file with every key and without comments. Parse reads it back.
func (c *Config) Write(w io.Writer) error {
	var b bytes.Buffer
	write(&b, c, schema(), 0, false)
	if _, err := w.Write(b.Bytes()); err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	return nil
}

func write(b *bytes.Buffer, c *Config, fields []field, depth int, comments bool) {
	indent := strings.Repeat("  ", depth)
	for i := range fields {
		f := &fields[i]
		if comments {
			if depth == 0 {
				b.WriteByte('\n')
			}
			if f.doc != "" {
				b.WriteString(indent + "# " + strings.ReplaceAll(f.doc, "\n", "\n"+indent+"# ") + "\n")
			}
		}
		if f.unset != nil && f.unset(c) {
			continue
		}
		if f.sub != nil {
			var sub bytes.Buffer
			if write(&sub, c, f.sub, depth+1, comments); sub.Len() > 0 {
				b.WriteString(indent + f.key + ":\n" + sub.String())
			}
			continue
		}
		if f.item != nil {
			writeItems(b, c, f, depth, comments)
			continue
		}
		line := indent + f.key + ": " + f.show(c) + "\n"
		if len(line) > maxLine && strings.Contains(line, ": [") {
			line = strings.Replace(strings.TrimSuffix(line, "]\n"), ": [", ":\n"+indent+"  - ", 1)
			line = strings.ReplaceAll(line, ", ", "\n"+indent+"  - ") + "\n"
		}
		switch {
		case comments && f.key == "instance":
			line = indent + "# instance: edge1\n" // the default is this host's name
		case comments && f.sample != "":
			line += indent + "# " + f.key + ": " + f.sample + "\n"
		}
		b.WriteString(line)
	}
}

// writeItems writes a list of sections. Comments explain the keys that one may have.
func writeItems(b *bytes.Buffer, c *Config, f *field, depth int, comments bool) {
	indent := strings.Repeat("  ", depth)
	if comments {
		explain(b, indent+"#   ", f.item(0))
	}
	n := f.count(c)
	if n == 0 {
		b.WriteString(indent + f.key + ": []\n")
	} else {
		b.WriteString(indent + f.key + ":\n")
	}
	if comments && f.sample != "" {
		b.WriteString(indent + "# " + f.key + ": " + f.sample + "\n")
	}
	for i := range n {
		var item bytes.Buffer
		write(&item, c, f.item(i), depth+2, false)
		text := "{}\n"
		if item.Len() > 0 {
			text = strings.TrimPrefix(item.String(), indent+"    ")
		}
		b.WriteString(indent + "  - " + text)
	}
}

func explain(b *bytes.Buffer, prefix string, fields []field) {
	for i := range fields {
		b.WriteString(prefix + fields[i].key + ": " + fields[i].doc + "\n")
		explain(b, prefix+"  ", fields[i].sub)
	}
}

// plainText is what needs no quotes in YAML, whatever the version; words are checked besides.
var plainText = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9._-]*$`)

func showText(s string) string {
	switch strings.ToLower(s) {
	case "null", "true", "false", "yes", "no", "on", "off", "y", "n":
		return strconv.Quote(s)
	}
	if plainText.MatchString(s) {
		return s
	}
	return strconv.Quote(s)
}

// showDuration prints a duration as people write it: 1h instead of 1h0m0s, and 128s instead of 2m8s.
func showDuration(d time.Duration) string {
	if d > 0 && d < 10*time.Minute && d%time.Second == 0 && d%time.Minute != 0 {
		return strconv.FormatInt(int64(d/time.Second), 10) + "s"
	}
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	if s == "0s" {
		return "0"
	}
	return s
}
