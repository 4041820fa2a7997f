package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/gmgate/gmgate/control/admin"
	"github.com/gmgate/gmgate/control/config"
	"github.com/gmgate/gmgate/dataplane/guard"
	"github.com/gmgate/gmgate/dataplane/hostnet"
	"github.com/gmgate/gmgate/dataplane/probe"
	"github.com/gmgate/gmgate/dataplane/xfrm"
)

// verdict is what a check comes to.
type verdict string

// Verdicts.
const (
	verdictOK   verdict = "ok"
	verdictNote verdict = "note" // worth knowing
	verdictWarn verdict = "warn" // works, but worse
	verdictFail verdict = "fail" // gmgate will not start, or not do its job
)

// finding is one check of a host. Groups and names are stable, for programs that read them.
type finding struct {
	Group  string  `json:"group"`
	Name   string  `json:"name"`
	State  verdict `json:"state"`
	Value  string  `json:"value"`
	Detail string  `json:"detail"`
	Hint   string  `json:"hint"` // what exactly to do
}

// findings are all checks of a host.
type findings struct {
	Checks []finding `json:"checks"`
	Failed int       `json:"failed"`
	Warned int       `json:"warned"`

	partial bool // an ordinary user has looked
}

// preflight checks whether a host can run gmgate. Nothing on the host is changed.
type preflight struct {
	host      *probe.Host
	esp       func() xfrm.Support                                          // what the kernel's ESP can do
	namespace func() error                                                 // makes a network namespace, and gives it up
	status    func(ctx context.Context, path string) (admin.Status, error) // of a running daemon
	hooks     func(cfg *config.Config, kernel bool, interfaces []string) []probe.Hook

	load    func(file string) (*config.Config, error)
	file    string // of the configuration; empty: the default if it exists
	group   string // of what is said
	results findings

	// Found out on the way.
	cfg       *config.Config
	loaded    bool // cfg is of a file; else it is the default one, without addresses
	running   bool // gmgate runs with this configuration already
	kernel    probe.Kernel
	caps      probe.Caps
	plain     bool // an ordinary user, who cannot run gmgate, but may look
	support   xfrm.Support
	backend   config.Backend // BackendAuto: not known
	links     []probe.Link
	gm        []string            // the interfaces that phones come in by
	reachable map[netip.Addr]bool // the addresses that sockets can be bound to
}

// newPreflight checks this host.
func newPreflight(file string) *preflight {
	return &preflight{
		file: file, load: config.Load, host: probe.Local(),
		esp:       func() xfrm.Support { return xfrm.Probe(nil) },
		namespace: tryNamespace, hooks: guardHooks,
		status: func(ctx context.Context, path string) (admin.Status, error) {
			c := admin.NewClient(path)
			defer c.Close()
			return c.Status(ctx)
		},
	}
}

// guardHooks finds out which hooks the guard would get, by putting it there for a moment; where one is attached, which. kernel
// says whether the kernel would do the ESP.
func guardHooks(cfg *config.Config, kernel bool, interfaces []string) (list []probe.Hook) {
	c := guardConfig(cfg, kernel, false, nil)
	if len(c.Interfaces) == 0 {
		c.Interfaces = interfaces
	}
	hooks, err := guard.Choose(c)
	for _, h := range hooks {
		list = append(list, probe.Hook{Interface: h.Interface, Hook: string(h.Kind), Reason: h.Reason, Err: h.Err})
	}
	for _, name := range c.Interfaces {
		if len(hooks) == 0 { // the guard did not even load
			list = append(list, probe.Hook{Interface: name, Hook: string(guard.HookNone), Err: err})
		}
	}
	return list
}

func tryNamespace() error {
	ns, err := hostnet.Create()
	if err != nil {
		return err
	}
	return ns.Close()
}

