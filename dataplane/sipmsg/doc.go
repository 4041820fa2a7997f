// Package sipmsg reads and edits SIP messages without allocating: a lazy scanner, value parsers, a splice editor and
// stream framing. It is the code every forwarded message runs through.
//
// A Msg indexes the header rows of one message in place; nothing is decoded until a value parser (ParseVia, ParseURI,
// ParseNameAddr, Element, Param ...) is applied to a row. An Edit collects insertions, replacements and deletions by
// byte offset and writes the edited message in one pass, so that everything that was not touched leaves byte for byte
// as it came. Frame cuts a byte stream into messages and keep-alives.
//
// Invariants:
//
//   - Slices that Msg and the parsers return point into the message that was given to Scan. They are valid as long as
//     that buffer is; nothing is copied and nothing is retained.
//   - For any input whatsoever: no panic, no unbounded loop, every returned offset lies inside the message.
//   - Row ends, folding (RFC 3261 §7.3.1) and Content-Length are decided in the same way by Scan and by Frame, so that
//     a message cannot be cut at one place and understood at another. What other parsers are known to read differently
//     (bare CR, NUL, repeated Content-Length or Call-ID) is an error, not a guess.
//   - Scanning, parsing, editing and framing allocate nothing once the buffers of an Edit have grown.
//
// Concurrency: no package state changes after initialisation. A Msg and an Edit belong to one goroutine at a time.
//
// Clauses: RFC 3261 §7, §18.3, §20 and §25; compact forms of the IANA registry; RFC 3581 (rport); RFC 5626 §4.4.1
// (CRLF keep-alive); RFC 6223 (keep); RFC 3966 (tel). RFC 4475 serves as test material.
package sipmsg
