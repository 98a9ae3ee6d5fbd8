#!/bin/bash
# What a `bfdd` container runs: the speaker, listening on every address of the pod (POD_IPS, separated by commas).
# It replaces this shell, so that it is the one that hears the SIGTERM of a pod that ends.
set -eu

IFS=, read -ra addresses <<<"${POD_IPS:-::}"
exec bfdd-beacon --nofork --tee --health "${addresses[@]/#/--listen=}"
