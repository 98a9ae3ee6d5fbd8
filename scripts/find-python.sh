#!/usr/bin/env bash
# Print the path of a real Python >= 3.11, or fail. $PYTHON, if set, is the only candidate.
# The system's own interpreter comes first: its headers are a package away, and a version manager's
# "python3" is often a shell wrapper that costs a tenth of a second per start, so that one is resolved
# to the binary behind it.
set -u

candidates=(/usr/bin/python3 python3 python3.11 python3.12 python3.13 python3.14)
[ -z "${PYTHON:-}" ] || candidates=("$PYTHON")

for candidate in "${candidates[@]}"; do
    real=$("$candidate" -I -c 'import os, sys; print(os.path.realpath(sys.executable) if sys.version_info >= (3, 11) else "")' 2>/dev/null) || continue
    [ -n "$real" ] && printf '%s\n' "$real" && exit 0
done
echo "no Python >= 3.11 found (tried: ${candidates[*]}); set PYTHON=/path/to/python3" >&2
exit 1
