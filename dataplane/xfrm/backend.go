package xfrm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink/nl"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// Defaults and limits of Config.
const (
	// DefaultReqID is "gm"; below 0x4000 the kernel's own key daemon interface hands out numbers.
	DefaultReqID = 0x67_6d
	// DefaultWindow is the replay window of inbound SAs. Several CPUs sending on one SA reorder by more than 32.
	DefaultWindow = 256
	// DefaultQueue is the number of requests that may wait for the worker.
	DefaultQueue = 8192

	maxSets = maxBatch / 4 // SA sets in one system call
)

// blockAfterClose is how long the protected ports stay blocked after Close. A closed TCP connection with unsent data
// goes on in the kernel without its process, and would send that data in clear once no policy says otherwise. By default
// Linux gives up such an orphan after 8 retries: at most about 100 s after the first retransmission, 190 s when the
// peer's window is closed and the round trip slow. A larger net.ipv4.tcp_orphan_retries than the default outlives this.
const blockAfterClose = 200 * time.Second

// The constant policies end by themselves as well, so that a host whose gmgate is gone for good is clean in the end. They
// have to outlive every state, and are renewed while the process lives: rarely, since a renewal makes the kernel look up
// the route of every connection anew. The longest registration of TS 24.229 §5.1.1.2 is 600,000 s.
const (
	policyLife    = 10 * 24 * time.Hour
	policyRenewal = 24 * time.Hour
	renewalRetry  = time.Hour
	longestLife   = policyLife - policyRenewal - time.Hour // of a state
)

// Errors of New and of the requests, beside those of the kernel (see KernelError).
var (
	// ErrInUse is the error of New when another Backend, of this or another process, has the namespace and reqid.
	ErrInUse = errors.New("another gmgate uses this namespace")

	ErrClosed    = errors.New("XFRM backend is closed")
	ErrBusy      = errors.New("too many SA requests are waiting")
	ErrDuplicate = errors.New("SA set is already installed")
	ErrUnknown   = errors.New("SA set is not installed")
	ErrParams    = errors.New("SA set does not fit the configuration")
)

// Config describes a Backend.
type Config struct {
	NS          *hostnet.NS  // namespace of the Gm addresses, open until Close; nil is the process's
	Local       []netip.Addr // our Gm addresses
	ServerPorts []uint16     // every port-ps
	ClientPorts []uint16     // every port-pc
	ReqID       int          // marks our states and templates; 0 means DefaultReqID
	Window      int          // replay window in packets, at most 4096; 0 means DefaultWindow
	Queue       int          // requests that may wait; 0 means DefaultQueue
	Logger      *slog.Logger // nil discards

	// Expired, if not nil, is told of an installed set of which the kernel removed an SA because its hard limit had
	// passed, once for each set. The set counts as installed until Remove, which takes out what is left of it. Expired
	// is called on a goroutine of the backend and must call neither Close nor Detach.
	Expired func(id uint64)

	// Tests have no time for the real ones; 0 means these.
	block, life, renewal time.Duration
}

// Backend installs SA sets into the kernel. Create one with New.
type Backend struct {
	cfg     Config
	reqid   uint32
	window  int
	log     *slog.Logger
	support Support
	host    host
	lock    io.Closer // keeps other backends out of the namespace

	policies []policy // the constant ones; not changed after New

	installed atomic.Int64 // SAs
	wake      chan struct{}
	closing   chan struct{} // closed by Close and Detach
	stopped   chan struct{} // closed when the worker has ended
	suspicion chan struct{} // one of our policies may be gone or changed
	restored  atomic.Uint64 // policies

	mu      sync.Mutex // guards the queue
	queue   []request
	waiting int           // requests in queue and pending
	refused []func(error) // callbacks of requests that found the queue full
	closed  bool
	keep    bool // Detach: the removals that wait are still carried out

	// Each event group has a socket and a goroutine, so that a change of policies never waits behind Config.Expired.
	expiries, changes monitor

	watchers sync.WaitGroup // the readers of the monitors, and the guard
	overruns atomic.Uint64
	ports    []uint32 // of conn and query: by these the kernel says that a change is ours

	extraMu sync.Mutex // one Adopt or Survey at a time, each with a socket of its own; the end waits for it

	queryMu sync.Mutex // guards query
	query   *conn      // counts and the guard's; a socket of its own, so that neither waits for the worker

	// books guards what is known to be in the kernel. The worker holds it while it executes a batch, so that the books
	// and the kernel agree whenever it is free. It is taken before queryMu.
	books  sync.Mutex
	sets   map[uint64]set
	owners map[stateKey]owner // the SAs of sets
	flux   *flux              // not nil during a Survey

	// The following belong to the worker; Close uses them once it has ended.
	conn    *conn
	pending []request // taken from queue, not yet executed
}

