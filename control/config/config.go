// Package config is gmgate's configuration: one struct tree, its defaults, and a reader for the one YAML file that
// operators write.
//
// The reader is strict and tells everything at once: unknown keys, wrong types, bad values and values that contradict
// each other are all collected, each with line, column and path (Errors). Only a file that is not YAML at all stops at
// its first fault. Keys that are not in the file keep the value of Default.
//
// Invariants: a Config that Parse or Load returned without error is complete and consistent, so nobody needs to check
// it again; one that was put together in code is checked by Validate, which knows the same rules. The keys, their
// documentation, how they are read and how they are written stand in one table (schema.go); the example file is
// generated from it.
//
// Concurrency: a Config is plain data, not to be changed once it is in use.
//
// The rules come from TS 33.203 §7.1 (protected ports), RFC 4303 §2.1 (SPIs), TS 33.203 Annex H (algorithm pairs) and
// RFC 3261 §18.1.1 (message sizes).
package config

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/gmgate/gmgate/control/ims"
)

// Config is the whole configuration. Fields are named after the keys of the file.
type Config struct {
	Instance string
	Workers  int
	Gm       Gm
	Security Security
	Mw       Mw
	Limits   Limits
	Timers   Timers
	Store    Store
	ESP      ESP
	Guard    Guard
	Metrics  Metrics
	Admin    Admin
	Log      Log
}

// Gm is the side of the UEs.
type Gm struct {
	Addresses     []netip.Addr
	Port          uint16   // unprotected
	ServerPorts   []uint16 // port-ps
	ClientPorts   []uint16 // port-pc
	MaxMessage    int
	UDPLimit      int
	ClearRequests ClearRequests
	TCP           TCP
}

// TCP holds the limits of TCP connections.
type TCP struct {
	MaxConnections int
	MaxPerSource   int
	IdleTimeout    time.Duration
	DialTimeout    time.Duration
	MaxSegment     int
}

// Security is the agreement with the UEs (RFC 3329) and the SA sets.
type Security struct {
	IPsec             IPsec
	GIBA              bool
	Emergency         Emergency
	Rules             []Rule      // the first that fits a REGISTER wins
	Algorithms        []ims.Suite // in the order of preference; Suites applies DisableDeprecated
	DisableDeprecated bool
	SecurityServer    SecurityServer
	NoCommonAlgorithm int // SIP status
	VerifyMismatch    int // SIP status
	AddressConflict   int // SIP status
	NoSASet           int // SIP status
	ReuseServerPort   bool
	SPI               SPIRange
	MaxSetsPerUE      int
}

// Rule is what holds for some phones. What it leaves at its zero value holds as it does without the rule.
type Rule struct {
	Realm, IMPI, UserAgent string // patterns with * and ?; empty fits all
	Source                 []netip.Prefix

	IPsec            IPsec
	GIBA             *bool
	Algorithms       []ims.Suite
	ServerPorts      []uint16 // of Gm.ServerPorts
	ClientPorts      []uint16 // of Gm.ClientPorts
	Transports       Transports
	ReuseConnection  *bool
	ReplyByVia       bool
	TemporaryTimeout time.Duration
}

// Transports say what REGISTER may come over, and how requests go to the phone.
type Transports struct {
	Clear, Protected []ims.Transport // empty: both
	Requests         Requests
}

// SPIRange is the range of SPIs that we give out, both ends included.
type SPIRange struct{ First, Last ims.SPI }

// Mw is the side of the core.
type Mw struct {
	Addresses                []netip.Addr
	Port                     uint16        // of worker 0; worker k has Port+k
	Transport                ims.Transport // towards next hops that do not name one
	NextHops                 []NextHop
	Hosts                    map[string]netip.Addr // names in lower case
	Peers                    []netip.Prefix
	Interface                string         // that the core is reached by; empty: any
	Sources                  []netip.Prefix // addresses that messages of the core come from; empty: any
	VisitedNetwork           string
	PathHost                 string // empty: the Mw address
	IntegrityProtectedClear  IntegrityClear
	IntegrityProtectedQuoted bool
	OrigIOI                  string
	ServiceRoute             ServiceRoute
	RegisterTimeout          time.Duration
	HealthInterval           time.Duration // zero: off
	RegEvent                 RegEvent
}

