// Package proxy decides what happens to SIP messages between phones and the IMS core: it is the access-security part of
// a P-CSCF (TS 24.229 §5.2).
//
// Requests other than REGISTER, and their answers, are forwarded as by a stateless proxy (RFC 3261 §16.11): what an
// answer or an in-dialog request needs is in a sealed flow token, carried in our Via branch, Path and Record-Route.
// REGISTER transactions keep state, because SAs hang on them; and what comes over TCP and leaves over UDP is kept until it
// is answered, because its sender would not repeat it.
//
// For every registered UE there is a subscription of our own to its registration state (TS 24.229 §5.2.3), by which the
// core ends or shortens registrations. Package regevent is its state machine and dialog, package reginfo reads what the
// core says; here are the transactions and what becomes of the UE. Its NOTIFY requests name the UE in a sealed token too.
//
// A Worker belongs to one event loop. All its methods run there; nothing is locked and nothing waits. What is slow (SA
// installation, name resolution, connecting) is handed out and comes back as an event.
package proxy