var _ sa.Backend = (*Backend)(nil)

// set is what the backend keeps of an installed SA set.
type set struct {
	added   int64 // wall-clock seconds, as the kernel counts the age of a state
	suite   ims.Suite
	expired bool // Config.Expired has been told
}

// owner says whose SA a state is. A phone may offer an SPI again once the kernel has ended the SA that had it, while the
// old set still waits for its Remove: the state then belongs to the new one.
type owner struct {
	id uint64
	sa uint8 // index in Params.SAs
}

// op is the kind of a request.
type op uint8

const (
	opInstall op = iota + 1
	opRemove
	opExtend
)

// request is one call of the Installer interface on its way through the worker.
type request struct {
	op   op
	p    sa.Params
	hard time.Duration // opExtend
	done func(error)

	first, count int     // its messages in the batch
	sas          []uint8 // opRemove: the SAs they are about
	err          error
}

// New locks the namespace, probes the kernel, and puts the constant policies in place: from now on nothing passes a
// protected port in clear. SAs that an earlier run left stay and go on working, for Adopt to decide about; if it is never
// called they go with Close. If another Backend is there the error wraps ErrInUse,
// and if the kernel cannot do it ErrNoXFRM, ErrNoESP, ErrNoAlgorithm or ErrPermission; the kernel is then as it was. Only
// a failure among the policies themselves leaves what Close leaves.
func New(cfg Config) (*Backend, error) { return newBackend(cfg, namespace{cfg.NS}) }

// host is where a Backend works; tests put a kernel of their own behind it.
type host interface {
	lock(reqid int) (io.Closer, error)
	open() (socket, error)
	monitor(group int) (monitor, error)
}

// namespace is a network namespace of the real kernel, the process's if ns is nil.
type namespace struct{ ns *hostnet.NS }

func (n namespace) open() (socket, error)              { return openSocket(n.ns) }
func (n namespace) monitor(group int) (monitor, error) { return openMonitor(n.ns, group) }
func (n namespace) lock(reqid int) (io.Closer, error)  { return openLock(n.ns, reqid) }

func newBackend(cfg Config, h host) (*Backend, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	b := &Backend{
		cfg: cfg, reqid: uint32(cfg.ReqID), window: cfg.Window, log: cfg.Logger, //nolint:gosec // checked by complete
		host: h, wake: make(chan struct{}, 1), closing: make(chan struct{}), stopped: make(chan struct{}),
		suspicion: make(chan struct{}, 1),
		sets:      make(map[uint64]set), owners: make(map[stateKey]owner),
	}
	var err error
	if b.lock, err = h.lock(cfg.ReqID); err != nil {
		return nil, classify(err)
	}
	sock, err := h.open()
	if err != nil {
		return nil, errors.Join(classify(err), b.lock.Close())
	}
	b.conn = newConn(sock)
	if sock, err = h.open(); err != nil {
		return nil, errors.Join(classify(err), b.conn.sock.close(), b.lock.Close())
	}
	b.query = newConn(sock)
	for _, c := range []*conn{b.conn, b.query} {
		port, err := c.sock.port()
		if err != nil {
			return nil, errors.Join(err, b.closeSockets())
		}
		b.ports = append(b.ports, port)
	}
	// Before the policies are placed: what happens to them while this goes on is noticed.
	if b.expiries, err = h.monitor(nl.XFRMNLGRP_EXPIRE); err != nil {
		return nil, errors.Join(classify(err), b.closeSockets())
	}
	if b.changes, err = h.monitor(nl.XFRMNLGRP_POLICY); err != nil {
		return nil, errors.Join(classify(err), b.expiries.close(), b.closeSockets())
	}
	if err := b.start(); err != nil {
		return nil, errors.Join(err, b.expiries.close(), b.changes.close(), b.closeSockets())
	}
	go b.work()
	b.watchers.Go(func() { b.watch(b.expiries) })
	b.watchers.Go(func() { b.watch(b.changes) })
	b.watchers.Go(b.guard)
	return b, nil
}

