package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gmgate/gmgate/control/config"
	"github.com/gmgate/gmgate/control/ims"
	"github.com/gmgate/gmgate/control/store"
	"github.com/gmgate/gmgate/dataplane/front"
	"github.com/gmgate/gmgate/dataplane/probe"
	"github.com/gmgate/gmgate/dataplane/xfrm"
)

// oldestGuard is the oldest kernel that loads the guard's programs: those of XDP ask for the length of a packet
// (bpf_xdp_get_buff_len), and they are loaded together with those of tc.
var oldestGuard = [2]int{5, 18}

// memcg is the first kernel that accounts eBPF maps to the control group instead of RLIMIT_MEMLOCK.
var memcg = [2]int{5, 11}

// checkKernel tells which kernel runs.
func (p *preflight) checkKernel(context.Context) {
	var err error
	if p.caps, err = p.host.Capabilities(); err == nil {
		p.plain = p.host.UID != 0 && p.caps == 0
		p.results.partial = p.plain
	}
	if p.kernel, err = p.host.Kernel(); err != nil {
		p.unknown("release", err)
		return
	}
	k := p.kernel
	f := finding{Name: "release", State: verdictOK, Value: k.Release + ", " + k.Machine}
	if k.Major > 0 && !k.AtLeast(oldestGuard[0], oldestGuard[1]) {
		f.State = verdictWarn
		f.Detail = fmt.Sprintf("the guard needs %d.%d or later", oldestGuard[0], oldestGuard[1])
		f.Hint = "run a later kernel, such as 6.1 of Debian 12"
	}
	p.say(f)
	if k.BTF {
		p.say(finding{Name: "btf", State: verdictOK, Value: "present"})
	} else {
		p.say(finding{
			Name: "btf", State: verdictNote, Value: "absent", Detail: "eBPF programs that use the kernel's own types or functions cannot be loaded",
			Hint: "run a kernel with CONFIG_DEBUG_INFO_BTF=y",
		})
	}
}

// checkBPF tells whether eBPF programs can be loaded and how they run.
func (p *preflight) checkBPF(context.Context) {
	const unprivileged, jit = "kernel.unprivileged_bpf_disabled", "net.core.bpf_jit_enable"
	switch r := p.host.Sysctl(unprivileged); {
	case r.Missing():
		p.say(finding{
			Name: "bpf", State: verdictWarn, Value: "absent", Detail: "this kernel has no eBPF, so there is no guard and no steering",
			Hint: "run a kernel with CONFIG_BPF_SYSCALL=y",
		})
		return
	case r.Err != nil:
		p.unknown(unprivileged, r.Err)
	case r.Value == "0":
		p.say(finding{
			Name: unprivileged, State: verdictWarn, Value: r.Value, Detail: "every user of this host may load eBPF programs",
			Hint: "sysctl -w " + unprivileged + "=2",
		})
	default:
		p.say(finding{Name: unprivileged, State: verdictOK, Value: r.Value})
	}
	switch r := p.host.Sysctl(jit); {
	case r.Missing():
		p.say(finding{
			Name: jit, State: verdictWarn, Value: "absent", Detail: "programs are interpreted, several times slower",
			Hint: "run a kernel with CONFIG_BPF_JIT=y",
		})
	case r.Err != nil:
		p.unknown(jit, r.Err)
	case r.Value == "1":
		p.say(finding{Name: jit, State: verdictOK, Value: r.Value})
	case r.Value == "0":
		p.say(finding{Name: jit, State: verdictWarn, Value: r.Value, Detail: "programs are interpreted, several times slower", Hint: "sysctl -w " + jit + "=1"})
	default:
		p.say(finding{
			Name: jit, State: verdictWarn, Value: r.Value, Detail: "for debugging: every program is written to the kernel's log",
			Hint: "sysctl -w " + jit + "=1",
		})
	}
	switch mounted, err := p.host.BPFFS(); {
	case err != nil:
		p.unknown("bpffs", err)
	case mounted:
		p.say(finding{Name: "bpffs", State: verdictOK, Value: "mounted"})
	default:
		p.say(finding{
			Name: "bpffs", State: verdictNote, Value: "not mounted", Detail: "nothing of eBPF can be kept in /sys/fs/bpf over a restart",
			Hint: "mount -t bpf bpf /sys/fs/bpf",
		})
	}
	missing := p.caps.Lacking(probe.CapBPF, probe.CapNetAdmin)
	if p.caps.Has(probe.CapSysAdmin) { // stands for CAP_BPF
		missing = p.caps.Lacking(probe.CapNetAdmin)
	}
	switch {
	case len(missing) == 0:
		p.say(finding{Name: "capabilities", State: verdictOK, Value: "enough", Detail: "to load and attach programs"})
	case p.plain:
		p.say(finding{Name: "capabilities", State: verdictNote, Value: "none", Detail: "needs root"})
	default:
		p.say(finding{
			Name: "capabilities", State: verdictWarn, Value: "missing", Detail: join(missing) + ": the guard cannot be loaded",
			Hint: "run as root, or add to AmbientCapabilities= and CapabilityBoundingSet= of the unit: " + join(missing),
		})
	}
}

