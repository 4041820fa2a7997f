package sipmsg_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"github.com/gmgate/gmgate/dataplane/sipmsg"
	"github.com/gmgate/gmgate/dataplane/sipmsg/sipmsgtest"
)

// edit applies f to a message made of the minimal request with extra header lines and returns the extra lines after it.
func edit(t *testing.T, extra string, f func(m *sipmsg.Msg, e *sipmsg.Edit)) (string, error) {
	t.Helper()
	head, tail, _ := strings.Cut(request, "Max-Forwards")
	m := scan(t, crlf(head+extra+"Max-Forwards"+tail))
	var e sipmsg.Edit
	e.Reset(m)
	f(m, &e)
	out, err := e.Append([]byte("prefix"))
	if err != nil {
		if string(out) != "prefix" {
			t.Errorf("Append returned %q with an error", out)
		}
		return "", err
	}
	s, ok := strings.CutPrefix(strings.ReplaceAll(string(out), "\r\n", "\n"), "prefix"+head)
	if !ok {
		t.Fatalf("the start changed:\n%s", out)
	}
	s, ok = strings.CutSuffix(s, "Max-Forwards"+tail)
	if !ok {
		t.Fatalf("the end changed:\n%s", out)
	}
	scan(t, out[len("prefix"):])
	return s, nil
}

func TestDeleteElement(t *testing.T) {
	tests := []struct {
		name, in string
		del      []int // elements by number, in this order
		want     string
	}{
		{"only", "Route: <a>\n", []int{0}, ""},
		{"first", "Route: <a>, <b>, <c>\n", []int{0}, "Route: <b>, <c>\n"},
		{"middle", "Route: <a>, <b>, <c>\n", []int{1}, "Route: <a>, <c>\n"},
		{"last", "Route: <a>, <b>, <c>\n", []int{2}, "Route: <a>, <b>\n"},
		{"first two", "Route: <a>, <b>, <c>\n", []int{0, 1}, "Route: <c>\n"},
		{"first two backwards", "Route: <a>, <b>, <c>\n", []int{1, 0}, "Route: <c>\n"},
		{"last two", "Route: <a>, <b>, <c>\n", []int{1, 2}, "Route: <a>\n"},
		{"last two backwards", "Route: <a>, <b>, <c>\n", []int{2, 1}, "Route: <a>\n"},
		{"ends", "Route: <a>, <b>, <c>\n", []int{2, 0}, "Route: <b>\n"},
		{"all", "Route: <a>, <b>, <c>\n", []int{1, 0, 2}, ""},
		{"twice", "Route: <a>, <b>, <c>\n", []int{1, 1}, "Route: <a>, <c>\n"},
		{"folds", "Route: <a>,\n <b>,\n\t<c>\n", []int{1}, "Route: <a>,\n <c>\n"},
		{"fold at the end", "Route: <a>,\n <b>\n", []int{1}, "Route: <a>\n"},
		{"fold at the start", "Route:\n <a>,\n <b>\n", []int{0}, "Route:\n <b>\n"},
		{"commas inside", "Route: \"x, y\" <a,b>;p=\",\", <c>\n", []int{0}, "Route: <c>\n"},
		{"stray commas", "Route: ,<a>,,<b>,\n", []int{1}, "Route: ,<a>\n"},
		{"all with stray commas", "Route: ,<a>,,<b>,\n", []int{0, 1}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := edit(t, tt.in, func(m *sipmsg.Msg, e *sipmsg.Edit) {
				r, _ := m.First(sipmsg.Route)
				for _, n := range tt.del {
					elem, rest := sipmsg.Element(m.Value(r))
					for range n {
						elem, rest = sipmsg.Element(rest)
					}
					e.DeleteElement(m, r, elem)
				}
			})
			if err != nil || got != tt.want {
				t.Errorf("got %q, %v; want %q", got, err, tt.want)
			}
		})
	}
	_, err := edit(t, "Route: <a>\n", func(m *sipmsg.Msg, e *sipmsg.Edit) {
		r, _ := m.First(sipmsg.Route)
		e.DeleteElement(m, r, []byte("<a>"))
	})
	if !errors.Is(err, sipmsg.ErrEditRange) {
		t.Errorf("foreign element: %v", err)
	}
	_, err = edit(t, "Route: <a>\n", func(m *sipmsg.Msg, e *sipmsg.Edit) {
		r, _ := m.First(sipmsg.Route)
		e.DeleteElement(m, r, m.Get(sipmsg.Via))
	})
	if !errors.Is(err, sipmsg.ErrEditRange) {
		t.Errorf("element of another row: %v", err)
	}
}

