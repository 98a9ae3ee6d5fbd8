"""Netlink as the drivers need it: many requests in one datagram, dumps read fast, errors in the kernel's words.

pyroute2 knows the messages and encodes them. Its sockets are not used: each brings an asyncio event loop of
its own and raises inside a running one. Nor is its decoder for dumps: it takes 42 ms for 1,000 addresses and
10 s for 200,000 conntrack entries, where reading the few attributes of interest takes a fraction of that.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP = 0x300
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400

_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NLM_F_DUMP_INTR = 0x10
_NLM_F_CAPPED = 0x100
_NLM_F_ACK_TLVS = 0x200
_NLMSGERR_ATTR_MSG = 1
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33  # asm-generic/socket.h: both architectures of the image
_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_NETLINK_GET_STRICT_CHK = 12

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_TYPE_MASK = 0x3FFF  # the upper bits say "nested" and "network byte order"
_DATAGRAM = 1 << 18
_RECEIVE_BUFFER = 1 << 22
_SEND_BUFFER = 1 << 16  # less than a socket takes without being asked
_BATCH = 128  # as many acknowledgements as surely fit the receive buffer, even where it may not be enlarged
_TIMEOUT = 10.0  # seconds; the kernel answers within the call, this only bounds a wait for an answer that was lost
_DUMP_TRIES = 5


class Message(NamedTuple):
    """A request: its type, the flags besides NLM_F_REQUEST, and what follows the netlink header."""

    kind: int
    flags: int
    body: bytes


def body(message: Any) -> bytes:
    """A pyroute2 message as bytes, without the netlink header."""
    message.encode()
    return bytes(message.data[_HEADER.size :])


@dataclass(frozen=True, slots=True)
class NetlinkError:
    """The kernel's refusal of one request: the errno and its words."""

    code: int
    words: str


