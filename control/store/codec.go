package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
)

// Schema is the version of the records that this program writes, and the only one it reads.
const Schema uint8 = 1

// Kind is a kind of record.
type Kind uint8

// Kinds.
const (
	KindSet Kind = iota + 1
	KindRegistration
	KindFreed
	KindMark
	KindMeta
	KindCheck
)

var kindNames = [...]string{
	KindSet: "set", KindRegistration: "registration", KindFreed: "freed context", KindMark: "mark", KindMeta: "meta",
	KindCheck: "key check",
}

// String names the kind in errors.
func (k Kind) String() string {
	if k == 0 || int(k) >= len(kindNames) {
		return fmt.Sprintf("Kind(%#x)", uint8(k))
	}
	return kindNames[k]
}

// Codec turns records into keys and sealed values and back. Both are for implementations of Store: a key orders as its
// record does, a value says its schema version in clear and everything else sealed. Safe for concurrent use.
type Codec struct{ seal *sealer }

// NewCodec returns a codec that seals under key, of which it keeps a copy until Close.
func NewCodec(key ims.Key) (*Codec, error) {
	s, err := newSealer(key)
	if err != nil {
		return nil, err
	}
	return &Codec{s}, nil
}

// Close zeroes the key. Sealing and opening fail with ErrClosed from then on.
func (c *Codec) Close() { c.seal.close() }

// SetKey returns the key of a set's record, and of its marks'.
func SetKey(id uint64) []byte { return binary.BigEndian.AppendUint64(nil, id) }

// ParseSetKey reads the key of a set's record.
func ParseSetKey(key []byte) (uint64, error) {
	if len(key) != 8 {
		return 0, fmt.Errorf("key of a set has %d octets instead of 8", len(key))
	}
	return binary.BigEndian.Uint64(key), nil
}

// ContextKey returns the key of a registration's record, and of the record of a freed context.
func ContextKey(c Context) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(nil, c.Worker), c.Index)
}

// ParseContextKey reads the key of a registration's record.
func ParseContextKey(key []byte) (Context, error) {
	if len(key) != 6 {
		return Context{}, fmt.Errorf("key of a registration has %d octets instead of 6", len(key))
	}
	return Context{binary.BigEndian.Uint16(key), binary.BigEndian.Uint32(key[2:])}, nil
}

// headSize is what stands before the cipher text: the schema version and the nonce.
const headSize = 1 + nonceSize

// begin returns an array with room for a whole value, so that the clear text is never copied, at the start of the text.
func begin(size int) *body { return &body{b: make([]byte, headSize, headSize+size+tagSize)} }

func (c *Codec) finish(k Kind, key []byte, w *body) ([]byte, error) {
	w.b[0] = Schema
	value, err := c.seal.seal(w.b, headSize, associated(k, key))
	if err != nil {
		clear(w.b)
		return nil, fmt.Errorf("seal %s: %w", k, err)
	}
	return value, nil
}

func (c *Codec) open(k Kind, key, value []byte) ([]byte, error) {
	if len(value) == 0 {
		return nil, fmt.Errorf("open %s: the value is empty", k)
	}
	if value[0] != Schema {
		return nil, fmt.Errorf("open %s: %w %d; this program knows version %d", k, ErrVersion, value[0], Schema)
	}
	text, err := c.seal.open(value[1:], associated(k, key))
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", k, err)
	}
	return text, nil
}

// associated is what a value is bound to: an attacker who can write the disk cannot pass one record off as another.
func associated(k Kind, key []byte) []byte {
	return append(append([]byte("gmgate store "), Schema, byte(k)), key...)
}

// EncodeSet returns the value of a set's record.
func (c *Codec) EncodeSet(s *Set) ([]byte, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	w := begin(setFixed + len(s.IMPI) + len(s.ServerText) + len(s.ClientText) + len(s.CallID) + len(s.IMPU))
	w.set(s)
	return c.finish(KindSet, SetKey(s.ID), w)
}

