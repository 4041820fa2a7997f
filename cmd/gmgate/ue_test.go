package main

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/gmgate/gmgate/control/admin"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/proxy"
	"github.com/gmgate/gmgate/control/registrar"
	"github.com/gmgate/gmgate/control/sa"
)

var ueNow = time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)

func ueSample() admin.UE {
	return admin.UE{
		ID: "0-17-3", Worker: 0, Index: 17, IMPI: "001010000000001@ims.mnc001.mcc001.3gppnetwork.org",
		Address: "10.45.0.1", Local: "10.0.0.5", State: "registered", Contact: "sip:001010000000001@10.45.0.1:6301",
		Identities:   []string{"sip:+15550100001@ims.mnc001.mcc001.3gppnetwork.org", "tel:+15550100001"},
		ServiceRoute: []string{"sip:orig@10.0.1.9:5060;lr"}, NextHop: "10.0.1.9:5060;transport=udp",
		Expires: ueNow.Add(167 * time.Hour), Current: "0-104",
		ESP:         &admin.ESP{Packets: 4711, Bytes: 1234567, Last: ueNow.Add(-3 * time.Second)},
		LastMessage: ueNow.Add(-75 * time.Second), LastSeen: ueNow.Add(-3 * time.Second), Sets: []admin.Set{
			{
				ID: "0-104", Phase: "established", Role: admin.RoleCurrent, Algorithms: "hmac-sha-1-96=des-ede3-cbc",
				SPIs: admin.SPIs{UC: 4294967295, US: 4294967294, PC: 2147483648, PS: 1000}, Ports: admin.Ports{UC: 31200, US: 31201, PC: 6110, PS: 6100},
				Deadline: ueNow.Add(167*time.Hour + 30*time.Second), TCP: true, Connections: admin.Connections{In: 5},
				FirstESP: ueNow.Add(-time.Hour), Heard: ueNow.Add(-75 * time.Second),
			},
			{
				ID: "0-121", Phase: "temporary", Role: admin.RoleWaiting, Algorithms: "null=aes-gcm", Over: "0-104",
				SPIs: admin.SPIs{UC: 1, US: 2, PC: 3, PS: 4}, Ports: admin.Ports{UC: 31202, US: 31201, PC: 6111, PS: 6100},
				Deadline: ueNow.Add(4 * time.Minute), Sequences: &admin.Sequences{UC: 5, US: 4294967295, PC: 7, PS: 8},
				FirstESP: ueNow.Add(-4 * time.Second), Diagnosis: "ESP arrives but is not accepted", Hint: "wrong keys, algorithms or SIM (TS 33.203 §7.2)",
			},
		},
	}
}

