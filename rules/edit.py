"""Editing: (GatewaySpec, Command) -> GatewaySpec, or Conflict. Adding twice changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rules import commands as c
from rules.keyed import Draft, Keyed
from rules.qos_commands import QosCommand, edit_qos
from rules.spec import Dnat, Eip, Fip, GatewaySpec, Part, Route, SharedDnat, Snat


class Conflict(Exception):
    """A command contradicts an object that stands; both are named in the message."""

    def __init__(self, wanted: Part, standing: Part) -> None:
        super().__init__(f"{wanted} conflicts with {standing}")
        self.wanted = wanted
        self.standing = standing


class NotInitialized(Exception):
    """The gateway has not been initialised: only ``init`` (or a whole state) may come first."""

    def __init__(self) -> None:
        super().__init__("nat gateway not initialized")


def edit(spec: GatewaySpec | None, command: c.Command) -> GatewaySpec:
    """The spec after one command; ``spec`` is None before the first ``init``.

    Raises Conflict where an add contradicts what stands, and NotInitialized where ``init`` is missing.
    Deleting what is not there is a success and changes nothing.
    """
    if isinstance(command, c.Init):
        return _init(spec or GatewaySpec(), command)
    if isinstance(command, QosCommand):
        # Limits need none of our chains, and Kube-OVN's script takes them before init, too.
        return edit_qos(spec or GatewaySpec(initialized=False), command)
    if spec is None or not spec.initialized:
        raise NotInitialized
    return _change(spec, command)


def edit_all(spec: GatewaySpec | None, commands: Iterable[c.Command]) -> GatewaySpec | None:
    """All commands in order, or the first one's error.

    The collections are copied once, not for each command: 5,000 on 50,000 objects take 0.1 s instead of 7.
    """
    listed = list(commands)
    if len(listed) == 1:  # which has its collection remember what it changed, without a look
        return edit(spec, listed[0])
    draft = spec and _drafted(spec)
    for command in listed:
        draft = edit(draft, command) if draft else _drafted(edit(None, command))
    done = {name: value.done() for name, value in draft or () if isinstance(value, Draft)}
    return draft and _with(draft, **done)


def _drafted(spec: GatewaySpec) -> GatewaySpec:
    return _with(spec, **{name: Draft(value) for name, value in spec if isinstance(value, Keyed)})


def _init(spec: GatewaySpec, command: c.Init) -> GatewaySpec:
    return _with(spec, initialized=True, interfaces=command.interfaces or spec.interfaces)


def _change(spec: GatewaySpec, command: c.Command) -> GatewaySpec:  # noqa: PLR0911, PLR0912 -- one line a command
    match command:
        case c.SetGateways():
            named = {name: value for name, value in command if name != "op" and value is not None}
            return _with(spec, **named)
        case c.EipAdd():
            return _with(spec, eips=spec.eips.put(Eip(address=command.address)))
        case c.EipDel():
            return _with(spec, eips=spec.eips.drop(command.address.partition("/")[0]))
        case c.FipAdd():
            return _add_fip(spec, Fip(eip=command.eip, internal_ip=command.internal_ip))
        case c.FipDel():
            return _with(spec, fips=spec.fips.drop(command.eip))
        case c.DnatAdd():
            return _add_dnat(spec, Dnat.model_validate(command.model_dump(exclude={"op"})))
        case c.DnatDel():
            return _with(spec, dnats=spec.dnats.drop((command.eip, command.external_port, command.protocol)))
        case c.SnatAdd():
            return _add_snat(spec, Snat.model_validate(command.model_dump(exclude={"op"})))
        case c.SnatDel():
            return _with(spec, snats=spec.snats.drop((command.eip, command.internal_cidr)))
        case c.RouteAdd():
            return _with(spec, routes=spec.routes.put(Route(cidr=command.cidr, next_hop_ip=command.next_hop_ip)))
        case c.RouteDel():
            return _with(spec, routes=spec.routes.drop(command.cidr))
        case c.SharedDnatAdd():
            return _put_shared(spec, command)
        case c.SharedDnatDel():
            key = (command.eip, command.external_port, command.protocol)
            return _with(spec, shared_dnats=spec.shared_dnats.drop(key))
    raise TypeError(f"unknown command {command!r}")


def _with(spec: GatewaySpec, **fields: object) -> GatewaySpec:
    return spec.model_copy(update=fields)


def _add_fip(spec: GatewaySpec, fip: Fip) -> GatewaySpec:
    standing = spec.fips.get(fip.key)
    if standing and standing != fip:
        raise Conflict(fip, standing)
    return _with(spec, fips=spec.fips.put(fip))


def _add_dnat(spec: GatewaySpec, dnat: Dnat) -> GatewaySpec:
    standing = spec.dnats.get(dnat.key)
    if standing and standing != dnat:
        raise Conflict(dnat, standing)
    return checked(_with(spec, dnats=spec.dnats.put(dnat)), dnat)


def _put_shared(spec: GatewaySpec, command: c.SharedDnatAdd) -> GatewaySpec:
    named = {name: value for name, value in command if name != "op" and value is not None}
    standing = spec.shared_dnats.get((command.eip, command.external_port, command.protocol))
    shared = SharedDnat.model_validate({**dict(standing or ()), **named})
    return checked(_with(spec, shared_dnats=spec.shared_dnats.put(shared)), shared)


def checked(spec: GatewaySpec, wanted: Part) -> GatewaySpec:
    """The spec; raises Conflict where ``wanted``, which was put into it, contradicts an object of another kind."""
    if isinstance(wanted, Dnat | SharedDnat):
        others: Keyed[Any] = spec.dnats if isinstance(wanted, SharedDnat) else spec.shared_dnats
        if standing := others.get(wanted.key):
            raise Conflict(wanted, standing)
    return spec


def _add_snat(spec: GatewaySpec, snat: Snat) -> GatewaySpec:
    # The controller decides --random-fully anew before every call; a differing flag is no conflict and no change.
    return spec if snat.key in spec.snats else _with(spec, snats=spec.snats.put(snat))
