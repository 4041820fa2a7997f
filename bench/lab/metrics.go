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
series:
	for key, v := range m {
		base, rest, _ := strings.Cut(key, "{")
		if base != name {
			continue
		}
		rest = "," + strings.TrimSuffix(rest, "}") + ","
		for _, l := range labels {
			if !strings.Contains(rest, ","+l+",") {
				continue series
			}
		}
		total += v
	}
	return total
}
