package admin

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/proxy"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/sa"
)

// source is a Source in memory.
type source struct {
	mu    sync.Mutex
	ues   []proxy.UEInfo
	asked []proxy.UEQuery
	err   error
	hold  chan struct{} // if set, UEs waits for it
}

func (s *source) choose(q proxy.UEQuery) (list []proxy.UEInfo) {
	s.asked = append(s.asked, q)
	for _, u := range s.ues {
		if (!q.ID.IsValid() || q.ID == u.ID) && (q.IMPI == "" || q.IMPI == u.IMPI) && (!q.Addr.IsValid() || q.Addr == u.Addr) &&
			(q.IMPU == "" || slices.Contains(u.Identities, q.IMPU)) && (!q.Contact.IsValid() || q.Contact.Addr() == u.Addr) {
			list = append(list, u)
		}
	}
	return list
}

func (s *source) UEs(_ context.Context, q proxy.UEQuery, after proxy.UEID, limit int) ([]proxy.UEInfo, bool, error) {
	if s.hold != nil {
		<-s.hold
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	list := slices.DeleteFunc(s.choose(q), func(u proxy.UEInfo) bool {
		return cmp.Or(cmp.Compare(u.ID.Worker, after.Worker), cmp.Compare(u.ID.Index, after.Index)) <= 0 && after.IsValid()
	})
	return list[:min(limit, len(list))], len(list) > limit, s.err
}

func (s *source) Deregister(_ context.Context, q proxy.UEQuery) ([]proxy.UEInfo, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := slices.Clone(s.choose(q))
	for i := range list {
		list[i].State = registrar.Deregistered
	}
	return list, s.err
}

func (s *source) Move(_ context.Context, id proxy.UEID, worker int) ([]proxy.UEInfo, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := slices.Clone(s.choose(proxy.UEQuery{ID: id}))
	for i := range list {
		list[i].ID.Worker = worker
	}
	return list, s.err
}

func (s *source) Loads(context.Context) ([]proxy.Load, error) {
	return []proxy.Load{{Worker: 0, UEs: 3, SPIs: 6}, {Worker: 1, UEs: 4, SPIs: 10}}, s.err
}

var at = time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)

// phoneInfo makes a UE with an old, a current and a temporary set.
func phoneInfo(n int) proxy.UEInfo {
	set := func(k int, phase sa.Phase) proxy.SetInfo {
		return proxy.SetInfo{
			ID: 1<<48 | uint64(k), Phase: phase, Suite: ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC},
			SPIs:  ims.SPIs{UC: 4294967290, US: 4294967291, PC: 2147483648, PS: ims.SPI(k)},
			Ports: ims.Ports{UC: 6300, US: 6301, PC: 6110, PS: 6100}, Deadline: at.Add(time.Hour),
		}
	}
	old, current, temporary := set(1, sa.Old), set(2, sa.Established), set(3, sa.Temporary)
	old.ConnIn = 7
	current.Over, current.Used, current.TCP = old.ID, true, true
	current.FirstESP, current.Heard = at.Add(-time.Hour), at.Add(-2*time.Second)
	temporary.FirstESP, temporary.Diagnosis = at.Add(-3*time.Second), proxy.DiagnosisNotAccepted
	return proxy.UEInfo{
		ID: proxy.UEID{Worker: 1, Index: uint32(n), Gen: 2}, IMPI: fmt.Sprintf("%015d@ims.example", n),
		Addr: netip.AddrFrom4([4]byte{10, 45, 0, byte(n)}), Local: netip.MustParseAddr("10.0.0.5"), State: registrar.Registered,
		Identities: []string{fmt.Sprintf("sip:+%d@ims.example", n), fmt.Sprintf("tel:+%d", n)}, Contact: "sip:a@10.45.0.1:6301",
		Expires: at, Current: current.ID, Sets: []proxy.SetInfo{old, current, temporary},
		Witnessed: true, ESP: sa.Traffic{Packets: 12, Bytes: 3456, Last: at.Add(-time.Second)},
		LastMessage: at.Add(-2 * time.Second), LastSeen: at.Add(-time.Second),
	}
}

// logBuffer is a log that several goroutines write.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

type bed struct {
	src    *source
	path   string
	client *Client
	log    *logBuffer
	stop   func() // ends the server
}

