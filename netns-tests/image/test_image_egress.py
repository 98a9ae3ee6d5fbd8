"""A VpcEgressGateway's pod: user 65534, few capabilities, 64 MiB, and a volume over /usr/local/sbin."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from netns import Namespace, veth
from pod import Container, eventually
from traffic import Host, udp

OURS, THEIRS = "10.89.0.1", "10.89.0.2"
SUPERVISOR = "/kube-ovn/kube-ovn-bfdd-supervisor"
LIMIT = 64 << 20  # bytes
SPEC = (
    "--user=65534:65534",
    "--cap-drop=ALL",
    "--cap-add=NET_ADMIN",
    "--cap-add=NET_BIND_SERVICE",
    "--cap-add=NET_RAW",
    "--memory=64m",
    "--tmpfs=/usr/local/sbin:mode=1777",
    "--tmpfs=/var/run/kube-ovn/bfdd-supervisor:mode=1777",
    "--env=BFD_MIN_TX=100",
    "--env=BFD_MIN_RX=100",
    "--env=BFD_MULTI=15",
)


def bfdd(netns: Namespace, ours: str, theirs: str) -> Container:
    addresses = (f"--env=POD_IPS={ours}", f"--env=BFD_PEER_IPS={theirs}")
    return Container(f"--network=ns:/run/netns/{netns.name}", *SPEC, *addresses, command=(SUPERVISOR, "run"))


@pytest.fixture
def pods(make_netns: Callable[[], Namespace]) -> Iterator[tuple[Container, Container]]:
    one, two = make_netns(), make_netns()
    veth(one, "eth0", two, "eth0")
    one.run("ip", "address", "add", f"{OURS}/24", "dev", "eth0")
    two.run("ip", "address", "add", f"{THEIRS}/24", "dev", "eth0")
    # What the CNI gives and the init container leaves: without it a pod calls itself unhealthy, attracting no traffic.
    for netns, gateway in ((one, THEIRS), (two, OURS)):
        netns.run("ip", "route", "add", "default", "via", gateway)
        netns.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    with ExitStack() as stack:
        yield tuple(stack.enter_context(bfdd(*what)) for what in ((one, OURS, THEIRS), (two, THEIRS, OURS)))


def test_the_supervisor_is_live_and_ready(pods: tuple[Container, Container]) -> None:
    pod, peer = pods
    eventually("live", lambda: pod.exec(SUPERVISOR, "live").returncode == 0)
    eventually("ready", lambda: pod.exec(SUPERVISOR, "ready").returncode == 0)
    eventually("the peer ready", lambda: peer.exec(SUPERVISOR, "ready").returncode == 0)
    # Kube-OVN's tests recognise it by the command line of the first process and by this socket.
    assert pod.run("sh", "-c", "tr '\\0' ' ' </proc/1/cmdline").startswith(f"{SUPERVISOR} run")
    pod.run("test", "-S", "/var/run/kube-ovn/bfdd-supervisor/control.sock")
    assert "state=Up" in pod.run("bfdd-control", "status")
    (session,) = json.loads(pod.run(SUPERVISOR, "status"))["Sessions"]
    assert session["State"] == "Up"
    resident = [row[2] for row in pod.processes() if row[1] in (0, 1) and "ps" not in row[4]]
    print(f"BFD processes: {', '.join(f'{one / 1024:.1f}' for one in resident)} MiB resident")
    assert len(resident) == 2
    assert max(resident) <= 17 * 1024  # of the 20 MiB that it may have
    used = int(pod.run("cat", "/sys/fs/cgroup/memory/memory.usage_in_bytes"))
    print(f"container: {used / (1 << 20):.1f} MiB of {LIMIT >> 20}")
    assert used <= 40 << 20


def test_a_peer_that_dies_is_seen(pods: tuple[Container, Container]) -> None:
    pod, peer = pods
    eventually("ready", lambda: pod.exec(SUPERVISOR, "ready").returncode == 0)
    peer.remove()
    eventually("not ready", lambda: pod.exec(SUPERVISOR, "ready").returncode != 0)
    assert "state=Up" not in pod.run("bfdd-control", "status")


def test_a_speaker_that_is_killed_comes_back_in_its_container(pods: tuple[Container, Container]) -> None:
    pod, peer = pods
    eventually("ready", lambda: pod.exec(SUPERVISOR, "ready").returncode == 0)
    (speaker,) = [row[0] for row in pod.processes() if row[1] == 1]
    pod.run("sh", "-c", f"kill -9 {speaker}")
    seconds = eventually("live again", lambda: pod.exec(SUPERVISOR, "live").returncode == 0)
    print(f"another speaker answers after {seconds:.2f} s")
    eventually("ready again", lambda: pod.exec(SUPERVISOR, "ready").returncode == 0)
    eventually("the peer ready", lambda: peer.exec(SUPERVISOR, "ready").returncode == 0)
    assert json.loads(pod.run(SUPERVISOR, "status"))["ChildRestarts"] == 1
    assert pod.state() == "running"
    assert pod.zombies() == []


def test_a_gateway_without_bfd_sleeps_in_ten_mebibytes(make_netns: Callable[[], Namespace]) -> None:
    netns = make_netns()
    options = ("--user=65534:65534", "--cap-drop=ALL", "--cap-add=NET_ADMIN", "--cap-add=NET_RAW", "--memory=10m")
    with Container(f"--network=ns:/run/netns/{netns.name}", *options) as pod:
        assert pod.run("id", "-u") == "65534\n"
        assert "lo" in pod.run("ip", "link")


INIT = (
    "--env=INTERNAL_GATEWAY_IPV4=10.16.0.1",
    "--env=EXTERNAL_GATEWAY_IPV4=172.17.0.1",
    "--env=INTERNAL_GATEWAY_IPV6=",
    "--env=EXTERNAL_GATEWAY_IPV6=",
)


def test_the_init_container_makes_the_pod_forward() -> None:
    """Privileged, it sets up the pod's namespace and ends; afterwards nothing runs but an unprivileged sleep."""
    with ExitStack() as stack:
        gateway, tenant, outside = (Host(role) for role in ("veg", "tenant", "out"))
        for host in (gateway, tenant, outside):
            stack.callback(host.remove)
        for name, peer, network in (("eth0", tenant, "10.16.0"), ("net1", outside, "172.17.0")):
            veth(gateway, name, peer, "eth0")
            gateway.ip(f"addr add {network}.10/24 dev {name}")
            peer.ip(f"addr add {network}.1/24 dev eth0")
        gateway.ip("route add default via 172.17.0.1")
        tenant.ip("route add default via 10.16.0.10")
        network = f"--network=ns:/run/netns/{gateway.name}"
        script = "chmod +t /usr/local/sbin && bash /kube-ovn/init-vpc-egress-gateway.sh"
        init = ("bash", "-exc", f"{script}; echo done; sleep infinity")
        with Container(network, "--privileged", "--tmpfs=/usr/local/sbin:mode=1777", *INIT, command=init) as pod:
            eventually("the script's end", lambda: "\ndone\n" in "\n" + pod.log() or pod.state() == "exited")
            assert "\ndone\n" in "\n" + pod.log(), pod.log()
        with Container(network, "--user=65534:65534", "--cap-drop=ALL", "--memory=10m"):
            flow = udp(tenant, ("172.17.0.1", 53), outside.udp(53))
            assert flow.source[0] == "172.17.0.10"
            flow.talk()


