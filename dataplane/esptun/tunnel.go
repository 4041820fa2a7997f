package esptun

import (
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"math"
	"net/netip"
	"slices"
	"sync"

	"github.com/gmgate/gmgate/dataplane/esp"
	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// DefaultMTU is the MTU of the TUN: transport mode cannot protect fragments, so a whole SIP message over UDP must fit.
const DefaultMTU = 9000

// Implementation constants.
const (
	// MinMTU is what IPv6 needs (RFC 8200 §5). MaxMTU leaves room for ESP within the 65,535 octets of an IP packet.
	MinMTU = 1280
	MaxMTU = 65000

	// AdvMSS is the segment size that TCP in the hidden namespace announces. 1360 octets, TCP and IPv6 header (60) and
	// the most ESP adds (53) fit into an Ethernet frame of 1500, even with a little tunnelling of the carrier's.
	AdvMSS = 1360

	// batchSize is the number of packets per recvmmsg and sendmmsg: one at a time costs 1 µs more per packet than 64,
	// and each slot holds a buffer of the MTU's size.
	batchSize = 32

	// queueLen is the TUN's queue in packets; its reader is a single goroutine and the senders are thousands of UEs.
	queueLen = 8192

	// socketBuffer is asked for on raw sockets, since all UEs share one.
	socketBuffer = 16 << 20

	// headroom in front of an IP packet takes the IV by which an ESP header exceeds an IPv4 header, and on receipt the
	// IPv6 header. tailroom takes padding, trailer and ICV.
	headroom = 64
	tailroom = esp.MaxOverhead
)

// Config describes a tunnel.
type Config struct {
	Outer *hostnet.NS // where the ESP packets travel; nil for the process's own namespace

	// Local are the protected addresses, which the hidden namespace owns: host prefixes for a P-CSCF, whole prefixes
	// (AnyIP) for many UEs. The outer namespace has to own them as well, or else it forwards their packets elsewhere.
	Local []netip.Prefix

	// OuterAddrs are the addresses to which raw sockets are bound, one each. Without any there is one socket per family
	// for all addresses in Local, which is the form for many UEs.
	OuterAddrs []netip.Addr

	// Held leaves what comes in to the raw sockets' buffers until Receive is called: at a restart, phones send before their SAs
	// are installed again and before anybody listens to them.
	Held bool

	MTU    int          // of the TUN; zero for DefaultMTU
	Window int          // replay window in packets; zero for esp.DefaultWindow
	Logger *slog.Logger // nil for slog.Default
}

// Tunnel is a hidden namespace with the engine that connects it to the network.
type Tunnel struct {
	cfg    Config
	log    *slog.Logger
	hidden *hostnet.NS
	tun    *tunDevice
	socks  []*rawSocket
	table  *table

	receivers   []*receiver
	transmitter *transmitter
	running     sync.WaitGroup
	receiving   sync.Once
	closing     sync.Once
	closeErr    error
}

// Open makes the hidden namespace, its TUN and the raw sockets, and starts the engine.
func Open(cfg Config) (*Tunnel, error) {
	if err := cfg.complete(); err != nil {
		return nil, fmt.Errorf("open ESP tunnel: %w", err)
	}
	t := &Tunnel{cfg: cfg, log: cfg.Logger, table: newTable()}
	if err := t.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("open ESP tunnel: %w", err), t.Close())
	}
	for _, s := range t.socks {
		r := newReceiver(t, s)
		t.receivers = append(t.receivers, r)
	}
	t.transmitter = newTransmitter(t)
	t.running.Go(t.transmitter.run)
	if !cfg.Held {
		t.Receive()
	}
	return t, nil
}

// Receive begins with what has come in, for a tunnel that was opened with Held. It must not be called after Close.
func (t *Tunnel) Receive() {
	t.receiving.Do(func() {
		for _, r := range t.receivers {
			t.running.Go(r.run)
		}
	})
}

