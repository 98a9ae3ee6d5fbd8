"""What tests of share-type DNAT ask: which backend answers, what nft shows, and the HTTP face for affinity."""

from __future__ import annotations

import contextlib
import http.client
import json
import secrets
import select
import socket
from collections.abc import Mapping
from typing import Any

from traffic import PATIENCE, Address, Flow, Host
from world import Gateway, wait_for

Servers = Mapping[str, socket.socket]
MANY = 40
"""So many connections reach both of two backends; by chance they do not once in 10^11 times."""


def reach(client: Host, to: Address, servers: Servers, source: str = "") -> tuple[str, Flow]:
    """Connect (or exchange the first datagram) and see which of the servers has it; TimeoutError if none does."""
    stream = next(iter(servers.values())).type == socket.SOCK_STREAM
    near = client.open_socket(socket.AF_INET, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM)
    near.bind((source, 0))
    near.connect(to)
    return reach_again(near, servers)


def reach_again(near: socket.socket, servers: Servers) -> tuple[str, Flow]:
    """The same on a socket that is already connected."""
    token = secrets.token_bytes(8)
    if near.type == socket.SOCK_DGRAM:
        near.send(token)
    ready, _, _ = select.select(list(servers.values()), [], [], PATIENCE)
    if not ready:
        raise TimeoutError(f"no backend was reached within {PATIENCE:.0f} s")
    (name,) = (name for name, server in servers.items() if server is ready[0])
    if near.type == socket.SOCK_STREAM:
        far, source = ready[0].accept()
        far.settimeout(PATIENCE)
    else:
        far = ready[0]
        data, source = far.recvfrom(64)
        assert data == token
    flow = Flow(near, far, source)
    flow.talk()
    return name, flow


def times(count: int, client: Host, to: Address, servers: Servers, source: str = "") -> list[str]:
    """Who answered each of so many connections."""
    answered = []
    for _ in range(count):
        name, flow = reach(client, to, servers, source)
        answered.append(name)
        flow.near.close()
        if flow.far.type == socket.SOCK_STREAM:
            flow.far.close()
    return answered


def listed(gateway: Gateway, *words: str) -> str:
    """The table as operators and Kube-OVN's tests read it; empty where there is none."""
    return gateway.run("nft", *words, "list", "table", "ip", "kube-ovn", check=False)


def clients(gateway: Gateway, backend: Address) -> dict[str, int]:
    """The clients that the backend remembers, and for how many seconds each."""
    found = json.loads(gateway.run("nft", "-j", "list", "table", "ip", "kube-ovn"))["nftables"]
    sets = [item["set"] for item in found if "set" in item]
    (chosen,) = [said for said in sets if said["name"].endswith(f"-{backend[0]}-{backend[1]}")]
    return {element["elem"]["val"]: element["elem"]["expires"] for element in chosen.get("elem", [])}


def send(gateway: Gateway, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """One request to the HTTP face, which comes up shortly after the exec face; status and document."""
    answers: list[tuple[int, Any]] = []

    def asked() -> bool:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            answers.append(_send(gateway, method, path, body))
        return bool(answers)

    wait_for(asked, f"an answer on {gateway.run_dir}/api.sock")
    return answers[0]


def _send(gateway: Gateway, method: str, path: str, body: object) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    try:
        connection.sock.settimeout(PATIENCE)
        connection.sock.connect(str(gateway.run_dir / "api.sock"))
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        said = answer.read()
        return answer.status, json.loads(said) if said else None
    finally:
        connection.close()


def sticky(eip: str, port: int, backends: list[str], timeout: int) -> dict[str, Any]:
    """A shared DNAT with ClientIP affinity, on the wire; the backends listen on port 80."""
    return {
        "eip": eip,
        "externalPort": port,
        "protocol": "tcp",
        "backends": [{"internalIp": ip, "internalPort": 80} for ip in backends],
        "sessionAffinity": "ClientIP",
        "sessionAffinityTimeoutSeconds": timeout,
    }