func join(caps []probe.Cap) string {
	names := make([]string, 0, len(caps))
	for _, c := range caps {
		names = append(names, c.String())
	}
	return strings.Join(names, " ")
}

// checkESP tells what the kernel's ESP can do, and which backend is taken.
func (p *preflight) checkESP(context.Context) {
	p.support = p.esp()
	p.chooseBackend()
	kernel := finding{Name: "kernel", State: verdictOK, Value: "present", Detail: p.support.Reason}
	switch err := p.support.Err(); {
	case errors.Is(err, xfrm.ErrPermission):
		kernel.State, kernel.Value, kernel.Detail = verdictNote, "unknown", "needs root"
	case err != nil:
		kernel.State, kernel.Value = verdictNote, "absent"
	}
	p.say(kernel)
	if p.backend == config.BackendXFRM && !p.running && xfrm.Locked(p.host.Read("/proc/thread-self/net/unix").Value) {
		p.say(finding{
			Name: "owner", State: verdictFail, Value: "another gmgate", Detail: "it has the SAs and policies of this network namespace, of which there is one set",
			Hint: "stop it, run this one in a namespace of its own, or set esp.backend: userspace",
		})
	}
	if p.support.Err() == nil && p.backend == config.BackendXFRM {
		p.checkPairs()
		f := finding{Name: "replay window", State: verdictOK, Value: fmt.Sprint(p.cfg.ESP.ReplayWindow)}
		if !p.support.LargeWindow {
			f.State, f.Detail = verdictWarn, "the kernel takes 32 only: packets that overtake each other by more are lost"
			f.Hint = "run a later kernel, or set esp.backend: userspace"
		}
		p.say(f)
	}
	if p.backend == config.BackendUserspace {
		p.say(finding{Name: "algorithms", State: verdictOK, Value: "all", Detail: "gmgate's own ESP does every pair"})
	}
	for _, name := range []string{"esp4", "esp6", "xfrm_user"} {
		f := finding{Name: "module " + name, State: verdictOK}
		m := p.host.Module(p.kernel, name)
		f.Value = m.String()
		switch m {
		case probe.ModuleUnknown:
			f.State, f.Detail = verdictNote, "neither the kernel's modules nor its configuration can be seen"
		case probe.ModuleAbsent:
			f.State = verdictNote
		case probe.ModuleLoadable, probe.ModuleLoaded, probe.ModuleBuiltIn:
		}
		p.say(f)
	}
	for _, name := range []string{"esp4_offload", "esp6_offload"} {
		if p.host.Module(p.kernel, name) == probe.ModuleLoaded {
			p.say(finding{
				Name: "module " + name, State: verdictNote, Value: "loaded",
				Detail: "with GRO on, programs at tc see what the kernel has decrypted instead of ESP; XDP does not",
			})
		}
	}
}

// chooseBackend says which backend gmgate would take.
func (p *preflight) chooseBackend() {
	why := cannotUse(&p.support, p.cfg)
	untold := errors.Is(p.support.Err(), xfrm.ErrPermission)
	f := finding{Name: "backend", State: verdictOK}
	switch p.cfg.ESP.Backend {
	case config.BackendUserspace:
		p.backend, f.Detail = config.BackendUserspace, "configured"
	case config.BackendXFRM:
		p.backend, f.Detail = config.BackendXFRM, "configured"
		if why != "" {
			f.State, f.Detail = verdictFail, "configured, but "+why
			f.Hint = "modprobe -a esp4 esp6 xfrm_user, or set esp.backend: userspace"
		}
	case config.BackendAuto:
		switch {
		case untold: // a daemon without privileges tries the kernel as well, and stops
			p.backend, f.State, f.Detail = config.BackendAuto, verdictNote, "needs root: whether the kernel can do ESP is not known"
		case why != "":
			p.backend, f.Detail = config.BackendUserspace, "auto: "+why
		default:
			p.backend, f.Detail = config.BackendXFRM, "auto: the kernel can do what is configured"
		}
	}
	f.Value = string(p.backend)
	p.say(f)
	if f.State == verdictFail || untold {
		return
	}
	able := backend{}
	if p.backend == config.BackendXFRM {
		able.able = p.support.Suites
	}
	if _, err := compileRules(p.cfg, able.suites); err != nil {
		p.say(finding{
			Name: "rules", State: verdictFail, Detail: err.Error(),
			Hint: "give the rule an algorithm that the kernel has, or set esp.backend: userspace",
		})
	}
}

