"""The verbs of nat-gateway.sh: the words of one call to typed commands. Pure.

Kube-OVN's controllers of all releases call the same script with different argument forms, which are told
apart by their content alone:

- ``init`` with a ``/`` in its word is release 1.12's route (``<service CIDR>,<gateway>``), else it names the
  interfaces; ``eip-add`` of 1.12 names the external gateway as a second field; ``ext-subnet-route-add`` is 1.12's;
- ``floating-ip-del`` and ``dnat-del`` up to 1.15 name the backend, too, which is ignored; their fields may be
  empty where the controller's status was never filled: there is nothing to delete then;
- protocols come as the user wrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Interface

from pydantic import TypeAdapter, ValidationError

from api.execwire import BadRequest, Reply, failure, one_line, success
from rules.commands import Command, EipAdd, Init, RouteDel
from rules.qos_commands import QosCommand
from rules.spec import PRIORITY_MAX, Interfaces

HELP_WORDS = ("help", "--help", "-h")
RANDOM_FULLY = "--random-fully"
_COMMAND: TypeAdapter[Command] = TypeAdapter(Command)
_PREFIX_LENGTHS = frozenset(map(str, range(33)))


@dataclass(frozen=True)
class Change:
    """One transaction: the commands in order, and the EIPs that are announced even if nothing changes."""

    commands: tuple[Command, ...]
    announce: tuple[str, ...] = ()

    @property
    def dismissed(self) -> tuple[str, ...]:
        """The prefixes whose routes go, whoever made them: before this gateway another program may have."""
        return tuple(command.cidr for command in self.commands if isinstance(command, RouteDel))

    @property
    def initializes(self) -> bool:
        """Whether this is an ``init``, whose interfaces are kept for later callers."""
        return any(isinstance(command, Init) for command in self.commands)


@dataclass(frozen=True)
class IptablesVersion:
    """The question which iptables is in use: the daemon knows."""


@dataclass(frozen=True)
class Context:
    """What a call means beyond its words: its environment, and the interfaces in use (before ``init``: the usual)."""

    environment: Mapping[str, str]
    interfaces: Interfaces


@dataclass(frozen=True)
class Verb:
    """One verb: its rules and purpose as ``help`` says them, and what its words mean (raising BadRequest)."""

    rules: str
    summary: str
    commands: Callable[[Sequence[str], Context], list[Command]]


def parse(
    words: Sequence[str], environment: Mapping[str, str], interfaces: Interfaces | None = None
) -> Change | IptablesVersion | Reply:
    """What one call asks for, or the reply where nothing is to be done; never raises.

    ``interfaces`` are those in use: they complete an environment that names only one of the two to ``init``.
    """
    name = words[0] if words else ""
    if name in HELP_WORDS:
        return success(help_text())
    if name == "get-iptables-version":
        return IptablesVersion()
    verb = VERBS.get(name)
    if verb is None:
        return Reply(code=1, stdout=f"Unknown command {one_line(name)}\n{help_text()}")
    try:
        commands = verb.commands(words[1:], Context(environment, interfaces or Interfaces()))
        gateways = _gateways(environment)
    except BadRequest as error:
        return failure(f"{name} {error}")
    if all(isinstance(command, QosCommand) for command in commands):
        gateways = []  # limits come before init, too, when there is no gateway yet that could have them
    # The environment's gateways go first, so that a rule that names its gateway wins; only init precedes them.
    after_init = sum(isinstance(command, Init) for command in commands[:1])
    commands[after_init:after_init] = gateways
    return Change(tuple(commands), tuple(command.ip for command in commands if isinstance(command, EipAdd)))


def help_text() -> str:
    """All verbs with their rules."""
    forms = [(f"{name} {verb.rules}".rstrip(), verb.summary) for name, verb in VERBS.items()]
    forms += [("get-iptables-version", "print which iptables is in use"), ("help", "print this")]
    width = max(len(form) for form, _ in forms)
    lines = (f"  {form:{width}}  {summary}\n" for form, summary in forms)
    return f"Usage: nat-gateway.sh COMMAND [RULE ...]\nSeveral rules are one transaction.\n{''.join(lines)}"


# --- what words mean --------------------------------------------------------------------------------------


def _command(word: str, op: str, **fields: object) -> Command:
    """One command. Raises BadRequest that repeats the word and names the first field that is wrong."""
    for name, value in fields.items():
        if name.endswith(("Port", "priority")) and not (isinstance(value, str) and value.isascii() and value.isdigit()):
            what = "priority" if name == "priority" else "port number"
            raise BadRequest(f"{word}: {name}: {value!r} is not a {what}")
    try:
        return _COMMAND.validate_python({"op": op, **fields})
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in wrong["loc"][1:])
        raise BadRequest(f"{word}: {field}: {wrong['msg'].removeprefix('Value error, ')}") from None


def _named(word: str, fields: Sequence[str]) -> dict[str, str]:
    """The word's values by field name; BadRequest where there are fewer. Further values are left out."""
    values = word.split(",")
    if len(values) < len(fields):
        raise BadRequest(f"{word}: {fields[len(values)]} is missing")
    named = dict(zip(fields, values, strict=False))
    if "eip" in named:  # Every release's script takes an EIP with its prefix length, too.
        named["eip"], slash, length = named["eip"].partition("/")
        if slash and length not in _PREFIX_LENGTHS:
            raise BadRequest(f"{word}: eip: {length!r} is not a prefix length")
    return named


