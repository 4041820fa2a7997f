package guard

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/bpf"
	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// Guard is a loaded guard. Make it with Open.
type Guard struct {
	cfg  Config
	log  *slog.Logger
	objs bpf.GuardObjects
	dir  *pinDir // nil: nothing is pinned

	table     table
	rings     rings
	followers followers

	mu       sync.Mutex // guards the hooks
	hooks    []*hook
	attached bool
	closed   bool

	stop     context.CancelFunc
	watching sync.WaitGroup
}

// watchInterval is how often interfaces that come and go are looked for.
const watchInterval = 2 * time.Second

// Open loads the programs, with the maps of the run before where there are any. Nothing is attached, and a guard of the run
// before goes on, until Attach. The error matches ErrUnavailable when the kernel or the process's capabilities do not allow
// eBPF, and ErrLocked when another process has the pin directory.
func Open(cfg Config) (*Guard, error) {
	if err := cfg.complete(); err != nil {
		return nil, fmt.Errorf("open guard: %w", err)
	}
	g := &Guard{cfg: cfg, log: cfg.Logger}
	if err := g.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("open guard: %w", err), g.release())
	}
	ctx, stop := context.WithCancel(context.Background())
	g.stop = stop
	g.rings.start(g)
	g.watching.Go(func() { g.watch(ctx) })
	return g, nil
}

func (g *Guard) open() error {
	_ = rlimit.RemoveMemlock() // of kernels before 5.11, which say themselves when it was not enough
	var err error
	if g.dir, err = openPinDir(g.cfg.Pin, g.log); err != nil {
		return err
	}
	if err := g.load(); err != nil {
		return err
	}
	if err := g.table.open(g); err != nil {
		return err
	}
	return g.rings.open(&g.objs)
}

// load loads maps and programs.
func (g *Guard) load() error {
	spec, err := bpf.LoadGuard()
	if err != nil {
		return err
	}
	if err := g.configure(spec); err != nil {
		return err
	}
	if errors.Is(features.HaveProgramHelper(ebpf.SchedCLS, asm.FnSkbGetXfrmState), ebpf.ErrNotSupported) {
		withoutXFRM(spec)
	}
	opts := &ebpf.CollectionOptions{}
	if g.dir != nil {
		for _, name := range []string{bpf.GuardMapSas, bpf.GuardMapTraffics, bpf.GuardMapTallies, bpf.GuardMapLosses, bpf.GuardMapSources} {
			spec.Maps[name].Pinning = ebpf.PinByName
		}
		opts.Maps.PinPath = g.dir.path
		if err := g.dir.sweep(spec); err != nil {
			return classify(err)
		}
	}
	for {
		err = spec.LoadAndAssign(&g.objs, opts)
		if !errors.Is(err, ebpf.ErrMapIncompatible) {
			break
		}
		// Of other sizes, or of another version: begin anew. The programs of the run before keep theirs until Attach.
		removed, e := g.dir.removeMaps(spec)
		if e != nil || !removed {
			return errors.Join(err, e)
		}
		g.log.Info("maps of the guard have other sizes than before, counters begin anew")
	}
	return classify(err)
}

// withoutXFRM takes the question whether the kernel has decrypted a packet out of the programs, for kernels that have no XFRM
// at all and so nothing to ask: the answer is no.
func withoutXFRM(spec *ebpf.CollectionSpec) {
	for _, p := range spec.Programs {
		for i := range p.Instructions {
			ins := &p.Instructions[i]
			if ins.IsBuiltinCall() && asm.BuiltinFunc(ins.Constant) == asm.FnSkbGetXfrmState {
				meta := ins.Metadata
				*ins = asm.Mov.Imm(asm.R0, -1)
				ins.Metadata = meta
			}
		}
	}
}

