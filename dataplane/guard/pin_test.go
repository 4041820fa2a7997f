package guard

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/bpf"
)

// hookCases are the ways to outlive a process.
var hookCases = []struct {
	name  string
	hooks []HookKind
}{{"best", nil}, {"generic", []HookKind{HookGeneric}}, {"tc", []HookKind{HookTCX, HookTC}}, {"clsact", []HookKind{HookTC}}}

// TestDetach leaves the guard at work while no process owns it.
func TestDetach(t *testing.T) {
	for _, tc := range hookCases {
		t.Run(tc.name, func(t *testing.T) {
			r := newRoad(t)
			r.listen(t)
			c := r.config(t)
			c.hooks = tc.hooks
			g := stand(t, c)
			r.onDuty(t, g)
			must(t, g.Detach())
			r.onDuty(t, nil)
			g = openOnly(t, c) // neither Sync nor Attach: all is there
			s := stats(t, g)
			if p, d := s.Tally(PassESP).Packets, s.Tally(DropUnknownSPI).Packets; p != 20 || d != 20 {
				t.Errorf("%d packets passed and %d dropped in the first run and after it, want 20 of each", p, d)
			}
			r.onDuty(t, g)
			must(t, g.Sync(sets(), nil))
			if n := g.Traffic(1).Packets; n != 15 {
				t.Errorf("%d packets of the first phone, want 15", n)
			}
			must(t, g.Attach())
			if h := hookOf(t, g, "gm0"); tc.hooks == nil && h.Reason != "in place of the run before" {
				t.Errorf("hook %+v", h)
			}
			r.onDuty(t, g)
			must(t, g.Close())
			r.unguarded(t)
		})
	}
}

// TestDetachFollowed leaves no program behind that goes on sampling drops for somebody who followed them.
func TestDetachFollowed(t *testing.T) {
	r := newRoad(t)
	g := stand(t, r.config(t))
	info, err := g.objs.GuardXdp.Info()
	must(t, err)
	var interval *ebpf.Map // a handle that outlives the guard's
	ids, _ := info.MapIDs()
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		must(t, err)
		if i, err := m.Info(); err == nil && i.Name == ".bss" {
			interval = m
			continue
		}
		must(t, m.Close())
	}
	if interval == nil {
		t.Fatal("the program has no variables")
	}
	defer interval.Close() //nolint:errcheck // a handle only
	done := make(chan error, 1)
	go func() { done <- g.Follow(t.Context(), func(*Drop) {}) }()
	sampling := func() bool { // the interval is the only variable that is ever anything but zero
		b, err := interval.LookupBytes(uint32(0))
		must(t, err)
		return slices.ContainsFunc(b, func(v byte) bool { return v != 0 })
	}
	soon(t, "samples are taken", sampling)
	must(t, g.Detach())
	must(t, <-done)
	if sampling() {
		t.Error("samples are taken for nobody")
	}
}

// flood pours packets of known and unknown SPIs until it is stopped, at no more than the receiver takes.
type flood struct {
	stop context.CancelFunc
	done chan struct{}
	sent map[string]int // known ones, by family
}

func (r *road) flood(t *testing.T) *flood {
	ctx, stop := context.WithCancel(context.Background())
	f := &flood{stop, make(chan struct{}), map[string]int{}}
	go func() {
		defer close(f.done)
		for ctx.Err() == nil {
			for _, family := range []string{"4", "6"} {
				if f.sent[family]-r.got("esp"+family, knownTo(family)) > 16 { // in flight: a veth queues 256 at most
					runtime.Gosched()
					continue
				}
				r.esp(t, family, unknownSPI)
				r.esp(t, family, knownTo(family))
				f.sent[family]++
			}
		}
	}()
	t.Cleanup(func() { stop(); <-f.done })
	return f
}

