"""Bandwidth limits in the thread's network namespace, over rtnetlink: HTB, u32, ifb and the redirection to it.

A tree is ours if its root qdisc bears our mark (the otherwise unused rate2quantum), or if Kube-OVN's script made it:
``htb default 9999`` since release 1.16, an HTB without classes up to 1.15; there, classes of our own bear the mark.
Another root qdisc is not looked into, and the kernel refuses ours beside it.

Excess packets wait in fq_codel. Where the kernel lacks it, sfq does; where that is missing, too, a plain queue of a
tenth of a second, which keeps the delay bounded but lets flows of one limit crowd each other out.
"""

from __future__ import annotations

import errno
import logging
import socket
import struct
from collections.abc import Iterator, Sequence
from itertools import groupby

from gateway.kernel import tc_wire as wire
from gateway.kernel.netlink import (
    Message,
    Netlink,
    NetlinkError,
    attributes,
    text,
)
from gateway.kernel.subscription import Subscription
from gateway.kernel.tc_police import policer_of
from gateway.kernel.tc_requests import LEAVES, REDIRECT_PRIORITY, deleted, index_of, made, queue
from gateway.ports import Refused
from rules.qos import IFB_PREFIX
from rules.tc import (
    NODE_MAX,
    R2Q,
    ROOT_TABLE,
    TABLE_MAX,
    ClassKey,
    FilterKey,
    Htb,
    Ifb,
    IfbKey,
    Ingress,
    IngressKey,
    Key,
    Matchall,
    Objects,
    PolicerKey,
    Rate,
    Redirect,
    RedirectKey,
    RootKey,
    SetTc,
    Table,
    TableKey,
    TcStep,
    Unknown,
    Value,
)
from rules.tc_text import tc_text

log = logging.getLogger(__name__)

_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK = 16, 17, 18
_IFINFO = struct.Struct("=BxHiII")  # family, device type, index, flags, change mask
_IFLA_IFNAME = 3
_IFF_UP = 0x1
_GROUPS = (1, 4)  # linux/rtnetlink.h: links, traffic control
_SCRIPTS_DEFAULT, _TCS_R2Q = 0x9999, 10  # Kube-OVN's script; tc's own value

_PASSING = {errno.EAGAIN, errno.EBUSY, errno.ENOBUFS, errno.ENODEV, errno.ENOMEM, errno.ENETDOWN}


