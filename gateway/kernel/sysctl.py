"""Kernel settings of the thread's network namespace, through the files below /proc/sys."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_ROOT = Path("/proc/sys")


def forwarding(interfaces: Iterable[str]) -> list[str]:
    """The settings that decide what a host forwards."""
    sides = [f"net/ipv4/conf/{name}/rp_filter" for name in interfaces]
    return ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", *sides]


def read(names: Iterable[str]) -> dict[str, int]:
    """The settings of these names; one that is not there (no IPv6, an interface that has gone) is left out."""
    found: dict[str, int] = {}
    for name in names:
        try:
            found[name] = int((_ROOT / name).read_text())
        except (OSError, ValueError):
            continue
    return found


def write(name: str, value: int) -> None:
    """Set one; raises OSError."""
    # Opened without O_CREAT: the name of a setting that is not there shall be the complaint.
    with (_ROOT / name).open("r+") as setting:
        setting.write(str(value))
