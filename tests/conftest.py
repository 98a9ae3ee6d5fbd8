"""What holds for every pure test."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# How long an example takes, or its making, says how busy the machine is, and no test must fail for that: by default
# 200 ms are too long for the one, and a second for ten of the other. And the same examples every time, but for
# `make fuzz`: what nobody has changed does not fail one day.
settings.register_profile(
    "steady",
    deadline=None,
    derandomize="NATGW_FUZZ_CASES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("steady")
