package main

import (
	"bytes"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/config"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/proxy"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/control/sa/satest"
	"github.com/gmgate/gmgate/control/store"
	"github.com/gmgate/gmgate/control/store/storetest"
)

// keep opens the store of a configuration and says what was logged.
func keep(t *testing.T, cfg *config.Config) (k *keeper, log string, err error) {
	t.Helper()
	var b bytes.Buffer
	k, err = openKeeper(t.Context(), cfg, slog.New(slog.NewTextHandler(&b, nil)))
	return k, b.String(), err
}

func storeConfig(t *testing.T) *config.Config {
	c := config.Example()
	c.Store.Path = filepath.Join(t.TempDir(), "lib", "gmgate.db")
	return c
}

func closed(t *testing.T, k *keeper) {
	t.Helper()
	if err := k.close(); err != nil {
		t.Error(err)
	}
}

// Two starts in a row: the key of flow tokens stays, the directory and the key are nobody else's, and a second process is
// kept out.
func TestKeeper(t *testing.T) {
	cfg := storeConfig(t)
	k, log, err := keep(t, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(log, "ERROR") {
		t.Errorf("a first start complains: %s", log)
	}
	for path, mode := range map[string]os.FileMode{filepath.Dir(cfg.Store.Path): 0o700, cfg.Store.Path + ".key": 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
	if _, _, err := keep(t, cfg); !errors.Is(err, store.ErrLocked) {
		t.Errorf("second process: %v", err)
	}
	first, err := k.tokenKey()
	if err != nil {
		t.Fatal(err)
	}
	shared := &proxy.Config{Workers: 2}
	if err := k.load(t.Context(), cfg, shared, new(satest.Backend)); err != nil || shared.Store == nil {
		t.Fatalf("load: %v", err)
	}
	if m, err := k.db.Meta(t.Context()); err != nil || m.Clean || m.Workers != 2 {
		t.Errorf("while running: %+v, %v", m.Clean, err)
	}
	closed(t, k)

	k, _, err = keep(t, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, k)
	again, err := k.tokenKey()
	if err != nil || !bytes.Equal(first, again) || !k.meta.Clean {
		t.Errorf("flow tokens of before mean nothing now, or the end was not clean: %v", err)
	}
}

// With the key in a credential the directory is made as well.
func TestKeeperCredential(t *testing.T) {
	cfg := storeConfig(t)
	creds := t.TempDir()
	if err := os.WriteFile(filepath.Join(creds, "seal"), storetest.Key(32, 7), 0o400); err != nil {
		t.Fatal(err)
	}
	t.Setenv("CREDENTIALS_DIRECTORY", creds)
	cfg.Store.Credential = "seal"
	k, _, err := keep(t, cfg)
	if err != nil {
		t.Fatal(err)
	}
	closed(t, k)
}

// A store that cannot be used is moved aside, said aloud, and service goes on; one that others may read, or whose key is
// another one, is the operator's to mend.
func TestKeeperTrouble(t *testing.T) {
	for name, c := range map[string]struct {
		harm func(t *testing.T, cfg *config.Config)
		says string // in the log, when service goes on
		err  error  // else; nil: any
	}{
		"key lost": {func(t *testing.T, cfg *config.Config) {
			if err := os.Remove(cfg.Store.Path + ".key"); err != nil {
				t.Fatal(err)
			}
		}, "key file of the store is missing", nil},
		"damaged": {func(t *testing.T, cfg *config.Config) {
			if err := os.WriteFile(cfg.Store.Path, []byte("this is no database"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "store was unusable", nil},
		"another key": {func(t *testing.T, cfg *config.Config) {
			if err := os.WriteFile(cfg.Store.Path+".key", storetest.Key(32, 7), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "", store.ErrKey},
		"key open to others": {func(t *testing.T, cfg *config.Config) {
			if err := os.Chmod(cfg.Store.Path+".key", 0o644); err != nil { //nolint:gosec // that is the point
				t.Fatal(err)
			}
		}, "", store.ErrKeyFile},
		"no credential": {func(_ *testing.T, cfg *config.Config) { cfg.Store.Credential = "gmgate-store" }, "", store.ErrKeyFile},
		"directory is a file": {func(_ *testing.T, cfg *config.Config) {
			cfg.Store.Path = filepath.Join(cfg.Store.Path, "x.db")
		}, "", nil},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := storeConfig(t)
			k, _, err := keep(t, cfg)
			if err != nil {
				t.Fatal(err)
			}
			s := storetest.Set(1)
			if err := k.db.Apply(t.Context(), store.Batch{Sets: []store.Set{s}}); err != nil {
				t.Fatal(err)
			}
			closed(t, k)
			c.harm(t, cfg)
			k, log, err := keep(t, cfg)
			if c.says == "" {
				if err == nil {
					closed(t, k)
				}
				if err == nil || c.err != nil && !errors.Is(err, c.err) {
					t.Errorf("error is %v, want %v", err, c.err)
				}
				return
			}
			if err != nil || !strings.Contains(log, c.says) {
				t.Fatalf("%v, log: %s", err, log)
			}
			ids, err := k.db.SetIDs(t.Context())
			if err != nil || len(ids) != 0 {
				t.Errorf("%d sets in the new store, %v", len(ids), err)
			}
			closed(t, k)
			if old, _ := filepath.Glob(cfg.Store.Path + ".*"); len(old) < 2 {
				t.Errorf("the old store is not there any more: %v", old)
			}
		})
	}
}

// Without a store nothing of an earlier run may stay in the backend, and at the end nothing of this one.
func TestNoStore(t *testing.T) {
	cfg := config.Example()
	cfg.Store.Path = ""
	k, _, err := keep(t, cfg)
	if err != nil {
		t.Fatal(err)
	}
	back := new(satest.Backend)
	left := storetest.Set(1)
	back.Install(left.Params(storetest.Epoch), func(error) {})
	back.Answer()
	back = back.Restarted()
	shared := &proxy.Config{Workers: 1}
	if err := k.load(t.Context(), cfg, shared, back); err != nil || back.Count() != 0 || shared.Store != nil {
		t.Errorf("%v, %d SAs left", err, back.Count())
	}
	key, err := k.tokenKey()
	if err != nil || len(key) != 16 {
		t.Errorf("token key: %v", err)
	}
	closed(t, k)
}

// register puts a registration of a worker into the store, and returns its set.
func register(t *testing.T, k *keeper, worker uint16) store.Set {
	t.Helper()
	s, r := storetest.Set(3), storetest.Registration(3)
	s.Deadline = s.Deadline.AddDate(100, 0, 0)
	r.Worker, s.Worker = worker, worker
	if err := k.db.Apply(t.Context(), store.Batch{Sets: []store.Set{s}, Registrations: []store.Registration{r}}); err != nil {
		t.Fatal(err)
	}
	return s
}

// What load found goes to the workers: contexts, and SPIs that nobody may be given.
func TestKeeperHands(t *testing.T) {
	cfg := storeConfig(t)
	k, _, err := keep(t, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, k)
	s := register(t, k, 0)
	key, _ := k.tokenKey()
	shared := &proxy.Config{
		Workers: 1, Gm: []netip.Addr{s.Local}, Suites: ims.Suites(), TokenKey: key, SPIFirst: 1 << 28, SPILast: 1<<28 + 4095,
		NextHops: []ims.Hop{{Addr: netip.MustParseAddrPort("10.0.1.9:5060"), Transport: ims.UDP}},
	}
	shared.Registrar.ServerPorts, shared.Registrar.ClientPorts = []uint16{s.Ports.PS}, []uint16{s.Ports.PC}
	back := installing{new(satest.Backend)}
	if err := k.load(t.Context(), cfg, shared, back); err != nil {
		t.Fatal(err)
	}
	if k.outcome.Reinstalled != 1 || len(k.outcome.Workers[0].UEs) != 1 || len(k.outcome.SPIs) != 2 {
		t.Errorf("%+v", k.outcome)
	}
	if err := k.release(back); err != nil || back.Count() != 4 {
		t.Errorf("release: %v, %d SAs", err, back.Count())
	}
}

// A phone that was with a worker that there is no more is still reached by the Mw port of that one. What is configured goes first.
func TestKeepPorts(t *testing.T) {
	cfg := storeConfig(t)
	k, _, err := keep(t, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, k)
	s := register(t, k, 3)
	shared := &proxy.Config{Workers: 1, Gm: []netip.Addr{s.Local}, Suites: ims.Suites()}
	shared.Registrar.ServerPorts, shared.Registrar.ClientPorts = []uint16{s.Ports.PS}, []uint16{s.Ports.PC}
	if err := k.load(t.Context(), cfg, shared, installing{new(satest.Backend)}); err != nil {
		t.Fatal(err)
	}
	cfg.Workers = 1
	cfg.Metrics.Listen = netip.AddrPortFrom(netip.IPv6Unspecified(), cfg.Mw.Port+2)
	fc := frontConfig(cfg, &backend{}, nil)
	configured := len(fc.Listeners)
	keepPorts(&fc, cfg, shared.MwPorts)
	var ports []uint16
	for _, l := range fc.Listeners[configured:] {
		ports = append(ports, l.Addr.Port()-cfg.Mw.Port)
		if l.Side != ims.Mw || !l.Optional || !l.UDP || !l.TCP || l.Worker != 0 || !slices.Contains(cfg.Mw.Addresses, l.Addr.Addr()) {
			t.Errorf("%+v", l)
		}
	}
	if want := slices.Repeat([]uint16{1, 3}, len(cfg.Mw.Addresses)); !slices.Equal(ports, want) {
		t.Errorf("ports beyond the configured one: %v, want %v", ports, want)
	}
	cfg.Mw.Port = 65535
	fc = frontConfig(cfg, &backend{}, nil)
	if keepPorts(&fc, cfg, shared.MwPorts); len(fc.Listeners) != configured {
		t.Error("ports beyond the last one there is")
	}
}

// installing answers installations at once.
type installing struct{ *satest.Backend }

func (i installing) Install(p sa.Params, done func(error)) { i.Backend.Install(p, done); i.Answer() }

// Each time that the store stops taking changes is in the log once, and its recovery.
func TestStoreLag(t *testing.T) {
	var b strings.Builder
	l := storeLag{log: slog.New(slog.NewTextHandler(&b, nil))}
	for range 2 {
		l.Failed(errors.New("disk full"), 1, 0)
		l.Failed(errors.New("disk full"), 1, 0)
		l.Wrote(1, time.Millisecond, 0)
		l.Wrote(1, time.Millisecond, 0)
	}
	failed, again := strings.Count(b.String(), "disk full"), strings.Count(b.String(), "takes changes again")
	if failed != 2 || again != 2 || l.failed.Load() != 4 || l.batches.Load() != 4 {
		t.Errorf("%d failures counted, log:\n%s", l.failed.Load(), b.String())
	}
}
