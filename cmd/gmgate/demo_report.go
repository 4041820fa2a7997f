package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/gmgate/gmgate/bench/core"
	"github.com/gmgate/gmgate/bench/lab"
	"github.com/gmgate/gmgate/bench/ue"
	"github.com/gmgate/gmgate/control/admin"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/dataplane/guard"
)

// registrationLadder puts the registration of a phone together from what was observed: the tap sees the clear messages
// and the ESP packets, the core its own side. Only the core's answers have no time of their own.
func (d *demo) registrationLadder(p *phone, began time.Time) []rung {
	at := func(t time.Time) string { return millis(t.Sub(began)) }
	r := p.last
	end := func(a netip.Addr, port uint16) string { return netip.AddrPortFrom(a, port).String() }
	uc, us := end(p.addr, r.Ports.UC), end(p.addr, r.Ports.US)
	pc, ps := end(d.plan.Gm, r.Ports.PC), end(d.plan.Gm, r.Ports.PS)
	var clearUp, clearDown lab.ClearSIP
	for _, m := range d.capture.Clear() {
		switch {
		case m.Src.Addr() == p.addr && clearUp.Time.IsZero():
			clearUp = m
		case m.Dst.Addr() == p.addr && m.Status == 401:
			clearDown = m
		}
	}
	var seen []core.Seen
	for _, s := range d.core.Log() {
		if s.Method == "REGISTER" && s.Status == 0 && s.IMPI == p.sub.IMPI {
			seen = append(seen, s)
		}
	}
	var sm7, sm12 lab.ESPFrame
	byTCP := false
	for _, f := range d.capture.Frames() {
		switch {
		case f.SPI == r.SPIs.PS && f.Src == p.addr && sm7.Time.IsZero():
			sm7 = f
		case (f.SPI == r.SPIs.US || f.SPI == r.SPIs.UC) && f.Dst == p.addr && (sm12.Time.IsZero() || f.Len > 200):
			sm12 = f
			byTCP = f.SPI == r.SPIs.UC
		}
	}
	rungs := []rung{{"SM1", clearUp.Src.String(), "REGISTER", clearUp.Dst.String(), "clear " + clearUp.Transport.String(), at(clearUp.Time)}}
	coreSide := func(request, reply string, s core.Seen, answer string) {
		rungs = append(rungs,
			rung{request, s.Source.String(), "REGISTER", d.core.Addr().String(), "Mw " + s.Transport.String(), at(s.At)},
			rung{reply, d.core.Addr().String(), answer, s.Source.String(), "Mw " + s.Transport.String(), ""})
	}
	if len(seen) > 0 {
		coreSide("SM2/3", "SM4/5", seen[0], "401 + CK, IK")
	}
	rungs = append(rungs,
		rung{"SM6", clearDown.Src.String(), "401", clearDown.Dst.String(), "clear " + clearDown.Transport.String(), at(clearDown.Time)},
		rung{"SM7", uc, "REGISTER", ps, fmt.Sprintf("ESP %s", sm7.SPI), at(sm7.Time)})
	if len(seen) > 1 {
		coreSide("SM8/9", "SM10/11", seen[len(seen)-1], "200")
	}
	last := rung{"SM12", pc, "200 OK", us, fmt.Sprintf("ESP %s", sm12.SPI), at(sm12.Time)}
	if byTCP {
		last.from, last.to = ps, uc
	}
	return append(rungs, last)
}

// setTable describes the four SAs of a set (TS 33.203 §7.1).
func setTable(r ue.Result) [][]string {
	row := func(sa, from, to string, fp, tp uint16, spi ims.SPI, carries string) []string {
		return []string{sa, fmt.Sprintf("%s %d → %s %d", from, fp, to, tp), spi.String(), carries}
	}
	return [][]string{
		{"SA", "ports", "SPI", "carries"},
		row("A in", "port-uc", "port-ps", r.Ports.UC, r.Ports.PS, r.SPIs.PS, "all UDP of the phone, its TCP"),
		row("B in", "port-us", "port-pc", r.Ports.US, r.Ports.PC, r.SPIs.PC, "answers on gmgate's TCP"),
		row("C out", "port-pc", "port-us", r.Ports.PC, r.Ports.US, r.SPIs.US, "all UDP to the phone, gmgate's TCP"),
		row("D out", "port-ps", "port-uc", r.Ports.PS, r.Ports.UC, r.SPIs.UC, "answers on the phone's TCP"),
	}
}

