package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/gmgate/gmgate/control/admin"
	"github.com/gmgate/gmgate/control/config"
)

const ueUsage = `usage: gmgate ue COMMAND [FLAGS]

  list                                         the phones
  show NAME                                    one of them, with its SA sets
  deregister AOR | --contact ADDRESS:PORT      end registrations, as the network does
  move NAME WORKER                             give one of them to another worker, with all at its address

NAME is an IMPI, a public identity (with or without sip: or tel:), an address, or an id of the list;
AOR is the same without the address. A phone is ended with all its identities.

The daemon is found by its configuration (-c or -f FILE) or by its socket (--socket PATH).
'gmgate ue COMMAND -h' lists the flags of a command.
`

// Where the daemon's socket is looked for.
const (
	defaultConfig = "/etc/gmgate/gmgate.yaml"
	defaultRun    = "/run/gmgate"
)

// ueWidth is the number of columns that tables keep to, as long as one column can be made shorter.
const ueWidth = 110

// ueFlags are the command line of `gmgate ue`.
type ueFlags struct {
	command      string
	name         string // NAME or AOR
	worker       int    // move
	file, socket string
	json         bool
	limit        int
	sequences    bool

	impi, impu, addr string // list
	contact          string // list and deregister
}

// ueMain looks at the phones of a running daemon. Exit status: 0 done, 1 not found or not reachable, 2 wrong usage.
func ueMain(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, code := ueParse(args, stdout, stderr)
	if code >= 0 {
		return code
	}
	if err := ueRun(ctx, &o, stdout, stderr); err != nil {
		_, _ = fmt.Fprintf(stderr, "gmgate ue %s: %v\n", o.command, err)
		if e, ok := errors.AsType[*admin.Error](err); ok && e.Hint != "" {
			_, _ = fmt.Fprintf(stderr, "hint: %s\n", e.Hint)
		}
		return 1
	}
	return 0
}

// ueParse reads the command line. A code of 0 or more is the exit status to end with.
func ueParse(args []string, stdout, stderr io.Writer) (o ueFlags, code int) {
	if len(args) == 0 {
		_, _ = io.WriteString(stderr, ueUsage)
		return o, 2
	}
	o.command = args[0]
	switch o.command {
	case "help", "-h", "-help", "--help":
		_, _ = io.WriteString(stdout, ueUsage)
		return o, 0
	case "list", "show", "deregister", "move":
	default:
		_, _ = fmt.Fprintf(stderr, "gmgate ue: no command %q\n\n%s", o.command, ueUsage)
		return o, 2
	}
	fs := flag.NewFlagSet("gmgate ue "+o.command, flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&o.file, "c", "", "configuration `file` of the daemon (default "+defaultConfig+")")
	fs.StringVar(&o.file, "f", "", "the same as -c `file`")
	fs.StringVar(&o.socket, "socket", "", "admin socket of the daemon, a `path`")
	fs.BoolVar(&o.json, "json", false, "print JSON")
	if o.command == "list" {
		fs.StringVar(&o.impi, "impi", "", "only this private identity")
		fs.StringVar(&o.impu, "impu", "", "only phones with this public identity")
		fs.StringVar(&o.addr, "addr", "", "only phones at this `address`")
		fs.IntVar(&o.limit, "limit", 1000, "at most so many")
	}
	switch o.command {
	case "show":
		fs.BoolVar(&o.sequences, "sequences", false, "with the sequence numbers of the SAs; asks for all SAs, which may take long")
	case "list", "deregister":
		fs.StringVar(&o.contact, "contact", "", "the phone with this contact, `address:port`")
	}
	// Flags may stand behind the name as well.
	var names []string
	for rest := args[1:]; ; {
		switch err := fs.Parse(rest); {
		case errors.Is(err, flag.ErrHelp):
			return o, 0
		case err != nil:
			return o, 2
		}
		if fs.NArg() == 0 {
			break
		}
		names, rest = append(names, fs.Arg(0)), fs.Args()[1:]
	}
	if problem := o.check(names); problem != "" {
		_, _ = fmt.Fprintf(stderr, "gmgate ue %s: %s\n", o.command, problem)
		return o, 2
	}
	return o, -1
}

