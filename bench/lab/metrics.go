package lab

import (
	"bufio"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// ParseMetrics reads the Prometheus text format into values keyed `name{labels}` as they stand in the text. Timestamps
// are not expected, comments are skipped.
func ParseMetrics(r io.Reader) (map[string]float64, error) {
	m := make(map[string]float64)
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 0, 64<<10), 1<<20)
	for s.Scan() {
		line := strings.TrimSpace(s.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		// A label value may hold spaces, so the value is what follows the last one.
		cut := strings.LastIndexByte(line, ' ')
		if cut < 0 {
			return nil, fmt.Errorf("read metrics: no value in %q", line)
		}
		v, err := strconv.ParseFloat(line[cut+1:], 64)
		if err != nil {
			return nil, fmt.Errorf("read metrics: value in %q: %w", line, err)
		}
		m[line[:cut]] = v
	}
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("read metrics: %w", err)
	}
	return m, nil
}

// Sum adds up every series of a metric that carries all the given labels, each written `name="value"`.
func Sum(m map[string]float64, name string, labels ...string) float64 {
	total := 0.0
	for key, v := range m {
		if _, ok := carries(key, name, labels); ok {
			total += v
		}
	}
	return total
}

// By does the same for each value of a label, the series without it left out.
func By(m map[string]float64, name, label string, labels ...string) map[string]float64 {
	out := map[string]float64{}
	for key, v := range m {
		rest, ok := carries(key, name, labels)
		if !ok {
			continue
		}
		if _, value, ok := strings.Cut(rest, ","+label+`="`); ok {
			value, _, _ = strings.Cut(value, `",`)
			out[value] += v
		}
	}
	return out
}

// carries reports whether a series is of a metric and has all the labels, and returns those that it has with a comma on
// either side of each.
func carries(key, name string, labels []string) (all string, ok bool) {
	base, rest, _ := strings.Cut(key, "{")
	if base != name {
		return "", false
	}
	rest = "," + strings.TrimSuffix(rest, "}") + ","
	for _, l := range labels {
		if !strings.Contains(rest, ","+l+",") {
			return "", false
		}
	}
	return rest, true
}