// DecodeSet reads a set's record.
func (c *Codec) DecodeSet(key, value []byte) (Set, error) {
	id, err := ParseSetKey(key)
	if err != nil {
		return Set{}, err
	}
	text, err := c.open(KindSet, key, value)
	if err != nil {
		return Set{}, err
	}
	defer clear(text) // the keys in the set are copies
	return decodeSet(id, text)
}

// EncodeRegistration returns the value of a registration's record.
func (c *Codec) EncodeRegistration(r *Registration) ([]byte, error) {
	if err := r.Validate(); err != nil {
		return nil, err
	}
	size := registrationFixed + len(r.IMPI) + len(r.Contact) + listSize(r.ServiceRoute) + formerSize*len(r.Former)
	for _, b := range r.Bindings {
		size += 2*binary.MaxVarintLen32 + len(b.IMPU) + listSize(b.Associated)
	}
	w := begin(size)
	w.registration(r)
	return c.finish(KindRegistration, ContextKey(r.Context), w)
}

// listSize is the most that the elements of a list take.
func listSize(l []string) (n int) {
	for _, s := range l {
		n += binary.MaxVarintLen32 + len(s)
	}
	return n
}

// DecodeRegistration reads a registration's record.
func (c *Codec) DecodeRegistration(key, value []byte) (Registration, error) {
	at, err := ParseContextKey(key)
	if err != nil {
		return Registration{}, err
	}
	text, err := c.open(KindRegistration, key, value)
	if err != nil {
		return Registration{}, err
	}
	return decodeRegistration(at, text)
}

// EncodeFreed returns the value of the record of a freed context.
func (c *Codec) EncodeFreed(f Freed) ([]byte, error) {
	if err := f.Validate(); err != nil {
		return nil, err
	}
	w := begin(2)
	w.b = binary.BigEndian.AppendUint16(w.b, f.Gen)
	return c.finish(KindFreed, ContextKey(f.Context), w)
}

// DecodeFreed reads the record of a freed context.
func (c *Codec) DecodeFreed(key, value []byte) (Freed, error) {
	at, err := ParseContextKey(key)
	if err != nil {
		return Freed{}, err
	}
	text, err := c.open(KindFreed, key, value)
	if err != nil {
		return Freed{}, err
	}
	r := reader{b: text}
	f := Freed{at, r.uint16()}
	if err := r.end(); err != nil {
		return Freed{}, fmt.Errorf("decode freed context: %w", err)
	}
	return f, f.Validate()
}

// EncodeMark returns the value of the record of a set's marks.
func (c *Codec) EncodeMark(m Mark) ([]byte, error) {
	if err := m.Validate(); err != nil {
		return nil, err
	}
	w := begin(4 * len(m.Counters))
	for _, n := range m.Counters {
		w.b = binary.BigEndian.AppendUint32(w.b, n)
	}
	return c.finish(KindMark, SetKey(m.Set), w)
}

// DecodeMark reads the record of a set's marks.
func (c *Codec) DecodeMark(key, value []byte) (Mark, error) {
	id, err := ParseSetKey(key)
	if err != nil {
		return Mark{}, err
	}
	text, err := c.open(KindMark, key, value)
	if err != nil {
		return Mark{}, err
	}
	r := reader{b: text}
	m := Mark{Set: id}
	for i := range m.Counters {
		m.Counters[i] = r.uint32()
	}
	if err := r.end(); err != nil {
		return Mark{}, fmt.Errorf("decode mark: %w", err)
	}
	return m, m.Validate()
}

// EncodeMeta returns the value of the meta record, which has no key.
func (c *Codec) EncodeMeta(m *Meta) ([]byte, error) {
	if err := m.Validate(); err != nil {
		return nil, err
	}
	w := begin(metaFixed + len(m.TokenKey) + len(m.Instance))
	w.meta(m)
	return c.finish(KindMeta, nil, w)
}

