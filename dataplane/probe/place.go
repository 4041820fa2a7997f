package probe

import (
	"io/fs"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Place is what lies at a path, and whether something could be made there.
type Place struct {
	Info fs.FileInfo // nil if there is nothing, or if it cannot be seen
	Err  error       // why there is no Info: wraps fs.ErrNotExist or fs.ErrPermission

	Folder   string // the nearest folder above it that exists
	Writable error  // nil: the process may make files in Folder
}

// Place looks at an absolute path.
func (h *Host) Place(path string) Place {
	var p Place
	p.Info, p.Err = h.stat(path)
	for p.Folder = filepath.Dir(path); p.Folder != "/"; p.Folder = filepath.Dir(p.Folder) {
		if info, err := h.stat(p.Folder); err == nil && info.IsDir() {
			break
		}
	}
	p.Writable = h.Access(p.Folder, unix.W_OK|unix.X_OK)
	return p
}

func (h *Host) stat(path string) (fs.FileInfo, error) {
	if path = strings.TrimPrefix(filepath.Clean(path), "/"); path == "" {
		path = "."
	}
	return fs.Stat(h.Files, path)
}
