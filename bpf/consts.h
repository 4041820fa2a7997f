// SPDX-License-Identifier: Apache-2.0
// Numbers of the protocols, and sizes that C and Go share.
#pragma once

// Specification constants.
#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86dd
#define ETHERTYPE_VLAN 0x8100 // IEEE 802.1Q
#define ETHERTYPE_QINQ 0x88a8 // IEEE 802.1ad
#define ETHER_TYPE_AT 12      // behind two addresses
#define VLAN_TAG 4

#define PROTO_HOP_BY_HOP 0 // RFC 8200 section 4
#define PROTO_TCP 6
#define PROTO_UDP 17
#define PROTO_ROUTING 43
#define PROTO_FRAGMENT 44
#define PROTO_ESP 50
#define PROTO_AH 51
#define PROTO_DEST_OPTIONS 60
#define PROTO_MOBILITY 135
#define PROTO_HIP 139
#define PROTO_SHIM6 140

#define ESP_HEADER 8		// SPI and sequence number, RFC 4303 section 2
#define SPI_FIRST 256		// those below are reserved, RFC 4303 section 2.1
#define PORT_ESP_IN_UDP 4500	// RFC 3948
#define IPV4_OFFSET 0x1fff	// of a fragment, RFC 791
#define IPV4_MORE 0x2000	// more fragments
#define IPV6_OFFSET 0xfff8	// RFC 8200 section 4.5
#define TCP_FLAG_SYN 0x02
#define TCP_FLAG_ACK 0x10
#define TCP_FLAGS_AT 13
#define TCP_HEADER 20
#define UDP_HEADER 8

// in_order keeps what is written to the stack before it before what is written behind it. Without CAP_PERFMON Linux 6.1
// takes the second half of a word and then the first one, but not the other way round.
#define in_order() asm volatile("" ::: "memory")

// Implementation constants.
#define MAX_LOCAL 16	  // Gm addresses of one instance
#define MAX_TAGS 2	  // VLAN tags, the second for a provider's bridge
#define MAX_EXTENSIONS 6  // IPv6 extension headers of a packet, more than anybody needs
#define MAX_EXTENSIONS_AT 4096 // octets from the beginning of the frame
#define MAX_LINK_HEADER 64	// octets before the IP packet
#define MAX_PAYLOAD_AT 8191	// octets before its payload
#define TC_PULL 22	  // octets that are made linear before the tc program looks: as far as the type behind the tags
#define MAX_SEGMENTS 128  // datagrams that are merged at most: UDP_MAX_SEGMENTS of the kernel
#define NO_SLOT 0xffffffffu // of an SA that is nobody's of ours

#define FIRST_USE_RING (1 << 16) // octets
#define DROP_RING (1 << 17)