def _exactly(word: str, fields: Sequence[str]) -> dict[str, str]:
    """The word's values by field name; BadRequest where there are fewer or more."""
    if word.count(",") >= len(fields):
        raise BadRequest(f"{word}: more than {len(fields)} fields ({','.join(fields)})")
    return _named(word, fields)


def _each(rule: Callable[[str], list[Command]]) -> Callable[[Sequence[str], Context], list[Command]]:
    """A verb each of whose words is a rule of its own."""
    return lambda words, _context: [command for word in words for command in rule(word)]


def _adds(op: str, *fields: str) -> Callable[[Sequence[str], Context], list[Command]]:
    """A verb that adds one object per word, which has exactly these fields."""

    return _each(lambda word: [_command(word, op, **_exactly(word, fields))])


def _deletes(op: str, *fields: str, more: int = 0) -> Callable[[Sequence[str], Context], list[Command]]:
    """A verb that deletes one object per word, which begins with the fields of the object's identity.

    Up to ``more`` fields may follow: some releases repeat the whole rule. What they say does not matter.
    """

    def rule(word: str) -> list[Command]:
        if not word.strip(","):
            return []
        named = _named(word, fields)
        if word.count(",") >= len(fields) + more:
            raise BadRequest(f"{word}: more than {len(fields) + more} fields")
        nothing = any(not value.partition("/")[0] for value in named.values())
        return [] if nothing else [_command(word, op, **named)]

    return _each(rule)


def _eip_add(word: str) -> list[Command]:
    address, _, gateway = word.partition(",")
    command = _command(word, "eip-add", address=address)
    return [_command(word, "set-gateways", gatewayV4=gateway), command] if gateway else [command]


def _snat_add(word: str) -> list[Command]:
    eip, cidr, *option = word.split(",") if "," in word else (word, "")
    if option not in ([], [""], [RANDOM_FULLY]):
        raise BadRequest(f"{word}: after internalCIDR only {RANDOM_FULLY} may follow")
    named = _named(f"{eip},{cidr}", ("eip", "internalCIDR"))
    return [_command(word, "snat-add", **named, randomFully=option == [RANDOM_FULLY])]


def _external_route(word: str) -> list[Command]:
    # The external subnet itself is reached through the EIPs' prefix; the script made the gateway the default route.
    named = _exactly(word, ("cidr", "gateway"))
    command = _command(word, "set-gateways", gatewayV4=named["gateway"])
    _command(word, "subnet-route-add", cidr=named["cidr"], nextHopIP=named["gateway"])  # to refuse what is no route
    return [command]


