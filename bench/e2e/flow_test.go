package e2e

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gmgate/gmgate/bench/core"
	"github.com/gmgate/gmgate/bench/ue"
)

// Pauses between two operations of one loop: what is tested is traffic at any moment, not its amount.
const (
	messagePause = 30 * time.Millisecond
	callPause    = 80 * time.Millisecond
	callRing     = 20 * time.Millisecond
)

// coreT1 is when the core and the phones begin to repeat a request (RFC 3261 §17.1.2.1).
const coreT1 = 500 * time.Millisecond

// end is a phone that takes part in a flow.
type end struct {
	u     *ue.UE
	uri   string
	index int // of the subscriber

	wrong, mute atomic.Bool   // answers challenges wrongly, or not at all
	muted       chan struct{} // gets a value for each challenge that was not answered
	byHand      atomic.Int64  // requests that the phone did not send by itself

	quiet bool // starts nothing of its own; guarded by flow.mu
}

// op is one operation of a flow: a MESSAGE, or a call from INVITE to BYE.
type op struct {
	call     bool
	from, to *end // from is nil for the network
	serial   int
	body     string // of a MESSAGE
	callee   bool   // the called side hangs up
	began    time.Time
	ended    time.Time
	callID   string
	status   int
	err      error
}

func (o *op) String() string {
	from := "the network"
	if o.from != nil {
		from = o.from.uri
	}
	if o.call {
		return fmt.Sprintf("call %s from %s to %s", o.callID, from, o.to.uri)
	}
	text, _, _ := strings.Cut(o.body, " ")
	return fmt.Sprintf("MESSAGE %s from %s to %s", text, from, o.to.uri)
}

// loop repeats one kind of operation.
type loop struct {
	from  *end
	begun int // guarded by flow.mu
	ended int
}

// flow is traffic that goes on in the background, so that something is under way whatever happens in the foreground. Not
// a single operation may be lost or done twice, see finish.
type flow struct {
	f    *fixture
	ctx  context.Context
	name string // begins the bodies of its messages

	small bool
	again bool // a request that is repeated may come to its end as a new one
	halt  chan struct{}
	wg    sync.WaitGroup

	mu      sync.Mutex
	changed chan struct{} // closed and replaced whenever an operation ends or a phone falls silent or speaks again
	ops     []*op
	running map[*op]struct{}
	failed  error // of the first operation that failed
	loops   []*loop
}

// flows counts the flows of the process.
var flows atomic.Int64

// phone registers a new phone for flows.
func (f *fixture) phone(ctx context.Context, t *testing.T, change ...func(*ue.Config)) *end {
	t.Helper()
	i := f.take(t)
	cfg := f.configOf(i)
	cfg.Ring, cfg.Offers = callRing, f.offers(1)
	for _, c := range change {
		c(&cfg)
	}
	e := f.endOf(t, i, cfg)
	f.mustRegister(ctx, t, e.u)
	return e
}

// endOf makes a phone of subscriber i without registering it.
func (f *fixture) endOf(t *testing.T, i int, cfg ue.Config) *end {
	t.Helper()
	u, err := f.farm.NewUE(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = u.Close() })
	e := &end{u: u, uri: f.subs[i].IMPU[0], index: i, muted: make(chan struct{}, 8)}
	wrong := edit("register-auth", wrongResponse)
	u.Tweak = func(kind string, b []byte) []byte {
		switch {
		case kind != "register-auth":
		case e.mute.Load():
			e.muted <- struct{}{}
			return nil
		case e.wrong.Load():
			return wrong(kind, b)
		}
		return b
	}
	return e
}

// flow starts traffic among phones: each sends messages to the next one and calls it, and gets messages from the network.
func (f *fixture) flow(ctx context.Context, t *testing.T, ends ...*end) *flow {
	t.Helper()
	w := f.newFlow(ctx, t)
	w.among(ends...)
	return w
}

// smallFlow is a flow of messages that fit into datagrams all the way, so that SIP itself repeats what was lost. An INVITE
// does not: with the Record-Route of the core it goes by TCP.
func (f *fixture) smallFlow(ctx context.Context, t *testing.T, ends ...*end) *flow {
	t.Helper()
	w := f.newFlow(ctx, t)
	w.small = true
	w.among(ends...)
	return w
}

func (f *fixture) newFlow(ctx context.Context, t *testing.T) *flow {
	t.Helper()
	w := &flow{
		f: f, ctx: ctx, name: "flow" + strconv.FormatInt(flows.Add(1), 10), halt: make(chan struct{}), changed: make(chan struct{}), running: make(map[*op]struct{}),
	}
	t.Cleanup(w.stop)
	return w
}

