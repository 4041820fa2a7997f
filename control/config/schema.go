package config

import (
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/goccy/go-yaml/ast"

	"github.com/gmgate/gmgate/control/ims"
)

// field is one key of the file: how it is read, checked, written and explained. Rules between several keys are in
// check.go.
type field struct {
	key    string
	doc    string  // for the example, lines separated by \n
	sample string  // for the example: a value of a key that has none by default, shown in a comment
	sub    []field // a section has these and nothing else
	many   bool    // a list or table

	// A list of sections has these instead of show: how many there are, and what is in one. Keys of such a section may be
	// left out, and are when they are unset.
	count func(c *Config) int
	item  func(i int) []field
	unset func(c *Config) bool

	read  func(d *decoder, path string, n ast.Node)
	check func(c *Config, r *report, path string)
	show  func(c *Config) string
}

// schema returns the whole file, in the order of the example.
func schema() []field {
	return []field{
		textField("instance", "Name of this instance, in logs and in charging identifiers. Default: the host name.",
			func(c *Config) *string { return &c.Instance }, func(s string) string {
				if !validInstance(s) {
					return "not a name of at most 64 letters, digits, dots, hyphens and underscores"
				}
				return ""
			}),
		intField("workers", "Threads that handle SIP; 0 means one for each CPU. A phone belongs to one worker.",
			func(c *Config) *int { return &c.Workers }, 0, maxWorkers),
		{key: "gm", doc: "Gm: the side of the phones.", sub: []field{
			listField("addresses", "Addresses that phones send to, IPv4 and IPv6. Required.",
				func(c *Config) *[]netip.Addr { return &c.Gm.Addresses }, readAddr, quoted[netip.Addr],
				func(a netip.Addr) string { return addressFault(a) }),
			portField("port", "Unprotected port: the first REGISTER, in clear.",
				func(c *Config) *uint16 { return &c.Gm.Port }),
			listField("server_ports", "Protected server ports (port-ps), one or more. Protected ports must not be 5060 or 5061\n(TS 33.203 section 7.1).",
				func(c *Config) *[]uint16 { return &c.Gm.ServerPorts }, readPort, plain[uint16], portFault),
			listField("client_ports", "Protected client ports (port-pc), four or more: live SA sets of a phone differ in it.",
				func(c *Config) *[]uint16 { return &c.Gm.ClientPorts }, readPort, plain[uint16], portFault),
			intField("max_message", "Longest SIP message in bytes.",
				func(c *Config) *int { return &c.Gm.MaxMessage }, 2048, 65535),
			intField("udp_limit", "Larger requests to a phone go over TCP (RFC 3261 section 18.1.1).",
				func(c *Config) *int { return &c.Gm.UDPLimit }, 512, 65507),
			enumField("clear_requests", "Requests other than REGISTER on the unprotected port: reject (403) or drop.",
				func(c *Config) *ClearRequests { return &c.Gm.ClearRequests }, ClearReject, ClearDrop),
			{key: "tcp", doc: "TCP connections of phones.", sub: []field{
				intField("max_connections", "Connections at the same time; more are refused.",
					func(c *Config) *int { return &c.Gm.TCP.MaxConnections }, 1, int64(ims.MaxConnID)),
				intField("max_per_source", "The same for one IPv4 address or IPv6 /64 on the unprotected port.",
					func(c *Config) *int { return &c.Gm.TCP.MaxPerSource }, 1, int64(ims.MaxConnID)),
				durationField("idle_timeout", "A connection without traffic is closed after this time.",
					func(c *Config) *time.Duration { return &c.Gm.TCP.IdleTimeout }, time.Second),
				durationField("dial_timeout", "Limit for opening a connection to a phone.",
					func(c *Config) *time.Duration { return &c.Gm.TCP.DialTimeout }, 100*time.Millisecond),
				intField("max_segment", "TCP maximum segment size: leaves room for ESP.",
					func(c *Config) *int { return &c.Gm.TCP.MaxSegment }, 536, 65495),
			}},
		}},
		{key: "security", doc: "Security agreement with the phones (RFC 3329, TS 33.203).", sub: []field{
			enumField("ipsec", "IPsec of phones: require (421 without it), allow (taken if offered, else the phone registers in\nclear), or forbid (all register in clear).",
				func(c *Config) *IPsec { return &c.Security.IPsec }, IPsecRequire, IPsecAllow, IPsecForbid),
			boolField("giba", "Accept a registration in clear without Authorization that the core accepts without a challenge\n(TS 33.203 Annex T).",
				func(c *Config) *bool { return &c.Security.GIBA }),
			enumField("emergency", "Emergency registrations: allow or forbid (403).",
				func(c *Config) *Emergency { return &c.Security.Emergency }, EmergencyAllow, EmergencyForbid),
			rulesField("rules", "What holds for some phones instead, looked at when they register. The first rule that fits wins;\nall its match keys must fit, and what it leaves out holds as above. In realm, impi and user_agent\n* stands for any text and ? for one character. Phones choose those three themselves: name the source\nas well where a rule lowers their protection."),
			suitesField("algorithms", "Allowed pairs integrity=encryption in the order of preference: a list, or a text with commas. One\nname alone stands for every pair with it.",
				func(c *Config) *[]ims.Suite { return &c.Security.Algorithms }),
			boolField("disable_deprecated", "Leave out the pairs with hmac-md5-96 or des-ede3-cbc, which later releases removed.",
				func(c *Config) *bool { return &c.Security.DisableDeprecated }),
			enumField("security_server", "Security-Server in the challenge: the chosen mechanism only, or the whole list.",
				func(c *Config) *SecurityServer { return &c.Security.SecurityServer }, ServerChosen, ServerList),
			intField("no_common_algorithm", "SIP status when the phone offers no allowed pair.",
				func(c *Config) *int { return &c.Security.NoCommonAlgorithm }, 400, 699),
			intField("verify_mismatch", "SIP status when Security-Verify differs from what was sent.",
				func(c *Config) *int { return &c.Security.VerifyMismatch }, 400, 699),
			intField("address_conflict", "SIP status when the address belongs to another phone's live SA set.",
				func(c *Config) *int { return &c.Security.AddressConflict }, 400, 699),
			intField("no_sa_set", "SIP status for the core when a request is for a phone without a live SA set.",
				func(c *Config) *int { return &c.Security.NoSASet }, 400, 699),
			boolField("reuse_server_port", "Keep port-ps at a re-registration (TS 33.203 section 7.1); false prefers another one.",
				func(c *Config) *bool { return &c.Security.ReuseServerPort }),
			{key: "spi", doc: "Range of the SPIs given out, both ends included. Several gmgates behind one address need\nranges of their own.", sub: []field{
				spiField("first", "", func(c *Config) *ims.SPI { return &c.Security.SPI.First }),
				spiField("last", "", func(c *Config) *ims.SPI { return &c.Security.SPI.Last }),
			}},
			intField("max_sets_per_ue", "SA sets of one phone at the same time: current, old and pending. Not more than client_ports.",
				func(c *Config) *int { return &c.Security.MaxSetsPerUE }, 2, 16),
		}},
		{key: "mw", doc: "Mw: the side of the core.", sub: []field{
			listField("addresses", "Addresses that the core sends to. Required.",
				func(c *Config) *[]netip.Addr { return &c.Mw.Addresses }, readAddr, quoted[netip.Addr],
				func(a netip.Addr) string { return addressFault(a) }),
			portField("port", "Port of worker 0; worker k listens on port+k.", func(c *Config) *uint16 { return &c.Mw.Port }),
			transportField("transport", "Transport towards next hops that do not name one: udp or tcp.",
				func(c *Config) *ims.Transport { return &c.Mw.Transport }),
			nextHopsField("next_hops", "Entry points of the core, tried in order: host:port or host:port;transport=tcp. Required.\nA host is an address or a name of the table hosts."),
			hostsField("hosts", "Names and their addresses: hosts of next hops, and of Service-Route and Route."),
			prefixesField("peers", "Destinations that requests of phones may be routed to, beside next hops and hosts.", `["10.0.1.0/24"]`,
				func(c *Config) *[]netip.Prefix { return &c.Mw.Peers }),
			textField("interface", "Interface that the core is reached by: the Mw sockets use no other one. What comes on them is trusted,\nso phones must not reach them. Empty: any interface.",
				func(c *Config) *string { return &c.Mw.Interface }, func(s string) string {
					if s != "" && !isInterface(s) {
						return "not the name of an interface"
					}
					return ""
				}),
			prefixesField("sources", "Addresses that messages of the core come from, all else is dropped. Empty: any.", `["10.0.1.0/24"]`,
				func(c *Config) *[]netip.Prefix { return &c.Mw.Sources }),
			textField("visited_network", "P-Visited-Network-ID of REGISTER: this network's name.",
				func(c *Config) *string { return &c.Mw.VisitedNetwork }, func(s string) string {
					if !validName(s) {
						return "not a domain name"
					}
					return ""
				}),
			textField("path_host", "Host that Path and Record-Route name; empty: the Mw address.",
				func(c *Config) *string { return &c.Mw.PathHost }, func(s string) string {
					if a, err := netip.ParseAddr(s); s != "" && (err != nil || addressFault(a) != "") && !validName(s) {
						return "neither a domain name nor an address"
					}
					return ""
				}),
			enumField("integrity_protected_clear", "integrity-protected in a REGISTER that came in clear: \"no\", or absent to leave it out.",
				func(c *Config) *IntegrityClear { return &c.Mw.IntegrityProtectedClear }, IntegrityNo, IntegrityAbsent),
			boolField("integrity_protected_quoted", "Quote the value of integrity-protected, as most registrars expect.",
				func(c *Config) *bool { return &c.Mw.IntegrityProtectedQuoted }),
			textField("orig_ioi", "orig-ioi of P-Charging-Vector (type 1); empty: left out.",
				func(c *Config) *string { return &c.Mw.OrigIOI }, func(s string) string {
					if s != "" && !validName(s) {
						return "not a domain name"
					}
					return ""
				}),
			enumField("service_route", "Initial request whose Route is not the Service-Route: repair it, or refuse the request (400).",
				func(c *Config) *ServiceRoute { return &c.Mw.ServiceRoute }, ServiceRouteRepair, ServiceRouteRefuse),
			durationField("register_timeout", "How long the core may take to answer a REGISTER.",
				func(c *Config) *time.Duration { return &c.Mw.RegisterTimeout }, time.Second),
			orZero(durationField("health_interval", "Time between two OPTIONS to a next hop; 0: none are sent.",
				func(c *Config) *time.Duration { return &c.Mw.HealthInterval }, time.Second),
				func(c *Config) bool { return c.Mw.HealthInterval == 0 }),
			{key: "reg_event", doc: "Subscriptions to the registration state of the phones (RFC 3680): by them the core can\nend a registration.", sub: []field{
				boolField("enabled", "Subscribe for each registered phone. A core that refuses is not asked again.",
					func(c *Config) *bool { return &c.Mw.RegEvent.Enabled }),
				durationField("expires", "A subscription is asked for at least this time, and for longer than the registration.",
					func(c *Config) *time.Duration { return &c.Mw.RegEvent.Expires }, time.Second),
				textField("uri", "Own SIP URI of this P-CSCF; empty: made from path_host or the Mw address.",
					func(c *Config) *string { return &c.Mw.RegEvent.URI }, func(s string) string {
						if s != "" && !validSIPURI(s) {
							return "not a SIP URI without parameters, such as sip:pcscf.example"
						}
						return ""
					}),
			}},
		}},
		{key: "limits", doc: "What phones that have not been authenticated can take. Beyond it they get 503 with Retry-After.", sub: []field{
			intField("pending_registrations", "Registrations under way that are not confirmed yet. Beyond it the oldest ones give way.",
				func(c *Config) *int { return &c.Limits.PendingRegistrations }, 16, 10000000),
			intField("pending_per_source", "The same for one source: an IPv4 address, or an IPv6 /64.",
				func(c *Config) *int { return &c.Limits.PendingPerSource }, 1, 10000000),
			intField("sa_sets", "SA sets overall; beyond it no further phone is let in. 0: as many as there are SPIs.",
				func(c *Config) *int { return &c.Limits.SASets }, 0, 100000000),
		}},
		{key: "timers", doc: "Timers of registrations and SA sets (TS 24.229, TS 33.203 section 7.4).", sub: []field{
			durationField("reg_await_auth", "A challenged phone has this long to come back protected.",
				func(c *Config) *time.Duration { return &c.Timers.RegAwaitAuth }, time.Second),
			durationField("lifetime_margin", "An SA set lives this much longer than the registration.",
				func(c *Config) *time.Duration { return &c.Timers.LifetimeMargin }, time.Second),
			durationField("old_set", "A replaced SA set is kept this long for what is still on its way.",
				func(c *Config) *time.Duration { return &c.Timers.OldSet }, time.Second),
		}},
		{key: "store", doc: "Where registrations and SA sets are kept, so that a restart loses none.", sub: []field{
			textField("path", "Database file; \"\" keeps nothing. Its directory is made if it is missing.",
				func(c *Config) *string { return &c.Store.Path }, pathFault),
			textField("key_file", "File of the key that seals the keys in the database, made if it is missing. Default: path with .key\nat its end.",
				func(c *Config) *string { return &c.Store.KeyFile }, pathFault),
			textField("credential", "Name of a credential of systemd (LoadCredentialEncrypted=) that holds that key; it goes before key_file.",
				func(c *Config) *string { return &c.Store.Credential }, func(s string) string {
					if strings.ContainsRune(s, '/') || s == "." || s == ".." {
						return "not the name of a credential"
					}
					return ""
				}),
			durationField("reconcile_interval", "How often workers, ESP backend and database are compared and sequence numbers are kept.",
				func(c *Config) *time.Duration { return &c.Store.Reconcile }, time.Second),
		}},
		{key: "esp", doc: "ESP backend.", sub: []field{
			enumField("backend", "auto: the kernel's ESP (xfrm) if it has one, otherwise userspace.",
				func(c *Config) *Backend { return &c.ESP.Backend }, BackendAuto, BackendXFRM, BackendUserspace),
			intField("replay_window", "Anti-replay window in packets.", func(c *Config) *int { return &c.ESP.ReplayWindow }, 64, 4096),
			intField("tun_mtu", "MTU of the userspace backend's TUN device.", func(c *Config) *int { return &c.ESP.TunMTU }, 1500, 65535),
		}},
		{key: "guard", doc: "eBPF: a filter in front of the protected ports, and steering of packets to workers. Without the privileges\nor a kernel for it gmgate works without, and says so.", sub: []field{
			enumField("mode", "Hook of the filter: auto (the best one of each interface, or none), xdp (in the driver), generic (XDP in\nthe stack), tc, or off. With xdp, generic and tc gmgate does not start where that hook is not to be had.",
				func(c *Config) *GuardMode { return &c.Guard.Mode }, GuardAuto, GuardXDP, GuardGeneric, GuardTC, GuardOff),
			interfacesField("interfaces", "Interfaces that phones come in by. Default: those that have the Gm addresses."),
			intField("register_rate", "REGISTERs and TCP connections per second on the unprotected port, of one IPv4 address or IPv6 /64;\n0 switches the limit off.",
				func(c *Config) *int { return &c.Guard.RegisterRate }, 0, 1000000),
			intField("register_burst", "How many of them may come at once.",
				func(c *Config) *int { return &c.Guard.RegisterBurst }, 1, 1000000),
			intField("sources", "Sources whose rate is remembered; the one that was quiet longest gives way.",
				func(c *Config) *int { return &c.Guard.Sources }, 16, 1<<24),
			enumField("unknown_spi", "ESP to a Gm address that has no SA of ours: drop, or pass for other IPsec on the same address. SAs\nthat others had before the start pass in any case.",
				func(c *Config) *UnknownSPI { return &c.Guard.UnknownSPI }, UnknownDrop, UnknownPass),
			intField("max_sas", "Inbound SAs, two for each SA set.", func(c *Config) *int { return &c.Guard.MaxSAs }, 2, 1<<24),
			intField("max_ues", "Phones with counters of their own: 32 bytes each for every CPU, up to eight.",
				func(c *Config) *int { return &c.Guard.MaxUEs }, 1, 1<<22),
			pinField("pin", "Directory on a bpffs where programs and counters outlive a restart; \"\": they end with gmgate.",
				func(c *Config) *string { return &c.Guard.Pin }),
			boolField("steering", "Choose the worker's socket by eBPF, for TCP as well. Otherwise the kernel's classic filter does it for UDP.",
				func(c *Config) *bool { return &c.Guard.Steering }),
		}},
		{key: "metrics", doc: "HTTP listener.", sub: []field{
			listenField("listen", "Address and port of /metrics; \"\" switches it off.",
				func(c *Config) *netip.AddrPort { return &c.Metrics.Listen }),
			boolField("pprof", "Serve /debug/pprof there as well. It shows memory: keep the listener on loopback.",
				func(c *Config) *bool { return &c.Metrics.Pprof }),
		}},
		{key: "admin", doc: "Operator's access: gmgate ue, and HTTP with JSON.", sub: []field{
			socketField("socket", "Path of the unix socket; \"\" switches it off. Whoever may write to it (owner and group) may look\nat registrations and end them.",
				func(c *Config) *string { return &c.Admin.Socket }),
		}},
		{key: "log", doc: "Log, to standard error.", sub: []field{
			levelField("level", "debug, info, warn or error.", func(c *Config) *slog.Level { return &c.Log.Level }),
			enumField("format", "text or json.", func(c *Config) *Format { return &c.Log.Format }, FormatText, FormatJSON),
		}},
	}
}

