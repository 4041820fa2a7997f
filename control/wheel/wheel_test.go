package wheel

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

var epoch = time.Date(2030, 1, 2, 3, 4, 5, 6, time.UTC)

const tick = 10 * time.Millisecond

func TestFiresAtTheTick(t *testing.T) {
	tests := []struct {
		name  string
		d     time.Duration
		quiet time.Duration // after this much it has not fired
		fired time.Duration // after this much it has
	}{
		{"exact tick", tick, tick - 1, tick},
		{"within a tick", tick + 1, 2*tick - 1, 2 * tick},
		{"shorter than a tick", 1, tick - 1, tick},
		{"zero", 0, tick - 1, tick},
		{"negative", -time.Hour, tick - 1, tick},
		{"end of level 0", 63 * tick, 63*tick - 1, 63 * tick},
		{"start of level 1", 64 * tick, 64*tick - 1, 64 * tick},
		{"level 1 to 2", 4096 * tick, 4096*tick - 1, 4096 * tick},
		{"four minutes", 4 * time.Minute, 4*time.Minute - 1, 4 * time.Minute},
		{"a week", 7 * 24 * time.Hour, 7*24*time.Hour - 1, 7 * 24 * time.Hour},
		{"ten years", 87600 * time.Hour, 87600*time.Hour - 1, 87600 * time.Hour},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := New(tick, epoch)
			var tm Timer
			n := 0
			w.Schedule(&tm, tt.d, func() { n++ })
			if !tm.Armed() || w.Len() != 1 {
				t.Fatalf("after Schedule: armed %v, Len %d", tm.Armed(), w.Len())
			}
			w.Advance(epoch.Add(tt.quiet))
			if n != 0 {
				t.Fatalf("fired after %v, early", tt.quiet)
			}
			w.Advance(epoch.Add(tt.fired))
			if n != 1 {
				t.Fatalf("fired %d times after %v, want 1", n, tt.fired)
			}
			w.Advance(epoch.Add(tt.fired).Add(time.Hour))
			if n != 1 || tm.Armed() || w.Len() != 0 {
				t.Fatalf("afterwards: fired %d times, armed %v, Len %d", n, tm.Armed(), w.Len())
			}
		})
	}
}

func TestLongestDurationDoesNotOverflow(t *testing.T) {
	w := New(1, epoch)
	w.Advance(epoch.Add(time.Hour))
	var tm Timer
	n := 0
	w.Schedule(&tm, math.MaxInt64, func() { n++ })
	w.Advance(epoch.Add(200 * 365 * 24 * time.Hour))
	if n != 0 || !tm.Armed() {
		t.Fatalf("fired %d times in the first 200 years", n)
	}
	w.Advance(epoch.Add(math.MaxInt64))
	if n != 1 {
		t.Fatalf("fired %d times at the end of time, want 1", n)
	}
}

// TestNext: an Advance before Next has nothing to do, and whoever advances by Next again and again fires a timer neither
// early nor late, in few steps.
func TestNext(t *testing.T) {
	for _, d := range []time.Duration{1, tick - 1, tick, 64 * tick, 64*tick + 1, time.Second, time.Minute, time.Hour, 30 * 24 * time.Hour} {
		w := New(tick, epoch)
		now := epoch.Add(3 * time.Millisecond)
		w.Advance(now)
		if got := w.Next(); got != math.MaxInt64 {
			t.Fatalf("Next of an empty wheel is %s", got)
		}
		var timer Timer
		fired := false
		deadline := now.Add(d)
		w.Schedule(&timer, d, func() { fired = true })
		steps := 0
		for !fired {
			next := w.Next()
			if steps++; next <= 0 || steps > 12 {
				t.Fatalf("%s: Next is %s in step %d", d, next, steps)
			}
			w.Advance(now.Add(next - 1))
			if fired {
				t.Errorf("%s: fired before Next", d)
			}
			now = now.Add(next)
			w.Advance(now)
		}
		if late := now.Sub(deadline); late < 0 || late >= tick {
			t.Errorf("%s: fired %s after its deadline", d, late)
		}
		if got := w.Next(); got != math.MaxInt64 {
			t.Errorf("%s: Next is %s with no timer left", d, got)
		}
	}
}

