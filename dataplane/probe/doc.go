// Package probe finds out what a host offers: kernel and its modules, eBPF, capabilities, sysctls, limits, addresses, ports,
// files and the clock. It tells facts as typed values; what they mean for gmgate, and in which words, is its callers' business.
//
// Invariants. Nothing on the host is changed, and nothing is left: sockets are bound and closed, devices opened and closed. A
// fact that cannot be found out is an error beside it (fs.ErrPermission, fs.ErrNotExist) and never a guess.
//
// Everything comes through the fields of a Host, files from one file system, so that a host can be made up in tests.
//
// Concurrency: a Host may be used by any number of goroutines. Sysctls of the network, addresses and ports are those of the
// calling thread's network namespace.
package probe
