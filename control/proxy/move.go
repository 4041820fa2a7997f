package proxy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/control/store"
)

// Errors of Fleet.Move.
var (
	ErrNoUE     = errors.New("no such UE")
	ErrNoWorker = errors.New("no such worker")
	// ErrBusy: something is under way at the address of the UE that has to come to its end first. Its text says what.
	ErrBusy = errors.New("UE is busy")
	// ErrFixed: this configuration does not let UEs move.
	ErrFixed = errors.New("UEs cannot be moved")
)

// Implementation constants.
const (
	// maxFormer is how many names of a UE context are remembered beside its present one, as over restarts.
	maxFormer = 16
	// maxParked is how many messages of an address wait for its contexts: those of a moment.
	maxParked = 64
)

// Move gives all UE contexts at the address of a UE to another worker while they are registered, and returns them as they are
// there: the address is what packets are steered by. TCP connections of the phones are reset; phones open new ones. The
// reg-event subscriptions are made anew, as after a restart, and the core's requests and answers that bear the names of before
// are handed over by the worker that gets them. What the core cannot match any more is the CANCEL, or the ACK of a refusal, of an
// INVITE that a phone sent before: it comes from another Mw port.
//
// It happens in three turns on the two loops, and each message of the address is handled once, by the worker that has the
// contexts then:
//
//   - On the new loop, a place for each context is taken. From here on messages of the address wait there, in their order.
//   - On the old loop, Config.Home turns the address over, and the contexts are taken out and posted to the new loop. Nothing is
//     handled in between, so the old worker has handled all it got before, and hands over all it gets later: the front by Home
//     what it reads from its socket, Message what other workers had handed over before. Both come behind the post, since a
//     sender's tasks keep their order. Only after the post the names are known to lead to the new worker, so what the core
//     sends comes behind it as well, whoever hands it over, the new worker to itself included.
//   - On the new loop, the contexts are put in. Then comes what has waited, which is what the new worker's sockets got since Home,
//     and after that what was handed over. A message that waited may overtake one that was read at the old socket.
//
// Of who asks where an identity has SAs, the old worker says that it has them until it has heard of the context's end, the new
// one as soon as it has the context: no moment is without an answer.
//
// Where a step cannot be done the ones before it are undone in the same turn, and messages that have waited go back to the
// old worker. When ctx ends, the move may or may not have happened.
//
// It fails with ErrNoUE, ErrNoWorker, ErrFixed, ErrBusy, or ErrWorkerGone.
func (f *Fleet) Move(ctx context.Context, id UEID, to int) ([]UEInfo, error) {
	m := &move{ctx: ctx, id: id, from: f.worker(id.Worker), to: f.worker(to), done: make(chan moved, 1)}
	switch {
	case m.from == nil || !id.IsValid():
		return nil, fmt.Errorf("move UE %s: %w", id, ErrNoUE)
	case m.to == nil:
		return nil, fmt.Errorf("move UE %s: %w: %d", id, ErrNoWorker, to)
	}
	if err := m.from.eg.Post(m.begin); err != nil {
		return nil, fmt.Errorf("move UE %s: %w: %d: %w", id, ErrWorkerGone, m.from.id, err)
	}
	select {
	case r := <-m.done:
		if r.err != nil {
			return nil, fmt.Errorf("move UE %s: %w", id, r.err)
		}
		return r.ues, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("move UE %s: %w: %w", id, ErrWorkerGone, ctx.Err())
	}
}

// worker returns the worker with a number, nil if it has not booted.
func (f *Fleet) worker(n int) *Worker {
	f.mu.RLock()
	defer f.mu.RUnlock()
	for _, w := range f.workers {
		if w.id == n {
			return w
		}
	}
	return nil
}

// move is one move on its way. Each step runs on the loop that its comment names.
type move struct {
	ctx      context.Context
	id       UEID
	from, to *Worker
	done     chan moved // 1 deep

	addr  netip.Addr
	ues   []*registrar.UE
	impis []string
	names []Name // of the contexts at the new worker
	goods []carried
}

// moved is how a move ended.
type moved struct {
	ues []UEInfo
	err error
}

// carried is what goes from loop to loop: a context, and what a worker keeps beside it.
type carried struct {
	ue     *registrar.UE
	former []store.Freed
	txs    []*regTx // answered REGISTERs over its sets, for their retransmissions
}

