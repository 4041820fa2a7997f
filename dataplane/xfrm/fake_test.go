package xfrm

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/sa"
)

// fakeKernel answers netlink messages from two maps, and misbehaves on request.
type fakeKernel struct {
	mu       sync.Mutex
	states   map[stateID]stateHead
	bodies   map[stateID][]byte // what NEWSA said of a state, for dumps; one without has a head only
	policies map[policyID]nl.XfrmUserpolicyInfo
	attrs    map[policyID][]byte                     // what was said of a policy beside that
	sends    [][]uint16                              // message types of every send, in order
	refuse   func(typ uint16, id stateID) unix.Errno // error for a state message, 0 to go on
	mute     func(typ uint16, id stateID) bool       // executes the message but loses its acknowledgement
	gate     chan struct{}                           // if not nil, each send waits for a value
	dumped   func(n int)                             // called after each state of a dump has been written
	broken   int                                     // dumps that are marked as interrupted
	events   *fakeMonitor                            // of limits
	changes  *fakeMonitor                            // of policies
	placed   func(policyID)                          // called after a policy was put into place, before the acknowledgement
	locked   bool
	sockets  int // open ones
	opened   uint32
	most     int // sockets that can be opened
}

func newFakeKernel() *fakeKernel {
	return &fakeKernel{
		states: map[stateID]stateHead{}, bodies: map[stateID][]byte{}, policies: map[policyID]nl.XfrmUserpolicyInfo{},
		attrs: map[policyID][]byte{}, most: 6,
	}
}

// lock allows one backend at a time.
func (k *fakeKernel) lock(int) (io.Closer, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.locked {
		return nil, ErrInUse
	}
	k.locked = true
	return (*fakeLock)(k), nil
}

type fakeLock fakeKernel

// Close notes whether sockets were still open, which must be closed before.
func (l *fakeLock) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.locked || l.sockets != 0 {
		return fmt.Errorf("lock %v released with %d sockets open", l.locked, l.sockets)
	}
	l.locked = false
	return nil
}

// open makes another socket to the same kernel.
func (k *fakeKernel) open() (socket, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.sockets == k.most {
		return nil, unix.EMFILE
	}
	k.sockets++
	k.opened++
	return &fakeSocket{k: k, number: 1000 + k.opened}, nil
}

// monitor makes a socket for the events of a group.
func (k *fakeKernel) monitor(group int) (monitor, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.sockets == k.most {
		return nil, unix.EMFILE
	}
	k.sockets++
	m := &fakeMonitor{k: k, queue: make(chan []byte, 100), closed: make(chan struct{})}
	if group == nl.XFRMNLGRP_POLICY {
		k.changes = m
	} else {
		k.events = m
	}
	return m, nil
}

// fakeMonitor delivers events, and ENOBUFS for an empty one and after more than it can keep.
type fakeMonitor struct {
	k      *fakeKernel
	lost   atomic.Bool
	queue  chan []byte
	closed chan struct{}
}

func (m *fakeMonitor) read(b []byte) (int, error) {
	if m.lost.Swap(false) {
		return 0, unix.ENOBUFS
	}
	select {
	case e := <-m.queue:
		if len(e) == 0 {
			return 0, unix.ENOBUFS
		}
		return copy(b, e), nil
	case <-m.closed:
		return 0, os.ErrClosed
	}
}

func (m *fakeMonitor) close() error {
	close(m.closed)
	m.k.mu.Lock()
	defer m.k.mu.Unlock()
	m.k.sockets--
	return nil
}

// event announces that a limit has passed.
func (m *fakeMonitor) event(typ uint16, body []byte, hard bool) {
	tail := make([]byte, 8)
	if hard {
		tail[0] = 1
	}
	m.queue <- netlinkMessage(typ, 0, 0, append(slices.Clone(body), tail...))
}

// tell announces a change of policies by the owner of a port, if anybody listens.
func (m *fakeMonitor) tell(typ uint16, port uint32, body []byte) {
	if m == nil {
		return
	}
	d := netlinkMessage(typ, 0, 0, body)
	binary.NativeEndian.PutUint32(d[12:], port)
	select {
	case m.queue <- d:
	default:
		m.lost.Store(true)
	}
}

// stranger is the port of another program.
const stranger = 77

// flush removes all policies at the command of somebody else.
func (k *fakeKernel) flush() {
	k.mu.Lock()
	defer k.mu.Unlock()
	clear(k.policies)
	clear(k.attrs)
	k.changes.tell(nl.XFRM_MSG_FLUSHPOLICY, stranger, attrBytes(nl.XFRMA_POLICY_TYPE, make([]byte, 4)))
}

