package admin

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"sync/atomic"
	"time"
)

// Guard is the packet filter in front of the ESP ports.
type Guard interface {
	// Status returns hooks, maps and counters. It may be called from any goroutine.
	Status() GuardStatus
	// Follow calls f for each sampled drop until ctx ends, one call at a time, and returns why it ended; nil with ctx. f does
	// not block. There may be several followers, each of which sees every sample.
	Follow(ctx context.Context, f func(GuardDrop)) error
}

// GuardStatus is what GET /v1/guard answers.
type GuardStatus struct {
	Mode       string           `json:"mode"`
	Reason     string           `json:"reason"` // why this mode
	Pinned     string           `json:"pinned"` // where it outlives the process; empty: it does not
	Interfaces []GuardInterface `json:"interfaces"`
	Maps       []GuardMap       `json:"maps"`
	Verdicts   []GuardVerdict   `json:"verdicts"`
	Ring       GuardRing        `json:"ring"`
}

// GuardInterface is a network interface that the guard watches.
type GuardInterface struct {
	Name     string `json:"name"`
	Hook     string `json:"hook"` // xdp, xdp-generic, tcx, tc
	Attached bool   `json:"attached"`
	Detail   string `json:"detail"` // what else there is to say, such as why it is not attached
}

// GuardMap is how full a table of the guard is.
type GuardMap struct {
	Name     string `json:"name"`
	Entries  int    `json:"entries"`
	Capacity int    `json:"capacity"`
}

// GuardVerdict counts the packets that were treated alike for one reason.
type GuardVerdict struct {
	Verdict string `json:"verdict"` // pass, drop
	Reason  string `json:"reason"`
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

// GuardRing counts what the guard has told beside its counters.
type GuardRing struct {
	FirstUses uint64 `json:"first_uses"` // first packets of SA sets
	Samples   uint64 `json:"samples"`    // of drops
	Lost      uint64 `json:"lost"`       // of either, since nobody read fast enough
}

// GuardDrop is a sample of the packets that the guard has dropped: one line of what GET /v1/drops answers. Nobody has
// verified where it says that it comes from.
type GuardDrop struct {
	Time        time.Time `json:"time"`
	Reason      string    `json:"reason"`
	Interface   string    `json:"interface"`
	Source      string    `json:"src"` // address, with its port where the protocol has ports
	Destination string    `json:"dst"`
	Protocol    string    `json:"protocol"`      // esp, esp-udp, udp, tcp, …
	SPI         uint32    `json:"spi,omitempty"` // zero: none
	Length      int       `json:"length"`        // of the IP packet, in octets

	// Lost is how many samples are missing before this one because whoever reads is too slow. The server fills it in.
	Lost uint64 `json:"lost,omitempty"`
}

// Limits of followers.
const (
	maxFollowers  = 4
	waitingDrops  = 256              // samples that a slow follower may leave unread
	streamTimeout = 10 * time.Second // for one write
	maxLine       = 64 << 10
)

var errNoGuard = &failure{http.StatusNotFound, Problem{
	Text: "gmgate runs without a guard", Hint: "its log says why, see the start",
}}

func (s *Server) guard(*request) (any, error) {
	if s.cfg.Guard == nil {
		return nil, errNoGuard
	}
	st := s.cfg.Guard.Status()
	if st.Interfaces == nil {
		st.Interfaces = []GuardInterface{}
	}
	if st.Maps == nil {
		st.Maps = []GuardMap{}
	}
	if st.Verdicts == nil {
		st.Verdicts = []GuardVerdict{}
	}
	return st, nil
}

// drops streams samples, each a line of JSON, until the client goes away or the server ends. The last line may be a Problem.
func (s *Server) drops(w http.ResponseWriter, r *http.Request) {
	if s.cfg.Guard == nil {
		s.answer(w, nil, errNoGuard)
		return
	}
	select {
	case s.following <- struct{}{}:
		defer func() { <-s.following }()
	default:
		s.answer(w, nil, &failure{http.StatusServiceUnavailable, Problem{
			Text: fmt.Sprintf("%d others follow the drops already", maxFollowers), Hint: "end one of them",
		}})
		return
	}
	ctl := http.NewResponseController(w)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	send := func(v any) error {
		// That of the server is for a request which is answered at once.
		if err := ctl.SetWriteDeadline(time.Now().Add(s.streamTimeout)); err != nil {
			return err
		}
		if v != nil {
			if err := enc.Encode(v); err != nil {
				return err
			}
		}
		return ctl.Flush()
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
	err := s.follow(r.Context(), send)
	s.cfg.Logger.Debug("operator no longer follows the drops", "error", err)
}

// follow sends the samples of drops. An error is that of send, or what made the guard end, which was sent then.
func (s *Server) follow(ctx context.Context, send func(any) error) error {
	ctx, cancel := context.WithCancel(ctx)
	waiting, ended := make(chan GuardDrop, waitingDrops), make(chan error, 1)
	defer func() {
		cancel()
		<-ended //nolint:errcheck // what it says has been sent or is nobody's any more
	}()
	var lost atomic.Uint64
	go func() {
		err := s.cfg.Guard.Follow(ctx, func(d GuardDrop) {
			select {
			case waiting <- d:
			default:
				lost.Add(1)
			}
		})
		ended <- err
		close(ended)
	}()
	if err := send(nil); err != nil { // the head, so that the client knows that it is heard
		return err
	}
	for {
		select {
		case d := <-waiting:
			d.Lost += lost.Swap(0)
			if err := send(d); err != nil {
				return err
			}
		case err := <-ended:
			for len(waiting) > 0 {
				if err := send(<-waiting); err != nil {
					return err
				}
			}
			if err != nil && ctx.Err() == nil {
				_ = send(Problem{Text: "the guard has ended: " + err.Error()})
			}
			return err
		case <-s.ending:
			return send(nil) // the end of the answer still has to get out
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Guard returns the state of the guard.
func (c *Client) Guard(ctx context.Context) (GuardStatus, error) {
	var g GuardStatus
	err := c.call(ctx, http.MethodGet, "/v1/guard", nil, &g)
	return g, err
}

// Drops calls f for each drop that the guard samples, until ctx ends or f returns false, and returns nil then.
func (c *Client) Drops(ctx context.Context, f func(GuardDrop) bool) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://gmgate/v1/drops", nil)
	if err != nil {
		return fmt.Errorf("make request: %w", err)
	}
	resp, err := c.stream.Do(req)
	switch {
	case ctx.Err() != nil:
		return nil
	case err != nil:
		return c.unreachable(err)
	}
	defer resp.Body.Close() //nolint:errcheck // read only
	if resp.StatusCode != http.StatusOK {
		return c.refused(resp)
	}
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		var l struct {
			GuardDrop
			Problem
		}
		if err := json.Unmarshal(lines.Bytes(), &l); err != nil {
			return c.unreadable(err)
		}
		if l.Text != "" {
			return &Error{Status: resp.StatusCode, Text: l.Text, Hint: l.Hint}
		}
		if !f(l.GuardDrop) {
			return nil
		}
	}
	if ctx.Err() != nil {
		return nil
	}
	return &Error{Text: "gmgate no longer tells of drops", Hint: "it has been stopped; see its log", cause: lines.Err()}
}
