package guard

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// bpffs is where systemd mounts it, and so does everybody else.
const bpffs = "/sys/fs/bpf"

// pinDir is the directory of one instance. Its lock goes with the process.
type pinDir struct {
	path string
	fd   int
}

// openPinDir makes and locks a directory. It returns nil, and says why, where nothing can be pinned: then the guard ends
// with the process.
func openPinDir(path string, log *slog.Logger) (*pinDir, error) {
	if path == "" {
		return nil, nil //nolint:nilnil // no directory is an answer
	}
	if err := prepare(path); err != nil {
		log.Warn("guard does not outlive the process", slog.String("pin", path), slog.Any("error", err))
		return nil, nil //nolint:nilnil // no directory is an answer
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = unix.Close(fd)
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s: %w", path, ErrLocked)
		}
		return nil, &os.PathError{Op: "lock", Path: path, Err: err}
	}
	return &pinDir{path, fd}, nil
}

// prepare makes the directory on a bpffs, which is mounted where the usual place has none.
func prepare(path string) error {
	if strings.HasPrefix(path, bpffs+"/") && !isBPFFS(bpffs) {
		if err := unix.Mount("bpf", bpffs, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
			return fmt.Errorf("mount bpffs at %s: %w", bpffs, err)
		}
	}
	if err := os.MkdirAll(path, 0o700); err != nil {
		return err
	}
	if !isBPFFS(path) {
		return fmt.Errorf("%s is not on a bpffs", path)
	}
	return nil
}

func isBPFFS(path string) bool {
	var s unix.Statfs_t
	return unix.Statfs(path, &s) == nil && s.Type == unix.BPF_FS_MAGIC
}

func (d *pinDir) file(name string) string { return filepath.Join(d.path, name) }

func (d *pinDir) names() ([]string, error) {
	entries, err := os.ReadDir(d.path)
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, err
}

// sweep removes what has the name of a pinned map and is no map.
func (d *pinDir) sweep(spec *ebpf.CollectionSpec) error {
	for name, m := range spec.Maps {
		if m.Pinning != ebpf.PinByName {
			continue
		}
		file := d.file(name)
		info, err := os.Lstat(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		p, err := ebpf.LoadPinnedMap(file, nil)
		if err == nil {
			err = p.Close()
		} else if info.IsDir() || !errors.Is(err, fs.ErrPermission) { // of a folder the kernel says the latter as well
			err = os.Remove(file)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// removeMaps removes the pinned maps of a collection, and reports whether there were any.
func (d *pinDir) removeMaps(spec *ebpf.CollectionSpec) (removed bool, err error) {
	var errs []error
	for name, m := range spec.Maps {
		if m.Pinning != ebpf.PinByName {
			continue
		}
		switch err := os.Remove(d.file(name)); {
		case err == nil:
			removed = true
		case !errors.Is(err, fs.ErrNotExist):
			errs = append(errs, err)
		}
	}
	return removed, errors.Join(errs...)
}

// remove removes what is pinned. A link comes off its interface at once, not when the kernel gets round to it.
func (d *pinDir) remove(name string) error {
	if strings.HasPrefix(name, linkPrefix) {
		if k, err := link.LoadPinnedLink(d.file(name), nil); err == nil {
			_ = errors.Join(k.Detach(), k.Close()) // its interface may have gone
		}
	}
	return os.Remove(d.file(name))
}

// clear removes everything, and the directory.
func (d *pinDir) clear() error {
	names, err := d.names()
	errs := []error{err}
	for _, n := range names {
		errs = append(errs, d.remove(n))
	}
	// Where root has made the directory for us, it stays.
	if err := os.Remove(d.path); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (d *pinDir) close() error {
	if d.fd < 0 {
		return nil
	}
	fd := d.fd
	d.fd = -1
	return os.NewSyscallError("close", unix.Close(fd))
}