class KernelShaper:
    """``gateway.ports.Shaper`` on the real kernel; for one thread, in whose network namespace it opens its socket."""

    def __init__(self) -> None:
        self._netlink = Netlink(socket.NETLINK_ROUTE)
        self._leaves = list(LEAVES)
        # By what the kernel tells a filter from others, as it was read last: tcm_info and handle.
        self._filters: dict[Key, tuple[int, int]] = {}
        self._news = Subscription(_GROUPS)
        self._known: Objects | None = None

    def close(self) -> None:
        """Give the sockets back."""
        self._netlink.close()
        self._news.close()

    def forget(self) -> None:
        """Read everything anew the next time."""
        self._known = None

    # Reading.

    def read(self) -> Objects:
        """Our trees whole, the ingress qdiscs with our redirection if there is one, and the ifb devices.

        What was read stands until the kernel tells of a change of traffic control or of links: 600 limits take 17 ms.
        """
        if self._news.messages() != [] or self._known is None:  # asked first, so that nothing is missed
            try:
                self._filters.clear()
                self._known = dict(self._objects())
            except OSError as error:
                self._known = None
                raise _refused("read the bandwidth limits", error) from error
        return self._known

    def _objects(self) -> Iterator[tuple[Key, Value]]:
        roots: list[tuple[int, Htb, int]] = []
        ingress: list[int] = []
        for found in self._dump(wire.RTM_GETQDISC, 0, 0):
            if found.kind == "htb" and found.handle == wire.ROOT_HANDLE and found.options is not None:
                roots.append((found.index, *wire.htb_root_of(found.options)))
            elif found.kind == "ingress":
                ingress.append(found.index)
        names = dict(self._links())  # also where nothing hangs on an ifb yet: a change that broke off may have left it
        for _, (name, up) in names.items():
            if name.startswith(IFB_PREFIX):
                yield IfbKey(name), Ifb(up)
        for index, root, r2q in roots:
            if index in names:
                yield from self._tree(index, names[index][0], root, r2q)
        for index in ingress:
            if index in names:
                yield from self._ingress(index, names)

    def _dump(self, kind: int, index: int, parent: int) -> list[wire.Tc]:
        message = Message(kind, 0, wire.encoded(wire.Header(index, 0, parent)))
        return [wire.decoded(entry) for entry in self._netlink.dump(message)]

    def _links(self) -> Iterator[tuple[int, tuple[str, bool]]]:
        for entry in self._netlink.dump(Message(_RTM_GETLINK, 0, _IFINFO.pack(0, 0, 0, 0, 0))):
            _, _, index, flags, _ = _IFINFO.unpack_from(entry)
            yield index, (text(attributes(entry, _IFINFO.size)[_IFLA_IFNAME]), bool(flags & _IFF_UP))

    def _tree(self, index: int, device: str, root: Htb, r2q: int) -> Iterator[tuple[Key, Value]]:
        classes = [one for one in self._dump(wire.RTM_GETTCLASS, index, 0) if one.kind == "htb" and one.options]
        none_foreign = all(wire.htb_class_is_ours(one.options) for one in classes if one.options is not None)
        scripts = root.default == _SCRIPTS_DEFAULT or (r2q == _TCS_R2Q and none_foreign)
        if r2q != R2Q and not scripts:
            return
        yield RootKey(device), root
        for one in classes:
            if one.options is not None and one.handle >> 16 == wire.ROOT_HANDLE >> 16:
                yield ClassKey(device, one.handle & 0xFFFF), wire.htb_class_of(one.options)
        for one in self._dump(wire.RTM_GETTFILTER, index, wire.ROOT_HANDLE):
            if one.handle and one.options is not None:
                yield from self._filter(device, one)

    def _filter(self, device: str, found: wire.Tc) -> Iterator[tuple[Key, Value]]:
        priority, options = wire.priority_of(found.info), found.options
        assert options is not None
        if (policer := policer_of(found)) is not None:
            yield self._policer(device, found, ingress=False), policer
            return
        if found.kind != "u32":
            key = FilterKey(device, priority, ROOT_TABLE, 0, found.handle & NODE_MAX)
            minor = wire.matchall_class_of(options) if found.kind == "matchall" else None
            self._filters[key] = (found.info, found.handle)
            yield key, Unknown(found.kind) if minor is None else Matchall(minor)
            return
        number, bucket, node = found.handle >> 20, found.handle >> 12 & 0xFF, found.handle & NODE_MAX
        table = number if number <= TABLE_MAX else ROOT_TABLE
        if wire.u32_divisor_of(options) is None:
            key = FilterKey(device, priority, table, bucket, node)
            self._filters[key] = (found.info, found.handle)
            yield key, wire.u32_filter_of(options) or Unknown("u32")
        elif table != ROOT_TABLE:
            yield TableKey(device, priority, table), Table()

    def _policer(self, device: str, found: wire.Tc, *, ingress: bool) -> PolicerKey:
        key = PolicerKey(device, ingress, wire.priority_of(found.info), found.handle & NODE_MAX)
        self._filters[key] = (found.info, found.handle)
        return key

    def _ingress(self, index: int, names: dict[int, tuple[str, bool]]) -> Iterator[tuple[Key, Value]]:
        device, shared = names[index][0], False
        for found in self._dump(wire.RTM_GETTFILTER, index, wire.INGRESS_HANDLE):
            table = found.kind == "u32" and found.options is not None and wire.u32_divisor_of(found.options) is not None
            if not found.handle or found.options is None or table:
                continue
            to = wire.u32_redirect_of(found.options) if found.kind == "u32" else None
            ifb = names.get(to, ("", False))[0] if to is not None else ""
            if wire.priority_of(found.info) == REDIRECT_PRIORITY and ifb == IFB_PREFIX + device:
                self._filters[RedirectKey(device)] = (found.info, found.handle)
                yield RedirectKey(device), Redirect(ifb)
                continue
            shared = True
            if (policer := policer_of(found)) is not None:
                yield self._policer(device, found, ingress=True), policer
        yield IngressKey(device), Ingress(shared)

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
            if step.key not in self._filters:
                raise Refused(tc_text(step), "it was not read before", retryable=True)
            info, handle = self._filters[step.key]
            at_ingress = isinstance(step.key, RedirectKey) or (isinstance(step.key, PolicerKey) and step.key.ingress)
            parent = wire.INGRESS_HANDLE if at_ingress else wire.ROOT_HANDLE
            return Message(wire.RTM_DELTFILTER, 0, wire.encoded(wire.Header(index, handle, parent, info)))
        return deleted(step, index)


def _is_new_rate(step: TcStep) -> bool:
    return isinstance(step, SetTc) and isinstance(step.value, Rate)


def _refused(step: str, error: OSError | NetlinkError) -> Refused:
    code, words = (error.errno, error.strerror) if isinstance(error, OSError) else (error.code, error.words)
    return Refused(step, words or str(error), retryable=isinstance(error, TimeoutError) or code in _PASSING)
