// Package storetest has what tests of stores, and tests that need one, share: one suite that every implementation of
// store.Store has to pass, records to fill stores with, and Memory, a store in memory that can be made to fail.
//
// Nothing here is for production.
package storetest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/control/store"
)

// Epoch is the moment from which the deadlines of the sample records count.
var Epoch = time.Date(2026, 9, 1, 12, 0, 0, 123e6, time.UTC)

// Key returns key material in which every octet is b.
func Key(n int, b byte) ims.Key {
	k := make(ims.Key, n)
	for i := range k {
		k[i] = b
	}
	return k
}

// Set returns sample set n of a size that is usual: the UE offered six algorithm pairs.
func Set(n uint64) store.Set {
	i := uint32(n)
	offer := make([]string, 0, 6)
	for _, s := range []string{"null;ealg=aes-gcm", "aes-gmac", "hmac-sha-1-96;ealg=aes-cbc", "hmac-sha-1-96;ealg=null", "hmac-md5-96;ealg=aes-cbc", "hmac-md5-96;ealg=null"} {
		offer = append(offer, fmt.Sprintf("ipsec-3gpp;alg=%s;spi-c=%d;spi-s=%d;port-c=31000;port-s=31001", s, i*2+1000, i*2+1001))
	}
	return store.Set{
		ID: n, Worker: uint16(n % 4), UE: i, Label: i | 1<<24, Serial: uint8(n),
		IMPI: IMPI(i), Addr: Addr(i), Local: netip.MustParseAddr("10.0.0.5"),
		Ports: ims.Ports{UC: 31000, US: 31001, PC: 6110, PS: 6100},
		SPIs:  ims.SPIs{UC: ims.SPI(i*2 + 1000), US: ims.SPI(i*2 + 1001), PC: ims.SPI(i*2 + 1<<28), PS: ims.SPI(i*2 + 1<<28 + 1)},
		Keys: ims.ESPKeys{
			Suite: ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC}, Enc: Key(16, byte(n)), Auth: Key(20, byte(n>>8)),
		},
		Phase: sa.Established, Deadline: Epoch.Add(time.Hour), Hard: Epoch.Add(time.Hour + time.Minute),
		Counters:   sa.Counters{i + 2, i + 3, i, i + 1},
		ServerText: fmt.Sprintf("ipsec-3gpp;q=0.9;alg=hmac-sha-1-96;ealg=aes-cbc;prot=esp;mod=trans;spi-c=%d;spi-s=%d;port-c=6110;port-s=6100", i*2+1<<28, i*2+1<<28+1),
		ClientText: strings.Join(offer, ","),
		CallID:     fmt.Sprintf("%08x-3f2b-4d5e-9c1a-7b6e5d4c3b2a@10.45.0.9", i),
		IMPU:       fmt.Sprintf("sip:+4930%07d@ims.mnc001.mcc001.3gppnetwork.org", i), OverTCP: n%2 == 1, Used: true,
	}
}

// IMPI returns the private identity of sample UE n.
func IMPI(n uint32) string { return fmt.Sprintf("00101%010d@ims.mnc001.mcc001.3gppnetwork.org", n) }

// Addr returns the address of sample UE n.
func Addr(n uint32) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)})
}

// Registration returns the registration of sample UE n, which is not zero, over set n.
func Registration(n uint32) store.Registration {
	return store.Registration{
		Context: store.Context{Worker: uint16(n % 4), Index: n}, Gen: uint16(n), IMPI: IMPI(n), Addr: Addr(n),
		Local: netip.MustParseAddr("10.0.0.5"), State: store.Registered, Current: uint64(n),
		Bindings: []store.Binding{{
			IMPU: fmt.Sprintf("sip:+4930%07d@ims.mnc001.mcc001.3gppnetwork.org", n),
			Associated: []string{
				fmt.Sprintf("sip:+4930%07d@ims.mnc001.mcc001.3gppnetwork.org", n), fmt.Sprintf("tel:+4930%07d", n),
			},
		}},
		ServiceRoute: []string{"sip:orig@scscf1.ims.mnc001.mcc001.3gppnetwork.org:5060;lr"},
		Contact:      fmt.Sprintf("sip:%s:31001", Addr(n)), Expires: Epoch.Add(time.Hour),
	}
}

