#!/bin/bash
# Kube-OVN's controller runs every verb as `bash /kube-ovn/nat-gateway.sh VERB [RULE ...]`.
# No fork on the way: bash only finds a Python and becomes the client, which asks the gateway's daemon.

self=${BASH_SOURCE[0]}
if [[ -L $self ]]; then
    self=$(readlink -f -- "$self")
fi
here=.
if [[ $self == */* ]]; then
    here=${self%/*}
fi

if [[ -n $NATGW_PYTHON ]]; then
    exec "$NATGW_PYTHON" -I -S -B "$here/natgw_verb.py" "$@"
fi
# The image's own Python, or that of the checkout that this script lies in.
for python in /opt/natgw/bin/python3 "$here/../../../.venv/bin/python"; do
    if [[ -x $python ]]; then
        exec "$python" -I -S -B "$here/natgw_verb.py" "$@"
    fi
done
echo "nat-gateway: no Python: neither /opt/natgw/bin/python3 nor $here/../../../.venv/bin/python; set NATGW_PYTHON" >&2
exit 1
