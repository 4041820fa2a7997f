package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/gmgate/gmgate/bench/core"
	"github.com/gmgate/gmgate/bench/lab"
	"github.com/gmgate/gmgate/bench/ue"
	"github.com/gmgate/gmgate/control/admin"
	"github.com/gmgate/gmgate/control/ims"
)

// The demo's network. Timers are short so that the whole life of an SA set fits into a few seconds.
const (
	demoDomain     = "ims.mnc001.mcc001.3gppnetwork.org"
	demoOldSet     = 2 * time.Second
	demoLifeOldSet = 4 * time.Second // in the story of a life, which looks at what is about to go
	demoAwaitAuth  = 10 * time.Second
	demoStep       = 20 * time.Second // bound of one step
	demoDrain      = demoLifeOldSet + 6*time.Second
	demoLogTail    = 25
	demoLargeBody  = 4000 // octets; more than any datagram should carry (RFC 3261 §18.1.1)
	demoMaxPhones  = 1000
	demoConcurrent = 64 // phones registering at the same time

	// Stories.
	demoTour      = "tour"
	demoLifecycle = "lifecycle"
	demoAttack    = "attack"
)

// demoFlags are the command line of `gmgate demo`.
type demoFlags struct {
	backend, ueESP, ip, transport, alg, capture string
	story, guard                                string
	ues, workers, rate                          int
	keepLog, noColour                           bool

	suites []ims.Suite // offered by the phones
	tr     ims.Transport
}

// demoMain runs the demonstration: phones, gmgate and an IMS core in network namespaces of this machine. It returns the
// exit status: 0 when every step succeeded, 1 when one failed, 2 for wrong usage.
func demoMain(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, code := demoParse(args, stderr)
	if code >= 0 {
		return code
	}
	if os.Geteuid() != 0 {
		_, _ = fmt.Fprintln(stderr, "gmgate demo: needs root: it makes network namespaces")
		return 1
	}
	// A reader of the output that goes away must not keep the demo from cleaning up.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	d := &demo{o: o, c: newConsole(stdout, o.noColour), plan: lab.PlanOf(o.ip == "6")}
	d.run(ctx)
	d.close()
	return d.finish(ctx)
}

