package store

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
)

var secret = ims.Key(strings.Repeat("K", KeySize))

func newCodec(t testing.TB) *Codec {
	t.Helper()
	c, err := NewCodec(secret)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// fullSet has no field at its zero value but Clear, which goes with no keys.
func fullSet() Set {
	return Set{
		ID: 0x0001_0000_0000_0002, Worker: 1, UE: 70000, Label: 1<<24 | 70000, Serial: 3,
		IMPI: "001010000000001@ims.example", Addr: netip.MustParseAddr("2001:db8::9"), Local: netip.MustParseAddr("10.0.0.5"),
		Ports: ims.Ports{UC: 1, US: 2, PC: 3, PS: 4}, SPIs: ims.SPIs{UC: 256, US: 257, PC: 1 << 28, PS: 1<<32 - 1},
		Keys: ims.ESPKeys{
			Suite: ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC},
			Enc:   ims.Key("confidentiality!"), Auth: ims.Key("integrity-integrity!"), Salt: [4]byte{1, 2, 3, 4},
		},
		Phase: sa.Established, Deadline: time.UnixMilli(1788264000123).UTC(), Hard: time.UnixMilli(1788264060123).UTC(),
		Counters: sa.Counters{8, 301, 7, 300}, ServerText: "ipsec-3gpp;q=0.9", ClientText: "ipsec-3gpp;alg=null\nipsec-3gpp;alg=aes-gmac",
		CallID: "call@ue", IMPU: "sip:a@ims.example", Over: 1, OverTCP: true, Used: true, Removing: true,
		Emergency: true,
	}
}

// clearSet is an association without SAs.
func clearSet() Set {
	s := fullSet()
	s.Clear, s.Keys, s.SPIs, s.Counters = true, ims.ESPKeys{}, ims.SPIs{}, sa.Counters{}
	return s
}

func fullRegistration() Registration {
	return Registration{
		Context: Context{Worker: 1, Index: 70000}, Gen: 4, IMPI: "001010000000001@ims.example",
		Addr: netip.MustParseAddr("10.45.0.9"), Local: netip.MustParseAddr("10.0.0.5"), State: Registered, Current: 9,
		Bindings: []Binding{
			{IMPU: "sip:a@ims.example", Associated: []string{"sip:a@ims.example", "", "tel:+49301"}}, {IMPU: "sip:b@ims.example"},
		},
		ServiceRoute: []string{"sip:orig@scscf;lr"}, Contact: "sip:10.45.0.9:31001",
		Expires: time.UnixMilli(1788264000001).UTC(), Ended: time.UnixMilli(1788263000001).UTC(), Emergency: true,
		Former: []Freed{{Context{3, 300}, 7}, {Context{200, 1}, 65535}},
	}
}

func fullMeta() Meta {
	return Meta{Schema: Schema, TokenKey: ims.Key("0123456789abcdef"), TokenEpoch: 5, Instance: "edge1", Workers: 300, Clean: true}
}

// noZero reports fields at their zero value: a sample without such fields shows that the codec knows them all.
func noZero(t *testing.T, name string, v reflect.Value) {
	t.Helper()
	if v.IsZero() {
		t.Errorf("%s is zero in the sample", name)
	}
	if v.Kind() == reflect.Struct && v.Type().PkgPath() != "time" && v.Type().PkgPath() != "net/netip" {
		for i := range v.NumField() {
			noZero(t, name+"."+v.Type().Field(i).Name, v.Field(i))
		}
	}
}

