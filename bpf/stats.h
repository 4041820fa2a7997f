// SPDX-License-Identifier: Apache-2.0
// Counters and samples.
#pragma once

#include "parse.h"

static __always_inline void count(__u32 reason, __u64 bytes)
{
	__u32 key = reason;
	struct tally *t = bpf_map_lookup_elem(&tallies, &key);

	if (t) {
		t->packets++;
		t->bytes += bytes;
	}
}

static __always_inline void lose(enum ring_kind ring)
{
	__u32 key = ring;
	__u64 *n = bpf_map_lookup_elem(&losses, &key);

	if (n)
		(*n)++;
}

// use counts a packet for a UE context.
static __always_inline void use(__u32 slot, __u64 bytes, __u64 now)
{
	__u32 index = slot * lanes + (bpf_get_smp_processor_id() & (lanes - 1));
	struct traffic *t = bpf_map_lookup_elem(&traffics, &index);

	if (!t)
		return; // the slot of another program's SA lies behind the end
	if (lane_per_cpu) {
		t->packets++;
		t->bytes += bytes;
	} else {
		__sync_fetch_and_add(&t->packets, 1);
		__sync_fetch_and_add(&t->bytes, bytes);
	}
	t->last = now;
}

// report tells once for each SA that a packet has come in on it, from the right source but not verified.
static __always_inline void report(const struct packet *p, struct sa_value *sa, __u32 spi, __u64 now)
{
	__u32 flags = sa->flags;
	struct first_use *e;

	if (__sync_val_compare_and_swap(&sa->flags, flags, flags & ~SA_UNUSED) != flags)
		return; // another CPU was faster
	e = bpf_ringbuf_reserve(&first_uses, sizeof(*e), 0);
	if (!e) {
		lose(RING_FIRST_USE);
		return;
	}
	e->time = now;
	e->set = sa->set;
	e->spi = spi;
	e->local = p->local;
	bpf_ringbuf_submit(e, 0);
}

// sample shows a dropped packet to whoever follows, at a bounded rate: a flood must not wake anybody up for each packet.
static __always_inline void sample(const struct packet *p, __u32 reason)
{
	__u64 interval = sample_interval, now, *next;
	struct dropped *e;
	__u32 zero = 0;

	if (!interval)
		return;
	next = bpf_map_lookup_elem(&sampled, &zero);
	now = bpf_ktime_get_coarse_ns();
	if (!next || now < *next)
		return;
	*next = now + interval;
	e = bpf_ringbuf_reserve(&drops, sizeof(*e), 0);
	if (!e) {
		lose(RING_DROP);
		return;
	}
	e->time = now;
	e->source = p->source;
	e->destination = p->destination;
	e->spi = p->spi;
	e->length = p->bytes;
	e->interface = p->interface;
	e->reason = reason;
	e->source_port = p->source_port;
	e->destination_port = p->destination_port;
	e->protocol = p->protocol;
	__builtin_memset(e->spare, 0, sizeof(e->spare));
	bpf_ringbuf_submit(e, 0);
}
