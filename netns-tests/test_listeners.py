"""Who reaches the TCP listeners, by real packets: of a gateway with a management interface beside the two sides."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_non_primary import MANAGEMENT, SecondaryGateway
from traffic import PATIENCE, SILENCE, Host
from world import OWN, World, wait_for

METRICS = 9912
UNHEARD = SILENCE * 10  # seconds to wait for an answer to somebody who is not heard at all


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        yield made


@contextlib.contextmanager
def plugged(world: World, **environment: str) -> Iterator[SecondaryGateway]:
    """A gateway with eth0 on the management network, net1 on the VPC and net2 outside; nobody has called it yet."""
    gateway = SecondaryGateway(world, own=f"{OWN}/24", environment=environment)
    try:
        gateway.attach()
        yield gateway
    finally:
        world.close_sockets()
        gateway.remove()


def scraped(host: Host, address: str, port: int = METRICS, *, patience: float = PATIENCE) -> bool:
    """Whether somebody there gets an answer."""
    near = host.open_socket(socket.AF_INET, socket.SOCK_STREAM)
    near.settimeout(patience)
    try:
        near.connect((address, port))
        near.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return near.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def starts(gateway: SecondaryGateway, *init: str) -> str:
    """The complaint of the first call, empty if the daemon came up."""
    return gateway.exec("init", *init).stderr


def test_a_management_address_answers_the_management_network_alone(world: World) -> None:
    """To Linux an address is the host's, whichever interface a packet comes in by, and tenants' packets come in."""
    manager, tenant = world.external, world.vpc.a1
    with plugged(world, NATGW_METRICS_LISTEN=f"{MANAGEMENT}:{METRICS}") as gateway:
        gateway.verb("init", "net1,net2")
        wait_for(lambda: f"{MANAGEMENT}%eth0:{METRICS}" in gateway.run("ss", "-Hltn"), "a listener")
        assert scraped(manager, MANAGEMENT)
        # A port next to it, that is not bound to eth0, is reached from the VPC: so this way in exists.
        with contextlib.closing(gateway.tcp_server(METRICS + 1)), contextlib.closing(tenant.open_socket(2, 1)) as near:
            near.connect((MANAGEMENT, METRICS + 1))
        assert not scraped(tenant, MANAGEMENT, patience=UNHEARD)
        world.router.ip(f"route replace {MANAGEMENT}/32 via {OWN}")
        assert not scraped(world.router, MANAGEMENT, patience=UNHEARD)
        assert scraped(gateway, MANAGEMENT)  # a process of the pod


@pytest.mark.parametrize("name", ["NATGW_METRICS_LISTEN", "NATGW_LISTEN"])
@pytest.mark.parametrize(
    ("listen", "why"),
    [("0.0.0.0", "is every address"), ("[::]", "is every address"), ("10.0.1.254", "net1"), (OWN, "net2")],
)
def test_every_tcp_listener_stays_away_from_tenants_and_outsiders(
    world: World, tmp_path: Path, name: str, listen: str, why: str
) -> None:
    token = tmp_path / "token"
    token.write_text("sesame\n")
    sides = {"VPC_INTERFACE": "net1", "EXTERNAL_INTERFACE": "net2", "NATGW_TOKEN_FILE": str(token)}
    with plugged(world, **sides, **{name: f"{listen}:{METRICS}"}) as gateway:
        complaint = starts(gateway)
        assert f"{name}={listen}:{METRICS} is" in complaint
        assert why in complaint
        assert "NATGW_LISTEN_ANYWHERE=yes-I-know" in complaint
        assert gateway.run("ss", "-Hltn").strip() == ""


def test_told_in_so_many_words_it_listens_there(world: World) -> None:
    told = {"NATGW_METRICS_LISTEN": f"0.0.0.0:{METRICS}", "NATGW_LISTEN_ANYWHERE": "yes-I-know", "NATGW_ARP": "on"}
    with plugged(world, **told) as gateway:
        gateway.verb("init", "net1,net2")
        wait_for(lambda: f":{METRICS}" in gateway.run("ss", "-Hltn"), "a listener")
        for host, address in ((world.external, MANAGEMENT), (world.vpc.a1, "10.0.1.254"), (world.router, OWN)):
            assert scraped(host, address)


def test_an_interface_that_becomes_a_side_later_answers_nobody_any_more(world: World) -> None:
    """Nobody has named the sides when the daemon starts; ``init`` does."""
    with plugged(world, NATGW_METRICS_LISTEN=f"{OWN}:{METRICS}", NATGW_ARP="on") as gateway:
        gateway.verb("get-iptables-version")
        wait_for(lambda: f"{OWN}%net2:{METRICS}" in gateway.run("ss", "-Hltn"), "a listener")
        assert scraped(world.router, OWN)
        gateway.verb("init", "net1,net2")
        assert not scraped(world.router, OWN)
        refused = 'natgw_refused_connections_total{face="http",reason="place"}'
        assert refused in gateway.run(
            "curl", "-s", "--unix-socket", str(gateway.run_dir / "api.sock"), "http://gw/metrics"
        )
