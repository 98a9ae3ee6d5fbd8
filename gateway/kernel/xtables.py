"""The legacy variant's lock, and what tells cheaply that somebody else may have edited a table.

Legacy tables send no events and have no counter. But whoever edits them with iptables takes a lock for it, and a file
that is opened tells its watchers (inotify(7)); and the kernel tells a table's sizes without its rules
(IPT_SO_GET_INFO: 0.01 ms). The file is kept open here, so that every opening is somebody else's.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from gateway.ports import Refused
from rules.ruleset import HOOKS

_LOCK_POLL = 0.01  # seconds

_IN_ATTRIB, _IN_OPEN, _IN_DELETE_SELF, _IN_MOVE_SELF = 0x004, 0x020, 0x400, 0x800
_IN_CLOEXEC, _IN_NONBLOCK = 0o2000000, 0o4000
_EVENTS = 1 << 14

_IPT_SO_GET_INFO, _IPT_SO_GET_ENTRIES = 64, 65
_ENTRIES = struct.Struct("=32sI4x")  # struct ipt_get_entries: name, size; the entries follow
_TRIES = 5
_INFO = struct.Struct("=32s13I")  # linux/netfilter_ipv4/ip_tables.h: name, hooks, entries, underflows, number, size

_libc = ctypes.CDLL(None, use_errno=True)


class Lock:
    """The file that iptables locks (iptables(8), XTABLES_LOCKFILE), and how often others have opened it."""

    def __init__(self) -> None:
        self._file: int | None = None
        self._events: int | None = None
        self._opened = 0

    def opened(self) -> int | None:
        """A number that changes whenever somebody else opens the file; None where that cannot be known."""
        with suppress(OSError):
            self._keep_open()
        if self._events is None:
            return None
        try:
            while os.read(self._events, _EVENTS):
                self._opened += 1
        except BlockingIOError:
            return self._opened
        return None

    @contextmanager
    def held(self, step: str, patience: float) -> Iterator[None]:
        """Hold the lock; raises Refused if others keep it for so many seconds, or if it cannot be made."""
        try:
            file = self._keep_open()
        except OSError as error:
            raise Refused(step, f"{_path()}: {error.strerror}", retryable=False) from error
        deadline = time.monotonic() + patience
        while not _locked(file):
            if time.monotonic() > deadline:
                raise Refused(step, f"another program has held the xtables lock for {patience:g} s", retryable=True)
            time.sleep(_LOCK_POLL)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)

    @staticmethod
    def spare() -> str:
        """Another file, for a tool to lock while we hold this one for it."""
        return f"{_path()}.natgw"

    def _keep_open(self) -> int:
        """The file's descriptor; opened again if another file has taken its place."""
        path = _path()
        if self._file is not None:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file), os.stat(path)):
                    return self._file
            self.close()
        self._file = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._opened += 1  # what happened until now is not known
        self._events = _watch(path)
        return self._file

    def close(self) -> None:
        """Give the descriptors back."""
        for descriptor in (self._file, self._events):
            if descriptor is not None:
                os.close(descriptor)
        self._file = self._events = None


def _path() -> str:
    return os.environ.get("XTABLES_LOCKFILE", "/run/xtables.lock")


def _watch(path: str) -> int | None:
    events = _libc.inotify_init1(_IN_CLOEXEC | _IN_NONBLOCK)
    if events < 0:
        return None
    mask = _IN_OPEN | _IN_ATTRIB | _IN_DELETE_SELF | _IN_MOVE_SELF
    if _libc.inotify_add_watch(events, os.fsencode(path), mask) < 0:
        os.close(events)
        return None
    return int(events)


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EINTR):
            return False
        raise
    return True


class Info(NamedTuple):
    """What the kernel tells of a table: all of it as bytes, and how many entries there are.

    A rule is one entry; a chain of ours is two more, and a built-in one is one more.
    """

    raw: bytes
    entries: int

    @property
    def size(self) -> int:
        """Bytes of all entries."""
        return int(_INFO.unpack(self.raw)[13])

    @property
    def builtin(self) -> dict[str, tuple[int, int]]:
        """Of each built-in chain that the table has: where it begins, and where its policy stands."""
        fields = _INFO.unpack(self.raw)
        return {name: (fields[2 + hook], fields[7 + hook]) for hook, name in enumerate(HOOKS) if fields[1] & 1 << hook}


def open_socket() -> socket.socket:
    """A socket by which the legacy tables of the calling thread's network namespace are asked for."""
    return socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)


def info(asking: socket.socket, table: str) -> Info:
    """What the kernel tells of a table, which it loads for that; raises OSError where it has none of that name."""
    said = ctypes.create_string_buffer(_INFO.pack(table.encode(), *[0] * 13), _INFO.size)
    size = ctypes.c_uint32(_INFO.size)
    # socket.getsockopt hands the kernel no value, from which it would take the table's name.
    if _libc.getsockopt(asking.fileno(), socket.SOL_IP, _IPT_SO_GET_INFO, said, ctypes.byref(size)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return Info(said.raw, _INFO.unpack(said.raw)[12])


class Tables:
    """Sizes of the legacy tables of the network namespace of the thread that first asks."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def info(self, table: str) -> Info | None:
        """What the kernel tells of a table; None where it has none of that name."""
        if self._socket is None:
            self._socket = open_socket()
        try:
            return info(self._socket, table)
        except OSError:
            return None

    def entries(self, table: str) -> tuple[Info, bytes] | None:
        """A table's sizes and all its entries as the kernel has them; None where they cannot be had."""
        for _ in range(_TRIES):
            info = self.info(table)
            if info is None or self._socket is None:
                return None
            asked = _ENTRIES.pack(table.encode(), info.size)
            said = ctypes.create_string_buffer(asked, len(asked) + info.size)
            size = ctypes.c_uint32(len(said))
            if not _libc.getsockopt(
                self._socket.fileno(), socket.SOL_IP, _IPT_SO_GET_ENTRIES, said, ctypes.byref(size)
            ):
                return info, memoryview(said)[len(asked) :].tobytes()
            if ctypes.get_errno() != errno.EAGAIN:  # another size by now
                return None
        return None
