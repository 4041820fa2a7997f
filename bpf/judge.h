// SPDX-License-Identifier: Apache-2.0
// What becomes of an IP packet. guard.bpf.c includes this once for each kind of context: CONTEXT is its type, NAME(f) a
// function's name for it. The functions that are not static are verified once each, not once for each way to them: that
// keeps loading fast.

// locate finds where the payload of the IP packet at an offset begins, and whether it is for us. Nothing is judged before
// that is known.
__noinline int NAME(locate)(CONTEXT *ctx, struct packet *p, __u32 at, __u32 version)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u32 left, header;

	if (!p || at > MAX_LINK_HEADER)
		return PASS_OTHER;
	if (version == 4) {
		struct ipv4 *ip = inside(data, at, LINK_HEADER_MASK);
		__u16 offset;

		if ((void *)(ip + 1) > end)
			return PASS_OTHER; // the kernel knows as little whose it is
		p->source = mapped(ip->source);
		p->destination = mapped(ip->destination);
		if (!ours(p))
			return PASS_OTHER;
		p->bytes = bpf_ntohs(ip->total_length);
		p->protocol = ip->protocol;
		header = (ip->version_length & 15) * 4;
		if (ip->version_length >> 4 != 4 || header < sizeof(*ip) || p->bytes < header || p->bytes > p->length - at)
			return DROP_MALFORMED;
		offset = bpf_ntohs(ip->offset);
		if (offset & IPV4_OFFSET)
			return PASS_FRAGMENT;
		p->fragment = !!(offset & IPV4_MORE);
		p->at = at + header;
		p->left = p->bytes - header;
		return GO_ON;
	} else {
		struct ipv6 *ip = inside(data, at, LINK_HEADER_MASK);

		if ((void *)(ip + 1) > end)
			return PASS_OTHER;
		p->source = ip->source;
		p->destination = ip->destination;
		if (!ours(p) || is_mapped(&p->destination))
			return PASS_OTHER; // there are no such addresses on the wire, and ours are IPv4 in that form
		left = bpf_ntohs(ip->payload_length);
		p->bytes = left + sizeof(*ip);
		p->protocol = ip->next;
		if (ip->version_class >> 4 != 6 || p->bytes > p->length - at)
			return DROP_MALFORMED;
		at += sizeof(*ip);
	}
	// The loop ends with its condition, a jump: kernels before 6.8 take no other that goes back.
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		struct extension *x, here;

		if (!is_extension(p->protocol))
			break;
		if (at > MAX_EXTENSIONS_AT)
			return DROP_EXT_HEADERS;
		if (left < sizeof(*x))
			return DROP_MALFORMED;
		x = inside(data, at, PAYLOAD_AT_MASK);
		if ((void *)(x + 1) > end)
			return DROP_EXT_HEADERS;
		here = *x;
		header = ((__u32)here.length + 1) * 8;
		if (p->protocol == PROTO_FRAGMENT) {
			header = sizeof(*x);
			if (bpf_ntohs(here.offset) & IPV6_OFFSET) {
				p->protocol = here.next;
				return PASS_FRAGMENT;
			}
			p->fragment |= bpf_ntohs(here.offset) & 1; // of a second one as well: neither hides the other
		} else if (p->protocol == PROTO_AH) {
			header = ((__u32)here.length + 2) * 4; // RFC 4302 section 2.2
		}
		if (left < header)
			return DROP_MALFORMED;
		p->protocol = here.next;
		left -= header;
		at += header;
	}
	if (is_extension(p->protocol))
		return DROP_EXT_HEADERS;
	p->at = at;
	p->left = left;
	return GO_ON;
}

// judge decides about the payload that locate has found.
__noinline int NAME(judge)(CONTEXT *ctx, struct packet *p)
{
	struct payload l = {.end = (void *)(long)ctx->data_end};

	if (!p || p->at > MAX_PAYLOAD_AT)
		return DROP_EXT_HEADERS;
	l.data = inside((void *)(long)ctx->data, p->at, PAYLOAD_AT_MASK);
	switch (p->protocol) {
	case PROTO_ESP:
		return judge_esp(p, &l, l.data, p->left, PASS_ESP);
	case PROTO_UDP:
		return judge_udp(p, &l);
	case PROTO_TCP:
		return judge_tcp(p, &l);
	}
	return PASS_OTHER;
}
