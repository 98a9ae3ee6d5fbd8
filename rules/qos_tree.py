"""One device's classes and filters for its bandwidth limits: what leads to which class, and where it has its place.

Which class a packet belongs to is decided by u32 filters of protocol ip at the limit's priority:

- all limits of single addresses at one priority share a hash of two levels, over the third and the fourth byte of
  the address: two look-ups, whether there is one address or ten thousand;
- shorter prefixes follow in one list, the longest first, and limits of all traffic stand last.

Class ids, hash tables and places of filters are given out, never computed: each limit keeps what it has in the
kernel, a new one gets the lowest that is free. So a changed rate is a change in place, a changed priority is one
more filter to the same class before the old one goes, and two limits never collide. Classes below 1:8000 belong to
EIPs and those from there on to interfaces, in Kube-OVN's own script, too; that is how ``rules.qos.recovered`` tells
them apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from rules.fields import Direction
from rules.spec import Limit
from rules.tc import (
    DST,
    EXACT,
    NODE_MAX,
    ROOT_TABLE,
    SRC,
    TABLE_MAX,
    Classify,
    ClassKey,
    FilterKey,
    Htb,
    Key,
    Link,
    Matchall,
    Objects,
    Policer,
    Rate,
    RootKey,
    Selector,
    Table,
    TableKey,
    Value,
    order,
)

EIP_CLASSES, INTERFACE_CLASSES = _POOLS = range(0x1, 0x8000), range(0x8000, 0xFFFF)

# Nodes of the table that each priority begins with; a lower one is asked first.
_FIRST_HASH, _SECOND_HASH = range(0x001, 0x008), range(0x008, 0x010)
_PREFIX_NODES, _PREFIXES_A_SIDE = 0x010, 63
_ALL_NODES = range(0xFF1, NODE_MAX + 1)
# Nodes of a bucket of the second level: of two limits of one address, that of the EIP decides.
_EIP_NODES, _INTERFACE_NODES = range(0x001, 0x800), range(0x800, NODE_MAX + 1)
_HASH_NODES = range(0x001, 0x010)
_THIRD, _FOURTH = 0x0000FF00, 0x000000FF

Side = Literal["src", "dst"]
_OFFSET: dict[Side, int] = {"src": SRC, "dst": DST}
_SIDE: dict[int, Side] = {SRC: "src", DST: "dst"}
EIP_SIDE: dict[Direction, Side] = {"egress": "src", "ingress": "dst"}


class Unshapeable(ValueError):
    """A limit that the kernel has no room for; the message names it and says why."""


class Match(NamedTuple):
    """Packets whose address on one side lies in a prefix; all packets have no side."""

    side: Side | None = None
    address: int = 0
    length: int = 0


class Claim(NamedTuple):
    """What a filter claims for its class: a limit's identity as far as the kernel knows it."""

    of_eip: bool
    priority: int
    match: Match

    @property
    def limit(self) -> tuple[object, ...]:
        """The limit's identity: that of an EIP is its address alone."""
        return (self.match,) if self.of_eip else (self.priority, self.match)

    @property
    def order(self) -> tuple[object, ...]:
        """A total order, the same for the same limits."""
        return (not self.of_eip, self.priority, self.match.side or "", *self.match[1:])


_Bucket = tuple[int, int, int]  # priority, table, bucket


@dataclass(frozen=True)
class Wanted:
    """A limit, what its filter claims, and the rate of its class."""

    claim: Claim
    rate: Rate
    limit: Limit