// end stops the flood and checks that every known packet has arrived and no other.
func (f *flood) end(t *testing.T, r *road) {
	t.Helper()
	f.stop()
	<-f.done
	for _, family := range []string{"4", "6"} {
		for end := time.Now().Add(2 * time.Second); r.got("esp"+family, knownTo(family)) < f.sent[family] && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
		if got := r.got("esp"+family, knownTo(family)); got != f.sent[family] || got == 0 {
			t.Errorf("IPv%s: %d of %d packets on known SPIs have arrived", family, got, f.sent[family])
		}
		if n := r.got("esp"+family, unknownSPI); n != 0 {
			t.Errorf("IPv%s: %d packets of an unknown SPI have passed", family, n)
		}
	}
}

// TestUpgrade replaces the program again and again under traffic. Between two of them there is no gap.
func TestUpgrade(t *testing.T) {
	const upgrades = 20
	for _, tc := range hookCases {
		t.Run(tc.name, func(t *testing.T) {
			r := newRoad(t)
			r.listen(t)
			c := r.config(t)
			c.hooks = tc.hooks
			g := stand(t, c)
			f := r.flood(t)
			for i := range upgrades {
				must(t, g.Detach())
				ports := [2]int{protectedPort, roadOther} // protected, not protected
				if i%2 == 0 {
					ports = [2]int{roadOther, protectedPort}
				}
				c.Protected = []uint16{uint16(ports[0])}
				g = stand(t, c)
				dropped, passed := tally(t, g, DropCleartext), r.got("udp4", uint32(ports[1]))
				r.udp(t, "4", ports[0])
				r.udp(t, "4", ports[1])
				soon(t, "the new configuration holds", func() bool {
					return tally(t, g, DropCleartext) == dropped+1 && r.got("udp4", uint32(ports[1])) == passed+1
				})
			}
			f.end(t, r)
		})
	}
}

// TestOtherSizes begins anew with maps of other sizes, without a gap either.
func TestOtherSizes(t *testing.T) {
	r := newRoad(t)
	r.listen(t)
	c := r.config(t)
	g := stand(t, c)
	r.onDuty(t, g)
	f := &flood{sent: map[string]int{"4": 5, "6": 5}} // of onDuty
	running := r.flood(t)
	for i := range 4 {
		must(t, g.Detach())
		c.SAs, c.UEs = 128+i, 32<<i
		g = openOnly(t, c)
		if s := stats(t, g); s.Tally(PassESP).Packets != 0 || s.SACapacity != c.SAs {
			t.Errorf("counters %+v, want them anew", s)
		}
		must(t, g.Sync(sets(), nil))
		must(t, g.Attach())
		soon(t, "the new maps count", func() bool { return g.Traffic(1).Packets > 0 && g.Traffic(2).Packets > 0 })
	}
	running.stop()
	<-running.done
	for family, n := range f.sent {
		running.sent[family] += n
	}
	running.end(t, r)
}

// TestOtherLimit gives a source its tokens back that a limit of the run before has taken for longer than this one could.
func TestOtherLimit(t *testing.T) {
	r := newRoad(t)
	r.listen(t)
	c := r.config(t)
	c.Rate, c.Burst, c.LimitAll = 1, 3600, true
	g := stand(t, c)
	var now unix.Timespec
	must(t, unix.ClockGettime(unix.CLOCK_MONOTONIC, &now))
	full := uint64(now.Nano() + int64(50*time.Minute)) // after 3000 REGISTERs at once
	must(t, g.objs.Sources.Put(words(roadPhone4), full))
	must(t, g.Detach())
	g = stand(t, c) // the same limit
	var kept uint64
	must(t, g.objs.Sources.Lookup(words(roadPhone4), &kept))
	if kept != full {
		t.Errorf("the bucket was changed by a restart: %d, want %d", kept, full)
	}
	must(t, g.Detach())
	c.Rate, c.Burst = 10, 64
	g = stand(t, c)
	r.udp(t, "4", roadClear)
	soon(t, "a source is let in again", func() bool { return r.got("udp4", roadClear) == 1 })
	if n := tally(t, g, DropRegisterRate); n != 0 {
		t.Errorf("%d dropped", n)
	}
}

