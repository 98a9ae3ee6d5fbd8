"""nat-gateway.sh's words, as controllers of all releases send them, become commands; results read as they read them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.execverbs import VERBS, Change, IptablesVersion, parse
from api.execwire import BadRequest, Reply, Request, conflict, decode_reply, decode_request, failure, success
from rules import commands as c
from rules.edit import Conflict, NotInitialized, edit_all
from rules.spec import Backend, EipLimit, GatewaySpec, InterfaceLimit, Interfaces

RELEASES = ("1.12", "1.13", "1.14", "1.15", "1.16", "1.17")


def takes_for_success(release: str, reply: Reply) -> bool:
    """How Kube-OVN's controller of that release reads the result of an exec."""
    if reply.code != 0:
        return False
    if release in ("1.16", "1.17"):
        lines = (line.strip() for line in reply.stderr.splitlines())
        return not any(line and not line.startswith("Warning:") for line in lines)
    return reply.stderr == ""


def commands_of(line: str, **environment: str) -> tuple[Any, ...]:
    """The commands of one line, cut into words as a shell does."""
    parsed = parse(line.split(), environment)
    assert isinstance(parsed, Change), parsed
    return parsed.commands


def refusal_of(line: str, **environment: str) -> str:
    """The one line with which a call is refused."""
    parsed = parse(line.split(), environment)
    assert isinstance(parsed, Reply), parsed
    assert parsed.code == 1
    assert parsed.stdout == ""
    assert parsed.stderr.count("\n") == 1
    assert parsed.stderr.endswith("\n")
    assert not any(takes_for_success(release, parsed) for release in RELEASES)
    return parsed.stderr[:-1]