func TestRemoveTokens(t *testing.T) {
	tests := []struct {
		in, want string
		n        int
	}{
		{"", "", 0},
		{"Require: sec-agree\n", "", 1},
		{"Require: path\n", "Require: path\n", 0},
		{"Require: sec-agree, path\n", "Require: path\n", 1},
		{"Require: path, SEC-Agree\n", "Require: path\n", 1},
		{"Require: path,sec-agree,mediasec,gruu\n", "Require: path,gruu\n", 2},
		{"Require: sec-agree,mediasec\nRequire: sec-agree, x\nRequire: y\n", "Require: x\nRequire: y\n", 3},
		{"Require: mediasec,a,sec-agree\n", "Require: a\n", 2},
		{"Require: sec-agree2\n", "Require: sec-agree2\n", 0},
		{"Require:\n", "Require:\n", 0},
	}
	for _, tt := range tests {
		n := 0
		got, err := edit(t, tt.in, func(m *sipmsg.Msg, e *sipmsg.Edit) {
			n = e.RemoveTokens(m, sipmsg.Require, "sec-agree", "mediasec")
			if again := e.RemoveTokens(m, sipmsg.Require, "sec-agree", "mediasec"); again != 0 {
				t.Errorf("%q: removed %d again", tt.in, again)
			}
			if e.Changed() != (tt.n > 0) {
				t.Errorf("%q: Changed = %v", tt.in, e.Changed())
			}
		})
		if err != nil || got != tt.want || n != tt.n {
			t.Errorf("RemoveTokens(%q) = %q, %d, %v; want %q, %d", tt.in, got, n, err, tt.want, tt.n)
		}
	}
}

func TestPopElement(t *testing.T) {
	const in = "Route: <a>, <b>\nRoute: <c>\nRoute: <d>\n"
	for n, want := range []string{in, "Route: <b>\nRoute: <c>\nRoute: <d>\n", "Route: <c>\nRoute: <d>\n", "Route: <d>\n", "", ""} {
		got, err := edit(t, in, func(m *sipmsg.Msg, e *sipmsg.Edit) {
			for i := range n {
				if ok := e.PopElement(m, sipmsg.Route); ok != (i < 4) {
					t.Errorf("pop %d: %v", i, ok)
				}
			}
		})
		if err != nil || got != want {
			t.Errorf("%d times: %q, %v; want %q", n, got, err, want)
		}
	}
	got, err := edit(t, in, func(m *sipmsg.Msg, e *sipmsg.Edit) {
		first, _ := m.First(sipmsg.Route)
		e.DeleteRow(first)
		e.PopElement(m, sipmsg.Route)
	})
	if err != nil || got != "Route: <d>\n" {
		t.Errorf("pop after DeleteRow: %q, %v", got, err)
	}
	got, err = edit(t, in, func(m *sipmsg.Msg, e *sipmsg.Edit) {
		if e.DeleteAll(m, sipmsg.RecordRoute) || !e.DeleteAll(m, sipmsg.Route) || e.PopElement(m, sipmsg.Route) {
			t.Error("DeleteAll or PopElement says the wrong thing")
		}
	})
	if err != nil || got != "" {
		t.Errorf("DeleteAll: %q, %v", got, err)
	}
}

func TestEditBuilder(t *testing.T) {
	v4 := netip.MustParseAddrPort("10.0.1.5:5060")
	v6 := netip.MustParseAddrPort("[2001:db8::5%eth0]:65535")
	mapped := netip.MustParseAddr("::ffff:192.0.2.1")
	got, err := edit(t, "X: old\n", func(m *sipmsg.Msg, e *sipmsg.Edit) {
		r, _ := m.HeaderNamed("X")
		e.Open(int(r.ValStart), int(r.ValEnd)).Str("s").Raw([]byte("r")).Byte(' ').Uint(0).Byte(' ').Uint(1<<64 - 1).Byte(' ').Hex(0x0123456789abcdef).
			Byte(' ').Hex(0).Byte(' ').AddrPort(v4).Byte(' ').AddrPort(v6).Byte(' ').Addr(mapped).Byte(' ').BareAddr(v6.Addr()).Byte(' ').Addr(v6.Addr()).Close()
		e.Open(int(r.End), int(r.End)).Str("Y: 1\r\n").Close()
	})
	want := "X: sr 0 18446744073709551615 0123456789abcdef 0000000000000000 10.0.1.5:5060 [2001:db8::5]:65535 192.0.2.1 2001:db8::5 [2001:db8::5]\nY: 1\n"
	if err != nil || got != want {
		t.Errorf("got %q, %v\nwant %q", got, err, want)
	}
}