func (m *move) fail(err error) { m.done <- moved{err: err} }

// begin runs on the old loop: it looks what there is to move.
func (m *move) begin() {
	w := m.from
	u := w.table.Lookup(m.id.Index, m.id.Gen)
	switch {
	case m.ctx.Err() != nil:
		return // nobody waits
	case u == nil:
		m.fail(ErrNoUE)
		return
	case m.to == w:
		m.done <- moved{ues: []UEInfo{w.info(u)}}
		return
	case w.cfg.Home == nil:
		m.fail(fmt.Errorf("%w: packets cannot be steered", ErrFixed))
		return
	case w.cfg.MwTransport == ims.TCP: // connections cannot follow: for good, all messages would come by the old worker
		m.fail(fmt.Errorf("%w: the core is reached over TCP", ErrFixed))
		return
	}
	m.addr, m.ues = u.Addr, w.table.AtAddr(u.Addr)
	if err := w.settled(m.addr); err != nil {
		m.fail(err)
		return
	}
	for _, o := range m.ues {
		m.impis = append(m.impis, o.IMPI)
	}
	if err := m.to.eg.Post(m.prepare); err != nil {
		m.fail(fmt.Errorf("%w: %d: %w", ErrWorkerGone, m.to.id, err))
	}
}

// settled reports by an error that wraps ErrBusy what is under way of the UEs at an address.
func (w *Worker) settled(addr netip.Addr) error {
	busy := func(why string) error { return fmt.Errorf("%w: %s", ErrBusy, why) }
	if p := w.passages[addr]; p != nil && p.arriving {
		return busy("a move is under way")
	}
	if err := w.table.Settled(addr); err != nil {
		return fmt.Errorf("%w: %w", ErrBusy, err)
	}
	for tx := w.waiting.of(origin{source: registrar.Source(addr)}).oldest; tx != nil; tx = tx.links[inOrigin].newer {
		if tx.flow.Remote.Addr() == addr {
			return busy("a REGISTER is under way")
		}
	}
	for _, u := range w.table.AtAddr(addr) {
		for tx := w.protected.of(origin{ue: u.Index, gen: u.Gen}).oldest; tx != nil; tx = tx.links[inOrigin].newer {
			if tx.final == nil {
				return busy("a REGISTER is under way")
			}
		}
		if tx := w.newest[u.Key()]; tx != nil && tx.final == nil {
			return busy("a REGISTER is under way")
		}
		if w.asking[u.IMPI] != nil {
			return busy("the identity is being asked about")
		}
		for _, s := range u.Sets {
			if w.ueDial[s] != nil {
				return busy("a connection is being opened")
			}
		}
	}
	return nil
}

// passage is what a worker does with messages of an address that is not its own: of one whose contexts it has given away, and
// of one whose contexts are to come.
type passage struct {
	to       int // worker that they were given to
	arriving bool
	from     int // and where from
	parked   []parked
	before   *passage // in force again should they not come
}

// parked is a message that waits.
type parked struct {
	flow ims.Flow
	msg  []byte
}

// passes handles a message of the Gm side if its address is one of another worker.
func (w *Worker) passes(f ims.Flow, b []byte) bool {
	p := w.passages[f.Remote.Addr()]
	switch {
	case p == nil:
		return false
	case p.arriving && len(p.parked) >= maxParked:
		w.obs.Drop(observe.ReasonBusy)
	case p.arriving:
		p.parked = append(p.parked, parked{f, slices.Clone(b)})
	default:
		w.passOn(p.to, f, b)
	}
	return true
}

// passOn gives a message to the worker that owns its address. A connection cannot follow, so the phone has to open another one.
func (w *Worker) passOn(to int, f ims.Flow, b []byte) {
	if f.Conn != 0 {
		w.eg.CloseConn(f.Conn, true)
		return
	}
	if w.eg.Hand(to, f, b) != nil {
		w.obs.Drop(observe.ReasonBusy)
	}
}

// awaits has the current message, which came to the new worker itself and names a context by a token of before, handled again
// behind the context. That is in the queue already, since its name is known.
func (w *Worker) awaits(t token, f ims.Flow) bool {
	if _, ok := w.coming[Name{t.worker, t.ue, t.gen}]; !ok {
		return false
	}
	msg := slices.Clone(w.m.Bytes())
	return w.eg.Post(func() { w.Message(f, msg) }) == nil
}

