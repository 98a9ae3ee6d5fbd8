"""Interfaces, addresses, routes and routing rules of the thread's network namespace, over rtnetlink.

Reading is ``link_reading``'s; writing sends runs of equal steps in one datagram. Everything written bears the
gateway's mark: addresses a label and IFA_PROTO, routes and rules their protocol number. Messages: rtnetlink(7),
linux/if_addr.h, linux/rtnetlink.h, linux/if_link.h.

What the kernel does by itself and the driver must live with: deleting the last IPv4 address of an interface
also deletes every IPv4 route through that interface, on-link ones included (IPv6 routes stay); deleting a
primary address deletes its secondaries unless promote_secondaries is set, and keeps the routes.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_network
from itertools import groupby

from pyroute2.netlink import nlmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from gateway.kernel import devices, fibrules, sysctl
from gateway.kernel.described import described
from gateway.kernel.link_reading import (
    FAMILY,
    IFF_NOARP,
    IFLA_AF_SPEC,
    IFLA_INET_CONF,
    IPV4_DEVCONF_PROMOTE_SECONDARIES,
    METRIC,
    RTM_GETROUTE,
    RTN_UNICAST,
    Dumps,
    Events,
    Names,
    News,
    hop,
    message,
)
from gateway.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Message,
    Netlink,
    NetlinkError,
    attribute,
)
from gateway.ports import Hop, LinksReading, Refused
from rules.state import (
    ADDRESS_LABEL_SUFFIX,
    ADDRESS_PROTOCOL,
    AddAddress,
    AddDevice,
    AddPolicyRule,
    AddressKey,
    DeleteAddress,
    DeleteDevice,
    DeletePolicyRule,
    DeleteRoute,
    LinkStep,
    ReplaceRoute,
    RouteEntry,
    RouteKey,
    SetArp,
    SetMaster,
    SetPromoteSecondaries,
    SetSysctl,
    SetUp,
)

_RTM_SETLINK = 19
_RTM_NEWADDR, _RTM_DELADDR = 20, 21
_RTM_NEWROUTE, _RTM_DELROUTE = 24, 25

_IFADDR = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_IFA_ADDRESS, _IFA_LOCAL, _IFA_LABEL, _IFA_PROTO = 1, 2, 3, 11

_IFF_UP = 0x1
_RT_SCOPE_UNIVERSE, _RT_SCOPE_LINK, _RT_SCOPE_NOWHERE = 0, 253, 255
_RTNH_F_ONLINK = 4
_LABEL_MAX = 15  # IFNAMSIZ without the terminating zero

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
        self._dumps = Dumps(self._netlink)
        self._events = Events()
        self._known: LinksReading | None = None

    def close(self) -> None:
        """Give the sockets back."""
        self._netlink.close()
        self._events.close()

    def forget(self) -> None:
        """Read everything anew the next time."""
        self._known = None

    def read(self) -> LinksReading:
        """Links, IPv4 addresses, unicast routes without a metric (IPv6: the default one), policy rules, settings.

        Routes with several next hops, a TOS or a metric are not in the gateway's vocabulary and are left out. After
        the first reading only what the kernel tells of is read again: 1,000 addresses take 25 ms. Of settings of
        others it tells nothing.
        """
        names = {state.index: name for name, state in self._known.links.items()} if self._known else {}
        try:
            news = self._events.news(names)  # before the dumps, so that none is missed
            if self._known is None or news.anything:
                self._known = self._all()
            elif news != News():
                self._known = self._followed(self._known, news, names)
        except OSError as error:
            self._known = None
            raise _refused("read the links", error) from error
        return self._known

    def _all(self) -> LinksReading:
        links = self._dumps.links()
        names = {state.index: name for name, state in links.items()}
        addresses, routes = self._dumps.addresses(names), self._dumps.routes(names)
        settings = sysctl.read(sysctl.forwarding(links))
        return LinksReading(links, addresses, routes, self._dumps.policy_rules(), settings)

    def _followed(self, known: LinksReading, news: News, names: Names) -> LinksReading:
        """The reading with what happened to it."""
        if news.addresses:
            addresses = dict(known.addresses)
            for key, ours in news.addresses.items():
                if ours is None:
                    addresses.pop(key, None)
                else:
                    addresses[key] = ours
            known = replace(known, addresses=addresses)
        if news.routes:
            known = replace(known, routes=self._dumps.routes(names))
        if news.policy_rules:
            known = replace(known, policy_rules=self._dumps.policy_rules())
        return known

    def lookup(self, destination: str, within: str | None = None) -> Hop:
        """Where the host would send a packet of its own to an address, and from which address (``ip route get``)."""
        step = f"route get {destination}" + (f" oif {within}" if within else "")
        address = ip_address(destination)
        attrs: list[tuple[str, object]] = [("RTA_DST", destination)]
        try:
            if within:
                attrs.append(("RTA_OIF", socket.if_nametoindex(within)))
            length = address.max_prefixlen
            family = FAMILY[address.version]
            said = self._netlink.get(message(rtmsg, RTM_GETROUTE, attrs=attrs, family=family, dst_len=length))
            if said is None:
                raise Refused(step, "the kernel said nothing", retryable=True)
            return hop(said)
        except OSError as error:
            raise _refused(step, error) from error

    def commit(self, steps: Sequence[LinkStep]) -> None:
        """Apply the steps in order; wanting what is so already is a success.

        Raises Refused at the first step the kernel refuses. Steps before it stand, and so may those of the
        same kind that follow it without another kind in between, for they travel together; no step of a
        later kind was tried.
        """
        if not all(isinstance(step, AddAddress | DeleteAddress | ReplaceRoute | DeleteRoute) for step in steps):
            self._known = None  # the kernel does not tell of everything that these bring along
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


# Writing.


class _InetConf(nlmsg):  # type: ignore[misc]  # pyroute2 is untyped
    """A link message whose IFLA_AF_SPEC is given as bytes: pyroute2's knows only how to read the array."""

    prefix = "IFLA_"
    fields = ifinfmsg.fields
    nla_map = ((IFLA_AF_SPEC, "IFLA_AF_SPEC", "cdata"),)


