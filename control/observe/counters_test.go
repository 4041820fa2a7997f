package observe

import (
	"fmt"
	"regexp"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

func register(t *testing.T, m *Metrics) *prometheus.Registry {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	if err := m.Register(r); err != nil {
		t.Fatal(err)
	}
	return r
}

// value gathers the sample with exactly these labels, in the notation of the text format.
func value(t *testing.T, g prometheus.Gatherer, sample string) float64 {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
			}
			if id := f.GetName() + "{" + strings.Join(labels, ",") + "}"; id == sample {
				switch {
				case m.GetCounter() != nil:
					return m.GetCounter().GetValue()
				case m.GetGauge() != nil:
					return m.GetGauge().GetValue()
				default:
					return float64(m.GetHistogram().GetSampleCount())
				}
			}
		}
	}
	return -1
}

// Peers: A1.35, B1.01, B3.21
func TestCountersAreAddedUp(t *testing.T) {
	m := New(3)
	r := register(t, m)
	a, b := m.Worker(0), m.Worker(2)
	for _, c := range []*Counters{a, a, b} {
		c.Message(In, ims.GmClear, ims.UDP, sipmsg.MethodRegister, 0)
	}
	b.Message(Out, ims.GmProtected, ims.TCP, sipmsg.MethodInvite, 4)
	b.Message(Out, ims.Mw, ims.UDP, sipmsg.MethodOther, 6)
	a.Reject(ReasonVerifyMismatch)
	b.Reject(ReasonVerifyMismatch)
	a.Drop(ReasonMalformed)
	a.Registration(RegInitial, true)
	a.Registration(RegReauth, false)
	a.Suite(ims.Suite{Alg: ims.AlgNull, Enc: ims.EncAESGCM})
	a.VerifyMismatch()
	b.IdentityMismatch()
	b.AwaitAuthExpired()
	a.Repeated(ims.Mw)
	b.Repeated(ims.Mw)
	b.RepeatRefused()
	a.Sets(PhaseTemporary, 2)
	b.Sets(PhaseTemporary, 1)
	a.Sets(PhaseTemporary, -1)
	a.UEs(5, UERegistered)
	a.SPIs(3, 100)
	a.SPIs(2, 100)
	b.SPIs(5, 100)
	b.UEs(-2, UERegistered) // a UE may be counted down where another worker counted up

	for sample, want := range map[string]float64{
		`gmgate_sip_messages_total{code_class="request",dir="in",method="REGISTER",side="gm_clear",transport="udp"}`: 3,
		`gmgate_sip_messages_total{code_class="4xx",dir="out",method="INVITE",side="gm_protected",transport="tcp"}`:  1,
		`gmgate_sip_messages_total{code_class="6xx",dir="out",method="other",side="mw",transport="udp"}`:             1,
		`gmgate_sip_messages_total{code_class="5xx",dir="out",method="INVITE",side="gm_protected",transport="tcp"}`:  -1,
		`gmgate_sip_rejected_total{reason="verify_mismatch"}`:                                                        2,
		`gmgate_sip_rejected_total{reason="busy"}`:                                                                   0,
		`gmgate_sip_rejected_total{reason="unknown"}`:                                                                -1,
		`gmgate_sip_drops_total{reason="malformed"}`:                                                                 1,
		`gmgate_registrations_total{kind="initial",result="success"}`:                                                1,
		`gmgate_registrations_total{kind="reauth",result="failure"}`:                                                 1,
		`gmgate_registrations_total{kind="dereg",result="success"}`:                                                  0,
		`gmgate_secagree_selected_total{alg="null",ealg="aes-gcm"}`:                                                  1,
		`gmgate_secagree_selected_total{alg="hmac-sha-1-96",ealg="aes-cbc"}`:                                         0,
		`gmgate_secagree_selected_total{alg="null",ealg="null"}`:                                                     -1,
		`gmgate_security_verify_mismatch_total{}`:                                                                    1,
		`gmgate_identity_mismatch_total{}`:                                                                           1,
		`gmgate_sip_repeats_total{side="mw"}`:                                                                        2,
		`gmgate_sip_repeats_total{side="gm_protected"}`:                                                              0,
		`gmgate_sip_repeats_refused_total{}`:                                                                         1,
		`gmgate_reg_await_auth_expired_total{}`:                                                                      1,
		`gmgate_sa_sets{phase="temporary"}`:                                                                          2,
		`gmgate_sa_sets{phase="old"}`:                                                                                0,
		`gmgate_ues{state="registered"}`:                                                                             3,
		`gmgate_ues{state="unknown"}`:                                                                                -1,
		`gmgate_spi_pool_in_use{}`:                                                                                   7,
		`gmgate_spi_pool_capacity{}`:                                                                                 200,
	} {
		if got := value(t, r, sample); got != want {
			t.Errorf("%s = %v, want %v", sample, got, want)
		}
	}
}

