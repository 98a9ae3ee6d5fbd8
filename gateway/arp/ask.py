"""Ask by ARP who holds an address: is the gateway there, and does it know us?

The question itself tells the one asked where we are (RFC 826: the sender's pair of addresses is merged into its
table), so it serves a gateway that takes no notice of announcements.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from ipaddress import IPv4Address

from gateway.arp import link as links
from gateway.arp.frame import UNSPECIFIED, MalformedFrame, parse, request
from gateway.arp.wire import ArpListener, ArpSender

PATIENCE = 1.0
"""Seconds in all; an answer comes within milliseconds, or a link is only just coming up."""
TRIES = 3
PACE = 0.001
"""Seconds between two of many questions."""


async def ask(interface: str, source: IPv4Address, target: IPv4Address, *, patience: float = PATIENCE) -> bytes | None:
    """The hardware address that answers for ``target``, or None: no answer in ``patience`` seconds, or no link.

    Never raises for the link's sake.
    """
    with contextlib.suppress(OSError, TimeoutError):
        link = links.read(interface)
        if link is not None and link.can_announce:
            question = request(link.mac, source, target)
            return await _ask(interface, question, target, patience)
    return None


async def holders(
    interface: str, targets: Iterable[IPv4Address], *, patience: float = PATIENCE
) -> dict[IPv4Address, tuple[str, ...]]:
    """Everybody who answers for these addresses within ``patience`` seconds, by hardware address; none: nobody did.

    The questions are ARP probes (RFC 5227, 1.1), which say nothing of us and change nobody's table. So many at once
    are paced a little, for receivers have short queues. Never raises for the link's sake.
    """
    wanted = dict.fromkeys(targets)
    heard: dict[IPv4Address, dict[str, None]] = {target: {} for target in wanted}
    with contextlib.suppress(OSError):
        link = links.read(interface)
        if link is not None and link.can_announce and wanted:
            await _probe(interface, link.mac, heard, patience)
    return {target: tuple(macs) for target, macs in heard.items()}


async def _probe(interface: str, mac: bytes, heard: dict[IPv4Address, dict[str, None]], patience: float) -> None:
    loop = asyncio.get_running_loop()
    with contextlib.closing(ArpListener(interface)) as listener, contextlib.closing(ArpSender(interface)) as sender:

        def hear() -> None:
            with contextlib.suppress(OSError):
                while (frame := listener.receive()) is not None:
                    with contextlib.suppress(MalformedFrame):
                        said = parse(frame)
                        if said.sender_ip in heard and said.sender_mac != mac:
                            heard[said.sender_ip][said.sender_mac.hex(":")] = None

        loop.add_reader(listener.fileno(), hear)
        try:
            for _ in range(TRIES):
                for target in heard:
                    sender.send(request(mac, UNSPECIFIED, target))
                    await asyncio.sleep(PACE)
                await asyncio.sleep(patience / TRIES)
        finally:
            loop.remove_reader(listener.fileno())


async def _ask(interface: str, question: bytes, target: IPv4Address, patience: float) -> bytes:
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[bytes] = loop.create_future()
    with contextlib.closing(ArpListener(interface)) as listener, contextlib.closing(ArpSender(interface)) as sender:

        def heard() -> None:
            try:
                while not answer.done() and (frame := listener.receive()) is not None:
                    if (mac := _holder(frame, target)) is not None:
                        answer.set_result(mac)
            except OSError as error:
                if not answer.done():
                    answer.set_exception(error)

        loop.add_reader(listener.fileno(), heard)
        try:
            for _ in range(TRIES):
                sender.send(question)
                await asyncio.wait([answer], timeout=patience / TRIES)
                if answer.done():  # also where this process stood still for longer
                    return answer.result()
            raise TimeoutError
        finally:
            loop.remove_reader(listener.fileno())


def _holder(frame: bytes, target: IPv4Address) -> bytes | None:
    """Who says in this frame that it holds ``target``."""
    try:
        said = parse(frame)
    except MalformedFrame:
        return None
    return said.sender_mac if said.sender_ip == target else None
