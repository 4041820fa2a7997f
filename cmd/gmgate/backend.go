package main

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"github.com/gmgate/gmgate/control/config"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/esptun"
	"github.com/gmgate/gmgate/dataplane/hostnet"
	"github.com/gmgate/gmgate/dataplane/useresp"
	"github.com/gmgate/gmgate/dataplane/xfrm"
)

// backend is the ESP backend that was chosen.
type backend struct {
	sa.Installer
	name   string
	reason string      // why this one
	hidden *hostnet.NS // where protected sockets must be made; nil: here
	able   []ims.Suite // nil: every suite
	stats  func() esptun.Stats
}

// openBackend opens the ESP backend: with auto the kernel where it can do ESP, else user space.
func openBackend(cfg *config.Config, log *slog.Logger) (*backend, error) {
	switch cfg.ESP.Backend {
	case config.BackendXFRM:
		return openKernel(cfg, log, "configured")
	case config.BackendUserspace:
		return openUserspace(cfg, log, "configured")
	case config.BackendAuto:
	}
	support := xfrm.Probe(nil)
	if err := support.Err(); err != nil {
		return openUserspace(cfg, log, "auto: "+support.Reason)
	}
	return openKernel(cfg, log, "auto: "+support.Reason)
}

func openKernel(cfg *config.Config, log *slog.Logger, reason string) (*backend, error) {
	b, err := xfrm.New(xfrm.Config{
		Local: cfg.Gm.Addresses, ServerPorts: cfg.Gm.ServerPorts, ClientPorts: cfg.Gm.ClientPorts,
		Window: cfg.ESP.ReplayWindow, Logger: log,
	})
	if err != nil {
		return nil, fmt.Errorf("open ESP backend xfrm: %w", err)
	}
	support := b.Support()
	k := &backend{Installer: b, name: "xfrm", reason: reason, able: support.Suites}
	if len(k.suites(cfg.Security.Suites())) == 0 {
		return nil, errors.Join(fmt.Errorf("open ESP backend xfrm: the kernel can do none of the configured algorithms: %s",
			support.Reason), b.Close())
	}
	return k, nil
}

func openUserspace(cfg *config.Config, log *slog.Logger, reason string) (*backend, error) {
	b, err := useresp.New(useresp.Config{
		Local: cfg.Gm.Addresses, Window: cfg.ESP.ReplayWindow, MTU: cfg.ESP.TunMTU, Logger: log,
	})
	if err != nil {
		return nil, fmt.Errorf("open ESP backend userspace: %w", err)
	}
	return &backend{Installer: b, name: "userspace", reason: reason, hidden: b.Hidden(), stats: b.Stats}, nil
}

// suites returns those of the configured suites that the backend can do.
func (b *backend) suites(configured []ims.Suite) []ims.Suite {
	if b.able == nil {
		return configured
	}
	return slices.DeleteFunc(slices.Clone(configured), func(s ims.Suite) bool { return !slices.Contains(b.able, s) })
}

// observe exports what the backend counts itself.
func (b *backend) observe(m *observe.Metrics) {
	m.AddFunc("esp_sas", "SAs installed in the ESP backend.", observe.Gauge, nil,
		func() float64 { return float64(b.Count()) })
	m.AddFunc("esp_backend_info", "ESP backend in use, always 1.", observe.Gauge, map[string]string{"backend": b.name},
		func() float64 { return 1 })
	if b.stats == nil {
		return
	}
	for _, dir := range []string{"in", "out"} {
		labels := map[string]string{"dir": dir}
		m.AddFunc("esp_packets_total", "ESP packets opened and sealed in user space.", observe.Counter, labels,
			func() float64 {
				s := b.stats()
				if dir == "in" {
					return float64(s.PacketsIn)
				}
				return float64(s.PacketsOut)
			})
		m.AddFunc("esp_bytes_total", "Octets of the ESP packets opened and sealed in user space.", observe.Counter, labels,
			func() float64 {
				s := b.stats()
				if dir == "in" {
					return float64(s.BytesIn)
				}
				return float64(s.BytesOut)
			})
	}
	for _, r := range esptun.Reasons() {
		m.AddFunc("esp_drops_total", "Packets that the user space ESP engine dropped.", observe.Counter,
			map[string]string{"reason": r.String()}, func() float64 {
				s := b.stats()
				return float64(s.Dropped(r))
			})
	}
}
