// Package hostnet does what gmgate needs of the host's network configuration: network namespaces, links, addresses
// and routes. It serves the hidden namespace of the userspace ESP backend and the test networks.
//
// A process has one namespace per thread, so work inside another one runs on an OS thread of its own (NS.Do); sockets
// opened there belong to that namespace for good and may be used from any goroutine afterwards.
package hostnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// NS is a network namespace. Its methods may be called from any goroutine. The zero value is not usable.
type NS struct {
	name   string // empty for an anonymous namespace
	handle netns.NsHandle
}

// Current returns the namespace of the process, also when it is called inside another one.
func Current() (*NS, error) {
	// /proc/self is the process's first thread. A thread that Do took into a namespace ends with it, but that one cannot end
	// and stays there for ever. A new goroutine runs on a thread that never left.
	var h netns.NsHandle
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		var err error
		h, err = netns.GetFromPath("/proc/thread-self/ns/net")
		done <- err
	}()
	if err := <-done; err != nil {
		return nil, fmt.Errorf("open the process's network namespace: %w", err)
	}
	return &NS{handle: h}, nil
}

// Create makes an anonymous namespace with lo up. It disappears when the last socket and handle are closed.
func Create() (*NS, error) {
	var ns *NS
	err := onThread(func() error {
		h, err := netns.New()
		if err != nil {
			return fmt.Errorf("create network namespace: %w", err)
		}
		ns = &NS{handle: h}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := ns.Up("lo"); err != nil {
		return nil, errors.Join(err, ns.Close())
	}
	return ns, nil
}

// CreateNamed makes a namespace that `ip netns` knows by name, with lo up. Delete removes it.
func CreateNamed(name string) (*NS, error) {
	var ns *NS
	err := onThread(func() error {
		h, err := netns.NewNamed(name)
		if err != nil {
			return fmt.Errorf("create network namespace %s: %w", name, err)
		}
		ns = &NS{name: name, handle: h}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := ns.Up("lo"); err != nil {
		return nil, errors.Join(err, ns.Delete())
	}
	return ns, nil
}

// Open returns the namespace that `ip netns` knows by name.
func Open(name string) (*NS, error) {
	h, err := netns.GetFromName(name)
	if err != nil {
		return nil, fmt.Errorf("open network namespace %s: %w", name, err)
	}
	return &NS{name: name, handle: h}, nil
}

// onThread runs f on an OS thread that is thrown away afterwards, since a thread whose namespace was changed must not
// go back to the scheduler's pool.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends the thread with the goroutine
		done <- f()
	}()
	return <-done
}

// Do runs f on an OS thread of its own inside the namespace and returns its error. f must not hand the thread on;
// sockets it opens stay in the namespace.
func (n *NS) Do(f func() error) error {
	return onThread(func() error {
		if err := netns.Set(n.handle); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", n, err)
		}
		return f()
	})
}

// String names the namespace for messages.
func (n *NS) String() string {
	if n.name != "" {
		return n.name
	}
	return n.handle.UniqueId()
}

// Name returns the name under which `ip netns` knows the namespace, empty for an anonymous one.
func (n *NS) Name() string { return n.name }

// Close gives up the handle. A named namespace stays.
func (n *NS) Close() error {
	if err := n.handle.Close(); err != nil {
		return fmt.Errorf("close network namespace: %w", err)
	}
	return nil
}

// Delete closes the handle and removes the name.
func (n *NS) Delete() error {
	err := n.Close()
	if n.name != "" {
		err = errors.Join(err, netns.DeleteNamed(n.name))
	}
	return err
}

// with runs f with a netlink socket inside the namespace.
func (n *NS) with(f func(*netlink.Handle) error) error {
	at := n.handle
	if here, err := netns.Get(); err == nil {
		if here.Equal(n.handle) {
			at = netns.None() // to enter it takes CAP_SYS_ADMIN, even from inside
		}
		_ = here.Close() // a handle only
	}
	// Route netlink only: a kernel without XFRM or netfilter must do.
	h, err := netlink.NewHandleAt(at, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink in %s: %w", n, err)
	}
	defer h.Close()
	return f(h)
}

// onLink runs f with a netlink socket and the named link.
func (n *NS) onLink(name string, f func(*netlink.Handle, netlink.Link) error) error {
	return n.with(func(h *netlink.Handle) error {
		l, err := h.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find link %s in %s: %w", name, n, err)
		}
		return f(h, l)
	})
}