// prepare runs on the new loop: it takes places for the contexts, and has messages of their address wait.
func (m *move) prepare() {
	w := m.to
	err := w.settled(m.addr)
	switch {
	case err != nil:
	case len(w.table.AtAddr(m.addr)) > 0: // on a connection that has stayed here, say
		err = fmt.Errorf("%w: worker %d has a UE at %s as well", ErrBusy, w.id, m.addr)
	case slices.ContainsFunc(m.impis, func(impi string) bool { return w.asking[impi] != nil }):
		err = fmt.Errorf("%w: the identity is being asked about", ErrBusy)
	}
	for range m.impis {
		index, gen, ok := w.table.Claim()
		if !ok {
			err = fmt.Errorf("%w: worker %d has no place left", ErrBusy, w.id)
			break
		}
		n := Name{uint8(w.id), index, gen} //nolint:gosec // at most 256 workers
		m.names, w.coming[n] = append(m.names, n), struct{}{}
	}
	p := &passage{arriving: true, from: m.from.id, before: w.passages[m.addr]}
	if err == nil {
		w.passages[m.addr] = p
		if err = m.from.eg.Post(m.depart); err == nil {
			return
		}
		err = fmt.Errorf("%w: %d: %w", ErrWorkerGone, m.from.id, err)
	}
	m.cancel(p)
	m.fail(err)
}

// cancel runs on the new loop: it undoes what prepare did.
func (m *move) cancel(p *passage) {
	w := m.to
	for _, n := range m.names {
		w.table.Unclaim(n.UE)
		delete(w.coming, n)
	}
	if w.passages[m.addr] != p {
		return
	}
	delete(w.passages, m.addr)
	if p.before != nil {
		w.passages[m.addr] = p.before
	}
	for _, x := range p.parked {
		w.passOn(p.from, x.flow, x.msg)
	}
}

// abort runs on the old loop: the contexts stay.
func (m *move) abort(err error) {
	m.from.insistOn(m.to, func(w *Worker) {
		m.cancel(w.passages[m.addr])
		m.fail(err)
	}, insistTries)
}

// depart runs on the old loop: it sends the contexts off, or leaves everything as it was.
func (m *move) depart() {
	w := m.from
	if err := m.ctx.Err(); err != nil {
		m.abort(err)
		return
	}
	if err := w.settled(m.addr); err != nil {
		m.abort(err)
		return
	}
	if !slices.Equal(m.ues, w.table.AtAddr(m.addr)) {
		m.abort(fmt.Errorf("%w: a UE has come or gone", ErrBusy))
		return
	}
	if err := w.cfg.Home(m.addr, m.to.id); err != nil {
		_ = w.cfg.Home(m.addr, w.id)
		m.abort(fmt.Errorf("%w: %w", ErrFixed, err))
		return
	}
	var (
		away  []departed
		conns []ims.ConnID // two of each set
	)
	for _, u := range m.ues {
		name := Name{uint8(w.id), u.Index, u.Gen} //nolint:gosec // at most 256 workers
		away = append(away, departed{name: name, impi: u.IMPI, addr: u.Addr, normal: !u.Emergency})
		w.unsubscribed(u)
		for _, s := range u.Sets {
			conns = append(conns, s.ConnIn, s.ConnOut)
			s.ConnIn, s.ConnOut = 0, 0
		}
		m.goods = append(m.goods, carried{ue: u, former: w.former[u], txs: w.detachAnswered(u)})
		delete(w.former, u)
		w.table.Detach(u)
	}
	w.cfg.Fleet.departed.Add(1)
	if err := m.to.eg.Post(m.arrive); err != nil {
		w.cfg.Fleet.departed.Add(-1)
		m.stay(away, conns)
		m.abort(fmt.Errorf("%w: %d: %w", ErrWorkerGone, m.to.id, err))
		return
	}
	// From here on the contexts are the other loop's.
	for i, d := range away {
		w.cfg.Fleet.names.set(d.name, m.names[i])
		w.away[d.impi] = append(w.away[d.impi], d)
	}
	w.passages[m.addr] = &passage{to: m.to.id}
	for _, c := range conns {
		if c != 0 {
			delete(w.conns, c)
			w.eg.CloseConn(c, true) // reset, as when a set ends
		}
	}
}

