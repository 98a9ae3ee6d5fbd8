#!/usr/bin/env bash
# The container image, with podman and a store of its own in build/containers; nothing of the system's is touched.
#
#   scripts/image.sh build      build the image, print its sizes, leave it as build/vpc-nat-gateway.tar (an OCI archive)
#   scripts/image.sh twice      build it twice from nothing and compare: the same commit must give the same digest
#   scripts/image.sh env        print the settings with which `podman` finds what was built: eval "$(scripts/image.sh env)"
#   scripts/image.sh remove     remove the store
#
# BASE says where debian:trixie-slim comes from: `registry`, `stand-in` (made of Debian's packages by mmdebstrap, which
# needs no registry; not for release), or `auto`: a stand-in where no registry answers, and a line that says so.
# What pip needs on this machine (an index, a certificate) is passed as build secrets and stays in no layer.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

BASE=${BASE:-auto}
BASE_NAME=debian:trixie-slim SUITE=trixie
IMAGE=localhost/vpc-nat-gateway
ARCHIVE=build/vpc-nat-gateway.tar
STORE=$PWD/build/containers
# The stand-in is the same for every checkout: made again when a week has passed.
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/vpc-nat-gateway

say() { printf 'image: %s\n' "$*" >&2; }
fail() { say "$@"; exit 1; }
version() { sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml; }

# Run a command that talks too much: what it said is shown only if it fails.
quietly() {
    "$@" >"$STORE/tmp/log" 2>&1 </dev/null || { local status=$?; cat "$STORE/tmp/log" >&2; return $status; }
}

megabytes() { awk -v bytes="$1" 'BEGIN { printf "%.1f MB", bytes / 1e6 }'; }

