package proxy

import (
	"net/netip"
	"sync"

	"github.com/gmgate/gmgate/control/registrar"
)

// Fleet lets the workers of one process tell each other what concerns a phone that another of them owns. That is rare, and
// never on the way of a message. The zero value is ready; it is safe for concurrent use.
type Fleet struct {
	mu      sync.RWMutex
	workers []*Worker // those that have booted
}

func (f *Fleet) join(w *Worker) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.workers = append(f.workers, w)
}

// others runs do on the loop of every other worker.
func (f *Fleet) others(self *Worker, do func(*Worker)) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	for _, w := range f.workers {
		if w != self {
			_ = w.eg.Post(func() { do(w) }) // a loop that has ended has no phones left
		}
	}
}

// moved ends the registrations that a phone has at other addresses: it has registered at a new one, without the outbound
// extension that would keep both (TS 24.229 §5.2.2.2, RFC 5626). What is on its way there still gets out.
func (w *Worker) moved(u *registrar.UE) {
	impi, addr := u.IMPI, u.Addr
	w.leave(impi, addr)
	if w.cfg.Fleet != nil {
		w.cfg.Fleet.others(w, func(o *Worker) { o.leave(impi, addr) })
	}
}

// leave de-registers a phone wherever it is but at one address.
func (w *Worker) leave(impi string, except netip.Addr) {
	for _, u := range w.table.Elsewhere(impi, except) {
		w.table.Deregister(u, w.cfg.Registrar.OldSet)
	}
}
