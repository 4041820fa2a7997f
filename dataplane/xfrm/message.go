package xfrm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
)

// Values of linux/xfrm.h that package nl does not export.
const (
	dirIn, dirOut, dirFwd    = 0, 1, 2
	actionAllow, actionBlock = 0, 1
	modeTransport            = 0
	policyTypeMain           = 0

	attrSADCount = 1 // XFRMA_SAD_CNT
	attrSPDInfo  = 1 // XFRMA_SPD_INFO
)

// legacyWindow is the largest replay window of the classic state message; larger ones travel as XFRMA_REPLAY_ESN_VAL,
// which the kernel also takes without extended sequence numbers.
const (
	legacyWindow = 32
	maxWindow    = 4096 // XFRMA_REPLAY_ESN_MAX
)

// cipher is how the kernel's crypto layer names the algorithms of a suite, and the key lengths in octets
// (TS 33.203 Annex I, RFC 4106 §8.1, RFC 4543 §5.4). Either aead is set or auth and crypt are: the kernel refuses both.
type cipher struct {
	aead, auth, crypt           string
	aeadKey, authKey, cryptKey  int // aeadKey without the salt
	aeadICVBits, authTruncation uint32
}

// cipherOf returns the algorithms of a suite.
func cipherOf(s ims.Suite) (cipher, error) {
	switch {
	case !s.Legal():
		return cipher{}, fmt.Errorf("algorithm pair %s is not legal in TS 33.203 Annex H", s)
	case s.Enc == ims.EncAESGCM:
		return cipher{aead: "rfc4106(gcm(aes))", aeadKey: 16, aeadICVBits: 128}, nil
	case s.Alg == ims.AlgAESGMAC:
		return cipher{aead: "rfc4543(gcm(aes))", aeadKey: 16, aeadICVBits: 128}, nil
	}
	c := cipher{authTruncation: 96}
	if s.Alg == ims.AlgHMACMD5 {
		c.auth, c.authKey = "hmac(md5)", 16
	} else {
		c.auth, c.authKey = "hmac(sha1)", 20
	}
	switch s.Enc {
	case ims.EncNull: // ESP has an encryption entry even when it does nothing
		c.crypt = "ecb(cipher_null)"
	case ims.EncDESEDE3CBC:
		c.crypt, c.cryptKey = "cbc(des3_ede)", 24
	case ims.EncAESCBC:
		c.crypt, c.cryptKey = "cbc(aes)", 16
	case ims.EncAESGCM: // an AEAD, returned above
	}
	return c, nil
}

// check reports keys whose length does not fit the suite. The kernel would notice some of these, but not all.
func (c cipher) check(k *ims.ESPKeys) error {
	enc, auth := c.cryptKey, c.authKey
	if c.aead != "" {
		enc, auth = c.aeadKey, 0
		if k.Suite.Alg == ims.AlgAESGMAC {
			enc, auth = 0, c.aeadKey
		}
	}
	if len(k.Enc) != enc || len(k.Auth) != auth {
		return fmt.Errorf("keys of %d and %d octets do not fit %s, which takes %d and %d",
			len(k.Enc), len(k.Auth), k.Suite, enc, auth)
	}
	return nil
}

// blankKeys returns keys of the right length with nothing in them, for messages whose keys the kernel only checks.
func blankKeys(s ims.Suite) ims.ESPKeys {
	c, err := cipherOf(s)
	if err != nil {
		return ims.ESPKeys{Suite: s}
	}
	k := ims.ESPKeys{Suite: s, Enc: make(ims.Key, c.cryptKey), Auth: make(ims.Key, c.authKey)}
	if c.aead != "" && s.Alg == ims.AlgAESGMAC {
		k.Auth = make(ims.Key, c.aeadKey)
	} else if c.aead != "" {
		k.Enc = make(ims.Key, c.aeadKey)
	}
	return k
}

// state is everything that goes into one NEWSA or UPDSA message.
type state struct {
	sa     sa.SA
	keys   *ims.ESPKeys
	reqid  uint32
	window int    // replay window of an inbound SA; outbound SAs have none
	seq    uint32 // the last sequence number used so far: received with a window, sent without one
	mark   uint32 // packet mark after decryption, 0 for none
	life   lifetime
}

// lifetime is the limit of a state in seconds since the kernel added it. Zero means none.
type lifetime struct{ soft, hard uint64 }

// minHard is the shortest hard limit: the soft limit needs a second of its own before it.
const minHard = 2

// lifetimeOf converts the backstop. The soft limit is always given together with the hard one: after an update from
// both to hard only, the kernel takes the hard timer for the soft one, moves the state's birthday forward and lets it
// live on. Nobody listens for the soft event.
func lifetimeOf(age, hard time.Duration) lifetime {
	if hard <= 0 {
		return lifetime{}
	}
	s := uint64(max((age+hard+time.Second-1)/time.Second, minHard))
	return lifetime{soft: s - 1, hard: s}
}

