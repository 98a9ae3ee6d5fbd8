"""Interfaces, addresses, routes and routing rules of the thread's network namespace, over rtnetlink.

Reading takes one dump of each kind and picks out what the gateway speaks of; writing sends runs of equal
steps in one datagram. Everything written bears the gateway's mark: addresses a label and IFA_PROTO, routes
and rules their protocol number. Messages: rtnetlink(7), linux/if_addr.h, linux/rtnetlink.h, linux/if_link.h.

What the kernel does by itself and the driver must live with: deleting the last IPv4 address of an interface
also deletes every IPv4 route through that interface, on-link ones included (IPv6 routes stay); deleting a
primary address deletes its secondaries unless promote_secondaries is set, and keeps the routes.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_network
from itertools import groupby
from typing import Any

from pyroute2.netlink import nlmsg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from gateway.kernel import devices, fibrules, sysctl
from gateway.kernel.described import described
from gateway.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Message,
    Netlink,
    NetlinkError,
    attributes,
    body,
    text,
    u32,
)
from gateway.ports import Hop, LinksReading, Refused
from rules.ruleset import Family
from rules.state import (
    ADDRESS_LABEL_SUFFIX,
    ADDRESS_PROTOCOL,
    ROUTE_PROTOCOL,
    AddAddress,
    AddDevice,
    AddPolicyRule,
    AddressKey,
    DeleteAddress,
    DeleteDevice,
    DeletePolicyRule,
    DeleteRoute,
    LinkState,
    LinkStep,
    PolicyRule,
    ReplaceRoute,
    RouteEntry,
    RouteKey,
    SetArp,
    SetMaster,
    SetPromoteSecondaries,
    SetSysctl,
    SetUp,
)

_RTM_GETLINK, _RTM_SETLINK = 18, 19
_RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR = 20, 21, 22
_RTM_NEWROUTE, _RTM_DELROUTE, _RTM_GETROUTE = 24, 25, 26

_IFF_UP = 0x1
_IFF_NOARP = 0x80
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_AF_SPEC = 1, 3, 4, 26
_IFLA_INET_CONF = 1
_IPV4_DEVCONF_PROMOTE_SECONDARIES = 20
_IFA_ADDRESS, _IFA_LOCAL, _IFA_LABEL, _IFA_PROTO = 1, 2, 3, 11
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_TABLE = 1, 4, 5, 6, 15
_RTA_PREFSRC = 7
_RT_TABLE_LOCAL = 255
_RTN_UNICAST = 1
_RT_SCOPE_UNIVERSE, _RT_SCOPE_LINK, _RT_SCOPE_NOWHERE = 0, 253, 255
_RTNH_F_ONLINK = 4
_RTM_F_CLONED = 0x200
_IP6_RT_PRIO_USER = 1024  # the metric IPv6 gives a route for which none is named
_LABEL_MAX = 15  # IFNAMSIZ without the terminating zero

_IFINFO = struct.Struct("=BxHiII")  # family, device type, index, flags, change mask
_IFADDR = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags

_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_METRIC = {socket.AF_INET: 0, socket.AF_INET6: _IP6_RT_PRIO_USER}

# What another try may find changed: a link that came, came up, or got its subnet; a table that was busy.
_PASSING = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENOBUFS,
    errno.ENODEV,
    errno.ENOMEM,
}
# What a step wants already, in the kernel's words.
_DONE_ALREADY: dict[type[object], tuple[int, ...]] = {
    AddAddress: (errno.EEXIST,),
    DeleteAddress: (errno.EADDRNOTAVAIL,),
    DeleteRoute: (errno.ESRCH,),
    AddPolicyRule: (errno.EEXIST,),
    DeletePolicyRule: (errno.ENOENT,),
}


class KernelLinks:
    """``gateway.ports.Links`` on the real kernel; for one thread, in whose network namespace it opens its socket."""

    def __init__(self) -> None:
        self._netlink = Netlink(socket.NETLINK_ROUTE)

    def close(self) -> None:
        """Give the socket back."""
        self._netlink.close()

    def read(self) -> LinksReading:
        """Links, IPv4 addresses, unicast routes without a metric (IPv6: the default one), policy rules, settings.

        Routes with several next hops, a TOS or a metric are not in the gateway's vocabulary and are left out.
        """
        try:
            links = self._links()
            names = {state.index: name for name, state in links.items()}
            addresses = self._addresses(names)
            routes: dict[RouteKey, RouteEntry] = {}
            for family in _FAMILY.values():
                routes |= self._routes(family, names)
            policy_rules = frozenset((*self._policy_rules(4), *self._policy_rules(6)))
        except OSError as error:
            raise _refused("read the links", error) from error
        return LinksReading(links, addresses, routes, policy_rules, sysctl.read(sysctl.forwarding(links)))

    def _links(self) -> dict[str, LinkState]:
        found: dict[str, LinkState] = {}
        ports: dict[str, int] = {}
        for message in self._netlink.dump(_message(ifinfmsg, _RTM_GETLINK, family=socket.AF_UNSPEC)):
            name, state, master = _link(message)
            found[name] = state
            if master is not None:
                ports[name] = master
        names = {state.index: name for name, state in found.items()}
        return found | {name: replace(found[name], master=names.get(master)) for name, master in ports.items()}

    def _policy_rules(self, family: Family) -> Iterator[PolicyRule]:
        try:
            yield from map(fibrules.parse, self._netlink.dump(fibrules.everything(family)))
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT:  # a kernel without IPv6
                raise

    def lookup(self, destination: str, within: str | None = None) -> Hop:
        """Where the host would send a packet of its own to an address, and from which address (``ip route get``)."""
        step = f"route get {destination}" + (f" oif {within}" if within else "")
        address = ip_address(destination)
        attrs: list[tuple[str, object]] = [("RTA_DST", destination)]
        try:
            if within:
                attrs.append(("RTA_OIF", socket.if_nametoindex(within)))
            length = address.max_prefixlen
            family = _FAMILY[address.version]
            said = self._netlink.get(_message(rtmsg, _RTM_GETROUTE, attrs=attrs, family=family, dst_len=length))
            if said is None:
                raise Refused(step, "the kernel said nothing", retryable=True)
            return _hop(said)
        except OSError as error:
            raise _refused(step, error) from error

    def _addresses(self, names: dict[int, str]) -> dict[AddressKey, bool]:
        found: dict[AddressKey, bool] = {}
        for entry in self._netlink.dump(_message(ifaddrmsg, _RTM_GETADDR, family=socket.AF_INET)):
            _, length, _, _, index = _IFADDR.unpack_from(entry)
            said = attributes(entry, _IFADDR.size)
            local = said.get(_IFA_LOCAL, said.get(_IFA_ADDRESS))
            if local is None or index not in names:
                continue
            ours = (_IFA_LABEL in said and text(said[_IFA_LABEL]).endswith(ADDRESS_LABEL_SUFFIX)) or (
                _IFA_PROTO in said and said[_IFA_PROTO][0] == ADDRESS_PROTOCOL
            )
            found[AddressKey(names[index], f"{socket.inet_ntoa(local)}/{length}")] = ours
        return found

    def _routes(self, family: int, names: dict[int, str]) -> dict[RouteKey, RouteEntry]:
        found: dict[RouteKey, RouteEntry] = {}
        for message in self._netlink.dump(_message(rtmsg, _RTM_GETROUTE, family=family)):
            if (route := _route(message, names)) is None:
                continue
            key, entry = route
            # IPv6 can hold two of one metric, say one learned from a router advertisement: ours is the one to see.
            if key not in found or entry.protocol == ROUTE_PROTOCOL:
                found[key] = entry
        return found

    def commit(self, steps: Sequence[LinkStep]) -> None:
        """Apply the steps in order; wanting what is so already is a success.

        Raises Refused at the first step the kernel refuses. Steps before it stand, and so may those of the
        same kind that follow it without another kind in between, for they travel together; no step of a
        later kind was tried.
        """
        for _, run in groupby(steps, type):
            self._run(list(run))

    def _run(self, steps: Sequence[LinkStep]) -> None:
        indexes = {name: _index(name) for name in map(_interface, steps) if name is not None}
        if isinstance(steps[0], SetSysctl):
            _write_settings(steps)
            return
        if isinstance(steps[0], DeleteAddress | DeleteRoute | DeleteDevice):
            # With its interface they are gone, too.
            steps = [step for step in steps if indexes[_interface(step) or ""] is not None]
            # The newest first: an interface's oldest address of a subnet is the primary, and each time that the
            # primary goes the kernel writes the routes of all others anew (4 s for 1,000 addresses, else 0.1 s).
            steps.reverse()
        requests = []
        for step in steps:
            name = _interface(step)
            index = 0 if name is None or isinstance(step, AddDevice) else indexes[name]
            if index is None:
                raise Refused(described(step), f"no such interface {name}", retryable=True)
            requests.append(_request(step, index))
        try:
            answers = self._netlink.request(requests)
        except OSError as error:
            raise _refused(described(steps[0]), error) from error
        for step, answer in zip(steps, answers, strict=True):
            if answer is not None and answer.code not in _DONE_ALREADY.get(type(step), ()):
                if isinstance(step, AddDevice) and answer.code == errno.EOPNOTSUPP:
                    words = f"this kernel has no {devices.kind(step.device)} devices ({answer.words})"
                    raise Refused(described(step), words, retryable=False)
                raise _refused(described(step), answer)


def _refused(step: str, error: OSError | NetlinkError) -> Refused:
    code, words = (error.errno, error.strerror) if isinstance(error, OSError) else (error.code, error.words)
    return Refused(step, words or str(error), retryable=isinstance(error, TimeoutError) or code in _PASSING)


def _write_settings(steps: Sequence[LinkStep]) -> None:
    for step in steps:
        if isinstance(step, SetSysctl):
            try:
                sysctl.write(step.name, step.value)
            except OSError as error:
                raise _refused(described(step), error) from error


def _interface(step: LinkStep) -> str | None:
    """The interface that must be there for the step (of a device that is to be made: that it is for)."""
    match step:
        case AddAddress(key) | DeleteAddress(key):
            return key.interface
        case ReplaceRoute(_, entry) | DeleteRoute(_, entry):
            return entry.interface
        case AddPolicyRule() | DeletePolicyRule() | SetSysctl():
            return None  # rules wait for an interface that is not there yet
        case SetArp(interface) | SetPromoteSecondaries(interface) | SetUp(interface):
            return interface
        case AddDevice(interface) | DeleteDevice(interface) | SetMaster(interface):
            return interface


def _index(name: str) -> int | None:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


# Reading.


def _link(message: memoryview) -> tuple[str, LinkState, int | None]:
    """Name, state, and the index of the master."""
    _, _, index, flags, _ = _IFINFO.unpack_from(message)
    said = attributes(message, _IFINFO.size)
    mac = bytes(said[_IFLA_ADDRESS]).hex(":") if _IFLA_ADDRESS in said else ""
    state = LinkState(
        index=index,
        mac=mac,
        up=bool(flags & _IFF_UP),
        arp=not flags & _IFF_NOARP,
        mtu=u32(said[_IFLA_MTU]) if _IFLA_MTU in said else 0,
        promote_secondaries=_promotes(said),
        device=devices.parse(said),
    )
    return text(said[_IFLA_IFNAME]), state, devices.master_index(said)


def _promotes(said: dict[int, memoryview]) -> bool:
    """IFLA_AF_SPEC / AF_INET / IFLA_INET_CONF is an array of numbers, that of a setting at its number less one."""
    inet = attributes(said[_IFLA_AF_SPEC]).get(socket.AF_INET) if _IFLA_AF_SPEC in said else None
    conf = attributes(inet).get(_IFLA_INET_CONF) if inet is not None else None
    at = 4 * (_IPV4_DEVCONF_PROMOTE_SECONDARIES - 1)
    return conf is not None and len(conf) >= at + 4 and u32(conf[at:]) != 0


def _route(message: memoryview, names: dict[int, str]) -> tuple[RouteKey, RouteEntry] | None:
    family, length, _, tos, table, protocol, _, kind, flags = _RTMSG.unpack_from(message)
    if kind != _RTN_UNICAST or tos or flags & _RTM_F_CLONED:
        return None
    said = attributes(message, _RTMSG.size)
    metric = u32(said[_RTA_PRIORITY]) if _RTA_PRIORITY in said else 0
    where = u32(said[_RTA_TABLE]) if _RTA_TABLE in said else table
    if where == _RT_TABLE_LOCAL or metric != _METRIC.get(family) or _RTA_OIF not in said:
        return None
    name = names.get(u32(said[_RTA_OIF]))
    if name is None:
        return None
    prefix = socket.inet_ntop(family, said[_RTA_DST]) if _RTA_DST in said else _any(family)
    via = socket.inet_ntop(family, said[_RTA_GATEWAY]) if _RTA_GATEWAY in said else None
    return RouteKey(f"{prefix}/{length}", where), RouteEntry(name, via, bool(flags & _RTNH_F_ONLINK), protocol)


def _hop(message: memoryview) -> Hop:
    family, _, _, _, _, _, _, kind, _ = _RTMSG.unpack_from(message)
    said = attributes(message, _RTMSG.size)
    if kind != _RTN_UNICAST or _RTA_OIF not in said:
        raise OSError(errno.EHOSTUNREACH, "not an address of another host")
    source = socket.inet_ntop(family, said[_RTA_PREFSRC]) if _RTA_PREFSRC in said else None
    via = socket.inet_ntop(family, said[_RTA_GATEWAY]) if _RTA_GATEWAY in said else None
    return Hop(socket.if_indextoname(u32(said[_RTA_OIF])), source, via)


def _any(family: int) -> str:
    return "0.0.0.0" if family == socket.AF_INET else "::"


# Writing.


class _InetConf(nlmsg):  # type: ignore[misc]  # pyroute2 is untyped
    """A link message whose IFLA_AF_SPEC is given as bytes: pyroute2's knows only how to read the array."""

    prefix = "IFLA_"
    fields = ifinfmsg.fields
    nla_map = ((_IFLA_AF_SPEC, "IFLA_AF_SPEC", "cdata"),)


