package xfrm

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// How often the policies are looked after, whatever the kernel announces.
const (
	mendGap   = 10 * time.Millisecond // between one look and the next
	mendRetry = time.Second           // after the kernel refused one
)

// suspect has the guard look after the policies. Suspicions that come while it is busy are one.
func (b *Backend) suspect() {
	select {
	case b.suspicion <- struct{}{}:
	default:
	}
}

// guard puts policies back that others took away or changed, until the worker has ended: the first suspicion at once,
// what follows at most once per mendGap. Looking changes nothing in the kernel while all is as it should be, and the
// monitor passes over our own messages, so that the guard never wakes itself.
func (b *Backend) guard() {
	for {
		select {
		case <-b.stopped:
			return
		case <-b.suspicion:
		}
		pause := mendGap
		b.queryMu.Lock()
		missing, altered, err := mend(b.query, b.policies)
		b.queryMu.Unlock()
		if n := missing + altered; n > 0 {
			b.restored.Add(uint64(n)) //nolint:gosec // not negative
			b.log.Warn("constant policies that somebody removed or changed are put back",
				slog.Int("missing", missing), slog.Int("changed", altered), slog.Int("of", len(b.policies)))
		}
		if err != nil {
			b.log.Error("cannot put the constant policies back", slog.Any("error", err))
			b.suspect()
			pause = mendRetry
		}
		select {
		case <-b.stopped:
			return
		case <-time.After(pause):
		}
	}
}

// PoliciesRestored returns how many of the constant policies were found missing or changed by somebody else and were put
// back. Until the kernel's notification is acted upon, within milliseconds, such a policy protects nothing.
func (b *Backend) PoliciesRestored() uint64 { return b.restored.Load() }

// mend makes the kernel have policies, and returns how many it lacked and how many it had otherwise. The missing ones
// come first, in one system call that leaves what is there alone: neither limits nor routes are touched in vain.
func mend(c *conn, ps []policy) (missing, altered int, err error) {
	var there []policy
	added := 0
	err = c.inBatches(len(ps), func(i int) {
		c.addPolicy(&ps[i])
		added++
	}, func(i int, err error) error {
		added--
		if errors.Is(err, unix.EEXIST) {
			there = append(there, ps[i])
			return nil
		}
		return fmt.Errorf("put back policy %s: %w", ps[i], err)
	})
	missing = added
	other := c.differing(there)
	if e := place(c, other); e != nil {
		return missing, 0, errors.Join(err, e)
	}
	return missing, len(other), err
}

// differing returns those of ps that the kernel does not have just so. One that cannot be read counts.
func (c *conn) differing(ps []policy) (other []policy) {
	index := make(map[policyID]int, len(ps))
	for i := range ps {
		index[ps[i].policyID] = i
	}
	same := make([]bool, len(ps))
	c.replies = func(typ uint16, body []byte) {
		p, err := parsePolicy(body)
		if typ != nl.XFRM_MSG_NEWPOLICY || err != nil {
			return
		}
		if i, ok := index[policyID{p.Sel, p.Dir}]; ok {
			same[i] = ps[i].is(body)
		}
	}
	_ = c.inBatches(len(ps), func(i int) { c.getPolicy(ps[i].policyID) }, func(int, error) error { return nil })
	c.replies = nil
	for i := range ps {
		if !same[i] {
			other = append(other, ps[i])
		}
	}
	return other
}

// is reports whether the kernel's description of a policy is of what updatePolicy makes of p. Age and index may differ.
func (p *policy) is(body []byte) bool {
	have, err := parsePolicy(body)
	if err != nil {
		return false
	}
	var m messages
	m.updatePolicy(p)
	ours := m.buf[unix.SizeofNlMsghdr:]
	want := *nl.DeserializeXfrmUserpolicyInfo(ours)
	have.Curlft, have.Index, have.Pad = want.Curlft, want.Index, want.Pad
	if have != want {
		return false
	}
	attrs := body[nl.SizeofXfrmUserpolicyInfo:]
	for _, typ := range []uint16{nl.XFRMA_MARK, nl.XFRMA_IF_ID, nl.XFRMA_SEC_CTX, nl.XFRMA_OFFLOAD_DEV} {
		if _, ok := findAttr(attrs, typ); ok {
			return false
		}
	}
	if v, ok := findAttr(attrs, nl.XFRMA_POLICY_TYPE); ok && (len(v) == 0 || v[0] != policyTypeMain) {
		return false
	}
	tmpl, _ := findAttr(attrs, nl.XFRMA_TMPL)
	wantTmpl, _ := findAttr(ours[nl.SizeofXfrmUserpolicyInfo:], nl.XFRMA_TMPL)
	return bytes.Equal(tmpl, wantTmpl)
}

// changed reports whether a message of somebody else may have removed or changed one of the constant policies.
func (b *Backend) changed(typ uint16, body []byte) bool {
	switch typ {
	case nl.XFRM_MSG_FLUSHPOLICY:
		return true
	case nl.XFRM_MSG_DELPOLICY:
		id, err := parseDeletion(body)
		return err != nil || b.constant(id) != nil
	case nl.XFRM_MSG_NEWPOLICY, nl.XFRM_MSG_UPDPOLICY:
		i, err := parsePolicy(body)
		if err != nil {
			return true
		}
		p := b.constant(policyID{i.Sel, i.Dir})
		return p != nil && !p.is(body)
	}
	return false
}
