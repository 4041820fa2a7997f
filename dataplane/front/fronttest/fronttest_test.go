package fronttest

import (
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/gmgate/gmgate/control/ims"
)

var (
	local  = netip.MustParseAddrPort("10.0.0.5:5060")
	remote = netip.MustParseAddrPort("10.45.0.7:5061")
)

// script notes what it is called with and does a bit of everything.
type script struct {
	w   *Worker
	got []string
}

func (s *script) note(format string, args ...any) {
	s.got = append(s.got, fmt.Sprintf(format, args...))
}

func (s *script) Message(f ims.Flow, msg []byte) {
	s.note("message %s %d %s", f.Transport, f.Conn, msg)
	switch string(msg) {
	case "echo":
		if f.Conn != 0 {
			s.note("send: %v", s.w.SendTCP(f.Conn, msg))
		} else {
			s.note("send: %v", s.w.SendUDP(f.Local, f.Remote, msg))
		}
	case "dial":
		s.w.Dial(netip.AddrPortFrom(f.Local.Addr(), 0), f.Remote, ims.GmProtected, true, 7)
	case "hand":
		s.note("hand: %v", s.w.Hand(1, f, msg))
	case "close":
		s.w.CloseConn(f.Conn, true)
		s.w.CloseConn(f.Conn, true)
		s.note("send: %v", s.w.SendTCP(f.Conn, msg))
	case "post":
		_ = s.w.Post(func() {
			s.note("first")
			_ = s.w.Post(func() { s.note("third") })
		})
		_ = s.w.Post(func() { s.note("second") })
	}
	msg[0] = '!' // it may
}

func (s *script) Bad(f ims.Flow, msg []byte, reason string) {
	s.note("bad %d %s %s", f.Conn, msg, reason)
}
func (s *script) Closed(c ims.ConnID, f ims.Flow) { s.note("closed %d %s", c, f) }
func (s *script) Dialed(tag uint64, c ims.ConnID, f ims.Flow, err error) {
	s.note("dialed %d %d %s %v", tag, c, f, err)
}

func (s *script) Tick(now time.Time) time.Duration {
	s.note("tick %s", now.Sub(Start))
	return 0
}

// want compares and forgets what the handler got.
func (s *script) want(t *testing.T, lines ...string) {
	t.Helper()
	if d := cmp.Diff(lines, s.got); d != "" {
		t.Errorf("handler (-want +got):\n%s", d)
	}
	s.got = nil
}

func newScript() (*Worker, *script) {
	w := New(0, 2, local)
	s := &script{w: w}
	w.SetHandler(s)
	return w, s
}

func TestUDP(t *testing.T) {
	w, s := newScript()
	w.Receive(ims.GmClear, local, remote, "echo")
	s.want(t, "message udp 0 echo", "send: <nil>")
	want := []Sent{{Transport: ims.UDP, Local: local, Remote: remote, Msg: "echo"}}
	if got := w.TakeSent(); !slices.Equal(got, want) {
		t.Errorf("sent %+v", got)
	}
	if got := w.TakeSent(); got != nil {
		t.Errorf("sent twice: %+v", got)
	}
	for _, tt := range []struct {
		local, remote netip.AddrPort
		msg           []byte
		want          error
	}{
		{remote, remote, []byte("x"), ErrNoListener},
		{local, netip.AddrPort{}, []byte("x"), ErrAddress},
		{local, netip.MustParseAddrPort("[::1]:5"), []byte("x"), ErrAddress},
		{local, netip.AddrPortFrom(remote.Addr(), 0), []byte("x"), ErrAddress},
		{local, remote, nil, ErrSize},
		{local, remote, make([]byte, maxDatagram+1), ErrSize},
	} {
		if err := w.SendUDP(tt.local, tt.remote, tt.msg); !errors.Is(err, tt.want) {
			t.Errorf("%s -> %s: got %v, want %v", tt.local, tt.remote, err, tt.want)
		}
	}
	w.SendErr = func(s Sent) error { return fmt.Errorf("no %s", s.Msg) }
	w.Receive(ims.GmClear, local, remote, "echo")
	s.want(t, "message udp 0 echo", "send: no echo")
	w.Receive(ims.Mw, local, remote, "hand")
	s.want(t, "message udp 0 hand", "hand: <nil>")
	f := ims.Flow{Local: local, Remote: remote, Transport: ims.UDP, Side: ims.Mw}
	if got := w.TakeHanded(); !slices.Equal(got, []Handed{{To: 1, Flow: f, Msg: "hand"}}) {
		t.Errorf("handed %+v", got)
	}
	if err := w.Hand(2, f, nil); !errors.Is(err, ErrNoWorker) {
		t.Errorf("hand: %v", err)
	}
	w.Deliver(f, "x")
	s.want(t, "message udp 0 x")
}

