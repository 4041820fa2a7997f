package registrar

import (
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
)

func association(impi string, port uint16) *Association {
	return &Association{IMPI: impi, Local: netip.AddrPortFrom(gm, 5060), UE: netip.AddrPortFrom(ue1, port)}
}

func clearFrom(port uint16, conn ims.ConnID) ims.Flow {
	f := flow(port, 5060)
	f.Side, f.Conn, f.Transport = ims.GmClear, conn, ims.UDP
	if conn != 0 {
		f.Transport = ims.TCP
	}
	return f
}

// An association is established from its beginning, found by its flow, known to no backend, and ends by its own timer.
func TestAssociate(t *testing.T) {
	b := newBench(t)
	s, err := b.table.Associate(association("user1@ims", 5070), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if s.Phase != sa.Established || !s.Clear || s.UE.State != Registered || s.UE.Current != s || b.associations != 1 {
		t.Errorf("set %+v, %d associations", s, b.associations)
	}
	if b.table.Holder(clearFrom(5070, 0)) != s || b.table.Holder(clearFrom(5071, 0)) != nil || b.table.Holder(clearFrom(5070, 1)) != nil {
		t.Error("found by another flow, or not by its own")
	}
	if b.table.UEOf("user1@ims", ue1) != nil || b.table.Protected("user1@ims") {
		t.Error("counts as protected")
	}
	b.advance(30 * time.Minute)
	if again, err := b.table.Associate(association("user1@ims", 5070), time.Hour); err != nil || again != s {
		t.Errorf("refresh: %v, %v", again, err)
	}
	b.advance(59 * time.Minute)
	if s.Phase != sa.Established {
		t.Error("ended before its time")
	}
	b.advance(2 * time.Minute)
	if s.Phase != sa.Dead || len(b.backend.Installed) != 0 || len(b.ended) != 1 {
		t.Errorf("phase %v, %d installed, %d contexts ended", s.Phase, len(b.backend.Installed), len(b.ended))
	}
	b.empty()
}

// The newest flow of an identity is the one; that of another identity is not taken.
func TestAssociateAnew(t *testing.T) {
	b := newBench(t)
	first, _ := b.table.Associate(association("user1@ims", 5070), time.Hour)
	over := association("user1@ims", 5070)
	over.Conn = 7
	second, err := b.table.Associate(over, time.Hour) // the same port, by TCP now
	if err != nil || second == first || first.Phase != sa.Dead || second.UE != first.UE {
		t.Fatalf("second association: %v, first is %v", err, first.Phase)
	}
	if b.table.Holder(clearFrom(5070, 7)) != second || b.table.Holder(clearFrom(5070, 0)) != nil {
		t.Error("the connection is not the association")
	}
	if _, err := b.table.Associate(association("user2@ims", 5070), time.Hour); !errors.Is(err, ErrAddressConflict) {
		t.Errorf("port of another identity: %v", err)
	}
	b.table.Deregister(second.UE, old)
	third, err := b.table.Associate(association("user2@ims", 5070), time.Hour)
	if err != nil || second.Phase != sa.Dead {
		t.Fatalf("port of one that has gone: %v", err)
	}
	sos := association("user2@ims", 5070)
	sos.Emergency = true
	e, err := b.table.Associate(sos, time.Hour)
	if err != nil || e.UE == third.UE || third.Phase != sa.Established || b.table.Holder(clearFrom(5070, 0)) != third {
		t.Errorf("emergency registration from the same port: %v", err)
	}
	b.table.Dissociate(third)
	b.table.DissociateAll("user2@ims")
	b.empty()
}

// SAs and associations of one identity exclude each other; a temporary set, which anybody can provoke, excludes nothing.
func TestAssociateProtected(t *testing.T) {
	b := newBench(t)
	s := b.begin(offer(1))
	a, err := b.table.Associate(association("user1@ims", 5070), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	b.table.Confirm(s, time.Hour)
	b.table.DissociateAll("user1@ims")
	if a.Phase != sa.Dead || s.Phase != sa.Established || s.UE.State != Registered {
		t.Errorf("association %v, SA set %v", a.Phase, s.Phase)
	}
	elsewhere := association("user1@ims", 5070)
	elsewhere.UE = netip.AddrPortFrom(ue2, 5070)
	for _, a := range []*Association{association("user1@ims", 5070), elsewhere} {
		if _, err := b.table.Associate(a, time.Hour); !errors.Is(err, ErrProtected) {
			t.Errorf("association beside SAs: %v", err)
		}
	}
	b.table.Dissociate(s) // of no use on SAs
	if s.Phase != sa.Established {
		t.Error("Dissociate took an SA set down")
	}
	b.table.Deregister(s.UE, 0)
	b.advance(time.Second)
	b.empty()
}

// The emergency registration of a phone has its own context, limits and temporary set; only its SPIs must differ.
func TestEmergency(t *testing.T) {
	b := newBench(t)
	normal := b.begin(offer(1))
	clash := offer(1)
	clash.Emergency, clash.PortC = true, 6399
	if err := b.table.Check(clash); !errors.Is(err, ErrAddressConflict) {
		t.Errorf("the same SPIs: %v", err)
	}
	o := offer(2)
	o.Emergency = true
	sos := b.begin(o)
	if sos.UE == normal.UE || normal.Phase != sa.Temporary || sos.Ports.PS == 0 || b.backend.Count() != 8 {
		t.Fatalf("phases %v and %v, %d SAs", normal.Phase, sos.Phase, b.backend.Count())
	}
	b.table.Confirm(sos, time.Hour)
	b.table.Confirm(normal, time.Hour)
	if u := b.table.Context(Key{IMPI: "user1@ims", Addr: ue1, Emergency: true}); u != sos.UE || u.Key() != (Key{"user1@ims", ue1, true, false}) {
		t.Errorf("context %+v", u)
	}
	if got := b.table.Elsewhere("user1@ims", ue2); !slices.Equal(got, []*UE{normal.UE}) {
		t.Errorf("a move concerns %d contexts", len(got))
	}
	b.table.Deregister(normal.UE, 0)
	b.advance(time.Second)
	if sos.Phase != sa.Established || b.backend.Count() != 4 {
		t.Errorf("emergency set %v, %d SAs", sos.Phase, b.backend.Count())
	}
	b.table.Deregister(sos.UE, 0)
	b.advance(time.Second)
	b.empty()
}

// Ports and reg-await-auth of an offer come before those of the configuration.
func TestOfferPolicy(t *testing.T) {
	b := newBench(t)
	o := offer(1)
	o.ServerPorts, o.ClientPorts, o.AwaitAuth = []uint16{6101}, []uint16{6113, 6112, 6111}, 30*time.Second
	s := b.begin(o)
	if s.Ports.PS != 6101 || s.Ports.PC != 6113 {
		t.Errorf("ports %+v", s.Ports)
	}
	b.advance(29 * time.Second)
	if s.Phase != sa.Temporary {
		t.Error("gone too early")
	}
	b.advance(2 * time.Second)
	if s.Phase != sa.Dead || b.expired != 1 {
		t.Errorf("phase %v", s.Phase)
	}
	b.empty()
}

// TS 33.203 §7.1 keeps port-ps at a re-registration; the operator may ask for another one.
func TestNewServerPort(t *testing.T) {
	for _, fresh := range []bool{false, true} {
		b := newBench(t)
		b.table.cfg.NewServerPort = fresh
		first := b.begin(offer(1))
		b.table.Confirm(first, time.Hour)
		o := offer(2)
		o.Over = first
		if second := b.begin(o); (second.Ports.PS != first.Ports.PS) != fresh {
			t.Errorf("fresh %v: port-ps %d after %d", fresh, second.Ports.PS, first.Ports.PS)
		}
	}
}
