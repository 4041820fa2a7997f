// Package esp is an ESP engine for transport mode (RFC 4303) with the algorithms of the ipsec-3gpp mechanism
// (TS 33.203 Annex H, Annex I): it turns the payload of an IP packet into an ESP packet and back. It opens no sockets
// and knows no addresses; selectors are its caller's duty (RFC 4303 §3.4.4 leaves them to the SAD entry).
//
// Invariants. Sealing and opening allocate nothing as long as the destination has room. A packet whose ICV does not
// verify leaves no trace in the replay window. A sequence number is sent at most once; after 2^32-1 packets an SA
// refuses to send (RFC 4303 §3.3.3, no extended sequence numbers). The IVs of aes-gcm and aes-gmac count up from a
// random start, because one key and one salt protect all four SAs of a set (TS 33.203 Annex I), and those which go on
// after a restart; the IVs of the CBC ciphers cannot be predicted (RFC 3602 §3).
//
// An SA that outlived its process goes on after given numbers (SetSeq): what was sent is not sent again, and what was
// received is not accepted again.
//
// Concurrency. An Outbound and an Inbound each belong to one goroutine at a time. Only their Seq may be called by
// others. Scratch memory is shared through a pool, so that an SA stays a few hundred octets plus one key schedule.
//
// Specifications: RFC 4303 (ESP), RFC 2403 and RFC 2404 (HMAC-MD5-96, HMAC-SHA-1-96), RFC 2410 (null), RFC 2451
// (3DES-CBC), RFC 3602 (AES-CBC), RFC 4106 (AES-GCM), RFC 4543 (AES-GMAC), RFC 6479 (replay window).
package esp
