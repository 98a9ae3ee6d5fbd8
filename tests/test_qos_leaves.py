"""Which queue a class gets, on kernels with and without the better ones: the netlink answers are scripted."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest

from gateway.kernel.netlink import Message, NetlinkError
from gateway.kernel.shaper import KernelShaper
from gateway.ports import Refused
from rules.tc import ClassKey, Rate, SetTc


class ScriptedNetlink:
    """A kernel that has the queues named, and remembers which one each class was given."""

    def __init__(self, *kinds: str) -> None:
        self._kinds = kinds
        self.given: list[str] = []

    def request(self, messages: Sequence[Message]) -> list[NetlinkError | None]:
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> NetlinkError | None:
        asked = [kind for kind in ("fq_codel", "sfq", "bfifo") if kind.encode() + b"\0" in message.body]
        if not asked:
            return None  # the class itself
        if asked[0] not in self._kinds:
            return NetlinkError(errno.ENOENT, "Specified qdisc kind is unknown")
        self.given += asked
        return None


def limit(shaper: KernelShaper, minor: int) -> None:
    shaper.commit([SetTc(ClassKey("lo", minor), Rate(1_250_000, 1_048_576))])


@pytest.mark.parametrize(
    ("kernel", "chosen", "said"),
    [
        (("fq_codel", "sfq", "bfifo"), "fq_codel", []),
        (("sfq", "bfifo"), "sfq", ["no fq_codel"]),
        (("bfifo",), "bfifo", ["no fq_codel", "no sfq"]),
    ],
)
def test_the_best_queue_that_the_kernel_has_and_one_line_for_each_that_it_lacks(
    kernel: tuple[str, ...],
    chosen: str,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    netlink, shaper = ScriptedNetlink(*kernel), KernelShaper()
    monkeypatch.setattr(shaper, "_netlink", netlink)
    limit(shaper, 1)
    limit(shaper, 2)
    assert netlink.given == [chosen, chosen]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(said)
    assert all(word in line for word, line in zip(said, lines, strict=True))


def test_a_kernel_without_any_of_them_is_told_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    shaper = KernelShaper()
    monkeypatch.setattr(shaper, "_netlink", ScriptedNetlink())
    with pytest.raises(Refused, match="queue bfifo: Specified qdisc kind is unknown"):
        limit(shaper, 1)
