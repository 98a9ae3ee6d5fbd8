"""The egress gateway on the real kernel: the real init script, both versions of IP, both iptables variants.

::

    snat 10.0.4.2 ──┐                                   ┌─────────┐
    kept 10.0.5.2 ──┴─ VPC router ── 10.0.1.1  10.0.1.5 ┤ gateway ├ 192.168.0.11 ── outside 192.168.0.1, 203.0.113.2
                       fd00:x::1                   eth0 └─────────┘ net1

Everything has an IPv6 address of the same pattern. The sources 10.0.5.0/24 and fd00:5::/64 keep their addresses;
the outside has a route to them, as a router beside a real gateway would.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from netns import require, run_in, veth
from traffic import PATIENCE, Host
from world import set_sysctl

from gateway.kernel.links import KernelLinks
from rules.state import AddDevice, AddPolicyRule, Bridge, DeleteDevice, DeletePolicyRule, SetMaster, SetUp, Vxlan

SCRIPT = Path(__file__).parent.parent / "image/rootfs/kube-ovn/init-vpc-egress-gateway.sh"
IPV4 = {
    "INTERNAL_GATEWAY_IPV4": "10.0.1.1",
    "EXTERNAL_GATEWAY_IPV4": "192.168.0.1",
    "NO_SNAT_SOURCES_IPV4": "10.0.5.0/24",
}
IPV6 = {
    "INTERNAL_GATEWAY_IPV6": "fd00:1::1",
    "EXTERNAL_GATEWAY_IPV6": "fd00:9::1",
    "NO_SNAT_SOURCES_IPV6": "fd00:5::/64",
}
SERVER = {4: "203.0.113.2", 6: "2001:db8::2"}
OWN = {4: "192.168.0.11", 6: "fd00:9::11"}
INSIDE = {4: "10.0.1.5", 6: "fd00:1::5"}
KEPT = {4: "10.0.5.2", 6: "fd00:5::2"}
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
VARIANTS = ("legacy", "nft")
TIMERS = ("base_reachable_time_ms", "delay_first_probe_time")


class Pod(Host):
    """The gateway's namespace as the container network leaves it."""

    def __init__(self, router: Host, outside: Host) -> None:
        super().__init__("veg")
        veth(router, "gw", self, "eth0")
        veth(outside, "gw", self, "net1")
        self.ip(
            "addr add 10.0.1.5/24 dev eth0",
            "addr add fd00:1::5/64 dev eth0 nodad",
            "addr add 192.168.0.11/24 dev net1",
            "addr add fd00:9::11/64 dev net1 nodad",
            *(f"route add 10.0.{n}.0/24 via 10.0.1.1" for n in (4, 5)),
            *(f"route add fd00:{n}::/64 via fd00:1::1" for n in (4, 5)),
            "route add default via 192.168.0.1 dev net1",
            "route add default via fd00:9::1 dev net1",
        )

    def init(self, variant: str, *environments: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """The script as the init container runs it; it may fail."""
        asked = [f"{name}={value}" for environment in environments for name, value in environment.items()]
        return subprocess.run(
            ["ip", "netns", "exec", self.name, "env", f"NATGW_IPTABLES={variant}", *asked, "bash", str(SCRIPT)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def started(self, variant: str, *environments: dict[str, str]) -> str:
        """The script's word after a run that must succeed."""
        done = self.init(variant, *environments)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def dump(self, variant: str) -> str:
        """Everything that the script could have written, as operators see it."""
        commands = [
            *(
                ["ip", *family, *what]
                for family in ([], ["-6"])
                for what in (["rule"], ["route", "show", "table", "all"])
            ),
            *([f"{program}-{variant}-save"] for program in ("iptables", "ip6tables")),
            ["sysctl", "net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding", "net.ipv4.conf.eth0.rp_filter"],
        ]
        lines = [line for command in commands for line in _named(command[0], run_in(self.name, command))]
        # What the kernel puts there by itself comes and goes by its own timers.
        return "\n".join(line.split(" expires ")[0] for line in lines if "fe80" not in line)


def _named(program: str, text: str) -> Iterator[str]:
    """Lines with the table that they stand in; an empty table, counters and dates say nothing."""
    table = ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line
        elif not line.startswith(("#", ":", "COMMIT")):
            yield f"{program} {table} {line}"


class Net:
    """The namespaces around one gateway."""

    def __init__(self) -> None:
        self.hosts: list[Host] = []
        self.router, self.outside = self.host("vpc"), self.host("out")
        self.snat, self.kept = self.host("snat"), self.host("kept")
        for number, tenant in ((4, self.snat), (5, self.kept)):
            veth(self.router, f"t{number}", tenant, "eth0")
            self.router.ip(
                f"addr add 10.0.{number}.1/24 dev t{number}", f"addr add fd00:{number}::1/64 dev t{number} nodad"
            )
            tenant.ip(
                f"addr add 10.0.{number}.2/24 dev eth0",
                f"addr add fd00:{number}::2/64 dev eth0 nodad",
                f"route add default via 10.0.{number}.1",
                f"route add default via fd00:{number}::1",
            )
        self.pod = Pod(self.router, self.outside)
        self.hosts.append(self.pod)
        loose = {"ipv4/conf/all/rp_filter": 0, "ipv4/conf/gw/rp_filter": 0}
        set_sysctl(self.router, loose | {"ipv4/ip_forward": 1, "ipv6/conf/all/forwarding": 1})
        set_sysctl(self.outside, loose)
        self.router.ip(
            "addr add 10.0.1.1/24 dev gw",
            "addr add fd00:1::1/64 dev gw nodad",
            "route add default via 10.0.1.5",
            "route add default via fd00:1::5",
        )
        self.outside.ip(
            "addr add 192.168.0.1/24 dev gw",
            "addr add fd00:9::1/64 dev gw nodad",
            "addr add 203.0.113.2/32 dev lo",
            "addr add 2001:db8::2/128 dev lo",
            "route add 10.0.5.0/24 via 192.168.0.11",
            "route add fd00:5::/64 via fd00:9::11",
        )

    def host(self, role: str) -> Host:
        self.hosts.append(Host(role))
        return self.hosts[-1]

    def seen(self, client: Host, family: int) -> str:
        """The source address that a server outside sees of a tenant's TCP connection; bytes pass both ways."""
        with listening(self.outside, FAMILIES[family]) as server:
            near = client.open_socket(FAMILIES[family], socket.SOCK_STREAM)
            near.connect((SERVER[family], server.getsockname()[1]))
            far, source = server.accept()
            self.outside.keep(far)
            near.sendall(b"forth")
            assert far.recv(16) == b"forth"
            far.sendall(b"back")
            assert near.recv(16) == b"back"
            return str(source[0])

    def second_hop(self, client: Host, family: int) -> str:
        """Who says that a packet's time is over two hops from a tenant: what a traceroute would show."""
        level, option = (socket.IPPROTO_IP, 11) if family == 4 else (socket.IPPROTO_IPV6, 25)  # IP(V6)_RECVERR
        probe = client.open_socket(FAMILIES[family], socket.SOCK_DGRAM)
        probe.setsockopt(level, option, 1)
        hops = socket.IP_TTL if family == 4 else socket.IPV6_UNICAST_HOPS
        probe.setsockopt(level, hops, 2)
        probe.connect((SERVER[family], 33434))
        probe.send(b"probe")
        with pytest.raises(OSError, match=r"No route to host|unreachable|exceeded"):
            probe.recv(16)  # waits for the error, ten seconds at most
        _, ancillary, _, _ = probe.recvmsg(64, 512, socket.MSG_ERRQUEUE)
        (data,) = (data for at, kind, data in ancillary if (at, kind) == (level, option))
        # struct sock_extended_err, then the offender as a sockaddr.
        offender = data[struct.calcsize("=IBBBBII") :]
        return socket.inet_ntop(FAMILIES[family], offender[4:8] if family == 4 else offender[8:24])

    def remove(self) -> None:
        for host in self.hosts:
            host.remove()


def listening(host: Host, family: int) -> socket.socket:
    """A listening socket on a port of its own."""
    server = host.open_socket(family, socket.SOCK_STREAM)
    server.settimeout(PATIENCE)
    server.bind(("", 0))
    server.listen()
    return server


@pytest.fixture
def net() -> Iterator[Net]:
    require("ip", "bash", "sysctl", "iptables-legacy-save", "iptables-nft-save", "ip6tables-legacy-save")
    built = Net()
    try:
        yield built
    finally:
        built.remove()


@pytest.mark.parametrize("variant", VARIANTS)
def test_tenants_leave_as_the_gateway_and_kept_sources_as_themselves(net: Net, variant: str) -> None:
    net.pod.started(variant, IPV4, IPV6)
    for family in (4, 6):
        assert net.seen(net.snat, family) == OWN[family]
        assert net.seen(net.kept, family) == KEPT[family]
        assert net.second_hop(net.kept, family) == INSIDE[family]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_second_run_writes_nothing(net: Net, variant: str) -> None:
    net.pod.started(variant, IPV4, IPV6)
    before = net.pod.dump(variant)
    assert net.pod.started(variant, IPV4, IPV6) == "init-vpc-egress-gateway: nothing to do\n"
    assert net.pod.dump(variant) == before


def test_the_kernel_asks_the_external_gateway_often(net: Net) -> None:
    """So that the speaker, which may not set these timers, learns soon when nobody is there any more."""

    def timers(interface: str) -> list[str]:
        names = [f"net.{ip}.neigh.{interface}.{timer}" for ip in ("ipv4", "ipv6") for timer in TIMERS]
        return run_in(net.pod.name, ["sysctl", "-n", *names]).split()

    before = timers("eth0")
    net.pod.started("nft", IPV4, IPV6, {"NATGW_BFD_HEALTH_INTERVAL": "400"})
    assert timers("net1") == ["200", "0"] * 2
    assert timers("eth0") == before != timers("net1")
    net.pod.started("nft", IPV4, IPV6, {"NATGW_BFD_HEALTH_INTERVAL": "no number"})


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_rules_are_those_that_kube_ovn_leaves(net: Net, variant: str) -> None:
    net.pod.started(variant, IPV4, IPV6)
    for family, program in ((4, "iptables"), (6, "ip6tables")):
        kept = "10.0.5.0/24" if family == 4 else "fd00:5::/64"
        saved = run_in(net.pod.name, [f"{program}-{variant}-save", "-t", "nat"])
        assert [line for line in saved.splitlines() if line.startswith("-A")] == [
            "-A PREROUTING -i eth0 -j MARK --set-xmark 0x4000/0x4000",
            f"-A POSTROUTING -d {kept} -j RETURN",
            f"-A POSTROUTING -s {kept} -j RETURN",
            "-A POSTROUTING -j VEG-MASQUERADE",
            "-A VEG-MASQUERADE -j MARK --set-xmark 0x0/0xffffffff",
            "-A VEG-MASQUERADE -j MASQUERADE --random-fully",
        ]
        rules = run_in(net.pod.name, ["ip", f"-{family}", "rule"]).replace(" proto 223", "").splitlines()
        assert [" ".join(line.split()) for line in rules if line.startswith("100")] == [
            "1001: from all iif eth0 lookup default",
            "1002: from all iif net1 lookup 1000",
            f"1003: from {INSIDE[family]} iif lo lookup 1000",
            f"1004: from {OWN[family]} iif lo lookup default",
        ]
        route = run_in(net.pod.name, ["ip", f"-{family}", "route", "show", "table", "1000"])
        assert route.startswith(f"default via {'10.0.1.1' if family == 4 else 'fd00:1::1'} dev eth0")


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_of_others_is_flushed_and_other_values_converge(net: Net, variant: str) -> None:
    theirs = [
        ["iptables", "raw", "PREROUTING", "-s", "172.31.0.0/16"],
        ["iptables", "nat", "PREROUTING", "-s", "172.31.0.0/16"],
        ["iptables", "nat", "POSTROUTING", "-s", "172.31.0.0/16"],
        ["ip6tables", "nat", "POSTROUTING", "-d", "fd31::/16"],
        ["ip6tables", "mangle", "FORWARD", "-s", "fd31::/16"],
    ]
    for program, table, chain, *match in theirs:
        net.pod.run(f"{program}-{variant}", "-w", "-t", table, "-A", chain, *match, "-j", "RETURN")
    net.pod.ip("rule add pref 900 fwmark 0x7 lookup 77", "route add 10.77.0.0/16 via 10.0.1.1 table 77")
    net.pod.ip("rule add pref 1002 fwmark 0x8 to 10.9.0.0/16 lookup 78", "rule add pref 1004 iif old0 lookup 79")
    net.pod.started(variant, IPV4, IPV6)
    first = net.pod.dump(variant)
    net.pod.started(variant, IPV4 | {"NO_SNAT_SOURCES_IPV4": "10.0.4.0/24"}, IPV6)
    text = net.pod.dump(variant)
    for line in ("-s 172.31.0.0/16 -j RETURN", "-d fd31::/16 -j RETURN", "-s fd31::/16 -j RETURN"):
        assert text.count(line) == first.count(line) > 0
    assert "fwmark 0x7 lookup 77" in text
    assert "lookup 78" not in text
    assert "lookup 79" not in text
    assert "10.0.5.0/24 -j RETURN" not in text
    assert net.seen(net.snat, 6) == OWN[6]
    assert net.seen(net.kept, 4) == OWN[4]  # it is no longer a source that keeps its address
    net.pod.started(variant, IPV4, IPV6)
    assert net.pod.dump(variant) == first


def test_a_refusal_leaves_the_pod_as_it_was(net: Net) -> None:
    """Chains and rules are in when the kernel refuses a device: the name is taken by something that is not ours."""
    net.pod.ip("rule add pref 1003 fwmark 0x8 to 10.9.0.0/16 lookup 78", "link add vrf-vpn type veth peer name other")
    before = net.pod.dump("nft")
    done = net.pod.init("nft", IPV4, IPV6, {"ENABLE_EVPN": "true", "VNI": "1016"})
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "vrf-vpn" in done.stderr
    assert net.pod.dump("nft") == before


def test_foreign_policy_rules_are_deleted_and_put_back_as_they_were(net: Net) -> None:
    net.pod.ip(
        "rule add pref 1001 not fwmark 0x8/0xff to 10.9.0.0/16 lookup 78",
        "rule add pref 1002 blackhole from 10.8.0.0/16",
        "rule add pref 1003 iif eth0 oif net1 ipproto tcp dport 80-90 lookup 7777",
        "rule add pref 1004 lookup main suppress_prefixlength 0",
        "rule add pref 1004 iif gone0 lookup 9",
    )
    net.pod.run("ip", "-6", "rule", "add", "pref", "1004", "unreachable", "from", "fd00:8::/64", "to", "fd00:7::/64")
    before = sorted(net.pod.dump("nft").splitlines())
    with net.pod.entered():
        links = KernelLinks()
        strange = [rule for rule in links.read().policy_rules if rule.priority in range(1001, 1005)]
        assert len(strange) == 6
        links.commit([DeletePolicyRule(rule) for rule in strange])
        assert not [rule for rule in links.read().policy_rules if rule.priority in range(1001, 1005)]
        links.commit([AddPolicyRule(rule) for rule in strange])
        links.close()
    assert [line.replace(" proto 223", "") for line in sorted(net.pod.dump("nft").splitlines())] == before


def test_evpn_where_the_kernel_has_it_and_a_clear_word_where_not(net: Net) -> None:
    probe = subprocess.run(
        ["ip", "-n", net.router.name, "link", "add", "probe0", "type", "vrf", "table", "9"],
        capture_output=True,
        check=False,
    )
    done = net.pod.init("nft", IPV4, {"ENABLE_BGP": "true", "ENABLE_EVPN": "true", "VNI": "1016"})
    if probe.returncode:
        assert done.returncode == 1
        assert "make the vrf device vrf-vpn: this kernel has no vrf devices" in done.stderr
        return
    assert (done.returncode, done.stderr) == (0, "")
    assert "vxlan id 1016" in run_in(net.pod.name, ["ip", "-d", "link", "show", "vxlan-vpn"])
    assert "master vrf-vpn" in run_in(net.pod.name, ["ip", "link", "show", "eth0"])


def test_bridge_and_tunnel_are_made_read_back_and_deleted(net: Net) -> None:
    """The parts of EVPN that every kernel has."""
    devices = {"br-vpn": Bridge(), "vxlan-vpn": Vxlan(1016, "192.168.0.11"), "vx6": Vxlan(7, "fd00:9::11", 4790)}
    with net.pod.entered():
        links = KernelLinks()
        links.commit([AddDevice(name, device) for name, device in devices.items()])
        links.commit([SetMaster("vxlan-vpn", "br-vpn"), SetUp("vxlan-vpn", True)])
        read = links.read().links
        assert {name: read[name].device for name in devices} == devices
        assert (read["vxlan-vpn"].master, read["vxlan-vpn"].up, read["vx6"].master) == ("br-vpn", True, None)
        links.commit([SetMaster("vxlan-vpn", None), *(DeleteDevice(name) for name in devices)])
        assert not devices.keys() & links.read().links.keys()
        links.close()


def test_the_script_runs_through_a_link_and_with_no_other_directory(net: Net, tmp_path: Path) -> None:
    link = tmp_path / "init.sh"
    link.symlink_to(SCRIPT)
    done = subprocess.run(
        ["ip", "netns", "exec", net.pod.name, "bash", str(link)],
        cwd="/",
        env={**os.environ, **IPV4, "NATGW_IPTABLES": "nft"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
