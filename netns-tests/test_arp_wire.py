"""The announcer on a real link: frames seen by a neighbour, its cache, link changes, replicas, descriptors.

The wire: ``net1`` of the gateway and of its replica are macvlans on one parent, as in a cluster; the other
end of that parent is the neighbour's ``nb0``. Everything lives in namespaces of this test.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import os
import secrets
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any, TypeVar

import pytest
from scapy.layers.l2 import ARP, Ether

from gateway.arp.announcer import Announcer
from gateway.arp.conflict import Conflict
from gateway.arp.frame import announcement
from gateway.arp.schedule import Timing
from gateway.arp.wire import ArpSender

pytestmark = pytest.mark.alone

T = TypeVar("T")

EIP = IPv4Address("192.0.2.10")
EIP2 = IPv4Address("192.0.2.11")
MAC = "02:00:5e:00:00:01"
MAC2 = "02:00:5e:00:00:02"
REPLICA_MAC = "02:00:5e:00:00:03"
STALE_MAC = "02:00:5e:00:00:ff"
CLONE_NEWNET = 0x40000000
PATIENCE = 30.0  # how long to wait for what must come, on a busy machine
FAST = Timing(interval=0.25, spacing=0.25)  # what is tested here does not hang on the second of the default
SILENCE = 1.2  # after this long without a frame, no repeat is to come


def run(*argv: str, stdin: str | None = None) -> str:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)} (needs root and iproute2): {done.stderr.strip()}"
    return done.stdout


def enter(namespace: str) -> None:
    """Move this thread into the namespace."""
    with open(f"/run/netns/{namespace}", "rb") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


def within(namespace: str, call: Callable[[], T]) -> T:
    """The call's result, made in a thread of that namespace; sockets it opens stay there."""
    with ThreadPoolExecutor(1, initializer=enter, initargs=(namespace,)) as pool:
        return pool.submit(call).result()


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class Clock:
    monotonic = staticmethod(time.monotonic)
    time = staticmethod(time.time)


class Capture:
    """ARP frames that reach an interface, with the time at which the kernel had them, in Unix seconds."""

    def __init__(self, namespace: str, interface: str) -> None:
        self._socket = within(namespace, lambda: self._open(interface))

    @staticmethod
    def _open(interface: str) -> socket.socket:
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        opened.setsockopt(socket.SOL_SOCKET, 33, 1 << 23)  # SO_RCVBUFFORCE
        opened.setsockopt(socket.SOL_SOCKET, 35, 1)  # SO_TIMESTAMPNS
        opened.bind((interface, 0x0806))
        return opened

    def next(self, patience: float = PATIENCE) -> tuple[float, bytes] | None:
        self._socket.settimeout(patience)
        try:
            frame, ((_, _, stamp),), _, _ = self._socket.recvmsg(256, 64)
        except TimeoutError:
            return None
        seconds, nanoseconds = struct.unpack("qq", stamp[:16])
        return seconds + nanoseconds / 1e9, frame

    def take(self, count: int) -> list[bytes]:
        """Exactly the next ``count`` frames; they must come."""
        frames: list[bytes] = []
        while len(frames) < count:
            found = self.next()
            assert found is not None, f"{len(frames)} frames came, {count} were expected"
            frames.append(found[1])
        return frames

    def rest(self, silence: float = SILENCE) -> list[bytes]:
        """All frames until none has come for that long."""
        frames: list[bytes] = []
        while (found := self.next(silence)) is not None:
            frames.append(found[1])
        return frames

    def exactly(self, count: int) -> list[bytes]:
        """So many frames, which must come, and whatever follows them; that should be nothing."""
        return self.take(count) + self.rest()

    def close(self) -> None:
        self._socket.close()


