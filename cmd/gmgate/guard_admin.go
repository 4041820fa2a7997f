package main

import (
	"context"
	"net/netip"

	"github.com/gmgate/gmgate/control/admin"
	"github.com/gmgate/gmgate/dataplane/guard"
)

// operated shows operators a guard.
type operated struct {
	guard *guard.Guard
	mode  string
}

var _ admin.Guard = operated{}

// admin returns what operators see of the guard; nil if there is none.
func (f *filter) admin() admin.Guard {
	if f.Guard == nil {
		return nil
	}
	return operated{f.Guard, string(f.mode)}
}

// Status implements admin.Guard. What cannot be read is left out.
func (o operated) Status() admin.GuardStatus {
	st := admin.GuardStatus{Mode: o.mode, Pinned: o.guard.Pinned()}
	for _, h := range o.guard.Hooks() {
		st.Interfaces = append(st.Interfaces, admin.GuardInterface{
			Name: h.Interface, Hook: string(h.Kind), Attached: h.Kind != guard.HookNone, Detail: h.Reason,
		})
	}
	s, err := o.guard.Stats()
	if err != nil {
		st.Reason = "some counters cannot be read: " + err.Error()
	}
	sources, err := o.guard.CountSources()
	if err == nil {
		st.Maps = append(st.Maps, admin.GuardMap{Name: "sources", Entries: sources, Capacity: s.SourceCapacity})
	}
	st.Maps = append(st.Maps,
		admin.GuardMap{Name: "sas", Entries: s.SAs, Capacity: s.SACapacity},
		admin.GuardMap{Name: "ues", Entries: s.UEs, Capacity: s.UECapacity})
	for _, r := range guard.Reasons() {
		t := s.Tally(r)
		st.Verdicts = append(st.Verdicts, admin.GuardVerdict{Verdict: r.Verdict(), Reason: r.String(), Packets: t.Packets, Bytes: t.Bytes})
	}
	st.Ring = admin.GuardRing{FirstUses: s.FirstUses, Samples: s.Samples, Lost: s.LostUses + s.LostSamples + s.Missed}
	return st
}

// Follow implements admin.Guard.
func (o operated) Follow(ctx context.Context, f func(admin.GuardDrop)) error {
	return o.guard.Follow(ctx, func(d *guard.Drop) {
		f(admin.GuardDrop{
			Time: d.Time, Reason: d.Reason.String(), Interface: d.Interface, Source: endOf(d.Source), Destination: endOf(d.Destination),
			Protocol: d.ProtocolName(), SPI: uint32(d.SPI), Length: d.Length,
		})
	})
}

// endOf prints an end, without a port that it does not have; empty if nothing is known of it.
func endOf(a netip.AddrPort) string {
	switch {
	case !a.IsValid():
		return ""
	case a.Port() == 0:
		return a.Addr().String()
	}
	return a.String()
}
