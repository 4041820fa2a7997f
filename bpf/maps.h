// SPDX-License-Identifier: Apache-2.0
// Maps of the guard. Sizes of 1 are set by Go from the configuration.
#pragma once

#include "consts.h"
#include "structs.h"

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC); // memory follows the number of phones
	__uint(max_entries, 1);
	__type(key, struct sa_key);
	__type(value, struct sa_value);
} sas SEC(".maps");

// Lanes of one slot lie side by side: lanes * slot + lane.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct traffic);
} traffics SEC(".maps");

// Token buckets of the sources of the unprotected port, each as the time at which it is full again (GCRA).
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct address);
	__type(value, __u64);
} sources SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, REASONS);
	__type(key, __u32);
	__type(value, struct tally);
} tallies SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, RINGS);
	__type(key, __u32);
	__type(value, __u64);
} losses SEC(".maps");

// When this CPU may sample the next drop.
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} sampled SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, FIRST_USE_RING);
} first_uses SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, DROP_RING);
} drops SEC(".maps");

// Constants of one load.
volatile const struct address local[MAX_LOCAL];
volatile const __u32 locals;
volatile const __u64 protected_ports[1024]; // a bit for each port
volatile const __u16 clear_port;
volatile const __u32 lanes = 1;	      // a power of two
volatile const __u8 lane_per_cpu = 1; // no two CPUs share a lane
volatile const __u8 pass_unknown;     // ESP without an SA of ours
volatile const __u8 pass_clear;	      // clear packets to protected ports: somebody behind us tells them apart
volatile const __u8 limit_all;	      // every datagram to the unprotected port counts, not only REGISTER
volatile const __u64 limit_interval;  // ns per REGISTER; 0: no limit
volatile const __u64 limit_burst;     // ns: interval times what may come at once beyond the first one

// Set while somebody follows the drops: ns between two samples of a CPU. 0: none are taken.
volatile __u64 sample_interval;

// Types that Go needs and that nothing else would keep in the object.
const struct first_use *keep_first_use __attribute__((unused));
const struct dropped *keep_dropped __attribute__((unused));
const enum reason *keep_reason __attribute__((unused));
const enum ring_kind *keep_ring __attribute__((unused));
const enum sa_flag *keep_flag __attribute__((unused));