def _shared_dnat_add(word: str) -> list[Command]:
    named = _exactly(word, ("eip", "externalPort", "protocol", "backends"))
    ends = [backend.partition(":") for backend in named.pop("backends").split("@")]
    for ip, _, port in ends:
        if not (port.isascii() and port.isdigit()):
            raise BadRequest(f"{word}: backends: {f'{ip}:{port}'!r} is not an address with a port")
    backends = [{"internalIp": ip, "internalPort": port} for ip, _, port in ends]
    return [_command(word, "nft-dnat-map-add", **named, backends=backends)]


_LIMIT = ("rateMax", "burstMax")
_EIP_LIMIT = ("eip", "priority", *_LIMIT)
_LIMITED = ("direction", "interface", "priority", "classifier", "matchType", "side", "prefix")


def _interface_limit(op: str, *more: str) -> Callable[[Sequence[str], Context], list[Command]]:
    """A verb on an interface's limits. Releases up to 1.16 leave the interface out where the policy names none: it
    is then the one that 1.17 names, the external one for what leaves and the tenant's for what comes in."""

    def rule(word: str, context: Context) -> list[Command]:
        if op == "qos-del" and not word.strip(","):
            return []
        if word.count(",") >= len((*_LIMITED, *_LIMIT)):
            raise BadRequest(f"{word}: more than {len((*_LIMITED, *_LIMIT))} fields")
        named = _named(word, (*_LIMITED, *more))
        classifier, kind = named.pop("classifier"), named.pop("matchType")
        side, prefix = named.pop("side"), named.pop("prefix")
        if classifier not in ("u32", "matchall"):
            raise BadRequest(f"{word}: classifier: {classifier!r} is neither u32 nor matchall")
        usual = context.interfaces.external if named["direction"] == "egress" else context.interfaces.vpc
        limit = named | {"interface": named["interface"] or usual}
        if classifier == "u32":
            if kind != "ip":
                raise BadRequest(f"{word}: matchType: {kind!r} is not ip")
            limit |= {"matchType": "ip", "matchValue": f"{side} {prefix}"}
            if op == "qos-del" and _is_ipv6(prefix):
                return []  # no limit of IPv6 can stand; Kube-OVN lets policies name it
        priority = limit["priority"]
        if op == "qos-del" and priority.isascii() and priority.isdigit() and int(priority[:9]) > PRIORITY_MAX:
            return []  # likewise
        return [_command(word, op, **limit)]

    return lambda words, context: [command for word in words for command in rule(word, context)]


def _nothing(words: Sequence[str], context: Context) -> list[Command]:
    _deletes("subnet-route-del", "cidr", more=1)(words, context)  # to refuse what means nothing
    return []


def _init(words: Sequence[str], context: Context) -> list[Command]:
    named = [word for word in words if word.strip(",") and "/" not in word]
    routes = [word for word in words if "/" in word]
    if len(named) > 1:
        raise BadRequest(f"{' '.join(named)}: the interfaces are named twice")
    if named:
        pair: dict[str, str] = _exactly(named[0], ("vpc", "external"))
    else:
        pair = _interfaces_of(context)
    init = _command(named[0] if named else "", "init", interfaces=pair or None)
    return [init, *(_service_route(word) for word in routes)]


def _service_route(word: str) -> Command:
    """The route to the cluster's services. 1.12 joins their ranges and the subnet's gateways, of which a dual-stack
    cluster has two each; its script has only ever taken the IPv4 ones."""
    values = word.split(",")
    for value in values:
        if ":" in value and not _is_ipv6(value):
            raise BadRequest(f"{word}: {value!r} is neither an IPv6 address nor a prefix")
    return _command(
        word, "subnet-route-add", **_exactly(",".join(v for v in values if ":" not in v), ("cidr", "nextHopIP"))
    )


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Interface(text)
    except ValueError:
        return False
    return True


def _interfaces_of(context: Context) -> dict[str, str]:
    """The interfaces that the environment names, one of them completed by what is in use."""
    vpc = context.environment.get("VPC_INTERFACE")
    external = context.environment.get("EXTERNAL_INTERFACE")
    if not vpc and not external:
        return {}
    return {"vpc": vpc or context.interfaces.vpc, "external": external or context.interfaces.external}


