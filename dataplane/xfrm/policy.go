package xfrm

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// policyPriority is the place of our policies in the lookup order: a lower number is looked at first. Other programs'
// policies for address ranges usually stand in the hundred thousands.
const policyPriority = 1000

// policyTag marks the selectors of our policies. The kernel does not match packets against the selector's user field
// but it is part of the policy's identity, so a foreign policy with the same addresses and ports is never the same
// policy as ours, and leftovers of an earlier run are recognised whatever ports it was configured with.
func policyTag(reqid uint32) uint32 { return reqid ^ 0x67_6d_00_00 }

// policyID is the kernel's key of a policy.
type policyID struct {
	sel nl.XfrmSelector
	dir uint8
}

// policy is one of the constant policies.
type policy struct {
	policyID
	action uint8 // actionAllow demands ESP by template, actionBlock drops
	reqid  uint32
}

// constantPolicies returns the policies for the protected ports, per local address and port:
//
//   - in: any peer → local:port must have come through ESP with our reqid. Clear packets are dropped
//     (XfrmInTmplMismatch).
//   - out: local:port → any peer must go through ESP with our reqid; which state is decided by the states' selectors.
//     Without one the packet is dropped (XfrmOutNoStates).
//   - fwd, block: the out policy also applies to packets that the host merely forwards. IPv6 forwards packets that
//     bear one of the host's own addresses as source (IPv4 drops them as martians), so without this policy a neighbour
//     on the core side could have his packets protected by a phone's SA. A genuine packet of ours is never forwarded.
//
// There are no block policies in directions in and out: for the selectors above they could never match, because the
// template policy of the same selector is found first and itself drops what it does not find protected; and there is
// no moment without template to be bridged, since policies are updated in place and removed only after the last SA. A
// wider one, for a whole address, would also block the unprotected port, ICMP and neighbour discovery.
func constantPolicies(local []netip.Addr, ports []uint16, reqid uint32) []policy {
	ps := make([]policy, 0, 3*len(ports)*len(local))
	for _, a := range local {
		bits := uint8(a.BitLen()) //nolint:gosec // 32 or 128
		for _, port := range ports {
			in := nl.XfrmSelector{
				Family: family(a), User: policyTag(reqid),
				Daddr: address(a), PrefixlenD: bits, Dport: nl.Swap16(port), DportMask: ^uint16(0),
			}
			out := nl.XfrmSelector{
				Family: family(a), User: policyTag(reqid),
				Saddr: address(a), PrefixlenS: bits, Sport: nl.Swap16(port), SportMask: ^uint16(0),
			}
			ps = append(ps,
				policy{policyID{in, dirIn}, actionAllow, reqid},
				policy{policyID{out, dirOut}, actionAllow, reqid},
				policy{policyID{out, dirFwd}, actionBlock, reqid})
		}
	}
	return ps
}

// protect puts the constant policies into the kernel, takes over those that an earlier run left, and removes leftovers
// for addresses and ports that are no longer configured. It warns of foreign policies that the kernel would find first.
func protect(c *conn, ps []policy, reqid uint32, log *slog.Logger) error {
	found, err := c.policies()
	if err != nil {
		return err
	}
	err = c.inBatches(len(ps), func(i int) { c.updatePolicy(&ps[i]) }, func(i int, err error) error {
		return fmt.Errorf("add policy %s: %w", ps[i], err)
	})
	if err != nil {
		return err
	}

	ours := make(map[policyID]bool, len(ps))
	for i := range ps {
		ours[ps[i].policyID] = true
	}
	var stale []policyID
	adopted := 0
	for i := range found {
		id := policyID{found[i].Sel, found[i].Dir}
		switch {
		case ours[id]:
			adopted++
		case id.sel.User == policyTag(reqid):
			stale = append(stale, id)
		default:
			warnPrecedence(&found[i], ps, log)
		}
	}
	if err := unprotect(c, stale); err != nil {
		return err
	}
	if adopted+len(stale) > 0 {
		log.Info("took over policies of an earlier run", slog.Int("adopted", adopted), slog.Int("removed", len(stale)))
	}
	return nil
}

// unprotect removes policies; ones that are gone already do not count as errors.
func unprotect(c *conn, ids []policyID) error {
	return c.inBatches(len(ids), func(i int) { c.deletePolicy(ids[i]) }, func(i int, err error) error {
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return fmt.Errorf("remove policy %s: %w", ids[i], err)
	})
}

// warnPrecedence reports a foreign policy that lets packets of a protected port pass before our policy is looked at.
func warnPrecedence(f *nl.XfrmUserpolicyInfo, ps []policy, log *slog.Logger) {
	// Of two policies with equal priority the older one is found first: the foreign one.
	if f.Action != actionAllow || f.Priority > policyPriority {
		return
	}
	for i := range ps {
		if ps[i].dir == f.Dir && overlap(&ps[i].sel, &f.Sel) {
			log.Warn("foreign policy is looked at before ours; make sure that it lets nothing pass in clear",
				slog.String("foreign", policyID{f.Sel, f.Dir}.String()), slog.Uint64("priority", uint64(f.Priority)),
				slog.String("ours", ps[i].String()))
			return
		}
	}
}

// overlap reports whether some packet matches both selectors.
func overlap(a, b *nl.XfrmSelector) bool {
	return a.Family == b.Family &&
		(a.Proto == 0 || b.Proto == 0 || a.Proto == b.Proto) &&
		(a.Sport^b.Sport)&a.SportMask&b.SportMask == 0 &&
		(a.Dport^b.Dport)&a.DportMask&b.DportMask == 0 &&
		prefix(a.Saddr, a.PrefixlenS, a.Family).Overlaps(prefix(b.Saddr, b.PrefixlenS, b.Family)) &&
		prefix(a.Daddr, a.PrefixlenD, a.Family).Overlaps(prefix(b.Daddr, b.PrefixlenD, b.Family))
}

func prefix(a nl.XfrmAddress, bits uint8, fam uint16) netip.Prefix {
	return netip.PrefixFrom(netipOf(a, fam), int(bits))
}

// String describes the policy in the order of ip-xfrm.
func (p policyID) String() string {
	dir := [...]string{dirIn: "in", dirOut: "out", dirFwd: "fwd"}
	d := "socket"
	if int(p.dir) < len(dir) {
		d = dir[p.dir]
	}
	return fmt.Sprintf("%s src %s port %s dst %s port %s", d,
		prefix(p.sel.Saddr, p.sel.PrefixlenS, p.sel.Family), portString(p.sel.Sport, p.sel.SportMask),
		prefix(p.sel.Daddr, p.sel.PrefixlenD, p.sel.Family), portString(p.sel.Dport, p.sel.DportMask))
}

func portString(port, mask uint16) string {
	if mask == 0 {
		return "any"
	}
	return fmt.Sprintf("%d", nl.Swap16(port))
}