// changeTable shows what a re-registration replaced: the client ports and every SPI; the server ports stay.
func changeTable(old, fresh ue.Result) [][]string {
	row := func(name string, op, np uint16, os, ns ims.SPI) []string {
		port := fmt.Sprintf("%d → %d", op, np)
		if op == np {
			port = fmt.Sprintf("%d stays", op)
		}
		return []string{name, port, fmt.Sprintf("%s → %s", os, ns)}
	}
	return [][]string{
		{"", "port", "SPI"},
		row("port-uc", old.Ports.UC, fresh.Ports.UC, old.SPIs.UC, fresh.SPIs.UC),
		row("port-us", old.Ports.US, fresh.Ports.US, old.SPIs.US, fresh.SPIs.US),
		row("port-pc", old.Ports.PC, fresh.Ports.PC, old.SPIs.PC, fresh.SPIs.PC),
		row("port-ps", old.Ports.PS, fresh.Ports.PS, old.SPIs.PS, fresh.SPIs.PS),
	}
}

// kernelCounts prints what the kernel holds, where it does the ESP.
func (d *demo) kernelCounts(ctx context.Context, when string) {
	if d.backend != "xfrm" {
		return
	}
	var parts []string
	for _, what := range []string{"state", "policy"} {
		out, err := exec.CommandContext(ctx, "ip", "-n", d.lab.GM.Name(), "xfrm", what, "count").CombinedOutput() //nolint:gosec // constant
		if err != nil {
			d.c.note("ip xfrm %s count: %v", what, err)
			return
		}
		parts = append(parts, what+": "+strings.Join(strings.Fields(string(out)), " "))
	}
	d.c.note("ip xfrm, %s: %s", when, strings.Join(parts, ", "))
}

// verify compares what all the witnesses saw.
func (d *demo) verify(ctx context.Context) error {
	d.c.section("Verification")
	d.capture.Settle(50*time.Millisecond, time.Second)
	stats := d.capture.Stats()
	d.step(ctx, "the tap on the Gm link", func(context.Context) (string, error) {
		requests, challenges := 0, 0
		for _, m := range d.capture.Clear() {
			if m.Method == "REGISTER" {
				requests++
			} else if m.Status == 401 {
				challenges++
			}
		}
		detail := fmt.Sprintf("in clear: %d REGISTER and %d × 401, without CK and IK; everything after a 401 was ESP: %d packets in, %d out",
			requests, challenges, stats.ESPIn, stats.ESPOut)
		if stats.ESPIn == 0 || stats.ESPOut == 0 {
			return "", errors.New("no ESP at all")
		}
		return detail, d.capture.CheckClear(lab.ClearRules{Registrations: 1})
	})
	witness := func(name, what string, problems []string) {
		d.step(ctx, name, func(context.Context) (string, error) {
			if len(problems) > 0 {
				return "", fmt.Errorf("%d problems: %s", len(problems), strings.Join(problems[:min(5, len(problems))], "; "))
			}
			return what, nil
		})
	}
	log := d.core.Log()
	witness("the core", fmt.Sprintf("found nothing wrong with %d messages", len(log)), d.core.Problems())
	var problems []string
	for _, p := range d.phones {
		for _, s := range p.Problems() {
			problems = append(problems, p.name+": "+s)
		}
	}
	witness("the phones", "found nothing wrong with what they received", problems)
	var last map[string]float64
	d.step(ctx, "gmgate's own metrics", func(ctx context.Context) (string, error) {
		m, err := d.daemon.Metrics(ctx)
		if err != nil {
			return "", err
		}
		last = m
		return d.checkMetrics(m)
	})
	d.step(ctx, "gmgate stops", func(context.Context) (string, error) {
		return "in good order", d.daemon.Stop()
	})
	d.summary(stats, len(log))
	d.guardSummary(last)
	return nil
}

