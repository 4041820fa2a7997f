package xfrm

import (
	"fmt"
	"log/slog"
	"net/netip"
	"time"

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
	action  uint8 // actionAllow demands ESP by template, actionBlock drops
	reqid   uint32
	expires uint64 // seconds after which the kernel removes it, 0 for never
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
// And per local address:
//
//   - out, block: ICMP port unreachable (IPv4 type 3 code 3, IPv6 type 1 code 4) from local to any peer. The kernel sends
//     it when a datagram arrives at a protected port without socket, as after a crash or during a stop, and quotes the
//     datagram in it: decrypted, and in clear, since the ICMP message has no protected port. In selectors for ICMP the
//     source port is the type and the destination port the code. Unreachables for datagrams to unprotected ports are
//     suppressed as well, which no selector can tell apart; a phone then waits for its timer instead.
//
// There are no other block policies in directions in and out while a Backend is open: for the selectors above they could
// never match, because the template policy of the same selector is found first and itself drops what it does not find
// protected. A wider one, for a whole address, would also block the unprotected port, ICMP and neighbour discovery. All
// policies turn into block policies when the Backend is closed, see retire, and back into these by the next New.
func constantPolicies(local []netip.Addr, ports []uint16, reqid uint32) []policy {
	ps := make([]policy, 0, (3*len(ports)+1)*len(local))
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
				policy{policyID: policyID{in, dirIn}, action: actionAllow, reqid: reqid},
				policy{policyID: policyID{out, dirOut}, action: actionAllow, reqid: reqid},
				policy{policyID: policyID{out, dirFwd}, action: actionBlock, reqid: reqid})
		}
		proto, typ, code := uint8(unix.IPPROTO_ICMP), uint16(3), uint16(3)
		if a.Is6() {
			proto, typ, code = unix.IPPROTO_ICMPV6, 1, 4
		}
		unreachable := nl.XfrmSelector{
			Family: family(a), User: policyTag(reqid), Proto: proto, Saddr: address(a), PrefixlenS: bits,
			Sport: nl.Swap16(typ), SportMask: ^uint16(0), Dport: nl.Swap16(code), DportMask: ^uint16(0),
		}
		ps = append(ps, policy{policyID: policyID{unreachable, dirOut}, action: actionBlock, reqid: reqid})
	}
	return ps
}

// protect puts the constant policies into the kernel, takes over those that an earlier run left, and retires leftovers
// for addresses and ports that are no longer configured: the earlier run may have left TCP connections there. It warns
// of foreign policies that the kernel would find first.
func protect(c *conn, ps []policy, reqid uint32, block time.Duration, log *slog.Logger) error {
	found, err := c.policies()
	if err != nil {
		return err
	}
	if err := place(c, ps); err != nil {
		return err
	}

	ours := make(map[policyID]bool, len(ps))
	for i := range ps {
		ours[ps[i].policyID] = true
	}
	var stale []policy
	adopted, expiring := 0, 0
	for i := range found {
		id := policyID{found[i].Sel, found[i].Dir}
		switch {
		case ours[id]:
			adopted++
		case id.sel.User == policyTag(reqid) && retired(&found[i], block):
			expiring++
		case id.sel.User == policyTag(reqid):
			stale = append(stale, policy{policyID: id, reqid: reqid})
		default:
			warnPrecedence(&found[i], ps, log)
		}
	}
	if err := retire(c, stale, block); err != nil {
		return err
	}
	if adopted > 0 {
		log.Info("took over policies of an earlier run", slog.Int("count", adopted))
	}
	if n := expiring + len(stale); n > 0 {
		log.Warn("addresses or ports of an earlier configuration stay blocked for a while",
			slog.Int("policies", n), slog.Duration("at_most", block))
	}
	return nil
}

// place puts policies into the kernel, replacing in one step those with the same selector and direction: their limit
// starts anew.
func place(c *conn, ps []policy) error {
	return c.inBatches(len(ps), func(i int) { c.updatePolicy(&ps[i]) }, func(i int, err error) error {
		return fmt.Errorf("add policy %s: %w", ps[i], err)
	})
}

// retired reports whether a policy is one that retire has left: it ends soon. The limit of the others is far longer.
func retired(p *nl.XfrmUserpolicyInfo, block time.Duration) bool {
	return p.Lft.HardAddExpiresSeconds != 0 && p.Lft.HardAddExpiresSeconds <= seconds(block)
}

// seconds rounds up.
func seconds(d time.Duration) uint64 { return uint64((d + time.Second - 1) / time.Second) }

// retire turns policies, in place, into block policies that the kernel removes when a time has passed. Deleting them
// instead would let the kernel send in clear what orphaned TCP connections still hold, see blockAfterClose.
func retire(c *conn, ps []policy, after time.Duration) error {
	return c.inBatches(len(ps), func(i int) {
		p := ps[i]
		p.action, p.expires = actionBlock, seconds(after)
		c.updatePolicy(&p)
	}, func(i int, err error) error {
		return fmt.Errorf("block %s: %w", ps[i], err)
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
	if p.sel.Proto == unix.IPPROTO_ICMP || p.sel.Proto == unix.IPPROTO_ICMPV6 {
		return fmt.Sprintf("%s src %s dst %s ICMP type %s code %s", d,
			prefix(p.sel.Saddr, p.sel.PrefixlenS, p.sel.Family), prefix(p.sel.Daddr, p.sel.PrefixlenD, p.sel.Family),
			portString(p.sel.Sport, p.sel.SportMask), portString(p.sel.Dport, p.sel.DportMask))
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
