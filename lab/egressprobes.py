"""What is tried of an egress gateway, and what must be seen. Pure.

A router that spreads connections over replicas sends any one of them by any replica: so several are made, and what
they show together is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Address
from typing import Any, Literal

from lab.egressplan import EgressPlan, Replica
from lab.probes import Result
from lab.routing import Frozen
from lab.world import ECHO_PORT, Host, World

_CONNECTIONS = 16  # for each replica: that one of two is never met happens once in 2 billion times
_WAIT = 5.0
_SILENCE = 1.0

How = Literal["tcp", "udp", "ping", "hop"]


class Trial(Frozen):
    """Some attempts of one kind. ``expected`` are the addresses that may be seen, and (``every``) all of them must."""

    what: str
    how: How
    source: str
    netns: str
    to: IPv4Address
    times: int
    expected: tuple[IPv4Address, ...]
    every: bool

    def tasks(self) -> list[dict[str, Any]]:
        """The attempts, for ``lab.peer``."""
        wait = _WAIT if self.expected else _SILENCE
        return [{"how": self.how, "to": str(self.to), "port": ECHO_PORT, "wait": wait}] * self.times


def trials(world: World, plan: EgressPlan, alive: Sequence[Replica], when: str = "") -> Iterator[Trial]:
    """From a tenant of each source: who the internet sees, whether it answers, and who is the second hop."""
    router = world.vpc(plan.vpc).router
    for source in plan.sources:
        tenants = (host for host in world.hosts if host.vpc == plan.vpc and host.ip in source.cidr)
        for host in list(tenants)[:1]:
            out = router.hop(host.ip, world.internet.ip).next_hops == plan.internal_addresses
            yield from _from(world, plan, host, alive if out else (), when)


def _from(world: World, plan: EgressPlan, host: Host, alive: Sequence[Replica], when: str) -> Iterator[Trial]:
    kept = plan.keeps(host.ip)
    outside = tuple(replica.external.ip for replica in alive)
    shown = (host.ip,) if kept and alive else outside
    label = f"{plan.name}: {'no SNAT' if kept else 'SNAT'}" + (f", {when}" if when else "")
    base = Trial(
        what=label, how="tcp", source=host.label, netns=host.netns, to=world.internet.ip,
        times=_CONNECTIONS * max(len(alive), 1), expected=shown, every=True,
    )  # fmt: skip
    yield base
    yield base.model_copy(update={"how": "udp"})
    yield base.model_copy(update={"how": "ping", "times": 1, "expected": (world.internet.ip,) if alive else ()})
    hops = tuple(replica.internal.ip for replica in alive)
    what = f"{plan.name}: second hop" + (f", {when}" if when else "")
    yield base.model_copy(update={"what": what, "how": "hop", "times": 3, "expected": hops, "every": False})


def judge(trial: Trial, replies: Sequence[Mapping[str, str]]) -> Result:
    """Compare what the tenant's attempts showed with what must be seen."""
    key = "peer" if trial.how in ("tcp", "udp") else "host"
    seen = {reply.get(key) or reply.get("error", "") for reply in replies}
    wanted = {str(address) for address in trial.expected}
    if not wanted:
        ok = all("error" in reply for reply in replies)
    else:
        ok = seen == wanted if trial.every else bool(seen) and seen <= wanted
    joined = ", " if trial.every else " or "
    verb = {"tcp": "sees ", "udp": "sees ", "ping": "answer of ", "hop": "time exceeded from "}[trial.how]
    target = f"{trial.how} {trial.to}" + (f" ({trial.times} times)" if trial.times > 1 else "")
    return Result(
        what=trial.what, source=trial.source, target=target,
        expected=verb + joined.join(sorted(wanted)) if wanted else "no answer",
        seen=verb + ", ".join(sorted(seen)) if any(key in reply for reply in replies) else ", ".join(sorted(seen)),
        ok=ok,
    )  # fmt: skip
