package main

import (
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/gmgate/gmgate/control/config"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/guard"
)

// statsAge is how old the counters of a scrape may be: far less than any scrape interval.
const statsAge = 100 * time.Millisecond

// sourcesAge is how old the number of remembered sources may be: to count them takes milliseconds.
const sourcesAge = 10 * time.Second

// filter is the guard of a daemon, if it has one.
type filter struct {
	*guard.Guard // nil: none
	mode         config.GuardMode
	log          *slog.Logger
}

// guardConfig translates the configuration. kernel says whether the kernel does the ESP, clear whether phones may register
// in clear.
func guardConfig(cfg *config.Config, kernel, clear bool, log *slog.Logger) guard.Config {
	c := cfg.Guard
	return guard.Config{
		Mode: guard.Mode(c.Mode), Interfaces: c.Interfaces, Local: cfg.Gm.Addresses, ClearPort: cfg.Gm.Port,
		Protected: append(append([]uint16(nil), cfg.Gm.ServerPorts...), cfg.Gm.ClientPorts...),
		KernelESP: kernel, PassUnknown: c.UnknownSPI == config.UnknownPass,
		// Where phones may register in clear they send other requests as well, which the limit on REGISTER must not stop.
		Rate: c.RegisterRate, Burst: c.RegisterBurst, LimitAll: !clear,
		Sources: c.Sources, SAs: c.MaxSAs, UEs: c.MaxUEs, Pin: cfg.PinPath(), Logger: log,
	}
}

// openGuard loads the guard. Without the privileges or a kernel for it gmgate works without, and says so, unless a hook was
// asked for.
func openGuard(cfg *config.Config, kernel, clear bool, log *slog.Logger) (*filter, error) {
	return openGuardBy(guard.Open, cfg, kernel, clear, log)
}

func openGuardBy(open func(guard.Config) (*guard.Guard, error), cfg *config.Config, kernel, clear bool, log *slog.Logger) (*filter, error) {
	f := &filter{mode: cfg.Guard.Mode, log: log}
	if cfg.Guard.Mode == config.GuardOff {
		f.unload(cfg.PinPath())
		return f, nil
	}
	g, err := open(guardConfig(cfg, kernel, clear, log))
	switch {
	case err == nil:
		f.Guard = g
	case errors.Is(err, guard.ErrUnavailable) && cfg.Guard.Mode == config.GuardAuto:
		log.Warn("no guard in front of the protected ports, ESP and policies do without it", "error", err)
		f.unload(cfg.PinPath())
	default:
		return nil, err
	}
	return f, nil
}

// unload takes away what a run before may have left: nobody would tell it the SPIs of the sets to come, and it would drop them.
func (f *filter) unload(pin string) {
	if _, err := guard.Unload(pin, f.log); err != nil {
		f.log.Warn("cannot take the guard of an earlier run away, it drops the ESP of phones that register from now on", "error", err)
	}
}

// start lets the SA sets of the run before pass, and puts the guard on the interfaces.
func (f *filter) start(k *keeper) error {
	if f.Guard == nil {
		return nil
	}
	sets := k.sets()
	if err := f.Sync(sets, k.outcome.Foreign); err != nil {
		return err
	}
	if err := f.Attach(); err != nil {
		return err
	}
	attached := 0
	for _, h := range f.Hooks() {
		if h.Kind != guard.HookNone {
			attached++
			continue
		}
		f.log.Warn("no guard on an interface", "interface", h.Interface, "reason", h.Reason)
	}
	if attached == 0 {
		f.log.Warn("the guard is on no interface, ESP and policies do without it")
	}
	return nil
}

// release ends the use of the guard. With a store it stays for the next run, as the SAs do.
func (f *filter) release(stay bool) error {
	switch {
	case f.Guard == nil:
		return nil
	case stay:
		return f.Detach()
	}
	return f.Close()
}