// checkPairs tells which algorithm pairs the kernel can do.
func (p *preflight) checkPairs() {
	configured := p.cfg.Security.Suites()
	for _, s := range ims.Suites() {
		f := finding{Name: s.String(), State: verdictOK, Value: "kernel"}
		used := slices.Contains(configured, s)
		switch i := slices.IndexFunc(p.support.Missing, func(m xfrm.Missing) bool { return m.Suite == s }); {
		case i >= 0 && used:
			f.State, f.Value = verdictWarn, "missing"
			f.Detail = p.support.Missing[i].Err.Error() + ": phones that can do nothing else are refused"
			f.Hint = "run a kernel with it, set esp.backend: userspace, or take " + s.String() + " out of security.algorithms"
		case i >= 0:
			f.Value, f.Detail = "missing", "not in security.algorithms"
		case !used:
			f.Detail = "not in security.algorithms"
		}
		p.say(f)
	}
}

// backendCaps are the capabilities that a backend needs.
func backendCaps(b config.Backend) []probe.Cap {
	if b == config.BackendUserspace {
		return []probe.Cap{probe.CapNetAdmin, probe.CapNetRaw, probe.CapSysAdmin}
	}
	return []probe.Cap{probe.CapNetAdmin}
}

// checkPrivileges tells whether this process may do what gmgate does.
func (p *preflight) checkPrivileges(context.Context) {
	user := finding{Name: "user", State: verdictOK, Value: "root"}
	if p.host.UID != 0 {
		user.Value = fmt.Sprintf("uid %d", p.host.UID)
	} else {
		user.Detail = "what is said of capabilities and files holds for root, not for another user of a service"
	}
	p.say(user)
	name := string(p.backend)
	if p.backend == config.BackendAuto {
		name = string(config.BackendXFRM)
	}
	needed := backendCaps(p.backend)
	missing := p.caps.Lacking(needed...)
	f := finding{Name: "capabilities", State: verdictOK, Value: join(needed), Detail: "for backend " + name}
	if len(missing) > 0 {
		f.State, f.Value, f.Detail = verdictFail, "missing", join(missing)+" for backend "+name
		f.Hint = "run as root, or set AmbientCapabilities= and CapabilityBoundingSet= of the unit to " + join(needed)
		if p.plain {
			f.State = verdictWarn
			f.Detail += "; run by this user gmgate would not start, and not everything could be checked"
			f.Hint = "sudo gmgate preflight"
			if p.file != "" {
				f.Hint += " -c " + p.file
			}
		}
	}
	p.say(f)
	if p.backend != config.BackendUserspace {
		return
	}
	tun := finding{Name: "/dev/net/tun", State: verdictOK, Value: "usable"}
	switch err := p.host.Open("/dev/net/tun"); {
	case errors.Is(err, fs.ErrPermission):
		tun.State, tun.Value, tun.Detail = p.grave(), "closed", "this process may not open it"
		tun.Hint = "give the user or the container access: DeviceAllow=/dev/net/tun rw, --device /dev/net/tun"
	case err != nil:
		tun.State, tun.Value, tun.Detail = verdictFail, "absent", err.Error()
		tun.Hint = "modprobe tun; in a container: --device /dev/net/tun"
	}
	p.say(tun)
	if !p.caps.Has(probe.CapSysAdmin) {
		return // said above
	}
	space := finding{Name: "namespace", State: verdictOK, Value: "can be made"}
	if err := p.namespace(); err != nil {
		space.State, space.Value, space.Detail = verdictFail, "refused", err.Error()
		space.Hint = "allow it: RestrictNamespaces=net (scripts/systemd/gmgate.service.d/userspace.conf), or the seccomp profile of the container"
	}
	p.say(space)
}

