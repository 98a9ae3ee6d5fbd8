"""What Kube-OVN's controller asks of the observer: the file ``config.json``.

It is ``{"namespace", "name", "externalNetwork", "observability": …}``, the last being the field of that name of the
VpcEgressGateway. As in Kube-OVN's observer, unknown fields are ignored and null is as good as nothing.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gateway.observer.filters import EndpointsRule, Filters, Prefix, Rule
from gateway.observer.flow import END, START

RATE, BURST = 100, 1000
"""Records a second, and at once, unless the configuration says otherwise."""

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the text names the field."""


@dataclass(frozen=True, slots=True)
class LogConfig:
    """What is logged of flows."""

    enabled: bool = False
    events: frozenset[str] = frozenset((START, END))
    rate: int = RATE
    burst: int = BURST
    filters: Filters = field(default_factory=Filters)


@dataclass(frozen=True, slots=True)
class Config:
    """A whole configuration. ``external_network`` is the name that Multus gives the external network."""

    namespace: str
    name: str
    external_network: str
    interface_metrics: bool
    flow_metrics: bool
    log: LogConfig

    @property
    def watches_flows(self) -> bool:
        """Whether anybody wants to know of flows."""
        return self.flow_metrics or self.log.enabled


def parse(text: str | bytes) -> Config:
    """The configuration in a file's text. Raises ConfigError."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError("not an object")
    whole = _Object(document, "")
    observability = whole.object("observability")
    conntrack = observability.object("conntrack")
    config = Config(
        namespace=whole.string("namespace"),
        name=whole.string("name"),
        external_network=whole.string("externalNetwork"),
        interface_metrics=observability.object("interfaceMetrics").boolean("enabled"),
        flow_metrics=conntrack.object("metrics").boolean("enabled"),
        log=_log(conntrack.object("log")),
    )
    if not (config.namespace and config.name and config.external_network):
        raise ConfigError("namespace, name and externalNetwork are required")
    return config


class _Object:
    """A JSON object and where it stands."""

    def __init__(self, fields: Mapping[str, Any], path: str) -> None:
        self._fields = fields
        self._path = path

    def object(self, name: str) -> _Object:
        return _Object(self._field(name, dict, {}), f"{self._path}{name}.")

    def string(self, name: str) -> str:
        return self._field(name, str, "")

    def boolean(self, name: str) -> bool:
        return self._field(name, bool, False)

    def positive(self, name: str, default: int) -> int:
        number = self._field(name, int, 0)
        return number if number > 0 else default

    def port(self, name: str) -> int:
        return self._field(name, int, 0)

    def strings(self, name: str) -> frozenset[str]:
        return frozenset(self.each(name, lambda item, path: _checked(item, str, path)))

    def objects(self, name: str, made: Callable[[_Object], T]) -> tuple[T, ...]:
        return self.each(name, lambda item, path: made(_Object(_checked(item, dict, path), f"{path}.")))

    def each(self, name: str, made: Callable[[Any, str], T]) -> tuple[T, ...]:
        items = self._field(name, list, [])
        return tuple(made(item, f"{self._path}{name}[{i}]") for i, item in enumerate(items))

    def _field(self, name: str, kind: type[T], default: T) -> T:
        value = self._fields.get(name)
        return default if value is None else _checked(value, kind, self._path + name)


def _checked(value: Any, kind: type[T], path: str) -> T:
    # True is an int to Python, but not to JSON.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path}: not a {kind.__name__}: {value!r}")
    return value


def _log(log: _Object) -> LogConfig:
    limit, filters = log.object("rateLimit"), log.object("filters")
    return LogConfig(
        enabled=log.boolean("enabled"),
        events=log.strings("events") or frozenset((START, END)),
        rate=limit.positive("recordsPerSecond", RATE),
        burst=limit.positive("burst", BURST),
        filters=Filters(filters.objects("include", _rule), filters.objects("exclude", _rule)),
    )


def _rule(rule: _Object) -> Rule:
    return Rule(
        address_families=rule.strings("addressFamilies"),
        protocols=rule.strings("protocols"),
        nat_types=rule.strings("natTypes"),
        original=_endpoints(rule.object("original")),
        translated=_endpoints(rule.object("translated")),
    )


def _endpoints(ends: _Object) -> EndpointsRule:
    return EndpointsRule(
        sources=ends.each("sourceCIDRs", _prefix),
        destinations=ends.each("destinationCIDRs", _prefix),
        source_ports=ends.objects("sourcePorts", _ports),
        destination_ports=ends.objects("destinationPorts", _ports),
    )


def _ports(ports: _Object) -> tuple[int, int]:
    return ports.port("start"), ports.port("end")


def _prefix(value: Any, path: str) -> Prefix:
    text = _checked(value, str, path)
    address, _, length = text.partition("/")
    try:
        raw = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    except (OSError, ValueError):
        raise ConfigError(f"{path}: not a CIDR: {text!r}") from None
    # Neither "08" is a length, nor are digits of other scripts.
    bits = int(length) if length.isdecimal() else -1
    if str(bits) != length or bits > len(raw) * 8:
        raise ConfigError(f"{path}: not a CIDR: {text!r}")
    host_bits = len(raw) * 8 - bits
    return Prefix(len(raw), host_bits, int.from_bytes(raw, "big") >> host_bits)