// Equal reports whether two sets are the same, keys included, as far as a store keeps them: times to the millisecond.
func Equal(a, b store.Set) bool {
	norm := func(s store.Set) store.Set {
		s.Deadline, s.Hard = normTime(s.Deadline), normTime(s.Hard)
		s.Keys = s.Keys.Clone() // nil where it is empty
		return s
	}
	return reflect.DeepEqual(norm(a), norm(b))
}

// EqualRegistrations reports whether two registrations are the same as far as a store keeps them.
func EqualRegistrations(a, b store.Registration) bool {
	norm := func(r store.Registration) store.Registration {
		r.Expires, r.Ended = normTime(r.Expires), normTime(r.Ended)
		r.Bindings = append([]store.Binding(nil), r.Bindings...)
		for i := range r.Bindings {
			r.Bindings[i].Associated = append([]string(nil), r.Bindings[i].Associated...)
		}
		r.ServiceRoute = append([]string(nil), r.ServiceRoute...)
		r.Former = append([]store.Freed(nil), r.Former...)
		return r
	}
	return reflect.DeepEqual(norm(a), norm(b))
}

func normTime(t time.Time) time.Time {
	if t.IsZero() {
		return time.Time{}
	}
	return t.Truncate(time.Millisecond).UTC()
}

// Implementation is what the suite needs to know of an implementation.
type Implementation struct {
	// New opens a new and empty store. The suite closes it.
	New func(t *testing.T) store.Store
	// Reopen closes a store and opens what it held again.
	Reopen func(t *testing.T, s store.Store) store.Store
}

// Run runs the suite.
func Run(t *testing.T, impl Implementation) {
	t.Helper()
	for _, tt := range []struct {
		name string
		test func(t *testing.T, f *fixture)
	}{
		{"Empty", empty},
		{"RoundTrip", roundTrip},
		{"ReplaceAndDelete", replaceAndDelete},
		{"Order", order},
		{"Generations", generations},
		{"Marks", marks},
		{"SetIDs", setIDs},
		{"Meta", meta},
		{"AllOrNothing", allOrNothing},
		{"Retains", retains},
		{"Visitor", visitor},
		{"Cancelled", cancelled},
		{"Concurrent", concurrent},
		{"Closed", closed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := &fixture{impl: impl, s: impl.New(t)}
			defer func() {
				if err := f.s.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
			}()
			tt.test(t, f)
		})
	}
}

type fixture struct {
	impl Implementation
	s    store.Store
}

func (f *fixture) apply(t *testing.T, b store.Batch) {
	t.Helper()
	if err := f.s.Apply(t.Context(), b); err != nil {
		t.Fatalf("apply: %v", err)
	}
}

func (f *fixture) read(t *testing.T) *store.Snapshot {
	t.Helper()
	n, err := store.Read(t.Context(), f.s)
	if err != nil {
		t.Fatalf("read: %v", err)
	}
	if len(n.Faults) > 0 {
		t.Fatalf("faults: %v", n.Faults)
	}
	return n
}

// expect compares the contents of the store now and after it was opened again.
func (f *fixture) expect(t *testing.T, want store.Snapshot) {
	t.Helper()
	for _, when := range []string{"now", "opened again"} {
		if when != "now" {
			f.s = f.impl.Reopen(t, f.s)
		}
		got := f.read(t)
		if !slices.EqualFunc(got.Sets, want.Sets, Equal) {
			t.Errorf("%s: got sets %+v, want %+v", when, got.Sets, want.Sets)
		}
		if !slices.EqualFunc(got.Registrations, want.Registrations, EqualRegistrations) {
			t.Errorf("%s: got registrations %+v, want %+v", when, got.Registrations, want.Registrations)
		}
		if !slices.Equal(got.Freed, want.Freed) {
			t.Errorf("%s: got freed contexts %+v, want %+v", when, got.Freed, want.Freed)
		}
	}
}

func empty(t *testing.T, f *fixture) {
	f.apply(t, store.Batch{})
	f.apply(t, store.Batch{DeleteSets: []uint64{7}})
	f.expect(t, store.Snapshot{})
}

