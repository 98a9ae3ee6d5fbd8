#!/bin/bash
# Kube-OVN's controller runs every verb of a Service's load balancer pod as `bash /kube-ovn/lb-svc.sh VERB [RULE ...]`.
# It is the same client and the same daemon as nat-gateway.sh's; the first word says which face is asked.

self=${BASH_SOURCE[0]}
if [[ -L $self ]]; then
    self=$(readlink -f -- "$self")
fi
here=.
if [[ $self == */* ]]; then
    here=${self%/*}
fi
source "$here/nat-gateway.sh" lb-svc "$@"
