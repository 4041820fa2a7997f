// Package xfrm puts SA sets into the Linux kernel: it implements sa.Installer on the XFRM netlink interface.
//
// # What stands in the kernel
//
// Policies are constant. For every Gm address and every protected port there is one policy in and one out, open towards
// the peer, whose template demands transport-mode ESP with our reqid; they are there before the first SA and stay until
// Close, which turns them into block policies that expire when the kernel has given up the TCP connections of the
// process. Detach leaves them as they are. A packet of a protected port that no SA covers is therefore dropped in both directions, whoever sends it
// (TS 33.203 §7.1: nothing for a protected port in clear). There is no policy per phone: per-phone policies would leave
// clear packets of every other address alone. See policy.go for the block policies beside them: against forwarding, and
// against ICMP errors that quote decrypted datagrams.
//
// States are four per SA set (TS 33.203 §7.1). Each has a selector with both addresses and both ports and any protocol,
// so that one phone's SA never carries another phone's address (the kernel counts XfrmInStateMismatch) and UDP and TCP
// both work. Inbound states label the packets they decrypt with Params.Label as packet mark; no routing rule may match
// these marks. All states carry our reqid, so they can be told from those of other programs.
//
// # Invariants
//
//   - A set is in the kernel whole or not at all: every message asks for an acknowledgement, each is matched to its
//     message by sequence number, and whatever a failed Install added is taken out again before done is called.
//   - Objects of other programs are never changed: states are removed only if this process added them or if they carry
//     our reqid, policies only with our tag in their selector.
//   - Whatever is left behind by a crash or by Detach is safe: the policies keep refusing clear packets, the next New takes
//     them over, and Adopt takes over the states or removes them. Should nobody come back, the states end with their hard
//     limit and the policies after ten days, later than any state. While the process lives it renews the policies daily.
//   - Nothing passes a protected port in clear at any time from New until the block policies after Close expire, or
//     the policies of a process that died and did not come back within nine days. We only ever replace policies in
//     place, and never delete them.
//   - Whoever else removes or changes one of the policies, by accident (ip xfrm policy flush) or for another reason, opens
//     the protected ports: the kernel tells, the policies are put back within milliseconds, and PoliciesRestored counts
//     it. This is a repair and no defence against another program with CAP_NET_ADMIN.
//   - Nothing here formats a key or a netlink message; buffers that held keys are overwritten.
//
// One Backend per network namespace and reqid: New takes a lock, so that a second daemon that is started by mistake
// cannot take the first one's states and policies for leftovers. The lock is an abstract Unix socket name, which any
// process of the namespace could occupy: that prevents a start, but never opens anything.
//
// # Concurrency
//
// Install, Remove and Extend queue a request and return; one worker goroutine executes them in order, several SA sets
// per system call, and calls done. Another goroutine reads the kernel's expiry events and calls Config.Expired, one
// reads its notifications of policy changes, and one puts policies back. Adopt and Survey read the kernel on the goroutine
// of the caller, each with a socket of its own: the worker waits for all of Adopt, but goes on during Survey, which judges
// only what it did not touch. All methods may be called from any goroutine.
//
// # Time
//
// The kernel measures the hard limit on the wall clock: stepping the clock forward ends SAs early. The limit is only a
// backstop for a crash; the lifetime of TS 33.203 §7.4 is kept by package sa. The block policies after Close expire by
// the same clock.
package xfrm
