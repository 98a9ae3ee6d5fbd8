"""What is in the image, and what is not."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator

import pytest
from pod import IMAGE, ROOT, Container, podman

PROGRAMS = (
    "bash sh sleep sysctl ping arping curl traceroute conntrack tcpdump nft tc ip modprobe lsmod ps "
    "iptables iptables-save iptables-restore iptables-legacy iptables-legacy-save iptables-legacy-restore iptables-nft "
    "iptables-nft-save iptables-nft-restore ip6tables ip6tables-save ip6tables-legacy ip6tables-legacy-save "
    "grep head seq tr cat printenv kill id awk sed which md5sum xargs chmod natgw bfdd-beacon bfdd-control"
)
NOBODY = ("--user", "65534:65534")
# A pod of a VpcEgressGateway, as far as capabilities go.
EGRESS = (*NOBODY, "--cap-drop=ALL", "--cap-add=NET_ADMIN", "--cap-add=NET_RAW", "--network=none")


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    with Container("--network=none") as made:
        yield made


def test_every_program_that_is_called_is_there(container: Container) -> None:
    script = f"for name in {PROGRAMS}; do command -v $name >/dev/null || echo $name; done"
    assert container.run("sh", "-c", script).split() == []
    assert container.run("/bin/bash", "-c", "/bin/sh -c 'echo yes'") == "yes\n"


def test_the_files_are_those_of_the_checkout(container: Container) -> None:
    for path in (ROOT / "image/rootfs").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            inside = "/" + str(path.relative_to(ROOT / "image/rootfs"))
            assert container.run("cat", inside) == path.read_text(), inside
            assert (container.exec("test", "-x", inside).returncode == 0) == bool(path.stat().st_mode & 0o100), inside


def test_the_packages_are_those_of_the_checkout(container: Container) -> None:
    """Modules, and what they read beside themselves, which an installation leaves out unless it is named."""
    (installed,) = (container.root / "opt/natgw/lib").glob("python3*/site-packages")
    for package in ("api", "gateway", "lab", "rules"):
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                inside = path.relative_to(ROOT)
                assert (installed / inside).read_bytes() == path.read_bytes(), inside


def test_every_module_is_compiled(container: Container) -> None:
    """A start from source takes twice as long, and on a read-only root every one of them does."""
    script = (
        "for file in $(find /opt/natgw /kube-ovn -name '*.py' ! -path '*/bin/*'); do "
        "test -e ${file%/*}/__pycache__/$(basename $file .py).cpython-*.pyc || echo $file; done"
    )
    assert container.run("bash", "-c", script).split() == []
    # Nor may Python distrust what was compiled: it does so when a file's time is not the one that was compiled in.
    modules = "api.main, api.http, api.cli, gateway.bfd.supervisor, gateway.observer.observer"
    verbose = container.exec("/opt/natgw/bin/python3", "-v", "-P", "-c", f"import {modules}").stderr
    read = set(re.findall(r"code object from '?([^'\n]+)", verbose))
    assert len(read) > 300, verbose[-1000:]
    assert [path for path in read if not path.endswith(".pyc")] == []


def test_nothing_of_the_build_is_left(container: Container) -> None:
    for name in ("pip", "gcc", "scapy"):
        assert container.exec("sh", "-c", f"command -v {name} || /opt/natgw/bin/python3 -c 'import {name}'").returncode
    # Certificates and indexes come in as build secrets, which leave nothing.
    left = (
        "/etc/pip.conf",
        "/root/.config",
        "/root/.cache",
        "/run/secrets",
        "/build",
        "/usr/local/share/ca-certificates",
    )
    assert container.exec("sh", "-c", f"ls -d {' '.join(left)} 2>/dev/null").stdout == ""
    assert container.exec("grep", "-rlE", "index-url|find-links", "/etc", "/opt/natgw", "--include=*.c*").stdout == ""


def test_labels_and_version(container: Container) -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        version = tomllib.load(file)["project"]["version"]
    config = json.loads(podman("image", "inspect", IMAGE).stdout)[0]["Config"]
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert labels["version"] == version
    assert labels["licenses"] == "Apache-2.0"
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", labels["revision"])
    assert container.run("natgw", "--version") == f"{version}\n"
    assert config["WorkingDir"] == "/kube-ovn"
    assert f"ARG VERSION={version}\n" in (ROOT / "image/Dockerfile").read_text()


def test_user_65534_can_use_what_the_pods_capabilities_allow() -> None:
    with Container(*EGRESS) as pod:
        pod.run("ip", "link", "set", "lo", "up")
        pod.run("ip", "address", "add", "192.0.2.1/32", "dev", "lo")
        pod.run("iptables-legacy", "-t", "nat", "-S")
        pod.run("iptables-nft", "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE")
        assert "masquerade" in pod.run("nft", "list", "ruleset")
        pod.run("conntrack", "-L")
        pod.run("tcpdump", "-c", "1", "-i", "lo", "--immediate-mode", "-D")
        assert "192.0.2.1" in pod.run("ip", "address", "show", "dev", "lo")


def test_a_client_pod_without_capabilities_can_still_ask() -> None:
    with Container(*NOBODY, "--cap-drop=ALL", "--network=none") as pod:
        for program in ("curl --version", "traceroute --version", "sleep 0", "id", "printenv"):
            pod.run(*program.split())
