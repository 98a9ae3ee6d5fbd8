"""A gateway's pod: the container of image/Dockerfile in a network namespace of a test's world.

It is run as Kube-OVN's controller has it run: privileged, with `sleep infinity` in the entrypoint's place, a postStart
hook, and everything else by exec.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from netns import require
from world import PATIENCE, Gateway, World

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "localhost/vpc-nat-gateway:test"
SLEEP = ("sleep", "infinity")
POST_START = ("sh", "-c", "sysctl -w net.ipv4.ip_forward=1")
CONTROLLER = ("--privileged",)
TIMEOUT = 120.0  # seconds; what takes that long hangs


@functools.cache
def _environment() -> dict[str, str]:
    """The settings of the store in which `make image` leaves the image."""
    require("podman", "runc")
    said = subprocess.run([ROOT / "scripts/image.sh", "env"], capture_output=True, text=True, check=True).stdout
    pairs = (shlex.split(line)[1].partition("=") for line in said.splitlines())
    return {**os.environ, **{name: value for name, _, value in pairs}}


def podman(*words: str | Path, check: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run podman; fails the test with what it said if it fails."""
    done = subprocess.run(
        ["podman", *words],
        env=_environment(),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if check and done.returncode:
        pytest.fail(f"podman {' '.join(map(str, words))} ended with {done.returncode}: {done.stderr or done.stdout}")
    return done


class Container:
    """One container; use it with ``with``. ``command`` replaces entrypoint and command, as a pod's `command` does."""

    def __init__(self, *options: str, command: Sequence[str] | None = SLEEP, words: Sequence[str] = ()) -> None:
        if podman("image", "exists", IMAGE, check=False).returncode:
            pytest.fail(f"there is no image {IMAGE}: run `make image`, or these tests with `make image-test`")
        self.name = f"natgw-{os.getpid()}-{secrets.token_hex(3)}"
        entrypoint = () if command is None else ("--entrypoint", json.dumps([*command]))
        podman("run", "--detach", "--pull=never", "--name", self.name, *options, *entrypoint, IMAGE, *words)

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """End it and delete its files; its network namespace is not its own and stays."""
        podman("rm", "--force", "--time", "0", self.name, check=False)

    def exec(self, *argv: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """What an exec into the container runs, to the end of its outputs; it may fail."""
        return podman("exec", *options, self.name, *argv, check=False)

    def run(self, *argv: str, options: Sequence[str] = ()) -> str:
        """The stdout of an exec that must succeed."""
        done = self.exec(*argv, options=options)
        if done.returncode:
            pytest.fail(f"{argv} ended with {done.returncode}: {done.stderr or done.stdout}\n{self.log()}")
        return done.stdout

    def nsenter(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """As ``exec``, without what podman takes for it (a tenth of a second)."""
        return subprocess.run(
            ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p", "--", *argv],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )

    @functools.cached_property
    def pid(self) -> int:
        """Its first process, as the host numbers it."""
        return int(self.inspect()["State"]["Pid"])

    def inspect(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(podman("inspect", self.name).stdout)[0]
        return found

    @functools.cached_property
    def environment(self) -> dict[str, str]:
        """What every exec finds set."""
        pairs = (text.partition("=") for text in self.inspect()["Config"]["Env"])
        return {name: value for name, _, value in pairs}

    def state(self) -> str:
        return str(self.inspect()["State"]["Status"])

    @property
    def root(self) -> Path:
        """Its root directory, seen from the host."""
        return Path(f"/proc/{self.pid}/root")

    def log(self) -> str:
        """What it printed."""
        done = podman("logs", self.name, check=False)
        return done.stdout + done.stderr

    def processes(self) -> list[tuple[int, int, int, str, str]]:
        """Process id, parent, resident KiB, state and command line of each."""
        rows = self.run("ps", "-eo", "pid=,ppid=,rss=,stat=,args=").splitlines()
        split = [row.split(None, 4) for row in rows]
        return [(int(row[0]), int(row[1]), int(row[2]), row[3], row[4]) for row in split if row[4:]]

    def zombies(self) -> list[str]:
        return [args for *_, state, args in self.processes() if state.startswith("Z")]


class Pod(Gateway):
    """A gateway whose daemon runs in a container: the same world around it, the same calls.

    With ``state_dir`` the daemon's state is kept there, in a volume.
    """

    script = Path("/kube-ovn/nat-gateway.sh")

    def __init__(self, world: World, *options: str, state_dir: Path | None = None) -> None:
        super().__init__(world, state_dir=state_dir)
        self._options = options
        if state_dir is not None:
            state_dir.mkdir(parents=True, exist_ok=True)
            self._options += (f"--volume={state_dir}:/var/lib/natgw",)
        self._container: Container | None = None

    @property
    def container(self) -> Container:
        assert self._container is not None, "the container is not started"
        return self._container

    def start(self, *, command: Sequence[str] | None = SLEEP) -> None:
        """Start a container in the pod's namespace: the first, or one more after the end of the last."""
        if self._container is not None:
            self._container.remove()
        options = ("--network", f"ns:/run/netns/{self.name}", "--env", "GATEWAY_V4=192.168.0.1", "--env", "GATEWAY_V6=")
        self._container = Container(*options, *self._options, command=command)
        self.run_dir = self._container.root / "run/natgw"
        if self._options[: len(CONTROLLER)] == CONTROLLER:  # what the hook sets is set in this namespace already
            self._container.run(*POST_START)

    def remove(self) -> None:
        if self._container is not None:
            self._container.remove()
            self._container = None
        self.run_dir = self._directory
        super().remove()

    def exec(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """One call as the controllers from 1.17 make it."""
        options = [word for name, value in environment.items() for word in ("--env", f"{name}={value}")]
        return self.container.exec("bash", str(self.script), *words, options=options)

    def exec_by_shell(self, *words: str) -> subprocess.CompletedProcess[str]:
        """One call as the controllers up to 1.16 make it."""
        return self.container.exec("/bin/bash", "-c", f"bash {self.script} {' '.join(words)}")

    def exec_argv(self, argv: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """What an exec runs, sooner than podman would; with the environment of the container and no other."""
        assert environment.items() <= self.container.environment.items(), "an exec cannot bring an environment along"
        values = (f"{name}={value}" for name, value in self.container.environment.items())
        return self.container.nsenter("env", "-i", *values, *argv)

    def inside(self, *argv: str) -> str:
        done = self.exec_argv(argv, {})
        if done.returncode:
            pytest.fail(f"{argv} ended with {done.returncode}: {done.stderr or done.stdout}")
        return done.stdout

    def renew_container(self) -> None:
        self.lose_container()
        for lost in self.state_dir.glob("*"):
            lost.unlink()
        self.start()

    def kill_daemon(self) -> None:
        self.container.run("sh", "-c", "kill -9 $(cat /run/natgw/natgw.pid)")

    def lose_container(self) -> None:
        """The container's end: its processes are killed, its files are gone, the namespace stays."""
        self.container.remove()

    @property
    def daemon(self) -> tuple[int, int, int, str, str]:
        """The daemon's row in the container's process table."""
        (row,) = [row for row in self.container.processes() if row[4].endswith("-m api.main")]
        return row


@contextlib.contextmanager
def pod(world: World, *options: str, command: Sequence[str] | None = SLEEP) -> Iterator[Pod]:
    """A pod plugged into the world, its container started; removed afterwards."""
    made = Pod(world, *(options or CONTROLLER))
    try:
        made.attach()
        made.start(command=command)
        yield made
    finally:
        world.close_sockets()
        made.remove()
        shutil.rmtree(made._directory, ignore_errors=True)


def eventually(what: str, holds: functools.partial[bool] | Any, patience: float = 3 * PATIENCE) -> float:
    """Look again until it holds; the seconds that took. For what another process does in its own time."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > patience:
            pytest.fail(f"not within {patience:.0f} s: {what}")
        time.sleep(0.02)
    return time.monotonic() - began
