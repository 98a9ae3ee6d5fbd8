"""NATGW_INPUT=protect against everything that can be sent: protocols, fragments, tricks, of both sides and families."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from test_input_guard import PROTECT, ROUTER_V6, V6, connects, server, silent
from traffic import Flow, Host
from world import A1, INTERNET, OWN, RIVAL, Gateway, World, set_sysctl, wait_for

LAN_IP, EIP = "10.0.1.254", "192.168.0.50"
LAN_V6, TENANT_V6 = "fd01::fe", "fd01::11"
BFD, MULTIHOP = 3784, 4784
IGMP, IPIP, GRE, ESP, OSPF, VRRP, SCTP, UNKNOWN = 2, 4, 47, 50, 89, 112, 132, 253
OTHERS = (IGMP, IPIP, GRE, ESP, OSPF, VRRP, SCTP, UNKNOWN)
ALL_BUT = (22, 53, 80, 178, 646, 3783, 3785, 4783, 4785, 9101, 49152, 65535)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        for host, address in ((made.router, ROUTER_V6), (made.vpc.a1, TENANT_V6)):
            set_sysctl(host, {"ipv6/conf/eth0/disable_ipv6": 0})
            host.ip(f"addr add {address}/64 dev eth0 nodad")
        yield made


@pytest.fixture(scope="module", params=["legacy", "nft"])
def gateway(world: World, request: pytest.FixtureRequest) -> Iterator[Gateway]:
    with world.gateway(variant=request.param, environment=PROTECT) as made:
        made.ip(f"addr add {V6}/64 dev net1 nodad", f"addr add {LAN_V6}/64 dev eth0 nodad")
        made.verb("eip-add", f"{EIP}/24")
        for host in (world.router, world.vpc.a1):  # who know the MAC addresses of the gateway before
            host.ip("neigh flush dev eth0")
        Trial(made).heard(*sides(world))
        yield made


@pytest.fixture(autouse=True)
def no_sockets_left(world: World, gateway: Gateway) -> Iterator[None]:
    yield
    world.close_sockets()
    gateway.close_sockets()


@dataclass
class Side:
    """Somebody who sends, and an address of the gateway."""

    sender: Host
    address: str

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.address else socket.AF_INET


def sides(world: World) -> list[Side]:
    tenant = world.vpc.a1
    return [
        Side(world.rival, OWN),
        Side(world.rival, EIP),
        Side(world.router, V6),
        Side(tenant, LAN_IP),
        Side(tenant, LAN_V6),
        Side(tenant, OWN),  # an address of the other side
    ]


class Trial:
    """Packets sent to the gateway; which of them its own sockets have heard is asked behind them all.

    What is sent later and comes in tells that the others were decided about before, so silence takes no time.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        # What one processor sends it has taken in in that order; two may overtake each other.
        self._processors = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(self._processors)})
        self._sent: list[tuple[socket.socket, bytes, str]] = []

    def datagram(self, side: Side, port: int, size: int = 32, source: int = 0) -> None:
        """In fragments if it is long."""
        sent = secrets.token_bytes(size)
        near = self._socket(side.sender, side.family, socket.SOCK_DGRAM)
        near.bind(("", source))
        self._sent.append((self._bound(side.family, port), sent, f"{side.address} udp {source}->{port}, {size} bytes"))
        near.sendto(sent, (side.address, port))

    def packet(self, side: Side, protocol: int, sent: bytes) -> None:
        """Any protocol; a raw socket hears what has passed INPUT."""
        ear = self._gateway.open_socket(side.family, socket.SOCK_RAW, protocol)
        self._sent.append((ear, sent, f"{side.address} protocol {protocol} {sent.hex()}"))
        self._socket(side.sender, side.family, socket.SOCK_RAW, protocol).sendto(sent, (side.address, 0))

    def heard(self, *sides: Side) -> set[str]:
        """What has come in; of each side something comes in now that is let through."""
        for side in sides:
            ear, last = self._bound(side.family, BFD), secrets.token_bytes(16)
            self._socket(side.sender, side.family, socket.SOCK_DGRAM).sendto(last, (side.address, BFD))
            while ear.recv(1 << 16) != last:
                pass
            ear.close()
        found = {said for ear, sent, said in self._sent if any(part.endswith(sent) for part in _waiting(ear))}
        self._sent.clear()
        os.sched_setaffinity(0, self._processors)
        self._gateway.close_sockets()
        for side in sides:
            side.sender.close_sockets()
        return found

    def _bound(self, family: int, port: int) -> socket.socket:
        ear = self._socket(self._gateway, family, socket.SOCK_DGRAM)
        ear.bind(("", port))
        return ear

    def _socket(self, host: Host, family: int, kind: int, protocol: int = 0) -> socket.socket:
        opened = host.open_socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return opened


