"""As much HTTP as probes and Prometheus need: GET and HEAD of a few paths, one request per connection."""

from __future__ import annotations

from collections.abc import Callable, Mapping


def responder(pages: Mapping[str, Callable[[], str]]) -> Callable[[bytes], bytes | None]:
    """A ``respond`` for ``Server``: the pages by their paths, each text made when it is asked for."""

    def respond(received: bytes) -> bytes | None:
        head, end, _ = received.partition(b"\r\n\r\n")
        if not end:
            return None
        method, _, rest = head.partition(b" ")
        path = rest.split(b" ")[0].split(b"?")[0].decode("ascii", "replace")
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", "method not allowed\n")
        page = pages.get(path)
        if page is None:
            return _response("404 Not Found", "404 page not found\n")
        return _response("200 OK", page(), headers_only=method == b"HEAD")

    return respond


def _response(status: str, text: str, headers_only: bool = False) -> bytes:
    body = text.encode()
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if headers_only else body)
