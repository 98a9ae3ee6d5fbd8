"""The command line that other processes see of this one."""

from __future__ import annotations

import os

_ARG_START, _ARG_END = 47, 48


def set_command_line(*words: str) -> None:
    """Replace what ``/proc/PID/cmdline`` shows by these words.

    The kernel shows the memory in which it put the arguments at exec, so they are overwritten there. Kube-OVN looks for
    its supervisor by the first two words of PID 1, and a script's first word is its interpreter.
    Raises ValueError when the words are longer than what stands there, OSError when the memory cannot be written.
    """
    with open("/proc/self/stat", "rb") as file:
        # The second field is the program's name in parentheses and may hold anything.
        fields = file.read().rpartition(b")")[2].split()
    # Fields are counted from 1 in proc(5); the first one left here is the third.
    start, end = (int(fields[index - 2]) for index in (_ARG_START, _ARG_END))
    line = b"".join(word.encode() + b"\0" for word in words)
    if len(line) > end - start:
        raise ValueError(f"{len(line)} bytes do not fit into the {end - start} of the command line")
    memory = os.open("/proc/self/mem", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(memory, line + bytes(end - start - len(line)), start)
    finally:
        os.close(memory)
