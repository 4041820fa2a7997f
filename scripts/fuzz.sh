#!/bin/bash
# Run every fuzz target of the module, one after the other: fuzz.sh [TIME], 10s each by default.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-10s}
targets=0 failed=()
while read -r package; do
  list=$(go test -list '^Fuzz' "$package")
  for target in $(grep '^Fuzz' <<<"$list" || true); do
    echo "--- $target in $package"
    targets=$((targets + 1))
    go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" "$package" || failed+=("$package $target")
  done
done < <(go list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}{{end}}' ./...)
echo "$targets fuzz targets, ${#failed[@]} failed"
if ((${#failed[@]})); then printf '  %s\n' "${failed[@]}"; fi
((targets > 0 && ${#failed[@]} == 0))
