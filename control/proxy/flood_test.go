package proxy

import (
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// subscriber makes phone n of a population: an address, identity and agreement of its own.
func subscriber(n int) *phone {
	p := &phone{
		addr: netip.AddrFrom4([4]byte{10, 47, byte(n >> 8), byte(n)}), impi: fmt.Sprintf("00101%010d@%s", n, domain),
		portS: 6300, callID: fmt.Sprintf("reg%d@x", n),
	}
	p.agree()
	return p
}

func (p *phone) clearFlow() ims.Flow {
	f := clearFlow()
	f.Remote = netip.AddrPortFrom(p.addr, 5060)
	return f
}

// impu is the public identity that the core associates with the phone.
func (p *phone) impu() string { return "sip:+" + strings.TrimSuffix(p.impi, "@"+domain) + "@" + domain }

// granted is what the core says in the 200 to the phone.
func (p *phone) granted() []string {
	return []string{
		"Contact: <sip:001010000000001@" + p.addr.String() + ":6300>;expires=600000",
		"Service-Route: <sip:orig@scscf." + domain + ":6060;lr>",
		"P-Associated-URI: <" + p.impu() + ">",
	}
}

// enrol registers a phone of the population.
func (r *rig) enrol(n int) *phone {
	r.t.Helper()
	p := subscriber(n)
	r.challenge(p, p.clearFlow(), 5060)
	r.prove(p)
	return p
}

// prove takes a challenged phone to its 200.
func (r *rig) prove(p *phone) {
	r.t.Helper()
	p.authorization = strings.Replace(proof, impi, p.impi, 1)
	req := r.one(p.protectedFlow, p.register(fmt.Sprintf("sm7-%d", p.n), 6300, "Security-Verify: "+p.server))
	ans := r.one(coreFlow(), answerTo(r.t, req.msg, "200 OK", p.granted()...))
	if got := status(r.t, ans.msg); got != 200 {
		r.t.Fatalf("phone %s got %d:\n%s", p.impi, got, ans.msg)
	}
}

// calls lets a phone send a request and receive one, each with its answer.
func (r *rig) calls(p *phone) {
	r.t.Helper()
	own := func(s string) string {
		s = strings.ReplaceAll(s, ueAddr.String(), p.addr.String())
		return strings.ReplaceAll(s, "sip:+15550100001@"+domain, p.impu())
	}
	mo := r.one(p.protectedFlow, own(p.message()))
	if got := get(r.t, mo.msg, sipmsg.PAssertedIdentity); mo.remote.Addr() == p.addr || !strings.Contains(got, p.impu()) {
		r.t.Fatalf("MO of %s went to %v as %s", p.impi, mo.remote, got)
	}
	p.downlink(r.t, r.one(coreFlow(), answerTo(r.t, mo.msg, "200 OK")))
	mt := r.one(coreFlow(), own(mtInvite(r.path(p), "")))
	p.downlink(r.t, mt)
	if ans := r.one(p.protectedFlow, answerTo(r.t, mt.msg, "200 OK")); ans.remote.Addr() == p.addr || status(r.t, ans.msg) != 200 {
		r.t.Fatalf("answer of %s went to %v:\n%s", p.impi, ans.remote, ans.msg)
	}
}

// holdings is everything that a flood must give back.
type holdings struct {
	SAs, SPIs, UEs, Txs, Newest, Waiting, Answered, Protected, Sources, Timers, Conns, Unconfirmed int
}

func (r *rig) holdings() holdings {
	w := r.w
	_, unconfirmed := w.table.Unconfirmed(netip.Prefix{})
	return holdings{
		SAs: r.backend.Count(), SPIs: w.table.SPIsInUse(), UEs: w.table.UEs(), Txs: len(w.txs), Newest: len(w.newest),
		Waiting: w.waiting.n, Answered: w.answered.n, Protected: w.protected.n,
		Sources: len(w.waiting.bySource) + len(w.answered.bySource) + len(w.protected.bySource),
		Timers:  w.wheel.Len(), Conns: len(w.conns) + len(w.dials) + len(w.ueDial), Unconfirmed: unconfirmed,
	}
}

// heap returns the octets of live objects.
func (r *rig) heap() int64 {
	r.l.out, r.l.closed, r.l.dials = nil, nil, nil
	r.backend.Installed, r.backend.Removed, r.backend.Extended = nil, nil, nil
	runtime.GC()
	runtime.GC() // what the first one only marked as finalized
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// flood is a number of unprotected REGISTERs from a number of sources. Every second one comes from a few of them.
type flood struct {
	first              int // number of the first one
	registers, sources int
	ipv6               bool // every second source is an IPv6 /64, which uses a new address each time
	gap                time.Duration
	each               func(n int) // after each one
}

// floodResult is what became of a flood.
type floodResult struct{ forwarded, challenged, refused int }

// source returns the address that REGISTER n comes from.
func (f *flood) source(n int) netip.Addr {
	k := n / 2 % f.sources
	if n%2 == 1 {
		k %= f.sources / 100
	}
	if f.ipv6 && k%2 == 1 {
		a := netip.MustParseAddr("2001:db8:1::").As16()
		a[6], a[7] = byte(k>>8), byte(k)
		a[12], a[13], a[14], a[15] = byte(n>>24), byte(n>>16), byte(n>>8), byte(n)
		return netip.AddrFrom16(a)
	}
	return netip.AddrFrom4([4]byte{10, 46, byte(k >> 8), byte(k)})
}

// run sends the flood. The core challenges two of three REGISTERs as soon as it gets them and never answers the third.
func (f *flood) run(r *rig) (res floodResult) {
	r.t.Helper()
	cfg := r.w.cfg
	local := map[bool]netip.Addr{false: gmAddr, true: netip.MustParseAddr("2001:db8::5")}
	for n := f.first; n < f.first+f.registers; n++ {
		src := f.source(n)
		p := &phone{addr: src, impi: "flood" + strconv.Itoa(n) + "@" + domain, callID: "flood" + strconv.Itoa(n)}
		p.portS, p.portC = uint16(20000+n%20000), uint16(40000+n%20000)
		p.securityClient = fmt.Sprintf("ipsec-3gpp;alg=hmac-sha-1-96;ealg=aes-cbc;spi-c=%d;spi-s=%d;port-c=%d;port-s=%d",
			1000+2*n, 1001+2*n, p.portC, p.portS)
		msg := p.register("fl"+strconv.Itoa(n), 5060)
		if src.Is6() {
			msg = strings.ReplaceAll(msg, src.String()+":", "["+src.String()+"]:")
		}
		out := r.one(ims.Flow{
			Local: netip.AddrPortFrom(local[src.Is6()], 5060), Remote: netip.AddrPortFrom(src, 5060),
			Transport: ims.UDP, Side: ims.GmClear,
		}, msg)
		switch {
		case out.remote == coreAddr:
			res.forwarded++
			if n%3 != 0 {
				r.deliver(coreFlow(), answerTo(r.t, out.msg, "401 Unauthorized", challenge))
				res.challenged++
			}
		case strings.HasPrefix(out.msg, "SIP/2.0 503 ") && strings.Contains(out.msg, "\r\nRetry-After: "):
			res.refused++
		default:
			r.t.Fatalf("REGISTER %d of the flood:\n%s", n, out.msg)
		}

		sets, all := r.w.table.Unconfirmed(registrar.Source(src))
		o := origin{source: registrar.Source(src)}
		if here := r.w.waiting.of(o).n + sets; here > cfg.PendingSource {
			r.t.Fatalf("after REGISTER %d: %d under way of %v, limit %d", n, here, src, cfg.PendingSource)
		}
		if got := r.w.waiting.n + all; got > cfg.PendingMax {
			r.t.Fatalf("after REGISTER %d: %d under way, limit %d", n, got, cfg.PendingMax)
		}
		if got := r.w.answered.n; got > answeredPerPending*cfg.PendingMax {
			r.t.Fatalf("after REGISTER %d: %d answered ones are kept", n, got)
		}
		r.l.out, r.l.closed = nil, nil
		if f.each != nil {
			f.each(n)
		}
		if f.gap > 0 {
			r.l.now = r.l.now.Add(f.gap)
			r.w.Tick(r.l.now)
			r.settle()
		}
	}
	return res
}

// floodOver is how long a flood can have effects: reg-await-auth, the time of the core, and the time for which answers
// are kept.
const floodOver = 4*time.Minute + 32*time.Second + finalKept + answerGrace

// TestFlood floods a worker with 200,000 unprotected REGISTERs from 1,000 sources while 50 phones go on calling. The limits
// hold at every moment, and when it is over nothing is left of it but the room that maps keep for the next one. The
// tolerance for that is 4 MiB, about half of it in the fake backend: 20 octets for each REGISTER, so that none of them can
// have left an object. A further flood of a quarter of the size finds that room and may add 1 MiB.
func TestFlood(t *testing.T) {
	const tolerance, growth = 4 << 20, 1 << 20
	registers := 200_000
	if testing.Short() {
		registers = 20_000
	}
	for name, ipv6 := range map[string]bool{"IPv4": false, "IPv4 and IPv6": true} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, func(c *Config) {
				c.Gm = append(c.Gm, netip.MustParseAddr("2001:db8::5"))
				c.PendingMax, c.PendingSource = 2000, 8
			})
			var phones []*phone
			for n := range 50 {
				phones = append(phones, r.enrol(n))
			}
			r.advance(finalKept + time.Second) // what the registrations themselves leave for a while
			before, heap := r.holdings(), r.heap()

			turn := 0
			f := flood{registers: registers, sources: 1000, ipv6: ipv6, gap: 50 * time.Microsecond}
			f.each = func(n int) {
				if n%100 == 0 {
					r.calls(phones[turn%len(phones)])
					turn++
				}
			}
			res := f.run(r)
			during, peak := r.holdings(), r.heap()
			t.Logf("%d REGISTERs: %d forwarded, %d challenged, %d got 503", f.registers, res.forwarded, res.challenged, res.refused)
			if res.challenged == 0 || res.refused == 0 || during.Unconfirmed == 0 || during.Waiting == 0 {
				t.Fatalf("the flood did not reach the limits: %+v, %+v", res, during)
			}
			for _, p := range phones {
				r.calls(p)
			}

			r.advance(floodOver)
			if after := r.holdings(); after != before {
				t.Errorf("before %+v\n after %+v", before, after)
			}
			after := r.heap()
			t.Logf("heap: %d KiB before, %d KiB more at the end of the flood, %d KiB more afterwards", heap>>10, (peak-heap)>>10, (after-heap)>>10)
			if after-heap > tolerance {
				t.Errorf("the flood leaves %d octets of heap", after-heap)
			}
			for _, p := range phones {
				r.calls(p)
			}

			// Once more: now even the room is there.
			f.registers /= 4
			f.run(r)
			r.advance(floodOver)
			if again := r.holdings(); again != before {
				t.Errorf("before %+v\n after the second flood %+v", before, again)
			}
			if again := r.heap(); again-after > growth {
				t.Errorf("a second flood leaves %d octets more", again-after)
			}
			newcomer := r.enrol(1000)
			r.calls(newcomer)
		})
	}
}

