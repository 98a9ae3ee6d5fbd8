"""The container as the controller runs it: verbs and packets, deaths of the daemon and of the container."""

from __future__ import annotations

import re
import signal
import statistics
import threading
import time

import pytest
from pod import CONTROLLER, Pod, eventually, pod
from traffic import ping, tcp, udp
from world import A1, A2, INTERNET, World

EIP, EIP2 = "192.168.0.50", "192.168.0.51"
VERBS = (
    ("init",),
    ("subnet-route-add", "10.0.2.0/24,10.0.1.1"),
    ("eip-add", f"{EIP}/24"),
    ("eip-add", f"{EIP2}/24"),
    ("floating-ip-add", f"{EIP},{A1}"),
    ("dnat-add", f"{EIP2},8888,tcp,{A2},80"),
    ("dnat-add", f"{EIP2},53,udp,{A2},53"),
    ("snat-add", f"{EIP2},10.0.0.0/16,--random-fully"),
)


def works(world: World) -> None:
    """Everything of VERBS works, by real packets."""
    backend, web = world.vpc.a2.tcp_server(80), world.internet.tcp_server(80)
    tcp(world.internet, (EIP2, 8888), backend)
    udp(world.internet, (EIP2, 53), world.vpc.a2.udp(53))
    assert tcp(world.vpc.b, (INTERNET, 80), web).source[0] == EIP2
    assert tcp(world.vpc.a1, (INTERNET, 80), web).source[0] == EIP
    assert ping(world.internet, EIP, world.vpc.a1) == INTERNET
    world.close_sockets()


def fill(gateway: Pod) -> None:
    for words in VERBS:
        gateway.verb(*words)


def milliseconds(gateway: Pod, *argv: str) -> float:
    """Milliseconds that a program took in the container."""
    began = time.monotonic()
    assert gateway.container.nsenter(*argv).returncode == 0
    return (time.monotonic() - began) * 1000


def test_verbs_by_argv_and_by_shell(world: World) -> None:
    with pod(world) as gateway:
        assert gateway.container.processes()[0][4] == "sleep infinity"
        began = time.monotonic()
        first = gateway.container.nsenter("bash", "/kube-ovn/nat-gateway.sh", "init")
        cold = time.monotonic() - began
        assert (first.returncode, first.stderr) == (0, ""), first
        print(f"first init, cold: {cold:.2f} s")
        fill(gateway)
        works(world)
        before = gateway.saved()
        for words in VERBS:  # as releases up to 1.16 call
            done = gateway.exec_by_shell(*words)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), words
        assert gateway.saved() == before
        version = gateway.exec_by_shell("get-iptables-version")
        assert re.search(r"v([0-9]+(\.[0-9]+)+)", version.stdout)
        assert version.stderr == ""
        assert gateway.exec("floating-ip-add", f"{EIP},{A2}").returncode == 1
        assert gateway.exec("no-such-verb").returncode == 1
        script = "/kube-ovn/nat-gateway.sh init"
        without_python = gateway.container.exec("sh", "-c", f"NATGW_PYTHON=/none exec bash {script}")
        assert (without_python.returncode, without_python.stderr) == (0, "")
        calls = (script, f"NATGW_PERL= {script}")
        medians = [statistics.median(milliseconds(gateway, "bash", "-c", call) for _ in range(20)) for call in calls]
        print("a verb after it, median: {:.1f} ms; by Python's client: {:.1f} ms".format(*medians))


def test_a_killed_daemon_comes_back_by_itself(world: World) -> None:
    with pod(world) as gateway:
        fill(gateway)
        rules, first = gateway.saved(), gateway.daemon[0]
        began = time.monotonic()
        gateway.kill_daemon()
        eventually("another daemon", lambda: (gateway.run_dir / "natgw.pid").read_text().strip() != str(first))
        print(f"back after {time.monotonic() - began:.2f} s")
        works(world)
        assert gateway.daemon[0] != first
        assert gateway.saved() == rules
        assert gateway.exec("floating-ip-add", f"{EIP},{A2}").returncode == 1  # it knows what stands
        eventually("no zombie", lambda: gateway.container.zombies() == [])


