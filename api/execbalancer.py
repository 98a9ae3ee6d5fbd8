"""The verbs of lb-svc.sh, in a pod that Kube-OVN runs for a Service of type LoadBalancer.

The controller sends ``init``, ``eip-add`` and a ``dnat-add`` for each port of the Service, again with every update of
the pod, while traffic runs; ``dnat-del`` comes for a port that went, or got another target. In no release does it
forgive a byte on stderr. Repeating any of it changes nothing: ARP stays on, only the address is announced once more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import Future
from ipaddress import IPv4Address
from typing import Any, Protocol

from pydantic import ValidationError

from api.execwire import BadRequest, Reply, failure, success
from gateway.journal import Asker
from gateway.ports import Refused
from rules.appliance import OtherAppliance
from rules.loadbalancer import BalancerCommand, BalancerDnat, BalancerDnatDel, BalancerEip, LoadBalancerSpec, edit
from rules.spec import GatewaySpec

FACE = "lb-svc"
"""The first word of lb-svc.sh's calls."""

USAGE = """Usage: lb-svc.sh COMMAND [RULE ...]
  init                                                         make the pod ready; first of all
  eip-add IP/LENGTH,GATEWAY                                    put the Service's address up and announce it
  dnat-add EIP,PORT,PROTOCOL,CLUSTER_IP,TARGET_PORT,GATEWAY    lead a port to the cluster IP, by the pod's gateway
  dnat-del EIP,PORT,PROTOCOL,CLUSTER_IP,TARGET_PORT            forget a port
"""

Asking = Callable[[str, IPv4Address, IPv4Address], Awaitable[bytes | None]]
"""Asks by ARP, on an interface and as an address of ours, who holds another address (``gateway.arp.ask.ask``)."""

_FIELDS: dict[str, tuple[type[BalancerCommand], tuple[str, ...]]] = {
    "eip-add": (BalancerEip, ("address", "gateway")),
    "dnat-add": (BalancerDnat, ("eip", "port", "protocol", "clusterIP", "targetPort", "gateway")),
    "dnat-del": (BalancerDnatDel, ("eip", "port", "protocol", "clusterIP", "targetPort")),
}


class Service(Protocol):
    """What this face asks of ``gateway.service.Service``."""

    @property
    def spec(self) -> GatewaySpec | None: ...

    @property
    def load_balancer(self) -> LoadBalancerSpec | None: ...

    def balance(
        self,
        edit: Callable[[LoadBalancerSpec | None], LoadBalancerSpec],
        *,
        by: Asker | str,
        announce: Collection[str] = (),
    ) -> Future[Any]: ...


def parse(words: Sequence[str]) -> list[BalancerCommand]:
    """What the words of one call ask for; ``init`` alone is the empty list. Raises BadRequest."""
    verb, rules = words[0], words[1:]
    if verb == "init":
        if rules:
            raise BadRequest(f"{rules[0]}: nothing may follow")
        return []
    return [command for word in rules for command in _command(verb, word)]


def _command(verb: str, word: str) -> list[BalancerCommand]:
    kind, names = _FIELDS[verb]
    values = word.split(",")
    if verb == "dnat-del":
        if not all(values[:3]):  # where the controller's status was never filled
            return []
        values = values[: len(names)]
    if len(values) != len(names):
        lacks = f"{names[len(values)]} is missing" if len(values) < len(names) else f"more than {len(names)} fields"
        raise BadRequest(f"{word}: {lacks}")
    named = dict(zip(names, values, strict=True))
    for name in ("port", "targetPort"):
        if name in named and not (named[name].isascii() and named[name].isdigit()):
            raise BadRequest(f"{word}: {name}: {named[name]!r} is not a port number")
    if "eip" in named:
        named["eip"] = named["eip"].partition("/")[0]
    try:
        return [kind.model_validate(named)]
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)[0]
        raise BadRequest(f"{word}: {wrong['loc'][0]}: {wrong['msg'].removeprefix('Value error, ')}") from None


class Balancer:
    """Carries the calls of lb-svc.sh out."""

    def __init__(self, service: Service, asking: Asking) -> None:
        self._service = service
        self._asking = asking

    async def answer(self, words: Sequence[str], by: Asker | None = None) -> Reply:
        """The reply to one call; ``words`` begin with the verb, ``by`` is who asks, for the journal."""
        verb = words[0] if words else ""
        if verb != "init" and verb not in _FIELDS:
            return Reply(code=0 if verb in ("help", "--help", "-h") else 1, stdout=USAGE)
        try:
            commands = parse(words)
        except BadRequest as error:
            return failure(f"{verb} {error}")
        if verb == "dnat-del" and self._service.load_balancer is None and self._service.spec is None:
            return success()  # nothing is there yet
        announced = [command.ip for command in commands if isinstance(command, BalancerEip)]
        asker = by or Asker(" ".join((FACE, *words)))
        try:
            changed = self._service.balance(lambda spec: edit(spec, commands), by=asker, announce=announced)
            done = await asyncio.wrap_future(changed)
        except (OtherAppliance, Refused) as error:
            return failure(str(error))
        return await self._ask_gateway(done.spec) if announced else success()

    async def _ask_gateway(self, spec: LoadBalancerSpec) -> Reply:
        """See whether the gateway is there; a silent one is told of, and no failure: it may come later."""
        if spec.eip is None:
            return success()
        ours, gateway = IPv4Address(spec.eip.ip), IPv4Address(spec.eip.gateway)
        if await self._asking(spec.interfaces.external, ours, gateway) is not None:
            return success()
        return success(f"{ours} is up, but its gateway {gateway} does not answer ARP on {spec.interfaces.external}\n")
