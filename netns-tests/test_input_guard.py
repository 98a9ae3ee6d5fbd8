"""NATGW_INPUT=protect by real packets: what may be sent to the gateway itself, of both families and both variants."""

from __future__ import annotations

import shutil
import signal
import socket
from collections.abc import Iterator

import pytest
from traffic import SILENCE, Host, ping, tcp, udp
from world import A1, A2, INTERNET, OWN, RIVAL, ROUTER, Gateway, World, set_sysctl, wait_for

LAN_IP = "10.0.1.254"
EIP = "192.168.0.50"
V6, ROUTER_V6 = "fd00::11", "fd00::1"
PROTECT = {"NATGW_INPUT": "protect", "NATGW_METRICS_PORTS": "9100", "NATGW_BGP_PEERS": f"{ROUTER}, {ROUTER_V6}"}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        set_sysctl(made.router, {"ipv6/conf/eth0/disable_ipv6": 0})
        made.router.ip(f"addr add {ROUTER_V6}/64 dev eth0 nodad")
        yield made


@pytest.fixture(params=["legacy", "nft"])
def gateway(world: World, request: pytest.FixtureRequest) -> Iterator[Gateway]:
    with world.gateway(variant=request.param, environment=PROTECT) as made:
        made.ip(f"addr add {V6}/64 dev net1 nodad")
        made.verb("eip-add", f"{EIP}/24")
        yield made


def server(gateway: Gateway, port: int) -> socket.socket:
    """A listening socket of the gateway itself, for both families."""
    opened = gateway.open_socket(socket.AF_INET6, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    opened.bind(("::", port))
    opened.listen()
    return opened


def connects(client: Host, address: str, port: int) -> None:
    """A connection comes about, however long this machine takes for it."""
    _calling(client, address).connect((address, port))


def silent(client: Host, address: str, port: int) -> bool:
    """Whether nothing is heard of a call for as long as silence takes: neither that it is taken nor that it is not."""
    near = _calling(client, address)
    near.settimeout(SILENCE * 3)
    try:
        near.connect((address, port))
    except TimeoutError:
        return True
    return False


def _calling(client: Host, address: str) -> socket.socket:
    return client.open_socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)


def arrives(client: Host, address: str, ear: socket.socket, behind: socket.socket | None = None) -> bool:
    """Whether a datagram is heard; where another is heard that was sent ``behind`` it, it would be there, too."""
    near, port = client.udp(), ear.getsockname()[1]
    near.sendto(b"hello", (address, port))
    if behind is not None:
        assert arrives(client, address, behind)
        ear.settimeout(SILENCE)
    try:
        return ear.recv(64) == b"hello"
    except TimeoutError:
        return False


def test_only_what_is_named_reaches_the_gateway_itself(world: World, gateway: Gateway) -> None:
    tenant = world.vpc.a1
    for port in (22, 179, 9100):
        server(gateway, port)
    for client, address in ((world.rival, OWN), (world.rival, EIP), (tenant, LAN_IP), (world.router, V6)):
        connects(client, address, 9100)
        assert silent(client, address, 22)
    for client, address in ((world.router, OWN), (world.router, V6)):
        connects(client, address, 179)
    for client, address in ((world.rival, OWN), (tenant, LAN_IP)):
        assert silent(client, address, 179)
    bfd = gateway.udp(3784)
    assert arrives(world.rival, OWN, bfd)
    assert arrives(world.rival, OWN, gateway.udp(4784))
    assert not arrives(world.rival, OWN, gateway.udp(9999), behind=bfd)
    assert ping(world.rival, OWN, gateway) == RIVAL
    assert ping(tenant, LAN_IP, gateway) == A1
    connects(gateway, "127.0.0.1", 22)  # lo is not looked at


def test_what_the_gateway_begins_and_what_it_forwards_is_as_ever(world: World, gateway: Gateway) -> None:
    gateway.verb("dnat-add", f"{EIP},8888,tcp,{A2},80", f"{EIP},53,udp,{A2},53")
    gateway.verb("snat-add", f"{EIP},10.0.0.0/16")
    backend, web = world.vpc.a2.tcp_server(80), world.internet.tcp_server(80)
    tcp(world.internet, (EIP, 8888), backend)
    udp(world.internet, (EIP, 53), world.vpc.a2.udp(53))
    assert tcp(world.vpc.a1, (INTERNET, 80), web).source[0] == EIP
    assert tcp(gateway, (INTERNET, 80), web).source[0] == OWN


def test_explain_says_what_becomes_of_a_packet_to_the_gateway(gateway: Gateway) -> None:
    def verdict(port: int) -> str:
        query = f"protocol=tcp&src={RIVAL}&dst={OWN}:{port}"
        return str(gateway.get(f"/v1/explain?{query}")["verdict"])

    assert (verdict(9100), verdict(22)) == ("local", "dropped")


def test_foreign_rules_stay_and_what_was_left_is_known_or_taken_away(world: World, gateway: Gateway) -> None:
    server(gateway, 22)
    tools = [f"{name}-{gateway.variant}" for name in ("iptables", "ip6tables")]
    for tool in tools:
        gateway.run(tool, "-t", "mangle", "-A", "INPUT", "-p", "tcp", "--dport", "7", "-j", "RETURN")

    def guards() -> list[str]:
        saved = [gateway.run(f"{tool}-save", "-t", "mangle") for tool in tools]
        assert all("--dport 7 -j RETURN" in text for text in saved)
        return ["\n".join(line for line in text.splitlines() if "INPUT_GUARD" in line) for text in saved]

    before = guards()
    assert all("-A INPUT -j INPUT_GUARD" in text for text in before)
    gateway.kill()
    shutil.rmtree(gateway.state_dir)
    gateway.verb("get-iptables-version")
    wait_for(lambda: "no stored spec" in gateway.log(), "the log's line")  # by a thread that no verb waits for
    assert " steps, " not in gateway.log().rpartition("no stored spec")[2]
    assert [text.splitlines()[1:] for text in guards()] == [text.splitlines()[1:] for text in before]
    assert silent(world.rival, OWN, 22)
    gateway.kill(signal.SIGTERM)
    gateway.verb("get-iptables-version", NATGW_INPUT="open")
    assert guards() == ["", ""]
    connects(world.rival, OWN, 22)
    connects(world.router, V6, 22)
