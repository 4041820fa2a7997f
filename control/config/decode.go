package config

import (
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// Implementation constants.
const (
	maxFile  = 256 << 10 // a hundred times what a real file needs
	maxDepth = 32        // of brackets within one another: the YAML parser recurses
)

// readLimited reads a configuration file.
func readLimited(r io.Reader) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(r, maxFile+1))
	if err == nil && len(text) > maxFile {
		err = fmt.Errorf("longer than %d bytes", maxFile)
	}
	return text, err
}

// Parse reads a configuration. The name stands in front of every problem. The error is Errors.
func Parse(text []byte, name string) (*Config, error) {
	r := newReport(name)
	r.at[""] = position{1, 1}
	c := Default()
	root, ok := parseYAML(r, text)
	if !ok {
		return nil, r.err()
	}
	d := decoder{report: r, config: c}
	d.section("", schema(), root)
	c.resolve()
	c.check(r)
	if err := r.err(); err != nil {
		return nil, err
	}
	return c, nil
}

// parseYAML returns the top-level node of the only document, nil if that is empty.
func parseYAML(r *report, text []byte) (root ast.Node, ok bool) {
	if len(text) > maxFile {
		r.add("", fmt.Sprintf("the file is longer than %d bytes", maxFile), "")
		return nil, false
	}
	if tooDeep(text) {
		r.add("", fmt.Sprintf("more than %d brackets within one another", maxDepth), "")
		return nil, false
	}
	// The parser is meant for friendly files: whatever else it does to a broken one, the daemon lives.
	defer func() {
		if p := recover(); p != nil {
			r.add("", "the file is not YAML", "")
			root, ok = nil, false
		}
	}()
	file, err := parser.ParseBytes(text, 0, parser.AllowDuplicateMapKey()) // duplicates are reported with all the rest
	if err != nil {
		p := Problem{File: r.file, Line: 1, Column: 1, Text: err.Error()}
		if y, ok := errors.AsType[yaml.Error](err); ok {
			p.Text = y.GetMessage()
			if t := y.GetToken(); t != nil && t.Position != nil {
				p.Line, p.Column = t.Position.Line, t.Position.Column
			}
		}
		p.Text = "not YAML: " + p.Text
		r.problems = append(r.problems, p)
		return nil, false
	}
	for _, doc := range file.Docs {
		if doc.Body == nil {
			continue
		}
		if root != nil {
			pos := positionOf(doc.Body)
			r.problems = append(r.problems, Problem{
				File: r.file, Line: pos.line, Column: pos.column, Text: "a second YAML document", Hint: "one file is one configuration",
			})
			break
		}
		root = doc.Body
	}
	return root, true
}

// tooDeep guards against stack exhaustion, which cannot be recovered from. It counts brackets in text and comments as
// well, which no real file has that many of.
func tooDeep(text []byte) bool {
	depth := 0
	for _, b := range text {
		switch b {
		case '[', '{':
			if depth++; depth > maxDepth {
				return true
			}
		case ']', '}':
			depth = max(depth-1, 0)
		}
	}
	return false
}

func positionOf(n ast.Node) position {
	// The token of a block mapping is the colon after its first key.
	if m, ok := n.(*ast.MappingNode); ok && !m.IsFlowStyle && len(m.Values) > 0 {
		n = m.Values[0].Key
	}
	if m, ok := n.(*ast.MappingValueNode); ok {
		n = m.Key
	}
	if t := n.GetToken(); t != nil && t.Position != nil {
		return position{t.Position.Line, t.Position.Column}
	}
	return position{1, 1}
}

// decoder walks the syntax tree along the schema.
type decoder struct {
	*report
	config *Config
}

// entry is one key of a mapping.
type entry struct {
	key   string
	path  string
	value ast.Node
}

