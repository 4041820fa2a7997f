package store

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/gmgate/gmgate/control/ims"
)

// ErrKeyFile says that a file cannot serve as key file: the text says why.
var ErrKeyFile = errors.New("unusable key file")

// NewKey returns a fresh sealing key.
func NewKey() (ims.Key, error) {
	k := make(ims.Key, KeySize)
	if _, err := rand.Read(k); err != nil {
		return nil, fmt.Errorf("make sealing key: %w", err)
	}
	return k, nil
}

// KeyFile returns the sealing key in the file at path, which it makes with a fresh key and mode 0600 if there is none.
// A file that others may read or write, or that is not exactly one key long, is refused with ErrKeyFile: the former is
// no secret, the latter is something else.
//
// The file appears with its contents or not at all, so a crash leaves no half a key, and of two processes that make it
// at once both get the same key.
func KeyFile(path string) (ims.Key, error) {
	k, err := readKey(path, true)
	if !errors.Is(err, fs.ErrNotExist) {
		return k, err
	}
	if err := createKey(path); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make key file: %w", err)
	}
	return readKey(path, true)
}

// CredentialKey returns the sealing key which the service manager provides as the credential of this name: the file of
// that name in $CREDENTIALS_DIRECTORY. Only its length is checked: the directory is the service manager's, which also
// sets modes in ways of its own (an access list shows as a group permission).
func CredentialKey(name string) (ims.Key, error) {
	dir := os.Getenv("CREDENTIALS_DIRECTORY")
	if dir == "" {
		return nil, fmt.Errorf("%w: credential %q: CREDENTIALS_DIRECTORY is not set", ErrKeyFile, name)
	}
	if name == "" || name == "." || name == ".." || strings.ContainsRune(name, '/') {
		return nil, fmt.Errorf("%w: %q is not the name of a credential", ErrKeyFile, name)
	}
	return readKey(filepath.Join(dir, name), false)
}

func readKey(path string, private bool) (ims.Key, error) {
	// Without O_NONBLOCK a FIFO would hold us here.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open key file: %w", err)
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read key file: %w", err)
	}
	switch {
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%w: %s is not a regular file", ErrKeyFile, path)
	case private && info.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("%w: %s has mode %04o: others than its owner have access to it; it must be 0600 or 0400",
			ErrKeyFile, path, info.Mode().Perm())
	case info.Size() != KeySize:
		return nil, fmt.Errorf("%w: %s has %d octets instead of %d", ErrKeyFile, path, info.Size(), KeySize)
	}
	k := make(ims.Key, KeySize)
	if _, err := io.ReadFull(f, k); err != nil {
		k.Zero()
		return nil, fmt.Errorf("read key file: %w", err)
	}
	return k, nil
}

// createKey writes a fresh key beside path and links it there, which fails if something is there already.
func createKey(path string) (err error) {
	k, err := NewKey()
	if err != nil {
		return err
	}
	defer k.Zero()
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // O_EXCL and mode 0600
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(f.Name())) }()
	_, err = f.Write(k)
	if err = errors.Join(err, f.Chmod(0o600), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), path); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir makes the names in a directory outlive a power failure.
func SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	return nil
}
