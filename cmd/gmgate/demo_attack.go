package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/gmgate/gmgate/bench/attack"
	"github.com/gmgate/gmgate/bench/core"
	"github.com/gmgate/gmgate/bench/lab"
	"github.com/gmgate/gmgate/bench/ue"
	"github.com/gmgate/gmgate/control/admin"
	"github.com/gmgate/gmgate/dataplane/guard"
)

// The story of an attack: phones call each other in a loop all the time, while one attack after the other comes over the link
// that they share. After each it is told where its packets ended, and no call may be lost. Whatever is not as told fails the
// demo.

// Bounds of the story.
const (
	demoAttackPhones = 20
	demoAttackLeast  = 4
	demoAttackMost   = 200
	demoAttackRate   = 200_000 // packets per second, the most that may be asked for

	attackRate      = 30_000 // packets per second where the machine is fast enough
	attackRateLeast = 200
	attackShare     = 16                      // the rate is this part of what the machine can send: the rest is for those who are attacked
	attackUnguarded = 4                       // without a guard the rate is divided by this
	attackProbes    = 5                       // measurements of
	attackProbe     = 1 << 11                 // frames
	attackStrike    = 1500 * time.Millisecond // of one attack; there are ten
	attackQuiet     = 3 * time.Second
	attackSettle    = 3 * time.Second // until all that was sent has been counted
	attackLook      = 2 * statsAge    // between two looks at counters, or the second would be the first one again
	attackAwaitAuth = 3 * time.Second // timers.reg_await_auth: what floods begin has to go while we watch
	attackPending   = 1000            // limits.pending_registrations
	attackSpare     = 32              // subscribers whom floods name: the core challenges them
	attackSources   = 4000            // of the flood with many
	attackKept      = 4096            // packets to replay
	attackHold      = 20 * time.Millisecond
	attackPause     = 10 * time.Millisecond // between two rounds of a phone, for each phone that there is
	attackSlow      = 8                     // on a slow machine up to so many times as long
	attackCall      = 40 * time.Second      // bound of a call; a transaction takes 64*T1 = 32 s to fail (RFC 3261 §17)
	attackMemory    = 128 << 20             // octets that the daemon may grow by
	attackProblems  = 5                     // that are told

	// gmgate's defaults for REGISTERs from one source; a network of package lab has wider ones of its own.
	guardRegisterRate  = 10 // per second
	guardRegisterBurst = 64
)

// attackOptions makes the daemon one that is attacked.
func attackOptions(d *lab.DaemonOptions, o demoFlags) {
	d.LogLevel, d.RegAwaitAuth = "info", attackAwaitAuth
	d.Pending, d.PendingSource = attackPending, demoConcurrent
	d.Guard.RegisterRate, d.Guard.RegisterBurst = guardRegisterRate, guardBurst(o)
}

// guardBurst is how many REGISTERs of one source the guard lets through at once: gmgate's default where that will do. IPv6
// phones of the demo share a /64 and so are one source: all of them have to get in, and may have to repeat themselves.
func guardBurst(o demoFlags) int {
	if o.ip == "6" {
		return max(4*o.ues, guardRegisterBurst)
	}
	return guardRegisterBurst
}

// attack returns the chapters of the story.
func (d *demo) attack() []func(context.Context) error {
	s := &siege{demo: d, got: map[string]struct{}{}}
	d.others, d.watch = 1+attackSpare, s.arrived
	return []func(context.Context) error{
		d.build, s.prepare, s.register, s.quiet, s.unknown, s.cleartext, s.flood, s.replay, s.malformed, s.aftermath, s.verify,
	}
}

// siege is the story of one attack.
type siege struct {
	*demo
	injector *attack.Injector
	rate     int    // packets per second
	hook     string // of the guard; empty: there is none
	traffic  *traffic
	newcomer *phone   // that registered during a flood
	kept     [][]byte // packets to replay
	calm     sight    // before the first attack
	idle     float64  // CPU of the daemon before it, in % of a core
	rows     []strike

	mu       sync.Mutex
	got      map[string]struct{} // Call-IDs of the attacker that reached the core, repetitions left out
	problems []string            // that the core found
}

// arrived looks at what the core receives.
func (s *siege) arrived(m core.Seen) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if strings.HasPrefix(m.CallID, attack.CallID) {
		s.got[m.CallID] = struct{}{}
	}
	if len(m.Problems) > 0 && len(s.problems) < attackProblems {
		s.problems = append(s.problems, fmt.Sprintf("%s %d: %s", m.Method, m.Status, strings.Join(m.Problems, ", ")))
	}
}

