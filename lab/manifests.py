"""YAML text -> typed Kube-OVN objects, with every mistake and every unsimulated field named. Pure.

Documents are taken in order, as ``kubectl apply`` takes them: an object given again gains the fields of the later
document. Where two documents of one object contradict each other, a Vpc takes the later value (its routes grow with
the deployment), anything else is refused: two objects by one name are nearly always a slip of copy and paste.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from lab import kinds
from lab.kinds import KUBE_OVN_KINDS, SIMULATED, Kind, Part

K = TypeVar("K", bound=Kind)
_IGNORED_SECTIONS = frozenset({"apiVersion", "kind", "metadata", "spec", "data", "status"})
_DUAL_STACK_FIELDS = ("cidrBlock", "gateway", "excludeIps")
_SEVERAL_DOCUMENTS = frozenset({"Vpc"})


@dataclass
class Manifests:
    """What was read. ``problems`` are refusals; ``notes`` name what is legal and not simulated. One sentence each."""

    vpcs: dict[str, kinds.Vpc] = field(default_factory=dict)
    subnets: dict[str, kinds.Subnet] = field(default_factory=dict)
    gateways: dict[str, kinds.VpcNatGateway] = field(default_factory=dict)
    eips: dict[str, kinds.IptablesEIP] = field(default_factory=dict)
    fips: dict[str, kinds.IptablesFIPRule] = field(default_factory=dict)
    dnats: dict[str, kinds.IptablesDnatRule] = field(default_factory=dict)
    snats: dict[str, kinds.IptablesSnatRule] = field(default_factory=dict)
    nads: dict[str, kinds.NetworkAttachmentDefinition] = field(default_factory=dict)
    config_maps: dict[str, kinds.ConfigMap] = field(default_factory=dict)
    pods: dict[str, kinds.Pod] = field(default_factory=dict)
    egress_gateways: dict[str, kinds.VpcEgressGateway] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    broken: set[tuple[str, str]] = field(default_factory=set)
    """(kind, name) of objects that exist but could not be understood: naming them is no unknown reference."""

    @property
    def inward_rules(self) -> tuple[kinds.InwardRule, ...]:
        """The rules that lead to a tenant's address."""
        return (*self.fips.values(), *self.dnats.values())

    @property
    def rules(self) -> tuple[kinds.EipRule, ...]:
        return (*self.inward_rules, *self.snats.values())

    def shelf(self, kind: type[K]) -> dict[str, K]:
        """The dictionary that holds objects of this kind."""
        shelves: dict[type[Kind], Any] = {
            kinds.Vpc: self.vpcs, kinds.Subnet: self.subnets, kinds.VpcNatGateway: self.gateways,
            kinds.IptablesEIP: self.eips, kinds.IptablesFIPRule: self.fips, kinds.IptablesDnatRule: self.dnats,
            kinds.IptablesSnatRule: self.snats, kinds.NetworkAttachmentDefinition: self.nads,
            kinds.ConfigMap: self.config_maps, kinds.Pod: self.pods, kinds.VpcEgressGateway: self.egress_gateways,
        }  # fmt: skip
        found: dict[str, K] = shelves[kind]
        return found


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice in one mapping, which YAML libraries otherwise drop in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


@dataclass
class _Draft:
    """One object as its documents describe it so far, before typing."""

    kind: type[Kind]
    meta: dict[str, Any]
    body: dict[str, Any]

    @property
    def key(self) -> str:
        return f"{self.meta['namespace']}/{self.meta['name']}" if self.kind.namespaced else str(self.meta["name"])

    @property
    def title(self) -> str:
        return f"{self.kind.__name__} {self.key}"


def read(texts: Iterable[tuple[str, str]]) -> Manifests:
    """Read ``(source name, YAML text)`` pairs, in order. Never raises for bad input: see ``Manifests.problems``."""
    result = Manifests()
    drafts: dict[tuple[str, str], _Draft] = {}
    for source, text in texts:
        try:
            documents = list(yaml.load_all(text, _Loader))
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # of values and keys that cannot be
            result.problems.append(f"{source}: not YAML: {' '.join(str(error).split())}.")
            continue
        for where, document in _flatten(source, documents):
            draft = _draft(where, document, result)
            if draft is None:
                continue
            known = drafts.setdefault((draft.kind.__name__, draft.key), draft)
            if known is not draft:
                _apply(known, draft, result)
    for draft in drafts.values():
        _type(draft, result)
    return result


def _flatten(source: str, documents: list[Any]) -> Iterator[tuple[str, Any]]:
    for number, document in enumerate(documents, 1):
        where = f"{source}, document {number}"
        if document is None:
            continue
        if isinstance(document, dict) and document.get("kind") == "List":
            items = document.get("items") or []
            for position, item in enumerate(items if isinstance(items, list) else [items], 1):
                yield f"{where}, item {position}", item
        else:
            yield where, document


