package main

import (
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/dataplane/front"
)

// observeFront exports what the sockets count themselves.
func observeFront(m *observe.Metrics, f *front.Front) {
	stats := &cached[front.Stats]{age: statsAge, get: func() (front.Stats, error) { return f.Stats(), nil }}
	for _, side := range []ims.Side{ims.GmClear, ims.GmProtected, ims.Mw} {
		for dir, get := range map[string]func(front.SideStats) (datagrams, octets uint64){
			"in":  func(s front.SideStats) (uint64, uint64) { return s.DatagramsIn, s.BytesIn },
			"out": func(s front.SideStats) (uint64, uint64) { return s.DatagramsOut, s.BytesOut },
		} {
			labels := map[string]string{"side": side.String(), "dir": dir}
			read := func() (uint64, uint64) {
				s := stats.now()
				return get(s.Side(side))
			}
			m.AddFunc("socket_datagrams_total", "UDP datagrams of the SIP sockets.", observe.Counter, labels,
				func() float64 { n, _ := read(); return float64(n) })
			m.AddFunc("socket_bytes_total", "Octets of the SIP sockets, UDP and TCP.", observe.Counter, labels,
				func() float64 { _, n := read(); return float64(n) })
		}
	}
	for _, d := range front.Drops() {
		m.AddFunc("socket_drops_total", "Datagrams, messages and connections that the sockets dropped.", observe.Counter,
			map[string]string{"reason": d.String()}, func() float64 {
				s := stats.now()
				return float64(s.Dropped(d))
			})
	}
	single := func(name, help string, kind observe.Kind, get func(*front.Stats) float64) {
		m.AddFunc(name, help, kind, nil, func() float64 {
			s := stats.now()
			return get(&s)
		})
	}
	single("tcp_connections", "TCP connections open now.", observe.Gauge,
		func(s *front.Stats) float64 { return float64(s.Connections) })
	single("tcp_dial_errors_total", "TCP connections that could not be opened.", observe.Counter,
		func(s *front.Stats) float64 { return float64(s.DialErrors) })
	single("handovers_total", "Messages handed from the worker that received them to the UE's.", observe.Counter,
		func(s *front.Stats) float64 { return float64(s.Handovers) })
	single("labelled_messages_total", "Messages whose UE context the kernel's ESP has told by its mark.", observe.Counter,
		func(s *front.Stats) float64 { return float64(s.Labelled) })
	single("tcp_strays_total", "TCP connections that came in at the socket of another worker than the UE's.", observe.Counter,
		func(s *front.Stats) float64 { return float64(s.Strays) })
	single("handler_panics_total", "Messages on which a handler panicked; the message was dropped.", observe.Counter,
		func(s *front.Stats) float64 { return float64(s.Panics) })
}