// TestAddressComesLater starts while no interface has the address: the guard of the run before goes on, and is taken over.
func TestAddressComesLater(t *testing.T) {
	r := newRoad(t)
	r.listen(t)
	c := r.config(t)
	g := stand(t, c)
	pinned := Attached(c.Pin)
	must(t, g.Detach())
	c.Interfaces, c.Local = nil, []netip.Addr{netip.MustParseAddr("198.51.100.9")}
	g = openOnly(t, c)
	must(t, g.Attach())
	if now := Attached(c.Pin); !slices.Equal(now, pinned) {
		t.Errorf("%v are attached, want %v", now, pinned)
	}
	must(t, r.gate.AddAddr("gm0", netip.MustParsePrefix("198.51.100.9/24")))
	soon(t, "the guard takes the interface over", func() bool {
		hooks := g.Hooks()
		return len(hooks) == 1 && hooks[0].Reason == "in place of the run before"
	})
}

// TestModes goes from hook to hook, and leaves nothing of the one before.
func TestModes(t *testing.T) {
	r := newRoad(t)
	r.listen(t)
	c := r.config(t)
	for _, m := range []struct {
		mode  Mode
		hooks []HookKind
		want  HookKind
	}{
		{Native, nil, HookNative},
		{Generic, nil, HookGeneric},
		{Native, nil, HookNative},
		{TC, nil, bestTC()},
		{TC, []HookKind{HookTC}, HookTC},
		{Native, nil, HookNative},
		{TC, []HookKind{HookTC}, HookTC},
		{Generic, nil, HookGeneric},
	} {
		c.Mode, c.hooks = m.mode, m.hooks
		g := stand(t, c)
		if h := hookOf(t, g, "gm0"); h.Kind != m.want {
			t.Errorf("hook %+v, want %s", h, m.want)
		}
		want := 1
		if m.want == HookTC {
			want = 0
		}
		if n := attachments(t, r.gate, "gm0"); n != want {
			t.Errorf("%s: %d programs on the interface, want %d", m.want, n, want)
		}
		if found, err := filterAt(c.Pin, "gm0").Present(r.gate); found != (m.want == HookTC) || err != nil {
			t.Errorf("%s: filter present: %v, %v", m.want, found, err)
		}
		r.onDuty(t, g)
		must(t, g.Detach())
	}
	if found, err := UnloadIn(r.gate, c.Pin, c.Logger); !found || err != nil {
		t.Errorf("unload: %v, %v", found, err)
	}
	r.unguarded(t)
}

// TestUnload takes everything away, but not from under a process.
func TestUnload(t *testing.T) {
	for _, tc := range hookCases {
		t.Run(tc.name, func(t *testing.T) {
			r := newRoad(t)
			r.listen(t)
			c := r.config(t)
			c.hooks = tc.hooks
			if found, err := UnloadIn(r.gate, c.Pin, c.Logger); found || err != nil {
				t.Errorf("unload before anything: %v, %v", found, err)
			}
			g := stand(t, c)
			if _, err := UnloadIn(r.gate, c.Pin, c.Logger); !errors.Is(err, ErrLocked) {
				t.Errorf("error %v while it is open, want %v", err, ErrLocked)
			}
			if _, err := Open(c); !errors.Is(err, ErrLocked) {
				t.Errorf("error %v from a second Open, want %v", err, ErrLocked)
			}
			r.onDuty(t, g)
			must(t, g.Detach())
			if found, err := UnloadIn(r.gate, c.Pin, c.Logger); !found || err != nil {
				t.Errorf("unload: %v, %v", found, err)
			}
			if _, err := os.Stat(c.Pin); !os.IsNotExist(err) {
				t.Errorf("the directory is left: %v, with %v", err, Pinned(c.Pin))
			}
			if n := attachments(t, r.gate, "gm0"); n != 0 {
				t.Errorf("%d programs stay on the interface", n)
			}
			if found, err := filterAt(c.Pin, "gm0").Present(r.gate); found || err != nil {
				t.Errorf("filter present: %v, %v", found, err)
			}
			r.unguarded(t)
		})
	}
}

