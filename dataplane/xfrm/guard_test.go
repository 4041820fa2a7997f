package xfrm

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// lockedBuffer is a buffer for logs of several goroutines.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// calls counts the system calls to a fake kernel.
func (k *fakeKernel) calls() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.sends)
}

// TestGuard: whatever somebody else does to the policies, they are all there again, and counted if they were not.
//
// Peers: A1.08a
func TestGuard(t *testing.T) {
	changed := func(k *fakeKernel, b *Backend, change func(*policy)) {
		p := b.policies[0]
		change(&p)
		k.place(nl.XFRM_MSG_UPDPOLICY, &p)
	}
	foreign := func(b *Backend) policy {
		p := b.policies[0]
		p.sel.User = 0
		return p
	}
	for _, tc := range []struct {
		name             string
		do               func(k *fakeKernel, b *Backend)
		missing, altered int
	}{
		{"flush", func(k *fakeKernel, _ *Backend) { k.flush() }, policiesOf, 0},
		{"delete by selector", func(k *fakeKernel, b *Backend) { k.deletePolicy(b.policies[3].policyID, false) }, 1, 0},
		{"delete by index", func(k *fakeKernel, b *Backend) { k.deletePolicy(b.policies[3].policyID, true) }, 1, 0},
		{"blocked", func(k *fakeKernel, b *Backend) {
			changed(k, b, func(p *policy) { p.action = actionBlock })
		}, 0, 1},
		{"other reqid", func(k *fakeKernel, b *Backend) { changed(k, b, func(p *policy) { p.reqid++ }) }, 0, 1},
		{"short limit", func(k *fakeKernel, b *Backend) { changed(k, b, func(p *policy) { p.expires = 1 }) }, 0, 1},
		{"removed and made otherwise", func(k *fakeKernel, b *Backend) {
			// The guard may be quick enough to put a policy back before it is made otherwise, which is another case.
			k.atOnce(func() {
				k.deletePolicy(b.policies[0].policyID, true)
				p := b.policies[0]
				p.reqid++
				k.place(nl.XFRM_MSG_NEWPOLICY, &p)
				k.deletePolicy(b.policies[1].policyID, false)
			})
		}, 1, 1},
		{"lost notification", func(k *fakeKernel, b *Backend) {
			k.mu.Lock()
			delete(k.policies, b.policies[0].policyID)
			k.attrs[b.policies[1].policyID] = nil // lets clear packets out
			k.mu.Unlock()
			k.changes.queue <- nil
		}, 1, 1},
		{"damaged notification", func(k *fakeKernel, b *Backend) {
			k.mu.Lock()
			delete(k.policies, b.policies[0].policyID)
			k.mu.Unlock()
			k.changes.tell(nl.XFRM_MSG_DELPOLICY, stranger, make([]byte, 10))
		}, 1, 0},
		{"needless flush", func(k *fakeKernel, _ *Backend) { k.changes.tell(nl.XFRM_MSG_FLUSHPOLICY, stranger, nil) }, 0, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k := newFakeKernel()
				var text lockedBuffer
				cfg := testConfig()
				cfg.Logger = testLogger(&text)
				b := newFake(t, k, cfg)
				if !k.whole(b.policies) {
					t.Fatal("not all policies are there after New")
				}
				tc.do(k, b)
				synctest.Wait()
				time.Sleep(2 * mendGap)
				synctest.Wait()
				if !k.whole(b.policies) || b.PoliciesRestored() != uint64(tc.missing+tc.altered) {
					t.Errorf("%d policies restored, want %d, and all there", b.PoliciesRestored(), tc.missing+tc.altered)
				}
				warning := fmt.Sprintf("put back\" missing=%d changed=%d of=%d", tc.missing, tc.altered, policiesOf)
				if got := strings.Contains(text.String(), warning); got != (tc.missing+tc.altered > 0) {
					t.Errorf("log says so: %v:\n%s", got, &text)
				}
				calls := k.calls()
				time.Sleep(time.Hour)
				if k.calls() != calls {
					t.Errorf("%d system calls when all was well again", k.calls()-calls)
				}
			})
		})
	}

	for _, tc := range []struct {
		name string
		do   func(k *fakeKernel, b *Backend)
	}{
		{"foreign policy added and deleted", func(k *fakeKernel, b *Backend) {
			p := foreign(b)
			k.place(nl.XFRM_MSG_NEWPOLICY, &p)
			k.deletePolicy(p.policyID, false)
			k.place(nl.XFRM_MSG_UPDPOLICY, &p)
			k.deletePolicy(p.policyID, true)
		}},
		{"the same by somebody else", func(k *fakeKernel, b *Backend) { k.place(nl.XFRM_MSG_UPDPOLICY, &b.policies[0]) }},
		{"our own message, whatever it says", func(k *fakeKernel, b *Backend) {
			for _, port := range b.ports {
				var m messages
				p := b.policies[0]
				p.action = actionBlock
				m.updatePolicy(&p)
				k.changes.tell(nl.XFRM_MSG_UPDPOLICY, port, m.buf[unix.SizeofNlMsghdr:])
			}
		}},
		{"messages about other things", func(k *fakeKernel, b *Backend) {
			k.changes.tell(nl.XFRM_MSG_POLEXPIRE, stranger, nil)
			k.changes.tell(nl.XFRM_MSG_GETPOLICY, stranger, deletion(b.policies[0].policyID, false))
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k := newFakeKernel()
				b := newFake(t, k, testConfig())
				synctest.Wait()
				calls := k.calls()
				tc.do(k, b)
				theirs := k.calls() - calls
				time.Sleep(time.Hour)
				if n := k.calls() - calls - theirs; n != 0 || b.PoliciesRestored() != 0 {
					t.Errorf("%d system calls and %d policies restored, want none", n, b.PoliciesRestored())
				}
			})
		})
	}
}

