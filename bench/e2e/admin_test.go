package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/gmgate/gmgate/bench/ue"
)

// shownUE is what these tests read of the JSON of `gmgate ue`.
type shownUE struct {
	ID, IMPI, Address, State, Contact, Current string
	Identities                                 []string
	Sets                                       []struct {
		ID, Phase, Role, Algorithms, Over string
		SPIs, Ports                       struct{ UC, US, PC, PS uint32 }
	}
}

// operate runs `gmgate ue` as an operator does, and reads what it prints.
func (f *fixture) operate(ctx context.Context, t *testing.T, args ...string) ([]shownUE, error) {
	t.Helper()
	args = append(append([]string{"ue"}, args...), "--json", "--socket", f.lab.AdminSocket())
	out, err := exec.CommandContext(ctx, binary(t), args...).Output() //nolint:gosec // the tests' own words
	if err != nil {
		if e, ok := errors.AsType[*exec.ExitError](err); ok {
			err = fmt.Errorf("%w: %s", err, e.Stderr)
		}
		return nil, err
	}
	var list []shownUE
	if err := json.Unmarshal(out, &list); err != nil {
		t.Fatalf("gmgate %v printed %q: %v", args, out, err)
	}
	return list, nil
}

// TestOperator looks at eight phones and ends the registration of one: it is refused afterwards, its SAs go, and the
// others know nothing of it.
//
// Peers: A1.35, B1.01, B4.06
func TestOperator(t *testing.T) {
	f := start(t, fixtureConfig{})
	ctx := timed(t)
	const phones = 8
	var all []*ue.UE
	results := map[string]ue.Result{} // by IMPI
	for i := range phones {
		u := f.newUE(t)
		results[f.subs[i].IMPI] = f.mustRegister(ctx, t, u)
		all = append(all, u)
	}

	ctx = timed(t)
	list, err := f.operate(ctx, t, "list")
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != phones {
		t.Errorf("%d phones are listed, want %d", len(list), phones)
	}
	for _, u := range list {
		r := results[u.IMPI]
		if u.State != "registered" || len(u.Sets) != 1 || u.Identities[0] != r.AssociatedURI[0] {
			t.Errorf("listed: %+v, the phone has %+v", u, r)
			continue
		}
		s := u.Sets[0]
		agreed := [4]uint32{uint32(r.SPIs.UC), uint32(r.SPIs.US), uint32(r.SPIs.PC), uint32(r.SPIs.PS)}
		ports := [4]uint32{uint32(r.Ports.UC), uint32(r.Ports.US), uint32(r.Ports.PC), uint32(r.Ports.PS)}
		if s.Phase != "established" || s.ID != u.Current || s.Algorithms != r.Suite.String() || s.Over != "" ||
			[4]uint32{s.SPIs.UC, s.SPIs.US, s.SPIs.PC, s.SPIs.PS} != agreed ||
			[4]uint32{s.Ports.UC, s.Ports.US, s.Ports.PC, s.Ports.PS} != ports {
			t.Errorf("set %+v of %s, agreed were %v and %v", s, u.IMPI, agreed, ports)
		}
	}

	gone := f.subs[3]
	impu := gone.IMPU[0]
	if shown, err := f.operate(ctx, t, "show", impu); err != nil || len(shown) != 1 || shown[0].IMPI != gone.IMPI {
		t.Errorf("show %s: %+v, %v", impu, shown, err)
	}
	if ended, err := f.operate(ctx, t, "deregister", impu); err != nil || len(ended) != 1 || ended[0].IMPI != gone.IMPI ||
		ended[0].State != "deregistered" || ended[0].Sets[0].Role != "ending" {
		t.Fatalf("deregister %s: %+v, %v", impu, ended, err)
	}
	if status, err := all[3].Message(ctx, f.subs[4].IMPU[0], "still here?"); status != 403 {
		t.Errorf("a MESSAGE of the phone that was ended: %d, %v; want 403", status, err)
	}
	if status, err := f.core.SendMessage(ctx, impu, "are you there?"); err == nil && status < 400 {
		t.Errorf("a MESSAGE to the phone that was ended: %d", status)
	}
	if _, err := f.operate(ctx, t, "deregister", impu); err == nil || !strings.Contains(err.Error(), "no registration matches") {
		t.Errorf("once more: %v", err)
	}
	ctx = timed(t)
	for i := range phones {
		if next := (i + 1) % phones; i != 3 && next != 3 {
			if res, err := all[i].Call(ctx, f.subs[next].IMPU[0], ue.CallOptions{PRACK: true}); err != nil || res.Status != 200 {
				t.Errorf("call of phone %d: %d, %v", i+1, res.Status, err)
			}
		}
	}
	if !eventually(ctx, f.drain, func() bool { return f.metric(ctx, t, "esp_sas") == 4*(phones-1) }) {
		t.Errorf("%g SAs are left, want those of %d phones", f.metric(ctx, t, "esp_sas"), phones-1)
	}
	if list, err = f.operate(ctx, t, "list"); err != nil || len(list) != phones-1 {
		t.Errorf("%d phones are listed, %v; want %d", len(list), err, phones-1)
	}

	ctx = timed(t)
	// The phone comes back as one that starts anew, and leaves by its contact.
	all[3].Reboot()
	back := f.mustRegister(ctx, t, all[3])
	contact := fmt.Sprintf("%s:%d", f.lab.Plan().UE(3), back.Ports.US)
	if ended, err := f.operate(ctx, t, "deregister", "--contact", contact); err != nil || len(ended) != 1 || ended[0].IMPI != gone.IMPI {
		t.Errorf("deregister --contact %s: %+v, %v", contact, ended, err)
	}
	ctx = timed(t)
	for i, u := range all {
		if i != 3 {
			if err := u.Deregister(ctx); err != nil {
				t.Error(err)
			}
		}
	}
	f.wantNoSets(ctx, t)
}
