package probe

import (
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Cap is a capability, by its number.
type Cap uint8

// Capabilities that gmgate can need.
const (
	CapNetBindService Cap = unix.CAP_NET_BIND_SERVICE
	CapNetAdmin       Cap = unix.CAP_NET_ADMIN
	CapNetRaw         Cap = unix.CAP_NET_RAW
	CapSysAdmin       Cap = unix.CAP_SYS_ADMIN
	CapBPF            Cap = unix.CAP_BPF
)

// String returns the name of the capability.
func (c Cap) String() string {
	switch c {
	case CapNetBindService:
		return "CAP_NET_BIND_SERVICE"
	case CapNetAdmin:
		return "CAP_NET_ADMIN"
	case CapNetRaw:
		return "CAP_NET_RAW"
	case CapSysAdmin:
		return "CAP_SYS_ADMIN"
	case CapBPF:
		return "CAP_BPF"
	}
	return fmt.Sprintf("Cap(%d)", uint8(c))
}

// Caps is a set of capabilities.
type Caps uint64

// Has reports whether a capability is in the set.
func (s Caps) Has(c Cap) bool { return s&(1<<c) != 0 }

// Lacking returns those of the list that are not in the set.
func (s Caps) Lacking(list ...Cap) (missing []Cap) {
	for _, c := range list {
		if !s.Has(c) {
			missing = append(missing, c)
		}
	}
	return missing
}

// Capabilities returns the effective capabilities of the process.
func (h *Host) Capabilities() (Caps, error) {
	r := h.Read("/proc/self/status")
	if r.Err != nil {
		return 0, fmt.Errorf("read capabilities: %w", r.Err)
	}
	for line := range strings.Lines(r.Value) {
		if v, ok := strings.CutPrefix(line, "CapEff:"); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(v), 16, 64)
			if err != nil {
				return 0, fmt.Errorf("read capabilities: %w", err)
			}
			return Caps(n), nil
		}
	}
	return 0, fmt.Errorf("read capabilities: /proc/self/status has no CapEff")
}
