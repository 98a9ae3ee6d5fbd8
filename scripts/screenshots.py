"""Pictures of the console for the documentation, taken from a lab with real traffic.

    sudo .venv/bin/python scripts/screenshots.py [DIRECTORY]        (docs/pictures by default)

It builds the lab of examples/vpc-nat-gateway.yaml in network namespaces, has its hosts talk to each other for some
seconds, and photographs `natgw console` in headless Chromium, light and dark. The lab is taken down afterwards.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
NATGW = ROOT / ".venv/bin/natgw"
CHROMIUM = "/usr/bin/chromium"
LAB = f"shots{os.getpid()}"
EXAMPLE = ROOT / "examples/vpc-nat-gateway.yaml"
SECONDS = 24
"""So long is traffic shown before the picture is taken: the curves need some."""

# Who talks to whom: a host behind a floating IP, one behind a source translation, the other way round to both.
SERVERS = [("internet", 5201), ("internet", 5202), ("fip", 5203)]


@contextlib.contextmanager
def lab() -> Iterator[str]:
    """The lab's name; it is gone afterwards, however that comes."""
    subprocess.run([NATGW, "lab", "up", "--name", LAB, "-f", EXAMPLE], check=True, stdout=subprocess.DEVNULL)
    try:
        yield LAB
    finally:
        subprocess.run([NATGW, "lab", "down", "--name", LAB], check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def running(*argv: object, netns: str | None = None) -> Iterator[subprocess.Popen[str]]:
    """A program that runs as long as the block."""
    inside = ["ip", "netns", "exec", netns] if netns else []
    process = subprocess.Popen([*inside, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(10)


@contextlib.contextmanager
def traffic(name: str) -> Iterator[None]:
    """Streams of different rates, and short connections, between the lab's hosts."""
    internet, fip, snat = f"{name}.inet", f"{name}.host.test-vpc-1.10.0.1.5", f"{name}.host.test-vpc-1.10.0.1.10"
    where = {"internet": internet, "fip": fip}
    with contextlib.ExitStack() as stack:
        for server, port in SERVERS:
            stack.enter_context(running("iperf3", "-s", "-p", port, netns=where[server]))
        time.sleep(1)
        seconds = str(SECONDS + 60)
        outside = "198.51.100.2"
        stack.enter_context(running("iperf3", "-c", outside, "-p", 5201, "-b", "40M", "-t", seconds, netns=snat))
        stack.enter_context(
            running("iperf3", "-c", outside, "-p", 5202, "-b", "12M", "-t", seconds, "-P", 4, netns=fip)
        )
        stack.enter_context(
            running("iperf3", "-c", "192.168.0.15", "-p", 5203, "-b", "25M", "-t", seconds, netns=internet)
        )
        yield


def photograph(page: Page, directory: Path, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.screenshot(path=directory / f"console-{scheme}.png", full_page=True)


def main() -> None:
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/pictures"
    directory.mkdir(parents=True, exist_ok=True)
    with lab() as name, traffic(name):
        run_dir = next(Path("/run/natgw-lab").glob(f"{name}/gw/*/run"))
        with running(NATGW, "--run-dir", run_dir, "console") as console, sync_playwright() as playwright:
            assert console.stdout is not None
            url = console.stdout.readline().strip()
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.goto(url)
            page.wait_for_timeout(SECONDS * 1000)
            page.get_by_label("From").fill("10.0.1.10:40000")
            page.get_by_label("To", exact=True).fill("198.51.100.2:443")
            page.get_by_role("button", name="Explain").click()
            page.wait_for_selector("#answer li")
            for scheme in ("light", "dark"):
                photograph(page, directory, scheme)
            browser.close()


if __name__ == "__main__":
    main()
