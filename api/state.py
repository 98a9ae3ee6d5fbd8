"""A whole reading of a gateway as one document: for support, for ``natgw explain --offline``, for a look afterwards."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, ValidationError

from api.rendered import rendered
from gateway import transaction
from gateway.service import Service
from gateway.status import Status
from rules.appliance import Spec, desired
from rules.desired import Facts
from rules.entries import Entries
from rules.iptables import parse_save, render_save
from rules.loadbalancer import LoadBalancerSpec
from rules.maps import EntryKey, MapTable, label, labelled
from rules.nft import NftTable, table_text
from rules.ruleset import Ruleset
from rules.share import services, table_of
from rules.spec import GatewaySpec, Part
from rules.state import Actual, AddressKey, LinkState, PolicyRule, RouteEntry, RouteKey
from rules.story import Reading
from rules.surroundings import Surroundings

KIND = "natgw-state/1"
_MAC = "00:00:00:00:00:00"


class LinkModel(Part):
    """An interface."""

    index: int
    mac: str
    up: bool
    arp: bool
    mtu: int
    promote_secondaries: bool


class AddressModel(Part):
    """An address; ``ours``: it bears the gateway's mark."""

    interface: str
    address: str
    ours: bool


class RouteModel(Part):
    """A route; 254 is the main table, ``protocol`` says who made it (223: the gateway)."""

    prefix: str
    table: int
    interface: str
    via: str | None
    onlink: bool = False
    protocol: int = 0


class PolicyRuleModel(Part):
    """A rule of the routing policy (IPv4, IPv6)."""

    interface: str | None
    table: int
    priority: int | None
    source: str | None = None
    family: Literal[4, 6] = 4
    foreign: str = ""


class MapEntryModel(Part):
    """What a map has for an address, in some with a protocol and a port."""

    map: str
    address: str
    protocol: str
    port: int
    to_address: str
    to_port: int


class MapsModel(Part):
    """The table of maps that decide ahead of the chains: rules by their labels, and entries."""

    chains: dict[str, list[str]]
    names: list[str]
    entries: list[MapEntryModel]

    @classmethod
    def of(cls, table: MapTable) -> Self:
        """The table as a document."""
        return cls(
            chains={name: [label(rule) for rule in rules] for name, rules in table.chains.items()},
            names=sorted(table.maps),
            entries=[
                MapEntryModel(
                    map=key.map,
                    address=key.address,
                    protocol=key.protocol,
                    port=key.port,
                    to_address=address,
                    to_port=port,
                )
                for key, (address, port) in table.entries.items()
            ],
        )

    @property
    def table(self) -> MapTable:
        """The document as a table."""
        return MapTable(
            chains={name: tuple(map(labelled, rules)) for name, rules in self.chains.items()},
            maps=frozenset(self.names),
            entries=Entries(
                {EntryKey(e.map, e.address, e.protocol, e.port): (e.to_address, e.to_port) for e in self.entries}
            ),
        )


class State(Part):
    """What is wanted and what is there. ``rules`` as iptables-save prints them, ``nft`` as nft does.

    Exactly one of ``gateway`` and ``load_balancer`` is there once the pod is initialized.
    """

    kind: Literal["natgw-state/1"] = "natgw-state/1"
    at: float = Field(description="Unix seconds")
    status: Status
    gateway: GatewaySpec | None = None
    load_balancer: LoadBalancerSpec | None = None
    rules: str
    nft: str
    maps: MapsModel
    links: dict[str, LinkModel]
    addresses: list[AddressModel]
    routes: list[RouteModel]
    policy_rules: list[PolicyRuleModel]
    surroundings: Surroundings

    @property
    def reading(self) -> Reading:
        """What the document says, to explain packets by."""
        spec = self.gateway or self.load_balancer
        actual = Actual(
            ruleset=parse_save(self.rules),
            links={name: LinkState(**link.model_dump(by_alias=False)) for name, link in self.links.items()},
            addresses={AddressKey(a.interface, a.address): a.ours for a in self.addresses},
            routes={
                RouteKey(r.prefix, r.table): RouteEntry(r.interface, r.via, r.onlink, r.protocol) for r in self.routes
            },
            nft=_shared(spec),
            maps=self.maps.table,
            policy_rules=frozenset(PolicyRule(**rule.model_dump(by_alias=False)) for rule in self.policy_rules),
        )
        return Reading(spec, actual, self.surroundings)


