"""Virtual interfaces as netlink messages: what a link is (IFLA_LINKINFO), and how to make one.

Messages: linux/if_link.h.
"""

from __future__ import annotations

import socket
import struct
from ipaddress import ip_address

from gateway.kernel.netlink import NLM_F_CREATE, NLM_F_EXCL, Message, attribute, attributes, text, u32
from rules.state import AddDevice, Bridge, DeleteDevice, Device, SetMaster, Vrf, Vxlan

_RTM_NEWLINK, _RTM_DELLINK, _RTM_SETLINK = 16, 17, 19
_IFLA_IFNAME, _IFLA_MASTER, _IFLA_LINKINFO = 3, 10, 18
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_IFLA_VRF_TABLE = 1
_IFLA_VXLAN_ID, _IFLA_VXLAN_LOCAL, _IFLA_VXLAN_PORT, _IFLA_VXLAN_LOCAL6 = 1, 4, 15, 17

_IFINFO = struct.Struct("=BxHiII")  # family, device type, index, flags, change mask


def master_index(said: dict[int, memoryview]) -> int | None:
    """The index of the device of which a link is a port."""
    return u32(said[_IFLA_MASTER]) if _IFLA_MASTER in said else None


def parse(said: dict[int, memoryview]) -> Device | None:
    """What a link is, where that is one of the kinds that we make."""
    info = attributes(said[_IFLA_LINKINFO]) if _IFLA_LINKINFO in said else {}
    kind = text(info[_IFLA_INFO_KIND]) if _IFLA_INFO_KIND in info else ""
    data = attributes(info[_IFLA_INFO_DATA]) if _IFLA_INFO_DATA in info else {}
    if kind == "bridge":
        return Bridge()
    if kind == "vrf" and _IFLA_VRF_TABLE in data:
        return Vrf(u32(data[_IFLA_VRF_TABLE]))
    if kind == "vxlan" and _IFLA_VXLAN_ID in data:
        return _vxlan(data)
    return None


def _vxlan(data: dict[int, memoryview]) -> Vxlan:
    local = ""
    if _IFLA_VXLAN_LOCAL in data:
        local = socket.inet_ntop(socket.AF_INET, data[_IFLA_VXLAN_LOCAL])
    elif _IFLA_VXLAN_LOCAL6 in data:
        local = socket.inet_ntop(socket.AF_INET6, data[_IFLA_VXLAN_LOCAL6])
    port = int.from_bytes(data[_IFLA_VXLAN_PORT][:2], "big") if _IFLA_VXLAN_PORT in data else 0
    return Vxlan(u32(data[_IFLA_VXLAN_ID]), local, port)


def request(step: AddDevice | DeleteDevice | SetMaster, index: int, master: int) -> Message:
    """The request for a step; ``index`` is the interface's (0: not made yet), ``master`` its master's (0: none)."""
    header = _IFINFO.pack(socket.AF_UNSPEC, 0, index, 0, 0)
    match step:
        case AddDevice(interface, device):
            name = attribute(_IFLA_IFNAME, interface.encode() + b"\0")
            return Message(_RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, header + name + _link_info(device))
        case DeleteDevice():
            return Message(_RTM_DELLINK, 0, header)
        case SetMaster():
            return Message(_RTM_SETLINK, 0, header + attribute(_IFLA_MASTER, struct.pack("=I", master)))


def kind(device: Device) -> str:
    """The kernel's word for it."""
    return type(device).__name__.lower()


def _link_info(device: Device) -> bytes:
    data = b""
    match device:
        case Vrf(table):
            data = attribute(_IFLA_VRF_TABLE, struct.pack("=I", table))
        case Vxlan(vni, local, port):
            address = ip_address(local)
            where = _IFLA_VXLAN_LOCAL if address.version == 4 else _IFLA_VXLAN_LOCAL6
            data = attribute(_IFLA_VXLAN_ID, struct.pack("=I", vni)) + attribute(where, address.packed)
            data += attribute(_IFLA_VXLAN_PORT, struct.pack("!H", port))
    info = attribute(_IFLA_INFO_KIND, kind(device).encode() + b"\0")
    return attribute(_IFLA_LINKINFO, info + attribute(_IFLA_INFO_DATA, data))