// reached is how many messages of the attacker the core has got.
func (s *siege) reached() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.got)
}

// prepare takes the attacker's place, and finds out how strong it may be.
func (s *siege) prepare(ctx context.Context) error {
	s.c.section("The attacker")
	ok := s.step(ctx, "Packet socket on the Gm link", func(ctx context.Context) (string, error) {
		to, err := attack.HardwareAddr(s.lab.GM, lab.LinkGm)
		if err != nil {
			return "", err
		}
		if s.injector, err = attack.Open(s.lab.UE, lab.LinkUE, to); err != nil {
			return "", err
		}
		s.onClose(s.injector.Close)
		return "it sends in the name of anybody, phones as well as strangers", nil
	}) && s.step(ctx, "The guard", func(ctx context.Context) (string, error) {
		m, err := s.daemon.Metrics(ctx)
		if err != nil {
			return "", err
		}
		s.hook = guardOf(m)
		switch {
		case s.hook != "" && s.o.guard == "off":
			return "", fmt.Errorf("it is there (%s), although it was switched off", s.hook)
		case s.hook != "":
			return s.hook + " on the Gm link", nil
		case s.o.guard != "" && s.o.guard != "off" && s.o.guard != "auto":
			return "", errors.New("there is none")
		}
		return fmt.Sprintf("none: ESP backend, policies and SIP are on their own, at 1/%d of the rate", attackUnguarded), nil
	}) && s.step(ctx, "Its strength", func(ctx context.Context) (string, error) {
		// The best of several: what else runs here can only make it look weaker.
		speed := 0.0
		for range attackProbes {
			one, err := s.injector.Speed(ctx, attackProbe)
			if err != nil {
				return "", err
			}
			speed = max(speed, one)
		}
		s.rate = s.o.rate
		if s.rate == 0 {
			s.rate = max(min(int(speed)/attackShare, attackRate), attackRateLeast)
			if s.hook == "" {
				s.rate /= attackUnguarded
			}
		}
		return fmt.Sprintf("%d packets/s; this machine could send %.0f", s.rate, speed), nil
	})
	return stopped(ok)
}

func (s *siege) register(ctx context.Context) error {
	s.c.section("Registration")
	ok := s.step(ctx, fmt.Sprintf("%d phones register", len(s.phones)), func(ctx context.Context) (string, error) {
		return s.registerAll(ctx, s.phones)
	}) && s.step(ctx, "SAs in place", s.inPlace)
	if ok {
		s.kernelCounts(ctx, "with all phones")
	}
	return stopped(ok)
}

// traffic is what phones do all the time: each calls its neighbour, sends it a message, and begins anew.
type traffic struct {
	stop chan struct{}
	once sync.Once
	wg   sync.WaitGroup

	mu   sync.Mutex
	load load
	errs []error // what the first ones were lost by
}

// load counts what phones did: calls with their INVITE and BYE answered 200, messages answered 200, and what was lost.
type load struct{ calls, messages, lost int }

func (l load) since(before load) load {
	return load{l.calls - before.calls, l.messages - before.messages, l.lost - before.lost}
}

func (l load) String() string {
	return fmt.Sprintf("%d calls and %d messages, %d lost", l.calls, l.messages, l.lost)
}

// start lets phones talk until end.
func (t *traffic) start(ctx context.Context, phones []*phone, pause time.Duration) {
	t.stop = make(chan struct{})
	for i, p := range phones {
		to := phones[(i+1)%len(phones)].sub.IMPU[0]
		t.wg.Go(func() {
			// They begin spread over a pause, or they would all speak in the same moment for ever.
			wait := time.NewTimer(pause * time.Duration(i) / time.Duration(len(phones)))
			defer wait.Stop()
			for n := 0; ; n++ {
				select {
				case <-ctx.Done():
					return
				case <-t.stop:
					return
				case <-wait.C:
				}
				t.note(ctx, fmt.Sprintf("%s, call %d", p.name, n+1), talk(ctx, p, to, n), func(l *load) { l.calls++ })
				t.note(ctx, fmt.Sprintf("%s, message %d", p.name, n+1), text(ctx, p, to), func(l *load) { l.messages++ })
				wait.Reset(pause)
			}
		})
	}
}

