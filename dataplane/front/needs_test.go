package front

import (
	"log/slog"
	"syscall"
	"testing"
)

func TestDescriptors(t *testing.T) {
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &old) }()
	for _, tt := range []struct{ limit, want int }{
		{Descriptors(400), 400},
		{Descriptors(400) - 1, 399},
	} {
		if uint64(tt.limit) > old.Cur {
			t.Skipf("RLIMIT_NOFILE is %d", old.Cur)
		}
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: uint64(tt.limit), Max: old.Max}); err != nil {
			t.Fatal(err)
		}
		c := Config{MaxConnections: 400, Logger: slog.New(slog.DiscardHandler)}
		if c.clampConnections(); c.MaxConnections != tt.want {
			t.Errorf("with %d descriptors: %d connections, want %d", tt.limit, c.MaxConnections, tt.want)
		}
	}
}
