// Package esptun joins the ESP engine to the network in user space, for hosts whose kernel has no ESP and for the load
// generator's phones. It serves either end.
//
//	   hidden namespace                    this process                     outer namespace
//	┌────────────────────┐   TUN   ┌──────────────────────────┐  raw ESP  ┌───────────────┐
//	│ UDP and TCP sockets │ ──────► │ transmit: SA by 4-tuple, │ ────────► │ routes, links │
//	│ on Config.Local     │ ◄────── │ receive: SA by dst, SPI  │ ◄──────── │ of the host   │
//	└────────────────────┘         └──────────────────────────┘           └───────────────┘
//
// The hidden network namespace owns the protected addresses as well, and a TUN is its only way out. A socket opened
// inside Hidden().Do is therefore protected, whatever program code uses it: clear packets cannot reach it, because the
// outer namespace has no such socket and refuses them, and what it sends without an SA is dropped here.
//
// Invariants. A packet is written to the TUN only if an SA was found by its destination and SPI, its ICV verified, its
// sequence number was new, and its addresses and ports are exactly the SA's selector (RFC 4303 §3.4.4 leaves that check
// to the receiver; without it one phone could speak for another). Nothing leaves in clear. Transport mode has one IP
// header, so addresses, TOS and hop limit are carried over and the checksums of UDP and TCP stay valid untouched.
//
// Sizes. Transport mode cannot protect IP fragments (RFC 4303 §3.3.4), so the TUN's MTU is large and the outer packet
// is fragmented by the kernel instead; TCP announces AdvMSS, with which it fits into Ethernet frames.
//
// Concurrency. Tunnel's methods may be called from any goroutine. One goroutine per raw socket receives and one
// transmits; they read the SA tables without locks. An inbound SA has one destination address and so belongs to one raw
// socket; its replay window is moved by that goroutine only, and sequence numbers by the transmitter only. Others read
// how far both have come (Seq, All) without holding them up.
package esptun
