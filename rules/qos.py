"""Bandwidth limits -> the tc objects that keep them, and back.

One HTB class a limit, on the interface for what leaves and on an ifb for what comes in; what no limit claims
passes unshaped. Which class a packet belongs to is decided by u32 filters of protocol ip at the limit's priority:

- all limits of single addresses at one priority share a hash of two levels, over the third and the fourth byte of
  the address: two look-ups, whether there is one address or ten thousand;
- shorter prefixes follow in one list, the longest first, and limits of all traffic stand last.

Class ids, hash tables and places of filters are given out, never computed: each limit keeps what it has in the
kernel, a new one gets the lowest that is free. So a changed rate is a change in place, a changed priority is one
more filter to the same class before the old one goes, and two limits never collide. Classes below 1:8000 belong to
EIPs and those from there on to interfaces, in Kube-OVN's own script, too; that is how ``recovered`` tells them apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_EVEN, Decimal
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network
from typing import Literal, NamedTuple

from pydantic import ValidationError

from rules.fields import Direction
from rules.keyed import Keyed
from rules.spec import EipLimit, GatewaySpec, InterfaceLimit, Interfaces, Limit
from rules.splice import once
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
    Ifb,
    IfbKey,
    Ingress,
    IngressKey,
    Key,
    Link,
    Matchall,
    Objects,
    Policer,
    PolicerKey,
    Rate,
    Redirect,
    RedirectKey,
    RootKey,
    Selector,
    Table,
    TableKey,
    Value,
    ticks,
)

IFB_PREFIX = "ifb-"
NAME_MAX = 15  # IFNAMSIZ without the terminating zero
BURST_MIN = 1600  # bytes; tc's own least: one frame
EIP_CLASSES, INTERFACE_CLASSES = _POOLS = range(0x1, 0x8000), range(0x8000, 0xFFFF)
_MEGABIT = 125_000  # bytes
_MEBIBYTE = 2**20

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
_DIRECTION: dict[bool, Direction] = {True: "ingress", False: "egress"}
_EIP_SIDE: dict[Direction, Side] = {"egress": "src", "ingress": "dst"}


class Unshapeable(ValueError):
    """A limit that the kernel has no room for; the message names it and says why."""


class Match(NamedTuple):
    """Packets whose address on one side lies in a prefix; all packets have no side."""

    side: Side | None = None
    address: int = 0
    length: int = 0


class _Claim(NamedTuple):
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


@dataclass(frozen=True)
class _Wanted:
    claim: _Claim
    rate: Rate
    limit: Limit


def interfaces_of(spec: GatewaySpec) -> set[str]:
    """The interfaces that the spec's limits are about."""
    return _interfaces(spec.qos, spec.interfaces)


@once
def _interfaces(limits: Keyed[Limit], interfaces: Interfaces) -> set[str]:
    return {_interface(limit, interfaces) for limit in limits}


def limit_for(spec: GatewaySpec, interface: str, direction: Direction, src: str, dst: str) -> Limit | None:
    """The limit that claims a packet there, as the filters are asked: by priority, single addresses first, then the
    longest prefix; of two limits of one address that of the EIP. None: it passes unshaped.
    """
    addresses: dict[Side, int] = {"src": int(IPv4Address(src)), "dst": int(IPv4Address(dst))}
    here = (
        limit for limit in spec.qos if (_interface(limit, spec.interfaces), limit.direction) == (interface, direction)
    )
    return min((limit for limit in here if _within(_claim(limit).match, addresses)), key=_asked_first, default=None)


def _asked_first(limit: Limit) -> tuple[int, int, bool]:
    claim = _claim(limit)
    return claim.priority, -claim.match.length, not claim.of_eip


def _within(match: Match, addresses: Mapping[Side, int]) -> bool:
    if match.side is None:
        return True
    shift = 32 - match.length
    return addresses[match.side] >> shift == match.address >> shift


def statements(spec: GatewaySpec, have: Objects) -> dict[Key, Value | None]:
    """What tc shall look like, given what there is of ours. Raises Unshapeable."""
    return _statements(spec.qos, spec.interfaces, have)