def _gateways(environment: Mapping[str, str]) -> list[Command]:
    """The external gateways that the call's environment names; an empty one changes nothing."""
    fields = (("GATEWAY_V4", "gatewayV4"), ("GATEWAY_V6", "gatewayV6"))
    return [
        _command(f"{name}={environment[name]}", "set-gateways", **{field: environment[name]})
        for name, field in fields
        if environment.get(name)
    ]


VERBS: Mapping[str, Verb] = {
    "init": Verb("[VPC_IF,EXTERNAL_IF]", "make the gateway ready; first of all", _init),
    "subnet-route-add": Verb(
        "CIDR,GATEWAY", "reach a subnet of the VPC", _adds("subnet-route-add", "cidr", "nextHopIP")
    ),
    "subnet-route-del": Verb("CIDR", "forget a subnet of the VPC", _deletes("subnet-route-del", "cidr", more=1)),
    "ext-subnet-route-add": Verb("CIDR,GATEWAY", "name the external gateway", _each(_external_route)),
    "ext-subnet-route-del": Verb("CIDR", "nothing: the gateway stays", _nothing),
    "eip-add": Verb("IP/LENGTH[,GATEWAY]", "put an external address up and announce it", _each(_eip_add)),
    "eip-del": Verb("IP/LENGTH", "take an external address down", _deletes("eip-del", "address", more=1)),
    "floating-ip-add": Verb(
        "EIP,INTERNAL_IP", "map an EIP and an internal address both ways", _adds("floating-ip-add", "eip", "internalIp")
    ),
    "floating-ip-del": Verb("EIP", "delete the EIP's floating IP", _deletes("floating-ip-del", "eip", more=1)),
    "dnat-add": Verb(
        "EIP,PORT,PROTOCOL,INTERNAL_IP,INTERNAL_PORT",
        "map a port of an EIP",
        _adds("dnat-add", "eip", "externalPort", "protocol", "internalIp", "internalPort"),
    ),
    "dnat-del": Verb(
        "EIP,PORT,PROTOCOL", "delete a port mapping", _deletes("dnat-del", "eip", "externalPort", "protocol", more=2)
    ),
    "nft-dnat-map-add": Verb(
        "EIP,PORT,PROTOCOL,IP:PORT[@IP:PORT...]",
        "spread a port of an EIP over exactly these backends",
        _each(_shared_dnat_add),
    ),
    "nft-dnat-map-del": Verb(
        "EIP,PORT,PROTOCOL",
        "delete a spread port",
        _deletes("nft-dnat-map-del", "eip", "externalPort", "protocol", more=1),
    ),
    "snat-add": Verb(f"EIP,INTERNAL_CIDR[,{RANDOM_FULLY}]", "give what leaves the EIP as its source", _each(_snat_add)),
    "snat-del": Verb(
        "EIP,INTERNAL_CIDR", "delete a source translation", _deletes("snat-del", "eip", "internalCIDR", more=1)
    ),
    "eip-ingress-qos-add": Verb(
        "EIP,PRIORITY,MBIT,BURST_MB", "limit what comes to an EIP", _adds("eip-ingress-qos-add", *_EIP_LIMIT)
    ),
    "eip-egress-qos-add": Verb(
        "EIP,PRIORITY,MBIT,BURST_MB", "limit what leaves by an EIP", _adds("eip-egress-qos-add", *_EIP_LIMIT)
    ),
    "eip-ingress-qos-del": Verb("EIP", "take that limit away", _deletes("eip-ingress-qos-del", "eip")),
    "eip-egress-qos-del": Verb("EIP", "take that limit away", _deletes("eip-egress-qos-del", "eip")),
    "qos-add": Verb(
        "DIRECTION,INTERFACE,PRIORITY,u32|matchall,ip|,src|dst|,CIDR|,MBIT,BURST_MB",
        "limit an interface's traffic, or that of a prefix",
        _interface_limit("qos-add", *_LIMIT),
    ),
    "qos-del": Verb(
        "DIRECTION,INTERFACE,PRIORITY,u32|matchall,ip|,src|dst|,CIDR|",
        "take that limit away",
        _interface_limit("qos-del"),
    ),
}
