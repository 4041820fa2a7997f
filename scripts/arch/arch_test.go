// Package arch holds the test of the repository's architecture: who may import whom, what lies at the top level, and
// that the repository stands alone.
package arch

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const (
	module = "github.com/gmgate/gmgate/"
	root   = "../.."
)

// allowed is the table of who may import whom within the module, without tests. A package is covered by the entry with
// the longest name that is the package or a folder above it; an import may be the named one or below it. The arrows of
// the design: ims ← secagree, aka ← sa ← registrar ← proxy ← cmd; control knows of dataplane only the pure sipmsg;
// dataplane knows ims and sa; bench shares nothing with the server that it tests but codecs and the ESP engine, so that
// the two ends check each other.
var allowed = map[string][]string{
	"control/ims":       {},
	"control/wheel":     {},
	"control/secagree":  {"control/ims"},
	"control/aka":       {"control/ims"},
	"control/config":    {"control/ims"},
	"control/policy":    {"control/ims"},
	"control/sa":        {"control/ims", "control/secagree", "control/aka", "control/sa"},
	"control/store":     {"control/ims", "control/sa", "control/store"},
	"control/observe":   {"control/ims", "control/observe", "dataplane/sipmsg"},
	"control/reginfo":   {},
	"control/regevent":  {"control/ims", "control/reginfo", "dataplane/sipmsg"},
	"control/registrar": {"control/ims", "control/secagree", "control/aka", "control/sa", "control/wheel"},
	"control/proxy": {
		"control/ims", "control/secagree", "control/aka", "control/sa", "control/wheel", "control/registrar",
		"control/observe", "control/policy", "control/regevent", "control/reginfo", "control/store", "dataplane/sipmsg",
	},
	"control/survive": {"control/ims", "control/sa", "control/store"},
	// The operator's side of proxy: nobody but cmd imports it.
	"control/admin":    {"control/ims", "control/sa", "control/registrar", "control/proxy"},
	"bpf":              {},
	"dataplane":        {"control/ims", "control/sa", "dataplane"},
	"dataplane/guard":  {"bpf", "control/ims", "control/sa", "dataplane/hostnet"},
	"dataplane/sipmsg": {"control/ims", "dataplane/sipmsg"},
	"dataplane/esp":    {"control/ims"},
	"bench": {
		"control/ims", "control/secagree", "control/aka", "dataplane/esp", "dataplane/esptun", "dataplane/hostnet",
		"dataplane/sipmsg", "bench",
	},
	"cmd":     {"control", "dataplane", "bench"},
	"scripts": {},
}

// never says what a package must not reach through any number of imports, beside what allowed says of direct ones.
var never = map[string][]string{
	"control": {"dataplane/front", "dataplane/xfrm", "dataplane/esptun", "dataplane/hostnet", "dataplane/useresp", "dataplane/guard", "bench", "cmd"},
	"bench":   {"control/registrar", "control/proxy", "control/config", "cmd"},
}

// only names the packages that may import a library, tests included: the library stays replaceable, and its traps in
// one place.
var only = map[string][]string{
	"github.com/vishvananda/netlink":      {"dataplane/xfrm", "dataplane/hostnet"},
	"github.com/vishvananda/netns":        {"dataplane/xfrm", "dataplane/hostnet"},
	"github.com/panjf2000/gnet":           {"dataplane/front"},
	"github.com/cilium/ebpf":              {"bpf", "dataplane/guard"}, // bpf: what bpf2go generates
	"github.com/goccy/go-yaml":            {"control/config"},
	"github.com/prometheus/client_golang": {"control/observe", "cmd"},
	"github.com/wmnsk/milenage":           {"bench"},
	"github.com/gopacket/gopacket":        {"bench"},
	"go.etcd.io/bbolt":                    {"control/store/bolt"}, // panics on damaged files
	"math/rand":                           {},                     // math/rand/v2 or crypto/rand
	"go.uber.org/zap":                     {"dataplane/front"},    // gnet's logger interface
}

// topLevel are the entries that may lie at the top, beside those whose names begin with a dot.
var topLevel = []string{
	"bpf", "cmd", "dataplane", "control", "bench", "scripts", "docs",
	"go.mod", "go.sum", "Makefile", "README.md", "LICENSE", "CHANGELOG.md",
}

type pkg struct {
	ImportPath, Name, Doc              string
	Imports, TestImports, XTestImports []string
	Deps                               []string
}

// list returns the packages of the module, named without it.
func list(t *testing.T) map[string]pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Name,Doc,Imports,TestImports,XTestImports,Deps", "./...")
	cmd.Dir = root
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, &stderr)
	}
	packages := map[string]pkg{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("go list: %v", err)
		}
		packages[strings.TrimPrefix(p.ImportPath, module)] = p
	}
	if len(packages) < 5 {
		t.Fatalf("go list found %d packages only", len(packages))
	}
	return packages
}

// ours returns those imports that are of this module, without its name.
func ours(imports []string) (names []string) {
	for _, i := range imports {
		if name, ok := strings.CutPrefix(i, module); ok {
			names = append(names, name)
		}
	}
	return names
}

func below(name, folder string) bool { return name == folder || strings.HasPrefix(name, folder+"/") }

func belowAny(name string, folders []string) bool {
	return slices.ContainsFunc(folders, func(f string) bool { return below(name, f) })
}

// rule returns the entry of allowed that covers a package.
func rule(name string) (imports []string, ok bool) {
	for at := name; at != "."; at = path.Dir(at) {
		if imports, ok = allowed[at]; ok {
			return imports, true
		}
	}
	return nil, false
}

