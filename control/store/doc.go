// Package store declares what gmgate remembers over a restart or a crash: the SA sets, the registrations they belong to,
// the sequence numbers they have reached, and the key of the flow tokens. It holds the records, their codec, the sealing
// of what lies on a disk, the Store interface that implementations satisfy (store/bolt is the default; storetest has the
// conformance suite and one in memory), and the Writer, which takes changes from the workers and writes them behind.
//
// Invariants:
//
//   - Nothing secret and nothing personal leaves the process in clear: every record is sealed as a whole with
//     AES-256-GCM. The associated data of a record is its kind, its key and the version of the schema, so a sealed
//     value opens only in the place it was written to. Keys never stand in errors and never print (ims.Key).
//   - A batch is applied as a whole or not at all. What Apply has returned nil for outlives kill -9 and, on media that
//     honour fsync, a power failure. What was not applied yet is lost as if it had never happened.
//   - The Writer coalesces changes of one key and cuts long queues into batches, so a crash may lose the newest record of
//     one key and keep that of another. References between records (Set.Over, Registration.Current) may therefore
//     dangle, and whoever restores treats such a reference as absent.
//   - Times are absolute, since monotonic clocks end with the process, and are kept to the millisecond.
//   - Decoding is strict: one record has one encoding, lengths are bounded, nothing may be left over, and an unknown
//     version is refused. Damaged records are reported one by one (Visitor.Fault) and cost only themselves.
//
// An SA that outlives its process must never repeat a sequence number: peers would drop the packets as replays
// (RFC 4303 §3.4.3), and with aes-gcm and aes-gmac, whose IVs follow the sequence number in some backends, repetition
// would break the cipher (RFC 4106 §3.1). Marks record how far the SAs of a set have come; they never go back;
// sa.Counters.Ahead says where to go on after the counters themselves were lost (RFC 4303 §3.3.3).
//
// Concurrency: a Store and a Writer are safe for concurrent use. Records are plain data.
package store
