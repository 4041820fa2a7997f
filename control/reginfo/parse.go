package reginfo

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode"
)

// Specification constants.
const (
	// MediaType is the type of a reginfo document (RFC 3680 §5.5).
	MediaType = "application/reginfo+xml"

	namespace     = "urn:ietf:params:xml:ns:reginfo"  // RFC 3680 §5.2
	gruuNamespace = "urn:ietf:params:xml:ns:gruuinfo" // RFC 5628 §5
)

// Bounds of a document. The implicit registration set of a subscriber has a handful of identities, each with one contact
// per device; the bounds leave two orders of magnitude.
const (
	MaxBytes         = 256 << 10
	MaxDepth         = 16
	MaxRegistrations = 256
	MaxContacts      = 1024 // of all registrations of a document
	MaxParams        = 64   // unknown-param elements of a contact
)

// Errors of Parse.
var (
	ErrTooLarge = errors.New("reginfo document is too large")
	ErrLimit    = errors.New("reginfo document has too many parts")
	ErrSyntax   = errors.New("malformed reginfo document")
)

// Parse reads a document. Errors are ErrTooLarge, ErrLimit or ErrSyntax, each with what was wrong.
func Parse(b []byte) (*Document, error) {
	if len(b) > MaxBytes {
		return nil, fmt.Errorf("%w: %d octets", ErrTooLarge, len(b))
	}
	d := xml.NewDecoder(bytes.NewReader(bytes.TrimPrefix(b, []byte("\xef\xbb\xbf"))))
	d.CharsetReader = charset
	p := parser{}
	for {
		t, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrSyntax, err)
		}
		switch t := t.(type) {
		case xml.StartElement:
			err = p.start(t)
		case xml.EndElement:
			p.end()
		case xml.CharData:
			err = p.chars(t)
		case xml.Directive:
			// A document type declaration has no use but to define entities.
			err = fmt.Errorf("%w: document type declaration", ErrSyntax)
		}
		if err != nil {
			return nil, err
		}
	}
	if p.doc == nil {
		return nil, fmt.Errorf("%w: no reginfo element", ErrSyntax)
	}
	return p.doc, nil
}

// level is where in the structure of RFC 3680 §5.3 the parser stands.
type level uint8

const (
	levelNone level = iota
	levelRoot
	levelRegistration
	levelContact
	levelText // in an element whose text is wanted
)

type parser struct {
	doc      *Document
	level    level
	skip     int    // depth within an element that is not ours
	depth    int    // of all elements
	space    string // namespace of the root
	contacts int
	reg      *Registration
	contact  *Contact
	text     strings.Builder
	into     *string // where the text goes
}

func (p *parser) start(e xml.StartElement) error {
	if p.depth++; p.depth > MaxDepth {
		return fmt.Errorf("%w: elements nested deeper than %d", ErrLimit, MaxDepth)
	}
	if p.skip > 0 {
		p.skip++
		return nil
	}
	local := ""
	if p.level == levelNone || e.Name.Space == p.space {
		local = e.Name.Local
	}
	switch {
	case p.level == levelNone:
		return p.root(e)
	case p.level == levelRoot && local == "registration":
		return p.registration(e)
	case p.level == levelRegistration && local == "contact":
		return p.contactElement(e)
	case p.level == levelContact && e.Name.Space == gruuNamespace:
		if err := p.gruu(e); err != nil {
			return err
		}
		p.skip = 1
	case p.level == levelContact && local == "uri":
		p.capture(&p.contact.URI)
	case p.level == levelContact && local == "display-name":
		p.capture(&p.contact.DisplayName)
	case p.level == levelContact && local == "unknown-param":
		a, err := attributes(e)
		if err != nil {
			return err
		}
		if len(p.contact.UnknownParams) == MaxParams {
			return fmt.Errorf("%w: more than %d parameters in a contact", ErrLimit, MaxParams)
		}
		p.contact.UnknownParams = append(p.contact.UnknownParams, Param{Name: a["name"]})
		p.capture(&p.contact.UnknownParams[len(p.contact.UnknownParams)-1].Value)
	default:
		p.skip = 1
	}
	return nil
}

func (p *parser) capture(into *string) {
	p.text.Reset()
	p.into, p.level = into, levelText
}

func (p *parser) end() {
	p.depth--
	if p.skip > 0 {
		p.skip--
		return
	}
	switch p.level {
	case levelText:
		*p.into = line(p.text.String())
		p.level = levelContact
	case levelContact:
		if p.contact.ID == "" {
			p.contact.ID = p.contact.URI
		}
		p.level = levelRegistration
	case levelRegistration:
		p.level = levelRoot
	case levelRoot, levelNone:
		p.level = levelNone
	}
}

func (p *parser) chars(text []byte) error {
	switch {
	case p.skip > 0:
	case p.level == levelText:
		p.text.Write(text)
	case p.level == levelNone && len(bytes.TrimSpace(text)) > 0:
		return fmt.Errorf("%w: text outside of the reginfo element", ErrSyntax)
	}
	return nil
}