// preflightMain tells whether this host can run gmgate, and what it will do. Exit status: 0 it can, 1 something must be mended,
// 2 wrong usage.
func preflightMain(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var file string
	var asJSON, noColour bool
	fs := flag.NewFlagSet("gmgate preflight", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&file, "c", "", "configuration `file` (default "+defaultConfig+" if it exists)")
	fs.BoolVar(&asJSON, "json", false, "print JSON")
	fs.BoolVar(&noColour, "no-color", false, "no colours")
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	case fs.NArg() > 0:
		_, _ = fmt.Fprintf(stderr, "gmgate preflight: unexpected argument %q\n", fs.Arg(0))
		return 2
	}
	return newPreflight(file).report(ctx, asJSON, newConsole(stdout, noColour), stderr)
}

// report runs all checks and prints them. It returns the exit status.
func (p *preflight) report(ctx context.Context, asJSON bool, c *console, stderr io.Writer) int {
	p.run(ctx)
	if asJSON {
		if err := writeJSON(c.w, &p.results); err != nil {
			_, _ = fmt.Fprintf(stderr, "gmgate preflight: %v\n", err)
			return 1
		}
	} else {
		c.findings(&p.results)
	}
	if p.results.Failed > 0 {
		return 1
	}
	return 0
}

// run makes the checks, in the order in which they are printed. Later ones use what earlier ones have found.
func (p *preflight) run(ctx context.Context) {
	for _, s := range []struct {
		group string
		check func(context.Context)
	}{
		{"configuration", p.checkConfiguration},
		{"kernel", p.checkKernel},
		{"ebpf", p.checkBPF},
		{"esp", p.checkESP},
		{"privileges", p.checkPrivileges},
		{"addresses", p.checkAddresses},
		{"guard", p.checkGuard},
		{"ports", p.checkPorts},
		{"sysctl", p.checkSysctls},
		{"limits", p.checkLimits},
		{"files", p.checkFiles},
		{"clock", p.checkClock},
	} {
		p.group = s.group
		s.check(ctx)
	}
}

// say reports a finding of the group under way.
func (p *preflight) say(f finding) {
	f.Group = p.group
	switch f.State {
	case verdictFail:
		p.results.Failed++
	case verdictWarn:
		p.results.Warned++
	case verdictOK, verdictNote:
	}
	p.results.Checks = append(p.results.Checks, f)
}

// unknown reports what could not be found out.
func (p *preflight) unknown(name string, err error) {
	f := finding{Name: name, State: verdictNote, Value: "unknown", Detail: err.Error()}
	if denied(err) {
		f.Detail = "needs root"
	}
	p.say(f)
}

// denied reports whether something failed for want of privileges.
func denied(err error) bool {
	return errors.Is(err, fs.ErrPermission) || errors.Is(err, xfrm.ErrPermission)
}

// grave is the verdict on what this process may not do: a failure, unless it is an ordinary user who looks.
func (p *preflight) grave() verdict {
	if p.plain {
		return verdictNote
	}
	return verdictFail
}

