"""What the kernel and the programs beside it can do, tried out in a network namespace that is thrown away.

Nothing is changed where the gateway works; only the kernel may load a module, as it would for the gateway itself.
"""

from __future__ import annotations

from gateway.kernel.tool import run
from gateway.ports import Refused

_TABLE = "add table ip probe\nadd chain ip probe c { type nat hook prerouting priority -150; }\n"
_SPREAD = "add rule ip probe c tcp dport 80 dnat to numgen random mod 2 map { 0 : 192.0.2.1, 1 : 192.0.2.2 }\n"
_SNAT = "-A POSTROUTING -j SNAT --to-source 192.0.2.1 --random-fully"
_HAIRPIN = "-A POSTROUTING -m conntrack --ctstate DNAT --ctorigdst 192.0.2.1 -j ACCEPT"
_HTB = "qdisc add dev lo root handle 1: htb\n"
_U32 = "filter add dev lo parent 1: protocol ip u32 match ip src 192.0.2.1/32 flowid 1:1\n"

TRIES: dict[str, tuple[str, str]] = {
    "iptables-legacy": ("iptables-legacy -t nat -S INPUT 1", ""),
    "nf_tables": ("nft -f -", _TABLE),
    "numgen": ("nft -f -", _TABLE + _SPREAD),
    "random-fully": (f"iptables-VARIANT -t nat {_SNAT}", ""),
    "conntrack match": (f"iptables-VARIANT -t nat {_HAIRPIN}", ""),
    "conntrack netlink": ("conntrack -L", ""),
    "HTB": ("tc -batch -", _HTB),
    "u32 filters": ("tc -batch -", _HTB + _U32),
    "ifb": ("ip link add probe type ifb", ""),
}
"""What is tried: a program with its arguments, and what it reads; each in a namespace of its own."""


def tried(variant: str) -> dict[str, str]:
    """By feature: empty where it works, else the complaint in one line; nothing where nothing can be tried.

    ``variant`` is the iptables variant in use. Takes some tenths of a second.
    """
    try:
        if run(["unshare", "--net", "true"]).code:
            return {}
        return {name: _complaint(command.replace("VARIANT", variant), said) for name, (command, said) in TRIES.items()}
    except Refused:
        return {}


def _complaint(command: str, said: str) -> str:
    ended = run(["unshare", "--net", *command.split()], stdin=said)
    return "" if ended.code == 0 else " ".join((ended.stderr or ended.stdout).split()) or "failed"