// deletePolicy removes one policy, named by selector or by index, at the command of somebody else.
func (k *fakeKernel) deletePolicy(id policyID, byIndex bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.policies, id)
	delete(k.attrs, id)
	k.changes.tell(nl.XFRM_MSG_DELPOLICY, stranger, deletion(id, byIndex))
}

// deletion is the body of the kernel's notification that a policy was deleted.
func deletion(id policyID, byIndex bool) []byte {
	d := nl.XfrmUserpolicyId{Sel: id.sel, Dir: id.dir}
	if byIndex {
		d = nl.XfrmUserpolicyId{Index: 8, Dir: id.dir}
	}
	info := nl.XfrmUserpolicyInfo{Sel: id.sel, Dir: id.dir}
	return append(bytes.Clone(d.Serialize()), attrBytes(nl.XFRMA_POLICY, info.Serialize()[:nl.SizeofXfrmUserpolicyId])...)
}

// place puts a policy into place at the command of somebody else.
func (k *fakeKernel) place(typ uint16, p *policy) {
	var m messages
	m.policy(typ, p)
	s := &fakeSocket{k: k, number: stranger}
	_ = s.send(m.buf)
}

// atOnce has monitors hear of changes only when all of them are made.
func (k *fakeKernel) atOnce(change func()) {
	swap := func(m *fakeMonitor) (old *fakeMonitor) {
		k.mu.Lock()
		defer k.mu.Unlock()
		old, k.changes = k.changes, m
		return old
	}
	monitor := swap(&fakeMonitor{queue: make(chan []byte, 16)})
	change()
	for held := swap(monitor); len(held.queue) > 0; {
		monitor.queue <- <-held.queue
	}
}

// whole reports whether exactly these policies are there, as updatePolicy makes them.
func (k *fakeKernel) whole(ps []policy) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	for i := range ps {
		info, ok := k.policies[ps[i].policyID]
		if !ok || !ps[i].is(append(bytes.Clone(info.Serialize()), k.attrs[ps[i].policyID]...)) {
			return false
		}
	}
	return len(k.policies) == len(ps)
}

// expire ends a state at its hard limit.
func (k *fakeKernel) expire(id stateID) {
	k.mu.Lock()
	body := k.body(id)
	delete(k.states, id)
	delete(k.bodies, id)
	k.mu.Unlock()
	k.events.event(nl.XFRM_MSG_EXPIRE, body[:nl.SizeofXfrmUsersaInfo], true)
}

func (k *fakeKernel) count() (states, policies int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.states), len(k.policies)
}

// retired counts the policies that block and expire.
func (k *fakeKernel) retired() (n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, p := range k.policies {
		if p.Action == actionBlock && p.Lft.HardAddExpiresSeconds == uint64(blockAfterClose/time.Second) {
			n++
		}
	}
	return n
}

type fakeSocket struct {
	k      *fakeKernel
	number uint32
	queue  [][]byte
	flags  uint16 // of replies
}

func (s *fakeSocket) port() (uint32, error) { return s.number, nil }

func (s *fakeSocket) close() error {
	s.k.mu.Lock()
	defer s.k.mu.Unlock()
	s.k.sockets--
	return nil
}

func (s *fakeSocket) recv(b []byte) (int, error) {
	if len(s.queue) == 0 {
		return 0, unix.EAGAIN
	}
	n := copy(b, s.queue[0])
	s.queue = s.queue[1:]
	return n, nil
}

func (s *fakeSocket) send(b []byte) error {
	if s.k.gate != nil {
		<-s.k.gate
	}
	s.k.mu.Lock()
	defer s.k.mu.Unlock()
	var types []uint16
	for len(b) > 0 {
		n := binary.NativeEndian.Uint32(b)
		types = append(types, binary.NativeEndian.Uint16(b[4:]))
		s.one(b[:unix.SizeofNlMsghdr], b[unix.SizeofNlMsghdr:n])
		b = b[n:]
	}
	s.k.sends = append(s.k.sends, types)
	return nil
}

func (s *fakeSocket) one(head, body []byte) {
	typ, flags, seq := binary.NativeEndian.Uint16(head[4:]), binary.NativeEndian.Uint16(head[6:]), binary.NativeEndian.Uint32(head[8:])
	var code unix.Errno
	id := bodyID(typ, body)
	if s.k.refuse != nil {
		code = s.k.refuse(typ, id)
	}
	if code == 0 {
		code = s.execute(typ, flags, seq, id, body)
	}
	if s.k.mute != nil && s.k.mute(typ, id) {
		return
	}
	end := uint16(unix.NLMSG_ERROR)
	if flags&unix.NLM_F_DUMP == unix.NLM_F_DUMP {
		end = unix.NLMSG_DONE
	}
	s.reply(end, seq, append(binary.NativeEndian.AppendUint32(nil, uint32(-int32(code))), head...))
}

