package front

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/panjf2000/gnet/v2"

	"github.com/gmgate/gmgate/control/ims"
)

// pipe stands for gnet's side of a connection, so that a test decides where the stream is cut.
type pipe struct {
	gnet.Conn
	loop pipeLoop
	out  bytes.Buffer
	wait int // octets that the peer has not read
}

type pipeLoop struct {
	gnet.EventLoop
	close func()
}

func (p *pipe) Write(b []byte) (int, error) { return p.out.Write(b) }
func (p *pipe) OutboundBuffered() int       { return p.wait }
func (p *pipe) EventLoop() gnet.EventLoop   { return p.loop }
func (l pipeLoop) Close(gnet.Conn) error    { l.close(); return nil }

// outcome is what comes out of a stream.
type outcome struct {
	msgs   []string
	bad    string
	closed int
	pongs  string
}

// collector is a handler that notes the outcome.
type collector struct {
	recorder
	outcome
}

func (h *collector) Message(_ ims.Flow, msg []byte) {
	h.msgs = append(h.msgs, string(msg))
	clear(msg) // the handler may modify it
}
func (h *collector) Bad(_ ims.Flow, _ []byte, reason string) { h.bad = reason }
func (h *collector) Closed(ims.ConnID, ims.Flow)             { h.closed++ }

// play feeds a stream in pieces that cut gives the sizes of, and checks that nothing is left behind.
func play(t *testing.T, cfg Config, stream []byte, cut func(i int) int) outcome {
	t.Helper()
	return playTo(t, &pipe{}, cfg, stream, cut)
}

func playTo(t *testing.T, p *pipe, cfg Config, stream []byte, cut func(i int) int) outcome {
	t.Helper()
	cfg.populate()
	f := &Front{cfg: cfg, log: cfg.Logger}
	f.conns.Store(1)
	h := new(collector)
	w := &Worker{f: f, h: h, log: cfg.Logger, conns: map[ims.ConnID]*conn{}, booted: true}
	c := &conn{w: w, flow: ims.Flow{Transport: ims.TCP, Side: ims.Mw}}
	p.loop.close = func() { w.gone(c) }
	end := func(a gnet.Action) {
		if a == gnet.Close && !c.dead {
			w.gone(c)
		}
		w.leave()
	}
	w.enter()
	end(w.open(c, p))
	for i := 0; len(stream) > 0 && !c.dead; i++ {
		n := min(max(cut(i), 1), len(stream))
		w.enter()
		end(w.stream(c, bytes.Clone(stream[:n])))
		stream = stream[n:]
		if want := bufferSize(c.part); w.buffered != want {
			t.Fatalf("%d octets are counted as buffered, %d are", w.buffered, want)
		}
		if waits := len(c.part) > 3 || len(c.part) > 0 && c.part[0] != '\r'; waits != (w.partial.front() != nil) {
			t.Fatalf("%q waits: timeout is %v", c.part, !waits)
		}
	}
	if !c.dead {
		w.enter()
		w.closeConn(c, false)
		w.leave()
	}
	if w.buffered != 0 || w.partial.front() != nil || w.idle.front() != nil || w.waiting.front() != nil || w.outbound != 0 || len(w.conns) != 0 || f.conns.Load() != 0 || c.part != nil {
		t.Fatalf("left behind: %+v", w)
	}
	h.pongs = p.out.String()
	return h.outcome
}

// equal compares but for the number of pongs, which depends on how many pings come together.
func (o outcome) equal(p outcome) bool {
	return slices.Equal(o.msgs, p.msgs) && o.bad == p.bad && o.closed == p.closed && (o.pongs == "") == (p.pongs == "")
}

// TestPongs: one for each read, none to a peer that does not read.
//
// Peers: B5.02
func TestPongs(t *testing.T) {
	pings := []byte(strings.Repeat("\r\n\r\n", 1000))
	for _, tt := range []struct{ size, wait, want int }{
		{len(pings), 0, 1}, {len(pings) / 10, 0, 10}, {4, 0, 1000}, {1, 0, 1000}, {6, 0, 667}, {len(pings) / 10, 1, 0},
	} {
		got := playTo(t, &pipe{wait: tt.wait}, Config{}, pings, func(int) int { return tt.size })
		if got.pongs != strings.Repeat("\r\n", tt.want) || got.bad != "" {
			t.Errorf("%+v: %d pongs", tt, len(got.pongs)/2)
		}
	}
}

