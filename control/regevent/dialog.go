package regevent

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/reginfo"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// Specification constants.
const (
	// Package is the event package (RFC 3680 §4.1).
	Package = "reg"

	maxForwards = "70" // RFC 3261 §8.1.1.6
)

// maxRoutes bounds the route set.
const maxRoutes = 16

// Errors of NewDialog and Dialog.Accepted.
var (
	ErrTarget = errors.New("not a URI to subscribe to")
	ErrRoute  = errors.New("not a route")
	ErrValue  = errors.New("not fit for a header field")
	// ErrForked: the answer belongs to another dialog than the one that the first NOTIFY or answer has made. There is
	// only one (RFC 3680 §4.9).
	ErrForked = errors.New("answer of another dialog")
)

// Local is the P-CSCF as the core sees it. All of it is ours, not received from anywhere.
type Local struct {
	URI       string // SIP URI of the P-CSCF: From and P-Asserted-Identity (TS 24.229 §5.2.3)
	Contact   string // SIP URI that NOTIFY requests are sent to; its user part may name the UE
	SentBy    netip.AddrPort
	Transport ims.Transport
}

// Request is what differs from one SUBSCRIBE to the next.
type Request struct {
	Branch   string // with the magic cookie (RFC 3261 §8.1.1.7)
	Expires  uint32 // seconds
	Charging string // value of P-Charging-Vector; empty: no such header field
}

// Dialog is the dialog of one subscription (RFC 6665 §4.4.1). Make it with NewDialog for every Subscribe action that is
// not InDialog.
type Dialog struct {
	target    string // the default public identity: To, and Request-URI until the dialog exists
	callID    string
	localTag  string
	remoteTag string // empty until the dialog exists
	remote    string // remote target, RFC 3261 §12
	routes    []string
	localSeq  uint32
	remoteSeq uint32
	notified  bool // remoteSeq is valid
	answered  int  // status of the answer to remoteSeq
}

// NewDialog prepares a subscription to the registration state of a public identity. callID and tag must be unique;
// routes are the URIs of a preloaded route, such as the Service-Route, and may be none.
func NewDialog(identity, callID, tag string, routes []string) (*Dialog, error) {
	if u, err := sipmsg.ParseURI([]byte(identity)); err != nil || !u.IsSIP() && !u.IsTel() {
		return nil, fmt.Errorf("%w: %q", ErrTarget, identity)
	}
	if !printable(callID) || !printable(tag) {
		return nil, fmt.Errorf("%w: Call-ID %q, tag %q", ErrValue, callID, tag)
	}
	if len(routes) > maxRoutes {
		return nil, fmt.Errorf("%w: %d entries", ErrRoute, len(routes))
	}
	for _, r := range routes {
		if !sipURI([]byte(r)) {
			return nil, fmt.Errorf("%w: %q", ErrRoute, r)
		}
	}
	return &Dialog{target: identity, callID: callID, localTag: tag, remote: identity, routes: slices.Clone(routes)}, nil
}

// CallID returns the Call-ID, by which a NOTIFY finds its dialog.
func (d *Dialog) CallID() string { return d.callID }

// NextHop returns the URI that decides where the next SUBSCRIBE is sent: the first route, else the remote target.
func (d *Dialog) NextHop() string {
	if len(d.routes) > 0 {
		return d.routes[0]
	}
	return d.remote
}

// Established reports whether the dialog exists: an answer or a NOTIFY has come.
func (d *Dialog) Established() bool { return d.remoteTag != "" }

