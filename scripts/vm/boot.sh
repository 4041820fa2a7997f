#!/bin/bash
# Run a script as root in a small virtual machine with Debian's own kernel, which has what containers often lack: ESP,
# XFRM, BTF, XDP, tc. QEMU emulates the processor in software, so neither KVM nor privileges are needed.
#
#   boot.sh [-t SECONDS] [-m MIB] [-c CPUS] SCRIPT [FILE...]
#
# SCRIPT is run by bash in the directory /x of the guest, the FILEs (files or directories) lie beside it. Guest programs
# have to be static (CGO_ENABLED=0) or to be among those below. There is no network to the outside and no disk.
# The console goes to standard output; the exit status is SCRIPT's, 124 after SECONDS (default 300), 125 when the guest
# did not come up.
#
# What is missing on this host is installed with apt-get, which may ask for root. The kernel and a base image stay in
# ${XDG_CACHE_HOME:-~/.cache}/gmgate-vm: the first call takes about half a minute, later ones boot in about 5 s.
set -euo pipefail

seconds=300 mib=1024 cpus=2
while getopts t:m:c: option; do
  case $option in
    t) seconds=$OPTARG ;;
    m) mib=$OPTARG ;;
    c) cpus=$OPTARG ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
done
shift $((OPTIND - 1))
[[ $# -ge 1 && -r $1 ]] || { echo "usage: ${0##*/} [-t SECONDS] [-m MIB] [-c CPUS] SCRIPT [FILE...]" >&2; exit 2; }
script=$1
shift

# Programs of the host that the guest gets, with their libraries. The rest is busybox.
guest_programs=(bash ip ss tc modprobe)
# Kernel modules that the guest gets: folders and files, as far as the kernel has them.
guest_modules=(arch crypto lib net drivers/net/{veth,tun,dummy}.ko)

cache=${XDG_CACHE_HOME:-$HOME/.cache}/gmgate-vm
mkdir -p "$cache"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

say() { echo "${0##*/}: $*" >&2; }
as_root() { if ((EUID == 0)); then "$@"; else sudo "$@"; fi; }

# install_missing installs the packages whose program is not there.
install_missing() {
  local pair missing=()
  for pair in qemu-system-x86:qemu-system-x86_64 busybox-static:busybox kmod:modprobe cpio:cpio zstd:zstd iproute2:ip; do
    command -v "${pair#*:}" >/dev/null || missing+=("${pair%%:*}")
  done
  ((${#missing[@]})) || return 0
  say "installing ${missing[*]}"
  as_root apt-get update -qq
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# fetch_kernel unpacks the kernel package that the meta package stands for today into $cache/kernel.
fetch_kernel() {
  [[ -d $cache/kernel ]] && return
  local package
  kernel_of_meta() { apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/.*Depends: \(linux-image-[0-9][^ ]*\)/\1/p' | head -1; }
  package=$(kernel_of_meta)
  if [[ -z $package ]]; then
    as_root apt-get update -qq
    package=$(kernel_of_meta)
  fi
  [[ -n $package ]] || { say "apt-get knows no linux-image-cloud-amd64"; exit 125; }
  say "fetching $package"
  (cd "$tmp" && apt-get download -qq "$package" && dpkg -x "$package"_*.deb kernel) || { say "cannot get $package"; exit 125; }
  mv "$tmp/kernel" "$cache/kernel"
}

# put copies a program of the host and the libraries it needs into a root.
put() {
  local root=$1 program file library
  program=$(command -v "$2")
  file=$(readlink -f "$program")
  cp "$file" "$root/sbin/$2"
  ldd "$file" | grep -o '/[^ ]*' | while read -r library; do
    mkdir -p "$root${library%/*}"
    cp -Ln "$library" "$root$library"
  done
}

# build_base makes the image that all guests share: modules, busybox, programs and /init.
build_base() {
  local root=$tmp/base version modules path
  version=$(basename "$cache"/kernel/lib/modules/*)
  say "packing base image with Linux $version"
  mkdir -p "$root"/{bin,sbin,usr/sbin,usr/bin,lib/modules,proc,sys,dev,tmp,run,var,etc,x,cgroup}
  ln -s ../run "$root/var/run"
  cp "$(command -v busybox)" "$root/bin/busybox"
  modules=lib/modules/$version
  for path in "${guest_modules[@]}"; do
    [[ -e $cache/kernel/$modules/kernel/$path ]] || continue
    mkdir -p "$(dirname "$root/$modules/kernel/$path")"
    cp -r "$cache/kernel/$modules/kernel/$path" "$root/$modules/kernel/$path"
  done
  cp "$cache/kernel/$modules"/modules.{order,builtin,builtin.modinfo} "$root/$modules/"
  depmod -b "$root" "$version"
  for program in "${guest_programs[@]}"; do put "$root" "$program"; done
  cat >"$root/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin
rm -f /bin/ip /bin/modprobe # those of the host can do more
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mkdir -p /run/netns /dev/net
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 none /cgroup
export PATH=/sbin:/usr/sbin:/usr/bin:/bin HOME=/tmp
echo /sbin/modprobe >/proc/sys/kernel/modprobe # the kernel loads crypto modules through it
for m in af_packet veth tun xfrm_user esp4 esp6; do modprobe -q $m; done
ln -s /proc/self/fd /dev/fd
[ -c /dev/net/tun ] || mknod /dev/net/tun c 10 200
ulimit -n 65536
ip link set lo up
cd /x
/sbin/bash ./run.sh
echo "GUEST-EXIT $?"
sync
poweroff -f
INIT
  chmod +x "$root/init"
  (cd "$root" && find . | cpio -o -H newc --quiet) | zstd -q -6 >"$tmp/base.zst"
  mv "$tmp/base.zst" "$1"
}

# One caller at a time prepares the cache. The base image's name holds what it was made of.
install_missing
exec 9>"$cache/lock"
flock 9
fetch_kernel
base=$cache/base-$(cat "$0" "$cache"/kernel/boot/config-* | sha256sum | cut -c1-16).zst
if [[ ! -e $base ]]; then
  rm -f "$cache"/base-*.zst
  build_base "$base"
fi

# The kernel unpacks concatenated archives one after the other: ours, uncompressed, then the base.
mkdir -p "$tmp/overlay/x"
cp "$script" "$tmp/overlay/x/run.sh"
for file in "$@"; do cp -a "$file" "$tmp/overlay/x/"; done
(cd "$tmp/overlay" && find . | cpio -o -H newc --quiet) >"$tmp/initrd"
cat "$base" >>"$tmp/initrd"
exec 9>&-

# tidy drops what firmware and kernel write around the script's output, terminal control sequences above all.
tidy() {
  sed -u -e 's/\r//g; s/\x1b\[[0-9;?=]*[a-zA-Z]//g; s/\x1bc//g' -e '/^SeaBIOS /d; /^Booting from ROM/d; /reboot: Power down$/d; /^$/d'
}

status=0
timeout --foreground "$seconds" qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp "$cpus" -m "$mib" \
  -nographic -no-reboot -nic none -kernel "$cache"/kernel/boot/vmlinuz-* -initrd "$tmp/initrd" \
  -append "console=ttyS0 panic=-1 quiet" </dev/null 2>&1 | tidy | tee "$tmp/console" | grep --line-buffered -v '^GUEST-EXIT ' ||
  status=${PIPESTATUS[0]}
if [[ $status == 124 ]]; then
  say "guest stopped after $seconds s"
  exit 124
fi
status=$(sed -n 's/^.*GUEST-EXIT \([0-9]*\).*/\1/p' "$tmp/console" | tail -1)
exit "${status:-125}"