func roundTrip(t *testing.T, f *fixture) {
	s, r := Set(1), Registration(1)
	least := store.Set{
		ID: 1<<64 - 1, Addr: netip.MustParseAddr("2001:db8::1"), Local: netip.MustParseAddr("::ffff:10.0.0.5"),
		Keys: ims.ESPKeys{Suite: ims.Suite{Alg: ims.AlgNull, Enc: ims.EncAESGCM}, Enc: Key(16, 9), Salt: [4]byte{1, 2, 3, 4}}, Phase: sa.Reserved,
	}
	most := Set(2)
	most.Worker, most.UE, most.Label, most.Serial = 1<<16-1, 1<<32-1, 1<<32-1, 255
	most.Ports = ims.Ports{UC: 1<<16 - 1, US: 1<<16 - 2, PC: 1<<16 - 3, PS: 1<<16 - 4}
	most.SPIs = ims.SPIs{UC: 1<<32 - 1, US: 1<<32 - 2, PC: 1<<32 - 3, PS: 1<<32 - 4}
	most.Counters = sa.Counters{1<<32 - 3, 1<<32 - 4, 1<<32 - 1, 1<<32 - 2}
	most.ClientText = strings.Repeat("\x00\xff", store.MaxText/2)
	most.Over, most.OverTCP, most.Used, most.Removing, most.Emergency = 1<<64-1, true, true, true, true
	most.Deadline = Epoch.Add(12345 * time.Microsecond).In(time.FixedZone("", 3600))
	none := Set(3) // an association without SAs
	none.Clear, none.Keys, none.SPIs, none.Ports, none.Counters = true, ims.ESPKeys{}, ims.SPIs{}, ims.Ports{}, sa.Counters{}
	bare := store.Registration{
		Context: store.Context{Worker: 1<<16 - 1, Index: 1<<32 - 1}, Gen: 1<<16 - 1, State: store.Pending,
		Addr: netip.MustParseAddr("2001:db8::1"), Local: netip.MustParseAddr("2001:db8::5"),
	}
	several := Registration(2)
	several.Bindings = []store.Binding{
		{IMPU: "sip:b@ims.example"}, {IMPU: "sip:a@ims.example", Associated: []string{"tel:+1", ""}}, {Associated: []string{"x"}},
	}
	several.Ended, several.Emergency = Epoch.Add(time.Minute), true
	f.apply(t, store.Batch{
		Sets: []store.Set{s, least, most, none}, Registrations: []store.Registration{r, several, bare},
	})
	f.expect(t, store.Snapshot{
		Sets: []store.Set{s, most, none, least}, Registrations: []store.Registration{r, several, bare},
	})
}

func replaceAndDelete(t *testing.T, f *fixture) {
	a, b := Set(1), Set(2)
	f.apply(t, store.Batch{Sets: []store.Set{a, b}})
	a.Phase, a.Deadline, a.Keys.Enc = sa.Old, Epoch, Key(16, 0xaa)
	f.apply(t, store.Batch{Sets: []store.Set{a}, DeleteSets: []uint64{2, 3}})
	f.expect(t, store.Snapshot{Sets: []store.Set{a}})
	// Deletes come before puts, and of several puts the last one counts.
	c := a
	c.Phase = sa.Established
	f.apply(t, store.Batch{Sets: []store.Set{a, c}, DeleteSets: []uint64{1}})
	f.expect(t, store.Snapshot{Sets: []store.Set{c}})
	f.apply(t, store.Batch{DeleteSets: []uint64{1}})
	f.expect(t, store.Snapshot{})
}

func order(t *testing.T, f *fixture) {
	var want store.Snapshot
	for i := range 300 {
		want.Sets = append(want.Sets, Set(uint64(i)*0x0101_0101+1))
		want.Registrations = append(want.Registrations, Registration(uint32(i)+1))
	}
	b := store.Batch{Sets: slices.Clone(want.Sets), Registrations: slices.Clone(want.Registrations)}
	slices.Reverse(b.Sets)
	slices.Reverse(b.Registrations)
	f.apply(t, b)
	slices.SortFunc(want.Registrations, func(a, b store.Registration) int {
		return cmp.Or(cmp.Compare(a.Worker, b.Worker), cmp.Compare(a.Index, b.Index))
	})
	f.expect(t, want)
}

// A context that is gone leaves its generation, until the index is used again.
func generations(t *testing.T, f *fixture) {
	r := Registration(5)
	gone := store.Freed{Context: r.Context, Gen: r.Gen}
	f.apply(t, store.Batch{Registrations: []store.Registration{r}})
	f.apply(t, store.Batch{Free: []store.Freed{gone}})
	f.expect(t, store.Snapshot{Freed: []store.Freed{gone}})
	r.Gen++
	f.apply(t, store.Batch{Registrations: []store.Registration{r}})
	f.expect(t, store.Snapshot{Registrations: []store.Registration{r}})
	// One that was never stored leaves it too, and in one batch the new owner of the index wins.
	never := store.Freed{Context: store.Context{Worker: 9, Index: 9}, Gen: 3}
	next := r
	next.Gen++
	f.apply(t, store.Batch{Free: []store.Freed{{Context: r.Context, Gen: r.Gen}, never}, Registrations: []store.Registration{next}})
	f.expect(t, store.Snapshot{Registrations: []store.Registration{next}, Freed: []store.Freed{never}})
}

