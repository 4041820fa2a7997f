// Command testsum makes the output of test runs readable and counts.
//
//	go test -json ./... | testsum [-results DIR] NAME
//	testsum -results DIR -total [-brief] NAME...
//
// It reads what `go test -json` prints, and the text of `-test.v` for binaries that run elsewhere, also mixed. The
// closing line of every package and everything about failures is printed, the output of what passed is not. At the end
// come the slowest tests, the skipped ones with their reasons, and one line "NAME: N passed, N failed, N skipped". Top-level tests count;
// a package that fails without a failed test (it does not build, it dies) counts as one failure. The exit status is 1
// when something failed or nothing ran.
//
// With -results the counts are kept in DIR/NAME.json; -total adds up those of the given names, where one that is
// missing is a stage that did not run.
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

func run(args []string, in io.Reader, out, errw io.Writer) int {
	flags := flag.NewFlagSet("testsum", flag.ContinueOnError)
	flags.SetOutput(errw)
	results := flags.String("results", "", "keep the counts in `DIR`")
	total := flags.Bool("total", false, "add up the counts of the names")
	brief := flags.Bool("brief", false, "with -total: only the last line")
	if flags.Parse(args) != nil {
		return 2
	}
	fail := func(err error) int {
		_, _ = fmt.Fprintln(errw, "testsum:", err)
		return 1
	}
	if *total {
		ok, err := printTotal(out, *results, flags.Args(), *brief)
		if err != nil {
			return fail(err)
		}
		return status(ok)
	}
	if flags.NArg() != 1 {
		flags.Usage()
		return 2
	}
	name := flags.Arg(0)
	s := newSummary(out)
	if err := s.read(in); err != nil {
		return fail(err)
	}
	s.finish(name)
	if *results != "" {
		if err := save(*results, name, s.Counts); err != nil {
			return fail(err)
		}
	}
	return status(s.Failed == 0 && s.Passed > 0)
}

func status(ok bool) int {
	if ok {
		return 0
	}
	return 1
}

// Counts are the counts of one run.
type Counts struct {
	Passed, Failed, Skipped int
	Skips                   []string `json:",omitempty"` // "package Test: reason"
}

// event is what test2json prints (go doc test2json).
type event struct {
	Action, Package, ImportPath, Test, Output string
	Elapsed                                   float64 // seconds
}

// test identifies a test.
type test struct{ pkg, name string }

// summary digests one run.
type summary struct {
	Counts
	out     io.Writer
	output  map[test][]string // of tests under way
	failed  map[string]bool   // packages with a failed test
	subs    []string          // skipped subtests, which do not count
	took    []took            // top-level tests
	reason  string            // text form: the last line that a test logged
	section string            // text form: package, from a line "--- dataplane/xfrm"
}

// took is how long a test took.
type took struct {
	test
	seconds float64
}

func newSummary(out io.Writer) *summary {
	return &summary{out: out, output: map[test][]string{}, failed: map[string]bool{}}
}

func (s *summary) print(text string) { _, _ = io.WriteString(s.out, text) }

