"""Option tables of libxtables 1.8.11 and newer, for python-iptables 1.2.

The library's extensions describe their options in arrays of ``struct xt_option_entry``. Version 1.8.11 put a field
(``base``) into it without a new soname. python-iptables knows the shorter structure: it steps through the array with
the wrong stride and finds the first option only (`ctstate`, but not `ctorigdst`).
"""

from __future__ import annotations

import ctypes
from typing import Any

from iptc import xtables

NFPROTO_IPV4 = 2


class _Entry(ctypes.Structure):
    """``struct xt_option_entry`` since 1.8.11; the numbers are type, id, excl, also, flags and base."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("numbers", ctypes.c_uint * 6),
        ("ptroff", ctypes.c_uint),
        ("size", ctypes.c_size_t),
        ("min", ctypes.c_uint),
        ("max", ctypes.c_uint),
    )


def _lookup(_: Any, entries: Any, name: bytes) -> Any:
    """In place of ``xtables._option_lookup``: the entry of that name, or None at the array's end."""
    table = ctypes.cast(entries, ctypes.POINTER(_Entry))
    index = 0
    while table[index].name:
        if table[index].name == name:
            return ctypes.cast(ctypes.byref(table[index]), ctypes.POINTER(xtables.xt_option_entry)).contents
        index += 1
    return None


def adapt() -> None:
    """Have python-iptables read option tables as the installed libxtables lays them out.

    `conntrack` has many options. Where they are read with too short a stride, the second entry's name is the first
    one's bounds, which are zero; so this looks at nothing that is not there.
    """
    options = xtables.xtables(NFPROTO_IPV4).find_match("conntrack")[0].x6_options
    if options[0].name and not options[1].name:
        xtables.xtables._option_lookup = _lookup
