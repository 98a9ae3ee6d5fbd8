"""Run the commands of a page of the documentation in a lab, and put what they print under them.

    sudo .venv/bin/python scripts/walkthrough.py [docs/operations.md …]

The lab is that of the manifest named in the page (``<!-- lab: examples/vpc-nat-gateway.yaml -->``). A block

    ```console
    $ natgw status
    (what it printed)
    ```

is run as an operator would in the gateway's pod: in its network namespace, with its sockets. ``$ host NAME …`` runs in
the namespace of one of the lab's hosts instead. What the reader need not see stands in a comment
``<!-- run: … -->``; ``&`` at its end leaves it running. Exit codes other than 0 are shown.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
NATGW = ROOT / ".venv/bin/natgw"
LAB = "walk"
COLUMNS = "118"
PATIENCE = 60

_PART = re.compile(r"<!-- run: (?P<run>.*?) -->|^```console\n(?P<block>.*?)^```$", re.MULTILINE | re.DOTALL)


class Walk:
    """The lab of one page, and how commands are run in it."""

    def __init__(self, manifest: str) -> None:
        self._manifest = manifest
        self._left: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Walk:
        self._lab("up", "-f", self._manifest)
        self.run_dir = next(Path("/run/natgw-lab").glob(f"{LAB}/gw/*/run"))
        self.gateway = f"{LAB}.gw.{self.run_dir.parent.name}"
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._left:
            process.terminate()
            process.wait(10)
        self._lab("down")

    def _lab(self, *words: str) -> None:
        subprocess.run([NATGW, "lab", *words, "--name", LAB], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)

    def _argv(self, command: str) -> list[str]:
        """``host NAME words`` in that host's namespace, all else in the gateway's."""
        words = shlex.split(command)
        netns = self.gateway
        if words[0] == "host":
            netns, command = f"{LAB}.{words[1]}", shlex.join(words[2:])
        return ["ip", "netns", "exec", netns, "bash", "-c", command]

    def _environment(self) -> dict[str, str]:
        paths = f"{ROOT / '.venv/bin'}:{ROOT / 'image/rootfs/kube-ovn'}:{os.environ['PATH']}"
        home = self.run_dir.parent
        places = {"NATGW_RUN_DIR": self.run_dir, "NATGW_STATE_DIR": home / "state", "NATGW_ENV_FILE": home / "env"}
        return {**os.environ, "PATH": paths, "COLUMNS": COLUMNS, "TERM": "dumb"} | {
            k: str(v) for k, v in places.items()
        }

    def run(self, command: str) -> str:
        """What the command printed, with its exit code where that is not 0."""
        if command.endswith("&"):
            argv = self._argv(command.removesuffix("&").strip())
            null = subprocess.DEVNULL
            self._left.append(subprocess.Popen(argv, env=self._environment(), stdout=null, stderr=null, text=True))
            return ""
        ended = subprocess.run(
            self._argv(command),
            env=self._environment(),
            cwd=self.run_dir.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        said = "".join(f"{line.rstrip()}\n" for line in ended.stdout.splitlines()).strip("\n")
        code = f"(exit code {ended.returncode})" if ended.returncode else ""
        return "".join(f"{part}\n" for part in (said, code) if part)


def walked(text: str, walk: Walk) -> str:
    """The page with every block's output made anew."""

    def again(part: re.Match[str]) -> str:
        if (hidden := part["run"]) is not None:
            if hidden.startswith("wait "):
                time.sleep(float(hidden.removeprefix("wait ")))
            else:
                walk.run(hidden)
            return part[0]
        commands = [line for line in part["block"].splitlines() if line.startswith("$ ")]
        return "```console\n" + "".join(f"{line}\n{walk.run(line[2:])}" for line in commands) + "```"

    return _PART.sub(again, text)


def main() -> None:
    pages = [Path(name) for name in sys.argv[1:]] or [ROOT / "docs/operations.md"]
    for page in pages:
        text = page.read_text()
        manifest = re.search(r"<!-- lab: (\S+) -->", text)
        if manifest is None:
            sys.exit(f"{page}: names no lab (<!-- lab: FILE -->)")
        with Walk(manifest[1]) as walk:
            page.write_text(walked(text, walk))
        blocks = sum(part["block"] is not None for part in _PART.finditer(text))
        print(json.dumps({"page": str(page), "blocks": blocks}))


if __name__ == "__main__":
    main()
