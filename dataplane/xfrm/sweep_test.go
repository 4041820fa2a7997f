package xfrm

import (
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
)

// A start without a backend takes out what one has left on its addresses: the states go, the policies block for a while.
// Foreign states, those of another address and those of a backend that is there stay.
func TestSweep(t *testing.T) {
	k := newFakeKernel()
	sets := crashed(t, k, 3, nil)
	foreign := stateHead{id: stateID{testConfig().Local[0], ims.SPI(99)}, reqid: 4242, esp: true}
	k.states[foreign.id] = foreign
	_, policies := k.count()
	elsewhere := testConfig()
	elsewhere.Local = []netip.Addr{netip.MustParseAddr("192.0.2.99")}
	if n, err := sweep(elsewhere, k); err != nil || n != 0 || k.retired() != 0 {
		t.Errorf("%d states and %d policies of another address removed, %v", n, k.retired(), err)
	}
	b := newFake(t, k, testConfig())
	if n, err := sweep(testConfig(), k); !errors.Is(err, ErrInUse) || n != 0 {
		t.Errorf("%d states of a backend that is there removed, %v", n, err)
	}
	kill(t, b)
	n, err := sweep(testConfig(), k)
	if states, left := k.count(); err != nil || n != 4*len(sets) || states != 1 || left != policies || k.retired() != policies {
		t.Errorf("removed %d states, %d are left, %d of %d policies retired, %v", n, states, k.retired(), policies, err)
	}
	if n, err := sweep(testConfig(), k); err != nil || n != 0 {
		t.Errorf("the second time %d states were removed, %v", n, err)
	}
	if k.locked || k.sockets != 0 {
		t.Errorf("locked %v, %d sockets open", k.locked, k.sockets)
	}
}

// What goes wrong is said, and lock and socket are given back.
func TestSweepFails(t *testing.T) {
	for _, typ := range []uint16{nl.XFRM_MSG_GETPOLICY, nl.XFRM_MSG_UPDPOLICY, nl.XFRM_MSG_GETSA, nl.XFRM_MSG_DELSA} {
		k := newFakeKernel()
		crashed(t, k, 1, nil)
		k.refuse = func(got uint16, _ stateID) unix.Errno {
			if got == typ {
				return unix.EIO
			}
			return 0
		}
		if _, err := sweep(testConfig(), k); !errors.Is(err, unix.EIO) {
			t.Errorf("message type %d fails: error is %v", typ, err)
		}
		if k.locked || k.sockets != 0 {
			t.Errorf("message type %d fails: locked %v, %d sockets open", typ, k.locked, k.sockets)
		}
	}
	k := newFakeKernel()
	k.most = 0
	if _, err := sweep(testConfig(), k); !errors.Is(err, unix.EMFILE) || k.locked {
		t.Errorf("no socket: %v, locked %v", err, k.locked)
	}
	if _, err := sweep(Config{}, k); err == nil {
		t.Error("a configuration without addresses is taken")
	}
}

// Each of our policies is about one of our addresses, where sweep looks for it.
func TestSweepPolicies(t *testing.T) {
	cfg := testConfig()
	for _, p := range constantPolicies(cfg.Local, cfg.ServerPorts, 1) {
		a := p.sel.Saddr
		if p.dir == dirIn {
			a = p.sel.Daddr
		}
		if !slices.Contains(cfg.Local, netipOf(a, p.sel.Family)) {
			t.Errorf("policy %s is about none of our addresses", p)
		}
	}
}
