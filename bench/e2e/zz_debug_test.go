package e2e

import (
	"testing"
	"strings"
	"time"

	"github.com/gmgate/gmgate/bench/ue"
)

func TestZZ(t *testing.T) {
	f := start(t, fixtureConfig{})
	ctx := timed(t)
	p := f.newPair(ctx, t, func(c *ue.Config) { c.Offers = f.offers(1) })
	_, err := p.a.Call(ctx, p.bURI, ue.CallOptions{Cancel: true})
	t.Log(err)
	time.Sleep(200*time.Millisecond)
	for _, s := range f.core.Log() {
		if s.Method == "INVITE" || s.Method == "CANCEL" || s.Method == "ACK" {
			t.Logf("core from %s\n%s", s.Source, strings.ReplaceAll(s.String(), "\r", ""))
		}
	}
	for _, i := range p.b.Received() {
		t.Log("UE", i.Method, i.Headers("Via"), i.Headers("Route"))
	}
	t.Log(p.b.Problems())
}
