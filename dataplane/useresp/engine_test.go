package useresp

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"math"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/esptun"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeTunnel is a tunnel that only remembers its SAs.
type fakeTunnel struct {
	mu     sync.Mutex
	sas    []esptun.SA
	gate   chan struct{} // if not nil, Add waits for it
	atGate chan struct{} // if not nil, gets a value when Add starts to wait
	closed int
}

var errFull = errors.New("no more SAs")

func (f *fakeTunnel) Add(sas ...esptun.SA) error {
	if f.gate != nil {
		select {
		case f.atGate <- struct{}{}:
		default:
		}
		<-f.gate
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range sas {
		if len(s.Keys.Enc) != 16 || s.Keys.Enc[0] != 7 {
			return fmt.Errorf("keys of %s did not arrive", s)
		}
		if slices.ContainsFunc(f.sas, is(s)) {
			return esptun.ErrExists
		}
	}
	if len(f.sas) >= 40 {
		return errFull
	}
	for _, s := range sas {
		s.Keys = ims.ESPKeys{}
		f.sas = append(f.sas, s)
	}
	return nil
}

// is matches the SA that is the same but for keys and numbers.
func is(s esptun.SA) func(esptun.SA) bool {
	return func(o esptun.SA) bool {
		return o.Inbound == s.Inbound && o.SPI == s.SPI && o.Src == s.Src && o.Dst == s.Dst
	}
}

func (f *fakeTunnel) Remove(sas ...esptun.SA) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sas = slices.DeleteFunc(f.sas, func(s esptun.SA) bool { return slices.ContainsFunc(sas, is(s)) })
}

func (f *fakeTunnel) Seq(s *esptun.SA) (uint32, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if i := slices.IndexFunc(f.sas, is(*s)); i >= 0 {
		return f.sas[i].Seq, true
	}
	return 0, false
}

func (f *fakeTunnel) All() iter.Seq[esptun.SA] {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Values(slices.Clone(f.sas))
}

func (f *fakeTunnel) Count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.sas)
}

func (f *fakeTunnel) Close() error {
	f.closed++
	return nil
}

func params(id uint64, hard time.Duration) sa.Params {
	n := uint16(id)
	return sa.Params{
		ID: id, Label: uint32(id), Local: netip.MustParseAddr("10.0.0.5"), UE: netip.AddrFrom4([4]byte{10, 45, byte(n >> 8), byte(n)}),
		Ports: ims.Ports{UC: 6301, US: 6300, PC: 6111, PS: 6100},
		SPIs:  ims.SPIs{UC: 0x1001, US: 0x1002, PC: ims.SPI(0x20000000 + 2*id), PS: ims.SPI(0x20000001 + 2*id)},
		Keys:  ims.ESPKeys{Suite: ims.Suites()[0], Enc: slices.Repeat(ims.Key{7}, 16), Salt: [4]byte{1, 2, 3, 4}},
		Hard:  hard,
	}
}

// call runs an operation and waits for its callback.
func call(t *testing.T, f func(done func(error))) error {
	t.Helper()
	got := make(chan error, 2)
	f(func(err error) { got <- err })
	err := <-got
	select {
	case <-got:
		t.Error("callback called twice")
	default:
	}
	return err
}

func install(t *testing.T, b sa.Installer, p sa.Params) error {
	t.Helper()
	return call(t, func(done func(error)) { b.Install(p, done) })
}

func remove(t *testing.T, b sa.Installer, p sa.Params) error {
	t.Helper()
	return call(t, func(done func(error)) { b.Remove(p, done) })
}

func newTestEngine(f *fakeTunnel) *engine { return newEngine(f, slog.New(slog.DiscardHandler), nil) }

