package proxy

import (
	"cmp"
	"encoding/hex"
	"net/netip"
	"slices"
	"strconv"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// malformed answers what could not be scanned with 400 where a request can be recognized, and counts it otherwise.
func (w *Worker) malformed(f ims.Flow, err error) {
	m := &w.m
	if !m.IsRequest() || m.Method() == sipmsg.MethodAck || !answerable(m) {
		w.obs.Drop(observe.ReasonMalformed)
		return
	}
	var s *registrar.Set
	switch f.Side {
	case ims.GmProtected:
		if s = w.protectedSet(f); s == nil {
			return
		}
		if s.Phase == sa.Temporary && m.Method() != sipmsg.MethodRegister {
			w.obs.Drop(observe.ReasonNoSA)
			return
		}
		if f.Conn != 0 {
			w.adopt(f, s)
		}
	case ims.GmClear:
		if m.Method() != sipmsg.MethodRegister && w.cfg.DropClear {
			w.obs.Drop(observe.ReasonUnprotectedRequest)
			return
		}
	case ims.Mw:
	}
	w.refuse(f, s, 400, "Bad Request", err.Error(), observe.ReasonMalformed)
}

// answerable reports whether an answer to the message can be routed and matched.
func answerable(m *sipmsg.Msg) bool {
	if m.Count(sipmsg.Via) == 0 || m.Count(sipmsg.CallID) != 1 || m.Count(sipmsg.CSeq) != 1 ||
		m.Count(sipmsg.From) != 1 || m.Count(sipmsg.To) != 1 {
		return false
	}
	v, err := sipmsg.ParseVia(m.Get(sipmsg.Via))
	return err == nil && len(v.Branch) > 0
}

// refuse answers the current request with an error, counts it, and says in a Warning what was wrong with it
// (RFC 3261 §20.43). s is the set it came in on, nil for one in clear or from the core. Extra rows end in CRLF.
func (w *Worker) refuse(f ims.Flow, s *registrar.Set, code int, phrase, warning string, why observe.Reason, extra ...string) {
	w.obs.Reject(why)
	if w.m.IsRequest() && w.m.Method() == sipmsg.MethodAck {
		return // an ACK is never answered
	}
	w.out = w.reply(w.out[:0], f, s, code, phrase, warning, extra...)
	w.sendReply(f, s, w.out)
}

// reply writes an answer of our own to the current request.
func (w *Worker) reply(dst []byte, f ims.Flow, s *registrar.Set, code int, phrase, warning string, extra ...string) []byte {
	m := &w.m
	dst = append(dst, "SIP/2.0 "...)
	dst = strconv.AppendInt(dst, int64(code), 10)
	dst = append(dst, ' ')
	dst = append(dst, phrase...)
	dst = append(dst, "\r\n"...)
	first := true
	for _, r := range m.Rows() {
		v := m.Value(r)
		switch r.ID {
		case sipmsg.Via:
			dst = append(dst, "Via: "...)
			if first {
				first = false
				dst = appendReceived(dst, v, f)
			} else {
				dst = append(dst, v...)
			}
			dst = append(dst, "\r\n"...)
		case sipmsg.From, sipmsg.CallID, sipmsg.CSeq:
			dst = appendRow(dst, r.ID.String(), v)
		case sipmsg.To:
			dst = append(dst, "To: "...)
			dst = append(dst, v...)
			if na, err := sipmsg.ParseNameAddr(v); err == nil {
				if _, ok := sipmsg.Param(na.Params, "tag"); !ok {
					dst = append(dst, ";tag="...)
					dst = w.appendTag(dst)
				}
			}
			dst = append(dst, "\r\n"...)
		default:
		}
	}
	for _, x := range extra {
		dst = append(dst, x...)
	}
	if warning != "" {
		dst = append(dst, "Warning: 399 "...)
		dst = append(dst, w.warnAgent(f, s)...)
		dst = append(dst, " \""...)
		dst = appendQuoted(dst, warning)
		dst = append(dst, "\"\r\n"...)
	}
	return append(dst, "Content-Length: 0\r\n\r\n"...)
}

func appendRow(dst []byte, name string, value []byte) []byte {
	dst = append(dst, name...)
	dst = append(dst, ": "...)
	dst = append(dst, value...)
	return append(dst, "\r\n"...)
}

// appendQuoted writes the inside of a quoted string: parts of bad input may stand in a warning.
func appendQuoted(dst []byte, s string) []byte {
	for i := range len(s) {
		switch c := s[i]; {
		case c == '"' || c == '\\':
			dst = append(dst, '\\', c)
		case c < ' ' || c == 0x7f:
			dst = append(dst, '?')
		default:
			dst = append(dst, c)
		}
	}
	return dst
}

// appendTag writes a To tag that is the same for every retransmission of the request, as a server without transaction
// state must (RFC 3261 §8.2.7).
func (w *Worker) appendTag(dst []byte) []byte {
	m := &w.m
	v, _ := sipmsg.ParseVia(m.Get(sipmsg.Via))
	var b [8]byte
	put64(b[:], w.seal.mac(&w.sc, []byte("tag"), v.Branch, m.Get(sipmsg.CallID), m.Get(sipmsg.From)))
	return hex.AppendEncode(dst, b[:6])
}

// warnAgent names us in a Warning as the peer sees us.
func (w *Worker) warnAgent(f ims.Flow, s *registrar.Set) string {
	if s != nil {
		return netip.AddrPortFrom(s.Params.Local, s.Ports.PS).String()
	}
	return f.Local.String()
}

// appendReceived copies a Via value whose first element gets received and rport filled in from the packet's source
// (RFC 3261 §18.2.1, RFC 3581 §4).
func appendReceived(dst, value []byte, f ims.Flow) []byte {
	v, err := sipmsg.ParseVia(value)
	if err != nil {
		return append(dst, value...)
	}
	from := f.Remote.Addr()
	type fill struct {
		start, end int
		text       string
	}
	fills := make([]fill, 0, 2)
	if v.HasRPort && v.RPort == 0 {
		fills = append(fills, fill{v.RPortAt.End, v.RPortAt.End, "=" + strconv.Itoa(int(f.Remote.Port()))})
	}
	switch {
	case v.Received != nil:
		fills = append(fills, fill{v.ReceivedAt.Start, v.ReceivedAt.End, "received=" + from.String()})
	case needsReceived(&v, from):
		fills = append(fills, fill{v.Len, v.Len, ";received=" + from.String()})
	}
	slices.SortFunc(fills, func(a, b fill) int { return a.start - b.start })
	at := 0
	for _, x := range fills {
		dst = append(append(dst, value[at:x.start]...), x.text...)
		at = x.end
	}
	return append(dst, value[at:]...)
}

// needsReceived reports whether a top Via without received must get one: it does not name the address that the packet
// came from, or asks for the port.
func needsReceived(v *sipmsg.ViaParm, from netip.Addr) bool {
	a, ok := sipmsg.ParseAddr(v.Host)
	return v.HasRPort || !ok || a != from
}

// sendReply sends an answer of our own the way the request came: never in clear for a protected one.
func (w *Worker) sendReply(f ims.Flow, s *registrar.Set, msg []byte) {
	switch {
	case s != nil:
		w.sendToUE(s, w.channelOf(f, s), msg, sipmsg.MethodOther)
	case f.Conn != 0:
		w.count(w.eg.SendTCP(f.Conn, msg))
		w.obs.Message(observe.Out, f.Side, ims.TCP, w.m.CSeqMethod(), codeClass(msg))
	default:
		v, err := sipmsg.ParseVia(w.m.Get(sipmsg.Via))
		if err != nil {
			w.obs.Drop(observe.ReasonMalformed)
			return
		}
		if f.Transport == ims.TCP { // handed over by the worker that has the connection
			to := netip.AddrPortFrom(f.Remote.Addr(), cmp.Or(v.Port, defaultPort)) // RFC 3261 §18.2.2
			w.sendToCore(ims.Hop{Addr: to, Transport: ims.TCP}, msg, sipmsg.MethodOther, nil)
			return
		}
		w.count(w.eg.SendUDP(f.Local, clearTarget(&v, f), msg))
		w.obs.Message(observe.Out, f.Side, ims.UDP, w.m.CSeqMethod(), codeClass(msg))
	}
}

// clearTarget returns where the answer to a clear UDP request goes: the address it came from; the port it came from if
// rport asks so (RFC 3581 §4), else that of the sent-by (RFC 3261 §18.2.2).
func clearTarget(v *sipmsg.ViaParm, f ims.Flow) netip.AddrPort {
	switch {
	case v.HasRPort:
		return f.Remote
	case v.Port != 0:
		return netip.AddrPortFrom(f.Remote.Addr(), v.Port)
	}
	return netip.AddrPortFrom(f.Remote.Addr(), defaultPort)
}

const defaultPort = 5060

// codeClass reads the class of the status in an answer that we wrote.
func codeClass(msg []byte) uint8 {
	if len(msg) > 8 && msg[0] == 'S' {
		return msg[8] - '0'
	}
	return 0
}

func (w *Worker) count(err error) {
	if err != nil {
		w.obs.Drop(observe.ReasonSendFailed)
	}
}
