package ims

import (
	"fmt"
	"log/slog"
)

// redacted is what every formatting of a key prints.
const redacted = "[redacted]"

// Key is secret key material (CK, IK or a key derived from them). However it is formatted, logged or marshalled, it
// prints as "[redacted]": keys never reach logs, metrics or error texts.
type Key []byte

// Format implements fmt.Formatter for every verb and flag, %x included.
func (k Key) Format(s fmt.State, _ rune) { _, _ = s.Write([]byte(redacted)) }

// String implements fmt.Stringer.
func (k Key) String() string { return redacted }

// GoString implements fmt.GoStringer.
func (k Key) GoString() string { return redacted }

// LogValue implements slog.LogValuer.
func (k Key) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText implements encoding.TextMarshaler, which JSON and YAML encoders honour.
func (k Key) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// MarshalJSON implements json.Marshaler, since a byte slice would otherwise be printed as base64.
func (k Key) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// Zero overwrites the key in place.
func (k Key) Zero() { clear(k) }

// Clone returns a copy that does not share memory with k.
func (k Key) Clone() Key { return append(Key(nil), k...) }

// ESPKeys is the key material of one SA set after expansion (TS 33.203 Annex I). The same keys protect all four SAs.
type ESPKeys struct {
	Suite Suite
	Salt  [4]byte // nonce salt of aes-gcm and aes-gmac, zero for the others
	Enc   Key     // confidentiality key; empty for null encryption
	Auth  Key     // integrity key; empty when the cipher itself authenticates (aes-gcm)
}

// Format implements fmt.Formatter: only the suite is printed, the salt is secret as well.
func (k ESPKeys) Format(s fmt.State, _ rune) {
	_, _ = fmt.Fprintf(s, "{%s %s}", k.Suite, redacted)
}

// LogValue implements slog.LogValuer.
func (k ESPKeys) LogValue() slog.Value { return slog.StringValue(k.Suite.String()) }

// MarshalJSON implements json.Marshaler.
func (k ESPKeys) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// Zero overwrites the keys in place.
func (k *ESPKeys) Zero() {
	k.Enc.Zero()
	k.Auth.Zero()
	clear(k.Salt[:])
}

// Clone returns a copy that does not share memory with k.
func (k ESPKeys) Clone() ESPKeys {
	return ESPKeys{Suite: k.Suite, Enc: k.Enc.Clone(), Auth: k.Auth.Clone(), Salt: k.Salt}
}