func demoParse(args []string, stderr io.Writer) (demoFlags, int) {
	var o demoFlags
	fs := flag.NewFlagSet("gmgate demo", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&o.story, "story", demoTour, "what is shown: tour (many phones, everything they do), lifecycle (the SA sets in the life of one phone), or attack (phones that call through floods)")
	fs.StringVar(&o.backend, "backend", "auto", "ESP of gmgate: auto, userspace or xfrm")
	fs.StringVar(&o.ueESP, "ue-esp", "userspace", "ESP of the phones: userspace or xfrm")
	fs.IntVar(&o.ues, "ues", 4, "number of phones, 2 to 1000; in the attack 4 to 200, by default 20")
	fs.StringVar(&o.transport, "transport", "udp", "transport that the phones prefer: udp or tcp")
	fs.StringVar(&o.ip, "ip", "4", "IP version: 4 or 6")
	fs.BoolFunc("ipv6", "the same as -ip 6", func(v string) error {
		six, err := strconv.ParseBool(v)
		if o.ip = "4"; six {
			o.ip = "6"
		}
		return err
	})
	fs.StringVar(&o.alg, "alg", "", "the one `pair` that the phones offer, for example hmac-sha-1-96=aes-cbc (default: several, gmgate's list decides)")
	fs.StringVar(&o.capture, "capture", "", "write a pcap `file` of the Gm link, and FILE.esp_sa to decrypt it in Wireshark")
	fs.IntVar(&o.workers, "workers", 2, "workers of gmgate")
	fs.StringVar(&o.guard, "guard", "", "guard of gmgate: auto, xdp, generic, tc or off (default: gmgate's own)")
	fs.IntVar(&o.rate, "rate", 0, "packets per second of each attack (default: by what this machine can send, 30000 at most)")
	fs.BoolVar(&o.keepLog, "keep-log", false, "keep gmgate's log")
	fs.BoolVar(&o.noColour, "no-color", false, "no colours")
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return o, 0
	case err != nil:
		return o, 2
	}
	var problems []string
	oneOf := func(name, value string, allowed ...string) {
		if !slices.Contains(allowed, value) {
			problems = append(problems, fmt.Sprintf("-%s %q: want one of %s", name, value, strings.Join(allowed, ", ")))
		}
	}
	if fs.NArg() > 0 {
		problems = append(problems, fmt.Sprintf("unexpected argument %q", fs.Arg(0)))
	}
	oneOf("story", o.story, demoTour, demoLifecycle, demoAttack)
	oneOf("guard", o.guard, "", "auto", "xdp", "generic", "tc", "off")
	oneOf("backend", o.backend, "auto", "userspace", "xfrm")
	oneOf("ue-esp", o.ueESP, ue.Userspace, ue.XFRM)
	oneOf("transport", o.transport, "udp", "tcp")
	oneOf("ip", o.ip, "4", "6")
	given := map[string]bool{}
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	least, most := 2, demoMaxPhones
	switch o.story {
	case demoAttack:
		least, most = demoAttackLeast, demoAttackMost
		if !given["ues"] {
			o.ues = demoAttackPhones
		}
	case demoLifecycle:
		if given["ues"] {
			problems = append(problems, "-ues is for the other stories: that of a life has one phone, and one that it calls")
		}
		o.ues = 2
	}
	if o.ues < least || o.ues > most {
		problems = append(problems, fmt.Sprintf("-ues %d: want %d to %d, phones call each other", o.ues, least, most))
	}
	if given["rate"] && (o.story != demoAttack || o.rate < 1 || o.rate > demoAttackRate) {
		problems = append(problems, fmt.Sprintf("-rate %d: want 1 to %d, and the story %s", o.rate, demoAttackRate, demoAttack))
	}
	if o.workers < 1 || o.workers > 64 {
		problems = append(problems, fmt.Sprintf("-workers %d: want 1 to 64", o.workers))
	}
	// As many offers as let the first REGISTER still fit into a datagram.
	o.suites = []ims.Suite{{Alg: ims.AlgNull, Enc: ims.EncAESGCM}, {Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC}}
	if o.alg != "" {
		s, err := ims.ParseSuite(o.alg)
		if err != nil {
			problems = append(problems, "-alg: "+err.Error())
		}
		o.suites = []ims.Suite{s}
	}
	o.tr = ims.UDP
	if o.transport == "tcp" {
		o.tr = ims.TCP
	}
	if len(problems) > 0 {
		for _, p := range problems {
			_, _ = fmt.Fprintln(stderr, "gmgate demo:", p)
		}
		return o, 2
	}
	return o, -1
}

// phone is one of the demo's phones.
type phone struct {
	*ue.UE
	sub  core.Subscriber
	addr netip.Addr
	made ue.Result // the first registration
	last ue.Result // the last one
	name string
}

// demo is one run.
type demo struct {
	o    demoFlags
	c    *console
	plan lab.Plan

	lab     *lab.Lab
	core    *core.Core
	capture *lab.Capture
	daemon  *lab.Daemon
	farm    *ue.Farm
	phones  []*phone
	admin   *admin.Client
	config  string // of the daemon
	backend string // in use
	cleanup []func() error
	sas     []lab.SA // of every set that was ever made, for the capture

	others int               // subscribers beside those of the phones
	subs   []core.Subscriber // all of them
	watch  func(core.Seen)   // sees what arrives at the core; may be nil
	talks  [][]string        // table of the ESP packets by UE, for the summary
}

// errStopped ends the story after a step that everything later depends on.
var errStopped = errors.New("stopped")