// TestTwoInstances stand on one interface, each for its own addresses.
func TestTwoInstances(t *testing.T) {
	for _, tc := range []struct {
		name          string
		first, second []HookKind
	}{
		{"auto", nil, nil},
		{"tcx or clsact", []HookKind{HookTCX, HookTC}, []HookKind{HookTCX, HookTC}},
		{"clsact", []HookKind{HookTC}, []HookKind{HookTC}},
		{"clsact second", nil, []HookKind{HookTC}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRoad(t)
			r.listen(t)
			c1, c2 := r.config(t), r.config(t)
			c1.hooks, c2.hooks = tc.first, tc.second
			c2.Local = []netip.Addr{netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("2001:db8::9")}
			second := openOnly(t, c2)
			must(t, second.Attach())
			first := stand(t, c1)
			r.onDuty(t, first)
			if s := stats(t, second); s.Tally(DropUnknownSPI).Packets+s.Tally(DropCleartext).Packets+s.Tally(PassESP).Packets != 0 {
				t.Errorf("the other instance counts %+v", s.Tallies)
			}
			must(t, second.Close())
			r.onDuty(t, first)
			second = openOnly(t, c2)
			must(t, second.Attach())
			want := hookOf(t, second, "gm0").Kind
			must(t, first.Close())
			r.unguarded(t)
			must(t, second.Attach())
			if h := hookOf(t, second, "gm0"); h.Kind != want {
				t.Errorf("the second one stands at %+v now, want %s", h, want)
			}
			n := attachments(t, r.gate, "gm0")
			found, err := filterAt(c2.Pin, "gm0").Present(r.gate)
			if err != nil || (n == 1) == found {
				t.Errorf("%d programs and a filter %v of the second one, %v", n, found, err)
			}
		})
	}
}

// Environment of the process that is to crash.
const crashPin, crashHook = "GMGATE_TEST_CRASH_PIN", "GMGATE_TEST_CRASH_HOOK"

// TestCrashingProcess is the process of TestCrash that is killed. It ends with its standard input in any case.
func TestCrashingProcess(t *testing.T) {
	pin := os.Getenv(crashPin)
	if pin == "" {
		return
	}
	c := (&road{}).bareConfig()
	c.Pin = pin
	if h := os.Getenv(crashHook); h != "" {
		c.hooks = []HookKind{HookKind(h)}
	}
	g, err := Open(c)
	must(t, err)
	must(t, g.Sync(sets(), nil))
	must(t, g.Attach())
	fmt.Println("attached")
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// TestCrash kills the process that owns a guard. The guard goes on, and the next process has it.
func TestCrash(t *testing.T) {
	for _, hook := range []HookKind{"", bestTC(), HookTC} {
		t.Run(string(hook), func(t *testing.T) {
			r := newRoad(t)
			r.listen(t)
			c := r.config(t)
			if hook != "" {
				c.hooks = []HookKind{hook}
			}
			cmd := exec.Command(os.Args[0], "-test.run", "^TestCrashingProcess$", "-test.v")
			cmd.Env = append(os.Environ(), crashPin+"="+c.Pin, crashHook+"="+string(hook))
			in, err := cmd.StdinPipe()
			must(t, err)
			defer in.Close() //nolint:errcheck // of a process that is gone
			out, err := cmd.StdoutPipe()
			must(t, err)
			cmd.Stderr = os.Stderr
			must(t, r.gate.Do(cmd.Start)) // in the namespace of the interfaces
			lines := bufio.NewScanner(out)
			attached := false
			for !attached && lines.Scan() {
				attached = strings.Contains(lines.Text(), "attached")
			}
			if attached {
				if _, err := Open(c); !errors.Is(err, ErrLocked) {
					t.Errorf("error %v while the process lives, want %v", err, ErrLocked)
				}
			}
			must(t, cmd.Process.Kill())
			_, _ = io.Copy(io.Discard, out)
			_ = cmd.Wait() // it was killed
			if !attached {
				t.Fatal("the process has attached nothing")
			}
			r.onDuty(t, nil)
			g := stand(t, c)
			if s := stats(t, g); s.Tally(PassESP).Packets != 10 || s.Tally(DropUnknownSPI).Packets != 10 {
				t.Errorf("counters %+v, want what came after the crash", s.Tallies)
			}
			r.onDuty(t, g)
		})
	}
}

// TestUnpinned ends with the process where nothing can be pinned, and says so.
func TestUnpinned(t *testing.T) {
	r := newRoad(t)
	r.listen(t)
	c := r.config(t)
	c.Pin = filepath.Join(t.TempDir(), "pins")
	must(t, os.Mkdir(c.Pin, 0o700))
	precious := filepath.Join(c.Pin, "link_gm0_xdp")
	must(t, os.WriteFile(precious, []byte("no pin"), 0o600))
	log := &warnings{}
	c.Logger = slog.New(log)
	g := stand(t, c)
	if !slices.ContainsFunc(log.all(), func(s string) bool { return strings.Contains(s, "does not outlive") }) {
		t.Errorf("warnings %q tell nothing of it", log.all())
	}
	if g.Pinned() != "" {
		t.Errorf("pinned at %q", g.Pinned())
	}
	r.onDuty(t, g)
	if names := Pinned(c.Pin); len(names) != 0 {
		t.Errorf("a file is taken for a pin: %v", names)
	}
	if found, err := UnloadIn(r.gate, c.Pin, c.Logger); found || err != nil {
		t.Errorf("unload: %v, %v", found, err)
	}
	must(t, g.Detach())
	r.unguarded(t)
	if _, err := os.Stat(precious); err != nil {
		t.Errorf("a file that is not ours has gone: %v", err)
	}
}

// warnings collects warnings.
type warnings struct {
	mu    sync.Mutex
	lines []string
}

func (w *warnings) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelWarn }
func (w *warnings) WithAttrs([]slog.Attr) slog.Handler           { return w }
func (w *warnings) WithGroup(string) slog.Handler                { return w }
func (w *warnings) Handle(_ context.Context, r slog.Record) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lines = append(w.lines, r.Message)
	return nil
}

