"""Reading manifests: what is taken, what is named as not simulated, what is refused as a slip."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from lab.kinds import Subnet
from lab.manifests import Manifests, read

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def parse(text: str) -> Manifests:
    return read([("test.yaml", text)])


def vpc(spec: str) -> str:
    return f"apiVersion: kubeovn.io/v1\nkind: Vpc\nmetadata: {{name: v}}\nspec: {spec}\n---\n"


def subnet(spec: str) -> str:
    return f"apiVersion: kubeovn.io/v1\nkind: Subnet\nmetadata: {{name: s}}\nspec: {spec}\n---\n"


def dnat(spec: str) -> str:
    return f"apiVersion: kubeovn.io/v1\nkind: IptablesDnatRule\nmetadata: {{name: d}}\nspec: {spec}\n---\n"


def test_every_example_manifest_that_has_a_kind_and_a_name_is_read() -> None:
    for path in sorted(EXAMPLES.rglob("*.yaml")):
        if ".fragment." in path.name:
            continue
        found = read([(path.name, path.read_text(encoding="utf-8"))])
        expected = ["Subnet subnet-secondary: unknown field cidr; did you mean cidrBlock?"]
        assert found.problems == (expected if path.name == "003-vpc-and-subnet.yaml" else []), path


def test_later_documents_of_a_vpc_add_to_it_and_override() -> None:
    found = parse(
        vpc("{namespaces: [a], staticRoutes: [{cidr: 0.0.0.0/0, nextHopIP: 10.0.0.1}]}")
        + vpc("{staticRoutes: [{cidr: 10.9.0.0/16, nextHopIP: 10.0.0.2}], defaultSubnet: s}")
    )
    (merged,) = found.vpcs.values()
    assert merged.namespaces == ("a",)
    assert merged.default_subnet == "s"
    assert [route.cidr for route in merged.static_routes] == [IPv4Network("10.9.0.0/16")]
    assert found.problems == []


def test_other_kinds_may_be_repeated_but_not_contradict_themselves() -> None:
    once = subnet("{cidrBlock: 10.0.0.0/24}")
    assert parse(once + subnet("{cidrBlock: 10.0.0.0/24, gateway: 10.0.0.9}")).subnets["s"].gateway == IPv4Address(
        "10.0.0.9"
    )
    assert parse(once + subnet("{cidrBlock: 10.0.1.0/24}")).problems == [
        "Subnet s is given twice with different cidrBlock: '10.0.0.0/24' and '10.0.1.0/24'."
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (subnet("{cidr: 10.0.0.0/24}"), "Subnet s: unknown field cidr; did you mean cidrBlock?"),
        (subnet("{cidrBlock: 10.0.0.0/24, gatway: 10.0.0.1}"), "Subnet s: unknown field gatway; did you mean gateway?"),
        (subnet("{cidrBlock: 10.0.0.0/24, zzz: 1}"), "Subnet s: unknown field zzz."),
        (subnet("{cidrBlock: fd00::/64}"), "Subnet s: cidrBlock: 'fd00::/64' is not an IPv4 CIDR."),
        (subnet("{gateway: 10.0.0.1}"), "Subnet s: cidrBlock is missing."),
        (
            vpc("{staticRoutes: [{cidr: true, nextHopIP: 10.0.0.1}]}"),
            "Vpc v: staticRoutes[0].cidr: True is not an IPv4 CIDR.",
        ),
        (subnet("{cidrBlock: 10.0.0.0/24, gateway: 1}"), "Subnet s: gateway: '1' is not an IPv4 address."),
        (
            subnet("{cidrBlock: 10.0.0.0/24, excludeIps: [10.0.0.9..10.0.0.3]}"),
            "Subnet s: excludeIps[0]: the range '10.0.0.9..10.0.0.3' ends before it starts.",
        ),
        (
            vpc("{staticRoutes: [{cidr: 10.0.0.0/8, nextHop: 10.0.0.1}]}"),
            "Vpc v: unknown field staticRoutes[0].nextHop; did you mean nextHopIP?",
        ),
        (
            dnat("{eip: e, externalPort: 80, protocol: tcp, internalIp: 10.0.0.1, internalPort: '80'}"),
            "IptablesDnatRule d: externalPort: must be a string: write it in quotes ('80').",
        ),
        (
            dnat("{eip: e, externalPort: '0', protocol: tcp, internalIp: 10.0.0.1, internalPort: '80'}"),
            "IptablesDnatRule d: externalPort: '0' is not a port from 1 to 65535.",
        ),
        (
            dnat("{eip: e, externalPort: '8', protocol: sctp, internalIp: 10.0.0.1, internalPort: '80'}"),
            "IptablesDnatRule d: protocol: 'sctp' is neither tcp nor udp.",
        ),
        (
            "kind: Vpc\nmetadata: {name: v}",
            "test.yaml, document 1: apiVersion of Vpc is missing; it must be 'kubeovn.io/v1'.",
        ),
        ("apiVersion: kubeovn.io/v1\nkind: Vpc", "test.yaml, document 1: Vpc without metadata.name."),
        ("metadata: {name: v}", "test.yaml, document 1: not a Kubernetes object: it has no kind."),
        (
            "apiVersion: kubeovn.io/v1\nkind: IptablesEip\nmetadata: {name: e}",
            "test.yaml, document 1: kubeovn.io has no kind 'IptablesEip'; did you mean IptablesEIP?",
        ),
        (
            "apiVersion: kubeovn.io/v1\nkind: Vpc\nmetadata: {name: v}\nspce: {}",
            "Vpc v: unknown section 'spce'; did you mean spec?",
        ),
    ],
)  # fmt: skip
def test_one_sentence_for_each_mistake(text: str, sentence: str) -> None:
    assert parse(text).problems == [sentence]


def test_a_key_given_twice_is_refused_instead_of_dropped() -> None:
    (problem,) = parse("apiVersion: kubeovn.io/v1\nkind: Vpc\nmetadata: {name: v}\nkind: Subnet").problems
    assert "the key 'kind' is given twice" in problem


def test_text_that_is_no_yaml_is_one_problem_and_the_next_file_is_read() -> None:
    found = read([("bad.yaml", "a: [1"), ("good.yaml", vpc("{}"))])
    assert len(found.problems) == 1
    assert found.problems[0].startswith("bad.yaml: not YAML: ")
    assert "v" in found.vpcs


def test_what_is_the_clusters_business_is_named_and_kept_out() -> None:
    found = parse(
        vpc("{enableExternal: true, staticRoutes: [{cidr: 10.0.0.0/8, nextHopIP: 10.0.0.1, ecmpMode: ecmp_dst}]}")
        + "apiVersion: kubeovn.io/v1\nkind: SwitchLBRule\nmetadata: {name: slr}\n---\n"
        + "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\nmetadata: {name: r}\n"
    )
    assert found.problems == []
    assert found.notes == [
        "SwitchLBRule slr: this kind is not simulated.",
        "ClusterRole r: this kind is not simulated.",
        "Vpc v: not simulated: enableExternal, staticRoutes[0].ecmpMode.",
    ]


def test_a_list_of_objects_is_read_as_its_items() -> None:
    found = parse("kind: List\napiVersion: v1\nitems:\n- {apiVersion: kubeovn.io/v1, kind: Vpc, metadata: {name: v}}\n")
    assert list(found.vpcs) == ["v"]


def test_the_json_in_an_attachment_may_be_folded_over_lines() -> None:
    text = (EXAMPLES / "seeds" / "002-04-external-network.yaml").read_text(encoding="utf-8")
    config = parse(text).nads["kube-system/ovn-vpc-external-network"].config
    assert (config.type, config.master, config.mode) == ("macvlan", "eth1", "bridge")
    assert config.provider == "ovn-vpc-external-network.kube-system"


@pytest.mark.parametrize(
    ("provider", "external", "nad"),
    [
        ("", False, None),
        ("ovn", False, None),
        ("a.b.ovn", False, "b/a"),
        ("a.b", True, "b/a"),
        ("underlay", True, None),
    ],
)
def test_the_provider_tells_whether_a_subnet_lies_outside(provider: str, external: bool, nad: str | None) -> None:
    one = Subnet.model_validate({"meta": {"name": "s"}, "cidrBlock": "10.0.0.0/24", "provider": provider})
    assert (one.external, one.nad) == (external, nad)


def test_without_a_gateway_a_subnet_has_its_first_address() -> None:
    assert parse(subnet("{cidrBlock: 10.0.0.0/24}")).subnets["s"].gateway_address == IPv4Address("10.0.0.1")


def test_of_a_dual_stack_subnet_the_ipv4_half_is_taken() -> None:
    found = parse(
        subnet(
            "{protocol: Dual, cidrBlock: '10.0.0.0/24,fd00::/64', gateway: '10.0.0.1,fd00::1', "
            "excludeIps: ['fd00::2', 10.0.0.7]}"
        )
    )
    one = found.subnets["s"]
    assert (str(one.cidr), str(one.gateway)) == ("10.0.0.0/24", "10.0.0.1")
    assert one.exclude_ips == ((IPv4Address("10.0.0.7"), IPv4Address("10.0.0.7")),)
    assert any("IPv6" in note for note in found.notes), "what is left out must be named"
