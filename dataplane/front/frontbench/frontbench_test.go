package frontbench

import (
	"net/netip"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/front"
)

// forwarder sends messages on. It counts them.
type forwarder struct {
	w       *front.Worker
	sink    netip.AddrPort
	handled *[2]int
}

func (h *forwarder) Boot(w *front.Worker)                       { h.w = w }
func (h *forwarder) Bad(ims.Flow, []byte, string)               {}
func (h *forwarder) Closed(ims.ConnID, ims.Flow)                {}
func (h *forwarder) Dialed(uint64, ims.ConnID, ims.Flow, error) {}
func (h *forwarder) Tick(time.Time) time.Duration               { return 0 }
func (h *forwarder) Message(f ims.Flow, msg []byte) {
	h.handled[h.w.Index()]++
	_ = h.w.SendUDP(f.Local, h.sink, msg)
}

// TestDesigns has each design forward everything.
func TestDesigns(t *testing.T) {
	const n = 1000
	var handled [2]int
	two := Workers("workers", 2, ims.GmClear, func(sink netip.AddrPort) front.Handler {
		return &forwarder{sink: sink, handled: &handled}
	})
	g := newGenerator(t, [][]byte{[]byte("ONE sip:a SIP/2.0"), []byte("ANOTHER sip:a SIP/2.0")},
		[]netip.Addr{netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("127.0.0.3")})
	defer g.close()
	for _, d := range []Design{RecvFrom(), Batch(), two} {
		at, stop := d.Start(t, g.sinkAddr)
		if cost := g.run(t, at, n); cost <= 0 {
			t.Errorf("%s: cost %v", d.Name, cost)
		}
		stop()
		if g.lost != 0 {
			t.Errorf("%s: %d messages lost", d.Name, g.lost)
		}
	}
	if handled[0] == 0 || handled[1] == 0 || handled[0]+handled[1] != n {
		t.Errorf("the workers handled %v of %d messages", handled, n)
	}
}
