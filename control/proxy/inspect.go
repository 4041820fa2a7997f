package proxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// What operators look at and do lives on the loops of the workers. A request visits them one after the other and takes
// its answers away as plain data; one turn on a loop is bounded, so that a question about 100,000 phones holds no
// message up.

// ErrWorkerGone says that an event loop has ended, or has too much to do to answer.
var ErrWorkerGone = errors.New("worker does not answer")

// UEID names a UE context of the process. It is never given out again for another phone while the process lives, until
// the generation of its place wraps.
type UEID struct {
	Worker int
	Index  uint32 // never zero
	Gen    uint16
}

// IsValid reports whether the id names anything.
func (id UEID) IsValid() bool { return id.Index != 0 }

// String returns the form that ParseUEID reads.
func (id UEID) String() string {
	return strconv.Itoa(id.Worker) + "-" + strconv.FormatUint(uint64(id.Index), 10) + "-" + strconv.FormatUint(uint64(id.Gen), 10)
}

// ParseUEID reads worker-index-generation.
func ParseUEID(s string) (UEID, error) {
	worker, rest, _ := strings.Cut(s, "-")
	index, gen, _ := strings.Cut(rest, "-")
	w, err1 := strconv.ParseUint(worker, 10, 8)
	i, err2 := strconv.ParseUint(index, 10, 24)
	g, err3 := strconv.ParseUint(gen, 10, 16)
	if err1 != nil || err2 != nil || err3 != nil || i == 0 {
		return UEID{}, fmt.Errorf("%q is not the id of a UE: worker-index-generation", s)
	}
	return UEID{Worker: int(w), Index: uint32(i), Gen: uint16(g)}, nil
}

// UEInfo is a UE context at one moment.
type UEInfo struct {
	ID           UEID
	IMPI         string
	Addr         netip.Addr
	Local        netip.Addr
	State        registrar.State
	Emergency    bool // its emergency registration
	Clear        bool // registered in clear: its sets are address associations, without SAs
	Identities   []string
	Contact      string
	ServiceRoute []string
	NextHop      ims.Hop   // not valid until resolved
	Expires      time.Time // of the registration; zero: never registered
	Current      uint64    // id of the set that requests to the UE take; zero: none
	Sets         []SetInfo // oldest first

	Witnessed   bool       // whether anybody looks at its ESP packets
	ESP         sa.Traffic // what was seen of them, before they were verified
	LastMessage time.Time  // when its last SIP message came in, to the second; zero: none since the process started
	LastSeen    time.Time  // the later one of that and its last ESP packet
}

// SetInfo is an SA set at one moment. It has no keys.
type SetInfo struct {
	ID       uint64
	Label    uint32 // that its SAs were installed with
	Phase    sa.Phase
	Ending   bool // told to go, waits for its grace
	Ports    ims.Ports
	SPIs     ims.SPIs
	Suite    ims.Suite
	Deadline time.Time
	Over     uint64 // id of the set that its first REGISTER came over; zero: in clear, or that set has gone
	TCP      bool   // the UE prefers TCP on it
	Used     bool   // the UE has used it
	ConnIn   ims.ConnID
	ConnOut  ims.ConnID

	FirstESP  time.Time // when the first ESP packet came in, before it was verified; zero: none, or nobody looks
	Heard     time.Time // when the last message came in that had been verified, to the second; zero: none since the process started
	Diagnosis Diagnosis
}

// Diagnosis says what is odd about an SA set.
type Diagnosis uint8

// Diagnoses.
const (
	DiagnosisNoESP       Diagnosis = iota + 1 // a temporary set that the phone has sent nothing on
	DiagnosisNotAccepted                      // ESP packets come in, but the backend has accepted no message of them
)

// String returns the words for operators; none for zero.
func (d Diagnosis) String() string {
	switch d {
	case 0:
		return ""
	case DiagnosisNoESP:
		return "no ESP yet"
	case DiagnosisNotAccepted:
		return "ESP arrives but is not accepted"
	}
	return fmt.Sprintf("Diagnosis(%#x)", uint8(d))
}

// acceptTime is how long the backend and the phone's TCP may take from the first ESP packet to the first whole message.
const acceptTime = 2 * time.Second

// UEQuery chooses UE contexts: those for which every field holds that is not zero.
type UEQuery struct {
	ID      UEID
	IMPI    string
	IMPU    string // with or without its scheme
	Addr    netip.Addr
	Contact netip.AddrPort // in the Contact, or the UE's address with a protected port of it
}

// matches reports whether the query chooses a UE.
func (q *UEQuery) matches(u *registrar.UE, worker int) bool {
	return (!q.ID.IsValid() || q.ID == idOf(worker, u)) &&
		(q.IMPI == "" || q.IMPI == u.IMPI) &&
		(!q.Addr.IsValid() || q.Addr == u.Addr) &&
		(q.IMPU == "" || hasIdentity(u, q.IMPU)) &&
		(!q.Contact.IsValid() || hasContact(u, q.Contact))
}

