"""An lb-svc pod in the world of namespaces, as its controller sees it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from netns import veth
from world import A1, ROUTER, SCRIPT, Gateway, World, set_sysctl

LB_IP, CLUSTER_IP, POD_IP, POD_GATEWAY = "192.168.0.30", "10.96.0.20", "10.0.1.77", "10.0.1.1"
HTTP = f"{LB_IP},80,tcp,{CLUSTER_IP},8080"
DNS = f"{LB_IP},53,udp,{CLUSTER_IP},5353"
DNAT = f"-A PREROUTING -d {LB_IP}/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination {CLUSTER_IP}:8080"
MASQUERADE = f"-A POSTROUTING -d {CLUSTER_IP}/32 -j MASQUERADE"


class Pod(Gateway):
    """An lb-svc pod: no environment of a gateway's, and the load balancer's address on net1 by the CNI."""

    script = SCRIPT.with_name("lb-svc.sh")

    def __init__(self, world: World, variant: str) -> None:
        super().__init__(world, variant=variant, environment={"GATEWAY_V4": ""})

    def attach(self) -> None:
        world, vpc = self._world, self._vpc
        set_sysctl(self, {"ipv4/ip_forward": 1})  # as the node has it
        veth(vpc.router, "gw", self, "eth0")
        vpc.router.ip("link set gw master br1")
        # Always the same: tenants' neighbour tables outlive a pod here, which OVN's answers do not.
        self.ip(
            "link set eth0 address 02:00:0a:00:01:4d",
            f"addr add {POD_IP}/24 dev eth0",
            f"route add default via {POD_GATEWAY}",
        )
        name = f"m{self.name[-6:]}"
        world.external.ip(
            f"link add {name} link parent type macvlan mode bridge",
            f"link set {name} netns {self.name} name net1",
        )
        self.ip("link set net1 up", f"addr add {LB_IP}/24 dev net1")
        world.router.ip("neigh flush dev eth0")
        self.mac = self.link("net1")["address"]

    def sequence(self, *ports: str) -> None:
        """What the controller sends on every update of the pod."""
        self.verb("init")
        self.verb("eip-add", f"{LB_IP}/24,{ROUTER}")
        for port in ports or (HTTP, DNS):
            self.verb("dnat-add", f"{port},{POD_GATEWAY}")

    def table(self) -> set[str]:
        """Table 100: what is for whom, by which way."""
        lines = self.run("ip", "route", "show", "table", "100", check=False)  # it comes with its first route
        routes = [line.split() for line in lines.splitlines()]
        return {" ".join(route[: route.index("dev") + 2]) for route in routes}

    def led_to_table(self) -> list[str]:
        """The interfaces for which table 100 decides."""
        return sorted(rule["iif"] for rule in self.ip_json("rule", "show") if rule["table"] == "100")

    def arp(self) -> bool:
        return "NOARP" not in self.link("net1")["flags"]


@contextlib.contextmanager
def plugged(world: World, variant: str) -> Iterator[Pod]:
    made = Pod(world, variant)
    try:
        made.attach()
        yield made
    finally:
        world.close_sockets()
        made.remove()


@contextlib.contextmanager
def world_of_a_service() -> Iterator[World]:
    """A world whose host a1 answers at the cluster IP, too."""
    with World() as made:
        made.vpc.a1.ip(f"addr add {CLUSTER_IP}/32 dev lo")
        made.vpc.router.ip(f"route add {CLUSTER_IP}/32 via {A1}")
        yield made


def dns_server(world: World) -> socket.socket:
    """Bound to the cluster IP, from which it must answer."""
    server = world.vpc.a1.open_socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((CLUSTER_IP, 5353))
    return server
