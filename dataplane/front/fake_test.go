package front_test

import (
	"reflect"
	"testing"

	"github.com/gmgate/gmgate/dataplane/front"
	"github.com/gmgate/gmgate/dataplane/front/fronttest"
)

// TestFake: the stand-in has every method of the real worker, with the same signature, and the real handler is one of
// the stand-in's.
func TestFake(t *testing.T) {
	var _ fronttest.Handler = front.Handler(nil)
	worker, fake := reflect.TypeFor[*front.Worker](), reflect.TypeFor[*fronttest.Worker]()
	if worker.NumMethod() == 0 {
		t.Fatal("no methods")
	}
	for m := range worker.Methods() {
		f, ok := fake.MethodByName(m.Name)
		if !ok {
			t.Errorf("%s is missing", m.Name)
			continue
		}
		same := m.Type.NumIn() == f.Type.NumIn() && m.Type.NumOut() == f.Type.NumOut()
		for i := 1; same && i < m.Type.NumIn(); i++ {
			same = m.Type.In(i) == f.Type.In(i)
		}
		for i := 0; same && i < m.Type.NumOut(); i++ {
			same = m.Type.Out(i) == f.Type.Out(i)
		}
		if !same {
			t.Errorf("%s is %v, want %v", m.Name, f.Type, m.Type)
		}
	}
}
