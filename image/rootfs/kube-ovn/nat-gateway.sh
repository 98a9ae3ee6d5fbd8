#!/bin/bash
# Kube-OVN's controller runs every verb as `bash /kube-ovn/nat-gateway.sh VERB [RULE ...]`.
# No fork on the way: bash only becomes the client, which asks the gateway's daemon.

self=${BASH_SOURCE[0]}
if [[ -L $self ]]; then
    self=$(readlink -f -- "$self")
fi
here=.
if [[ $self == */* ]]; then
    here=${self%/*}
fi

# Perl asks a daemon that listens, in a third of Python's time; it needs a Python for all else. Nothing that is set for
# other Perl programs may change what this one does, or have it say something on stderr.
become_client() {
    if [[ -x $perl ]]; then
        unset PERL5LIB PERL5OPT PERLIO PERL_UNICODE
        PERL_BADLANG=0 exec "$perl" -f "$here/natgw_verb.pl" "$@"
    fi
    exec "$1" -I -S -B "$here/natgw_verb.py" "${@:2}"
}

perl=${NATGW_PERL-/usr/bin/perl}
if [[ -n $NATGW_PYTHON ]]; then
    become_client "$NATGW_PYTHON" "$@"
fi
# The image's own Python, or that of the checkout that this script lies in.
for python in /opt/natgw/bin/python3 "$here/../../../.venv/bin/python"; do
    if [[ -x $python ]]; then
        become_client "$python" "$@"
    fi
done
echo "nat-gateway: no Python: neither /opt/natgw/bin/python3 nor $here/../../../.venv/bin/python; set NATGW_PYTHON" >&2
exit 1
