package main

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"github.com/gmgate/gmgate/control/config"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/proxy"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/esptun"
	"github.com/gmgate/gmgate/dataplane/hostnet"
	"github.com/gmgate/gmgate/dataplane/useresp"
	"github.com/gmgate/gmgate/dataplane/xfrm"
)

// backend is the ESP backend that was chosen.
type backend struct {
	sa.Backend
	name   string
	reason string      // why this one
	hidden *hostnet.NS // where protected sockets must be made; nil: here
	able   []ims.Suite // nil: every suite
	stats  func() esptun.Stats
	begin  func()        // lets packets in, once everything is there for them; nil: they come anyway
	kernel *xfrm.Backend // Backend, if it is the kernel's
}

// openBackend opens the ESP backend: with auto the kernel where it can do ESP, else user space.
func openBackend(cfg *config.Config, fleet *proxy.Fleet, log *slog.Logger) (*backend, error) {
	switch cfg.ESP.Backend {
	case config.BackendXFRM:
		return openKernel(cfg, fleet, log, "configured")
	case config.BackendUserspace:
		return openUserspace(cfg, fleet, log, "configured")
	case config.BackendAuto:
	}
	support := xfrm.Probe(nil)
	if why := cannotUse(&support, cfg); why != "" {
		return openUserspace(cfg, fleet, log, "auto: "+why)
	}
	return openKernel(cfg, fleet, log, "auto: "+support.Reason)
}

// cannotUse says why the kernel's ESP does not do for a configuration, nothing if it does. Missing privileges are no such
// reason: the operator wants to hear of them.
func cannotUse(s *xfrm.Support, cfg *config.Config) string {
	if err := s.Err(); err != nil {
		if errors.Is(err, xfrm.ErrPermission) {
			return ""
		}
		return s.Reason
	}
	for _, a := range cfg.Gm.Addresses {
		if a.Is4() && !s.V4 || a.Is6() && !s.V6 {
			return fmt.Sprintf("kernel cannot do ESP for %s: %s", a, s.Reason)
		}
	}
	if k := (&backend{able: s.Suites}); len(k.suites(cfg.Security.Suites())) == 0 {
		return "kernel can do none of the configured algorithms: " + s.Reason
	}
	return ""
}

func openKernel(cfg *config.Config, fleet *proxy.Fleet, log *slog.Logger, reason string) (*backend, error) {
	b, err := xfrm.New(kernelConfig(cfg, fleet, log))
	if err != nil {
		return nil, fmt.Errorf("open ESP backend xfrm: %w", err)
	}
	support := b.Support()
	k := &backend{Backend: b, name: "xfrm", reason: reason, able: support.Suites, kernel: b}
	if len(k.suites(cfg.Security.Suites())) == 0 {
		return nil, errors.Join(fmt.Errorf("open ESP backend xfrm: the kernel can do none of the configured algorithms: %s",
			support.Reason), b.Close())
	}
	return k, nil
}

func kernelConfig(cfg *config.Config, fleet *proxy.Fleet, log *slog.Logger) xfrm.Config {
	return xfrm.Config{
		Local: cfg.Gm.Addresses, ServerPorts: cfg.Gm.ServerPorts, ClientPorts: cfg.Gm.ClientPorts,
		Window: cfg.ESP.ReplayWindow, Logger: log, Expired: fleet.Expired,
	}
}

func openUserspace(cfg *config.Config, fleet *proxy.Fleet, log *slog.Logger, reason string) (*backend, error) {
	// The run before may have used the kernel and left its SAs for this one.
	if _, err := xfrm.Sweep(kernelConfig(cfg, fleet, log)); err != nil && !errors.Is(err, xfrm.ErrNoXFRM) {
		log.Warn("cannot tell whether an earlier run has left SAs in the kernel", "error", err)
	}
	b, err := useresp.New(useresp.Config{
		Local: cfg.Gm.Addresses, Window: cfg.ESP.ReplayWindow, MTU: cfg.ESP.TunMTU, Logger: log, Expired: fleet.Expired, Held: true,
	})
	if err != nil {
		return nil, fmt.Errorf("open ESP backend userspace: %w", err)
	}
	return &backend{Backend: b, name: "userspace", reason: reason, hidden: b.Hidden(), stats: b.Stats, begin: b.Receive}, nil
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
	if b.kernel != nil {
		observeKernel(m, b.kernel)
	}
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

// observeKernel exports what happened to our policies and notifications, and the counters of the kernel's XFRM, where it
// keeps any (/proc/net/xfrm_stat).
func observeKernel(m *observe.Metrics, b *xfrm.Backend) {
	m.AddFunc("xfrm_policies_restored_total", "Policies of the protected ports that another program removed or changed, put back; should be 0.",
		observe.Counter, nil, func() float64 { return float64(b.PoliciesRestored()) })
	m.AddFunc("xfrm_monitor_overruns_total", "Times that the kernel had more XFRM notifications than its buffer takes.",
		observe.Counter, nil, func() float64 { return float64(b.Overruns()) })
	observeXFRM(m, b.Statistics)
}

// observeXFRM exports the counters of XFRM. What cannot be read for once, without descriptors say, stays as it was: a counter
// that falls to zero and comes back looks like as many new drops.
func observeXFRM(m *observe.Metrics, get func() (map[string]uint64, error)) {
	stats := &cached[map[string]uint64]{age: statsAge, get: get}
	for name := range stats.now() {
		m.AddFunc("xfrm_errors_total", "Packets that the kernel's XFRM dropped.", observe.Counter,
			map[string]string{"counter": name}, func() float64 { return float64(stats.now()[name]) })
	}
}
