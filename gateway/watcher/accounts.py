"""Whose flow is it: from the endpoints of a translated connection to the objects that it belongs to. Pure."""

from __future__ import annotations

import socket
import struct
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator
from typing import Any, NamedTuple

from gateway.observer.flow import DNAT, SNAT, Flow
from gateway.watcher.ports import PortUse

BYTES_IN, PACKETS_IN, BYTES_OUT, PACKETS_OUT, ACTIVE_IN, ACTIVE_OUT, NEW_IN, NEW_OUT = range(8)
"""Places in sums; flows count in the direction in which they were opened."""
SUMS = 8
_STRAIGHT = (0, 1, 2, 3, 4, 5, 6, 7)
_SWAPPED = (2, 3, 0, 1, 5, 4, 7, 6)

Key = tuple[Any, ...]
"""What names an object: its kind and its identity."""
TOTAL: Key = ("total",)

_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
_REMEMBERED = 65536
"""Source addresses whose rule is remembered rather than searched for again."""
_U32 = struct.Struct(">I")


class Objects(NamedTuple):
    """Objects of a spec, in its order."""

    eips: Collection[str] = ()
    fips: Collection[tuple[str, str]] = ()
    """EIP and internal address."""
    dnats: Collection[tuple[str, int, str, bool]] = ()
    """EIP, port, protocol, and whether it is shared."""
    snats: Collection[tuple[str, str]] = ()
    """EIP and prefix."""

    @classmethod
    def of(cls, said: dict[str, Any]) -> Objects:
        """From the JSON that the daemon sends; raises KeyError, ValueError or TypeError for anything else."""
        return cls(
            tuple(str(eip) for eip in said["eips"]),
            tuple((str(eip), str(inside)) for eip, inside in said["fips"]),
            tuple((str(eip), int(port), str(protocol), bool(shared)) for eip, port, protocol, shared in said["dnats"]),
            tuple((str(eip), str(prefix)) for eip, prefix in said["snats"]),
        )

    def named(self) -> Iterator[Key]:
        """The key of every object."""
        yield from (("eip", eip) for eip in self.eips)
        yield from (("fip", *fip) for fip in self.fips)
        yield from (("dnat", eip, port, protocol) for eip, port, protocol, _ in self.dnats)
        yield from (("snat", *snat) for snat in self.snats)


class Account:
    """The sums of the flows that belong to the same objects and were opened in the same direction.

    ``ports``, if any, are the EIP's ports that these flows hold.
    """

    __slots__ = ("inbound", "ports", "sums", "targets")

    def __init__(self, inbound: bool, targets: tuple[tuple[Key, tuple[int, ...]], ...], ports: PortUse | None) -> None:
        self.inbound = inbound
        self.targets = targets
        """The objects, each with the place in its sums of each of ours."""
        self.ports = ports
        self.sums = [0] * SUMS

    @property
    def explained(self) -> bool:
        """Whether a rule of the spec says why they are translated."""
        return len(self.targets) > 1

    @property
    def active(self) -> int:
        """How many of the flows live."""
        return self.sums[ACTIVE_IN] + self.sums[ACTIVE_OUT]


