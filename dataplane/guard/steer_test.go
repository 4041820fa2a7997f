package guard

import "testing"

func TestTmp(t *testing.T) {
	s, err := OpenSteering(2, 10)
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
}