@once
def _statements(limits_wanted: Keyed[Limit], interfaces: Interfaces, have: Objects) -> dict[Key, Value | None]:
    wanted: dict[tuple[str, Direction], list[_Wanted]] = {}
    for limit in limits_wanted:
        point = (_interface(limit, interfaces), limit.direction)
        wanted.setdefault(point, []).append(_want(limit))
    said: dict[Key, Value | None] = {}
    for (interface, direction), limits in wanted.items():
        said |= _Tree(_device(interface, direction), direction, have).statements(limits)
        if direction == "ingress":
            said |= _redirection(interface, have)
    said |= dict.fromkeys(_replaced(wanted, have))
    for device in [key.device for key in have if isinstance(key, RootKey) and key not in said]:
        said |= _unlimited(device, have)
    for key, redirect in have.items():
        if isinstance(redirect, Redirect) and key not in said and said.get(RootKey(redirect.ifb)) is None:
            said[key] = None
            if have.get(IngressKey(key.device)) == Ingress(shared=False):
                said[IngressKey(key.device)] = None
    return said


def _unlimited(device: str, have: Objects) -> dict[Key, Value | None]:
    """A device without limits: the tree goes, unless it was adopted. That one stays, as Kube-OVN's script leaves it."""
    root = have[RootKey(device)]
    if isinstance(root, Htb) and not root.ours:
        return _Tree(device, _DIRECTION[device.startswith(IFB_PREFIX)], have).statements([])
    return {RootKey(device): None}


def _replaced(wanted: Mapping[tuple[str, Direction], Iterable[_Wanted]], have: Objects) -> Iterator[Key]:
    """Policers of the limits that we keep by shaping. Others are somebody else's, and stay."""
    for key, value in have.items():
        if isinstance(key, PolicerKey) and isinstance(value, Policer):
            claims = [limit.claim for limit in wanted.get((key.device, _DIRECTION[key.ingress]), ())]
            if any(_is_claim_of(claim, key.priority, _match_of(value)) for claim in claims):
                yield key


def _is_claim_of(claim: _Claim, priority: int, match: Match | None) -> bool:
    return claim.match == match and (claim.of_eip or claim.priority == priority)


def _interface(limit: Limit, interfaces: Interfaces) -> str:
    return interfaces.external if isinstance(limit, EipLimit) else limit.interface


def _device(interface: str, direction: Direction) -> str:
    if interface.startswith(IFB_PREFIX):
        raise Unshapeable(f"{interface} is where an interface's ingress limits are kept; name that interface")
    if direction == "egress":
        return interface
    if len(IFB_PREFIX + interface) > NAME_MAX:
        most = NAME_MAX - len(IFB_PREFIX)
        raise Unshapeable(f"{interface} cannot have ingress limits: its name has more than {most} characters")
    return IFB_PREFIX + interface


def _redirection(interface: str, have: Objects) -> dict[Key, Value | None]:
    ifb = IFB_PREFIX + interface
    ingress = have.get(IngressKey(interface), Ingress())
    return {IfbKey(ifb): Ifb(), IngressKey(interface): ingress, RedirectKey(interface): Redirect(ifb)}


@lru_cache(maxsize=16384)
def _want(limit: Limit) -> _Wanted:
    return _Wanted(_claim(limit), _rate(limit), limit)


def _claim(limit: Limit) -> _Claim:
    if isinstance(limit, EipLimit):
        return _Claim(True, limit.priority, _match(_EIP_SIDE[limit.direction], limit.eip))
    if not limit.match_value:
        return _Claim(False, limit.priority, Match())
    side, _, prefix = limit.match_value.partition(" ")
    return _Claim(False, limit.priority, _match("src" if side == "src" else "dst", prefix))


def _match(side: Side, prefix: str) -> Match:
    network = IPv4Network(prefix)
    return Match(side, int(network.network_address), network.prefixlen)


def _rate(limit: Limit) -> Rate:
    rate = _whole(Decimal(limit.rate_max) * _MEGABIT)
    size = max(BURST_MIN, _whole(Decimal(limit.burst_max) * _MEBIBYTE))
    return Rate(rate, ticks(size, rate))


def _whole(number: Decimal) -> int:
    return int(number.quantize(Decimal(1), ROUND_HALF_EVEN))