func TestEditOrder(t *testing.T) {
	got, err := edit(t, "X: 1\nY: 2\n", func(m *sipmsg.Msg, e *sipmsg.Edit) {
		x, _ := m.HeaderNamed("X")
		y, _ := m.HeaderNamed("Y")
		e.Insert(int(y.Start), "A", ": 1\r\n")
		e.ReplaceString(int(x.ValStart), int(x.ValEnd), "one")
		e.InsertBytes(int(x.Start), []byte("B: "), []byte("2\r\n"))
		e.Insert(int(y.Start), "C: 3\r\n")
		e.Delete(int(y.Start), int(y.End)) // inserts before it stay
		e.Insert(int(y.End), "D: 4\r\n")
		e.Replace(int(y.Start), int(y.Start), nil) // nothing
		e.Insert(int(x.Start), "E: 5\r\n")
	})
	if want := "B: 2\nE: 5\nX: one\nA: 1\nC: 3\nD: 4\n"; err != nil || got != want {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
}

func TestEditErrors(t *testing.T) {
	size := len(crlf(request)) + len("X: 0123456789\r\n")
	tests := []struct {
		name string
		f    func(e *sipmsg.Edit, at int) // at: the ten digits of X
		want error
	}{
		{"negative", func(e *sipmsg.Edit, _ int) { e.Delete(-1, 2) }, sipmsg.ErrEditRange},
		{"backwards", func(e *sipmsg.Edit, at int) { e.Delete(at+1, at) }, sipmsg.ErrEditRange},
		{"behind the end", func(e *sipmsg.Edit, _ int) { e.Insert(size+1, "x") }, sipmsg.ErrEditRange},
		{"open behind the end", func(e *sipmsg.Edit, _ int) { e.Open(0, size+1).Str("x").Close() }, sipmsg.ErrEditRange},
		{"not closed", func(e *sipmsg.Edit, at int) { e.Open(at, at).Str("x") }, sipmsg.ErrEditOpen},
		{"closed twice", func(e *sipmsg.Edit, at int) { e.Open(at, at).Str("x").Close(); e.Close() }, sipmsg.ErrEditOpen},
		{"nested", func(e *sipmsg.Edit, at int) { e.Open(at, at); e.Insert(at, "x"); e.Close() }, sipmsg.ErrEditOpen},
		{"replace overlaps replace", func(e *sipmsg.Edit, at int) { e.ReplaceString(at, at+4, "x"); e.ReplaceString(at+3, at+6, "y") }, sipmsg.ErrEditOverlap},
		{"replace twice", func(e *sipmsg.Edit, at int) { e.ReplaceString(at, at+4, "x"); e.ReplaceString(at, at+4, "y") }, sipmsg.ErrEditOverlap},
		{"insert inside replace", func(e *sipmsg.Edit, at int) { e.ReplaceString(at, at+4, "x"); e.Insert(at+2, "y") }, sipmsg.ErrEditOverlap},
		{"insert inside delete", func(e *sipmsg.Edit, at int) { e.Insert(at+2, "y"); e.Delete(at, at+4) }, sipmsg.ErrEditOverlap},
		{"replace inside delete", func(e *sipmsg.Edit, at int) { e.Delete(at, at+4); e.ReplaceString(at+1, at+2, "x") }, sipmsg.ErrEditOverlap},
		{"delete inside replace", func(e *sipmsg.Edit, at int) { e.ReplaceString(at, at+4, "x"); e.Delete(at+1, at+2) }, sipmsg.ErrEditOverlap},
		{"too many", func(e *sipmsg.Edit, at int) {
			for range sipmsg.MaxSplices + 1 {
				e.Insert(at, "1")
			}
		}, sipmsg.ErrEditTooMany},
		{"delete inside delete", func(e *sipmsg.Edit, at int) { e.Delete(at, at+6); e.Delete(at+1, at+2); e.Delete(at+3, at+8) }, nil},
		{"neighbours", func(e *sipmsg.Edit, at int) {
			e.ReplaceString(at, at+2, "a")
			e.ReplaceString(at+2, at+4, "b")
			e.Delete(at+4, at+6)
			e.Insert(at+6, "c")
			e.Insert(at+2, "d")
		}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := edit(t, "X: 0123456789\n", func(m *sipmsg.Msg, e *sipmsg.Edit) {
				r, _ := m.HeaderNamed("X")
				tt.f(e, int(r.ValStart))
			})
			if !errors.Is(err, tt.want) {
				t.Errorf("Append = %v, want %v", err, tt.want)
			}
		})
	}
	// Reset forgets mistakes.
	m := scan(t, crlf(request))
	var e sipmsg.Edit
	e.Reset(m)
	e.Delete(-1, 0)
	if e.Err() == nil {
		t.Error("Err is nil after a mistake")
	}
	e.Reset(m)
	if out, err := e.Append(nil); err != nil || e.Err() != nil || !bytes.Equal(out, m.Bytes()) || e.Changed() {
		t.Errorf("after Reset: %v", err)
	}
}