class Layout:
    """What stands on one device, and by what it is found. It can follow single changes (``follow``)."""

    def __init__(self, device: str, have: Objects) -> None:
        self.device = device
        self.objects: dict[Key, Value] = {}
        self.minors: set[int] = set()
        self.tables: set[int] = set()
        self.nodes: defaultdict[_Bucket, set[int]] = defaultdict(set)
        self.classes: dict[tuple[object, ...], int] = {}
        self.places: defaultdict[Claim, list[tuple[FilterKey, int]]] = defaultdict(list)
        self.links: dict[tuple[_Bucket, Link], tuple[FilterKey, int]] = {}
        self._lowest = [pool.start for pool in _POOLS]  # below it none is free
        for key in sorted((key for key in have if key.device == device), key=order):
            self._comes(key, have[key])
        # Also of filters that lead nowhere.
        self.minors |= {minor for places in self.places.values() for _, minor in places} | self.default

    @property
    def root(self) -> Value | None:
        """The root qdisc, if there is one."""
        return self.objects.get(RootKey(self.device))

    @property
    def default(self) -> set[int]:
        """The class of what no filter claims."""
        return {self.root.default} if isinstance(self.root, Htb) else set()

    def follow(self, changes: Iterable[tuple[Key, Value | None, Value | None]]) -> None:
        """Objects of this device that changed: the key, what it was and what it is.

        No two filters may lead to one class, before or after.
        """
        changes = sorted(changes, key=lambda change: order(change[0]))
        for key, was, _ in changes:
            if was is not None:
                self._goes(key, was)
        for key, _, now in changes:
            if now is not None:
                self._comes(key, now)

    def free_class(self, of_eip: bool, given: Container[int]) -> int | None:
        """The lowest number of a class that none has, not in ``given`` either; None: there is none left."""
        which = 0 if of_eip else 1
        pool = _POOLS[which]
        while self._lowest[which] in self.minors:
            self._lowest[which] += 1
        rest = range(self._lowest[which], pool.stop)
        return next((minor for minor in rest if minor not in self.minors and minor not in given), None)

    def _comes(self, key: Key, value: Value) -> None:
        self.objects[key] = value
        match key:
            case ClassKey(_, minor):
                self.minors.add(minor)
            case TableKey(_, _, table):
                self.tables.add(table)
            case FilterKey():
                self.nodes[_bucket(key)].add(key.node)
                if (found := _claim(key, value)) is not None:
                    claim, minor = found
                    self.classes.setdefault(claim.limit, minor)
                    self.places[claim].append((key, minor))
                elif isinstance(value, Link) and value.table in self.tables:
                    self.links.setdefault((_bucket(key), replace(value, table=0)), (key, value.table))

    def _goes(self, key: Key, value: Value) -> None:
        del self.objects[key]
        match key:
            case ClassKey(_, minor):
                self.minors.discard(minor)
                self._lowest = [
                    min(minor, low) if minor in p else low for p, low in zip(_POOLS, self._lowest, strict=True)
                ]
            case TableKey(_, _, table):
                self.tables.discard(table)
            case FilterKey():
                self.nodes[_bucket(key)].discard(key.node)
                if (found := _claim(key, value)) is not None:
                    claim, minor = found
                    self.classes.pop(claim.limit, None)
                    self.places[claim].remove((key, minor))
                    if not self.places[claim]:
                        del self.places[claim]
                elif isinstance(value, Link):
                    self.links.pop((_bucket(key), replace(value, table=0)), None)


