package xfrm

import (
	"bufio"
	"bytes"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// Setting is a sysctl that the SAs or policies depend on.
type Setting struct {
	Path        string // below /proc/sys/net
	Value       string // as it was read
	Wanted      string
	Consequence string // of the value; empty: it suits
}

// warnFacts logs the unsuitable settings of the namespace. Nothing is changed: the host belongs to its operator.
func warnFacts(ns *hostnet.NS, ports []uint16, log *slog.Logger) {
	var list []Setting
	_ = inside(ns, func() error { // without the namespace New has failed before
		list = Settings(os.DirFS("/proc/sys/net"), ports)
		return nil
	})
	for _, s := range list {
		if s.Consequence != "" {
			log.Warn("unsuitable network setting", slog.String("path", s.Path), slog.String("value", s.Value),
				slog.String("consequence", s.Consequence))
		}
	}
}

// inside runs f in a namespace, nil for the process's.
func inside(ns *hostnet.NS, f func() error) error {
	if ns == nil {
		return f()
	}
	return ns.Do(f)
}

// Settings reads what the SAs and policies depend on below root, which is /proc/sys/net of the calling thread's namespace.
// ports are those that nobody else may get from the kernel. What cannot be read does not exist on this kernel.
func Settings(root fs.FS, ports []uint16) []Setting {
	var list []Setting
	read := func(name string) (string, bool) {
		b, err := fs.ReadFile(root, name)
		return strings.TrimSpace(string(b)), err == nil
	}
	add := func(name, wanted, consequence string) {
		v, ok := read(name)
		switch {
		case !ok:
			return
		case v == wanted:
			consequence = ""
		}
		list = append(list, Setting{Path: name, Value: v, Wanted: wanted, Consequence: consequence})
	}
	add("core/xfrm_larval_drop", "1", "if another program listens for key requests, packets without SA are queued instead of dropped")
	for _, pattern := range []struct{ glob, consequence string }{
		{"ipv[46]/conf/*/disable_policy", "clear packets to protected ports are accepted on this interface"},
		{"ipv4/conf/*/disable_xfrm", "packets from protected ports leave this interface in clear"},
	} {
		paths, _ := fs.Glob(root, pattern.glob) // the pattern is well-formed
		for _, p := range paths {
			if path.Base(path.Dir(p)) != "lo" { // always exempt: local processes are trusted with their own host
				add(p, "0", pattern.consequence)
			}
		}
	}
	if local, ok := read("ipv4/ip_local_port_range"); ok {
		reserved, _ := read("ipv4/ip_local_reserved_ports")
		s := Setting{Path: "ipv4/ip_local_reserved_ports", Value: reserved, Wanted: reserved}
		if given := ephemeral(local, reserved, ports); len(given) > 0 {
			s.Wanted = reserve(reserved, given)
			s.Consequence = fmt.Sprintf("the kernel may give port %d, which is gmgate's, to other sockets of this host", given[0])
		}
		list = append(list, s)
	}
	return list
}

// ephemeral returns the ports that the kernel hands out by itself: within the local range ("32768\t60999") and not
// reserved ("6100,6110-6113").
func ephemeral(local, reserved string, ports []uint16) (given []uint16) {
	var low, high uint16
	if n, _ := fmt.Sscan(local, &low, &high); n != 2 {
		return nil
	}
	for _, p := range ports {
		if p >= low && p <= high && !inRanges(reserved, p) {
			given = append(given, p)
		}
	}
	return given
}

// reserve adds ports to a list of reserved ones.
func reserve(reserved string, ports []uint16) string {
	ports = slices.Sorted(slices.Values(ports))
	for i := 0; i < len(ports); {
		last := i
		for last+1 < len(ports) && ports[last+1] <= ports[last]+1 {
			last++
		}
		if reserved != "" {
			reserved += ","
		}
		reserved += strconv.Itoa(int(ports[i]))
		if ports[last] != ports[i] {
			reserved += "-" + strconv.Itoa(int(ports[last]))
		}
		i = last + 1
	}
	return reserved
}

func inRanges(list string, port uint16) bool {
	for r := range strings.SplitSeq(list, ",") {
		low, high, span := strings.Cut(r, "-")
		if !span {
			high = low
		}
		l, errLow := strconv.ParseUint(low, 10, 16)
		h, errHigh := strconv.ParseUint(high, 10, 16)
		if errLow == nil && errHigh == nil && uint64(port) >= l && uint64(port) <= h {
			return true
		}
	}
	return false
}

// statistics reads the XFRM counters of a namespace.
func statistics(ns *hostnet.NS) (map[string]uint64, error) {
	var b []byte
	err := inside(ns, func() (err error) {
		b, err = os.ReadFile("/proc/thread-self/net/xfrm_stat")
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read XFRM counters: %w", err)
	}
	counters := make(map[string]uint64)
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), "\t")
		n, err := strconv.ParseUint(strings.TrimSpace(value), 10, 64)
		if err != nil {
			return nil, fmt.Errorf("read XFRM counter %s: %w", strings.TrimSpace(name), err)
		}
		counters[strings.TrimSpace(name)] = n
	}
	return counters, nil
}
