package ue

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/gmgate/gmgate/bench/internal/digestaka"
	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/control/aka"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/secagree"
	"github.com/gmgate/gmgate/dataplane/esptun"
)

// offer is the UE's half of a security agreement: what Security-Client says, with port-uc already reserved.
type offer struct {
	spiC, spiS   ims.SPI
	portC, portS uint16
	rows         []string     // values of Security-Client
	udp          *net.UDPConn // on port-uc in the protected namespace
	taken        bool         // the socket belongs to a set now
	guarded      bool         // somebody reads the socket
}

// release gives up an offer that led to no set.
func (o *offer) release() {
	if o != nil && !o.taken {
		_ = o.udp.Close()
	}
}

// saSet is one set of four SAs (TS 33.203 §7.1).
type saSet struct {
	gen    int
	suite  ims.Suite
	spis   ims.SPIs
	ports  ims.Ports
	sas    [4]esptun.SA
	verify []string // Security-Server rows to be mirrored
	udp    *net.UDPConn

	// Guarded by UE.mu.
	streams []*stream
	dead    bool

	dial chan struct{} // held while the UE opens its own connection
}

// SetInfo describes a live set.
type SetInfo struct {
	Generation int // counts the sets of a UE from 1
	Suite      ims.Suite
	SPIs       ims.SPIs
	Ports      ims.Ports
	Current    bool
	SAs        [4]esptun.SA // with keys, which print as redacted
}

// Sets returns the live sets, oldest first.
func (u *UE) Sets() []SetInfo {
	u.mu.Lock()
	defer u.mu.Unlock()
	var out []SetInfo
	for _, s := range u.sets {
		out = append(out, SetInfo{
			Generation: s.gen, Suite: s.suite, SPIs: s.spis, Ports: s.ports, SAs: s.sas,
			Current: u.reg != nil && u.reg.set == s,
		})
	}
	return out
}

// DropOldSets closes every set but the current one.
func (u *UE) DropOldSets() {
	u.mu.Lock()
	reg := u.reg
	u.mu.Unlock()
	if reg != nil {
		u.dropBut(reg.set)
	}
}

// dropBut closes every set that is not among those to keep.
func (u *UE) dropBut(keep ...*saSet) {
	u.mu.Lock()
	var old []*saSet
	for _, s := range u.sets {
		if !slices.Contains(keep, s) {
			old = append(old, s)
		}
	}
	u.mu.Unlock()
	for _, s := range old {
		u.dropSet(s)
	}
}

// newOffer chooses SPIs and port-uc that differ from those of every live set (TS 33.203 §7.1, §7.4).
func (u *UE) newOffer() (*offer, error) {
	u.mu.Lock()
	used := make(map[ims.SPI]bool)
	first := len(u.sets) == 0
	for _, s := range u.sets {
		used[s.spis.UC], used[s.spis.US] = true, true
	}
	if u.server == nil {
		u.mu.Unlock()
		return nil, ErrClosed
	}
	o := &offer{portS: u.server.port}
	u.mu.Unlock()
	o.spiC = freeSPI(used)
	if o.spiS = o.spiC + 1; !u.cfg.Quirks.AdjacentSPIs || o.spiS < ims.MinSPI || used[o.spiS] {
		o.spiS = freeSPI(used)
	}
	if first {
		o.portC = u.cfg.PortUC
	}
	var err error
	if o.udp, err = sipwire.ListenUDP(u.farm.layer.ns(), netip.AddrPortFrom(u.cfg.Addr, o.portC)); err != nil {
		return nil, err
	}
	o.portC = sipwire.LocalAddrPort(o.udp.LocalAddr()).Port()
	o.rows = securityClient(o, u.cfg.Offers, u.cfg.Quirks)
	return o, nil
}

func freeSPI(used map[ims.SPI]bool) ims.SPI {
	for {
		s := ims.SPI(rand.Uint32()) //nolint:gosec // G404: a simulated phone has nothing to hide
		if s >= ims.MinSPI && !used[s] {
			used[s] = true
			return s
		}
	}
}

