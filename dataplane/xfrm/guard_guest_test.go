package xfrm

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink/nl"

	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// deletePolicy appends a DELPOLICY message, by index if there is one.
func (m *messages) deletePolicy(id policyID, index uint32) {
	k := nl.XfrmUserpolicyId{Sel: id.sel, Dir: id.dir, Index: index}
	if index != 0 {
		k.Sel = nl.XfrmSelector{}
	}
	m.begin(nl.XFRM_MSG_DELPOLICY, 0)
	m.buf = append(m.buf, k.Serialize()...)
	m.end()
}

// run1 sends what add appends and fails if the kernel refuses any of it.
func run1(t *testing.T, c *conn, add func()) {
	t.Helper()
	c.reset()
	add()
	for _, err := range c.run() {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// policyBlocks returns what iproute2 shows of each policy, in an order of its own.
func policyBlocks(t *testing.T, ns *hostnet.NS) []string {
	t.Helper()
	blocks := strings.Split("\n"+ipShow(t, ns, "xfrm", "policy"), "\nsrc ")
	for i := range blocks {
		blocks[i] = strings.TrimSpace(blocks[i])
	}
	slices.Sort(blocks)
	return blocks
}

// awaitBlocks waits until the policies of a namespace are as they were.
func awaitBlocks(t *testing.T, ns *hostnet.NS, want []string) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		have := policyBlocks(t, ns)
		if slices.Equal(have, want) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("policies are not as they were:\n%s\nbefore:\n%s", strings.Join(have, "\n"), strings.Join(want, "\n"))
		}
	}
}

// TestGuestPoliciesBack: whoever takes our policies away or changes them, they are back and do what they did.
//
// Peers: A1.08a
func TestGuestPoliciesBack(t *testing.T) {
	f := newField(t)
	p4, p6 := testSet(0, false, gcm), testSet(0, true, gcm)
	f.addUE(t, p4)
	f.addUE(t, p6)
	before := policyBlocks(t, f.gm)
	c := testConn(t, f.gm)
	find := func(id policyID) uint32 {
		list, err := c.policies()
		for i := range list {
			if err == nil && list[i].Sel == id.sel && list[i].Dir == id.dir {
				return list[i].Index
			}
		}
		t.Fatalf("policy %s is not there: %v", id, err)
		return 0
	}
	for _, tc := range []struct {
		name  string
		do    func(t *testing.T)
		count uint64
	}{
		{"flush", func(t *testing.T) { ipBatch(t, f.gm, "xfrm policy flush") }, policiesOf},
		{"deleteall", func(t *testing.T) { ipBatch(t, f.gm, "xfrm policy deleteall dir in") }, 6},
		{"delete by selector", func(t *testing.T) {
			run1(t, c, func() { c.deletePolicy(f.b.policies[0].policyID, 0) })
		}, 1},
		{"delete by index", func(t *testing.T) {
			id := f.b.policies[1].policyID
			index := find(id)
			run1(t, c, func() { c.deletePolicy(id, index) })
		}, 1},
		{"opened", func(t *testing.T) { // a policy that lets clear packets pass, in place of ours
			info := nl.XfrmUserpolicyInfo{
				Sel: f.b.policies[0].sel, Dir: f.b.policies[0].dir, Action: actionAllow, Priority: policyPriority,
				Lft: nl.XfrmLifetimeCfg{
					SoftByteLimit: nl.XFRM_INF, HardByteLimit: nl.XFRM_INF,
					SoftPacketLimit: nl.XFRM_INF, HardPacketLimit: nl.XFRM_INF,
				},
			}
			run1(t, c, func() {
				c.begin(nl.XFRM_MSG_UPDPOLICY, 0)
				c.buf = append(c.buf, info.Serialize()...)
				c.end()
			})
		}, 1},
		{"about to end", func(t *testing.T) {
			p := f.b.policies[2]
			p.expires = 3600
			run1(t, c, func() { c.updatePolicy(&p) })
		}, 1},
		{"foreign ones come and go", func(t *testing.T) {
			const sel = " dir in src 0.0.0.0/0 dst 10.45.0.5/32 dport 6100"
			ipBatch(t, f.gm, "xfrm policy add"+sel+" priority 5000 action block", "xfrm policy update"+sel+" priority 5001 action block",
				"xfrm policy delete"+sel)
		}, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			restored := f.b.PoliciesRestored()
			tc.do(t)
			for deadline := time.Now().Add(patience); f.b.PoliciesRestored() < restored+tc.count; time.Sleep(5 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("%d policies restored, want %d", f.b.PoliciesRestored()-restored, tc.count)
				}
			}
			awaitBlocks(t, f.gm, before)
			// deleteall may be interrupted by the repair and repeat itself.
			if n := f.b.PoliciesRestored() - restored; n != tc.count && tc.name != "deleteall" {
				t.Errorf("%d policies restored, want %d", n, tc.count)
			}
			if other := c.differing(f.b.policies); len(other) != 0 {
				t.Errorf("%d policies differ, limits included", len(other))
			}
		})
	}

	link := newCapture(t, f)
	for _, v6 := range []bool{false, true} {
		p := map[bool]tuple{false: tupleOf(p4), true: tupleOf(p6)}[v6]
		victim := udp(t, f.gm, p.ps, nil)
		sender := udp(t, f.ue, netip.AddrPortFrom(ueAddr(3, v6), 7777), nil)
		f.counter(t, "XfrmInTmplMismatch", 1, func() { send(t, sender, p.ps, "clear") })
		silent(t, victim)
		f.counter(t, "XfrmOutNoStates", 1, func() {
			_, _ = victim.WriteToUDPAddrPort([]byte("clear"), netip.AddrPortFrom(ueAddr(3, v6), 7777))
		})
		silent(t, sender)
		_ = victim.Close()
	}
	f.exchange(t, p4, "after all that")
	f.exchange(t, p6, "after all that")
	if link.count("out clear") != 0 {
		t.Errorf("captured %v, want nothing out in clear", maps.Clone(link.seen))
	}
}