// messages is a sequence of netlink messages in one buffer, ready for one sendmsg. Each asks for an acknowledgement.
type messages struct {
	buf   []byte
	start int
	count int
	seq   uint32 // sequence number of the first message
}

// reset forgets all messages and overwrites them: they may have carried keys.
func (m *messages) reset(seq uint32) {
	clear(m.buf)
	m.buf, m.start, m.count, m.seq = m.buf[:0], 0, 0, seq
}

// begin opens a message; what is appended to the buffer until end belongs to it.
func (m *messages) begin(typ uint16, flags uint16) {
	m.start = len(m.buf)
	b := m.buf
	b = binary.NativeEndian.AppendUint32(b, 0) // length, known at the end
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|unix.NLM_F_ACK|flags)
	b = binary.NativeEndian.AppendUint32(b, m.seq+uint32(m.count)) //nolint:gosec // wraps like the kernel's
	m.buf = binary.NativeEndian.AppendUint32(b, 0)                 // port id: the kernel knows it
}

// end closes the message.
func (m *messages) end() {
	binary.NativeEndian.PutUint32(m.buf[m.start:], uint32(len(m.buf)-m.start)) //nolint:gosec // some hundred octets
	m.count++
}

// attr appends an attribute and pads it.
func (m *messages) attr(typ uint16, parts ...[]byte) {
	n := unix.SizeofRtAttr
	for _, p := range parts {
		n += len(p)
	}
	m.buf = binary.NativeEndian.AppendUint16(m.buf, uint16(n)) //nolint:gosec // some hundred octets
	m.buf = binary.NativeEndian.AppendUint16(m.buf, typ)
	for _, p := range parts {
		m.buf = append(m.buf, p...)
	}
	for ; n%unix.NLA_ALIGNTO != 0; n++ {
		m.buf = append(m.buf, 0)
	}
}

// algo appends an algorithm attribute: name, key length in bits, a second length in bits if the structure has one, key.
func (m *messages) algo(typ uint16, name string, bits []uint32, key ...[]byte) {
	head := make([]byte, nl.SizeofXfrmAlgo-4, nl.SizeofXfrmAlgoAEAD)
	copy(head, name)
	n := 0
	for _, k := range key {
		n += len(k)
	}
	head = binary.NativeEndian.AppendUint32(head, uint32(n)*8) //nolint:gosec // at most 24 octets
	for _, b := range bits {
		head = binary.NativeEndian.AppendUint32(head, b)
	}
	m.attr(typ, append([][]byte{head}, key...)...)
}