func TestStop(t *testing.T) {
	w, other := New(tick, epoch), New(tick, epoch)
	var tm Timer
	if w.Stop(&tm) {
		t.Error("Stop of an idle timer = true")
	}
	w.Schedule(&tm, time.Second, func() { t.Error("stopped timer fired") })
	if other.Stop(&tm) {
		t.Error("Stop in another wheel = true")
	}
	if !w.Stop(&tm) {
		t.Error("Stop of an armed timer = false")
	}
	if w.Stop(&tm) || tm.Armed() || w.Len() != 0 {
		t.Errorf("after Stop: armed %v, Len %d", tm.Armed(), w.Len())
	}
	w.Advance(epoch.Add(time.Hour))
}

func TestScheduleAgainReplaces(t *testing.T) {
	w := New(tick, epoch)
	var tm Timer
	var got string
	w.Schedule(&tm, time.Second, func() { got += "a" })
	w.Schedule(&tm, 2*time.Second, func() { got += "b" })
	if w.Len() != 1 {
		t.Fatalf("Len = %d, want 1", w.Len())
	}
	w.Advance(epoch.Add(time.Second))
	if got != "" {
		t.Fatalf("after the first deadline %q ran", got)
	}
	w.Advance(epoch.Add(2 * time.Second))
	if got != "b" {
		t.Fatalf("ran %q, want b", got)
	}
}

func TestOrder(t *testing.T) {
	w := New(tick, epoch)
	var tm [6]Timer
	var got []int
	for i, ticks := range []int{90, 70, 90, 1, 70, 5000} {
		w.Schedule(&tm[i], time.Duration(ticks)*tick, func() { got = append(got, i) })
	}
	w.Advance(epoch.Add(6000 * tick)) // one jump over everything
	if want := []int{3, 1, 4, 0, 2, 5}; !slices.Equal(got, want) {
		t.Fatalf("order %v, want %v", got, want)
	}
}

func TestCallbacksScheduleAndStop(t *testing.T) {
	w := New(tick, epoch)
	var periodic, victim, neighbour, fresh Timer
	var got []string
	var again func()
	again = func() {
		got = append(got, fmt.Sprint("periodic at ", w.Now().Sub(epoch)))
		if len(got) < 4 {
			w.Schedule(&periodic, 0, again) // never within the same Advance
		}
	}
	w.Schedule(&periodic, tick, func() {
		if !w.Stop(&victim) || !w.Stop(&neighbour) {
			t.Error("a callback could not stop timers that are due with it")
		}
		w.Schedule(&fresh, -1, func() { got = append(got, "fresh") })
		w.Advance(epoch.Add(time.Hour)) // does nothing in here
		again()
	})
	w.Schedule(&neighbour, tick, func() { t.Error("neighbour fired") })
	w.Schedule(&victim, 64*tick, func() { t.Error("victim fired") })
	for i := range 100 {
		w.Advance(epoch.Add(time.Duration(i) * tick))
	}
	want := []string{"periodic at 10ms", "fresh", "periodic at 20ms", "periodic at 30ms"}
	if !slices.Equal(got, want) {
		t.Fatalf("got %q, want %q", got, want)
	}
	if w.Len() != 0 {
		t.Fatalf("Len = %d, want 0", w.Len())
	}
}

func TestSelfReschedulingInAJumpRunsOnce(t *testing.T) {
	w := New(tick, epoch)
	var tm Timer
	n := 0
	var f func()
	f = func() { n++; w.Schedule(&tm, tick, f) }
	w.Schedule(&tm, tick, f)
	w.Advance(epoch.Add(1000 * time.Hour))
	if n != 1 {
		t.Fatalf("ran %d times in one Advance, want 1: the work of a jump must be bounded", n)
	}
	w.Advance(epoch.Add(1000*time.Hour + tick))
	if n != 2 {
		t.Fatalf("ran %d times, want 2", n)
	}
}

