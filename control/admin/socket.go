package admin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Permissions: the owner and the group of the process.
const (
	socketMode = 0o660
	folderMode = 0o750
)

// probeTimeout bounds the question whether somebody answers on a socket.
const probeTimeout = time.Second

// unknownUID is the user id of a peer that the kernel does not tell of.
const unknownUID = math.MaxUint32

// ErrInUse says that another process answers on the socket.
var ErrInUse = errors.New("another process answers on it")

// Listen makes the socket. Its folder is made if it is missing. A socket that a process left behind is replaced; one that
// somebody answers on is refused, as is whatever is no socket.
func Listen(ctx context.Context, path string) (net.Listener, error) {
	if err := makeRoom(ctx, path); err != nil {
		return nil, fmt.Errorf("make admin socket %s: %w", path, err)
	}
	// The kernel gives the file the mode of the socket, so nobody else can connect meanwhile, whatever the umask is.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), socketMode) }), err)
	}}
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("make admin socket: %w", err)
	}
	if err := os.Chmod(path, socketMode); err != nil { // the umask took something away
		return nil, errors.Join(fmt.Errorf("make admin socket: %w", err), l.Close())
	}
	return l, nil
}

// makeRoom makes the folder of the socket, and takes away a socket that nobody answers on.
func makeRoom(ctx context.Context, path string) error {
	switch err := os.Mkdir(filepath.Dir(path), folderMode); {
	case err == nil:
		if err := os.Chmod(filepath.Dir(path), folderMode); err != nil { // whatever the umask is
			return err
		}
	case !errors.Is(err, fs.ErrExist):
		return err
	}
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return errors.New("there is something that is no socket")
	}
	d := net.Dialer{Timeout: probeTimeout}
	c, err := d.DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		return errors.Join(ErrInUse, c.Close())
	case !errors.Is(err, unix.ECONNREFUSED): // a full queue, say: somebody is there
		return fmt.Errorf("%w: %w", ErrInUse, err)
	}
	return os.Remove(path)
}

// peerUID returns the user id of the process at the other end.
func peerUID(c net.Conn) uint32 {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return unknownUID
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return unknownUID
	}
	uid := uint32(unknownUID)
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			uid = cred.Uid
		}
	})
	return uid
}