FIP = c.FipAdd(eip="172.18.0.20", internal_ip="10.0.1.5")
DNAT = c.DnatAdd(eip="172.18.0.21", external_port=80, protocol="tcp", internal_ip="10.0.1.7", internal_port=8080)
DNAT_GONE = c.DnatDel(eip="172.18.0.21", external_port=80, protocol="tcp")
EIP = c.EipAdd(address="172.18.0.20/16")
SHARED = c.SharedDnatAdd(
    eip="172.18.0.21",
    external_port=80,
    protocol="tcp",
    backends=[Backend(internal_ip="10.0.1.7", internal_port=8080), Backend(internal_ip="10.0.1.8", internal_port=80)],
)
SHARED_GONE = c.SharedDnatDel(eip="172.18.0.21", external_port=80, protocol="tcp")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("init", [c.Init()]),
        ("init net1,net2", [c.Init(interfaces=Interfaces(vpc="net1", external="net2"))]),
        ("init 10.96.0.0/12,10.0.1.1", [c.Init(), c.RouteAdd(cidr="10.96.0.0/12", next_hop_ip="10.0.1.1")]),
        *(
            (f"init {word}", [c.Init(), c.RouteAdd(cidr="10.96.0.0/12", next_hop_ip="10.0.1.1")])
            for word in ("10.96.0.0/12,10.0.1.1,fd00::1", "10.96.0.0/12,fd00:10::/112,10.0.1.1,fd00::1")
        ),
        ("init ,", [c.Init()]),
        (
            "subnet-route-add 10.0.2.0/24,10.0.1.1 10.0.3.0/24,10.0.1.1",
            [
                c.RouteAdd(cidr="10.0.2.0/24", next_hop_ip="10.0.1.1"),
                c.RouteAdd(cidr="10.0.3.0/24", next_hop_ip="10.0.1.1"),
            ],
        ),
        ("subnet-route-add", []),
        ("subnet-route-del 10.0.2.0/24", [c.RouteDel(cidr="10.0.2.0/24")]),
        ("subnet-route-del 10.0.2.0/24,10.0.1.1", [c.RouteDel(cidr="10.0.2.0/24")]),
        ("ext-subnet-route-add 172.18.0.0/16,172.18.0.1", [c.SetGateways(gateway_v4="172.18.0.1")]),
        ("ext-subnet-route-del 172.18.0.0/16,172.18.0.1", []),
        ("eip-add 172.18.0.20/16", [EIP]),
        ("eip-add 172.18.0.20/16,172.18.0.1", [c.SetGateways(gateway_v4="172.18.0.1"), EIP]),
        ("eip-add 172.18.0.20/16,", [EIP]),
        ("eip-add 172.18.0.20/16 172.18.0.21/16", [EIP, c.EipAdd(address="172.18.0.21/16")]),
        ("eip-del 172.18.0.20/16", [c.EipDel(address="172.18.0.20/16")]),
        ("floating-ip-add 172.18.0.20,10.0.1.5", [FIP]),
        ("floating-ip-add 172.18.0.20/16,10.0.1.5", [FIP]),
        ("floating-ip-del 172.18.0.20", [c.FipDel(eip="172.18.0.20")]),
        ("floating-ip-del 172.18.0.20,10.0.1.5", [c.FipDel(eip="172.18.0.20")]),
        ("dnat-add 172.18.0.21,80,tcp,10.0.1.7,8080", [DNAT]),
        ("dnat-add 172.18.0.21,80,TCP,10.0.1.7,8080", [DNAT]),
        ("dnat-del 172.18.0.21,80,tcp", [DNAT_GONE]),
        ("dnat-del 172.18.0.21,80,TCP", [DNAT_GONE]),
        ("dnat-del 172.18.0.21,80,tcp,10.0.1.7,8080", [DNAT_GONE]),
        (
            "snat-add 172.18.0.22,10.0.1.0/24",
            [_snat := c.SnatAdd(eip="172.18.0.22", internal_cidr="10.0.1.0/24", random_fully=False)],
        ),
        ("snat-add 172.18.0.22,10.0.1.0/24,", [_snat]),
        ("snat-add 172.18.0.22,10.0.1.0/24,--random-fully", [_snat.model_copy(update={"random_fully": True})]),
        ("snat-add 172.18.0.22,10.0.1.9", [_snat.model_copy(update={"internal_cidr": "10.0.1.9/32"})]),
        ("nft-dnat-map-add 172.18.0.21,80,tcp,10.0.1.7:8080@10.0.1.8:80", [SHARED]),
        ("nft-dnat-map-add 172.18.0.21/16,80,TCP,10.0.1.7:8080@10.0.1.8:80", [SHARED]),
        ("nft-dnat-map-del 172.18.0.21,80,tcp", [SHARED_GONE]),
        ("nft-dnat-map-del 172.18.0.21,80,TCP,10.0.1.7:8080", [SHARED_GONE]),
        ("snat-del 172.18.0.22,10.0.1.0/24", [c.SnatDel(eip="172.18.0.22", internal_cidr="10.0.1.0/24")]),
        ("snat-del 172.18.0.22,10.0.1.9", [c.SnatDel(eip="172.18.0.22", internal_cidr="10.0.1.9/32")]),
    ],
)
def test_forms(line: str, expected: list[c.Command]) -> None:
    assert list(commands_of(line)) == expected


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb.endswith("-del")])
@pytest.mark.parametrize("rules", [[], [""], [","], [",,,,"], ["", ","]])
def test_nothing_to_delete(verb: str, rules: list[str]) -> None:
    """Releases up to 1.15 delete by a status that may never have been filled."""
    assert parse([verb, *rules], {}) == Change(())


