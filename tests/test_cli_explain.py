"""``natgw explain`` and ``natgw dump`` as an operator uses them."""

from __future__ import annotations

import json
from pathlib import Path

from rules.flows import Flow
from tests.gateway_kit import STATE
from tests.test_cli_daemon import Natgw
from tests.test_cli_daemon import natgw as natgw  # noqa: PLC0414 -- the fixture
from tests.test_cli_process import natgw as process


def test_the_story_is_told_under_its_topics(natgw: Natgw) -> None:
    natgw("apply", "-f", natgw.file(STATE))
    lines = natgw("explain", "tcp", "203.0.113.5:40000", "192.168.0.10:8888").stdout.splitlines()
    topics = [line.split()[0] for line in lines[:-1] if not line.startswith(" ")]
    assert topics == ["arrival", "rules", "translation", "route", "neighbour", "bandwidth", "answers"]
    assert lines[-1].startswith("=> forwarded")


def test_what_does_not_work_is_exit_code_2_with_what_would_mend_it(natgw: Natgw) -> None:
    natgw("apply", "-f", natgw.file(STATE))
    told = natgw("explain", "tcp", "203.0.113.5:40000", "192.168.0.10:22", code=2).stdout
    assert "missing     no rule leads 192.168.0.10:22/tcp inside" in told
    assert "mend: nat-gateway.sh dnat-add 192.168.0.10,22,tcp,INTERNAL_IP,INTERNAL_PORT" in told
    assert told.endswith("=> local; it does not work\n")


def test_a_live_connection(natgw: Natgw) -> None:
    natgw("apply", "-f", natgw.file(STATE))
    natgw.gateway.kernel.conntrack = [
        Flow(17, "10.0.1.7", "203.0.113.9", 4000, 53, "203.0.113.9", "192.168.0.10", 53, 40211)
    ]
    told = natgw("explain", "--flow", "udp", "192.168.0.10:40211").stdout
    assert "tracked: 10.0.1.7:4000 -> 203.0.113.9:53, answered by 203.0.113.9:53 -> 192.168.0.10:40211" in told
    assert "no tcp connection" in natgw("explain", "--flow", "tcp", "192.168.0.10:40211", code=1).stderr
    natgw("explain", "--flow", "tcp", "192.168.0.10:40211", "10.0.0.1:1", code=2)
    natgw("explain", "tcp", "192.168.0.10:40211", code=2)


def test_offline_by_a_dump_by_a_stored_state_and_by_an_export(natgw: Natgw, tmp_path: Path) -> None:
    natgw("apply", "-f", natgw.file(STATE))
    question = ("tcp", "203.0.113.5:40000", "192.168.0.10:8888")
    live = natgw("explain", *question).stdout
    (tmp_path / "dump.json").write_text(natgw("dump").stdout)
    assert (
        process("explain", "--offline", str(tmp_path / "dump.json"), *question, run_dir=tmp_path / "none").stdout
        == live
    )
    for file in (tmp_path / "state" / "spec.json", natgw.file(STATE)):
        done = process("explain", "--offline", str(file), "--json", *question, run_dir=tmp_path / "none")
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["final"]["destination"] == "10.0.1.10"


def test_a_file_that_is_no_state_is_one_sentence(natgw: Natgw) -> None:
    done = natgw("explain", "--offline", natgw.file({"eips": 3}), "icmp", "10.0.1.1", "192.0.2.1", code=1)
    assert len(done.stderr.splitlines()) == 1
    done = natgw("explain", "--offline", natgw.file(STATE), "icmp", "10.0.1.1", "192.0.2.300", code=1)
    assert len(done.stderr.splitlines()) == 1