// Subscribe appends the next SUBSCRIBE of the dialog to dst (TS 24.229 §5.2.3, RFC 6665 §4.1.2).
func (d *Dialog) Subscribe(dst []byte, l *Local, r Request) []byte {
	d.localSeq++
	dst = rows(dst, "SUBSCRIBE ", d.remote, " SIP/2.0\r\nVia: SIP/2.0/", l.Transport.Via(), " ", hostPort(l.SentBy),
		";branch=", r.Branch, "\r\nMax-Forwards: ", maxForwards, "\r\n")
	for _, route := range d.routes {
		dst = rows(dst, "Route: <", route, ">\r\n")
	}
	dst = rows(dst, "From: <", l.URI, ">;tag=", d.localTag, "\r\nTo: <", d.target, ">")
	if d.remoteTag != "" {
		dst = rows(dst, ";tag=", d.remoteTag)
	}
	dst = rows(dst, "\r\nCall-ID: ", d.callID, "\r\nCSeq: ", decimal(d.localSeq), " SUBSCRIBE\r\nContact: <", l.Contact,
		">\r\nEvent: ", Package, "\r\nAccept: ", reginfo.MediaType, "\r\nExpires: ", decimal(r.Expires),
		"\r\nP-Asserted-Identity: <", l.URI, ">\r\n")
	if r.Charging != "" {
		dst = rows(dst, "P-Charging-Vector: ", r.Charging, "\r\n")
	}
	return rows(dst, "Content-Length: 0\r\n\r\n")
}

// Accepted takes over what a 2xx to a SUBSCRIBE says of the dialog: remote tag and route set once, the remote target each
// time (RFC 3261 §12.1.2, §12.2.1.2).
func (d *Dialog) Accepted(m *sipmsg.Msg) error {
	tag := tagOf(m, sipmsg.To)
	if tag == "" {
		return fmt.Errorf("%w: To has no tag", ErrForked)
	}
	if d.Established() && tag != d.remoteTag {
		return ErrForked
	}
	if !d.Established() {
		routes, err := recordRoutes(m)
		if err != nil {
			return err
		}
		slices.Reverse(routes)
		d.routes, d.remoteTag = routes, tag
	}
	d.retarget(m)
	return nil
}

// retarget takes over the Contact of a message that refreshes the target. One that is missing or cannot be read leaves
// the old one in place.
func (d *Dialog) retarget(m *sipmsg.Msg) {
	na, err := sipmsg.ParseNameAddr(m.Get(sipmsg.Contact))
	if err == nil && sipURI(na.URI) {
		d.remote = string(na.URI)
	}
}

// ReadAnswer returns the event of an answer to a SUBSCRIBE, and false for a provisional one.
func ReadAnswer(m *sipmsg.Msg) (Event, bool) {
	switch s := m.Status(); {
	case s < 200:
		return Event{}, false
	case s < 300:
		e := Event{Kind: Accepted}
		e.Expires, e.HasExpires = sipmsg.ParseUint(m.Get(sipmsg.Expires))
		return e, true
	default:
		e := Event{Kind: Refused, Status: s, RetryAfter: leading(m.Get(sipmsg.RetryAfter))}
		e.MinExpires, _ = sipmsg.ParseUint(m.Get(sipmsg.MinExpires))
		return e, true
	}
}

// Verdict is what becomes of a NOTIFY.
type Verdict struct {
	// Status, if not 0, is the answer, and that is all.
	Status int
	// Event goes to Next, after Body has been set.
	Event Event
}

// Process reports whether the NOTIFY is one for Next.
func (v Verdict) Process() bool { return v.Status == 0 }

// Notify checks a NOTIFY against the dialog, which the first one establishes if no answer has (RFC 6665 §4.4.1). The
// event has Body Unsupported for what is no reginfo document, and Document for what claims to be one: the caller parses
// it and says Malformed if it is not.
func (d *Dialog) Notify(m *sipmsg.Msg) Verdict {
	tag := tagOf(m, sipmsg.From)
	if !m.IsRequest() || m.Method() != sipmsg.MethodNotify || string(m.Get(sipmsg.CallID)) != d.callID ||
		tagOf(m, sipmsg.To) != d.localTag || tag == "" || d.Established() && tag != d.remoteTag {
		return Verdict{Status: 481} // also for a second dialog of a forked SUBSCRIBE: RFC 3680 §4.9
	}
	if event, _ := cutParams(m.Get(sipmsg.Event)); string(event) != Package {
		return Verdict{Status: 489}
	}
	seq, _ := m.CSeq()
	switch {
	case d.notified && seq < d.remoteSeq:
		return Verdict{Status: 500} // RFC 3261 §12.2.2
	case d.notified && seq == d.remoteSeq:
		return Verdict{Status: max(d.answered, 200)} // a retransmission: it gets the same answer, and changes nothing
	}
	e, ok := readState(m.Get(sipmsg.SubscriptionState))
	if !ok {
		return Verdict{Status: 400}
	}
	if !d.Established() {
		routes, err := recordRoutes(m)
		if err != nil {
			return Verdict{Status: 400}
		}
		d.routes, d.remoteTag = routes, tag
	}
	d.remoteSeq, d.notified, d.answered = seq, true, 0
	d.retarget(m)
	if len(m.Body()) > 0 {
		e.Body = Unsupported
		encoding := m.Get(sipmsg.ContentEncoding)
		if media, _ := cutParams(m.Get(sipmsg.ContentType)); sipmsg.EqualFold(media, reginfo.MediaType) &&
			(len(encoding) == 0 || sipmsg.EqualFold(encoding, "identity")) {
			e.Body = Document
		}
	}
	return Verdict{Event: e}
}