// entries returns the keys of a mapping. Keys that are not plain text and second appearances are reported and left out.
func (d *decoder) entries(path string, n ast.Node) ([]entry, bool) {
	var values []*ast.MappingValueNode
	switch n := n.(type) {
	case *ast.MappingNode:
		values = n.Values
	case *ast.MappingValueNode:
		values = []*ast.MappingValueNode{n}
	default:
		d.fail(path, "expected a section with keys, got "+kindOf(n), "")
		return nil, false
	}
	var list []entry
	first := map[string]position{}
	for _, v := range values {
		at := positionOf(v.Key)
		key := v.Key.GetToken().Value
		sub := join(path, key)
		if !plainText.MatchString(key) {
			sub = join(path, strconv.Quote(key)) // a path is one line, whatever the file contains
		}
		if _, ok := v.Key.(*ast.StringNode); !ok {
			d.at[sub] = at
			d.add(sub, "not a key", "keys are plain words; anchors, aliases and merges are not supported")
			continue
		}
		if before, ok := first[key]; ok {
			d.problems = append(d.problems, Problem{
				File: d.file, Line: at.line, Column: at.column, Path: sub,
				Text: fmt.Sprintf("duplicate key, first on line %d", before.line),
			})
			continue
		}
		first[key] = at
		d.at[sub] = at
		list = append(list, entry{key: key, path: sub, value: v.Value})
	}
	return list, true
}

// section reads a mapping whose keys are the given fields. A section without anything in it is fine: that is what
// remains when all its lines are commented out.
func (d *decoder) section(path string, fields []field, n ast.Node) {
	if n == nil || n.Type() == ast.NullType {
		return
	}
	list, ok := d.entries(path, n)
	if !ok {
		return
	}
	for _, e := range list {
		f, sub := lookup(fields, e.key), e.path
		switch {
		case f == nil:
			d.add(sub, "unknown key", suggest(path, fields, e.key))
		case f.sub != nil:
			d.section(sub, f.sub, e.value)
		case e.value == nil || e.value.Type() == ast.NullType:
			d.fail(sub, "no value", "leave the key out to get the default")
		default:
			if !f.many { // lists and tables are reported where the key is, their elements where they are
				d.at[sub] = positionOf(e.value)
			}
			f.read(d, sub, e.value)
		}
	}
}

// elements calls f for each element of a list with its path, in order. f reports whether it took the element over.
func (d *decoder) elements(path string, n ast.Node, f func(path string, n ast.Node) bool) bool {
	seq, ok := n.(*ast.SequenceNode)
	if !ok {
		d.fail(path, "expected a list, got "+kindOf(n), "write [first, second]")
		return false
	}
	d.index[path] = []int{}
	for i, v := range seq.Values {
		sub := fmt.Sprintf("%s[%d]", path, i)
		d.at[sub] = positionOf(v)
		if v.Type() == ast.NullType {
			d.fail(sub, "no value", "")
			d.failed[path] = true
			continue
		}
		if f(sub, v) {
			d.index[path] = append(d.index[path], i)
		} else {
			d.failed[path] = true
		}
	}
	return true
}

// text reads a scalar that is text.
func (d *decoder) text(path string, n ast.Node, what string) (string, bool) {
	s, ok := n.(*ast.StringNode)
	if !ok {
		hint := ""
		switch n.(type) {
		case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode:
			hint = "put it in quotes"
		}
		d.fail(path, fmt.Sprintf("expected %s, got %s", what, kindOf(n)), hint)
		return "", false
	}
	return s.Value, true
}

// YAML 1.1 and 1.2 differ on 010 and 1_000, so only what everybody reads alike is a number.
var number = regexp.MustCompile(`^-?(0|[1-9][0-9]*|0x[0-9a-fA-F]+)$`)