def _message(
    kind: Any, number: int, *, how: int = 0, attrs: Sequence[tuple[str, object]] = (), **fields: int
) -> Message:
    """A request of a pyroute2 message class; ``how`` are flags of the netlink header."""
    message = kind()
    for name, value in fields.items():
        message[name] = value
    message["attrs"] = list(attrs)
    return Message(number, how, body(message))


def _request(step: LinkStep, index: int) -> Message:  # noqa: PLR0911, PLR0912 -- one a step
    match step:
        case AddAddress(key):
            label = key.interface + ADDRESS_LABEL_SUFFIX
            marks: list[tuple[str, object]] = [("IFA_PROTO", ADDRESS_PROTOCOL)]
            if len(label) <= _LABEL_MAX:
                marks.append(("IFA_LABEL", label))
            return _address(_RTM_NEWADDR, key, index, NLM_F_CREATE | NLM_F_EXCL, marks)
        case DeleteAddress(key):
            return _address(_RTM_DELADDR, key, index, 0, [])
        case ReplaceRoute(key, entry):
            return _route_request(_RTM_NEWROUTE, key, entry, index, NLM_F_CREATE | NLM_F_REPLACE)
        case DeleteRoute(key, entry):
            return _route_request(_RTM_DELROUTE, key, entry, index, 0)
        case SetArp(_, on):
            return _message(ifinfmsg, _RTM_SETLINK, index=index, flags=0 if on else _IFF_NOARP, change=_IFF_NOARP)
        case SetPromoteSecondaries(_, on):
            setting = _nested(_IPV4_DEVCONF_PROMOTE_SECONDARIES, struct.pack("=I", on))
            spec = _nested(socket.AF_INET, _nested(_IFLA_INET_CONF, setting))
            return _message(_InetConf, _RTM_SETLINK, index=index, attrs=[("IFLA_AF_SPEC", spec)])
        case SetUp(_, on):
            return _message(ifinfmsg, _RTM_SETLINK, index=index, flags=_IFF_UP if on else 0, change=_IFF_UP)
        case AddPolicyRule(rule):
            return fibrules.addition(rule)
        case DeletePolicyRule(rule):
            return fibrules.deletion(rule)
        case AddDevice() | DeleteDevice():
            return devices.request(step, index, 0)
        case SetMaster(_, master):
            return devices.request(step, index, socket.if_nametoindex(master) if master else 0)
        case SetSysctl():
            raise TypeError("settings are files, not messages")


