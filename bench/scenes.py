"""Gateways of a given size, and the traffic that meets their rules."""

from __future__ import annotations

from bench.bed import ROUTER, Spec
from bench.generator import Traffic

PORTS_PER_EIP = 50
CLIENTS, SERVERS = "198.18.0.0/15", "203.0.113.0/24"
SNAT_EIPS = 200


def eip(number: int) -> str:
    """Addresses of 172.18.16.0 and up."""
    return f"172.18.{16 + number // 250}.{number % 250 + 1}"


def internal(number: int) -> str:
    return f"10.{1 + number // 62500}.{number // 250 % 250}.{number % 250 + 1}"


def spec(*, eips: int = 1, fips: int = 0, dnats: int = 0, snats: int = 0, protocol: str = "udp") -> Spec:
    """A gateway's state. Floating IPs take the first EIPs; port mappings share the rest, 50 on each."""
    shared = max(eips, fips + -(-dnats // PORTS_PER_EIP))
    return {
        "interfaces": {"vpc": "eth0", "external": "net1"},
        "gatewayV4": ROUTER,
        "eips": [{"address": f"{eip(n)}/16"} for n in range(shared)],
        "fips": [{"eip": eip(n), "internalIp": internal(n)} for n in range(fips)],
        "dnats": [dnat(n, fips, protocol) for n in range(dnats)],
        "snats": [
            {"eip": eip(n % min(shared, SNAT_EIPS)), "internalCIDR": cidr(n), "randomFully": True} for n in range(snats)
        ],
    }


def dnat(number: int, first_eip: int = 0, protocol: str = "udp") -> Spec:
    return {
        "eip": eip(first_eip + number // PORTS_PER_EIP),
        "externalPort": 10000 + number % PORTS_PER_EIP,
        "protocol": protocol,
        "internalIp": internal(number),
        "internalPort": 8080,
    }


def rule() -> str:
    """The first port mapping as iptables says it."""
    return f"-d {eip(0)} -p udp --dport 10000 -j DNAT --to {internal(0)}:8080"


def cidr(number: int) -> str:
    """Prefixes of 10.100.0.0 and up."""
    return f"10.{100 + number // 250}.{number % 250}.0/24"


def to_dnats(made: Spec) -> Traffic:
    """From clients to every port mapping."""
    templates = tuple(f"{CLIENTS} {one['eip']}/32 {one['externalPort']}" for one in made["dnats"])
    return Traffic(True, templates, "ip daddr 10.0.0.0/8 th dport 8080", made["dnats"][0]["protocol"])


def last(made: Spec) -> Spec:
    """The same with only the last rule of each kind, for traffic: the worst for a chain, the best for a cache."""
    return {**made, **{kind: made[kind][-1:] for kind in ("fips", "dnats", "snats")}}


def to_some_dnats(made: Spec, count: int) -> Traffic:
    """From clients to so many of the port mappings, spread evenly over all."""
    return to_dnats({**made, "dnats": made["dnats"][:: len(made["dnats"]) // count][:count]})


def inwards(count: int) -> Traffic:
    """From clients to what so many port mappings lead to, by route to the address itself."""
    templates = tuple(f"{CLIENTS} {internal(n)}/32 8080" for n in range(count))
    return Traffic(True, templates, "ip daddr 10.0.0.0/8 th dport 8080")


def to_fips(made: Spec) -> Traffic:
    """From clients to every floating IP, any port."""
    return Traffic(True, tuple(f"{CLIENTS} {one['eip']}/32 0" for one in made["fips"]), "ip daddr 10.0.0.0/8")


def from_fips(made: Spec) -> Traffic:
    """From every address that has a floating IP to servers."""
    templates = tuple(f"{one['internalIp']}/32 {SERVERS} 0" for one in made["fips"])
    return Traffic(False, templates, "ip saddr 172.18.0.0/16")


def from_snats(made: Spec) -> Traffic:
    """From every prefix that is translated to servers."""
    return Traffic(
        False, tuple(f"{one['internalCIDR']} {SERVERS} 0" for one in made["snats"]), "ip saddr 172.18.0.0/16"
    )


def untranslated() -> Traffic:
    """From tenants that no rule speaks of to servers."""
    return Traffic(False, (f"10.200.0.0/16 {SERVERS} 0",), "ip saddr 10.200.0.0/16")