// complete fills in defaults and reports what is wrong.
func (c *Config) complete() error {
	if c.ReqID == 0 {
		c.ReqID = DefaultReqID
	}
	if c.Window == 0 {
		c.Window = DefaultWindow
	}
	if c.Queue == 0 {
		c.Queue = DefaultQueue
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.block == 0 {
		c.block = blockAfterClose
	}
	if c.life == 0 {
		c.life, c.renewal = policyLife, policyRenewal
	}
	c.Local, c.ServerPorts, c.ClientPorts = slices.Clone(c.Local), slices.Clone(c.ServerPorts), slices.Clone(c.ClientPorts)
	var errs []error
	if len(c.Local) == 0 || len(c.ServerPorts) == 0 || len(c.ClientPorts) == 0 {
		errs = append(errs, errors.New("local addresses, server ports and client ports are all needed"))
	}
	for _, a := range c.Local {
		if !usable(a) {
			errs = append(errs, fmt.Errorf("local address %s cannot have SAs", a))
		}
	}
	if slices.Contains(c.ServerPorts, 0) || slices.Contains(c.ClientPorts, 0) {
		errs = append(errs, errors.New("protected port 0"))
	}
	if c.ReqID < 0 || c.ReqID > 1<<31-1 {
		errs = append(errs, fmt.Errorf("reqid %d is out of range", c.ReqID))
	}
	if c.Window < 1 || c.Window > maxWindow {
		errs = append(errs, fmt.Errorf("replay window %d is not between 1 and %d", c.Window, maxWindow))
	}
	if c.Queue < 0 {
		errs = append(errs, fmt.Errorf("queue of %d requests", c.Queue))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("configure XFRM: %w", err)
	}
	return nil
}

// usable reports whether an address may be one end of an SA: a plain unicast address. Link-local ones are not, since
// their interface is not part of a selector.
func usable(a netip.Addr) bool {
	return a.IsValid() && !a.Is4In6() && a.Zone() == "" && !a.IsUnspecified() && !a.IsMulticast() && !a.IsLinkLocalUnicast()
}

// start makes the kernel ready for the first SA set.
func (b *Backend) start() error {
	b.support = probe(b.conn)
	if err := b.support.Err(); err != nil {
		return fmt.Errorf("probe XFRM: %w", err)
	}
	for _, a := range b.cfg.Local {
		if a.Is4() && !b.support.V4 || a.Is6() && !b.support.V6 {
			return fmt.Errorf("probe XFRM for %s: %w", a, ErrNoESP)
		}
	}
	b.log.Info("probed XFRM", slog.Any("support", &b.support))
	if b.window > legacyWindow && !b.support.LargeWindow {
		b.log.Warn("kernel refuses the replay window", slog.Int("wanted", b.window), slog.Int("used", legacyWindow))
		b.window = legacyWindow
	}

	ports := slices.Concat(b.cfg.ServerPorts, b.cfg.ClientPorts)
	slices.Sort(ports)
	b.policies = constantPolicies(b.cfg.Local, slices.Compact(ports), b.reqid)
	for i := range b.policies {
		b.policies[i].expires = seconds(b.cfg.life)
	}
	if err := protect(b.conn, b.policies, b.reqid, b.cfg.block, b.log); err != nil {
		return errors.Join(err, retire(b.conn, b.policies, b.cfg.block))
	}
	warnFacts(b.cfg.NS, ports, b.log)
	return nil
}

// owned reports whether a state is one that we have made. While another key daemon of the host listens, the kernel keeps a
// state without SPI and keys for half a minute, with the reqid of our policy, for a packet that has found no SA.
func (b *Backend) owned(h stateHead) bool { return h.esp && h.reqid == b.reqid && h.id.spi != 0 }

// openConn opens a connection beside that of the worker, for one dump. The caller holds extraMu.
func (b *Backend) openConn(ctx context.Context) (*conn, error) {
	if err := b.interrupted(ctx); err != nil {
		return nil, err
	}
	sock, err := b.host.open()
	if err != nil {
		return nil, err
	}
	return newConn(sock), nil
}

// interrupted reports why Adopt or Survey has to stop.
func (b *Backend) interrupted(ctx context.Context) error {
	select {
	case <-b.closing:
		return ErrClosed
	default:
		return ctx.Err()
	}
}

// closeSockets gives up the netlink sockets and then, as the very last thing, the namespace.
func (b *Backend) closeSockets() error {
	b.extraMu.Lock()
	defer b.extraMu.Unlock()
	b.queryMu.Lock()
	defer b.queryMu.Unlock()
	return errors.Join(b.conn.sock.close(), b.query.sock.close(), b.lock.Close())
}

// Support returns what the probe of New found.
func (b *Backend) Support() Support { return b.support }

// Install implements sa.Installer. Beside the kernel's errors, done may get one wrapping ErrParams, ErrDuplicate,
// ErrBusy or ErrClosed. The kernel ends the set after nine days at the latest, also if Params.Hard is longer or zero, unless
// it is extended before: no SA may outlive the policies of a process that died.
func (b *Backend) Install(p sa.Params, done func(error)) {
	p.Keys = p.Keys.Clone()
	b.enqueue(request{op: opInstall, p: p, done: done})
}

// Remove implements sa.Installer. A set that this process did not install, or removed before, is left alone. After an
// error the set still counts as installed and Remove may be tried again.
func (b *Backend) Remove(p sa.Params, done func(error)) {
	p.Keys = ims.ESPKeys{}
	b.enqueue(request{op: opRemove, p: p, done: done})
}

// Extend implements sa.Installer. Keys are not looked at. Zero means as long as possible, see Install. done may get one wrapping
// ErrUnknown, and ESRCH if the kernel has removed an SA of the set because its limit had passed.
func (b *Backend) Extend(p sa.Params, hard time.Duration, done func(error)) {
	p.Keys = ims.ESPKeys{}
	b.enqueue(request{op: opExtend, p: p, hard: hard, done: done})
}

// enqueue hands a request to the worker. Removals are always taken: there are never more than sets, and refusing one
// would leave SAs behind.
func (b *Backend) enqueue(r request) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.closed:
		go r.cancel(b.keep)
		return
	case r.op != opRemove && b.waiting >= b.cfg.Queue:
		r.p.Keys.Zero()
		b.refused = append(b.refused, r.done)
	default:
		b.queue = append(b.queue, r)
		b.waiting++
	}
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// cancel answers a request that came too late. A removal has its wish if Close removes everything.
func (r *request) cancel(kept bool) {
	r.p.Keys.Zero()
	if r.op == opRemove && !kept {
		r.done(nil)
	} else {
		r.done(ErrClosed)
	}
}

