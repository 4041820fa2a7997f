package main

import (
	"cmp"
	"fmt"

	"github.com/gmgate/gmgate/control/config"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/policy"
)

// compileRules translates security.rules. able leaves those algorithm pairs that the ESP backend can do.
func compileRules(cfg *config.Config, able func([]ims.Suite) []ims.Suite) (*policy.Rules, error) {
	sec := &cfg.Security
	base := policy.Settings{IPsec: mode(sec.IPsec), GIBA: sec.GIBA, Suites: able(sec.Suites())}
	rules := make([]policy.Rule, 0, len(sec.Rules))
	for i := range sec.Rules {
		r := &sec.Rules[i]
		s := base
		if s.Suites = able(sec.SuitesOf(r)); len(s.Suites) == 0 {
			return nil, fmt.Errorf("compile security.rules[%d]: the ESP backend can do none of its algorithms", i)
		}
		s.IPsec = mode(cmp.Or(r.IPsec, sec.IPsec))
		if r.GIBA != nil {
			s.GIBA = *r.GIBA
		}
		s.ServerPorts, s.ClientPorts, s.AwaitAuth = r.ServerPorts, r.ClientPorts, r.TemporaryTimeout
		s.Clear, s.Protected = r.Transports.Clear, r.Transports.Protected
		switch r.Transports.Requests {
		case config.RequestsTCP:
			s.Requests = ims.TCP
		case config.RequestsUDP:
			s.Requests = ims.UDP
		case config.RequestsAuto:
		}
		s.OwnConnection = r.ReuseConnection != nil && !*r.ReuseConnection
		s.AnswersToSource = r.ReplyByVia
		rules = append(rules, policy.Rule{
			Match:    policy.Match{Realm: r.Realm, IMPI: r.IMPI, UserAgent: r.UserAgent, Source: r.Source},
			Settings: s,
		})
	}
	return policy.Compile(base, rules...), nil
}

func mode(i config.IPsec) policy.Mode {
	switch i {
	case config.IPsecAllow:
		return policy.Allow
	case config.IPsecForbid:
		return policy.Forbid
	case config.IPsecRequire:
	}
	return policy.Require
}