// TestEditHostileRow: thousands of tags to remove are refused quickly, or removed when it is one run.
func TestEditHostileRow(t *testing.T) {
	if _, err := edit(t, "Require: "+strings.Repeat("sec-agree,x,", 5000)+"y\n", func(m *sipmsg.Msg, e *sipmsg.Edit) {
		e.RemoveTokens(m, sipmsg.Require, "sec-agree")
	}); !errors.Is(err, sipmsg.ErrEditTooMany) {
		t.Errorf("alternating tags: %v", err)
	}
	got, err := edit(t, "Require: "+strings.Repeat("sec-agree,", 5000)+"y\n", func(m *sipmsg.Msg, e *sipmsg.Edit) {
		e.RemoveTokens(m, sipmsg.Require, "sec-agree")
	})
	if err != nil || got != "Require: y\n" {
		t.Errorf("one run: %q, %v", got, err)
	}
}

// TestEditModel compares random edits with a byte-by-byte model.
func TestEditModel(t *testing.T) {
	m := scan(t, sipmsgtest.MOMessage())
	b := m.Bytes()
	var e sipmsg.Edit
	overlaps := 0
	for seed := range uint64(3000) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		e.Reset(m)
		before := make([]string, len(b)+1) // inserted before a byte
		text := make([]string, len(b)+1)   // replacement that starts at a byte
		gone := make([]bool, len(b)+1)
		owned := make([]bool, len(b)+1) // inside a replacement by text: bytes behind its first
		type span struct{ s, e int }
		var texts, inserts, deletes []span
		for range rnd.IntN(8) {
			s := rnd.IntN(60)
			n := 1 + rnd.IntN(12)
			switch rnd.IntN(3) {
			case 0:
				e.Insert(s, "<i>")
				before[s] += "<i>"
				inserts = append(inserts, span{s, s})
			case 1:
				e.Delete(s, s+n)
				deletes = append(deletes, span{s, s + n})
				for i := s; i < s+n; i++ {
					gone[i] = true
				}
			default:
				e.Open(s, s+n).Str("<t>").Close()
				texts = append(texts, span{s, s + n})
				text[s] = "<t>"
				for i := s; i < s+n; i++ {
					gone[i] = true
					owned[i] = true
				}
			}
		}
		conflict := false
		for i, x := range texts {
			for _, y := range append(append([]span{}, texts[i+1:]...), deletes...) {
				conflict = conflict || (x.s < y.e && y.s < x.e)
			}
		}
		for _, x := range inserts {
			for _, y := range append(append([]span{}, texts...), deletes...) {
				conflict = conflict || (y.s < x.s && x.s < y.e)
			}
		}
		got, err := e.Append(nil)
		if conflict {
			if err == nil {
				t.Fatalf("seed %d: overlap not detected", seed)
			}
			overlaps++
			continue
		}
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		var want []byte
		for i := range b {
			want = append(want, before[i]...)
			want = append(want, text[i]...)
			if !gone[i] {
				want = append(want, b[i])
			}
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("seed %d:\n%q\nwant\n%q", seed, got, want)
		}
	}
	if overlaps == 0 || overlaps > 2900 {
		t.Errorf("%d of 3000 edits overlap: the test is lopsided", overlaps)
	}
}

// TestForward makes the edits of the benchmarks and looks at the result.
func TestForward(t *testing.T) {
	f := newForwarder()
	out, err := f.forward(sipmsgtest.SM1())
	if err != nil {
		t.Fatal(err)
	}
	m := scan(t, out)
	if m.Has(sipmsg.Require) || m.Has(sipmsg.ProxyRequire) || m.Has(sipmsg.SecurityClient) {
		t.Errorf("sec-agree is left:\n%s", out)
	}
	get(t, m, sipmsg.MaxForwards, "69")
	get(t, m, sipmsg.Via, "SIP/2.0/UDP 10.0.1.5:5060;branch=z9hG4bK000000000000000a")
	get(t, m, sipmsg.Path, "<sip:f-7c1e@10.0.1.5:5060;lr>")
	last, _ := m.Last(sipmsg.Via)
	if got := string(m.Value(last)); got != "SIP/2.0/UDP 10.45.0.7:5060;branch=z9hG4bKsm1;rport=6301;received=10.45.0.7" {
		t.Errorf("Via of the UE = %q", got)
	}
	out, err = f.forward(sipmsgtest.MOMessage())
	if err != nil {
		t.Fatal(err)
	}
	m = scan(t, out)
	get(t, m, sipmsg.Route, "<"+sipmsgtest.RouteURI+">")
	if string(m.Body()) != "hello" {
		t.Errorf("body = %q", m.Body())
	}
}
