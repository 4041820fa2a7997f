// Package observetest reads metrics for tests of the packages that count.
package observetest

import (
	"fmt"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/gmgate/gmgate/control/observe"
)

// Value returns the value of one counter or gauge: name comes without the namespace, labels as "name=value", sorted by
// name and separated by commas. It ends the test when there is no such series.
func Value(t testing.TB, m *observe.Metrics, name, labels string) float64 {
	t.Helper()
	r := prometheus.NewRegistry()
	if err := m.Register(r); err != nil {
		t.Fatal(err)
	}
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != observe.Namespace+"_"+name {
			continue
		}
		for _, s := range f.GetMetric() {
			pairs := make([]string, 0, len(s.GetLabel()))
			for _, l := range s.GetLabel() {
				pairs = append(pairs, fmt.Sprintf("%s=%s", l.GetName(), l.GetValue()))
			}
			if strings.Join(pairs, ",") == labels {
				return s.GetCounter().GetValue() + s.GetGauge().GetValue()
			}
		}
	}
	t.Fatalf("no metric %s{%s}", name, labels)
	return 0
}