// witness is what the workers may ask.
func (f *filter) witness() sa.Witness {
	if f.Guard == nil {
		return nil
	}
	return f.Guard
}

// behind returns the installer of SA sets that keeps the guard in step with the ESP backend.
func (f *filter) behind(i sa.Installer) sa.Installer {
	if f.Guard == nil {
		return i
	}
	return guarded{i, f.Guard, f.log}
}

// doorman is what guarded needs of the guard.
type doorman interface {
	Add(sa.Params) error
	Remove(sa.Params) error
}

// guarded installs SA sets in the ESP backend and in the guard: a set is there when both have it. Its callbacks run on the
// backend's goroutine, like the backend's own.
type guarded struct {
	sa.Installer
	guard doorman
	log   *slog.Logger
}

// keyless is what the guard may know of a set.
func keyless(p sa.Params) sa.Params {
	p.Keys.Enc, p.Keys.Auth, p.Keys.Salt = nil, nil, [4]byte{}
	return p
}

// Install implements sa.Installer: the phone learns its SPIs only after the guard has.
func (g guarded) Install(p sa.Params, done func(error)) {
	known := keyless(p)
	g.Installer.Install(p, func(err error) {
		if err == nil {
			err = g.guard.Add(known)
		} else {
			done(err)
			return
		}
		if err == nil {
			done(nil)
			return
		}
		g.Installer.Remove(known, func(e error) { done(errors.Join(err, e)) })
	})
}

// Remove implements sa.Installer: an SPI passes the guard no longer than its SA is there.
func (g guarded) Remove(p sa.Params, done func(error)) {
	known := keyless(p)
	g.Installer.Remove(p, func(err error) {
		if e := g.guard.Remove(known); e != nil {
			// It lets packets pass that the backend does not know any more; the next Sync takes it out.
			g.log.Warn("the guard keeps an SPI", "error", e)
		}
		done(err)
	})
}

// cached keeps what is dear to read for the many readers of one scrape.
type cached[T any] struct {
	age time.Duration
	get func() (T, error)

	mu   sync.Mutex
	last T
	read time.Time
}

// now returns the value, the one read last where it cannot be read. It may be called from any goroutine.
func (c *cached[T]) now() T {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.read.IsZero() || time.Since(c.read) >= c.age {
		if v, err := c.get(); err == nil {
			c.last = v
		}
		c.read = time.Now()
	}
	return c.last
}

// observe exports what the guard counts.
func (f *filter) observe(m *observe.Metrics) {
	g := f.Guard
	if g == nil {
		return
	}
	stats := &cached[guard.Stats]{age: statsAge, get: g.Stats}
	for _, r := range guard.Reasons() {
		labels := map[string]string{"verdict": r.Verdict(), "reason": r.String()}
		m.AddFunc("bpf_packets_total", "Packets that the guard let pass or dropped, before any was verified.", observe.Counter, labels,
			func() float64 { s := stats.now(); return float64(s.Tally(r).Packets) })
		m.AddFunc("bpf_bytes_total", "Octets of the packets that the guard let pass or dropped.", observe.Counter, labels,
			func() float64 { s := stats.now(); return float64(s.Tally(r).Bytes) })
	}
	sources := &cached[int]{age: sourcesAge, get: g.CountSources}
	for _, x := range []struct {
		name          string
		entries, room func(guard.Stats) int
	}{
		{"sas", func(s guard.Stats) int { return s.SAs }, func(s guard.Stats) int { return s.SACapacity }},
		{"ues", func(s guard.Stats) int { return s.UEs }, func(s guard.Stats) int { return s.UECapacity }},
		{"sources", func(guard.Stats) int { return sources.now() }, func(s guard.Stats) int { return s.SourceCapacity }},
	} {
		labels := map[string]string{"map": x.name}
		m.AddFunc("bpf_map_entries", "Entries of the guard's maps.", observe.Gauge, labels,
			func() float64 { return float64(x.entries(stats.now())) })
		m.AddFunc("bpf_map_capacity", "Entries that the guard's maps have room for.", observe.Gauge, labels,
			func() float64 { return float64(x.room(stats.now())) })
	}
	for ring, get := range map[string]func(guard.Stats) uint64{
		"first_use": func(s guard.Stats) uint64 { return s.LostUses }, "drop": func(s guard.Stats) uint64 { return s.LostSamples + s.Missed },
	} {
		m.AddFunc("ringbuf_lost_total", "Events of the guard that nobody took in time; harmless.", observe.Counter,
			map[string]string{"ring": ring}, func() float64 { return float64(get(stats.now())) })
	}
	m.AddFunc("guard_first_uses_total", "SA sets on which a first ESP packet was seen, verified or not.", observe.Counter, nil,
		func() float64 { s := stats.now(); return float64(s.FirstUses) })
	for _, h := range g.Hooks() {
		for _, kind := range []guard.HookKind{guard.HookNative, guard.HookGeneric, guard.HookTCX, guard.HookTC, guard.HookNone} {
			m.AddFunc("guard_info", "Hook of the guard on an interface: 1 for the one in use.", observe.Gauge,
				map[string]string{"interface": h.Interface, "hook": string(kind)}, func() float64 {
					for _, now := range g.Hooks() {
						if now.Interface == h.Interface && now.Kind == kind {
							return 1
						}
					}
					return 0
				})
		}
	}
}

