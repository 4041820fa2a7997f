package xfrm

import (
	"bufio"
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/gmgate/gmgate/dataplane/hostnet"
)

// fact is a setting of the host under which the SAs or policies do not do what they should.
type fact struct {
	path, value, consequence string
}

// warnFacts logs the unsuitable settings of the namespace. Nothing is changed: the host belongs to its operator.
func warnFacts(ns *hostnet.NS, ports []uint16, log *slog.Logger) {
	var fs []fact
	_ = inside(ns, func() error { // without the namespace New has failed before
		fs = facts("/proc/sys/net", ports)
		return nil
	})
	for _, f := range fs {
		log.Warn("unsuitable network setting", slog.String("path", f.path), slog.String("value", f.value),
			slog.String("consequence", f.consequence))
	}
}

// inside runs f in a namespace, nil for the process's.
func inside(ns *hostnet.NS, f func() error) error {
	if ns == nil {
		return f()
	}
	return ns.Do(f)
}

// facts reads the settings below root, which is /proc/sys/net. What cannot be read does not exist on this kernel.
func facts(root string, ports []uint16) []fact {
	var list []fact
	read := func(path string) string {
		b, err := os.ReadFile(filepath.Join(root, path)) //nolint:gosec // a sysctl
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(b))
	}
	if v := read("core/xfrm_larval_drop"); v == "0" {
		list = append(list, fact{
			"core/xfrm_larval_drop", v,
			"if another program listens for key requests, packets without SA are queued instead of dropped",
		})
	}
	for _, pattern := range []struct{ glob, consequence string }{
		{"ipv[46]/conf/*/disable_policy", "clear packets to protected ports are accepted on this interface"},
		{"ipv4/conf/*/disable_xfrm", "packets from protected ports leave this interface in clear"},
	} {
		paths, _ := filepath.Glob(filepath.Join(root, pattern.glob)) // the pattern is well-formed
		for _, p := range paths {
			if filepath.Base(filepath.Dir(p)) == "lo" { // always exempt: local processes are trusted with their own host
				continue
			}
			rel := strings.TrimPrefix(p, root+"/")
			if v := read(rel); v != "0" && v != "" {
				list = append(list, fact{rel, v, pattern.consequence})
			}
		}
	}
	if f := ephemeral(read("ipv4/ip_local_port_range"), read("ipv4/ip_local_reserved_ports"), ports); f != "" {
		list = append(list, fact{
			"ipv4/ip_local_reserved_ports", read("ipv4/ip_local_reserved_ports"),
			"the kernel may give protected port " + f + " to other sockets of this host",
		})
	}
	return list
}

// ephemeral returns the first port that the kernel hands out by itself: within the local range ("32768\t60999") and not
// reserved ("6100,6110-6113").
func ephemeral(local, reserved string, ports []uint16) string {
	var low, high uint16
	if n, _ := fmt.Sscan(local, &low, &high); n != 2 {
		return ""
	}
	for _, p := range ports {
		if p >= low && p <= high && !inRanges(reserved, p) {
			return strconv.Itoa(int(p))
		}
	}
	return ""
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