func newBed(t *testing.T, n int, change ...func(*Server)) *bed {
	t.Helper()
	b := &bed{src: &source{}, path: filepath.Join(t.TempDir(), "run", "gmgate.sock"), log: &logBuffer{}}
	for i := range n {
		b.src.ues = append(b.src.ues, phoneInfo(i+1))
	}
	l, err := Listen(t.Context(), b.path)
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(Config{
		Source: b.src, Status: Status{Version: "1.2", Backend: "userspace", Started: at}, SAs: func() int { return 28 },
		Survey: func(context.Context) (sa.Survey, error) {
			return sa.Survey{Sets: map[uint64]sa.Counters{1<<48 | 2: {1, 2, 3, 4}}}, b.src.err
		},
		Logger: slog.New(slog.NewTextHandler(b.log, nil)),
	})
	for _, f := range change {
		f(s)
	}
	b.stop = sync.OnceFunc(s.Serve(l))
	t.Cleanup(b.stop)
	b.client = NewClient(b.path)
	t.Cleanup(b.client.Close)
	return b
}

// raw sends bytes of HTTP and returns the status and the body.
func (b *bed) raw(t *testing.T, method, path, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://x"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := b.client.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // read only
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if got := resp.Header.Get("Content-Type"); got != "application/json" || !json.Valid(text) {
		t.Errorf("%s %s: %s %q", method, path, got, text)
	}
	return resp.StatusCode, string(text)
}

func TestStatus(t *testing.T) {
	b := newBed(t, 0)
	st, err := b.client.Status(t.Context())
	if err != nil || st.Version != "1.2" || st.Backend != "userspace" || !st.Started.Equal(at) || st.UEs != 7 || st.SAs != 28 ||
		!slices.Equal(st.Workers, []Worker{{0, 3, 6}, {1, 4, 10}}) {
		t.Errorf("%+v, %v", st, err)
	}
}

// The JSON is the contract: whoever changes this golden text breaks somebody.
func TestUEOnTheWire(t *testing.T) {
	b := newBed(t, 1)
	status, got := b.raw(t, "GET", "/v1/ues/1-1-2", "")
	want := `{"id":"1-1-2","worker":1,"index":1,"impi":"000000000000001@ims.example","address":"10.45.0.1","local":"10.0.0.5",` +
		`"state":"registered","identities":["sip:+1@ims.example","tel:+1"],"contact":"sip:a@10.45.0.1:6301","service_route":[],` +
		`"expires":"2026-01-01T12:00:00Z","current":"1-2",` +
		`"esp":{"packets":12,"bytes":3456,"last":"2026-01-01T11:59:59Z"},` +
		`"last_message":"2026-01-01T11:59:58Z","last_seen":"2026-01-01T11:59:59Z","sets":[` +
		`{"id":"1-1","phase":"old","role":"receiving","algorithms":"hmac-sha-1-96=aes-cbc",` +
		`"spis":{"uc":4294967290,"us":4294967291,"pc":2147483648,"ps":1},"ports":{"uc":6300,"us":6301,"pc":6110,"ps":6100},` +
		`"deadline":"2026-01-01T13:00:00Z","used":false,"tcp":false,"connections":{"in":7,"out":0}},` +
		`{"id":"1-2","phase":"established","role":"current","algorithms":"hmac-sha-1-96=aes-cbc",` +
		`"spis":{"uc":4294967290,"us":4294967291,"pc":2147483648,"ps":2},"ports":{"uc":6300,"us":6301,"pc":6110,"ps":6100},` +
		`"deadline":"2026-01-01T13:00:00Z","over":"1-1","used":true,"tcp":true,"connections":{"in":0,"out":0},` +
		`"first_esp":"2026-01-01T11:00:00Z","heard":"2026-01-01T11:59:58Z"},` +
		`{"id":"1-3","phase":"temporary","role":"waiting","algorithms":"hmac-sha-1-96=aes-cbc",` +
		`"spis":{"uc":4294967290,"us":4294967291,"pc":2147483648,"ps":3},"ports":{"uc":6300,"us":6301,"pc":6110,"ps":6100},` +
		`"deadline":"2026-01-01T13:00:00Z","used":false,"tcp":false,"connections":{"in":0,"out":0},` +
		`"first_esp":"2026-01-01T11:59:57Z","diagnosis":"ESP arrives but is not accepted",` +
		`"hint":"wrong keys, algorithms or SIM (TS 33.203 §7.2)"}]}` + "\n"
	if status != 200 || got != want {
		t.Errorf("%d\n got %s\nwant %s", status, got, want)
	}
}