func lookup(fields []field, key string) *field {
	for i := range fields {
		if fields[i].key == key {
			return &fields[i]
		}
	}
	return nil
}

// walk calls f for every field, sections before what is in them.
func walk(path string, fields []field, f func(path string, f *field)) {
	for i := range fields {
		sub := join(path, fields[i].key)
		f(sub, &fields[i])
		walk(sub, fields[i].sub, f)
	}
}

// fault reports text about path unless there is none.
func fault(r *report, path, text string) {
	if text != "" {
		r.add(path, text, "")
	}
}

func intField(key, doc string, at func(*Config) *int, lowest, highest int64) field {
	return field{
		key: key, doc: doc,
		read: func(d *decoder, path string, n ast.Node) {
			if v, ok := d.integer(path, n, lowest, highest); ok {
				*at(d.config) = int(v)
			}
		},
		check: func(c *Config, r *report, path string) {
			if v := int64(*at(c)); v < lowest || v > highest {
				fault(r, path, outOfRange(v, lowest, highest))
			}
		},
		show: func(c *Config) string { return strconv.Itoa(*at(c)) },
	}
}

func portField(key, doc string, at func(*Config) *uint16) field {
	return field{
		key: key, doc: doc,
		read: func(d *decoder, path string, n ast.Node) {
			if v, ok := readPort(d, path, n); ok {
				*at(d.config) = v
			}
		},
		check: func(c *Config, r *report, path string) { fault(r, path, portFault(*at(c))) },
		show:  func(c *Config) string { return plain(*at(c)) },
	}
}

