package main

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gmgate/gmgate/dataplane/front"
)

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