// securityClient prints the offers as phones do (RFC 3329 §2.2, TS 33.203 Annex H).
func securityClient(o *offer, offers []ims.Suite, q Quirks) []string {
	sep, eq := ";", "="
	if q.Spaces {
		sep, eq = " ; ", " = "
	}
	spi := "%d"
	if q.ZeroPadSPI {
		spi = "%010d"
	}
	var elems []string
	for _, s := range offers {
		p := []string{"ipsec-3gpp", "alg" + eq + s.Alg.String()}
		if s.Enc != ims.EncNull || !q.OmitNullEalg {
			p = append(p, "ealg"+eq+s.Enc.String())
		}
		if !q.OmitProtMod {
			p = append(p, "prot"+eq+"esp", "mod"+eq+"trans")
		}
		p = append(p, "spi-c"+eq+fmt.Sprintf(spi, uint32(o.spiC)), "spi-s"+eq+fmt.Sprintf(spi, uint32(o.spiS)),
			"port-c"+eq+strconv.Itoa(int(o.portC)), "port-s"+eq+strconv.Itoa(int(o.portS)))
		elems = append(elems, strings.Join(p, sep))
	}
	if q.ExtraOffer != "" {
		elems = append(elems, q.ExtraOffer)
	}
	if q.RowPerOffer {
		return elems
	}
	return []string{strings.Join(elems, ", ")}
}

// securityVerify mirrors Security-Server (RFC 3329 §2.3.1), with the quirk in another layout that means the same.
func securityVerify(rows []string, q Quirks) []string {
	if !q.VerifyPerRow {
		return rows
	}
	var out []string
	for _, row := range rows {
		for _, e := range sipwire.SplitList(row) {
			p := sipwire.ParseParams(e)
			for i := range p {
				if f, err := strconv.ParseFloat(p[i].Value, 64); strings.EqualFold(p[i].Name, "q") && err == nil {
					p[i].Value = fmt.Sprintf("%.3f", f)
				}
			}
			out = append(out, strings.TrimPrefix(p.String(), ";"))
		}
	}
	return out
}

// agreement is the P-CSCF's half.
type agreement struct {
	suite      ims.Suite
	spiC, spiS ims.SPI
	portC      uint16
	portS      uint16
}

// inUse is what a new agreement must not collide with.
type inUse struct {
	sets   []*saSet
	server uint16 // port-ps of the registration that goes on; zero for a new one
}

// readServer checks Security-Server and chooses as a UE does: the first entry, in order of q, that it offered itself
// (TS 33.203 §7.2, RFC 3329 §2.3.1).
func readServer(rows []string, o *offer, offers []ims.Suite, busy inUse) (agreement, error) {
	if len(rows) == 0 {
		return agreement{}, errors.New("no Security-Server")
	}
	list, err := secagree.Parse(rows...)
	if err != nil {
		return agreement{}, fmt.Errorf("read Security-Server: %w", err)
	}
	var f []string
	bad := func(ok bool, format string, args ...any) {
		if !ok {
			f = append(f, "Security-Server: "+fmt.Sprintf(format, args...))
		}
	}
	// The raw text: a P-CSCF that leaves out defaults or repeats parameters meets phones that do not cope.
	for _, row := range rows {
		for i, e := range sipwire.SplitRaw(row) {
			p := sipwire.ParseParams(e)
			bad(e != "", "empty element %d", i+1)
			for _, name := range []string{"q", "alg", "ealg", "prot", "mod", "spi-c", "spi-s", "port-c", "port-s"} {
				bad(p.Count(name) == 1, "entry %d has %s %d times", i+1, name, p.Count(name))
			}
			bad(strings.EqualFold(p.Get("prot"), "esp") && strings.EqualFold(p.Get("mod"), "trans"),
				"entry %d is not ESP in transport mode", i+1)
		}
	}
	var a agreement
	lastQ := 1001
	for i := range list.Mechanisms {
		m := &list.Mechanisms[i]
		bad(m.Usable(), "entry %d is not usable: %v", i+1, m.Problem())
		bad(int(m.Q) < lastQ, "q of entry %d does not fall", i+1)
		lastQ = int(m.Q)
		if i == 0 {
			a = agreement{spiC: m.SPIC, spiS: m.SPIS, portC: m.PortC, portS: m.PortS}
		}
		bad(m.SPIC == a.spiC && m.SPIS == a.spiS && m.PortC == a.portC && m.PortS == a.portS,
			"entry %d has other SPIs or ports", i+1)
		if a.suite == (ims.Suite{}) && slices.Contains(offers, m.Suite()) {
			a.suite = m.Suite()
		}
	}
	bad(a.suite.Legal(), "no entry that the UE offered")
	// TS 33.203 §7.1: own values, never one of the other end's, since all four SAs share their keys.
	bad(a.spiC >= ims.MinSPI && a.spiS >= ims.MinSPI && a.spiC != a.spiS, "SPIs %s and %s", a.spiC, a.spiS)
	for _, s := range []ims.SPI{a.spiC, a.spiS} {
		bad(s != o.spiC && s != o.spiS, "SPI %s is the UE's own", s)
	}
	bad(a.portC != a.portS && a.portC != 0 && a.portS != 0, "ports %d and %d", a.portC, a.portS)
	for _, p := range []uint16{a.portC, a.portS} {
		bad(p != 5060 && p != 5061, "port %d is an unprotected one", p)
	}
	for _, s := range busy.sets {
		bad(a.portC != s.ports.PC, "port-c %d is that of a live set", a.portC)
		for _, spi := range []ims.SPI{a.spiC, a.spiS} {
			bad(spi != s.spis.PC && spi != s.spis.PS, "SPI %s is that of a live set", spi)
		}
	}
	// TS 33.203 §7.4: the server port stays while the registration lasts.
	bad(busy.server == 0 || a.portS == busy.server, "port-s changed from %d to %d", busy.server, a.portS)
	if len(f) > 0 {
		return agreement{}, &ProtocolError{Problems: f}
	}
	return a, nil
}

