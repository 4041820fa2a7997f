package proxy

import (
	"net/netip"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/registrar"
)

// retryAfter is what a phone is told that came at a bad time (RFC 3261 §20.33).
const retryAfter = "Retry-After: 30\r\n"

// Implementation constants.
const (
	// answeredPerPending is how many answered transactions in clear may be kept for each one that may be under way.
	answeredPerPending = 4
	// maxProtected bounds the REGISTER transactions of one UE over its SA sets, under way and answered: a
	// re-registration takes two, each further public identity one more.
	maxProtected = 16
	// maxProtectedAll bounds those of all UEs of a worker, at some 4 kB each.
	maxProtectedAll = 1 << 15
)

// origin is who REGISTER transactions count for: in clear the source, over a set the UE that owns it.
type origin struct {
	source netip.Prefix
	ue     uint32 // index, which is never zero
	gen    uint16
}

func originOf(f ims.Flow, s *registrar.Set) origin {
	if s != nil {
		return origin{ue: s.UE.Index, gen: s.UE.Gen}
	}
	return origin{source: registrar.Source(f.Remote.Addr())}
}

// pendingQueue holds REGISTER transactions, oldest first: nobody may take more than a share of them, and what nobody has
// proved to be entitled to may take only so much. A worker has one of those in clear that wait for the core, one of those
// in clear that were answered and are kept for retransmissions, and one of all that came over SA sets. Every operation is
// O(1), since a flood makes the queues long.
type pendingQueue struct {
	txList
	bySource map[origin]*txList
}

func newPendingQueue() *pendingQueue { return &pendingQueue{bySource: make(map[origin]*txList)} }

// txList is a list of transactions, oldest first. Each transaction is in two: that of its queue, and that of its origin.
type txList struct {
	oldest, newest *regTx
	n              int
}

// txLinks are the neighbours of a transaction in a list.
type txLinks struct{ older, newer *regTx }

// The two lists of a transaction.
const (
	inQueue = iota
	inOrigin
	txLists
)

func (l *txList) add(tx *regTx, which int) {
	tx.links[which] = txLinks{older: l.newest}
	if l.newest != nil {
		l.newest.links[which].newer = tx
	} else {
		l.oldest = tx
	}
	l.newest = tx
	l.n++
}

func (l *txList) remove(tx *regTx, which int) {
	at := tx.links[which]
	if at.older != nil {
		at.older.links[which].newer = at.newer
	} else {
		l.oldest = at.newer
	}
	if at.newer != nil {
		at.newer.links[which].older = at.older
	} else {
		l.newest = at.older
	}
	tx.links[which] = txLinks{}
	l.n--
}

// add appends a transaction; it leaves the queue that it was in.
func (q *pendingQueue) add(tx *regTx) {
	tx.unqueue()
	tx.queue = q
	q.txList.add(tx, inQueue)
	own := q.bySource[tx.origin]
	if own == nil {
		own = new(txList)
		q.bySource[tx.origin] = own
	}
	own.add(tx, inOrigin)
}

// of returns the transactions of one origin.
func (q *pendingQueue) of(o origin) txList {
	if own := q.bySource[o]; own != nil {
		return *own
	}
	return txList{}
}

// unqueue takes a transaction out of the queue that it is in.
func (tx *regTx) unqueue() {
	q := tx.queue
	if q == nil {
		return
	}
	tx.queue = nil
	q.remove(tx, inQueue)
	own := q.bySource[tx.origin]
	own.remove(tx, inOrigin)
	if own.n == 0 {
		delete(q.bySource, tx.origin)
	}
}

// room reports whether a REGISTER may begin one more transaction. In clear those of its source count that the core has not
// answered, and SA sets that wait for their authentication. Over a set those of its UE count: the oldest gives way if it was
// answered, since a phone that has gone on to others has seen the answer.
func (w *Worker) room(f ims.Flow, s *registrar.Set) bool {
	o := originOf(f, s)
	if s == nil {
		sets, _ := w.table.Unconfirmed(o.source)
		return w.waiting.of(o).n+sets < w.cfg.PendingSource
	}
	if w.protected.n >= maxProtectedAll {
		if w.protected.oldest.final == nil {
			return false
		}
		w.forget(w.protected.oldest)
	}
	own := w.protected.of(o)
	if own.n < maxProtected {
		return true
	}
	for tx := own.oldest; tx != nil; tx = tx.links[inOrigin].newer {
		if tx.final != nil {
			w.forget(tx)
			return true
		}
	}
	return false
}

// enqueuePending notes a REGISTER whose transaction begins.
func (w *Worker) enqueuePending(tx *regTx) {
	if tx.over != nil {
		w.protected.add(tx)
		return
	}
	w.waiting.add(tx)
	w.boundPending()
}

// boundPending keeps the limit over all sources. Beyond it the oldest one gives way, a set that waits for its
// authentication or a transaction that waits for the core: it is forgotten without an answer, since its sender has most
// likely gone. A phone that goes on at once has as long as the flood needs to fill the limit.
func (w *Worker) boundPending() {
	limit := max(1, w.cfg.PendingMax/w.cfg.Workers)
	for {
		_, sets := w.table.Unconfirmed(netip.Prefix{})
		if w.waiting.n+sets <= limit {
			return
		}
		w.obs.Drop(observe.ReasonBusy)
		tx := w.waiting.oldest
		if s, since := w.table.Oldest(); s != nil && (tx == nil || !since.After(tx.began)) {
			w.table.Evict(s)
		} else {
			w.forget(tx)
		}
	}
}

// answeredPending keeps an answered REGISTER in clear for its retransmissions, within bounds: what gives way is answered
// anew if it comes again.
func (w *Worker) answeredPending(tx *regTx) {
	w.answered.add(tx)
	if own := w.answered.of(tx.origin); own.n > answeredPerPending*w.cfg.PendingSource {
		w.forget(own.oldest)
	}
	for w.answered.n > max(1, answeredPerPending*w.cfg.PendingMax/w.cfg.Workers) {
		w.forget(w.answered.oldest)
	}
}
