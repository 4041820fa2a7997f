// SPDX-License-Identifier: Apache-2.0
// The rules by which packets to us are judged.
#pragma once

#include "stats.h"

// payload is the beginning of an IP packet's payload, as far as anything is decided by it. Zeros follow a shorter one.
union payload {
	__u8 octet[TCP_HEADER];
	__u16 half[TCP_HEADER / 2];
	__u32 word[TCP_HEADER / 4];
};

// admit takes a token out of the bucket of a packet's source: an IPv4 address or an IPv6 /64, the least that one
// subscriber has. Of datagrams that the stack has merged it takes one for each, if need be of what is still to come. Two CPUs
// that race for one bucket may let a packet more pass.
static __always_inline int admit(const struct packet *p)
{
	__u64 now, full, *at, taken = limit_interval;
	struct address key = p->source;

	if (!limit_interval)
		return 1;
	if (p->segments)
		taken *= p->segments < MAX_SEGMENTS ? p->segments : MAX_SEGMENTS;
	if (!is_mapped(&key)) {
		key.word[2] = 0;
		key.word[3] = 0;
	}
	now = bpf_ktime_get_coarse_ns();
	at = bpf_map_lookup_elem(&sources, &key);
	if (!at) {
		full = now + taken;
		bpf_map_update_elem(&sources, &key, &full, BPF_ANY);
		return 1;
	}
	full = *(volatile __u64 *)at;
	if (full < now)
		full = now;
	if (full - now > limit_burst)
		return 0;
	*(volatile __u64 *)at = full + taken;
	return 1;
}

static __always_inline int judge_esp(struct packet *p, const __u32 *header, __u32 length, enum reason known)
{
	struct sa_key key = {.local = p->local};
	struct sa_value *sa;
	__u64 now;

	if (length < ESP_HEADER)
		return DROP_ESP_SHORT;
	key.spi = bpf_ntohl(*header);
	p->spi = key.spi;
	if (key.spi < SPI_FIRST)
		return DROP_SPI_RESERVED;
	sa = bpf_map_lookup_elem(&sas, &key);
	if (!sa)
		return pass_unknown ? PASS_UNKNOWN_SPI : DROP_UNKNOWN_SPI;
	if (sa->flags & SA_ANY_SOURCE)
		return PASS_UNKNOWN_SPI;
	if (!equal(&p->source, &sa->source))
		return DROP_WRONG_SOURCE;
	now = bpf_ktime_get_coarse_ns();
	use(sa->slot, p->bytes, now);
	if (sa->flags & SA_UNUSED)
		report(p, sa, key.spi, now);
	return known;
}

// judge_esp_in_udp tells ESP from IKE and keep-alives (RFC 3948 section 2).
static __always_inline int judge_esp_in_udp(struct packet *p, const union payload *l, __u32 length)
{
	if (length == 1 && l->octet[UDP_HEADER] == 0xff)
		return PASS_KEEPALIVE;
	if (length >= 4 && l->word[UDP_HEADER / 4] == 0)
		return PASS_IKE;
	return judge_esp(p, &l->word[UDP_HEADER / 4], length, PASS_ESP_UDP);
}

// begins_register reports whether a datagram is a REGISTER, or may be one as far as can be seen.
static __always_inline int begins_register(const struct packet *p, const union payload *l, __u32 length)
{
	const __u32 *word = &l->word[UDP_HEADER / 4];
	const __u8 *text = &l->octet[UDP_HEADER];

	if (p->segments > 1)
		return 1; // of merged ones only the first can be seen
	if (length < 8)
		return p->fragment; // the rest may follow
	if (word[0] == bpf_htonl(0x52454749) && word[1] == bpf_htonl(0x53544552)) // "REGI" "STER"
		return 1;
	return *text == '\r' || *text == '\n'; // RFC 3261 section 7.5
}

static __always_inline int judge_udp(struct packet *p, const union payload *l)
{
	const __u16 *port = l->half;
	__u32 length;

	if (p->left < UDP_HEADER)
		return DROP_MALFORMED;
	p->source_port = bpf_ntohs(port[0]);
	p->destination_port = bpf_ntohs(port[1]);
	if (p->destination_port == 0)
		return DROP_PORT_ZERO;
	if (p->destination_port != PORT_ESP_IN_UDP && p->destination_port != clear_port && !is_protected(p))
		return PASS_OTHER;
	if (p->source_port == 0)
		return DROP_PORT_ZERO; // cannot be answered
	length = bpf_ntohs(port[2]);
	if (length < UDP_HEADER || (!p->fragment && length > p->left))
		return DROP_MALFORMED;
	if (length > p->left)
		length = p->left;
	length -= UDP_HEADER;
	if (is_protected(p))
		return DROP_CLEARTEXT;
	if (p->destination_port == PORT_ESP_IN_UDP)
		return judge_esp_in_udp(p, l, length);
	if ((limit_all || begins_register(p, l, length)) && !admit(p))
		return DROP_REGISTER_RATE;
	return PASS_CLEAR_PORT;
}

static __always_inline int judge_tcp(struct packet *p, const union payload *l)
{
	const __u16 *port = l->half;
	__u8 flags;

	if (p->left < 4)
		return DROP_MALFORMED;
	p->source_port = bpf_ntohs(port[0]);
	p->destination_port = bpf_ntohs(port[1]);
	if (p->destination_port == 0)
		return DROP_PORT_ZERO;
	if (p->destination_port != clear_port && !is_protected(p))
		return PASS_OTHER;
	if (p->source_port == 0)
		return DROP_PORT_ZERO;
	if (p->left < TCP_HEADER)
		return DROP_MALFORMED; // a first fragment that hides its flags as well, RFC 1858 section 3
	if (is_protected(p))
		return DROP_CLEARTEXT;
	flags = l->octet[TCP_FLAGS_AT];
	if ((flags & (TCP_FLAG_SYN | TCP_FLAG_ACK)) == TCP_FLAG_SYN && !admit(p))
		return DROP_REGISTER_RATE; // a connection costs more than a message
	return PASS_CLEAR_PORT;
}