class Netlink:
    """One netlink socket of the calling thread's network namespace, opened at the first use.

    Not thread-safe. Raises OSError where the conversation itself fails.
    """

    def __init__(self, protocol: int) -> None:
        self._protocol = protocol
        self._opened: socket.socket | None = None
        self._sequence = 0

    def close(self) -> None:
        """Give the descriptor back; the next request opens a new one."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def request(self, messages: Sequence[Message]) -> list[NetlinkError | None]:
        """Send the messages and have each acknowledged; the kernel's answers in the order of the messages.

        The kernel takes each message for itself: one that it refuses does not keep it from the next.
        """
        results: list[NetlinkError | None] = []
        for start in range(0, len(messages), _BATCH):
            results += self._batch(messages[start : start + _BATCH])
        return results

    def refusals(self, messages: Sequence[Message]) -> list[NetlinkError]:
        """Send the messages and have only the last of each batch acknowledged; what the kernel refused, in order.

        Cheaper than ``request`` where hardly any is refused: an acknowledgement costs as much as a small request.
        """
        refused: list[NetlinkError] = []
        for start in range(0, len(messages), _BATCH):
            refused += filter(None, self._batch(messages[start : start + _BATCH], each=False))
        return refused

    def _batch(self, messages: Sequence[Message], *, each: bool = True) -> list[NetlinkError | None]:
        first, last = self._sequence + 1, self._sequence + len(messages)
        flags = [NLM_F_ACK if each else 0] * (len(messages) - 1) + [NLM_F_ACK]
        datagram = b"".join(map(self._encoded, messages, flags))
        answers: dict[int, NetlinkError | None] = {}
        with self._conversation() as talk:
            talk.send(datagram)
            while last not in answers:  # the kernel answers in order
                for kind, said_flags, sequence, said in _messages(talk.recv(_DATAGRAM)):
                    if kind == _NLMSG_ERROR and first <= sequence <= last:
                        answers[sequence] = _error(said_flags, said)
        return [answers.get(sequence) for sequence in range(first, last + 1)]

    def transact(
        self, begin: Message, messages: Sequence[Message], end: Message, *, unanswered: Iterable[Message] = ()
    ) -> list[memoryview | None]:
        """Send the messages as one batch between two others, which the kernel takes whole or not at all.

        Returns for each message the object that the kernel echoed (NLM_F_ECHO). Of the ``unanswered`` ones, which come
        after these, only the last is acknowledged: so many answers would not fit. Nothing is sent before all of them
        are there. Raises OSError with the errno and the words of the first that the kernel refused, or of ``begin``.
        """
        opening = self._sequence + 1
        datagram = bytearray(self._encoded(begin, 0))  # 23 MiB for 50,000 rules: it is not copied
        for message in messages:
            datagram += self._encoded(message, NLM_F_ACK)
        awaited = set(range(opening + 1, self._sequence + 1))
        before: Message | None = None
        for message in unanswered:
            if before is not None:
                datagram += self._encoded(before, 0)
            before = message
        if before is not None:
            datagram += self._encoded(before, NLM_F_ACK)
            awaited.add(self._sequence)
        datagram += self._encoded(end, 0)
        answers: dict[int, NetlinkError | None] = {}
        echoed: dict[tuple[int, int], memoryview] = {}
        with self._conversation() as talk:
            if len(datagram) > _SEND_BUFFER:
                _try_option(talk, socket.SOL_SOCKET, _SO_SNDBUFFORCE, 2 * len(datagram))
            talk.send(datagram)
            while not awaited <= answers.keys() and opening not in answers:
                for kind, flags, sequence, said in _messages(talk.recv(_DATAGRAM)):
                    if kind != _NLMSG_ERROR:
                        echoed[kind, sequence] = said
                    elif opening <= sequence <= self._sequence:
                        answers[sequence] = _error(flags, said)
        for refusal in (answers[sequence] for sequence in sorted(answers)):
            if refusal is not None:
                raise OSError(refusal.code, refusal.words)
        return [echoed.get((message.kind, opening + 1 + i)) for i, message in enumerate(messages)]

    def get(self, message: Message) -> memoryview | None:
        """The body of the one object that is asked for; raises OSError with the kernel's errno if it refuses."""
        said = self.ask(message)
        return said[-1] if said else None

    def dump(self, message: Message) -> list[memoryview]:
        """The bodies (after the netlink header) of all messages of a dump that nothing disturbed.

        Raises OSError with the kernel's errno if it refuses; EAGAIN if the table never stood still.
        """
        return self.listed(message, _itself)

    def listed(self, message: Message, read: Callable[[memoryview], T]) -> list[T]:
        """As ``dump``, with what ``read`` makes of each body: of 50,000 rules the bodies take 30 MiB."""
        for _ in range(_DUMP_TRIES):
            try:
                return [read(said) for said in self.stream(message)]
            except _Interrupted:
                continue
        raise OSError(errno.EAGAIN, "the table changed while it was read")

    def stream(self, message: Message) -> Iterator[memoryview]:
        """The bodies of the messages of a dump as they come; no other request may be made before its end."""
        return self._answers(self._encoded(message, NLM_F_DUMP))

    def ask(self, message: Message) -> list[memoryview]:
        """The bodies of the answers to one request, no dump. Raises OSError with the kernel's errno if it refuses."""
        return list(self._answers(self._encoded(message, NLM_F_ACK)))

    def _answers(self, request: bytes) -> Iterator[memoryview]:
        interrupted, refusal, ended = 0, None, False
        with self._conversation() as talk:
            talk.send(request)
            while not ended:
                for kind, flags, sequence, said in _messages(talk.recv(_DATAGRAM)):
                    if sequence != self._sequence:
                        continue
                    interrupted |= flags & _NLM_F_DUMP_INTR
                    if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                        refusal, ended = _error(flags, said), True
                        break
                    yield said
        # Told outside of the conversation, which has ended well: with the socket nf_tables would give back all that
        # was ever deleted, and wait for it (10 ms).
        if refusal is not None:
            raise OSError(refusal.code, refusal.words)
        if interrupted:
            raise _Interrupted

    def _encoded(self, message: Message, flags: int) -> bytes:
        self._sequence += 1
        length = _HEADER.size + len(message.body)
        header = _HEADER.pack(length, message.kind, message.flags | flags | NLM_F_REQUEST, self._sequence, 0)
        return header + message.body + bytes(-length % 4)

    def _conversation(self) -> _Conversation:
        if self._opened is None:
            self._opened = _open(self._protocol)
        return _Conversation(self, self._opened)


