#!/bin/bash
# Kube-OVN runs this in the privileged init container of a VpcEgressGateway's pod: it makes the pod's network namespace
# forward, route and masquerade as the environment says, and ends. The exit code says whether it does.

self=${BASH_SOURCE[0]}
if [[ -L $self ]]; then
    self=$(readlink -f -- "$self")
fi
here=.
if [[ $self == */* ]]; then
    here=${self%/*}
fi

# The image's own Python, or that of the checkout that this script lies in.
for python in "$NATGW_PYTHON" /opt/natgw/bin/python3 "$here/../../../.venv/bin/python"; do
    if [[ -x $python ]]; then
        exec "$python" -P -m api.egress
    fi
done
echo "init-vpc-egress-gateway: no Python: neither /opt/natgw/bin/python3 nor $here/../../../.venv/bin/python; set NATGW_PYTHON" >&2
exit 1