// DecodeMeta reads the meta record.
func (c *Codec) DecodeMeta(value []byte) (Meta, error) {
	text, err := c.open(KindMeta, nil, value)
	if err != nil {
		return Meta{}, err
	}
	defer clear(text)
	return decodeMeta(text)
}

// EncodeCheck returns a value which only the same key opens, so that a store can tell a wrong key from damage.
func (c *Codec) EncodeCheck() ([]byte, error) { return c.finish(KindCheck, nil, begin(0)) }

// Check reports ErrKey when value was not made by EncodeCheck under the same key.
func (c *Codec) Check(value []byte) error {
	text, err := c.open(KindCheck, nil, value)
	switch {
	case errors.Is(err, errSeal):
		return ErrKey
	case err != nil:
		return err
	case len(text) != 0:
		return fmt.Errorf("open %s: %d octets left over", KindCheck, len(text))
	}
	return nil
}

// Upper bounds of what a record takes beside its texts.
const (
	setFixed          = 320
	registrationFixed = 96
	formerSize        = binary.MaxVarintLen16 + binary.MaxVarintLen32 + 2 // of each
	metaFixed         = 16
)

// Bits of the flags of a set.
const (
	flagOverTCP = 1 << iota
	flagUsed
	flagRemoving
	flagEmergency
	flagClear
	flagsEnd
)

// Bits of the flags of a registration.
const (
	registrationEmergency = 1 << iota
	registrationFormer    // a list of former names follows
	registrationFlagsEnd
)

// body writes the clear text of a record: fixed fields big-endian, numbers that tend to be small as varints, texts and
// lists with their length before them.
type body struct{ b []byte }

func (w *body) uvarint(v uint64) { w.b = binary.AppendUvarint(w.b, v) }

func (w *body) text(s string) {
	w.uvarint(uint64(len(s)))
	w.b = append(w.b, s...)
}

func (w *body) key(k ims.Key) {
	w.b = append(w.b, byte(len(k)))
	w.b = append(w.b, k...)
}

func (w *body) list(l []string) {
	w.uvarint(uint64(len(l)))
	for _, s := range l {
		w.text(s)
	}
}

func (w *body) addr(a netip.Addr) {
	b := a.AsSlice()
	w.b = append(w.b, byte(len(b)))
	w.b = append(w.b, b...)
}

// time writes milliseconds since 1970; zero is the zero time.
func (w *body) time(t time.Time) {
	if t.IsZero() {
		w.uvarint(0)
		return
	}
	w.uvarint(uint64(t.UnixMilli()))
}

func (w *body) flags(bits ...bool) {
	var f byte
	for i, b := range bits {
		if b {
			f |= 1 << i
		}
	}
	w.b = append(w.b, f)
}

func (w *body) set(s *Set) {
	w.uvarint(uint64(s.Worker))
	w.uvarint(uint64(s.UE))
	w.uvarint(uint64(s.Label))
	w.b = append(w.b, s.Serial)
	w.text(s.IMPI)
	w.addr(s.Addr)
	w.addr(s.Local)
	for _, p := range [...]uint16{s.Ports.UC, s.Ports.US, s.Ports.PC, s.Ports.PS} {
		w.b = binary.BigEndian.AppendUint16(w.b, p)
	}
	for _, i := range [...]ims.SPI{s.SPIs.UC, s.SPIs.US, s.SPIs.PC, s.SPIs.PS} {
		w.b = binary.BigEndian.AppendUint32(w.b, uint32(i))
	}
	w.b = append(w.b, byte(s.Keys.Suite.Alg), byte(s.Keys.Suite.Enc))
	w.key(s.Keys.Enc)
	w.key(s.Keys.Auth)
	w.b = append(w.b, s.Keys.Salt[:]...)
	w.b = append(w.b, byte(s.Phase))
	w.time(s.Deadline)
	w.time(s.Hard)
	for _, n := range s.Counters {
		w.uvarint(uint64(n))
	}
	w.text(s.ServerText)
	w.text(s.ClientText)
	w.text(s.CallID)
	w.text(s.IMPU)
	w.uvarint(s.Over)
	w.flags(s.OverTCP, s.Used, s.Removing, s.Emergency, s.Clear)
}

