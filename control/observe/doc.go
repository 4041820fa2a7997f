// Package observe is what gmgate tells about itself: Prometheus metrics and the logger.
//
// The counters of the SIP path are kept per worker (Counters). A worker is the only writer of its counters, so counting
// is a load and a store, without lock and without allocation; a scrape reads them with atomic loads and adds the
// workers up. What happens seldom or away from the workers (registration times, SA installation) goes to ordinary
// Prometheus histograms in Metrics, which anybody may call.
//
// Invariants: no label ever carries an identity, an address, an SPI or anything else that grows with the number of UEs;
// every label value comes from a fixed table in this package, in control/ims or in dataplane/sipmsg. Keys are never
// printed: ims.Key redacts itself however it is logged.
//
// Concurrency: see the methods. Metrics is set up (New, BuildInfo, AddFunc, Register) by one goroutine before use.
package observe