// talk makes one call.
func talk(ctx context.Context, p *phone, to string, n int) error {
	ctx, cancel := context.WithTimeout(ctx, attackCall)
	defer cancel()
	res, err := p.Call(ctx, to, ue.CallOptions{PRACK: n%2 == 0, Hold: attackHold})
	if err == nil && (res.Status != 200 || res.Bye != 200) {
		err = fmt.Errorf("INVITE answered %d, BYE %d", res.Status, res.Bye)
	}
	return err
}

// text sends one message.
func text(ctx context.Context, p *phone, to string) error {
	ctx, cancel := context.WithTimeout(ctx, attackCall)
	defer cancel()
	status, err := p.Message(ctx, to, "are you still there?")
	if err == nil && status != 200 {
		err = fmt.Errorf("MESSAGE answered %d", status)
	}
	return err
}

// note counts how something went. What ends because the demo does is not counted.
func (t *traffic) note(ctx context.Context, what string, err error, count func(*load)) {
	if ctx.Err() != nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if err == nil {
		count(&t.load)
		return
	}
	t.load.lost++
	if len(t.errs) < attackProblems {
		t.errs = append(t.errs, fmt.Errorf("%s: %w", what, err))
	}
}

// now returns what was done so far.
func (t *traffic) now() load {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.load
}

// losses says what was lost, nil if nothing.
func (t *traffic) losses() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return errors.Join(t.errs...)
}

// end lets everybody finish what he is at. It may be called more than once.
func (t *traffic) end() error {
	t.once.Do(func() { close(t.stop) })
	t.wg.Wait()
	return nil
}

// sight is what is to be seen at a moment.
type sight struct {
	at       time.Time
	metrics  map[string]float64
	cpu      time.Duration // that the daemon has used
	load     load
	lost     uint64 // frames that the link has dropped
	got      int    // messages of the attacker at the core
	resident int64  // octets of the daemon
}

func (s *siege) look(ctx context.Context) (v sight, err error) {
	if v.metrics, err = s.daemon.Metrics(ctx); err != nil {
		return v, err
	}
	for _, end := range []func() (uint64, error){
		func() (uint64, error) { return attack.Lost(s.lab.UE, lab.LinkUE) },
		func() (uint64, error) { return attack.Lost(s.lab.GM, lab.LinkGm) },
	} {
		n, err := end()
		if err != nil {
			return v, err
		}
		v.lost += n
	}
	v.at, v.got, v.load = time.Now(), s.reached(), s.traffic.now()
	v.cpu, v.resident, err = processUse(s.daemon.PID())
	return v, err
}

// processUse returns the CPU time and the resident memory in octets of a process.
func processUse(pid int) (cpu time.Duration, resident int64, err error) {
	line, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, 0, err
	}
	return parseStat(line)
}

// parseStat reads what proc(5) says of a process. Its name may hold anything, so fields are counted behind it.
func parseStat(line []byte) (cpu time.Duration, resident int64, err error) {
	const (
		utime, stime, rss = 11, 12, 21 // from the state on
		perTick           = time.Second / 100
	)
	fields := bytes.Fields(line[bytes.LastIndexByte(line, ')')+1:])
	if len(fields) <= rss {
		return 0, 0, fmt.Errorf("read the use of a process: %d fields", len(fields))
	}
	var n [3]int64
	for i, f := range []int{utime, stime, rss} {
		if n[i], err = strconv.ParseInt(string(fields[f]), 10, 64); err != nil {
			return 0, 0, fmt.Errorf("read the use of a process: %w", err)
		}
	}
	return time.Duration(n[0]+n[1]) * perTick, n[2] * int64(os.Getpagesize()), nil
}

// percent is the CPU between two looks, in % of a core.
func percent(a, b sight) float64 {
	if d := b.at.Sub(a.at); d > 0 {
		return 100 * float64(b.cpu-a.cpu) / float64(d)
	}
	return 0
}

