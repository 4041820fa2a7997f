package guard

import (
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"net/netip"
	"slices"
	"time"

	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// Mode says which hooks may be taken.
type Mode string

// Modes.
const (
	Auto    Mode = "auto"    // the best that works on each interface
	Native  Mode = "xdp"     // XDP in the driver
	Generic Mode = "generic" // XDP in the stack
	TC      Mode = "tc"      // tcx, or clsact on kernels before 6.6
)

// Config describes a guard. Zero values of sizes stand for the defaults named here.
type Config struct {
	Mode       Mode     // default Auto. With another one Attach fails where the hook cannot be had
	Interfaces []string // default: those that have the addresses in Local

	NS *hostnet.NS // where the interfaces are, open as long as the guard; nil: the namespace of the process

	Local     []netip.Addr // Gm addresses, at most 16
	ClearPort uint16       // unprotected port
	Protected []uint16     // port-ps and port-pc

	// KernelESP says that the kernel decrypts: see the package's description of hooks.
	KernelESP bool
	// PassUnknown lets ESP pass that has no SA of ours, for hosts with other IPsec on the same addresses.
	PassUnknown bool

	// Rate and Burst bound the REGISTERs on the unprotected port, and TCP connections to it, of one IPv4 address or IPv6
	// /64: Burst at once, Rate per second in the long run. Rate 0: no limit. LimitAll counts every datagram, for
	// configurations in which only REGISTER is welcome there.
	Rate, Burst int
	LimitAll    bool
	Sources     int // whose rates are remembered, default 65536

	SAs int // inbound SAs, two for each SA set; default 262144
	UEs int // UE contexts with counters of their own, default 131072

	Pin    string // directory below a bpffs; empty: nothing outlives the process
	Logger *slog.Logger

	// Tests and Choose only.
	hooks []HookKind // in place of those that the mode allows
	trial bool       // its filters are told from those of a guard that is not pinned, and it lets everything pass
}

// Implementation constants.
const (
	defaultSources = 1 << 16
	defaultSAs     = 1 << 18
	defaultUEs     = 1 << 17

	maxLocal    = 16  // MAX_LOCAL of bpf/consts.h
	maxSegments = 128 // MAX_SEGMENTS of bpf/consts.h

	// maxLanes bounds the counters of one UE: 32 octets for each CPU, up to so many.
	maxLanes = 8
)

func (c *Config) complete() error {
	c.Local, c.Interfaces, c.Protected = slices.Clone(c.Local), slices.Clone(c.Interfaces), slices.Clone(c.Protected)
	for _, v := range []struct {
		n *int
		d int
	}{{&c.Sources, defaultSources}, {&c.SAs, defaultSAs}, {&c.UEs, defaultUEs}} {
		if *v.n == 0 {
			*v.n = v.d
		}
	}
	if c.Mode == "" {
		c.Mode = Auto
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	switch {
	case c.Mode != Auto && c.Mode != Native && c.Mode != Generic && c.Mode != TC:
		return fmt.Errorf("mode %q is unknown", c.Mode)
	case len(c.Local) == 0 || len(c.Local) > maxLocal:
		return fmt.Errorf("%d Gm addresses, want 1 to %d", len(c.Local), maxLocal)
	case c.Rate < 0 || c.Rate > 0 && c.Burst < 1:
		return fmt.Errorf("limit of %d per second with a burst of %d makes no sense", c.Rate, c.Burst)
	case c.Sources < 1 || c.SAs < 2 || c.UEs < 1:
		return errors.New("sizes of maps must be positive")
	}
	for _, a := range c.Local {
		if !a.IsValid() || a.Is4In6() || a.Zone() != "" {
			return fmt.Errorf("address %s of Gm is not usable", a)
		}
	}
	return nil
}

// inside runs f in the namespace of the interfaces: their numbers mean something there only.
func inside(ns *hostnet.NS, f func(*hostnet.NS) error) error {
	if ns != nil {
		return ns.Do(func() error { return f(ns) })
	}
	ns, err := hostnet.Current()
	if err != nil {
		return err
	}
	defer ns.Close() //nolint:errcheck // a handle only
	return f(ns)
}

// lanes returns how many counters each UE has, a power of two, and whether every CPU has one of its own.
func lanes(cpus int) (n int, private bool) {
	n = 1 << bits.Len(uint(max(cpus, 1)-1)) //nolint:gosec // positive
	return min(n, maxLanes), n <= maxLanes
}

// interval is the time that one token takes to come back.
func (c *Config) interval() time.Duration {
	if c.Rate == 0 {
		return 0
	}
	return time.Second / time.Duration(c.Rate)
}

func (c *Config) local(a netip.Addr) (uint32, bool) {
	i := slices.Index(c.Local, a)
	return uint32(i), i >= 0 //nolint:gosec // not negative where it counts
}

// ErrUnavailable says that the kernel, or what the process may do, does not allow eBPF. gmgate works without.
var ErrUnavailable = errors.New("eBPF is not available")

// ErrFull says that a map has no room left for an SA.
var ErrFull = errors.New("map of SPIs is full")

// ErrLocked says that another process uses the pin directory.
var ErrLocked = errors.New("pin directory is in use by another process")
