package bolt

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/store"
	"github.com/gmgate/gmgate/control/store/storetest"
)

// childEnv tells the test program to write to the store at this path until it is killed.
const childEnv = "GMGATE_TEST_STORE_CHILD"

// Every batch of the child has this many sets and as many registrations, and bears one number in all of them.
const crashWidth = 40

// child applies batches, the numbers of which it prints when they are applied. Every third one goes through a Writer
// and is flushed.
func child(path string) int {
	fail := func(err error) int {
		_, _ = fmt.Fprintln(os.Stderr, err)
		return 1
	}
	ctx := context.Background()
	d, err := Open(ctx, path, OpenOptions{Key: key})
	if err != nil {
		return fail(err)
	}
	n, err := store.Read(ctx, d)
	if err != nil {
		return fail(err)
	}
	round := uint64(0)
	if len(n.Sets) > 0 {
		round = n.Sets[0].Over
	}
	w := store.NewWriter(store.WriterConfig{Store: d, Interval: time.Hour, MaxBatch: 3 * crashWidth}) // a round is one batch
	for {
		round++
		var b store.Batch
		for i := range uint64(crashWidth) {
			// The older half is deleted in the same batch that puts the newer one under ids of its own.
			s, r := storetest.Set(round%2<<32|(i+1)), storetest.Registration(uint32(i)+1)
			s.Over, r.Current = round, round
			b.Sets, b.Registrations = append(b.Sets, s), append(b.Registrations, r)
			b.DeleteSets = append(b.DeleteSets, (round+1)%2<<32|(i+1))
		}
		if round%3 > 0 {
			err = d.Apply(ctx, b)
		} else {
			for i := range b.Sets {
				err = errors.Join(err, w.PutSet(&b.Sets[i]), w.PutRegistration(&b.Registrations[i]), w.DeleteSet(b.DeleteSets[i]))
			}
			err = errors.Join(err, w.Flush(ctx))
		}
		if err != nil {
			return fail(err)
		}
		if _, err := fmt.Println(round); err != nil {
			return 0
		}
	}
}

// What was applied is there after kill -9, and every batch is there as a whole or not at all.
func TestKill(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	path := filepath.Join(t.TempDir(), "store")
	var applied uint64
	for kill := range 10 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+path)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		before := applied
		lines := bufio.NewScanner(out)
		for n := 0; n < 5+kill*2 && lines.Scan(); n++ {
			if _, err := fmt.Sscan(lines.Text(), &applied); err != nil {
				t.Error(err)
			}
		}
		// The child is anywhere within the next batches now.
		<-time.After(time.Duration(kill) * 700 * time.Microsecond)
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		for lines.Scan() {
			if _, err := fmt.Sscan(lines.Text(), &applied); err != nil && len(lines.Text()) > 0 {
				t.Error(err)
			}
		}
		_ = cmd.Wait() // killed
		if applied == before {
			t.Fatalf("the child wrote nothing: %s", &stderr)
		}
		d := openOrFail(t, path)
		n, err := store.Read(t.Context(), d)
		if err != nil || len(n.Faults) > 0 || len(n.Sets) == 0 {
			t.Fatalf("after kill %d: %d sets, %v, %v", kill, len(n.Sets), n.Faults, err)
		}
		closeOrFail(t, d)
		round := n.Sets[0].Over
		for _, s := range n.Sets {
			if s.Over != round {
				t.Errorf("sets of batches %d and %d", s.Over, round)
			}
		}
		for _, r := range n.Registrations {
			if r.Current != round {
				t.Errorf("a set of batch %d and a registration of %d", round, r.Current)
			}
		}
		if len(n.Sets) != crashWidth || len(n.Registrations) != crashWidth {
			t.Errorf("%d sets and %d registrations", len(n.Sets), len(n.Registrations))
		}
		if round < applied {
			t.Errorf("batch %d was applied, %d is there", applied, round)
		}
	}
}