// RegEvent rules the subscriptions to the registration state of the UEs (TS 24.229 §5.2.3).
type RegEvent struct {
	Enabled bool
	Expires time.Duration // least expiry that is asked for
	URI     string        // the P-CSCF's own SIP URI; empty: made from PathHost or the Mw address
}

// NextHop is an entry point of the core.
type NextHop struct {
	Host      string // as configured: an address or a name of Mw.Hosts
	Addr      netip.AddrPort
	Transport ims.Transport
}

// Limits bound what phones that have not been authenticated can take.
type Limits struct {
	PendingRegistrations int // registrations that are not confirmed yet, over all sources
	PendingPerSource     int // of one source: an IPv4 address or an IPv6 /64
	SASets               int // beyond which no phone is let in anew; zero: no limit
}

// Timers are the timers of registrations and SA sets.
type Timers struct {
	RegAwaitAuth   time.Duration
	LifetimeMargin time.Duration
	OldSet         time.Duration
}

// Store is where registrations and SA sets are kept over a restart.
type Store struct {
	Path       string // of the database; empty: nothing is kept
	KeyFile    string // empty: Path with the suffix .key
	Credential string // name of a service manager's credential that holds the key, instead of KeyFile
	Reconcile  time.Duration
}

// ESP is the ESP backend.
type ESP struct {
	Backend      Backend
	ReplayWindow int
	TunMTU       int
}

// Guard is the packet filter in front of the ESP ports, and the steering of sockets.
type Guard struct {
	Mode          GuardMode
	Interfaces    []string // nil: those with Gm.Addresses
	RegisterRate  int      // per second and source; zero: no limit
	RegisterBurst int
	Sources       int // whose rates are remembered
	UnknownSPI    UnknownSPI
	MaxSAs        int    // inbound ones, two for each SA set
	MaxUEs        int    // with counters of their own
	Pin           string // directory on a bpffs, with {instance} in it or not; empty: none. PinPath fills it in
	Steering      bool
}

// Metrics is the HTTP listener for /metrics.
type Metrics struct {
	Listen netip.AddrPort // the zero value: none
	Pprof  bool
}

// Admin is the operator's access.
type Admin struct {
	Socket string // path of the unix socket, with {instance} in it or not; empty: none. SocketPath fills it in
}

// Log is the logger.
type Log struct {
	Level  slog.Level
	Format Format
}

// ClearRequests says what happens to requests other than REGISTER on the unprotected port.
type ClearRequests string

// Values of ClearRequests.
const (
	ClearReject ClearRequests = "reject" // answer 403
	ClearDrop   ClearRequests = "drop"
)

// IPsec says what becomes of the security agreement with ipsec-3gpp (TS 33.203 Annex P).
type IPsec string

// Values of IPsec.
const (
	IPsecRequire IPsec = "require" // 421 without it
	IPsecAllow   IPsec = "allow"   // taken if offered
	IPsecForbid  IPsec = "forbid"  // an offer is ignored
)

// Emergency says what becomes of emergency registrations.
type Emergency string

// Values of Emergency.
const (
	EmergencyAllow  Emergency = "allow"
	EmergencyForbid Emergency = "forbid" // 403
)

// Requests is the transport of requests to a phone.
type Requests string

// Values of Requests.
const (
	RequestsAuto Requests = "auto" // the one it registered over, TCP for what is too large
	RequestsUDP  Requests = "udp"
	RequestsTCP  Requests = "tcp"
)