func spiField(key, doc string, at func(*Config) *ims.SPI) field {
	return field{
		key: key, doc: doc,
		read: func(d *decoder, path string, n ast.Node) {
			// RFC 4303 §2.1: 0 to 255 are reserved.
			if v, ok := d.integer(path, n, int64(ims.MinSPI), math.MaxUint32); ok {
				*at(d.config) = ims.SPI(v)
			}
		},
		check: func(c *Config, r *report, path string) {
			if v := *at(c); v < ims.MinSPI {
				fault(r, path, outOfRange(uint32(v), int64(ims.MinSPI), math.MaxUint32))
			}
		},
		show: func(c *Config) string { return at(c).Decimal() },
	}
}

func boolField(key, doc string, at func(*Config) *bool) field {
	return field{
		key: key, doc: doc,
		read: func(d *decoder, path string, n ast.Node) {
			if v, ok := d.boolean(path, n); ok {
				*at(d.config) = v
			}
		},
		show: func(c *Config) string { return strconv.FormatBool(*at(c)) },
	}
}

// durationField is a duration of at least lowest, which catches ms where m was meant.
func durationField(key, doc string, at func(*Config) *time.Duration, lowest time.Duration) field {
	check := func(v time.Duration) string {
		switch {
		case v < 0:
			return fmt.Sprintf("%s is negative", v)
		case v == 0 && lowest > 0:
			return "must be longer than zero"
		case v < lowest:
			return fmt.Sprintf("%s is less than %s", v, lowest)
		}
		return ""
	}
	return field{
		key: key, doc: doc,
		read: func(d *decoder, path string, n ast.Node) {
			if v, ok := d.duration(path, n); ok {
				*at(d.config) = v
			}
		},
		check: func(c *Config, r *report, path string) { fault(r, path, check(*at(c))) },
		show:  func(c *Config) string { return showDuration(*at(c)) },
	}
}

