"""The console in a real browser (headless Chromium): what it shows, what can be done with it, by keyboard too."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from api.consoleproxy import serve_console
from gateway.ports import Refused
from gateway.traffic import BusiestDestination, Collector, Direction, EipTraffic, SnatPorts, Talker, Traffic
from tests.gateway_kit import STATE, Gateway, gateway
from tests.http_kit import PATIENCE, ask, serving, unix
from tests.ports import free_port
from tests.test_http_server import TOKEN, token_file

CHROMIUM = "/usr/bin/chromium"
# Nothing that a browser does of its own accord: the page alone is the subject.
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def traffic(at: float) -> Traffic:
    """Two EIPs: one busy, one silent."""
    incoming = Direction(bytes_per_second=125_000, new_flows_per_second=12, active_flows=7)
    outgoing = Direction(bytes_per_second=1_250_000, new_flows_per_second=30, active_flows=1500)
    both = {"in": incoming, "out": outgoing}
    busiest = BusiestDestination(protocol="tcp", address="198.51.100.2", port=443, in_use=1500)
    return Traffic(
        at=at,
        interval_seconds=2,
        collector=Collector(running=True, flows=1507),
        total=both,
        eips=[
            EipTraffic(eip="192.168.0.10"),
            EipTraffic(eip="192.168.0.11", snat_ports=SnatPorts(in_use=1500, busiest=busiest), **both),
        ],
        top_sources=[Talker(address="10.0.1.10", **both)],
    )


@dataclass
class Console:
    """A gateway with a console, and where it is."""

    gateway: Gateway
    run_dir: Path
    url: str


@pytest.fixture
def console(tmp_path: Path) -> Iterator[Console]:
    """A gateway, a flow watcher that tells of made traffic, and the listener that people open."""
    made = gateway(tmp_path / "state")
    listen = f"127.0.0.1:{free_port()}"
    with (
        closing(made.service),
        _watcher(tmp_path / "flows.sock"),
        serving(made, tmp_path, listen, token_file(tmp_path)),
    ):
        with unix(tmp_path / "api.sock") as client:
            assert client.put("/v1/gateway", json=STATE).status_code == 201
        yield Console(made, tmp_path, f"http://{listen}")


def _watcher(path: Path) -> closing[socket.socket]:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def answer() -> None:
        at = 1000.0
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return  # closed: the test has ended
            at += 2
            # Whoever asked may have ceased to wait; the next one has to be answered all the same.
            with connection, contextlib.suppress(ConnectionError):
                connection.recv(64)
                connection.sendall(traffic(at).model_dump_json(by_alias=True).encode())

    threading.Thread(target=answer, daemon=True).start()
    return closing(server)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not os.access(CHROMIUM, os.X_OK):
        pytest.fail(f"{CHROMIUM} is missing: run `make setup` or install Debian's package chromium")
    expect.set_options(timeout=PATIENCE * 1000)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Browser, console: Console) -> Iterator[Page]:
    """The console, logged in; nothing may complain on the browser's console."""
    complaints: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    opened.goto(console.url)
    opened.get_by_role("textbox", name="Token").fill(TOKEN)
    opened.keyboard.press("Enter")
    expect(opened.get_by_role("status").first).to_have_text("ready")
    yield opened
    context.close()
    # A refused question is no fault of the page's; the browser tells of it all the same.
    assert [text for text in complaints if not text.startswith("Failed to load resource")] == []


def test_the_page_needs_no_token_and_what_it_shows_does(console: Console) -> None:
    page = ask("GET", f"{console.url}/console/")
    assert page.status_code == 200
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert ask("GET", f"{console.url}/", follow_redirects=False).headers["location"] == "/console/"
    for path in ("/v1/status", "/console/../v1/status", "/console/%2e%2e/v1/status", "//v1/status"):
        answer = ask("GET", f"{console.url}{path}")
        assert answer.status_code in (401, 404), path
        assert "ready" not in answer.text, path
    assert ask("POST", f"{console.url}/console/").status_code == 405


def test_nothing_comes_from_elsewhere() -> None:
    assets = Path(__file__).parents[1] / "api" / "console"
    for asset in assets.iterdir():
        found = re.findall(r"""https?://[^\s"'<]+""", asset.read_text())
        assert set(found) <= {"http://www.w3.org/2000/svg"}, asset.name


def test_a_wrong_token_is_asked_for_again(browser: Browser, console: Console) -> None:
    page = browser.new_page()
    page.goto(console.url)
    page.get_by_role("textbox", name="Token").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.get_by_role("textbox", name="Token").fill(TOKEN)
    page.keyboard.press("Enter")
    expect(page.get_by_role("status").first).to_have_text("ready")
    page.close()


def test_the_picture_says_what_flows(page: Page) -> None:
    picture = page.get_by_role("img")
    expect(picture).to_have_attribute("aria-label", re.compile(r"Out 10.0 Mbit/s, in 1.0 Mbit/s"))
    expect(picture).to_contain_text("Tenant side: eth0")
    expect(picture).to_contain_text("answers ARP")
    expect(page.locator("#busy")).to_contain_text("10.0.1.10")


