// Package aka is the P-CSCF's part of HTTP Digest AKA: it takes CK and IK out of the challenge of the S-CSCF, expands
// them into ESP keys, reads Authorization headers and maintains their integrity-protected parameter.
//
// It is pure: no I/O, no clock, no goroutines, no package state; everything may be called from any goroutine. Cost is
// linear in the input, which is bounded by MaxBytes and MaxParams per header row.
//
// Invariants:
//
//   - Headers are edited, not rewritten: bytes outside the parameters that are taken out or put in stay as they are, as
//     the digest of the UE and the parsers of handsets depend on them.
//   - The grammar is strict where leniency would let two readers see different parameters: a value is one quoted string
//     or has no quotes, spaces or commas at all, and names are tokens. What does not obey is refused.
//   - Keys are ims.Key values and never part of an error text; nor is any other text of the header.
//
// Clauses: RFC 3310 (HTTP Digest AKA), TS 24.229 §7.2A.1 (ck and ik), §7.2A.2 (integrity-protected), TS 33.203 Annex I
// (key expansion), TS 33.220 Annex B (key derivation function).
package aka