// orZero lets zero, which switches something off, pass the check of a field.
func orZero(f field, zero func(*Config) bool) field {
	check := f.check
	f.check = func(c *Config, r *report, path string) {
		if !zero(c) {
			check(c, r, path)
		}
	}
	return f
}

func textField(key, doc string, at func(*Config) *string, check func(string) string) field {
	return field{
		key: key, doc: doc,
		read: func(d *decoder, path string, n ast.Node) {
			if v, ok := d.text(path, n, "text"); ok {
				*at(d.config) = v
			}
		},
		check: func(c *Config, r *report, path string) {
			if text := check(*at(c)); text != "" {
				r.addf(path, "%q is %s", *at(c), text)
			}
		},
		show: func(c *Config) string { return showText(*at(c)) },
	}
}

// maxSocketPath is what a unix socket's address has room for, without the final zero.
const maxSocketPath = 107

// socketField is checked with the instance's name filled in: that is what has to fit.
func socketField(key, doc string, at func(*Config) *string) field {
	f := textField(key, doc, at, nil)
	f.check = func(c *Config, r *report, path string) {
		p := c.SocketPath()
		switch {
		case p == "":
		case !filepath.IsAbs(p) || filepath.Clean(p) != p:
			r.add(path, fmt.Sprintf("%q is not the absolute path of a file", p), "such as /run/gmgate/edge1.sock; abstract sockets and TCP are not offered")
		case strings.ContainsFunc(p, unicode.IsControl):
			r.addf(path, "%q has control characters in it", p)
		case len(p) > maxSocketPath:
			r.addf(path, "a path of %d bytes is too long for a unix socket, at most %d fit", len(p), maxSocketPath)
		}
	}
	return f
}

