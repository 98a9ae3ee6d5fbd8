"""Reading traffic control: a dump of what is ours, and what the kernel tells of changes to it.

A tree is ours if its root qdisc bears our mark (the otherwise unused rate2quantum), or if Kube-OVN's script made it:
``htb default 9999`` since release 1.16, an HTB without classes up to 1.15; there, classes of our own bear the mark.
Another root qdisc is not looked into, and the kernel refuses ours beside it.

Events are the very messages of which dumps are made (sched_cls.c and sched_api.c make both with one function), so what
is known can follow them: one limit more takes the same time whatever their number, where a dump of 1,000 takes 25 ms.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator

from gateway.kernel import tc_wire as wire
from gateway.kernel.netlink import Message, Netlink, attributes, text
from gateway.kernel.tc_police import policer_of
from gateway.kernel.tc_requests import REDIRECT_PRIORITY
from rules.entries import Entries
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
    PolicerKey,
    Redirect,
    RedirectKey,
    RootKey,
    Table,
    TableKey,
    Unknown,
    Value,
)

_RTM_GETLINK = 18
_IFINFO = struct.Struct("=BxHiII")  # family, device type, index, flags, change mask
_IFLA_IFNAME = 3
_IFF_UP = 0x1
_SCRIPTS_DEFAULT, _TCS_R2Q = 0x9999, 10  # Kube-OVN's script; tc's own value
_QDISCS, _CLASSES, _FILTERS = (36, 37), (40, 41), (44, 45)  # RTM_NEW..., RTM_DEL...


_Kind = tuple[type[Key], str, int]  # filters or tables, on which device, at which priority


class Reading:
    """What there is of ours, as it was last read or told."""

    def __init__(self, netlink: Netlink) -> None:
        self._netlink = netlink
        self.objects: Entries[Key, Value] = Entries()
        self.filters: dict[Key, tuple[int, int]] = {}
        """By what the kernel tells a filter from others: tcm_info and handle."""
        self._trees: dict[int, str] = {}  # devices whose tree is ours whatever classes come to it, by index
        self._there: Counter[_Kind] = Counter()

    def read(self) -> None:
        """Dump everything. Raises OSError."""
        self.filters.clear()
        self._trees.clear()
        found = Entries(dict(self._objects()))
        # What stayed is the same object, so that the two are told apart at once.
        self.objects = self.objects.changed({key: now for key, _, now in self.objects.differences(found)})
        self._there = Counter(_kind(key) for key in found if isinstance(key, FilterKey | TableKey))

    def follow(self, told: Iterable[tuple[int, memoryview]]) -> bool:
        """Take over what the kernel told; False, and nothing is known any more, if that does not say all."""
        changes: dict[Key, Value | None] = {}
        for kind, said in told:
            if kind not in _QDISCS + _CLASSES + _FILTERS:
                return False
            found = wire.decoded(said)
            device = self._trees.get(found.index)
            if device is None:
                return False
            if kind in _QDISCS:
                if not _is_class_of_tree(found.parent):  # a queue of a class is no concern of a reading
                    return False
            elif kind in _CLASSES:
                if _is_class_of_tree(found.handle):
                    if found.kind != "htb" or found.options is None:
                        return False
                    value = wire.htb_class_of(found.options) if kind == wire.RTM_NEWTCLASS else None
                    changes[ClassKey(device, found.handle & 0xFFFF)] = value
            elif not self._follow_filter(device, found, changes, gone=kind == wire.RTM_DELTFILTER):
                return False
        self.objects = self.objects.changed(changes)
        return True

    def _follow_filter(self, device: str, found: wire.Tc, changes: dict[Key, Value | None], *, gone: bool) -> bool:
        if found.parent != wire.ROOT_HANDLE or found.kind != "u32" or not found.handle or found.options is None:
            return False
        for key, value in self._filter(device, found):
            if not isinstance(key, FilterKey | TableKey):
                return False
            before = changes.get(key, self.objects.get(key))
            changes[key] = None if gone else value
            if gone:
                self.filters.pop(key, None)
            self._there[_kind(key)] += (not gone) - (before is not None)
            filters, tables = (self._there[kind, device, key.priority] for kind in (FilterKey, TableKey))
            if gone and tables and not filters:  # with its last filter a priority goes, and its tables unmentioned
                return False
        return True

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
        if root.ours or root.default == _SCRIPTS_DEFAULT:
            self._trees[index] = device
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
            self.filters[key] = (found.info, found.handle)
            yield key, Unknown(found.kind) if minor is None else Matchall(minor)
            return
        number, bucket, node = found.handle >> 20, found.handle >> 12 & 0xFF, found.handle & NODE_MAX
        table = number if number <= TABLE_MAX else ROOT_TABLE
        if wire.u32_divisor_of(options) is None:
            key = FilterKey(device, priority, table, bucket, node)
            self.filters[key] = (found.info, found.handle)
            yield key, wire.u32_filter_of(options) or Unknown("u32")
        elif table != ROOT_TABLE:
            yield TableKey(device, priority, table), Table()

    def _policer(self, device: str, found: wire.Tc, *, ingress: bool) -> PolicerKey:
        key = PolicerKey(device, ingress, wire.priority_of(found.info), found.handle & NODE_MAX)
        self.filters[key] = (found.info, found.handle)
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
                self.filters[RedirectKey(device)] = (found.info, found.handle)
                yield RedirectKey(device), Redirect(ifb)
                continue
            shared = True
            if (policer := policer_of(found)) is not None:
                yield self._policer(device, found, ingress=True), policer
        yield IngressKey(device), Ingress(shared)


def _kind(key: FilterKey | TableKey) -> _Kind:
    return type(key), key.device, key.priority


def _is_class_of_tree(handle: int) -> bool:
    return handle >> 16 == wire.ROOT_HANDLE >> 16 and bool(handle & 0xFFFF)
