"""The daemon's writer with its real drivers, in this process: so that a test can stand between any two of its steps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from netns import Namespace, veth

from api.main import real_kernel
from api.settings import Settings
from gateway import transaction
from gateway.kernel.evidence import Events
from gateway.ports import Joint, Variant
from gateway.transaction import Kernel
from gateway.watch import Watch
from rules.maps import MapEdit
from rules.ruleset import ChainEdit, Ruleset
from rules.state import Actual
from rules.tc import Link, TableKey

Fault = Callable[[str], None]


class Tripwire:
    """Calls ``fault``, if there is one, before each step that goes to the kernel; it may raise."""

    def __init__(self) -> None:
        self.fault: Fault | None = None
        self.steps = 0

    def __call__(self, step: object) -> None:
        self.steps += 1
        if self.fault is not None:
            self.fault(str(step))


@dataclass(frozen=True)
class _Firewall:
    port: Any
    wire: Tripwire

    @property
    def variant(self) -> Variant:
        variant: Variant = self.port.variant
        return variant

    def read(self, tables: Collection[str]) -> Ruleset:
        chains: Ruleset = self.port.read(tables)
        return chains

    def edit(self, table: str, edits: Sequence[ChainEdit]) -> None:
        self.wire(f"edit table {table}")
        self.port.edit(table, edits)


@dataclass(frozen=True)
class _Joint:
    port: Joint
    wire: Tripwire

    def commit(self, table: str, chains: Sequence[ChainEdit], maps: Sequence[MapEdit]) -> bool:
        self.wire(f"edit table {table} and maps")
        return self.port.commit(table, chains, maps)


@dataclass(frozen=True)
class _Committed:
    """A port whose commits are one transaction of the kernel, or (``single``) one each step."""

    port: Any
    wire: Tripwire
    single: bool = False

    def read(self) -> Any:
        return self.port.read()

    def commit(self, steps: Sequence[Any]) -> None:
        for part in ([step] for step in steps) if self.single else [list(steps)]:
            self.wire(part)
            self.port.commit(part)


@dataclass(frozen=True)
class _Maps(_Committed):
    def share(self, wanted: Any) -> None:
        self.port.share(wanted)


@dataclass
class Rig:
    """A namespace with eth0 and net1, and the real kernel's ports in it with a tripwire before each step."""

    netns: Namespace
    kernel: Kernel
    watch: Watch
    wire: Tripwire

    def read(self) -> Actual:
        """Everything anew."""
        return transaction.read(self.kernel, anew=True)

    def state(self) -> tuple[object, ...]:
        """What a transaction may change. Empty hash tables of the shaper, and links to them, are furniture."""
        now = self.read()
        tc = {k: v for k, v in now.tc.items() if not isinstance(k, TableKey) and not isinstance(v, Link)}
        return (
            dict(now.ruleset.chains),
            dict(now.addresses),
            dict(now.routes),
            {name: (link.up, link.arp, link.promote_secondaries) for name, link in now.links.items()},
            now.nft,
            now.maps,
            now.policy_rules,
            tc,
        )

    def plug(self) -> None:
        """Make both interfaces as a CNI leaves them."""
        for name, address in (("eth0", "10.0.1.254/24"), ("net1", "192.168.0.11/24")):
            veth(self.netns, name, self.netns, f"p-{name}")
            self.netns.run("ip", "addr", "add", address, "dev", name)


@contextmanager
def rig(netns: Namespace, variant: str) -> Iterator[Rig]:
    """A rig in the namespace, which the calling thread is inside of meanwhile."""
    with netns.entered():
        events = Events()
        plain, watch = real_kernel(Settings.from_environment({"NATGW_IPTABLES": variant}), events)
        wire = Tripwire()
        kernel = replace(
            plain,
            firewall=_Firewall(plain.firewall, wire),
            links=_Committed(plain.links, wire, single=True),
            nft=_Committed(plain.nft, wire),
            shaper=_Committed(plain.shaper, wire, single=True),
            maps=_Maps(plain.maps, wire),
            joint=_Joint(plain.joint, wire) if plain.joint else None,
        )
        made = Rig(netns, kernel, watch, wire)
        made.plug()
        try:
            yield made
        finally:
            events.close()