func (o *ueFlags) check(names []string) string {
	if len(names) > 0 {
		o.name = names[0]
	}
	if o.command == "move" {
		if len(names) != 2 {
			return "want a phone and the number of a worker"
		}
		n, err := strconv.ParseUint(names[1], 10, 8)
		if err != nil {
			return fmt.Sprintf("%q is not the number of a worker", names[1])
		}
		o.worker = int(n)
		return ""
	}
	switch {
	case o.command == "list" && len(names) > 0 || len(names) > 1:
		return fmt.Sprintf("unexpected argument %q", names[len(names)-1])
	case o.command == "list" && o.limit < 1:
		return fmt.Sprintf("-limit %d: want 1 or more", o.limit)
	case o.command == "show" && o.name == "":
		return "which one? An IMPI, a public identity, an address, or an id of 'gmgate ue list'"
	case o.command == "deregister" && (o.name == "") == (o.contact == ""):
		return "want an identity or --contact address:port, one of them"
	}
	return ""
}

func ueRun(ctx context.Context, o *ueFlags, stdout, stderr io.Writer) error {
	path, err := socketPath(o.file, o.socket)
	if err != nil {
		return err
	}
	c := admin.NewClient(path)
	defer c.Close()
	var list []admin.UE
	more := false
	switch o.command {
	case "list":
		q := admin.Query{IMPI: o.impi, IMPU: o.impu, Addr: o.addr, Contact: o.contact}
		list, more, err = c.UEs(ctx, q, o.limit)
	case "show":
		list, err = c.Find(ctx, o.name)
		for i := 0; err == nil && o.sequences && i < len(list); i++ {
			list[i], err = c.UE(ctx, list[i].ID, true)
		}
	case "deregister":
		if o.contact != "" {
			list, err = c.Deregister(ctx, admin.Target{Contact: o.contact})
		} else {
			list, err = c.DeregisterAOR(ctx, o.name)
		}
	case "move":
		list, err = ueMove(ctx, c, o.name, o.worker)
	}
	if err != nil {
		return err
	}
	if o.json {
		if more { // what is printed is a list and has no room for it
			_, _ = fmt.Fprintf(stderr, "gmgate ue list: there are more than these %d, see -limit\n", len(list))
		}
		return writeJSON(stdout, list)
	}
	var out string
	switch o.command {
	case "list":
		out = formatList(list, more, time.Now())
	case "show":
		out = formatUEs(list, time.Now())
	case "deregister":
		out = formatEnded(list, time.Now())
	case "move":
		out = formatMoved(list)
	}
	if _, err := io.WriteString(stdout, out); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

// ueMove moves a phone. A name that means phones at several addresses is refused.
func ueMove(ctx context.Context, c *admin.Client, name string, worker int) ([]admin.UE, error) {
	found, err := c.Find(ctx, name)
	if err != nil {
		return nil, err
	}
	for i := range found {
		if found[i].Address != found[0].Address {
			return nil, &admin.Error{
				Text: fmt.Sprintf("%q is at %s and %s", name, found[0].Address, found[i].Address), Hint: "name one by its address or id",
			}
		}
	}
	return c.Move(ctx, found[0].ID, worker)
}

// formatMoved says what a move did.
func formatMoved(list []admin.UE) string {
	var b strings.Builder
	for i := range list {
		u := &list[i]
		_, _ = fmt.Fprintf(&b, "%s at %s is with worker %d now, as %s\n", printable(u.IMPI), u.Address, u.Worker, u.ID)
	}
	return b.String()
}

// socketPath finds the daemon's socket, by what the command line says of its configuration or of the socket itself.
func socketPath(named, socket string) (string, error) {
	if socket != "" {
		return socket, nil
	}
	file := named
	if file == "" {
		file = defaultConfig
	}
	cfg, err := config.Load(file)
	switch {
	case err == nil && cfg.SocketPath() == "":
		return "", &admin.Error{Text: "admin.socket is switched off in " + file, Hint: `set it, or leave it out to get the default`}
	case err == nil:
		return cfg.SocketPath(), nil
	case named == "" && (errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission)):
		if found, err := filepath.Glob(filepath.Join(defaultRun, "*.sock")); err == nil && len(found) == 1 {
			return found[0], nil
		}
	}
	return "", &admin.Error{Text: err.Error(), Hint: "name the configuration of the daemon with -c, or its socket with --socket"}
}

