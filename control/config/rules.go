package config

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"

	"github.com/gmgate/gmgate/control/ims"
)

// longestPattern bounds a pattern: more than that no header value needs to be told apart by.
const longestPattern = 256

// rulesField is the list of rules.
func rulesField(key, doc string) field {
	f := field{
		key: key, doc: doc, many: true, sample: `[{source: ["10.45.0.0/16"], user_agent: "*Samsung*", ipsec: allow}]`,
		count: func(c *Config) int { return len(c.Security.Rules) },
		item:  ruleFields,
		read: func(d *decoder, path string, n ast.Node) {
			d.elements(path, n, func(sub string, n ast.Node) bool {
				i := len(d.config.Security.Rules)
				d.config.Security.Rules = append(d.config.Security.Rules, Rule{})
				d.section(sub, ruleFields(i), n)
				if d.failed[sub] { // no section at all
					d.config.Security.Rules = d.config.Security.Rules[:i]
					return false
				}
				return true
			})
		},
		check: func(c *Config, r *report, path string) {
			for i := range c.Security.Rules {
				sub := r.element(path, i)
				walk(sub, ruleFields(i), func(path string, f *field) {
					if f.check != nil {
						f.check(c, r, path)
					}
				})
				c.checkRule(r, sub, i)
			}
		},
	}
	f.show = func(c *Config) string {
		var b bytes.Buffer
		writeItems(&b, c, &f, 0, false)
		return b.String()
	}
	return f
}

// ruleFields returns the keys of the i-th rule.
func ruleFields(i int) []field {
	rule := func(c *Config) *Rule { return &c.Security.Rules[i] }
	return []field{
		patternField("realm", "Match: realm of Authorization, or the domain of To without one.",
			func(c *Config) *string { return &rule(c).Realm }),
		patternField("impi", "Match: private identity.", func(c *Config) *string { return &rule(c).IMPI }),
		patternField("user_agent", "Match: User-Agent.", func(c *Config) *string { return &rule(c).UserAgent }),
		optionalList(listField("source", "Match: prefixes of the source address.",
			func(c *Config) *[]netip.Prefix { return &rule(c).Source }, readPrefix, quoted[netip.Prefix], prefixFault),
			func(c *Config) int { return len(rule(c).Source) }),
		optional(enumField("ipsec", "require, allow or forbid.",
			func(c *Config) *IPsec { return &rule(c).IPsec }, IPsecRequire, IPsecAllow, IPsecForbid),
			func(c *Config) bool { return rule(c).IPsec == "" }),
		optionalBool("giba", "Accept what the core accepts without a challenge.", func(c *Config) **bool { return &rule(c).GIBA }),
		optionalList(suitesField("algorithms", "Pairs in the order of preference.",
			func(c *Config) *[]ims.Suite { return &rule(c).Algorithms }),
			func(c *Config) int { return len(rule(c).Algorithms) }),
		optionalList(listField("server_ports", "Some of gm.server_ports, in the order of preference.",
			func(c *Config) *[]uint16 { return &rule(c).ServerPorts }, readPort, plain[uint16], portFault),
			func(c *Config) int { return len(rule(c).ServerPorts) }),
		optionalList(listField("client_ports", "Some of gm.client_ports, not fewer than max_sets_per_ue.",
			func(c *Config) *[]uint16 { return &rule(c).ClientPorts }, readPort, plain[uint16], portFault),
			func(c *Config) int { return len(rule(c).ClientPorts) }),
		{key: "transports", doc: "Of REGISTER in clear, of protected REGISTER, and of requests to the phone.", sub: []field{
			transportsField("clear", "udp, tcp or both.", func(c *Config) *[]ims.Transport { return &rule(c).Transports.Clear }),
			transportsField("protected", "udp, tcp or both.", func(c *Config) *[]ims.Transport { return &rule(c).Transports.Protected }),
			optional(enumField("requests", "auto, udp or tcp; UDP after all where the phone accepts no connection.",
				func(c *Config) *Requests { return &rule(c).Transports.Requests }, RequestsAuto, RequestsUDP, RequestsTCP),
				func(c *Config) bool { return rule(c).Transports.Requests == "" }),
		}},
		optionalBool("reuse_connection", "Requests to the phone may go on connections that it opened; true by default.",
			func(c *Config) **bool { return &rule(c).ReuseConnection }),
		optional(boolField("reply_by_via", "UDP answers to requests with rport go back from port-ps to port-uc, not from port-pc to port-us.",
			func(c *Config) *bool { return &rule(c).ReplyByVia }), func(c *Config) bool { return !rule(c).ReplyByVia }),
		optional(durationField("temporary_timeout", "Instead of timers.reg_await_auth.",
			func(c *Config) *time.Duration { return &rule(c).TemporaryTimeout }, time.Second),
			func(c *Config) bool { return rule(c).TemporaryTimeout == 0 }),
	}
}

