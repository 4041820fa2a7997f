package proxy

import (
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"slices"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// Our branch: the magic cookie of RFC 3261 §8.1.1.7, a letter, the sealed token, 16 hex digits that tell transactions
// apart. The digits depend only on what a retransmission, a CANCEL and the ACK of a non-2xx answer repeat (RFC 3261
// §16.11).
const (
	branchMark  = "z9hG4bKg"
	branchLen   = len(branchMark) + tokenLen + 16
	healthMark  = "z9hG4bKh"
	maxForwards = 70 // RFC 3261 §8.1.1.6
)

// putBranch writes our branch into the open splice.
func (w *Worker) putBranch(t token, digits uint64) {
	w.e.Str(branchMark)
	w.e.Raw(w.seal.seal(&w.sc, t))
	w.e.Raw(w.hex64(digits))
}

func (w *Worker) hex64(v uint64) []byte {
	var b [8]byte
	put64(b[:], v)
	w.text = hex.AppendEncode(w.text[:0], b[:])
	return w.text
}

func put64(b []byte, v uint64) { binary.BigEndian.PutUint64(b, v) }

// hintParam is a parameter of our Via that carries what may differ between an INVITE and its CANCEL, and so must not be
// part of the branch: octets in hexadecimal. On requests to the core: the serial of the SA set and the channel, which the
// core is trusted to give back. On requests to a UE: the identity that was called and the transport that the answer takes,
// with a MAC of 32 bits.
const hintParam = "gm"

func (w *Worker) putHint(octets ...byte) {
	w.e.Str(";" + hintParam + "=")
	w.text = hex.AppendEncode(w.text[:0], octets)
	w.e.Raw(w.text)
}

// hintMAC binds the hint of a request to a UE to its transaction.
func (w *Worker) hintMAC(called uint8, t ims.Transport, digits uint64) [4]byte {
	w.text = binary.BigEndian.AppendUint64(append(w.text[:0], "hint"...), digits)
	w.text = append(w.text, called, byte(t))
	m := w.seal.mac(&w.sc, w.text)
	return [4]byte{byte(m >> 24), byte(m >> 16), byte(m >> 8), byte(m)}
}

func (w *Worker) putAnswerHint(called uint8, t ims.Transport, digits uint64) {
	m := w.hintMAC(called, t, digits)
	w.putHint(called, byte(t), m[0], m[1], m[2], m[3])
}

// readHint reads n octets of the parameter out of the top Via of the current answer.
func (w *Worker) readHint(v *sipmsg.ViaParm, n int) (octets [6]byte, ok bool) {
	top := w.m.Get(sipmsg.Via)
	p, ok := sipmsg.Param(top[v.ParamsAt:v.Len], hintParam)
	if !ok || len(p) != 2*n {
		return octets, false
	}
	_, err := hex.Decode(octets[:], p)
	return octets, err == nil
}

// readAnswerHint reads the hint of a request to a UE back.
func (w *Worker) readAnswerHint(v *sipmsg.ViaParm, digits uint64) (called uint8, t ims.Transport, ok bool) {
	h, ok := w.readHint(v, 6)
	if !ok {
		return 0, 0, false
	}
	called, t = h[0], ims.Transport(h[1])
	return called, t, [4]byte(h[2:6]) == w.hintMAC(called, t, digits) && (t == ims.UDP || t == ims.TCP)
}

// readBranch takes our branch apart. It reports false for one that we did not make.
func (w *Worker) readBranch(b []byte) (t token, digits []byte, ok bool) {
	if len(b) != branchLen || string(b[:len(branchMark)]) != branchMark {
		return token{}, nil, false
	}
	t, ok = w.seal.open(&w.sc, b[len(branchMark):len(branchMark)+tokenLen])
	return w.cfg.renamed(t), b[len(branchMark)+tokenLen:], ok
}

// offset returns where a part of the current message begins.
func (w *Worker) offset(part []byte) int {
	at, _ := w.m.Offset(part)
	return at
}

// ownGm reports whether a URI names a Gm address and port of ours.
func (w *Worker) ownGm(u *sipmsg.URI) bool {
	a, ok := sipmsg.ParseAddr(u.Host)
	if !ok {
		return false
	}
	for _, g := range w.cfg.Gm {
		if g != a {
			continue
		}
		if u.Port == w.cfg.GmPort || u.Port == 0 && w.cfg.GmPort == defaultPort {
			return true
		}
		if slices.Contains(w.cfg.Registrar.ServerPorts, u.Port) {
			return true
		}
	}
	return false
}

// ownMw reports whether a URI names the Mw address and port of one of our workers, or of one that there was.
func (w *Worker) ownMw(u *sipmsg.URI) bool {
	port := u.Port
	if port == 0 {
		port = defaultPort
	}
	if port < w.cfg.MwPort || int(port) >= int(w.cfg.MwPort)+max(w.cfg.Workers, w.cfg.MwPorts) {
		return false
	}
	if w.cfg.PathHost != "" && sipmsg.EqualFold(u.Host, w.cfg.PathHost) {
		return true
	}
	a, ok := sipmsg.ParseAddr(u.Host)
	if !ok {
		return false
	}
	return slices.Contains(w.cfg.Mw, a) || a == w.ownIP // peers may write an IPv6 address in another form
}

// routes is the Route set of the current request after our own entries were taken off its top.
type routes struct {
	found bool   // we stood on top
	token []byte // user part of our entry that had one
	first []byte // URI of the next entry, nil if none
	rest  int    // offset in the message where the remaining entries begin; they end with the last row
	more  bool
}

// popRoutes takes our own entries off the top of the Route headers.
func (w *Worker) popRoutes() routes {
	var r routes
	for _, row := range w.m.Rows() {
		if row.ID != sipmsg.Route {
			continue
		}
		v := w.m.Value(row)
		for len(v) > 0 {
			elem, rest := sipmsg.Element(v)
			na, err := sipmsg.ParseNameAddr(elem)
			if err != nil {
				r.more, r.rest, r.first = true, w.offset(elem), elem
				return r
			}
			u, err := sipmsg.ParseURI(na.URI)
			if err != nil || !w.ownGm(&u) && !w.ownMw(&u) {
				r.more, r.rest, r.first = true, w.offset(elem), na.URI
				return r
			}
			r.found = true
			if len(u.User) > 0 {
				r.token = u.User
			}
			v = rest
		}
	}
	return r
}

// putRest writes the remaining Route entries as rows into the open splice.
func (w *Worker) putRest(r *routes) {
	if !r.more {
		return
	}
	for _, row := range w.m.Rows() {
		if row.ID != sipmsg.Route || int(row.ValEnd) <= r.rest {
			continue
		}
		w.e.Str("Route: ")
		w.e.Raw(w.m.Bytes()[max(int(row.ValStart), r.rest):row.ValEnd])
		w.e.Str("\r\n")
	}
}

// forwardsLeft reads Max-Forwards: 70 is assumed where it is missing (RFC 3261 §16.6).
func (w *Worker) forwardsLeft() (int, bool) {
	v := w.m.Get(sipmsg.MaxForwards)
	if v == nil {
		return maxForwards, true
	}
	n := 0
	if len(v) == 0 || len(v) > 3 {
		return 0, false
	}
	for _, c := range v {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + int(c-'0')
	}
	return n, n <= 255
}

// putForwards writes the decremented Max-Forwards into the open splice; its row has been deleted.
func (w *Worker) putForwards(left int) {
	w.e.Str("Max-Forwards: ")
	w.e.Uint(uint64(left - 1))
	w.e.Str("\r\n")
}

// markReceived fills received and rport of the top Via in from the packet's source (RFC 3261 §18.2.1, RFC 3581 §4).
func (w *Worker) markReceived(v *sipmsg.ViaParm, f ims.Flow) {
	row, _ := w.m.First(sipmsg.Via)
	at := int(row.ValStart)
	if v.HasRPort && v.RPort == 0 {
		w.e.Open(at+v.RPortAt.End, at+v.RPortAt.End)
		w.e.Str("=")
		w.e.Uint(uint64(f.Remote.Port()))
		w.e.Close()
	}
	switch from := f.Remote.Addr(); {
	case v.Received != nil: // only we know where the packet came from
		w.e.Open(at+v.ReceivedAt.Start, at+v.ReceivedAt.End)
		w.e.Str("received=")
		w.e.BareAddr(from)
		w.e.Close()
	case needsReceived(v, from):
		w.e.Open(at+v.Len, at+v.Len)
		w.e.Str(";received=")
		w.e.BareAddr(from)
		w.e.Close()
	}
}

// viaBeneath parses the Via under the top one of the current answer.
func (w *Worker) viaBeneath() (sipmsg.ViaParm, bool) {
	n := 0
	for _, row := range w.m.Rows() {
		if row.ID != sipmsg.Via {
			continue
		}
		v := w.m.Value(row)
		if n == 0 {
			_, rest := sipmsg.Element(v)
			if len(rest) == 0 {
				n = 1
				continue
			}
			v = rest
		}
		p, err := sipmsg.ParseVia(v)
		return p, err == nil
	}
	return sipmsg.ViaParm{}, false
}

// answerTarget returns where an answer goes by the Via of its request (RFC 3261 §18.2.2, RFC 3581 §4).
func answerTarget(v *sipmsg.ViaParm) (ims.Hop, bool) {
	host := v.Host
	if len(v.Received) > 0 {
		host = v.Received
	}
	a, ok := sipmsg.ParseAddr(host)
	if !ok {
		return ims.Hop{}, false
	}
	port := v.Port
	if port == 0 {
		port = defaultPort
	}
	t := ims.UDP
	if sipmsg.EqualFold(v.Transport, "TCP") {
		t = ims.TCP
	} else if v.HasRPort && v.RPort != 0 {
		port = v.RPort
	}
	return ims.Hop{Addr: netip.AddrPortFrom(a, port), Transport: t}, true
}

// answerDigits binds our branch on a request to a UE to the transaction of the core and to where its answers go: a UE
// cannot have an answer sent anywhere else.
func (w *Worker) answerDigits(v *sipmsg.ViaParm, h ims.Hop) uint64 {
	var b [18]byte // no transport: some cores send INVITE and CANCEL by different ones
	a := h.Addr.Addr().As16()
	copy(b[:], a[:])
	binary.BigEndian.PutUint16(b[16:], h.Addr.Port())
	w.text = append(w.text[:0], b[:]...)
	return w.seal.mac(&w.sc, w.text, v.Branch)
}

// rewriteRecordRoute changes the address in our own Record-Route entries of an answer to the one that the receiver must
// use: port-ps towards the UE, the Mw port towards the core.
//
// Where both ends of a dialog are phones of ours there are two entries; only the one on the side of this UE changes.
func (w *Worker) rewriteRecordRoute(s *registrar.Set, toUE, tcp bool) {
	ours := w.pathToken(s.UE)
	ours.called = !toUE // an answer that goes to the UE means that it is the calling side
	for _, row := range w.m.Rows() {
		if row.ID != sipmsg.RecordRoute {
			continue
		}
		v := w.m.Value(row)
		for len(v) > 0 {
			elem, rest := sipmsg.Element(v)
			v = rest
			na, err := sipmsg.ParseNameAddr(elem)
			if err != nil {
				continue
			}
			u, err := sipmsg.ParseURI(na.URI)
			if err != nil || len(u.User) != tokenLen || !w.ownGm(&u) && !w.ownMw(&u) {
				continue
			}
			if t, ok := w.seal.open(&w.sc, u.User); !ok || w.cfg.renamed(t) != ours {
				continue
			}
			start := w.offset(u.User) + len(u.User)
			w.e.Open(start, w.offset(na.URI)+len(na.URI))
			w.putSelf(s, toUE, tcp)
			w.e.Close()
		}
	}
}

// putSelf writes "@host:port;params" of our entry in Record-Route and Path as the receiver sees us.
func (w *Worker) putSelf(s *registrar.Set, toUE, tcp bool) {
	w.e.Str("@")
	if toUE {
		w.e.AddrPort(netip.AddrPortFrom(s.Local, s.Ports.PS))
		if tcp {
			w.e.Str(";transport=tcp")
		}
	} else {
		w.putMwHost()
		if w.cfg.MwTransport == ims.TCP {
			w.e.Str(";transport=tcp")
		}
	}
	w.e.Str(";lr")
}

// putMwHost writes our host and port as the core must use them.
func (w *Worker) putMwHost() {
	if w.cfg.PathHost == "" {
		w.e.AddrPort(w.mwAddr(w.cfg.NextHops[0].Addr.Addr()))
		return
	}
	w.e.Str(w.ownName)
	w.e.Str(":")
	w.e.Uint(uint64(w.mwPort))
}

// pathToken is the token of a UE in Path and Record-Route.
func (w *Worker) pathToken(u *registrar.UE) token {
	return token{kind: tokenPath, worker: uint8(w.id), ue: u.Index, gen: u.Gen}
}

// dialogForming reports whether we record-route the request.
func dialogForming(m sipmsg.Method) bool {
	return m == sipmsg.MethodInvite || m == sipmsg.MethodSubscribe || m == sipmsg.MethodRefer
}

// inDialog reports whether the request has a To tag.
func (w *Worker) inDialog() bool {
	na, err := sipmsg.ParseNameAddr(w.m.Get(sipmsg.To))
	if err != nil {
		return false
	}
	_, ok := sipmsg.Param(na.Params, "tag")
	return ok
}

// unknownExtension returns the first option tag of Proxy-Require that we do not understand, nil if there is none.
func (w *Worker) unknownExtension() []byte {
	for _, row := range w.m.Rows() {
		if row.ID != sipmsg.ProxyRequire {
			continue
		}
		v := w.m.Value(row)
		for len(v) > 0 {
			elem, rest := sipmsg.Element(v)
			v = rest
			if len(elem) > 0 && !sipmsg.EqualFold(elem, "sec-agree") && !sipmsg.EqualFold(elem, "mediasec") &&
				!sipmsg.EqualFold(elem, "path") {
				return elem
			}
		}
	}
	return nil
}

// refuseExtension answers 420 (RFC 3261 §16.3).
func (w *Worker) refuseExtension(f ims.Flow, s *registrar.Set, tag []byte) {
	w.refuse(f, s, 420, "Bad Extension", "Proxy-Require: option tag not supported", observe.ReasonBadExtension,
		"Unsupported: "+string(tag)+"\r\n")
}

// finish applies the edits. It reports false, and counts, when they contradict each other.
func (w *Worker) finish() bool {
	var err error
	if w.out, err = w.e.Append(w.out[:0]); err != nil {
		w.obs.Drop(observe.ReasonEditFailed)
		return false
	}
	return true
}