func idOf(worker int, u *registrar.UE) UEID { return UEID{Worker: worker, Index: u.Index, Gen: u.Gen} }

func hasIdentity(u *registrar.UE, impu string) bool {
	return slices.ContainsFunc(u.Identities, func(id string) bool {
		_, bare, _ := strings.Cut(id, ":")
		return strings.EqualFold(id, impu) || strings.EqualFold(bare, impu)
	})
}

func hasContact(u *registrar.UE, at netip.AddrPort) bool {
	if uri, err := sipmsg.ParseURI([]byte(u.Contact)); err == nil {
		if a, ok := sipmsg.ParseAddr(uri.Host); ok && a.Unmap() == at.Addr() && cmp.Or(uri.Port, 5060) == at.Port() {
			return true
		}
	}
	return u.Addr == at.Addr() && slices.ContainsFunc(u.Sets, func(s *registrar.Set) bool {
		return s.Ports.US == at.Port() || s.Ports.UC == at.Port()
	})
}

// turn is what one turn on a loop found.
type turn struct {
	found []UEInfo
	next  uint32 // index to go on from; zero: that was all
}

// look runs on the loop: it visits at most walkTurn contexts from an index on, does what is asked with those that the
// query chooses, and returns at most limit of them as they are then. act reports whether a context is to be returned.
func (w *Worker) look(q *UEQuery, from uint32, limit int, act func(*registrar.UE) bool) (t turn) {
	visit := func(u *registrar.UE) {
		if u.Index < from || !q.matches(u, w.id) {
			return
		}
		if len(t.found) == limit { // the first one too many says where to go on
			if t.next == 0 {
				t.next = u.Index
			}
			return
		}
		if act(u) {
			t.found = append(t.found, w.info(u))
		}
	}
	var few []*registrar.UE
	switch {
	case q.ID.IsValid():
		if u := w.table.Lookup(q.ID.Index, q.ID.Gen); u != nil && q.ID.Worker == w.id {
			few = append(few, u)
		}
	case q.IMPI != "":
		few = w.table.OfIMPI(q.IMPI)
	case q.Addr.IsValid():
		few = w.table.AtAddr(q.Addr)
	default:
		next := w.table.Walk(from, walkTurn, visit)
		if t.next == 0 {
			t.next = next
		}
		return t
	}
	for _, u := range few {
		visit(u)
	}
	return t
}

// diagnose says what is odd about a set whose first ESP packet came in at a time; zero: none has. An established set has
// brought an authenticated REGISTER, so there is nothing to be said about its keys.
func (w *Worker) diagnose(s *registrar.Set, first time.Time) Diagnosis {
	switch {
	case w.cfg.Witness == nil || s.Clear || s.Phase != sa.Temporary || !s.Heard().IsZero():
		return 0
	case first.IsZero():
		return DiagnosisNoESP
	case first.Before(w.began): // what came in then, the process before this one may have heard
		return 0
	case w.eg.Now().Sub(first) >= acceptTime:
		return DiagnosisNotAccepted
	}
	return 0
}

