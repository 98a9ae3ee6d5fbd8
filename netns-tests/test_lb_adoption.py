"""A load balancer that Kube-OVN's lb-svc.sh left: what is adopted, what is done about it, and who notices.

The goldens are in ``adoption/lb-svc/``, as those of NAT gateways are (``test_adoption.py``).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from adoption.balancer import COMMANDS
from adoption.golden import adopted, agrees, edits
from pod import DNS, HTTP, LB_IP, Pod, dns_server, plugged, world_of_a_service
from traffic import Stream, tcp, udp
from world import World, wait_for

from rules.loadbalancer import LoadBalancerSpec


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_a_service() as made:
        yield made


@pytest.fixture(params=["legacy", "nft"])
def pod(world: World, request: pytest.FixtureRequest) -> Iterator[Pod]:
    with plugged(world, request.param) as made:
        yield made


def test_a_load_balancer_is_taken_over_and_nobody_notices(world: World, pod: Pod) -> None:
    for command in COMMANDS:
        pod.run(*(f"iptables-{pod.variant}" if word == "iptables" else word for word in command))
    spec, plan = adopted(pod)
    agrees("lb-svc", COMMANDS, spec, plan)
    world.rival.ip("neigh flush dev eth0")  # whoever had that address before was another test's
    web = world.vpc.a1.tcp_server(8080)
    flows = [tcp(client, (LB_IP, 80), web) for client in (world.internet, world.rival) for _ in range(50)]
    with Stream(udp(world.internet, (LB_IP, 53), dns_server(world))) as stream:
        wait_for(lambda: stream.sent > 50, "the stream runs")
        pod.sequence()
        assert LoadBalancerSpec.model_validate(pod.get("/v1/load-balancer")) == spec
        said = f"[{edits(plan)} step"
        if plan:
            wait_for(lambda: said in pod.log(), "its adoption is logged")  # by a thread that nobody waits for
        else:
            assert said not in pod.log()
        running = stream.sent
        pod.verb("init")  # it comes again with every update of the pod
        pod.sequence(HTTP, DNS)
        wait_for(lambda: stream.sent > running + 50, "the stream runs on")
        assert pod.arp()
        assert pod.get("/v1/drift")["now"] == []
    assert stream.lost == 0
    for flow in flows:
        flow.talk()
