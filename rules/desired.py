"""GatewaySpec -> Desired: every statement about the kernel that the spec implies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rules import fastpath, nat, qos_held, share
from rules.chase import may_follow
from rules.inputguard import InputPolicy
from rules.keyed import Keyed
from rules.nft import NftTable
from rules.spec import Eip, GatewaySpec
from rules.splice import once
from rules.state import MAIN_TABLE, ROUTE_PROTOCOL, Actual, AddressKey, Desired, RouteEntry, RouteKey

DEFAULT_V4 = RouteKey("0.0.0.0/0")
DEFAULT_V6 = RouteKey("::/0")

ArpPolicy = Literal["auto", "on"]


@dataclass(frozen=True)
class Facts:
    """What is decided besides the spec.

    ``arp``: auto, or on (never touched). ``claimed``: addresses that do not bear our mark and yet go when their EIP
    goes: another program put them up for EIPs that we adopted. ``dismissed``: prefixes whose routes on the tenant's
    side go, whoever made them, for a call has named them. ``fastpath``: off, or maps ahead of the chains wherever that
    is possible. ``input``: what may be sent to the gateway itself; None: everything. ``follow``: chains that may follow
    behind the maps (``rules.chase``) are not spoken of.
    """

    arp: ArpPolicy = "auto"
    claimed: frozenset[AddressKey] = frozenset()
    dismissed: frozenset[str] = frozenset()
    fastpath: fastpath.Setting = "auto"
    input: InputPolicy | None = None
    follow: bool = False


def desired(spec: GatewaySpec, facts: Facts, actual: Actual) -> Desired:
    """What the kernel shall look like.

    Of ``actual`` only our own leftovers are used (addresses and routes that bear our mark): what the spec no
    longer names is stated as "is not there". Everything foreign stays unmentioned. Raises qos_tree.Unshapeable.
    """
    limits = qos_held.statements(spec, actual.tc)
    if not spec.initialized:
        return Desired(tc=limits)
    arp_on = facts.arp == "on" or bool(spec.eips)
    external = spec.interfaces.external
    on = not without_maps(facts, actual)
    maps = fastpath.table(spec) if on else fastpath.NO_TABLE
    later = may_follow(maps, actual) if facts.follow else frozenset()
    return Desired(
        chains=nat.chains(spec, guard=not arp_on, maps=on, without=later),
        hooks=dict.fromkeys(nat.HOOKS, True),
        addresses=_addresses(spec.eips, external, actual.addresses, facts.claimed),
        routes=_routes(spec, facts, actual),
        arp={} if facts.arp == "on" else {external: arp_on},
        promote_secondaries={external: True},
        nft=_nft(spec, actual),
        tc=limits,
        maps=maps,
        later=later,
    )


def without_maps(facts: Facts, actual: Actual) -> str:
    """Why the chains decide alone, in one line; empty where maps decide ahead of them."""
    return fastpath.hindrance(facts.fastpath, actual.ruleset.chains, actual.no_maps)


def _nft(spec: GatewaySpec, actual: Actual) -> NftTable | None:
    # A table that nobody needed is not made; one that is there is ours, and stays for whoever lists it.
    wanted = share.services(spec)
    return share.table_of(wanted) if wanted or actual.nft != NftTable() else None


@once
def _addresses(
    eips: Keyed[Eip], external: str, standing: Mapping[AddressKey, bool], claimed: frozenset[AddressKey]
) -> Mapping[AddressKey, bool]:
    said = dict.fromkeys((AddressKey(external, eip.address) for eip in eips), True)
    for key, ours in standing.items():
        if (ours or key in claimed) and key not in said:
            said[key] = False
    return said


def _routes(spec: GatewaySpec, facts: Facts, actual: Actual) -> dict[RouteKey, RouteEntry | None]:
    wanted: dict[RouteKey, RouteEntry | None] = {
        RouteKey(r.cidr): RouteEntry(spec.interfaces.vpc, r.next_hop_ip) for r in spec.routes
    }
    if spec.eips:
        # The default routes come with the first EIP and stay after the last: other things may rely on them by then.
        for key, gateway in ((DEFAULT_V4, spec.gateway_v4), (DEFAULT_V6, spec.gateway_v6)):
            if gateway:
                wanted[key] = RouteEntry(spec.interfaces.external, gateway, onlink=True)
    leftovers: dict[RouteKey, RouteEntry | None] = {
        key: None
        for key, entry in actual.routes.items()
        if _is_ours(key, entry) and key not in wanted and key not in (DEFAULT_V4, DEFAULT_V6)
    }
    dismissed: dict[RouteKey, RouteEntry | None] = {
        key: None
        for key in map(RouteKey, facts.dismissed)
        if key in actual.routes and _is_ours_to_name(spec, key, actual.routes[key])
    }
    return dismissed | leftovers | wanted


def _is_ours_to_name(spec: GatewaySpec, key: RouteKey, entry: RouteEntry) -> bool:
    """What a subnet route looks like: on the tenant's side, by a router, and no default route."""
    inside = entry.interface == spec.interfaces.vpc and entry.via is not None
    return inside and key not in (DEFAULT_V4, DEFAULT_V6)


def _is_ours(key: RouteKey, entry: RouteEntry) -> bool:
    """A NAT gateway's routes stand in the main table."""
    return entry.protocol == ROUTE_PROTOCOL and key.table == MAIN_TABLE
