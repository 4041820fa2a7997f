package hostnet

import (
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// TestCurrentStays takes the first thread of the process into another namespace, where it stays for ever: the namespace of the
// process is still the one that it was.
func TestCurrentStays(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("REQUIRE_KERNEL_TESTS") == "1" {
			t.Fatal("network namespaces need root")
		}
		t.Skip("network namespaces need root")
	}
	home, err := Current()
	if err != nil {
		t.Fatal(err)
	}
	defer home.Close() //nolint:errcheck // a handle only
	other, err := Create()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close() //nolint:errcheck // a handle only
	same := func() {
		t.Helper()
		now, err := Current()
		if err != nil {
			t.Error(err)
			return
		}
		defer now.Close() //nolint:errcheck // a handle only
		if now.String() != home.String() {
			t.Errorf("the process is in %s, was in %s", now, home)
		}
	}
	// As many at a time as it takes until the first thread is among those that do it.
	const most = 64
	var first atomic.Bool
	for n := 1; n <= most && !first.Load(); n *= 2 {
		var inside, out sync.WaitGroup
		inside.Add(n)
		for range n {
			out.Go(func() {
				if err := other.Do(func() error {
					if unix.Gettid() == os.Getpid() {
						first.Store(true)
					}
					inside.Done()
					inside.Wait()
					return nil
				}); err != nil {
					t.Error(err)
				}
			})
		}
		out.Wait()
		same()
	}
	if !first.Load() {
		t.Logf("the first thread was busy with something else")
	}
	if err := other.Do(func() error { same(); return nil }); err != nil {
		t.Error(err)
	}
}
