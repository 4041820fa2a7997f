// Package front is the network front of gmgate: UDP and TCP sockets, framing, batching and egress, without any SIP
// semantics.
//
// A Front runs N workers. Each is a gnet engine of its own with one event loop locked to an OS thread, and owns its
// member of every UDP listener's reuseport group, its TCP connections and its Handler. Nothing is shared between
// workers but the message queues (Post, Hand), the accept and dial goroutines, and the table of moved addresses, which is
// read without a lock. So a handler needs no locks, and a message that comes in at its owner meets none: what a loop takes
// a lock for is a task from or for another goroutine, the end of a connection of the unprotected side, and counters that
// somebody has asked for.
//
// # Invariants
//
//   - Every Handler method runs on its worker's loop goroutine, never concurrently with another one of that handler.
//     Boot comes before everything else.
//   - A datagram on a Gm listener that all workers share is handled by the worker that Front.Owner tells for its source
//     address when it is read: the hash of the address, unless Move said otherwise. A program in the reuseport group
//     chooses the same one, so a hand-over between workers is rare. It is Config.Steering, or a classic BPF program that
//     computes the hash and knows of no moves.
//   - A connection belongs to one worker for life, on such listeners to the peer's owner at the time of accepting.
//     Handler.Closed is called once for each that was opened, after the handler method during which it broke has returned.
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
// With Config.Steering, TCP listeners of the Gm sides have one socket for each worker, too. They join their group when they
// start to listen, and nothing is accepted before all of them do. Whoever accepts a connection looks up its owner
// nevertheless: the program decided when the connection began, and was not there at first.
//
// # Labels
//
// The kernel's ESP marks what it has verified with the label of the UE context, on its inbound SAs. On listeners of the
// protected side which are not hidden the mark becomes ims.Flow.Label: of datagrams by SO_RCVMARK (Linux 5.19) in a control
// message, of connections by SO_MARK, if net.ipv4.tcp_fwmark_accept is set when they open. The label is 0, nobody has told,
// where the kernel cannot, on all other listeners, on connections of our own, and for the first datagram of each wake-up,
// which gnet reads without control messages. Marks are as good as what keeps others from setting them: local processes
// with CAP_NET_ADMIN can, and so can rules of the packet filter.
//
// # Clauses
//
// RFC 3261 §18 (transport, framing by Content-Length), RFC 5626 §3.5.1 and §4.4.1 (keep-alive), TS 33.203 §7.1 (ports: an
// outgoing connection starts from the port that is also listened on).
package front
