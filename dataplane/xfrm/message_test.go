package xfrm

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
)

// littleEndian skips golden bytes on machines that write them the other way round.
func littleEndian(t *testing.T) {
	t.Helper()
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("golden bytes are little-endian")
	}
}

// golden compares octets with hex text in which white space and comments after '#' do not count.
func golden(t *testing.T, got []byte, want string) {
	t.Helper()
	var digits strings.Builder
	for line := range strings.Lines(want) {
		line, _, _ = strings.Cut(line, "#")
		digits.WriteString(strings.Join(strings.Fields(line), ""))
	}
	w, err := hex.DecodeString(digits.String())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, w) {
		i := 0
		for i < min(len(got), len(w)) && got[i] == w[i] {
			i++
		}
		t.Errorf("differs at octet %d (got %d octets, want %d)\ngot  %x\nwant %x", i, len(got), len(w), got, w)
	}
}

func goldenSA() sa.SA {
	return sa.SA{
		Dir: sa.In, SPI: 0x40000050,
		Src: netip.MustParseAddrPort("10.45.0.7:6301"), Dst: netip.MustParseAddrPort("10.0.0.5:6100"),
	}
}

func TestStateGolden(t *testing.T) {
	littleEndian(t)
	seq := func(n int, from byte) (k ims.Key) {
		for i := range n {
			k = append(k, from+byte(i))
		}
		return k
	}
	const selector = `
		0a000005000000000000000000000000 0a2d0007000000000000000000000000
		17d4 ffff 189d ffff 0200 20 20 00 000000 00000000 00000000
		0a000005000000000000000000000000 40000050 32 000000    # daddr, SPI in network order, ESP
		0a2d0007000000000000000000000000                       # saddr
		ffffffffffffffff ffffffffffffffff ffffffffffffffff ffffffffffffffff
		ef00000000000000 f000000000000000 0000000000000000 0000000000000000 # soft 239 s, hard 240 s
		0000000000000000 0000000000000000 0000000000000000 0000000000000000 # counters
		000000000000000000000000 00000000 6d670000 0200 00     # stats, seq, reqid, family, transport mode
		`
	const selectorEnd = ` 00 00000000000000 # flags`
	name := func(s string) string { return hex.EncodeToString(append([]byte(s), make([]byte, 64-len(s))...)) }
	for _, tc := range []struct {
		suite string
		keys  ims.ESPKeys
		win   int
		mark  uint32
		want  string
	}{
		{
			suite: "null=aes-gcm", keys: ims.ESPKeys{Enc: seq(16, 1), Salt: [4]byte{0xa1, 0xa2, 0xa3, 0xa4}}, win: 256, mark: 7,
			want: `9c010000 1000 0506 2a000000 00000000` + selector + `00` + selectorEnd + `
				6000 1200 ` + name("rfc4106(gcm(aes))") + ` a0000000 80000000 0102030405060708090a0b0c0d0e0f10 a1a2a3a4
				3c00 1700 08000000 00000000 00000000 00000000 00000000 00010000` + strings.Repeat("00000000", 8) + `
				0800 1d00 07000000 0800 1e00 ffffffff`,
		},
		{
			suite: "aes-gmac=null", keys: ims.ESPKeys{Auth: seq(16, 1), Salt: [4]byte{0xa1, 0xa2, 0xa3, 0xa4}}, win: 32,
			want: `50010000 1000 0506 2a000000 00000000` + selector + `20` + selectorEnd + `
				6000 1200 ` + name("rfc4543(gcm(aes))") + ` a0000000 80000000 0102030405060708090a0b0c0d0e0f10 a1a2a3a4`,
		},
		{
			suite: "hmac-sha-1-96=aes-cbc", keys: ims.ESPKeys{Auth: seq(20, 1), Enc: seq(16, 0x81)}, win: 0,
			want: `a8010000 1000 0506 2a000000 00000000` + selector + `00` + selectorEnd + `
				6000 1400 ` + name("hmac(sha1)") + ` a0000000 60000000 0102030405060708090a0b0c0d0e0f1011121314
				5800 0200 ` + name("cbc(aes)") + ` 80000000 8182838485868788898a8b8c8d8e8f90`,
		},
		{
			suite: "hmac-md5-96=null", keys: ims.ESPKeys{Auth: seq(16, 1)}, win: 32,
			want: `94010000 1000 0506 2a000000 00000000` + selector + `20` + selectorEnd + `
				5c00 1400 ` + name("hmac(md5)") + ` 80000000 60000000 0102030405060708090a0b0c0d0e0f10
				4800 0200 ` + name("ecb(cipher_null)") + ` 00000000`,
		},
	} {
		t.Run(tc.suite, func(t *testing.T) {
			suite, err := ims.ParseSuite(tc.suite)
			if err != nil {
				t.Fatal(err)
			}
			tc.keys.Suite = suite
			m := messages{seq: 42}
			err = m.state(nl.XFRM_MSG_NEWSA, &state{
				sa: goldenSA(), keys: &tc.keys, reqid: DefaultReqID, window: tc.win, mark: tc.mark,
				life: lifetimeOf(0, 4*time.Minute),
			})
			if err != nil {
				t.Fatal(err)
			}
			golden(t, m.buf, tc.want)
		})
	}
}