// Peers: B2.18b
func TestCodecKeepsEveryField(t *testing.T) {
	c := newCodec(t)
	s, r, m := fullSet(), fullRegistration(), fullMeta()
	all := s
	all.Clear = true
	noZero(t, "Set", reflect.ValueOf(all))
	noZero(t, "Registration", reflect.ValueOf(r))
	noZero(t, "Meta", reflect.ValueOf(m))
	for _, s := range []Set{s, clearSet()} {
		v, err := c.EncodeSet(&s)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := c.DecodeSet(SetKey(s.ID), v); err != nil || !reflect.DeepEqual(got, s) {
			t.Errorf("got %+v, %v; want %+v", got, err, s)
		}
	}
	v, err := c.EncodeRegistration(&r)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := c.DecodeRegistration(ContextKey(r.Context), v); err != nil || !reflect.DeepEqual(got, r) {
		t.Errorf("got %+v, %v; want %+v", got, err, r)
	}
	if v, err = c.EncodeMeta(&m); err != nil {
		t.Fatal(err)
	}
	if got, err := c.DecodeMeta(v); err != nil || !reflect.DeepEqual(got, m) {
		t.Errorf("got %+v, %v; want %+v", got, err, m)
	}
	k := Mark{Set: 9, Counters: sa.Counters{2, 3, 1, math.MaxUint32}}
	if v, err = c.EncodeMark(k); err != nil {
		t.Fatal(err)
	}
	if got, err := c.DecodeMark(SetKey(9), v); err != nil || got != k {
		t.Errorf("got %+v, %v; want %+v", got, err, k)
	}
	f := Freed{Context: Context{2, 3}, Gen: 4}
	if v, err = c.EncodeFreed(f); err != nil {
		t.Fatal(err)
	}
	if got, err := c.DecodeFreed(ContextKey(f.Context), v); err != nil || got != f {
		t.Errorf("got %+v, %v; want %+v", got, err, f)
	}
}

// The encoding is part of the file format: it may change only together with Schema.
func TestGoldenEncoding(t *testing.T) {
	s, none, r, m := fullSet(), clearSet(), fullRegistration(), fullMeta()
	var ws, wn, wr, wm body
	ws.set(&s)
	wn.set(&none)
	wr.registration(&r)
	wm.meta(&m)
	for _, tt := range []struct {
		name string
		got  []byte
		want string
	}{
		{"set", ws.b, goldenSet},
		{"set without SAs", wn.b, goldenClearSet},
		{"registration", wr.b, goldenRegistration},
		{"meta", wm.b, goldenMeta},
	} {
		if got := hex.EncodeToString(tt.got); got != tt.want {
			t.Errorf("%s of schema %d:\n got %s\nwant %s", tt.name, Schema, got, tt.want)
		}
	}
}