func (d *demo) checkMetrics(m map[string]float64) (string, error) {
	var errs []error
	want := func(name string, v float64, labels ...string) {
		if got := lab.Sum(m, name, labels...); got != v {
			errs = append(errs, fmt.Errorf("%s%v is %g, want %g", name, labels, got, v))
		}
	}
	n := float64(d.o.ues)
	want("gmgate_registrations_total", n, `kind="initial"`, `result="success"`)
	want("gmgate_registrations_total", 1, `kind="refresh"`, `result="success"`)
	want("gmgate_registrations_total", 1, `kind="reauth"`, `result="success"`)
	want("gmgate_registrations_total", n, `kind="dereg"`, `result="success"`)
	want("gmgate_registrations_total", 0, `result="failure"`)
	want("gmgate_secagree_selected_total", n+1)
	want("gmgate_sip_rejected_total", 0)
	want("gmgate_sa_sets", 0)
	want("gmgate_esp_sas", 0)
	want("gmgate_sa_install_errors_total", 0)
	want("gmgate_handler_panics_total", 0)
	var drops []string
	for k, v := range m {
		if v > 0 && strings.HasPrefix(k, "gmgate_") && strings.Contains(k, "_drops_total") && !strings.Contains(k, "keepalive") {
			drops = append(drops, fmt.Sprintf("%s %g", strings.TrimPrefix(k, "gmgate_"), v))
		}
	}
	slices.Sort(drops)
	if len(drops) > 0 {
		errs = append(errs, fmt.Errorf("dropped: %s", strings.Join(drops, ", ")))
	}
	return fmt.Sprintf("%g registrations, %g SIP messages in, %g out; rejected 0, dropped 0; SAs now 0",
		lab.Sum(m, "gmgate_registrations_total"), lab.Sum(m, "gmgate_sip_messages_total", `dir="in"`),
		lab.Sum(m, "gmgate_sip_messages_total", `dir="out"`)), errors.Join(errs...)
}

func (d *demo) summary(s lab.Stats, messages int) {
	d.c.section("Summary")
	rows := [][]string{{"phone", "number", "address", "algorithms", "registration", "to SM6", "to SM12"}}
	for i, p := range d.phones {
		if i == demoRows {
			break
		}
		t := p.made.Timings
		rows = append(rows, []string{
			p.name[len("phone "):], strings.TrimPrefix(p.sub.IMPU[1], "tel:"), p.addr.String(), p.made.Suite.String(),
			millis(t.Total), millis(t.Challenge), millis(t.Authenticate),
		})
	}
	d.c.table(rows)
	if more := len(d.phones) - demoRows; more > 0 {
		d.c.note("… and %d more", more)
	}
	d.c.line("")
	d.c.table([][]string{
		{"on the Gm link", "frames"},
		{"SIP in clear", fmt.Sprintf("%d", s.ClearSIP)},
		{"ESP from the phones", fmt.Sprintf("%d", s.ESPIn)},
		{"ESP to the phones", fmt.Sprintf("%d  (%d octets in all, %d fragments)", s.ESPOut, s.ESPBytes, s.ESPFragments)},
		{"messages at the core", fmt.Sprintf("%d", messages)},
	})
}

// espPackets says how many ESP packets went on the SAs that a UE has: from it, and to it.
func espPackets(u admin.UE) (in, out uint64) {
	for _, s := range u.Sets {
		if q := s.Sequences; q != nil {
			in, out = in+uint64(q.PC)+uint64(q.PS), out+uint64(q.UC)+uint64(q.US)
		}
	}
	return in, out
}

// demoRows is how many phones a table shows.
const demoRows = 8

// espByUE asks gmgate for the ESP packets by UE, and finds a phone odd that has sent or got none.
func (d *demo) espByUE(ctx context.Context) (rows [][]string, detail string, err error) {
	list, _, err := d.admin.UEs(ctx, admin.Query{}, demoMaxPhones)
	if err != nil {
		return nil, "", err
	}
	if len(list) != len(d.phones) {
		return nil, "", fmt.Errorf("gmgate has %d contexts for %d phones", len(list), len(d.phones))
	}
	names := map[string]string{}
	for _, p := range d.phones {
		names[p.sub.IMPI] = p.name
	}
	var in, out uint64
	for _, u := range list {
		if u, err = d.admin.UE(ctx, u.ID, true); err != nil {
			return nil, "", err
		}
		from, to := espPackets(u)
		if from == 0 || to == 0 {
			return nil, "", fmt.Errorf("%s has sent %d ESP packets and got %d", names[u.IMPI], from, to)
		}
		in, out = in+from, out+to
		row := []string{names[u.IMPI][len("phone "):], u.Address, fmt.Sprint(from), fmt.Sprint(to)}
		if u.ESP != nil {
			// It has also seen those on sets that are gone.
			if u.ESP.Packets < from {
				return nil, "", fmt.Errorf("the guard has seen %d ESP packets of %s, the backend %d", u.ESP.Packets, names[u.IMPI], from)
			}
			row = append(row, fmt.Sprint(u.ESP.Packets), fmt.Sprint(u.ESP.Bytes))
		}
		rows = append(rows, row)
	}
	slices.SortFunc(rows, func(a, b []string) int { return cmp.Or(cmp.Compare(len(a[0]), len(b[0])), cmp.Compare(a[0], b[0])) })
	return rows, fmt.Sprintf("ESP packets on their SAs: %d to gmgate, %d from it", in, out), nil
}