OBSERVER = "/kube-ovn/vpc-egress-gateway-observer"


def test_the_observer_sees_connections_as_user_65534(make_netns: Callable[[], Namespace], tmp_path: Path) -> None:
    """It needs CAP_NET_ADMIN, which only the file that is executed can give it; its root is read-only."""
    netns = make_netns()
    observability = {"interfaceMetrics": {"enabled": True}, "conntrack": {"metrics": {"enabled": True}}}
    config = {"namespace": "ns", "name": "veg", "externalNetwork": "ns/ext", "observability": observability}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tmp_path.chmod(0o755)
    options = ("--user=65534:65534", "--cap-drop=ALL", "--cap-add=NET_ADMIN", "--read-only", "--memory=256m")
    script = f"if [ -x {OBSERVER} ]; then exec {OBSERVER} --network-status /none; fi; exec sleep infinity"
    with Container(
        f"--network=ns:/run/netns/{netns.name}",
        *options,
        f"--volume={tmp_path}:/etc/kube-ovn-observer:ro",
        "--env=POD_NAME=pod",
        "--env=NODE_NAME=node",
        command=("/bin/sh", "-ec", script),
    ) as pod:
        eventually("healthy", lambda: pod.exec(OBSERVER, "--health-check").returncode == 0)

        def up() -> bool:
            metrics = pod.run("curl", "-fsS", "http://127.0.0.1:10666/metrics").splitlines()
            found = [line for line in metrics if "observability_collector_up{" in line and "conntrack" in line]
            return [line.rpartition(" ")[2] for line in found] == ["1"]

        eventually("the first look at the kernel's table", up)
