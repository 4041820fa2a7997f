//go:build ignore
// SPDX-License-Identifier: Apache-2.0
// The guard stands on the Gm interfaces in front of the ESP ports. It drops what can never become a message: ESP
// without an SA of ours, clear packets to protected ports, and REGISTERs beyond what a source may send. What it lets pass
// is verified by nobody yet.
#include <linux/bpf.h>
#include <linux/pkt_cls.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "rules.h"

char _license[] SEC("license") = "Apache-2.0";

#define CONTEXT struct xdp_md
#define NAME(f) f##_xdp
#define LOAD bpf_xdp_load_bytes
#include "judge.h"
#undef LOAD
#undef CONTEXT
#undef NAME

#define CONTEXT struct __sk_buff
#define NAME(f) f##_tc
#define LOAD bpf_skb_load_bytes
#include "judge.h"
#undef LOAD
#undef CONTEXT
#undef NAME

// network finds the IP packet in a frame: behind VLAN tags that the card has left there, or at once where the link has no
// header. It returns the version, 0 for anything else.
static __always_inline __u32 network(void *data, void *end, int raw, __u32 *at)
{
	if (raw) {
		__u8 *version = data;

		*at = 0;
		return (void *)(version + 1) > end ? 0 : *version >> 4;
	}
	// Offsets are counted: to subtract pointers takes CAP_PERFMON as well.
#pragma unroll
	for (__u32 tags = 0; tags <= MAX_TAGS; tags++) {
		__u16 *type = data + ETHER_TYPE_AT + tags * VLAN_TAG;

		if ((void *)(type + 1) > end)
			return 0;
		if (*type != bpf_htons(ETHERTYPE_VLAN) && *type != bpf_htons(ETHERTYPE_QINQ)) {
			*at = ETHER_TYPE_AT + tags * VLAN_TAG + sizeof(*type);
			switch (*type) {
			case bpf_htons(ETHERTYPE_IPV4):
				return 4;
			case bpf_htons(ETHERTYPE_IPV6):
				return 6;
			}
			return 0;
		}
	}
	return 0;
}

// settle counts a packet and reports whether it may pass.
static __always_inline int settle(struct packet *p, int reason)
{
	if (reason == DROP_CLEARTEXT && pass_clear)
		reason = PASS_OTHER;
	count(reason, p->bytes ?: p->length);
	if (reason < DROP_MALFORMED)
		return 1;
	sample(p, reason);
	return 0;
}

static __always_inline int xdp(struct xdp_md *ctx, int raw)
{
	struct packet p = {.interface = ctx->ingress_ifindex};
	__u32 at = 0, version = network((void *)(long)ctx->data, (void *)(long)ctx->data_end, raw, &at);
	int reason = PASS_OTHER;

	in_order();
	p.length = bpf_xdp_get_buff_len(ctx);
	if (version == 4 || version == 6) {
		reason = locate_xdp(ctx, &p, at, version);
		if (reason == GO_ON)
			reason = judge_xdp(ctx, &p);
	}
	return settle(&p, reason) ? XDP_PASS : XDP_DROP;
}

SEC("xdp.frags")
int guard_xdp(struct xdp_md *ctx)
{
	return xdp(ctx, 0);
}

SEC("xdp.frags")
int guard_xdp_raw(struct xdp_md *ctx)
{
	return xdp(ctx, 1);
}

static __always_inline int tc(struct __sk_buff *skb, int raw)
{
	struct packet p = {.interface = skb->ifindex};
	__u32 at = 0, version;
	int reason = PASS_OTHER;

	in_order();
	p.length = skb->len;
	if (skb->gso_size) {
		p.segments = skb->gso_segs;
		if (!p.segments) // a virtual machine's neighbour does not tell
			p.segments = skb->len / skb->gso_size + 1;
	}
	if ((void *)(long)skb->data + TC_PULL > (void *)(long)skb->data_end)
		bpf_skb_pull_data(skb, skb->len < TC_PULL ? skb->len : TC_PULL); // a failure leaves less to read
	version = network((void *)(long)skb->data, (void *)(long)skb->data_end, raw, &at);
	if (version == 4 || version == 6) {
		reason = locate_tc(skb, &p, at, version);
		if (reason == GO_ON)
			reason = judge_tc(skb, &p);
	}
	if (reason == DROP_CLEARTEXT) {
		// Where the card's driver merges packets and esp4_offload is there, ESP was decrypted before this hook.
		struct bpf_xfrm_state state = {};

		if (!bpf_skb_get_xfrm_state(skb, 0, &state, sizeof(state), 0))
			reason = PASS_DECRYPTED;
	}
	return settle(&p, reason) ? TC_ACT_UNSPEC : TC_ACT_SHOT;
}

SEC("tc")
int guard_tc(struct __sk_buff *skb)
{
	return tc(skb, 0);
}

SEC("tc")
int guard_tc_raw(struct __sk_buff *skb)
{
	return tc(skb, 1);
}
