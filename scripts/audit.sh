#!/usr/bin/env bash
# Look what the image installs and is built with up among the known vulnerabilities of Python packages (pypi.org's data).
# Exit status 0: all were looked up and nothing is known; 1: something is known; 2: no verdict, for not all could be
# looked up, which one line says.
set -euo pipefail
cd "$(dirname "$0")/.."

VERSION=2.10.1
tool=build/audit
if [ ! -x "$tool/bin/pip-audit" ]; then
    python=$(scripts/find-python.sh)
    "$python" -m venv "$tool"
    "$tool/bin/pip" install -q "pip-audit==$VERSION"
fi
report=$tool/report.json
known=0
rm -f "$report"
"$tool/bin/pip-audit" -r requirements.lock -r requirements-build.lock --require-hashes --disable-pip --progress-spinner off \
    -f json -o "$report" 2>"$tool/stderr" || known=$?
[ -s "$report" ] || { echo "audit: NOTHING CHECKED: pip-audit ended with $known: $(tail -n 1 "$tool/stderr")"; exit 2; }
exec "$tool/bin/python" scripts/audit_verdict.py "$report"