func TestFormatUE(t *testing.T) {
	want := `UE 0-17-3: registered
  IMPI           001010000000001@ims.mnc001.mcc001.3gppnetwork.org
  address        10.45.0.1, it talks to 10.0.0.5
  owner          worker 0, index 17
  expires        in 6d23h, 2026-01-08 11:00:00 UTC
  contact        sip:001010000000001@10.45.0.1:6301
  identities     sip:+15550100001@ims.mnc001.mcc001.3gppnetwork.org
                 tel:+15550100001
  service route  sip:orig@10.0.1.9:5060;lr
  next hop       10.0.1.9:5060;transport=udp
  traffic        4711 ESP packets, 1.2 MB; the last one 3s ago; last SIP message 1m15s ago

  SET    PHASE        ROLE       GOES IN      UC          US          PC          PS
  0-104  established  current    6d23h  SPI   4294967295  4294967294  2147483648  1000
         hmac-sha-1-96=des-ede3-cbc     port  31200       31201       6110        6100
         prefers TCP, connection 5 of the phone
         first ESP 1h00m ago, heard 1m15s ago
  0-121  temporary    waiting    4m00s  SPI   1           2           3           4
         null=aes-gcm                   port  31202       31201       6111        6100
                                        seq   5           4294967295  7           8
         made over set 0-104
         first ESP 4s ago
         ESP arrives but is not accepted: wrong keys, algorithms or SIM (TS 33.203 §7.2)
`
	if diff := cmp.Diff(want, formatUEs([]admin.UE{ueSample()}, ueNow)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestFormatList(t *testing.T) {
	v4, v6, odd := ueSample(), ueSample(), ueSample()
	v6.ID, v6.Address, v6.State, v6.Expires = "1-1048576-65535", "2001:db8:4545:4545:4545:4545:4545:4545", "deregistered", time.Time{}
	v6.LastSeen = time.Time{}
	odd.ID, odd.IMPI, odd.Sets = "0-18-0", "\x1b[2Jbad", nil
	want := `ID               IMPI           ADDRESS                                 STATE         SETS  EXPIRES  LAST SEEN
0-17-3           001010000000…  10.45.0.1                               registered    2     6d23h    3s ago
1-1048576-65535  001010000000…  2001:db8:4545:4545:4545:4545:4545:4545  deregistered  2     -        -
0-18-0           ?[2Jbad        10.45.0.1                               registered    0     6d23h    3s ago
and more: these are the first 3, see -limit
`
	got := formatList([]admin.UE{v4, v6, odd}, true, ueNow)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	want = `ID      IMPI                                               ADDRESS    STATE       SETS  EXPIRES  LAST SEEN
0-17-3  001010000000001@ims.mnc001.mcc001.3gppnetwork.org  10.45.0.1  registered  2     6d23h    3s ago
`
	if diff := cmp.Diff(want, formatList([]admin.UE{v4}, false, ueNow)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := formatList(nil, false, ueNow); got != "no phones\n" {
		t.Errorf("empty: %q", got)
	}
	for l := range strings.Lines(got) {
		if n := utf8.RuneCountInString(l) - 1; n > ueWidth {
			t.Errorf("%d columns: %s", n, l)
		}
	}
}

func TestUntil(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "now", 0: "now", 59 * time.Second: "59s", time.Minute: "1m00s", 3599*time.Second + 600*time.Millisecond: "1h00m",
		23*time.Hour + 59*time.Minute: "23h59m", 24 * time.Hour: "1d00h", 600000 * time.Second: "6d22h",
	} {
		if got := until(ueNow.Add(d), ueNow); got != want {
			t.Errorf("%s: %q, want %q", d, got, want)
		}
	}
}

func TestSince(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "now", 0: "now", 400 * time.Millisecond: "now", 3 * time.Second: "3s ago", 90 * time.Minute: "1h30m ago",
	} {
		if got := since(ueNow.Add(-d), ueNow); got != want {
			t.Errorf("%s: %q, want %q", d, got, want)
		}
	}
	if got := since(time.Time{}, ueNow); got != "-" {
		t.Errorf("never: %q", got)
	}
}

// Without a guard nothing is said of ESP packets; a phone that was not seen has no line.
func TestTraffic(t *testing.T) {
	last := ueNow.Add(-time.Minute)
	for want, u := range map[string]admin.UE{
		"":                                           {},
		"last SIP message 1m00s ago":                 {LastMessage: last},
		"0 ESP packets, 0 B":                         {ESP: &admin.ESP{}},
		"1 ESP packets, 999 B":                       {ESP: &admin.ESP{Packets: 1, Bytes: 999}},
		"2 ESP packets, 1.0 kB":                      {ESP: &admin.ESP{Packets: 2, Bytes: 1000}},
		"3 ESP packets, 999.9 kB":                    {ESP: &admin.ESP{Packets: 3, Bytes: 999_949}},
		"4 ESP packets, 1.0 MB":                      {ESP: &admin.ESP{Packets: 4, Bytes: 999_950}},
		"5 ESP packets, 18446744.1 TB":               {ESP: &admin.ESP{Packets: 5, Bytes: 1<<64 - 1}},
		"6 ESP packets, 1 B; the last one 1m00s ago": {ESP: &admin.ESP{Packets: 6, Bytes: 1, Last: last}},
	} {
		if got := trafficLine(&u, ueNow); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// gate is an admin.Source with one phone.
type gate struct{ u proxy.UEInfo }

func (g gate) UEs(_ context.Context, q proxy.UEQuery, _ proxy.UEID, _ int) ([]proxy.UEInfo, bool, error) {
	if q.IMPI != "" && q.IMPI != g.u.IMPI || q.IMPU != "" && q.IMPU != g.u.Identities[0] || q.Addr.IsValid() && q.Addr != g.u.Addr {
		return nil, false, nil
	}
	return []proxy.UEInfo{g.u}, false, nil
}

func (g gate) Deregister(ctx context.Context, q proxy.UEQuery) ([]proxy.UEInfo, error) {
	list, _, err := g.UEs(ctx, q, proxy.UEID{}, 1)
	return list, err
}

func (g gate) Move(ctx context.Context, id proxy.UEID, worker int) ([]proxy.UEInfo, error) {
	if worker > 3 {
		return nil, proxy.ErrNoWorker
	}
	list, _, err := g.UEs(ctx, proxy.UEQuery{ID: id}, proxy.UEID{}, 1)
	list[0].ID.Worker = worker
	return list, err
}

func (g gate) Loads(context.Context) ([]proxy.Load, error) { return nil, nil }

// endless is a gate with more phones than anybody asks for.
type endless struct{ gate }

func (c endless) UEs(context.Context, proxy.UEQuery, proxy.UEID, int) ([]proxy.UEInfo, bool, error) {
	return []proxy.UEInfo{c.u}, true, nil
}

// Whoever reads JSON is told that there is more, and the JSON stays what it is.
func TestUEListMore(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "edge1.sock")
	l, err := admin.Listen(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	source := endless{gate{proxy.UEInfo{ID: proxy.UEID{Index: 1}, Addr: netip.MustParseAddr("10.45.0.1"), State: registrar.Registered}}}
	defer admin.NewServer(admin.Config{Source: source, Logger: slog.New(slog.DiscardHandler)}).Serve(l)()
	var stdout, stderr bytes.Buffer
	code := command(t.Context(), []string{"ue", "list", "--json", "-limit", "2", "--socket", socket}, &stdout, &stderr)
	var list []admin.UE
	if err := json.Unmarshal(stdout.Bytes(), &list); err != nil || code != 0 || len(list) != 2 {
		t.Errorf("exit status %d, %v: %s", code, err, stdout.String())
	}
	if !strings.Contains(stderr.String(), "more than these 2, see -limit") {
		t.Errorf("nobody is told that there are more: %q", stderr.String())
	}
}

func TestUECommand(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "edge1.sock")
	l, err := admin.Listen(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	u := proxy.UEInfo{
		ID: proxy.UEID{Index: 1}, IMPI: "one@ims.example", Addr: netip.MustParseAddr("10.45.0.1"), State: registrar.Registered,
		Identities: []string{"tel:+1"}, Sets: []proxy.SetInfo{{ID: 5, Phase: sa.Established, Deadline: time.Now().Add(90 * time.Second), Suite: ims.Suites()[0]}},
	}
	defer admin.NewServer(admin.Config{Source: gate{u}, Logger: slog.New(slog.DiscardHandler)}).Serve(l)()
	write := func(name, adm string) string {
		file := filepath.Join(dir, name)
		text := "instance: edge1\ngm: {addresses: [10.0.0.5]}\nmw: {addresses: [10.0.1.5], next_hops: [\"10.0.1.9:5060\"]}\nadmin: {socket: \"" + adm + "\"}\n"
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	file, off := write("on.yaml", dir+"/{instance}.sock"), write("off.yaml", "")
	for _, tt := range []struct {
		args string
		code int
		text string // on stdout for 0, else on stderr
	}{
		{"list -c " + file, 0, "0-1-0  one@ims.example  10.45.0.1  registered  1"},
		{"list --json --socket " + socket, 0, `"impi": "one@ims.example"`},
		{"list --impi nobody --json -f " + file, 0, "[]\n"},
		{"list --impi nobody -f " + file, 0, "no phones"},
		{"show 10.45.0.1 -f " + file, 0, "  0-5  established  waiting"},
		{"show -f " + file + " tel:+1 --json", 0, `"phase": "established"`},
		{"show two@ims.example -f " + file, 1, "hint: see gmgate ue list"},
		{"deregister one@ims.example -f " + file, 0, "ended one@ims.example at 10.45.0.1; its SA sets go in 1m"},
		{"deregister --contact 10.45.0.1:6300 -f " + file, 0, "ended one@ims.example"},
		{"deregister nobody -f " + file, 1, "no registration matches"},
		{"deregister --contact 10.45.0.1 -f " + file, 1, "address:port"},
		{"move one@ims.example 2 -f " + file, 0, "one@ims.example at 10.45.0.1 is with worker 2 now, as 2-1-0"},
		{"move 10.45.0.1 3 --json -f " + file, 0, `"id": "3-1-0"`},
		{"move one@ims.example 4 -f " + file, 1, "hint: the workers are in /v1/status"},
		{"move nobody 1 -f " + file, 1, "see gmgate ue list"},
		{"move one@ims.example", 2, "number of a worker"},
		{"move one@ims.example two", 2, `"two" is not`},
		{"list --addr here -f " + file, 1, "not an IP address"},
		{"list -c " + off, 1, "switched off"},
		{"list --socket " + dir + "/absent", 1, "is gmgate running"},
		{"list -c " + dir + "/absent.yaml", 1, "--socket"},
		{"", 2, "usage:"},
		{"-h", 0, "usage:"},
		{"list -h", 0, ""},
		{"drop", 2, `no command "drop"`},
		{"list everything", 2, `unexpected argument "everything"`},
		{"list -limit 0", 2, "-limit 0"},
		{"list -x", 2, "-x"},
		{"show", 2, "which one?"},
		{"show a b", 2, `unexpected argument "b"`},
		{"deregister", 2, "one of them"},
		{"deregister a --contact 10.45.0.1:6300", 2, "one of them"},
	} {
		var stdout, stderr bytes.Buffer
		code := command(t.Context(), append([]string{"ue"}, strings.Fields(tt.args)...), &stdout, &stderr)
		text := stdout.String()
		if code != 0 {
			text = stderr.String()
			if stdout.Len() > 0 {
				t.Errorf("%s: printed %q and failed", tt.args, stdout.String())
			}
		}
		if code != tt.code || !strings.Contains(text, tt.text) {
			t.Errorf("%s: %d, %q and %q; want %d, %q", tt.args, code, stdout.String(), stderr.String(), tt.code, tt.text)
		}
		if strings.Contains(tt.args, "--json") && !json.Valid(stdout.Bytes()) {
			t.Errorf("%s: not JSON: %s", tt.args, stdout.String())
		}
	}
}
