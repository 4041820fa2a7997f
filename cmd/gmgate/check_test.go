package main

import (
	"bytes"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gmgate/gmgate/control/config"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/policy"
)

var update = flag.Bool("update", false, "write the golden files")

// What gmgate check says of a file: output, errors and exit status.
func TestCheck(t *testing.T) {
	files, err := filepath.Glob("testdata/check/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no files: %v", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			var out, errs bytes.Buffer
			code := checkMain([]string{"-c", file}, &out, &errs)
			got := fmt.Sprintf("%s%sexit status %d\n", &out, &errs, code)
			golden := strings.TrimSuffix(file, ".yaml") + ".golden"
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("got\n%swant\n%s", got, want)
			}
		})
	}
}

// A file that is named is not silently left alone.
func TestExampleCommand(t *testing.T) {
	for _, tt := range []struct {
		args []string
		code int
	}{{nil, 0}, {[]string{"-h"}, 0}, {[]string{"gmgate.yaml"}, 2}, {[]string{"-o", "gmgate.yaml"}, 2}} {
		var out, errs bytes.Buffer
		code := command(t.Context(), append([]string{"example"}, tt.args...), &out, &errs)
		if code != tt.code || (out.Len() > 0) != (tt.args == nil) || (errs.Len() > 0) == (tt.args == nil) {
			t.Errorf("example %q: exit status %d, %d octets and %q", tt.args, code, out.Len(), errs.String())
		}
	}
}

// What a rule leaves out holds as it does without the rule.
func TestCompileRules(t *testing.T) {
	cfg := config.Example()
	yes, no := true, false
	cfg.Security.IPsec, cfg.Security.GIBA = config.IPsecAllow, true
	md5 := ims.Suite{Alg: ims.AlgHMACMD5, Enc: ims.EncAESCBC}
	cfg.Security.Rules = []config.Rule{
		{Realm: "a"},
		{
			Source: []netip.Prefix{netip.MustParsePrefix("10.45.0.0/16")}, IPsec: config.IPsecForbid, GIBA: &no,
			Algorithms: []ims.Suite{md5}, ServerPorts: []uint16{6101}, ClientPorts: []uint16{6112, 6111, 6110},
			Transports:      config.Transports{Clear: []ims.Transport{ims.UDP}, Requests: config.RequestsTCP},
			ReuseConnection: &no, ReplyByVia: true, TemporaryTimeout: 30 * time.Second,
		},
		{ReuseConnection: &yes, IPsec: config.IPsecRequire},
	}
	all := func(s []ims.Suite) []ims.Suite { return s }
	rules, err := compileRules(cfg, all)
	if err != nil {
		t.Fatal(err)
	}
	base := rules.Match(policy.Request{Realm: "a"})
	if base.IPsec != policy.Allow || !base.GIBA || !slices.Equal(base.Suites, cfg.Security.Suites()) || base.Requests != 0 || base.OwnConnection {
		t.Errorf("a rule without settings: %+v", base)
	}
	s := rules.Match(policy.Request{Source: netip.MustParseAddr("10.45.0.7")})
	if s.IPsec != policy.Forbid || s.GIBA || !slices.Equal(s.Suites, []ims.Suite{md5}) || s.ServerPorts[0] != 6101 ||
		len(s.ClientPorts) != 3 || s.MayRegister(ims.TCP, false) || s.Requests != ims.TCP || !s.OwnConnection ||
		!s.AnswersToSource || s.AwaitAuth != 30*time.Second {
		t.Errorf("a rule with everything: %+v", s)
	}
	if s := rules.Match(policy.Request{Source: netip.MustParseAddr("192.0.2.1")}); s.IPsec != policy.Require || s.OwnConnection {
		t.Errorf("the last rule: %+v", s)
	}
	none := func(s []ims.Suite) []ims.Suite {
		return slices.DeleteFunc(slices.Clone(s), func(s ims.Suite) bool { return s == md5 })
	}
	if _, err := compileRules(cfg, none); err == nil || !strings.Contains(err.Error(), "security.rules[1]") {
		t.Errorf("a backend that can do none of a rule's pairs: %v", err)
	}
}