def test_eips_are_listed_searched_and_sorted(page: Page) -> None:
    rows = page.locator("#eips tr")
    expect(rows).to_have_count(2)
    expect(rows.first).to_contain_text("192.168.0.11")  # the busiest stands first
    expect(rows.first).to_contain_text("1.5 k of 64.5 k")
    page.get_by_role("button", name="EIP").click()
    expect(rows.first).to_contain_text("192.168.0.10")
    page.get_by_label("Search").fill("no such address")
    expect(rows).to_have_count(0)
    expect(page.locator("#found")).to_have_text("0 of 2")
    page.get_by_label("Search").fill("10.0.1.")
    expect(rows.first).to_contain_text("10.0.1.")


def test_events_come_as_they_happen_and_wait_while_paused(page: Page, console: Console) -> None:
    log = page.get_by_role("log")
    expect(log).to_contain_text("PUT /v1/gateway")
    with unix(console.run_dir / "api.sock") as client:
        assert client.put("/v1/eips/192.168.0.77", json={"address": "192.168.0.77/24"}).is_success
        expect(log.get_by_role("listitem").first).to_contain_text("192.168.0.77")
        page.get_by_role("button", name="Pause").click()
        assert client.delete("/v1/eips/192.168.0.77").is_success
        expect(page.locator("#eips tr")).to_have_count(2)
        expect(log.get_by_role("listitem").first).not_to_contain_text("DELETE")
        page.get_by_role("button", name="Go on").click()
        expect(log.get_by_role("listitem").first).to_contain_text("DELETE")


def test_a_connection_is_explained(page: Page) -> None:
    page.get_by_label("From").fill("198.51.100.2:40000")
    page.get_by_label("To", exact=True).fill("192.168.0.10:8888")
    page.keyboard.press("Enter")
    answer = page.locator("#answer")
    expect(answer).to_contain_text("SHARED_DNAT")
    page.get_by_label("From").fill("nonsense")
    page.keyboard.press("Enter")
    expect(answer).to_contain_text("is not an IPv4 address")


def test_what_is_wrong_is_said(page: Page, console: Console) -> None:
    def refuse(step: str) -> None:
        raise Refused(step, "Operation not permitted", retryable=False)

    console.gateway.kernel.faults = refuse
    with unix(console.run_dir / "api.sock") as client:
        assert not client.put("/v1/eips/192.168.0.78", json={"address": "192.168.0.78/24"}).is_success
    expect(page.locator("#health")).to_contain_text("Operation not permitted")
    console.gateway.kernel.faults = None


def test_everything_is_reached_by_keyboard(page: Page) -> None:
    page.locator("body").focus()
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.id || document.activeElement.name || document.activeElement.textContent"
            )
        )
    assert {"theme", "search", "protocol", "src", "dst", "pause", "events", "Skip to content"} <= reached


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_their_ground(page: Page, scheme: str) -> None:
    """WCAG 2.2, 1.4.3: 4.5 to 1."""
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    names = ("--text", "--quiet", "--in", "--out", "--good", "--bad", "--accent")
    style = "name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()"
    colours = {name: page.evaluate(style, name) for name in (*names, "--ground", "--card")}
    for name in names:
        for ground in ("--ground", "--card"):
            assert _contrast(colours[name], colours[ground]) >= 4.5, (name, ground)


def _contrast(one: str, other: str) -> float:
    brighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    """Relative luminance of ``#rgb`` or ``#rrggbb`` (WCAG 2.2)."""
    digits = colour.removeprefix("#")
    full = digits if len(digits) == 6 else "".join(digit * 2 for digit in digits)
    parts = [int(full[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.fixture
def proxied(console: Console) -> Iterator[str]:
    """What ``natgw console`` prints."""
    told = queue.SimpleQueue[str]()
    stop: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    async def serve() -> None:
        serving_it = asyncio.create_task(serve_console(console.run_dir / "api.sock", 0, told.put))
        loop = asyncio.get_running_loop()
        stop.put(lambda: loop.call_soon_threadsafe(serving_it.cancel))
        with contextlib.suppress(asyncio.CancelledError):
            await serving_it

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    yield told.get(timeout=PATIENCE)
    stop.get(timeout=PATIENCE)()
    thread.join(PATIENCE)


def test_natgw_console_lets_in_who_has_its_token_and_only_to_read(proxied: str) -> None:
    url, _, token = proxied.partition("/console/#token=")
    assert url.startswith("http://127.0.0.1:")
    bearer = {"Authorization": f"Bearer {token}"}
    assert ask("GET", f"{url}/v1/status").status_code == 401
    assert ask("GET", f"{url}/v1/status", headers={"Authorization": "Bearer x"}).status_code == 401
    assert ask("GET", f"{url}/console/../v1/status").status_code in (401, 404)
    assert ask("GET", f"{url}/v1/status", headers=bearer).json()["initialized"] is True
    assert ask("PUT", f"{url}/v1/gateway", headers=bearer, json=STATE).status_code == 405
    assert ask("GET", f"{url}/console/").status_code == 200


def test_what_natgw_console_prints_opens_the_page(proxied: str, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(proxied)
    expect(page.get_by_role("status").first).to_have_text("ready")
    assert "token" not in page.url
    expect(page.get_by_role("log")).to_contain_text("PUT /v1/gateway")
    page.close()
