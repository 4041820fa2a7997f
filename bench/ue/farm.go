// Package ue is a phone: the access end of Gm for tests and benchmarks.
//
// A UE registers with IMS AKA (TS 33.203 §6.1, RFC 3310; Milenage), negotiates ipsec-3gpp (RFC 3329, TS 33.203 §7),
// sets up its own four security associations and then talks SIP over UDP and TCP by the port rules of TS 33.203 §7.1:
// requests and UDP answers leave port-uc towards port-ps, everything by UDP arrives on port-us from port-pc, TCP
// answers stay on the connection of the request. It is strict: what the specifications demand of a P-CSCF is checked
// on everything that arrives. What is wrong with the answer to an operation makes the operation fail with a
// ProtocolError; what is wrong elsewhere is kept in Problems.
//
// A Farm holds what many UEs share: the namespace they live in and the SA layer, either in user space
// (dataplane/esptun, works everywhere) or in the kernel (ip-xfrm).
//
// Concurrency: a UE's methods may be called from any goroutine; registration operations of one UE run one after the
// other. Every blocking call ends with its ctx. Close ends every goroutine and socket of a UE, Farm.Close those of all.
package ue

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/esptun"
	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// SA layers of FarmConfig.ESP.
const (
	Userspace = "userspace"
	XFRM      = "xfrm"
)

// Specification constants.
const (
	defaultT1   = 500 * time.Millisecond // RFC 3261 §17.1.1.1; TS 24.229 table 7.7.1 says 2 s at the UE
	timerFactor = 64                     // Timers B, F and H are 64*T1 (RFC 3261 §17)
	t2Factor    = 8                      // T2 is 8*T1 both in RFC 3261 and in TS 24.229 table 7.7.1
)

// defaultOldSetLinger is how long a replaced set keeps receiving when nobody says otherwise.
const defaultOldSetLinger = 10 * time.Second

// FarmConfig describes what the phones share.
type FarmConfig struct {
	NS           *hostnet.NS    // where the phones live; nil is the process's namespace. Their addresses exist there
	Prefixes     []netip.Prefix // the phones' addresses (AnyIP)
	PCSCF        netip.AddrPort // unprotected port of the P-CSCF
	ESP          string         // Userspace (default) or XFRM
	T1           time.Duration  // default 500 ms; IMS phones use 2 s
	OldSetLinger time.Duration  // how long replaced sets keep receiving; default 10 s
	Logger       *slog.Logger   // default: none
}

// Farm is a place where phones live.
type Farm struct {
	cfg   FarmConfig
	log   *slog.Logger
	layer saLayer

	mu     sync.Mutex
	ues    map[*UE]struct{}
	closed bool
}

// saLayer protects traffic: it owns the namespace in which protected sockets live.
type saLayer interface {
	ns() *hostnet.NS
	add(sas [4]esptun.SA) error // all or none
	remove(sas [4]esptun.SA)
	close() error
}

// NewFarm opens the SA layer.
func NewFarm(cfg FarmConfig) (*Farm, error) {
	if !cfg.PCSCF.IsValid() {
		return nil, errors.New("open farm: no P-CSCF address")
	}
	if cfg.T1 == 0 {
		cfg.T1 = defaultT1
	}
	if cfg.OldSetLinger == 0 {
		cfg.OldSetLinger = defaultOldSetLinger
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	f := &Farm{cfg: cfg, log: cfg.Logger, ues: make(map[*UE]struct{})}
	switch cfg.ESP {
	case "", Userspace:
		t, err := esptun.Open(esptun.Config{Outer: cfg.NS, Local: cfg.Prefixes, Logger: cfg.Logger})
		if err != nil {
			return nil, fmt.Errorf("open farm: %w", err)
		}
		f.layer = tunnelLayer{t}
	case XFRM:
		f.layer = &xfrmLayer{net: cfg.NS}
	default:
		return nil, fmt.Errorf("open farm: unknown SA layer %q", cfg.ESP)
	}
	return f, nil
}

// Tunnel returns the userspace SA layer for its statistics, nil with XFRM.
func (f *Farm) Tunnel() *esptun.Tunnel {
	if t, ok := f.layer.(tunnelLayer); ok {
		return t.t
	}
	return nil
}

// Close closes every UE and the SA layer.
func (f *Farm) Close() error {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return nil
	}
	f.closed = true
	all := make([]*UE, 0, len(f.ues))
	for u := range f.ues {
		all = append(all, u)
	}
	f.mu.Unlock()
	var errs []error
	for _, u := range all {
		errs = append(errs, u.Close())
	}
	errs = append(errs, f.layer.close())
	return errors.Join(errs...)
}

type tunnelLayer struct{ t *esptun.Tunnel }

func (l tunnelLayer) ns() *hostnet.NS            { return l.t.Hidden() }
func (l tunnelLayer) add(sas [4]esptun.SA) error { return l.t.Add(sas[:]...) }
func (l tunnelLayer) remove(sas [4]esptun.SA)    { l.t.Remove(sas[:]...) }
func (l tunnelLayer) close() error               { return l.t.Close() }

// xfrmLayer lets the kernel of the phones' namespace do the work, through ip(8). Keys go through standard input only, so
// they never show in a process list.
type xfrmLayer struct {
	net   *hostnet.NS
	reqid atomic.Uint32
}

func (l *xfrmLayer) ns() *hostnet.NS { return l.net }
func (l *xfrmLayer) close() error    { return nil }

