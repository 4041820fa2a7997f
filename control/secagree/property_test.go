package secagree

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/gmgate/gmgate/control/ims"
)

func genServer(t *rapid.T) Server {
	perm := rapid.Permutation(ims.Suites()).Draw(t, "suites")
	return Server{
		SPIC:   ims.SPI(rapid.Uint32Range(1, 1<<31).Draw(t, "spi-c")),
		SPIS:   ims.SPI(rapid.Uint32Range(1<<31+1, 1<<32-1).Draw(t, "spi-s")),
		PortC:  rapid.Uint16Range(1, 30000).Draw(t, "port-c"),
		PortS:  rapid.Uint16Range(30001, 65535).Draw(t, "port-s"),
		Suites: perm[:rapid.IntRange(1, len(perm)).Draw(t, "n")],
	}
}

// TestServerRoundTrip: what we write is what we read back, q strictly decreasing.
func TestServerRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := genServer(t)
		l, err := Parse(string(s.Append(nil)))
		if err != nil {
			t.Fatal(err)
		}
		if len(l.Mechanisms) != len(s.Suites) || l.IPsecCount() != len(s.Suites) {
			t.Fatalf("%d mechanisms, want %d", len(l.Mechanisms), len(s.Suites))
		}
		last := uint16(MaxQ + 1)
		for i := range l.Mechanisms {
			m := &l.Mechanisms[i]
			if m.Suite() != s.Suites[i] || m.SPIC != s.SPIC || m.SPIS != s.SPIS || m.PortC != s.PortC || m.PortS != s.PortS ||
				m.Prot != ProtESP || m.Mod != ModTrans || !m.Usable() || len(m.Params) != 0 {
				t.Fatalf("entry %d of %s: %s, %v", i, s.Append(nil), m, m.Problem())
			}
			if !m.HasQ || m.Q >= last {
				t.Fatalf("R2.13 q %d after %d", m.Q, last)
			}
			last = m.Q
		}
		if l.String() != string(s.Append(nil)) {
			t.Fatalf("canonical text %s is not what was written", l)
		}
	})
}

// TestManySuitesKeepQDecreasing covers lists longer than today's algorithms could fill.
func TestManySuitesKeepQDecreasing(t *testing.T) {
	for n := 1; n <= MaxMechanisms; n++ {
		s := Server{SPIC: 1, SPIS: 2, PortC: 3, PortS: 4, Suites: slices.Repeat([]ims.Suite{sha1AES}, n)}
		l := mustParse(t, string(s.Append(nil)))
		last := uint16(MaxQ + 1)
		for i := range l.Mechanisms {
			if q := l.Mechanisms[i].Q; q >= last || q == 0 {
				t.Fatalf("n = %d: q %d after %d", n, q, last)
			}
			last = l.Mechanisms[i].Q
		}
	}
}

// TestChoiceCoincides: whatever the styles and lists, the UE that takes the most preferred entry of Security-Server
// among those it offered arrives at our choice (R2.13).
func TestChoiceCoincides(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		all := ims.Suites()
		subset := func(name string) []ims.Suite {
			p := rapid.Permutation(all).Draw(t, name)
			return p[:rapid.IntRange(1, len(p)).Draw(t, name+" n")]
		}
		ours, offered := subset("ours"), subset("offered")
		var rows []string
		for i, s := range offered {
			row := fmt.Sprintf("ipsec-3gpp;alg=%s;ealg=%s%s", s.Alg, s.Enc, tail)
			if rapid.IntRange(0, 4).Draw(t, "broken") == 0 {
				row = strings.Replace(row, "port-c=6301", "port-c=0", 1)
			}
			if i > 0 && rapid.Bool().Draw(t, "join") {
				rows[len(rows)-1] += "," + row
				continue
			}
			rows = append(rows, row)
		}
		client, err := Parse(rows...)
		if err != nil {
			t.Fatal(err)
		}
		o, err := Select(client, ours)
		if err != nil {
			return
		}
		srv := Server{SPIC: 1, SPIS: 2, PortC: 3, PortS: 4, Suites: ServerSuites(o.Suite, ours, client, rapid.Bool().Draw(t, "list"))}
		answer, err := Parse(string(srv.Append(nil)))
		if err != nil {
			t.Fatal(err)
		}
		var ue *Mechanism
		for i := range answer.Mechanisms {
			m := &answer.Mechanisms[i]
			if slices.Contains(offered, m.Suite()) && (ue == nil || m.Preference() > ue.Preference()) {
				ue = m
			}
		}
		if ue == nil || ue.Suite() != o.Suite {
			t.Fatalf("we chose %s, the UE %v from %s", o.Suite, ue, answer)
		}
	})
}

