package guard

import (
	"net/netip"
	"os"
	"sync"
	"testing"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
)

// inGuest reports whether the test runs in the virtual machine of scripts/vm, whose processor is emulated.
func inGuest() bool { return os.Getenv("GMGATE_GUEST") == "1" }

// loadable tells once whether the programs can be loaded here.
var loadable = sync.OnceValue(func() error {
	g, err := Open(Config{Local: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, SAs: 2, UEs: 1, Sources: 64})
	if err != nil {
		return err
	}
	return g.Close()
})

// needBPF skips a test where the programs cannot be loaded: without root or without eBPF. With REQUIRE_KERNEL_TESTS=1 that
// is a failure, and so is a kernel that has eBPF and refuses the programs.
func needBPF(t testing.TB) {
	t.Helper()
	switch err := loadable(); {
	case err == nil:
	case os.Getenv("REQUIRE_KERNEL_TESTS") == "1" || os.Getuid() == 0 && haveBPF():
		t.Fatalf("the guard cannot be loaded: %v", err)
	default:
		t.Skipf("the guard cannot be loaded: %v", err)
	}
}

// haveBPF reports whether the kernel has what every Linux with eBPF and BTF has.
func haveBPF() bool {
	_, err := os.Stat("/sys/kernel/btf/vmlinux")
	return err == nil
}

// openGuard loads a guard that is closed with the test.
func openGuard(t testing.TB, cfg Config) *Guard {
	t.Helper()
	needBPF(t)
	g, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return g
}

// setOf returns an SA set of a phone with the SPIs of which spi is the first.
func setOf(id uint64, label uint32, local, ue netip.Addr, spi ims.SPI) sa.Params {
	return sa.Params{
		ID: id, Label: label, Local: local, UE: ue,
		Ports: ims.Ports{UC: 31000, US: 31001, PC: 5101, PS: 5100},
		SPIs:  ims.SPIs{UC: 0x7000 + spi, US: 0x7001 + spi, PC: spi + 1, PS: spi},
	}
}