func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

// formatList prints one line for each phone.
func formatList(list []admin.UE, more bool, now time.Time) string {
	if len(list) == 0 {
		return "no phones\n"
	}
	rows := [][]string{{"ID", "IMPI", "ADDRESS", "STATE", "SETS", "EXPIRES", "LAST SEEN"}}
	for i := range list {
		u := &list[i]
		rows = append(rows, []string{u.ID, u.IMPI, u.Address, u.State, strconv.Itoa(len(u.Sets)), until(u.Expires, now), since(u.LastSeen, now)})
	}
	out := columns(rows, 1)
	if more {
		out += fmt.Sprintf("and more: these are the first %d, see -limit\n", len(list))
	}
	return out
}

// formatEnded says what a de-registration did.
func formatEnded(list []admin.UE, now time.Time) string {
	var b strings.Builder
	for i := range list {
		u := &list[i]
		var last time.Time
		for _, s := range u.Sets {
			if s.Deadline.After(last) {
				last = s.Deadline
			}
		}
		_, _ = fmt.Fprintf(&b, "ended %s at %s; its SA sets go in %s\n", printable(u.IMPI), u.Address, until(last, now))
	}
	return b.String()
}

// formatUEs prints phones with everything that is known of them.
func formatUEs(list []admin.UE, now time.Time) string {
	var b strings.Builder
	for i := range list {
		if i > 0 {
			b.WriteByte('\n')
		}
		formatUE(&b, &list[i], now)
	}
	return b.String()
}

func formatUE(b *strings.Builder, u *admin.UE, now time.Time) {
	line := func(name string, values ...string) {
		for _, v := range values {
			_, _ = fmt.Fprintf(b, "  %-14s %s\n", name, printable(v))
			name = ""
		}
	}
	_, _ = fmt.Fprintf(b, "UE %s: %s\n", u.ID, u.State)
	line("IMPI", u.IMPI)
	line("address", u.Address+", it talks to "+u.Local)
	line("owner", fmt.Sprintf("worker %d, index %d", u.Worker, u.Index))
	if !u.Expires.IsZero() {
		line("expires", fmt.Sprintf("in %s, %s", until(u.Expires, now), u.Expires.UTC().Format("2006-01-02 15:04:05 MST")))
	}
	if u.Contact != "" {
		line("contact", u.Contact)
	}
	line("identities", u.Identities...)
	line("service route", u.ServiceRoute...)
	if u.NextHop != "" {
		line("next hop", u.NextHop)
	}
	if t := trafficLine(u, now); t != "" {
		line("traffic", t)
	}
	b.WriteByte('\n')
	for _, l := range strings.SplitAfter(columns(setRows(u.Sets, now), -1), "\n") {
		if l != "" {
			b.WriteString("  " + l)
		}
	}
}

// trafficLine says what has come in of a phone. Its ESP packets are counted before they are verified.
func trafficLine(u *admin.UE, now time.Time) string {
	var says []string
	if e := u.ESP; e != nil {
		says = append(says, fmt.Sprintf("%d ESP packets, %s", e.Packets, octets(e.Bytes)))
		if !e.Last.IsZero() {
			says = append(says, "the last one "+since(e.Last, now))
		}
	}
	if !u.LastMessage.IsZero() {
		says = append(says, "last SIP message "+since(u.LastMessage, now))
	}
	return strings.Join(says, "; ")
}

// octets prints a number of octets in the largest unit that leaves a digit before the point.
func octets(n uint64) string {
	units := []string{"B", "kB", "MB", "GB", "TB"}
	v, i := float64(n), 0
	for ; v >= 999.95 && i < len(units)-1; i++ {
		v /= 1000
	}
	if i == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", v, units[i])
}