// among starts the loops.
func (w *flow) among(ends ...*end) {
	for i, e := range ends {
		next := ends[(i+1)%len(ends)]
		if next != e {
			w.run(&loop{from: e}, messagePause, func() *op { return w.message(e, next) })
			if !w.small {
				w.run(&loop{from: e}, callPause, func() *op { return w.call(e, next) })
			}
		}
		w.run(&loop{}, messagePause, func() *op { return w.message(nil, e) })
	}
}

// run repeats do until the flow is stopped.
func (w *flow) run(l *loop, pause time.Duration, do func() *op) {
	if slowMachine() {
		pause *= 8
	}
	w.mu.Lock()
	w.loops = append(w.loops, l)
	w.mu.Unlock()
	w.wg.Go(func() {
		t := time.NewTicker(pause)
		defer t.Stop()
		for w.mayBegin(l) {
			o := do()
			w.mu.Lock()
			l.ended++
			w.wake()
			w.mu.Unlock()
			if o.err != nil {
				return // it is reported by finish, and the next one would say the same
			}
			select {
			case <-t.C:
			case <-w.halt:
			}
		}
	})
}

// mayBegin waits until the loop may begin an operation, and counts it. false ends the loop.
func (w *flow) mayBegin(l *loop) bool {
	for {
		w.mu.Lock()
		quiet, changed := l.from != nil && l.from.quiet, w.changed
		select {
		case <-w.halt:
			w.mu.Unlock()
			return false
		default:
		}
		if !quiet {
			l.begun++
			w.mu.Unlock()
			return true
		}
		w.mu.Unlock()
		select {
		case <-changed:
		case <-w.halt:
			return false
		}
	}
}

// begin notes an operation.
func (w *flow) begin(o *op) *op {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := len(w.ops)
	if o.serial = n; !o.call {
		o.body = w.name + "." + strconv.Itoa(n) + " "
		if n%4 == 0 && !w.small { // RFC 3261 §18.1.1: by TCP, whatever the phone prefers
			o.body += strings.Repeat("x", 1500)
		}
	}
	o.callee = o.call && n%2 == 0 && !o.to.quiet
	o.began = time.Now()
	w.ops = append(w.ops, o)
	w.running[o] = struct{}{}
	return o
}

// end completes an operation.
func (w *flow) end(o *op) *op {
	w.mu.Lock()
	defer w.mu.Unlock()
	o.ended = time.Now()
	delete(w.running, o)
	if o.err == nil && o.status != 200 {
		o.err = fmt.Errorf("answered %d", o.status)
	}
	if o.err != nil && w.failed == nil {
		w.failed = fmt.Errorf("%s: %w", o, o.err)
	}
	w.wake()
	return o
}

// wake tells waiters that something has changed. The caller holds mu.
func (w *flow) wake() {
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *flow) message(from, to *end) *op {
	o := w.begin(&op{from: from, to: to})
	if from == nil {
		var a core.Answer
		if a, o.err = w.f.core.Send(w.ctx, core.Request{IMPU: to.uri, Body: o.body}); o.err == nil {
			o.status, o.callID = a.Status, a.Header("Call-ID")
		}
		return w.end(o)
	}
	o.status, o.err = from.u.Message(w.ctx, to.uri, o.body)
	return w.end(o)
}

func (w *flow) call(from, to *end) *op {
	o := w.begin(&op{call: true, from: from, to: to})
	c := ue.CallOptions{PRACK: true, RemoteBye: o.callee}
	if o.serial%3 == 0 {
		c.BodySize = largeBody
	}
	res, err := from.u.Call(w.ctx, to.uri, c)
	o.callID, o.status, o.err = res.CallID, res.Status, err
	return w.end(o)
}

// await waits until ok, which is called with mu held, returns true.
func (w *flow) await(ctx context.Context, what string, ok func() bool) error {
	for {
		w.mu.Lock()
		done, failed, changed := ok(), w.failed, w.changed
		w.mu.Unlock()
		switch {
		case failed != nil:
			return fmt.Errorf("wait for %s: %w", what, failed)
		case done:
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", what, ctx.Err())
		}
	}
}

// turn waits until every loop has done an operation that began after the call, and returns when it began.
func (w *flow) turn(ctx context.Context, t *testing.T) time.Time {
	t.Helper()
	w.mu.Lock()
	since := time.Now()
	before := make(map[*loop]int)
	for _, l := range w.loops {
		before[l] = l.begun
	}
	w.mu.Unlock()
	if err := w.await(ctx, "every kind of traffic", func() bool {
		for l, n := range before {
			if (l.from == nil || !l.from.quiet) && l.ended <= n {
				return false
			}
		}
		return true
	}); err != nil {
		t.Fatal(err)
	}
	return since
}