// TestStreamCuts: where reads cut a stream makes no difference.
func TestStreamCuts(t *testing.T) {
	stream := []byte(sip("1", 0) + "\r\n\r\n" + sip("2", 1) + "\r\n" + sip("3", 300) + "\n\n" + sip("4", 5000) + "\r\n\r\n" + sip("5", 0))
	cfg := Config{MaxMessage: 8000}
	want := outcome{
		msgs: []string{sip("1", 0), sip("2", 1), sip("3", 300), sip("4", 5000), sip("5", 0)}, closed: 1, pongs: "\r\n\r\n",
	}
	for size := 1; size < 1500; size++ {
		if got := play(t, cfg, stream, func(int) int { return size }); !got.equal(want) {
			t.Fatalf("pieces of %d: got %+v", size, got)
		}
	}
	for at := 1; at < len(stream); at++ {
		if got := play(t, cfg, stream, func(i int) int { return []int{at, len(stream)}[min(i, 1)] }); !got.equal(want) {
			t.Fatalf("cut at %d: got %+v", at, got)
		}
	}
}

// TestStreamLimit: what is too large is refused as soon as that is known, however it comes.
//
// Peers: B5.04
func TestStreamLimit(t *testing.T) {
	cfg := Config{MaxMessage: 1000}
	for _, tt := range []struct {
		name, stream, bad string
	}{
		{"header", "MESSAGE sip:a SIP/2.0\r\nX: " + strings.Repeat("x", 1000), "too_large"},
		{"rows", "MESSAGE sip:a SIP/2.0\r\n" + strings.Repeat("X: x\r\n", 200), "too_large"},
		{"body", sip("1", 1000)[:300], "too_large"},
		{"garbage", strings.Repeat("\x00", 300), "start_line"},
	} {
		for _, size := range []int{1, 10, 5000} {
			if got := play(t, cfg, []byte(tt.stream), func(int) int { return size }); got.bad != tt.bad || got.closed != 1 || got.msgs != nil {
				t.Errorf("%s in pieces of %d: got %+v", tt.name, size, got)
			}
		}
	}
}

// TestStreamFragments: a large header is not scanned again for each octet of the body without end.
//
// Peers: B5.04
func TestStreamFragments(t *testing.T) {
	head := strings.Replace(sip("1", 20000), "\r\n", "\r\nX: "+strings.Repeat("x", 40000)+"\r\n", 1)
	got := play(t, Config{}, []byte(head), func(i int) int { return []int{len(head) - 20000, 1}[min(i, 1)] })
	if got.bad != "fragments" || got.closed != 1 {
		t.Errorf("got %+v", got)
	}
	small := sip("1", 60000)
	if got := play(t, Config{}, []byte(small), func(int) int { return 1 }); len(got.msgs) != 1 || got.msgs[0] != small {
		t.Errorf("got %d messages, %s", len(got.msgs), got.bad)
	}
}

// TestLists checks the order that timeouts rely on.
func TestLists(t *testing.T) {
	var l list
	c := make([]conn, 3)
	for i := range c {
		l.toEnd(&c[i].idle, &c[i])
	}
	l.toEnd(&c[0].idle, &c[0])
	c[2].idle.remove()
	c[2].idle.remove()
	var got []int
	for f := l.front(); f != nil; f = l.front() {
		f.idle.remove()
		got = append(got, slices.IndexFunc([]*conn{&c[0], &c[1], &c[2]}, func(k *conn) bool { return k == f }))
	}
	if !slices.Equal(got, []int{1, 0}) {
		t.Errorf("order %v", got)
	}
}

// FuzzStream: a stream that is cut anywhere gives what it gives in one piece, but for how much of a bad one is looked at.
func FuzzStream(f *testing.F) {
	f.Add([]byte(sip("1", 3)+"\r\n\r\n"+sip("2", 0)), []byte{1, 200, 3})
	f.Add([]byte("\r\n\r\n\r\nSIP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nab"), []byte{1})
	f.Add([]byte("SIP/2.0 200 OK\nl: 1\n\nabc"), []byte{7})
	f.Add([]byte("\r\nX"), []byte{2})
	f.Fuzz(func(t *testing.T, stream, cuts []byte) {
		cfg := Config{MaxMessage: 600, IdleTimeout: time.Hour}
		whole := play(t, cfg, stream, func(int) int { return len(stream) })
		parts := play(t, cfg, stream, func(i int) int {
			if len(cuts) == 0 {
				return 1
			}
			return int(cuts[i%len(cuts)])
		})
		if !slices.Equal(whole.msgs, parts.msgs) || len(whole.pongs) > len(parts.pongs) || (whole.pongs == "") != (parts.pongs == "") || whole.closed != 1 || parts.closed != 1 {
			t.Errorf("whole %+v\nparts %+v", whole, parts)
		}
		// What is bad may be noticed later, when the header is complete, but not in a stream that whole is good.
		if parts.bad != "" && whole.bad == "" {
			t.Errorf("bad in parts only: %s", parts.bad)
		}
	})
}