func (l *xfrmLayer) add(sas [4]esptun.SA) error {
	// One reqid per SA, never shared, so that no packet can take the SA of another set (TS 33.203 §7.1).
	reqid := (l.reqid.Add(1)-1)*4 + 1
	text, err := xfrmAdd(sas, reqid)
	if err != nil {
		return err
	}
	if done, err := l.ip(text); err != nil {
		// What was there before stays: only the lines that were carried out are taken back.
		lines := xfrmDelete(sas)
		_, undo := l.ip(strings.Join(lines[:min(done, len(lines))], ""), "-force")
		return errors.Join(err, undo)
	}
	return nil
}

func (l *xfrmLayer) remove(sas [4]esptun.SA) {
	_, _ = l.ip(strings.Join(xfrmDelete(sas), ""), "-force") // what is missing is not an error
}

// failedLine is what ip -batch says about the line it stopped at.
var failedLine = regexp.MustCompile(`Command failed -:(\d+)`)

// ip runs ip -batch inside the namespace and returns how many lines were carried out before the one that failed.
func (l *xfrmLayer) ip(text string, flags ...string) (done int, err error) {
	run := func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, "ip", append(flags, "-batch", "-")...) //nolint:gosec // the flags are constants
		cmd.Stdin = strings.NewReader(text)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		err := cmd.Run()
		if err == nil {
			return nil
		}
		if m := failedLine.FindStringSubmatch(stderr.String()); m != nil {
			if n, err := strconv.Atoi(m[1]); err == nil {
				done = n - 1
			}
		}
		// ip(8) repeats a line it cannot parse, keys included: only its first word of wisdom is passed on.
		line, _, _ := strings.Cut(stderr.String(), "\n")
		if strings.Contains(line, "0x") {
			line = "refused a line"
		}
		return fmt.Errorf("run ip -batch: %w: %s", err, line)
	}
	if l.net == nil {
		err = run()
	} else {
		err = l.net.Do(run)
	}
	return done, err
}

// xfrmAdd prints the four states and four policies of a set as ip -batch reads them (TS 33.203 §7.1 seen from the UE).
func xfrmAdd(sas [4]esptun.SA, reqid uint32) (string, error) {
	var b strings.Builder
	for i, sa := range sas {
		alg, err := xfrmAlgorithms(sa.Keys)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, "xfrm state add src %s dst %s proto esp spi %#08x reqid %d mode transport replay-window 32 %s sel %s\n",
			sa.Src.Addr(), sa.Dst.Addr(), uint32(sa.SPI), reqid+uint32(i), alg, xfrmSelector(sa))
	}
	for i, sa := range sas {
		fmt.Fprintf(&b, "xfrm policy add %s dir %s priority 1000 tmpl src %s dst %s proto esp reqid %d mode transport\n",
			xfrmSelector(sa), xfrmDir(sa), sa.Src.Addr(), sa.Dst.Addr(), reqid+uint32(i))
	}
	return b.String(), nil
}

// xfrmDelete prints the lines that take a set out, in the order of xfrmAdd.
func xfrmDelete(sas [4]esptun.SA) []string {
	var out []string
	for _, sa := range sas {
		out = append(out, fmt.Sprintf("xfrm state delete src %s dst %s proto esp spi %#08x\n", sa.Src.Addr(), sa.Dst.Addr(), uint32(sa.SPI)))
	}
	for _, sa := range sas {
		out = append(out, fmt.Sprintf("xfrm policy delete %s dir %s\n", xfrmSelector(sa), xfrmDir(sa)))
	}
	return out
}

func xfrmDir(sa esptun.SA) string {
	if sa.Inbound {
		return "in"
	}
	return "out"
}

func xfrmSelector(sa esptun.SA) string {
	return fmt.Sprintf("src %s/%d dst %s/%d sport %d dport %d", sa.Src.Addr(), sa.Src.Addr().BitLen(), sa.Dst.Addr(),
		sa.Dst.Addr().BitLen(), sa.Src.Port(), sa.Dst.Port())
}

// xfrmAlgorithms names the algorithms as the kernel does. HMAC is truncated to 96 bits explicitly; AEAD algorithms
// carry the salt behind the key (RFC 4106 §8.1, RFC 4543 §5.4).
func xfrmAlgorithms(k ims.ESPKeys) (string, error) {
	switch k.Suite {
	case ims.Suite{Alg: ims.AlgNull, Enc: ims.EncAESGCM}:
		return fmt.Sprintf("aead rfc4106(gcm(aes)) 0x%x%x 128", []byte(k.Enc), k.Salt), nil
	case ims.Suite{Alg: ims.AlgAESGMAC, Enc: ims.EncNull}:
		return fmt.Sprintf("aead rfc4543(gcm(aes)) 0x%x%x 128", []byte(k.Auth), k.Salt), nil
	}
	var auth, enc string
	switch k.Suite.Alg {
	case ims.AlgHMACMD5:
		auth = "hmac(md5)"
	case ims.AlgHMACSHA1:
		auth = "hmac(sha1)"
	default:
		return "", fmt.Errorf("describe %s to ip-xfrm: unknown alg", k.Suite)
	}
	switch k.Suite.Enc {
	case ims.EncNull:
		return fmt.Sprintf(`auth-trunc %s 0x%x 96 enc ecb(cipher_null) ""`, auth, []byte(k.Auth)), nil
	case ims.EncDESEDE3CBC:
		enc = "cbc(des3_ede)"
	case ims.EncAESCBC:
		enc = "cbc(aes)"
	default:
		return "", fmt.Errorf("describe %s to ip-xfrm: unknown ealg", k.Suite)
	}
	return fmt.Sprintf("auth-trunc %s 0x%x 96 enc %s 0x%x", auth, []byte(k.Auth), enc, []byte(k.Enc)), nil
}
