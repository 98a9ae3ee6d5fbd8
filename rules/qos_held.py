"""Bandwidth limits, one change after another: what it takes is proportional to what changes, not to what there is.

Once the kernel was found to hold all that a spec's limits want (``rules.qos``), that is known of these very limits and
these very objects. Of other limits only those are spoken of that came or went, laid out around all the others, and the
objects are known to be as wanted again if what became others is what was spoken of. Anything else (objects that
others changed, a first limit, a last one, filters that Kube-OVN's script left) is looked at as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rules.entries import Entries
from rules.keyed import Keyed
from rules.qos import device_of, everything, placed, points, replaced
from rules.qos_tree import Layout, Tree, Unshapeable
from rules.spec import GatewaySpec, Interfaces, Limit
from rules.tc import Key, Matchall, Objects, Policer, PolicerKey, Statements, Value, hold

_Difference = tuple[Key, Value | None, Value | None]


@dataclass
class _Held:
    """Limits that the objects in the kernel keep: there was nothing to do for them. Made for one change after another.

    ``pending`` is what was last asked for, and said about it.
    """

    limits: Keyed[Limit]
    interfaces: Interfaces
    have: Entries[Key, Value]
    trees: dict[str, Layout]
    policers: dict[PolicerKey, Policer]
    pending: tuple[Keyed[Limit], Statements] | None = None

    @classmethod
    def by(cls, limits: Keyed[Limit], interfaces: Interfaces, have: Entries[Key, Value]) -> _Held | None:
        """None where a filter is of a type that is not ours: what becomes of it depends on all the others."""
        if any(isinstance(value, Matchall) for value in have.values()):
            return None
        devices = {device_of(*point) for point in points(limits, interfaces)}
        policers = {k: v for k, v in have.items() if isinstance(k, PolicerKey) and isinstance(v, Policer)}
        return cls(limits, interfaces, have, {device: Layout(device, have) for device in devices}, policers)

    def statements(self, limits: Keyed[Limit], have: Entries[Key, Value]) -> Statements | None:
        """What is to be said of these limits in place of those, or None if all is to be looked at."""
        changed = tuple(self.have.differences(have))
        if changed and not self._has_become(limits, have, changed):
            return None
        self.have = have
        if limits is self.limits:
            return {}
        if self.pending is None or self.pending[0] is not limits:
            said = self._changes(limits)
            if said is None:
                return None
            if hold(said, have):  # no more than another spelling
                self.limits, self.pending = limits, None
                return {}
            self.pending = limits, said
        return self.pending[1]

    def _has_become(self, limits: Keyed[Limit], have: Entries[Key, Value], changed: Sequence[_Difference]) -> bool:
        """Whether the kernel has done what was said, and nothing else; then that is what is held now."""
        if self.pending is None or self.pending[0] is not limits:
            return False
        said = self.pending[1]
        if any(key not in said for key, _, _ in changed) or not hold(said, have):
            return False
        for device, tree in self.trees.items():
            tree.follow(one for one in changed if one[0].device == device)
        for key, _, _ in changed:
            if isinstance(key, PolicerKey):
                self.policers.pop(key, None)
        self.limits, self.pending = limits, None
        return True

    def _changes(self, limits: Keyed[Limit]) -> Statements | None:
        gone, came = (placed(some, self.interfaces) for some in limits.changes(self.limits))
        left = points(limits, self.interfaces)
        said: dict[Key, Value | None] = {}
        for point in gone | came:
            device = device_of(*point)
            tree = self.trees.get(device)
            if tree is None or point not in left:  # a whole tree comes or goes
                return None
            said |= Tree(tree, point[1]).changes(gone.get(point, ()), came.get(point, ()))
        return said | dict.fromkeys(replaced(came, self.policers))


class Said:
    """What tc shall look like, said anew only of what changed, as long as the objects are what was wanted before."""

    def __init__(self) -> None:
        self._held: list[_Held] = []  # one, or none while a call works with it: threads may call

    def __call__(self, limits: Keyed[Limit], interfaces: Interfaces, have: Objects) -> Statements:
        if not isinstance(have, Entries):
            return everything(limits, interfaces, have)
        held = self._taken()
        if held is not None and held.interfaces == interfaces:
            try:
                said = held.statements(limits, have)
            except Unshapeable:
                self._held[:] = [held]  # which none of it has changed
                raise
            if said is not None:
                self._held[:] = [held]
                return said
        whole = everything(limits, interfaces, have)
        if hold(whole, have) and (held := _Held.by(limits, interfaces, have)) is not None:
            self._held[:] = [held]
        return whole

    def _taken(self) -> _Held | None:
        try:
            return self._held.pop()
        except IndexError:
            return None


_said = Said()


def statements(spec: GatewaySpec, have: Objects) -> Statements:
    """What tc shall look like, given what there is of ours; nothing is said of what is known to be so.

    Raises Unshapeable.
    """
    return _said(spec.qos, spec.interfaces, have)
