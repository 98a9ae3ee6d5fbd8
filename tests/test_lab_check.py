"""Every refusal: the sound world passes, and each single change to it is refused with one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.check import Refused, refusals
from lab.manifests import read
from lab.plan import plan

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
EXTERNAL = (EXAMPLES / "seeds" / "002-04-external-network.yaml").read_text(encoding="utf-8")

SOUND = f"""
apiVersion: kubeovn.io/v1
kind: Vpc
metadata: {{name: v}}
spec:
  staticRoutes:
  - {{cidr: 0.0.0.0/0, nextHopIP: 10.0.1.254, policy: policyDst}}
  policyRoutes:
  - {{action: reroute, match: ip4.src==10.0.1.9, nextHopIP: 10.0.1.253, priority: 7}}
---
apiVersion: kubeovn.io/v1
kind: Subnet
metadata: {{name: net1}}
spec: {{vpc: v, cidrBlock: 10.0.1.0/24, excludeIps: [10.0.1.200..10.0.1.210], namespaces: [ns1]}}
---
{EXTERNAL}
---
apiVersion: kubeovn.io/v1
kind: VpcNatGateway
metadata: {{name: gw1}}
spec: {{vpc: v, subnet: net1, lanIp: 10.0.1.254}}
---
apiVersion: kubeovn.io/v1
kind: IptablesEIP
metadata: {{name: e1}}
spec: {{natGwDp: gw1, v4ip: 192.168.0.20}}
---
apiVersion: kubeovn.io/v1
kind: IptablesEIP
metadata: {{name: e2}}
spec: {{natGwDp: gw1}}
---
apiVersion: kubeovn.io/v1
kind: IptablesDnatRule
metadata: {{name: d1}}
spec: {{eip: e1, externalPort: '80', protocol: tcp, internalIp: 10.0.1.7, internalPort: '8080'}}
---
apiVersion: kubeovn.io/v1
kind: IptablesFIPRule
metadata: {{name: f1}}
spec: {{eip: e2, internalIp: 10.0.1.5}}
---
apiVersion: kubeovn.io/v1
kind: IptablesSnatRule
metadata: {{name: s1}}
spec: {{eip: e1, internalCIDR: 10.0.1.0/24}}
---
apiVersion: v1
kind: Pod
metadata: {{name: p, namespace: ns1, annotations: {{ovn.kubernetes.io/ip_address: 10.0.1.8}}}}
"""


def more(kind: str, name: str, spec: str) -> str:
    return f"\n---\napiVersion: kubeovn.io/v1\nkind: {kind}\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n"


def refused(text: str) -> list[str]:
    manifests = read([("world.yaml", text)])
    return [*manifests.problems, *refusals(manifests)]


def test_the_sound_world_is_accepted() -> None:
    assert refused(SOUND) == []


ATTACHMENT = "NetworkAttachmentDefinition kube-system/ovn-vpc-external-network"
CHANGES = [
    (
        "lanIp: 10.0.1.254",
        "lanIp: 10.0.1.1",
        ["VpcNatGateway gw1: lanIp 10.0.1.1 is the gateway of subnet net1."],
    ),
    (
        "lanIp: 10.0.1.254",
        "lanIp: 10.0.2.254",
        ["VpcNatGateway gw1: lanIp 10.0.2.254 lies outside subnet net1 (10.0.1.0/24)."],
    ),
    (
        "lanIp: 10.0.1.254",
        "lanIp: 10.0.1.205",
        ["VpcNatGateway gw1: lanIp 10.0.1.205 is excluded by excludeIps 10.0.1.200..10.0.1.210 of subnet net1."],
    ),
    (
        "v4ip: 192.168.0.20",
        "v4ip: 10.0.1.111",
        ["IptablesEIP e1: v4ip 10.0.1.111 lies outside subnet ovn-vpc-external-network (192.168.0.0/24)."],
    ),
    (
        "v4ip: 192.168.0.20",
        "v4ip: 192.168.0.7",
        [
            "IptablesEIP e1: v4ip 192.168.0.7 is excluded by excludeIps 192.168.0.1..192.168.0.10 "
            "of subnet ovn-vpc-external-network."
        ],
    ),
    (
        "v4ip: 192.168.0.20",
        "v4ip: 192.168.0.255",
        [
            "IptablesEIP e1: v4ip 192.168.0.255 is the network or broadcast address "
            "of subnet ovn-vpc-external-network (192.168.0.0/24)."
        ],
    ),
    (
        "lanIp: 10.0.1.254}",
        "lanIp: 10.0.1.254, replicas: 2}",
        ["VpcNatGateway gw1: replicas 2 (a highly available gateway) is not simulated; use replicas 1."],
    ),
    (
        "subnet: net1, lanIp",
        "subnet: net9, lanIp",
        ["VpcNatGateway gw1: subnet names Subnet net9, which these manifests do not define."],
    ),
    (
        "lanIp: 10.0.1.254}",
        "lanIp: 10.0.1.254, externalSubnets: [other]}",
        [
            "VpcNatGateway gw1: externalSubnets names Subnet other, which these manifests do not define.",
            "IptablesEIP e1: external subnet ovn-vpc-external-network is not among those of its gateway gw1 (other).",
            "IptablesEIP e2: external subnet ovn-vpc-external-network is not among those of its gateway gw1 (other).",
        ],
    ),
    (
        "natGwDp: gw1, v4ip",
        "natGwDp: gw7, v4ip",
        ["IptablesEIP e1: natGwDp names VpcNatGateway gw7, which these manifests do not define."],
    ),
    (
        "eip: e1, internalCIDR",
        "eip: e9, internalCIDR",
        ["IptablesSnatRule s1: eip names IptablesEIP e9, which these manifests do not define."],
    ),
    (
        "vpc: v, cidrBlock",
        "vpc: w, cidrBlock",
        [
            "Subnet net1: vpc names Vpc w, which these manifests do not define.",
            "VpcNatGateway gw1: subnet net1 belongs to VPC w, not to v.",
        ],
    ),
    (
        "eip: e2, internalIp",
        "eip: e1, internalIp",
        ["IptablesDnatRule d1 uses EIP e1, which IptablesFIPRule f1 owns whole: no packet would reach it."],
    ),
    (
        "internalIp: 10.0.1.7",
        "internalIp: 10.9.9.9",
        ["IptablesDnatRule d1: internalIp 10.9.9.9 is in no subnet of VPC v."],
    ),
    (
        "internalIp: 10.0.1.7",
        "internalIp: 10.0.1.254",
        ["IptablesDnatRule d1: internalIp 10.0.1.254 is the lanIp of VpcNatGateway gw1."],
    ),
    (
        "internalIp: 10.0.1.7",
        "internalIp: 10.0.1.1",
        ["IptablesDnatRule d1: internalIp 10.0.1.1 is the gateway of subnet net1."],
    ),
    (
        "cidrBlock: 10.0.1.0/24",
        "cidrBlock: 10.0.1.0/24, gateway: 10.0.3.1",
        ["Subnet net1: its gateway 10.0.3.1 lies outside 10.0.1.0/24."],
    ),
    (
        "nextHopIP: 10.0.1.254, policy",
        "nextHopIP: 10.7.0.1, policy",
        ["Vpc v: staticRoutes 0.0.0.0/0: next hop 10.7.0.1 is in none of the VPC's subnets."],
    ),
    (
        "nextHopIP: 10.0.1.253, priority",
        "priority",
        ["Vpc v: policyRoutes 7 (ip4.src==10.0.1.9): reroute without nextHopIP."],
    ),
    (
        '"type": "macvlan"',
        '"type": "bridge"',
        [f"{ATTACHMENT}: type 'bridge' with master 'eth1' is no macvlan on a NIC."],
    ),
    (
        '"master": "eth1"',
        '"master": "a-name-far-too-long"',
        [f"{ATTACHMENT}: 'a-name-far-too-long' cannot be the name of a NIC."],
    ),
    (
        "  provider: ovn-vpc-external-network.kube-system",
        "  provider: elsewhere.kube-system",
        [
            "Subnet ovn-vpc-external-network: provider names NAD kube-system/elsewhere, "
            "which these manifests do not define."
        ],
    ),
    (
        "  provider: ovn-vpc-external-network.kube-system",
        "  provider: ovn",
        [
            "VpcNatGateway gw1: external subnet ovn-vpc-external-network has provider 'ovn', an OVN network; "
            "the lab simulates external networks of a macvlan NetworkAttachmentDefinition only."
        ],
    ),
    (
        "ip_address: 10.0.1.8",
        "ip_address: 10.0.1.254",
        ["Pod ns1/p: ip_address 10.0.1.254 belongs to VpcNatGateway gw1 already."],
    ),
    (
        "ip_address: 10.0.1.8",
        "ip_address: nonsense",
        ["Pod ns1/p: ip_address 'nonsense' is not an IPv4 address."],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "sentences"), CHANGES)
def test_one_wrong_value_is_refused_in_one_sentence(old: str, new: str, sentences: list[str]) -> None:
    assert SOUND.count(old) >= 1
    assert refused(SOUND.replace(old, new, 1)) == sentences


SECOND_DNAT = "eip: e1, externalPort: '80', protocol: TCP, internalIp: 10.0.1.9, internalPort: '1'"
OVERLAPPING = "vpc: v, cidrBlock: 10.0.1.128/25"
ADDITIONS = [
    (
        more("IptablesEIP", "e3", "natGwDp: gw1, v4ip: 192.168.0.20"),
        ["IptablesEIP e3: v4ip 192.168.0.20 belongs to IptablesEIP e1 already."],
    ),
    (
        more("IptablesFIPRule", "f2", "eip: e2, internalIp: 10.0.1.6"),
        [
            "IptablesFIPRule f1 and IptablesFIPRule f2 both use EIP e2: a floating IP has one internal address, "
            "not 10.0.1.5 and 10.0.1.6."
        ],
    ),
    (
        more("IptablesDnatRule", "d2", SECOND_DNAT),
        [
            "IptablesDnatRule d1 and IptablesDnatRule d2 both claim port 80/tcp of EIP e1, "
            "for 10.0.1.7:8080 and 10.0.1.9:1."
        ],
    ),
    (
        more("VpcNatGateway", "gw2", "vpc: v, subnet: net1, lanIp: 10.0.1.254"),
        ["VpcNatGateway gw2: lanIp 10.0.1.254 belongs to VpcNatGateway gw1 already."],
    ),
    (
        more("VpcNatGateway", "gw1", "vpc: v, subnet: net1, lanIp: 10.0.1.250"),
        ["VpcNatGateway gw1 is given twice with different lanIp: '10.0.1.254' and '10.0.1.250'."],
    ),
    (more("Subnet", "net2", OVERLAPPING), ["Subnets net1 (10.0.1.0/24) and net2 (10.0.1.128/25) of VPC v overlap."]),
    (more("Vpc", "w", "") + more("Subnet", "net2", OVERLAPPING.replace("vpc: v", "vpc: w")), []),
    (
        more("Subnet", "net2", "vpc: v, cidrBlock: 192.168.0.0/25"),
        [
            "VpcNatGateway gw1: tenant subnet net2 (192.168.0.0/25) overlaps external subnet ovn-vpc-external-network "
            "(192.168.0.0/24), so the gateway could not tell inside from outside."
        ],
    ),
    (
        more("Subnet", "out2", "cidrBlock: 192.168.0.0/16, provider: x.y"),
        [
            "Subnets ovn-vpc-external-network (192.168.0.0/24) and out2 (192.168.0.0/16) overlap outside, "
            "where one physical gateway serves both."
        ],
    ),
    (
        more("Vpc", "w", "defaultSubnet: test"),
        ["Vpc w: defaultSubnet names Subnet test, which these manifests do not define."],
    ),
    (
        "\n---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: ovn-vpc-nat-gw-config, namespace: kube-system}\n"
        "data: {enable-vpc-nat-gw: 'false'}\n",
        [
            "ConfigMap kube-system/ovn-vpc-nat-gw-config: enable-vpc-nat-gw is not 'true', "
            "so Kube-OVN would run none of the gateways."
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "sentences"), ADDITIONS)
def test_one_object_too_many_is_refused_in_one_sentence(text: str, sentences: list[str]) -> None:
    assert refused(SOUND + text) == sentences


def test_two_gateways_on_a_passthru_macvlan_are_refused() -> None:
    passthru = SOUND.replace('"mode": "bridge"', '"mode": "passthru"')
    assert refused(passthru) == []
    assert refused(passthru + more("VpcNatGateway", "gw2", "vpc: v, subnet: net1, lanIp: 10.0.1.253")) == [
        "macvlan mode passthru on eth1 admits one gateway, and gw1, gw2 want it."
    ]


def test_a_broken_object_is_not_called_unknown_as_well() -> None:
    assert refused(SOUND.replace("cidrBlock: 10.0.1.0/24", "cidr: 10.0.1.0/24")) == [
        "Subnet net1: unknown field cidr; did you mean cidrBlock?",
    ]


def test_an_external_subnet_without_room_is_refused() -> None:
    text = SOUND.replace("192.168.0.1..192.168.0.10", "192.168.0.1..192.168.0.19")
    text = text.replace("192.168.0.0/24", "192.168.0.0/27").replace("v4ip: 192.168.0.20", "v4ip: 192.168.0.20")
    many = "".join(more("IptablesEIP", f"x{number}", "natGwDp: gw1") for number in range(20))
    with pytest.raises(Refused) as caught:
        plan(read([("w", text + many)]))
    # .21-.30 are free: net1, e2 and x0 to x7 take them
    assert caught.value.reasons[0] == (
        "IptablesEIP x8: subnet ovn-vpc-external-network (192.168.0.0/27) has no free address left."
    )
    assert len(caught.value.reasons) == 12


def test_the_seeds_own_mistakes_are_named() -> None:
    guide = [path for path in sorted((EXAMPLES / "seeds").glob("002-*.yaml")) if ".fragment." not in path.name]
    assert refused("\n---\n".join(path.read_text(encoding="utf-8") for path in guide)) == [
        "Vpc test-vpc-1: defaultSubnet names Subnet test, which these manifests do not define.",
        "IptablesEIP eip-static: v4ip 10.0.1.111 lies outside subnet ovn-vpc-external-network (192.168.0.0/24).",
    ]
    assert refused((EXAMPLES / "two-vpcs-wrong.yaml").read_text(encoding="utf-8")) == [
        "VpcNatGateway gw1: lanIp 10.0.1.254 is the gateway of subnet net1.",
        "IptablesEIP eip-web-2: v4ip 172.17.88.121 belongs to IptablesEIP eip-web-1 already.",
        "IptablesEIP eip-out-2: v4ip 172.17.88.42 is excluded by excludeIps 172.17.88.1..172.17.88.99 "
        "of subnet external1.",
    ]
