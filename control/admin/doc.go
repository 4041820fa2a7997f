// Package admin is the operator's access to a running gmgate: HTTP with JSON on a unix socket, the client of it, and the
// types that both speak.
//
//	GET  /v1/status                                     version, backend, workers, counts
//	GET  /v1/ues?impi=&impu=&addr=&contact=&limit=&after=    UE contexts, in pages
//	GET  /v1/ues/{id}?sequences=                        one of them, with its sequence numbers where that is true
//	POST /v1/deregister {"impi"|"impu"|"contact"|"id"}  end registrations as the network does (TS 24.229 §5.2.5)
//	POST /v1/move {"id", "worker"}                      give the UE contexts at an address to another worker
//	GET  /v1/guard                                      the packet filter in front: hooks, tables, counters
//	GET  /v1/drops                                      samples of what it drops, a line of JSON each, until the client leaves
//
// The types of this package are the contract: within /v1 fields are added, never renamed or removed, so clients ignore
// what they do not know. Every answer is JSON; one with a status of 400 or more is a Problem. Keys are in none of them.
//
// Who may connect is ruled by the permissions of the socket, which belongs to its owner and group (0660); there is no
// other way in, neither an abstract socket nor TCP. What changes something is logged with the user id of who asked.
//
// Concurrency: a Server answers a bounded number of requests at the same time; what it tells is gathered from the workers
// through a Source, which keeps their loops turning. Whoever follows drops and does not read fast enough misses some, and is told
// how many.
package admin
