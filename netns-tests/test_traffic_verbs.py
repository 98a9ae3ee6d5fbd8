"""Verbs as a controller calls them: what they return, what they refuse, routes, addresses; with real packets."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from traffic import ping, tcp, udp
from world import A1, A2, INTERNET, OWN, ROUTER, B, Gateway, World, identical

EIP, EIP2, EIP3 = "192.168.0.50", "192.168.0.51", "192.168.0.52"
VPC_ROUTE = "10.0.2.0/24,10.0.1.1"
DEFAULT_ROUTE = {"dst": "default", "gateway": ROUTER, "dev": "net1", "flags": ["onlink"]}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        yield made


@pytest.fixture(params=["legacy", "nft"])
def gateway(world: World, request: pytest.FixtureRequest) -> Iterator[Gateway]:
    with world.gateway(variant=request.param) as made:
        yield made


@pytest.fixture
def bare(world: World) -> Iterator[Gateway]:
    """A gateway with noDefaultEIP: its net1 has neither address nor route."""
    with world.gateway(own=None) as made:
        yield made


def everything(gateway: Gateway) -> list[tuple[str, ...]]:
    """One of each kind, as a controller would call for them."""
    return [
        ("init",),
        ("subnet-route-add", VPC_ROUTE, "10.0.3.0/24,10.0.1.1"),
        ("eip-add", f"{EIP}/24"),
        ("eip-add", f"{EIP2}/24"),
        ("floating-ip-add", f"{EIP},{A1}"),
        ("dnat-add", f"{EIP2},8888,tcp,{A2},80"),
        ("snat-add", f"{EIP2},10.0.0.0/16,--random-fully"),
        ("snat-add", f"{EIP2},10.0.1.0/24"),
        ("snat-add", f"{EIP2},10.0.1.9/32"),
    ]


def test_every_verb_repeated_succeeds_and_changes_nothing(world: World, gateway: Gateway) -> None:
    calls = everything(gateway)
    for call in calls:
        gateway.verb(*call)
    for call in calls:
        identical(gateway, lambda call=call: gateway.verb(*call))  # type: ignore[misc]
    deletions = [
        ("snat-del", f"{EIP2},10.0.1.0/24"),
        ("dnat-del", f"{EIP2},8888,tcp"),
        ("floating-ip-del", EIP),
        ("subnet-route-del", "10.0.3.0/24"),
        ("eip-del", f"{EIP}/24"),
    ]
    for call in deletions:
        gateway.verb(*call)
        identical(gateway, lambda call=call: gateway.verb(*call))  # type: ignore[misc]


def test_what_upstreams_tests_look_for_is_there(gateway: Gateway) -> None:
    for call in everything(gateway):
        gateway.verb(*call)
    saved = gateway.saved()
    patterns = [
        r"(?m)^:HAIRPIN_SNAT ",
        *(
            rf"-A HAIRPIN_SNAT -o \b.*\b -m mark --mark 0x1/0x1 -m conntrack --ctstate DNAT --ctorigdst \b{eip}\b"
            rf" -j SNAT --to-source \b{eip}\b"
            for eip in map(re.escape, (EIP, EIP2))
        ),
        rf"-A EXCLUSIVE_DNAT -d \b{re.escape(EIP)}/32\b .* --to-destination \b{re.escape(A1)}\b",
        rf"-A EXCLUSIVE_SNAT -s \b{re.escape(A1)}/32\b .* --to-source \b{re.escape(EIP)}\b",
        rf"-A SHARED_DNAT -d \b{re.escape(EIP2)}/32\b -p tcp .* --dport 8888 -j DNAT --to-destination"
        rf" \b{re.escape(A2)}:80\b",
        rf"-A SHARED_SNAT\b.*-s 10\.0\.1\.0/24\b.*--to-source {re.escape(EIP2)}\b",
    ]
    for pattern in patterns:
        assert re.search(pattern, saved), f"{pattern} is not in\n{saved}"
    order = [line.split()[3] for line in saved.splitlines() if line.startswith("-A SHARED_SNAT ")]
    assert order == ["10.0.1.9/32", "10.0.1.0/24", "10.0.0.0/16"]
    version = gateway.verb("get-iptables-version")
    found = re.search(r"v([0-9]+(\.[0-9]+)+)", version)
    assert found
    assert f"({'nf_tables' if gateway.variant == 'nft' else 'legacy'})" in version


@pytest.mark.parametrize(
    ("call", "standing"),
    [
        (("floating-ip-add", f"{EIP},{A2}"), A1),
        (("dnat-add", f"{EIP2},8888,tcp,{A1},80"), A2),
        (("dnat-add", f"{EIP2},8888,TCP,{A2},81"), A2),
    ],
)
def test_a_conflict_fails_with_one_line_and_changes_nothing(world: World, call: tuple[str, ...], standing: str) -> None:
    with world.gateway() as gateway:
        for added in everything(gateway):
            gateway.verb(*added)

        def refused() -> None:
            done = gateway.exec(*call)
            assert done.returncode == 1
            said = (done.stdout + done.stderr).splitlines()
            assert len(said) == 1, done
            assert standing in said[0]

        identical(gateway, refused)
        tcp(world.internet, (EIP2, 8888), world.vpc.a2.tcp_server(80))


def test_before_init_verbs_say_so(world: World) -> None:
    gateway = world.plug()
    try:
        for call in everything(gateway)[1:]:
            done = gateway.exec(*call)
            assert (done.returncode, done.stderr) == (1, "nat gateway not initialized\n"), done
        done = gateway.exec("init", "eth0,net7")
        assert done.returncode == 1
        assert "net7" in done.stderr
        gateway.verb("init", "eth0,net1")
        gateway.verb("eip-add", f"{EIP}/24")
    finally:
        gateway.remove()


def test_unknown_verbs_and_bad_rules_fail_and_change_nothing(gateway: Gateway) -> None:
    def refused() -> None:
        for call in (("frobnicate",), ("eip-add", "192.168.0.300/24"), ("dnat-add", f"{EIP},0,tcp,{A1},80")):
            assert gateway.exec(*call).returncode == 1

    identical(gateway, refused)


def test_eip_add_answers_at_once_and_nothing_hangs_on_its_pipes(world: World) -> None:
    """The first verb of a gateway starts the daemon; an exec ends only when nobody holds its pipes any more."""
    gateway = world.plug()
    try:
        gateway.verb("init")  # subprocess.run returns when stdout and stderr are closed
        took = []
        for address in (EIP, EIP2, EIP3):
            began = time.monotonic()
            gateway.verb("eip-add", f"{address}/24")
            took.append(time.monotonic() - began)
        assert min(took) < 2  # seconds, which the two repeats of each take
        pid = gateway.pid
        assert pid
        gateway.verb("get-iptables-version")
        assert gateway.pid == pid
    finally:
        gateway.remove()


def test_calls_at_once_start_one_daemon_and_all_succeed(world: World) -> None:
    """Releases up to 1.14 call without a lock; retries of several workers may find no daemon at the same time."""
    gateway = world.plug()
    try:
        with ThreadPoolExecutor(6) as pool:
            for done in pool.map(lambda _: gateway.exec("init"), range(6)):
                assert (done.returncode, done.stderr) == (0, ""), done
            pid = gateway.pid
            eips = [f"192.168.0.{number}" for number in range(50, 62)]
            for done in pool.map(lambda eip: gateway.exec("eip-add", f"{eip}/24"), eips):
                assert (done.returncode, done.stderr) == (0, ""), done
        assert gateway.pid == pid
        assert sorted(gateway.net1_addresses()) == sorted([OWN, *eips])
        assert len(gateway.rules("-A HAIRPIN_SNAT")) == len(eips)
        gateway.logged("INFO natgw: serving")
        assert gateway.log().count("INFO natgw: serving") == 1
    finally:
        gateway.remove()


def test_subnet_routes_carry_traffic(world: World, gateway: Gateway) -> None:
    gateway.verb("eip-add", f"{EIP}/24", f"{EIP2}/24")
    gateway.verb("floating-ip-add", f"{EIP},{B}")
    gateway.verb("dnat-add", f"{EIP2},80,tcp,{A1},80")
    server, inside = world.vpc.b.tcp_server(80), world.vpc.a1.tcp_server(80)
    gateway.verb("subnet-route-add", VPC_ROUTE)
    flow = udp(world.internet, (EIP, 69), world.vpc.b.udp(69))
    tcp(world.internet, (EIP, 80), server)
    assert udp(world.vpc.b, (INTERNET, 53), world.internet.udp(53)).source[0] == EIP
    # From one subnet to the other by an EIP: back through the gateway, too.
    assert tcp(world.vpc.a1, (EIP, 80), server).source[0] == EIP
    assert tcp(world.vpc.b, (EIP2, 80), inside).source[0] == EIP
    gateway.verb("subnet-route-del", "10.0.2.0/24")
    assert "10.0.2.0/24" not in gateway.ip_text("route")
    control = tcp(world.internet, (EIP2, 80), inside)
    assert not flow.forth_arrives(control)
    gateway.verb("subnet-route-add", VPC_ROUTE)
    flow.talk()  # a route is not a translation: the connection was not forgotten
    # Another next hop replaces the first; the old one does not stay beside it.
    gateway.verb("subnet-route-add", "10.0.2.0/24,10.0.1.11")
    assert [route["gateway"] for route in gateway.ip_json("route", "show", "10.0.2.0/24")] == ["10.0.1.11"]


def test_deleting_the_primary_address_keeps_the_others(world: World, bare: Gateway) -> None:
    for address in (EIP, EIP2, EIP3):
        bare.verb("eip-add", f"{address}/24")
    assert bare.net1_addresses() == [EIP, EIP2, EIP3]
    bare.verb("dnat-add", f"{EIP2},80,tcp,{A1},80")
    bare.verb("snat-add", f"{EIP3},10.0.1.0/24")
    server, web = world.vpc.a1.tcp_server(80), world.internet.tcp_server(80)
    flows = tcp(world.internet, (EIP2, 80), server), tcp(world.vpc.a2, (INTERNET, 80), web)
    bare.verb("eip-del", f"{EIP}/24")
    assert sorted(bare.net1_addresses()) == [EIP2, EIP3]
    for flow in flows:
        flow.talk()
    tcp(world.internet, (EIP2, 80), server)
    assert tcp(world.vpc.a2, (INTERNET, 80), web).source[0] == EIP3
    assert ping(world.router, EIP3, bare) == ROUTER


def test_the_default_route_comes_with_the_first_eip(world: World, bare: Gateway) -> None:
    assert bare.default_routes() == []
    bare.verb("snat-add", f"{EIP},10.0.1.0/24")
    assert bare.default_routes() == []
    bare.verb("eip-add", f"{EIP}/24")
    (route,) = bare.default_routes()
    assert {name: route[name] for name in DEFAULT_ROUTE} == DEFAULT_ROUTE
    assert udp(world.vpc.a1, (INTERNET, 53), world.internet.udp(53)).source[0] == EIP
    # The kernel takes the routes of an interface away with its last address; they come again with the next one.
    bare.verb("eip-del", f"{EIP}/24")
    bare.verb("eip-add", f"{EIP2}/24")
    assert [route["gateway"] for route in bare.default_routes()] == [ROUTER]
    bare.verb("floating-ip-add", f"{EIP2},{A2}")
    assert ping(world.vpc.a2, INTERNET, world.internet) == EIP2


def test_the_cnis_default_route_is_taken_over_and_stays(world: World, gateway: Gateway) -> None:
    assert [route.get("flags") for route in gateway.default_routes()] == [[]]
    gateway.verb("eip-add", f"{EIP}/24")
    (route,) = gateway.default_routes()
    assert {name: route[name] for name in DEFAULT_ROUTE} == DEFAULT_ROUTE
    gateway.verb("eip-del", f"{EIP}/24")
    assert gateway.default_routes() == [route]


def test_an_eip_may_be_the_gateways_own_address(world: World, gateway: Gateway) -> None:
    gateway.verb("eip-add", f"{OWN}/24")
    gateway.verb("dnat-add", f"{OWN},80,tcp,{A1},80")
    gateway.verb("snat-add", f"{OWN},10.0.1.0/24")
    assert gateway.net1_addresses() == [OWN]
    tcp(world.internet, (OWN, 80), world.vpc.a1.tcp_server(80))
    assert udp(world.vpc.a2, (INTERNET, 53), world.internet.udp(53)).source[0] == OWN


def test_a_gateway_named_by_a_later_call_replaces_the_route(world: World, bare: Gateway) -> None:
    bare.verb("eip-add", f"{EIP}/24", GATEWAY_V4="")
    assert [route["gateway"] for route in bare.default_routes()] == [ROUTER]  # an empty one changes nothing
    bare.verb("eip-add", f"{EIP}/24", GATEWAY_V4="192.168.0.99")
    assert [route["gateway"] for route in bare.default_routes()] == ["192.168.0.99"]
    bare.verb("eip-add", f"{EIP2}/24,{ROUTER}")  # release 1.12 names it in the rule
    assert [route["gateway"] for route in bare.default_routes()] == [ROUTER]