// checkLimits compares what the process may have with what the configuration wants.
func (p *preflight) checkLimits(context.Context) {
	connections := p.cfg.Gm.TCP.MaxConnections
	if soft, err := p.host.Limit(unix.RLIMIT_NOFILE); err != nil {
		p.unknown("open files", err)
	} else {
		want := front.Descriptors(connections)
		f := finding{Name: "open files", State: verdictOK, Value: limitText(soft), Detail: fmt.Sprintf("%d connections want %d", connections, want)}
		if soft < uint64(want) {
			f.State = verdictWarn
			f.Detail += ": there will be fewer connections"
			f.Hint = fmt.Sprintf("ulimit -n %d, LimitNOFILE=%d in the unit, or a lower gm.tcp.max_connections", want, want)
		}
		p.say(f)
	}
	if soft, err := p.host.Limit(unix.RLIMIT_MEMLOCK); err != nil {
		p.unknown("locked memory", err)
	} else {
		f := finding{Name: "locked memory", State: verdictOK, Value: limitText(soft), Detail: "does not bound eBPF maps on this kernel"}
		if p.kernel.Major > 0 && !p.kernel.AtLeast(memcg[0], memcg[1]) {
			f.Detail = "bounds eBPF maps on this kernel"
			if soft != probe.Unlimited && !p.plain {
				f.State, f.Hint = verdictWarn, "ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit"
			}
		}
		p.say(f)
	}
	f := finding{Name: "cpus", State: verdictOK, Value: fmt.Sprint(p.host.CPUs), Detail: count(p.cfg.WorkerCount(), "worker")}
	if p.cfg.Workers > p.host.CPUs {
		f.State, f.Detail = verdictWarn, f.Detail+" share them: event loops wait for each other"
		f.Hint = fmt.Sprintf("set workers: %d, or 0 for one for each CPU", p.host.CPUs)
	}
	p.say(f)
}

func limitText(n uint64) string {
	if n == probe.Unlimited {
		return "unlimited"
	}
	return fmt.Sprint(n)
}

// checkFiles looks at what the guard leaves, the store, its key and the folder of the admin socket.
func (p *preflight) checkFiles(context.Context) {
	if !p.loaded {
		return
	}
	p.checkPin()
	if path := p.cfg.Store.Path; path == "" {
		p.say(finding{Name: "store", State: verdictNote, Value: "none", Detail: "registrations and SAs do not outlive a restart", Hint: "set store.path"})
	} else {
		p.checkStore(path)
	}
	path := p.cfg.SocketPath()
	if path == "" {
		p.say(finding{Name: "admin socket", State: verdictNote, Value: "none", Detail: "gmgate ue finds no daemon", Hint: "leave admin.socket out to get the default"})
		return
	}
	at := p.host.Place(path)
	f := finding{Name: "admin socket", State: verdictOK, Value: path}
	switch folder := filepath.Dir(path); {
	case at.Info != nil && at.Info.Mode().Type() != fs.ModeSocket:
		f.State, f.Detail, f.Hint = verdictFail, "there is something that is no socket", "move it away, or set admin.socket"
	case at.Writable != nil:
		f.State, f.Detail = p.cannotWrite(at)
		f.Hint = "install -d -m 0750 -o gmgate " + folder
	case at.Folder != folder && at.Folder != filepath.Dir(folder): // one level is made
		f.State, f.Detail, f.Hint = verdictFail, filepath.Dir(folder)+" does not exist", "mkdir -p "+folder
	case at.Folder != folder:
		f.Detail = folder + " will be made"
	}
	p.say(f)
}

// checkPin looks at the directory of what the guard leaves over a restart. One that is there has to be usable, or the daemon does
// not start: it may be in use by another process.
func (p *preflight) checkPin() {
	path := p.cfg.PinPath()
	if path == "" || p.cfg.Guard.Mode == config.GuardOff {
		return
	}
	at := p.host.Place(path)
	f := finding{Name: "pin", State: verdictOK, Value: path}
	switch {
	case at.Info != nil:
		if err := p.host.Access(path, unix.R_OK|unix.W_OK|unix.X_OK); err != nil {
			f.State, f.Detail = p.grave(), "another user has made it, and this one may not use it"
			f.Hint = "as root: gmgate bpf unload -pin " + path
		}
	case at.Writable != nil:
		f.Detail = "this user may not write to " + at.Folder + ": the guard goes with gmgate"
		if f.State = verdictWarn; p.plain {
			f.State = verdictNote
		}
		f.Hint = "install -d -m 0700 -o gmgate " + filepath.Dir(path)
	default:
		f.Detail = "will be made"
	}
	p.say(f)
}

