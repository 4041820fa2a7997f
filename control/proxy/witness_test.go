package proxy

import (
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/sa"
)

// witness is a sa.Witness that the test tells what was seen.
type witness struct {
	traffic map[uint32]sa.Traffic
	first   map[uint64]time.Time
	asked   int
}

func (w *witness) Traffic(label uint32) sa.Traffic { w.asked++; return w.traffic[label] }

func (w *witness) First(set uint64) time.Time { w.asked++; return w.first[set] }

func newWitness() *witness {
	return &witness{traffic: make(map[uint32]sa.Traffic), first: make(map[uint64]time.Time)}
}

func witnessRig(t *testing.T, change ...func(*Config)) (*rig, *witness) {
	t.Helper()
	wit := newWitness()
	return newRig(t, append(change, func(c *Config) { c.Fleet, c.Witness = new(Fleet), wit })...), wit
}

// only returns the only phone there is.
func (r *rig) only(t *testing.T) UEInfo {
	t.Helper()
	list := r.list(t, UEQuery{})
	if len(list) != 1 {
		t.Fatalf("%d UEs", len(list))
	}
	return list[0]
}

// A phone was seen when its last ESP packet or its last message came in, whichever is later; nobody is asked on the way of a
// message.
func TestLastSeen(t *testing.T) {
	r, wit := witnessRig(t)
	p := r.registered()
	registered := r.l.now
	r.advance(time.Minute)
	r.one(p.protectedFlow, p.message())
	if wit.asked != 0 {
		t.Errorf("the witness was asked %d times by messages", wit.asked)
	}
	u := r.only(t)
	if !u.LastMessage.Equal(r.l.now) || !u.LastSeen.Equal(r.l.now) || !u.Sets[0].Heard.Equal(r.l.now) || u.ESP != (sa.Traffic{}) || !u.Witnessed {
		t.Errorf("after a message at %v, registered at %v: %+v", r.l.now, registered, u)
	}
	label := r.context(p).Current.Label
	seen := sa.Traffic{Packets: 17, Bytes: 4000, Last: r.l.now.Add(30 * time.Second)}
	wit.traffic[label], wit.first[u.Sets[0].ID] = seen, registered.Add(time.Millisecond)
	u = r.only(t)
	if u.ESP != seen || u.LastSeen != seen.Last || !u.LastMessage.Equal(r.l.now) || u.Sets[0].FirstESP != wit.first[u.Sets[0].ID] ||
		u.Sets[0].Diagnosis != 0 {
		t.Errorf("after ESP packets: %+v", u)
	}
	wit.traffic[label] = sa.Traffic{Packets: 17, Bytes: 4000, Last: registered}
	if u = r.only(t); !u.LastSeen.Equal(r.l.now) {
		t.Errorf("a message after the last packet: seen at %v", u.LastSeen)
	}

	// What the core sends is no sign of life; a malformed request and an answer are.
	at := r.l.now
	r.advance(time.Minute)
	invite := r.one(coreFlow(), mtInvite(r.path(p), ""))
	if u = r.only(t); !u.LastMessage.Equal(at) {
		t.Errorf("a request of the core counts as one of the phone's: %v", u.LastMessage)
	}
	r.one(p.protectedFlow, answerTo(t, invite.msg, "180 Ringing"))
	if u = r.only(t); !u.LastMessage.Equal(r.l.now) {
		t.Errorf("an answer does not count: %v", u.LastMessage)
	}
	r.advance(time.Minute)
	r.one(p.protectedFlow, strings.Replace(p.message(), "CSeq: 1 MESSAGE", "CSeq: 1 INVITE", 1))
	if u = r.only(t); !u.LastMessage.Equal(r.l.now) {
		t.Errorf("a malformed request does not count: %v", u.LastMessage)
	}

	// A message whose mark contradicts it is nobody's.
	at = r.l.now
	r.advance(time.Minute)
	f := p.protectedFlow
	f.Label = label + 1
	r.deliver(f, p.message())
	if u = r.only(t); !u.LastMessage.Equal(at) {
		t.Errorf("a contradiction counts: %v", u.LastMessage)
	}
}

// What came in last on a set that has gone since stays with the phone.
func TestLastSeenOutlivesSet(t *testing.T) {
	r, _ := witnessRig(t)
	p := r.signUp(phoneAt("10.45.0.7", 1))
	old := *p
	r.renew(p)
	r.one(p.protectedFlow, p.says()) // the new set is in use
	r.advance(time.Minute)
	r.one(old.protectedFlow, p.says())
	last := r.l.now
	r.advance(3 * time.Minute)
	u := r.only(t)
	if len(u.Sets) != 1 || !u.LastMessage.Equal(last) || !u.Sets[0].Heard.Before(last) {
		t.Errorf("last message at %v: %+v", last, u)
	}
}

