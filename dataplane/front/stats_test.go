package front

import (
	"net"
	"sync"
	"testing"

	"github.com/gmgate/gmgate/control/ims"
)

// TestStatsNow: counters are there as soon as what they count has happened, for any number of readers at a time, and
// after the end.
func TestStatsNow(t *testing.T) {
	f, events := run(t, Config{Workers: 2, Listeners: []Listener{gm(loop4)}}, recorder{})
	u, c := udpPeer(t, "127.0.0.2", f.Listeners()[0].Addr), tcpPeer(t, f.Listeners()[0].Addr)
	const n = 300
	for i := range uint64(n) {
		peer := net.Conn(u)
		if i%2 == 1 {
			peer = c
		}
		write(t, peer, sip("1", 0))
		expect(t, events, "message") // the event has not ended yet
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				s := f.Stats()
				if got := s.Side(ims.GmClear); got.MessagesIn != i+1 || got.DatagramsIn != i/2+1 {
					t.Errorf("after %d messages: %+v", i+1, got)
				}
			})
		}
		wg.Wait()
	}
	closeFront(t, f)
	s := f.Stats()
	mustEqual(t, "messages", s.Side(ims.GmClear).MessagesIn, n)
	mustEqual(t, "closed", s.Closed, 1) // by the end itself
}

// TestStatsStuck: the counters of a worker that does not move are those of the last call, and it takes no longer to get
// them when it is free again.
func TestStatsStuck(t *testing.T) {
	f, events := run(t, Config{Workers: 2, Listeners: []Listener{gm(loop4)}}, recorder{})
	at := f.Listeners()[0].Addr
	peers := []net.Conn{udpPeer(t, "127.0.0.2", at), udpPeer(t, "127.0.0.3", at)}
	send := func() {
		t.Helper()
		for _, c := range peers {
			write(t, c, sip("1", 0))
			expect(t, events, "message")
		}
	}
	send()
	messages := func() uint64 {
		s := f.Stats()
		return s.Side(ims.GmClear).MessagesIn
	}
	mustEqual(t, "messages", messages(), 2)
	send()
	held, hold := make(chan struct{}), make(chan struct{})
	if err := f.Worker(0).Post(func() { close(held); <-hold }); err != nil {
		t.Fatal(err)
	}
	<-held
	mustEqual(t, "messages while one is stuck", messages(), 3)
	close(hold)
	mustEqual(t, "messages", messages(), 4)
	for _, w := range f.workers {
		if w.ledger.asked.Load() {
			t.Errorf("worker %d publishes although nobody asks", w.idx)
		}
	}
}
