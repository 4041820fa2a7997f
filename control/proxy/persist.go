package proxy

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/policy"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/control/store"
)

// Kept is what a worker takes over from the store. The backend holds the SAs of the sets.
type Kept struct {
	UEs    []KeptUE
	Freed  []store.Freed
	LastID uint64   // highest set id that this worker has given out
	Labels []uint32 // of SAs, those of other workers' sets among them
}

// KeptUE is one UE context with its sets.
type KeptUE struct {
	store.Registration
	Sets []store.Set
}

// Restore says what the worker begins with. Call it before any worker boots, since the others hear of what has come here.
func (w *Worker) Restore(k *Kept) {
	w.kept = k
	if k != nil && w.cfg.Fleet != nil {
		w.renameClear(k)
	}
}

// Reserve keeps an SPI from being given out: of somebody else, or of a set that was restored. Call it before Boot.
func (w *Worker) Reserve(spi ims.SPI) { w.spis.Reserve(spi) }

// restore fills the table from the store. What does not fit in is removed from backend and store: the phone registers
// anew.
func (w *Worker) restore() {
	k := w.kept
	if k == nil {
		return
	}
	w.kept = nil
	for i := range k.UEs {
		u := &k.UEs[i]
		if err := w.restoreUE(u); err != nil {
			w.log.Error("UE context not restored", "impi", u.IMPI, "ue", u.Addr, "error", err)
			for j := range u.Sets {
				if u.Sets[j].Clear {
					_ = w.cfg.Store.DeleteSet(u.Sets[j].ID)
					continue
				}
				w.inst.Remove(sa.Params{
					ID: u.Sets[j].ID, Local: u.Local, UE: u.Addr, Ports: u.Sets[j].Ports, SPIs: u.Sets[j].SPIs,
				}, func(error) {})
				_ = w.cfg.Store.DeleteSet(u.Sets[j].ID) // the writer ends after the workers
			}
			_ = w.cfg.Store.Free(store.Freed{Context: u.Context, Gen: u.Gen})
			k.Freed = append(k.Freed, store.Freed{Context: u.Context, Gen: u.Gen})
		}
	}
	for _, f := range k.Freed {
		w.table.Retire(f.Index, f.Gen)
	}
	for _, label := range k.Labels {
		w.table.Shun(label)
	}
	w.table.Resume(k.LastID)
}

func (w *Worker) restoreUE(k *KeptUE) error {
	u := &registrar.UE{
		Index: k.Index, Gen: k.Gen, IMPI: canonicalIMPI(k.IMPI), Addr: k.Addr, Local: k.Local, State: registrar.State(k.State),
		Contact: k.Contact, Expires: k.Expires, Ended: k.Ended, Emergency: k.Emergency,
	}
	for _, b := range k.Bindings {
		u.Bindings = append(u.Bindings, registrar.Binding(b))
	}
	byID := make(map[uint64]*registrar.Set, len(k.Sets))
	removing := make(map[*registrar.Set]bool)
	for i := range k.Sets {
		r := &k.Sets[i]
		s := &registrar.Set{
			Params: r.Params(w.eg.Now()), Phase: r.Phase, Serial: r.Serial, Over: byID[r.Over], OverTCP: r.OverTCP, Used: r.Used,
			Deadline: r.Deadline, Clear: r.Clear,
		}
		u.Clear = r.Clear
		if !s.Clear {
			w.apply(s, w.rules.Match(policy.Request{Realm: domainOf(k.identity(r)), IMPI: u.IMPI, Source: u.Addr}))
		}
		r.Keys.Zero()           // Params has made a copy
		s.Counters = r.Counters // the label stays the one that the SAs were installed with, though another worker may have them now
		if s.Phase == sa.Temporary {
			if _, err := parseAgreement(r.ServerText); err != nil {
				return fmt.Errorf("read Security-Server of set %#x: %w", r.ID, err)
			}
			if _, err := parseAgreement(r.ClientText); err != nil {
				return fmt.Errorf("read Security-Client of set %#x: %w", r.ID, err)
			}
			s.Agreement = &registrar.Agreement{Server: r.ServerText, Client: r.ClientText, CallID: r.CallID, IMPU: r.IMPU}
		}
		byID[r.ID], removing[s] = s, r.Removing
		u.Sets = append(u.Sets, s)
	}
	u.Current = byID[k.Current]
	if err := w.table.Restore(u, func(s *registrar.Set) bool { return removing[s] }); err != nil {
		return err
	}
	if u.Clear && !w.noteClear(u) {
		w.table.DissociateAll(u.IMPI)
		return nil
	}
	if len(k.Former) > 0 {
		w.former[u] = k.Former
	}
	w.setServiceRoute(u, k.ServiceRoute)
	return nil
}

// identity is the public identity that a set was made for, as far as that is known: once a set is confirmed, the first one
// of the UE.
func (k *KeptUE) identity(s *store.Set) string {
	if s.IMPU == "" && len(k.Bindings) > 0 {
		return k.Bindings[0].IMPU
	}
	return s.IMPU
}

// journal writes what the registrar wants kept to the store, behind.
type journal struct{ w *Worker }

