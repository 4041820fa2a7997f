package admin

import (
	"context"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// fence is a Guard whose drops the test makes.
type fence struct {
	status GuardStatus
	drops  chan GuardDrop
	begun  chan struct{} // a follower has come
	left   chan struct{} // a follower has gone
	fail   chan error
}

func newFence() *fence {
	return &fence{
		drops: make(chan GuardDrop), begun: make(chan struct{}, 100), left: make(chan struct{}, 100), fail: make(chan error, 1),
	}
}

func (f *fence) Status() GuardStatus { return f.status }

func (f *fence) Follow(ctx context.Context, do func(GuardDrop)) error {
	f.begun <- struct{}{}
	defer func() { f.left <- struct{}{} }()
	for {
		select {
		case d := <-f.drops:
			do(d)
		case err := <-f.fail:
			return err
		case <-ctx.Done():
			return nil
		}
	}
}

func guarded(g Guard) func(*Server) { return func(s *Server) { s.cfg.Guard = g } }

func dropOf(n int) GuardDrop {
	return GuardDrop{
		Time: at.Add(time.Duration(n) * time.Second), Reason: "unknown_spi", Interface: "eth0", Source: "10.45.0.9",
		Destination: "10.0.0.5", Protocol: "esp", SPI: uint32(4294967295 - n), Length: 152,
	}
}

// The JSON is the contract.
func TestGuardOnTheWire(t *testing.T) {
	f := newFence()
	b := newBed(t, 0, guarded(f))
	if status, got := b.raw(t, "GET", "/v1/guard", ""); status != 200 || got != `{"mode":"","reason":"","pinned":"",`+
		`"interfaces":[],"maps":[],"verdicts":[],"ring":{"first_uses":0,"samples":0,"lost":0}}`+"\n" {
		t.Errorf("empty: %d %s", status, got)
	}
	f.status = GuardStatus{
		Mode: "xdp", Reason: "the driver can do it", Pinned: "/sys/fs/bpf/gmgate/edge1",
		Interfaces: []GuardInterface{{Name: "eth0", Hook: "xdp-generic", Attached: true, Detail: "no native mode"}},
		Maps:       []GuardMap{{Name: "spis", Entries: 4, Capacity: 65536}},
		Verdicts:   []GuardVerdict{{Verdict: "drop", Reason: "unknown_spi", Packets: 7, Bytes: 1064}},
		Ring:       GuardRing{FirstUses: 1, Samples: 2, Lost: 3},
	}
	want := `{"mode":"xdp","reason":"the driver can do it","pinned":"/sys/fs/bpf/gmgate/edge1",` +
		`"interfaces":[{"name":"eth0","hook":"xdp-generic","attached":true,"detail":"no native mode"}],` +
		`"maps":[{"name":"spis","entries":4,"capacity":65536}],` +
		`"verdicts":[{"verdict":"drop","reason":"unknown_spi","packets":7,"bytes":1064}],` +
		`"ring":{"first_uses":1,"samples":2,"lost":3}}` + "\n"
	if status, got := b.raw(t, "GET", "/v1/guard", ""); status != 200 || got != want {
		t.Errorf("%d\n got %s\nwant %s", status, got, want)
	}
	if st, err := b.client.Guard(t.Context()); err != nil || st.Ring != f.status.Ring || len(st.Verdicts) != 1 {
		t.Errorf("%+v, %v", st, err)
	}
}

func TestNoGuard(t *testing.T) {
	b := newBed(t, 0)
	_, err := b.client.Guard(t.Context())
	for _, err := range []error{err, b.client.Drops(t.Context(), func(GuardDrop) bool { return true })} {
		if e, ok := errors.AsType[*Error](err); !ok || e.Status != 404 || e.Hint == "" {
			t.Errorf("%v", err)
		}
	}
}

// A follower gets what is dropped as it happens, however long nothing is, and the guard hears when it leaves.
func TestDrops(t *testing.T) {
	f := newFence()
	b := newBed(t, 0, guarded(f), func(s *Server) { s.writeTimeout = time.Millisecond })
	got := make(chan GuardDrop)
	ended := make(chan error, 1)
	go func() {
		n := 0
		ended <- b.client.Drops(t.Context(), func(d GuardDrop) bool { got <- d; n++; return n < 3 })
	}()
	<-f.begun
	for n := range 3 {
		time.Sleep(20 * time.Millisecond) // long over the limit of other requests
		select {
		case f.drops <- dropOf(n):
		case err := <-ended:
			t.Fatalf("ended before drop %d: %v", n, err)
		}
		select {
		case d := <-got:
			if d != dropOf(n) {
				t.Errorf("drop %d: %+v, want %+v", n, d, dropOf(n))
			}
		case err := <-ended:
			t.Fatalf("ended at drop %d: %v", n, err)
		}
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	<-f.left

	ctx, cancel := context.WithCancel(t.Context())
	go func() { ended <- b.client.Drops(ctx, func(GuardDrop) bool { return true }) }()
	<-f.begun
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("interrupted: %v", err)
	}
	<-f.left
	if err := b.client.Drops(ctx, func(GuardDrop) bool { return true }); err != nil {
		t.Errorf("interrupted before the beginning: %v", err)
	}
}

func TestDropsOnTheWire(t *testing.T) {
	f := newFence()
	b := newBed(t, 0, guarded(f))
	resp, err := b.client.http.Get("http://x/v1/drops")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // read only
	if got := resp.Header.Get("Content-Type"); resp.StatusCode != http.StatusOK || got != "application/x-ndjson" {
		t.Errorf("%s, %s", resp.Status, got)
	}
	f.drops <- dropOf(0)
	f.drops <- GuardDrop{Time: at, Reason: "register_rate", Interface: "eth0", Source: "[2001:db8::1]:5060", Destination: "[2001:db8::5]:5060", Protocol: "udp", Length: 900}
	f.fail <- errors.New("ring is closed")
	got, err := io.ReadAll(resp.Body)
	want := `{"time":"2026-01-01T12:00:00Z","reason":"unknown_spi","interface":"eth0","src":"10.45.0.9","dst":"10.0.0.5",` +
		`"protocol":"esp","spi":4294967295,"length":152}` + "\n" +
		`{"time":"2026-01-01T12:00:00Z","reason":"register_rate","interface":"eth0","src":"[2001:db8::1]:5060","dst":"[2001:db8::5]:5060",` +
		`"protocol":"udp","length":900}` + "\n" +
		`{"error":"the guard has ended: ring is closed"}` + "\n"
	if err != nil || string(got) != want {
		t.Errorf("%v\n got %s\nwant %s", err, got, want)
	}

	f.fail <- errors.New("ring is closed")
	err = b.client.Drops(t.Context(), func(GuardDrop) bool { return true })
	if e, ok := errors.AsType[*Error](err); !ok || e.Text != "the guard has ended: ring is closed" {
		t.Errorf("%v", err)
	}
}

// Followers take no place of those who ask, and there are only so many of them.
func TestTooManyFollowers(t *testing.T) {
	f := newFence()
	b := newBed(t, 0, guarded(f))
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range maxFollowers {
		wg.Go(func() {
			if err := b.client.Drops(ctx, func(GuardDrop) bool { return true }); err != nil {
				t.Error(err)
			}
		})
		<-f.begun
	}
	err := b.client.Drops(t.Context(), func(GuardDrop) bool { return true })
	if e, ok := errors.AsType[*Error](err); !ok || e.Status != 503 || e.Hint == "" {
		t.Errorf("the one too many: %v", err)
	}
	for range maxParallel {
		if _, err := b.client.Status(t.Context()); err != nil {
			t.Error(err)
		}
	}
	cancel()
	wg.Wait()
	for range maxFollowers {
		<-f.left
	}
}

// The end of the server ends those who follow, and tells them.
func TestStopEndsFollowers(t *testing.T) {
	f := newFence()
	b := newBed(t, 0, guarded(f))
	ended := make(chan error, 1)
	go func() { ended <- b.client.Drops(t.Context(), func(GuardDrop) bool { return true }) }()
	<-f.begun
	b.stop()
	<-f.left
	if e, ok := errors.AsType[*Error](<-ended); !ok || !strings.Contains(e.Text, "no longer tells") || e.cause != nil {
		t.Errorf("%v", e)
	}
}

// flood is a Guard that drops more than its slow follower reads.
type flood struct {
	fence
	slow, drained chan struct{}
	more          int
}

func (f *flood) Follow(_ context.Context, do func(GuardDrop)) error {
	do(dropOf(0))
	<-f.slow // the follower is busy with it
	for n := range waitingDrops + f.more {
		do(dropOf(n + 1))
	}
	f.slow <- struct{}{}
	<-f.drained
	do(dropOf(-1))
	return nil
}

// A slow follower does not hold up the guard, and is told how much it has missed.
func TestSlowFollower(t *testing.T) {
	f := &flood{slow: make(chan struct{}), drained: make(chan struct{}), more: 10}
	s := NewServer(Config{Guard: f})
	var got []GuardDrop
	if err := s.follow(t.Context(), func(v any) error {
		d, ok := v.(GuardDrop)
		if !ok {
			return nil
		}
		if got = append(got, d); len(got) == 1 {
			f.slow <- struct{}{}
			<-f.slow
		}
		if len(got) == 1+waitingDrops {
			close(f.drained)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	lost := uint64(0)
	for _, d := range got {
		lost += d.Lost
	}
	if len(got) != waitingDrops+2 || lost != uint64(f.more) {
		t.Errorf("%d samples came, %d are said to be lost, want %d and %d", len(got), lost, waitingDrops+2, f.more)
	}
	if !slices.IsSortedFunc(got[:len(got)-1], func(a, b GuardDrop) int { return a.Time.Compare(b.Time) }) {
		t.Error("not in their order")
	}
}

// What is wrong with a write ends the following.
func TestFollowerGone(t *testing.T) {
	f := newFence()
	s := NewServer(Config{Guard: f})
	broken := errors.New("broken")
	if err := s.follow(t.Context(), func(any) error { return broken }); !errors.Is(err, broken) {
		t.Error(err)
	}
	<-f.left
}
