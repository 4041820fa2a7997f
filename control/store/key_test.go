package store

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/gmgate/gmgate/control/ims"
)

func TestKeyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.key")
	k, err := KeyFile(path)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != 0o600 || len(k) != KeySize || bytes.Equal(k, make([]byte, KeySize)) {
		t.Errorf("mode %v, %d octets", info.Mode(), len(k))
	}
	again, err := KeyFile(path)
	if err != nil || !bytes.Equal(again, k) {
		t.Errorf("the second time it is another key (%v)", err)
	}
	if names, _ := filepath.Glob(filepath.Join(filepath.Dir(path), "*")); len(names) != 1 {
		t.Errorf("left behind: %v", names)
	}
	if hidden, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".*")); len(hidden) != 0 {
		t.Errorf("left behind: %v", hidden)
	}
	if err := createKey(path); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a key was overwritten: %v", err)
	}
	if err := os.Chmod(path, 0o400); err != nil {
		t.Fatal(err)
	}
	if _, err := KeyFile(path); err != nil {
		t.Errorf("mode 0400: %v", err)
	}
}

// Processes that make the file at the same time agree on the key.
func TestKeyFileRace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.key")
	keys := make([]ims.Key, 8)
	var wg sync.WaitGroup
	for i := range keys {
		wg.Go(func() {
			var err error
			if keys[i], err = KeyFile(path); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, k := range keys {
		if !bytes.Equal(k, keys[0]) {
			t.Fatal("two keys")
		}
	}
}

func TestKeyFileRefused(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, n int, mode fs.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, bytes.Repeat([]byte("S"), n), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		write("group", KeySize, 0o640):   "mode 0640",
		write("world", KeySize, 0o604):   "mode 0604",
		write("write", KeySize, 0o620):   "mode 0620",
		write("short", KeySize-1, 0o600): "31 octets instead of 32",
		write("long", KeySize+1, 0o600):  "33 octets instead of 32",
		write("empty", 0, 0o600):         "0 octets instead of 32",
		dir:                              "not a regular file",
		fifo:                             "not a regular file",
	} {
		k, err := KeyFile(path)
		if k != nil || !errors.Is(err, ErrKeyFile) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: got %v, want %q", path, err, want)
		}
	}
	if k, err := KeyFile(filepath.Join(dir, "no", "dir")); k != nil || err == nil {
		t.Errorf("missing directory: %v", err)
	}
}

func TestCredentialKey(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	if err := os.WriteFile(filepath.Join(dir, "store"), secret, 0o440); err != nil {
		t.Fatal(err)
	}
	if k, err := CredentialKey("store"); err != nil || !bytes.Equal(k, secret) {
		t.Errorf("got %v, %v", k, err)
	}
	for _, name := range []string{"", ".", "..", "../store", "a/b"} {
		if _, err := CredentialKey(name); !errors.Is(err, ErrKeyFile) {
			t.Errorf("name %q: %v", name, err)
		}
	}
	if _, err := CredentialKey("other"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	t.Setenv("CREDENTIALS_DIRECTORY", "")
	if _, err := CredentialKey("store"); !errors.Is(err, ErrKeyFile) {
		t.Errorf("no directory: %v", err)
	}
}