// quiet lets the phones talk without an attack.
func (s *siege) quiet(ctx context.Context) error {
	s.c.section("A quiet time")
	s.traffic = new(traffic)
	s.capture.Keep(attackKept)
	// Where the machine is slow, so are the phones.
	pause := attackPause * time.Duration(len(s.phones))
	if s.o.rate == 0 {
		full := s.rate
		if s.hook == "" {
			full *= attackUnguarded
		}
		pause *= time.Duration(min(attackRate/full, attackSlow))
	}
	s.traffic.start(ctx, s.phones, pause)
	s.onClose(s.traffic.end)
	ok := s.step(ctx, "everybody calls", func(ctx context.Context) (string, error) {
		before, err := s.look(ctx)
		if err != nil {
			return "", err
		}
		if err := wait(ctx, attackQuiet); err != nil {
			return "", err
		}
		if s.calm, err = s.look(ctx); err != nil {
			return "", err
		}
		s.idle = percent(before, s.calm)
		done := s.calm.load.since(before.load)
		if done.calls == 0 || done.messages == 0 {
			err = fmt.Errorf("%s", done)
		}
		return fmt.Sprintf("%s; gmgate takes %.0f %% of a core", done, s.idle), errors.Join(err, s.traffic.losses())
	}) && s.step(ctx, "the attacker has listened", func(context.Context) (string, error) {
		s.kept = s.capture.Kept()
		if len(s.kept) == 0 {
			return "", errors.New("it has caught nothing")
		}
		// The tap could not keep up with what comes now.
		return fmt.Sprintf("%d ESP packets of phones to send again; from now on the tap sees what gmgate sends", len(s.kept)), s.capture.Outgoing()
	})
	if ok {
		s.calm, _ = s.look(ctx) // what fails now will fail soon
	}
	return stopped(ok)
}

func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// strike is one attack and what became of it.
type strike struct {
	name   string
	next   func(b []byte, n int) []byte
	slower int                 // the rate is divided by this; zero: it is not
	during func() error        // happens meanwhile; may be nil
	lets   bool                // some of its messages may reach the core, none of any other attack may
	proof  func(*strike) error // what must be so afterwards where there is a guard; may be nil
	always func(*strike) error // and what must be so without one as well; may be nil

	sent    attack.Result
	guard   map[string]float64 // dropped there by reason
	esp     map[string]float64
	socket  map[string]float64
	sip     map[string]float64
	arrived int    // messages at the core
	lost    uint64 // frames that the link dropped
	load    load
}

func total(counts map[string]float64) (sum float64) {
	for _, v := range counts {
		sum += v
	}
	return sum
}

// growth is what was counted between two looks, by the values of a label; what did not grow is left out.
func growth(a, b sight, name, label string, labels ...string) map[string]float64 {
	before := lab.By(a.metrics, name, label, labels...)
	grown := lab.By(b.metrics, name, label, labels...)
	for k := range grown {
		if grown[k] -= before[k]; grown[k] == 0 {
			delete(grown, k)
		}
	}
	return grown
}

// take notes what was counted between two looks.
func (r *strike) take(a, b sight) {
	r.guard = growth(a, b, "gmgate_bpf_packets_total", "reason", `verdict="drop"`)
	r.esp = growth(a, b, "gmgate_esp_drops_total", "reason")
	maps.Copy(r.esp, growth(a, b, "gmgate_xfrm_errors_total", "counter"))
	r.socket = growth(a, b, "gmgate_socket_drops_total", "reason")
	r.sip = growth(a, b, "gmgate_sip_drops_total", "reason")
	for k, v := range growth(a, b, "gmgate_sip_rejected_total", "reason") {
		r.sip[k] += v
	}
	r.arrived, r.lost = b.got-a.got, b.lost-a.lost
}

// exactly says that the guard dropped everything, for the one reason that there is: what was sent and what was counted may
// differ by what the link between them has lost.
func exactly(reason string) func(*strike) error {
	return func(r *strike) error {
		n := uint64(r.guard[reason])
		if sent := uint64(r.sent.Sent); n > sent || n+r.lost < sent {
			return fmt.Errorf("the guard counts %d packets as %s; %d were sent, and the link has lost %d", n, reason, sent, r.lost)
		}
		return nil
	}
}

// check says what is not as it must be.
func (r *strike) check(guarded bool) error {
	var errs []error
	if r.sent.Sent == 0 {
		errs = append(errs, errors.New("nothing was sent"))
	}
	if r.arrived > 0 && !r.lets {
		errs = append(errs, fmt.Errorf("%d messages of the attacker reached the core", r.arrived))
	}
	if guarded && r.proof != nil {
		errs = append(errs, r.proof(r))
	}
	if r.always != nil {
		errs = append(errs, r.always(r))
	}
	return errors.Join(errs...)
}