func marks(t *testing.T, f *fixture) {
	s := Set(1)
	s.Counters = sa.Counters{30, 40, 10, 20}
	other := Set(2)
	f.apply(t, store.Batch{Sets: []store.Set{s, other}})
	for _, tt := range []struct{ mark, want sa.Counters }{
		{sa.Counters{5, 5, 5, 5}, sa.Counters{30, 40, 10, 20}},
		{sa.Counters{5, 45, 5, 25}, sa.Counters{30, 45, 10, 25}},
		{sa.Counters{300, 7, 100, 7}, sa.Counters{300, 45, 100, 25}},
		{sa.Counters{299, 44, 99, 24}, sa.Counters{300, 45, 100, 25}},
		{sa.Counters{1<<32 - 1, 45, 1<<32 - 1, 25}, sa.Counters{1<<32 - 1, 45, 1<<32 - 1, 25}},
	} {
		if err := f.s.Checkpoint(t.Context(), []store.Mark{{Set: 77, Counters: tt.mark}, {Set: 1, Counters: tt.mark}}); err != nil {
			t.Fatalf("checkpoint: %v", err)
		}
		want := s
		want.Counters = tt.want
		f.expect(t, store.Snapshot{Sets: []store.Set{want, other}})
	}
	// A set that is written again with what was known when it was made does not lose its marks.
	f.apply(t, store.Batch{Sets: []store.Set{s}})
	want := s
	want.Counters = sa.Counters{1<<32 - 1, 45, 1<<32 - 1, 25}
	f.expect(t, store.Snapshot{Sets: []store.Set{want, other}})
	// A set that goes takes them along, and so does one that is replaced by a delete and a put.
	f.apply(t, store.Batch{DeleteSets: []uint64{1}, Sets: []store.Set{s}})
	f.expect(t, store.Snapshot{Sets: []store.Set{s, other}})
	// Marks of a batch count after its puts.
	f.apply(t, store.Batch{Sets: []store.Set{Set(3)}, Marks: []store.Mark{{Set: 3, Counters: sa.Counters{3000, 4000, 1000, 2000}}}})
	third := Set(3)
	third.Counters = sa.Counters{3000, 4000, 1000, 2000}
	f.expect(t, store.Snapshot{Sets: []store.Set{s, other, third}})
}

// SetIDs lists what is stored, in the order of the ids and not of their coming.
func setIDs(t *testing.T, f *fixture) {
	check := func(want ...uint64) {
		t.Helper()
		for _, when := range []string{"now", "opened again"} {
			if when != "now" {
				f.s = f.impl.Reopen(t, f.s)
			}
			if got, err := f.s.SetIDs(t.Context()); err != nil || !slices.Equal(got, want) {
				t.Errorf("%s: got %v, %v; want %v", when, got, err, want)
			}
		}
	}
	check()
	f.apply(t, store.Batch{
		Sets:          []store.Set{Set(1<<64 - 1), Set(0x100), Set(2), Set(0xff)},
		Registrations: []store.Registration{Registration(7)},
		Marks:         []store.Mark{{Set: 2}, {Set: 9}}, // which no set is of
	})
	check(2, 0xff, 0x100, 1<<64-1)
	f.apply(t, store.Batch{Sets: []store.Set{Set(2), Set(3)}, DeleteSets: []uint64{0x100, 3}})
	check(2, 3, 0xff, 1<<64-1)
	var sets []store.Set
	want := []uint64{2, 3, 0xff}
	for id := uint64(1000); id < 3000; id++ {
		sets, want = append(sets, store.Set{
			ID: id, Addr: Addr(1), Local: Addr(2), Phase: sa.Established, Clear: true,
		}), append(want, id)
	}
	f.apply(t, store.Batch{Sets: sets})
	check(append(want, 1<<64-1)...)
}