func (s *fakeSocket) execute(typ, flags uint16, seq uint32, id stateID, body []byte) unix.Errno {
	switch typ {
	case nl.XFRM_MSG_NEWSA:
		if _, ok := s.k.states[id]; ok {
			return unix.EEXIST
		}
		h, err := parseState(body)
		if err != nil {
			return unix.EINVAL
		}
		s.k.states[id] = h
		s.k.bodies[id] = slices.Clone(body)
		nl.DeserializeXfrmUsersaInfo(s.k.bodies[id]).Curlft.AddTime = uint64(time.Now().Unix())
	case nl.XFRM_MSG_UPDSA:
		if _, ok := s.k.states[id]; !ok {
			return unix.ESRCH
		}
		if have := s.k.bodies[id]; have != nil { // as the kernel: limits and mark, nothing else
			nl.DeserializeXfrmUsersaInfo(have).Lft = nl.DeserializeXfrmUsersaInfo(body).Lft
			mark, marked := findAttr(body[nl.SizeofXfrmUsersaInfo:], nl.XFRMA_SET_MARK)
			if old, ok := findAttr(have[nl.SizeofXfrmUsersaInfo:], nl.XFRMA_SET_MARK); ok && marked {
				copy(old, mark)
			}
		}
	case nl.XFRM_MSG_DELSA:
		if _, ok := s.k.states[id]; !ok {
			return unix.ESRCH
		}
		delete(s.k.states, id)
		delete(s.k.bodies, id)
	case nl.XFRM_MSG_UPDPOLICY, nl.XFRM_MSG_NEWPOLICY:
		p, err := parsePolicy(body)
		if err != nil {
			return unix.EINVAL
		}
		id := policyID{p.Sel, p.Dir}
		if _, ok := s.k.policies[id]; ok && typ == nl.XFRM_MSG_NEWPOLICY {
			return unix.EEXIST
		}
		s.k.policies[id], s.k.attrs[id] = p, bytes.Clone(body[nl.SizeofXfrmUserpolicyInfo:])
		s.k.changes.tell(typ, s.number, bytes.Clone(body))
		if s.k.placed != nil {
			s.k.placed(id)
		}
	case nl.XFRM_MSG_GETSA:
		if flags&unix.NLM_F_DUMP != unix.NLM_F_DUMP {
			if _, ok := s.k.states[id]; !ok {
				return unix.ESRCH
			}
			s.reply(nl.XFRM_MSG_NEWSA, seq, s.k.body(id))
			return 0
		}
		if s.k.broken > 0 {
			s.k.broken--
			s.flags = unix.NLM_F_DUMP_INTR
		}
		n := 0
		for id := range s.k.states {
			s.reply(nl.XFRM_MSG_NEWSA, seq, s.k.body(id))
			if n++; s.k.dumped != nil {
				s.k.mu.Unlock()
				s.k.dumped(n)
				s.k.mu.Lock()
			}
		}
		s.flags = 0
	case nl.XFRM_MSG_GETPOLICY:
		if flags&unix.NLM_F_DUMP != unix.NLM_F_DUMP {
			k := nl.DeserializeXfrmUserpolicyId(body)
			id := policyID{k.Sel, k.Dir}
			p, ok := s.k.policies[id]
			if !ok {
				return unix.ENOENT
			}
			p.Index, p.Curlft.AddTime = 8, 1
			s.reply(nl.XFRM_MSG_NEWPOLICY, seq, append(bytes.Clone(p.Serialize()), s.k.attrs[id]...))
			return 0
		}
		for _, p := range s.k.policies {
			s.reply(nl.XFRM_MSG_NEWPOLICY, seq, p.Serialize())
		}
	case nl.XFRM_MSG_GETSADINFO:
		b := append(make([]byte, 4), attrBytes(attrSADCount, binary.NativeEndian.AppendUint32(nil, uint32(len(s.k.states))))...)
		s.reply(nl.XFRM_MSG_NEWSADINFO, seq, b)
	case nl.XFRM_MSG_GETSPDINFO:
		v := make([]byte, 24)
		for id := range s.k.policies {
			binary.NativeEndian.PutUint32(v[4*id.dir:], binary.NativeEndian.Uint32(v[4*id.dir:])+1)
		}
		s.reply(nl.XFRM_MSG_NEWSPDINFO, seq, append(make([]byte, 4), attrBytes(attrSPDInfo, v)...))
	default:
		return unix.EINVAL
	}
	return 0
}

func (s *fakeSocket) reply(typ uint16, seq uint32, body []byte) {
	s.queue = append(s.queue, netlinkMessage(typ, s.flags, seq, body))
}

func netlinkMessage(typ, flags uint16, seq uint32, body []byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	return append(b, body...)
}

