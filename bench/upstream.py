"""What a gateway script without a daemon does for the same rule, for comparison: one process per kernel call.

Written from the description of the calls, not from any script: look whether the gateway is initialised, list the
whole nat table to see whether the rule is there, run iptables once; announce with an arping that is waited for.
"""

from __future__ import annotations

CHAINS = """*mangle
:VPC_MARK - [0:0]
-A PREROUTING -j VPC_MARK
-A VPC_MARK -i eth0 -j MARK --set-xmark 0x1/0x1
COMMIT
*nat
:DNAT_FILTER - [0:0]
:EXCLUSIVE_DNAT - [0:0]
:EXCLUSIVE_SNAT - [0:0]
:HAIRPIN_SNAT - [0:0]
:SHARED_DNAT - [0:0]
:SHARED_SNAT - [0:0]
:SNAT_FILTER - [0:0]
-A PREROUTING -j DNAT_FILTER
-A DNAT_FILTER -j EXCLUSIVE_DNAT
-A DNAT_FILTER -j SHARED_DNAT
-A POSTROUTING -j SNAT_FILTER
-A SNAT_FILTER -j EXCLUSIVE_SNAT
-A SNAT_FILTER -j SHARED_SNAT
-A SNAT_FILTER -j HAIRPIN_SNAT
-A SHARED_DNAT {rule}
COMMIT
"""
"""The chains of the contract with one rule, as iptables-restore reads them."""

LOOK = "iptables-{variant}-save -t nat | grep -q -- '-A SNAT_FILTER -j SHARED_SNAT'\n"

DNAT_ADD = (
    LOOK
    + "iptables-{variant}-save -t nat | grep SHARED_DNAT | grep -w -- '-d {eip}/32' | grep -w -- '-p udp'"
    + " | grep -qw -- '--dport {port}' && exit 1\n"
    + "iptables-{variant} -t nat -A SHARED_DNAT -d {eip} -p udp --dport {port} -j DNAT --to-destination {inside}\n"
)

EIP_ADD = (
    LOOK
    + "ip addr replace {eip}/16 dev net1\n"
    + "arping -I net1 -c 3 -U {eip} >/dev/null\n"
    + "iptables-{variant}-save -t nat | grep HAIRPIN_SNAT | grep -qw -- '--to-source {eip}' && exit 1\n"
    + "iptables-{variant} -t nat -A HAIRPIN_SNAT -o eth0 -m mark --mark 0x1/0x1 -m conntrack --ctstate DNAT"
    + " --ctorigdst {eip} -j SNAT --to-source {eip} --random-fully\n"
    + "ip route replace default via {router} dev net1 onlink\n"
)


def script(text: str, **fields: object) -> list[str]:
    """The argv that runs one of these texts; it stops at the first failure."""
    return ["bash", "-c", "set -e\n" + text.format(**fields)]