def _waiting(ear: socket.socket) -> Iterator[bytes]:
    ear.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            yield ear.recv(1 << 16)


def arrived(ear: socket.socket, sent: bytes) -> bool:
    """Whether the next thing that is heard ends with what was sent."""
    return ear.recv(1 << 16).endswith(sent)


def segment(port: int, flags: int, source: int = 40000) -> bytes:
    """A TCP header that begins, continues or ends nothing; its checksum is nobody's business before INPUT."""
    return struct.pack("!HHLLBBHHH", source, port, 1, 1, 5 << 4, flags, 1024, 0, 0)


def test_no_other_protocol_comes_in_from_either_side(world: World, gateway: Gateway) -> None:
    for side in sides(world):
        trial = Trial(gateway)
        for protocol in OTHERS:
            trial.packet(side, protocol, secrets.token_bytes(24))
        assert trial.heard(side) == set()


def test_of_udp_only_bfd_comes_in_whole_or_in_fragments(world: World, gateway: Gateway) -> None:
    for side in sides(world):
        trial = Trial(gateway)
        for port in (BFD, MULTIHOP):
            for size in (32, 4000):
                trial.datagram(side, port, size)
                assert len(trial.heard(side)) == 1, (side, port, size)
        for port in ALL_BUT:
            trial.datagram(side, port)
        trial.datagram(side, 9999, 4000)
        for source in (53, 179, BFD):  # what an answer could come from
            trial.datagram(side, 9999, source=source)
        assert trial.heard(side) == set()


def test_of_tcp_only_what_is_named_comes_in(world: World, gateway: Gateway) -> None:
    for port in (179, 9100, 9101):
        server(gateway, port)
    tenant = world.vpc.a1
    peers, strangers = (Side(world.router, OWN), Side(world.router, V6)), (Side(tenant, LAN_V6), Side(world.rival, OWN))
    for side in (*peers, *strangers, Side(tenant, LAN_IP)):
        connects(side.sender, side.address, 9100)
        if side in peers:
            connects(side.sender, side.address, 179)
        else:
            assert silent(side.sender, side.address, 179)
    assert silent(tenant, LAN_IP, 9101)
    assert silent(world.router, V6, 9101)
    # Segments of no connection, from ports of the named as well, twice: the first could have made a connection known.
    for side in (Side(world.rival, OWN), Side(tenant, LAN_IP)):
        trial = Trial(gateway)
        for flags in (0x02, 0x10, 0x12, 0x01, 0x29, 0x00):
            for source in (179, 40000, 40000):
                trial.packet(side, socket.IPPROTO_TCP, segment(22, flags, source))
        assert trial.heard(side) == set()