func TestTCP(t *testing.T) {
	w, s := newScript()
	c := w.Accept(ims.GmProtected, local, remote)
	w.ReceiveTCP(c, "echo")
	s.want(t, "message tcp 1 echo", "send: <nil>")
	w.ReceiveTCP(c, "close")
	s.want(t, "message tcp 1 close", "send: no such connection", "closed 1 tcp 10.45.0.7:5061->10.0.0.5:5060")
	if got := w.TakeCloses(); !slices.Equal(got, []Close{{Conn: c, Reset: true}}) {
		t.Errorf("closes %+v", got)
	}
	w.ReceiveTCP(c, "echo")
	w.Hangup(c)
	w.Break(c, "x", "start_line")
	s.want(t)
	c = w.Accept(ims.GmProtected, local, remote)
	w.Break(c, "x", "start_line")
	s.want(t, "bad 2 x start_line", "closed 2 tcp 10.45.0.7:5061->10.0.0.5:5060")
	c = w.Accept(ims.GmProtected, local, remote)
	if len(w.Conns()) != 1 || w.Conns()[c].Remote != remote {
		t.Errorf("connections %+v", w.Conns())
	}
	w.Hangup(c)
	s.want(t, "closed 3 tcp 10.45.0.7:5061->10.0.0.5:5060")
}

func TestDial(t *testing.T) {
	w, s := newScript()
	w.Receive(ims.GmProtected, local, remote, "dial")
	w.Receive(ims.GmProtected, local, remote, "dial")
	s.want(t, "message udp 0 dial", "message udp 0 dial")
	d := w.TakeDials()
	if len(d) != 2 || d[0] != (Dial{netip.MustParseAddrPort("10.0.0.5:0"), remote, ims.GmProtected, true, 7}) {
		t.Fatalf("dials %+v", d)
	}
	c := w.Connect(d[0])
	w.Refuse(d[1], errors.New("refused"))
	s.want(t, "dialed 7 1 tcp 10.45.0.7:5061->10.0.0.5:40000 <nil>", "dialed 7 0 tcp 10.45.0.7:5061->10.0.0.5:0 refused")
	w.ReceiveTCP(c, "echo")
	s.want(t, "message tcp 1 echo", "send: <nil>")
}

func TestTimeAndPosts(t *testing.T) {
	w, s := newScript()
	w.Advance(time.Second)
	w.Advance(time.Minute)
	s.want(t, "tick 1s", "tick 1m1s")
	if !w.Now().Equal(Start.Add(61*time.Second)) || w.Index() != 0 {
		t.Errorf("time %s, worker %d", w.Now(), w.Index())
	}
	w.Receive(ims.Mw, local, remote, "post")
	s.want(t, "message udp 0 post", "first", "second", "third")
	done := make(chan struct{})
	go func() {
		_ = w.Post(func() { s.note("from elsewhere") })
		close(done)
	}()
	<-done
	s.want(t)
	w.Run()
	s.want(t, "from elsewhere")
	_ = w.Post(func() {
		defer func() { s.note("nested: %v", recover() != nil) }()
		w.Advance(0)
	})
	w.Run()
	s.want(t, "nested: true")
}

// TestImports: tests of the control plane must not pull in gnet.
func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Skip("no go command")
	}
	for p := range strings.FieldsSeq(string(out)) {
		if strings.Contains(p, "gnet") || strings.Contains(p, "dataplane/") && !strings.HasSuffix(p, "fronttest") {
			t.Errorf("imports %s", p)
		}
	}
}
