"""The composition root: the only place where the real kernel's drivers are made.

``python -m api.main`` (or ``natgw serve``) is the daemon of one network namespace. It answers verbs on
``exec.sock`` before it imports the HTTP face, which takes several times as long to load.
"""

from __future__ import annotations

import asyncio
import fcntl
import importlib
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

from pydantic import ValidationError

from api import execbalancer
from api.directories import own
from api.execserver import ExecServer
from api.listen import METRICS_LISTEN, check_listen, check_place
from api.logs import log_to
from api.memory import one_heap, spare_what_stays, uncollected
from api.settings import BadSetting, Settings, interfaces_file
from api.watching import Watching
from gateway.arp.announcer import Announcer
from gateway.arp.ask import ask
from gateway.arp.conflict import Conflict
from gateway.drift import Drift
from gateway.journal import Journal
from gateway.kernel.conntrack import KernelFlows
from gateway.kernel.evidence import Events, evidence
from gateway.kernel.generation import Generation
from gateway.kernel.links import KernelLinks
from gateway.kernel.maps import KernelMaps
from gateway.kernel.nft import KernelNft
from gateway.kernel.restore import RestoreFirewall
from gateway.kernel.shaper import KernelShaper
from gateway.kernel.surroundings import KernelSurroundings
from gateway.kernel.tcstats import shaped
from gateway.kernel.variant import choose, iptables_version
from gateway.ports import Firewall, Joint, Refused, Variant
from gateway.remembered import Memories, RememberedFirewall
from gateway.service import Service
from gateway.store import Store
from gateway.transaction import Kernel
from gateway.watch import Watch, WatchedFirewall, WatchedJoint, WatchedLinks, WatchedMaps, WatchedNft, WatchedShaper
from rules.desired import Facts
from rules.inputguard import guard_chain
from rules.spec import Interfaces

log = logging.getLogger("natgw")

DESCRIPTORS = 8192
"""Open files: callers that stall on one face must leave some for the others. Many systems give 1024 unless asked."""


class AlreadyRunning(Exception):
    """Another daemon holds the run directory."""


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time()


def main() -> int:
    """Run the daemon until SIGTERM or SIGINT; returns the exit code."""
    one_heap()
    try:
        settings = Settings.from_environment(os.environ)
        settings.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        told = [line for path in (settings.run_dir, settings.state_dir) if path.exists() for line in own(path)]
        log_to(settings.run_dir / "natgw.log", settings.log)
        for line in told:
            log.warning("%s", line)
        _more_descriptors()
        _check_listening(settings)  # before anything starts, not in the midst of it
        with _only_one(settings.run_dir):
            asyncio.run(_serve(settings))
    except (BadSetting, AlreadyRunning, ValidationError, OSError) as error:
        log.error("%s", error)
        return 1
    return 0


