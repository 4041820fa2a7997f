package aka

import (
	"encoding/hex"
	"errors"
	"testing"

	"github.com/gmgate/gmgate/control/ims"
)

// vectors are CK and IK of the Milenage test sets of TS 35.208 (and 35.207 #2) with the salts of TS 33.203 Annex I.
var vectors = []struct {
	name, ck, ik, gmac, gcm string
}{
	{"35.208 #1", "b40ba9a3c58b2a05bbf0d987b21bf8cb", "f769bcd751044604127672711c6d3441", "dbc2b1c2", "89273db6"},
	{"35.208 #3", "5dbdbb2954e8f3cde665b046179a5098", "59a92d3b476a0443487055cf88b2307b", "bcf31f7f", "2a196eb0"},
	{"35.208 #4", "e203edb3971574f5a94b0d61b816345d", "0c4524adeac041c4dd830d20854fc46b", "17077c95", "e6920056"},
	{"35.208 #5", "7657766b373d1c2138f307e3de9242f9", "1c42e960d89b8fa99f2744e0708ccb53", "f3cc61bb", "a4894cf9"},
	{"35.208 #6", "3f8c7587fe8e4b233af676aede30ba3b", "a7466cc1e6b2a1337d49d3b66e95d7b4", "1b3a95e4", "e834fe3c"},
	{"35.207 #2", "58c433ff7a7082acd424220f2b67c556", "21a8c1f929702adb3e738488b9f5c5da", "33007a51", "c61c17a9"},
	{"35.208 #1 with the RAND of #3", "b41f4f3fae6be7aa5692a4aff3b83783", "35d493df8c2e34b5608d4122245a98ec", "6734e8eb", "4b6ef5d7"},
}

// Peers: A3.07a, B2.07
func TestExpand(t *testing.T) {
	suite := func(text string) ims.Suite {
		s, err := ims.ParseSuite(text)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	for _, v := range vectors {
		const none = "00000000"
		des := v.ck + v.ck[:16]
		sha := v.ik + "00000000"
		for _, tt := range []struct{ suite, enc, auth, salt string }{
			{"null=aes-gcm", v.ck, "", v.gcm},
			{"aes-gmac=null", "", v.ik, v.gmac},
			{"hmac-sha-1-96=aes-cbc", v.ck, sha, none},
			{"hmac-sha-1-96=des-ede3-cbc", des, sha, none},
			{"hmac-sha-1-96=null", "", sha, none},
			{"hmac-md5-96=aes-cbc", v.ck, v.ik, none},
			{"hmac-md5-96=des-ede3-cbc", des, v.ik, none},
			{"hmac-md5-96=null", "", v.ik, none},
		} {
			t.Run("R3.1 "+v.name+" "+tt.suite, func(t *testing.T) {
				ck, ik := unhex(t, v.ck), unhex(t, v.ik)
				k, err := Expand(suite(tt.suite), ck, ik)
				if err != nil {
					t.Fatal(err)
				}
				// Keys print as redacted, so they are compared as plain bytes.
				if got := hex.EncodeToString([]byte(k.Enc)); got != tt.enc {
					t.Errorf("Enc = %s, want %s", got, tt.enc)
				}
				if got := hex.EncodeToString([]byte(k.Auth)); got != tt.auth {
					t.Errorf("Auth = %s, want %s", got, tt.auth)
				}
				if got := hex.EncodeToString(k.Salt[:]); got != tt.salt {
					t.Errorf("Salt = %s, want %s", got, tt.salt)
				}
				if k.Suite != suite(tt.suite) {
					t.Errorf("Suite = %s", k.Suite)
				}
				k.Zero()
				if hex.EncodeToString([]byte(ck)) != v.ck || hex.EncodeToString([]byte(ik)) != v.ik {
					t.Error("expanded keys share memory with CK or IK")
				}
			})
		}
	}
}

func TestKDF(t *testing.T) {
	ck, ik := unhex(t, vectors[0].ck), unhex(t, vectors[0].ik)
	for _, tt := range []struct {
		fc   byte
		name string
		want string
	}{
		{0x58, "AES_GMAC_SALT", "de2d8fa4a81e8872bed63550622ea1e4b741f4e0ef633fa3ecbf4e12dbc2b1c2"},
		{0x59, "AES_GCM_SALT", "990208b8e98def9647b3267bbc4fb85ba56472b9fe616bae6ed8e3d589273db6"},
	} {
		out := kdf(tt.fc, tt.name, ck, ik)
		if got := hex.EncodeToString(out[:]); got != tt.want {
			t.Errorf("kdf(%#x) = %s, want %s", tt.fc, got, tt.want)
		}
	}
}

func TestExpandErrors(t *testing.T) {
	key := make(ims.Key, KeySize)
	for i, tt := range []struct {
		suite  string
		ck, ik ims.Key
		want   error
	}{
		{"null=aes-gcm", nil, key, ErrNoCK},
		{"aes-gmac=null", nil, key, ErrNoCK},
		{"hmac-sha-1-96=aes-cbc", ims.Key{}, key, ErrNoCK},
		{"hmac-md5-96=des-ede3-cbc", nil, key, ErrNoCK},
		{"hmac-sha-1-96=null", nil, key, nil},
		{"hmac-md5-96=null", nil, key, nil},
		{"hmac-sha-1-96=null", key, nil, ErrNoIK},
		{"null=aes-gcm", key, nil, ErrNoIK},
		{"hmac-sha-1-96=aes-cbc", key[:15], key, ErrBadKey},
		{"hmac-sha-1-96=aes-cbc", key, key[:15], ErrBadKey},
		{"null=aes-gcm", append(key.Clone(), 0), key, ErrBadKey},
	} {
		s, err := ims.ParseSuite(tt.suite)
		if err != nil {
			t.Fatal(err)
		}
		k, err := Expand(s, tt.ck, tt.ik)
		if !errors.Is(err, tt.want) {
			t.Errorf("%d: Expand(%s) = %v, want %v", i, s, err, tt.want)
		}
		if err != nil && (k.Enc != nil || k.Auth != nil) {
			t.Errorf("%d: keys in spite of %v", i, err)
		}
		safeText(t, err)
	}
	for _, s := range []ims.Suite{{}, {Alg: ims.AlgNull, Enc: ims.EncNull}, {Alg: ims.AlgHMACSHA1, Enc: ims.EncAESGCM}, {Alg: ims.AlgAESGMAC, Enc: ims.EncAESCBC}} {
		if _, err := Expand(s, key, key); !errors.Is(err, ErrSuite) {
			t.Errorf("R2.8 Expand(%s) = %v, want ErrSuite", s, err)
		}
	}
}
