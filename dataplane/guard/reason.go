package guard

import (
	"fmt"

	"github.com/gmgate/gmgate/bpf"
)

// Reason says why the guard let a packet pass, or dropped it. The values are those of enum reason in bpf/structs.h.
type Reason uint32

// Reasons are named as metrics, logs and the command line name them.
const (
	PassOther        = Reason(bpf.GuardReasonPASS_OTHER)         // not for us, or nothing that is judged
	PassESP          = Reason(bpf.GuardReasonPASS_ESP)           // ESP on an SA of ours
	PassESPInUDP     = Reason(bpf.GuardReasonPASS_ESP_UDP)       // the same in UDP (RFC 3948)
	PassClearPort    = Reason(bpf.GuardReasonPASS_CLEAR_PORT)    // the unprotected port, within the limit
	PassFragment     = Reason(bpf.GuardReasonPASS_FRAGMENT)      // not the first fragment
	PassKeepalive    = Reason(bpf.GuardReasonPASS_KEEPALIVE)     // NAT keep-alive (RFC 3948 §2.3)
	PassIKE          = Reason(bpf.GuardReasonPASS_IKE)           // non-ESP marker (RFC 3948 §2.2)
	PassDecrypted    = Reason(bpf.GuardReasonPASS_DECRYPTED)     // seen at tc after the kernel has verified and decrypted it
	PassUnknownSPI   = Reason(bpf.GuardReasonPASS_UNKNOWN_SPI)   // no SA of ours, but the configuration lets it pass
	DropMalformed    = Reason(bpf.GuardReasonDROP_MALFORMED)     // version, lengths or headers are wrong
	DropESPShort     = Reason(bpf.GuardReasonDROP_ESP_SHORT)     // no room for SPI and sequence number
	DropSPIReserved  = Reason(bpf.GuardReasonDROP_SPI_RESERVED)  // SPI 0 to 255 (RFC 4303 §2.1)
	DropUnknownSPI   = Reason(bpf.GuardReasonDROP_UNKNOWN_SPI)   // no SA
	DropWrongSource  = Reason(bpf.GuardReasonDROP_WRONG_SOURCE)  // the SA is another phone's
	DropCleartext    = Reason(bpf.GuardReasonDROP_CLEARTEXT)     // UDP or TCP in clear to a protected port (TS 33.203 §7.1)
	DropRegisterRate = Reason(bpf.GuardReasonDROP_REGISTER_RATE) // too much of one source on the unprotected port
	DropPortZero     = Reason(bpf.GuardReasonDROP_PORT_ZERO)
	DropExtHeaders   = Reason(bpf.GuardReasonDROP_EXT_HEADERS) // too many IPv6 extension headers

	reasons = Reason(bpf.GuardReasonREASONS)
)

var reasonNames = [reasons]string{
	PassOther: "other", PassESP: "esp", PassESPInUDP: "esp_udp", PassClearPort: "clear_port", PassFragment: "fragment",
	PassKeepalive: "keepalive", PassIKE: "ike", PassDecrypted: "decrypted", PassUnknownSPI: "foreign_spi",
	DropMalformed: "malformed", DropESPShort: "esp_short", DropSPIReserved: "spi_reserved", DropUnknownSPI: "unknown_spi",
	DropWrongSource: "wrong_source", DropCleartext: "cleartext", DropRegisterRate: "register_rate", DropPortZero: "port_zero",
	DropExtHeaders: "ext_headers",
}

// String returns the name.
func (r Reason) String() string {
	if r < reasons {
		return reasonNames[r]
	}
	return fmt.Sprintf("Reason(%d)", uint32(r))
}

// Dropped reports whether packets are dropped for the reason.
func (r Reason) Dropped() bool { return r >= DropMalformed }

// Verdict returns "drop" or "pass".
func (r Reason) Verdict() string {
	if r.Dropped() {
		return "drop"
	}
	return "pass"
}

// Reasons lists all of them.
func Reasons() []Reason {
	all := make([]Reason, reasons)
	for i := range all {
		all[i] = Reason(i) //nolint:gosec // bounded by the enum
	}
	return all
}