def _itself(said: memoryview) -> memoryview:
    return said


class _Interrupted(Exception):
    """What was dumped changed in the meantime: an object may be missing or there twice."""


class _Conversation:
    """A socket in use: whatever breaks off in the middle leaves answers behind, so the socket is given up."""

    def __init__(self, owner: Netlink, opened: socket.socket) -> None:
        self._owner = owner
        self._socket = opened

    def __enter__(self) -> socket.socket:
        return self._socket

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._owner.close()


def _open(protocol: int) -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    try:
        opened.settimeout(_TIMEOUT)
        for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK):
            _try_option(opened, _SOL_NETLINK, option, 1)
        receive_buffer(opened)
        opened.bind((0, 0))
    except OSError:
        opened.close()
        raise
    return opened


def receive_buffer(opened: socket.socket) -> None:
    """Make room for many messages: 4 MiB, where that is allowed."""
    _try_option(opened, socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)


def _try_option(opened: socket.socket, level: int, option: int, value: int) -> None:
    # Each is a help that older kernels lack (or a privilege that is missing); all works without it.
    try:
        opened.setsockopt(level, option, value)
    except OSError as error:
        if error.errno not in (errno.ENOPROTOOPT, errno.EPERM):
            raise


def _messages(datagram: bytes) -> Iterator[tuple[int, int, int, memoryview]]:
    """(type, flags, sequence, body) of each message in a datagram."""
    view = memoryview(datagram)
    position = 0
    while position + _HEADER.size <= len(view):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(view, position)
        if length < _HEADER.size:
            return
        yield kind, flags, sequence, view[position + _HEADER.size : position + length]
        position += (length + 3) & ~3


def messages(datagram: bytes) -> Iterator[tuple[int, memoryview]]:
    """(type, body) of each message in a datagram."""
    for kind, _, _, said in _messages(datagram):
        yield kind, said


def _error(flags: int, said: memoryview) -> NetlinkError | None:
    """What an NLMSG_ERROR (or the end of a dump) says; None for an acknowledgement."""
    if len(said) < 4:
        return None
    (code,) = struct.unpack_from("=i", said)
    if code >= 0:
        return None
    words = os.strerror(-code)
    if flags & _NLM_F_ACK_TLVS:
        # The request's header is echoed before the attributes; with NETLINK_CAP_ACK its payload is not.
        echoed = _HEADER.unpack_from(said, 4)[0] if not flags & _NLM_F_CAPPED else _HEADER.size
        message = attributes(said, 4 + ((echoed + 3) & ~3)).get(_NLMSGERR_ATTR_MSG)
        if message is not None:
            words = f"{text(message)} ({words})"
    return NetlinkError(-code, words)


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(payload), kind) + payload + bytes(-len(payload) % 4)


def attributes(data: memoryview, start: int = 0) -> dict[int, memoryview]:
    """Attributes by type, from ``start`` to the end of ``data``; of two with one type the later."""
    found: dict[int, memoryview] = {}
    end = len(data)
    while start + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        if length < 4:
            break
        found[kind & _TYPE_MASK] = data[start + 4 : start + length]
        start += (length + 3) & ~3
    return found


def text(value: memoryview) -> str:
    """A zero-terminated string attribute."""
    return bytes(value).rstrip(b"\0").decode(errors="replace")


def u32(value: memoryview) -> int:
    """A 32-bit attribute in host byte order."""
    return int.from_bytes(value[:4], "little" if _LITTLE else "big")


_LITTLE = struct.pack("=H", 1) == b"\1\0"
