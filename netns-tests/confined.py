"""A gateway that has no more than it needs: two capabilities, a read-only /proc/sys, and the example's system calls.

Run as a program it confines itself so, then becomes what its arguments say: ``confined.py PROFILE -- PROGRAM ...``.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CAPABILITIES = ("net_admin", "net_raw")
BITS = 1 << 12 | 1 << 13  # the same in linux/capability.h
PROFILE = Path(__file__).parent.parent / "deploy/security/seccomp.json"
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000  # seccomp.h of libseccomp
_MASKED_EQ = 7
_UNKNOWN = -1  # a system call of another architecture, or of a newer kernel


class _Compare(ctypes.Structure):
    """``struct scmp_arg_cmp``."""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def confinement() -> Sequence[str]:
    """The words that go before a program's own."""
    return "unshare", "--mount", "--propagation", "private", sys.executable, __file__, str(PROFILE), "--"


def load(profile: Path) -> None:
    """Install a profile in the form of the OCI runtime specification: what it does not allow fails."""
    said = json.loads(profile.read_text())
    assert said["defaultAction"] == "SCMP_ACT_ERRNO"
    lib = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    lib.seccomp_init.restype = ctypes.c_void_p
    program = ctypes.c_void_p(lib.seccomp_init(ctypes.c_uint32(_ERRNO | said["defaultErrnoRet"])))
    for group in said["syscalls"]:
        action = _ALLOW if group["action"] == "SCMP_ACT_ALLOW" else _ERRNO | group["errnoRet"]
        compared = [_compare(arg) for arg in group.get("args", ())]
        array = (_Compare * len(compared))(*compared)
        for name in group["names"]:
            number = lib.seccomp_syscall_resolve_name(name.encode())
            rule = (program, ctypes.c_uint32(action), number, len(compared), array)
            if number != _UNKNOWN and lib.seccomp_rule_add_array(*rule):
                raise OSError(f"seccomp: {name}")
    if lib.seccomp_load(program):
        raise OSError("seccomp: the kernel does not take the profile")


def _compare(arg: Mapping[str, Any]) -> _Compare:
    assert arg["op"] == "SCMP_CMP_MASKED_EQ"
    return _Compare(arg["index"], _MASKED_EQ, arg["value"], arg["valueTwo"])


def main(profile: Path, words: Sequence[str]) -> None:
    subprocess.run(["mount", "--bind", "-o", "ro", "/proc/sys", "/proc/sys"], check=True)
    kept = ",".join(["-all", *(f"+{name}" for name in CAPABILITIES)])
    load(profile)
    argv = ["setpriv", "--bounding-set", kept, "--inh-caps", kept, "--no-new-privs", *words]
    os.execvp(argv[0], argv)


def status(pid: int) -> Mapping[str, str]:
    """The lines of /proc/PID/status by name (proc(5))."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3:])
