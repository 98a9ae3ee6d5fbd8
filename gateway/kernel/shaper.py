"""Bandwidth limits in the thread's network namespace, over rtnetlink: HTB, u32, ifb and the redirection to it.

Which trees are ours, and how they are read, is ``tc_reading``'s.

Excess packets wait in fq_codel. Where the kernel lacks it, sfq does; where that is missing, too, a plain queue of a
tenth of a second, which keeps the delay bounded but lets flows of one limit crowd each other out.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Sequence
from itertools import groupby

from gateway.kernel import tc_wire as wire
from gateway.kernel.netlink import Message, Netlink, NetlinkError
from gateway.kernel.subscription import Subscription
from gateway.kernel.tc_reading import Reading
from gateway.kernel.tc_requests import LEAVES, deleted, index_of, made, queue
from gateway.ports import Refused
from rules.tc import FilterKey, IfbKey, Objects, PolicerKey, Rate, RedirectKey, SetTc, TcStep
from rules.tc_text import tc_text

log = logging.getLogger(__name__)

_GROUPS = (1, 4)  # linux/rtnetlink.h: links, traffic control

_PASSING = {errno.EAGAIN, errno.EBUSY, errno.ENOBUFS, errno.ENODEV, errno.ENOMEM, errno.ENETDOWN}


class KernelShaper:
    """``gateway.ports.Shaper`` on the real kernel; for one thread, in whose network namespace it opens its socket."""

    def __init__(self) -> None:
        self._netlink = Netlink(socket.NETLINK_ROUTE)
        self._leaves = list(LEAVES)
        self._reading = Reading(self._netlink)
        self._news = Subscription(_GROUPS)
        self._known = False

    def close(self) -> None:
        """Give the sockets back."""
        self._netlink.close()
        self._news.close()

    def forget(self) -> None:
        """Read everything anew the next time."""
        self._known = False

    # Reading.

    def read(self) -> Objects:
        """Our trees whole, the ingress qdiscs with our redirection if there is one, and the ifb devices.

        What was read stands, with what the kernel tells of our trees in it, until it tells of anything else.
        """
        told = self._news.messages()  # asked first, so that nothing is missed
        try:
            known = self._known and told is not None and self._reading.follow(told)
            self._known = False
            if not known:
                self._reading.read()
            self._known = True
        except OSError as error:
            raise _refused("read the bandwidth limits", error) from error
        return self._reading.objects

    # Writing.

    def commit(self, steps: Sequence[TcStep]) -> None:
        """Apply the steps in order.

        Raises Refused at the first step the kernel refuses. Steps before it stand, and so may those of the same kind
        that follow it without another kind in between, for they travel together.
        """
        for _, run in groupby(steps, lambda step: (type(step), type(step.key))):
            self._run(list(run))

    def _run(self, steps: Sequence[TcStep]) -> None:
        indexes: dict[str, int] = {}
        for step in steps:
            if step.key.device not in indexes and (index := index_of(step.key.device)) is not None:
                indexes[step.key.device] = index
            elif step.key.device not in indexes and not isinstance(step.key, IfbKey):
                raise Refused(tc_text(step), f"no such interface {step.key.device}", retryable=True)
        self._send([(step, self._message(step, indexes.get(step.key.device, 0))) for step in steps])
        queues = [(step, index) for step in steps if (index := indexes.get(step.key.device)) and _is_new_rate(step)]
        if queues:
            self._make_queues(queues)

    def _send(self, requests: Sequence[tuple[TcStep, Message]]) -> None:
        answers = self._answers([message for _, message in requests], tc_text(requests[0][0]))
        for (step, _), answer in zip(requests, answers, strict=True):
            if answer is not None:
                raise _refused(tc_text(step), answer)

    def _answers(self, messages: Sequence[Message], step: str) -> list[NetlinkError | None]:
        try:
            return self._netlink.request(messages)
        except OSError as error:
            raise _refused(step, error) from error

    def _make_queues(self, classes: Sequence[tuple[TcStep, int]]) -> None:
        """Give each class the best queue there is; one that has it already keeps it, with what waits in it."""
        while True:
            kind = self._leaves[0]
            messages = [queue(step, index, kind) for step, index in classes]
            answers = self._answers(messages, f"queue {kind}")
            refused = next((answer for answer in answers if answer is not None), None)
            if refused is None:
                return
            if refused.code != errno.ENOENT or len(self._leaves) == 1:
                raise _refused(f"{tc_text(classes[0][0])}, queue {kind}", refused)
            del self._leaves[0]
            log.warning("the kernel has no %s: bandwidth limits queue in %s", kind, self._leaves[0])

    def _message(self, step: TcStep, index: int) -> Message:
        if isinstance(step, SetTc):
            return made(step, index)
        if isinstance(step.key, FilterKey | PolicerKey | RedirectKey):
            if step.key not in self._reading.filters:
                raise Refused(tc_text(step), "it was not read before", retryable=True)
            info, handle = self._reading.filters[step.key]
            at_ingress = isinstance(step.key, RedirectKey) or (isinstance(step.key, PolicerKey) and step.key.ingress)
            parent = wire.INGRESS_HANDLE if at_ingress else wire.ROOT_HANDLE
            return Message(wire.RTM_DELTFILTER, 0, wire.encoded(wire.Header(index, handle, parent, info)))
        return deleted(step, index)


def _is_new_rate(step: TcStep) -> bool:
    return isinstance(step, SetTc) and isinstance(step.value, Rate)


def _refused(step: str, error: OSError | NetlinkError) -> Refused:
    code, words = (error.errno, error.strerror) if isinstance(error, OSError) else (error.code, error.words)
    return Refused(step, words or str(error), retryable=isinstance(error, TimeoutError) or code in _PASSING)
