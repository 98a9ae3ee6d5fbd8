"""What the kernel and the programs beside it can do, tried out in a network namespace that is thrown away.

Nothing is changed where the gateway works; only the kernel may load a module, as it would for the gateway itself.
"""

from __future__ import annotations

import json
import sys

from gateway.kernel.tool import run
from gateway.ports import Refused

_HOOK = "{ type nat hook prerouting priority -150; }"
_SPREAD = "dnat to numgen random mod 2 map { 0 : 192.0.2.1, 1 : 192.0.2.2 }"
_SNAT = "POSTROUTING -j SNAT --to-source 192.0.2.1 --random-fully"
_HAIRPIN = "POSTROUTING -m conntrack --ctstate DNAT --ctorigdst 192.0.2.1 -j ACCEPT"

TRIES = {
    "iptables-legacy": "iptables-legacy -t nat -S INPUT 1",
    "nf_tables": f"nft add table ip probe ; add chain ip probe c {_HOOK}",
    "numgen": f"nft add table ip probe ; add chain ip probe c {_HOOK} ; add rule ip probe c tcp dport 80 {_SPREAD}",
    "random-fully": f"iptables-VARIANT -t nat -A {_SNAT}",
    "conntrack match": f"iptables-VARIANT -t nat -A {_HAIRPIN}",
    "conntrack netlink": "conntrack -L",
    "HTB": "tc qdisc add dev lo root handle 1: htb",
    "u32 filters": "tc filter add dev lo parent 1: protocol ip u32 match ip src 192.0.2.1/32 flowid 1:1",
    "ifb": "ip link add probe type ifb",
}
"""What is tried, in this order: a later one may stand on an earlier one. The words of one program each."""

# Runs in the namespace, each program by its words; a name and the first line of a complaint for each.
_PROGRAM = """
import json, subprocess, sys
answers = {}
for name, words in json.loads(sys.argv[1]).items():
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        said = " ".join((done.stdout + done.stderr).split()) or "failed"
        answers[name] = said if done.returncode else ""
    except OSError as error:
        answers[name] = f"{words[0]}: {error.strerror}"
print(json.dumps(answers))
"""


def tried(variant: str) -> dict[str, str]:
    """By feature: empty where it works, else the complaint in one line; empty where nothing can be tried.

    ``variant`` is the iptables variant in use. Takes about 0.2 s.
    """
    words = {name: each.replace("VARIANT", variant).split() for name, each in TRIES.items()}
    try:
        ended = run(["unshare", "--net", sys.executable, "-I", "-S", "-c", _PROGRAM, json.dumps(words)])
    except Refused:
        return {}
    answers: dict[str, str] = json.loads(ended.stdout) if not ended.code else {}
    return answers