func (w *warnings) all() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.lines)
}

// TestMountsBPFFS mounts it where nobody has.
func TestMountsBPFFS(t *testing.T) {
	mayHook(t)
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: its mounts are its own
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
				return err
			}
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return err
			}
			for isBPFFS(bpffs) {
				if err := unix.Unmount(bpffs, unix.MNT_DETACH); err != nil {
					return err
				}
			}
			d, err := openPinDir(bpffs+"/gmgate-test-mount", slog.New(slog.DiscardHandler))
			if err != nil {
				return err
			}
			if d == nil || !isBPFFS(d.path) {
				return errors.New("no bpffs was mounted")
			}
			return errors.Join(d.clear(), d.close())
		}()
	}()
	must(t, <-done)
}

// TestGarbage finds things in the pin directory that it has not put there.
func TestGarbage(t *testing.T) {
	r := newRoad(t)
	r.listen(t)
	c := r.config(t)
	must(t, os.MkdirAll(c.Pin, 0o700))
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	must(t, err)
	defer m.Close() //nolint:errcheck // a handle only
	pin := func(o interface{ Pin(string) error }, name string) {
		t.Helper()
		must(t, o.Pin(filepath.Join(c.Pin, name)))
	}
	clone := func() *ebpf.Map {
		t.Helper()
		d, err := m.Clone()
		must(t, err)
		t.Cleanup(func() { _ = d.Close() })
		return d
	}
	pin(clone(), bpf.GuardMapTallies)                               // a map of another kind
	pin(clone(), linkPin("gm0", HookNative))                        // no link
	pin(clone(), filterPin("gm9"))                                  // a filter on no interface
	pin(clone(), "something")                                       // somebody else's
	must(t, os.Mkdir(filepath.Join(c.Pin, bpf.GuardMapSas), 0o700)) // no map at all
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SocketFilter, Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()}, License: "Apache-2.0"})
	must(t, err)
	defer p.Close() //nolint:errcheck // a handle only
	pin(p, bpf.GuardMapTraffics)

	g := stand(t, c)
	if h := hookOf(t, g, "gm0"); h.Kind != HookNative {
		t.Errorf("hook %+v", h)
	}
	r.onDuty(t, g)
	must(t, g.Close())
	if _, err := os.Stat(c.Pin); !os.IsNotExist(err) {
		t.Errorf("the directory is left: %v, with %v", err, Pinned(c.Pin))
	}
}