// KeepUE implements registrar.Journal.
func (j journal) KeepUE(u *registrar.UE) {
	r := store.Registration{
		Context: j.context(u.Index), Gen: u.Gen, IMPI: u.IMPI, Addr: u.Addr, Local: u.Local,
		State: store.State(u.State), ServiceRoute: u.Routes(), Contact: u.Contact, Expires: u.Expires, Ended: u.Ended,
		Emergency: u.Emergency,
	}
	if u.Current != nil {
		r.Current = u.Current.ID
	}
	r.Former = j.w.former[u]
	for _, b := range u.Bindings {
		r.Bindings = append(r.Bindings, store.Binding(b))
	}
	j.report("registration", j.w.cfg.Store.PutRegistration(&r))
}

// KeepSet implements registrar.Journal.
func (j journal) KeepSet(s *registrar.Set) {
	r := store.Set{
		ID: s.ID, Worker: uint16(j.w.id), UE: s.UE.Index, Label: s.Label, Serial: s.Serial, //nolint:gosec // at most 256 workers
		IMPI: s.UE.IMPI, Addr: s.Params.UE, Local: s.Local, Ports: s.Ports, SPIs: s.SPIs, Keys: s.Keys,
		Phase: s.Phase, Deadline: s.Deadline, Hard: s.HardLimit(), Counters: s.Counters,
		OverTCP: s.OverTCP, Used: s.Used, Removing: s.Dropped(), Emergency: s.UE.Emergency, Clear: s.Clear,
	}
	if a := s.Agreement; a != nil {
		r.ServerText, r.ClientText, r.CallID, r.IMPU = a.Server, a.Client, a.CallID, a.IMPU
	}
	if s.Over != nil {
		r.Over = s.Over.ID
	}
	j.report("SA set", j.w.cfg.Store.PutSet(&r))
}

// DropSet implements registrar.Journal.
func (j journal) DropSet(id uint64) { j.report("SA set", j.w.cfg.Store.DeleteSet(id)) }

// DropUE implements registrar.Journal.
func (j journal) DropUE(index uint32, gen uint16) {
	j.report("registration", j.w.cfg.Store.Free(store.Freed{Context: j.context(index), Gen: gen}))
}

func (j journal) context(index uint32) store.Context {
	return store.Context{Worker: uint16(j.w.id), Index: index} //nolint:gosec // at most 256 workers
}

// report logs what could not be kept: a restart would lose it. After the end of the writer nothing is kept any more.
func (j journal) report(what string, err error) {
	if err != nil && !errors.Is(err, store.ErrClosed) {
		j.w.log.Error("not kept over a restart", "what", what, "error", err)
	}
}

// Fit says whether sets of the store can go on under this configuration: their protected ports and addresses must still
// be ours, and their algorithms allowed.
func (c *Config) Fit(s *store.Set) error {
	switch {
	case !slices.Contains(c.Gm, s.Local):
		return fmt.Errorf("%s is not a Gm address any more", s.Local)
	case s.Clear && s.OverTCP:
		return errors.New("its connection is gone")
	case s.Clear && s.Ports.PS != c.GmPort:
		return fmt.Errorf("%d is not the unprotected port any more", s.Ports.PS)
	case s.Clear && (c.Policy == nil || !c.Policy.Clear()):
		return errors.New("registrations in clear are not allowed any more")
	case s.Clear:
		return nil
	case !slices.Contains(c.Registrar.ServerPorts, s.Ports.PS):
		return fmt.Errorf("%d is not a server port any more", s.Ports.PS)
	case !slices.Contains(c.Registrar.ClientPorts, s.Ports.PC):
		return fmt.Errorf("%d is not a client port any more", s.Ports.PC)
	case !slices.Contains(c.Suites, s.Keys.Suite) && (c.Policy == nil || !c.Policy.Offers(s.Keys.Suite)):
		return fmt.Errorf("%s is not allowed any more", s.Keys.Suite)
	}
	return nil
}

var _ registrar.Journal = journal{}

// Expired is told by the backend that it has let a set go because its hard limit had passed.
func (f *Fleet) Expired(id uint64) {
	f.all(func(w *Worker) {
		if w.table.Expired(id) {
			w.log.Warn("the ESP backend has let an SA set expire", "sa_set", id)
		}
	})
}

// Mend has sets installed again of which the backend has lost an SA, and waits until it has answered.
func (f *Fleet) Mend(ctx context.Context, sets map[uint64]sa.Counters) error {
	f.mu.RLock()
	workers := slices.Clone(f.workers)
	f.mu.RUnlock()
	answers, found := make(chan struct{}, len(sets)), make(chan int, len(workers))
	for _, w := range workers {
		if w.eg.Post(func() { found <- w.table.Mend(sets, func() { answers <- struct{}{} }) }) != nil {
			found <- 0 // a loop that has ended has no sets left
		}
	}
	left := 0
	for range workers {
		select {
		case n := <-found:
			left += n
		case <-ctx.Done():
			return fmt.Errorf("mend SA sets: %w", context.Cause(ctx))
		}
	}
	for range left {
		select {
		case <-answers:
		case <-ctx.Done():
			return fmt.Errorf("mend SA sets: %w", context.Cause(ctx))
		}
	}
	return nil
}
