package esp

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha1"
	"encoding/hex"
	"testing"

	"github.com/gmgate/gmgate/control/ims"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatalf("decode test vector: %v", err)
	}
	return b
}

// CK and IK of TS 35.208 test set 1 and the salts that TS 33.203 Annex I derives from them.
const (
	ckSet1    = "b40ba9a3c58b2a05bbf0d987b21bf8cb"
	ikSet1    = "f769bcd751044604127672711c6d3441"
	saltGMAC1 = "dbc2b1c2"
	saltGCM1  = "89273db6"
)

// set1Keys returns the keys of test set 1 for a suite, expanded by hand.
func set1Keys(t testing.TB, s ims.Suite) ims.ESPKeys {
	t.Helper()
	ck, ik := unhex(t, ckSet1), unhex(t, ikSet1)
	k := ims.ESPKeys{Suite: s}
	switch s.Enc {
	case ims.EncAESCBC:
		k.Enc = ck
	case ims.EncDESEDE3CBC:
		k.Enc = append(bytes.Clone(ck), ck[:8]...)
	case ims.EncAESGCM:
		k.Enc, k.Salt = ck, [4]byte(unhex(t, saltGCM1))
	case ims.EncNull:
	}
	switch s.Alg {
	case ims.AlgHMACMD5:
		k.Auth = ik
	case ims.AlgHMACSHA1:
		k.Auth = append(bytes.Clone(ik), 0, 0, 0, 0)
	case ims.AlgAESGMAC:
		k.Auth, k.Salt = ik, [4]byte(unhex(t, saltGMAC1))
	case ims.AlgNull:
	}
	return k
}

// packetVectors are whole IP packets with the keys of test set 1, computed independently of this package.
var packetVectors = []struct {
	name   string
	suite  ims.Suite
	spi    ims.SPI
	iv     string
	inner  string
	packet string
}{
	{
		"W1",
		ims.Suite{Alg: ims.AlgHMACMD5, Enc: ims.EncNull},
		0x40000050, "", "189d17d4000ca1180d0a0d0a",
		"45000038000140004032265b0a2d00070a0000054000005000000001189d17d4000ca1180d0a0d0a010202110f29d03e3705cc81c5f3dc0b",
	},
	{
		"W2",
		ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncNull},
		0x40000050, "", "189d17d4000ca1180d0a0d0a",
		"45000038000140004032265b0a2d00070a0000054000005000000001189d17d4000ca1180d0a0d0a01020211422428f253fa55c63a3e1412",
	},
	{
		"W3",
		ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC},
		0x40000050, "000102030405060708090a0b0c0d0e0f", "189d17d4000ca1180d0a0d0a",
		"45000048000140004032264b0a2d00070a0000054000005000000001000102030405060708090a0b0c0d0e0f2a866091194ca606715f7e9b41d2ecd44ea8fb9749f3dac646557e85",
	},
	{
		"W4",
		ims.Suite{Alg: ims.AlgHMACMD5, Enc: ims.EncAESCBC},
		0x40000050, "000102030405060708090a0b0c0d0e0f", "189d17d4000ca1180d0a0d0a",
		"45000048000140004032264b0a2d00070a0000054000005000000001000102030405060708090a0b0c0d0e0f2a866091194ca606715f7e9b41d2ecd4f4914c6d0211e9c16efaab75",
	},
	{
		"W5",
		ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncDESEDE3CBC},
		0x40000050, "0001020304050607", "189d17d4000ca1180d0a0d0a",
		"4500004000014000403226530a2d00070a000005400000500000000100010203040506076f5c65e80b0b890131579941085ec8d789d77f2de6bb3deb1b2945cb",
	},
	{
		"W6",
		ims.Suite{Alg: ims.AlgNull, Enc: ims.EncAESGCM},
		0x40000050, "0000000000000001", "189d17d4000ca1180d0a0d0a",
		"45000044000140004032264f0a2d00070a00000540000050000000010000000000000001b38cd6fe54385cf1f8c5f0e20f785663cd355da7b1aceb85583644aa333ac2d9",
	},
	{
		"W7",
		ims.Suite{Alg: ims.AlgAESGMAC, Enc: ims.EncNull},
		0x40000050, "0000000000000001", "189d17d4000ca1180d0a0d0a",
		"45000044000140004032264f0a2d00070a00000540000050000000010000000000000001189d17d4000ca1180d0a0d0a01020211fe31e9ab0edb15a9b55045fdc93bd82b",
	},
	{
		"W8",
		ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncNull},
		0xec42a23e, "", "17df189c000ca10e0d0a0d0a",
		"45000038000140004032265b0a0000050a2d0007ec42a23e0000000117df189c000ca10e0d0a0d0a0102021127b66e7a9709b580da859a08",
	},
	{
		"W9",
		ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC},
		0xec42a23e, "000102030405060708090a0b0c0d0e0f", "17df189c000ca10e0d0a0d0a",
		"45000048000140004032264b0a0000050a2d0007ec42a23e00000001000102030405060708090a0b0c0d0e0f70d99f6f1bcc6f44a514464f55ce1564d3911481409d0ad2cb3f0966",
	},
	{
		"W10",
		ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncNull},
		0x40000050, "", "189d17d4000c598e0d0a0d0a",
		"600000000024324020010db800450000000000000000000720010db80000000000000000000000054000005000000001189d17d4000c598e0d0a0d0a010202115b80da0022ff0a33d2e950f0",
	},
}