// TestGuardRate: somebody who never stops gets an answer a hundred times a second and no more, and not the last word.
func TestGuardRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newFakeKernel()
		b := newFake(t, k, testConfig())
		calls := k.calls()
		const flushes = 1000
		for range flushes {
			k.flush()
			time.Sleep(time.Millisecond)
		}
		time.Sleep(mendGap)
		synctest.Wait()
		const most = flushes/10 + 2
		if n := k.calls() - calls; n > most || n < most/2 {
			t.Errorf("%d system calls for %d flushes in a second, want at most %d", n, flushes, most)
		}
		if n := b.PoliciesRestored(); !k.whole(b.policies) || n%policiesOf != 0 || n > most*policiesOf {
			t.Errorf("%d policies restored; all have to be there", n)
		}
	})
}

// TestGuardOverrun: more notifications than the buffer takes are an overrun, counted, and nothing else is different.
func TestGuardOverrun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newFakeKernel()
		b := newFake(t, k, testConfig())
		synctest.Wait()
		k.mu.Lock() // nobody else gets a turn with the kernel
		p := b.policies[0].policyID
		other := p
		other.sel.User = 0
		for range 2 * cap(k.changes.queue) {
			k.changes.tell(nl.XFRM_MSG_DELPOLICY, stranger, deletion(other, false))
		}
		delete(k.policies, p)
		k.changes.lost.Store(true)
		k.changes.tell(nl.XFRM_MSG_DELPOLICY, stranger, deletion(other, false)) // should the guard have kept up with the others
		k.mu.Unlock()
		synctest.Wait()
		if !k.whole(b.policies) || b.Overruns() == 0 || b.PoliciesRestored() != 1 {
			t.Errorf("%d overruns, %d policies restored; want 1 and all there", b.Overruns(), b.PoliciesRestored())
		}
	})
}

// TestGuardRetry: what the kernel refuses is tried again until it does it.
func TestGuardRetry(t *testing.T) {
	for _, typ := range []uint16{nl.XFRM_MSG_NEWPOLICY, nl.XFRM_MSG_UPDPOLICY} {
		synctest.Test(t, func(t *testing.T) {
			k := newFakeKernel()
			var text lockedBuffer
			cfg := testConfig()
			cfg.Logger = testLogger(&text)
			b := newFake(t, k, cfg)
			k.mu.Lock()
			k.refuse = func(x uint16, _ stateID) unix.Errno {
				if x == typ {
					return unix.ENOMEM
				}
				return 0
			}
			k.mu.Unlock()
			if typ == nl.XFRM_MSG_NEWPOLICY {
				k.flush()
			} else {
				k.mu.Lock()
				clear(k.attrs) // every template
				k.mu.Unlock()
				k.changes.queue <- nil
			}
			time.Sleep(5*mendRetry + mendRetry/2)
			if k.whole(b.policies) || b.PoliciesRestored() != 0 || strings.Count(text.String(), "cannot put the constant policies back") != 6 {
				t.Errorf("%d policies restored, want 6 failures:\n%s", b.PoliciesRestored(), &text)
			}
			k.mu.Lock()
			k.refuse = nil
			k.mu.Unlock()
			time.Sleep(mendRetry)
			synctest.Wait()
			if !k.whole(b.policies) {
				t.Error("not all policies are back")
			}
		})
	}
}

// TestGuardDuringNew: a flush at any moment of New is noticed.
func TestGuardDuringNew(t *testing.T) {
	for at := 1; at <= policiesOf; at++ {
		synctest.Test(t, func(t *testing.T) {
			k := newFakeKernel()
			n := 0
			k.placed = func(policyID) {
				if n++; n == at {
					clear(k.policies)
					k.changes.tell(nl.XFRM_MSG_FLUSHPOLICY, stranger, nil)
				}
			}
			b := newFake(t, k, testConfig())
			synctest.Wait()
			if !k.whole(b.policies) || b.PoliciesRestored() != uint64(at) {
				t.Errorf("flush after %d policies: %d restored", at, b.PoliciesRestored())
			}
		})
	}
}

// TestGuardEnds: Close and Detach do to the policies what they did before, flush or no flush, and nobody undoes it.
//
// Peers: A1.22c
func TestGuardEnds(t *testing.T) {
	for _, flushes := range []int{0, 1, 3} {
		for name, end := range map[string]func(*Backend) error{"Close": (*Backend).Close, "Detach": (*Backend).Detach} {
			t.Run(fmt.Sprintf("%s after %d flushes", name, flushes), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					k := newFakeKernel()
					cfg := testConfig()
					cfg.Logger = testLogger(io.Discard)
					b, err := newBackend(cfg, k)
					if err != nil {
						t.Fatal(err)
					}
					for range flushes {
						k.flush() // the guard may be anywhere
					}
					if name == "Detach" {
						synctest.Wait()
						time.Sleep(2 * mendGap)
						synctest.Wait()
					}
					if err := end(b); err != nil {
						t.Fatal(err)
					}
					calls := k.calls()
					time.Sleep(time.Hour)
					if n := k.calls() - calls; n != 0 {
						t.Errorf("%d system calls afterwards", n)
					}
					if n := k.retired(); name == "Close" && n != policiesOf {
						t.Errorf("%d policies block and expire, want %d", n, policiesOf)
					}
					if name == "Detach" && !k.whole(b.policies) {
						t.Error("the policies are not as they were")
					}
					k.flush()
					time.Sleep(time.Hour)
					if k.calls() != calls {
						t.Error("a flush was answered after the end")
					}
				})
			})
		}
	}
}
