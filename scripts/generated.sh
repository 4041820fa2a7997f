#!/bin/bash
# Make the eBPF objects anew and compare them with those that are committed. Another compiler makes other code of the same
# source, so the comparison is for the one of Debian 12; REQUIRE_KERNEL_TESTS=1 turns its absence into a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
compiler=14

found=$(clang --version 2>/dev/null | sed -n 's/.*clang version \([0-9]*\).*/\1/p' || true)
if [[ $found != "$compiler" ]]; then
  echo "generated: clang $compiler is not here (found: ${found:-none}), the eBPF objects are not compared"
  [[ ${REQUIRE_KERNEL_TESTS:-} != 1 ]]
  exit
fi
before=$(cd bpf && sha256sum -- *_bpfel.*)
go generate ./bpf
after=$(cd bpf && sha256sum -- *_bpfel.*)
if [[ $before != "$after" ]]; then
  echo "generated: the eBPF objects are not what their sources make; they were made anew, commit them:"
  diff <(echo "$before") <(echo "$after") || true
  exit 1
fi