// Counters of a phone add up over its labels, of which it has several where it has come from another worker.
func TestTrafficOverLabels(t *testing.T) {
	r, wit := witnessRig(t)
	p := r.signUp(phoneAt("10.45.0.7", 1))
	r.renew(p)
	ue := r.context(p)
	now := r.l.now
	wit.traffic[ue.Sets[1].Label] = sa.Traffic{Packets: 3, Bytes: 300, Last: now}
	wit.traffic[1<<24|9] = sa.Traffic{Packets: 4, Bytes: 500, Last: now.Add(-time.Second)}
	if got, want := r.only(t).ESP, (sa.Traffic{Packets: 3, Bytes: 300, Last: now}); got != want {
		t.Errorf("one label for both sets: %+v, want %+v", got, want)
	}
	ue.Sets[0].Label = 1<<24 | 9
	if got, want := r.only(t).ESP, (sa.Traffic{Packets: 7, Bytes: 800, Last: now}); got != want {
		t.Errorf("two labels: %+v, want %+v", got, want)
	}
}

// A phone that sends nothing after the challenge, one whose packets nobody can decrypt, and one that is all right look
// different to an operator.
func TestDiagnosis(t *testing.T) {
	r, wit := witnessRig(t)
	p := newPhone()
	r.challenge(p, clearFlow(), 5060)
	set := func() SetInfo { t.Helper(); return r.only(t).Sets[0] }
	if got := set(); got.Diagnosis != DiagnosisNoESP || !got.FirstESP.IsZero() || !got.Heard.IsZero() {
		t.Errorf("challenged: %+v", got)
	}
	r.advance(time.Second)
	first := r.l.now
	wit.first[set().ID] = first
	if got := set(); got.Diagnosis != 0 || !got.FirstESP.Equal(first) {
		t.Errorf("at the first packet: %+v", got)
	}
	r.advance(acceptTime)
	if got := set(); got.Diagnosis != DiagnosisNotAccepted || !got.Heard.IsZero() {
		t.Errorf("nothing accepted since: %+v", got)
	}
	// SM7 is heard on the temporary set, before the core has decided.
	p.authorization = proof
	r.one(p.protectedFlow, p.register("sm7", 6300, "Security-Verify: "+p.server))
	if got := set(); got.Phase != sa.Temporary || got.Diagnosis != 0 || !got.Heard.Equal(r.l.now) {
		t.Errorf("SM7 accepted: %+v", got)
	}
}

// What the process before this one has heard is not known: nothing is said of its sets.
func TestDiagnosisAfterRestart(t *testing.T) {
	wit := newWitness()
	k := newKeptRig(t, func(c *Config) { c.Witness = wit })
	p := k.registered()
	old := *p
	p.agree()
	req := k.one(old.protectedFlow, p.register("re", 6300, "Security-Verify: "+old.server))
	k.readServer(p, k.one(coreFlow(), answerTo(t, req.msg, "401 Unauthorized", challenge)).msg)
	for _, s := range k.context(p).Sets {
		wit.first[s.ID] = k.l.now
	}
	k.restart(t, 10*time.Second, false)
	k.advance(acceptTime)
	u := k.only(t)
	if len(u.Sets) != 2 || u.Sets[1].Phase != sa.Temporary {
		t.Fatalf("restored: %+v", u.Sets)
	}
	for _, s := range u.Sets {
		if s.Diagnosis != 0 || !s.Heard.IsZero() {
			t.Errorf("%s set: %+v", s.Phase, s)
		}
	}
}

// Without a witness there is nothing to be said about ESP.
func TestNoWitness(t *testing.T) {
	r := fleetRig(t)
	r.challenge(newPhone(), clearFlow(), 5060)
	if u := r.only(t); u.Witnessed || u.Sets[0].Diagnosis != 0 || !u.LastSeen.IsZero() {
		t.Errorf("%+v", u)
	}
}

// A registration in clear is seen by its messages; a witness of ESP packets knows nothing of it.
func TestLastSeenInClear(t *testing.T) {
	r, wit := witnessRig(t, with(allow))
	p := newPhone()
	r.digest(p, clearFlow(), "d")
	ue := r.association()
	if u := r.only(t); !u.LastMessage.Equal(r.l.now) || !u.Sets[0].FirstESP.IsZero() || u.Sets[0].Diagnosis != 0 {
		t.Errorf("registered: %+v", u)
	}
	r.advance(time.Minute)
	wit.traffic[ue.Current.Label] = sa.Traffic{Packets: 5, Bytes: 500, Last: r.l.now}
	r.one(clearFlow(), p.message())
	if u := r.only(t); !u.LastMessage.Equal(r.l.now) || u.ESP.Packets != 0 {
		t.Errorf("after a message: %+v", u)
	}
}
