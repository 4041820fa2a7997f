package xfrm

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"github.com/vishvananda/netlink/nl"
)

// Sweep takes out what a Backend of an earlier run left for its successor on the addresses of cfg, for a start without one:
// the states go, and the policies block for as long as after Close. Left alone, the kernel would open and answer the phones'
// packets beside whoever protects them now, with the same keys. It returns how many states there were. While another Backend
// is there it touches nothing and the error wraps ErrInUse; if there is nothing to talk to, ErrNoXFRM or ErrPermission.
func Sweep(cfg Config) (states int, err error) { return sweep(cfg, namespace{cfg.NS}) }

func sweep(cfg Config, h host) (states int, err error) {
	if err := cfg.complete(); err != nil {
		return 0, err
	}
	lock, err := h.lock(cfg.ReqID)
	if err != nil {
		return 0, classify(err)
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	sock, err := h.open()
	if err != nil {
		return 0, classify(err)
	}
	defer func() { err = errors.Join(err, sock.close()) }()
	c, b := newConn(sock), Backend{reqid: uint32(cfg.ReqID)} //nolint:gosec // checked by complete

	// As in Close, the policies first.
	found, err := c.policies()
	if err != nil {
		return 0, classify(err)
	}
	var stale []policy
	for i := range found {
		f := &found[i]
		local := netipOf(f.Sel.Saddr, f.Sel.Family)
		if f.Dir == dirIn {
			local = netipOf(f.Sel.Daddr, f.Sel.Family)
		}
		if f.Sel.User == policyTag(b.reqid) && !retired(f, cfg.block) && slices.Contains(cfg.Local, local) {
			stale = append(stale, policy{policyID: policyID{f.Sel, f.Dir}, reqid: b.reqid})
		}
	}
	if err := retire(c, stale, cfg.block); err != nil {
		return 0, fmt.Errorf("retire policies of an earlier run: %w", err)
	}
	var ids []stateID
	if err := c.dumpStates(func() { ids = ids[:0] }, func(info *nl.XfrmUsersaInfo, _ []byte) error {
		h, src := headOf(info), netipOf(info.Saddr, info.Family)
		if b.owned(h) && (slices.Contains(cfg.Local, h.id.dst) || slices.Contains(cfg.Local, src)) {
			ids = append(ids, h.id)
		}
		return nil
	}); err != nil {
		return 0, err
	}
	states, err = c.removeStates(ids)
	if len(stale)+states > 0 {
		cfg.Logger.Info("removed SAs that an earlier run left in the kernel", slog.Int("sas", states), slog.Int("policies", len(stale)))
	}
	return states, err
}
