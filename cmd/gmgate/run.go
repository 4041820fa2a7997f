package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/gmgate/gmgate/control/config"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/observe"
	"github.com/gmgate/gmgate/control/policy"
	"github.com/gmgate/gmgate/control/proxy"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/sa"
	"github.com/gmgate/gmgate/dataplane/front"
)

// stopTimeout bounds a clean stop.
const stopTimeout = 5 * time.Second

// Limits of the metrics endpoint: a client that hangs must not keep its connection and its goroutine for ever.
const (
	metricsRead  = 5 * time.Second  // for a request
	metricsWrite = 30 * time.Second // net/http/pprof adds what a profile is asked to take
	metricsIdle  = 5 * time.Minute  // longer than any scrape interval
)

// runMain runs the daemon until ctx ends.
func runMain(ctx context.Context, args []string, stderr io.Writer) int {
	file, code := fileFlag("run", args, stderr)
	if code >= 0 {
		return code
	}
	cfg, err := config.Load(file)
	if err != nil {
		report(stderr, err)
		return 1
	}
	log, err := observe.NewLogger(stderr, cfg.Log.Level, string(cfg.Log.Format))
	if err != nil {
		_, _ = fmt.Fprintln(stderr, err)
		return 1
	}
	if err := run(ctx, cfg, log); err != nil {
		log.Error("stopped", "error", err)
		return 1
	}
	return 0
}

// run builds the daemon from its parts, serves until ctx ends and takes everything down again.
func run(ctx context.Context, cfg *config.Config, log *slog.Logger) (err error) {
	workers := cfg.WorkerCount()
	metrics := observe.New(workers)
	metrics.BuildInfo(version, vcsRevision())

	keep, err := openKeeper(ctx, cfg, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, keep.close()) }()
	fleet := new(proxy.Fleet)
	back, err := openBackend(cfg, fleet, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, keep.release(back)) }()
	back.observe(metrics)

	rules, err := compileRules(cfg, back.suites)
	if err != nil {
		return err
	}
	key, err := keep.tokenKey()
	if err != nil {
		return err
	}
	shared := proxyConfig(cfg, rules, back.suites(cfg.Security.Suites()), fleet, key)
	door, err := openGuard(cfg, back.kernel != nil, rules.Clear(), log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, door.release(keep.db != nil)) }()
	shared.Witness = door.witness()
	if err := keep.load(ctx, cfg, shared, back); err != nil {
		return err
	}
	if err := door.start(keep); err != nil {
		return err
	}
	door.observe(metrics)
	stopWatch := keep.watch(ctx, cfg, shared, back, metrics)
	defer func() { err = errors.Join(err, stopWatch()) }()
	defer door.watch(ctx, shared.Fleet, cfg.Store.Reconcile, metrics)()
	var f *front.Front
	shared.Home = func(addr netip.Addr, worker int) error { return f.Move(addr, worker) } // operators ask once there is a front
	handlers := make([]front.Handler, workers)
	for i := range workers {
		w, err := proxy.New(shared, i, measured{door.behind(back), metrics}, metrics, log.With("worker", i))
		if err != nil {
			return err
		}
		keep.hand(i, w)
		handlers[i] = handler{w}
	}
	fc := frontConfig(cfg, back, log)
	keepPorts(&fc, cfg, shared.MwPorts)
	steering, err := openSteering(cfg, len(fc.Listeners), log)
	if err != nil {
		return err
	}
	if steering != nil {
		defer func() { err = errors.Join(err, steering.Close()) }()
		observeSteering(metrics, steering)
		fc.Steering = steering
	}
	if f, err = front.New(fc, handlers); err != nil {
		return fmt.Errorf("open sockets: %w", err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
		defer cancel()
		err = errors.Join(err, f.Close(ctx))
	}()
	if back.begin != nil {
		back.begin()
	}
	observeFront(metrics, f)

	stop, err := serveMetrics(ctx, cfg, metrics, log)
	if err != nil {
		return err
	}
	defer stop()
	stopAdmin, err := serveAdmin(ctx, cfg, back, door, shared.Fleet, log)
	if err != nil {
		return err
	}
	defer stopAdmin()
	log.Info("ready", "version", version, "backend", back.name, "reason", back.reason, "workers", workers,
		"gm", cfg.Gm.Addresses, "mw", cfg.Mw.Addresses, "algorithms", fmt.Sprint(shared.Suites))
	select {
	case <-ctx.Done():
		log.Info("stopping")
		return nil
	case <-f.Done():
		return fmt.Errorf("event engine ended: %w", f.Err())
	}
}

