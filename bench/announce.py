"""A thousand EIPs at once: how soon each is on the wire, and how much at once the network gets."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left

from wire import Capture, Frame

from bench import scenes
from bench.bed import OWN, gateway
from bench.bulk import put
from bench.report import Figure, Report
from bench.scale import Scale

WINDOW = 0.010
"""Seconds in which the most frames are counted."""
NOTES = (
    "One PUT of the EIPs. Times are the kernel's when a frame reached the other end of the cable, counted from the "
    "start of the request."
)


def announce(scale: Scale) -> Report:
    """From the request to every EIP's first frame, and to the answer."""
    count = scale.pick(1000, 1000, 20)
    report = Report("announce", f"How long do {count:,} EIPs take to be announced?", "milliseconds", NOTES)
    quiet = scale.pick(3.0, 3.0, 1.5)
    everyone, answered, peaks, frames = [], [], [], []
    with gateway(polled=False) as made:
        for _ in range(scale.pick(5, 3, 1)):
            made.put(scenes.spec(eips=0))
            capture = Capture(made.bed.outside, "west")
            caught: list[Frame] = []
            listener = threading.Thread(target=lambda into=caught, by=capture: into.extend(by.rest(quiet)))
            begun = time.time()
            listener.start()
            answered.append(put(made, scenes.spec(eips=count)))
            listener.join()
            made.bed.outside.close_sockets()
            at = [(address, frame.at) for frame in caught if (address := frame.announces()[0]) != OWN]
            firsts: dict[str, float] = {}
            for address, when in at:
                firsts.setdefault(address, when)
            if len(firsts) != count:
                raise RuntimeError(f"{len(firsts)} of {count} EIPs were announced")
            everyone.append(1000 * (max(firsts.values()) - begun))
            peaks.append(float(peak([when for _, when in at])))
            frames.append(len(at) / count)
    report.figures = [
        Figure("until the answer", tuple(answered)),
        Figure("until every EIP has been announced", tuple(everyone)),
    ]
    report.limit(f"{count:,} EIPs announced", everyone, at_most=1000, unit="ms")
    report.limit("most frames in 10 ms", peaks, at_most=count / 10, unit="frames")
    report.limit("frames for each EIP", frames, at_most=3, unit="frames")
    return report


def peak(times: list[float]) -> int:
    """The most frames within any window."""
    times = sorted(times)
    return max(bisect_left(times, when + WINDOW) - number for number, when in enumerate(times))