// ServiceRoute says what happens to an initial request whose Route is not the Service-Route (TS 24.229 §5.2.6.3).
type ServiceRoute string

// Values of ServiceRoute.
const (
	ServiceRouteRepair ServiceRoute = "repair"
	ServiceRouteRefuse ServiceRoute = "refuse" // 400
)

// SecurityServer says what the Security-Server header of the 401 lists.
type SecurityServer string

// Values of SecurityServer.
const (
	ServerChosen SecurityServer = "chosen" // the chosen mechanism only
	ServerList   SecurityServer = "list"   // all mechanisms, strongest first
)

// IntegrityClear says what integrity-protected is in a REGISTER that arrived in clear (TS 24.229 §5.2.2).
type IntegrityClear string

// Values of IntegrityClear.
const (
	IntegrityNo     IntegrityClear = "no"
	IntegrityAbsent IntegrityClear = "absent" // the parameter is left out
)

// Backend is an ESP implementation.
type Backend string

// Values of Backend.
const (
	BackendAuto      Backend = "auto" // the kernel if it has ESP, otherwise user space
	BackendXFRM      Backend = "xfrm"
	BackendUserspace Backend = "userspace"
)

// GuardMode says where the guard stands.
type GuardMode string

// Values of GuardMode.
const (
	GuardAuto    GuardMode = "auto" // the best hook of each interface, none if there is none
	GuardXDP     GuardMode = "xdp"
	GuardGeneric GuardMode = "generic"
	GuardTC      GuardMode = "tc"
	GuardOff     GuardMode = "off"
)

// UnknownSPI says what the guard does with ESP that has no SA of ours.
type UnknownSPI string

// Values of UnknownSPI.
const (
	UnknownDrop UnknownSPI = "drop"
	UnknownPass UnknownSPI = "pass" // there is other IPsec on the Gm addresses
)

// Format is the form of log lines.
type Format string

// Values of Format.
const (
	FormatText Format = "text"
	FormatJSON Format = "json"
)

// Default returns the configuration of an empty file. It is not valid yet: gm.addresses, mw.addresses and mw.next_hops
// have no default.
func Default() *Config {
	instance, err := os.Hostname()
	if err != nil || !validInstance(instance) {
		instance = "gmgate"
	}
	return &Config{
		Instance: instance,
		Gm: Gm{
			Port:          5060,
			ServerPorts:   []uint16{6100, 6101},
			ClientPorts:   []uint16{6110, 6111, 6112, 6113},
			MaxMessage:    65535,
			UDPLimit:      1300,
			ClearRequests: ClearReject,
			TCP:           TCP{MaxConnections: 20000, MaxPerSource: 64, IdleTimeout: time.Hour, DialTimeout: 10 * time.Second, MaxSegment: 1360},
		},
		Security: Security{
			IPsec:     IPsecRequire,
			Emergency: EmergencyAllow,
			Algorithms: []ims.Suite{
				{Alg: ims.AlgNull, Enc: ims.EncAESGCM},
				{Alg: ims.AlgHMACSHA1, Enc: ims.EncAESCBC},
				{Alg: ims.AlgHMACMD5, Enc: ims.EncAESCBC},
				{Alg: ims.AlgAESGMAC, Enc: ims.EncNull},
				{Alg: ims.AlgHMACSHA1, Enc: ims.EncNull},
				{Alg: ims.AlgHMACMD5, Enc: ims.EncNull},
				{Alg: ims.AlgHMACSHA1, Enc: ims.EncDESEDE3CBC},
				{Alg: ims.AlgHMACMD5, Enc: ims.EncDESEDE3CBC},
			},
			SecurityServer:    ServerChosen,
			NoCommonAlgorithm: 494,
			VerifyMismatch:    494,
			AddressConflict:   403,
			NoSASet:           480,
			ReuseServerPort:   true,
			SPI:               SPIRange{First: 1 << 28, Last: 1<<32 - 1},
			MaxSetsPerUE:      3,
		},
		Mw: Mw{
			Port:                     5060,
			Transport:                ims.UDP,
			VisitedNetwork:           "ims.mnc001.mcc001.3gppnetwork.org",
			IntegrityProtectedClear:  IntegrityNo,
			IntegrityProtectedQuoted: true,
			ServiceRoute:             ServiceRouteRepair,
			RegisterTimeout:          32 * time.Second,
			HealthInterval:           5 * time.Second,
			RegEvent:                 RegEvent{Enabled: true, Expires: 600000 * time.Second},
		},
		Limits: Limits{PendingRegistrations: 20000, PendingPerSource: 32},
		Timers: Timers{RegAwaitAuth: 4 * time.Minute, LifetimeMargin: 30 * time.Second, OldSet: 128 * time.Second},
		Store:  Store{Path: "/var/lib/gmgate/gmgate.db", Reconcile: time.Minute},
		ESP:    ESP{Backend: BackendAuto, ReplayWindow: 256, TunMTU: 9000},
		Guard: Guard{
			Mode: GuardAuto, RegisterRate: 10, RegisterBurst: 64, Sources: 1 << 16, UnknownSPI: UnknownDrop, MaxSAs: 1 << 18,
			MaxUEs: 1 << 17, Pin: "/sys/fs/bpf/gmgate/" + instancePlace, Steering: true,
		},
		Metrics: Metrics{Listen: netip.MustParseAddrPort("127.0.0.1:9464")},
		Admin:   Admin{Socket: "/run/gmgate/" + instancePlace + ".sock"},
		Log:     Log{Level: slog.LevelInfo, Format: FormatText},
	}
}

