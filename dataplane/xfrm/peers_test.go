package xfrm

import (
	"log/slog"
	"strings"
	"testing"
)

// TestQuietStart: starting, installing, removing and stopping on a clean kernel is nothing to warn of.
//
// Peers: A4.15
func TestQuietStart(t *testing.T) {
	var text strings.Builder
	cfg := testConfig()
	cfg.Logger = slog.New(slog.NewTextHandler(&text, &slog.HandlerOptions{Level: slog.LevelWarn}))
	k := newFakeKernel()
	for range 2 { // and again, beside the policies that the first run has left to block
		b := newFake(t, k, cfg)
		p := testSet(0, false, gcm)
		if err := install(t, b, p); err != nil {
			t.Fatal(err)
		}
		if err := remove(t, b, p); err != nil {
			t.Fatal(err)
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if text.Len() > 0 {
		t.Errorf("logged:\n%s", &text)
	}
}