// Count implements sa.Installer: the SAs of all sets installed and not removed. A set whose hard limit passed counts
// until it is removed; KernelCount tells what the kernel really has.
func (b *Backend) Count() int { return int(b.installed.Load()) }

// KernelCount returns the number of states in the namespace as the kernel counts them, foreign ones included.
func (b *Backend) KernelCount() (int, error) { return b.count((*conn).countStates) }

// PolicyCount returns the number of policies in the namespace as the kernel counts them, foreign ones included.
func (b *Backend) PolicyCount() (int, error) { return b.count((*conn).countPolicies) }

func (b *Backend) count(f func(*conn) (int, error)) (int, error) {
	b.queryMu.Lock()
	defer b.queryMu.Unlock()
	return f(b.query)
}

// Statistics returns the XFRM counters of the namespace (/proc/net/xfrm_stat), by the kernel's names, such as
// XfrmInTmplMismatch for clear packets to a protected port.
func (b *Backend) Statistics() (map[string]uint64, error) { return statistics(b.cfg.NS) }

// Close implements sa.Installer: requests still waiting fail, our policies become block policies, and our SAs go. The
// kernel removes the block policies by itself after 200 s, until when it drops whatever is sent from or to a protected
// port; a New before that turns them back. Sockets of the protected ports should be closed before Close, because
// nothing refuses clear packets to them after that time. A done callback must not call Close.
func (b *Backend) Close() error {
	if !b.end(false) {
		return nil
	}
	// The policies first, each in one step from demanding ESP to dropping: there is no moment without one, and where this
	// fails the template stays, which drops as well once its states are gone.
	err := retire(b.conn, b.policies, b.cfg.block)
	// By reqid rather than from our books: this also catches what a failed removal left.
	e := b.conn.sweep(b.owned)
	b.installed.Store(0)
	return errors.Join(err, e, b.closeSockets())
}

// Detach implements sa.Backend: removals still waiting are carried out, other requests fail, and then our SAs and the
// policies stay as they are. The SAs go on working, for the next New and Adopt to take over; nothing passes a protected
// port in clear meanwhile. Should nobody come, the SAs end with their hard limits and the policies after them. A done
// callback must not call Detach.
func (b *Backend) Detach() error {
	if !b.end(true) {
		return nil
	}
	return b.closeSockets()
}

// end stops the worker, the monitors and the guard: what happens to the policies from then on is nobody else's doing. It
// returns false if that had been done before.
func (b *Backend) end(keep bool) bool {
	b.mu.Lock()
	first := !b.closed
	if first {
		b.closed, b.keep = true, keep
		close(b.closing)
		close(b.wake)
	}
	b.mu.Unlock()
	<-b.stopped
	if first {
		if err := errors.Join(b.expiries.close(), b.changes.close()); err != nil {
			b.log.Warn("cannot close the event monitors", slog.Any("error", err))
		}
	}
	b.watchers.Wait()
	return first
}