@pytest.mark.parametrize(
    "line", ["dnat-del 172.18.0.21,,tcp", "dnat-del ,80,tcp,10.0.1.7,80", "snat-del 172.18.0.22,", "eip-del /16"]
)
def test_half_an_identity_names_nothing(line: str) -> None:
    assert commands_of(line) == ()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("init net1", "external is missing"),
        ("init net1,", "interfaces.external"),
        ("init net1,net1", "both"),
        ("init a,b c,d", "twice"),
        ("init 10.96.0.0/12", "nextHopIP is missing"),
        ("init 10.96.0.0/33,10.0.1.1", "cidr"),
        ("init 10.96.0.0/12,10.0.1.1,10.0.1.2", "more than 2 fields"),
        ("init 10.96.0.0/12,10.0.1.1,:", "neither"),
        ("subnet-route-add 10.0.2.0/24", "nextHopIP is missing"),
        ("subnet-route-add 10.0.2.0/24,10.0.1.1,x", "more than 2 fields"),
        ("subnet-route-add x,10.0.1.1", "cidr"),
        ("subnet-route-del x", "cidr"),
        ("ext-subnet-route-add 172.18.0.0/16", "gateway is missing"),
        ("ext-subnet-route-add 172.18.0.0/16,x", "gatewayV4"),
        ("eip-add 172.18.0.300/16", "address"),
        ("eip-add 172.18.0.20/33", "address"),
        ("eip-add fd00::1/64", "address"),
        ("eip-add 172.18.0.20/16,x", "gatewayV4"),
        ("eip-add ,", "address"),
        ("eip-del x/16", "address"),
        ("floating-ip-add 172.18.0.20", "internalIp is missing"),
        ("floating-ip-add 172.18.0.20,", "internalIp"),
        ("floating-ip-add ,10.0.1.5", "eip"),
        ("floating-ip-add 172.18.0.20,10.0.1.5,7", "more than 2 fields"),
        ("floating-ip-del x", "eip"),
        ("dnat-add 172.18.0.21,80,tcp,10.0.1.7", "internalPort is missing"),
        ("dnat-add 172.18.0.21,0,tcp,10.0.1.7,80", "externalPort"),
        ("dnat-add 172.18.0.21,65536,tcp,10.0.1.7,80", "externalPort"),
        ("dnat-add 172.18.0.21,8_0,tcp,10.0.1.7,80", "externalPort"),
        ("dnat-add 172.18.0.21,80,icmp,10.0.1.7,80", "protocol"),
        ("dnat-add 172.18.0.21,80,tcp,10.0.1.7,http", "internalPort"),
        ("dnat-del 172.18.0.21,80", "protocol is missing"),
        ("dnat-del 172.18.0.21,x,tcp", "externalPort"),
        ("nft-dnat-map-add 172.18.0.21,80,tcp", "backends is missing"),
        ("nft-dnat-map-add 172.18.0.21,80,tcp,", "backends: ':' is not an address with a port"),
        ("nft-dnat-map-add 172.18.0.21,80,tcp,10.0.1.7", "backends: '10.0.1.7:' is not an address with a port"),
        ("nft-dnat-map-add 172.18.0.21,80,tcp,10.0.1.7:80@", "backends"),
        ("nft-dnat-map-add 172.18.0.21,80,tcp,10.0.1.7:8_0", "backends"),
        ("nft-dnat-map-add 172.18.0.21,80,tcp,10.0.1.7:65536", "backends.0.internalPort"),
        ("nft-dnat-map-add 172.18.0.21,80,tcp,10.0.1.7:80@10.0.1:80", "backends.1.internalIp"),
        ("nft-dnat-map-add 172.18.0.21,80,tcp,10.0.1.7:80,x", "more than 4 fields"),
        ("nft-dnat-map-add 172.18.0.21,80,icmp,10.0.1.7:80", "protocol"),
        ("nft-dnat-map-add 172.18.0.21,0,tcp,10.0.1.7:80", "externalPort"),
        ("nft-dnat-map-del 172.18.0.21,80", "protocol is missing"),
        ("snat-add 172.18.0.22", "internalCIDR"),
        ("snat-add 172.18.0.22,10.0.1.0/99", "internalCIDR"),
        ("snat-add 172.18.0.22,fd00::/64", "internalCIDR"),
        ("snat-add 172.18.0.22,10.0.1.0/24,--random", "--random-fully"),
        ("snat-add 172.18.0.22,10.0.1.0/24,--random-fully,x", "--random-fully"),
        ("snat-del 172.18.0.22", "internalCIDR is missing"),
    ],
)
def test_malformed_rules_are_named_with_their_field(line: str, says: str) -> None:
    told = refusal_of(line)
    assert told.startswith(line.split(maxsplit=1)[0])
    assert says in told


NIC = {"direction": "egress", "interface": "net1", "rateMax": "50", "burstMax": "50"}