func TestPolicyGolden(t *testing.T) {
	littleEndian(t)
	ps := constantPolicies([]netip.Addr{netip.MustParseAddr("2001:db8::5")}, []uint16{6100}, DefaultReqID)
	if len(ps) != 4 {
		t.Fatalf("%d policies, want in, out, fwd and ICMP", len(ps))
	}
	ps = append(ps, ps[1])
	ps[4].action, ps[4].expires = actionBlock, 200
	const (
		zero  = "00000000000000000000000000000000"
		local = "20010db8000000000000000000000005"
		tag   = "6d676d67" // 0x676d << 16 ^ 0x676d
		in    = local + zero + "17d4 ffff 0000 0000 0a00 80 00 00 000000 00000000" + tag
		out   = zero + local + "0000 0000 17d4 ffff 0a00 00 80 00 000000 00000000" + tag
		icmp  = zero + local + "0004 ffff 0001 ffff 0a00 00 80 3a 000000 00000000" + tag
		life  = "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff" + zero + zero + zero + zero
		until = "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff" + "0000000000000000 c800000000000000" + zero + zero + zero
		tmpl  = "4400 0500" + zero + "00000000 32 000000 0a00 0000" + zero + "6d670000 00 00 00 00 ffffffff ffffffff ffffffff"
	)
	for i, want := range []string{
		"fc000000 1900 0500 00000000 00000000" + in + life + "e8030000 00000000 00 00 00 00 00000000" + tmpl,
		"fc000000 1900 0500 00000000 00000000" + out + life + "e8030000 00000000 01 00 00 00 00000000" + tmpl,
		"b8000000 1900 0500 00000000 00000000" + out + life + "e8030000 00000000 02 01 00 00 00000000",
		"b8000000 1900 0500 00000000 00000000" + icmp + life + "e8030000 00000000 01 01 00 00 00000000",
		"b8000000 1900 0500 00000000 00000000" + out + until + "e8030000 00000000 01 01 00 00 00000000",
	} {
		var m messages
		m.updatePolicy(&ps[i])
		golden(t, m.buf, want)
	}
	if got, want := ps[1].String(), "out src 2001:db8::5/128 port 6100 dst ::/0 port any"; got != want {
		t.Errorf("String %q, want %q", got, want)
	}
	if got, want := ps[3].String(), "out src 2001:db8::5/128 dst ::/0 ICMP type 1 code 4"; got != want {
		t.Errorf("String %q, want %q", got, want)
	}
}

func TestDeleteStateGolden(t *testing.T) {
	littleEndian(t)
	var m messages
	m.deleteState(stateID{netip.MustParseAddr("10.0.0.5"), 0x40000050})
	golden(t, m.buf, "28000000 1100 0500 00000000 00000000 0a000005000000000000000000000000 40000050 0200 32 00")
}

func TestLifetime(t *testing.T) {
	for _, tc := range []struct {
		age, hard time.Duration
		want      lifetime
	}{
		{0, 0, lifetime{}},
		{time.Hour, 0, lifetime{}},
		{0, time.Nanosecond, lifetime{1, 2}},
		{0, 2 * time.Second, lifetime{1, 2}},
		{0, 2*time.Second + 1, lifetime{2, 3}},
		{10 * time.Second, 5 * time.Second, lifetime{14, 15}},
		{0, 1<<32*time.Second - 1, lifetime{1<<32 - 1, 1 << 32}},
	} {
		if got := lifetimeOf(tc.age, tc.hard); got != tc.want {
			t.Errorf("lifetimeOf(%v, %v) = %v, want %v", tc.age, tc.hard, got, tc.want)
		}
	}
}

