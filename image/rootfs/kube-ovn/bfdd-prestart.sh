#!/bin/bash
# Startup probe of a `bfdd` container: tell the speaker its intervals (milliseconds) and its peers.
# The probe runs once, a second after the start, and has one second; so it is one client for all commands, and it waits
# for a speaker that is a little late.
set -eu

{
    echo "session new set mintx ${BFD_MIN_TX:-1000} ms"
    echo "session new set minrx ${BFD_MIN_RX:-1000} ms"
    echo "session new set multi ${BFD_MULTI:-3}"
    IFS=, read -ra peers <<<"${BFD_PEER_IPS:-}"
    for peer in "${peers[@]}"; do
        echo "allow $peer"
    done
    echo "log type command no"
} | bfdd-control --wait=1 load /dev/stdin
