"""The kernel's traffic control as values: keyed objects, the steps that make and delete them, and their order.

Kept to what a shaper on HTB needs (tc-htb(8), tc-u32(8), linux/pkt_sched.h, linux/pkt_cls.h): a root qdisc ``1:``
with classes, u32 filters that choose among them, and for what comes in an ifb device to which it is redirected.
Everything hangs on a device's name; a key is what the kernel tells an object by, so two objects never share one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

TICK_NS = 64  # the unit in which HTB takes and tells a burst: as long as it takes to send it at the rate
TICKS_MAX = 2**32 - 1
R2Q = 223  # rate2quantum, which nothing uses since every class names its quantum: our mark on a root qdisc
ROOT_TABLE = 0  # the hash table that every priority has of its own accord; the kernel chooses its number
TABLE_MAX = 0x7FF  # numbers from 0x800 on are the kernel's own choice
NODE_MAX = 0xFFF
BUCKETS = 256

SRC, DST = 12, 16  # where the addresses stand in an IPv4 header (RFC 791), in bytes
EXACT = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class IfbKey:
    """A device of type ifb."""

    device: str


@dataclass(frozen=True, slots=True)
class RootKey:
    """The HTB qdisc ``1:`` at a device's root."""

    device: str


@dataclass(frozen=True, slots=True)
class ClassKey:
    """An HTB class ``1:<minor>`` below the root."""

    device: str
    minor: int


@dataclass(frozen=True, slots=True)
class TableKey:
    """A u32 hash table with 256 buckets; its number is unique on the device, over all priorities."""

    device: str
    priority: int
    table: int


@dataclass(frozen=True, slots=True)
class FilterKey:
    """A u32 filter of ``protocol ip`` at the root: within a bucket, those with lower node numbers are asked first."""

    device: str
    priority: int
    table: int
    bucket: int
    node: int


@dataclass(frozen=True, slots=True)
class IngressKey:
    """The ingress qdisc ``ffff:`` of a device."""

    device: str


@dataclass(frozen=True, slots=True)
class RedirectKey:
    """The filter of priority 65535 that sends what a device receives to an ifb first."""

    device: str


@dataclass(frozen=True, slots=True)
class PolicerKey:
    """A filter that drops what exceeds a rate, at the root (egress) or on the ingress qdisc of a device."""

    device: str
    ingress: bool
    priority: int
    handle: int


@dataclass(frozen=True, slots=True)
class Ifb:
    up: bool = True


@dataclass(frozen=True, slots=True)
class Htb:
    """``default`` is the class of what no filter claims; where there is no such class, that passes unshaped.

    Once the qdisc stands the kernel does not let it be changed. One that is not ours was adopted, and is never deleted.
    """

    default: int = 0
    ours: bool = True


@dataclass(frozen=True, slots=True)
class Rate:
    """Bytes per second, and the burst in ticks of 64 ns of sending at that rate: exactly what the kernel keeps."""

    rate: int
    burst: int

    @property
    def burst_bytes(self) -> float:
        return self.burst * TICK_NS * self.rate / 1e9


@dataclass(frozen=True, slots=True)
class Table:
    pass


@dataclass(frozen=True, slots=True)
class Selector:
    """32 bits of the IPv4 header, ``offset`` bytes into it, are ``value`` under ``mask``; mask 0 matches everything."""

    value: int = 0
    mask: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Classify:
    """What matches all the selectors belongs to the class ``1:<minor>``."""

    selectors: tuple[Selector, ...]
    minor: int


@dataclass(frozen=True, slots=True)
class Link:
    """Everything goes on to the bucket of ``table`` that one byte of the header chooses (``mask`` at ``offset``)."""

    table: int
    offset: int
    mask: int


@dataclass(frozen=True, slots=True)
class Matchall:
    """Everything belongs to the class, by a filter of type matchall: not of our making, but of Kube-OVN's script."""

    minor: int


@dataclass(frozen=True, slots=True)
class Policer:
    """What matches the selector may come at this rate: not of our making, but of Kube-OVN's script up to 1.15.

    ``matchall``: the filter is of that type; there the selector says nothing.
    """

    selector: Selector
    rate: Rate
    matchall: bool = False


@dataclass(frozen=True, slots=True)
class Unknown:
    """A filter in our tree that nobody here makes: it can only be deleted."""

    kind: str