func (w *body) registration(r *Registration) {
	w.b = binary.BigEndian.AppendUint16(w.b, r.Gen)
	w.text(r.IMPI)
	w.addr(r.Addr)
	w.addr(r.Local)
	w.b = append(w.b, byte(r.State))
	w.uvarint(r.Current)
	w.uvarint(uint64(len(r.Bindings)))
	for _, b := range r.Bindings {
		w.text(b.IMPU)
		w.list(b.Associated)
	}
	w.list(r.ServiceRoute)
	w.text(r.Contact)
	w.time(r.Expires)
	w.time(r.Ended)
	w.flags(r.Emergency, len(r.Former) > 0)
	if len(r.Former) == 0 {
		return
	}
	w.uvarint(uint64(len(r.Former)))
	for _, f := range r.Former {
		w.uvarint(uint64(f.Worker))
		w.uvarint(uint64(f.Index))
		w.b = binary.BigEndian.AppendUint16(w.b, f.Gen)
	}
}

func (w *body) meta(m *Meta) {
	w.key(m.TokenKey)
	w.uvarint(uint64(m.TokenEpoch))
	w.text(m.Instance)
	w.uvarint(uint64(m.Workers))
	w.flags(m.Clean)
}

// Errors of reading. They name no contents, which may be secret.
var (
	errShort     = errors.New("ends too early")
	errLong      = errors.New("octets left over")
	errBound     = errors.New("a length or number is out of bounds")
	errCanonical = errors.New("a number is not in its shortest form")
)

// reader reads what body writes. After the first error everything reads as zero.
type reader struct {
	b   []byte
	err error
}

func (r *reader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
	r.b = nil
}

func (r *reader) take(n int) []byte {
	if n > len(r.b) {
		r.fail(errShort)
		return nil
	}
	b := r.b[:n]
	r.b = r.b[n:]
	return b
}

