package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/gmgate/gmgate/control/admin"
	"github.com/gmgate/gmgate/dataplane/guard"
)

const dropsUsage = `usage: gmgate drops [--follow] [FLAGS]

What the guard in front of the ESP ports lets through and drops: its counters, its hooks and how full its tables are;
with --follow a line for each drop that it samples, until it is interrupted. Nobody has verified where a dropped
packet says that it comes from.

`

// dropsFlags are the command line of `gmgate drops`.
type dropsFlags struct {
	file, socket string
	follow, json bool
	reasons      []string // nil: all
	count        int      // of lines; zero: until interrupted
}

// dropsMain shows what the guard of a running daemon drops. Exit status: 0 done, 1 not reachable or no guard, 2 wrong usage.
func dropsMain(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, code := dropsParse(args, stderr)
	if code >= 0 {
		return code
	}
	if err := dropsRun(ctx, &o, stdout); err != nil {
		_, _ = fmt.Fprintf(stderr, "gmgate drops: %v\n", err)
		if e, ok := errors.AsType[*admin.Error](err); ok && e.Hint != "" {
			_, _ = fmt.Fprintf(stderr, "hint: %s\n", e.Hint)
		}
		return 1
	}
	return 0
}

// dropsParse reads the command line. A code of 0 or more is the exit status to end with.
func dropsParse(args []string, stderr io.Writer) (o dropsFlags, code int) {
	fs := flag.NewFlagSet("gmgate drops", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		_, _ = io.WriteString(stderr, dropsUsage)
		fs.PrintDefaults()
	}
	fs.StringVar(&o.file, "c", "", "configuration `file` of the daemon (default "+defaultConfig+")")
	fs.StringVar(&o.file, "f", "", "the same as -c `file`")
	fs.StringVar(&o.socket, "socket", "", "admin socket of the daemon, a `path`")
	fs.BoolVar(&o.follow, "follow", false, "print each sampled drop as it happens")
	fs.BoolVar(&o.json, "json", false, "print JSON, with --follow one object a line")
	fs.IntVar(&o.count, "count", 0, "end after so many drops; 0: when interrupted")
	fs.Func("reason", "only drops for these `reasons`, with commas", func(v string) error {
		for r := range strings.SplitSeq(v, ",") {
			if r = strings.TrimSpace(r); r == "" {
				return errors.New("a reason is empty")
			}
			if !slices.Contains(dropReasons(), r) { // or one would wait for ever for what is spelt wrong
				return fmt.Errorf("there is no reason %q; they are %s", r, strings.Join(dropReasons(), ", "))
			}
			o.reasons = append(o.reasons, r)
		}
		return nil
	})
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return o, 0
	case err != nil:
		return o, 2
	}
	problem := ""
	switch {
	case fs.NArg() > 0:
		problem = fmt.Sprintf("unexpected argument %q", fs.Arg(0))
	case o.count < 0:
		problem = fmt.Sprintf("-count %d: want 0 or more", o.count)
	case o.count > 0 && !o.follow:
		problem = "-count is for --follow"
	}
	if problem != "" {
		_, _ = fmt.Fprintf(stderr, "gmgate drops: %s\n", problem)
		return o, 2
	}
	return o, -1
}

// dropReasons are the names of all reasons.
func dropReasons() []string {
	all := guard.Reasons()
	names := make([]string, len(all))
	for i, r := range all {
		names[i] = r.String()
	}
	return names
}