// run carries out an attack and tells what became of it. One that is not as told does not end the story: the table at the end
// is wanted all the more.
func (s *siege) run(ctx context.Context, r strike) {
	var use float64
	s.step(ctx, r.name, func(ctx context.Context) (string, error) {
		before, err := s.look(ctx)
		if err != nil {
			return "", err
		}
		meanwhile := make(chan error, 1)
		go func() {
			if r.during == nil {
				meanwhile <- nil
				return
			}
			meanwhile <- r.during()
		}()
		r.sent, err = s.injector.Send(ctx, attack.Wave{
			Rate: max(s.rate/max(r.slower, 1), 1), For: attackStrike, IPv6: s.o.ip == "6", Next: r.next,
		})
		err = errors.Join(err, <-meanwhile)
		if err != nil {
			return "", err
		}
		end, err := s.look(ctx)
		if err != nil {
			return "", err
		}
		use = percent(before, end)
		after, err := s.settle(ctx, end)
		if err != nil {
			return "", err
		}
		r.take(before, after)
		r.load = after.load.since(before.load)
		err = r.check(s.hook != "")
		if r.load.lost > 0 {
			err = errors.Join(err, s.traffic.losses())
		}
		return fmt.Sprintf("%d packets, %.0f/s; meanwhile %s", r.sent.Sent, r.sent.Rate(), r.load), err
	})
	if r.guard != nil {
		var at []string
		for _, place := range []struct {
			name   string
			counts map[string]float64
		}{{"guard", r.guard}, {"ESP", r.esp}, {"sockets", r.socket}, {"SIP", r.sip}} {
			if len(place.counts) > 0 {
				at = append(at, place.name+": "+byReason(place.counts))
			}
		}
		if r.sent.Refused > 0 {
			at = append(at, fmt.Sprintf("refused by the link: %d", r.sent.Refused))
		}
		if r.lost > 0 {
			at = append(at, fmt.Sprintf("lost by the link: %d", r.lost))
		}
		at = append(at, fmt.Sprintf("reached the core: %d", r.arrived), fmt.Sprintf("gmgate took %.0f %% of a core, %.0f %% when it was quiet", use, s.idle))
		s.c.note("%s", strings.Join(at, "; "))
	}
	s.rows = append(s.rows, r)
}

// settle waits until what was sent has been counted: no counter of drops grows any more.
func (s *siege) settle(ctx context.Context, last sight) (sight, error) {
	until := last.at.Add(attackSettle)
	for {
		if err := wait(ctx, attackLook); err != nil {
			return last, err
		}
		now, err := s.look(ctx)
		if err != nil {
			return last, err
		}
		var r strike
		r.take(last, now)
		if total(r.guard)+total(r.esp)+total(r.socket)+total(r.sip) == 0 && r.arrived == 0 || now.at.After(until) {
			return now, nil
		}
		last = now
	}
}

// gm is gmgate's address with a port.
func (s *siege) gm(port uint16) netip.AddrPort { return netip.AddrPortFrom(s.plan.Gm, port) }

// one returns phone n, over and over.
func (s *siege) one(n int) *phone { return s.phones[n%len(s.phones)] }

// who returns an address to send from: phones and strangers in turn.
func (s *siege) who(n int) netip.Addr {
	if n%2 == 0 {
		return s.one(n / 2).addr
	}
	return s.plan.Stranger(n / 2 % attackSources)
}

// unknownSPI is an SPI that nobody has been given: none of a phone's, and not reserved.
func (s *siege) unknownSPI(n int) uint32 {
	const least = 0x1000
	spi := uint32(n)*2654435761 | least // spread over the range by a multiplication that loses nothing (Knuth)
	for s.isTaken(spi) {
		spi++
	}
	return spi
}

func (s *siege) isTaken(spi uint32) bool {
	return slices.ContainsFunc(s.phones, func(p *phone) bool {
		return uint32(p.last.SPIs.PC) == spi || uint32(p.last.SPIs.PS) == spi
	})
}

func (s *siege) unknown(ctx context.Context) error {
	s.c.section("Unknown SPIs")
	s.run(ctx, strike{name: "ESP, unknown SPI", proof: exactly("unknown_spi"), next: func(b []byte, n int) []byte {
		return attack.AppendESP(b, s.who(n), s.plan.Gm, s.unknownSPI(n), uint32(n), 200, uint64(n))
	}})
	s.run(ctx, strike{name: "ESP in UDP, unknown SPI", proof: exactly("unknown_spi"), next: func(b []byte, n int) []byte {
		return attack.AppendESPInUDP(b, s.who(n), s.plan.Gm, s.unknownSPI(n), uint32(n), 200, uint64(n))
	}})
	return nil
}