// handler puts a proxy worker on its event loop.
type handler struct{ *proxy.Worker }

// Boot implements front.Handler.
func (h handler) Boot(w *front.Worker) { h.Worker.Boot(w) }

// measured times the operations of an ESP backend.
type measured struct {
	sa.Installer
	metrics *observe.Metrics
}

// Install implements sa.Installer.
func (m measured) Install(p sa.Params, done func(error)) {
	m.Installer.Install(p, m.timed("install", done))
}

// Remove implements sa.Installer.
func (m measured) Remove(p sa.Params, done func(error)) {
	m.Installer.Remove(p, m.timed("remove", done))
}

// Extend implements sa.Installer.
func (m measured) Extend(p sa.Params, hard time.Duration, done func(error)) {
	m.Installer.Extend(p, hard, m.timed("extend", done))
}

func (m measured) timed(op string, done func(error)) func(error) {
	began := time.Now()
	return func(err error) {
		m.metrics.ObserveInstall(op, time.Since(began), err)
		done(err)
	}
}

// proxyConfig translates the configuration for the workers.
func proxyConfig(cfg *config.Config, rules *policy.Rules, suites []ims.Suite, fleet *proxy.Fleet, tokens ims.Key) *proxy.Config {
	p := &proxy.Config{
		Workers: cfg.WorkerCount(),
		Gm:      cfg.Gm.Addresses, GmPort: cfg.Gm.Port, UDPLimit: cfg.Gm.UDPLimit,
		DropClear: cfg.Gm.ClearRequests == config.ClearDrop,
		Suites:    suites, ServerList: cfg.Security.SecurityServer == config.ServerList,
		StatusSuite: cfg.Security.NoCommonAlgorithm, StatusVerify: cfg.Security.VerifyMismatch,
		StatusTaken: cfg.Security.AddressConflict, StatusNoSet: cfg.Security.NoSASet,
		Policy: rules, NoEmergency: cfg.Security.Emergency == config.EmergencyForbid,
		RefuseRoute: cfg.Mw.ServiceRoute == config.ServiceRouteRefuse, SetsMax: cfg.Limits.SASets,
		Registrar: registrar.Config{
			ServerPorts: cfg.Gm.ServerPorts, ClientPorts: cfg.Gm.ClientPorts,
			AwaitAuth: cfg.Timers.RegAwaitAuth, OldSet: cfg.Timers.OldSet, MaxSets: cfg.Security.MaxSetsPerUE,
			NewServerPort: !cfg.Security.ReuseServerPort,
		},
		PendingMax: cfg.Limits.PendingRegistrations, PendingSource: cfg.Limits.PendingPerSource,
		LifetimeExtra: cfg.Timers.LifetimeMargin,
		Mw:            cfg.Mw.Addresses, MwPort: cfg.Mw.Port, MwTransport: cfg.Mw.Transport,
		Hosts: cfg.Mw.Hosts, Peers: cfg.Mw.Peers, PathHost: cfg.Mw.PathHost,
		VisitedNetwork: cfg.Mw.VisitedNetwork, OrigIOI: cfg.Mw.OrigIOI,
		QuoteIntegrity: cfg.Mw.IntegrityProtectedQuoted, RegisterTimeout: cfg.Mw.RegisterTimeout,
		HealthInterval: cfg.Mw.HealthInterval,
		RegEvent:       proxy.RegEvent{Enabled: cfg.Mw.RegEvent.Enabled, Expires: cfg.Mw.RegEvent.Expires, URI: cfg.Mw.RegEvent.URI},
		Fleet:          fleet, TokenKey: tokens, SPIFirst: cfg.Security.SPI.First, SPILast: cfg.Security.SPI.Last,
	}
	if cfg.Mw.IntegrityProtectedClear == config.IntegrityNo {
		p.ClearIntegrity = "no"
	}
	for _, h := range cfg.Mw.NextHops {
		p.NextHops = append(p.NextHops, ims.Hop{Addr: h.Addr, Transport: h.Transport})
	}
	return p
}