// pinField is checked with the instance's name filled in.
func pinField(key, doc string, at func(*Config) *string) field {
	f := textField(key, doc, at, nil)
	f.check = func(c *Config, r *report, path string) {
		p := c.PinPath()
		switch {
		case p == "" || c.Instance == "": // the latter is a fault of its own
		case !filepath.IsAbs(p) || filepath.Clean(p) != p:
			r.add(path, fmt.Sprintf("%q is not the absolute path of a directory", p), "such as /sys/fs/bpf/gmgate/edge1")
		case strings.ContainsFunc(p, unicode.IsControl) || strings.Contains(p, "."):
			r.add(path, fmt.Sprintf("%q has characters in it that a bpffs does not allow", p), "no dots and no control characters")
		}
	}
	return f
}

// maxInterface is the length of an interface's name, IFNAMSIZ without the final zero.
const maxInterface = 15

// isInterface reports whether s can be the name of an interface.
func isInterface(s string) bool {
	return s != "" && len(s) <= maxInterface && !strings.ContainsFunc(s, func(r rune) bool {
		return r <= ' ' || r == '/' || r == ':' || r > unicode.MaxASCII
	})
}

func interfacesField(key, doc string) field {
	f := listField(key, doc, func(c *Config) *[]string { return &c.Guard.Interfaces },
		func(d *decoder, path string, n ast.Node) (string, bool) {
			return d.text(path, n, "the name of an interface")
		},
		showText, func(s string) string {
			if !isInterface(s) {
				return fmt.Sprintf("%q is not the name of an interface", s)
			}
			return ""
		})
	f.sample = `[eth0]`
	// An empty list in the file and none at all are the same configuration.
	read := f.read
	f.read = func(d *decoder, path string, n ast.Node) {
		read(d, path, n)
		if len(d.config.Guard.Interfaces) == 0 {
			d.config.Guard.Interfaces = nil
		}
	}
	return f
}