// TestGuestPolicyStorm: flushes without end, also while a backend starts, neither wear the guard out nor wake it for ever.
func TestGuestPolicyStorm(t *testing.T) {
	needESP(t)
	ns := newNS(t, "storm")
	c := testConn(t, ns)
	const flushes = 50
	flush := func(n int) {
		for range n {
			c.reset()
			c.query(nl.XFRM_MSG_FLUSHPOLICY, 0, 0)
			if err := c.run()[0]; err != nil {
				t.Error(err)
			}
			time.Sleep(2 * time.Millisecond) // some find the policies there, some do not
		}
	}
	started := make(chan struct{})
	flushed := make(chan struct{})
	go func() {
		defer close(flushed)
		for up := false; !up; {
			flush(1)
			select {
			case <-started:
				up = true
			default:
			}
		}
	}()
	b := newGuest(t, ns)
	close(started)
	<-flushed
	awaitPolicies(t, c, policiesOf)

	m, err := openMonitor(ns, nl.XFRMNLGRP_POLICY)
	if err != nil {
		t.Fatal(err)
	}
	var events atomic.Int64
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buf := make([]byte, eventCapacity)
		for {
			if _, err := m.read(buf); err != nil {
				return
			}
			events.Add(1)
		}
	}()
	restored := b.PoliciesRestored()
	flush(flushes)
	awaitPolicies(t, c, policiesOf)
	if other := c.differing(b.policies); len(other) != 0 {
		t.Errorf("%d policies differ", len(other))
	}
	time.Sleep(300 * time.Millisecond)
	n, seen := b.PoliciesRestored()-restored, events.Load()
	t.Logf("%d flushes: %d policies restored, %d notifications", flushes, n, seen)
	if n < policiesOf || n > flushes*policiesOf || seen > flushes*(policiesOf+1) {
		t.Errorf("%d policies restored and %d notifications for %d flushes", n, seen, flushes)
	}
	time.Sleep(time.Second)
	if b.PoliciesRestored()-restored != n || events.Load() != seen {
		t.Errorf("the guard goes on: %d policies restored, %d notifications", b.PoliciesRestored()-restored, events.Load())
	}
	if err := m.close(); err != nil {
		t.Error(err)
	}
	<-ended
}