// layout prints the mechanisms of a canonical list in another way that means the same.
func layout(t *rapid.T, l List) []string {
	space := func() string {
		return rapid.SampledFrom([]string{"", "", " ", "\t", "  ", "\r\n ", "\n\t"}).Draw(t, "lws")
	}
	letterCase := func(s string) string {
		if rapid.Bool().Draw(t, "upper") {
			return strings.ToUpper(s)
		}
		return s
	}
	var rows []string
	for i := range l.Mechanisms {
		m := &l.Mechanisms[i]
		text := space() + letterCase(m.Name) + space()
		ps := slices.Clone(m.canon)
		ps = rapid.Permutation(ps).Draw(t, "params")
		for _, p := range ps {
			v := p.Value
			known := rank(p.Name) < len(order)
			switch {
			case m.Name == IPsec && v == "null" && p.Name == paramEncAlg, m.Name == IPsec && v == "esp" && p.Name == paramProt, m.Name == IPsec && v == "trans" && p.Name == paramMod:
				if rapid.Bool().Draw(t, "omit default") {
					continue
				}
			}
			switch {
			case p.Name == paramQ && rapid.Bool().Draw(t, "q zeros"):
				if !strings.Contains(v, ".") {
					v += "."
				}
				v += "0"
			case m.Name == IPsec && isDigits(v) && known && p.Name != paramQ:
				v = strings.Repeat("0", rapid.IntRange(0, 3).Draw(t, "zeros")) + v
			case m.Name == IPsec && slices.Contains([]string{paramAlg, paramEncAlg, paramProt, paramMod}, p.Name):
				v = letterCase(v)
			}
			text += ";" + space() + letterCase(p.Name)
			if !p.HasValue {
				text += space()
				continue
			}
			if isToken(v) && rapid.Bool().Draw(t, "quote") {
				v = `"` + v + `"`
			} else {
				v = string(appendValue(nil, v))
			}
			text += space() + "=" + space() + v + space()
		}
		if rapid.Bool().Draw(t, "semicolon") {
			text += ";" + space()
		}
		if i > 0 && rapid.Bool().Draw(t, "join") {
			rows[len(rows)-1] += "," + text
		} else {
			rows = append(rows, text)
		}
	}
	return rows
}

func genList(t *rapid.T) List {
	var rows []string
	n := rapid.IntRange(0, 6).Draw(t, "mechanisms")
	for i := range n {
		var b strings.Builder
		b.WriteString(rapid.SampledFrom([]string{IPsec, IPsec, IPsec, "tls", "null"}).Draw(t, "name"))
		fmt.Fprintf(&b, ";n=%d", i) // no two alike, so that rows can be told apart
		if rapid.Bool().Draw(t, "q") {
			b.WriteString(";q=")
			b.Write(appendQ(nil, rapid.Uint16Range(0, MaxQ).Draw(t, "q value")))
		}
		for _, p := range []struct {
			name   string
			values []string
		}{
			{"alg", []string{"hmac-md5-96", "hmac-sha-1-96", "null", "aes-gmac", "sha-256", ""}},
			{"ealg", []string{"null", "aes-cbc", "aes-gcm", "des-ede3-cbc"}},
			{"prot", []string{"esp", "ah"}},
			{"mod", []string{"trans", "tun", "UDP-enc-tun"}},
			{"spi-c", []string{"0", "1", "4711", "4294967295", "4294967296", "x"}},
			{"spi-s", []string{"2", "4712", "3963789886"}},
			{"port-c", []string{"0", "6301", "65536"}},
			{"port-s", []string{"6300", "6301"}},
			{"vendor", []string{"a b", "", `q"\`, "x,y;z", "Token"}},
		} {
			if rapid.IntRange(0, 5).Draw(t, p.name+"?") > 0 {
				b.WriteString(";" + p.name + "=")
				b.Write(appendValue(nil, rapid.SampledFrom(p.values).Draw(t, p.name)))
			}
		}
		rows = append(rows, b.String())
	}
	l, err := Parse(rows...)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// TestEqualProperties: Equal is reflexive, does not see the layout, allows rows to move, and sees every changed entry.
func TestEqualProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := genList(t)
		if err := Equal(l, l); err != nil {
			t.Fatalf("not reflexive: %v", err)
		}
		rows := layout(t, l)
		other, err := Parse(rows...)
		if err != nil {
			t.Fatal(err)
		}
		if err := Equal(l, other); err != nil {
			t.Fatalf("Equal(%q, %q) = %v", l, rows, err)
		}
		if other.String() != l.String() {
			t.Fatalf("canonical texts differ:\n%s\n%s", l, other)
		}
		moved, err := Parse(rapid.Permutation(rows).Draw(t, "rows")...)
		if err != nil {
			t.Fatal(err)
		}
		if err := Equal(other, moved); err != nil {
			t.Fatalf("rows of %q moved: %v", rows, err)
		}
		if err := Equal(moved, other); err != nil {
			t.Fatalf("not symmetric: %v", err)
		}
		if len(rows) > 0 {
			i := rapid.IntRange(0, len(rows)-1).Draw(t, "changed row")
			changed := slices.Clone(rows)
			changed[i] += ";changed"
			c, err := Parse(changed...)
			if err != nil {
				t.Fatal(err)
			}
			if Equal(l, c) == nil || Equal(c, l) == nil {
				t.Fatalf("Equal does not see the change in %q", changed)
			}
		}
	})
}
