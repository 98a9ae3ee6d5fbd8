"""Keeping CAP_NET_ADMIN and giving up everything else that root can do."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

NOBODY = 65534

_CAP_NET_ADMIN = 12
_CAPABILITIES = 64  # there are fewer; the kernel refuses numbers it does not have
_VERSION_3 = 0x20080522
_PR_SET_KEEPCAPS, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 8, 24, 38


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def give_up(user: int | None) -> None:
    """Become ``user`` (None: stay who we are) with CAP_NET_ADMIN and no other capability, for good. Raises OSError.

    Where CAP_SETUID and CAP_SETGID are missing, we stay who we are, too.

    Without root nothing changes but that nothing can be gained any more.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0:
        for number in range(_CAPABILITIES):
            if number != _CAP_NET_ADMIN:
                libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
        if user is not None:
            libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
            # A container that has no more capabilities than it needs cannot: then root's name stays, its privileges go.
            with suppress(PermissionError):
                os.setgroups([])
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
        only = 1 << _CAP_NET_ADMIN
        sets = (_Sets * 2)(_Sets(only, only, 0), _Sets(0, 0, 0))
        if libc.capset(ctypes.byref(_Header(_VERSION_3, 0)), sets):
            raise OSError(ctypes.get_errno(), "capset")
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
