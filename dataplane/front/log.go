package front

import (
	"context"
	"fmt"
	"log/slog"
)

// gnetLogger turns gnet's messages into ours. gnet formats them, so the text is an attribute. Its information is for
// developers, its errors concern single connections.
type gnetLogger struct{ log *slog.Logger }

func (l gnetLogger) put(level slog.Level, format string, args []any) {
	if l.log.Enabled(context.Background(), level) {
		l.log.LogAttrs(context.Background(), level, "gnet", slog.String("text", fmt.Sprintf(format, args...)))
	}
}

// Debugf implements gnet's logging.Logger.
func (l gnetLogger) Debugf(format string, args ...any) { l.put(slog.LevelDebug, format, args) }

// Infof implements gnet's logging.Logger.
func (l gnetLogger) Infof(format string, args ...any) { l.put(slog.LevelDebug, format, args) }

// Warnf implements gnet's logging.Logger.
func (l gnetLogger) Warnf(format string, args ...any) { l.put(slog.LevelInfo, format, args) }

// Errorf implements gnet's logging.Logger.
func (l gnetLogger) Errorf(format string, args ...any) { l.put(slog.LevelWarn, format, args) }

// Fatalf implements gnet's logging.Logger. It does not end the process: the end of an engine is noticed by Front.Done.
func (l gnetLogger) Fatalf(format string, args ...any) { l.put(slog.LevelError, format, args) }

func errAttr(err error) slog.Attr { return slog.Any("error", err) }
