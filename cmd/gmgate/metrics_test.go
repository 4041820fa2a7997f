package main

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/gmgate/gmgate/dataplane/front"
)

// TestFrontStats: the readers of a scrape share one look at the counters, those of the next one have theirs.
func TestFrontStats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var calls uint64
		c := &frontStats{get: func() front.Stats {
			calls++
			time.Sleep(time.Second) // a worker is stuck
			return front.Stats{Wakeups: calls}
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
	})
}
