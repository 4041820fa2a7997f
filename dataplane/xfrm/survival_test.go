package xfrm

import (
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// sequencesOf dumps how far every state of a namespace has got.
func sequencesOf(t *testing.T, ns *hostnet.NS) map[stateID][2]uint32 {
	t.Helper()
	list := map[stateID][2]uint32{}
	err := testConn(t, ns).dumpStates(func() { clear(list) }, func(info *nl.XfrmUsersaInfo, attrs []byte) error {
		in, out := sequences(attrs)
		list[headOf(info).id] = [2]uint32{in, out}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// survivors installs 40 sets, eight of them with a phone behind, and lets the phones talk.
func survivors(t *testing.T, f *field) (all, talking []sa.Params) {
	t.Helper()
	for i := range 20 {
		for _, v6 := range []bool{false, true} {
			p := testSet(i, v6, ims.Suites()[i%8])
			p.Hard = time.Hour
			all = append(all, p)
			if i >= 4 {
				if err := install(t, f.b, p); err != nil {
					t.Fatal(err)
				}
				continue
			}
			f.addUE(t, p)
			f.exchange(t, p, "before")
			talking = append(talking, p)
		}
	}
	return all, talking
}

// TestGuestAdopt: 40 phones survive kill -9. Nothing about their SAs changes, and they talk before, meanwhile and after.
//
// Peers: A1.22a
func TestGuestAdopt(t *testing.T) {
	f := newField(t)
	all, talking := survivors(t, f)
	ipBatch(t, f.gm,
		fmt.Sprintf("xfrm state add src 10.45.1.1 dst 10.45.0.5 proto esp spi 0x999 mode transport reqid 7 auth-trunc hmac(sha1) 0x%040x 96 enc ecb(cipher_null) \"\"", 1),
		"xfrm policy add dir in src 0.0.0.0/0 dst 10.45.0.5/32 dport 6100 priority 5000 tmpl proto esp mode transport reqid 7")
	foreignState := ipShow(t, f.gm, "xfrm", "state", "list", "reqid", "7")
	foreignPolicy := ipShow(t, f.gm, "xfrm", "policy", "list", "priority", "5000")
	for i := range 3 { // nobody will ask for these
		if err := install(t, f.b, testSet(100+i, false, gcm)); err != nil {
			t.Fatal(err)
		}
	}
	wantStates(t, f.b, 160+12+1)
	kill(t, f.b)
	for _, p := range talking {
		f.exchange(t, p, "meanwhile")
	}
	before := sequencesOf(t, f.gm)

	f.b = newGuest(t, f.gm)
	wantStates(t, f.b, 160+12+1)
	a := adopt(t, f.b, all)
	if !slices.Equal(a.Adopted, idsOf(all)) || a.Removed != 12 || !slices.Equal(a.Foreign, []ims.SPI{0x999}) || f.b.Count() != 160 {
		t.Errorf("adopted %d, removed %d, foreign %v, Count %d", len(a.Adopted), a.Removed, a.Foreign, f.b.Count())
	}
	wantStates(t, f.b, 161)
	for i := range 3 {
		p := testSet(100+i, false, gcm)
		for _, id := range ids(&p) {
			delete(before, id)
		}
	}
	if after := sequencesOf(t, f.gm); !maps.Equal(after, before) {
		t.Errorf("sequence numbers changed from %v to %v", before, after)
	}
	for _, p := range talking {
		f.exchange(t, p, "after")
	}
	s, err := f.b.Survey(t.Context())
	if err != nil || len(s.Sets) != 40 || len(s.Missing) != 0 || s.Orphans != 0 {
		t.Errorf("Survey: %d sets, missing %v, %d orphans, %v", len(s.Sets), s.Missing, s.Orphans, err)
	}
	for _, p := range talking { // one datagram each way in every exchange, on A and C
		if c := s.Sets[p.ID]; c != (sa.Counters{3, 0, 3, 0}) {
			t.Errorf("set %d: counters %v", p.ID, c)
		}
	}
	if got := ipShow(t, f.gm, "xfrm", "state", "list", "reqid", "7"); got != foreignState || got == "" {
		t.Error("the foreign state changed")
	}
	if got := ipShow(t, f.gm, "xfrm", "policy", "list", "priority", "5000"); got != foreignPolicy || got == "" {
		t.Errorf("the foreign policy changed from\n%s to\n%s", foreignPolicy, got)
	}
	if counters, err := f.b.Statistics(); err != nil || counters["XfrmInStateSeqError"]+counters["XfrmInStateProtoError"] != 0 {
		t.Errorf("counters %v, %v", counters, err)
	}
}

// TestGuestReboot: the states are lost, and installed again with the sequence numbers of the last checkpoint. The phones
// accept what comes, and what they had sent before is not accepted again.
//
// Peers: A4.04c, B3.20
func TestGuestReboot(t *testing.T) {
	families(t, func(t *testing.T, v6 bool) {
		for _, window := range []int{legacyWindow, DefaultWindow, 100} {
			for _, suite := range []ims.Suite{gcm, {Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC}} {
				t.Run(fmt.Sprintf("window %d %s", window, suite), func(t *testing.T) {
					rebooted(t, v6, window, suite)
				})
			}
		}
	})
}

func rebooted(t *testing.T, v6 bool, window int, suite ims.Suite) {
	t.Helper()
	f := newField(t)
	p := testSet(0, v6, suite)
	p.Hard = time.Hour
	f.addUE(t, p)
	const checkpoint, lost, block = 3, 2, 1000
	for range checkpoint {
		f.exchange(t, p, "before the checkpoint")
	}
	s, err := f.b.Survey(t.Context())
	if err != nil || s.Sets[p.ID] != (sa.Counters{checkpoint, 0, checkpoint, 0}) {
		t.Fatalf("checkpoint %v, %v", s.Sets[p.ID], err)
	}
	for range lost {
		f.exchange(t, p, "after the checkpoint")
	}
	kill(t, f.b)
	ipBatch(t, f.gm, "xfrm state flush")

	cfg := testConfig()
	cfg.Window = window
	f.b = newGuestWith(t, f.gm, cfg)
	if a := adopt(t, f.b, []sa.Params{p}); len(a.Adopted) != 0 || a.Removed != 0 {
		t.Errorf("%+v; want nothing", a)
	}
	if p.Counters, err = s.Sets[p.ID].Ahead(block); err != nil {
		t.Fatal(err)
	}
	if err := install(t, f.b, p); err != nil {
		t.Fatal(err)
	}
	if s, err := f.b.Survey(t.Context()); err != nil || s.Sets[p.ID] != p.Counters {
		t.Errorf("counters %v, %v; want %v", s.Sets[p.ID], err, p.Counters)
	}
	e := tupleOf(p)

	// The phone's numbers from the start again: every one up to the checkpoint is refused, the next one is not.
	phone := func(oseq int) {
		t.Helper()
		out := p.SAs()[0]
		ipBatch(t, f.ue, fmt.Sprintf("xfrm state delete src %s dst %s proto esp spi %#x", out.Src.Addr(), out.Dst.Addr(), uint32(out.SPI)),
			stateLine(out, p.Keys, int(p.ID&0xff)*4+int(sa.In))+fmt.Sprintf(" replay-oseq %d", oseq))
	}
	ps, uc := udp(t, f.gm, e.ps, nil), udp(t, f.ue, e.uc, nil)
	phone(0)
	f.counter(t, "XfrmInStateSeqError", checkpoint, func() {
		for range checkpoint {
			send(t, uc, e.ps, "replayed")
		}
	})
	silent(t, ps)
	send(t, uc, e.ps, "the one after the checkpoint")
	receive(t, ps, e.uc, "the one after the checkpoint")
	_ = errors.Join(ps.Close(), uc.Close())

	phone(checkpoint + lost)
	f.exchange(t, p, "after the reboot") // the phone's own window takes the jump
	f.exchange(t, p, "and on")
	want := sa.Counters{checkpoint + lost + 2, 0, checkpoint + block + 2, block}
	if s, err := f.b.Survey(t.Context()); err != nil || s.Sets[p.ID] != want {
		t.Errorf("counters %v, %v; want %v", s.Sets[p.ID], err, want)
	}
	if n := strings.Count(ipShow(t, f.gm, "xfrm", "state"), "reqid 26477"); n != 4 {
		t.Errorf("%d states", n)
	}
}

// TestGuestAdoptLimit: the hard limit of an adopted set is the new one, whichever way it was moved.
func TestGuestAdoptLimit(t *testing.T) {
	needESP(t)
	t.Parallel()
	for _, tc := range []struct {
		name        string
		first, wait time.Duration
		then        time.Duration
		stays, gone time.Duration // after Adopt
	}{
		{"shorter", time.Hour, time.Second, 4 * time.Second, time.Second, 15 * time.Second},
		{"longer", 5 * time.Second, time.Second, 12 * time.Second, 8 * time.Second, 25 * time.Second},
		{"longer after the soft limit", 8 * time.Second, 7100 * time.Millisecond, 12 * time.Second, 7 * time.Second, 25 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			ns := newNS(t, "adoptlimit")
			first := newGuest(t, ns)
			p := testSet(0, false, gcm)
			p.Hard = tc.first
			if err := install(t, first, p); err != nil {
				t.Fatal(err)
			}
			kill(t, first)
			time.Sleep(tc.wait)
			b := newGuest(t, ns)
			p.Hard, p.Label = tc.then, 4711
			if a := adopt(t, b, []sa.Params{p}); len(a.Adopted) != 1 {
				t.Fatalf("%+v", a)
			}
			if n := strings.Count(ipShow(t, ns, "xfrm", "state"), "output-mark 0x1267/0xffffffff"); n != 2 {
				t.Errorf("%d states have the new label, want 2", n)
			}
			time.Sleep(tc.stays)
			wantStates(t, b, 4)
			t.Logf("gone after %v", (tc.stays + within(t, b, 0, tc.gone-tc.stays)).Round(100*time.Millisecond))
		})
	}
}

// TestGuestExpired: the kernel's word that a hard limit has passed arrives, once for a set.
//
// Peers: A1.09b
func TestGuestExpired(t *testing.T) {
	needESP(t)
	t.Parallel()
	ns := newNS(t, "expired")
	told := make(chan uint64, 100)
	cfg := testConfig()
	cfg.Expired = func(id uint64) { told <- id }
	b := newGuestWith(t, ns, cfg)
	elsewhere := newGuest(t, newNS(t, "elsewhere"))
	p, stays, removed := testSet(0, false, gcm), testSet(1, true, gcm), testSet(2, false, gcm)
	p.Hard, stays.Hard, removed.Hard = 2*time.Second, time.Hour, time.Hour
	ipBatch(t, ns, fmt.Sprintf("xfrm state add src 10.45.1.1 dst 10.45.0.5 proto esp spi 0x999 mode transport reqid 7 auth-trunc hmac(sha1) 0x%040x 96 enc ecb(cipher_null) \"\" limit time-hard 2", 1))
	other := p
	other.ID = 77
	if err := errors.Join(install(t, b, p), install(t, b, stays), install(t, b, removed), remove(t, b, removed), install(t, elsewhere, other)); err != nil {
		t.Fatal(err)
	}
	select {
	case id := <-told:
		if id != p.ID {
			t.Errorf("told of set %d, want %d", id, p.ID)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("not told")
	}
	within(t, b, 4, 20*time.Second)
	if err := remove(t, b, p); err != nil || b.Count() != 4 {
		t.Errorf("Remove: %v, Count %d", err, b.Count())
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if len(told) != 0 {
		t.Errorf("told %d times too often", len(told))
	}
}

// TestGuestDetach: between Detach and Adopt the SAs work, and nothing else does.
//
// Peers: A1.22c, B1.23
func TestGuestDetach(t *testing.T) {
	f := newField(t)
	all, talking := survivors(t, f)
	c := newCapture(t, f)
	if err := errors.Join(remove(t, f.b, all[39]), f.b.Detach(), f.b.Close()); err != nil {
		t.Fatal(err)
	}
	all = all[:39]
	k := testConn(t, f.gm)
	if n, err := k.countStates(); err != nil || n != 4*39 {
		t.Errorf("%d states after Detach, %v", n, err)
	}
	if n, err := k.countPolicies(); err != nil || n != policiesOf {
		t.Errorf("%d policies after Detach, %v", n, err)
	}
	e := tupleOf(talking[0])
	ps, stranger := udp(t, f.gm, e.ps, nil), udp(t, f.ue, e.uc, bypass)
	f.counter(t, "XfrmInTmplMismatch", 1, func() { send(t, stranger, e.ps, "clear") })
	silent(t, ps)
	f.counter(t, "XfrmOutNoStates", 1, func() {
		_, _ = ps.WriteToUDPAddrPort([]byte("to nobody"), tupleOf(testSet(200, false, gcm)).us)
	})
	_ = errors.Join(ps.Close(), stranger.Close())
	for _, p := range talking {
		f.exchange(t, p, "detached")
	}
	f.b = newGuest(t, f.gm)
	if a := adopt(t, f.b, all); len(a.Adopted) != 39 || a.Removed != 0 {
		t.Errorf("adopted %d, removed %d", len(a.Adopted), a.Removed)
	}
	for _, p := range talking {
		f.exchange(t, p, "adopted")
	}
	if c.count("out clear") != 0 {
		t.Errorf("captured %v, want nothing out in clear", c.seen)
	}
}

// TestGuestPolicyLimit: renewals move the limit of the policies, without them they end, and one that ends too early is
// put back.
func TestGuestPolicyLimit(t *testing.T) {
	ns := newNS(t, "policylimit")
	needESP(t)
	k := testConn(t, ns)
	cfg := testConfig()
	cfg.life, cfg.renewal = 5*time.Second, time.Second
	b := newGuestWith(t, ns, cfg)
	for range 20 {
		time.Sleep(500 * time.Millisecond)
		if n, err := k.countPolicies(); err != nil || n != policiesOf {
			t.Fatalf("%d policies, %v; want %d", n, err, policiesOf)
		}
	}
	kill(t, b)
	awaitPolicies(t, k, 0)

	newGuest(t, ns)
	gone := constantPolicies(cfg.Local, []uint16{serverPS}, DefaultReqID)[0]
	gone.expires = 1
	if err := place(k, []policy{gone}); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		shown := ipShow(t, ns, "-s", "xfrm", "policy")
		if strings.Count(shown, "expire add: soft 0(sec), hard 864000(sec)") == policiesOf {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("want %d policies that last ten days:\n%s", policiesOf, shown)
		}
	}
}

// TestGuestAdoptMany measures Adopt on the real kernel, and looks for keys left in the connection's buffers.
func TestGuestAdoptMany(t *testing.T) {
	needESP(t)
	ns := newNS(t, "adoptmany")
	first := newGuest(t, ns)
	const sets = 1000
	var list []sa.Params
	end := time.Now().Add(time.Hour)
	for i := range sets {
		p := testSet(i, i%2 == 0, ims.Suites()[i%8])
		p.Hard = time.Until(end)
		list = append(list, p)
		if err := install(t, first, p); err != nil {
			t.Fatal(err)
		}
	}
	for _, change := range []time.Duration{0, time.Hour} {
		kill(t, first)
		for i := range list {
			list[i].Hard = time.Until(end) + change
		}
		first = newGuest(t, ns)
		start := time.Now()
		if a := adopt(t, first, list); len(a.Adopted) != sets || a.Removed != 0 {
			t.Errorf("adopted %d, removed %d", len(a.Adopted), a.Removed)
		}
		t.Logf("limits moved by %v: %v for each set", change, time.Since(start)/sets)
		wantStates(t, first, 4*sets)
	}
	start := time.Now()
	s, err := first.Survey(t.Context())
	if err != nil || len(s.Sets) != sets {
		t.Errorf("Survey: %d sets, %v", len(s.Sets), err)
	}
	t.Logf("surveyed: %v for each set", time.Since(start)/sets)

	c := testConn(t, ns)
	seen := false
	key := list[0].Keys.Enc
	err = c.dumpStates(func() {}, func(_ *nl.XfrmUsersaInfo, attrs []byte) error {
		seen = seen || strings.Contains(hex.EncodeToString(attrs), hex.EncodeToString(key))
		return nil
	})
	if err != nil || !seen {
		t.Errorf("the dump shows the key: %v, %v", seen, err)
	}
	for i, o := range c.rbuf {
		if o != 0 {
			t.Fatalf("octet %d of the buffer is %#x: keys may have stayed behind", i, o)
		}
	}
}

// TestGuestLarval: while another key daemon of the host listens, the kernel keeps a state without keys for half a minute
// for a packet that found no SA, with the reqid of our policy. It is nobody's SA.
func TestGuestLarval(t *testing.T) {
	f := newField(t)
	daemon := acquires(t, f.gm)
	defer func() { _ = unix.Close(daemon) }()
	t.Cleanup(func() { // no request names a state without SPI
		if err := testConn(t, f.gm).ask(nl.XFRM_MSG_FLUSHSA, 0, 4, nil); err != nil {
			t.Error(err)
		}
	})
	p := testSet(0, false, gcm)
	f.addUE(t, p)
	f.exchange(t, p, "before")
	ps := udp(t, f.gm, tupleOf(p).ps, nil)
	defer func() { _ = ps.Close() }()
	_, _ = ps.WriteToUDPAddrPort([]byte("to nobody"), tupleOf(testSet(200, false, gcm)).us)
	if n, err := testConn(t, f.gm).countStates(); err != nil || n != 5 {
		t.Fatalf("%d states, %v: want one without keys beside those of the set", n, err)
	}
	v, err := f.b.Survey(t.Context())
	if err != nil || v.Orphans != 0 || len(v.Sets) != 1 {
		t.Errorf("%d sets, %d orphans, %v", len(v.Sets), v.Orphans, err)
	}
	if err := f.b.Detach(); err != nil {
		t.Fatal(err)
	}
	f.b = newGuest(t, f.gm)
	if a := adopt(t, f.b, []sa.Params{p}); len(a.Adopted) != 1 || a.Removed != 0 {
		t.Errorf("adopted %d, removed %d", len(a.Adopted), a.Removed)
	}
}

// acquires opens a socket that is told of packets without SA, as key daemons do.
func acquires(t *testing.T, ns *hostnet.NS) (fd int) {
	t.Helper()
	err := inside(ns, func() (err error) {
		if fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_XFRM); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (nl.XFRMNLGRP_ACQUIRE - 1)})
	})
	if err != nil {
		t.Fatal(err)
	}
	return fd
}
