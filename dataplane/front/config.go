package front

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// Listener is an address on which messages are received and from which they are sent.
type Listener struct {
	// Addr is explicit: no wildcard, since the local address of a message is taken from here. Port 0 lets the kernel
	// choose (Front.Listeners tells the port); it is meant for tests.
	Addr   netip.AddrPort
	Side   ims.Side
	UDP    bool
	TCP    bool
	Hidden bool // the sockets live in Config.Hidden
	// Worker is the only worker that receives here, or -1 for all of them. Every worker may send UDP from every listener.
	Worker int
	// Optional lets the front start without the listener where somebody else has its address.
	Optional bool
}

// labelled tells whether packets come here with labels of the ESP backend: the kernel's sets them, in the namespace in
// which it works. What the other backend's tunnel delivers into the hidden one has none.
func (l *Listener) labelled() bool { return l.Side == ims.GmProtected && !l.Hidden }

// Config says what New shall run. Zero values of limits and times stand for the defaults named here.
type Config struct {
	Workers   int // default 1
	Listeners []Listener
	Hidden    *hostnet.NS // namespace of hidden sockets; nil: that of the process
	Steering  Steering    // nil: classic BPF for UDP, and connections are accepted by one socket for all workers

	MaxMessage int // octets of one SIP message, default 65535

	// MaxConnections is the number of TCP connections in both directions, default 20000; never more than descriptors
	// allow. A quarter of it is the most that the unprotected side gets, where anybody may connect. Dials to Mw do not
	// count against it, descriptors are the limit there.
	MaxConnections int
	MaxPerSource   int // connections of the unprotected side with one IPv4 address or IPv6 /64, default 64

	MaxOutbound      int // octets waiting in one connection before it is reset, default 512 KiB
	MaxOutboundTotal int // octets waiting in all connections of a worker, default 64 MiB
	MaxBuffered      int // octets of buffers for incomplete messages per worker, default 64 MiB, at least 2*MaxMessage
	MaxQueue         int // messages handed to one worker and not handled yet, default 8192
	MaxDials         int // connection attempts at a time to Mw, and as many to Gm, default 256; four times as many may wait

	IdleTimeout      time.Duration // of a connection without traffic in either direction, default 1 h
	ClearIdleTimeout time.Duration // the same on the unprotected side, default 60 s or IdleTimeout if that is less
	PartialTimeout   time.Duration // for the rest of a message whose beginning has come, default 32 s (64*T1)
	DialTimeout      time.Duration // default 10 s
	Tick             time.Duration // interval of Handler.Tick, default 10 ms
	MaxRest          time.Duration // the longest that a worker without events goes without Tick, default 1 s or Tick if that is more

	ReadBuffer  int  // SO_RCVBUF of UDP sockets in octets, default 4 MiB
	WriteBuffer int  // SO_SNDBUF of UDP sockets in octets, default 4 MiB
	TCPMaxSeg   int  // TCP_MAXSEG on the Gm sides, 0 leaves the kernel's
	FreeBind    bool // listen on addresses that the host does not have yet

	// The core is trusted, so nobody else must reach the Mw side. MwInterface is the only interface that its sockets use, "" any;
	// MwSources are the addresses that peers there may have, none means any.
	MwInterface string
	MwSources   []netip.Prefix

	Logger *slog.Logger // default: discard

	mwIndex int // of MwInterface
}

// Implementation constants.
const (
	defaultMaxMessage     = 65535
	defaultMaxConnections = 20000
	defaultMaxPerSource   = 64 // phones behind one NAT
	defaultMaxOutbound    = 512 << 10
	defaultOutboundTotal  = 64 << 20
	defaultMaxBuffered    = 64 << 20
	defaultMaxQueue       = 8192
	defaultMaxDials       = 256
	defaultIdleTimeout    = time.Hour
	defaultClearIdle      = time.Minute      // a registration is over by then
	defaultPartialTimeout = 32 * time.Second // after Timer B and F of RFC 3261 §17 nobody waits any more
	defaultDialTimeout    = 10 * time.Second
	defaultTick           = 10 * time.Millisecond
	defaultMaxRest        = time.Second
	defaultSocketBuffer   = 4 << 20

	minMessage = 512 // below it no SIP request fits

	maxWorkers = 256

	// reservedFDs are kept for everything that is neither a connection nor a listener: pollers, files, netlink. A
	// connection takes two descriptors for a moment, while gnet duplicates it.
	reservedFDs = 256

	// coreReserve are descriptors that MaxConnections leaves to dials to Mw, unless there are very few.
	coreReserve = 256

	// clearShare is the part of MaxConnections that the unprotected side gets, as a divisor.
	clearShare = 4
)