func meta(t *testing.T, f *fixture) {
	check := func(want store.Meta) {
		t.Helper()
		got, err := f.s.Meta(t.Context())
		if err != nil {
			t.Fatalf("meta: %v", err)
		}
		if got.Schema != store.Schema || !slices.Equal(got.TokenKey, want.TokenKey) || got.TokenEpoch != want.TokenEpoch ||
			got.Instance != want.Instance || got.Workers != want.Workers || got.Clean != want.Clean {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
	check(store.Meta{})
	for _, m := range []store.Meta{
		{TokenKey: Key(16, 7), TokenEpoch: 1, Instance: "edge1"},
		{Schema: 99, TokenKey: Key(16, 8), TokenEpoch: 1<<32 - 1, Instance: "edge2", Workers: 1<<16 - 1, Clean: true},
	} {
		if err := f.s.SetMeta(t.Context(), m); err != nil {
			t.Fatalf("set meta: %v", err)
		}
		check(m)
		f.s = f.impl.Reopen(t, f.s)
		check(m)
	}
	if err := f.s.SetMeta(t.Context(), store.Meta{TokenKey: Key(store.MaxKey+1, 1)}); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("key that is too long: %v", err)
	}
	check(store.Meta{TokenKey: Key(16, 8), TokenEpoch: 1<<32 - 1, Instance: "edge2", Workers: 1<<16 - 1, Clean: true})
}

// A batch with one bad record changes nothing, wherever that stands.
func allOrNothing(t *testing.T, f *fixture) {
	s, r := Set(1), Registration(1)
	f.apply(t, store.Batch{Sets: []store.Set{s}, Registrations: []store.Registration{r}})
	good := store.Batch{
		DeleteSets: []uint64{1}, Free: []store.Freed{{Context: r.Context, Gen: 1}}, Sets: []store.Set{Set(2)},
		Registrations: []store.Registration{Registration(2)}, Marks: []store.Mark{{Set: 2}},
	}
	for name, spoil := range map[string]func(b *store.Batch){
		"phase":    func(b *store.Batch) { b.Sets = append(b.Sets, Set(3)); b.Sets[1].Phase = sa.Dead },
		"clear":    func(b *store.Batch) { b.Sets[0].Clear = true },
		"text":     func(b *store.Batch) { b.Sets[0].CallID = strings.Repeat("x", store.MaxText+1) },
		"address":  func(b *store.Batch) { b.Registrations[0].Addr = netip.Addr{} },
		"index":    func(b *store.Batch) { b.Free[0].Index = 0 },
		"mark":     func(b *store.Batch) { b.Marks[0].Set = 0 },
		"deadline": func(b *store.Batch) { b.Sets[0].Deadline = time.Unix(-1, 0) },
	} {
		b := good
		b.Free, b.Sets = slices.Clone(good.Free), slices.Clone(good.Sets)
		b.Registrations, b.Marks = slices.Clone(good.Registrations), slices.Clone(good.Marks)
		spoil(&b)
		if err := f.s.Apply(t.Context(), b); !errors.Is(err, store.ErrInvalid) {
			t.Errorf("%s: got %v, want ErrInvalid", name, err)
		}
	}
	f.expect(t, store.Snapshot{Sets: []store.Set{s}, Registrations: []store.Registration{r}})
}

// A store keeps nothing of a batch, and what it shows belongs to who asked.
func retains(t *testing.T, f *fixture) {
	s, r := Set(1), Registration(1)
	wantSet, wantReg := *s.Clone(), *r.Clone()
	f.apply(t, store.Batch{Sets: []store.Set{s}, Registrations: []store.Registration{r}})
	s.Keys.Zero()
	r.Bindings[0].Associated[0], r.Bindings[0].IMPU = "changed", "changed"
	n := f.read(t)
	n.Sets[0].Keys.Zero()
	n.Registrations[0].Bindings[0].Associated[0] = "changed"
	f.expect(t, store.Snapshot{Sets: []store.Set{wantSet}, Registrations: []store.Registration{wantReg}})
	key := Key(16, 1)
	if err := f.s.SetMeta(t.Context(), store.Meta{TokenKey: key}); err != nil {
		t.Fatal(err)
	}
	key.Zero()
	for range 2 {
		m, err := f.s.Meta(t.Context())
		if err != nil || !slices.Equal(m.TokenKey, Key(16, 1)) {
			t.Fatalf("the key changed with its copy (%v)", err)
		}
		m.TokenKey.Zero()
	}
}

// Load skips what is not asked for and ends with the first error of the visitor.
func visitor(t *testing.T, f *fixture) {
	f.apply(t, store.Batch{
		Sets: []store.Set{Set(1), Set(2)}, Registrations: []store.Registration{Registration(1)},
		Free: []store.Freed{{Context: store.Context{Index: 2}}},
	})
	if err := f.s.Load(t.Context(), &store.Visitor{}); err != nil {
		t.Errorf("empty visitor: %v", err)
	}
	mine := errors.New("mine")
	var seen []string
	v := store.Visitor{
		Registration: func(store.Registration) error { seen = append(seen, "registration"); return nil },
		Freed:        func(store.Freed) error { seen = append(seen, "freed"); return nil },
		Set:          func(store.Set) error { seen = append(seen, "set"); return mine },
	}
	if err := f.s.Load(t.Context(), &v); !errors.Is(err, mine) {
		t.Errorf("got %v, want the error of the visitor", err)
	}
	if want := []string{"registration", "freed", "set"}; !slices.Equal(seen, want) {
		t.Errorf("got %q, want %q", seen, want)
	}
	v.Freed = func(store.Freed) error { return mine }
	v.Set = func(store.Set) error { t.Error("visited after an error"); return nil }
	if err := f.s.Load(t.Context(), &v); !errors.Is(err, mine) {
		t.Errorf("got %v, want the error of the visitor", err)
	}
}

func cancelled(t *testing.T, f *fixture) {
	f.apply(t, store.Batch{Sets: []store.Set{Set(1)}})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, idsErr := f.s.SetIDs(ctx)
	_, metaErr := f.s.Meta(ctx)
	for name, err := range map[string]error{
		"apply":      f.s.Apply(ctx, store.Batch{Sets: []store.Set{Set(2)}}),
		"checkpoint": f.s.Checkpoint(ctx, []store.Mark{{Set: 1, Counters: sa.Counters{2: 1 << 30}}}),
		"load":       f.s.Load(ctx, &store.Visitor{Set: func(store.Set) error { return nil }}),
		"set ids":    idsErr,
		"meta":       metaErr,
		"set meta":   f.s.SetMeta(ctx, store.Meta{Clean: true}),
	} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", name, err)
		}
	}
	f.expect(t, store.Snapshot{Sets: []store.Set{Set(1)}})
}