@dataclass
class Wire:
    """Names of the namespaces, and what the neighbour hears."""

    parent: str
    gateway: str
    replica: str
    neighbour: str
    capture: Capture

    def macvlan(self, namespace: str, mac: str) -> None:
        run(
            "ip",
            "-n",
            self.parent,
            "link",
            "add",
            "net1",
            "link",
            "ext0",
            "address",
            mac,
            "type",
            "macvlan",
            "mode",
            "bridge",
        )
        run("ip", "-n", self.parent, "link", "set", "net1", "netns", namespace)
        run("ip", "-n", namespace, "link", "set", "net1", "up")
        self.carries(namespace, "net1")

    def carries(self, namespace: str, interface: str) -> None:
        """Wait until the interface does: the kernel sees to that in a work queue, and drops frames before."""
        assert eventually(lambda: " state UP " in run("ip", "-n", namespace, "link", "show", "dev", interface))

    def net1(self, *words: str) -> None:
        run("ip", "-n", self.gateway, "link", "set", "net1", *words)

    def cached(self, address: IPv4Address) -> str:
        """The hardware address the neighbour would send to."""
        words = run("ip", "-n", self.neighbour, "neigh", "show", str(address), "dev", "nb0").split()
        return words[words.index("lladdr") + 1] if "lladdr" in words else ""