func TestClockGoingBackwards(t *testing.T) {
	w := New(tick, epoch)
	var tm Timer
	n := 0
	w.Advance(epoch.Add(time.Minute))
	w.Schedule(&tm, time.Second, func() { n++ })
	w.Advance(epoch)
	w.Advance(epoch.Add(30 * time.Second))
	if got := w.Now(); !got.Equal(epoch.Add(time.Minute)) || n != 0 {
		t.Fatalf("clock %v, fired %d", got, n)
	}
	w.Advance(epoch.Add(61 * time.Second))
	if n != 1 {
		t.Fatalf("fired %d times, want 1", n)
	}
}

func TestPanickingCallbackLeavesAUsableWheel(t *testing.T) {
	w := New(tick, epoch)
	var a, b Timer
	n := 0
	w.Schedule(&a, tick, func() { panic("boom") })
	w.Schedule(&b, tick, func() { n++ })
	func() {
		defer func() {
			if recover() == nil {
				t.Error("no panic")
			}
		}()
		w.Advance(epoch.Add(tick))
	}()
	w.Advance(epoch.Add(2 * tick))
	if n != 1 || w.Len() != 0 {
		t.Fatalf("after the panic: fired %d, Len %d", n, w.Len())
	}
}

func TestMisuse(t *testing.T) {
	mustPanic := func(name string, f func()) {
		t.Helper()
		defer func() {
			if recover() == nil {
				t.Errorf("%s: no panic", name)
			}
		}()
		f()
	}
	mustPanic("tick 0", func() { New(0, epoch) })
	var tm Timer
	New(tick, epoch).Schedule(&tm, tick, func() {})
	mustPanic("armed elsewhere", func() { New(tick, epoch).Schedule(&tm, tick, func() {}) })
}

// TestAgainstRuntimeTimers runs the wheel in virtual time beside time.AfterFunc, as the worker's loop does.
func TestAgainstRuntimeTimers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 20000
		start := time.Now()
		w := New(tick, start)
		rng := rand.New(rand.NewPCG(1, 2))
		var timers [n]Timer
		var due, fired [n]time.Duration
		left, onPace := n, 0
		for i := range n {
			due[i] = time.Duration(rng.Int64N(int64(48 * time.Hour)))
			fired[i] = -1
			w.Schedule(&timers[i], due[i], func() { fired[i] = time.Since(start); left-- })
		}
		ticker := time.NewTicker(tick)
		defer ticker.Stop()
		for left > 0 && time.Since(start) < 60*time.Hour {
			// Mostly idle, so that the test is quick, and then a stretch at the pace of a worker's loop.
			time.Sleep(time.Duration(rng.Int64N(int64(10 * time.Minute))))
			w.Advance(time.Now())
			for range 100 {
				before := left
				w.Advance(<-ticker.C)
				onPace += before - left
			}
		}
		if left > 0 || onPace == 0 {
			t.Errorf("%d timers never fired, %d fired at the loop's pace", left, onPace)
		}
		for i := range n {
			if fired[i] < due[i] {
				t.Errorf("timer %d due at %v fired at %v", i, due[i], fired[i])
			}
		}
	})
}