def test_what_stands_and_what_the_gateway_begins_goes_on(world: World, gateway: Gateway) -> None:
    """BGP with a peer that is not named: the gateway may call it, and a session that stood before stays."""
    gateway.kill()
    gateway.verb("get-iptables-version", NATGW_INPUT="open")
    listening = server(gateway, 179)
    near = world.rival.open_socket(socket.AF_INET, socket.SOCK_STREAM)
    near.connect((OWN, 179))
    before = Flow(near, gateway.keep(listening.accept()[0]), near.getsockname()[:2])
    before.talk()
    gateway.kill()
    gateway.verb("get-iptables-version")
    assert silent(world.rival, OWN, 179)
    before.talk()
    other = world.rival.tcp_server(179)
    calling = gateway.open_socket(socket.AF_INET, socket.SOCK_STREAM)
    calling.connect((RIVAL, 179))
    Flow(calling, world.rival.keep(other.accept()[0]), calling.getsockname()[:2]).talk()


def test_what_is_forwarded_is_not_looked_at(world: World, gateway: Gateway) -> None:
    gateway.verb("floating-ip-add", f"{EIP},{A1}")
    tenant, outside = world.vpc.a1, world.internet
    for protocol in (GRE, ESP, UNKNOWN):
        ear = tenant.open_socket(socket.AF_INET, socket.SOCK_RAW, protocol)
        sent = bytes(4) + secrets.token_bytes(24)
        outside.open_socket(socket.AF_INET, socket.SOCK_RAW, protocol).sendto(sent, (EIP, 0))
        assert arrived(ear, sent), protocol
    for port in (22, 9999):
        sent = secrets.token_bytes(4000)
        ear, far = tenant.udp(port), outside.udp(port)
        outside.udp().sendto(sent, (EIP, port))
        assert arrived(ear, sent)
        tenant.udp().sendto(sent, (INTERNET, port))
        assert arrived(far, sent)
        tenant.tcp_server(port)
        connects(outside, EIP, port)
    gateway.verb("floating-ip-del", f"{EIP},{A1}")


def repairs(gateway: Gateway) -> int:
    return int(gateway.status()["drift"]["repairs"])


@pytest.mark.parametrize("harm", ["-D INPUT -j INPUT_GUARD", "-F INPUT_GUARD", "-I INPUT_GUARD -j RETURN"])
def test_a_gap_that_somebody_makes_is_closed(world: World, gateway: Gateway, harm: str) -> None:
    server(gateway, 22)
    before = repairs(gateway)
    gateway.run(f"iptables-{gateway.variant}", "-t", "mangle", *harm.split())
    wait_for(lambda: repairs(gateway) > before, "the repair")
    assert silent(world.rival, OWN, 22)
    assert silent(world.vpc.a1, LAN_IP, 22)


def test_a_gap_in_ipv6_is_closed_too(world: World, gateway: Gateway) -> None:
    """Legacy tables of IPv6 give no evidence of an edit: the next full comparison finds it, or the next change."""
    server(gateway, 22)
    before = repairs(gateway)
    gateway.run(f"ip6tables-{gateway.variant}", "-t", "mangle", "-F", "INPUT_GUARD")
    if gateway.variant == "legacy":
        assert gateway.get("/v1/drift")["now"]
        gateway.verb("init")
    else:
        wait_for(lambda: repairs(gateway) > before, "the repair")
    assert silent(world.router, V6, 22)
    assert silent(world.vpc.a1, LAN_V6, 22)


def test_open_again_everything_comes_in_as_it_would_without(world: World, gateway: Gateway) -> None:
    """So the silence of the other tests is the guard's."""
    gateway.kill()
    gateway.verb("get-iptables-version", NATGW_INPUT="open")
    server(gateway, 22)
    for side in sides(world):
        connects(side.sender, side.address, 22), side
    gateway.close_sockets()
    for side in sides(world):
        trial = Trial(gateway)
        for port in (9999, 53):
            trial.datagram(side, port)
        trial.datagram(side, 9998, 4000)
        for protocol in (GRE, OSPF, UNKNOWN):
            trial.packet(side, protocol, bytes(4) + secrets.token_bytes(24))
        if side.address == OWN:
            trial.packet(side, socket.IPPROTO_TCP, segment(22, 0x10))
        assert len(trial.heard(side)) == (7 if side.address == OWN else 6), side
    assert "INPUT_GUARD" not in gateway.saved()