// optional makes a key one that may be unset, which no rule about its value is then for.
func optional(f field, unset func(*Config) bool) field {
	f.unset = unset
	if check := f.check; check != nil {
		f.check = func(c *Config, r *report, path string) {
			if !unset(c) {
				check(c, r, path)
			}
		}
	}
	// Zero in the file is no way to unset something that must not be zero.
	read := f.read
	f.read = func(d *decoder, path string, n ast.Node) {
		before := len(d.problems)
		read(d, path, n)
		if len(d.problems) == before && unset(d.config) && f.check != nil {
			d.fail(path, "no value", "leave the key out to get what holds without the rule")
		}
	}
	return f
}

// optionalList is optional for a list, which must not be empty when it is there.
func optionalList(f field, length func(*Config) int) field {
	read := f.read
	f.unset = func(c *Config) bool { return length(c) == 0 }
	f.read = func(d *decoder, path string, n ast.Node) {
		read(d, path, n)
		if length(d.config) == 0 && !d.failed[path] {
			d.fail(path, "the list is empty", "leave the key out to get what holds without the rule")
		}
	}
	return f
}

func optionalBool(key, doc string, at func(*Config) **bool) field {
	return field{
		key: key, doc: doc,
		read: func(d *decoder, path string, n ast.Node) {
			if v, ok := d.boolean(path, n); ok {
				*at(d.config) = &v
			}
		},
		show:  func(c *Config) string { return strconv.FormatBool(**at(c)) },
		unset: func(c *Config) bool { return *at(c) == nil },
	}
}

func patternField(key, doc string, at func(*Config) *string) field {
	f := textField(key, doc, at, func(s string) string {
		if len(s) > longestPattern {
			return fmt.Sprintf("longer than %d characters", longestPattern)
		}
		if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) {
			return "not printable ASCII"
		}
		return ""
	})
	return optional(f, func(c *Config) bool { return *at(c) == "" })
}

func transportsField(key, doc string, at func(*Config) *[]ims.Transport) field {
	return optionalList(listField(key, doc, at, func(d *decoder, path string, n ast.Node) (ims.Transport, bool) {
		s, ok := d.text(path, n, "udp or tcp")
		if !ok {
			return 0, false
		}
		t, ok := parseTransport(s)
		if !ok {
			d.fail(path, fmt.Sprintf("%q is not udp or tcp", s), "")
		}
		return t, ok
	}, plain[ims.Transport], func(t ims.Transport) string {
		if t != ims.UDP && t != ims.TCP {
			return fmt.Sprintf("%s is not udp or tcp", t)
		}
		return ""
	}), func(c *Config) int { return len(*at(c)) })
}