// protected returns a protected port to attack, port-ps and port-pc in turn.
func protected(p *phone, n int) uint16 {
	if n/2%2 == 0 {
		return p.last.Ports.PS
	}
	return p.last.Ports.PC
}

func (s *siege) cleartext(ctx context.Context) error {
	s.c.section("Cleartext on protected ports (TS 33.203 §7.2)")
	dropped := exactly("cleartext")
	if s.hook == string(guard.HookGeneric) && s.backend == "xfrm" {
		// There it cannot tell clear packets from those that the kernel has decrypted.
		dropped = func(r *strike) error {
			if r.esp["XfrmInTmplMismatch"] == 0 {
				return errors.New("the kernel's policies dropped nothing")
			}
			return nil
		}
	}
	var sip []byte // one goroutine builds the packets
	message := func(from netip.AddrPort, n int) []byte {
		sip = attack.AppendMessage(sip[:0], from, s.one(n).sub.IMPU[0], s.one(n + 1).sub.IMPU[0], n)
		return sip
	}
	for _, r := range []strike{
		{name: "clear UDP in the name of phones", next: func(b []byte, n int) []byte {
			p := s.one(n)
			from := netip.AddrPortFrom(p.addr, p.last.Ports.UC)
			return attack.AppendUDP(b, from, s.gm(protected(p, n)), message(from, n))
		}},
		{name: "clear UDP of strangers", next: func(b []byte, n int) []byte {
			from := netip.AddrPortFrom(s.plan.Stranger(n%attackSources), 5060)
			return attack.AppendUDP(b, from, s.gm(protected(s.one(n), n)), message(from, n))
		}},
		{name: "clear TCP SYN of both", next: func(b []byte, n int) []byte {
			from := netip.AddrPortFrom(s.who(n), uint16(1024+n%60000))
			return attack.AppendSYN(b, from, s.gm(protected(s.one(n), n)), uint32(n), message(from, n))
		}},
	} {
		r.proof = dropped
		s.run(ctx, r)
	}
	return nil
}

func (s *siege) flood(ctx context.Context) error {
	s.c.section("REGISTER floods on the unprotected port")
	spare := s.subs[len(s.subs)-attackSpare:]
	var sip []byte
	register := func(b []byte, from netip.Addr, n int) []byte {
		src := netip.AddrPortFrom(from, 5060)
		// A quarter of them names subscribers, whom the core challenges.
		impi := "nobody" + strconv.Itoa(n) + "@" + demoDomain
		if n%4 == 0 {
			impi = spare[n/4%len(spare)].IMPI
		}
		sip = attack.AppendRegister(sip[:0], src, demoDomain, impi, n)
		return attack.AppendUDP(b, src, s.gm(lab.PortClear), sip)
	}
	late := &phone{sub: s.subs[len(s.phones)], addr: s.plan.UE(len(s.phones)), name: fmt.Sprintf("phone %d", len(s.phones)+1)}
	begin := time.Now()
	s.run(ctx, strike{
		name: "REGISTERs of one source",
		lets: true,
		next: func(b []byte, n int) []byte { return register(b, s.plan.Stranger(0), n) },
		during: func() error {
			if err := errors.Join(wait(ctx, attackStrike/3), s.switchOn(len(s.phones), late)); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(ctx, demoStep/2)
			defer cancel()
			return s.demo.register(ctx, late)
		},
		proof: func(r *strike) error {
			// The bucket fills while the attack lasts.
			allowed := float64(guardBurst(s.o)) + guardRegisterRate*time.Since(begin).Seconds() + 1
			switch dropped := r.guard["register_rate"]; {
			case dropped > float64(r.sent.Sent):
				return fmt.Errorf("the guard dropped %.0f of %d", dropped, r.sent.Sent)
			case float64(r.sent.Sent)-dropped-float64(r.lost) > allowed:
				return fmt.Errorf("the guard dropped %.0f of %d, and should have let through %.0f at most", dropped, r.sent.Sent, allowed)
			case float64(r.arrived) > allowed:
				return fmt.Errorf("%d of them reached the core, want %.0f at most", r.arrived, allowed)
			}
			return nil
		},
	})
	if late.made.Timings.Total > 0 {
		s.newcomer = late
		s.c.note("%s registered through the flood in %s", late.name, millis(late.made.Timings.Total))
	}
	s.run(ctx, strike{
		name:   fmt.Sprintf("REGISTERs of %d sources", attackSources),
		next:   func(b []byte, n int) []byte { return register(b, s.plan.Stranger(1+n%attackSources), n+1_000_000) },
		lets:   true,
		slower: 4, // each of them is let in, and costs what a REGISTER costs, the core's part too
	})
	return nil
}

