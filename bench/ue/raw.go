package ue

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/control/ims"
)

// rawSocket is a socket or connection of SendRaw. Whatever arrives on it goes to UE.Stray.
type rawSocket struct {
	udp *net.UDPConn
	tcp *net.TCPConn
}

func (r *rawSocket) close() {
	if r.udp != nil {
		_ = r.udp.Close()
	} else {
		_ = r.tcp.Close()
	}
}

func (r *rawSocket) send(b []byte, to netip.AddrPort) error {
	if r.udp != nil {
		_, err := r.udp.WriteToUDPAddrPort(b, to)
		return err
	}
	if err := r.tcp.SetWriteDeadline(time.Now().Add(rawTimeout)); err != nil {
		return err
	}
	_, err := r.tcp.Write(b)
	return err
}

// rawTimeout bounds how long SendRaw connects and writes.
const rawTimeout = 3 * time.Second

// SendRaw sends bytes from a port of the phone to a port of the P-CSCF, for tests of hostile phones. protected says on
// which side of the SA layer the socket is: what leaves a protected socket for which there is no SA never reaches the
// network; with XFRM both sides are the same namespace and the kernel's policies decide. Port zero as fromPort is an
// ephemeral one. From port-uc and port-us of a live set the phone's own UDP sockets are used. Answers go to Stray.
func (u *UE) SendRaw(protected bool, tr ims.Transport, fromPort, toPort uint16, b []byte) error {
	to := netip.AddrPortFrom(u.farm.cfg.PCSCF.Addr(), toPort)
	if protected && tr == ims.UDP {
		u.mu.Lock()
		var own *net.UDPConn
		if u.server != nil && u.server.port == fromPort {
			own = u.server.udp
		}
		for _, s := range u.sets {
			if s.ports.UC == fromPort {
				own = s.udp
			}
		}
		u.mu.Unlock()
		if own != nil {
			_, err := own.WriteToUDPAddrPort(b, to)
			return err
		}
	}
	key := fmt.Sprintf("%v/%v/%d/%d", protected, tr, fromPort, toPort)
	u.mu.Lock()
	r := u.raw[key]
	u.mu.Unlock()
	if r != nil {
		if err := r.send(b, to); err == nil {
			return nil
		}
		r.close() // the other side closed the connection: once more on a new one
	}
	r, err := u.openRaw(protected, tr, fromPort, to)
	if err != nil {
		return fmt.Errorf("send raw: %w", err)
	}
	u.mu.Lock()
	closed := u.closed
	if !closed {
		u.raw[key] = r
	}
	u.mu.Unlock()
	if closed {
		r.close()
		return ErrClosed
	}
	if err := r.send(b, to); err != nil {
		return fmt.Errorf("send raw: %w", err)
	}
	return nil
}

func (u *UE) openRaw(protected bool, tr ims.Transport, fromPort uint16, to netip.AddrPort) (*rawSocket, error) {
	ns := u.farm.cfg.NS
	if protected {
		ns = u.farm.layer.ns()
	}
	from := netip.AddrPortFrom(u.cfg.Addr, fromPort)
	if tr == ims.UDP {
		c, err := sipwire.ListenUDP(ns, from)
		if err != nil {
			return nil, err
		}
		local := sipwire.LocalAddrPort(c.LocalAddr())
		u.spawn(func() {
			for {
				b, remote, err := sipwire.ReadUDP(c)
				if err != nil {
					if u.ctx.Err() != nil || !sipwire.Temporary(err) {
						return
					}
					continue
				}
				u.noteStray(b, tr, local, remote)
			}
		})
		return &rawSocket{udp: c}, nil
	}
	ctx, cancel := context.WithTimeout(u.ctx, rawTimeout)
	defer cancel()
	c, err := sipwire.DialTCP(ctx, ns, from, to)
	if err != nil {
		return nil, err
	}
	local := sipwire.LocalAddrPort(c.LocalAddr())
	u.spawn(func() {
		r := bufio.NewReader(c)
		for {
			b, ping, pong, err := sipwire.ReadMessage(r)
			switch {
			case errors.Is(err, sipwire.ErrMalformed):
				u.problem("raw TCP from %s: %v", to, err)
				return
			case err != nil:
				return
			case ping || pong:
				b = []byte("\r\n")
			}
			u.noteStray(b, tr, local, to)
		}
	})
	return &rawSocket{tcp: c}, nil
}

// noteStray records what came back; what is no SIP message has no Method.
func (u *UE) noteStray(b []byte, tr ims.Transport, local, remote netip.AddrPort) {
	i := Incoming{At: time.Now(), Transport: tr, Local: local, Remote: remote, Body: string(b)}
	if m, err := sipwire.Parse(b); err == nil {
		i.Method, i.CallID, i.Status, i.msg = m.CSeqMethod(), m.Get("Call-ID"), m.Status, m
	}
	u.note(&u.stray, i)
}
