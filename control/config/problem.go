package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Problem is one fault of a configuration.
type Problem struct {
	File         string // empty when the configuration was put together in code
	Line, Column int    // from 1; zero when there is no file
	Path         string // such as gm.server_ports[1]; empty when the file is not YAML
	Text         string // what is wrong
	Hint         string // what to do about it, may be empty
}

// String prints the problem as compilers do: file:line:column: path: text (hint).
func (p Problem) String() string {
	var b strings.Builder
	if p.File != "" {
		b.WriteString(p.File + ":")
	}
	if p.Line > 0 {
		fmt.Fprintf(&b, "%d:%d:", p.Line, p.Column)
	}
	if b.Len() > 0 {
		b.WriteByte(' ')
	}
	if p.Path != "" {
		b.WriteString(p.Path + ": ")
	}
	b.WriteString(p.Text)
	if p.Hint != "" {
		b.WriteString(" (" + p.Hint + ")")
	}
	return b.String()
}

// Errors are all problems of a configuration, in the order of lines.
type Errors []Problem

// Error prints one problem per line.
func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i, p := range e {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// position is a place in the file.
type position struct{ line, column int }

// report collects problems and knows where each path stands in the file.
type report struct {
	file     string
	problems Errors
	at       map[string]position
	index    map[string][]int // list path → index in the file of each element that was taken over
	failed   map[string]bool  // paths whose value could not be read: rules about them would only confuse
}

func newReport(file string) *report {
	return &report{file: file, at: map[string]position{}, index: map[string][]int{}, failed: map[string]bool{}}
}

// add reports a problem at path, or where the nearest parent stands.
func (r *report) add(path, text, hint string) {
	p := Problem{File: r.file, Path: path, Text: text, Hint: hint}
	for at := path; ; {
		if pos, ok := r.at[at]; ok {
			p.Line, p.Column = pos.line, pos.column
			break
		}
		if at == "" {
			break
		}
		at = at[:max(strings.LastIndexAny(at, ".["), 0)]
	}
	r.problems = append(r.problems, p)
}

func (r *report) addf(path, format string, args ...any) {
	r.add(path, fmt.Sprintf(format, args...), "")
}

// fail reports that the value at path could not be read.
func (r *report) fail(path, text, hint string) {
	r.failed[path] = true
	r.add(path, text, hint)
}

// element returns the path of the i-th element of a list as it stands in the configuration. Elements of the file that
// could not be read are not in the configuration, so the indices may differ.
func (r *report) element(list string, i int) string {
	if in, ok := r.index[list]; ok && i < len(in) {
		i = in[i]
	}
	return fmt.Sprintf("%s[%d]", list, i)
}

// err returns the sorted problems, or nil.
func (r *report) err() error {
	if len(r.problems) == 0 {
		return nil
	}
	slices.SortStableFunc(r.problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	return r.problems
}