def _draft(where: str, document: Any, result: Manifests) -> _Draft | None:
    """The document's frame checked: kind, apiVersion, name. None when it is no object of the lab's."""
    if not isinstance(document, dict) or not isinstance(document.get("kind"), str):
        result.problems.append(f"{where}: not a Kubernetes object: it has no kind.")
        return None
    kind, version = document["kind"], document.get("apiVersion")
    metadata = document.get("metadata") if isinstance(document.get("metadata"), dict) else {}
    assert isinstance(metadata, dict)
    name, namespace = metadata.get("name"), metadata.get("namespace") or "default"
    model = SIMULATED.get(kind)
    if model is None:
        _foreign_kind(where, kind, str(version or ""), f"{kind} {name}" if name else kind, result)
        return None
    if version != model.api_version:
        said = "is missing" if version is None else f"is {version!r}"
        result.problems.append(f"{where}: apiVersion of {kind} {said}; it must be {model.api_version!r}.")
        return None
    if not isinstance(name, str) or not name:
        result.problems.append(f"{where}: {kind} without metadata.name.")
        return None
    title = f"{kind} {name}"
    if "status" in document:
        result.notes.append(f"{title}: its status is the cluster's to write and is ignored.")
    for key in document.keys() - _IGNORED_SECTIONS:
        result.problems.append(f"{title}: unknown section {key!r}{_meant(str(key), _IGNORED_SECTIONS)}")
    body = document.get("data" if model is kinds.ConfigMap else "spec")
    if body is not None and not isinstance(body, dict):
        result.problems.append(f"{title}: its spec is not a mapping.")
        return None
    annotations = metadata.get("annotations") or {}
    meta = {"name": name, "namespace": str(namespace) if model.namespaced else "", "annotations": annotations}
    return _Draft(model, meta, dict(body or {}))


def _foreign_kind(where: str, kind: str, version: str, title: str, result: Manifests) -> None:
    ours = KUBE_OVN_KINDS | SIMULATED.keys()
    if version.startswith("kubeovn.io/") and kind not in KUBE_OVN_KINDS:
        result.problems.append(f"{where}: kubeovn.io has no kind {kind!r}{_meant(kind, ours)}")
    else:
        result.notes.append(f"{title}: this kind is not simulated.")


def _apply(known: _Draft, later: _Draft, result: Manifests) -> None:
    if known.kind.__name__ not in _SEVERAL_DOCUMENTS:
        for key, value in later.body.items():
            if key in known.body and known.body[key] != value:
                result.problems.append(
                    f"{known.title} is given twice with different {key}: {known.body[key]!r} and {value!r}."
                )
    known.body.update(later.body)
    known.meta["annotations"] = {**known.meta["annotations"], **later.meta["annotations"]}


def _type(draft: _Draft, result: Manifests) -> None:
    """Check the draft's fields against its kind and shelve the typed object."""
    sieve = _Sieve(draft.title)
    if draft.kind is kinds.ConfigMap:
        body: dict[str, Any] = {"data": draft.body}
    elif draft.kind is kinds.Pod:  # its containers never run here, so nothing of its spec can matter
        body = {}
    else:
        body = sieve.keep(draft.kind, draft.body)
    result.problems.extend(sieve.problems)
    if sieve.unsimulated:
        result.notes.append(f"{draft.title}: not simulated: {', '.join(sieve.unsimulated)}.")
    if draft.kind is kinds.Subnet and any(":" in str(draft.body.get(key, "")) for key in _DUAL_STACK_FIELDS):
        result.notes.append(f"{draft.title}: IPv6 is not simulated; the IPv4 half is.")
    try:
        typed = draft.kind.model_validate({"meta": draft.meta, **body})
    except ValidationError as error:
        result.problems.extend(_sentences(draft, error, result.problems))
        result.broken.add((draft.kind.__name__, draft.key))
        return
    result.shelf(draft.kind)[draft.key] = typed


def _fields(model: type[Part]) -> dict[str, Any]:
    """Wire name -> annotation of the simulated fields."""
    return {info.alias or name: info.annotation for name, info in model.model_fields.items() if name != "meta"}


def _part_of(annotation: Any) -> type[Part] | None:
    """The nested model of a field such as ``tuple[StaticRoute, ...]``."""
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Part)), None)


@dataclass
class _Sieve:
    """Parts a body's fields into simulated ones (kept), the cluster's business and unknown ones (both named)."""

    title: str
    unsimulated: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def keep(self, model: type[Part], body: dict[str, Any], path: str = "") -> dict[str, Any]:
        fields = _fields(model)
        kept: dict[str, Any] = {}
        for key, value in body.items():
            if key in fields:
                part = _part_of(fields[key])
                if part is not None and isinstance(value, dict):
                    kept[key] = self.keep(part, value, f"{path}{key}.")
                elif part is not None and isinstance(value, list):
                    kept[key] = [self._item(part, item, f"{path}{key}[{i}].") for i, item in enumerate(value)]
                elif value is not None:
                    kept[key] = value
            elif key in model.cluster_fields:
                self.unsimulated.append(f"{path}{key}")
            else:
                known = fields.keys() | model.cluster_fields
                self.problems.append(f"{self.title}: unknown field {path}{key}{_meant(str(key), known)}")
        return kept

    def _item(self, part: type[Part], item: Any, path: str) -> Any:
        return self.keep(part, item, path) if isinstance(item, dict) else item


def _meant(word: str, known: Iterable[str]) -> str:
    """How a sentence about an unknown word ends: with the known word that comes near it, if one does."""
    lower = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), lower, n=1)
    return f"; did you mean {lower[close[0]]}?" if close else "."


def _sentences(draft: _Draft, error: ValidationError, already: list[str]) -> Iterator[str]:
    for item in error.errors(include_url=False):
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"]).lstrip(".")
        if item["type"] == "missing":
            hint = f"did you mean {item['loc'][-1]}?"
            if not any(line.startswith(draft.title) and line.endswith(hint) for line in already):
                yield f"{draft.title}: {path} is missing."
            continue
        message = item["msg"].removeprefix("Value error, ")
        yield f"{draft.title}: {path}: {message[0].lower() + message[1:] if message[:5] == 'Input' else message}."