func (s *siege) replay(ctx context.Context) error {
	s.c.section("Replay (RFC 4303 §3.4.3)")
	s.run(ctx, strike{
		name: "ESP replayed",
		next: func(b []byte, n int) []byte { return append(b, s.kept[n%len(s.kept)]...) },
		always: func(r *strike) error {
			if total(r.esp) == 0 {
				return errors.New("the ESP backend dropped nothing")
			}
			return nil
		},
	})
	s.run(ctx, strike{
		name: "ESP replayed from elsewhere",
		next: func(b []byte, n int) []byte {
			p := s.kept[n%len(s.kept)]
			from := s.plan.Stranger(n % attackSources)
			if other := s.one(n / 2).addr; n%2 == 0 && other != sourceOf(p) {
				from = other
			}
			b, _ = attack.AppendFrom(b, p, from)
			return b
		},
		proof: exactly("wrong_source"),
	})
	return nil
}

// sourceOf returns the source address of an IP packet, as the tap keeps it.
func sourceOf(p []byte) netip.Addr {
	src := p[8:24]
	if p[0]>>4 == 4 {
		src = p[12:16]
	}
	a, _ := netip.AddrFromSlice(src)
	return a
}

func (s *siege) malformed(ctx context.Context) error {
	s.c.section("Malformed packets")
	kinds := attack.Malformed(s.o.ip == "6")
	s.run(ctx, strike{
		name: fmt.Sprintf("malformed, %d kinds", len(kinds)),
		next: func(b []byte, n int) []byte {
			p := s.one(n)
			to := s.gm(lab.PortClear)
			if n/len(kinds)%2 == 0 {
				to = s.gm(protected(p, n))
			}
			return kinds[n%len(kinds)].Append(b, netip.AddrPortFrom(s.who(n), 5060), to, n/len(kinds))
		},
		proof: func(r *strike) error {
			if total(r.guard) == 0 {
				return errors.New("the guard dropped nothing")
			}
			return nil
		},
	})
	return nil
}

func (s *siege) aftermath(ctx context.Context) error {
	s.c.section("After the attacks")
	s.step(ctx, "the phones finish their calls", func(context.Context) (string, error) {
		_ = s.traffic.end() // it has no error
		return s.traffic.now().String() + " in all", s.traffic.losses()
	})
	all, who := slices.Clone(s.phones), ""
	if s.newcomer != nil {
		all, who = append(all, s.newcomer), "; "+s.newcomer.name+" came during a flood"
	}
	s.step(ctx, "everybody can be called", func(ctx context.Context) (string, error) {
		errs := make([]error, len(all))
		var wg sync.WaitGroup
		gate := make(chan struct{}, demoConcurrent)
		for i, p := range all {
			wg.Go(func() {
				gate <- struct{}{}
				defer func() { <-gate }()
				if err := talk(ctx, all[(i+1)%len(all)], p.sub.IMPU[0], 0); err != nil {
					errs[i] = fmt.Errorf("%s: %w", p.name, err)
				}
			})
		}
		wg.Wait()
		return fmt.Sprintf("%d phones, one call each%s", len(all), who), errors.Join(errs...)
	})
	s.step(ctx, "what the floods began is gone", func(ctx context.Context) (string, error) {
		if err := s.waitSets(ctx, len(all)); err != nil {
			return "", err
		}
		if err := s.onlyPhones(ctx, len(all)); err != nil {
			return "", err
		}
		return fmt.Sprintf("%d contexts, %d SAs: those of the phones, all registered", len(all), 4*len(all)), nil
	})
	s.step(ctx, "gmgate's memory", func(ctx context.Context) (string, error) {
		v, err := s.look(ctx)
		if err != nil {
			return "", err
		}
		if v.resident-s.calm.resident > attackMemory {
			err = fmt.Errorf("it may grow by %d MiB", attackMemory>>20)
		}
		return fmt.Sprintf("%d MiB, %d MiB before", v.resident>>20, s.calm.resident>>20), err
	})
	return nil
}

