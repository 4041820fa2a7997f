// Package survive keeps registrations and SA sets over restarts, crashes and reboots, and watches that all who keep a part
// of them agree.
//
// At the start Load reads the store, drops what has ended meanwhile, and has the ESP backend adopt the SAs that it still
// holds; those that are gone it has installed again, with the outbound sequence numbers moved past the last checkpoint by
// Block, so that the phone's replay window accepts what comes next and no number is used twice with one key (RFC 4303
// §3.3.3). Then, once a minute, the Reconciler compares workers, backend and store, checkpoints the sequence numbers, and
// has mended what the backend has lost.
//
// Invariants: a set is handed to a worker only when the backend holds its four SAs; an SA of ours in the backend that
// belongs to no set that was kept is removed; nothing of others is touched. The mark of a set that was installed again is
// in the store before the set is used.
//
// Concurrency: Load runs before there are workers. A Reconciler runs on a goroutine of its own; its figures may be read
// from any.
package survive