def read_now(service: Service) -> Reading:
    """A fresh reading, by the writer; blocks until it had its turn. Raises Refused."""
    actual = service.ask(transaction.read).result()
    return Reading(service.spec or service.load_balancer, actual, service.around())


def state_of(service: Service) -> State:
    """The whole document, read now; blocks. Raises Refused."""
    reading = read_now(service)
    actual = reading.actual
    return State(
        at=time.time(),
        status=service.status(),
        gateway=service.spec,
        load_balancer=service.load_balancer,
        rules=render_save(Ruleset({ref: rules for ref, rules in actual.ruleset.chains.items() if ref.family == 4})),
        nft=table_text(actual.nft),
        maps=MapsModel.of(actual.maps),
        links={
            name: LinkModel(
                index=link.index,
                mac=link.mac,
                up=link.up,
                arp=link.arp,
                mtu=link.mtu,
                promote_secondaries=link.promote_secondaries,
            )
            for name, link in actual.links.items()
        },
        addresses=[AddressModel(interface=k.interface, address=k.address, ours=o) for k, o in actual.addresses.items()],
        routes=[
            RouteModel(
                prefix=key.prefix,
                table=key.table,
                interface=entry.interface,
                via=entry.via,
                onlink=entry.onlink,
                protocol=entry.protocol,
            )
            for key, entry in actual.routes.items()
        ],
        policy_rules=[PolicyRuleModel(**rule._asdict()) for rule in sorted(actual.policy_rules, key=str)],
        surroundings=reading.around,
    )


def offline(document: Any) -> Reading:
    """The reading in a document: what ``GET /v1/state`` said, the daemon's stored spec, or an exported one.

    A spec alone says nothing of links and addresses: then everything is taken to be as it wants it, and internal
    addresses to lie behind the tenants' interface. Raises ValueError with one sentence.
    """
    if not isinstance(document, Mapping):
        raise ValueError("not an object")
    try:
        if document.get("kind") == KIND:
            return State.model_validate(document).reading
        return _assumed(stored_spec(document))
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from error


def stored_spec(document: Mapping[str, Any]) -> Spec:
    """The spec in a stored or an exported document; raises ValueError, pydantic's ValidationError among them."""
    if "sha256" in document:
        body = str(document.get("spec"))
        if hashlib.sha256(body.encode()).hexdigest() != document["sha256"]:
            raise ValueError("the stored spec's checksum does not match")
        document = json.loads(body)
    return LoadBalancerSpec.model_validate(document) if "eip" in document else GatewaySpec.model_validate(document)


def _assumed(spec: Spec) -> Reading:
    """The kernel as a spec alone wants it."""
    wanted = desired(spec, Facts(), Actual())
    vpc, external = spec.interfaces.vpc, spec.interfaces.external
    routes = {key: entry for key, entry in wanted.routes.items() if entry is not None}
    for prefix in _inside(spec):
        routes.setdefault(RouteKey(prefix), RouteEntry(vpc, None))
    links = {
        name: LinkState(i, _MAC, True, wanted.arp.get(name, True), 1500, True)
        for i, name in enumerate((vpc, external), 1)
    }
    actual = Actual(
        ruleset=rendered(spec, Facts()),
        links=links,
        addresses={key: True for key, present in wanted.addresses.items() if present},
        routes=routes,
        nft=_shared(spec),
        policy_rules=frozenset(rule for rule, present in wanted.policy_rules.items() if present),
    )
    return Reading(spec, actual, surveyed=False)


def _shared(spec: Spec | None) -> NftTable:
    """The table of share-type DNAT, as the spec wants it."""
    return table_of(services(spec)) if isinstance(spec, GatewaySpec) and spec.shared_dnats else NftTable()


def _inside(spec: Spec) -> list[str]:
    """Prefixes that the spec's own objects say to be the tenants'."""
    if isinstance(spec, LoadBalancerSpec):
        return []
    hosts = [*(f.internal_ip for f in spec.fips), *(d.internal_ip for d in spec.dnats)]
    hosts += [backend.internal_ip for shared in spec.shared_dnats for backend in shared.backends]
    found = [snat.internal_cidr for snat in spec.snats if snat.prefix_length] + [f"{host}/32" for host in hosts]
    return list(dict.fromkeys(found))
