#!/usr/bin/env bash
# Pin every Python dependency, with hashes, from pyproject.toml:
#   requirements.lock        what the gateway itself runs on (the image installs only this)
#   requirements-dev.lock    the same versions, and what the checks and tests need
#   requirements-build.lock  the build backend, so that building from source asks no index for one
# Versions already pinned stay unless UPGRADE=1 is set. Run it with the oldest supported Python (3.11):
# what a newer one does not need is then merely installed too; the other way round it would be missing.
set -euo pipefail
cd "$(dirname "$0")/.."

PIP_TOOLS=7.6.2
venv=build/lock-venv
python=$(scripts/find-python.sh)
"$python" -m venv --clear "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check "pip-tools==$PIP_TOOLS"

compile() {
    # The index options of this machine's pip configuration are used, and never written into a lock.
    "$venv/bin/pip-compile" --quiet ${UPGRADE:+--upgrade} --generate-hashes --strip-extras --allow-unsafe \
        --no-header --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options "$@" pyproject.toml
}

compile --extra dev --output-file requirements-dev.lock
compile --constraint requirements-dev.lock --output-file requirements.lock
compile --only-build-deps --all-build-deps --output-file requirements-build.lock