// espOf cuts the IP header off a vector.
func espOf(t testing.TB, packet string) []byte {
	b := unhex(t, packet)
	if b[0]>>4 == 6 {
		return b[40:]
	}
	return b[20:]
}

// Peers: A3.07a
func TestPacketVectors(t *testing.T) {
	for _, v := range packetVectors {
		t.Run(v.name, func(t *testing.T) {
			want, inner := espOf(t, v.packet), unhex(t, v.inner)
			o, err := NewOutbound(v.spi, set1Keys(t, v.suite))
			if err != nil {
				t.Fatal(err)
			}
			if got := sealWith(o, nil, inner, 17, 1, unhex(t, v.iv)); !bytes.Equal(got, want) {
				t.Errorf("seal:\n got %x\nwant %x", got, want)
			}
			in, err := NewInbound(v.spi, set1Keys(t, v.suite), 0)
			if err != nil {
				t.Fatal(err)
			}
			got, next, err := in.Open(bytes.Clone(want))
			if err != nil || next != 17 || !bytes.Equal(got, inner) {
				t.Errorf("open = %x, %d, %v, want %x, 17, nil", got, next, err, inner)
			}
			if _, _, err := in.Open(bytes.Clone(want)); err != ErrReplay {
				t.Errorf("open again = %v, want ErrReplay", err)
			}
		})
	}
}

// sealWith seals with a given sequence number and IV.
func sealWith(o *Outbound, dst, payload []byte, next byte, seq uint32, iv []byte) []byte {
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	return o.seal(s, dst, payload, next, seq, iv)
}

// TestRFC3602 checks case 5 of RFC 3602 §4, which has no ICV: the cipher text is compared with the RFC and the ICV with
// crypto/hmac.
func TestRFC3602(t *testing.T) {
	iv := unhex(t, "e96e8c08ab465763fd098d45dd3ff893")
	plain := unhex(t, "08000ebda70a00008e9c083db95b070008090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f3031323334353637")
	cipher := unhex(t, "f663c25d325c18c6a9453e194e120849a4870b66cc6b9965330013b4898dc856a4699e523a55db080b59ec3a8e4b7e52775b07d1db34ed9c538ab50c551b874aa269add047ad2d5913ac19b7cfbad4a6")
	keys := ims.ESPKeys{
		Suite: ims.Suite{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC},
		Enc:   unhex(t, "90d382b410eeba7ad938c46cec1a82bf"), Auth: bytes.Repeat([]byte{0x5a}, 20),
	}
	o, err := NewOutbound(0x4321, keys)
	if err != nil {
		t.Fatal(err)
	}
	want := append(unhex(t, "0000432100000001"), iv...)
	want = append(want, cipher...)
	mac := hmac.New(sha1.New, keys.Auth)
	mac.Write(want)
	want = append(want, mac.Sum(nil)[:12]...)
	if got := sealWith(o, nil, plain, 1, 1, iv); !bytes.Equal(got, want) {
		t.Errorf("seal:\n got %x\nwant %x", got, want)
	}
	openVector(t, 0x4321, keys, want, plain, 1)
}