func (p *parser) root(e xml.StartElement) error {
	if p.doc != nil {
		return fmt.Errorf("%w: more than one root element", ErrSyntax)
	}
	// Without any namespace it cannot be meant otherwise.
	if e.Name.Local != "reginfo" || e.Name.Space != namespace && e.Name.Space != "" {
		return fmt.Errorf("%w: root element is %s", ErrSyntax, quote(e.Name.Local))
	}
	p.space = e.Name.Space
	a, err := attributes(e)
	if err != nil {
		return err
	}
	doc := &Document{State: Completeness(token(completenessNames[:], a["state"]))}
	if doc.State == 0 {
		return fmt.Errorf("%w: document state is %s", ErrSyntax, quote(a["state"]))
	}
	if v, ok := a["version"]; ok {
		n, err := strconv.ParseUint(v, 10, 32)
		if err != nil {
			return fmt.Errorf("%w: version is %s", ErrSyntax, quote(v))
		}
		doc.Version, doc.Versioned = uint32(n), true
	}
	p.doc, p.level = doc, levelRoot
	return nil
}

func (p *parser) registration(e xml.StartElement) error {
	a, err := attributes(e)
	if err != nil {
		return err
	}
	if len(p.doc.Registrations) == MaxRegistrations {
		return fmt.Errorf("%w: more than %d registrations", ErrLimit, MaxRegistrations)
	}
	r := Registration{AOR: a["aor"], ID: a["id"], State: State(token(stateNames[:], a["state"]))}
	if r.AOR == "" {
		return fmt.Errorf("%w: registration without aor", ErrSyntax)
	}
	if r.State == 0 {
		return fmt.Errorf("%w: registration state is %s", ErrSyntax, quote(a["state"]))
	}
	if r.ID == "" {
		r.ID = r.AOR
	}
	p.doc.Registrations = append(p.doc.Registrations, r)
	p.reg = &p.doc.Registrations[len(p.doc.Registrations)-1]
	p.level = levelRegistration
	return nil
}

func (p *parser) contactElement(e xml.StartElement) error {
	a, err := attributes(e)
	if err != nil {
		return err
	}
	if p.contacts++; p.contacts > MaxContacts {
		return fmt.Errorf("%w: more than %d contacts", ErrLimit, MaxContacts)
	}
	c := Contact{
		ID: a["id"], State: State(token(stateNames[:], a["state"])), Event: Event(token(eventNames[:], a["event"])),
		Q: a["q"], CallID: a["callid"],
	}
	if c.State != Active && c.State != Terminated {
		return fmt.Errorf("%w: contact state is %s", ErrSyntax, quote(a["state"]))
	}
	for _, n := range []struct {
		name string
		into *Number
	}{
		{"duration-registered", &c.DurationRegistered},
		{"expires", &c.Expires},
		{"retry-after", &c.RetryAfter},
		{"cseq", &c.CSeq},
	} {
		if *n.into, err = number(a, n.name); err != nil {
			return err
		}
	}
	p.reg.Contacts = append(p.reg.Contacts, c)
	p.contact = &p.reg.Contacts[len(p.reg.Contacts)-1]
	p.level = levelContact
	return nil
}

// gruu reads the elements of RFC 5628 §5.
func (p *parser) gruu(e xml.StartElement) error {
	a, err := attributes(e)
	if err != nil {
		return err
	}
	switch e.Name.Local {
	case "pub-gruu":
		p.contact.PubGRUU = a["uri"]
	case "temp-gruu":
		p.contact.TempGRUU = a["uri"]
		p.contact.FirstCSeq, err = number(a, "first-cseq")
	}
	return err
}

// attributes returns the attributes without a namespace, which are those of the element's own vocabulary. The decoder
// lets repeated ones pass; two readers would see different documents.
func attributes(e xml.StartElement) (map[string]string, error) {
	a := make(map[string]string, len(e.Attr))
	for _, x := range e.Attr {
		if x.Name.Space != "" || x.Name.Local == "xmlns" {
			continue
		}
		if _, ok := a[x.Name.Local]; ok {
			return nil, fmt.Errorf("%w: attribute %s is repeated", ErrSyntax, quote(x.Name.Local))
		}
		a[x.Name.Local] = line(x.Value)
	}
	return a, nil
}

// number reads an optional number. Registrars are known to write what is left of an expiry that has passed as a negative
// number; that is none left.
func number(a map[string]string, name string) (Number, error) {
	text, ok := a[name]
	if !ok {
		return Number{}, nil
	}
	digits, negative := strings.CutPrefix(text, "-")
	n, err := strconv.ParseUint(digits, 10, 32)
	if err != nil && !errors.Is(err, strconv.ErrRange) { // on overflow n is the largest number
		return Number{}, fmt.Errorf("%w: %s is %s", ErrSyntax, name, quote(text))
	}
	if negative {
		n = 0
	}
	return Number{Value: uint32(n), Set: true}, nil
}

// line trims a text and makes it one line without control characters.
func line(s string) string {
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, s))
}

// quote quotes a part of a document for an error text.
func quote(s string) string {
	const most = 32
	if len(s) > most {
		s = s[:most] + "..."
	}
	return strconv.QuoteToASCII(s)
}

// charset decodes the two encodings besides UTF-8 that need no table.
func charset(label string, r io.Reader) (io.Reader, error) {
	switch strings.ToLower(label) {
	case "us-ascii", "ascii":
		return r, nil // the decoder checks that it is UTF-8
	case "iso-8859-1", "latin1":
		b, err := io.ReadAll(io.LimitReader(r, MaxBytes))
		if err != nil {
			return nil, err
		}
		runes := make([]rune, len(b))
		for i, c := range b {
			runes[i] = rune(c)
		}
		return strings.NewReader(string(runes)), nil
	}
	return nil, fmt.Errorf("encoding %s", quote(label))
}
