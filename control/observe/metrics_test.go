package observe

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/sipmsg"
)

// full returns metrics in which every family has at least one series.
func full() *Metrics {
	m := New(2)
	m.BuildInfo("v1.2.3", "abcdef")
	m.AddFunc("esp_drops_total", "ESP packets dropped.", Counter, map[string]string{"reason": "icv"}, func() float64 { return 7 })
	m.AddFunc("esp_drops_total", "ESP packets dropped.", Counter, map[string]string{"reason": "replay"}, func() float64 { return 8 })
	m.AddFunc("connections", "Open TCP connections.", Gauge, nil, func() float64 { return 9 })
	m.Worker(0).Message(In, ims.Mw, ims.UDP, sipmsg.MethodBye, 2)
	m.UnexpectedEvent("sa_set", "dead", "confirmed")
	m.ObserveRegistration(30 * time.Millisecond)
	m.ObserveInstall("install", time.Millisecond, nil)
	m.ObserveInstall("install", time.Millisecond, fmt.Errorf("install inbound SA: %w", os.NewSyscallError("sendmsg", syscall.EEXIST)))
	m.ObserveInstall("remove", time.Millisecond, errors.New("closed"))
	return m
}

// Peers: B1.01
func TestLint(t *testing.T) {
	problems, err := testutil.GatherAndLint(register(t, full()))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// TestLabels holds the set of label names: a new one has to be judged here, because identities and addresses have no
// place in metrics.
func TestLabels(t *testing.T) {
	allowed := map[string]bool{
		"dir": true, "side": true, "method": true, "code_class": true, "transport": true, "reason": true, "kind": true,
		"result": true, "alg": true, "ealg": true, "phase": true, "state": true, "op": true, "errno": true,
		"version": true, "revision": true, "goversion": true, "fsm": true, "event": true,
	}
	families, err := register(t, full()).Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if !allowed[l.GetName()] {
					t.Errorf("%s has the label %q", f.GetName(), l.GetName())
				}
			}
		}
	}
}

func TestSlowMetrics(t *testing.T) {
	r := register(t, full())
	for sample, want := range map[string]float64{
		`gmgate_registration_duration_seconds{}`:                                                      1,
		`gmgate_sa_install_duration_seconds{op="install"}`:                                            2,
		`gmgate_sa_install_errors_total{errno="EEXIST",op="install"}`:                                 1,
		`gmgate_sa_install_errors_total{errno="other",op="remove"}`:                                   1,
		`gmgate_esp_drops_total{reason="icv"}`:                                                        7,
		`gmgate_esp_drops_total{reason="replay"}`:                                                     8,
		`gmgate_connections{}`:                                                                        9,
		`gmgate_build_info{goversion="` + runtime.Version() + `",revision="abcdef",version="v1.2.3"}`: 1,
	} {
		if got := value(t, r, sample); got != want {
			t.Errorf("%s = %v, want %v", sample, got, want)
		}
	}
}

func TestErrnoName(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want string
	}{
		{syscall.ENOSYS, "ENOSYS"},
		{errors.Join(errors.New("a"), fmt.Errorf("b: %w", syscall.EPROTONOSUPPORT)), "EPROTONOSUPPORT"},
		{&net.OpError{Op: "write", Err: os.NewSyscallError("write", syscall.ENOBUFS)}, "ENOBUFS"},
		{syscall.Errno(4095), "other"},
		{io.EOF, "other"},
	} {
		if got := errnoName(tt.err); got != tt.want {
			t.Errorf("errnoName(%v) = %q, want %q", tt.err, got, tt.want)
		}
	}
}

func TestObserveIsSafeForConcurrentUse(t *testing.T) {
	m := New(1)
	r := register(t, m)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 500 {
				m.ObserveRegistration(time.Second)
				m.ObserveInstall("extend", time.Second, syscall.ESRCH)
			}
		})
	}
	wg.Wait()
	if got := value(t, r, `gmgate_sa_install_errors_total{errno="ESRCH",op="extend"}`); got != 2000 {
		t.Errorf("errors = %v, want 2000", got)
	}
	if got := value(t, r, `gmgate_registration_duration_seconds{}`); got != 2000 {
		t.Errorf("registrations = %v, want 2000", got)
	}
}

func TestRegisterReportsEveryProblem(t *testing.T) {
	m := New(1)
	f := func() float64 { return 0 }
	m.AddFunc("twice", "Help.", Gauge, nil, f)
	m.AddFunc("twice", "Help.", Gauge, nil, f)
	m.AddFunc("sa_sets", "Another help.", Gauge, nil, f)
	err := m.Register(prometheus.NewRegistry())
	if err == nil {
		t.Fatal("no error")
	}
	if n := strings.Count(err.Error(), "register metric: "); n != 2 {
		t.Errorf("%d problems in %q, want 2", n, err)
	}
	defer func() {
		if recover() == nil {
			t.Error("AddFunc after Register did not panic")
		}
	}()
	m.AddFunc("late", "Help.", Gauge, nil, f)
}

func TestHandler(t *testing.T) {
	srv := httptest.NewServer(Handler(register(t, full())))
	defer srv.Close()
	resp, err := http.Get(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("status %d, %v", resp.StatusCode, err)
	}
	for _, want := range []string{
		"gmgate_ues{state=\"pending\"} 0\n",
		"# TYPE gmgate_sip_messages_total counter\n",
		"gmgate_registration_duration_seconds_bucket{le=\"0.05\"} 1\n",
	} {
		if !bytes.Contains(body, []byte(want)) {
			t.Errorf("no %q in the answer", want)
		}
	}
}

func TestLogger(t *testing.T) {
	var buf bytes.Buffer
	var lvl slog.LevelVar
	for format, want := range map[string]string{
		"text": "level=INFO msg=hello spi=0x00001000 ik=[redacted]\n",
		"json": `"level":"INFO","msg":"hello","spi":"0x00001000","ik":"[redacted]"}` + "\n",
	} {
		buf.Reset()
		lvl.Set(slog.LevelInfo)
		log, err := NewLogger(&buf, &lvl, format)
		if err != nil {
			t.Fatal(err)
		}
		log.Debug("quiet")
		log.Info("hello", slog.Any("spi", ims.SPI(4096)), slog.Any("ik", ims.Key("0123456789abcdef")))
		if got := buf.String(); !strings.HasSuffix(got, want) || strings.Contains(got, "quiet") {
			t.Errorf("%s: %q does not end in %q", format, got, want)
		}
		lvl.Set(slog.LevelDebug)
		log.Debug("loud")
		if !strings.Contains(buf.String(), "loud") {
			t.Errorf("%s: the level cannot be changed", format)
		}
	}
	if _, err := NewLogger(&buf, &lvl, "xml"); err == nil {
		t.Error("format xml: no error")
	}
}