// Every diagnosis comes with what it may come from.
func TestDiagnoses(t *testing.T) {
	for d := proxy.Diagnosis(1); d <= proxy.DiagnosisNotAccepted; d++ {
		s := setOf(&proxy.SetInfo{Diagnosis: d}, &proxy.UEInfo{})
		if s.Diagnosis == "" || strings.HasPrefix(s.Diagnosis, "Diagnosis(") || s.Hint == "" {
			t.Errorf("%d: %q, %q", d, s.Diagnosis, s.Hint)
		}
	}
}

// Sequence numbers are named like the SPIs of their SAs, and are there only when they were asked for.
func TestSequences(t *testing.T) {
	b := newBed(t, 1)
	u, err := b.client.UE(t.Context(), "1-1-2", true)
	if err != nil || u.Sets[0].Sequences != nil || u.Sets[1].Sequences == nil ||
		*u.Sets[1].Sequences != (Sequences{PS: 1, PC: 2, US: 3, UC: 4}) {
		t.Errorf("%+v, %v", u, err)
	}
	if u, err = b.client.UE(t.Context(), "1-1-2", false); err != nil || u.Sets[1].Sequences != nil {
		t.Errorf("not asked for: %+v, %v", u, err)
	}
}

func TestPages(t *testing.T) {
	b := newBed(t, 250)
	_, first := b.raw(t, "GET", "/v1/ues", "")
	var p Page
	if err := json.Unmarshal([]byte(first), &p); err != nil || len(p.UEs) != defaultLimit || p.After != "1-100-2" {
		t.Errorf("%d UEs, after %q, %v", len(p.UEs), p.After, err)
	}
	for limit, want := range map[int]bool{250: false, 249: true, 1000: false, 1: true} {
		list, more, err := b.client.UEs(t.Context(), Query{}, limit)
		if err != nil || len(list) != min(limit, 250) || more != want {
			t.Errorf("limit %d: %d UEs, more %t, %v", limit, len(list), more, err)
		}
	}
	if _, empty := b.raw(t, "GET", "/v1/ues?impi=nobody", ""); empty != `{"ues":[]}`+"\n" {
		t.Errorf("nobody: %s", empty)
	}
}