// violations returns what is wrong with the imports of one package.
func violations(name string, p pkg) (faults []string) {
	imports, ok := rule(name)
	if !ok {
		return []string{name + " is in no folder of the design"}
	}
	for _, i := range ours(p.Imports) {
		if !belowAny(i, imports) {
			faults = append(faults, name+" imports "+i)
		}
	}
	for folder, banned := range never {
		if !below(name, folder) {
			continue
		}
		for _, d := range ours(p.Deps) {
			if belowAny(d, banned) {
				faults = append(faults, name+" depends on "+d)
			}
		}
	}
	// Tests may use the test helpers of what they test and real ends to talk to, but control is tested without dataplane.
	for _, i := range ours(slices.Concat(p.TestImports, p.XTestImports)) {
		if below(name, "control") && below(i, "dataplane") && !below(i, "dataplane/sipmsg") ||
			below(name, "bench") && belowAny(i, never["bench"]) {
			faults = append(faults, "a test of "+name+" imports "+i)
		}
	}
	for library, users := range only {
		for _, i := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
			banned := below(i, library)
			if library == "math/rand" {
				banned = i == library // its successor lies below it
			}
			if banned && !belowAny(name, users) {
				faults = append(faults, name+" imports "+i)
			}
		}
	}
	return faults
}

func TestImports(t *testing.T) {
	for name, p := range list(t) {
		for _, f := range violations(name, p) {
			t.Error(f)
		}
	}
}

// TestRulesBite feeds the rules with what they are there to refuse.
func TestRulesBite(t *testing.T) {
	for _, tt := range []struct {
		name string
		pkg  pkg
		want int
	}{
		{"control/proxy", pkg{Imports: []string{"fmt", module + "control/registrar", module + "dataplane/sipmsg"}}, 0},
		{"control/proxy", pkg{Imports: []string{module + "dataplane/front"}, Deps: []string{module + "dataplane/front"}}, 2},
		{"control/proxy", pkg{TestImports: []string{module + "dataplane/front"}}, 1},
		{"control/ims", pkg{Imports: []string{module + "control/sa"}}, 1},
		{"control/sa/satest", pkg{Imports: []string{module + "control/sa"}}, 0},
		{"control/sa", pkg{Imports: []string{module + "control/registrar"}}, 1},
		{"control/secagree", pkg{Imports: []string{"github.com/vishvananda/netlink/nl"}}, 1},
		{"dataplane/front", pkg{Imports: []string{"github.com/panjf2000/gnet/v2", module + "control/proxy"}}, 1},
		{"dataplane/xfrm", pkg{XTestImports: []string{"github.com/panjf2000/gnet/v2"}}, 1},
		{"bench/ue", pkg{Imports: []string{module + "control/sa"}}, 1},
		{"bench/ue", pkg{Deps: []string{module + "control/proxy"}}, 1},
		{"bench/e2e", pkg{XTestImports: []string{module + "control/config"}}, 1},
		{"control/store", pkg{Imports: []string{"go.etcd.io/bbolt"}}, 1},
		{"control/store", pkg{Imports: []string{module + "control/registrar"}}, 1},
		{"control/store/bolt", pkg{Imports: []string{"go.etcd.io/bbolt/errors", module + "control/store"}}, 0},
		{"control/wheel", pkg{TestImports: []string{"math/rand"}}, 1},
		{"control/wheel", pkg{TestImports: []string{"math/rand/v2"}}, 0},
		{"pkg/util", pkg{}, 1},
	} {
		if got := violations(tt.name, tt.pkg); len(got) != tt.want {
			t.Errorf("%s %+v: %q, want %d faults", tt.name, tt.pkg, got, tt.want)
		}
	}
}

func TestEveryPackageIsDocumented(t *testing.T) {
	for name, p := range list(t) {
		if p.Doc == "" && p.Name != "" && len(p.Imports) > 0 { // not a folder of tests only
			t.Errorf("%s has no package documentation", name)
		}
	}
}

// files returns what belongs to the repository: tracked, or new and not ignored. Outside a checkout (a release tarball)
// that is everything but what the Makefile builds.
func files(t *testing.T) []string {
	t.Helper()
	cmd := exec.Command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	cmd.Dir = root
	if out, err := cmd.Output(); err == nil && len(out) > 0 {
		names := strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00")
		slices.Sort(names)
		return slices.Compact(names)
	}
	var names []string
	err := fs.WalkDir(os.DirFS(root), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (name == ".git" || name == "bin") {
			return fs.SkipDir
		}
		if !d.IsDir() {
			names = append(names, name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestTopLevel(t *testing.T) {
	names := files(t)
	if len(names) < 20 {
		t.Fatalf("%d files only", len(names))
	}
	for _, name := range names {
		if top, _, _ := strings.Cut(name, "/"); top[0] != '.' && !slices.Contains(topLevel, top) {
			t.Errorf("%s: nothing but %s lies at the top level", name, strings.Join(topLevel, " "))
		}
	}
}

// TestStandsAlone: no file names a place of the machine on which it was written.
func TestStandsAlone(t *testing.T) {
	var places []string
	for _, p := range []string{"work", "farm", "tmp/gm", "tmp/h"} { // put together here, or this file would be found
		places = append(places, "/"+p+"/")
	}
	places = append(places, ".."+"/shared")
	for _, name := range files(t) {
		text, err := os.ReadFile(filepath.Join(root, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // deleted and not committed yet
		}
		if err != nil {
			t.Errorf("read %s: %v", name, err)
			continue
		}
		for _, p := range places {
			if before, _, found := bytes.Cut(text, []byte(p)); found {
				t.Errorf("%s:%d names %s", name, bytes.Count(before, []byte("\n"))+1, p)
			}
		}
	}
}
