#!/bin/bash
# Print the packages that have tests: `packages.sh kernel` those whose tests can reach dataplane/hostnet and so may make
# network namespaces, `packages.sh pure` all the others. The import graph decides, so nobody has to keep a list.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
kernel) want=1 ;;
pure) want=0 ;;
*) echo "usage: $0 kernel|pure" >&2; exit 2 ;;
esac
# With -test the list has an entry for every test binary; its dependencies include those of the tests.
go list -test -f '{{if eq .Name "main"}}{{.ImportPath}}{{range .Deps}} {{.}}{{end}}{{end}}' ./... |
  awk -v want="$want" '$1 ~ /\.test$/ {
    kernel = 0
    for (i = 2; i <= NF; i++) if ($i ~ /\/dataplane\/hostnet$/) kernel = 1
    if (kernel == want) { sub(/\.test$/, "", $1); print $1 }
  }'