func enumField[T ~string](key, doc string, at func(*Config) *T, values ...T) field {
	names := make([]string, len(values))
	for i, v := range values {
		names[i] = string(v)
	}
	want := oneOf(names)
	return field{
		key: key, doc: doc,
		read: func(d *decoder, path string, n ast.Node) {
			if v, ok := d.text(path, n, want); ok {
				*at(d.config) = T(v)
			}
		},
		check: func(c *Config, r *report, path string) {
			if !slices.Contains(values, *at(c)) {
				r.addf(path, "%q is not %s", string(*at(c)), want)
			}
		},
		show: func(c *Config) string { return showText(string(*at(c))) },
	}
}

func oneOf(names []string) string {
	last := len(names) - 1
	return strings.Join(names[:last], ", ") + " or " + names[last]
}

func transportField(key, doc string, at func(*Config) *ims.Transport) field {
	return field{
		key: key, doc: doc,
		read: func(d *decoder, path string, n ast.Node) {
			s, ok := d.text(path, n, "udp or tcp")
			if !ok {
				return
			}
			t, ok := parseTransport(s)
			if !ok {
				d.fail(path, fmt.Sprintf("%q is not udp or tcp", s), "")
				return
			}
			*at(d.config) = t
		},
		check: func(c *Config, r *report, path string) {
			if t := *at(c); t != ims.UDP && t != ims.TCP {
				r.addf(path, "%s is not udp or tcp", t)
			}
		},
		show: func(c *Config) string { return at(c).String() },
	}
}

func parseTransport(s string) (ims.Transport, bool) {
	switch strings.ToLower(s) {
	case "udp":
		return ims.UDP, true
	case "tcp":
		return ims.TCP, true
	}
	return 0, false
}

func levelField(key, doc string, at func(*Config) *slog.Level) field {
	levels := map[string]slog.Level{
		"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError,
	}
	const want = "debug, info, warn or error"
	return field{
		key: key, doc: doc,
		read: func(d *decoder, path string, n ast.Node) {
			s, ok := d.text(path, n, want)
			if !ok {
				return
			}
			level, ok := levels[strings.ToLower(s)]
			if !ok {
				d.fail(path, fmt.Sprintf("%q is not %s", s, want), "")
				return
			}
			*at(d.config) = level
		},
		show: func(c *Config) string { return strings.ToLower(at(c).String()) },
	}
}

func listenField(key, doc string, at func(*Config) *netip.AddrPort) field {
	return field{
		key: key, doc: doc,
		read: func(d *decoder, path string, n ast.Node) {
			s, ok := d.text(path, n, "address:port")
			if !ok {
				return
			}
			var v netip.AddrPort
			if s != "" {
				var err error
				if v, err = netip.ParseAddrPort(s); err != nil {
					d.fail(path, fmt.Sprintf("%q is not address:port", s), "such as 127.0.0.1:9464 or [::1]:9464")
					return
				}
			}
			*at(d.config) = v
		},
		check: func(c *Config, r *report, path string) {
			if v := *at(c); v.IsValid() && (v.Port() == 0 || v.Addr().IsMulticast() || v.Addr().Is4In6()) {
				r.addf(path, "%s cannot be listened on", v)
			}
		},
		show: func(c *Config) string {
			if !at(c).IsValid() {
				return `""`
			}
			return strconv.Quote(at(c).String())
		},
	}
}

// listField is a list of values that must differ from each other.
func listField[T comparable](
	key, doc string, at func(*Config) *[]T, read func(*decoder, string, ast.Node) (T, bool), show, check func(T) string,
) field {
	return field{
		key: key, doc: doc, many: true,
		read: func(d *decoder, path string, n ast.Node) {
			list := []T{}
			if d.elements(path, n, func(path string, n ast.Node) bool {
				v, ok := read(d, path, n)
				if ok {
					list = append(list, v)
				}
				return ok
			}) {
				*at(d.config) = list
			}
		},
		check: func(c *Config, r *report, path string) { checkList(r, path, *at(c), show, check) },
		show: func(c *Config) string {
			list := *at(c)
			words := make([]string, len(list))
			for i, v := range list {
				words[i] = show(v)
			}
			return "[" + strings.Join(words, ", ") + "]"
		},
	}
}

func checkList[T comparable](r *report, path string, list []T, show, check func(T) string) {
	for i, v := range list {
		fault(r, r.element(path, i), check(v))
		if j := slices.Index(list, v); j < i {
			r.addf(r.element(path, i), "%s is in the list already", strings.Trim(show(v), `"`))
		}
	}
}

func plain[T any](v T) string { return fmt.Sprint(v) }

func quoted[T any](v T) string { return strconv.Quote(fmt.Sprint(v)) }