// run tells the story. Each chapter needs what the one before built; a failed step inside a chapter does not end it.
func (d *demo) run(ctx context.Context) {
	d.title()
	chapters := []func(context.Context) error{
		d.build, d.registerFirst, d.registerOthers, d.messages, d.calls, d.events, d.reregister, d.deregister, d.verify,
	}
	switch d.o.story {
	case demoLifecycle:
		chapters = d.lifecycle()
	case demoAttack:
		chapters = d.attack()
	}
	for _, chapter := range chapters {
		if ctx.Err() != nil || chapter(ctx) != nil {
			return
		}
	}
}

func (d *demo) title() {
	d.c.line("%s  %s", d.c.paint(sgrBold, "gmgate demo"), d.c.paint(sgrDim, "the Gm edge of an IMS core, in three network namespaces of this machine"))
	d.c.line("")
	left := []string{"phones", fmt.Sprintf("%d × %s ESP", d.o.ues, d.o.ueESP), d.plan.UE(0).String() + " …"}
	mid := []string{"gmgate", fmt.Sprintf("%s ESP, workers: %d", d.o.backend, d.o.workers), d.plan.Gm.String() + " | " + d.plan.Mw.String()}
	right := []string{"IMS core", "S-CSCF and AuC", d.plan.Core.String()}
	link := []string{"", "── Gm: ESP ──", ""}
	mw := []string{"", "── Mw: SIP ──", ""}
	for i := range left {
		d.c.line("  %s%s%s%s%s", pad(left[i], 21), pad(link[i], 15), pad(mid[i], 30), pad(mw[i], 15), right[i])
	}
}

// step runs one step under its own time limit.
func (d *demo) step(ctx context.Context, name string, f func(context.Context) (string, error)) bool {
	return d.c.step(name, func() (string, error) {
		ctx, cancel := context.WithTimeout(ctx, demoStep)
		defer cancel()
		return f(ctx)
	})
}

func (d *demo) onClose(f func() error) { d.cleanup = append(d.cleanup, f) }

func (d *demo) build(ctx context.Context) error {
	d.c.section("The network")
	ok := d.step(ctx, "Namespaces and links", func(context.Context) (detail string, err error) {
		if d.lab, err = lab.New(lab.Options{IPv6: d.o.ip == "6", Prefix: "gmdemo"}); err != nil {
			return "", err
		}
		d.onClose(d.lab.Close)
		return d.lab.UE.Name() + ", -gm, -core", nil
	}) && d.step(ctx, "IMS core", func(context.Context) (detail string, err error) {
		subs := core.Subscribers(d.o.ues+d.others, demoDomain)
		d.core, err = core.Start(core.Config{
			NS: d.lab.Core, Addr: netip.AddrPortFrom(d.plan.Core, lab.PortCore), Domain: demoDomain, Subscribers: subs, Watch: d.watch,
		})
		if err != nil {
			return "", err
		}
		d.onClose(d.core.Close)
		d.subs = subs
		for i, s := range subs[:d.o.ues] {
			d.phones = append(d.phones, &phone{sub: s, addr: d.plan.UE(i), name: fmt.Sprintf("phone %d", i+1)})
		}
		return fmt.Sprintf("%s, %d subscribers", d.core.Addr(), len(subs)), nil
	}) && d.step(ctx, "Tap on the Gm link", func(context.Context) (detail string, err error) {
		if d.capture, err = d.lab.Capture(d.o.capture); err != nil {
			return "", err
		}
		detail = "counts every frame, both directions"
		if d.o.capture != "" {
			detail = "into " + d.o.capture
		}
		return detail, nil
	}) && d.step(ctx, "gmgate", d.startDaemon) &&
		d.step(ctx, "Phones", func(context.Context) (detail string, err error) {
			d.farm, err = ue.NewFarm(ue.FarmConfig{
				NS: d.lab.UE, Prefixes: []netip.Prefix{d.plan.UEs}, PCSCF: netip.AddrPortFrom(d.plan.Gm, lab.PortClear), ESP: d.o.ueESP,
				OldSetLinger: d.oldSet(),
			})
			if err != nil {
				return "", err
			}
			d.onClose(d.farm.Close)
			for i, p := range d.phones {
				if err := d.switchOn(i, p); err != nil {
					return "", err
				}
			}
			habits := "they send by TCP"
			if d.o.tr == ims.UDP {
				habits = "odd ones send everything by UDP, even ones large messages by TCP"
			}
			return fmt.Sprintf("%s to %s, they offer %s; %s", d.phones[0].addr, d.phones[len(d.phones)-1].addr, suiteNames(d.o.suites), habits), nil
		})
	if !ok {
		return errStopped
	}
	d.kernelCounts(ctx, "before the first registration")
	return nil
}

