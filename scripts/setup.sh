#!/usr/bin/env bash
# Make this checkout usable: programs of the system, then Python dependencies into .venv.
#
#   scripts/setup.sh          what the gateway, the lab and the checks need
#   scripts/setup.sh test     that, and the peers the tests talk to
#   scripts/setup.sh image    what the gateway needs, and what builds and tests its image
#
# Nothing is installed that is there already; with everything in place this ends in a fraction of a second.
# Debian packages are installed when apt-get is here and we are root; otherwise the missing ones are named.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# "what must exist:Debian package that brings it"; a bare word is a program in PATH, a path is a file.
RUN_NEEDS=(
    iptables:iptables iptables-legacy:iptables iptables-legacy-restore:iptables iptables-nft-restore:iptables
    nft:nftables ip:iproute2 setsid:util-linux tc:iproute2 conntrack:conntrack sysctl:procps modprobe:kmod
    ping:iputils-ping arping:iputils-arping tcpdump:tcpdump curl:curl
)
BUILD_NEEDS=(gcc:gcc /usr/include/stdio.h:libc6-dev)
TEST_NEEDS=(
    openssl:openssl iperf3:iperf3 nc:netcat-openbsd ethtool:ethtool mkfs.ext4:e2fsprogs mount:mount /usr/lib/frr/bfdd:frr vtysh:frr bird:bird2 birdc:bird2
    chromium:chromium apparmor_parser:apparmor
    ovs-vswitchd:openvswitch-switch ovn-northd:ovn-central ovn-controller:ovn-host promtool:prometheus
)
IMAGE_NEEDS=(
    podman:podman buildah:buildah runc:runc mmdebstrap:mmdebstrap skopeo:skopeo catatonit:catatonit nsenter:util-linux
)

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$@"; exit 1; }

# The packages of "$@" whose program or file is missing, each once.
missing_packages() {
    local need
    for need in "$@"; do
        case ${need%:*} in
        /*) [ -e "${need%:*}" ] || printf '%s\n' "${need##*:}" ;;
        *) command -v "${need%:*}" >/dev/null || printf '%s\n' "${need##*:}" ;;
        esac
    done | sort -u
}

# Run a command that talks too much: what it said is shown only if it fails.
quietly() {
    local output
    output=$("$@" </dev/null 2>&1) || { printf '%s\n' "$output" >&2; return 1; }
}

# Some packages bring a daemon (frr, bird2, Open vSwitch, OVN). The tests start their own; a package must not start one on this machine.
# policy-rc.d is what Debian asks before it starts a service; an existing one is the administrator's, and kept.
apt_install() {
    local policy=/usr/sbin/policy-rc.d apt=(apt-get -qq -o DPkg::Lock::Timeout=300)
    local install=("${apt[@]}" install -y --no-install-recommends "$@")
    export DEBIAN_FRONTEND=noninteractive
    if [ ! -e $policy ]; then
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        printf '#!/bin/sh\n# Here only while vpc-nat-gateway installs packages: starts no service.\nexit 101\n' >$policy
        chmod 755 $policy
    fi
    # The package lists may be absent, or too old to name files that still exist: then, and only then, refresh them.
    "${install[@]}" </dev/null >/dev/null 2>&1 || { "${apt[@]}" update && quietly "${install[@]}"; } || return
    if [ -d /run/systemd/system ]; then
        case " $* " in
        *' frr '*) systemctl --quiet disable frr ;;&
        *' bird2 '*) systemctl --quiet disable bird ;;&
        *' prometheus '*) systemctl --quiet disable prometheus ;;&
        *' openvswitch-switch '*) systemctl --quiet disable openvswitch-switch ;;&
        *' ovn-central '*) systemctl --quiet disable ovn-central ;;&
        *' ovn-host '*) systemctl --quiet disable ovn-host ;;
        esac
    fi
}

install_packages() {
    [ $# -gt 0 ] || return 0
    if ! command -v apt-get >/dev/null; then
        fail "missing, and there is no apt-get here. Install what these Debian packages bring, then run this again: $*"
    elif [ "$(id -u)" != 0 ]; then
        fail "missing: $*. Run: sudo apt-get install -y --no-install-recommends $*"
    fi
    say "installing $*"
    apt_install "$@" >&2 || fail "apt-get could not install: $*"
}

has_venv() { "$1" -I -c 'import ensurepip, venv' 2>/dev/null; }
has_headers() { "$1" -I -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null; }

# python-iptables is compiled at installation: the interpreter needs its headers beside venv.
choose_python() {
    python=$(scripts/find-python.sh) || { install_packages python3 python3-venv python3-dev; python=$(scripts/find-python.sh); }
    if ! has_venv "$python" || ! has_headers "$python"; then
        case $python in
        /usr/bin/*) install_packages python3-venv python3-dev ;;
        esac
    fi
    has_venv "$python" || fail "$python has no venv and ensurepip module; set PYTHON to one that has"
    has_headers "$python" || fail "$python has no C headers (Python.h); set PYTHON to one that has"
}

# What .venv was made from: the locks and the project file, and the place, for its programs carry the path of .venv.
wanted_stamp() { { pwd -P; cat pyproject.toml requirements-build.lock requirements-dev.lock; } | sha256sum; }

# An interpreter that is gone or was upgraded leaves a .venv without pip; one that was moved names another place.
venv_usable() { .venv/bin/python -c 'import pip' 2>/dev/null && grep -qsF " $(pwd -P)/.venv" .venv/pyvenv.cfg; }

install_python() {
    local stamp=.venv/.setup-stamp
    if [ -x .venv/bin/python ] && [ "$(cat $stamp 2>/dev/null)" = "$(wanted_stamp)" ]; then
        return
    fi
    mapfile -t packages < <(missing_packages "${BUILD_NEEDS[@]}")
    install_packages "${packages[@]}"
    if ! venv_usable; then
        # Making it anew would empty the directory behind the link, which belongs to another checkout.
        [ ! -L .venv ] || fail ".venv is a symbolic link to an environment that does not fit this checkout; remove the link first"
        choose_python
        say "making .venv with $python"
        "$python" -m venv --clear .venv
    fi
    say "installing the locked Python dependencies into .venv"
    # What the caller set for pip to install elsewhere does not apply here. PEP 517 also for python-iptables, which still
    # has a setup.py only: an old pip would run that directly, with a page of warnings.
    local pip=(env -u PYTHONPATH -u PIP_USER -u PIP_TARGET -u PIP_PREFIX PIP_USE_PEP517=1
        .venv/bin/python -m pip --quiet --disable-pip-version-check --no-input install)
    "${pip[@]}" --require-hashes -r requirements-build.lock
    # No build isolation: what is built from source is built with the backend just pinned, not with the newest one.
    "${pip[@]}" --no-build-isolation --require-hashes -r requirements-dev.lock
    "${pip[@]}" --no-build-isolation --no-deps --no-index --editable .
    wanted_stamp >$stamp
}

main() {
    local needs=("${RUN_NEEDS[@]}")
    case ${1:-} in
    '') ;;
    test) needs+=("${TEST_NEEDS[@]}") ;;
    image) needs+=("${IMAGE_NEEDS[@]}") ;;
    *) fail "unknown argument: $1 (none, or: test, image)" ;;
    esac
    mapfile -t packages < <(missing_packages "${needs[@]}")
    install_packages "${packages[@]}"
    mapfile -t packages < <(missing_packages "${needs[@]}")
    [ ${#packages[@]} = 0 ] || fail "still missing after installation: what ${packages[*]} should have brought"
    install_python
}

main "$@"
