"""Sockets of this network namespace that wait for others, as /proc/net tells them (proc(5))."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rules.examination import Listener

_PROC = Path("/proc")
_LISTEN, _UNCONNECTED = "0A", "07"
_WAITING = {"tcp": _LISTEN, "tcp6": _LISTEN, "udp": _UNCONNECTED, "udp6": _UNCONNECTED}


def listening() -> tuple[Listener, ...]:
    """All of them, with the name of the program where its process can be seen."""
    found = [
        (inode, protocol.removesuffix("6"), *_end(local))
        for protocol, state in _WAITING.items()
        for inode, local in _lines(protocol, state)
    ]
    programs = _programs({inode for inode, *_ in found})
    each_once = dict.fromkeys(Listener(p, address, port, programs.get(inode, "")) for inode, p, address, port in found)
    return tuple(each_once)


def _lines(protocol: str, wanted: str) -> Iterator[tuple[str, str]]:
    try:
        lines = (_PROC / "net" / protocol).read_text().splitlines()[1:]
    except OSError:
        return  # no such version of IP
    for line in lines:
        _, local, _, state, *rest = line.split()
        if state == wanted:
            yield rest[5], local


def _end(text: str) -> tuple[str, int]:
    """``0100007F:0050``: the address in words of host byte order."""
    address, _, port = text.partition(":")
    words = [int(address[i : i + 8], 16) for i in range(0, len(address), 8)]
    raw = struct.pack(f"={len(words)}I", *words)
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, raw), int(port, 16)


def _programs(inodes: set[str]) -> dict[str, str]:
    """By inode: the name of a process that holds the socket."""
    found: dict[str, str] = {}
    for process in _PROC.glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is somebody else's
            name = (process / "comm").read_text().strip()
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):
                    inode = os.readlink(descriptor).removeprefix("socket:[").removesuffix("]")
                    if inode in inodes:
                        found.setdefault(inode, name)
    return found
