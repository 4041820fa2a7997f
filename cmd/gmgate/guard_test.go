package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"testing"

	"github.com/gmgate/gmgate/control/config"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/guard"
)

// script notes the order of calls of a backend and a guard.
type script struct {
	calls               []string
	install, add, leave error // results of Install, Add and the guard's Remove
	seen                []sa.Params
}

func (s *script) Install(_ sa.Params, done func(error)) {
	s.calls = append(s.calls, "install")
	done(s.install)
}

func (s *script) Remove(p sa.Params, done func(error)) {
	s.calls = append(s.calls, "remove")
	done(nil)
}

// backendOf makes an Installer of the script.
type backendOf struct {
	sa.Installer
	*script
}

func (b backendOf) Install(p sa.Params, done func(error)) { b.script.Install(p, done) }
func (b backendOf) Remove(p sa.Params, done func(error))  { b.script.Remove(p, done) }
func (b backendOf) Count() int                            { return 0 }
func (b backendOf) Close() error                          { return nil }

// doorOf makes a guard of the script.
type doorOf struct{ *script }

func (d doorOf) Add(p sa.Params) error {
	d.calls, d.seen = append(d.calls, "add"), append(d.seen, p)
	return d.add
}

func (d doorOf) Remove(p sa.Params) error {
	d.calls, d.seen = append(d.calls, "leave"), append(d.seen, p)
	return d.leave
}

// A set is installed when backend and guard have it, or neither; the guard gets no keys.
func TestGuardedInstall(t *testing.T) {
	broken, full := errors.New("backend says no"), guard.ErrFull
	for _, tt := range []struct {
		name         string
		install, add error
		want         error
		calls        []string
	}{
		{"both take it", nil, nil, nil, []string{"install", "add"}},
		{"the backend refuses", broken, nil, broken, []string{"install"}},
		{"the guard is full", nil, full, full, []string{"install", "add", "remove"}},
	} {
		s := &script{install: tt.install, add: tt.add}
		g := guarded{backendOf{script: s}, doorOf{s}, slog.New(slog.DiscardHandler)}
		p := sa.Params{ID: 7, Keys: ims.ESPKeys{Enc: ims.Key("0123456789abcdef"), Auth: ims.Key("abc"), Salt: [4]byte{1}}}
		answers := 0
		g.Install(p, func(err error) {
			answers++
			if !errors.Is(err, tt.want) {
				t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
			}
		})
		if answers != 1 || !slices.Equal(s.calls, tt.calls) {
			t.Errorf("%s: %d answers, calls %q, want %q", tt.name, answers, s.calls, tt.calls)
		}
		for _, seen := range s.seen {
			if seen.Keys.Enc != nil || seen.Keys.Auth != nil || seen.Keys.Salt != [4]byte{} || seen.ID != 7 {
				t.Errorf("%s: the guard was given %+v", tt.name, seen.ID)
			}
		}
	}
}

// A guard of the run before that this one cannot take over goes: it knows no SPI of the phones to come.
func TestGuardUnavailable(t *testing.T) {
	cfg := config.Example()
	cfg.Guard.Pin = fmt.Sprintf("/sys/fs/bpf/gmgate-test-%d-left", os.Getpid())
	t.Cleanup(func() { _ = os.RemoveAll(cfg.Guard.Pin) })
	log := slog.New(slog.DiscardHandler)
	g, err := guard.Open(guardConfig(cfg, false, false, log))
	if err != nil {
		if os.Getenv("REQUIRE_KERNEL_TESTS") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	if err := g.Detach(); err != nil {
		t.Fatal(err)
	}
	unavailable := func(guard.Config) (*guard.Guard, error) { return nil, guard.ErrUnavailable }
	cfg.Guard.Mode = config.GuardXDP
	if f, err := openGuardBy(unavailable, cfg, false, false, log); f != nil || !errors.Is(err, guard.ErrUnavailable) {
		t.Errorf("%v and %v where a hook is asked for", f, err)
	}
	if len(guard.Pinned(cfg.Guard.Pin)) == 0 {
		t.Fatal("nothing is pinned; what a run leaves that does not start at all is not to go")
	}
	cfg.Guard.Mode = config.GuardAuto
	if f, err := openGuardBy(unavailable, cfg, false, false, log); f == nil || f.Guard != nil || err != nil {
		t.Errorf("%v and %v", f, err)
	}
	if names := guard.Pinned(cfg.Guard.Pin); len(names) != 0 {
		t.Errorf("%q of the run before are left", names)
	}
}

// The SPI passes as long as the SA is there, and no longer.
func TestGuardedRemove(t *testing.T) {
	for _, leave := range []error{nil, errors.New("map says no")} {
		s := &script{leave: leave}
		g := guarded{backendOf{script: s}, doorOf{s}, slog.New(slog.DiscardHandler)}
		g.Remove(sa.Params{ID: 7}, func(err error) {
			if err != nil {
				t.Errorf("removal failed: %v", err) // the SA is gone
			}
		})
		if want := []string{"remove", "leave"}; !slices.Equal(s.calls, want) {
			t.Errorf("calls %q, want %q", s.calls, want)
		}
	}
}

// What the configuration says reaches the guard.
func TestGuardConfig(t *testing.T) {
	cfg := config.Example()
	cfg.Instance = "edge1.example"
	cfg.Guard.UnknownSPI = config.UnknownPass
	g := guardConfig(cfg, true, true, nil)
	if g.Pin != "/sys/fs/bpf/gmgate/edge1:example" {
		t.Errorf("pin directory %q", g.Pin)
	}
	if !slices.Equal(g.Protected, []uint16{6100, 6101, 6110, 6111, 6112, 6113}) || g.ClearPort != 5060 {
		t.Errorf("ports %v and %d", g.Protected, g.ClearPort)
	}
	if !g.KernelESP || !g.PassUnknown || g.LimitAll || g.Rate != 10 || g.Burst != 64 {
		t.Errorf("%+v", g)
	}
	if g = guardConfig(cfg, false, false, nil); g.KernelESP || !g.LimitAll {
		t.Errorf("%+v", g)
	}
}
