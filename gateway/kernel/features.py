"""What the kernel and the programs beside it can do, tried out in a network namespace that is thrown away.

Nothing is changed where the gateway works; only the kernel may load a module, as it would for the gateway itself.
"""

from __future__ import annotations

from gateway.kernel.tool import run
from gateway.ports import Refused

_TABLE = "nft add table ip probe && nft 'add chain ip probe c { type nat hook prerouting priority -150; }'"
_SPREAD = "dnat to numgen random mod 2 map { 0 : 192.0.2.1, 1 : 192.0.2.2 }"
_SNAT = "POSTROUTING -j SNAT --to-source 192.0.2.1 --random-fully"
_HAIRPIN = "POSTROUTING -m conntrack --ctstate DNAT --ctorigdst 192.0.2.1 -j ACCEPT"

TRIES = {
    "iptables-legacy": "iptables-legacy -t nat -S INPUT 1",
    "nf_tables": _TABLE,
    "numgen": f"{_TABLE} && nft 'add rule ip probe c tcp dport 80 {_SPREAD}'",
    "random-fully": f"iptables-VARIANT -t nat -A {_SNAT}",
    "conntrack match": f"iptables-VARIANT -t nat -A {_HAIRPIN}",
    "conntrack netlink": "conntrack -L",
    "HTB": "tc qdisc add dev lo root handle 1: htb",
    "u32 filters": "tc filter add dev lo parent 1: protocol ip u32 match ip src 192.0.2.1/32 flowid 1:1",
    "ifb": "ip link add probe type ifb",
}
"""What is tried, in this order: a later one may stand on an earlier one."""


def tried(variant: str) -> dict[str, str]:
    """By feature: empty where it works, else the complaint in one line; empty where nothing can be tried.

    ``variant`` is the iptables variant in use. Takes about 0.1 s.
    """
    lines = (f"try '{name}' \"{each.replace('VARIANT', variant)}\"" for name, each in TRIES.items())
    script = "\n".join([_HEAD, *lines])
    try:
        ended = run(["unshare", "--net", "bash", "-c", script])
    except Refused:
        return {}
    if ended.code:
        return {}
    answers = (line.partition("=") for line in ended.stdout.splitlines())
    return {name: said.strip() for name, _, said in answers if name in TRIES}


_HEAD = """
try() {
    if said=$(eval "$2" 2>&1); then echo "$1="; else
        said=$(printf '%s' "$said" | tr '\\n' ' '); echo "$1=${said:-failed}"
    fi
}
"""
