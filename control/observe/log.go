package observe

import (
	"fmt"
	"io"
	"log/slog"
)

// NewLogger returns a logger that writes to w in the format "text" or "json". A slog.LevelVar as level can be changed
// while the logger is in use.
func NewLogger(w io.Writer, level slog.Leveler, format string) (*slog.Logger, error) {
	opts := &slog.HandlerOptions{Level: level}
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(w, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	}
	return nil, fmt.Errorf("unknown log format %q", format)
}
