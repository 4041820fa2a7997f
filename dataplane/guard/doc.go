// Package guard loads and runs gmgate's eBPF programs (package bpf): the guard in front of the ESP ports, and the
// steering of sockets to workers.
//
//	Gm interface ──► guard (XDP, else tc) ──► ESP (kernel or user space) ──► steering ──► socket of the owning worker
//	                   │  ▲
//	          first    │  │ sas: (destination, SPI) → phone
//	          uses,    ▼  │ traffics: packets, octets, last one, by phone and CPU
//	          drops   ring buffers and maps
//
// # The guard
//
// It drops at the interface what can never become a message: ESP to a Gm address without an SA of ours or from another
// address than the phone's, clear packets to protected ports, malformed packets, and REGISTERs beyond what a source may
// send. What passes is not verified by anybody yet: its counters and first uses are hints, for metrics, liveness and
// diagnosis. A decision about identity is made by ESP and by nobody else.
//
// Invariants. An SPI is in the map before the 401 that names it leaves (Add in the callback of an installation), and
// leaves it no sooner than its SA (Remove likewise). Packets that are not for an address of ours are passed on. A guard
// that cannot be attached changes nothing else: what it drops is dropped behind it as well, only later and dearer.
//
// # Hooks
//
// Native XDP is taken where the driver has it; else tcx (Linux 6.6), else a clsact filter, else XDP in the generic
// form. The kernel's ESP with GRO and esp4_offload decrypts before tc hooks and before generic XDP. The tc program can
// tell such packets from clear ones, since they carry the state that decrypted them; generic XDP cannot, and leaves clear
// packets to the kernel's policies where the kernel does the ESP.
//
// # Restarts
//
// With a pin directory (a bpffs) the maps and the links outlive the process: while it is away the guard goes on, counters
// and SPIs are kept, and the next process puts its program in place of the old one in one step (Attach, after Sync has
// brought the SPIs in line with the SA sets). Unload takes everything away. Two instances have two directories, and leave
// each other's addresses alone. The directory is locked while a process uses it.
//
// # Steering
//
// Every Gm listener is a reuseport group with a member for each worker. The program gives a packet to the worker that
// owns its source: by the affinity map, else by the same hash of the address that front.Owner computes.
//
// # Concurrency
//
// All methods may be called from any goroutine. None is for the hot path: maps are written when SA sets come and go.
// Traffic and First make no system call.
package guard