// traffic returns what was seen of the ESP packets of a UE: of all its labels, since sets that have come from another worker
// keep theirs.
func (w *Worker) traffic(u *registrar.UE) (sum sa.Traffic) {
	for i, s := range u.Sets {
		if s.Clear || slices.ContainsFunc(u.Sets[:i], func(o *registrar.Set) bool { return o.Label == s.Label }) {
			continue
		}
		t := w.cfg.Witness.Traffic(s.Label)
		sum.Packets, sum.Bytes, sum.Last = sum.Packets+t.Packets, sum.Bytes+t.Bytes, later(sum.Last, t.Last)
	}
	return sum
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// info copies a UE context.
func (w *Worker) info(u *registrar.UE) UEInfo {
	i := UEInfo{
		ID: idOf(w.id, u), IMPI: u.IMPI, Addr: u.Addr, Local: u.Local, State: u.State, Emergency: u.Emergency, Clear: u.Clear,
		Identities: slices.Clone(u.Identities), Contact: u.Contact, ServiceRoute: slices.Clone(u.Routes()),
		NextHop: u.NextHop, Expires: u.Expires, Sets: make([]SetInfo, len(u.Sets)),
	}
	if u.Current != nil {
		i.Current = u.Current.ID
	}
	i.LastMessage = u.Heard()
	if i.Witnessed = w.cfg.Witness != nil; i.Witnessed {
		i.ESP = w.traffic(u)
	}
	i.LastSeen = later(i.ESP.Last, i.LastMessage)
	for k, s := range u.Sets {
		var first time.Time
		if i.Witnessed && !s.Clear {
			first = w.cfg.Witness.First(s.ID)
		}
		i.Sets[k] = SetInfo{
			ID: s.ID, Label: s.Label, Phase: s.Phase, Ending: s.Dropped(), Ports: s.Ports, SPIs: s.SPIs, Suite: s.Keys.Suite,
			Deadline: s.Deadline, TCP: s.OverTCP, Used: s.Used, ConnIn: s.ConnIn, ConnOut: s.ConnOut,
			FirstESP: first, Heard: s.Heard(), Diagnosis: w.diagnose(s, first),
		}
		if s.Over != nil {
			i.Sets[k].Over = s.Over.ID
		}
	}
	return i
}

// byID returns the workers in the order of their number.
func (f *Fleet) byID() []*Worker {
	f.mu.RLock()
	workers := slices.Clone(f.workers)
	f.mu.RUnlock()
	slices.SortFunc(workers, func(a, b *Worker) int { return a.id - b.id })
	return workers
}

// ask runs f on the loop of a worker and waits for what it returns. When ctx ends before, f may still run, or not at all.
func ask[T any](ctx context.Context, w *Worker, f func() T) (T, error) {
	var none T
	answer := make(chan T, 1)
	if err := w.eg.Post(func() {
		if ctx.Err() == nil {
			answer <- f()
		}
	}); err != nil {
		return none, fmt.Errorf("%w: %d: %w", ErrWorkerGone, w.id, err)
	}
	select {
	case v := <-answer:
		return v, nil
	case <-ctx.Done():
		return none, fmt.Errorf("%w: %d: %w", ErrWorkerGone, w.id, ctx.Err())
	}
}

// each goes through the contexts of all workers that a query chooses, in the order of worker and index, from the one
// behind an id on. got is called with what each turn found; what it returns is how many more the next one may find, none
// ends it.
func (f *Fleet) each(ctx context.Context, q UEQuery, after UEID, limit int, act func(*Worker, *registrar.UE) bool,
	got func(t turn, worker int) (limit int),
) error {
	q.IMPI = canonicalIMPI(q.IMPI)
	for _, w := range f.byID() {
		if w.id < after.Worker || q.ID.IsValid() && q.ID.Worker != w.id {
			continue
		}
		from := uint32(1)
		if w.id == after.Worker && after.IsValid() {
			from = after.Index + 1
		}
		for from != 0 {
			at, most := from, limit
			t, err := ask(ctx, w, func() turn {
				return w.look(&q, at, most, func(u *registrar.UE) bool { return act(w, u) })
			})
			if err != nil {
				return err
			}
			if limit = got(t, w.id); limit <= 0 {
				return nil
			}
			from = t.next
		}
	}
	return nil
}

// UEs returns at most limit of the UE contexts that a query chooses, in the order of worker and index, those behind the
// id after, and whether there may be more. Each is as it was at a moment of its own.
func (f *Fleet) UEs(ctx context.Context, q UEQuery, after UEID, limit int) (list []UEInfo, more bool, err error) {
	keep := func(*Worker, *registrar.UE) bool { return true }
	// One more than asked for says whether there are more.
	err = f.each(ctx, q, after, limit+1, keep, func(t turn, _ int) int {
		list = append(list, t.found...)
		return limit + 1 - len(list)
	})
	if err != nil {
		return nil, false, fmt.Errorf("list UEs: %w", err)
	}
	if len(list) > limit {
		return list[:limit:limit], true, nil
	}
	return list, false, nil
}

// Deregister ends the registrations that a query chooses, all identities of the UE with them: what is on its way still
// gets out, then their SAs go (TS 24.229 §5.2.5). It returns the contexts as they are afterwards, without those that
// had ended before. The query must choose something. After an error some may have been ended.
func (f *Fleet) Deregister(ctx context.Context, q UEQuery) (ended []UEInfo, err error) {
	if q == (UEQuery{}) {
		return nil, errors.New("end registrations: the query is empty")
	}
	end := func(w *Worker, u *registrar.UE) bool {
		if u.State == registrar.Deregistered {
			return false
		}
		w.table.Deregister(u, w.cfg.Registrar.OldSet)
		w.unwatch(u, true)
		return true
	}
	err = f.each(ctx, q, UEID{}, walkTurn, end, func(t turn, _ int) int {
		ended = append(ended, t.found...)
		return walkTurn
	})
	if err != nil {
		return ended, fmt.Errorf("end registrations: %w", err)
	}
	return ended, nil
}

// Load is how much one worker has.
type Load struct {
	Worker int
	UEs    int
	SPIs   int // taken from its pool
}

// Loads returns the load of every worker.
func (f *Fleet) Loads(ctx context.Context) ([]Load, error) {
	workers := f.byID()
	loads := make([]Load, len(workers))
	for i, w := range workers {
		l, err := ask(ctx, w, func() Load { return Load{Worker: w.id, UEs: w.table.UEs(), SPIs: w.table.SPIsInUse()} })
		if err != nil {
			return nil, fmt.Errorf("read load: %w", err)
		}
		loads[i] = l
	}
	return loads, nil
}