// guardSummary shows the ESP packets by UE, and what the guard counted.
func (d *demo) guardSummary(m map[string]float64) {
	if len(d.talks) > 0 {
		d.c.line("")
		head := []string{"ESP packets by UE", "address", "from it", "to it", "at the guard", "octets"}
		d.c.table(append([][]string{head[:len(d.talks[0])]}, d.talks[:min(demoRows, len(d.talks))]...))
		if more := len(d.talks) - demoRows; more > 0 {
			d.c.note("… and %d more", more)
		}
	}
	d.c.line("")
	hook := guardOf(m)
	if hook == "" {
		d.c.note("no guard: ESP backend, policies and SIP drop what does not belong here")
		return
	}
	drops := lab.By(m, "gmgate_bpf_packets_total", "reason", `verdict="drop"`)
	passed := lab.Sum(m, "gmgate_bpf_packets_total", `verdict="pass"`)
	d.c.note("guard (%s): %.0f packets passed, dropped: %s", hook, passed, byReason(drops))
}

// guardOf names the hooks by which the guard sits on interfaces, empty if it sits on none.
func guardOf(m map[string]float64) string {
	var hooks []string
	for hook, n := range lab.By(m, "gmgate_guard_info", "hook") {
		if n > 0 && hook != string(guard.HookNone) {
			hooks = append(hooks, hook)
		}
	}
	slices.Sort(hooks)
	return strings.Join(hooks, ", ")
}

// byReason prints counts, the largest first, those of zero left out.
func byReason(counts map[string]float64) string {
	var parts []string
	for _, r := range slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		return cmp.Or(cmp.Compare(counts[b], counts[a]), cmp.Compare(a, b))
	}) {
		if counts[r] != 0 {
			parts = append(parts, fmt.Sprintf("%s %.0f", r, counts[r]))
		}
	}
	if len(parts) == 0 {
		return "nothing"
	}
	return strings.Join(parts, ", ")
}

// close takes everything down, newest first.
func (d *demo) close() {
	for _, v := range slices.Backward(d.cleanup) {
		if err := v(); err != nil {
			d.c.result("cleaning up", "", 0, err)
		}
	}
}

// finish prints the verdict and returns the exit status.
func (d *demo) finish(ctx context.Context) int {
	c := d.c
	took := millis(time.Since(c.begin))
	failed := len(c.failed) > 0 || ctx.Err() != nil
	if d.daemon != nil && (failed || d.o.keepLog) {
		d.saveLog(failed)
	}
	if d.o.capture != "" && d.capture != nil {
		c.line("")
		c.note("To read the SIP in %s, copy %s.esp_sa to ~/.config/wireshark/esp_sa and run", d.o.capture, d.o.capture)
		c.note("tshark -r %s -o esp.enable_encryption_decode:TRUE -Y sip", d.o.capture)
	}
	c.line("")
	switch {
	case ctx.Err() != nil:
		c.line("  %s after %d steps, %s; everything was removed", c.paint(sgrYellow, "interrupted"), c.steps, took)
	case failed:
		c.line("  %s: %d of %d steps, %s", c.paint(sgrRed, "FAILED"), len(c.failed), c.steps, took)
		for _, f := range c.failed {
			for i, l := range wrap(f, demoWidth-8) {
				c.line("    %s%s", []string{"✗ ", "  "}[min(i, 1)], l)
			}
		}
	default:
		c.line("  %s: %d steps, %s", c.paint(sgrGreen, "all good"), c.steps, took)
		return 0
	}
	return 1
}

// saveLog keeps gmgate's log in a file if that was asked for, and prints its end after a failure.
func (d *demo) saveLog(failed bool) {
	if d.o.keepLog {
		f, err := os.CreateTemp("", "gmgate-demo-*.log")
		if err == nil {
			_, err = io.WriteString(f, d.daemon.Log())
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			d.c.note("keep the log: %v", err)
		} else {
			d.c.note("gmgate's log: %s", f.Name())
		}
	}
	if failed {
		d.c.section("End of gmgate's log")
		for l := range strings.Lines(d.daemon.Tail(demoLogTail)) {
			d.c.line("%s", strings.TrimSuffix(l, "\n"))
		}
	}
}
