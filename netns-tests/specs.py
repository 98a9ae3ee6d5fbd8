"""Specs: what verbs make, and random ones from small pools, so that objects meet (EIPs shared, prefixes nested)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from api.execverbs import Change, parse
from rules.edit import edit_all
from rules.spec import Backend, Dnat, Eip, Fip, GatewaySpec, Interfaces, SharedDnat, Snat

EIPS = [f"192.168.0.{n}" for n in range(20, 26)]
TENANTS = ["10.0.1.5", "10.0.1.6", "10.0.1.200", "10.0.2.5", "10.0.2.200"]
PREFIXES = ["0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/23", "10.0.1.0/24", "10.0.1.128/25", "10.0.2.0/24", "10.0.1.5/32"]
PORTS = [53, 80, 443]
PROTOCOLS = ["tcp", "udp"]


def edited(spec: GatewaySpec | None, words: Sequence[str]) -> GatewaySpec:
    """The spec after a verb, which must be one that changes something."""
    parsed = parse(words, {"GATEWAY_V4": "192.168.0.1"}, Interfaces())
    assert isinstance(parsed, Change)
    found = edit_all(spec, parsed.commands)
    assert found is not None
    return found


def random_spec(chance: random.Random, sides: Interfaces | None = None) -> GatewaySpec:
    """A spec with up to half a dozen objects of each kind that is about translation."""

    def some(most: int) -> range:
        return range(chance.randrange(most))

    def identity() -> tuple[str, int, str]:
        return chance.choice(EIPS), chance.choice(PORTS), chance.choice(PROTOCOLS)

    identities = list(dict.fromkeys(identity() for _ in some(12)))
    shared = {key for key in identities if chance.random() < 0.2}
    translations = dict.fromkeys((chance.choice(EIPS), chance.choice(PREFIXES)) for _ in some(8))
    return GatewaySpec(
        interfaces=sides or Interfaces(external=chance.choice(["net1", "net1", "net2"])),
        gateway_v4="192.168.0.1",
        eips=[Eip(address=f"{eip}/24") for eip in chance.sample(EIPS, chance.randrange(len(EIPS) + 1))],
        fips=[Fip(eip=eip, internal_ip=chance.choice(TENANTS)) for eip in chance.sample(EIPS, chance.randrange(4))],
        dnats=[
            Dnat(eip=eip, external_port=port, protocol=protocol, internal_ip=chance.choice(TENANTS), internal_port=8080)
            for eip, port, protocol in identities
            if (eip, port, protocol) not in shared
        ],
        snats=[Snat(eip=eip, internal_cidr=prefix, random_fully=chance.random() < 0.5) for eip, prefix in translations],
        shared_dnats=[
            SharedDnat(
                eip=eip,
                external_port=port,
                protocol=protocol,
                backends=(Backend(internal_ip=chance.choice(TENANTS), internal_port=8081),),
            )
            for eip, port, protocol in shared
        ],
    )
