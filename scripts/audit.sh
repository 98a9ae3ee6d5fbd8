#!/usr/bin/env bash
# Look the locked Python dependencies up in the vulnerability data of the package index. Exit status 0: all were looked
# up and nothing is known; 1: something is known; 2: no verdict, for not all could be looked up.
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
"$tool/bin/pip-audit" -r requirements.lock --require-hashes --disable-pip --progress-spinner off -f json -o "$report" \
    2>"$tool/stderr" || known=$?
[ -s "$report" ] || { cat "$tool/stderr" >&2; echo "audit: no verdict: pip-audit ended with $known and left no report" >&2; exit 2; }
exec "$tool/bin/python" - "$report" <<'PYTHON'
import json
import sys

found = json.load(open(sys.argv[1]))["dependencies"]
skipped = [one for one in found if "skip_reason" in one]
known = [(one, bad) for one in found for bad in one.get("vulns", ())]
for one, bad in known:
    print(f"{one['name']} {one['version']}: {bad['id']}, mended in {', '.join(bad['fix_versions']) or 'no version yet'}")
print(f"audit: of {len(found)} dependencies {len(found) - len(skipped)} were looked up, {len(known)} known vulnerabilities")
if skipped:
    print(f"audit: no verdict on {len(skipped)}; the first: {skipped[0]['skip_reason']}")
sys.exit(1 if known else 2 if skipped else 0)
PYTHON