// switchOn makes the UE of phone i.
func (d *demo) switchOn(i int, p *phone) (err error) {
	p.UE, err = d.farm.NewUE(ue.Config{
		Identity: ue.Identity{IMPI: p.sub.IMPI, Domain: p.sub.Domain, K: p.sub.K, OPc: p.sub.OPc},
		Addr:     p.addr, Transport: d.o.tr, Offers: d.o.suites, Ring: 50 * time.Millisecond,
		// Both kinds of phone exist: those that follow RFC 3261 §18.1.1 and those that send everything by UDP.
		Quirks: ue.Quirks{LargeUDP: d.o.tr == ims.UDP && i%2 == 0},
	})
	return err
}

func suiteNames(list []ims.Suite) string {
	names := make([]string, len(list))
	for i, s := range list {
		names[i] = s.String()
	}
	return strings.Join(names, ", ")
}

// oldSet is how long a replaced SA set stays.
func (d *demo) oldSet() time.Duration {
	if d.o.story == demoLifecycle {
		return demoLifeOldSet
	}
	return demoOldSet
}

// startDaemon starts gmgate, or starts it again with the configuration that it had.
func (d *demo) startDaemon(ctx context.Context) (string, error) {
	binary, err := os.Executable()
	if err != nil {
		return "", err
	}
	if d.config == "" {
		o := lab.DaemonOptions{
			Backend: d.o.backend, Workers: d.o.workers, OldSet: d.oldSet(), RegAwaitAuth: demoAwaitAuth, HealthInterval: -1, LogLevel: "debug",
			Guard: lab.GuardOptions{Mode: d.o.guard},
		}
		switch d.o.story {
		case demoLifecycle:
			o.StorePath, o.Reconcile = filepath.Join(filepath.Dir(d.lab.AdminSocket()), "gmgate.db"), demoReconcile
		case demoAttack:
			attackOptions(&o, d.o)
		}
		d.config = d.lab.DaemonConfig(o)
		d.admin = admin.NewClient(d.lab.AdminSocket())
		d.onClose(func() error { d.admin.Close(); return nil })
	}
	d.daemon, err = d.lab.StartDaemon(ctx, binary, d.config, nil)
	if err != nil {
		return "", err
	}
	m, err := d.daemon.Metrics(ctx)
	if err != nil {
		return "", err
	}
	for _, name := range []string{"xfrm", "userspace"} {
		if lab.Sum(m, "gmgate_esp_backend_info", fmt.Sprintf("backend=%q", name)) > 0 {
			d.backend = name
		}
	}
	return fmt.Sprintf("process %d, ESP backend %s, ready", d.daemon.PID(), d.backend), nil
}

// register registers a phone and notes its SAs.
func (d *demo) register(ctx context.Context, p *phone) error {
	res, err := p.Register(ctx)
	if err != nil {
		return err
	}
	p.made, p.last = res, res
	return nil
}

// noteSAs keeps the SAs of a phone's current set for the capture.
func (d *demo) noteSAs(p *phone) error {
	for _, s := range p.last.Set.SAs {
		d.sas = append(d.sas, lab.SA{Src: s.Src.Addr(), Dst: s.Dst.Addr(), SPI: s.SPI, Keys: s.Keys})
	}
	return d.capture.EspSA(d.sas[len(d.sas)-4:]...)
}

