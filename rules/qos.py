"""Bandwidth limits -> the tc objects that keep them, and back.

One HTB class a limit, on the interface for what leaves and on an ifb for what comes in; what no limit claims
passes unshaped. How the classes are chosen among is ``rules.qos_tree``'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from decimal import ROUND_HALF_EVEN, Decimal
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from pydantic import ValidationError

from rules.fields import Direction
from rules.keyed import Keyed
from rules.qos_tree import EIP_SIDE, Claim, Layout, Match, Side, Tree, Unshapeable, Wanted, claims, match_of
from rules.spec import EipLimit, GatewaySpec, InterfaceLimit, Interfaces, Limit
from rules.splice import once
from rules.tc import (
    ClassKey,
    Htb,
    Ifb,
    IfbKey,
    Ingress,
    IngressKey,
    Key,
    Objects,
    Policer,
    PolicerKey,
    Rate,
    Redirect,
    RedirectKey,
    RootKey,
    Value,
    order,
    ticks,
)

IFB_PREFIX = "ifb-"
NAME_MAX = 15  # IFNAMSIZ without the terminating zero
BURST_MIN = 1600  # bytes; tc's own least: one frame
_MEGABIT = 125_000  # bytes
_MEBIBYTE = 2**20

Point = tuple[str, Direction]
"""Where limits are kept: an interface and a direction."""

_DIRECTION: dict[bool, Direction] = {True: "ingress", False: "egress"}


def interfaces_of(spec: GatewaySpec) -> set[str]:
    """The interfaces that the spec's limits are about."""
    return {interface for interface, _ in points(spec.qos, spec.interfaces)}


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


class _Points:
    """Where limits are kept, and how many at each; what is in common with the last ones is not looked at again."""

    def __init__(self) -> None:
        self._last: tuple[Keyed[Limit], Interfaces, Counter[Point]] = (Keyed(), Interfaces(), Counter())

    def __call__(self, limits: Keyed[Limit], interfaces: Interfaces) -> Mapping[Point, int]:
        known, sides, counted = self._last
        if sides != interfaces:
            known, counted = Keyed(), Counter()
        gone, came = limits.changes(known)
        if gone or came:
            counted = counted.copy()
            counted.subtract(point(limit, interfaces) for limit in gone)
            counted.update(point(limit, interfaces) for limit in came)
            counted += Counter()  # those of which there are none any more go
        self._last = (limits, interfaces, counted)  # all at once: threads may call
        return counted


points = _Points()


def statements(spec: GatewaySpec, have: Objects) -> dict[Key, Value | None]:
    """What tc shall look like, given what there is of ours. Raises Unshapeable."""
    return everything(spec.qos, spec.interfaces, have)


@once
def everything(limits: Keyed[Limit], interfaces: Interfaces, have: Objects) -> dict[Key, Value | None]:
    """``statements``, of parts of a spec."""
    wanted = placed(limits, interfaces)
    said: dict[Key, Value | None] = {}
    for (interface, direction), here in wanted.items():
        said |= Tree(Layout(device_of(interface, direction), have), direction).statements(here)
        if direction == "ingress":
            said |= _redirection(interface, have)
    said |= dict.fromkeys(replaced(wanted, have))
    for device in [key.device for key in have if isinstance(key, RootKey) and key not in said]:
        said |= _unlimited(device, have)
    for key, redirect in have.items():
        if isinstance(redirect, Redirect) and key not in said and said.get(RootKey(redirect.ifb)) is None:
            said[key] = None
            if have.get(IngressKey(key.device)) == Ingress(shared=False):
                said[IngressKey(key.device)] = None
    return said


def placed(limits: Iterable[Limit], interfaces: Interfaces) -> dict[Point, list[Wanted]]:
    """The limits by where they are kept."""
    wanted: dict[Point, list[Wanted]] = {}
    for limit in limits:
        wanted.setdefault(point(limit, interfaces), []).append(_want(limit))
    return wanted


def point(limit: Limit, interfaces: Interfaces) -> Point:
    return _interface(limit, interfaces), limit.direction


