// Package front is the network front of gmgate: UDP and TCP sockets, framing, batching and egress, without any SIP
// semantics.
//
// A Front runs N workers. Each is a gnet engine of its own with one event loop locked to an OS thread, and owns its
// member of every UDP listener's reuseport group, its TCP connections and its Handler. Nothing is shared between
// workers but the message queues (Post, Hand) and the accept and dial goroutines, so a handler needs no locks.
//
// # Invariants
//
//   - Every Handler method runs on its worker's loop goroutine, never concurrently with another one of that handler.
//     Boot comes before everything else.
//   - A datagram on a Gm listener that all workers share is handled by worker Owner(source address). A classic BPF
//     program in the reuseport group computes the same function, so a hand-over between workers is rare.
//   - A connection belongs to one worker for life. Handler.Closed is called once for each that was opened, after the
//     handler method during which it broke has returned.
//   - SendUDP copies. Queued datagrams leave by sendmmsg when the current event ends, or when a batch is full, in order
//     for each listener.
//   - Whatever a peer sends, and whatever panics in a handler, the loop goes on: the message is dropped and counted.
//   - Nothing grows without bound: messages, partial messages, output per connection and in total, connections, queues and
//     dials have limits. What strangers can use up, connections of the unprotected side and dials to phones, is limited
//     apart from what the core needs.
//   - A connection of the protected side ends with a reset, whoever ends it, so that nothing is sent without its SAs.
//
// # Sockets
//
// Sockets are opened here and not by gnet, which has no hook before bind and cannot open one in another network
// namespace. gnet is given placeholders, UDP sockets on loopback ports that are reserved beforehand; in OnBoot, that is
// after gnet made them and before its loop watches them, the socket is put over the placeholder's descriptor by dup3.
// Each placeholder has a port of its own, the descriptor is found by the socket's inode, exactly one may match, and
// the result is verified, so a mix-up is an error at start. A further placeholder becomes one end of a socket pair, the
// worker's doorbell: gnet's Execute keeps no order beyond 1024 tasks, and writes to descriptors that may be reused
// when it races with the end of an engine.
//
// All members of a reuseport group are bound in the order of the workers, since the BPF program returns the position
// in the group, and nobody else may hold the address: the first one is bound without SO_REUSEPORT, which would share it
// silently, and New refuses an address that is in use.
//
// # Clauses
//
// RFC 3261 §18 (transport, framing by Content-Length), RFC 5626 §3.5.1 and §4.4.1 (keep-alive), TS 33.203 §7.1 (ports: an
// outgoing connection starts from the port that is also listened on).
package front
