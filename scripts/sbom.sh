#!/usr/bin/env bash
# List what is in the image that `make image` built, as CycloneDX JSON in build/sbom:
#   debian.cdx.json   Debian's packages, with their licences, from the image's own package database (debsbom)
#   python.cdx.json   the Python packages, with hashes, from the lock that the image is installed from (cyclonedx-py)
set -euo pipefail
cd "$(dirname "$0")/.."

DEBSBOM=0.10.2 CYCLONEDX=7.5.0
IMAGE=localhost/vpc-nat-gateway:test
out=build/sbom venv=build/sbom-venv

eval "$(scripts/image.sh env)"
podman image exists "$IMAGE" || { echo "sbom: there is no image: run \`make image\`" >&2; exit 1; }
"$(scripts/find-python.sh)" -m venv --clear "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check "debsbom==$DEBSBOM" "cyclonedx-bom==$CYCLONEDX"

mkdir -p "$out"
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
root=$(podman image mount "$IMAGE")
trap 'podman image unmount "$IMAGE" >/dev/null' EXIT
"$venv/bin/debsbom" generate --sbom-type cdx --root "$root" --with-licenses --distro-name vpc-nat-gateway \
    --distro-version "$version" --out "$out/debian"
"$venv/bin/cyclonedx-py" requirements requirements.lock --pyproject pyproject.toml --output-reproducible \
    --output-file "$out/python.cdx.json"
ls -l "$out"