// onlyPhones waits until gmgate has the contexts of n phones and no other, and says that all of them are registered.
func (s *siege) onlyPhones(ctx context.Context, n int) error {
	ctx, cancel := context.WithTimeout(ctx, demoDrain)
	defer cancel()
	for {
		m, err := s.daemon.Metrics(ctx)
		if err != nil {
			return err
		}
		got := lab.Sum(m, "gmgate_ues")
		if int(got) == n {
			break
		}
		if err := wait(ctx, 50*time.Millisecond); err != nil {
			return fmt.Errorf("gmgate has %g contexts after %s, want %d", got, demoDrain, n)
		}
	}
	list, _, err := s.admin.UEs(ctx, admin.Query{}, demoMaxPhones)
	if err != nil {
		return err
	}
	for _, u := range list {
		if u.State != "registered" {
			return fmt.Errorf("%s is %s", u.IMPI, u.State)
		}
	}
	return nil
}

func (s *siege) verify(ctx context.Context) error {
	s.c.section("Verification")
	s.step(ctx, "the tap on the Gm link", func(context.Context) (string, error) {
		s.capture.Settle(50*time.Millisecond, time.Second)
		answers := 0
		err := s.capture.CheckClear(lab.ClearRules{Registrations: 1, Also: func(m lab.ClearSIP) bool {
			own := m.Status != 0 && m.Src == s.gm(lab.PortClear) && m.CSeqMethod == "REGISTER"
			if own {
				answers++
			}
			return own
		}})
		return fmt.Sprintf("in clear: REGISTER, and %d answers to it; all else that gmgate sent was ESP: %d packets", answers, s.capture.Stats().ESPOut), err
	})
	s.step(ctx, "core and phones", func(context.Context) (string, error) {
		s.mu.Lock()
		problems := slices.Clone(s.problems)
		s.mu.Unlock()
		for _, p := range s.phones {
			for _, t := range p.Problems() {
				problems = append(problems, p.name+": "+t)
			}
		}
		if len(problems) > 0 {
			return "", fmt.Errorf("%d problems: %s", len(problems), strings.Join(problems[:min(attackProblems, len(problems))], "; "))
		}
		return "found nothing wrong with what they received", nil
	})
	s.step(ctx, "gmgate's own metrics", func(ctx context.Context) (string, error) {
		m, err := s.daemon.Metrics(ctx)
		if err != nil {
			return "", err
		}
		var errs []error
		for _, name := range []string{"handler_panics_total", "sa_install_errors_total", "sa_reconcile_diff"} {
			if n := lab.Sum(m, "gmgate_"+name); n != 0 {
				errs = append(errs, fmt.Errorf("%s is %g", name, n))
			}
		}
		return "no panic, no SA that failed", errors.Join(errs...)
	})
	s.step(ctx, "gmgate stops", func(context.Context) (string, error) { return "in good order", s.daemon.Stop() })
	s.table()
	return nil
}

// table says what was dropped where.
func (s *siege) table() {
	s.c.section("What was dropped where")
	s.c.table(dropTable(s.rows))
	s.c.line("")
	switch s.hook {
	case "":
		s.c.note("There was no guard. What no column counts, the kernel refused: no socket of gmgate's is there.")
	default:
		s.c.note("Of a replay the guard knows the SPI and the source, so ESP has to find out. REGISTERs of many sources are answered.")
	}
	done := s.traffic.now().since(s.calm.load)
	s.c.note("During and after the attacks: %d calls made, %d messages sent, %d lost.", done.calls, done.messages, done.lost)
}

func dropTable(strikes []strike) [][]string {
	rows := make([][]string, 1, 1+len(strikes))
	rows[0] = []string{"attack", "sent", "guard", "ESP", "sockets", "SIP", "at the core"}
	for _, r := range strikes {
		rows = append(rows, []string{
			r.name, strconv.Itoa(r.sent.Sent), fmt.Sprintf("%.0f", total(r.guard)), fmt.Sprintf("%.0f", total(r.esp)),
			fmt.Sprintf("%.0f", total(r.socket)), fmt.Sprintf("%.0f", total(r.sip)), strconv.Itoa(r.arrived),
		})
	}
	return rows
}
