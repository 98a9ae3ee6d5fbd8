# No postponed annotations here: the handlers below are made for one model each, and FastAPI reads their signatures.
"""GET, PUT and DELETE on each kind of object, told apart by its identity in the path."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from ipaddress import IPv4Address, IPv4Network, ip_address, ip_network
from operator import or_
from typing import Annotated, Any, Literal

from fastapi import Body, Depends, FastAPI, Path, Request, Response
from pydantic import AfterValidator
from starlette.exceptions import HTTPException

from api.http_gateway import Committer
from api.http_models import NOT_THERE, WRITE_PROBLEMS, Result
from api.http_problems import bad_field
from gateway.service import Edit, Service
from rules.edit import NotInitialized, checked
from rules.fields import Direction, InterfaceName, IPv4, Port, Protocol
from rules.keyed import Keyed
from rules.spec import Dnat, Eip, EipLimit, Fip, GatewaySpec, InterfaceLimit, Part, Route, SharedDnat, Snat

Key = Any


def _network_address4(text: str) -> str:
    return str(IPv4Address(text))


def _network_address(text: str) -> str:
    return str(ip_address(text))


# The address part of a prefix, which may be 0.0.0.0 where a host's may not.
Network4 = Annotated[str, AfterValidator(_network_address4)]
Network = Annotated[str, AfterValidator(_network_address)]


def _eip(ip: Annotated[IPv4, Path(examples=["192.168.0.10"])]) -> Key:
    return ip


def _fip(eip: IPv4) -> Key:
    return eip


def _dnat(eip: IPv4, port: Port, protocol: Protocol) -> Key:
    return (eip, port, protocol)


def _snat(eip: IPv4, addr: Network4, length: Annotated[int, Path(alias="len", ge=0, le=32)]) -> Key:
    return (eip, str(IPv4Network(f"{addr}/{length}", strict=False)))


def _route(addr: Network, length: Annotated[int, Path(alias="len", ge=0, le=128)]) -> Key:
    try:
        return str(ip_network(f"{addr}/{length}", strict=False))
    except ValueError as error:
        raise bad_field("path", "len", f"{length} is too long for {addr}") from error


def _eip_limit(eip: IPv4, direction: Direction) -> Key:
    return (eip, direction)


Priority = Annotated[int, Path(ge=1, le=65534)]


def _interface_limit(interface: InterfaceName, direction: Direction, priority: Priority) -> Key:
    return (interface, direction, priority, "", "")


def _prefix_limit(
    limit: Annotated[Key, Depends(_interface_limit)],
    side: Literal["src", "dst"],
    addr: Network4,
    length: Annotated[int, Path(alias="len", ge=0, le=32)],
) -> Key:
    return (*limit[:3], "ip", f"{side} {IPv4Network(f'{addr}/{length}', strict=False)}")


@dataclass(frozen=True)
class Kind:
    """One kind of object: its collection in the spec, its path, and the fields of the body that the path repeats."""

    name: str
    title: str
    path: str
    model: type[Part]
    key: Callable[..., Key]
    identity: tuple[str, ...]

    @property
    def segment(self) -> str:
        """The collection's name in paths."""
        return self.name.replace("_", "-")

    def of(self, spec: GatewaySpec) -> Keyed[Any]:
        """The spec's objects of this kind."""
        collection: Keyed[Any] = getattr(spec, self.name)
        return collection

    def check(self, key: Key, item: Any) -> None:
        """Path and body must speak of one object; raises a validation error naming the field that differs."""
        pairs = zip(self.identity, _parts(key), _parts(item.key), strict=True)
        for field, in_path, in_body in pairs:
            if in_path != in_body:
                raise bad_field("body", field, f"{in_body} is not the {in_path} of the path")


def _parts(key: Key) -> tuple[object, ...]:
    return key if isinstance(key, tuple) else (key,)


