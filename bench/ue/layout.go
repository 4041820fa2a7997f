package ue

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gmgate/gmgate/bench/internal/sipwire"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/secagree"
)

// Layout is how a make of phone writes its REGISTER: which headers, in which order, with which parameters. It comes from
// a text in which names in braces stand for what differs from one REGISTER to the next:
//
//	{impi} {impu} {user} {domain} {addr}     identity and address
//	{call-id} {tag} {cseq} {expires}         the registration
//	{contact-port}                           what the phone would put into Contact by itself
//	{spi-c} {spi-s} {port-c} {port-s}        its half of the agreement; {0spi-c} and {0spi-s} have ten digits
//	{spi-c2} {spi-s2} {port-c2} {port-s2}    values of another offer that the phone would not set up
//	{nonce} {response} {digest}              the digest; {digest} is the rest of its parameters, beginning with a comma
//	{security-verify}                        one row for each there is
//
// A line that begins with + is written inside an SA only, one with - in clear only, and one with # is a comment. Via and
// Content-Length are the phone's own affair.
type Layout struct {
	rows   []layoutRow
	offers []ims.Suite
}

type layoutRow struct {
	name, value string
	only        byte // '+', '-' or zero
}

// clearOrProtected are the marks of rows that are not always written.
const clearOrProtected = "+-"

// ParseLayout reads the text of a layout.
func ParseLayout(text string) (*Layout, error) {
	l := &Layout{}
	started := false
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\r\n")
		switch {
		case line == "" || line[0] == '#':
			continue
		case !started:
			if line != "REGISTER sip:{domain} SIP/2.0" {
				return nil, fmt.Errorf("parse layout: request line %q", line)
			}
			started = true
			continue
		}
		var r layoutRow
		if strings.IndexByte(clearOrProtected, line[0]) >= 0 {
			r.only, line = line[0], line[1:]
		}
		var ok bool
		if r.name, r.value, ok = strings.Cut(line, ":"); !ok {
			return nil, fmt.Errorf("parse layout: no colon in %q", line)
		}
		r.value = strings.TrimSpace(r.value)
		l.rows = append(l.rows, r)
	}
	var client []string
	sample := layoutValues{offer: &offer{spiC: 1000, spiS: 1001, portC: 1002, portS: 1003}}
	for _, r := range l.rows {
		v, err := sample.expand(r.value)
		if err != nil {
			return nil, fmt.Errorf("parse layout: %s: %w", r.name, err)
		}
		if strings.EqualFold(r.name, "Security-Client") {
			client = append(client, v)
		}
	}
	list, err := secagree.Parse(client...)
	if err != nil {
		return nil, fmt.Errorf("parse layout: %w", err)
	}
	for i := range list.Mechanisms {
		if m := &list.Mechanisms[i]; m.Usable() && !slices.Contains(l.offers, m.Suite()) {
			l.offers = append(l.offers, m.Suite())
		}
	}
	if len(l.offers) == 0 {
		return nil, errors.New("parse layout: no usable Security-Client")
	}
	return l, nil
}

// Offers returns what the Security-Client of the layout offers, in its order.
func (l *Layout) Offers() []ims.Suite { return slices.Clone(l.offers) }

// Names returns the header names in the order in which a REGISTER in clear has them.
func (l *Layout) Names() []string {
	var out []string
	for _, r := range l.rows {
		if r.only != '+' && r.value != "{security-verify}" {
			out = append(out, r.name)
		}
	}
	return out
}

// layoutValues is what the names in braces stand for in one REGISTER.
type layoutValues struct {
	id                     Identity
	offer                  *offer
	callID, tag, addr      string
	nonce, response, extra string
	cseq                   uint32
	contactPort            uint16
	expires                time.Duration
}

// expand replaces the names in braces.
func (v *layoutValues) expand(s string) (string, error) {
	var b strings.Builder
	for {
		text, rest, ok := strings.Cut(s, "{")
		b.WriteString(text)
		if !ok {
			return b.String(), nil
		}
		name, rest, ok := strings.Cut(rest, "}")
		if !ok {
			return "", errors.New("a brace is not closed")
		}
		value, ok := v.lookup(name)
		if !ok {
			return "", fmt.Errorf("unknown name {%s}", name)
		}
		b.WriteString(value)
		s = rest
	}
}

func (v *layoutValues) lookup(name string) (string, bool) {
	number := func(n uint32) (string, bool) { return strconv.FormatUint(uint64(n), 10), true }
	user, _, _ := strings.Cut(v.id.IMPI, "@")
	o := v.offer
	switch name {
	case "impi":
		return v.id.IMPI, true
	case "impu":
		return v.id.IMPU, true
	case "user":
		return user, true
	case "domain":
		return v.id.Domain, true
	case "addr":
		return v.addr, true
	case "call-id":
		return v.callID, true
	case "tag":
		return v.tag, true
	case "cseq":
		return number(v.cseq)
	case "expires":
		return number(uint32(v.expires / time.Second)) //nolint:gosec // bounded by SIP's own range
	case "contact-port":
		return number(uint32(v.contactPort))
	case "spi-c":
		return number(uint32(o.spiC))
	case "spi-s":
		return number(uint32(o.spiS))
	case "0spi-c":
		return fmt.Sprintf("%010d", uint32(o.spiC)), true
	case "0spi-s":
		return fmt.Sprintf("%010d", uint32(o.spiS)), true
	case "port-c":
		return number(uint32(o.portC))
	case "port-s":
		return number(uint32(o.portS))
	case "spi-c2": // the highest bit turned, and not below 256
		return number(uint32(o.spiC) ^ 1<<31 | 1<<16)
	case "spi-s2":
		return number(uint32(o.spiS) ^ 1<<31 | 1<<16)
	case "port-c2":
		return number(uint32(o.portC ^ 1<<12))
	case "port-s2":
		return number(uint32(o.portS ^ 1<<12))
	case "nonce":
		return v.nonce, true
	case "response":
		return v.response, true
	case "digest":
		return v.extra, true
	case "security-verify":
		return "", true
	}
	return "", false
}

// dress writes a REGISTER in the layout. Everything but Security-Verify has its value in v.
func (l *Layout) dress(v *layoutValues, verify []string, protected bool) *sipwire.Message {
	m := &sipwire.Message{Method: "REGISTER", URI: "sip:" + v.id.Domain}
	for _, r := range l.rows {
		if r.only == '+' && !protected || r.only == '-' && protected {
			continue
		}
		if r.value == "{security-verify}" {
			for _, row := range verify {
				m.Add(r.name, row)
			}
			continue
		}
		value, err := v.expand(r.value)
		if err != nil {
			panic(err) // ParseLayout has tried it
		}
		m.Add(r.name, value)
	}
	return m
}
