"""``kube-ovn-bfdd-supervisor run``: the speaker, in a process that ``guard`` keeps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from gateway.bfd import title, turns
from gateway.bfd.guard import Guard, Ward

PROGRAM = "/kube-ovn/kube-ovn-bfdd-supervisor"


def main(argv: Sequence[str]) -> int:
    """``run``. Ends with 0 after a signal, with 1 when something needed cannot be had."""
    # Only what the outside recognises us by; a gateway works without it.
    with suppress(OSError, ValueError):
        title.set_command_line(PROGRAM, "run")
    turns.ask_for_short_ones()

    def serve(ward: Ward) -> int:
        from gateway.bfd import supervisor  # noqa: PLC0415 -- in the child, and not before: the guard stays small

        return supervisor.main(argv, ward)

    return Guard(serve).run()