# A store of our own. cgroupfs, a file for events and runc do without systemd; where root has not every privilege (in a
# container itself), podman's default limits are more than it may set.
make_store() {
    mkdir -p "$STORE"/{etc,storage,run,libpod,tmp}
    cat >"$STORE/etc/storage.conf" <<END
[storage]
driver = "overlay"
graphroot = "$STORE/storage"
runroot = "$STORE/run"
END
    cat >"$STORE/etc/containers.conf" <<END
[containers]
default_ulimits = ["nofile=$(ulimit -Hn):$(ulimit -Hn)", "nproc=32768:32768"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
tmp_dir = "$STORE/libpod"
static_dir = "$STORE/storage/libpod"
volume_path = "$STORE/storage/volumes"
[network]
network_config_dir = "$STORE/etc/cni"
END
    export CONTAINERS_STORAGE_CONF=$STORE/etc/storage.conf CONTAINERS_CONF=$STORE/etc/containers.conf
    export TMPDIR=$STORE/tmp BUILDAH_ISOLATION=chroot
}

print_env() {
    make_store
    local name
    for name in CONTAINERS_STORAGE_CONF CONTAINERS_CONF TMPDIR BUILDAH_ISOLATION; do
        printf 'export %s=%q\n' "$name" "${!name}"
    done
}

# --- the base -----------------------------------------------------------------------------------------------------------

make_base() {
    if [ "$BASE" = registry ]; then
        podman pull --quiet "$BASE_NAME" >/dev/null
    elif podman image exists "$BASE_NAME"; then
        :
    elif [ "$BASE" = auto ] && timeout 30 podman pull --quiet "$BASE_NAME" >/dev/null 2>&1; then
        :
    else
        say "the base is a stand-in made of Debian's packages: good for tests, not for release"
        stand_in
    fi
}

stand_in() {
    local tar=$CACHE/$SUITE.tar
    if [ -z "$(find "$tar" -mtime -7 2>/dev/null)" ]; then
        mkdir -p "$CACHE"
        bootstrap "$tar.$$"
        mv "$tar.$$" "$tar"
    fi
    podman import --quiet --change 'CMD ["bash"]' "$tar" "localhost/$BASE_NAME" >/dev/null
}

# As the official slim images are made: minbase without documentation, no package cache in any layer.
bootstrap() {
    local mirror security clean path options=()
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Identifier: Packages' | grep -m1 '/debian/$')
    security=$(apt-get indextargets --format '$(REPO_URI)' 'Identifier: Packages' | grep -m1 security)
    for path in man info doc locale lintian groff linda; do
        options+=(--dpkgopt="path-exclude=/usr/share/$path/*")
    done
    clean='"rm -f /var/cache/apt/archives/*.deb /var/cache/apt/archives/partial/*.deb /var/cache/apt/*.bin || true";'
    quietly mmdebstrap --quiet --mode=root --variant=minbase --format=tar --dpkgopt=force-unsafe-io "${options[@]}" \
        --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        --aptopt='Acquire::Languages "none"' --aptopt='Acquire::GzipIndexes "true"' \
        --aptopt='Apt::AutoRemove::SuggestsImportant "false"' \
        --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr --include=usr-is-merged \
        --customize-hook='rm -f "$1"/etc/resolv.conf "$1"/etc/hostname' \
        "$SUITE" "$1" \
        "deb $mirror $SUITE main" "deb $mirror $SUITE-updates main" "deb $security $SUITE-security main"
    # Appended, because mmdebstrap's own cleaning needs the cache.
    mkdir -p "$STORE/tmp/base/etc/apt/apt.conf.d"
    printf 'DPkg::Post-Invoke { %s };\nAPT::Update::Post-Invoke { %s };\nDir::Cache::pkgcache "";\nDir::Cache::srcpkgcache "";\n' \
        "$clean" "$clean" >"$STORE/tmp/base/etc/apt/apt.conf.d/docker-clean"
    tar --append --file="$1" --owner=0 --group=0 --mode=0644 -C "$STORE/tmp/base" ./etc/apt/apt.conf.d/docker-clean
    rm -rf "$STORE/tmp/base"
}

# --- the image ----------------------------------------------------------------------------------------------------------

pip_says() { "$python" -m pip config get ":env:.$1" 2>/dev/null || "$python" -m pip config get "global.$1" 2>/dev/null; }

# What this machine's pip is configured with, as files for --secret; none where nothing is configured.
build_secrets() {
    local key value directory=$STORE/tmp/secrets
    python=$(scripts/find-python.sh)
    (umask 077 && mkdir -p "$directory" && echo '[global]' >"$directory/pip.conf")
    for key in index-url extra-index-url trusted-host proxy timeout; do
        ! value=$(pip_says "$key") || printf '%s = %s\n' "$key" "$value" >>"$directory/pip.conf"
    done
    if value=$(pip_says cert) && [ -r "$value" ]; then
        cp "$value" "$directory/ca.crt"
        echo 'cert = /run/secrets/ca.crt' >>"$directory/pip.conf"
        secrets+=(--secret "id=ca,src=$directory/ca.crt")
    fi
    secrets+=(--secret "id=pip_conf,src=$directory/pip.conf")
}

# The times of files are the commit's, so that what does not differ has the same digest.
build_image() {
    local revision=unknown epoch=0 secrets=() status=0
    if git rev-parse --quiet --verify HEAD >/dev/null 2>&1; then
        revision=$(git rev-parse HEAD) epoch=$(git log -1 --format=%ct)
    fi
    build_secrets
    quietly podman build --pull=never --network host --timestamp "${SOURCE_DATE_EPOCH:-$epoch}" "${secrets[@]}" \
        --build-arg "REVISION=$revision" --tag "$1" --file image/Dockerfile "${@:2}" . || status=$?
    rm -rf "$STORE/tmp/secrets"
    return $status
}

build() {
    local started=$SECONDS
    make_base
    build_image "$IMAGE:$(version)"
    podman tag "$IMAGE:$(version)" "$IMAGE:test"
    rm -f "$ARCHIVE"
    podman push --quiet "$IMAGE:$(version)" "oci-archive:$ARCHIVE:$(version)"
    printf '%s:%s (%s)\n%s unpacked, %s compressed, %d s\n' "$IMAGE" "$(version)" "$ARCHIVE" \
        "$(megabytes "$(podman image inspect "$IMAGE:test" --format '{{.Size}}')")" \
        "$(megabytes "$(stat -c %s "$ARCHIVE")")" $((SECONDS - started))
}

twice() {
    local tag
    make_base
    for tag in one two; do
        build_image "$IMAGE:$tag" --no-cache
    done
    [ "$(layers one)" = "$(layers two)" ] || fail "two builds of one commit differ:
$(diff <(layers one) <(layers two))"
    layers one
    say "two builds, the same $(layers one | wc -l) layers"
    podman rmi "$IMAGE:one" "$IMAGE:two" >/dev/null
}

layers() { podman image inspect "$IMAGE:$1" --format '{{range .RootFS.Layers}}{{println .}}{{end}}'; }

remove() {
    [ -d "$STORE" ] || return 0
    make_store
    podman rm --all --force --time 0 >/dev/null || true
    rm -rf "$STORE"
}

case ${1:-} in
env) print_env; exit ;;
build | twice | remove) ;;
*) fail "usage: scripts/image.sh build|twice|env|remove" ;;
esac
[ "$(id -u)" = 0 ] || fail "run it as root"
command -v podman >/dev/null || fail "podman is missing: scripts/setup.sh image installs it"
make_store
"$1"