// TestRFC4106 checks a vector of draft-mcgrew-gcm-test; its plain text ends with pad length 0 and next header 1.
func TestRFC4106(t *testing.T) {
	plain := unhex(t, "4500003e698f000080114dccc0a80102c0a801010a980035002a2343b2d001000001000000000000037369700963796265726369747902646b00000100010001")
	out := unhex(t, "deb22cd9b07c72c16e3a65beeb8df304a5a5897d33ae530f1ba76d5d114d2a5c3de81827c10e9a4f51330d0eec416642cfbb85a5b47e48a4ec3b9ba95d918bd183b70d3aa8bc6ee4c309e9d85a41ad4a")
	iv := unhex(t, "facedbaddecaf888")
	keys := ims.ESPKeys{
		Suite: ims.Suite{Alg: ims.AlgNull, Enc: ims.EncAESGCM},
		Enc:   unhex(t, "feffe9928665731c6d6a8f9467308308"), Salt: [4]byte(unhex(t, "cafebabe")),
	}
	o, err := NewOutbound(0xa5f8, keys)
	if err != nil {
		t.Fatal(err)
	}
	want := append(append(unhex(t, "0000a5f80000000a"), iv...), out...)
	if got := sealWith(o, nil, plain[:62], plain[63], 10, iv); !bytes.Equal(got, want) {
		t.Errorf("seal:\n got %x\nwant %x", got, want)
	}
	openVector(t, 0xa5f8, keys, want, plain[:62], 1)
}

// TestRFC4543 checks the GMAC vector of draft-mcgrew-gcm-test: the IV is covered by the ICV.
func TestRFC4543(t *testing.T) {
	payload := unhex(t, "45000030da3a00008001df3bc0a80005c0a800010800c6cd020007006162636465666768696a6b6c6d6e6f7071727374")
	iv := make([]byte, 8)
	keys := ims.ESPKeys{
		Suite: ims.Suite{Alg: ims.AlgAESGMAC, Enc: ims.EncNull},
		Auth:  unhex(t, "4c80cdefbb5d10da906ac73c3613a634"), Salt: [4]byte(unhex(t, "22433c64")),
	}
	o, err := NewOutbound(0x4321, keys)
	if err != nil {
		t.Fatal(err)
	}
	want := append(unhex(t, "00004321000000070000000000000000"), payload...)
	want = append(want, unhex(t, "01020201f2a9a836e155106aa8dcd618e4099aaa")...)
	if got := sealWith(o, nil, payload, 1, 7, iv); !bytes.Equal(got, want) {
		t.Errorf("seal:\n got %x\nwant %x", got, want)
	}
	openVector(t, 0x4321, keys, want, payload, 1)
}

func openVector(t *testing.T, spi ims.SPI, keys ims.ESPKeys, pkt, want []byte, wantNext byte) {
	t.Helper()
	in, err := NewInbound(spi, keys, 0)
	if err != nil {
		t.Fatal(err)
	}
	got, next, err := in.Open(bytes.Clone(pkt))
	if err != nil || next != wantNext || !bytes.Equal(got, want) {
		t.Errorf("open = %x, %d, %v, want %x, %d, nil", got, next, err, want, wantNext)
	}
}