class _Tree:
    """One device's classes and filters, laid out around those that stand."""

    def __init__(self, device: str, direction: Direction, have: Objects) -> None:
        self._device = device
        self._eip_side = _EIP_SIDE[direction]
        self._have: dict[Key, Value] = {key: value for key, value in have.items() if key.device == device}
        root = self._have.get(RootKey(device), Htb())
        self._said: dict[Key, Value | None] = {RootKey(device): root}
        self._default = {root.default} if isinstance(root, Htb) else set()
        self._minors = self._default.copy()
        self._minors |= {key.minor for key in self._have if isinstance(key, ClassKey)}
        self._tables = {key.table for key in self._have if isinstance(key, TableKey)}
        self._nodes: defaultdict[tuple[int, int, int], set[int]] = defaultdict(set)
        self._classes: dict[tuple[object, ...], int] = {}
        self._places: defaultdict[_Claim, list[tuple[FilterKey, int]]] = defaultdict(list)
        self._links: dict[tuple[int, int, int, Link], tuple[FilterKey, int]] = {}
        self._look_around()
        self._free = {pool: (minor for minor in pool if minor not in self._minors) for pool in _POOLS}

    def _look_around(self) -> None:
        for key, claim, minor in _claims(self._have):
            self._minors.add(minor)
            self._classes.setdefault(claim.limit, minor)
            self._places[claim].append((key, minor))
        for place, value in self._have.items():
            if isinstance(place, FilterKey):
                bucket = (place.priority, place.table, place.bucket)
                self._nodes[bucket].add(place.node)
                if isinstance(value, Link) and value.table in self._tables:
                    hashed = Link(0, value.offset, value.mask)
                    self._links.setdefault((*bucket, hashed), (place, value.table))

    def statements(self, limits: Iterable[_Wanted]) -> dict[Key, Value | None]:
        """All that the device shall hold; what else it holds shall go, but for hash tables and the links to them."""
        ordered = sorted(limits, key=lambda wanted: wanted.claim.order)
        u32 = {wanted.claim.priority for wanted in ordered if wanted.claim.match.side}
        given: set[int] = set()
        for wanted in ordered:
            minor = self._class(wanted, given)
            given.add(minor)
            self._said[ClassKey(self._device, minor)] = wanted.rate
            self._place(wanted, minor, alone=wanted.claim.priority not in u32)
        # The class of what nothing claims, of a tree that was adopted, is furniture as well.
        idle = self._default - {minor for places in self._places.values() for _, minor in places}
        furniture: set[Key] = {key for key, _ in self._links.values()}
        furniture |= {ClassKey(self._device, minor) for minor in idle}
        for key in self._have:  # in the kernel's order, so that a plan is the same every time
            if isinstance(key, ClassKey | FilterKey) and key not in self._said and key not in furniture:
                self._said[key] = None
        return self._said

    def _class(self, wanted: _Wanted, given: set[int]) -> int:
        standing = self._classes.get(wanted.claim.limit)
        pool = EIP_CLASSES if wanted.claim.of_eip else INTERFACE_CLASSES
        # Kube-OVN's script may have led two addresses to one class: then only the first keeps it; or one of them to
        # the class of what nothing claims, which would limit that, too.
        if standing is not None and standing in pool and standing not in given | self._default:
            return standing
        minor = next(self._free[pool], None)
        if minor is None:
            raise Unshapeable(f"{wanted.limit}: {self._device} has no class left")
        self._minors.add(minor)
        return minor

    def _place(self, wanted: _Wanted, minor: int, *, alone: bool) -> None:
        """Say where the limit's filter is: where it stands if that will do, else at a place that is free."""
        standing = [key for key, leads_to in self._places[wanted.claim] if leads_to == minor]
        kept = next((key for key in standing if alone and isinstance(self._have[key], Matchall)), None)
        if kept is None:
            table, bucket, nodes = self._bucket(wanted.claim)
            here = (key for key in standing if (key.table, key.bucket) == (table, bucket) and key.node in nodes)
            kept = next(here, None)
        if kept is not None:
            self._said[kept] = self._have[kept]
            return
        node = self._node(wanted.claim.priority, table, bucket, nodes, str(wanted.limit))
        key = FilterKey(self._device, wanted.claim.priority, table, bucket, node)
        self._said[key] = Classify((_selector(wanted.claim.match),), minor)

    def _bucket(self, claim: _Claim) -> tuple[int, int, range]:
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
        at = (priority, table, bucket, hashed)
        standing = self._links.get(at)
        if standing is None:
            number = next((n for n in range(1, TABLE_MAX + 1) if n not in self._tables), None)
            if number is None:
                raise Unshapeable(f"{self._device} has no hash table left for addresses of one more prefix")
            self._tables.add(number)
            node = self._node(priority, table, bucket, nodes, f"a hash table at priority {priority}")
            standing = FilterKey(self._device, priority, table, bucket, node), number
            self._links[at] = standing
        place, number = standing
        if place not in self._said:
            self._said[TableKey(self._device, priority, number)] = Table()
            self._said[place] = replace(hashed, table=number)
        return number

    def _node(self, priority: int, table: int, bucket: int, nodes: range, what: str) -> int:
        taken = self._nodes[priority, table, bucket]
        node = next((node for node in nodes if node not in taken), None)
        if node is None:
            raise Unshapeable(f"{what}: no more than {len(nodes)} of its kind fit one priority of {self._device}")
        taken.add(node)
        return node