// readState reads Subscription-State (RFC 6665 §8.2.3). It reports false for a state that it does not know.
func readState(v []byte) (Event, bool) {
	state, params := cutParams(v)
	var e Event
	switch {
	case sipmsg.EqualFold(state, "active"):
		e.Kind = NotifyActive
	case sipmsg.EqualFold(state, "pending"):
		e.Kind = NotifyPending
	case sipmsg.EqualFold(state, "terminated"):
		e.Kind = NotifyTerminated
		reason, _ := sipmsg.Param(params, "reason")
		for i := 1; i < len(reasonNames); i++ {
			if sipmsg.EqualFold(reason, reasonNames[i]) {
				e.Reason = Reason(i)
			}
		}
		after, _ := sipmsg.Param(params, "retry-after")
		e.RetryAfter, _ = sipmsg.ParseUint(after)
		return e, true
	default:
		return Event{}, false
	}
	if expires, ok := sipmsg.Param(params, "expires"); ok {
		e.Expires, e.HasExpires = sipmsg.ParseUint(expires)
	}
	return e, true
}

var phrases = map[int]string{
	200: "OK", 400: "Bad Request", 415: "Unsupported Media Type", 481: "Call/Transaction Does Not Exist",
	489: "Bad Event", 500: "Server Internal Error",
}

// Answer appends the answer to a NOTIFY that came from this address to dst. On UDP it is sent there too, or to the
// sent-by of the Via; on TCP on the connection of the request (RFC 3261 §18.2.2).
func (d *Dialog) Answer(dst []byte, l *Local, m *sipmsg.Msg, from netip.AddrPort, status int) []byte {
	if seq, _ := m.CSeq(); d.notified && seq == d.remoteSeq {
		d.answered = status
	}
	phrase := phrases[status]
	if phrase == "" {
		phrase = "Status " + strconv.Itoa(status)
	}
	dst = rows(dst, "SIP/2.0 ", strconv.Itoa(status), " ", phrase, "\r\n")
	top := true
	for _, r := range m.Rows() {
		v := m.Value(r)
		switch r.ID {
		case sipmsg.Via:
			dst = rows(dst, "Via: ")
			if top {
				dst = received(dst, v, from)
			} else {
				dst = append(dst, v...)
			}
			top = false
			dst = rows(dst, "\r\n")
		case sipmsg.RecordRoute: // RFC 3261 §12.1.1: the NOTIFY may establish the dialog
			if status/100 == 2 {
				dst = rows(dst, "Record-Route: ", string(v), "\r\n")
			}
		case sipmsg.From, sipmsg.CallID, sipmsg.CSeq:
			dst = rows(dst, r.ID.String(), ": ", string(v), "\r\n")
		case sipmsg.To:
			dst = rows(dst, "To: ", string(v))
			if tagOf(m, sipmsg.To) == "" {
				dst = rows(dst, ";tag=", d.localTag)
			}
			dst = rows(dst, "\r\n")
		default:
		}
	}
	switch status {
	case 200:
		dst = rows(dst, "Contact: <", l.Contact, ">\r\n")
	case 415:
		dst = rows(dst, "Accept: ", reginfo.MediaType, "\r\n")
	case 489:
		dst = rows(dst, "Allow-Events: ", Package, "\r\n") // RFC 6665 §8.3.2
	}
	return rows(dst, "Content-Length: 0\r\n\r\n")
}