@dataclass(frozen=True, slots=True)
class Ingress:
    """``shared``: filters of others hang on it, so it is not ours to delete."""

    shared: bool = False


@dataclass(frozen=True, slots=True)
class Redirect:
    ifb: str


Key = IfbKey | RootKey | ClassKey | TableKey | FilterKey | PolicerKey | IngressKey | RedirectKey
Value = Ifb | Htb | Rate | Table | Classify | Link | Matchall | Policer | Unknown | Ingress | Redirect
Objects = Mapping[Key, Value]
Statements = Mapping[Key, Value | None]
"""What shall be: an object with this value, or (None) no such object."""


@dataclass(frozen=True, slots=True)
class SetTc:
    """Make an object or, for a class and an ifb, change it in place: no packet meets a moment without it."""

    key: Key
    value: Value


@dataclass(frozen=True, slots=True)
class DeleteTc:
    key: Key
    value: Value


TcStep = SetTc | DeleteTc

_IN_PLACE = (IfbKey, ClassKey)
_KINDS = (IfbKey, RootKey, ClassKey, TableKey, FilterKey, IngressKey, RedirectKey, PolicerKey)


def steps_before(wanted: Statements, have: Objects) -> Iterator[TcStep]:
    """What comes or changes, in an order in which every object finds what it stands on, and the limit stands before
    traffic is led to it.

    Where an object cannot be changed in place, the old one goes right before. Filters of other types go first of
    all, because the kernel holds only one type at a priority.
    """
    for key, value in wanted.items():
        if value is None and key in have and _goes_first(key, have[key]):
            yield DeleteTc(key, have[key])
    changes = [(key, value) for key, value in wanted.items() if value is not None and have.get(key) != value]
    for key, value in sorted(changes, key=lambda change: _rank(*change)):
        old = have.get(key)
        if old is not None and not isinstance(key, _IN_PLACE):
            yield DeleteTc(key, old)
        yield SetTc(key, value)


def steps_after(wanted: Statements, have: Objects) -> Iterator[TcStep]:
    """What goes, in the opposite order. What goes together with its root qdisc is not named."""
    roots = {key.device for key, value in wanted.items() if value is None and isinstance(key, RootKey) and key in have}
    lost = [(key, have[key]) for key, value in wanted.items() if value is None and key in have]
    gone = [(key, standing) for key, standing in lost if not _goes_first(key, standing)]
    for key, standing in sorted(gone, key=lambda one: _rank(*one), reverse=True):
        below = isinstance(key, ClassKey | TableKey | FilterKey)
        if not (below and key.device in roots) and not isinstance(key, TableKey):
            yield DeleteTc(key, standing)


def hold(wanted: Statements, have: Objects) -> bool:
    """Whether all is as stated: there is nothing to do."""
    return not any(steps_before(wanted, have)) and not any(steps_after(wanted, have))


def order(key: Key) -> tuple[int | str, ...]:
    """A total order of keys, in which what is stood on comes first."""
    return (_KINDS.index(type(key)), *(getattr(key, name) for name in key.__slots__))


def _goes_first(key: Key, standing: Value) -> bool:
    """Whether it stands where a u32 filter of ours may be wanted, and is of another type."""
    if isinstance(key, PolicerKey):
        return not key.ingress and isinstance(standing, Policer) and standing.matchall
    return isinstance(standing, Matchall | Unknown)


def _rank(key: Key, value: Value) -> tuple[int, int]:  # noqa: PLR0911 -- one line an object
    match key:
        case IfbKey():
            return (0, 0)
        case RootKey():
            return (1, 0)
        case ClassKey():
            return (2, 0)
        case TableKey():
            return (3, 0)
        case FilterKey(_, _, table, _, _):
            # Links from the inside out: what the root's link leads to is complete by then.
            return (4, 0) if not isinstance(value, Link) else (5, 0 if table != ROOT_TABLE else 1)
        case IngressKey():
            return (6, 0)
        case RedirectKey():
            return (7, 0)
        case PolicerKey():
            return (8, 0)


def snapshot(steps: Iterable[TcStep], before: Objects) -> dict[Key, Value | None]:
    """``before`` as statements about what the steps touch.

    A root qdisc takes along what hangs on it, so all of that is named with it. Hash tables and the links to them
    stay, as they always do: they are furniture, and the kernel frees a table only some time after its last link.
    """
    said: dict[Key, Value | None] = {}
    for step in steps:
        key = step.key
        furniture = isinstance(key, TableKey) or isinstance(step.value, Link)
        if furniture and key not in before:
            continue
        said[key] = before.get(key)
        if isinstance(key, RootKey):
            said |= {other: value for other, value in before.items() if other.device == key.device}
    return said


