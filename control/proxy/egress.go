package proxy

import (
	"errors"
	"net/netip"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

var errNoSA = errors.New("SA set is gone")

// dial is a connection being opened, with what waits for it.
type dial struct {
	tag   uint64
	set   *registrar.Set // towards a UE
	peer  netip.AddrPort // towards the core
	queue []queued
}

type queued struct {
	msg  []byte
	fail func() // nil: the loss is only counted
}

// sendToUE sends a message over a set. Answers go by the channel of their request: over UDP always from port-pc to
// port-us, over TCP on the connection the request came on, and when that is gone on the one which we open from port-pc
// (TS 33.203 §7.1). Nothing leaves any other way.
func (w *Worker) sendToUE(s *registrar.Set, how channel, msg []byte, method sipmsg.Method) {
	if !s.Live() {
		if s = s.UE.Current; s == nil {
			w.obs.Drop(observe.ReasonUEUnreachable)
			return
		}
	}
	if s.Clear {
		w.sendClear(s, msg, method)
		return
	}
	if how == bySource {
		w.countOut(ims.GmProtected, ims.UDP, method, msg)
		w.count(w.eg.SendUDP(
			netip.AddrPortFrom(s.Local, s.Ports.PS), netip.AddrPortFrom(s.Params.UE, s.Ports.UC), msg))
		return
	}
	if how == byUDP {
		w.countOut(ims.GmProtected, ims.UDP, method, msg)
		w.count(w.eg.SendUDP(
			netip.AddrPortFrom(s.Local, s.Ports.PC), netip.AddrPortFrom(s.Params.UE, s.Ports.US), msg))
		return
	}
	w.countOut(ims.GmProtected, ims.TCP, method, msg)
	first, second := s.ConnIn, s.ConnOut
	if how == byConnOut {
		first, second = second, first
	}
	if first != 0 && w.eg.SendTCP(first, msg) == nil {
		return
	}
	if second != 0 && w.eg.SendTCP(second, msg) == nil {
		return
	}
	w.dialUE(s, msg, func() { w.obs.Drop(observe.ReasonUEUnreachable) })
}

// countOut counts a message that goes out. A method of MethodOther means an answer to the current request.
func (w *Worker) countOut(side ims.Side, t ims.Transport, method sipmsg.Method, msg []byte) {
	if method == sipmsg.MethodOther {
		method = w.m.CSeqMethod()
	}
	w.obs.Message(observe.Out, side, t, method, codeClass(msg))
}

// dialUE opens the connection pc to us of a set and queues the message for it.
func (w *Worker) dialUE(s *registrar.Set, msg []byte, fail func()) {
	d := w.ueDial[s]
	if d == nil {
		d = w.newDial()
		d.set = s
		w.ueDial[s] = d
		w.eg.Dial(netip.AddrPortFrom(s.Local, s.Ports.PC), netip.AddrPortFrom(s.Params.UE, s.Ports.US),
			ims.GmProtected, true, d.tag)
	}
	w.enqueue(d, msg, fail)
}

func (w *Worker) newDial() *dial {
	w.nextTag++
	d := &dial{tag: w.nextTag}
	w.dials[d.tag] = d
	return d
}

func (w *Worker) enqueue(d *dial, msg []byte, fail func()) {
	if len(d.queue) >= maxQueued {
		w.obs.Drop(observe.ReasonBusy)
		if fail != nil {
			fail()
		}
		return
	}
	d.queue = append(d.queue, queued{append([]byte(nil), msg...), fail})
}

// Dialed is told how opening a connection ended.
func (w *Worker) Dialed(tag uint64, c ims.ConnID, f ims.Flow, err error) {
	d := w.dials[tag]
	if d == nil {
		if err == nil {
			w.eg.CloseConn(c, true) // its set is gone
		}
		return
	}
	if err == nil && d.set != nil {
		w.adopt(f, d.set)
	}
	if err == nil && d.set == nil {
		w.mwConn[d.peer], w.mwPeer[c] = c, d.peer
	}
	w.dialDone(d, c, err)
}

func (w *Worker) dialDone(d *dial, c ims.ConnID, err error) {
	delete(w.dials, d.tag)
	if d.set != nil {
		delete(w.ueDial, d.set)
	} else {
		delete(w.mwDial, d.peer)
	}
	for _, q := range d.queue {
		if err == nil && w.eg.SendTCP(c, q.msg) == nil {
			continue
		}
		if q.fail != nil {
			q.fail()
		}
	}
}

// sendToCore sends a message to a hop on the Mw side. fail is called, now or later, when it cannot be delivered to a
// connection; it may be nil.
func (w *Worker) sendToCore(h ims.Hop, msg []byte, method sipmsg.Method, fail func()) {
	w.countOut(ims.Mw, h.Transport, method, msg)
	if h.Transport == ims.UDP {
		w.count(w.eg.SendUDP(w.mwAddr(h.Addr.Addr()), h.Addr, msg))
		return
	}
	if c := w.mwConn[h.Addr]; c != 0 && w.eg.SendTCP(c, msg) == nil {
		return
	}
	d := w.mwDial[h.Addr]
	if d == nil {
		if len(w.mwDial) >= maxFwdPeers {
			w.obs.Drop(observe.ReasonBusy)
			if fail != nil {
				fail()
			}
			return
		}
		d = w.newDial()
		d.peer = h.Addr
		w.mwDial[h.Addr] = d
		w.eg.Dial(netip.AddrPortFrom(w.mwAddr(h.Addr.Addr()).Addr(), 0), h.Addr, ims.Mw, false, d.tag)
	}
	w.enqueue(d, msg, fail)
}