@pytest.fixture
def wire() -> Iterator[Wire]:
    prefix = f"arp{os.getpid()}{secrets.token_hex(2)}"
    names = [f"{prefix}-{role}" for role in ("ext", "gw", "rp", "nb")]
    parent, gateway, replica, neighbour = names
    try:
        for name in names:
            run("ip", "netns", "add", name)
            # Else IPv6 would multicast here; and no ARP but what is sent by the test.
            run("ip", "netns", "exec", name, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6")
        run("ip", "-n", parent, "link", "add", "ext0", "type", "veth", "peer", "name", "nb0", "netns", neighbour)
        run("ip", "-n", parent, "link", "set", "ext0", "up")
        run("ip", "-n", neighbour, "addr", "add", "192.0.2.1/24", "dev", "nb0")
        run("ip", "-n", neighbour, "link", "set", "nb0", "up")
        made = Wire(parent, gateway, replica, neighbour, Capture(neighbour, "nb0"))
        made.carries(parent, "ext0")
        made.carries(neighbour, "nb0")
        made.macvlan(gateway, MAC)
        yield made
        made.capture.close()
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


class Daemon:
    """An announcer as the daemon has it: a writer thread, and an event loop in another."""

    def __init__(
        self, namespace: str, timing: Timing = FAST, open_sender: Callable[[str], ArpSender] = ArpSender
    ) -> None:
        self.conflicts: list[tuple[str, Conflict]] = []
        self.announcer = Announcer(
            Clock(),
            timing=timing,
            on_conflict=lambda interface, conflict: self.conflicts.append((interface, conflict)),
            open_sender=open_sender,
        )
        self._writer = ThreadPoolExecutor(1, initializer=enter, initargs=(namespace,))
        self._namespace = namespace
        self._thread: threading.Thread | None = None
        self.loop = asyncio.new_event_loop()

    def start(self) -> Daemon:
        def serve() -> None:
            enter(self._namespace)
            self.loop.call_soon(self.announcer.start)
            self.loop.run_forever()

        self._thread = threading.Thread(target=serve)
        self._thread.start()
        self.in_loop(lambda: None)
        return self

    def announce(self, *addresses: IPv4Address) -> int:
        return self._writer.submit(self.announcer.announce, "net1", addresses).result()

    def listening(self) -> None:
        """Wait until the loop has done what the calls so far left to it: it hears of other holders from then on."""
        self.in_loop(lambda: None)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The loop does nothing meanwhile: no repeat is sent, and no message read."""
        blocked, release = threading.Event(), threading.Event()

        def block() -> None:
            blocked.set()
            assert release.wait(3 * PATIENCE)

        self.loop.call_soon_threadsafe(block)
        assert blocked.wait(PATIENCE)
        try:
            yield
        finally:
            release.set()

    def withdraw(self, *addresses: IPv4Address) -> None:
        self._writer.submit(self.announcer.withdraw, "net1", addresses).result()

    def in_loop(self, call: Callable[[], T]) -> T:
        async def called() -> T:
            return call()

        return asyncio.run_coroutine_threadsafe(called(), self.loop).result(PATIENCE)

    def stop(self) -> None:
        if self._thread is not None:
            self.in_loop(self.announcer.close)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(PATIENCE)
        else:
            self.announcer.close()
        self.loop.close()
        self._writer.shutdown()


@pytest.fixture
def make() -> Iterator[Callable[..., Daemon]]:
    daemons: list[Daemon] = []

    def build(*arguments: Any, **options: Any) -> Daemon:
        daemons.append(Daemon(*arguments, **options))
        return daemons[-1]

    yield build
    for daemon in daemons:
        daemon.stop()


Make = Callable[..., Daemon]


def senders(frames: list[bytes]) -> list[tuple[str, str]]:
    """(address, hardware address) of each frame, all of which must be announcements."""
    arps = [Ether(frame)[ARP] for frame in frames]
    assert all(arp.op == 1 and arp.psrc == arp.pdst for arp in arps), [arp.summary() for arp in arps]
    return [(arp.psrc, arp.hwsrc) for arp in arps]


def sockets() -> int:
    """How many sockets and epoll instances this process holds."""
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{descriptor}").startswith(("socket:", "anon_inode:[eventpoll]"))
        except FileNotFoundError:  # the descriptor of this very listing
            continue
    return count


def test_the_first_frame_is_out_when_announce_returns(wire: Wire, make: Make) -> None:
    daemon = make(wire.gateway)  # no loop: nothing can send later
    assert daemon.announce(EIP, EIP2) == 2
    first, second = wire.capture.take(2)
    packet = Ether(first)
    assert (packet.dst, packet.src) == ("ff:ff:ff:ff:ff:ff", MAC)
    assert (packet[ARP].op, packet[ARP].hwsrc, packet[ARP].psrc, packet[ARP].pdst) == (1, MAC, str(EIP), str(EIP))
    assert packet[ARP].hwdst == "00:00:00:00:00:00"
    assert senders([second]) == [(str(EIP2), MAC)]
    assert daemon.announcer.sent == 2


def test_it_repeats_in_the_background_and_ends(wire: Wire, make: Make) -> None:
    daemon = make(wire.gateway, Timing()).start()
    began = time.monotonic()
    assert daemon.announce(EIP) == 1
    frames = wire.capture.take(3)
    assert time.monotonic() - began > 1.9  # 0, 1, 2 s
    assert senders(frames + wire.capture.rest(2.5)) == [(str(EIP), MAC)] * 3
    assert daemon.announce(EIP) == 1  # it stands: once more, and that is all
    assert senders(wire.capture.rest(2.5)) == [(str(EIP), MAC)]


def test_what_was_announced_before_the_loop_started_is_repeated_in_it(wire: Wire, make: Make) -> None:
    daemon = make(wire.gateway)
    assert daemon.announce(EIP) == 1
    daemon.start()
    assert senders(wire.capture.take(3)) == [(str(EIP), MAC)] * 3


def test_the_neighbours_cache_follows(wire: Wire, make: Make) -> None:
    run("ip", "-n", wire.neighbour, "neigh", "replace", str(EIP), "lladdr", STALE_MAC, "dev", "nb0", "nud", "stale")
    assert wire.cached(EIP) == STALE_MAC
    make(wire.gateway).announce(EIP)
    assert eventually(lambda: wire.cached(EIP) == MAC)


def test_withdrawn_addresses_fall_silent(wire: Wire, make: Make) -> None:
    daemon = make(wire.gateway).start()
    with daemon.held():
        daemon.announce(EIP, EIP2)
        daemon.withdraw(EIP)
    assert Counter(senders(wire.capture.exactly(4))) == {(str(EIP), MAC): 1, (str(EIP2), MAC): 3}


def test_a_thousand_addresses_are_all_heard_and_not_as_one_burst(wire: Wire, make: Make) -> None:
    daemon = make(wire.gateway).start()
    addresses = [IPv4Address("198.51.100.0") + number for number in range(1000)]
    assert daemon.announce(*addresses) == 50
    heard: dict[str, float] = {}
    while len(heard) < 1000:
        found = wire.capture.next()
        assert found is not None, f"only {len(heard)} were heard"
        heard.setdefault(Ether(found[1])[ARP].psrc, found[0])
    span = max(heard.values()) - min(heard.values())
    print(f"1,000 addresses were announced in {span:.3f} s")
    assert span > 0.4


def test_replicas_report_each_other_and_never_fight(wire: Wire, make: Make) -> None:
    wire.macvlan(wire.replica, REPLICA_MAC)
    began = time.time()
    ours, theirs = make(wire.gateway).start(), make(wire.replica).start()
    ours.announce(EIP2)  # for one of its own it listens
    wire.capture.take(3)
    with ours.held():  # its repeats come when the other one listens, too
        assert ours.announce(EIP) == 1
        assert theirs.announce(EIP) == 1
        theirs.listening()
    assert Counter(senders(wire.capture.exactly(6))) == {(str(EIP), MAC): 3, (str(EIP), REPLICA_MAC): 3}
    assert eventually(lambda: [known.count for known in ours.announcer.conflicts()["net1"]] == [3])
    ((interface, conflict),) = ours.conflicts  # three sightings, one report
    assert (interface, conflict.address, conflict.mac) == ("net1", EIP, REPLICA_MAC)
    assert began - 10 <= conflict.first_seen <= time.time() + 10
    (known,) = ours.announcer.conflicts()["net1"]
    assert (known.mac, known.count) == (REPLICA_MAC, 3)
    assert eventually(lambda: bool(theirs.conflicts))
    assert [conflict.mac for _, conflict in theirs.conflicts] == [MAC]
    ours.withdraw(EIP)
    assert ours.announcer.conflicts() == {"net1": ()}


def test_a_prober_is_no_holder_and_an_ordinary_request_of_one_is(wire: Wire, make: Make) -> None:
    wire.macvlan(wire.replica, REPLICA_MAC)
    ours = make(wire.gateway).start()
    ours.announce(EIP)
    ours.listening()
    probe = ARP(op=1, hwsrc=REPLICA_MAC, psrc="0.0.0.0", pdst=str(EIP))
    request = ARP(op=1, hwsrc=REPLICA_MAC, psrc=str(EIP), pdst="192.0.2.1")
    sender = within(wire.replica, lambda: ArpSender("net1"))
    try:
        for packet in (probe, request):
            frame = bytes(Ether(dst="ff:ff:ff:ff:ff:ff", src=REPLICA_MAC) / packet)
            within(wire.replica, lambda frame=frame: sender.send(frame))  # type: ignore[misc]
    finally:
        sender.close()
    assert eventually(lambda: bool(ours.conflicts))
    (known,) = ours.announcer.conflicts()["net1"]
    assert (known.mac, known.count) == (REPLICA_MAC, 1)


def test_a_link_that_goes_down_and_up_is_announced_on_again(wire: Wire, make: Make) -> None:
    wire.macvlan(wire.replica, REPLICA_MAC)
    daemon = make(wire.gateway).start()
    daemon.announce(EIP)
    wire.capture.take(3)
    wire.net1("down")
    assert daemon.announce(EIP2) == 0
    assert wire.capture.rest() == []
    wire.net1("up")
    assert Counter(senders(wire.capture.exactly(6))) == {(str(EIP), MAC): 3, (str(EIP2), MAC): 3}
    # And it still listens.
    within(wire.replica, lambda: ArpSender("net1").send(announcement(bytes.fromhex(REPLICA_MAC.replace(":", "")), EIP)))
    assert eventually(lambda: [conflict.mac for _, conflict in daemon.conflicts] == [REPLICA_MAC])


def test_a_new_hardware_address_is_announced(wire: Wire, make: Make) -> None:
    daemon = make(wire.gateway).start()
    daemon.announce(EIP)
    wire.capture.take(3)
    wire.net1("address", MAC2)
    assert senders(wire.capture.exactly(3)) == [(str(EIP), MAC2)] * 3
    assert daemon.conflicts == []


def test_a_link_that_comes_late_goes_away_and_returns(wire: Wire, make: Make) -> None:
    run("ip", "-n", wire.gateway, "link", "del", "net1")
    daemon = make(wire.gateway).start()
    assert daemon.announce(EIP) == 0
    assert wire.capture.rest() == []
    wire.macvlan(wire.gateway, MAC)
    assert senders(wire.capture.exactly(3)) == [(str(EIP), MAC)] * 3

    run("ip", "-n", wire.gateway, "link", "del", "net1")
    assert daemon.announce(EIP) == 0
    busy = daemon.in_loop(time.thread_time)
    assert wire.capture.rest() == []
    assert daemon.in_loop(time.thread_time) - busy < 0.3, "the loop is busy with a link that is not there"
    wire.macvlan(wire.gateway, MAC2)
    wire.macvlan(wire.replica, REPLICA_MAC)
    assert senders(wire.capture.exactly(3)) == [(str(EIP), MAC2)] * 3
    # It listens on the new link too.
    within(wire.replica, lambda: ArpSender("net1").send(announcement(bytes.fromhex(REPLICA_MAC.replace(":", "")), EIP)))
    assert eventually(lambda: [conflict.mac for _, conflict in daemon.conflicts] == [REPLICA_MAC])


def test_a_renamed_link_is_not_ours(wire: Wire, make: Make) -> None:
    daemon = make(wire.gateway).start()
    daemon.announce(EIP)
    wire.capture.take(3)
    wire.net1("down")
    wire.net1("name", "other")
    run("ip", "-n", wire.gateway, "link", "set", "other", "up")
    assert daemon.announce(EIP) == 0
    assert wire.capture.rest() == []
    run("ip", "-n", wire.gateway, "link", "set", "other", "down")
    run("ip", "-n", wire.gateway, "link", "set", "other", "name", "net1", "up")
    assert senders(wire.capture.exactly(3)) == [(str(EIP), MAC)] * 3


def test_nothing_is_announced_while_arp_is_off_and_everything_once_it_is_on(wire: Wire, make: Make) -> None:
    wire.net1("arp", "off")
    daemon = make(wire.gateway).start()
    assert daemon.announce(EIP) == 0
    assert wire.capture.rest() == []
    wire.net1("arp", "on")
    assert daemon.announce(EIP2) == 1
    assert Counter(senders(wire.capture.exactly(6))) == {(str(EIP), MAC): 3, (str(EIP2), MAC): 3}
    wire.net1("arp", "off")
    assert daemon.announce(EIP) == 0
    assert wire.capture.rest() == []


def test_lost_link_messages_are_made_up_for(wire: Wire, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    daemon = make(wire.gateway).start()
    daemon.announce(EIP)
    wire.capture.take(3)
    # More messages than the subscription's buffer holds: the last ones, the new address among them, are lost.
    flaps = "link set net1 down\nlink set net1 up\n" * 300 + f"link set net1 address {MAC2}\n"
    with caplog.at_level(logging.WARNING, logger="gateway.arp"):
        with daemon.held():
            run("ip", "-n", wire.gateway, "-batch", "-", stdin=flaps)
        assert senders(wire.capture.take(3)) == [(str(EIP), MAC2)] * 3
    assert "link messages were lost: looking at every link again" in [record.getMessage() for record in caplog.records]


def test_frames_the_kernel_refuses_are_counted_and_sent_when_the_link_is_back(wire: Wire, make: Make) -> None:
    refusals = [errno.ENOBUFS, errno.ENETDOWN]

    class Refusing(ArpSender):
        def send(self, frame: bytes) -> None:
            if refusals:
                raise OSError(refusals[0], os.strerror(refusals.pop(0)))
            super().send(frame)

    daemon = make(wire.gateway, open_sender=Refusing).start()
    assert daemon.announce(EIP) == 0  # no room: the repeats make up for it … of which the first meets a dead link
    assert eventually(lambda: not refusals)
    assert wire.capture.rest() == []
    wire.net1("down")
    wire.net1("up")
    assert senders(wire.capture.exactly(3)) == [(str(EIP), MAC)] * 3
    assert eventually(lambda: (daemon.announcer.sent, daemon.announcer.failed) == (3, 2))


def test_descriptors_are_given_back(wire: Wire, make: Make) -> None:
    daemon = make(wire.gateway).start()
    held_idle = daemon.in_loop(sockets)
    daemon.announce(EIP)
    assert daemon.in_loop(sockets) == held_idle + 2  # one sends, one listens
    daemon.withdraw(EIP)
    assert daemon.in_loop(sockets) == held_idle + 1  # nobody to listen for
    daemon.announce(EIP)
    for _ in range(3):
        wire.net1("down")
        wire.net1("up")
        run("ip", "-n", wire.gateway, "link", "del", "net1")
        wire.macvlan(wire.gateway, MAC)
    assert eventually(lambda: daemon.announcer.sent >= 3)
    assert eventually(lambda: daemon.in_loop(sockets) == held_idle + 2)
    daemon.in_loop(daemon.announcer.close)
    assert daemon.in_loop(sockets) == held_idle - 1  # the subscription to link messages too
    daemon.in_loop(daemon.announcer.close)


def test_it_is_started_once(wire: Wire, make: Make) -> None:
    daemon = make(wire.gateway).start()
    with pytest.raises(RuntimeError, match="already"):
        daemon.in_loop(daemon.announcer.start)