// hush lets a phone start nothing of its own any more, and waits until what it has begun is over.
func (w *flow) hush(ctx context.Context, t *testing.T, e *end) {
	t.Helper()
	w.mu.Lock()
	e.quiet = true
	w.mu.Unlock()
	if err := w.await(ctx, "silence", func() bool {
		for o := range w.running {
			if o.from == e || o.callee && o.to == e {
				return false
			}
		}
		return true
	}); err != nil {
		t.Fatal(err)
	}
}

// speak ends hush.
func (w *flow) speak(e *end) {
	w.mu.Lock()
	e.quiet = false
	w.wake()
	w.mu.Unlock()
}

// settle has a phone use its current SA set, and waits until everything that began on an older one is over: only then
// may a phone register again, since the next registration ends all sets but two (TS 33.203 §7.4).
func (w *flow) settle(ctx context.Context, e *end) error {
	if o := w.message(e, e); o.err != nil {
		return fmt.Errorf("%s: %w", o, o.err)
	}
	mark := time.Now()
	return w.await(ctx, "requests on older SA sets", func() bool {
		for o := range w.running {
			if (o.from == e || o.to == e) && o.began.Before(mark) {
				return false
			}
		}
		return true
	})
}

// stop ends the flow; operations under way are completed.
func (w *flow) stop() {
	w.mu.Lock()
	select {
	case <-w.halt:
	default:
		close(w.halt)
	}
	w.mu.Unlock()
	w.wg.Wait()
}

// txID names a request at the core.
type txID struct {
	callID, cseq string
}

// finish stops the flow and checks that each of its operations was done once, neither lost nor done twice, as the core
// and the called phones saw it. The phones' own findings fail the test as well.
func (w *flow) finish(t *testing.T, ends ...*end) {
	t.Helper()
	w.stop()
	if w.ctx.Err() != nil {
		t.Fatal("the time of the test is over")
	}
	branches, finals, byBody := map[txID]map[string]bool{}, map[txID]int{}, map[string]txID{}
	for _, s := range w.f.core.Log() {
		id := txID{s.CallID, s.Header("CSeq")}
		switch {
		case s.Status >= 200:
			finals[id]++
		case s.Status == 0 && s.Method != "ACK":
			if branches[id] == nil {
				branches[id] = map[string]bool{}
			}
			via, _, _ := strings.Cut(s.Header("Via"), ",")
			branches[id][via] = true
			if s.Method == "MESSAGE" {
				byBody[s.Body] = id
			}
		}
	}
	arrived := map[*end][]ue.Incoming{}
	for _, e := range ends {
		arrived[e] = e.u.Received()
	}
	count := func(o *op, match func(ue.Incoming) bool) int {
		n := 0
		for _, i := range arrived[o.to] {
			if match(i) {
				n++
			}
		}
		return n
	}
	once := func(o *op, what string, got, want int) {
		if got != want && (!w.again || got < want) {
			t.Errorf("%s: %d %s, want %d", o, got, what, want)
		}
	}
	for _, o := range w.ops {
		if o.err != nil {
			t.Errorf("%s after %s: %v", o, o.ended.Sub(o.began), o.err)
			continue
		}
		// A request that took longer than T1 was repeated, and so was its answer.
		answers := func(id txID) {
			if n := finals[id]; n == 0 || n > 1 && o.ended.Sub(o.began) < coreT1 {
				t.Errorf("%s: %d final answers to %s at the core, want 1", o, n, id.cseq)
			}
		}
		if !o.call {
			id := txID{o.callID, "1 MESSAGE"}
			if o.from != nil {
				id = byBody[o.body]
				once(o, "transactions at the core", len(branches[id]), 1)
			}
			answers(id)
			once(o, "deliveries", count(o, func(i ue.Incoming) bool { return i.Method == "MESSAGE" && i.Body == o.body }), 1)
			continue
		}
		invite := txID{o.callID, "1 INVITE"}
		once(o, "INVITE transactions at the core", len(branches[invite]), 1)
		answers(invite)
		for _, method := range []string{"INVITE", "PRACK", "BYE"} {
			want := 1
			if method == "BYE" && o.callee {
				want = 0 // the called side hung up
			}
			once(o, method, count(o, func(i ue.Incoming) bool { return i.Method == method && i.CallID == o.callID }), want)
		}
	}
	for _, e := range ends {
		checkPhones(t, e.u)
		if s := e.u.Stats(); s.Finals > s.Requests+s.Retransmitted+int(e.byHand.Load()) {
			t.Errorf("%s sent %d requests and repeated %d of them, but got %d final answers", e.uri, s.Requests, s.Retransmitted, s.Finals)
		}
	}
	if !t.Failed() {
		t.Logf("%d operations, none lost", len(w.ops))
	}
}