class Accounts:
    """All accounts, and which of them a flow belongs to: a few dictionary lookups, whatever the number of rules."""

    def __init__(self) -> None:
        self._held = _held(Objects())
        self.ports: dict[str, PortUse] = {}
        """By EIP."""
        self._all: dict[tuple[bool, Key], Account] = {}
        self._loose: dict[tuple[bool, Key], Account] = {}
        """Of them, those that are no object's of the spec."""
        self._gone = [0] * SUMS
        """What flows of objects that are no more have left, so that the total never goes back."""
        self._dnats: dict[tuple[bytes, int, int], Account] = {}
        self._fips_in: dict[bytes, Account] = {}
        self._fips_out: dict[tuple[bytes, bytes], Account] = {}
        self._snats: dict[bytes, dict[int, dict[int, Account]]] = {}
        self._remembered: dict[tuple[bytes, bytes], Account] = {}
        self._named: Counter[str] = Counter()
        """How often the spec names an EIP; rules may name one that is not (yet) there."""
        self._names: dict[bytes, str] = {}
        self._no_eip = {inbound: self._account(inbound, TOTAL, ()) for inbound in (True, False)}
        self._loose.clear()

    @property
    def objects(self) -> Objects:
        """Those of the spec."""
        return Objects(*self._held)

    def set(self, objects: Objects) -> None:
        """This is the spec now. Sums of what stays go on; flows that live may belong elsewhere now."""
        before, self._held = self._held, _held(objects)
        self._apply(_among(before, self._held, there=False), _among(self._held, before, there=False))

    def change(self, gone: Objects, fresh: Objects) -> None:
        """Objects have left the spec and come to it; being told so again changes nothing."""
        gone, fresh = _among(gone, self._held, there=True), _among(fresh, self._held, there=False)
        for held, left, came in zip(self._held, gone, fresh, strict=True):
            for row in left:
                del held[row]
            held.update(dict.fromkeys(came))
        self._apply(gone, fresh)

    def _apply(self, gone: Objects, fresh: Objects) -> None:
        for eip, port, protocol, _ in gone.dnats:
            self._leaves(self._dnats.pop((socket.inet_aton(eip), port, _PROTOCOLS[protocol])))
        for eip, inside in gone.fips:
            self._leaves(self._fips_in.pop(socket.inet_aton(eip)))
            self._leaves(self._fips_out.pop((socket.inet_aton(eip), socket.inet_aton(inside))))
        for eip, prefix in gone.snats:
            shift, network = _cut(prefix)
            by_length = self._snats[socket.inet_aton(eip)]
            self._leaves(by_length[shift].pop(network))
            if not by_length[shift]:
                del by_length[shift]
        for eip, port, protocol, _ in fresh.dnats:
            place = (socket.inet_aton(eip), port, _PROTOCOLS[protocol])
            self._dnats[place] = self._comes(True, ("dnat", eip, port, protocol), eip)
        for eip, inside in fresh.fips:
            key: Key = ("fip", eip, inside)
            self._fips_in[socket.inet_aton(eip)] = self._comes(True, key, eip)
            self._fips_out[socket.inet_aton(eip), socket.inet_aton(inside)] = self._comes(False, key, eip)
        for eip, prefix in fresh.snats:
            shift, network = _cut(prefix)
            networks = self._snats.setdefault(socket.inet_aton(eip), {}).setdefault(shift, {})
            networks[network] = self._comes(False, ("snat", eip, prefix), eip, ports=True)
        self._named.update(_names(fresh))
        self._named.subtract(_names(gone))
        for eip in {*_names(gone), *_names(fresh)}:
            if self._named[eip]:
                self._names[socket.inet_aton(eip)] = eip
            else:
                del self._named[eip], self._names[socket.inet_aton(eip)]
        self._remembered.clear()
        self._forget()

    def _comes(self, inbound: bool, key: Key, eip: str, ports: bool = False) -> Account:
        """The account of an object of the spec."""
        account = self._account(inbound, key, (eip,), ports)
        self._loose.pop((inbound, key), None)
        return account

    def _leaves(self, account: Account) -> None:
        """The account is no longer an object's."""
        self._loose[account.inbound, account.targets[-1][0]] = account

    def _forget(self) -> None:
        """Drop accounts of what is no object of the spec, once their last flow has ended."""
        dropped = [(key, account) for key, account in self._loose.items() if not account.active]
        for key, account in dropped:
            for place, value in enumerate(account.sums):
                self._gone[place] += value
            del self._all[key], self._loose[key]
        if any(account.ports is not None for _, account in dropped):
            held = {id(account.ports) for account in self._all.values()}
            self.ports = {eip: use for eip, use in self.ports.items() if id(use) in held}

    def _account(self, inbound: bool, key: Key, eips: tuple[str, ...], ports: bool = False) -> Account:
        account = self._all.get((inbound, key))
        if account is None:
            targets = [(("eip", eip), _STRAIGHT) for eip in eips]
            if key[0] in ("fip", "dnat", "snat"):
                targets.append((key, _STRAIGHT))
            use = self.ports.setdefault(eips[0], PortUse()) if ports else None
            account = self._loose[inbound, key] = self._all[inbound, key] = Account(inbound, tuple(targets), use)
        return account

    def of(self, flow: Flow) -> Account:
        """The account of a flow."""
        if flow.nat == SNAT:
            return self._outbound(flow)
        arrived = self._inbound(flow)
        if flow.nat == DNAT:
            return arrived
        left = self._outbound(flow)
        return arrived if left is self._no_eip[False] else self._hairpin(arrived, left)

    def _inbound(self, flow: Flow) -> Account:
        address = flow.original.destination
        found = self._dnats.get((address, flow.original.destination_port, flow.protocol)) or self._fips_in.get(address)
        return found or self._ruleless(True, address)

    def _outbound(self, flow: Flow) -> Account:
        place = (flow.translated.source, flow.original.source)
        found = self._fips_out.get(place) or self._remembered.get(place)
        if found is None:
            found = self._snat(*place) or self._ruleless(False, place[0])
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            self._remembered[place] = found
        return found

    def _snat(self, eip: bytes, source: bytes) -> Account | None:
        """The rule with the longest prefix."""
        if len(source) != 4:
            return None
        number = _number(source)
        by_length = self._snats.get(eip, {})
        return next(
            (found for shift in sorted(by_length) if (found := by_length[shift].get(number >> shift)) is not None), None
        )

    def _ruleless(self, inbound: bool, address: bytes) -> Account:
        """Translated by a rule that is not in the spec: somebody else's, or one that we are about to hear of."""
        eip = self._names.get(address)
        if eip is None:
            return self._no_eip[inbound]
        return self._account(inbound, ("eip", eip), (eip,), ports=not inbound)

    def _hairpin(self, arrived: Account, left: Account) -> Account:
        """From inside to an EIP and back inside: in for the one EIP, out for the other."""
        key = ("both", arrived.targets, left.targets)
        account = self._all.get((True, key))
        if account is None:
            swapped = tuple((target, _SWAPPED) for target, _ in left.targets)
            account = Account(True, arrived.targets + swapped, left.ports)
            self._loose[True, key] = self._all[True, key] = account
        return account

    def sums(self) -> dict[Key, list[int]]:
        """The sums of every object of the spec, and of everything (TOTAL)."""
        found: dict[Key, list[int]] = {key: [0] * SUMS for key in self.objects.named()}
        total = found[TOTAL] = list(self._gone)
        for account in self._all.values():
            sums = account.sums
            for place, value in enumerate(sums):
                total[place] += value
            for key, places in account.targets:
                target = found.get(key)
                if target is not None:
                    for place, value in zip(places, sums, strict=True):
                        target[place] += value
        return found


def _number(address: bytes) -> int:
    number: int = _U32.unpack(address)[0]
    return number


def _cut(prefix: str) -> tuple[int, int]:
    """The bits that are not of the network, and the number that the others are."""
    network, _, length = prefix.partition("/")
    shift = 32 - int(length)
    return shift, _number(socket.inet_aton(network)) >> shift


def _names(objects: Objects) -> Iterator[str]:
    """Every EIP as often as it is named."""
    yield from objects.eips
    for rows in (objects.fips, objects.dnats, objects.snats):
        yield from (str(row[0]) for row in rows)


def _held(objects: Objects) -> tuple[dict[Any, None], ...]:
    return tuple(dict.fromkeys(rows) for rows in objects)


def _among(some: Iterable[Collection[Any]], others: Iterable[Container[Any]], *, there: bool) -> Objects:
    """Those that are, or are not, among the others."""
    pairs = zip(some, others, strict=True)
    return Objects(*([row for row in rows if (row in known) is there] for rows, known in pairs))