// integer reads a whole number within the bounds.
func (d *decoder) integer(path string, n ast.Node, lowest, highest int64) (int64, bool) {
	s := n.GetToken().Value
	_, isText := n.(*ast.StringNode)
	_, isInteger := n.(*ast.IntegerNode)
	isInteger = isInteger || isText && !isQuoted(n) // the parser takes what exceeds 64 bits for text
	if !isInteger || !number.MatchString(s) {
		hint := ""
		if isText && number.MatchString(s) {
			hint = "take off the quotes"
		}
		d.fail(path, "expected a whole number, got "+kindOf(n), hint)
		return 0, false
	}
	v, err := strconv.ParseInt(s, 0, 64)
	if err != nil || v < lowest || v > highest {
		d.fail(path, outOfRange(s, lowest, highest), "")
		return 0, false
	}
	return v, true
}

func outOfRange(got any, lowest, highest int64) string {
	return fmt.Sprintf("%v is out of range, allowed are %d to %d", got, lowest, highest)
}

// boolean reads true or false.
func (d *decoder) boolean(path string, n ast.Node) (v, ok bool) {
	b, ok := n.(*ast.BoolNode)
	if !ok {
		d.fail(path, "expected true or false, got "+kindOf(n), "")
		return false, false
	}
	return b.Value, true
}

// duration reads a duration in Go's notation, or the number 0.
func (d *decoder) duration(path string, n ast.Node) (time.Duration, bool) {
	switch n := n.(type) {
	case *ast.IntegerNode:
		if n.GetToken().Value == "0" {
			return 0, true
		}
		d.fail(path, fmt.Sprintf("duration %s has no unit", n.GetToken().Value), "write "+n.GetToken().Value+"s for seconds")
		return 0, false
	case *ast.StringNode:
		v, err := time.ParseDuration(n.Value)
		if err != nil {
			d.fail(path, fmt.Sprintf("%q is not a duration", n.Value), "such as 500ms, 30s, 4m or 1h30m")
			return 0, false
		}
		return v, true
	}
	d.fail(path, "expected a duration, got "+kindOf(n), "such as 500ms, 30s, 4m or 1h30m")
	return 0, false
}

func isQuoted(n ast.Node) bool {
	t := n.GetToken().Type
	return t == token.SingleQuoteType || t == token.DoubleQuoteType
}

// kindOf says what a node is in the words of somebody who writes YAML.
func kindOf(n ast.Node) string {
	switch n := n.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a section"
	case *ast.SequenceNode:
		return "a list"
	case *ast.StringNode:
		if isQuoted(n) {
			return fmt.Sprintf("the text %q", n.Value)
		}
		return strconv.Quote(n.Value)
	case *ast.NullNode:
		return "nothing"
	case *ast.BoolNode, *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		return n.GetToken().Value
	case *ast.LiteralNode:
		return "a block of text"
	case *ast.AnchorNode, *ast.AliasNode:
		return "an anchor or alias, which is not supported"
	case *ast.TagNode:
		return "a tag, which is not supported"
	}
	return "something else"
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

// suggest guesses which key was meant.
func suggest(path string, fields []field, key string) string {
	best, distance := "", 3 // more than two edits are no typing error
	for _, f := range fields {
		if n := editDistance(strings.ToLower(key), f.key); n < distance && n < len(f.key) {
			best, distance = f.key, n
		}
	}
	if best != "" {
		return "did you mean " + best + "?"
	}
	var elsewhere string
	walk("", schema(), func(p string, f *field) {
		if f.key == key && p != join(path, key) && elsewhere == "" {
			elsewhere = p
		}
	})
	if elsewhere != "" {
		return "did you mean " + elsewhere + "?"
	}
	return ""
}

// editDistance is Levenshtein's, with a swap of neighbours counted as one.
func editDistance(a, b string) int {
	rows := [3][]int{make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)}
	for j := range rows[1] {
		rows[1][j] = j
	}
	for i := range len(a) {
		before, last, row := rows[0], rows[1], rows[2]
		row[0] = i + 1
		for j := range len(b) {
			change := last[j]
			if a[i] != b[j] {
				change++
			}
			row[j+1] = min(last[j+1]+1, row[j]+1, change)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], before[j-1]+1)
			}
		}
		rows[0], rows[1], rows[2] = last, row, before
	}
	return rows[1][len(b)]
}