// setRows describes SA sets, three lines each. SPIs are unsigned, as in the Security headers.
func setRows(sets []admin.Set, now time.Time) [][]string {
	rows := make([][]string, 1, 1+3*len(sets))
	rows[0] = []string{"SET", "PHASE", "ROLE", "GOES IN", "", "UC", "US", "PC", "PS"}
	for i := range sets {
		s := &sets[i]
		n := func(v uint32) string { return strconv.FormatUint(uint64(v), 10) }
		p := func(v uint16) string { return n(uint32(v)) }
		rows = append(rows,
			// Wide enough for what the lines below say.
			[]string{s.ID, pad(s.Phase, 11), pad(s.Role, 9), until(s.Deadline, now), "SPI", n(s.SPIs.UC), n(s.SPIs.US), n(s.SPIs.PC), n(s.SPIs.PS)},
			[]string{"", s.Algorithms, "", "", "port", p(s.Ports.UC), p(s.Ports.US), p(s.Ports.PC), p(s.Ports.PS)})
		if q := s.Sequences; q != nil {
			rows = append(rows, []string{"", "", "", "", "seq", n(q.UC), n(q.US), n(q.PC), n(q.PS)})
		}
		for _, l := range []string{setHistory(s), setLife(s, now), setDiagnosis(s)} {
			if l != "" {
				rows = append(rows, []string{"", l, "", "", "", "", "", "", ""})
			}
		}
	}
	return rows
}

// setHistory says how a set came to be, and what goes over it.
func setHistory(s *admin.Set) string {
	var says []string
	if s.Over != "" {
		says = append(says, "made over set "+s.Over)
	}
	if s.TCP {
		says = append(says, "prefers TCP")
	}
	if n := s.Connections.In; n != 0 {
		says = append(says, fmt.Sprintf("connection %d of the phone", n))
	}
	if n := s.Connections.Out; n != 0 {
		says = append(says, fmt.Sprintf("connection %d to the phone", n))
	}
	return strings.Join(says, ", ")
}

// setLife says when something has come in on a set.
func setLife(s *admin.Set, now time.Time) string {
	var says []string
	if !s.FirstESP.IsZero() {
		says = append(says, "first ESP "+since(s.FirstESP, now))
	}
	if !s.Heard.IsZero() {
		says = append(says, "heard "+since(s.Heard, now))
	}
	return strings.Join(says, ", ")
}

// setDiagnosis says what is odd about a set.
func setDiagnosis(s *admin.Set) string {
	if s.Diagnosis == "" || s.Hint == "" {
		return s.Diagnosis
	}
	return s.Diagnosis + ": " + s.Hint
}

// columns aligns rows. Where they are too wide, the given column is cut; none if it is negative.
func columns(rows [][]string, cut int) string {
	widths := make([]int, len(rows[0]))
	for _, r := range rows {
		for j := range r {
			r[j] = printable(r[j])
			if j+1 < len(r) && r[j+1] == "" {
				continue // it may run over the empty ones
			}
			widths[j] = max(widths[j], utf8.RuneCountInString(r[j]))
		}
	}
	total := 2 * (len(widths) - 1)
	for _, w := range widths {
		total += w
	}
	if cut >= 0 && total > ueWidth {
		widths[cut] = max(8, widths[cut]-(total-ueWidth))
	}
	var b strings.Builder
	for _, r := range rows {
		line := ""
		at := 0
		for j, cell := range r {
			if j == cut {
				cell = shorten(cell, widths[j])
			}
			if cell != "" {
				line = pad(line, at) + cell
			}
			at += widths[j] + 2
		}
		b.WriteString(line + "\n")
	}
	return b.String()
}

func shorten(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return s
}

// printable keeps what phones have sent from driving the operator's terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// until prints how long it is to a time, with two units at most.
func until(t, now time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return span(t.Sub(now))
}

// since prints how long ago a time is.
func since(t, now time.Time) string {
	if t.IsZero() {
		return "-"
	}
	if s := span(now.Sub(t)); s != "now" {
		return s + " ago"
	}
	return "now"
}

func span(d time.Duration) string {
	d = d.Round(time.Second)
	switch {
	case d <= 0:
		return "now"
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", d/time.Minute, d%time.Minute/time.Second)
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%02dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	return fmt.Sprintf("%dd%02dh", d/(24*time.Hour), d%(24*time.Hour)/time.Hour)
}