func readAddr(d *decoder, path string, n ast.Node) (netip.Addr, bool) {
	s, ok := d.text(path, n, "an IP address")
	if !ok {
		return netip.Addr{}, false
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		hint := ""
		if _, err := netip.ParseAddrPort(s); err == nil {
			hint = "without port"
		} else if _, err := netip.ParsePrefix(s); err == nil {
			hint = "without prefix length"
		}
		d.fail(path, fmt.Sprintf("%q is not an IP address", s), hint)
		return netip.Addr{}, false
	}
	return a, true
}

func readPort(d *decoder, path string, n ast.Node) (uint16, bool) {
	v, ok := d.integer(path, n, 1, math.MaxUint16)
	return uint16(v), ok
}

func portFault(p uint16) string {
	if p == 0 {
		return outOfRange(p, 1, math.MaxUint16)
	}
	return ""
}

// nextHopsField reads hosts and ports; the addresses of names are filled in by resolve, when all is read.
func nextHopsField(key, doc string) field {
	f := listField(key, doc, func(c *Config) *[]NextHop { return &c.Mw.NextHops }, readNextHop, nil, nil)
	f.show = func(c *Config) string {
		words := make([]string, len(c.Mw.NextHops))
		for i, h := range c.Mw.NextHops {
			s := h.String()
			if h.Transport == c.Mw.Transport {
				s, _, _ = strings.Cut(s, ";")
			}
			words[i] = strconv.Quote(s)
		}
		return "[" + strings.Join(words, ", ") + "]"
	}
	f.check = func(c *Config, r *report, path string) { c.checkNextHops(r, path) }
	return f
}

// String returns the form used in the file.
func (h NextHop) String() string {
	host := h.Host
	if host == "" {
		host = h.Addr.Addr().String()
	}
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	s := host + ":" + strconv.Itoa(int(h.Addr.Port()))
	if h.Transport != 0 {
		s += ";transport=" + h.Transport.String()
	}
	return s
}

func readNextHop(d *decoder, path string, n ast.Node) (NextHop, bool) {
	s, ok := d.text(path, n, "host:port")
	if !ok {
		return NextHop{}, false
	}
	bad := func(format string, args ...any) (NextHop, bool) {
		d.fail(path, fmt.Sprintf(format, args...), "write host:port or host:port;transport=tcp, an IPv6 address in brackets")
		return NextHop{}, false
	}
	var h NextHop
	target, params, hasParams := strings.Cut(s, ";")
	if hasParams {
		name, value, _ := strings.Cut(params, "=")
		if !strings.EqualFold(strings.TrimSpace(name), "transport") {
			return bad("%q: the only parameter is transport", s)
		}
		t, ok := parseTransport(strings.TrimSpace(value))
		if !ok {
			return bad("%q: transport is not udp or tcp", s)
		}
		h.Transport = t
	}
	target = strings.TrimSpace(target)
	colon := strings.LastIndexByte(target, ':')
	if colon < 0 {
		return bad("%q has no port", s)
	}
	port, err := strconv.ParseUint(target[colon+1:], 10, 16)
	if err != nil || port == 0 {
		return bad("%q: the port is not 1 to 65535", s)
	}
	host := target[:colon]
	if inner, ok := strings.CutPrefix(host, "["); ok {
		a, err := netip.ParseAddr(strings.TrimSuffix(inner, "]"))
		if err != nil || !a.Is6() || !strings.HasSuffix(inner, "]") {
			return bad("%q: there is no IPv6 address in the brackets", s)
		}
		h.Host, h.Addr = a.String(), netip.AddrPortFrom(a, uint16(port))
		return h, true
	}
	if a, err := netip.ParseAddr(host); err == nil {
		if a.Is6() {
			return bad("%q: an IPv6 address needs brackets", s)
		}
		h.Host, h.Addr = a.String(), netip.AddrPortFrom(a, uint16(port))
		return h, true
	}
	if !validName(host) {
		return bad("%q: the host is neither an address nor a name", s)
	}
	h.Host, h.Addr = strings.ToLower(host), netip.AddrPortFrom(netip.Addr{}, uint16(port))
	return h, true
}

func hostsField(key, doc string) field {
	return field{
		key: key, doc: doc, many: true, sample: `{scscf.example: "10.0.1.9"}`,
		read: func(d *decoder, path string, n ast.Node) {
			list, ok := d.entries(path, n)
			if !ok {
				return
			}
			hosts := map[string]netip.Addr{}
			bad := func(sub, text string) {
				d.fail(sub, text, "")
				d.failed[path] = true
			}
			for _, e := range list {
				sub, name := e.path, strings.ToLower(e.key)
				if !validName(name) {
					bad(sub, fmt.Sprintf("%q is not a host name", e.key))
					continue
				}
				if _, ok := hosts[name]; ok {
					bad(sub, "the name is in the table already: case does not matter")
					continue
				}
				if e.value == nil || e.value.Type() == ast.NullType {
					bad(sub, "no address")
					continue
				}
				// Rules about the address are reported under its name in lower case.
				d.at[join(path, name)] = positionOf(e.value)
				d.at[sub] = positionOf(e.value)
				if a, ok := readAddr(d, sub, e.value); ok {
					hosts[name] = a
				} else {
					d.failed[path] = true
				}
			}
			if len(hosts) > 0 {
				d.config.Mw.Hosts = hosts
			}
		},
		check: func(c *Config, r *report, path string) {
			for _, name := range slices.Sorted(maps.Keys(c.Mw.Hosts)) {
				if !validName(name) || name != strings.ToLower(name) {
					r.addf(join(path, name), "%q is not a host name in lower case", name)
				}
				fault(r, join(path, name), addressFault(c.Mw.Hosts[name]))
			}
		},
		show: func(c *Config) string {
			words := make([]string, 0, len(c.Mw.Hosts))
			for _, name := range slices.Sorted(maps.Keys(c.Mw.Hosts)) {
				words = append(words, showText(name)+": "+quoted(c.Mw.Hosts[name]))
			}
			return "{" + strings.Join(words, ", ") + "}"
		},
	}
}