func TestInstallAndRemove(t *testing.T) {
	f := &fakeTunnel{}
	e := newTestEngine(f)
	defer func() { _ = e.Close() }()
	p := params(1, 0)
	if err := install(t, e, p); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"inbound SA 0x20000003 10.45.0.1:6301->10.0.0.5:6100", "inbound SA 0x20000002 10.45.0.1:6300->10.0.0.5:6111",
		"outbound SA 0x00001002 10.0.0.5:6111->10.45.0.1:6300", "outbound SA 0x00001001 10.0.0.5:6100->10.45.0.1:6301",
	}
	var got []string
	for _, s := range f.sas {
		got = append(got, s.String())
	}
	if !slices.Equal(got, want) {
		t.Errorf("installed:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if n := e.Count(); n != 4 {
		t.Errorf("Count = %d, want 4", n)
	}
	if err := install(t, e, p); !errors.Is(err, esptun.ErrExists) {
		t.Errorf("install again: err = %v, want ErrExists", err)
	}
	same := p
	same.ID = 2 // another set with the same SPIs
	if err := install(t, e, same); !errors.Is(err, esptun.ErrExists) {
		t.Errorf("install a twin: err = %v, want ErrExists", err)
	}
	if err := remove(t, e, same); err != nil || e.Count() != 4 {
		t.Errorf("remove a set that was refused: err = %v, Count = %d", err, e.Count())
	}
	for range 2 {
		if err := remove(t, e, sa.Params{ID: 1}); err != nil || e.Count() != 0 {
			t.Errorf("remove: err = %v, Count = %d", err, e.Count())
		}
	}
	// The caller may wipe its keys as soon as Install has returned.
	if err := call(t, func(done func(error)) {
		k := params(3, 0)
		e.Install(k, done)
		k.Keys.Zero()
	}); err != nil {
		t.Errorf("install with keys wiped afterwards: %v", err)
	}
	if p.Keys.Enc[0] != 7 {
		t.Error("the backend wiped the caller's keys")
	}
}

func TestCallbackOrderAndGoroutine(t *testing.T) {
	f := &fakeTunnel{gate: make(chan struct{})}
	e := newTestEngine(f)
	var order []string
	var wg sync.WaitGroup
	wg.Add(4)
	note := func(what string) func(error) {
		return func(err error) { order = append(order, fmt.Sprint(what, " ", err)); wg.Done() }
	}
	p := params(1, 0)
	e.Install(p, note("install"))
	e.Extend(p, time.Minute, note("extend"))
	e.Remove(p, note("remove"))
	e.Install(p, note("install"))
	if len(order) != 0 {
		t.Error("callback ran before anything was installed")
	}
	close(f.gate)
	wg.Wait()
	if got := strings.Join(order, ", "); got != "install <nil>, extend <nil>, remove <nil>, install <nil>" {
		t.Errorf("callbacks: %s", got)
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
}

func TestHardLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeTunnel{}
		var expired []uint64
		e := newEngine(f, slog.New(slog.DiscardHandler), func(id uint64) {
			if slices.ContainsFunc(f.sas, func(s esptun.SA) bool { return s.ID == id }) {
				t.Errorf("told of set %d before its SAs were gone", id)
			}
			expired = append(expired, id)
		})
		defer func() { _ = e.Close() }()
		at := func(d time.Duration, want int) {
			t.Helper()
			time.Sleep(d)
			synctest.Wait()
			if got := e.Count() / 4; got != want {
				t.Fatalf("%d sets, want %d", got, want)
			}
		}
		extend := func(id uint64, d time.Duration) error {
			return call(t, func(done func(error)) { e.Extend(sa.Params{ID: id}, d, done) })
		}
		for i, hard := range []time.Duration{4 * time.Minute, 10 * time.Second, 0, 2 * time.Hour, time.Minute, time.Minute} {
			if err := install(t, e, params(uint64(1+i), hard)); err != nil {
				t.Fatal(err)
			}
		}
		at(9999*time.Millisecond, 6)
		at(2*time.Millisecond, 5) // set 2
		if err := extend(5, 10*time.Minute); err != nil {
			t.Fatal(err)
		}
		if err := extend(1, 0); err != nil { // no limit any more
			t.Fatal(err)
		}
		if err := extend(1, 0); err != nil {
			t.Fatal(err)
		}
		if err := extend(2, time.Hour); !errors.Is(err, ErrUnknown) {
			t.Errorf("extend a set that is gone: err = %v, want ErrUnknown", err)
		}
		at(50*time.Second, 4)  // set 6
		at(9*time.Minute, 4)   // set 1 lives on
		at(11*time.Second, 3)  // set 5
		at(110*time.Minute, 2) // set 4
		at(1000*time.Hour, 2)  // sets 1 and 3 have no limit
		if err := extend(3, time.Second); err != nil {
			t.Fatal(err)
		}
		at(time.Second, 1)
		if err := install(t, e, params(7, time.Second)); err != nil {
			t.Fatal(err)
		}
		if err := remove(t, e, params(7, 0)); err != nil {
			t.Fatal(err)
		}
		at(time.Second, 1)
		if len(e.deadlines) != 0 {
			t.Errorf("%d deadlines left", len(e.deadlines))
		}
		// Each once, and not set 7, which was removed in time.
		if !slices.Equal(expired, []uint64{2, 6, 5, 4, 3}) {
			t.Errorf("expired: %v", expired)
		}
	})
}