def _selector(match: Match) -> Selector:
    if match.side is None:
        return Selector()
    return Selector(match.address, EXACT << (32 - match.length) & EXACT, _OFFSET[match.side])


def _claims(objects: Objects) -> Iterator[tuple[FilterKey, _Claim, int]]:
    """The filters that a limit can have: what they claim, and for which class."""
    for key, value in objects.items():
        if isinstance(key, FilterKey) and isinstance(value, Classify | Matchall):
            match = _match_of(value)
            if match is not None:
                yield key, _Claim(value.minor in EIP_CLASSES, key.priority, match), value.minor


def _match_of(value: Classify | Matchall | Policer) -> Match | None:
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


def classes(spec: GatewaySpec, objects: Objects) -> dict[Limit, ClassKey]:
    """The class that keeps each of the spec's limits, where there is one."""
    found = {(key.device, claim): ClassKey(key.device, minor) for key, claim, minor in _claims(objects)}
    places = {
        limit: (_device(_interface(limit, spec.interfaces), limit.direction), _claim(limit)) for limit in spec.qos
    }
    return {limit: found[place] for limit, place in places.items() if place in found}


def recovered(objects: Objects, interfaces: Interfaces, eips: Collection[str] = ()) -> list[EipLimit | InterfaceLimit]:
    """The limits that the kernel's own objects keep, whoever made them; those of interfaces not in use come as theirs.

    Rates come back exactly, bursts as the shortest number that gives what the kernel has. Of a policer, only ``eips``
    tell whose limit it is.
    """
    sources = {value.ifb: key.device for key, value in objects.items() if isinstance(value, Redirect)}
    found: dict[object, EipLimit | InterfaceLimit] = {}
    for key, claim, minor in sorted(_claims(objects), key=lambda one: (one[0].device, one[1].order)):
        rate = objects.get(ClassKey(key.device, minor))
        direction: Direction = "ingress" if key.device.startswith(IFB_PREFIX) else "egress"
        interface = sources.get(key.device) if direction == "ingress" else key.device
        if not isinstance(rate, Rate) or interface is None:
            continue
        with suppress(ValidationError):
            limit = _limit(claim, direction, interface, rate, interfaces.external)
            found.setdefault(limit.key, limit)
    for limit in _policed(objects, interfaces, eips):
        found.setdefault(limit.key, limit)
    return list(found.values())


def _policed(objects: Objects, interfaces: Interfaces, eips: Collection[str]) -> Iterator[Limit]:
    """The limits that policers keep; of several that match the same, the first decides."""
    policers = ((k, v) for k, v in objects.items() if isinstance(k, PolicerKey) and isinstance(v, Policer))
    for key, value in sorted(policers, key=lambda one: (one[0].device, one[0].ingress, one[0].priority, one[0].handle)):
        match, direction = _match_of(value), _DIRECTION[key.ingress]
        if match is not None:
            of_eip = match.length == 32 and str(IPv4Address(match.address)) in eips
            with suppress(ValidationError):
                claim = _Claim(of_eip, key.priority, match)
                yield _limit(claim, direction, key.device, value.rate, interfaces.external)


def _limit(claim: _Claim, direction: Direction, interface: str, rate: Rate, external: str) -> Limit:
    side, address, length = claim.match
    numbers = {"priority": claim.priority, "rate_max": _mbit(rate), "burst_max": _mebibytes(rate)}
    if claim.of_eip and interface == external and (side, length) == (_EIP_SIDE[direction], 32):
        return EipLimit.model_validate({"eip": str(IPv4Address(address)), "direction": direction, **numbers})
    match = {"match_type": "ip", "match_value": f"{side} {IPv4Address(address)}/{length}"} if side else {}
    return InterfaceLimit.model_validate({"direction": direction, "interface": interface, **match, **numbers})


def _mbit(rate: Rate) -> str:
    return f"{(Decimal(rate.rate) / _MEGABIT).normalize():f}"


def _mebibytes(rate: Rate) -> str:
    exact = rate.burst_bytes / _MEBIBYTE
    for digits in range(10):
        size = _whole(Decimal(f"{exact:.{digits}f}") * _MEBIBYTE)
        if ticks(max(BURST_MIN, size), rate.rate) == rate.burst:
            return f"{exact:.{digits}f}"
    return f"{exact:.10f}"
