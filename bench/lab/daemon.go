package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Implementation constants.
const (
	stopGrace   = 10 * time.Second      // for an orderly end before the daemon is killed
	readyPoll   = 20 * time.Millisecond // between two looks at /metrics
	maxLog      = 8 << 20               // octets of the daemon's log that are kept
	scrapeLimit = 16 << 20
)

// Daemon is a gmgate process inside the gm namespace.
type Daemon struct {
	lab    *Lab
	binary string
	config string

	cmd  *exec.Cmd
	dir  string
	http *http.Client
	log  *logKeeper
	done chan struct{}
	err  error // of the process; valid after done

	killed atomic.Bool // by Kill: its exit status is no news then
}

// StartDaemon runs `binary run -c FILE` in the gm namespace and returns when it is ready, that is when /metrics
// answers. stderr, if not nil, gets the daemon's output as it comes. The daemon ends with the lab at the latest, and
// the kernel ends it if this process dies.
func (l *Lab) StartDaemon(ctx context.Context, binary, configYAML string, stderr io.Writer) (*Daemon, error) {
	dir, err := os.MkdirTemp("", l.name+configSuffix)
	if err != nil {
		return nil, fmt.Errorf("start daemon: %w", err)
	}
	d := &Daemon{
		lab: l, binary: binary, config: configYAML,
		dir:  dir,
		log:  &logKeeper{tee: stderr},
		done: make(chan struct{}),
		http: &http.Client{Transport: &http.Transport{DialContext: l.dialGM}},
	}
	if err := d.start(l, binary, configYAML); err != nil {
		return nil, errors.Join(fmt.Errorf("start daemon: %w", err), os.RemoveAll(dir))
	}
	l.onClose(d.Stop)
	if err := d.waitReady(ctx); err != nil {
		tail := d.Tail(20)
		return nil, errors.Join(fmt.Errorf("start daemon: %w\n%s", err, tail), d.Kill())
	}
	return d, nil
}

// start runs the process from a thread that stays in the namespace until the process has ended: the parent-death
// signal is bound to the thread that started it, not to this process.
func (d *Daemon) start(l *Lab, binary, configYAML string) error {
	file := filepath.Join(d.dir, "gmgate.yaml")
	if err := os.WriteFile(file, []byte(configYAML), 0o600); err != nil {
		return err
	}
	d.cmd = exec.Command(binary, "run", "-c", file) //nolint:gosec // the caller's binary
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	d.cmd.WaitDelay = time.Second
	// A group of its own keeps the terminal's Ctrl-C away from it: the lab decides when it ends.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	go func() {
		err := l.GM.Do(func() error {
			if err := d.cmd.Start(); err != nil {
				return err
			}
			started <- nil
			d.err = d.cmd.Wait()
			close(d.done)
			return nil
		})
		if err != nil {
			started <- err
		}
	}()
	return <-started
}

func (d *Daemon) waitReady(ctx context.Context) error {
	tick := time.NewTicker(readyPoll)
	defer tick.Stop()
	var last error
	for {
		scrape, cancel := context.WithTimeout(ctx, time.Second)
		_, last = d.Metrics(scrape)
		cancel()
		if last == nil {
			return nil
		}
		select {
		case <-d.done:
			return fmt.Errorf("it ended before it was ready: %w", d.Err())
		case <-ctx.Done():
			return errors.Join(ctx.Err(), last)
		case <-tick.C:
		}
	}
}

// dialGM connects from inside the gm namespace.
func (l *Lab) dialGM(ctx context.Context, network, addr string) (net.Conn, error) {
	var c net.Conn
	err := l.GM.Do(func() (err error) {
		c, err = new(net.Dialer).DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

// Metrics reads the daemon's metrics, keyed `name{labels}`.
func (d *Daemon) Metrics(ctx context.Context) (map[string]float64, error) {
	url := "http://" + netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), PortMetrics).String() + "/metrics"
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, fmt.Errorf("read metrics: %w", err)
	}
	resp, err := d.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("read metrics: %w", err)
	}
	defer resp.Body.Close() //nolint:errcheck // read only
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("read metrics: %s", resp.Status)
	}
	return ParseMetrics(io.LimitReader(resp.Body, scrapeLimit))
}

// PID returns the process id.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Done is closed when the process has ended.
func (d *Daemon) Done() <-chan struct{} { return d.done }

// Err says how the process ended: nil for exit status 0. It waits for the end.
func (d *Daemon) Err() error {
	<-d.done
	return d.err
}

// Stop asks the daemon to end, kills it if it does not within the grace, and returns its exit error. It may be called
// more than once.
func (d *Daemon) Stop() error {
	_ = d.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-d.done:
		return d.clean(d.err)
	case <-time.After(stopGrace):
	}
	return errors.Join(fmt.Errorf("stop daemon: still running after %s, killed", stopGrace), d.Kill())
}

// Kill ends the daemon at once, as a crash would.
func (d *Daemon) Kill() error {
	d.killed.Store(true)
	_ = d.cmd.Process.Kill()
	<-d.done
	return d.clean(nil)
}

// Restart waits for the end of the daemon, which somebody else has to bring about, and starts it again with the same
// program, configuration and destination of its output.
func (d *Daemon) Restart(ctx context.Context) (*Daemon, error) {
	select {
	case <-d.done:
	case <-ctx.Done():
		return nil, fmt.Errorf("restart daemon: it has not ended: %w", context.Cause(ctx))
	}
	return d.lab.StartDaemon(ctx, d.binary, d.config, d.log.tee)
}

// Configure gives the daemon another configuration for its next start.
func (d *Daemon) Configure(configYAML string) { d.config = configYAML }

func (d *Daemon) clean(err error) error {
	d.http.CloseIdleConnections()
	if err != nil && !d.killed.Load() {
		err = fmt.Errorf("daemon ended: %w", err)
	} else {
		err = nil
	}
	return errors.Join(err, os.RemoveAll(d.dir))
}

// Log returns what the daemon has written so far (the first megabytes of it).
func (d *Daemon) Log() string { return d.log.String() }

// Tail returns the last n lines of the log.
func (d *Daemon) Tail(n int) string {
	lines := strings.Split(strings.TrimRight(d.Log(), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// logKeeper keeps a bounded copy of what passes through it. It never fails, since a process whose stderr fails dies.
type logKeeper struct {
	mu  sync.Mutex
	buf bytes.Buffer
	tee io.Writer
}

func (k *logKeeper) Write(p []byte) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.buf.Len() < maxLog {
		k.buf.Write(p)
	}
	if k.tee != nil {
		_, _ = k.tee.Write(p)
	}
	return len(p), nil
}

func (k *logKeeper) String() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.buf.String()
}