def _nested(kind: int, payload: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def _address(number: int, key: AddressKey, index: int, how: int, marks: Sequence[tuple[str, object]]) -> Message:
    address, _, length = key.address.partition("/")
    attrs = [("IFA_LOCAL", address), ("IFA_ADDRESS", address), *marks]
    return _message(ifaddrmsg, number, how=how, attrs=attrs, family=socket.AF_INET, prefixlen=int(length), index=index)


def _route_request(number: int, key: RouteKey, entry: RouteEntry, index: int, how: int) -> Message:
    network = ip_network(key.prefix)
    family = _FAMILY[network.version]
    attrs: list[tuple[str, object]] = [("RTA_OIF", index)]
    if network.prefixlen:
        attrs.append(("RTA_DST", str(network.network_address)))
    attrs.append(("RTA_TABLE", key.table))
    if entry.via:
        attrs.append(("RTA_GATEWAY", entry.via))
    if _METRIC[family]:
        attrs.append(("RTA_PRIORITY", _METRIC[family]))
    if number == _RTM_DELROUTE:
        scope = _RT_SCOPE_NOWHERE  # any
    else:
        scope = _RT_SCOPE_UNIVERSE if entry.via or family == socket.AF_INET6 else _RT_SCOPE_LINK
    return _message(
        rtmsg,
        number,
        how=how,
        attrs=attrs,
        family=family,
        dst_len=network.prefixlen,
        table=key.table if key.table < 256 else 0,
        proto=entry.protocol,
        scope=scope,
        type=_RTN_UNICAST,
        flags=_RTNH_F_ONLINK if entry.onlink else 0,
    )