// configure sets sizes and constants.
func (g *Guard) configure(spec *ebpf.CollectionSpec) error {
	c := &g.cfg
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return err
	}
	n, private := lanes(cpus)
	spec.Maps[bpf.GuardMapSas].MaxEntries = uint32(c.SAs)          //nolint:gosec // checked by the configuration
	spec.Maps[bpf.GuardMapSources].MaxEntries = uint32(c.Sources)  //nolint:gosec // checked by the configuration
	spec.Maps[bpf.GuardMapTraffics].MaxEntries = uint32(c.UEs * n) //nolint:gosec // checked by the configuration
	var local [maxLocal]bpf.GuardAddress
	for i, a := range c.Local {
		local[i] = guardAddress(a)
	}
	var protected [1024]uint64
	for _, p := range c.Protected {
		protected[p>>6] |= 1 << (p & 63)
	}
	interval := c.interval()
	// Generic XDP comes after the kernel's ESP where GRO has that decrypt early, and cannot tell what is decrypted.
	passClear := c.Mode == Generic && c.KernelESP
	locals := uint32(len(c.Local)) //nolint:gosec // at most 16
	if c.trial {
		locals = 0 // it knows no SPI, and may stand beside a guard that knows them all: it must judge nothing
	}
	var errs []error
	for name, v := range map[string]any{
		bpf.GuardVarLocal: local, bpf.GuardVarLocals: locals,
		bpf.GuardVarProtectedPorts: protected, bpf.GuardVarClearPort: c.ClearPort,
		bpf.GuardVarLanes: uint32(n), bpf.GuardVarLanePerCpu: flag(private), //nolint:gosec // at most 8
		bpf.GuardVarPassClear: flag(passClear), bpf.GuardVarPassUnknown: flag(c.PassUnknown), bpf.GuardVarLimitAll: flag(c.LimitAll),
		bpf.GuardVarLimitInterval: uint64(interval), bpf.GuardVarLimitBurst: uint64(interval) * uint64(max(c.Burst-1, 0)), //nolint:gosec // not negative
	} {
		if err := spec.Variables[name].Set(v); err != nil {
			errs = append(errs, fmt.Errorf("set %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

func flag(v bool) uint8 {
	if v {
		return 1
	}
	return 0
}

// classify tells what the kernel does not have, or does not allow, from mistakes of ours. A program that the verifier
// refuses is one or the other: on old kernels helpers are missing.
func classify(err error) error {
	if err == nil {
		return nil
	}
	if _, refused := errors.AsType[*ebpf.VerifierError](err); refused || errors.Is(err, ebpf.ErrNotSupported) ||
		errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENOSYS) {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}

// Detach frees the guard. With a pin directory the programs stay attached, for the next process to take over, else they
// go.
func (g *Guard) Detach() error {
	if g.dir == nil {
		return g.Close()
	}
	if !g.end() {
		return nil
	}
	return g.release()
}

// Close takes the programs off the interfaces, removes what is pinned and frees the guard.
func (g *Guard) Close() error {
	if !g.end() {
		return nil
	}
	g.mu.Lock()
	err := g.detachAll()
	g.mu.Unlock()
	if g.dir != nil {
		err = errors.Join(err, g.dir.clear())
	}
	return errors.Join(err, g.release())
}

// end stops the goroutines. It reports false if that had been done before.
func (g *Guard) end() bool {
	g.mu.Lock()
	first := !g.closed
	g.closed = true
	g.mu.Unlock()
	if !first {
		return false
	}
	g.stop()
	g.rings.close()
	g.watching.Wait()
	g.followers.close()
	_ = g.objs.SampleInterval.Set(uint64(0)) // a program that stays would go on sampling for nobody, and count it as lost
	return true
}

// release frees what the process has of the guard; what is pinned stays.
func (g *Guard) release() error {
	var errs []error
	g.mu.Lock()
	for _, h := range g.hooks {
		errs = append(errs, h.release())
	}
	g.hooks = nil
	g.mu.Unlock()
	errs = append(errs, g.table.close(), g.objs.Close())
	if g.dir != nil {
		errs = append(errs, g.dir.close())
	}
	return errors.Join(errs...)
}

// watch attaches the guard to interfaces that come back or come anew.
func (g *Guard) watch(ctx context.Context) {
	t := time.NewTicker(watchInterval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		g.mu.Lock()
		if g.attached && !g.closed {
			if err := g.update(); err != nil {
				g.log.Debug("guard is not on every interface", slog.Any("error", err))
			}
		}
		g.mu.Unlock()
	}
}

// Unload removes what a guard has left in a pin directory: programs and links go with the last pin. It reports false if
// there was nothing, and fails with ErrLocked while a process uses it. Filters of tc are taken off the interfaces that the
// directory names. A directory that is not on a bpffs has nothing of a guard, and is left alone.
func Unload(pin string, log *slog.Logger) (found bool, err error) { return UnloadIn(nil, pin, log) }

// UnloadIn is Unload for interfaces of another namespace than the process's.
func UnloadIn(ns *hostnet.NS, pin string, log *slog.Logger) (found bool, err error) {
	if !isBPFFS(pin) {
		return false, nil
	}
	d, err := openPinDir(pin, log)
	if err != nil {
		return false, fmt.Errorf("unload guard: %w", err)
	}
	if d == nil {
		return false, fmt.Errorf("unload guard: %s cannot be used", pin)
	}
	names, err := d.names()
	found = len(names) > 0
	if err = errors.Join(err, removeFilters(ns, pin, names), d.clear(), d.close()); err != nil {
		return found, fmt.Errorf("unload guard: %w", err)
	}
	return found, nil
}

// Pinned returns what is pinned in a directory, in order; nothing where there is none, or none on a bpffs.
func Pinned(pin string) []string {
	if !isBPFFS(pin) {
		return nil
	}
	entries, err := os.ReadDir(pin)
	if err != nil {
		return nil
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = filepath.Base(e.Name())
	}
	return names
}
