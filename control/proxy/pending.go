package proxy

import (
	"net/netip"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/registrar"
)

// retryAfter is what a phone is told that came at a bad time (RFC 3261 §20.33).
const retryAfter = "Retry-After: 30\r\n"

// pendingQueue holds REGISTER transactions in clear, oldest first: what nobody has proved to be entitled to may take only
// so much. A worker has one of those that wait for the core and one of those that were answered and are kept for
// retransmissions.
type pendingQueue struct {
	oldest, newest *regTx
	n              int
	bySource       map[netip.Prefix]int
}

func newPendingQueue() *pendingQueue { return &pendingQueue{bySource: make(map[netip.Prefix]int)} }

// add appends a transaction; it leaves the queue that it was in.
func (q *pendingQueue) add(tx *regTx) {
	tx.unqueue()
	tx.older, tx.newer, tx.queue = q.newest, nil, q
	if q.newest != nil {
		q.newest.newer = tx
	} else {
		q.oldest = tx
	}
	q.newest = tx
	q.n++
	q.bySource[registrar.Source(tx.flow.Remote.Addr())]++
}

// unqueue takes a transaction out of the queue that it is in.
func (tx *regTx) unqueue() {
	q := tx.queue
	if q == nil {
		return
	}
	if tx.older != nil {
		tx.older.newer = tx.newer
	} else {
		q.oldest = tx.newer
	}
	if tx.newer != nil {
		tx.newer.older = tx.older
	} else {
		q.newest = tx.older
	}
	tx.older, tx.newer, tx.queue = nil, nil, nil
	q.n--
	source := registrar.Source(tx.flow.Remote.Addr())
	if q.bySource[source]--; q.bySource[source] == 0 {
		delete(q.bySource, source)
	}
}

// room reports whether the source of a REGISTER in clear may have one more registration under way: transactions that the
// core has not answered, and SA sets that wait for their authentication.
func (w *Worker) room(f ims.Flow) bool {
	source := registrar.Source(f.Remote.Addr())
	sets, _ := w.table.Unconfirmed(source)
	return w.waiting.bySource[source]+sets < w.cfg.PendingSource
}

// enqueuePending notes a REGISTER in clear.
func (w *Worker) enqueuePending(tx *regTx) {
	w.waiting.add(tx)
	w.boundPending()
}

// boundPending keeps the limit over all sources. Beyond it the oldest one gives way, a set that waits for its
// authentication before a transaction that waits for the core: it is forgotten without an answer, since its sender has most
// likely gone.
func (w *Worker) boundPending() {
	limit := max(1, w.cfg.PendingMax/w.cfg.Workers)
	for {
		_, sets := w.table.Unconfirmed(netip.Prefix{})
		if w.waiting.n+sets <= limit {
			return
		}
		w.obs.Drop(observe.ReasonBusy)
		if !w.table.DropOldest() {
			w.forget(w.waiting.oldest)
		}
	}
}

// answeredPending keeps an answered REGISTER in clear for its retransmissions, within bounds: what gives way is answered
// anew if it comes again.
func (w *Worker) answeredPending(tx *regTx) {
	w.answered.add(tx)
	source := registrar.Source(tx.flow.Remote.Addr())
	if w.answered.bySource[source] > answeredPerPending*w.cfg.PendingSource {
		for old := w.answered.oldest; old != nil; old = old.newer {
			if registrar.Source(old.flow.Remote.Addr()) == source {
				w.forget(old)
				break
			}
		}
	}
	for w.answered.n > max(1, answeredPerPending*w.cfg.PendingMax/w.cfg.Workers) {
		w.forget(w.answered.oldest)
	}
}

// answeredPerPending is how many answered transactions may be kept for each one that may be under way.
const answeredPerPending = 4
