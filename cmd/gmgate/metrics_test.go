package main

import (
	"errors"
	"io"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/dataplane/front"
)

// A counter of the kernel's that cannot be read for once does not fall.
func TestXFRMCounters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		value, broken := uint64(7), error(nil)
		m, reg := observe.New(1), prometheus.NewRegistry()
		observeXFRM(m, func() (map[string]uint64, error) { return map[string]uint64{"XfrmInNoStates": value}, broken })
		if err := m.Register(reg); err != nil {
			t.Fatal(err)
		}
		read := func() float64 {
			time.Sleep(2 * statsAge)
			families, err := reg.Gather()
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range families {
				if f.GetName() == "gmgate_xfrm_errors_total" {
					return f.GetMetric()[0].GetCounter().GetValue()
				}
			}
			return -1
		}
		if v := read(); v != 7 {
			t.Errorf("%g, want 7", v)
		}
		value, broken = 9, errors.New("too many open files")
		if v := read(); v != 7 {
			t.Errorf("%g while it cannot be read, want 7", v)
		}
		broken = nil
		if v := read(); v != 9 {
			t.Errorf("%g, want 9", v)
		}
	})
}

// Whoever asks and does not read the answer is let go.
func TestReaderThatHangs(t *testing.T) {
	ended := make(chan error, 1)
	endless := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		block := make([]byte, 1<<20)
		for {
			if _, err := w.Write(block); err != nil {
				ended <- err
				return
			}
		}
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := metricsServer(endless, 100*time.Millisecond)
	go func() { _ = srv.Serve(l) }()
	defer srv.Close() //nolint:errcheck // it is over anyway
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close() //nolint:errcheck // it is over anyway
	if _, err := io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: gmgate\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("the answer still waits for its reader")
	}
}

// TestFrontStats: the readers of a scrape share one look at the counters, those of the next one have theirs.
func TestFrontStats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var calls uint64
		c := &cached[front.Stats]{age: statsAge, get: func() (front.Stats, error) {
			calls++
			time.Sleep(time.Second) // a worker is stuck
			if calls == 4 {
				return front.Stats{}, errors.New("nobody answers")
			}
			return front.Stats{Wakeups: calls}, nil
		}}
		for scrape := range uint64(3) {
			for range 50 {
				if got := c.now().Wakeups; got != scrape+1 {
					t.Errorf("scrape %d: look %d", scrape+1, got)
				}
			}
			time.Sleep(statsAge)
		}
		if calls != 3 {
			t.Errorf("%d looks for 3 scrapes", calls)
		}
		if got := c.now().Wakeups; got != 3 { // what cannot be read stays as it was
			t.Errorf("look %d after a failure, want the one before", got)
		}
	})
}