// Peers: B2.06
func TestCipherTable(t *testing.T) {
	for _, s := range ims.Suites() {
		c, err := cipherOf(s)
		if err != nil {
			t.Errorf("%s: %v", s, err)
			continue
		}
		if (c.aead != "") == (c.auth != "" || c.crypt != "") || (c.auth == "") != (c.crypt == "") {
			t.Errorf("%s: neither one AEAD nor a pair: %+v", s, c)
		}
		k := blankKeys(s)
		if err := c.check(&k); err != nil {
			t.Errorf("%s: %v", s, err)
		}
	}
	for _, s := range []ims.Suite{{}, {Alg: ims.AlgNull, Enc: ims.EncNull}, {Alg: ims.AlgHMACSHA1, Enc: ims.EncAESGCM}} {
		if _, err := cipherOf(s); err == nil {
			t.Errorf("%s accepted", s)
		}
	}
}

// TestRead feeds the reader of answers with what a kernel might send.
func TestRead(t *testing.T) {
	message := func(typ, flags uint16, seq uint32, body ...byte) []byte {
		b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
		b = binary.NativeEndian.AppendUint16(b, typ)
		b = binary.NativeEndian.AppendUint16(b, flags)
		b = binary.NativeEndian.AppendUint32(b, seq)
		return append(binary.NativeEndian.AppendUint32(b, 0), body...)
	}
	code := func(e unix.Errno) []byte { return binary.NativeEndian.AppendUint32(nil, uint32(-int32(e))) }
	withText := append(append(code(unix.EINVAL), make([]byte, unix.SizeofNlMsghdr)...),
		attrBytes(unix.NLMSGERR_ATTR_MSG, []byte("Invalid replay window\x00"))...)
	newConnWith := func(n int) *conn {
		c := newConn(nil)
		c.seq, c.count = 100, n
		for range n {
			c.results = append(c.results, ErrNoAck)
		}
		return c
	}
	for _, tc := range []struct {
		name    string
		data    []byte
		settled int
		want    [2]string
	}{
		{"acknowledged", message(unix.NLMSG_ERROR, 0, 100, code(0)...), 1, [2]string{"", "no ack"}},
		{"second first", message(unix.NLMSG_ERROR, 0, 101, code(unix.EEXIST)...), 1, [2]string{"no ack", "file exists"}},
		{"two in one", append(message(unix.NLMSG_ERROR, 0, 100, code(0)...), message(unix.NLMSG_ERROR, 0, 101, code(0)...)...), 2, [2]string{"", ""}},
		{"twice the same", append(message(unix.NLMSG_ERROR, 0, 100, code(0)...), message(unix.NLMSG_ERROR, 0, 100, code(0)...)...), 1, [2]string{"", "no ack"}},
		{"stale", message(unix.NLMSG_ERROR, 0, 99, code(0)...), 0, [2]string{"no ack", "no ack"}},
		{"from the future", message(unix.NLMSG_ERROR, 0, 102, code(0)...), 0, [2]string{"no ack", "no ack"}},
		{"explained", message(unix.NLMSG_ERROR, unix.NLM_F_ACK_TLVS|unix.NLM_F_CAPPED, 100, withText...), 1, [2]string{"invalid argument (Invalid replay window)", "no ack"}},
		{"end of a dump", message(unix.NLMSG_DONE, unix.NLM_F_MULTI, 100, code(0)...), 1, [2]string{"", "no ack"}},
		{"no code", message(unix.NLMSG_ERROR, 0, 100), 1, [2]string{"too short", "no ack"}},
		{"other message", message(nl.XFRM_MSG_NEWSA, 0, 100, make([]byte, 300)...), 0, [2]string{"no ack", "no ack"}},
		{"length too large", append([]byte{0xff, 0xff, 0, 0}, make([]byte, 30)...), 0, [2]string{"no ack", "no ack"}},
		{"length zero", make([]byte, 40), 0, [2]string{"no ack", "no ack"}},
		{"cut", message(unix.NLMSG_ERROR, 0, 100, code(0)...)[:10], 0, [2]string{"no ack", "no ack"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newConnWith(2)
			if n := c.read(tc.data); n != tc.settled {
				t.Errorf("settled %d, want %d", n, tc.settled)
			}
			for i, want := range tc.want {
				got := ""
				if c.results[i] != nil {
					got = c.results[i].Error()
				}
				if (want == "") != (got == "") || !strings.Contains(got, want) {
					t.Errorf("result %d is %q, want %q", i, got, want)
				}
			}
		})
	}
}

func TestRunReportsSocketErrors(t *testing.T) {
	k := newFakeKernel()
	s := &brokenSocket{fakeSocket{k: k}}
	c := newConn(s)
	c.reset()
	c.deleteState(stateID{gm4, 1})
	if err := c.run()[0]; !errors.Is(err, ErrNoAck) || !errors.Is(err, unix.EPIPE) {
		t.Errorf("got %v, want ErrNoAck with EPIPE", err)
	}
}

