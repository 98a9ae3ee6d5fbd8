"""What may be sent to the gateway itself (``NATGW_INPUT=protect``): a chain of its own that passes what is named.

mangle: INPUT -> INPUT_GUARD, for IPv4 and IPv6. It stands in mangle, not in filter, because that table is read for
every change anyway, and because ARP_GUARD stands there as well; both tables' hooks see the same packets. What is named
returns to INPUT, so that rules of others still run; the rest of what comes in by the gateway's two interfaces is
dropped. Other interfaces (lo) are not looked at, and neither is ARP, which is not IP; neighbour discovery is ICMPv6.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from rules.ruleset import (
    FAMILIES,
    ChainRef,
    Destination,
    DestinationPort,
    Drop,
    Family,
    InInterface,
    Jump,
    Match,
    Protocol,
    Return,
    Rule,
    Rules,
    Source,
    States,
)
from rules.spec import Interfaces
from rules.state import Actual

INPUT_GUARD = "INPUT_GUARD"
BFD_PORTS = (3784, 4784)  # single-hop (RFC 5881) and multihop (RFC 5883)
BGP_PORT = 179
_ICMP: dict[Family, str] = {4: "icmp", 6: "ipv6-icmp"}
_STANDING = States("RELATED,ESTABLISHED")


@dataclass(frozen=True)
class InputPolicy:
    """What may be sent to the gateway besides ICMP, BFD and answers to what it sent.

    ``metrics``: TCP ports that anybody may scrape. ``bgp_peers``: addresses or prefixes of BGP's peers. ``listeners``:
    addresses with the TCP port on which the gateway was told to listen.
    """

    metrics: tuple[int, ...] = ()
    bgp_peers: tuple[str, ...] = ()
    listeners: tuple[tuple[str, int], ...] = ()


def guard_chain(family: Family) -> tuple[ChainRef, ChainRef, Rule]:
    """Our chain, the built-in chain that leads to it, and the jump."""
    return ChainRef("mangle", INPUT_GUARD, family), ChainRef("mangle", "INPUT", family), Rule((), Jump(INPUT_GUARD))


def statements(
    policy: InputPolicy | None, interfaces: Interfaces, actual: Actual
) -> tuple[dict[ChainRef, Rules | None], dict[tuple[ChainRef, Rule], bool]]:
    """Chains and hooks (without a policy: that there are none), of each family whose tables were read."""
    chains: dict[ChainRef, Rules | None] = {}
    hooks: dict[tuple[ChainRef, Rule], bool] = {}
    for family in FAMILIES:
        chain, hook, jump = guard_chain(family)
        if family == 4 or hook in actual.ruleset.chains:
            chains[chain] = tuple(guard_rules(policy, interfaces, family)) if policy is not None else None
            hooks[hook, jump] = policy is not None
    return chains, hooks


def guard_rules(policy: InputPolicy, interfaces: Interfaces, family: Family) -> Iterator[Rule]:
    """The chain's rules: first what is passed, then, by interface, the end."""
    yield _passed(_STANDING)
    yield _passed(Protocol(_ICMP[family]))
    yield from (_passed(DestinationPort("udp", port)) for port in BFD_PORTS)
    yield from (_passed(DestinationPort("tcp", port)) for port in sorted(set(policy.metrics)))
    for peer in sorted({str(ip_network(peer)) for peer in policy.bgp_peers}):
        if ip_network(peer).version == family:
            yield _passed(Source(peer), DestinationPort("tcp", BGP_PORT))
    for address, port in sorted(set(policy.listeners)):
        if ip_address(address).version == family:
            everywhere = ip_address(address).is_unspecified
            where = () if everywhere else (Destination(str(ip_network(address))),)
            yield _passed(*where, DestinationPort("tcp", port))
    yield from (Rule((InInterface(name),), Drop()) for name in (interfaces.external, interfaces.vpc))


def _passed(*matches: Match) -> Rule:
    return Rule(matches, Return())
