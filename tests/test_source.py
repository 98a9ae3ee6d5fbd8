"""Where connections come from: the sockets' side, with a kernel that the test plays."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.observer import ctnetlink
from gateway.observer.metrics import CONNTRACK, Tally
from gateway.observer.output import Complaints
from gateway.observer.source import ConntrackSource, Pace
from gateway.small.loop import Loop
from tests import observer_kit
from tests.watcher_kit import Book, left, mapped

REST = 20_000
SOL_NETLINK, ADD, DROP = 270, 1, 2


class Netlink(socket.socket):
    """Our end of a socket to the kernel."""

    def __init__(self, groups: int, end: socket.socket) -> None:
        super().__init__(fileno=end.detach())
        self.groups = groups
        self.refuses = False

    def setsockopt(self, level: int, option: int, value: Any = None, *rest: Any) -> None:
        """Join and leave multicast groups; all else is of no concern."""
        if level == SOL_NETLINK:
            if self.refuses:
                raise OSError(1, "Operation not permitted")
            bit = 1 << value - 1
            self.groups = self.groups | bit if option == ADD else self.groups & ~bit


class Kernel:
    """What the source talks to, its clock, and what it feeds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sockets: list[tuple[Netlink, socket.socket]] = []
        monkeypatch.setattr(ConntrackSource, "_socket", staticmethod(self._open))
        self.now = self.tracked = 0
        self.tally, self.book = Tally(), Book()
        self.loop = Loop(lambda: self.now)
        self.source = ConntrackSource(
            *(self.loop, self.book, self.tally, Complaints(self.tally)),
            groups=ctnetlink.END_GROUP,
            pace=Pace(every=10 * REST, share=0),
            count=lambda: self.tracked,
        )
        self.source.open()
        self.loop.turn()

    def _open(self, groups: int) -> socket.socket:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ours.setblocking(False)
        its.setblocking(False)
        self.sockets.append((Netlink(groups, ours), its))
        return self.sockets[-1][0]

    @property
    def listening(self) -> Netlink:
        """The socket of the events."""
        return self.sockets[0][0]

    def tell(self, *events: bytes) -> None:
        for event in events:
            self.sockets[0][1].send(event)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    made = Kernel(monkeypatch)
    yield made
    for ours, its in made.sockets:
        ours.close()
        its.close()


def ended(number: int) -> bytes:
    return observer_kit.message(observer_kit.DESTROY, observer_kit.body(left(port=number)))


def test_where_nothing_is_tracked_nothing_is_dumped(kernel: Kernel) -> None:
    kernel.book.event(ctnetlink.NEW, mapped())
    for _ in range(2):
        kernel.now += 10 * REST
        kernel.loop.turn()
    assert kernel.source.dumps == 3
    assert len(kernel.sockets) == 1, "events alone"
    assert len(kernel.book) == 0, "what is not there has ended"
    kernel.tracked = 1
    kernel.now += 10 * REST
    kernel.loop.turn()
    (ours, asked) = kernel.sockets[-1]
    assert (len(kernel.sockets), ours.groups) == (2, 0)
    assert asked.recv(1000) == ctnetlink.dump_request(kernel.source._sequence)


def test_events_gather_before_they_are_read(kernel: Kernel) -> None:
    """The first after a while is read at once, and whatever comes with it; then nobody looks for a moment."""
    kernel.now += REST
    kernel.loop.turn()
    for number in range(3):
        kernel.tell(ended(3 * number), ended(3 * number + 1))
        kernel.loop.turn()
        assert kernel.book.events["end"] == 3 * number + 2
        due = kernel.now + REST
        assert kernel.source.next_timer() == due
        kernel.tell(ended(3 * number + 2))
        kernel.now += REST - 1
        kernel.loop.turn()
        assert kernel.book.events["end"] == 3 * number + 2
        kernel.now = due
        kernel.loop.turn()
        kernel.loop.turn()
        assert kernel.book.events["end"] == 3 * number + 3
        kernel.now += REST
        kernel.loop.turn()


def test_more_than_are_read_in_a_turn_are_read_without_a_rest(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.observer.source._EVENTS_PER_TURN", 2)
    kernel.now += REST
    kernel.loop.turn()
    kernel.tell(*map(ended, range(5)))
    for _ in range(3):
        kernel.loop.turn()
    assert kernel.book.events["end"] == 5


def test_what_is_heard_can_be_changed(kernel: Kernel) -> None:
    slow = Pace(every=50 * REST, share=0)
    kernel.now += REST
    kernel.loop.turn()
    assert kernel.source.next_timer() == 10 * REST
    kernel.source.hear(ctnetlink.LIFE_GROUPS, slow)
    assert kernel.listening.groups == ctnetlink.LIFE_GROUPS
    assert kernel.source.next_timer() == slow.overrun_every, "what began before may not be known"
    kernel.now = slow.overrun_every
    kernel.loop.turn()
    assert kernel.source.next_timer() == kernel.now + REST
    kernel.now += REST
    kernel.loop.turn()
    assert kernel.source.next_timer() == slow.overrun_every + 50 * REST
    kernel.source.hear(ctnetlink.END_GROUP, slow)
    assert kernel.listening.groups == ctnetlink.END_GROUP
    assert kernel.source.next_timer() == slow.overrun_every + 50 * REST


def test_where_it_cannot_be_changed_all_is_opened_anew(kernel: Kernel) -> None:
    kernel.listening.refuses = True
    kernel.source.hear(ctnetlink.LIFE_GROUPS, Pace())
    assert kernel.tally.errors[CONNTRACK, "session"] == 1
    assert kernel.listening.fileno() == -1
    kernel.now += 2_000_000
    kernel.loop.turn()
    assert kernel.sockets[-1][0].groups == ctnetlink.LIFE_GROUPS
    assert kernel.source.dumps == 2