// received copies a Via value whose first element gets received and rport from where the request came (RFC 3261
// §18.2.1, RFC 3581 §4).
func received(dst, value []byte, from netip.AddrPort) []byte {
	v, err := sipmsg.ParseVia(value)
	if err != nil {
		return append(dst, value...)
	}
	addr := from.Addr().Unmap()
	type splice struct {
		at   sipmsg.Span
		text string
	}
	var splices []splice
	if v.HasRPort && v.RPort == 0 {
		splices = append(splices, splice{v.RPortAt, "rport=" + strconv.Itoa(int(from.Port()))})
	}
	host, ok := sipmsg.ParseAddr(v.Host)
	switch {
	case v.Received != nil: // only we know where the packet came from
		splices = append(splices, splice{v.ReceivedAt, "received=" + addr.String()})
	case v.HasRPort || !ok || host != addr:
		splices = append(splices, splice{sipmsg.Span{Start: v.Len, End: v.Len}, ";received=" + addr.String()})
	}
	slices.SortFunc(splices, func(a, b splice) int { return a.at.Start - b.at.Start })
	at := 0
	for _, s := range splices {
		dst = append(append(dst, value[at:s.at.Start]...), s.text...)
		at = s.at.End
	}
	return append(dst, value[at:]...)
}

// recordRoutes returns the URIs of Record-Route in the order of the message.
func recordRoutes(m *sipmsg.Msg) ([]string, error) {
	var routes []string
	for _, r := range m.Rows() {
		if r.ID != sipmsg.RecordRoute {
			continue
		}
		for v := m.Value(r); len(v) > 0; {
			var elem []byte
			if elem, v = sipmsg.Element(v); len(elem) == 0 {
				continue
			}
			na, err := sipmsg.ParseNameAddr(elem)
			if err != nil || !sipURI(na.URI) {
				return nil, fmt.Errorf("%w: Record-Route %q", ErrRoute, elem)
			}
			if len(routes) == maxRoutes {
				return nil, fmt.Errorf("%w: more than %d entries of Record-Route", ErrRoute, maxRoutes)
			}
			routes = append(routes, string(na.URI))
		}
	}
	return routes, nil
}

// sipURI reports whether b is a URI that a request can be sent to. Such a URI has neither white space nor brackets.
func sipURI(b []byte) bool {
	u, err := sipmsg.ParseURI(b)
	return err == nil && u.IsSIP()
}

// tagOf returns the tag of From or To, empty if there is none or one that cannot be repeated.
func tagOf(m *sipmsg.Msg, id sipmsg.HeaderID) string {
	na, err := sipmsg.ParseNameAddr(m.Get(id))
	if err != nil {
		return ""
	}
	tag, _ := sipmsg.Param(na.Params, "tag")
	if s := string(tag); printable(s) {
		return s
	}
	return ""
}

// printable reports whether s can stand as a token or word in a header field: no white space, separators of lists or
// parameters, or control characters.
func printable(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune(`;,"`, r) })
}

// cutParams cuts a value at its parameters.
func cutParams(v []byte) (value, params []byte) {
	i := slices.Index(v, ';')
	if i < 0 {
		i = len(v)
	}
	value, params = v[:i], v[i:]
	for len(value) > 0 && (value[len(value)-1] == ' ' || value[len(value)-1] == '\t') {
		value = value[:len(value)-1]
	}
	return value, params
}

// leading reads the number that a value begins with: Retry-After may go on with a comment or parameters.
func leading(v []byte) uint32 {
	i := 0
	for i < len(v) && v[i] >= '0' && v[i] <= '9' {
		i++
	}
	n, ok := sipmsg.ParseUint(v[:i])
	if !ok && i > 0 {
		return uint32(24 * time.Hour / time.Second) // too large to be meant: a day will do
	}
	return n
}

func hostPort(a netip.AddrPort) string {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port()).String()
}

func decimal(n uint32) string { return strconv.FormatUint(uint64(n), 10) }

func rows(dst []byte, parts ...string) []byte {
	for _, p := range parts {
		dst = append(dst, p...)
	}
	return dst
}
