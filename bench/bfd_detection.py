"""How long we, and FRR in the same session, take to notice that the other went silent; and whether load makes us flap.

    .venv/bin/python bench/bfd_detection.py [--runs N] [--intervals MS ...] [--saturate SECONDS]

Our speaker and FRR's bfdd are on the two ends of a cable, with one session over IPv4 and one over IPv6. The packets of
one of them are dropped before they reach the cable; what is measured, on the cable, is the time from the last packet
of the silent one to the first packet of the other that says Down because the detection time expired. With --saturate
a busy process runs for every core meanwhile, and only changes of state are counted. Needs root.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / "netns-tests"), str(Path(__file__).parent.parent)]

from netns import Namespace, require, veth  # noqa: E402 -- found by the line above
from test_bfd_peers import OURS, THEIRS, Frr, Pair, Speaker, wait_until  # noqa: E402
from test_bfd_saturated import TIMER  # noqa: E402

from gateway.bfd.packet import ControlPacket, Diag, State, decode  # noqa: E402

SO_TIMESTAMPNS = 35
Seen = tuple[float, str, ControlPacket]
"""When a packet passed, its source address, and itself."""


class Tap:
    """BFD packets that pass an interface, with the kernel's time."""

    def __init__(self, netns: Namespace, device: str) -> None:
        with netns.entered():
            self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self.socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self.socket.bind((device, 0))

    def listen(self, seconds: float) -> Iterator[Seen]:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and select.select([self.socket], [], [], left)[0]:
            frame, ((_, _, stamp),), _, _ = self.socket.recvmsg(2048, 64)
            if frame[12:14] == b"\x08\x00" and frame[23] == socket.IPPROTO_UDP:
                source, udp = socket.inet_ntoa(frame[26:30]), 14 + (frame[14] & 15) * 4
            elif frame[12:14] == b"\x86\xdd" and frame[20] == socket.IPPROTO_UDP:
                source, udp = socket.inet_ntop(socket.AF_INET6, frame[22:38]), 54
            else:
                continue
            packet = decode(frame[udp + 8 :])
            if frame[udp + 2 : udp + 4] == (3784).to_bytes(2, "big") and isinstance(packet, ControlPacket):
                whole, nanoseconds = struct.unpack("qq", stamp[:16])
                yield whole + nanoseconds / 1e9, source, packet

    def detection(self, silent: tuple[str, ...], noticing: tuple[str, ...], seconds: float) -> list[float]:
        """Seconds from the last packet of each silent address to the word of the address that notices it."""
        peers = dict(zip(noticing, silent, strict=True))
        last: dict[str, float] = {}
        found: dict[str, float] = {}
        for at, source, packet in self.listen(seconds):
            last[source] = at
            expired = packet.state is State.DOWN and packet.diag == Diag.DETECTION_TIME_EXPIRED
            if expired and source in peers and source not in found:
                found[source] = at - last[peers[source]]
            if len(found) == len(peers):
                break
        return list(found.values())


@contextmanager
def world() -> Iterator[Pair]:
    ours, theirs = Namespace(), Namespace()
    with tempfile.TemporaryDirectory(prefix="bfd-") as top:
        os.chmod(top, 0o755)
        directories = [Path(top) / name for name in ("ours", "theirs")]
        for directory in directories:
            directory.mkdir()
        pair = Pair(Speaker(ours, directories[0]), Frr(theirs, directories[1]))
        try:
            veth(ours, "va", theirs, "vb")
            for netns, device, addresses in ((ours, "va", OURS), (theirs, "vb", THEIRS)):
                netns.run("ip", "address", "add", f"{addresses[0]}/24", "dev", device)
                netns.run("ip", "address", "add", f"{addresses[1]}/64", "dev", device, "nodad")
            yield pair
        finally:
            pair.speaker.end()
            pair.peer.end()
            ours.remove()
            theirs.remove()


