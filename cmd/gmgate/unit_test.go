package main

import (
	"bufio"
	"os"
	"strings"
	"testing"
	"time"
)

// systemd kills what does not end in time, and a daemon that is killed loses what its store does not have yet: the unit leaves it
// as long as the parts of a stop may take one after the other.
func TestUnitWaitsForStop(t *testing.T) {
	f, err := os.Open("../../scripts/systemd/gmgate.service")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()               //nolint:errcheck // nothing was written
	const admin = 5 * time.Second // for requests under way
	needed := admin + stopTimeout + 2*flushTimeout
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if v, ok := strings.CutPrefix(lines.Text(), "TimeoutStopSec="); ok {
			if d, err := time.ParseDuration(v); err != nil || d <= needed {
				t.Errorf("TimeoutStopSec=%s, a stop may take %s", v, needed)
			}
			return
		}
	}
	t.Error("no TimeoutStopSec in the unit")
}
