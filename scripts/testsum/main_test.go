package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// lines makes the output of go test -json.
func lines(events ...string) string { return strings.Join(events, "\n") + "\n" }

func ev(action, pkg, test, output string) string {
	s := fmt.Sprintf(`{"Time":"2030-01-01T00:00:00Z","Action":%q`, action)
	if pkg != "" {
		s += fmt.Sprintf(`,"Package":%q`, pkg)
	}
	if test != "" {
		s += fmt.Sprintf(`,"Test":%q`, test)
	}
	if output != "" {
		s += fmt.Sprintf(`,"Output":%q`, output)
	}
	return s + "}"
}

const p = module + "control/x"

func TestRun(t *testing.T) {
	tests := []struct {
		name, in, want string
		code           int
	}{
		{
			"passing is quiet",
			lines(
				ev("start", p, "", ""),
				ev("run", p, "TestA", ""),
				ev("output", p, "TestA", "=== RUN   TestA\n"),
				ev("output", p, "TestA", "    a_test.go:5: chatter\n"),
				ev("pass", p, "TestA/sub", ""),
				ev("pass", p, "TestA", ""),
				ev("output", p, "", "PASS\n"),
				ev("output", p, "", "ok  \tgithub.com/gmgate/gmgate/control/x\t0.1s\n"),
				ev("pass", p, "", ""),
				ev("output", "other", "", "ok  \tother\t0.1s [no tests to run]\n"),
				ev("pass", "other", "", ""),
			),
			"ok  \tgithub.com/gmgate/gmgate/control/x\t0.1s\nunit: 1 passed, 0 failed, 0 skipped\n", 0,
		},
		{
			"failure keeps its output, also of the subtest",
			lines(
				ev("output", p, "TestA", "=== RUN   TestA\n"),
				ev("output", p, "TestA/sub", "=== RUN   TestA/sub\n"),
				ev("output", p, "TestA/sub", "    a_test.go:7: got 1, want 2\n"),
				ev("output", p, "TestA/sub", "    --- FAIL: TestA/sub (0.00s)\n"),
				ev("fail", p, "TestA/sub", ""),
				ev("output", p, "TestA", "--- FAIL: TestA (0.00s)\n"),
				ev("fail", p, "TestA", ""),
				ev("pass", p, "TestB", ""),
				ev("output", p, "", "FAIL\n"),
				ev("output", p, "", "FAIL\tgithub.com/gmgate/gmgate/control/x\t0.1s\n"),
				ev("fail", p, "", ""),
			),
			"    a_test.go:7: got 1, want 2\n    --- FAIL: TestA/sub (0.00s)\n--- FAIL: TestA (0.00s)\n" +
				"FAIL\n" + "FAIL\tgithub.com/gmgate/gmgate/control/x\t0.1s\nunit: 1 passed, 1 failed, 0 skipped\n", 1,
		},
		{
			"skips with reasons",
			lines(
				ev("output", p, "TestA", "    a_test.go:7: needs root\n"),
				ev("output", p, "TestA", "--- SKIP: TestA (0.00s)\n"),
				ev("skip", p, "TestA", ""),
				ev("skip", p, "TestB", ""),
				ev("output", p, "TestC/v6", "        a_test.go:9: no IPv6 here\n"),
				ev("skip", p, "TestC/v6", ""),
				ev("pass", p, "TestC", ""),
				ev("pass", p, "", ""),
			),
			"skipped:\n  control/x TestA: needs root\n  control/x TestB: no reason given\n" +
				"skipped subtests (not counted):\n  control/x TestC/v6: no IPv6 here\nunit: 1 passed, 0 failed, 2 skipped\n", 0,
		},
		{
			"a package that does not build",
			lines(
				`{"ImportPath":"control/y","Action":"build-output","Output":"y.go:3: undefined: z\n"}`,
				`{"ImportPath":"control/y","Action":"build-fail"}`,
				ev("output", p, "", "FAIL\tcontrol/y [build failed]\n"),
				ev("fail", p, "", ""),
				ev("pass", "other", "TestB", ""),
			),
			"y.go:3: undefined: z\nFAIL control/y [build failed]\nFAIL\tcontrol/y [build failed]\nunit: 1 passed, 1 failed, 0 skipped\n", 1,
		},
		{
			"a package that dies",
			lines(
				ev("output", p, "TestA", "working\n"),
				ev("output", p, "", "exit status 2\n"),
				ev("fail", p, "", ""),
				ev("pass", "other", "TestB", ""),
			),
			"exit status 2\nunfinished: TestA\nworking\nunit: 1 passed, 1 failed, 0 skipped\n", 1,
		},
		{
			"what is slow is named, the slowest first",
			lines(
				`{"Action":"pass","Package":"`+p+`","Test":"TestA","Elapsed":5.5}`,
				`{"Action":"pass","Package":"`+p+`","Test":"TestB/sub","Elapsed":50}`,
				`{"Action":"pass","Package":"`+p+`","Test":"TestB","Elapsed":4.9}`,
				"--- bench/e2e GMGATE_E2E_SLOW=1",
				"    --- PASS: TestC/sub (99.00s)",
				"--- PASS: TestC (12.34s)",
			),
			"--- bench/e2e GMGATE_E2E_SLOW=1\nslowest:\n    12.3 s  bench/e2e TestC\n     5.5 s  control/x TestA\n" +
				"unit: 3 passed, 0 failed, 0 skipped\n", 0,
		},
		{"nothing ran", lines(ev("pass", p, "", "")), "unit: 0 passed, 0 failed, 0 skipped\n", 1},
		{
			"text of a guest",
			"booting\r\n--- dataplane/xfrm\n=== RUN   TestA\n    a_test.go:3: chatter\n--- PASS: TestA (0.1s)\n    --- PASS: TestA/sub (0.1s)\n" +
				"--- SKIP: TestQuiet (0.00s)\n" +
				"    b_test.go:5: no such algorithm\n--- SKIP: TestB (0.00s)\n    c_test.go:8: broken\n--- FAIL: TestC (0.00s)\nFAIL\ndone",
			"booting\n--- dataplane/xfrm\n    a_test.go:3: chatter\n    b_test.go:5: no such algorithm\n    c_test.go:8: broken\n" +
				"--- FAIL: TestC (0.00s)\nFAIL\ndone\nskipped:\n  dataplane/xfrm TestQuiet: no reason given\n" +
				"  dataplane/xfrm TestB: no such algorithm\nunit: 1 passed, 1 failed, 2 skipped\n", 1,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out, errw bytes.Buffer
			if code := run([]string{"unit"}, strings.NewReader(tt.in), &out, &errw); code != tt.code {
				t.Errorf("exit status %d, want %d; %s", code, tt.code, &errw)
			}
			if diff := cmp.Diff(tt.want, out.String()); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestTotal(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "results")
	stage := func(name string, events ...string) {
		t.Helper()
		var out, errw bytes.Buffer
		if run([]string{"-results", dir, name}, strings.NewReader(lines(events...)), &out, &errw); errw.Len() > 0 {
			t.Fatal(errw.String())
		}
	}
	total := func(args ...string) (string, int) {
		var out, errw bytes.Buffer
		code := run(append([]string{"-results", dir, "-total"}, args...), nil, &out, &errw)
		return out.String() + errw.String(), code
	}
	stage("unit", ev("pass", p, "TestA", ""), ev("pass", p, "TestB", ""))
	stage("vm", ev("pass", p, "TestV", ""), ev("skip", p, "TestW", ""))

	got, code := total("unit", "vm")
	want := "unit: 2 passed, 0 failed, 0 skipped\nskipped in vm: control/x TestW: no reason given\n" +
		"vm: 1 passed, 0 failed, 1 skipped\n3 passed, 0 failed, 1 skipped\n"
	if got != want || code != 0 {
		t.Errorf("got %q, %d; want %q", got, code, want)
	}
	if got, code := total("-brief", "unit", "vm"); got != "3 passed, 0 failed, 1 skipped\n" || code != 0 {
		t.Errorf("brief: %q, %d", got, code)
	}
	if got, code := total("-brief", "unit", "netns"); got != "netns: did not run to its end\n2 passed, 0 failed, 0 skipped\n" || code != 1 {
		t.Errorf("missing stage: %q, %d", got, code)
	}
	stage("netns", ev("fail", p, "TestN", ""))
	if got, code := total("-brief", "unit", "netns"); got != "2 passed, 1 failed, 0 skipped\n" || code != 1 {
		t.Errorf("failed stage: %q, %d", got, code)
	}
	if err := os.WriteFile(filepath.Join(dir, "unit.json"), []byte("no"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, code := total("unit"); code != 1 || !strings.Contains(got, "read counts of unit") {
		t.Errorf("broken counts: %q, %d", got, code)
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{{}, {"a", "b"}, {"-nonsense"}} {
		var out, errw bytes.Buffer
		if code := run(args, strings.NewReader(""), &out, &errw); code != 2 || errw.Len() == 0 {
			t.Errorf("%v: exit status %d, %q", args, code, &errw)
		}
	}
}
