"""Plays a transcript on a real gateway: calls it as one release does, and compares what stands with what must."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import traffic
from world import OWN, ROUTER, Gateway, World, wait_for

from replay.model import DEVICES, Model, Seen, read_routes, read_rules
from replay.script import Line, Release, Step

WORKERS = 6
"""Calls at once; Kube-OVN's controller has several workers for each kind of object."""
_MARK = "======"
_LOOK = f"""
iptables-$1-save; echo {_MARK}
ip -o -4 addr show dev net1; echo {_MARK}
ip -j -4 route; echo {_MARK}
nft list table ip kube-ovn 2>/dev/null; echo {_MARK}
for device in {" ".join(DEVICES)}; do tc class show dev $device 2>/dev/null; echo {_MARK}; done
"""


class Mismatch(AssertionError):
    """The gateway did not do what the transcript says."""


class Player:
    """One release's controller and its gateway's pods, one after the other.

    ``variant`` of iptables is the one that the pods use. ``plug`` makes a pod that keeps its state in a directory;
    without it, a namespace without a container.
    """

    def __init__(
        self,
        world: World,
        release: Release,
        variant: str,
        directory: Path,
        plug: Callable[[Path], Gateway] | None = None,
    ) -> None:
        self._world, self._release, self._variant = world, release, variant
        self._directory = directory
        self._make_pod = plug or (lambda state_dir: world.plug(variant=variant, state_dir=state_dir))
        self._pods = 0
        self._model = Model(own=f"{OWN}/24", gateway=ROUTER)
        self._gateway: Gateway | None = None
        self.calls = 0
        self._new_pod()

    def close(self) -> None:
        """Remove the pod."""
        self._world.close_sockets()
        self.gateway.remove()

    @property
    def gateway(self) -> Gateway:
        """The pod that runs now."""
        assert self._gateway is not None
        return self._gateway

    # --- steps ----------------------------------------------------------------------------------------

    def play(self, step: Step) -> None:
        """One step and the look at the kernel after it; AssertionError with all that is wrong."""
        generation = self._generation() if step.flagged("no write") else None
        if step.flagged("at once"):
            self._at_once(step.calls)
        for line in step.lines:
            if line.kind != "call" or not step.flagged("at once"):
                self._act(line)
        self._compare()
        if generation is not None and self._generation() != generation:
            raise Mismatch(f"something was written:\n{self.gateway.log()}")
        for line in step.lines:
            if line.kind == ">":
                self._send(line.text)

    def _act(self, line: Line) -> None:
        match line.kind:
            case "call":
                self._call(line)
            case "+":
                self._model.add(line.words)
            case "-":
                self._model.remove(line.words)
            case "$":
                self.gateway.inside(*re.sub("^iptables ", f"iptables-{self._variant} ", line.text).split())
            case "@":
                self._happen(line.text)

    def _happen(self, what: str) -> None:
        match what:
            case "new pod":
                self._new_pod()
            case "moved pod":
                self._plug()
            case "new container":
                self.gateway.renew_container()
            case "no write" | "at once":
                pass  # about the whole step
            case _:
                raise ValueError(f"@ {what} is unknown")

    def _new_pod(self) -> None:
        self._pods += 1
        self._plug()
        self._model.new_pod()

    def _plug(self) -> None:
        if self._gateway is not None:
            self._gateway.remove()
        self._gateway = self._make_pod(self._directory / f"state{self._pods}")

    def _generation(self) -> int:
        return int(self.gateway.status()["generation"])

    # --- calls ----------------------------------------------------------------------------------------

    def _at_once(self, calls: list[Line]) -> None:
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(self._call, calls))

    def _call(self, line: Line) -> None:
        self.calls += 1
        release = self._release
        environment = {"GATEWAY_V4": ROUTER, "GATEWAY_V6": ""} if release.environment else {}
        if release.shell or line.text == "get-iptables-version":
            argv = ["/bin/bash", "-c", f"bash {self.gateway.script} {line.text}"]
        else:
            argv = ["bash", str(self.gateway.script), *line.words]
        done = self.gateway.exec_argv(argv, environment)
        if takes_for_success(release, line.words[0], done) == line.fails:
            fate = f"{'succeeded' if line.fails else 'failed'}: {done.returncode} {done.stdout!r} {done.stderr!r}"
            raise Mismatch(f"{line.text} {fate}\n{self.gateway.log()}")

    # --- looks ----------------------------------------------------------------------------------------

    def look(self) -> Seen:
        """The gateway's namespace as people see it."""
        rules, addresses, routes, maps, *classes, _ = self.gateway.inside(
            "bash", "-c", _LOOK, "look", self._variant
        ).split(f"{_MARK}\n")
        return Seen(
            rules=read_rules(rules),
            addresses=re.findall(r" inet (\S+)", addresses),
            routes=read_routes(routes),
            maps=maps,
            classes=dict(zip(DEVICES, classes, strict=True)),
        )

    def _compare(self) -> None:
        seen = self.look()
        if differences := self._model.differences(seen):
            raise Mismatch("\n".join([*differences, "", *seen.rules, *seen.addresses, *seen.routes, seen.maps]))
        # Only a running daemon answers; before the first call none runs.
        if self.calls:
            wait_for(lambda: bool(self.gateway.status()["ready"]), "the gateway to be ready")

    def _send(self, text: str) -> None:
        client, destination, *expected = text.split(" ")
        host, _, protocol = destination.partition("/")
        address, _, port = host.partition(":")
        to = (address, int(port))
        try:
            if expected == ["refused"]:
                self._refused(client, to)
                return
            server, _, server_port = expected[0].partition(":")
            near, far = self._host(client), self._host(server)
            flow = (
                traffic.tcp(near, to, far.tcp_server(int(server_port)))
                if protocol == "tcp"
                else traffic.udp(near, to, far.udp(int(server_port)))
            )
        except OSError as error:
            raise Mismatch(f"{text}: {error!r}") from error
        finally:
            self._world.close_sockets()
        if expected[1:] and flow.source[0] != expected[2]:
            raise Mismatch(f"{text}: seen as {flow.source[0]}")

    def _refused(self, client: str, to: traffic.Address) -> None:
        with contextlib.suppress(ConnectionRefusedError):
            traffic.tcp(self._host(client), to, self._host("internet").tcp_server(1))
            raise Mismatch(f"{to} still answers")

    def _host(self, name: str) -> traffic.Host:
        vpc = self._world.vpc
        return {"internet": self._world.internet, "a1": vpc.a1, "a2": vpc.a2, "b": vpc.b}[name]


def takes_for_success(release: Release, verb: str, done: subprocess.CompletedProcess[str]) -> bool:
    """Whether the controller of that release goes on after a call that ended so.

    Of ``get-iptables-version`` it wants a version on stdout and an empty stderr, whatever the release.
    """
    if done.returncode != 0:
        return False
    if verb == "get-iptables-version":
        return done.stderr == "" and re.search(r"v([0-9]+(\.[0-9]+)+)", done.stdout) is not None
    if not release.warnings:
        return done.stderr == ""
    lines = (line.strip() for line in done.stderr.splitlines())
    return all(not line or line.startswith("Warning:") for line in lines)
