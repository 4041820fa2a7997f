// Package bpf holds gmgate's eBPF programs, in C, and what bpf2go generates from them: the objects and the Go types of
// what programs and Go exchange. Package dataplane/guard loads and runs them.
//
// guard.bpf.c stands in front of the ESP ports, on XDP and tc hooks; steer.bpf.c chooses the worker's socket. The
// objects are committed, so that building gmgate needs no compiler for C; `make generate` makes them anew and a test
// compares them with the sources.
package bpf

//go:generate ../scripts/bpf2go.sh Guard guard.bpf.c reason ring_kind sa_flag address sa_key sa_value traffic tally first_use dropped
//go:generate ../scripts/bpf2go.sh Steer steer.bpf.c result flow group_key
