"""What the small processes share: HTTP and metrics text. Loop and server are tested with the BFD speaker."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

from gateway.small import exposition
from gateway.small.http import responder

ROOT = Path(__file__).parents[1]


def test_labels_are_escaped_and_values_are_plain_numbers() -> None:
    text = exposition.text(
        [
            ("a_total", "counter", "Of a.", [({"x": 'back\\slash "quoted"\nnext'}, 12_345_678_901), ({}, 0)]),
            ("b", "gauge", "Of b.", []),
            ("c", "gauge", "Of c.", [({"x": "é"}, 1.5), ({"x": "y", "z": ""}, True)]),
        ]
    )
    assert text.split("\n") == [
        "# HELP a_total Of a.",
        "# TYPE a_total counter",
        r'a_total{x="back\\slash \"quoted\"\nnext"} 12345678901',
        "a_total 0",
        "# HELP b Of b.",
        "# TYPE b gauge",
        "# HELP c Of c.",
        "# TYPE c gauge",
        'c{x="é"} 1.500',
        'c{x="y",z=""} 1',
        "",
    ]


def test_only_the_pages_are_served() -> None:
    respond = responder({"/metrics": lambda: "größer\n"})
    assert respond(b"GET /metrics HTTP/1.1\r\nHost: x\r\n") is None
    reply = respond(b"GET /metrics?x=y HTTP/1.1\r\nHost: x\r\n\r\n") or b""
    head, _, body = reply.partition(b"\r\n\r\n")
    assert (head.split(b"\r\n")[0], body.decode()) == (b"HTTP/1.1 200 OK", "größer\n")
    assert f"Content-Length: {len(body)}".encode() in head.split(b"\r\n")
    for request, status in (
        (b"GET /other HTTP/1.1", b"404"),
        (b"GET /metrics/ HTTP/1.1", b"404"),
        (b"PUT /metrics HTTP/1.1", b"405"),
        (b"\xff\xfe", b"405"),
        (b"GET", b"404"),
    ):
        assert (respond(request + b"\r\n\r\n") or b"").startswith(b"HTTP/1.1 " + status)


SERVER = """
import sys
from pathlib import Path
from gateway.small.http import responder
from gateway.small.loop import Loop
from gateway.small.server import Server, listen_unix
loop = Loop()
Server(loop, listen_unix(Path(sys.argv[1])), responder({"/metrics": lambda: "here\\n"}))
print("listening", flush=True)
loop.run()
"""


def test_a_crowd_of_stalling_callers_keeps_nobody_out(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    # A process of its own: of descriptors above 1023, which the callers take here, select knows nothing.
    argv = [sys.executable, "-c", SERVER, str(path)]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE) as server, contextlib.ExitStack() as stack:
        stack.callback(server.kill)
        assert server.stdout is not None
        assert server.stdout.readline() == b"listening\n"

        def connect(sent: bytes) -> socket.socket:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(path))  # which waits while the backlog is full
            sock.settimeout(60)
            with contextlib.suppress(BrokenPipeError):
                sock.send(sent)
            return sock

        for number in range(2001):
            connect((b"", b"GET", b"GET /metrics HTTP/1.1\r\nX: ")[number % 3])
            if number % 400 == 0:
                assert connect(b"GET /metrics HTTP/1.1\r\n\r\n").recv(4096).endswith(b"here\n")