func (d *demo) registerFirst(ctx context.Context) error {
	p := d.phones[0]
	d.c.section("Registration of phone 1, message by message (TS 33.203 §7.2)")
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, demoStep)
	defer cancel()
	err := d.register(ctx, p)
	took := time.Since(began)
	if err == nil {
		d.capture.Settle(20*time.Millisecond, time.Second)
		d.c.ladder(d.registrationLadder(p, began))
		d.c.line("")
		d.c.table(setTable(p.last))
		d.c.line("")
		err = d.noteSAs(p)
	}
	detail := ""
	if err == nil {
		detail = fmt.Sprintf("%s, both ends agreed on %s", p.last.AssociatedURI[0], p.last.Suite)
	}
	d.c.result("phone 1 is registered", detail, took, err)
	if err != nil {
		return errStopped
	}
	d.kernelCounts(ctx, "with one phone: four SAs")
	return nil
}

func (d *demo) registerOthers(ctx context.Context) error {
	rest := d.phones[1:]
	d.c.section("The other phones, all at once")
	ok := d.step(ctx, fmt.Sprintf("%d more registered", len(rest)), func(ctx context.Context) (string, error) { return d.registerAll(ctx, rest) })
	if !ok {
		return errStopped
	}
	d.step(ctx, "SAs in place", d.inPlace)
	d.kernelCounts(ctx, "with all phones")
	return nil
}

