// Package attack is the attacker on the access network: it makes the packets that an edge has to survive, and puts them on
// a link as they are.
//
// The builders of packets are pure. Whatever header a packet has is written here, checksums included, so that nothing of
// it is refused for a reason other than the one that it is made for; what has to be wrong with it is wrong on purpose
// (Malformed). An Injector writes packets of any source address to a packet socket, many with one system call, at a rate and
// up to a number or a time that its caller says. It does not answer and does not listen: whoever sends a SYN from somebody
// else's address does not see the answer either.
//
// It is for test networks of namespaces (package lab): an Injector sends to one neighbour on one link, and never to a
// name or through a route.
package attack
