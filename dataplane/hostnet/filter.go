package hostnet

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Link is what is known of a link.
type Link struct {
	Name     string
	Index    int
	Ethernet bool // its packets have an Ethernet header
	Loopback bool
	Up       bool

	Kind   string // of a virtual link, as ip link names it
	Lower  int    // index of the link that it is on, of a veth that of its other end, if that is in this namespace; 0: none
	Master int    // index of the link that takes all that comes in by it, such as a bridge; 0: none
}

// Links returns the links of the namespace.
func (n *NS) Links() (list []Link, err error) {
	err = n.with(func(h *netlink.Handle) error {
		all, err := h.LinkList()
		if err != nil {
			return fmt.Errorf("list links: %w", err)
		}
		for _, l := range all {
			a := l.Attrs()
			k := Link{
				Name: a.Name, Index: a.Index, Ethernet: a.EncapType == "ether" || a.EncapType == "loopback",
				Loopback: a.EncapType == "loopback", Up: a.Flags&unix.IFF_UP != 0, Kind: l.Type(), Master: a.MasterIndex,
			}
			if a.NetNsID < 0 { // else the index is one of another namespace
				k.Lower = a.ParentIndex
			}
			list = append(list, k)
		}
		return nil
	})
	return list, err
}

// filterProtocol lets the filter see every frame.
const filterProtocol = unix.ETH_P_ALL

// Filter is an eBPF program at the ingress of a link, by a clsact qdisc: the way of kernels before tcx. It outlives the
// process. Name tells filters apart; Priority is its place among others.
type Filter struct {
	Link     string
	Name     string
	Priority uint16
}

// Attach puts a program in, or in place of the one of the same name and priority, in one step. fd is the program's; the
// kernel takes a reference of its own.
func (f Filter) Attach(n *NS, fd int) error {
	return n.onLink(f.Link, func(h *netlink.Handle, l netlink.Link) error {
		q := &netlink.GenericQdisc{
			QdiscAttrs: netlink.QdiscAttrs{
				LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
			},
			QdiscType: "clsact",
		}
		if err := h.QdiscAdd(q); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add clsact to %s: %w", f.Link, err)
		}
		if err := h.FilterReplace(f.filter(l, fd)); err != nil {
			return fmt.Errorf("put filter %s on %s: %w", f.Name, f.Link, err)
		}
		return nil
	})
}

func (f Filter) filter(l netlink.Link, fd int) *netlink.BpfFilter {
	return &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: l.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: filterProtocol, Priority: f.Priority,
		},
		Fd: fd, Name: f.Name, DirectAction: true,
	}
}

// Present reports whether the filter is there.
func (f Filter) Present(n *NS) (found bool, err error) {
	err = n.onLink(f.Link, func(h *netlink.Handle, l netlink.Link) error {
		found, err = f.find(h, l)
		return err
	})
	return found, err
}

func (f Filter) find(h *netlink.Handle, l netlink.Link) (bool, error) {
	list, err := h.FilterList(l, netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		return false, fmt.Errorf("list filters of %s: %w", f.Link, err)
	}
	for _, o := range list {
		if b, ok := o.(*netlink.BpfFilter); ok && b.Name == f.Name && b.Priority == f.Priority {
			return true, nil
		}
	}
	return false, nil
}

// Remove takes the filter off. One that is not there, or whose link has gone, is no error. The qdisc stays: others may use
// it.
func (f Filter) Remove(n *NS) error {
	err := n.onLink(f.Link, func(h *netlink.Handle, l netlink.Link) error {
		if found, err := f.find(h, l); err != nil || !found {
			return err
		}
		if err := h.FilterDel(f.filter(l, 0)); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("take filter %s off %s: %w", f.Name, f.Link, err)
		}
		return nil
	})
	if _, gone := errors.AsType[netlink.LinkNotFoundError](err); gone {
		return nil
	}
	return err
}
