package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/gmgate/gmgate/control/proxy"
	"github.com/gmgate/gmgate/control/sa"
)

// Limits of requests.
const (
	maxBody      = 16 << 10
	maxHeader    = 16 << 10
	maxParallel  = 8 // requests at the same time; more are told to come back
	headTimeout  = 5 * time.Second
	askTimeout   = 5 * time.Second  // for the workers to answer
	writeTimeout = 30 * time.Second // a reader that stops reading is cut off
	idleTimeout  = time.Minute

	defaultLimit = 100
	maxLimit     = 1000
)

// Source is what the server tells about and acts on; proxy.Fleet is one. It is safe for concurrent use.
type Source interface {
	// UEs returns at most limit of the UE contexts that a query chooses, those behind after, and whether there are more.
	UEs(ctx context.Context, q proxy.UEQuery, after proxy.UEID, limit int) ([]proxy.UEInfo, bool, error)
	// Deregister ends the registrations that a query chooses.
	Deregister(ctx context.Context, q proxy.UEQuery) ([]proxy.UEInfo, error)
	// Move gives the UE contexts at the address of a UE to another worker.
	Move(ctx context.Context, id proxy.UEID, worker int) ([]proxy.UEInfo, error)
	// Loads returns the load of every worker.
	Loads(ctx context.Context) ([]proxy.Load, error)
}

// Config is what a Server needs.
type Config struct {
	Source Source
	Status Status     // what does not change: version, revision, instance, start, backend
	SAs    func() int // installed in the backend
	// Survey reads what the backend holds; it may take long where there are many SAs, so it is asked only on demand.
	Survey func(context.Context) (sa.Survey, error)
	Guard  Guard // nil: there is none
	Logger *slog.Logger
}

// Server answers operators.
type Server struct {
	cfg  Config
	mux  *http.ServeMux
	busy chan struct{}

	following chan struct{} // by those who follow drops, which takes long
	ending    chan struct{} // closed when the server ends
	end       func()

	// Constants, but in tests.
	writeTimeout, streamTimeout time.Duration
}

// request is one request of an operator.
type request struct {
	*http.Request
	uid uint32 // of who asks
}

// NewServer makes a server; Serve lets it work.
func NewServer(cfg Config) *Server {
	s := &Server{
		cfg: cfg, mux: http.NewServeMux(), busy: make(chan struct{}, maxParallel),
		following: make(chan struct{}, maxFollowers), ending: make(chan struct{}),
		writeTimeout: writeTimeout, streamTimeout: streamTimeout,
	}
	s.end = sync.OnceFunc(func() { close(s.ending) })
	for _, r := range []struct {
		method, path string
		do           http.HandlerFunc
	}{
		{http.MethodGet, "/v1/status", s.handle(s.status)},
		{http.MethodGet, "/v1/ues", s.handle(s.ues)},
		{http.MethodGet, "/v1/ues/{id}", s.handle(s.ue)},
		{http.MethodPost, "/v1/deregister", s.handle(s.deregister)},
		{http.MethodPost, "/v1/move", s.handle(s.move)},
		{http.MethodGet, "/v1/guard", s.handle(s.guard)},
		{http.MethodGet, "/v1/drops", s.drops},
	} {
		s.mux.HandleFunc(r.method+" "+r.path, r.do)
		s.mux.HandleFunc(r.path, func(w http.ResponseWriter, req *http.Request) {
			w.Header().Set("Allow", r.method)
			s.answer(w, nil, &failure{http.StatusMethodNotAllowed, Problem{Text: req.Method + " is not for " + r.path, Hint: "use " + r.method}})
		})
	}
	s.mux.HandleFunc("/", func(w http.ResponseWriter, req *http.Request) {
		s.answer(w, nil, &failure{http.StatusNotFound, Problem{
			Text: fmt.Sprintf("there is no %q here", req.URL.Path), Hint: "such as /v1/status or /v1/ues",
		}})
	})
	return s
}

type uidKey struct{}

// Serve answers on a listener until stop is called, which waits for the requests that are under way and ends those that follow
// drops.
func (s *Server) Serve(l net.Listener) (stop func()) {
	srv := &http.Server{
		Handler: s.mux, ReadHeaderTimeout: headTimeout, ReadTimeout: 2 * headTimeout, WriteTimeout: s.writeTimeout,
		IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(s.cfg.Logger.Handler(), slog.LevelDebug), // a client that went away is no news
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, uidKey{}, peerUID(c))
		},
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			s.cfg.Logger.Error("admin socket ended", "error", err)
		}
	}()
	return func() {
		s.end()
		ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
		defer cancel()
		if srv.Shutdown(ctx) != nil {
			_ = srv.Close()
		}
		<-done
	}
}