// stay runs on the old loop: it puts the contexts back, with the connections of their sets.
func (m *move) stay(as []departed, conns []ims.ConnID) {
	w := m.from
	for i, l := range m.goods {
		if len(l.former) > 0 {
			w.former[l.ue] = l.former
		}
		w.table.Attach(l.ue, as[i].name.UE, as[i].name.Gen)
		for _, s := range l.ue.Sets {
			s.ConnIn, s.ConnOut, conns = conns[0], conns[1], conns[2:]
		}
		w.attachAnswered(l.ue, l.txs)
		w.resubscribeUE(l.ue, w.subs.cfg.Spread)
	}
	_ = w.cfg.Home(m.addr, w.id)
}

// arrive runs on the new loop: it takes the contexts in.
func (m *move) arrive() {
	w := m.to
	infos := make([]UEInfo, 0, len(m.goods))
	for i, l := range m.goods {
		u := l.ue
		old := store.Freed{Context: store.Context{Worker: uint16(m.from.id), Index: u.Index}, Gen: u.Gen} //nolint:gosec // at most 256 workers
		former := append(slices.Clone(l.former), old)
		if n := len(former) - maxFormer; n > 0 {
			w.releaseNames(u.IMPI, former[:n])
			former = former[n:]
		}
		w.former[u] = former
		w.table.Attach(u, m.names[i].UE, m.names[i].Gen)
		delete(w.coming, m.names[i])
		w.attachAnswered(u, l.txs)
		if !u.NextHop.IsValid() {
			w.findNextHop(u.Index, u.Gen)
		}
		w.resubscribeUE(u, w.subs.cfg.Spread)
		if w.rules.Clear() {
			w.endClear(u.IMPI) // whoever has asked about it while it was on its way
		}
		infos = append(infos, w.info(u))
		w.log.Info("UE moved", "impi", u.IMPI, "ue", u.Addr, "from_worker", m.from.id)
	}
	w.cfg.Fleet.arrived.Add(1)
	p := w.passages[m.addr]
	delete(w.passages, m.addr)
	m.done <- moved{ues: infos}
	for _, x := range p.parked {
		w.Message(x.flow, x.msg)
	}
}

// detachAnswered takes out the answered REGISTERs that came over sets of a UE; attachAnswered puts them in.
func (w *Worker) detachAnswered(u *registrar.UE) (txs []*regTx) {
	for tx := w.protected.of(origin{ue: u.Index, gen: u.Gen}).oldest; tx != nil; tx = w.protected.of(origin{ue: u.Index, gen: u.Gen}).oldest {
		w.forget(tx)
		txs = append(txs, tx)
	}
	return txs
}

func (w *Worker) attachAnswered(u *registrar.UE, txs []*regTx) {
	for _, tx := range txs {
		if w.protected.n >= maxProtectedAll || w.txs[tx.key] != nil {
			continue
		}
		tx.origin = origin{ue: u.Index, gen: u.Gen}
		w.txs[tx.key] = tx
		w.protected.add(tx)
		w.wheel.Schedule(&tx.timeout, finalKept, func() { w.forget(tx) })
	}
}

// departed is a UE context that has gone to another worker and not ended there, as far as is known.
type departed struct {
	name   Name
	impi   string
	addr   netip.Addr
	normal bool // no emergency registration
}

// follow de-registers those contexts of an IMPI that have gone from here to other workers, but for one address.
func (w *Worker) follow(impi string, except netip.Addr) {
	for _, d := range w.away[impi] {
		if d.normal && d.addr != except {
			w.leaveByName(d.name)
		}
	}
}

// leaveByName de-registers a context wherever it has gone.
func (w *Worker) leaveByName(n Name) {
	n = w.cfg.Fleet.names.newest(n)
	if int(n.Worker) != w.id {
		if o := w.cfg.Fleet.worker(int(n.Worker)); o != nil {
			w.insistOn(o, func(o *Worker) { o.leaveByName(n) }, insistTries)
		}
		return
	}
	if u := w.table.Lookup(n.UE, n.Gen); u != nil {
		w.table.Deregister(u, w.cfg.Registrar.OldSet)
		w.unwatch(u, true)
	}
}

