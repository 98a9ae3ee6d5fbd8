#!/bin/bash
# Liveness probe of a `bfdd` container: the speaker answers and has sessions, in whatever state.
set -eu

status=$(bfdd-control status)
printf '%s\n' "$status"
! grep -q '^There are 0 sessions:' <<<"$status"
