// SPDX-License-Identifier: Apache-2.0
// What becomes of an IP packet. guard.bpf.c includes this once for each kind of context: CONTEXT is its type, NAME(f) a
// function's name for it, LOAD the helper that reads packets. The functions that are not static are verified once each, not
// once for each way to them: that keeps loading fast.
//
// Headers are read by the helper, since they lie at offsets that the packet tells. To add such an offset to a pointer takes
// CAP_PERFMON, with which a process may read the kernel's memory: gmgate does without. The helper also reads what the card or
// the stack has put into fragments.

// locate finds where the payload of the IP packet at an offset begins, and whether it is for us. Nothing is judged before
// that is known.
__noinline int NAME(locate)(CONTEXT *ctx, struct packet *p, __u32 begin, __u32 version)
{
	// 64 bits wide: without CAP_PERFMON Linux 6.1 lets nobody write half a word of the stack twice, as the compiler would.
	__u64 left, header, at = begin;

	if (!p || at > MAX_LINK_HEADER)
		return PASS_OTHER;
	if (version == 4) {
		struct ipv4 ip;
		__u16 offset;

		if (LOAD(ctx, at, &ip, sizeof(ip)))
			return PASS_OTHER; // the kernel knows as little whose it is
		p->source = mapped(ip.source);
		p->destination = mapped(ip.destination);
		if (!ours(p))
			return PASS_OTHER;
		p->bytes = bpf_ntohs(ip.total_length);
		if (!p->bytes && p->segments)
			p->bytes = p->length - at; // BIG TCP: more than the field can say
		p->protocol = ip.protocol;
		header = (ip.version_length & 15) * 4;
		if (ip.version_length >> 4 != 4 || header < sizeof(ip) || p->bytes < header || p->bytes > p->length - at)
			return DROP_MALFORMED;
		offset = bpf_ntohs(ip.offset);
		if (offset & IPV4_OFFSET)
			return PASS_FRAGMENT;
		p->fragment = !!(offset & IPV4_MORE);
		p->at = at + header;
		p->left = p->bytes - header;
		return GO_ON;
	} else {
		struct ipv6 ip;

		if (LOAD(ctx, at, &ip, sizeof(ip)))
			return PASS_OTHER;
		p->source = ip.source;
		p->destination = ip.destination;
		if (!ours(p) || is_mapped(&p->destination))
			return PASS_OTHER; // there are no such addresses on the wire, and ours are IPv4 in that form
		left = bpf_ntohs(ip.payload_length);
		if (!left && p->segments)
			left = p->length - at - sizeof(ip);
		p->bytes = left + sizeof(ip);
		p->protocol = ip.next;
		if (ip.version_class >> 4 != 6 || p->bytes > p->length - at)
			return DROP_MALFORMED;
		at += sizeof(ip);
	}
	// Unrolled: kernels before 6.8 take no loop that goes back otherwise than by its condition, and Linux 6.1 refuses, without
	// CAP_PERFMON, what the compiler makes of one that is not: numbers in a place of the stack where a pointer was.
#pragma unroll
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		struct extension here;

		if (!is_extension(p->protocol))
			break;
		if (at > MAX_EXTENSIONS_AT)
			return DROP_EXT_HEADERS;
		if (left < sizeof(here) || LOAD(ctx, at, &here, sizeof(here)))
			return DROP_MALFORMED;
		header = ((__u64)here.length + 1) * 8;
		if (p->protocol == PROTO_FRAGMENT) {
			header = sizeof(here);
			if (bpf_ntohs(here.offset) & IPV6_OFFSET) {
				p->protocol = here.next;
				return PASS_FRAGMENT;
			}
			p->fragment |= bpf_ntohs(here.offset) & 1; // of a second one as well: neither hides the other
		} else if (p->protocol == PROTO_AH) {
			header = ((__u64)here.length + 2) * 4; // RFC 4302 section 2.2
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
	union payload l = {};
	__u32 last;

	if (!p || p->at > MAX_PAYLOAD_AT)
		return DROP_EXT_HEADERS;
	last = (p->left < sizeof(l) ? p->left : sizeof(l)) - 1;
	asm volatile("" : "+r"(last)); // Linux 6.1 learns from < that there is something to read, but not from != 0
	if (last < sizeof(l) && LOAD(ctx, p->at, &l, last + 1))
		return DROP_MALFORMED;
	switch (p->protocol) {
	case PROTO_ESP:
		return judge_esp(p, l.word, p->left, PASS_ESP);
	case PROTO_UDP:
		return judge_udp(p, &l);
	case PROTO_TCP:
		return judge_tcp(p, &l);
	}
	return PASS_OTHER;
}
