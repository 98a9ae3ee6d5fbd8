"""Reads what surrounds the gateway: settings below /proc/sys, the ARP table, other hands' netfilter rules.

Nothing is loaded by looking: ``iptables-legacy-save`` prints the tables that are there. Messages: linux/neighbour.h.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
from collections.abc import Iterator

from gateway.kernel import sysctl
from gateway.kernel.netlink import Message, Netlink, attributes
from gateway.kernel.tool import run
from gateway.ports import Refused, Variant
from rules.maps import TABLE as MAPS
from rules.surroundings import (
    CONNTRACK_BUCKETS,
    CONNTRACK_COUNT,
    CONNTRACK_MAX,
    FORWARDING,
    Neighbour,
    OtherRule,
    Surroundings,
    promote_secondaries,
    rp_filter,
)

_RTM_GETNEIGH = 30
_NDMSG = struct.Struct("=BxxxiHBB")  # family, index, state, flags, type
_NDA_DST, _NDA_LLADDR = 1, 2
_STATES = {
    0x01: "incomplete",
    0x02: "reachable",
    0x04: "stale",
    0x08: "delay",
    0x10: "probe",
    0x20: "failed",
    0x40: "noarp",
    0x80: "permanent",
}
OWN_TABLES = frozenset({"ip kube-ovn", f"ip {MAPS}"})
"""The gateway's own nft tables."""
MOST_RULES = 500
"""Lines of other hands' rules that one reading keeps."""


class KernelSurroundings:
    """``gateway.ports.Around`` on the real kernel; may be used from any thread of the namespace."""

    def __init__(self, variant: Variant) -> None:
        self._variant = variant

    def read(self) -> Surroundings:
        """Everything once, about 20 ms; never fails: what cannot be read is told in ``unread``."""
        unread: list[str] = []
        rules: list[OtherRule] = []
        for look in (self._iptables, self._nft):
            for rule in look(unread):
                if len(rules) == MOST_RULES:
                    unread.append(f"more than {MOST_RULES} rules of others")
                    break
                rules.append(rule)
        try:
            seen = tuple(neighbours())
        except OSError as error:
            seen = ()
            unread.append(f"the ARP table: {error.strerror}")
        interfaces = [name for _, name in socket.if_nameindex()]
        return Surroundings(
            kernel=os.uname().release,
            sysctls=sysctl.read(_settings(interfaces)),
            neighbours=seen,
            other_rules=tuple(rules),
            unread=tuple(dict.fromkeys(unread)),
        )

    def _iptables(self, unread: list[str]) -> Iterator[OtherRule]:
        for variant in ("legacy", "nft"):
            argv = [f"iptables-{variant}-save"]
            try:
                ended = run(argv)
            except Refused as error:
                unread.append(error.reason)
                continue
            if ended.code:
                unread.append(f"{argv[0]}: {ended.stderr.strip() or ended.code}")
                continue
            for rule in _rules(variant, ended.stdout):
                if rule.table == "filter" or variant != self._variant:
                    yield rule

    def _nft(self, unread: list[str]) -> Iterator[OtherRule]:
        try:
            ended = run(["nft", "-j", "list", "chains"])
        except Refused as error:
            unread.append(error.reason)
            return
        if ended.code:
            unread.append(f"nft: {ended.stderr.strip() or ended.code}")
            return
        for entry in json.loads(ended.stdout)["nftables"]:
            chain = entry.get("chain", {})
            table = f"{chain.get('family')} {chain.get('table')}"
            if "hook" not in chain or table in OWN_TABLES or _IPTABLES_NFT.fullmatch(table):
                continue
            said = f"type {chain['type']}, hook {chain['hook']}, priority {chain.get('prio')}"
            yield OtherRule(where=f"nft table {table}", table=chain["type"], chain=chain["hook"].upper(), text=said)


_IPTABLES_NFT = re.compile(r"(ip|ip6|bridge|arp) (raw|mangle|nat|filter|security|broute)|ip6 .*")
"""What iptables-nft shows itself, and what is about IPv6."""


def _rules(variant: str, saved: str) -> Iterator[OtherRule]:
    """The rules of an ``iptables-save``, and the policies that let nothing pass."""
    table = ""
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":"):
            chain, policy, *_ = line[1:].split()
            if policy not in ("-", "ACCEPT"):
                yield OtherRule(where=variant, table=table, chain=chain, text=f"policy {policy}")
        elif line.startswith("-A "):
            chain, _, text = line[3:].partition(" ")
            yield OtherRule(where=variant, table=table, chain=chain, text=text)


def neighbours() -> Iterator[Neighbour]:
    """The IPv4 ARP table of every interface but loopback; raises OSError."""
    netlink = Netlink(socket.NETLINK_ROUTE)
    names = dict(socket.if_nameindex())
    try:
        for message in netlink.dump(Message(_RTM_GETNEIGH, 0, _NDMSG.pack(socket.AF_INET, 0, 0, 0, 0))):
            _, index, state, _, _ = _NDMSG.unpack_from(message)
            said = attributes(message, _NDMSG.size)
            name = names.get(index)
            if name is None or name == "lo" or _NDA_DST not in said or state & 0x40:
                continue
            mac = said[_NDA_LLADDR].hex(":") if _NDA_LLADDR in said else None
            word = _STATES.get(state, f"{state:#x}")
            yield Neighbour(interface=name, address=socket.inet_ntoa(said[_NDA_DST]), mac=mac, state=word)
    finally:
        netlink.close()


def _settings(interfaces: list[str]) -> list[str]:
    sides = ["all", *interfaces]
    named = [FORWARDING, CONNTRACK_COUNT, CONNTRACK_MAX, CONNTRACK_BUCKETS]
    return named + [rp_filter(name) for name in sides] + [promote_secondaries(name) for name in sides]
