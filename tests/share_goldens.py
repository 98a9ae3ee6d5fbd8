"""The goldens of the share-type DNAT table: services, the script that makes them, and what nft prints of it.

Each directory under ``goldens/share`` holds ``script.nft`` (ours), and ``table.json`` and ``map.json`` as
``nft -j --terse list table ip kube-ovn`` and ``nft -j list map ip kube-ovn service-ips`` print them.
"""

from __future__ import annotations

from pathlib import Path

from rules.nft import ServiceKey
from rules.share import Service

GOLDENS = Path(__file__).parent / "goldens" / "share"
TWO = (("10.0.1.7", 8080), ("10.0.1.8", 8080))

CASES: dict[str, dict[ServiceKey, Service]] = {
    "random": {
        ServiceKey("172.31.255.21", "udp", 90): Service((("10.0.1.8", 8080),)),
        ServiceKey("172.18.0.21", "tcp", 80): Service((*TWO, ("10.0.1.9", 80))),
    },
    "affinity": {
        ServiceKey("172.18.0.21", "tcp", 80): Service(TWO, 10800),
        ServiceKey("172.18.0.21", "udp", 80): Service(TWO),
    },
    "none": {},
}