func (r *reader) uint8() uint8 {
	if b := r.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) uint16() uint16 {
	if b := r.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (r *reader) uint32() uint32 {
	if b := r.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (r *reader) uvarint(limit uint64) uint64 {
	v, n := binary.Uvarint(r.b)
	switch {
	case r.err != nil:
		return 0
	case n == 0:
		r.fail(errShort)
		return 0
	case n < 0 || v > limit:
		r.fail(errBound)
		return 0
	case n > 1 && r.b[n-1] == 0:
		r.fail(errCanonical)
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) text() string { return string(r.take(int(r.uvarint(MaxText)))) }

func (r *reader) key() ims.Key {
	n := int(r.uint8())
	if n > MaxKey {
		r.fail(errBound)
		return nil
	}
	return ims.Key(r.take(n)).Clone()
}

// count reads how many elements a list has, of which each takes least octets at least.
func (r *reader) count(least int) int {
	n := int(r.uvarint(MaxList))
	if n > len(r.b)/least {
		r.fail(errShort)
	}
	if r.err != nil {
		return 0
	}
	return n
}

func (r *reader) list() []string {
	n := r.count(1)
	if n == 0 {
		return nil
	}
	l := make([]string, n)
	for i := range l {
		l[i] = r.text()
	}
	return l
}

func (r *reader) bindings() []Binding {
	n := r.count(2)
	if n == 0 {
		return nil
	}
	l := make([]Binding, n)
	for i := range l {
		l[i] = Binding{IMPU: r.text(), Associated: r.list()}
	}
	return l
}

// former reads a list that is not empty.
func (r *reader) former() []Freed {
	n := r.count(4)
	if n == 0 {
		r.fail(errCanonical)
		return nil
	}
	l := make([]Freed, n)
	for i := range l {
		l[i] = Freed{Context{uint16(r.uvarint(1<<16 - 1)), uint32(r.uvarint(1<<32 - 1))}, r.uint16()}
	}
	return l
}

func (r *reader) addr() netip.Addr {
	n := r.uint8()
	if n != 4 && n != 16 {
		r.fail(errBound)
		return netip.Addr{}
	}
	a, _ := netip.AddrFromSlice(r.take(int(n)))
	return a
}

func (r *reader) time() time.Time {
	ms := r.uvarint(maxMilli)
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(int64(ms)).UTC()
}

func (r *reader) flags(end uint8) uint8 {
	f := r.uint8()
	if f >= end {
		r.fail(errBound)
		return 0
	}
	return f
}

func (r *reader) end() error {
	if r.err == nil && len(r.b) > 0 {
		r.err = errLong
	}
	return r.err
}

func decodeSet(id uint64, text []byte) (Set, error) {
	r := reader{b: text}
	s := Set{
		ID: id, Worker: uint16(r.uvarint(1<<16 - 1)), UE: uint32(r.uvarint(1<<32 - 1)), Label: uint32(r.uvarint(1<<32 - 1)),
		Serial: r.uint8(), IMPI: r.text(), Addr: r.addr(), Local: r.addr(),
		Ports: ims.Ports{UC: r.uint16(), US: r.uint16(), PC: r.uint16(), PS: r.uint16()},
		SPIs: ims.SPIs{
			UC: ims.SPI(r.uint32()), US: ims.SPI(r.uint32()), PC: ims.SPI(r.uint32()), PS: ims.SPI(r.uint32()),
		},
		Keys: ims.ESPKeys{Suite: ims.Suite{Alg: ims.Alg(r.uint8()), Enc: ims.EncAlg(r.uint8())}, Enc: r.key(), Auth: r.key()},
	}
	copy(s.Keys.Salt[:], r.take(len(s.Keys.Salt)))
	s.Phase = sa.Phase(r.uint8())
	s.Deadline, s.Hard = r.time(), r.time()
	for i := range s.Counters {
		s.Counters[i] = uint32(r.uvarint(1<<32 - 1))
	}
	s.ServerText, s.ClientText, s.CallID, s.IMPU = r.text(), r.text(), r.text(), r.text()
	s.Over = r.uvarint(1<<64 - 1)
	f := r.flags(flagsEnd)
	s.OverTCP, s.Used, s.Removing = f&flagOverTCP != 0, f&flagUsed != 0, f&flagRemoving != 0
	s.Emergency, s.Clear = f&flagEmergency != 0, f&flagClear != 0
	err := r.end()
	if err == nil {
		err = s.Validate()
	}
	if err != nil {
		s.Keys.Zero()
		return Set{}, fmt.Errorf("decode set: %w", err)
	}
	return s, nil
}

func decodeRegistration(at Context, text []byte) (Registration, error) {
	r := reader{b: text}
	g := Registration{
		Context: at, Gen: r.uint16(), IMPI: r.text(), Addr: r.addr(), Local: r.addr(), State: State(r.uint8()),
		Current: r.uvarint(1<<64 - 1), Bindings: r.bindings(), ServiceRoute: r.list(), Contact: r.text(), Expires: r.time(),
		Ended: r.time(),
	}
	f := r.flags(registrationFlagsEnd)
	g.Emergency = f&registrationEmergency != 0
	if f&registrationFormer != 0 {
		g.Former = r.former()
	}
	err := r.end()
	if err == nil {
		err = g.Validate()
	}
	if err != nil {
		return Registration{}, fmt.Errorf("decode registration: %w", err)
	}
	return g, nil
}

func decodeMeta(text []byte) (Meta, error) {
	r := reader{b: text}
	m := Meta{
		Schema: Schema, TokenKey: r.key(), TokenEpoch: uint32(r.uvarint(1<<32 - 1)), Instance: r.text(),
		Workers: uint16(r.uvarint(1<<16 - 1)), Clean: r.flags(2) != 0,
	}
	if err := r.end(); err != nil {
		m.TokenKey.Zero()
		return Meta{}, fmt.Errorf("decode meta: %w", err)
	}
	return m, nil
}