def apply_tc(objects: Objects, step: TcStep) -> dict[Key, Value]:
    """The objects after one step; raises ValueError in the kernel's words for what it refuses."""
    key, changed = step.key, dict(objects)
    _need(RootKey(key.device) in objects or not isinstance(key, ClassKey | TableKey | FilterKey), "No such file")
    if isinstance(step, DeleteTc):
        _need(key in objects, "No such file or directory")
        _deletable(objects, key)
        del changed[key]
        if isinstance(key, RootKey):
            below = (ClassKey, TableKey, FilterKey)
            changed = {k: v for k, v in changed.items() if not (k.device == key.device and isinstance(k, below))}
        return changed
    _makeable(objects, key, step.value)
    return {**changed, key: step.value}


def _need(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)


def _deletable(objects: Objects, key: Key) -> None:
    match key:
        case ClassKey(device, minor):
            users = (v for k, v in objects.items() if isinstance(k, FilterKey) and k.device == device)
            _need(not any(isinstance(v, Classify) and v.minor == minor for v in users), "Device or resource busy")
        case TableKey(device, _, table):
            links = (v for k, v in objects.items() if isinstance(k, FilterKey) and k.device == device)
            nodes = (k for k in objects if isinstance(k, FilterKey) and (k.device, k.table) == (device, table))
            linked = any(isinstance(v, Link) and v.table == table for v in links)
            _need(not linked and not any(nodes), "Can not delete in-use filter (Device or resource busy)")
        case IngressKey(device):
            hanging = (k for k in objects if isinstance(k, PolicerKey) and k.ingress and k.device == device)
            _need(RedirectKey(device) not in objects and not any(hanging), "filters hang on it")


def _makeable(objects: Objects, key: Key, value: Value) -> None:
    _need(key not in objects or isinstance(key, _IN_PLACE), "File exists")
    match key:
        case RootKey():
            _need(isinstance(value, Htb), "Invalid argument")
        case ClassKey(_, minor):
            _need(isinstance(value, Rate) and 0 < minor <= 0xFFFF, "Invalid argument")
        case TableKey(device, _, table):
            twice = any(isinstance(k, TableKey) and (k.device, k.table) == (device, table) for k in objects)
            _need(not twice and 0 < table <= TABLE_MAX, "No space left on device")
        case FilterKey(device, priority, table, bucket, node):
            known = table == ROOT_TABLE or TableKey(device, priority, table) in objects
            _need(known, "Specified hash table not found (Invalid argument)")
            _need(0 <= bucket < (1 if table == ROOT_TABLE else BUCKETS) and 0 < node <= NODE_MAX, "Invalid argument")
            tables = {k.table for k in objects if isinstance(k, TableKey) and k.device == device}
            _need(not isinstance(value, Link) or value.table in tables, "Link hash table not found (Invalid argument)")
            _need(0 < priority <= 0xFFFF, "Invalid argument")
            others = {type(v) for k, v in objects.items() if isinstance(k, FilterKey) and _same_priority(k, key)}
            _need(not others & {Matchall, Unknown}, "Specified filter kind does not match existing one")
        case RedirectKey(device):
            _need(IngressKey(device) in objects, "Parent Qdisc doesn't exists (No such file or directory)")
            _need(isinstance(value, Redirect) and IfbKey(value.ifb) in objects, "Cannot find device")
        case PolicerKey(device, ingress):
            parent = IngressKey(device) if ingress else RootKey(device)
            _need(isinstance(value, Policer) and parent in objects, "Parent Qdisc doesn't exists")
        case IfbKey() | IngressKey():
            pass


def _same_priority(one: FilterKey, other: FilterKey) -> bool:
    return (one.device, one.priority) == (other.device, other.priority)


@lru_cache(maxsize=4096)
def ticks(size: int, rate: int) -> int:
    """A burst of ``size`` bytes at ``rate`` bytes per second, in ticks; the kernel has room for 274 seconds."""
    return max(1, min(TICKS_MAX, round(size * 1e9 / (rate * TICK_NS))))
