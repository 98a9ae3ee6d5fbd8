"""Reading links, addresses, routes and routing rules: dumps and events of rtnetlink, in the gateway's words.

Events are the very messages of which dumps are made, so what is known can follow them. Messages: rtnetlink(7),
linux/if_addr.h, linux/rtnetlink.h, linux/if_link.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from gateway.kernel import devices, fibrules
from gateway.kernel.netlink import Message, Netlink, attributes, body, text, u32
from gateway.kernel.subscription import Subscription
from gateway.ports import Hop
from rules.ruleset import Family
from rules.state import (
    ADDRESS_LABEL_SUFFIX,
    ADDRESS_PROTOCOL,
    ROUTE_PROTOCOL,
    AddressKey,
    LinkState,
    PolicyRule,
    RouteEntry,
    RouteKey,
)

_RTM_GETLINK, _RTM_GETADDR, RTM_GETROUTE = 18, 22, 26
_ADDRESS_CAME, _ADDRESS_WENT, _ROUTE_CAME, _ROUTE_WENT, _RULE_CAME, _RULE_WENT = 20, 21, 24, 25, 32, 33
_AF_BRIDGE = 7

_IFF_UP = 0x1
IFF_NOARP = 0x80
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, IFLA_AF_SPEC = 1, 3, 4, 26
IFLA_INET_CONF = 1
IPV4_DEVCONF_PROMOTE_SECONDARIES = 20
_IFA_ADDRESS, _IFA_LOCAL, _IFA_LABEL, _IFA_PROTO = 1, 2, 3, 11
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_TABLE = 1, 4, 5, 6, 15
_RTA_PREFSRC = 7
_RT_TABLE_LOCAL = 255
RTN_UNICAST = 1
_RTNH_F_ONLINK = 4
_RTM_F_CLONED = 0x200
_IP6_RT_PRIO_USER = 1024  # the metric IPv6 gives a route for which none is named

_IFINFO = struct.Struct("=BxHiII")  # family, device type, index, flags, change mask
_IFADDR = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags

FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
METRIC = {socket.AF_INET: 0, socket.AF_INET6: _IP6_RT_PRIO_USER}

Names = Mapping[int, str]
"""Interfaces by index."""

_GROUPS = (1, 5, 7, 8, 11, 19)  # linux/rtnetlink.h: links; IPv4 addresses, routes, rules; IPv6 routes, rules


def message(
    kind: Any, number: int, *, how: int = 0, attrs: Sequence[tuple[str, object]] = (), **fields: int
) -> Message:
    """A request of a pyroute2 message class; ``how`` are flags of the netlink header."""
    made = kind()
    for name, value in fields.items():
        made[name] = value
    made["attrs"] = list(attrs)
    return Message(number, how, body(made))


class Dumps:
    """What there is; each raises OSError."""

    def __init__(self, netlink: Netlink) -> None:
        self._netlink = netlink

    def links(self) -> dict[str, LinkState]:
        """Links by name."""
        found: dict[str, LinkState] = {}
        ports: dict[str, int] = {}
        for said in self._netlink.dump(message(ifinfmsg, _RTM_GETLINK, family=socket.AF_UNSPEC)):
            name, state, master = _link(said)
            found[name] = state
            if master is not None:
                ports[name] = master
        names = {state.index: name for name, state in found.items()}
        return found | {name: replace(found[name], master=names.get(master)) for name, master in ports.items()}

    def addresses(self, names: Names) -> dict[AddressKey, bool]:
        """IPv4 addresses; True: ours."""
        entries = self._netlink.dump(message(ifaddrmsg, _RTM_GETADDR, family=socket.AF_INET))
        return dict(filter(None, (_address(entry, names) for entry in entries)))

    def routes(self, names: Names) -> dict[RouteKey, RouteEntry]:
        """Unicast routes without a metric (IPv6: the default one)."""
        found: dict[RouteKey, RouteEntry] = {}
        for family in FAMILY.values():
            # The kernel leaves out the two or three routes of other types that each address brings.
            for said in self._netlink.dump(message(rtmsg, RTM_GETROUTE, family=family, type=RTN_UNICAST)):
                if (route := _route(said, names)) is None:
                    continue
                key, entry = route
                # IPv6 can hold two of one metric, say one learned from a router advertisement: ours is the one to see.
                if key not in found or entry.protocol == ROUTE_PROTOCOL:
                    found[key] = entry
        return found

    def policy_rules(self) -> frozenset[PolicyRule]:
        """Rules of the routing policy, of both versions of IP."""
        return frozenset((*self._policy_rules(4), *self._policy_rules(6)))

    def _policy_rules(self, family: Family) -> Iterator[PolicyRule]:
        try:
            yield from map(fibrules.parse, self._netlink.dump(fibrules.everything(family)))
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT:  # a kernel without IPv6
                raise


@dataclass
class News:
    """What happened: addresses that came (True: ours), changed or went (None); routes or rules; or who knows what."""

    addresses: dict[AddressKey, bool | None] = field(default_factory=dict)
    routes: bool = False
    policy_rules: bool = False
    anything: bool = False


class Events:
    """The kernel's own account of what happens to links, addresses, routes and rules."""

    def __init__(self) -> None:
        self._subscription = Subscription(_GROUPS)

    def news(self, names: Names) -> News:
        """What happened since the last call, whoever did it; the first call says that anything may have.

        What a request of ours brings about is told by the time that it is acknowledged.
        """
        told = self._subscription.messages()
        news = News(anything=told is None)
        for kind, said in told or ():
            _tell(news, kind, said, names)
        return news

    def close(self) -> None:
        """Give the socket back."""
        self._subscription.close()


