package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/gmgate/gmgate/control/admin"
	"github.com/gmgate/gmgate/control/config"
	"github.com/gmgate/gmgate/control/proxy"
)

// serveAdmin serves the operator's socket, if there is one.
func serveAdmin(ctx context.Context, cfg *config.Config, back *backend, door *filter, fleet *proxy.Fleet, log *slog.Logger) (stop func(), err error) {
	path := cfg.SocketPath()
	if path == "" {
		return func() {}, nil
	}
	l, err := admin.Listen(ctx, path)
	if err != nil {
		return nil, err
	}
	return admin.NewServer(admin.Config{
		Source: fleet, SAs: back.Count, Survey: back.Survey, Guard: door.admin(), Logger: log,
		Status: admin.Status{
			Version: version, Revision: vcsRevision(), Instance: cfg.Instance, Started: time.Now(),
			Backend: back.name, Reason: back.reason,
		},
	}).Serve(l), nil
}