class Tree:
    """One device's classes and filters, laid out around those that stand."""

    def __init__(self, layout: Layout, direction: Direction) -> None:
        self._layout = layout
        self._device = layout.device
        self._eip_side = EIP_SIDE[direction]
        self._said: dict[Key, Value | None] = {RootKey(layout.device): layout.root or Htb()}
        # What is given out here, besides what stands.
        self._classes: set[int] = set()
        self._tables: set[int] = set()
        self._nodes: defaultdict[_Bucket, set[int]] = defaultdict(set)
        self._links: dict[tuple[_Bucket, Link], tuple[FilterKey, int]] = {}

    def statements(self, limits: Iterable[Wanted]) -> dict[Key, Value | None]:
        """All that the device shall hold; what else it holds shall go, but for hash tables and the links to them."""
        ordered = sorted(limits, key=lambda wanted: wanted.claim.order)
        self._lay_out(ordered)
        # The class of what nothing claims, of a tree that was adopted, is furniture as well.
        layout = self._layout
        idle = layout.default - {minor for places in layout.places.values() for _, minor in places}
        furniture: set[Key] = {key for key, _ in layout.links.values()}
        furniture |= {ClassKey(self._device, minor) for minor in idle}
        for key in layout.objects:
            if isinstance(key, ClassKey | FilterKey) and key not in self._said and key not in furniture:
                self._said[key] = None
        return self._said

    def changes(self, gone: Iterable[Wanted], came: Iterable[Wanted]) -> dict[Key, Value | None]:
        """What of ``statements`` is about limits that changed, where the device holds all the others and no more."""
        self._lay_out(sorted(came, key=lambda wanted: wanted.claim.order))
        for wanted in gone:
            for key, minor in self._layout.places.get(wanted.claim, ()):
                self._said.setdefault(key, None)
                self._said.setdefault(ClassKey(self._device, minor), None)
        return self._said

    def _lay_out(self, ordered: Sequence[Wanted]) -> None:
        u32 = {wanted.claim.priority for wanted in ordered if wanted.claim.match.side}
        given: set[int] = set()
        for wanted in ordered:
            minor = self._class(wanted, given)
            given.add(minor)
            self._said[ClassKey(self._device, minor)] = wanted.rate
            self._place(wanted, minor, alone=wanted.claim.priority not in u32)

    def _class(self, wanted: Wanted, given: set[int]) -> int:
        standing = self._layout.classes.get(wanted.claim.limit)
        pool = EIP_CLASSES if wanted.claim.of_eip else INTERFACE_CLASSES
        # Kube-OVN's script may have led two addresses to one class: then only the first keeps it; or one of them to
        # the class of what nothing claims, which would limit that, too.
        taken = standing in given or standing in self._layout.default
        if standing is not None and standing in pool and not taken:
            return standing
        minor = self._layout.free_class(wanted.claim.of_eip, self._classes)
        if minor is None:
            raise Unshapeable(f"{wanted.limit}: {self._device} has no class left")
        self._classes.add(minor)
        return minor

    def _place(self, wanted: Wanted, minor: int, *, alone: bool) -> None:
        """Say where the limit's filter is: where it stands if that will do, else at a place that is free."""
        have = self._layout.objects
        standing = [key for key, leads_to in self._layout.places.get(wanted.claim, ()) if leads_to == minor]
        kept = next((key for key in standing if alone and isinstance(have[key], Matchall)), None)
        if kept is None:
            table, bucket, nodes = self._bucket(wanted.claim)
            here = (key for key in standing if (key.table, key.bucket) == (table, bucket) and key.node in nodes)
            kept = next(here, None)
        if kept is not None:
            self._said[kept] = have[kept]
            return
        node = self._node((wanted.claim.priority, table, bucket), nodes, str(wanted.limit))
        key = FilterKey(self._device, wanted.claim.priority, table, bucket, node)
        self._said[key] = Classify((_selector(wanted.claim.match),), minor)

    def _bucket(self, claim: Claim) -> tuple[int, int, range]:
        """Table, bucket and nodes for a filter; what leads there is said, too."""
        side, address, length = claim.match
        if side is None:
            return ROOT_TABLE, 0, _ALL_NODES
        if length < 32:
            first = _PREFIX_NODES + (2 * (31 - length) + (side != self._eip_side)) * _PREFIXES_A_SIDE
            return ROOT_TABLE, 0, range(first, first + _PREFIXES_A_SIDE)
        nodes = _FIRST_HASH if side == self._eip_side else _SECOND_HASH
        outer = self._table(claim.priority, ROOT_TABLE, 0, nodes, Link(0, _OFFSET[side], _THIRD))
        third, fourth = address >> 8 & 0xFF, address & 0xFF
        inner = self._table(claim.priority, outer, third, _HASH_NODES, Link(0, _OFFSET[side], _FOURTH))
        return inner, fourth, _EIP_NODES if claim.of_eip else _INTERFACE_NODES

    def _table(self, priority: int, table: int, bucket: int, nodes: range, hashed: Link) -> int:
        """The table to which the bucket leads by this hash; a new one where there is none."""
        at = (priority, table, bucket), hashed
        standing = self._layout.links.get(at) or self._links.get(at)
        if standing is None:
            taken = self._layout.tables
            number = next((n for n in range(1, TABLE_MAX + 1) if n not in taken and n not in self._tables), None)
            if number is None:
                raise Unshapeable(f"{self._device} has no hash table left for addresses of one more prefix")
            self._tables.add(number)
            node = self._node((priority, table, bucket), nodes, f"a hash table at priority {priority}")
            standing = FilterKey(self._device, priority, table, bucket, node), number
            self._links[at] = standing
        place, number = standing
        if place not in self._said:
            self._said[TableKey(self._device, priority, number)] = Table()
            self._said[place] = replace(hashed, table=number)
        return number

    def _node(self, bucket: _Bucket, nodes: range, what: str) -> int:
        taken, given = self._layout.nodes.get(bucket, ()), self._nodes[bucket]
        node = next((node for node in nodes if node not in taken and node not in given), None)
        if node is None:
            raise Unshapeable(f"{what}: no more than {len(nodes)} of its kind fit one priority of {self._device}")
        given.add(node)
        return node


def _bucket(key: FilterKey) -> _Bucket:
    return key.priority, key.table, key.bucket


def _selector(match: Match) -> Selector:
    if match.side is None:
        return Selector()
    return Selector(match.address, EXACT << (32 - match.length) & EXACT, _OFFSET[match.side])


def claims(objects: Objects) -> Iterator[tuple[FilterKey, Claim, int]]:
    """The filters that a limit can have: what they claim, and for which class."""
    for key, value in objects.items():
        if isinstance(key, FilterKey) and (found := _claim(key, value)) is not None:
            yield key, *found


def _claim(key: FilterKey, value: Value) -> tuple[Claim, int] | None:
    if not isinstance(value, Classify | Matchall) or (match := match_of(value)) is None:
        return None
    return Claim(value.minor in EIP_CLASSES, key.priority, match), value.minor


def match_of(value: Classify | Matchall | Policer) -> Match | None:
    """What a filter matches, or None for what no limit says."""
    selectors = value.selectors if isinstance(value, Classify) else (Selector(),)
    if isinstance(value, Policer):
        selectors = (value.selector,)
    if len(selectors) != 1:
        return None
    (one,) = selectors
    side, length = _SIDE.get(one.offset), one.mask.bit_count()
    if one.mask != EXACT << (32 - length) & EXACT or (side is None and length):
        return None
    return Match(side, one.value & one.mask, length)