func TestOutsideTheEnumerations(t *testing.T) {
	m := New(1)
	r := register(t, m)
	c := m.Worker(0)
	c.Message(200, 200, 200, 200, 1)
	c.Message(In, ims.Mw, ims.UDP, sipmsg.MethodBye, 7)
	c.Reject(200)
	c.Drop(0)
	c.Registration(99, true)
	c.Suite(ims.Suite{Alg: 77, Enc: ims.EncNull})
	c.Sets(0, 1)
	c.UEs(1, 44)
	for sample, want := range map[string]float64{
		`gmgate_sip_messages_total{code_class="1xx",dir="unknown",method="other",side="unknown",transport="unknown"}`: 1,
		`gmgate_sip_rejected_total{reason="unknown"}`:                                                                 1,
		`gmgate_sip_drops_total{reason="unknown"}`:                                                                    1,
		`gmgate_registrations_total{kind="unknown",result="success"}`:                                                 1,
		`gmgate_secagree_selected_total{alg="unknown",ealg="null"}`:                                                   1,
		`gmgate_sa_sets{phase="unknown"}`:                                                                             1,
		`gmgate_ues{state="unknown"}`:                                                                                 1,
	} {
		if got := value(t, r, sample); got != want {
			t.Errorf("%s = %v, want %v", sample, got, want)
		}
	}
	if n, err := testutil.GatherAndCount(r, "gmgate_sip_messages_total"); err != nil || n != 1 {
		t.Errorf("message series = %d, %v; want 1: a class beyond 6 is not counted", n, err)
	}
}

func TestNamesOfEnumerations(t *testing.T) {
	snake := regexp.MustCompile(`^[a-z]+(_[a-z]+)*$`)
	check := func(kind string, n int, name func(uint8) string) {
		t.Helper()
		seen := map[string]bool{}
		for i := 1; i < n; i++ {
			s := name(uint8(i))
			if !snake.MatchString(s) || seen[s] {
				t.Errorf("%s %d has the name %q: not snake_case, or used twice", kind, i, s)
			}
			seen[s] = true
		}
		for _, i := range []uint8{0, uint8(n), 255} {
			if s, want := name(i), fmt.Sprintf("%s(%#x)", kind, i); s != want {
				t.Errorf("%s %d = %q, want %q", kind, i, s, want)
			}
		}
	}
	check("Reason", int(reasonEnd), func(i uint8) string { return Reason(i).String() })
	check("Dir", int(dirEnd), func(i uint8) string { return Dir(i).String() })
	check("RegKind", int(regEnd), func(i uint8) string { return RegKind(i).String() })
	check("Phase", int(phaseEnd), func(i uint8) string { return Phase(i).String() })
	check("UEState", int(ueEnd), func(i uint8) string { return UEState(i).String() })
	for s := range ims.Side(sides) {
		if s != 0 && strings.Contains(s.String(), "(") {
			t.Errorf("side %d has no name", s)
		}
	}
	if s := ims.Side(sides).String(); !strings.Contains(s, "(") {
		t.Errorf("ims has a side %s that the table lacks", s)
	}
	if s := ims.Transport(transports).String(); !strings.Contains(s, "(") {
		t.Errorf("ims has a transport %s that the table lacks", s)
	}
	if s := ims.Alg(algs).String(); !strings.Contains(s, "(") {
		t.Errorf("ims has an alg %s that the table lacks", s)
	}
	if s := ims.EncAlg(encAlgs).String(); !strings.Contains(s, "(") {
		t.Errorf("ims has an ealg %s that the table lacks", s)
	}
}

func TestCountingDoesNotAllocate(t *testing.T) {
	c := New(1).Worker(0)
	if a := testing.AllocsPerRun(1000, func() {
		c.Message(In, ims.GmProtected, ims.TCP, sipmsg.MethodInvite, 2)
		c.Reject(ReasonBusy)
		c.Drop(ReasonKeepalive)
		c.Registration(RegRefresh, true)
		c.Suite(ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC})
		c.VerifyMismatch()
		c.IdentityMismatch()
		c.AwaitAuthExpired()
		c.Sets(PhaseOld, 1)
		c.UEs(-1, UEPending)
	}); a != 0 {
		t.Errorf("%v allocations, want 0", a)
	}
}

func TestCountersArePadded(t *testing.T) {
	var c Counters
	if off := unsafe.Offsetof(c.messages); off < cacheLines {
		t.Errorf("counters start at %d, want at least %d", off, cacheLines)
	}
	if rest := unsafe.Sizeof(c) - unsafe.Offsetof(c.ues) - unsafe.Sizeof(c.ues); rest < cacheLines {
		t.Errorf("%d bytes after the last counter, want at least %d", rest, cacheLines)
	}
}

// TestScrapeWhileCounting is for the race detector, and shows that a scrape never sees a counter go down.
func TestScrapeWhileCounting(t *testing.T) {
	const n = 20000
	m := New(2)
	r := register(t, m)
	var wg sync.WaitGroup
	for i := range 2 {
		wg.Go(func() {
			c := m.Worker(i)
			for range n {
				c.Drop(ReasonLoop)
				c.Sets(PhaseReserved, 1)
			}
		})
	}
	const sample = `gmgate_sip_drops_total{reason="loop"}`
	var last float64
	for range 20 {
		got := value(t, r, sample)
		if got < last {
			t.Fatalf("%s went from %v to %v", sample, last, got)
		}
		last = got
	}
	wg.Wait()
	if got := value(t, r, sample); got != 2*n {
		t.Errorf("%s = %v, want %v", sample, got, 2*n)
	}
	if got := value(t, r, `gmgate_sa_sets{phase="reserved"}`); got != 2*n {
		t.Errorf("sets = %v, want %v", got, 2*n)
	}
}

func BenchmarkMessage(b *testing.B) {
	c := New(1).Worker(0)
	b.ReportAllocs()
	for b.Loop() {
		c.Message(In, ims.GmProtected, ims.UDP, sipmsg.MethodInvite, 0)
	}
}