func (s *summary) read(in io.Reader) error {
	r := bufio.NewReader(in)
	for {
		line, err := r.ReadString('\n')
		if line != "" {
			var e event
			if line[0] == '{' && json.Unmarshal([]byte(line), &e) == nil && e.Action != "" {
				s.event(e)
			} else {
				s.text(strings.TrimRight(line, "\r\n"))
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read test output: %w", err)
		}
	}
}

func (s *summary) event(e event) {
	t := test{e.Package, e.Test}
	switch e.Action {
	case "build-output":
		s.print(e.Output)
	case "build-fail":
		s.print("FAIL " + e.ImportPath + " [build failed]\n")
	case "output":
		if e.Test == "" && closing.MatchString(e.Output) {
			if !idle.MatchString(e.Output) {
				s.print(e.Output)
			}
			return
		}
		s.output[t] = append(s.output[t], e.Output)
	case "pass", "fail", "skip":
		if e.Test == "" {
			s.packageEnd(e)
		} else {
			s.testEnd(e)
		}
	}
}

// closing matches the last line that go test prints about a package.
var closing = regexp.MustCompile(`^(ok|FAIL|\?|panic:)\s`)

// idle matches the one of a package in which no test was selected.
var idle = regexp.MustCompile(`\[no tests? (to run|files)\]\s*$`)

func (s *summary) testEnd(e event) {
	t := test{e.Package, e.Test}
	top := !strings.Contains(e.Test, "/")
	if top {
		s.took = append(s.took, took{t, e.Elapsed})
	}
	switch e.Action {
	case "pass":
		if top {
			s.Passed++
		}
	case "fail":
		if top {
			s.Failed++
		}
		s.failed[e.Package] = true
		for _, line := range s.output[t] {
			if !strings.HasPrefix(line, "=== ") {
				s.print(line)
			}
		}
	case "skip":
		s.skip(e.Package, e.Test, reason(s.output[t]))
	}
	delete(s.output, t)
}

func (s *summary) packageEnd(e event) {
	t := test{e.Package, ""}
	if e.Action == "fail" {
		if !s.failed[e.Package] {
			s.Failed++
			for _, line := range s.output[t] {
				s.print(line)
			}
		}
		// What never ended was under way when the package died.
		for u, lines := range s.output {
			if u.pkg == e.Package && u.name != "" {
				s.print("unfinished: " + u.name + "\n" + strings.Join(lines, ""))
			}
		}
	}
	for u := range s.output {
		if u.pkg == e.Package {
			delete(s.output, u)
		}
	}
}

func (s *summary) skip(pkg, name, why string) {
	row := fmt.Sprintf("%s %s: %s", shorten(pkg), name, why)
	if strings.Contains(name, "/") {
		s.subs = append(s.subs, row)
		return
	}
	s.Skipped++
	s.Skips = append(s.Skips, row)
}

// module is the prefix of every package of ours, left out where it says nothing.
const module = "github.com/gmgate/gmgate/"

func shorten(pkg string) string { return strings.TrimPrefix(pkg, module) }

// logged matches a line that a test logged: "    file.go:12: text".
var logged = regexp.MustCompile(`^\s+\S+\.go:\d+: (.*)$`)

// reason is the last thing that a skipped test logged.
func reason(output []string) string {
	for _, line := range slices.Backward(output) {
		if m := logged.FindStringSubmatch(strings.TrimRight(line, "\n")); m != nil {
			return m[1]
		}
	}
	return "no reason given"
}

var (
	result  = regexp.MustCompile(`^(\s*)--- (PASS|FAIL|SKIP): (\S+) \(([0-9.]+)s\)`)
	section = regexp.MustCompile(`^--- ([A-Za-z0-9_./-]+)( .*)?$`)
)

// text digests a line of -test.v output. All but the passing is printed as it comes.
func (s *summary) text(line string) {
	if m := section.FindStringSubmatch(line); m != nil {
		s.section = m[1]
	}
	if m := logged.FindStringSubmatch(line); m != nil {
		s.reason = m[1]
	}
	m := result.FindStringSubmatch(line)
	if m == nil {
		if !strings.HasPrefix(line, "=== ") {
			s.print(line + "\n")
		}
		return
	}
	top := m[1] == ""
	if seconds, err := strconv.ParseFloat(m[4], 64); err == nil && top {
		s.took = append(s.took, took{test{s.section, m[3]}, seconds})
	}
	switch m[2] {
	case "PASS":
		if top {
			s.Passed++
		}
	case "FAIL":
		if top {
			s.Failed++
		}
		s.print(line + "\n")
	case "SKIP":
		why := s.reason
		if why == "" {
			why = "no reason given"
		}
		s.skip(s.section, m[3], why)
	}
	s.reason = ""
}

// What is worth saying of the slowest tests.
const (
	slow     = 5 // seconds
	slowRows = 12
)

// slowest are the tests to look at when a stage takes too long.
func (s *summary) slowest() []string {
	slices.SortStableFunc(s.took, func(a, b took) int { return cmp.Compare(b.seconds, a.seconds) })
	var rows []string
	for _, t := range s.took {
		if t.seconds < slow || len(rows) == slowRows {
			break
		}
		rows = append(rows, fmt.Sprintf("%6.1f s  %s %s", t.seconds, shorten(t.pkg), t.name))
	}
	return rows
}

func (s *summary) finish(name string) {
	for _, list := range []struct {
		title string
		rows  []string
	}{{"slowest:", s.slowest()}, {"skipped:", s.Skips}, {"skipped subtests (not counted):", s.subs}} {
		if len(list.rows) > 0 {
			s.print(list.title + "\n  " + strings.Join(list.rows, "\n  ") + "\n")
		}
	}
	s.print(fmt.Sprintf("%s: %s\n", name, s.Counts))
}

// String is the closing line.
func (c Counts) String() string {
	return fmt.Sprintf("%d passed, %d failed, %d skipped", c.Passed, c.Failed, c.Skipped)
}

func save(dir, name string, c Counts) error {
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return fmt.Errorf("keep counts: %w", err)
	}
	text, err := json.Marshal(c)
	if err != nil {
		return fmt.Errorf("keep counts: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, name+".json"), text, 0o600); err != nil {
		return fmt.Errorf("keep counts: %w", err)
	}
	return nil
}

// printTotal adds up the stages. ok is false when one failed or did not run.
func printTotal(out io.Writer, dir string, names []string, brief bool) (ok bool, err error) {
	var sum Counts
	ok = len(names) > 0
	for _, name := range names {
		text, err := os.ReadFile(filepath.Join(dir, name+".json"))
		if errors.Is(err, os.ErrNotExist) {
			ok = false
			_, _ = fmt.Fprintf(out, "%s: did not run to its end\n", name)
			continue
		}
		if err != nil {
			return false, fmt.Errorf("read counts: %w", err)
		}
		var c Counts
		if err := json.Unmarshal(text, &c); err != nil {
			return false, fmt.Errorf("read counts of %s: %w", name, err)
		}
		if !brief {
			for _, s := range c.Skips {
				_, _ = fmt.Fprintf(out, "skipped in %s: %s\n", name, s)
			}
			_, _ = fmt.Fprintf(out, "%s: %s\n", name, c)
		}
		sum.Passed += c.Passed
		sum.Failed += c.Failed
		sum.Skipped += c.Skipped
	}
	_, _ = fmt.Fprintln(out, sum)
	return ok && sum.Failed == 0, nil
}