// populate fills in defaults.
func (c *Config) populate() {
	def := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	defTime := func(v *time.Duration, d time.Duration) {
		if *v == 0 {
			*v = d
		}
	}
	def(&c.Workers, 1)
	def(&c.MaxMessage, defaultMaxMessage)
	def(&c.MaxConnections, defaultMaxConnections)
	def(&c.MaxPerSource, defaultMaxPerSource)
	def(&c.MaxOutbound, defaultMaxOutbound)
	def(&c.MaxOutboundTotal, defaultOutboundTotal)
	def(&c.MaxBuffered, defaultMaxBuffered)
	def(&c.MaxQueue, defaultMaxQueue)
	def(&c.MaxDials, defaultMaxDials)
	def(&c.ReadBuffer, defaultSocketBuffer)
	def(&c.WriteBuffer, defaultSocketBuffer)
	defTime(&c.IdleTimeout, defaultIdleTimeout)
	defTime(&c.ClearIdleTimeout, min(defaultClearIdle, c.IdleTimeout))
	defTime(&c.PartialTimeout, defaultPartialTimeout)
	defTime(&c.DialTimeout, defaultDialTimeout)
	defTime(&c.Tick, defaultTick)
	defTime(&c.MaxRest, max(defaultMaxRest, c.Tick))
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// validate tells everything that is wrong with a populated configuration.
func (c *Config) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.Workers < 1 || c.Workers > maxWorkers {
		bad("workers %d is not within 1 to %d", c.Workers, maxWorkers)
	}
	if c.MaxMessage < minMessage || c.MaxMessage > defaultMaxMessage {
		bad("maximum message size %d is not within %d to %d", c.MaxMessage, minMessage, defaultMaxMessage)
	}
	for _, v := range []struct {
		name string
		n    int
	}{
		{"maximum connections", c.MaxConnections},
		{"maximum connections per source", c.MaxPerSource},
		{"maximum dials", c.MaxDials},
		{"maximum queue", c.MaxQueue},
		{"read buffer", c.ReadBuffer},
		{"write buffer", c.WriteBuffer},
	} {
		if v.n < 1 {
			bad("%s %d is not positive", v.name, v.n)
		}
	}
	if c.MaxOutbound < c.MaxMessage {
		bad("maximum outbound %d is less than the maximum message size %d", c.MaxOutbound, c.MaxMessage)
	}
	if c.MaxOutboundTotal < c.MaxMessage {
		bad("maximum outbound in total %d is less than the maximum message size %d", c.MaxOutboundTotal, c.MaxMessage)
	}
	if c.MaxBuffered < 2*c.MaxMessage { // buffers grow by doubling
		bad("maximum buffered %d is less than twice the maximum message size %d", c.MaxBuffered, c.MaxMessage)
	}
	if c.TCPMaxSeg < 0 {
		bad("maximum segment size %d is negative", c.TCPMaxSeg)
	}
	for _, v := range []struct {
		name string
		d    time.Duration
	}{
		{"idle timeout", c.IdleTimeout},
		{"idle timeout of the unprotected side", c.ClearIdleTimeout},
		{"partial timeout", c.PartialTimeout},
		{"dial timeout", c.DialTimeout},
		{"tick", c.Tick},
		{"longest rest", c.MaxRest},
	} {
		if v.d <= 0 {
			bad("%s %s is not positive", v.name, v.d)
		}
	}
	for i, l := range c.Listeners {
		errs = append(errs, c.validateListener(i, l))
	}
	return errors.Join(errs...)
}

func (c *Config) validateListener(i int, l Listener) error {
	switch a := l.Addr.Addr(); {
	case !a.IsValid() || a.IsUnspecified() || a.IsMulticast():
		return fmt.Errorf("listener %s: the address must be an explicit unicast one", l.Addr)
	case a.Is4In6() || a.Zone() != "":
		return fmt.Errorf("listener %s: the address must have neither an IPv4-mapped form nor a zone", l.Addr)
	case !l.UDP && !l.TCP:
		return fmt.Errorf("listener %s: neither UDP nor TCP", l.Addr)
	case l.Side != ims.GmClear && l.Side != ims.GmProtected && l.Side != ims.Mw:
		return fmt.Errorf("listener %s: no side", l.Addr)
	case l.Worker < -1 || l.Worker >= c.Workers:
		return fmt.Errorf("listener %s: there is no worker %d", l.Addr, l.Worker)
	}
	for _, o := range c.Listeners[:i] {
		// An address names one listener for SendUDP, so it may not occur in both namespaces either.
		if o.Addr == l.Addr && l.Addr.Port() != 0 && ((o.UDP && l.UDP) || (o.TCP && l.TCP) || o.Hidden != l.Hidden) {
			return fmt.Errorf("listener %s: the address is used twice", l.Addr)
		}
	}
	return nil
}

// members returns how many sockets listen for a listener's connections: with a steering program one for each worker.
func (c *Config) members(l Listener) int {
	if c.Steering != nil && l.Worker < 0 && isGm(l.Side) {
		return c.Workers
	}
	return 1
}

// isCore reports whether messages on the Mw side are taken from an address.
func (c *Config) isCore(a netip.Addr) bool {
	return len(c.MwSources) == 0 || slices.ContainsFunc(c.MwSources, func(p netip.Prefix) bool { return p.Contains(a) })
}

// findInterface looks for the interface of the Mw side.
func (c *Config) findInterface() error {
	if c.MwInterface == "" {
		return nil
	}
	i, err := net.InterfaceByName(c.MwInterface)
	if err != nil {
		return fmt.Errorf("interface %s of the Mw side: %w", c.MwInterface, err)
	}
	c.mwIndex = i.Index
	return nil
}

// listenerFDs returns how many descriptors the listeners take.
func (c *Config) listenerFDs() (n int) {
	for _, l := range c.Listeners {
		if l.UDP {
			n += c.Workers // each has a member or a duplicate
		}
		if l.TCP {
			n += c.members(l)
		}
	}
	return n
}

// clampConnections lowers the connection cap so that descriptors suffice: gnet ends an engine that runs out of them. It
// returns the number of connections for which there are descriptors, that is the cap and what is left for Mw.
func (c *Config) clampConnections() (room int) {
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err != nil {
		return c.MaxConnections + coreReserve
	}
	room = max(int(min(r.Cur, 1<<30))-reservedFDs-c.listenerFDs(), 1) //nolint:gosec // G115: bounded by the minimum
	if limit := max(room-min(coreReserve, room/2), 1); c.MaxConnections > limit {
		c.Logger.Warn("connection limit lowered to what RLIMIT_NOFILE allows",
			slog.Int("wanted", c.MaxConnections), slog.Int("limit", limit))
		c.MaxConnections = limit
	}
	return room
}