INTERFACE_LIMIT = ("interface", "direction", "priority", "matchType", "matchValue")
KINDS = (
    Kind("eips", "EIP", "/{ip}", Eip, _eip, ("address",)),
    Kind("fips", "floating IP", "/{eip}", Fip, _fip, ("eip",)),
    Kind("dnats", "DNAT", "/{eip}/{port}/{protocol}", Dnat, _dnat, ("eip", "externalPort", "protocol")),
    Kind("snats", "SNAT", "/{eip}/{addr}/{len}", Snat, _snat, ("eip", "internalCIDR")),
    Kind("routes", "route", "/{addr}/{len}", Route, _route, ("cidr",)),
    Kind(
        "shared_dnats",
        "shared DNAT",
        "/{eip}/{port}/{protocol}",
        SharedDnat,
        _dnat,
        ("eip", "externalPort", "protocol"),
    ),
    Kind("qos", "EIP's limit", "/eips/{eip}/{direction}", EipLimit, _eip_limit, ("eip", "direction")),
    Kind(
        "qos",
        "interface's limit",
        "/interfaces/{interface}/{direction}/{priority}",
        InterfaceLimit,
        _interface_limit,
        INTERFACE_LIMIT,
    ),
    Kind(
        "qos",
        "limit of a prefix",
        "/interfaces/{interface}/{direction}/{priority}/{side}/{addr}/{len}",
        InterfaceLimit,
        _prefix_limit,
        INTERFACE_LIMIT,
    ),
)


def add_items(app: FastAPI, service: Service, commit: Committer) -> None:
    """Add the routes of all kinds."""
    for name in dict.fromkeys(kind.name for kind in KINDS):
        _add_list(app, service, [kind for kind in KINDS if kind.name == name])
    for kind in KINDS:
        _add_reads(app, service, kind)
        _add_writes(app, commit, kind)


def _add_list(app: FastAPI, service: Service, kinds: Sequence[Kind]) -> None:
    kind, model = kinds[0], reduce(or_, (kind.model for kind in kinds))

    @app.get(f"/v1/{kind.segment}", response_model=list[model], name=f"list {kind.name}")  # type: ignore[valid-type]
    async def listed() -> Any:
        return list(kind.of(service.spec or GatewaySpec()))


def _add_reads(app: FastAPI, service: Service, kind: Kind) -> None:
    @app.get(
        f"/v1/{kind.segment}{kind.path}",
        response_model=kind.model,
        name=f"get {kind.title}",
        responses=NOT_THERE,
    )
    async def item(key: Annotated[Key, Depends(kind.key)]) -> Any:
        found = kind.of(service.spec or GatewaySpec()).get(key)
        if found is None:
            raise HTTPException(404, f"there is no {kind.title} {'/'.join(map(str, _parts(key)))}")
        return found


def _add_writes(app: FastAPI, commit: Committer, kind: Kind) -> None:
    path = f"/v1/{kind.segment}{kind.path}"

    @app.put(
        path,
        name=f"put {kind.title}",
        description="Creates or replaces the object; path and body must name the same one.",
        responses={201: {"model": Result, "description": "Created"}, **WRITE_PROBLEMS},
    )
    async def put(
        request: Request,
        response: Response,
        key: Annotated[Key, Depends(kind.key)],
        wanted: Annotated[kind.model, Body(embed=False)],  # type: ignore[name-defined]
    ) -> Result:
        kind.check(key, wanted)
        announce = [wanted.ip] if isinstance(wanted, Eip) else []
        before, done = await commit(
            request, _edit(kind, lambda standing: standing.put(wanted), wanted), announce=announce
        )
        response.status_code = 200 if key in kind.of(before or GatewaySpec()) else 201
        return done

    @app.delete(
        path,
        status_code=204,
        name=f"delete {kind.title}",
        description="Removes the object; one that is not there is no error.",
        responses=WRITE_PROBLEMS,
    )
    async def delete(request: Request, key: Annotated[Key, Depends(kind.key)]) -> None:
        await commit(request, _edit(kind, lambda standing: standing.drop(key)))


def _edit(kind: Kind, change: Callable[[Keyed[Any]], Keyed[Any]], wanted: Part | None = None) -> Edit:
    def edit(spec: GatewaySpec | None) -> GatewaySpec:
        if spec is None or not spec.initialized:
            raise NotInitialized
        changed = spec.model_copy(update={kind.name: change(kind.of(spec))})
        return changed if wanted is None else checked(changed, wanted)

    return edit
