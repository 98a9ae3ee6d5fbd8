"""What one change did, in words and as data: the objects that came, went or became others. Pure.

For the journal, its log line and the HTTP face. Only objects between the first and the last difference are looked at
(``Keyed.changes``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal

from pydantic import BaseModel

from rules.appliance import Spec
from rules.keyed import Keyed
from rules.ruleset import ChainEdit, DeleteChain, DeleteRule, InsertRule, NewChain, ReplaceRules
from rules.spec import Part
from rules.state import (
    AddAddress,
    AddDevice,
    AddPolicyRule,
    DeleteAddress,
    DeleteDevice,
    DeletePolicyRule,
    DeleteRoute,
    EditMaps,
    EditNft,
    EditTable,
    Plan,
    ReplaceRoute,
    SetArp,
    SetMaster,
    SetPromoteSecondaries,
    SetSysctl,
    SetUp,
    Step,
)
from rules.tc import SetTc

Sign = Literal["added", "removed", "changed"]
SIGNS: dict[Sign, str] = {"added": "+", "removed": "-", "changed": "~"}
_EDITS: dict[type[ChainEdit], tuple[str, str]] = {
    NewChain: ("+", "chain"),
    DeleteChain: ("-", "chain"),
    InsertRule: ("+", "rule in"),
    DeleteRule: ("-", "rule in"),
    ReplaceRules: ("~", "chain"),
}
FEW = 4
"""So many objects are named in a sentence; of more it tells the number of each kind."""


class Change(Part):
    """One object that came, went, or became another (``before``). ``field`` is the spec's, as it is on the wire."""

    change: Sign
    field: str
    text: str
    value: Any = None
    before: Any = None

    def __str__(self) -> str:
        return f"{SIGNS[self.change]} {self.text}"


def changes(old: Spec | None, new: Spec) -> Iterator[Change]:
    """What ``new`` has that ``old`` (None: nothing) has not, field by field, and the other way round."""
    return (told() for told in _changes(old, new))


def first(most: int, old: Spec | None, new: Spec) -> tuple[tuple[Change, ...], int]:
    """The first so many of the changes, and how many more there are."""
    rest = _changes(old, new)
    listed = tuple(told() for told in islice(rest, most))
    return listed, sum(1 for _ in rest)


def _changes(old: Spec | None, new: Spec) -> Iterator[Callable[[], Change]]:
    before = old if type(old) is type(new) else None
    for name, info in type(new).model_fields.items():
        was, now = getattr(before, name, None), getattr(new, name)
        if was is now:
            continue
        wire = info.serialization_alias or info.alias or name
        if isinstance(now, Keyed):
            gone, came = now.changes(was if isinstance(was, Keyed) else Keyed())
            yield from _listed(wire, gone, came)
        elif was != now and not (before is None and now == info.default):
            yield partial(_plain, wire, was, now)


def _plain(field: str, was: Any, now: Any) -> Change:
    if now is None:
        return Change(change="removed", field=field, text=f"{field} {_text(was)}", before=_data(was))
    if was is None:
        return Change(change="added", field=field, text=f"{field} {_text(now)}", value=_data(now))
    text = f"{field} {_text(now)} (was {_text(was)})"
    return Change(change="changed", field=field, text=text, value=_data(now), before=_data(was))


def _text(value: Any) -> str:
    if isinstance(value, BaseModel) and type(value).__str__ is BaseModel.__str__:
        return ", ".join(f"{name} {part}" for name, part in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _data(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _listed(field: str, was: Sequence[Any], now: Sequence[Any]) -> Iterator[Callable[[], Change]]:
    standing, wanted = {item.key: item for item in was}, {item.key: item for item in now}
    for key, item in wanted.items():
        before = standing.get(key)
        if before is None:
            yield partial(_came, field, item)
        elif before != item:
            yield partial(_became, field, before, item)
    yield from (partial(_went, field, item) for key, item in standing.items() if key not in wanted)


def _came(field: str, item: Any) -> Change:
    return Change(change="added", field=field, text=str(item), value=_data(item))


def _became(field: str, before: Any, item: Any) -> Change:
    text = f"{item} (was {before})" if str(item) != str(before) else str(item)
    return Change(change="changed", field=field, text=text, value=_data(item), before=_data(before))


def _went(field: str, item: Any) -> Change:
    return Change(change="removed", field=field, text=str(item), before=_data(item))


def summary(listed: Sequence[Change], more: int = 0) -> str:
    """The changes as one sentence; of many, the number of each kind (``more`` are not in the list)."""
    if len(listed) + more <= FEW:
        return "; ".join(map(str, listed))
    counted = Counter((change.change, change.field) for change in listed)
    said = ", ".join(f"{SIGNS[change]}{count:,} {field}" for (change, field), count in counted.items())
    return f"{said} and {more:,} more changes" if more else said


def touched(plan: Plan) -> str:
    """What a plan writes, where no object of the spec changed: for repairs. One short sentence."""
    listed = [words for step in plan.steps for words in _touched(step)]
    first = "; ".join(islice(listed, FEW))
    return f"{first}; {len(listed) - FEW:,} more" if len(listed) > FEW else first


def _touched(step: Step) -> Iterable[str]:  # noqa: PLR0911, PLR0912 -- one line a step
    match step:
        case EditTable(table, edits):
            return [_edited(table, edit) for edit in edits]
        case EditNft(commands):
            return [f"{len(commands)} edits of table ip kube-ovn"]
        case EditMaps(map_edits):
            return [f"{len(map_edits)} edits of table ip natgw"]
        case AddAddress(key):
            return [f"+ address {key.address} on {key.interface}"]
        case DeleteAddress(key):
            return [f"- address {key.address} on {key.interface}"]
        case ReplaceRoute(key, entry):
            return [f"+ route {key.prefix}{f' via {entry.via}' if entry.via else ''} by {entry.interface}"]
        case DeleteRoute(key, entry):
            return [f"- route {key.prefix} by {entry.interface}"]
        case SetArp(interface, on):
            return [f"~ ARP {_on(on)} on {interface}"]
        case SetPromoteSecondaries(interface, on):
            return [f"~ promote_secondaries {_on(on)} on {interface}"]
        case SetUp(interface, on):
            return [f"~ {interface} {'up' if on else 'down'}"]
        case AddPolicyRule(rule) | DeletePolicyRule(rule):
            return [f"{'+' if isinstance(step, AddPolicyRule) else '-'} routing rule for table {rule.table}"]
        case SetSysctl(name, value):
            return [f"~ {name} = {value}"]
        case AddDevice(interface) | DeleteDevice(interface):
            return [f"{'+' if isinstance(step, AddDevice) else '-'} interface {interface}"]
        case SetMaster(interface, master):
            return [f"~ {interface} {f'a port of {master}' if master else 'a port of none'}"]
    return [f"{'+' if isinstance(step, SetTc) else '-'} limit on {step.key.device}"]


def _edited(table: str, edit: ChainEdit) -> str:
    sign, what = _EDITS[type(edit)]
    return f"{sign} {what} {table} {edit.ref.chain}"


def _on(value: bool) -> str:
    return "on" if value else "off"