// protects reports whether an IMPI has confirmed SA sets here, or has them somewhere else where they have gone from here.
func (w *Worker) protects(impi string) bool { return w.table.Protected(impi) || len(w.away[impi]) > 0 }

// releaseNames tells the workers which a context was with before that its names there mean nobody any more. They know
// themselves which of the names are of this run: those of earlier ones have been free for long.
func (w *Worker) releaseNames(impi string, names []store.Freed) {
	if w.cfg.Fleet == nil {
		return
	}
	for _, n := range names {
		if o := w.cfg.Fleet.worker(int(n.Worker)); o != nil {
			w.insistOn(o, func(o *Worker) { o.release(impi, n) }, insistTries)
		}
	}
}

// release forgets a context that has gone from here and ended.
func (w *Worker) release(impi string, n store.Freed) {
	if !w.table.Release(n.Index, n.Gen) {
		return
	}
	name := Name{uint8(w.id), n.Index, n.Gen} //nolint:gosec // at most 256 workers
	w.cfg.Fleet.names.remove(name)
	left := slices.DeleteFunc(w.away[impi], func(d departed) bool { return d.name == name })
	if w.away[impi] = left; len(left) == 0 {
		delete(w.away, impi)
	}
	if w.cfg.Store != nil {
		journal{w}.report("registration", w.cfg.Store.Free(n)) // its record of then, see survive.Load
	}
}

// sendSPIs has SPIs of other workers' pools freed there.
func (w *Worker) sendSPIs(spis ...ims.SPI) {
	for k := range w.cfg.Workers {
		lo, hi := sa.Split(w.cfg.SPIFirst, w.cfg.SPILast, k, w.cfg.Workers)
		if !slices.ContainsFunc(spis, func(spi ims.SPI) bool { return spi >= lo && spi <= hi }) {
			continue
		}
		if o := w.cfg.Fleet.worker(k); o != nil { // it ignores those that it has not given out
			w.insistOn(o, func(o *Worker) { o.table.Free(spis...) }, insistTries)
		}
	}
}

// nameBuckets is the number of parts of a table of names: a change copies one part.
const nameBuckets = 256

// renames leads from names of contexts to those that they got at the worker which they went to next. Look-ups take no lock and
// allocate nothing; the zero value has no names. Only the worker of a name changes what it leads to.
type renames struct {
	n       atomic.Int64
	mu      sync.Mutex // held while something is changed
	buckets [nameBuckets]atomic.Pointer[map[Name]Name]
}

func (r *renames) bucket(n Name) *atomic.Pointer[map[Name]Name] { return &r.buckets[n.UE%nameBuckets] }

// newest follows a name to the present one. A context has few names, and never one twice.
func (r *renames) newest(n Name) Name {
	if r.n.Load() == 0 {
		return n
	}
	for {
		m := r.bucket(n).Load()
		if m == nil {
			return n
		}
		next, ok := (*m)[n]
		if !ok {
			return n
		}
		n = next
	}
}

func (r *renames) set(from, to Name) { r.change(from, func(m map[Name]Name) { m[from] = to }) }

func (r *renames) remove(from Name) { r.change(from, func(m map[Name]Name) { delete(m, from) }) }

// setAll is set for many names at once: each part is copied once.
func (r *renames) setAll(names map[Name]Name) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var parts [nameBuckets]map[Name]Name
	for from, to := range names {
		m := &parts[from.UE%nameBuckets]
		if *m == nil {
			*m = make(map[Name]Name)
			if old := r.bucket(from).Load(); old != nil {
				maps.Copy(*m, *old)
			}
			r.n.Add(-int64(len(*m)))
		}
		(*m)[from] = to
	}
	for i := range parts {
		if m := parts[i]; m != nil {
			r.buckets[i].Store(&m)
			r.n.Add(int64(len(m)))
		}
	}
}

func (r *renames) change(n Name, do func(map[Name]Name)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := r.bucket(n)
	next := make(map[Name]Name)
	if m := b.Load(); m != nil {
		maps.Copy(next, *m)
	}
	before := len(next)
	do(next)
	b.Store(&next)
	r.n.Add(int64(len(next) - before))
}
