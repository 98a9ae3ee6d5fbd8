"""The stand-in for a tenant's program: an echo server and its client. Standard library only; runs as a script.

    peer.py serve NAME tcp:80 udp:7007 …   answer on these ports, each request with one line of JSON: who answers
                                           ("host") and the address the request came from ("peer")
    peer.py ask < tasks.json               try a list of tasks at once, print the list of what was seen

``serve`` prints "ready" when every port is open, lets go of its standard streams and goes on until it is killed; on
TCP it understands a plain line as well as an HTTP GET, so that curl is a client. A task is {"how": "tcp" | "udp" |
"ping" | "hop", "to": address, "port": number, "wait": seconds, "times": number (1)}; the result {"host", "peer"} or
{"error"}. A task that is repeated ends at the first error; different hosts and peers are joined by "and", in
alphabetical order. "hop" tells as "host" who gives up on a packet at the second hop, as traceroute would.
"""

from __future__ import annotations

import json
import os
import select
import socket
import socketserver
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

_RETRY_SECONDS = 0.5
_IP_RECVERR = 11
_EXTENDED_ERR = struct.Struct("=IBBBBII")


def answer(name: str, peer: str) -> bytes:
    return json.dumps({"host": name, "peer": peer}).encode() + b"\n"


class _Tcp(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    name = ""


class _Udp(socketserver.UDPServer):
    name = ""


class _TcpHandler(socketserver.StreamRequestHandler):
    timeout = 5.0

    def handle(self) -> None:
        assert isinstance(self.server, _Tcp)
        body = answer(self.server.name, self.client_address[0])
        try:
            line = self.rfile.readline(4096)
            if line.startswith(b"GET "):
                while self.rfile.readline(4096).strip():
                    pass
                head = f"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                body = head.encode() + body
            self.wfile.write(body)
        except OSError:
            return  # the client went away; the next one is served


class _UdpHandler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, _Udp)
        self.request[1].sendto(answer(self.server.name, self.client_address[0]), self.client_address)


def serve(name: str, ports: list[str]) -> None:
    servers: list[socketserver.BaseServer] = []
    for text in ports:
        protocol, _, port = text.partition(":")
        server: _Tcp | _Udp
        if protocol == "tcp":
            server = _Tcp(("0.0.0.0", int(port)), _TcpHandler)
        else:
            server = _Udp(("0.0.0.0", int(port)), _UdpHandler)
        server.name = name
        servers.append(server)
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    for thread in threads:
        thread.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    for thread in threads:
        thread.join()


def ask(task: dict[str, Any]) -> dict[str, str]:
    replies: list[dict[str, str]] = []
    for _ in range(task.get("times", 1)):
        replies.append(_ask_once(task))
        if "error" in replies[-1]:
            return replies[-1]
    return {name: " and ".join(sorted({reply[name] for reply in replies})) for name in ("host", "peer")}


def _ask_once(task: dict[str, Any]) -> dict[str, str]:
    try:
        if task["how"] == "ping":
            return _ping(task["to"], task["wait"])
        if task["how"] == "hop":
            return _hop(task["to"], task["port"], task["wait"])
        exchange = _ask_tcp if task["how"] == "tcp" else _ask_udp
        reply: dict[str, str] = json.loads(exchange(task["to"], task["port"], task["wait"]))
        return reply
    except TimeoutError:
        return {"error": "no answer"}
    except OSError as error:
        return {"error": (error.strerror or str(error)).lower()}
    except ValueError:
        return {"error": "an answer that is not ours"}


def _ask_tcp(to: str, port: int, wait: float) -> bytes:
    deadline = time.monotonic() + wait
    with socket.create_connection((to, port), timeout=wait) as link:
        link.sendall(b"who\n")
        data = b""
        while True:
            link.settimeout(max(deadline - time.monotonic(), 0.001))
            piece = link.recv(4096)
            if not piece:
                return data
            data += piece


def _ask_udp(to: str, port: int, wait: float) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        link.connect((to, port))
        return _repeat(link, lambda: link.send(b"who\n"), lambda data: data, wait)


def _ping(to: str, wait: float) -> dict[str, str]:
    """One ICMP echo (RFC 792), repeated until answered or time is up."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as link:
        link.connect((to, 0))
        mark = os.urandom(8)
        head = struct.pack("!BBHHH", 8, 0, 0, os.getpid() & 0xFFFF, 1)
        echo = struct.pack("!BBHHH", 8, 0, _checksum(head + mark), os.getpid() & 0xFFFF, 1) + mark

        def match(packet: bytes) -> bytes | None:
            message = packet[(packet[0] & 15) * 4 :]
            return message if message[:1] == b"\0" and message[8:] == mark else None

        _repeat(link, lambda: link.send(echo), match, wait)
        return {"host": to, "peer": ""}


def _hop(to: str, port: int, wait: float) -> dict[str, str]:
    """Send a packet that may pass one router, and see who says that its time is over (ip(7), IP_RECVERR)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        link.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        link.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 2)
        link.connect((to, port))
        link.send(b"who\n")
        poll = select.poll()
        poll.register(link, 0)  # an error is always told
        if not poll.poll(wait * 1000):
            raise TimeoutError
        _, told, _, _ = link.recvmsg(64, 512, socket.MSG_ERRQUEUE)
        for level, kind, data in told:
            if (level, kind) == (socket.IPPROTO_IP, _IP_RECVERR):
                # struct sock_extended_err, and behind it the address of whoever told.
                return {"host": socket.inet_ntoa(data[_EXTENDED_ERR.size + 4 : _EXTENDED_ERR.size + 8]), "peer": ""}
    raise TimeoutError


def _repeat(link: socket.socket, send: Callable[[], int], match: Callable[[bytes], bytes | None], wait: float) -> bytes:
    deadline = time.monotonic() + wait
    again = 0.0
    while (now := time.monotonic()) < deadline:
        if now >= again:
            send()
            again = now + _RETRY_SECONDS
        if select.select([link], [], [], min(again, deadline) - now)[0]:
            found = match(link.recv(4096))
            if found is not None:
                return found
    raise TimeoutError


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def _ask_all(tasks: list[dict[str, Any]]) -> list[dict[str, str]]:
    results: list[dict[str, str]] = [{} for _ in tasks]

    def one(index: int) -> None:
        results[index] = ask(tasks[index])

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def main(argv: list[str]) -> int:
    if argv[:1] == ["serve"] and len(argv) > 2:
        try:
            serve(argv[1], argv[2:])
        except OSError as error:
            sys.stdout.write(f"cannot open {' '.join(argv[2:])}: {error}\n")
            return 1
        return 0
    if argv == ["ask"]:
        json.dump(_ask_all(json.load(sys.stdin)), sys.stdout)
        return 0
    sys.stderr.write(__doc__ or "")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
