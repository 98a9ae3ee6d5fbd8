"""Types of single fields: checked, and kept as canonical text."""

from __future__ import annotations

import re
from decimal import Decimal
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, ip_address, ip_network
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field


def _unicast(address: IPv4Address | IPv6Address) -> None:
    if address.is_unspecified or address.is_multicast or address.is_loopback or str(address) == "255.255.255.255":
        raise ValueError(f"{address} is not a unicast address")


_CANONICAL = re.compile(r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(?:\.(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)){3}", re.ASCII)
_LENGTHS = frozenset(map(str, range(33)))
_NO_UNICAST = ("0.0.0.0", "127.", "255.255.255.255", *(f"{first}." for first in range(224, 240)))


@lru_cache(maxsize=4096)  # objects that name one EIP share its text
def _ipv4(text: str) -> str:
    if _CANONICAL.fullmatch(text) and not text.startswith(_NO_UNICAST):
        return text  # a tenth of the time that the library takes
    address = IPv4Address(text)
    _unicast(address)
    return str(address)


def _ipv6(text: str) -> str:
    address = IPv6Address(text)
    _unicast(address)
    return str(address)


def _ipv4_interface(text: str) -> str:
    address, _, length = text.partition("/")
    if length in _LENGTHS and _CANONICAL.fullmatch(address) and not address.startswith(_NO_UNICAST):
        return text
    interface = IPv4Interface(text)
    _unicast(interface.ip)
    return str(interface)


def ipv4_network(text: str) -> str:
    """An IPv4 prefix as canonical text; host bits are cut off. Raises ValueError."""
    return str(IPv4Network(text, strict=False))


def _network(text: str) -> str:
    return str(ip_network(text, strict=False))


def _address(text: str) -> str:
    address = ip_address(text)
    _unicast(address)
    return str(address)


def _interface_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}", text):
        raise ValueError(f"{text!r} is not an interface name (1 to 15 characters)")
    return text


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _empty_is_none(value: object) -> object:
    return None if value == "" else value


def _decimal(value: object, unit: str, least: Decimal, most: Decimal) -> str:
    """A decimal number as text without needless zeros; JSON numbers will do, too."""
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,15})?", text, re.ASCII):
        raise ValueError(f"{value!r} is not a decimal number of {unit}")
    number = Decimal(text)
    if not least <= number <= most:
        raise ValueError(f"{text} {unit} is not between {least} and {most}")
    return f"{number.normalize():f}"


def _mbit(value: object) -> str:
    return _decimal(value, "Mbit/s", Decimal("0.000008"), Decimal(10_000_000))


def _mib(value: object) -> str:
    return _decimal(value, "MB", Decimal(0), Decimal(1_000_000))


IPv4 = Annotated[str, AfterValidator(_ipv4)]
IPv6 = Annotated[str, AfterValidator(_ipv6)]
IPv4WithPrefix = Annotated[str, AfterValidator(_ipv4_interface)]
IPv4Prefix = Annotated[str, AfterValidator(ipv4_network)]
Prefix = Annotated[str, AfterValidator(_network)]
Address = Annotated[str, AfterValidator(_address)]
InterfaceName = Annotated[str, AfterValidator(_interface_name)]
Port = Annotated[int, Field(ge=1, le=65535)]
Protocol = Annotated[Literal["tcp", "udp"], BeforeValidator(_lower)]
SessionAffinity = Literal["None", "ClientIP"]
AffinityTimeout = Annotated[int, Field(ge=1, le=86400, description="seconds")]
Gateway4 = Annotated[IPv4 | None, BeforeValidator(_empty_is_none)]
Gateway6 = Annotated[IPv6 | None, BeforeValidator(_empty_is_none)]
Direction = Literal["egress", "ingress"]
Mbit = Annotated[str, BeforeValidator(_mbit)]
"""Megabits (10^6) per second, a decimal number."""
MiB = Annotated[str, BeforeValidator(_mib)]
"""Mebibytes (2^20 bytes), a decimal number."""
