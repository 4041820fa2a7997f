package guard

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/bpf"
	"github.com/gmgate/gmgate/control/ims"
)

// defaultExceptions is how many flows or addresses may have another worker than that of the hash.
const defaultExceptions = 1 << 16

// Flow is what has a worker of its own by the affinity map: packets from Source to the port DestinationPort of ours. Port
// 0 stands for all ports; an address without ports is what Steering.Move moves.
type Flow struct {
	Source          netip.AddrPort
	DestinationPort uint16
}

// Steering sends what comes from a phone to the socket of the worker that owns it. It implements front.Steering. All
// methods may be called from any goroutine.
type Steering struct {
	objs    bpf.SteerObjects
	workers int

	mu     sync.Mutex
	groups map[bpf.SteerGroupKey]uint32
	limit  int // of groups
	exempt map[bpf.SteerFlow]int
}

// OpenSteering loads the program for a number of workers and of groups: listeners, UDP and TCP apart. The error matches
// ErrUnavailable when the kernel or the process's capabilities do not allow eBPF.
func OpenSteering(workers, groups int) (*Steering, error) {
	if workers < 1 || groups < 1 {
		return nil, fmt.Errorf("open steering: %d workers and %d groups", workers, groups)
	}
	_ = rlimit.RemoveMemlock()
	spec, err := bpf.LoadSteer()
	if err != nil {
		return nil, fmt.Errorf("open steering: %w", err)
	}
	spec.Maps[bpf.SteerMapAffinity].MaxEntries = defaultExceptions
	spec.Maps[bpf.SteerMapGroups].MaxEntries = uint32(groups)                        //nolint:gosec // listeners are few
	spec.Maps[bpf.SteerMapSockets].MaxEntries = uint32(groups * workers)             //nolint:gosec // at most 256 workers
	if err := spec.Variables[bpf.SteerVarWorkers].Set(uint32(workers)); err != nil { //nolint:gosec // at most 256
		return nil, fmt.Errorf("open steering: %w", err)
	}
	s := &Steering{
		workers: workers, limit: groups, groups: make(map[bpf.SteerGroupKey]uint32), exempt: make(map[bpf.SteerFlow]int),
	}
	if err := spec.LoadAndAssign(&s.objs, nil); err != nil {
		return nil, fmt.Errorf("open steering: %w", classify(err))
	}
	return s, nil
}

// Attach steers a reuseport group: fds[k] is worker k's socket, bound (UDP) or listening (TCP), all of them at local. A
// socket leaves the group when it is closed; the kernel chooses while it has none. Attaching the same group again, after
// its sockets were made anew, replaces it.
func (s *Steering) Attach(local netip.AddrPort, t ims.Transport, fds []int) error {
	if err := s.attach(local, t, fds); err != nil {
		return fmt.Errorf("steer %s/%s: %w", local, t, err)
	}
	return nil
}

func (s *Steering) attach(local netip.AddrPort, t ims.Transport, fds []int) error {
	if len(fds) != s.workers {
		return fmt.Errorf("%d sockets for %d workers", len(fds), s.workers)
	}
	key := bpf.SteerGroupKey{Port: local.Port(), Protocol: unix.IPPROTO_UDP}
	if t == ims.TCP {
		key.Protocol = unix.IPPROTO_TCP
	}
	key.Local.Word = words(local.Addr())
	s.mu.Lock()
	defer s.mu.Unlock()
	number, known := s.groups[key]
	if !known {
		if len(s.groups) == s.limit {
			return fmt.Errorf("there are %d groups already", s.limit)
		}
		number = uint32(len(s.groups)) //nolint:gosec // bounded by limit
	}
	for k, fd := range fds {
		if err := s.put(number*uint32(s.workers)+uint32(k), fd); err != nil { //nolint:gosec // small
			return fmt.Errorf("socket of worker %d: %w", k, err)
		}
	}
	if !known {
		if err := s.objs.Groups.Put(key, number); err != nil {
			return err
		}
		s.groups[key] = number
	}
	return os.NewSyscallError("setsockopt",
		unix.SetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_EBPF, s.objs.Steer.FD()))
}

// put makes a socket the one of a place. The kernel refuses one that has it already.
func (s *Steering) put(place uint32, fd int) error {
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	var there uint64
	if err := s.objs.Sockets.Lookup(place, &there); err == nil && there == cookie {
		return nil
	}
	return s.objs.Sockets.Put(place, uint64(fd)) //nolint:gosec // a descriptor
}

// Move makes new packets from an address go to a worker; a negative one gives the address back to the hash. Connections
// that are accepted stay where they are, and so do datagrams that wait at a socket.
func (s *Steering) Move(addr netip.Addr, worker int) error {
	return s.MoveFlow(Flow{Source: netip.AddrPortFrom(addr, 0)}, worker)
}

// MoveFlow is Move for one flow, which then differs from others of its address.
func (s *Steering) MoveFlow(f Flow, worker int) error {
	if err := s.move(f, worker); err != nil {
		return fmt.Errorf("steer %s to worker %d: %w", f.Source, worker, err)
	}
	return nil
}

func (s *Steering) move(f Flow, worker int) error {
	if worker >= s.workers || !f.Source.IsValid() {
		return errors.New("there is no such worker or address")
	}
	key := bpf.SteerFlow{SourcePort: f.Source.Port(), DestinationPort: f.DestinationPort}
	key.Source.Word = words(f.Source.Addr())
	s.mu.Lock()
	defer s.mu.Unlock()
	if worker < 0 {
		if _, ok := s.exempt[key]; !ok {
			return nil
		}
		if err := s.objs.Affinity.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
		delete(s.exempt, key)
		return s.announce()
	}
	if err := s.objs.Affinity.Put(key, uint32(worker)); err != nil { //nolint:gosec // checked
		return err
	}
	s.exempt[key] = worker
	return s.announce()
}

// announce tells the program whether it has to look for exceptions.
func (s *Steering) announce() error { return s.objs.Exceptions.Set(uint32(len(s.exempt))) } //nolint:gosec // bounded by the map

// SteerStats counts the packets that were steered, one for each TCP connection.
type SteerStats struct {
	Affinity uint64 // by the affinity map
	Hash     uint64 // by the address
	Kernel   uint64 // left to the kernel: the worker had no socket

	Exceptions, Capacity int // entries of the affinity map
}

// Stats reads the counters.
func (s *Steering) Stats() (SteerStats, error) {
	var st SteerStats
	s.mu.Lock()
	st.Exceptions, st.Capacity = len(s.exempt), defaultExceptions
	s.mu.Unlock()
	var errs []error
	for r, n := range map[bpf.SteerResult]*uint64{
		bpf.SteerResultSTEER_AFFINITY: &st.Affinity, bpf.SteerResultSTEER_HASH: &st.Hash, bpf.SteerResultSTEER_KERNEL: &st.Kernel,
	} {
		var lanes []uint64
		if err := s.objs.Results.Lookup(uint32(r), &lanes); err != nil {
			errs = append(errs, err)
			continue
		}
		for _, v := range lanes {
			*n += v
		}
	}
	return st, errors.Join(errs...)
}

// Close frees the program. Groups to which it is attached keep it until their sockets are closed.
func (s *Steering) Close() error { return s.objs.Close() }
