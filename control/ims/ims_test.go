package ims

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
)

// Keys print as [redacted] however they are formatted, alone and inside of what holds them.
//
// Peers: A1.30b
func TestKeysNeverPrint(t *testing.T) {
	secret := Key("\xb4\x0b\xa9\xa3secretsecret")
	keys := ESPKeys{Suite: Suite{AlgHMACSHA1, EncAESCBC}, Enc: secret, Auth: secret, Salt: [4]byte{'s', 'a', 'l', 't'}}
	holder := struct {
		Name string
		Key  Key
		Keys ESPKeys
		Ptr  *ESPKeys
	}{"x", secret, keys, &keys}
	var out bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "% x", "%08b"} {
		for _, v := range []any{secret, keys, &keys, holder} {
			_, _ = fmt.Fprintf(&out, verb+"\n", v)
		}
	}
	for _, h := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
		slog.New(h).Info("test", "key", secret, "keys", keys, "holder", holder)
	}
	for _, v := range []any{secret, keys, holder} {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		out.Write(b)
	}
	text := strings.ToLower(out.String())
	for _, leak := range []string{"secret", "736563", "b40b", "180 11 169", "salt", "73616c74", "115 97 108 116", "c2vjcmv0"} {
		if strings.Contains(text, leak) {
			t.Errorf("%q stands in the output:\n%s", leak, text)
		}
	}
	if n := strings.Count(text, "redacted"); n < 40 {
		t.Errorf("only %d values are marked as redacted", n)
	}
}

func TestZeroAndClone(t *testing.T) {
	k := ESPKeys{Enc: Key{1, 2}, Auth: Key{3}, Salt: [4]byte{4}}
	c := k.Clone()
	k.Zero()
	if k.Enc[0] != 0 || k.Auth[0] != 0 || k.Salt[0] != 0 {
		t.Error("not zeroed")
	}
	if c.Enc[0] != 1 || c.Auth[0] != 3 || c.Salt[0] != 4 {
		t.Error("the copy shares memory")
	}
}

// R2.8: the legal pairs, and no other.
func TestSuites(t *testing.T) {
	legal := map[string]bool{
		"hmac-md5-96=null": true, "hmac-md5-96=des-ede3-cbc": true, "hmac-md5-96=aes-cbc": true,
		"hmac-sha-1-96=null": true, "hmac-sha-1-96=des-ede3-cbc": true, "hmac-sha-1-96=aes-cbc": true,
		"aes-gmac=null": true, "null=aes-gcm": true,
	}
	n := 0
	for a := AlgHMACMD5; a <= AlgNull; a++ {
		for e := EncNull; e <= EncAESGCM; e++ {
			s := Suite{a, e}
			if s.Legal() != legal[s.String()] {
				t.Errorf("%v is legal: %v", s, s.Legal())
			}
			got, err := ParseSuite(strings.ToUpper(" " + s.String() + " "))
			if s.Legal() && (err != nil || got != s) || !s.Legal() && err == nil {
				t.Errorf("ParseSuite(%v) = %v, %v", s, got, err)
			}
			if s.Legal() {
				n++
			}
			if want := a == AlgHMACMD5 || e == EncDESEDE3CBC; s.Deprecated() != want {
				t.Errorf("%v is deprecated: %v", s, s.Deprecated())
			}
		}
	}
	if n != len(legal) || len(Suites()) != n {
		t.Errorf("%d legal pairs, %d listed", n, len(Suites()))
	}
	for _, bad := range []string{"", "null", "x=null", "null=x", "=", "hmac-sha-1-96=aes-cbc=x"} {
		if s, err := ParseSuite(bad); err == nil {
			t.Errorf("%q reads as %v", bad, s)
		}
	}
}

// Unknown values of enumerations are printed as numbers.
func TestUnknownValues(t *testing.T) {
	for _, s := range []fmt.Stringer{Alg(0), Alg(99), EncAlg(0), EncAlg(99), Transport(9), Side(9)} {
		if !strings.Contains(s.String(), "(") {
			t.Errorf("%T prints %s", s, s)
		}
	}
}

// T16: SPIs are unsigned everywhere.
func TestSPI(t *testing.T) {
	for spi, want := range map[SPI][2]string{
		4294967295: {"4294967295", "0xffffffff"}, 256: {"256", "0x00000100"}, 3963789885: {"3963789885", "0xec42a23d"},
	} {
		if spi.Decimal() != want[0] || spi.String() != want[1] {
			t.Errorf("%d prints %s and %s", uint32(spi), spi.Decimal(), spi)
		}
	}
}

func TestHop(t *testing.T) {
	h := Hop{netip.MustParseAddrPort("[2001:db8::1]:5060"), TCP}
	if !h.IsValid() || (Hop{}).IsValid() || h.String() != "[2001:db8::1]:5060;transport=tcp" {
		t.Errorf("%v", h)
	}
}