// registerAll registers phones at the same time and says how long it took.
func (d *demo) registerAll(ctx context.Context, phones []*phone) (string, error) {
	gate := make(chan struct{}, demoConcurrent)
	errs := make([]error, len(phones))
	times := make([]time.Duration, len(phones))
	var wg sync.WaitGroup
	for i, p := range phones {
		wg.Go(func() {
			gate <- struct{}{}
			defer func() { <-gate }()
			begin := time.Now()
			errs[i] = d.register(ctx, p)
			times[i] = time.Since(begin)
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return "", err
	}
	for _, p := range phones {
		if err := d.noteSAs(p); err != nil {
			return "", err
		}
	}
	slices.Sort(times)
	return fmt.Sprintf("median %s, slowest %s", millis(times[len(times)/2]), millis(times[len(times)-1])), nil
}

// inPlace says that there are as many SA sets and SAs as phones need.
func (d *demo) inPlace(ctx context.Context) (string, error) {
	m, err := d.daemon.Metrics(ctx)
	if err != nil {
		return "", err
	}
	sets, sas := lab.Sum(m, "gmgate_sa_sets", `phase="established"`), lab.Sum(m, "gmgate_esp_sas")
	if int(sets) != d.o.ues || int(sas) != 4*d.o.ues {
		return "", fmt.Errorf("%g sets and %g SAs for %d phones", sets, sas, d.o.ues)
	}
	return fmt.Sprintf("%g sets, %g SAs", sets, sas), nil
}

func (d *demo) messages(ctx context.Context) error {
	a, b := d.phones[0], d.phones[1]
	d.c.section("Messages")
	send := func(name string, from, to *phone, body string) {
		d.step(ctx, name, func(ctx context.Context) (string, error) {
			had := len(to.Received())
			status, err := from.Message(ctx, to.sub.IMPU[0], body)
			if err != nil {
				return "", err
			}
			if status != 200 {
				return "", fmt.Errorf("answered %d", status)
			}
			got := to.Received()
			if len(got) <= had || got[len(got)-1].Body != body {
				return "", errors.New("the other phone did not get the text")
			}
			return fmt.Sprintf("%d octets, delivered by %s: 200", len(body), way(got[len(got)-1], to.last)), nil
		})
	}
	send("phone 1 → phone 2", a, b, "good morning")
	send("phone 2 → phone 1", b, a, "you too")
	d.step(ctx, "network → phone 1", func(ctx context.Context) (string, error) {
		status, err := d.core.SendMessage(ctx, a.sub.IMPU[0], "welcome to the network")
		if err != nil {
			return "", err
		}
		if status != 200 {
			return "", fmt.Errorf("answered %d", status)
		}
		return "MESSAGE of an application server along the Path: 200", nil
	})
	send("phone 1 → phone 2, large", a, b, strings.Repeat("long story. ", demoLargeBody/12))
	send("phone 2 → phone 1, large", b, a, strings.Repeat("long answer. ", demoLargeBody/13))
	return nil
}

// way says how a request came to a phone.
func way(in ue.Incoming, r ue.Result) string {
	switch {
	case in.Transport == ims.UDP:
		return fmt.Sprintf("UDP, port-pc %d to port-us", in.Remote.Port())
	case in.Remote.Port() == r.Ports.PS:
		return "TCP, on the phone's connection"
	}
	return fmt.Sprintf("TCP, port-pc %d to port-us", in.Remote.Port())
}

func (d *demo) calls(ctx context.Context) error {
	a, b := d.phones[0], d.phones[1]
	d.c.section("Calls")
	call := func(name string, from, to *phone, o ue.CallOptions, want int) {
		d.step(ctx, name, func(ctx context.Context) (string, error) {
			res, err := from.Call(ctx, to.sub.IMPU[0], o)
			if err != nil {
				return "", err
			}
			if res.Status != want {
				return "", fmt.Errorf("answered %d, want %d", res.Status, want)
			}
			var detail strings.Builder
			_, _ = fmt.Fprintf(&detail, "INVITE by %s:", res.Transport)
			for _, s := range res.Statuses {
				_, _ = fmt.Fprintf(&detail, " %d", s)
			}
			if o.PRACK {
				detail.WriteString(", PRACK")
			}
			if o.ReInvite {
				detail.WriteString(", re-INVITE")
			}
			switch {
			case o.Cancel:
				detail.WriteString(", CANCEL")
			case o.RemoteBye:
				detail.WriteString(", BYE from the other side")
			default:
				_, _ = fmt.Fprintf(&detail, ", BYE %d", res.Bye)
			}
			return detail.String(), nil
		})
	}
	hold := 20 * time.Millisecond
	call("phone 1 → phone 2", a, b, ue.CallOptions{PRACK: true, Hold: hold}, 200)
	call("phone 2 → phone 1", b, a, ue.CallOptions{PRACK: true, Hold: hold, RemoteBye: true}, 200)
	call("large session description", a, b, ue.CallOptions{PRACK: true, BodySize: demoLargeBody, Hold: hold}, 200)
	call("call with re-INVITE", a, b, ue.CallOptions{PRACK: true, ReInvite: true, Hold: hold}, 200)
	call("given up while it rings", b, a, ue.CallOptions{Cancel: true}, 487)
	return nil
}

func (d *demo) events(ctx context.Context) error {
	a := d.phones[0]
	d.c.section("Registration event (RFC 3680)")
	d.step(ctx, "SUBSCRIBE and NOTIFY", func(ctx context.Context) (string, error) {
		res, err := a.Subscribe(ctx, "reg")
		if err != nil {
			return "", err
		}
		if res.Status != 200 {
			return "", fmt.Errorf("answered %d", res.Status)
		}
		if !strings.Contains(res.Notify.Body, "<reginfo") {
			return "", errors.New("the NOTIFY has no reginfo document")
		}
		return fmt.Sprintf("200, and a NOTIFY of %d octets to port-us", len(res.Notify.Body)), nil
	})
	return nil
}

func (d *demo) reregister(ctx context.Context) error {
	a, b := d.phones[0], d.phones[1]
	d.c.section("Re-registration of phone 1 (TS 33.203 §7.4)")
	d.step(ctx, "refresh, no challenge", func(ctx context.Context) (string, error) {
		res, err := a.Reregister(ctx)
		if err != nil {
			return "", err
		}
		if res.Challenged || res.SPIs != a.last.SPIs {
			return "", errors.New("the SA set changed without a challenge")
		}
		return "the core trusts integrity-protected=yes: the same SAs live longer", nil
	})
	old := a.last
	b1 := d.core.Behaviour()
	b1.AlwaysChallenge = true
	d.core.SetBehaviour(b1)
	ok := d.step(ctx, "with a new challenge", func(ctx context.Context) (string, error) {
		res, err := a.Reregister(ctx)
		if err != nil {
			return "", err
		}
		if !res.Challenged || res.SPIs == old.SPIs {
			return "", errors.New("no new SA set")
		}
		a.last = res
		return "401 in the old set, 200 in the new one", d.noteSAs(a)
	})
	b1.AlwaysChallenge = false
	d.core.SetBehaviour(b1)
	if !ok {
		return nil
	}
	d.c.line("")
	d.c.table(changeTable(old, a.last))
	d.c.line("")
	d.step(ctx, "traffic moves over", func(ctx context.Context) (string, error) {
		before := d.capture.Packets(a.last.SPIs.PS)
		if status, err := a.Message(ctx, b.sub.IMPU[0], "by the new set"); err != nil || status != 200 {
			return "", errors.Join(err, fmt.Errorf("answered %d", status))
		}
		if status, err := d.core.SendMessage(ctx, a.sub.IMPU[0], "got it"); err != nil || status != 200 {
			return "", errors.Join(err, fmt.Errorf("answered %d", status))
		}
		in := a.Received()
		got := in[len(in)-1]
		if got.Set != a.last.Set.Generation {
			return "", fmt.Errorf("the network's request came by set %d, want %d", got.Set, a.last.Set.Generation)
		}
		d.capture.Settle(10*time.Millisecond, time.Second)
		return fmt.Sprintf("%d packets on SPI %s, requests to the phone by %s",
			d.capture.Packets(a.last.SPIs.PS)-before, a.last.SPIs.PS, way(got, a.last)), nil
	})
	d.step(ctx, "the old set goes", func(ctx context.Context) (string, error) {
		return fmt.Sprintf("%d sets left, one per phone", d.o.ues), d.waitSets(ctx, d.o.ues)
	})
	return nil
}

// waitSets waits until gmgate has exactly n SA sets, and 4n SAs in its backend.
func (d *demo) waitSets(ctx context.Context, n int) error {
	ctx, cancel := context.WithTimeout(ctx, demoDrain)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		m, err := d.daemon.Metrics(ctx)
		if err != nil {
			return err
		}
		sets, sas := int(lab.Sum(m, "gmgate_sa_sets")), int(lab.Sum(m, "gmgate_esp_sas"))
		if sets == n && sas == 4*n {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d SA sets and %d SAs after %s, want %d and %d", sets, sas, demoDrain, n, 4*n)
		case <-tick.C:
		}
	}
}

func (d *demo) deregister(ctx context.Context) error {
	d.c.section("De-registration")
	d.step(ctx, "what the phones have sent", func(ctx context.Context) (detail string, err error) {
		d.talks, detail, err = d.espByUE(ctx)
		return detail, err
	})
	d.step(ctx, fmt.Sprintf("%d phones leave", len(d.phones)), func(ctx context.Context) (string, error) {
		errs := make([]error, len(d.phones))
		var wg sync.WaitGroup
		for i, p := range d.phones {
			wg.Go(func() { errs[i] = p.Deregister(ctx) })
		}
		wg.Wait()
		return "each 200 came inside the SA", errors.Join(errs...)
	})
	d.step(ctx, "their SAs go", func(ctx context.Context) (string, error) {
		return "no set and no SA is left", d.waitSets(ctx, 0)
	})
	d.kernelCounts(ctx, "after the last phone")
	return nil
}
