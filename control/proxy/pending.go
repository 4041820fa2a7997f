package proxy

import (
	"net/netip"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/registrar"
)

// retryAfter is what a phone is told that came at a bad time (RFC 3261 §20.33).
const retryAfter = "Retry-After: 30\r\n"

// pendingQueue holds the REGISTER transactions in clear that are not answered yet, oldest first: what nobody has proved to
// be entitled to may take only so much.
type pendingQueue struct {
	oldest, newest *regTx
	n              int
	bySource       map[netip.Prefix]int
}

func newPendingQueue() pendingQueue { return pendingQueue{bySource: make(map[netip.Prefix]int)} }

func (q *pendingQueue) add(tx *regTx) {
	tx.older, tx.newer, tx.queued = q.newest, nil, true
	if q.newest != nil {
		q.newest.newer = tx
	} else {
		q.oldest = tx
	}
	q.newest = tx
	q.n++
	q.bySource[registrar.Source(tx.flow.Remote.Addr())]++
}

func (q *pendingQueue) remove(tx *regTx) {
	if !tx.queued {
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
	tx.older, tx.newer, tx.queued = nil, nil, false
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

// enqueuePending notes a REGISTER in clear. Beyond the limit over all sources the oldest one gives way: it is forgotten
// without an answer, since its sender has most likely gone, and a late answer of the core is dropped.
func (w *Worker) enqueuePending(tx *regTx) {
	w.waiting.add(tx)
	limit := max(1, w.cfg.PendingMax/w.cfg.Workers)
	for w.waiting.n > limit {
		w.obs.Drop(observe.ReasonBusy)
		w.forget(w.waiting.oldest)
	}
}