func dropsRun(ctx context.Context, o *dropsFlags, stdout io.Writer) error {
	path, err := socketPath(o.file, o.socket)
	if err != nil {
		return err
	}
	c := admin.NewClient(path)
	defer c.Close()
	if o.follow {
		return dropsFollow(ctx, c, o, stdout)
	}
	g, err := c.Guard(ctx)
	if err != nil {
		return err
	}
	g.Verdicts = slices.DeleteFunc(g.Verdicts, func(v admin.GuardVerdict) bool { return !o.wants(v.Reason) })
	if o.json {
		return writeJSON(stdout, g)
	}
	if _, err := io.WriteString(stdout, formatGuard(&g)); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

// wants reports whether drops for a reason are to be shown.
func (o *dropsFlags) wants(reason string) bool {
	return o.reasons == nil || slices.Contains(o.reasons, reason)
}

// dropsFollow prints drops as they happen.
func dropsFollow(ctx context.Context, c *admin.Client, o *dropsFlags, stdout io.Writer) error {
	enc := json.NewEncoder(stdout)
	enc.SetEscapeHTML(false)
	var printErr error
	n := 0
	err := c.Drops(ctx, func(d admin.GuardDrop) bool {
		if !o.wants(d.Reason) {
			return true
		}
		if o.json {
			printErr = enc.Encode(d)
		} else {
			_, printErr = io.WriteString(stdout, formatDrop(&d))
		}
		n++
		return printErr == nil && (o.count == 0 || n < o.count)
	})
	if printErr != nil {
		return fmt.Errorf("print: %w", printErr)
	}
	return err
}

// formatDrop prints a drop as one line, and the line before it where some are missing.
func formatDrop(d *admin.GuardDrop) string {
	spi := ""
	if d.SPI != 0 {
		spi = "  SPI " + strconv.FormatUint(uint64(d.SPI), 10)
	}
	line := fmt.Sprintf("%s  %-22s  %s -> %s  %s%s  %d octets", d.Time.UTC().Format("2006-01-02 15:04:05.000"), d.Reason,
		d.Source, d.Destination, d.Protocol, spi, d.Length)
	if d.Interface != "" {
		line += "  on " + d.Interface
	}
	line = printable(line) + "\n"
	if d.Lost > 0 {
		line = fmt.Sprintf("(%d drops are missing here: they were too many)\n", d.Lost) + line
	}
	return line
}

// formatGuard prints the counters of the guard, then what it hangs on and how full it is.
func formatGuard(g *admin.GuardStatus) string {
	var b strings.Builder
	line := func(name, v string) {
		if v != "" {
			_, _ = fmt.Fprintf(&b, "%-8s %s\n", name, printable(v))
		}
	}
	table := func(rows [][]string) {
		if len(rows) > 1 {
			b.WriteString("\n" + columns(rows, -1))
		}
	}
	n := func(v uint64) string { return strconv.FormatUint(v, 10) }
	line("guard", g.Mode)
	line("reason", g.Reason)
	line("pinned", g.Pinned)

	rows := make([][]string, 1, 1+len(g.Verdicts))
	rows[0] = []string{"VERDICT", "REASON", "PACKETS", "OCTETS"}
	for _, v := range g.Verdicts {
		rows = append(rows, []string{v.Verdict, v.Reason, n(v.Packets), octets(v.Bytes)})
	}
	table(rows)
	rows = make([][]string, 1, 1+len(g.Interfaces))
	rows[0] = []string{"INTERFACE", "HOOK", "ATTACHED", "DETAIL"}
	for _, i := range g.Interfaces {
		attached := "no"
		if i.Attached {
			attached = "yes"
		}
		rows = append(rows, []string{i.Name, i.Hook, attached, i.Detail})
	}
	table(rows)
	rows = make([][]string, 1, 1+len(g.Maps))
	rows[0] = []string{"MAP", "ENTRIES", "CAPACITY", "FULL"}
	for _, m := range g.Maps {
		full := "-"
		if m.Capacity > 0 {
			full = fmt.Sprintf("%.1f%%", 100*float64(m.Entries)/float64(m.Capacity))
		}
		rows = append(rows, []string{m.Name, strconv.Itoa(m.Entries), strconv.Itoa(m.Capacity), full})
	}
	table(rows)
	_, _ = fmt.Fprintf(&b, "\nring     %d first packets of SA sets, %d sampled drops, %d lost\n", g.Ring.FirstUses, g.Ring.Samples, g.Ring.Lost)
	return b.String()
}
