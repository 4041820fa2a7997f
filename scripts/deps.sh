#!/bin/bash
# Install the Debian packages that `make demo` (deps.sh demo) or `make test` (deps.sh) need and that are missing. Does
# nothing, and asks nobody for anything, when all is there. Works as root or through sudo.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin # modprobe and ip are not on every user's path

missing=()
need() { # need PACKAGE FILE-OR-COMMAND
  if [[ $2 == /* ]]; then [[ -e $2 ]] || missing+=("$1"); else command -v "$2" >/dev/null || missing+=("$1"); fi
}
need iproute2 ip
if [[ ${1:-test} != demo ]]; then
  need qemu-system-x86 qemu-system-x86_64
  need busybox-static busybox
  need kmod modprobe
  need cpio cpio
  need zstd zstd
  need tshark tshark
  need make make
  need gcc gcc # the race detector uses cgo
  need libc6-dev /usr/include/stdlib.h
  need clang clang # the eBPF objects are made anew and compared
  need llvm llvm-strip
  need libbpf-dev /usr/include/bpf/bpf_helpers.h
  need linux-libc-dev /usr/include/linux/bpf.h
fi

if ((${#missing[@]} == 0)); then exit 0; fi
echo "installing: ${missing[*]}"
if ! command -v apt-get >/dev/null; then
  echo "this is not Debian: install the equivalents of these packages: ${missing[*]}" >&2
  exit 1
fi
root=()
if ((EUID != 0)); then
  command -v sudo >/dev/null || { echo "run as root: apt-get install ${missing[*]}" >&2; exit 1; }
  root=(sudo)
fi
"${root[@]}" apt-get update -qq
"${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
