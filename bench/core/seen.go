package core

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/control/ims"
)

// Seen is one message that arrived at the core, and what is wrong with it.
type Seen struct {
	At                 time.Time
	Transport          ims.Transport
	Source             netip.AddrPort
	Method             string // of the request, or of the CSeq of a response; empty when it could not be parsed
	Status             int    // zero for a request
	RequestURI         string
	CallID             string
	CSeq               uint32
	IMPI               string   // username of the Authorization of a REGISTER
	IntegrityProtected string   // value in a REGISTER; empty when absent (TS 24.229 §7.2A.2)
	AssertedIdentity   []string // P-Asserted-Identity, URIs only
	Body               string
	Problems           []string // what a P-CSCF should have done otherwise; empty in a correct run

	msg *sipwire.Message
}

// Header returns the first value of a header, "" if absent.
func (s Seen) Header(name string) string {
	if s.msg == nil {
		return ""
	}
	return s.msg.Get(name)
}

// Headers returns the values of all rows of a header.
func (s Seen) Headers(name string) []string {
	if s.msg == nil {
		return nil
	}
	return s.msg.All(name)
}

// String returns the message as the core read it, for the output of a failing test.
func (s Seen) String() string {
	if s.msg == nil {
		return "(unreadable)"
	}
	return string(s.msg.Bytes())
}

// Log returns every message received so far, oldest first. The oldest are forgotten beyond Config.LogSize.
func (c *Core) Log() []Seen {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]Seen, 0, len(c.seen))
	for _, s := range c.seen {
		e := *s
		e.Problems = slices.Clone(s.Problems)
		out = append(out, e)
	}
	return out
}

// Problems returns the problems of every message in the log, each with method or status and Call-ID.
func (c *Core) Problems() []string {
	var out []string
	for _, s := range c.Log() {
		for _, p := range s.Problems {
			what := s.Method
			if s.Status != 0 {
				what = fmt.Sprintf("%d to %s", s.Status, s.Method)
			}
			out = append(out, fmt.Sprintf("%s (Call-ID %s, from %s): %s", what, s.CallID, s.Source, p))
		}
	}
	return out
}

// ClearLog forgets what was received so far.
func (c *Core) ClearLog() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seen = nil
}

func (c *Core) record(in *incoming, problems ...string) {
	s := &Seen{At: time.Now(), Transport: in.tr, Source: in.from, Problems: problems, msg: nil}
	if m := in.msg; m != nil && len(m.Headers) > 0 {
		s.msg = m.Clone()
		s.Method, s.Status, s.RequestURI = m.CSeqMethod(), m.Status, m.URI
		s.CallID, s.Body = m.Get("Call-ID"), string(m.Body)
		s.CSeq, _, _ = m.CSeq()
		if auth := m.Get("Authorization"); auth != "" {
			if _, p, err := sipwire.ParseAuth(auth); err == nil {
				s.IMPI, s.IntegrityProtected = p.Get("username"), p.Get("integrity-protected")
			}
		}
		for _, e := range m.List("P-Asserted-Identity") {
			if a, err := sipwire.ParseAddr(e); err == nil {
				s.AssertedIdentity = append(s.AssertedIdentity, a.URI)
			}
		}
	}
	in.seen = s
	c.mu.Lock()
	c.seen = append(c.seen, s)
	if len(c.seen) > 2*c.cfg.LogSize {
		c.seen = slices.Clone(c.seen[len(c.seen)-c.cfg.LogSize:])
	}
	c.mu.Unlock()
	if c.cfg.Watch != nil {
		c.cfg.Watch(*s)
	}
	for _, p := range problems {
		c.log.Warn("problem", "method", s.Method, "status", s.Status, "call_id", s.CallID, "cause", p)
	}
}

// problem adds a finding to a recorded message.
func (c *Core) problem(s *Seen, text string) {
	c.mu.Lock()
	s.Problems = append(s.Problems, text)
	c.mu.Unlock()
	c.log.Warn("problem", "method", s.Method, "status", s.Status, "call_id", s.CallID, "cause", text)
}

func equalFold(a, b string) bool { return strings.EqualFold(a, b) }