func prefixesField(key, doc, sample string, at func(*Config) *[]netip.Prefix) field {
	f := listField(key, doc, at, readPrefix, quoted[netip.Prefix], prefixFault)
	f.sample = sample
	// An empty list in the file and none at all are the same configuration.
	read := f.read
	f.read = func(d *decoder, path string, n ast.Node) {
		read(d, path, n)
		if len(*at(d.config)) == 0 {
			*at(d.config) = nil
		}
	}
	return f
}

func readPrefix(d *decoder, path string, n ast.Node) (netip.Prefix, bool) {
	s, ok := d.text(path, n, "an address prefix")
	if !ok {
		return netip.Prefix{}, false
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		hint := ""
		if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
			hint = "one address is " + netip.PrefixFrom(a, a.BitLen()).String()
		}
		d.fail(path, fmt.Sprintf("%q is not an address prefix", s), hint)
		return netip.Prefix{}, false
	}
	return p, true
}

func prefixFault(p netip.Prefix) string {
	switch {
	case !p.IsValid():
		return "no prefix"
	case p != p.Masked():
		return fmt.Sprintf("%s has bits behind the prefix length, the network is %s", p, p.Masked())
	case p.Bits() == 0:
		return "" // everything, said on purpose
	}
	return addressFault(p.Addr())
}

// addressFault says why a is no address of a host that SIP can be sent to or received on, or nothing.
func addressFault(a netip.Addr) string {
	switch {
	case !a.IsValid():
		return "no address"
	case a.Is4In6():
		return fmt.Sprintf("%s is an IPv4 address in IPv6 form, write %s", a, a.Unmap())
	case a.IsUnspecified():
		return fmt.Sprintf("%s is the unspecified address; SAs need explicit ones", a)
	case a.IsMulticast():
		return fmt.Sprintf("%s is a multicast address", a)
	case a.IsLinkLocalUnicast() || a.Zone() != "":
		return fmt.Sprintf("%s is a link-local address", a)
	case a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return fmt.Sprintf("%s is the broadcast address", a)
	}
	return ""
}

// validName reports whether s is a domain name (RFC 1123 §2.1, RFC 3261 §25.1 hostname) and not an IPv4 address.
func validName(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	labels := strings.Split(s, ".")
	for _, label := range labels {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, b := range []byte(label) {
			if !isAlnum(b) && b != '-' && b != '_' {
				return false
			}
		}
	}
	top := labels[len(labels)-1]
	return top[0] < '0' || top[0] > '9' // so that 10.0.0.256 is no name
}

// pathFault says why s is no path of a file, or nothing.
func pathFault(s string) string {
	switch {
	case s != "" && !filepath.IsAbs(s):
		return "not an absolute path"
	case strings.HasSuffix(s, "/"):
		return "a directory and not a file"
	}
	return ""
}

// validSIPURI reports whether s is a SIP URI of a host, perhaps with a user and a port, and without parameters.
func validSIPURI(s string) bool {
	rest, ok := strings.CutPrefix(s, "sip:")
	if user, host, found := strings.Cut(rest, "@"); found {
		for _, b := range []byte(user) {
			ok = ok && (isAlnum(b) || strings.IndexByte("-_.!~*'()+$&=", b) >= 0)
		}
		ok, rest = ok && user != "", host
	}
	if a, err := netip.ParseAddrPort(rest); err == nil {
		return ok && addressFault(a.Addr()) == "" && a.Port() != 0
	}
	if host, port, found := strings.Cut(rest, ":"); found && validName(host) {
		n, err := strconv.ParseUint(port, 10, 16)
		return ok && err == nil && n != 0
	}
	a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(rest, "["), "]"))
	return ok && (validName(rest) || err == nil && addressFault(a) == "" && a.Is6() == strings.HasPrefix(rest, "["))
}

func validInstance(s string) bool {
	if s == "" || len(s) > 64 {
		return false
	}
	for _, b := range []byte(s) {
		if !isAlnum(b) && b != '-' && b != '_' && b != '.' {
			return false
		}
	}
	return true
}

func isAlnum(b byte) bool {
	return b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b >= '0' && b <= '9'
}
