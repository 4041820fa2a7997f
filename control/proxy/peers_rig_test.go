package proxy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// phoneAt makes phone number n at an address. Numbers that differ, modulo 500, have no port and no SPI in common, so that
// they may share the address.
func phoneAt(addr string, n int) *phone {
	p := newPhone()
	p.addr = netip.MustParseAddr(addr)
	p.impi = fmt.Sprintf("00101%010d@%s", n, domain)
	p.callID = fmt.Sprintf("reg%d@%s", n, addr)
	p.n = 100 * (n % 500)
	p.portS = uint16(6300 + p.n)
	p.agree()
	return p
}

// host is the address as it stands in SIP.
func (p *phone) host() string {
	if p.addr.Is6() {
		return "[" + p.addr.String() + "]"
	}
	return p.addr.String()
}

func (p *phone) clear() ims.Flow {
	f := clearFlow()
	f.Remote = netip.AddrPortFrom(p.addr, 5060)
	return f
}

func (p *phone) proof() string { return strings.Replace(proof, impi, p.impi, 1) }

// ok200 is what the core's 200 to this phone says.
func (p *phone) ok200() []string {
	return []string{
		"Contact: <sip:001010000000001@" + p.host() + ":6300>;expires=600000", granted[1],
		"P-Associated-URI: <sip:" + p.impi + ">",
	}
}

// accept takes a challenged phone from SM7 to SM12.
func (r *rig) accept(p *phone) (atCore, atUE sent) {
	r.t.Helper()
	p.authorization = p.proof()
	atCore = r.one(p.protectedFlow, p.register(fmt.Sprintf("sm7-%d", p.n), 6300, "Security-Verify: "+p.server))
	atUE = r.one(coreFlow(), answerTo(r.t, atCore.msg, "200 OK", p.ok200()...))
	if status(r.t, atUE.msg) != 200 {
		r.t.Fatalf("not registered:\n%s", atUE.msg)
	}
	return atCore, atUE
}

// signUp registers a phone.
func (r *rig) signUp(p *phone) *phone {
	r.t.Helper()
	r.challenge(p, p.clear(), 5060)
	r.accept(p)
	return p
}

// renew registers a phone again over its set, with a challenge and a new set.
func (r *rig) renew(p *phone) {
	r.t.Helper()
	old := *p
	p.agree()
	req := r.one(old.protectedFlow, p.register(fmt.Sprintf("re%d", p.n), 6300, "Security-Verify: "+old.server))
	ans := r.one(coreFlow(), answerTo(r.t, req.msg, "401 Unauthorized", challenge))
	old.downlink(r.t, ans)
	r.readServer(p, ans.msg)
	_, ok := r.accept(p)
	p.downlink(r.t, ok)
}

// refresh registers a phone again over its set, without a challenge.
func (r *rig) refresh(p *phone, extra ...string) {
	r.t.Helper()
	req := r.one(p.protectedFlow, p.register(fmt.Sprintf("rf%d", p.cseq), 6300, append([]string{"Security-Client:"}, extra...)...))
	if ans := r.one(coreFlow(), answerTo(r.t, req.msg, "200 OK", p.ok200()...)); status(r.t, ans.msg) != 200 {
		r.t.Fatalf("refresh refused:\n%s", ans.msg)
	}
}

// leave de-registers a phone and returns the answer that it gets.
func (r *rig) leave(p *phone, extra ...string) sent {
	r.t.Helper()
	req := r.one(p.protectedFlow, p.register(fmt.Sprintf("de%d", p.cseq), 6300, append([]string{"Expires: 0", "Security-Client:"}, extra...)...))
	return r.one(coreFlow(), answerTo(r.t, req.msg, "200 OK"))
}

// says is a MESSAGE of the phone.
func (p *phone) says(extra ...string) string {
	return strings.ReplaceAll(p.message(extra...), "10.45.0.7", p.host())
}

// request is an initial request of the core to a phone, apart from others by its branch.
func (r *rig) request(p *phone, method, branch string) string {
	r.t.Helper()
	return strings.NewReplacer("INVITE", method, "z9hG4bKs9", "z9hG4bK"+branch).Replace(mtInvite(r.path(p), ""))
}

// served checks that the phone reaches the core, and that the core reaches it inside its SA.
func (r *rig) served(p *phone) {
	r.t.Helper()
	if up := r.one(p.protectedFlow, p.says()); up.remote.Addr() == p.addr {
		r.t.Errorf("phone %s is refused:\n%s", p.impi, up.msg)
	}
	p.downlink(r.t, r.one(coreFlow(), r.request(p, "OPTIONS", "served")))
}