// R: nothing secret and nothing personal in clear, and no value opens anywhere else.
//
// Peers: A1.30c, B1.22
func TestSealing(t *testing.T) {
	c := newCodec(t)
	s := fullSet()
	v, err := c.EncodeSet(&s)
	if err != nil {
		t.Fatal(err)
	}
	for _, leak := range []string{"confidentiality!", "integrity-", "00101", "ims.example", "\x01\x02\x03\x04"} {
		if bytes.Contains(v, []byte(leak)) {
			t.Errorf("%q stands in the value", leak)
		}
	}
	again, err := c.EncodeSet(&s)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(v[:headSize], again[:headSize]) || bytes.Equal(v[headSize:], again[headSize:]) {
		t.Error("two seals of one record are alike")
	}
	if _, err := c.DecodeSet(SetKey(s.ID+1), v); !errors.Is(err, errSeal) {
		t.Errorf("under another id: %v", err)
	}
	mark, err := c.EncodeMark(Mark{Set: s.ID})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.DecodeSet(SetKey(s.ID), mark); !errors.Is(err, errSeal) {
		t.Errorf("a mark as a set: %v", err)
	}
	for i := range v {
		bad := bytes.Clone(v)
		bad[i] ^= 0x40
		if _, err := c.DecodeSet(SetKey(s.ID), bad); err == nil {
			t.Errorf("octet %d changed unnoticed", i)
		} else if i == 0 && !errors.Is(err, ErrVersion) {
			t.Errorf("unknown version: %v", err)
		}
		if _, err := c.DecodeSet(SetKey(s.ID), v[:i]); err == nil {
			t.Errorf("cut to %d octets unnoticed", i)
		}
	}
	other, err := NewCodec(ims.Key(strings.Repeat("L", KeySize)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.DecodeSet(SetKey(s.ID), v); !errors.Is(err, errSeal) {
		t.Errorf("under another key: %v", err)
	}
	check, err := c.EncodeCheck()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Check(check); err != nil {
		t.Errorf("check: %v", err)
	}
	if err := other.Check(check); !errors.Is(err, ErrKey) {
		t.Errorf("check under another key: %v", err)
	}
	if err := c.Check(nil); err == nil || errors.Is(err, ErrKey) {
		t.Errorf("check without a value: %v", err)
	}
}

func TestVersionIsNamed(t *testing.T) {
	_, err := newCodec(t).DecodeSet(SetKey(1), []byte{7, 1, 2, 3})
	if !errors.Is(err, ErrVersion) || err.Error() != "open set: unknown schema version 7; this program knows version 1" {
		t.Errorf("got %v", err)
	}
}

// C2SP XAES-256-GCM, test vectors of its specification.
func TestSealerVectors(t *testing.T) {
	for _, tt := range []struct {
		key      byte
		ad, want string
	}{
		{1, "", "ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271"},
		{3, "c2sp.org/XAES-256-GCM", "986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d"},
	} {
		s, err := newSealer(bytes.Repeat([]byte{tt.key}, KeySize))
		if err != nil {
			t.Fatal(err)
		}
		want, _ := hex.DecodeString(tt.want)
		text, err := s.open(append([]byte("ABCDEFGHIJKLMNOPQRSTUVWX"), want...), []byte(tt.ad))
		if err != nil || string(text) != "XAES-256-GCM" {
			t.Errorf("key %d: got %q, %v", tt.key, text, err)
		}
	}
}

func TestSealerClose(t *testing.T) {
	for _, n := range []int{0, 16, 31, 33} {
		if _, err := NewCodec(make(ims.Key, n)); err == nil {
			t.Errorf("a key of %d octets is taken", n)
		}
	}
	s, err := newSealer(secret)
	if err != nil {
		t.Fatal(err)
	}
	key := s.key
	s.close()
	if !bytes.Equal(key, make([]byte, KeySize)) || s.block != nil || s.k1 != [16]byte{} {
		t.Error("key material is left")
	}
	if secret[0] != 'K' {
		t.Error("the key of the caller was zeroed")
	}
	if _, err := s.open(make([]byte, 64), nil); !errors.Is(err, ErrClosed) {
		t.Errorf("open after close: %v", err)
	}
	c := newCodec(t)
	c.Close()
	c.Close()
	r := fullSet()
	if _, err := c.EncodeSet(&r); !errors.Is(err, ErrClosed) {
		t.Errorf("encode after close: %v", err)
	}
}

// The clear text of a record is never copied to an array that is left behind.
func TestRoomForValues(t *testing.T) {
	s, r, m := fullSet(), fullRegistration(), fullMeta()
	s.ServerText, s.ClientText = strings.Repeat("s", MaxText), strings.Repeat("c", MaxText)
	s.IMPI, s.CallID, s.IMPU = s.ServerText, s.ServerText, s.ServerText
	s.Keys.Enc, s.Keys.Auth = make(ims.Key, MaxKey), make(ims.Key, MaxKey)
	s.Addr, s.Local, s.Over = netip.IPv6Loopback(), netip.IPv6Loopback(), math.MaxUint64
	s.Counters = sa.Counters{math.MaxUint32, math.MaxUint32, math.MaxUint32, math.MaxUint32}
	s.Worker, s.UE, s.Label = math.MaxUint16, math.MaxUint32, math.MaxUint32
	s.Deadline, s.Hard = time.UnixMilli(maxMilli), time.UnixMilli(maxMilli)
	r.IMPI, r.Contact, r.Addr, r.Local, r.Current = s.IMPI, s.IMPI, s.Addr, s.Local, math.MaxUint64
	r.Bindings = []Binding{{s.IMPI, []string{s.IMPI, ""}}, {s.IMPI, nil}}
	r.ServiceRoute, r.Expires, r.Ended = make([]string, MaxList), s.Deadline, s.Deadline
	m.TokenKey, m.TokenEpoch, m.Instance, m.Workers = make(ims.Key, MaxKey), math.MaxUint32, s.IMPI, math.MaxUint16
	c := newCodec(t)
	for name, encode := range map[string]func() ([]byte, error){
		"set":          func() ([]byte, error) { return c.EncodeSet(&s) },
		"registration": func() ([]byte, error) { return c.EncodeRegistration(&r) },
		"meta":         func() ([]byte, error) { return c.EncodeMeta(&m) },
		"mark":         func() ([]byte, error) { return c.EncodeMark(Mark{Set: 1}) },
		"freed":        func() ([]byte, error) { return c.EncodeFreed(Freed{Context: Context{1, 1}}) },
	} {
		v, err := encode()
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		// An array that had to grow would have a capacity that append chose; ours is exact to the bound.
		if cap(v)-len(v) > setFixed+registrationFixed+metaFixed+2*MaxList*5 {
			t.Errorf("%s: %d octets of %d used: the array grew", name, len(v), cap(v))
		}
	}
	size := func(w body) int { return len(w.b) }
	var ws, wr, wm body
	ws.set(&s)
	wr.registration(&r)
	wm.meta(&m)
	if n := size(ws) - 5*MaxText; n > setFixed {
		t.Errorf("set takes %d octets beside its texts", n)
	}
	if n := size(wr) - 5*MaxText - (2*len(r.Bindings)+2+len(r.ServiceRoute))*5; n > registrationFixed {
		t.Errorf("registration takes %d octets beside its texts", n)
	}
	if n := size(wm) - MaxText - MaxKey; n > metaFixed {
		t.Errorf("meta takes %d octets beside its texts", n)
	}
}

func TestStrictDecoding(t *testing.T) {
	s := fullSet()
	var w body
	w.set(&s)
	good := w.b
	for i := range good {
		if _, err := decodeSet(1, good[:i]); err == nil {
			t.Errorf("cut to %d octets unnoticed", i)
		}
	}
	edit := func(f func(b []byte) []byte) []byte { return f(bytes.Clone(good)) }
	for name, tt := range map[string]struct {
		b    []byte
		want error
	}{
		"rest":           {edit(func(b []byte) []byte { return append(b, 0) }), errLong},
		"flag":           {edit(func(b []byte) []byte { b[len(b)-1] = flagsEnd; return b }), errBound},
		"varint":         {edit(func(b []byte) []byte { return append([]byte{0x81, 0x00}, b[1:]...) }), errCanonical},
		"worker":         {edit(func(b []byte) []byte { return append([]byte{0x80, 0x80, 0x04}, b[1:]...) }), errBound},
		"varint forever": {bytes.Repeat([]byte{0xff}, 20), errBound},
		"empty":          {nil, errShort},
		"long text": {edit(func(b []byte) []byte {
			at := bytes.Index(b, []byte("00101")) - 1
			return append(append(b[:at:at], 0x80, 0x80, 0x04), b[at+1:]...)
		}), errBound},
		"keys of no SA": {edit(func(b []byte) []byte { b[len(b)-1] |= flagClear; return b }), ErrInvalid},
		"phase": {edit(func(b []byte) []byte {
			b[bytes.Index(b, []byte{1, 2, 3, 4, byte(sa.Established)})+4] = byte(sa.Dead)
			return b
		}), ErrInvalid},
	} {
		if got, err := decodeSet(1, tt.b); !errors.Is(err, tt.want) {
			t.Errorf("%s: got %v, %v; want %v", name, got, err, tt.want)
		}
	}
	if _, err := decodeSet(0, good); !errors.Is(err, ErrInvalid) {
		t.Errorf("id zero: %v", err)
	}
	if _, err := ParseSetKey([]byte("short")); err == nil {
		t.Error("short key of a set is taken")
	}
	if _, err := ParseContextKey(SetKey(1)); err == nil {
		t.Error("long key of a context is taken")
	}
}

// Peers: B1.22
func TestSecretsDoNotPrint(t *testing.T) {
	s, m := fullSet(), fullMeta()
	b := Batch{Sets: []Set{s}}
	c := newCodec(t)
	text := fmt.Sprintf("%v %+v %#v %v %+v %#v %v", s, &s, s, m, m, m, b)
	v, _ := c.EncodeSet(&s)
	v[40] ^= 1
	_, err := c.DecodeSet(SetKey(s.ID), v)
	s.Phase = sa.Dead
	text += fmt.Sprint(err, s.Validate())
	for _, leak := range []string{"confidentiality!", "integrity-", "0123456789abcdef", hex.EncodeToString([]byte("confiden")), hex.EncodeToString([]byte("01234567"))} {
		if strings.Contains(text, leak) {
			t.Errorf("%q stands in %s", leak, text)
		}
	}
}

func TestParams(t *testing.T) {
	s := fullSet()
	now := s.Hard.Add(-time.Minute)
	p := s.Params(now)
	want := sa.Params{
		ID: s.ID, Label: s.Label, Local: s.Local, UE: s.Addr, Ports: s.Ports, SPIs: s.SPIs, Keys: s.Keys, Hard: time.Minute,
	}
	if !reflect.DeepEqual(p, want) {
		t.Errorf("got %+v, want %+v", p, want)
	}
	p.Keys.Zero()
	if s.Keys.Enc[0] == 0 {
		t.Error("the keys are shared")
	}
	if p := s.Params(s.Hard.Add(time.Hour)); p.Hard != time.Second {
		t.Errorf("hard limit in the past: %v", p.Hard)
	}
	s.Hard = time.Time{}
	if p := s.Params(now); p.Hard != 0 {
		t.Errorf("no hard limit: %v", p.Hard)
	}
}

func TestValidate(t *testing.T) {
	for name, spoil := range map[string]func(s *Set){
		"id is zero":      func(s *Set) { s.ID = 0 },
		"phase":           func(s *Set) { s.Phase = 0 },
		"algorithm pair":  func(s *Set) { s.Keys.Suite.Alg = 0 },
		"pair":            func(s *Set) { s.Keys = ims.ESPKeys{} },
		"has keys":        func(s *Set) { *s = clearSet(); s.Keys.Salt[3] = 1 },
		"keys but no":     func(s *Set) { *s = clearSet(); s.Keys.Enc = make(ims.Key, 1) },
		"but no SAs":      func(s *Set) { *s = clearSet(); s.Keys.Auth = make(ims.Key, 1) },
		"no SAs":          func(s *Set) { *s = clearSet(); s.Keys.Suite = fullSet().Keys.Suite },
		"SPIs but no SAs": func(s *Set) { *s = clearSet(); s.SPIs.UC = 256 },
		"a key has":       func(s *Set) { s.Keys.Auth = make(ims.Key, MaxKey+1) },
		"local address":   func(s *Set) { s.Local = netip.Addr{} },
		"has a zone":      func(s *Set) { s.Addr = netip.MustParseAddr("fe80::1%eth0") },
		"hard limit":      func(s *Set) { s.Hard = time.UnixMilli(maxMilli + 1) },
		"Security-Client": func(s *Set) { s.ClientText = strings.Repeat("x", MaxText+1) },
		"IMPU":            func(s *Set) { s.IMPU = strings.Repeat("x", MaxText+1) },
	} {
		s := fullSet()
		spoil(&s)
		if err := s.Validate(); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, spoil := range map[string]func(r *Registration){
		"index":           func(r *Registration) { r.Index = 0 },
		"state":           func(r *Registration) { r.State = 9 },
		"list":            func(r *Registration) { r.ServiceRoute = make([]string, MaxList+1) },
		"a list":          func(r *Registration) { r.Bindings = make([]Binding, MaxList+1) },
		"in all":          func(r *Registration) { r.Bindings[1].Associated = make([]string, MaxList-2) },
		"a text":          func(r *Registration) { r.Bindings[1].IMPU = strings.Repeat("x", MaxText+1) },
		"text":            func(r *Registration) { r.Bindings[0].Associated[1] = strings.Repeat("x", MaxText+1) },
		"end":             func(r *Registration) { r.Ended = time.UnixMilli(maxMilli + 1) },
		"more than 65535": func(r *Registration) { r.ServiceRoute = []string{strings.Repeat("x", MaxText+1)} },
		"expiry":          func(r *Registration) { r.Expires = time.Unix(-5, 0) },
		"missing":         func(r *Registration) { r.Addr = netip.Addr{} },
	} {
		r := fullRegistration()
		spoil(&r)
		if err := r.Validate(); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNames(t *testing.T) {
	for want, s := range map[string]fmt.Stringer{
		"set": KindSet, "key check": KindCheck, "Kind(0x63)": Kind(99), "pending": Pending, "registered": Registered,
		"deregistered": Deregistered, "State(0x0)": State(0),
	} {
		if s.String() != want {
			t.Errorf("got %s, want %s", s, want)
		}
	}
	for _, tt := range []struct {
		f    Fault
		want string
	}{
		{Fault{Kind: KindSet, Set: 26, Err: errSeal}, "read set 0x1a: " + errSeal.Error()},
		{Fault{Kind: KindFreed, Context: Context{2, 5}, Err: errSeal}, "read freed context 5 of worker 2: " + errSeal.Error()},
	} {
		if got := tt.f.Error(); got != tt.want || !errors.Is(tt.f, errSeal) {
			t.Errorf("got %s, want %s", got, tt.want)
		}
	}
}

// Whatever decodes has exactly one encoding, and satisfies Validate.
func FuzzSet(f *testing.F) {
	s := fullSet()
	var w body
	w.set(&s)
	f.Add(w.b)
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := decodeSet(1, b)
		if err != nil {
			return
		}
		var w body
		w.set(&s)
		if !bytes.Equal(w.b, b) {
			t.Errorf("%x decodes to %+v, which encodes to %x", b, s, w.b)
		}
	})
}

func FuzzRegistration(f *testing.F) {
	r := fullRegistration()
	var w body
	w.registration(&r)
	f.Add(w.b)
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeRegistration(Context{1, 1}, b)
		if err != nil {
			return
		}
		var w body
		w.registration(&r)
		if !bytes.Equal(w.b, b) {
			t.Errorf("%x decodes to %+v, which encodes to %x", b, r, w.b)
		}
	})
}

func FuzzMeta(f *testing.F) {
	m := fullMeta()
	var w body
	w.meta(&m)
	f.Add(w.b)
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decodeMeta(b)
		if err != nil {
			return
		}
		var w body
		w.meta(&m)
		if !bytes.Equal(w.b, b) {
			t.Errorf("%x decodes to %+v, which encodes to %x", b, m, w.b)
		}
	})
}

