"""What the script of each Kube-OVN release leaves in a gateway's namespace, as commands that leave the same.

Written after what the releases' kernels show (chains, rule shapes, order of arrival, routes, traffic control), not
after their code. All gateways carry the same objects, so that two goldens differ in what the releases differ in:

========  =========================================  ==========================================
EIP .50   floating IP of A1                          limited both ways from 1.16 on
EIP .51   8888/tcp and 53/udp to A2                  up to 1.15 with a dead twin of 8888/tcp
EIP .52   source of 10.0.0.0/16                      arrives first
EIP .53   source of 10.0.2.0/24, --random-fully      arrives second, decides first (1.17 sorts)
EIP .54   nothing yet
EIP .55   from 1.17 on: 80/tcp spread over A1, A2
========  =========================================  ==========================================

Left out, because test kernels may lack act_police, cls_matchall and fq_codel: the policers of releases up to 1.15,
limits of all of an interface's traffic, and the queues of classes. ``tests/test_delta_policers.py`` has the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import md5

NET1, ETH0 = "net1", "eth0"
ROUTER, A1, A2 = "192.168.0.1", "10.0.1.11", "10.0.1.12"
FIP, PORTS, WIDE, NARROW, BARE, SPREAD = (f"192.168.0.{n}" for n in range(50, 56))
VPC_ROUTE, STALE_ROUTE, SERVICES = "10.0.2.0/24", "10.0.3.0/24", "10.96.0.0/12"

Command = tuple[str, ...]
"""The words of a command; ``iptables`` stands for the variant in use. What follows ``<`` is its standard input."""


@dataclass(frozen=True)
class Release:
    """One release: what it leaves, and the calls by which its controller brings everything about once more."""

    name: str
    commands: tuple[Command, ...]
    calls: tuple[Command, ...]


def _words(text: str) -> Iterator[Command]:
    return (tuple(line.split()) for line in text.strip().splitlines())


def _chains(*, hairpin: bool) -> Iterator[Command]:
    hooks = {"DNAT_FILTER": "PREROUTING", "SNAT_FILTER": "POSTROUTING"}
    below = {"DNAT_FILTER": ["EXCLUSIVE_DNAT", "SHARED_DNAT"], "SNAT_FILTER": ["EXCLUSIVE_SNAT", "SHARED_SNAT"]}
    if hairpin:
        yield from _words(f"""
            iptables -t mangle -N VPC_MARK
            iptables -t mangle -A PREROUTING -j VPC_MARK
            iptables -t mangle -A VPC_MARK -i {ETH0} -j MARK --set-xmark 0x1/0x1""")
        below["SNAT_FILTER"].append("HAIRPIN_SNAT")
    for chain, hook in hooks.items():
        yield from _words(f"iptables -t nat -N {chain}\niptables -t nat -A {hook} -j {chain}")
        for name in below[chain]:
            yield from _words(f"iptables -t nat -N {name}\niptables -t nat -A {chain} -j {name}")


def _eip(address: str, *, hairpin: bool) -> Iterator[Command]:
    yield from _words(f"ip addr replace {address}/24 dev {NET1}")
    if hairpin:
        yield from _words(
            f"iptables -t nat -A HAIRPIN_SNAT -o {ETH0} -m mark --mark 0x1/0x1 -m conntrack --ctstate DNAT"
            f" --ctorigdst {address} -j SNAT --to-source {address} --random-fully"
        )


def _rules(*, twin: bool, sorted_snat: bool) -> Iterator[Command]:
    yield from _words(f"""
        iptables -t nat -A EXCLUSIVE_DNAT -d {FIP}/32 -j DNAT --to-destination {A1}
        iptables -t nat -A EXCLUSIVE_SNAT -s {A1}/32 -j SNAT --to-source {FIP}
        iptables -t nat -A SHARED_DNAT -d {PORTS}/32 -p tcp -m tcp --dport 8888 -j DNAT --to-destination {A2}:80
        iptables -t nat -A SHARED_DNAT -d {PORTS}/32 -p udp -m udp --dport 53 -j DNAT --to-destination {A2}:53""")
    if twin:
        yield from _words(
            f"iptables -t nat -A SHARED_DNAT -d {PORTS}/32 -p tcp -m tcp --dport 8888 -j DNAT --to-destination {A1}:80"
        )
    second = "-I SHARED_SNAT 1" if sorted_snat else "-A SHARED_SNAT"
    yield from _words(f"""
        iptables -t nat -A SHARED_SNAT -s 10.0.0.0/16 -o {NET1} -j SNAT --to-source {WIDE}
        iptables -t nat {second} -s 10.0.2.0/24 -o {NET1} -j SNAT --to-source {NARROW} --random-fully""")


def _spread() -> Command:
    chain = "dnat-" + md5(f"{SPREAD}:80:tcp".encode(), usedforsecurity=False).hexdigest()[:12]
    return (
        "nft",
        "-f",
        "-",
        "<",
        f"""\