func TestFind(t *testing.T) {
	b := newBed(t, 3)
	for name, want := range map[string]string{
		"1-2-2": "000000000000002@ims.example", "10.45.0.3": "000000000000003@ims.example",
		"::ffff:10.45.0.3": "000000000000003@ims.example", "tel:+2": "000000000000002@ims.example",
		"000000000000001@ims.example": "000000000000001@ims.example",
	} {
		if list, err := b.client.Find(t.Context(), name); err != nil || len(list) != 1 || list[0].IMPI != want {
			t.Errorf("%s: %v, %v", name, list, err)
		}
	}
	for _, name := range []string{"1-9-2", "10.45.0.9", "tel:+9", "somebody", "+9"} {
		_, err := b.client.Find(t.Context(), name)
		if e, ok := errors.AsType[*Error](err); !ok || e.Status != 404 || e.Hint == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Peers: B4.06
func TestDeregister(t *testing.T) {
	b := newBed(t, 3)
	for _, tt := range []struct {
		aor  string
		want proxy.UEQuery
	}{
		{"1-2-2", proxy.UEQuery{ID: proxy.UEID{Worker: 1, Index: 2, Gen: 2}}},
		{"tel:+2", proxy.UEQuery{IMPU: "tel:+2"}},
		{"000000000000002@ims.example", proxy.UEQuery{IMPI: "000000000000002@ims.example"}},
	} {
		list, err := b.client.DeregisterAOR(t.Context(), tt.aor)
		if err != nil || len(list) != 1 || list[0].State != "deregistered" || list[0].Sets[1].Role != RoleEnding {
			t.Errorf("%s: %+v, %v", tt.aor, list, err)
		}
		if got := b.src.asked[len(b.src.asked)-1]; got != tt.want {
			t.Errorf("%s asks for %+v", tt.aor, got)
		}
	}
	if list, err := b.client.Deregister(t.Context(), Target{Contact: "10.45.0.1:6301"}); err != nil || len(list) != 1 {
		t.Errorf("by contact: %v, %v", list, err)
	}
	if got := b.log.String(); strings.Count(got, "operator ended a registration") != 4 || !strings.Contains(got, fmt.Sprintf("uid=%d", os.Getuid())) {
		t.Errorf("log: %s", got)
	}
	if _, err := b.client.DeregisterAOR(t.Context(), "nobody"); err == nil || !strings.Contains(err.Error(), `impu "nobody"`) {
		t.Errorf("nobody: %v", err)
	}
}

// What is wrong with a request is said in JSON, with the status that fits.
func TestBadRequests(t *testing.T) {
	b := newBed(t, 1)
	for _, tt := range []struct {
		method, path, body string
		status             int
		text               string
	}{
		{"GET", "/", "", 404, "there is no"},
		{"GET", "/v2/ues", "", 404, "there is no"},
		{"GET", "/v1/ues/", "", 404, "there is no"},
		{"POST", "/v1/ues", "", 405, "use GET"},
		{"GET", "/v1/deregister", "", 405, "use POST"},
		{"DELETE", "/v1/ues/1-1-2", "", 405, "use GET"},
		{"GET", "/v1/ues?limit=0", "", 400, "1 to 1000"},
		{"GET", "/v1/ues?limit=1001", "", 400, "1 to 1000"},
		{"GET", "/v1/ues?limit=many", "", 400, "1 to 1000"},
		{"GET", "/v1/ues?adr=10.45.0.1", "", 400, "once each"},
		{"GET", "/v1/ues?addr=10.45.0.1&addr=10.45.0.2", "", 400, "once each"},
		{"GET", "/v1/ues?addr=10.45.0", "", 400, "not an IP address"},
		{"GET", "/v1/ues?after=7", "", 400, "page before"},
		{"GET", "/v1/ues?contact=10.45.0.1", "", 400, "not a contact"},
		{"GET", "/v1/ues/7", "", 400, "worker-index-generation"},
		{"GET", "/v1/ues/0-1-2", "", 404, "no UE has the id"},
		{"GET", "/v1/ues/1-1-2?sequences=yes", "", 400, "true or false"},
		{"GET", "/v1/ues/1-1-2?sequence=true", "", 400, "the parameter is"},
		{"GET", "/v1/guard", "", 404, "without a guard"},
		{"GET", "/v1/drops", "", 404, "without a guard"},
		{"POST", "/v1/drops", "", 405, "use GET"},
		{"POST", "/v1/deregister", "", 400, "not a target"},
		{"POST", "/v1/deregister", "{}", 400, "exactly one"},
		{"POST", "/v1/deregister", `{"impi":"a","impu":"b"}`, 400, "exactly one"},
		{"POST", "/v1/deregister", `{"impi":"a"}{}`, 400, "behind the target"},
		{"POST", "/v1/deregister", `{"imp":"a"}`, 400, "not a target"},
		{"POST", "/v1/deregister", `{"contact":"[2001:db8::1]"}`, 400, "not a contact"},
		{"POST", "/v1/deregister", `{"id":"1"}`, 400, "worker-index-generation"},
		{"POST", "/v1/deregister", `{"impi":"nobody"}`, 404, "no registration matches"},
		{"POST", "/v1/deregister", `{"impi":"` + strings.Repeat("a", maxBody) + `"}`, 413, "longer than"},
	} {
		if status, text := b.raw(t, tt.method, tt.path, tt.body); status != tt.status || !strings.Contains(text, tt.text) {
			t.Errorf("%s %s %.40s: %d %s, want %d with %q", tt.method, tt.path, tt.body, status, text, tt.status, tt.text)
		}
	}
	b.src.err = fmt.Errorf("list: %w", proxy.ErrWorkerGone)
	if status, text := b.raw(t, "GET", "/v1/ues", ""); status != 503 {
		t.Errorf("a worker that does not answer: %d %s", status, text)
	}
	b.src.err = errors.New("odd")
	if status, text := b.raw(t, "GET", "/v1/status", ""); status != 500 || !strings.Contains(text, "odd") {
		t.Errorf("another error: %d %s", status, text)
	}
}

// More requests at the same time than the server takes are told to come back, and do not wait.
func TestTooManyRequests(t *testing.T) {
	b := newBed(t, 1)
	b.src.hold = make(chan struct{})
	var wg sync.WaitGroup
	statuses := make(chan int, maxParallel+1)
	for range maxParallel + 1 {
		wg.Go(func() {
			resp, err := b.client.http.Get("http://x/v1/ues")
			if err != nil {
				t.Error(err)
				return
			}
			_ = resp.Body.Close()
			statuses <- resp.StatusCode
		})
	}
	if first := <-statuses; first != 503 {
		t.Errorf("the one too many: %d", first)
	}
	close(b.src.hold)
	wg.Wait()
	close(statuses)
	for s := range statuses {
		if s != 200 {
			t.Errorf("the others: %d", s)
		}
	}
}

func TestListen(t *testing.T) {
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	path := filepath.Join(t.TempDir(), "run", "a.sock")
	l, err := Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	mode := func(name string) os.FileMode {
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		return info.Mode().Perm()
	}
	if s, f := mode(path), mode(filepath.Dir(path)); s != 0o660 || f != 0o750 {
		t.Errorf("socket %o, folder %o", s, f)
	}
	if _, err := Listen(t.Context(), path); !errors.Is(err, ErrInUse) {
		t.Errorf("a live socket: %v", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // as a crash
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
	if l, err = Listen(t.Context(), path); err != nil {
		t.Fatalf("a stale socket: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after an orderly end: %v", err)
	}
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(t.Context(), path); err == nil {
		t.Error("a file was replaced")
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != "precious" {
		t.Errorf("the file: %q, %v", text, err)
	}
	if _, err := Listen(t.Context(), filepath.Join(t.TempDir(), "a", "b", "c.sock")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no place for the folder: %v", err)
	}
}

// An operator who cannot reach the daemon is told why.
func TestUnreachable(t *testing.T) {
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale.sock")
	l, err := net.Listen("unix", stale)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	_ = l.Close()
	other := filepath.Join(dir, "other.sock")
	o, err := net.Listen("unix", other)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = http.Serve(o, http.NotFoundHandler()) }() //nolint:gosec // ends with the listener
	defer o.Close()                                           //nolint:errcheck // the test is over
	for path, want := range map[string]string{
		filepath.Join(dir, "absent.sock"): "there is no socket", stale: "nobody answers", other: "answered 404",
	} {
		c := NewClient(path)
		_, err := c.Status(t.Context())
		if e, ok := errors.AsType[*Error](err); !ok || !strings.Contains(e.Text, want) || e.Hint == "" {
			t.Errorf("%s: %v", path, err)
		}
		c.Close()
	}
}

// A move, and what refuses it.
func TestMove(t *testing.T) {
	b := newBed(t, 2)
	ues, err := b.client.Move(t.Context(), "1-2-2", 0)
	if err != nil || len(ues) != 1 || ues[0].Worker != 0 || ues[0].ID != "0-2-2" {
		t.Errorf("moved: %+v, %v", ues, err)
	}
	if got := b.log.String(); !strings.Contains(got, "operator moved a UE") || !strings.Contains(got, fmt.Sprintf("uid=%d", os.Getuid())) {
		t.Errorf("log: %s", got)
	}
	status := func(err error) (code int, hint string) {
		if e, ok := errors.AsType[*Error](err); ok {
			return e.Status, e.Hint
		}
		return 0, ""
	}
	for _, tt := range []struct {
		err  error
		code int
		hint string
	}{
		{proxy.ErrNoUE, http.StatusNotFound, "/v1/ues"},
		{proxy.ErrNoWorker, http.StatusNotFound, "/v1/status"},
		{fmt.Errorf("%w: a REGISTER is under way", proxy.ErrBusy), http.StatusConflict, "try again"},
		{proxy.ErrFixed, http.StatusConflict, ""},
		{proxy.ErrWorkerGone, http.StatusServiceUnavailable, "overloaded"},
	} {
		b.src.err = fmt.Errorf("move: %w", tt.err)
		_, err := b.client.Move(t.Context(), "1-2-2", 0)
		if code, hint := status(err); code != tt.code || !strings.Contains(hint, tt.hint) || !strings.Contains(err.Error(), tt.err.Error()) {
			t.Errorf("%v: status %d, %v, hint %q", tt.err, code, err, hint)
		}
	}
	b.src.err = nil
	for _, body := range []any{
		Move{ID: "1-2-2"}, Move{Worker: new(int)}, map[string]any{"id": "1-2-2", "worker": "one"}, map[string]any{"id": "1-2-2", "worker": 1, "x": 1},
	} {
		if code, _ := status(b.client.call(t.Context(), http.MethodPost, "/v1/move", body, new(Moved))); code != http.StatusBadRequest {
			t.Errorf("%+v: status %d", body, code)
		}
	}
}