// state appends a message that adds (XFRM_MSG_NEWSA) or updates (XFRM_MSG_UPDSA) a state.
func (m *messages) state(typ uint16, s *state) error {
	c, err := cipherOf(s.keys.Suite)
	if err != nil {
		return err
	}
	if err := c.check(s.keys); err != nil {
		return err
	}
	info := nl.XfrmUsersaInfo{
		Sel:   hostSelector(s.sa.Src, s.sa.Dst),
		Saddr: address(s.sa.Src.Addr()),
		Lft: nl.XfrmLifetimeCfg{
			// A limit of zero octets or packets would end the state with its first packet.
			SoftByteLimit: nl.XFRM_INF, HardByteLimit: nl.XFRM_INF,
			SoftPacketLimit: nl.XFRM_INF, HardPacketLimit: nl.XFRM_INF,
			SoftAddExpiresSeconds: s.life.soft, HardAddExpiresSeconds: s.life.hard,
		},
		Reqid:  s.reqid,
		Family: family(s.sa.Dst.Addr()),
		Mode:   modeTransport,
	}
	info.Id = nl.XfrmId{Daddr: address(s.sa.Dst.Addr()), Spi: nl.Swap32(uint32(s.sa.SPI)), Proto: unix.IPPROTO_ESP}
	if s.window <= legacyWindow {
		info.ReplayWindow = uint8(max(s.window, 0)) //nolint:gosec // at most 32
	}

	m.begin(typ, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	m.buf = append(m.buf, info.Serialize()...)
	m.keys(c, s.keys)
	m.replay(s)
	if s.mark != 0 {
		m.attr(nl.XFRMA_SET_MARK, binary.NativeEndian.AppendUint32(nil, s.mark))
		m.attr(nl.XFRMA_SET_MARK_MASK, binary.NativeEndian.AppendUint32(nil, ^uint32(0)))
	}
	m.end()
	return nil
}

// keys appends the attributes with the algorithms and their keys.
func (m *messages) keys(c cipher, k *ims.ESPKeys) {
	if c.aead == "" {
		m.algo(nl.XFRMA_ALG_AUTH_TRUNC, c.auth, []uint32{c.authTruncation}, k.Auth)
		m.algo(nl.XFRMA_ALG_CRYPT, c.crypt, nil, k.Enc)
		return
	}
	key := k.Enc
	if k.Suite.Alg == ims.AlgAESGMAC {
		key = k.Auth
	}
	m.algo(nl.XFRMA_ALG_AEAD, c.aead, []uint32{c.aeadICVBits}, key, k.Salt[:])
}

// replay appends the replay window and where the sequence numbers go on. Everything up to the number given counts as
// seen: what was recorded before a reboot is not accepted after it.
func (m *messages) replay(s *state) {
	switch {
	case s.window > legacyWindow: // struct xfrm_replay_state_esn: words, oseq, seq, their high halves, window, bitmap
		n := (s.window + 31) / 32
		esn := make([]byte, nl.SizeofXfrmReplayStateEsn+4*n)
		binary.NativeEndian.PutUint32(esn, uint32(n)) //nolint:gosec // at most 128
		binary.NativeEndian.PutUint32(esn[8:], s.seq)
		binary.NativeEndian.PutUint32(esn[20:], uint32(s.window)) //nolint:gosec // at most 4096
		for i := nl.SizeofXfrmReplayStateEsn; i < len(esn) && s.seq != 0; i++ {
			esn[i] = 0xff
		}
		m.attr(nl.XFRMA_REPLAY_ESN_VAL, esn)
	case s.seq == 0:
	case s.window > 0: // struct xfrm_replay_state: oseq, seq, bitmap
		m.attr(nl.XFRMA_REPLAY_VAL, words(0, s.seq, ^uint32(0)))
	default:
		m.attr(nl.XFRMA_REPLAY_VAL, words(s.seq, 0, 0))
	}
}

// words returns numbers in the machine's byte order.
func words(list ...uint32) (b []byte) {
	for _, w := range list {
		b = binary.NativeEndian.AppendUint32(b, w)
	}
	return b
}

// stateID is the kernel's key of a state (the protocol is always ESP).
type stateID struct {
	dst netip.Addr
	spi ims.SPI
}

// stateKey is a stateID for large maps: without a pointer in it, and smaller.
type stateKey struct {
	dst [16]byte
	spi ims.SPI
}

func (id stateID) key() stateKey { return stateKey{id.dst.As16(), id.spi} }

// getState appends a GETSA message for one state.
func (m *messages) getState(id stateID) { m.aboutState(nl.XFRM_MSG_GETSA, id) }

// deleteState appends a DELSA message.
func (m *messages) deleteState(id stateID) { m.aboutState(nl.XFRM_MSG_DELSA, id) }

func (m *messages) aboutState(typ uint16, id stateID) {
	k := nl.XfrmUsersaId{
		Daddr: address(id.dst), Spi: nl.Swap32(uint32(id.spi)), Family: family(id.dst), Proto: unix.IPPROTO_ESP,
	}
	m.begin(typ, 0)
	m.buf = append(m.buf, k.Serialize()...)
	m.end()
}

// updatePolicy appends an UPDPOLICY message: it creates the policy or replaces, in one step, the one with the same
// selector and direction. The age of a replaced policy does not count: expiry starts anew, or ends.
func (m *messages) updatePolicy(p *policy) { m.policy(nl.XFRM_MSG_UPDPOLICY, p) }

// addPolicy appends a NEWPOLICY message: like updatePolicy, but an EEXIST if there is one.
func (m *messages) addPolicy(p *policy) { m.policy(nl.XFRM_MSG_NEWPOLICY, p) }

func (m *messages) policy(typ uint16, p *policy) {
	info := nl.XfrmUserpolicyInfo{
		Sel: p.sel,
		Lft: nl.XfrmLifetimeCfg{
			SoftByteLimit: nl.XFRM_INF, HardByteLimit: nl.XFRM_INF,
			SoftPacketLimit: nl.XFRM_INF, HardPacketLimit: nl.XFRM_INF,
			HardAddExpiresSeconds: p.expires,
		},
		Priority: policyPriority,
		Dir:      p.dir,
		Action:   p.action,
	}
	m.begin(typ, 0)
	m.buf = append(m.buf, info.Serialize()...)
	if p.action == actionAllow {
		// Zero addresses and SPI leave the choice of the state to its selector; Optional 0 is level "required".
		t := nl.XfrmUserTmpl{
			XfrmId: nl.XfrmId{Proto: unix.IPPROTO_ESP}, Family: p.sel.Family, Reqid: p.reqid, Mode: modeTransport,
			Aalgos: ^uint32(0), Ealgos: ^uint32(0), Calgos: ^uint32(0),
		}
		m.attr(nl.XFRMA_TMPL, t.Serialize())
	}
	m.end()
}

// getPolicy appends a GETPOLICY message for one policy.
func (m *messages) getPolicy(id policyID) {
	k := nl.XfrmUserpolicyId{Sel: id.sel, Dir: id.dir}
	m.begin(nl.XFRM_MSG_GETPOLICY, 0)
	m.buf = append(m.buf, k.Serialize()...)
	m.end()
}

// query appends a message with a body of n zero octets, as the dump and count requests want it.
func (m *messages) query(typ, flags uint16, n int) {
	m.begin(typ, flags)
	m.buf = append(m.buf, make([]byte, n)...)
	m.end()
}

// family returns the address family for a netlink message.
func family(a netip.Addr) uint16 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// address writes an address the way the kernel wants it: IPv4 in the first four octets.
func address(a netip.Addr) (x nl.XfrmAddress) {
	copy(x[:], a.AsSlice())
	return x
}

// netipOf is the reverse of address.
func netipOf(x nl.XfrmAddress, fam uint16) netip.Addr {
	if fam == unix.AF_INET {
		return netip.AddrFrom4([4]byte(x[:4]))
	}
	return netip.AddrFrom16(x)
}

// hostSelector selects exactly one transport tuple, any protocol.
func hostSelector(src, dst netip.AddrPort) nl.XfrmSelector {
	bits := uint8(dst.Addr().BitLen()) //nolint:gosec // 32 or 128
	return nl.XfrmSelector{
		Family: family(dst.Addr()), Saddr: address(src.Addr()), Daddr: address(dst.Addr()),
		PrefixlenS: bits, PrefixlenD: bits,
		Sport: nl.Swap16(src.Port()), SportMask: ^uint16(0), Dport: nl.Swap16(dst.Port()), DportMask: ^uint16(0),
	}
}

var errShortMessage = errors.New("netlink message too short")

// stateHead is what a dump tells about a state that concerns us; its keys are not looked at.
type stateHead struct {
	id    stateID
	reqid uint32
	esp   bool
}

func parseState(b []byte) (stateHead, error) {
	if len(b) < nl.SizeofXfrmUsersaInfo {
		return stateHead{}, errShortMessage
	}
	return headOf(nl.DeserializeXfrmUsersaInfo(b)), nil
}

func headOf(i *nl.XfrmUsersaInfo) stateHead {
	return stateHead{
		id:    stateID{dst: netipOf(i.Id.Daddr, i.Family), spi: ims.SPI(nl.Swap32(i.Id.Spi))},
		reqid: i.Reqid, esp: i.Id.Proto == unix.IPPROTO_ESP,
	}
}

// sequences reads how far a dumped state has got: the highest number received and the last one sent.
func sequences(attrs []byte) (in, out uint32) {
	if v, ok := findAttr(attrs, nl.XFRMA_REPLAY_ESN_VAL); ok && len(v) >= nl.SizeofXfrmReplayStateEsn {
		return binary.NativeEndian.Uint32(v[8:]), binary.NativeEndian.Uint32(v[4:])
	}
	if v, ok := findAttr(attrs, nl.XFRMA_REPLAY_VAL); ok && len(v) >= 8 {
		return binary.NativeEndian.Uint32(v[4:]), binary.NativeEndian.Uint32(v)
	}
	return 0, 0
}

func parsePolicy(b []byte) (nl.XfrmUserpolicyInfo, error) {
	if len(b) < nl.SizeofXfrmUserpolicyInfo {
		return nl.XfrmUserpolicyInfo{}, errShortMessage
	}
	return *nl.DeserializeXfrmUserpolicyInfo(b), nil
}

// parseDeletion reads which policy a DELPOLICY notification is about. After a deletion by index the selector is only in an
// attribute, of which the kernel has reserved less than it wrote: no more than the selector can be relied on.
func parseDeletion(b []byte) (policyID, error) {
	if len(b) < nl.SizeofXfrmUserpolicyId {
		return policyID{}, errShortMessage
	}
	d := nl.DeserializeXfrmUserpolicyId(b)
	if d.Index == 0 {
		return policyID{d.Sel, d.Dir}, nil
	}
	v, ok := findAttr(b[nl.SizeofXfrmUserpolicyId:], nl.XFRMA_POLICY)
	if !ok || len(v) < nl.SizeofXfrmSelector {
		return policyID{}, errShortMessage
	}
	return policyID{*nl.DeserializeXfrmSelector(v), d.Dir}, nil
}

// findAttr returns the value of the first attribute of a type.
func findAttr(b []byte, typ uint16) ([]byte, bool) {
	for len(b) >= unix.SizeofRtAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofRtAttr || n > len(b) {
			return nil, false
		}
		if binary.NativeEndian.Uint16(b[2:]) == typ {
			return b[unix.SizeofRtAttr:n], true
		}
		b = b[min((n+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1), len(b)):]
	}
	return nil, false
}
