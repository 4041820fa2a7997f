#!/bin/bash
# Compile an eBPF program and generate its Go file; `go generate ./bpf` calls this.
#
#   bpf2go.sh NAME SOURCE TYPE...
#
# Debian keeps asm/types.h in a folder named after the machine. It goes last, so that nothing else is taken from there.
set -euo pipefail
name=$1 source=$2
shift 2
types=()
for t in "$@"; do types+=(-type "$t"); done
exec go tool -modfile=../scripts/tools.mod bpf2go -tags linux -target bpfel -cc clang -strip llvm-strip \
  -cflags "-O2 -g -Wall -Werror -mcpu=v3 -idirafter /usr/include/$(gcc -dumpmachine)" "${types[@]}" "$name" "$source"