table ip kube-ovn {{
    chain {chain} {{
        meta l4proto tcp dnat ip to numgen random mod 2 map {{ 0 : {A1} . 8080, 1 : {A2} . 8080 }}
    }}
    map service-ips {{
        type ipv4_addr . inet_proto . inet_service : verdict
        elements = {{ {SPREAD} . tcp . 80 : goto {chain} }}
    }}
    chain prerouting {{
        type nat hook prerouting priority -150; policy accept;
        ip daddr . meta l4proto . th dport vmap @service-ips
    }}
}}
""",
    )


def _class_of(address: str, weights: tuple[int, int, int, int], modulus: int, base: int) -> int:
    return sum(int(octet) * weight for octet, weight in zip(address.split("."), weights, strict=True)) % modulus + base


def _limits() -> Iterator[Command]:
    """HTB on net1 and on the ifb beside it; in each an EIP's limit and one of an address of the Internet."""
    ifb = f"ifb-{NET1}"
    eip = _class_of(FIP, (251, 241, 239, 233), 32766, 1)
    other = "203.0.113.99"
    minor = _class_of(other, (11, 13, 17, 19), 32511, 32768)
    yield from _words(f"ip link add {ifb} txqueuelen 1000 type ifb\nip link set {ifb} up")
    for device, eip_side, other_side in ((NET1, "src", "dst"), (ifb, "dst", "src")):
        for text in (
            f"qdisc add dev {device} root handle 1: htb default 9999",
            f"class add dev {device} parent 1: classid 1:9999 htb rate 10000mbit ceil 10000mbit quantum 60000",
            f"class add dev {device} parent 1: classid 1:{eip:x}"
            " htb rate 20mbit ceil 20mbit burst 20971520 cburst 20971520 quantum 60000",
            f"filter add dev {device} parent 1: protocol ip prio 1 handle ::{eip & 0xFFF:x}"
            f" u32 match ip {eip_side} {FIP}/32 flowid 1:{eip:x}",
            f"class add dev {device} parent 1: classid 1:{minor:x}"
            " htb rate 5mbit ceil 5mbit burst 5242880 cburst 5242880 quantum 60000",
            f"filter add dev {device} parent 1: protocol ip prio 2 handle ::{minor & 0xFFF:x}"
            f" u32 match ip {other_side} {other}/32 flowid 1:{minor:x}",
        ):
            yield from _words(f"tc {text}")
    yield from _words(f"""
        tc qdisc add dev {NET1} ingress
        tc filter add dev {NET1} parent ffff: protocol all prio 65535 u32 match u32 0 0 action mirred egress redirect\
 dev {ifb}""")


def _release(
    name: str,
    *calls: str,
    routes: str = "",
    hairpin: bool = False,
    sorted_snat: bool = False,
    spread: bool = False,
) -> Release:
    eips = [FIP, PORTS, WIDE, NARROW, BARE] + [SPREAD] * spread
    commands = [
        *_chains(hairpin=hairpin),
        *_words(f"ip route replace {VPC_ROUTE} via 10.0.1.1 dev {ETH0}"),
        *_words(f"ip route replace {STALE_ROUTE} via 10.0.1.1 dev {ETH0}"),
        *(command for address in eips for command in _eip(address, hairpin=hairpin)),
        *_words(routes),
        *_rules(twin=not hairpin, sorted_snat=sorted_snat),
        *([_spread()] if spread else []),
        *(_limits() if hairpin else []),
    ]
    known = f"""
        subnet-route-add {VPC_ROUTE},10.0.1.1
        floating-ip-add {FIP},{A1}
        dnat-add {PORTS},8888,tcp,{A2},80
        dnat-add {PORTS},53,udp,{A2},53
        snat-add {WIDE},10.0.0.0/16
        snat-add {NARROW},10.0.2.0/24,--random-fully"""
    again = [*_words("\n".join(calls)), *_words(known)]
    return Release(name, tuple(commands), tuple(again))


def _eip_adds(*addresses: str, gateway: str = "") -> list[str]:
    return [f"eip-add {address}/24{gateway}" for address in addresses]


_FIVE = (FIP, PORTS, WIDE, NARROW, BARE)
_LIMIT_CALLS = [f"eip-{direction}-qos-add {FIP},1,20,20" for direction in ("ingress", "egress")]

RELEASES = (
    _release(
        "1.12",
        f"init {SERVICES},10.0.1.1",
        *_eip_adds(*_FIVE, gateway=f",{ROUTER}"),
        routes=f"""
            ip route replace {SERVICES} via 10.0.1.1 dev {ETH0}
            ip link set {NET1} arp on
            ip route replace default via {ROUTER} dev {NET1}""",
    ),
    _release("1.13", "init", *_eip_adds(*_FIVE)),
    _release("1.14", "init", *_eip_adds(*_FIVE)),
    _release("1.15", "init", *_eip_adds(*_FIVE), routes=f"ip route replace default via {ROUTER} dev {NET1}"),
    _release(
        "1.16",
        "init",
        *_eip_adds(*_FIVE),
        *_LIMIT_CALLS,
        routes=f"ip route replace default via {ROUTER} dev {NET1} onlink",
        hairpin=True,
    ),
    _release(
        "1.17",
        "init",
        *_eip_adds(*_FIVE, SPREAD),
        *_LIMIT_CALLS,
        f"nft-dnat-map-add {SPREAD},80,tcp,{A1}:8080@{A2}:8080",
        routes=f"ip route replace default via {ROUTER} dev {NET1} onlink",
        hairpin=True,
        sorted_snat=True,
        spread=True,
    ),
)


def populate(release: Release, iptables: str, run: Callable[..., str]) -> None:
    """Carry the commands out; ``iptables`` is the program of the variant, ``run`` that of a namespace."""
    for command in release.commands:
        words = tuple(iptables if word == "iptables" else word for word in command)
        if "<" in words:
            run(*words[: words.index("<")], stdin=words[-1])
        else:
            run(*words)