// openSteering loads the program that chooses workers' sockets; nil where the kernel's classic filter has to do.
func openSteering(cfg *config.Config, listeners int, log *slog.Logger) (*guard.Steering, error) {
	if !cfg.Guard.Steering || cfg.WorkerCount() < 2 {
		return nil, nil //nolint:nilnil // none is an answer
	}
	s, err := guard.OpenSteering(cfg.WorkerCount(), 2*listeners) // UDP and TCP
	if errors.Is(err, guard.ErrUnavailable) {
		log.Info("no steering by eBPF, the classic filter does it for UDP", "error", err)
		return nil, nil //nolint:nilnil // none is an answer
	}
	return s, err
}

// observeSteering exports what the steering counts.
func observeSteering(m *observe.Metrics, s *guard.Steering) {
	stats := &cached[guard.SteerStats]{age: statsAge, get: s.Stats}
	for by, get := range map[string]func(guard.SteerStats) uint64{
		"affinity": func(s guard.SteerStats) uint64 { return s.Affinity },
		"hash":     func(s guard.SteerStats) uint64 { return s.Hash },
		"kernel":   func(s guard.SteerStats) uint64 { return s.Kernel },
	} {
		m.AddFunc("steered_packets_total", "Datagrams and connections of phones, by what chose the worker.", observe.Counter,
			map[string]string{"by": by}, func() float64 { return float64(get(stats.now())) })
	}
	labels := map[string]string{"map": "affinity"}
	m.AddFunc("bpf_map_entries", "Entries of the guard's maps.", observe.Gauge, labels,
		func() float64 { return float64(stats.now().Exceptions) })
	m.AddFunc("bpf_map_capacity", "Entries that the guard's maps have room for.", observe.Gauge, labels,
		func() float64 { return float64(stats.now().Capacity) })
}

// sets returns the SA sets that go on from the run before, without their keys. It must come before hand.
func (k *keeper) sets() (sets []sa.Params) {
	now := time.Now()
	for i := range k.outcome.Workers {
		for j := range k.outcome.Workers[i].UEs {
			for n := range k.outcome.Workers[i].UEs[j].Sets {
				s := &k.outcome.Workers[i].UEs[j].Sets[n]
				if s.Clear {
					continue
				}
				p := s.Params(now)
				p.Keys.Zero()
				sets = append(sets, keyless(p))
			}
		}
	}
	return sets
}