// cannotWrite words why a process cannot make files in a folder.
func (p *preflight) cannotWrite(at probe.Place) (verdict, string) {
	if errors.Is(at.Writable, unix.EROFS) {
		return verdictFail, at.Folder + " is on a file system that is read-only"
	}
	return p.grave(), "this user may not write to " + at.Folder
}

// checkStore looks at the database and at the file of its key.
func (p *preflight) checkStore(path string) {
	at := p.host.Place(path)
	f := finding{Name: "store", State: verdictOK, Value: path}
	switch {
	case at.Writable != nil:
		f.State, f.Detail = p.cannotWrite(at)
		f.Hint = "install -d -m 0700 -o gmgate " + filepath.Dir(path) + ", or set store.path"
	case at.Info != nil && !at.Info.Mode().IsRegular():
		f.State, f.Detail, f.Hint = verdictFail, "not a regular file", "move it away, or set store.path"
	case at.Info != nil:
		f.Detail = fmt.Sprintf("%d KiB, registrations of it are taken over", (at.Info.Size()+1023)>>10)
	default:
		f.Detail = "will be made"
	}
	if at.Info != nil && f.State == verdictOK {
		if err := p.host.Access(path, unix.R_OK|unix.W_OK); err != nil {
			f.State, f.Detail, f.Hint = p.grave(), "this user may not write to it", "chown gmgate "+path
		}
	}
	p.say(f)

	if name := p.cfg.Store.Credential; name != "" {
		p.say(finding{Name: "key", State: verdictNote, Value: "credential " + name, Detail: "the service manager provides it at the start"})
		return
	}
	file := p.cfg.Store.KeyFile
	if file == "" {
		file = path + ".key"
	}
	key := p.host.Place(file)
	f = finding{Name: "key", State: verdictOK, Value: file}
	switch {
	case errors.Is(key.Err, fs.ErrNotExist) && at.Info != nil:
		f.State, f.Detail = verdictWarn, "missing: without it the store cannot be read, is moved aside, and phones register anew"
		f.Hint = "restore " + file + " from where it was kept"
	case errors.Is(key.Err, fs.ErrNotExist) && key.Writable != nil:
		f.State, f.Detail = p.cannotWrite(key)
		f.Hint = "install -d -m 0700 -o gmgate " + filepath.Dir(file) + ", or set store.key_file"
	case errors.Is(key.Err, fs.ErrNotExist) && key.Folder != filepath.Dir(file) && filepath.Dir(file) != filepath.Dir(path):
		f.State, f.Detail, f.Hint = verdictFail, filepath.Dir(file)+" does not exist", "install -d -m 0700 -o gmgate "+filepath.Dir(file)
	case errors.Is(key.Err, fs.ErrNotExist):
		f.Detail = "will be made"
	case key.Err != nil:
		f.State, f.Value, f.Detail = verdictNote, "unknown", file+" needs root"
	case !key.Info.Mode().IsRegular() || key.Info.Size() != store.KeySize:
		f.State, f.Detail = verdictFail, fmt.Sprintf("not a file of %d octets", store.KeySize)
		f.Hint = "restore it, or set store.key_file"
	case key.Info.Mode().Perm()&0o077 != 0:
		f.State, f.Detail = verdictFail, fmt.Sprintf("mode %04o: others than its owner have access", key.Info.Mode().Perm())
		f.Hint = "chmod 0600 " + file
	default:
		f.Detail = fmt.Sprintf("mode %04o", key.Info.Mode().Perm())
	}
	p.say(f)
}

// checkClock tells whether the clock is kept right: what the store holds ends at times of the wall clock.
func (p *preflight) checkClock(context.Context) {
	switch ok, err := p.host.Clock(); {
	case err != nil:
		p.unknown("synchronised", err)
	case ok:
		p.say(finding{Name: "synchronised", State: verdictOK, Value: "yes"})
	default:
		p.say(finding{
			Name: "synchronised", State: verdictWarn, Value: "no",
			Detail: "registrations that a restart takes over end by this clock, too early or too late if it is wrong",
			Hint:   "timedatectl set-ntp true, or run chronyd",
		})
	}
}
