package digestaka

import (
	"encoding/base64"
	"encoding/hex"
	"errors"
	"testing"

	"github.com/gmgate/gmgate/control/ims"
)

// vectors are the test sets of TS 35.207 and TS 35.208. AUTN, nonce and AUTS follow from them (TS 33.102 §6.3).
var vectors = []struct {
	name, k, opc, rand     string
	sqn                    uint64
	amf, res, ck, ik, autn string
	nonce, auts            string
}{
	{
		"S1, TS 35.208 #1 = #2, 35.207 #1", "465b5ce8b199b49faa5f0a2ee238a6bc", "cd63cb71954a9f4e48a5994e37a02baf", "23553cbe9637a89d218ae64dae47bf35", 0xff9bb4d0b607,
		"b9b9", "a54211d5e3ba50bf", "b40ba9a3c58b2a05bbf0d987b21bf8cb", "f769bcd751044604127672711c6d3441", "55f328b43577b9b94a9ffac354dfafb3",
		"I1U8vpY3qJ0hiuZNrke/NVXzKLQ1d7m5Sp/6w1Tfr7M=", "ba853f3c123ccf44e93596e355c6",
	},
	{
		"S3, TS 35.208 #3", "fec86ba6eb707ed08905757b1bb44b8f", "1006020f0a478bf6b699f15c062e42b3", "9f7c8d021accf4db213ccff0c7f71a6a", 0x9d0277595ffc,
		"725c", "8011c48c0c214ed2", "5dbdbb2954e8f3cde665b046179a5098", "59a92d3b476a0443487055cf88b2307b", "ae4a3a9b4c97725c9cabc3e99baf7281",
		"n3yNAhrM9NshPM/wx/caaq5KOptMl3JcnKvD6ZuvcoE=", "43aeaaddd33a9f8be774d095d08b",
	},
	{
		"S4, TS 35.208 #4", "9e5944aea94b81165c82fbf9f32db751", "a64a507ae1a2a98bb88eb4210135dc87", "ce83dbc54ac0274a157c17f80d017bd6", 0x0b604a81eca8,
		"9e09", "f365cd683cd92e96", "e203edb3971574f5a94b0d61b816345d", "0c4524adeac041c4dd830d20854fc46b", "fbd98a0b3c869e0974a58220cba84c49",
		"zoPbxUrAJ0oVfBf4DQF71vvZigs8hp4JdKWCIMuoTEk=", "6be5e2ed83cb7685bae0a5680aa6",
	},
	{
		"S5, TS 35.208 #5", "4ab1deb05ca6ceb051fc98e77d026a84", "dcf07cbd51855290b92a07a9891e523e", "74b0cd6031a1c8339b2b6ce2b8c4a186", 0xe880a1b580b6,
		"9f07", "5860fc1bce351e7e", "7657766b373d1c2138f307e3de9242f9", "1c42e960d89b8fa99f2744e0708ccb53", "d961bbd511ae9f0749e785dd12626ef2",
		"dLDNYDGhyDObK2ziuMShhtlhu9URrp8HSeeF3RJibvI=", "16a5f450ca1f782c7adc092ecaf5",
	},
	{
		"S6, TS 35.208 #6", "6c38a116ac280c454f59332ee35c8c4f", "3803ef5363b947c6aaa225e58fae3934", "ee6466bc96202c5a557abbeff8babf63", 0x414b98222181,
		"4464", "16c8233f05a0ac28", "3f8c7587fe8e4b233af676aede30ba3b", "a7466cc1e6b2a1337d49d3b66e95d7b4", "04fb6eb891ed4464078adfb488241a57",
		"7mRmvJYgLFpVervv+Lq/YwT7briR7URkB4rftIgkGlc=", "5e1855093092c6b5a5bee94751e0",
	},
	{
		"S7, TS 35.207 #2", "0396eb317b6d1c36f19c1c84cd6ffd16", "53c15671c60a4b731c55b4a441c0bde2", "c00d603103dcee52c4478119494202e8", 0xfd8eef40df7d,
		"af17", "d3a628ed988620f0", "58c433ff7a7082acd424220f2b67c556", "21a8c1f929702adb3e738488b9f5c5da", "39f96cd9800faf175df5b31807e258b0",
		"wA1gMQPc7lLER4EZSUIC6Dn5bNmAD68XXfWzGAfiWLA=", "cd7ff630bebc1fb5eba74924b0e0",
	},
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func card(t *testing.T, k, opc, amf string) Card {
	t.Helper()
	return Card{K: [16]byte(unhex(t, k)), OPc: [16]byte(unhex(t, opc)), AMF: [2]byte(unhex(t, amf))}
}

func wantHex(t *testing.T, what string, got []byte, want string) {
	t.Helper()
	if hex.EncodeToString(got) != want {
		t.Errorf("%s = %x, want %s", what, got, want)
	}
}

func TestMilenageVectors(t *testing.T) {
	for _, v := range vectors {
		t.Run(v.name, func(t *testing.T) {
			c := card(t, v.k, v.opc, v.amf)
			rnd := [16]byte(unhex(t, v.rand))
			q, err := c.Generate(rnd, v.sqn)
			if err != nil {
				t.Fatal(err)
			}
			wantHex(t, "RES", q.RES, v.res)
			wantHex(t, "CK", q.CK, v.ck)
			wantHex(t, "IK", q.IK, v.ik)
			wantHex(t, "AUTN", q.AUTN[:], v.autn)
			if q.Nonce() != v.nonce {
				t.Errorf("nonce = %s, want %s", q.Nonce(), v.nonce)
			}
			auts, err := c.AUTS(rnd, v.sqn)
			if err != nil {
				t.Fatal(err)
			}
			wantHex(t, "AUTS", auts, v.auts)
			if sqn, err := c.Resync(rnd, auts); err != nil || sqn != v.sqn {
				t.Errorf("Resync = %#x, %v; want %#x", sqn, err, v.sqn)
			}
			auts[13] ^= 1
			if _, err := c.Resync(rnd, auts); !errors.Is(err, ErrMAC) {
				t.Errorf("Resync of a forged AUTS: %v, want ErrMAC", err)
			}

			got, autn, err := ParseNonce(v.nonce)
			if err != nil || got != rnd {
				t.Fatalf("ParseNonce: %x, %v", got, err)
			}
			a, sqn, _, err := c.Answer(rnd, autn, v.sqn-1)
			if err != nil || sqn != v.sqn {
				t.Fatalf("Answer: SQN %#x, %v; want %#x", sqn, err, v.sqn)
			}
			wantHex(t, "USIM's RES", a.RES, v.res)
			wantHex(t, "USIM's CK", a.CK, v.ck)
			wantHex(t, "USIM's IK", a.IK, v.ik)
			_, _, auts, err = c.Answer(rnd, autn, v.sqn)
			if !errors.Is(err, ErrSync) {
				t.Fatalf("Answer to an old SQN: %v, want ErrSync", err)
			}
			wantHex(t, "USIM's AUTS", auts, v.auts)
			autn[15] ^= 1
			if _, _, _, err := c.Answer(rnd, autn, 0); !errors.Is(err, ErrMAC) {
				t.Errorf("Answer to a forged AUTN: %v, want ErrMAC", err)
			}
		})
	}
}

func TestParseNonce(t *testing.T) {
	long := base64.StdEncoding.EncodeToString(make([]byte, 40))
	if _, _, err := ParseNonce(long); err != nil {
		t.Errorf("server data behind AUTN: %v", err)
	}
	for _, bad := range []string{"", "!", base64.StdEncoding.EncodeToString(make([]byte, 31))} {
		if _, _, err := ParseNonce(bad); err == nil {
			t.Errorf("ParseNonce(%q) succeeded", bad)
		}
	}
}

func TestDigest(t *testing.T) {
	const (
		domain = "ims.mnc001.mcc001.3gppnetwork.org"
		rand2  = "9f7c8d021accf4db213ccff0c7f71a6a"
	)
	s1 := vectors[0]
	c := card(t, s1.k, s1.opc, s1.amf)
	v, err := c.Generate([16]byte(unhex(t, s1.rand)), s1.sqn)
	if err != nil {
		t.Fatal(err)
	}
	v2, err := c.Generate([16]byte(unhex(t, rand2)), 0xff9bb4d0b627)
	if err != nil {
		t.Fatal(err)
	}
	wantHex(t, "second CK", v2.CK, "b41f4f3fae6be7aa5692a4aff3b83783")
	wantHex(t, "second IK", v2.IK, "35d493df8c2e34b5608d4122245a98ec")
	wantHex(t, "second AUTN", v2.AUTN[:], "aa74799339fcb9b9fde1421fc724691a")
	const nc1, nc2, cn1, cn2 = "00000001", "00000002", "0a4f113b", "9b21e0aa"
	none := Vector{}
	none.RES = ims.Key{}
	for _, tc := range []struct {
		name, alg, qop, nc, cnonce string
		v                          Vector
		nonce, want                string
	}{
		{"no qop", "AKAv1-MD5", "", "", "", v, v.Nonce(), "1125a3c2e293453f07e08957ff235efc"},
		{"auth", "AKAv1-MD5", "auth", nc1, cn1, v, v.Nonce(), "402ab8df9f3a4d63a9f47c2f90e02938"},
		{"algorithm absent", "", "auth", nc1, cn1, v, v.Nonce(), "402ab8df9f3a4d63a9f47c2f90e02938"},
		{"auth-int", "AKAv1-MD5", "auth-int", nc1, cn1, v, v.Nonce(), "5682a0ac7d51b056ce2245ed00d885c0"},
		{"sess", "AKAv1-MD5-sess", "auth", nc1, cn1, v, v.Nonce(), "e78f10e3e66d7e15b129af32aaaad1bc"},
		{"auts", "AKAv1-MD5", "auth", nc1, cn1, none, v.Nonce(), "da492ad7b08bb89514f214f8c2fdb82b"},
		{"auts no qop", "AKAv1-MD5", "", "", "", none, v.Nonce(), "6821238d21754c12bf172c668144dbb6"},
		{"v2", "AKAv2-MD5", "auth", nc1, cn1, v, v.Nonce(), "6774a29ced9929f3dd734d9a97e04ebe"},
		{"nonce used again", "AKAv1-MD5", "auth", nc2, cn2, v, v.Nonce(), "1dd58d3ee4753f2a329ef8aaae453f05"},
		{"second vector", "AKAv1-MD5", "auth", nc1, "5ccc069c", v2, v2.Nonce(), "f3758a5a42f064b13c5d1bfeb7eb9a4e"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := Digest{
				Algorithm: tc.alg, Username: "001010000000001@" + domain, Realm: domain, URI: "sip:" + domain, Method: "REGISTER",
				Nonce: tc.nonce, QOP: tc.qop, NC: tc.nc, CNonce: tc.cnonce,
			}
			got, err := d.Response(tc.v)
			if err != nil || got != tc.want {
				t.Errorf("got %s, %v; want %s", got, err, tc.want)
			}
		})
	}
	for _, d := range []Digest{{Algorithm: "SHA-256"}, {QOP: "auth-conf"}} {
		if _, err := d.Response(v); err == nil {
			t.Errorf("%+v was accepted", d)
		}
	}
}