// checkConfiguration reads the configuration and asks whether it runs already.
func (p *preflight) checkConfiguration(ctx context.Context) {
	p.cfg = config.Default()
	file := p.file
	if file == "" {
		file = defaultConfig
	}
	cfg, err := p.load(file)
	problems, invalid := errors.AsType[config.Errors](err)
	switch {
	case err == nil:
		p.cfg, p.loaded = cfg, true
		p.say(finding{
			Name: "file", State: verdictOK, Value: file, Detail: fmt.Sprintf("%d Gm and %d Mw addresses, %d workers, ipsec %s",
				len(cfg.Gm.Addresses), len(cfg.Mw.Addresses), cfg.WorkerCount(), cfg.Security.IPsec),
		})
	case p.file == "" && errors.Is(err, fs.ErrNotExist):
		p.say(finding{Name: "file", State: verdictNote, Value: "none", Detail: "there is no " + file + ": the host alone is checked", Hint: "name one with -c FILE"})
		return
	case p.file == "" && errors.Is(err, fs.ErrPermission):
		p.say(finding{Name: "file", State: verdictNote, Value: "unknown", Detail: file + " needs root: the host alone is checked"})
		return
	case invalid:
		p.say(finding{
			Name: "file", State: verdictFail, Value: file, Detail: fmt.Sprintf("%s: the host alone is checked", count(len(problems), "problem")),
			Hint: "gmgate check -c " + file,
		})
		return
	default:
		p.say(finding{Name: "file", State: verdictFail, Value: file, Detail: err.Error(), Hint: "name a file that can be read with -c FILE"})
		return
	}
	path := cfg.SocketPath()
	if path == "" {
		return
	}
	switch s, err := p.status(ctx, path); {
	case err == nil:
		p.running = true
		p.say(finding{
			Name: "running", State: verdictNote, Value: "gmgate " + s.Version,
			Detail: fmt.Sprintf("instance %s runs since %s on backend %s with %s; a second one would be refused",
				s.Instance, s.Started.UTC().Format("2006-01-02 15:04:05 MST"), s.Backend, count(s.UEs, "phone")),
		})
	case denied(err):
		p.unknown("running", err)
	}
}

// count prints a number of things.
func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// mark prints a verdict for people.
func (c *console) mark(v verdict) string {
	sgr := sgrDim
	switch v {
	case verdictOK:
		sgr = sgrGreen
	case verdictWarn:
		sgr = sgrYellow
	case verdictFail:
		sgr = sgrRed
	case verdictNote:
	}
	return c.paint(sgr, pad(string(v), 4))
}

// findings prints the checks of a host, one group after the other, with what is to be done below each.
func (c *console) findings(r *findings) {
	const before = 2 + 4 + 2 // the margin and the verdict
	for i, f := range r.Checks {
		if i == 0 || r.Checks[i-1].Group != f.Group {
			if i > 0 {
				c.line("")
			}
			c.line("%s", c.paint(sgrBold, f.Group))
		}
		names := 0
		for _, g := range r.Checks {
			if g.Group == f.Group {
				names = max(names, utf8.RuneCountInString(g.Name))
			}
		}
		text := f.Value
		if text != "" && f.Detail != "" {
			text += ": "
		}
		parts := wrap(printable(text+f.Detail), demoWidth-before-names-2)
		c.line("%s", strings.TrimRight(fmt.Sprintf("  %s  %s  %s", c.mark(f.State), pad(f.Name, names), parts[0]), " "))
		for _, l := range parts[1:] {
			c.line("%s%s", pad("", before+names+2), l)
		}
		if f.Hint == "" {
			continue
		}
		for j, l := range wrap(printable(f.Hint), demoWidth-before-2) {
			arrow := "→ "
			if j > 0 {
				arrow = "  "
			}
			c.line("%s%s", pad("", before), c.paint(sgrCyan, arrow+l))
		}
	}
	c.line("")
	text := "this host can run gmgate"
	if r.partial {
		text = "as far as this user can see, " + text
	}
	switch warned := count(r.Warned, "warning"); {
	case r.Failed > 0:
		c.line("%s", c.paint(sgrRed, fmt.Sprintf("%s and %s: mend what failed before gmgate is started", count(r.Failed, "failure"), warned)))
	case r.Warned > 0:
		c.line("%s", c.paint(sgrYellow, text+", with "+warned))
	default:
		c.line("%s", c.paint(sgrGreen, text))
	}
}

// portList prints ports in ascending order, with ranges: "5060, 6110-6113".
func portList(ports []uint16) string {
	ports = slices.Sorted(slices.Values(ports))
	text := ""
	for i := 0; i < len(ports); {
		last := i
		for last+1 < len(ports) && ports[last+1] == ports[last]+1 {
			last++
		}
		if text != "" {
			text += ", "
		}
		text += fmt.Sprint(ports[i])
		if last > i {
			text += fmt.Sprintf("-%d", ports[last])
		}
		i = last + 1
	}
	return text
}