def _tell(news: News, kind: int, said: memoryview, names: Names) -> None:
    if kind in (_ADDRESS_CAME, _ADDRESS_WENT):
        entry = _address(said, names)
        if entry is None:
            news.anything = True
            return
        key, ours = entry
        news.addresses[key] = ours if kind == _ADDRESS_CAME else None
        # Routes that go with an address are not told of.
        news.routes |= kind == _ADDRESS_WENT
    elif kind in (_ROUTE_CAME, _ROUTE_WENT):
        news.routes |= _route(said, names) is not None
    elif kind in (_RULE_CAME, _RULE_WENT):
        news.policy_rules = True
    else:
        news.anything |= said[0] != _AF_BRIDGE  # a bridge about its ports


def _address(entry: memoryview, names: Names) -> tuple[AddressKey, bool] | None:
    _, length, _, _, index = _IFADDR.unpack_from(entry)
    said = attributes(entry, _IFADDR.size)
    local = said.get(_IFA_LOCAL, said.get(_IFA_ADDRESS))
    if local is None or index not in names:
        return None
    ours = (_IFA_LABEL in said and text(said[_IFA_LABEL]).endswith(ADDRESS_LABEL_SUFFIX)) or (
        _IFA_PROTO in said and said[_IFA_PROTO][0] == ADDRESS_PROTOCOL
    )
    return AddressKey(names[index], f"{socket.inet_ntoa(local)}/{length}"), ours


def _link(entry: memoryview) -> tuple[str, LinkState, int | None]:
    """Name, state, and the index of the master."""
    _, _, index, flags, _ = _IFINFO.unpack_from(entry)
    said = attributes(entry, _IFINFO.size)
    mac = bytes(said[_IFLA_ADDRESS]).hex(":") if _IFLA_ADDRESS in said else ""
    state = LinkState(
        index=index,
        mac=mac,
        up=bool(flags & _IFF_UP),
        arp=not flags & IFF_NOARP,
        mtu=u32(said[_IFLA_MTU]) if _IFLA_MTU in said else 0,
        promote_secondaries=_promotes(said),
        device=devices.parse(said),
    )
    return text(said[_IFLA_IFNAME]), state, devices.master_index(said)


def _promotes(said: dict[int, memoryview]) -> bool:
    """IFLA_AF_SPEC / AF_INET / IFLA_INET_CONF is an array of numbers, that of a setting at its number less one."""
    inet = attributes(said[IFLA_AF_SPEC]).get(socket.AF_INET) if IFLA_AF_SPEC in said else None
    conf = attributes(inet).get(IFLA_INET_CONF) if inet is not None else None
    at = 4 * (IPV4_DEVCONF_PROMOTE_SECONDARIES - 1)
    return conf is not None and len(conf) >= at + 4 and u32(conf[at:]) != 0


def _route(entry: memoryview, names: Names) -> tuple[RouteKey, RouteEntry] | None:
    family, length, _, tos, table, protocol, _, kind, flags = _RTMSG.unpack_from(entry)
    if kind != RTN_UNICAST or tos or flags & _RTM_F_CLONED:
        return None
    said = attributes(entry, _RTMSG.size)
    metric = u32(said[_RTA_PRIORITY]) if _RTA_PRIORITY in said else 0
    where = u32(said[_RTA_TABLE]) if _RTA_TABLE in said else table
    if where == _RT_TABLE_LOCAL or metric != METRIC.get(family) or _RTA_OIF not in said:
        return None
    name = names.get(u32(said[_RTA_OIF]))
    if name is None:
        return None
    prefix = socket.inet_ntop(family, said[_RTA_DST]) if _RTA_DST in said else _any(family)
    via = socket.inet_ntop(family, said[_RTA_GATEWAY]) if _RTA_GATEWAY in said else None
    return RouteKey(f"{prefix}/{length}", where), RouteEntry(name, via, bool(flags & _RTNH_F_ONLINK), protocol)


def hop(entry: memoryview) -> Hop:
    """Where an answer to RTM_GETROUTE says that a packet goes; raises OSError if to no other host."""
    family, _, _, _, _, _, _, kind, _ = _RTMSG.unpack_from(entry)
    said = attributes(entry, _RTMSG.size)
    if kind != RTN_UNICAST or _RTA_OIF not in said:
        raise OSError(errno.EHOSTUNREACH, "not an address of another host")
    source = socket.inet_ntop(family, said[_RTA_PREFSRC]) if _RTA_PREFSRC in said else None
    via = socket.inet_ntop(family, said[_RTA_GATEWAY]) if _RTA_GATEWAY in said else None
    return Hop(socket.if_indextoname(u32(said[_RTA_OIF])), source, via)


def _any(family: int) -> str:
    return "0.0.0.0" if family == socket.AF_INET else "::"