@pytest.mark.parametrize(
    ("line", "limits"),
    [
        (
            "eip-egress-qos-add 172.18.0.20,0,10,10",
            [EipLimit(eip="172.18.0.20", direction="egress", priority=1, rate_max="10", burst_max="10")],
        ),
        (
            "eip-ingress-qos-add 172.18.0.20,1,0.5,0.06 172.18.0.20,7,2.5,0.3",
            [EipLimit(eip="172.18.0.20", direction="ingress", priority=7, rate_max="2.5", burst_max="0.3")],
        ),
        ("qos-add egress,net1,0,matchall,,,,50,50", [InterfaceLimit.model_validate({**NIC, "priority": 3})]),
        ("qos-add egress,,3,matchall,,,,50,50", [InterfaceLimit.model_validate({**NIC, "priority": 3})]),
        (
            "qos-add ingress,,3,matchall,,,,50,50",
            [InterfaceLimit.model_validate({**NIC, "direction": "ingress", "interface": "eth0", "priority": 3})],
        ),
        (
            "qos-add egress,net1,0,u32,ip,dst,10.0.1.9/16,50,50",
            [InterfaceLimit.model_validate({**NIC, "priority": 2, "matchType": "ip", "matchValue": "dst 10.0.0.0/16"})],
        ),
    ],
)
def test_limits_stand_before_init_and_go_again(line: str, limits: list[EipLimit | InterfaceLimit]) -> None:
    spec = edit_all(None, commands_of(line, GATEWAY_V4="192.168.0.1"))
    assert spec is not None
    assert list(spec.qos) == limits
    with pytest.raises(NotInitialized):
        edit_all(spec, commands_of("eip-add 172.18.0.20/16"))
    initialized = edit_all(spec, commands_of("init"))
    assert initialized == GatewaySpec(qos=spec.qos)
    verb, rule = line.split(maxsplit=1)[0], line.rsplit(maxsplit=1)[-1]
    gone = rule if verb == "qos-add" else rule.split(",")[0]
    assert edit_all(initialized, commands_of(f"{verb.removesuffix('add')}del {gone}")) == GatewaySpec()
    if verb == "qos-add":
        seven = ",".join(rule.split(",")[:7])
        assert edit_all(initialized, commands_of(f"qos-del {seven}")) == GatewaySpec()


@pytest.mark.parametrize(
    "line",
    [
        "eip-egress-qos-del 172.18.0.20",
        "eip-ingress-qos-del ,",
        "qos-del egress,net1,3,matchall,,,,50,50",
        "qos-del ,,,,,,,,",
        "qos-del egress,net1,2,u32,ip,dst,2001:db8::/64,,",
        "qos-del egress,net1,100000,matchall,,,,,",
        "qos-del ingress,verylongname12,3,matchall,,,,,",
    ],
)
def test_a_limit_that_is_not_there_or_cannot_be_is_deleted_with_success(line: str) -> None:
    spec = GatewaySpec()
    assert edit_all(spec, commands_of(line)) == spec


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("qos-add egress,net1,3,matchall,,,,,", "rateMax: '' is not a decimal number of Mbit/s"),
        ("qos-add egress,net1,3,matchall,,,,10,", "burstMax: '' is not a decimal number of MB"),
        ("eip-egress-qos-add 172.18.0.20,1,,10", "rateMax: ''"),
        ("eip-egress-qos-add 172.18.0.20,1,-5,10", "rateMax: '-5'"),
        ("eip-egress-qos-add 172.18.0.20,1,0,10", "rateMax: 0 Mbit/s"),
        ("eip-egress-qos-add 172.18.0.20,1,1e3,10", "rateMax: '1e3'"),
        ("eip-egress-qos-add 172.18.0.20,x,10,10", "priority: 'x' is not a priority"),
        ("eip-egress-qos-add 172.18.0.20,1,10,10,10", "more than 4 fields"),
        ("eip-egress-qos-add 172.18.0.20,1,10", "burstMax is missing"),
        ("qos-add up,net1,3,matchall,,,,1,1", "direction"),
        ("qos-add egress,net1,3,flower,,,,1,1", "classifier: 'flower'"),
        ("qos-add egress,net1,3,u32,tcp,dst,10.0.0.0/8,1,1", "matchType: 'tcp'"),
        ("qos-add egress,net1,3,u32,ip,any,10.0.0.0/8,1,1", "matchValue: 'any 10.0.0.0/8'"),
        ("qos-add egress,net1,3,u32,ip,dst,2001:db8::/64,1,1", "matchValue"),
        ("qos-add egress,net1,3,u32,ip,dst,10.0.0.0/33,1,1", "matchValue"),
        ("qos-add egress,net1,70000,matchall,,,,1,1", "70000 is not a priority between 1 and 65534"),
        ("qos-add egress,net1,3,matchall,,,,1,1,1", "more than 9 fields"),
        ("qos-del egress,net1", "priority is missing"),
    ],
)
def test_malformed_limits_are_named_with_their_field(line: str, says: str) -> None:
    assert says in refusal_of(line)