def _unlimited(device: str, have: Objects) -> dict[Key, Value | None]:
    """A device without limits: the tree goes, unless it was adopted. That one stays, as Kube-OVN's script leaves it."""
    root = have[RootKey(device)]
    if isinstance(root, Htb) and not root.ours:
        return Tree(Layout(device, have), _DIRECTION[device.startswith(IFB_PREFIX)]).statements([])
    return {RootKey(device): None}


def replaced(wanted: Mapping[Point, Iterable[Wanted]], have: Mapping[Any, Value]) -> Iterator[Key]:
    """Policers of the limits that we keep by shaping. Others are somebody else's, and stay."""
    for key, value in have.items():
        if isinstance(key, PolicerKey) and isinstance(value, Policer):
            claims = [limit.claim for limit in wanted.get((key.device, _DIRECTION[key.ingress]), ())]
            if any(_is_claim_of(claim, key.priority, match_of(value)) for claim in claims):
                yield key


def _is_claim_of(claim: Claim, priority: int, match: Match | None) -> bool:
    return claim.match == match and (claim.of_eip or claim.priority == priority)


def _interface(limit: Limit, interfaces: Interfaces) -> str:
    return interfaces.external if isinstance(limit, EipLimit) else limit.interface


def device_of(interface: str, direction: Direction) -> str:
    """Whose tree keeps the limits. Raises Unshapeable where there can be none."""
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
def _want(limit: Limit) -> Wanted:
    return Wanted(_claim(limit), _rate(limit), limit)


def _claim(limit: Limit) -> Claim:
    if isinstance(limit, EipLimit):
        return Claim(True, limit.priority, _match(EIP_SIDE[limit.direction], limit.eip))
    if not limit.match_value:
        return Claim(False, limit.priority, Match())
    side, _, prefix = limit.match_value.partition(" ")
    return Claim(False, limit.priority, _match("src" if side == "src" else "dst", prefix))


def _match(side: Side, prefix: str) -> Match:
    network = IPv4Network(prefix)
    return Match(side, int(network.network_address), network.prefixlen)


def _rate(limit: Limit) -> Rate:
    rate = _whole(Decimal(limit.rate_max) * _MEGABIT)
    size = max(BURST_MIN, _whole(Decimal(limit.burst_max) * _MEBIBYTE))
    return Rate(rate, ticks(size, rate))


def _whole(number: Decimal) -> int:
    return int(number.quantize(Decimal(1), ROUND_HALF_EVEN))


def classes(spec: GatewaySpec, objects: Objects) -> dict[Limit, ClassKey]:
    """The class that keeps each of the spec's limits, where there is one."""
    found = {(key.device, claim): ClassKey(key.device, minor) for key, claim, minor in claims(objects)}
    places = {
        limit: (device_of(_interface(limit, spec.interfaces), limit.direction), _claim(limit)) for limit in spec.qos
    }
    return {limit: found[place] for limit, place in places.items() if place in found}


def recovered(objects: Objects, interfaces: Interfaces, eips: Collection[str] = ()) -> list[EipLimit | InterfaceLimit]:
    """The limits that the kernel's own objects keep, whoever made them; those of interfaces not in use come as theirs.

    Rates come back exactly, bursts as the shortest number that gives what the kernel has. Of a policer, only ``eips``
    tell whose limit it is.
    """
    sources = {value.ifb: key.device for key, value in objects.items() if isinstance(value, Redirect)}
    found: dict[object, EipLimit | InterfaceLimit] = {}
    for key, claim, minor in sorted(claims(objects), key=lambda one: (one[0].device, one[1].order, order(one[0]))):
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
        match, direction = match_of(value), _DIRECTION[key.ingress]
        if match is not None:
            of_eip = match.length == 32 and str(IPv4Address(match.address)) in eips
            with suppress(ValidationError):
                claim = Claim(of_eip, key.priority, match)
                yield _limit(claim, direction, key.device, value.rate, interfaces.external)


def _limit(claim: Claim, direction: Direction, interface: str, rate: Rate, external: str) -> Limit:
    side, address, length = claim.match
    numbers = {"priority": claim.priority, "rate_max": _mbit(rate), "burst_max": _mebibytes(rate)}
    if claim.of_eip and interface == external and (side, length) == (EIP_SIDE[direction], 32):
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
