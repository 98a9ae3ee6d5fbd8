"""A small first process, and the BFD speaker as its child.

A speaker that is killed (it is the largest process of its container, which is what the kernel takes where memory is
short) is started again at once, in the same container: Kubernetes would take its time. And while no speaker runs, its
peers are kept awake. OVN's BFD thread sleeps, also through its own timers, when nobody speaks to it: a gateway that was
a router's only one and fell silent would be believed in for as long as no other comes. An empty datagram to the peer's
BFD port belongs to no session and proves nobody alive, but it wakes that thread, which then notices the silence.

The first process forks before anything else is loaded, so that it shares nearly all of its memory with the second. It
also reaps what is left to it, as the first process of a container has to.

What nothing in a container can help: that the container is killed as a whole, or its node dies.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from gateway.small.log import log

NUDGE_SECONDS = 0.02
NUDGED_SECONDS = 30.0
"""For how long peers are kept awake: as long as any detection time in use, and then some."""
STEADY_SECONDS = 10.0
FIRST_DELAY, LONGEST_DELAY = 0.25, 5.0

Peer = tuple[str, str, int]
"""A session's local and remote address, and the UDP port of the remote one."""


class Ward:
    """What a guarded process has of its guard. ``again``: the one before it was lost."""

    def __init__(self, serving: int, alive: int, again: bool) -> None:
        self._serving = serving
        self._alive = alive
        self.again = again

    def fileno(self) -> int:
        """Readable when the guard is gone: then this process, too, has to be as if it had been killed."""
        return self._alive

    def serving(self, peers: Iterable[Peer]) -> None:
        """Tell the guard that the speaker speaks, and whom to keep awake without it."""
        text = "".join(f"{local} {remote} {port}\n" for local, remote, port in peers)
        os.write(self._serving, text.encode())
        os.close(self._serving)


class Guard:
    """Runs ``serve`` in a child, again whenever that is lost. ``serve`` returns an exit code."""

    def __init__(self, serve: Callable[[Ward], int], clock: Callable[[], float] = time.monotonic) -> None:
        self._serve = serve
        self._clock = clock
        self._child: int | None = None
        self._telling = -1
        self._told = b""
        self._peers: list[Peer] = []
        self._failures = 0
        self._started = self._start_at = 0.0
        self._silent_since: float | None = None
        self._signals, self._written = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._alive, self._life = os.pipe2(os.O_CLOEXEC)
        self._stopping = False

    def run(self) -> int:
        """The exit code: of ``serve``, in the child; of the last child, in the guard."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._written)
        while True:
            if self._child is None and self._clock() >= self._start_at:
                ward = self._start()
                if ward is not None:
                    return self._serve(ward)
            self._wait()
            code = self._reap()
            if code is not None:
                return code

    def _start(self) -> Ward | None:
        """Fork; the child's end, in the child."""
        self._told = b""
        self._telling, serving = os.pipe2(os.O_CLOEXEC)
        again = bool(self._peers)
        self._started = self._clock()
        child = os.fork()
        if child:
            self._child = child
            os.close(serving)
            return None
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        for descriptor in (self._telling, self._signals, self._written, self._life):
            os.close(descriptor)
        return Ward(serving, self._alive, again)

    def _wait(self) -> None:
        """For a signal, for word from the child, for the time to start one; keep peers awake meanwhile."""
        now = self._clock()
        waits = [] if self._child is not None else [max(0.0, self._start_at - now)]
        if self._silent_since is not None and now - self._silent_since < NUDGED_SECONDS:
            self._nudge()
            waits.append(NUDGE_SECONDS)
        watched = [self._signals] if self._telling < 0 else [self._signals, self._telling]
        ready, _, _ = select.select(watched, [], [], min(waits, default=None))
        if self._telling in ready:
            self._hear()
        if self._signals in ready:
            for number in os.read(self._signals, 64):
                if number in (signal.SIGTERM, signal.SIGINT):
                    self._stop(number)

    def _hear(self) -> None:
        said = os.read(self._telling, 65536)
        self._told += said
        if said:
            return
        os.close(self._telling)
        self._telling = -1
        if self._told:
            lines = (line.split() for line in self._told.decode().splitlines())
            self._peers = [(local, remote, int(port)) for local, remote, port in lines]
            self._silent_since = None

    def _stop(self, number: int) -> None:
        self._stopping = True
        if self._child is not None:
            os.kill(self._child, number)

    def _reap(self) -> int | None:
        """Take note of who has ended; the exit code if that is the end of all."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                pid, status = 0, 0
            if pid and pid == self._child:
                self._child = None
                while self._telling >= 0:
                    self._hear()
                code = os.waitstatus_to_exitcode(status)
                # One that never served would not the next time either: wrong settings, an address in use.
                if code == 0 or self._stopping or not self._peers:
                    return 0 if code == 0 or self._stopping else 1
                self._lost(code)
            if not pid:
                return 0 if self._stopping and self._child is None else None

    def _lost(self, code: int) -> None:
        now = self._clock()
        self._failures = 1 if now - self._started >= STEADY_SECONDS else self._failures + 1
        delay = 0.0 if self._failures == 1 else min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** (self._failures - 2))
        if self._silent_since is None:
            self._silent_since = now
        self._start_at = now + delay
        how = f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
        log(f"the speaker {how}; another is started in {delay:.2f} s")

    def _nudge(self) -> None:
        for local, remote, port in self._peers:
            family = socket.AF_INET6 if ":" in local else socket.AF_INET
            # No address, no route, no memory: the next one is due in a moment.
            with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as nudging:
                nudging.bind((local, 0))
                nudging.sendto(b"", (remote, port))