// Sealed values from a disk may be anything.
func FuzzValue(f *testing.F) {
	c, err := NewCodec(secret)
	if err != nil {
		f.Fatal(err)
	}
	s := fullSet()
	v, err := c.EncodeSet(&s)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(SetKey(s.ID), v)
	f.Fuzz(func(t *testing.T, key, value []byte) {
		got, err := c.DecodeSet(key, value)
		if err == nil && !reflect.DeepEqual(got, s) { // nobody without the key makes another one
			t.Errorf("got %+v", got)
		}
		for _, err := range []error{
			second(c.DecodeRegistration(key, value)), second(c.DecodeFreed(key, value)), second(c.DecodeMark(key, value)),
			second(c.DecodeMeta(value)), c.Check(value),
		} {
			if err == nil {
				t.Error("a set opens as something else")
			}
		}
	})
}

func second[T any](_ T, err error) error { return err }

func BenchmarkEncodeSet(b *testing.B) {
	c, s := newCodec(b), fullSet()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.EncodeSet(&s); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDecodeSet(b *testing.B) {
	c, s := newCodec(b), fullSet()
	v, err := c.EncodeSet(&s)
	if err != nil {
		b.Fatal(err)
	}
	key := SetKey(s.ID)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.DecodeSet(key, v); err != nil {
			b.Fatal(err)
		}
	}
}
