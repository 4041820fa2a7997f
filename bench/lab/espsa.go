package lab

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/gmgate/gmgate/control/ims"
)

// SA is one one-way security association for Wireshark's table.
type SA struct {
	Src, Dst netip.Addr
	SPI      ims.SPI
	Keys     ims.ESPKeys
}

// Names of the columns "encryption" and "authentication" in Wireshark's esp_sa table.
const (
	wsNull      = "NULL"
	wsAESCBC    = "AES-CBC [RFC3602]"
	wsTripleDES = "TripleDES-CBC [RFC2451]"
	wsAESGCM    = "AES-GCM with 16 octet ICV [RFC4106]"
	wsHMACMD5   = "HMAC-MD5-96 [RFC2403]"
	wsHMACSHA1  = "HMAC-SHA-1-96 [RFC2404]"
	wsAny128    = "ANY 128 bit authentication [no checking]"
	noKey       = "0x"
)

// AppendEspSA appends the row of an SA to a Wireshark esp_sa table: eight quoted columns, which every version reads.
// It holds the keys in clear and belongs into files of tests only. Wireshark does not know AES-GMAC: its row lets the
// packets be recognised as authenticated null encryption, but the IV of 8 octets stays in front of the payload.
func AppendEspSA(dst []byte, sa SA) ([]byte, error) {
	family := "IPv4"
	if sa.Src.Is6() {
		family = "IPv6"
	}
	var enc, auth string
	encKey, authKey := noKey, noKey
	key := func(parts ...[]byte) string {
		var s strings.Builder
		s.WriteString(noKey)
		for _, p := range parts {
			s.WriteString(hex.EncodeToString(p))
		}
		return s.String()
	}
	switch k := sa.Keys; k.Suite.Enc {
	case ims.EncNull:
		enc = wsNull
	case ims.EncAESCBC:
		enc, encKey = wsAESCBC, key(k.Enc)
	case ims.EncDESEDE3CBC:
		enc, encKey = wsTripleDES, key(k.Enc)
	case ims.EncAESGCM:
		enc, encKey = wsAESGCM, key(k.Enc, k.Salt[:]) // RFC 4106 §8.1: the salt follows the key
	default:
		return dst, fmt.Errorf("write esp_sa row: no such encryption %s", k.Suite.Enc)
	}
	switch k := sa.Keys; k.Suite.Alg {
	case ims.AlgHMACMD5:
		auth, authKey = wsHMACMD5, key(k.Auth)
	case ims.AlgHMACSHA1:
		auth, authKey = wsHMACSHA1, key(k.Auth)
	case ims.AlgNull:
		auth = wsNull
	case ims.AlgAESGMAC:
		auth = wsAny128
	default:
		return dst, fmt.Errorf("write esp_sa row: no such integrity algorithm %s", k.Suite.Alg)
	}
	return fmt.Appendf(dst, "%q,%q,%q,%q,%q,%q,%q,%q\n",
		family, sa.Src, sa.Dst, sa.SPI, enc, encKey, auth, authKey), nil
}

// EspSA appends rows to the esp_sa table beside the capture file (FILE.esp_sa), so that Wireshark can decrypt it. A
// capture without a file ignores it.
func (c *Capture) EspSA(sas ...SA) error {
	if c.path == "" {
		return nil
	}
	var rows []byte
	for _, sa := range sas {
		var err error
		if rows, err = AppendEspSA(rows, sa); err != nil {
			return err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	f, err := os.OpenFile(c.path+".esp_sa", os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("write esp_sa table: %w", err)
	}
	if _, err = f.Write(rows); err != nil {
		_ = f.Close()
		return fmt.Errorf("write esp_sa table: %w", err)
	}
	return f.Close()
}