// empty checks that nothing of any phone is left, once every timer has run out.
func (r *rig) empty() {
	r.t.Helper()
	r.advance(finalKept + answerGrace)
	if n, spis, ues := r.backend.Count(), r.w.table.SPIsInUse(), r.w.table.UEs(); n != 0 || spis != 0 || ues != 0 {
		r.t.Errorf("left: %d SAs, %d SPIs, %d UE contexts", n, spis, ues)
	}
	if len(r.w.txs) != 0 || len(r.w.newest) != 0 || r.w.waiting.n != 0 || r.w.answered.n != 0 {
		r.t.Errorf("left: %d transactions, %d newest, %d waiting, %d answered", len(r.w.txs), len(r.w.newest), r.w.waiting.n, r.w.answered.n)
	}
	if len(r.w.repeats.by) != 0 || r.w.repeats.octets != 0 {
		r.t.Errorf("left: %d messages to repeat, %d octets", len(r.w.repeats.by), r.w.repeats.octets)
	}
	if len(r.w.conns) != 0 || len(r.w.dials) != 0 || len(r.w.ueDial) != 0 {
		r.t.Errorf("left: %d connections, %d dials", len(r.w.conns), len(r.w.dials))
	}
}

// context is the UE context of a phone, which must exist.
func (r *rig) context(p *phone) *registrar.UE {
	r.t.Helper()
	u := r.w.table.UEOf(p.impi, p.addr)
	if u == nil {
		r.t.Fatalf("no context of %s", p.impi)
	}
	return u
}

// connect has the phone open a connection from port-uc to port-ps: its messages come over the flow.
func (r *rig) connect(p *phone, c ims.ConnID) ims.Flow {
	r.l.conns[c] = true
	return p.tcpFlow(c)
}

// hangUp ends a connection.
func (r *rig) hangUp(f ims.Flow) {
	delete(r.l.conns, f.Conn)
	r.w.Closed(f.Conn, f)
}

// overTCP writes a request of a phone as it goes over TCP.
func overTCP(msg string) string { return strings.Replace(msg, "SIP/2.0/UDP", "SIP/2.0/TCP", 1) }

// inSA checks that every message that left towards an address of the phones' network did so from a protected port to the
// phone's, or over one of the connections named.
func (r *rig) inSA(p *phone, out []sent, conns ...ims.ConnID) {
	r.t.Helper()
	for _, s := range out {
		if s.conn != 0 {
			known := false
			for _, c := range conns {
				known = known || c == s.conn
			}
			if !known {
				r.t.Errorf("left over connection %d:\n%s", s.conn, s.msg)
			}
			continue
		}
		if s.remote.Addr() == p.addr {
			p.downlink(r.t, s)
		}
	}
}

// offer writes a Security-Client row from the entries of a phone, given without SPIs and ports.
func offer(entries ...string) string {
	for i := range entries {
		entries[i] += ";spi-c=4000;spi-s=4001;port-c=6301;port-s=6300"
	}
	return "Security-Client: " + strings.Join(entries, ", ")
}

// chosen registers a phone that makes an offer, and returns the suite of its SAs and its Security-Server.
func chosen(t *testing.T, row string, change ...func(*Config)) (ims.Suite, string) {
	t.Helper()
	r := newRig(t, change...)
	p := newPhone()
	_, p.securityClient, _ = strings.Cut(row, ": ")
	r.challenge(p, clearFlow(), 5060)
	r.confirm(p)
	return r.backend.Installed[0].Keys.Suite, p.server
}

// refusal is the answer of ours to a REGISTER in clear that must not reach the core.
func refusal(t *testing.T, rows ...string) string {
	t.Helper()
	r := newRig(t)
	out := r.one(clearFlow(), newPhone().register("x", 5060, rows...))
	if out.remote.Addr() != ueAddr || len(r.w.txs) != 0 {
		t.Fatalf("went to %v:\n%s", out.remote, out.msg)
	}
	return out.msg
}

// header names of the security agreement, none of which the core may see.
var agreementHeaders = []sipmsg.HeaderID{sipmsg.SecurityClient, sipmsg.SecurityServer, sipmsg.SecurityVerify, sipmsg.ProxyRequire}
