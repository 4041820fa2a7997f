// Package contention finds out from the runtime's profiles where code of gmgate had to wait for a lock, for tests that show
// that messages of one UE wait for nobody.
package contention

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
)

const (
	module = "github.com/gmgate/gmgate/"
	loop   = module + "dataplane/front.(*events)."
)

// Watch runs f and returns the stacks, from the inside out, of waiting for a lock of package sync that code of control or
// dataplane was in, and those in which an event loop of the front waited for anything at all. Locks of the runtime itself
// (the scheduler's, the heap's) do not count, nor does code of tests. The profiles are of the whole process: one Watch at
// a time.
func Watch(f func()) (locks, waits []string) {
	mutexes, blocks := read(runtime.MutexProfile), read(runtime.BlockProfile)
	old := runtime.SetMutexProfileFraction(1)
	runtime.SetBlockProfileRate(1)
	f()
	runtime.SetMutexProfileFraction(old)
	runtime.SetBlockProfileRate(0)
	return read(runtime.MutexProfile).since(mutexes, locked), read(runtime.BlockProfile).since(blocks, waiting)
}

func locked(stack string) bool {
	_, callers, ok := strings.Cut(stack, "sync.(*")
	return ok && slices.ContainsFunc(strings.Split(callers, "\n"), func(line string) bool {
		ours := strings.HasPrefix(line, module+"control/") || strings.HasPrefix(line, module+"dataplane/")
		return ours && !strings.Contains(line, "_test.go:")
	})
}

func waiting(stack string) bool { return strings.Contains(stack, loop) }

// profile counts what a profile of the runtime has, by stack.
type profile map[string]int64

func read(records func([]runtime.BlockProfileRecord) (int, bool)) profile {
	n, _ := records(nil)
	for {
		all := make([]runtime.BlockProfileRecord, n+100) // it grows meanwhile
		var ok bool
		if n, ok = records(all); !ok {
			continue
		}
		p := make(profile)
		for _, r := range all[:n] {
			var b strings.Builder
			for frames := runtime.CallersFrames(r.Stack()); ; {
				f, more := frames.Next()
				fmt.Fprintf(&b, "%s %s:%d\n", f.Function, f.File, f.Line)
				if !more {
					break
				}
			}
			p[b.String()] += r.Count
		}
		return p
	}
}

// since returns the stacks that have come or happened again since before, and that match.
func (p profile) since(before profile, match func(string) bool) (stacks []string) {
	for stack, n := range p {
		// A pool of package sync takes a lock once for each garbage collection.
		if n > before[stack] && match(stack) && !strings.Contains(stack, "sync.(*Pool).pinSlow") {
			stacks = append(stacks, stack)
		}
	}
	return stacks
}
