//go:build ignore
// SPDX-License-Identifier: Apache-2.0
// Steering chooses among the sockets that the workers have at one address: a phone's datagrams and connections go to
// the worker that owns it. After ESP was taken off it sees the inner packet, before policies are checked: where a packet
// comes from is a hint for its way, not for whose it is.
#include <linux/bpf.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "consts.h"
#include "structs.h"

char _license[] SEC("license") = "Apache-2.0";

#define IPV4_SOURCE_AT 12 // in the network header, the destination behind it
#define IPV6_SOURCE_AT 8

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct flow);
	__type(value, __u32); // worker
} affinity SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct group_key);
	__type(value, __u32); // number of the group
} groups SEC(".maps");

// Sockets by workers * group + worker.
struct {
	__uint(type, BPF_MAP_TYPE_REUSEPORT_SOCKARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} sockets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, STEER_RESULTS);
	__type(key, __u32);
	__type(value, __u64);
} results SEC(".maps");

volatile const __u32 workers = 1;
const enum result *keep_result __attribute__((unused)); // for Go

// Entries of affinity, those of flows and those of addresses: nobody looks for what there is none of.
volatile __u32 moved_flows;
volatile __u32 moved_addresses;

static __always_inline void count(enum result result)
{
	__u32 key = result;
	__u64 *n = bpf_map_lookup_elem(&results, &key);

	if (n)
		(*n)++;
}

// find looks for the flow, then for all flows of its source.
static __always_inline __u32 *find(struct flow *f)
{
	__u32 *worker = moved_flows ? bpf_map_lookup_elem(&affinity, f) : 0;

	if (worker || !moved_addresses)
		return worker;
	f->source_port = 0;
	f->destination_port = 0;
	return bpf_map_lookup_elem(&affinity, f);
}

SEC("sk_reuseport")
int steer(struct sk_reuseport_md *md)
{
	struct group_key group = {.protocol = md->ip_protocol};
	struct flow f = {};
	__u32 *number, *worker, index, owner;
	__u16 ports[2];

	if (bpf_skb_load_bytes(md, 0, ports, sizeof(ports)))
		goto kernel;
	f.source_port = bpf_ntohs(ports[0]);
	f.destination_port = bpf_ntohs(ports[1]);
	group.port = f.destination_port;
	if (md->eth_protocol == bpf_htons(ETHERTYPE_IPV4)) {
		__u32 ends[2]; // source and destination

		if (bpf_skb_load_bytes_relative(md, IPV4_SOURCE_AT, ends, sizeof(ends), BPF_HDR_START_NET))
			goto kernel;
		f.source.word[3] = ends[0];
		in_order();
		f.source.word[2] = bpf_htonl(0xffff);
		group.local.word[3] = ends[1];
		in_order();
		group.local.word[2] = bpf_htonl(0xffff);
		owner = bpf_ntohl(ends[0]);
	} else {
		struct address ends[2];

		if (bpf_skb_load_bytes_relative(md, IPV6_SOURCE_AT, ends, sizeof(ends), BPF_HDR_START_NET))
			goto kernel;
		f.source = ends[0];
		group.local = ends[1];
		owner = bpf_ntohl(ends[0].word[0] ^ ends[0].word[1] ^ ends[0].word[2] ^ ends[0].word[3]);
	}
	number = bpf_map_lookup_elem(&groups, &group);
	if (!number)
		goto kernel;
	index = *number * workers;
	worker = find(&f);
	index += worker ? *worker : owner % workers;
	if (bpf_sk_select_reuseport(md, &sockets, &index, 0))
		goto kernel;
	count(worker ? STEER_AFFINITY : STEER_HASH);
	return SK_PASS;
kernel:
	count(STEER_KERNEL);
	return SK_PASS;
}