func TestQueueIsBounded(t *testing.T) {
	f := &fakeTunnel{gate: make(chan struct{}), atGate: make(chan struct{}, 1)}
	e := newTestEngine(f)
	var wg sync.WaitGroup
	var busy int
	add := func(id uint64) {
		wg.Add(1)
		e.Install(params(id, 0), func(err error) {
			defer wg.Done()
			if errors.Is(err, ErrBusy) {
				busy++
			} else if err != nil && !errors.Is(err, errFull) {
				t.Error(err)
			}
		})
	}
	add(1)
	<-f.atGate // the engine works on it, so that nothing leaves the queue from now on
	for i := range maxQueue + 100 {
		add(uint64(i + 2))
	}
	wg.Add(2)
	e.Extend(params(1, 0), time.Hour, func(err error) {
		if !errors.Is(err, ErrBusy) {
			t.Errorf("extend with a full queue: err = %v, want ErrBusy", err)
		}
		wg.Done()
	})
	left := -1
	e.Remove(params(1, 0), func(err error) {
		if err == nil {
			left = f.Count()
		}
		wg.Done()
	})
	close(f.gate)
	wg.Wait()
	if busy != 100 {
		t.Errorf("%d installs refused as busy, want 100", busy)
	}
	if left != 36 {
		t.Errorf("%d SAs after the removal, want 36 of 40", left)
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
}

func TestClose(t *testing.T) {
	f := &fakeTunnel{gate: make(chan struct{})}
	e := newTestEngine(f)
	results := make(chan string, 10)
	note := func(what string) func(error) {
		return func(err error) { results <- fmt.Sprint(what, " ", err) }
	}
	e.Install(params(1, 0), note("first"))
	e.Install(params(2, 0), note("second"))
	closed := make(chan error)
	go func() { closed <- errors.Join(e.Close(), e.Close()) }()
	close(f.gate)
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if f.closed != 1 {
		t.Errorf("tunnel closed %d times", f.closed)
	}
	// Depending on how far it was, the engine installed or refused them; either way it said so.
	for _, what := range []string{"first", "second"} {
		if got := <-results; got != what+" <nil>" && got != what+" "+ErrClosed.Error() {
			t.Errorf("callback: %s", got)
		}
	}
	for _, f := range []func(func(error)){
		func(done func(error)) { e.Install(params(3, 0), done) },
		func(done func(error)) { e.Remove(params(3, 0), done) },
		func(done func(error)) { e.Extend(params(3, 0), time.Hour, done) },
	} {
		if err := call(t, f); !errors.Is(err, ErrClosed) {
			t.Errorf("after Close: err = %v, want ErrClosed", err)
		}
	}
}

// What an expiry tells may use the backend again.
func TestExpiredInstallsAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeTunnel{}
		var e *engine
		e = newEngine(f, slog.New(slog.DiscardHandler), func(id uint64) {
			e.Install(params(id+1, 0), func(err error) {
				if err != nil {
					t.Error(err)
				}
			})
		})
		if err := install(t, e, params(1, time.Second)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if v, err := e.Survey(t.Context()); err != nil || len(v.Sets) != 1 || v.Sets[2] != (sa.Counters{}) {
			t.Errorf("survey: %+v, %v", v, err)
		}
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestInstallGoesOn(t *testing.T) {
	f := &fakeTunnel{}
	e := newTestEngine(f)
	defer func() { _ = e.Close() }()
	p := params(3, 0)
	p.Counters = sa.Counters{11, 12, math.MaxUint32 - 1, 14}
	if err := install(t, e, p); err != nil {
		t.Fatal(err)
	}
	for i, s := range f.sas {
		if s.Seq != p.Counters[i] || s.ID != 3 {
			t.Errorf("%s begins at %d, is of set %d", s, s.Seq, s.ID)
		}
	}
	for i := range p.Counters {
		full := params(4, 0)
		full.Counters[i] = math.MaxUint32
		if err := install(t, e, full); !errors.Is(err, sa.ErrSequence) {
			t.Errorf("SA %d has no number left: %v", i, err)
		}
	}
	if e.Count() != 4 {
		t.Errorf("Count = %d", e.Count())
	}
}

func TestAdopt(t *testing.T) {
	e := newTestEngine(&fakeTunnel{})
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := e.Adopt(gone, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("without time: %v", err)
	}
	// A removal is no installation.
	if err := remove(t, e, params(1, 0)); err != nil {
		t.Error(err)
	}
	a, err := e.Adopt(t.Context(), []sa.Params{params(1, time.Hour), params(2, 0)})
	if err != nil || len(a.Adopted) != 0 || a.Removed != 0 || len(a.Foreign) != 0 {
		t.Errorf("got %+v, %v", a, err)
	}
	if _, err := e.Adopt(t.Context(), nil); !errors.Is(err, ErrLate) {
		t.Errorf("twice: %v", err)
	}
	if err := install(t, e, params(1, 0)); err != nil { // was not adopted
		t.Error(err)
	}
	if err := e.Detach(); err != nil {
		t.Error(err)
	}
	if _, err := e.Adopt(t.Context(), nil); !errors.Is(err, ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
	late := newTestEngine(&fakeTunnel{})
	if err := install(t, late, params(1, 0)); err != nil {
		t.Error(err)
	}
	if _, err := late.Adopt(t.Context(), nil); !errors.Is(err, ErrLate) {
		t.Errorf("after an installation: %v", err)
	}
	if err := late.Close(); err != nil {
		t.Error(err)
	}
}

func TestSurvey(t *testing.T) {
	f := &fakeTunnel{}
	e := newTestEngine(f)
	survey := func(sets int, missing []uint64, orphans int) sa.Survey {
		t.Helper()
		v, err := e.Survey(t.Context())
		if err != nil || len(v.Sets) != sets || !slices.Equal(v.Missing, missing) || v.Orphans != orphans {
			t.Errorf("got %+v, %v; want %d sets, missing %v, %d orphans", v, err, sets, missing, orphans)
		}
		return v
	}
	survey(0, nil, 0)
	for id := uint64(1); id <= 5; id++ {
		p := params(id, 0)
		p.Counters = sa.Counters{1, 2, 3, uint32(id)}
		if err := install(t, e, p); err != nil {
			t.Fatal(err)
		}
	}
	f.sas[4].Seq = 77 // SA A of set 2 received something
	if v := survey(5, nil, 0); v.Sets[2] != (sa.Counters{77, 2, 3, 2}) || v.Sets[5] != (sa.Counters{1, 2, 3, 5}) {
		t.Errorf("counters: %v", v.Sets)
	}
	// SAs that go behind the backend's back.
	f.Remove(f.sas[6], f.sas[12])
	survey(3, []uint64{2, 4}, 0)
	// SAs that come so: of no set, of one with other SAs, and of one that was there once.
	stray := f.sas[0]
	stray.Src = netip.AddrPortFrom(stray.Src.Addr(), 9)
	nobody, once := stray, stray
	nobody.ID, nobody.SPI = 0, 1000
	once.ID, once.SPI = 99, 1001
	f.sas = append(f.sas, stray, nobody, once)
	survey(3, []uint64{2, 4}, 3)
	f.Remove(stray)
	if err := remove(t, e, params(2, 0)); err != nil {
		t.Fatal(err)
	}
	survey(3, []uint64{4}, 2)
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	if _, err := e.Survey(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// Sets that come and go while a survey is under way are no differences.
func TestSurveyMeanwhile(t *testing.T) {
	f := &fakeTunnel{}
	e := newTestEngine(f)
	var wg sync.WaitGroup
	for worker := range uint64(3) {
		wg.Go(func() {
			for i := range uint64(100) {
				p := params(1+worker*100+i%7, 0) // ids and SPIs come back
				if err := errors.Join(install(t, e, p), remove(t, e, p)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 100 {
		if v, err := e.Survey(t.Context()); err != nil || len(v.Missing) > 0 || v.Orphans != 0 {
			t.Errorf("got %+v, %v", v, err)
		}
	}
	wg.Wait()
	if err := e.Close(); err != nil {
		t.Error(err)
	}
}

// A survey does not wait longer than its context for an engine that is busy.
func TestSurveyEnds(t *testing.T) {
	f := &fakeTunnel{gate: make(chan struct{}), atGate: make(chan struct{}, 1)}
	e := newTestEngine(f)
	e.Install(params(1, 0), func(error) {})
	<-f.atGate
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := e.Survey(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	close(f.gate)
	if err := e.Close(); err != nil {
		t.Error(err)
	}
}
