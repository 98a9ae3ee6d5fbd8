"""Annotations that ask for further networks, and what becomes of them in a lab."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from lab.check import Refused
from lab.controller import Call, creation_calls
from lab.manifests import read
from lab.networks import NETWORKS, Attachment, attachments, routes
from lab.plan import plan
from lab.probes import NOBODY, probes
from lab.topology import steps
from lab.world import ViaRoute, World
from rules.advice import warnings
from rules.spec import GatewaySpec, Interfaces

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", []),
        ("default/a", [("default/a", "net1")]),
        ("a, kube-system/b", [("ns/a", "net1"), ("kube-system/b", "net2")]),
        ("a@ext,b", [("ns/a", "ext"), ("ns/b", "net2")]),
        ('[{"name": "default/a"}, {"name": "b", "namespace": "x"}]', [("default/a", "net1"), ("x/b", "net2")]),
        ('[{"name": "a", "interface": "net7"}]', [("ns/a", "net7")]),
    ],
)
def test_networks_are_read_as_multus_reads_them(text: str, wanted: list[tuple[str, str]]) -> None:
    assert attachments({NETWORKS: text}, "ns") == tuple(Attachment(nad=nad, interface=name) for nad, name in wanted)


@pytest.mark.parametrize("text", ["a b", "a/b/c", "[", '{"name": "a"}', '["a"]', "[{}]"])
def test_what_names_no_network_is_told(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no|is not"):
        attachments({NETWORKS: text}, "ns")


def test_routes_are_those_of_the_provider() -> None:
    annotations = {"a.ns.ovn.kubernetes.io/routes": '[{"dst":"10.96.0.1/32","gw":"100.100.100.1"}]'}
    route = ViaRoute(cidr=IPv4Network("10.96.0.1/32"), via=IPv4Address("100.100.100.1"))
    assert routes(annotations, "a.ns.ovn") == (route,)
    assert routes(annotations, "b.ns.ovn") == ()


def example(name: str, old: str = "", new: str = "") -> tuple[World, tuple[str, ...]]:
    text = (EXAMPLES / name).read_text()
    assert old in text
    return plan(read([(name, text.replace(old, new) if old else text)]))


def test_beside_another_primary_cni_the_interfaces_are_named() -> None:
    world, notes = example("non-primary-cni.yaml")
    (gateway,) = world.gateways
    assert creation_calls(gateway) == [Call("init", ("net1,net2",))]
    assert world.management is not None
    lines = [line for step in steps(world) if step.netns == gateway.netns for line in step.lines]
    assert "addr add 10.244.0.2/24 dev eth0" in lines
    assert "addr add 10.100.0.254/16 dev net1" in lines
    assert "route replace default via 192.168.0.1 dev net2" in lines
    assert not [note for note in notes if "annotation" in note]


def test_the_order_of_the_list_names_the_interfaces() -> None:
    networks = "networks: default/kube-ovn-vpc-network\nspec:\n  vpc"
    two = networks.replace("default/kube", "kube-system/ovn-vpc-external-network,default/kube")
    (gateway,) = example("non-primary-cni.yaml", networks, two)[0].gateways
    assert (gateway.vpc_interface, gateway.external_interface) == ("net2", "net3")


def test_where_kube_ovn_is_the_primary_cni_nothing_is_named() -> None:
    world, _ = example("no-default-eip.yaml")
    (gateway,) = world.gateways
    assert (gateway.vpc_interface, gateway.external_interface, gateway.management) == ("eth0", "net1", None)
    assert creation_calls(gateway)[0] == Call("init")


def test_a_pods_own_network_leads_to_the_service_behind_it() -> None:
    world, notes = example("no-default-eip.yaml")
    pod = next(host for host in world.hosts if host.label == "shop/ingress-controller")
    (nic,) = pod.nics
    assert (nic.interface, str(nic.address)) == ("net1", "100.100.100.2/24")
    tried = {probe.what: probe for probe in probes(world)}
    assert str(tried["service 10.96.0.1 by net1"].expect) == "service 10.96.0.1 answers, sees 100.100.100.2"
    assert tried["service 10.96.0.1 without net1"].expect == NOBODY
    assert tried["subnet backends of shop"].to == IPv4Address("10.0.2.5")
    assert not [note for note in notes if "annotation" in note]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            "kube-system/api-ovn-nad\n",
            "kube-system/no-such-nad\n",
            "annotation k8s.v1.cni.cncf.io/networks names NAD kube-system/no-such-nad, which these manifests do not",
        ),
        (
            '"gw":"100.100.100.1"',
            '"gw":"10.0.1.1"',
            "next hop 10.0.1.1 of route 10.96.0.1/32 is not on subnet vpc-apiserver-subnet (100.100.100.0/24).",
        ),
        ('"dst":"10.96.0.1/32"', '"dst":"api"', "kubernetes.io/routes: "),
    ],
)
def test_annotations_that_lead_nowhere_are_refused(old: str, new: str, sentence: str) -> None:
    with pytest.raises(Refused, match="shop/ingress-controller") as refused:
        example("no-default-eip.yaml", old, new)
    assert sentence in str(refused.value)


def test_the_tenants_side_named_net1_is_warned_of() -> None:
    assert warnings(GatewaySpec()) == []
    (sentence,) = warnings(GatewaySpec(interfaces=Interfaces(vpc="net1", external="net2")))
    assert "not net2" in sentence