def test_one_bad_rule_refuses_the_whole_call() -> None:
    told = refusal_of("floating-ip-add 172.18.0.20,10.0.1.5 172.18.0.21,10.0.1.x")
    assert "172.18.0.21,10.0.1.x" in told
    assert "internalIp" in told


# --- environment ------------------------------------------------------------------------------------------


def test_gateways_of_the_environment_come_first_and_only_where_named() -> None:
    gateways = {"GATEWAY_V4": "172.18.0.1", "GATEWAY_V6": "fd00::1"}
    assert commands_of("eip-add 172.18.0.20/16", **gateways) == (
        c.SetGateways(gateway_v4="172.18.0.1"),
        c.SetGateways(gateway_v6="fd00::1"),
        EIP,
    )
    assert commands_of("eip-add 172.18.0.20/16", GATEWAY_V4="", GATEWAY_V6="") == (EIP,)


def test_init_precedes_the_gateways_of_its_environment() -> None:
    done = edit_all(None, commands_of("init 10.96.0.0/12,10.0.1.1", GATEWAY_V4="172.18.0.1"))
    assert done is not None
    assert done.gateway_v4 == "172.18.0.1"
    assert [route.cidr for route in done.routes] == ["10.96.0.0/12"]


def test_a_rule_that_names_its_gateway_wins_over_the_environment() -> None:
    done = edit_all(GatewaySpec(), commands_of("eip-add 172.18.0.20/16,172.18.0.9", GATEWAY_V4="172.18.0.1"))
    assert done is not None
    assert done.gateway_v4 == "172.18.0.9"


def test_an_empty_gateway_leaves_what_is_stored() -> None:
    spec = GatewaySpec(gateway_v4="172.18.0.1")
    assert edit_all(spec, commands_of("eip-del 172.18.0.20/16", GATEWAY_V4="")) == spec


def test_a_bad_gateway_is_named() -> None:
    assert "GATEWAY_V4=172.18.0.1/16" in refusal_of("eip-del ,", GATEWAY_V4="172.18.0.1/16")


@pytest.mark.parametrize(
    ("line", "environment", "standing", "expected"),
    [
        ("init", {"VPC_INTERFACE": "net3", "EXTERNAL_INTERFACE": "net4"}, None, ("net3", "net4")),
        ("init a,b", {"VPC_INTERFACE": "net3", "EXTERNAL_INTERFACE": "net4"}, None, ("a", "b")),
        ("init", {"EXTERNAL_INTERFACE": "net4"}, None, ("eth0", "net4")),
        ("init", {"VPC_INTERFACE": "", "EXTERNAL_INTERFACE": "net4"}, ("x", "y"), ("x", "net4")),
        ("init", {"VPC_INTERFACE": "net3"}, ("x", "y"), ("net3", "y")),
        ("init", {"VPC_INTERFACE": "", "EXTERNAL_INTERFACE": ""}, ("x", "y"), None),
        ("init", {}, ("x", "y"), None),
    ],
)
def test_interfaces_of_init(
    line: str, environment: dict[str, str], standing: tuple[str, str] | None, expected: tuple[str, str] | None
) -> None:
    parsed = parse(line.split(), environment, Interfaces(vpc=standing[0], external=standing[1]) if standing else None)
    wanted = Interfaces(vpc=expected[0], external=expected[1]) if expected else None
    assert parsed == Change((c.Init(interfaces=wanted),))


def test_interfaces_of_the_environment_are_inits_alone() -> None:
    assert commands_of("eip-add 172.18.0.20/16", VPC_INTERFACE="net3") == (EIP,)


