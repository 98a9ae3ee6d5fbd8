"""The wire between nat-gateway.sh's client and the daemon, and what a caller gets back. Pure.

In NUL-terminated fields, the client shutting down its sending side at the end::

    request:  natgw-exec/1, inode of the caller's network namespace, NAME=value ..., (empty), word ...
    reply:    exit code, stdout, stderr

How Kube-OVN's controllers read a result: an exit code other than 0 is a failure; with exit code 0 any byte on
stderr is one, too (newer ones tolerate lines that start with ``Warning:``). So success is silent on stderr.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MAGIC = "natgw-exec/1"
LONGEST_LINE = 1000
"""Characters; what a caller is told repeats its words, which may be of any length."""


class BadRequest(ValueError):
    """Bytes that are not a request, or a word that is not a rule; the message says what is wrong with it."""


@dataclass(frozen=True)
class Request:
    """One call of the script: where it came from, the environment values that matter, its words."""

    namespace: int
    environment: Mapping[str, str]
    words: tuple[str, ...]

    def encode(self) -> bytes:
        """The bytes that the client sends."""
        values = (f"{name}={value}" for name, value in self.environment.items())
        return _fields(MAGIC, str(self.namespace), *values, "", *self.words)


@dataclass(frozen=True)
class Reply:
    """What the caller gets: the script's exit code and its two outputs."""

    code: int = 0
    stdout: str = ""
    stderr: str = ""

    def encode(self) -> bytes:
        """The bytes that the daemon answers."""
        return _fields(str(self.code), self.stdout.replace("\0", ""), self.stderr.replace("\0", ""))


def _fields(*fields: str) -> bytes:
    return b"".join(field.encode(errors="backslashreplace") + b"\0" for field in fields)


def decode_request(data: bytes) -> Request:
    r"""The request in these bytes; what is no UTF-8 becomes ``\xNN``. Raises BadRequest."""
    fields = data.decode(errors="backslashreplace").split("\0")
    if fields[0] != MAGIC or fields.pop() != "" or "" not in fields:
        raise BadRequest(f"not a {MAGIC} request")
    end = fields.index("")
    if end < 2 or not (fields[1].isascii() and fields[1].isdigit() and len(fields[1]) <= 20):  # an inode: 64 bits
        raise BadRequest(f"not a {MAGIC} request: no network namespace")
    pairs = (field.partition("=") for field in fields[2:end])
    return Request(int(fields[1]), {name: value for name, _, value in pairs}, tuple(fields[end + 1 :]))


def decode_reply(data: bytes) -> Reply:
    """The reply in these bytes. Raises BadRequest where they break off."""
    fields = data.decode().split("\0")
    if len(fields) != 4 or fields.pop() != "":
        raise BadRequest("the reply breaks off")
    return Reply(int(fields[0]), fields[1], fields[2])


def success(text: str = "") -> Reply:
    """Exit code 0 and nothing on stderr."""
    return Reply(stdout=text)


def failure(text: str) -> Reply:
    """Exit code 1 and one line on stderr."""
    return Reply(code=1, stderr=one_line(text) + "\n")


def conflict(text: str) -> Reply:
    """Exit code 1 and what stands in the way; the scripts since release 1.16 say this on stdout."""
    return Reply(code=1, stdout=one_line(text) + "\n")


def one_line(text: str) -> str:
    """The lines of ``text`` joined, control characters escaped; of what is very long the beginning and the end."""
    joined = "; ".join(line.strip() for line in text.splitlines() if line.strip())
    if len(joined) > LONGEST_LINE:
        joined = f"{joined[: LONGEST_LINE // 2]} ... {joined[-LONGEST_LINE // 2 :]}"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in joined)
