"""What the environment asks of the flow log. Pure."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from gateway.observer.filters import Prefix
from gateway.observer.flow import Flow, Identity, protocol_name

STDOUT = "stdout"
RATE, BURST = 20_000, 40_000
MIB, FILES = 64, 8

_PROTOCOLS = ("tcp", "udp", "icmp", "icmpv6", "sctp", "other")


@dataclass(frozen=True)
class LogOptions:
    """The flow log: where it goes (``stdout`` or a path), and how much of it.

    ``rate`` records a second on the long run, ``burst`` at once; ``files`` files of ``file_bytes`` bytes at most.
    """

    target: str
    filter: Filter
    rate: int = RATE
    burst: int = BURST
    file_bytes: int = MIB << 20
    files: int = FILES

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> LogOptions | None:
        """None where no log is asked for. Raises ValueError that names the variable."""
        target = environment.get("NATGW_FLOW_LOG")
        if not target:
            return None
        if target != STDOUT and not target.startswith("/"):
            raise ValueError(f"NATGW_FLOW_LOG={target!r}: must be {STDOUT} or an absolute path")
        rate, _, burst = (environment.get("NATGW_FLOW_LOG_RATE") or f"{RATE}:{BURST}").partition(":")
        per_second = _positive("NATGW_FLOW_LOG_RATE", rate)
        return cls(
            target,
            Filter.of(environment.get("NATGW_FLOW_LOG_FILTER", "")),
            per_second,
            _positive("NATGW_FLOW_LOG_RATE", burst) if burst else 2 * per_second,
            _positive("NATGW_FLOW_LOG_MIB", environment.get("NATGW_FLOW_LOG_MIB") or str(MIB)) << 20,
            _positive("NATGW_FLOW_LOG_FILES", environment.get("NATGW_FLOW_LOG_FILES") or str(FILES)),
        )

    @property
    def to_file(self) -> bool:
        """Whether it goes to a path."""
        return self.target != STDOUT


def _positive(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or not int(text):
        raise ValueError(f"{name}={text!r}: not a whole number above 0")
    return int(text)


@dataclass(frozen=True)
class Filter:
    """Which flows are logged: of one of the protocols, with one of the addresses, and of one of the EIPs; where nothing
    is named, everything will do."""

    protocols: frozenset[str] = frozenset()
    prefixes: tuple[Prefix, ...] = ()
    """Any address of the flow will do, before or after translation."""
    eips: frozenset[bytes] = frozenset()

    @classmethod
    def of(cls, text: str) -> Filter:
        """From ``protocol=tcp,udp cidr=10.0.1.0/24 eip=192.0.2.1``. Raises ValueError."""
        found: dict[str, list[str]] = {}
        for word in text.split():
            name, equals, values = word.partition("=")
            if not equals or name not in _READ or not values:
                raise ValueError(f"NATGW_FLOW_LOG_FILTER: {word!r} is not protocol=, cidr= or eip= with values")
            found.setdefault(name, []).extend(values.split(","))
        try:
            read = {name: [_READ[name](value) for value in values] for name, values in found.items()}
        except ValueError as error:
            raise ValueError(f"NATGW_FLOW_LOG_FILTER: {error}") from error
        return cls(
            frozenset(map(str, read.get("protocol", ()))),
            tuple(prefix for prefix in read.get("cidr", ()) if isinstance(prefix, Prefix)),
            frozenset(address for address in read.get("eip", ()) if isinstance(address, bytes)),
        )

    def lets_through(self, flow: Flow) -> bool:
        """Whether a flow is logged."""
        if self.protocols and protocol_name(flow.protocol) not in self.protocols:
            return False
        before, after = flow.original, flow.translated
        if self.eips and before.destination not in self.eips and after.source not in self.eips:
            return False
        if not self.prefixes:
            return True
        addresses = (before.source, before.destination, after.source, after.destination)
        return any(prefix.contains(address) for prefix in self.prefixes for address in addresses)


def _protocol(word: str) -> str:
    if word not in _PROTOCOLS:
        raise ValueError(f"{word!r} is none of {', '.join(_PROTOCOLS)}")
    return word


def _prefix(text: str) -> Prefix:
    network = ip_network(text, strict=False)
    host_bits = network.max_prefixlen - network.prefixlen
    return Prefix(network.max_prefixlen // 8, host_bits, int(network.network_address) >> host_bits)


def _address(text: str) -> bytes:
    return ip_address(text).packed


_READ: Mapping[str, Callable[[str], str | Prefix | bytes]] = {
    "protocol": _protocol,
    "cidr": _prefix,
    "eip": _address,
}


def identity(environment: Mapping[str, str]) -> Identity:
    """Whose flows these are. Kube-OVN names a gateway's pod after the gateway: vpc-nat-gw-NAME-0."""
    pod = environment.get("POD_NAME") or socket.gethostname()
    named = re.fullmatch(r"vpc-nat-gw-(.+?)(-[0-9a-f]{6,10}-[0-9a-z]{5}|-[0-9]+)", pod)
    name = environment.get("GATEWAY_NAME") or (named[1] if named else "")
    return Identity(environment.get("POD_NAMESPACE", ""), name, pod, environment.get("NODE_NAME", ""))