// failure is an error with the status that it is answered with.
type failure struct {
	status int
	Problem
}

// Error implements error.
func (f *failure) Error() string { return f.Text }

func badRequest(hint, format string, args ...any) error {
	return &failure{http.StatusBadRequest, Problem{Text: fmt.Sprintf(format, args...), Hint: hint}}
}

// handle turns a function into a handler with limits.
func (s *Server) handle(do func(*request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		select {
		case s.busy <- struct{}{}:
			defer func() { <-s.busy }()
		default:
			s.answer(w, nil, &failure{http.StatusServiceUnavailable, Problem{
				Text: fmt.Sprintf("%d requests are under way", maxParallel), Hint: "try again",
			}})
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
		defer cancel()
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		uid, ok := ctx.Value(uidKey{}).(uint32)
		if !ok {
			uid = unknownUID
		}
		v, err := do(&request{r.WithContext(ctx), uid})
		s.answer(w, v, err)
	}
}

// answer writes a value, or what went wrong.
func (s *Server) answer(w http.ResponseWriter, v any, err error) {
	status := http.StatusOK
	if err != nil {
		f, ok := errors.AsType[*failure](err)
		switch {
		case ok:
		case errors.Is(err, proxy.ErrWorkerGone):
			f = &failure{http.StatusServiceUnavailable, Problem{Text: err.Error(), Hint: "gmgate is stopping or overloaded; try again"}}
		default:
			f = &failure{http.StatusInternalServerError, Problem{Text: err.Error()}}
		}
		status, v = f.status, f.Problem
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		s.cfg.Logger.Debug("operator did not get an answer", "error", err)
	}
}

func (s *Server) status(r *request) (any, error) {
	loads, err := s.cfg.Source.Loads(r.Context())
	if err != nil {
		return nil, err
	}
	st := s.cfg.Status
	st.SAs = s.cfg.SAs()
	st.Workers = make([]Worker, len(loads))
	for i, l := range loads {
		st.Workers[i] = Worker(l)
		st.UEs += l.UEs
	}
	return st, nil
}

// The parameters of GET /v1/ues.
var listParams = []string{"impi", "impu", "addr", "contact", "limit", "after"}

func (s *Server) ues(r *request) (any, error) {
	params := r.URL.Query()
	for name, values := range params {
		if !slices.Contains(listParams, name) || len(values) > 1 {
			return nil, badRequest("the parameters are "+strings.Join(listParams, ", ")+", once each", "parameter %q", name)
		}
	}
	q := proxy.UEQuery{IMPI: params.Get("impi"), IMPU: params.Get("impu")}
	limit := defaultLimit
	var after proxy.UEID
	var err error
	if v := params.Get("addr"); v != "" {
		if q.Addr, err = readAddr(v); err != nil {
			return nil, err
		}
	}
	if v := params.Get("contact"); v != "" {
		if q.Contact, err = readContact(v); err != nil {
			return nil, err
		}
	}
	if v := params.Get("limit"); v != "" {
		if limit, err = strconv.Atoi(v); err != nil || limit < 1 || limit > maxLimit {
			return nil, badRequest(fmt.Sprintf("1 to %d", maxLimit), "limit %q", v)
		}
	}
	if v := params.Get("after"); v != "" {
		if after, err = proxy.ParseUEID(v); err != nil {
			return nil, badRequest("take it from the page before", "after: %v", err)
		}
	}
	list, more, err := s.cfg.Source.UEs(r.Context(), q, after, limit)
	if err != nil {
		return nil, err
	}
	page := Page{UEs: uesOf(list)}
	if more {
		page.After = list[len(list)-1].ID.String()
	}
	return page, nil
}

func (s *Server) ue(r *request) (any, error) {
	id, err := readID(r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	sequences := false
	for name, values := range r.URL.Query() {
		if name != "sequences" || len(values) > 1 {
			return nil, badRequest("the parameter is sequences, once", "parameter %q", name)
		}
		if sequences, err = strconv.ParseBool(values[0]); err != nil {
			return nil, badRequest("true or false", "sequences %q", values[0])
		}
	}
	list, _, err := s.cfg.Source.UEs(r.Context(), proxy.UEQuery{ID: id}, proxy.UEID{}, 1)
	switch {
	case err != nil:
		return nil, err
	case len(list) == 0:
		return nil, &failure{http.StatusNotFound, Problem{Text: "no UE has the id " + id.String(), Hint: "it may have left: see /v1/ues"}}
	}
	u := ueOf(&list[0])
	if sequences {
		held, err := s.cfg.Survey(r.Context())
		if err != nil {
			return nil, err
		}
		u.addSequences(&list[0], held.Sets)
	}
	return u, nil
}

func (s *Server) deregister(r *request) (any, error) {
	var t Target
	if err := read(r, &t, "target", `such as {"impi": "001010000000001@ims.example"}`); err != nil {
		return nil, err
	}
	q, err := t.query()
	if err != nil {
		return nil, err
	}
	ended, err := s.cfg.Source.Deregister(r.Context(), q)
	for i := range ended {
		s.cfg.Logger.Info("operator ended a registration", "impi", ended[i].IMPI, "ue", ended[i].Addr, "uid", r.uid)
	}
	switch {
	case err != nil:
		return nil, err
	case len(ended) == 0:
		return nil, &failure{http.StatusNotFound, Problem{Text: "no registration matches " + t.String(), Hint: "see gmgate ue list"}}
	}
	return Ended{UEs: uesOf(ended)}, nil
}

// read reads the body of a request, which must be one value and nothing else.
func read(r *request, v any, what, hint string) error {
	dec := json.NewDecoder(r.Body)
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
			return &failure{http.StatusRequestEntityTooLarge, Problem{Text: fmt.Sprintf("the request is longer than %d bytes", maxBody)}}
		}
		return badRequest(hint, "the request is not a %s: %v", what, err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return badRequest("", "there is something behind the %s", what)
	}
	return nil
}

func (s *Server) move(r *request) (any, error) {
	const hint = `such as {"id": "0-17-3", "worker": 1}`
	var m Move
	if err := read(r, &m, "move", hint); err != nil {
		return nil, err
	}
	id, err := readID(m.ID)
	switch {
	case err != nil:
		return nil, err
	case m.Worker == nil:
		return nil, badRequest(hint, "the move has no worker")
	}
	ues, err := s.cfg.Source.Move(r.Context(), id, *m.Worker)
	for i := range ues {
		s.cfg.Logger.Info("operator moved a UE", "impi", ues[i].IMPI, "ue", ues[i].Addr, "worker", *m.Worker, "uid", r.uid)
	}
	refused := func(status int, hint string) error {
		return &failure{status, Problem{Text: err.Error(), Hint: hint}}
	}
	switch {
	case errors.Is(err, proxy.ErrNoUE):
		return nil, refused(http.StatusNotFound, "it may have left, or moved: see /v1/ues")
	case errors.Is(err, proxy.ErrNoWorker):
		return nil, refused(http.StatusNotFound, "the workers are in /v1/status")
	case errors.Is(err, proxy.ErrBusy):
		return nil, refused(http.StatusConflict, "try again when that is over")
	case errors.Is(err, proxy.ErrFixed):
		return nil, refused(http.StatusConflict, "")
	case err != nil:
		return nil, err
	}
	return Moved{UEs: uesOf(ues)}, nil
}

// String prints what the target names.
func (t Target) String() string {
	for _, f := range t.fields() {
		if f[1] != "" {
			return f[0] + " " + strconv.Quote(f[1])
		}
	}
	return "nothing"
}

func (t Target) fields() [][2]string {
	return [][2]string{{"id", t.ID}, {"impi", t.IMPI}, {"impu", t.IMPU}, {"contact", t.Contact}}
}

func (t Target) query() (q proxy.UEQuery, err error) {
	set := 0
	for _, f := range t.fields() {
		if f[1] != "" {
			set++
		}
	}
	if set != 1 {
		return q, badRequest("exactly one of id, impi, impu and contact", "the target has %d of its fields", set)
	}
	q.IMPI, q.IMPU = t.IMPI, t.IMPU
	switch {
	case t.ID != "":
		q.ID, err = readID(t.ID)
	case t.Contact != "":
		q.Contact, err = readContact(t.Contact)
	}
	return q, err
}

func readID(s string) (proxy.UEID, error) {
	id, err := proxy.ParseUEID(s)
	if err != nil {
		return id, badRequest("ids are in the answers of /v1/ues", "%v", err)
	}
	return id, nil
}

func readAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil {
		return a, badRequest("", "%q is not an IP address", s)
	}
	return a.Unmap(), nil
}

func readContact(s string) (netip.AddrPort, error) {
	a, err := netip.ParseAddrPort(s)
	if err != nil {
		return a, badRequest("address:port, an IPv6 address in brackets", "%q is not a contact", s)
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()), nil
}