def silence(netns: Namespace) -> None:
    chain = "{ type filter hook output priority -400; }"
    netns.run("nft", f"add table inet cut; add chain inet cut out {chain}; add rule inet cut out udp dport 3784 drop")


def detections(pair: Pair, interval: int, runs: int) -> None:
    budget = 3 * interval
    for name, side, silent, noticing in (
        ("ours", pair.peer, THEIRS, OURS),
        ("FRR's", pair.speaker, OURS, THEIRS),
    ):
        measured: list[float] = []
        for _ in range(runs):
            wait_until(lambda: pair.both("Up"), "both are Up")
            # FRR announces a second while Down; what it wants when Up must have arrived.
            wait_until(lambda: pair.peer.sees(interval, interval, 3), "the intervals are agreed upon")
            tap = Tap(pair.speaker.netns, "va")
            time.sleep(0.5)
            silence(side.netns)
            measured += [1000 * one for one in tap.detection(silent, noticing, 5)]
            tap.socket.close()
            side.netns.run("nft", "delete", "table", "inet", "cut")
        late = sum(one > 1.1 * budget for one in measured)
        print(
            f"3 x {interval:3} ms  {name:6} {len(measured):3} detections: least {min(measured):6.1f}  "
            f"median {statistics.median(measured):6.1f}  most {max(measured):6.1f} ms  "
            f"({max(measured) / budget:.2f} of {budget} ms; {late} above 1.1)",
            flush=True,
        )


def saturate(pair: Pair, seconds: int) -> None:
    """Count changes of state; and tell whose packets were late at worst, for either side may be the cause, or the
    machine, which then holds up a bare timer, too."""
    wait_until(lambda: pair.both("Up"), "both are Up")
    # As another container's: like those of the speakers, their session is a group of its own to the scheduler.
    burner = [sys.executable, "-c", "while True: pass"]
    burners = [subprocess.Popen(burner, start_new_session=True) for _ in range(os.cpu_count() or 1)]
    timer = subprocess.Popen(
        [sys.executable, "-c", TIMER, str(seconds + 1)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    tap = Tap(pair.speaker.netns, "va")
    try:
        time.sleep(1)
        before, begin = pair.speaker.changes(), time.monotonic()
        last: dict[str, float] = {}
        longest = {"ours": 0.0, "FRR's": 0.0}
        for at, source, _ in tap.listen(seconds):
            whose = "ours" if source in OURS else "FRR's"
            longest[whose] = max(longest[whose], at - last.get(source, at))
            last[source] = at
        ran = time.monotonic() - begin
        changes = [line for line in pair.speaker.log.read_text().splitlines() if " -> " in line][before:]
        gaps = ", ".join(f"{whose} {1000 * gap:.0f} ms" for whose, gap in longest.items())
        print(f"{len(burners)} busy processes, {ran:.0f} s at 3 x 50 ms: {len(changes)} changes of state", flush=True)
        held_up = 1000 * float(timer.communicate(timeout=30)[0])
        print(f"longest time between two packets: {gaps}; a bare timer was late by {held_up:.0f} ms at worst")
        print(*changes, sep="\n", end="\n" if changes else "")
    finally:
        tap.socket.close()
        timer.kill()
        timer.wait()
        for burner_process in burners:
            burner_process.send_signal(signal.SIGKILL)
            burner_process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--intervals", type=int, nargs="+", default=[50, 100])
    parser.add_argument("--saturate", type=int, default=0, metavar="SECONDS")
    chosen = parser.parse_args()
    require("ip", "nft", *Frr.needs)
    if chosen.saturate:
        with world() as pair:
            pair.speaker.start(50, 50, 3)
            pair.peer.start(50, 50, 3)
            saturate(pair, chosen.saturate)
        return
    for interval in chosen.intervals:
        with world() as pair:
            pair.speaker.start(interval, interval, 3)
            pair.peer.start(interval, interval, 3)
            detections(pair, interval, chosen.runs)


if __name__ == "__main__":
    main()