// Batches of several goroutines do not mix: what Load shows was whole at one moment.
func concurrent(t *testing.T, f *fixture) {
	const writers, rounds = 4, 15
	pair := func(w, round int) []store.Set {
		a, b := Set(uint64(w)*2+1), Set(uint64(w)*2+2)
		a.Over, b.Over = uint64(round), uint64(round)
		return []store.Set{a, b}
	}
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for round := range rounds {
				if err := f.s.Apply(t.Context(), store.Batch{Sets: pair(w, round)}); err != nil {
					t.Errorf("apply: %v", err)
				}
			}
		})
	}
	for range rounds {
		last := map[uint64]uint64{}
		err := f.s.Load(t.Context(), &store.Visitor{Set: func(s store.Set) error {
			if before, ok := last[(s.ID-1)/2]; ok && before != s.Over {
				t.Errorf("half a batch: rounds %d and %d", before, s.Over)
			}
			last[(s.ID-1)/2] = s.Over
			return nil
		}})
		if err != nil {
			t.Errorf("load: %v", err)
		}
	}
	wg.Wait()
	var want store.Snapshot
	for w := range writers {
		want.Sets = append(want.Sets, pair(w, rounds-1)...)
	}
	f.expect(t, want)
}

func closed(t *testing.T, f *fixture) {
	for range 2 {
		if err := f.s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	_, idsErr := f.s.SetIDs(t.Context())
	_, metaErr := f.s.Meta(t.Context())
	for name, err := range map[string]error{
		"apply":      f.s.Apply(t.Context(), store.Batch{Sets: []store.Set{Set(2)}}),
		"checkpoint": f.s.Checkpoint(t.Context(), []store.Mark{{Set: 1}}),
		"load":       f.s.Load(t.Context(), &store.Visitor{}),
		"set ids":    idsErr,
		"meta":       metaErr,
		"set meta":   f.s.SetMeta(t.Context(), store.Meta{}),
	} {
		if !errors.Is(err, store.ErrClosed) {
			t.Errorf("%s: got %v, want ErrClosed", name, err)
		}
	}
}
