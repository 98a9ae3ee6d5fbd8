"""Our BFD speaker against FRR's bfdd and BIRD on a real link, over IPv4 and IPv6, each in a namespace of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from netns import Namespace, require, veth
from scapy.contrib.bfd import BFD

from gateway.bfd.packet import ControlPacket, decode

pytestmark = pytest.mark.alone

ROOTFS = Path(__file__).parent.parent / "image" / "rootfs"
BFDD = "/usr/lib/frr/bfdd"
OURS, THEIRS = ("10.88.0.1", "fd88::1"), ("10.88.0.2", "fd88::2")
PAIRS = list(zip(OURS, THEIRS, strict=True))
BASE = 400  # milliseconds: three of these are more than what a machine with other guests stands still for


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> float:
    """Poll until the condition holds and return how long it took; the patience is for loaded machines only."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > seconds:
            pytest.fail(f"after {seconds} s still not: {what}")
        time.sleep(0.01)
    return time.monotonic() - begin


class Program:
    """A program in a namespace, with its output in a file; ``run_dir`` is a directory of its own."""

    def __init__(self, netns: Namespace, run_dir: Path) -> None:
        self.netns = netns
        self.run_dir = run_dir
        self.log = run_dir / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self, *argv: str, env: dict[str, str] | None = None) -> None:
        output: IO[bytes]
        with open(self.log, "ab") as output:
            self._process = subprocess.Popen(
                ["ip", "netns", "exec", self.netns.name, *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                # As in a container of its own: a session is a group of its own to the scheduler.
                start_new_session=True,
            )

    def end(self, how: signal.Signals = signal.SIGKILL) -> None:
        """``ip netns exec`` becomes the program, so this is the program's own process."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(10)
            self._process = None


class Speaker(Program):
    """Ours, by the programs that the image has."""

    def start(self, tx: int = BASE, rx: int = BASE, multi: int = 3) -> None:
        listen = [f"--listen={address}" for address in OURS]
        self.launch(str(ROOTFS / "usr/bin/bfdd-beacon"), "--nofork", "--tee", *listen, env=self._env())
        wait_until(lambda: "sessions:" in self.control("status", check=False), "the beacon answers")
        for setting in (f"mintx {tx} ms", f"minrx {rx} ms", f"multi {multi}"):
            self.control(f"session new set {setting}")
        for address in THEIRS:
            self.control(f"allow {address}")

    def control(self, command: str, check: bool = True) -> str:
        done = subprocess.run(
            ["ip", "netns", "exec", self.netns.name, str(ROOTFS / "usr/bin/bfdd-control"), *command.split()],
            capture_output=True,
            text=True,
            env={**os.environ, **self._env()},
            timeout=30,
            check=False,
        )
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout

    def states(self) -> dict[str, str]:
        """The state of each session by the peer's address."""
        return dict(re.findall(r"remote=(\S+) state=(\w+)", self.control("status")))

    def changes(self) -> int:
        """How many changes of state the log tells of."""
        return self.log.read_text().count(" -> ")

    def details(self) -> str:
        return self.control("status all level 4 compact")

    def _env(self) -> dict[str, str]:
        return {"NATGW_RUN_DIR": str(self.run_dir), "NATGW_PYTHON": sys.executable}


class Frr(Program):
    """FRR's bfdd alone, without zebra: peers by local address need none."""

    needs = (BFDD, "vtysh")

    def start(self, tx: int = BASE, rx: int = BASE, multi: int = 3) -> None:
        peers = "".join(
            f" peer {ours} local-address {theirs}\n  detect-multiplier {multi}\n"
            f"  receive-interval {rx}\n  transmit-interval {tx}\n !\n"
            for ours, theirs in PAIRS
        )
        (self.run_dir / "bfdd.conf").write_text(f"bfd\n{peers}!\n")
        shutil.chown(self.run_dir, "frr", "frr")
        shutil.chown(self.run_dir / "bfdd.conf", "frr", "frr")
        directory = str(self.run_dir)
        self.launch(
            *(BFDD, "-u", "frr", "-g", "frr", "-f", f"{directory}/bfdd.conf", "-i", f"{directory}/bfdd.pid"),
            *("-z", f"{directory}/zserv.api", "--vty_socket", directory, "--bfdctl", f"{directory}/bfdd.sock"),
            *("-P", "0"),
        )
        wait_until(lambda: len(self._peers()) == len(PAIRS), "bfdd answers")

    def states(self) -> dict[str, str]:
        names = {"up": "Up", "down": "Down", "init": "Init", "shutdown": "AdminDown"}
        return {peer["peer"]: names[peer["status"]] for peer in self._peers()}

    def reconfigure(self, tx: int, rx: int, multi: int) -> None:
        for ours, theirs in PAIRS:
            self._vtysh(
                "configure terminal",
                "bfd",
                f"peer {ours} local-address {theirs}",
                *(f"detect-multiplier {multi}", f"receive-interval {rx}", f"transmit-interval {tx}"),
            )

    def sees(self, tx: int, rx: int, multi: int) -> bool:
        return all(
            (peer["remote-transmit-interval"], peer["remote-receive-interval"], peer["remote-detect-multiplier"])
            == (tx, rx, multi)
            for peer in self._peers()
        )

    def _peers(self) -> list[dict[str, str]]:
        text = self._vtysh("show bfd peers json")
        peers: list[dict[str, str]] = json.loads(text) if text.lstrip().startswith("[") else []
        return peers

    def _vtysh(self, *commands: str) -> str:
        argv = ["vtysh", "--vty_socket", str(self.run_dir)]
        for command in commands:
            argv += ["-c", command]
        return self.netns.run(*argv, check=False)


class Bird(Program):
    """BIRD with its BFD protocol and nothing else."""

    needs = ("bird", "birdc")

    def start(self, tx: int = BASE, rx: int = BASE, multi: int = 3) -> None:
        self._write(tx, rx, multi)
        directory = self.run_dir
        self.launch("bird", "-f", "-c", f"{directory}/bird.conf", "-s", f"{directory}/ctl", "-P", f"{directory}/pid")
        wait_until(lambda: len(self.states()) == len(PAIRS), "bird answers")

    def states(self) -> dict[str, str]:
        rows = re.findall(r"^(\S+) +\S+ +(\w+) ", self._birdc("show", "bfd", "sessions"), re.MULTILINE)
        return {address: state for address, state in rows if address in OURS}

    def reconfigure(self, tx: int, rx: int, multi: int) -> None:
        self._write(tx, rx, multi)
        assert "Reconfigured" in self._birdc("configure")

    def sees(self, tx: int, rx: int, multi: int) -> bool:
        """BIRD tells its own transmit interval and timeout only: by our receive interval, and by our two others."""
        text = self._birdc("show", "bfd", "sessions")
        expected = f" {max(rx, self._tx) / 1000:.3f} +{multi * max(tx, self._rx) / 1000:.3f}"
        return len(re.findall(expected, text)) == len(PAIRS)

    def _write(self, tx: int, rx: int, multi: int) -> None:
        self._tx, self._rx = tx, rx
        neighbors = "".join(f'  neighbor {ours} dev "vb" local {theirs};\n' for ours, theirs in PAIRS)
        (self.run_dir / "bird.conf").write_text(
            "log stderr all;\nrouter id 10.88.0.2;\nprotocol device {}\nprotocol bfd {\n"
            f'  interface "vb" {{ min rx interval {rx} ms; min tx interval {tx} ms; multiplier {multi}; }};\n'
            f"{neighbors}}}\n"
        )

    def _birdc(self, *words: str) -> str:
        return self.netns.run("birdc", "-s", str(self.run_dir / "ctl"), *words, check=False)


Peer = Frr | Bird


class Pair:
    """Our speaker and a peer, on the two ends of a cable."""

    def __init__(self, speaker: Speaker, peer: Peer) -> None:
        self.speaker, self.peer = speaker, peer

    def both(self, state: str) -> bool:
        return self.ours(state) and self.theirs(state)

    def ours(self, state: str) -> bool:
        return self.speaker.states() == dict.fromkeys(THEIRS, state)

    def theirs(self, state: str) -> bool:
        return self.peer.states() == dict.fromkeys(OURS, state)

    def come_up(self) -> None:
        self.speaker.start()
        self.peer.start()
        wait_until(lambda: self.both("Up"), "both sessions are Up on both sides")


@pytest.fixture(params=[Frr, Bird], ids=["frr", "bird"])
def pair(request: pytest.FixtureRequest, make_netns: Callable[[], Namespace]) -> Iterator[Pair]:
    kind: type[Peer] = request.param
    require("ip", *kind.needs)
    ours, theirs = make_netns(), make_netns()
    veth(ours, "va", theirs, "vb")
    for netns, device, addresses in ((ours, "va", OURS), (theirs, "vb", THEIRS)):
        netns.run("ip", "address", "add", f"{addresses[0]}/24", "dev", device)
        netns.run("ip", "address", "add", f"{addresses[1]}/64", "dev", device, "nodad")
    # Not pytest's tmp_path: its parents are closed to the user that bfdd runs as.
    with tempfile.TemporaryDirectory(prefix="bfd-") as top:
        os.chmod(top, 0o755)
        directories = [Path(top) / name for name in ("ours", "theirs")]
        for directory in directories:
            directory.mkdir()
        made = Pair(Speaker(ours, directories[0]), kind(theirs, directories[1]))
        try:
            yield made
        finally:
            made.speaker.end()
            made.peer.end()


def test_up_then_renegotiated_from_both_sides_without_a_flap(pair: Pair) -> None:
    pair.come_up()
    changes = pair.speaker.changes()
    for tx, rx, multi in ((1200, 1200, 3), (240, 800, 5), (800, 240, 3), (BASE, BASE, 3)):
        for setting in (f"mintx {tx} ms", f"minrx {rx} ms", f"multi {multi}"):
            pair.speaker.control(f"session all set {setting}")
        wait_until(lambda: pair.peer.sees(tx, rx, multi), f"the peer sees {tx} {rx} {multi}")  # noqa: B023
        wait_until(lambda: "pending" not in pair.speaker.details(), "the peer has answered our Poll")
    for tx, rx, multi in ((1600, 1600, 3), (200, 600, 4), (BASE, BASE, 3)):
        pair.peer.reconfigure(tx, rx, multi)
        fields = (
            f"RemoteDesiredMinTx={tx * 1000:,} us",
            f"RemoteRequiredMinRx={rx * 1000:,} us",
            f"RemoteDetectMulti={multi} ",
        )
        wait_until(
            lambda: all(pair.speaker.details().count(field) == len(PAIRS) for field in fields),  # noqa: B023
            f"we see {tx} {rx} {multi}",
        )
    assert pair.both("Up")
    assert pair.speaker.changes() == changes, pair.speaker.log.read_text()


def test_each_side_notices_the_others_death_and_comes_back(pair: Pair) -> None:
    pair.come_up()
    pair.speaker.end()
    wait_until(lambda: pair.theirs("Down"), "the peer says Down")
    pair.speaker.start()
    wait_until(lambda: pair.both("Up"), "both are Up again after our death")
    pair.peer.end()
    wait_until(lambda: pair.ours("Down"), "we say Down")
    assert pair.speaker.details().count("LocalState=Down<Control Detection Time Expired>") == len(PAIRS)
    pair.peer.start()
    wait_until(lambda: pair.both("Up"), "both are Up again after the peer's death")


def test_a_restart_faster_than_the_detection_time(pair: Pair) -> None:
    """The peer is still Up and sends our old discriminator."""
    pair.speaker.start(tx=2000, rx=2000)
    pair.peer.start(tx=2000, rx=2000)
    wait_until(lambda: pair.both("Up"), "both are Up")
    pair.speaker.end()
    pair.speaker.start(tx=2000, rx=2000)
    wait_until(lambda: pair.both("Up"), "both are Up again")


def test_administratively_down_and_held_down(pair: Pair) -> None:
    pair.come_up()
    pair.speaker.control("session all state admin")
    wait_until(lambda: pair.theirs("Down"), "the peer follows our AdminDown")
    pair.speaker.control("session all state up")
    wait_until(lambda: pair.both("Up"), "both are Up again")
    pair.speaker.control("session all state down 6")
    wait_until(lambda: not set(pair.peer.states().values()) & {"Up"}, "the peer follows our Down")
    assert pair.ours("Down")
    pair.speaker.control("session all state up")
    wait_until(lambda: pair.both("Up"), "both are Up again")


def captured(netns: Namespace, device: str) -> Iterator[tuple[str, int, int, bytes]]:
    """Frames of BFD on a device: source address, TTL, source port and UDP payload."""
    with netns.entered():
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    with tap:
        tap.bind((device, 0))
        tap.settimeout(30)
        while True:
            frame = tap.recv(2048)
            ethertype, packet = frame[12:14], frame[14:]
            if ethertype == b"\x08\x00" and packet[9] == socket.IPPROTO_UDP:
                header, source, ttl = (packet[0] & 15) * 4, socket.inet_ntoa(packet[12:16]), packet[8]
            elif ethertype == b"\x86\xdd" and packet[6] == socket.IPPROTO_UDP:
                header, source, ttl = 40, socket.inet_ntop(socket.AF_INET6, packet[8:24]), packet[7]
            else:
                continue
            ports, payload = packet[header : header + 4], packet[header + 8 :]
            if int.from_bytes(ports[2:], "big") == 3784:
                yield source, ttl, int.from_bytes(ports[:2], "big"), payload


def test_what_is_on_the_wire_is_read_alike_by_scapy(pair: Pair) -> None:
    pair.speaker.start(tx=100, rx=100)
    ports: dict[str, set[int]] = {address: set() for address in OURS}
    frames = captured(pair.speaker.netns, "va")
    pair.peer.start(tx=100, rx=100)
    seen: dict[str, int] = dict.fromkeys(OURS + THEIRS, 0)
    while min(seen.values()) < 24:
        source, ttl, port, payload = next(frames)
        assert ttl == 255
        if source in OURS:
            assert 49152 <= port <= 65535
            ports[source].add(port)
        ours, theirs = decode(payload), BFD(payload[:24])
        assert isinstance(ours, ControlPacket)
        flags = [ours.poll, ours.final, ours.control_plane_independent, False, ours.demand, False]
        assert (theirs.version, theirs.diag, theirs.sta, theirs.detect_mult, theirs.len) == (
            *(1, ours.diag, ours.state, ours.detect_mult),
            len(payload),
        )
        assert int(theirs.flags) == sum(bit << (5 - place) for place, bit in enumerate(flags))
        assert (theirs.my_discriminator, theirs.your_discriminator) == (ours.my_discriminator, ours.your_discriminator)
        assert (theirs.min_tx_interval, theirs.min_rx_interval, theirs.echo_rx_interval) == (
            *(ours.desired_min_tx, ours.required_min_rx),
            ours.required_min_echo_rx,
        )
        seen[source] += 1
    assert all(len(of_one_session) == 1 for of_one_session in ports.values())
    assert len(set.union(*ports.values())) == len(OURS)


def test_packets_that_were_routed_once_are_taken(pair: Pair) -> None:
    """Kube-OVN's dedicated BFD port sends from behind a router: TTL 254 arrives."""
    require("nft")
    for family, what in (("ip", "ip ttl"), ("ip6", "ip6 hoplimit")):
        chain = "type filter hook output priority 0;"
        pair.peer.netns.run(
            "nft",
            f"add table {family} t; add chain {family} t o {{ {chain} }}; "
            f"add rule {family} t o udp dport 3784 {what} set 254",
        )
    pair.come_up()
