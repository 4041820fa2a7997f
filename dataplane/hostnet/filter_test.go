package hostnet_test

import (
	"errors"
	"os"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// newNS makes a namespace, or skips a test that cannot have one.
func newNS(t *testing.T) *hostnet.NS {
	t.Helper()
	ns, err := hostnet.Create()
	if err != nil {
		if os.Getenv("REQUIRE_KERNEL_TESTS") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	return ns
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// program loads an eBPF program for tc that lets everything pass. hostnet knows nothing of eBPF beside descriptors, so it is
// done by hand: r0 = -1 (TC_ACT_UNSPEC); exit.
func program(t *testing.T) int {
	t.Helper()
	code := []uint64{0xffffffff_0000_00_b7, 0x95}
	license := []byte("Apache-2.0\x00")
	attr := struct {
		kind, count   uint32
		code, license uint64
		rest          [12]uint64
	}{
		kind: unix.BPF_PROG_TYPE_SCHED_CLS, count: 2,
		code: uint64(uintptr(unsafe.Pointer(&code[0]))), license: uint64(uintptr(unsafe.Pointer(&license[0]))),
	}
	fd, _, e := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if e != 0 {
		if os.Getenv("REQUIRE_KERNEL_TESTS") == "1" {
			t.Fatal(e)
		}
		t.Skip(e)
	}
	t.Cleanup(func() { _ = unix.Close(int(fd)) })
	return int(fd)
}

func present(t *testing.T, ns *hostnet.NS, f hostnet.Filter, want bool) {
	t.Helper()
	if found, err := f.Present(ns); found != want || err != nil {
		t.Errorf("filter %+v present: %v, %v, want %v", f, found, err, want)
	}
}

// TestFilter attaches, replaces and removes filters, which leave each other alone.
func TestFilter(t *testing.T) {
	ns := newNS(t)
	must(t, ns.Veth("gm0", ns, "gm1"))
	fd := program(t)
	a := hostnet.Filter{Link: "gm0", Name: "gmgate-a", Priority: 0x4001}
	b := hostnet.Filter{Link: "gm0", Name: "gmgate-b", Priority: 0x4002}
	elsewhere := hostnet.Filter{Link: "gm1", Name: "gmgate-a", Priority: 0x4001}
	present(t, ns, a, false)
	must(t, a.Remove(ns)) // no qdisc, no filter
	for range 3 {         // in place of itself
		must(t, a.Attach(ns, fd))
		present(t, ns, a, true)
	}
	present(t, ns, b, false)
	present(t, ns, elsewhere, false)
	must(t, b.Attach(ns, program(t)))
	must(t, a.Remove(ns))
	must(t, a.Remove(ns))
	present(t, ns, a, false)
	present(t, ns, b, true)
	// One of the same priority and another name is not ours.
	other := hostnet.Filter{Link: "gm0", Name: "somebody", Priority: b.Priority}
	must(t, other.Remove(ns))
	present(t, ns, other, false)
	present(t, ns, b, true)
	must(t, b.Remove(ns))
	present(t, ns, b, false)
}

// TestFilterErrors: a link that has gone has no filter, but cannot get one.
func TestFilterErrors(t *testing.T) {
	ns := newNS(t)
	f := hostnet.Filter{Link: "gm9", Name: "gmgate-a", Priority: 0x4001}
	must(t, f.Remove(ns))
	if err := f.Attach(ns, program(t)); err == nil {
		t.Error("attached to a link that does not exist")
	}
	must(t, ns.Veth("gm9", ns, "gm1"))
	if err := f.Attach(ns, -1); !errors.Is(err, unix.EBADF) && !errors.Is(err, unix.EINVAL) {
		t.Errorf("error %v without a program", err)
	}
	present(t, ns, f, false)
}

// TestLinks tells the kinds of links apart.
func TestLinks(t *testing.T) {
	ns := newNS(t)
	must(t, ns.Veth("gm0", newNS(t), "gm0"))
	links, err := ns.Links()
	must(t, err)
	get := func(name string) hostnet.Link {
		t.Helper()
		i := slices.IndexFunc(links, func(l hostnet.Link) bool { return l.Name == name })
		if i < 0 {
			t.Fatalf("no link %s in %+v", name, links)
		}
		l := links[i]
		if l.Index == 0 {
			t.Errorf("%s has no number", name)
		}
		l.Index = 0
		return l
	}
	if got, want := get("lo"), (hostnet.Link{Name: "lo", Ethernet: true, Loopback: true, Up: true, Kind: "device"}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	// The other end is in another namespace, and its index means nothing here.
	if got, want := get("gm0"), (hostnet.Link{Name: "gm0", Ethernet: true, Up: true, Kind: "veth"}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
