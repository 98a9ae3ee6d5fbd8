"""What a test of the lab tries, what it expects, and how it judges."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.manifests import read
from lab.plan import plan
from lab.probes import NOBODY, Expect, Probe, before_first_eip, judge, probes
from lab.world import World

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ONE = (EXAMPLES / "vpc-nat-gateway.yaml").read_text(encoding="utf-8")
TWO = (EXAMPLES / "two-vpcs.yaml").read_text(encoding="utf-8")


def world(text: str) -> World:
    return plan(read([("w", text)]))[0]


def lines(found: list[Probe]) -> dict[str, str]:
    """``what | from | target`` -> expectation; each line occurs once."""
    told = {f"{probe.what} | {probe.source} | {probe.target}": str(probe.expect) for probe in found}
    assert len(told) == len(found)
    return told


def test_everything_the_seeds_example_promises_is_tried() -> None:
    told = lines(probes(world(ONE)))
    expected = {
        "gw1: link | gw1 | ping 192.168.0.1": "192.168.0.1 answers",
        "DNAT dnat01 | internet | tcp 192.168.0.13:8888": "test-vpc-1/10.0.1.10 answers, sees 198.51.100.2",
        "DNAT dnat01, hairpin | ns1/vpc1-pod | tcp 192.168.0.13:8888": (
            "test-vpc-1/10.0.1.10 answers, sees 192.168.0.13"
        ),
        # a client with a floating IP shows that one, since its rule stands before the hairpin's
        "DNAT dnat01, hairpin | test-vpc-1/10.0.1.5 | tcp 192.168.0.13:8888": (
            "test-vpc-1/10.0.1.10 answers, sees 192.168.0.15"
        ),
        "SNAT snat01, outward | test-vpc-1/10.0.1.10 | tcp 198.51.100.2:7007": "internet answers, sees 192.168.0.14",
        "SNAT snat01, outward | test-vpc-1/10.0.1.10 | udp 198.51.100.2:7007": "internet answers, sees 192.168.0.14",
        "FIP fip01 | internet | tcp 192.168.0.15:7007": "test-vpc-1/10.0.1.5 answers, sees 198.51.100.2",
        "FIP fip01 | internet | udp 192.168.0.15:7007": "test-vpc-1/10.0.1.5 answers, sees 198.51.100.2",
        "FIP fip01 | internet | ping 192.168.0.15": "192.168.0.15 answers",
        "FIP fip01, hairpin | test-vpc-1/10.0.1.10 | tcp 192.168.0.15:7007": (
            "test-vpc-1/10.0.1.5 answers, sees 192.168.0.15"
        ),
        "FIP fip01, outward | test-vpc-1/10.0.1.5 | tcp 198.51.100.2:7007": "internet answers, sees 192.168.0.15",
        "EIP eip-static | physical gateway | ping 192.168.0.111": "192.168.0.111 answers",
    }
    assert expected.items() <= told.items()
    assert "no answer" not in told.values()


def test_vpcs_with_one_cidr_meet_only_through_eips() -> None:
    told = lines(probes(world(TWO)))
    assert told["isolation of test-vpc-1 from test-vpc-2 | test-vpc-1/10.0.1.5 | tcp 10.0.1.10:7007"] == (
        "test-vpc-1/10.0.1.10 answers, sees 10.0.1.5"
    )
    across = [expected for what, expected in told.items() if what.startswith("test-vpc-1 to test-vpc-2")]
    assert across == ["test-vpc-2/10.0.1.10 answers, sees 172.17.88.122"]


def test_isolation_of_different_cidrs_expects_silence() -> None:
    told = lines(
        probes(world(TWO.replace("10.0.1.", "10.0.7.").replace("10.0.7.", "10.0.1.", TWO.count("10.0.1.") // 2)))
    )
    silent = [what for what, expected in told.items() if expected == "no answer"]
    assert {what.split(" | ")[0] for what in silent} == {
        "isolation of test-vpc-1 from test-vpc-2",
        "isolation of test-vpc-2 from test-vpc-1",
    }


def test_without_a_route_to_the_gateway_nothing_is_expected_to_work() -> None:
    told = lines(probes(world(ONE.replace("nextHopIP: 10.0.1.254", "nextHopIP: 10.0.1.9"))))
    rules = {what: expected for what, expected in told.items() if what.startswith(("DNAT", "SNAT", "FIP"))}
    assert rules
    assert set(rules.values()) == {"no answer"}


def test_a_policy_that_leads_traffic_away_is_expected_to_be_felt() -> None:
    away = (EXAMPLES / "seeds" / "002-14-policy-routes.yaml").read_text(encoding="utf-8")
    told = lines(probes(world(ONE + "\n---\n" + away)))
    assert told["DNAT dnat01 | internet | tcp 192.168.0.13:8888"] == "no answer"


def test_a_narrower_snat_is_tried_with_a_host_of_its_own() -> None:
    narrow = "\n---\napiVersion: kubeovn.io/v1\nkind: IptablesSnatRule\nmetadata: {name: narrow}\n"
    narrow += "spec: {eip: eip-random, internalCIDR: 10.0.1.128/25}\n"
    told = lines(probes(world(ONE + narrow)))
    assert (
        told["SNAT narrow, outward | test-vpc-1/10.0.1.128 | tcp 198.51.100.2:7007"]
        == "internet answers, sees 192.168.0.12"
    )
    assert (
        told["SNAT snat01, outward | test-vpc-1/10.0.1.10 | tcp 198.51.100.2:7007"]
        == "internet answers, sees 192.168.0.14"
    )


def test_a_gateway_without_eips_is_silent_outside() -> None:
    bare = "\n---\n".join(part for part in ONE.split("\n---\n") if "Iptables" not in part)
    told = lines(probes(world(bare)))
    assert told == {
        "gw1: link | physical gateway | ping 192.168.0.11": "no answer",
        "gw1: link | gw1 | ping 192.168.0.1": "no answer",
    }


def test_before_the_first_eip_neither_side_is_expected_to_answer() -> None:
    assert set(lines(before_first_eip(world(TWO))).values()) == {"no answer"}
    assert "no answer" not in lines(before_first_eip(world(TWO), arp_always_on=True)).values()
    # noDefaultEIP: there is no address to ping from outside
    assert [probe.source for probe in before_first_eip(world(TWO))] == ["physical gateway", "gw1", "gw2"]


def probe(how: str, expect: Expect) -> Probe:
    return Probe.model_validate(
        {"what": "x", "how": how, "source": "s", "netns": "n", "to": "192.0.2.1", "port": 80, "expect": expect}
    )


@pytest.mark.parametrize(
    ("how", "expect", "reply", "ok", "seen"),
    [
        ("tcp", Expect(host="h", peer="p"), {"host": "h", "peer": "p"}, True, "h answers, sees p"),
        ("tcp", Expect(host="h", peer="p"), {"host": "h", "peer": "q"}, False, "h answers, sees q"),
        ("tcp", Expect(host="h", peer="p"), {"host": "g", "peer": "p"}, False, "g answers, sees p"),
        ("udp", Expect(host="h", peer="p"), {"error": "no answer"}, False, "no answer"),
        ("ping", Expect(host="192.0.2.1"), {"host": "192.0.2.1", "peer": ""}, True, "192.0.2.1 answers"),
        ("ping", NOBODY, {"host": "192.0.2.1", "peer": ""}, False, "192.0.2.1 answers"),
        ("tcp", NOBODY, {"error": "connection refused"}, True, "connection refused"),
        ("tcp", NOBODY, {"host": "h", "peer": "p"}, False, "h answers, sees p"),
    ],
)
def test_judging(how: str, expect: Expect, reply: dict[str, str], ok: bool, seen: str) -> None:
    result = judge(probe(how, expect), reply)
    assert (result.ok, result.seen) == (ok, seen)


def test_every_backend_of_a_shared_mapping_must_answer_in_turn() -> None:
    found = probes(world((EXAMPLES / "share-dnat.yaml").read_text(encoding="utf-8")))
    told = lines(found)
    all_three = "vpc-share/10.0.1.11 and vpc-share/10.0.1.12 and vpc-share/10.0.2.13 answer, see"
    assert told["DNAT web-a, web-b, web-c | internet | tcp 192.168.0.20:80"] == f"{all_three} 198.51.100.2"
    hairpin = "DNAT web-a, web-b, web-c, hairpin | vpc-share/10.0.1.2 | tcp 192.168.0.20:80"
    assert told[hairpin] == f"{all_three} 192.168.0.20"
    assert told["DNAT dns-a, dns-b | internet | udp 192.168.0.20:53"] == (
        "vpc-share/10.0.1.11 and vpc-share/10.0.1.12 answer, see 198.51.100.2"
    )
    assert {probe.times for probe in found if "web-a" in probe.what} == {60}
    assert {probe.times for probe in found if "ssh" in probe.what} == {1}


def test_where_only_some_backends_can_be_reached_nothing_is_foretold() -> None:
    text = (EXAMPLES / "share-dnat.yaml").read_text(encoding="utf-8").replace("policy: policyDst", "policy: policySrc")
    text = text.replace("cidr: 0.0.0.0/0", "cidr: 10.0.1.0/24")  # the back subnet's answers go elsewhere
    assert not [probe for probe in probes(world(text)) if probe.what == "DNAT web-a, web-b, web-c"]
    assert [probe for probe in probes(world(text)) if probe.what == "DNAT dns-a, dns-b"]
