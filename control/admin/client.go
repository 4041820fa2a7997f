package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/gmgate/gmgate/control/proxy"
)

// Limits of the client.
const (
	clientTimeout = 20 * time.Second
	maxAnswer     = 64 << 20
)

// Error is a request that failed, with what to do about it.
type Error struct {
	Status int // of HTTP; zero: there was no answer
	Text   string
	Hint   string
	cause  error
}

// Error implements error.
func (e *Error) Error() string { return e.Text }

// Unwrap returns what lies behind it.
func (e *Error) Unwrap() error { return e.cause }

// Client talks to a Server. It is safe for concurrent use.
type Client struct {
	path   string
	http   *http.Client
	stream *http.Client // for answers that take as long as they take
}

// NewClient makes a client of the socket at path.
func NewClient(path string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}
	t := &http.Transport{DialContext: dial, ResponseHeaderTimeout: clientTimeout}
	return &Client{path: path, http: &http.Client{Transport: t, Timeout: clientTimeout}, stream: &http.Client{Transport: t}}
}

// Close closes idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// call sends a request and reads the answer into v.
func (c *Client) call(ctx context.Context, method, path string, body, v any) error {
	var text io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return fmt.Errorf("write request: %w", err)
		}
		text = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://gmgate"+path, text)
	if err != nil {
		return fmt.Errorf("make request: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.unreachable(err)
	}
	defer resp.Body.Close() //nolint:errcheck // read only
	if resp.StatusCode != http.StatusOK {
		return c.refused(resp)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(v); err != nil {
		return c.unreadable(err)
	}
	return nil
}

// refused reads why a request has failed.
func (c *Client) refused(resp *http.Response) error {
	var p Problem
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&p); err != nil || p.Text == "" {
		p = Problem{Text: "answered " + resp.Status, Hint: "is " + c.path + " the admin socket of gmgate?"}
	}
	return &Error{Status: resp.StatusCode, Text: p.Text, Hint: p.Hint}
}

// unreadable says that an answer is not what gmgate would say.
func (c *Client) unreadable(err error) error {
	return &Error{Text: fmt.Sprintf("read the answer: %v", err), Hint: "is " + c.path + " the admin socket of gmgate?", cause: err}
}

// unreachable says in an operator's words why there was no answer.
func (c *Client) unreachable(err error) error {
	e := &Error{Text: "no answer from gmgate on " + c.path, cause: err}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.Text = "there is no socket " + c.path
		e.Hint = "is gmgate running, and is this its admin.socket? Name another one with --socket"
	case errors.Is(err, fs.ErrPermission):
		e.Text = "may not use " + c.path
		e.Hint = "be root, or of the group that the socket belongs to"
	case errors.Is(err, syscall.ECONNREFUSED):
		e.Text = "nobody answers on " + c.path
		e.Hint = "gmgate is not running; it left the socket behind when it ended"
	case errors.Is(err, context.DeadlineExceeded):
		e.Hint = "it took too long: see its log and load"
	default:
		e.Text += ": " + err.Error()
	}
	return e
}

// Status returns the state of the daemon.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	err := c.call(ctx, http.MethodGet, "/v1/status", nil, &s)
	return s, err
}

// Query chooses UE contexts by what is not empty.
type Query struct {
	IMPI, IMPU, Addr, Contact string
}

// UEs returns the UE contexts that a query chooses, at most limit of them, and whether there are more.
func (c *Client) UEs(ctx context.Context, q Query, limit int) (list []UE, more bool, err error) {
	params := url.Values{}
	for name, v := range map[string]string{"impi": q.IMPI, "impu": q.IMPU, "addr": q.Addr, "contact": q.Contact} {
		if v != "" {
			params.Set(name, v)
		}
	}
	for list = []UE{}; ; { // an empty list is no null in JSON
		params.Set("limit", strconv.Itoa(min(limit-len(list), maxLimit)))
		var p Page
		if err := c.call(ctx, http.MethodGet, "/v1/ues?"+params.Encode(), nil, &p); err != nil {
			return list, false, err
		}
		list = append(list, p.UEs...)
		if p.After == "" || len(list) >= limit {
			return list, p.After != "", nil
		}
		params.Set("after", p.After)
	}
}

// UE returns the UE context with an id, with the sequence numbers of its SAs on demand.
func (c *Client) UE(ctx context.Context, id string, sequences bool) (UE, error) {
	path := "/v1/ues/" + url.PathEscape(id)
	if sequences {
		path += "?sequences=true"
	}
	var u UE
	err := c.call(ctx, http.MethodGet, path, nil, &u)
	return u, err
}

// maxFound is how many UE contexts of one name Find returns.
const maxFound = 100

// Find returns the UE contexts that an operator names in whatever way: by id, by address, by private or public identity.
func (c *Client) Find(ctx context.Context, name string) ([]UE, error) {
	if _, err := proxy.ParseUEID(name); err == nil {
		u, err := c.UE(ctx, name, false)
		return []UE{u}, err
	}
	var tries []Query
	if a, err := netip.ParseAddr(name); err == nil {
		tries = []Query{{Addr: a.String()}}
	} else if isURI(name) {
		tries = []Query{{IMPU: name}}
	} else {
		tries = []Query{{IMPI: name}, {IMPU: name}}
	}
	for _, q := range tries {
		if list, _, err := c.UEs(ctx, q, maxFound); err != nil || len(list) > 0 {
			return list, err
		}
	}
	return nil, &Error{Status: http.StatusNotFound, Text: fmt.Sprintf("no UE is known as %q", name), Hint: "see gmgate ue list"}
}

// Deregister ends the registrations that the target names.
func (c *Client) Deregister(ctx context.Context, t Target) ([]UE, error) {
	var e Ended
	err := c.call(ctx, http.MethodPost, "/v1/deregister", t, &e)
	return e.UEs, err
}

// Move gives the UE contexts at the address of a UE to another worker.
func (c *Client) Move(ctx context.Context, id string, worker int) ([]UE, error) {
	var m Moved
	err := c.call(ctx, http.MethodPost, "/v1/move", Move{ID: id, Worker: &worker}, &m)
	return m.UEs, err
}

// DeregisterAOR ends the registrations of an id, or of a private or public identity.
func (c *Client) DeregisterAOR(ctx context.Context, aor string) ([]UE, error) {
	if _, err := proxy.ParseUEID(aor); err == nil {
		return c.Deregister(ctx, Target{ID: aor})
	}
	if !isURI(aor) {
		list, err := c.Deregister(ctx, Target{IMPI: aor})
		if e, ok := errors.AsType[*Error](err); !ok || e.Status != http.StatusNotFound {
			return list, err
		}
	}
	return c.Deregister(ctx, Target{IMPU: aor})
}

// isURI reports whether a name is the URI of a public identity.
func isURI(name string) bool {
	scheme, _, ok := strings.Cut(name, ":")
	return ok && (strings.EqualFold(scheme, "sip") || strings.EqualFold(scheme, "sips") || strings.EqualFold(scheme, "tel"))
}
