"""What changed between two specs, as a JSON value that makes one document of the other."""

from __future__ import annotations

from typing import Any

from rules.keyed import Keyed
from rules.spec import GatewaySpec

Document = dict[str, Any]
"""A spec as JSON: what ``model_dump(mode="json")`` gives."""


def patch(old: GatewaySpec, new: GatewaySpec) -> Document:
    """What ``patched`` needs; its size is that of the change.

    ``set`` and ``drop`` are about single values. In a list, ``gone`` elements from ``at`` on become ``new``.
    """
    fields = type(new).model_fields
    pairs = {name: (getattr(old, name), getattr(new, name)) for name in fields}
    differing = {name: pair for name, pair in pairs.items() if pair[0] is not pair[1]}
    said: Document = {}
    single: set[str] = set()
    for name, (one, other) in differing.items():
        if isinstance(one, Keyed) and isinstance(other, Keyed):
            at, gone, fresh = other.since(one)
            if gone or fresh:
                listed = [item.model_dump(mode="json") for item in fresh]
                said.setdefault("lists", {})[_alias(name)] = {"at": at, "gone": len(gone), "new": listed}
        elif one != other:
            single.add(name)
    values = new.model_dump(mode="json", include=single)
    before = old.model_dump(mode="json", include=single)
    if values:
        said["set"] = values
    if dropped := sorted(before.keys() - values.keys()):
        said["drop"] = dropped
    return said


def patched(document: Document, said: Document) -> Document:
    """The document of the new spec, made of the old one's, which is used up."""
    for name, change in said.get("lists", {}).items():
        document[name][change["at"] : change["at"] + change["gone"]] = change["new"]
    document.update(said.get("set", {}))
    for name in said.get("drop", ()):
        del document[name]
    return document


def _alias(name: str) -> str:
    return GatewaySpec.model_fields[name].alias or name