def _more_descriptors() -> None:
    """Raise the soft limit of open files, as far as the hard one allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < DESCRIPTORS:
        wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _check_listening(settings: Settings) -> None:
    """Refuse to start where the daemon is asked to listen for whom it must not; raises CannotListen."""
    if settings.listen:
        check_listen(settings.listen, settings.token_file, mutual_tls=settings.exposure.mutual)
        if settings.exposure.tls:
            settings.exposure.tls.load()
    sides = _interfaces(settings)
    places = {"NATGW_LISTEN": settings.listen, METRICS_LISTEN: settings.metrics_listen}
    for name, place in places.items():
        if place and not settings.exposure.anywhere:
            # While nobody has named the two sides, the face looks again at every connection.
            check_place(place, (sides.vpc, sides.external) if sides else (), name)


def _only_one(run_dir: Path) -> TextIO:
    """Hold the run directory's lock for as long as the returned file is open."""
    lock = (run_dir / "natgw.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise AlreadyRunning(f"another daemon serves {run_dir}") from None
    return lock


def real_kernel(settings: Settings, events: Events) -> tuple[Kernel, Watch]:
    """The drivers; for the writer's thread, in whose network namespace they open their sockets."""
    firewall, maps, joint = _netfilter(settings, generation := Generation())
    links, shaper, nft = KernelLinks(), KernelShaper(), KernelNft(generation)
    watch = Watch(evidence(firewall.variant, events))
    kernel = Kernel(
        WatchedFirewall(firewall, watch),
        WatchedLinks(links, watch),
        KernelFlows(),
        WatchedNft(nft, watch),
        WatchedShaper(shaper, watch),
        firewall6=_firewall6(settings, firewall.variant),
        maps=WatchedMaps(maps, watch),
        joint=WatchedJoint(joint, watch) if joint else None,
        tables6=("mangle",),
        memory=Memories(firewall, (links, shaper, maps, nft)),
    )
    return replace(kernel, around=KernelSurroundings(firewall.variant)), watch


def _netfilter(settings: Settings, generation: Generation) -> tuple[RememberedFirewall, KernelMaps, Joint | None]:
    """The drivers of the variant chosen; only that one is loaded.

    It is loaded here, before any thread runs: Python before 3.11.4 can deadlock when two threads import at once,
    and the HTTP face is imported by one while the writer already works.
    """
    if choose(settings.iptables) == "legacy":
        from gateway.kernel.legacy import LegacyFirewall  # noqa: PLC0415

        return RememberedFirewall(LegacyFirewall()), KernelMaps("legacy", generation), None
    from gateway.kernel.joint import KernelJoint  # noqa: PLC0415
    from gateway.kernel.nft_variant import NftVariantFirewall  # noqa: PLC0415

    driver = NftVariantFirewall(generation)
    firewall, maps = RememberedFirewall(driver), KernelMaps("nft", generation)
    return firewall, maps, KernelJoint(driver, firewall, maps)


def _firewall6(settings: Settings, variant: Variant) -> Firewall | None:
    """The driver of IPv6's tables, where these shall hold something or hold something from an earlier run.

    Asking for a legacy table loads it, and a loaded table stands in the way of every packet.
    """
    driver = RestoreFirewall(variant, 6)
    if settings.input is not None:
        if Path("/proc/net/if_inet6").exists():
            return driver
        log.info("IPv6 is off: NATGW_INPUT=protect is about IPv4 alone")
        return None
    loaded = Path("/proc/net/ip6_tables_names")  # of this network namespace
    if variant == "legacy" and not (loaded.exists() and "mangle" in loaded.read_text().split()):
        return None
    try:
        left = guard_chain(6)[0] in driver.read(("mangle",)).chains
    except Refused:
        return None  # no such tables: nothing is left in them
    return driver if left else None


def _interfaces(settings: Settings) -> Interfaces | None:
    """The names that ``init`` left in the env file, else those of the environment; None where neither has any.

    Then a gateway that is adopted from the kernel takes them from its rules, and only a new one the usual ones.
    """
    said = dict(os.environ) | interfaces_file(settings.env_file)
    names = {"vpc": said.get("VPC_INTERFACE"), "external": said.get("EXTERNAL_INTERFACE")}
    return (
        Interfaces.model_validate({side: name for side, name in names.items() if name}) if any(names.values()) else None
    )


async def _serve(settings: Settings) -> None:
    clock = SystemClock()
    journal = Journal(clock)
    announcer = Announcer(clock, on_conflict=partial(_note_conflict, journal))
    events = Events()
    kernel, watch = real_kernel(settings, events)
    service = Service(
        kernel,
        announcer,
        Store(settings.state_dir),
        clock,
        facts=Facts(settings.arp, fastpath=settings.fastpath, input=settings.input),
        interfaces=_interfaces(settings),
        version=version("vpc-nat-gateway"),
        drift=Drift(clock, journal, settings.drift, watch),
        journal=journal,
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        stack.callback(events.close)
        announcer.start()
        stack.callback(announcer.close)
        with uncollected():
            recovered = service.start()
            stack.push_async_callback(asyncio.to_thread, service.close)
            _heed(stack, service, events)
            await asyncio.wrap_future(recovered)
        _write_pid(stack, settings.run_dir / "natgw.pid")
        execs = ExecServer(
            service,
            settings.run_dir,
            settings.env_file,
            iptables_version(kernel.firewall.variant),
            faces={execbalancer.FACE: execbalancer.Balancer(service, ask).answer},
        )
        await execs.start()
        stack.push_async_callback(execs.close)
        log.info("serving %s with iptables-%s", settings.run_dir, kernel.firewall.variant)
        _ready()
        watching = Watching(service, settings.run_dir)
        stack.push_async_callback(watching.close)
        watching.start()
        await _serve_http(service, settings, stop)


def _note_conflict(journal: Journal, interface: str, conflict: Conflict) -> None:
    """Keep one sighting of another holder of an EIP; its log line is this event's."""
    seen = f"{conflict.count} times" if conflict.count > 1 else "once"
    what = f"{conflict.address} on {interface} is also held by {conflict.mac}, seen {seen}"
    data = {"interface": interface, "address": str(conflict.address), "mac": conflict.mac, "count": conflict.count}
    journal.record("conflict", "arp", what, data=data, level=logging.WARNING)


async def _serve_http(service: Service, settings: Settings, stop: asyncio.Event) -> None:
    """The HTTP face until ``stop``, imported in a thread so that verbs are answered meanwhile.

    Verbs carry the tenants' traffic: they go on being answered when this face cannot.
    """
    try:
        face = await asyncio.to_thread(importlib.import_module, "api.http")
        spare_what_stays()
        serve: Callable[..., Awaitable[None]] = face.serve_http
        await serve(
            service,
            settings.run_dir,
            settings.listen,
            settings.token_file,
            stop,
            metrics_listen=settings.metrics_listen,
            shaped=shaped,
            exposure=settings.exposure,
        )
    except Exception:
        log.exception("the HTTP face has ended; verbs are still answered")
    await stop.wait()


def _heed(stack: AsyncExitStack, service: Service, events: Events) -> None:
    """Have the service look whenever the kernel tells of a change; what it missed is a change, too."""
    loop = asyncio.get_running_loop()

    def readable() -> None:
        if events.drain():
            service.kernel_changed()

    loop.add_reader(events.fileno(), readable)
    stack.callback(loop.remove_reader, events.fileno())


def _write_pid(stack: AsyncExitStack, path: Path) -> None:
    path.write_text(f"{os.getpid()}\n")
    stack.callback(path.unlink, missing_ok=True)


def _ready() -> None:
    """Tell whoever started the daemon that verbs are answered from now on."""
    descriptor = os.environ.pop("NATGW_READY_FD", None)
    if descriptor is not None:
        with suppress(OSError), os.fdopen(int(descriptor), "wb") as pipe:
            pipe.write(b"1\n")


if __name__ == "__main__":
    sys.exit(main())