// frontConfig lists the sockets: the unprotected port, every protected port, and one Mw port per worker.
func frontConfig(cfg *config.Config, back *backend, log *slog.Logger) front.Config {
	f := front.Config{
		Workers: cfg.WorkerCount(), Hidden: back.hidden, MaxMessage: cfg.Gm.MaxMessage,
		MaxConnections: cfg.Gm.TCP.MaxConnections, MaxPerSource: cfg.Gm.TCP.MaxPerSource, IdleTimeout: cfg.Gm.TCP.IdleTimeout,
		DialTimeout: cfg.Gm.TCP.DialTimeout, TCPMaxSeg: cfg.Gm.TCP.MaxSegment, Logger: log,
		MwInterface: cfg.Mw.Interface, MwSources: cfg.Mw.Sources,
	}
	hidden := back.hidden != nil
	for _, a := range cfg.Gm.Addresses {
		f.Listeners = append(f.Listeners, front.Listener{
			Addr: netip.AddrPortFrom(a, cfg.Gm.Port), Side: ims.GmClear, UDP: true, TCP: true, Worker: -1,
		})
		for _, p := range cfg.Gm.ServerPorts {
			f.Listeners = append(f.Listeners, front.Listener{
				Addr: netip.AddrPortFrom(a, p), Side: ims.GmProtected, UDP: true, TCP: true, Hidden: hidden, Worker: -1,
			})
		}
		for _, p := range cfg.Gm.ClientPorts { // no TCP listener on port-pc: the UE connects to port-ps only
			f.Listeners = append(f.Listeners, front.Listener{
				Addr: netip.AddrPortFrom(a, p), Side: ims.GmProtected, UDP: true, Hidden: hidden, Worker: -1,
			})
		}
	}
	for _, a := range cfg.Mw.Addresses {
		for k := range f.Workers {
			f.Listeners = append(f.Listeners, front.Listener{
				Addr: netip.AddrPortFrom(a, cfg.Mw.Port+uint16(k)), Side: ims.Mw, UDP: true, TCP: true, Worker: k,
			})
		}
	}
	return f
}

// metricsServer makes a server that lets go of whoever does not read an answer in time.
func metricsServer(h http.Handler, write time.Duration) *http.Server {
	return &http.Server{Handler: h, ReadTimeout: metricsRead, WriteTimeout: write, IdleTimeout: metricsIdle}
}

// keepPorts adds the Mw ports of workers that there are no more: phones which have outlived a change of their number are reached
// by the Path, and within dialogs by the Record-Route, that the core has of before.
func keepPorts(f *front.Config, cfg *config.Config, ports int) {
	taken := make(map[netip.AddrPort]bool, len(f.Listeners))
	for _, l := range f.Listeners {
		taken[l.Addr] = true
	}
	for _, a := range cfg.Mw.Addresses {
		for k := f.Workers; k < ports && int(cfg.Mw.Port)+k <= math.MaxUint16; k++ {
			at := netip.AddrPortFrom(a, cfg.Mw.Port+uint16(k))
			if taken[at] || at.Port() == cfg.Metrics.Listen.Port() {
				continue // what is configured goes first
			}
			f.Listeners = append(f.Listeners, front.Listener{
				Addr: at, Side: ims.Mw, UDP: true, TCP: true, Worker: k % f.Workers, Optional: true,
			})
		}
	}
}

// serveMetrics serves /metrics, and the profiles of net/http/pprof where they are enabled.
func serveMetrics(ctx context.Context, cfg *config.Config, m *observe.Metrics, log *slog.Logger) (stop func(), err error) {
	reg := prometheus.NewRegistry()
	if err := errors.Join(m.Register(reg), reg.Register(collectors.NewGoCollector()),
		reg.Register(collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))); err != nil {
		return nil, err
	}
	if !cfg.Metrics.Listen.IsValid() {
		return func() {}, nil
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", observe.Handler(reg))
	if cfg.Metrics.Pprof {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", cfg.Metrics.Listen.String())
	if err != nil {
		return nil, fmt.Errorf("serve metrics: %w", err)
	}
	srv := metricsServer(mux, metricsWrite)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.Error("metrics endpoint ended", "error", err)
		}
	}()
	return func() { _ = srv.Close(); <-done }, nil
}
