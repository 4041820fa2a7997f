package front

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
)

// maxPosts bounds the functions posted to a worker and not run yet.
const maxPosts = 1 << 16

// maxPooled is the largest message buffer that goes back to the pool.
const maxPooled = 16 << 10

// task is something that another goroutine wants done on a loop: a function, or a message handed over.
type task struct {
	run  func() // nil for a message
	flow ims.Flow
	msg  *buffer
}

// buffer carries a message between workers.
type buffer struct{ b []byte }

var buffers = sync.Pool{New: func() any { return new(buffer) }}

func copyToBuffer(msg []byte) *buffer {
	p := buffers.Get().(*buffer) //nolint:forcetypeassert,errcheck // the pool holds nothing else
	p.b = append(p.b[:0], msg...)
	return p
}

func (p *buffer) release() {
	if cap(p.b) <= maxPooled {
		buffers.Put(p)
	}
}

// inbox is the queue of tasks for one loop, many producers and one consumer, in order. Its doorbell is one end of a
// socket pair whose other end the loop watches; as a rule at most one datagram is outstanding. Not for the message hot
// path: a push costs a lock, and a wake-up one write. Nobody rings with mu held, since the loop wakes up and wants it; and
// where there are no tasks, at every tick that is, the loop does not want it.
type inbox struct {
	limit int
	rung  atomic.Bool
	tick  atomic.Bool // a tick is due
	tell  atomic.Bool // something has changed below since the consumer looked

	mu      sync.Mutex
	tasks   []task
	spare   []task // the consumer's previous batch, empty tasks
	hands   int    // messages among tasks
	dropped uint64 // messages refused because there were too many
	stop    bool   // the loop shall end
	closed  bool   // nothing more is accepted but results
	over    bool   // the loop has ended

	using sync.RWMutex // of the descriptor: read to ring, written to close
	bell  int          // descriptor to ring
	shut  bool         // it is gone
}

// push appends a task. must is for results of which somebody waits; they are bounded by what caused them, and still
// taken while the loop ends.
func (q *inbox) push(t task, must bool) error {
	if err := q.add(t, must); err != nil {
		return err
	}
	q.ring()
	return nil
}

func (q *inbox) add(t task, must bool) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.over || (q.closed && !must) {
		return ErrClosed
	}
	if t.run == nil {
		if q.hands >= q.limit {
			q.dropped++
			return ErrBusy
		}
		q.hands++
	} else if !must && len(q.tasks)-q.hands >= maxPosts {
		return ErrBusy
	}
	q.tasks = append(q.tasks, t)
	q.tell.Store(true)
	return nil
}

// markTick makes a tick due. It rings even if one is due already: an earlier ring may have failed.
func (q *inbox) markTick() {
	q.tick.Store(true)
	q.ring()
}

// finish refuses further tasks and makes the loop end after those that are queued.
func (q *inbox) finish() {
	q.mu.Lock()
	q.closed, q.stop = true, true
	q.tell.Store(true)
	q.mu.Unlock()
	q.ring()
}

// ring wakes the loop up to look at what was put here before.
func (q *inbox) ring() {
	if q.rung.Load() || q.rung.Swap(true) {
		return // the loop takes that back before it looks
	}
	q.using.RLock()
	defer q.using.RUnlock()
	if q.shut {
		return
	}
	// A full socket buffer means that a ring is outstanding. After any other error, lack of memory say, the next caller
	// rings, which is the ticker at the latest.
	if _, err := unix.Write(q.bell, []byte{0}); err != nil && !errors.Is(err, unix.EAGAIN) {
		q.rung.Store(false)
	}
}

// take returns what is to be done. The tasks are valid until the next call, before which the loop has to clear them.
func (q *inbox) take() (tasks []task, tick, stop bool) {
	q.rung.Store(false)
	tick = q.tick.Swap(false)
	if !q.tell.Swap(false) {
		return nil, tick, false
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	tasks, stop = q.tasks, q.stop
	q.tasks, q.spare = q.spare[:0], tasks
	q.hands = 0
	return tasks, tick, stop
}

func (q *inbox) drops() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.dropped
}

// close gives the doorbell's descriptor back. The loop has ended.
func (q *inbox) close() {
	q.mu.Lock()
	q.closed, q.over = true, true
	q.mu.Unlock()
	q.using.Lock()
	defer q.using.Unlock()
	if !q.shut {
		q.shut = true
		_ = unix.Close(q.bell)
	}
}

// newDoorbell returns a socket pair: ring is written by producers, watch is read by the loop.
func newDoorbell() (ring, watch int, err error) {
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, -1, fmt.Errorf("open doorbell: %w", os.NewSyscallError("socketpair", err))
	}
	return p[0], p[1], nil
}