# --- what is no transaction -------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["help", "--help", "-h"])
def test_help(word: str) -> None:
    reply = parse([word], {})
    assert isinstance(reply, Reply)
    assert (reply.code, reply.stderr) == (0, "")
    listed = {line.split()[0] for line in reply.stdout.splitlines() if line.startswith("  ")}
    assert listed == {*VERBS, "get-iptables-version", "help"}


@pytest.mark.parametrize("words", [[], [""], ["eip"], ["EIP-ADD"], ["--version"], ["eip-add,", "x"]])
def test_unknown_command(words: list[str]) -> None:
    reply = parse(words, {})
    assert isinstance(reply, Reply)
    assert (reply.code, reply.stderr) == (1, "")
    assert reply.stdout.startswith("Unknown command")
    assert "eip-add IP/LENGTH" in reply.stdout


def test_get_iptables_version_is_a_question() -> None:
    assert parse(["get-iptables-version"], {}) == IptablesVersion()


def test_eips_named_are_announced_even_if_nothing_changes() -> None:
    parsed = parse(["eip-add", "172.18.0.20/16", "172.18.0.21/16"], {})
    assert isinstance(parsed, Change)
    assert parsed.announce == ("172.18.0.20", "172.18.0.21")
    assert parse(["eip-del", "172.18.0.20/16"], {}) == Change((c.EipDel(address="172.18.0.20/16"),))


# --- what the releases send -------------------------------------------------------------------------------

_UP_TO_1_15 = [
    "floating-ip-del ,",
    "dnat-del ,,,,",
    "snat-del ,",
    "eip-add 172.18.0.20/16",
    "floating-ip-add 172.18.0.20,10.0.1.5",
    "floating-ip-del 172.18.0.20,10.0.1.5",
    "floating-ip-add 172.18.0.20,10.0.1.6",
    "dnat-add 172.18.0.21,80,tcp,10.0.1.7,8080",
    "dnat-del 172.18.0.21,80,tcp,10.0.1.7,8080",
    "dnat-add 172.18.0.21,80,tcp,10.0.1.8,8080",
    "snat-add 172.18.0.22,10.0.1.0/24",
    "subnet-route-add 10.0.2.0/24,10.0.1.1 10.0.3.0/24,10.0.1.1",
]
_SINCE_1_16 = [
    "eip-add 172.18.0.20/16",
    "floating-ip-add 172.18.0.20,10.0.1.5",
    "floating-ip-del 172.18.0.20",
    "floating-ip-add 172.18.0.20,10.0.1.6",
    "dnat-add 172.18.0.21,80,tcp,10.0.1.7,8080",
    "dnat-del 172.18.0.21,80,tcp",
    "dnat-add 172.18.0.21,80,tcp,10.0.1.8,8080",
    "snat-add 172.18.0.22,10.0.1.0/24,--random-fully",
    "subnet-route-add 10.0.2.0/24,10.0.1.1 10.0.3.0/24,10.0.1.1",
]
SENT = {
    "1.12": [
        "init 10.96.0.0/12,10.0.1.1",
        "ext-subnet-route-add 172.18.0.0/16,172.18.0.1",
        "eip-add 172.18.0.20/16,172.18.0.1",
        *_UP_TO_1_15,
        "ext-subnet-route-del 172.18.0.0/16,172.18.0.1",
    ],
    "1.13": ["init", *_UP_TO_1_15],
    "1.14": ["init", *_UP_TO_1_15],
    "1.15": ["init eth0,net1", *_UP_TO_1_15],
    "1.16": ["init eth0,net1", *_SINCE_1_16],
    "1.17": ["init", *_SINCE_1_16],
}


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_builds_its_gateway(release: str) -> None:
    """Whatever the dialect, the same gateway stands at the end."""
    environment = {"GATEWAY_V4": "172.18.0.1", "GATEWAY_V6": ""} if release >= "1.15" else {}
    spec: GatewaySpec | None = None
    for line in SENT[release]:
        spec = edit_all(spec, commands_of(line, **environment))
    assert spec is not None
    assert [eip.address for eip in spec.eips] == ["172.18.0.20/16"]
    assert [str(fip) for fip in spec.fips] == ["floating IP 172.18.0.20 -> 10.0.1.6"]
    assert [str(dnat) for dnat in spec.dnats] == ["DNAT 172.18.0.21:80/tcp -> 10.0.1.8:8080"]
    assert [str(snat) for snat in spec.snats] == ["SNAT 10.0.1.0/24 -> 172.18.0.22"]
    assert {"10.0.2.0/24", "10.0.3.0/24"} <= {route.cidr for route in spec.routes}
    if release in ("1.12", "1.15", "1.16", "1.17"):
        assert spec.gateway_v4 == "172.18.0.1"
    again = edit_all(spec, (command for line in SENT[release][-1:] for command in commands_of(line, **environment)))
    assert again == spec