type brokenSocket struct{ fakeSocket }

func (*brokenSocket) send([]byte) error { return unix.EPIPE }

func TestFindAttr(t *testing.T) {
	b := append(attrBytes(1, []byte{1, 2, 3}), attrBytes(2, []byte{4})...)
	if v, ok := findAttr(b, 2); !ok || !bytes.Equal(v, []byte{4}) {
		t.Errorf("got %v %v", v, ok)
	}
	for n := range b {
		if v, ok := findAttr(b[:n], 2); ok && n < 13 {
			t.Errorf("cut at %d: found %v", n, v)
		}
	}
	if _, ok := findAttr([]byte{0, 0, 2, 0}, 2); ok {
		t.Error("attribute of length zero found")
	}
}

func TestOverlap(t *testing.T) {
	ours := constantPolicies([]netip.Addr{gm4}, []uint16{serverPS}, DefaultReqID)[0].sel // any → gm4:6100
	sel := func(src, dst string, dport uint16, proto uint8) nl.XfrmSelector {
		s, d := netip.MustParsePrefix(src), netip.MustParsePrefix(dst)
		x := nl.XfrmSelector{
			Family: family(d.Addr()), Saddr: address(s.Addr()), PrefixlenS: uint8(s.Bits()), Daddr: address(d.Addr()), PrefixlenD: uint8(d.Bits()), Proto: proto,
		}
		if dport != 0 {
			x.Dport, x.DportMask = nl.Swap16(dport), 0xffff
		}
		return x
	}
	for _, tc := range []struct {
		other nl.XfrmSelector
		want  bool
	}{
		{sel("0.0.0.0/0", "0.0.0.0/0", 0, 0), true},
		{sel("10.0.0.0/8", "10.45.0.0/16", 6100, unix.IPPROTO_UDP), true},
		{sel("0.0.0.0/0", "10.46.0.0/16", 0, 0), false},
		{sel("0.0.0.0/0", "10.45.0.5/32", 5060, 0), false},
		{sel("::/0", "::/0", 0, 0), false},
	} {
		if got := overlap(&ours, &tc.other); got != tc.want {
			t.Errorf("%s: %v", policyID{tc.other, dirIn}, got)
		}
	}
}

func TestFacts(t *testing.T) {
	root := t.TempDir()
	write := func(path, value string) {
		p := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(value+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("core/xfrm_larval_drop", "1")
	write("ipv4/conf/lo/disable_policy", "1")
	write("ipv4/conf/eth0/disable_policy", "0")
	write("ipv4/conf/eth0/disable_xfrm", "0")
	write("ipv6/conf/eth0/disable_policy", "0")
	write("ipv4/ip_local_port_range", "6000\t60999")
	write("ipv4/ip_local_reserved_ports", "6100,6110-6111")
	ports := []uint16{6100, 6110, 6111}
	unsuitable := func(root string) []Setting {
		return slices.DeleteFunc(Settings(os.DirFS(root), ports), func(s Setting) bool { return s.Consequence == "" })
	}
	if list := unsuitable(root); len(list) != 0 {
		t.Errorf("healthy host: %v", list)
	}
	if list := Settings(os.DirFS(root), ports); len(list) != 5 { // without that of lo
		t.Errorf("healthy host: %v", list)
	}
	for _, tc := range []struct{ path, bad, wanted string }{
		{"core/xfrm_larval_drop", "0", "1"},
		{"ipv4/conf/eth0/disable_policy", "1", "0"},
		{"ipv4/conf/eth0/disable_xfrm", "1", "0"},
		{"ipv6/conf/eth0/disable_policy", "1", "0"},
		{"ipv4/ip_local_reserved_ports", "6100,6110", "6100,6110,6111"},
		{"ipv4/ip_local_reserved_ports", "", "6100,6110-6111"},
	} {
		old, err := os.ReadFile(filepath.Join(root, tc.path))
		if err != nil {
			t.Fatal(err)
		}
		write(tc.path, tc.bad)
		if list := unsuitable(root); len(list) != 1 || list[0].Path != tc.path || list[0].Value != tc.bad || list[0].Wanted != tc.wanted {
			t.Errorf("%s = %q: %v", tc.path, tc.bad, list)
		}
		write(tc.path, string(bytes.TrimSpace(old)))
	}
	if list := Settings(os.DirFS(t.TempDir()), ports); len(list) != 0 {
		t.Errorf("nothing readable: %v", list)
	}
}