// body is what a dump says of a state.
func (k *fakeKernel) body(id stateID) []byte {
	if b, ok := k.bodies[id]; ok {
		return b
	}
	i := nl.XfrmUsersaInfo{Family: family(id.dst), Reqid: k.states[id].reqid}
	i.Id = nl.XfrmId{Daddr: address(id.dst), Spi: nl.Swap32(uint32(id.spi)), Proto: unix.IPPROTO_ESP}
	return i.Serialize()
}

func attrBytes(typ uint16, value []byte) []byte {
	var m messages
	m.attr(typ, value)
	return m.buf
}

// bodyID returns which state a message is about.
func bodyID(typ uint16, body []byte) stateID {
	switch typ {
	case nl.XFRM_MSG_NEWSA, nl.XFRM_MSG_UPDSA:
		h, _ := parseState(body)
		return h.id
	case nl.XFRM_MSG_DELSA, nl.XFRM_MSG_GETSA:
		if len(body) == 0 { // a dump
			return stateID{}
		}
		i := nl.DeserializeXfrmUsersaId(body)
		return stateID{netipOf(i.Daddr, i.Family), ims.SPI(nl.Swap32(i.Spi))}
	}
	return stateID{}
}

// Addresses and ports of the tests.
var (
	gm4, gm6 = netip.MustParseAddr("10.45.0.5"), netip.MustParseAddr("2001:db8:45::5")
	serverPS = uint16(6100)
	clientPC = uint16(6110)
	otherPC  = uint16(6111)
)

func testConfig() Config {
	return Config{
		Local: []netip.Addr{gm4, gm6}, ServerPorts: []uint16{serverPS}, ClientPorts: []uint16{clientPC, otherPC},
	}
}

// policiesOf is the number of policies for testConfig: two addresses, three ports in three directions, and one for ICMP.
const policiesOf = 2 * (3*3 + 1)

// ueAddr is the address of the i-th phone.
func ueAddr(i int, v6 bool) netip.Addr {
	if v6 {
		return netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 0, 0x45, 14: byte(i >> 8), 15: byte(100 + i)})
	}
	return netip.AddrFrom4([4]byte{10, 45, byte(1 + i>>8), byte(i)})
}

// testKeys returns keys of the right lengths, different for every phone.
func testKeys(s ims.Suite, ue int) ims.ESPKeys {
	k := blankKeys(s)
	for i := range k.Enc {
		k.Enc[i] = byte(i*7 + ue)
	}
	for i := range k.Auth {
		k.Auth[i] = byte(i*11 + ue)
	}
	if s.Enc == ims.EncAESGCM || s.Alg == ims.AlgAESGMAC {
		k.Salt = [4]byte{1, 2, 3, byte(ue)}
	}
	return k
}

var gcm = ims.Suite{Alg: ims.AlgNull, Enc: ims.EncAESGCM}

// testSet returns the parameters of the i-th phone's SA set.
func testSet(i int, v6 bool, s ims.Suite) sa.Params {
	p := sa.Params{
		ID: uint64(i) + 1, Label: uint32(i) + 1000, Local: gm4, UE: ueAddr(i, v6),
		Ports: ims.Ports{UC: 6301, US: 6300, PC: clientPC, PS: serverPS},
		SPIs:  ims.SPIs{UC: 0x2001, US: 0x2002, PC: ims.SPI(0x10000 + 2*i), PS: ims.SPI(0x10001 + 2*i)},
		Keys:  testKeys(s, i),
	}
	if v6 {
		p.ID += 1 << 32
		p.Local = gm6
	}
	return p
}

// wait runs one request and returns what done got.
func wait(t *testing.T, f func(done func(error))) error {
	t.Helper()
	c := make(chan error, 2)
	f(func(err error) { c <- err })
	return <-c
}

func install(t *testing.T, b *Backend, p sa.Params) error {
	t.Helper()
	return wait(t, func(done func(error)) { b.Install(p, done) })
}

func remove(t *testing.T, b *Backend, p sa.Params) error {
	t.Helper()
	return wait(t, func(done func(error)) { b.Remove(p, done) })
}

// kill ends a backend the way a crash does: everything stays in the kernel.
func kill(t *testing.T, b *Backend) {
	t.Helper()
	b.end(false)
	if err := b.closeSockets(); err != nil {
		t.Fatal(err)
	}
}

// newFake returns a backend on a fake kernel.
func newFake(t *testing.T, k *fakeKernel, cfg Config) *Backend {
	t.Helper()
	b, err := newBackend(cfg, k)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return b
}

// testLogger writes everything.
func testLogger(w io.Writer) *slog.Logger { return slog.New(slog.NewTextHandler(w, nil)) }
