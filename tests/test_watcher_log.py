"""The flow log: what is asked for, its filter, and its files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gateway.observer.flow import Flow, Identity, Recorder
from gateway.observer.metrics import Tally
from gateway.watcher.logfile import LogFile
from gateway.watcher.options import Filter, LogOptions, identity
from tests.watcher_kit import EIP, EIP2, FLOATING, UDP, left, mapped


def test_no_log_unless_asked_for() -> None:
    assert LogOptions.of({}) is None
    assert LogOptions.of({"NATGW_FLOW_LOG": "", "NATGW_FLOW_LOG_RATE": "nonsense"}) is None


def test_what_can_be_asked_for() -> None:
    log = LogOptions.of({"NATGW_FLOW_LOG": "stdout"})
    assert log is not None
    assert (log.to_file, log.rate, log.burst, log.files, log.file_bytes) == (False, 20_000, 40_000, 8, 64 << 20)
    asked = {"NATGW_FLOW_LOG": "/x", "NATGW_FLOW_LOG_RATE": "5", "NATGW_FLOW_LOG_MIB": "1", "NATGW_FLOW_LOG_FILES": "2"}
    log = LogOptions.of(asked)
    assert log is not None
    assert (log.to_file, log.rate, log.burst, log.files, log.file_bytes) == (True, 5, 10, 2, 1 << 20)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NATGW_FLOW_LOG", "relative/path"),
        ("NATGW_FLOW_LOG_RATE", "fast"),
        ("NATGW_FLOW_LOG_RATE", "0"),
        ("NATGW_FLOW_LOG_RATE", "10:x"),
        ("NATGW_FLOW_LOG_MIB", "-1"),
        ("NATGW_FLOW_LOG_FILES", "1.5"),
        ("NATGW_FLOW_LOG_FILTER", "protocol"),
        ("NATGW_FLOW_LOG_FILTER", "protocol=gre"),
        ("NATGW_FLOW_LOG_FILTER", "cidr=10.0.0.0/33"),
        ("NATGW_FLOW_LOG_FILTER", "eip=everything"),
        ("NATGW_FLOW_LOG_FILTER", "port=80"),
    ],
)
def test_what_cannot_be_is_named(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        LogOptions.of({"NATGW_FLOW_LOG": "stdout", name: value})


@pytest.mark.parametrize(
    ("text", "one", "passes"),
    [
        ("", left(), True),
        ("protocol=tcp", left(), True),
        ("protocol=udp,icmp", left(), False),
        ("protocol=udp,icmp", left(protocol=UDP), True),
        ("cidr=10.0.1.0/24", left(source="10.0.1.7"), True),
        ("cidr=10.0.1.0/24", left(source="10.0.2.7"), False),
        ("cidr=10.0.9.0/24,203.0.113.0/24", left(source="10.0.2.7"), True),
        ("cidr=10.0.1.80", mapped(), True),
        ("cidr=2001:db8::/32", mapped(), False),
        (f"eip={EIP2}", left(), True),
        (f"eip={EIP}", left(), False),
        (f"eip={EIP},{FLOATING}", mapped(1, FLOATING), True),
        (f"protocol=tcp eip={EIP2} cidr=10.0.1.0/24", left(source="10.0.1.7"), True),
        (f"protocol=tcp eip={EIP2} cidr=10.0.1.0/24", left(source="10.0.2.7"), False),
    ],
)
def test_the_filter(text: str, one: Flow, passes: bool) -> None:
    assert Filter.of(text).lets_through(one) is passes


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"POD_NAME": "vpc-nat-gw-gw1-0"}, "gw1"),
        ({"POD_NAME": "vpc-nat-gw-my-gw-6d5f7c9b8d-x2x4z"}, "my-gw"),
        ({"POD_NAME": "something-else"}, ""),
        ({"POD_NAME": "vpc-nat-gw-gw1-0", "GATEWAY_NAME": "other"}, "other"),
    ],
)
def test_whose_flows_they_are(environment: dict[str, str], name: str) -> None:
    found = identity({**environment, "NODE_NAME": "node-1", "POD_NAMESPACE": "kube-system"})
    assert found == Identity("kube-system", name, environment["POD_NAME"], "node-1")


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_files_are_rotated_by_size_and_the_oldest_goes(tmp_path: Path) -> None:
    tally, path = Tally(), tmp_path / "flows.log"
    log = LogFile(path, 40, 3, tally)
    for number in range(10):
        log.put("start", b"record number %d\n" % number)
        log.flush()
    assert lines(path) == ["record number 8", "record number 9"]
    assert lines(Path(f"{path}.1")) == ["record number 6", "record number 7"]
    assert lines(Path(f"{path}.2")) == ["record number 4", "record number 5"]
    assert sorted(os.listdir(tmp_path)) == ["flows.log", "flows.log.1", "flows.log.2"]
    assert tally.records == {"start": 10}
    assert path.stat().st_mode & 0o777 == 0o600
    log.close()


def test_another_life_goes_on_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "flows.log"
    for number in range(3):
        log = LogFile(path, 40, 1, Tally())
        log.put("start", b"record number %d\n" % number)
        log.flush()
        log.close()
    assert lines(path) == ["record number 0", "record number 1", "record number 2"]
    # It is over its size by now; the only file there may be is begun anew.
    log = LogFile(path, 40, 1, Tally())
    for number in (3, 4):
        log.put("start", b"record number %d\n" % number)
        log.flush()
    assert lines(path) == ["record number 4"]
    log.close()


def test_what_cannot_be_written_is_counted_and_tried_again(tmp_path: Path) -> None:
    tally, path = Tally(), tmp_path / "directory" / "flows.log"
    log = LogFile(path, 1000, 2, tally)
    log.put("start", b"1\n")
    log.put("end", b"2\n")
    log.flush()
    assert tally.drops == {"write_error": 2}
    path.parent.mkdir()
    log.put("end", b"3\n")
    log.flush()
    assert (tally.records, lines(path)) == ({"end": 1}, ["3"])
    log.close()


def test_a_full_disk_is_counted(tmp_path: Path) -> None:
    tally = Tally()
    log = LogFile(Path("/dev/full"), 1000, 2, tally)
    log.put("start", b"1\n")
    log.flush()
    assert (tally.drops, tally.records) == ({"write_error": 1}, {})


def test_a_record_says_who_was_behind_an_eip_and_port() -> None:
    said = json.loads(Recorder(Identity("ns", "gw", "pod", "node")).line("start", left(source="10.0.1.7"), 0))
    assert (said["original"]["sourceIP"], said["original"]["sourcePort"]) == ("10.0.1.7", 1234)
    assert (said["translated"]["sourceIP"], said["translated"]["sourcePort"]) == (EIP2, 40000)
    assert said["natType"] == ["snat"]


def test_a_link_that_lies_where_the_log_should_is_not_followed(tmp_path: Path) -> None:
    target, path = tmp_path / "precious", tmp_path / "flows"
    target.write_text("precious")
    path.symlink_to(target)
    tally = Tally()
    log = LogFile(path, 1 << 20, 2, tally)
    log.put("start", b"{}\n")
    log.flush()
    assert target.read_text() == "precious"
    assert tally.drops == {"write_error": 1}
