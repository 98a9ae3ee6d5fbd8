"""The examples of the OpenAPI document; a test sends every one of them."""

from __future__ import annotations

from fastapi.openapi.models import Example

GATEWAY: dict[str, Example] = {
    "a VPC's gateway": {
        "summary": "An EIP with a port mapping and source translation, another one as a floating IP",
        "value": {
            "interfaces": {"vpc": "eth0", "external": "net1"},
            "gatewayV4": "192.168.0.1",
            "gatewayV6": None,
            "eips": [{"address": "192.168.0.10/24"}, {"address": "192.168.0.12/24"}],
            "fips": [{"eip": "192.168.0.12", "internalIp": "10.0.1.5"}],
            "dnats": [
                {
                    "eip": "192.168.0.10",
                    "externalPort": 8888,
                    "protocol": "tcp",
                    "internalIp": "10.0.1.10",
                    "internalPort": 80,
                }
            ],
            "snats": [{"eip": "192.168.0.10", "internalCIDR": "10.0.1.0/24", "randomFully": True}],
            "routes": [{"cidr": "10.0.2.0/24", "nextHopIP": "10.0.1.1"}],
            "sharedDnats": [
                {
                    "eip": "192.168.0.10",
                    "externalPort": 443,
                    "protocol": "tcp",
                    "backends": [
                        {"internalIp": "10.0.1.10", "internalPort": 8443},
                        {"internalIp": "10.0.1.11", "internalPort": 8443},
                    ],
                    "sessionAffinity": "ClientIP",
                    "sessionAffinityTimeoutSeconds": 600,
                }
            ],
            "qos": [
                {"eip": "192.168.0.10", "direction": "egress", "rateMax": "10", "burstMax": "10"},
                {"interface": "net1", "direction": "ingress", "rateMax": "50", "burstMax": "50"},
                {
                    "interface": "net1",
                    "direction": "egress",
                    "matchType": "ip",
                    "matchValue": "dst 203.0.113.0/24",
                    "rateMax": "2.5",
                    "burstMax": "0.3",
                },
            ],
        },
    },
    "nothing yet": {
        "summary": "An initialized gateway without objects",
        "value": {"gatewayV4": "192.168.0.1"},
    },
}

COMMANDS: dict[str, Example] = {
    "limit an EIP": {
        "summary": "10 Mbit/s out, 2.5 Mbit/s in; bursts in MB",
        "value": [
            {"op": "eip-egress-qos-add", "eip": "192.168.0.10", "priority": 1, "rateMax": "10", "burstMax": "10"},
            {"op": "eip-ingress-qos-add", "eip": "192.168.0.10", "priority": 1, "rateMax": "2.5", "burstMax": "0.3"},
        ],
    },
    "publish a web server": {
        "summary": "An EIP and a port mapping, both or none",
        "value": [
            {"op": "init"},
            {"op": "eip-add", "address": "192.168.0.20/24"},
            {
                "op": "dnat-add",
                "eip": "192.168.0.20",
                "externalPort": 443,
                "protocol": "tcp",
                "internalIp": "10.0.1.10",
                "internalPort": 8443,
            },
        ],
    },
    "spread a port over two backends": {
        "summary": "Exactly these backends; without sessionAffinity, the one that stands is kept",
        "value": [
            {
                "op": "nft-dnat-map-add",
                "eip": "192.168.0.20",
                "externalPort": 53,
                "protocol": "udp",
                "backends": [
                    {"internalIp": "10.0.1.10", "internalPort": 53},
                    {"internalIp": "10.0.1.11", "internalPort": 53},
                ],
                "sessionAffinity": "None",
            }
        ],
    },
    "take an EIP away": {
        "summary": "Deleting what is not there is no error",
        "value": [
            {"op": "snat-del", "eip": "192.168.0.20", "internalCIDR": "10.0.1.0/24"},
            {"op": "eip-del", "address": "192.168.0.20"},
        ],
    },
}
