"""``natgw events``: the past, and what goes on to happen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

from rules import commands as c
from tests.gateway_kit import example, gateway
from tests.http_kit import serving
from tests.test_cli_process import NATGW, ROOT, natgw
from tests.test_service import EIP, run


def test_the_past_as_lines_and_as_json(tmp_path: Path) -> None:
    made = gateway(tmp_path / "state")
    with serving(made, tmp_path):
        assert natgw("api", "PUT", "/v1/gateway", run_dir=tmp_path).returncode == 1  # no body
        run(made.service, c.Init(), EIP)
        done = natgw("events", run_dir=tmp_path)
        (line,) = done.stdout.splitlines()
        assert "change   + EIP 192.168.0.10/24  test" in line
        (event,) = map(json.loads, natgw("events", "--json", run_dir=tmp_path).stdout.splitlines())
        assert event["what"] == "+ EIP 192.168.0.10/24"
        run(made.service, c.EipDel(address="192.168.0.10/24"))
        assert len(natgw("events", "-n", "1", run_dir=tmp_path).stdout.splitlines()) == 1
    made.service.close()


def test_following_shows_what_happens_until_it_is_interrupted(tmp_path: Path) -> None:
    made = gateway(tmp_path / "state")
    environment = {**os.environ, "NATGW_RUN_DIR": str(tmp_path)}
    # Whoever runs the tests in the background of a shell has it ignored, and so would the child.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with serving(made, tmp_path):
        run(made.service, c.Init(), EIP)
        with subprocess.Popen(
            [NATGW, "events", "--follow", "--json"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        ) as reader:
            assert reader.stdout is not None
            assert json.loads(reader.stdout.readline())["what"] == "+ EIP 192.168.0.10/24"
            run(made.service, c.EipDel(address="192.168.0.10/24"))
            assert json.loads(reader.stdout.readline())["what"] == "- EIP 192.168.0.10/24"
            reader.send_signal(signal.SIGINT)
            assert reader.wait(timeout=60) == 0
    made.service.close()


def test_following_ends_with_the_daemon(tmp_path: Path) -> None:
    made = gateway(tmp_path / "state")
    environment = {**os.environ, "NATGW_RUN_DIR": str(tmp_path)}
    with serving(made, tmp_path):
        run(made.service, c.Init(), EIP)
        reader = subprocess.Popen(
            [NATGW, "events", "--follow"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert reader.stdout is not None
        assert "+ EIP" in reader.stdout.readline()
        run(made.service, c.EipDel(address="192.168.0.10/24"))
        assert "- EIP" in reader.stdout.readline()  # what was in the past came by a request of its own
    with reader:
        assert reader.wait(timeout=60) in (0, 1)  # 1: a daemon in a hurry cut the stream, and the command says so
    made.service.close()


def test_status_and_top_answer_scripts(tmp_path: Path) -> None:
    made = gateway(tmp_path / "state")
    with serving(made, tmp_path):
        made.service.change(lambda _: example(), by="test").result(timeout=60)
        said = json.loads(natgw("status", "--json", "10.0.1.5", run_dir=tmp_path).stdout)
        assert (said["ready"], said["eipsFound"], said["eips"][0]["eip"]) == (True, 1, "192.168.0.12")
        assert said["eips"][0]["carries"] == [{"kind": "FIP", "text": "10.0.1.5", "traffic": None}]
        top = natgw("top", "--once", run_dir=tmp_path)
        assert (top.returncode, top.stdout) == (0, "traffic is not measured: no flow watcher runs\n")
        assert json.loads(natgw("top", "--json", run_dir=tmp_path).stdout)["collector"]["running"] is False
    made.service.close()