// newSet installs the four SAs of an agreement (TS 33.203 §7.2 and Annex I).
func (u *UE) newSet(o *offer, a agreement, v digestaka.Vector, verify []string) (*saSet, error) {
	keys, err := aka.Expand(a.suite, v.CK, v.IK)
	if err != nil {
		return nil, fmt.Errorf("expand keys: %w", err)
	}
	ue := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(u.cfg.Addr, port) }
	p := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(u.farm.cfg.PCSCF.Addr(), port) }
	s := &saSet{
		suite: a.suite, verify: verify, udp: o.udp, dial: make(chan struct{}, 1),
		spis:  ims.SPIs{UC: o.spiC, US: o.spiS, PC: a.spiC, PS: a.spiS},
		ports: ims.Ports{UC: o.portC, US: o.portS, PC: a.portC, PS: a.portS},
		sas: [4]esptun.SA{
			{SPI: a.spiS, Src: ue(o.portC), Dst: p(a.portS), Keys: keys},
			{SPI: a.spiC, Src: ue(o.portS), Dst: p(a.portC), Keys: keys},
			{Inbound: true, SPI: o.spiS, Src: p(a.portC), Dst: ue(o.portS), Keys: keys},
			{Inbound: true, SPI: o.spiC, Src: p(a.portS), Dst: ue(o.portC), Keys: keys},
		},
	}
	if err := u.farm.layer.add(s.sas); err != nil {
		return nil, fmt.Errorf("install SA set: %w", err)
	}
	u.mu.Lock()
	if u.closed || u.server == nil {
		u.mu.Unlock()
		u.farm.layer.remove(s.sas)
		return nil, ErrClosed
	}
	u.gen++
	s.gen = u.gen
	u.sets = append(u.sets, s)
	u.mu.Unlock()
	o.taken = true
	if !o.guarded {
		o.guarded = true
		u.guard(s)
	}
	return s, nil
}

// guard reads port-uc, where nothing may arrive by UDP (TS 33.203 §7.1: UDP answers go to port-us).
func (u *UE) guard(s *saSet) {
	udp := s.udp
	u.spawn(func() {
		for {
			b, from, err := sipwire.ReadUDP(udp)
			if err != nil {
				if u.ctx.Err() != nil || !sipwire.Temporary(err) {
					return
				}
				continue
			}
			first, _, _ := strings.Cut(string(b), "\r\n")
			u.problem("UDP from %s arrived at port-uc: %q", from, first)
		}
	})
}

// dropSet takes a set out of service.
func (u *UE) dropSet(s *saSet) {
	u.mu.Lock()
	u.sets = slices.DeleteFunc(u.sets, func(o *saSet) bool { return o == s })
	u.mu.Unlock()
	s.close(u)
}

// close ends a set that is no longer in UE.sets.
func (s *saSet) close(u *UE) {
	s.closeSAs(u)
	_ = s.udp.Close()
}

// closeSAs ends SAs and connections but leaves port-uc open.
func (s *saSet) closeSAs(u *UE) {
	u.mu.Lock()
	dead := s.dead
	s.dead = true
	streams := slices.Clone(s.streams)
	u.mu.Unlock()
	if dead {
		return
	}
	for _, t := range streams {
		_ = t.conn.Close()
	}
	u.farm.layer.remove(s.sas)
}

// replace takes a temporary set out whose REGISTER was challenged again; its port-uc goes back to the offer, because the
// next set is built from the same Security-Client (TS 33.203 §7.3.1.3).
func (u *UE) replace(s *saSet, o *offer) {
	o.taken = false
	u.mu.Lock()
	u.sets = slices.DeleteFunc(u.sets, func(o *saSet) bool { return o == s })
	u.mu.Unlock()
	s.closeSAs(u)
}
