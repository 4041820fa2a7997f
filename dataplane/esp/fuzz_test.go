package esp

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/gmgate/gmgate/control/ims"
)

// FuzzOpen gives arbitrary octets to Open, as a packet and as a payload. What Open accepts must be what Seal makes of
// the result.
func FuzzOpen(f *testing.F) {
	for _, v := range packetVectors {
		f.Add(uint8(suiteIndex(v.suite)), espOf(f, v.packet))
	}
	f.Fuzz(func(t *testing.T, suite uint8, data []byte) {
		s := ims.Suites()[int(suite)%len(ims.Suites())]
		o, in := pair(t, s, 0)
		pkt := bytes.Clone(data)
		if payload, next, err := in.Open(pkt); err == nil {
			iv := data[8:in.HeadLen()]
			spi, _ := PacketSPI(data)
			if spi != testSPI {
				t.Fatalf("packet of SPI %s accepted", spi)
			}
			again := sealWith(o, nil, payload, next, binary.BigEndian.Uint32(data[4:]), iv)
			if len(again) == len(data) && !bytes.Equal(again, data) {
				t.Fatalf("accepted %x, sealed again %x", data, again)
			}
			if _, _, err := in.Open(bytes.Clone(data)); err != ErrReplay {
				t.Fatalf("accepted twice: %v", err)
			}
		}
		_, in = pair(t, s, 0)
		sealed, err := o.Seal(nil, data, suite)
		if err != nil {
			t.Fatal(err)
		}
		if len(data) > 0 { // one changed octet
			bad := bytes.Clone(sealed)
			bad[int(data[0])%len(bad)] ^= 1 + suite&0x7f
			if _, _, err := in.Open(bad); err == nil {
				t.Fatal("changed packet accepted")
			}
		}
		payload, next, err := in.Open(sealed)
		if err != nil || next != suite || !bytes.Equal(payload, data) {
			t.Fatalf("open = %x, %d, %v, want %x, %d", payload, next, err, data, suite)
		}
	})
}

func suiteIndex(s ims.Suite) int {
	for i, x := range ims.Suites() {
		if x == s {
			return i
		}
	}
	return -1
}
