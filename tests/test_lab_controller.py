"""The lab's controller: the order of exec calls, their form, and what counts as failure."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lab.controller import (
    VERSION_CALL,
    Call,
    Outcome,
    Pod,
    creation_calls,
    iptables_version,
    object_calls,
    share_call,
    snat_call,
)
from lab.manifests import read
from lab.plan import plan
from lab.world import GatewayPlan

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FAR = (
    "apiVersion: kubeovn.io/v1\nkind: Subnet\nmetadata: {name: far}\nspec: {vpc: test-vpc-1, cidrBlock: 10.0.2.0/24}\n"
)


def gateway(extra: str = "") -> GatewayPlan:
    text = (EXAMPLES / "vpc-nat-gateway.yaml").read_text(encoding="utf-8")
    return plan(read([("example", text), ("extra", extra)]))[0].gateways[0]


def test_the_calls_of_the_seeds_example_in_the_controllers_order() -> None:
    gw = gateway()
    assert [str(call) for call in (*creation_calls(gw), *object_calls(gw))] == [
        "init",
        "eip-add 192.168.0.12/24",
        "eip-add 192.168.0.111/24",
        "eip-add 192.168.0.13/24",
        "eip-add 192.168.0.14/24",
        "eip-add 192.168.0.15/24",
        "floating-ip-add 192.168.0.15,10.0.1.5",
        "dnat-add 192.168.0.13,8888,tcp,10.0.1.10,80",
    ]
    assert [str(snat_call(snat, "1.8.9")) for snat in gw.snats] == ["snat-add 192.168.0.14,10.0.1.0/24,--random-fully"]


def test_rules_of_type_share_with_one_identity_are_one_call_with_all_backends_sorted() -> None:
    gw = plan(read([("share", (EXAMPLES / "share-dnat.yaml").read_text(encoding="utf-8"))]))[0].gateways[0]
    assert [str(call) for call in object_calls(gw)] == [
        "eip-add 192.168.0.20/24",
        "dnat-add 192.168.0.20,2222,tcp,10.0.1.11,22",
        "nft-dnat-map-add 192.168.0.20,80,tcp,10.0.1.11:8080@10.0.1.12:8080@10.0.2.13:80",
        "nft-dnat-map-add 192.168.0.20,53,udp,10.0.1.11:53@10.0.1.12:53",
    ]
    reversed_ = gw.shares[0].model_copy(update={"backends": gw.shares[0].backends[::-1], "protocol": "TCP"})
    assert str(share_call(reversed_)).endswith(",TCP,10.0.1.11:8080@10.0.1.12:8080@10.0.2.13:80")


def test_other_subnets_are_routed_in_one_call_right_after_init() -> None:
    more = FAR + "---\n" + FAR.replace("far", "farther").replace("10.0.2.0", "10.0.3.0")
    assert creation_calls(gateway(more)) == [
        Call("init"),
        Call("subnet-route-add", ("10.0.2.0/24,10.0.1.1", "10.0.3.0/24,10.0.1.1")),
    ]


@pytest.mark.parametrize(
    ("outcome", "version"),
    [
        (Outcome(0, "get-iptables-version\niptables v1.8.11 (legacy)\n", ""), "1.8.11"),
        (Outcome(0, "iptables v1.8.11\n", "Warning: anything\n"), ""),
        (Outcome(0, "nothing", ""), ""),
        (Outcome(1, "iptables v1.8.11\n", ""), "1.0.0"),
    ],
)
def test_how_the_controller_reads_the_iptables_version(outcome: Outcome, version: str) -> None:
    assert iptables_version(outcome) == version


@pytest.mark.parametrize(
    ("version", "random"),
    [("1.6.2", False), ("1.6.3", True), ("1.10.0", True), ("1.0.0", False), ("", False), ("1.6.2.1", True)],
)
def test_random_fully_only_for_a_newer_iptables(version: str, random: bool) -> None:
    (snat,) = gateway().snats
    assert str(snat_call(snat, version)).endswith(",--random-fully") == random


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        (Outcome(0, "words on stdout", ""), None),
        (Outcome(0, "", "\n  \n"), None),
        (Outcome(0, "", "Warning: sch_htb: quantum of class 10001 is big.\n"), None),
        (Outcome(0, "", "WARNING: loud\n"), "exit 0, but stderr says: WARNING: loud"),
        (Outcome(0, "", "one\nWarning: two\nthree\n"), "exit 0, but stderr says: one / three"),
        (Outcome(1, "", "no\n"), "exit 1: no"),
        (Outcome(1, "why\n", ""), "exit 1: why"),
        (Outcome(2, "", ""), "exit 2: no word of why"),
    ],
)
def test_the_controllers_result_rule(outcome: Outcome, error: str | None) -> None:
    assert outcome.error == error


def test_each_rule_is_one_argument_and_the_files_are_the_gateways_own(tmp_path: Path) -> None:
    pod = Pod(gateway(), tmp_path, Path("/checkout/nat-gateway.sh"))
    argv = pod.argv(Call("subnet-route-add", ("10.0.2.0/24,10.0.1.1", "10.0.3.0/24,10.0.1.1")))
    assert argv == [
        "ip", "netns", "exec", "lab.gw.gw1", "env",
        f"NATGW_RUN_DIR={tmp_path}/run", f"NATGW_STATE_DIR={tmp_path}/state",
        f"NATGW_ENV_FILE={tmp_path}/nat-gateway.env",
        "GATEWAY_V4=192.168.0.1", "GATEWAY_V6=",
        "bash", "/checkout/nat-gateway.sh", "subnet-route-add", "10.0.2.0/24,10.0.1.1", "10.0.3.0/24,10.0.1.1",
    ]  # fmt: skip
    assert pod.argv(VERSION_CALL)[-3:] == ["/bin/bash", "-c", "bash /checkout/nat-gateway.sh get-iptables-version"]


class LocalPod(Pod):
    """A pod whose exec is a program of this test."""

    def argv(self, call: Call) -> list[str]:
        return [sys.executable, "-I", "-S", "-c", call.verb]


def test_an_exec_reports_code_and_both_streams(tmp_path: Path) -> None:
    program = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    assert LocalPod(gateway(), tmp_path).run(Call(program)) == Outcome(3, "out\n", "err\n")


def test_an_exec_lasts_until_nobody_holds_its_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.controller._EXEC_SECONDS", 0.5)
    # The child reads from a pipe whose other end this test closes, so that it ends with the test.
    program = "import os, sys\nif os.fork() == 0:\n    import select; select.select([], [], [], 2.0)\n    os._exit(0)\n"
    outcome = LocalPod(gateway(), tmp_path).run(Call(program))
    assert outcome.error is not None
    assert "still holding stdout or stderr" in outcome.error
