// Package reginfo reads the documents by which a registrar tells of registrations (application/reginfo+xml, RFC 3680 §5)
// and keeps the view that they add up to.
//
// Parse turns one document into a Document; a Tracker applies the documents of one subscription in order and says what
// of it concerns a P-CSCF: contacts that the core has ended or shortened, registrations that are over.
//
// Invariants:
//
//   - For any input whatsoever: no panic, and time and memory are bounded by MaxBytes, MaxDepth, MaxRegistrations,
//     MaxContacts and MaxParams. A document type declaration is refused, so no entity but the five of XML is ever
//     expanded; nothing is fetched.
//   - Elements and attributes that are not of RFC 3680 or RFC 5628 are ignored, whatever they hold. What remains is read
//     strictly where it decides about a registration (states, versions), and leniently elsewhere: an unknown event is
//     no reason to overlook that a contact is terminated.
//   - Texts come without surrounding white space and without control characters: they can be logged as they are. They
//     are the registrar's word and nothing more: a contact is one of ours only when its URI is.
//   - A Tracker never reports a contact as terminated that its view still holds as active under the same address of
//     record.
//
// Concurrency: no package state, no goroutines, no locks. A Tracker belongs to one goroutine; here, the UE's worker.
//
// Clauses: RFC 3680 §4.7, §5 (document), §5.1 (versions); RFC 5628 §5 (GRUUs); TS 24.229 §5.2.3 and §5.2.5.2 (what the
// P-CSCF does with it).
package reginfo