// TestModel drives the wheel and a naive list of deadlines with the same random operations.
//
// Peers: B1.17, B2.22, B4.09
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		type entry struct {
			due time.Time
			seq int
		}
		const n = 12
		step := time.Duration(rapid.SampledFrom([]int64{1, 1000, int64(tick), int64(time.Second) / 3}).Draw(t, "tick"))
		now := epoch
		w := New(step, now)
		var timers [n]Timer
		model := map[int]entry{}
		seq := 0
		span := rapid.Custom(func(t *rapid.T) time.Duration {
			mag := rapid.IntRange(0, 50).Draw(t, "magnitude")
			return time.Duration(rapid.Int64Range(-1, 1<<mag).Draw(t, "span"))
		})

		var last entry // of the latest timer that fired within the Advance under way
		var firing bool
		tickOf := func(at time.Time) time.Duration { return (at.Sub(epoch) + step - 1) / step }
		var schedule func(i int, d time.Duration)
		fire := func(i int) {
			e, ok := model[i]
			if !ok {
				t.Fatalf("timer %d fired and should not", i)
			}
			delete(model, i)
			if timers[i].Armed() {
				t.Fatalf("timer %d is armed within its callback", i)
			}
			if e.due.After(now) {
				t.Fatalf("timer %d fired %v early", i, e.due.Sub(now))
			}
			if firing && (tickOf(e.due) < tickOf(last.due) || tickOf(e.due) == tickOf(last.due) && e.seq < last.seq) {
				t.Fatalf("timer %d due %v seq %d fired after %v seq %d", i, e.due, e.seq, last.due, last.seq)
			}
			last, firing = e, true
			switch rapid.IntRange(0, 3).Draw(t, "in callback") {
			case 0:
				schedule(i, span.Draw(t, "again"))
			case 1:
				schedule((i+5)%n, span.Draw(t, "other"))
			case 2:
				j := (i + 3) % n
				_, want := model[j]
				if got := w.Stop(&timers[j]); got != want {
					t.Fatalf("Stop in callback = %v, want %v", got, want)
				}
				delete(model, j)
			}
		}
		schedule = func(i int, d time.Duration) {
			due := now.Add(max(d, 0))
			if !due.After(now) && now.Sub(epoch)%step == 0 {
				due = now.Add(1) // zero means the next tick, even exactly on one
			}
			seq++
			model[i] = entry{due, seq}
			w.Schedule(&timers[i], d, func() { fire(i) })
		}
		t.Repeat(map[string]func(*rapid.T){
			"schedule": func(t *rapid.T) { schedule(rapid.IntRange(0, n-1).Draw(t, "i"), span.Draw(t, "d")) },
			"stop": func(t *rapid.T) {
				i := rapid.IntRange(0, n-1).Draw(t, "i")
				_, want := model[i]
				if got := w.Stop(&timers[i]); got != want {
					t.Fatalf("Stop = %v, want %v", got, want)
				}
				delete(model, i)
			},
			"advance": func(t *rapid.T) {
				now = now.Add(max(span.Draw(t, "by"), 0))
				firing = false
				w.Advance(now)
				for i, e := range model {
					if late := now.Sub(e.due); late >= step {
						t.Fatalf("timer %d is %v late, a tick is %v", i, late, step)
					}
				}
			},
			"": func(t *rapid.T) {
				if w.Len() != len(model) {
					t.Fatalf("Len = %d, model has %d", w.Len(), len(model))
				}
				for i := range timers {
					if _, ok := model[i]; ok != timers[i].Armed() {
						t.Fatalf("timer %d armed = %v, model %v", i, timers[i].Armed(), ok)
					}
				}
			},
		})
	})
}

func TestNoAllocations(t *testing.T) {
	w := New(tick, epoch)
	timers := make([]Timer, 1000)
	now := epoch
	n := 0
	f := func() { n++ }
	if a := testing.AllocsPerRun(100, func() {
		for i := range timers {
			w.Schedule(&timers[i], time.Duration(i*i)*time.Millisecond, f)
		}
		for i := 0; i < len(timers); i += 3 {
			w.Stop(&timers[i])
		}
		now = now.Add(5 * time.Minute)
		w.Advance(now)
	}); a != 0 {
		t.Errorf("%v allocations per run, want 0", a)
	}
	if n == 0 {
		t.Error("nothing fired")
	}
}

func BenchmarkScheduleStop(b *testing.B) {
	w := New(tick, epoch)
	timers := make([]Timer, 1<<16)
	f := func() {}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		w.Schedule(&timers[i&(1<<16-1)], time.Duration(i&4095)*time.Second, f)
		i++
	}
}

func BenchmarkAdvance(b *testing.B) {
	w := New(tick, epoch)
	timers := make([]Timer, 1<<16)
	fired := 0
	for i := range timers {
		t, d := &timers[i], time.Duration(i+1)*time.Millisecond
		var f func()
		f = func() { fired++; w.Schedule(t, d, f) }
		w.Schedule(t, d, f)
	}
	now := epoch
	b.ReportAllocs()
	for b.Loop() {
		now = now.Add(tick)
		w.Advance(now)
	}
	b.ReportMetric(float64(fired)/float64(b.N), "timers/op")
}
