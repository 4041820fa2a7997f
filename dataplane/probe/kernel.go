package probe

import (
	"bufio"
	"compress/gzip"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
)

// Kernel is the kernel that runs.
type Kernel struct {
	Release, Machine string
	Major, Minor     int  // zero if the release is no such number
	BTF              bool // it describes its types
}

// AtLeast reports whether the kernel is of a version or a later one.
func (k Kernel) AtLeast(major, minor int) bool {
	return k.Major > major || k.Major == major && k.Minor >= minor
}

// Kernel tells which kernel runs.
func (h *Host) Kernel() (Kernel, error) {
	var k Kernel
	var err error
	if k.Release, k.Machine, err = h.Uname(); err != nil {
		return k, err
	}
	if n, _ := fmt.Sscanf(k.Release, "%d.%d", &k.Major, &k.Minor); n != 2 {
		k.Major, k.Minor = 0, 0
	}
	_, err = fs.Stat(h.Files, "sys/kernel/btf/vmlinux")
	k.BTF = err == nil
	return k, nil
}

// BPFFS reports whether the file system of eBPF is mounted at /sys/fs/bpf.
func (h *Host) BPFFS() (bool, error) {
	r := h.Read("/proc/self/mounts")
	if r.Err != nil {
		return false, r.Err
	}
	for line := range strings.Lines(r.Value) {
		if f := strings.Fields(line); len(f) > 2 && f[1] == "/sys/fs/bpf" && f[2] == "bpf" {
			return true, nil
		}
	}
	return false, nil
}

// Driver returns the driver of a network interface: empty for virtual ones, and where /sys shows another network namespace.
func (h *Host) Driver(link string) string {
	target, err := fs.ReadLink(h.Files, "sys/class/net/"+link+"/device/driver")
	if err != nil {
		return ""
	}
	return path.Base(target)
}

// Module says where a part of the kernel that may be a module is.
type Module uint8

// Modules.
const (
	ModuleUnknown  Module = iota + 1 // neither the kernel's configuration nor its modules can be seen
	ModuleAbsent                     // this kernel has none
	ModuleLoadable                   // the kernel loads it when it is needed
	ModuleLoaded
	ModuleBuiltIn
)

// String returns what operators call it.
func (m Module) String() string {
	switch m {
	case ModuleUnknown:
		return "unknown"
	case ModuleAbsent:
		return "absent"
	case ModuleLoadable:
		return "loadable"
	case ModuleLoaded:
		return "loaded"
	case ModuleBuiltIn:
		return "built in"
	}
	return fmt.Sprintf("Module(%#x)", uint8(m))
}

// option is what rules a module in the kernel's configuration.
var option = map[string]string{
	"esp4": "CONFIG_INET_ESP", "esp6": "CONFIG_INET6_ESP", "xfrm_user": "CONFIG_XFRM_USER", "tun": "CONFIG_TUN",
	"esp4_offload": "CONFIG_INET_ESP_OFFLOAD", "esp6_offload": "CONFIG_INET6_ESP_OFFLOAD",
}

// Module finds a module of this kernel by its name, with underscores.
func (h *Host) Module(k Kernel, name string) Module {
	for line := range strings.Lines(h.Read("/proc/modules").Value) {
		if loaded, _, _ := strings.Cut(line, " "); loaded == name {
			return ModuleLoaded
		}
	}
	folder := "/lib/modules/" + k.Release + "/"
	builtin, loadable := h.Read(folder+"modules.builtin"), h.Read(folder+"modules.dep")
	switch {
	case lists(builtin.Value, name):
		return ModuleBuiltIn
	case lists(loadable.Value, name):
		return ModuleLoadable
	case builtin.Err == nil && loadable.Err == nil:
		return ModuleAbsent
	}
	// No folder of modules, as in a container or with a kernel that has none.
	switch value, found := h.configured(k, option[name]); {
	case found && value == "y":
		return ModuleBuiltIn
	case found && value == "":
		return ModuleAbsent
	}
	return ModuleUnknown
}

// lists reports whether a list of modules has one of this name: "kernel/net/ipv4/esp4.ko.xz: ...".
func lists(list, name string) bool {
	for line := range strings.Lines(list) {
		file, _, _ := strings.Cut(strings.TrimSpace(line), ":")
		base, _, _ := strings.Cut(path.Base(file), ".ko")
		if strings.ReplaceAll(base, "-", "_") == name {
			return true
		}
	}
	return false
}

// configured looks an option up in the configuration of the kernel; found is false if it cannot be seen. An option that is
// not there is not set.
func (h *Host) configured(k Kernel, option string) (value string, found bool) {
	if option == "" {
		return "", false
	}
	text, err := h.kernelConfig(k)
	if err != nil {
		return "", false
	}
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(line, option+"="); ok {
			return strings.TrimSpace(v), true
		}
	}
	return "", true
}

// maxConfig is far more than a kernel's configuration has.
const maxConfig = 4 << 20

func (h *Host) kernelConfig(k Kernel) (string, error) {
	f, err := h.Files.Open("proc/config.gz")
	if err != nil {
		r := h.Read("/boot/config-" + k.Release)
		return r.Value, r.Err
	}
	defer f.Close() //nolint:errcheck // nothing was written
	z, err := gzip.NewReader(bufio.NewReader(f))
	if err != nil {
		return "", fmt.Errorf("read /proc/config.gz: %w", err)
	}
	b, err := io.ReadAll(io.LimitReader(z, maxConfig))
	if err != nil {
		return "", fmt.Errorf("read /proc/config.gz: %w", err)
	}
	return string(b), nil
}
