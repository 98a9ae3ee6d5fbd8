"""What a pod's annotations say of its further network interfaces: Multus' list of networks, Kube-OVN's routes. Pure.

Multus takes ``[namespace/]name[@interface]``, separated by commas, or a JSON list of objects, and names the
interfaces net1, net2, … by their place in the list unless told otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from lab.routing import Frozen
from lab.world import ViaRoute

NETWORKS = "k8s.v1.cni.cncf.io/networks"
_ENTRY = re.compile(r"(?:([a-z0-9.-]+)/)?([a-z0-9.-]+)(?:@([A-Za-z0-9_.-]{1,15}))?")


class Attachment(Frozen):
    """A NetworkAttachmentDefinition (``namespace/name``) that a pod asks for, and the interface it becomes."""

    nad: str
    interface: str


def attachments(annotations: Mapping[str, str], namespace: str) -> tuple[Attachment, ...]:
    """The networks that a pod's annotations ask for. Raises ValueError with the end of a sentence about them."""
    text = annotations.get(NETWORKS, "").strip()
    if not text:
        return ()
    entries = _objects(text) if text.startswith("[") else [_entry(part.strip()) for part in text.split(",")]
    return tuple(
        Attachment(nad=f"{where or namespace}/{name}", interface=interface or f"net{number}")
        for number, (where, name, interface) in enumerate(entries, 1)
    )


def _entry(text: str) -> tuple[str, str, str]:
    found = _ENTRY.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no [namespace/]name[@interface]")
    return found[1] or "", found[2], found[3] or ""


def _objects(text: str) -> list[tuple[str, str, str]]:
    entries = []
    for item in _list(text):
        where, name, _ = _entry(str(item.get("name", "")))
        entries.append((where or str(item.get("namespace", "")), name, str(item.get("interface", ""))))
    return entries


def routes(annotations: Mapping[str, str], provider: str) -> tuple[ViaRoute, ...]:
    """The routes by the interface of this provider. Raises ValueError with the end of a sentence about them."""
    text = annotations.get(f"{provider}.kubernetes.io/routes", "").strip()
    if not text:
        return ()
    return tuple(
        ViaRoute(cidr=IPv4Network(str(item.get("dst", "")), strict=False), via=IPv4Address(str(item.get("gw", ""))))
        for item in _list(text)
    )


def _list(text: str) -> list[dict[str, Any]]:
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{text!r} is not JSON ({error})") from None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{text!r} is not a list of objects")
    return items
