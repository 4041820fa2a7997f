package esptun

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"github.com/puzpuzpuz/xsync/v4"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/esp"
)

// SA is one one-way security association with its selector: exactly these addresses and ports, UDP and TCP. Ports and
// addresses are those of the packets it protects, so Src is the sender's end in both directions.
type SA struct {
	Inbound bool // received by this end
	SPI     ims.SPI
	Src     netip.AddrPort
	Dst     netip.AddrPort
	Keys    ims.ESPKeys // not needed by Remove

	// Seq is the sequence number to go on after, for an SA that was in use before: the last one sent, or the highest one
	// received, up to which everything counts as received. Zero for a new one. All returns the current one.
	Seq uint32

	ID uint64 // the caller's own; All returns it
}

// String prints the SA for messages, without its keys.
func (s SA) String() string {
	dir := "outbound"
	if s.Inbound {
		dir = "inbound"
	}
	return fmt.Sprintf("%s SA %s %s->%s", dir, s.SPI, s.Src, s.Dst)
}

// Errors of Add.
var (
	// ErrExists: another SA has the same destination and SPI (inbound) or the same addresses and ports (outbound).
	ErrExists = errors.New("security association exists")
	// ErrNotLocal: this end of the SA is an address which the tunnel does not own.
	ErrNotLocal = errors.New("address does not belong to the tunnel")
	// ErrClosed: the tunnel was closed.
	ErrClosed = errors.New("tunnel is closed")
)

// address is an IP address without pointers; IPv4 ones are mapped.
type address [16]byte

// inboundKey finds an inbound SA (RFC 4301 §4.1: SPI and destination).
type inboundKey struct {
	dst address
	spi ims.SPI
}

// tuple finds an outbound SA, and is the selector of either kind.
type tuple struct {
	src, dst     address
	sport, dport uint16
}

func tupleOf(s *SA) tuple {
	return tuple{src: s.Src.Addr().As16(), dst: s.Dst.Addr().As16(), sport: s.Src.Port(), dport: s.Dst.Port()}
}

// sa returns s with the addresses and ports of the tuple.
func (t tuple) sa(s SA) SA {
	s.Src = netip.AddrPortFrom(netip.AddrFrom16(t.src).Unmap(), t.sport)
	s.Dst = netip.AddrPortFrom(netip.AddrFrom16(t.dst).Unmap(), t.dport)
	return s
}

type inboundSA struct {
	*esp.Inbound
	selector tuple
	id       uint64
}

type outboundSA struct {
	*esp.Outbound
	sock *rawSocket
	id   uint64
}

// table holds the SAs. Its maps are read without locks; the mutex orders those who change them.
type table struct {
	in  *xsync.Map[inboundKey, *inboundSA]
	out *xsync.Map[tuple, *outboundSA]

	mu     sync.Mutex
	closed bool
}

func newTable() *table {
	return &table{in: xsync.NewMap[inboundKey, *inboundSA](), out: xsync.NewMap[tuple, *outboundSA]()}
}

// prepared is an SA with its key schedule, ready to be put into the table.
type prepared struct {
	sa  *SA
	in  *inboundSA
	out *outboundSA
}

// add puts all of them in, or none.
func (t *table) add(ps []prepared) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return ErrClosed
	}
	for i := range ps {
		if !t.putLocked(&ps[i]) {
			for k := range ps[:i] {
				t.takeLocked(ps[k].sa)
			}
			return fmt.Errorf("add %s: %w", ps[i].sa, ErrExists)
		}
	}
	return nil
}

func (t *table) putLocked(p *prepared) bool {
	if p.in != nil {
		_, loaded := t.in.LoadOrStore(inboundKey{p.in.selector.dst, p.sa.SPI}, p.in)
		return !loaded
	}
	_, loaded := t.out.LoadOrStore(tupleOf(p.sa), p.out)
	return !loaded
}

// takeLocked removes an SA only if everything but the keys is the same, so that a late removal of an old SA cannot
// take away another one which reuses its SPI or its ports.
func (t *table) takeLocked(s *SA) {
	if s.Inbound {
		if t.inbound(s) != nil {
			t.in.Delete(inboundKey{s.Dst.Addr().As16(), s.SPI})
		}
		return
	}
	if t.outbound(s) != nil {
		t.out.Delete(tupleOf(s))
	}
}

// inbound finds an SA with everything but the keys the same, nil if there is none.
func (t *table) inbound(s *SA) *inboundSA {
	tu := tupleOf(s)
	if sa, ok := t.in.Load(inboundKey{tu.dst, s.SPI}); ok && sa.selector == tu {
		return sa
	}
	return nil
}

// outbound is the like of inbound.
func (t *table) outbound(s *SA) *outboundSA {
	if sa, ok := t.out.Load(tupleOf(s)); ok && sa.SPI() == s.SPI {
		return sa
	}
	return nil
}

func (t *table) seq(s *SA) (seq uint32, ok bool) {
	if s.Inbound {
		if sa := t.inbound(s); sa != nil {
			return sa.Seq(), true
		}
		return 0, false
	}
	if sa := t.outbound(s); sa != nil {
		return sa.Seq(), true
	}
	return 0, false
}

// all shows every SA until yield returns false.
func (t *table) all(yield func(SA) bool) {
	more := true
	t.in.Range(func(k inboundKey, sa *inboundSA) bool {
		more = yield(sa.selector.sa(SA{Inbound: true, SPI: k.spi, Seq: sa.Seq(), ID: sa.id}))
		return more
	})
	if !more {
		return
	}
	t.out.Range(func(k tuple, sa *outboundSA) bool { return yield(k.sa(SA{SPI: sa.SPI(), Seq: sa.Seq(), ID: sa.id})) })
}

func (t *table) remove(sas []SA) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range sas {
		t.takeLocked(&sas[i])
	}
}

func (t *table) count() int { return t.in.Size() + t.out.Size() }

// close empties the table for good.
func (t *table) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	t.in.Clear()
	t.out.Clear()
}
