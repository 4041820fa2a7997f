package front

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
)

// Drop is a reason why the front dropped a datagram, a message or a connection.
type Drop uint8

// Reasons. The first block concerns input, the second output, the third connections.
const (
	DropKeepalive   Drop = iota // datagram of CRLFs or zeros, or STUN: ignored, never answered
	DropRunt                    // datagram shorter than a SIP start line
	DropOversize                // datagram above Config.MaxMessage
	DropSourcePort              // datagram from port 0, which cannot be answered
	DropSource                  // datagram or connection on the Mw side from an address that is none of Config.MwSources
	DropQueueFull               // message for another worker whose queue is full
	DropPanic                   // message during which the handler panicked
	DropSocketQueue             // datagram that the kernel dropped because the socket's receive buffer was full

	DropRefused     // send: ECONNREFUSED
	DropPermission  // send: EPERM, EACCES
	DropUnreachable // send: ENETUNREACH, EHOSTUNREACH, ENETDOWN, EADDRNOTAVAIL
	DropMessageSize // send: EMSGSIZE
	DropSendBuffer  // send: EAGAIN, ENOBUFS, ENOMEM
	DropSendOther   // send: anything else

	DropFraming         // connection closed because its stream is no SIP
	DropPartial         // connection closed because the rest of a message did not come, or in too many pieces
	DropBuffered        // connection closed because incomplete messages take too much memory
	DropOutbound        // connection reset because the peer does not read, or because too many do not
	DropIdle            // connection closed because it was idle
	DropConnectionLimit // connection refused: too many, on the unprotected side, or from one source
	DropZone            // connection refused: peer with a link-local address
	DropRegister        // connection lost because the event loop could not take it

	numDrops
)

var dropNames = [numDrops]string{
	"keepalive", "runt", "oversize", "source_port", "source", "queue_full", "panic", "socket_queue",
	"refused", "permission", "unreachable", "message_size", "send_buffer", "send_other",
	"framing", "partial", "buffered", "outbound", "idle", "connection_limit", "zone", "register",
}

// String returns the reason as metrics and logs name it.
func (d Drop) String() string {
	if d < numDrops {
		return dropNames[d]
	}
	return fmt.Sprintf("Drop(%d)", uint8(d))
}

// Drops lists all reasons.
func Drops() []Drop {
	all := make([]Drop, numDrops)
	for i := range all {
		all[i] = Drop(i) //nolint:gosec // G115: bounded by the enum
	}
	return all
}

// sendDrop classifies the error of a send.
func sendDrop(errno unix.Errno) Drop {
	switch errno { //nolint:exhaustive // everything else is "other"
	case unix.ECONNREFUSED:
		return DropRefused
	case unix.EPERM, unix.EACCES:
		return DropPermission
	case unix.ENETUNREACH, unix.EHOSTUNREACH, unix.ENETDOWN, unix.EADDRNOTAVAIL:
		return DropUnreachable
	case unix.EMSGSIZE:
		return DropMessageSize
	case unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM:
		return DropSendBuffer
	}
	return DropSendOther
}

// SideStats counts the traffic of one side since the start. Messages are those given to or taken from the handler, over
// UDP and TCP; datagrams and octets are those of sockets.
type SideStats struct {
	DatagramsIn, DatagramsOut uint64
	MessagesIn, MessagesOut   uint64
	BytesIn, BytesOut         uint64
}

func (s *SideStats) add(o SideStats) {
	s.DatagramsIn += o.DatagramsIn
	s.DatagramsOut += o.DatagramsOut
	s.MessagesIn += o.MessagesIn
	s.MessagesOut += o.MessagesOut
	s.BytesIn += o.BytesIn
	s.BytesOut += o.BytesOut
}

const numSides = int(ims.Mw) + 1

// Stats are the counters of a Front since its start, summed over the workers. Those of a worker are as they were at the end
// of an event.
type Stats struct {
	sides [numSides]SideStats
	drops [numDrops]uint64

	Wakeups     uint64 // events of UDP sockets
	ReadBatches uint64 // recvmmsg calls
	SendBatches uint64 // sendmmsg calls
	Handovers   uint64 // messages taken over from another worker
	Labelled    uint64 // messages that came with a label of the ESP backend
	Pings       uint64 // CRLF CRLF answered on connections, those that came together count as one
	Panics      uint64 // panics recovered in handlers

	Accepted     uint64 // connections from peers
	AcceptErrors uint64 // failed accept calls, EMFILE for example
	Strays       uint64 // connections that came in at the socket of another worker than theirs
	Dialed       uint64 // connections to peers
	DialErrors   uint64 // failed ones
	Closed       uint64 // connections closed, by either end
	Connections  int    // connections open now
}

// Side returns the counters of one side.
func (s *Stats) Side(side ims.Side) SideStats {
	if int(side) < numSides {
		return s.sides[side]
	}
	return SideStats{}
}

// Dropped returns the number of drops for a reason.
func (s *Stats) Dropped(d Drop) uint64 {
	if d < numDrops {
		return s.drops[d]
	}
	return 0
}

func (s *Stats) add(o *Stats) {
	for i := range s.sides {
		s.sides[i].add(o.sides[i])
	}
	for i := range s.drops {
		s.drops[i] += o.drops[i]
	}
	s.Wakeups += o.Wakeups
	s.ReadBatches += o.ReadBatches
	s.SendBatches += o.SendBatches
	s.Handovers += o.Handovers
	s.Labelled += o.Labelled
	s.Pings += o.Pings
	s.Panics += o.Panics
	s.Accepted += o.Accepted
	s.AcceptErrors += o.AcceptErrors
	s.Strays += o.Strays
	s.Dialed += o.Dialed
	s.DialErrors += o.DialErrors
	s.Closed += o.Closed
	s.Connections += o.Connections
}

// statsWait is how long a reader of counters waits for the loops. One that takes longer for one event is stuck.
const statsWait = time.Second

// ledger passes a loop's counters on to those who ask for them. Where nobody does an event costs one load.
type ledger struct {
	asked atomic.Bool

	mu   sync.Mutex
	next chan struct{} // closed when the loop has published; nil: nobody has asked since
	pub  Stats
}

// ask makes the loop publish at the end of an event that has not ended yet.
func (l *ledger) ask() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.next == nil {
		l.next = make(chan struct{})
		l.asked.Store(true)
	}
	return l.next
}

// publish is called by the loop.
func (l *ledger) publish(s *Stats) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pub = *s
	l.asked.Store(false)
	close(l.next)
	l.next = nil
}

// last returns what was published last.
func (l *ledger) last() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pub
}
