"""ClientIP affinity of shared DNATs: who keeps which backend, for how long, and what changes do to it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from share import MANY, Servers, clients, listed, reach, send, sticky, times
from world import A1, A2, INTERNET, B, Gateway, World, wait_for

EIP = "192.168.0.62"
PATH = f"/v1/shared-dnats/{EIP}/80/tcp"
# So many that chance leaves none of three backends without a client: once in 10^10 times.
CLIENTS = [f"203.0.113.{n}" for n in range(20, 80)]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        made.internet.ip(*(f"addr add {address}/24 dev eth0" for address in CLIENTS))
        yield made


@pytest.fixture(scope="module")
def shared(world: World) -> Iterator[Gateway]:
    with world.gateway() as made:
        made.verb("subnet-route-add", "10.0.2.0/24,10.0.1.1")
        made.verb("eip-add", f"{EIP}/24")
        yield made


@pytest.fixture
def gateway(world: World, shared: Gateway) -> Iterator[Gateway]:
    """A gateway with an EIP and no shared DNAT."""
    yield shared
    world.close_sockets()
    assert send(shared, "DELETE", PATH)[0] == 204
    assert "dnat-" not in listed(shared)


def put(gateway: Gateway, backends: list[str], timeout: int = 10800) -> None:
    assert send(gateway, "PUT", PATH, sticky(EIP, 80, backends, timeout))[0] in (200, 201)


def servers(world: World, *names: str) -> Servers:
    hosts = {A1: world.vpc.a1, A2: world.vpc.a2, B: world.vpc.b}
    return {name: hosts[name].tcp_server(80) for name in names or (A2, B)}


def homes(world: World, up: Servers) -> dict[str, str]:
    """The backend of each client, by one connection of each."""
    return {client: times(1, world.internet, (EIP, 80), up, client)[0] for client in CLIENTS}


def test_a_client_keeps_its_backend_and_clients_are_spread(world: World, gateway: Gateway) -> None:
    put(gateway, [A2, B])
    up = servers(world)
    assert len(set(times(20, world.internet, (EIP, 80), up, INTERNET))) == 1
    before = homes(world, up)
    assert set(before.values()) == {A2, B}
    assert homes(world, up) == before
    # Tenants are clients, too, by their own addresses.
    assert len(set(times(20, world.vpc.a1, (EIP, 80), up))) == 1
    assert A1 in clients(gateway, (A2, 80)) | clients(gateway, (B, 80))


def test_a_new_connection_keeps_a_client_for_the_whole_time_again(world: World, gateway: Gateway) -> None:
    put(gateway, [A2, B], 30)
    up = servers(world)
    (home,) = times(1, world.internet, (EIP, 80), up, INTERNET)

    def left() -> int:
        return clients(gateway, (home, 80))[INTERNET]

    wait_for(lambda: left() < 29, "two seconds to pass")
    began = time.monotonic()
    assert times(1, world.internet, (EIP, 80), up, INTERNET) == [home]
    found = left()  # whole seconds
    assert found > 28.9 - (time.monotonic() - began)


def test_a_client_is_forgotten_after_its_time(world: World, gateway: Gateway) -> None:
    put(gateway, [A2, B], 1)
    up = servers(world)
    before = homes(world, up)
    wait_for(lambda: not clients(gateway, (A2, 80)) | clients(gateway, (B, 80)), "the clients to be forgotten")
    assert homes(world, up) != before  # the other backend has one chance in two, with each of the clients


def test_only_the_clients_of_a_removed_backend_are_dealt_anew(world: World, gateway: Gateway) -> None:
    put(gateway, [A1, A2, B])
    up = servers(world, A1, A2, B)
    before = homes(world, up)
    assert set(before.values()) == {A1, A2, B}
    client = next(client for client, home in before.items() if home == B)
    _, flow = reach(world.internet, (EIP, 80), up, client)
    put(gateway, [A1, A2])
    after = homes(world, up)
    assert set(after.values()) == {A1, A2}
    assert {c: home for c, home in after.items() if before[c] != B} == {c: h for c, h in before.items() if h != B}
    flow.talk()
    put(gateway, [B, A1, A2])  # a new one, in another place of the list
    assert homes(world, up) == after


def test_affinity_and_its_time_change_in_one_transaction(world: World, gateway: Gateway) -> None:
    put(gateway, [A2, B], 10800)
    up = servers(world)
    before = homes(world, up)
    put(gateway, [A2, B], 60)
    assert homes(world, up) == before
    remembered = clients(gateway, (A2, 80)) | clients(gateway, (B, 80))
    assert set(remembered) == set(CLIENTS)
    assert max(remembered.values()) <= 60
    off = {**sticky(EIP, 80, [A2, B], 60), "sessionAffinity": "None"}
    assert send(gateway, "PUT", PATH, off)[0] == 200
    assert "set dnat-" not in listed(gateway)
    assert set(times(MANY, world.internet, (EIP, 80), up, INTERNET)) == {A2, B}
    put(gateway, [A2, B])
    assert len(set(times(20, world.internet, (EIP, 80), up, INTERNET))) == 1


def test_the_verb_keeps_the_affinity_that_stands(world: World, gateway: Gateway) -> None:
    put(gateway, [A2, B], 600)
    up = servers(world, A1, A2, B)
    before = homes(world, up)
    gateway.verb("nft-dnat-map-add", f"{EIP},80,tcp,{A1}:80@{A2}:80@{B}:80")
    (found,) = gateway.get("/v1/gateway")["sharedDnats"]
    assert (found["sessionAffinity"], found["sessionAffinityTimeoutSeconds"]) == ("ClientIP", 600)
    assert homes(world, up) == before