// Veth makes a pair of virtual Ethernet links: name here, peerName in peer. Both come up.
func (n *NS) Veth(name string, peer *NS, peerName string) error {
	err := n.with(func(h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		v := &netlink.Veth{LinkAttrs: attrs, PeerName: peerName, PeerNamespace: netlink.NsFd(int(peer.handle))}
		if err := h.LinkAdd(v); err != nil {
			return fmt.Errorf("add veth %s to %s: %w", name, n, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := n.Up(name); err != nil {
		return err
	}
	return peer.Up(peerName)
}

// Up sets a link up.
func (n *NS) Up(link string) error {
	return n.onLink(link, func(h *netlink.Handle, l netlink.Link) error {
		if err := h.LinkSetUp(l); err != nil {
			return fmt.Errorf("set link %s up: %w", link, err)
		}
		return nil
	})
}

// SetMTU sets a link's MTU in octets.
func (n *NS) SetMTU(link string, mtu int) error {
	return n.onLink(link, func(h *netlink.Handle, l netlink.Link) error {
		if err := h.LinkSetMTU(l, mtu); err != nil {
			return fmt.Errorf("set MTU of %s to %d: %w", link, mtu, err)
		}
		return nil
	})
}

// AddAddr puts an address on a link. Duplicate address detection of IPv6 is left out, so the address is usable when
// AddAddr returns, if the link is up.
func (n *NS) AddAddr(link string, p netip.Prefix) error {
	return n.onLink(link, func(h *netlink.Handle, l netlink.Link) error {
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = ifaFlagNoDAD
		}
		if err := h.AddrAdd(l, a); err != nil {
			return fmt.Errorf("add address %s to %s: %w", p, link, err)
		}
		if p.Addr().Is6() && l.Attrs().Flags&net.FlagUp != 0 {
			awaitLocal(h, a.IP)
		}
		return nil
	})
}

const ifaFlagNoDAD = 0x02

// Implementation constants: how long the kernel may take with the route of a new IPv6 address, and how often we look.
const (
	localWait = time.Second
	localPoll = time.Millisecond
)

// awaitLocal waits until the kernel routes an address to itself. It makes the route of a new IPv6 address later than the
// address, and a socket that is connected meanwhile stays dead.
func awaitLocal(h *netlink.Handle, ip net.IP) {
	poll := time.NewTicker(localPoll)
	defer poll.Stop()
	for end := time.Now().Add(localWait); time.Now().Before(end); <-poll.C {
		if rs, err := h.RouteGet(ip); err == nil && len(rs) > 0 && rs[0].Type == routeLocal {
			return
		}
	}
}

// AddRoute routes a prefix through a link, by a gateway if via is valid.
func (n *NS) AddRoute(link string, dst netip.Prefix, via netip.Addr) error {
	return n.onLink(link, func(h *netlink.Handle, l netlink.Link) error {
		r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(dst)}
		if via.IsValid() {
			r.Gw = net.IP(via.AsSlice())
		} else {
			r.Scope = netlink.SCOPE_LINK
		}
		if err := h.RouteReplace(r); err != nil {
			return fmt.Errorf("route %s to %s: %w", dst, link, err)
		}
		return nil
	})
}

// AddLocal makes every address of the prefix an address of the namespace itself (AnyIP), so that thousands of UEs
// need no address entries.
func (n *NS) AddLocal(p netip.Prefix) error {
	return n.onLink("lo", func(h *netlink.Handle, l netlink.Link) error {
		r := &netlink.Route{
			LinkIndex: l.Attrs().Index, Dst: ipNet(p), Type: routeLocal, Table: tableLocal, Scope: netlink.SCOPE_HOST,
		}
		if err := h.RouteReplace(r); err != nil {
			return fmt.Errorf("make %s local: %w", p, err)
		}
		return nil
	})
}

// Values of rtnetlink: RTN_LOCAL and RT_TABLE_LOCAL.
const (
	routeLocal = 2
	tableLocal = 255
)

// Sysctl writes a value below net., for example Sysctl("ipv4.ip_forward", "1"), inside the namespace.
func (n *NS) Sysctl(key, value string) error {
	return n.Do(func() error {
		path := filepath.Join("/proc/sys/net", strings.ReplaceAll(key, ".", "/"))
		if err := os.WriteFile(path, []byte(value), 0o644); err != nil { //nolint:gosec // the mode of a sysctl is the kernel's
			return fmt.Errorf("set net.%s in %s: %w", key, n, err)
		}
		return nil
	})
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: net.IP(p.Addr().AsSlice()), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// AddDefault routes everything of one address family to a link which needs no gateway. advMSS is the TCP segment size
// that connections over the route announce, zero for the one that follows from the link's MTU.
func (n *NS) AddDefault(link string, v6 bool, advMSS int) error {
	dst := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if v6 {
		dst = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return n.onLink(link, func(h *netlink.Handle, l netlink.Link) error {
		r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(dst), Scope: netlink.SCOPE_LINK, AdvMSS: advMSS}
		if err := h.RouteReplace(r); err != nil {
			return fmt.Errorf("route %s to %s: %w", dst, link, err)
		}
		return nil
	})
}

// SetTxQueueLen sets how many packets wait for a link's driver; for a TUN, for its reader.
func (n *NS) SetTxQueueLen(link string, packets int) error {
	return n.onLink(link, func(h *netlink.Handle, l netlink.Link) error {
		if err := h.LinkSetTxQLen(l, packets); err != nil {
			return fmt.Errorf("set queue length of %s to %d: %w", link, packets, err)
		}
		return nil
	})
}