class Stream(threading.Thread):
    """Datagrams through a DNAT, one every 2 ms, until ``stop``; ``lost`` counts those without an answer."""

    def __init__(self, world: World) -> None:
        super().__init__(daemon=True)
        self.flow = udp(world.internet, (EIP2, 53), world.vpc.a2.udp(53))
        self.sent, self.lost = 0, 0
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(0.002):
            token = self.sent.to_bytes(4, "big")
            self.flow.near.send(token)
            self.sent += 1
            try:
                if self.flow.far.recv(64) != token:
                    self.lost += 1
            except TimeoutError:
                self.lost += 1

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def test_a_container_restarted_in_its_namespace_goes_on(world: World) -> None:
    """In a Deployment a container is restarted in place: its files are gone, the kernel's state is the pod's."""
    with pod(world) as gateway:
        fill(gateway)
        rules, known = gateway.saved(), gateway.get("/v1/gateway")
        stream = Stream(world)
        stream.start()
        gateway.lose_container()
        gateway.start()
        assert not (gateway.container.root / "run/natgw").exists()
        assert not (gateway.container.root / "var/lib/natgw/spec.json").exists()
        gateway.verb("eip-add", f"{EIP}/24")
        stream.stop()
        assert stream.sent > 100
        assert stream.lost == 0
        world.close_sockets()
        assert gateway.saved() == rules
        assert gateway.get("/v1/gateway") == known
        works(world)
        assert gateway.exec("floating-ip-add", f"{EIP},{A2}").returncode == 1


def test_a_read_only_root(world: World) -> None:
    """Nothing but /run and the state directory need be writable."""
    with pod(world, *CONTROLLER, "--read-only", "--tmpfs=/run", "--tmpfs=/var/lib/natgw") as gateway:
        fill(gateway)
        works(world)
        gateway.kill_daemon()
        gateway.verb(*VERBS[-1])
        works(world)
        assert (gateway.container.root / "var/lib/natgw/spec.json").exists()


def test_a_pod_of_ones_own_runs_the_daemon_under_an_init(world: World) -> None:
    """No controller: the image's own entrypoint, configured over HTTP; and verbs find that daemon."""
    with pod(world, *CONTROLLER, command=None) as gateway:
        eventually("the daemon to listen", (gateway.run_dir / "api.sock").exists)
        first, *_ = gateway.container.processes()
        assert (first[0], first[4]) == (1, "/usr/bin/catatonit -- natgw serve")
        fill(gateway)
        works(world)
        assert [row[4] for row in gateway.container.processes() if "keeper" in row[4]] == []
        gateway.container.exec("sh", "-c", "kill -TERM 1")
        eventually("its end", lambda: gateway.container.inspect()["State"]["Status"] == "exited")
        state = gateway.container.inspect()["State"]
        assert state["ExitCode"] in (0, 128 + signal.SIGTERM), state
        works(world)  # the kernel forwards


@pytest.mark.timeout(300)
def test_memory_with_a_thousand_eips(world: World) -> None:
    with pod(world) as gateway:
        gateway.verb("init")
        eips = [f"192.168.{100 + number // 250}.{1 + number % 250}/16" for number in range(1000)]
        for start in range(0, 1000, 100):
            gateway.verb("eip-add", *eips[start : start + 100])
        for eip in eips[:100]:
            gateway.container.nsenter("bash", "/kube-ovn/nat-gateway.sh", "eip-add", eip)
        assert len(gateway.get("/v1/gateway")["eips"]) == 1000
        resident = gateway.daemon[2] / 1024
        print(f"daemon with 1,000 EIPs: {resident:.1f} MiB resident")
        assert resident <= 96
