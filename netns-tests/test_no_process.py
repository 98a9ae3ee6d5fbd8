"""Neither everyday verbs nor full readings start a program: each would cost as much as all the rest of a verb."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
from netns import Namespace, require
from rig import rig
from specs import edited

from gateway import transaction
from rules.desired import Facts
from rules.fastpath import table

FACTS = Facts()
EIP, OTHER = "192.168.0.40", "192.168.0.41"
STANDING = (
    ("init",),
    ("eip-add", f"{EIP}/24"),
    ("dnat-add", f"{EIP},8080,tcp,10.0.1.5,80"),
    ("snat-add", f"{EIP},10.0.0.0/16"),
)
VERBS = (
    ("eip-add", f"{OTHER}/24"),
    ("floating-ip-add", f"{OTHER},10.0.1.7"),
    ("floating-ip-add", f"{OTHER},10.0.1.7"),
    ("floating-ip-del", OTHER),
    ("dnat-add", f"{OTHER},8081,udp,10.0.1.8,53"),
    ("dnat-del", f"{OTHER},8081,udp"),
    ("snat-add", f"{OTHER},10.1.0.0/16"),
    ("snat-add", f"{OTHER},10.1.2.0/24"),  # the first of its length
    ("snat-add", f"{OTHER},10.1.3.0/24,--random-fully"),
    ("snat-add", f"{OTHER},10.1.3.7"),
    ("snat-del", f"{OTHER},10.1.3.7"),
    ("snat-del", f"{OTHER},10.1.2.0/24"),
    ("snat-del", f"{OTHER},10.1.3.0/24"),
    ("snat-del", f"{OTHER},10.1.0.0/16"),
    ("eip-del", f"{OTHER}/24"),
    ("snat-del", f"{EIP},10.0.0.0/16"),
    ("dnat-del", f"{EIP},8080,tcp"),
    ("eip-del", f"{EIP}/24"),  # the last one: ARP goes off
    ("eip-add", f"{EIP}/24"),
)


@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_everyday_verbs_start_no_program(netns: Namespace, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require("nft", f"iptables-{variant}")
    started: list[Any] = []

    class Recorded(subprocess.Popen[Any]):
        def __init__(self, args: Any, **how: Any) -> None:
            started.append(args)
            super().__init__(args, **how)

    with rig(netns, variant) as made:
        spec = None
        for words in STANDING:
            spec = edited(spec, words)
        assert spec is not None
        transaction.apply(made.kernel, spec, FACTS)
        monkeypatch.setattr(subprocess, "Popen", Recorded)
        for words in VERBS:
            spec = edited(spec, words)
            assert transaction.apply(made.kernel, spec, FACTS).actual.maps == table(spec)
            assert not started, words
        assert not transaction.plan(spec, FACTS, made.read())
        assert not started, "a full reading"
        netns.run(f"iptables-{variant}", "-t", "nat", "-A", "POSTROUTING", "-p", "icmp", "-j", "ACCEPT")
        started.clear()
        made.read()
        assert started  # what others write takes programs: what is counted here can be counted
