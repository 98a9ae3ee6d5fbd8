"""Whether somebody has rules in a legacy nat table, asked without iptables and without loading the table.

IPT_SO_GET_INFO (linux/netfilter_ipv4/ip_tables.h) says where each built-in chain begins, and where the rule is that
carries out its policy: where the two are one, the chain is empty.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from pathlib import Path

from gateway.ports import Refused

_GET_INFO = 64  # IPT_SO_GET_INFO
_INFO = struct.Struct("=32sI5I5III")  # struct ipt_getinfo: name, valid hooks, hook entries, underflows, number, size
_HOOKS = {"PREROUTING": 0, "POSTROUTING": 4}
_NAMES = Path("/proc/thread-self/net/ip_tables_names")

_libc = ctypes.CDLL(None, use_errno=True)


def occupied(table: str) -> str:
    """The name of the first of PREROUTING and POSTROUTING that is not empty; an empty text if both are."""
    try:
        loaded = _NAMES.read_text().split()
    except FileNotFoundError:
        return ""
    if table not in loaded:
        return ""
    buffer = ctypes.create_string_buffer(_INFO.size)
    buffer.raw = _INFO.pack(table.encode(), *([0] * 13))
    size = ctypes.c_uint(_INFO.size)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW) as asking:
        asked = _libc.getsockopt(asking.fileno(), socket.IPPROTO_IP, _GET_INFO, buffer, ctypes.byref(size))
    if asked:
        words = os.strerror(ctypes.get_errno())
        raise Refused(f"ask for the legacy table {table}", words, retryable=True)
    fields = _INFO.unpack(buffer.raw)
    begins, policies = fields[2:7], fields[7:12]
    return next((name for name, hook in _HOOKS.items() if begins[hook] != policies[hook]), "")