def _request(step: LinkStep, index: int) -> Message:  # noqa: PLR0911, PLR0912 -- one a step
    match step:
        case AddAddress(key):
            label = key.interface + ADDRESS_LABEL_SUFFIX
            marks = attribute(_IFA_PROTO, bytes([ADDRESS_PROTOCOL]))
            if len(label) <= _LABEL_MAX:
                marks += attribute(_IFA_LABEL, label.encode() + b"\0")
            return _address(_RTM_NEWADDR, key, index, NLM_F_CREATE | NLM_F_EXCL, marks)
        case DeleteAddress(key):
            return _address(_RTM_DELADDR, key, index, 0, b"")
        case ReplaceRoute(key, entry):
            return _route_request(_RTM_NEWROUTE, key, entry, index, NLM_F_CREATE | NLM_F_REPLACE)
        case DeleteRoute(key, entry):
            return _route_request(_RTM_DELROUTE, key, entry, index, 0)
        case SetArp(_, on):
            return message(ifinfmsg, _RTM_SETLINK, index=index, flags=0 if on else IFF_NOARP, change=IFF_NOARP)
        case SetPromoteSecondaries(_, on):
            setting = attribute(IPV4_DEVCONF_PROMOTE_SECONDARIES, struct.pack("=I", on))
            spec = attribute(socket.AF_INET, attribute(IFLA_INET_CONF, setting))
            return message(_InetConf, _RTM_SETLINK, index=index, attrs=[("IFLA_AF_SPEC", spec)])
        case SetUp(_, on):
            return message(ifinfmsg, _RTM_SETLINK, index=index, flags=_IFF_UP if on else 0, change=_IFF_UP)
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


def _address(number: int, key: AddressKey, index: int, how: int, marks: bytes) -> Message:
    """Encoded here, for there may be thousands: pyroute2 takes 0.1 ms for each."""
    text, _, length = key.address.partition("/")
    address = socket.inet_aton(text)
    head = _IFADDR.pack(socket.AF_INET, int(length), 0, _RT_SCOPE_UNIVERSE, index)
    return Message(number, how, head + attribute(_IFA_ADDRESS, address) + attribute(_IFA_LOCAL, address) + marks)


def _route_request(number: int, key: RouteKey, entry: RouteEntry, index: int, how: int) -> Message:
    network = ip_network(key.prefix)
    family = FAMILY[network.version]
    attrs: list[tuple[str, object]] = [("RTA_OIF", index)]
    if network.prefixlen:
        attrs.append(("RTA_DST", str(network.network_address)))
    attrs.append(("RTA_TABLE", key.table))
    if entry.via:
        attrs.append(("RTA_GATEWAY", entry.via))
    if METRIC[family]:
        attrs.append(("RTA_PRIORITY", METRIC[family]))
    if number == _RTM_DELROUTE:
        scope = _RT_SCOPE_NOWHERE  # any
    else:
        scope = _RT_SCOPE_UNIVERSE if entry.via or family == socket.AF_INET6 else _RT_SCOPE_LINK
    return message(
        rtmsg,
        number,
        how=how,
        attrs=attrs,
        family=family,
        dst_len=network.prefixlen,
        table=key.table if key.table < 256 else 0,
        proto=entry.protocol,
        scope=scope,
        type=RTN_UNICAST,
        flags=_RTNH_F_ONLINK if entry.onlink else 0,
    )
