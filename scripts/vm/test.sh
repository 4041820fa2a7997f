#!/bin/bash
# Run the tests that need a kernel with ESP in a virtual machine (see boot.sh). `make test-vm` calls this.
#
#   test.sh [-t SECONDS] [TEST-FLAG...]       for example: test.sh -test.run TestTraffic
#
# Test binaries are built statically here and run as root in the guest, one after the other, with GMGATE_GUEST=1 and
# REQUIRE_KERNEL_TESTS=1: what skips elsewhere for lack of a kernel feature fails there. The number of XFRM states and
# policies in all namespaces is printed before, at its highest during, and after: after has to be 0.
set -euo pipefail

# Packages whose tests run in the guest, and programs that lie beside them there: the end-to-end tests find the daemon by
# GMGATE_BINARY.
packages=(dataplane/guard dataplane/xfrm bench/ue bench/e2e cmd/gmgate)
programs=(cmd/gmgate)
# Runs of a package with other settings than the one and only: PACKAGE|VARIABLES|TEST-FLAGS. A package that is listed
# here runs once for each of its lines, with those of its tests that the ESP below makes a difference to: the processor is
# emulated. The two ESP implementations check each other, both ways round.
variants=(
  'bench/e2e|GMGATE_E2E_BACKEND=xfrm GMGATE_E2E_UE=userspace GMGATE_E2E_SLOW=1|-test.run=TestLife$|TestSuites|TestLargeDatagrams|TestESPAttacks|TestConnectionGone|TestDaemonCrash|TestHostilePhones|TestStrangerTraffic|TestReregist|TestOldSetLeaves|TestRestart|TestNetworkDeregistration|TestGuardUnknownSPI|TestGuardHooks|TestMove$'
  'bench/e2e|GMGATE_E2E_BACKEND=userspace GMGATE_E2E_UE=xfrm GMGATE_E2E_SLOW=1|-test.run=TestLife$|TestSuites'
  'cmd/gmgate|GMGATE_E2E_BACKEND=xfrm|-test.run=TestDemoLifecycle|TestPreflightHere'
)

seconds=1500
if [[ ${1:-} == -t ]]; then
  seconds=$2
  shift 2
fi
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

mkdir -p "$out/bin" "$out/tests"
for p in "${programs[@]}"; do
  CGO_ENABLED=0 go build -trimpath -o "$out/bin/${p##*/}" "./$p"
done
for p in "${packages[@]}"; do
  mkdir -p "$out/tests/$p"
  CGO_ENABLED=0 go test -c -trimpath -o "$out/tests/$p/test" "./$p"
  if [[ -d $p/testdata ]]; then cp -r "$p/testdata" "$out/tests/$p/"; fi
done
printf '%q ' "$@" >"$out/flags"
printf '%s\n' "${variants[@]}" >"$out/variants"

cat >"$out/guest.sh" <<'GUEST'
export GMGATE_GUEST=1 REQUIRE_KERNEL_TESTS=1 GMGATE_BINARY=/x/bin/gmgate
eval "flags=($(cat /x/flags))"

# Loading the crypto modules takes seconds in an emulated processor: do it before any test measures its patience.
sha1=0x0102030405060708090a0b0c0d0e0f1000000000 key=0x0102030405060708090a0b0c0d0e0f10
warm() {
  for ends in "src 192.0.2.1 dst 192.0.2.2" "src 2001:db8::1 dst 2001:db8::2"; do
    ip xfrm state add $ends proto esp spi "$1" mode transport "${@:2}" || echo "cannot warm up: ${*:2:2} ${*:4}"
  done
}
warm 0x1001 auth-trunc 'hmac(sha1)' $sha1 96 enc 'cbc(aes)' $key
warm 0x1002 auth-trunc 'hmac(md5)' $key 96 enc 'cbc(des3_ede)' 0x0102030405060708090a0b0c0d0e0f101112131415161718
warm 0x1003 auth-trunc 'hmac(sha1)' $sha1 96 enc 'ecb(cipher_null)' ''
warm 0x1004 aead 'rfc4106(gcm(aes))' ${key}11121314 128
warm 0x1005 aead 'rfc4543(gcm(aes))' ${key}11121314 128
ip xfrm state flush

# count adds up states and policies of all namespaces: "STATES POLICIES".
count() {
  for n in "" $(ip netns list | cut -d' ' -f1); do
    ip ${n:+-n $n} xfrm state count; ip ${n:+-n $n} xfrm policy count
  done 2>/dev/null | awk '/SAD/ { s += $NF } /SPD/ { for (i = 1; i < NF; i++) if ($i ~ /^(IN|OUT|FWD)$/) p += $(i + 1) } END { print s + 0, p + 0 }'
}

# watch writes the highest counts to /tmp/peak until it is killed.
watch() {
  states=0 policies=0
  while read -r s p < <(count); do
    ((s > states)) && states=$s
    ((p > policies)) && policies=$p
    echo "$states $policies" >/tmp/peak
    sleep 0.2
  done
}

read -r states policies < <(count)
echo "before: $states XFRM states, $policies policies"
before="$states/$policies"
echo "0 0" >/tmp/peak
watch & watcher=$!

failed=0 packages=0
# run_tests PACKAGE VARIABLES TEST-FLAG...
run_tests() {
  local package=$1 variables=$2 status
  shift 2
  echo "--- $package $variables"
  (cd "/x/tests/$package" && env $variables ./test -test.v -test.timeout 20m "$@" "${flags[@]}"; echo "$?" >/tmp/status) 2>&1 |
    tee -a /tmp/log | grep -v '^=== '
  ((packages += 1))
  read -r status </tmp/status
  if [[ $status != 0 ]]; then
    ((failed += 1))
    echo "--- $package $variables FAILED"
  fi
}
for binary in $(find /x/tests -name test -type f | sort); do
  package=${binary#/x/tests/} package=${package%/test} found=
  while IFS='|' read -r p variables test_flags; do
    [[ $p == "$package" ]] || continue
    found=1
    run_tests "$package" "$variables" ${test_flags:+"$test_flags"}
  done </x/variants
  [[ $found ]] || run_tests "$package" ""
done

{ kill $watcher && wait $watcher; } 2>/dev/null
read -r peak_states peak_policies </tmp/peak
echo "during: up to $peak_states XFRM states, $peak_policies policies seen in samples"
read -r states policies < <(count)
echo "after: $states XFRM states, $policies policies"
((states + policies)) && { failed=$((failed + 1)); echo "XFRM states or policies are left behind"; ip xfrm policy; }

# Top-level tests only; their subtests are part of them.
passes=$(grep -c '^--- PASS' /tmp/log) fails=$(grep -c '^--- FAIL' /tmp/log) skips=$(grep -c '^--- SKIP' /tmp/log)
verdict=FAILED
((failed == 0 && passes > 0)) && verdict=OK
echo "test-vm $verdict: $packages packages, $passes tests passed, $fails failed, $skips skipped on Linux $(uname -r); states/policies $before before, $peak_states/$peak_policies seen during, $states/$policies after"
[[ $verdict == OK ]]
GUEST

status=0
"$here/boot.sh" -t "$seconds" "$out/guest.sh" "$out/tests" "$out/bin" "$out/flags" "$out/variants" || status=$?
if ((status >= 124)); then echo "test-vm FAILED: the guest did not finish (status $status)"; fi
exit "$status"