// suitesField is an ordered list of algorithm pairs: a YAML list, or one text with commas as OpenSIPS writes it.
func suitesField(key, doc string, at func(*Config) *[]ims.Suite) field {
	check := func(s ims.Suite) string {
		if !s.Legal() {
			return fmt.Sprintf("%s is no pair of TS 33.203 Annex H", s)
		}
		return ""
	}
	f := listField(key, doc, at, nil, plain[ims.Suite], check)
	f.read = func(d *decoder, path string, n ast.Node) {
		list, from := []ims.Suite{}, []int{}
		add := func(i int, sub, text string) bool {
			suites, err := parseSuites(text)
			if err != nil {
				hint := ""
				if !strings.Contains(text, "=") {
					hint = "such as hmac-sha-1-96=aes-cbc"
				}
				d.fail(sub, err.Error(), hint)
				return false
			}
			for _, s := range suites {
				if len(suites) > 1 && slices.Contains(list, s) {
					continue // a name alone stands for the pairs that are not there yet
				}
				list, from = append(list, s), append(from, i)
			}
			return true
		}
		if text, ok := n.(*ast.StringNode); ok {
			for i, part := range strings.Split(text.Value, ",") {
				sub := fmt.Sprintf("%s[%d]", path, i)
				d.at[sub] = positionOf(n)
				if !add(i, sub, part) {
					d.failed[path] = true
				}
			}
		} else {
			if !d.elements(path, n, func(sub string, n ast.Node) bool {
				i, _ := strconv.Atoi(sub[strings.LastIndexByte(sub, '[')+1 : len(sub)-1])
				s, ok := d.text(sub, n, "a pair integrity=encryption")
				return ok && add(i, sub, s)
			}) {
				return
			}
		}
		d.index[path] = from
		*at(d.config) = list
	}
	return f
}

// parseSuites reads a pair, or one name that stands for every pair with it.
func parseSuites(text string) ([]ims.Suite, error) {
	s, err := ims.ParseSuite(text)
	if err == nil {
		return []ims.Suite{s}, nil
	}
	name := strings.TrimSpace(text)
	if strings.Contains(name, "=") || strings.EqualFold(name, ims.EncNull.String()) { // null alone is either of two
		return nil, err
	}
	alg, noAlg := ims.ParseAlg(name)
	enc, noEnc := ims.ParseEncAlg(name)
	if noAlg != nil && noEnc != nil {
		return nil, err
	}
	return slices.DeleteFunc(Default().Security.Algorithms, func(s ims.Suite) bool {
		return (noAlg != nil || s.Alg != alg) && (noEnc != nil || s.Enc != enc)
	}), nil
}

// checkRule applies the rules between the keys of a rule, and between it and the rest of the file.
func (c *Config) checkRule(r *report, path string, i int) {
	rule := &c.Security.Rules[i]
	if i < len(c.Security.Rules)-1 && rule.Realm == "" && rule.IMPI == "" && rule.UserAgent == "" && len(rule.Source) == 0 &&
		!r.anyFailed(path+".realm", path+".impi", path+".user_agent", path+".source") {
		r.add(path, "fits every phone, so the rules behind it are never reached", "put it last")
	}
	subset := func(key, of string, list, all []uint16) {
		for k, port := range list {
			if !slices.Contains(all, port) && !r.failed[of] {
				r.addf(r.element(path+"."+key, k), "%d is not in %s", port, of)
			}
		}
	}
	subset("server_ports", "gm.server_ports", rule.ServerPorts, c.Gm.ServerPorts)
	subset("client_ports", "gm.client_ports", rule.ClientPorts, c.Gm.ClientPorts)
	if n, sets := len(rule.ClientPorts), c.Security.MaxSetsPerUE; n > 0 && n < sets &&
		!r.anyFailed(path+".client_ports", "security.max_sets_per_ue") {
		r.addf(path+".client_ports", "%d ports, security.max_sets_per_ue needs %d", n, sets)
	}
	if len(rule.Algorithms) > 0 && len(c.Security.SuitesOf(rule)) == 0 && !r.failed[path+".algorithms"] {
		r.add(path+".algorithms", "security.disable_deprecated leaves none of the pairs", "")
	}
	ipsec := rule.IPsec
	if ipsec == "" {
		ipsec = c.Security.IPsec
	}
	if rule.GIBA != nil && *rule.GIBA && ipsec == IPsecRequire && !r.failed["security.ipsec"] {
		r.add(path+".giba", "has no effect where IPsec is required", "set ipsec to allow or forbid")
	}
}
