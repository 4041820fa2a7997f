package frontbench

import "testing"

// TestDesigns has the bare loops forward everything.
func TestDesigns(t *testing.T) {
	g := newGenerator(t, [][]byte{[]byte("one"), []byte("another")})
	defer g.close()
	for _, d := range []Design{RecvFrom(), Batch()} {
		at, stop := d.Start(t, g.sinkAddr)
		if cost := g.run(t, at, 1000); cost <= 0 {
			t.Errorf("%s: cost %v", d.Name, cost)
		}
		stop()
		if g.lost != 0 {
			t.Errorf("%s: %d messages lost", d.Name, g.lost)
		}
	}
}
