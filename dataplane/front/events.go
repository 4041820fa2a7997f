package front

import (
	"net"

	"github.com/panjf2000/gnet/v2"
)

// events are gnet's callbacks of one worker.
type events struct {
	gnet.BuiltinEventEngine
	w     *Worker
	swaps []swap     // what goes over the placeholders
	boot  chan error // result of OnBoot
}

// OnBoot puts our sockets in the places of gnet's. It runs after gnet has made its placeholders and before the loop
// watches them.
func (e *events) OnBoot(engine gnet.Engine) gnet.Action {
	e.w.engine = engine
	err := e.adopt(engine)
	e.boot <- err
	if err != nil {
		return gnet.Shutdown
	}
	return gnet.None
}

// OnTraffic handles everything that becomes readable.
func (e *events) OnTraffic(c gnet.Conn) gnet.Action {
	w := e.w
	w.enter()
	defer w.leave()
	if k, ok := c.Context().(*conn); ok {
		w.event()
		b, err := c.Next(-1)
		if err != nil {
			return gnet.None
		}
		return w.stream(k, b)
	}
	fd := c.Fd()
	if fd == w.watch {
		if w.wake() {
			return gnet.Shutdown
		}
		return gnet.None
	}
	w.event()
	s := w.byFD[fd]
	peer, ok := c.RemoteAddr().(*net.UDPAddr)
	if s == nil || !ok {
		return gnet.None
	}
	b, err := c.Next(-1)
	if err != nil {
		return gnet.None
	}
	w.drainUDP(s, addrPortOf(peer), b)
	return gnet.None
}

// OnOpen takes a connection that register has given to the engine.
func (e *events) OnOpen(c gnet.Conn) ([]byte, gnet.Action) {
	k, ok := c.Context().(*conn)
	if !ok {
		return nil, gnet.Close
	}
	e.w.enter()
	defer e.w.leave()
	e.w.event()
	return nil, e.w.open(k, c)
}

// OnClose takes note of a connection's end.
func (e *events) OnClose(c gnet.Conn, _ error) gnet.Action {
	if k, ok := c.Context().(*conn); ok && k.opened.Load() {
		e.w.enter()
		defer e.w.leave()
		e.w.event()
		e.w.gone(k)
	}
	return gnet.None
}