// Load reads the file at path. The error is Errors when the file could be read and is not valid.
func Load(path string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	defer f.Close() //nolint:errcheck // nothing was written
	text, err := readLimited(f)
	if err != nil {
		return nil, fmt.Errorf("read configuration %s: %w", path, err)
	}
	return Parse(text, path)
}

// Validate checks a Config that was put together in code. The error is Errors, without lines and columns.
func (c *Config) Validate() error {
	r := newReport("")
	c.check(r)
	return r.err()
}

// maxWorkers is how many there may be: flow tokens have a byte for the worker.
const maxWorkers = 256

// WorkerCount returns the number of workers: Workers, or one for each CPU that the process may use.
func (c *Config) WorkerCount() int {
	if c.Workers > 0 {
		return c.Workers
	}
	return min(runtime.GOMAXPROCS(0), maxWorkers)
}

// instancePlace stands for the instance's name in the path of the admin socket, so that several instances on a host get
// one each by default.
const instancePlace = "{instance}"

// SocketPath returns the path of the admin socket; empty: none.
func (c *Config) SocketPath() string {
	return strings.ReplaceAll(c.Admin.Socket, instancePlace, c.Instance)
}

// PinPath returns the directory of what is pinned; empty: nothing is. A bpffs allows no dots in names.
func (c *Config) PinPath() string {
	return strings.ReplaceAll(c.Guard.Pin, instancePlace, strings.ReplaceAll(c.Instance, ".", ":"))
}

// Suites returns the algorithm pairs that may be agreed on, in the order of preference.
func (s *Security) Suites() []ims.Suite { return s.usable(s.Algorithms) }

// SuitesOf is Suites for the phones that a rule fits.
func (s *Security) SuitesOf(r *Rule) []ims.Suite {
	if len(r.Algorithms) == 0 {
		return s.Suites()
	}
	return s.usable(r.Algorithms)
}

func (s *Security) usable(list []ims.Suite) []ims.Suite {
	suites := make([]ims.Suite, 0, len(list))
	for _, suite := range list {
		if !s.DisableDeprecated || !suite.Deprecated() {
			suites = append(suites, suite)
		}
	}
	return suites
}
