// SPDX-License-Identifier: Apache-2.0
// What programs and Go exchange. Go checks the layout when it loads the programs.
#pragma once

#include <linux/types.h>

// reason says what became of a packet. Everything from DROP_MALFORMED on is a drop. The names reach metrics and
// command line through Go, which has one for each value and a test that none is missing.
enum reason {
	PASS_OTHER,	  // not for us, or nothing that we judge
	PASS_ESP,	  // ESP on an SA of ours
	PASS_ESP_UDP,	  // the same in UDP
	PASS_CLEAR_PORT,  // the unprotected port, within the limit
	PASS_FRAGMENT,	  // no first fragment: goes nowhere without the first one
	PASS_KEEPALIVE,	  // NAT keep-alive, RFC 3948 section 2.3
	PASS_IKE,	  // non-ESP marker, RFC 3948 section 2.2
	PASS_DECRYPTED,	  // to a protected port, verified and decrypted before the tc hook
	PASS_UNKNOWN_SPI, // ESP without an SA of ours, where the configuration lets it pass
	DROP_MALFORMED,	  // lengths, version or header of an IP, UDP or TCP header are wrong
	DROP_ESP_SHORT,	  // no room for SPI and sequence number
	DROP_SPI_RESERVED,
	DROP_UNKNOWN_SPI,
	DROP_WRONG_SOURCE, // the SPI is another phone's
	DROP_CLEARTEXT,	   // UDP or TCP in clear to a protected port
	DROP_REGISTER_RATE,
	DROP_PORT_ZERO,
	DROP_EXT_HEADERS, // more IPv6 extension headers, or farther in, than can be followed
	REASONS,
};

// address in network order, IPv4 as ::ffff:a.b.c.d.
struct address {
	__u32 word[4];
};

// sa_key: SPIs are unique for each destination only (RFC 4303 section 2.1).
struct sa_key {
	__u32 spi;   // host order
	__u32 local; // index in the list of Gm addresses
};

enum sa_flag {
	SA_UNUSED = 1,	   // no packet came in on it yet; whoever clears the flag reports the first one
	SA_ANY_SOURCE = 2, // SA of another program
};

struct sa_value {
	struct address source; // of the phone
	__u64 set;	       // id of the SA set
	__u32 slot;	       // in the map of traffic
	__u32 flags;
};

// traffic of one UE context on one lane. Go reads it through a mapping.
struct traffic {
	__u64 packets;
	__u64 bytes; // of IP packets
	__u64 last;  // CLOCK_MONOTONIC in ns, coarse
	__u64 spare; // half a cache line, so that none straddles two
};

struct tally {
	__u64 packets;
	__u64 bytes;
};

// What was lost because nobody read a ring in time.
enum ring_kind {
	RING_FIRST_USE,
	RING_DROP,
	RINGS,
};

struct first_use {
	__u64 time; // CLOCK_MONOTONIC in ns, coarse
	__u64 set;
	__u32 spi;
	__u32 local;
};

struct dropped {
	__u64 time; // CLOCK_MONOTONIC in ns, coarse
	struct address source;
	struct address destination;
	__u32 spi; // 0: none
	__u32 length;
	__u32 interface;
	__u32 reason;
	__u16 source_port;
	__u16 destination_port;
	__u8 protocol; // of what is in the IP packet
	__u8 spare[3];
};

// flow of which the worker is not that of the hash. Port 0 stands for all ports.
struct flow {
	struct address source;
	__u16 source_port; // host order
	__u16 destination_port;
};

// group of sockets at one local address.
struct group_key {
	struct address local;
	__u16 port; // host order
	__u8 protocol;
	__u8 spare;
};

enum result {
	STEER_AFFINITY, // by the map
	STEER_HASH,	// by the source address
	STEER_KERNEL,	// no such group or socket: the kernel's own choice
	STEER_RESULTS,
};