@pytest.mark.parametrize("release", RELEASES)
def test_results_as_a_release_reads_them(release: str) -> None:
    assert takes_for_success(release, success("anything at all\n"))
    assert not takes_for_success(release, failure("Warning: not for the caller"))
    assert not takes_for_success(release, conflict("x conflicts with y"))


def test_failures_are_one_printable_line() -> None:
    assert failure("a\n b\r\n\n\x1b[1mc\0") == Reply(1, "", "a; b; \\x1b[1mc\\x00\n")
    assert conflict("a\nb") == Reply(1, "a; b\n", "")


# --- anything at all --------------------------------------------------------------------------------------

_OCTETS = st.sampled_from(["172.18.0.20", "172.18.0.21", "10.0.1.5", "10.0.1.0/24", "172.18.0.20/16", "10.0.2.0/24"])
_FIELD = st.one_of(
    _OCTETS, st.sampled_from(["", "80", "tcp", "UDP", "--random-fully", "net1", "eth0", "99999"]), st.text(max_size=8)
)
_WORD = st.lists(_FIELD, max_size=6).map(",".join)
_CALL = st.tuples(st.sampled_from([*VERBS, "help", "get-iptables-version", "x"]), st.lists(_WORD, max_size=3))
_VALUES = st.sampled_from(["", "172.18.0.1", "fd00::1", "net1", "\n"])
_ENVIRONMENT = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(["GATEWAY_V4", "GATEWAY_V6", "VPC_INTERFACE", "EXTERNAL_INTERFACE"], _VALUES)
)


@given(_CALL, _ENVIRONMENT, st.booleans())
def test_any_words(call: tuple[str, list[str]], environment: dict[str, str], initialized: bool) -> None:
    """No exception but those the server answers, no success that speaks on stderr, no failure without one line."""
    parsed = parse([call[0], *call[1]], environment)
    if isinstance(parsed, Change):
        try:
            edit_all(GatewaySpec() if initialized else None, parsed.commands)
        except (Conflict, NotInitialized):
            return
    if isinstance(parsed, Reply):
        if parsed.code == 0:
            assert parsed.stderr == ""
        else:
            assert parsed.code == 1
            assert parsed.stderr.count("\n") == (0 if parsed.stdout else 1)
            assert "Unknown command" in parsed.stdout or parsed.stderr.strip()


_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(st.integers(0, 1 << 40), st.dictionaries(st.sampled_from(["GATEWAY_V4", "A"]), _TEXT), st.lists(_TEXT))
def test_requests_survive_the_wire(namespace: int, environment: dict[str, str], words: list[str]) -> None:
    request = Request(namespace, environment, tuple(words))
    assert decode_request(request.encode()) == request


@given(st.integers(0, 255), _TEXT, _TEXT)
def test_replies_survive_the_wire(code: int, stdout: str, stderr: str) -> None:
    reply = Reply(code, stdout, stderr)
    assert decode_reply(reply.encode()) == reply
    with pytest.raises(BadRequest):
        decode_reply(reply.encode()[:-1])


@given(st.binary(max_size=64))
def test_garbage_is_refused_or_read(data: bytes) -> None:
    try:
        decode_request(data)
        decode_request(b"natgw-exec/1\x004711\0" + data)
    except BadRequest:
        return


def test_words_that_are_no_utf8_are_shown_escaped() -> None:
    request = decode_request(b"natgw-exec/1\x001\0\0eip-add\0\xff\0")
    assert request.words == ("eip-add", "\\xff")
