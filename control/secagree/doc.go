// Package secagree reads, compares, selects from and writes the Security-Client, Security-Server and Security-Verify
// headers of RFC 3329 with the ipsec-3gpp mechanism of TS 33.203 Annex H.
//
// It is pure: no I/O, no clock, no goroutines, no package state. Values are plain data; a List is read-only once Parse
// has returned it and may then be shared between goroutines. Cost is linear in the size of the input, and the input is
// bounded by MaxBytes, MaxMechanisms and MaxParams, since SM1 comes from a stranger.
//
// Invariants:
//
//   - Parse is tolerant: one unusable entry never spoils the others. Only what makes the borders between entries
//     doubtful (an open quoted string, control characters) and the bounds fail the header as a whole.
//   - Nothing that was received is lost: parameters without a meaning here are kept and compared as text.
//   - Parse(l.String()) equals l, unless spelled out defaults and quotes take the text over a bound, and Parse of what
//     Server.Append wrote gives back what was written.
//   - Error texts name the offending entry and parameter and consist of printable ASCII without quotes or
//     backslashes, so they can be put into the text of a SIP Warning header as they are.
//
// Clauses: RFC 3329 §2.2 (syntax), §2.3 and §2.4 (protocol operation), TS 33.203 §7.1 (parameters), §7.2 (set-up),
// §7.3.2 (unacceptable proposals, failed consistency check), Annex H (ipsec-3gpp syntax).
package secagree
