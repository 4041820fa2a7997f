// SPDX-License-Identifier: Apache-2.0
// What is known of a packet, and the headers that tell it.
#pragma once

#include "maps.h"

#define GO_ON (-1)

// packet holds offsets and no pointers, so that functions which the verifier looks at apart can share it.
struct packet {
	__u32 length; // of the frame
	__u32 interface;

	// Filled in by locate.
	__u32 at;	 // offset of the payload of the IP packet
	__u32 left;	 // octets of it
	__u32 bytes;	 // of the IP packet
	__u32 local;	 // index of the destination
	struct address source, destination;
	__u8 protocol;
	__u8 fragment; // the first one of several

	// Filled in by judge.
	__u16 source_port, destination_port;
	__u32 spi;

	__u32 segments; // that the stack has merged into this frame, or not cut yet; 0: it is as it was sent
};

struct ipv4 {
	__u8 version_length, tos;
	__u16 total_length, id, offset;
	__u8 ttl, protocol;
	__u16 checksum;
	__u32 source, destination;
};

struct ipv6 {
	__u8 version_class, flow[3];
	__u16 payload_length;
	__u8 next, hop_limit;
	struct address source, destination;
};

struct extension {
	__u8 next, length;
	__u16 offset; // of a fragment
	__u32 rest;
};

// is_extension reports whether an IPv6 extension header that can be followed is next.
static __always_inline int is_extension(__u8 protocol)
{
	switch (protocol) {
	case PROTO_HOP_BY_HOP:
	case PROTO_ROUTING:
	case PROTO_DEST_OPTIONS:
	case PROTO_FRAGMENT:
	case PROTO_AH:
	case PROTO_MOBILITY:
	case PROTO_HIP:
	case PROTO_SHIM6:
		return 1;
	}
	return 0;
}

static __always_inline struct address mapped(__u32 v4)
{
	struct address a = {.word = {0, 0, bpf_htonl(0xffff), v4}};

	return a;
}

static __always_inline int is_mapped(const struct address *a)
{
	return !a->word[0] && !a->word[1] && a->word[2] == bpf_htonl(0xffff);
}

static __always_inline int equal(const struct address *a, const volatile struct address *b)
{
	return a->word[3] == b->word[3] && a->word[2] == b->word[2] && a->word[1] == b->word[1] &&
	       a->word[0] == b->word[0];
}

// ours looks the destination up. Indexes are constants: an address of a constant that is computed in a loop takes
// CAP_PERFMON.
static __always_inline int ours(struct packet *p)
{
#pragma unroll
	for (__u32 i = 0; i < MAX_LOCAL; i++) {
		if (i >= locals)
			break;
		if (equal(&p->destination, &local[i])) {
			p->local = i;
			return 1;
		}
	}
	return 0;
}

// is_protected reads the port anew: were it known on one way to here and not on another, the index would take CAP_PERFMON.
static __always_inline int is_protected(const struct packet *p)
{
	__u16 port = *(const volatile __u16 *)&p->destination_port;

	return protected_ports[port >> 6] >> (port & 63) & 1;
}