// A set that gives way while the backend still installs it is no failure of the backend: the phone is told to come again.
func TestEvictedWhileInstalling(t *testing.T) {
	r := newRig(t, func(c *Config) { c.PendingMax = 1 })
	var log strings.Builder
	r.w.log = slog.New(slog.NewTextHandler(&log, nil))
	p, other := subscriber(1), subscriber(2)
	req := r.one(p.clearFlow(), p.register("a", 5060))
	r.w.Message(coreFlow(), []byte(answerTo(t, req.msg, "401 Unauthorized", challenge))) // and the backend works on it
	r.l.out = nil
	for _, out := range r.deliver(other.clearFlow(), other.register("b", 5060)) {
		if out.remote.Addr() == p.addr && (status(t, out.msg) != 503 || get(t, out.msg, sipmsg.Warning) == "" ||
			!strings.Contains(out.msg, "\r\n"+retryAfter)) {
			t.Errorf("the phone whose set gave way got\n%s", out.msg)
		}
	}
	if len(r.l.out) != 2 || log.Len() > 0 {
		t.Errorf("%d messages, log %q", len(r.l.out), log.String())
	}
	r.advance(finalKept + time.Minute)
	if r.backend.Count() != 0 || r.w.table.SPIsInUse() != 0 {
		t.Error("something is left")
	}
}