// complete checks the configuration and fills in what was left out.
func (c *Config) complete() error {
	if len(c.Local) == 0 {
		return errors.New("no local address given")
	}
	c.Local = slices.Clone(c.Local)
	for i, p := range c.Local {
		if !p.IsValid() || p.Addr().Is4In6() || p.Addr().Zone() != "" {
			return fmt.Errorf("local prefix %s is not usable", p)
		}
		c.Local[i] = p.Masked()
	}
	slices.SortFunc(c.Local, netip.Prefix.Compare)
	c.Local = slices.Compact(c.Local)
	c.OuterAddrs = slices.Clone(c.OuterAddrs)
	slices.SortFunc(c.OuterAddrs, netip.Addr.Compare)
	c.OuterAddrs = slices.Compact(c.OuterAddrs) // two sockets with one address would share inbound SAs
	for _, a := range c.OuterAddrs {
		if !c.owns(a) {
			return fmt.Errorf("bind raw socket to %s: %w", a, ErrNotLocal)
		}
	}
	if c.MTU == 0 {
		c.MTU = DefaultMTU
	}
	if c.MTU < MinMTU || c.MTU > MaxMTU {
		return fmt.Errorf("MTU %d is outside %d to %d", c.MTU, MinMTU, MaxMTU)
	}
	if c.Window == 0 {
		c.Window = esp.DefaultWindow
	}
	if c.Window < esp.MinWindow || c.Window > esp.MaxWindow {
		return fmt.Errorf("replay window %d is outside %d to %d", c.Window, esp.MinWindow, esp.MaxWindow)
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return nil
}

func (c *Config) owns(a netip.Addr) bool {
	return slices.ContainsFunc(c.Local, func(p netip.Prefix) bool { return p.Contains(a) })
}

// families tells which address families the local prefixes need.
func (c *Config) families() (v4, v6 bool) {
	for _, p := range c.Local {
		v4 = v4 || p.Addr().Is4()
		v6 = v6 || p.Addr().Is6()
	}
	return v4, v6
}

func (t *Tunnel) open() error {
	var err error
	// The raw sockets come first: as long as one is open, the kernel does not answer ESP with "protocol unreachable".
	if t.socks, err = openRawSockets(&t.cfg); err != nil {
		return err
	}
	if t.hidden, err = hostnet.Create(); err != nil {
		return err
	}
	t.tun, err = openTUN(t.hidden, &t.cfg)
	return err
}

// Hidden returns the namespace whose sockets are protected. It stays the tunnel's; do not close it.
func (t *Tunnel) Hidden() *hostnet.NS { return t.hidden }

// Add installs SAs: all of them, or none when there is an error. The error is ErrExists, ErrNotLocal, ErrClosed, or one
// of the engine about SPI, algorithms, keys or (esp.ErrSequence) a sequence number that none follows.
func (t *Tunnel) Add(sas ...SA) error {
	ps := make([]prepared, len(sas))
	for i := range sas {
		if err := t.prepare(&ps[i], &sas[i]); err != nil {
			return err
		}
	}
	return t.table.add(ps)
}

func (t *Tunnel) prepare(p *prepared, s *SA) error {
	local, remote := s.Src, s.Dst
	if s.Inbound {
		local, remote = s.Dst, s.Src
	}
	if !s.Src.IsValid() || !s.Dst.IsValid() || s.Src.Port() == 0 || s.Dst.Port() == 0 || remote.Addr().Zone() != "" ||
		remote.Addr().Is4In6() || local.Addr().Is4() != remote.Addr().Is4() {
		return fmt.Errorf("add %s: selector is not usable", s)
	}
	sock := t.socketFor(local.Addr())
	if sock == nil {
		return fmt.Errorf("add %s: %s: %w", s, local.Addr(), ErrNotLocal)
	}
	if s.Seq == math.MaxUint32 {
		return fmt.Errorf("add %s: %w", s, esp.ErrSequence)
	}
	p.sa = s
	if s.Inbound {
		in, err := esp.NewInbound(s.SPI, s.Keys, t.cfg.Window)
		if err != nil {
			return err
		}
		p.in = &inboundSA{Inbound: in, selector: tupleOf(s), id: s.ID}
		return in.SetSeq(s.Seq)
	}
	out, err := esp.NewOutbound(s.SPI, s.Keys)
	if err != nil {
		return err
	}
	p.out = &outboundSA{Outbound: out, sock: sock, id: s.ID}
	return out.SetSeq(s.Seq)
}

// socketFor returns the raw socket of a local address, nil if the tunnel does not serve the address.
func (t *Tunnel) socketFor(a netip.Addr) *rawSocket {
	if !t.cfg.owns(a) {
		return nil
	}
	for _, s := range t.socks {
		if s.addr == a || !s.addr.IsValid() && s.v6 == a.Is6() {
			return s
		}
	}
	return nil
}

// Remove takes SAs out. One is identified by direction, SPI, addresses and ports; unknown ones are ignored.
func (t *Tunnel) Remove(sas ...SA) { t.table.remove(sas) }

// Seq returns the current sequence number of an installed SA, found as Remove does: the last one sent, or the highest one
// received. It reports false if the SA is not there. Packets that pass meanwhile are not held up.
func (t *Tunnel) Seq(s *SA) (seq uint32, ok bool) { return t.table.seq(s) }

// All returns the installed SAs without their keys, with their current sequence numbers, in no order. An SA that is added
// or removed meanwhile may be among them or not. Packets that pass meanwhile are not held up.
func (t *Tunnel) All() iter.Seq[SA] { return t.table.all }

// Count returns the number of SAs installed.
func (t *Tunnel) Count() int { return t.table.count() }

// Stats returns the counters.
func (t *Tunnel) Stats() Stats {
	var s Stats
	for _, r := range t.receivers {
		r.addTo(&s)
	}
	if t.transmitter != nil {
		t.transmitter.addTo(&s)
	}
	return s
}

// Close stops the engine and frees everything, the TUN included. The hidden namespace disappears when the last socket in
// it is closed. Close may be called more than once.
func (t *Tunnel) Close() error {
	t.closing.Do(func() {
		t.table.close()
		var errs []error
		for _, s := range t.socks {
			errs = append(errs, s.file.Close())
		}
		if t.tun != nil {
			errs = append(errs, t.tun.file.Close())
		}
		t.running.Wait()
		if t.hidden != nil {
			errs = append(errs, t.hidden.Close())
		}
		if err := errors.Join(errs...); err != nil {
			t.closeErr = fmt.Errorf("close ESP tunnel: %w", err)
		}
	})
	return t.closeErr
}
